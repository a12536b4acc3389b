/* How steps go under a plan: means over the last steps from counters that only rise. */
#include "cluster/plan_meter.h"
#include "tests/support.h"

#include <math.h>

enum { RANKS = 4 };

static double now, compute[RANKS], lateness[RANKS];
static uint64_t bytes[3];
static plan_meter meter;

static int set_up(void **state)
{
    (void)state;
    now = 100;
    for (int r = 0; r < RANKS; r++)
        compute[r] = 1000 + r, lateness[r] = 50;
    bytes[0] = bytes[1] = bytes[2] = 1000000;
    return plan_meter_reset(&meter, RANKS) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    plan_meter_clear(&meter);
    return 0;
}

/* A step of 10 ms with 8 rows, in which rank 1 computes for `busy` seconds and the others for 2 ms. */
static void step(double busy, bool computing_is_known)
{
    Convoke__Control__Report r = CONVOKE__CONTROL__REPORT__INIT;
    double load[2] = {1.5, 1.3};
    for (int k = 0; k < RANKS; k++)
        compute[k] += k == 1 ? busy : 0.002;
    lateness[1] += busy - 0.002;
    bytes[0] += 999;
    bytes[1] += 80;
    bytes[2] += 160;
    now += 0.02; /* half of the time nothing runs */
    r.step_seconds = 0.01;
    r.prefill_rows = 5;
    r.decode_rows = 3;
    r.n_lateness_of_rank = RANKS;
    r.lateness_of_rank = lateness;
    if (computing_is_known) {
        r.n_compute_seconds_of_rank = RANKS;
        r.compute_seconds_of_rank = compute;
    }
    r.n_link_bytes = 3;
    r.link_bytes = bytes;
    r.n_load_max_over_mean = 2;
    r.load_max_over_mean = load;
    plan_meter_note(&meter, &r, now);
}

static bool is(double value, double expected)
{
    return fabs(value - expected) <= 1e-9 * fabs(expected) + 1e-12;
}

static void means_are_per_step(void **state)
{
    (void)state;
    plan_measure m = plan_meter_read(&meter);
    assert_true(m.steps == 0 && m.step_seconds == 0);
    step(0.006, true); /* where counting begins: what came before is not ours */
    assert_int_equal(plan_meter_read(&meter).steps, 0);
    for (int i = 0; i < 100; i++)
        step(0.006, true);
    m = plan_meter_read(&meter);
    assert_int_equal(m.steps, 100);
    assert_true(is(m.step_seconds, 0.01));
    assert_true(is(m.rows_per_step, 8));
    assert_true(fabs(m.rows_per_second - 400) < 1e-6);
    assert_true(fabs(m.excess_seconds - 0.003) < 1e-9); /* 6 ms, and the mean is 3 */
    assert_true(is(m.link_bytes, 30));                  /* what stays on a rank goes over no link */
    assert_true(is(m.balance, 1.4));
}

static void lateness_stands_in_for_computing(void **state)
{
    (void)state;
    step(0.006, false);
    for (int i = 0; i < 100; i++)
        step(0.006, false);
    assert_true(fabs(plan_meter_read(&meter).excess_seconds - 0.003) < 1e-9);
}

static void the_past_is_forgotten(void **state)
{
    (void)state;
    for (int i = 0; i < 3 * PLAN_METER_STEPS; i++)
        step(0.02, true);
    for (int i = 0; i < 2 * PLAN_METER_STEPS + 1; i++)
        step(0.002, true);
    plan_measure m = plan_meter_read(&meter);
    assert_true(m.steps <= 2 * PLAN_METER_STEPS);
    assert_true(fabs(m.excess_seconds) < 1e-9);
    assert_true(plan_meter_reset(&meter, RANKS));
    assert_int_equal(plan_meter_read(&meter).steps, 0);
}

static void steps_without_rows_do_not_count(void **state)
{
    (void)state;
    Convoke__Control__Report idle = CONVOKE__CONTROL__REPORT__INIT;
    idle.step_seconds = 5;
    step(0.006, true);
    step(0.006, true);
    plan_meter_note(&meter, &idle, now + 1);
    plan_measure m = plan_meter_read(&meter);
    assert_int_equal(m.steps, 1);
    assert_true(is(m.step_seconds, 0.01));
}

int main(void)
{
#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }
    const struct CMUnitTest tests[] = {
        TEST("means are per step, from where counting began", means_are_per_step),
        TEST("where computing is not known, lateness says the same", lateness_stands_in_for_computing),
        TEST("the past is forgotten", the_past_is_forgotten),
        TEST("steps without rows do not count", steps_without_rows_do_not_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
