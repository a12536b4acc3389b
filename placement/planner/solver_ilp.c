/* solver_ilp.c - R-flow by integer programmes: layer after layer while its neighbours stay (linear, for any link matrix), even
 * layers together, then odd ones, until no layer gains; tiny problems then all layers at once, with proof.
 *
 * It starts from LPT's clusters, named layer by layer so that flow stays (or from the seed). A layer's programme is solved to
 * 0.01 % within milliseconds at a slack of 5 %; at 0 % GLPK finds little. */
#include "placement/planner/flow_cost.h"
#include "placement/planner/layer_ilp.h"
#include "placement/planner/matching.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIVOTS_PER_LAYER = 400000,
    LAYER_PARTS = 8,
    LAYER_NODES = 150,
    JOINT_NODES = 100000,
    JOINT_PIVOTS = 150000,
    MOST_SWEEPS = 40
};

typedef struct {
    const problem *p;
    work_budget work;
    int *home;   /* [n_layers][n_experts] */
    double *cap; /* [n_layers][n_ranks] the problem's, or what the start needs where that is more */
    double *cost;
    bool *stale; /* [n_layers] a neighbour has moved since the layer was last solved */
    solver_report *report;
    double bound;
} sweeper;

static double seconds_left(const sweeper *s)
{
    if (s->work.deadline == 0)
        return 0;
    double left = s->work.deadline - clock_seconds();
    return left > 0.001 ? left : 0.001;
}

static void set_caps(sweeper *s)
{
    const problem *p = s->p;
    for (int l = 0; l < p->n_layers; l++)
        for (int g = 0; g < p->n_ranks; g++) {
            double rows = 0;
            for (int e = 0; e < p->n_experts; e++)
                rows += s->home[problem_at(p, l, e)] == g ? p->load[problem_at(p, l, e)] : 0;
            s->cap[l * p->n_ranks + g] = fmax(rows, p->cap[l * p->n_ranks + g]);
        }
}

/* ---- naming LPT's clusters ---- */

/* The cost of a cluster on each rank is that of its experts; only ranks alike change names, so slots and caps are kept. */
static status name_clusters(sweeper *s, int layer, double *sums, int *rank)
{
    const problem *p = s->p;
    size_t n = (size_t)p->n_ranks;
    int *home = s->home + problem_at(p, layer, 0);
    flow_costs(p, layer, s->home, false, s->cost);
    memset(sums, 0, n * n * sizeof *sums);
    for (int e = 0; e < p->n_experts; e++)
        for (size_t g = 0; g < n; g++)
            sums[(size_t)home[e] * n + g] += s->cost[(size_t)e * n + g];
    const int *slots = p->slots + (size_t)layer * n;
    const double *cap = p->cap + (size_t)layer * n;
    double far = 0;
    for (size_t i = 0; i < n * n; i++)
        far += sums[i];
    for (size_t c = 0; c < n; c++)
        for (size_t g = 0; g < n; g++)
            if (slots[c] != slots[g] || cap[c] != cap[g])
                sums[c * n + g] = far + 1;
    if (!matching_solve(p->n_ranks, sums, rank))
        return status_fail(STATUS_NO_MEMORY, "no memory to match %d ranks", p->n_ranks);
    for (int e = 0; e < p->n_experts; e++)
        home[e] = rank[home[e]];
    return STATUS_OK;
}

static status name_all(sweeper *s)
{
    size_t n = (size_t)s->p->n_ranks;
    double *sums = malloc(n * n * sizeof *sums);
    int *rank = malloc(n * sizeof *rank);
    status st = sums && rank ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to match %d ranks", s->p->n_ranks);
    for (int l = 1; l < s->p->n_layers && st == STATUS_OK; l++)
        st = name_clusters(s, l, sums, rank);
    free(sums);
    free(rank);
    return st;
}

/* ---- one layer by swaps and moves: what GLPK starts from ---- */

typedef struct {
    const problem *p;
    int layer;
    const double *cost, *cap, *load;
    int *home, *size;
    double *rows;
} layer_descent;

static bool try_move(layer_descent *d, int e, int to)
{
    int from = d->home[e], n = d->p->n_ranks;
    if (to == from || d->size[to] >= d->p->slots[d->layer * n + to] || d->rows[to] + d->load[e] > d->cap[to] ||
        d->cost[e * n + to] >= d->cost[e * n + from] * (1 - 1e-12))
        return false;
    d->home[e] = to;
    d->size[from]--;
    d->size[to]++;
    d->rows[from] -= d->load[e];
    d->rows[to] += d->load[e];
    return true;
}

