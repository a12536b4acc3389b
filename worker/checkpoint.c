/* checkpoint.c - checks the header of every tensor the model needs and binds it to its place. */
#include "worker/checkpoint_parts.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

status checkpoint_open(const char *dir, const model_config *config, checkpoint **out)
{
    checkpoint *ck = calloc(1, sizeof *ck);
    if (!ck)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", dir);
    ck->config = config;
    ck->dir = strdup(dir);
    status st = ck->dir ? checkpoint_open_files(ck) : status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", dir);
    if (st != STATUS_OK) {
        checkpoint_close(ck);
        return st;
    }
    *out = ck;
    return STATUS_OK;
}

void checkpoint_close(checkpoint *ck)
{
    if (!ck)
        return;
    for (int s = 0; s < ck->n_shards; s++) {
        safetensors_close(ck->shards[s].file);
        free(ck->shards[s].use);
    }
    for (int i = 0; i < ck->n_owned; i++)
        free(ck->owned[i]);
    if (ck->copy)
        munmap(ck->copy, ck->copy_size);
    free(ck->owned);
    free(ck->shards);
    free(ck->dir);
    free(ck);
}

/* ---- finding and checking one tensor ---- */

/* A zeroed block that lives as long as the checkpoint. */
static status own_block(checkpoint *ck, size_t n, size_t size, void *out)
{
    if (ck->n_owned == ck->room_owned) {
        int room = ck->room_owned ? 2 * ck->room_owned : 64;
        void **grown = realloc(ck->owned, (size_t)room * sizeof *grown);
        if (!grown)
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for its tables", ck->dir);
        ck->owned = grown;
        ck->room_owned = room;
    }
    void *block = calloc(n ? n : 1, size);
    if (!block)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its tables", ck->dir);
    ck->owned[ck->n_owned++] = block;
    memcpy(out, &block, sizeof block);
    return STATUS_OK;
}

static void mark(checkpoint *ck, const tensor_view *view, bool ours)
{
    const shard *s = &ck->shards[ck->last_shard];
    s->use[view - safetensors_at(s->file, 0)] = ours ? TENSOR_OURS : TENSOR_ELSEWHERE;
}

static void print_shape(char *text, size_t size, const int64_t *shape, int n_dims)
{
    size_t n = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < n_dims && n < size; i++)
        n += (size_t)snprintf(text + n, size - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (n < size)
        snprintf(text + n, size - n, "]");
}

static status check_shape(const char *path, const tensor_view *view, int n_dims, const int64_t *shape)
{
    if (view->n_dims == n_dims && !memcmp(view->shape, shape, (size_t)n_dims * sizeof *shape))
        return STATUS_OK;
    char found[192], expected[64];
    print_shape(found, sizeof found, view->shape, view->n_dims);
    print_shape(expected, sizeof expected, shape, n_dims);
    return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s has shape %s, config.json makes it %s", path, view->name, found,
                       expected);
}

static status check_format(const char *path, const tensor_view *view, weight_format *format)
{
    switch (view->dtype) {
    case DTYPE_F32:
        *format = FORMAT_F32;
        return STATUS_OK;
    case DTYPE_F16:
        *format = FORMAT_F16;
        return STATUS_OK;
    case DTYPE_BF16:
        *format = FORMAT_BF16;
        return STATUS_OK;
    default:
        return status_fail(STATUS_UNSUPPORTED, "%s: tensor %.200s is %s; supported are BF16, F16 and F32", path, view->name,
                           tensor_dtype_name(view->dtype));
    }
}

static status report_missing(checkpoint *ck, const char *name)
{
    const tensor_view *view;
    char fused[256];
    const char *experts = strstr(name, ".experts.");
    if (experts) {
        snprintf(fused, sizeof fused, "%.*s.experts.gate_up_proj", (int)(experts - name), name);
        if (checkpoint_find(ck, fused, &view) >= 0)
            return status_fail(STATUS_UNSUPPORTED, "%s: tensor %s holds all experts in one, which is not supported", ck->dir,
                               fused);
    }
    return status_fail(STATUS_BAD_INPUT, "%s: tensor %s is missing", ck->dir, name);
}

/* Finds and checks one tensor of up to two dimensions (n_in 0: one). */
static status find_checked(checkpoint *ck, const char *name, int n_out, int n_in, const tensor_view **view, weight_format *format)
{
    int s = checkpoint_find(ck, name, view);
    if (s < 0)
        return report_missing(ck, name);
    const char *path = safetensors_path(ck->shards[s].file);
    TRY(check_shape(path, *view, n_in ? 2 : 1, (int64_t[]){n_out, n_in}));
    return check_format(path, *view, format);
}

/* ---- binding ---- */

