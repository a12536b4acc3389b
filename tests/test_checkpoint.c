/* Checkpoints: every weight lands where the model wants it, a rank touches its own share only, and no folder, however damaged,
 * does more than fail with one sentence. */
#include "tests/support.h"

#include "proto/clock.h"
#include "proto/safetensors.h"
#include "worker/checkpoint.h"
#include "worker/expert_copies.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- small made-up checkpoints ---- */

typedef struct {
    char name[128];
    tensor_dtype dtype;
    int n_dims;
    int64_t shape[3];
    int shard;
    int poison; /* 1: a NaN in the last element, 2: an infinity */
} spec;

typedef struct {
    spec *list;
    int n;
} model;

#define HIDDEN 16
#define TINY                                                                                                                     \
    "\"hidden_size\": 16, \"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"num_hidden_layers\": 2, \"vocab_size\": 8, " \
    "\"num_experts\": 4, \"num_experts_per_tok\": 2, \"intermediate_size\": 12, \"moe_intermediate_size\": 6"

static model_config config_of(const char *family, const char *keys)
{
    char text[1024];
    model_config c = {0};
    int n = snprintf(text, sizeof text, "{%s \"model_type\": \"%s\", " TINY "}", keys, family);
    if (model_config_parse("config.json", text, (size_t)n, &c) != STATUS_OK)
        fail_msg("%s", status_message());
    return c;
}

static spec *add(model *m, int64_t a, int64_t b, const char *format, ...)
{
    m->list = realloc(m->list, ((size_t)m->n + 1) * sizeof *m->list);
    spec *s = &m->list[m->n++];
    *s = (spec){.dtype = DTYPE_BF16, .n_dims = b ? 2 : 1, .shape = {a, b}};
    va_list args;
    va_start(args, format);
    vsnprintf(s->name, sizeof s->name, format, args);
    va_end(args);
    return s;
}

static void add_mlp(model *m, int layer, const char *place, int64_t inter, int64_t hidden)
{
    add(m, inter, hidden, "model.layers.%d.mlp.%sgate_proj.weight", layer, place);
    add(m, inter, hidden, "model.layers.%d.mlp.%sup_proj.weight", layer, place);
    add(m, hidden, inter, "model.layers.%d.mlp.%sdown_proj.weight", layer, place);
}

static void add_layer(model *m, const model_config *c, int l)
{
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    char place[64];
    add(m, c->hidden, 0, "model.layers.%d.input_layernorm.weight", l);
    add(m, c->hidden, 0, "model.layers.%d.post_attention_layernorm.weight", l);
    add(m, q, c->hidden, "model.layers.%d.self_attn.q_proj.weight", l);
    add(m, kv, c->hidden, "model.layers.%d.self_attn.k_proj.weight", l);
    add(m, kv, c->hidden, "model.layers.%d.self_attn.v_proj.weight", l);
    add(m, c->hidden, q, "model.layers.%d.self_attn.o_proj.weight", l);
    if (c->qkv_bias) {
        add(m, q, 0, "model.layers.%d.self_attn.q_proj.bias", l);
        add(m, kv, 0, "model.layers.%d.self_attn.k_proj.bias", l);
        add(m, kv, 0, "model.layers.%d.self_attn.v_proj.bias", l);
    }
    if (c->o_bias)
        add(m, c->hidden, 0, "model.layers.%d.self_attn.o_proj.bias", l);
    if (c->family->qk_norm == QK_NORM_HEAD) {
        add(m, c->head_dim, 0, "model.layers.%d.self_attn.q_norm.weight", l);
        add(m, c->head_dim, 0, "model.layers.%d.self_attn.k_norm.weight", l);
    }
    if (!c->moe_layer[l]) {
        add_mlp(m, l, "", c->dense_inter, c->hidden);
        return;
    }
    add(m, c->n_experts, c->hidden, "model.layers.%d.mlp.gate.weight", l);
    for (int e = 0; e < c->n_experts; e++) {
        snprintf(place, sizeof place, "experts.%d.", e);
        add_mlp(m, l, place, c->expert_inter, c->hidden);
    }
    if (c->shared_inter) {
        add_mlp(m, l, "shared_expert.", c->shared_inter, c->hidden);
        add(m, 1, c->hidden, "model.layers.%d.mlp.shared_expert_gate.weight", l);
    }
}

/* A Qwen checkpoint as its config says, bf16. */
static model model_of(const model_config *c)
{
    model m = {0};
    add(&m, c->vocab, c->hidden, "model.embed_tokens.weight");
    for (int l = 0; l < c->n_layers; l++)
        add_layer(&m, c, l);
    add(&m, c->hidden, 0, "model.norm.weight");
    if (!c->tied_embeddings)
        add(&m, c->vocab, c->hidden, "lm_head.weight");
    return m;
}

