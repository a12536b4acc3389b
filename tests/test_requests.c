/* test_requests.c - the table of requests against workers that do exactly what the test says. */
#include "tests/support.h"

#include "cluster/requests_workers.h"
#include "proto/clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_SENT = 256, MAX_TOKENS = 64 };

/* What the workers were told. */
typedef struct {
    uint64_t id;
    int32_t tokens[MAX_TOKENS];
    int n_tokens, n_prior, max_new, index, owner;
    uint64_t seed, arrival;
    bool prompt_logprobs;
} sent_sequence;

typedef struct {
    sent_sequence sent[MAX_SENT];
    int n_sent;
    uint64_t cancelled[MAX_SENT];
    int n_cancelled;
    int n_holds, n_releases;
    journal *journal;
    requests *all;
    int wakes;
} fixture;

static void fake_submit(void *arg, Convoke__Control__Sequence *const *sequences, int n)
{
    fixture *f = arg;
    for (int i = 0; i < n; i++) {
        const Convoke__Control__Sequence *s = sequences[i];
        sent_sequence *to = &f->sent[f->n_sent];
        *to = (sent_sequence){.id = s->id,
                              .n_tokens = (int)s->n_tokens,
                              .n_prior = (int)s->n_prior,
                              .max_new = (int)s->max_new,
                              .index = (int)s->sequence_index,
                              .owner = s->owner,
                              .seed = s->seed,
                              .arrival = s->arrival,
                              .prompt_logprobs = s->prompt_logprobs};
        memcpy(to->tokens, s->tokens, s->n_tokens * sizeof *s->tokens);
        __atomic_store_n(&f->n_sent, f->n_sent + 1, __ATOMIC_RELEASE); /* one test looks from another thread */
    }
}

static void fake_cancel(void *arg, const uint64_t *ids, int n)
{
    fixture *f = arg;
    for (int i = 0; i < n; i++)
        f->cancelled[f->n_cancelled++] = ids[i];
}

static void fake_hold(void *arg, const uint64_t *ids, int n, bool hold)
{
    fixture *f = arg;
    (void)ids;
    *(hold ? &f->n_holds : &f->n_releases) += n;
}

static const requests_limits limits = {
    .vocab = 1000, .max_length = 64, .kv_block = 16, .n_ranks = 2, .largest_kv_blocks = 3, .n_eos = 1, .eos_ids = {7}};

static void make_table(fixture *f, const char *journal_path, const requests_options *wish)
{
    static const char *const usual_names[] = {"demo"};
    static const requests_backend backend = {.submit = fake_submit, .cancel = fake_cancel, .hold = fake_hold};
    requests_options o = *wish;
    assert_int_equal(journal_open(journal_path, 1, &f->journal), STATUS_OK);
    o.model_names = wish->model_names ? wish->model_names : usual_names;
    o.n_model_names = 1;
    o.defaults = (sampling_defaults){.temperature = 0.5F};
    o.journal = f->journal;
    assert_int_equal(requests_create(&o, &backend, f, &f->all), STATUS_OK);
}

static const requests_options usual = {
    .max_waiting = 8, .max_sequences_of_request = 4, .max_unread_bytes = 1 << 20, .remember_seconds = 60, .max_remembered = 16};

static void make_ready(fixture *f)
{
    requests_set_limits(f->all, &limits);
    assert_int_equal(requests_replay(f->all), STATUS_OK);
    requests_workers_ready(f->all);
    requests_refuse_new(f->all, REFUSAL_NONE, "");
}

static fixture *start(void)
{
    fixture *f = calloc(1, sizeof *f);
    make_table(f, NULL, &usual);
    make_ready(f);
    return f;
}

static void finish(fixture *f)
{
    requests_destroy(f->all);
    journal_close(f->journal);
    free(f);
}

static const int32_t prompt[] = {11, 12, 13};

static request_wish wish_of(const char *id)
{
    return (request_wish){.id = id, .ids = prompt, .n_ids = 3, .max_new = 5, .owner = -1, .no_text = true};
}

static request *open_request(fixture *f, const request_wish *w)
{
    request *r = NULL;
    refusal why;
    if (requests_open(f->all, w, &r, &why) != REFUSAL_NONE)
        fail_msg("%s", why.sentence);
    return r;
}

static refusal refused(fixture *f, const request_wish *w)
{
    request *r = NULL;
    refusal why;
    assert_int_not_equal(requests_open(f->all, w, &r, &why), REFUSAL_NONE);
    assert_null(r);
    return why;
}

/* The workers speak: one event. */
static void say(fixture *f, Convoke__Control__Event *e)
{
    Convoke__Control__Report report = CONVOKE__CONTROL__REPORT__INIT;
    report.n_events = 1;
    report.events = &e;
    requests_workers_report(f->all, &report);
}

