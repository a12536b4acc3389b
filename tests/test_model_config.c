/* config.json: read as transformers reads it, in both spellings; what would change the arithmetic and is not done is refused by
 * name. */
#include "tests/support.h"

#include "worker/model_config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* A small model of the family; `keys` are added in front ("\"a\": 1,"), and win over the same key behind (first one counts). */
static status parse(const char *family, const char *keys, model_config *c)
{
    char text[4096];
    int n = snprintf(text, sizeof text,
                     "{%s \"model_type\": \"%s\", \"hidden_size\": 64, \"num_attention_heads\": 4, \"num_key_value_heads\": 2,"
                     "\"num_hidden_layers\": 4, \"vocab_size\": 512}",
                     keys, family);
    return model_config_parse("config.json", text, (size_t)n, c);
}

static model_config good(const char *family, const char *keys)
{
    model_config c = {0};
    if (parse(family, keys, &c) != STATUS_OK)
        fail_msg("%s with %s: %s", family, keys, status_message());
    return c;
}

static void refused(const char *family, const char *keys, const char *words)
{
    model_config c = {0}, untouched = {0};
    if (parse(family, keys, &c) == STATUS_OK)
        fail_msg("%s with %s was taken", family, keys);
    assert_memory_equal(&c, &untouched, sizeof c);
    if (!strstr(status_message(), words) || strncmp(status_message(), "config.json", 11))
        fail_msg("%s with %s: \"%s\" does not say \"%s\"", family, keys, status_message(), words);
}

static void references(void **state)
{
    (void)state;
    static const struct {
        const char *folder;
        int n_experts, top_k, expert_inter, head_dim, n_kv_heads, shared_inter;
        bool norm_topk, qkv_bias;
        double theta;
    } expect[] = {
        {"mixtral", 8, 2, 48, 16, 2, 0, true, false, 1e6},
        {"olmoe", 16, 4, 32, 16, 4, 0, false, false, 1e4},
        {"qwen2_moe", 12, 3, 32, 16, 2, 80, false, true, 1e4},
        {"qwen3_moe", 16, 4, 32, 32, 2, 0, true, false, 1e4},
    };
    for (size_t i = 0; i < sizeof expect / sizeof *expect; i++) {
        model_config c = {0};
        if (model_config_read(support_data(expect[i].folder), &c) != STATUS_OK)
            fail_msg("%s", status_message());
        assert_string_equal(c.family->model_type, expect[i].folder);
        assert_string_equal(c.name, expect[i].folder);
        assert_int_equal(c.vocab, 512);
        assert_int_equal(c.hidden, 64);
        assert_int_equal(c.n_layers, 3);
        assert_int_equal(c.n_moe_layers, 3);
        assert_int_equal(c.n_experts, expect[i].n_experts);
        assert_int_equal(c.top_k, expect[i].top_k);
        assert_int_equal(c.expert_inter, expect[i].expert_inter);
        assert_int_equal(c.head_dim, expect[i].head_dim);
        assert_int_equal(c.n_kv_heads, expect[i].n_kv_heads);
        assert_int_equal(c.shared_inter, expect[i].shared_inter);
        assert_int_equal(c.norm_topk, expect[i].norm_topk);
        assert_int_equal(c.qkv_bias, expect[i].qkv_bias);
        assert_false(c.tied_embeddings);
        assert_true(c.rope.theta == expect[i].theta);
        assert_int_equal(c.max_positions, 2048);
        assert_int_equal(c.n_eos_ids, 1);
        assert_int_equal(c.eos_ids[0], 0);
        for (int l = 0; l < 3; l++)
            assert_int_equal(c.window[l], 0);
        model_config_clear(&c);
    }
}

static void bundled(void **state)
{
    (void)state;
    model_config c = {0};
    assert_int_equal(model_config_read(support_source("deploy/models/convoke-demo/"), &c), STATUS_OK);
    assert_string_equal(c.name, "convoke-demo");
    assert_true(c.tied_embeddings);
    assert_int_equal(c.head_dim, 32);
    model_config_clear(&c);
}

