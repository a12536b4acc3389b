/* test_routing_trace.c - traces: what goes in comes out, in the agreed layout, and nothing wrong goes either way. */
#include "placement/routing_trace.h"
#include "tests/support.h"
#include "tests/support_routing.h"

#include <dirent.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char folder[4096];

static const char *trace_path(void)
{
    static char path[4200];
    snprintf(path, sizeof path, "%s/trace.safetensors", folder);
    return path;
}

static int enter(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "%s", support_scratch());
    return 0;
}

static int leave(void **state)
{
    (void)state;
    support_remove(folder);
    return 0;
}

static int count_files(void)
{
    int n = 0;
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

enum { MAX_CHOICES = 64 };

static void make_row(uint64_t *seed, const routing_shape *shape, int number, uint16_t *experts, float *weights, routing_row *row)
{
    support_routing_row(seed, shape, 10, experts, weights);
    *row = (routing_row){.experts = experts,
                         .weights = weights,
                         .sequence = number / 7,
                         .position = number % 7,
                         .phase = support_below(seed, 2),
                         .domain = support_below(seed, shape->n_domains)};
}

static void write_random(const routing_shape *shape, uint64_t seed, int n_rows)
{
    routing_trace_writer *w;
    assert_int_equal(routing_trace_writer_create(trace_path(), shape, &w), STATUS_OK);
    for (int r = 0; r < n_rows; r++) {
        uint16_t experts[MAX_CHOICES];
        float weights[MAX_CHOICES];
        routing_row row;
        make_row(&seed, shape, r, experts, weights, &row);
        assert_int_equal(routing_trace_writer_add(w, &row), STATUS_OK);
    }
    assert_int_equal(routing_trace_writer_rows(w), n_rows);
    assert_int_equal(routing_trace_writer_finish(w), STATUS_OK);
    routing_trace_writer_destroy(w);
    assert_int_equal(count_files(), 1);
}

static void check_random(const routing_shape *shape, uint64_t seed, int n_rows)
{
    routing_trace *t;
    size_t n = (size_t)shape->n_layers * (size_t)shape->top_k;
    assert_int_equal(routing_trace_open(trace_path(), &t), STATUS_OK);
    assert_int_equal(routing_trace_n_tokens(t), n_rows);
    assert_int_equal(routing_trace_shape(t)->top_k, shape->top_k);
    assert_int_equal(routing_shape_same_model("a", shape, "b", routing_trace_shape(t)), STATUS_OK);
    for (int r = 0; r < n_rows; r++) {
        uint16_t experts[MAX_CHOICES], got_experts[MAX_CHOICES];
        float weights[MAX_CHOICES], got_weights[MAX_CHOICES];
        routing_row want;
        make_row(&seed, shape, r, experts, weights, &want);
        routing_row got = routing_trace_row(t, r, got_experts, got_weights);
        assert_memory_equal(got.experts, want.experts, n * sizeof *experts);
        assert_memory_equal(got.weights, want.weights, n * sizeof *weights);
        assert_int_equal(got.sequence, want.sequence);
        assert_int_equal(got.position, want.position);
        assert_int_equal(got.phase, want.phase);
        assert_int_equal(got.domain, want.domain);
    }
    routing_trace_close(t);
}

static void rows_come_back(void **state)
{
    (void)state;
    static const struct {
        int layers, experts, k, domains, rows;
    } cases[] = {{1, 1, 1, 1, 1},    {3, 8, 2, 4, 100},     {5, 255, 8, 2, 300},
                 {4, 256, 8, 1, 50}, {16, 512, 4, 3, 9000}, {2, 8, 2, 1, 0}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        routing_shape shape = support_routing_shape(cases[c].layers, cases[c].experts, cases[c].k, cases[c].domains);
        write_random(&shape, c, cases[c].rows);
        check_random(&shape, c, cases[c].rows);
    }
}

static void file_has_the_agreed_layout(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        tensor_dtype narrow, wide;
    } want[] = {{"experts", DTYPE_U8, DTYPE_U16},   {"weights", DTYPE_F32, DTYPE_F32}, {"sequence", DTYPE_I32, DTYPE_I32},
                {"position", DTYPE_I32, DTYPE_I32}, {"phase", DTYPE_U8, DTYPE_U8},     {"domain", DTYPE_U16, DTYPE_U16}};
    for (int wide = 0; wide < 2; wide++) {
        routing_shape shape = support_routing_shape(3, wide ? 256 : 255, 5, 2);
        write_random(&shape, 1, 20);
        safetensors *file;
        assert_int_equal(safetensors_open(trace_path(), &file), STATUS_OK);
        assert_int_equal(safetensors_count(file), 6);
        for (int i = 0; i < 6; i++) {
            const tensor_view *view = safetensors_find(file, want[i].name);
            const int64_t dims[3] = {20, 3, 5};
            assert_non_null(view);
            assert_int_equal(view->dtype, wide ? want[i].wide : want[i].narrow);
            assert_int_equal(view->n_dims, i < 2 ? 3 : 1);
            assert_memory_equal(view->shape, dims, (size_t)view->n_dims * sizeof *dims);
        }
        assert_string_equal(safetensors_metadata(file, "format"), "convoke-routing");
        assert_string_equal(safetensors_metadata(file, "model"), "demo");
        assert_string_equal(safetensors_metadata(file, "n_experts"), wide ? "256" : "255");
        assert_string_equal(safetensors_metadata(file, "layers"), "[1,3,5]");
        assert_string_equal(safetensors_metadata(file, "domains"), "[\"math\",\"code\"]");
        safetensors_close(file);
    }
}

