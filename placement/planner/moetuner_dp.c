#include "placement/planner/moetuner_dp.h"
#include "placement/planner/matching.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Slowest transfer of one layer pair; stops once it is `enough`. */
static double pair_cost(const cluster_order *o, int layer, const int *from, const int *to, double enough)
{
    size_t n = (size_t)o->n;
    const double *flow = o->flow + (size_t)layer * n * n;
    double slowest = 0;
    for (size_t c = 0; c < n && slowest < enough; c++) {
        const double *us = o->us + (size_t)from[c] * n;
        for (size_t d = 0; d < n; d++)
            slowest = fmax(slowest, flow[c * n + d] * us[to[d]]);
    }
    return slowest;
}

double cluster_order_cost(const cluster_order *o, const int *rank)
{
    double sum = 0;
    for (int l = 0; l + 1 < o->n_layers; l++)
        sum += pair_cost(o, l, rank + l * o->n, rank + (l + 1) * o->n, INFINITY);
    return sum;
}

static bool is_allowed(const cluster_order *o, int layer, int cluster, int rank)
{
    return o->allowed[((size_t)layer * (size_t)o->n + (size_t)cluster) * (size_t)o->n + (size_t)rank];
}

/* ---- exact ---- */

typedef struct {
    int n_orders;
    int *orders;     /* [n_orders][n] all permutations */
    double *cost[2]; /* [n_orders] best path that ends so, this layer and the one before; infinite: not allowed */
    int *came_from;  /* [n_layers][n_orders] */
    int *by_cost;    /* [n_orders] of the layer before, cheapest first */
} path_table;

static void list_orders(int n, int at, int *order, bool *used, path_table *t)
{
    if (at == n) {
        memcpy(t->orders + t->n_orders++ * n, order, (size_t)n * sizeof *order);
        return;
    }
    for (int g = 0; g < n; g++) {
        if (used[g])
            continue;
        used[g] = true;
        order[at] = g;
        list_orders(n, at + 1, order, used, t);
        used[g] = false;
    }
}

static bool order_allowed(const cluster_order *o, int layer, const int *order)
{
    for (int c = 0; c < o->n; c++)
        if (!is_allowed(o, layer, c, order[c]))
            return false;
    return true;
}

/* Insertion by shells: qsort's comparator cannot see the costs. Ties keep the lower order. */
static void sort_by_cost(const double *cost, int n, int *by)
{
    for (int i = 0; i < n; i++)
        by[i] = i;
    for (int gap = n / 2; gap > 0; gap /= 2)
        for (int i = gap; i < n; i++) {
            int kept = by[i], j = i;
            for (; j >= gap && (cost[by[j - gap]] > cost[kept] || (cost[by[j - gap]] == cost[kept] && by[j - gap] > kept));
                 j -= gap)
                by[j] = by[j - gap];
            by[j] = kept;
        }
}

static void step_layer(const cluster_order *o, int layer, path_table *t)
{
    const double *before = t->cost[(layer - 1) % 2];
    double *here = t->cost[layer % 2];
    sort_by_cost(before, t->n_orders, t->by_cost);
    for (int i = 0; i < t->n_orders; i++) {
        const int *to = t->orders + i * o->n;
        here[i] = INFINITY;
        if (!order_allowed(o, layer, to))
            continue;
        for (int k = 0; k < t->n_orders && before[t->by_cost[k]] < here[i]; k++) {
            int from = t->by_cost[k];
            double cost = before[from] + pair_cost(o, layer - 1, t->orders + from * o->n, to, here[i] - before[from]);
            if (cost < here[i]) {
                here[i] = cost;
                t->came_from[layer * t->n_orders + i] = from;
            }
        }
    }
}

static void trace_back(const cluster_order *o, const path_table *t, int *rank)
{
    const double *last = t->cost[(o->n_layers - 1) % 2];
    int at = 0;
    for (int i = 1; i < t->n_orders; i++)
        at = last[i] < last[at] ? i : at;
    for (int l = o->n_layers - 1; l >= 0; l--) {
        memcpy(rank + l * o->n, t->orders + at * o->n, (size_t)o->n * sizeof *rank);
        at = t->came_from[l * t->n_orders + at];
    }
}

