/* company_bound.h - what steps cost at least when experts are cut into fixed groups, because every expert has company. Pure but
 * for scratch memory.
 *
 * One partition serves all steps. Let y(e, f) say whether e and f share a rank: symmetric, and every expert has at least
 * `company` others beside it. The busiest rank of step s is no quicker than the rank of any expert e:
 *   T(s) >= c(e, s) + sum over f of y(e, f) c(f, s).
 * Any weights w(e, s) >= 0 that sum to 1 in every step give a bound: the weighted sum of the right sides is linear in y, and
 *   sum over s T(s) >= sum over s, e w(e, s) c(e, s) + 1/2 sum over e (the `company` smallest D(e, f)),
 *   D(e, f) = sum over s of w(e, s) c(f, s) + w(f, s) c(e, s),
 * since each pair is counted at both ends. Good weights are found by playing them against y (multiplicative weights; Freund and
 * Schapire 1999): each step moves its weight to the experts whose rank is busiest. What is known of a step by other means, its
 * floor, takes part like one more expert, alone on its rank. */
#ifndef CONVOKE_PLACEMENT_PLANNER_COMPANY_BOUND_H
#define CONVOKE_PLACEMENT_PLANNER_COMPANY_BOUND_H

#include "proto/status.h"

typedef struct {
    int n_steps, n_experts;
    int company;         /* experts that sit beside every expert, at least */
    const double *cost;  /* [n_experts][n_steps] >= 0 */
    const double *floor; /* [n_steps] lower bounds known already */
    int rounds;
    double deadline; /* clock_seconds(); 0: none */
} company_task;

/* A lower bound of the sum over steps, at least the sum of the floors. */
status company_bound(const company_task *t, double *out);

#endif
