/* plan_file.h - a plan and what stands beside it: which solver made it, from what traffic, its score, bound and gap. */
#ifndef CONVOKE_PLACEMENT_PLANNER_PLAN_FILE_H
#define CONVOKE_PLACEMENT_PLANNER_PLAN_FILE_H

#include "placement/planner/bounds.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"

typedef struct {
    const char *model; /* NULL: unknown */
    const solver *solver;
    const solver_report *report; /* may be NULL */
    const plan_score *score;     /* on the traffic it was made from */
    const plan_bounds *bounds;   /* may be NULL */
    const char *source;          /* file names of traffic and topology, for people */
} plan_provenance;

/* Written as the keys "solver", "objective", "score", "bound", "gap", "made_from" and "tokens_per_expert" (P, for drift) beside
 * the plan's own. */
status plan_file_write(const problem *p, const plan *made, const plan_provenance *provenance, const char *path);

#endif
