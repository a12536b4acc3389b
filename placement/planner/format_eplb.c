/* format_eplb.c - what goes into and comes out of DeepSeek's EPLB, as .npz or JSON.
 *
 *   weight   [layers][E]        load of each expert: statistics
 *   phy2log  [layers][P]        the expert in each physical slot, slots in equal blocks per device: a plan. The names that its
 *                               README uses are taken too: physical_to_logical_map
 *   log2phy  [layers][E][max]   the slots of each expert, -1 behind them; its first one is the home (logical_to_physical_map)
 *   logcnt   [layers][E]        how many (expert_count)
 *
 * The home rule of slot_layout.h stands in where log2phy is missing. */
#include "placement/planner/import.h"

#include "placement/planner/array_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const phy2log_names[] = {"phy2log", "physical_to_logical_map"};
static const char *const log2phy_names[] = {"log2phy", "logical_to_physical_map"};
static const char *const logcnt_names[] = {"logcnt", "expert_count"};

static const char *find_name(const array_file *f, const char *const names[2])
{
    return array_file_has(f, names[0]) ? names[0] : array_file_has(f, names[1]) ? names[1] : NULL;
}

/* ---- weight ---- */

/* Loads that are not whole numbers (moving averages) are scaled so that the largest becomes a million. */
static status find_scale(const char *where, const number_array *a, double *scale)
{
    double largest = 0;
    bool whole = true;
    for (int64_t i = 0; i < a->n; i++) {
        double w = number_array_double(a, i);
        if (!(w >= 0) || w > 0x1p53)
            return status_fail(STATUS_BAD_INPUT, "%s: weight[%lld][%lld] is %g, not a number from 0 to 2^53", where,
                               (long long)(i / a->shape[1]), (long long)(i % a->shape[1]), w);
        whole &= w == floor(w);
        largest = w > largest ? w : largest;
    }
    if (largest == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: every weight is 0", where);
    *scale = whole ? 1 : 1e6 / largest;
    return STATUS_OK;
}

static status read_weight(const char *where, const number_array *a, const import_options *o, count_table *table)
{
    double scale = 1;
    int *layers, agreed;
    if (a->shape[0] < 1 || a->shape[0] > 65535 || a->shape[1] < 1 || a->shape[1] > 65535)
        return status_fail(STATUS_BAD_INPUT, "%s: weight is [%lld][%lld], not [layers][experts]", where, (long long)a->shape[0],
                           (long long)a->shape[1]);
    TRY(import_agree(where, "experts", (int)a->shape[1], o->n_experts, &agreed));
    TRY(find_scale(where, a, &scale));
    TRY(import_layer_numbers(where, o, (int)a->shape[0], 0, &layers));
    status st = STATUS_OK;
    for (int64_t i = 0; i < a->n && st == STATUS_OK; i++)
        st = count_table_add(table, o->domain ? o->domain : "default", layers[i / a->shape[1]], i % a->shape[1],
                             (uint64_t)llround(number_array_double(a, i) * scale));
    free(layers);
    return st;
}

static status import_weight(const array_file *f, const import_options *o, const char *out_path)
{
    number_array a;
    count_table *table;
    TRY(array_file_get(f, "weight", 2, 2, &a));
    status st = count_table_create(&table);
    if (st == STATUS_OK) {
        st = read_weight(array_file_path(f), &a, o, table);
        if (st == STATUS_OK)
            st = count_table_write(table, array_file_path(f), o, PHASE_DECODE, out_path);
        count_table_destroy(table);
    }
    number_array_clear(&a);
    return st;
}

/* ---- plans ---- */

static status read_slots(const char *where, const number_array *a, int n_experts, slot_layout *s)
{
    for (int64_t i = 0; i < a->n; i++) {
        int64_t expert;
        TRY(number_array_int(a, where, i, 0, n_experts - 1, &expert));
        s->expert_of_slot[i] = (int)expert;
    }
    return STATUS_OK;
}

static status largest_expert(const char *where, const number_array *a, int *n_experts)
{
    int64_t largest = 0;
    for (int64_t i = 0; i < a->n; i++) {
        int64_t expert;
        TRY(number_array_int(a, where, i, 0, PLAN_MAX_EXPERTS - 1, &expert));
        largest = expert > largest ? expert : largest;
    }
    *n_experts = (int)largest + 1;
    return STATUS_OK;
}

/* The lists of log2phy must name exactly the slots that phy2log gives the expert. first_slot [n_layers][n_experts] out. */
static status check_log2phy(const char *where, const number_array *a, const slot_layout *s, int *first_slot)
{
    int64_t width = a->shape[2], named = 0;
    if (a->shape[0] != s->n_layers || a->shape[1] != s->n_experts || width < 1)
        return status_fail(STATUS_BAD_INPUT, "%s is [%lld][%lld][%lld], but phy2log has %d layers of %d experts", where,
                           (long long)a->shape[0], (long long)a->shape[1], (long long)width, s->n_layers, s->n_experts);
    for (int64_t list = 0; list < (int64_t)s->n_layers * s->n_experts; list++) {
        int64_t layer = list / s->n_experts, expert = list % s->n_experts;
        for (int64_t c = 0; c < width; c++) {
            int64_t slot;
            TRY(number_array_int(a, where, list * width + c, -1, s->n_slots - 1, &slot));
            if (c == 0)
                first_slot[list] = (int)slot;
            if ((slot < 0 && c == 0) || (slot >= 0 && s->expert_of_slot[layer * s->n_slots + slot] != expert))
                return status_fail(STATUS_BAD_INPUT, "%s: layer %lld: expert %lld is not in slot %lld, as phy2log has it", where,
                                   (long long)layer, (long long)expert, (long long)slot);
            named += slot >= 0;
        }
    }
    if (named != (int64_t)s->n_layers * s->n_slots)
        return status_fail(STATUS_BAD_INPUT, "%s names %lld slots, but phy2log has %lld", where, (long long)named,
                           (long long)s->n_layers * s->n_slots);
    return STATUS_OK;
}

static status check_logcnt(const char *where, const number_array *a, const slot_layout *s)
{
    if (a->shape[0] != s->n_layers || a->shape[1] != s->n_experts)
        return status_fail(STATUS_BAD_INPUT, "%s is [%lld][%lld], but phy2log has %d layers of %d experts", where,
                           (long long)a->shape[0], (long long)a->shape[1], s->n_layers, s->n_experts);
    int *count = calloc((size_t)s->n_experts, sizeof *count);
    if (!count)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to check it", where);
    status st = STATUS_OK;
    for (int l = 0; l < s->n_layers && st == STATUS_OK; l++) {
        memset(count, 0, (size_t)s->n_experts * sizeof *count);
        for (int i = 0; i < s->n_slots; i++)
            count[s->expert_of_slot[(size_t)l * (size_t)s->n_slots + (size_t)i]]++;
        for (int e = 0; e < s->n_experts && st == STATUS_OK; e++)
            if (number_array_double(a, (int64_t)l * s->n_experts + e) != count[e])
                st = status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d is in %d slots, not %g", where, l, e, count[e],
                                 number_array_double(a, (int64_t)l * s->n_experts + e));
    }
    free(count);
    return st;
}

