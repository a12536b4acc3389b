/* test_formats.c - other engines' files: samples written by tests/make_engine_files.py, which also reads what comes out; exports
 * load back to the same plan; bad input gives one sentence that names file, field and cause. */
#include "placement/planner/formats.h"
#include "placement/planner/number_array.h"
#include "placement/planner/slot_layout.h"
#include "placement/planner/yaml_file.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *python(void)
{
    const char *named = getenv("CONVOKE_PYTHON");
    return named ? named : "/usr/bin/python3";
}

/* Skips a test where Python lacks numpy or yaml, before it has made anything. */
static void need_python(void)
{
    char command[4200];
    snprintf(command, sizeof command, "%s -c 'import numpy, yaml' 2>/dev/null", python());
    if (system(command) != 0)
        skip();
}

static void run_script(const char *arguments)
{
    static char command[64000];
    snprintf(command, sizeof command, "%s %s %s", python(), support_source("tests/make_engine_files.py"), arguments);
    assert_int_equal(system(command), 0);
}

static const char *in_folder(const char *folder, const char *name)
{
    static char paths[4][4300];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

/* ---- samples ---- */

typedef struct {
    const char *format, *file, *out;
    format_kind made;
    import_options options;
} sample;

static const sample samples[] = {
    {"flat", "flat", "flat", FORMAT_TRACE, {.n_experts = 8, .n_layers = 3}},
    {"flat", "flat/experts.u8", "flat-all", FORMAT_TRACE, {.n_experts = 8, .top_k = 2, .keep_repetition = true}},
    {"olmoe", "olmoe.csv", "olmoe", FORMAT_STATS, {.top_k = 2}},
    {"cd-moe", "cd-moe.json", "cd-moe", FORMAT_STATS, {.top_k = 2}},
    {"sglang", "sglang-old.csv", "sglang-old", FORMAT_STATS, {.top_k = 2}},
    {"sglang", "sglang-counts.json", "sglang-counts", FORMAT_STATS, {.top_k = 2}},
    {"sglang", "sglang-counts-2d.json", "sglang-counts-2d", FORMAT_STATS, {.top_k = 2}},
    {"eplb", "eplb-weight.npz", "eplb-weight", FORMAT_STATS, {.top_k = 2}},
    {"eplb", "eplb-weight-float.npz", "eplb-weight-float", FORMAT_STATS, {.top_k = 2}},
    {"sglang", "sglang-map.json", "sglang-map", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2, .layer_numbers = "1-3"}},
    {"eplb", "eplb-plan.npz", "eplb-plan.npz", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2}},
    {"eplb", "eplb-plan.json", "eplb-plan.json", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2}},
    {"eplb", "eplb-plan-alone.npz", "eplb-plan-alone", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2, .n_experts = 8}},
    {"tensorrt-llm", "tensorrt-llm.yaml", "tensorrt-llm", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2}},
    {"tensorrt-llm", "tensorrt-llm-nested.yaml", "tensorrt-llm-nested", FORMAT_PLAN, {.n_ranks = 4, .n_nodes = 2}},
    {"vllm-ascend", "vllm-ascend.json", "vllm-ascend", FORMAT_PLAN, {.n_nodes = 2, .layer_numbers = "3,4,5"}},
    {"vllm", "vllm.json", "vllm", FORMAT_PLAN, {.n_layers = 2}},
    {"exflow", "trace.npy", "exflow", FORMAT_TRACE, {.n_experts = 8}},
    {"sglang", "sglang-tokens.json", "sglang-tokens", FORMAT_TRACE, {.model = "tiny"}},
    {"sglang", "sglang-tokens-bare.json", "sglang-tokens-bare", FORMAT_TRACE, {.n_experts = 8}},
    {"sglang", "sglang-tokens-0.npz", "sglang-tokens-npz", FORMAT_TRACE, {.n_experts = 8}},
};

