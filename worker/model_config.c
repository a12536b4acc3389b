/* model_config.c - config.json read as transformers' configuration classes read it: the same defaults, both spellings. What it
 * says and this program would not do is refused by the key's name, never passed over. */
#include "worker/model_config.h"

#include "proto/json.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Bounds under which no product of two sizes and an element size overflows, and expert ids fit 16 bits. */
enum {
    MAX_VOCAB = 1 << 24,
    MAX_HIDDEN = 65536,
    MAX_INTER = 1 << 20,
    MAX_LAYERS = 1024,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 1024,
    MAX_EXPERTS = 4096,
    MAX_TOP_K = 256,
    MAX_POSITIONS = 1 << 24,
};
#define CONFIG_BYTES_MAX ((size_t)16 << 20)

/* ---- getters ---- */

/* A size in [1, max]; `fallback` where the key is missing, 0: it must be there. */
static status get_size(const cJSON *json, const char *where, const char *key, int max, int fallback, int *out)
{
    int64_t value = 0;
    if (fallback)
        TRY(json_get_int_or(json, where, key, 1, max, fallback, &value));
    else
        TRY(json_get_int(json, where, key, 1, max, &value));
    *out = (int)value;
    return STATUS_OK;
}

/* A finite number in [min, max]; `fallback` where the key is missing. */
static status get_number(const cJSON *json, const char *where, const char *key, double min, double max, double fallback,
                         double *out)
{
    double value = 0;
    TRY(json_get_double_or(json, where, key, fallback, &value));
    if (json_find(json, key) && !(value >= min && value <= max))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is %g, outside %g to %g", where, key, value, min, max);
    *out = value;
    return STATUS_OK;
}

static status unsupported(const char *where, const char *key, const model_config *c)
{
    return status_fail(STATUS_UNSUPPORTED, "%s: %s is set, which is not supported for %s", where, key, c->family->model_type);
}

/* Missing, null, false, [], or the number that changes nothing. */
static bool is_neutral(const cJSON *json, const char *key, double neutral)
{
    const cJSON *item = json_find(json, key);
    return !item || cJSON_IsFalse(item) || (cJSON_IsNumber(item) && item->valuedouble == neutral) ||
           (cJSON_IsArray(item) && !item->child);
}

/* ---- what is refused ---- */

static status refuse_keys(const cJSON *json, const char *where, const model_config *c)
{
    /* Keys of other families that change the arithmetic, with the value at which they do not. */
    static const struct {
        const char *key;
        double neutral;
    } foreign[] = {
        {"embedding_multiplier", 1},
        {"residual_multiplier", 1},
        {"attention_multiplier", 0},
        {"logits_scaling", 1},
        {"logit_scale", 1},
        {"routed_scaling_factor", 1},
        {"final_logit_softcapping", 0},
        {"attn_logit_softcapping", 0},
        {"router_logit_softcapping", 0},
        {"n_shared_experts", 0},
        {"num_shared_experts", 0},
        {"n_group", 1},
        {"first_k_dense_replace", 0},
        {"mlp_bias", 0},
        {"mlp_layer_types", 0},
        {"attention_sinks", 0},
        {"q_lora_rank", 0},
        {"kv_lora_rank", 0},
        {"use_bias", 0},
    };
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        if (!is_neutral(json, foreign[i].key, foreign[i].neutral))
            return unsupported(where, foreign[i].key, c);
    const model_family *f = c->family;
    if (f->qkv_bias != 2 && !is_neutral(json, "attention_bias", 0))
        return unsupported(where, "attention_bias", c);
    if (f->qkv_bias != 3 && !is_neutral(json, "qkv_bias", 0))
        return unsupported(where, "qkv_bias", c);
    if (!f->clip_qkv && !is_neutral(json, "clip_qkv", 0))
        return unsupported(where, "clip_qkv", c);
    if (!f->shared_gate_name && !is_neutral(json, "shared_expert_intermediate_size", 0))
        return unsupported(where, "shared_expert_intermediate_size", c);
    if (!f->sparse_steps && !is_neutral(json, "decoder_sparse_step", 1))
        return unsupported(where, "decoder_sparse_step", c);
    if (!f->sparse_steps && !is_neutral(json, "mlp_only_layers", 0))
        return unsupported(where, "mlp_only_layers", c);
    if (f->window == 0 && !is_neutral(json, "sliding_window", 0))
        return unsupported(where, "sliding_window", c);
    if (f->norm_topk == 1 && json_find(json, "norm_topk_prob") && !cJSON_IsTrue(json_find(json, "norm_topk_prob")))
        return status_fail(STATUS_UNSUPPORTED, "%s: norm_topk_prob is off, but %s always normalises", where, f->model_type);
    return STATUS_OK;
}

