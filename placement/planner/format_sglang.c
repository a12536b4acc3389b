/* format_sglang.c - what SGLang loads with --init-expert-location and what its expert distribution recorder writes:
 *
 *   {"physical_to_logical_map": [layers][physical]}              a plan; physical experts lie in equal blocks, one per rank
 *   {"logical_count": [layers][E] or [steps][layers][E]}         statistics (mode stat)
 *   {"records": [{"topk_ids_of_layer": ...}, ...]}               a trace (mode per_token): format_sglang_records.c
 *   layer_id,expert_id,count                                     statistics, of older versions (CSV)
 *
 * Its tables have a row for every layer of the model, also for those without experts: rows whose counts are all zero are left
 * out, and --layer-numbers says which rows of a plan are meant. Export fills the rows between with experts in order. */
#include "placement/planner/import.h"

#include "placement/planner/array_file.h"
#include "placement/planner/csv_file.h"
#include "placement/planner/format_sglang_records.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- counts ---- */

static status check_count_shape(const char *where, const number_array *a, const import_options *o)
{
    int64_t layers = a->shape[a->n_dims - 2], experts = a->shape[a->n_dims - 1];
    int agreed;
    if (layers < 1 || layers > 65535 || experts < 1 || experts > 65535)
        return status_fail(STATUS_BAD_INPUT,
                           "%s of %lld layers and %lld experts is not [layers][experts] or [steps][layers][experts]", where,
                           (long long)layers, (long long)experts);
    return import_agree(where, "experts", (int)experts, o->n_experts, &agreed);
}

/* Sums over steps into sum [layers][experts], and says which layers have any. */
static status sum_steps(const char *where, const number_array *a, uint64_t *sum, bool *wanted)
{
    int64_t experts = a->shape[a->n_dims - 1], per_step = a->shape[a->n_dims - 2] * experts;
    for (int64_t i = 0; i < a->n; i++) {
        int64_t count;
        TRY(number_array_int(a, where, i, 0, INT64_C(1) << 53, &count));
        sum[i % per_step] += (uint64_t)count;
        wanted[i % per_step / experts] |= count > 0;
    }
    return STATUS_OK;
}

static status add_counts(const char *where, const number_array *a, const import_options *o, count_table *table)
{
    int n_layers = (int)a->shape[a->n_dims - 2], n_experts = (int)a->shape[a->n_dims - 1], n = 0, *rows = NULL;
    uint64_t *sum = calloc((size_t)n_layers * (size_t)n_experts, sizeof *sum);
    bool *wanted = calloc((size_t)n_layers, sizeof *wanted);
    status st = sum && wanted ? sum_steps(where, a, sum, wanted) : status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    if (st == STATUS_OK)
        st = import_pick_rows(where, o, n_layers, wanted, &rows, &n);
    for (int i = 0; i < n && st == STATUS_OK; i++)
        for (int e = 0; e < n_experts && st == STATUS_OK; e++)
            st = count_table_add(table, o->domain ? o->domain : "default", rows[i], e,
                                 sum[(size_t)rows[i] * (size_t)n_experts + (size_t)e]);
    free(sum);
    free(wanted);
    free(rows);
    return st;
}

static status import_counts(const array_file *f, const import_options *o, const char *out_path)
{
    char where[1024];
    number_array a;
    count_table *table;
    snprintf(where, sizeof where, "%.900s: logical_count", array_file_path(f));
    TRY(array_file_get(f, "logical_count", 2, 3, &a));
    status st = check_count_shape(where, &a, o);
    if (st == STATUS_OK && (st = count_table_create(&table)) == STATUS_OK) {
        st = add_counts(where, &a, o, table);
        if (st == STATUS_OK)
            st = count_table_write(table, array_file_path(f), o, PHASE_DECODE, out_path);
        count_table_destroy(table);
    }
    number_array_clear(&a);
    return st;
}

