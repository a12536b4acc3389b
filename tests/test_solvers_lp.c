/* test_solvers_lp.c - solvers and bounds that lean on linear programmes, against exhaustive search and oracles of their own. */
#include "placement/planner/bounds.h"
#include "placement/planner/flow_cost.h"
#include "placement/planner/layer_ilp.h"
#include "placement/planner/moetuner_ilp.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "proto/clock.h"
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
        s.request.work = 50000;
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

/* More clusters than can be written down: a valid plan all the same, better than balance alone. */
static void partition_does_without_all_clusters(void **state)
{
    (void)state;
    uint64_t seed = 34;
    for (int round = 0; round < 6; round++) {
        support_problem s;
        support_random_problem(&seed,
                               &(support_problem_size){.layers = 2,
                                                       .experts = 40,
                                                       .ranks = 4,
                                                       .top_k = 4,
                                                       .sequences = 60,
                                                       .exact = true,
                                                       .extra_slots = 1,
                                                       .even = round % 2},
                               &s);
        s.request.work = 100000;
        solver_report report;
        double got = solve_by(&solver_partition, s.problem, &report), balanced;
        plan made;
        assert_int_equal(solver_run(&solver_lpt, s.problem, &report, &made), STATUS_OK);
        assert_int_equal(solver_partition.measure(s.problem, &made, &balanced), STATUS_OK);
        assert_true(got < balanced);
        plan_clear(&made);
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

/* Experts of hidden blocks choose each other alone: the blocks' plan is optimal, and b-matching proves it. */
static void matching_proves_a_planted_optimum(void **state)
{
    (void)state;
    enum { L = 3, E = 12, G = 4 };
    uint64_t seed = 44;
    for (int round = 0; round < 10; round++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){.layers = L, .experts = E, .ranks = G, .exact = true, .even = true, .stats_only = true}, &s);
        problem *p = s.problem;
        int home[L * E];
        support_random_home(&seed, p, home);
        for (int l = 0; l + 1 < L; l++)
            for (int i = 0; i < E; i++)
                for (int j = 0; j < E; j++)
                    p->next_pairs[(l * E + i) * E + j] =
                        home[l * E + i] == home[(l + 1) * E + j] ? 50 + support_below(&seed, 9) : support_below(&seed, 3);
        plan_bounds b = {0};
        assert_int_equal(bounds_matching(p, 20, &b), STATUS_OK);
        if (p->topology->n_nodes == 1)
            assert_true(fabs(b.flow_matching - flow_of(p, home)) < 1e-9);
        assert_true(b.flow_matching <= flow_of(p, home) + 1e-12);
        assert_true(b.flow_matching > 0.5 * flow_of(p, home));
        support_problem_clear(&s);
    }
}

/* ---- MoETuner ----------------------------------------------------------------------------------------------------------- */

static double busiest(const void *arg, const problem *p, int layer, const int *home)
{
    (void)arg;
    double worst = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        double rows = 0;
        int n = 0;
        for (int e = 0; e < p->n_experts; e++) {
            n += home[e] == g;
            rows += home[e] == g ? p->load[problem_at(p, layer, e)] : 0;
        }
        if (n == 0 && p->n_experts >= p->n_ranks)
            return HUGE_VAL; /* no cluster is empty */
        worst = fmax(worst, rows / (p->rows[layer] * p->share[g]));
    }
    return worst;
}

static void ilp_1_equals_exhaustive_search(void **state)
{
    (void)state;
    uint64_t seed = 51;
    for (int round = 0; round < 25; round++) {
        support_problem s;
        /* As many slots as experts: sizes are free. */
        support_random_problem(&seed, &(support_problem_size){.layers = 1, .experts = 8, .ranks = 4, .even = round % 2}, &s);
        problem *p = s.problem;
        for (int g = 0; g < p->n_ranks; g++)
            p->slots[g] = p->n_experts;
        lp_model *m;
        lp_result r;
        assert_int_equal(moetuner_ilp1_create(p, 0, &m), STATUS_OK);
        assert_int_equal(lp_solve(m, &(lp_options){0}, &r), STATUS_OK);
        assert_int_equal(r.outcome, LP_OPTIMAL);
        assert_true(fabs(r.objective - fmax(1, exhaustive_best(p, 0, false, busiest, NULL))) < 1e-6);
        lp_result_clear(&r);
        lp_destroy(m);
        support_problem_clear(&s);
    }
}

