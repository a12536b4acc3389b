/* test_solvers_lp.c - solvers and bounds that lean on linear programmes, against exhaustive search and oracles of their own. */
#include "placement/planner/bounds.h"
#include "placement/planner/flow_cost.h"
#include "placement/planner/layer_ilp.h"
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

/* ---- R-flow ------------------------------------------------------------------------------------------------------------- */

/* The cheapest way to put experts into slots, loads aside: experts one after another, over how full each rank is. */
static double transport_optimum(const problem *p, int layer, const double *cost)
{
    int n_states = 1, full[8];
    for (int g = 0; g < p->n_ranks; g++) {
        full[g] = p->slots[layer * p->n_ranks + g];
        n_states *= full[g] + 1;
    }
    double *best = malloc((size_t)n_states * sizeof *best), least = HUGE_VAL;
    assert_non_null(best);
    for (int state = 0; state < n_states; state++) {
        int count = 0;
        for (int g = 0, rest = state; g < p->n_ranks; rest /= full[g] + 1, g++)
            count += rest % (full[g] + 1);
        best[state] = state ? HUGE_VAL : 0;
        for (int g = 0, step = 1, rest = state; g < p->n_ranks; rest /= full[g] + 1, step *= full[g] + 1, g++)
            if (rest % (full[g] + 1) > 0 && count <= p->n_experts)
                best[state] = fmin(best[state], best[state - step] + cost[(count - 1) * p->n_ranks + g]);
        if (count == p->n_experts)
            least = fmin(least, best[state]);
    }
    free(best);
    return least;
}

static void a_layers_programme_is_a_transport_where_loads_do_not_bind(void **state)
{
    (void)state;
    uint64_t seed = 41;
    for (int round = 0; round < 30; round++) {
        support_problem s;
        support_random_problem(&seed, &(support_problem_size){.layers = 1, .experts = 24, .ranks = 4, .extra_slots = 2}, &s);
        const problem *p = s.problem;
        double cost[24 * 4], cap[4], x[24 * 4];
        int home[24];
        for (int i = 0; i < p->n_experts * p->n_ranks; i++)
            cost[i] = support_below(&seed, 1000) / 1000.0;
        for (int g = 0; g < p->n_ranks; g++)
            cap[g] = p->rows[0] + 1;
        lp_model *m;
        lp_result r;
        assert_int_equal(layer_ilp_create(p, 0, cost, cap, &m), STATUS_OK);
        support_random_home(&seed, p, home);
        layer_ilp_start(p, home, x);
        assert_int_equal(lp_solve(m, &(lp_options){.start = x}, &r), STATUS_OK);
        assert_int_equal(r.outcome, LP_OPTIMAL);
        double best = transport_optimum(p, 0, cost), sum = 0;
        assert_true(fabs(r.objective / LAYER_ILP_SCALE - best) < 1e-6);
        layer_ilp_take(p, r.x, home);
        for (int e = 0; e < p->n_experts; e++)
            sum += cost[e * p->n_ranks + home[e]];
        assert_true(fabs(sum - best) < 1e-6);
        lp_result_clear(&r);
        lp_destroy(m);
        support_problem_clear(&s);
    }
}

static double linear_cost(const void *arg, const problem *p, int layer, const int *home)
{
    (void)layer;
    const double *cost = arg;
    double sum = 0;
    for (int e = 0; e < p->n_experts; e++)
        sum += cost[e * p->n_ranks + home[e]];
    return sum;
}

static void a_layers_programme_keeps_caps_and_finds_the_best_that_does(void **state)
{
    (void)state;
    uint64_t seed = 42;
    for (int round = 0; round < 30; round++) {
        support_problem s;
        support_random_problem(&seed, &(support_problem_size){.layers = 1, .experts = 8, .ranks = 4, .extra_slots = 1}, &s);
        const problem *p = s.problem;
        double cost[8 * 4];
        for (int i = 0; i < p->n_experts * p->n_ranks; i++)
            cost[i] = support_below(&seed, 1000) / 1000.0;
        lp_model *m;
        lp_result r;
        assert_int_equal(layer_ilp_create(p, 0, cost, p->cap, &m), STATUS_OK);
        assert_int_equal(lp_solve(m, &(lp_options){.cuts = round % 2}, &r), STATUS_OK);
        assert_int_equal(r.outcome, LP_OPTIMAL);
        assert_true(fabs(r.objective / LAYER_ILP_SCALE - exhaustive_best(p, 0, true, linear_cost, cost)) < 1e-6);
        lp_result_clear(&r);
        lp_destroy(m);
        support_problem_clear(&s);
    }
}

