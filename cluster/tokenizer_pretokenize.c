/* tokenizer_pretokenize.c - cuts a text into the words that the model sees. */
#include "cluster/tokenizer_parts.h"

#include <string.h>

/* ---- what becomes of matches ----
 * A step goes over a piece and reports its parts in order, each a match or not. How matches are joined with what stands beside
 * them needs one part of memory. */

typedef struct {
    split_behavior behavior;
    bool invert;
    text_piece whole;
    text_pieces *out;
    size_t start, end; /* the part that waits for what comes next */
    bool waiting, last_match;
} cutter;

static void emit(cutter *c, size_t start, size_t end)
{
    size_t origin = c->whole.origin > start ? c->whole.origin - start : 0;
    text_pieces_add(c->out, (text_piece){.start = c->whole.start + (uint32_t)start,
                                         .end = c->whole.start + (uint32_t)end,
                                         .origin = (uint32_t)(origin < end - start ? origin : end - start),
                                         .id = -1});
}

static bool joins(const cutter *c, bool match)
{
    if (!c->waiting)
        return false;
    switch (c->behavior) {
    case SPLIT_CONTIGUOUS:
        return match == c->last_match;
    case SPLIT_MERGED_WITH_PREVIOUS:
        return match && !c->last_match;
    case SPLIT_MERGED_WITH_NEXT:
        return !match && c->last_match;
    default:
        return false;
    }
}

static void part(cutter *c, size_t start, size_t end, bool match)
{
    match ^= c->invert;
    if (c->behavior == SPLIT_ISOLATED || c->behavior == SPLIT_REMOVED) {
        if (c->behavior == SPLIT_ISOLATED || !match)
            emit(c, start, end);
        return;
    }
    if (joins(c, match)) {
        c->end = end;
    } else {
        if (c->waiting)
            emit(c, c->start, c->end);
        c->start = start;
        c->end = end;
        c->waiting = true;
    }
    c->last_match = match;
}

static void finish(cutter *c)
{
    if (c->waiting)
        emit(c, c->start, c->end);
    c->waiting = c->last_match = false;
}

/* ---- steps that only cut ---- */

static status cut_by_pattern(const cut_step *step, tokenizer_matcher *m, cutter *c, const char *text, size_t size)
{
    pattern_pass pass = {.text = text, .size = size};
    size_t from = 0, start, end;
    bool found;
    for (;;) {
        TRY(pattern_next(step->pattern, m, &pass, &found, &start, &end));
        if (!found)
            break;
        if (from != start)
            part(c, from, start, false);
        part(c, start, end, true);
        from = end;
    }
    if (from != size)
        part(c, from, size, false);
    return STATUS_OK;
}

/* Every character for which `is` holds is a match by itself. */
static void cut_by_character(bool (*is)(uint32_t), cutter *c, const char *text, size_t size)
{
    size_t from = 0;
    for (size_t at = 0; at < size;) {
        uint32_t code_point;
        size_t length = utf8_get(text + at, &code_point);
        if (is(code_point)) {
            if (from < at)
                part(c, from, at, false);
            part(c, at, at + length, true);
            from = at + length;
        }
        at += length;
    }
    if (from < size)
        part(c, from, size, false);
}

/* Runs of characters of words and runs of others; white space goes. */
static void cut_words(cutter *c, const char *text, size_t size)
{
    size_t from = 0;
    int kind = -1; /* 0: white space, 1: word, 2: other */
    for (size_t at = 0; at < size;) {
        uint32_t code_point;
        size_t length = utf8_get(text + at, &code_point);
        int next = unicode_is_word(code_point) ? 1 : unicode_is_white_space(code_point) ? 0 : 2;
        if (next != kind) {
            if (kind > 0)
                emit(c, from, at);
            from = at;
            kind = next;
        }
        at += length;
    }
    if (kind > 0)
        emit(c, from, size);
}

static status cut_piece(const cut_step *step, tokenizer_matcher *m, cutter *c, const char *text, size_t size)
{
    switch (step->kind) {
    case CUT_PATTERN:
        return cut_by_pattern(step, m, c, text, size);
    case CUT_NUMBERS:
        cut_by_character(unicode_is_number, c, text, size);
        break;
    case CUT_PUNCTUATION:
        cut_by_character(unicode_is_punctuation, c, text, size);
        break;
    case CUT_WHITE_SPACE:
        cut_by_character(unicode_is_white_space, c, text, size);
        break;
    default:
        cut_words(c, text, size);
    }
    return STATUS_OK;
}