static void say_started(fixture *f, uint64_t id, unsigned owner)
{
    Convoke__Control__Event e = CONVOKE__CONTROL__EVENT__INIT;
    e.id = id;
    e.kind = CONVOKE__CONTROL__EVENT_KIND__STARTED;
    e.owner = owner;
    say(f, &e);
}

static void say_token(fixture *f, uint64_t id, int32_t token)
{
    Convoke__Control__Event e = CONVOKE__CONTROL__EVENT__INIT;
    Convoke__Control__TokenLogprob t = CONVOKE__CONTROL__TOKEN_LOGPROB__INIT, *one = &t;
    t.token = (uint32_t)token;
    t.logprob = -0.5F;
    t.rank = 1;
    e.id = id;
    e.kind = CONVOKE__CONTROL__EVENT_KIND__TOKEN;
    e.tokens = &one;
    e.n_tokens = 1;
    say(f, &e);
}

static void say_finished(fixture *f, uint64_t id, Convoke__Control__Finish how)
{
    Convoke__Control__Event e = CONVOKE__CONTROL__EVENT__INIT;
    e.id = id;
    e.kind = CONVOKE__CONTROL__EVENT_KIND__FINISHED;
    e.finish = how;
    e.reason = (char *)"the reason";
    say(f, &e);
}

static void count_wake(void *arg)
{
    fixture *f = arg;
    f->wakes++;
}

static reader *open_reader(fixture *f, request *r, int from, bool owns)
{
    reader *d;
    assert_int_equal(reader_open(r, from, owns, count_wake, f, &d), STATUS_OK);
    return d;
}

static output_piece take(reader *d)
{
    output_piece p;
    bool done;
    assert_true(reader_take(d, &p, &done));
    return p;
}

static void nothing_there(reader *d, bool expect_done)
{
    output_piece p;
    bool done;
    assert_false(reader_take(d, &p, &done));
    assert_int_equal(done, expect_done);
}

/* ---- the tests ------------------------------------------------------------------------------------------------------------- */

static void runs(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    request *r = open_request(f, &w);
    assert_int_equal(f->n_sent, 1);
    assert_int_equal(f->sent[0].n_tokens, 3);
    assert_int_equal(f->sent[0].n_prior, 0);
    reader *d = open_reader(f, r, 0, true);
    nothing_there(d, false);
    say_started(f, f->sent[0].id, 1);
    assert_int_equal(f->wakes, 0);
    say_token(f, f->sent[0].id, 21);
    assert_int_equal(f->wakes, 1);
    say_token(f, f->sent[0].id, 22);
    assert_int_equal(f->wakes, 1); /* once, until somebody has looked */
    output_piece p = take(d);
    assert_true(p.has_prompt);
    assert_int_equal(p.prompt[2].token, 13);
    assert_int_equal(p.n_tokens, 2);
    assert_int_equal(p.tokens[1].token, 22);
    assert_int_equal(p.finish, FINISH_NONE);
    nothing_there(d, false);
    say_token(f, f->sent[0].id, 7);
    say_finished(f, f->sent[0].id, CONVOKE__CONTROL__FINISH__STOP);
    p = take(d);
    assert_false(p.has_prompt);
    assert_int_equal(p.first_token, 2);
    assert_int_equal(p.finish, FINISH_EOS);
    assert_int_equal(p.stop_token, 7);
    assert_int_equal(p.n_output, 3);
    nothing_there(d, true);
    reader_close(d);
    request_release(r);
    assert_int_equal(f->n_cancelled, 0);
    finish(f);
}

static void lost_workers(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a"), w2 = wish_of("b");
    w.n = 2;
    request *r = open_request(f, &w), *r2 = open_request(f, &w2);
    reader *d = open_reader(f, r, 0, true), *d2 = open_reader(f, r2, 0, true);
    assert_int_equal(f->n_sent, 3);
    assert_int_equal(f->sent[0].seed, f->sent[1].seed);
    uint64_t first = f->sent[0].id, second = f->sent[1].id;
    say_token(f, first, 21);
    say_token(f, first, 22);
    say_token(f, second, 31);
    say_finished(f, second, CONVOKE__CONTROL__FINISH__CANCELLED);
    requests_workers_lost(f->all);
    say_token(f, first, 99); /* a word of the dead */
    requests_workers_ready(f->all);
    assert_int_equal(f->n_sent, 5); /* what has ended is not sent again */
    const sent_sequence *again = &f->sent[3];
    assert_int_equal(again->n_tokens, 5);
    assert_int_equal(again->n_prior, 2);
    assert_int_equal(again->tokens[3], 21);
    assert_int_equal(again->tokens[4], 22);
    assert_int_equal(again->max_new, 3);
    assert_int_equal(again->seed, f->sent[0].seed);
    assert_int_equal(f->sent[4].n_prior, 0);
    assert_true(again->arrival < f->sent[4].arrival); /* still the older one */
    say_token(f, again->id, 23);
    output_piece p = take(d);
    int sum = p.n_tokens;
    p = take(d);
    assert_int_equal(sum + p.n_tokens, 4); /* 21 22 23 and 31 */
    reader_close(d);
    reader_close(d2);
    request_release(r);
    request_release(r2);
    finish(f);
}

