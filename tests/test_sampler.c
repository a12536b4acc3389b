#include "tests/support.h"
#include "worker/philox.h"
#include "worker/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the definition, in double and with a full sort ---- */

typedef struct {
    double logit;
    int token;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->token - y->token;
}

/* Probabilities after min-p, top-k and top-p of already edited logits. *margin: how far, relative to the whole, the nearest cut
 * decision was from going the other way. */
static void reference_probabilities(const sampling_params *p, const float *x, int vocab, double *probability, double *margin)
{
    ranked *r = malloc((size_t)vocab * sizeof *r);
    for (int i = 0; i < vocab; i++)
        r[i] = (ranked){(double)x[i], i};
    qsort(r, (size_t)vocab, sizeof *r, by_rank);
    double best = r[0].logit, mass = 0, prefix = 0;
    *margin = 1;
    int n = 0;
    for (; n < vocab && r[n].logit > (double)-INFINITY; n++) {
        double w = exp((r[n].logit - best) / (double)p->temperature);
        if (p->min_p > 0 && fabs(w - (double)p->min_p) < *margin)
            *margin = fabs(w - (double)p->min_p);
        if (w < (double)p->min_p || (p->top_k > 0 && n >= p->top_k))
            break;
        mass += w;
    }
    memset(probability, 0, (size_t)vocab * sizeof *probability);
    double kept_mass = 0;
    for (int i = 0; i < n; i++) {
        if (p->top_p > 0 && p->top_p < 1 && prefix >= (double)p->top_p * mass)
            break;
        probability[r[i].token] = exp((r[i].logit - best) / (double)p->temperature);
        kept_mass += probability[r[i].token];
        prefix += probability[r[i].token];
        double gap = fabs(prefix - (double)p->top_p * mass) / mass;
        if (p->top_p > 0 && p->top_p < 1 && gap < *margin)
            *margin = gap;
    }
    for (int i = 0; i < vocab; i++)
        probability[i] /= kept_mass;
    free(r);
}

/* The first token by id whose cumulative probability passes u. */
static int reference_draw(const double *probability, int vocab, double u, double *margin)
{
    double passed = 0;
    int token = 0;
    for (int i = 0; i < vocab; i++) {
        if (probability[i] == 0)
            continue;
        if (fabs(passed - u) < *margin)
            *margin = fabs(passed - u);
        passed += probability[i];
        token = i;
        if (passed > u)
            break;
    }
    if (fabs(passed - u) < *margin)
        *margin = fabs(passed - u);
    return token;
}

static void random_logits(uint64_t *state, float spread, int n, float *x)
{
    for (int i = 0; i < n; i++)
        x[i] = spread * support_gauss(state);
}

static sampler *make_sampler(int vocab)
{
    sampler *s = NULL;
    assert_int_equal(sampler_create(vocab, &s), STATUS_OK);
    return s;
}

static int choose(sampler *s, const sampling_params *p, const sampler_history *h, const float *x, uint32_t position, int n_output)
{
    int token = -1;
    assert_int_equal(sampler_choose(s, p, h, x, position, n_output, &token), STATUS_OK);
    return token;
}

/* ---- Philox ---- */

static void philox_known_answers(void **state)
{
    (void)state;
    /* Random123's kat_vectors, the lines "philox4x32 10". */
    static const struct {
        philox_block counter;
        uint32_t key[2];
        philox_block expected;
    } known[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        philox_block b = philox4x32(known[i].counter, (uint64_t)known[i].key[1] << 32 | known[i].key[0]);
        assert_memory_equal(&b, &known[i].expected, sizeof b);
    }
}

static void uniform_range(void **state)
{
    (void)state;
    assert_true(philox_uniform((philox_block){{0, 0, 0, 0}}) == 0);
    assert_true(philox_uniform((philox_block){{0xffffffff, 0xffffffff, 0, 0}}) < 1);
}

/* ---- greedy ---- */

static void greedy_is_argmax(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (int vocab = 1; vocab < 700; vocab += 1 + vocab / 5) {
        sampler *s = make_sampler(vocab);
        float x[700];
        for (int round = 0; round < 20; round++) {
            for (int i = 0; i < vocab; i++)
                x[i] = (float)support_below(&seed, 8) - 4; /* many ties */
            int best = 0;
            for (int i = 1; i < vocab; i++)
                if (x[i] > x[best])
                    best = i;
            assert_int_equal(choose(s, &(sampling_params){0}, NULL, x, 0, 0), best);
        }
        sampler_destroy(s);
    }
}

