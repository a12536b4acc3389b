/* probe_main.c - convoke-probe: the command line of probe.h. `convoke-plan probe` starts it too. */
#include "worker/probe.h"

#include "proto/log.h"
#include "proto/options.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const char *model, *out;
    int64_t threads, ranks_per_node;
    int rows;
    double seconds;
} command_line;

static status parse(int argc, char **argv, command_line *c, options_wish *wish)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &c->model, .argument = "DIR", .environment = "CONVOKE_MODEL", .required = true,
         .help = "checkpoint folder in Hugging Face form"},
        {"output", OPTION_STRING, &c->out, .letter = 'o', .argument = "TOPOLOGY", .required = true,
         .help = "where the topology is written (JSON)"},
        {"threads", OPTION_INT, &c->threads, .argument = "T", .environment = "CONVOKE_THREADS", .fallback = "0", .max = 1024,
         .help = "threads per rank (0: the node's cores over its ranks)"},
        {"rows", OPTION_CHOICE, &c->rows, .choices = "fp32|bf16", .fallback = "fp32", .help = "how token rows travel"},
        {"seconds", OPTION_DOUBLE, &c->seconds, .argument = "S", .fallback = "5", .min = 0.01, .max = 3600,
         .help = "about how long computing and links are measured, each"},
        {"ranks-per-node", OPTION_INT, &c->ranks_per_node, .argument = "N", .fallback = "0", .max = 65536,
         .help = "pretend that every N ranks are a node of their own (0: as it is)"},
    };
    const option_table table = {.name = "convoke-probe",
                                .summary =
                                    "Measures, under mpirun, what computing and sending cost for a model, for convoke-plan.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    TRY(options_parse(&table, argc, argv, wish, NULL, NULL));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

/* The sentence of the one rank that has it. */
static void complain(status st)
{
    if (st != STATUS_OK && st != STATUS_ELSEWHERE)
        log_line("%s", status_message());
}

/* --help and mistakes are settled before ranks meet, so that nobody waits; only one of them speaks. */
static bool speaks(void)
{
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    return !rank || atoi(rank) == 0;
}

int main(int argc, char **argv)
{
    command_line c = {0};
    options_wish wish = OPTIONS_RUN;
    log_set_speaker("convoke-probe");
    if (!speaks() && !freopen("/dev/null", "w", stdout))
        return 1;
    status st = parse(argc, argv, &c, &wish);
    if (st != STATUS_OK || wish != OPTIONS_RUN) {
        if (speaks())
            complain(st);
        return status_exit_code(st);
    }
    group *g = NULL;
    st = group_create(&argc, &argv, (int)c.ranks_per_node, &g);
    if (st != STATUS_OK) {
        complain(st);
        return status_exit_code(st);
    }
    probe_options options = {.model_dir = c.model,
                             .out_path = c.out,
                             .threads = (int)c.threads,
                             .rows = c.rows == 0 ? ROWS_F32 : ROWS_BF16,
                             .seconds = c.seconds};
    st = probe_run(g, &options);
    complain(st);
    if (st == STATUS_PEER_LOST || st == STATUS_STOPPED)
        group_abort(g, status_exit_code(st));
    group_destroy(g);
    return status_exit_code(st);
}
