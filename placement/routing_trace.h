/* routing_trace.h - every token's experts and weights, layer by layer, as a safetensors file: written row by row, read back
 * mapped.
 *
 *   experts   u8 (up to 255 experts) or u16 [tokens][layers][k]  by descending weight; 255 or 65535: dropped, weight 0
 *   weights   f32 (the reader also takes f16) [tokens][layers][k]
 *   sequence, position  i32 [tokens];   phase  u8 [tokens];   domain  u16 [tokens]
 *   owner, step  i32 [tokens]  where it is known: the rank that owned the token when it ran, and in which step (traffic.h)
 *
 * Further tensors of imports and predictors (score_experts, scores, logits, predicted) stand beside them and are found by name.
 */
#ifndef CONVOKE_PLACEMENT_ROUTING_TRACE_H
#define CONVOKE_PLACEMENT_ROUTING_TRACE_H

#include "placement/routing_shape.h"

#include <stdint.h>

typedef struct {
    const uint16_t *experts; /* [n_layers][top_k] by descending weight, ROUTING_NO_EXPERT: dropped */
    const float *weights;    /* [n_layers][top_k] */
    int sequence, position, phase, domain;
    int owner, step; /* only written where the writer was made for it; not read */
} routing_row;

/* Rows go to an unnamed file beside the trace, so memory stays the same however long it gets; the trace appears under its name
 * when routing_trace_writer_finish() has succeeded, and an unfinished one leaves nothing behind. One caller at a time. */
typedef struct routing_trace_writer routing_trace_writer;

status routing_trace_writer_create(const char *path, const routing_shape *shape, routing_trace_writer **out);
/* The same with the columns owner and step. Rows of a step and an owner must come in the order in which they ran. */
status routing_trace_writer_create_owned(const char *path, const routing_shape *shape, routing_trace_writer **out);
void routing_trace_writer_destroy(routing_trace_writer *writer); /* NULL is fine */
/* Refuses an expert, phase or domain out of range. Allocates nothing. */
status routing_trace_writer_add(routing_trace_writer *writer, const routing_row *row);
long long routing_trace_writer_rows(const routing_trace_writer *writer);
status routing_trace_writer_finish(routing_trace_writer *writer);

/* An open, mapped trace. Opening reads the whole of it once to check that every expert, phase and domain is in range: the
 * functions below need no errors. */
typedef struct routing_trace routing_trace;

status routing_trace_open(const char *path, routing_trace **out);
/* The same for a file that is already open (routing_trace_close() closes it; on failure it stays open). */
status routing_trace_from(safetensors *file, routing_trace **out);
void routing_trace_close(routing_trace *trace); /* NULL is fine */

const routing_shape *routing_trace_shape(const routing_trace *trace);
const char *routing_trace_path(const routing_trace *trace);
int64_t routing_trace_n_tokens(const routing_trace *trace);
/* Row `token` with experts and weights [n_layers][top_k] copied into the caller's arrays; weights NULL: not wanted. */
routing_row routing_trace_row(const routing_trace *trace, int64_t token, uint16_t *experts, float *weights);
/* A further tensor whose first axes are [tokens][layers]; fails by name when it is not there. */
status routing_trace_tensor(const routing_trace *trace, const char *name, const tensor_view **out);
/* A further tensor of any shape; NULL when it is not there. */
const tensor_view *routing_trace_find(const routing_trace *trace, const char *name);

#endif
