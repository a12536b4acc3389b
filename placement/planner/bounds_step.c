/* bounds_step.c - no plan in this room replays the trace quicker: per layer a bound of compute, of rows on links and of
 * start-up times, added up.
 *
 * Compute, in one step: rows and touched experts have to be served by somebody. If everybody is done after T, rank g serves
 * a rows and b experts with a row_us(g) + b expert_us(g) <= T; the least T for all of them is a linear programme in two
 * quantities, whose optimum lies where some rank could serve either: it is tried for each. Without a slot to spare every rank is
 * full, so in addition some rank holds the hottest expert and the coldest that its other slots must hold; and over all steps
 * company_bound.h.
 *
 * Links, with owners that the plan does not change: a row that is computed on its owner, or on its owner's node, needs a copy of
 * its expert there, and copies are few. `near` counts (token, expert) rows that could be served there by the best choice of
 * copies; the others travel, and one row serves at most as many of a token's experts as a rank has slots. Without a slot to
 * spare the distinct ranks of a token's homes are bounded too (bounds_ranks.c, on the replayed tokens): those that are not the
 * owner get a row each. The slowest rank carries at least the mean. */
#include "placement/planner/bounds.h"
#include "placement/planner/company_bound.h"
#include "proto/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    COMPANY_WORK = 1 << 30, /* multiplications, all layers together */
    MOST_ROUNDS = 400,
};

typedef struct {
    const problem *p;
    double deadline;        /* 0: none */
    double *meetings;       /* [n_layers] of replayed tokens with distinct ranks of their homes; NULL: unknown */
    double *compute, *move; /* [n_layers] mean microseconds, at least */
} step_bound;

static const int *layer_slots(const problem *p, int l)
{
    return p->slots + (size_t)l * (size_t)p->n_ranks;
}

static int count_slots(const problem *p, int l)
{
    int n = 0;
    for (int g = 0; g < p->n_ranks; g++)
        n += layer_slots(p, l)[g];
    return n;
}

static int most_slots(const problem *p, int l)
{
    int most = 0;
    for (int g = 0; g < p->n_ranks; g++)
        most = layer_slots(p, l)[g] > most ? layer_slots(p, l)[g] : most;
    return most;
}

static double cost_on(const problem *p, int g, double rows)
{
    return rows > 0 ? rows * p->topology->row_us[g] + p->topology->expert_us[g] : 0;
}

/* ---- compute of one step ---- */

/* Rows and touched experts over all ranks that have slots. */
static double share_bound(const problem *p, int l, double rows, double touched)
{
    const topology *t = p->topology;
    double best = 0;
    for (int at = 0; at < p->n_ranks; at++) {
        double a = t->row_us[at], b = t->expert_us[at], speed = 0; /* what a row and an expert are worth */
        for (int g = 0; g < p->n_ranks; g++)
            if (layer_slots(p, l)[g] > 0)
                speed += b * t->row_us[g] > a * t->expert_us[g] ? b / t->expert_us[g] : a / t->row_us[g];
        best = fmax(best, (a * rows + b * touched) / speed);
    }
    return best;
}

