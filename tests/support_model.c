#include "tests/support_model.h"

#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static safetensors *open_reference(const char *dir)
{
    char path[4096];
    safetensors *file = NULL;
    snprintf(path, sizeof path, "%s/reference.safetensors", dir);
    if (safetensors_open(path, &file) != STATUS_OK)
        fail_msg("%s", status_message());
    return file;
}

static const tensor_view *tensor(const safetensors *file, const char *kind, int i)
{
    char name[64];
    snprintf(name, sizeof name, "%s_%d", kind, i);
    return safetensors_find(file, name);
}

static void listen_event(void *arg, const engine_event *e)
{
    model_answer *a = arg;
    size_t i = (size_t)e->id, per_row = (size_t)a->n_moe_layers * (size_t)a->top_k, first = (size_t)e->first_position,
           n = (size_t)e->n_rows;
    if (e->kind == ENGINE_EVENT_TOKEN)
        a->greedy[i][a->n_greedy[i]++] = e->token;
    if (e->kind != ENGINE_EVENT_ROWS || e->decode)
        return;
    memcpy(a->logits[i] + first * (size_t)a->vocab, e->logits, n * (size_t)a->vocab * sizeof(float));
    memcpy(a->experts[i] + first * per_row, e->experts, n * per_row * sizeof(uint16_t));
    memcpy(a->weights[i] + first * per_row, e->weights, n * per_row * sizeof(float));
}

static void take_arrays(model_answer *a, const model_config *c, const safetensors *reference, unsigned which)
{
    *a = (model_answer){.vocab = c->vocab, .n_moe_layers = c->n_moe_layers, .top_k = c->top_k};
    for (int i = 0; i < REFERENCE_PROMPTS; i++) {
        if (!(which >> i & 1))
            continue;
        size_t n = (size_t)tensor(reference, "prompt", i)->shape[0], choices = n * (size_t)c->n_moe_layers * (size_t)c->top_k;
        a->n_tokens[i] = (int)n;
        a->logits[i] = calloc(n * (size_t)c->vocab, sizeof(float));
        a->experts[i] = calloc(choices + 1, sizeof(uint16_t));
        a->weights[i] = calloc(choices + 1, sizeof(float));
        a->greedy[i] = calloc((size_t)tensor(reference, "greedy", i)->shape[0], sizeof(int32_t));
    }
}

static void submit(engine *e, const safetensors *reference, int i)
{
    const tensor_view *prompt = tensor(reference, "prompt", i);
    engine_request r = {.id = (uint64_t)i,
                        .prompt = prompt->data,
                        .n_prompt = (int)prompt->shape[0],
                        .max_new = (int)tensor(reference, "greedy", i)->shape[0],
                        .want = ENGINE_WANT_LOGITS | ENGINE_WANT_CHOICES | ENGINE_IGNORE_EOS,
                        .owner = -1};
    if (engine_submit(e, &r) != STATUS_OK)
        fail_msg("%s", status_message());
}

void support_run_reference(const char *dir, const runtime_options *options, unsigned which, model_answer *out)
{
    static const char *const domain = "none";
    safetensors *reference = open_reference(dir);
    group *g = NULL;
    runtime *r = NULL;
    runtime_options o = *options;
    o.model_dir = dir;
    o.limits.max_length = 0;
    for (int i = 0; i < REFERENCE_PROMPTS; i++) {
        int length = (int)(tensor(reference, "prompt", i)->shape[0] + tensor(reference, "greedy", i)->shape[0]);
        o.limits.max_length = length > o.limits.max_length ? length : o.limits.max_length;
    }
    o.limits.n_domains = 1;
    o.limits.domains = &domain;
    if (group_create(NULL, NULL, 0, &g) != STATUS_OK || runtime_create(g, &o, listen_event, out, &r) != STATUS_OK)
        fail_msg("%s", status_message());
    take_arrays(out, runtime_config(r), reference, which);
    for (int i = 0; i < REFERENCE_PROMPTS; i++)
        if (which >> i & 1)
            submit(runtime_engine(r), reference, i);
    while (engine_busy(runtime_engine(r)))
        if (engine_step(runtime_engine(r)) != STATUS_OK)
            fail_msg("%s", status_message());
    runtime_destroy(r);
    group_destroy(g);
    safetensors_close(reference);
}

void support_answer_clear(model_answer *a)
{
    for (int i = 0; i < REFERENCE_PROMPTS; i++) {
        free(a->logits[i]);
        free(a->experts[i]);
        free(a->weights[i]);
        free(a->greedy[i]);
    }
}

static void compare_choices(const safetensors *file, const model_answer *a, int i)
{
    const tensor_view *experts = tensor(file, "experts", i), *weights = tensor(file, "weights", i);
    if (!experts)
        return;
    const int32_t *want = experts->data;
    const float *want_weight = weights->data;
    for (int l = 0; l < a->n_moe_layers; l++)
        for (int r = 0; r < a->n_tokens[i]; r++)
            for (int j = 0; j < a->top_k; j++) {
                size_t theirs = (size_t)((l * a->n_tokens[i] + r) * a->top_k + j),
                       ours = (size_t)((r * a->n_moe_layers + l) * a->top_k + j);
                if (a->experts[i][ours] != want[theirs] || fabsf(a->weights[i][ours] - want_weight[theirs]) > 1e-4f)
                    fail_msg("prompt %d, token %d, layer %d, choice %d: expert %d weight %g, transformers has %d and %g", i, r, l,
                             j, a->experts[i][ours], (double)a->weights[i][ours], want[theirs], (double)want_weight[theirs]);
            }
}

double support_compare_reference(const char *dir, const model_answer *a)
{
    safetensors *file = open_reference(dir);
    double worst = 0;
    for (int i = 0; i < REFERENCE_PROMPTS; i++) {
        if (!a->logits[i])
            continue;
        const float *want = tensor(file, "logits", i)->data;
        for (size_t j = 0; j < (size_t)a->n_tokens[i] * (size_t)a->vocab; j++) {
            double d = fabs((double)a->logits[i][j] - (double)want[j]);
            worst = d <= worst ? worst : d; /* NaN wins */
        }
        compare_choices(file, a, i);
        const tensor_view *greedy = tensor(file, "greedy", i);
        assert_int_equal(a->n_greedy[i], greedy->shape[0]);
        assert_memory_equal(a->greedy[i], greedy->data, greedy->n_bytes);
    }
    safetensors_close(file);
    return worst;
}

void support_assert_same(const model_answer *a, const model_answer *b)
{
    for (int i = 0; i < REFERENCE_PROMPTS; i++) {
        if (!a->logits[i] || !b->logits[i])
            continue;
        size_t n = (size_t)a->n_tokens[i], choices = n * (size_t)a->n_moe_layers * (size_t)a->top_k;
        assert_memory_equal(a->logits[i], b->logits[i], n * (size_t)a->vocab * sizeof(float));
        assert_memory_equal(a->experts[i], b->experts[i], choices * sizeof(uint16_t));
        assert_memory_equal(a->weights[i], b->weights[i], choices * sizeof(float));
        assert_memory_equal(a->greedy[i], b->greedy[i], (size_t)a->n_greedy[i] * sizeof(int32_t));
    }
}
