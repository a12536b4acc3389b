/* score.h - all measures of a plan side by side, the published ones too, so that nobody has to take a solver's word. Pure. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SCORE_H
#define CONVOKE_PLACEMENT_PLANNER_SCORE_H

#include "placement/planner/problem.h"

typedef struct {
    double max_over_mean_mean, max_over_mean_worst; /* planned rows (load, replicas sharing evenly) over share, over layers */
    int worst_layer;
    double max_over_mean_error; /* one standard error of max_over_mean_mean from the number of tokens counted (tokens as draws) */
    double flow; /* R-flow: sum over layers and pairs of next_pairs * distance of the homes, per token and layer pair; NAN without
                    R */
    double moetuner; /* MoETuner's ILP 2: sum over layer pairs of the largest flow between two devices over their bandwidth (us
                        per token); NAN without R */
    double ranks_per_token; /* distinct ranks of a token's homes per layer; NAN without traffic */
    int n_replicas;         /* copies beyond the homes */
    int64_t replica_bytes;  /* 0 when bytes_per_expert is unknown */
    bool has_replay;
    replay_result replay; /* with the request's options; only when has_replay */
} plan_score;

status score_plan(const problem *p, const plan *made, plan_score *out);
void score_clear(plan_score *s);

/* The single measures, for solvers' objectives. */
double score_balance(const problem *p, const plan *made, int *worst_layer, double *worst); /* mean over layers */
double score_flow(const problem *p, const plan *made);
double score_moetuner(const problem *p, const plan *made);
double score_ranks(const problem *p, const plan *made); /* distinct ranks per token and layer */
status score_step_us(const problem *p, const plan *made, double *out);

#endif