static int rising(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The hottest expert with as many of the coldest as fill its rank. sorted [n_experts]: rows, rising. */
static double full_bound(const problem *p, int l, const double *sorted)
{
    double best = INFINITY;
    for (int g = 0; g < p->n_ranks; g++) {
        int slots = layer_slots(p, l)[g];
        double us = cost_on(p, g, sorted[p->n_experts - 1]);
        for (int i = 0; i + 1 < slots; i++)
            us += cost_on(p, g, sorted[i]);
        if (slots > 0)
            best = fmin(best, us);
    }
    return best;
}

typedef struct {
    int n_steps;
    double *rows;   /* [n_experts][n_steps] */
    double *cost;   /* the same: microseconds where it is cheapest */
    double *floor;  /* [n_steps] */
    double *sorted; /* [n_experts] */
} layer_steps;

static void layer_steps_clear(layer_steps *x)
{
    free(x->rows);
    free(x->cost);
    free(x->floor);
    free(x->sorted);
}

static status layer_steps_count(const problem *p, int l, layer_steps *x)
{
    const replay_schedule *steps = p->schedule;
    size_t n = (size_t)steps->n_steps, cells = (size_t)p->n_experts * n;
    *x = (layer_steps){.n_steps = (int)steps->n_steps};
    x->rows = calloc(cells, sizeof *x->rows);
    x->cost = calloc(cells, sizeof *x->cost);
    x->floor = calloc(n, sizeof *x->floor);
    x->sorted = calloc((size_t)p->n_experts, sizeof *x->sorted);
    if (!x->rows || !x->cost || !x->floor || !x->sorted)
        return status_fail(STATUS_NO_MEMORY, "no memory to bound %zu steps of %d experts", n, p->n_experts);
    for (size_t s = 0; s < n; s++)
        for (int64_t i = steps->first[s]; i < steps->first[s + 1]; i++)
            for (int j = 0; j < p->top_k; j++) {
                int e = traffic_experts(p->traffic, l, steps->token[i])[j];
                if (e != ROUTING_NO_EXPERT)
                    x->rows[(size_t)e * n + s] += 1;
            }
    for (size_t i = 0; i < cells; i++) {
        x->cost[i] = INFINITY;
        for (int g = 0; g < p->n_ranks; g++)
            if (layer_slots(p, l)[g] > 0)
                x->cost[i] = fmin(x->cost[i], cost_on(p, g, x->rows[i]));
    }
    return STATUS_OK;
}

static void set_floors(const problem *p, int l, layer_steps *x)
{
    for (int s = 0; s < x->n_steps; s++) {
        double rows = 0, touched = 0;
        for (int e = 0; e < p->n_experts; e++) {
            double n = x->rows[(size_t)e * (size_t)x->n_steps + (size_t)s];
            rows += n;
            touched += n > 0;
            x->sorted[e] = n;
        }
        x->floor[s] = share_bound(p, l, rows, touched);
        if (count_slots(p, l) > p->n_experts)
            continue;
        qsort(x->sorted, (size_t)p->n_experts, sizeof *x->sorted, rising);
        x->floor[s] = fmax(x->floor[s], full_bound(p, l, x->sorted));
    }
}

/* Others on the rank of an expert, at least; rounds that the work affords. */
static company_task company_of(const step_bound *b, int l, const layer_steps *x)
{
    const problem *p = b->p;
    int least = p->n_experts;
    for (int g = 0; g < p->n_ranks; g++)
        if (layer_slots(p, l)[g] > 0 && layer_slots(p, l)[g] < least)
            least = layer_slots(p, l)[g];
    double each = (double)p->n_experts * p->n_experts * x->n_steps * p->n_layers, rounds = COMPANY_WORK / each;
    return (company_task){.n_steps = x->n_steps,
                          .n_experts = p->n_experts,
                          .company = least - 1,
                          .cost = x->cost,
                          .floor = x->floor,
                          .rounds = rounds > MOST_ROUNDS ? MOST_ROUNDS : (int)rounds,
                          .deadline = b->deadline};
}

static status bound_compute(step_bound *b, int l)
{
    layer_steps x;
    double sum = 0;
    status st = layer_steps_count(b->p, l, &x);
    if (st == STATUS_OK) {
        set_floors(b->p, l, &x);
        for (int s = 0; s < x.n_steps; s++)
            sum += x.floor[s];
        company_task task = company_of(b, l, &x);
        if (count_slots(b->p, l) == b->p->n_experts && task.rounds > 0)
            st = company_bound(&task, &sum);
        b->compute[l] = sum / x.n_steps;
    }
    layer_steps_clear(&x);
    return st;
}

/* ---- links ---- */

typedef struct {
    double *by_rank; /* [n_experts][n_ranks] rows by their owner */
    double *by_node; /* [n_experts][n_nodes] */
    double *sorted;  /* [n_experts * n_ranks] */
    double rows;
    int *owner, *node; /* [n_experts] in the present step: the only one, or MANY */
    double start_us;   /* sum over steps, one way */
} layer_rows;
enum { NOBODY = -1, MANY = -2 };

static void layer_rows_clear(layer_rows *x)
{
    free(x->by_rank);
    free(x->by_node);
    free(x->sorted);
    free(x->owner);
    free(x->node);
}

static void note(int *who, int owner)
{
    *who = *who == NOBODY || *who == owner ? owner : MANY;
}

/* An expert that two nodes ask for has a copy on both or its rows cross; spare slots are all the further copies there are. */
static double start_of_step(const problem *p, const layer_rows *x, int spare)
{
    const link_cost *link = p->topology->link;
    int across = 0, anywhere = 0;
    for (int e = 0; e < p->n_experts; e++) {
        across += x->node[e] == MANY;
        anywhere += x->owner[e] == MANY;
    }
    if (across > spare)
        return link[LINK_CROSS_NODE].us;
    return anywhere > spare ? fmin(link[LINK_SAME_NODE].us, link[LINK_CROSS_NODE].us) : 0;
}

static status layer_rows_count(const problem *p, int l, layer_rows *x)
{
    const replay_schedule *steps = p->schedule;
    const topology *t = p->topology;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks, nodes = (size_t)t->n_nodes;
    *x = (layer_rows){0};
    x->by_rank = calloc(n * ranks, sizeof *x->by_rank);
    x->by_node = calloc(n * nodes, sizeof *x->by_node);
    x->sorted = calloc(n * ranks, sizeof *x->sorted);
    x->owner = calloc(n, sizeof *x->owner);
    x->node = calloc(n, sizeof *x->node);
    if (!x->by_rank || !x->by_node || !x->sorted || !x->owner || !x->node)
        return status_fail(STATUS_NO_MEMORY, "no memory to bound rows of %d experts on %d ranks", p->n_experts, p->n_ranks);
    int spare = count_slots(p, l) - p->n_experts;
    for (int64_t s = 0; s < steps->n_steps; s++) {
        for (int e = 0; e < p->n_experts; e++)
            x->owner[e] = x->node[e] = NOBODY;
        for (int64_t i = steps->first[s]; i < steps->first[s + 1]; i++)
            for (int j = 0; j < p->top_k; j++) {
                int e = traffic_experts(p->traffic, l, steps->token[i])[j], owner = steps->owner[i];
                if (e == ROUTING_NO_EXPERT)
                    continue;
                x->rows += 1;
                x->by_rank[(size_t)e * ranks + (size_t)owner] += 1;
                x->by_node[(size_t)e * nodes + (size_t)t->node_of_rank[owner]] += 1;
                note(&x->owner[e], owner);
                note(&x->node[e], t->node_of_rank[owner]);
            }
        x->start_us += start_of_step(p, x, spare);
    }
    return STATUS_OK;
}

/* Most rows that copies could serve where they are owned: each expert's best place, then the best `spare` others. */
static double near_rows(const problem *p, const double *rows, int n_places, int spare, double *sorted)
{
    double sum = 0;
    int n = 0;
    for (int e = 0; e < p->n_experts; e++) {
        const double *of = rows + (size_t)e * (size_t)n_places;
        int best = 0;
        for (int g = 1; g < n_places; g++)
            best = of[g] > of[best] ? g : best;
        sum += of[best];
        for (int g = 0; g < n_places; g++)
            if (g != best)
                sorted[n++] = of[g];
    }
    qsort(sorted, (size_t)n, sizeof *sorted, rising);
    for (int i = 0; i < spare && i < n; i++)
        sum += sorted[n - 1 - i];
    return sum;
}

static void cheapest_rows(const problem *p, double *same, double *cross)
{
    const topology *t = p->topology;
    *same = *cross = INFINITY;
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            double us = t->row_bytes * topology_us_per_byte(t, g, h);
            if (g != h && t->node_of_rank[g] == t->node_of_rank[h])
                *same = fmin(*same, us);
            else if (g != h)
                *cross = fmin(*cross, us);
        }
    if (p->request->replay.node_dedupe) /* a row that reaches a rank does so by one hop of its own, of whichever kind */
        *cross = fmin(*same, *cross);
    *same = fmin(*same, *cross);
}

