/* test_score.c - convoke-score under mpirun, end to end: what it writes is transformers' answer, and no number of ranks, plan,
 * node border, replica or combine mode that promises not to changes a bit of it. */
#include "tests/support.h"
#include "tests/support_plan.h"

#include "placement/replay.h"
#include "placement/routing_stats.h"
#include "proto/json.h"
#include "proto/safetensors.h"
#include "worker/model_config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

static char scratch[4096];

static const char *in_scratch(const char *name)
{
    static char buffers[8][4200];
    static int next;
    char *out = buffers[next++ & 7];
    snprintf(out, sizeof buffers[0], "%s/%s", scratch, name);
    return out;
}

/* Runs convoke-score on `ranks` ranks; stdout and stderr go to files in the scratch folder. Returns the exit code. */
static int run_score(int ranks, const char *arguments)
{
    char command[20000], runner[4096];
    snprintf(runner, sizeof runner, "%s", support_source("tests/run_mpi.sh"));
    if (ranks == 0)
        snprintf(command, sizeof command, "%s %s > %s 2> %s", support_binary("convoke-score"), arguments, in_scratch("stdout"),
                 in_scratch("stderr"));
    else
        snprintf(command, sizeof command, "%s %d %s %s > %s 2> %s", runner, ranks, support_binary("convoke-score"), arguments,
                 in_scratch("stdout"), in_scratch("stderr"));
    int rc = system(command);
    return WIFEXITED(rc) ? WEXITSTATUS(rc) : -1;
}

static const char *read_text(const char *name)
{
    static char text[1 << 20];
    FILE *file = fopen(in_scratch(name), "rb");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return text;
}

static void score_or_fail(int ranks, const char *arguments)
{
    int rc = run_score(ranks, arguments);
    if (rc != 0)
        fail_msg("convoke-score %s on %d ranks: exit code %d: %s", arguments, ranks, rc, read_text("stderr"));
}

static safetensors *open_tensors(const char *path)
{
    safetensors *file = NULL;
    if (safetensors_open(path, &file) != STATUS_OK)
        fail_msg("%s", status_message());
    return file;
}

/* The reference's prompts as token lines. */
static void write_lines(const char *family)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/reference.safetensors", support_data(family));
    safetensors *file = open_tensors(path);
    FILE *out = fopen(in_scratch("lines.jsonl"), "w");
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "prompt_%d", i);
        const tensor_view *prompt = safetensors_find(file, name);
        const int32_t *ids = prompt->data;
        fprintf(out, "{\"id\": \"p%d\", \"domain\": \"%s\", \"token_ids\": [", i, i == 1 ? "odd" : "even");
        for (int64_t j = 0; j < prompt->shape[0]; j++)
            fprintf(out, j ? ", %d" : "%d", ids[j]);
        fputs("]}\n", out);
    }
    fclose(out);
    safetensors_close(file);
}

/* Names of layers and experts come from the model itself. */
static void write_plan(const char *family, int ranks, int kind, uint64_t seed, const char *path)
{
    model_config c = {0};
    int numbers[64], n = 0;
    plan p = {0};
    if (model_config_read(support_data(family), &c) != STATUS_OK)
        fail_msg("%s", status_message());
    for (int l = 0; l < c.n_layers; l++)
        if (c.moe_layer[l])
            numbers[n++] = l;
    plan_shape shape = {.n_ranks = ranks, .n_experts = c.n_experts, .n_layers = n, .layer_numbers = numbers};
    status st = kind == 0   ? plan_contiguous(&shape, NULL, &p)
                : kind == 1 ? support_reversed_plan(&shape, NULL, &p)
                            : support_random_plan(&seed, &shape, NULL, kind == 2 ? 0 : 0.5, &p);
    if (st != STATUS_OK || plan_write(&p, NULL, path) != STATUS_OK)
        fail_msg("%s", status_message());
    plan_clear(&p);
    model_config_clear(&c);
}

