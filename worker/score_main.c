/* score_main.c - convoke-score: the command line of score.h. */
#include "worker/score.h"

#include "proto/log.h"
#include "proto/options.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const char *model, *input, *plan, *logits, *routing, *stats, *topology;
    int64_t greedy, threads, batch, chunk, kv_bytes, ranks_per_node;
    int combine, rows, weights, replicas, owners;
    bool json;
} command_line;

static status parse(int argc, char **argv, command_line *c, options_wish *wish)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &c->model, .argument = "DIR", .environment = "CONVOKE_MODEL", .required = true,
         .help = "checkpoint folder in Hugging Face form"},
        {"input", OPTION_STRING, &c->input, .argument = "LINES.jsonl", .required = true, .help = "token lines to score"},
        {"plan", OPTION_STRING, &c->plan, .argument = "PLAN.json",
         .help = "which ranks hold which expert (default: contiguous blocks)"},
        {"greedy", OPTION_INT, &c->greedy, .argument = "M", .fallback = "0", .max = 1 << 20,
         .help = "continue each line by M tokens"},
        {"logits", OPTION_STRING, &c->logits, .argument = "OUT", .help = "write logits, choices and continuations (safetensors)"},
        {"routing", OPTION_STRING, &c->routing, .argument = "OUT", .help = "write the routing trace (safetensors)"},
        {"stats", OPTION_STRING, &c->stats, .argument = "OUT", .help = "write the routing statistics (safetensors)"},
        {"combine", OPTION_CHOICE, &c->combine, .choices = "exact|fixed|fast", .fallback = "fixed",
         .help = "how experts' outputs are added up"},
        {"rows", OPTION_CHOICE, &c->rows, .choices = "fp32|bf16", .fallback = "fp32", .help = "how token rows travel"},
        {"weights", OPTION_CHOICE, &c->weights, .choices = "map|copy", .fallback = "map",
         .help = "use weights where the file is mapped, or copy this rank's share"},
        {"replicas", OPTION_CHOICE, &c->replicas, .choices = "owner-first|round-robin|step", .fallback = "owner-first",
         .help = "which copy of a replicated expert computes a row (step: by the step's load)"},
        {"owners", OPTION_CHOICE, &c->owners, .choices = "spread|affinity", .fallback = "spread",
         .help = "where sequences live (affinity: after their first rows, near their experts)"},
        {"topology", OPTION_STRING, &c->topology, .argument = "TOPOLOGY.json",
         .help = "what computing and sending cost, for --replicas step and --owners affinity (default: constants)"},
        {"threads", OPTION_INT, &c->threads, .argument = "T", .environment = "CONVOKE_THREADS", .fallback = "0", .max = 1024,
         .help = "threads per rank (0: the node's cores over its ranks)"},
        {"batch", OPTION_INT, &c->batch, .argument = "B", .fallback = "32", .min = 1, .max = 65536,
         .help = "sequences at once, over all ranks"},
        {"chunk", OPTION_INT, &c->chunk, .argument = "C", .fallback = "512", .min = 1, .max = 65536,
         .help = "prompt tokens per rank and step"},
        {"kv-bytes", OPTION_SIZE, &c->kv_bytes, .argument = "SIZE", .fallback = "0",
         .help = "KV cache per rank (0: what the batch needs, at most 1G)"},
        {"ranks-per-node", OPTION_INT, &c->ranks_per_node, .argument = "N", .fallback = "0", .max = 65536,
         .help = "pretend that every N ranks are a node of their own (0: as it is)"},
        {"json", OPTION_FLAG, &c->json, .help = "print one JSON object instead of text"},
    };
    const option_table table = {.name = "convoke-score",
                                .summary = "Scores and continues token lines with a Mixture-of-Experts model under mpirun.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    TRY(options_parse(&table, argc, argv, wish, NULL, NULL));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

static score_options make_options(const command_line *c)
{
    return (score_options){.runtime = {.model_dir = c->model,
                                       .plan_path = c->plan,
                                       .threads = (int)c->threads,
                                       .weights = c->weights == 0 ? WEIGHTS_MAP : WEIGHTS_COPY,
                                       .combine = (combine_mode)c->combine,
                                       .rows = c->rows == 0 ? ROWS_F32 : ROWS_BF16,
                                       .replicas = (replica_choice)c->replicas,
                                       .topology_path = c->topology,
                                       .limits = {.owners = (engine_owners)c->owners,
                                                  .max_sequences = (int)c->batch,
                                                  .chunk = (int)c->chunk,
                                                  .kv_bytes = (size_t)c->kv_bytes}},
                           .input_path = c->input,
                           .logits_path = c->logits,
                           .routing_path = c->routing,
                           .stats_path = c->stats,
                           .greedy = (int)c->greedy,
                           .json = c->json};
}

/* The sentence of the one rank that has it. */
static void complain(status st)
{
    if (st != STATUS_ELSEWHERE)
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
    log_set_speaker("convoke-score");
    if (!speaks() && !freopen("/dev/null", "w", stdout))
        return 1;
    status st = parse(argc, argv, &c, &wish);
    if (st != STATUS_OK || wish != OPTIONS_RUN) {
        if (st != STATUS_OK && speaks())
            complain(st);
        return status_exit_code(st);
    }
    group *g = NULL;
    st = group_create(&argc, &argv, (int)c.ranks_per_node, &g);
    if (st != STATUS_OK) {
        complain(st);
        return status_exit_code(st);
    }
    score_options options = make_options(&c);
    bool out_of_step = false;
    st = score_run(g, &options, &out_of_step);
    if (st != STATUS_OK)
        complain(st);
    if (out_of_step)
        group_abort(g, status_exit_code(st));
    group_destroy(g);
    return status_exit_code(st);
}
