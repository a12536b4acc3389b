/* From statistics, traffic and topology to a problem: counts as doubles, room per layer and rank, load caps, distances. */
#include "placement/planner/problem.h"
#include "placement/planner/assign.h"
#include "proto/hash.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_SLACK_PERCENT = 5 };

/* ---- counts ---- */

static size_t expert_cells(const problem *p)
{
    return (size_t)p->n_layers * (size_t)p->n_experts;
}

static size_t pair_cells(const problem *p)
{
    return (size_t)p->n_experts * (size_t)p->n_experts;
}

static void add_counts(double *into, const uint64_t *counts, size_t n)
{
    for (size_t i = 0; counts && i < n; i++)
        into[i] += (double)counts[i];
}

static void sum_stats(problem *p, const routing_stats *stats)
{
    size_t squares = pair_cells(p);
    for (int domain = 0; domain < routing_stats_shape(stats)->n_domains; domain++) {
        for (int phase = 0; phase < N_PHASES; phase++) {
            add_counts(p->load, routing_stats_tokens_per_expert(stats, domain, phase), expert_cells(p));
            if (p->next_pairs)
                add_counts(p->next_pairs, routing_stats_next_layer_pairs(stats, domain, phase),
                           (size_t)(p->n_layers - 1) * squares);
            if (p->same_pairs)
                add_counts(p->same_pairs, routing_stats_same_layer_pairs(stats, domain, phase), (size_t)p->n_layers * squares);
        }
    }
}

static void count_pairs(const uint16_t *from, const uint16_t *to, int k, int n_experts, double *pairs)
{
    for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++)
            if (from[i] != ROUTING_NO_EXPERT && to[j] != ROUTING_NO_EXPERT)
                pairs[(size_t)from[i] * (size_t)n_experts + to[j]] += 1;
}

static status count_layer(void *arg, int l)
{
    problem *p = arg;
    const traffic *t = p->traffic;
    for (int64_t token = 0; token < t->n_tokens; token++) {
        const uint16_t *here = traffic_experts(t, l, token);
        for (int j = 0; j < p->top_k; j++)
            if (here[j] != ROUTING_NO_EXPERT)
                p->load[problem_at(p, l, here[j])] += 1;
        if (p->same_pairs)
            count_pairs(here, here, p->top_k, p->n_experts, p->same_pairs + (size_t)l * pair_cells(p));
        if (p->next_pairs && l + 1 < p->n_layers)
            count_pairs(here, traffic_experts(t, l + 1, token), p->top_k, p->n_experts,
                        p->next_pairs + (size_t)l * pair_cells(p));
    }
    return STATUS_OK;
}

/* Statistics speak for P and R where both are given: they may have seen more. */
static status fill_counts(problem *p, bool pairs)
{
    const routing_stats *stats = p->request->stats;
    bool have_pairs = pairs && (stats ? routing_stats_has_pairs(stats) : true);
    p->load = calloc(expert_cells(p), sizeof *p->load);
    p->rows = calloc((size_t)p->n_layers, sizeof *p->rows);
    if (have_pairs) {
        p->next_pairs = calloc((size_t)p->n_layers * pair_cells(p), sizeof *p->next_pairs);
        p->same_pairs = calloc((size_t)p->n_layers * pair_cells(p), sizeof *p->same_pairs);
    }
    if (!p->load || !p->rows || (have_pairs && (!p->next_pairs || !p->same_pairs)))
        return status_fail(STATUS_NO_MEMORY, "no memory for the counts of %d layers of %d experts", p->n_layers, p->n_experts);
    if (stats)
        sum_stats(p, stats);
    else
        TRY(parallel_for(p->request->threads, p->n_layers, count_layer, p));
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++)
            p->rows[l] += p->load[problem_at(p, l, e)];
    p->fingerprint = hash_bytes(HASH_START, p->load, expert_cells(p) * sizeof *p->load);
    return STATUS_OK;
}

/* ---- room ---- */

static void set_shares(problem *p)
{
    double sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        sum += 1 / p->topology->row_us[g];
    for (int g = 0; g < p->n_ranks; g++)
        p->share[g] = 1 / p->topology->row_us[g] / sum;
}

/* Experts that rank g's byte budget holds, all layers together. */
static int64_t budget_experts(const problem *p, int g)
{
    const topology *t = p->topology;
    int64_t all = (int64_t)p->n_layers * p->n_experts,
            holds = t->expert_bytes[g] < 0 ? all : t->expert_bytes[g] / t->bytes_per_expert;
    return holds < all ? holds : all;
}