static void assert_same_file(const char *a, const char *b)
{
    safetensors *x = open_tensors(a), *y = open_tensors(b);
    assert_int_equal(safetensors_count(x), safetensors_count(y));
    for (int i = 0; i < safetensors_count(x); i++) {
        const tensor_view *t = safetensors_at(x, i), *u = safetensors_find(y, t->name);
        assert_non_null(u);
        assert_int_equal(t->n_bytes, u->n_bytes);
        if (memcmp(t->data, u->data, t->n_bytes) != 0)
            fail_msg("%s differs between %s and %s", t->name, a, b);
    }
    safetensors_close(x);
    safetensors_close(y);
}

static double compare_tensor(const tensor_view *got, const tensor_view *want)
{
    double worst = 0;
    assert_int_equal(got->n_bytes, want->n_bytes);
    assert_int_equal(got->dtype, want->dtype);
    if (got->dtype == DTYPE_I32) {
        if (memcmp(got->data, want->data, got->n_bytes) != 0)
            fail_msg("%s is not what transformers has", got->name);
        return 0;
    }
    const float *a = got->data, *b = want->data;
    for (size_t i = 0; i < got->n_bytes / sizeof(float); i++)
        worst = fabs((double)a[i] - (double)b[i]) <= worst ? worst : fabs((double)a[i] - (double)b[i]);
    return worst;
}

static double compare_with_reference(const char *family, const char *path)
{
    char reference[4096];
    double worst = 0;
    snprintf(reference, sizeof reference, "%s/reference.safetensors", support_data(family));
    safetensors *want = open_tensors(reference), *got = open_tensors(path);
    for (int i = 0; i < safetensors_count(want); i++) {
        const tensor_view *w = safetensors_at(want, i);
        if (strncmp(w->name, "prompt", 6) == 0)
            continue;
        const tensor_view *g = safetensors_find(got, w->name);
        assert_non_null(g);
        double d = compare_tensor(g, w);
        worst = d <= worst ? worst : d;
    }
    safetensors_close(want);
    safetensors_close(got);
    return worst;
}

static void score_family(int ranks, const char *family, const char *more, const char *out)
{
    char arguments[16384], dir[4096];
    snprintf(dir, sizeof dir, "%s", support_data(family));
    snprintf(arguments, sizeof arguments, "--model %s --input %s --greedy 24 --threads 1 --logits %s %s", dir,
             in_scratch("lines.jsonl"), out, more);
    score_or_fail(ranks, arguments);
}

static void check_family(const char *family)
{
    static const char *const combines[] = {"exact", "fixed"};
    char more[4400];
    write_lines(family);
    for (int c = 0; c < 2; c++) {
        snprintf(more, sizeof more, "--combine %s", combines[c]);
        score_family(0, family, more, in_scratch("alone"));
        double worst = compare_with_reference(family, in_scratch("alone"));
        print_message("%s %s: within %.2g of transformers\n", family, combines[c], worst);
        assert_true(worst < 2e-4);
        for (int ranks = 2; ranks <= 4; ranks++)
            for (int kind = 0; kind < 4; kind++) {
                write_plan(family, ranks, kind, (uint64_t)(ranks * 10 + kind), in_scratch("plan.json"));
                snprintf(more, sizeof more, "--combine %s --plan %s --replicas %s --chunk %d --ranks-per-node %d", combines[c],
                         in_scratch("plan.json"), kind == 3 ? "round-robin" : "owner-first", kind == 1 ? 3 : 64,
                         kind == 2 ? 2 : 0);
                score_family(ranks, family, more, in_scratch("many"));
                assert_same_file(in_scratch("alone"), in_scratch("many"));
            }
        setenv("CONVOKE_ISA", "scalar", 1); /* the last plan, four ranks with replicas, by the other instruction set */
        score_family(4, family, more, in_scratch("many"));
        unsetenv("CONVOKE_ISA");
        assert_same_file(in_scratch("alone"), in_scratch("many"));
    }
}

static void mixtral_is_the_same(void **state)
{
    (void)state;
    check_family("mixtral");
}

static void olmoe_is_the_same(void **state)
{
    (void)state;
    check_family("olmoe");
}

static void qwen2_is_the_same(void **state)
{
    (void)state;
    check_family("qwen2_moe");
}

