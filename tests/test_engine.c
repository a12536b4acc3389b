/* test_engine.c - the step loop on one rank: what a request gives depends on the request alone, whatever the scheduler decides,
 * and what leaves makes room. */
#include "tests/support.h"
#include "tests/support_engine.h"

#include "proto/json.h"
#include "proto/safetensors.h"

#include "worker/runtime.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REQUESTS = 16, MAX_TOKENS = 64 };

typedef struct {
    int32_t tokens[MAX_REQUESTS][MAX_TOKENS];
    int n[MAX_REQUESTS], finished[MAX_REQUESTS];
    engine_finish why[MAX_REQUESTS];
    uint64_t cancel_id;
    int cancel_after; /* tokens of cancel_id; 0: never */
    engine *engine;
} harness;

static void listen_event(void *arg, const engine_event *e)
{
    harness *h = arg;
    if (e->kind == ENGINE_EVENT_TOKEN)
        h->tokens[e->id][h->n[e->id]++] = e->token;
    if (e->kind == ENGINE_EVENT_FINISHED) {
        assert_false(h->finished[e->id]);
        h->finished[e->id] = 1;
        h->why[e->id] = e->finish;
    }
    if (h->cancel_after && e->id == h->cancel_id && h->n[e->id] == h->cancel_after && e->kind == ENGINE_EVENT_TOKEN)
        assert_int_equal(engine_cancel(h->engine, e->id), STATUS_OK);
}

typedef struct {
    group *group;
    runtime *runtime;
    engine *engine;
    harness h;
} fixture;

static fixture *start(int max_sequences, int chunk, size_t kv_bytes)
{
    static const char *const domain = "none";
    fixture *f = calloc(1, sizeof *f);
    runtime_options o = {.model_dir = support_data("qwen3_moe"),
                         .threads = 2,
                         .combine = COMBINE_FIXED,
                         .limits = {.max_sequences = max_sequences,
                                    .chunk = chunk,
                                    .max_length = 96,
                                    .kv_bytes = kv_bytes,
                                    .n_domains = 1,
                                    .domains = &domain}};
    if (group_create(NULL, NULL, 0, &f->group) != STATUS_OK ||
        runtime_create(f->group, &o, listen_event, &f->h, &f->runtime) != STATUS_OK)
        fail_msg("%s", status_message());
    f->engine = f->h.engine = runtime_engine(f->runtime);
    return f;
}

static void stop(fixture *f)
{
    runtime_destroy(f->runtime);
    group_destroy(f->group);
    free(f);
}

static void run(fixture *f)
{
    for (int steps = 0; engine_busy(f->engine); steps++) {
        assert_true(steps < 2000);
        if (engine_step(f->engine) != STATUS_OK)
            fail_msg("%s", status_message());
    }
}

/* Request `i` of a family of requests that use every part of the sampler. */
static engine_request make_request(int i, int32_t *prompt)
{
    static const token_bias biases[] = {{7, 2.5f}, {300, -100}};
    uint64_t state = (uint64_t)i + 99;
    int n = 3 + 5 * i;
    for (int j = 0; j < n; j++)
        prompt[j] = support_below(&state, 512);
    return (engine_request){.id = (uint64_t)i,
                            .prompt = prompt,
                            .n_prompt = n,
                            .max_new = 20,
                            .owner = -1,
                            .want = ENGINE_IGNORE_EOS,
                            .sampling = {.temperature = i % 3 ? 0.9f : 0,
                                         .top_k = i % 2 ? 40 : 0,
                                         .top_p = i % 4 == 3 ? 0.8f : 0,
                                         .repetition_penalty = i % 4 == 1 ? 1.2f : 0,
                                         .frequency_penalty = i % 5 == 2 ? 0.5f : 0,
                                         .biases = biases,
                                         .n_biases = i % 2 ? 2 : 0,
                                         .seed = 1234u + (uint64_t)i}};
}

static void submit(fixture *f, const engine_request *r)
{
    if (engine_submit(f->engine, r) != STATUS_OK)
        fail_msg("%s", status_message());
}

