/* moetuner_ilp.h - MoETuner's two integer programmes (arXiv 2502.06643, section 4), as models for lp.h.
 *
 * ILP 1 balances: experts of a layer into n clusters, none empty, sizes free. Printed with the spread |T - mean|, whose optimum
 * is near 0 and whose relative gap never closes; stated here as least busiest cluster, with the same optima where it matters and
 * bounds that mean something. (That every expert is in exactly one cluster is missing in print.)
 * ILP 2 orders: y[l][c][g] puts a layer's clusters on ranks; products of neighbouring layers' choices are linearised with the
 * equations that permutations give. */
#ifndef CONVOKE_PLACEMENT_PLANNER_MOETUNER_ILP_H
#define CONVOKE_PLACEMENT_PLANNER_MOETUNER_ILP_H

#include "placement/planner/lp.h"
#include "placement/planner/moetuner_dp.h"

/* Columns e * n_ranks + c, then the busiest cluster's load over its share of the whole (share adds to 1), in mean loads: 1 is
 * balance. */
status moetuner_ilp1_create(const problem *p, int layer, lp_model **out);
void moetuner_ilp1_start(const problem *p, int layer, const int *home, double *x); /* home [n_experts] -> x [columns] */

/* All layers: columns y [n_layers][n][n] first. */
bool moetuner_ilp2_possible(const cluster_order *o);
status moetuner_ilp2_create(const cluster_order *o, lp_model **out);
void moetuner_ilp2_start(const cluster_order *o, const int *rank, double *x); /* x [lp_n_columns] */
/* One layer between its neighbours: linear. Columns y [n][n], then the two slowest transfers. */
status moetuner_window_create(const cluster_order *o, int layer, const int *rank, lp_model **out);
void moetuner_window_start(const cluster_order *o, int layer, const int *rank, double *x);
/* y [n][n] of one layer -> its ranks. */
void moetuner_take(const cluster_order *o, const double *y, int *rank);

/* Costs of ILP 2 are multiplied by this over the largest flow times the slowest link, so that GLPK's tolerances mean little. */
double moetuner_scale(const cluster_order *o);

#endif
