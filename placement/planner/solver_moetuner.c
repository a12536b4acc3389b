/* solver_moetuner.c - MoETuner as published (arXiv 2502.06643): clusters by load, then ranks by flow; both integer programmes
 * stated in GLPK, seeded by what solves them faster.
 *
 * Clusters. Sizes are free per layer, none empty: LPT and exchanges, then ILP 1 where it is small enough for GLPK to add or
 * prove something. A second candidate keeps each layer's slots.
 * Order. The dynamic programme over permutations up to 6 ranks, a beam above; then ILP 2 for all layers where that is tiny, or
 * layer by layer between its neighbours.
 * Totals. A rank's experts over all layers keep its room: clusters trade ranks, then single experts move, where the busiest
 * cluster suffers least.
 * The better candidate by the measure below is the plan. */
#include "placement/planner/assign.h"
#include "placement/planner/moetuner_dp.h"
#include "placement/planner/moetuner_ilp.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    UNITS_PER_LAYER = 2000000, /* flows looked at by the beam */
    ILP1_MOST_COLUMNS = 1100,
    ILP1_PROVE_COLUMNS = 64, /* tiny: five times the nodes */
    ILP1_NODES = 100,
    ILP1_PIVOTS = 20000,
    ILP2_NODES = 3000,
    ILP2_PIVOTS = 30000,
    WINDOW_MOST_RANKS = 8,
    WINDOW_NODES = 40,
    WINDOW_PIVOTS = 8000,
};

static const double ENOUGH = 5e-4; /* a busiest cluster so near the least possible is not worth a programme */

typedef struct {
    const problem *p;
    work_budget work;
    solver_report *report;
    int *home;     /* [n_layers][n_experts] clusters, named by the rank they are for */
    int *rank;     /* [n_layers][n_ranks] of each cluster */
    double *flow;  /* [n_layers - 1][n_ranks][n_ranks] */
    double *us;    /* [n_ranks][n_ranks] */
    bool *allowed; /* [n_layers][n_ranks][n_ranks] */
    double *least; /* [n_layers] proved: busiest cluster over its share */
    cluster_order order;
} tuner;

static double seconds_left(const tuner *t)
{
    if (t->work.deadline == 0)
        return 0;
    double left = t->work.deadline - clock_seconds();
    return left > 0.001 ? left : 0.001;
}

/* Little work leaves little for GLPK too. */
static int64_t pivots_of(const tuner *t, int64_t most)
{
    int64_t share = t->work.left / t->p->n_layers / 20 + 1;
    return share < most ? share : most;
}

static int *home_of(const tuner *t, int layer)
{
    return t->home + problem_at(t->p, layer, 0);
}

/* ---- clusters ---- */

static double busiest_over_share(const problem *p, int layer, const int *home)
{
    double worst = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        double rows = 0;
        for (int e = 0; e < p->n_experts; e++)
            rows += home[e] == g ? p->load[problem_at(p, layer, e)] : 0;
        worst = fmax(worst, p->rows[layer] > 0 ? rows / (p->rows[layer] * p->share[g]) : 1);
    }
    return worst;
}

/* Without replicas the hottest expert is on one rank whole; and nothing is below the mean. */
static double least_possible(const problem *p, int layer)
{
    double hottest = 0, widest = 0;
    for (int e = 0; e < p->n_experts; e++)
        hottest = fmax(hottest, p->load[problem_at(p, layer, e)]);
    for (int g = 0; g < p->n_ranks; g++)
        widest = fmax(widest, p->share[g]);
    return p->rows[layer] > 0 ? fmax(1, hottest / (p->rows[layer] * widest)) : 1;
}

/* An empty cluster takes the coldest expert of the largest one. */
static void fill_empty(const problem *p, int layer, int *home)
{
    const double *load = p->load + problem_at(p, layer, 0);
    for (int g = 0; g < p->n_ranks && p->n_experts >= p->n_ranks; g++) {
        int largest = 0, most = 0, own = 0, take = -1;
        for (int h = 0; h < p->n_ranks; h++) {
            int n = 0;
            for (int e = 0; e < p->n_experts; e++)
                n += home[e] == h;
            own = h == g ? n : own;
            if (n > most) {
                most = n;
                largest = h;
            }
        }
        for (int e = 0; e < p->n_experts && own == 0; e++)
            if (home[e] == largest && (take < 0 || load[e] < load[take]))
                take = e;
        if (take >= 0)
            home[take] = g;
    }
}

