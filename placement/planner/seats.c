#include "placement/planner/seats.h"
#include "placement/planner/matching.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const problem *p;
    int n;            /* ranks */
    double *together; /* [n][n] tokens that meet both clusters, in this layer */
    double *profile;  /* [n_sequences][n] share of each rank in a sequence's rows beyond its share of all, layers seated so far */
    double *shares;   /* [n_sequences][n] the same of this layer's clusters */
    double *benefit;  /* [n][n] */
    int *seat;        /* [n] of cluster */
} seating;

static bool alike(const problem *p, int layer, int g, int h)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    const double *cap = p->cap + (size_t)layer * (size_t)p->n_ranks;
    return slots[g] == slots[h] && cap[g] == cap[h];
}

/* ---- one layer's counts ---- */

static void count_layer(seating *s, int layer, const int *home)
{
    const traffic *t = s->p->traffic;
    size_t n = (size_t)s->n;
    memset(s->together, 0, n * n * sizeof *s->together);
    memset(s->shares, 0, (size_t)t->n_sequences * n * sizeof *s->shares);
    for (int q = 0; q < t->n_sequences; q++) {
        double *shares = s->shares + (size_t)q * n;
        for (int64_t token = t->first_token[q]; token < t->first_token[q + 1]; token++) {
            const uint16_t *experts = traffic_experts(t, layer, token);
            for (int i = 0; i < t->shape.top_k; i++) {
                if (experts[i] == ROUTING_NO_EXPERT)
                    continue;
                int g = home[experts[i]];
                shares[g] += 1;
                for (int j = 0; j < i; j++)
                    if (experts[j] != ROUTING_NO_EXPERT && home[experts[j]] != g) {
                        s->together[(size_t)g * n + (size_t)home[experts[j]]] += 1;
                        s->together[(size_t)home[experts[j]] * n + (size_t)g] += 1;
                    }
            }
        }
    }
}

/* Rows become how much more of a sequence goes to a cluster than of all traffic. */
static void centre_shares(seating *s)
{
    size_t n = (size_t)s->n;
    int sequences = s->p->traffic->n_sequences;
    double all = 0;
    double *sums = s->benefit; /* borrowed: overwritten next */
    memset(sums, 0, n * sizeof *sums);
    for (size_t i = 0; i < (size_t)sequences * n; i++) {
        sums[i % n] += s->shares[i];
        all += s->shares[i];
    }
    for (int q = 0; q < sequences; q++) {
        double *shares = s->shares + (size_t)q * n, rows = 0;
        for (size_t g = 0; g < n; g++)
            rows += shares[g];
        for (size_t g = 0; all > 0 && g < n; g++)
            shares[g] -= rows * sums[g] / all;
    }
}

/* ---- nodes ---- */

/* Meetings of cluster c with those on a node, but for d. */
static double met_on_node(const seating *s, int c, int at_node, int d)
{
    const int *node = s->p->topology->node_of_rank;
    double sum = 0;
    for (int x = 0; x < s->n; x++)
        if (x != c && x != d && node[s->seat[x]] == at_node)
            sum += s->together[c * s->n + x];
    return sum;
}

static double swap_gain(const seating *s, int c, int d)
{
    const int *node = s->p->topology->node_of_rank;
    int at_c = node[s->seat[c]], at_d = node[s->seat[d]];
    if (at_c == at_d)
        return 0;
    return met_on_node(s, c, at_d, d) + met_on_node(s, d, at_c, c) - met_on_node(s, c, at_c, d) - met_on_node(s, d, at_d, c);
}

static void swap_seats(seating *s, int c, int d)
{
    int kept = s->seat[c];
    s->seat[c] = s->seat[d];
    s->seat[d] = kept;
}

/* Swaps of clusters between nodes while tokens meet more of their clusters on one node. */
static void gather_on_nodes(seating *s, int layer)
{
    if (s->p->topology->n_nodes == 1)
        return;
    for (bool better = true; better;) {
        better = false;
        for (int c = 0; c < s->n; c++)
            for (int d = 0; d < c; d++)
                if (alike(s->p, layer, s->seat[c], s->seat[d]) && swap_gain(s, c, d) > 0.5) { /* meetings are whole numbers */
                    swap_seats(s, c, d);
                    better = true;
                }
    }
}

/* ---- affinity ---- */

/* benefit[c][g]: rows of cluster c that sequences leaning to rank g ask for; a rank on the same node counts half. */
static void weigh(seating *s)
{
    size_t n = (size_t)s->n;
    memset(s->benefit, 0, n * n * sizeof *s->benefit);
    for (int q = 0; q < s->p->traffic->n_sequences; q++)
        for (size_t c = 0; c < n; c++)
            for (size_t g = 0; g < n; g++)
                s->benefit[c * n + g] += s->shares[(size_t)q * n + c] * s->profile[(size_t)q * n + g];
}