static void import_sample(const char *folder, const sample *s)
{
    char out[4400], also[4][4300];
    const char *paths[5] = {in_folder(folder, s->file)};
    int n = 1;
    format_kind made;
    snprintf(out, sizeof out, "%s/imported-%s", folder, s->out);
    if (strcmp(s->format, "exflow") == 0) {
        snprintf(also[0], sizeof also[0], "%s/trace2.npy", folder);
        paths[n++] = also[0];
    }
    for (int i = 1; strcmp(s->out, "sglang-tokens-npz") == 0 && i < 5; i++) {
        snprintf(also[i - 1], sizeof also[0], "%s/sglang-tokens-%d.npz", folder, i);
        paths[n++] = also[i - 1];
    }
    status st = format_find(s->format)->import(paths, n, &s->options, out, &made);
    if (st != STATUS_OK)
        fail_msg("%s: %s", s->file, status_message());
    assert_int_equal(made, s->made);
    file_kind kind;
    assert_int_equal(file_recognise(out, &kind), STATUS_OK);
    assert_int_equal(kind, made == FORMAT_TRACE ? FILE_TRACE : made == FORMAT_STATS ? FILE_STATS : FILE_PLAN);
}

static void samples_are_read_as_they_were_meant(void **state)
{
    (void)state;
    need_python();
    const char *folder = support_scratch();
    char arguments[4400];
    snprintf(arguments, sizeof arguments, "make %s", folder);
    run_script(arguments);
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++)
        import_sample(folder, &samples[i]);
    snprintf(arguments, sizeof arguments, "verify %s", folder);
    run_script(arguments);
    support_remove(folder);
}

/* ---- exports ---- */

/* Homes spread evenly and shuffled, `extra` replicas on every rank: what solvers make. */
static void even_plan(uint64_t *seed, int n_ranks, int per_rank, int extra, int n_layers, const int *layer_numbers, plan *out)
{
    plan_shape shape = {
        .n_ranks = n_ranks, .n_experts = n_ranks * per_rank, .n_layers = n_layers, .layer_numbers = layer_numbers};
    plan homes;
    assert_int_equal(plan_contiguous(&shape, NULL, &homes), STATUS_OK);
    *out = homes;
    out->copy_ranks = calloc((size_t)(shape.n_experts + n_ranks * extra) * (size_t)n_layers, sizeof *out->copy_ranks);
    int at = 0;
    for (int l = 0; l < n_layers; l++) {
        int *ranks = homes.copy_ranks + l * shape.n_experts;
        bool *holds = calloc((size_t)(shape.n_experts * n_ranks), sizeof *holds);
        for (int e = shape.n_experts - 1; e > 0; e--) {
            int other = support_below(seed, e + 1), rank = ranks[e];
            ranks[e] = ranks[other];
            ranks[other] = rank;
        }
        for (int e = 0; e < shape.n_experts; e++)
            holds[e * n_ranks + ranks[e]] = true;
        for (int r = 0; r < n_ranks; r++)
            for (int i = 0; i < extra;) {
                int e = support_below(seed, shape.n_experts);
                i += !holds[e * n_ranks + r];
                holds[e * n_ranks + r] = true;
            }
        for (int e = 0; e < shape.n_experts; e++) {
            out->first_copy[l * shape.n_experts + e] = at;
            out->copy_ranks[at++] = ranks[e];
            for (int r = 0; r < n_ranks; r++)
                if (holds[e * n_ranks + r] && r != ranks[e])
                    out->copy_ranks[at++] = r;
        }
        free(holds);
    }
    out->first_copy[n_layers * shape.n_experts] = at;
    free(homes.copy_ranks);
}

static void same_copies(const plan *a, const plan *b, bool homes)
{
    assert_int_equal(a->n_experts, b->n_experts);
    assert_int_equal(a->n_ranks, b->n_ranks);
    assert_int_equal(a->n_layers, b->n_layers);
    for (int l = 0; l < a->n_layers; l++) {
        assert_int_equal(a->layer_numbers[l], b->layer_numbers[l]);
        for (int e = 0; e < a->n_experts; e++) {
            assert_int_equal(plan_n_copies(a, l, e), plan_n_copies(b, l, e));
            if (homes)
                assert_int_equal(plan_copies(a, l, e)[0], plan_copies(b, l, e)[0]);
            for (int c = 0; c < plan_n_copies(a, l, e); c++)
                assert_true(plan_holds(b, l, e, plan_copies(a, l, e)[c]));
        }
    }
}