static void attach(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    request *r = open_request(f, &w), *found;
    reader *owner = open_reader(f, r, 0, true);
    for (int i = 0; i < 3; i++)
        say_token(f, f->sent[0].id, 21 + i);
    refusal why;
    assert_int_equal(requests_find(f->all, "nobody", &found, &why), REFUSAL_NOT_FOUND);
    assert_int_equal(requests_find(f->all, "a", &found, &why), REFUSAL_NONE);
    reader *d = open_reader(f, found, 2, false);
    output_piece p = take(d);
    assert_false(p.has_prompt);
    assert_int_equal(p.first_token, 2);
    assert_int_equal(p.n_tokens, 1);
    assert_int_equal(p.tokens[0].token, 23);
    reader_close(d);
    assert_int_equal(f->n_cancelled, 0); /* a guest leaves: nothing happens */
    reader_close(owner);
    assert_int_equal(f->n_cancelled, 1); /* the one it was for leaves: it ends */
    request_release(found);
    request_release(r);
    finish(f);
}

/* After a coordinator was killed a client may know tokens that the journal does not: they come a second time, but not to it. */
static void ahead_of_the_journal(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    request *r = open_request(f, &w);
    say_token(f, f->sent[0].id, 21);
    reader *d = open_reader(f, r, 3, false), *far = open_reader(f, r, 1000, false);
    nothing_there(d, false);
    say_token(f, f->sent[0].id, 22);
    say_token(f, f->sent[0].id, 23);
    nothing_there(d, false);
    say_token(f, f->sent[0].id, 24);
    output_piece p = take(d);
    assert_false(p.has_prompt);
    assert_int_equal(p.first_token, 3);
    assert_int_equal(p.n_tokens, 1);
    assert_int_equal(p.tokens[0].token, 24);
    assert_int_equal(f->wakes, 1);
    nothing_there(d, false);
    nothing_there(far, false);
    say_token(f, f->sent[0].id, 7);
    say_finished(f, f->sent[0].id, CONVOKE__CONTROL__FINISH__STOP);
    p = take(far); /* it never got that far: only its end is to be told */
    assert_int_equal(p.n_tokens, 0);
    assert_int_equal(p.text_size, 0);
    assert_int_equal(p.finish, FINISH_EOS);
    nothing_there(far, true);
    p = take(d);
    assert_int_equal(p.first_token, 4);
    assert_int_equal(p.finish, FINISH_EOS);
    reader_close(d);
    reader_close(far);
    request_release(r);
    finish(f);
}

static void linger(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    w.linger_ms = 50;
    request *r = open_request(f, &w);
    reader_close(open_reader(f, r, 0, true));
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 0);
    reader *back = open_reader(f, r, 0, true);
    usleep(80 * 1000);
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 0); /* it has a reader again */
    reader_close(back);
    usleep(80 * 1000);
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 1);
    request_release(r);
    finish(f);
}