static double affinity(const seating *s, int cluster, int rank)
{
    const int *node = s->p->topology->node_of_rank;
    double sum = s->benefit[cluster * s->n + rank];
    for (int g = 0; g < s->n; g++)
        if (g != rank && node[g] == node[rank])
            sum += 0.5 * s->benefit[cluster * s->n + g];
    return sum;
}

/* Pairs of nodes may change all their clusters with each other, ranks of a node among themselves: what shares a node stays
 * together. */
static void swap_nodes(seating *s, int layer, int a, int b)
{
    const int *node = s->p->topology->node_of_rank;
    int *seated = malloc(2 * (size_t)s->n * sizeof *seated), *with = seated + s->n, n_a = 0, n_b = 0;
    if (!seated)
        return;
    for (int c = 0; c < s->n; c++)
        if (node[s->seat[c]] == a)
            seated[n_a++] = c;
        else if (node[s->seat[c]] == b)
            with[n_b++] = c;
    bool fits = n_a == n_b;
    double now = 0, then = 0;
    for (int i = 0; i < n_a && fits; i++) {
        int g = s->seat[seated[i]], h = s->seat[with[i]];
        fits = alike(s->p, layer, g, h);
        now += affinity(s, seated[i], g) + affinity(s, with[i], h);
        then += affinity(s, seated[i], h) + affinity(s, with[i], g);
    }
    if (fits && then > now)
        for (int i = 0; i < n_a; i++)
            swap_seats(s, seated[i], with[i]);
    free(seated);
}

static status match_within_nodes(seating *s, int layer)
{
    const int *node = s->p->topology->node_of_rank;
    size_t n = (size_t)s->n;
    double *cost = malloc(n * n * sizeof *cost);
    int *rank = malloc(n * sizeof *rank);
    bool ok = cost && rank;
    double most = 0;
    for (size_t i = 0; i < n * n; i++)
        most = fmax(most, fabs(s->benefit[i]));
    for (int c = 0; ok && c < s->n; c++)
        for (int g = 0; g < s->n; g++) {
            bool may = node[g] == node[s->seat[c]] && alike(s->p, layer, g, s->seat[c]);
            cost[c * s->n + g] = may ? -s->benefit[c * s->n + g] : 4 * ((double)s->n + 1) * (most + 1);
        }
    ok = ok && matching_solve(s->n, cost, rank);
    if (ok)
        memcpy(s->seat, rank, n * sizeof *rank);
    free(cost);
    free(rank);
    return ok ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to match %d ranks", s->n);
}

static void remember(seating *s)
{
    size_t n = (size_t)s->n;
    for (int q = 0; q < s->p->traffic->n_sequences; q++)
        for (size_t c = 0; c < n; c++)
            s->profile[(size_t)q * n + (size_t)s->seat[c]] += s->shares[(size_t)q * n + c];
}

static status seat_layer(seating *s, int layer, int *home)
{
    count_layer(s, layer, home);
    centre_shares(s);
    for (int c = 0; c < s->n; c++)
        s->seat[c] = c;
    gather_on_nodes(s, layer);
    weigh(s);
    for (int a = 0; a < s->p->topology->n_nodes; a++)
        for (int b = 0; b < a; b++)
            swap_nodes(s, layer, a, b);
    TRY(match_within_nodes(s, layer));
    for (int e = 0; e < s->p->n_experts; e++)
        home[e] = s->seat[home[e]];
    remember(s);
    return STATUS_OK;
}

status seats_assign(const problem *p, int *home)
{
    size_t n = (size_t)p->n_ranks, profile = (size_t)p->traffic->n_sequences * n;
    seating s = {p,
                 p->n_ranks,
                 calloc(n * n, sizeof(double)),
                 calloc(profile, sizeof(double)),
                 calloc(profile, sizeof(double)),
                 calloc(n * n, sizeof(double)),
                 calloc(n, sizeof(int))};
    status st = STATUS_OK;
    if (!s.together || !s.profile || !s.shares || !s.benefit || !s.seat)
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d sequences on %d ranks", p->traffic->n_sequences, p->n_ranks);
    for (int l = 0; l < p->n_layers && st == STATUS_OK; l++)
        st = seat_layer(&s, l, home + problem_at(p, l, 0));
    free(s.together);
    free(s.profile);
    free(s.shares);
    free(s.benefit);
    free(s.seat);
    return st;
}
