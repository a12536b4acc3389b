/* bounds.h - how good a plan could be at all: proved lower bounds, each labelled with what it bounds.
 *
 * Every bound holds for every plan that keeps the problem's room (and caps, where slack was given); NAN: not computed (with
 * why). */
#ifndef CONVOKE_PLACEMENT_PLANNER_BOUNDS_H
#define CONVOKE_PLACEMENT_PLANNER_BOUNDS_H

#include "placement/planner/problem.h"

enum { BOUND_LOAD = 1, BOUND_STEP = 2, BOUND_RANKS = 4, BOUND_SPECTRAL = 8, BOUND_MATCHING = 16 };

typedef struct {
    double balance; /* of max_over_mean_mean: hottest expert with the coldest others, without replicas; 1 with enough slots */
    double *balance_of_layer; /* [n_layers] */
    double ranks_per_token;   /* distinct ranks: dual of the set-partitioning LP, rounded down safely */
    int ranks_layers_proved;  /* layers whose LP was solved with exact or bounded pricing; the others count with their trivial
                                 bound */
    double flow_spectral, flow_matching;               /* R-flow only */
    double step_us, step_compute_us, step_transfer_us; /* for the replayed trace, owners and slots */
    double seconds;                                    /* spent */
    char remark[256];                                  /* where the gap comes from */
} plan_bounds;

status bounds_compute(const problem *p, unsigned which, double seconds, plan_bounds *out);
void bounds_clear(plan_bounds *b);

/* The parts, by file: bounds_load.c, bounds_step.c, bounds_ranks.c (lp.h), bounds_flow.c (spectral; matching by lp.h). */
status bounds_load(const problem *p, plan_bounds *out);
status bounds_step(const problem *p, double seconds, plan_bounds *out); /* uses ranks_per_token's per-layer form where known */
status bounds_ranks(const problem *p, double seconds, plan_bounds *out);
/* Its per-layer form, without clocks' influence but for `seconds`: meetings [n_layers] of tokens with distinct ranks of their
 * homes that no plan keeping the slots goes below (caps count only where slack was given and the layer has no slot to spare), and
 * whether they come from the solved linear programme. Homes alone: where a layer has slots to spare, a token that goes to
 * replicas may meet fewer ranks than its homes. */
status bounds_ranks_of_layers(const problem *p, double seconds, double *meetings, bool *proved);
status bounds_spectral(const problem *p, double seconds, plan_bounds *out);
status bounds_matching(const problem *p, double seconds, plan_bounds *out);

#endif
