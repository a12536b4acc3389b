/* thread_pool.h - the threads of one rank: fork and join around one function, static split, parked when idle.
 *
 * The caller is thread 0; n_threads - 1 helpers wait. Between two runs a helper spins for a few microseconds (not at all when
 * there are fewer cores than threads on the node) and then sleeps on a futex, so an idle pool uses no CPU.
 * One caller at a time. Nothing is allocated by a run. */
#ifndef CONVOKE_WORKER_THREAD_POOL_H
#define CONVOKE_WORKER_THREAD_POOL_H

#include "proto/status.h"

#include <stddef.h>

typedef struct thread_pool thread_pool;
typedef void (*thread_pool_fn)(void *arg, int thread, int n_threads);

/* `spin_ok` false: ranks share cores, so a waiting thread gives its core away at once. */
status thread_pool_create(int n_threads, int spin_ok, thread_pool **out);
void thread_pool_destroy(thread_pool *pool); /* NULL is fine */
int thread_pool_size(const thread_pool *pool);

/* Calls fn(arg, t, n_threads) once on every thread t and returns when all have; writes made inside are visible after. */
void thread_pool_run(thread_pool *pool, thread_pool_fn fn, void *arg);

/* The part of n items, in multiples of `grain` (the last part takes the rest), that thread t of T takes: [*first, *last). */
void thread_pool_share(size_t n, size_t grain, int thread, int n_threads, size_t *first, size_t *last);

#endif
