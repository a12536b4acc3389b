/* tokenizer_bpe.c - byte-pair encoding: a word into symbols, then merges by rank, the leftmost of equal rank first.
 *
 *   word ─► cache ─► symbols ─► short: look at all pairs, merge the best, again      (no memory touched but two small arrays)
 *                               long:  heap of pairs over a linked list of symbols   (n log n: one letter a million times is
 * fine)
 */
#include "cluster/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

enum { SHORT_MAX = 48, CACHE_SETS = 1 << 14, CACHE_WAYS = 2, CACHE_TEXT = 24, CACHE_IDS = 8 };
#define NO_RANK UINT32_MAX

/* ---- merges ---- */

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static size_t pair_hash(uint64_t pair)
{
    uint64_t h = pair * 0x9E3779B97F4A7C15u;
    return (size_t)(h ^ h >> 32);
}

status bpe_reserve_merges(bpe_model *model, size_t n)
{
    size_t capacity = 16;
    while (capacity < 2 * n)
        capacity *= 2;
    model->merges = malloc(capacity * sizeof *model->merges);
    if (!model->merges)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu merges", n);
    for (size_t i = 0; i < capacity; i++)
        model->merges[i].rank = NO_RANK;
    model->merge_mask = capacity - 1;
    return STATUS_OK;
}

void bpe_add_merge(bpe_model *model, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    uint64_t pair = pair_of(left, right);
    size_t i = pair_hash(pair) & model->merge_mask;
    while (model->merges[i].rank != NO_RANK && model->merges[i].pair != pair)
        i = (i + 1) & model->merge_mask;
    model->merges[i] = (merge_entry){.pair = pair, .rank = rank, .id = id};
}

/* The rank of a pair and *id, what it becomes; NO_RANK: they do not merge. */
static inline uint32_t merge_of(const bpe_model *model, int32_t left, int32_t right, int32_t *id)
{
    uint64_t pair = pair_of(left, right);
    for (size_t i = pair_hash(pair) & model->merge_mask;; i = (i + 1) & model->merge_mask) {
        const merge_entry *e = &model->merges[i];
        if (e->pair == pair || e->rank == NO_RANK) {
            *id = e->id;
            return e->rank;
        }
    }
}

void bpe_clear(bpe_model *model)
{
    string_index_clear(&model->vocab);
    string_index_clear(&model->raw);
    free(model->merges);
    free(model->unk_name);
    *model = (bpe_model){0};
}

/* ---- scratch ---- */

/* One cache line. Words that do not fit are encoded each time. */
typedef struct {
    uint64_t text[CACHE_TEXT / 8]; /* zeros behind the word */
    int32_t ids[CACHE_IDS];
    uint8_t size; /* 0: free */
    uint8_t n_ids;
    uint8_t unused[6];
} cache_line;
_Static_assert(sizeof(cache_line) == 64, "a cache line");

typedef struct {
    int32_t id;
    int32_t previous, next; /* -1: none */
    uint32_t rank;          /* of the pair with the next symbol; NO_RANK: does not merge, or the symbol is gone */
    int32_t merged;         /* what that pair becomes */
} symbol;

struct bpe_scratch {
    cache_line *cache;
    bytes_writer text; /* a word as byte-level characters */
    id_list symbols;
    symbol *list;
    uint64_t *heap; /* rank in the upper half, place in the lower */
    size_t list_capacity, heap_capacity, n_heap;
};

status bpe_scratch_create(bpe_scratch **out)
{
    bpe_scratch *s = calloc(1, sizeof *s);
    if (s)
        s->cache = aligned_alloc(64, CACHE_SETS * CACHE_WAYS * sizeof *s->cache);
    if (!s || !s->cache) {
        free(s);
        return status_fail(STATUS_NO_MEMORY, "no memory for a tokenizer's word cache");
    }
    memset(s->cache, 0, CACHE_SETS * CACHE_WAYS * sizeof *s->cache);
    *out = s;
    return STATUS_OK;
}

void bpe_scratch_destroy(bpe_scratch *s)
{
    if (!s)
        return;
    bytes_clear(&s->text);
    free(s->cache);
    free(s->symbols.items);
    free(s->list);
    free(s->heap);
    free(s);
}

status id_list_reserve(id_list *list, size_t more)
{
    if (list->capacity - list->n >= more)
        return STATUS_OK;
    size_t wanted = list->capacity ? list->capacity : 256;
    while (wanted - list->n < more)
        wanted *= 2;
    int32_t *grown = realloc(list->items, wanted * sizeof *grown);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu token ids", wanted);
    list->items = grown;
    list->capacity = wanted;
    return STATUS_OK;
}

/* ---- symbols ---- */

