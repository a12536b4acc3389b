/* score.h - batch work on token lines without a door: the body of convoke-score.
 *
 * Rank 0 reads the lines, submits them all, listens, and writes what was asked for; the other ranks follow the step loop. */
#ifndef CONVOKE_WORKER_SCORE_H
#define CONVOKE_WORKER_SCORE_H

#include "worker/runtime.h"
#include "worker/token_lines.h"

typedef struct {
    runtime_options runtime; /* limits.max_length, n_domains and domains are filled in from the lines */
    const char *input_path;
    const char *logits_path, *routing_path, *stats_path; /* NULL: not wanted */
    int greedy;                                          /* tokens to continue each line by */
    bool json;
} score_options;

typedef struct {
    double sum_logprob;
    int n_scored, n_generated;
    int32_t *generated; /* [greedy] */
} score_line;

/* [all] Everything: load, run, print, write. On failure one rank has the sentence in status_message(). *out_of_step: this rank
 * failed where the others go on without knowing (or are gone): say so and group_abort(). */
status score_run(group *g, const score_options *options, bool *out_of_step);

/* What one rank tells about itself at the end. */
typedef struct {
    model_times times;
    runtime_memory memory;
    double wait_seconds;
    unsigned long long bytes_same_rank, bytes_same_node, bytes_cross_node, return_same_node, return_cross_node, header_bytes;
    unsigned long long spills, spilled_rows, combined_rows;
    double step_seconds; /* in the step loop */
} score_rank;

/* All that is printed; rank 0. */
typedef struct {
    const score_options *options;
    const model_config *config;
    const plan *plan;
    const token_lines *lines;
    const score_line *results; /* [n_lines] */
    const score_rank *ranks;   /* [n_ranks] */
    int n_ranks, n_nodes, threads;
    const char *isa, *exchange;
    engine_times times;
    unsigned long long n_moved, moved_bytes, moved_cross_bytes; /* sequences given to another owner */
    const unsigned long long *layer_load;                       /* [n_ranks][n_moe_layers] (token, expert) rows */
    const unsigned long long *link_rows; /* [n_ranks][n_ranks] rows dispatched from, to; between nodes once per node, then on */
    const routing_stats *routing;        /* of all ranks */
    double load_seconds;                 /* from start to the first step */
} score_summary;

void score_print_text(const score_summary *s);
status score_print_json(const score_summary *s);

#endif
