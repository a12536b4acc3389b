/* requests.c - the table of requests: who is accepted, what goes to the workers, what comes back, who is forgotten. */
#include "cluster/requests_internal.h"

#include "proto/clock.h"
#include "proto/hash.h"
#include "proto/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_BUCKETS = 4096 };

status requests_create(const requests_options *options, const requests_backend *backend, void *arg, requests **out)
{
    requests *all = calloc(1, sizeof *all);
    if (!all)
        return status_fail(STATUS_NO_MEMORY, "no memory for the table of requests");
    all->options = *options;
    all->backend = *backend;
    all->backend_arg = arg;
    all->n_buckets = N_BUCKETS;
    all->start_interval = 0.1;
    all->by_id = calloc(all->n_buckets, sizeof(request *));
    pthread_mutex_init(&all->lock, NULL);
    pthread_mutex_init(&all->scratch_lock, NULL);
    pthread_cond_init(&all->woken, NULL);
    refuse(&all->refused, REFUSAL_UNAVAILABLE, "the model is still being loaded");
    if (!all->by_id) {
        requests_destroy(all);
        return status_fail(STATUS_NO_MEMORY, "no memory for the table of requests");
    }
    *out = all;
    return STATUS_OK;
}

void requests_destroy(requests *all)
{
    if (!all)
        return;
    for (request *r = all->first, *next; r; r = next) {
        next = r->next;
        request_destroy(r);
    }
    for (int i = 0; i < all->n_scratches; i++)
        tokenizer_scratch_destroy(all->scratches[i]);
    pthread_mutex_destroy(&all->lock);
    pthread_mutex_destroy(&all->scratch_lock);
    pthread_cond_destroy(&all->woken);
    free(all->by_id);
    free(all->by_slot);
    free(all->uses_of_slot);
    free(all->free_slots);
    free(all);
}

/* ---- the table; with the lock held ----------------------------------------------------------------------------------------- */

static request **bucket_of(requests *all, const char *id)
{
    return &all->by_id[hash_bytes(HASH_START, id, strlen(id)) % all->n_buckets];
}

static request *find(requests *all, const char *id)
{
    request *r = *bucket_of(all, id);
    while (r && strcmp(r->spec->id, id) != 0)
        r = r->next_same_hash;
    return r;
}

static void insert(requests *all, request *r)
{
    request **bucket = bucket_of(all, r->spec->id);
    r->next_same_hash = *bucket;
    *bucket = r;
    r->previous = all->last;
    *(all->last ? &all->last->next : &all->first) = r;
    all->last = r;
    r->arrival = ++all->next_arrival;
    r->in_table = true;
    all->n_live++;
    all->n_unstarted += r->n_sequences;
}

/* Gives up one reference; the last one frees. */
static bool unreference(request *r)
{
    return --r->references == 0;
}

static void forget(request *r)
{
    requests *all = r->all;
    request **at = bucket_of(all, r->spec->id);
    while (*at != r)
        at = &(*at)->next_same_hash;
    *at = r->next_same_hash;
    *(r->previous ? &r->previous->next : &all->first) = r->next;
    *(r->next ? &r->next->previous : &all->last) = r->previous;
    r->in_table = false;
    journal_forget(all->options.journal, r->spec->id);
    if (r->n_finished == r->n_sequences)
        all->n_remembered--;
    if (unreference(r))
        request_destroy(r);
}

static status grow_slots(requests *all)
{
    uint32_t n = all->n_slots ? 2 * all->n_slots : 256;
    request_sequence **by_slot = realloc(all->by_slot, n * sizeof(request_sequence *));
    if (by_slot)
        all->by_slot = by_slot;
    uint32_t *uses = realloc(all->uses_of_slot, n * sizeof *uses);
    if (uses)
        all->uses_of_slot = uses;
    uint32_t *free_slots = realloc(all->free_slots, n * sizeof *free_slots);
    if (free_slots)
        all->free_slots = free_slots;
    if (!by_slot || !uses || !free_slots)
        return status_fail(STATUS_NO_MEMORY, "no memory for the table of sequences");
    for (uint32_t i = n; i-- > all->n_slots;) {
        by_slot[i] = NULL;
        uses[i] = 0;
        free_slots[all->n_free_slots++] = i;
    }
    all->n_slots = n;
    return STATUS_OK;
}