/* The character at `text` as "<0x41>" tokens, one a byte. */
static bool put_fallback(const bpe_model *model, const char *text, size_t length, id_list *out)
{
    for (size_t i = 0; i < length; i++)
        if (model->fallback_ids[(unsigned char)text[i]] < 0)
            return false;
    for (size_t i = 0; i < length; i++)
        out->items[out->n++] = model->fallback_ids[(unsigned char)text[i]];
    return true;
}

/* A character of the word to its symbol. A character that is not known becomes bytes, else the unknown token, else nothing.
 * The unknown token waits for the next known character, as in the package: bytes that come between go in front of it. */
static status characters_to_symbols(const bpe_model *model, text_span word, id_list *out)
{
    bool unknown = false;
    TRY(id_list_reserve(out, word.size + 1)); /* no character makes more symbols than it has bytes; one may wait */
    for (size_t at = 0; at < word.size;) {
        size_t length = utf8_length((unsigned char)word.text[at]);
        int32_t id = string_index_find(&model->vocab, (text_span){word.text + at, length});
        if (id >= 0) {
            if (unknown)
                out->items[out->n++] = model->unk_id;
            unknown = false;
            out->items[out->n++] = id;
        } else if (!(model->byte_fallback && put_fallback(model, word.text + at, length, out)) && model->unk_name) {
            if (model->unk_missing)
                return status_fail(STATUS_BAD_INPUT, "the unknown token \"%s\" is needed and is not in the vocabulary",
                                   model->unk_name);
            if (unknown && !model->fuse_unk)
                out->items[out->n++] = model->unk_id;
            unknown = true;
        }
        at += length;
    }
    if (unknown)
        out->items[out->n++] = model->unk_id;
    return STATUS_OK;
}

static status bytes_to_symbols(const bpe_model *model, text_span word, id_list *out)
{
    TRY(id_list_reserve(out, word.size));
    for (size_t i = 0; i < word.size; i++)
        out->items[out->n++] = model->byte_ids[(unsigned char)word.text[i]];
    return STATUS_OK;
}

/* ---- short words ---- */

static size_t merge_short(const bpe_model *model, int32_t *ids, size_t n)
{
    uint32_t ranks[SHORT_MAX];
    int32_t merged[SHORT_MAX];
    for (size_t i = 0; i + 1 < n; i++)
        ranks[i] = merge_of(model, ids[i], ids[i + 1], &merged[i]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (ranks[i] < ranks[best])
                best = i;
        if (ranks[best] == NO_RANK)
            break;
        ids[best] = merged[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            ranks[i - 1] = ranks[i];
            merged[i - 1] = merged[i];
        }
        if (best > 0)
            ranks[best - 1] = merge_of(model, ids[best - 1], ids[best], &merged[best - 1]);
        if (best + 1 < n)
            ranks[best] = merge_of(model, ids[best], ids[best + 1], &merged[best]);
    }
    return n;
}

/* ---- long words ---- */

static void heap_down(uint64_t *heap, size_t n, size_t at)
{
    uint64_t item = heap[at];
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= item)
            break;
        heap[at] = heap[child];
    }
    heap[at] = item;
}

static void heap_push(bpe_scratch *s, uint32_t rank, size_t place)
{
    uint64_t item = (uint64_t)rank << 32 | place;
    size_t at = s->n_heap++;
    for (; at > 0 && s->heap[(at - 1) / 2] > item; at = (at - 1) / 2)
        s->heap[at] = s->heap[(at - 1) / 2];
    s->heap[at] = item;
}

static uint64_t heap_pop(bpe_scratch *s)
{
    uint64_t top = s->heap[0];
    s->heap[0] = s->heap[--s->n_heap];
    if (s->n_heap > 0)
        heap_down(s->heap, s->n_heap, 0);
    return top;
}

/* The heap holds at most the pairs of the beginning and two for each merge that was made, less the one it used up. */
static status reserve_long(bpe_scratch *s, size_t n)
{
    if (s->list_capacity < n) {
        free(s->list);
        free(s->heap);
        s->heap = NULL;
        s->list_capacity = 0;
        s->list = malloc(n * sizeof *s->list);
        if (s->list)
            s->heap = malloc(2 * n * sizeof *s->heap);
        if (!s->list || !s->heap)
            return status_fail(STATUS_NO_MEMORY, "no memory for a word of %zu symbols", n);
        s->list_capacity = n;
    }
    return STATUS_OK;
}

/* Looks up the pair that begins at `place` and queues it. */
static void queue_pair(const bpe_model *model, bpe_scratch *s, int32_t place)
{
    symbol *left = &s->list[place];
    left->rank = NO_RANK;
    if (left->next < 0)
        return;
    left->rank = merge_of(model, left->id, s->list[left->next].id, &left->merged);
    if (left->rank != NO_RANK)
        heap_push(s, left->rank, (size_t)place);
}

