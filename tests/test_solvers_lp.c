/* test_solvers_lp.c - solvers and bounds that lean on linear programmes, against exhaustive search and oracles of their own. */
#include "placement/planner/problem.h"
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"random problems have plans", random_problems_have_plans, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
