/* replay.h - what a plan would have cost on recorded traffic: step_us, copies and balance, exactly as defined here, so that two
 * programs get the same number (tests/replay_reference.py is the second one).
 *
 * Who runs when. C places, place i owned by rank i mod G. Sequences in file order fill places in order; each step takes one token
 * of each place; a finished sequence is replaced at once by the next in file order (several in one step: lower place first) and
 * its place keeps its owner; the run ends before the first step with fewer than C. OWNER_RECORDED instead takes steps and owners
 * from the trace itself (traffic.h), tokens of a step in order of their rows in the trace. Nodes are the topology's; the plan's
 * own are not looked at.
 *
 * Layer by layer a token's row goes from its owner to every distinct rank that computes one of its experts and one row returns
 * from each. A layer costs  compute + dispatch + combine:
 *   compute   max over ranks of rows * row_us + touched * expert_us      rows: (token, expert) rows; touched: experts with a row
 *   dispatch  max over ranks of max(out, in) + us                        out, in: sums of bytes * us_per_byte (topology.h), one
 *                                                                        NIC per rank; us: the largest of the classes that
 *                                                                        carried anything, 0 if none
 *   combine   the same for the rows on their way back: out and in exchanged, each over the reverse link
 * With node_dedupe a row crosses to another node once, to the rank there whose local index is the owner's modulo that node's
 * ranks, which forwards it to the others there (same-node out and in; itself nothing); combine runs backwards.
 * step_us = mean over steps of the sum over layers.
 *
 * Owners by affinity. When the 32nd token of a sequence has run, before the next step (lower places first): for each rank r,
 * t(r) = sum over those tokens, all layers and the distinct other ranks its rows would go to from r (r's own copy, else the first
 * copy on r's node, else the home) of row_bytes * us_per_byte (rows are counted per pair, then added up over the other ranks,
 * rising). The best r is the smallest t with room, that is fewer than ceil(1.05 C / G) places (its present owner has room); ties:
 * present owner, then lower rank. A sequence that ends there stays. It moves when 2 * (t(owner) - t(r)) * 256 / 32 > 32 *
 * n_layers * row_bytes * us_per_byte(owner, r): when 256 tokens pay for moving its KV, which is charged as 32 rows from old to
 * new owner in the dispatch of every layer of the next step. The place keeps its new owner.
 *
 * Replicas. REPLICAS_BY_SHARE: plan_choose(REPLICA_OWNER_FIRST), turn = rows its owner has owned before it in this run.
 * REPLICAS_BY_STEP: replica_split.h on the step's counts, rows in order of places. */
#ifndef CONVOKE_PLACEMENT_REPLAY_H
#define CONVOKE_PLACEMENT_REPLAY_H

#include "placement/plan.h"
#include "placement/topology.h"
#include "placement/traffic.h"

typedef enum { OWNER_ROUND_ROBIN, OWNER_AFFINITY, OWNER_RECORDED } owner_rule;
typedef enum { REPLICAS_BY_SHARE, REPLICAS_BY_STEP } replica_rule;

enum { AFFINITY_TOKENS = 32, AFFINITY_PAYBACK = 256 };

typedef struct {
    int concurrency; /* C */
    owner_rule owners;
    replica_rule replicas;
    bool node_dedupe;
    int threads; /* 0: as many as there are cores; results do not depend on it */
} replay_options;

/* Which token each place ran in each step, and who owned it. For round-robin and recorded owners it does not depend on a plan. */
typedef struct {
    int64_t n_steps;
    int64_t *first;     /* [n_steps + 1] entries of step s: first[s] .. first[s + 1] - 1, in order of places */
    int64_t *token;     /* [first[n_steps]] */
    uint16_t *owner;    /* [first[n_steps]] */
    int64_t n_moves;    /* sequences that changed owner */
    int64_t *move_step; /* [n_moves] rising: the step whose dispatch carries the KV cache */
    uint16_t *move_from, *move_to;
} replay_schedule;

/* Fails when the traffic never fills C places (the sentence says how many sequences there are), or has no recorded owners. p may
 * be NULL unless owners go by affinity. */
status replay_schedule_build(const traffic *t, const plan *p, const topology *topo, const replay_options *options,
                             replay_schedule *out);
void replay_schedule_clear(replay_schedule *s);

typedef struct {
    int64_t n_steps, n_rows;                    /* n_rows: tokens replayed */
    double step_us, low_us, high_us;            /* mean and bootstrap 95 % interval (1,000 resamples of steps, fixed draws) */
    double compute_us, dispatch_us, combine_us; /* their sum is step_us */
    double copies;                              /* rows per token and layer to ranks other than the owner */
    double cross_copies; /* distinct nodes other than the owner's with node_dedupe, else rows to ranks on other nodes */
    double home;         /* share of (token, expert) rows computed on the owner */
    double max_over_mean_mean, max_over_mean_worst; /* busiest rank's rows over mean, whole run: over layers */
    double max_over_mean_step;                      /* the same per step and layer, mean of all */
    double split_gap; /* REPLICAS_BY_STEP: mean over steps and layers of busiest / replica_split_bound, 1: optimal; else 0 */
    int64_t n_moves;
    int n_layers, n_ranks;
    double *layer_us;      /* [n_layers] mean over steps */
    double *max_over_mean; /* [n_layers] whole run */
    double *step_times;    /* [n_steps] */
    uint64_t
        *link_rows; /* [n_ranks][n_ranks] rows dispatched from, to, all layers (combine: transposed); KV moves not among them */
    uint64_t *rank_rows; /* [n_layers][n_ranks] (token, expert) rows computed */
} replay_result;

/* The plan must have the traffic's experts and layers and the topology's ranks; checked. Every other number stays finite. */
status replay_run(const traffic *t, const plan *p, const topology *topo, const replay_options *options, replay_result *out);
/* The same on a schedule that was made before (round-robin and recorded owners). */
status replay_run_schedule(const traffic *t, const replay_schedule *schedule, const plan *p, const topology *topo,
                           const replay_options *options, replay_result *out);
void replay_result_clear(replay_result *r);

/* One layer's mean cost over all steps: what local searches compare whole candidates by. Pure but for scratch memory. */
status replay_layer_us(const traffic *t, const replay_schedule *schedule, const plan *p, int layer, const topology *topo,
                       const replay_options *options, double *out);

#endif
