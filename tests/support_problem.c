#include "tests/support_problem.h"

#include "placement/planner/assign.h"
#include "tests/support.h"
#include "tests/support_routing.h"
#include "tests/support_traffic.h"

#include <stdlib.h>
#include <string.h>

static int up_to(uint64_t *seed, const support_problem_size *size, int limit, int fallback, int least)
{
    int most = limit ? limit : fallback;
    return size->exact || most <= least ? most : least + support_below(seed, most - least + 1);
}

/* Sums all tokens of the traffic, domain by domain. */
static void count(const traffic *t, routing_stats **out)
{
    const routing_shape *shape = &t->shape;
    uint16_t *row = calloc((size_t)shape->n_layers * (size_t)shape->top_k, sizeof *row);
    assert_non_null(row);
    assert_int_equal(routing_stats_create(shape, true, out), STATUS_OK);
    for (int s = 0; s < t->n_sequences; s++)
        for (int64_t i = t->first_token[s]; i < t->first_token[s + 1]; i++) {
            for (int l = 0; l < shape->n_layers; l++)
                memcpy(row + (size_t)l * (size_t)shape->top_k, traffic_experts(t, l, i), (size_t)shape->top_k * sizeof *row);
            assert_int_equal(routing_stats_add_row(*out, row, t->domain[s], t->phase[i]), STATUS_OK);
        }
    free(row);
}

/* Some ranks get a budget: a share of all experts, at least what keeps every layer's room. */
static void set_budgets(uint64_t *seed, topology *t, int n_experts, int n_layers)
{
    t->bytes_per_expert = 1000;
    int each = (n_experts + t->n_ranks - 1) / t->n_ranks;
    for (int g = 0; g < t->n_ranks; g++)
        if (support_below(seed, 2))
            t->expert_bytes[g] = (int64_t)(each + support_below(seed, 2)) * n_layers * 1000 + support_below(seed, 1000);
        else
            t->expert_bytes[g] = -1;
}

static void make_topology(uint64_t *seed, const support_problem_size *size, int n_ranks, const routing_shape *shape,
                          topology *out)
{
    if (size->even) {
        int n_nodes = n_ranks % 2 == 0 ? 1 + support_below(seed, 2) : 1;
        assert_int_equal(topology_uniform(n_ranks, n_nodes, out), STATUS_OK);
        return;
    }
    assert_int_equal(support_random_topology(seed, n_ranks, out), STATUS_OK);
    for (int g = 0; g < n_ranks; g++)
        out->expert_bytes[g] = -1;
    if (support_below(seed, 3) == 0)
        set_budgets(seed, out, shape->n_experts, shape->n_layers);
}

/* The least slack that LPT keeps, and some. */
static double possible_slack(uint64_t *seed, support_problem *s)
{
    problem *p;
    assert_int_equal(problem_create(&s->request, false, &p), STATUS_OK);
    double worst = 1;
    int *home = calloc((size_t)p->n_experts, sizeof *home);
    assert_non_null(home);
    for (int l = 0; l < p->n_layers; l++) {
        double at = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share,
                               p->slots + (size_t)l * (size_t)p->n_ranks, home);
        worst = at > worst ? at : worst;
    }
    free(home);
    problem_destroy(p);
    return worst - 1 + 0.01 + support_below(seed, 30) * 0.01;
}

