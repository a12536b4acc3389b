/* test_routing_stats.c - counts against counting the naive way, files against memory. */
#include "placement/routing_stats.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, EXPERTS = 11, K = 4, DOMAINS = 3, ROWS = 400 };

/* Recorded rows, from which everything is counted again. */
static uint16_t rows[ROWS][LAYERS][K];
static int row_domain[ROWS], row_phase[ROWS];

static bool chose(int row, int layer, int expert)
{
    for (int j = 0; j < K; j++)
        if (rows[row][layer][j] == expert)
            return true;
    return false;
}

/* Domain 2 stays unused, and so does (1, decode). */
static void make_rows(uint64_t seed)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, DOMAINS);
    for (int r = 0; r < ROWS; r++) {
        support_routing_row(&seed, &shape, 15, rows[r][0], NULL);
        row_domain[r] = support_below(&seed, 2);
        row_phase[r] = row_domain[r] == 1 ? PHASE_PREFILL : support_below(&seed, 2);
    }
}

static routing_stats *count_rows(int first, int last, bool pairs)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, DOMAINS);
    routing_stats *s;
    assert_int_equal(routing_stats_create(&shape, pairs, &s), STATUS_OK);
    for (int r = first; r < last; r++)
        assert_int_equal(routing_stats_add_row(s, rows[r][0], row_domain[r], row_phase[r]), STATUS_OK);
    return s;
}

static uint64_t count_naive(int domain, int phase, int layer, int i, int next_layer, int j)
{
    uint64_t n = 0;
    for (int r = 0; r < ROWS; r++)
        n += row_domain[r] == domain && row_phase[r] == phase && chose(r, layer, i) && chose(r, next_layer, j);
    return n;
}

static void check_slot(const routing_stats *s, int d, int p)
{
    const uint64_t *per = routing_stats_tokens_per_expert(s, d, p);
    const uint64_t *next = routing_stats_next_layer_pairs(s, d, p), *same = routing_stats_same_layer_pairs(s, d, p);
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < EXPERTS; i++) {
            assert_int_equal(per[l * EXPERTS + i], count_naive(d, p, l, i, l, i));
            for (int j = 0; j < EXPERTS; j++) {
                assert_int_equal(same[(l * EXPERTS + i) * EXPERTS + j], count_naive(d, p, l, i, l, j));
                if (l + 1 < LAYERS)
                    assert_int_equal(next[(l * EXPERTS + i) * EXPERTS + j], count_naive(d, p, l, i, l + 1, j));
            }
        }
}

static void counts_are_the_naive_counts(void **state)
{
    (void)state;
    make_rows(1);
    routing_stats *s = count_rows(0, ROWS, true);
    uint64_t seen = 0;
    for (int d = 0; d < 2; d++)
        for (int p = 0; p < (d == 1 ? 1 : 2); p++) {
            check_slot(s, d, p);
            seen += routing_stats_tokens(s, d, p);
        }
    assert_int_equal(seen, ROWS);
    routing_stats_destroy(s);
}

static void same_counts(const routing_stats *a, const routing_stats *b)
{
    const routing_shape *shape = routing_stats_shape(a);
    size_t per = (size_t)shape->n_layers * (size_t)shape->n_experts, pairs = per * (size_t)shape->n_experts;
    size_t next = pairs - pairs / (size_t)shape->n_layers;
    assert_int_equal(routing_stats_has_pairs(a), routing_stats_has_pairs(b));
    assert_int_equal(shape->n_domains, routing_stats_shape(b)->n_domains);
    for (int d = 0; d < shape->n_domains; d++)
        for (int p = 0; p < N_PHASES; p++) {
            assert_string_equal(shape->domains[d], routing_stats_shape(b)->domains[d]);
            assert_int_equal(routing_stats_tokens(a, d, p), routing_stats_tokens(b, d, p));
            const uint64_t *x = routing_stats_tokens_per_expert(a, d, p), *y = routing_stats_tokens_per_expert(b, d, p);
            assert_int_equal(x == NULL, y == NULL);
            if (!x)
                continue;
            assert_memory_equal(x, y, per * sizeof *x);
            if (!routing_stats_has_pairs(a))
                continue;
            assert_memory_equal(routing_stats_same_layer_pairs(a, d, p), routing_stats_same_layer_pairs(b, d, p),
                                pairs * sizeof *x);
            assert_memory_equal(routing_stats_next_layer_pairs(a, d, p), routing_stats_next_layer_pairs(b, d, p),
                                next * sizeof *x);
        }
}