static status refuse_quantised(const cJSON *json, const char *where)
{
    const cJSON *quantised = json_find(json, "quantization_config");
    if (!quantised)
        return STATUS_OK;
    const cJSON *method = cJSON_IsObject(quantised) ? json_find(quantised, "quant_method") : NULL;
    return status_fail(STATUS_UNSUPPORTED, "%s: quantization_config (%.64s) is not supported; weights must be bf16, fp16 or fp32",
                       where, cJSON_IsString(method) ? method->valuestring : "no quant_method");
}

static status read_activation(const cJSON *json, const char *where)
{
    const char *name = "silu";
    if (json_find(json, "hidden_act"))
        TRY(json_get_string(json, where, "hidden_act", &name));
    if (strcmp(name, "silu") && strcmp(name, "swish")) /* two names of one function */
        return status_fail(STATUS_UNSUPPORTED, "%s: hidden_act %.64s is not supported, only silu", where, name);
    return STATUS_OK;
}

/* ---- sizes, attention, experts ---- */

static status read_family(const cJSON *json, const char *where, model_config *c)
{
    const char *model_type = NULL;
    if (!cJSON_IsObject(json))
        return status_fail(STATUS_BAD_INPUT, "%s: not a JSON object", where);
    TRY(json_get_string(json, where, "model_type", &model_type));
    c->family = model_family_find(model_type);
    if (!c->family)
        return status_fail(STATUS_UNSUPPORTED, "%s: model_type %.64s is not supported; supported are %s", where, model_type,
                           model_family_list());
    return STATUS_OK;
}

static status read_head_dim(const cJSON *json, const char *where, model_config *c)
{
    if (json_find(json, "head_dim")) {
        TRY(get_size(json, where, "head_dim", MAX_HEAD_DIM, 0, &c->head_dim));
    } else {
        if (c->hidden % c->n_heads)
            return status_fail(STATUS_BAD_INPUT,
                               "%s: hidden_size %d is no multiple of num_attention_heads %d, and head_dim is missing", where,
                               c->hidden, c->n_heads);
        c->head_dim = c->hidden / c->n_heads;
    }
    if (c->head_dim % 2 || c->head_dim > MAX_HEAD_DIM)
        return status_fail(STATUS_UNSUPPORTED, "%s: head_dim is %d; it must be even and at most %d", where, c->head_dim,
                           MAX_HEAD_DIM);
    /* A norm over the whole width has hidden_size weights, whatever head_dim says. */
    if (c->family->qk_norm == QK_NORM_WHOLE && c->head_dim * c->n_heads != c->hidden)
        return status_fail(STATUS_UNSUPPORTED, "%s: head_dim %d times %d heads is not hidden_size %d, as %s needs", where,
                           c->head_dim, c->n_heads, c->hidden, c->family->model_type);
    return STATUS_OK;
}

