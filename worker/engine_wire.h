/* engine_wire.h - what travels between the leader and the other ranks around a step: the step message out, reports back.
 *
 * Inside one job only (same build, same machine type), so structs travel as they are; the control protocol to the coordinator is
 * another matter. Every record is padded to 8 bytes. */
#ifndef CONVOKE_WORKER_ENGINE_WIRE_H
#define CONVOKE_WORKER_ENGINE_WIRE_H

#include "proto/bytes.h"
#include "worker/engine.h"

/* step message: wire_step, n_cancel ids (u64), n_new x { wire_request, prompt, stop ids, biases, allowed ids } */
typedef struct {
    uint32_t n_new, n_cancel, stop, unused;
} wire_step;

typedef struct {
    engine_request request; /* pointers mean nothing on the wire: filled by wire_get_request() */
    uint64_t arrival;
} wire_request;

void wire_put_step(bytes_writer *w, const wire_step *step);
void wire_put_request(bytes_writer *w, const engine_request *request, uint64_t arrival);
/* The request's arrays point into the message. Fails on a message that ends too soon. */
status wire_get_request(bytes_reader *r, wire_request *out);

/* report: wire_report, then events until the end: { wire_event, experts, weights, logits } */
typedef struct {
    uint32_t n_prefill_rows, n_decode_rows;
} wire_report;

typedef struct {
    engine_event event; /* pointers mean nothing on the wire */
    uint32_t has_choices, has_logits;
} wire_event;

/* Room for an event and its payload; the pointers say where to write. Valid until the writer grows again. */
typedef struct {
    size_t event, experts, weights, logits; /* offsets in the writer */
} wire_event_place;
wire_event_place wire_put_event(bytes_writer *w, const wire_event *event, size_t choices_per_row, size_t vocab);
status wire_get_event(bytes_reader *r, size_t choices_per_row, size_t vocab, engine_event *out);

#endif
