/* test_gate.c - routing policies: worked examples of the papers, and a neutral policy that is a plain top-k bit for bit. */
#include "router/gate.h"
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_E 512

static float scratch[3 * MAX_E];
static uint16_t experts[MAX_E];
static float weights[MAX_E];

static void choose(const gate_policy *policy, const float *logits)
{
    assert_int_equal(gate_policy_check(policy), STATUS_OK);
    assert_int_equal(gate_choose(policy, NULL, logits, scratch, experts, weights), STATUS_OK);
}

static void assert_chosen(const gate_policy *p, const int *want_experts, const double *want_weights)
{
    for (int i = 0; i < p->top_k; i++) {
        assert_int_equal(experts[i], want_experts[i] < 0 ? GATE_NO_EXPERT : (unsigned)want_experts[i]);
        if (fabs((double)weights[i] - want_weights[i]) > 1e-6)
            fail_msg("weight %d is %.7f, not %.7f", i, (double)weights[i], want_weights[i]);
    }
}

/* Logits whose softmax is the given probabilities. */
static void logits_of(const double *probabilities, int n, float *logits)
{
    for (int i = 0; i < n; i++)
        logits[i] = (float)log(probabilities[i]);
}

/* ---- worked examples ---- */

static const float v3_logits[] = {2.0f, 1.5f, 1.0f, 0.5f, -0.5f, -1.0f, 0.2f, 0.1f};
static const float v3_bias[] = {-.95f, -.95f, -.90f, -.99f, -.90f, -.90f, -.99f, -.99f};

static void deepseek_v3_example(void **state)
{
    (void)state;
    gate_policy p = GATE_NEUTRAL(8, 3);
    p.score = GATE_SIGMOID;
    p.bias = v3_bias;
    p.n_groups = 4;
    p.keep_groups = 2;
    p.normalise = true;
    p.scale = 2.5f;
    choose(&p, v3_logits);
    assert_chosen(&p, (int[]){0, 1, 2}, (double[]){0.906382, 0.841323, 0.752294});
}

static void top_p_example(void **state)
{
    (void)state;
    float logits[5];
    logits_of((double[]){.35, .30, .20, .10, .05}, 5, logits);
    gate_policy p = GATE_NEUTRAL(5, 5);
    p.top_p = 0.4f;
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1, -1, -1, -1}, (double[]){.35, .30, 0, 0, 0});
    p.k_min = 3;
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1, 2, -1, -1}, (double[]){.35, .30, .20, 0, 0});
    p.k_min = 0;
    p.top_k = 1; /* never more than k */
    choose(&p, logits);
    assert_chosen(&p, (int[]){0}, (double[]){.35});
}

static void null_experts_example(void **state)
{
    (void)state;
    const float logits[] = {1.0f, .2f, -.3f, -1.0f, .8f, .1f, -.2f, 0};
    const uint8_t mask[8] = {[4] = GATE_NULL, GATE_NULL, GATE_NULL, GATE_NULL};
    gate_policy p = GATE_NEUTRAL(8, 3);
    p.mask = mask;
    p.normalise = true;
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1, -1}, (double[]){0.689974, 0.310026, 0});
}

static void sqrt_softplus_values(void **state)
{
    (void)state;
    const float logits[] = {-200, -2, 0, 1, 30, 500};
    gate_policy p = GATE_NEUTRAL(6, 6);
    p.score = GATE_SQRT_SOFTPLUS;
    choose(&p, logits);
    assert_chosen(&p, (int[]){5, 4, 3, 2, 1, 0},
                  (double[]){sqrtf(500), sqrtf(30), sqrt(log(1 + exp(1))), sqrt(log(2)), sqrt(log(1 + exp(-2))), 0});
}

/* ---- neutral is plain ---- */

/* Top-k the naive way: k times the greatest that is left, the first of equals. */
static void plain_top_k(const float *logits, int n, int k, bool normalise)
{
    static float scores[MAX_E];
    static bool used[MAX_E];
    uint16_t want[MAX_E];
    float want_weights[MAX_E], sum = 0;
    gate_math_plain.softmax(logits, n, scores);
    memset(used, 0, sizeof used);
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int e = 0; e < n; e++)
            if (!used[e] && (best < 0 || scores[e] > scores[best]))
                best = e;
        used[best] = true;
        want[i] = (uint16_t)best;
        want_weights[i] = scores[best];
        sum += scores[best];
    }
    for (int i = 0; i < k && normalise; i++)
        want_weights[i] /= sum;
    assert_memory_equal(experts, want, (size_t)k * sizeof *want);
    assert_memory_equal(weights, want_weights, (size_t)k * sizeof *want_weights);
}