static void refusals(void **state)
{
    (void)state;
    fixture *f = start();
    static const int32_t bad_ids[] = {1, 1000};
    static const struct {
        const char *why;
        refusal_kind kind;
        request_wish w;
    } cases[] = {
        {"is not served here", REFUSAL_NOT_FOUND, {.model = "other", .ids = prompt, .n_ids = 3}},
        {"the prompt is empty", REFUSAL_BAD, {.owner = -1}},
        {"1000, outside the vocabulary of 1000", REFUSAL_BAD, {.ids = bad_ids, .n_ids = 2}},
        {"3 prompt tokens and 62 new ones are more than the 64", REFUSAL_TOO_LARGE, {.ids = prompt, .n_ids = 3, .max_new = 62}},
        {"a rank has 48", REFUSAL_TOO_LARGE, {.ids = prompt, .n_ids = 3, .max_new = 60}},
        {"temperature: -1", REFUSAL_BAD, {.ids = prompt, .n_ids = 3, .has_temperature = true, .temperature = -1}},
        {"top_p: 2", REFUSAL_BAD, {.ids = prompt, .n_ids = 3, .has_top_p = true, .top_p = 2}},
        {"n: 5", REFUSAL_BAD, {.ids = prompt, .n_ids = 3, .n = 5}},
        {"data-parallel rank 2", REFUSAL_BAD, {.ids = prompt, .n_ids = 3, .max_new = 1, .owner = 2}},
        {"min_tokens: 6", REFUSAL_BAD, {.ids = prompt, .n_ids = 3, .max_new = 5, .min_new = 6}},
        {"needs a tokenizer.json", REFUSAL_UNSUPPORTED, {.has_text = true, .text = "x", .text_size = 1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        refusal why = refused(f, &cases[i].w);
        assert_int_equal(why.kind, cases[i].kind);
        if (!strstr(why.sentence, cases[i].why))
            fail_msg("\"%s\" does not say \"%s\"", why.sentence, cases[i].why);
    }
    assert_int_equal(f->n_sent, 0);
    finish(f);
}

static void same_id(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    request *r = open_request(f, &w);
    assert_int_equal(refused(f, &w).kind, REFUSAL_EXISTS);
    request_abort(r);
    request_release(r);
    r = open_request(f, &w); /* the first is over */
    request_release(r);
    finish(f);
}

static void queue_full(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of(NULL);
    w.n = 4;
    request *a = open_request(f, &w), *b = open_request(f, &w);
    w.n = 1;
    refusal why = refused(f, &w);
    assert_int_equal(why.kind, REFUSAL_FULL);
    assert_true(why.retry_ms > 0);
    say_started(f, f->sent[0].id, 0); /* one leaves the queue */
    request *c = open_request(f, &w);
    request_release(a);
    request_release(b);
    request_release(c);
    finish(f);
}

static void slow_reader(void **state)
{
    (void)state;
    fixture *f = calloc(1, sizeof *f);
    requests_options o = usual;
    o.max_unread_bytes = 3 * sizeof(token_info);
    make_table(f, NULL, &o);
    make_ready(f);
    request_wish w = wish_of("a");
    request *r = open_request(f, &w);
    reader *d = open_reader(f, r, 0, true);
    for (int i = 0; i < 3; i++)
        say_token(f, f->sent[0].id, 21);
    assert_int_equal(f->n_holds, 0);
    say_token(f, f->sent[0].id, 21);
    assert_int_equal(f->n_holds, 1);
    assert_int_equal(f->n_releases, 0);
    take(d);
    assert_int_equal(f->n_releases, 1);
    reader_close(d);
    request_release(r);
    finish(f);
}

static void pauses(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a"), w2 = wish_of("b");
    request *r = open_request(f, &w);
    say_started(f, f->sent[0].id, 0);
    requests_pause(f->all, true, false);
    assert_int_equal(f->n_holds, 0); /* what runs may finish */
    request *r2 = open_request(f, &w2);
    assert_int_equal(f->n_sent, 1); /* what is new waits */
    requests_pause(f->all, true, true);
    assert_int_equal(f->n_holds, 1);
    requests_pause(f->all, false, false);
    assert_int_equal(f->n_releases, 1);
    assert_int_equal(f->n_sent, 2);
    request_release(r);
    request_release(r2);
    finish(f);
}

static void prompt_first(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    w.prompt_logprobs = true;
    request *r = open_request(f, &w);
    reader *d = open_reader(f, r, 0, true);
    Convoke__Control__TokenLogprob t[2] = {CONVOKE__CONTROL__TOKEN_LOGPROB__INIT, CONVOKE__CONTROL__TOKEN_LOGPROB__INIT};
    Convoke__Control__TokenLogprob *both[2] = {&t[0], &t[1]};
    t[0].token = 12;
    t[0].logprob = -1;
    t[1].token = 13;
    t[1].logprob = -2;
    Convoke__Control__Event e = CONVOKE__CONTROL__EVENT__INIT;
    e.kind = CONVOKE__CONTROL__EVENT_KIND__PROMPT;
    e.id = f->sent[0].id;
    e.first_position = 1;
    e.tokens = both;
    e.n_tokens = 1;
    say(f, &e);
    nothing_there(d, false);
    e.n_tokens = 2; /* again from the start, and further: another chunking after a restart */
    say(f, &e);
    say_token(f, f->sent[0].id, 21);
    output_piece p = take(d);
    assert_true(p.has_prompt);
    assert_true(p.prompt[1].logprob == -1 && p.prompt[2].logprob == -2);
    assert_int_equal(p.prompt[0].rank, 0);
    reader_close(d);
    request_release(r);
    finish(f);
}

static void restart_with_journal(void **state)
{
    (void)state;
    char path[] = "/tmp/convoke-test-requests-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    unlink(path);
    fixture *f = calloc(1, sizeof *f);
    make_table(f, path, &usual);
    make_ready(f);
    request_wish running = wish_of("running"), over = wish_of("over");
    request *r = open_request(f, &running), *r2 = open_request(f, &over);
    uint64_t seed = f->sent[0].seed;
    say_token(f, f->sent[0].id, 21);
    say_token(f, f->sent[0].id, 22);
    say_token(f, f->sent[1].id, 41);
    say_finished(f, f->sent[1].id, CONVOKE__CONTROL__FINISH__LENGTH);
    request_release(r);
    request_release(r2);
    finish(f);

    f = calloc(1, sizeof *f);
    make_table(f, path, &usual);
    make_ready(f);
    assert_int_equal(f->n_sent, 1);
    assert_int_equal(f->sent[0].n_prior, 2);
    assert_int_equal(f->sent[0].tokens[4], 22);
    assert_int_equal(f->sent[0].seed, seed);
    refusal why;
    assert_int_equal(requests_find(f->all, "over", &r2, &why), REFUSAL_NONE);
    reader *d = open_reader(f, r2, 0, false);
    output_piece p = take(d);
    assert_int_equal(p.tokens[0].token, 41);
    assert_int_equal(p.finish, FINISH_LENGTH);
    reader_close(d);
    request_release(r2);
    finish(f);
    char other[64];
    static const char *const tails[] = {"", "-wal", "-shm"};
    for (size_t i = 0; i < 3; i++) {
        snprintf(other, sizeof other, "%s%s", path, tails[i]);
        unlink(other);
    }
}

/* ---- edges ----------------------------------------------------------------------------------------------------------------- */

static request *find_request(fixture *f, const char *id)
{
    request *r = NULL;
    refusal why;
    assert_int_equal(requests_find(f->all, id, &r, &why), REFUSAL_NONE);
    return r;
}

static void reattached_lives(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    w.linger_ms = 30;
    request *r = open_request(f, &w);
    reader *owner = open_reader(f, r, 0, true);
    reader_close(owner); /* the connection broke */
    reader *guest = open_reader(f, r, 0, false);
    usleep(50 * 1000);
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 0);
    reader_close(guest);
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 0); /* its time begins when the last one leaves */
    usleep(50 * 1000);
    requests_tick(f->all);
    assert_int_equal(f->n_cancelled, 1);
    request_release(r);
    finish(f);
}