static void zero_ties(void **state)
{
    (void)state;
    float x[4] = {-1, -0.0f, 0.0f, -2};
    sampler *s = make_sampler(4);
    assert_int_equal(choose(s, &(sampling_params){0}, NULL, x, 0, 0), 1);
    for (uint32_t i = 0; i < 50; i++)
        assert_int_equal(choose(s, &(sampling_params){.temperature = 1, .top_k = 1}, NULL, x, i, 0), 1);
    sampler_destroy(s);
}

/* ---- draws against the definition ---- */

static sampling_params random_params(uint64_t *seed)
{
    static const float temperatures[] = {0.2f, 0.7f, 1, 1.5f, 4};
    static const float masses[] = {1, 1, 0.999f, 0.95f, 0.8f, 0.5f, 0.1f, 1e-6f};
    static const int counts[] = {0, 0, 1, 2, 5, 20, 50, 300, 5000};
    static const float floors[] = {0, 0, 0, 0.01f, 0.1f, 0.5f};
    return (sampling_params){.temperature = temperatures[support_below(seed, 5)],
                             .top_p = masses[support_below(seed, 8)],
                             .top_k = counts[support_below(seed, 9)],
                             .min_p = floors[support_below(seed, 6)],
                             .seed = support_random(seed),
                             .sequence = (uint32_t)support_below(seed, 4)};
}

static void draws_follow_definition(void **state)
{
    (void)state;
    static const int vocabs[] = {3, 128, 129, 1000, 4096};
    static float x[4096];
    static double probability[4096];
    uint64_t seed = 7;
    int compared = 0;
    for (size_t v = 0; v < sizeof vocabs / sizeof vocabs[0]; v++) {
        sampler *s = make_sampler(vocabs[v]);
        for (int round = 0; round < 400; round++) {
            sampling_params p = random_params(&seed);
            random_logits(&seed, 3, vocabs[v], x);
            if (round % 3 == 0) /* coarse logits: ties at every cut */
                for (int i = 0; i < vocabs[v]; i++)
                    x[i] = rintf(x[i]);
            uint32_t position = (uint32_t)support_random(&seed);
            double margin, u = philox_uniform(philox4x32((philox_block){{position, p.sequence, 0, 0}}, p.seed));
            reference_probabilities(&p, x, vocabs[v], probability, &margin);
            int expected = reference_draw(probability, vocabs[v], u, &margin);
            int got = choose(s, &p, NULL, x, position, 0);
            if (margin < 1e-5) /* too close to call in single precision */
                continue;
            assert_int_equal(got, expected);
            compared++;
        }
        sampler_destroy(s);
    }
    assert_true(compared > 1500);
}

/* Chi-square of 20,000 draws at rising positions against the softmax in double. */
static void check_distribution(const sampling_params *p, const float *x, int vocab)
{
    enum { DRAWS = 20000 };
    double probability[64], margin, chi = 0;
    int counts[64] = {0}, degrees = -1;
    sampler *s = make_sampler(vocab);
    for (uint32_t i = 0; i < DRAWS; i++)
        counts[choose(s, p, NULL, x, i, 0)]++;
    reference_probabilities(p, x, vocab, probability, &margin);
    for (int i = 0; i < vocab; i++) {
        double expected = DRAWS * probability[i];
        if (expected == 0) {
            assert_int_equal(counts[i], 0);
            continue;
        }
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        degrees++;
    }
    /* mean + 5 standard deviations of the chi-square distribution; the draws are fixed, so this never flickers */
    assert_true(chi < degrees + 5 * sqrt(2.0 * degrees) + 5);
    sampler_destroy(s);
}

static void distribution_is_softmax(void **state)
{
    (void)state;
    uint64_t seed = 3;
    float x[40];
    random_logits(&seed, 1, 40, x);
    check_distribution(&(sampling_params){.temperature = 1, .seed = 1}, x, 40);
    check_distribution(&(sampling_params){.seed = 2, .temperature = 0.6f}, x, 40);
    check_distribution(&(sampling_params){.temperature = 1, .seed = 3, .top_p = 0.7f}, x, 40);
    check_distribution(&(sampling_params){.temperature = 1, .seed = 4, .top_k = 9, .top_p = 0.9f}, x, 40);
    check_distribution(&(sampling_params){.temperature = 1, .seed = 5, .min_p = 0.2f, .sequence = 3}, x, 40);
}

/* ---- the key of a draw ---- */

