/* solver_random.c - every expert anywhere: what a plan is worth shows against this and against contiguous blocks. */
#include "placement/planner/start.h"

#include <stdlib.h>

/* A layer's blocks in a random order of its experts (Fisher-Yates). */
static status place_layer(const problem *p, int l, int *sizes, int *home)
{
    random_stream random = random_open(p, (uint64_t)l);
    TRY(start_sizes(p, l, sizes));
    for (int g = 0, e = 0; g < p->n_ranks; g++)
        for (int i = 0; i < sizes[g]; i++)
            home[e++] = g;
    for (int e = p->n_experts - 1; e > 0; e--) {
        int other = random_below(&random, e + 1), kept = home[e];
        home[e] = home[other];
        home[other] = kept;
    }
    return STATUS_OK;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    (void)report;
    int *home = malloc((problem_at(p, p->n_layers, 0) + (size_t)p->n_ranks) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    status st = STATUS_OK;
    for (int l = 0; l < p->n_layers && st == STATUS_OK; l++)
        st = place_layer(p, l, home + problem_at(p, p->n_layers, 0), home + problem_at(p, l, 0));
    if (st == STATUS_OK)
        st = problem_plan(p, solver_random.name, home, out);
    free(home);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    (void)p;
    (void)made;
    *out = 0;
    return STATUS_OK;
}

const solver solver_random = {
    .name = "random",
    .summary = "experts in random order, in equal blocks",
    .paper = "none",
    .objective = "nothing",
    .flags = SOLVER_BASELINE,
    .solve = solve,
    .measure = measure,
};
