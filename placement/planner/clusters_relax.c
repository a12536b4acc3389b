/* The set-partitioning programme over a layer's clusters, relaxed: choose clusters so that every expert is in one, as many as
 * there are ranks of each class, with as few (token, cluster) meetings as can be. Columns are generated from the list. */
#include "placement/planner/clusters.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PER_ROUND = 40, MOST_GENERATED = 40000 };

/* ---- the bound that a set of duals proves ----
 *
 * For any numbers d: a partition's cost = sum d_e + sum over its clusters of (tokens - sum of their d), and a class has so many
 * ranks, each with a cluster worth at least the least of all (or none, at 0, where slots are to spare). The d are cut to
 * multiples of 1 / 65536 first, so that every sum is exact in 64 bits. */

static const double SCALE = 65536;

static void scale_duals(const clusters *c, const double *duals, int64_t *scaled)
{
    double most = 4.0 * (double)c->n_tokens + 1; /* nobody gains from more, and nothing overflows */
    for (int e = 0; e < c->n_experts; e++)
        scaled[e] = llrint(fmin(fmax(duals[e], -most), most) * SCALE);
}

static int64_t least_of_class(const clusters *c, int class, const int64_t *scaled)
{
    int64_t least = c->full ? INT64_MAX : 0;
    for (int i = 0; i < c->n; i++) {
        if (!clusters_fits(c, class, c->size[i], c->rows[i]))
            continue;
        const uint16_t *members = clusters_members(c, i);
        int64_t value = (int64_t)c->tokens[i] * (int64_t)SCALE;
        for (int m = 0; m < c->size[i]; m++)
            value -= scaled[members[m]];
        least = value < least ? value : least;
    }
    return least == INT64_MAX ? 0 : least; /* no such cluster: no partition, and any bound holds */
}

int64_t clusters_bound(const clusters *c, const double *duals)
{
    int64_t *scaled = malloc((size_t)c->n_experts * sizeof *scaled), sum = 0;
    if (!scaled)
        return 0;
    scale_duals(c, duals, scaled);
    for (int e = 0; e < c->n_experts; e++)
        sum += scaled[e];
    for (int q = 0; q < c->n_classes; q++)
        sum += c->classes[q].n_ranks * least_of_class(c, q, scaled);
    free(scaled);
    int64_t whole = sum / (int64_t)SCALE; /* the cost is a whole number: round up */
    if (sum > 0 && sum % (int64_t)SCALE)
        whole++;
    return whole > 0 ? whole : 0;
}

/* ---- pricing ---- */

typedef struct {
    double cost; /* reduced */
    int cluster, class;
} offer;

/* The PER_ROUND best offers so far, worst first (a heap). */
typedef struct {
    int n;
    offer at[PER_ROUND];
} offers;

static bool worse(const offer *a, const offer *b)
{
    if (a->cost != b->cost)
        return a->cost > b->cost;
    return a->cluster != b->cluster ? a->cluster > b->cluster : a->class > b->class;
}

static void sift(offers *o, int at)
{
    for (;;) {
        int child = 2 * at + 1;
        if (child + 1 < o->n && worse(&o->at[child + 1], &o->at[child]))
            child++;
        if (child >= o->n || !worse(&o->at[child], &o->at[at]))
            return;
        offer kept = o->at[at];
        o->at[at] = o->at[child];
        o->at[child] = kept;
        at = child;
    }
}

static void take_offer(offers *o, offer new)
{
    if (o->n < PER_ROUND) {
        o->at[o->n++] = new;
        if (o->n == PER_ROUND)
            for (int i = PER_ROUND / 2 - 1; i >= 0; i--)
                sift(o, i);
    } else if (worse(&o->at[0], &new)) {
        o->at[0] = new;
        sift(o, 0);
    }
}

static void add_cluster(const clusters *c, const offer *o, lp_columns *found)
{
    int rows[CLUSTERS_WIDEST + 1];
    double ones[CLUSTERS_WIDEST + 1];
    int n = c->size[o->cluster];
    for (int m = 0; m < n; m++)
        rows[m] = clusters_members(c, o->cluster)[m];
    rows[n] = c->n_experts + o->class;
    for (int m = 0; m <= n; m++)
        ones[m] = 1;
    lp_columns_add(found, c->tokens[o->cluster], n + 1, rows, ones);
}