static void merging_parts_is_counting_all(void **state)
{
    (void)state;
    make_rows(2);
    routing_stats *all = count_rows(0, ROWS, true), *sum = count_rows(0, 0, true);
    for (int first = 0; first < ROWS; first += 133) {
        routing_stats *part = count_rows(first, first + 133 < ROWS ? first + 133 : ROWS, true);
        assert_int_equal(routing_stats_merge(sum, part), STATUS_OK);
        routing_stats_destroy(part);
    }
    same_counts(all, sum);
    routing_stats_destroy(all);
    routing_stats_destroy(sum);
}

static void packed_parts_add_up(void **state)
{
    (void)state;
    make_rows(11);
    for (int pairs = 0; pairs < 2; pairs++) {
        routing_stats *all = count_rows(0, ROWS, pairs), *sum = count_rows(0, 0, pairs);
        bytes_writer bytes = {0};
        for (int first = 0; first < ROWS; first += 100) {
            routing_stats *part = count_rows(first, first + 100, pairs);
            bytes_reset(&bytes);
            assert_int_equal(routing_stats_pack(part, &bytes), STATUS_OK);
            assert_true(bytes.size < routing_stats_bytes(part) / 2);
            assert_int_equal(routing_stats_add_packed(sum, bytes.data, bytes.size), STATUS_OK);
            routing_stats_destroy(part);
        }
        same_counts(all, sum);
        bytes_clear(&bytes);
        routing_stats_destroy(all);
        routing_stats_destroy(sum);
    }
}

/* Large counts, so that every length of number is sent, by doubling the same counts onto themselves. */
static void packed_counts_may_be_huge(void **state)
{
    (void)state;
    make_rows(12);
    routing_stats *s = count_rows(0, 3, true), *sum = count_rows(0, 0, true);
    bytes_writer bytes = {0};
    for (int doubling = 0; doubling < 60; doubling++) {
        bytes_reset(&bytes);
        assert_int_equal(routing_stats_pack(s, &bytes), STATUS_OK);
        assert_int_equal(routing_stats_add_packed(s, bytes.data, bytes.size), STATUS_OK);
    }
    bytes_reset(&bytes);
    assert_int_equal(routing_stats_pack(s, &bytes), STATUS_OK);
    assert_int_equal(routing_stats_add_packed(sum, bytes.data, bytes.size), STATUS_OK);
    same_counts(s, sum);
    bytes_clear(&bytes);
    routing_stats_destroy(s);
    routing_stats_destroy(sum);
}

static void damaged_packs_are_refused(void **state)
{
    (void)state;
    make_rows(13);
    uint64_t seed = 13;
    routing_stats *part = count_rows(0, 20, true), *without = count_rows(0, 0, false), *sum = count_rows(0, 0, true);
    bytes_writer bytes = {0};
    assert_int_equal(routing_stats_pack(part, &bytes), STATUS_OK);
    assert_int_equal(routing_stats_add_packed(without, bytes.data, bytes.size), STATUS_BAD_INPUT);
    for (size_t n = 0; n < bytes.size; n++) {
        unsigned char *cut = malloc(n + 1);
        memcpy(cut, bytes.data, n);
        assert_int_equal(routing_stats_add_packed(sum, cut, n), STATUS_BAD_INPUT);
        free(cut);
    }
    for (int round = 0; round < 2000; round++) { /* any answer, but inside the bounds */
        bytes.data[sizeof(int32_t) * 4 + (size_t)support_below(&seed, (int)bytes.size - 16)] =
            (unsigned char)support_random(&seed);
        routing_stats_add_packed(sum, bytes.data, bytes.size);
    }
    bytes_clear(&bytes);
    routing_stats_destroy(part);
    routing_stats_destroy(without);
    routing_stats_destroy(sum);
}