/* What transformers 5.23 says of an empty config of each class. */
static void defaults(void **state)
{
    (void)state;
    static const struct {
        const char *family;
        int vocab, hidden, layers, heads, kv, dim, experts, k, inter, positions, eos;
        double theta;
        float eps;
    } expect[] = {
        {"mixtral", 32000, 4096, 32, 32, 8, 128, 8, 2, 14336, 131072, 2, 1e6, 1e-5f},
        {"olmoe", 50304, 2048, 16, 16, 16, 128, 64, 8, 2048, 4096, 50279, 1e4, 1e-5f},
        {"qwen2_moe", 151936, 2048, 24, 16, 16, 128, 60, 4, 1408, 32768, -1, 1e4, 1e-6f},
        {"qwen3_moe", 151936, 2048, 24, 32, 4, 64, 128, 8, 768, 32768, -1, 1e4, 1e-6f},
    };
    for (size_t i = 0; i < sizeof expect / sizeof *expect; i++) {
        model_config c = {0};
        char text[64];
        int n = snprintf(text, sizeof text, "{\"model_type\": \"%s\"}", expect[i].family);
        assert_int_equal(model_config_parse("c", text, (size_t)n, &c), STATUS_OK);
        assert_int_equal(c.vocab, expect[i].vocab);
        assert_int_equal(c.hidden, expect[i].hidden);
        assert_int_equal(c.n_layers, expect[i].layers);
        assert_int_equal(c.n_heads, expect[i].heads);
        assert_int_equal(c.n_kv_heads, expect[i].kv);
        assert_int_equal(c.head_dim, expect[i].dim);
        assert_int_equal(c.n_experts, expect[i].experts);
        assert_int_equal(c.top_k, expect[i].k);
        assert_int_equal(c.expert_inter, expect[i].inter);
        assert_int_equal(c.max_positions, expect[i].positions);
        assert_int_equal(c.n_eos_ids, expect[i].eos >= 0);
        if (expect[i].eos >= 0)
            assert_int_equal(c.eos_ids[0], expect[i].eos);
        assert_true(c.rope.theta == expect[i].theta);
        assert_true(c.rms_eps == expect[i].eps);
        assert_int_equal(c.norm_topk, i == 0);
        assert_int_equal(c.qkv_bias, i == 2);
        assert_false(c.o_bias);
        model_config_clear(&c);
    }
}

static void attention(void **state)
{
    (void)state;
    model_config c = good("qwen3_moe", "\"attention_bias\": true, \"head_dim\": 24, \"tie_word_embeddings\": true,");
    assert_true(c.qkv_bias && c.o_bias && c.tied_embeddings);
    assert_int_equal(c.head_dim, 24);
    model_config_clear(&c);
    c = good("qwen2_moe", "\"qkv_bias\": false,");
    assert_false(c.qkv_bias || c.o_bias);
    model_config_clear(&c);
    c = good("olmoe", "\"clip_qkv\": 8.0, \"attention_bias\": true, \"head_dim\": null,");
    assert_true(c.clip_qkv == 8.0f && c.o_bias);
    model_config_clear(&c);
    c = good("mixtral", "\"num_key_value_heads\": null,");
    assert_int_equal(c.n_kv_heads, 4);
    model_config_clear(&c);
}

static void experts_by_both_names(void **state)
{
    (void)state;
    static const char *const families[] = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"};
    for (int i = 0; i < 4; i++) {
        model_config c = good(families[i], "\"num_experts\": 10,");
        assert_int_equal(c.n_experts, 10);
        model_config_clear(&c);
        c = good(families[i], "\"num_local_experts\": 10, \"num_experts_per_tok\": 10,");
        assert_int_equal(c.n_experts, 10);
        model_config_clear(&c);
        c = good(families[i], "\"num_local_experts\": 10, \"num_experts\": 10,");
        model_config_clear(&c);
        refused(families[i], "\"num_local_experts\": 10, \"num_experts\": 9,", "num_experts is 9, but num_local_experts is 10");
    }
}

static void dense_layers(void **state)
{
    (void)state;
    model_config c = good("qwen3_moe", "\"decoder_sparse_step\": 2,");
    for (int l = 0; l < 4; l++)
        assert_int_equal(c.moe_layer[l], l % 2);
    assert_int_equal(c.n_moe_layers, 2);
    assert_int_equal(c.dense_inter, 6144);
    model_config_clear(&c);
    c = good("qwen2_moe", "\"mlp_only_layers\": [0, 3, 99],");
    assert_false(c.moe_layer[0] || c.moe_layer[3]);
    assert_true(c.moe_layer[1] && c.moe_layer[2]);
    model_config_clear(&c);
    refused("qwen3_moe", "\"mlp_only_layers\": [0, 1, 2, 3],", "no layer has experts");
    refused("qwen3_moe", "\"mlp_only_layers\": [0.5],", "mlp_only_layers: item 0");
    refused("qwen3_moe", "\"mlp_only_layers\": 3,", "mlp_only_layers is not a list");
    refused("qwen3_moe", "\"decoder_sparse_step\": 0,", "decoder_sparse_step");
    refused("mixtral", "\"decoder_sparse_step\": 2,", "decoder_sparse_step");
    refused("olmoe", "\"mlp_only_layers\": [1],", "mlp_only_layers");
}