static void random_logits(uint64_t *seed, int n, float *logits)
{
    /* coarse values, so that ties are common; now and then -infinity */
    int steps = 1 + support_below(seed, 1000);
    for (int e = 0; e < n; e++) {
        logits[e] = rintf(support_gauss(seed) * (float)steps) / (float)steps * 3;
        if (e > 0 && support_below(seed, 50) == 0)
            logits[e] = -INFINITY;
    }
}

static void neutral_is_plain_top_k(void **state)
{
    (void)state;
    uint64_t seed = 1;
    static float logits[MAX_E], zeros[MAX_E], ones[MAX_E];
    static uint8_t normal[MAX_E];
    for (int e = 0; e < MAX_E; e++)
        ones[e] = 1;
    for (int round = 0; round < 4000; round++) {
        int n = 1 + support_below(&seed, round % 10 ? 64 : MAX_E);
        gate_policy p = GATE_NEUTRAL(n, 1 + support_below(&seed, n < 16 ? n : 16));
        p.normalise = round % 2;
        random_logits(&seed, n, logits);
        choose(&p, logits);
        plain_top_k(logits, n, p.top_k, p.normalise);
        /* the same with every step present but neutral */
        p.bias = zeros;
        p.mask = normal;
        p.multiply = ones;
        p.n_groups = n % 2 ? 1 : 2;
        p.keep_groups = p.n_groups;
        p.top_p = 1e9f;
        choose(&p, logits);
        plain_top_k(logits, n, p.top_k, p.normalise);
    }
}

static void ties_go_to_the_lower_expert(void **state)
{
    (void)state;
    const float logits[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    gate_policy p = GATE_NEUTRAL(8, 3);
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1, 2}, (double[]){.125, .125, .125});
    p.n_groups = 4;
    p.keep_groups = 2; /* equal groups: the lower ones stay */
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1, 2}, (double[]){.125, .125, .125});
    const float bias[8] = {[2] = .1f, [6] = .2f, [7] = .1f}; /* chosen 6, 2, 7; of equal weight, so listed by number */
    p = GATE_NEUTRAL(8, 3);
    p.bias = bias;
    choose(&p, logits);
    assert_chosen(&p, (int[]){2, 6, 7}, (double[]){.125, .125, .125});
}

/* ---- properties of the steps ---- */

static void bias_changes_choice_not_weight(void **state)
{
    (void)state;
    uint64_t seed = 2;
    float logits[32], bias[32], scores[32];
    for (int round = 0; round < 500; round++) {
        gate_policy p = GATE_NEUTRAL(32, 4);
        random_logits(&seed, 32, logits);
        for (int e = 0; e < 32; e++)
            bias[e] = support_gauss(&seed) / 10;
        p.bias = bias;
        choose(&p, logits);
        gate_math_plain.softmax(logits, 32, scores);
        float worst = INFINITY;
        for (int i = 0; i < 4; i++) {
            assert_true(weights[i] == scores[experts[i]]);
            assert_true(i == 0 || weights[i] <= weights[i - 1]);
            worst = fminf(worst, scores[experts[i]] + bias[experts[i]]);
        }
        for (uint16_t e = 0; e < 32; e++)
            if (e != experts[0] && e != experts[1] && e != experts[2] && e != experts[3])
                assert_true(scores[e] + bias[e] <= worst);
    }
}

static void groups_limit_the_choice(void **state)
{
    (void)state;
    uint64_t seed = 3;
    float logits[48], scores[48];
    for (int round = 0; round < 500; round++) {
        gate_policy p = GATE_NEUTRAL(48, 6);
        p.n_groups = 8;
        p.keep_groups = 1 + support_below(&seed, 8);
        random_logits(&seed, 48, logits);
        choose(&p, logits);
        gate_math_plain.softmax(logits, 48, scores);
        bool chosen[8] = {false};
        float merit[8];
        int n_chosen = 0;
        for (int i = 0; i < 6; i++) {
            n_chosen += !chosen[experts[i] / 6];
            chosen[experts[i] / 6] = true;
        }
        assert_true(n_chosen <= p.keep_groups);
        for (int g = 0; g < 8; g++) {
            merit[g] = 0;
            for (int a = 0; a < 6; a++)
                for (int b = 0; b < a; b++)
                    merit[g] = fmaxf(merit[g], scores[6 * g + a] + scores[6 * g + b]);
        }
        for (int g = 0; g < 8; g++) { /* a chosen group is among the best keep_groups */
            int better = 0;
            for (int other = 0; other < 8; other++)
                better += merit[other] > merit[g];
            assert_true(!chosen[g] || better < p.keep_groups);
        }
    }
}