static status take_slot(requests *all, request_sequence *s)
{
    if (all->n_free_slots == 0)
        TRY(grow_slots(all));
    uint32_t slot = all->free_slots[--all->n_free_slots];
    all->by_slot[slot] = s;
    s->wire_id = (uint64_t)++all->uses_of_slot[slot] << 32 | slot;
    return STATUS_OK;
}

static void leave_slot(requests *all, request_sequence *s)
{
    uint32_t slot = (uint32_t)s->wire_id;
    all->by_slot[slot] = NULL;
    all->free_slots[all->n_free_slots++] = slot;
}

static request_sequence *find_sequence(const requests *all, uint64_t wire_id)
{
    uint32_t slot = (uint32_t)wire_id;
    request_sequence *s = slot < all->n_slots ? all->by_slot[slot] : NULL;
    return s && s->wire_id == wire_id ? s : NULL;
}

static status take_slots(request *r)
{
    for (int i = 0; i < r->n_sequences; i++) {
        status st = take_slot(r->all, &r->sequences[i]);
        while (st != STATUS_OK && i-- > 0)
            leave_slot(r->all, &r->sequences[i]);
        TRY(st);
    }
    return STATUS_OK;
}

/* ---- to the workers; with the lock held ------------------------------------------------------------------------------------ */

static void update_hold(request_sequence *s)
{
    requests *all = s->request->all;
    bool hold = s->slow || s->frozen;
    if (hold == s->held || !s->submitted)
        return;
    s->held = hold;
    all->backend.hold(all->backend_arg, &s->wire_id, 1, hold);
}

void request_hold_locked(request *r, bool hold)
{
    for (int i = 0; i < r->n_sequences; i++) {
        r->sequences[i].slow = hold;
        if (r->sequences[i].out.finish == FINISH_NONE)
            update_hold(&r->sequences[i]);
    }
}

/* The sequence as the workers shall take it up: its prompt and what it has said, for the tokens that are missing. `tokens` has
 * room for both. */
static Convoke__Control__Sequence continued(const request_sequence *s, int32_t *tokens)
{
    const request *r = s->request;
    const sequence_output *o = &s->out;
    Convoke__Control__Sequence w = *r->spec->sequence;
    memcpy(tokens, w.tokens, w.n_tokens * sizeof *tokens);
    for (int i = 0; i < o->n_tokens; i++)
        tokens[w.n_tokens + (size_t)i] = o->tokens[i].token;
    w.id = s->wire_id;
    w.tokens = tokens;
    w.n_tokens += (size_t)o->n_tokens;
    w.n_prior = (uint32_t)o->n_tokens;
    w.max_new -= (uint32_t)o->n_tokens;
    w.arrival = r->arrival;
    w.sequence_index = (uint32_t)s->index;
    w.prompt_logprobs = s->brings_prompt;
    if (!w.prompt_logprobs)
        w.prompt_candidates = NULL;
    w.owner = r->all->options.pin_owner ? s->owner : w.owner;
    if (w.owner >= r->all->limits.n_ranks)
        w.owner = -1; /* fewer ranks than there were: it runs where there is room */
    return w;
}

/* A pause lets go on what had begun, also in an earlier launch. */
static bool has_begun(const request_sequence *s)
{
    return s->started || s->out.n_tokens > 0;
}

static bool may_submit(const request_sequence *s)
{
    const requests *all = s->request->all;
    if (!all->ready || s->submitted || s->out.finish != FINISH_NONE || !s->request->accepted_durably)
        return false;
    return !all->paused || (!all->frozen && has_begun(s));
}

/* One of the sequences brings the prompt's log-probabilities. */
static bool should_bring_prompt(const request_sequence *s)
{
    const request *r = s->request;
    if (request_prompt_done(r))
        return false;
    for (int i = 0; i < r->n_sequences; i++)
        if (r->sequences[i].brings_prompt && r->sequences[i].out.finish == FINISH_NONE)
            return false;
    return true;
}

static void submit_sequence(request_sequence *s)
{
    requests *all = s->request->all;
    size_t n = s->request->spec->sequence->n_tokens + (size_t)s->out.n_tokens;
    int32_t *tokens = malloc((n + 1) * sizeof *tokens);
    if (!tokens)
        return; /* taken up again at the next launch or tick */
    s->brings_prompt = should_bring_prompt(s);
    Convoke__Control__Sequence w = continued(s, tokens), *one = &w;
    s->submitted = true;
    s->held = false;
    all->backend.submit(all->backend_arg, &one, 1);
    free(tokens);
    update_hold(s);
}

