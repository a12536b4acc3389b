/* checkpoint.h - a Hugging Face folder, opened, checked and bound to the places where the model wants its weights.
 *
 * All headers are read and every tensor the model needs is checked (present, shape, dtype) on every rank; of the experts only
 * the ones a rank owns are ever touched. `map`: weights are used where the file is mapped, shared by all ranks of a node through
 * the page cache. `copy`: a rank's own share is copied into anonymous memory (first touched by the rank that uses it, so
 * NUMA-local; madvise for huge pages). */
#ifndef CONVOKE_WORKER_CHECKPOINT_H
#define CONVOKE_WORKER_CHECKPOINT_H

#include "worker/kernels.h"
#include "worker/model_config.h"

/* A matrix as stored: row-major [n_out][n_in]. data NULL: absent (no bias, not this rank's expert). */
typedef struct {
    const void *data;
    weight_format format;
    int n_out, n_in;
} weight_matrix;

typedef struct {
    weight_matrix gate, up, down; /* [inter][hidden], [inter][hidden], [hidden][inter] */
} mlp_weights;

typedef struct {
    float *attn_norm, *mlp_norm; /* [hidden] fp32 copies (small) */
    float *q_norm, *k_norm;      /* [head_dim] or whole width; NULL: none */
    weight_matrix q, k, v, o;
    float *q_bias, *k_bias, *v_bias, *o_bias; /* fp32 copies; NULL: none */
    weight_matrix router;                     /* [n_experts][hidden]; MoE layers */
    mlp_weights *experts;                     /* [n_experts]; data NULL where this rank does not hold the expert */
    mlp_weights dense;                        /* dense layers */
    mlp_weights shared;                       /* the shared expert */
    weight_matrix shared_scale;               /* [1][hidden] */
} layer_weights;

typedef struct {
    weight_matrix embedding, head; /* [vocab][hidden]; head has the embedding's data where tied (as transformers 5 ties: not where
                                      both are stored and differ) */
    float *final_norm;             /* [hidden] */
    layer_weights *layers;         /* [n_layers] */
    size_t shared_bytes;           /* stored bytes that every rank uses */
    size_t expert_bytes;           /* stored bytes of the experts this rank holds */
    size_t total_bytes;            /* stored bytes of the whole model */
} model_weights;

typedef enum { WEIGHTS_MAP, WEIGHTS_COPY } weights_mode;

typedef struct checkpoint checkpoint; /* open files; owns everything bound from it */

/* Opens DIR: model.safetensors, or the shards model.safetensors.index.json names. `reference.safetensors` is not part of it.
 * `config` is borrowed until checkpoint_close(). */
status checkpoint_open(const char *dir, const model_config *config, checkpoint **out);
void checkpoint_close(checkpoint *file); /* NULL is fine */

/* `holds[layer * n_experts + e]`: whether this rank holds the expert; NULL: all. Layers count from the model's first, dense ones
 * included. Checks all tensors, refuses NaN or infinity in gates, norms and biases, and tensors left over that speak of
 * arithmetic the config does not (a bias, a norm). Once per open checkpoint. *out stays valid until checkpoint_close(). */
status checkpoint_bind(checkpoint *file, const unsigned char *holds, weights_mode mode, const model_weights **out);

/* Told now and then while weights are copied or read; may be called before checkpoint_bind(). */
typedef void (*checkpoint_listener)(void *arg, size_t done_bytes, size_t total_bytes);
void checkpoint_on_progress(checkpoint *file, checkpoint_listener listener, void *arg);
/* Reads this rank's share of a mapped checkpoint into memory now, so that the first steps need not; does nothing where it is
 * copied, or would fill more than half of the memory that is free. Ends early when *stop (NULL: never) turns true. */
void checkpoint_warm(checkpoint *file, bool (*stop)(void));

/* ---- experts that come and go while the model runs; one caller at a time, its own thread (expert_copies.h) ---- */

/* Asked between pieces of at most 256 KiB, which have just been read; waits as long as it likes; false ends the loading. */
typedef bool (*checkpoint_pace)(void *arg, size_t bytes);
/* Brings an expert (layer: the model's own number) into this rank's memory: map: its pages are read; copy: into memory of its
 * own. *out is it, ready to be used. *done false: `pace` ended it and what was read is given back. */
status checkpoint_load_expert(checkpoint *file, int layer, int expert, checkpoint_pace pace, void *arg, bool *done,
                              mlp_weights *out);
/* Gives back the memory of an expert that nobody uses any more, bound at the start or loaded later. */
void checkpoint_drop_expert(checkpoint *file, const mlp_weights *weights);
size_t checkpoint_expert_bytes(const checkpoint *file, int layer);
/* The main thread, between steps: the model uses `weights` as this expert (NULL: it has none of it any more). Returns what it had
 * before. */
mlp_weights checkpoint_place_expert(checkpoint *file, int layer, int expert, const mlp_weights *weights);

/* Bytes of weights in this process's memory right now: touched pages of the mapping, or the copies. */
size_t checkpoint_resident_bytes(const checkpoint *file);

#endif
