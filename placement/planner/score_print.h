/* score_print.h - scores for people and for programs: one table, bars, a picture, JSON. All say the same numbers. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SCORE_PRINT_H
#define CONVOKE_PLACEMENT_PLANNER_SCORE_PRINT_H

#include "placement/planner/bounds.h"
#include "placement/planner/score.h"
#include "proto/json.h"

#include <stdio.h>

/* One line of a table: a plan and what it scored. */
typedef struct {
    const char *name;
    const plan_score *score;
} scored_plan;

/* NULL: no memory. Not finite numbers become null. */
cJSON *score_to_json(const plan_score *score);
cJSON *bounds_to_json(const plan_bounds *bounds); /* bounds may be NULL: null */

/* Plans as lines, measures as columns, the first line being what the others are compared with; bounds (may be NULL) as last line,
 * and what of the first measure's gap is left. */
void score_print_table(FILE *file, const scored_plan *plans, int n, const plan_bounds *bounds);
/* One line about a plan that takes more than the topology's expert_bytes budgets allow; nothing where it fits or none are set. */
void score_print_misfit(FILE *file, const problem *p, const plan *made);
/* Bars of step_us by part on a terminal or in a pipe; nothing without a replay. */
void score_print_bars(FILE *file, const scored_plan *plans, int n, const plan_bounds *bounds);
/* The same as an SVG file. */
status score_write_picture(const char *path, const scored_plan *plans, int n, const plan_bounds *bounds);

#endif
