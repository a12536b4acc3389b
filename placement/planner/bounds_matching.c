/* bounds_matching.c - how much R-flow can stay on ranks and nodes at most, layer pair by layer pair: b-matching.
 *
 * An expert shares its rank with at most as many experts of the next layer as the largest rank has slots there, and so do they
 * with it; the heaviest set of pairs that keeps both limits is a transportation problem, and what it leaves must travel: over the
 * shortest link between two ranks, and, past what nodes can keep by the same reasoning, over the shortest link between two nodes.
 *
 * Prices u, v >= 0 of the experts' limits prove kept <= sum s u + sum s' v + sum max(0, R - u - v), whatever they are. GLPK finds
 * the best ones; where its time runs out, prices set in turn (each the best given the others) do. Bounds homes, so replicas do
 * not matter; plans that trade slots between layers are not covered. */
#include "placement/planner/bounds.h"
#include "placement/planner/flow_cost.h"
#include "placement/planner/lp.h"
#include "proto/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 8, ROUNDS = 12 };

typedef struct {
    int n;               /* experts */
    const double *pairs; /* [n][n] */
    int from, to;        /* experts of the first and the second layer that a place holds at most */
    double *u, *v;       /* [n] prices */
    double kept;         /* proved */
} matching_task;

static double prove(const matching_task *m, const double *u, const double *v)
{
    size_t n = (size_t)m->n;
    double sum = 0, all = 0;
    for (size_t e = 0; e < n; e++)
        sum += m->to * u[e] + m->from * v[e];
    for (size_t e = 0; e < n; e++)
        for (size_t f = 0; f < n; f++) {
            double over = m->pairs[e * n + f] - u[e] - v[f];
            sum += over > 0 ? over : 0;
            all += m->pairs[e * n + f];
        }
    return fmin(sum * (1 + 1e-12), all);
}

/* Moves the `at` largest to the front, the smallest of them last (Hoare's selection). */
static void select_largest(double *x, int n, int at)
{
    for (int low = 0, high = n - 1; low < high;) {
        double pivot = x[(low + high) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                double kept = x[i];
                x[i++] = x[j];
                x[j--] = kept;
            }
        }
        if (at - 1 <= j)
            high = j;
        else if (at - 1 >= i)
            low = i;
        else
            return;
    }
}

/* The best price of one limit: halfway between the last pair that it lets through and the first that it does not. */
static double price_of(double *left, int n, int limit)
{
    if (limit >= n)
        return 0;
    double next = 0;
    select_largest(left, n, limit);
    for (int i = limit; i < n; i++)
        next = fmax(next, left[i]);
    return (fmax(left[limit - 1], 0) + next) / 2;
}

/* All prices in turn; the best proof is kept. left: [n] scratch. */
static void set_prices(matching_task *m, double deadline, double *left)
{
    size_t n = (size_t)m->n;
    memset(m->u, 0, n * sizeof *m->u);
    memset(m->v, 0, n * sizeof *m->v);
    m->kept = prove(m, m->u, m->v);
    for (int round = 0; round < ROUNDS && (deadline == 0 || clock_seconds() < deadline); round++) {
        for (size_t e = 0; e < n; e++) {
            for (size_t f = 0; f < n; f++)
                left[f] = m->pairs[e * n + f] - m->v[f];
            m->u[e] = price_of(left, m->n, m->to);
        }
        for (size_t f = 0; f < n; f++) {
            for (size_t e = 0; e < n; e++)
                left[e] = m->pairs[e * n + f] - m->u[e];
            m->v[f] = price_of(left, m->n, m->from);
        }
        double kept = prove(m, m->u, m->v);
        if (kept > m->kept * (1 - 1e-6) && round > 3)
            return;
        m->kept = fmin(m->kept, kept);
    }
}

/* The transportation problem itself, its limits as rows. */
static status make_model(const matching_task *m, lp_model **out)
{
    lp_model *lp;
    TRY(lp_create(&lp));
    for (int e = 0; e < m->n; e++)
        lp_add_row(lp, -LP_INF, m->to);
    for (int f = 0; f < m->n; f++)
        lp_add_row(lp, -LP_INF, m->from);
    for (int e = 0; e < m->n; e++)
        for (int f = 0; f < m->n; f++) {
            double flow = m->pairs[(size_t)e * (size_t)m->n + (size_t)f];
            if (flow <= 0)
                continue;
            int column = lp_add_column(lp, 0, 1, -flow, false);
            lp_set(lp, e, column, 1);
            lp_set(lp, m->n + f, column, 1);
        }
    *out = lp;
    return STATUS_OK;
}

static void take_duals(matching_task *m, const double *duals)
{
    for (int e = 0; e < m->n; e++) {
        m->u[e] = fmax(0, -duals[e]);
        m->v[e] = fmax(0, -duals[m->n + e]);
    }
    m->kept = fmin(m->kept, prove(m, m->u, m->v));
}