static spec *find(model *m, const char *name)
{
    for (int i = 0; i < m->n; i++)
        if (!strcmp(m->list[i].name, name))
            return &m->list[i];
    fail_msg("the test knows no tensor %s", name);
    return NULL;
}

static void drop(model *m, const char *name)
{
    spec *s = find(m, name);
    memmove(s, s + 1, (size_t)(m->list + m->n - (s + 1)) * sizeof *s);
    m->n--;
}

static size_t spec_bytes(const spec *s)
{
    size_t n = tensor_dtype_size(s->dtype);
    for (int i = 0; i < s->n_dims; i++)
        n *= (size_t)s->shape[i];
    return n;
}

/* Bits that are finite numbers in every float format, the same for the same name. */
static unsigned char *spec_data(const spec *s)
{
    size_t n = spec_bytes(s), width = tensor_dtype_size(s->dtype);
    unsigned char *bytes = malloc(n + 1);
    uint64_t seed = 5;
    for (const char *c = s->name; *c; c++)
        seed = seed * 31 + (unsigned char)*c;
    for (size_t i = 0; i < n; i++)
        bytes[i] = (unsigned char)(support_random(&seed) & (i % width == width - 1 ? 0x3f : 0xff));
    if (s->poison) {
        unsigned char *last = bytes + n - width;
        memset(last, 0, width);
        last[width - 1] = s->dtype == DTYPE_F16 ? 0x7c : 0x7f;
        if (s->dtype != DTYPE_F16)
            last[width - 2] = 0x80;
        if (s->poison == 1)
            last[0] |= 1;
    }
    return bytes;
}

static void write_file(const char *path, const model *m, int shard)
{
    safetensors_writer *writer = NULL;
    int *index = calloc((size_t)m->n, sizeof *index);
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_OK);
    for (int i = 0; i < m->n; i++)
        if (m->list[i].shard == shard)
            assert_int_equal(safetensors_writer_declare(writer, m->list[i].name, m->list[i].dtype, m->list[i].n_dims,
                                                        m->list[i].shape, &index[i]),
                             STATUS_OK);
    assert_int_equal(safetensors_writer_begin(writer), STATUS_OK);
    for (int i = 0; i < m->n; i++)
        if (m->list[i].shard == shard) {
            unsigned char *bytes = spec_data(&m->list[i]);
            assert_int_equal(safetensors_writer_put(writer, index[i], 0, bytes, spec_bytes(&m->list[i])), STATUS_OK);
            free(bytes);
        }
    assert_int_equal(safetensors_writer_finish(writer), STATUS_OK);
    safetensors_writer_destroy(writer);
    free(index);
}

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *to = fopen(path, "wb");
    assert_non_null(to);
    fputs(text, to);
    fclose(to);
}

static status bind_folder(const char *folder, const model_config *c, const unsigned char *holds, weights_mode mode,
                          checkpoint **ck, const model_weights **w)
{
    *ck = NULL;
    TRY(checkpoint_open(folder, c, ck));
    return checkpoint_bind(*ck, holds, mode, w);
}

static status try_model(const model *m, const model_config *c)
{
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, m, 0);
    checkpoint *ck;
    const model_weights *w;
    status st = bind_folder(folder, c, NULL, WEIGHTS_MAP, &ck, &w);
    checkpoint_close(ck);
    support_remove(folder);
    return st;
}

static void expect_refusal(const model *m, const model_config *c, const char *words, const char *more)
{
    if (try_model(m, c) == STATUS_OK)
        fail_msg("taken, though it should have said \"%s\"", words);
    if (!strstr(status_message(), words) || !strstr(status_message(), more) || strchr(status_message(), '\n'))
        fail_msg("\"%s\" does not say \"%s\" and \"%s\"", status_message(), words, more);
}

/* ---- the reference checkpoints ---- */

static const char *const families[] = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"};

/* The tensor as stored, by another way than checkpoint.c's: all shards of the folder opened here. */
typedef struct {
    safetensors *files[4];
    int n;
} stored;

