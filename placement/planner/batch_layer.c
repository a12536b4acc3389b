/* batch_layer.c - set up, pricing of swaps and moves, annealing, descent. */
#include "placement/planner/batch_layer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_SIBLINGS = 2 * 17, /* two paths through a tree over 65,535 ranks */
    TRIALS_PER_EXPERT = 300,
    ANNEALS_TIMES_EXPERTS = 64, /* one after the other from the best, the more the fewer experts */
    MOST_ANNEALS = 12,
    PROBES = 48,      /* random swaps that say how warm to start */
    WORK_UNIT = 1000, /* elementary operations */
    CLOCK_EVERY = 16, /* trials */
};
/* Chosen on the fitted half of the gpt-oss trace: warmer or slower finds nothing better there. */
static const double WARMTH = 0.25, COOLED = 0.02; /* of what a random swap makes worse on average */
static const double LINKS_MAY_SAVE = 0.25;        /* no single swap saves more than this share of the transfers */
static const double WORTH = 1e-6;                 /* relative gain that counts as one */

/* ---- set up ---- */

void batch_layer_destroy(batch_layer *b)
{
    if (!b)
        return;
    batch_links_destroy(b->links);
    free(b->class_of_rank);
    free(b->rows);
    free(b->cost);
    free(b->tree);
    free(b->home);
    free(b->held);
    free(b->planned);
    free(b);
}

static void find_classes(batch_layer *b)
{
    const topology *t = b->p->topology;
    for (int g = 0; g < b->n_ranks; g++) {
        b->class_of_rank[g] = -1;
        for (int h = 0; h < g && b->class_of_rank[g] < 0; h++)
            if (t->row_us[g] == t->row_us[h] && t->expert_us[g] == t->expert_us[h])
                b->class_of_rank[g] = b->class_of_rank[h];
        if (b->class_of_rank[g] < 0)
            b->class_of_rank[g] = b->n_classes++;
    }
}

static void count_rows(batch_layer *b)
{
    const traffic *t = b->p->traffic;
    for (int64_t s = 0; s < b->steps->n_steps; s++)
        for (int64_t i = b->steps->first[s]; i < b->steps->first[s + 1]; i++) {
            const uint16_t *experts = traffic_experts(t, b->layer, b->steps->token[i]);
            for (int j = 0; j < t->shape.top_k; j++)
                if (experts[j] != ROUTING_NO_EXPERT)
                    b->rows[(size_t)experts[j] * (size_t)b->n_steps + (size_t)s] += 1;
        }
}

/* All of a step on the slowest rank must stay a whole number of ticks. */
static void set_tick(batch_layer *b)
{
    double most = 1e-9;
    for (int s = 0; s < b->n_real; s++)
        for (int g = 0; g < b->n_ranks; g++) {
            double us = 0;
            for (int e = 0; e < b->n_experts; e++) {
                float n = b->rows[(size_t)e * (size_t)b->n_steps + (size_t)s];
                us += n > 0 ? (double)n * b->p->topology->row_us[g] + b->p->topology->expert_us[g] : 0;
            }
            most = us > most ? us : most;
        }
    int exponent;
    frexp(most, &exponent);
    b->tick = (float)ldexp(1, exponent - 23);
}

static void price_rows(batch_layer *b)
{
    for (int g = 0; g < b->n_ranks; g++)
        for (int e = 0; e < b->n_experts; e++) {
            const float *rows = b->rows + (size_t)e * (size_t)b->n_steps;
            float *cost = batch_cost(b, g, e);
            double row = b->p->topology->row_us[g] / (double)b->tick, touch = b->p->topology->expert_us[g] / (double)b->tick;
            for (int s = 0; s < b->n_steps; s++)
                cost[s] = rows[s] > 0 ? (float)rint((double)rows[s] * row + touch) : 0;
        }
}

static status allocate(batch_layer *b)
{
    size_t ranks = (size_t)b->n_ranks, experts = (size_t)b->n_experts, steps = (size_t)b->n_steps;
    b->class_of_rank = calloc(ranks, sizeof *b->class_of_rank);
    if (!b->class_of_rank)
        return STATUS_NO_MEMORY;
    find_classes(b);
    b->rows = calloc(experts * steps, sizeof *b->rows);
    b->cost = calloc((size_t)b->n_classes * (experts + 1) * steps, sizeof *b->cost);
    for (b->n_leaves = 1; b->n_leaves < b->n_ranks;)
        b->n_leaves *= 2;
    b->tree = calloc(2 * (size_t)b->n_leaves * steps, sizeof *b->tree);
    b->home = calloc(experts, sizeof *b->home);
    b->held = calloc(ranks, sizeof *b->held);
    b->planned = calloc(ranks, sizeof *b->planned);
    return b->rows && b->cost && b->tree && b->home && b->held && b->planned ? STATUS_OK : STATUS_NO_MEMORY;
}

