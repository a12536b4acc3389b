/* seats.h - clusters are chosen; now which rank takes which: those that tokens choose together on one node, and over the layers
 * those that the same sequences choose on one rank, so that an owner by affinity finds most of its rows at home. Pure but for
 * memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SEATS_H
#define CONVOKE_PLACEMENT_PLANNER_SEATS_H

#include "placement/planner/problem.h"

/* Renames ranks layer by layer in home [n_layers][n_experts], only among ranks with the same slots and cap: what a rank holds
 * and computes stays within its room. Needs traffic. The distinct ranks of every token stay as many. */
status seats_assign(const problem *p, int *home);

#endif
