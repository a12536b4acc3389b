/* test_worker.c - convoke-worker under mpirun with a small coordinator: it joins, serves the reference's own tokens, and ends in
 * order or at once, whatever happens to a rank, to mpirun or to the coordinator; nothing is left behind. */
#include "tests/fake_control.h"
#include "tests/support.h"
#include "tests/support_plan.h"

#include "placement/routing_stats.h"
#include "proto/clock.h"
#include "proto/safetensors.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MODEL "qwen3_moe"
enum { MAX_SEQUENCES = 8, MAX_TOKENS = 256 };

typedef Convoke__Control__ToCoordinator from_worker;
typedef Convoke__Control__Sequence sequence;

/* ---- what comes back ---- */

typedef struct {
    int32_t tokens[MAX_SEQUENCES][MAX_TOKENS];
    int n[MAX_SEQUENCES], started[MAX_SEQUENCES];
    bool finished[MAX_SEQUENCES];
    Convoke__Control__Finish finish[MAX_SEQUENCES];
    char reason[MAX_SEQUENCES][512];
    int reports;
    Convoke__Control__ReplanStage stage[MAX_SEQUENCES]; /* of plan epochs, and how often each was told */
    int told[MAX_SEQUENCES][CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REPLACED + 1];
    char refused[MAX_SEQUENCES][512];
    uint64_t plan_epoch;
} answers;

static void take_event(answers *a, const Convoke__Control__Event *e)
{
    assert_true(e->id < MAX_SEQUENCES);
    assert_false(a->finished[e->id]);
    if (e->kind == CONVOKE__CONTROL__EVENT_KIND__STARTED)
        a->started[e->id]++;
    if (e->kind == CONVOKE__CONTROL__EVENT_KIND__TOKEN) {
        assert_int_equal((int)e->n_tokens, 1);
        assert_true(a->n[e->id] < MAX_TOKENS);
        a->tokens[e->id][a->n[e->id]++] = (int32_t)e->tokens[0]->token;
    }
    if (e->kind == CONVOKE__CONTROL__EVENT_KIND__FINISHED) {
        a->finished[e->id] = true;
        a->finish[e->id] = e->finish;
        snprintf(a->reason[e->id], sizeof a->reason[0], "%s", e->reason);
    }
}

static void take_replan(answers *a, const Convoke__Control__ReplanState *r)
{
    assert_true(r->epoch < MAX_SEQUENCES && r->loaded_bytes <= r->total_bytes);
    a->stage[r->epoch] = r->stage;
    a->told[r->epoch][r->stage]++;
    snprintf(a->refused[r->epoch], sizeof a->refused[0], "%s", r->reason);
}

/* Takes one message; false: the connection has ended. */
static bool listen_once(fake_control *f, answers *a, double seconds)
{
    from_worker *m = fake_control_hear(f, seconds);
    if (!m)
        return false;
    assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT);
    a->reports++;
    for (size_t i = 0; i < m->report->n_events; i++)
        take_event(a, m->report->events[i]);
    for (size_t i = 0; i < m->report->n_replans; i++)
        take_replan(a, m->report->replans[i]);
    a->plan_epoch = m->report->partial ? a->plan_epoch : m->report->plan_epoch;
    fake_control_free(m);
    return true;
}

static void listen_until_finished(fake_control *f, answers *a, int id)
{
    while (!a->finished[id])
        assert_true(listen_once(f, a, 60));
}

/* ---- what is asked ---- */

static safetensors *reference;

static const tensor_view *reference_tensor(const char *kind, int i)
{
    char name[32];
    snprintf(name, sizeof name, "%s_%d", kind, i);
    const tensor_view *view = safetensors_find(reference, name);
    assert_non_null(view);
    return view;
}

/* The reference's prompt i, to be continued greedily. */
static sequence ask(int id, int i, int max_new)
{
    sequence q = CONVOKE__CONTROL__SEQUENCE__INIT;
    const tensor_view *prompt = reference_tensor("prompt", i);
    q.id = (uint64_t)id;
    q.tokens = (int32_t *)prompt->data;
    q.n_tokens = (size_t)prompt->shape[0];
    q.max_new = (uint32_t)max_new;
    q.ignore_eos = true;
    q.owner = -1;
    return q;
}

