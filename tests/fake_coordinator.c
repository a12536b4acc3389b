#include "tests/fake_coordinator.h"
#include "cluster/stop_text.h"
#include "proto/clock.h"

#include <assert.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_SEQUENCES = 16, VOCAB = 256, REMEMBERED = 256 };

typedef struct {
    int n_tokens, stop;
    size_t shown;
    finish_kind finish;
} sequence;

struct reader {
    request *request;
    bool owns, armed, waking, prompt_sent;
    void (*wake)(void *arg);
    void *arg;
    int n_done, token_place[MAX_SEQUENCES];
    size_t text_place[MAX_SEQUENCES];
    bool finish_sent[MAX_SEQUENCES];
    token_info *tokens, *candidates, *prompt, *prompt_candidates;
    int *counts, *prompt_counts;
    char *text;
    reader *next;
};

struct request {
    requests *all;
    char id[128];
    int n_sequences, n_prompt, max_new, n_finished, refs, linger_ms;
    unsigned char *prompt;
    int32_t *prompt_ids;
    bool ignore_eos, include_stop, fails, aborted;
    char **stops;
    stop_string *stop_strings;
    int n_stops, *ids, n_ids;
    candidates_wish prompt_candidates, output_candidates;
    bool prompt_logprobs;
    sequence sequences[MAX_SEQUENCES];
    double accepted, ownerless_since;
    bool owned;
    reader *readers;
    request *next;
};

struct requests {
    coordinator *c;
};

struct coordinator {
    fake_options options;
    requests requests;
    pthread_mutex_t lock;
    pthread_cond_t changed, woken;
    pthread_t thread;
    bool stopping, paused, shutdown_asked;
    serving_state state;
    void (*watch)(void *arg, serving_state state);
    void *watch_arg;
    request *all;
    int n_running, n_made_up;
    unsigned long long n_generated;
    char last_wish[2048];
};

refusal_kind refuse(refusal *r, refusal_kind kind, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    r->kind = kind;
    r->retry_ms = kind == REFUSAL_FULL ? 250 : 0;
    vsnprintf(r->sentence, sizeof r->sentence, format, arguments);
    va_end(arguments);
    return kind;
}

static int token_at(const request *r, int sequence_index, int i)
{
    return r->prompt[(sequence_index + i) % r->n_prompt];
}

static token_info info_at(const request *r, int sequence_index, int i)
{
    return (token_info){token_at(r, sequence_index, i), -(float)(i % 8) / 4, 1 + i % 3};
}

static int count_candidates(const candidates_wish *w)
{
    return w->all ? VOCAB : w->n_ids ? w->n_ids : w->top_n;
}

static void fill_candidates(const candidates_wish *w, int token, token_info *out)
{
    for (int j = 0; j < count_candidates(w); j++)
        out[j] = (token_info){w->n_ids ? w->ids[j] : (token + j) % VOCAB, -(float)j / 2, j + 1};
}

/* Output text of a sequence, n tokens: malloc'd. */
static char *text_of(const request *r, int s, int n)
{
    char *text = malloc((size_t)n + 1);
    for (int i = 0; i < n; i++)
        text[i] = (char)token_at(r, s, i);
    text[n] = 0;
    return text;
}

static size_t whole_characters(const char *text, size_t n)
{
    size_t at = n;
    while (at > 0 && at + 4 > n && ((unsigned char)text[at - 1] & 0xc0) == 0x80)
        at--;
    if (at == 0 || (unsigned char)text[at - 1] < 0xc0)
        return n;
    unsigned char lead = (unsigned char)text[at - 1];
    size_t need = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    return n - (at - 1) >= need ? n : at - 1;
}

static void show(request *r, int i)
{
    sequence *s = &r->sequences[i];
    char *text = text_of(r, i, s->n_tokens);
    size_t whole = s->finish == FINISH_NONE ? whole_characters(text, (size_t)s->n_tokens) : (size_t)s->n_tokens;
    stop_verdict v = stop_text_check(text, whole, 0, r->stop_strings, r->n_stops, r->include_stop);
    s->shown = s->finish != FINISH_NONE && v.stop < 0 ? whole : v.shown;
    if (s->finish == FINISH_EOS && s->shown > 0)
        s->shown--; /* the end of text is special and not shown */
    if (v.stop >= 0) {
        s->finish = FINISH_STOP_STRING;
        s->stop = v.stop;
    }
    free(text);
}