static status read_attention(const cJSON *json, const char *where, model_config *c)
{
    const model_family *f = c->family;
    TRY(get_size(json, where, "num_attention_heads", MAX_HEADS, f->defaults.n_heads, &c->n_heads));
    int kv_default = f->defaults.n_kv_heads ? f->defaults.n_kv_heads : c->n_heads;
    /* null says "as many as heads" to transformers, a missing key says the class's default */
    if (cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(json, "num_key_value_heads")))
        kv_default = c->n_heads;
    TRY(get_size(json, where, "num_key_value_heads", MAX_HEADS, kv_default, &c->n_kv_heads));
    if (c->n_heads % c->n_kv_heads)
        return status_fail(STATUS_BAD_INPUT, "%s: num_attention_heads %d is no multiple of num_key_value_heads %d", where,
                           c->n_heads, c->n_kv_heads);
    TRY(read_head_dim(json, where, c));
    c->qkv_bias = f->qkv_bias == 1;
    if (f->qkv_bias == 2) {
        TRY(json_get_bool_or(json, where, "attention_bias", false, &c->qkv_bias));
        c->o_bias = c->qkv_bias;
    } else if (f->qkv_bias == 3) {
        TRY(json_get_bool_or(json, where, "qkv_bias", true, &c->qkv_bias));
    }
    if (f->clip_qkv && json_find(json, "clip_qkv")) {
        double clip = 0;
        TRY(get_number(json, where, "clip_qkv", 1e-30, 1e30, 0, &clip));
        c->clip_qkv = (float)clip;
    }
    return STATUS_OK;
}

/* Published as num_experts or num_local_experts; transformers takes each for the other (but for qwen2_moe, where it would go on
 * with 60 and then miss tensors). */
static status read_n_experts(const cJSON *json, const char *where, model_config *c)
{
    int a = 0, b = 0;
    TRY(get_size(json, where, "num_experts", MAX_EXPERTS, c->family->defaults.n_experts, &a));
    TRY(get_size(json, where, "num_local_experts", MAX_EXPERTS, a, &b));
    if (json_find(json, "num_experts") && a != b)
        return status_fail(STATUS_BAD_INPUT, "%s: num_experts is %d, but num_local_experts is %d", where, a, b);
    c->n_experts = b;
    return STATUS_OK;
}

static status read_experts(const cJSON *json, const char *where, model_config *c)
{
    const model_family *f = c->family;
    TRY(read_n_experts(json, where, c));
    TRY(get_size(json, where, "num_experts_per_tok", MAX_TOP_K, f->defaults.top_k, &c->top_k));
    if (c->top_k > c->n_experts)
        return status_fail(STATUS_BAD_INPUT, "%s: num_experts_per_tok %d is more than the %d experts", where, c->top_k,
                           c->n_experts);
    TRY(get_size(json, where, f->expert_inter_key, MAX_INTER, f->defaults.expert_inter, &c->expert_inter));
    if (f->dense_gate_name)
        TRY(get_size(json, where, "intermediate_size", MAX_INTER, f->defaults.inter, &c->dense_inter));
    if (f->shared_gate_name)
        TRY(get_size(json, where, "shared_expert_intermediate_size", MAX_INTER, f->defaults.shared_inter, &c->shared_inter));
    c->norm_topk = true;
    if (f->norm_topk == 2)
        TRY(json_get_bool_or(json, where, "norm_topk_prob", false, &c->norm_topk));
    return STATUS_OK;
}

static status read_sizes(const cJSON *json, const char *where, model_config *c)
{
    const model_family *f = c->family;
    double eps = 0;
    TRY(get_size(json, where, "vocab_size", MAX_VOCAB, f->defaults.vocab, &c->vocab));
    TRY(get_size(json, where, "hidden_size", MAX_HIDDEN, f->defaults.hidden, &c->hidden));
    TRY(get_size(json, where, "num_hidden_layers", MAX_LAYERS, f->defaults.n_layers, &c->n_layers));
    TRY(get_number(json, where, "rms_norm_eps", 0, 1, f->defaults.rms_eps, &eps));
    c->rms_eps = (float)eps;
    return json_get_bool_or(json, where, "tie_word_embeddings", false, &c->tied_embeddings);
}

/* ---- per layer: experts or dense, sliding window or not ---- */

