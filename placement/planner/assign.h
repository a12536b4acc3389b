/* assign.h - one layer's experts onto ranks by load alone: longest processing time first, then exchanges. Pure but for scratch
 * memory; deterministic.
 *
 * The figure to lower is the busiest rank's load over what it should have: max over ranks of load / (share * total), 1 where
 * every rank has its share. */
#ifndef CONVOKE_PLACEMENT_PLANNER_ASSIGN_H
#define CONVOKE_PLACEMENT_PLANNER_ASSIGN_H

#include <stdbool.h>

#define ASSIGN_NO_MEMORY (-1.0)
#define ASSIGN_NO_ROOM   (-2.0)

typedef struct {
    int n_items, n_ranks;
    const double *load;  /* [n_items] >= 0 */
    const double *share; /* [n_ranks] > 0, sums to 1 */
    const int *slots;    /* [n_ranks] items it may hold; together at least n_items */
    const int *group;    /* [n_items] items of one group keep to different ranks; NULL: each is its own */
} assign_task;

/* Fills rank [n_items] and returns the figure; ASSIGN_NO_ROOM when the slots do not hold all items (or groups could not be kept
 * apart), ASSIGN_NO_MEMORY; rank is then undefined. About a millisecond for 256 items on 64 ranks. */
double assign_spread(const assign_task *t, int *rank);
/* Longest processing time first alone, without exchanges. */
double assign_first(const assign_task *t, int *rank);
/* The same as assign_spread() from a given, valid assignment; never worse than it. */
double assign_improve(const assign_task *t, int *rank);
/* What `rank` comes to. */
double assign_worst(const assign_task *t, const int *rank);
/* No assignment is better: the hottest item on the rank that suits it best with as many of the coldest as have no room elsewhere;
 * at least 1. */
double assign_bound(const assign_task *t);

/* Experts without replicas. */
static inline double assign_lpt(int n_experts, int n_ranks, const double *load, const double *share, const int *slots, int *home)
{
    assign_task t = {n_experts, n_ranks, load, share, slots, 0};
    return assign_spread(&t, home);
}

#endif