static void tokens_do_not_depend_on_company(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *together = start(6, 16, 0);
    for (int i = 0; i < 8; i++) {
        engine_request r = make_request(i, prompt);
        submit(together, &r);
    }
    run(together);
    for (int i = 0; i < 8; i++) {
        fixture *alone = start(1, 64, 0);
        engine_request r = make_request(i, prompt);
        submit(alone, &r);
        run(alone);
        assert_int_equal(together->h.n[i], 20);
        assert_int_equal(alone->h.n[i], 20);
        assert_memory_equal(alone->h.tokens[i], together->h.tokens[i], 20 * sizeof(int32_t));
        stop(alone);
    }
    stop(together);
}

static void continued_requests_go_on_the_same(void **state)
{
    (void)state;
    int32_t prompt[256];
    for (int i = 0; i < 8; i++) {
        fixture *whole = start(1, 64, 0), *rest = start(2, 7, 0);
        engine_request r = make_request(i, prompt);
        submit(whole, &r);
        run(whole);
        int done = 1 + i * 2; /* tokens that were out before the failure */
        memcpy(prompt + r.n_prompt, whole->h.tokens[i], (size_t)done * sizeof *prompt);
        r.n_prompt += done;
        r.n_prior = done;
        r.max_new -= done;
        submit(rest, &r);
        run(rest);
        assert_int_equal(rest->h.n[i], 20 - done);
        assert_memory_equal(rest->h.tokens[i], whole->h.tokens[i] + done, (size_t)(20 - done) * sizeof *prompt);
        stop(whole);
        stop(rest);
    }
}

static void cancelling_makes_room(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *f = start(1, 64, 0); /* one place: the second runs only when the first has left */
    engine_request a = make_request(0, prompt);
    submit(f, &a);
    engine_request b = make_request(1, prompt);
    submit(f, &b);
    engine_request c = make_request(2, prompt);
    submit(f, &c);
    assert_int_equal(engine_cancel(f->engine, 2), STATUS_OK); /* still waiting: leaves at once */
    assert_true(f->h.finished[2]);
    assert_int_equal(engine_cancel(f->engine, 77), STATUS_OK);
    f->h.cancel_id = 0;
    f->h.cancel_after = 4;
    run(f);
    assert_true(f->h.n[0] >= 4 && f->h.n[0] < 20);
    assert_int_equal(f->h.why[0], ENGINE_FINISH_CANCELLED);
    assert_int_equal(f->h.n[1], 20);
    assert_int_equal(f->h.why[1], ENGINE_FINISH_LENGTH);
    stop(f);
}

static void stop_tokens_end_a_sequence(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *f = start(2, 64, 0);
    engine_request r = make_request(0, prompt);
    submit(f, &r);
    run(f);
    int at = 5, stop_id = f->h.tokens[0][at];
    for (int i = 0; i < at; i++)
        if (f->h.tokens[0][i] == stop_id)
            at = i;
    r.id = 1;
    r.sampling.stop_ids = &stop_id;
    r.sampling.n_stop_ids = 1;
    submit(f, &r);
    run(f);
    assert_int_equal(f->h.n[1], at + 1);
    assert_int_equal(f->h.why[1], ENGINE_FINISH_STOP);
    stop(f);
}

static void a_small_kv_budget_only_delays(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *wide = start(4, 64, 0);
    size_t one_block = engine_kv_bytes(wide->engine) / (4 * 3); /* 96 positions are 3 blocks */
    fixture *narrow = start(4, 64, 3 * one_block);
    for (int i = 0; i < 6; i++) {
        engine_request r = make_request(i, prompt);
        submit(wide, &r);
        submit(narrow, &r);
    }
    run(wide);
    run(narrow);
    for (int i = 0; i < 6; i++)
        assert_memory_equal(wide->h.tokens[i], narrow->h.tokens[i], 20 * sizeof(int32_t));
    stop(wide);
    stop(narrow);
}