static stored open_stored(const char *folder)
{
    static const char *const names[] = {"model.safetensors", "model-00001-of-00003.safetensors",
                                        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"};
    stored s = {0};
    for (int i = 0; i < 4; i++) {
        char path[4200];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        if (access(path, F_OK) == 0)
            assert_int_equal(safetensors_open(path, &s.files[s.n++]), STATUS_OK);
    }
    return s;
}

static void close_stored(stored *s)
{
    while (s->n)
        safetensors_close(s->files[--s->n]);
}

static const tensor_view *look(const stored *s, const char *format, ...)
{
    char name[256];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    for (int i = 0; i < s->n; i++)
        if (safetensors_find(s->files[i], name))
            return safetensors_find(s->files[i], name);
    fail_msg("%s is not stored", name);
    return NULL;
}

static void same(const weight_matrix *m, const tensor_view *t)
{
    assert_int_equal(m->n_out, t->shape[0]);
    assert_int_equal(m->n_in, t->shape[1]);
    assert_int_equal(m->format, FORMAT_BF16);
    assert_non_null(m->data);
    assert_memory_equal(m->data, t->data, t->n_bytes);
}

static void same_vector(const float *v, const tensor_view *t)
{
    for (int64_t i = 0; i < t->shape[0]; i++) {
        uint16_t half;
        memcpy(&half, (const char *)t->data + 2 * i, 2);
        uint32_t whole = (uint32_t)half << 16;
        assert_memory_equal(&v[i], &whole, 4);
    }
}

static void compare_layer(const model_config *c, const layer_weights *y, const stored *s, int l)
{
    static const char *const mixtral_parts[] = {"w1", "w3", "w2"}, *const parts[] = {"gate_proj", "up_proj", "down_proj"};
    bool mixtral = !strcmp(c->family->model_type, "mixtral");
    const char *block = mixtral ? "block_sparse_moe" : "mlp";
    same_vector(y->attn_norm, look(s, "model.layers.%d.input_layernorm.weight", l));
    same_vector(y->mlp_norm, look(s, "model.layers.%d.post_attention_layernorm.weight", l));
    same(&y->q, look(s, "model.layers.%d.self_attn.q_proj.weight", l));
    same(&y->k, look(s, "model.layers.%d.self_attn.k_proj.weight", l));
    same(&y->v, look(s, "model.layers.%d.self_attn.v_proj.weight", l));
    same(&y->o, look(s, "model.layers.%d.self_attn.o_proj.weight", l));
    same(&y->router, look(s, "model.layers.%d.%s.gate.weight", l, block));
    for (int e = 0; e < c->n_experts; e++) {
        const weight_matrix *ours[] = {&y->experts[e].gate, &y->experts[e].up, &y->experts[e].down};
        for (int i = 0; i < 3; i++)
            if (ours[i]->data)
                same(ours[i],
                     look(s, "model.layers.%d.%s.experts.%d.%s.weight", l, block, e, (mixtral ? mixtral_parts : parts)[i]));
    }
    if (c->qkv_bias) {
        same_vector(y->q_bias, look(s, "model.layers.%d.self_attn.q_proj.bias", l));
        same_vector(y->v_bias, look(s, "model.layers.%d.self_attn.v_proj.bias", l));
    }
    if (c->family->qk_norm != QK_NORM_NONE)
        same_vector(y->k_norm, look(s, "model.layers.%d.self_attn.k_norm.weight", l));
    assert_int_equal(y->q_norm != NULL, c->family->qk_norm != QK_NORM_NONE);
    assert_int_equal(y->k_bias != NULL, c->qkv_bias);
    assert_null(y->o_bias);
    if (c->shared_inter) {
        same(&y->shared.down, look(s, "model.layers.%d.mlp.shared_expert.down_proj.weight", l));
        same(&y->shared_scale, look(s, "model.layers.%d.mlp.shared_expert_gate.weight", l));
    }
}

static void compare_all(weights_mode mode)
{
    for (int i = 0; i < 4; i++) {
        const char *folder = support_data(families[i]);
        model_config c = {0};
        checkpoint *ck;
        const model_weights *w;
        stored s = open_stored(folder);
        assert_int_equal(model_config_read(folder, &c), STATUS_OK);
        if (bind_folder(folder, &c, NULL, mode, &ck, &w) != STATUS_OK)
            fail_msg("%s", status_message());
        same(&w->embedding, look(&s, "model.embed_tokens.weight"));
        same(&w->head, look(&s, "lm_head.weight"));
        same_vector(w->final_norm, look(&s, "model.norm.weight"));
        for (int l = 0; l < c.n_layers; l++)
            compare_layer(&c, &w->layers[l], &s, l);
        size_t all = 0;
        for (int f = 0; f < s.n; f++)
            for (int t = 0; t < safetensors_count(s.files[f]); t++)
                all += safetensors_at(s.files[f], t)->n_bytes;
        assert_int_equal(w->total_bytes, all);
        assert_int_equal(w->shared_bytes + w->expert_bytes, all);
        checkpoint_close(ck);
        close_stored(&s);
        model_config_clear(&c);
    }
}

static void references_mapped(void **state)
{
    (void)state;
    compare_all(WEIGHTS_MAP);
}

static void references_copied(void **state)
{
    (void)state;
    compare_all(WEIGHTS_COPY);
}

static void shares_add_up(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++)
        for (int mode = 0; mode < 2; mode++) {
            model_config c = {0};
            assert_int_equal(model_config_read(support_data(families[i]), &c), STATUS_OK);
            size_t sum = 0, shared = 0, total = 0, n = (size_t)(c.n_layers * c.n_experts);
            unsigned char *holds = malloc(n);
            for (int rank = 0; rank < 3; rank++) {
                checkpoint *ck;
                const model_weights *w;
                for (size_t k = 0; k < n; k++)
                    holds[k] = (k * 7 + k / 5) % 3 == (size_t)rank;
                assert_int_equal(bind_folder(support_data(families[i]), &c, holds, (weights_mode)mode, &ck, &w), STATUS_OK);
                for (size_t k = 0; k < n; k++) {
                    const mlp_weights *e = &w->layers[k / (size_t)c.n_experts].experts[k % (size_t)c.n_experts];
                    assert_int_equal(e->gate.data != NULL, holds[k]);
                    assert_int_equal(e->up.data != NULL, holds[k]);
                    assert_int_equal(e->down.data != NULL, holds[k]);
                }
                sum += w->expert_bytes;
                shared = w->shared_bytes;
                total = w->total_bytes;
                checkpoint_close(ck);
            }
            assert_int_equal(sum + shared, total);
            free(holds);
            model_config_clear(&c);
        }
}

