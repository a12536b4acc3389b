/* replica_split.h - how many rows of a step each copy of an expert computes, so that the busiest rank is done soonest.
 *
 * Every rank computes it alike from the same counts before rows leave (worker), and replay.h computes it for a simulated step.
 * Pure; nothing is allocated. The algorithm has a name, REPLICA_SPLIT, because results depend on it:
 *
 *   "water-fill-1": whole experts first, most rows first, each onto its least loaded copy; then the busiest rank hands rows or
 *   whole experts on, by one copy, by a path of copies or in exchange, until no rank can take any.
 *
 * Integer rows, splits allowed; a copy with at least one row costs expert_us once, each row row_us (topology.h). Ties: lower
 * expert, then lower rank. */
#ifndef CONVOKE_PLACEMENT_REPLICA_SPLIT_H
#define CONVOKE_PLACEMENT_REPLICA_SPLIT_H

#include "placement/plan.h"
#include "placement/topology.h"

#define REPLICA_SPLIT "water-fill-1"

typedef struct replica_split replica_split; /* scratch for plans of one size */

status replica_split_create(int n_ranks, int n_experts, int max_copies_per_layer, replica_split **out);
void replica_split_destroy(replica_split *s); /* NULL is fine */

/* rows [n_experts] of one layer and step -> rows_of_copy, in the order of the plan's copy_ranks of that layer
 * (rows_of_copy[i] belongs to copy_ranks[first_copy[layer * n_experts] + i]). Costs a few microseconds for 256 experts. */
void replica_split_rows(replica_split *s, const plan *p, int layer, const double *row_us, const double *expert_us,
                        const int32_t *rows, int32_t *rows_of_copy);
/* Which copy serves which owner: rows_of_owner [n_owners][n_experts] (their sums are `rows` above) and rows_of_copy as computed
 * -> quota [n_owners][copies of the layer]: rows of that owner that go to that copy. An owner's own copy first, then copies on
 * its node, then the rest, each in (owner, copy) order. An owner's rows in their order fill its copies in the plan's order. */
void replica_split_owners(replica_split *s, const plan *p, int layer, int n_owners, const int32_t *rows_of_owner,
                          const int32_t *rows_of_copy, int32_t *quota);
/* Microseconds of the busiest rank. */
double replica_split_busiest(const plan *p, int layer, const double *row_us, const double *expert_us,
                             const int32_t *rows_of_copy);
/* No split of whole rows makes the busiest rank quicker than this: rows cut at will, each expert with rows charged for opening
 * one copy, the cheapest in rows. It is the largest over sets of ranks A of (what is forced into A) / (speed of A), found by
 * max-flow; exact for that relaxation, so where expert_us is 0 the best split lies less than a row above it. Offline only: it
 * allocates. */
status replica_split_bound(const plan *p, int layer, const double *row_us, const double *expert_us, const double *rows,
                           double *out);

#endif