static void submit(fake_control *f, sequence *list, int n, uint64_t launch)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Submit submit_message = CONVOKE__CONTROL__SUBMIT__INIT;
    sequence *pointers[MAX_SEQUENCES];
    for (int i = 0; i < n; i++)
        pointers[i] = &list[i];
    submit_message.launch = launch;
    submit_message.n_sequences = (size_t)n;
    submit_message.sequences = pointers;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT;
    m.submit = &submit_message;
    fake_control_send(f, &m);
}

static void submit_one(fake_control *f, int id, int i, int max_new)
{
    sequence q = ask(id, i, max_new);
    submit(f, &q, 1, FAKE_LAUNCH);
}

static int greedy_length(int i)
{
    return (int)reference_tensor("greedy", i)->shape[0];
}

static void assert_reference(const answers *a, int id, int i)
{
    const tensor_view *greedy = reference_tensor("greedy", i);
    assert_int_equal(a->n[id], (int)greedy->shape[0]);
    assert_memory_equal(a->tokens[id], greedy->data, (size_t)a->n[id] * sizeof(int32_t));
    assert_int_equal(a->finish[id], CONVOKE__CONTROL__FINISH__LENGTH);
}

static void serve(fake_control *f, int n_ranks, const char *extra)
{
    fake_control_free(fake_control_serve(f, n_ranks, extra));
}

static void rest(double seconds)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)}, NULL);
}

/* Told to stop, the job ends with exit code 0. */
static void stop_in_order(fake_control *f)
{
    fake_control_send_stop(f);
    assert_null(fake_control_hear(f, 10));
    fake_control_await_end(f, 10);
    assert_int_equal(f->exit_code, 0);
    fake_control_close(f);
}

/* ---- serving ---- */

static void serves_reference_on(int n_ranks, const char *extra)
{
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    from_worker *m = fake_control_serve(&f, n_ranks, extra);
    assert_string_equal(m->ready->combine, "fixed");
    assert_string_equal(m->ready->model_name, MODEL);
    assert_true(m->ready->n_eos_ids > 0 && m->ready->vocab > 0 && m->ready->max_length > 0 && m->ready->n_layers > 0);
    assert_int_equal((int)m->ready->n_kv_blocks_of_rank, f.n_ranks);
    fake_control_free(m);
    sequence list[3];
    for (int i = 0; i < 3; i++)
        list[i] = ask(i, i, greedy_length(i));
    submit(&f, list, 3, FAKE_LAUNCH);
    for (int i = 0; i < 3; i++)
        listen_until_finished(&f, a, i);
    for (int i = 0; i < 3; i++)
        assert_reference(a, i, i);
    free(a);
    stop_in_order(&f);
}

static void one_rank_serves_the_reference(void **state)
{
    (void)state;
    serves_reference_on(1, NULL);
}

static void without_mpirun_too(void **state)
{
    (void)state;
    serves_reference_on(0, NULL);
}

static void two_ranks_serve_the_reference(void **state)
{
    (void)state;
    serves_reference_on(2, NULL);
}

static void four_ranks_on_two_nodes_serve_the_reference(void **state)
{
    (void)state;
    serves_reference_on(4, "--ranks-per-node 2");
}

static void a_long_answer_is_cancelled(void **state)
{
    (void)state;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    submit_one(&f, 0, 0, MAX_TOKENS / 2);
    submit_one(&f, 1, 1, greedy_length(1));
    while (a->n[0] < 3)
        assert_true(listen_once(&f, a, 30));
    fake_control_send_ids(&f, CONVOKE__CONTROL__TO_LEADER__KIND_CANCEL, FAKE_LAUNCH, 0);
    listen_until_finished(&f, a, 0);
    assert_int_equal(a->finish[0], CONVOKE__CONTROL__FINISH__CANCELLED);
    assert_true(a->n[0] < MAX_TOKENS / 2);
    listen_until_finished(&f, a, 1);
    assert_reference(a, 1, 1);
    free(a);
    stop_in_order(&f);
}

