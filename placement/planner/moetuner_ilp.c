#include "placement/planner/moetuner_ilp.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ILP2_MOST_COLUMNS = 1100, ILP2_MOST_RANKS = 4 }; /* above, a node takes GLPK seconds */

static status finished(lp_model *m, lp_model **out)
{
    if (lp_failed(m)) {
        lp_destroy(m);
        return status_fail(STATUS_NO_MEMORY, "no memory for an integer programme");
    }
    *out = m;
    return STATUS_OK;
}

/* ---- ILP 1 ---- */

status moetuner_ilp1_create(const problem *p, int layer, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    int n = p->n_ranks, busiest;
    for (int i = 0; i < p->n_experts * n; i++)
        lp_add_column(m, 0, 1, 0, true);
    busiest = lp_add_column(m, 1, LP_INF, 1, false); /* the mean is a bound */
    for (int e = 0; e < p->n_experts; e++) {
        int row = lp_add_row(m, 1, 1);
        for (int c = 0; c < n; c++)
            lp_set(m, row, e * n + c, 1);
    }
    for (int c = 0; c < n; c++) {
        int load = lp_add_row(m, -LP_INF, 0), some = lp_add_row(m, p->n_experts >= n ? 1 : 0, LP_INF);
        for (int e = 0; e < p->n_experts; e++) {
            lp_set(m, load, e * n + c, p->load[problem_at(p, layer, e)] / (p->rows[layer] * p->share[c]));
            lp_set(m, some, e * n + c, 1);
        }
        lp_set(m, load, busiest, -1);
    }
    return finished(m, out);
}

void moetuner_ilp1_start(const problem *p, int layer, const int *home, double *x)
{
    int n = p->n_ranks;
    double busiest = 1;
    memset(x, 0, (size_t)p->n_experts * (size_t)n * sizeof *x);
    for (int c = 0; c < n; c++) {
        double load = 0;
        for (int e = 0; e < p->n_experts; e++)
            load += home[e] == c ? p->load[problem_at(p, layer, e)] : 0;
        busiest = fmax(busiest, load / (p->rows[layer] * p->share[c]));
    }
    for (int e = 0; e < p->n_experts; e++)
        x[e * n + home[e]] = 1;
    x[p->n_experts * n] = busiest;
}

/* ---- ILP 2 ---- */

double moetuner_scale(const cluster_order *o)
{
    size_t n = (size_t)o->n;
    double flow = 0, us = 0;
    for (size_t i = 0; i < (size_t)(o->n_layers - 1) * n * n; i++)
        flow = fmax(flow, o->flow[i]);
    for (size_t i = 0; i < n * n; i++)
        us = fmax(us, o->us[i]);
    return flow * us > 0 ? 1e3 / (flow * us) : 1;
}

static size_t n_choices(const cluster_order *o)
{
    return (size_t)o->n_layers * (size_t)o->n * (size_t)o->n;
}

/* Both choices: layer's cluster c on g and the next layer's d on h. */
static int both(const cluster_order *o, int layer, int c, int g, int d, int h)
{
    int n = o->n;
    return (int)n_choices(o) + (((layer * n + c) * n + g) * n + d) * n + h;
}

static int choice(const cluster_order *o, int layer, int c, int g)
{
    return (layer * o->n + c) * o->n + g;
}

static size_t n_products(const cluster_order *o)
{
    size_t squared = (size_t)o->n * (size_t)o->n;
    return (size_t)(o->n_layers - 1) * squared * squared;
}

bool moetuner_ilp2_possible(const cluster_order *o)
{
    return o->n_layers > 1 && o->n > 1 && o->n <= ILP2_MOST_RANKS && n_choices(o) + n_products(o) <= ILP2_MOST_COLUMNS;
}

static void add_permutation(const cluster_order *o, int first, lp_model *m)
{
    for (int c = 0; c < o->n; c++) {
        int cluster = lp_add_row(m, 1, 1), rank = lp_add_row(m, 1, 1);
        for (int g = 0; g < o->n; g++) {
            lp_set(m, cluster, first + c * o->n + g, 1);
            lp_set(m, rank, first + g * o->n + c, 1);
        }
    }
}

/* Summed over the partner's rank, or over the partner, a product is the choice itself. */
static void add_products(const cluster_order *o, int l, lp_model *m)
{
    for (int c = 0; c < o->n; c++)
        for (int g = 0; g < o->n; g++)
            for (int i = 0; i < o->n; i++) {
                int rows[4];
                for (int k = 0; k < 4; k++)
                    rows[k] = lp_add_row(m, 0, 0);
                for (int j = 0; j < o->n; j++) {
                    lp_set(m, rows[0], both(o, l, c, g, i, j), 1); /* partner i over its ranks */
                    lp_set(m, rows[1], both(o, l, c, g, j, i), 1); /* rank i over partners */
                    lp_set(m, rows[2], both(o, l, i, j, c, g), 1);
                    lp_set(m, rows[3], both(o, l, j, i, c, g), 1);
                }
                lp_set(m, rows[0], choice(o, l, c, g), -1);
                lp_set(m, rows[1], choice(o, l, c, g), -1);
                lp_set(m, rows[2], choice(o, l + 1, c, g), -1);
                lp_set(m, rows[3], choice(o, l + 1, c, g), -1);
            }
}

