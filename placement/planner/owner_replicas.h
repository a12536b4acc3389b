/* owner_replicas.h - spare slots filled for the owners' sake: copies of experts where their rows come from. */
#ifndef CONVOKE_PLACEMENT_PLANNER_OWNER_REPLICAS_H
#define CONVOKE_PLACEMENT_PLANNER_OWNER_REPLICAS_H

#include "placement/planner/problem.h"

/* `homes` and copies in every slot that is left, each where it saves most transfer time under these owners, as long as any does:
 * one copy per node and layer at a time, then demand is counted again. A row that needs several experts from elsewhere travels
 * until the last of them is there, so each of r gets 1 / r of what its journey takes. Looks at links alone; rows are taken to go
 * to the nearest copy. *out is a new plan; out of slots or of need, a copy of `homes`. */
status owner_replicas_add(const problem *p, const uint16_t *owner_of_sequence, const plan *homes, plan *out);

#endif
