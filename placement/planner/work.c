/* Counted work, random numbers that depend on nothing but their key, and loops over layers on several threads. */
#include "placement/planner/problem.h"
#include "proto/clock.h"
#include "proto/hash.h"

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

work_budget work_start(const problem *p, int64_t fallback_units)
{
    const problem_request *r = p->request;
    return (work_budget){.left = r->work > 0 ? r->work : fallback_units,
                         .deadline = r->seconds > 0 ? clock_seconds() + r->seconds : 0};
}

work_budget work_part(const work_budget *whole, int part, int n_parts)
{
    int64_t each = whole->left / n_parts;
    return (work_budget){.left = each + (part < whole->left % n_parts), .deadline = whole->deadline};
}

bool work_take(work_budget *w, int64_t units)
{
    if (w->deadline > 0 && !w->out_of_time && clock_seconds() >= w->deadline)
        w->out_of_time = true;
    if (w->out_of_time || w->left < units)
        return false;
    w->left -= units;
    return true;
}

/* ---- random numbers ---- */

random_stream random_open(const problem *p, uint64_t stream)
{
    uint64_t key = hash_mix(p->request->random_seed + UINT64_C(0x9e3779b97f4a7c15));
    return (random_stream){.key = hash_mix(hash_mix(key ^ p->fingerprint) + stream)};
}

uint64_t random_next(random_stream *r)
{
    return hash_mix(r->key + ++r->counter * UINT64_C(0x9e3779b97f4a7c15));
}

int random_below(random_stream *r, int n)
{
    return (int)(((random_next(r) >> 32) * (uint64_t)n) >> 32);
}

double random_unit(random_stream *r)
{
    return (double)(random_next(r) >> 11) * 0x1p-53;
}

/* ---- threads ---- */

typedef struct {
    status (*body)(void *arg, int i);
    void *arg;
    int n;
    atomic_int next;
    pthread_mutex_t lock;
    int failed; /* the lowest i that failed */
    status st;
    char sentence[1024];
} loop;

static void *run_loop(void *arg)
{
    loop *l = arg;
    for (int i; (i = atomic_fetch_add(&l->next, 1)) < l->n;) {
        status st = l->body(l->arg, i);
        if (st == STATUS_OK)
            continue;
        pthread_mutex_lock(&l->lock);
        if (i < l->failed) {
            l->failed = i;
            l->st = st;
            snprintf(l->sentence, sizeof l->sentence, "%s", status_message());
        }
        pthread_mutex_unlock(&l->lock);
    }
    return NULL;
}

status parallel_for(int threads, int n, status (*body)(void *arg, int i), void *arg)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    threads = threads > 0 ? threads : cores > 0 ? (int)cores : 1;
    threads = threads < n ? threads : n;
    loop l = {.body = body, .arg = arg, .n = n, .failed = INT_MAX, .lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t *ids = threads > 1 ? malloc((size_t)threads * sizeof *ids) : NULL;
    int started = 0; /* a thread that cannot be started is not missed: the others and this one do its share */
    while (ids && started < threads - 1 && pthread_create(&ids[started], NULL, run_loop, &l) == 0)
        started++;
    run_loop(&l);
    for (int i = 0; i < started; i++)
        pthread_join(ids[i], NULL);
    free(ids);
    return l.st == STATUS_OK ? STATUS_OK : status_fail(l.st, "%s", l.sentence);
}