static status balance_layer(void *arg, int layer)
{
    tuner *t = arg;
    const problem *p = t->p;
    int *slots = malloc((size_t)p->n_ranks * sizeof *slots);
    if (!slots)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    for (int g = 0; g < p->n_ranks; g++)
        slots[g] = p->n_experts;
    double worst = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, layer, 0), p->share, slots, home_of(t, layer));
    free(slots);
    if (worst < 0)
        return status_fail(STATUS_NO_MEMORY, "no memory to place %d experts", p->n_experts);
    fill_empty(p, layer, home_of(t, layer));
    return STATUS_OK;
}

typedef struct {
    int n, *layer;
    lp_model **models;
    lp_options *options;
    lp_result *results;
    double **starts;
} programmes;

static status programmes_create(int room, programmes *g)
{
    size_t n = (size_t)room + 1;
    *g = (programmes){.layer = calloc(n, sizeof *g->layer),
                      .models = calloc(n, sizeof *g->models),
                      .options = calloc(n, sizeof *g->options),
                      .results = calloc(n, sizeof *g->results),
                      .starts = calloc(n, sizeof *g->starts)};
    if (g->layer && g->models && g->options && g->results && g->starts)
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "no memory for %d integer programmes", room);
}

static void programmes_clear(programmes *g)
{
    for (int i = 0; i < g->n; i++) {
        lp_destroy(g->models[i]);
        lp_result_clear(&g->results[i]);
        free(g->starts[i]);
    }
    free(g->layer);
    free(g->models);
    free(g->options);
    free(g->results);
    free(g->starts);
}

/* Takes over the model; its start is to be filled in by the caller. */
static status programmes_add(programmes *g, int layer, lp_model *m, lp_options options)
{
    int i = g->n++;
    g->layer[i] = layer;
    g->models[i] = m;
    g->starts[i] = malloc(((size_t)lp_n_columns(m) + 1) * sizeof *g->starts[i]);
    options.start = g->starts[i];
    g->options[i] = options;
    return g->starts[i] ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for an integer programme");
}

/* Solves them and counts; improved[i]: the point is better than its start by more than rounding. */
static status programmes_solve(tuner *t, programmes *g, const double *before, bool *improved)
{
    for (int i = 0; i < g->n; i++)
        g->options[i].seconds = seconds_left(t); /* models took time to make */
    TRY(lp_solve_all(g->n, g->models, g->options, t->p->request->threads, g->results));
    for (int i = 0; i < g->n; i++) {
        const lp_result *r = &g->results[i];
        improved[i] = r->x && r->objective < before[i] - 1e-7 * fabs(before[i]);
        t->report->glpk_runs++;
        t->report->glpk_proved += r->outcome == LP_OPTIMAL;
        t->report->glpk_improved += improved[i];
        t->report->out_of_time |= r->timed_out;
        t->report->work += r->pivots;
    }
    return STATUS_OK;
}

static status pose_ilp1(tuner *t, programmes *g, double *before)
{
    const problem *p = t->p;
    bool prove = p->n_experts * p->n_ranks <= ILP1_PROVE_COLUMNS;
    for (int l = 0; l < p->n_layers; l++) {
        before[g->n] = busiest_over_share(p, l, home_of(t, l));
        t->least[l] = least_possible(p, l);
        if (p->n_experts * p->n_ranks > ILP1_MOST_COLUMNS || p->rows[l] <= 0 || before[g->n] <= t->least[l] * (1 + ENOUGH))
            continue;
        lp_model *m;
        TRY(moetuner_ilp1_create(p, l, &m));
        TRY(programmes_add(g, l, m,
                           (lp_options){.pivots = pivots_of(t, ILP1_PIVOTS),
                                        .nodes = prove ? 5 * ILP1_NODES : ILP1_NODES,
                                        .gap = prove ? 0 : 1e-4}));
        moetuner_ilp1_start(p, l, home_of(t, l), g->starts[g->n - 1]);
    }
    return STATUS_OK;
}