static void windows_are(const char *family, const char *keys, int a, int b, int c, int d)
{
    model_config config = good(family, keys);
    int expect[4] = {a, b, c, d};
    for (int l = 0; l < 4; l++)
        if (config.window[l] != expect[l])
            fail_msg("%s with %s: layer %d has window %d", family, keys, l, config.window[l]);
    model_config_clear(&config);
}

static void windows(void **state)
{
    (void)state;
    windows_are("mixtral", "", 0, 0, 0, 0);
    windows_are("mixtral", "\"sliding_window\": null,", 0, 0, 0, 0);
    windows_are("mixtral", "\"sliding_window\": 7,", 7, 7, 7, 7);
    windows_are("qwen3_moe", "\"sliding_window\": 7,", 0, 0, 0, 0);
    windows_are("qwen3_moe", "\"sliding_window\": 7, \"use_sliding_window\": true, \"max_window_layers\": 1,", 7, 7, 7, 7);
    windows_are("qwen3_moe", "\"use_sliding_window\": true,", 4096, 4096, 4096, 4096);
    windows_are("qwen2_moe", "\"sliding_window\": 7, \"max_window_layers\": 2,", 0, 0, 0, 0);
    windows_are("qwen2_moe", "\"sliding_window\": 7, \"use_sliding_window\": true,", 7, 0, 7, 0);
    windows_are("qwen2_moe", "\"sliding_window\": 7, \"use_sliding_window\": true, \"max_window_layers\": 2,", 7, 0, 0, 0);
    windows_are("qwen2_moe",
                "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": "
                "[\"full_attention\", \"sliding_attention\", \"sliding_attention\", \"full_attention\"],",
                0, 7, 7, 0);
    windows_are("qwen2_moe", "\"sliding_window\": 0, \"use_sliding_window\": false,", 0, 0, 0, 0);
    refused("olmoe", "\"sliding_window\": 7,", "sliding_window");
    refused("olmoe", "\"use_sliding_window\": true,", "use_sliding_window");
    refused("mixtral", "\"sliding_window\": 0,", "sliding_window");
    refused("qwen3_moe", "\"use_sliding_window\": true, \"sliding_window\": null,", "sliding_window is null");
    refused("qwen2_moe", "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"full_attention\", \"full_attention\"],",
            "layer_types says sliding_attention for layer 0");
    refused("qwen3_moe",
            "\"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"full_attention\", \"full_attention\", "
            "\"full_attention\"],",
            "layer_types says full_attention for layer 0");
    refused("qwen2_moe", "\"layer_types\": [\"full_attention\"],", "lists 1 layers");
    refused("qwen2_moe", "\"layer_types\": [\"linear_attention\"],", "layer 0 is neither");
}

static void rope_scaling(void **state)
{
    (void)state;
    model_config c = good("qwen3_moe", "\"rope_theta\": 5e5, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.5}, "
                                       "\"max_position_embeddings\": 1000,");
    assert_int_equal(c.rope.kind, ROPE_LINEAR);
    assert_true(c.rope.theta == 5e5 && c.rope.factor == 2.5);
    assert_int_equal(c.max_positions, 2500);
    model_config_clear(&c);
    c = good("qwen3_moe", "\"rope_parameters\": {\"rope_type\": \"yarn\", \"rope_theta\": 7e4, \"factor\": 4, "
                          "\"original_max_position_embeddings\": 32768}, \"max_position_embeddings\": 40960,");
    assert_int_equal(c.rope.kind, ROPE_YARN);
    assert_true(c.rope.theta == 7e4 && c.rope.beta_fast == 32 && c.rope.beta_slow == 1 && c.rope.truncate);
    assert_int_equal(c.max_positions, 131072);
    model_config_clear(&c);
    c = good("mixtral", "\"rope_scaling\": {\"rope_type\": \"dynamic\", \"factor\": 4}, \"max_position_embeddings\": 1000,");
    assert_int_equal(c.max_positions, 1000);
    model_config_clear(&c);
    c = good("mixtral",
             "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4,"
             "\"original_max_position_embeddings\": 8192}, \"max_position_embeddings\": 131072,");
    assert_int_equal(c.max_positions, 131072);
    assert_true(c.rope.original_positions == 8192);
    model_config_clear(&c);
    c = good("mixtral", "\"rope_scaling\": {}, \"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 2},");
    assert_int_equal(c.rope.kind, ROPE_LINEAR);
    model_config_clear(&c);
}

