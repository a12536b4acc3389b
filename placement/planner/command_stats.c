/* command_stats.c - convoke-plan stats TRACE.. -o STATS: counts of traces and of other statistics, put together.
 *
 * A trace is read row by row where it is mapped, and pages that were counted are given back, so one that is larger than memory
 * costs no more than a small one: only the counts stay. */
#include "placement/planner/commands.h"

#include "placement/planner/describe.h"
#include "placement/planner/formats.h"
#include "placement/planner/inputs.h"
#include "placement/planner/report_html.h"
#include "proto/console.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FILES = 4096, GIVE_BACK = 64 << 20 };

typedef struct {
    const char *out, *domain, *report, *plan;
    int64_t ranks;
    int phase; /* place in "all|decode|prefill" */
    bool pairs;
} command_line;

static status parse(int argc, char **argv, command_line *c, const char **operands, int *n_operands, bool *run)
{
    const option_entry entries[] = {
        {"output", OPTION_STRING, &c->out, .letter = 'o', .argument = "STATS", .required = true, .help = "statistics to write"},
        {"domain", OPTION_STRING, &c->domain, .argument = "NAME", .help = "only this domain"},
        {"phase", OPTION_CHOICE, &c->phase, .choices = "all|decode|prefill", .fallback = "all",
         .help = "only generated tokens, or only prompts"},
        {"pairs", OPTION_FLAG, &c->pairs, .help = "count pairs of experts too: same layer, and next layer (R)"},
        {"ranks", OPTION_INT, &c->ranks, .argument = "G", .fallback = "0", .max = PLAN_MAX_RANKS,
         .help = "show the balance of contiguous blocks on that many ranks (0: 8)"},
        {"plan", OPTION_STRING, &c->plan, .argument = "PLAN", .help = "show the balance under this plan instead"},
        {"report", OPTION_STRING, &c->report, .argument = "HTML", .help = "write a page with pictures"},
    };
    const option_table table = {.name = "convoke-plan stats",
                                .summary = "Counts which experts traces chose; statistics of the same model are added.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "FILE..",
                                .min_operands = 1,
                                .max_operands = MAX_FILES};
    return inputs_parse_options(&table, argc, argv, operands, n_operands, run);
}

static int wanted_phase(const command_line *c)
{
    return c->phase == 0 ? -1 : c->phase == 1 ? PHASE_DECODE : PHASE_PREFILL;
}

/* ---- one trace ---- */

/* Pages of the choices that lie wholly before `end` and after *from. */
static void give_back(const tensor_view *experts, size_t end, size_t *from)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), base = (uintptr_t)experts->data;
    uintptr_t first = (base + *from + page - 1) / page * page, last = (base + end) / page * page;
    if (end - *from < GIVE_BACK || last <= first)
        return;
    madvise((void *)first, last - first, MADV_DONTNEED); /* it is a file's page: it comes back if it is wanted */
    *from = end;
}

static status count_trace(const routing_trace *trace, int domain, int phase, routing_stats *stats, console *c)
{
    const routing_shape *shape = routing_trace_shape(trace);
    const tensor_view *view;
    int64_t n = routing_trace_n_tokens(trace);
    size_t given = 0;
    TRY(routing_trace_tensor(trace, "experts", &view));
    size_t row_bytes = n > 0 ? view->n_bytes / (size_t)n : 0;
    uint16_t *experts = calloc((size_t)shape->n_layers * (size_t)shape->top_k, sizeof *experts);
    status st = experts ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for a row", routing_trace_path(trace));
    for (int64_t t = 0; t < n && st == STATUS_OK; t++) {
        routing_row row = routing_trace_row(trace, t, experts, NULL);
        if ((domain < 0 || row.domain == domain) && (phase < 0 || row.phase == phase))
            st = routing_stats_add_row(stats, experts, row.domain, row.phase);
        if (t % 4096 == 0) {
            give_back(view, (size_t)t * row_bytes, &given);
            console_show(c, "%s: %.0f %%", routing_trace_path(trace), 100.0 * (double)t / (double)n);
        }
    }
    free(experts);
    return st;
}