/* Random flows and links; some clusters are not allowed everywhere, but each always on the rank of its own number. */
typedef struct {
    double flow[3 * 16], us[16];
    bool allowed[4 * 16];
    cluster_order order;
} random_order;

static void make_order(uint64_t *seed, int n_layers, int n, random_order *r)
{
    for (int i = 0; i < 3 * 16; i++)
        r->flow[i] = support_below(seed, 1000) / 7.0;
    for (int g = 0; g < n; g++)
        for (int h = 0; h < n; h++)
            r->us[g * n + h] = g == h ? 0 : 0.1 * (1 + support_below(seed, 5));
    for (int l = 0; l < n_layers; l++)
        for (int c = 0; c < n; c++)
            for (int g = 0; g < n; g++)
                r->allowed[(l * n + c) * n + g] = c == g || support_below(seed, 5) > 0;
    r->order = (cluster_order){n_layers, n, r->flow, r->us, r->allowed};
}

static double try_orders(const cluster_order *o, int at, int *rank)
{
    if (at == o->n_layers * o->n)
        return cluster_order_cost(o, rank);
    double best = HUGE_VAL;
    int layer = at / o->n, c = at % o->n;
    for (int g = 0; g < o->n; g++) {
        bool taken = !o->allowed[at * o->n + g];
        for (int d = 0; d < c; d++)
            taken |= rank[layer * o->n + d] == g;
        if (taken)
            continue;
        rank[at] = g;
        best = fmin(best, try_orders(o, at + 1, rank));
    }
    return best;
}

static void ilp_2_equals_the_dynamic_programme_and_brute_force(void **state)
{
    (void)state;
    uint64_t seed = 52;
    static const int sizes[][2] = {{2, 2}, {4, 2}, {2, 3}, {3, 3}, {4, 3}, {2, 4}, {3, 4}, {4, 4}};
    for (int round = 0; round < 24; round++) {
        random_order r;
        int n_layers = sizes[round % 8][0], n = sizes[round % 8][1], rank[16], scratch[16];
        make_order(&seed, n_layers, n, &r);
        const cluster_order *o = &r.order;
        double best = try_orders(o, 0, scratch);
        for (int i = 0; i < n_layers * n; i++)
            rank[i] = i % n;
        assert_int_equal(cluster_order_exact(o, rank), STATUS_OK);
        assert_true(fabs(cluster_order_cost(o, rank) - best) < 1e-9);
        if (n_layers * n > 12 && round > 8)
            continue; /* the largest takes GLPK a second */
        lp_model *m;
        lp_result found;
        assert_true(moetuner_ilp2_possible(o));
        assert_int_equal(moetuner_ilp2_create(o, &m), STATUS_OK);
        double *start = calloc((size_t)lp_n_columns(m), sizeof *start);
        for (int i = 0; i < n_layers * n; i++)
            rank[i] = i % n;
        moetuner_ilp2_start(o, rank, start);
        assert_int_equal(lp_solve(m, &(lp_options){.start = start, .pseudocosts = true}, &found), STATUS_OK);
        assert_int_equal(found.outcome, LP_OPTIMAL);
        assert_true(fabs(found.objective / moetuner_scale(o) - best) < 1e-6 * best);
        for (int l = 0; l < n_layers; l++)
            moetuner_take(o, found.x + l * n * n, rank + l * n);
        assert_true(fabs(cluster_order_cost(o, rank) - best) < 1e-6 * best);
        free(start);
        lp_result_clear(&found);
        lp_destroy(m);
    }
}

static bool keeps_allowed(const cluster_order *o, const int *rank)
{
    for (int l = 0; l < o->n_layers; l++) {
        unsigned seen = 0;
        for (int c = 0; c < o->n; c++) {
            if (!o->allowed[(l * o->n + c) * o->n + rank[l * o->n + c]])
                return false;
            seen |= 1u << rank[l * o->n + c];
        }
        if (seen != (1u << o->n) - 1)
            return false;
    }
    return true;
}

