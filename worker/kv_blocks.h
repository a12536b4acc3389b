/* kv_blocks.h - which KV blocks of one rank are used, by how many, and what prefixes the others still hold.
 *
 *     plain free ─take─► used (1..n users) ─last user gone─► plain free            (a block without a name)
 *                          ▲        │ named
 *                          └─share──┴──last user gone──────► cached, oldest first ─take, when no plain one is left─► used
 *
 * Bookkeeping of the leader, for every rank; the ranks' memory is kv_cache.h. A block gets its name (prefix_key.h) when all its
 * positions have been computed; then sequences with the same prefix may share it. Nothing is allocated after creation. */
#ifndef CONVOKE_WORKER_KV_BLOCKS_H
#define CONVOKE_WORKER_KV_BLOCKS_H

#include "proto/status.h"
#include "worker/prefix_key.h"

typedef struct kv_blocks kv_blocks;

status kv_blocks_create(int n_blocks, kv_blocks **out);
void kv_blocks_destroy(kv_blocks *b); /* NULL is fine */

int kv_blocks_count(const kv_blocks *b);
int kv_blocks_free(const kv_blocks *b); /* without user: plain and cached */

/* A block without user becomes used by one: a plain one, else the cached one whose last user left longest ago, which loses its
 * name. -1 when every block is used. */
int32_t kv_blocks_take(kv_blocks *b);
/* The block of that name, used or cached; -1 when there is none. */
int32_t kv_blocks_find(const kv_blocks *b, prefix_key key);
bool kv_blocks_is_used(const kv_blocks *b, int32_t id);
/* One more user of a block that was found. */
void kv_blocks_share(kv_blocks *b, int32_t id);
/* One user less. Give a sequence's blocks back last first: the ends of prefixes are then evicted before their beginnings. */
void kv_blocks_give(kv_blocks *b, int32_t id);
/* Names a used block; does nothing when another block has this name already or it has one. */
void kv_blocks_name(kv_blocks *b, int32_t id, prefix_key key);
/* Forgets all names: cached blocks become plain. */
void kv_blocks_forget(kv_blocks *b);
/* For tests: users of a block, and whether lists, counts and names agree with each other. */
int kv_blocks_users(const kv_blocks *b, int32_t id);
bool kv_blocks_is_sound(const kv_blocks *b);

#endif
