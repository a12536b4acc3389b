/* transport.h - items onto ranks at the least cost, each rank at most its slots: the transportation problem, exactly. Pure but
 * for scratch memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_TRANSPORT_H
#define CONVOKE_PLACEMENT_PLANNER_TRANSPORT_H

#include "proto/status.h"

/* cost [n_items][n_ranks]; rank [n_items]. Successive shortest paths over ranks with potentials: about 2 ms for 256 items on 64
 * ranks. *total may be NULL. Fails when the slots do not hold all items. */
status transport_solve(int n_items, int n_ranks, const double *cost, const int *slots, int *rank, double *total);

#endif
