#include "worker/kv_cache.h"

#include "worker/kernels.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct kv_cache {
    int n_layers, n_kv_heads, head_dim;
    size_t head_floats, block_floats;
    int n_blocks;
    float *pool;
};

status kv_cache_create(int n_layers, int n_kv_heads, int head_dim, size_t max_bytes, kv_cache **out)
{
    size_t head_floats = kv_head_floats(head_dim);
    size_t block_floats = head_floats * (size_t)n_kv_heads * (size_t)n_layers;
    size_t n_blocks = max_bytes / (block_floats * sizeof(float));
    if (n_blocks == 0)
        return status_fail(STATUS_NO_MEMORY, "the KV budget of %zu bytes does not hold one block of %d positions (%zu bytes)",
                           max_bytes, KV_BLOCK, block_floats * sizeof(float));
    if (n_blocks > INT32_MAX / 2)
        n_blocks = INT32_MAX / 2;
    kv_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return status_fail(STATUS_NO_MEMORY, "no memory for the KV cache's bookkeeping");
    *cache = (kv_cache){.n_layers = n_layers,
                        .n_kv_heads = n_kv_heads,
                        .head_dim = head_dim,
                        .head_floats = head_floats,
                        .block_floats = block_floats,
                        .n_blocks = (int)n_blocks};
    size_t bytes = n_blocks * block_floats * sizeof(float);
    void *pool = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cache->pool = pool == MAP_FAILED ? NULL : pool;
    if (!cache->pool) {
        kv_cache_destroy(cache);
        return status_fail(STATUS_NO_MEMORY, "no memory for a KV cache of %zu bytes", bytes);
    }
    *out = cache;
    return STATUS_OK;
}

void kv_cache_destroy(kv_cache *cache)
{
    if (!cache)
        return;
    if (cache->pool)
        munmap(cache->pool, kv_cache_bytes(cache));
    free(cache);
}

int kv_cache_n_blocks(const kv_cache *cache)
{
    return cache->n_blocks;
}

size_t kv_cache_block_floats(const kv_cache *cache)
{
    return cache->block_floats;
}

size_t kv_cache_block_bytes(const kv_cache *cache)
{
    return cache->block_floats * sizeof(float);
}

size_t kv_cache_bytes(const kv_cache *cache)
{
    return (size_t)cache->n_blocks * kv_cache_block_bytes(cache);
}

float *kv_cache_head(kv_cache *cache, int layer, int kv_head)
{
    return cache->pool + ((size_t)layer * (size_t)cache->n_kv_heads + (size_t)kv_head) * cache->head_floats;
}

void kv_cache_store(kv_cache *cache, int layer, int kv_head, const int32_t *block_ids, int position, const float *k,
                    const float *v)
{
    float *head = kv_cache_head(cache, layer, kv_head) + (size_t)block_ids[position / KV_BLOCK] * cache->block_floats;
    int j = position % KV_BLOCK, d_head = cache->head_dim;
    for (int d = 0; d < d_head; d++)
        head[d * KV_BLOCK + j] = k[d]; /* keys transposed: attention then needs no sum across lanes */
    memcpy(head + (size_t)d_head * KV_BLOCK + (size_t)j * (size_t)d_head, v, (size_t)d_head * sizeof *v);
}