void support_random_problem(uint64_t *seed, const support_problem_size *size, support_problem *out)
{
    support_problem *s = out; /* the problem points into it: it must not be moved */
    *s = (support_problem){0};
    int n_layers = up_to(seed, size, size->layers, 4, 1), n_experts = up_to(seed, size, size->experts, 16, 2);
    int top_k = up_to(seed, size, size->top_k, 4, 1), n_ranks = up_to(seed, size, size->ranks, 5, 1);
    routing_shape shape = support_routing_shape(n_layers, n_experts, top_k < n_experts ? top_k : n_experts, 2);
    int n_sequences = up_to(seed, size, size->sequences, 12, 1);
    assert_int_equal(support_random_traffic(seed, &shape, n_sequences, size->tokens ? size->tokens : 20,
                                            support_below(seed, 2) ? 10 : 0, 0, &s->traffic),
                     STATUS_OK);
    make_topology(seed, size, n_ranks, &s->traffic.shape, &s->topology);
    if (size->stats_only || support_below(seed, 2))
        count(&s->traffic, &s->stats);
    s->request = (problem_request){.stats = s->stats,
                                   .traffic = size->stats_only ? NULL : &s->traffic,
                                   .topology = &s->topology,
                                   .slack = -1,
                                   .random_seed = support_random(seed),
                                   .threads = 1 + support_below(seed, 2)};
    if (size->extra_slots > 0)
        s->request.extra_slots = support_below(seed, size->extra_slots + 1);
    if (size->concurrency > 0 && !size->stats_only) {
        int most = size->concurrency < n_sequences ? size->concurrency : n_sequences;
        s->request.replay.concurrency = 1 + support_below(seed, most);
    }
    if (size->slack && support_below(seed, 2))
        s->request.slack = possible_slack(seed, s);
    assert_int_equal(problem_create(&s->request, true, &s->problem), STATUS_OK);
}

void support_problem_clear(support_problem *s)
{
    problem_destroy(s->problem);
    routing_stats_destroy(s->stats);
    traffic_clear(&s->traffic);
    topology_clear(&s->topology);
    *s = (support_problem){0};
}

/* ---- plans ---- */

static bool keeps_caps(const problem *p, int layer, const int *home)
{
    for (int g = 0; g < p->n_ranks; g++) {
        double rows = 0;
        for (int e = 0; e < p->n_experts; e++)
            rows += home[e] == g ? p->load[problem_at(p, layer, e)] : 0;
        if (rows > p->cap[layer * p->n_ranks + g])
            return false;
    }
    return true;
}

static void random_layer(uint64_t *seed, const problem *p, int layer, int *home)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    if (p->request->slack < 0) {
        int *left = calloc((size_t)p->n_ranks, sizeof *left);
        assert_non_null(left);
        memcpy(left, slots, (size_t)p->n_ranks * sizeof *left);
        for (int e = 0; e < p->n_experts; e++) {
            do
                home[e] = support_below(seed, p->n_ranks);
            while (left[home[e]] == 0);
            left[home[e]]--;
        }
        free(left);
        return;
    }
    assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, layer, 0), p->share, slots, home);
    for (int i = 0; i < 4 * p->n_experts; i++) {
        int a = support_below(seed, p->n_experts), b = support_below(seed, p->n_experts), kept = home[a];
        home[a] = home[b];
        home[b] = kept;
        if (keeps_caps(p, layer, home))
            continue;
        home[b] = home[a];
        home[a] = kept;
    }
}

void support_random_home(uint64_t *seed, const problem *p, int *home)
{
    for (int l = 0; l < p->n_layers; l++)
        random_layer(seed, p, l, home + problem_at(p, l, 0));
}

status support_random_problem_plan(uint64_t *seed, const problem *p, bool replicas, plan *out)
{
    size_t cells = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    int *home = calloc(cells, sizeof *home);
    bool *holds = calloc(cells * ranks, sizeof *holds);
    assert_true(home && holds);
    support_random_home(seed, p, home);
    for (size_t i = 0; i < cells; i++)
        holds[i * ranks + (size_t)home[i]] = true;
    for (int l = 0; replicas && p->request->slack < 0 && l < p->n_layers; l++)
        for (int i = 0; i < p->n_ranks; i++) {
            int g = support_below(seed, p->n_ranks), e = support_below(seed, p->n_experts), used = 0;
            for (int f = 0; f < p->n_experts; f++)
                used += holds[problem_at(p, l, f) * ranks + (size_t)g];
            if (used < p->slots[l * p->n_ranks + g])
                holds[problem_at(p, l, e) * ranks + (size_t)g] = true;
        }
    status st = problem_plan_replicas(p, "random", home, holds, out);
    free(home);
    free(holds);
    return st;
}