static void take_ilp1(tuner *t, const programmes *g, const bool *improved)
{
    const problem *p = t->p;
    for (int i = 0; i < g->n; i++) {
        int l = g->layer[i];
        const lp_result *r = &g->results[i];
        t->least[l] = fmax(t->least[l], r->bound * (1 - 1e-7));
        for (int e = 0; e < p->n_experts && improved[i]; e++)
            for (int c = 0; c < p->n_ranks; c++)
                if (r->x[e * p->n_ranks + c] > 0.5)
                    home_of(t, l)[e] = c;
    }
}

static status make_clusters(tuner *t)
{
    const problem *p = t->p;
    programmes g;
    double *before = malloc(((size_t)p->n_layers + 1) * sizeof *before);
    bool *improved = malloc(((size_t)p->n_layers + 1) * sizeof *improved);
    TRY(parallel_for(p->request->threads, p->n_layers, balance_layer, t));
    status st = programmes_create(p->n_layers, &g);
    if (!before || !improved)
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    if (st == STATUS_OK)
        st = pose_ilp1(t, &g, before);
    for (int i = 0; st == STATUS_OK && i < g.n; i++)
        before[i] = busiest_over_share(p, g.layer[i], home_of(t, g.layer[i]));
    if (st == STATUS_OK)
        st = programmes_solve(t, &g, before, improved);
    if (st == STATUS_OK)
        take_ilp1(t, &g, improved);
    programmes_clear(&g);
    free(before);
    free(improved);
    return st;
}

/* ---- order ---- */

static void count_flow(tuner *t)
{
    const problem *p = t->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    memset(t->flow, 0, (size_t)(p->n_layers - 1) * ranks * ranks * sizeof *t->flow);
    for (int l = 0; l + 1 < p->n_layers; l++) {
        const double *pairs = p->next_pairs + (size_t)l * n * n;
        double *flow = t->flow + (size_t)l * ranks * ranks, all = 0;
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++) {
                flow[(size_t)home_of(t, l)[i] * ranks + (size_t)home_of(t, l + 1)[j]] += pairs[i * n + j];
                all += pairs[i * n + j];
            }
        for (size_t i = 0; all > 0 && i < ranks * ranks; i++)
            flow[i] *= p->topology->row_bytes / all;
    }
}

/* A cluster may go to any rank that it keeps as busy as the layer is anyway (and within slots, when those are kept). */
static void set_allowed(tuner *t, bool keep_slots)
{
    const problem *p = t->p;
    size_t ranks = (size_t)p->n_ranks;
    for (int l = 0; l < p->n_layers; l++) {
        double worst = busiest_over_share(p, l, home_of(t, l)) * (1 + 1e-12);
        for (size_t c = 0; c < ranks; c++) {
            double rows = 0;
            int n = 0;
            for (int e = 0; e < p->n_experts; e++)
                if (home_of(t, l)[e] == (int)c) {
                    rows += p->load[problem_at(p, l, e)];
                    n++;
                }
            for (size_t g = 0; g < ranks; g++) {
                size_t at = (size_t)l * ranks + g;
                bool fits = rows <= worst * p->rows[l] * p->share[g] && (!keep_slots || n <= p->slots[at]) &&
                            (p->request->slack < 0 || rows <= p->cap[at]);
                t->allowed[((size_t)l * ranks + c) * ranks + g] = fits || g == c;
            }
        }
    }
}

static status polish_whole(tuner *t)
{
    const cluster_order *o = &t->order;
    programmes g;
    lp_model *m;
    bool improved = false;
    status st = programmes_create(1, &g);
    if (st == STATUS_OK)
        st = moetuner_ilp2_create(o, &m);
    if (st == STATUS_OK)
        st =
            programmes_add(&g, 0, m, (lp_options){.pivots = pivots_of(t, ILP2_PIVOTS), .nodes = ILP2_NODES, .pseudocosts = true});
    if (st == STATUS_OK) {
        moetuner_ilp2_start(o, t->rank, g.starts[0]);
        double before = cluster_order_cost(o, t->rank) * moetuner_scale(o);
        st = programmes_solve(t, &g, &before, &improved);
    }
    for (int l = 0; improved && l < o->n_layers; l++)
        moetuner_take(o, g.results[0].x + l * o->n * o->n, t->rank + l * o->n);
    programmes_clear(&g);
    return st;
}