static void impossible_requests_are_refused(void **state)
{
    (void)state;
    int32_t prompt[256] = {1, 2, 3};
    fixture *f = start(2, 64, 0);
    engine_request good = {.id = 1, .prompt = prompt, .n_prompt = 3, .max_new = 4, .owner = -1}, r;
    const struct {
        int n_prompt, max_new, owner, first_token;
        const char *words;
    } cases[] = {{0, 4, -1, 1, "empty"},
                 {3, 94, -1, 1, "96"},
                 {3, 4, 1, 1, "owner"},
                 {3, 4, -1, 512, "vocabulary"},
                 {3, -1, -1, 1, "new"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        r = good;
        r.n_prompt = cases[i].n_prompt;
        r.max_new = cases[i].max_new;
        r.owner = cases[i].owner;
        prompt[0] = cases[i].first_token;
        assert_int_not_equal(engine_submit(f->engine, &r), STATUS_OK);
        assert_non_null(strstr(status_message(), cases[i].words));
        prompt[0] = 1;
    }
    r = good;
    r.sampling.top_p = 2;
    assert_int_not_equal(engine_submit(f->engine, &r), STATUS_OK);
    assert_false(engine_busy(f->engine));
    stop(f);
}

/* ---- the mix: every setting gives the same, bit for bit ---- */

static group *alone_group(void)
{
    group *g = NULL;
    if (group_create(NULL, NULL, 0, &g) != STATUS_OK)
        fail_msg("%s", status_message());
    return g;
}

static const mix_setting roomy = {.chunk = 64, .max_sequences = MIX_REQUESTS, .threads = 2};

static void compare_setting(const mix_setting *setting, const mix_answer *want, const char *what, mix_counts *counts)
{
    mix_answer *got = calloc(MIX_REQUESTS, sizeof *got);
    group *g = alone_group();
    support_mix_run(g, support_data("qwen3_moe"), setting, got, counts);
    for (int i = 0; i < MIX_REQUESTS; i++) {
        char name[100];
        snprintf(name, sizeof name, "%s: request %d", what, i);
        if (!setting->only || setting->only >> i & 1)
            support_mix_compare(&got[i], &want[i], got[i].finish == ENGINE_FINISH_CANCELLED, name);
        assert_true(got[i].finish != ENGINE_FINISH_CANCELLED || setting->cancel >> i & 1);
    }
    group_destroy(g);
    free(got);
}

static mix_answer *plain_answers(void)
{
    mix_answer *want = calloc(MIX_REQUESTS, sizeof *want);
    group *g = alone_group();
    mix_counts counts;
    support_mix_run(g, support_data("qwen3_moe"), &roomy, want, &counts);
    for (int i = 0; i < MIX_REQUESTS; i++)
        assert_true(want[i].n_finished == 1 && want[i].n_starts == 1);
    group_destroy(g);
    return want;
}

static void no_decision_changes_an_answer(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        mix_setting setting;
    } variants[] = {
        {"chunks of 1", {.chunk = 1, .max_sequences = 5, .threads = 1}},
        {"chunks of 7", {.chunk = 7, .max_sequences = 14, .threads = 3}},
        {"chunks of 64, one after another", {.chunk = 64, .max_sequences = 1, .threads = 1}},
        {"a budget of a microsecond", {.chunk = 64, .max_sequences = 14, .threads = 1, .step_seconds = 1e-6}},
        {"no budget", {.chunk = 64, .max_sequences = 14, .threads = 1, .step_seconds = ENGINE_NO_BUDGET}},
        {"holds", {.chunk = 16, .max_sequences = 4, .threads = 1, .disturb = true, .seed = 4}},
        {"cache", {.chunk = 16, .max_sequences = 3, .threads = 1, .prefix_cache = true}},
    };
    mix_answer *want = plain_answers();
    mix_counts counts;
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++)
        compare_setting(&variants[v].setting, want, variants[v].what, &counts);
    free(want);
}

static void pushing_out_changes_no_answer(void **state)
{
    (void)state;
    mix_answer *want = plain_answers();
    unsigned long long n_preempted = 0;
    for (uint64_t seed = 0; seed < 6; seed++) {
        mix_counts counts;
        const mix_setting few = {.chunk = seed % 2 ? 64 : 5,
                                 .max_sequences = 8,
                                 .threads = 1,
                                 .kv_blocks = 5 + (int)seed, /* the longest request alone takes 5 */
                                 .prefix_cache = seed % 3 != 0,
                                 .disturb = seed > 2,
                                 .seed = seed};
        compare_setting(&few, want, "few blocks", &counts);
        n_preempted += counts.n_preempted;
    }
    assert_true(n_preempted > 10);
    free(want);
}

