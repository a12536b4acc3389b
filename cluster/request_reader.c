/* request_reader.c - readers: places in a request's output. A piece is copied out under the lock, so what a door serializes
 * afterwards cannot change below it. */
#include "cluster/requests_internal.h"

#include "proto/clock.h"

#include <stdlib.h>
#include <string.h>

#define TEXT_NOT_YET SIZE_MAX /* the sequence has not come to the reader's first token yet */

/* ---- where a reader is ------------------------------------------------------------------------------------------------------
 */

/* A client may know more than we do: the last tokens it saw need not have reached the journal of a coordinator that was killed.
 * They come again, the same ones, and are not for this reader. */
static void place_in_sequence(reader *d, int i, int from)
{
    const sequence_output *o = &d->request->sequences[i].out;
    bool later = from > o->n_tokens && o->finish == FINISH_NONE;
    if (from > o->n_tokens && !later)
        from = o->n_tokens;
    d->token_place[i] = from;
    d->text_place[i] = later ? TEXT_NOT_YET : from > 0 ? o->shown_after[from - 1] : 0;
}

/* ---- is there news --------------------------------------------------------------------------------------------------------- */

bool request_prompt_done(const request *r)
{
    const Convoke__Control__Sequence *s = r->spec->sequence;
    return !s->prompt_logprobs || r->n_prompt_done == (int)s->n_tokens;
}

bool request_prompt_ready(const request *r)
{
    if (request_prompt_done(r))
        return true;
    for (int i = 0; i < r->n_sequences; i++) {
        const request_sequence *s = &r->sequences[i];
        if (s->out.finish == FINISH_NONE && (s->brings_prompt || !s->submitted))
            return false;
    }
    return true;
}

static bool has_news(reader *d, int i)
{
    const sequence_output *o = &d->request->sequences[i].out;
    if (d->text_place[i] == TEXT_NOT_YET)
        place_in_sequence(d, i, d->token_place[i]);
    if (d->text_place[i] == TEXT_NOT_YET)
        return false;
    return !d->finish_sent[i] && (o->finish != FINISH_NONE || d->token_place[i] < o->n_tokens || d->text_place[i] < o->shown);
}

static int find_news(reader *d)
{
    const request *r = d->request;
    if (!request_prompt_ready(r))
        return -1;
    for (int k = 0; k < r->n_sequences; k++) {
        int i = (d->next_sequence + k) % r->n_sequences;
        if (has_news(d, i))
            return i;
    }
    return -1;
}

void readers_note(request *r)
{
    for (reader *d = r->readers; d; d = d->next) {
        if (!d->armed || find_news(d) < 0)
            continue;
        d->armed = false;
        if (d->queued)
            continue; /* a wake is still to come, and will find this news, too */
        d->queued = true;
        d->next_to_wake = r->all->to_wake;
        r->all->to_wake = d;
    }
}

/* One at a time from the common list: several threads may wake, and a reader that closes takes itself off it. */
void readers_wake(requests *all)
{
    pthread_mutex_lock(&all->lock);
    for (reader *d; (d = all->to_wake);) {
        all->to_wake = d->next_to_wake;
        d->queued = false;
        d->calling++;
        pthread_mutex_unlock(&all->lock);
        d->wake(d->arg);
        pthread_mutex_lock(&all->lock);
        d->calling--;
        pthread_cond_broadcast(&all->woken);
    }
    pthread_mutex_unlock(&all->lock);
}

static void leave_queue(reader *d)
{
    reader **at = &d->request->all->to_wake;
    while (d->queued && *at != d)
        at = &(*at)->next_to_wake;
    if (d->queued)
        *at = d->next_to_wake;
    d->queued = false;
}

/* ---- a client that does not keep up ---------------------------------------------------------------------------------------- */

