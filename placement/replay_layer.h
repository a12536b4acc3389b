/* replay_layer.h - one layer of a replay: every step's routing, compute and transfer times. Private to replay*.c.
 *
 * Layers know nothing of each other, so each is replayed by itself, in step order, by one thread. */
#ifndef CONVOKE_PLACEMENT_REPLAY_LAYER_H
#define CONVOKE_PLACEMENT_REPLAY_LAYER_H

#include "placement/replay.h"

typedef struct layer_replay layer_replay; /* scratch of one thread */

/* Everything is borrowed and must outlive it; plan and traffic have been checked against the topology. */
status layer_replay_create(const traffic *t, const replay_schedule *schedule, const plan *p, const topology *topo,
                           const replay_options *options, layer_replay **out);
void layer_replay_destroy(layer_replay *r); /* NULL is fine */

/* Sums over steps. The caller sets the pointers, to zeros. */
typedef struct {
    double compute_us, dispatch_us, combine_us;
    double max_over_mean; /* of ranks' rows per step */
    double split_gap;     /* counted only with measure_split */
    bool measure_split;
    uint64_t copies, cross_copies, home, choices;
    double *step_us;     /* [n_steps]; NULL: not wanted */
    uint64_t *rank_rows; /* [n_ranks]; NULL: not wanted */
    uint64_t *link_rows; /* [n_ranks][n_ranks]; NULL: not wanted */
} layer_totals;

status layer_replay_run(layer_replay *r, int layer, layer_totals *out);

#endif