static void a_held_sequence_stands_still_until_released(void **state)
{
    (void)state;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    submit_one(&f, 2, 0, MAX_TOKENS / 2); /* the same, never held */
    listen_until_finished(&f, a, 2);
    submit_one(&f, 0, 0, MAX_TOKENS / 2);
    while (a->n[0] < 1)
        assert_true(listen_once(&f, a, 30));
    fake_control_send_ids(&f, CONVOKE__CONTROL__TO_LEADER__KIND_HOLD, FAKE_LAUNCH, 0);
    submit_one(&f, 1, 1, greedy_length(1));
    listen_until_finished(&f, a, 1);
    int held_at = a->n[0];
    assert_true(held_at < MAX_TOKENS / 2);
    submit_one(&f, 3, 1, greedy_length(1)); /* more steps, none of them its own */
    listen_until_finished(&f, a, 3);
    assert_int_equal(a->n[0], held_at);
    fake_control_send_ids(&f, CONVOKE__CONTROL__TO_LEADER__KIND_RELEASE, FAKE_LAUNCH, 0);
    listen_until_finished(&f, a, 0);
    assert_int_equal(a->n[0], MAX_TOKENS / 2);
    assert_memory_equal(a->tokens[0], a->tokens[2], sizeof a->tokens[0]);
    assert_reference(a, 1, 1);
    assert_reference(a, 3, 1);
    fake_control_send_ids(&f, CONVOKE__CONTROL__TO_LEADER__KIND_CLEAR_PREFIX_CACHE, FAKE_LAUNCH, 0);
    free(a);
    stop_in_order(&f);
}

/* ---- another plan, and statistics ---- */

static char *plan_text(int n_ranks, int n_experts, bool reversed)
{
    const char *folder = support_scratch();
    char path[4200], *text = calloc(1, 1 << 16);
    plan p = {0};
    plan_shape shape = {.n_ranks = n_ranks, .n_experts = n_experts, .n_layers = 3};
    assert_int_equal(reversed ? support_reversed_plan(&shape, NULL, &p) : plan_contiguous(&shape, NULL, &p), STATUS_OK);
    snprintf(path, sizeof path, "%s/plan.json", folder);
    assert_int_equal(plan_write(&p, MODEL, path), STATUS_OK);
    FILE *file = fopen(path, "r");
    assert_true(file && fread(text, 1, (1 << 16) - 1, file) > 0);
    fclose(file);
    plan_clear(&p);
    support_remove(folder);
    return text;
}

static void replan(fake_control *f, char *text, uint64_t epoch, uint64_t rate)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Replan r = CONVOKE__CONTROL__REPLAN__INIT;
    r.launch = FAKE_LAUNCH;
    r.epoch = epoch;
    r.plan_json = text;
    r.bytes_per_second = rate;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_REPLAN;
    m.replan = &r;
    fake_control_send(f, &m);
}

static void listen_until_stage(fake_control *f, answers *a, int epoch, Convoke__Control__ReplanStage stage)
{
    while (a->told[epoch][stage] == 0)
        assert_true(listen_once(f, a, 30));
}

static void a_plan_takes_over(void **state)
{
    (void)state;
    const Convoke__Control__ReplanStage live = CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE,
                                        refused = CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    char *reversed = plan_text(2, 16, true), *straight = plan_text(2, 16, false), *wrong = plan_text(2, 12, false);
    fake_control_open(&f, support_data(MODEL));
    f.setup.plan_epoch = 1;
    serve(&f, 2, NULL);
    for (int i = 0; i < 3; i++)
        submit_one(&f, i, i, greedy_length(i));
    while (a->n[0] < 2)
        assert_true(listen_once(&f, a, 30));
    assert_int_equal(a->plan_epoch, 1);
    replan(&f, reversed, 3, 0);
    for (int i = 0; i < 3; i++)
        listen_until_finished(&f, a, i);
    listen_until_stage(&f, a, 3, live);
    assert_int_equal(a->plan_epoch, 3);
    submit_one(&f, 3, 0, greedy_length(0)); /* under the new one from the start */
    listen_until_finished(&f, a, 3);
    for (int i = 0; i < 4; i++)
        assert_reference(a, i, i % 3);
    replan(&f, straight, 3, 0);
    listen_until_stage(&f, a, 3, refused);
    assert_non_null(strstr(a->refused[3], "epoch 3 is not above"));
    replan(&f, wrong, 4, 0);
    listen_until_stage(&f, a, 4, refused);
    assert_non_null(strstr(a->refused[4], "12 experts"));
    replan(&f, straight, 5, 20000); /* nobody is served, and it would take long */
    replan(&f, straight, 6, 0);
    listen_until_stage(&f, a, 6, live);
    assert_int_equal(a->told[5][CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REPLACED], 1);
    assert_int_equal(a->told[6][live], 1);
    assert_true(fake_control_will_say(&f, "plan epoch 6 live after"));
    free(reversed);
    free(straight);
    free(wrong);
    free(a);
    stop_in_order(&f);
}

