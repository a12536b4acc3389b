#include "cluster/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

/* ---- UTF-8 ---- */

/* The length of the character at p, 0 if none stands there. */
static size_t check_one(const unsigned char *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    if (p[0] < 0xC2 || p[0] > 0xF4)
        return 0;
    size_t n = utf8_length(p[0]);
    if (n > left || (p[1] & 0xC0) != 0x80)
        return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) || (p[0] == 0xF0 && p[1] < 0x90) ||
        (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xC0) != 0x80)
            return 0;
    return n;
}

size_t utf8_check(const char *text, size_t size)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t at = 0;
    while (at < size) {
        uint64_t eight;
        if (size - at >= sizeof eight) {
            memcpy(&eight, p + at, sizeof eight);
            if (!(eight & 0x8080808080808080u)) {
                at += sizeof eight;
                continue;
            }
        }
        size_t n = check_one(p + at, size - at);
        if (n == 0)
            return at;
        at += n;
    }
    return size;
}

size_t utf8_length(unsigned char first_byte)
{
    return first_byte < 0xC0 ? 1 : first_byte < 0xE0 ? 2 : first_byte < 0xF0 ? 3 : 4;
}

size_t utf8_get(const char *text, uint32_t *code_point)
{
    const unsigned char *p = (const unsigned char *)text;
    if (p[0] < 0x80) {
        *code_point = p[0];
        return 1;
    }
    size_t n = utf8_length(p[0]);
    uint32_t c = p[0] & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++)
        c = c << 6 | (p[i] & 0x3F);
    *code_point = c;
    return n;
}

size_t utf8_set(char to[4], uint32_t c)
{
    if (c < 0x80) {
        to[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        to[i] = (char)(0x80 | (c & 0x3F));
    to[0] = (char)((0xF00u >> n & 0xFF) | c);
    return n;
}

void utf8_put(bytes_writer *out, uint32_t code_point)
{
    char to[4];
    bytes_put(out, to, utf8_set(to, code_point));
}

/* ---- byte-level characters ---- */

static bool stands_for_itself(uint32_t c)
{
    return (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xFF && c != 0xAD);
}

/* The bytes that do not, in order, are U+0100, U+0101, ..: 0x00-0x20, 0x7F-0xA0, 0xAD. */
uint32_t byte_level_char(unsigned char byte)
{
    if (stands_for_itself(byte))
        return byte;
    return 0x100u + (byte <= 0x20 ? byte : byte == 0xAD ? 67u : byte - 0x7Fu + 33u);
}

int byte_level_byte(uint32_t c)
{
    if (c < 0x100)
        return stands_for_itself(c) ? (int)c : -1;
    uint32_t i = c - 0x100;
    return i <= 0x20 ? (int)i : i < 67 ? (int)(i - 33 + 0x7F) : i == 67 ? 0xAD : -1;
}

void byte_level_decode(text_span token, bytes_writer *out)
{
    char *to = token.size ? bytes_extend(out, token.size) : NULL;
    if (!to)
        return;
    size_t n = 0;
    for (size_t at = 0; at < token.size;) {
        uint32_t c;
        at += utf8_get(token.text + at, &c);
        int byte = byte_level_byte(c);
        if (byte < 0) {
            memcpy(to, token.text, token.size);
            return;
        }
        to[n++] = (char)byte;
    }
    out->size -= token.size - n;
}

/* ---- pieces ---- */

void text_pieces_add(text_pieces *p, text_piece piece)
{
    if (piece.start == piece.end && piece.id < 0)
        return;
    if (p->n == p->capacity) {
        size_t wanted = p->capacity ? 2 * p->capacity : 256;
        text_piece *grown = realloc(p->items, wanted * sizeof *grown);
        if (!grown) {
            p->failed = true;
            return;
        }
        p->items = grown;
        p->capacity = wanted;
    }
    p->items[p->n++] = piece;
}

void text_pieces_clear(text_pieces *p)
{
    free(p->items);
    *p = (text_pieces){0};
}

/* ---- strings to ids ---- */

static uint32_t hash_string(text_span s)
{
    uint64_t h = 0x9E3779B97F4A7C15u ^ s.size;
    size_t at = 0;
    for (; s.size - at >= 8; at += 8) {
        uint64_t x;
        memcpy(&x, s.text + at, 8);
        h = (h ^ x) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    uint64_t x = 0;
    if (s.size > at)
        memcpy(&x, s.text + at, s.size - at);
    h = (h ^ x) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    return (uint32_t)(h * 0xD6E8FEB86659FD93u >> 32);
}

static size_t find_place(const string_index *index, text_span s, uint32_t hash)
{
    size_t mask = index->capacity - 1;
    for (size_t i = hash & mask;; i = (i + 1) & mask) {
        const string_entry *e = &index->entries[i];
        if (e->id < 0 ||
            (e->hash == hash && e->size == s.size && (s.size == 0 || memcmp(index->bytes.data + e->at, s.text, s.size) == 0)))
            return i;
    }
}

status string_index_reserve(string_index *index, size_t n)
{
    size_t capacity = 16;
    while (capacity < 2 * n)
        capacity *= 2;
    if (capacity <= index->capacity)
        return STATUS_OK;
    string_entry *entries = malloc(capacity * sizeof *entries);
    if (!entries)
        return status_fail(STATUS_NO_MEMORY, "no memory for an index of %zu tokens", n);
    for (size_t i = 0; i < capacity; i++)
        entries[i] = (string_entry){.id = -1};
    for (size_t i = 0; i < index->capacity; i++) {
        if (index->entries[i].id < 0)
            continue;
        size_t at = index->entries[i].hash & (capacity - 1);
        while (entries[at].id >= 0)
            at = (at + 1) & (capacity - 1);
        entries[at] = index->entries[i];
    }
    free(index->entries);
    index->entries = entries;
    index->capacity = capacity;
    return STATUS_OK;
}

status string_index_set(string_index *index, text_span s, int32_t id, bool *added)
{
    TRY(string_index_reserve(index, index->n + 1));
    uint32_t hash = hash_string(s);
    string_entry *e = &index->entries[find_place(index, s, hash)];
    if (added)
        *added = e->id < 0;
    if (e->id < 0) {
        size_t at = index->bytes.size;
        bytes_put(&index->bytes, s.text, s.size);
        if (index->bytes.failed)
            return status_fail(STATUS_NO_MEMORY, "no memory for %zu tokens", index->n);
        *e = (string_entry){.hash = hash, .size = (uint32_t)s.size, .at = at};
        index->n++;
    }
    e->id = id;
    return STATUS_OK;
}

int32_t string_index_find(const string_index *index, text_span s)
{
    if (index->capacity == 0 || s.size > UINT32_MAX)
        return -1;
    return index->entries[find_place(index, s, hash_string(s))].id;
}

void string_index_clear(string_index *index)
{
    bytes_clear(&index->bytes);
    free(index->entries);
    *index = (string_index){0};
}
