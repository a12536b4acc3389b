/* test_solvers_lp.c - solvers and bounds that lean on linear programmes, against exhaustive search and oracles of their own. */
#include "placement/planner/bounds.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "tests/support.h"
#include "tests/support_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void random_problems_have_plans(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (int round = 0; round < 300; round++) {
        support_problem s;
        plan made;
        support_random_problem(&seed, &(support_problem_size){.extra_slots = 2, .slack = true}, &s);
        assert_int_equal(support_random_problem_plan(&seed, s.problem, round % 2, &made), STATUS_OK);
        assert_int_equal(problem_check(s.problem, &made, true), STATUS_OK);
        plan_clear(&made);
        support_problem_clear(&s);
    }
}

/* ---- exhaustive search over one layer -------------------------------------------------------------------------------------- */

typedef double home_cost(const void *arg, const problem *p, int layer, const int *home);
typedef struct {
    const problem *p;
    int layer;
    bool caps; /* the problem's, slack given or not */
    home_cost *cost;
    const void *arg;
    int home[16], left[16];
    double rows[16], best;
} exhaustion;

static void exhaust(exhaustion *x, int expert)
{
    const problem *p = x->p;
    if (expert == p->n_experts) {
        double cost = x->cost(x->arg, p, x->layer, x->home);
        x->best = cost < x->best ? cost : x->best;
        return;
    }
    double load = p->load[problem_at(p, x->layer, expert)];
    for (int g = 0; g < p->n_ranks; g++) {
        double cap = p->cap[x->layer * p->n_ranks + g] * (1 + 1e-9);
        if (x->left[g] == 0 || (x->caps && x->rows[g] + load > cap))
            continue;
        x->home[expert] = g;
        x->left[g]--;
        x->rows[g] += load;
        exhaust(x, expert + 1);
        x->left[g]++;
        x->rows[g] -= load;
    }
}

static double exhaustive_best(const problem *p, int layer, bool caps, home_cost *cost, const void *arg)
{
    exhaustion x = {.p = p, .layer = layer, .caps = caps, .cost = cost, .arg = arg, .best = HUGE_VAL};
    for (int g = 0; g < p->n_ranks; g++)
        x.left[g] = p->slots[layer * p->n_ranks + g];
    exhaust(&x, 0);
    return x.best;
}

/* ---- distinct ranks ----------------------------------------------------------------------------------------------------- */

static double meetings(const void *arg, const problem *p, int layer, const int *home)
{
    (void)arg;
    double sum = 0;
    for (int64_t t = 0; t < p->traffic->n_tokens; t++) {
        unsigned seen = 0;
        for (int j = 0; j < p->top_k; j++) {
            int e = traffic_experts(p->traffic, layer, t)[j];
            if (e != ROUTING_NO_EXPERT)
                seen |= 1u << home[e];
        }
        sum += __builtin_popcount(seen);
    }
    return sum;
}

static double solve_by(const solver *s, const problem *p, solver_report *report)
{
    plan made;
    assert_int_equal(solver_run(s, p, report, &made), STATUS_OK);
    double objective;
    assert_int_equal(s->measure(p, &made, &objective), STATUS_OK);
    plan_clear(&made);
    return objective;
}

static void partition_finds_the_fewest_ranks(void **state)
{
    (void)state;
    uint64_t seed = 31;
    for (int round = 0; round < 40; round++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){.layers = 2, .experts = 8, .ranks = 4, .extra_slots = 1, .slack = true, .even = round % 2},
            &s);
        const problem *p = s.problem;
        solver_report report;
        double got = solve_by(&solver_partition, p, &report), best = 0;
        for (int l = 0; l < p->n_layers; l++)
            best += exhaustive_best(p, l, true, meetings, NULL);
        best /= (double)p->traffic->n_tokens * p->n_layers;
        assert_true(best < HUGE_VAL);
        assert_true(fabs(got - best) < 1e-9);
        assert_true(report.bound <= best && report.bound > best - 1e-9); /* so small that it is proved */
        support_problem_clear(&s);
    }
}

static void the_bound_on_ranks_holds_and_is_near(void **state)
{
    (void)state;
    uint64_t seed = 32;
    double bounds = 0, bests = 0;
    for (int round = 0; round < 40; round++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){.layers = 2, .experts = 8, .ranks = 4, .extra_slots = 1, .slack = true, .even = round % 2},
            &s);
        const problem *p = s.problem;
        double bound[2];
        bool proved[2];
        assert_int_equal(bounds_ranks_of_layers(p, 20, bound, proved), STATUS_OK);
        for (int l = 0; l < p->n_layers; l++) {
            double best = exhaustive_best(p, l, p->request->slack >= 0, meetings, NULL);
            assert_true(bound[l] <= best);
            bounds += bound[l];
            bests += best;
        }
        support_problem_clear(&s);
    }
    assert_true(bounds > 0.9 * bests);
}

/* ---- every bound, every plan -------------------------------------------------------------------------------------------- */

static void no_plan_beats_a_bound(void **state)
{
    (void)state;
    uint64_t seed = 33;
    for (int round = 0; round < 1000; round++) {
        support_problem s;
        support_random_problem(
            &seed, &(support_problem_size){.layers = 2, .experts = 13, .ranks = 5, .top_k = 5, .extra_slots = 2, .slack = true},
            &s);
        plan_bounds b = {.ranks_per_token = NAN};
        assert_int_equal(bounds_ranks(s.problem, 20, &b), STATUS_OK);
        assert_true(b.ranks_per_token >= 0);
        for (int i = 0; i < 2; i++) {
            plan made;
            assert_int_equal(support_random_problem_plan(&seed, s.problem, i, &made), STATUS_OK);
            assert_true(b.ranks_per_token <= score_ranks(s.problem, &made));
            plan_clear(&made);
        }
        support_problem_clear(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"random problems have plans", random_problems_have_plans, NULL, NULL, NULL},
        {"partition finds the fewest ranks", partition_finds_the_fewest_ranks, NULL, NULL, NULL},
        {"the bound on ranks holds and is near", the_bound_on_ranks_holds_and_is_near, NULL, NULL, NULL},
        {"no plan beats a bound", no_plan_beats_a_bound, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