static status read_moe_layers(const cJSON *json, const char *where, model_config *c)
{
    int step = 1;
    if (c->family->sparse_steps)
        TRY(get_size(json, where, "decoder_sparse_step", MAX_LAYERS, 1, &step));
    for (int l = 0; l < c->n_layers; l++)
        c->moe_layer[l] = (l + 1) % step == 0;
    if (c->family->sparse_steps && json_find(json, "mlp_only_layers")) {
        const cJSON *list = NULL, *item;
        TRY(json_get_array(json, where, "mlp_only_layers", &list));
        char place[512];
        snprintf(place, sizeof place, "%.450s: mlp_only_layers", where);
        int i = 0;
        cJSON_ArrayForEach(item, list)
        {
            int64_t l = 0;
            TRY(json_item_int(item, place, i++, 0, INT_MAX, &l));
            if (l < c->n_layers) /* transformers asks "is this layer in the list", so others stand there unharmed */
                c->moe_layer[l] = false;
        }
    }
    for (int l = 0; l < c->n_layers; l++)
        c->n_moe_layers += c->moe_layer[l];
    if (!c->n_moe_layers)
        return status_fail(STATUS_UNSUPPORTED, "%s: no layer has experts, by decoder_sparse_step and mlp_only_layers", where);
    return STATUS_OK;
}

/* The window of sliding layers; 0: no layer slides. */
static status read_window_size(const cJSON *json, const char *where, const model_config *c, int *window)
{
    bool on = c->family->window == 1 ? json_find(json, "sliding_window") != NULL : false;
    if (c->family->window != 1)
        TRY(json_get_bool_or(json, where, "use_sliding_window", false, &on));
    *window = 0;
    if (!on)
        return STATUS_OK;
    if (c->family->window == 0)
        return unsupported(where, "use_sliding_window", c);
    if (cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(json, "sliding_window")))
        return status_fail(STATUS_BAD_INPUT, "%s: use_sliding_window is true, but sliding_window is null", where);
    return get_size(json, where, "sliding_window", INT_MAX / 2, c->family->defaults.sliding_window, window);
}

/* layer_types decides where the family reads it; elsewhere it may stand there, but must not say otherwise. */
static status apply_layer_types(const cJSON *json, const char *where, int window, model_config *c)
{
    const cJSON *list = NULL, *item;
    if (!json_find(json, "layer_types"))
        return STATUS_OK;
    TRY(json_get_array(json, where, "layer_types", &list));
    int l = 0;
    cJSON_ArrayForEach(item, list)
    {
        bool sliding = cJSON_IsString(item) && !strcmp(item->valuestring, "sliding_attention");
        if (!sliding && !(cJSON_IsString(item) && !strcmp(item->valuestring, "full_attention")))
            return status_fail(STATUS_UNSUPPORTED, "%s: layer_types: layer %d is neither full_attention nor sliding_attention",
                               where, l);
        if (l < c->n_layers) {
            if (c->family->window == 3)
                c->window[l] = sliding ? window : 0;
            if (sliding != (c->window[l] > 0))
                return status_fail(STATUS_UNSUPPORTED, "%s: layer_types says %s for layer %d, against the sliding window keys",
                                   where, item->valuestring, l);
        }
        l++;
    }
    if (l != c->n_layers)
        return status_fail(STATUS_BAD_INPUT, "%s: layer_types lists %d layers, num_hidden_layers is %d", where, l, c->n_layers);
    return STATUS_OK;
}

static status read_windows(const cJSON *json, const char *where, model_config *c)
{
    int window = 0;
    int64_t sliding_layers = c->n_layers;
    TRY(read_window_size(json, where, c, &window));
    if (c->family->window == 3)
        TRY(json_get_int_or(json, where, "max_window_layers", 0, INT_MAX, c->family->defaults.max_window_layers,
                            &sliding_layers));
    for (int l = 0; l < c->n_layers; l++) {
        /* transformers' rule for Qwen2-MoE: every second layer, from the first, below max_window_layers */
        bool slides = c->family->window != 3 || (l % 2 == 0 && l < sliding_layers);
        c->window[l] = slides ? window : 0;
    }
    return apply_layer_types(json, where, window, c);
}