/* The counts of all requests so far, with pairs; tokens. */
static uint64_t ask_statistics(fake_control *f, answers *a, uint64_t id, routing_stats *into)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__StatisticsRequest r = CONVOKE__CONTROL__STATISTICS_REQUEST__INIT;
    r.launch = FAKE_LAUNCH;
    r.id = id;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_STATISTICS;
    m.statistics = &r;
    fake_control_send(f, &m);
    for (;;) {
        from_worker *w = fake_control_hear(f, 30);
        assert_non_null(w);
        if (w->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT) {
            for (size_t i = 0; i < w->report->n_events; i++)
                take_event(a, w->report->events[i]);
            fake_control_free(w);
            continue;
        }
        assert_int_equal(w->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_STATISTICS);
        const Convoke__Control__Statistics *s = w->statistics;
        assert_true(s->id == id && s->last && s->part == 0 && !*s->failed);
        if (routing_stats_add_packed(into, s->counts.data, s->counts.len) != STATUS_OK)
            fail_msg("%s", status_message());
        uint64_t tokens = s->tokens;
        fake_control_free(w);
        return tokens;
    }
}

static void statistics_are_told(void **state)
{
    (void)state;
    static const int layers[] = {0, 1, 2};
    static const char *const domain = "served";
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    routing_stats *stats;
    routing_shape shape = {
        .model = MODEL, .n_experts = 16, .top_k = 4, .n_layers = 3, .layer_numbers = layers, .n_domains = 1, .domains = &domain};
    assert_int_equal(routing_stats_create(&shape, true, &stats), STATUS_OK);
    fake_control_open(&f, support_data(MODEL));
    f.setup.count_pairs = true;
    serve(&f, 4, "--ranks-per-node 2");
    uint64_t want = 0, got = ask_statistics(&f, a, 1, stats); /* nothing yet */
    for (int i = 0; i < 3; i++) {
        submit_one(&f, i, i, greedy_length(i));
        want += reference_tensor("prompt", i)->shape[0] + (uint64_t)greedy_length(i) - 1;
        got += ask_statistics(&f, a, (uint64_t)i + 2, stats);
    }
    for (int i = 0; i < 3; i++)
        listen_until_finished(&f, a, i);
    got += ask_statistics(&f, a, 9, stats);
    assert_int_equal(got, want);
    assert_int_equal(routing_stats_tokens(stats, 0, PHASE_PREFILL) + routing_stats_tokens(stats, 0, PHASE_DECODE), want);
    uint64_t choices = 0, *counts = calloc(3 * 16, sizeof *counts);
    routing_stats_sum_tokens(stats, -1, -1, counts);
    for (int i = 0; i < 3 * 16; i++)
        choices += counts[i];
    assert_int_equal(choices, want * 3 * 4);
    assert_non_null(routing_stats_next_layer_pairs(stats, 0, PHASE_DECODE));
    for (int i = 0; i < 3; i++)
        assert_reference(a, i, i);
    free(counts);
    routing_stats_destroy(stats);
    free(a);
    stop_in_order(&f);
}

/* ---- log-probabilities ---- */

static void check_prompt_event(const Convoke__Control__Event *e, const sequence *q, uint32_t *next)
{
    size_t n = 0;
    assert_int_equal(e->first_position, *next);
    assert_int_equal(e->n_candidates_of_token, e->n_tokens);
    for (size_t i = 0; i < e->n_tokens; i++) {
        assert_int_equal(e->tokens[i]->token, (uint32_t)q->tokens[e->first_position + i]);
        assert_int_equal(e->candidates_of_token[i], 3);
        assert_int_equal(e->candidates[n]->rank, 1);
        n += e->candidates_of_token[i];
    }
    assert_int_equal(e->n_candidates, n);
    *next += (uint32_t)e->n_tokens;
}

