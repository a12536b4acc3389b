/* errand.h - one piece of work on a thread of its own, beside the step loop, which asks now and then whether it is done. */
#ifndef CONVOKE_WORKER_ERRAND_H
#define CONVOKE_WORKER_ERRAND_H

#include "proto/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* A zeroed one is at home. */
typedef struct {
    pthread_t thread;
    bool out; /* started, and not brought home yet */
    _Atomic bool done;
    status (*run)(void *arg);
    void *arg;
    status result;
    char why[256];
} errand;

/* It must be at home. The thread runs at low priority and takes no signals. */
status errand_start(errand *e, status (*run)(void *arg), void *arg);
bool errand_is_done(const errand *e); /* false for one at home */
/* Waits for it; what `run` returned, with its sentence; STATUS_OK for one at home. */
status errand_end(errand *e);

#endif