static void domains_meet_by_name(void **state)
{
    (void)state;
    make_rows(3);
    static const char *const other_names[] = {"poems", "math"};
    routing_shape other = support_routing_shape(LAYERS, EXPERTS, K, 2);
    other.domains = other_names;
    routing_stats *a = count_rows(0, 0, true), *b;
    assert_int_equal(routing_stats_create(&other, true, &b), STATUS_OK);
    for (int r = 0; r < 10; r++)
        assert_int_equal(routing_stats_add_row(b, rows[r][0], r < 3 ? 0 : 1, PHASE_DECODE), STATUS_OK);
    assert_int_equal(routing_stats_merge(a, b), STATUS_OK);
    assert_int_equal(routing_stats_shape(a)->n_domains, DOMAINS + 1);
    assert_string_equal(routing_stats_shape(a)->domains[DOMAINS], "poems");
    assert_int_equal(routing_stats_tokens(a, DOMAINS, PHASE_DECODE), 3);
    assert_int_equal(routing_stats_tokens(a, 0, PHASE_DECODE), 7);
    routing_stats_destroy(a);
    routing_stats_destroy(b);
}

static void other_models_are_not_added(void **state)
{
    (void)state;
    static const int other_layers[] = {0, 1, 2};
    routing_shape cases[4];
    for (int c = 0; c < 4; c++)
        cases[c] = support_routing_shape(LAYERS, EXPERTS, K, DOMAINS);
    cases[0].model = "another";
    cases[1].n_experts++;
    cases[2].n_layers--;
    cases[3].layer_numbers = other_layers;
    for (int c = 0; c < 4; c++) {
        routing_stats *a = count_rows(0, 0, true), *b;
        assert_int_equal(routing_stats_create(&cases[c], true, &b), STATUS_OK);
        assert_int_equal(routing_stats_merge(a, b), STATUS_BAD_INPUT);
        routing_stats_destroy(a);
        routing_stats_destroy(b);
    }
    routing_stats *with = count_rows(0, 0, true), *without = count_rows(0, 5, false);
    assert_int_equal(routing_stats_merge(with, without), STATUS_BAD_INPUT);
    assert_int_equal(routing_stats_merge(without, with), STATUS_OK); /* the other way round loses nothing that is there */
    routing_stats_destroy(with);
    routing_stats_destroy(without);
}

static void files_are_read_back(void **state)
{
    (void)state;
    make_rows(4);
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/stats.safetensors", folder);
    for (int pairs = 0; pairs < 2; pairs++) {
        routing_stats *a = count_rows(0, ROWS, pairs), *b;
        assert_int_equal(routing_stats_write(a, path), STATUS_OK);
        assert_int_equal(routing_stats_read(path, &b), STATUS_OK);
        same_counts(a, b);
        routing_stats_destroy(a);
        routing_stats_destroy(b);
    }
    support_remove(folder);
}

