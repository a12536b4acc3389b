/* routing_window.h - how the last tokens were routed: counts that the workers send now and then, bounded, the old ones forgotten.
 *
 *   counts ─► present ─ has half of the window ─► earlier ─ the next one is full ─► forgotten          window = earlier + present
 *
 * One caller at a time. The full statistics (pairs of experts, tens of megabytes for large models) may be taken out for a planner
 * while counting goes on; what balance and drift need, each expert's count, stays here all the time. */
#ifndef CONVOKE_CLUSTER_ROUTING_WINDOW_H
#define CONVOKE_CLUSTER_ROUTING_WINDOW_H

#include "placement/routing_stats.h"

typedef struct routing_window routing_window;

/* Holds between half of `tokens` and all of them, once so many were seen. The shape has one domain. */
status routing_window_create(const routing_shape *shape, bool pairs, uint64_t tokens, routing_window **out);
void routing_window_destroy(routing_window *w); /* NULL is fine */

/* Counts as routing_stats_pack() writes them; what is damaged costs the present half of the window. */
status routing_window_add(routing_window *w, const void *packed, size_t size);

const routing_shape *routing_window_shape(const routing_window *w);
uint64_t routing_window_tokens(const routing_window *w);
uint64_t routing_window_tokens_ever(const routing_window *w);
/* Tokens that chose each expert, [n_layers][n_experts]; changes with the next call. */
const uint64_t *routing_window_counts(routing_window *w);

/* The statistics of the window, which are the caller's now: their sum (either may be NULL). False: they are out already, or there
 * are none. */
bool routing_window_take(routing_window *w, routing_stats **a, routing_stats **b);
/* Their sum comes back (NULL: it was lost, and is forgotten here too). Owned by the window from here on. */
void routing_window_give_back(routing_window *w, routing_stats *sum);

#endif
