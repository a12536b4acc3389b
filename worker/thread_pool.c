/* thread_pool.c - helpers that wait for the next run, first spinning, then asleep on a futex.
 *
 *     caller:  fn, arg -> running = helpers -> epoch + 1 -> wake sleepers -> own share -> wait until running is 0
 *     helper:  wait until epoch moves -> fn(arg, t) -> running - 1 -> (last one) wake the caller if it sleeps
 *
 * epoch and running sit on lines of their own: helpers spin on the first while others still count down the second. A side that
 * goes to sleep says so before its last look at the word, and the other side looks at that note after its change, so no wake is
 * lost and no system call is made when nobody sleeps. */
#include "worker/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CACHE_LINE 64
#define SPIN_NS    40000 /* about what the gap between two runs of a layer is, and less than a sleep and wake cost */
#define YIELDS     2     /* without spinning: give the core away this often before sleeping */

typedef struct {
    thread_pool *pool;
    pthread_t handle;
    int number;
} helper;

struct thread_pool {
    _Alignas(CACHE_LINE) _Atomic uint32_t epoch;   /* moves once per run; helpers wait on it */
    _Atomic uint32_t sleepers;                     /* helpers that may be asleep */
    _Alignas(CACHE_LINE) _Atomic uint32_t running; /* helpers that have not finished this run; the caller waits on it */
    _Atomic uint32_t caller_sleeps;
    _Alignas(CACHE_LINE) thread_pool_fn fn; /* NULL: end */
    void *arg;
    int n_threads, spin_ok;
    helper *helpers; /* [n_threads - 1] */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Looks at `word` for a while; true as soon as it is (want_equal) or is no longer (!want_equal) `value`. */
static int spin_until(_Atomic uint32_t *word, uint32_t value, int want_equal, int spin_ok)
{
    if (!spin_ok) {
        for (int i = 0; i <= YIELDS; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) == value) == want_equal)
                return 1;
            if (i < YIELDS)
                sched_yield();
        }
        return 0;
    }
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) { /* the clock is looked at now and then only */
            if ((atomic_load_explicit(word, memory_order_acquire) == value) == want_equal)
                return 1;
            relax();
        }
    } while (now_ns() < end);
    return 0;
}

/* Until epoch is no longer `seen`. */
static void wait_for_run(thread_pool *pool, uint32_t seen)
{
    if (spin_until(&pool->epoch, seen, 0, pool->spin_ok))
        return;
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->epoch) == seen)
        futex_wait(&pool->epoch, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void finish_share(thread_pool *pool)
{
    if (atomic_fetch_sub(&pool->running, 1) == 1 && atomic_load(&pool->caller_sleeps))
        futex_wake(&pool->running, 1);
}

static void *helper_main(void *arg)
{
    helper *me = arg;
    thread_pool *pool = me->pool;
    for (uint32_t seen = 0;; seen++) { /* the next run cannot begin before this one is counted down: no epoch is missed */
        wait_for_run(pool, seen);
        if (!pool->fn)
            return NULL;
        pool->fn(pool->arg, me->number, pool->n_threads);
        finish_share(pool);
    }
}

static void start_run(thread_pool *pool, thread_pool_fn fn, void *arg)
{
    pool->fn = fn;
    pool->arg = arg;
    atomic_store_explicit(&pool->running, (uint32_t)pool->n_threads - 1, memory_order_relaxed);
    atomic_fetch_add(&pool->epoch, 1); /* publishes the three above */
    if (atomic_load(&pool->sleepers))
        futex_wake(&pool->epoch, pool->n_threads);
}

static void wait_for_helpers(thread_pool *pool)
{
    if (spin_until(&pool->running, 0, 1, pool->spin_ok))
        return;
    atomic_store(&pool->caller_sleeps, 1);
    for (uint32_t left; (left = atomic_load(&pool->running)) != 0;)
        futex_wait(&pool->running, left);
    atomic_store(&pool->caller_sleeps, 0);
}

void thread_pool_run(thread_pool *pool, thread_pool_fn fn, void *arg)
{
    if (pool->n_threads == 1) {
        fn(arg, 0, 1);
        return;
    }
    start_run(pool, fn, arg);
    fn(arg, 0, pool->n_threads);
    wait_for_helpers(pool);
}

/* Starts helpers until one fails; n_threads then counts those that live. */
static status start_helpers(thread_pool *pool, int n_threads)
{
    for (pool->n_threads = 1; pool->n_threads < n_threads; pool->n_threads++) {
        helper *h = &pool->helpers[pool->n_threads - 1];
        *h = (helper){.pool = pool, .number = pool->n_threads};
        int error = pthread_create(&h->handle, NULL, helper_main, h);
        if (error)
            return status_fail(STATUS_NO_MEMORY, "thread pool: thread %d of %d did not start: %s", pool->n_threads + 1, n_threads,
                               strerror(error));
    }
    return STATUS_OK;
}

status thread_pool_create(int n_threads, int spin_ok, thread_pool **out)
{
    if (n_threads < 1)
        return status_fail(STATUS_USAGE, "thread pool: %d threads asked for, at least 1 is needed", n_threads);
    thread_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool);
    helper *helpers = calloc((size_t)n_threads, sizeof *helpers);
    if (!pool || !helpers) {
        free(pool), free(helpers);
        return status_fail(STATUS_NO_MEMORY, "thread pool: no memory for %d threads", n_threads);
    }
    memset(pool, 0, sizeof *pool);
    pool->spin_ok = spin_ok;
    pool->helpers = helpers;
    status st = start_helpers(pool, n_threads);
    if (st != STATUS_OK) {
        thread_pool_destroy(pool);
        return st;
    }
    *out = pool;
    return STATUS_OK;
}

void thread_pool_destroy(thread_pool *pool)
{
    if (!pool)
        return;
    if (pool->n_threads > 1)
        start_run(pool, NULL, NULL);
    for (int i = 0; i < pool->n_threads - 1; i++)
        pthread_join(pool->helpers[i].handle, NULL);
    free(pool->helpers);
    free(pool);
}

int thread_pool_size(const thread_pool *pool)
{
    return pool->n_threads;
}

void thread_pool_share(size_t n, size_t grain, int thread, int n_threads, size_t *first, size_t *last)
{
    if (grain == 0)
        grain = 1;
    size_t grains = n / grain, t = (size_t)thread, threads = (size_t)n_threads;
    size_t each = grains / threads, more = grains % threads; /* the first `more` threads take one grain more */
    size_t from = each * t + (t < more ? t : more);
    *first = from * grain;
    *last = thread == n_threads - 1 ? n : (from + each + (t < more)) * grain;
}