static void a_cached_prefix_changes_no_answer(void **state)
{
    (void)state;
    mix_answer *want = plain_answers();
    for (int kv_blocks = 12; kv_blocks <= 120; kv_blocks *= 3) { /* from eviction all the time to never */
        mix_counts counts;
        const mix_setting twice = {
            .chunk = 64, .max_sequences = 4, .threads = 1, .kv_blocks = kv_blocks, .prefix_cache = true, .twice = true};
        compare_setting(&twice, want, "from the cache", &counts);
        assert_true(counts.prefix_hits > 0);
    }
    free(want);
}

static void alone_or_together_answers_are_the_same(void **state)
{
    (void)state;
    mix_answer *want = plain_answers();
    mix_counts counts;
    for (unsigned i = 0; i < MIX_REQUESTS; i++) {
        mix_setting alone = roomy;
        alone.only = 1u << i;
        compare_setting(&alone, want, "alone", &counts);
    }
    free(want);
}

static void cancelling_some_changes_no_other(void **state)
{
    (void)state;
    mix_answer *want = plain_answers();
    for (uint64_t seed = 1; seed < 8; seed++) {
        mix_counts counts;
        const mix_setting s = {.chunk = 16,
                               .max_sequences = 5,
                               .threads = 1,
                               .kv_blocks = seed % 2 ? 8 : 60,
                               .prefix_cache = true,
                               .cancel = 0x2d5b & ~(1u << seed),
                               .disturb = true,
                               .seed = seed};
        compare_setting(&s, want, "cancelled", &counts);
    }
    free(want);
}

/* ---- log-probabilities against the logits themselves ---- */

typedef struct {
    mix_answer answers[2];
    float *logits; /* [MIX_LENGTH][512] by position, of request 1 */
} logits_seen;

static void listen_logits(void *arg, const engine_event *e)
{
    logits_seen *l = arg;
    if (e->logits)
        memcpy(l->logits + (size_t)e->first_position * 512, e->logits, (size_t)e->n_rows * 512 * sizeof(float));
    support_mix_listen(l->answers, e);
}

static void check_logprob(const float *logits, const token_logprob *got)
{
    double sum = 0, max = -INFINITY;
    int better = 0;
    for (int i = 0; i < 512; i++)
        max = (double)logits[i] > max ? (double)logits[i] : max;
    for (int i = 0; i < 512; i++) {
        sum += exp((double)logits[i] - max);
        better += logits[i] > logits[got->token] || (logits[i] == logits[got->token] && i < got->token);
    }
    assert_int_equal(got->rank, better + 1);
    assert_true(fabs((double)got->logprob - ((double)logits[got->token] - max - log(sum))) < 1e-5);
}

static void check_candidates(const float *logits, const token_logprob *got, int n, const engine_candidates *asked)
{
    assert_int_equal(n, asked->n_ids ? asked->n_ids : asked->top_n);
    for (int i = 0; i < n; i++) {
        check_logprob(logits, &got[i]);
        assert_int_equal(asked->n_ids ? got[i].token : got[i].rank, asked->n_ids ? asked->ids[i] : i + 1);
    }
}

/* Request 0 is answered with log-probabilities, in chunks of 7; request 1 runs the same prompt and answer for all their logits.
 */
