/* tokenizer_added.c - added tokens in a text: at every place the longest one that begins there, by a trie over bytes. */
#include "cluster/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

/* ---- the trie ---- */

static status add_node(added_trie *trie, unsigned char byte, uint32_t sibling, uint32_t *out)
{
    if (trie->n == trie->capacity) {
        size_t wanted = trie->capacity ? 2 * trie->capacity : 256;
        trie_node *grown = wanted < UINT32_MAX ? realloc(trie->nodes, wanted * sizeof *grown) : NULL;
        if (!grown)
            return status_fail(STATUS_NO_MEMORY, "no memory for added tokens");
        trie->nodes = grown;
        trie->capacity = wanted;
        if (trie->n == 0)
            trie->nodes[trie->n++] = (trie_node){.token = -1}; /* node 0 means none */
    }
    *out = (uint32_t)trie->n;
    trie->nodes[trie->n++] = (trie_node){.byte = byte, .sibling = sibling, .token = -1};
    return STATUS_OK;
}

static uint32_t find_child(const added_trie *trie, uint32_t node, unsigned char byte)
{
    uint32_t child = trie->nodes[node].child;
    while (child && trie->nodes[child].byte != byte)
        child = trie->nodes[child].sibling;
    return child;
}

status added_trie_insert(added_trie *trie, const char *where, text_span pattern, int32_t token)
{
    if (pattern.size == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: an added token is empty once it is normalised", where);
    unsigned char first = (unsigned char)pattern.text[0];
    if (!trie->root[first]) {
        TRY(add_node(trie, first, 0, &trie->root[first]));
        trie->n_first++;
        trie->first = first;
    }
    uint32_t node = trie->root[first];
    for (size_t i = 1; i < pattern.size; i++) {
        unsigned char byte = (unsigned char)pattern.text[i];
        uint32_t child = find_child(trie, node, byte);
        if (!child) {
            TRY(add_node(trie, byte, trie->nodes[node].child, &child));
            trie->nodes[node].child = child;
        }
        node = child;
    }
    if (trie->nodes[node].token >= 0)
        return status_fail(STATUS_BAD_INPUT, "%s: two added tokens are the same once they are normalised", where);
    trie->nodes[node].token = token;
    return STATUS_OK;
}

void added_trie_clear(added_trie *trie)
{
    free(trie->nodes);
    *trie = (added_trie){0};
}

/* ---- finding ---- */

/* The longest token at `at`: its index and *end; -1: none. */
static int32_t longest_at(const added_trie *trie, text_span text, size_t at, size_t *end)
{
    int32_t token = -1;
    uint32_t node = trie->root[(unsigned char)text.text[at++]];
    while (node) {
        if (trie->nodes[node].token >= 0) {
            token = trie->nodes[node].token;
            *end = at;
        }
        if (at == text.size)
            break;
        node = find_child(trie, node, (unsigned char)text.text[at++]);
    }
    return token;
}

static int32_t next_token(const added_trie *trie, text_span text, size_t *start, size_t *end)
{
    for (size_t at = *start; at < text.size; at++) {
        if (trie->n_first == 1) {
            const char *hit = memchr(text.text + at, trie->first, text.size - at);
            if (!hit)
                return -1;
            at = (size_t)(hit - text.text);
        }
        if (!trie->root[(unsigned char)text.text[at]])
            continue;
        int32_t token = longest_at(trie, text, at, end);
        if (token >= 0) {
            *start = at;
            return token;
        }
    }
    return -1;
}

static size_t before(const char *text, size_t at, uint32_t *c)
{
    do
        at--;
    while ((text[at] & 0xC0) == 0x80);
    utf8_get(text + at, c);
    return at;
}

static bool is_single_word(text_span text, size_t start, size_t end)
{
    uint32_t c;
    if (start > 0) {
        before(text.text, start, &c);
        if (unicode_is_word(c))
            return false;
    }
    if (end < text.size) {
        utf8_get(text.text + end, &c);
        if (unicode_is_word(c))
            return false;
    }
    return true;
}

/* Takes white space on the sides where the token says so, but none that another token has taken. */
static void widen(const added_token *token, text_span text, size_t from, size_t *start, size_t *end)
{
    uint32_t c;
    while (token->lstrip && *start > from) {
        size_t at = before(text.text, *start, &c);
        if (!unicode_is_white_space(c))
            break;
        *start = at;
    }
    while (token->rstrip && *end < text.size) {
        size_t length = utf8_get(text.text + *end, &c);
        if (!unicode_is_white_space(c))
            break;
        *end += length;
    }
}

static text_piece sub_piece(text_piece whole, size_t start, size_t end, int32_t id)
{
    size_t origin = whole.origin > start ? whole.origin - start : 0;
    return (text_piece){.start = whole.start + (uint32_t)start,
                        .end = whole.start + (uint32_t)end,
                        .origin = (uint32_t)(origin < end - start ? origin : end - start),
                        .id = id};
}

void added_cut(const added_trie *trie, const added_token *tokens, const char *text, text_piece piece, text_pieces *out)
{
    text_span span = {text + piece.start, piece.end - piece.start};
    size_t from = 0, at = 0, end = 0;
    while (trie->n_first > 0) {
        size_t start = at;
        int32_t found = next_token(trie, span, &start, &end);
        if (found < 0)
            break;
        const added_token *token = &tokens[found];
        at = end; /* what the token itself covers is not searched again, whether it counts or not */
        if (token->single_word && !is_single_word(span, start, end))
            continue;
        widen(token, span, from, &start, &end);
        if (from < start)
            text_pieces_add(out, sub_piece(piece, from, start, -1));
        text_pieces_add(out,
                        (text_piece){.start = piece.start + (uint32_t)end, .end = piece.start + (uint32_t)end, .id = token->id});
        from = end; /* may lie before the last token's white space: the package counts that twice, and so did its models */
    }
    if (from < span.size)
        text_pieces_add(out, sub_piece(piece, from, span.size, -1));
}
