/* Cuts a layer into clusters that few tokens meet. */
#include "placement/planner/clusters_search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- descent ---- */

typedef struct {
    const clusters *c;
    int *home;    /* [n_experts] */
    int *size;    /* [n_ranks] */
    double *rows; /* [n_ranks] */
    int64_t *cost;
    int *members; /* [n_ranks][width] rising */
} cut;

static void collect(const cut *k, int rank, int without, int with, int *experts, int *n)
{
    const int *members = k->members + (size_t)rank * (size_t)k->c->width;
    int at = 0;
    for (int i = 0; i < k->size[rank]; i++) {
        if (with >= 0 && with < members[i]) {
            experts[at++] = with;
            with = -1;
        }
        if (members[i] != without)
            experts[at++] = members[i];
    }
    if (with >= 0)
        experts[at++] = with;
    *n = at;
}

static int64_t cost_with(const cut *k, int rank, int without, int with)
{
    int experts[CLUSTERS_WIDEST + 1], n;
    collect(k, rank, without, with, experts, &n);
    return clusters_tokens(k->c, experts, n);
}

static void change(cut *k, int rank, int without, int with)
{
    int experts[CLUSTERS_WIDEST + 1], n;
    collect(k, rank, without, with, experts, &n);
    memcpy(k->members + (size_t)rank * (size_t)k->c->width, experts, (size_t)n * sizeof *experts);
    k->size[rank] = n;
    k->cost[rank] = clusters_tokens(k->c, experts, n);
    k->rows[rank] = 0;
    for (int i = 0; i < n; i++)
        k->rows[rank] += k->c->load[experts[i]];
    if (with >= 0)
        k->home[with] = rank;
}

/* An empty rank is fine wherever slots are to spare. */
static bool allowed(const cut *k, int rank, int size, double rows)
{
    return clusters_fits(k->c, k->c->class_of_rank[rank], size, rows);
}

static bool swap_allowed(const cut *k, int a, int b)
{
    int g = k->home[a], h = k->home[b];
    double more = k->c->load[b] - k->c->load[a];
    return g != h && allowed(k, g, k->size[g], k->rows[g] + more) && allowed(k, h, k->size[h], k->rows[h] - more);
}

static void swap(cut *k, int a, int b)
{
    int g = k->home[a], h = k->home[b];
    change(k, g, a, b);
    change(k, h, b, a);
}

static bool try_swap(cut *k, int a, int b)
{
    int g = k->home[a], h = k->home[b];
    if (!swap_allowed(k, a, b))
        return false;
    if (cost_with(k, g, a, b) + cost_with(k, h, b, a) >= k->cost[g] + k->cost[h])
        return false;
    swap(k, a, b);
    return true;
}

static bool try_move(cut *k, int e, int to)
{
    int from = k->home[e];
    if (from == to || k->size[to] >= k->c->width || k->size[from] == 0 ||
        !allowed(k, from, k->size[from] - 1, k->rows[from] - k->c->load[e]) ||
        !allowed(k, to, k->size[to] + 1, k->rows[to] + k->c->load[e]))
        return false;
    if (cost_with(k, from, e, -1) + cost_with(k, to, -1, e) >= k->cost[from] + k->cost[to])
        return false;
    change(k, from, e, -1);
    change(k, to, -1, e);
    return true;
}

static bool descend_once(cut *k, work_budget *work)
{
    bool better = false;
    int n = k->c->n_experts;
    for (int a = 0; a < n; a++) {
        if (!work_take(work, n))
            return false;
        for (int b = a + 1; b < n; b++)
            better |= try_swap(k, a, b);
        for (int g = 0; g < k->c->n_ranks && !k->c->full; g++)
            better |= try_move(k, a, g);
    }
    return better;
}

static int64_t total(const cut *k)
{
    int64_t sum = 0;
    for (int g = 0; g < k->c->n_ranks; g++)
        sum += k->cost[g];
    return sum;
}