static void check_logprobs_of(int kind)
{
    static const char *const domain = "none";
    logits_seen l = {.logits = calloc(MIX_LENGTH * 512, sizeof(float))};
    runtime_options o = {
        .model_dir = support_data("qwen3_moe"),
        .threads = 2,
        .combine = COMBINE_FIXED,
        .limits = {.max_sequences = 2, .chunk = 7, .max_length = MIX_LENGTH, .n_domains = 1, .domains = &domain}};
    int32_t prompt[MIX_LENGTH];
    runtime *r = NULL;
    group *g = alone_group();
    assert_int_equal(runtime_create(g, &o, listen_logits, &l, &r), STATUS_OK);
    engine *e = runtime_engine(r);
    engine_request q = support_mix_request(kind, prompt);
    q.id = 0;
    q.n_prior = 5; /* earlier output: no prompt log-probabilities of these */
    assert_int_equal(engine_submit(e, &q), STATUS_OK);
    while (engine_busy(e))
        assert_int_equal(engine_step(e), STATUS_OK);
    const mix_answer *a = &l.answers[0];
    memcpy(prompt + q.n_prompt, a->tokens, (size_t)a->n_tokens * sizeof *prompt);
    const engine_request all = {
        .id = 1, .prompt = prompt, .n_prompt = q.n_prompt + a->n_tokens, .want = ENGINE_WANT_LOGITS, .owner = -1};
    assert_int_equal(engine_submit(e, &all), STATUS_OK);
    while (engine_busy(e))
        assert_int_equal(engine_step(e), STATUS_OK);
    bool told = q.want & ENGINE_WANT_PROMPT_LOGPROBS || q.prompt_candidates.top_n > 0;
    assert_int_equal(a->next_prompt, told ? q.n_prompt - 5 : 0);
    for (int p = 1; p < a->next_prompt; p++) {
        assert_int_equal(a->prompt[p].token, prompt[p]);
        check_logprob(l.logits + (p - 1) * 512, &a->prompt[p]);
        check_candidates(l.logits + (p - 1) * 512, a->prompt_candidates[p], a->n_prompt_candidates[p], &q.prompt_candidates);
    }
    for (int i = 0; i < a->n_tokens; i++) {
        const float *logits = l.logits + (q.n_prompt + i - 1) * 512;
        check_logprob(logits, &(token_logprob){.token = a->tokens[i], .rank = a->ranks[i], .logprob = a->logprobs[i]});
        check_candidates(logits, a->candidates[i], a->n_candidates[i], &q.output_candidates);
    }
    runtime_destroy(r);
    group_destroy(g);
    free(l.logits);
}

static void logprobs_are_those_of_the_logits(void **state)
{
    (void)state;
    for (int i = 1; i < MIX_REQUESTS; i++)
        check_logprobs_of(i);
}

static void listen_all(void *arg, const engine_event *e)
{
    int *n = arg;
    if (e->kind != ENGINE_EVENT_TOKEN)
        return;
    (*n)++;
    assert_int_equal(e->n_candidates, 512);
    for (int i = 1; i < 512; i++)
        assert_true(e->candidates[i].logprob <= e->candidates[i - 1].logprob && e->candidates[i].rank == i + 1);
    assert_true(e->candidates[e->rank - 1].token == e->token);
}

static void the_whole_vocabulary_may_be_asked_for(void **state)
{
    (void)state;
    static const char *const domain = "none";
    const int32_t prompt[] = {1, 2, 3}, bad_ids[] = {5, 512};
    int n = 0;
    runtime_options o = {.model_dir = support_data("qwen3_moe"),
                         .threads = 1,
                         .limits = {.max_sequences = 2, .chunk = 7, .max_length = 50, .n_domains = 1, .domains = &domain}};
    runtime *r = NULL;
    group *g = alone_group();
    assert_int_equal(runtime_create(g, &o, listen_all, &n, &r), STATUS_OK);
    engine *e = runtime_engine(r);
    engine_request q = {.prompt = prompt, .n_prompt = 3, .max_new = 5, .owner = -1, .want = ENGINE_IGNORE_EOS};
    q.output_candidates.all = true;
    assert_int_equal(engine_submit(e, &q), STATUS_OK);
    while (engine_busy(e))
        assert_int_equal(engine_step(e), STATUS_OK);
    assert_int_equal(n, 5);
    q.output_candidates.top_n = 2; /* two ways at once */
    assert_int_not_equal(engine_submit(e, &q), STATUS_OK);
    q.output_candidates = (engine_candidates){.ids = bad_ids, .n_ids = 2};
    assert_int_not_equal(engine_submit(e, &q), STATUS_OK);
    assert_non_null(strstr(status_message(), "512 is outside the vocabulary"));
    runtime_destroy(r);
    group_destroy(g);
}

/* ---- holding, counting ---- */