static status cut_only(const cut_step *step, tokenizer_matcher *m, text_work *work)
{
    cutter c = {.behavior = step->behavior, .invert = step->invert, .out = &work->next};
    for (size_t i = 0; i < work->pieces.n; i++) {
        c.whole = work->pieces.items[i];
        if (c.whole.id >= 0) {
            text_pieces_add(&work->next, c.whole);
            continue;
        }
        TRY(cut_piece(step, m, &c, work->text.text + c.whole.start, c.whole.end - c.whole.start));
        finish(&c);
    }
    return STATUS_OK;
}

/* ---- steps that change bytes ---- */

static bool starts_with(text_span text, const char *with, size_t size)
{
    return text.size >= size && memcmp(text.text, with, size) == 0;
}

/* Blanks to the replacement, one put in front where the scheme says so. The bytes written belong to one piece. */
static void metaspace(const cut_step *step, text_span piece, bool first, bytes_writer *out)
{
    bool begins = starts_with(piece, " ", 1) || starts_with(piece, step->replacement, step->replacement_size);
    if (!begins && (step->prepend == PREPEND_ALWAYS || (step->prepend == PREPEND_FIRST && first)))
        bytes_put(out, step->replacement, step->replacement_size);
    for (size_t at = 0; at < piece.size;) {
        const char *blank = memchr(piece.text + at, ' ', piece.size - at);
        size_t to = blank ? (size_t)(blank - piece.text) : piece.size;
        bytes_put(out, piece.text + at, to - at);
        if (blank)
            bytes_put(out, step->replacement, step->replacement_size);
        at = to + (blank != NULL);
    }
}

/* Cuts before each replacement character (MergedWithNext; one before another stands alone, as does one at the end). */
static void cut_metaspace(const cut_step *step, text_piece whole, const char *text, text_pieces *out)
{
    cutter c = {.behavior = SPLIT_MERGED_WITH_NEXT, .whole = whole, .out = out};
    size_t size = whole.end - whole.start, from = 0;
    while (from < size) {
        const char *hit = memmem(text + from, size - from, step->replacement, step->replacement_size);
        size_t to = hit ? (size_t)(hit - text) : size;
        if (from < to)
            part(&c, from, to, false);
        if (hit)
            part(&c, to, to + step->replacement_size, true);
        from = to + (hit ? step->replacement_size : 0);
    }
    finish(&c);
}

static void change_piece(const cut_step *step, text_span piece, bool first, bytes_writer *out)
{
    if (step->kind == CUT_METASPACE) {
        metaspace(step, piece, first, out);
    } else if (step->kind == CUT_PREFIX) {
        if (!starts_with(piece, " ", 1))
            bytes_put(out, " ", 1);
        bytes_put(out, piece.text, piece.size);
    } else {
        for (size_t i = 0; i < piece.size; i++)
            utf8_put(out, byte_level_char((unsigned char)piece.text[i]));
    }
}

static status cut_changing(const cut_step *step, text_work *work)
{
    bytes_writer *out = &work->buffers[work->writing];
    bytes_reset(out);
    for (size_t i = 0; i < work->pieces.n; i++) {
        text_piece p = work->pieces.items[i];
        size_t start = out->size;
        if (p.id < 0)
            change_piece(step, (text_span){work->text.text + p.start, p.end - p.start}, p.origin > 0, out);
        if (out->failed)
            return status_fail(STATUS_NO_MEMORY, "no memory to cut a text into words");
        if (out->size > TOKENIZER_TEXT_MAX)
            return status_fail(STATUS_BAD_INPUT, "a text grows too long in the tokenizer's pre-tokenizer");
        const char *text = p.id < 0 ? (const char *)out->data + start : "";
        uint32_t first = p.id < 0 ? (uint32_t)utf8_length((unsigned char)*text) : 0;
        text_piece changed = {.start = (uint32_t)start, .end = (uint32_t)out->size, .origin = p.origin ? first : 0, .id = p.id};
        if (p.id < 0 && step->kind == CUT_METASPACE && step->split)
            cut_metaspace(step, changed, text, &work->next);
        else
            text_pieces_add(&work->next, changed);
    }
    work->text = (text_span){(const char *)out->data, out->size};
    work->writing = !work->writing;
    return STATUS_OK;
}

status cut_text(const cut_step *step, tokenizer_matcher *m, text_work *work)
{
    work->next.n = 0;
    work->next.failed = false;
    if (step->kind == CUT_METASPACE || step->kind == CUT_PREFIX || step->kind == CUT_BYTE_LEVEL)
        TRY(cut_changing(step, work));
    else
        TRY(cut_only(step, m, work));
    if (work->next.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for the words of a text");
    text_pieces swapped = work->pieces;
    work->pieces = work->next;
    work->next = swapped;
    return STATUS_OK;
}
