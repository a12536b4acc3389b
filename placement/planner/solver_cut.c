/* solver_cut.c - few ranks per token: hypergraph partitioning layer by layer, by swaps with exact gains.
 *
 * A layer starts from the seed, or from the better of LPT and of groups of experts that are chosen together, and descends; then a
 * tabu search goes on: each step takes the best swap or move that caps and room allow, even when it costs, and what moved stays
 * where it is for some steps. The best placement seen is the result. Layers do not depend on each other: they run in parallel,
 * each with its own share of the work (one unit: one edge updated, or 16 swaps weighed). */
#include "placement/planner/assign.h"
#include "placement/planner/cluster.h"
#include "placement/planner/cut.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS_WITHOUT_GAIN = 2000, UPDATES_PER_LAYER = 1000000, UPDATES_PER_TOKEN = 40 };

typedef struct {
    const problem *p;
    bool seeded;
    int *home; /* [n_layers][n_experts] */
    work_budget work;
    int64_t *spent; /* [n_layers] */
    bool *late;     /* [n_layers] */
} cutting;

typedef struct {
    cut c;
    work_budget work;
    random_stream random;
    int64_t best_cost;
    int *best;      /* [n_experts] */
    int64_t *until; /* [n_experts] step before which it does not move */
    int64_t weighed;
} search;

/* ---- one step ---- */

typedef struct {
    int64_t gain;
    int e, f, to; /* f: -1 for a move */
} step;

static void weigh_expert(search *s, int64_t now, int e, step *best)
{
    const cut *c = &s->c;
    const problem *p = c->p;
    bool tabu_e = s->until[e] > now;
    for (int f = e + 1; f < p->n_experts; f++) {
        if (c->home[f] == c->home[e])
            continue;
        int64_t gain = cut_swap_gain(c, e, f);
        if (gain <= best->gain || ((tabu_e || s->until[f] > now) && c->cost - gain >= s->best_cost))
            continue;
        if (cut_swap_fits(c, e, f))
            *best = (step){gain, e, f, -1};
    }
    for (int g = 0; g < p->n_ranks; g++) {
        if (g == c->home[e])
            continue;
        int64_t gain = cut_move_gain(c, e, g);
        if (gain > best->gain && (!tabu_e || c->cost - gain < s->best_cost) && cut_move_fits(c, e, g))
            *best = (step){gain, e, -1, g};
    }
}

/* The best step, or any gain above `least`; false when none is left. */
static bool take_step(search *s, int64_t now, int64_t least)
{
    const problem *p = s->c.p;
    step best = {least, -1, -1, -1};
    for (int e = 0; e < p->n_experts; e++)
        weigh_expert(s, now, e, &best);
    s->weighed += (int64_t)p->n_experts * (p->n_experts / 2 + p->n_ranks) / 16;
    if (best.e < 0)
        return false;
    if (best.f >= 0)
        cut_swap(&s->c, best.e, best.f);
    else
        cut_move(&s->c, best.e, best.to);
    int tenure = 2 + p->n_experts / 8;
    s->until[best.e] = now + tenure + random_below(&s->random, tenure);
    if (best.f >= 0)
        s->until[best.f] = now + tenure + random_below(&s->random, tenure);
    return true;
}

/* Charges what was done since the last call; false when the work or the time is up. */
static bool pay(search *s)
{
    int64_t units = s->c.touched + s->weighed;
    s->c.touched = s->weighed = 0;
    return work_take(&s->work, units > 0 ? units : 1);
}

static void keep_best(search *s)
{
    if (s->c.cost >= s->best_cost)
        return;
    s->best_cost = s->c.cost;
    memcpy(s->best, s->c.home, (size_t)s->c.p->n_experts * sizeof *s->best);
}

static void descend(search *s)
{
    memset(s->until, 0, (size_t)s->c.p->n_experts * sizeof *s->until);
    while (pay(s) && take_step(s, 0, 0))
        memset(s->until, 0, (size_t)s->c.p->n_experts * sizeof *s->until);
    keep_best(s);
}

