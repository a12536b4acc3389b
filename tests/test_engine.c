/* test_engine.c - the step loop on one rank: what a request gives depends on the request alone, and what leaves makes room. */
#include "tests/support.h"

#include "worker/runtime.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a request's tokens do not depend on its company", tokens_do_not_depend_on_company, NULL, NULL, NULL},
        {"a continued request goes on with the same tokens", continued_requests_go_on_the_same, NULL, NULL, NULL},
        {"cancelling makes room for the next", cancelling_makes_room, NULL, NULL, NULL},
        {"a stop token ends its sequence", stop_tokens_end_a_sequence, NULL, NULL, NULL},
        {"a small KV budget delays and changes nothing", a_small_kv_budget_only_delays, NULL, NULL, NULL},
        {"requests that can never run are refused with a sentence", impossible_requests_are_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("step loop", tests, NULL, NULL);
}