static bool try_swap(layer_descent *d, int a, int b)
{
    int g = d->home[a], h = d->home[b], n = d->p->n_ranks;
    double more = d->load[b] - d->load[a];
    double now = d->cost[a * n + g] + d->cost[b * n + h], then = d->cost[a * n + h] + d->cost[b * n + g];
    if (then >= now * (1 - 1e-12) || d->rows[g] + more > d->cap[g] || d->rows[h] - more > d->cap[h])
        return false;
    d->home[a] = h;
    d->home[b] = g;
    d->rows[g] += more;
    d->rows[h] -= more;
    return true;
}

static bool descend_layer(const problem *p, int layer, const double *cost, const double *cap, int *home)
{
    layer_descent d = {p, layer, cost, cap, p->load + problem_at(p, layer, 0), home, NULL, NULL};
    d.size = calloc((size_t)p->n_ranks, sizeof *d.size);
    d.rows = calloc((size_t)p->n_ranks, sizeof *d.rows);
    bool ok = d.size && d.rows, changed = false;
    for (int e = 0; ok && e < p->n_experts; e++) {
        d.size[home[e]]++;
        d.rows[home[e]] += d.load[e];
    }
    for (bool better = ok; better;) {
        better = false;
        for (int a = 0; a < p->n_experts; a++) {
            for (int g = 0; g < p->n_ranks; g++)
                better |= try_move(&d, a, g);
            for (int b = 0; b < a; b++)
                better |= try_swap(&d, a, b);
        }
        changed |= better;
    }
    free(d.size);
    free(d.rows);
    return changed;
}

/* ---- sweeps ---- */

typedef struct {
    int n, *layer;
    lp_model **models;
    lp_options *options;
    lp_result *results;
    double *starts; /* [n][n_experts][n_ranks] */
} half_sweep;

static status half_create(const problem *p, half_sweep *h)
{
    size_t n = (size_t)p->n_layers / 2 + 1, cells = (size_t)p->n_experts * (size_t)p->n_ranks;
    *h = (half_sweep){.layer = calloc(n, sizeof *h->layer),
                      .models = calloc(n, sizeof *h->models),
                      .options = calloc(n, sizeof *h->options),
                      .results = calloc(n, sizeof *h->results),
                      .starts = calloc(n * cells, sizeof *h->starts)};
    if (h->layer && h->models && h->options && h->results && h->starts)
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "no memory for %zu integer programmes", n);
}

static void half_clear(half_sweep *h)
{
    for (int i = 0; i < h->n; i++) {
        lp_destroy(h->models[i]);
        lp_result_clear(&h->results[i]);
    }
    free(h->layer);
    free(h->models);
    free(h->options);
    free(h->results);
    free(h->starts);
}

static void layer_moved(sweeper *s, int layer, bool *better)
{
    *better = true;
    if (layer > 0)
        s->stale[layer - 1] = true;
    if (layer + 1 < s->p->n_layers)
        s->stale[layer + 1] = true;
}

static status pose_layers(sweeper *s, int parity, half_sweep *h, bool *better)
{
    const problem *p = s->p;
    size_t cells = (size_t)p->n_experts * (size_t)p->n_ranks;
    int64_t pivots = s->work.left / p->n_layers / LAYER_PARTS + 1;
    for (int l = parity; l < p->n_layers; l += 2) {
        if (!s->stale[l] || !work_take(&s->work, 1))
            continue;
        s->stale[l] = false;
        flow_costs(p, l, s->home, true, s->cost);
        const double *cap = s->cap + (size_t)l * (size_t)p->n_ranks;
        if (descend_layer(p, l, s->cost, cap, s->home + problem_at(p, l, 0)))
            layer_moved(s, l, better);
        TRY(layer_ilp_create(p, l, s->cost, cap, &h->models[h->n]));
        double *start = h->starts + (size_t)h->n * cells;
        layer_ilp_start(p, s->home + problem_at(p, l, 0), start);
        h->layer[h->n] = l;
        h->options[h->n++] = (lp_options){.pivots = pivots, .nodes = LAYER_NODES, .gap = 1e-3, .start = start};
    }
    return STATUS_OK;
}