static void check_token_event(const Convoke__Control__Event *e)
{
    assert_int_equal(e->n_tokens, 1);
    assert_int_equal(e->n_candidates, 2);
    assert_int_equal(e->candidates_of_token[0], 2);
    /* greedy: the token is the best candidate itself */
    assert_int_equal(e->tokens[0]->rank, 1);
    assert_int_equal(e->tokens[0]->token, e->candidates[0]->token);
    assert_true(e->tokens[0]->logprob == e->candidates[0]->logprob && e->tokens[0]->logprob <= 0);
    assert_true(e->candidates[1]->logprob <= e->candidates[0]->logprob);
}

static void log_probabilities_come_along(void **state)
{
    (void)state;
    fake_control f;
    uint32_t next = 1; /* the first token has none */
    Convoke__Control__Candidates three = CONVOKE__CONTROL__CANDIDATES__INIT, two = CONVOKE__CONTROL__CANDIDATES__INIT;
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    sequence q = ask(0, 0, 5);
    three.top_n = 3;
    two.top_n = 2;
    q.prompt_logprobs = true;
    q.prompt_candidates = &three;
    q.output_candidates = &two;
    submit(&f, &q, 1, FAKE_LAUNCH);
    for (bool finished = false; !finished;) {
        from_worker *m = fake_control_hear(&f, 30);
        assert_non_null(m);
        for (size_t i = 0; i < m->report->n_events; i++) {
            const Convoke__Control__Event *e = m->report->events[i];
            if (e->kind == CONVOKE__CONTROL__EVENT_KIND__PROMPT)
                check_prompt_event(e, &q, &next);
            if (e->kind == CONVOKE__CONTROL__EVENT_KIND__TOKEN)
                check_token_event(e);
            finished |= e->kind == CONVOKE__CONTROL__EVENT_KIND__FINISHED;
        }
        fake_control_free(m);
    }
    assert_int_equal(next, q.n_tokens);
    stop_in_order(&f);
}

static void a_refused_sequence_fails_alone(void **state)
{
    (void)state;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 1, NULL);
    sequence list[2] = {ask(0, 0, 1 << 30), ask(1, 1, greedy_length(1))};
    submit(&f, list, 2, FAKE_LAUNCH);
    listen_until_finished(&f, a, 0);
    assert_int_equal(a->finish[0], CONVOKE__CONTROL__FINISH__FAILED);
    assert_true(strlen(a->reason[0]) > 10);
    listen_until_finished(&f, a, 1);
    assert_reference(a, 1, 1);
    free(a);
    stop_in_order(&f);
}

static void messages_of_another_launch_do_nothing(void **state)
{
    (void)state;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 1, NULL);
    sequence stranger = ask(5, 0, 4);
    submit(&f, &stranger, 1, FAKE_LAUNCH - 1);
    submit(&f, &stranger, 1, FAKE_LAUNCH + 1);
    submit_one(&f, 0, 0, greedy_length(0));
    listen_until_finished(&f, a, 0);
    assert_reference(a, 0, 0);
    assert_int_equal(a->n[5] + a->started[5], 0);
    assert_true(fake_control_will_say(&f, "the coordinator speaks of launch 6, this is launch 7"));
    assert_false(fake_control_said(&f, "launch 8"));
    free(a);
    stop_in_order(&f);
}

/* ---- joining ---- */

static void refuse(fake_control *f, const char *reason, bool later)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Refusal refusal = CONVOKE__CONTROL__REFUSAL__INIT;
    refusal.reason = (char *)reason;
    refusal.later = later;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL;
    m.refusal = &refusal;
    fake_control_send(f, &m);
}

static void hello_shows_secret_and_ranks(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    fake_control_launch(&f, 2, "--ranks-per-node 1");
    from_worker *m = fake_control_greet(&f);
    assert_int_equal((int)m->hello->protocol, CONTROL_PROTOCOL);
    assert_true(control_secret_equal(&f.secret, m->hello->secret.data, m->hello->secret.len));
    assert_int_equal((int)m->hello->n_node_of_rank, 2);
    assert_int_equal((int)m->hello->node_of_rank[1], 1);
    assert_true(strlen(m->hello->host_of_rank[1]) > 0);
    fake_control_free(m);
    refuse(&f, "others are here still", true); /* it may ask again */
    close(f.fd);
    fake_control_free(fake_control_greet(&f));
    refuse(&f, "this coordinator wants protocol 99", false);
    fake_control_await_end(&f, 10);
    assert_int_not_equal(f.exit_code, 0);
    assert_true(fake_control_said(&f, "refuses: others are here still; trying again for 30 s"));
    assert_true(fake_control_said(&f, "refuses: this coordinator wants protocol 99"));
    fake_control_close(&f);
}