static void fill(cut *k, const int *home)
{
    memcpy(k->home, home, (size_t)k->c->n_experts * sizeof *home);
    memset(k->size, 0, (size_t)k->c->n_ranks * sizeof *k->size);
    for (int e = 0; e < k->c->n_experts; e++)
        k->members[(size_t)home[e] * (size_t)k->c->width + (size_t)k->size[home[e]]++] = e;
    for (int g = 0; g < k->c->n_ranks; g++)
        change(k, g, -1, -1);
}

static void kick(cut *k, random_stream *random)
{
    int n = k->c->n_experts, swaps = 2 + random_below(random, 3);
    for (int i = 0, tries = 0; i < swaps && tries < 40; tries++) {
        int a = random_below(random, n), b = random_below(random, n);
        if (!swap_allowed(k, a, b))
            continue;
        swap(k, a, b);
        i++;
    }
}

static bool cut_create(const clusters *c, cut *k)
{
    size_t ranks = (size_t)c->n_ranks;
    *k = (cut){.c = c,
               .home = malloc((size_t)c->n_experts * sizeof *k->home),
               .size = calloc(ranks, sizeof *k->size),
               .rows = calloc(ranks, sizeof *k->rows),
               .cost = calloc(ranks, sizeof *k->cost),
               .members = calloc(ranks * (size_t)c->width, sizeof *k->members)};
    return k->home && k->size && k->rows && k->cost && k->members;
}

static void cut_clear(cut *k)
{
    free(k->home);
    free(k->size);
    free(k->rows);
    free(k->cost);
    free(k->members);
}

int64_t clusters_descend(const clusters *c, random_stream *random, work_budget *work, int *home)
{
    cut k;
    int64_t best = clusters_cost(c, home);
    if (cut_create(c, &k)) {
        for (fill(&k, home); work->left > 0 && !work->out_of_time; kick(&k, random)) {
            while (descend_once(&k, work))
                ;
            int64_t cost = total(&k);
            if (cost <= best) {
                best = cost;
                memcpy(home, k.home, (size_t)c->n_experts * sizeof *home);
            } else {
                fill(&k, home);
            }
            if (work->left < c->n_experts)
                break;
        }
    }
    cut_clear(&k);
    return best;
}

int64_t clusters_cost(const clusters *c, const int *home)
{
    int64_t sum = 0;
    for (int g = 0; g < c->n_ranks; g++) {
        int experts[CLUSTERS_WIDEST], n = 0;
        for (int e = 0; e < c->n_experts; e++)
            if (home[e] == g && n < CLUSTERS_WIDEST)
                experts[n++] = e;
        sum += clusters_tokens(c, experts, n);
    }
    return sum;
}

/* ---- the choice among good clusters ---- */

typedef struct {
    double reduced;
    int cluster, class;
} candidate;

static int compare_candidates(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    if (x->reduced != y->reduced)
        return x->reduced < y->reduced ? -1 : 1;
    return x->cluster != y->cluster ? x->cluster - y->cluster : x->class - y->class;
}

static double reduced_of(const clusters *c, const double *duals, int cluster)
{
    const uint16_t *members = clusters_members(c, cluster);
    double value = c->tokens[cluster];
    for (int m = 0; m < c->size[cluster]; m++)
        value -= duals[members[m]];
    return value;
}

static bool is_homes_own(const clusters *c, const int *home, int cluster, int class)
{
    const uint16_t *members = clusters_members(c, cluster);
    int rank = home[members[0]], n = 0;
    for (int m = 1; m < c->size[cluster]; m++)
        if (home[members[m]] != rank)
            return false;
    for (int e = 0; e < c->n_experts; e++)
        n += home[e] == rank;
    return n == c->size[cluster] && c->class_of_rank[rank] == class;
}

/* Each class's least value: what a rank of it costs beside the duals of its members. */
static void find_least(const clusters *c, const double *duals, double *least)
{
    for (int q = 0; q < c->n_classes; q++)
        least[q] = c->full ? INFINITY : 0;
    for (int i = 0; i < c->n; i++) {
        double value = reduced_of(c, duals, i);
        for (int q = 0; q < c->n_classes; q++)
            if (value < least[q] && clusters_fits(c, q, c->size[i], c->rows[i]))
                least[q] = value;
    }
}