static void off_is_never_and_forced_is_always_chosen(void **state)
{
    (void)state;
    uint64_t seed = 4;
    float logits[24];
    uint8_t mask[24];
    for (int round = 0; round < 1000; round++) {
        gate_policy p = GATE_NEUTRAL(24, 5);
        int n_forced = 0;
        for (int e = 0; e < 24; e++) {
            mask[e] = support_below(&seed, 4) == 0 ? GATE_OFF : GATE_NORMAL;
            if (n_forced < 4 && support_below(&seed, 12) == 0) {
                mask[e] = GATE_FORCED;
                n_forced++;
            }
        }
        p.mask = mask;
        if (round % 2) {
            p.n_groups = 3;
            p.keep_groups = 1 + support_below(&seed, 3);
        }
        p.top_p = round % 3 ? 0.0f : 0.2f;
        if (gate_policy_check(&p) != STATUS_OK)
            continue;
        random_logits(&seed, 24, logits);
        choose(&p, logits);
        int seen_forced = 0, n = 0;
        while (n < 5 && experts[n] != GATE_NO_EXPERT) {
            assert_int_not_equal(mask[experts[n]], GATE_OFF);
            seen_forced += mask[experts[n]] == GATE_FORCED;
            n++;
        }
        assert_int_equal(seen_forced, n_forced);
        assert_true(p.top_p > 0 || n == 5);
        for (int i = n; i < 5; i++)
            assert_true(experts[i] == GATE_NO_EXPERT && weights[i] == 0);
    }
}

static void cut_prefix_is_smallest(void **state)
{
    (void)state;
    uint64_t seed = 5;
    float logits[40], scores[40];
    for (int round = 0; round < 1000; round++) {
        gate_policy p = GATE_NEUTRAL(40, 8);
        p.top_p = (float)(1 + support_below(&seed, 999)) / 1000;
        p.k_min = support_below(&seed, 4);
        random_logits(&seed, 40, logits);
        choose(&p, logits);
        gate_math_plain.softmax(logits, 40, scores);
        float sum = 0;
        int n = 0;
        for (; n < 8 && experts[n] != GATE_NO_EXPERT; n++) {
            assert_true(n < p.k_min || n == 0 || sum <= p.top_p); /* without this one it was not enough */
            sum += scores[experts[n]];
        }
        assert_true(n == 8 || (sum > p.top_p && n >= p.k_min));
        assert_true(n >= 1);
    }
}

static void weights_are_normalised_scaled_and_multiplied(void **state)
{
    (void)state;
    uint64_t seed = 6;
    float logits[16], multiply[16];
    for (int round = 0; round < 200; round++) {
        gate_policy p = GATE_NEUTRAL(16, 4);
        p.normalise = true;
        random_logits(&seed, 16, logits);
        choose(&p, logits);
        float plain[4];
        double sum = 0;
        for (int i = 0; i < 4; i++)
            sum += (double)(plain[i] = weights[i]);
        assert_true(fabs(sum - 1) < 1e-6);
        for (int e = 0; e < 16; e++)
            multiply[e] = (float)support_below(&seed, 3);
        p.scale = 2.5f;
        p.multiply = multiply;
        choose(&p, logits);
        for (int i = 0; i < 4; i++) {
            volatile float scaled = plain[i] * 2.5f;
            assert_true(weights[i] == scaled * multiply[experts[i]]); /* the order is that before multiplying */
        }
    }
}

static void vanishing_scores_stay_zero(void **state)
{
    (void)state;
    const float logits[4] = {-1e6f, -1e6f, -1e6f, -1e6f};
    gate_policy p = GATE_NEUTRAL(4, 2);
    p.score = GATE_SIGMOID;
    p.normalise = true;
    choose(&p, logits);
    assert_chosen(&p, (int[]){0, 1}, (double[]){0, 0});
}

/* ---- refusals ---- */

static void bad_logits_are_named(void **state)
{
    (void)state;
    float logits[6] = {0, 1, 2, NAN, 4, NAN};
    gate_policy p = GATE_NEUTRAL(6, 2);
    assert_int_equal(gate_choose(&p, NULL, logits, scratch, experts, weights), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "gate: the logit of expert 3 is NaN");
    logits[3] = logits[5] = 0;
    logits[4] = INFINITY;
    assert_int_equal(gate_choose(&p, NULL, logits, scratch, experts, weights), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "gate: the logit of expert 4 is infinite");
    for (int e = 0; e < 6; e++)
        logits[e] = -INFINITY;
    assert_int_equal(gate_choose(&p, NULL, logits, scratch, experts, weights), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "gate: every logit is -infinity");
}

static void refused(const gate_policy *p, const char *sentence)
{
    assert_int_equal(gate_policy_check(p), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), sentence);
}