static status read_csv_rows(csv_file *csv, const char *domain, count_table *table)
{
    for (bool more = true; more;) {
        int64_t layer, expert, count;
        TRY(csv_next(csv, &more));
        if (!more)
            break;
        TRY(csv_int(csv, 0, 0, INT32_MAX, &layer));
        TRY(csv_int(csv, 1, 0, 65534, &expert));
        TRY(csv_int(csv, 2, 0, INT64_MAX, &count));
        TRY(count_table_add(table, domain, layer, expert, (uint64_t)count));
    }
    return STATUS_OK;
}

static status import_csv(const char *path, const import_options *o, const char *out_path)
{
    static const char *const columns[] = {"layer_id", "expert_id", "count"};
    csv_file *csv;
    count_table *table;
    TRY(csv_open(path, columns, 3, &csv));
    status st = count_table_create(&table);
    if (st == STATUS_OK) {
        st = read_csv_rows(csv, o->domain ? o->domain : "default", table);
        if (st == STATUS_OK)
            st = count_table_write(table, path, o, PHASE_DECODE, out_path);
        count_table_destroy(table);
    }
    csv_close(csv);
    return st;
}

/* ---- a plan ---- */

static status read_rows(const char *where, const number_array *a, const import_options *o, const int *rows, int n_rows,
                        slot_layout *s)
{
    int64_t n_slots = a->shape[1], expert, largest = 0;
    int n_ranks;
    TRY(import_ranks(where, o, &n_ranks));
    int64_t last = o->n_experts ? o->n_experts - 1 : PLAN_MAX_EXPERTS - 1;
    for (int64_t i = 0; i < a->n; i++) {
        TRY(number_array_int(a, where, i, 0, last, &expert));
        largest = expert > largest ? expert : largest;
    }
    TRY(slot_layout_create(where, n_rows, (int)n_slots, o->n_experts ? o->n_experts : (int)largest + 1, n_ranks, s));
    for (int l = 0; l < n_rows; l++) {
        s->layer_numbers[l] = rows[l];
        for (int64_t i = 0; i < n_slots; i++) {
            TRY(number_array_int(a, where, rows[l] * n_slots + i, 0, last, &expert));
            s->expert_of_slot[l * n_slots + i] = (int)expert;
        }
    }
    return STATUS_OK;
}

static status import_map(const array_file *f, const import_options *o, const char *out_path)
{
    char where[1024];
    number_array a;
    slot_layout s = {0};
    int n = 0, *rows = NULL;
    snprintf(where, sizeof where, "%.900s: physical_to_logical_map", array_file_path(f));
    TRY(array_file_get(f, "physical_to_logical_map", 2, 2, &a));
    status st = STATUS_OK;
    if (a.shape[0] < 1 || a.shape[0] > 65535 || a.shape[1] < 1 || a.shape[1] > INT32_MAX)
        st = status_fail(STATUS_BAD_INPUT, "%s of %lld layers and %lld slots is not [layers][physical]", where,
                         (long long)a.shape[0], (long long)a.shape[1]);
    if (st == STATUS_OK)
        st = import_pick_rows(where, o, (int)a.shape[0], NULL, &rows, &n);
    if (st == STATUS_OK)
        st = read_rows(where, &a, o, rows, n, &s);
    if (st == STATUS_OK)
        st = import_write_slots(array_file_path(f), &s, NULL, o, out_path);
    free(rows);
    slot_layout_clear(&s);
    number_array_clear(&a);
    return st;
}

static status import_arrays(const array_file *f, const import_options *o, const char *out_path, format_kind *made)
{
    bool map = array_file_has(f, "physical_to_logical_map"), counts = array_file_has(f, "logical_count");
    *made = map ? FORMAT_PLAN : FORMAT_STATS;
    if (map)
        return import_map(f, o, out_path);
    if (counts)
        return import_counts(f, o, out_path);
    return status_fail(STATUS_BAD_INPUT,
                       "%s: none of physical_to_logical_map, logical_count, records and topk_ids_of_layer is in it",
                       array_file_path(f));
}