static int find_candidates(const clusters *c, const double *duals, const double *least, double room, const int *home,
                           candidate *out)
{
    int n = 0;
    for (int i = 0; i < c->n; i++) {
        double value = reduced_of(c, duals, i);
        for (int q = 0; q < c->n_classes; q++) {
            if (!clusters_fits(c, q, c->size[i], c->rows[i]))
                continue;
            bool own = is_homes_own(c, home, i, q);
            if (!own && value - least[q] > room)
                continue;
            if (out)
                out[n] = (candidate){own ? -1 : value - least[q], i, q}; /* home's own come first: never cut off */
            n++;
        }
    }
    return n;
}

static status make_model(const clusters *c, const candidate *found, const int *home, cluster_choice *out)
{
    TRY(lp_create(&out->model));
    for (int e = 0; e < c->n_experts; e++)
        lp_add_row(out->model, 1, 1);
    for (int q = 0; q < c->n_classes; q++)
        lp_add_row(out->model, c->full ? c->classes[q].n_ranks : 0, c->classes[q].n_ranks);
    for (int i = 0; i < out->n; i++) {
        int cluster = found[i].cluster;
        out->cluster[i] = cluster;
        out->class[i] = found[i].class;
        out->start[i] = is_homes_own(c, home, cluster, found[i].class);
        int column = lp_add_column(out->model, 0, 1, c->tokens[cluster], true);
        for (int m = 0; m < c->size[cluster]; m++)
            lp_set(out->model, clusters_members(c, cluster)[m], column, 1);
        lp_set(out->model, c->n_experts + found[i].class, column, 1);
    }
    return STATUS_OK;
}

status clusters_choice_create(const clusters *c, const cluster_relaxation *relaxation, const int *home, int most,
                              cluster_choice *out)
{
    double *least = calloc((size_t)c->n_classes, sizeof *least);
    double room = (double)(clusters_cost(c, home) - 1 - relaxation->bound) + 1e-3;
    candidate *found = NULL;
    status st = STATUS_OK;
    *out = (cluster_choice){.complete = true};
    if (!least)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d classes of ranks", c->n_classes), out);
    if (room < 0)
        goto out;
    find_least(c, relaxation->duals, least);
    int n = find_candidates(c, relaxation->duals, least, room + 1, home, NULL);
    out->n = n < most ? n : most;
    out->complete = n <= most;
    found = malloc(((size_t)n + 1) * sizeof *found);
    out->cluster = malloc(((size_t)n + 1) * sizeof *out->cluster);
    out->class = malloc(((size_t)n + 1) * sizeof *out->class);
    out->start = malloc(((size_t)n + 1) * sizeof *out->start);
    if (!found || !out->cluster || !out->class || !out->start)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d clusters", n), out);
    find_candidates(c, relaxation->duals, least, room + 1, home, found);
    qsort(found, (size_t)n, sizeof *found, compare_candidates);
    st = make_model(c, found, home, out);
out:
    free(least);
    free(found);
    if (st != STATUS_OK)
        clusters_choice_clear(out);
    return st;
}

void clusters_choice_take(const clusters *c, const cluster_choice *choice, const double *x, int *home)
{
    bool *used = calloc((size_t)c->n_ranks, sizeof *used);
    for (int i = 0; used && i < choice->n; i++) {
        if (x[i] < 0.5)
            continue;
        int rank = 0;
        while (used[rank] || c->class_of_rank[rank] != choice->class[i])
            rank++;
        used[rank] = true;
        for (int m = 0; m < c->size[choice->cluster[i]]; m++)
            home[clusters_members(c, choice->cluster[i])[m]] = rank;
    }
    free(used);
}

void clusters_choice_clear(cluster_choice *choice)
{
    lp_destroy(choice->model);
    free(choice->cluster);
    free(choice->class);
    free(choice->start);
    *choice = (cluster_choice){0};
}