static double window_cost(const cluster_order *o, int layer, int *rank)
{
    int first = layer > 0 ? layer - 1 : layer, last = layer + 1 < o->n_layers ? layer + 1 : layer;
    cluster_order part = *o;
    part.n_layers = last - first + 1;
    part.flow += (size_t)first * (size_t)o->n * (size_t)o->n;
    return cluster_order_cost(&part, rank + first * o->n);
}

/* Even layers between their neighbours, then odd ones. */
static status polish_windows(tuner *t, int parity)
{
    const cluster_order *o = &t->order;
    programmes g;
    double *before = malloc(((size_t)o->n_layers + 1) * sizeof *before);
    bool *improved = malloc(((size_t)o->n_layers + 1) * sizeof *improved);
    status st = programmes_create(o->n_layers, &g);
    if (!before || !improved)
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d layers", o->n_layers);
    for (int l = parity; l < o->n_layers && st == STATUS_OK; l += 2) {
        lp_model *m;
        st = moetuner_window_create(o, l, t->rank, &m);
        if (st == STATUS_OK)
            st = programmes_add(&g, l, m, (lp_options){.pivots = pivots_of(t, WINDOW_PIVOTS), .nodes = WINDOW_NODES});
        if (st != STATUS_OK)
            break;
        moetuner_window_start(o, l, t->rank, g.starts[g.n - 1]);
        before[g.n - 1] = window_cost(o, l, t->rank) * moetuner_scale(o);
    }
    if (st == STATUS_OK)
        st = programmes_solve(t, &g, before, improved);
    for (int i = 0; i < g.n && st == STATUS_OK; i++)
        if (improved[i])
            moetuner_take(o, g.results[i].x, t->rank + g.layer[i] * o->n);
    programmes_clear(&g);
    free(before);
    free(improved);
    return st;
}

/* 720 orders a layer cost a quarter of a second; fewer ranks nothing to speak of. */
static bool order_exactly(const problem *p)
{
    return p->n_ranks < ORDER_EXACT_MOST ||
           (p->n_ranks == ORDER_EXACT_MOST && (p->request->seconds == 0 || 0.25 * p->n_layers < p->request->seconds / 2));
}

static status order_clusters(tuner *t, bool keep_slots)
{
    const problem *p = t->p;
    set_allowed(t, keep_slots);
    for (int i = 0; i < p->n_layers * p->n_ranks; i++)
        t->rank[i] = i % p->n_ranks;
    if (p->n_layers == 1 || p->n_ranks == 1)
        return STATUS_OK;
    count_flow(t);
    random_stream random = random_open(p, 1);
    work_budget work = work_part(&t->work, keep_slots, 2);
    if (order_exactly(p))
        TRY(cluster_order_exact(&t->order, t->rank));
    else
        TRY(cluster_order_beam(&t->order, &random, &work, t->rank));
    t->report->out_of_time |= work.out_of_time;
    if (moetuner_ilp2_possible(&t->order))
        return polish_whole(t);
    for (int parity = 0; parity < 2 && !order_exactly(p) && p->n_ranks <= WINDOW_MOST_RANKS; parity++)
        TRY(polish_windows(t, parity));
    return STATUS_OK;
}

static void apply_order(tuner *t)
{
    const problem *p = t->p;
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++)
            home_of(t, l)[e] = t->rank[l * p->n_ranks + home_of(t, l)[e]];
}

/* ---- totals ---- */

typedef struct {
    tuner *t;
    int *size;    /* [n_layers][n_ranks] */
    int *total;   /* [n_ranks] */
    double *rows; /* [n_layers][n_ranks] */
} tally;

static void count_sizes(tally *y)
{
    const problem *p = y->t->p;
    memset(y->size, 0, (size_t)p->n_layers * (size_t)p->n_ranks * sizeof *y->size);
    memset(y->rows, 0, (size_t)p->n_layers * (size_t)p->n_ranks * sizeof *y->rows);
    memset(y->total, 0, (size_t)p->n_ranks * sizeof *y->total);
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            int g = home_of(y->t, l)[e];
            y->size[l * p->n_ranks + g]++;
            y->rows[l * p->n_ranks + g] += p->load[problem_at(p, l, e)];
            y->total[g]++;
        }
}

static int over(const tally *y, int g)
{
    return y->total[g] - y->t->p->total_slots[g];
}

