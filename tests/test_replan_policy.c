/* When a plan is asked for, how long the pause after an attempt is, and when a plan is worth its move: pure functions. */
#include "cluster/replan_policy.h"
#include "tests/support.h"

#include <math.h>

static replan_limits limits(void)
{
    return (replan_limits){.max_balance = 1.1,
                           .max_drift = 0.1,
                           .pause_seconds = 60,
                           .longest_pause = 1000,
                           .min_gain = 0.01,
                           .payback_seconds = 600};
}

/* A busy, sure sight of an imbalance. */
static replan_sight sight(void)
{
    return (replan_sight){.now = 1000,
                          .n_ranks = 4,
                          .ready = true,
                          .tokens = 1e5,
                          .balance = 1.4,
                          .balance_error = 0.01,
                          .drift = 0.01,
                          .drift_error = 0.001};
}

static replan_verdict judge(const replan_sight *s)
{
    replan_limits l = limits();
    replan_history h = {0};
    return replan_judge(s, &h, &l);
}

/* ---- when ---- */

static void plans_for_a_reason(void **state)
{
    (void)state;
    replan_sight s = sight();
    assert_int_equal(judge(&s), REPLAN_FOR_BALANCE);
    s.balance = 1.05;
    assert_int_equal(judge(&s), REPLAN_FINE);
    s.drift = 0.2;
    assert_int_equal(judge(&s), REPLAN_FOR_DRIFT);
    s.drift = -1; /* unknown */
    assert_int_equal(judge(&s), REPLAN_FINE);
    s.asked = true;
    assert_int_equal(judge(&s), REPLAN_FOR_ASKER);
}

static void waits_until_it_is_sure(void **state)
{
    (void)state;
    replan_sight s = sight();
    s.balance_error = 0.2;
    assert_int_equal(judge(&s), REPLAN_FEW_COUNTS);
    s.drift = 0.3; /* the other reason is sure */
    assert_int_equal(judge(&s), REPLAN_FOR_DRIFT);
    s.drift_error = 0.2;
    assert_int_equal(judge(&s), REPLAN_FEW_COUNTS);
    s.balance_error = s.drift_error = INFINITY;
    assert_int_equal(judge(&s), REPLAN_FEW_COUNTS);
    s.tokens = 0;
    s.asked = true; /* nothing to plan from */
    assert_int_equal(judge(&s), REPLAN_FEW_COUNTS);
}

static void one_rank_has_no_plans(void **state)
{
    (void)state;
    replan_sight s = sight();
    s.n_ranks = 1;
    s.asked = true;
    assert_int_equal(judge(&s), REPLAN_ONE_RANK);
}

static void one_plan_at_a_time(void **state)
{
    (void)state;
    replan_sight s = sight();
    s.asked = true;
    s.busy = true;
    assert_int_equal(judge(&s), REPLAN_BUSY);
    s.ready = false;
    assert_int_equal(judge(&s), REPLAN_NOT_READY);
}

static void every_verdict_has_words(void **state)
{
    (void)state;
    for (replan_verdict v = REPLAN_FOR_BALANCE; v <= REPLAN_FINE; v++) {
        assert_non_null(replan_words(v));
        assert_int_equal(replan_goes(v), v <= REPLAN_FOR_ASKER);
    }
}

static void useless_attempts_space_out(void **state)
{
    (void)state;
    replan_limits l = limits();
    replan_history h = {0};
    double now = 0, last = 0;
    for (int i = 0; i < 100; i++) {
        replan_note(&h, &l, i % 2 ? REPLAN_USELESS : REPLAN_FAILED, now);
        double pause = h.next - now;
        assert_true(pause >= last && pause > l.pause_seconds && pause <= l.longest_pause);
        last = pause;
        now = h.next;
    }
    assert_true(last == l.longest_pause);
    replan_note(&h, &l, REPLAN_LIVE, now);
    assert_true(h.next == now + l.pause_seconds);
}