static void when_all_are_held_nothing_is_to_do(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *f = start(2, 64, 0);
    for (int i = 0; i < 3; i++) {
        engine_request r = make_request(i, prompt);
        submit(f, &r);
    }
    assert_int_equal(engine_step(f->engine), STATUS_OK);
    for (uint64_t i = 0; i < 3; i++)
        assert_int_equal(engine_hold(f->engine, i, true), STATUS_OK);
    assert_false(engine_busy(f->engine));
    int n = f->h.n[0];
    assert_int_equal(engine_step(f->engine), STATUS_OK);
    assert_int_equal(f->h.n[0], n);
    engine_hold(f->engine, 2, false); /* waits behind two held ones: takes the place of one */
    run(f);
    assert_int_equal(f->h.n[2], 20);
    assert_false(f->h.finished[0] && f->h.finished[1]);
    assert_int_equal(engine_cancel(f->engine, 0), STATUS_OK);
    engine_hold(f->engine, 1, false);
    run(f);
    assert_int_equal(f->h.why[0], ENGINE_FINISH_CANCELLED);
    assert_int_equal(f->h.n[1], 20);
    stop(f);
}

static void counters_tell_what_happened(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *f = start(2, 64, 0);
    engine_counters c;
    engine_get_counters(f->engine, &c);
    assert_true(c.max_running == 2 && c.kv_free_of_rank[0] == c.kv_blocks_of_rank[0] && c.load_max_over_mean[0] == 1);
    int rows = 0;
    for (int i = 0; i < 3; i++) {
        engine_request r = make_request(i, prompt);
        submit(f, &r);
        rows += r.n_prompt + r.max_new - 1;
    }
    assert_int_equal(engine_step(f->engine), STATUS_OK);
    engine_get_counters(f->engine, &c);
    assert_true(c.n_running == 2 && c.n_waiting == 1 && c.n_steps == 1 && c.last_prefill_rows == 3 + 8);
    assert_true(c.kv_free_of_rank[0] == c.kv_blocks_of_rank[0] - 2 && c.last_seconds > 0);
    run(f);
    engine_get_counters(f->engine, &c);
    assert_int_equal(c.rows_of_rank[0], rows * 4 * 3); /* each chooses 4 experts in 3 layers */
    assert_true(c.n_running == 0 && c.n_waiting == 0 && c.lateness_of_rank[0] == 0 && c.link_bytes[0] > 0 && !c.link_bytes[2]);
    stop(f);
}

/* ---- memory: the linker sends our own calls through these ---- */

static unsigned long n_allocations;
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

void *__wrap_malloc(size_t n)
{
    n_allocations++;
    return __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    n_allocations++;
    return __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    n_allocations++;
    return __real_realloc(p, n);
}

static void once_warm_a_step_allocates_nothing(void **state)
{
    (void)state;
    int32_t prompt[256];
    fixture *wide = start(1, 64, 0);
    size_t one_block = engine_kv_bytes(wide->engine) / 3; /* 96 positions are 3 blocks */
    stop(wide);
    for (int round = 0; round < 2; round++) {
        fixture *f = start(4, 16, round ? 4 * one_block : 0); /* the second time, sequences push each other out */
        for (int again = 0; again < 3; again++) {
            memset(&f->h, 0, sizeof f->h);
            for (int i = 0; i < 6; i++) {
                engine_request r = make_request(i, prompt);
                r.output_candidates.top_n = i;
                r.max_new = 60;
                submit(f, &r);
            }
            unsigned long before = n_allocations;
            assert_true(before > 0);
            run(f);
            assert_true(again == 0 || n_allocations == before);
        }
        engine_counters c;
        engine_get_counters(f->engine, &c);
        assert_true(round == 0 || c.n_preempted > 0);
        stop(f);
    }
}

/* ---- a sequence that has no numbers any more ---- */