/* Microseconds of all links together, one way, when so many rows travel at least, so many of them at least across. */
static double rows_us(const problem *p, double travel, double across)
{
    double same, cross;
    if (travel <= 0 || p->n_ranks < 2)
        return 0;
    cheapest_rows(p, &same, &cross);
    across = across > 0 && isfinite(cross) ? fmin(across, travel) : 0;
    return across * (isfinite(cross) ? cross : 0) + (travel - across) * same;
}

static status bound_transfer(step_bound *b, int l)
{
    const problem *p = b->p;
    layer_rows x;
    status st = layer_rows_count(p, l, &x);
    if (st == STATUS_OK) {
        int spare = count_slots(p, l) - p->n_experts, serves = p->top_k < most_slots(p, l) ? p->top_k : most_slots(p, l);
        double own = near_rows(p, x.by_rank, p->n_ranks, spare, x.sorted);
        double node = near_rows(p, x.by_node, p->topology->n_nodes, spare, x.sorted);
        double us = rows_us(p, (x.rows - own) / serves, (x.rows - node) / serves);
        if (b->meetings && spare == 0)
            us = fmax(us, rows_us(p, b->meetings[l] - own, b->meetings[l] - node));
        b->move[l] = 2 * (us / p->n_ranks + x.start_us) / (double)p->schedule->n_steps;
    }
    layer_rows_clear(&x);
    return st;
}