static void list_layers(const plan *p, char *text, size_t size)
{
    size_t used = 0;
    for (int l = 0; l < p->n_layers; l++)
        used += (size_t)snprintf(text + used, size - used, l ? ",%d" : "%d", p->layer_numbers[l]);
}

/* What the script is to look at, all in one call: starting Python takes longer than the rest. */
typedef struct {
    char text[60000];
    size_t used;
} script_list;

/* Exports, reads back with our importer, and adds the file to the script's list. */
static void round_trip(const char *folder, const char *format, const plan *p, bool homes, int number, script_list *list)
{
    char file[4400], back[4400], plan_path[4400], layers[400];
    const char *paths[] = {file};
    const file_format *f = format_find(format);
    format_kind made;
    plan again;
    snprintf(file, sizeof file, "%s/%s-%d", folder, format, number);
    snprintf(back, sizeof back, "%s/%s-%d-back", folder, format, number);
    snprintf(plan_path, sizeof plan_path, "%s/%s-%d-plan", folder, format, number);
    list_layers(p, layers, sizeof layers);
    const import_options options = {.n_ranks = p->n_ranks, .n_experts = p->n_experts, .layer_numbers = layers};
    assert_int_equal(f->export_plan(p, file), STATUS_OK);
    if (f->import(paths, 1, &options, back, &made) != STATUS_OK)
        fail_msg("%s: %s", format, status_message());
    assert_int_equal(made, FORMAT_PLAN);
    assert_int_equal(plan_read(back, NULL, &again), STATUS_OK);
    same_copies(p, &again, homes);
    plan_clear(&again);
    assert_int_equal(plan_write(p, NULL, plan_path), STATUS_OK);
    list->used += (size_t)snprintf(list->text + list->used, sizeof list->text - list->used, "%s %s %s %s",
                                   list->used ? "" : "exported", format, file, plan_path);
    assert_true(list->used < sizeof list->text);
}

static const char *const slot_formats[] = {"sglang", "eplb", "tensorrt-llm", "vllm-ascend"};
static const int deep_layers[] = {2, 3, 6};

static void exports_load_back_to_the_same_plan(void **state)
{
    (void)state;
    need_python();
    const char *folder = support_scratch();
    uint64_t seed = 21;
    static script_list list;
    for (int round = 0; round < 3; round++) {
        plan p;
        even_plan(&seed, 2 + support_below(&seed, 7), 1 + support_below(&seed, 5), round == 0 ? 0 : 1, 3,
                  round == 2 ? deep_layers : NULL, &p);
        for (int f = 0; f < 4; f++)
            round_trip(folder, slot_formats[f], &p, true, round, &list);
        plan_clear(&p);
    }
    plan_shape shape = {.n_ranks = 4, .n_experts = 10, .n_layers = 2};
    plan p;
    assert_int_equal(plan_contiguous(&shape, NULL, &p), STATUS_OK); /* ranks 3, 2, 3, 2 */
    assert_int_equal(format_find("vllm")->export_plan(&p, in_folder(folder, "refused")), STATUS_UNSUPPORTED);
    assert_non_null(strstr(status_message(), "rank 1 holds 2 experts, but vLLM sets room aside for 3"));
    for (int l = 0; l < 2; l++) /* 3, 3, 2, 2 */
        for (int e = 0; e < 10; e++)
            p.copy_ranks[l * 10 + e] = e < 6 ? e / 3 : 2 + (e - 6) / 2;
    round_trip(folder, "vllm", &p, true, 0, &list);
    plan_clear(&p);
    run_script(list.text);
    support_remove(folder);
}

/* Ranks with different numbers of copies: padded on the way out, the same copies on the way in. eplb keeps all homes. */
static void uneven_plans_are_padded(void **state)
{
    (void)state;
    need_python();
    const char *folder = support_scratch();
    uint64_t seed = 22;
    static script_list list;
    int done = 0;
    for (int round = 0; done < 3 && round < 200; round++) {
        plan_shape shape = {.n_ranks = 3, .n_experts = 12, .n_layers = 2};
        plan p;
        slot_layout layout = {0};
        int lost = 0;
        assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.4, &p), STATUS_OK);
        if (slot_layout_of_plan("test", &p, &layout, &lost) == STATUS_OK) {
            for (int f = 0; f < 4; f++)
                round_trip(folder, slot_formats[f], &p, f == 1 || lost == 0, round, &list);
            done++;
        } else {
            assert_non_null(strstr(status_message(), "holds no expert of layer"));
        }
        slot_layout_clear(&layout);
        plan_clear(&p);
    }
    assert_int_equal(done, 3);
    run_script(list.text);
    support_remove(folder);
}