#define REFUSED(change, sentence)                                                                                                \
    do {                                                                                                                         \
        gate_policy p = GATE_NEUTRAL(8, 3);                                                                                      \
        change;                                                                                                                  \
        refused(&p, sentence);                                                                                                   \
    } while (0)

static void impossible_policies_are_refused(void **state)
{
    (void)state;
    const float nan_at_2[8] = {0, 0, NAN}, endless_at_1[8] = {1, INFINITY};
    const uint8_t odd[8] = {0, 9}, many_forced[8] = {2, 2, 2, 2}, mostly_off[8] = {1, 1, 1, 1, 1, 1, 0, 0};
    const uint8_t group_off[8] = {1, 1, 1, 0, 0, 0, 0, 0}, group_forced[8] = {1, 1, 1, 0, 2, 2, 0, 0};
    REFUSED(p.n_experts = 0, "gate: 0 experts are outside 1 to 65535");
    REFUSED(p.top_k = 0, "gate: top-0 of 8 experts cannot be chosen");
    REFUSED(p.top_k = 9, "gate: top-9 of 8 experts cannot be chosen");
    REFUSED(p.score = (gate_score)7, "gate: score function 7 is unknown");
    REFUSED(p.top_p = -1, "gate: top-p is -1, not a number from 0 up");
    REFUSED(p.top_p = NAN, "gate: top-p is nan, not a number from 0 up");
    REFUSED(p.k_min = 4, "gate: at least 4 of at most 3 experts cannot be kept");
    REFUSED(p.scale = 0, "gate: scale is 0, not a number above 0");
    REFUSED(p.scale = INFINITY, "gate: scale is inf, not a number above 0");
    REFUSED(p.bias = nan_at_2, "gate: bias of expert 2 is not finite");
    REFUSED(p.multiply = endless_at_1, "gate: multiplier of expert 1 is not finite");
    REFUSED((p.n_groups = 3, p.keep_groups = 1), "gate: 8 experts do not divide into 3 groups");
    REFUSED((p.n_groups = 0, p.keep_groups = 1), "gate: 8 experts do not divide into 0 groups");
    REFUSED((p.n_groups = 4, p.keep_groups = 5), "gate: 5 of 4 groups cannot be kept");
    REFUSED((p.n_groups = 4, p.keep_groups = 1), "gate: a token needs 3 experts, but mask and groups may leave only 2");
    REFUSED(p.mask = odd, "gate: mask of expert 1 is 9, which means nothing");
    REFUSED(p.mask = many_forced, "gate: 4 experts are forced, but a token gets only 3");
    REFUSED(p.mask = mostly_off, "gate: a token needs 3 experts, but mask and groups may leave only 2");
    REFUSED((p.mask = group_off, p.n_groups = 2, p.keep_groups = 1),
            "gate: a token needs 3 experts, but mask and groups may leave only 1");
    gate_policy fine = GATE_NEUTRAL(8, 3);
    fine.mask = group_forced; /* the first group offers one, the forced ones come from the other */
    fine.n_groups = 2;
    fine.keep_groups = 1;
    assert_int_equal(gate_policy_check(&fine), STATUS_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"DeepSeek-V3's worked example: excluded groups are -infinity, weights are unbiased", deepseek_v3_example, NULL, NULL,
         NULL},
        {"top-p's worked example, with k_min and under k", top_p_example, NULL, NULL, NULL},
        {"AdaMoE's worked example: null experts use up places and are dropped", null_experts_example, NULL, NULL, NULL},
        {"sqrt-softplus holds from -200 to 500", sqrt_softplus_values, NULL, NULL, NULL},
        {"neutral is plain top-k bit for bit, also with every neutral step present", neutral_is_plain_top_k, NULL, NULL, NULL},
        {"ties go to the lower expert and the lower group", ties_go_to_the_lower_expert, NULL, NULL, NULL},
        {"a bias changes the choice, never a weight", bias_changes_choice_not_weight, NULL, NULL, NULL},
        {"only experts of the best groups are chosen", groups_limit_the_choice, NULL, NULL, NULL},
        {"off is never chosen, forced always, whatever groups and cuts say", off_is_never_and_forced_is_always_chosen, NULL, NULL,
         NULL},
        {"the cut keeps the smallest prefix above p", cut_prefix_is_smallest, NULL, NULL, NULL},
        {"weights are normalised, scaled, multiplied, in this order", weights_are_normalised_scaled_and_multiplied, NULL, NULL,
         NULL},
        {"scores that all vanish give zero weights, not NaN", vanishing_scores_stay_zero, NULL, NULL, NULL},
        {"a NaN or infinite logit is refused by name", bad_logits_are_named, NULL, NULL, NULL},
        {"impossible policies are refused", impossible_policies_are_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
