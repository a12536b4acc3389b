/* checkpoint.c - opens the shards, checks every tensor's header, binds the weights, and sees to it that a rank's memory holds its own
 * share only.
 *
 * Mapped weights: Linux answers a page fault with the 16 pages around it (when the page cache has them), and reads up to
 * megabytes ahead from disk. Left alone, a rank would so take in the edges of its neighbours' experts, which for small experts is
 * most of them. A fault never maps beyond its memory area, though, and advice splits areas; so all is RANDOM (nothing is read ahead) but
 * the stretches that this rank needs, each of which becomes an area of its own:
 *
 *     file   | header | shared tensors | expert 0 | expert 1 | expert 2 | ...        this rank holds expert 1
 *     advice | RANDOM | WILLNEED       | RANDOM   | WILLNEED | RANDOM   |
 *
 * Copied weights: one anonymous area for everything bound; the source pages are given back as the copy proceeds. */
#include "worker/checkpoint.h"

#include "proto/json.h"
#include "proto/safetensors.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define INDEX_BYTES_MAX ((size_t)256 << 20)
#define MAX_AREAS 8192 /* a process may have 65,530 memory areas in all */
#define COPY_ALIGN 64

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
    bool bound;
};

/* ---- opening ---- */

static status add_shard(checkpoint *ck, const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", ck->dir, name);
    shard *grown = realloc(ck->shards, ((size_t)ck->n_shards + 1) * sizeof *grown);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
    ck->shards = grown;
    shard *s = &grown[ck->n_shards];
    *s = (shard){0};
    TRY(safetensors_open(path, &s->file));
    ck->n_shards++;
    s->use = calloc((size_t)safetensors_count(s->file) + 1, 1);
    return s->use ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
}

typedef struct {
    const char *tensor, *file;
    int shard;
} index_entry;

static int by_file(const void *left, const void *right)
{
    return strcmp(((const index_entry *)left)->file, ((const index_entry *)right)->file);
}

static int by_tensor(const void *left, const void *right)
{
    return strcmp(((const index_entry *)left)->tensor, ((const index_entry *)right)->tensor);
}

static status read_index_entries(const cJSON *map, const char *path, index_entry **out, int *count)
{
    int n = cJSON_GetArraySize(map);
    index_entry *entries = calloc((size_t)n + 1, sizeof *entries);
    if (!entries)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its %d entries", path, n);
    *out = entries;
    *count = n;
    const cJSON *item;
    int i = 0;
    cJSON_ArrayForEach(item, map)
    {
        const char *file = cJSON_IsString(item) ? item->valuestring : "";
        /* A shard lies beside its index: anything that could lead elsewhere is no shard's name. */
        if (!*file || strchr(file, '/') || !strcmp(file, ".") || !strcmp(file, ".."))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s: \"%.100s\" is not the name of a file in this folder", path,
                               item->string, file);
        entries[i++] = (index_entry){item->string, file, -1};
    }
    return STATUS_OK;
}

static status open_listed_shards(checkpoint *ck, const char *path, index_entry *entries, int n)
{
    qsort(entries, (size_t)n, sizeof *entries, by_file);
    for (int i = 0; i < n; i++) {
        if (i == 0 || strcmp(entries[i].file, entries[i - 1].file)) {
            char shard_path[PATH_MAX];
            snprintf(shard_path, sizeof shard_path, "%s/%s", ck->dir, entries[i].file);
            if (access(shard_path, F_OK) != 0)
                return status_fail(STATUS_IO, "%s: shard %.200s, which it names, is missing", path, entries[i].file);
            TRY(add_shard(ck, entries[i].file));
        }
        entries[i].shard = ck->n_shards - 1;
    }
    return STATUS_OK;
}