static void add_slowest(const cluster_order *o, int l, double scale, lp_model *m)
{
    size_t n = (size_t)o->n;
    int slowest = (int)(n_choices(o) + n_products(o)) + l;
    for (int g = 0; g < o->n; g++)
        for (int h = 0; h < o->n; h++) {
            double us = o->us[(size_t)g * n + (size_t)h] * scale;
            if (us <= 0)
                continue;
            int row = lp_add_row(m, -LP_INF, 0);
            for (int c = 0; c < o->n; c++)
                for (int d = 0; d < o->n; d++)
                    lp_set(m, row, both(o, l, c, g, d, h), us * o->flow[((size_t)l * n + (size_t)c) * n + (size_t)d]);
            lp_set(m, row, slowest, -1);
        }
}

status moetuner_ilp2_create(const cluster_order *o, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    double scale = moetuner_scale(o);
    for (size_t i = 0; i < n_choices(o); i++)
        lp_add_column(m, 0, o->allowed[i], 0, true);
    for (size_t i = 0; i < n_products(o); i++)
        lp_add_column(m, 0, 1, 0, false);
    for (int l = 0; l + 1 < o->n_layers; l++)
        lp_add_column(m, 0, LP_INF, 1, false);
    for (int l = 0; l < o->n_layers; l++)
        add_permutation(o, choice(o, l, 0, 0), m);
    for (int l = 0; l + 1 < o->n_layers; l++) {
        add_products(o, l, m);
        add_slowest(o, l, scale, m);
    }
    return finished(m, out);
}

static double slowest_of(const cluster_order *o, int l, const int *from, const int *to)
{
    size_t n = (size_t)o->n;
    double slowest = 0;
    for (int c = 0; c < o->n; c++)
        for (int d = 0; d < o->n; d++)
            slowest =
                fmax(slowest, o->flow[((size_t)l * n + (size_t)c) * n + (size_t)d] * o->us[(size_t)from[c] * n + (size_t)to[d]]);
    return slowest;
}

void moetuner_ilp2_start(const cluster_order *o, const int *rank, double *x)
{
    int n = o->n;
    double scale = moetuner_scale(o);
    memset(x, 0, (n_choices(o) + n_products(o)) * sizeof *x);
    for (int l = 0; l < o->n_layers; l++)
        for (int c = 0; c < n; c++)
            x[choice(o, l, c, rank[l * n + c])] = 1;
    for (int l = 0; l + 1 < o->n_layers; l++) {
        for (int c = 0; c < n; c++)
            for (int d = 0; d < n; d++)
                x[both(o, l, c, rank[l * n + c], d, rank[(l + 1) * n + d])] = 1;
        x[n_choices(o) + n_products(o) + (size_t)l] = scale * slowest_of(o, l, rank + l * n, rank + (l + 1) * n);
    }
}

/* ---- one layer ---- */

/* flow from (`into`) or to the ranks of a neighbour layer, which stay. */
static void add_window_side(const cluster_order *o, int pair, const int *fixed, bool into, double scale, int slowest, lp_model *m)
{
    size_t n = (size_t)o->n;
    for (int f = 0; f < o->n; f++)
        for (int g = 0; g < o->n; g++) {
            double us = scale * (into ? o->us[(size_t)fixed[f] * n + (size_t)g] : o->us[(size_t)g * n + (size_t)fixed[f]]);
            if (us <= 0)
                continue;
            int row = lp_add_row(m, -LP_INF, 0);
            for (int c = 0; c < o->n; c++) {
                size_t at = into ? (size_t)f * n + (size_t)c : (size_t)c * n + (size_t)f;
                lp_set(m, row, c * o->n + g, us * o->flow[(size_t)pair * n * n + at]);
            }
            lp_set(m, row, slowest, -1);
        }
}

status moetuner_window_create(const cluster_order *o, int layer, const int *rank, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    int n = o->n;
    double scale = moetuner_scale(o);
    for (int i = 0; i < n * n; i++)
        lp_add_column(m, 0, o->allowed[layer * n * n + i], 0, true);
    int before = lp_add_column(m, 0, LP_INF, 1, false), after = lp_add_column(m, 0, LP_INF, 1, false);
    add_permutation(o, 0, m);
    if (layer > 0)
        add_window_side(o, layer - 1, rank + (layer - 1) * n, true, scale, before, m);
    if (layer + 1 < o->n_layers)
        add_window_side(o, layer, rank + (layer + 1) * n, false, scale, after, m);
    return finished(m, out);
}

void moetuner_window_start(const cluster_order *o, int layer, const int *rank, double *x)
{
    int n = o->n;
    const int *here = rank + layer * n;
    double scale = moetuner_scale(o);
    memset(x, 0, (size_t)n * (size_t)n * sizeof *x);
    for (int c = 0; c < n; c++)
        x[c * n + here[c]] = 1;
    x[n * n] = layer > 0 ? scale * slowest_of(o, layer - 1, here - n, here) : 0;
    x[n * n + 1] = layer + 1 < o->n_layers ? scale * slowest_of(o, layer, here, here + n) : 0;
}

void moetuner_take(const cluster_order *o, const double *y, int *rank)
{
    for (int c = 0; c < o->n; c++)
        for (int g = 0; g < o->n; g++)
            if (y[c * o->n + g] > 0.5)
                rank[c] = g;
}
