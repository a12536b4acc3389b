/* test_solvers.c - what every solver in the table promises, on random problems and at the edges: a valid plan that keeps the room
 * and a slack, never worse than its seed, the same for the same seed and work, in time, and never below a bound. */
#include "placement/planner/bounds.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_instances.h"
#include "tests/support_problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SMALL_WORK = 20000 };

/* Sanitizers slow everything down many times, but not the clock. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
static const double grace = 15;
#else
static const double grace = 1;
#endif

/* A unit is a swap weighed or a pivot, and a pivot takes a thousand times as long. */
static int64_t small_work(const solver *s)
{
    static const char *const pivoting[] = {"ilp", "moetuner", "partition"};
    for (size_t i = 0; i < sizeof pivoting / sizeof *pivoting; i++)
        if (strcmp(s->name, pivoting[i]) == 0)
            return SMALL_WORK / 100;
    return SMALL_WORK;
}

static bool is_given_what_it_needs(const solver *s, const problem *p)
{
    return !((s->flags & SOLVER_NEEDS_TRAFFIC) && (!p->traffic || !p->schedule)) &&
           !((s->flags & SOLVER_NEEDS_NEXT_PAIRS) && !p->next_pairs) && !((s->flags & SOLVER_NEEDS_SAME_PAIRS) && !p->same_pairs);
}

/* What may be refused: a slack by those that know nothing of caps (or where only replicas could keep it), size by exact solvers.
 */
static bool may_refuse(const solver *s, const problem *p, status st)
{
    bool slack = p->request->slack >= 0 && ((s->flags & SOLVER_BASELINE) || p->request->extra_slots > 0);
    return (st == STATUS_BAD_INPUT && slack) || (st != STATUS_OK && (s->flags & SOLVER_EXACT_SMALL));
}

/* Runs it; false when it may refuse and did. */
static bool run(const solver *s, const problem *p, solver_report *report, plan *out)
{
    status st = solver_run(s, p, report, out);
    if (st != STATUS_OK && !may_refuse(s, p, st))
        print_message("%s: %s\n", s->name, status_message());
    assert_true(st == STATUS_OK || may_refuse(s, p, st));
    return st == STATUS_OK;
}

static void assert_valid(const problem *p, const plan *made)
{
    assert_int_equal(made->n_layers, p->n_layers);
    assert_int_equal(made->n_experts, p->n_experts);
    assert_int_equal(made->n_ranks, p->n_ranks);
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            int n = plan_n_copies(made, l, e);
            assert_true(n >= 1);
            for (int c = 0; c < n; c++) {
                assert_in_range(plan_copies(made, l, e)[c], 0, p->n_ranks - 1);
                for (int d = 0; d < c; d++)
                    assert_int_not_equal(plan_copies(made, l, e)[c], plan_copies(made, l, e)[d]);
            }
        }
    for (int g = 0; g < p->n_ranks; g++)
        assert_int_equal(made->node_of_rank[g], p->topology->node_of_rank[g]);
}

static bool same_plan(const plan *a, const plan *b)
{
    int n = a->n_layers * a->n_experts;
    return memcmp(a->first_copy, b->first_copy, ((size_t)n + 1) * sizeof(int)) == 0 &&
           memcmp(a->copy_ranks, b->copy_ranks, (size_t)a->first_copy[n] * sizeof(int)) == 0;
}

/* With 1 and 3 threads; then the other way round, so that what the first left behind does not matter. */
static void check_repeatable(const solver *s, support_problem *x, const plan *first)
{
    int threads = x->request.threads;
    for (int n = 3; n >= 1; n -= 2) {
        plan again = {0};
        solver_report report;
        x->request.threads = n;
        assert_true(run(s, x->problem, &report, &again));
        if (!same_plan(first, &again))
            print_message("%s: not the same plan with %d threads\n", s->name, n);
        assert_true(same_plan(first, &again));
        plan_clear(&again);
    }
    x->request.threads = threads;
}