/* ---- what is in memory ---- */

#define WIDE 256 /* experts of 3 * 256 * 128 * 2 bytes = 192 KiB: not far above the 64 KiB that one fault maps */

static size_t touch(const weight_matrix *m)
{
    size_t sum = 0, n = (size_t)m->n_out * (size_t)m->n_in * weight_format_size(m->format);
    for (size_t i = 0; i < n; i += 512)
        sum += ((const volatile unsigned char *)m->data)[i];
    return sum + ((const volatile unsigned char *)m->data)[n - 1];
}

static void only_the_own_share(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200];
    model_config c = config_of("qwen3_moe", "\"num_experts\": 16, \"hidden_size\": 128, \"moe_intermediate_size\": 256,");
    model m = model_of(&c);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, &m, 0);
    unsigned char holds[32];
    for (int k = 0; k < 32; k++)
        holds[k] = k % 4 == 1; /* never two neighbours */
    for (int mode = 0; mode < 2; mode++) {
        checkpoint *ck;
        const model_weights *w;
        assert_int_equal(bind_folder(folder, &c, holds, (weights_mode)mode, &ck, &w), STATUS_OK);
        size_t sum = 0;
        for (int k = 0; k < 32; k++)
            if (holds[k])
                sum += touch(&w->layers[k / 16].experts[k % 16].gate) + touch(&w->layers[k / 16].experts[k % 16].up) +
                       touch(&w->layers[k / 16].experts[k % 16].down);
        assert_true(sum > 0);
        assert_int_equal(w->expert_bytes, 8 * 3 * WIDE * 128 * 2);
        size_t resident = checkpoint_resident_bytes(ck);
        assert_true(resident >= w->expert_bytes);
        /* an expert's stretch may share the page at either end with a neighbour */
        size_t edges = (size_t)sysconf(_SC_PAGESIZE) * 2 * (3 * 8 + 16);
        if (resident > w->expert_bytes + w->shared_bytes + edges)
            fail_msg("mode %d: %zu bytes resident for a share of %zu", mode, resident, w->expert_bytes + w->shared_bytes);
        checkpoint_close(ck);
    }
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

/* ---- experts that come and go ---- */