static status check_budgets(const problem *p)
{
    const topology *t = p->topology;
    int64_t all = (int64_t)p->n_layers * p->n_experts, sum = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        if (t->expert_bytes[g] >= 0 && t->bytes_per_expert <= 0)
            return status_fail(
                STATUS_BAD_INPUT,
                "topology: rank %d has an expert_bytes budget, but bytes_per_expert says nothing of an expert's size", g);
        if (t->expert_bytes[g] >= 0)
            sum += budget_experts(p, g);
        else
            sum += all;
    }
    if (sum >= all)
        return STATUS_OK;
    int64_t each = (all + p->n_ranks - 1) / p->n_ranks;
    return status_fail(
        STATUS_BAD_INPUT,
        "topology: the expert_bytes budgets hold %lld experts, but %d layers have %lld: %lld bytes more would do, or "
        "%lld bytes on every rank",
        (long long)sum, p->n_layers, (long long)all, (long long)((all - sum) * t->bytes_per_expert),
        (long long)(each * t->bytes_per_expert));
}

/* Room by budget alone: each rank's slots spread over the layers; who has a remainder goes on where the one before stopped, so
 * that layers differ by as little as can be. Returns whether every layer has room for all experts. */
static bool spread_budgets(const problem *p, int *slots)
{
    int at = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        int64_t holds = p->topology->expert_bytes[g] < 0 ? (int64_t)p->n_layers * p->n_experts : budget_experts(p, g);
        int each = (int)(holds / p->n_layers), rest = (int)(holds % p->n_layers);
        for (int l = 0; l < p->n_layers; l++)
            slots[l * p->n_ranks + g] = each;
        for (int i = 0; i < rest; i++, at = (at + 1) % p->n_layers)
            slots[at * p->n_ranks + g]++;
    }
    for (int l = 0; l < p->n_layers; l++) {
        int64_t sum = 0;
        for (int g = 0; g < p->n_ranks; g++)
            sum += slots[l * p->n_ranks + g];
        if (sum < p->n_experts)
            return false;
    }
    return true;
}

/* Cuts a layer's room to the smallest common size that still holds every expert, plus the extra slots. */
static void level_layer(const problem *p, int *slots)
{
    int size = (p->n_experts + p->n_ranks - 1) / p->n_ranks;
    for (;; size++) {
        int64_t sum = 0;
        for (int g = 0; g < p->n_ranks; g++)
            sum += slots[g] < size ? slots[g] : size;
        if (sum >= p->n_experts)
            break;
    }
    int most = size + p->request->extra_slots;
    most = most < p->n_experts ? most : p->n_experts;
    for (int g = 0; g < p->n_ranks; g++)
        slots[g] = slots[g] < most ? slots[g] : most;
}

static status set_room(problem *p)
{
    TRY(check_budgets(p));
    if (!spread_budgets(p, p->slots))
        return status_fail(
            STATUS_BAD_INPUT,
            "topology: the expert_bytes budgets hold every expert, but not in equal numbers per layer: a few experts "
            "more on some rank would do");
    for (int l = 0; l < p->n_layers; l++)
        level_layer(p, p->slots + (size_t)l * (size_t)p->n_ranks);
    for (int l = 0; l < p->n_layers; l++)
        for (int g = 0; g < p->n_ranks; g++)
            p->total_slots[g] += p->slots[l * p->n_ranks + g];
    return STATUS_OK;
}

/* ---- caps ---- */

typedef struct {
    problem *p;
    double *best; /* [n_layers] busiest over share by LPT and swaps */
} cap_search;

static status find_best(void *arg, int l)
{
    cap_search *c = arg;
    problem *p = c->p;
    int *home = malloc((size_t)p->n_experts * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", p->n_experts);
    c->best[l] = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share,
                            p->slots + (size_t)l * (size_t)p->n_ranks, home);
    free(home);
    if (c->best[l] < 0)
        return status_fail(STATUS_NO_MEMORY, "no memory to place %d experts on %d ranks", p->n_experts, p->n_ranks);
    return STATUS_OK;
}

static status refuse_slack(const problem *p, const double *best)
{
    int worst = 0;
    for (int l = 1; l < p->n_layers; l++)
        worst = best[l] > best[worst] ? l : worst;
    return status_fail(
        STATUS_BAD_INPUT,
        "slack %g%%: no plan found keeps layer %d within it (its busiest rank gets %.6gx its share at best); the smallest "
        "slack that would do is %.1f%%, unless extra slots let hot experts be replicated",
        p->request->slack * 100, p->layer_numbers[worst], best[worst], ceil((best[worst] - 1) * 1000 - 1e-6) / 10);
}

/* With extra slots hot experts may be replicated: what cannot be kept shows once a solver has tried. */
static status set_caps(problem *p)
{
    double slack = p->request->slack, *best = malloc((size_t)p->n_layers * sizeof *best);
    if (!best)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    status st = parallel_for(p->request->threads, p->n_layers, find_best, &(cap_search){p, best});
    for (int l = 0; st == STATUS_OK && l < p->n_layers; l++) {
        if (slack >= 0 && p->request->extra_slots == 0 && best[l] > (1 + slack) * (1 + 1e-9))
            st = refuse_slack(p, best);
        double times = slack >= 0 ? 1 + slack : (1 + DEFAULT_SLACK_PERCENT / 100.0) * (best[l] > 1 ? best[l] : 1);
        for (int g = 0; g < p->n_ranks; g++)
            p->cap[l * p->n_ranks + g] = times * p->share[g] * p->rows[l];
    }
    free(best);
    return st;
}