static void qwen3_is_the_same(void **state)
{
    (void)state;
    check_family("qwen3_moe");
}

static void bf16_rows_are_grouped_alike(void **state)
{
    (void)state;
    write_lines("qwen2_moe");
    score_family(0, "qwen2_moe", "--rows bf16", in_scratch("alone"));
    write_plan("qwen2_moe", 3, 3, 5, in_scratch("plan.json"));
    char more[4400];
    snprintf(more, sizeof more, "--rows bf16 --plan %s", in_scratch("plan.json"));
    score_family(3, "qwen2_moe", more, in_scratch("many"));
    assert_same_file(in_scratch("alone"), in_scratch("many"));
}

static void expect_failure(int ranks, const char *arguments, int code, const char *words)
{
    int rc = run_score(ranks, arguments);
    const char *said = read_text("stderr");
    if (rc != code || !strstr(said, words))
        fail_msg("convoke-score %s: exit code %d (expected %d), said: %s (expected: %s)", arguments, rc, code, said, words);
}

static void mistakes_get_a_sentence(void **state)
{
    (void)state;
    char arguments[9000], dir[4096], lines[4200];
    write_lines("mixtral");
    snprintf(dir, sizeof dir, "%s", support_data("mixtral"));
    snprintf(lines, sizeof lines, "%s", in_scratch("lines.jsonl"));
    expect_failure(0, "", 2, "model");
    snprintf(arguments, sizeof arguments, "--model %s --input %s --combine sometimes", dir, lines);
    expect_failure(0, arguments, 2, "combine");
    snprintf(arguments, sizeof arguments, "--model %s/nowhere --input %s", dir, lines);
    expect_failure(0, arguments, 1, "config.json");
    snprintf(arguments, sizeof arguments, "--model %s --input %s/none.jsonl", dir, dir);
    expect_failure(2, arguments, 1, "none.jsonl");
    snprintf(arguments, sizeof arguments, "--model %s --input %s --greedy 2040", dir, lines);
    expect_failure(2, arguments, 1, "line 3");
    write_plan("mixtral", 3, 0, 1, in_scratch("plan.json"));
    snprintf(arguments, sizeof arguments, "--model %s --input %s --plan %s", dir, lines, in_scratch("plan.json"));
    expect_failure(2, arguments, 1, "plan.json");
    snprintf(arguments, sizeof arguments, "--model %s --input %s --kv-bytes 1K", dir, lines);
    expect_failure(2, arguments, 1, "KV");
    snprintf(arguments, sizeof arguments, "--model %s --input %s --logits /nowhere/at/all", dir, lines);
    expect_failure(2, arguments, 1, "/nowhere/at/all");
}

/* A number behind "key": in one line of JSON. */
static double number_after(const char *line, const char *key)
{
    const char *at = strstr(line, key);
    return at ? atof(at + strlen(key)) : NAN;
}

/* The greedy tokens of one line of expected.jsonl, as text between its brackets. */
static void list_after(const char *line, const char *key, char *out, size_t size)
{
    const char *at = strstr(line, key);
    assert_non_null(at);
    at += strlen(key);
    size_t n = 0;
    for (; *at && *at != ']' && n + 1 < size; at++)
        if (*at != ' ')
            out[n++] = *at;
    out[n] = '\0';
}

/* texts.jsonl cut after 32 tokens, as expected.jsonl continues them. */
static void write_beginnings(void)
{
    FILE *in = fopen(support_source("deploy/models/convoke-demo/texts.jsonl"), "r"), *out = fopen(in_scratch("short.jsonl"), "w");
    static char line[1 << 16];
    assert_non_null(in);
    while (fgets(line, sizeof line, in)) {
        char *ids = strstr(line, "\"token_ids\": ["), *at = ids;
        for (int commas = 0; *at && *at != ']' && commas < 32; at++)
            commas += *at == ',';
        if (*at != ']')
            at[-1] = '\0'; /* at the 32nd comma */
        else
            *at = '\0';
        fprintf(out, "{%s]}\n", ids);
    }
    fclose(in);
    fclose(out);
}

