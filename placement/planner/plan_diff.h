/* plan_diff.h - what it takes to go from one plan to another: which copies come and go, in an order that memory allows. Pure. */
#ifndef CONVOKE_PLACEMENT_PLANNER_PLAN_DIFF_H
#define CONVOKE_PLACEMENT_PLANNER_PLAN_DIFF_H

#include "placement/plan.h"
#include "placement/topology.h"

typedef struct {
    int layer, expert; /* layer: index among MoE layers */
    int from, to; /* copy: from a rank that holds it (nearest link, then lower rank) to `to`. Drop: to = -1, `from` drops it */
} plan_move;

typedef struct {
    int n_moves, n_copied, n_dropped;
    plan_move *moves; /* in an order in which no rank ever holds more than spare_slots copies above the larger of its totals in
                         the two plans, and no expert is ever without a copy */
    int spare_slots;  /* the fewest for which such an order was found: 0 where drops make the room, 1 where ranks swap experts */
    int64_t bytes;    /* copied over links; 0 when bytes_per_expert is unknown */
    double seconds;   /* copies at the links' bandwidth, one NIC per rank, all ranks at once */
    int64_t *rank_bytes; /* [n_ranks] received */
} plan_difference;

/* Both plans are of one shape (checked). t may be NULL: bytes and seconds stay 0. */
status plan_diff(const plan *from, const plan *to, const topology *t, plan_difference *out);
void plan_diff_clear(plan_difference *d);

/* Tokens after which the move has paid: seconds * 1e6 / (us saved per token); HUGE_VAL when nothing is saved. */
double plan_diff_break_even(double move_seconds, double saved_us_per_token);

#endif