static void file_has_the_agreed_names(void **state)
{
    (void)state;
    make_rows(5);
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/stats.safetensors", folder);
    routing_stats *s = count_rows(0, ROWS, true);
    assert_int_equal(routing_stats_write(s, path), STATUS_OK);
    safetensors *file;
    assert_int_equal(safetensors_open(path, &file), STATUS_OK);
    static const struct {
        const char *name;
        int n_dims;
        int64_t shape[4];
    } want[] = {{"tokens_per_expert", 3, {DOMAINS * 2, LAYERS, EXPERTS}},
                {"next_layer_pairs", 4, {DOMAINS * 2, LAYERS - 1, EXPERTS, EXPERTS}},
                {"same_layer_pairs", 4, {DOMAINS * 2, LAYERS, EXPERTS, EXPERTS}},
                {"tokens_seen", 1, {DOMAINS * 2}}};
    for (int i = 0; i < 4; i++) {
        const tensor_view *view = safetensors_find(file, want[i].name);
        assert_non_null(view);
        assert_int_equal(view->dtype, DTYPE_U64);
        assert_int_equal(view->n_dims, want[i].n_dims);
        assert_memory_equal(view->shape, want[i].shape, (size_t)view->n_dims * sizeof(int64_t));
    }
    uint64_t one;
    const unsigned char *p = safetensors_find(file, "tokens_per_expert")->data;
    memcpy(&one, p + ((0 * 2 + 1) * LAYERS * EXPERTS + 2 * EXPERTS + 7) * sizeof one, sizeof one);
    assert_int_equal(one, count_naive(0, PHASE_DECODE, 2, 7, 2, 7)); /* the first axis is domain * 2 + phase */
    assert_string_equal(safetensors_metadata(file, "format"), "convoke-routing");
    assert_string_equal(safetensors_metadata(file, "model"), "demo");
    assert_string_equal(safetensors_metadata(file, "n_experts"), "11");
    assert_string_equal(safetensors_metadata(file, "layers"), "[1,3,5]");
    assert_string_equal(safetensors_metadata(file, "tokens"), "400");
    assert_non_null(strstr(safetensors_metadata(file, "domains"), "[\"math\",\"code\","));
    safetensors_close(file);
    routing_stats_destroy(s);
    support_remove(folder);
}

static void refused_rows_change_nothing(void **state)
{
    (void)state;
    make_rows(6);
    routing_stats *s = count_rows(0, 50, true), *same = count_rows(0, 50, true);
    uint16_t bad[LAYERS][K];
    memcpy(bad, rows[0], sizeof bad);
    bad[LAYERS - 1][K - 1] = EXPERTS;
    assert_int_equal(routing_stats_add_row(s, bad[0], 0, 0), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "routing statistics: layer 5: expert 11 is outside 0 to 10");
    assert_int_equal(routing_stats_add_row(s, rows[0][0], DOMAINS, 0), STATUS_BAD_INPUT);
    assert_int_equal(routing_stats_add_row(s, rows[0][0], -1, 0), STATUS_BAD_INPUT);
    assert_int_equal(routing_stats_add_row(s, rows[0][0], 0, 2), STATUS_BAD_INPUT);
    same_counts(s, same);
    routing_stats_destroy(s);
    routing_stats_destroy(same);
}

static void memory_comes_with_the_first_token(void **state)
{
    (void)state;
    make_rows(7);
    routing_stats *s = count_rows(0, 0, true);
    assert_int_equal(routing_stats_bytes(s), 0);
    assert_int_equal(routing_stats_slot_bytes(s), 8 * ((2 * LAYERS - 1) * EXPERTS * EXPERTS + LAYERS * EXPERTS));
    routing_stats_add_row(s, rows[0][0], 1, PHASE_DECODE);
    routing_stats_add_row(s, rows[1][0], 1, PHASE_DECODE);
    assert_int_equal(routing_stats_bytes(s), routing_stats_slot_bytes(s));
    assert_null(routing_stats_tokens_per_expert(s, 0, PHASE_DECODE));
    routing_stats_destroy(s);
}

