/* probe.h - what computing and sending cost on the ranks of this job, for one model: the body of convoke-probe.
 *
 * All ranks measure at once, as they serve at once, with the code that serves (experts.h, exchange.h), on the model's own
 * experts:
 *
 *   rows and experts   touched experts x rows each, all of them this rank's: time = rows * row_us + touched * expert_us
 *   links              every rank sends rows to one other rank of the class and gets them back: time = 2 * us + bytes / bandwidth
 *
 * Weights are read from many experts in turn, so that they come from memory and not from a cache. Times are medians; fits are by
 * least squares of relative errors. */
#ifndef CONVOKE_WORKER_PROBE_H
#define CONVOKE_WORKER_PROBE_H

#include "placement/topology.h"
#include "router/exchange.h"

typedef struct {
    const char *model_dir, *out_path;
    int threads; /* per rank; 0: the node's cores over its ranks */
    row_format rows;
    double seconds; /* about how long each of the two measurements may take */
} probe_options;

/* [all] Measures, writes the topology and prints it (rank 0). On failure one rank has the sentence. */
status probe_run(group *g, const probe_options *options);

/* A time in microseconds for so many of each of two things; the first is bytes or rows. Pure. */
typedef struct {
    double rows, touched, us;
} probe_sample;
/* Least squares of relative errors: us = rows * *per_row + touched * *per_touched; neither is negative, per_row is above 0. */
void probe_fit(const probe_sample *samples, int n, double *per_row, double *per_touched);

#endif
