/* The table of solvers, and the one way to run them. */
#include "placement/planner/solver.h"

#include <math.h>
#include <string.h>

const solver *const solvers[] = {
    &solver_contiguous, &solver_random, &solver_lpt,       &solver_eplb, &solver_eplb_apart, &solver_craft,    &solver_exflow,
    &solver_chain,      &solver_cut,    &solver_partition, &solver_ilp,  &solver_batch,      &solver_moetuner, &solver_affinity,
    &solver_auto,       NULL,
};

const solver *solver_find(const char *name)
{
    for (const solver *const *s = solvers; *s; s++)
        if (strcmp((*s)->name, name) == 0)
            return *s;
    return NULL;
}

static status check_needs(const solver *s, const problem *p)
{
    if ((s->flags & SOLVER_NEEDS_TRAFFIC) && !p->traffic)
        return status_fail(STATUS_USAGE, "solver %s looks at tokens one by one: give it a trace (--trace)", s->name);
    if ((s->flags & SOLVER_NEEDS_NEXT_PAIRS) && !p->next_pairs)
        return status_fail(STATUS_USAGE,
                           "solver %s needs pairs of experts of neighbouring layers: statistics with pairs, or a trace", s->name);
    if ((s->flags & SOLVER_NEEDS_SAME_PAIRS) && !p->same_pairs)
        return status_fail(STATUS_USAGE, "solver %s needs pairs of experts of a layer: statistics with pairs, or a trace",
                           s->name);
    return STATUS_OK;
}

status solver_run(const solver *s, const problem *p, solver_report *report, plan *out)
{
    TRY(check_needs(s, p));
    plan found = {0};
    *report = (solver_report){.objective = NAN, .bound = NAN, .seed_objective = NAN};
    TRY(s->solve(p, report, &found));
    status st = problem_check(p, &found, !(s->flags & SOLVER_TOTALS));
    if (st == STATUS_OK && isnan(report->objective) && s->measure)
        st = s->measure(p, &found, &report->objective);
    if (st == STATUS_OK)
        *out = found;
    else
        plan_clear(&found);
    return st;
}
