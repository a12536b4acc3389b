/* inputs.h - what most commands start from: statistics or a trace, a topology, and how a run is replayed. One set of options. */
#ifndef CONVOKE_PLACEMENT_PLANNER_INPUTS_H
#define CONVOKE_PLACEMENT_PLANNER_INPUTS_H

#include "placement/planner/problem.h"
#include "proto/options.h"

typedef struct {
    /* as given; zeroed before parsing */
    const char *stats_path, *trace_path, *topology_path, *domain, *slack_text;
    int64_t ranks, nodes, concurrency, threads, bytes_per_expert, random_seed;
    int owner, replica_choice, phase;
    bool node_dedupe;
    /* as loaded */
    routing_stats *stats; /* NULL: none */
    traffic traffic;
    topology topology;
    bool has_traffic;
} plan_inputs;

#define INPUT_TRAFFIC_OPTIONS(in)                                                                                                \
    {"trace", OPTION_STRING, &(in)->trace_path, .letter = 't', .argument = "TRACE", .help = "routing trace: tokens one by one"}, \
        {"domain", OPTION_STRING, &(in)->domain, .argument = "NAME", .help = "only the trace's sequences of this domain"},       \
    {                                                                                                                            \
        "phase", OPTION_CHOICE, &(in)->phase, .choices = "all|decode|prefill", .fallback = "all",                                \
                                              .help = "only generated tokens of the trace, or only prompts"                      \
    }
#define INPUT_TOPOLOGY_OPTIONS(in)                                                                                               \
    {"topology", OPTION_STRING, &(in)->topology_path, .argument = "TOPOLOGY",                                                    \
     .help = "what computing and sending cost (convoke-plan probe)"},                                                            \
        {"ranks",                                                                                                                \
         OPTION_INT,                                                                                                             \
         &(in)->ranks,                                                                                                           \
         .argument = "G",                                                                                                        \
         .fallback = "0",                                                                                                        \
         .max = PLAN_MAX_RANKS,                                                                                                  \
         .help = "instead of a topology: that many ranks of two CPU cores"},                                                     \
        {"nodes",                                                                                                                \
         OPTION_INT,                                                                                                             \
         &(in)->nodes,                                                                                                           \
         .argument = "D",                                                                                                        \
         .fallback = "0",                                                                                                        \
         .max = PLAN_MAX_RANKS,                                                                                                  \
         .help = "with --ranks: nodes, in equal blocks (0: one)"},                                                               \
    {                                                                                                                            \
        "bytes-per-expert", OPTION_SIZE, &(in)->bytes_per_expert,                                                                \
            .fallback = "0", .help = "one expert's weights in one layer (0: as the topology says)"                               \
    }
#define INPUT_REPLAY_OPTIONS(in)                                                                                                 \
    {"concurrency",      OPTION_INT,                                                                                             \
     &(in)->concurrency, .letter = 'C',                                                                                          \
     .argument = "C",    .fallback = "0",                                                                                        \
     .max = 1 << 20,     .help = "sequences at once in the replay (0: 128, or a third of the trace's if that is fewer)"},               \
        {"owner",                                                                                                                \
         OPTION_CHOICE,                                                                                                          \
         &(in)->owner,                                                                                                           \
         .choices = "round-robin|affinity|recorded",                                                                             \
         .fallback = "round-robin",                                                                                              \
         .help = "which rank holds a sequence"},                                                                                 \
        {"replica-choice",        OPTION_CHOICE,      &(in)->replica_choice,                                                     \
         .choices = "share|step", .fallback = "step", .help = "which copy computes a row: nearest, or by the step's load"},      \
        {"node-dedupe", OPTION_FLAG, &(in)->node_dedupe, .help = "a row crosses once per node and is passed on inside it"},      \
    {                                                                                                                            \
        "threads", OPTION_INT, &(in)->threads, .argument = "T", .fallback = "0", .max = 1024, .help = "threads (0: all cores)"   \
    }

/* Reads what was named. `like`: without a topology and --ranks, a uniform one on its ranks and nodes (NULL: ask for one). */
status inputs_load(plan_inputs *in, const plan *like);
status inputs_load_topology(plan_inputs *in, const plan *like); /* that part alone */
void inputs_clear(plan_inputs *in);
/* Borrows from `in`; slack, extra slots, budgets of work are the caller's to add. */
problem_request inputs_request(const plan_inputs *in);
/* "5%", "0.05" -> 0.05; NULL -> -1. */
status inputs_parse_slack(const char *text, double *out);
/* Parses; *run is false when help or the version was printed instead. */
status inputs_parse_options(const option_table *table, int argc, char **argv, const char **operands, int *n_operands, bool *run);

#endif