static void end_at_the_kill(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish full = wish_of("full"), over = wish_of("over");
    full.max_new = 2;
    request *r = open_request(f, &full), *r2 = open_request(f, &over);
    reader *d = open_reader(f, r, 0, true), *d2 = open_reader(f, r2, 0, true);
    say_started(f, f->sent[0].id, 0);
    say_token(f, f->sent[0].id, 21);
    say_token(f, f->sent[0].id, 22); /* the last one, and the workers die before they say so */
    say_token(f, f->sent[1].id, 7);  /* end of sequence, the same */
    requests_workers_lost(f->all);
    requests_workers_ready(f->all);
    assert_int_equal(f->n_sent, 2);
    assert_int_equal(take(d).finish, FINISH_LENGTH);
    assert_int_equal(take(d2).finish, FINISH_EOS);
    requests_counts n;
    requests_count(f->all, &n);
    assert_int_equal(n.n_live + n.n_started + n.n_waiting, 0);
    reader_close(d);
    reader_close(d2);
    request_release(r);
    request_release(r2);
    finish(f);
}

static void fewer_ranks(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    w.owner = 1;
    request *r = open_request(f, &w);
    assert_int_equal(f->sent[0].owner, 1);
    requests_workers_lost(f->all);
    requests_limits less = limits;
    less.n_ranks = 1;
    requests_set_limits(f->all, &less);
    requests_workers_ready(f->all);
    assert_int_equal(f->sent[1].owner, -1);
    request_release(r);
    finish(f);
}

static requests_counts count(fixture *f)
{
    requests_counts n;
    requests_count(f->all, &n);
    return n;
}

static void pause_over_restart(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a"), w2 = wish_of("b");
    request *running = open_request(f, &w), *queued = open_request(f, &w2);
    uint64_t first = f->sent[0].id, second = f->sent[1].id;
    say_started(f, first, 0);
    say_token(f, first, 21);
    requests_workers_lost(f->all);
    requests_pause(f->all, true, false); /* while there are no workers */
    assert_int_equal(count(f).n_begun, 1);
    requests_workers_ready(f->all);
    assert_int_equal(f->n_sent, 3); /* what had begun goes on, what had not waits */
    assert_int_equal(f->sent[2].id, first);
    assert_int_equal(f->n_holds, 0);
    say_started(f, first, 0);
    for (int i = 0; i < 4; i++)
        say_token(f, first, 22 + i);
    say_finished(f, first, CONVOKE__CONTROL__FINISH__LENGTH);
    assert_int_equal(count(f).n_begun, 0);
    requests_pause(f->all, false, false);
    assert_int_equal(f->n_sent, 4);
    assert_int_equal(f->sent[3].id, second);
    /* one that starts at the moment of the pause is held, and nobody waits for it */
    requests_pause(f->all, true, false);
    assert_int_equal(f->n_holds, 1);
    say_started(f, second, 0);
    assert_int_equal(count(f).n_begun, 0);
    requests_pause(f->all, false, false);
    assert_int_equal(f->n_releases, 1);
    request_release(running);
    request_release(queued);
    finish(f);
}

static void say_prompt(fixture *f, uint64_t id, unsigned first, int n)
{
    Convoke__Control__TokenLogprob t[2] = {CONVOKE__CONTROL__TOKEN_LOGPROB__INIT, CONVOKE__CONTROL__TOKEN_LOGPROB__INIT};
    Convoke__Control__TokenLogprob *both[2] = {&t[0], &t[1]};
    Convoke__Control__Event e = CONVOKE__CONTROL__EVENT__INIT;
    t[0].logprob = t[1].logprob = -1;
    t[0].rank = t[1].rank = 1;
    e.kind = CONVOKE__CONTROL__EVENT_KIND__PROMPT;
    e.id = id;
    e.first_position = first;
    e.tokens = both;
    e.n_tokens = (size_t)n;
    say(f, &e);
}

