/* model_family.c - the families this program runs, one row each. Names and defaults are those of the published checkpoints and
 * of transformers' configuration classes. */
#include "worker/model_config.h"

#include <string.h>

/* Qwen's and OLMoE's names, which most later families share. */
#define PROJ_NAMES(prefix, expert)                                                                                               \
    .prefix##_gate_name = "mlp." expert "gate_proj.weight", .prefix##_up_name = "mlp." expert "up_proj.weight",                  \
    .prefix##_down_name = "mlp." expert "down_proj.weight"

static const model_family families[] = {
    {
        .model_type = "mixtral",
        .gate_name = "block_sparse_moe.gate.weight",
        .expert_gate_name = "block_sparse_moe.experts.%d.w1.weight",
        .expert_up_name = "block_sparse_moe.experts.%d.w3.weight",
        .expert_down_name = "block_sparse_moe.experts.%d.w2.weight",
        .expert_inter_key = "intermediate_size",
        .qk_norm = QK_NORM_NONE,
        .qkv_bias = 0,
        .norm_topk = 1,
        .window = 1,
        .defaults = {.vocab = 32000,
                     .hidden = 4096,
                     .expert_inter = 14336,
                     .n_layers = 32,
                     .n_heads = 32,
                     .n_kv_heads = 8,
                     .n_experts = 8,
                     .top_k = 2,
                     .max_positions = 131072,
                     .eos_id = 2,
                     .rope_theta = 1e6,
                     .rms_eps = 1e-5},
    },
    {
        .model_type = "olmoe",
        .gate_name = "mlp.gate.weight",
        PROJ_NAMES(expert, "experts.%d."),
        .expert_inter_key = "intermediate_size",
        .qk_norm = QK_NORM_WHOLE,
        .qkv_bias = 2,
        .norm_topk = 2,
        .clip_qkv = true,
        .window = 0,
        .defaults = {.vocab = 50304,
                     .hidden = 2048,
                     .expert_inter = 2048,
                     .n_layers = 16,
                     .n_heads = 16,
                     .n_experts = 64,
                     .top_k = 8,
                     .max_positions = 4096,
                     .eos_id = 50279,
                     .rope_theta = 1e4,
                     .rms_eps = 1e-5},
    },
    {
        .model_type = "qwen2_moe",
        .gate_name = "mlp.gate.weight",
        PROJ_NAMES(expert, "experts.%d."),
        PROJ_NAMES(dense, ""),
        PROJ_NAMES(shared, "shared_expert."),
        .shared_scale_name = "mlp.shared_expert_gate.weight",
        .expert_inter_key = "moe_intermediate_size",
        .qk_norm = QK_NORM_NONE,
        .qkv_bias = 3,
        .norm_topk = 2,
        .sparse_steps = true,
        .window = 3,
        .defaults = {.vocab = 151936,
                     .hidden = 2048,
                     .inter = 5632,
                     .expert_inter = 1408,
                     .shared_inter = 5632,
                     .n_layers = 24,
                     .n_heads = 16,
                     .n_kv_heads = 16,
                     .n_experts = 60,
                     .top_k = 4,
                     .max_positions = 32768,
                     .sliding_window = 4096,
                     .max_window_layers = 28,
                     .rope_theta = 1e4,
                     .rms_eps = 1e-6},
    },
    {
        .model_type = "qwen3_moe",
        .gate_name = "mlp.gate.weight",
        PROJ_NAMES(expert, "experts.%d."),
        PROJ_NAMES(dense, ""),
        .expert_inter_key = "moe_intermediate_size",
        .qk_norm = QK_NORM_HEAD,
        .qkv_bias = 2,
        .norm_topk = 2,
        .sparse_steps = true,
        .window = 2,
        .defaults = {.vocab = 151936,
                     .hidden = 2048,
                     .inter = 6144,
                     .expert_inter = 768,
                     .n_layers = 24,
                     .n_heads = 32,
                     .n_kv_heads = 4,
                     .n_experts = 128,
                     .top_k = 8,
                     .max_positions = 32768,
                     .sliding_window = 4096,
                     .rope_theta = 1e4,
                     .rms_eps = 1e-6},
    },
};

const model_family *model_family_find(const char *model_type)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (!strcmp(families[i].model_type, model_type))
            return &families[i];
    return NULL;
}

const char *model_family_list(void)
{
    static _Thread_local char list[256];
    list[0] = '\0';
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        strcat(list, i ? ", " : "");
        strcat(list, families[i].model_type);
    }
    return list;
}
