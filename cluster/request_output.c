/* request_output.c - what a sequence has said so far: its tokens, and of its text as much as may be shown. */
#include "cluster/requests_internal.h"

#include <stdlib.h>
#include <string.h>

status output_start(sequence_output *o, const requests_options *options, const Convoke__Journal__Request *spec)
{
    *o = (sequence_output){.stop_string = -1};
    if (!options->tokenizer || spec->no_text)
        return STATUS_OK;
    return tokenizer_stream_create(options->tokenizer, !spec->keep_special, &o->stream);
}

void output_clear(sequence_output *o)
{
    free(o->tokens);
    free(o->shown_after);
    free(o->candidates_after);
    free(o->candidates);
    bytes_clear(&o->text);
    tokenizer_stream_destroy(o->stream);
}

static status grow(sequence_output *o)
{
    if (o->n_tokens < o->capacity)
        return STATUS_OK;
    size_t capacity = o->capacity ? 2 * (size_t)o->capacity : 32;
    token_info *tokens = realloc(o->tokens, capacity * sizeof *tokens);
    if (tokens)
        o->tokens = tokens;
    size_t *shown = realloc(o->shown_after, capacity * sizeof *shown);
    if (shown)
        o->shown_after = shown;
    size_t *candidates = realloc(o->candidates_after, capacity * sizeof *candidates);
    if (candidates)
        o->candidates_after = candidates;
    if (!tokens || !shown || !candidates)
        return status_fail(STATUS_NO_MEMORY, "no memory for the output of a sequence");
    o->capacity = (int)capacity;
    return STATUS_OK;
}

status candidates_add(token_info **items, size_t *n_items, size_t *capacity, Convoke__Control__TokenLogprob *const *from,
                      size_t n)
{
    if (*n_items + n > *capacity) {
        size_t room = 2 * (*n_items + n) + 32;
        token_info *grown = realloc(*items, room * sizeof *grown);
        if (!grown)
            return status_fail(STATUS_NO_MEMORY, "no memory for the candidates of a sequence");
        *items = grown;
        *capacity = room;
    }
    for (size_t i = 0; i < n; i++)
        (*items)[(*n_items)++] = token_info_of(from[i]);
    return STATUS_OK;
}

/* New text (with the token that is being added): shows it up to where a stop string might begin; a stop string ends the sequence.
 */
static void look_for_stop(request *r, sequence_output *o, size_t searched)
{
    int n = (int)r->spec->n_stops;
    size_t size = o->text.size;
    stop_verdict v = stop_text_check((const char *)o->text.data, size, searched, r->stops, n, r->spec->include_stop);
    bool too_early = o->n_tokens + 1 <= (int)r->spec->sequence->min_tokens; /* as stop tokens: not before min_tokens */
    size_t shown = v.stop >= 0 && too_early ? size : v.shown;
    if (shown > o->shown) /* what has been shown stays, also the part of a stop string that was too early */
        o->shown = shown;
    if (v.stop >= 0 && !too_early) {
        o->finish = FINISH_STOP_STRING;
        o->stop_string = v.stop;
    }
}

static status add_text(request *r, sequence_output *o, const char *text, size_t size)
{
    size_t searched = o->text.size;
    bytes_put(&o->text, text, size);
    if (o->text.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for the text of a sequence");
    if (size > 0)
        look_for_stop(r, o, searched);
    return STATUS_OK;
}

static bool is_stop_id(const request *r, int32_t token)
{
    const Convoke__Control__Sequence *s = r->spec->sequence;
    for (size_t i = 0; i < s->n_stop_ids; i++)
        if (s->stop_ids[i] == token)
            return true;
    return false;
}

static bool is_eos(const request *r, int32_t token)
{
    const requests_limits *l = &r->all->limits;
    for (int i = 0; !r->spec->sequence->ignore_eos && i < l->n_eos; i++)
        if (l->eos_ids[i] == token)
            return true;
    return false;
}

status output_append(request *r, sequence_output *o, const Convoke__Control__TokenLogprob *said,
                     Convoke__Control__TokenLogprob *const *candidates, size_t n_candidates)
{
    token_info token = token_info_of(said);
    TRY(grow(o));
    TRY(candidates_add(&o->candidates, &o->n_candidates, &o->candidate_capacity, candidates, n_candidates));
    /* The token that ends a sequence is not part of its text, unless stop strings are. */
    bool ends = is_stop_id(r, token.token) || is_eos(r, token.token);
    if (o->stream && (!ends || r->spec->include_stop)) {
        const char *text;
        size_t size;
        TRY(tokenizer_stream_push(o->stream, token.token, &text, &size));
        TRY(add_text(r, o, text, size));
    }
    o->tokens[o->n_tokens] = token;
    o->candidates_after[o->n_tokens] = o->n_candidates;
    o->shown_after[o->n_tokens++] = o->shown;
    return STATUS_OK;
}

/* Whether its last token ends it: what the workers would have said next. */
finish_kind output_should_end(const request *r, const sequence_output *o)
{
    if (o->finish != FINISH_NONE || o->n_tokens == 0)
        return o->finish;
    int32_t last = o->tokens[o->n_tokens - 1].token;
    if (is_stop_id(r, last) || is_eos(r, last))
        return FINISH_STOP_TOKEN;
    return o->n_tokens >= (int)r->spec->sequence->max_new ? FINISH_LENGTH : FINISH_NONE;
}

/* Nothing more will come, so nothing is held back any longer. The flushed tail may itself complete a stop string. */
static void show_rest(request *r, sequence_output *o)
{
    const char *text;
    size_t size;
    if (!o->stream || o->finish == FINISH_STOP_STRING)
        return;
    if (tokenizer_stream_flush(o->stream, &text, &size) == STATUS_OK)
        add_text(r, o, text, size);
    if (o->finish != FINISH_STOP_STRING)
        o->shown = o->text.size;
}

void output_finish(request *r, sequence_output *o, finish_kind kind)
{
    if (kind == FINISH_STOP_TOKEN) {
        int32_t last = o->n_tokens > 0 ? o->tokens[o->n_tokens - 1].token : -1;
        o->stop_token = last;
        if (!is_stop_id(r, last))
            kind = FINISH_EOS;
    }
    show_rest(r, o);
    if (o->finish == FINISH_NONE)
        o->finish = kind;
    if (o->n_tokens > 0)
        o->shown_after[o->n_tokens - 1] = o->shown;
}