static void check_measure(const solver *s, const problem *p, const solver_report *report, const plan *made)
{
    double measured;
    assert_int_equal(s->measure(p, made, &measured), STATUS_OK);
    assert_true(isfinite(measured));
    if (fabs(measured - report->objective) > 1e-9 * fmax(1, fabs(measured)))
        print_message("%s: says %.12g, measured %.12g\n", s->name, report->objective, measured);
    assert_true(fabs(measured - report->objective) <= 1e-9 * fmax(1, fabs(measured)));
    assert_false(report->bound > measured * (1 + 1e-9) + 1e-12); /* NAN: none */
}

static void check_bounds(const solver *s, const problem *p, const plan *made)
{
    plan_bounds b = {.balance = NAN, .flow_spectral = NAN};
    assert_int_equal(bounds_load(p, &b), STATUS_OK);
    assert_int_equal(bounds_spectral(p, 0, &b), STATUS_OK);
    if (!(s->flags & SOLVER_TOTALS)) { /* bounds hold for plans that keep every layer's room */
        assert_true(b.balance <= score_balance(p, made, NULL, NULL) * (1 + 1e-9));
        if (p->next_pairs)
            assert_true(b.flow_spectral <= score_flow(p, made) + 1e-9);
    }
    free(b.balance_of_layer);
}

static void check_seeded(const solver *s, support_problem *x, uint64_t *random)
{
    plan seed = {0}, made = {0};
    solver_report report;
    double before, after;
    assert_int_equal(support_random_problem_plan(random, x->problem, (s->flags & SOLVER_REPLICATES) != 0, &seed), STATUS_OK);
    bool valid = problem_check(x->problem, &seed, !(s->flags & SOLVER_TOTALS)) == STATUS_OK;
    x->request.seed = &seed;
    if (run(s, x->problem, &report, &made)) {
        assert_valid(x->problem, &made);
        assert_int_equal(s->measure(x->problem, &seed, &before), STATUS_OK);
        assert_int_equal(s->measure(x->problem, &made, &after), STATUS_OK);
        if (valid && after > before * (1 + 1e-9))
            print_message("%s: %.12g from a seed of %.12g\n", s->name, after, before);
        assert_true(!valid || after <= before * (1 + 1e-9));
    }
    x->request.seed = NULL;
    plan_clear(&seed);
    plan_clear(&made);
}

static void check_all(support_problem *x, uint64_t *random, bool thorough)
{
    for (const solver *const *s = solvers; *s; s++) {
        x->request.work = small_work(*s);
        plan made = {0};
        solver_report report;
        if (!is_given_what_it_needs(*s, x->problem) || !run(*s, x->problem, &report, &made))
            continue;
        assert_valid(x->problem, &made);
        check_measure(*s, x->problem, &report, &made);
        check_bounds(*s, x->problem, &made);
        if (thorough) {
            check_repeatable(*s, x, &made);
            check_seeded(*s, x, random);
        }
        plan_clear(&made);
    }
}

static void random_problems(void **state)
{
    (void)state;
    uint64_t random = 2024;
    support_problem_size sizes[] = {
        {.concurrency = 8, .even = true},
        {.concurrency = 8, .extra_slots = 2},
        {.concurrency = 8, .slack = true},
        {.concurrency = 8, .even = true, .slack = true, .extra_slots = 1},
        {.stats_only = true, .layers = 6, .experts = 24, .ranks = 8},
    };
    for (int i = 0; i < 25; i++) {
        support_problem x;
        support_random_problem(&random, &sizes[i % 5], &x);
        check_all(&x, &random, true);
        support_problem_clear(&x);
    }
}

