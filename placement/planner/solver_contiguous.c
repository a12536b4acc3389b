/* solver_contiguous.c - equal blocks of experts in their order: what engines do without a plan, and what plans are compared to.
 */
#include "placement/planner/start.h"

#include <stdlib.h>

static status solve(const problem *p, solver_report *report, plan *out)
{
    (void)report;
    int *home = malloc(problem_at(p, p->n_layers, 0) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    status st = start_blocks(p, home);
    if (st == STATUS_OK)
        st = problem_plan(p, solver_contiguous.name, home, out);
    free(home);
    return st;
}

const solver solver_contiguous = {
    .name = "contiguous",
    .summary = "equal blocks of experts in their order",
    .paper = "the default of serving engines",
    .objective = "nothing",
    .flags = SOLVER_BASELINE,
    .solve = solve,
    .measure = start_measure_nothing,
};
