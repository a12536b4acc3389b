/* moetuner_dp.h - MoETuner's second question without an integer programme: clusters are given, which rank takes which, layer by
 * layer, so that the sum over layer pairs of the slowest transfer between two ranks is least (arXiv 2502.06643, ILP 2).
 *
 * Only neighbouring layers meet in a term, so a dynamic programme over permutations is exact: n! states a layer, used up to 6
 * ranks; above, a beam of permutations, each made by matching and swaps, then sweeps of swaps. Pure but for memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_MOETUNER_DP_H
#define CONVOKE_PLACEMENT_PLANNER_MOETUNER_DP_H

#include "placement/planner/problem.h"

enum { ORDER_EXACT_MOST = 6 };

typedef struct {
    int n_layers, n;     /* n clusters on n ranks */
    const double *flow;  /* [n_layers - 1][n][n] bytes per token from a layer's cluster to one of the next */
    const double *us;    /* [n][n] us per byte from rank to rank, 0 to itself */
    const bool *allowed; /* [n_layers][n][n] cluster on rank */
} cluster_order;

/* rank [n_layers][n] of each cluster: a permutation per layer. */
double cluster_order_cost(const cluster_order *o, const int *rank);
/* The optimum over allowed permutations; n at most ORDER_EXACT_MOST; rank holds an allowed order before. */
status cluster_order_exact(const cluster_order *o, int *rank);
/* Any n: never worse than the order that rank holds before. A unit of work is an entry of `flow` looked at. */
status cluster_order_beam(const cluster_order *o, random_stream *random, work_budget *work, int *rank);

#endif