static void submit_waiting(requests *all)
{
    for (request *r = all->first; r; r = r->next)
        for (int i = 0; i < r->n_sequences; i++)
            if (may_submit(&r->sequences[i]))
                submit_sequence(&r->sequences[i]);
}

/* ---- how a sequence ends; with the lock held ------------------------------------------------------------------------------- */

static const char *finish_word(finish_kind kind)
{
    static const char *const words[] = {"unfinished",  "length",  "stop token", "end of sequence",
                                        "stop string", "aborted", "failed"};
    return words[kind];
}

static void measure(const request_sequence *s, double now)
{
    const request *r = s->request;
    const sequence_output *o = &s->out;
    metric_finish how = o->finish == FINISH_LENGTH    ? METRIC_SUCCESS_LENGTH
                        : o->finish == FINISH_ABORTED ? METRIC_SUCCESS_ABORT
                        : o->finish == FINISH_FAILED  ? METRIC_SUCCESS_ERROR
                                                      : METRIC_SUCCESS_STOP;
    bool started = s->first_started > 0, spoke = s->first_token > 0;
    metric_request m = {.finish = how,
                        .n_prompt = (int)r->spec->sequence->n_tokens,
                        .n_output = o->n_tokens,
                        .queue = started ? s->first_started - r->accepted : -1,
                        .prefill = started && spoke ? s->first_token - s->first_started : -1,
                        .decode = spoke ? s->last_token - s->first_token : -1,
                        .inference = started ? now - s->first_started : -1,
                        .whole = now - r->accepted,
                        .first_token = spoke ? s->first_token - r->accepted : -1};
    if (r->all->options.metrics)
        metrics_request_done(r->all->options.metrics, &m);
    if (!r->all->options.log_requests)
        return;
    char index[24] = "", first[48] = "";
    if (r->n_sequences > 1)
        snprintf(index, sizeof index, " sequence %d", s->index);
    if (spoke)
        snprintf(first, sizeof first, ", first token after %.0f ms", m.first_token * 1e3);
    log_line("request %s%s: %d prompt tokens, %d new, %s, %.2f s%s", r->spec->id, index, m.n_prompt, m.n_output,
             finish_word(o->finish), m.whole, first);
}

static void journal_end(const request_sequence *s)
{
    const request *r = s->request;
    const sequence_output *o = &s->out;
    Convoke__Journal__Finish f = CONVOKE__JOURNAL__FINISH__INIT;
    f.kind = (uint32_t)o->finish;
    f.stop_token = o->stop_token;
    f.stop_string = o->stop_string > 0 ? (uint32_t)o->stop_string : 0;
    f.reason = (char *)(o->finish == FINISH_FAILED ? o->failed.sentence : "");
    uint8_t packed[1024];
    if (convoke__journal__finish__get_packed_size(&f) > sizeof packed)
        return;
    size_t size = convoke__journal__finish__pack(&f, packed);
    journal_finish(r->all->options.journal, r->spec->id, s->index, packed, size);
}

/* While the journal is still writing down that it was accepted, its end cannot be written behind it. */
static bool may_forget(const request *r)
{
    return r->n_finished == r->n_sequences && !r->readers && r->journal_asked;
}

static void trim_remembered(requests *all)
{
    request *next;
    for (request *r = all->first; r && all->n_remembered > all->options.max_remembered; r = next) {
        next = r->next;
        if (may_forget(r))
            forget(r);
    }
}

static void finish_sequence(request_sequence *s, finish_kind kind, bool write_journal)
{
    request *r = s->request;
    requests *all = r->all;
    double now = clock_seconds();
    output_finish(r, &s->out, kind);
    leave_slot(all, s);
    *(s->started ? &all->n_started : &all->n_unstarted) -= 1;
    r->n_finished++;
    if (write_journal) {
        measure(s, now);
        journal_end(s);
    }
    if (r->n_finished == r->n_sequences) {
        r->finished_at = now;
        all->n_live--;
        all->n_remembered++;
    }
    readers_note(r);
}

static void fail_sequence(request_sequence *s, refusal_kind kind, const char *sentence)
{
    refuse(&s->out.failed, kind, "%s", sentence);
    finish_sequence(s, FINISH_FAILED, true);
}