static void the_beam_keeps_permutations_and_is_near_the_optimum(void **state)
{
    (void)state;
    uint64_t seed = 53;
    support_problem s;
    support_random_problem(&seed, &(support_problem_size){0}, &s);
    double beams = 0, bests = 0;
    for (int round = 0; round < 30; round++) {
        random_order r;
        make_order(&seed, 4, 4, &r);
        int rank[16], exact[16];
        for (int i = 0; i < 16; i++)
            rank[i] = exact[i] = i % 4;
        double before = cluster_order_cost(&r.order, rank);
        random_stream random = random_open(s.problem, (uint64_t)round);
        work_budget work = {.left = 1000000};
        assert_int_equal(cluster_order_beam(&r.order, &random, &work, rank), STATUS_OK);
        assert_int_equal(cluster_order_exact(&r.order, exact), STATUS_OK);
        assert_true(keeps_allowed(&r.order, rank) && keeps_allowed(&r.order, exact));
        assert_true(cluster_order_cost(&r.order, rank) <= before);
        beams += cluster_order_cost(&r.order, rank);
        bests += cluster_order_cost(&r.order, exact);
    }
    assert_true(beams >= bests && beams < 1.05 * bests);
    support_problem_clear(&s);
}

static void a_window_is_the_best_layer_between_its_neighbours(void **state)
{
    (void)state;
    uint64_t seed = 54;
    for (int round = 0; round < 30; round++) {
        random_order r;
        int rank[12], layer = round % 3;
        make_order(&seed, 3, 4, &r);
        for (int i = 0; i < 12; i++)
            rank[i] = i % 4;
        lp_model *m;
        lp_result found;
        double start[4 * 4 + 2];
        assert_int_equal(moetuner_window_create(&r.order, layer, rank, &m), STATUS_OK);
        moetuner_window_start(&r.order, layer, rank, start);
        assert_int_equal(lp_solve(m, &(lp_options){.start = start}, &found), STATUS_OK);
        assert_int_equal(found.outcome, LP_OPTIMAL);
        moetuner_take(&r.order, found.x, rank + layer * 4);
        double got = cluster_order_cost(&r.order, rank), best = got;
        bool only[4 * 16]; /* brute force over this layer alone */
        memcpy(only, r.allowed, sizeof only);
        for (int l = 0; l < 3; l++)
            for (int c = 0; c < 4 && l != layer; c++)
                for (int g = 0; g < 4; g++)
                    only[(l * 4 + c) * 4 + g] = rank[l * 4 + c] == g;
        r.order.allowed = only;
        int scratch[12];
        best = try_orders(&r.order, 0, scratch);
        assert_true(fabs(got - best) < 1e-6 * best);
        lp_result_clear(&found);
        lp_destroy(m);
    }
}

static void moetuner_keeps_totals_and_its_bound(void **state)
{
    (void)state;
    uint64_t seed = 55;
    for (int round = 0; round < 20; round++) {
        support_problem s;
        support_random_problem(&seed, &(support_problem_size){.ranks = 8, .slack = true, .extra_slots = 1, .even = round % 2},
                               &s);
        s.request.work = 100000;
        solver_report report;
        double got = solve_by(&solver_moetuner, s.problem, &report); /* solver_run checks totals and caps */
        assert_true(report.bound <= got);
        support_problem_clear(&s);
    }
}

/* ---- what every solver here promises -------------------------------------------------------------------------------------- */

static const solver *const mine[] = {&solver_partition, &solver_ilp, &solver_moetuner};
enum { N_MINE = sizeof mine / sizeof mine[0] };

static void the_same_work_gives_the_same_plan_on_any_number_of_threads(void **state)
{
    (void)state;
    uint64_t seed = 61;
    for (int round = 0; round < 4 * N_MINE; round++) {
        support_problem s;
        support_random_problem(&seed, &(support_problem_size){.layers = 4, .experts = 16, .ranks = 4, .exact = true}, &s);
        plan made[3];
        size_t size = problem_at(s.problem, s.problem->n_layers, 0) * sizeof(int);
        s.request.work = 20000;
        for (int i = 0; i < 3; i++) {
            s.request.threads = 1 + i;
            solver_report report;
            assert_int_equal(solver_run(mine[round % N_MINE], s.problem, &report, &made[i]), STATUS_OK);
            assert_false(report.out_of_time);
        }
        for (int i = 1; i < 3; i++)
            assert_memory_equal(made[0].copy_ranks, made[i].copy_ranks, size);
        for (int i = 0; i < 3; i++)
            plan_clear(&made[i]);
        support_problem_clear(&s);
    }
}