static status import_sglang(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                            format_kind *made)
{
    const char *dot = strrchr(paths[0], '.');
    *made = FORMAT_STATS;
    if (dot && strcmp(dot, ".csv") == 0 && n_paths == 1)
        return import_csv(paths[0], options, out_path);
    array_file *f;
    TRY(array_file_open(paths[0], &f));
    bool records = sglang_records_in(f);
    status st = STATUS_OK;
    if (!records && n_paths > 1)
        st = status_fail(STATUS_USAGE, "sglang: one file at a time, but for recorded tokens");
    else if (!records)
        st = import_arrays(f, options, out_path, made);
    array_file_close(f);
    if (st != STATUS_OK || !records)
        return st;
    *made = FORMAT_TRACE;
    return sglang_records_import(paths, n_paths, options, out_path);
}

/* ---- export ---- */

/* SGLang hands every key of the file to a function, so the file holds that one key and nothing else. */
static void write_map(FILE *file, const slot_layout *s)
{
    fprintf(file, "{\"physical_to_logical_map\": [\n");
    for (int row = 0, l = 0; l < s->n_layers; row++) {
        bool ours = s->layer_numbers[l] == row;
        for (int i = 0; i < s->n_slots; i++)
            fprintf(file, "%s%d", i ? ", " : "  [",
                    ours ? s->expert_of_slot[(size_t)l * (size_t)s->n_slots + (size_t)i] : i % s->n_experts);
        l += ours;
        fprintf(file, l < s->n_layers ? "],\n" : "]\n");
    }
    fprintf(file, "]}\n");
}

static void write_counts(FILE *file, const routing_shape *shape, const uint64_t *sum)
{
    fprintf(file, "{\"logical_count\": [\n");
    for (int row = 0, l = 0; l < shape->n_layers; row++) {
        bool ours = shape->layer_numbers[l] == row;
        for (int e = 0; e < shape->n_experts; e++)
            fprintf(file, "%s%llu", e ? ", " : "  [",
                    ours ? (unsigned long long)sum[(size_t)l * (size_t)shape->n_experts + (size_t)e] : 0ULL);
        l += ours;
        fprintf(file, l < shape->n_layers ? "],\n" : "]\n");
    }
    fprintf(file, "]}\n");
}

/* Rows of layers without experts are written too, so a wild layer number would fill the disk. */
static status check_rows(int last_layer)
{
    return last_layer < 65535
               ? STATUS_OK
               : status_fail(STATUS_UNSUPPORTED, "sglang: a row for each of %d layers is too many", last_layer + 1);
}

static status export_map(const plan *p, const char *path)
{
    slot_layout s;
    int lost;
    text_file out;
    TRY(check_rows(p->layer_numbers[p->n_layers - 1]));
    TRY(slot_layout_of_plan("sglang", p, &s, &lost));
    status st = text_file_begin(path, &out);
    if (st == STATUS_OK) {
        write_map(out.stream, &s);
        st = text_file_finish(&out);
    }
    slot_layout_clear(&s);
    if (st == STATUS_OK)
        export_warn("sglang", lost);
    return st;
}

static status export_counts(const routing_stats *stats, const char *path)
{
    const routing_shape *shape = routing_stats_shape(stats);
    text_file out;
    TRY(check_rows(shape->layer_numbers[shape->n_layers - 1]));
    uint64_t *sum = calloc((size_t)shape->n_layers * (size_t)shape->n_experts, sizeof *sum);
    if (!sum)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to write it", path);
    routing_stats_sum_tokens(stats, -1, -1, sum);
    status st = text_file_begin(path, &out);
    if (st == STATUS_OK) {
        write_counts(out.stream, shape, sum);
        st = text_file_finish(&out);
    }
    free(sum);
    return st;
}

const file_format format_sglang = {"sglang",
                                   "--init-expert-location JSON (a plan, or counts), recorder's tokens (a trace), counts as CSV",
                                   import_sglang, export_map, export_counts};
