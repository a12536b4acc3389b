/* command_show.c - convoke-plan show FILE: what is in a file of ours, for people. */
#include "placement/planner/commands.h"

#include "placement/planner/describe.h"
#include "placement/planner/formats.h"
#include "placement/planner/inputs.h"
#include "placement/planner/report_html.h"

#include <stdio.h>

typedef struct {
    const char *report, *plan, *stats;
    int64_t ranks;
} command_line;

static status show_stats(const char *path, const command_line *c)
{
    routing_stats *stats;
    plan p = {0};
    TRY(routing_stats_read(path, &stats));
    status st = report_plan(stats, c->plan, (int)c->ranks, &p);
    if (st == STATUS_OK)
        st = describe_stats(stats, &p, true, stdout);
    const report_input report = {.title = path, .stats = stats, .plan = &p};
    if (st == STATUS_OK && c->report)
        st = report_write(&report, c->report);
    plan_clear(&p);
    routing_stats_destroy(stats);
    return st;
}

static status show_loads(const plan *p, const routing_stats *stats, const char *path, const command_line *c)
{
    printf("\n");
    TRY(describe_stats(stats, p, true, stdout));
    const report_input report = {.title = path, .stats = stats, .plan = p};
    return c->report ? report_write(&report, c->report) : STATUS_OK;
}

static status show_plan(const char *path, const command_line *c)
{
    plan p;
    routing_stats *stats = NULL;
    TRY(plan_read(path, NULL, &p));
    status st = describe_plan(&p, stdout);
    const report_input report = {.title = path, .plan = &p};
    if (st == STATUS_OK && c->stats && (st = routing_stats_read(c->stats, &stats)) == STATUS_OK)
        st = show_loads(&p, stats, path, c);
    else if (st == STATUS_OK && c->report)
        st = report_write(&report, c->report);
    routing_stats_destroy(stats);
    plan_clear(&p);
    return st;
}

/* A page shows counts, so a trace is counted for it. */
static status report_trace(const routing_trace *trace, const char *path, const command_line *c)
{
    routing_stats *stats;
    plan p = {0};
    TRY(routing_stats_create(routing_trace_shape(trace), true, &stats));
    status st = routing_stats_add_trace(stats, trace);
    if (st == STATUS_OK)
        st = report_plan(stats, c->plan, (int)c->ranks, &p);
    const report_input report = {.title = path, .stats = stats, .plan = &p};
    if (st == STATUS_OK)
        st = report_write(&report, c->report);
    plan_clear(&p);
    routing_stats_destroy(stats);
    return st;
}

static status show_trace(const char *path, const command_line *c)
{
    routing_trace *trace;
    if (!c->report && (c->plan || c->ranks))
        return status_fail(STATUS_USAGE,
                           "%s: of a trace, the balance is shown in a page alone: --report, or `convoke-plan stats`", path);
    TRY(routing_trace_open(path, &trace));
    status st = describe_trace(trace, stdout);
    if (st == STATUS_OK && c->report)
        st = report_trace(trace, path, c);
    routing_trace_close(trace);
    return st;
}

static status show_topology(const char *path, const command_line *c)
{
    topology t;
    if (c->report)
        return status_fail(STATUS_USAGE, "%s: there is no page for a topology", path);
    TRY(topology_read(path, &t));
    describe_topology(&t, stdout);
    topology_clear(&t);
    return STATUS_OK;
}

status command_show(int argc, char **argv)
{
    command_line c = {0};
    const char *path;
    int n_operands = 0;
    bool run = false;
    file_kind kind;
    const option_entry entries[] = {
        {"report", OPTION_STRING, &c.report, .argument = "HTML", .help = "write a page with pictures"},
        {"plan", OPTION_STRING, &c.plan, .argument = "PLAN", .help = "statistics, traces: the balance under this plan"},
        {"ranks", OPTION_INT, &c.ranks, .argument = "G", .fallback = "0", .max = PLAN_MAX_RANKS,
         .help = "statistics, traces: under contiguous blocks on that many ranks (0: 8)"},
        {"stats", OPTION_STRING, &c.stats, .argument = "STATS", .help = "a plan: its balance on these statistics"},
    };
    const option_table table = {.name = "convoke-plan show",
                                .summary = "Shows a plan, statistics, a trace or a topology.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "FILE",
                                .min_operands = 1,
                                .max_operands = 1};
    TRY(inputs_parse_options(&table, argc, argv, &path, &n_operands, &run));
    if (!run)
        return STATUS_OK;
    TRY(file_recognise(path, &kind));
    if (c.stats && kind != FILE_PLAN)
        return status_fail(STATUS_USAGE, "--stats goes with a plan, which %s is not", path);
    return kind == FILE_PLAN    ? show_plan(path, &c)
           : kind == FILE_STATS ? show_stats(path, &c)
           : kind == FILE_TRACE ? show_trace(path, &c)
                                : show_topology(path, &c);
}