static void no_solver_is_worse_than_its_seed(void **state)
{
    (void)state;
    uint64_t seed = 62;
    for (int round = 0; round < 4 * N_MINE; round++) {
        support_problem s;
        plan start, made;
        solver_report report;
        support_random_problem(&seed, &(support_problem_size){.extra_slots = 1, .slack = true}, &s);
        assert_int_equal(support_random_problem_plan(&seed, s.problem, round % 2, &start), STATUS_OK);
        s.request.seed = &start;
        s.request.work = round % 3 ? 20000 : 1;
        const solver *by = mine[round % N_MINE];
        double before, after;
        assert_int_equal(solver_run(by, s.problem, &report, &made), STATUS_OK);
        assert_int_equal(by->measure(s.problem, &start, &before), STATUS_OK);
        assert_int_equal(by->measure(s.problem, &made, &after), STATUS_OK);
        assert_true(after <= before * (1 + 1e-12));
        plan_clear(&start);
        plan_clear(&made);
        support_problem_clear(&s);
    }
}

static void the_time_limit_is_kept(void **state)
{
    (void)state;
    uint64_t seed = 63;
    for (int i = 0; i < N_MINE; i++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){
                .layers = 12, .experts = 64, .ranks = 8, .top_k = 4, .sequences = 60, .exact = true, .even = true},
            &s);
        s.request.seconds = 0.5;
        double before = clock_seconds();
        plan made;
        solver_report report;
        assert_int_equal(solver_run(mine[i], s.problem, &report, &made), STATUS_OK);
        assert_true(clock_seconds() - before < 1.5);
        plan_clear(&made);
        support_problem_clear(&s);
    }
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
        plan_bounds b = {.ranks_per_token = NAN, .flow_matching = NAN};
        assert_int_equal(bounds_ranks(s.problem, 20, &b), STATUS_OK);
        assert_int_equal(bounds_matching(s.problem, round % 4 ? 20 : 1e-9, &b), STATUS_OK); /* now and then without GLPK */
        assert_true(b.ranks_per_token >= 0);
        for (int i = 0; i < 2; i++) {
            plan made;
            assert_int_equal(support_random_problem_plan(&seed, s.problem, i, &made), STATUS_OK);
            assert_true(b.ranks_per_token <= score_ranks(s.problem, &made));
            assert_true(b.flow_matching >= 0 && b.flow_matching <= score_flow(s.problem, &made));
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
        {"partition does without all clusters", partition_does_without_all_clusters, NULL, NULL, NULL},
        {"the bound on ranks holds and is near", the_bound_on_ranks_holds_and_is_near, NULL, NULL, NULL},
        {"a layer's programme is a transport where loads do not bind", a_layers_programme_is_a_transport_where_loads_do_not_bind,
         NULL, NULL, NULL},
        {"a layer's programme keeps caps and finds the best that does",
         a_layers_programme_keeps_caps_and_finds_the_best_that_does, NULL, NULL, NULL},
        {"ilp proves tiny problems", ilp_proves_tiny_problems, NULL, NULL, NULL},
        {"matching proves a planted optimum", matching_proves_a_planted_optimum, NULL, NULL, NULL},
        {"ILP 1 equals exhaustive search", ilp_1_equals_exhaustive_search, NULL, NULL, NULL},
        {"ILP 2 equals the dynamic programme and brute force", ilp_2_equals_the_dynamic_programme_and_brute_force, NULL, NULL,
         NULL},
        {"the beam keeps permutations and is near the optimum", the_beam_keeps_permutations_and_is_near_the_optimum, NULL, NULL,
         NULL},
        {"a window is the best layer between its neighbours", a_window_is_the_best_layer_between_its_neighbours, NULL, NULL,
         NULL},
        {"moetuner keeps totals and its bound", moetuner_keeps_totals_and_its_bound, NULL, NULL, NULL},
        {"the same work gives the same plan on any number of threads", the_same_work_gives_the_same_plan_on_any_number_of_threads,
         NULL, NULL, NULL},
        {"no solver is worse than its seed", no_solver_is_worse_than_its_seed, NULL, NULL, NULL},
        {"the time limit is kept", the_time_limit_is_kept, NULL, NULL, NULL},
        {"no plan beats a bound", no_plan_beats_a_bound, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
