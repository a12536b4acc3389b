/* test_bounds_step.c - no plan replays quicker than the bound says: every plan of tiny problems, random plans of larger ones. */
#include "placement/planner/bounds.h"
#include "placement/planner/company_bound.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "tests/support.h"
#include "tests/support_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void choose_replay(uint64_t *seed, support_problem *s)
{
    s->request.replay.node_dedupe = support_below(seed, 2);
    s->request.replay.replicas = support_below(seed, 2) ? REPLICAS_BY_STEP : REPLICAS_BY_SHARE;
    s->request.replay.owners = support_below(seed, 4) ? OWNER_ROUND_ROBIN : OWNER_AFFINITY;
}

static plan_bounds bound_of(const problem *p)
{
    plan_bounds b = {0};
    assert_int_equal(bounds_step(p, 0, &b), STATUS_OK);
    assert_true(b.step_compute_us >= 0 && b.step_transfer_us >= 0);
    assert_true(fabs(b.step_us - b.step_compute_us - b.step_transfer_us) <= 1e-9 * b.step_us);
    assert_true(*b.remark);
    return b;
}

static void assert_below(const plan_bounds *b, const problem *p, const plan *made)
{
    replay_result r;
    assert_int_equal(replay_run(p->traffic, made, p->topology, &p->request->replay, &r), STATUS_OK);
    if (b->step_compute_us > r.compute_us || b->step_us > r.step_us)
        print_message("bound %.9g + %.9g, replayed %.9g + %.9g\n", b->step_compute_us, b->step_transfer_us, r.compute_us,
                      r.dispatch_us + r.combine_us);
    assert_true(b->step_compute_us <= r.compute_us);
    assert_true(b->step_transfer_us <= r.dispatch_us + r.combine_us);
    replay_result_clear(&r);
}

static void random_plans_lie_above(void **state)
{
    (void)state;
    uint64_t seed = 77;
    for (int round = 0; round < 250; round++) {
        support_problem s;
        support_random_problem(&seed, &(support_problem_size){.extra_slots = 3, .concurrency = 12, .even = round % 2}, &s);
        choose_replay(&seed, &s);
        plan_bounds b = bound_of(s.problem);
        for (int i = 0; i < 5; i++) {
            plan made;
            assert_int_equal(support_random_problem_plan(&seed, s.problem, true, &made), STATUS_OK);
            assert_below(&b, s.problem, &made);
            plan_clear(&made);
        }
        support_problem_clear(&s);
    }
}

/* ---- every way to fill one layer's slots ---- */

typedef struct {
    const problem *p;
    const plan_bounds *b;
    bool holds[5 * 4]; /* [experts][ranks] */
    int left[4];
    int n_plans;
} exhaustion;

static void fill(exhaustion *x, int expert)
{
    const problem *p = x->p;
    if (expert == p->n_experts) {
        int home[5];
        plan made;
        for (int e = 0; e < p->n_experts; e++)
            for (home[e] = 0; !x->holds[e * p->n_ranks + home[e]];)
                home[e]++;
        assert_int_equal(problem_plan_replicas(p, "test", home, x->holds, &made), STATUS_OK);
        assert_below(x->b, p, &made);
        plan_clear(&made);
        x->n_plans++;
        return;
    }
    for (unsigned set = 1; set < 1u << p->n_ranks; set++) {
        bool fits = true;
        for (int g = 0; g < p->n_ranks; g++)
            fits &= !(set >> g & 1) || x->left[g] > 0;
        for (int g = 0; g < p->n_ranks && fits; g++) {
            x->holds[expert * p->n_ranks + g] = set >> g & 1;
            x->left[g] -= set >> g & 1;
        }
        if (!fits)
            continue;
        fill(x, expert + 1);
        for (int g = 0; g < p->n_ranks; g++)
            x->left[g] += set >> g & 1;
    }
}

static void all_plans_lie_above(void **state)
{
    (void)state;
    uint64_t seed = 4;
    int n_plans = 0;
    for (int round = 0; round < 60; round++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){
                .layers = 1, .experts = 5, .ranks = 3, .sequences = 6, .tokens = 8, .concurrency = 5, .extra_slots = 1},
            &s);
        choose_replay(&seed, &s);
        plan_bounds b = bound_of(s.problem);
        exhaustion x = {.p = s.problem, .b = &b};
        memcpy(x.left, s.problem->slots, (size_t)s.problem->n_ranks * sizeof *x.left);
        fill(&x, 0);
        n_plans += x.n_plans;
        support_problem_clear(&s);
    }
    assert_true(n_plans > 500);
}

/* Two steps, four experts, two on a rank: in each step another pair is hot. Steps alone would say (10 + 0) and (10 + 0), but
 * whoever sits together must do so in both. */
static void one_partition_serves_all_steps(void **state)
{
    (void)state;
    const double cost[4][3] = {{10, 0, 10}, {10, 10, 0}, {0, 10, 0}, {0, 0, 10}}, floor[3] = {10, 10, 10};
    double bound;
    company_task t = {.n_steps = 3, .n_experts = 4, .company = 1, .cost = cost[0], .floor = floor, .rounds = 300};
    /* {0,1}: 20 + 10 + 10; {0,2}: 10 + 10 + 10; {0,3}: 10 + 20 + 20 */
    assert_int_equal(company_bound(&t, &bound), STATUS_OK);
    assert_true(bound <= 30 && bound >= 30 * (1 - 1e-6));
    const double clash[3][3] = {{10, 0, 10}, {10, 10, 0}, {0, 10, 10}}; /* every pair is hot together once */
    t.n_experts = 3;
    t.company = 2; /* all on one rank */
    t.cost = clash[0];
    assert_int_equal(company_bound(&t, &bound), STATUS_OK);
    assert_true(bound <= 60 && bound > 59.9);
    t.rounds = 0;
    assert_int_equal(company_bound(&t, &bound), STATUS_OK);
    assert_true(bound <= 30 && bound > 29.9);
}

/* Equal rows everywhere and one expert per rank: nothing is left to choose, and the bound of compute is what it costs. */
static void tight_where_there_is_no_choice(void **state)
{
    (void)state;
    uint64_t seed = 31;
    for (int round = 0; round < 20; round++) {
        support_problem s;
        support_random_problem(
            &seed,
            &(support_problem_size){
                .layers = 2, .experts = 4, .ranks = 1, .top_k = 2, .sequences = 8, .concurrency = 6, .exact = true, .even = true},
            &s);
        plan_bounds b = bound_of(s.problem);
        plan made;
        double us;
        assert_int_equal(support_random_problem_plan(&seed, s.problem, false, &made), STATUS_OK);
        assert_int_equal(score_step_us(s.problem, &made, &us), STATUS_OK);
        assert_true(b.step_us >= us * (1 - 1e-6));
        plan_clear(&made);
        support_problem_clear(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"random plans lie above it", random_plans_lie_above, NULL, NULL, NULL},
        {"tiny problems: every plan lies above it", all_plans_lie_above, NULL, NULL, NULL},
        {"one partition serves all steps", one_partition_serves_all_steps, NULL, NULL, NULL},
        {"one rank: the bound is what it costs", tight_where_there_is_no_choice, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