static bool step_sequence(request *r, int i)
{
    sequence *s = &r->sequences[i];
    if (s->finish != FINISH_NONE)
        return false;
    if (r->aborted) {
        s->finish = FINISH_ABORTED;
    } else {
        int token = token_at(r, i, s->n_tokens++);
        r->all->c->n_generated++;
        if (r->fails && s->n_tokens == 3)
            s->finish = FINISH_FAILED;
        for (int k = 0; k < r->n_ids; k++)
            if (r->ids[k] == token)
                s->finish = FINISH_STOP_TOKEN;
        if (token == 0 && !r->ignore_eos)
            s->finish = FINISH_EOS;
        else if (s->finish == FINISH_NONE && s->n_tokens == r->max_new)
            s->finish = FINISH_LENGTH;
    }
    show(r, i);
    if (s->finish != FINISH_NONE && ++r->n_finished == r->n_sequences)
        r->all->c->n_running--;
    return true;
}

static int find_news(const reader *d)
{
    for (int i = 0; i < d->request->n_sequences; i++) {
        const sequence *s = &d->request->sequences[i];
        if (!d->finish_sent[i] && (s->n_tokens > d->token_place[i] || s->shown > d->text_place[i] || s->finish != FINISH_NONE))
            return i;
    }
    return -1;
}

/* With the lock held; lets go of it around the wake. */
static void wake_readers(coordinator *c)
{
again:
    for (request *r = c->all; r; r = r->next)
        for (reader *d = r->readers; d; d = d->next)
            if (d->armed && find_news(d) >= 0) {
                d->armed = false;
                d->waking = true;
                pthread_mutex_unlock(&c->lock);
                d->wake(d->arg);
                pthread_mutex_lock(&c->lock);
                d->waking = false;
                pthread_cond_broadcast(&c->woken);
                goto again;
            }
}

static void free_request(request *r)
{
    for (int i = 0; i < r->n_stops; i++)
        free(r->stops[i]);
    free(r->stops);
    free(r->stop_strings);
    free(r->ids);
    free(r->prompt);
    free(r->prompt_ids);
    free((void *)r->prompt_candidates.ids);
    free((void *)r->output_candidates.ids);
    free(r);
}