/* Two ranks trade their clusters of a layer, where the sum of what is too much gets smaller by it; loads must allow it. */
static bool trade_clusters(tally *y, int g, int h)
{
    const problem *p = y->t->p;
    int best = -1, best_gain = 0;
    for (int l = 0; l < p->n_layers; l++) {
        int *size = y->size + l * p->n_ranks;
        double *rows = y->rows + l * p->n_ranks, worst = 0;
        for (int i = 0; i < p->n_ranks; i++)
            worst = fmax(worst, rows[i] / p->share[i]);
        int moved = size[g] - size[h], after_g = over(y, g) - moved, after_h = over(y, h) + moved;
        int gain = over(y, g) - (after_g > 0 ? after_g : 0) - (after_h > 0 ? after_h : 0);
        if (rows[g] / p->share[h] <= worst * (1 + 1e-12) && rows[h] / p->share[g] <= worst * (1 + 1e-12) && gain > best_gain) {
            best = l;
            best_gain = gain;
        }
    }
    if (best < 0)
        return false;
    for (int e = 0; e < p->n_experts; e++) {
        int *at = &home_of(y->t, best)[e];
        *at = *at == g ? h : *at == h ? g : *at;
    }
    return true;
}

/* The expert whose move from g to h adds least to a layer's busiest rank. */
static bool move_expert(tally *y, int g, int h)
{
    const problem *p = y->t->p;
    double least = HUGE_VAL, coldest = HUGE_VAL;
    int layer = -1, expert = -1;
    for (int l = 0; l < p->n_layers; l++) {
        const double *rows = y->rows + l * p->n_ranks;
        double worst = 0;
        for (int i = 0; i < p->n_ranks; i++)
            worst = fmax(worst, rows[i] / p->share[i]);
        for (int e = 0; e < p->n_experts && y->size[l * p->n_ranks + g] > 1; e++) {
            double load = p->load[problem_at(p, l, e)], then = rows[h] + load;
            if (home_of(y->t, l)[e] != g || (p->request->slack >= 0 && then > p->cap[l * p->n_ranks + h]))
                continue;
            double adds = p->rows[l] > 0 ? fmax(0, then / p->share[h] - worst) / p->rows[l] : 0;
            if (adds < least || (adds == least && load < coldest)) {
                least = adds;
                coldest = load;
                layer = l;
                expert = e;
            }
        }
    }
    if (layer >= 0)
        home_of(y->t, layer)[expert] = h;
    return layer >= 0;
}

/* One change that brings rank g nearer to its room; false: none is possible. */
static bool relieve(tally *y, int g)
{
    const problem *p = y->t->p;
    for (int h = 0; h < p->n_ranks; h++)
        if (over(y, h) < 0 && trade_clusters(y, g, h))
            return true;
    for (int h = 0; h < p->n_ranks; h++)
        if (over(y, h) < 0 && move_expert(y, g, h))
            return true;
    return false;
}

static status keep_totals(tuner *t)
{
    const problem *p = t->p;
    size_t cells = (size_t)p->n_layers * (size_t)p->n_ranks;
    tally y = {t, malloc(cells * sizeof(int)), malloc((size_t)p->n_ranks * sizeof(int)), malloc(cells * sizeof(double))};
    status st = y.size && y.total && y.rows ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    for (bool changed = st == STATUS_OK; changed;) {
        changed = false;
        count_sizes(&y);
        for (int g = 0; g < p->n_ranks && !changed; g++)
            changed = over(&y, g) > 0 && relieve(&y, g);
    }
    free(y.size);
    free(y.total);
    free(y.rows);
    return st;
}

/* ---- the solver ---- */

/* Microseconds per token: each layer's busiest rank, and ILP 2's slowest transfers. */
static status measure(const problem *p, const plan *made, double *out)
{
    double *us = malloc((size_t)p->n_ranks * sizeof *us), sum = score_moetuner(p, made);
    if (!us)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    for (int l = 0; l < p->n_layers; l++) {
        double slowest = 0;
        memset(us, 0, (size_t)p->n_ranks * sizeof *us);
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0, n = plan_n_copies(made, l, e); c < n; c++) {
                int g = plan_copies(made, l, e)[c];
                us[g] += p->load[problem_at(p, l, e)] / n * p->topology->row_us[g];
            }
        for (int g = 0; g < p->n_ranks; g++)
            slowest = fmax(slowest, us[g]);
        sum += p->rows[l] > 0 ? p->top_k * slowest / p->rows[l] : 0;
    }
    free(us);
    *out = sum;
    return STATUS_OK;
}