status cluster_order_exact(const cluster_order *o, int *rank)
{
    int total = 1, order[ORDER_EXACT_MOST];
    bool used[ORDER_EXACT_MOST] = {false};
    for (int i = 2; i <= o->n; i++)
        total *= i;
    path_table t = {.orders = malloc((size_t)total * (size_t)o->n * sizeof *t.orders),
                    .cost = {malloc((size_t)total * sizeof(double)), malloc((size_t)total * sizeof(double))},
                    .came_from = calloc((size_t)total * (size_t)o->n_layers, sizeof *t.came_from),
                    .by_cost = malloc((size_t)total * sizeof *t.by_cost)};
    status st = STATUS_OK;
    if (!t.orders || !t.cost[0] || !t.cost[1] || !t.came_from || !t.by_cost) {
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d orders of %d ranks", total, o->n);
    } else {
        list_orders(o->n, 0, order, used, &t);
        for (int i = 0; i < total; i++)
            t.cost[0][i] = order_allowed(o, 0, t.orders + i * o->n) ? 0 : INFINITY;
        for (int l = 1; l < o->n_layers; l++)
            step_layer(o, l, &t);
        trace_back(o, &t, rank);
    }
    free(t.orders);
    free(t.cost[0]);
    free(t.cost[1]);
    free(t.came_from);
    free(t.by_cost);
    return st;
}

/* ---- beam ---- */

enum { BEAM = 4, TRIES = 4 };

typedef struct {
    const cluster_order *o;
    random_stream *random;
    work_budget *work;
    double *match; /* [n][n] */
    int *paths[2]; /* [BEAM][n_layers][n] */
    double cost[2][BEAM];
    int n_paths;
    int *trial; /* [n] */
} beam;

static void swap_ranks(int *rank, int c, int d)
{
    int kept = rank[c];
    rank[c] = rank[d];
    rank[d] = kept;
}

/* What a layer costs with the neighbours it has (NULL: none). */
static double around(const cluster_order *o, int layer, const int *before, const int *here, const int *after, double enough)
{
    double sum = before ? pair_cost(o, layer - 1, before, here, enough) : 0;
    return after && sum < enough ? sum + pair_cost(o, layer, here, after, enough - sum) : sum;
}

static double descend(beam *b, int layer, const int *before, int *here, const int *after)
{
    const cluster_order *o = b->o;
    double best = around(o, layer, before, here, after, INFINITY);
    for (bool better = true; better;) {
        better = false;
        for (int c = 0; c < o->n; c++)
            for (int d = 0; d < c; d++) {
                if (!is_allowed(o, layer, c, here[d]) || !is_allowed(o, layer, d, here[c]))
                    continue;
                if (!work_take(b->work, (int64_t)o->n * o->n))
                    return best;
                swap_ranks(here, c, d);
                double now = around(o, layer, before, here, after, best);
                if (now < best * (1 - 1e-12)) {
                    best = now;
                    better = true;
                } else {
                    swap_ranks(here, c, d);
                }
            }
    }
    return best;
}

/* The order that keeps most flow on its rank, as far as allowed; false: no memory, or nothing is allowed together. */
static bool match_layer(beam *b, int layer, const int *before, int *here)
{
    const cluster_order *o = b->o;
    size_t n = (size_t)o->n;
    const double *flow = o->flow + (size_t)(layer - 1) * n * n;
    double all = 0;
    for (size_t i = 0; i < n * n; i++)
        all += flow[i];
    for (size_t c = 0; c < n; c++)
        for (size_t d = 0; d < n; d++) {
            bool may = is_allowed(o, layer, (int)d, before[c]);
            b->match[d * n + (size_t)before[c]] = may ? -flow[c * n + d] : all + 1;
        }
    if (!matching_solve(o->n, b->match, here))
        return false;
    for (int c = 0; c < o->n; c++)
        if (!is_allowed(o, layer, c, here[c]))
            return false;
    return true;
}

static void shake(beam *b, int layer, int *here)
{
    for (int i = 0; i < b->o->n; i++) {
        int c = random_below(b->random, b->o->n), d = random_below(b->random, b->o->n);
        if (is_allowed(b->o, layer, c, here[d]) && is_allowed(b->o, layer, d, here[c]))
            swap_ranks(here, c, d);
    }
}

/* Puts a path extended by `trial` among the next layer's, if it is among the best and new. */
static void offer_path(beam *b, int side, int layer, const int *path, double cost, int *n_next)
{
    size_t n = (size_t)b->o->n, length = (size_t)b->o->n_layers * n;
    int *next = b->paths[!side];
    double *costs = b->cost[!side];
    for (int i = 0; i < *n_next; i++)
        if (costs[i] == cost && memcmp(next + (size_t)i * length + (size_t)layer * n, b->trial, n * sizeof(int)) == 0)
            return;
    if (*n_next == BEAM && costs[BEAM - 1] <= cost)
        return;
    int at = *n_next < BEAM ? (*n_next)++ : BEAM - 1;
    for (; at > 0 && costs[at - 1] > cost; at--) {
        memcpy(next + (size_t)at * length, next + (size_t)(at - 1) * length, length * sizeof(int));
        costs[at] = costs[at - 1];
    }
    memcpy(next + (size_t)at * length, path, length * sizeof(int));
    memcpy(next + (size_t)at * length + (size_t)layer * n, b->trial, n * sizeof(int));
    costs[at] = cost;
}