static void plans_that_a_format_cannot_say_are_refused(void **state)
{
    (void)state;
    uint64_t seed = 23;
    const char *folder = support_scratch(), *path = in_folder(folder, "x");
    plan p;
    even_plan(&seed, 4, 2, 1, 2, NULL, &p);
    assert_int_equal(format_find("vllm")->export_plan(&p, path), STATUS_UNSUPPORTED);
    assert_non_null(strstr(status_message(), "has replicas"));
    plan_clear(&p);
    even_plan(&seed, 4, 4, 0, 4, NULL, &p);
    assert_int_equal(format_find("vllm")->export_plan(&p, path), STATUS_UNSUPPORTED);
    assert_non_null(strstr(status_message(), "holds for all layers"));
    for (int i = 0; i < 64; i++)
        p.copy_ranks[i] = i % 3; /* rank 3 is empty */
    for (int f = 0; f < 4; f++) {
        assert_int_equal(format_find(slot_formats[f])->export_plan(&p, path), STATUS_UNSUPPORTED);
        assert_non_null(strstr(status_message(), "rank 3 holds no expert of layer 0"));
    }
    plan_clear(&p);
    support_remove(folder);
}

static void counts_are_exported(void **state)
{
    (void)state;
    need_python();
    const char *folder = support_scratch();
    char stats_path[4400], path[4400], arguments[9500];
    routing_shape shape = support_routing_shape(3, 8, 2, 2); /* layers 1, 3, 5 */
    routing_stats *stats;
    uint64_t seed = 24;
    uint16_t experts[6];
    assert_int_equal(routing_stats_create(&shape, false, &stats), STATUS_OK);
    for (int i = 0; i < 200; i++) {
        support_routing_row(&seed, &shape, 0, experts, NULL);
        assert_int_equal(routing_stats_add_row(stats, experts, i % 2, i % 3 == 0), STATUS_OK);
    }
    snprintf(stats_path, sizeof stats_path, "%s/stats", folder);
    assert_int_equal(routing_stats_write(stats, stats_path), STATUS_OK);
    for (int f = 0; f < 2; f++) {
        snprintf(path, sizeof path, "%s/%s", folder, slot_formats[f]);
        assert_int_equal(format_find(slot_formats[f])->export_stats(stats, path), STATUS_OK);
        snprintf(arguments, sizeof arguments, "counts %s %s %s", slot_formats[f], path, stats_path);
        run_script(arguments);
    }
    routing_stats_destroy(stats);
    support_remove(folder);
}

/* ---- slots ---- */

static void homes_stand_nearest_the_front(void **state)
{
    (void)state;
    /* 2 ranks of 3 slots: expert 0 second on rank 0 and first on rank 1: its home is rank 1; expert 2 twice on rank 1: one copy
     */
    slot_layout s;
    plan p;
    const int experts[] = {1, 0, 3, 0, 2, 2};
    assert_int_equal(slot_layout_create("x", 1, 6, 4, 2, &s), STATUS_OK);
    memcpy(s.expert_of_slot, experts, sizeof experts);
    assert_int_equal(slot_layout_to_plan("x", &s, NULL, 1, "x", &p), STATUS_OK);
    assert_int_equal(plan_n_copies(&p, 0, 0), 2);
    assert_int_equal(plan_copies(&p, 0, 0)[0], 1);
    assert_int_equal(plan_copies(&p, 0, 0)[1], 0);
    assert_int_equal(plan_n_copies(&p, 0, 2), 1);
    assert_int_equal(plan_copies(&p, 0, 3)[0], 0);
    plan_clear(&p);
    slot_layout_clear(&s);
}

/* ---- bad input ---- */

typedef struct {
    const char *format, *name, *text, *says; /* `says`: after "<file>: ", or anywhere */
    import_options options;
} mistake;

