#include "placement/planner/company_bound.h"
#include "proto/clock.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { AVERAGE_EVERY = 8 };
static const double PACE = 6; /* of the weights; tried on the gpt-oss trace */

typedef struct {
    const company_task *t;
    double *weight;   /* [n_experts + 1][n_steps] the last is the floor's */
    double *average;  /* the same, mean of all rounds so far */
    double *exponent; /* the same: weights are proportional to exp of it */
    double *pairs;    /* [n_experts][n_experts] D */
    bool *beside;     /* [n_experts][n_experts] whether f is among e's cheapest company */
    double *busy;     /* [n_steps] scratch */
    double *sorted;   /* [n_experts] scratch */
} game;

static void game_end(game *g)
{
    free(g->weight);
    free(g->average);
    free(g->exponent);
    free(g->pairs);
    free(g->beside);
    free(g->busy);
    free(g->sorted);
}

static status game_start(const company_task *t, game *g)
{
    size_t cells = (size_t)(t->n_experts + 1) * (size_t)t->n_steps, n = (size_t)t->n_experts;
    *g = (game){.t = t};
    g->weight = calloc(cells, sizeof *g->weight);
    g->average = calloc(cells, sizeof *g->average);
    g->exponent = calloc(cells, sizeof *g->exponent);
    g->pairs = calloc(n * n, sizeof *g->pairs);
    g->beside = calloc(n * n, sizeof *g->beside);
    g->busy = calloc((size_t)t->n_steps, sizeof *g->busy);
    g->sorted = calloc(n, sizeof *g->sorted);
    if (g->weight && g->average && g->exponent && g->pairs && g->beside && g->busy && g->sorted)
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "no memory to bound %d steps of %d experts", t->n_steps, t->n_experts);
}

static const double *row(const game *g, const double *of, int expert)
{
    return of + (size_t)expert * (size_t)g->t->n_steps;
}

/* Sums in four lanes, always joined alike. */
static double product(int n, const double *a, const double *b)
{
    double lanes[4] = {0};
    int s = 0;
    for (; s + 4 <= n; s += 4)
        for (int k = 0; k < 4; k++)
            lanes[k] += a[s + k] * b[s + k];
    for (; s < n; s++)
        lanes[0] += a[s] * b[s];
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

static int rising(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Marks e's cheapest company and returns what it costs. */
static double choose_company(game *g, int e)
{
    int n = g->t->n_experts, m = g->t->company, left = m, others = 0;
    const double *d = g->pairs + (size_t)e * (size_t)n;
    bool *beside = g->beside + (size_t)e * (size_t)n;
    double sum = 0;
    memset(beside, 0, (size_t)n * sizeof *beside);
    if (m < 1)
        return 0;
    for (int f = 0; f < n; f++)
        if (f != e)
            g->sorted[others++] = d[f];
    qsort(g->sorted, (size_t)others, sizeof *g->sorted, rising);
    double limit = g->sorted[m - 1];
    for (int pass = 0; pass < 2; pass++) /* what is cheaper than the dearest taken, then ties */
        for (int f = 0; f < n && left > 0; f++)
            if (f != e && !beside[f] && (pass ? d[f] == limit : d[f] < limit)) {
                beside[f] = true;
                sum += d[f];
                left--;
            }
    return sum;
}

/* The bound that weights give, and the company that answers them best. */
static double answer(game *g, const double *weight)
{
    const company_task *t = g->t;
    int n = t->n_experts;
    double sum = product(t->n_steps, row(g, weight, n), t->floor), company = 0;
    for (int e = 0; e < n; e++)
        sum += product(t->n_steps, row(g, weight, e), row(g, t->cost, e));
    for (int e = 0; e < n; e++)
        for (int f = e + 1; f < n; f++) {
            double d = product(t->n_steps, row(g, weight, e), row(g, t->cost, f)) +
                       product(t->n_steps, row(g, weight, f), row(g, t->cost, e));
            g->pairs[(size_t)e * (size_t)n + (size_t)f] = g->pairs[(size_t)f * (size_t)n + (size_t)e] = d;
        }
    for (int e = 0; e < n; e++)
        company += choose_company(g, e);
    return sum + company / 2;
}

static void set_weights(game *g, int round)
{
    const company_task *t = g->t;
    int n = t->n_experts;
    for (int s = 0; s < t->n_steps; s++) {
        double most = -INFINITY, sum = 0;
        for (int e = 0; e <= n; e++) {
            double x = g->exponent[(size_t)e * (size_t)t->n_steps + (size_t)s];
            most = x > most ? x : most;
        }
        for (int e = 0; e <= n; e++) {
            size_t at = (size_t)e * (size_t)t->n_steps + (size_t)s;
            sum += g->weight[at] = exp(g->exponent[at] - most);
        }
        for (int e = 0; e <= n; e++) {
            size_t at = (size_t)e * (size_t)t->n_steps + (size_t)s;
            g->weight[at] /= sum;
            g->average[at] += (g->weight[at] - g->average[at]) / (round + 1);
        }
    }
}

/* Every expert's exponent grows with how busy its rank is under the company chosen. */
static void move_weights(game *g, int round, double scale)
{
    const company_task *t = g->t;
    int n = t->n_experts;
    double pace = PACE / sqrt(round + 1.0) / scale;
    for (int e = 0; e <= n; e++) {
        double *exponent = g->exponent + (size_t)e * (size_t)t->n_steps;
        memcpy(g->busy, e < n ? row(g, t->cost, e) : t->floor, (size_t)t->n_steps * sizeof *g->busy);
        for (int f = 0; f < n && e < n; f++) {
            double y = (g->beside[(size_t)e * (size_t)n + (size_t)f] + g->beside[(size_t)f * (size_t)n + (size_t)e]) / 2.0;
            const double *cost = row(g, t->cost, f);
            for (int s = 0; y > 0 && s < t->n_steps; s++)
                g->busy[s] += y * cost[s];
        }
        for (int s = 0; s < t->n_steps; s++)
            exponent[s] += pace * g->busy[s];
    }
}

static double play(game *g, double floors)
{
    const company_task *t = g->t;
    double best = floors, scale = floors > 0 ? floors / t->n_steps : 1;
    for (int round = 0; round < t->rounds; round++) {
        if (t->deadline > 0 && clock_seconds() >= t->deadline)
            break;
        set_weights(g, round);
        if (round % AVERAGE_EVERY == AVERAGE_EVERY - 1 || round == t->rounds - 1)
            best = fmax(best, answer(g, g->average));
        best = fmax(best, answer(g, g->weight));
        move_weights(g, round, scale);
    }
    return best;
}

status company_bound(const company_task *t, double *out)
{
    game g;
    double floors = 0;
    for (int s = 0; s < t->n_steps; s++)
        floors += t->floor[s];
    status st = game_start(t, &g);
    if (st == STATUS_OK)
        *out = play(&g, floors) * (1 - 1e-9);
    game_end(&g);
    return st;
}
