/* door_generate.c - from an accepted request to its answers.
 *
 *   reader_take ─► piece ─┬─ streaming: cut into messages of about message_bytes, one under way at a time
 *        ▲                └─ whole: gathered per sequence until all have finished
 *        └── wake: poke the call
 *
 * A piece is everything gained since the last one, so a slow client gets fewer, larger messages, and costs nobody else anything.
 * The reader belongs to the call: its end closes the reader, and an owner's early end cancels the request. */
#include "cluster/door_internal.h"
#include "cluster/wire_check.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What one sequence has gained in all; for engines also while streaming (ids only). */
struct gathered {
    token_info *tokens, *candidates;
    int *n_candidates; /* of each token */
    char *text;
    int32_t *ids; /* only these while streaming */
    int n_tokens, n_all_candidates, tokens_room, candidates_room, ids_room;
    size_t text_size, text_room;
    bool has_candidates;
    output_piece end;
    char *stop_string;
};

/* The prompt's arrays, kept beyond the piece that brought them. */
typedef struct {
    token_info *tokens, *candidates;
    int *n_candidates;
} gathered_prompt;

/* Room for `more` further elements; false: out of memory. */
static bool grow(void **array, int used, int *room, int more, size_t size_of_one)
{
    if (more <= *room - used)
        return true;
    int wanted = used + more > 2 * used ? used + more : 2 * used;
    void *larger = realloc(*array, (size_t)wanted * size_of_one);
    if (!larger)
        return false;
    *array = larger;
    *room = wanted;
    return true;
}

static int sum(const int *counts, int n)
{
    int total = 0;
    for (int i = 0; counts && i < n; i++)
        total += counts[i];
    return total;
}

static bool gather_ids(struct gathered *s, const output_piece *p)
{
    if (!grow((void **)&s->ids, s->n_tokens, &s->ids_room, p->n_tokens, sizeof *s->ids))
        return false;
    for (int i = 0; i < p->n_tokens; i++)
        s->ids[s->n_tokens + i] = p->tokens[i].token;
    s->n_tokens += p->n_tokens;
    return true;
}

static bool gather_candidates(struct gathered *s, const output_piece *p)
{
    int more = sum(p->candidates_of_token, p->n_tokens);
    s->has_candidates = true;
    if (!grow((void **)&s->candidates, s->n_all_candidates, &s->candidates_room, more, sizeof *s->candidates))
        return false;
    if (more)
        memcpy(s->candidates + s->n_all_candidates, p->candidates, (size_t)more * sizeof *s->candidates);
    memcpy(s->n_candidates + s->n_tokens, p->candidates_of_token, (size_t)p->n_tokens * sizeof *s->n_candidates);
    s->n_all_candidates += more;
    return true;
}

static bool gather_text(struct gathered *s, const char *text, size_t size)
{
    if (size > s->text_room - s->text_size) {
        size_t room = s->text_size + size + s->text_size / 2;
        char *larger = realloc(s->text, room);
        if (!larger)
            return false;
        s->text = larger;
        s->text_room = room;
    }
    if (size)
        memcpy(s->text + s->text_size, text, size);
    s->text_size += size;
    return true;
}

static bool gather(struct gathered *s, const output_piece *p)
{
    int counts_room = s->tokens_room;
    if (!grow((void **)&s->n_candidates, s->n_tokens, &counts_room, p->n_tokens, sizeof *s->n_candidates) ||
        !grow((void **)&s->tokens, s->n_tokens, &s->tokens_room, p->n_tokens, sizeof *s->tokens) ||
        (p->candidates_of_token && !gather_candidates(s, p)) || !gather_text(s, p->text, p->text_size))
        return false;
    if (p->n_tokens)
        memcpy(s->tokens + s->n_tokens, p->tokens, (size_t)p->n_tokens * sizeof *s->tokens);
    s->n_tokens += p->n_tokens;
    return true;
}