static status check_others(const array_file *f, const slot_layout *s, int **first_slot)
{
    const char *log2phy = find_name(f, log2phy_names), *logcnt = find_name(f, logcnt_names);
    char where[1024];
    number_array a;
    status st = STATUS_OK;
    if (log2phy) {
        TRY(array_file_get(f, log2phy, 3, 3, &a));
        snprintf(where, sizeof where, "%.800s: %s", array_file_path(f), log2phy);
        *first_slot = calloc((size_t)s->n_layers * (size_t)s->n_experts, sizeof **first_slot);
        st = *first_slot ? check_log2phy(where, &a, s, *first_slot) : status_fail(STATUS_NO_MEMORY, "%s: no memory", where);
        number_array_clear(&a);
    }
    if (st == STATUS_OK && logcnt) {
        TRY(array_file_get(f, logcnt, 2, 2, &a));
        snprintf(where, sizeof where, "%.800s: %s", array_file_path(f), logcnt);
        st = check_logcnt(where, &a, s);
        number_array_clear(&a);
    }
    return st;
}

static status make_layout(const char *where, const number_array *a, const import_options *o, slot_layout *s)
{
    int n_ranks, n_experts = 0, *layers;
    TRY(import_ranks(where, o, &n_ranks));
    if (a->shape[0] < 1 || a->shape[0] > 65535 || a->shape[1] < 1 || a->shape[1] > INT32_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s is [%lld][%lld], not [layers][slots]", where, (long long)a->shape[0],
                           (long long)a->shape[1]);
    TRY(largest_expert(where, a, &n_experts));
    if (o->n_experts > n_experts)
        n_experts = o->n_experts;
    TRY(slot_layout_create(where, (int)a->shape[0], (int)a->shape[1], n_experts, n_ranks, s));
    TRY(import_layer_numbers(where, o, s->n_layers, 0, &layers));
    memcpy(s->layer_numbers, layers, (size_t)s->n_layers * sizeof *layers);
    free(layers);
    return read_slots(where, a, o->n_experts ? o->n_experts : n_experts, s);
}

static status import_plan(const array_file *f, const char *name, const import_options *o, const char *out_path)
{
    char where[1024];
    number_array a;
    slot_layout s = {0};
    int *first_slot = NULL;
    snprintf(where, sizeof where, "%.800s: %s", array_file_path(f), name);
    TRY(array_file_get(f, name, 2, 2, &a));
    status st = make_layout(where, &a, o, &s);
    number_array_clear(&a);
    if (st == STATUS_OK)
        st = check_others(f, &s, &first_slot);
    if (st == STATUS_OK)
        st = import_write_slots(array_file_path(f), &s, first_slot, o, out_path);
    free(first_slot);
    slot_layout_clear(&s);
    return st;
}

