/* drift.h - how far live traffic has moved from what a plan was made for. Pure. */
#ifndef CONVOKE_PLACEMENT_DRIFT_H
#define CONVOKE_PLACEMENT_DRIFT_H

#include <stdint.h>

typedef struct {
    double cosine;   /* 1: the same distribution over experts */
    double spearman; /* rank correlation of the experts' counts, ties averaged */
} drift_of_layer;

/* plan_counts, live_counts [n_layers][n_experts]; out [n_layers]. A layer without counts on either side gets 1, 1; one whose
 * counts are all equal on either side gets spearman 1 if both are, else 0. */
void drift_compare(int n_layers, int n_experts, const uint64_t *plan_counts, const uint64_t *live_counts, drift_of_layer *out);
/* 1 - the smallest cosine over layers: one number for metrics and thresholds, 0: none. */
double drift_level(int n_layers, const drift_of_layer *layers);

#endif