/* The finish of a sequence, with a copy of what lives in the reader. */
static bool gather_end(struct gathered *s, const output_piece *p)
{
    s->end = *p;
    if (p->finish == FINISH_STOP_STRING && p->stop_string) {
        s->stop_string = strdup(p->stop_string);
        s->end.stop_string = s->stop_string;
        return s->stop_string != NULL;
    }
    return true;
}

static void *copy(const void *from, size_t n, size_t size_of_one)
{
    void *to = malloc(n * size_of_one + 1);
    if (to && n)
        memcpy(to, from, n * size_of_one);
    return to;
}

/* Behind the sequences stands the prompt. */
static gathered_prompt *prompt_of(generation *g)
{
    return (gathered_prompt *)(g->gathered + g->n_sequences);
}

static bool gather_prompt(generation *g, const output_piece *p)
{
    gathered_prompt *kept = prompt_of(g);
    size_t n = (size_t)g->n_prompt;
    if (p->prompt)
        kept->tokens = copy(p->prompt, n, sizeof *p->prompt);
    if (p->candidates_of_prompt) {
        kept->candidates =
            copy(p->prompt_candidates, (size_t)sum(p->candidates_of_prompt, g->n_prompt), sizeof *kept->candidates);
        kept->n_candidates = copy(p->candidates_of_prompt, n, sizeof *kept->n_candidates);
    }
    return (!p->prompt || kept->tokens) && (!p->candidates_of_prompt || (kept->candidates && kept->n_candidates));
}

/* The whole answer of one sequence, as a piece. */
static void whole_piece(generation *g, int sequence)
{
    struct gathered *s = &g->gathered[sequence];
    const gathered_prompt *prompt = prompt_of(g);
    g->piece = s->end;
    g->piece.has_prompt = sequence == 0 || g->form->whole_prompt;
    g->piece.prompt = prompt->tokens;
    g->piece.prompt_candidates = prompt->candidates;
    g->piece.candidates_of_prompt = prompt->n_candidates;
    g->piece.first_token = 0;
    g->piece.n_tokens = s->n_tokens;
    g->piece.tokens = s->tokens;
    g->piece.candidates = s->candidates;
    g->piece.candidates_of_token = s->has_candidates ? s->n_candidates : NULL;
    g->piece.text = s->text;
    g->piece.text_size = s->text_size;
    g->piece.text_after = NULL; /* it is never cut */
}

const int32_t *generation_ids(const generation *g, int sequence, int *n)
{
    *n = g->gathered[sequence].n_tokens;
    return g->gathered[sequence].ids;
}

/* At most `room` bytes of text, whole characters, but at least one character. */
static size_t cut_text(const char *text, size_t size, size_t room)
{
    size_t at = 0;
    if (size <= room)
        return size;
    while (at < size) {
        size_t n = utf8_character((const uint8_t *)text + at, size - at);
        n = n ? n : 1;
        if (at > 0 && at + n > room)
            break;
        at += n;
    }
    return at;
}

/* Bytes of the piece's text that come with its first n tokens. */
static size_t text_with(const output_piece *p, int n)
{
    return p->text_after && n > 0 ? p->text_after[n - 1] : 0;
}

