/* format_olmoe.c - expert counts as the OLMoE authors published them: CSV with domain,layer,expert,count. Several files add up to
 * several domains of one model. Their crosslayer files (domain,layers,expert_i,expert_j,count) join only experts of equal rank
 * in the choice, not all k * k pairs, so they are no R, and are refused. */
#include "placement/planner/import.h"

#include "placement/planner/csv_file.h"

enum { DOMAIN, LAYER, EXPERT, COUNT, N_COLUMNS };
static const char *const columns[N_COLUMNS] = {"domain", "layer", "expert", "count"};

static status read_rows(csv_file *csv, const import_options *options, count_table *table)
{
    for (bool more = true; more;) {
        int64_t layer, expert, count;
        TRY(csv_next(csv, &more));
        if (!more)
            break;
        TRY(csv_int(csv, LAYER, 0, INT32_MAX, &layer));
        TRY(csv_int(csv, EXPERT, 0, 65534, &expert));
        TRY(csv_int(csv, COUNT, 0, INT64_MAX, &count));
        TRY(count_table_add(table, options->domain ? options->domain : csv_text(csv, DOMAIN), layer, expert, (uint64_t)count));
    }
    return STATUS_OK;
}

static status read_file(const char *path, const import_options *options, count_table *table)
{
    bool crosslayer;
    csv_file *csv;
    TRY(csv_has_column(path, "expert_j", &crosslayer));
    if (crosslayer)
        return status_fail(
            STATUS_UNSUPPORTED,
            "%s: pairs across layers that join experts of equal rank only; R needs all pairs of a token's choices, so "
            "they are not taken",
            path);
    TRY(csv_open(path, columns, N_COLUMNS, &csv));
    status st = read_rows(csv, options, table);
    csv_close(csv);
    return st;
}

static status import_olmoe(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                           format_kind *made)
{
    count_table *table;
    TRY(count_table_create(&table));
    status st = STATUS_OK;
    for (int i = 0; i < n_paths && st == STATUS_OK; i++)
        st = read_file(paths[i], options, table);
    if (st == STATUS_OK)
        st = count_table_write(table, paths[0], options, PHASE_PREFILL, out_path);
    count_table_destroy(table);
    *made = FORMAT_STATS;
    return st;
}

const file_format format_olmoe = {"olmoe", "CSV of domain,layer,expert,count: statistics", import_olmoe, NULL, NULL};