static status report_unlisted(const checkpoint *ck, const char *path, const index_entry *entries, int n)
{
    for (int s = 0; s < ck->n_shards; s++)
        for (int i = 0; i < safetensors_count(ck->shards[s].file); i++) {
            index_entry key = {.tensor = safetensors_at(ck->shards[s].file, i)->name};
            const index_entry *found = bsearch(&key, entries, (size_t)n, sizeof *entries, by_tensor);
            if (!found || found->shard != s)
                return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s in %.200s is not listed", path, key.tensor,
                                   safetensors_path(ck->shards[s].file));
        }
    return STATUS_OK;
}

/* The index and the shards must tell the same: each listed tensor in its shard, and none besides. */
static status check_index(const checkpoint *ck, const char *path, index_entry *entries, int n)
{
    qsort(entries, (size_t)n, sizeof *entries, by_tensor);
    long long stored = 0;
    for (int s = 0; s < ck->n_shards; s++)
        stored += safetensors_count(ck->shards[s].file);
    for (int i = 0; i < n; i++) {
        if (i && !strcmp(entries[i].tensor, entries[i - 1].tensor))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is listed twice", path, entries[i].tensor);
        if (safetensors_find(ck->shards[entries[i].shard].file, entries[i].tensor))
            continue;
        for (int s = 0; s < ck->n_shards; s++)
            if (safetensors_find(ck->shards[s].file, entries[i].tensor))
                return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is said to be in %.100s, but it is in %.300s", path,
                                   entries[i].tensor, entries[i].file, safetensors_path(ck->shards[s].file));
        return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is not in %.100s, which is said to hold it", path,
                           entries[i].tensor, entries[i].file);
    }
    return stored == n ? STATUS_OK : report_unlisted(ck, path, entries, n);
}

static status open_sharded(checkpoint *ck, const char *path)
{
    cJSON *json = NULL;
    TRY(json_read_file(path, INDEX_BYTES_MAX, &json));
    index_entry *entries = NULL;
    int n = 0;
    const cJSON *map = cJSON_IsObject(json) ? json_find(json, "weight_map") : NULL;
    status st = cJSON_IsObject(map) ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: weight_map is missing or not an object", path);
    if (st == STATUS_OK)
        st = read_index_entries(map, path, &entries, &n);
    if (st == STATUS_OK)
        st = open_listed_shards(ck, path, entries, n);
    if (st == STATUS_OK)
        st = check_index(ck, path, entries, n);
    free(entries);
    cJSON_Delete(json);
    return st;
}

static status open_files(checkpoint *ck)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/model.safetensors", ck->dir);
    if (access(path, F_OK) == 0)
        return add_shard(ck, "model.safetensors");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", ck->dir);
    if (access(path, F_OK) == 0)
        return open_sharded(ck, path);
    return status_fail(STATUS_IO, "%s: holds neither model.safetensors nor model.safetensors.index.json", ck->dir);
}

status checkpoint_open(const char *dir, const model_config *config, checkpoint **out)
{
    checkpoint *ck = calloc(1, sizeof *ck);
    if (!ck)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", dir);
    ck->config = config;
    ck->dir = strdup(dir);
    status st = ck->dir ? open_files(ck) : status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", dir);
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

/* ---- advice to the system, on whole pages ---- */

/* Advice only: where the system takes none of it, everything works, with more memory or more reading. */
static void advise(const void *from, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)from & ~(page - 1), end = (uintptr_t)from + n;
    madvise((void *)begin, (end - begin + page - 1) & ~(page - 1), advice);
}

static void advise_shards(const checkpoint *ck, int advice)
{
    for (int s = 0; s < ck->n_shards; s++) {
        size_t size;
        const void *map = safetensors_mapping(ck->shards[s].file, &size);
        advise(map, size, advice);
    }
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

/* The shard of a tensor, or -1; *view is set when it is there. */
static int find_tensor(checkpoint *ck, const char *name, const tensor_view **view)
{
    for (int i = 0; i < ck->n_shards; i++) {
        int s = (ck->last_shard + i) % ck->n_shards;
        *view = safetensors_find(ck->shards[s].file, name);
        if (*view) {
            ck->last_shard = s;
            return s;
        }
    }
    return -1;
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
    return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s has shape %s, config.json makes it %s", path, view->name, found, expected);
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
        if (find_tensor(ck, fused, &view) >= 0)
            return status_fail(STATUS_UNSUPPORTED, "%s: tensor %s holds all experts in one, which is not supported", ck->dir, fused);
    }
    return status_fail(STATUS_BAD_INPUT, "%s: tensor %s is missing", ck->dir, name);
}

