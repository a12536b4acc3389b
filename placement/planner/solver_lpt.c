/* solver_lpt.c - load alone: longest processing time first, then exchanges (assign.h), layer by layer. */
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <stdlib.h>

static status solve(const problem *p, solver_report *report, plan *out)
{
    int *home = malloc(problem_at(p, p->n_layers, 0) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    status st = start_lpt(p, home);
    if (st == STATUS_OK)
        st = start_finish(&solver_lpt, p, home, report, out);
    free(home);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_balance(p, made, NULL, NULL);
    return STATUS_OK;
}

const solver solver_lpt = {
    .name = "lpt",
    .summary = "balances planned rows: longest processing time first, then exchanges",
    .paper = "Graham, Bounds on multiprocessing timing anomalies (1969)",
    .objective = "busiest rank's planned rows over its share, mean over layers",
    .solve = solve,
    .measure = measure,
};