static void tabu(search *s)
{
    cut_place(&s->c, s->best);
    memset(s->until, 0, (size_t)s->c.p->n_experts * sizeof *s->until);
    for (int64_t now = 1, last = 0; now - last < STEPS_WITHOUT_GAIN && pay(s); now++) {
        int64_t before = s->best_cost;
        if (!take_step(s, now, INT64_MIN))
            continue; /* all are tabu: time passes */
        keep_best(s);
        if (s->best_cost < before)
            last = now;
    }
}

/* ---- a second start: experts that are chosen together ---- */

static void count_together(const cut *c, double *together)
{
    size_t n = (size_t)c->p->n_experts;
    memset(together, 0, n * n * sizeof *together);
    for (int i = 0; i < c->n_edges; i++) {
        const uint16_t *pins = c->pins + (size_t)i * (size_t)c->top_k;
        for (int a = 0; a < c->top_k && pins[a] != ROUTING_NO_EXPERT; a++)
            for (int b = 0; b < c->top_k && pins[b] != ROUTING_NO_EXPERT; b++)
                together[pins[a] * n + pins[b]] += c->weight[i];
    }
}

static bool within_caps(const cut *c)
{
    for (int g = 0; g < c->p->n_ranks; g++)
        if (c->load[g] > c->p->cap[(size_t)c->layer * (size_t)c->p->n_ranks + (size_t)g] * (1 + 1e-12))
            return false;
    return true;
}

static status cluster_home(search *s, int *home, int *sizes, double *together)
{
    const problem *p = s->c.p;
    int used = 0, *rank = sizes + p->n_ranks;
    TRY(start_sizes(p, s->c.layer, sizes));
    for (int g = 0; g < p->n_ranks; g++)
        if (sizes[g] > 0) {
            rank[used] = g;
            sizes[used++] = sizes[g];
        }
    count_together(&s->c, together);
    TRY(cluster_rows(p->n_experts, p->n_experts, together, used, sizes, home));
    for (int e = 0; e < p->n_experts; e++)
        home[e] = rank[home[e]];
    assign_task t = {p->n_experts,
                     p->n_ranks,
                     p->load + problem_at(p, s->c.layer, 0),
                     p->share,
                     p->slots + (size_t)s->c.layer * (size_t)p->n_ranks,
                     NULL};
    cut_place(&s->c, home);
    if (!within_caps(&s->c) && assign_improve(&t, home) >= 0)
        cut_place(&s->c, home);
    return STATUS_OK;
}

static status try_clusters(search *s)
{
    const problem *p = s->c.p;
    size_t n = (size_t)p->n_experts;
    int *home = malloc((n + 2 * (size_t)p->n_ranks) * sizeof *home);
    double *together = malloc(n * n * sizeof *together);
    status st = home && together ? cluster_home(s, home, home + n, together)
                                 : status_fail(STATUS_NO_MEMORY, "no memory for a layer of %d experts", p->n_experts);
    if (st == STATUS_OK && within_caps(&s->c))
        descend(s);
    free(home);
    free(together);
    return st;
}

/* ---- layers ---- */

static status search_layer(search *s, int *home, bool seeded)
{
    const problem *p = s->c.p;
    s->best = malloc((size_t)p->n_experts * sizeof *s->best);
    s->until = malloc((size_t)p->n_experts * sizeof *s->until);
    if (!s->best || !s->until)
        return status_fail(STATUS_NO_MEMORY, "no memory for a layer of %d experts", p->n_experts);
    memcpy(s->best, home, (size_t)p->n_experts * sizeof *home);
    cut_place(&s->c, home);
    s->best_cost = s->c.cost;
    descend(s);
    if (!seeded && pay(s))
        TRY(try_clusters(s));
    if (p->n_ranks > 1 && s->best_cost > 0 && pay(s))
        tabu(s);
    memcpy(home, s->best, (size_t)p->n_experts * sizeof *home);
    return STATUS_OK;
}

