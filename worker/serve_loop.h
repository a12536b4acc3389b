/* serve_loop.h - the engine, driven by the coordinator's messages: what a convoke-worker does between Setup and its end.
 *
 *   inbox ─► submit, cancel, hold ... ─► engine_step ─► events ─► one Report ─► socket          (rank 0)
 *                                        engine_follow                                         (the others)
 *
 * Between steps rank 0 empties its inbox; with nothing to do it sleeps, and so do all others. A sequence that the engine refuses
 * is answered by FINISHED with FAILED and the sentence. */
#ifndef CONVOKE_WORKER_SERVE_LOOP_H
#define CONVOKE_WORKER_SERVE_LOOP_H

#include "worker/control_link.h"
#include "worker/watch.h"

typedef struct {
    bool out_of_step;  /* ranks may be waiting for each other: only group_abort() ends the job */
    int rank;          /* who says `reason` */
    char reason[1024]; /* on rank 0, what another rank failed by in loading; "" */
} serve_end;

/* [all] Loads what `setup` names and serves until told to stop: by the coordinator, or SIGTERM on rank 0 (STATUS_OK either way).
 * `link` is rank 0's, NULL elsewhere. */
status serve_run(group *g, control_link *link, watch *w, const Convoke__Control__Setup *setup, serve_end *end);

#endif