static void a_pause_holds_all_but_askers(void **state)
{
    (void)state;
    replan_limits l = limits();
    replan_history h = {.next = 2000};
    replan_sight s = sight();
    assert_int_equal(replan_judge(&s, &h, &l), REPLAN_PAUSED);
    s.asked = true;
    assert_int_equal(replan_judge(&s, &h, &l), REPLAN_FOR_ASKER);
    s.asked = false;
    s.now = 2000;
    assert_int_equal(replan_judge(&s, &h, &l), REPLAN_FOR_BALANCE);
}

/* ---- errors of counting: against many draws ---- */

static void errors_are_those_of_draws(void **state)
{
    (void)state;
    enum { N = 6, DRAWS = 400, ROUNDS = 4000 };
    static const double p[N] = {0.4, 0.2, 0.15, 0.1, 0.1, 0.05};
    uint64_t random = 11, exact[N];
    double sum = 0, squares = 0, drift = 0, norm = 0;
    for (int i = 0; i < N; i++) {
        exact[i] = (uint64_t)(p[i] * 1e6 + 0.5);
        norm += p[i] * p[i];
    }
    for (int round = 0; round < ROUNDS; round++) {
        double counts[N] = {0}, dot = 0, own = 0;
        for (int d = 0; d < DRAWS; d++) {
            double u = (double)support_below(&random, 1000000) * 1e-6, at = 0;
            int i = 0;
            while (i < N - 1 && u >= (at += p[i]))
                i++;
            counts[i]++;
        }
        for (int i = 0; i < N; i++) {
            dot += counts[i] * p[i];
            own += counts[i] * counts[i];
        }
        double share = counts[0] / DRAWS;
        sum += share;
        squares += share * share;
        drift += (1 - dot / sqrt(own * norm)) / ROUNDS;
    }
    double mean = sum / ROUNDS, deviation = sqrt(squares / ROUNDS - mean * mean);
    assert_true(fabs(replan_balance_error(4, 0.4, DRAWS) / (4 * deviation) - 1) < 0.05);
    assert_true(fabs(replan_drift_error(exact, N, DRAWS) / drift - 1) < 0.05);
    assert_true(isinf(replan_balance_error(4, 0.5, 0)));
    uint64_t none[N] = {0};
    assert_true(isinf(replan_drift_error(none, N, 100)));
}

/* Experts of equal load, dealt out so that some counted tokens are balanced perfectly: how far from it are others? */
static void a_perfect_fit_is_expected_to_be_less_elsewhere(void **state)
{
    (void)state;
    enum { RANKS = 4, DRAWS = 500, ROUNDS = 2000 };
    uint64_t random = 7;
    double mean = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int rows[RANKS] = {0}, most = 0;
        for (int d = 0; d < DRAWS; d++)
            rows[support_below(&random, RANKS)]++;
        for (int r = 0; r < RANKS; r++)
            most = rows[r] > most ? rows[r] : most;
        mean += (double)most * RANKS / DRAWS / ROUNDS;
    }
    double floor_of_it = replan_balance_floor(RANKS, DRAWS);
    assert_true(floor_of_it - 1 > 0.5 * (mean - 1) && floor_of_it - 1 < 2 * (mean - 1));
    assert_true(replan_balance_floor(RANKS, 1e12) - 1 < 1e-4);
    assert_true(replan_balance_floor(1, 10) == 1);
}

/* ---- whether ---- */

static replan_prospect prospect(void)
{
    return (replan_prospect){.balance_now = 1.5,
                             .balance_new = 1.1,
                             .balance_error = 0.01,
                             .step_seconds = 0.1,
                             .excess_seconds = 0.02,
                             .tokens_per_step = 50,
                             .tokens_per_second = 500,
                             .work_seconds = 2};
}

static replan_gain weigh(const replan_prospect *p)
{
    replan_limits l = limits();
    return replan_weigh(p, &l);
}

static void pays_when_what_is_saved_exceeds_the_move(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    replan_gain g = weigh(&p);
    /* 20 ms of 100 are the excess, 0.4 of its 0.5 go: 16 ms a step, 320 us a token; 2 s are 6,250 tokens or 12.5 s of traffic */
    assert_int_equal(g.worth, REPLAN_PAYS);
    assert_true(fabs(g.saved_share - 0.16) < 1e-12);
    assert_true(fabs(g.saved_us - 320) < 1e-9);
    assert_true(fabs(g.tokens - 6250) < 1e-6);
    assert_true(fabs(g.seconds - 12.5) < 1e-9);
}