static const mistake mistakes[] = {
    {"olmoe", "a.csv", "", "the file is empty", {.top_k = 1}},
    {"olmoe", "a.csv", "domain,layer,expert\nx,0,0\n", "names no column count", {.top_k = 1}},
    {"olmoe",
     "a.csv",
     "domain,layer,expert,count\nx,0,0,-3\n",
     "line 2: count is \"-3\", not a whole number from 0",
     {.top_k = 1}},
    {"olmoe", "a.csv", "domain,layer,expert,count\nx,0,0,nan\n", "line 2: count is \"nan\"", {.top_k = 1}},
    {"olmoe",
     "a.csv",
     "domain,layer,expert,count\nx,0,0,3\nx,0,1\n",
     "line 3 has 3 fields, the first line 4 (cut short?)",
     {.top_k = 1}},
    {"olmoe", "a.csv", "domain,layer,expert,count\nx,0,99999999,3\n", "line 2: expert is \"99999999\"", {.top_k = 1}},
    {"olmoe",
     "a.csv",
     "domain,layer,expert,count\nx,0,1,3\nx,0,1,4\n",
     "domain x, layer 0, expert 1 is counted twice",
     {.top_k = 1}},
    {"olmoe",
     "a.csv",
     "domain,layer,expert,count\nx,0,8,3\n",
     "layer 0: expert 8 is outside 0 to 7",
     {.top_k = 1, .n_experts = 8}},
    {"olmoe", "a.csv", "domain,layer,expert,count\nx,0,1,3\n", "1 layers, but 2 were asked for", {.top_k = 1, .n_layers = 2}},
    {"olmoe", "a.csv", "domain,layer,expert,count\nx,0,1,3\n", "how many experts a token chooses: say so with --top-k", {0}},
    {"olmoe", "a.csv", "domain,layer,expert,count\n\xff,0,0,1\n", "line 2 is no UTF-8 text", {.top_k = 1}},
    {"olmoe", "a.csv", "domain,layer,expert,count\n", "no counts in it", {.top_k = 1}},
    {"olmoe", "a.csv", "domain,layers,expert_i,expert_j,count\nx,0-7,0,0,9\n", "experts of equal rank only", {.top_k = 1}},
    {"cd-moe", "a.json", "[1]", "holds no JSON object", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"0-1\": [1, 2]}", "0-1 is not a list of three numbers", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"0-1\": [1, -2, 3]}", "0-1", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"0-1\": [-1, 2, 3]}", "its sum of weights is not a number from 0 up", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"0-1\": [1, 2.5, 3]}", "0-1", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"zero\": [1, 2, 3]}", "key \"zero\" is not \"layer-expert\"", {.top_k = 1}},
    {"cd-moe", "a.json", "{\"0-1\": [1, 2, 3], \"0-2\"", "a.json", {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [[1, -2]]}", "weight[0][1] is -2, not a number from 0", {.top_k = 1}},
    {"eplb",
     "a.json",
     "{\"weight\": [[1, 2], [3]]}",
     "weight: a list at depth 2 has 1 entries where the first has 2",
     {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [[1, null]]}", "weight: entry 1 of a list at depth 2 is not a number", {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [[1, 1e999]]}", "a.json", {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [1, 2]}", "weight has 1 dimensions, not 2", {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [[0, 0]]}", "every weight is 0", {.top_k = 1}},
    {"eplb", "a.json", "{\"weight\": [[1, 2]]}", "2 experts, but 3 were asked for", {.top_k = 1, .n_experts = 3}},
    {"eplb", "a.json", "{\"other\": 1}", "neither phy2log (a plan) nor weight (statistics)", {.top_k = 1}},
    {"eplb", "a.json", "{\"phy2log\": [[0, 1]]}", "how many ranks the slots are for: say so with --ranks", {0}},
    {"eplb",
     "a.json",
     "{\"phy2log\": [[0, 1, 1]]}",
     "3 slots for 2 experts cannot be cut into equal blocks for 2 ranks",
     {.n_ranks = 2}},
    {"eplb", "a.json", "{\"phy2log\": [[0, 2]]}", "2 slots for 3 experts", {.n_ranks = 2}},
    {"eplb", "a.json", "{\"phy2log\": [[0, 2, 0, 2]]}", "layer 0: expert 1 is in no slot", {.n_ranks = 2}},
    {"eplb", "a.json", "{\"phy2log\": [[0, -1]]}", "phy2log[0][1] is -1, not a whole number", {.n_ranks = 2}},
    {"eplb", "a.json", "{\"phy2log\": [[0, 1.5]]}", "phy2log[0][1] is 1.5, not a whole number", {.n_ranks = 2}},
    {"eplb",
     "a.json",
     "{\"phy2log\": [[0, 1]], \"logcnt\": [[1, 2]]}",
     "logcnt: layer 0: expert 1 is in 1 slots, not 2",
     {.n_ranks = 2}},
    {"eplb", "a.json", "{\"phy2log\": [[0, 1]], \"log2phy\": [[[0], [0]]]}", "expert 1 is not in slot 0", {.n_ranks = 2}},
    {"sglang", "a.json", "{}", "none of physical_to_logical_map, logical_count", {.n_ranks = 2}},
    {"sglang",
     "a.json",
     "{\"physical_to_logical_map\": [[0, 1], [0]]}",
     "physical_to_logical_map: a list at depth 2",
     {.n_ranks = 2}},
    {"sglang",
     "a.json",
     "{\"physical_to_logical_map\": [[0, 1]]}",
     "1 layers, so there is no layer 3",
     {.n_ranks = 2, .layer_numbers = "0,3"}},
    {"sglang",
     "a.json",
     "{\"physical_to_logical_map\": [[0, 1]]}",
     "layer numbers '3-1' are not a rising list",
     {.n_ranks = 2, .layer_numbers = "3-1"}},
    {"sglang", "a.json", "{\"logical_count\": [[0, 0]]}", "none of its 1 layers has experts", {.top_k = 1}},
    {"sglang", "a.json", "{\"logical_count\": [[-1, 0]]}", "logical_count[0][0] is -1", {.top_k = 1}},
    {"sglang", "a.json", "{\"records\": [{\"positions\": [0]}]}", "record 0: topk_ids_of_layer is missing", {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[0]]], \"positions\": [0, 1]}]}",
     "record 0: topk_ids_of_layer is not [layers][2 tokens]",
     {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[9]]], \"positions\": [0]}]}",
     "layer 0: expert 9 is outside 0 to 3",
     {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[1]]], \"positions\": [-4]}]}",
     "positions[0] is -4",
     {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[1], [1]]], \"positions\": [0, 2], \"extend_seq_lens\": [2]}]}",
     "position 2 does not follow in a sequence that began at 0",
     {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[1]]], \"positions\": [0], \"extend_seq_lens\": [3]}]}",
     "record 0[0] is 3",
     {.n_experts = 4}},
    {"sglang",
     "a.json",
     "{\"records\": [{\"topk_ids_of_layer\": [[[1]]], \"positions\": [0], \"input_ids\": []}]}",
     "0 input_ids, but 1 positions",
     {.n_experts = 4}},
    {"sglang", "a.json", "{\"records\": []}", "its records hold no tokens", {.n_experts = 4}},
    {"sglang", "a.json", "{\"records\": [{\"topk_ids_of_layer\": [[[1]]], \"positions\": [0]}]}", "say so with --experts", {0}},
    {"sglang", "a.pt", "\x80\x02}q\x01.", "a torch pickle, which only Python can read safely", {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "", "the file is empty", {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "num_slots: 2\n", "initial_global_assignments is missing", {.n_ranks = 2}},
    {"tensorrt-llm",
     "a.yaml",
     "num_slots: 2\ninitial_global_assignments: {0: [0, 1, 2]}\n",
     "layer 0: not a list of num_slots = 2",
     {.n_ranks = 2}},
    {"tensorrt-llm",
     "a.yaml",
     "num_slots: 2\ninitial_global_assignments: {0: [0, 1], 0: [1, 0]}\n",
     "line 2: 0 is given twice",
     {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "num_slots: 2\ninitial_global_assignments: {0: [0, x]}\n", "layer 0", {.n_ranks = 2}},
    {"tensorrt-llm",
     "a.yaml",
     "num_slots: 2\ninitial_global_assignments: {one: [0, 1]}\n",
     "\"one\" is not the number of a layer",
     {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "num_slots: &a 2\nx: *a\n", "line 2: an alias", {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "num_slots: [2\n", "not YAML", {.n_ranks = 2}},
    {"tensorrt-llm", "a.yaml", "a: 1\n---\nb: 2\n", "a second document", {.n_ranks = 2}},
    {"tensorrt-llm",
     "a.yaml",
     "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\n",
     "nested more than 32 deep",
     {.n_ranks = 2}},
    {"vllm-ascend",
     "a.json",
     "{\"moe_layer_count\": 2, \"layer_list\": []}",
     "layer_list has 0 entries, but moe_layer_count is 2",
     {0}},
    {"vllm-ascend", "a.json", "{\"moe_layer_count\": 1, \"layer_list\": [{\"layer_id\": 4}]}", "layer_id", {0}},
    {"vllm-ascend",
     "a.json",
     "{\"moe_layer_count\": 1, \"layer_list\": [{\"layer_id\": 0, \"device_count\": 2, \"device_list\": "
     "[{\"device_id\": 0, \"device_expert\": [0, 1]}, {\"device_id\": 1, \"device_expert\": [1]}]}]}",
     "device 1: device_expert has 1 entries where the first device has 2",
     {0}},
    {"vllm", "a.json", "{\"expert_to_ep_rank\": [0, 1]}", "how many layers have experts: say so with --layers", {0}},
    {"vllm", "a.json", "{\"expert_to_ep_rank\": [0, 7]}", "rank 7 is outside 0 to 1", {.n_layers = 1, .n_ranks = 2}},
    {"vllm", "a.json", "{\"expert_to_ep_rank\": []}", "is not a list of ranks", {.n_layers = 1}},
    {"exflow", "a.npy", "\x93NUMPY", "not an .npy array", {.n_experts = 4}},
    {"exflow", "a.npy", "no numbers here", "not an .npy array", {.n_experts = 4}},
    {"exflow", "a.npy", "x", "how many experts a layer has: say so with --experts", {0}},
};

static void write_text(const char *path, const char *text, size_t n)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    fclose(f);
}

static void bad_input_is_one_sentence(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        const mistake *m = &mistakes[i];
        char path[4400], out[4400];
        const char *paths[] = {path};
        struct stat info;
        format_kind made;
        snprintf(path, sizeof path, "%s/%s", folder, m->name);
        snprintf(out, sizeof out, "%s/out", folder);
        write_text(path, m->text, strlen(m->text));
        status st = format_find(m->format)->import(paths, 1, &m->options, out, &made);
        if (st == STATUS_OK || !strstr(status_message(), m->says))
            fail_msg("%s: %s: %s, not: %s", m->format, m->text, st == STATUS_OK ? "taken" : status_message(), m->says);
        assert_true(strstr(status_message(), m->name) || st == STATUS_USAGE);
        assert_null(strchr(status_message(), '\n'));
        assert_int_equal(stat(out, &info), -1); /* nothing half-made */
    }
    support_remove(folder);
}

static void arrays_that_lie_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *header, *says;
    } cases[] = {
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2), }",
         "8 bytes of numbers, but its shape and type make 4 times 4"},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999, 99999999999), }", "more than 2^63 numbers"},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (1152921504606846976,), }", "(cut short?)"},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (-2,), }", "its shape is not a list of numbers"},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (1,1,1,1,1,2), }", "more than 5 dimensions"},
        {"{'descr': '<i4', 'fortran_order': True, 'shape': (1, 2), }", "Fortran order"},
        {"{'descr': '>i4', 'fortran_order': False, 'shape': (2,), }", "big-endian"},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "Python objects (a pickle)"},
        {"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (2,), }", "not an array of plain numbers"},
        {"{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }", "type <c8 are not known"},
        {"{'descr': '<i4', 'shape': (2,), }", "Fortran order"},
        {"{}", "not an array of plain numbers"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char bytes[400] = "\x93NUMPY\1\0";
        number_array a;
        size_t n = strlen(cases[i].header);
        bytes[8] = (char)n;
        memcpy(bytes + 10, cases[i].header, n);
        assert_int_not_equal(number_array_parse_npy("a.npy", bytes, 10 + n + 8, &a), STATUS_OK);
        if (!strstr(status_message(), cases[i].says))
            fail_msg("%s: %s", cases[i].header, status_message());
    }
}

