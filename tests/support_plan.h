/* support_plan.h - plans that nobody would solve for but every part must work with. */
#ifndef CONVOKE_TESTS_SUPPORT_PLAN_H
#define CONVOKE_TESTS_SUPPORT_PLAN_H

#include "placement/plan.h"

/* Every expert's home is a random rank (so ranks may be crowded or empty); a share of the experts, 0 to 1, has one to three
 * replicas elsewhere, as far as there are ranks. Valid by construction. node_of_rank NULL: all on node 0. */
status support_random_plan(uint64_t *seed, const plan_shape *shape, const int *node_of_rank, double replica_share, plan *out);

/* The contiguous plan with the ranks in falling order: nothing is where the contiguous plan has it. */
status support_reversed_plan(const plan_shape *shape, const int *node_of_rank, plan *out);

#endif