static void set_distances(problem *p)
{
    int n = p->n_ranks;
    double least = INFINITY;
    for (int g = 0; g < n; g++)
        for (int h = 0; h < n; h++)
            if (g != h && topology_us_per_byte(p->topology, g, h) < least)
                least = topology_us_per_byte(p->topology, g, h);
    for (int g = 0; g < n; g++)
        for (int h = 0; h < n; h++)
            p->distance[g * n + h] = g == h ? 0 : topology_us_per_byte(p->topology, g, h) / least;
}

/* ---- the whole ---- */

static status check_request(const problem_request *r)
{
    if (!r->stats && !r->traffic)
        return status_fail(STATUS_USAGE, "neither statistics nor a trace: nothing to plan from");
    if (!r->topology)
        return status_fail(STATUS_USAGE, "no topology: nothing to plan for");
    if (r->stats && r->traffic)
        TRY(routing_shape_same_model("statistics", routing_stats_shape(r->stats), "trace", &r->traffic->shape));
    if (r->extra_slots < 0)
        return status_fail(STATUS_USAGE, "extra slots: %d is negative", r->extra_slots);
    const routing_shape *s = r->traffic ? &r->traffic->shape : routing_stats_shape(r->stats);
    if (r->seed &&
        (r->seed->n_experts != s->n_experts || r->seed->n_layers != s->n_layers || r->seed->n_ranks != r->topology->n_ranks))
        return status_fail(STATUS_BAD_INPUT, "the seed plan is for %d layers of %d experts on %d ranks, not %d of %d on %d",
                           r->seed->n_layers, r->seed->n_experts, r->seed->n_ranks, s->n_layers, s->n_experts,
                           r->topology->n_ranks);
    return STATUS_OK;
}

static status allocate(problem *p)
{
    size_t ranks = (size_t)p->n_ranks, cells = (size_t)p->n_layers * ranks;
    p->share = calloc(ranks, sizeof *p->share);
    p->total_slots = calloc(ranks, sizeof *p->total_slots);
    p->slots = calloc(cells, sizeof *p->slots);
    p->cap = calloc(cells, sizeof *p->cap);
    p->distance = calloc(ranks * ranks, sizeof *p->distance);
    if (!p->share || !p->total_slots || !p->slots || !p->cap || !p->distance)
        return status_fail(STATUS_NO_MEMORY, "no memory for a problem of %d layers and %d ranks", p->n_layers, p->n_ranks);
    return STATUS_OK;
}

static status set_schedule(problem *p)
{
    replay_options o = p->request->replay;
    if (!p->traffic || o.concurrency <= 0)
        return STATUS_OK;
    if (o.owners == OWNER_AFFINITY)
        o.owners = OWNER_ROUND_ROBIN; /* affinity follows the plan, which is not there yet */
    TRY(replay_schedule_build(p->traffic, NULL, p->topology, &o, &p->own_schedule));
    p->schedule = &p->own_schedule;
    return STATUS_OK;
}

status problem_create(const problem_request *request, bool pairs, problem **out)
{
    TRY(check_request(request));
    problem *p = calloc(1, sizeof *p);
    if (!p)
        return status_fail(STATUS_NO_MEMORY, "no memory for a problem");
    const routing_shape *shape = request->traffic ? &request->traffic->shape : routing_stats_shape(request->stats);
    *p = (problem){.request = request,
                   .topology = request->topology,
                   .traffic = request->traffic,
                   .n_layers = shape->n_layers,
                   .n_experts = shape->n_experts,
                   .top_k = shape->top_k,
                   .layer_numbers = shape->layer_numbers,
                   .n_ranks = request->topology->n_ranks};
    status st;
    TRY_GOTO(allocate(p), out);
    set_shares(p);
    TRY_GOTO(set_room(p), out);
    TRY_GOTO(fill_counts(p, pairs), out);
    TRY_GOTO(set_caps(p), out);
    set_distances(p);
    st = set_schedule(p);
out:
    if (st == STATUS_OK)
        *out = p;
    else
        problem_destroy(p);
    return st;
}

void problem_destroy(problem *p)
{
    if (!p)
        return;
    replay_schedule_clear(&p->own_schedule);
    free(p->load);
    free(p->next_pairs);
    free(p->same_pairs);
    free(p->rows);
    free(p->share);
    free(p->slots);
    free(p->total_slots);
    free(p->cap);
    free(p->distance);
    free(p);
}
