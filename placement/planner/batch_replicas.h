/* batch_replicas.h - one layer's copies where there are more slots than experts: which experts get replicas, and where all live,
 * so that the busiest rank of every step, its rows split by the step's counts (placement/replica_split.h), is done soonest.
 *
 * The split of all steps is worked out side by side and nearly: experts start whole on their least loaded copy, most rows first;
 * then pairs of an expert's copies give and take until what lies above the step's mean level, squared, is least. Private to the
 * files of `batch`. One caller. */
#ifndef CONVOKE_PLACEMENT_PLANNER_BATCH_REPLICAS_H
#define CONVOKE_PLACEMENT_PLANNER_BATCH_REPLICAS_H

#include "placement/planner/batch_layer.h"

/* holds [n_experts][n_ranks]: in, copies that keep the layer's slots and hold every expert; out, the best found, home the copy
 * that was home or, where that is gone, the lowest rank's. Prices compute alone. Every slot is filled unless caps forbid it.
 * *us: mean microseconds of compute of the result, nearly. */
status batch_replicas_search(batch_layer *b, random_stream *random, work_budget *work, int *home, bool *holds, double *us);

/* What copies cost, nearly: mean microseconds of compute. */
status batch_replicas_us(batch_layer *b, const bool *holds, double *us);

#endif