static status create_links(batch_layer *b, const replay_schedule *steps)
{
    b->link_times = (double)b->steps->n_steps / (double)steps->n_steps;
    return batch_links_create(b->p, steps, b->layer, (int)steps->n_steps, &b->links);
}

status batch_layer_create(const problem *p, const replay_schedule *steps, int layer, const replay_schedule *link_steps,
                          batch_layer **out)
{
    batch_layer *b = calloc(1, sizeof *b);
    if (!b)
        return status_fail(STATUS_NO_MEMORY, "no memory for layer %d", layer);
    size_t at = (size_t)layer * (size_t)p->n_ranks;
    *b = (batch_layer){.p = p,
                       .steps = steps,
                       .layer = layer,
                       .n_real = (int)steps->n_steps,
                       .n_steps = ((int)steps->n_steps + BATCH_LANES - 1) / BATCH_LANES * BATCH_LANES,
                       .n_experts = p->n_experts,
                       .n_ranks = p->n_ranks,
                       .slots = p->slots + at,
                       .cap = p->request->slack >= 0 ? p->cap + at : NULL};
    status st = allocate(b);
    if (st != STATUS_OK) {
        st = status_fail(st, "no memory for %d experts on %d steps", b->n_experts, b->n_steps);
    } else {
        count_rows(b);
        set_tick(b);
        price_rows(b);
        st = link_steps ? create_links(b, link_steps) : STATUS_OK;
    }
    if (st == STATUS_OK)
        *out = b;
    else
        batch_layer_destroy(b);
    return st;
}

/* ---- the tournament ---- */

static void take_larger(int n, const float *restrict a, const float *restrict b, float *restrict out)
{
    for (int s = 0; s < n; s++)
        out[s] = a[s] > b[s] ? a[s] : b[s];
}

static void refresh_node(batch_layer *b, int node)
{
    take_larger(b->n_steps, batch_node(b, 2 * node), batch_node(b, 2 * node + 1), batch_node(b, node));
}

/* Above two changed leaves. */
static void refresh_paths(batch_layer *b, int g, int h)
{
    int x = (b->n_leaves + g) / 2, y = (b->n_leaves + h) / 2;
    for (; x > 0; x /= 2, y /= 2) {
        refresh_node(b, x);
        if (y != x)
            refresh_node(b, y);
    }
}

/* The nodes that together hold every rank but g and h. */
static int siblings(const batch_layer *b, int g, int h, const float **out)
{
    int n = 0, x = b->n_leaves + g, y = b->n_leaves + h;
    for (; x > 1; x /= 2, y /= 2) {
        if (x == y) {
            out[n++] = batch_node(b, x ^ 1);
        } else if ((x ^ 1) != y) {
            out[n++] = batch_node(b, x ^ 1);
            out[n++] = batch_node(b, y ^ 1);
        }
    }
    return n;
}

/* Lanes are added up apart and joined in one order: the same sum on every machine. */
static double sum_lanes(const float *lanes)
{
    double sum = 0;
    for (int k = 0; k < BATCH_LANES; k++)
        sum += (double)lanes[k];
    return sum;
}

static double sum_root(const batch_layer *b)
{
    const float *root = batch_node(b, 1);
    float lanes[BATCH_LANES] = {0};
    for (int s = 0; s < b->n_steps; s += BATCH_LANES)
        for (int k = 0; k < BATCH_LANES; k++)
            lanes[k] += root[s + k];
    return sum_lanes(lanes);
}

/* ---- a trial: expert e from g to h, f (or no expert) back ---- */

typedef struct {
    int e, f, g, h;
    int n_others;
    const float *others[MAX_SIBLINGS];
} trial;

/* Sum over steps of the busiest rank after it, in ticks. */
static double try_compute(const batch_layer *b, const trial *t)
{
    const float *load_g = batch_load(b, t->g), *load_h = batch_load(b, t->h);
    const float *e_g = batch_cost(b, t->g, t->e), *f_g = batch_cost(b, t->g, t->f);
    const float *e_h = batch_cost(b, t->h, t->e), *f_h = batch_cost(b, t->h, t->f);
    float lanes[BATCH_LANES] = {0};
    for (int s = 0; s < b->n_steps; s += BATCH_LANES) {
        float most[BATCH_LANES];
        for (int k = 0; k < BATCH_LANES; k++) {
            float x = load_g[s + k] - e_g[s + k] + f_g[s + k], y = load_h[s + k] - f_h[s + k] + e_h[s + k];
            most[k] = x > y ? x : y;
        }
        for (int i = 0; i < t->n_others; i++) {
            const float *other = t->others[i] + s;
            for (int k = 0; k < BATCH_LANES; k++)
                most[k] = most[k] > other[k] ? most[k] : other[k];
        }
        for (int k = 0; k < BATCH_LANES; k++)
            lanes[k] += most[k];
    }
    return sum_lanes(lanes);
}

