/* matching.h - each row to a column of its own so that the sum is smallest: the assignment problem. Pure but for memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_MATCHING_H
#define CONVOKE_PLACEMENT_PLANNER_MATCHING_H

#include <stdbool.h>

/* cost [n][n] finite -> column [n]. Hungarian method, n^3 steps; ties by lower column. false: no memory. */
bool matching_solve(int n, const double *cost, int *column);

#endif