static status solve_tasks(matching_task *tasks, int n, double seconds, int threads)
{
    lp_model *models[BATCH] = {NULL};
    lp_options options[BATCH];
    lp_result results[BATCH] = {0};
    status st = STATUS_OK;
    for (int i = 0; i < n && st == STATUS_OK; i++) {
        options[i] = (lp_options){.seconds = seconds, .relax = true, .duals = true};
        st = make_model(&tasks[i], &models[i]);
    }
    if (st == STATUS_OK)
        st = lp_solve_all(n, models, options, threads, results);
    for (int i = 0; i < n; i++) {
        if (st == STATUS_OK && results[i].duals)
            take_duals(&tasks[i], results[i].duals);
        lp_result_clear(&results[i]);
        lp_destroy(models[i]);
    }
    return st;
}

/* ---- levels ---- */

/* Most experts of a layer that one rank, or one node, holds. */
static int largest(const problem *p, int layer, bool node)
{
    int most = 0;
    for (int place = 0; place < (node ? p->topology->n_nodes : p->n_ranks); place++) {
        int sum = 0;
        for (int g = 0; g < p->n_ranks; g++)
            if (node ? p->topology->node_of_rank[g] == place : g == place)
                sum += p->slots[layer * p->n_ranks + g];
        most = sum > most ? sum : most;
    }
    return most < p->n_experts ? most : p->n_experts;
}

/* What leaving a rank costs at least, and what leaving the node costs at least beside it. */
static void least_distances(const problem *p, double *rank, double *node)
{
    double near = INFINITY, far = INFINITY;
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            double distance = p->distance[g * p->n_ranks + h];
            if (g == h)
                continue;
            if (topology_link(p->topology, g, h) == LINK_CROSS_NODE)
                far = fmin(far, distance);
            else
                near = fmin(near, distance);
        }
    *rank = fmin(near, far);
    *node = isfinite(far) ? far - *rank : 0;
    if (!isfinite(*rank))
        *rank = 0; /* one rank */
}

typedef struct {
    const problem *p;
    matching_task *tasks; /* [2 * (n_layers - 1)] by rank, then by node */
    double *prices;
    double deadline; /* 0: none */
} matching_bound;

static status start_task(void *arg, int i)
{
    matching_bound *b = arg;
    const problem *p = b->p;
    int layer = i / 2;
    size_t n = (size_t)p->n_experts;
    double *left = malloc(n * sizeof *left);
    if (!left)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", p->n_experts);
    b->tasks[i] = (matching_task){.n = p->n_experts,
                                  .pairs = p->next_pairs + (size_t)layer * n * n,
                                  .from = largest(p, layer, i % 2),
                                  .to = largest(p, layer + 1, i % 2),
                                  .u = b->prices + (size_t)i * 2 * n,
                                  .v = b->prices + ((size_t)i * 2 + 1) * n};
    set_prices(&b->tasks[i], b->deadline, left);
    free(left);
    return STATUS_OK;
}

static double flow_left(const matching_bound *b)
{
    const problem *p = b->p;
    double rank, node, sum = 0;
    least_distances(p, &rank, &node);
    for (int l = 0; l + 1 < p->n_layers; l++) {
        const double *pairs = b->tasks[2 * l].pairs;
        double all = 0, weight = flow_weight(p, l);
        for (size_t i = 0; i < (size_t)p->n_experts * (size_t)p->n_experts; i++)
            all += pairs[i];
        sum += weight * (rank * (all - b->tasks[2 * l].kept) + node * (all - b->tasks[2 * l + 1].kept));
    }
    return fmax(0, sum * (1 - 1e-12));
}

status bounds_matching(const problem *p, double seconds, plan_bounds *out)
{
    int n_tasks = 2 * (p->n_layers - 1);
    double deadline = seconds > 0 ? clock_seconds() + seconds : 0;
    matching_bound b = {.p = p,
                        .tasks = calloc((size_t)n_tasks + 1, sizeof *b.tasks),
                        .deadline = deadline,
                        .prices = malloc(((size_t)n_tasks + 1) * 2 * (size_t)p->n_experts * sizeof *b.prices)};
    status st = STATUS_OK;
    if (!b.tasks || !b.prices)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers), out);
    TRY_GOTO(parallel_for(p->request->threads, n_tasks, start_task, &b), out);
    for (int i = 0; i < n_tasks && (deadline == 0 || clock_seconds() < deadline); i += BATCH) {
        int n = n_tasks - i < BATCH ? n_tasks - i : BATCH;
        double left = deadline > 0 ? fmax(0.001, deadline - clock_seconds()) : 0;
        TRY_GOTO(solve_tasks(b.tasks + i, n, left, p->request->threads), out);
    }
    out->flow_matching = p->n_layers > 1 ? flow_left(&b) : 0;
out:
    free(b.tasks);
    free(b.prices);
    return st;
}