static status cut_layer(void *arg, int l)
{
    cutting *a = arg;
    search s = {.work = work_part(&a->work, l, a->p->n_layers), .random = random_open(a->p, (uint64_t)l)};
    int64_t given = s.work.left;
    if (!work_take(&s.work, 1)) {
        a->late[l] = s.work.out_of_time;
        return STATUS_OK;
    }
    TRY(cut_open(a->p, l, &s.c));
    status st = search_layer(&s, a->home + problem_at(a->p, l, 0), a->seeded);
    a->spent[l] = given - s.work.left;
    a->late[l] = s.work.out_of_time;
    free(s.best);
    free(s.until);
    cut_close(&s.c);
    return st;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0), layers = (size_t)p->n_layers;
    cutting a = {.p = p, .work = work_start(p, (UPDATES_PER_LAYER + UPDATES_PER_TOKEN * p->traffic->n_tokens) * p->n_layers)};
    status st = STATUS_OK;
    a.home = malloc(n_lists * sizeof *a.home);
    a.spent = calloc(layers, sizeof *a.spent);
    a.late = calloc(layers, sizeof *a.late);
    if (!a.home || !a.spent || !a.late)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    a.seeded = start_seed(p, a.home);
    if (!a.seeded)
        TRY_GOTO(start_lpt(p, a.home), out);
    TRY_GOTO(parallel_for(p->request->threads, p->n_layers, cut_layer, &a), out);
    for (size_t l = 0; l < layers; l++) {
        report->work += a.spent[l];
        report->out_of_time |= a.late[l];
    }
    st = start_finish(&solver_cut, p, a.home, report, out);
out:
    free(a.home);
    free(a.spent);
    free(a.late);
    return st;
}

/* ---- measure ---- */

typedef struct {
    const problem *p;
    const plan *made;
    double *rows; /* [n_layers] that leave their owner */
} counting;

static status count_layer(void *arg, int l)
{
    counting *a = arg;
    const problem *p = a->p;
    const replay_schedule *s = p->schedule;
    int64_t n = s->first[s->n_steps], rows = 0, *seen = malloc((size_t)p->n_ranks * sizeof *seen);
    if (!seen)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    memset(seen, 0xff, (size_t)p->n_ranks * sizeof *seen);
    for (int64_t i = 0; i < n; i++) {
        const uint16_t *experts = traffic_experts(p->traffic, l, s->token[i]);
        seen[s->owner[i]] = i;
        for (int j = 0; j < p->traffic->shape.top_k; j++) {
            if (experts[j] == ROUTING_NO_EXPERT)
                continue;
            int home = plan_copies(a->made, l, experts[j])[0];
            rows += seen[home] != i;
            seen[home] = i;
        }
    }
    a->rows[l] = (double)rows;
    free(seen);
    return STATUS_OK;
}

/* With owners the rows that leave them, per token and layer; else distinct ranks. */
static status measure(const problem *p, const plan *made, double *out)
{
    if (!cut_counts_owners(p)) {
        *out = score_ranks(p, made);
        return STATUS_OK;
    }
    double *rows = calloc((size_t)p->n_layers, sizeof *rows), sum = 0;
    if (!rows)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    status st = parallel_for(p->request->threads, p->n_layers, count_layer, &(counting){p, made, rows});
    for (int l = 0; l < p->n_layers; l++)
        sum += rows[l];
    free(rows);
    if (st == STATUS_OK)
        *out = sum / ((double)p->n_layers * (double)p->schedule->first[p->schedule->n_steps]);
    return st;
}

const solver solver_cut = {
    .name = "cut",
    .summary = "few ranks per token: swaps with exact gains and tabu search on the hypergraph of chosen sets",
    .paper = "connectivity of hypergraph partitioning (Catalyurek and Aykanat 1999), tabu search (Glover 1989)",
    .objective = "rows per token and layer that leave their owner; distinct ranks where owners are unknown or move",
    .flags = SOLVER_NEEDS_TRAFFIC,
    .solve = solve,
    .measure = measure,
};