static void same_key_same_draw(void **state)
{
    (void)state;
    uint64_t seed = 9;
    static float x[2000];
    random_logits(&seed, 1, 2000, x);
    sampler *a = make_sampler(2000), *b = make_sampler(2000);
    sampling_params p = {.temperature = 1, .seed = 42, .sequence = 1};
    int drawn[64];
    for (uint32_t i = 0; i < 64; i++)
        drawn[i] = choose(a, &p, NULL, x, i, 0);
    for (uint32_t i = 64; i-- > 0;) { /* another sampler, another order, other work in between */
        choose(b, &(sampling_params){.temperature = 1, .top_k = 7, .seed = i}, NULL, x, 5, 0);
        assert_int_equal(choose(b, &p, NULL, x, i, 0), drawn[i]);
    }
    sampler_destroy(a);
    sampler_destroy(b);
}

/* Pairs of draws that differ in one part of the key, over 8 equal tokens: a chi-square over the 64 pairs. */
static void check_independent(sampler *s, int part)
{
    float x[8] = {0};
    double chi = 0;
    int counts[8][8] = {{0}};
    for (uint32_t i = 0; i < 16000; i++) {
        sampling_params p = {.temperature = 1, .seed = 77}, q = p;
        uint32_t at = i, other = i;
        if (part == 0) {
            other = i + 1;
        } else if (part == 1) {
            q.sequence = 1;
        } else {
            q.seed = p.seed + 1;
        }
        counts[choose(s, &p, NULL, x, at, 0)][choose(s, &q, NULL, x, other, 0)]++;
    }
    for (int i = 0; i < 64; i++)
        chi += (counts[i / 8][i % 8] - 250.0) * (counts[i / 8][i % 8] - 250.0) / 250.0;
    assert_true(chi < 63 + 5 * sqrt(126.0));
}

static void keys_are_independent(void **state)
{
    (void)state;
    sampler *s = make_sampler(8);
    for (int part = 0; part < 3; part++)
        check_independent(s, part);
    sampler_destroy(s);
}

/* ---- edits of single logits ---- */

static void allowed_list(void **state)
{
    (void)state;
    uint64_t seed = 4;
    static float x[1000];
    random_logits(&seed, 2, 1000, x);
    sampler *s = make_sampler(1000);
    int allowed[3] = {7, 500, 999}, seen[1000] = {0};
    sampling_params p = {.temperature = 5, .allowed = allowed, .n_allowed = 3};
    for (uint32_t i = 0; i < 500; i++)
        seen[choose(s, &p, NULL, x, i, 0)]++;
    assert_int_equal(seen[7] + seen[500] + seen[999], 500);
    assert_true(seen[7] && seen[500] && seen[999]);
    p.top_k = 10; /* more than are left */
    for (uint32_t i = 0; i < 100; i++) {
        int token = choose(s, &p, NULL, x, i, 0);
        assert_true(token == 7 || token == 500 || token == 999);
    }
    sampler_destroy(s);
}

static void logit_bias(void **state)
{
    (void)state;
    float x[200] = {0};
    x[11] = 5;
    sampler *s = make_sampler(200);
    token_bias biases[2] = {{150, 100}, {11, -100}};
    sampling_params forced = {.temperature = 1, .biases = biases, .n_biases = 1};
    sampling_params banned = {.temperature = 1, .biases = biases + 1, .n_biases = 1};
    for (uint32_t i = 0; i < 300; i++) {
        assert_int_equal(choose(s, &forced, NULL, x, i, 0), 150);
        assert_int_not_equal(choose(s, &banned, NULL, x, i, 0), 11);
    }
    forced.temperature = 0;
    assert_int_equal(choose(s, &forced, NULL, x, 0, 0), 150);
    assert_true(x[150] == 0 && x[11] == 5); /* the caller's row is as it was */
    sampler_destroy(s);
}

static void min_tokens(void **state)
{
    (void)state;
    float x[5] = {1, 9, 8, 2, 0};
    int stop[2] = {1, 2};
    sampler *s = make_sampler(5);
    sampling_params p = {.min_tokens = 3, .stop_ids = stop, .n_stop_ids = 2};
    for (int n_output = 0; n_output < 3; n_output++)
        assert_int_equal(choose(s, &p, NULL, x, 0, n_output), 3);
    assert_int_equal(choose(s, &p, NULL, x, 0, 3), 1);
    sampler_destroy(s);
}