/* `ours` false: checked like all, but data stays NULL. `stored` (or NULL): where the file has it. */
static status bind_matrix(checkpoint *ck, const char *name, int n_out, int n_in, bool ours, const void **stored,
                          weight_matrix *out)
{
    const tensor_view *view = NULL;
    weight_format format = FORMAT_F32;
    TRY(find_checked(ck, name, n_out, n_in, &view, &format));
    mark(ck, view, ours);
    *out = (weight_matrix){ours ? view->data : NULL, format, n_out, n_in};
    if (stored)
        *stored = view->data;
    ck->weights.total_bytes += view->n_bytes;
    return STATUS_OK;
}

static status bind_shared(checkpoint *ck, const char *name, int n_out, int n_in, weight_matrix *out)
{
    TRY(bind_matrix(ck, name, n_out, n_in, true, NULL, out));
    ck->weights.shared_bytes += (size_t)n_out * (size_t)n_in * weight_format_size(out->format);
    return STATUS_OK;
}

static status refuse_infinite(const checkpoint *ck, const char *name, const float *values, size_t n, size_t first)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(values[i]))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %s holds %s at %zu",
                               safetensors_path(ck->shards[ck->last_shard].file), name, isnan(values[i]) ? "NaN" : "an infinity",
                               first + i);
    return STATUS_OK;
}

/* A small vector, as an fp32 copy. A NaN in a norm or bias would reach every token. */
static status bind_vector(checkpoint *ck, const char *name, int n, float **out)
{
    const tensor_view *view = NULL;
    weight_format format = FORMAT_F32;
    TRY(find_checked(ck, name, n, 0, &view, &format));
    mark(ck, view, true);
    TRY(own_block(ck, (size_t)n, sizeof **out, out));
    checkpoint_advise(view->data, view->n_bytes, MADV_WILLNEED);
    weights_to_f32(format, view->data, (size_t)n, *out);
    ck->weights.total_bytes += view->n_bytes;
    ck->weights.shared_bytes += view->n_bytes;
    return refuse_infinite(ck, name, *out, (size_t)n, 0);
}

/* A gate decides where tokens go: a NaN in it is caught here, not in the first token that meets it. */
static status bind_gate(checkpoint *ck, const char *name, int n_out, int n_in, weight_matrix *out)
{
    TRY(bind_shared(ck, name, n_out, n_in, out));
    float *row = malloc((size_t)n_in * sizeof *row);
    if (!row)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to check tensor %s", ck->dir, name);
    status st = STATUS_OK;
    size_t row_bytes = (size_t)n_in * weight_format_size(out->format);
    checkpoint_advise(out->data, (size_t)n_out * row_bytes, MADV_WILLNEED);
    for (int i = 0; i < n_out && st == STATUS_OK; i++) {
        weights_to_f32(out->format, (const char *)out->data + (size_t)i * row_bytes, (size_t)n_in, row);
        st = refuse_infinite(ck, name, row, (size_t)n_in, (size_t)i * (size_t)n_in);
    }
    free(row);
    return st;
}

#define NAME_SIZE 256

__attribute__((format(printf, 3, 4))) static const char *layer_name(char *out, int layer, const char *format, ...)
{
    int n = snprintf(out, NAME_SIZE, "model.layers.%d.", layer);
    va_list args;
    va_start(args, format);
    vsnprintf(out + n, (size_t)(NAME_SIZE - n), format, args);
    va_end(args);
    return out;
}

/* Expert patterns come from the family table, where each has exactly one %d. */
static const char *expert_name(char *out, int layer, const char *pattern, int e)
{
    int n = snprintf(out, NAME_SIZE, "model.layers.%d.", layer);
    snprintf(out + n, (size_t)(NAME_SIZE - n), pattern, e);
    return out;
}

static status bind_attention(checkpoint *ck, int l, layer_weights *w)
{
    const model_config *c = ck->config;
    char name[NAME_SIZE];
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    TRY(bind_vector(ck, layer_name(name, l, "input_layernorm.weight"), c->hidden, &w->attn_norm));
    TRY(bind_vector(ck, layer_name(name, l, "post_attention_layernorm.weight"), c->hidden, &w->mlp_norm));
    TRY(bind_shared(ck, layer_name(name, l, "self_attn.q_proj.weight"), q, c->hidden, &w->q));
    TRY(bind_shared(ck, layer_name(name, l, "self_attn.k_proj.weight"), kv, c->hidden, &w->k));
    TRY(bind_shared(ck, layer_name(name, l, "self_attn.v_proj.weight"), kv, c->hidden, &w->v));
    TRY(bind_shared(ck, layer_name(name, l, "self_attn.o_proj.weight"), c->hidden, q, &w->o));
    if (c->family->qk_norm != QK_NORM_NONE) {
        bool whole = c->family->qk_norm == QK_NORM_WHOLE;
        TRY(bind_vector(ck, layer_name(name, l, "self_attn.q_norm.weight"), whole ? q : c->head_dim, &w->q_norm));
        TRY(bind_vector(ck, layer_name(name, l, "self_attn.k_norm.weight"), whole ? kv : c->head_dim, &w->k_norm));
    }
    if (c->qkv_bias) {
        TRY(bind_vector(ck, layer_name(name, l, "self_attn.q_proj.bias"), q, &w->q_bias));
        TRY(bind_vector(ck, layer_name(name, l, "self_attn.k_proj.bias"), kv, &w->k_bias));
        TRY(bind_vector(ck, layer_name(name, l, "self_attn.v_proj.bias"), kv, &w->v_bias));
    }
    return c->o_bias ? bind_vector(ck, layer_name(name, l, "self_attn.o_proj.bias"), c->hidden, &w->o_bias) : STATUS_OK;
}