/* Two ranks of two threads: rows enough for every parallel path. */
static void bundled_model_scores_as_transformers(void **state)
{
    (void)state;
    char arguments[9000], model[4096], want[4096], got[4096];
    snprintf(model, sizeof model, "%s", support_source("deploy/models/convoke-demo"));
    snprintf(arguments, sizeof arguments, "--model %s --input %s/texts.jsonl --threads 2 --json", model, model);
    score_or_fail(2, arguments);
    const char *scored = read_text("stdout");
    FILE *expected = fopen(support_source("deploy/models/convoke-demo/expected.jsonl"), "r");
    char line[4096];
    double worst = 0;
    int n = 0, n_whole = 0;
    while (fgets(line, sizeof line, expected)) {
        scored = strstr(scored, "\"mean_nll\":");
        assert_non_null(scored);
        double d = fabs(number_after(scored, "\"mean_nll\":") - number_after(line, "\"mean_nll\": "));
        worst = d <= worst ? worst : d;
        scored += 4;
        n++;
    }
    print_message("%d texts: mean nll within %.2g of transformers\n", n, worst);
    assert_true(n == 37 && worst < 2e-5); /* five digits are written there */
    write_beginnings();
    snprintf(arguments, sizeof arguments, "--model %s --input %s --threads 1 --greedy 32 --json", model,
             in_scratch("short.jsonl"));
    score_or_fail(2, arguments);
    scored = read_text("stdout");
    rewind(expected);
    while (fgets(line, sizeof line, expected)) {
        scored = strstr(scored, "\"greedy\":[");
        list_after(line, "\"greedy_after_32\": [", want, sizeof want);
        list_after(scored, "\"greedy\":[", got, sizeof got);
        /* A text shorter than 32 tokens has part of its continuation inside those 32: what is listed is the rest. */
        assert_true(strlen(got) >= strlen(want));
        assert_string_equal(got + strlen(got) - strlen(want), want);
        n_whole += strlen(got) == strlen(want);
        scored += 4;
    }
    assert_true(n_whole >= 35);
    fclose(expected);
}

/* Trace and statistics come from three ranks and must tell the same story as the logits file's choices. */
static void traces_and_statistics_agree(void **state)
{
    (void)state;
    char more[9000], trace_path[4200], stats_path[4200];
    write_lines("qwen3_moe");
    snprintf(trace_path, sizeof trace_path, "%s", in_scratch("trace"));
    snprintf(stats_path, sizeof stats_path, "%s", in_scratch("stats"));
    snprintf(more, sizeof more, "--routing %s --stats %s", trace_path, stats_path);
    score_family(3, "qwen3_moe", more, in_scratch("many"));
    routing_trace *trace = NULL;
    routing_stats *stats = NULL, *counted = NULL;
    if (routing_trace_open(trace_path, &trace) != STATUS_OK || routing_stats_read(stats_path, &stats) != STATUS_OK ||
        routing_stats_create(routing_trace_shape(trace), true, &counted) != STATUS_OK ||
        routing_stats_add_trace(counted, trace) != STATUS_OK)
        fail_msg("%s", status_message());
    assert_int_equal(routing_trace_n_tokens(trace), 1 + 7 + 40 + 3 * 23); /* the last greedy token is never run */
    size_t n = (size_t)routing_stats_slot_bytes(stats);
    for (int d = 0; d < 2; d++)
        for (int phase = 0; phase < N_PHASES; phase++) {
            assert_int_equal(routing_stats_tokens(stats, d, phase), routing_stats_tokens(counted, d, phase));
            assert_int_equal(n, routing_stats_slot_bytes(counted));
            assert_memory_equal(routing_stats_next_layer_pairs(stats, d, phase),
                                routing_stats_next_layer_pairs(counted, d, phase), 2 * 16 * 16 * sizeof(uint64_t));
        }
    safetensors *logits = open_tensors(in_scratch("many"));
    const int32_t *want = safetensors_find(logits, "experts_2")->data;
    uint16_t experts[3 * 4];
    for (int64_t t = 0; t < routing_trace_n_tokens(trace); t++) {
        routing_row row = routing_trace_row(trace, t, experts, NULL);
        for (int l = 0; row.sequence == 2 && row.phase == PHASE_PREFILL && l < 3; l++)
            for (int j = 0; j < 4; j++)
                assert_int_equal(experts[l * 4 + j], want[(l * 40 + row.position) * 4 + j]);
    }
    safetensors_close(logits);
    routing_stats_destroy(stats);
    routing_stats_destroy(counted);
    routing_trace_close(trace);
}

