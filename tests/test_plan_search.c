/* test_plan_search.c - what searches for plans are built from: exact transport, costs beside neighbouring layers, gains on token
 * sets, replicas kept apart; and that bounds are below what any plan scores. Each against a slow count of its own. */
#include "placement/planner/bounds.h"
#include "placement/planner/chain.h"
#include "placement/planner/cluster.h"
#include "placement/planner/cut.h"
#include "placement/planner/replicate.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "placement/planner/transport.h"
#include "tests/support.h"
#include "tests/support_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double uniform(uint64_t *random)
{
    return (double)(support_random(random) >> 11) * 0x1p-53;
}

/* ---- transport ---- */

static double cheapest(int n_items, int n_ranks, const double *cost, int *slots, int item)
{
    if (item == n_items)
        return 0;
    double best = INFINITY;
    for (int g = 0; g < n_ranks; g++) {
        if (slots[g] == 0)
            continue;
        slots[g]--;
        best = fmin(best, cost[item * n_ranks + g] + cheapest(n_items, n_ranks, cost, slots, item + 1));
        slots[g]++;
    }
    return best;
}

static void transport_is_exact(void **state)
{
    (void)state;
    uint64_t random = 1;
    for (int i = 0; i < 300; i++) {
        int n_items = 1 + support_below(&random, 7), n_ranks = 1 + support_below(&random, 4), slots[4], left[4] = {0}, rank[7];
        int room = 0;
        double cost[28], total;
        for (int k = 0; k < n_items * n_ranks; k++)
            cost[k] = i % 3 == 0 ? support_below(&random, 3) : uniform(&random) - 0.3;
        for (int g = 0; g < n_ranks; g++)
            room += slots[g] = support_below(&random, 4);
        status st = transport_solve(n_items, n_ranks, cost, slots, rank, &total);
        assert_int_equal(st, room < n_items ? STATUS_BAD_INPUT : STATUS_OK);
        if (st != STATUS_OK)
            continue;
        double sum = 0;
        memcpy(left, slots, sizeof slots);
        for (int k = 0; k < n_items; k++) {
            assert_true(left[rank[k]]-- > 0);
            sum += cost[k * n_ranks + rank[k]];
        }
        assert_true(fabs(sum - total) < 1e-12);
        assert_true(fabs(total - cheapest(n_items, n_ranks, cost, slots, 0)) < 1e-9);
    }
}

static void clusters_have_their_sizes_and_find_blocks(void **state)
{
    (void)state;
    enum { ITEMS = 24, BLOCKS = 6 };
    uint64_t random = 3;
    double rows[ITEMS * ITEMS];
    int block[ITEMS], cluster[ITEMS], sizes[BLOCKS] = {4, 4, 4, 4, 4, 4};
    for (int i = 0; i < ITEMS; i++)
        block[i] = i % BLOCKS;
    for (int i = 0; i < ITEMS; i++)
        for (int j = 0; j < ITEMS; j++)
            rows[i * ITEMS + j] = (block[i] == block[j]) + 0.3 * uniform(&random);
    assert_int_equal(cluster_rows(ITEMS, ITEMS, rows, BLOCKS, sizes, cluster), STATUS_OK);
    for (int i = 0; i < ITEMS; i++)
        for (int j = 0; j < ITEMS; j++)
            assert_int_equal(cluster[i] == cluster[j], block[i] == block[j]);
    int uneven[3] = {1, 20, 3}, count[3] = {0};
    assert_int_equal(cluster_rows(ITEMS, ITEMS, rows, 3, uneven, cluster), STATUS_OK);
    for (int i = 0; i < ITEMS; i++)
        count[cluster[i]]++;
    assert_memory_equal(count, uneven, sizeof count);
}

/* ---- chain ---- */

static double flow_of(const problem *p, const int *home)
{
    plan made = {0};
    assert_int_equal(problem_plan(p, "tried", home, &made), STATUS_OK);
    double flow = score_flow(p, &made);
    plan_clear(&made);
    return flow;
}

