#include "worker/errand.h"

#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

#define ERRAND_NICE 10

static void *run(void *arg)
{
    errand *e = arg;
    setpriority(PRIO_PROCESS, (id_t)gettid(), ERRAND_NICE); /* of this thread alone */
    e->result = e->run(e->arg);
    if (e->result != STATUS_OK)
        snprintf(e->why, sizeof e->why, "%s", status_message());
    atomic_store(&e->done, true);
    return NULL;
}

status errand_start(errand *e, status (*fn)(void *arg), void *arg)
{
    sigset_t all, before;
    e->run = fn;
    e->arg = arg;
    atomic_store(&e->done, false);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    e->out = pthread_create(&e->thread, NULL, run, e) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return e->out ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no thread for work beside the steps");
}

bool errand_is_done(const errand *e)
{
    return e->out && atomic_load(&e->done);
}

status errand_end(errand *e)
{
    if (!e->out)
        return STATUS_OK;
    pthread_join(e->thread, NULL);
    e->out = false;
    return e->result == STATUS_OK ? STATUS_OK : status_fail(e->result, "%s", e->why);
}