static status bind_expert(checkpoint *ck, int l, int e, bool ours, mlp_weights *w)
{
    const model_config *c = ck->config;
    const model_family *f = c->family;
    const void **at = ck->stored + 3 * ((size_t)l * (size_t)c->n_experts + (size_t)e);
    char name[NAME_SIZE];
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_gate_name, e), c->expert_inter, c->hidden, ours, at, &w->gate));
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_up_name, e), c->expert_inter, c->hidden, ours, at + 1, &w->up));
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_down_name, e), c->hidden, c->expert_inter, ours, at + 2, &w->down));
    size_t bytes = 3 * (size_t)c->expert_inter * (size_t)c->hidden * weight_format_size(w->gate.format);
    if (ours)
        ck->weights.expert_bytes += bytes;
    return STATUS_OK;
}

/* The experts' kernels take one format for a layer's experts, so that rows of several run in one pass. */
static status check_expert_formats(const checkpoint *ck, int l, const mlp_weights *experts)
{
    const model_family *f = ck->config->family;
    char name[NAME_SIZE];
    weight_format format = experts[0].gate.format;
    for (int e = 0; e < ck->config->n_experts; e++) {
        const mlp_weights *w = &experts[e];
        if (w->gate.format == format && w->up.format == format && w->down.format == format)
            continue;
        const char *pattern = w->gate.format != format ? f->expert_gate_name
                              : w->up.format != format ? f->expert_up_name
                                                       : f->expert_down_name;
        return status_fail(STATUS_UNSUPPORTED, "%s: tensor %s has another dtype than the first of the layer's experts", ck->dir,
                           expert_name(name, l, pattern, e));
    }
    return STATUS_OK;
}

static status bind_moe(checkpoint *ck, int l, const unsigned char *holds, layer_weights *w)
{
    const model_config *c = ck->config;
    char name[NAME_SIZE];
    TRY(bind_gate(ck, layer_name(name, l, "%s", c->family->gate_name), c->n_experts, c->hidden, &w->router));
    TRY(own_block(ck, (size_t)c->n_experts, sizeof *w->experts, &w->experts));
    for (int e = 0; e < c->n_experts; e++)
        TRY(bind_expert(ck, l, e, !holds || holds[(size_t)l * (size_t)c->n_experts + (size_t)e], &w->experts[e]));
    return check_expert_formats(ck, l, w->experts);
}

static status bind_block(checkpoint *ck, int l, const char *gate, const char *up, const char *down, int inter, mlp_weights *w)
{
    int hidden = ck->config->hidden;
    char name[NAME_SIZE];
    TRY(bind_shared(ck, layer_name(name, l, "%s", gate), inter, hidden, &w->gate));
    TRY(bind_shared(ck, layer_name(name, l, "%s", up), inter, hidden, &w->up));
    return bind_shared(ck, layer_name(name, l, "%s", down), hidden, inter, &w->down);
}

static status bind_layer(checkpoint *ck, int l, const unsigned char *holds, layer_weights *w)
{
    const model_config *c = ck->config;
    const model_family *f = c->family;
    char name[NAME_SIZE];
    TRY(bind_attention(ck, l, w));
    if (!c->moe_layer[l])
        return bind_block(ck, l, f->dense_gate_name, f->dense_up_name, f->dense_down_name, c->dense_inter, &w->dense);
    TRY(bind_moe(ck, l, holds, w));
    if (!c->shared_inter)
        return STATUS_OK;
    TRY(bind_block(ck, l, f->shared_gate_name, f->shared_up_name, f->shared_down_name, c->shared_inter, &w->shared));
    return f->shared_scale_name ? bind_gate(ck, layer_name(name, l, "%s", f->shared_scale_name), 1, c->hidden, &w->shared_scale)
                                : STATUS_OK;
}

static bool same_bytes(const tensor_view *a, const tensor_view *b)
{
    if (a->dtype != b->dtype || a->n_bytes != b->n_bytes)
        return false;
    checkpoint_advise(a->data, a->n_bytes, MADV_WILLNEED);
    checkpoint_advise(b->data, b->n_bytes, MADV_WILLNEED);
    return !memcmp(a->data, b->data, a->n_bytes);
}

