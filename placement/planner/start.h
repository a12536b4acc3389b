/* start.h - what searches start from, and the plan they never fall behind. */
#ifndef CONVOKE_PLACEMENT_PLANNER_START_H
#define CONVOKE_PLACEMENT_PLANNER_START_H

#include "placement/planner/solver.h"

/* Experts per rank and layer as equal as the slots allow, lower ranks first: sizes [n_ranks], summing to n_experts. Where all
 * slots suffice they are plan_contiguous()'s block sizes. Fails when the layer's slots do not hold every expert. */
status start_sizes(const problem *p, int layer, int *sizes);
/* Blocks of these sizes in the experts' order, in every layer: home [n_layers][n_experts]. */
status start_blocks(const problem *p, int *home);
/* The measure of solvers that minimise nothing: 0, so no seed is better or worse. */
status start_measure_nothing(const problem *p, const plan *made, double *out);
/* LPT and exchanges in every layer: home [n_layers][n_experts]. Keeps caps wherever LPT finds how. */
status start_lpt(const problem *p, int *home);
/* The homes of the request's seed, if there is one that keeps room, slack and has no replicas; else false. */
bool start_seed(const problem *p, int *home);

/* A plan by the name of solver `s` from its homes; where the request's seed is valid and better by the solver's own measure, a
 * copy of the seed instead. Fills objective and seed_objective. */
status start_finish(const solver *s, const problem *p, const int *home, solver_report *report, plan *out);
/* The same for a plan that is already made, which is taken over (and cleared on failure). */
status start_keep_seed(const solver *s, const problem *p, plan *made, solver_report *report, plan *out);

#endif