/* The next part of the piece; false: it was the last. Tokens with their text, then what text is left. */
static bool cut(generation *g, output_piece *part)
{
    enum { TOKEN = 16, CANDIDATE = 20 }; /* bytes on the wire, about */
    const output_piece *p = &g->piece;
    size_t room = g->whole ? SIZE_MAX : door_of(g->call)->message_bytes, used = 0;
    int n = 0, n_candidates = 0, n_left = p->n_tokens - g->n_said_tokens;
    bool first = g->n_said_tokens == 0 && g->said_text == 0;
    *part = *p;
    part->has_prompt = p->has_prompt && first;
    while (n < n_left && (n == 0 || used < room)) {
        int here = p->candidates_of_token ? p->candidates_of_token[g->n_said_tokens + n] : 0;
        used += TOKEN + (size_t)here * CANDIDATE + text_with(p, g->n_said_tokens + n + 1) - text_with(p, g->n_said_tokens + n);
        n_candidates += here;
        n++;
    }
    size_t with = text_with(p, g->n_said_tokens + n), own = with > g->said_text ? with - g->said_text : 0;
    part->first_token = p->first_token + g->n_said_tokens;
    part->tokens = p->tokens + g->n_said_tokens;
    part->n_tokens = n;
    part->candidates = p->candidates ? p->candidates + g->n_said_candidates : NULL;
    part->candidates_of_token = p->candidates_of_token ? p->candidates_of_token + g->n_said_tokens : NULL;
    part->text = p->text_size ? p->text + g->said_text : "";
    part->text_size = n < n_left ? own : cut_text(part->text, p->text_size - g->said_text, own + (used < room ? room - used : 1));
    g->n_said_tokens += n;
    g->n_said_candidates += n_candidates;
    g->said_text += part->text_size;
    bool more = n < n_left || g->said_text < p->text_size;
    if (!more && p->finish != FINISH_NONE && g->form->finish_apart && !g->whole && (n > 0 || part->has_prompt)) {
        g->piece.has_prompt = false; /* what is left is the finish alone */
        more = true;
    }
    if (more)
        part->finish = FINISH_NONE;
    return more;
}

/* Says the next part of the piece in hand; false: there was nothing to say in it. */
static bool say_part(generation *g)
{
    output_piece part;
    g->has_piece = cut(g, &part) ? g->has_piece : false;
    bool last = !g->has_piece && g->n_finished == g->n_sequences && (!g->whole || g->n_whole_said == g->n_sequences);
    if (g->form->say(g, &part, last))
        return true;
    if (last)
        rpc_call_finish(g->call, RPC_OK, NULL);
    return last;
}

static void start_piece(generation *g)
{
    g->has_piece = true;
    g->n_said_tokens = g->n_said_candidates = 0;
    g->said_text = 0;
}

/* Notes a piece just taken; false: the call has ended with it. */
static bool take_in(generation *g)
{
    const output_piece *p = &g->piece;
    struct gathered *s = &g->gathered[p->sequence];
    bool kept = true;
    if (p->finish == FINISH_FAILED) {
        door_refuse(g->call, &p->failed);
        return false;
    }
    if (p->has_prompt)
        g->n_cached = p->n_cached;
    if (g->whole)
        kept = (!p->has_prompt || gather_prompt(g, p)) && gather(s, p);
    else if (g->form->finish_apart)
        kept = gather_ids(s, p);
    if (p->finish != FINISH_NONE) {
        g->n_finished++;
        kept = kept && (!g->whole || gather_end(s, p));
    }
    if (!kept)
        rpc_call_finish(g->call, RPC_RESOURCE_EXHAUSTED, "out of memory for the answer");
    return kept;
}

void generation_pump(rpc_call *call)
{
    generation *g = rpc_call_state(call);
    for (;;) {
        bool done = false;
        if (g->has_piece) {
            if (say_part(g))
                return;
        } else if (g->whole && g->n_finished == g->n_sequences) {
            whole_piece(g, g->n_whole_said++);
            start_piece(g);
        } else if (reader_take(g->reader, &g->piece, &done)) {
            if (!take_in(g))
                return;
            if (!g->whole)
                start_piece(g);
        } else {
            if (done)
                rpc_call_finish(call, RPC_OK, NULL);
            return;
        }
    }
}

static void wake(void *call)
{
    rpc_call_poke(call);
}

void generation_end(rpc_call *call)
{
    generation *g = rpc_call_state(call);
    if (!g)
        return;
    rpc_call_set_state(call, NULL);
    if (g->reader)
        reader_close(g->reader);
    request_release(g->request);
    for (int i = 0; i < g->n_sequences; i++) {
        struct gathered *s = &g->gathered[i];
        free(s->tokens);
        free(s->candidates);
        free(s->n_candidates);
        free(s->text);
        free(s->ids);
        free(s->stop_string);
    }
    if (g->gathered) {
        free(prompt_of(g)->tokens);
        free(prompt_of(g)->candidates);
        free(prompt_of(g)->n_candidates);
    }
    free(g->gathered);
    arena_clear(&g->memory);
    free(g);
}