static void await(expert_copies *c, bool (*there)(expert_copies *c))
{
    for (int i = 0; !there(c); i++) {
        assert_true(i < 10000);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

static bool is_ready(expert_copies *c)
{
    return expert_copies_progress(c).ready;
}

static void read_all_held(const model_weights *w)
{
    size_t sum = 0;
    for (int k = 0; k < 32; k++) {
        const mlp_weights *e = &w->layers[k / 16].experts[k % 16];
        if (e->gate.data)
            sum += touch(&e->gate) + touch(&e->up) + touch(&e->down);
    }
    assert_true(sum > 0);
}

static void assert_holds(const model_weights *w, const model_weights *all, const unsigned char *holds)
{
    for (int k = 0; k < 32; k++) {
        const mlp_weights *e = &w->layers[k / 16].experts[k % 16], *want = &all->layers[k / 16].experts[k % 16];
        assert_int_equal(e->gate.data != NULL, holds[k]);
        if (!holds[k])
            continue;
        assert_memory_equal(e->gate.data, want->gate.data, WIDE * 128 * 2);
        assert_memory_equal(e->up.data, want->up.data, WIDE * 128 * 2);
        assert_memory_equal(e->down.data, want->down.data, WIDE * 128 * 2);
    }
}

static void resident_is(const checkpoint *ck, const model_weights *w, int mode)
{
    size_t resident = checkpoint_resident_bytes(ck), edges = (size_t)sysconf(_SC_PAGESIZE) * 2 * (3 * 16 + 16);
    assert_true(resident >= w->expert_bytes);
    if (resident > w->expert_bytes + w->shared_bytes + edges)
        fail_msg("mode %d: %zu bytes resident for a share of %zu", mode, resident, w->expert_bytes + w->shared_bytes);
}

static void experts_come_and_go(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200];
    static const int layers[] = {0, 1};
    model_config c = config_of("qwen3_moe", "\"num_experts\": 16, \"hidden_size\": 128, \"moe_intermediate_size\": 256,");
    model m = model_of(&c);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, &m, 0);
    checkpoint *reference, *ck;
    const model_weights *all, *w;
    assert_int_equal(bind_folder(folder, &c, NULL, WEIGHTS_MAP, &reference, &all), STATUS_OK);
    for (int mode = 0; mode < 2; mode++) {
        unsigned char holds[32], next[32];
        uint64_t random = 5;
        expert_copies *copies;
        for (int k = 0; k < 32; k++)
            holds[k] = k % 4 == 1;
        assert_int_equal(bind_folder(folder, &c, holds, (weights_mode)mode, &ck, &w), STATUS_OK);
        assert_int_equal(expert_copies_create(ck, &c, layers, holds, &copies), STATUS_OK);
        read_all_held(w);
        for (int round = 0; round < 6; round++) {
            size_t fresh = 0, n = 0;
            for (int k = 0; k < 32; k++) {
                next[k] = (unsigned char)(support_below(&random, 3) == 0);
                fresh += next[k] && !holds[k];
                n += next[k];
            }
            unsigned char other[32]; /* a wish that a newer one takes the place of, slow enough not to be done */
            for (int k = 0; k < 32; k++)
                other[k] = !holds[k];
            if (round % 2 == 1)
                assert_int_equal(expert_copies_wish(copies, other, (uint64_t)1 << 20), STATUS_OK);
            assert_int_equal(expert_copies_wish(copies, next, (uint64_t)1 << 30), STATUS_OK);
            await(copies, is_ready);
            expert_copies_state told = expert_copies_progress(copies);
            assert_true(told.loaded == told.total && !told.failed && told.total <= fresh * 3 * WIDE * 128 * 2);
            assert_holds(w, all, holds); /* until it is said, nothing changes */
            expert_copies_flip(copies);
            memcpy(holds, next, sizeof holds);
            assert_holds(w, all, holds);
            assert_int_equal(w->expert_bytes, n * 3 * WIDE * 128 * 2);
            await(copies, expert_copies_at_rest);
            resident_is(ck, w, mode);
        }
        memset(next, 1, sizeof next);
        assert_int_equal(expert_copies_wish(copies, next, (uint64_t)1 << 30), STATUS_OK);
        await(copies, is_ready);
        expert_copies_forget(copies); /* what was loaded for nothing goes back */
        await(copies, expert_copies_at_rest);
        resident_is(ck, w, mode);
        assert_holds(w, all, holds);
        expert_copies_destroy(copies);
        checkpoint_close(ck);
    }
    checkpoint_close(reference);
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

/* Half a megabyte at ten megabytes a second takes no less than that. */
static void loading_keeps_to_its_rate(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200];
    static const int layers[] = {0, 1};
    model_config c = config_of("qwen3_moe", "\"num_experts\": 16, \"hidden_size\": 128, \"moe_intermediate_size\": 256,");
    model m = model_of(&c);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, &m, 0);
    for (int mode = 0; mode < 2; mode++) {
        checkpoint *ck;
        const model_weights *w;
        unsigned char holds[32] = {1}, next[32] = {1, 1, 1, 1};
        expert_copies *copies;
        assert_int_equal(bind_folder(folder, &c, holds, (weights_mode)mode, &ck, &w), STATUS_OK);
        assert_int_equal(expert_copies_create(ck, &c, layers, holds, &copies), STATUS_OK);
        double start = clock_seconds();
        assert_int_equal(expert_copies_wish(copies, next, 10000000), STATUS_OK);
        await(copies, is_ready);
        assert_true(clock_seconds() - start >= 0.9 * (3 * 3 * WIDE * 128 * 2) / 1e7);
        expert_copies_destroy(copies);
        checkpoint_close(ck);
    }
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

/* ---- formats, tied heads, what is left over ---- */

static void mixed_formats(void **state)
{
    (void)state;
    model_config c = config_of("qwen2_moe", "\"decoder_sparse_step\": 2, \"shared_expert_intermediate_size\": 10,");
    model m = model_of(&c);
    for (int i = 0; i < m.n; i++) {
        bool expert = strstr(m.list[i].name, ".experts.") != NULL;
        m.list[i].dtype = expert ? DTYPE_F16 : (tensor_dtype[]){DTYPE_F32, DTYPE_BF16, DTYPE_F16}[i % 3];
    }
    if (try_model(&m, &c) != STATUS_OK)
        fail_msg("%s", status_message());
    find(&m, "model.layers.1.mlp.experts.2.up_proj.weight")->dtype = DTYPE_F32;
    expect_refusal(&m, &c, "model.layers.1.mlp.experts.2.up_proj.weight", "another dtype");
    free(m.list);
    model_config_clear(&c);
}