static int64_t trial_work(const batch_layer *b, const trial *t)
{
    return (int64_t)b->n_steps * (6 + t->n_others) / 4;
}

static bool keeps_room(const batch_layer *b, int e, int f, int g, int h)
{
    if (f == b->n_experts && b->held[h] >= b->slots[h])
        return false;
    if (!b->cap)
        return true;
    const double *load = b->p->load + problem_at(b->p, b->layer, 0);
    double d = load[e] - (f < b->n_experts ? load[f] : 0);
    /* A start that is over its cap may come down. */
    return (d >= 0 || b->planned[g] - d <= b->cap[g]) && (d <= 0 || b->planned[h] + d <= b->cap[h]);
}

static void apply(batch_layer *b, const trial *t)
{
    float *load_g = batch_load(b, t->g), *load_h = batch_load(b, t->h);
    const float *e_g = batch_cost(b, t->g, t->e), *f_g = batch_cost(b, t->g, t->f);
    const float *e_h = batch_cost(b, t->h, t->e), *f_h = batch_cost(b, t->h, t->f);
    for (int s = 0; s < b->n_steps; s++) {
        load_g[s] += f_g[s] - e_g[s];
        load_h[s] += e_h[s] - f_h[s];
    }
    refresh_paths(b, t->g, t->h);
    const double *load = b->p->load + problem_at(b->p, b->layer, 0);
    double d = load[t->e] - (t->f < b->n_experts ? load[t->f] : 0);
    b->planned[t->g] -= d;
    b->planned[t->h] += d;
    b->home[t->e] = t->h;
    if (t->f < b->n_experts) {
        b->home[t->f] = t->g;
    } else {
        b->held[t->g]--;
        b->held[t->h]++;
    }
}

double batch_layer_set(batch_layer *b, const int *home)
{
    if (home != b->home)
        memcpy(b->home, home, (size_t)b->n_experts * sizeof *home);
    memset(b->tree, 0, 2 * (size_t)b->n_leaves * (size_t)b->n_steps * sizeof *b->tree);
    memset(b->held, 0, (size_t)b->n_ranks * sizeof *b->held);
    memset(b->planned, 0, (size_t)b->n_ranks * sizeof *b->planned);
    for (int e = 0; e < b->n_experts; e++) {
        float *load = batch_load(b, home[e]);
        const float *cost = batch_cost(b, home[e], e);
        for (int s = 0; s < b->n_steps; s++)
            load[s] += cost[s];
        b->held[home[e]]++;
        b->planned[home[e]] += b->p->load[problem_at(b->p, b->layer, e)];
    }
    for (int node = b->n_leaves - 1; node > 0; node--)
        refresh_node(b, node);
    double us = sum_root(b) * (double)b->tick;
    return us / b->n_real + batch_layer_links_us(b);
}

double batch_layer_links_us(batch_layer *b)
{
    return b->links ? batch_links_set(b->links, b->home) * b->link_times / b->n_real : 0;
}

/* ---- search; prices are sums over steps in microseconds ---- */

typedef struct {
    batch_layer *b;
    random_stream *random;
    work_budget *work;
    int64_t owed; /* operations not yet taken from the budget */
    int n_tried;
    double compute, links; /* of the present homes */
    double best;
    int *best_home; /* the caller's */
} search;

static bool go_on(search *s, int64_t operations)
{
    s->owed += operations;
    if (++s->n_tried % CLOCK_EVERY)
        return true;
    int64_t units = s->owed / WORK_UNIT;
    s->owed -= units * WORK_UNIT;
    return work_take(s->work, units);
}

/* Whether the trial costs less than `limit`; then *compute and *links are its prices and links are on trial. */
static bool cheaper(search *s, const trial *t, double limit, double *compute, double *links)
{
    batch_layer *b = s->b;
    *compute = try_compute(b, t) * (double)b->tick;
    *links = 0;
    if (!b->links)
        return *compute < limit;
    if (*compute + s->links * (1 - LINKS_MAY_SAVE) >= limit)
        return false;
    *links = batch_links_try(b->links, b->home, t->e, t->f < b->n_experts ? t->f : -1, t->h) * b->link_times;
    s->owed += batch_links_work(b->links);
    return *compute + *links < limit;
}

static void keep(search *s, const trial *t, double compute, double links)
{
    apply(s->b, t);
    if (s->b->links)
        batch_links_keep(s->b->links);
    s->compute = compute;
    s->links = links;
    if (compute + links < s->best * (1 - WORTH)) {
        s->best = compute + links;
        memcpy(s->best_home, s->b->home, (size_t)s->b->n_experts * sizeof *s->best_home);
    }
}

