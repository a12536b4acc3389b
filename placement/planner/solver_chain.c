/* solver_chain.c - R-flow: layers are built one beside the other, then improved in turns, then annealed.
 *
 *   build     layer 0 by clusters of experts that send alike, or as the seed has it; each next layer by exact transport beside
 *             the one before; then back and forth with both neighbours until nothing falls any more
 *   descend   swaps and moves, even layers and odd layers by turns, all of a parity at once; whole ranks in all layers
 *   anneal    from the best so far, in a few cycles of growing length; each ends in a descent, and the best is kept
 *
 * A layer's choices depend on its neighbours alone and its random numbers on (cycle, sweep, layer): the number of threads changes
 * nothing. One unit of work is one proposed swap; a layer's costs count as many. */
#include "placement/planner/chain.h"
#include "placement/planner/cluster.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TURNS = 12, CYCLES = 3, PROPOSALS_PER_EXPERT = 32, SWEEPS = 240 };

typedef struct {
    const problem *p;
    chain c;
    work_budget work;
    int parity;
    double temperature;
    uint64_t stream;
    atomic_bool changed;
    double flow; /* of best */
    int *best;
} searching;

static int64_t layer_units(const problem *p)
{
    return (int64_t)p->n_experts * PROPOSALS_PER_EXPERT;
}

/* ---- building ---- */

static status first_layer(searching *s)
{
    const problem *p = s->p;
    int *sizes = malloc((size_t)p->n_ranks * sizeof *sizes), *rank = malloc((size_t)p->n_ranks * sizeof *rank), used = 0;
    int *home = s->c.home;
    status st = STATUS_OK;
    if (!sizes || !rank)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks), out);
    TRY_GOTO(start_sizes(p, 0, sizes), out);
    for (int g = 0; g < p->n_ranks; g++)
        if (sizes[g] > 0) {
            rank[used] = g;
            sizes[used++] = sizes[g];
        }
    TRY_GOTO(cluster_rows(p->n_experts, p->n_experts, p->next_pairs, used, sizes, home), out);
    for (int e = 0; e < p->n_experts; e++)
        home[e] = rank[home[e]];
out:
    free(sizes);
    free(rank);
    return st;
}

/* A layer that was filled without regard to load: no costs at first, so that caps alone move experts. */
static status settle(searching *s, int layer, bool before, bool after, bool always)
{
    chain_layer y;
    TRY(chain_layer_open(&s->c, layer, before, after, &y));
    status st = chain_layer_transport(&y, always);
    chain_layer_close(&y);
    return st;
}

static bool take_layer(searching *s)
{
    return work_take(&s->work, layer_units(s->p));
}

/* From clusters in layer 0, along the chain. Layers that no time is left for keep what LPT gave them. */
static status build(searching *s)
{
    int n = s->p->n_layers;
    int *lpt = malloc((size_t)s->p->n_experts * sizeof *lpt);
    if (!lpt)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", s->p->n_experts);
    memcpy(lpt, s->c.home, (size_t)s->p->n_experts * sizeof *lpt);
    status st = first_layer(s);
    for (int l = 1; l < n && st == STATUS_OK && take_layer(s); l++)
        st = settle(s, l, true, false, true);
    /* the clusters may break caps: placed anew beside layer 1, from a start that keeps them */
    memcpy(s->c.home, lpt, (size_t)s->p->n_experts * sizeof *lpt);
    if (st == STATUS_OK)
        st = settle(s, 0, false, true, true);
    free(lpt);
    return st;
}

/* Back and forth; ends when a turn brings less than a thousandth. */
static status turn(searching *s)
{
    int n = s->p->n_layers;
    double before = chain_flow(&s->c);
    for (int i = 0; i < MOST_TURNS; i++) {
        for (int step = 0; step < n; step++) {
            if (!take_layer(s))
                return STATUS_OK;
            TRY(settle(s, i % 2 == 0 ? n - 1 - step : step, true, true, false));
        }
        double now = chain_flow(&s->c);
        if (now > before * (1 - 1e-3))
            break;
        before = now;
    }
    return STATUS_OK;
}

/* ---- sweeps over one parity ---- */

static int layers_of(const searching *s)
{
    return (s->p->n_layers - s->parity + 1) / 2;
}