/* Finds and checks one tensor of up to two dimensions (n_in 0: one). */
static status find_checked(checkpoint *ck, const char *name, int n_out, int n_in, const tensor_view **view, weight_format *format)
{
    int s = find_tensor(ck, name, view);
    if (s < 0)
        return report_missing(ck, name);
    const char *path = safetensors_path(ck->shards[s].file);
    TRY(check_shape(path, *view, n_in ? 2 : 1, (int64_t[]){n_out, n_in}));
    return check_format(path, *view, format);
}

/* ---- binding ---- */

/* `ours` false: checked like all, but data stays NULL. */
static status bind_matrix(checkpoint *ck, const char *name, int n_out, int n_in, bool ours, weight_matrix *out)
{
    const tensor_view *view = NULL;
    weight_format format = FORMAT_F32;
    TRY(find_checked(ck, name, n_out, n_in, &view, &format));
    mark(ck, view, ours);
    *out = (weight_matrix){ours ? view->data : NULL, format, n_out, n_in};
    ck->weights.total_bytes += view->n_bytes;
    return STATUS_OK;
}

static status bind_shared(checkpoint *ck, const char *name, int n_out, int n_in, weight_matrix *out)
{
    TRY(bind_matrix(ck, name, n_out, n_in, true, out));
    ck->weights.shared_bytes += (size_t)n_out * (size_t)n_in * weight_format_size(out->format);
    return STATUS_OK;
}

static status refuse_infinite(const checkpoint *ck, const char *name, const float *values, size_t n, size_t first)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(values[i]))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %s holds %s at %zu", safetensors_path(ck->shards[ck->last_shard].file),
                               name, isnan(values[i]) ? "NaN" : "an infinity", first + i);
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
    advise(view->data, view->n_bytes, MADV_WILLNEED);
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
    advise(out->data, (size_t)n_out * row_bytes, MADV_WILLNEED);
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
    char name[NAME_SIZE];
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_gate_name, e), c->expert_inter, c->hidden, ours, &w->gate));
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_up_name, e), c->expert_inter, c->hidden, ours, &w->up));
    TRY(bind_matrix(ck, expert_name(name, l, f->expert_down_name, e), c->hidden, c->expert_inter, ours, &w->down));
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
    advise(a->data, a->n_bytes, MADV_WILLNEED);
    advise(b->data, b->n_bytes, MADV_WILLNEED);
    return !memcmp(a->data, b->data, a->n_bytes);
}

/* Tied embeddings as transformers 5 ties them: a stored head that differs from the embedding is used as it is; where only one of the two
 * is stored it serves as both. */
static status bind_embeddings(checkpoint *ck)
{
    static const char *const embedding_name = "model.embed_tokens.weight", *const head_name = "lm_head.weight";
    const model_config *c = ck->config;
    model_weights *w = &ck->weights;
    const tensor_view *embedding = NULL, *head = NULL;
    bool has_embedding = find_tensor(ck, embedding_name, &embedding) >= 0;
    bool has_head = find_tensor(ck, head_name, &head) >= 0;
    if (!c->tied_embeddings || has_embedding || !has_head)
        TRY(bind_shared(ck, embedding_name, c->vocab, c->hidden, &w->embedding));
    else
        TRY(bind_shared(ck, head_name, c->vocab, c->hidden, &w->embedding));
    w->head = w->embedding;
    if (c->tied_embeddings && !(has_embedding && has_head))
        return STATUS_OK;
    if (c->tied_embeddings && same_bytes(embedding, head)) {
        find_tensor(ck, head_name, &head);
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
                return status_fail(STATUS_UNSUPPORTED, "%s: tensor %.200s would not be used: config.json describes a %s model without it",
                                   safetensors_path(file), name, ck->config->family->model_type);
        }
    }
    return STATUS_OK;
}