static void extend_paths(beam *b, int side, int layer, const int *given)
{
    size_t n = (size_t)b->o->n, length = (size_t)b->o->n_layers * n;
    int n_next = 0;
    for (int i = 0; i < BEAM; i++)
        b->cost[!side][i] = INFINITY;
    for (int i = 0; i < b->n_paths; i++) {
        const int *path = b->paths[side] + (size_t)i * length, *before = path + (size_t)(layer - 1) * n;
        for (int k = 0; k < TRIES; k++) {
            memcpy(b->trial, given + (size_t)layer * n, n * sizeof(int));
            if (k == 1 && !match_layer(b, layer, before, b->trial))
                continue;
            if (k > 1)
                shake(b, layer, b->trial);
            double cost = b->cost[side][i] + descend(b, layer, before, b->trial, NULL);
            offer_path(b, side, layer, path, cost, &n_next);
        }
    }
    b->n_paths = n_next;
}

/* Each layer again between its neighbours, until none gains. */
static void sweep(beam *b, int *rank)
{
    const cluster_order *o = b->o;
    double best = cluster_order_cost(o, rank), before;
    do {
        before = best;
        for (int l = 0; l < o->n_layers; l++)
            descend(b, l, l > 0 ? rank + (l - 1) * o->n : NULL, rank + l * o->n,
                    l + 1 < o->n_layers ? rank + (l + 1) * o->n : NULL);
        best = cluster_order_cost(o, rank);
    } while (best < before * (1 - 1e-9) && b->work->left > 0 && !b->work->out_of_time);
}

static void descend_around(beam *b, int layer, int *rank)
{
    const cluster_order *o = b->o;
    for (int l = layer > 0 ? layer - 1 : 0; l <= layer + 1 && l < o->n_layers; l++)
        descend(b, l, l > 0 ? rank + (l - 1) * o->n : NULL, rank + l * o->n, l + 1 < o->n_layers ? rank + (l + 1) * o->n : NULL);
}

/* A few random swaps in one or two layers, and descent from there; kept when the whole is no worse. */
static void kick(beam *b, int *rank, int *trial)
{
    const cluster_order *o = b->o;
    size_t size = (size_t)o->n_layers * (size_t)o->n * sizeof *rank;
    double best = cluster_order_cost(o, rank);
    while (work_take(b->work, (int64_t)o->n_layers * o->n * o->n)) {
        memcpy(trial, rank, size);
        int layer = random_below(b->random, o->n_layers), layers = 1 + random_below(b->random, 2);
        for (int l = layer; l < layer + layers && l < o->n_layers; l++)
            for (int i = 0; i < 3; i++) {
                int *here = trial + l * o->n, c = random_below(b->random, o->n), d = random_below(b->random, o->n);
                if (is_allowed(o, l, c, here[d]) && is_allowed(o, l, d, here[c]))
                    swap_ranks(here, c, d);
            }
        descend_around(b, layer, trial);
        double now = cluster_order_cost(o, trial);
        if (now > best)
            continue;
        best = now;
        memcpy(rank, trial, size);
    }
}

status cluster_order_beam(const cluster_order *o, random_stream *random, work_budget *work, int *rank)
{
    size_t n = (size_t)o->n, length = (size_t)o->n_layers * n;
    beam b = {.o = o,
              .random = random,
              .work = work,
              .match = malloc(n * n * sizeof(double)),
              .paths = {calloc(BEAM * length, sizeof(int)), calloc(BEAM * length, sizeof(int))},
              .n_paths = 1,
              .trial = malloc(n * sizeof(int))};
    bool ok = b.match && b.paths[0] && b.paths[1] && b.trial;
    if (ok) {
        memcpy(b.paths[0], rank, length * sizeof *rank);
        int side = 0;
        for (int l = 1; l < o->n_layers; l++, side = !side)
            extend_paths(&b, side, l, rank);
        int *best = b.paths[side];
        sweep(&b, best);
        kick(&b, best, b.paths[!side]);
        if (cluster_order_cost(o, best) < cluster_order_cost(o, rank))
            memcpy(rank, best, length * sizeof *rank);
    }
    free(b.match);
    free(b.paths[0]);
    free(b.paths[1]);
    free(b.trial);
    return ok ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to order clusters on %d ranks", o->n);
}
