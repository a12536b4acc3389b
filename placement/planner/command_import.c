/* command_import.c - convoke-plan import FORMAT FILE.. -o OUT: other engines' files into ours. */
#include "placement/planner/commands.h"

#include "placement/planner/describe.h"
#include "placement/planner/formats.h"
#include "placement/planner/inputs.h"

#include <stdio.h>
#include <string.h>

enum { MAX_FILES = 4096 };

typedef struct {
    const char *out, *model, *domain, *index, *layer_numbers;
    int64_t experts, layers, top_k, ranks, nodes;
    int phase;
    bool keep_repetition;
} command_line;

/* "flat, olmoe, sglang": those of the table that can; static. */
static const char *format_names(bool import)
{
    static char names[400];
    size_t used = 0;
    names[0] = '\0';
    for (const file_format *const *f = file_formats; *f && used + 40 < sizeof names; f++)
        if (import ? (*f)->import != NULL : (*f)->export_plan || (*f)->export_stats)
            used += (size_t)snprintf(names + used, sizeof names - used, used ? ", %s" : "%s", (*f)->name);
    return names;
}

static status parse(int argc, char **argv, command_line *c, const char **operands, int *n_operands, bool *run)
{
    char summary[700];
    const option_entry entries[] = {
        {"output", OPTION_STRING, &c->out, .letter = 'o', .argument = "OUT", .required = true,
         .help = "trace, statistics or plan to write"},
        {"model", OPTION_STRING, &c->model, .argument = "NAME", .help = "the model's name, which these files do not hold"},
        {"experts", OPTION_INT, &c->experts, .argument = "E", .fallback = "0", .max = PLAN_MAX_EXPERTS,
         .help = "experts per layer, where the file does not say"},
        {"layers", OPTION_INT, &c->layers, .argument = "L", .fallback = "0", .max = 65535,
         .help = "layers with experts, where the file does not say"},
        {"top-k", OPTION_INT, &c->top_k, .argument = "K", .fallback = "0", .max = PLAN_MAX_EXPERTS,
         .help = "experts a token chooses, where the file does not say"},
        {"ranks", OPTION_INT, &c->ranks, .argument = "G", .fallback = "0", .max = PLAN_MAX_RANKS,
         .help = "ranks that a plan's slots are for"},
        {"nodes", OPTION_INT, &c->nodes, .argument = "D", .fallback = "0", .max = PLAN_MAX_RANKS,
         .help = "nodes of those ranks, in equal blocks (0: one)"},
        {"layer-numbers", OPTION_STRING, &c->layer_numbers, .argument = "LIST",
         .help = "the model's own numbers, such as 3-60 or 1,3,5"},
        {"domain", OPTION_STRING, &c->domain, .argument = "NAME", .help = "name of this kind of traffic"},
        {"phase", OPTION_CHOICE, &c->phase, .choices = "own|prefill|decode", .fallback = "own",
         .help = "of tokens whose file does not say (own: as the format has it)"},
        {"index", OPTION_STRING, &c->index, .argument = "CSV",
         .help = "flat: the list of generations, if not index.csv beside the arrays"},
        {"keep-repetition", OPTION_FLAG, &c->keep_repetition, .help = "flat: also generations that the list marks as looping"},
    };
    snprintf(summary, sizeof summary, "Reads files of other engines and recorders. FORMAT is one of %s.", format_names(true));
    const option_table table = {.name = "convoke-plan import",
                                .summary = summary,
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "FORMAT FILE..",
                                .min_operands = 2,
                                .max_operands = MAX_FILES};
    return inputs_parse_options(&table, argc, argv, operands, n_operands, run);
}

static status print_made(format_kind made, const char *path)
{
    printf("%s: ", path);
    if (made == FORMAT_PLAN) {
        plan p;
        TRY(plan_read(path, NULL, &p));
        printf("a plan for %d layers of %d experts on %d ranks, %d copies\n", p.n_layers, p.n_experts, p.n_ranks,
               p.first_copy[(size_t)p.n_layers * (size_t)p.n_experts]);
        plan_clear(&p);
        return STATUS_OK;
    }
    if (made == FORMAT_TRACE) {
        routing_trace *trace;
        TRY(routing_trace_open(path, &trace));
        printf("a trace of %lld tokens\n", (long long)routing_trace_n_tokens(trace));
        describe_shape(routing_trace_shape(trace), stdout);
        routing_trace_close(trace);
        return STATUS_OK;
    }
    routing_stats *stats;
    unsigned long long tokens = 0;
    TRY(routing_stats_read(path, &stats));
    for (int d = 0; d < routing_stats_shape(stats)->n_domains; d++)
        for (int p = 0; p < N_PHASES; p++)
            tokens += routing_stats_tokens(stats, d, p);
    printf("statistics of %llu tokens\n", tokens);
    describe_shape(routing_stats_shape(stats), stdout);
    routing_stats_destroy(stats);
    return STATUS_OK;
}

status command_import(int argc, char **argv)
{
    command_line c = {0};
    static const char *operands[MAX_FILES];
    int n_operands = 0;
    bool run = false;
    TRY(parse(argc, argv, &c, operands, &n_operands, &run));
    if (!run)
        return STATUS_OK;
    const file_format *format = format_find(operands[0]);
    if (!format)
        return status_fail(STATUS_USAGE, "no format is called '%.60s'; there are %s", operands[0], format_names(true));
    if (!format->import)
        return status_fail(STATUS_USAGE, "%s files are only written, not read", format->name);
    const import_options options = {.model = c.model,
                                    .n_experts = (int)c.experts,
                                    .n_layers = (int)c.layers,
                                    .top_k = (int)c.top_k,
                                    .n_ranks = (int)c.ranks,
                                    .n_nodes = (int)c.nodes,
                                    .domain = c.domain,
                                    .index = c.index,
                                    .keep_repetition = c.keep_repetition,
                                    .phase = c.phase,
                                    .layer_numbers = c.layer_numbers};
    format_kind made;
    TRY(format->import(operands + 1, n_operands - 1, &options, c.out, &made));
    return print_made(made, c.out);
}
