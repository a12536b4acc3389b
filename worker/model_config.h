/* model_config.h - what a model is, read from a checkpoint's config.json.
 *
 * Every key that changes the arithmetic is either honoured or refused by name; keys that do not (dropout, initialisers, token
 * ids of training) are passed over. Both spellings are read: as published on the hub (rope_theta, rope_scaling, torch_dtype,
 * num_local_experts or num_experts) and as transformers 5 writes it (rope_parameters, dtype). */
#ifndef CONVOKE_WORKER_MODEL_CONFIG_H
#define CONVOKE_WORKER_MODEL_CONFIG_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>

typedef enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_WHOLE } qk_norm_kind;

/* What sets one model family apart, as data: one row of a table in model_family.c. Tensor names are printf patterns behind
 * "model.layers.%d."; expert patterns take the expert number. */
typedef struct {
    const char *model_type;                                           /* "qwen3_moe" */
    const char *gate_name;                                            /* "mlp.gate.weight" */
    const char *expert_gate_name, *expert_up_name, *expert_down_name; /* "mlp.experts.%d.gate_proj.weight" */
    const char *dense_gate_name, *dense_up_name, *dense_down_name;    /* layers without experts; NULL: family has none */
    const char *shared_gate_name, *shared_up_name, *shared_down_name; /* the shared expert; NULL: none */
    const char *shared_scale_name;                                    /* its sigmoid gate [1][hidden]; NULL: none */
    const char *expert_inter_key;                                     /* the config key that holds the experts' width */
    qk_norm_kind qk_norm;
    int qkv_bias;      /* 0 never, 1 always, 2 as attention_bias says (then also on the output), 3 as qkv_bias says, default on */
    int norm_topk;     /* 1 always, 2 as norm_topk_prob says (default false) */
    bool sparse_steps; /* decoder_sparse_step and mlp_only_layers apply */
    bool clip_qkv;     /* the clip_qkv key applies */
    int window; /* sliding window: 0 never (refused if asked), 1 sliding_window on every layer, 2 sliding_window on every layer
                   where use_sliding_window, 3 the same on the layers that layer_types or max_window_layers name */
    /* what transformers' configuration classes fill in when config.json leaves a key out; 0: nothing, or (heads) another key's
     * value */
    struct {
        int vocab, hidden, inter, expert_inter, shared_inter, n_layers, n_heads, n_kv_heads, n_experts, top_k, max_positions;
        int sliding_window, max_window_layers, eos_id;
        double rope_theta, rms_eps;
    } defaults;
} model_family;

/* NULL when no row has this model_type. */
const model_family *model_family_find(const char *model_type);
/* "mixtral, olmoe, ...": for the sentence that refuses another. */
const char *model_family_list(void);

typedef enum { ROPE_DEFAULT, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_YARN, ROPE_LLAMA3 } rope_kind;

typedef struct {
    rope_kind kind;
    double theta, factor;
    double original_positions;                       /* original_max_position_embeddings */
    double beta_fast, beta_slow;                     /* yarn */
    double attention_factor, mscale, mscale_all_dim; /* yarn; 0: absent */
    bool truncate;                                   /* yarn */
    double low_freq_factor, high_freq_factor;        /* llama3 */
} rope_config;

typedef struct {
    const model_family *family;
    int vocab, hidden, n_layers, n_heads, n_kv_heads, head_dim;
    int n_experts, top_k, expert_inter;
    int dense_inter;  /* width of layers without experts */
    int shared_inter; /* width of the shared expert; 0: none */
    bool norm_topk, tied_embeddings, qkv_bias, o_bias;
    float rms_eps;
    float clip_qkv; /* q, k and v are clamped to +-this, behind the QK norm and before RoPE; 0: off */
    rope_config rope;
    int max_positions; /* the longest sequence the model may see: max_position_embeddings, which linear scaling multiplies by its
                          factor and yarn raises to original_max_position_embeddings * factor where that is more */
    bool *moe_layer;   /* [n_layers] false: a dense layer */
    int *window;       /* [n_layers] sliding window, 0: none */
    int n_moe_layers;
    int eos_ids[8], n_eos_ids; /* config.json's, or generation_config.json's where that names others */
    char name[128];            /* the checkpoint folder's own name */
} model_config;

/* Reads DIR/config.json (and generation_config.json where it is). */
status model_config_read(const char *dir, model_config *out);
/* The same from text in memory (fuzzing, tests); `where` is used in sentences. */
status model_config_parse(const char *where, const char *text, size_t size, model_config *out);
void model_config_clear(model_config *config); /* a zeroed one is fine */

/* cos and sin of every position's angles: [n_positions][head_dim / 2] each, allocated (free() both); already scaled by yarn's
 * attention factor. Angles are computed as transformers does (fp32 inverse frequencies, fp32 products). head_dim is even;
 * n_positions above max_positions is refused: dynamic scaling would change the angles of all positions there. */
status rope_tables(const rope_config *rope, int head_dim, int max_positions, int n_positions, float **cos_table,
                   float **sin_table);

#endif