/* Every prefix of a good archive, and of a good flat array, is refused or (where only unused bytes are gone) read the same. */
static void cut_files_are_refused(void **state)
{
    (void)state;
    need_python();
    const char *folder = support_scratch();
    char arguments[4400], path[4400], out[4400], bytes[20000];
    const char *paths[] = {path};
    const import_options options = {.n_ranks = 4};
    format_kind made;
    snprintf(arguments, sizeof arguments, "make %s", folder);
    run_script(arguments);
    FILE *f = fopen(in_folder(folder, "eplb-plan.npz"), "r");
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    snprintf(path, sizeof path, "%s/cut.npz", folder);
    snprintf(out, sizeof out, "%s/out", folder);
    for (size_t size = 0; size < n; size += 1 + size / 20) {
        write_text(path, bytes, size);
        assert_int_not_equal(format_find("eplb")->import(paths, 1, &options, out, &made), STATUS_OK);
        assert_non_null(strstr(status_message(), "cut.npz"));
    }
    snprintf(path, sizeof path, "%s/flat", folder);
    assert_int_equal(truncate(in_folder(folder, "flat/probs.f16"), 100), 0);
    const import_options flat = {.n_experts = 8, .n_layers = 3};
    assert_int_equal(format_find("flat")->import(paths, 1, &flat, out, &made), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "probs.f16: 100 bytes, but the choices need 264 (cut short?)"));
    assert_int_equal(truncate(in_folder(folder, "flat/experts.u8"), 100), 0);
    assert_int_equal(format_find("flat")->import(paths, 1, &flat, out, &made), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "experts.u8: 100 choices cannot be shared among the 22 tokens"));
    support_remove(folder);
}