/* Every way to place a layer, then the cheapest path through the layers: an exact search of its own. */
enum { MOST_WAYS = 300 };
typedef struct {
    int n, home[MOST_WAYS][8];
} ways;

static double note_way(const void *arg, const problem *p, int layer, const int *home)
{
    (void)layer;
    ways *w = *(ways *const *)arg;
    if (w->n < MOST_WAYS)
        memcpy(w->home[w->n], home, (size_t)p->n_experts * sizeof *home);
    w->n++;
    return 0;
}

typedef double step_cost(const problem *p, int layer, const int *from, const int *to);

static double flow_step(const problem *p, int layer, const int *from, const int *to)
{
    double far = 0, all = 0;
    for (int i = 0; i < p->n_experts; i++)
        for (int j = 0; j < p->n_experts; j++) {
            double flow = p->next_pairs[((size_t)layer * (size_t)p->n_experts + (size_t)i) * (size_t)p->n_experts + (size_t)j];
            all += flow;
            far += flow * p->distance[from[i] * p->n_ranks + to[j]];
        }
    return all > 0 ? far / all / (p->n_layers - 1) : 0;
}

/* NAN: too many ways. */
static double cheapest_path(const problem *p, step_cost *cost)
{
    ways *w = calloc((size_t)p->n_layers, sizeof *w);
    double best[2][MOST_WAYS] = {{0}}, least = HUGE_VAL;
    assert_non_null(w);
    bool few = true;
    for (int l = 0; l < p->n_layers; l++) {
        ways *at = &w[l];
        exhaustive_best(p, l, true, note_way, &at);
        few = few && w[l].n <= MOST_WAYS;
    }
    for (int l = 1; few && l < p->n_layers; l++)
        for (int b = 0; b < w[l].n; b++) {
            best[l % 2][b] = HUGE_VAL;
            for (int a = 0; a < w[l - 1].n; a++)
                best[l % 2][b] = fmin(best[l % 2][b], best[(l - 1) % 2][a] + cost(p, l - 1, w[l - 1].home[a], w[l].home[b]));
        }
    for (int b = 0; few && b < w[p->n_layers - 1].n; b++)
        least = fmin(least, best[(p->n_layers - 1) % 2][b]);
    free(w);
    return few ? least : NAN;
}

static void ilp_proves_tiny_problems(void **state)
{
    (void)state;
    uint64_t seed = 43;
    int compared = 0, proved = 0;
    for (int round = 0; round < 60; round++) {
        support_problem s;
        support_random_problem(
            &seed, &(support_problem_size){.layers = 3, .experts = 6, .ranks = 3, .even = round % 3, .sequences = 40}, &s);
        const problem *p = s.problem;
        double best = p->n_layers > 1 ? cheapest_path(p, flow_step) : 0;
        solver_report report;
        double got = solve_by(&solver_ilp, p, &report);
        if (!isnan(best)) {
            compared++;
            assert_true(got >= best - 1e-9);
            if (joint_ilp_possible(p)) {
                assert_true(fabs(got - best) < 1e-6);
                assert_true(report.bound <= best + 1e-6);
                proved += report.bound > best - 1e-6;
            }
        }
        support_problem_clear(&s);
    }
    assert_true(compared > 40 && proved > 20);
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
        {"a layer's programme is a transport where loads do not bind", a_layers_programme_is_a_transport_where_loads_do_not_bind,
         NULL, NULL, NULL},
        {"a layer's programme keeps caps and finds the best that does",
         a_layers_programme_keeps_caps_and_finds_the_best_that_does, NULL, NULL, NULL},
        {"ilp proves tiny problems", ilp_proves_tiny_problems, NULL, NULL, NULL},
        {"no plan beats a bound", no_plan_beats_a_bound, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
