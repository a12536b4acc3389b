/* report_html.h - statistics and a plan as one HTML page with pictures inside it: nothing is fetched, nothing runs. */
#ifndef CONVOKE_PLACEMENT_PLANNER_REPORT_HTML_H
#define CONVOKE_PLACEMENT_PLANNER_REPORT_HTML_H

#include "placement/plan.h"
#include "placement/routing_stats.h"

typedef struct {
    const char *title;          /* the file it is about */
    const routing_stats *stats; /* NULL: a plan alone, whose copies are shown instead of loads */
    const plan *plan;           /* under which ranks are loaded; never NULL */
} report_input;

/* Well-formed XML too. The file appears whole or not at all. */
status report_write(const report_input *in, const char *path);

/* The plan that statistics are shown under: the file's, or without one contiguous blocks on n_ranks (0: 8). */
status report_plan(const routing_stats *stats, const char *path, int n_ranks, plan *out);

#endif
