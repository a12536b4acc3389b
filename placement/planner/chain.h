/* chain.h - layers whose experts are placed by what they cost beside their neighbours: the state of the searches on R-flow.
 *
 * With both neighbouring layers fixed, the flow that a layer pays is a sum over its experts: cost[e][g], whatever the distances.
 * So one layer is a transportation problem with load caps, moves and swaps in it cost two look-ups each, and all even layers (or
 * all odd ones) can be worked on at once. Costs are those of score_flow(): mean over layer pairs of flow share times distance. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CHAIN_H
#define CONVOKE_PLACEMENT_PLANNER_CHAIN_H

#include "placement/planner/problem.h"

typedef struct {
    const problem *p;
    int *home;     /* [n_layers][n_experts] */
    double *scale; /* [n_layers - 1] 1 / (flow of the pair * number of pairs) */
    bool classes;  /* distance is one of two values off the diagonal: same node, other node */
    double near, far;
} chain;

/* home is borrowed and stays the caller's. */
status chain_open(const problem *p, int *home, chain *out);
void chain_close(chain *c);
double chain_flow(const chain *c); /* = score_flow() of the homes */

/* One layer's part: costs and its experts by rank. */
typedef struct {
    const chain *c;
    int layer;
    int *home;    /* [n_experts] into the chain's */
    double *cost; /* [n_experts][n_ranks] */
    double *load; /* [n_ranks] rows */
    int *count;   /* [n_ranks] experts */
    int *member;  /* [n_ranks][most] */
    int *place;   /* [n_experts] index among its rank's members */
    int most;     /* largest slots of the layer */
    void *memory;
} chain_layer;

/* before, after: whether the neighbour on that side counts (and is placed). */
status chain_layer_open(const chain *c, int layer, bool before, bool after, chain_layer *out);
void chain_layer_close(chain_layer *y);
double chain_layer_cost(const chain_layer *y);

/* Exact transport under the slots, caps repaired; kept only when the layer then costs less (or `always`). */
status chain_layer_transport(chain_layer *y, bool always);
/* Swaps and moves, of experts and of whole ranks, until none helps; caps kept. Returns whether anything changed. */
bool chain_layer_descend(chain_layer *y);
/* Metropolis swaps at one temperature. */
void chain_layer_anneal(chain_layer *y, double temperature, int64_t proposals, random_stream *random);

/* Exchanges whole ranks in all layers at once, where room and caps allow it, while that helps. */
status chain_relabel(chain *c);

#endif
