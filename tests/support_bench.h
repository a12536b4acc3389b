/* support_bench.h - what benchmarks share: the machine's ceilings, medians, a clock, other programs' answers. */
#ifndef CONVOKE_TESTS_SUPPORT_BENCH_H
#define CONVOKE_TESTS_SUPPORT_BENCH_H

#include "worker/thread_pool.h"

#include <stddef.h>

double bench_median(const double *values, int n); /* n up to 256 */

/* Bytes per second of a plain read loop, `repeat` times over `bytes` at `data`, on all threads of the pool. */
double bench_read_rate(thread_pool *pool, const void *data, size_t bytes, size_t repeat);
/* Single-precision operations per second of fused multiply-adds on registers, on all threads; in registers of at most `lanes`
 * floats (0: the widest this CPU has). */
double bench_fma_rate(thread_pool *pool, int lanes);
/* Memory that no cache holds, touched; NULL when there is none. Free with bench_free(). */
void *bench_big_memory(size_t bytes);
void bench_free(void *memory, size_t bytes);

/* Runs a shell command and returns what it printed (static buffer, 1 MiB); NULL when it failed, after saying so on stderr. */
const char *bench_output(const char *command);

#endif