/* What penalties do is read back through greedy choices against a copy computed by the formulas. */
static void penalties_follow_formulas(void **state)
{
    (void)state;
    enum { V = 50 };
    uint64_t seed = 12;
    sampler *s = make_sampler(V);
    sampler_history *h = NULL;
    assert_int_equal(sampler_history_create(V, &h), STATUS_OK);
    for (int round = 0; round < 500; round++) {
        float x[V];
        double y[V];
        int output[V] = {0}, seen[V] = {0}, prompt[30];
        random_logits(&seed, 2, V, x);
        sampler_history_reset(h);
        for (int i = 0; i < 30; i++)
            seen[prompt[i] = support_below(&seed, V)] = 1;
        sampler_history_add_prompt(h, prompt, 30);
        for (int i = 0; i < 40; i++) {
            int token = support_below(&seed, V);
            output[token]++;
            sampler_history_add_output(h, token);
        }
        sampling_params p = {.repetition_penalty = 0.5f + 0.25f * (float)support_below(&seed, 8),
                             .frequency_penalty = -2 + 0.5f * (float)support_below(&seed, 9),
                             .presence_penalty = -2 + 0.5f * (float)support_below(&seed, 9)};
        for (int i = 0; i < V; i++) {
            double r = (double)p.repetition_penalty;
            y[i] = (double)x[i];
            if (seen[i] || output[i])
                y[i] = y[i] > 0 ? y[i] / r : y[i] * r;
            y[i] -= (double)p.frequency_penalty * output[i] + (output[i] ? (double)p.presence_penalty : 0);
        }
        double best = y[0];
        for (int i = 1; i < V; i++)
            best = fmax(best, y[i]);
        assert_true(y[choose(s, &p, h, x, 0, 40)] > best - 1e-4);
    }
    sampler_history_destroy(h);
    sampler_destroy(s);
}

/* Tokens that collide in the index must keep their own counts. */
static void history_counts_apart(void **state)
{
    (void)state;
    enum { V = 100000, N = 2000 };
    sampler_history *h = NULL;
    assert_int_equal(sampler_history_create(N, &h), STATUS_OK);
    float *x = calloc(V, sizeof *x);
    sampler *s = make_sampler(V);
    sampling_params p = {.frequency_penalty = -0.001f};
    uint64_t seed = 5;
    for (int round = 0; round < 3; round++) {
        int favourite = 0;
        sampler_history_reset(h);
        for (int i = 0; i < N; i++) {
            int token = support_below(&seed, V);
            sampler_history_add_output(h, token);
            if (i == N / 2)
                favourite = token;
        }
        for (int i = 0; i < 10; i++)
            sampler_history_add_output(h, favourite);
        assert_int_equal(choose(s, &p, h, x, 0, N), favourite);
    }
    sampler_destroy(s);
    sampler_history_destroy(h);
    free(x);
}

/* ---- log-probabilities ---- */

static void logprobs_are_log_softmax(void **state)
{
    (void)state;
    enum { V = 5000 };
    static float x[V];
    static ranked r[V];
    uint64_t seed = 31;
    random_logits(&seed, 4, V, x);
    for (int i = 0; i < V; i += 3)
        x[i] = rintf(x[i]); /* ties */
    double sum = 0;
    for (int i = 0; i < V; i++) {
        sum += exp((double)x[i]);
        r[i] = (ranked){(double)x[i], i};
    }
    qsort(r, V, sizeof *r, by_rank);
    sampler *s = make_sampler(V);
    float log_sum = sampler_log_sum_exp(x, V);
    assert_true(fabs((double)log_sum - log(sum)) < 1e-5);
    static const int tops[] = {1, 5, 20, 100, V};
    static token_logprob top[V];
    for (size_t t = 0; t < sizeof tops / sizeof tops[0]; t++) {
        assert_int_equal(sampler_top_logprobs(s, x, log_sum, tops[t], top), tops[t]);
        for (int i = 0; i < tops[t]; i++) {
            assert_int_equal(top[i].token, r[i].token);
            assert_int_equal(top[i].rank, i + 1);
            assert_true(fabs((double)top[i].logprob - (r[i].logit - log(sum))) < 1e-5);
        }
    }
    for (int i = 0; i < V; i += 37) {
        token_logprob one = sampler_logprob(x, V, log_sum, r[i].token);
        assert_int_equal(one.rank, i + 1);
        assert_int_equal(one.token, r[i].token);
        assert_true(one.logprob == top[i].logprob);
    }
    sampler_destroy(s);
}

static void log_sum_is_safe(void **state)
{
    (void)state;
    float x[3] = {3e4f, 3e4f, -3e4f};
    assert_true(fabs((double)sampler_log_sum_exp(x, 3) - (3e4 + log(2))) < 0.01);
}

/* ---- refusals ---- */

