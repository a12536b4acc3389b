/* stats_view.h - what statistics say to a person: balance under a plan with its sampling error, skew, which domains are alike,
 * which experts follow each other. Pure numbers; printing and drawing are elsewhere. */
#ifndef CONVOKE_PLACEMENT_PLANNER_STATS_VIEW_H
#define CONVOKE_PLACEMENT_PLANNER_STATS_VIEW_H

#include "placement/plan.h"
#include "placement/routing_stats.h"

/* Counts of the chosen domains and phases added up. */
typedef struct {
    const routing_shape *shape; /* borrowed from the statistics */
    uint64_t tokens[N_PHASES];
    uint64_t *per_expert; /* [n_layers][n_experts] */
    double *next_pairs;   /* [n_layers - 1][n_experts][n_experts]; NULL: the statistics have none */
} stats_sum;

/* Pairs are summed only when wanted. */
status stats_sum_create(const routing_stats *stats, bool pairs, stats_sum *out);
void stats_sum_clear(stats_sum *s); /* a zeroed one is fine */

typedef struct {
    double mean, worst; /* busiest rank over mean rank, over layers */
    int worst_layer;    /* index */
    double error;       /* one standard error of `mean` from the number of tokens, a token's choices taken as one draw */
} balance_view;

/* per_layer [n_layers] may be NULL. The plan has the statistics' experts and layers. */
status stats_view_balance(const stats_sum *s, const plan *p, double *per_layer, balance_view *out);

typedef struct {
    double hottest;   /* hottest expert over mean expert */
    double even;      /* how many experts, used evenly, would be as uneven: exp of the entropy */
    double top_share; /* share of the choices that go to the hottest eighth of the experts (at least one) */
    int hottest_expert;
} skew_view;

/* out [n_layers]; a layer without counts is even. */
void stats_view_skew(const stats_sum *s, skew_view *out);

/* Cosine of two domains' counts over all layers and experts, out [n_domains][n_domains]; a domain without counts is like none
 * (0), but itself (1). */
status stats_view_similarity(const routing_stats *stats, double *out);

/* A path of one expert per layer whose links carry the most tokens beyond chance: the sum over layers of
 * (tokens that chose both) / tokens - (share that chose the one) * (share that chose the other). */
typedef struct {
    int *experts;  /* [n_layers] */
    double *share; /* [n_layers - 1] of the tokens of experts[l] that chose experts[l + 1] next */
    double *lift;  /* [n_layers - 1] that share over the share of all tokens that chose it */
    double excess; /* the sum, a share of the tokens */
} expert_chain;

/* Up to n_chains, strongest first, no expert on two of them; *n_found. Needs pairs. */
status stats_view_chains(const stats_sum *s, int n_chains, expert_chain *out, int *n_found);
void expert_chain_clear(expert_chain *c);

#endif
