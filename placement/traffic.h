/* traffic.h - a routing trace as planners and replays want it: sequences in file order, tokens in order of position, and the
 * experts layer by layer, so that one layer's choices lie together. Data; two bytes per choice. */
#ifndef CONVOKE_PLACEMENT_TRAFFIC_H
#define CONVOKE_PLACEMENT_TRAFFIC_H

#include "placement/routing_trace.h"

#include <stdbool.h>

typedef struct {
    routing_shape shape; /* own copy */
    int64_t n_tokens;
    int n_sequences;
    int64_t *first_token; /* [n_sequences + 1] tokens of sequence s: first_token[s] .. first_token[s + 1] - 1 */
    int *domain;          /* [n_sequences] that of its first token in the trace */
    int64_t *row;         /* [n_tokens] its row in the trace; NULL (traffic made by hand): the token's own number */
    uint8_t *phase;       /* [n_tokens] */
    int32_t *owner;       /* [n_tokens] rank that owned the token when it ran; NULL: the trace does not say */
    int32_t *step;        /* [n_tokens] step in which it ran; NULL with owner */
    uint16_t *experts;    /* [n_layers][n_tokens][top_k] ROUTING_NO_EXPERT: dropped */
} traffic;

/* Which part of a trace: all fields zero (or no part at all) takes everything. */
typedef struct {
    const bool *domains; /* [trace's n_domains] wanted; NULL: all. A sequence goes by its first token's,
                          * whatever its phase */
    int phase;           /* TRAFFIC_DECODE: generated tokens only, TRAFFIC_PREFILL: the others */
    double from, to;     /* of the sequences left by the above, in file order, as shares of their number: those from
                          * round(from * n) up to round(to * n), 0 to 1, so that parts side by side share none; both 0: all */
} traffic_part;
enum { TRAFFIC_ALL = 0, TRAFFIC_DECODE = 1, TRAFFIC_PREFILL = 2 };

/* Sequences are told apart by the trace's `sequence`, in the order of their first row, tokens sorted by position (rows of one
 * position keep their order). `owner` and `step`, i32 [tokens][1] or [tokens], are taken over where the trace has both. Fails
 * when nothing is left. */
status traffic_load(const routing_trace *trace, const traffic_part *part, traffic *out);
void traffic_clear(traffic *t); /* a zeroed one is fine */

static inline const uint16_t *traffic_experts(const traffic *t, int layer, int64_t token)
{
    return t->experts + ((size_t)layer * (size_t)t->n_tokens + (size_t)token) * (size_t)t->shape.top_k;
}
/* P: tokens that chose the expert, out [n_layers][n_experts]. */
void traffic_count(const traffic *t, uint64_t *out);

#endif