static status descend_layer(void *arg, int i)
{
    searching *s = arg;
    chain_layer y;
    TRY(chain_layer_open(&s->c, 2 * i + s->parity, true, true, &y));
    if (chain_layer_descend(&y))
        atomic_store(&s->changed, true);
    chain_layer_close(&y);
    return STATUS_OK;
}

static status anneal_layer(void *arg, int i)
{
    searching *s = arg;
    int layer = 2 * i + s->parity;
    chain_layer y;
    TRY(chain_layer_open(&s->c, layer, true, true, &y));
    random_stream random = random_open(s->p, s->stream * (uint64_t)s->p->n_layers + (uint64_t)layer);
    chain_layer_anneal(&y, s->temperature, layer_units(s->p), &random);
    chain_layer_close(&y);
    return STATUS_OK;
}

static bool take_sweep(searching *s)
{
    return work_take(&s->work, layer_units(s->p) * s->p->n_layers);
}

static status descend(searching *s)
{
    do {
        atomic_store(&s->changed, false);
        for (s->parity = 0; s->parity < 2; s->parity++)
            TRY(parallel_for(s->p->request->threads, layers_of(s), descend_layer, s));
    } while (atomic_load(&s->changed) && take_sweep(s));
    return STATUS_OK;
}

static void keep_best(searching *s)
{
    double now = chain_flow(&s->c);
    size_t size = problem_at(s->p, s->p->n_layers, 0) * sizeof *s->best;
    if (now < s->flow) {
        s->flow = now;
        memcpy(s->best, s->c.home, size);
    } else
        memcpy(s->c.home, s->best, size);
}

/* Temperatures fall from one at which an expert's usual cost is risked now and then to one at which nothing is. */
static status anneal(searching *s, int64_t sweeps)
{
    const problem *p = s->p;
    double usual = s->flow / p->n_experts / (p->n_layers > 1 ? p->n_layers - 1 : 1) * 2, hot = 0.03 * usual, cold = 0.001 * usual;
    for (int64_t i = 0; i < sweeps && take_sweep(s); i++) {
        s->temperature = hot * pow(cold / hot, (double)i / (double)sweeps);
        s->stream++;
        for (s->parity = 0; s->parity < 2; s->parity++)
            TRY(parallel_for(p->request->threads, layers_of(s), anneal_layer, s));
    }
    TRY(descend(s));
    TRY(chain_relabel(&s->c));
    TRY(descend(s));
    keep_best(s);
    return STATUS_OK;
}

static status search(searching *s)
{
    const problem *p = s->p;
    s->work = work_start(p, layer_units(p) * p->n_layers * SWEEPS);
    int64_t all = s->work.left;
    keep_best(s);
    if (!start_seed(p, s->c.home)) {
        TRY(build(s));
        keep_best(s);
    }
    TRY(turn(s));
    TRY(descend(s));
    TRY(chain_relabel(&s->c));
    TRY(descend(s));
    keep_best(s);
    for (int i = CYCLES; i > 0 && s->flow > 0 && !s->work.out_of_time; i--) {
        int64_t sweeps = s->work.left / (layer_units(p) * p->n_layers) / i;
        if (sweeps < 4)
            break;
        TRY(anneal(s, sweeps));
    }
    s->work.left = all - s->work.left; /* spent */
    return STATUS_OK;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0);
    searching s = {.p = p, .flow = INFINITY, .best = malloc(n_lists * sizeof *s.best)};
    int *home = malloc(n_lists * sizeof *home);
    status st = STATUS_OK;
    if (!s.best || !home)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    TRY_GOTO(start_lpt(p, home), out);
    if (p->n_layers > 1) {
        TRY_GOTO(chain_open(p, home, &s.c), out);
        st = search(&s);
        chain_close(&s.c);
        memcpy(home, s.best, n_lists * sizeof *home);
        report->work = s.work.left;
        report->out_of_time = s.work.out_of_time;
    }
    if (st == STATUS_OK)
        st = start_finish(&solver_chain, p, home, report, out);
out:
    free(s.best);
    free(home);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_flow(p, made);
    return STATUS_OK;
}

const solver solver_chain = {
    .name = "chain",
    .summary = "keeps tokens on their rank from layer to layer: transport along the chain, swaps, annealing",
    .paper = "after MoETuner, arXiv 2502.06643, and ExFlow, arXiv 2401.08383; their objective, by local search",
    .objective = "flow between layers times distance (R-flow)",
    .flags = SOLVER_NEEDS_NEXT_PAIRS,
    .solve = solve,
    .measure = measure,
};