void request_cancel_locked(request *r)
{
    requests *all = r->all;
    for (int i = 0; i < r->n_sequences; i++) {
        request_sequence *s = &r->sequences[i];
        if (s->out.finish != FINISH_NONE)
            continue;
        if (s->submitted)
            all->backend.cancel(all->backend_arg, &s->wire_id, 1);
        finish_sequence(s, FINISH_ABORTED, true);
    }
}

/* ---- doors -------------------------------------------------------------------------------------------------------------------
 */

static refusal_kind check_room(requests *all, int n, refusal *why)
{
    if (n > all->options.max_waiting)
        return refuse(why, REFUSAL_BAD, "n: %d sequences, but the queue holds only %d", n, all->options.max_waiting);
    if (all->n_unstarted + n <= all->options.max_waiting)
        return REFUSAL_NONE;
    refuse(why, REFUSAL_FULL, "%d sequences wait, and the queue holds %d", all->n_unstarted, all->options.max_waiting);
    double ms = all->start_interval * n * 1e3;
    why->retry_ms = ms < 50 ? 50 : ms > 10000 ? 10000 : (int)ms;
    return REFUSAL_FULL;
}

/* A place in the table, taken before the journal is asked so that two requests of one id cannot both pass. */
static refusal_kind enter(requests *all, request *r, refusal *why)
{
    refusal_kind kind = REFUSAL_NONE;
    pthread_mutex_lock(&all->lock);
    request *same = find(all, r->spec->id);
    if (all->refused.kind != REFUSAL_NONE) {
        *why = all->refused;
        kind = why->kind;
    } else if (same && (same->n_finished < same->n_sequences || !same->journal_asked)) {
        kind = refuse(why, REFUSAL_EXISTS, "request_id: a live request is called \"%s\"", r->spec->id);
    } else if ((kind = check_room(all, r->n_sequences, why)) != REFUSAL_NONE) {
        ; /* why says it */
    } else if (take_slots(r) != STATUS_OK) {
        kind = refuse(why, REFUSAL_INTERNAL, "%s", status_message());
    } else {
        if (same)
            forget(same);
        r->references++; /* the table's and the caller's */
        insert(all, r);
    }
    pthread_mutex_unlock(&all->lock);
    return kind;
}

static status journal_request(requests *all, const request *r)
{
    if (!journal_is_durable(all->options.journal))
        return STATUS_OK;
    size_t size = convoke__journal__request__get_packed_size(r->spec);
    uint8_t *packed = malloc(size + 1);
    if (!packed)
        return status_fail(STATUS_NO_MEMORY, "no memory to write request %s down", r->spec->id);
    convoke__journal__request__pack(r->spec, packed);
    status st = journal_accept(all->options.journal, r->spec->id, packed, size);
    free(packed);
    return st;
}

/* It stands in the journal: now it may run. What has been cancelled meanwhile stands there as if it ran. */
static void launch_request(requests *all, request *r)
{
    pthread_mutex_lock(&all->lock);
    r->accepted_durably = r->journal_asked = true;
    all->prompt_tokens += r->spec->sequence->n_tokens;
    for (int i = 0; i < r->n_sequences; i++)
        if (r->sequences[i].out.finish != FINISH_NONE)
            journal_end(&r->sequences[i]);
        else if (may_submit(&r->sequences[i]))
            submit_sequence(&r->sequences[i]);
    pthread_mutex_unlock(&all->lock);
    if (all->options.metrics)
        metrics_prompt_tokens(all->options.metrics, (int)r->spec->sequence->n_tokens);
}

/* The journal could not take it: it was never here. */
static void give_up_request(request *r)
{
    requests *all = r->all;
    pthread_mutex_lock(&all->lock);
    r->journal_asked = true;
    request_cancel_locked(r);
    if (may_forget(r))
        forget(r);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
    request_release(r);
}