static void sums_select_domain_and_phase(void **state)
{
    (void)state;
    make_rows(8);
    routing_stats *s = count_rows(0, ROWS, false);
    uint64_t out[LAYERS * EXPERTS];
    for (int d = -1; d < DOMAINS; d++)
        for (int p = -1; p < N_PHASES; p++) {
            routing_stats_sum_tokens(s, d, p, out);
            for (int l = 0; l < LAYERS; l++)
                for (int e = 0; e < EXPERTS; e++) {
                    uint64_t n = 0;
                    for (int r = 0; r < ROWS; r++)
                        n += (d < 0 || row_domain[r] == d) && (p < 0 || row_phase[r] == p) && chose(r, l, e);
                    assert_int_equal(out[l * EXPERTS + e], n);
                }
        }
    routing_stats_destroy(s);
}

static void balance_is_busiest_over_mean(void **state)
{
    (void)state;
    uint64_t seed = 9;
    for (int round = 0; round < 50; round++) {
        plan_shape shape = {.n_ranks = 1 + support_below(&seed, 6), .n_experts = EXPERTS, .n_layers = LAYERS};
        plan p;
        uint64_t tokens[LAYERS * EXPERTS];
        double loads[6], out[LAYERS];
        assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.4, &p), STATUS_OK);
        for (int i = 0; i < LAYERS * EXPERTS; i++)
            tokens[i] = i < EXPERTS ? 0 : (uint64_t)support_below(&seed, 1000);
        routing_balance(&p, tokens, loads, out);
        assert_true(out[0] == 1); /* no tokens */
        for (int l = 1; l < LAYERS; l++) {
            double busiest = 0, total = 0;
            for (int r = 0; r < p.n_ranks; r++) {
                double load = 0;
                for (int e = 0; e < EXPERTS; e++)
                    if (plan_holds(&p, l, e, r))
                        load += (double)tokens[l * EXPERTS + e] / plan_n_copies(&p, l, e);
                busiest = fmax(busiest, load);
                total += load;
            }
            assert_true(fabs(out[l] - busiest / (total / p.n_ranks)) < 1e-9);
            assert_true(out[l] >= 1 - 1e-9 && out[l] <= p.n_ranks + 1e-9);
        }
        plan_clear(&p);
    }
}

static void a_trace_counts_like_its_rows(void **state)
{
    (void)state;
    make_rows(10);
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/trace.safetensors", folder);
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, DOMAINS);
    routing_trace_writer *writer;
    static const float weights[LAYERS * K];
    assert_int_equal(routing_trace_writer_create(path, &shape, &writer), STATUS_OK);
    for (int r = 0; r < ROWS; r++) {
        routing_row row = {.experts = rows[r][0], .weights = weights, .phase = row_phase[r], .domain = row_domain[r]};
        assert_int_equal(routing_trace_writer_add(writer, &row), STATUS_OK);
    }
    assert_int_equal(routing_trace_writer_finish(writer), STATUS_OK);
    routing_trace_writer_destroy(writer);
    routing_trace *trace;
    routing_stats *from_trace = count_rows(0, 0, true), *from_rows = count_rows(0, ROWS, true), *none;
    assert_int_equal(routing_trace_open(path, &trace), STATUS_OK);
    assert_int_equal(routing_stats_add_trace(from_trace, trace), STATUS_OK);
    same_counts(from_trace, from_rows);
    assert_int_equal(routing_stats_read(path, &none), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "this is a routing trace, not statistics"));
    routing_trace_close(trace);
    routing_stats_destroy(from_trace);
    routing_stats_destroy(from_rows);
    support_remove(folder);
}

/* A statistics file whose tensor and metadata can be chosen. */
static void write_odd(const char *path, const char *layers, const char *experts, tensor_dtype dtype, int64_t n_experts)
{
    safetensors_writer *w;
    const int64_t shape[3] = {2, 1, n_experts};
    int index;
    assert_int_equal(safetensors_writer_create(path, &w), STATUS_OK);
    safetensors_writer_metadata(w, "format", "convoke-routing");
    if (layers)
        safetensors_writer_metadata(w, "layers", layers);
    if (experts)
        safetensors_writer_metadata(w, "n_experts", experts);
    assert_int_equal(safetensors_writer_declare(w, "tokens_per_expert", dtype, 3, shape, &index), STATUS_OK);
    assert_int_equal(safetensors_writer_finish(w), STATUS_OK);
    safetensors_writer_destroy(w);
}

