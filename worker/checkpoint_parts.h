/* checkpoint_parts.h - what the four files of the checkpoint share; for them alone.
 *
 * checkpoint_files.c opens and finds, checkpoint.c checks and binds, checkpoint_memory.c decides what is in memory,
 * checkpoint_experts.c lets experts come and go later. */
#ifndef CONVOKE_WORKER_CHECKPOINT_PARTS_H
#define CONVOKE_WORKER_CHECKPOINT_PARTS_H

#include "proto/safetensors.h"
#include "worker/checkpoint.h"

/* What a tensor of the file is to this rank. */
enum { TENSOR_UNKNOWN, TENSOR_ELSEWHERE, TENSOR_OURS };

typedef struct {
    safetensors *file;
    unsigned char *use; /* [tensors of the file] */
} shard;

struct checkpoint {
    char *dir;
    const model_config *config; /* borrowed */
    shard *shards;
    int n_shards, last_shard; /* where the last tensor was found: its neighbours are mostly there too */
    model_weights weights;
    void **owned; /* blocks to free */
    int n_owned, room_owned;
    unsigned char *copy; /* copy mode: the anonymous area */
    size_t copy_size, copy_used;
    const void **stored;          /* [n_layers][n_experts][gate, up, down] where the file has them */
    _Atomic size_t come_and_gone; /* copy mode: bytes of experts copied later, less those given back; wraps around */
    int n_areas_made;             /* memory areas that experts coming and going may have made; their one caller's */
    checkpoint_listener listener; /* NULL: nobody asks */
    void *listener_arg;
    bool bound;
};

/* ---- checkpoint_files.c ---- */

/* Opens what ck->dir holds; an index and its shards must agree. */
status checkpoint_open_files(checkpoint *ck);
/* The shard of a tensor, or -1; *view is set when it is there. */
int checkpoint_find(checkpoint *ck, const char *name, const tensor_view **view);

/* ---- checkpoint_memory.c ---- */

#define CHECKPOINT_MAX_AREAS  8192 /* a process may have 65,530 memory areas in all */
#define CHECKPOINT_COPY_ALIGN 64
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* madvise() on the whole pages around a range, and on all of the files. Advice only: where the system takes none of it,
 * everything works, with more memory or more reading. */
void checkpoint_advise(const void *from, size_t n, int advice);
void checkpoint_advise_all(const checkpoint *ck, int advice);
/* When all is bound: keeps the mapping to this rank's tensors. */
void checkpoint_keep_own(const checkpoint *ck);
/* Touches mapped bytes so that they are in this process's memory. */
void checkpoint_populate(char *from, size_t n);
/* Or copies what is bound, and points the weights at the copies. */
status checkpoint_copy(checkpoint *ck);

#endif
