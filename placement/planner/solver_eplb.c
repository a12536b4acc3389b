/* solver_eplb.c - DeepSeek's EPLB as published, and a variant without its known defect.
 *
 * A plan knows nothing of the model's groups of experts, so the global policy is used: one group. The original asks for the same
 * number of places on every rank; where ranks differ (budgets), each keeps its own number and the rest stays as it is. Two copies
 * of one expert on one rank are one copy here: an engine gains nothing by the second, and the plan format has no word for it. */
#include "placement/planner/eplb.h"
#include "placement/planner/replicate.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const problem *p;
    bool apart;
    int *home;   /* [n_layers][n_experts] */
    bool *holds; /* [n_layers][n_experts][n_ranks] */
    int *merged; /* [n_layers] copies that met another on their rank */
} balancing;

typedef struct {
    int n, n_ranks; /* n: places in the layer */
    int *slots, *expert, *rank, *place, *copies;
    float *weight, *part;
} layer;

static void layer_close(layer *y)
{
    free(y->slots);
    free(y->expert);
    free(y->rank);
    free(y->place);
    free(y->copies);
    free(y->weight);
    free(y->part);
}

static status layer_open(const problem *p, int l, layer *y)
{
    *y = (layer){.n_ranks = p->n_ranks, .slots = malloc((size_t)p->n_ranks * sizeof(int))};
    for (int g = 0; y->slots && g < p->n_ranks; g++) {
        int room = p->slots[(size_t)l * (size_t)p->n_ranks + (size_t)g];
        y->slots[g] = room < p->n_experts ? room : p->n_experts;
        y->n += y->slots[g];
    }
    size_t n = (size_t)y->n + (size_t)p->n_experts;
    y->expert = malloc(n * sizeof *y->expert);
    y->rank = malloc(n * sizeof *y->rank);
    y->place = malloc(n * sizeof *y->place);
    y->copies = malloc(n * sizeof *y->copies);
    y->weight = malloc(n * sizeof *y->weight);
    y->part = malloc(n * sizeof *y->part);
    if (!y->slots || !y->expert || !y->rank || !y->place || !y->copies || !y->weight || !y->part) {
        layer_close(y);
        return status_fail(STATUS_NO_MEMORY, "no memory to balance %d experts", p->n_experts);
    }
    for (int e = 0; e < p->n_experts; e++)
        y->weight[e] = (float)p->load[problem_at(p, l, e)];
    return STATUS_OK;
}

static status pack_as_published(const problem *p, layer *y)
{
    eplb_replicate(p->n_experts, y->n, y->weight, y->n, y->expert, y->copies);
    for (int i = 0; i < y->n; i++)
        y->part[i] = y->weight[y->expert[i]] / (float)y->copies[y->expert[i]];
    return eplb_pack(y->n, p->n_ranks, y->part, y->slots, y->rank, y->place);
}

static status balance_layer(void *arg, int l)
{
    balancing *b = arg;
    const problem *p = b->p;
    if (b->apart) {
        double worst;
        size_t first = problem_at(p, l, 0);
        return replicate_layer(p, l, p->slots + (size_t)l * (size_t)p->n_ranks, false, b->home + first,
                               b->holds + first * (size_t)p->n_ranks, &worst);
    }
    layer y;
    TRY(layer_open(p, l, &y));
    status st = pack_as_published(p, &y);
    for (int i = 0; st == STATUS_OK && i < y.n; i++) {
        size_t at = problem_at(p, l, y.expert[i]);
        bool *held = &b->holds[at * (size_t)p->n_ranks + (size_t)y.rank[i]];
        b->merged[l] += *held;
        *held = true;
        if (i < p->n_experts)
            b->home[at] = y.rank[i]; /* the first n_experts places are one of each */
    }
    layer_close(&y);
    return st;
}

static status balance(const solver *s, const problem *p, bool apart, solver_report *report, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0);
    balancing b = {p, apart, malloc(n_lists * sizeof(int)), calloc(n_lists * (size_t)p->n_ranks, sizeof(bool)),
                   calloc((size_t)p->n_layers, sizeof(int))};
    plan made = {0};
    status st = STATUS_OK;
    int merged = 0;
    if (!b.home || !b.holds || !b.merged)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    TRY_GOTO(parallel_for(p->request->threads, p->n_layers, balance_layer, &b), out);
    TRY_GOTO(problem_plan_replicas(p, s->name, b.home, b.holds, &made), out);
    for (int l = 0; l < p->n_layers; l++)
        merged += b.merged[l];
    if (merged > 0)
        snprintf(report->remark, sizeof report->remark, "%d replicas met another copy of their expert on their rank", merged);
    st = start_keep_seed(s, p, &made, report, out);
out:
    free(b.home);
    free(b.holds);
    free(b.merged);
    return st;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    return balance(&solver_eplb, p, false, report, out);
}

static status solve_apart(const problem *p, solver_report *report, plan *out)
{
    return balance(&solver_eplb_apart, p, true, report, out);
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_balance(p, made, NULL, NULL);
    return STATUS_OK;
}

const solver solver_eplb = {
    .name = "eplb",
    .summary = "replicates the hottest experts and packs the copies, as DeepSeek published it",
    .paper = "DeepSeek-V3 technical report, arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB",
    .objective = "busiest rank's planned rows over its share, mean over layers",
    .flags = SOLVER_REPLICATES | SOLVER_BASELINE,
    .solve = solve,
    .measure = measure,
};

const solver solver_eplb_apart = {
    .name = "eplb-apart",
    .summary = "eplb that never puts two copies of an expert on one rank",
    .paper = "as eplb, with its packing restricted",
    .objective = "busiest rank's planned rows over its share, mean over layers",
    .flags = SOLVER_REPLICATES | SOLVER_BASELINE,
    .solve = solve_apart,
    .measure = measure,
};