static void a_gain_that_pays_too_late_is_refused(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    p.tokens_per_second = 5;
    assert_int_equal(weigh(&p).worth, REPLAN_PAYS_TOO_LATE);
    p.tokens_per_second = 0; /* no traffic: never */
    assert_int_equal(weigh(&p).worth, REPLAN_PAYS_TOO_LATE);
    p.tokens_per_second = 500;
    p.work_seconds = 1e6;
    assert_int_equal(weigh(&p).worth, REPLAN_PAYS_TOO_LATE);
}

static void a_gain_within_the_error_is_none(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    p.balance_error = 0.3;
    assert_int_equal(weigh(&p).worth, REPLAN_NO_BETTER);
    p = prospect();
    p.balance_new = p.balance_now;
    assert_int_equal(weigh(&p).worth, REPLAN_NO_BETTER);
    p.balance_new = 1.9;
    assert_int_equal(weigh(&p).worth, REPLAN_NO_BETTER);
    assert_true(isinf(weigh(&p).tokens));
}

static void experts_that_take_little_time_are_left_alone(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    p.excess_seconds = 1e-4; /* of 100 ms */
    assert_int_equal(weigh(&p).worth, REPLAN_TOO_LITTLE);
    p.excess_seconds = 0;
    assert_int_equal(weigh(&p).worth, REPLAN_TOO_LITTLE);
}

static void never_more_than_all_of_a_step(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    p.excess_seconds = 5; /* some other load on the machine */
    assert_true(fabs(weigh(&p).saved_share - (1 - 1.1 / 1.5)) < 1e-12);
}

static void replayed_steps_count_for_more_than_balance(void **state)
{
    (void)state;
    replan_prospect p = prospect();
    p.step_us_now = 1000;
    p.step_us_new = 900;
    assert_true(fabs(weigh(&p).saved_share - 0.1) < 1e-12);
    p.step_us_new = 1100; /* better balanced, and slower */
    assert_int_equal(weigh(&p).worth, REPLAN_NO_BETTER);
    p.balance_new = p.balance_now; /* no better balanced, and quicker */
    p.step_us_new = 900;
    assert_int_equal(weigh(&p).worth, REPLAN_PAYS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a plan is asked for when the busiest rank computes too much, or traffic has moved, or somebody asks",
         plans_for_a_reason, NULL, NULL, NULL},
        {"an excess within the error of counting is no reason", waits_until_it_is_sure, NULL, NULL, NULL},
        {"one rank: never", one_rank_has_no_plans, NULL, NULL, NULL},
        {"a plan under way is not interrupted, not even by who asks", one_plan_at_a_time, NULL, NULL, NULL},
        {"every verdict has words", every_verdict_has_words, NULL, NULL, NULL},
        {"each useless attempt doubles the pause, up to the longest; a plan that goes live ends that", useless_attempts_space_out,
         NULL, NULL, NULL},
        {"a pause holds everybody but who asks", a_pause_holds_all_but_askers, NULL, NULL, NULL},
        {"errors of counting are those of draws", errors_are_those_of_draws, NULL, NULL, NULL},
        {"a plan that balances what was counted is expected to do less well on other tokens",
         a_perfect_fit_is_expected_to_be_less_elsewhere, NULL, NULL, NULL},
        {"a move pays after work / saved tokens", pays_when_what_is_saved_exceeds_the_move, NULL, NULL, NULL},
        {"what pays too late is refused; without traffic nothing pays", a_gain_that_pays_too_late_is_refused, NULL, NULL, NULL},
        {"a gain within the error of counting is none", a_gain_within_the_error_is_none, NULL, NULL, NULL},
        {"too small a share of a step is left alone", experts_that_take_little_time_are_left_alone, NULL, NULL, NULL},
        {"no plan saves more than experts' work can be of a step", never_more_than_all_of_a_step, NULL, NULL, NULL},
        {"replayed step times go before balance", replayed_steps_count_for_more_than_balance, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
