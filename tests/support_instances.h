/* support_instances.h - problems made by formula, at any size, without traffic: what solvers and bounds on flows between layers
 * are tried on. */
#ifndef CONVOKE_TESTS_SUPPORT_INSTANCES_H
#define CONVOKE_TESTS_SUPPORT_INSTANCES_H

#include "placement/planner/problem.h"

/* At least two layers. Not to be moved once made: the problem points into it. One token chooses one expert per layer (k = 1);
 * distance 1 on a node, 4 between nodes; slots ceil(E / G), caps 5 % above what LPT finds. */
typedef struct {
    problem p;
    problem_request request;
    topology topo;
    int *layer_numbers;
} instance;

/* Hidden blocks: in every layer the experts belong to n_ranks blocks in a random order; a share of 0.49 of the flow between two
 * layers stays in its block, the rest goes anywhere. All loads are equal. The planted optimum is the blocks themselves:
 * 0.51 * (the mean distance of two ranks, themselves included). E must be a multiple of G. */
void instance_planted(int n_layers, int n_experts, int n_ranks, int n_nodes, uint64_t seed, instance *out);
double instance_planted_optimum(const instance *x);
/* Topics: each has its own sparse distribution over a layer's experts (symmetric Dirichlet), 30 % of every choice is uniform. */
void instance_topics(int n_layers, int n_experts, int n_ranks, int n_nodes, int n_topics, double sparse, uint64_t seed,
                     instance *out);
void instance_clear(instance *x);

#endif
