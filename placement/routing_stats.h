/* routing_stats.h - how often each expert is chosen, with which others, and by which of the next layer: counts, no times.
 *
 *   P  tokens_per_expert  [layers][experts]                tokens that chose e in layer l
 *   R  next_layer_pairs   [layers - 1][experts][experts]   tokens that chose i in layer l and j in layer l + 1: all k * k pairs
 *      same_layer_pairs   [layers][experts][experts]       tokens that chose both; symmetric, its diagonal is P
 *
 * kept apart per domain and phase (a *slot*) and written as one safetensors file whose first axis is domain * 2 + phase. A
 * slot's counts are set aside when its first token comes: 8 * ((2 * layers - 1) * experts^2 + layers * experts) bytes, e.g. 60 MB
 * for 58 layers of 256 experts, 8 * layers * experts without pairs. One caller at a time. */
#ifndef CONVOKE_PLACEMENT_ROUTING_STATS_H
#define CONVOKE_PLACEMENT_ROUTING_STATS_H

#include "placement/plan.h"
#include "placement/routing_shape.h"
#include "placement/routing_trace.h"
#include "proto/bytes.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct routing_stats routing_stats;

/* pairs false: P alone, for those who only watch the balance. */
status routing_stats_create(const routing_shape *shape, bool pairs, routing_stats **out);
void routing_stats_destroy(routing_stats *stats); /* NULL is fine */

/* One token's choices, experts [n_layers][top_k] (ROUTING_NO_EXPERT: dropped). Refuses an expert, domain or phase out of range
 * and a first token of a slot that finds no memory; then nothing has changed. Costs 2 k^2 increments per layer. */
status routing_stats_add_row(routing_stats *stats, const uint16_t *experts, int domain, int phase);
/* Every token of a trace of the same model; domains go together by name, new ones are appended. */
status routing_stats_add_trace(routing_stats *stats, const routing_trace *trace);
/* Counts that somebody else took: tokens_per_expert [n_layers][n_experts] of `tokens` tokens. Not for statistics with pairs. */
status routing_stats_add_counts(routing_stats *stats, const uint64_t *tokens_per_expert, uint64_t tokens, int domain, int phase);
/* Adds all counts of `from`, which is of the same model, and, if `into` has pairs, has them too; domains as above. */
status routing_stats_merge(routing_stats *into, const routing_stats *from);
/* The same for one domain of `from` and one phase (-1: all); only that domain is appended. */
status routing_stats_merge_part(routing_stats *into, const routing_stats *from, int domain, int phase);

/* For ranks of one job, which count by the same shape: all counts that are not zero, appended to `out`, in two or three bytes
 * each as a rule; and their addition on the other side, which refuses bytes of another shape or cut short. */
status routing_stats_pack(const routing_stats *stats, bytes_writer *out);
status routing_stats_add_packed(routing_stats *into, const void *bytes, size_t size);

status routing_stats_write(const routing_stats *stats, const char *path);
/* Files without the two pairs tensors are read as statistics without pairs. */
status routing_stats_read(const char *path, routing_stats **out);

const routing_shape *routing_stats_shape(const routing_stats *stats);
bool routing_stats_has_pairs(const routing_stats *stats);
uint64_t routing_stats_tokens(const routing_stats *stats, int domain, int phase); /* tokens seen */
/* The counts of one slot, shapes as above; NULL when the slot has seen nothing (or there are no pairs). */
const uint64_t *routing_stats_tokens_per_expert(const routing_stats *stats, int domain, int phase);
const uint64_t *routing_stats_next_layer_pairs(const routing_stats *stats, int domain, int phase);
const uint64_t *routing_stats_same_layer_pairs(const routing_stats *stats, int domain, int phase);
size_t routing_stats_slot_bytes(const routing_stats *stats); /* what one slot takes once it is used */
size_t routing_stats_bytes(const routing_stats *stats);      /* what all used ones take now */

/* P summed over the slots of `domain` and `phase` (-1: all) into out [n_layers][n_experts]. */
void routing_stats_sum_tokens(const routing_stats *stats, int domain, int phase, uint64_t *out);
/* Busiest rank over mean in each layer, for tokens_per_expert [n_layers][n_experts] of the plan's shape, a token shared evenly by
 * an expert's copies: out [n_layers]; a layer without tokens gets 1. loads: [n_ranks] scratch. Pure. */
void routing_balance(const plan *p, const uint64_t *tokens_per_expert, double *loads, double *out);

#endif
