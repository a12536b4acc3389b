/* test_solver_auto.c - the portfolio is never worse than what it is made of, and says who won. */
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "tests/support.h"
#include "tests/support_problem.h"

#include <math.h>
#include <string.h>

/* Those whose plan does not depend on how much work they get. */
static const solver *const quick[] = {&solver_contiguous, &solver_lpt, &solver_eplb, &solver_eplb_apart, &solver_craft};

static void never_worse_than_a_member(void **state)
{
    (void)state;
    uint64_t seed = 41;
    for (int round = 0; round < 40; round++) {
        support_problem s;
        plan made = {0};
        solver_report report;
        support_random_problem(
            &seed, &(support_problem_size){.concurrency = 10, .extra_slots = 2, .slack = true, .stats_only = round % 4 == 0}, &s);
        s.request.work = 20000;
        s.request.replay.owners = round % 3 ? OWNER_ROUND_ROBIN : OWNER_AFFINITY;
        status st = solver_run(&solver_auto, s.problem, &report, &made);
        if (st == STATUS_OK) {
            assert_non_null(strstr(report.remark, s.problem->traffic ? "of the step" : "step_us is unknown"));
            for (size_t i = 0; i < sizeof quick / sizeof *quick; i++) {
                plan other = {0};
                solver_report ignored;
                double us;
                if (solver_run(quick[i], s.problem, &ignored, &other) != STATUS_OK)
                    continue;
                if (problem_check(s.problem, &other, true) == STATUS_OK) {
                    assert_int_equal(solver_auto.measure(s.problem, &other, &us), STATUS_OK);
                    assert_true(report.objective <= us * (1 + 1e-9));
                }
                plan_clear(&other);
            }
        } else {
            assert_true(s.request.slack >= 0); /* that only other replicas could keep */
        }
        plan_clear(&made);
        support_problem_clear(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"never worse than a member, and says what won", never_worse_than_a_member, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