static void layer_costs_are_what_flow_changes_by(void **state)
{
    (void)state;
    uint64_t random = 5;
    for (int i = 0; i < 40; i++) {
        support_problem x;
        support_random_problem(&random, &(support_problem_size){.layers = 5, .ranks = 6, .even = i % 2 == 0}, &x);
        const problem *p = x.problem;
        int *home = calloc(problem_at(p, p->n_layers, 0), sizeof *home);
        chain c;
        support_random_home(&random, p, home);
        assert_int_equal(chain_open(p, home, &c), STATUS_OK);
        double flow = flow_of(p, home);
        assert_true(fabs(chain_flow(&c) - flow) < 1e-9);
        for (int l = 0; l < p->n_layers; l++) {
            chain_layer y;
            int e = support_below(&random, p->n_experts), to = support_below(&random, p->n_ranks), from;
            assert_int_equal(chain_layer_open(&c, l, true, true, &y), STATUS_OK);
            from = y.home[e];
            y.home[e] = to;
            double change = y.cost[e * p->n_ranks + to] - y.cost[e * p->n_ranks + from];
            assert_true(fabs(flow_of(p, home) - flow - change) < 1e-9);
            y.home[e] = from;
            chain_layer_close(&y);
        }
        assert_int_equal(chain_relabel(&c), STATUS_OK);
        assert_true(flow_of(p, home) <= flow + 1e-9);
        chain_close(&c);
        free(home);
        support_problem_clear(&x);
    }
}

/* ---- cut ---- */

static void assert_same_tables(const cut *c, const int *home)
{
    const problem *p = c->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    cut fresh;
    assert_int_equal(cut_open(p, c->layer, &fresh), STATUS_OK);
    cut_place(&fresh, home);
    assert_int_equal(fresh.cost, c->cost);
    assert_memory_equal(fresh.degree, c->degree, n * sizeof *c->degree);
    assert_memory_equal(fresh.alone, c->alone, n * sizeof *c->alone);
    assert_memory_equal(fresh.present, c->present, n * ranks * sizeof *c->present);
    assert_memory_equal(fresh.pair, c->pair, n * n * sizeof *c->pair);
    assert_memory_equal(fresh.count, c->count, ranks * sizeof *c->count);
    cut_close(&fresh);
}

static void change_at_random(cut *c, uint64_t *random)
{
    const problem *p = c->p;
    int e = support_below(random, p->n_experts), f = support_below(random, p->n_experts), g = support_below(random, p->n_ranks);
    int64_t before = c->cost, gain;
    if (support_below(random, 2) && c->home[e] != c->home[f]) {
        gain = cut_swap_gain(c, e, f);
        cut_swap(c, e, f);
    } else if (c->home[e] != g) {
        gain = cut_move_gain(c, e, g);
        cut_move(c, e, g);
    } else
        return;
    assert_int_equal(c->cost, before - gain);
    assert_int_equal(c->cost, cut_cost(c, c->home));
}

static void gains_on_token_sets_are_exact(void **state)
{
    (void)state;
    uint64_t random = 9;
    for (int i = 0; i < 40; i++) {
        support_problem x;
        support_random_problem(&random, &(support_problem_size){.layers = 2, .top_k = 6, .concurrency = i % 2 ? 6 : 0}, &x);
        const problem *p = x.problem;
        int *home = calloc(problem_at(p, p->n_layers, 0), sizeof *home);
        cut c;
        support_random_home(&random, p, home);
        assert_int_equal(cut_open(p, 0, &c), STATUS_OK);
        cut_place(&c, home);
        for (int k = 0; k < 30; k++)
            change_at_random(&c, &random);
        memcpy(home, c.home, (size_t)p->n_experts * sizeof *home);
        assert_same_tables(&c, home);
        cut_close(&c);
        free(home);
        support_problem_clear(&x);
    }
}

/* What a layer's edges cost is what the plan's score says of its tokens. */
static void edges_cost_what_tokens_cost(void **state)
{
    (void)state;
    uint64_t random = 11;
    for (int i = 0; i < 30; i++) {
        support_problem x;
        support_random_problem(&random, &(support_problem_size){.layers = 3, .concurrency = i % 2 ? 6 : 0}, &x);
        const problem *p = x.problem;
        int *home = calloc(problem_at(p, p->n_layers, 0), sizeof *home);
        double sum = 0, measured;
        plan made = {0};
        support_random_home(&random, p, home);
        assert_int_equal(problem_plan(p, "tried", home, &made), STATUS_OK);
        for (int l = 0; l < p->n_layers; l++) {
            cut c;
            assert_int_equal(cut_open(p, l, &c), STATUS_OK);
            sum += (double)cut_cost(&c, home + problem_at(p, l, 0));
            for (int k = 0; k < c.n_edges && !cut_counts_owners(p); k++) /* distinct ranks, the first among them */
                sum += c.top_k > 0 && c.pins[(size_t)k * (size_t)c.top_k] != ROUTING_NO_EXPERT ? c.weight[k] : 0;
            cut_close(&c);
        }
        double tokens = cut_counts_owners(p) ? (double)p->schedule->first[p->schedule->n_steps] : (double)p->traffic->n_tokens;
        assert_int_equal(solver_cut.measure(p, &made, &measured), STATUS_OK);
        assert_true(fabs(measured - sum / (tokens * p->n_layers)) < 1e-9);
        plan_clear(&made);
        free(home);
        support_problem_clear(&x);
    }
}

