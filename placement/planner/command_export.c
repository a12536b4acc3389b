/* command_export.c - convoke-plan export FORMAT PLAN -o FILE: our plans and statistics into other engines' files. */
#include "placement/planner/commands.h"

#include "placement/planner/formats.h"
#include "placement/planner/inputs.h"

#include <stdio.h>

static status export_plan(const file_format *format, const char *path, const char *out)
{
    plan p;
    if (!format->export_plan)
        return status_fail(STATUS_UNSUPPORTED, "%s: %s files hold no plan that could be written", path, format->name);
    TRY(plan_read(path, NULL, &p));
    status st = format->export_plan(&p, out);
    if (st == STATUS_OK)
        printf("%s: plan %s for %s, %d layers of %d experts on %d ranks\n", out, p.name, format->name, p.n_layers, p.n_experts,
               p.n_ranks);
    plan_clear(&p);
    return st;
}

static status export_stats(const file_format *format, const char *path, const char *out)
{
    routing_stats *stats;
    if (!format->export_stats)
        return status_fail(STATUS_UNSUPPORTED, "%s: %s files hold no statistics that could be written", path, format->name);
    TRY(routing_stats_read(path, &stats));
    status st = format->export_stats(stats, out);
    if (st == STATUS_OK)
        printf("%s: counts for %s, %d layers of %d experts, all domains and phases together\n", out, format->name,
               routing_stats_shape(stats)->n_layers, routing_stats_shape(stats)->n_experts);
    routing_stats_destroy(stats);
    return st;
}

status command_export(int argc, char **argv)
{
    const char *out = NULL, *operands[2];
    int n_operands = 0;
    bool run = false;
    file_kind kind;
    const option_entry entries[] = {
        {"output", OPTION_STRING, &out, .letter = 'o', .argument = "FILE", .required = true, .help = "file to write"},
    };
    const option_table table = {
        .name = "convoke-plan export",
        .summary = "Writes a plan or statistics for another engine. FORMAT: sglang, eplb (both also statistics), "
                   "tensorrt-llm, vllm-ascend, vllm.",
        .version = CONVOKE_VERSION,
        .entries = entries,
        .n_entries = sizeof entries / sizeof *entries,
        .operand_name = "FORMAT FILE",
        .min_operands = 2,
        .max_operands = 2};
    TRY(inputs_parse_options(&table, argc, argv, operands, &n_operands, &run));
    if (!run)
        return STATUS_OK;
    const file_format *format = format_find(operands[0]);
    if (!format || (!format->export_plan && !format->export_stats))
        return status_fail(STATUS_USAGE,
                           "nothing is written as '%.60s'; there are sglang, eplb, tensorrt-llm, vllm-ascend and vllm",
                           operands[0]);
    TRY(file_recognise(operands[1], &kind));
    if (kind == FILE_PLAN)
        return export_plan(format, operands[1], out);
    if (kind == FILE_STATS)
        return export_stats(format, operands[1], out);
    return status_fail(STATUS_UNSUPPORTED, "%s: only plans and statistics are exported", operands[1]);
}