static size_t unread_bytes(const reader *d)
{
    const request *r = d->request;
    size_t bytes = 0;
    for (int i = 0; i < r->n_sequences; i++) {
        const sequence_output *o = &r->sequences[i].out;
        if (d->token_place[i] >= o->n_tokens)
            continue;
        size_t read = d->token_place[i] > 0 ? o->candidates_after[d->token_place[i] - 1] : 0;
        bytes += ((size_t)(o->n_tokens - d->token_place[i]) + o->n_candidates - read) * sizeof(token_info);
        bytes += o->text.size - d->text_place[i];
    }
    return bytes;
}

void readers_hold_slow(request *r)
{
    reader *d = r->owner;
    if (!d)
        return;
    size_t unread = unread_bytes(d), limit = r->all->options.max_unread_bytes;
    if (!d->holding && unread > limit) {
        d->holding = true;
        request_hold_locked(r, true);
    } else if (d->holding && unread <= limit / 2) {
        d->holding = false;
        request_hold_locked(r, false);
    }
}

/* ---- opening and closing --------------------------------------------------------------------------------------------------- */

static void destroy(reader *d)
{
    bytes_writer *all[] = {&d->tokens, &d->candidates,        &d->counts,       &d->text, &d->text_after,
                           &d->prompt, &d->prompt_candidates, &d->prompt_counts};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        bytes_clear(all[i]);
    free(d->token_place);
    free(d->text_place);
    free(d->finish_sent);
    free(d);
}

static status create(request *r, reader **out)
{
    reader *d = calloc(1, sizeof *d);
    size_t n = (size_t)r->n_sequences;
    if (d) {
        d->token_place = calloc(n, sizeof *d->token_place);
        d->text_place = calloc(n, sizeof *d->text_place);
        d->finish_sent = calloc(n, sizeof *d->finish_sent);
    }
    if (!d || !d->token_place || !d->text_place || !d->finish_sent) {
        if (d)
            destroy(d);
        return status_fail(STATUS_NO_MEMORY, "no memory for a reader of %d sequences", r->n_sequences);
    }
    *out = d;
    return STATUS_OK;
}

static void place_reader(reader *d, int from_token)
{
    for (int i = 0; i < d->request->n_sequences; i++)
        place_in_sequence(d, i, from_token);
    d->prompt_sent = from_token > 0;
}

status reader_open(request *r, int from_token, bool owns, void (*wake)(void *arg), void *arg, reader **out)
{
    reader *d = NULL;
    TRY(create(r, &d));
    d->request = r;
    d->owns = owns;
    d->wake = wake;
    d->arg = arg;
    requests *all = r->all;
    pthread_mutex_lock(&all->lock);
    if (owns && r->owner) {
        pthread_mutex_unlock(&all->lock);
        destroy(d);
        return status_fail(STATUS_USAGE, "request %s already has a reader that owns it", r->spec->id);
    }
    place_reader(d, from_token > 0 ? from_token : 0);
    d->next = r->readers;
    r->readers = d;
    r->references++;
    if (owns) {
        r->owner = d;
        r->ownerless_since = 0;
    }
    d->armed = true;
    *out = d; /* before the first wake, which may use it */
    readers_note(r);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all);
    return STATUS_OK;
}

static void leave(reader *d)
{
    request *r = d->request;
    reader **at = &r->readers;
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
    if (r->owner != d) {
        if (r->ownerless_since > 0) /* the time to come back begins again */
            r->ownerless_since = clock_seconds();
        return;
    }
    r->owner = NULL;
    if (r->n_finished == r->n_sequences)
        return;
    if (d->holding)
        request_hold_locked(r, false);
    r->ownerless_since = clock_seconds();
    if (r->spec->linger_ms == 0)
        request_cancel_locked(r);
}

void reader_close(reader *d)
{
    if (!d)
        return;
    request *r = d->request;
    requests *all = r->all;
    pthread_mutex_lock(&all->lock);
    leave(d); /* from here on nobody notes it */
    leave_queue(d);
    while (d->calling > 0)
        pthread_cond_wait(&all->woken, &all->lock);
    pthread_mutex_unlock(&all->lock);
    readers_wake(all); /* others may read this request, too */
    destroy(d);
    request_release(r);
}

/* ---- taking ---------------------------------------------------------------------------------------------------------------- */