static void json_has_the_promised_keys(void **state)
{
    (void)state;
    char arguments[9000], dir[4096];
    write_lines("olmoe");
    snprintf(dir, sizeof dir, "%s", support_data("olmoe"));
    snprintf(arguments, sizeof arguments, "--model %s --input %s --greedy 4 --json", dir, in_scratch("lines.jsonl"));
    score_or_fail(2, arguments);
    const char *text = read_text("stdout");
    assert_non_null(strstr(text, "\"prefill_tokens_per_s\":"));
    assert_non_null(strstr(text, "\"decode_tokens_per_s\":"));
    assert_int_equal(text[0], '{');
}

static int make_scratch(void **state)
{
    (void)state;
    snprintf(scratch, sizeof scratch, "%s", support_scratch());
    return 0;
}

static int remove_scratch(void **state)
{
    (void)state;
    support_remove(scratch);
    return 0;
}

/* ---- what the replay counts is what was sent ---- */

/* Lines of many lengths, so that places are free at different times. */
static void write_mixed_lines(void)
{
    FILE *out = fopen(in_scratch("mixed.jsonl"), "w");
    uint64_t seed = 5;
    assert_non_null(out);
    for (int i = 0; i < 14; i++) {
        fprintf(out, "{\"domain\": \"%s\", \"token_ids\": [%d", i % 3 ? "math" : "law", support_below(&seed, 512));
        for (int n = support_below(&seed, 45); n > 0; n--)
            fprintf(out, ", %d", support_below(&seed, 512));
        fputs("]}\n", out);
    }
    fclose(out);
}

static topology topology_of(int ranks, int per_node)
{
    topology t = {0};
    assert_int_equal(topology_uniform(ranks, 1, &t), STATUS_OK);
    for (int r = 0; per_node > 0 && r < ranks; r++) {
        t.node_of_rank[r] = r / per_node;
        t.local_index[r] = r % per_node;
        t.n_nodes = r / per_node + 1;
    }
    for (int r = 0; r < ranks; r++) /* ranks of uneven speed */
        t.row_us[r] *= 1 + 0.3 * (r % 3);
    return t;
}

static replay_result replay_trace(const plan *p, const topology *topo, replica_rule replicas)
{
    routing_trace *trace;
    traffic t = {0};
    replay_result r = {0};
    const traffic_part all = {.phase = TRAFFIC_ALL};
    replay_options o = {.owners = OWNER_RECORDED, .replicas = replicas, .node_dedupe = true, .threads = 1};
    if (routing_trace_open(in_scratch("trace"), &trace) != STATUS_OK || traffic_load(trace, &all, &t) != STATUS_OK ||
        replay_run(&t, p, topo, &o, &r) != STATUS_OK)
        fail_msg("%s", status_message());
    traffic_clear(&t);
    routing_trace_close(trace);
    return r;
}

static double number_of(const cJSON *tree, const char *key)
{
    const cJSON *item = cJSON_GetObjectItem(tree, key);
    assert_true(cJSON_IsNumber(item));
    return item->valuedouble;
}

