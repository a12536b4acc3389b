/* format_cd_moe.c - CD-MoE's calibration of DeepSeek-MoE: JSON, "layer-expert" -> [sum of weights, hits, mean weight]. The hits
 * become P; weights are not kept. */
#include "placement/planner/import.h"

#include "proto/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_BYTES ((size_t)1 << 30)

static status read_entry(const char *path, const cJSON *item, const char *domain, count_table *table)
{
    char where[1024];
    int layer, expert, used = 0;
    if (sscanf(item->string, "%9d-%9d%n", &layer, &expert, &used) != 2 || item->string[used] || layer < 0 || expert < 0 ||
        expert > 65534)
        return status_fail(STATUS_BAD_INPUT, "%s: key \"%.60s\" is not \"layer-expert\"", path, item->string);
    snprintf(where, sizeof where, "%.800s: %s", path, item->string);
    if (!cJSON_IsArray(item) || cJSON_GetArraySize(item) != 3)
        return status_fail(STATUS_BAD_INPUT, "%s is not a list of three numbers", where);
    const cJSON *weight = item->child;
    int64_t hits;
    TRY(json_item_int(weight->next, where, 1, 0, INT64_C(1) << 53, &hits));
    if (!cJSON_IsNumber(weight) || !isfinite(weight->valuedouble) || weight->valuedouble < 0)
        return status_fail(STATUS_BAD_INPUT, "%s: its sum of weights is not a number from 0 up", where);
    return count_table_add(table, domain, layer, expert, (uint64_t)hits);
}

static status read_file(const char *path, const char *domain, count_table *table)
{
    cJSON *tree;
    TRY(json_read_file(path, MAX_BYTES, &tree));
    status st = cJSON_IsObject(tree) ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: the file holds no JSON object", path);
    for (const cJSON *item = tree->child; item && st == STATUS_OK; item = item->next)
        st = read_entry(path, item, domain, table);
    cJSON_Delete(tree);
    return st;
}

static status import_cd_moe(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                            format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "cd-moe: one file at a time (statistics of several are put together by stats)");
    count_table *table;
    TRY(count_table_create(&table));
    status st = read_file(paths[0], options->domain ? options->domain : "default", table);
    if (st == STATUS_OK)
        st = count_table_write(table, paths[0], options, PHASE_PREFILL, out_path);
    count_table_destroy(table);
    *made = FORMAT_STATS;
    return st;
}

const file_format format_cd_moe = {"cd-moe", "JSON of \"layer-expert\": [weight sum, hits, mean]: statistics", import_cd_moe,
                                   NULL, NULL};
