/* What searches start from, and the plan they never fall behind. */
#include "placement/planner/start.h"
#include "placement/planner/assign.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

status start_sizes(const problem *p, int layer, int *sizes)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    int over = p->n_experts;
    for (int g = 0; g < p->n_ranks; g++)
        sizes[g] = 0;
    for (int e = 0; e < p->n_experts; e++)
        sizes[(long long)e * p->n_ranks / p->n_experts]++;
    for (int g = 0; g < p->n_ranks; g++) {
        sizes[g] = sizes[g] < slots[g] ? sizes[g] : slots[g];
        over -= sizes[g];
    }
    while (over > 0) { /* what found no room goes where the fewest are */
        int to = -1;
        for (int g = 0; g < p->n_ranks; g++)
            if (sizes[g] < slots[g] && (to < 0 || sizes[g] < sizes[to]))
                to = g;
        if (to < 0)
            return status_fail(STATUS_BAD_INPUT, "layer %d: there is no room for %d of its %d experts", p->layer_numbers[layer],
                               over, p->n_experts);
        sizes[to]++;
        over--;
    }
    return STATUS_OK;
}

typedef struct {
    const problem *p;
    int *home;
} homes;

static status lpt_layer(void *arg, int l)
{
    homes *h = arg;
    const problem *p = h->p;
    double worst = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share,
                              p->slots + (size_t)l * (size_t)p->n_ranks, h->home + problem_at(p, l, 0));
    if (worst == ASSIGN_NO_ROOM)
        return status_fail(STATUS_BAD_INPUT, "layer %d: there is no room for its %d experts", p->layer_numbers[l], p->n_experts);
    return worst < 0 ? status_fail(STATUS_NO_MEMORY, "no memory to place %d experts", p->n_experts) : STATUS_OK;
}

status start_blocks(const problem *p, int *home)
{
    int *sizes = malloc((size_t)p->n_ranks * sizeof *sizes);
    status st = sizes ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    for (int l = 0; l < p->n_layers && st == STATUS_OK; l++) {
        st = start_sizes(p, l, sizes);
        for (int g = 0, e = 0; st == STATUS_OK && g < p->n_ranks; g++)
            for (int i = 0; i < sizes[g]; i++)
                home[problem_at(p, l, e++)] = g;
    }
    free(sizes);
    return st;
}

status start_measure_nothing(const problem *p, const plan *made, double *out)
{
    (void)p;
    (void)made;
    *out = 0;
    return STATUS_OK;
}

status start_lpt(const problem *p, int *home)
{
    return parallel_for(p->request->threads, p->n_layers, lpt_layer, &(homes){p, home});
}

static bool seed_is_valid(const problem *p, bool per_layer)
{
    return p->request->seed && problem_check(p, p->request->seed, per_layer) == STATUS_OK;
}

bool start_seed(const problem *p, int *home)
{
    if (!seed_is_valid(p, true))
        return false;
    const plan *seed = p->request->seed;
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            if (plan_n_copies(seed, l, e) != 1)
                return false;
            home[problem_at(p, l, e)] = plan_copies(seed, l, e)[0];
        }
    return true;
}

static status copy_plan(const char *name, const problem *p, const plan *from, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    int *home = malloc(n_lists * sizeof *home);
    bool *holds = calloc(n_lists * ranks, sizeof *holds);
    status st = STATUS_OK;
    if (!home || !holds)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    for (size_t i = 0; i < n_lists; i++) {
        home[i] = from->copy_ranks[from->first_copy[i]];
        for (int c = from->first_copy[i]; c < from->first_copy[i + 1]; c++)
            holds[i * ranks + (size_t)from->copy_ranks[c]] = true;
    }
    st = problem_plan_replicas(p, name, home, holds, out);
out:
    free(home);
    free(holds);
    return st;
}

status start_keep_seed(const solver *s, const problem *p, plan *made, solver_report *report, plan *out)
{
    status st = s->measure(p, made, &report->objective);
    if (st == STATUS_OK && seed_is_valid(p, !(s->flags & SOLVER_TOTALS))) {
        st = s->measure(p, p->request->seed, &report->seed_objective);
        if (st == STATUS_OK && report->seed_objective < report->objective) {
            plan_clear(made);
            TRY(copy_plan(s->name, p, p->request->seed, made));
            report->objective = report->seed_objective;
            snprintf(report->remark, sizeof report->remark, "the seed was better and is kept");
        }
    }
    if (st == STATUS_OK)
        *out = *made;
    else
        plan_clear(made);
    return st;
}

status start_finish(const solver *s, const problem *p, const int *home, solver_report *report, plan *out)
{
    plan made = {0};
    TRY(problem_plan(p, s->name, home, &made));
    return start_keep_seed(s, p, &made, report, out);
}
