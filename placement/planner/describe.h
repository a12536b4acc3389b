/* describe.h - files of ours for people, on a terminal: a few lines, a table, small bars. */
#ifndef CONVOKE_PLACEMENT_PLANNER_DESCRIBE_H
#define CONVOKE_PLACEMENT_PLANNER_DESCRIBE_H

#include "placement/plan.h"
#include "placement/routing_stats.h"
#include "placement/routing_trace.h"
#include "placement/topology.h"

#include <stdio.h>

/* One line each: what it is, of which model, how much of it. */
void describe_shape(const routing_shape *shape, FILE *out);

/* Balance under `p` (of the statistics' shape), skew, similarity of domains; with `layers` a line per layer. */
status describe_stats(const routing_stats *stats, const plan *p, bool layers, FILE *out);
/* Slots, replicas, what each rank holds. */
status describe_plan(const plan *p, FILE *out);
status describe_trace(const routing_trace *trace, FILE *out);
void describe_topology(const topology *t, FILE *out);

/* A bar of `width` characters for value / full, in eighths of a character; at least a hair when value is above 0. */
typedef struct {
    char text[3 * 40 + 1];
} text_bar;
text_bar describe_bar(double value, double full, int width);

#endif
