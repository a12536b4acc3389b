/* The pool's promise: every thread once per run, nothing left behind, all writes visible, idle without CPU. */
#include "tests/support.h"
#include "worker/thread_pool.h"

#include <time.h>

enum { MOST_THREADS = 9 };

typedef struct {
    int calls[MOST_THREADS]; /* plain on purpose: TSan checks that a run orders them */
    int n_threads[MOST_THREADS];
} tally;

static void count_call(void *arg, int thread, int n_threads)
{
    tally *t = arg;
    t->calls[thread]++;
    t->n_threads[thread] = n_threads;
}

static void each_thread_once(void **state)
{
    (void)state;
    for (int spin_ok = 0; spin_ok <= 1; spin_ok++)
        for (int n = 1; n <= MOST_THREADS; n++) {
            thread_pool *pool = NULL;
            tally t = {0};
            assert_int_equal(thread_pool_create(n, spin_ok, &pool), STATUS_OK);
            assert_int_equal(thread_pool_size(pool), n);
            for (int run = 1; run <= 50; run++) {
                thread_pool_run(pool, count_call, &t);
                for (int i = 0; i < n; i++) {
                    assert_int_equal(t.calls[i], run);
                    assert_int_equal(t.n_threads[i], n);
                }
            }
            thread_pool_destroy(pool);
        }
}

/* A pause longer than the spin sends helpers to sleep; they must wake for the next run. */
static void sleepers_wake(void **state)
{
    (void)state;
    thread_pool *pool = NULL;
    tally t = {0};
    assert_int_equal(thread_pool_create(3, 1, &pool), STATUS_OK);
    for (int run = 1; run <= 40; run++) {
        struct timespec pause = {0, run % 4 * 40000};
        nanosleep(&pause, NULL);
        thread_pool_run(pool, count_call, &t);
        assert_int_equal(t.calls[0] + t.calls[1] + t.calls[2], 3 * run);
    }
    thread_pool_destroy(pool);
}

/* A helper that takes long sends the caller to sleep. */
static void slow_helper(void *arg, int thread, int n_threads)
{
    struct timespec pause = {0, 300000};
    if (thread == n_threads - 1)
        nanosleep(&pause, NULL);
    count_call(arg, thread, n_threads);
}

static void caller_waits_for_slow_helpers(void **state)
{
    (void)state;
    for (int spin_ok = 0; spin_ok <= 1; spin_ok++) {
        thread_pool *pool = NULL;
        tally t = {0};
        assert_int_equal(thread_pool_create(4, spin_ok, &pool), STATUS_OK);
        for (int run = 1; run <= 20; run++) {
            thread_pool_run(pool, slow_helper, &t);
            assert_int_equal(t.calls[3], run);
        }
        thread_pool_destroy(pool);
    }
}

typedef struct {
    size_t n, grain;
    unsigned char *taken;
} shares;

static void take_share(void *arg, int thread, int n_threads)
{
    shares *s = arg;
    size_t first, last;
    thread_pool_share(s->n, s->grain, thread, n_threads, &first, &last);
    for (size_t i = first; i < last; i++)
        s->taken[i]++;
}

static void shares_cover_everything_once(void **state)
{
    (void)state;
    uint64_t seed = 1;
    thread_pool *pool = NULL;
    assert_int_equal(thread_pool_create(4, 0, &pool), STATUS_OK);
    for (int round = 0; round < 200; round++) {
        unsigned char taken[512] = {0};
        shares s = {(size_t)support_below(&seed, 512), (size_t)support_below(&seed, 20), taken};
        thread_pool_run(pool, take_share, &s);
        for (size_t i = 0; i < sizeof taken; i++)
            assert_int_equal(taken[i], i < s.n);
    }
    thread_pool_destroy(pool);
}

static void shares_are_whole_grains(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 7; threads++)
        for (size_t n = 0; n < 100; n++) {
            size_t end = 0, least = n, most = 0;
            for (int t = 0; t < threads; t++) {
                size_t first, last;
                thread_pool_share(n, 8, t, threads, &first, &last);
                assert_true(first == end && last >= first && first % 8 == 0);
                assert_true(t == threads - 1 || last % 8 == 0);
                size_t grains = (last - first) / 8;
                least = grains < least ? grains : least, most = grains > most ? grains : most;
                end = last;
            }
            assert_true(end == n && (most <= least + 1));
        }
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void idle_uses_no_cpu(void **state)
{
    (void)state;
    thread_pool *pool = NULL;
    tally t = {0};
    struct timespec pause = {0, 200000000};
    assert_int_equal(thread_pool_create(4, 1, &pool), STATUS_OK);
    thread_pool_run(pool, count_call, &t);
    double before = cpu_seconds();
    nanosleep(&pause, NULL);
    assert_true(cpu_seconds() - before < 0.05);
    thread_pool_destroy(pool);
}

static void no_threads_is_refused(void **state)
{
    (void)state;
    thread_pool *pool = NULL;
    assert_int_equal(thread_pool_create(0, 1, &pool), STATUS_USAGE);
    assert_null(pool);
    thread_pool_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"every thread is called once per run, and its writes are seen", each_thread_once, NULL, NULL, NULL},
        {"sleeping helpers wake for the next run", sleepers_wake, NULL, NULL, NULL},
        {"the caller waits for slow helpers", caller_waits_for_slow_helpers, NULL, NULL, NULL},
        {"shares cover everything once", shares_cover_everything_once, NULL, NULL, NULL},
        {"shares are whole grains and nearly equal", shares_are_whole_grains, NULL, NULL, NULL},
        {"an idle pool uses no CPU", idle_uses_no_cpu, NULL, NULL, NULL},
        {"a pool of no threads is refused", no_threads_is_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