/* ---- rope ---- */

/* rope_scaling (hub) or rope_parameters (transformers 5); NULL: neither says anything. */
static status find_rope(const cJSON *json, const char *where, const char **key, const cJSON **out)
{
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    *out = NULL;
    for (int i = 0; i < 2 && !*out; i++) {
        const cJSON *item = json_find(json, keys[i]);
        if (item && !cJSON_IsObject(item))
            return status_fail(STATUS_BAD_INPUT, "%s: %s is not an object", where, keys[i]);
        if (item && item->child) {
            *key = keys[i];
            *out = item;
        }
    }
    return STATUS_OK;
}

static status check_rope_keys(const cJSON *rope, const char *where)
{
    static const char *const known[] = {
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
        "partial_rotary_factor",
        "finetuned",
    };
    const cJSON *item;
    cJSON_ArrayForEach(item, rope)
    {
        bool found = cJSON_IsNull(item);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            found = found || !strcmp(item->string, known[i]);
        if (!found)
            return status_fail(STATUS_UNSUPPORTED, "%s: %.64s is not supported", where, item->string);
    }
    return STATUS_OK;
}

static status read_rope_kind(const cJSON *rope, const char *where, rope_kind *out)
{
    static const char *const names[] = {[ROPE_DEFAULT] = "default",
                                        [ROPE_LINEAR] = "linear",
                                        [ROPE_DYNAMIC] = "dynamic",
                                        [ROPE_YARN] = "yarn",
                                        [ROPE_LLAMA3] = "llama3"};
    const char *name = "default";
    if (json_find(rope, "rope_type"))
        TRY(json_get_string(rope, where, "rope_type", &name));
    else if (json_find(rope, "type"))
        TRY(json_get_string(rope, where, "type", &name));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i])) {
            *out = (rope_kind)i;
            return STATUS_OK;
        }
    return status_fail(STATUS_UNSUPPORTED,
                       "%s: rope type %.64s is not supported; supported are default, linear, dynamic, yarn, llama3", where, name);
}

static status read_yarn(const cJSON *rope, const char *where, rope_config *out)
{
    TRY(get_number(rope, where, "attention_factor", 1e-6, 1e6, 0, &out->attention_factor));
    TRY(get_number(rope, where, "mscale", -1e6, 1e6, 0, &out->mscale));
    TRY(get_number(rope, where, "mscale_all_dim", -1e6, 1e6, 0, &out->mscale_all_dim));
    TRY(get_number(rope, where, "beta_fast", 0, 1e6, 0, &out->beta_fast));
    TRY(get_number(rope, where, "beta_slow", 0, 1e6, 0, &out->beta_slow));
    if (out->beta_fast == 0) /* transformers takes 0 for "not given" */
        out->beta_fast = 32;
    if (out->beta_slow == 0)
        out->beta_slow = 1;
    if (out->beta_fast < out->beta_slow)
        return status_fail(STATUS_BAD_INPUT, "%s: beta_fast %g is below beta_slow %g", where, out->beta_fast, out->beta_slow);
    return json_get_bool_or(rope, where, "truncate", true, &out->truncate);
}

static status read_llama3(const cJSON *rope, const char *where, rope_config *out)
{
    static const char *const keys[] = {"low_freq_factor", "high_freq_factor"};
    for (int i = 0; i < 2; i++)
        if (!json_find(rope, keys[i]))
            return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, keys[i]);
    TRY(get_number(rope, where, keys[0], 1e-6, 1e6, 0, &out->low_freq_factor));
    TRY(get_number(rope, where, keys[1], 1e-6, 1e6, 0, &out->high_freq_factor));
    if (out->high_freq_factor <= out->low_freq_factor)
        return status_fail(STATUS_BAD_INPUT, "%s: high_freq_factor %g is not above low_freq_factor %g", where,
                           out->high_freq_factor, out->low_freq_factor);
    return STATUS_OK;
}

