/* partition_pool.h - set partitioning where the clusters are too many to write down: the clusters of many local optima are the
 * columns, and the integer programme over them puts together the best of all. No bound comes of it. */
#ifndef CONVOKE_PLACEMENT_PLANNER_PARTITION_POOL_H
#define CONVOKE_PLACEMENT_PLANNER_PARTITION_POOL_H

#include "placement/planner/lp.h"
#include "placement/planner/problem.h"

typedef struct {
    int n, room, n_experts, n_classes;
    int *class_of_rank; /* [n_ranks] ranks with the same slots and cap */
    uint64_t *members;  /* [n][words] bits */
    int words;
    uint64_t *hash;  /* [n] */
    int *class;      /* [n] */
    int64_t *tokens; /* [n] that choose a member */
} partition_pool;

/* Descent by exact gains from home [n_experts], kicks, descent again, until the work is done; every local optimum's clusters go
 * into the pool, home becomes the best. Pure but for memory. Needs traffic. */
status partition_pool_fill(const problem *p, int layer, random_stream *random, work_budget *work, int *home, partition_pool *out);
void partition_pool_clear(partition_pool *pool);

/* The choice among the pool; start [pool->n] is home's own. */
status partition_pool_model(const problem *p, const partition_pool *pool, const int *home, lp_model **out, double *start);
void partition_pool_take(const problem *p, const partition_pool *pool, const double *x, int *home);

#endif