/* A layer's busiest rank over its share, as microseconds per token. */
static double bound_of(const tuner *t)
{
    const problem *p = t->p;
    double inverse = 0, sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        inverse += 1 / p->topology->row_us[g];
    for (int l = 0; l < p->n_layers; l++)
        sum += p->rows[l] > 0 ? p->top_k * t->least[l] / inverse : 0;
    return sum * (1 - 1e-12);
}

/* Orders the clusters in t->home and makes them a plan; `fits` is false where room or slack cannot be kept. */
static status try_clusters(tuner *t, bool keep_slots, plan *out, double *cost, bool *fits)
{
    TRY(order_clusters(t, keep_slots));
    apply_order(t);
    TRY(keep_totals(t));
    TRY(problem_plan(t->p, solver_moetuner.name, t->home, out));
    *fits = problem_check(t->p, out, false) == STATUS_OK;
    return measure(t->p, out, cost);
}

static status solve_both(tuner *t, plan *best)
{
    plan other = {0};
    double cost = 0, other_cost = 0;
    bool fits = false, other_fits = false;
    TRY(make_clusters(t));
    TRY(try_clusters(t, false, best, &cost, &fits));
    status st = start_lpt(t->p, t->home);
    if (st == STATUS_OK)
        st = try_clusters(t, true, &other, &other_cost, &other_fits);
    if (st == STATUS_OK && (!fits || (other_fits && other_cost < cost))) {
        plan kept = *best;
        *best = other;
        other = kept;
        fits = false;
    }
    snprintf(t->report->remark, sizeof t->report->remark, "%s; %s",
             fits ? "cluster sizes free per layer" : "clusters as large as each layer's slots",
             order_exactly(t->p) ? "their order is optimal (dynamic programme over permutations)"
                                 : "their order by beam and windows");
    plan_clear(&other);
    if (st != STATUS_OK)
        plan_clear(best);
    return st;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    size_t ranks = (size_t)p->n_ranks, cells = (size_t)p->n_layers * ranks;
    tuner t = {.p = p,
               .work = work_start(p, (int64_t)UNITS_PER_LAYER * p->n_layers),
               .report = report,
               .home = malloc(problem_at(p, p->n_layers, 0) * sizeof *t.home),
               .rank = malloc(cells * sizeof *t.rank),
               .flow = malloc(cells * ranks * sizeof *t.flow),
               .us = malloc(ranks * ranks * sizeof *t.us),
               .allowed = malloc(cells * ranks * sizeof *t.allowed),
               .least = calloc((size_t)p->n_layers, sizeof *t.least)};
    plan best = {0};
    status st = STATUS_OK;
    if (!t.home || !t.rank || !t.flow || !t.us || !t.allowed || !t.least)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d layers on %d ranks", p->n_layers, p->n_ranks), out);
    for (size_t i = 0; i < ranks * ranks; i++)
        t.us[i] = topology_us_per_byte(p->topology, (int)(i / ranks), (int)(i % ranks));
    t.order = (cluster_order){p->n_layers, p->n_ranks, t.flow, t.us, t.allowed};
    TRY_GOTO(solve_both(&t, &best), out);
    TRY_GOTO(start_keep_seed(&solver_moetuner, p, &best, report, out), out);
    report->bound = fmin(bound_of(&t), report->objective); /* a seed may hold replicas, which may go below */
out:
    free(t.home);
    free(t.rank);
    free(t.flow);
    free(t.us);
    free(t.allowed);
    free(t.least);
    return st;
}

const solver solver_moetuner = {
    .name = "moetuner",
    .summary = "MoETuner: clusters balanced by load, then put on ranks by the flow between layers; sizes free per layer",
    .paper =
        "Go and Mahajan, MoETuner: optimized MoE serving with balanced expert placement and token routing (arXiv 2502.06643)",
    .objective = "us per token: each layer's busiest rank, and the slowest transfer between layers",
    .flags = SOLVER_NEEDS_NEXT_PAIRS | SOLVER_TOTALS,
    .solve = solve,
    .measure = measure,
};
