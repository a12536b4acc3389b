/* kv_cache.h - the keys and values of this rank's sequences, in blocks of KV_BLOCK positions under a byte budget.
 *
 * A block holds KV_BLOCK positions of one sequence for all layers and KV heads, fp32, laid out as attend_args (kernels.h) wants:
 *
 *     block b:  [layer][kv head]{ K[head_dim][KV_BLOCK]  V[KV_BLOCK][head_dim] }
 *
 * Memory only: which block belongs to whom the leader decides (kv_blocks.h). Pages are touched when a block is first used. One
 * caller, the step loop; kv_cache_store() may run on any thread for rows of different positions. */
#ifndef CONVOKE_WORKER_KV_CACHE_H
#define CONVOKE_WORKER_KV_CACHE_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

typedef struct kv_cache kv_cache;

/* As many blocks as max_bytes hold; fails when that is none, saying what one block takes. */
status kv_cache_create(int n_layers, int n_kv_heads, int head_dim, size_t max_bytes, kv_cache **out);
void kv_cache_destroy(kv_cache *cache); /* NULL is fine */

int kv_cache_n_blocks(const kv_cache *cache);
size_t kv_cache_block_bytes(const kv_cache *cache);
size_t kv_cache_bytes(const kv_cache *cache); /* n_blocks * block_bytes */

/* Blocks that n positions take. */
static inline int kv_blocks_of(int n_positions, int kv_block)
{
    return (n_positions + kv_block - 1) / kv_block;
}

/* The part of block 0 for (layer, kv head); add block_ids[i] * kv_cache_block_floats() for another block. */
float *kv_cache_head(kv_cache *cache, int layer, int kv_head);
size_t kv_cache_block_floats(const kv_cache *cache);
/* Writes one position's key and value [head_dim] of one (layer, kv head). */
void kv_cache_store(kv_cache *cache, int layer, int kv_head, const int32_t *block_ids, int position, const float *k,
                    const float *v);

#endif