static void a_secret_that_others_can_read_is_refused(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    assert_int_equal(chmod(f.secret_path, 0644), 0);
    fake_control_launch(&f, 2, NULL);
    fake_control_await_end(&f, 10);
    assert_int_not_equal(f.exit_code, 0);
    assert_true(fake_control_said(&f, "others may read or write this secret"));
    fake_control_close(&f);
}

static void workers_wait_for_a_late_coordinator_but_not_for_ever(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    close(f.listener); /* nobody listens at that port now */
    fake_control_launch(&f, 2, "--connect-seconds 1.5");
    fake_control_await_end(&f, 10);
    assert_int_not_equal(f.exit_code, 0);
    assert_true(fake_control_said(&f, "cannot be reached"));
    f.listener = -1;
    fake_control_close(&f);
}

static void a_model_that_is_not_there_is_named(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, "/nowhere/at/all");
    fake_control_launch(&f, 2, NULL);
    fake_control_free(fake_control_greet(&f));
    fake_control_send_setup(&f);
    from_worker *m = fake_control_hear(&f, 20);
    assert_non_null(m);
    assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE);
    assert_non_null(strstr(m->goodbye->reason, "/nowhere/at/all"));
    fake_control_free(m);
    fake_control_await_end(&f, 10);
    assert_int_not_equal(f.exit_code, 0);
    fake_control_close(&f);
}

/* ---- ending ---- */

/* Two long answers under way. */
static void keep_busy(fake_control *f, answers *a)
{
    submit_one(f, 0, 0, MAX_TOKENS / 2);
    submit_one(f, 1, 1, MAX_TOKENS / 2);
    while (a->n[0] < 2)
        assert_true(listen_once(f, a, 30));
}

/* A last word goes through mpirun, which dies with the job and may take it along: what must be said is said in one of a few
 * tries. Everything else must hold every time. */
static void said_in_some_try(bool (*try_once)(int which), int which)
{
    bool said = false;
    for (int i = 0; i < 4 && !said; i++)
        said = try_once(which);
    assert_true(said);
}

static bool end_without_coordinator(int busy)
{
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    if (busy)
        keep_busy(&f, a);
    close(f.fd);
    f.fd = -1;
    fake_control_await_end(&f, 3);
    assert_int_not_equal(f.exit_code, 0);
    bool said = fake_control_said(&f, "the coordinator at 127.0.0.1");
    fake_control_close(&f);
    free(a);
    return said;
}

static void without_coordinator_all_ends(void **state)
{
    (void)state;
    said_in_some_try(end_without_coordinator, false);
    said_in_some_try(end_without_coordinator, true);
}

static bool kill_rank(int victim)
{
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 3, NULL);
    keep_busy(&f, a);
    kill(f.pids[victim], SIGKILL);
    fake_control_await_end(&f, 3);
    bool said = fake_control_said(&f, victim == 0 ? "rank 0 (pid" : "rank 2 (pid");
    fake_control_close(&f);
    free(a);
    return said;
}

static void a_killed_rank_ends_the_job(void **state)
{
    (void)state;
    said_in_some_try(kill_rank, 0);
    said_in_some_try(kill_rank, 2);
}

static void a_killed_mpirun_leaves_nobody(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    kill(fake_control_mpirun(&f), SIGKILL);
    fake_control_await_end(&f, 3);
    fake_control_close(&f);
}

/* Reads until the connection ends; whether Goodbye or a beat named the rank. */
static bool hear_of_hang(fake_control *f, int rank, double hang_seconds, char *sentence, size_t size)
{
    double most_silent = 0;
    *sentence = '\0';
    for (from_worker *m; (m = fake_control_receive(f, hang_seconds + 5)); fake_control_free(m)) {
        if (m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT && (int)m->beat->n_silent_ms_of_rank > rank &&
            m->beat->silent_ms_of_rank[rank] > most_silent)
            most_silent = m->beat->silent_ms_of_rank[rank];
        if (m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE)
            snprintf(sentence, size, "%s", m->goodbye->reason);
    }
    return most_silent > 500 * hang_seconds;
}