static status merge_long(const bpe_model *model, bpe_scratch *s, int32_t *ids, size_t *n)
{
    TRY(reserve_long(s, *n));
    s->n_heap = 0;
    for (size_t i = 0; i < *n; i++)
        s->list[i] = (symbol){.id = ids[i], .previous = (int32_t)i - 1, .next = i + 1 < *n ? (int32_t)i + 1 : -1};
    for (size_t i = 0; i < *n; i++)
        queue_pair(model, s, (int32_t)i);
    while (s->n_heap > 0) {
        uint64_t top = heap_pop(s);
        int32_t place = (int32_t)(top & UINT32_MAX);
        symbol *left = &s->list[place];
        if (left->rank != (uint32_t)(top >> 32)) /* something else was merged here since */
            continue;
        symbol *right = &s->list[left->next];
        left->id = left->merged;
        right->rank = NO_RANK;
        left->next = right->next;
        if (left->next >= 0)
            s->list[left->next].previous = place;
        if (left->previous >= 0)
            queue_pair(model, s, left->previous);
        queue_pair(model, s, place);
    }
    size_t left = 0;
    for (int32_t i = 0; i >= 0; i = s->list[i].next)
        ids[left++] = s->list[i].id;
    *n = left;
    return STATUS_OK;
}

/* ---- words ---- */

static status encode_word(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids)
{
    if (model->ignore_merges) {
        int32_t id = string_index_find(model->raw_bytes ? &model->raw : &model->vocab, word);
        if (id >= 0) {
            TRY(id_list_reserve(ids, 1));
            ids->items[ids->n++] = id;
            return STATUS_OK;
        }
    }
    s->symbols.n = 0;
    if (model->raw_bytes)
        TRY(bytes_to_symbols(model, word, &s->symbols));
    else
        TRY(characters_to_symbols(model, word, &s->symbols));
    size_t n = s->symbols.n;
    if (n == 0)
        return STATUS_OK;
    if (n <= SHORT_MAX)
        n = merge_short(model, s->symbols.items, n);
    else
        TRY(merge_long(model, s, s->symbols.items, &n));
    TRY(id_list_reserve(ids, n));
    memcpy(ids->items + ids->n, s->symbols.items, n * sizeof *ids->items);
    ids->n += n;
    return STATUS_OK;
}

static status encode_cached(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids)
{
    uint64_t key[CACHE_TEXT / 8] = {0};
    memcpy(key, word.text, word.size);
    uint64_t h = (key[0] ^ 0x9E3779B97F4A7C15u) * 0xD6E8FEB86659FD93u;
    h = (h ^ h >> 32 ^ key[1]) * 0xD6E8FEB86659FD93u;
    h = (h ^ h >> 32 ^ key[2] ^ word.size << 56) * 0xD6E8FEB86659FD93u;
    cache_line *set = &s->cache[(h >> 40 & (CACHE_SETS - 1)) * CACHE_WAYS];
    TRY(id_list_reserve(ids, CACHE_IDS));
    for (int way = 0; way < CACHE_WAYS; way++) {
        const cache_line *line = &set[way];
        if (line->size == word.size && line->text[0] == key[0] && line->text[1] == key[1] && line->text[2] == key[2]) {
            memcpy(ids->items + ids->n, line->ids, sizeof line->ids);
            ids->n += line->n_ids;
            return STATUS_OK;
        }
    }
    size_t before = ids->n;
    TRY(encode_word(model, s, word, ids));
    if (ids->n - before <= CACHE_IDS) {
        set[1] = set[0]; /* the older word of the two goes */
        memcpy(set[0].text, key, sizeof key);
        memcpy(set[0].ids, ids->items + before, (ids->n - before) * sizeof *ids->items);
        set[0].size = (uint8_t)word.size;
        set[0].n_ids = (uint8_t)(ids->n - before);
    }
    return STATUS_OK;
}

static status encode_part(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids)
{
    return word.size <= CACHE_TEXT ? encode_cached(model, s, word, ids) : encode_word(model, s, word, ids);
}

/* A text without a pre-tokenizer is one word as long as it is. No merge reaches over a boundary, so it may be cut there: the
 * parts do not know of each other anyway. A run of boundary characters stays whole. */
static status encode_parts(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids)
{
    text_span cut = {model->boundary, model->boundary_size};
    size_t from = 0, at = 0;
    while (at < word.size) {
        while (word.size - at >= cut.size && memcmp(word.text + at, cut.text, cut.size) == 0)
            at += cut.size;
        const char *hit = at < word.size ? memmem(word.text + at, word.size - at, cut.text, cut.size) : NULL;
        at = hit ? (size_t)(hit - word.text) : word.size;
        TRY(encode_part(model, s, (text_span){word.text + from, at - from}, ids));
        from = at;
    }
    return STATUS_OK;
}

status bpe_encode(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids)
{
    if (word.size > CACHE_TEXT && model->boundary_size > 0)
        return encode_parts(model, s, word, ids);
    return encode_part(model, s, word, ids);
}
