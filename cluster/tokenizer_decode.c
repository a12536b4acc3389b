/* tokenizer_decode.c - ids to text, as they come.
 *
 *   id ─► token ─► step 0 ─► step 1 ─► ... ─► out          each step keeps what it cannot decide yet
 *
 * Up to a step that makes one text of all tokens (ByteLevel, Fuse) whole tokens go from step to step; behind it parts of that
 * text do, always whole characters. The end of the sequence runs through the steps once, in order. */
#include "cluster/tokenizer_parts.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static const char replacement_character[] = "\uFFFD";

typedef struct {
    bytes_writer held; /* bytes of a character, a run of byte tokens, or the possible beginning of a match */
    bytes_writer made; /* what the step passes on */
    size_t n_tokens;   /* seen so far */
    size_t stripped;   /* STRIP, fused: characters taken from the front; */
    bool begun;        /*               whether something else has come; */
    size_t trailing;   /*               characters at the end that may have to go */
} stage;

struct tokenizer_stream {
    const tokenizer *t; /* borrowed */
    bool skip_special;
    tokenizer_matcher *matcher;
    stage stages[TOKENIZER_STEPS_MAX];
    bytes_writer out;
    status error; /* of a pattern, inside a push */
};

static void feed(tokenizer_stream *s, int k, text_span text);

/* ---- bytes to characters ---- */

/* How many bytes at p belong together: a character (*whole), its beginning with nothing behind it (*open), or rubbish. */
static size_t character_at(const unsigned char *p, size_t left, bool *whole, bool *open)
{
    size_t n = p[0] < 0x80 ? 1 : p[0] < 0xC2 || p[0] > 0xF4 ? 0 : utf8_length(p[0]);
    unsigned char low = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
    unsigned char high = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
    size_t have = 1;
    for (; have < n && have < left && p[have] >= low && p[have] <= high; have++) {
        low = 0x80;
        high = 0xBF;
    }
    *whole = n > 0 && have == n;
    *open = !*whole && n > 0 && have == left;
    return have;
}

/* Appends the characters of `bytes` to `out`, rubbish as U+FFFD; returns how many bytes at the end are still open. */
static size_t put_characters(text_span bytes, bytes_writer *out)
{
    const unsigned char *p = (const unsigned char *)bytes.text;
    size_t from = 0;
    for (size_t at = 0; at < bytes.size;) {
        bool whole, open;
        size_t n = character_at(p + at, bytes.size - at, &whole, &open);
        if (!whole) {
            bytes_put(out, bytes.text + from, at - from);
            if (open)
                return bytes.size - at;
            bytes_put(out, replacement_character, sizeof replacement_character - 1);
            from = at + n;
        }
        at += n;
    }
    bytes_put(out, bytes.text + from, bytes.size - from);
    return 0;
}

static void keep_tail(bytes_writer *held, size_t n)
{
    if (n > 0 && n < held->size)
        memmove(held->data, held->data + held->size - n, n);
    held->size = n;
}

static text_span span_of(const bytes_writer *w)
{
    return (text_span){w->size ? (const char *)w->data : "", w->size};
}

static void feed_bytes(tokenizer_stream *s, int k, text_span token)
{
    stage *g = &s->stages[k];
    byte_level_decode(token, &g->held);
    bytes_reset(&g->made);
    keep_tail(&g->held, put_characters(span_of(&g->held), &g->made));
    if (g->made.size > 0)
        feed(s, k + 1, span_of(&g->made));
}

/* ---- byte tokens ---- */