static void assert_links(const topology *t, const replay_result *want)
{
    cJSON *tree;
    const char *text = read_text("stdout");
    uint64_t same = 0, cross = 0;
    assert_int_equal(json_parse("stdout", text, strlen(text), &tree), STATUS_OK);
    const cJSON *links = cJSON_GetObjectItem(tree, "link_rows");
    for (int from = 0; from < t->n_ranks; from++)
        for (int to = 0; to < t->n_ranks; to++) {
            uint64_t got = (uint64_t)cJSON_GetArrayItem(cJSON_GetArrayItem(links, from), to)->valuedouble;
            uint64_t rows = want->link_rows[(size_t)from * (size_t)t->n_ranks + (size_t)to];
            if (got != rows)
                fail_msg("rank %d to %d: %llu rows sent, %llu replayed", from, to, (unsigned long long)got,
                         (unsigned long long)rows);
            same += topology_link(t, from, to) == LINK_SAME_NODE ? rows : 0;
            cross += topology_link(t, from, to) == LINK_CROSS_NODE ? rows : 0;
        }
    double row_bytes = number_of(tree, "row_bytes");
    assert_true(number_of(tree, "row_bytes_same_node") == (double)same * row_bytes);
    assert_true(number_of(tree, "row_bytes_cross_node") == (double)cross * row_bytes);
    assert_true(same + cross > 0 && number_of(tree, "header_bytes") > 0);
    cJSON_Delete(tree);
}

static void assert_replayed(int ranks, int per_node, int kind, const char *replicas, replica_rule rule)
{
    char arguments[4096];
    plan p = {0};
    const char *path = in_scratch("replayed.plan");
    topology t = topology_of(ranks, per_node);
    write_plan("qwen3_moe", ranks, kind, (uint64_t)(ranks * 10 + kind), path);
    snprintf(arguments, sizeof arguments,
             "--model %s --input %s --plan %s --replicas %s --topology %s --greedy 9 --batch 5 --chunk 13 --threads 1 "
             "--ranks-per-node %d --routing %s --json",
             support_data("qwen3_moe"), in_scratch("mixed.jsonl"), path, replicas, in_scratch("topology"), per_node,
             in_scratch("trace"));
    assert_int_equal(topology_write(&t, in_scratch("topology")), STATUS_OK);
    score_or_fail(ranks, arguments);
    assert_int_equal(plan_read(path, NULL, &p), STATUS_OK);
    replay_result r = replay_trace(&p, &t, rule);
    assert_links(&t, &r);
    replay_result_clear(&r);
    plan_clear(&p);
    topology_clear(&t);
}

static void replay_counts_what_was_sent(void **state)
{
    (void)state;
    static const int layouts[][2] = {{2, 0}, {4, 0}, {3, 2}, {4, 2}};
    write_mixed_lines();
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        for (int kind = 0; kind < 4; kind += kind ? 1 : 2)
            assert_replayed(layouts[i][0], layouts[i][1], kind, "owner-first", REPLICAS_BY_SHARE);
}

static void replicas_by_the_step_are_replayed(void **state)
{
    (void)state;
    static const int layouts[][2] = {{2, 0}, {4, 0}, {3, 2}, {4, 2}};
    write_mixed_lines();
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        assert_replayed(layouts[i][0], layouts[i][1], 3, "step", REPLICAS_BY_STEP);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"rows on every link are those that the replay counts, exactly", replay_counts_what_was_sent, NULL, NULL, NULL},
        {"with replicas by the step's load, too", replicas_by_the_step_are_replayed, NULL, NULL, NULL},
        {"mixtral: 1 to 4 ranks, every plan, exact and fixed: the same bits", mixtral_is_the_same, NULL, NULL, NULL},
        {"olmoe: 1 to 4 ranks, every plan, exact and fixed: the same bits", olmoe_is_the_same, NULL, NULL, NULL},
        {"qwen2_moe: 1 to 4 ranks, every plan, exact and fixed: the same bits", qwen2_is_the_same, NULL, NULL, NULL},
        {"qwen3_moe: 1 to 4 ranks, every plan, exact and fixed: the same bits", qwen3_is_the_same, NULL, NULL, NULL},
        {"rows in bf16 lose the same for every grouping", bf16_rows_are_grouped_alike, NULL, NULL, NULL},
        {"mistakes get one sentence and the right exit code", mistakes_get_a_sentence, NULL, NULL, NULL},
        {"the bundled model scores and continues its texts as transformers does", bundled_model_scores_as_transformers, NULL,
         NULL, NULL},
        {"trace, statistics and choices tell the same", traces_and_statistics_agree, NULL, NULL, NULL},
        {"--json prints one object with the promised keys", json_has_the_promised_keys, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("convoke-score", tests, make_scratch, remove_scratch);
}