static void a_stopped_rank_is_a_hang_when_others_need_it(void **state)
{
    (void)state;
    const double hang_seconds = 2;
    char sentence[1024], who[64];
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    f.setup.hang_ms = (uint32_t)(1e3 * hang_seconds);
    serve(&f, 3, NULL);
    kill(f.pids[1], SIGSTOP);
    rest(hang_seconds + 1); /* idle: nobody needs it */
    assert_int_equal(kill(f.pids[0], 0), 0);
    double start = clock_seconds();
    submit_one(&f, 0, 0, 8);
    assert_true(hear_of_hang(&f, 1, hang_seconds, sentence, sizeof sentence));
    fake_control_await_end(&f, hang_seconds + 3 - (clock_seconds() - start));
    snprintf(who, sizeof who, "rank 1 (pid %d, host ", (int)f.pids[1]);
    assert_non_null(strstr(sentence, who));
    assert_non_null(
        strstr(sentence, "was last heard")); /* on stderr another rank may be first, or mpirun gone before it passes it on */
    fake_control_close(&f);
}

/* Across nodes nobody sees the other's pulse: who waits gives up. */
static void a_stopped_node_is_a_hang_too(void **state)
{
    (void)state;
    char sentence[1024];
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    f.setup.hang_ms = 1500;
    serve(&f, 2, "--ranks-per-node 1");
    kill(f.pids[1], SIGSTOP);
    rest(2);
    double start = clock_seconds();
    submit_one(&f, 0, 0, 8);
    assert_true(hear_of_hang(&f, 1, 1.5, sentence, sizeof sentence));
    fake_control_await_end(&f, 2.5 + 3 - (clock_seconds() - start));
    assert_non_null(strstr(sentence, "rank 0 (host "));
    assert_non_null(strstr(sentence, "longer than the 2.5 s allowed"));
    fake_control_close(&f);
}

static void progress_is_told_before_ready(void **state)
{
    (void)state;
    int told = 0;
    bool ready = false;
    fake_control f;
    fake_control_open(&f, support_source("deploy/models/convoke-demo"));
    fake_control_launch(&f, 2, NULL);
    fake_control_free(fake_control_greet(&f));
    fake_control_send_setup(&f);
    while (!ready) {
        from_worker *m = fake_control_receive(&f, 60);
        assert_non_null(m);
        ready = m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY;
        if (m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS) {
            assert_int_equal(m->progress->n_done_of_rank, 2);
            assert_true(m->progress->done_of_rank[1] <= m->progress->total_of_rank[1]);
            told++;
        }
        fake_control_free(m);
    }
    assert_true(told > 0);
    rest(0.7); /* none comes behind */
    fake_control_send_stop(&f);
    for (from_worker *m; (m = fake_control_receive(&f, 10)); fake_control_free(m))
        assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT);
    fake_control_await_end(&f, 10);
    fake_control_close(&f);
}

static bool stop_leader(int unused)
{
    (void)unused;
    fake_control f;
    answers *a = calloc(1, sizeof *a);
    fake_control_open(&f, support_data(MODEL));
    f.setup.hang_ms = 1500;
    serve(&f, 2, NULL);
    for (int i = 0; i < MAX_SEQUENCES; i++)
        submit_one(&f, i, i % 3, MAX_TOKENS / 2);
    while (a->n[0] < 2)
        assert_true(listen_once(&f, a, 30));
    kill(f.pids[0], SIGSTOP);
    fake_control_await_end(&f, 1.5 + 3);
    bool said = fake_control_said(&f, "rank 0 (pid");
    fake_control_close(&f);
    free(a);
    return said;
}

static void a_stopped_leader_is_a_hang_too(void **state)
{
    (void)state;
    said_in_some_try(stop_leader, 0);
}

static void a_damaged_frame_ends_the_job(void **state)
{
    (void)state;
    fake_control f;
    fake_control_open(&f, support_data(MODEL));
    serve(&f, 2, NULL);
    static const unsigned char junk[] = {0xff, 0xff, 0xff, 0xff, 1, 2, 3};
    fake_control_send_bytes(&f, junk, sizeof junk);
    from_worker *m = fake_control_hear(&f, 10);
    assert_non_null(m);
    assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE);
    assert_non_null(strstr(m->goodbye->reason, "a frame of 4294967295 bytes"));
    fake_control_free(m);
    fake_control_await_end(&f, 3);
    assert_true(fake_control_said(&f, "a frame of 4294967295 bytes"));
    fake_control_close(&f);
}

