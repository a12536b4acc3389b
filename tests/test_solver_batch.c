/* test_solver_batch.c - the prices that `batch` searches by are those of the replay, and its search finds the best there is. */
#include "placement/planner/batch_replicas.h"
#include "placement/planner/batch_sample.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "placement/replica_split.h"
#include "tests/support.h"
#include "tests/support_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Start-up times are not priced by batch_layer. */
static void make_problem(uint64_t *seed, const support_problem_size *size, support_problem *out)
{
    support_random_problem(seed, size, out);
    for (int c = 0; c < N_LINK_CLASSES; c++)
        out->topology.link[c].us = 0;
    out->request.replay.node_dedupe = support_below(seed, 2);
}

static double replayed_us(const problem *p, int layer, const int *home)
{
    plan made;
    double us;
    int *homes = calloc(problem_at(p, p->n_layers, 0), sizeof *homes); /* other layers do not matter */
    assert_non_null(homes);
    memcpy(homes + problem_at(p, layer, 0), home, (size_t)p->n_experts * sizeof *home);
    assert_int_equal(problem_plan(p, "test", homes, &made), STATUS_OK);
    assert_int_equal(replay_layer_us(p->traffic, p->schedule, &made, layer, p->topology, &p->request->replay, &us), STATUS_OK);
    plan_clear(&made);
    free(homes);
    return us;
}

static void assert_near(double a, double b)
{
    if (fabs(a - b) > 1e-4 * fabs(b))
        print_message("%.9g is not %.9g\n", a, b);
    assert_true(fabs(a - b) <= 1e-4 * fabs(b));
}

static void prices_are_the_replays(void **state)
{
    (void)state;
    uint64_t seed = 11;
    for (int round = 0; round < 150; round++) {
        support_problem s;
        batch_layer *b;
        make_problem(&seed, &(support_problem_size){.ranks = 7, .concurrency = 12}, &s);
        int layer = support_below(&seed, s.problem->n_layers),
            *home = calloc(problem_at(s.problem, s.problem->n_layers, 0), sizeof *home);
        int *layer_home = home + problem_at(s.problem, layer, 0);
        assert_non_null(home);
        support_random_home(&seed, s.problem, home);
        assert_int_equal(batch_layer_create(s.problem, s.problem->schedule, layer, s.problem->schedule, &b), STATUS_OK);
        assert_near(batch_layer_set(b, layer_home), replayed_us(s.problem, layer, layer_home));
        /* what thousands of swaps and moves have come to is what their result costs */
        work_budget work = {.left = 2000};
        random_stream random = random_open(s.problem, 1);
        double before = batch_layer_set(b, layer_home), after = batch_layer_search(b, &random, &work, layer_home);
        assert_true(after <= before);
        assert_near(after, replayed_us(s.problem, layer, layer_home));
        assert_near(batch_layer_set(b, layer_home), after);
        batch_layer_destroy(b);
        free(home);
        support_problem_clear(&s);
    }
}

/* ---- exhaustive search ---- */

typedef struct {
    batch_layer *b;
    int home[16], left[16];
    double best;
} exhaustion;

static void exhaust(exhaustion *x, int expert)
{
    if (expert == x->b->n_experts) {
        double us = batch_layer_set(x->b, x->home);
        x->best = us < x->best ? us : x->best;
        return;
    }
    for (int g = 0; g < x->b->n_ranks; g++) {
        if (x->left[g] == 0)
            continue;
        x->home[expert] = g;
        x->left[g]--;
        exhaust(x, expert + 1);
        x->left[g]++;
    }
}

static void tiny_layers_are_solved(void **state)
{
    (void)state;
    uint64_t seed = 5;
    int missed = 0;
    for (int round = 0; round < 120; round++) {
        support_problem s;
        batch_layer *b;
        make_problem(
            &seed,
            &(support_problem_size){.layers = 1, .experts = 7, .ranks = 3, .concurrency = 6, .extra_slots = round % 3 == 0}, &s);
        assert_int_equal(batch_layer_create(s.problem, s.problem->schedule, 0, round % 2 ? s.problem->schedule : NULL, &b),
                         STATUS_OK);
        exhaustion x = {.b = b, .best = HUGE_VAL};
        memcpy(x.left, s.problem->slots, (size_t)b->n_ranks * sizeof *x.left);
        exhaust(&x, 0);
        work_budget work = {.left = 1 << 20};
        random_stream random = random_open(s.problem, 7);
        int home[16];
        support_random_home(&seed, s.problem, home);
        batch_layer_set(b, home);
        double found = batch_layer_search(b, &random, &work, home);
        assert_true(found >= x.best * (1 - 1e-6));
        missed += found > x.best * (1 + 1e-6);
        batch_layer_destroy(b);
        support_problem_clear(&s);
    }
    assert_int_equal(missed, 0);
}

/* ---- replicas ---- */

static void hold_plan(const plan *p, int layer, bool *holds)
{
    memset(holds, 0, (size_t)p->n_experts * (size_t)p->n_ranks * sizeof *holds);
    for (int e = 0; e < p->n_experts; e++)
        for (int c = 0; c < plan_n_copies(p, layer, e); c++)
            holds[e * p->n_ranks + plan_copies(p, layer, e)[c]] = true;
}

