/* fuzz_config.c - any text as config.json: refused with a sentence, or a configuration whose numbers keep every promise of
 * model_config.h, and whose rotary tables are finite. */
#include "worker/model_config.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void demand(bool so)
{
    if (!so)
        abort();
}

static void check_layers(const model_config *c)
{
    int n_moe = 0;
    for (int l = 0; l < c->n_layers; l++) {
        n_moe += c->moe_layer[l];
        demand(c->window[l] >= 0);
        demand(c->moe_layer[l] || (c->dense_inter > 0 && c->family->dense_gate_name));
    }
    demand(n_moe > 0 && n_moe == c->n_moe_layers);
}

static void check(const model_config *c)
{
    demand(c->family && model_family_find(c->family->model_type) == c->family);
    demand(c->vocab > 0 && c->hidden > 0 && c->hidden <= 65536 && c->n_layers > 0 && c->n_layers <= 1024);
    demand(c->n_heads > 0 && c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    demand(c->head_dim > 0 && c->head_dim % 2 == 0 && c->head_dim <= 1024);
    demand(c->n_experts > 0 && c->n_experts <= 4096 && c->top_k > 0 && c->top_k <= c->n_experts && c->expert_inter > 0);
    demand(c->rms_eps >= 0 && c->clip_qkv >= 0 && isfinite(c->clip_qkv));
    demand(c->max_positions > 0 && c->rope.theta > 1);
    demand(c->n_eos_ids >= 0 && c->n_eos_ids <= 8);
    for (int i = 0; i < c->n_eos_ids; i++)
        demand(c->eos_ids[i] >= 0 && c->eos_ids[i] < c->vocab);
    check_layers(c);
}

static void check_rope(const model_config *c)
{
    float *cosines = NULL, *sines = NULL;
    int n = c->max_positions < 3 ? c->max_positions : 3;
    demand(rope_tables(&c->rope, c->head_dim, c->max_positions, n, &cosines, &sines) == STATUS_OK);
    for (int i = 0; i < n * c->head_dim / 2; i++)
        demand(isfinite(cosines[i]) && isfinite(sines[i]));
    free(cosines);
    free(sines);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    model_config c = {0};
    char *copy = malloc(size + !size); /* an exact copy: the sanitizer sees one byte too far */
    memcpy(copy, data, size);
    if (model_config_parse("config.json", copy, size, &c) == STATUS_OK) {
        check(&c);
        check_rope(&c);
    } else {
        demand(!c.moe_layer && !c.window && !strncmp(status_message(), "config.json", 11));
    }
    free(copy);
    model_config_clear(&c);
    return 0;
}