static void prompt_of_many(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    w.prompt_logprobs = true;
    w.n = 2;
    request *r = open_request(f, &w);
    reader *d = open_reader(f, r, 0, true);
    assert_true(f->sent[0].prompt_logprobs && !f->sent[1].prompt_logprobs);
    say_token(f, f->sent[1].id, 31);
    say_prompt(f, f->sent[0].id, 1, 1);
    nothing_there(d, false);
    requests_workers_lost(f->all);
    requests_workers_ready(f->all);
    assert_true(f->sent[2].prompt_logprobs && !f->sent[3].prompt_logprobs);
    say_finished(f, f->sent[2].id, CONVOKE__CONTROL__FINISH__FAILED); /* nobody brings it now: no reason to wait */
    output_piece p = take(d);
    assert_true(p.has_prompt);
    assert_null(p.prompt); /* not whole: rather none */
    assert_int_equal(p.finish, FINISH_FAILED);
    assert_int_equal(take(d).tokens[0].token, 31);
    reader_close(d);
    request_release(r);
    finish(f);
}

static int32_t id_of(const tokenizer *t, const char *token)
{
    int32_t id = tokenizer_find(t, token);
    assert_true(id >= 0);
    return id;
}

static void early_stop_string(void **state)
{
    (void)state;
    fixture *f = calloc(1, sizeof *f);
    requests_options o = usual;
    tokenizer *t = NULL;
    assert_int_equal(tokenizer_load(support_source("deploy/models/convoke-demo"), &t), STATUS_OK);
    o.tokenizer = t;
    make_table(f, NULL, &o);
    make_ready(f);
    int32_t a = id_of(t, "a");
    const char *stop = "aa";
    for (int include = 0; include < 2; include++) {
        request_wish w = wish_of(NULL);
        w.no_text = false;
        w.stops = &stop;
        w.n_stops = 1;
        w.min_new = 2;
        w.include_stop = include;
        request *r = open_request(f, &w);
        reader *d = open_reader(f, r, 0, true);
        for (int i = 0; i < 2; i++)
            say_token(f, f->sent[include].id, a);
        output_piece early = take(d);
        assert_int_equal(early.text_size, 2); /* too early to stop, so it is shown */
        assert_true(early.text_after[0] == 0 && early.text_after[1] == 2);
        say_token(f, f->sent[include].id, a); /* the stop string that ends here began in what is shown */
        output_piece p = take(d);
        assert_int_equal(p.finish, FINISH_STOP_STRING);
        assert_int_equal(p.text_size, include);
        reader_close(d);
        request_release(r);
    }
    assert_int_equal(f->n_cancelled, 2);
    finish(f);
    tokenizer_destroy(t);
}

static void limits_of_lists(void **state)
{
    (void)state;
    fixture *f = start();
    static int32_t many[1001];
    static const bias_wish biases[1001];
    static const struct {
        const char *why;
        request_wish w;
    } cases[] = {
        {"stop_token_ids: 1001 tokens of a vocabulary of 1000", {.stop_ids = many, .n_stop_ids = 1001}},
        {"allowed_token_ids: 1001", {.allowed = many, .n_allowed = 1001}},
        {"logit_bias: 1001", {.biases = biases, .n_biases = 1001}},
        {"output candidates: 1001", {.output_candidates = {.ids = many, .n_ids = 1001}}},
        {"byte 2 is a control character", {.id = "id\n"}},
        {"max_tokens, min_tokens", {.max_new = -1}},
        {"n: -1", {.n = -1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        request_wish w = cases[i].w;
        w.ids = prompt;
        w.n_ids = 3;
        w.owner = -1;
        refusal why = refused(f, &w);
        assert_int_equal(why.kind, REFUSAL_BAD);
        if (!strstr(why.sentence, cases[i].why))
            fail_msg("\"%s\" does not say \"%s\"", why.sentence, cases[i].why);
    }
    requests_limits large = {.vocab = 200000, .max_length = 100000, .kv_block = 16, .n_ranks = 1, .largest_kv_blocks = 100000};
    requests_set_limits(f->all, &large);
    request_wish w = wish_of("a");
    w.output_candidates.all = true;
    w.max_new = 90000;
    refusal why = refused(f, &w);
    assert_int_equal(why.kind, REFUSAL_TOO_LARGE);
    assert_non_null(strstr(why.sentence, "output candidates: 90000 tokens with 200000 each"));
    finish(f);
}

static void too_many_at_once(void **state)
{
    (void)state;
    fixture *f = calloc(1, sizeof *f);
    requests_options o = usual;
    o.max_waiting = 3;
    make_table(f, NULL, &o);
    make_ready(f);
    request_wish w = wish_of("a");
    w.n = 4;
    assert_int_equal(refused(f, &w).kind, REFUSAL_BAD); /* coming again later would not help */
    finish(f);
}

/* Aborts "x" as soon as it is there: most often while the journal is still writing it down. */
static void *abort_soon(void *arg)
{
    fixture *f = arg;
    while (count(f).n_live == 0)
        ;
    requests_abort(f->all, "x");
    return NULL;
}

static void aborted_at_once(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4096];
    snprintf(path, sizeof path, "%s/journal", folder);
    fixture *f = calloc(1, sizeof *f);
    make_table(f, path, &usual);
    make_ready(f);
    request_wish w = wish_of("x");
    for (int i = 0; i < 10; i++) {
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, abort_soon, f), 0);
        request *r = open_request(f, &w); /* its id is free again each time */
        pthread_join(thread, NULL);
        request_release(r);
    }
    finish(f);
    f = calloc(1, sizeof *f);
    make_table(f, path, &usual);
    make_ready(f);
    assert_int_equal(f->n_sent, 0); /* aborted is aborted, over a restart too */
    request *r = find_request(f, "x");
    reader *d = open_reader(f, r, 0, false);
    assert_int_equal(take(d).finish, FINISH_ABORTED);
    reader_close(d);
    request_release(r);
    finish(f);
    support_remove(folder);
}