refusal_kind requests_open(requests *all, const request_wish *wish, request **out, refusal *why)
{
    *why = (refusal){.kind = REFUSAL_NONE};
    double start = clock_seconds();
    pthread_mutex_lock(&all->lock);
    requests_limits limits = all->limits;
    *why = all->refused;
    pthread_mutex_unlock(&all->lock);
    if (why->kind != REFUSAL_NONE)
        return why->kind;
    Convoke__Journal__Request *spec;
    refusal_kind kind = request_build(all, &limits, wish, &spec, why);
    if (kind != REFUSAL_NONE)
        return kind;
    request *r = request_create(all, spec);
    if (!r)
        return refuse(why, REFUSAL_INTERNAL, "no memory for the request");
    r->accepted = start;
    kind = enter(all, r, why);
    if (kind != REFUSAL_NONE) {
        request_destroy(r);
        return kind;
    }
    if (journal_request(all, r) != STATUS_OK) {
        refuse(why, REFUSAL_UNAVAILABLE, "%s", status_message());
        give_up_request(r);
        return why->kind;
    }
    launch_request(all, r);
    *out = r;
    return REFUSAL_NONE;
}

refusal_kind requests_find(requests *all, const char *id, request **out, refusal *why)
{
    pthread_mutex_lock(&all->lock);
    request *r = find(all, id);
    bool loading = !all->replayed; /* the journal's requests are not here yet */
    if (r)
        r->references++;
    pthread_mutex_unlock(&all->lock);
    if (!r && loading)
        return refuse(why, REFUSAL_UNAVAILABLE, "the model is still being loaded");
    if (!r)
        return refuse(why, REFUSAL_NOT_FOUND, "request_id: no request is called \"%.127s\"", id);
    *out = r;
    return REFUSAL_NONE;
}

void request_release(request *r)
{
    if (!r)
        return;
    requests *all = r->all;
    pthread_mutex_lock(&all->lock);
    bool last = unreference(r);
    pthread_mutex_unlock(&all->lock);
    if (last)
        request_destroy(r);
}

void request_abort(request *r)
{
    pthread_mutex_lock(&r->all->lock);
    request_cancel_locked(r);
    pthread_mutex_unlock(&r->all->lock);
    readers_wake(r->all);
}

void requests_abort(requests *all, const char *id)
{
    pthread_mutex_lock(&all->lock);
    request *r = find(all, id);
    if (r)
        request_cancel_locked(r);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
}

const char *request_id(const request *r)
{
    return r->spec->id;
}

int request_n_sequences(const request *r)
{
    return r->n_sequences;
}

int request_n_prompt(const request *r)
{
    return (int)r->spec->sequence->n_tokens;
}

const int32_t *request_prompt(const request *r)
{
    return r->spec->sequence->tokens;
}

int requests_list(requests *all, request_summary *out, int max)
{
    int n = 0;
    double now = clock_seconds();
    pthread_mutex_lock(&all->lock);
    for (const request *r = all->first; r; r = r->next, n++) {
        if (n >= max)
            continue;
        request_summary *s = &out[n];
        *s = (request_summary){.n_prompt = request_n_prompt(r),
                               .n_sequences = r->n_sequences,
                               .finished = r->n_finished == r->n_sequences,
                               .age_seconds = now - r->accepted};
        snprintf(s->id, sizeof s->id, "%s", r->spec->id);
        for (int i = 0; i < r->n_sequences; i++)
            s->n_output += r->sequences[i].out.n_tokens;
    }
    pthread_mutex_unlock(&all->lock);
    return n;
}

/* ---- from the workers --------------------------------------------------------------------------------------------------------
 */

static void sequence_started(request_sequence *s, const Convoke__Control__Event *e)
{
    requests *all = s->request->all;
    double now = clock_seconds();
    s->owner = (int)e->owner;
    s->n_cached = s->out.n_tokens == 0 ? (int)e->n_cached : s->n_cached;
    if (s->first_started <= 0)
        s->first_started = now;
    if (s->started)
        return;
    s->started = true;
    all->n_started++;
    all->n_unstarted--;
    if (all->last_start > 0 && now - all->last_start < 60)
        all->start_interval += 0.1 * (now - all->last_start - all->start_interval);
    all->last_start = now;
}

/* Log-probabilities of prompt tokens come in order. After a preemption or a new launch they come from the start again; what is
 * here already is the same. */
static status prompt_scored(request *r, const Convoke__Control__Event *e)
{
    size_t at = 0;
    for (size_t i = 0; i < e->n_tokens && r->n_prompt_done < request_n_prompt(r); i++) {
        size_t n = i < e->n_candidates_of_token ? e->candidates_of_token[i] : 0;
        if (at + n > e->n_candidates)
            return status_fail(STATUS_BAD_INPUT, "a report has fewer candidates than it says");
        if ((int)e->first_position + (int)i == r->n_prompt_done) {
            r->prompt[r->n_prompt_done] = token_info_of(e->tokens[i]);
            r->candidates_of_prompt[r->n_prompt_done++] = (int)n;
            TRY(candidates_add(&r->prompt_candidates, &r->n_prompt_candidates, &r->prompt_candidate_capacity, e->candidates + at,
                               n));
        }
        at += n;
    }
    return STATUS_OK;
}

