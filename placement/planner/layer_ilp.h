/* layer_ilp.h - the integer programmes of placement by R-flow: one layer while its neighbours stay, and all layers at once.
 * Models only; lp.h solves them. */
#ifndef CONVOKE_PLACEMENT_PLANNER_LAYER_ILP_H
#define CONVOKE_PLACEMENT_PLANNER_LAYER_ILP_H

#include "placement/planner/lp.h"
#include "placement/planner/problem.h"

/* Costs are multiplied by this, so that GLPK's tolerances mean little. */
#define LAYER_ILP_SCALE 1e4

/* min sum cost x, every expert on one rank, slots and caps kept: column e * n_ranks + g is 1 when expert e is on rank g.
 * cost [n_experts][n_ranks], cap [n_ranks] rows. Any costs do: one layer with fixed neighbours is linear. */
status layer_ilp_create(const problem *p, int layer, const double *cost, const double *cap, lp_model **out);
void layer_ilp_start(const problem *p, const int *home, double *x); /* x [n_experts][n_ranks] from home [n_experts] */
void layer_ilp_take(const problem *p, const double *x, int *home);

/* All layers, for problems so small that there is hope: products of neighbouring layers' choices are variables tied to both (the
 * reformulation-linearisation form: what a pair keeps on a rank, and on a node, summed over partners, is the expert's own choice
 * times the rank's slots). */
bool joint_ilp_possible(const problem *p);
/* cap [n_layers][n_ranks]. Columns 0 .. are x [n_layers][n_experts][n_ranks]. */
status joint_ilp_create(const problem *p, const double *cap, lp_model **out);
/* The whole point for home [n_layers][n_experts]; x [lp_n_columns]. */
void joint_ilp_start(const problem *p, const int *home, double *x);

#endif