static void rope_refusals(void **state)
{
    (void)state;
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"longrope\"},", "rope_scaling: rope type longrope");
    refused("qwen3_moe", "\"rope_scaling\": {\"rope_type\": \"default\", \"mrope_section\": [1, 2]},", "mrope_section");
    refused("qwen3_moe", "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}},", "full_attention");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"linear\"},", "factor is missing");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5},", "factor is 0.5");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 1e999},", "factor is inf");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 1e6},", "positions");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"yarn\"},", "factor is missing");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 2},", "low_freq_factor is missing");
    refused("qwen3_moe",
            "\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 2, \"low_freq_factor\": 4, \"high_freq_factor\": 4},",
            "not above");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"beta_fast\": 1, \"beta_slow\": 2},",
            "below beta_slow");
    refused("qwen3_moe", "\"rope_scaling\": {\"type\": 3},", "type is not a string");
    refused("qwen3_moe", "\"rope_scaling\": 3,", "rope_scaling is not an object");
    refused("qwen3_moe", "\"partial_rotary_factor\": 0.5,", "partial_rotary_factor");
    refused("qwen3_moe", "\"rope_theta\": 0,", "rope_theta");
    refused("qwen3_moe", "\"rope_theta\": \"a\",", "rope_theta is not a number");
}

static void refusals(void **state)
{
    (void)state;
    refused("deepseek_v3", "", "model_type deepseek_v3 is not supported; supported are mixtral, olmoe, qwen2_moe, qwen3_moe");
    refused("mixtral", "\"quantization_config\": {\"quant_method\": \"gptq\"},", "quantization_config (gptq)");
    refused("mixtral", "\"hidden_act\": \"gelu\",", "hidden_act gelu");
    refused("mixtral", "\"attention_bias\": true,", "attention_bias");
    refused("qwen3_moe", "\"qkv_bias\": true,", "qkv_bias");
    refused("qwen3_moe", "\"clip_qkv\": 8,", "clip_qkv");
    refused("qwen3_moe", "\"shared_expert_intermediate_size\": 8,", "shared_expert_intermediate_size");
    refused("qwen3_moe", "\"routed_scaling_factor\": 2.5,", "routed_scaling_factor");
    refused("qwen3_moe", "\"final_logit_softcapping\": 30.0,", "final_logit_softcapping");
    refused("mixtral", "\"norm_topk_prob\": false,", "norm_topk_prob");
    refused("olmoe", "\"head_dim\": 32, \"num_key_value_heads\": 4,", "head_dim 32 times 4 heads");
    refused("olmoe", "\"clip_qkv\": 0,", "clip_qkv");
    refused("qwen3_moe", "\"head_dim\": 15,", "head_dim is 15");
    refused("qwen3_moe", "\"hidden_size\": 65,", "no multiple of num_attention_heads");
    refused("qwen3_moe", "\"num_key_value_heads\": 3,", "no multiple of num_key_value_heads");
    refused("qwen3_moe", "\"num_experts\": 4,", "num_experts_per_tok 8 is more than the 4 experts");
    refused("qwen3_moe", "\"num_experts\": 0,", "num_experts");
    refused("qwen3_moe", "\"num_experts\": 65536,", "num_experts");
    refused("qwen3_moe", "\"hidden_size\": 1e9,", "hidden_size");
    refused("qwen3_moe", "\"num_hidden_layers\": 100000,", "num_hidden_layers");
    refused("qwen3_moe", "\"vocab_size\": -1,", "vocab_size");
    refused("qwen3_moe", "\"vocab_size\": \"many\",", "vocab_size is not a number");
    refused("qwen3_moe", "\"rms_norm_eps\": -1,", "rms_norm_eps");
    refused("qwen3_moe", "\"tie_word_embeddings\": 1,", "tie_word_embeddings");
    refused("qwen3_moe", "\"eos_token_id\": \"x\",", "eos_token_id");
    refused("qwen3_moe", "\"eos_token_id\": [0,1,2,3,4,5,6,7,8],", "more than 8");
    model_config c;
    assert_int_not_equal(model_config_parse("x", "[]", 2, &c), STATUS_OK);
    assert_int_not_equal(model_config_parse("x", "{}", 2, &c), STATUS_OK);
    assert_int_not_equal(model_config_parse("x", "", 0, &c), STATUS_OK);
}