static void journal_event(const request_sequence *s, int first, const Convoke__Control__Event *e)
{
    const request *r = s->request;
    if (!journal_is_durable(r->all->options.journal))
        return;
    size_t size = convoke__control__event__get_packed_size(e);
    uint8_t on_stack[512], *packed = size <= sizeof on_stack ? on_stack : malloc(size);
    if (!packed)
        return; /* computed again after a restart: the same */
    convoke__control__event__pack(e, packed);
    journal_tokens(r->all->options.journal, r->spec->id, s->index, first, (int)e->n_tokens, packed, size);
    if (packed != on_stack)
        free(packed);
}

static void measure_token(request_sequence *s)
{
    requests *all = s->request->all;
    double now = clock_seconds();
    all->generated_tokens++;
    bool first = s->first_token <= 0;
    if (all->options.metrics && first)
        metrics_first_token(all->options.metrics, now - s->request->accepted);
    else if (all->options.metrics && s->last_token > 0)
        metrics_inter_token(all->options.metrics, now - s->last_token);
    if (all->options.metrics)
        metrics_generated_tokens(all->options.metrics, 1);
    if (first)
        s->first_token = now;
    s->last_token = now;
}

static status append_tokens(request_sequence *s, const Convoke__Control__Event *e)
{
    size_t at = 0;
    size_t max = s->request->spec->sequence->max_new;
    for (size_t i = 0; i < e->n_tokens && s->out.finish == FINISH_NONE && (size_t)s->out.n_tokens < max; i++) {
        size_t n = i < e->n_candidates_of_token ? e->candidates_of_token[i] : 0;
        if (at + n > e->n_candidates)
            return status_fail(STATUS_BAD_INPUT, "a report has fewer candidates than it says");
        TRY(output_append(s->request, &s->out, e->tokens[i], e->candidates + at, n));
        at += n;
    }
    return STATUS_OK;
}

static status tokens_came(request_sequence *s, const Convoke__Control__Event *e)
{
    requests *all = s->request->all;
    int first = s->out.n_tokens;
    TRY(append_tokens(s, e));
    measure_token(s);
    journal_event(s, first, e);
    if (s->out.finish == FINISH_STOP_STRING) {
        all->backend.cancel(all->backend_arg, &s->wire_id, 1);
        finish_sequence(s, FINISH_STOP_STRING, true);
        return STATUS_OK;
    }
    readers_note(s->request);
    readers_hold_slow(s->request);
    return STATUS_OK;
}

static void workers_finished(request_sequence *s, const Convoke__Control__Event *e)
{
    switch (e->finish) {
    case CONVOKE__CONTROL__FINISH__LENGTH:
        finish_sequence(s, FINISH_LENGTH, true);
        break;
    case CONVOKE__CONTROL__FINISH__STOP:
        finish_sequence(s, FINISH_STOP_TOKEN, true);
        break;
    case CONVOKE__CONTROL__FINISH__FAILED:
        fail_sequence(s, REFUSAL_INTERNAL, e->reason);
        break;
    default:
        finish_sequence(s, FINISH_ABORTED, true);
        break;
    }
}

static status take_event(request_sequence *s, const Convoke__Control__Event *e)
{
    switch (e->kind) {
    case CONVOKE__CONTROL__EVENT_KIND__STARTED:
        sequence_started(s, e);
        return STATUS_OK;
    case CONVOKE__CONTROL__EVENT_KIND__PROMPT:
        return s->request->candidates_of_prompt ? prompt_scored(s->request, e) : STATUS_OK;
    case CONVOKE__CONTROL__EVENT_KIND__TOKEN:
        return tokens_came(s, e);
    default:
        workers_finished(s, e);
        return STATUS_OK;
    }
}