/* Overwrites the embedding of one token by NaN in the file that holds it. */
static void poison(const char *path, int token)
{
    FILE *file = fopen(path, "r+b");
    uint64_t size = 0;
    assert_non_null(file);
    assert_int_equal(fread(&size, sizeof size, 1, file), 1);
    char *text = calloc(1, size + 1);
    cJSON *header = NULL;
    assert_int_equal(fread(text, 1, size, file), size);
    assert_int_equal(json_parse(path, text, size, &header), STATUS_OK);
    const cJSON *tensor = json_find(header, "model.embed_tokens.weight");
    if (tensor) {
        long at = (long)cJSON_GetArrayItem(json_find(tensor, "data_offsets"), 0)->valuedouble;
        assert_int_equal(fseek(file, 8 + (long)size + at + token * 64 * 2, SEEK_SET), 0); /* bf16, hidden size 64 */
        for (int i = 0; i < 64; i++)
            fwrite("\xc0\x7f", 1, 2, file);
    }
    cJSON_Delete(header);
    free(text);
    fclose(file);
}

static void a_sequence_without_numbers_ends_alone(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4096];
    snprintf(path, sizeof path, "cp %s/* %s/", support_data("qwen3_moe"), folder);
    assert_int_equal(system(path), 0);
    for (int i = 1; i <= 3; i++) {
        snprintf(path, sizeof path, "%s/model-0000%d-of-00003.safetensors", folder, i);
        poison(path, 500);
    }
    group *g = alone_group();
    mix_counts counts;
    mix_answer *want = plain_answers(), *got = calloc(MIX_REQUESTS, sizeof *got);
    mix_setting s = roomy;
    s.chunk = 9;
    support_mix_run(g, folder, &s, got, &counts);
    int n_failed = 0, n_whole = 0;
    for (int i = 0; i < MIX_REQUESTS; i++) {
        int32_t prompt[MIX_LENGTH];
        engine_request r = support_mix_request(i, prompt);
        bool poisoned = false;
        for (int j = 0; j < r.n_prompt; j++)
            poisoned |= prompt[j] == 500;
        for (int j = 0; j < want[i].n_tokens - 1; j++)
            poisoned |= want[i].tokens[j] == 500;
        assert_true(poisoned == (got[i].finish == ENGINE_FINISH_FAILED));
        if (poisoned)
            assert_non_null(strstr(got[i].reason, "layer 0: a gate gave a value that is not a number"));
        else
            support_mix_compare(&got[i], &want[i], false, "beside one that failed");
        n_failed += poisoned;
        n_whole += !poisoned;
    }
    assert_true(n_failed > 0 && n_whole > 0);
    free(want);
    free(got);
    group_destroy(g);
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a request's tokens do not depend on its company", tokens_do_not_depend_on_company, NULL, NULL, NULL},
        {"a continued request goes on with the same tokens", continued_requests_go_on_the_same, NULL, NULL, NULL},
        {"cancelling makes room for the next", cancelling_makes_room, NULL, NULL, NULL},
        {"a stop token ends its sequence", stop_tokens_end_a_sequence, NULL, NULL, NULL},
        {"a small KV budget delays and changes nothing", a_small_kv_budget_only_delays, NULL, NULL, NULL},
        {"requests that can never run are refused with a sentence", impossible_requests_are_refused, NULL, NULL, NULL},
        {"no decision of the scheduler changes an answer", no_decision_changes_an_answer, NULL, NULL, NULL},
        {"pushing sequences out and computing them again changes no answer", pushing_out_changes_no_answer, NULL, NULL, NULL},
        {"a prefix from the cache changes no answer", a_cached_prefix_changes_no_answer, NULL, NULL, NULL},
        {"alone or together, answers are the same", alone_or_together_answers_are_the_same, NULL, NULL, NULL},
        {"cancelling some changes no other", cancelling_some_changes_no_other, NULL, NULL, NULL},
        {"log-probabilities, ranks and candidates are those of the logits", logprobs_are_those_of_the_logits, NULL, NULL, NULL},
        {"the whole vocabulary may be asked for", the_whole_vocabulary_may_be_asked_for, NULL, NULL, NULL},
        {"when all are held nothing is to do", when_all_are_held_nothing_is_to_do, NULL, NULL, NULL},
        {"counters tell what happened", counters_tell_what_happened, NULL, NULL, NULL},
        {"once warm, a step allocates nothing", once_warm_a_step_allocates_nothing, NULL, NULL, NULL},
        {"a sequence without numbers ends alone, with a sentence", a_sequence_without_numbers_ends_alone, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("step loop", tests, NULL, NULL);
}