/* The byte that "<0x41>" stands for; -1: another token. As Rust reads a number, a plus sign may stand in front. */
static int byte_of_token(text_span token)
{
    if (token.size != 6 || memcmp(token.text, "<0x", 3) != 0 || token.text[5] != '>')
        return -1;
    int value = 0;
    for (int i = 3; i < 5; i++) {
        unsigned char c = (unsigned char)token.text[i];
        if (i == 3 && c == '+')
            continue;
        if (!isxdigit(c))
            return -1;
        value = value * 16 + (isdigit(c) ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return value;
}

/* A run of byte tokens is text if all of it is; otherwise every byte of it is U+FFFD, so the run must end first. */
static void end_byte_run(tokenizer_stream *s, int k)
{
    stage *g = &s->stages[k];
    text_span run = span_of(&g->held);
    if (run.size == 0)
        return;
    if (utf8_check(run.text, run.size) == run.size)
        feed(s, k + 1, run);
    else
        for (size_t i = 0; i < run.size; i++)
            feed(s, k + 1, (text_span){replacement_character, sizeof replacement_character - 1});
    bytes_reset(&g->held);
}

static void feed_byte_fallback(tokenizer_stream *s, int k, text_span token)
{
    int byte = byte_of_token(token);
    if (byte >= 0) {
        unsigned char c = (unsigned char)byte;
        bytes_put(&s->stages[k].held, &c, 1);
        return;
    }
    end_byte_run(s, k);
    feed(s, k + 1, token);
}

/* ---- strip ---- */

static bool begins_with(const decode_step *step, text_span text)
{
    return text.size >= step->size && memcmp(text.text, step->text, step->size) == 0;
}

static text_span strip_front(const decode_step *step, text_span text, size_t most, size_t *n)
{
    for (*n = 0; *n < most && begins_with(step, text); ++*n)
        text = (text_span){text.text + step->size, text.size - step->size};
    return text;
}

static text_span strip_back(const decode_step *step, text_span text, size_t most, size_t *n)
{
    for (*n = 0; *n < most && text.size >= step->size; ++*n) {
        if (memcmp(text.text + text.size - step->size, step->text, step->size) != 0)
            break;
        text.size -= step->size;
    }
    return text;
}

static void put_times(bytes_writer *out, const decode_step *step, size_t n)
{
    for (size_t i = 0; i < n; i++)
        bytes_put(out, step->text, step->size);
}

static void feed_strip(tokenizer_stream *s, int k, text_span text)
{
    const decode_step *step = &s->t->decode[k];
    stage *g = &s->stages[k];
    size_t n;
    if (!step->fused) {
        text = strip_front(step, text, step->start, &n);
        feed(s, k + 1, strip_back(step, text, step->stop, &n));
        return;
    }
    if (!g->begun) {
        text = strip_front(step, text, step->start - g->stripped, &n);
        g->stripped += n;
        g->begun = text.size > 0;
    }
    if (text.size == 0)
        return;
    /* What was held back goes out as far as more than `stop` of the character stand at the end, or something else does. */
    text_span body = strip_back(step, text, step->stop, &n);
    size_t waiting = g->trailing + n;
    size_t keep = body.size > 0 ? n : waiting < step->stop ? waiting : step->stop;
    bytes_reset(&g->made);
    put_times(&g->made, step, body.size > 0 ? g->trailing : waiting - keep);
    bytes_put(&g->made, body.text, body.size);
    g->trailing = keep;
    if (g->made.size > 0)
        feed(s, k + 1, span_of(&g->made));
}

/* ---- replace ---- */

static status replace_all(const decode_step *step, tokenizer_matcher *m, text_span text, bytes_writer *out)
{
    pattern_pass pass = {.text = text.text, .size = text.size};
    size_t from = 0, start, end;
    while (text.size > 0) {
        bool found;
        TRY(pattern_next(step->pattern, m, &pass, &found, &start, &end));
        if (!found)
            break;
        bytes_put(out, text.text + from, start - from);
        bytes_put(out, step->text, step->size);
        from = end;
    }
    bytes_put(out, text.text + from, text.size - from);
    return STATUS_OK;
}

/* The end of a text that may be the beginning of the string. */
static size_t open_end(text_span text, text_span string)
{
    size_t n = string.size - 1 < text.size ? string.size - 1 : text.size;
    while (n > 0 && memcmp(text.text + text.size - n, string.text, n) != 0)
        n--;
    return n;
}

static void feed_replace(tokenizer_stream *s, int k, text_span text)
{
    const decode_step *step = &s->t->decode[k];
    stage *g = &s->stages[k];
    bytes_reset(&g->made);
    if (!step->fused) {
        status st = replace_all(step, s->matcher, text, &g->made);
        s->error = s->error ? s->error : st;
        feed(s, k + 1, span_of(&g->made));
        return;
    }
    bytes_put(&g->held, text.text, text.size);
    text_span all = span_of(&g->held), string = pattern_string(step->pattern);
    size_t from = 0;
    for (const char *hit; from < all.size && (hit = memmem(all.text + from, all.size - from, string.text, string.size));) {
        bytes_put(&g->made, all.text + from, (size_t)(hit - all.text) - from);
        bytes_put(&g->made, step->text, step->size);
        from = (size_t)(hit - all.text) + string.size;
    }
    text_span rest = {all.text + from, all.size - from};
    size_t open = open_end(rest, string);
    bytes_put(&g->made, rest.text, rest.size - open);
    keep_tail(&g->held, open);
    if (g->made.size > 0)
        feed(s, k + 1, span_of(&g->made));
}

/* ---- metaspace ---- */

/* The replacement character becomes a blank, but nothing in the first token. */
static void put_blanks(const decode_step *step, text_span token, bool first, bytes_writer *out)
{
    bool drop = first && step->prepend != PREPEND_NEVER;
    for (size_t at = 0; at < token.size;) {
        const char *hit = memmem(token.text + at, token.size - at, step->text, step->size);
        size_t to = hit ? (size_t)(hit - token.text) : token.size;
        bytes_put(out, token.text + at, to - at);
        if (hit && !drop)
            bytes_put(out, " ", 1);
        at = to + (hit ? step->size : 0);
    }
}

static void feed_metaspace(tokenizer_stream *s, int k, text_span token)
{
    stage *g = &s->stages[k];
    const decode_step *step = &s->t->decode[k];
    bytes_reset(&g->made);
    put_blanks(step, token, step->fused || g->n_tokens++ == 0, &g->made);
    feed(s, k + 1, span_of(&g->made));
}

/* ---- the way through ---- */

static void feed(tokenizer_stream *s, int k, text_span text)
{
    if (k == s->t->n_decode) {
        bytes_put(&s->out, text.text, text.size);
        return;
    }
    switch (s->t->decode[k].kind) {
    case DECODE_BYTES:
        feed_bytes(s, k, text);
        return;
    case DECODE_BYTE_FALLBACK:
        feed_byte_fallback(s, k, text);
        return;
    case DECODE_FUSE:
        feed(s, k + 1, text);
        return;
    case DECODE_STRIP:
        feed_strip(s, k, text);
        return;
    case DECODE_REPLACE:
        feed_replace(s, k, text);
        return;
    case DECODE_METASPACE:
        feed_metaspace(s, k, text);
        return;
    case DECODE_SPACES:
        if (s->stages[k].n_tokens++ > 0)
            bytes_put(&s->out, " ", 1);
        bytes_put(&s->out, text.text, text.size);
        return;
    }
}

/* No more comes in at step k. */
static void end_step(tokenizer_stream *s, int k)
{
    const decode_step *step = &s->t->decode[k];
    stage *g = &s->stages[k];
    if (step->kind == DECODE_BYTE_FALLBACK)
        end_byte_run(s, k);
    if (step->kind == DECODE_BYTES && g->held.size > 0) /* the beginning of a character that never came */
        feed(s, k + 1, (text_span){replacement_character, sizeof replacement_character - 1});
    if (step->kind == DECODE_REPLACE && step->fused && g->held.size > 0)
        feed(s, k + 1, span_of(&g->held));
    bytes_reset(&g->held);
}

static status finish(tokenizer_stream *s, const char **text, size_t *size)
{
    bool failed = s->out.failed;
    for (int k = 0; k < s->t->n_decode; k++)
        failed |= s->stages[k].held.failed || s->stages[k].made.failed;
    if (failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for a text");
    TRY(s->error);
    *text = s->out.size ? (const char *)s->out.data : "";
    *size = s->out.size;
    return STATUS_OK;
}

status tokenizer_stream_create(const tokenizer *t, bool skip_special, tokenizer_stream **out)
{
    tokenizer_stream *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory to decode token ids");
    s->t = t;
    s->skip_special = skip_special;
    status st = STATUS_OK;
    for (int k = 0; k < t->n_decode && st == STATUS_OK && !s->matcher; k++)
        if (t->decode[k].kind == DECODE_REPLACE)
            st = matcher_create(&s->matcher);
    if (st == STATUS_OK)
        *out = s;
    else
        tokenizer_stream_destroy(s);
    return st;
}

void tokenizer_stream_destroy(tokenizer_stream *s)
{
    if (!s)
        return;
    for (int k = 0; k < TOKENIZER_STEPS_MAX; k++) {
        bytes_clear(&s->stages[k].held);
        bytes_clear(&s->stages[k].made);
    }
    bytes_clear(&s->out);
    matcher_destroy(s->matcher);
    free(s);
}

void tokenizer_stream_reset(tokenizer_stream *s)
{
    for (int k = 0; k < s->t->n_decode; k++) {
        stage *g = &s->stages[k];
        bytes_reset(&g->held);
        bytes_reset(&g->made);
        *g = (stage){.held = g->held, .made = g->made};
    }
    bytes_reset(&s->out);
    s->error = STATUS_OK;
}

status tokenizer_stream_push(tokenizer_stream *s, int32_t id, const char **text, size_t *size)
{
    bytes_reset(&s->out);
    if (id >= 0 && id < s->t->n_ids && s->t->tokens[id].known && !(s->skip_special && s->t->tokens[id].skipped)) {
        const token_entry *e = &s->t->tokens[id];
        feed(s, 0, (text_span){e->text_size ? (const char *)s->t->texts.data + e->text : "", e->text_size});
    }
    return finish(s, text, size);
}

status tokenizer_stream_flush(tokenizer_stream *s, const char **text, size_t *size)
{
    bytes_reset(&s->out);
    for (int k = 0; k < s->t->n_decode; k++)
        end_step(s, k);
    status st = finish(s, text, size);
    bytes_writer out = s->out; /* the text lives on through the reset */
    tokenizer_stream_reset(s);
    s->out = out;
    return st;
}

/* ---- one token by itself ---- */

static status alone_step(const decode_step *step, tokenizer_matcher *m, text_span in, bytes_writer *out)
{
    size_t n;
    switch (step->kind) {
    case DECODE_BYTES:
        byte_level_decode(in, out);
        return STATUS_OK;
    case DECODE_REPLACE:
        return replace_all(step, m, in, out);
    case DECODE_METASPACE:
        put_blanks(step, in, false, out);
        return STATUS_OK;
    case DECODE_STRIP:
        if (!step->fused) {
            in = strip_front(step, in, step->start, &n);
            in = strip_back(step, in, step->stop, &n);
        }
        break;
    default:
        break;
    }
    bytes_put(out, in.text, in.size);
    return STATUS_OK;
}

status decode_alone(const decode_step *steps, int n_steps, tokenizer_matcher *m, text_span token, bytes_writer *out)
{
    if (n_steps == 1 && steps[0].kind != DECODE_BYTE_FALLBACK)
        return alone_step(&steps[0], m, token, out);
    bytes_writer rooms[2] = {{0}, {0}};
    status st = STATUS_OK;
    int room = 0;
    for (int k = 0; k < n_steps && st == STATUS_OK; k++, room = !room) {
        int byte = steps[k].kind == DECODE_BYTE_FALLBACK ? byte_of_token(token) : -1;
        bytes_reset(&rooms[room]);
        unsigned char c = (unsigned char)byte;
        if (byte >= 0x80) { /* a part of a character: the steps behind cannot read it */
            bytes_put(out, &c, 1);
            goto out;
        }
        if (byte >= 0)
            bytes_put(&rooms[room], &c, 1);
        else
            st = alone_step(&steps[k], m, token, &rooms[room]);
        out->failed |= rooms[room].failed;
        token = span_of(&rooms[room]);
    }
    if (st == STATUS_OK)
        bytes_put(out, token.text, token.size);
out:
    bytes_clear(&rooms[0]);
    bytes_clear(&rooms[1]);
    return st;
}