/* ---- mapped: advice ---- */

typedef void (*stretch_fn)(char *begin, char *end, bool ours, void *context);

/* Calls `fn` for each maximal stretch of whole pages that is ours or not, in file order. A gap below min_gap counts as ours. */
static void walk_stretches(const shard *s, size_t page, size_t min_gap, stretch_fn fn, void *context)
{
    size_t size;
    uintptr_t start = (uintptr_t)safetensors_mapping(s->file, &size), end = start + size, done = start;
    uintptr_t gap = start; /* where the bytes that are not ours began */
    for (int i = 0; i <= safetensors_count(s->file); i++) {
        const tensor_view *view = i < safetensors_count(s->file) ? safetensors_at(s->file, i) : NULL;
        if (view && s->use[i] != TENSOR_OURS)
            continue;
        uintptr_t next = view ? (uintptr_t)view->data : end;
        uintptr_t from = (gap + page - 1) & ~(page - 1), to = view ? next & ~(page - 1) : (end + page - 1) & ~(page - 1);
        if (to > from && to - from >= min_gap) {
            if (from > done)
                fn((char *)done, (char *)from, true, context);
            fn((char *)from, (char *)to, false, context);
            done = to;
        }
        gap = view ? next + view->n_bytes : end;
    }
    if (end > done)
        fn((char *)done, (char *)((end + page - 1) & ~(page - 1)), true, context);
}

static void count_stretch(char *begin, char *end, bool ours, void *context)
{
    (void)begin, (void)end, (void)ours;
    ++*(int *)context;
}

static void advise_stretch(char *begin, char *end, bool ours, void *context)
{
    const bool *will_need = context;
    size_t n = (size_t)(end - begin);
    if (!ours) {
        madvise(begin, n, MADV_DONTNEED); /* what faults while binding brought in beside their target */
        return;
    }
    madvise(begin, n, MADV_NORMAL);
    if (*will_need)
        madvise(begin, n, MADV_WILLNEED);
}

static size_t memory_available(void)
{
    FILE *from = fopen("/proc/meminfo", "r");
    char line[256];
    unsigned long long kib = 0;
    while (from && fgets(line, sizeof line, from))
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            break;
    if (from)
        fclose(from);
    return (size_t)kib * 1024;
}

static void advise_mapping(const checkpoint *ck)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), min_gap = page;
    for (int n = INT_MAX; n > MAX_AREAS; min_gap *= 2) {
        n = 0;
        for (int s = 0; s < ck->n_shards; s++)
            walk_stretches(&ck->shards[s], page, min_gap, count_stretch, &n);
        if (n <= MAX_AREAS)
            break;
    }
    /* Reading ahead what does not fit would only push out what is there. */
    bool will_need = ck->weights.shared_bytes + ck->weights.expert_bytes <= memory_available() / 2;
    for (int s = 0; s < ck->n_shards; s++)
        walk_stretches(&ck->shards[s], page, min_gap, advise_stretch, &will_need);
}

/* ---- copied ---- */

typedef status (*matrix_fn)(checkpoint *ck, weight_matrix *matrix);

static size_t matrix_bytes(const weight_matrix *m)
{
    return (size_t)m->n_out * (size_t)m->n_in * weight_format_size(m->format);
}

static status each_of(checkpoint *ck, weight_matrix *const *list, size_t n, matrix_fn fn)
{
    for (size_t i = 0; i < n; i++)
        if (list[i]->data)
            TRY(fn(ck, list[i]));
    return STATUS_OK;
}