static void wrong_rows_are_refused(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(2, 8, 2, 2);
    routing_trace_writer *w;
    const uint16_t good[4] = {1, 2, 3, ROUTING_NO_EXPERT}, bad[4] = {1, 2, 3, 8};
    const float weights[4] = {1, 0.5f, 1, 0};
    const routing_row rows[] = {{good, weights, 0, 0, 2, 0, 0, 0},
                                {good, weights, 0, 0, -1, 0, 0, 0},
                                {good, weights, 0, 0, 0, 2, 0, 0},
                                {bad, weights, 0, 0, 0, 0, 0, 0},
                                {good, weights, 4, 5, 1, 1, 0, 0}};
    assert_int_equal(routing_trace_writer_create(trace_path(), &shape, &w), STATUS_OK);
    for (int i = 0; i < 5; i++)
        assert_int_equal(routing_trace_writer_add(w, &rows[i]), i < 4 ? STATUS_BAD_INPUT : STATUS_OK);
    assert_non_null(strstr(status_message(), "row 0: layer 3: expert 8 is outside 0 to 7"));
    assert_int_equal(routing_trace_writer_rows(w), 1);
    assert_int_equal(routing_trace_writer_finish(w), STATUS_OK);
    routing_trace_writer_destroy(w);
    routing_trace *t;
    uint16_t experts[4];
    assert_int_equal(routing_trace_open(trace_path(), &t), STATUS_OK);
    routing_row row = routing_trace_row(t, 0, experts, NULL);
    assert_null(row.weights);
    assert_memory_equal(experts, good, sizeof good);
    assert_int_equal(row.sequence, 4);
    routing_trace_close(t);
}

static void unfinished_leaves_nothing(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(2, 8, 2, 1);
    routing_trace_writer *w;
    int before = count_files();
    assert_int_equal(routing_trace_writer_create(trace_path(), &shape, &w), STATUS_OK);
    assert_int_equal(count_files(), before); /* the spool has no name */
    routing_trace_writer_destroy(w);
    assert_int_equal(count_files(), before);
    assert_int_equal(routing_trace_writer_create("/nowhere/trace", &shape, &w), STATUS_IO);
    assert_non_null(strstr(status_message(), "/nowhere/trace: cannot be written"));
}