static status read_trace(const char *path, const command_line *c, routing_stats **out)
{
    routing_trace *trace;
    routing_stats *stats = NULL;
    console progress;
    console_open(&progress, STDERR_FILENO);
    console_show(&progress, "%s: opening", path);
    TRY(routing_trace_open(path, &trace));
    const routing_shape *shape = routing_trace_shape(trace);
    status st = routing_stats_create(shape, c->pairs, &stats);
    if (st == STATUS_OK)
        st = count_trace(trace, c->domain ? routing_shape_find_domain(shape, c->domain) : -1, wanted_phase(c), stats, &progress);
    console_erase(&progress);
    routing_trace_close(trace);
    if (st == STATUS_OK)
        *out = stats;
    else
        routing_stats_destroy(stats);
    return st;
}

static status read_stats(const char *path, const command_line *c, routing_stats **out)
{
    TRY(routing_stats_read(path, out));
    if (!c->pairs || routing_stats_has_pairs(*out))
        return STATUS_OK;
    routing_stats_destroy(*out);
    return status_fail(STATUS_BAD_INPUT, "%s: these statistics hold no pairs, so they cannot be added with --pairs", path);
}

/* ---- all files ---- */

/* Empty counts of the first file's model: with all its domains, or the one that is wanted. */
static status begin(const routing_stats *first, const command_line *c, routing_stats **out)
{
    routing_shape shape = *routing_stats_shape(first);
    if (c->domain) {
        shape.n_domains = 1;
        shape.domains = &c->domain;
    }
    return routing_stats_create(&shape, c->pairs, out);
}

static bool same_file(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static status add_file(const char *path, const command_line *c, routing_stats **sum)
{
    file_kind kind;
    routing_stats *stats;
    TRY(file_recognise(path, &kind));
    if (kind != FILE_TRACE && kind != FILE_STATS)
        return status_fail(STATUS_BAD_INPUT, "%s: neither a trace nor statistics", path);
    if (kind == FILE_TRACE && same_file(path, c->out)) /* statistics may grow in their place; a trace would be lost */
        return status_fail(STATUS_USAGE, "%s: a trace is not overwritten by its own counts: --output names another file", path);
    TRY(kind == FILE_TRACE ? read_trace(path, c, &stats) : read_stats(path, c, &stats));
    int domain = c->domain ? routing_shape_find_domain(routing_stats_shape(stats), c->domain) : -1;
    status st = *sum ? STATUS_OK : begin(stats, c, sum);
    if (st == STATUS_OK && (!c->domain || domain >= 0)) /* a file without the domain adds nothing */
        st = routing_stats_merge_part(*sum, stats, domain, wanted_phase(c));
    routing_stats_destroy(stats);
    if (st == STATUS_BAD_INPUT) {
        char cause[1024];
        snprintf(cause, sizeof cause, "%s", status_message());
        st = status_fail(st, "%.300s: %.700s", path, cause);
    }
    return st;
}

static status check_counted(const routing_stats *stats, const command_line *c)
{
    const routing_shape *shape = routing_stats_shape(stats);
    for (int d = 0; d < shape->n_domains; d++)
        for (int p = 0; p < N_PHASES; p++)
            if (routing_stats_tokens_per_expert(stats, d, p))
                return STATUS_OK;
    return status_fail(STATUS_BAD_INPUT, "nothing was counted: no %stokens%s%s%s",
                       c->phase == 1   ? "generated "
                       : c->phase == 2 ? "prompt "
                                       : "",
                       c->domain ? " of domain '" : "", c->domain ? c->domain : "", c->domain ? "'" : "");
}

/* The plan is looked at first: what does not fit leaves nothing behind. */
static status write_and_say(const routing_stats *stats, const command_line *c)
{
    plan p = {0};
    TRY(report_plan(stats, c->plan, (int)c->ranks, &p));
    status st = routing_stats_write(stats, c->out);
    if (st == STATUS_OK)
        st = describe_stats(stats, &p, false, stdout);
    const report_input report = {.title = c->out, .stats = stats, .plan = &p};
    if (st == STATUS_OK && c->report)
        st = report_write(&report, c->report);
    plan_clear(&p);
    return st;
}

status command_stats(int argc, char **argv)
{
    command_line c = {0};
    static const char *operands[MAX_FILES];
    int n_operands = 0;
    bool run = false;
    TRY(parse(argc, argv, &c, operands, &n_operands, &run));
    routing_stats *sum = NULL;
    status st = STATUS_OK;
    for (int i = 0; run && i < n_operands && st == STATUS_OK; i++)
        st = add_file(operands[i], &c, &sum);
    if (run && st == STATUS_OK)
        st = check_counted(sum, &c);
    if (run && st == STATUS_OK)
        st = write_and_say(sum, &c);
    routing_stats_destroy(sum);
    return st;
}
