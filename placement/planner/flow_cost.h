/* flow_cost.h - R-flow as linear costs: what an expert costs on a rank while the neighbouring layers stay where they are. Pure.
 */
#ifndef CONVOKE_PLACEMENT_PLANNER_FLOW_COST_H
#define CONVOKE_PLACEMENT_PLANNER_FLOW_COST_H

#include "placement/planner/problem.h"

/* One over all pairs counted between layers l and l + 1, over the number of layer pairs: sums of weight * R * distance over
 * all layer pairs are score_flow(). 0 where none were counted. */
double flow_weight(const problem *p, int layer);
/* cost [n_experts][n_ranks] of the layer's experts given home [n_layers][n_experts] of its neighbours; `after` false leaves the
 * next layer out, so that layers can be placed one after another. */
void flow_costs(const problem *p, int layer, const int *home, bool after, double *cost);
/* The whole: score_flow() of homes. */
double flow_of(const problem *p, const int *home);

#endif
