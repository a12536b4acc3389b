#include "tests/support_bench.h"

#include "proto/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static volatile float sink;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(const double *values, int n)
{
    double sorted[256];
    n = n > 256 ? 256 : n;
    if (n == 0)
        return 0;
    memcpy(sorted, values, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    return n & 1 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

typedef struct {
    const char *data;
    size_t bytes, repeat;
} read_span;

enum { FMA_TURNS = 2000000, FMA_CHAINS = 12 };

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void read_loop(void *arg, int thread, int n_threads)
{
    const read_span *s = arg;
    size_t first, last;
    thread_pool_share(s->bytes, 256, thread, n_threads, &first, &last);
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t round = 0; round < s->repeat; round++)
        for (const char *p = s->data + first; p + 128 <= s->data + last; p += 128) {
            _mm_prefetch(p + 4096, _MM_HINT_T0);
            _mm_prefetch(p + 4160, _MM_HINT_T0);
            a = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)(const void *)p));
            b = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)(const void *)(p + 32)));
            c = _mm256_xor_si256(c, _mm256_loadu_si256((const __m256i *)(const void *)(p + 64)));
            d = _mm256_xor_si256(d, _mm256_loadu_si256((const __m256i *)(const void *)(p + 96)));
        }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    sink = (float)_mm256_extract_epi32(a, 0);
}

#define FMA_LOOP(vector, set, fma)                                                                                               \
    vector v[FMA_CHAINS], factor = set(0.5f), more = set(1.0f);                                                                  \
    for (int i = 0; i < FMA_CHAINS; i++)                                                                                         \
        v[i] = set((float)i);                                                                                                    \
    for (int turn = 0; turn < FMA_TURNS; turn++) {                                                                               \
        _Pragma("GCC unroll 12") for (int i = 0; i < FMA_CHAINS; i++) v[i] = fma(v[i], factor, more);                            \
    }                                                                                                                            \
    float out[sizeof v / (sizeof(float))], sum = 0;                                                                              \
    memcpy(out, v, sizeof out);                                                                                                  \
    for (size_t i = 0; i < sizeof v / (sizeof(float)); i++)                                                                      \
        sum += out[i];                                                                                                           \
    sink = sum

__attribute__((target("avx2,fma"))) static void fma_avx2(void *arg, int thread, int n_threads)
{
    (void)arg, (void)thread, (void)n_threads;
    FMA_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps);
}

__attribute__((target("avx512f"))) static void fma_avx512(void *arg, int thread, int n_threads)
{
    (void)arg, (void)thread, (void)n_threads;
    FMA_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps);
}

static int fma_lanes(int most)
{
    return __builtin_cpu_supports("avx512f") && (most == 0 || most >= 16) ? 16 : 8;
}

static thread_pool_fn fma_loop(int lanes)
{
    return lanes == 16 ? fma_avx512 : fma_avx2;
}
#else
static void read_loop(void *arg, int thread, int n_threads)
{
    const read_span *s = arg;
    size_t first, last;
    thread_pool_share(s->bytes, 256, thread, n_threads, &first, &last);
    unsigned long long sum = 0;
    for (size_t round = 0; round < s->repeat; round++)
        for (size_t i = first; i + 8 <= last; i += 8) {
            unsigned long long x;
            memcpy(&x, s->data + i, sizeof x);
            sum ^= x;
        }
    sink = (float)sum;
}

static int fma_lanes(int most)
{
    (void)most;
    return 1;
}

static void fma_scalar(void *arg, int thread, int n_threads)
{
    (void)arg, (void)thread, (void)n_threads;
    float v[FMA_CHAINS] = {0}, sum = 0;
    for (int turn = 0; turn < FMA_TURNS; turn++)
        for (int i = 0; i < FMA_CHAINS; i++)
            v[i] = v[i] * 0.5f + 1.0f;
    for (int i = 0; i < FMA_CHAINS; i++)
        sum += v[i];
    sink = sum;
}

static thread_pool_fn fma_loop(int lanes)
{
    (void)lanes;
    return fma_scalar;
}
#endif

double bench_read_rate(thread_pool *pool, const void *data, size_t bytes, size_t repeat)
{
    read_span span = {.data = data, .bytes = bytes, .repeat = repeat};
    double start = clock_seconds();
    thread_pool_run(pool, read_loop, &span);
    return (double)bytes * (double)repeat / (clock_seconds() - start);
}

double bench_fma_rate(thread_pool *pool, int most_lanes)
{
    int lanes = fma_lanes(most_lanes);
    double start = clock_seconds();
    thread_pool_run(pool, fma_loop(lanes), NULL);
    return 2.0 * lanes * FMA_CHAINS * FMA_TURNS * thread_pool_size(pool) / (clock_seconds() - start);
}

void *bench_big_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    memset(p, 1, bytes);
    return p;
}

void bench_free(void *memory, size_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

const char *bench_output(const char *command)
{
    static char text[1 << 20];
    FILE *pipe = popen(command, "r");
    if (!pipe)
        return NULL;
    size_t n = fread(text, 1, sizeof text - 1, pipe);
    text[n] = '\0';
    int rc = pclose(pipe);
    if (rc != 0)
        fprintf(stderr, "this command failed: %s\n", command);
    return rc == 0 ? text : NULL;
}