/* Mean over steps of what no split of whole rows goes below. */
static double split_bound(const problem *p, const plan *made, int layer)
{
    const replay_schedule *steps = p->schedule;
    double sum = 0, *rows = calloc((size_t)p->n_experts, sizeof *rows);
    assert_non_null(rows);
    for (int64_t s = 0; s < steps->n_steps; s++) {
        double bound;
        memset(rows, 0, (size_t)p->n_experts * sizeof *rows);
        for (int64_t i = steps->first[s]; i < steps->first[s + 1]; i++)
            for (int j = 0; j < p->top_k; j++) {
                int e = traffic_experts(p->traffic, layer, steps->token[i])[j];
                if (e != ROUTING_NO_EXPERT)
                    rows[e] += 1;
            }
        assert_int_equal(replica_split_bound(made, layer, p->topology->row_us, p->topology->expert_us, rows, &bound), STATUS_OK);
        sum += bound;
    }
    free(rows);
    return sum / (double)steps->n_steps;
}

static void splits_lie_above_their_bound(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 100; round++) {
        support_problem s;
        plan made;
        batch_layer *b;
        double us;
        make_problem(&seed, &(support_problem_size){.extra_slots = 3, .concurrency = 12}, &s);
        const problem *p = s.problem;
        bool *holds = calloc((size_t)p->n_experts * (size_t)p->n_ranks, sizeof *holds);
        assert_non_null(holds);
        assert_int_equal(support_random_problem_plan(&seed, p, true, &made), STATUS_OK);
        assert_int_equal(batch_layer_create(p, p->schedule, 0, NULL, &b), STATUS_OK);
        hold_plan(&made, 0, holds);
        assert_int_equal(batch_replicas_us(b, holds, &us), STATUS_OK);
        assert_true(us >= split_bound(p, &made, 0) * (1 - 1e-4));
        batch_layer_destroy(b);
        plan_clear(&made);
        free(holds);
        support_problem_clear(&s);
    }
}

/* Copies are never worse than none by the search's own price, homes stay among the holders, slots are kept. */
static void replicas_help(void **state)
{
    (void)state;
    uint64_t seed = 8;
    for (int round = 0; round < 60; round++) {
        support_problem s;
        batch_layer *b;
        double before, after;
        make_problem(&seed, &(support_problem_size){.layers = 1, .experts = 10, .extra_slots = 2, .concurrency = 12}, &s);
        const problem *p = s.problem;
        int home[16], held[16] = {0};
        bool holds[16 * 16] = {0};
        support_random_home(&seed, p, home);
        for (int e = 0; e < p->n_experts; e++)
            holds[e * p->n_ranks + home[e]] = true;
        assert_int_equal(batch_layer_create(p, p->schedule, 0, NULL, &b), STATUS_OK);
        work_budget work = {.left = 1 << 20};
        random_stream random = random_open(p, 2);
        assert_int_equal(batch_replicas_us(b, holds, &before), STATUS_OK);
        assert_near(before, batch_layer_set(b, home));
        assert_int_equal(batch_replicas_search(b, &random, &work, home, holds, &after), STATUS_OK);
        assert_true(after <= before * (1 + 1e-6));
        for (int e = 0; e < p->n_experts; e++) {
            assert_true(holds[e * p->n_ranks + home[e]]);
            for (int g = 0; g < p->n_ranks; g++)
                held[g] += holds[e * p->n_ranks + g];
        }
        for (int g = 0; g < p->n_ranks; g++)
            assert_in_range(held[g], 0, p->slots[g]);
        batch_layer_destroy(b);
        support_problem_clear(&s);
    }
}

/* ---- samples ---- */

static void samples_are_steps_of_the_traffic(void **state)
{
    (void)state;
    uint64_t seed = 21;
    for (int round = 0; round < 60; round++) {
        support_problem s;
        replay_schedule a, b;
        make_problem(&seed, &(support_problem_size){.concurrency = 12}, &s);
        int64_t places = s.request.replay.concurrency;
        assert_int_equal(batch_sample(s.problem, 200, 2000, &a), STATUS_OK);
        assert_int_equal(batch_sample(s.problem, 200, 2000, &b), STATUS_OK);
        assert_in_range(a.n_steps, 1, 200);
        assert_int_equal(a.first[a.n_steps], a.n_steps * places);
        for (int64_t i = 0; i < a.first[a.n_steps]; i++) {
            assert_in_range(a.token[i], 0, s.traffic.n_tokens - 1);
            assert_int_equal(a.owner[i], i % places % s.problem->n_ranks);
        }
        assert_memory_equal(a.token, b.token, (size_t)a.first[a.n_steps] * sizeof *a.token);
        replay_schedule_clear(&a);
        replay_schedule_clear(&b);
        support_problem_clear(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a layer's price is the replay's, after any number of swaps", prices_are_the_replays, NULL, NULL, NULL},
        {"tiny layers: what exhaustive search finds", tiny_layers_are_solved, NULL, NULL, NULL},
        {"a split never looks quicker than its bound", splits_lie_above_their_bound, NULL, NULL, NULL},
        {"replicas are kept in their slots and never make it slower", replicas_help, NULL, NULL, NULL},
        {"sampled steps are places filled with the traffic's tokens, always the same", samples_are_steps_of_the_traffic, NULL,
         NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
