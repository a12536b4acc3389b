/* held_out.h - what a solver's plans are worth on traffic they were not made from.
 *
 * K folds: each part of the traffic is scored once under a plan made from all the others. By domain: domains sorted by name, part
 * i has every K-th from the i-th on; by time: sequences in file order in K equal blocks. */
#ifndef CONVOKE_PLACEMENT_PLANNER_HELD_OUT_H
#define CONVOKE_PLACEMENT_PLANNER_HELD_OUT_H

#include "placement/planner/solver.h"

typedef enum { FOLD_BY_DOMAIN, FOLD_BY_TIME } fold_kind;

typedef struct {
    int n_folds;
    double fitted, held; /* step_us over the contiguous plan's on the same traffic, means over folds */
    double held_worst;
    double balance_fitted, balance_held; /* max_over_mean_mean */
    double drift;                        /* 1 - smallest cosine between P of the fitted and of the held part, mean over folds */
} held_out_result;

/* `request` as for the whole traffic; its seconds and work go to each fold. The number of folds shrinks to the number of domains
 * or sequences there are; 0 folds in *out: there was nothing to hold out, or too few sequences for its concurrency (`why`,
 * [why_size], says so). */
status held_out_run(const solver *s, const problem_request *request, int n_folds, fold_kind kind, held_out_result *out, char *why,
                    size_t why_size);

#endif