void requests_workers_report(requests *all, const Convoke__Control__Report *report)
{
    pthread_mutex_lock(&all->lock);
    for (size_t i = 0; i < report->n_events; i++) {
        request_sequence *s = find_sequence(all, report->events[i]->id);
        if (s && s->submitted && take_event(s, report->events[i]) != STATUS_OK) {
            all->backend.cancel(all->backend_arg, &s->wire_id, 1);
            fail_sequence(s, REFUSAL_INTERNAL, status_message());
        }
    }
    trim_remembered(all);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
}

void requests_set_limits(requests *all, const requests_limits *limits)
{
    pthread_mutex_lock(&all->lock);
    all->limits = *limits;
    pthread_mutex_unlock(&all->lock);
}

/* The last token may have ended a sequence without its end having reached us, or the journal. */
static void end_what_has_ended(requests *all)
{
    for (request *r = all->first; r; r = r->next)
        for (int i = 0; i < r->n_sequences; i++) {
            request_sequence *s = &r->sequences[i];
            finish_kind kind = output_should_end(r, &s->out);
            if (!s->out.n_tokens || kind == FINISH_NONE || find_sequence(all, s->wire_id) != s)
                continue;
            finish_sequence(s, kind, true);
        }
}

void requests_workers_ready(requests *all)
{
    pthread_mutex_lock(&all->lock);
    all->ready = true;
    end_what_has_ended(all);
    submit_waiting(all);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
}

void requests_workers_lost(requests *all)
{
    pthread_mutex_lock(&all->lock);
    all->ready = false;
    for (request *r = all->first; r; r = r->next)
        for (int i = 0; i < r->n_sequences; i++) {
            request_sequence *s = &r->sequences[i];
            if (s->out.finish != FINISH_NONE)
                continue;
            if (s->started) {
                all->n_started--;
                all->n_unstarted++;
            }
            s->submitted = s->started = s->held = s->brings_prompt = false;
        }
    pthread_mutex_unlock(&all->lock);
}

/* ---- the coordinator's words
 * --------------------------------------------------------------------------------------------------- */

void requests_refuse_new(requests *all, refusal_kind kind, const char *sentence)
{
    pthread_mutex_lock(&all->lock);
    refuse(&all->refused, kind, "%s", sentence);
    pthread_mutex_unlock(&all->lock);
}

void requests_end_all(requests *all, refusal_kind kind, const char *sentence)
{
    pthread_mutex_lock(&all->lock);
    for (request *r = all->first, *next; r; r = next) {
        next = r->next;
        if (kind == REFUSAL_NONE)
            request_cancel_locked(r);
        for (int i = 0; i < r->n_sequences; i++)
            if (r->sequences[i].out.finish == FINISH_NONE)
                fail_sequence(&r->sequences[i], kind, sentence);
    }
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
}

void requests_pause(requests *all, bool paused, bool freeze)
{
    pthread_mutex_lock(&all->lock);
    all->paused = paused;
    all->frozen = paused && freeze;
    for (request *r = all->first; r; r = r->next)
        for (int i = 0; i < r->n_sequences; i++) {
            request_sequence *s = &r->sequences[i];
            s->frozen = paused && (freeze || !has_begun(s));
            if (s->out.finish == FINISH_NONE)
                update_hold(s);
        }
    if (!paused)
        submit_waiting(all);
    pthread_mutex_unlock(&all->lock);
}

void requests_tick(requests *all)
{
    double now = clock_seconds();
    pthread_mutex_lock(&all->lock);
    for (request *r = all->first, *next; r; r = next) {
        next = r->next;
        bool over = r->n_finished == r->n_sequences;
        if (!over && !r->readers && r->ownerless_since > 0 && now - r->ownerless_since > r->spec->linger_ms * 1e-3)
            request_cancel_locked(r);
        else if (may_forget(r) && now - r->finished_at > all->options.remember_seconds)
            forget(r);
    }
    submit_waiting(all); /* what memory did not allow before */
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
}

/* Sequences that go on under a pause, or will with the next launch. One that began just before it heard of the pause is held in
 * its middle and does not count. */
static int count_begun(const requests *all)
{
    int n = 0;
    for (const request *r = all->paused ? all->first : NULL; r; r = r->next)
        for (int i = 0; i < r->n_sequences; i++) {
            const request_sequence *s = &r->sequences[i];
            n += s->out.finish == FINISH_NONE && !s->frozen && has_begun(s);
        }
    return n;
}