static void bad_tensors(void **state)
{
    (void)state;
    static const char *const names[] = {"model.embed_tokens.weight",
                                        "model.norm.weight",
                                        "lm_head.weight",
                                        "model.layers.1.self_attn.k_norm.weight",
                                        "model.layers.0.self_attn.o_proj.weight",
                                        "model.layers.1.mlp.gate.weight",
                                        "model.layers.1.mlp.experts.3.down_proj.weight"};
    model_config c = config_of("qwen3_moe", "");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        model m = model_of(&c);
        spec *s = find(&m, names[i]), was = *s;
        s->shape[0]++;
        expect_refusal(&m, &c, names[i], "has shape [");
        *s = was;
        s->n_dims = 3;
        s->shape[2] = 1;
        if (was.n_dims == 1)
            s->shape[1] = 1;
        expect_refusal(&m, &c, names[i], "has shape [");
        *s = was;
        s->dtype = DTYPE_I8;
        expect_refusal(&m, &c, names[i], "is I8");
        s->dtype = DTYPE_F8_E4M3;
        expect_refusal(&m, &c, names[i], "is F8_E4M3");
        drop(&m, names[i]);
        expect_refusal(&m, &c, names[i], "is missing");
        free(m.list);
    }
    model m = model_of(&c);
    find(&m, "model.layers.0.self_attn.q_proj.weight")->shape[0] = 15;
    expect_refusal(&m, &c, "has shape [15, 16]", "config.json makes it [16, 16]");
    free(m.list);
    model_config_clear(&c);
}