static void generation_open(generation *g, request *r, int from_token, bool owns)
{
    refusal why = {0};
    g->request = r;
    g->n_sequences = request_n_sequences(r);
    g->n_prompt = request_n_prompt(r);
    g->gathered = calloc(1, (size_t)g->n_sequences * sizeof *g->gathered + sizeof(gathered_prompt));
    if (!g->gathered) {
        g->n_sequences = 0;
        refuse(&why, REFUSAL_INTERNAL, "out of memory");
    } else if (reader_open(r, from_token, owns, wake, g->call, &g->reader) != STATUS_OK) {
        refuse(&why, REFUSAL_INTERNAL, "%s", status_message());
    }
    if (why.kind != REFUSAL_NONE) {
        if (owns)
            request_abort(r); /* nobody would read it */
        door_refuse(g->call, &why);
    } else if (!g->whole) {
        rpc_call_send_headers(g->call);
    }
}

static generation *generation_create(rpc_call *call, const answer_form *form, const answer_wish *want, bool whole)
{
    generation *g = calloc(1, sizeof *g);
    if (!g) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        return NULL;
    }
    *g = (generation){.call = call, .form = form, .want = *want, .whole = whole};
    rpc_call_set_state(call, g);
    return g;
}

void generation_begin(rpc_call *call, const request_wish *wish, const answer_form *form, const answer_wish *want, bool whole)
{
    request *r = NULL;
    refusal why = {0};
    generation *g = generation_create(call, form, want, whole);
    if (!g)
        return;
    if (requests_open(door_of(call)->all, wish, &r, &why) != REFUSAL_NONE) {
        door_refuse(call, &why);
        return;
    }
    generation_open(g, r, 0, true);
}

void generation_attach(rpc_call *call, const char *id, int from_token, const answer_wish *want)
{
    request *r = NULL;
    refusal why = {0};
    generation *g = generation_create(call, &inference_form, want, false);
    if (!g)
        return;
    if (requests_find(door_of(call)->all, id, &r, &why) != REFUSAL_NONE)
        door_refuse(call, &why);
    else
        generation_open(g, r, from_token, false);
}

void generation_send(generation *g, const ProtobufCMessage *message, bool last)
{
    if (protobuf_c_message_get_packed_size(message) > INT32_MAX)
        rpc_call_finish(g->call, RPC_RESOURCE_EXHAUSTED, "the answer is larger than 2 GiB: ask for fewer candidates");
    else if (last)
        rpc_call_reply(g->call, message);
    else
        rpc_call_send(g->call, message);
}

/* A whole number in the request's metadata; absent: *out as it was. */
static refusal_kind metadata_count(rpc_call *call, const char *key, int *out, refusal *why)
{
    char text[24], *end;
    if (!rpc_call_metadata(call, key, text, sizeof text))
        return REFUSAL_NONE;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < 0 || value > INT_MAX)
        return refuse(why, REFUSAL_BAD, "%s: \"%s\" is no whole number", key, text);
    *out = (int)value;
    return REFUSAL_NONE;
}

refusal_kind generation_caller(rpc_call *call, const char *session, wish_room *room, request_wish *wish, refusal *why)
{
    enum { LONGEST_LINGER_MS = 600000 };
    /* Up to the last colon counts, which for a session is all of it. */
    snprintf(room->client, sizeof room->client, session && *session ? "%.150s:" : "%s",
             session && *session ? session : rpc_call_peer(call));
    wish->client = room->client;
    if (wish->owner < 0 && metadata_count(call, "x-data-parallel-rank", &wish->owner, why))
        return why->kind;
    /* Whoever means to attach again after losing the connection says so; else the end of the call is the end of the request. */
    if (metadata_count(call, "x-linger-ms", &wish->linger_ms, why))
        return why->kind;
    if (wish->linger_ms > LONGEST_LINGER_MS)
        return refuse(why, REFUSAL_BAD, "x-linger-ms: %d, at most %d are allowed", wish->linger_ms, (int)LONGEST_LINGER_MS);
    return REFUSAL_NONE;
}