/* ---- the whole ---- */

/* The replayed tokens alone, one sequence: all that bounds_ranks_of_layers() looks at. */
static status replayed_traffic(const problem *p, traffic *out)
{
    const replay_schedule *s = p->schedule;
    int64_t n = s->first[s->n_steps];
    size_t row = (size_t)p->top_k * sizeof(uint16_t);
    *out = (traffic){.shape = p->traffic->shape, .n_tokens = n};
    out->experts = malloc((size_t)p->n_layers * (size_t)n * row);
    if (!out->experts)
        return status_fail(STATUS_NO_MEMORY, "no memory for the experts of %lld tokens", (long long)n);
    for (int l = 0; l < p->n_layers; l++)
        for (int64_t i = 0; i < n; i++)
            memcpy(out->experts + ((size_t)l * (size_t)n + (size_t)i) * (size_t)p->top_k,
                   traffic_experts(p->traffic, l, s->token[i]), row);
    return STATUS_OK;
}

static status count_meetings(step_bound *b, double seconds)
{
    traffic replayed = {0};
    problem q = *b->p;
    bool *proved = malloc((size_t)q.n_layers * sizeof *proved);
    b->meetings = malloc((size_t)q.n_layers * sizeof *b->meetings);
    status st = proved && b->meetings ? replayed_traffic(b->p, &replayed)
                                      : status_fail(STATUS_NO_MEMORY, "no memory for %d layers", q.n_layers);
    q.traffic = &replayed;
    if (st == STATUS_OK)
        st = bounds_ranks_of_layers(&q, seconds, b->meetings, proved);
    free(replayed.experts);
    free(proved);
    return st;
}

/* Owners by affinity depend on the plan: nothing is known of links then. */
static status bound_layer(void *arg, int l)
{
    step_bound *b = arg;
    if (b->p->request->replay.owners != OWNER_AFFINITY)
        TRY(bound_transfer(b, l));
    return bound_compute(b, l);
}

static void explain(const step_bound *b, plan_bounds *out)
{
    int spare = 0;
    for (int l = 0; l < b->p->n_layers; l++)
        spare += count_slots(b->p, l) > b->p->n_experts;
    if (b->p->request->replay.owners == OWNER_AFFINITY)
        snprintf(out->remark, sizeof out->remark,
                 "owners follow the plan, so step_us is bounded by compute alone: links are not in the bound");
    else if (spare == b->p->n_layers)
        snprintf(
            out->remark, sizeof out->remark,
            "step_us: with slots to spare the bound lets every step share its rows as it likes; copies must serve all steps");
    else
        snprintf(out->remark, sizeof out->remark,
                 "step_us: the bound knows which experts sit together only in pairs, and lets links carry equal parts");
}

status bounds_step(const problem *p, double seconds, plan_bounds *out)
{
    step_bound b = {.p = p, .deadline = seconds > 0 ? clock_seconds() + seconds : 0};
    size_t n = (size_t)p->n_layers;
    bool full = p->n_ranks > 1 && p->request->replay.owners != OWNER_AFFINITY && count_slots(p, 0) == p->n_experts;
    status st = STATUS_OK;
    b.compute = calloc(n, sizeof *b.compute);
    b.move = calloc(n, sizeof *b.move);
    if (!b.compute || !b.move)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers), out);
    if (full)
        TRY_GOTO(count_meetings(&b, seconds / 2), out);
    TRY_GOTO(parallel_for(p->request->threads, p->n_layers, bound_layer, &b), out);
    out->step_compute_us = out->step_transfer_us = 0;
    for (size_t l = 0; l < n; l++) {
        out->step_compute_us += b.compute[l] * (1 - 1e-9);
        out->step_transfer_us += b.move[l] * (1 - 1e-9);
    }
    out->step_us = out->step_compute_us + out->step_transfer_us;
    explain(&b, out);
out:
    free(b.meetings);
    free(b.compute);
    free(b.move);
    return st;
}
