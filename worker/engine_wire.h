/* engine_wire.h - what travels between the leader and the other ranks around a step: the step message out, reports back.
 *
 * Inside one job only (same build, same machine type), so structs travel as they are; the control protocol to the coordinator is
 * another matter. Every record is padded to 8 bytes. */
#ifndef CONVOKE_WORKER_ENGINE_WIRE_H
#define CONVOKE_WORKER_ENGINE_WIRE_H

#include "proto/bytes.h"
#include "worker/engine.h"
#include "worker/scheduler.h"

/* step message: wire_step, leaves, growths, rows (scheduler.h), then joins: { wire_join, prompt, stop ids, biases, allowed ids,
 * candidates' ids, blocks }, moves { wire_move, blocks from, to }, then a plan (PLAN_NEW). Only what changed, and the rows. */
typedef enum { PLAN_STAYS, PLAN_NEW, PLAN_FORGET, PLAN_FLIP } wire_plan_verb;
typedef struct {
    uint32_t n_leaves, n_joins, n_growths, n_rows, stop;
    uint32_t plan_verb;             /* what becomes of plans, before the rows run */
    uint64_t plan_epoch, plan_rate; /* PLAN_NEW: its epoch, bytes per second */
    uint32_t count;                 /* the routing statistics so far are set aside, to be sent */
    uint32_t n_moves;
    uint32_t first_sender, end_sender; /* these ranks send what they have set aside, a piece with each report */
} wire_step;

typedef struct {
    engine_request request; /* pointers mean nothing on the wire: filled by wire_get_join(). Its prompt is all tokens so far */
    int rank, place;
    int n_original;        /* tokens given when the request was submitted: what came after is this engine's own output */
    int n_cached;          /* the first so many are in its blocks */
    int n_ran;             /* the first so many have been reported */
    bool judged;           /* whether it lives on the right rank */
    const int32_t *blocks; /* [n_blocks] */
    int n_blocks;
} wire_join;

void wire_put_step(bytes_writer *w, const wire_step *head, const scheduler_step *step);
void wire_put_join(bytes_writer *w, const wire_join *join);
/* Contents of blocks that travel from rank to rank. */
typedef struct {
    uint64_t key;
    uint32_t from, to, n_blocks, unused;
} wire_move;
void wire_put_move(bytes_writer *w, const scheduler_move *move);
void wire_put_plan(bytes_writer *w, const plan *p);

/* A step message in place. */
typedef struct {
    wire_step head;
    const scheduler_leave *leaves;
    const scheduler_growth *growths;
    const scheduler_rows *rows;
} wire_step_view;
/* Both fail on a message that ends too soon; arrays point into it. */
status wire_get_step(bytes_reader *r, wire_step_view *out);
status wire_get_join(bytes_reader *r, wire_join *out);
status wire_get_move(bytes_reader *r, wire_move *out, const int32_t **from_blocks, const int32_t **to_blocks);
/* A plan of the same ranks, layers and experts as `like`. */
status wire_get_plan(bytes_reader *r, const plan *like, plan *out);

/* report: wire_report, rows of each MoE layer (u64), a piece of packed statistics, a sentence,
 * transfers that ended (wire_ended), judgements { wire_judgement, microseconds of each rank }, then events until the end: {
 * wire_event, experts, weights, logits, log-probabilities, candidates of row, candidates, reason }. Counts are since the start.
 */
typedef struct {
    unsigned long long expert_rows, link_bytes[3];
    double wait_seconds, compute_seconds; /* in the exchange; attention, experts and head */
    uint64_t plan_epoch, loaded, total;   /* of the plan wished for; 0: none */
    uint32_t plan_ready, plan_failed;
    uint32_t counts_bytes, counts_state; /* a piece of what was set aside; wire_counts_state */
    uint32_t sentence_bytes;             /* why the plan or the counting failed */
    uint32_t n_ended, n_judged, unused;
} wire_report;
/* What a sequence's first rows would have cost from every rank. */
typedef struct {
    uint64_t id;
    int32_t n_tokens, n_done, n_left, unused;
} wire_judgement;
typedef struct {
    uint64_t key, sent;
} wire_ended;
typedef enum { COUNTS_NONE, COUNTS_MORE, COUNTS_LAST, COUNTS_FAILED } wire_counts_state;

typedef struct {
    engine_event event; /* pointers mean nothing on the wire */
    uint32_t has_choices, has_logits, has_logprobs, n_reserved /* candidates that there is room for */, reason_bytes;
    uint32_t is_void; /* came to nothing: skip it */
} wire_event;

/* Room for an event and its payload: where to write it. Offsets in the writer, which may move when it grows. */
typedef struct {
    size_t event, experts, weights, logits, logprobs, counts, candidates, reason;
} wire_event_place;
/* Bytes and a sentence, each padded. */
void wire_put_padded(bytes_writer *w, const void *from, size_t n);
const void *wire_take_padded(bytes_reader *r, size_t n); /* NULL for none */
wire_event_place wire_put_event(bytes_writer *w, const wire_event *event, size_t choices_per_row, size_t vocab);
status wire_get_event(bytes_reader *r, size_t choices_per_row, size_t vocab, engine_event *out, bool *is_void);

#endif