static void *run(void *arg)
{
    coordinator *c = arg;
    pthread_mutex_lock(&c->lock);
    while (!c->stopping) {
        bool worked = false;
        for (int t = 0; t < c->options.tokens_per_step; t++)
            for (request *r = c->all; r; r = r->next) {
                if (!r->owned && r->ownerless_since > 0 && clock_seconds() - r->ownerless_since > r->linger_ms * 1e-3)
                    r->aborted = true;
                for (int i = 0; i < r->n_sequences; i++)
                    if ((!c->paused && c->state == SERVING_READY) || r->aborted)
                        worked |= step_sequence(r, i);
            }
        wake_readers(c);
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        long ns = (long)(worked ? c->options.token_ms * 1e6 : 50e6);
        until.tv_nsec += ns % 1000000000;
        until.tv_sec += ns / 1000000000 + until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (!worked)
            pthread_cond_timedwait(&c->changed, &c->lock, &until);
        else if (ns > 0)
            while (!c->stopping && pthread_cond_timedwait(&c->woken, &c->lock, &until) == 0)
                ;
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

coordinator *fake_create(const fake_options *options)
{
    coordinator *c = calloc(1, sizeof *c);
    c->options = *options;
    c->requests.c = c;
    c->state = SERVING_READY;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    pthread_cond_init(&c->woken, NULL);
    pthread_create(&c->thread, NULL, run, c);
    return c;
}

void fake_destroy(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    c->stopping = true;
    pthread_cond_broadcast(&c->changed);
    pthread_cond_broadcast(&c->woken);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    while (c->all) {
        request *next = c->all->next;
        assert(c->all->refs == 0); /* the door gave everything back */
        free_request(c->all);
        c->all = next;
    }
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    pthread_cond_destroy(&c->woken);
    free(c);
}

/* ---- requests.h ---- */

static refusal_kind check(coordinator *c, const request_wish *w, refusal *why)
{
    size_t n = w->has_text ? w->text_size : (size_t)w->n_ids;
    if (c->state == SERVING_DRAINING || c->state == SERVING_GIVEN_UP)
        return refuse(why, REFUSAL_UNAVAILABLE, "the server is draining");
    if (w->model && *w->model && strcmp(w->model, "echo"))
        return refuse(why, REFUSAL_NOT_FOUND, "model: \"%s\" is not served here", w->model);
    if (n == 0)
        return refuse(why, REFUSAL_BAD, "the prompt is empty");
    if (n + (size_t)w->max_new > (size_t)c->options.max_length)
        return refuse(why, REFUSAL_TOO_LARGE, "%zu prompt tokens and %d new ones are more than the %d a sequence may have", n,
                      w->max_new, c->options.max_length);
    if (w->n > MAX_SEQUENCES)
        return refuse(why, REFUSAL_BAD, "n: %d sequences", w->n);
    for (int i = 0; i < w->n_ids; i++)
        if (w->ids[i] >= VOCAB)
            return refuse(why, REFUSAL_BAD, "prompt: token %d is %d, outside the vocabulary of %d", i, w->ids[i], VOCAB);
    if (w->owner > 3)
        return refuse(why, REFUSAL_BAD, "data-parallel rank %d, but there are only 4", w->owner);
    if (c->n_running >= c->options.max_requests)
        return refuse(why, REFUSAL_FULL, "%d requests are waiting", c->n_running);
    for (request *r = c->all; r && w->id; r = r->next)
        if (*w->id && strcmp(r->id, w->id) == 0 && r->n_finished < r->n_sequences)
            return refuse(why, REFUSAL_EXISTS, "request %s is running", w->id);
    return REFUSAL_NONE;
}

static int32_t *copy_ids(const int32_t *ids, int n)
{
    int32_t *copy = malloc(((size_t)n + 1) * sizeof *copy);
    if (n)
        memcpy(copy, ids, (size_t)n * sizeof *copy);
    return copy;
}

static void take_prompt(request *r, const request_wish *w)
{
    int n = w->has_text ? (int)w->text_size : w->n_ids;
    int skip = w->truncate_prompt > 0 && n > w->truncate_prompt ? n - w->truncate_prompt : 0;
    r->n_prompt = n - skip;
    r->prompt = malloc((size_t)r->n_prompt);
    r->prompt_ids = malloc((size_t)r->n_prompt * sizeof *r->prompt_ids);
    for (int i = 0; i < r->n_prompt; i++) {
        r->prompt[i] = w->has_text ? (unsigned char)w->text[skip + i] : (unsigned char)w->ids[skip + i];
        r->prompt_ids[i] = r->prompt[i];
    }
    r->fails = r->n_prompt >= 4 && memcmp(r->prompt, "fail", 4) == 0;
}

static void note_wish(coordinator *c, const request_wish *w)
{
    snprintf(
        c->last_wish, sizeof c->last_wish,
        "{\"id\":\"%s\",\"client\":\"%s\",\"n\":%d,\"max_new\":%d,\"min_new\":%d,\"has_temperature\":%d,\"temperature\":%g,"
        "\"has_top_k\":%d,\"top_k\":%d,\"has_top_p\":%d,\"top_p\":%g,\"min_p\":%g,\"has_seed\":%d,\"seed\":%llu,\"presence\":%g,"
        "\"frequency\":%g,\"repetition\":%g,\"n_biases\":%d,\"n_allowed\":%d,\"include_stop\":%d,\"ignore_eos\":%d,\"keep_"
        "special\":%d,"
        "\"no_text\":%d,\"bypass\":%d,\"salt\":\"%s\",\"priority\":%d,\"owner\":%d,\"linger_ms\":%d,\"add_special\":%d}",
        w->id ? w->id : "", w->client ? w->client : "", w->n, w->max_new, w->min_new, w->has_temperature, (double)w->temperature,
        w->has_top_k, w->top_k, w->has_top_p, (double)w->top_p, (double)w->min_p, w->has_seed, (unsigned long long)w->seed,
        (double)w->presence_penalty, (double)w->frequency_penalty, (double)w->repetition_penalty, w->n_biases, w->n_allowed,
        w->include_stop, w->ignore_eos, w->keep_special, w->no_text, w->bypass_prefix_cache, w->cache_salt ? w->cache_salt : "",
        w->priority, w->owner, w->linger_ms, w->add_special);
}

static request *make_request(coordinator *c, const request_wish *w)
{
    request *r = calloc(1, sizeof *r);
    r->all = &c->requests;
    if (w->id && *w->id)
        snprintf(r->id, sizeof r->id, "%s", w->id);
    else
        snprintf(r->id, sizeof r->id, "made-up-%d", c->n_made_up++);
    r->n_sequences = w->n > 0 ? w->n : 1;
    take_prompt(r, w);
    r->max_new = w->max_new > 0 ? w->max_new : 64;
    r->ignore_eos = w->ignore_eos;
    r->include_stop = w->include_stop;
    r->linger_ms = w->linger_ms;
    r->n_stops = w->n_stops;
    r->stops = calloc((size_t)w->n_stops + 1, sizeof *r->stops);
    r->stop_strings = calloc((size_t)w->n_stops + 1, sizeof *r->stop_strings);
    for (int i = 0; i < w->n_stops; i++) {
        r->stops[i] = strdup(w->stops[i]);
        r->stop_strings[i] = (stop_string){r->stops[i], strlen(r->stops[i])};
    }
    r->ids = copy_ids(w->stop_ids, w->n_stop_ids);
    r->n_ids = w->n_stop_ids;
    r->prompt_logprobs = w->prompt_logprobs;
    r->prompt_candidates = w->prompt_candidates;
    r->prompt_candidates.ids = copy_ids(w->prompt_candidates.ids, w->prompt_candidates.n_ids);
    r->output_candidates = w->output_candidates;
    r->output_candidates.ids = copy_ids(w->output_candidates.ids, w->output_candidates.n_ids);
    r->accepted = clock_seconds();
    r->refs = 1;
    return r;
}

/* Only so many are remembered. */
static void forget_old(coordinator *c)
{
    int n = 0;
    for (request **at = &c->all; *at;) {
        request *r = *at;
        if (++n > REMEMBERED && r->refs == 0 && r->n_finished == r->n_sequences) {
            *at = r->next;
            free_request(r);
        } else {
            at = &r->next;
        }
    }
}

refusal_kind requests_open(requests *all, const request_wish *wish, request **out, refusal *why)
{
    coordinator *c = all->c;
    if (wish->has_text && wish->text_size > 4 && memcmp(wish->text, "slow", 4) == 0)
        usleep(700000); /* as a tokenizer over a very long text */
    pthread_mutex_lock(&c->lock);
    refusal_kind kind = check(c, wish, why);
    if (kind == REFUSAL_NONE) {
        request *r = make_request(c, wish);
        note_wish(c, wish);
        forget_old(c);
        r->next = c->all;
        c->all = r;
        c->n_running++;
        *out = r;
        pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return kind;
}

refusal_kind requests_find(requests *all, const char *id, request **out, refusal *why)
{
    coordinator *c = all->c;
    refusal_kind kind = REFUSAL_NOT_FOUND;
    pthread_mutex_lock(&c->lock);
    for (request *r = c->all; r && kind != REFUSAL_NONE; r = r->next)
        if (strcmp(r->id, id) == 0) {
            r->refs++;
            *out = r;
            kind = REFUSAL_NONE;
        }
    pthread_mutex_unlock(&c->lock);
    return kind ? refuse(why, kind, "request_id: there is no request %s", id) : kind;
}

void request_release(request *r)
{
    if (!r)
        return;
    coordinator *c = r->all->c;
    pthread_mutex_lock(&c->lock);
    r->refs--;
    pthread_mutex_unlock(&c->lock);
}

void requests_abort(requests *all, const char *id)
{
    coordinator *c = all->c;
    pthread_mutex_lock(&c->lock);
    for (request *r = c->all; r; r = r->next)
        if (strcmp(r->id, id) == 0)
            r->aborted = true;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

void request_abort(request *r)
{
    requests_abort(r->all, r->id);
}

const char *request_id(const request *r)
{
    return r->id;
}

int request_n_sequences(const request *r)
{
    return r->n_sequences;
}

int request_n_prompt(const request *r)
{
    return r->n_prompt;
}

const int32_t *request_prompt(const request *r)
{
    return r->prompt_ids;
}

status reader_open(request *r, int from_token, bool owns, void (*wake)(void *arg), void *arg, reader **out)
{
    coordinator *c = r->all->c;
    reader *d = calloc(1, sizeof *d);
    *d = (reader){.request = r, .owns = owns, .armed = true, .wake = wake, .arg = arg, .prompt_sent = from_token > 0};
    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < r->n_sequences; i++) {
        int from = from_token < r->sequences[i].n_tokens ? from_token : r->sequences[i].n_tokens;
        d->token_place[i] = from;
        d->text_place[i] = (size_t)from;
    }
    r->owned |= owns;
    r->refs++;
    d->next = r->readers;
    r->readers = d;
    *out = d;
    pthread_cond_broadcast(&c->changed);
    wake_readers(c);
    pthread_mutex_unlock(&c->lock);
    return STATUS_OK;
}

static void *again(void *old, size_t n, size_t size_of_one)
{
    free(old);
    return malloc(n * size_of_one + 1);
}

static void give_prompt(reader *d, output_piece *p)
{
    const request *r = d->request;
    size_t n = (size_t)r->n_prompt, each = (size_t)count_candidates(&r->prompt_candidates);
    d->prompt_sent = p->has_prompt = true;
    p->n_cached = 7;
    p->prompt = d->prompt = again(d->prompt, n, sizeof *d->prompt);
    d->prompt_candidates = again(d->prompt_candidates, n * each, sizeof *d->prompt_candidates);
    d->prompt_counts = again(d->prompt_counts, n, sizeof *d->prompt_counts);
    for (size_t i = 0; i < n; i++) {
        d->prompt[i] = (token_info){r->prompt[i], i ? -(float)i / 4 : 0, r->prompt_logprobs ? (int)i : 0};
        d->prompt_counts[i] = i ? (int)each : 0;
        if (i)
            fill_candidates(&r->prompt_candidates, r->prompt[i], d->prompt_candidates + (i - 1) * each);
    }
    p->prompt_candidates = d->prompt_candidates;
    p->candidates_of_prompt = each ? d->prompt_counts : NULL;
}

static void give_tokens(reader *d, int i, output_piece *p)
{
    const request *r = d->request;
    const sequence *s = &r->sequences[i];
    int from = d->token_place[i], n = s->n_tokens - from, each = count_candidates(&r->output_candidates);
    p->first_token = from;
    p->n_tokens = n;
    p->tokens = d->tokens = again(d->tokens, (size_t)n, sizeof *d->tokens);
    d->candidates = again(d->candidates, (size_t)n * (size_t)each, sizeof *d->candidates);
    d->counts = again(d->counts, (size_t)n, sizeof *d->counts);
    for (int k = 0; k < n; k++) {
        d->tokens[k] = info_at(r, i, from + k);
        d->counts[k] = each;
        fill_candidates(&r->output_candidates, d->tokens[k].token, d->candidates + (size_t)k * (size_t)each);
    }
    p->candidates = d->candidates;
    p->candidates_of_token = each ? d->counts : NULL;
    d->token_place[i] = s->n_tokens;
    free(d->text);
    d->text = text_of(r, i, s->n_tokens);
    p->text = d->text + d->text_place[i];
    p->text_size = s->shown > d->text_place[i] ? s->shown - d->text_place[i] : 0;
    d->text_place[i] += p->text_size;
}

bool reader_take(reader *d, output_piece *p, bool *done)
{
    request *r = d->request;
    coordinator *c = r->all->c;
    *p = (output_piece){0};
    pthread_mutex_lock(&c->lock);
    int i = find_news(d);
    if (i >= 0) {
        const sequence *s = &r->sequences[i];
        p->sequence = i;
        if (!d->prompt_sent)
            give_prompt(d, p);
        give_tokens(d, i, p);
        p->finish = s->finish;
        if (s->finish != FINISH_NONE) {
            p->n_output = s->n_tokens;
            p->stop_token = s->n_tokens ? token_at(r, i, s->n_tokens - 1) : 0;
            p->stop_string = s->finish == FINISH_STOP_STRING ? r->stops[s->stop] : NULL;
            if (s->finish == FINISH_FAILED)
                refuse(&p->failed, REFUSAL_UNAVAILABLE, "the workers were lost 3 times in 10 minutes");
            d->finish_sent[i] = true;
            d->n_done++;
        }
    } else {
        d->armed = d->n_done < r->n_sequences;
    }
    *done = d->n_done == r->n_sequences;
    pthread_mutex_unlock(&c->lock);
    return i >= 0;
}

void reader_close(reader *d)
{
    request *r = d->request;
    coordinator *c = r->all->c;
    pthread_mutex_lock(&c->lock);
    d->armed = false;
    while (d->waking)
        pthread_cond_wait(&c->woken, &c->lock);
    reader **at = &r->readers;
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
    if (d->owns) {
        r->owned = false;
        r->ownerless_since = clock_seconds();
        if (r->linger_ms == 0)
            r->aborted = true;
    }
    r->refs--;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    free(d->tokens);
    free(d->candidates);
    free(d->prompt);
    free(d->prompt_candidates);
    free(d->counts);
    free(d->prompt_counts);
    free(d->text);
    free(d);
}

int requests_list(requests *all, request_summary *out, int max)
{
    coordinator *c = all->c;
    int n = 0;
    pthread_mutex_lock(&c->lock);
    for (request *r = c->all; r; r = r->next, n++)
        if (n < max) {
            out[n] = (request_summary){
                .n_prompt = r->n_prompt, .n_sequences = r->n_sequences, .finished = r->n_finished == r->n_sequences};
            snprintf(out[n].id, sizeof out[n].id, "%s", r->id);
            for (int i = 0; i < r->n_sequences; i++)
                out[n].n_output += r->sequences[i].n_tokens;
            out[n].age_seconds = clock_seconds() - r->accepted;
        }
    pthread_mutex_unlock(&c->lock);
    return n;
}

/* ---- coordinator.h ---- */

void coordinator_get_info(coordinator *c, coordinator_info *out)
{
    static const char *const aliases[] = {"echo-alias"};
    static const int32_t eos[] = {0};
    *out = (coordinator_info){.model_name = "echo",
                              .model_dir = c->options.model_dir,
                              .aliases = aliases,
                              .n_aliases = 1,
                              .instance = "fake",
                              .isa = "scalar",
                              .combine = "exact",
                              .plan_name = "",
                              .n_ranks = 4,
                              .n_nodes = 2,
                              .vocab = VOCAB,
                              .max_length = c->options.max_length,
                              .kv_block = 16,
                              .max_running = 8,
                              .max_batched_tokens = 512,
                              .kv_blocks = 1000,
                              .n_eos = 1,
                              .eos_ids = eos};
}

void coordinator_get_load(coordinator *c, coordinator_load *out)
{
    pthread_mutex_lock(&c->lock);
    *out = (coordinator_load){.state = c->state,
                              .n_running = c->n_running,
                              .kv_usage = 0.25,
                              .kv_tokens_used = 4000,
                              .kv_tokens = 16000,
                              .generated_tokens = c->n_generated,
                              .prefix_queries = 10,
                              .prefix_hits = 5,
                              .generated_per_second = 100,
                              .n_ranks = 4};
    pthread_mutex_unlock(&c->lock);
}

const tokenizer *coordinator_tokenizer(coordinator *c)
{
    return (const tokenizer *)c; /* there is one; nobody looks into it */
}

const char *coordinator_model_dir(coordinator *c)
{
    return c->options.model_dir;
}

requests *coordinator_requests(coordinator *c)
{
    return &c->requests;
}

serving_state coordinator_state(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    serving_state state = c->state;
    pthread_mutex_unlock(&c->lock);
    return state;
}

void coordinator_watch_state(coordinator *c, void (*changed)(void *arg, serving_state state), void *arg)
{
    pthread_mutex_lock(&c->lock);
    c->watch = changed;
    c->watch_arg = arg;
    pthread_mutex_unlock(&c->lock);
}

void fake_set_state(coordinator *c, serving_state state)
{
    pthread_mutex_lock(&c->lock);
    c->state = state;
    void (*watch)(void *, serving_state) = c->watch;
    void *arg = c->watch_arg;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    if (watch)
        watch(arg, state);
}

bool coordinator_admin_ok(coordinator *c, const char *peer, const char *token)
{
    if (c->options.admin_token)
        return token && strcmp(token, c->options.admin_token) == 0;
    return strncmp(peer, "ipv4:127.", 9) == 0 || strstr(peer, "::1") || strstr(peer, "%3A%3A1");
}

status coordinator_pause(coordinator *c, pause_mode mode, bool clear_cache)
{
    (void)clear_cache;
    pthread_mutex_lock(&c->lock);
    if (mode == PAUSE_ABORT)
        for (request *r = c->all; r; r = r->next)
            r->aborted = true;
    while (mode != PAUSE_KEEP && c->n_running > 0 && !c->stopping && c->state != SERVING_DRAINING) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 5000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&c->woken, &c->lock, &until);
    }
    c->paused = true;
    pthread_mutex_unlock(&c->lock);
    return STATUS_OK;
}

status coordinator_resume(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    c->paused = false;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return STATUS_OK;
}

bool coordinator_is_paused(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool paused = c->paused;
    pthread_mutex_unlock(&c->lock);
    return paused;
}

void coordinator_shutdown(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    c->shutdown_asked = true;
    pthread_mutex_unlock(&c->lock);
}

bool fake_shutdown_asked(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool asked = c->shutdown_asked;
    pthread_mutex_unlock(&c->lock);
    return asked;
}

const char *fake_last_wish(coordinator *c)
{
    return c->last_wish;
}