static void neutral_keys(void **state)
{
    (void)state;
    model_config c =
        good("mixtral", "\"attention_bias\": false, \"clip_qkv\": null, \"routed_scaling_factor\": 1.0, \"mlp_only_layers\": [],"
                        "\"attention_dropout\": 0.1, \"torch_dtype\": \"float16\", \"hidden_act\": \"silu\", \"auto_map\": {},");
    model_config_clear(&c);
}

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *to = fopen(path, "w");
    assert_non_null(to);
    fputs(text, to);
    fclose(to);
}

static void eos(void **state)
{
    (void)state;
    model_config c = good("mixtral", "\"eos_token_id\": [3, 600, -1, 4],");
    assert_int_equal(c.n_eos_ids, 2); /* ids no token has stop nothing */
    assert_int_equal(c.eos_ids[1], 4);
    model_config_clear(&c);
    c = good("mixtral", "\"eos_token_id\": null,");
    assert_int_equal(c.n_eos_ids, 0);
    model_config_clear(&c);

    const char *folder = support_scratch();
    write_text(folder, "config.json", "{\"model_type\": \"mixtral\", \"eos_token_id\": 5}");
    assert_int_equal(model_config_read(folder, &c), STATUS_OK);
    assert_int_equal(c.eos_ids[0], 5);
    model_config_clear(&c);
    write_text(folder, "generation_config.json", "{\"eos_token_id\": [9, 8]}");
    assert_int_equal(model_config_read(folder, &c), STATUS_OK);
    assert_int_equal(c.n_eos_ids, 2);
    assert_int_equal(c.eos_ids[0], 9);
    model_config_clear(&c);
    write_text(folder, "generation_config.json", "{\"eos_token_id\": ");
    assert_int_not_equal(model_config_read(folder, &c), STATUS_OK);
    assert_non_null(strstr(status_message(), "generation_config.json"));
    support_remove(folder);
    assert_int_not_equal(model_config_read(folder, &c), STATUS_OK);
    assert_non_null(strstr(status_message(), "config.json"));
}

static void damaged_text(void **state)
{
    (void)state;
    static const char text[] =
        "{\"model_type\":\"qwen2_moe\",\"num_hidden_layers\":4,\"mlp_only_layers\":[1,2],\"layer_types\":[\"full_attention\","
        "\"full_attention\",\"full_attention\",\"full_attention\"],\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2},"
        "\"eos_token_id\":[1,2],\"vocab_size\":512}";
    uint64_t seed = 3;
    for (size_t n = 0; n < sizeof text - 1; n++) {
        model_config c = {0};
        char *cut = malloc(n + 1);
        memcpy(cut, text, n);
        assert_int_not_equal(model_config_parse("c", cut, n, &c), STATUS_OK);
        free(cut);
    }
    for (int round = 0; round < 20000; round++) {
        model_config c = {0};
        char *bad = malloc(sizeof text - 1);
        memcpy(bad, text, sizeof text - 1);
        for (int k = 1 + support_below(&seed, 3); k; k--)
            bad[support_below(&seed, sizeof text - 1)] ^= (char)(1 << support_below(&seed, 8));
        model_config_parse("c", bad, sizeof text - 1, &c);
        model_config_clear(&c);
        free(bad);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"the reference checkpoints' configs, in both spellings", references, NULL, NULL, NULL},
        {"the bundled model's config", bundled, NULL, NULL, NULL},
        {"keys left out get transformers' defaults", defaults, NULL, NULL, NULL},
        {"attention keys are honoured", attention, NULL, NULL, NULL},
        {"the expert count is read by either name", experts_by_both_names, NULL, NULL, NULL},
        {"dense layers by decoder_sparse_step and mlp_only_layers", dense_layers, NULL, NULL, NULL},
        {"sliding windows as each family reads them", windows, NULL, NULL, NULL},
        {"rope scaling in both spellings, and how far it reaches", rope_scaling, NULL, NULL, NULL},
        {"rope scaling that is not done is refused by name", rope_refusals, NULL, NULL, NULL},
        {"what is not done is refused by name", refusals, NULL, NULL, NULL},
        {"keys that change nothing are passed over", neutral_keys, NULL, NULL, NULL},
        {"end-of-text ids: number, list, generation_config.json", eos, NULL, NULL, NULL},
        {"a damaged text never does more than fail", damaged_text, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