static void not_a_number(void **state)
{
    (void)state;
    static const char *const names[] = {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight",
                                        "model.norm.weight", "model.layers.1.input_layernorm.weight",
                                        "model.layers.1.self_attn.k_proj.bias"};
    static const tensor_dtype dtypes[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    model_config c = config_of("qwen2_moe", "\"shared_expert_intermediate_size\": 10,");
    for (int i = 0; i < 5; i++)
        for (int d = 0; d < 3; d++)
            for (int poison = 1; poison <= 2; poison++) {
                model m = model_of(&c);
                find(&m, names[i])->dtype = dtypes[d];
                find(&m, names[i])->poison = poison;
                expect_refusal(&m, &c, names[i], poison == 1 ? "holds NaN" : "holds an infinity");
                free(m.list);
            }
    model_config_clear(&c);
}

static void leftovers(void **state)
{
    (void)state;
    static const char *const telling[] = {"model.layers.0.self_attn.q_proj.bias",
                                          "model.layers.1.self_attn.sinks",
                                          "model.layers.0.mlp.gate.e_score_correction_bias",
                                          "model.layers.1.mlp.experts.4.up_proj.weight",
                                          "model.layers.1.pre_feedforward_layernorm.weight",
                                          "model.norm.bias",
                                          "lm_head.bias"};
    static const char *const harmless[] = {"model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.proj.bias", "note",
                                           "model.layers.2.self_attn.q_proj.bias", "model.layers.0.something"};
    model_config c = config_of("qwen3_moe", "");
    for (size_t i = 0; i < sizeof telling / sizeof *telling; i++) {
        model m = model_of(&c);
        add(&m, 3, 0, "%s", telling[i]);
        expect_refusal(&m, &c, telling[i], "would not be used");
        free(m.list);
    }
    model m = model_of(&c);
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        add(&m, 3, 0, "%s", harmless[i])->dtype = DTYPE_I64;
    if (try_model(&m, &c) != STATUS_OK)
        fail_msg("%s", status_message());
    free(m.list);
    m = model_of(&c);
    drop(&m, "model.layers.0.mlp.experts.0.gate_proj.weight");
    add(&m, 4, 12, "model.layers.0.mlp.experts.gate_up_proj");
    expect_refusal(&m, &c, "gate_up_proj", "all experts in one");
    free(m.list);
    model_config_clear(&c);
}

static void bind_tied(bool embedding, bool head, bool equal)
{
    const char *folder = support_scratch();
    char path[4200];
    model_config c = config_of("qwen3_moe", "\"tie_word_embeddings\": true,");
    model m = model_of(&c);
    if (!embedding)
        drop(&m, "model.embed_tokens.weight");
    if (head)
        add(&m, c.vocab, c.hidden, "lm_head.weight");
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, &m, 0);
    if (equal) { /* write the embedding's bytes into the head's place */
        safetensors *file = NULL;
        size_t size;
        assert_int_equal(safetensors_open(path, &file), STATUS_OK);
        const char *map = safetensors_mapping(file, &size);
        const tensor_view *from = safetensors_find(file, "model.embed_tokens.weight"),
                          *to = safetensors_find(file, "lm_head.weight");
        FILE *patch = fopen(path, "r+b");
        assert_int_equal(fseek(patch, (const char *)to->data - map, SEEK_SET), 0);
        assert_int_equal(fwrite(from->data, 1, to->n_bytes, patch), to->n_bytes);
        fclose(patch);
        safetensors_close(file);
    }
    for (int mode = 0; mode < 2; mode++) {
        checkpoint *ck;
        const model_weights *w;
        if (bind_folder(folder, &c, NULL, (weights_mode)mode, &ck, &w) != STATUS_OK)
            fail_msg("%s", status_message());
        bool own_head = embedding && head && !equal;
        assert_int_equal(w->head.data != w->embedding.data, own_head);
        assert_int_equal(w->head.n_out, c.vocab);
        assert_int_equal(w->shared_bytes + w->expert_bytes, w->total_bytes);
        if (own_head)
            assert_memory_not_equal(w->head.data, w->embedding.data, 256);
        checkpoint_close(ck);
    }
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

static void tied_heads(void **state)
{
    (void)state;
    bind_tied(true, false, false);
    bind_tied(true, true, true);
    bind_tied(true, true, false);
    bind_tied(false, true, false);
}

/* ---- shards ---- */

static void write_sharded(const char *folder, model *m)
{
    char path[4200], *text = malloc(1 << 20);
    int n = sprintf(text, "{\"metadata\": {}, \"weight_map\": {");
    for (int i = 0; i < m->n; i++) {
        m->list[i].shard = i % 3;
        n += sprintf(text + n, "%s\"%s\": \"part-%d.safetensors\"", i ? "," : "", m->list[i].name, i % 3);
    }
    sprintf(text + n, "}}");
    write_text(folder, "model.safetensors.index.json", text);
    free(text);
    for (int s = 0; s < 3; s++) {
        snprintf(path, sizeof path, "%s/part-%d.safetensors", folder, s);
        write_file(path, m, s);
    }
}

/* Replaces the first `from` in the index by `to`. */
static void edit_index(const char *folder, const char *from, const char *to)
{
    char path[4200], *text = calloc(1, 1 << 20), *out = malloc(1 << 20);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    FILE *file = fopen(path, "rb");
    assert_true(fread(text, 1, (1 << 20) - 1, file) > 0);
    fclose(file);
    char *at = strstr(text, from);
    assert_non_null(at);
    snprintf(out, 1 << 20, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    write_text(folder, "model.safetensors.index.json", out);
    free(text);
    free(out);
}

static void shard_refused(const char *from, const char *to, const char *remove_file, const char *words)
{
    const char *folder = support_scratch();
    char path[4200];
    model_config c = config_of("qwen3_moe", "");
    model m = model_of(&c);
    checkpoint *ck;
    const model_weights *w;
    write_sharded(folder, &m);
    if (bind_folder(folder, &c, NULL, WEIGHTS_MAP, &ck, &w) != STATUS_OK)
        fail_msg("%s", status_message());
    checkpoint_close(ck);
    if (from)
        edit_index(folder, from, to);
    if (remove_file) {
        snprintf(path, sizeof path, "%s/%s", folder, remove_file);
        assert_int_equal(unlink(path), 0);
    }
    if (bind_folder(folder, &c, NULL, WEIGHTS_MAP, &ck, &w) == STATUS_OK)
        fail_msg("taken, though it should have said \"%s\"", words);
    checkpoint_close(ck);
    if (!strstr(status_message(), words) || !strstr(status_message(), "model.safetensors.index.json"))
        fail_msg("\"%s\" does not say \"%s\"", status_message(), words);
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

static void lying_indexes(void **state)
{
    (void)state;
    shard_refused(NULL, NULL, "part-1.safetensors", "shard part-1.safetensors, which it names, is missing");
    shard_refused("part-0.safetensors", "part-1.safetensors", NULL,
                  "tensor model.embed_tokens.weight is said to be in part-1.safetensors, but it is in");
    shard_refused("part-0.safetensors", "../part-0.safetensors", NULL, "is not the name of a file in this folder");
    shard_refused("part-0.safetensors", "..", NULL, "is not the name of a file in this folder");
    shard_refused("\"part-0.safetensors\"", "7", NULL, "is not the name of a file in this folder");
    shard_refused("\"model.embed_tokens.weight\": \"part-0.safetensors\",", "", NULL, "model.embed_tokens.weight in");
    shard_refused("\"model.embed_tokens.weight\"", "\"a\": \"part-0.safetensors\", \"model.embed_tokens.weight\"", NULL,
                  "tensor a is not in part-0.safetensors");
    shard_refused("\"model.embed_tokens.weight\"",
                  "\"model.embed_tokens.weight\": \"part-0.safetensors\", \"model.embed_tokens.weight\"", NULL, "listed twice");
    shard_refused("\"weight_map\"", "\"weights\"", NULL, "weight_map is missing");
    shard_refused("}}", "}", NULL, "not JSON");
}

static void empty_folder(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    model_config c = config_of("qwen3_moe", "");
    checkpoint *ck = NULL;
    assert_int_not_equal(checkpoint_open(folder, &c, &ck), STATUS_OK);
    assert_non_null(strstr(status_message(), "neither model.safetensors nor"));
    write_text(folder, "model.safetensors.index.json", "{\"weight_map\": {}}");
    const model_weights *w;
    assert_int_not_equal(bind_folder(folder, &c, NULL, WEIGHTS_MAP, &ck, &w), STATUS_OK);
    checkpoint_close(ck);
    model_config_clear(&c);
    support_remove(folder);
}

/* ---- damage ---- */

static void damaged_files(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200], *bytes = malloc(1 << 20);
    model_config c = config_of("qwen3_moe", "\"num_hidden_layers\": 1, \"num_experts\": 2,");
    model m = model_of(&c);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    write_file(path, &m, 0);
    FILE *from = fopen(path, "rb");
    size_t size = fread(bytes, 1, 1 << 20, from);
    fclose(from);
    checkpoint *ck;
    const model_weights *w;
    for (size_t n = size; n-- > 0;) {
        assert_int_equal(truncate(path, (off_t)n), 0);
        assert_int_not_equal(bind_folder(folder, &c, NULL, WEIGHTS_MAP, &ck, &w), STATUS_OK);
        assert_non_null(strstr(status_message(), path));
        checkpoint_close(ck);
    }
    uint64_t seed = 11;
    char *bad = malloc(size);
    for (int round = 0; round < 2000; round++) {
        memcpy(bad, bytes, size);
        for (int flips = 1 + support_below(&seed, 3); flips; flips--)
            bad[support_below(&seed, round % 2 ? (int)size : 3000)] ^= (char)(1 << support_below(&seed, 8));
        FILE *to = fopen(path, "wb");
        assert_int_equal(fwrite(bad, 1, size, to), size);
        fclose(to);
        bind_folder(folder, &c, NULL, round % 4 < 2 ? WEIGHTS_MAP : WEIGHTS_COPY, &ck, &w);
        checkpoint_close(ck);
    }
    free(bad);
    free(bytes);
    free(m.list);
    model_config_clear(&c);
    support_remove(folder);
}

static void bundled(void **state)
{
    (void)state;
    const char *folder = support_source("deploy/models/convoke-demo");
    model_config c = {0};
    checkpoint *ck;
    const model_weights *w;
    assert_int_equal(model_config_read(folder, &c), STATUS_OK);
    if (bind_folder(folder, &c, NULL, WEIGHTS_MAP, &ck, &w) != STATUS_OK)
        fail_msg("%s", status_message());
    assert_ptr_equal(w->head.data, w->embedding.data);
    checkpoint_close(ck);
    model_config_clear(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"mapped: every weight of four families is where it belongs", references_mapped, NULL, NULL, NULL},
        {"copied: the same", references_copied, NULL, NULL, NULL},
        {"the bundled model binds, its head tied", bundled, NULL, NULL, NULL},
        {"ranks' shares add up to the model", shares_add_up, NULL, NULL, NULL},
        {"a rank's memory holds its own experts only, mapped and copied", only_the_own_share, NULL, NULL, NULL},
        {"experts come and go, mapped and copied: the right weights, and the memory goes back", experts_come_and_go, NULL, NULL,
         NULL},
        {"loading keeps to its rate", loading_keeps_to_its_rate, NULL, NULL, NULL},
        {"every tensor may have its own format, a layer's experts have one", mixed_formats, NULL, NULL, NULL},
        {"missing, misshapen, of a strange dtype: refused by name", bad_tensors, NULL, NULL, NULL},
        {"NaN or infinity in gates, norms, biases: refused by name", not_a_number, NULL, NULL, NULL},
        {"a tensor left over that speaks of other arithmetic is refused, others are not", leftovers, NULL, NULL, NULL},
        {"tied embeddings, with and without a stored head", tied_heads, NULL, NULL, NULL},
        {"an index that lies is refused", lying_indexes, NULL, NULL, NULL},
        {"a folder without weights is refused", empty_folder, NULL, NULL, NULL},
        {"cut at any byte: refused; flipped bits: harmless", damaged_files, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