static void bad_params_are_named(void **state)
{
    (void)state;
    int far[1] = {100}, stop[2] = {3, 4};
    token_bias heavy[1] = {{1, 101}};
    const struct {
        sampling_params p;
        const char *field;
    } cases[] = {
        {{.temperature = -1}, "temperature:"},
        {{.temperature = NAN}, "temperature:"},
        {{.temperature = INFINITY}, "temperature:"},
        {{.temperature = 1, .top_k = -1}, "top_k:"},
        {{.temperature = 1, .top_p = -0.1f}, "top_p:"},
        {{.temperature = 1, .top_p = 1.1f}, "top_p:"},
        {{.temperature = 1, .min_p = -0.1f}, "min_p:"},
        {{.temperature = 1, .repetition_penalty = -1}, "repetition_penalty:"},
        {{.temperature = 1, .frequency_penalty = 2.5f}, "frequency_penalty:"},
        {{.temperature = 1, .presence_penalty = NAN}, "presence_penalty:"},
        {{.temperature = 1, .min_tokens = -2}, "min_tokens:"},
        {{.temperature = 1, .stop_ids = far, .n_stop_ids = 1}, "stop_token_ids:"},
        {{.temperature = 1, .biases = heavy, .n_biases = 1}, "logit_bias:"},
        {{.temperature = 1, .allowed = far, .n_allowed = 1}, "allowed_token_ids:"},
        {{.temperature = 1, .allowed = far, .n_allowed = 0}, "allowed_token_ids:"},
        {{.temperature = 1, .allowed = stop, .n_allowed = 2, .stop_ids = stop, .n_stop_ids = 2, .min_tokens = 1},
         "allowed_token_ids:"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(sampling_params_check(&cases[i].p, 100), STATUS_BAD_INPUT);
        assert_ptr_equal(strstr(status_message(), cases[i].field), status_message());
    }
    assert_int_equal(sampling_params_check(&(sampling_params){.temperature = 1}, 100), STATUS_OK);
}

static void odd_logits_are_refused(void **state)
{
    (void)state;
    float x[300] = {0};
    int token = -1;
    sampler *s = make_sampler(300);
    const sampling_params greedy = {0};
    x[290] = NAN;
    assert_int_equal(sampler_choose(s, &greedy, NULL, x, 0, 0, &token), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "token 290 is not a number"));
    x[290] = INFINITY;
    assert_int_equal(sampler_choose(s, &greedy, NULL, x, 0, 0, &token), STATUS_BAD_INPUT);
    x[290] = -INFINITY; /* a masked token is fine */
    assert_int_equal(sampler_choose(s, &greedy, NULL, x, 0, 0, &token), STATUS_OK);
    for (int i = 0; i < 300; i++)
        x[i] = -INFINITY;
    token = -1;
    assert_int_equal(sampler_choose(s, &(sampling_params){.temperature = 1}, NULL, x, 0, 0, &token), STATUS_BAD_INPUT);
    assert_int_equal(token, -1);
    sampler_destroy(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"philox gives Random123's known answers", philox_known_answers, NULL, NULL, NULL},
        {"a uniform number is never 1", uniform_range, NULL, NULL, NULL},
        {"greedy is argmax, ties to the lower id, for any vocabulary size", greedy_is_argmax, NULL, NULL, NULL},
        {"minus zero and zero tie", zero_ties, NULL, NULL, NULL},
        {"every draw is the one a full sort in double makes", draws_follow_definition, NULL, NULL, NULL},
        {"many draws are distributed as the softmax", distribution_is_softmax, NULL, NULL, NULL},
        {"the same key draws the same token, whatever happened before", same_key_same_draw, NULL, NULL, NULL},
        {"positions, sequences and seeds draw independently", keys_are_independent, NULL, NULL, NULL},
        {"only allowed tokens are drawn", allowed_list, NULL, NULL, NULL},
        {"a bias of 100 forces, -100 bans, and the caller's logits stay", logit_bias, NULL, NULL, NULL},
        {"stop tokens wait for min_tokens", min_tokens, NULL, NULL, NULL},
        {"penalties follow their formulas", penalties_follow_formulas, NULL, NULL, NULL},
        {"a history keeps colliding tokens apart", history_counts_apart, NULL, NULL, NULL},
        {"logprobs are the log-softmax, ranks rise from 1", logprobs_are_log_softmax, NULL, NULL, NULL},
        {"large logits do not overflow", log_sum_is_safe, NULL, NULL, NULL},
        {"a parameter out of range is named", bad_params_are_named, NULL, NULL, NULL},
        {"logits that are no numbers are refused", odd_logits_are_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