/* Tied embeddings as transformers 5 ties them: a stored head that differs from the embedding is used as it is; where only one of
 * the two is stored it serves as both. */
static status bind_embeddings(checkpoint *ck)
{
    static const char *const embedding_name = "model.embed_tokens.weight", *const head_name = "lm_head.weight";
    const model_config *c = ck->config;
    model_weights *w = &ck->weights;
    const tensor_view *embedding = NULL, *head = NULL;
    bool has_embedding = checkpoint_find(ck, embedding_name, &embedding) >= 0;
    bool has_head = checkpoint_find(ck, head_name, &head) >= 0;
    if (!c->tied_embeddings || has_embedding || !has_head)
        TRY(bind_shared(ck, embedding_name, c->vocab, c->hidden, &w->embedding));
    else
        TRY(bind_shared(ck, head_name, c->vocab, c->hidden, &w->embedding));
    w->head = w->embedding;
    if (c->tied_embeddings && !(has_embedding && has_head))
        return STATUS_OK;
    if (c->tied_embeddings && same_bytes(embedding, head)) {
        checkpoint_find(ck, head_name, &head);
        mark(ck, head, false);
        return STATUS_OK;
    }
    return bind_shared(ck, head_name, c->vocab, c->hidden, &w->head);
}

static status bind_all(checkpoint *ck, const unsigned char *holds)
{
    const model_config *c = ck->config;
    TRY(bind_embeddings(ck));
    TRY(bind_vector(ck, "model.norm.weight", c->hidden, &ck->weights.final_norm));
    TRY(own_block(ck, (size_t)c->n_layers, sizeof *ck->weights.layers, &ck->weights.layers));
    TRY(own_block(ck, 3 * (size_t)c->n_layers * (size_t)c->n_experts, sizeof *ck->stored, &ck->stored));
    for (int l = 0; l < c->n_layers; l++)
        TRY(bind_layer(ck, l, holds, &ck->weights.layers[l]));
    return STATUS_OK;
}

/* ---- tensors that nothing asked for ---- */

/* Whether a name left over speaks of arithmetic that would be left out. Layers the config does not count (draft heads) and
 * other parts (vision towers) are none of the model's; causal masks and rotary tables in old exports are recomputed. */
static bool is_telling(const char *name, int n_layers)
{
    static const char *const words[] = {"bias", "norm", "proj", "expert", "gate", "sink", "scale", "lora", "router"};
    const char *tail = NULL;
    if (!strncmp(name, "model.layers.", 13)) {
        char *end;
        long layer = strtol(name + 13, &end, 10);
        if (layer >= n_layers || *end != '.')
            return false;
        tail = end + 1;
        if (!strcmp(tail, "self_attn.bias") || !strcmp(tail, "self_attn.masked_bias"))
            return false;
    } else if (!strncmp(name, "model.norm", 10) || !strncmp(name, "model.embed", 11)) {
        return true;
    } else if (!strncmp(name, "lm_head.", 8)) {
        return strcmp(name, "lm_head.weight") != 0;
    } else {
        return false;
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strstr(tail, words[i]))
            return true;
    return false;
}

static status refuse_leftovers(const checkpoint *ck)
{
    for (int s = 0; s < ck->n_shards; s++) {
        const safetensors *file = ck->shards[s].file;
        for (int i = 0; i < safetensors_count(file); i++) {
            const char *name = safetensors_at(file, i)->name;
            if (ck->shards[s].use[i] == TENSOR_UNKNOWN && is_telling(name, ck->config->n_layers))
                return status_fail(STATUS_UNSUPPORTED,
                                   "%s: tensor %.200s would not be used: config.json describes a %s model without it",
                                   safetensors_path(file), name, ck->config->family->model_type);
        }
    }
    return STATUS_OK;
}

/* ---- the whole ---- */

status checkpoint_bind(checkpoint *ck, const unsigned char *holds, weights_mode mode, const model_weights **out)
{
    assert(!ck->bound); /* once only: the weights handed out live in `ck` */
    ck->bound = true;
    /* Binding reads a few small tensors all over the file: no reading ahead beside them. */
    checkpoint_advise_all(ck, MADV_RANDOM);
    TRY(bind_all(ck, holds));
    TRY(refuse_leftovers(ck));
    if (mode == WEIGHTS_COPY)
        TRY(checkpoint_copy(ck));
    else
        checkpoint_keep_own(ck);
    *out = &ck->weights;
    return STATUS_OK;
}

void checkpoint_on_progress(checkpoint *ck, checkpoint_listener listener, void *arg)
{
    ck->listener = listener;
    ck->listener_arg = arg;
}