/* The length the model was trained on before scaling, and the factor; missing ones are inferred as transformers does. */
static status read_stretch(const cJSON *json, const cJSON *rope, const char *where, int max_positions, rope_config *out)
{
    static const char *const original = "original_max_position_embeddings";
    const cJSON *from = json_find(json, original) ? json : rope; /* Phi's place for it, which transformers lets win */
    int positions = max_positions;
    if (out->kind == ROPE_YARN || out->kind == ROPE_LLAMA3)
        TRY(get_size(from, where, original, MAX_POSITIONS, max_positions, &positions));
    out->original_positions = positions;
    if (!json_find(rope, "factor")) {
        if (out->kind != ROPE_YARN || !json_find(from, original))
            return status_fail(STATUS_BAD_INPUT, "%s: factor is missing", where);
        out->factor = (double)max_positions / positions;
        return STATUS_OK;
    }
    return get_number(rope, where, "factor", 1, 1e6, 1, &out->factor);
}

/* How far a server lets sequences grow. vLLM and SGLang agree for linear (max_position_embeddings * factor) and llama3
 * (max_position_embeddings, already extended). For yarn vLLM takes original * factor, SGLang max_position_embeddings; the two are
 * equal in a tidy config, and where a user only added rope_scaling (as Qwen's model cards tell them to) the larger is meant.
 * Dynamic scaling beyond max_position_embeddings would turn the keys already cached, so we stay within it. */
static status stretch_positions(const char *where, model_config *c)
{
    double n = c->max_positions;
    if (c->rope.kind == ROPE_LINEAR)
        n *= c->rope.factor;
    if (c->rope.kind == ROPE_YARN)
        n = fmax(n, c->rope.original_positions * c->rope.factor);
    if (n > MAX_POSITIONS)
        return status_fail(STATUS_UNSUPPORTED, "%s: factor %g makes %.0f positions, more than %d", where, c->rope.factor, n,
                           MAX_POSITIONS);
    c->max_positions = (int)n;
    return STATUS_OK;
}

static status read_rope(const cJSON *json, const char *where, model_config *c)
{
    TRY(get_size(json, where, "max_position_embeddings", MAX_POSITIONS, c->family->defaults.max_positions, &c->max_positions));
    TRY(get_number(json, where, "rope_theta", 1.0001, 1e30, c->family->defaults.rope_theta, &c->rope.theta));
    if (!is_neutral(json, "partial_rotary_factor", 1))
        return unsupported(where, "partial_rotary_factor", c);
    const char *key = NULL;
    const cJSON *rope = NULL;
    TRY(find_rope(json, where, &key, &rope));
    if (!rope)
        return STATUS_OK;
    char place[512];
    snprintf(place, sizeof place, "%.450s: %s", where, key);
    TRY(check_rope_keys(rope, place));
    if (!is_neutral(rope, "partial_rotary_factor", 1))
        return unsupported(place, "partial_rotary_factor", c);
    TRY(get_number(rope, place, "rope_theta", 1.0001, 1e30, c->rope.theta, &c->rope.theta));
    TRY(read_rope_kind(rope, place, &c->rope.kind));
    if (c->rope.kind == ROPE_DEFAULT)
        return STATUS_OK;
    TRY(read_stretch(json, rope, place, c->max_positions, &c->rope));
    if (c->rope.kind == ROPE_YARN)
        TRY(read_yarn(rope, place, &c->rope));
    if (c->rope.kind == ROPE_LLAMA3)
        TRY(read_llama3(rope, place, &c->rope));
    return stretch_positions(place, c);
}

/* ---- end of text ---- */

