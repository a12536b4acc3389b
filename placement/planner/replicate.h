/* replicate.h - one layer with replicas: which experts get further copies, and where all copies go so that no rank holds two of
 * one expert. Pure but for scratch memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_REPLICATE_H
#define CONVOKE_PLACEMENT_PLANNER_REPLICATE_H

#include "placement/planner/problem.h"

/* slots [n_ranks]: places to fill, each with a copy of whichever expert has the most load per copy. exchanges: LPT is followed by
 * exchanges (assign.h). Where places cannot all be filled without two copies meeting, a few stay empty. home [n_experts], holds
 * [n_experts][n_ranks] (written whole); *worst: busiest rank's rows over its share. */
status replicate_layer(const problem *p, int layer, const int *slots, bool exchanges, int *home, bool *holds, double *worst);

#endif