static status sweep_half(sweeper *s, int parity, bool *better)
{
    half_sweep h;
    status st = half_create(s->p, &h);
    if (st == STATUS_OK)
        st = pose_layers(s, parity, &h, better);
    for (int i = 0; i < h.n; i++)
        h.options[i].seconds = seconds_left(s); /* models took time to make */
    if (st == STATUS_OK)
        st = lp_solve_all(h.n, h.models, h.options, s->p->request->threads, h.results);
    for (int i = 0; i < h.n && st == STATUS_OK; i++) {
        const lp_result *r = &h.results[i];
        const problem *p = s->p;
        double before = 0;
        flow_costs(p, h.layer[i], s->home, true, s->cost);
        for (int e = 0; e < p->n_experts; e++)
            before += s->cost[e * p->n_ranks + s->home[problem_at(p, h.layer[i], e)]];
        s->report->glpk_runs++;
        s->report->glpk_proved += r->outcome == LP_OPTIMAL;
        s->report->out_of_time |= r->timed_out;
        work_take(&s->work, r->pivots < s->work.left ? r->pivots : s->work.left);
        s->report->work += r->pivots;
        if (!r->x || r->objective >= before * LAYER_ILP_SCALE * (1 - 1e-9))
            continue;
        layer_ilp_take(p, r->x, s->home + problem_at(p, h.layer[i], 0));
        s->report->glpk_improved++;
        layer_moved(s, h.layer[i], better);
    }
    half_clear(&h);
    return st;
}

static status sweep(sweeper *s)
{
    bool better = true;
    for (int l = 0; l < s->p->n_layers; l++)
        s->stale[l] = true;
    for (int i = 0; i < MOST_SWEEPS && better && s->p->n_layers > 1; i++) {
        better = false;
        for (int parity = 0; parity < 2; parity++)
            TRY(sweep_half(s, parity, &better));
        if (!work_take(&s->work, 1))
            break;
    }
    return STATUS_OK;
}

/* ---- all layers at once ---- */

static status solve_jointly(sweeper *s)
{
    lp_model *m;
    lp_result r = {0};
    TRY(joint_ilp_create(s->p, s->cap, &m));
    double *start = malloc((size_t)lp_n_columns(m) * sizeof *start);
    status st = start ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for an integer programme");
    if (st == STATUS_OK) {
        joint_ilp_start(s->p, s->home, start);
        lp_options options = {.seconds = seconds_left(s),
                              .pivots = s->work.left < JOINT_PIVOTS ? s->work.left + 1 : JOINT_PIVOTS,
                              .nodes = JOINT_NODES,
                              .pseudocosts = true,
                              .start = start};
        st = lp_solve(m, &options, &r);
    }
    if (st == STATUS_OK) {
        s->report->glpk_runs++;
        s->report->glpk_proved += r.outcome == LP_OPTIMAL;
        s->report->out_of_time |= r.timed_out;
        s->report->work += r.pivots;
        s->bound = r.bound / LAYER_ILP_SCALE;
        if (r.x && r.objective < flow_of(s->p, s->home) * LAYER_ILP_SCALE * (1 - 1e-9)) {
            for (int l = 0; l < s->p->n_layers; l++)
                layer_ilp_take(s->p, r.x + problem_at(s->p, l, 0) * (size_t)s->p->n_ranks, s->home + problem_at(s->p, l, 0));
            s->report->glpk_improved++;
        }
    }
    lp_result_clear(&r);
    lp_destroy(m);
    free(start);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_flow(p, made);
    return STATUS_OK;
}

static status run(sweeper *s)
{
    const problem *p = s->p;
    TRY(start_lpt(p, s->home));
    if (p->n_layers > 1 && !start_seed(p, s->home))
        TRY(name_all(s));
    set_caps(s);
    TRY(sweep(s));
    if (joint_ilp_possible(p))
        TRY(solve_jointly(s));
    return STATUS_OK;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    size_t cells = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    sweeper s = {.p = p,
                 .work = work_start(p, (int64_t)PIVOTS_PER_LAYER * p->n_layers),
                 .home = malloc(cells * sizeof *s.home),
                 .cap = malloc((size_t)p->n_layers * ranks * sizeof *s.cap),
                 .cost = malloc((size_t)p->n_experts * ranks * sizeof *s.cost),
                 .stale = malloc((size_t)p->n_layers * sizeof *s.stale),
                 .report = report,
                 .bound = NAN};
    status st =
        s.home && s.cap && s.cost && s.stale ? run(&s) : status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    if (st == STATUS_OK) {
        report->bound = s.bound; /* of every plan within these caps */
        snprintf(report->remark, sizeof report->remark, "%s",
                 joint_ilp_possible(p) ? "all layers at once, within the load caps" : "layer by layer, neighbours fixed");
        st = start_finish(&solver_ilp, p, s.home, report, out);
    }
    free(s.home);
    free(s.cap);
    free(s.cost);
    free(s.stale);
    return st;
}

const solver solver_ilp = {
    .name = "ilp",
    .summary = "least R-flow by integer programmes: layer by layer with neighbours fixed, tiny problems all at once",
    .paper = "Adams and Sherali, A tight linearization for zero-one quadratic programming (1986)",
    .objective = "flow between layers times distance, per token and layer pair, within load caps",
    .flags = SOLVER_NEEDS_NEXT_PAIRS,
    .solve = solve,
    .measure = measure,
};
