/* tokenizer_normalize.c - the normalizer, and what is known about characters (utf8proc's tables, put right by ours). */
#include "cluster/tokenizer_parts.h"
#include "cluster/tokenizer_unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* ---- classes of characters ---- */

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static bool in_ranges(const uint32_t (*ranges)[2], size_t n, uint32_t c)
{
    size_t low = 0;
    while (low < n) { /* the first range that does not end before c */
        size_t middle = (low + n) / 2;
        if (ranges[middle][1] < c)
            low = middle + 1;
        else
            n = middle;
    }
    return ranges[low][0] <= c && c <= ranges[low][1];
}
/* The last range of a list is looked at even if c lies behind it, never one past it. */
#define IN(ranges, c) ((c) <= (ranges)[COUNT(ranges) - 1][1] && in_ranges(ranges, COUNT(ranges), c))

bool unicode_is_white_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool unicode_is_number(uint32_t c)
{
    if (c < 0x80)
        return c >= '0' && c <= '9';
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);
    return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO || IN(unicode_more_numbers, c);
}

bool unicode_is_punctuation(uint32_t c)
{
    if (c < 0x80)
        return c > ' ' && c < 0x7F && !(c >= '0' && c <= '9') && !((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);
    if (k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO)
        return !IN(unicode_no_punctuation, c);
    return IN(unicode_more_punctuation, c);
}

bool unicode_is_word(uint32_t c)
{
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC || IN(unicode_more_word, c);
}

/* ---- NFC, NFD, NFKC, NFKD ----
 * Code points are decomposed one by one, marks sorted by class and then composed, a stretch at a time: from an ASCII character,
 * which nothing before it can change, to the next. utf8proc's own function for whole texts sorts marks by exchange, which takes
 * quadratic time over a long run of them. */

static status grow_room(normalize_room *room, size_t need)
{
    if (need <= room->capacity)
        return STATUS_OK;
    size_t capacity = room->capacity ? room->capacity : 256;
    while (capacity < need)
        capacity *= 2;
    int32_t *points = realloc(room->points, 2 * capacity * sizeof *points);
    if (points)
        room->points = points;
    unsigned char *classes = points ? realloc(room->classes, capacity) : NULL;
    if (classes)
        room->classes = classes;
    if (!points || !classes)
        return status_fail(STATUS_NO_MEMORY, "no memory to normalise a text");
    room->capacity = capacity;
    return STATUS_OK;
}

/* Sorts n marks (class not 0) by class, equal ones in their order: by counting, in linear time. */
static void sort_marks(int32_t *points, unsigned char *classes, int32_t *room, size_t n)
{
    size_t place[257] = {0};
    for (size_t i = 0; i < n; i++)
        place[classes[i] + 1]++;
    for (int c = 0; c < 256; c++)
        place[c + 1] += place[c];
    for (size_t i = 0; i < n; i++)
        room[place[classes[i]]++] = points[i];
    memcpy(points, room, n * sizeof *points);
}

/* Brings the marks of a decomposed stretch into canonical order. */
static void order_marks(normalize_room *room, size_t n)
{
    for (size_t i = 0; i < n;) {
        if (room->classes[i] == 0) {
            i++;
            continue;
        }
        size_t from = i;
        bool sorted = true;
        for (i++; i < n && room->classes[i] != 0; i++)
            sorted &= room->classes[i - 1] <= room->classes[i];
        if (!sorted)
            sort_marks(room->points + from, room->classes + from, room->points + room->capacity, i - from);
    }
}

static bool is_unknown(uint32_t c)
{
    return c >= unicode_normal_unknown[0][0] && IN(unicode_normal_unknown, c);
}

/* Decomposes the characters from *at up to the next ASCII character behind the first, or to one that is unknown. */
static status decompose(normalize_room *room, text_span text, size_t *at, int options, size_t *n)
{
    size_t from = *at;
    while (*at < text.size && (*at == from || (unsigned char)text.text[*at] >= 0x80)) {
        uint32_t c;
        size_t length = utf8_get(text.text + *at, &c);
        if (is_unknown(c))
            break;
        TRY(grow_room(room, *n + 32)); /* the longest decomposition has 18 */
        int last_class = 0;
        utf8proc_ssize_t more =
            utf8proc_decompose_char((utf8proc_int32_t)c, room->points + *n, 32, (utf8proc_option_t)options, &last_class);
        if (more < 0 || more > 32)
            return status_fail(STATUS_BAD_INPUT, "a text cannot be normalised (%s)", utf8proc_errmsg(more));
        for (size_t i = 0; i < (size_t)more; i++)
            room->classes[*n + i] = (unsigned char)utf8proc_get_property(room->points[*n + i])->combining_class;
        *n += (size_t)more;
        *at += length;
    }
    return STATUS_OK;
}

static status normalize_stretch(normalize_room *room, text_span text, size_t *at, int options, bytes_writer *out)
{
    size_t n = 0;
    TRY(decompose(room, text, at, options, &n));
    order_marks(room, n);
    if (n > 0 && (options & UTF8PROC_COMPOSE)) {
        utf8proc_ssize_t left = utf8proc_normalize_utf32(room->points, (utf8proc_ssize_t)n, (utf8proc_option_t)options);
        if (left < 0)
            return status_fail(STATUS_BAD_INPUT, "a text cannot be normalised (%s)", utf8proc_errmsg(left));
        n = (size_t)left;
    }
    for (size_t i = 0; i < n; i++)
        utf8_put(out, (uint32_t)room->points[i]);
    uint32_t c;
    if (*at < text.size &&
        (unsigned char)text.text[*at] >= 0x80) { /* an unknown character stands for itself, between two stretches */
        size_t length = utf8_get(text.text + *at, &c);
        bytes_put(out, text.text + *at, length);
        *at += length;
    }
    return STATUS_OK;
}

/* Bytes from the beginning that a normal form leaves alone. */
static size_t plain_length(text_span text, bool nfc)
{
    unsigned char limit = nfc ? 0xCC : 0x80; /* below U+0300 everything is NFC and combines with nothing before it */
    size_t at = 0, starter = 0;
    for (; at < text.size; at++) {
        unsigned char c = (unsigned char)text.text[at];
        if (c >= limit)
            break;
        if ((c & 0xC0) != 0x80)
            starter = at;
    }
    return at == text.size ? at : starter; /* the last one may combine with what follows */
}

static status normalize_unicode(normalize_kind kind, normalize_room *room, text_span text, bytes_writer *out)
{
    int options = UTF8PROC_STABLE;
    options |= kind == NORMALIZE_NFC || kind == NORMALIZE_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    options |= kind == NORMALIZE_NFKC || kind == NORMALIZE_NFKD ? UTF8PROC_COMPAT : 0;
    size_t at = 0;
    while (at < text.size) {
        text_span rest = {text.text + at, text.size - at};
        size_t plain = plain_length(rest, kind == NORMALIZE_NFC);
        bytes_put(out, rest.text, plain);
        at += plain;
        if (at < text.size)
            TRY(normalize_stretch(room, text, &at, options, out));
    }
    return STATUS_OK;
}

/* ---- the other steps ---- */

static uint32_t lower(uint32_t c)
{
    size_t low = 0, n = COUNT(unicode_lower);
    while (low < n) {
        size_t middle = (low + n) / 2;
        if (unicode_lower[middle][0] < c)
            low = middle + 1;
        else
            n = middle;
    }
    if (low < COUNT(unicode_lower) && unicode_lower[low][0] == c)
        return unicode_lower[low][1];
    return (uint32_t)utf8proc_tolower((utf8proc_int32_t)c);
}

static void lowercase(text_span text, bytes_writer *out)
{
    for (size_t at = 0; at < text.size;) {
        uint32_t c;
        at += utf8_get(text.text + at, &c);
        if (c == 0x130) {
            utf8_put(out, 'i');
            utf8_put(out, 0x307);
        } else {
            utf8_put(out, lower(c));
        }
    }
}

static text_span strip(const normalize_step *step, text_span text, size_t *origin)
{
    uint32_t c;
    size_t from = 0, to = text.size;
    while (step->left && from < to) {
        size_t length = utf8_get(text.text + from, &c);
        if (!unicode_is_white_space(c))
            break;
        from += length;
    }
    while (step->right && to > from) {
        size_t last = to - 1;
        while ((text.text[last] & 0xC0) == 0x80)
            last--;
        utf8_get(text.text + last, &c);
        if (!unicode_is_white_space(c))
            break;
        to = last;
    }
    *origin = *origin > from ? *origin - from : 0;
    return (text_span){text.text + from, to - from};
}

/* *origin: bytes that stay count if they were counted; what is put in counts like the last byte of what it replaces. */
static status replace(const normalize_step *step, tokenizer_matcher *m, text_span text, size_t *origin, bytes_writer *out)
{
    pattern_pass pass = {.text = text.text, .size = text.size};
    size_t kept = 0, from = 0, start, end;
    bool found, leading = *origin > 0;
    for (;;) {
        TRY(pattern_next(step->pattern, m, &pass, &found, &start, &end));
        size_t to = found ? start : text.size;
        bytes_put(out, text.text + from, to - from);
        if (leading && from < *origin)
            kept += (to < *origin ? to : *origin) - from;
        if (!found)
            break;
        leading = leading && to <= *origin && end <= *origin;
        if (leading)
            kept += step->size;
        bytes_put(out, step->text, step->size);
        from = end;
        if (out->size > TOKENIZER_TEXT_MAX)
            return status_fail(STATUS_BAD_INPUT, "a text grows too long in the tokenizer's normalizer");
    }
    *origin = kept;
    return STATUS_OK;
}

static size_t first_length(text_span text)
{
    return text.size ? utf8_length((unsigned char)text.text[0]) : 0;
}

static status normalize_step_run(const normalize_step *step, tokenizer_matcher *m, normalize_room *room, text_span text,
                                 size_t *origin, bytes_writer *out)
{
    switch (step->kind) {
    case NORMALIZE_PREPEND:
        bytes_put(out, step->text, step->size);
        bytes_put(out, text.text, text.size);
        *origin = *origin ? *origin + step->size : 0;
        return STATUS_OK;
    case NORMALIZE_REPLACE:
        return replace(step, m, text, origin, out);
    case NORMALIZE_LOWERCASE:
        lowercase(text, out);
        break;
    default:
        TRY(normalize_unicode(step->kind, room, text, out));
    }
    *origin = *origin ? first_length((text_span){(const char *)out->data, out->size}) : 0;
    return STATUS_OK;
}

status normalize_text(const normalize_step *steps, int n_steps, tokenizer_matcher *m, normalize_room *room, text_span text,
                      size_t *origin, text_span *out)
{
    int reading = -1; /* which of the two buffers holds the text */
    for (int i = 0; i < n_steps && text.size > 0; i++) {
        if (steps[i].kind == NORMALIZE_STRIP) {
            text = strip(&steps[i], text, origin);
            continue;
        }
        if (steps[i].kind == NORMALIZE_NFC && plain_length(text, true) == text.size)
            continue;
        reading = reading == 0;
        bytes_writer *to = &room->text[reading];
        bytes_reset(to);
        TRY(normalize_step_run(&steps[i], m, room, text, origin, to));
        if (to->failed)
            return status_fail(STATUS_NO_MEMORY, "no memory to normalise a text");
        text = (text_span){(const char *)to->data, to->size};
        if (text.size > TOKENIZER_TEXT_MAX)
            return status_fail(STATUS_BAD_INPUT, "a text grows too long in the tokenizer's normalizer");
    }
    *out = text;
    return STATUS_OK;
}

void normalize_room_clear(normalize_room *room)
{
    bytes_clear(&room->text[0]);
    bytes_clear(&room->text[1]);
    free(room->points);
    free(room->classes);
    *room = (normalize_room){0};
}