/* ---- replicas ---- */

static void replicas_fill_the_room_apart(void **state)
{
    (void)state;
    uint64_t random = 13;
    for (int i = 0; i < 100; i++) {
        support_problem x;
        support_random_problem(&random, &(support_problem_size){.layers = 1, .ranks = 6, .even = i % 2 == 0, .extra_slots = 3},
                               &x);
        const problem *p = x.problem;
        size_t cells = (size_t)p->n_experts * (size_t)p->n_ranks;
        int *home = calloc((size_t)p->n_experts, sizeof *home), held = 0, room = 0;
        bool *holds = calloc(cells, sizeof *holds);
        double worst, most = 0;
        assert_int_equal(replicate_layer(p, 0, p->slots, true, home, holds, &worst), STATUS_OK);
        for (int g = 0; g < p->n_ranks; g++) {
            double rows = 0;
            int here = 0;
            for (int e = 0; e < p->n_experts; e++) {
                int copies = 0;
                for (int h = 0; h < p->n_ranks; h++)
                    copies += holds[e * p->n_ranks + h];
                assert_true(copies >= 1 && holds[e * p->n_ranks + home[e]]);
                here += holds[e * p->n_ranks + g];
                rows += holds[e * p->n_ranks + g] ? p->load[e] / copies : 0;
            }
            assert_true(here <= p->slots[g]);
            held += here;
            room += p->slots[g] < p->n_experts ? p->slots[g] : p->n_experts;
            most = fmax(most, rows / p->share[g] / p->rows[0]);
        }
        assert_true(fabs(most - worst) < 1e-6 * worst);
        assert_true(i % 2 == 1 || held == room); /* on ranks alike, every place is used */
        free(home);
        free(holds);
        support_problem_clear(&x);
    }
}

/* ---- bounds ---- */

static void bounds_are_below_every_plan(void **state)
{
    (void)state;
    uint64_t random = 17;
    for (int i = 0; i < 1000; i++) {
        support_problem x;
        support_random_problem(&random,
                               &(support_problem_size){.even = i % 2 == 0, .extra_slots = i % 3, .layers = 3, .experts = 10}, &x);
        plan made = {0};
        plan_bounds b = {.balance = NAN, .flow_spectral = NAN};
        assert_int_equal(support_random_problem_plan(&random, x.problem, i % 5 < 2, &made), STATUS_OK);
        assert_int_equal(bounds_load(x.problem, &b), STATUS_OK);
        assert_int_equal(bounds_spectral(x.problem, 0, &b), STATUS_OK);
        assert_true(b.balance <= score_balance(x.problem, &made, NULL, NULL) * (1 + 1e-9));
        assert_true(b.flow_spectral <= score_flow(x.problem, &made) + 1e-9);
        assert_true(b.balance >= 1);
        free(b.balance_of_layer);
        plan_clear(&made);
        support_problem_clear(&x);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"transport: the cheapest of all assignments, or no room", transport_is_exact, NULL, NULL, NULL},
        {"clusters have their sizes and find blocks", clusters_have_their_sizes_and_find_blocks, NULL, NULL, NULL},
        {"a layer's costs are what the flow changes by, and relabelling never raises it", layer_costs_are_what_flow_changes_by,
         NULL, NULL, NULL},
        {"gains on token sets are exact, and tables stay what a fresh count gives", gains_on_token_sets_are_exact, NULL, NULL,
         NULL},
        {"edges cost what tokens cost, with owners and without", edges_cost_what_tokens_cost, NULL, NULL, NULL},
        {"replicas fill the room, two copies never meet", replicas_fill_the_room_apart, NULL, NULL, NULL},
        {"bounds of load and flow are below every plan, on 1,000 problems", bounds_are_below_every_plan, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("plan search", tests, NULL, NULL);
}