static const void *copy(bytes_writer *w, const void *from, size_t size)
{
    bytes_reset(w);
    if (size > 0)
        bytes_put(w, from, size);
    return w->data;
}

static void take_prompt(reader *d, output_piece *p)
{
    const request *r = d->request;
    const Convoke__Control__Sequence *s = r->spec->sequence;
    d->prompt_sent = true;
    p->has_prompt = true;
    p->n_cached = r->sequences[0].n_cached;
    if (!request_prompt_done(r)) /* a journal does not keep log-probabilities of prompts: rather none than wrong ones */
        return;
    p->prompt = copy(&d->prompt, r->prompt, s->n_tokens * sizeof *r->prompt);
    if (!s->prompt_candidates)
        return;
    p->prompt_candidates =
        copy(&d->prompt_candidates, r->prompt_candidates, r->n_prompt_candidates * sizeof *r->prompt_candidates);
    p->candidates_of_prompt = copy(&d->prompt_counts, r->candidates_of_prompt, s->n_tokens * sizeof *r->candidates_of_prompt);
}

static void take_tokens(reader *d, int i, output_piece *p)
{
    const request *r = d->request;
    const sequence_output *o = &r->sequences[i].out;
    int from = d->token_place[i];
    p->first_token = from;
    p->n_tokens = o->n_tokens - from;
    p->tokens = copy(&d->tokens, o->tokens + from, (size_t)p->n_tokens * sizeof *o->tokens);
    bytes_reset(&d->text_after);
    for (int t = from; t < o->n_tokens; t++) {
        size_t after = o->shown_after[t] - d->text_place[i];
        bytes_put(&d->text_after, &after, sizeof after);
    }
    p->text_after = (const size_t *)(const void *)d->text_after.data;
    d->token_place[i] = o->n_tokens;
    if (!r->spec->sequence->output_candidates)
        return;
    size_t at = from > 0 ? o->candidates_after[from - 1] : 0;
    p->candidates = copy(&d->candidates, o->candidates + at, (o->n_candidates - at) * sizeof *o->candidates);
    bytes_reset(&d->counts);
    for (int t = from; t < o->n_tokens; t++) {
        int n = (int)(o->candidates_after[t] - at);
        at = o->candidates_after[t];
        bytes_put(&d->counts, &n, sizeof n);
    }
    p->candidates_of_token = (const int *)(const void *)d->counts.data;
}

static void take_finish(reader *d, int i, output_piece *p)
{
    const request *r = d->request;
    const sequence_output *o = &r->sequences[i].out;
    p->finish = o->finish;
    if (o->finish == FINISH_NONE)
        return;
    p->n_output = o->n_tokens;
    p->stop_token = o->stop_token;
    p->stop_string = o->stop_string >= 0 ? r->spec->stops[o->stop_string] : NULL;
    p->failed = o->failed;
    d->finish_sent[i] = true;
    d->n_done++;
}

bool reader_take(reader *d, output_piece *p, bool *done)
{
    request *r = d->request;
    requests *all = r->all;
    *p = (output_piece){.finish = FINISH_NONE, .stop_token = -1};
    pthread_mutex_lock(&all->lock);
    int i = find_news(d);
    if (i < 0) {
        d->armed = d->n_done < r->n_sequences;
        *done = !d->armed;
        pthread_mutex_unlock(&all->lock);
        return false;
    }
    const sequence_output *o = &r->sequences[i].out;
    p->sequence = i;
    if (!d->prompt_sent)
        take_prompt(d, p);
    take_tokens(d, i, p);
    p->text_size = o->shown - d->text_place[i];
    p->text = copy(&d->text, o->text.data ? o->text.data + d->text_place[i] : NULL, p->text_size);
    d->text_place[i] = o->shown;
    take_finish(d, i, p);
    d->next_sequence = (i + 1) % r->n_sequences;
    *done = d->n_done == r->n_sequences;
    readers_hold_slow(r);
    pthread_mutex_unlock(&all->lock);
    return true;
}
