/* solver_random.c - every expert anywhere: what a plan is worth shows against this and against contiguous blocks. */
#include "placement/planner/start.h"

#include <stdlib.h>

/* Fisher-Yates. */
static void shuffle_layer(const problem *p, int l, int *home)
{
    random_stream random = random_open(p, (uint64_t)l);
    for (int e = p->n_experts - 1; e > 0; e--) {
        int other = random_below(&random, e + 1), kept = home[e];
        home[e] = home[other];
        home[other] = kept;
    }
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    (void)report;
    int *home = malloc(problem_at(p, p->n_layers, 0) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    status st = start_blocks(p, home);
    for (int l = 0; l < p->n_layers && st == STATUS_OK; l++)
        shuffle_layer(p, l, home + problem_at(p, l, 0));
    if (st == STATUS_OK)
        st = problem_plan(p, solver_random.name, home, out);
    free(home);
    return st;
}

const solver solver_random = {
    .name = "random",
    .summary = "experts in random order, in equal blocks",
    .paper = "none",
    .objective = "nothing",
    .flags = SOLVER_BASELINE,
    .solve = solve,
    .measure = start_measure_nothing,
};