static void odd_files(void **state)
{
    (void)state;
    static const struct {
        const char *layers, *experts;
        tensor_dtype dtype;
        int64_t n_experts;
        const char *sentence;
    } cases[] = {
        {"[4]", "6", DTYPE_U64, 6, NULL},
        {NULL, "6", DTYPE_U64, 6, "metadata layers is missing"},
        {"[]", "6", DTYPE_U64, 6, "metadata layers is not a list"},
        {"{\"a\": 1}", "6", DTYPE_U64, 6, "metadata layers is not a list"},
        {"[4", "6", DTYPE_U64, 6, "metadata layers: not JSON"},
        {"[\"4\"]", "6", DTYPE_U64, 6, "metadata layers: item 0 is not a number"},
        {"[4, 4]", "6", DTYPE_U64, 6, "layer numbers do not rise at 4"},
        {"[4, 5]", "6", DTYPE_U64, 6, "tensor tokens_per_expert is not U64"},
        {"[4]", NULL, DTYPE_U64, 6, "metadata n_experts is missing"},
        {"[4]", "six", DTYPE_U64, 6, "metadata n_experts is \"six\""},
        {"[4]", "0", DTYPE_U64, 6, "0 experts are outside"},
        {"[4]", "99999999", DTYPE_U64, 6, "metadata n_experts is \"99999999\""},
        {"[4]", "7", DTYPE_U64, 6, "tensor tokens_per_expert is not U64"},
        {"[4]", "6", DTYPE_I64, 6, "tensor tokens_per_expert is not U64"},
    };
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/odd.safetensors", folder);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        routing_stats *s = NULL;
        write_odd(path, cases[i].layers, cases[i].experts, cases[i].dtype, cases[i].n_experts);
        assert_int_equal(routing_stats_read(path, &s), cases[i].sentence ? STATUS_BAD_INPUT : STATUS_OK);
        if (cases[i].sentence && !strstr(status_message(), cases[i].sentence))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, status_message(), cases[i].sentence);
        if (s)
            assert_string_equal(routing_stats_shape(s)->domains[0], "default");
        routing_stats_destroy(s);
    }
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"P, next-layer and same-layer pairs are what counting the naive way gives, drops left out", counts_are_the_naive_counts,
         NULL, NULL, NULL},
        {"merging parts is counting all", merging_parts_is_counting_all, NULL, NULL, NULL},
        {"counts packed by one rank are added by another", packed_parts_add_up, NULL, NULL, NULL},
        {"packed counts may be as large as they get", packed_counts_may_be_huge, NULL, NULL, NULL},
        {"packed counts of another shape, cut short or damaged are refused in bounds", damaged_packs_are_refused, NULL, NULL,
         NULL},
        {"domains meet by name; a new one is appended", domains_meet_by_name, NULL, NULL, NULL},
        {"statistics of another model are not added", other_models_are_not_added, NULL, NULL, NULL},
        {"what is written is read back the same, with and without pairs", files_are_read_back, NULL, NULL, NULL},
        {"the file has the agreed tensors and metadata", file_has_the_agreed_names, NULL, NULL, NULL},
        {"a refused row changes nothing", refused_rows_change_nothing, NULL, NULL, NULL},
        {"a slot's memory comes with its first token", memory_comes_with_the_first_token, NULL, NULL, NULL},
        {"sums select domain and phase", sums_select_domain_and_phase, NULL, NULL, NULL},
        {"balance is busiest rank over mean, replicas sharing evenly", balance_is_busiest_over_mean, NULL, NULL, NULL},
        {"a trace counts like its rows, and is not mistaken for statistics", a_trace_counts_like_its_rows, NULL, NULL, NULL},
        {"files that contradict themselves are refused", odd_files, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
