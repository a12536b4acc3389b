/* Blocks without user hang in one of two rings (plain, cached) through prev/next, whose two last elements are the rings' heads;
 * names are found through chained buckets. */
#include "worker/kv_blocks.h"

#include <assert.h>
#include <stdlib.h>

struct kv_blocks {
    int n_blocks, n_free;
    int32_t plain, cached; /* ring heads: n_blocks, n_blocks + 1 */
    int32_t *prev, *next;  /* [n_blocks + 2] */
    int32_t *users;        /* [n_blocks] */
    prefix_key *keys;      /* [n_blocks] */
    uint32_t mask;
    int32_t *buckets;     /* [mask + 1] first block, -1: none */
    int32_t *bucket_next; /* [n_blocks] */
};

static void link_before(kv_blocks *b, int32_t at, int32_t id)
{
    b->prev[id] = b->prev[at];
    b->next[id] = at;
    b->next[b->prev[at]] = id;
    b->prev[at] = id;
}

static void unlink_block(kv_blocks *b, int32_t id)
{
    b->next[b->prev[id]] = b->next[id];
    b->prev[b->next[id]] = b->prev[id];
}

static void empty_ring(kv_blocks *b, int32_t head)
{
    b->prev[head] = b->next[head] = head;
}

status kv_blocks_create(int n_blocks, kv_blocks **out)
{
    kv_blocks *b = calloc(1, sizeof *b);
    uint32_t size = 16;
    while (size < (uint32_t)n_blocks)
        size *= 2;
    if (b) {
        size_t n = (size_t)n_blocks + 2;
        b->prev = calloc(n, sizeof *b->prev);
        b->next = calloc(n, sizeof *b->next);
        b->users = calloc(n, sizeof *b->users);
        b->keys = calloc(n, sizeof *b->keys);
        b->buckets = malloc(size * sizeof *b->buckets);
        b->bucket_next = calloc(n, sizeof *b->bucket_next);
    }
    if (!b || !b->prev || !b->next || !b->users || !b->keys || !b->buckets || !b->bucket_next) {
        kv_blocks_destroy(b);
        return status_fail(STATUS_NO_MEMORY, "no memory for the bookkeeping of %d KV blocks", n_blocks);
    }
    b->n_blocks = b->n_free = n_blocks;
    b->plain = n_blocks;
    b->cached = n_blocks + 1;
    b->mask = size - 1;
    empty_ring(b, b->plain);
    empty_ring(b, b->cached);
    for (int32_t id = 0; id < n_blocks; id++)
        link_before(b, b->plain, id);
    for (uint32_t i = 0; i < size; i++)
        b->buckets[i] = -1;
    *out = b;
    return STATUS_OK;
}

void kv_blocks_destroy(kv_blocks *b)
{
    if (!b)
        return;
    free(b->prev);
    free(b->next);
    free(b->users);
    free(b->keys);
    free(b->buckets);
    free(b->bucket_next);
    free(b);
}

int kv_blocks_count(const kv_blocks *b)
{
    return b->n_blocks;
}

int kv_blocks_free(const kv_blocks *b)
{
    return b->n_free;
}

bool kv_blocks_is_used(const kv_blocks *b, int32_t id)
{
    return b->users[id] > 0;
}

int kv_blocks_users(const kv_blocks *b, int32_t id)
{
    return b->users[id];
}

/* ---- names --------------------------------------------------------------------------------------------------------------- */

static bool has_name(const kv_blocks *b, int32_t id)
{
    return b->keys[id].word[0] || b->keys[id].word[1];
}

static int32_t *bucket_of(const kv_blocks *b, prefix_key key)
{
    return &b->buckets[(uint32_t)key.word[0] & b->mask];
}

int32_t kv_blocks_find(const kv_blocks *b, prefix_key key)
{
    for (int32_t id = *bucket_of(b, key); id >= 0; id = b->bucket_next[id])
        if (prefix_key_equal(b->keys[id], key))
            return id;
    return -1;
}

void kv_blocks_name(kv_blocks *b, int32_t id, prefix_key key)
{
    if (has_name(b, id) || kv_blocks_find(b, key) >= 0)
        return;
    assert(b->users[id] > 0);
    int32_t *bucket = bucket_of(b, key);
    b->keys[id] = key;
    b->bucket_next[id] = *bucket;
    *bucket = id;
}

static void drop_name(kv_blocks *b, int32_t id)
{
    int32_t *at = bucket_of(b, b->keys[id]);
    while (*at != id)
        at = &b->bucket_next[*at];
    *at = b->bucket_next[id];
    b->keys[id] = (prefix_key){0};
}

void kv_blocks_forget(kv_blocks *b)
{
    for (int32_t id = 0; id < b->n_blocks; id++)
        b->keys[id] = (prefix_key){0};
    for (uint32_t i = 0; i <= b->mask; i++)
        b->buckets[i] = -1;
    while (b->next[b->cached] != b->cached) {
        int32_t id = b->next[b->cached];
        unlink_block(b, id);
        link_before(b, b->plain, id);
    }
}

/* ---- users --------------------------------------------------------------------------------------------------------------- */

int32_t kv_blocks_take(kv_blocks *b)
{
    if (b->n_free == 0)
        return -1;
    int32_t id = b->next[b->plain];
    if (id == b->plain) {
        id = b->next[b->cached];
        drop_name(b, id);
    }
    unlink_block(b, id);
    b->n_free--;
    b->users[id] = 1;
    return id;
}

void kv_blocks_share(kv_blocks *b, int32_t id)
{
    if (b->users[id]++ > 0)
        return;
    unlink_block(b, id);
    b->n_free--;
}

void kv_blocks_give(kv_blocks *b, int32_t id)
{
    assert(b->users[id] > 0);
    if (--b->users[id] > 0)
        return;
    b->n_free++;
    /* Plain ones go to the front: the block given back last, still warm, is taken first. */
    link_before(b, has_name(b, id) ? b->cached : b->next[b->plain], id);
}

/* ---- for tests ------------------------------------------------------------------------------------------------------------- */

static int ring_is_sound(const kv_blocks *b, int32_t head, bool named)
{
    int n = 0;
    for (int32_t id = b->next[head]; id != head; id = b->next[id], n++)
        if (n > b->n_blocks || b->users[id] != 0 || has_name(b, id) != named || b->prev[b->next[id]] != id)
            return -1;
    return n;
}

bool kv_blocks_is_sound(const kv_blocks *b)
{
    int plain = ring_is_sound(b, b->plain, false), cached = ring_is_sound(b, b->cached, true), used = 0, named = 0, found = 0;
    for (int32_t id = 0; id < b->n_blocks; id++) {
        used += b->users[id] > 0;
        named += has_name(b, id);
        if (b->users[id] < 0 || (has_name(b, id) && kv_blocks_find(b, b->keys[id]) != id))
            return false;
    }
    for (uint32_t i = 0; i <= b->mask; i++)
        for (int32_t id = b->buckets[i]; id >= 0; id = b->bucket_next[id])
            found++;
    return plain >= 0 && cached >= 0 && plain + cached == b->n_free && used + b->n_free == b->n_blocks && named == found;
}
