/* solver_contiguous.c - equal blocks of experts in their order: what engines do without a plan, and what plans are compared to.
 */
#include "placement/planner/start.h"

#include <stdlib.h>

static status solve(const problem *p, solver_report *report, plan *out)
{
    (void)report;
    int *home = malloc((problem_at(p, p->n_layers, 0) + (size_t)p->n_ranks) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    int *sizes = home + problem_at(p, p->n_layers, 0);
    status st = STATUS_OK;
    for (int l = 0; l < p->n_layers; l++) {
        TRY_GOTO(start_sizes(p, l, sizes), out);
        for (int g = 0, e = 0; g < p->n_ranks; g++)
            for (int i = 0; i < sizes[g]; i++)
                home[problem_at(p, l, e++)] = g;
    }
    st = problem_plan(p, solver_contiguous.name, home, out);
out:
    free(home);
    return st;
}

/* It minimises nothing: no seed is better or worse. */
static status measure(const problem *p, const plan *made, double *out)
{
    (void)p;
    (void)made;
    *out = 0;
    return STATUS_OK;
}

const solver solver_contiguous = {
    .name = "contiguous",
    .summary = "equal blocks of experts in their order",
    .paper = "the default of serving engines",
    .objective = "nothing",
    .flags = SOLVER_BASELINE,
    .solve = solve,
    .measure = measure,
};
