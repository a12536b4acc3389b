/* replica_split.h - how many rows of a step each copy of an expert computes, so that the busiest rank is done soonest.
 *
 * Every rank computes it alike from the same counts before rows leave (worker), and replay.h computes it for a simulated step.
 * Pure; nothing is allocated. The algorithm has a name, REPLICA_SPLIT, because results depend on it:
 *
 *   "water-fill-1". A rank's load is rows * row_us + experts with a row there * expert_us: whole numbers times constants, worked
 *   out anew each time. Experts are looked at by rising number, an expert's copies by rising rank; the first of equals wins.
 *   Handing m rows from a copy to another of the same expert may close the one (its last row) and open the other (its first).
 *   1. Experts with one copy have no choice. Of the others with rows, those with most rows first (ties: lower expert), each goes
 *      whole to the copy whose rank then has least load.
 *   2. At most 2 * n rounds, n the layer's copies. b is the rank with most load (ties: lower rank), B its load. Of these the
 *      first that works; when none does, the rounds end:
 *
 *      Shift: m rows of a copy on b to another copy, on g, m = q, q + 1 or all of its rows (as far as it has them), where
 *      q = floor((B - load of g with that copy open) / (row_us of b + row_us of g)), not below 0. Of all these the one after
 *      which the busier of b and g has least load, which must be below B.
 *
 *      Path: breadth first from b, over copies with rows. A rank v is entered once, by the first copy found there for which its
 *      load, with that copy open, is not above B. If that is two or more hops from b: m = floor((B - that load) / (row_us of b +
 *      row_us of v)), not below 1, not above the rows of any giving copy of the way. It works if with m rows handed along the way
 *      b and v end below B and no rank between them above it.
 *
 *      Chain: the goal is B * (1 - 1/1024). From u, first b, hand over m rows of a copy to another copy, on w: first m =
 *      floor((load of u - goal) / row_us of u) + 1 if the copy has more, then all of its rows if that brings u below the goal. It
 *      works if w is below the goal too; else the same from w, 4 hand-overs deep at most (the fourth is made only if it leaves w
 *      below the goal). What does not end well is taken back. At most 2 * n hand-overs are made so in all rounds together.
 *
 * Integer rows, splits allowed; a copy with at least one row costs expert_us once, each row row_us (topology.h). */
#ifndef CONVOKE_PLACEMENT_REPLICA_SPLIT_H
#define CONVOKE_PLACEMENT_REPLICA_SPLIT_H

#include "placement/plan.h"
#include "placement/topology.h"

#define REPLICA_SPLIT "water-fill-1"

typedef struct replica_split replica_split; /* scratch for plans of one size */

status replica_split_create(int n_ranks, int n_experts, int max_copies_per_layer, replica_split **out);
void replica_split_destroy(replica_split *s); /* NULL is fine */

/* rows [n_experts] of one layer and step -> rows_of_copy, in the order of the plan's copy_ranks of that layer
 * (rows_of_copy[i] belongs to copy_ranks[first_copy[layer * n_experts] + i]). Costs about 10 microseconds for 256 experts on 64
 * ranks with one or two replicas each (tests/bench_plan_replay.c). */
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