/* One column of a hand-made trace of 2 tokens, 1 layer, top-2 of 8 experts: changed or (NULL name) left out. */
typedef struct {
    const char *name;
    tensor_dtype dtype;
    int n_dims;
    int64_t shape[3];
    const void *bytes;
    size_t n_bytes;
} column;

static void write_columns(const column *columns, int n, const char *n_experts)
{
    safetensors_writer *w;
    int index[8];
    assert_int_equal(safetensors_writer_create(trace_path(), &w), STATUS_OK);
    safetensors_writer_metadata(w, "format", "convoke-routing");
    safetensors_writer_metadata(w, "n_experts", n_experts);
    safetensors_writer_metadata(w, "layers", "[6]");
    for (int i = 0; i < n; i++)
        if (columns[i].name)
            assert_int_equal(
                safetensors_writer_declare(w, columns[i].name, columns[i].dtype, columns[i].n_dims, columns[i].shape, &index[i]),
                STATUS_OK);
    assert_int_equal(safetensors_writer_begin(w), STATUS_OK);
    for (int i = 0; i < n; i++)
        if (columns[i].name)
            assert_int_equal(safetensors_writer_put(w, index[i], 0, columns[i].bytes, columns[i].n_bytes), STATUS_OK);
    assert_int_equal(safetensors_writer_finish(w), STATUS_OK);
    safetensors_writer_destroy(w);
}

static const uint8_t byte_experts[4] = {1, 2, 7, 255}, bad_experts[4] = {1, 2, 8, 0}, phases[2] = {0, 1}, bad_phases[2] = {0, 2};
static const uint16_t short_experts[4] = {1, 2, 7, 65535}, domains[2] = {0, 0}, bad_domains[2] = {0, 1};
static const uint16_t halves[4] = {0x3c00, 0x3555, 0x8001, 0x0000}; /* 1, about 1/3, the smallest negative, 0 */
static const int32_t numbers[2] = {3, 4};

static const column good_columns[7] = {
    {"experts", DTYPE_U8, 3, {2, 1, 2}, byte_experts, 4},
    {"weights", DTYPE_F16, 3, {2, 1, 2}, halves, 8},
    {"sequence", DTYPE_I32, 1, {2}, numbers, 8},
    {"position", DTYPE_I32, 1, {2}, numbers, 8},
    {"phase", DTYPE_U8, 1, {2}, phases, 2},
    {"domain", DTYPE_U16, 1, {2}, domains, 4},
    {"scores", DTYPE_F16, 3, {2, 1, 2}, halves, 8},
};

static void half_weights_and_further_tensors(void **state)
{
    (void)state;
    routing_trace *t;
    uint16_t experts[2];
    float weights[2];
    const tensor_view *view;
    write_columns(good_columns, 7, "8");
    assert_int_equal(routing_trace_open(trace_path(), &t), STATUS_OK);
    routing_trace_row(t, 0, experts, weights);
    assert_true(weights[0] == 1 && fabsf(weights[1] - 1 / 3.0f) < 2e-4f);
    routing_trace_row(t, 1, experts, weights);
    assert_true(weights[0] == -0x1p-24f && weights[1] == 0);
    assert_int_equal(experts[1], ROUTING_NO_EXPERT);
    assert_int_equal(routing_trace_tensor(t, "scores", &view), STATUS_OK);
    assert_int_equal(view->shape[2], 2);
    assert_int_equal(routing_trace_tensor(t, "predicted", &view), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "the trace has no tensor predicted"));
    assert_int_equal(routing_trace_tensor(t, "sequence", &view), STATUS_BAD_INPUT);
    routing_trace_close(t);
}