static status add_eos(const cJSON *item, const char *where, model_config *c)
{
    int64_t id = 0;
    TRY(json_item_int(item, where, c->n_eos_ids, -1, INT_MAX, &id));
    if (id < 0 || id >= c->vocab) /* no such token is ever sampled; published configs hold such ids */
        return STATUS_OK;
    if (c->n_eos_ids == (int)(sizeof c->eos_ids / sizeof *c->eos_ids))
        return status_fail(STATUS_UNSUPPORTED, "%s: more than %d ids", where, c->n_eos_ids);
    c->eos_ids[c->n_eos_ids++] = (int)id;
    return STATUS_OK;
}

/* One number or a list of them; leaves what was there when the key is missing. */
static status read_eos(const cJSON *json, const char *where, model_config *c)
{
    const cJSON *eos = json_find(json, "eos_token_id");
    if (!eos)
        return STATUS_OK;
    char place[512];
    snprintf(place, sizeof place, "%.450s: eos_token_id", where);
    c->n_eos_ids = 0;
    if (!cJSON_IsArray(eos))
        return add_eos(eos, place, c);
    const cJSON *item;
    cJSON_ArrayForEach(item, eos) TRY(add_eos(item, place, c));
    return STATUS_OK;
}

/* ---- the whole ---- */

static status read_config(const cJSON *json, const char *where, model_config *c)
{
    TRY(read_family(json, where, c));
    TRY(refuse_quantised(json, where));
    TRY(refuse_keys(json, where, c));
    TRY(read_activation(json, where));
    TRY(read_sizes(json, where, c));
    TRY(read_attention(json, where, c));
    TRY(read_experts(json, where, c));
    TRY(read_rope(json, where, c));
    c->moe_layer = calloc((size_t)c->n_layers, sizeof *c->moe_layer);
    c->window = calloc((size_t)c->n_layers, sizeof *c->window);
    if (!c->moe_layer || !c->window)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers", where, c->n_layers);
    TRY(read_moe_layers(json, where, c));
    TRY(read_windows(json, where, c));
    if (c->family->defaults.eos_id > 0 && c->family->defaults.eos_id < c->vocab && !cJSON_HasObjectItem(json, "eos_token_id"))
        c->eos_ids[c->n_eos_ids++] = c->family->defaults.eos_id;
    return read_eos(json, where, c);
}

status model_config_parse(const char *where, const char *text, size_t size, model_config *out)
{
    cJSON *json = NULL;
    model_config config = {0};
    TRY(json_parse(where, text, size, &json));
    status st = read_config(json, where, &config);
    cJSON_Delete(json);
    if (st != STATUS_OK) {
        model_config_clear(&config);
        return st;
    }
    *out = config;
    return STATUS_OK;
}

/* The folder's own name: "models/demo/" and "." are taken for what they lead to. */
static void name_after(const char *dir, model_config *c)
{
    char real[PATH_MAX];
    const char *path = realpath(dir, real) ? real : dir;
    const char *slash = strrchr(path, '/');
    snprintf(c->name, sizeof c->name, "%.*s", (int)sizeof c->name - 1, slash && slash[1] ? slash + 1 : path);
}

static status read_generation_config(const char *dir, model_config *c)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    if (access(path, F_OK) != 0)
        return STATUS_OK;
    cJSON *json = NULL;
    TRY(json_read_file(path, CONFIG_BYTES_MAX, &json));
    status st = read_eos(json, path, c);
    cJSON_Delete(json);
    return st;
}

status model_config_read(const char *dir, model_config *out)
{
    char path[PATH_MAX];
    cJSON *json = NULL;
    model_config config = {0};
    snprintf(path, sizeof path, "%s/config.json", dir);
    TRY(json_read_file(path, CONFIG_BYTES_MAX, &json));
    status st = read_config(json, path, &config);
    cJSON_Delete(json);
    if (st == STATUS_OK)
        st = read_generation_config(dir, &config);
    if (st != STATUS_OK) {
        model_config_clear(&config);
        return st;
    }
    name_after(dir, &config);
    *out = config;
    return STATUS_OK;
}

void model_config_clear(model_config *config)
{
    free(config->moe_layer);
    free(config->window);
    *config = (model_config){0};
}