static void a_terminated_leader_ends_in_order(void **state)
{
    (void)state;
    for (int n_ranks = 0; n_ranks < 3; n_ranks += 2) {
        fake_control f;
        fake_control_open(&f, support_data(MODEL));
        serve(&f, n_ranks, NULL);
        kill(f.pids[0], SIGTERM);
        from_worker *m = fake_control_hear(&f, 10);
        assert_non_null(m);
        assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE);
        assert_non_null(strstr(m->goodbye->reason, "SIGTERM"));
        fake_control_free(m);
        assert_null(fake_control_hear(&f, 10));
        fake_control_await_end(&f, 5);
        assert_int_equal(f.exit_code, 0);
        fake_control_close(&f);
    }
}

static int open_reference(void **state)
{
    (void)state;
    char path[4096];
    snprintf(path, sizeof path, "%s/reference.safetensors", support_data(MODEL));
    return safetensors_open(path, &reference) == STATUS_OK ? 0 : -1;
}

static int close_reference(void **state)
{
    (void)state;
    safetensors_close(reference);
    return 0;
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        {"one rank serves the reference's tokens", one_rank_serves_the_reference, NULL, NULL, NULL},
        {"a worker without mpirun does too", without_mpirun_too, NULL, NULL, NULL},
        {"two ranks do", two_ranks_serve_the_reference, NULL, NULL, NULL},
        {"four ranks on two nodes do", four_ranks_on_two_nodes_serve_the_reference, NULL, NULL, NULL},
        {"a cancelled sequence ends and the others go on", a_long_answer_is_cancelled, NULL, NULL, NULL},
        {"a held sequence stands still until it is released", a_held_sequence_stands_still_until_released, NULL, NULL, NULL},
        {"a plan given while serving takes over, tokens unchanged; one that cannot be is refused with the reason",
         a_plan_takes_over, NULL, NULL, NULL},
        {"statistics of all ranks are told when they are asked for", statistics_are_told, NULL, NULL, NULL},
        {"log-probabilities and candidates come along", log_probabilities_come_along, NULL, NULL, NULL},
        {"what the engine refuses fails alone, with the sentence", a_refused_sequence_fails_alone, NULL, NULL, NULL},
        {"messages of another launch do nothing and are logged once", messages_of_another_launch_do_nothing, NULL, NULL, NULL},
        {"hello shows the secret and who is where; a refusal is printed, and ends the job unless it says later",
         hello_shows_secret_and_ranks, NULL, NULL, NULL},
        {"progress is told while loading, none behind ready", progress_is_told_before_ready, NULL, NULL, NULL},
        {"a secret that others can read is refused", a_secret_that_others_can_read_is_refused, NULL, NULL, NULL},
        {"workers wait for a coordinator, but not for ever", workers_wait_for_a_late_coordinator_but_not_for_ever, NULL, NULL,
         NULL},
        {"a model that is not there is named in goodbye", a_model_that_is_not_there_is_named, NULL, NULL, NULL},
        {"without coordinator all processes end, idle or busy", without_coordinator_all_ends, NULL, NULL, NULL},
        {"a killed rank ends the job, and is named", a_killed_rank_ends_the_job, NULL, NULL, NULL},
        {"a killed mpirun leaves nobody", a_killed_mpirun_leaves_nobody, NULL, NULL, NULL},
        {"a stopped rank is a hang when others need it, not before", a_stopped_rank_is_a_hang_when_others_need_it, NULL, NULL,
         NULL},
        {"a stopped node is a hang too", a_stopped_node_is_a_hang_too, NULL, NULL, NULL},
        {"a stopped leader is a hang too", a_stopped_leader_is_a_hang_too, NULL, NULL, NULL},
        {"a damaged frame ends the job with a sentence", a_damaged_frame_ends_the_job, NULL, NULL, NULL},
        {"a terminated leader ends the job in order", a_terminated_leader_ends_in_order, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, open_reference, close_reference);
}