void requests_count(requests *all, requests_counts *out)
{
    pthread_mutex_lock(&all->lock);
    *out = (requests_counts){.n_live = all->n_live,
                             .n_started = all->n_started,
                             .n_waiting = all->n_unstarted,
                             .n_begun = count_begun(all),
                             .prompt_tokens = all->prompt_tokens,
                             .generated_tokens = all->generated_tokens};
    pthread_mutex_unlock(&all->lock);
}

/* ---- taking up the journal
 * ----------------------------------------------------------------------------------------------------- */

static status replay_request(void *arg, const char *id, const void *spec, size_t size)
{
    requests *all = arg;
    Convoke__Journal__Request *message = convoke__journal__request__unpack(NULL, size, spec);
    if (!message || !message->sequence || message->n < 1 || message->sequence->n_tokens < 1) {
        if (message)
            convoke__journal__request__free_unpacked(message, NULL);
        return status_fail(STATUS_BAD_INPUT, "journal: request %s is damaged", id);
    }
    request *r = request_create(all, message);
    if (!r)
        return status_fail(STATUS_NO_MEMORY, "no memory for request %s of the journal", id);
    if (take_slots(r) != STATUS_OK) {
        request_destroy(r);
        return STATUS_NO_MEMORY;
    }
    insert(all, r);
    r->accepted_durably = r->journal_asked = true;
    if (r->spec->linger_ms < all->options.remember_seconds * 1e3)
        r->spec->linger_ms = (uint32_t)(all->options.remember_seconds * 1e3); /* its client may come back for it */
    r->ownerless_since = clock_seconds();
    return STATUS_OK;
}

static status find_replayed(requests *all, const char *id, int sequence, request_sequence **out)
{
    request *r = find(all, id);
    if (!r || sequence < 0 || sequence >= r->n_sequences)
        return status_fail(STATUS_BAD_INPUT, "journal: request %s has no sequence %d", id, sequence);
    *out = &r->sequences[sequence];
    return STATUS_OK;
}

static status replay_tokens(void *arg, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    request_sequence *s = NULL;
    TRY(find_replayed(arg, id, sequence, &s));
    Convoke__Control__Event *e = convoke__control__event__unpack(NULL, size, records);
    bool fits = e && first == s->out.n_tokens && (size_t)n == e->n_tokens;
    status st =
        fits ? append_tokens(s, e) : status_fail(STATUS_BAD_INPUT, "journal: request %s has a gap at token %d", id, first);
    if (e)
        convoke__control__event__free_unpacked(e, NULL);
    return st;
}

static status replay_finish(void *arg, const char *id, int sequence, const void *how, size_t size)
{
    request_sequence *s = NULL;
    TRY(find_replayed(arg, id, sequence, &s));
    Convoke__Journal__Finish *f = convoke__journal__finish__unpack(NULL, size, how);
    if (!f || f->kind == FINISH_NONE || f->kind > FINISH_FAILED || find_sequence(arg, s->wire_id) != s) {
        if (f)
            convoke__journal__finish__free_unpacked(f, NULL);
        return status_fail(STATUS_BAD_INPUT, "journal: the end of request %s is damaged", id);
    }
    if (f->kind == FINISH_FAILED)
        refuse(&s->out.failed, REFUSAL_INTERNAL, "%s", f->reason);
    finish_sequence(s, (finish_kind)f->kind, false);
    convoke__journal__finish__free_unpacked(f, NULL);
    return STATUS_OK;
}

/* A journal of another model: its tokens mean nothing to this one. */
static void fail_other_models(requests *all)
{
    for (request *r = all->first; r; r = r->next) {
        if (!*r->spec->model || strcmp(r->spec->model, all->options.model_names[0]) == 0)
            continue;
        char why[400];
        snprintf(why, sizeof why, "the request was accepted for model %.150s, and %.150s is served now", r->spec->model,
                 all->options.model_names[0]);
        for (int i = 0; i < r->n_sequences; i++)
            if (find_sequence(all, r->sequences[i].wire_id) == &r->sequences[i])
                fail_sequence(&r->sequences[i], REFUSAL_UNAVAILABLE, why);
    }
}

status requests_replay(requests *all)
{
    static const journal_visitor visitor = {.request = replay_request, .tokens = replay_tokens, .finish = replay_finish};
    pthread_mutex_lock(&all->lock);
    status st = journal_replay(all->options.journal, &visitor, all);
    fail_other_models(all);
    all->replayed = true;
    pthread_mutex_unlock(&all->lock);
    return st;
}