/* A random expert and another one elsewhere, or a free slot. */
static bool draw_trial(search *s, trial *t)
{
    batch_layer *b = s->b;
    t->e = random_below(s->random, b->n_experts);
    t->g = b->home[t->e];
    t->h = random_below(s->random, b->n_ranks);
    if (t->h == t->g || b->slots[t->h] == 0)
        return false;
    t->f = b->n_experts;
    int place = random_below(s->random, b->slots[t->h]); /* places held first, then free ones */
    if (place < b->held[t->h])
        for (int e = 0, n = 0; t->f == b->n_experts; e++)
            if (b->home[e] == t->h && n++ == place)
                t->f = e;
    if (!keeps_room(b, t->e, t->f, t->g, t->h))
        return false;
    t->n_others = siblings(b, t->g, t->h, t->others);
    return true;
}

/* What a random swap makes worse on average: the scale of temperatures. */
static double probe(search *s)
{
    double sum = 0;
    int n = 0;
    for (int i = 0; i < PROBES; i++) {
        trial t;
        double compute, links;
        if (!draw_trial(s, &t))
            continue;
        cheaper(s, &t, INFINITY, &compute, &links);
        go_on(s, trial_work(s->b, &t));
        double d = compute + links - s->compute - s->links;
        sum += d > 0 ? d : 0;
        n += d > 0;
    }
    return n ? sum / n : 0;
}

static void anneal(search *s)
{
    double scale = probe(s);
    int64_t n = (int64_t)TRIALS_PER_EXPERT * s->b->n_experts;
    /* A budget that ends earlier cools faster. */
    trial typical = {.n_others = 0};
    for (int n_leaves = s->b->n_leaves; n_leaves > 1; n_leaves /= 2)
        typical.n_others += 2;
    int64_t each = trial_work(s->b, &typical) + (s->b->links ? batch_links_work(s->b->links) : 0);
    int64_t affords = s->work->left / 2 * WORK_UNIT / each;
    n = n < affords ? n : affords;
    for (int64_t i = 0; i < n && scale > 0; i++) {
        double temperature = scale * WARMTH * pow(COOLED / WARMTH, (double)i / (double)n);
        trial t;
        double compute, links;
        if (!draw_trial(s, &t))
            continue;
        double limit = s->compute + s->links - temperature * log(1 - random_unit(s->random));
        if (cheaper(s, &t, limit, &compute, &links))
            keep(s, &t, compute, links);
        if (!go_on(s, trial_work(s->b, &t)))
            return;
    }
}

/* All swaps and moves between ranks g and h, each taken as soon as it helps; false: the budget is spent. */
static bool descend_pair(search *s, int g, int h, bool *changed)
{
    batch_layer *b = s->b;
    trial t = {.g = g, .h = h};
    t.n_others = siblings(b, g, h, t.others);
    for (t.e = 0; t.e < b->n_experts; t.e++) {
        if (b->home[t.e] != g)
            continue;
        for (t.f = 0; t.f <= b->n_experts; t.f++) {
            double compute, links, now = s->compute + s->links;
            if ((t.f < b->n_experts && b->home[t.f] != h) || !keeps_room(b, t.e, t.f, g, h))
                continue;
            bool better = cheaper(s, &t, now - now * WORTH, &compute, &links);
            if (better)
                keep(s, &t, compute, links);
            if (!go_on(s, trial_work(b, &t)))
                return false;
            if (better) {
                *changed = true;
                break; /* e is gone from g */
            }
        }
    }
    return true;
}

static void descend(search *s)
{
    for (bool changed = true; changed;) {
        changed = false;
        for (int g = 0; g < s->b->n_ranks; g++)
            for (int h = 0; h < s->b->n_ranks; h++)
                if (g != h && !descend_pair(s, g, h, &changed))
                    return;
    }
}

static void start_from(search *s, const int *home)
{
    batch_layer *b = s->b;
    double us = batch_layer_set(b, home) * b->n_real;
    s->compute = sum_root(b) * (double)b->tick;
    s->links = us - s->compute;
}

double batch_layer_search(batch_layer *b, random_stream *random, work_budget *work, int *home)
{
    search s = {.b = b, .random = random, .work = work, .best_home = home};
    memcpy(home, b->home, (size_t)b->n_experts * sizeof *home);
    start_from(&s, home);
    s.best = s.compute + s.links;
    if (b->n_ranks < 2)
        return s.best / b->n_real;
    int anneals = ANNEALS_TIMES_EXPERTS / b->n_experts / (b->links ? 2 : 1); /* links take most of the time */
    anneals = anneals < 1 ? 1 : anneals > MOST_ANNEALS ? MOST_ANNEALS : anneals;
    for (int i = 0; i < anneals; i++) {
        anneal(&s);
        start_from(&s, home);
    }
    descend(&s);
    return s.best / b->n_real;
}