static void another_model(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    static const char *const names[] = {"other"};
    char path[4096];
    snprintf(path, sizeof path, "%s/journal", folder);
    fixture *f = calloc(1, sizeof *f);
    make_table(f, path, &usual);
    make_ready(f);
    request_wish w = wish_of("running"), w2 = wish_of("over");
    request *r = open_request(f, &w), *r2 = open_request(f, &w2);
    say_token(f, f->sent[0].id, 21);
    say_token(f, f->sent[0].id, 22);
    say_token(f, f->sent[1].id, 7);
    say_finished(f, f->sent[1].id, CONVOKE__CONTROL__FINISH__STOP);
    request_release(r);
    request_release(r2);
    finish(f);
    f = calloc(1, sizeof *f);
    requests_options o = usual;
    o.model_names = names;
    make_table(f, path, &o);
    make_ready(f);
    assert_int_equal(f->n_sent, 0);
    r = find_request(f, "running");
    r2 = find_request(f, "over");
    reader *d = open_reader(f, r, 0, false), *d2 = open_reader(f, r2, 0, false);
    output_piece p = take(d);
    assert_int_equal(p.finish, FINISH_FAILED);
    assert_non_null(strstr(p.failed.sentence, "accepted for model demo, and other is served now"));
    assert_int_equal(take(d2).finish, FINISH_EOS);
    reader_close(d);
    reader_close(d2);
    request_release(r);
    request_release(r2);
    finish(f);
    support_remove(folder);
}

static void unknown_until_replayed(void **state)
{
    (void)state;
    fixture *f = calloc(1, sizeof *f);
    request *r;
    refusal why;
    make_table(f, NULL, &usual);
    requests_set_limits(f->all, &limits);
    assert_int_equal(requests_find(f->all, "a", &r, &why), REFUSAL_UNAVAILABLE);
    assert_int_equal(requests_replay(f->all), STATUS_OK);
    assert_int_equal(requests_find(f->all, "a", &r, &why), REFUSAL_NOT_FOUND);
    finish(f);
}

static void same_id_while_read(void **state)
{
    (void)state;
    fixture *f = start();
    request_wish w = wish_of("a");
    request *r = open_request(f, &w);
    reader *d = open_reader(f, r, 0, true);
    say_token(f, f->sent[0].id, 21);
    say_finished(f, f->sent[0].id, CONVOKE__CONTROL__FINISH__CANCELLED);
    request *r2 = open_request(f, &w); /* the first is forgotten, but still read */
    request_release(r);
    assert_int_equal(take(d).tokens[0].token, 21);
    nothing_there(d, true);
    reader_close(d);
    request *found = find_request(f, "a");
    assert_ptr_equal(found, r2);
    request_release(found);
    request_release(r2);
    finish(f);
}

/* One thread speaks for the workers, others open, read and close: for the thread sanitizer. */
typedef struct {
    fixture *f;
    int number;
} client;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t news;
    bool woken;
} sleeper;

static void wake_sleeper(void *arg)
{
    sleeper *s = arg;
    pthread_mutex_lock(&s->lock);
    s->woken = true;
    pthread_cond_signal(&s->news);
    pthread_mutex_unlock(&s->lock);
}

static int read_all(request *r)
{
    sleeper s = {.lock = PTHREAD_MUTEX_INITIALIZER, .news = PTHREAD_COND_INITIALIZER};
    reader *d;
    int n = 0;
    assert_int_equal(reader_open(r, 0, true, wake_sleeper, &s, &d), STATUS_OK);
    for (bool done = false; !done;) {
        output_piece p;
        if (reader_take(d, &p, &done)) {
            n += p.n_tokens;
            continue;
        }
        pthread_mutex_lock(&s.lock);
        while (!s.woken && !done)
            pthread_cond_wait(&s.news, &s.lock);
        s.woken = false;
        pthread_mutex_unlock(&s.lock);
    }
    reader_close(d);
    return n;
}