static status import_eplb(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                          format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "eplb: one file at a time");
    array_file *f;
    TRY(array_file_open(paths[0], &f));
    const char *phy2log = find_name(f, phy2log_names);
    status st = phy2log                       ? import_plan(f, phy2log, options, out_path)
                : array_file_has(f, "weight") ? import_weight(f, options, out_path)
                                              : status_fail(STATUS_BAD_INPUT,
                                                            "%s: neither phy2log (a plan) nor weight (statistics) "
                                                            "is in it",
                                                            paths[0]);
    *made = phy2log ? FORMAT_PLAN : FORMAT_STATS;
    array_file_close(f);
    return st;
}

/* ---- export ---- */

/* The widest list of log2phy: copies and padding of one expert. */
static int widest(const slot_layout *s, int64_t *count)
{
    int64_t width = 0;
    memset(count, 0, (size_t)s->n_layers * (size_t)s->n_experts * sizeof *count);
    for (int l = 0; l < s->n_layers; l++)
        for (int i = 0; i < s->n_slots; i++) {
            int64_t n =
                ++count[(size_t)l * (size_t)s->n_experts + (size_t)s->expert_of_slot[(size_t)l * (size_t)s->n_slots + (size_t)i]];
            width = n > width ? n : width;
        }
    return (int)width;
}

/* The home's slot first, then the others. */
static void fill_log2phy(const plan *p, const slot_layout *s, int width, int64_t *log2phy)
{
    int block = s->n_slots / s->n_ranks;
    for (int l = 0; l < s->n_layers; l++) {
        const int *experts = s->expert_of_slot + (size_t)l * (size_t)s->n_slots;
        int64_t *lists = log2phy + (size_t)l * (size_t)s->n_experts * (size_t)width;
        for (int i = 0; i < s->n_slots; i++) {
            int64_t *list = lists + (size_t)experts[i] * (size_t)width, slot = i;
            bool home = i / block == plan_copies(p, l, experts[i])[0];
            int c = 0;
            while (list[c] >= 0) {
                if (home && c == 0 && list[0] / block != plan_copies(p, l, experts[i])[0]) {
                    int64_t moved = list[0];
                    list[0] = slot;
                    slot = moved;
                }
                c++;
            }
            list[c] = slot;
        }
    }
}

static status write_layout(const plan *p, const slot_layout *s, const char *path)
{
    size_t n_lists = (size_t)s->n_layers * (size_t)s->n_experts, n_slots = (size_t)s->n_layers * (size_t)s->n_slots;
    int64_t *logcnt = calloc(n_lists, sizeof *logcnt), *phy2log = calloc(n_slots, sizeof *phy2log), *log2phy = NULL;
    int width = logcnt ? widest(s, logcnt) : 0;
    log2phy = malloc(n_lists * (size_t)width * sizeof *log2phy + 1);
    status st = STATUS_OK;
    if (!logcnt || !phy2log || !log2phy) {
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory to write it", path);
    } else {
        memset(log2phy, 0xff, n_lists * (size_t)width * sizeof *log2phy);
        for (size_t i = 0; i < n_slots; i++)
            phy2log[i] = s->expert_of_slot[i];
        fill_log2phy(p, s, width, log2phy);
        const npz_array arrays[] = {{"phy2log", 2, {s->n_layers, s->n_slots}, phy2log},
                                    {"log2phy", 3, {s->n_layers, s->n_experts, width}, log2phy},
                                    {"logcnt", 2, {s->n_layers, s->n_experts}, logcnt}};
        st = npz_write(path, arrays, 3);
    }
    free(logcnt);
    free(phy2log);
    free(log2phy);
    return st;
}

static status export_eplb(const plan *p, const char *path)
{
    slot_layout s;
    TRY(slot_layout_of_plan("eplb", p, &s, NULL)); /* log2phy keeps the homes */
    status st = write_layout(p, &s, path);
    slot_layout_clear(&s);
    return st;
}

static status export_weight(const routing_stats *stats, const char *path)
{
    const routing_shape *shape = routing_stats_shape(stats);
    size_t n = (size_t)shape->n_layers * (size_t)shape->n_experts;
    uint64_t *sum = calloc(n, sizeof *sum);
    if (!sum)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to write it", path);
    routing_stats_sum_tokens(stats, -1, -1, sum);
    const npz_array array = {"weight", 2, {shape->n_layers, shape->n_experts}, (const int64_t *)sum};
    status st = npz_write(path, &array, 1);
    free(sum);
    return st;
}

const file_format format_eplb = {"eplb", "npz or JSON of weight (statistics) or phy2log, log2phy, logcnt (a plan)", import_eplb,
                                 export_eplb, export_weight};