static void damaged_traces_are_refused(void **state)
{
    (void)state;
    static const struct {
        int changed;
        column with;
        const char *n_experts, *sentence;
    } cases[] = {
        {0, {0}, "8", "tensor experts is missing"},
        {5, {0}, "8", "tensor domain is missing"},
        {0, {"experts", DTYPE_U16, 3, {2, 1, 2}, short_experts, 8}, "8", NULL},
        {0, {"experts", DTYPE_U8, 3, {2, 1, 2}, bad_experts, 4}, "8", "token 1: layer 6: expert 8 is outside 0 to 7"},
        {0, {"experts", DTYPE_U8, 2, {2, 2}, byte_experts, 4}, "8", "tensor experts is not [tokens] [layers] [k]"},
        {0, {"experts", DTYPE_U8, 3, {2, 2, 1}, byte_experts, 4}, "8", "tensor experts is not [tokens] [layers] [k]"},
        {0, {"experts", DTYPE_U8, 3, {2, 1, 0}, byte_experts, 0}, "8", "tensor experts is not [tokens] [layers] [k]"},
        {0, {"experts", DTYPE_U8, 3, {2, 1, 2}, byte_experts, 4}, "300", "tensor experts is of type U8"},
        {0, {"experts", DTYPE_U8, 3, {2, 1, 2}, byte_experts, 4}, "1", "tensor experts is not [tokens] [layers] [k]"},
        {1, {"weights", DTYPE_F16, 3, {1, 2, 2}, halves, 8}, "8", "tensor weights is not [tokens] [layers] [k]"},
        {1, {"weights", DTYPE_BF16, 3, {2, 1, 2}, halves, 8}, "8", "tensor weights is of type BF16"},
        {2, {"sequence", DTYPE_I32, 1, {1}, numbers, 4}, "8", "tensor sequence is not [tokens]"},
        {4, {"phase", DTYPE_U8, 1, {2}, bad_phases, 2}, "8", "token 1: phase 2"},
        {5, {"domain", DTYPE_U16, 1, {2}, bad_domains, 4}, "8", "token 1: phase 1, domain 1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        column columns[7];
        routing_trace *t = NULL;
        memcpy(columns, good_columns, sizeof columns);
        columns[cases[i].changed] = cases[i].with;
        write_columns(columns, 6, cases[i].n_experts);
        assert_int_equal(routing_trace_open(trace_path(), &t) == STATUS_OK, cases[i].sentence == NULL);
        if (cases[i].sentence && !strstr(status_message(), cases[i].sentence))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, status_message(), cases[i].sentence);
        routing_trace_close(t);
    }
}

static void bad_shapes_are_refused(void **state)
{
    (void)state;
    static const char *const twins[] = {"a", "b", "a"};
    static const int falling[] = {3, 2};
    routing_shape cases[6];
    for (int c = 0; c < 6; c++)
        cases[c] = support_routing_shape(2, 8, 2, 2);
    cases[0].n_experts = 0;
    cases[1].top_k = 0;
    cases[2].top_k = 9;
    cases[3].layer_numbers = falling;
    cases[4].n_domains = 0;
    cases[5].n_domains = 3;
    cases[5].domains = twins;
    for (int c = 0; c < 6; c++) {
        routing_trace_writer *w;
        assert_int_equal(routing_trace_writer_create(trace_path(), &cases[c], &w), STATUS_BAD_INPUT);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"rows come back as they were, dropped experts too, for 1 to 512 experts", rows_come_back, NULL, NULL, NULL},
        {"the file has the agreed tensors and metadata; u8 up to 255 experts", file_has_the_agreed_layout, NULL, NULL, NULL},
        {"a wrong row is refused and the others stay", wrong_rows_are_refused, NULL, NULL, NULL},
        {"an unfinished trace leaves nothing behind", unfinished_leaves_nothing, NULL, NULL, NULL},
        {"half weights are read exactly; further tensors are found by name", half_weights_and_further_tensors, NULL, NULL, NULL},
        {"damaged traces are refused by name", damaged_traces_are_refused, NULL, NULL, NULL},
        {"shapes that cannot be are refused", bad_shapes_are_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
