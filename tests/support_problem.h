/* support_problem.h - random planning problems: traffic, machine, room and slack, everything that a problem borrows kept beside
 * it. */
#ifndef CONVOKE_TESTS_SUPPORT_PROBLEM_H
#define CONVOKE_TESTS_SUPPORT_PROBLEM_H

#include "placement/planner/problem.h"

#include <stdint.h>

/* Upper limits; what a problem gets is random between 1 (2 experts) and these. Zero fields take the default beside them. */
typedef struct {
    int layers, experts, ranks, top_k, sequences, tokens; /* 4, 16, 5, 4, 12, 20 (tokens per sequence) */
    bool exact;                                           /* the limits are the sizes (tokens: still up to) */
    bool even;       /* ranks and links alike, no budgets: topology_uniform() on one or two nodes */
    bool stats_only; /* statistics, no traffic */
    int extra_slots; /* at most */
    bool slack;      /* now and then a slack, which plans can keep */
    int concurrency; /* at most, for replays; 0: none */
} support_problem_size;

typedef struct {
    traffic traffic;
    topology topology;
    routing_stats *stats;
    problem_request request;
    problem *problem;
} support_problem;

void support_random_problem(uint64_t *seed, const support_problem_size *size, support_problem *out);
void support_problem_clear(support_problem *s);

/* A home per expert that keeps every layer's slots; with caps it is LPT's plan, shuffled as far as they allow.
 * home [n_layers][n_experts]. */
void support_random_home(uint64_t *seed, const problem *p, int *home);
/* The same as a plan; replicas (up to n_layers * n_ranks of them) in slots that are left, when wanted and no slack was given. */
status support_random_problem_plan(uint64_t *seed, const problem *p, bool replicas, plan *out);

#endif