static void *be_client(void *arg)
{
    client *c = arg;
    for (int i = 0; i < 20; i++) {
        char id[32];
        snprintf(id, sizeof id, "client-%d-%d", c->number, i);
        request_wish w = wish_of(id);
        request *r = NULL;
        refusal why;
        if (requests_open(c->f->all, &w, &r, &why) != REFUSAL_NONE)
            return (void *)1;
        if (read_all(r) != 5)
            return (void *)2;
        request_release(r);
    }
    return NULL;
}

/* Time passes on a thread of its own, so that two threads wake readers at once. */
typedef struct {
    fixture *f;
    bool over;
} clockwork;

static void *pass_time(void *arg)
{
    clockwork *c = arg;
    while (!__atomic_load_n(&c->over, __ATOMIC_ACQUIRE))
        requests_tick(c->f->all);
    return NULL;
}

static void many_threads(void **state)
{
    (void)state;
    fixture *f = start();
    pthread_t threads[3];
    client clients[3];
    pthread_t ticker;
    clockwork c = {.f = f};
    assert_int_equal(pthread_create(&ticker, NULL, pass_time, &c), 0);
    for (int i = 0; i < 3; i++) {
        clients[i] = (client){f, i};
        assert_int_equal(pthread_create(&threads[i], NULL, be_client, &clients[i]), 0);
    }
    for (int answered = 0; answered < 60;) {
        requests_counts n; /* takes the lock under which n_sent changes */
        requests_count(f->all, &n);
        int sent = __atomic_load_n(&f->n_sent, __ATOMIC_ACQUIRE);
        for (; answered < sent; answered++) {
            for (int t = 0; t < 5; t++)
                say_token(f, f->sent[answered].id, 100 + t);
            say_finished(f, f->sent[answered].id, CONVOKE__CONTROL__FINISH__LENGTH);
        }
        usleep(100);
    }
    for (int i = 0; i < 3; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_null(result);
    }
    __atomic_store_n(&c.over, true, __ATOMIC_RELEASE);
    pthread_join(ticker, NULL);
    finish(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a request runs: prompt first, tokens in order, one wake until somebody looks", runs, NULL, NULL, NULL},
        {"lost workers: what is unfinished goes on from its last token, and the dead are not heard", lost_workers, NULL, NULL,
         NULL},
        {"a second reader attaches at any token; only the owner's leaving ends the request", attach, NULL, NULL, NULL},
        {"a reader that knows more than has come here gets what follows, nothing twice", ahead_of_the_journal, NULL, NULL, NULL},
        {"a lingering request waits for a reader to come back", linger, NULL, NULL, NULL},
        {"what can never be right is refused with its field and its numbers", refusals, NULL, NULL, NULL},
        {"two live requests never share an id", same_id, NULL, NULL, NULL},
        {"a full queue refuses with a hint", queue_full, NULL, NULL, NULL},
        {"a reader that does not keep up holds its own sequences only", slow_reader, NULL, NULL, NULL},
        {"a pause keeps back what is new, a freeze also what runs", pauses, NULL, NULL, NULL},
        {"prompt log-probabilities come whole and before any token", prompt_first, NULL, NULL, NULL},
        {"a new coordinator finds running and finished requests in the journal", restart_with_journal, NULL, NULL, NULL},
        {"a request that is read again after its owner left goes on as long as it is read", reattached_lives, NULL, NULL, NULL},
        {"what ended as the workers died has ended", end_at_the_kill, NULL, NULL, NULL},
        {"with fewer ranks than before nothing asks for one that is gone", fewer_ranks, NULL, NULL, NULL},
        {"a pause during a restart lets go on what had begun, and waits for it alone", pause_over_restart, NULL, NULL, NULL},
        {"of n sequences one that lives brings the prompt's log-probabilities", prompt_of_many, NULL, NULL, NULL},
        {"text once shown is not taken back by a stop string that overlaps a too early one", early_stop_string, NULL, NULL, NULL},
        {"lists longer than the vocabulary and candidates beyond all memory are refused", limits_of_lists, NULL, NULL, NULL},
        {"more sequences than the queue holds are never worth a retry", too_many_at_once, NULL, NULL, NULL},
        {"a request aborted while the journal takes it in stays aborted, and its id is free", aborted_at_once, NULL, NULL, NULL},
        {"requests of another model in the journal are not continued by this one", another_model, NULL, NULL, NULL},
        {"before the journal is read nobody is told that a request is unknown", unknown_until_replayed, NULL, NULL, NULL},
        {"a forgotten request can be read to its end while another has its id", same_id_while_read, NULL, NULL, NULL},
        {"many threads open and read while workers speak", many_threads, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