/* ---- real recordings, where they are ---- */

static void recordings_in_use_are_taken(void **state)
{
    (void)state;
    const char *flat = support_source("../shared/data/routing/gptoss20b-mmlu"), *paths[] = {flat};
    struct stat info;
    if (stat(flat, &info) != 0)
        skip();
    const char *folder = support_scratch();
    char out[4400], line[1000];
    const import_options options = {.n_experts = 32, .n_layers = 24, .model = "gpt-oss-20b"};
    format_kind made;
    routing_trace *trace;
    long long tokens = 0, n, repetition;
    snprintf(out, sizeof out, "%s/out", folder);
    assert_int_equal(format_find("flat")->import(paths, 1, &options, out, &made), STATUS_OK);
    assert_int_equal(routing_trace_open(out, &trace), STATUS_OK);
    FILE *f = fopen(in_folder(flat, "index.csv"), "r");
    while (fgets(line, sizeof line, f)) /* example,dataset,category,finished,repetition,prompt_tokens,n_tokens,offset_tokens */
        if (sscanf(line, "%*d,%*[^,],%*[^,],%*d,%lld,%*d,%lld", &repetition, &n) == 2 && !repetition)
            tokens += n;
    fclose(f);
    assert_int_equal(routing_trace_n_tokens(trace), tokens);
    assert_int_equal(routing_trace_shape(trace)->n_domains, 57);
    routing_trace_close(trace);
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"every format's sample is read as its engine means it", samples_are_read_as_they_were_meant, NULL, NULL, NULL},
        {"exports load back to the same plan, and Python reads the same", exports_load_back_to_the_same_plan, NULL, NULL, NULL},
        {"ranks with fewer copies are padded, and read back without it", uneven_plans_are_padded, NULL, NULL, NULL},
        {"what a format cannot say is refused", plans_that_a_format_cannot_say_are_refused, NULL, NULL, NULL},
        {"counts are exported", counts_are_exported, NULL, NULL, NULL},
        {"the home stands nearest the front of its block; an expert twice on a rank is one copy", homes_stand_nearest_the_front,
         NULL, NULL, NULL},
        {"bad input is one sentence with file, field and cause, and leaves nothing", bad_input_is_one_sentence, NULL, NULL, NULL},
        {"arrays that lie about themselves are refused", arrays_that_lie_are_refused, NULL, NULL, NULL},
        {"a real recording is taken, without its loops", recordings_in_use_are_taken, NULL, NULL, NULL},
        {"files that were cut are refused", cut_files_are_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