/* One number at its edge, the rest small. */
static void edges(void **state)
{
    (void)state;
    uint64_t random = 77;
    support_problem_size sizes[] = {
        {.layers = 1, .experts = 8, .ranks = 4, .top_k = 2, .concurrency = 4, .exact = true},  /* one layer */
        {.layers = 3, .experts = 8, .ranks = 1, .top_k = 2, .concurrency = 4, .exact = true},  /* one rank */
        {.layers = 3, .experts = 3, .ranks = 7, .top_k = 2, .concurrency = 4, .exact = true},  /* more ranks than experts */
        {.layers = 3, .experts = 11, .ranks = 4, .top_k = 3, .concurrency = 4, .exact = true}, /* no divisor */
        {.layers = 3, .experts = 8, .ranks = 4, .top_k = 1, .concurrency = 4, .exact = true},  /* k = 1 */
        {.layers = 2, .experts = 4, .ranks = 2, .top_k = 4, .concurrency = 4, .exact = true},  /* every expert, every token */
        {.layers = 2, .experts = 2, .ranks = 2, .top_k = 1, .sequences = 1, .tokens = 1, .concurrency = 1, .exact = true},
    };
    for (size_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++) {
        support_problem x;
        support_problem_size size = sizes[i / 2];
        size.even = i % 2 == 0;
        support_random_problem(&random, &size, &x);
        check_all(&x, &random, true);
        support_problem_clear(&x);
    }
}

static void assert_in_time(const solver *s, double seconds, double limit)
{
    if (seconds > limit + grace)
        print_message("%s took %.2f s of %.2f\n", s->name, seconds, limit);
    assert_true(seconds <= limit + grace);
}

static void time_limits(void **state)
{
    (void)state;
    instance large;
    support_problem traced;
    uint64_t random = 5;
    instance_topics(40, 192, 48, 6, 48, 0.2, 1, &large);
    support_random_problem(&random,
                           &(support_problem_size){.layers = 6,
                                                   .experts = 64,
                                                   .ranks = 16,
                                                   .top_k = 6,
                                                   .sequences = 80,
                                                   .tokens = 100,
                                                   .concurrency = 32,
                                                   .even = true,
                                                   .exact = true},
                           &traced);
    double limit = 0.3;
    large.request.seconds = traced.request.seconds = limit;
    large.request.threads = traced.request.threads = 2;
    for (const solver *const *s = solvers; *s; s++) {
        const problem *p = is_given_what_it_needs(*s, &large.p) ? &large.p : traced.problem;
        plan made = {0};
        solver_report report;
        double start = clock_seconds();
        if (run(*s, p, &report, &made))
            assert_valid(p, &made);
        assert_in_time(*s, clock_seconds() - start, limit);
        plan_clear(&made);
    }
    instance_clear(&large);
    support_problem_clear(&traced);
}

/* Hidden blocks are found, and the spectral bound proves that nothing is better. */
static void planted_blocks(void **state)
{
    (void)state;
    static const int sizes[][4] = {{16, 64, 8, 2}, {8, 32, 4, 1}, {6, 48, 12, 3}};
    for (int i = 0; i < 3; i++) {
        instance x;
        plan_bounds b = {0};
        instance_planted(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], (uint64_t)i, &x);
        x.request.work = 200000;
        plan made = {0};
        solver_report report;
        double optimum = instance_planted_optimum(&x);
        assert_int_equal(solver_run(&solver_chain, &x.p, &report, &made), STATUS_OK);
        assert_int_equal(bounds_spectral(&x.p, 0, &b), STATUS_OK);
        assert_true(fabs(report.objective - optimum) < 1e-9);
        assert_true(b.flow_spectral <= optimum && b.flow_spectral > optimum * (1 - 1e-4));
        plan_clear(&made);
        instance_clear(&x);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"random problems: valid, room and slack kept, never worse than the seed, same on any threads, bounds hold",
         random_problems, NULL, NULL, NULL},
        {"one layer, one rank, more ranks than experts, no divisor, k = 1, k = E, one token: the same", edges, NULL, NULL, NULL},
        {"large problems stop at the time limit, to one second", time_limits, NULL, NULL, NULL},
        {"hidden blocks are found and proved best", planted_blocks, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("solvers", tests, NULL, NULL);
}