/* All matrices bound, in the order a step reads them; a tied head once, as the embedding. */
static status for_each_matrix(checkpoint *ck, matrix_fn fn)
{
    model_weights *w = &ck->weights;
    bool tied = w->head.data == w->embedding.data;
    TRY(fn(ck, &w->embedding));
    for (int l = 0; l < ck->config->n_layers; l++) {
        layer_weights *y = &w->layers[l];
        weight_matrix *const list[] = {&y->q,           &y->k,          &y->v,           &y->o,         &y->router,   &y->dense.gate,
                                       &y->dense.up,    &y->dense.down, &y->shared.gate, &y->shared.up, &y->shared.down,
                                       &y->shared_scale};
        TRY(each_of(ck, list, sizeof list / sizeof *list, fn));
        for (int e = 0; y->experts && e < ck->config->n_experts; e++) {
            weight_matrix *const parts[] = {&y->experts[e].gate, &y->experts[e].up, &y->experts[e].down};
            TRY(each_of(ck, parts, 3, fn));
        }
    }
    if (!tied)
        return fn(ck, &w->head);
    w->head = w->embedding;
    return STATUS_OK;
}

static status count_matrix(checkpoint *ck, weight_matrix *m)
{
    ck->copy_size += (matrix_bytes(m) + COPY_ALIGN - 1) / COPY_ALIGN * COPY_ALIGN;
    return STATUS_OK;
}

static status copy_matrix(checkpoint *ck, weight_matrix *m)
{
    size_t n = matrix_bytes(m);
    const void *from = m->data;
    unsigned char *to = ck->copy + ck->copy_used;
    advise(from, n, MADV_WILLNEED);
    memcpy(to, from, n);
    advise(from, n, MADV_DONTNEED); /* stays in the page cache for other ranks, but counts for this one no more */
    m->data = to;
    ck->copy_used += (n + COPY_ALIGN - 1) / COPY_ALIGN * COPY_ALIGN;
    return STATUS_OK;
}

static status copy_weights(checkpoint *ck)
{
    TRY(for_each_matrix(ck, count_matrix));
    void *area = mmap(NULL, ck->copy_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) {
        size_t wanted = ck->copy_size;
        ck->copy_size = 0;
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to copy %zu bytes of weights (%s)", ck->dir, wanted, strerror(errno));
    }
    ck->copy = area;
    madvise(area, ck->copy_size, MADV_HUGEPAGE);
    TRY(for_each_matrix(ck, copy_matrix));
    assert(ck->copy_used == ck->copy_size);
    advise_shards(ck, MADV_DONTNEED); /* and what was mapped beside the copied bytes */
    return STATUS_OK;
}

/* ---- the whole ---- */

status checkpoint_bind(checkpoint *ck, const unsigned char *holds, weights_mode mode, const model_weights **out)
{
    assert(!ck->bound); /* once only: the weights handed out live in `ck` */
    ck->bound = true;
    /* Binding reads a few small tensors all over the file: no reading ahead beside them. */
    advise_shards(ck, MADV_RANDOM);
    TRY(bind_all(ck, holds));
    TRY(refuse_leftovers(ck));
    if (mode == WEIGHTS_COPY)
        TRY(copy_weights(ck));
    else
        advise_mapping(ck);
    *out = &ck->weights;
    return STATUS_OK;
}

static bool is_mapped_here(const checkpoint *ck, uintptr_t address)
{
    for (int s = 0; s < ck->n_shards; s++) {
        size_t size;
        uintptr_t start = (uintptr_t)safetensors_mapping(ck->shards[s].file, &size);
        if (address >= start && address < start + size)
            return true;
    }
    return false;
}

size_t checkpoint_resident_bytes(const checkpoint *ck)
{
    FILE *from = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long long begin, end, kib, total = ck->copy_used; /* copies are touched whole */
    bool ours = false;
    while (from && fgets(line, sizeof line, from)) {
        if (sscanf(line, "%llx-%llx ", &begin, &end) == 2)
            ours = is_mapped_here(ck, (uintptr_t)begin);
        else if (ours && sscanf(line, "Rss: %llu kB", &kib) == 1)
            total += kib * 1024;
    }
    if (from)
        fclose(from);
    return (size_t)total;
}