static double price(const void *arg, const double *duals, lp_columns *found)
{
    const clusters *c = arg;
    offers o = {0};
    for (int i = 0; i < c->n; i++) {
        const uint16_t *members = clusters_members(c, i);
        double value = c->tokens[i];
        for (int m = 0; m < c->size[i]; m++)
            value -= duals[members[m]];
        for (int q = 0; q < c->n_classes; q++) {
            double cost = value - duals[c->n_experts + q];
            if (cost < -1e-6 * (1 + c->tokens[i]) && clusters_fits(c, q, c->size[i], c->rows[i]))
                take_offer(&o, (offer){cost, i, q});
        }
    }
    for (int i = 0; i < o.n; i++)
        add_cluster(c, &o.at[i], found);
    return (double)clusters_bound(c, duals);
}

/* ---- the master ---- */

static status make_master(const clusters *c, const int *home, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    for (int e = 0; e < c->n_experts; e++)
        lp_add_row(m, 1, 1);
    for (int q = 0; q < c->n_classes; q++)
        lp_add_row(m, c->full ? c->classes[q].n_ranks : 0, c->classes[q].n_ranks);
    for (int g = 0; g < c->n_ranks; g++) {
        int experts[CLUSTERS_WIDEST], n = 0;
        for (int e = 0; e < c->n_experts; e++)
            if (home[e] == g && n < CLUSTERS_WIDEST)
                experts[n++] = e;
        if (n == 0)
            continue;
        int column = lp_add_column(m, 0, LP_INF, (double)clusters_tokens(c, experts, n), false);
        for (int i = 0; i < n; i++)
            lp_set(m, experts[i], column, 1);
        lp_set(m, c->n_experts + c->class_of_rank[g], column, 1);
    }
    *out = m;
    return STATUS_OK;
}

static status take_result(const clusters *c, const lp_result *r, cluster_relaxation *out)
{
    *out = (cluster_relaxation){.pivots = r->pivots, .value = r->objective, .solved = r->outcome == LP_OPTIMAL};
    out->duals = calloc((size_t)c->n_experts, sizeof *out->duals);
    if (!out->duals)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", c->n_experts);
    if (r->duals)
        memcpy(out->duals, r->duals, (size_t)c->n_experts * sizeof *out->duals);
    out->bound = clusters_bound(c, out->duals);
    return STATUS_OK;
}

status clusters_relax(int n, clusters *const *layers, const int *const *homes, double seconds, int64_t pivots, int processes,
                      cluster_relaxation *out)
{
    size_t count = (size_t)n;
    lp_model **masters = calloc(count + 1, sizeof *masters);
    lp_pricing *pricing = calloc(count + 1, sizeof *pricing);
    lp_options *options = calloc(count + 1, sizeof *options);
    lp_result *results = calloc(count + 1, sizeof *results);
    status st = STATUS_OK;
    memset(out, 0, count * sizeof *out);
    if (!masters || !pricing || !options || !results)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d linear programmes", n), out);
    for (int i = 0; i < n; i++) {
        TRY_GOTO(make_master(layers[i], homes[i], &masters[i]), out);
        pricing[i] = (lp_pricing){price, layers[i], PER_ROUND, CLUSTERS_WIDEST + 1, MOST_GENERATED};
        options[i] = (lp_options){.seconds = seconds, .pivots = pivots, .duals = true};
    }
    TRY_GOTO(lp_solve_columns(n, masters, pricing, options, processes, results), out);
    for (int i = 0; i < n && st == STATUS_OK; i++)
        st = take_result(layers[i], &results[i], &out[i]);
out:
    for (int i = 0; i < n; i++) {
        if (results)
            lp_result_clear(&results[i]);
        if (masters)
            lp_destroy(masters[i]);
        if (st != STATUS_OK)
            cluster_relaxation_clear(&out[i]);
    }
    free(masters);
    free(pricing);
    free(options);
    free(results);
    return st;
}

void cluster_relaxation_clear(cluster_relaxation *r)
{
    free(r->duals);
    *r = (cluster_relaxation){0};
}
