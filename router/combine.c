/* combine.c - the arithmetic of combine.h, once for any x86-64 (or any other CPU) and once for AVX2.
 *
 * Bits do not depend on the path taken: every product is rounded to fp32 before anything is added to it (no contraction), a
 * float becomes an integer by round-to-nearest-even (cvtps2dq; lrintf elsewhere), and elements never mix with their
 * neighbours, so the width of a vector is invisible.
 *
 * Fixed point, one element: v = weight * y, scaled = v * 2^s. Scaling by a power of two is exact unless it leaves the floats'
 * range, and where it does the answer is the right one all the same: overflow gives infinity, which does not fit, and underflow
 * something far below 1/2, which rounds to 0. |scaled| < 2^(31 - c), c = ceil(log2 k), is the whole test: NaN fails it, and k
 * such integers cannot leave int32. (For c > 7 the float below the limit has a fraction and may round up to it: hence k <= 128.)
 */
#include "router/combine.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2")))
#endif

/* ---- exponents ---- */

static int ceil_log2(int k)
{
    assert(k >= 1 && k <= COMBINE_MAX_K);
    return k == 1 ? 0 : 32 - __builtin_clz((unsigned)k - 1);
}

static float power_of_two(int exponent) /* in [-126, 127] */
{
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int combine_exponent(const float *h, int n, int top_k)
{
    int32_t largest = 0; /* bits of |h| order like |h|, with infinity and NaN on top */
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &h[i], sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7f800000)
        return 0;
    if (largest == 0)
        return 100;
    float m;
    memcpy(&m, &largest, sizeof m);
    int e;
    if (frexpf(m, &e) == 0.5f) /* m is 2^(e - 1) itself */
        e--;
    int s = 31 - FIXED_HEADROOM - ceil_log2(top_k) - e;
    return s < -100 ? -100 : s > 100 ? 100 : s;
}

/* ---- spills ---- */

void spill_list_clear(spill_list *list)
{
    free(list->items);
    *list = (spill_list){0};
}

static status spill_push(spill_list *list, combine_spill spill)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        combine_spill *items = reallocarray(list->items, capacity, sizeof *items);
        if (!items)
            return status_fail(STATUS_NO_MEMORY, "combine: no memory for %zu elements out of range", capacity);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = spill;
    return STATUS_OK;
}

static bool spill_less(const combine_spill *a, const combine_spill *b)
{
    if (a->row != b->row)
        return a->row < b->row;
    if (a->expert != b->expert)
        return a->expert < b->expert;
    return a->column < b->column;
}

static void sift_down(combine_spill *heap, size_t root, size_t n)
{
    combine_spill moving = heap[root];
    for (size_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && spill_less(&heap[child], &heap[child + 1]))
            child++;
        if (!spill_less(&moving, &heap[child]))
            break;
        heap[root] = heap[child];
    }
    heap[root] = moving;
}

/* Heap sort: qsort() may allocate, and this runs inside a step. Keys are unique, so stability does not matter. */
void combine_sort_spills(combine_spill *spills, size_t n)
{
    bool sorted = true;
    for (size_t i = 1; i < n && sorted; i++)
        sorted = !spill_less(&spills[i], &spills[i - 1]);
    if (sorted)
        return;
    for (size_t root = n / 2; root-- > 0;)
        sift_down(spills, root, n);
    for (size_t last = n - 1; last > 0; last--) {
        combine_spill top = spills[0];
        spills[0] = spills[last];
        spills[last] = top;
        sift_down(spills, 0, last);
    }
}

void combine_add_spills(const combine_spill *spills, size_t n, float *out)
{
    for (size_t i = 0; i < n; i++)
        out[spills[i].column] += spills[i].value;
}

/* ---- one contribution into a partial row ---- */

typedef struct {
    float weight, scale, limit;
    combine_spill spill; /* filled but for column and value */
    spill_list *spills;
} fixed_args;

/* The definition of an element; the vector paths call it for what does not fit and for the last few columns. */
static status add_fixed_scalar(const float *y, const fixed_args *args, int first, int last, int32_t *acc)
{
    for (int i = first; i < last; i++) {
        float v = args->weight * y[i];
        float scaled = v * args->scale;
        if (fabsf(scaled) < args->limit) {
            acc[i] = (int32_t)((uint32_t)acc[i] + (uint32_t)(int32_t)lrintf(scaled));
            continue;
        }
        combine_spill spill = args->spill;
        spill.column = (uint32_t)i;
        spill.value = v;
        TRY(spill_push(args->spills, spill));
    }
    return STATUS_OK;
}

#define FIXED_BLOCK 16 /* columns tested together: one branch for all of them */

#if defined(__x86_64__)
static status add_fixed_base(const float *y, const fixed_args *args, int first, int last, int32_t *acc)
{
    const __m128 weight = _mm_set1_ps(args->weight), scale = _mm_set1_ps(args->scale), limit = _mm_set1_ps(args->limit);
    const __m128 magnitude = _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff));
    int i = first;
    for (; i + FIXED_BLOCK <= last; i += FIXED_BLOCK) {
        __m128 scaled[4], fits = _mm_castsi128_ps(_mm_set1_epi32(-1));
        for (int j = 0; j < 4; j++) {
            scaled[j] = _mm_mul_ps(_mm_mul_ps(weight, _mm_loadu_ps(y + i + 4 * j)), scale);
            fits = _mm_and_ps(fits, _mm_cmplt_ps(_mm_and_ps(scaled[j], magnitude), limit));
        }
        if (_mm_movemask_ps(fits) != 15) {
            TRY(add_fixed_scalar(y, args, i, i + FIXED_BLOCK, acc));
            continue;
        }
        for (int j = 0; j < 4; j++) {
            __m128i *to = (__m128i *)(void *)(acc + i + 4 * j);
            _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), _mm_cvtps_epi32(scaled[j])));
        }
    }
    return add_fixed_scalar(y, args, i, last, acc);
}

WITH_AVX2 static status add_fixed_avx2(const float *y, const fixed_args *args, int first, int last, int32_t *acc)
{
    const __m256 weight = _mm256_set1_ps(args->weight), scale = _mm256_set1_ps(args->scale);
    const __m256 limit = _mm256_set1_ps(args->limit), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    int i = first;
    for (; i + FIXED_BLOCK <= last; i += FIXED_BLOCK) {
        __m256 a = _mm256_mul_ps(_mm256_mul_ps(weight, _mm256_loadu_ps(y + i)), scale);
        __m256 b = _mm256_mul_ps(_mm256_mul_ps(weight, _mm256_loadu_ps(y + i + 8)), scale);
        __m256 fits = _mm256_and_ps(_mm256_cmp_ps(_mm256_and_ps(a, magnitude), limit, _CMP_LT_OQ),
                                    _mm256_cmp_ps(_mm256_and_ps(b, magnitude), limit, _CMP_LT_OQ));
        if (_mm256_movemask_ps(fits) != 255) {
            TRY(add_fixed_scalar(y, args, i, i + FIXED_BLOCK, acc));
            continue;
        }
        __m256i *to = (__m256i *)(void *)(acc + i), *next = (__m256i *)(void *)(acc + i + 8);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtps_epi32(a)));
        _mm256_storeu_si256(next, _mm256_add_epi32(_mm256_loadu_si256(next), _mm256_cvtps_epi32(b)));
    }
    return add_fixed_scalar(y, args, i, last, acc);
}
#else
#define add_fixed_base add_fixed_scalar
#endif

/* ---- loops that a compiler vectorises: one body, compiled for the base machine and for AVX2 ---- */

#define BODY static inline __attribute__((always_inline))

BODY void store_exact_body(const float *restrict y, float weight, int first, int last, float *restrict acc)
{
    for (int i = first; i < last; i++)
        acc[i] = weight * y[i];
}

BODY void add_fast_body(const float *restrict y, float weight, int first, int last, float *restrict acc)
{
    for (int i = first; i < last; i++)
        acc[i] += weight * y[i];
}

BODY void merge_fixed_body(const int32_t *restrict part, size_t n, int32_t *restrict acc)
{
    for (size_t i = 0; i < n; i++)
        acc[i] = (int32_t)((uint32_t)acc[i] + (uint32_t)part[i]);
}

BODY void merge_fast_body(const float *restrict part, size_t n, float *restrict acc)
{
    for (size_t i = 0; i < n; i++)
        acc[i] += part[i];
}

/* The sums run over parts inside and columns outside, so that `out` is written once however many parts there are; 16 columns
 * at a time stay in registers. */
typedef float floats8 __attribute__((vector_size(32)));
typedef uint32_t words8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));

BODY void sum_floats_body(const float *const *parts, int n_parts, int n, float *out)
{
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        floats8 a = {0}, b = {0};
        for (int p = 0; p < n_parts; p++) {
            floats8 x, y;
            memcpy(&x, parts[p] + i, sizeof x);
            memcpy(&y, parts[p] + i + 8, sizeof y);
            a += x;
            b += y;
        }
        memcpy(out + i, &a, sizeof a);
        memcpy(out + i + 8, &b, sizeof b);
    }
    for (; i < n; i++) {
        float sum = 0;
        for (int p = 0; p < n_parts; p++)
            sum += parts[p][i];
        out[i] = sum;
    }
}

BODY void sum_fixed_body(const int32_t *const *parts, int n_parts, float step, int n, float *out)
{
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        words8 a = {0}, b = {0};
        for (int p = 0; p < n_parts; p++) {
            words8 x, y;
            memcpy(&x, parts[p] + i, sizeof x);
            memcpy(&y, parts[p] + i + 8, sizeof y);
            a += x;
            b += y;
        }
        floats8 low = __builtin_convertvector((ints8)a, floats8) * step;
        floats8 high = __builtin_convertvector((ints8)b, floats8) * step;
        memcpy(out + i, &low, sizeof low);
        memcpy(out + i + 8, &high, sizeof high);
    }
    for (; i < n; i++) {
        uint32_t sum = 0;
        for (int p = 0; p < n_parts; p++)
            sum += (uint32_t)parts[p][i];
        out[i] = (float)(int32_t)sum * step;
    }
}

/* ---- the table ---- */

typedef struct {
    const char *name;
    status (*add_fixed)(const float *y, const fixed_args *args, int first, int last, int32_t *acc);
    void (*store_exact)(const float *y, float weight, int first, int last, float *acc);
    void (*add_fast)(const float *y, float weight, int first, int last, float *acc);
    void (*merge_fixed)(const int32_t *part, size_t n, int32_t *acc);
    void (*merge_fast)(const float *part, size_t n, float *acc);
    void (*sum_fixed)(const int32_t *const *parts, int n_parts, float step, int n, float *out);
    void (*sum_floats)(const float *const *parts, int n_parts, int n, float *out);
} combine_path;

#define INSTANCES(suffix, target)                                                                                                \
    target static void store_exact_##suffix(const float *y, float weight, int first, int last, float *acc)                       \
    {                                                                                                                            \
        store_exact_body(y, weight, first, last, acc);                                                                           \
    }                                                                                                                            \
    target static void add_fast_##suffix(const float *y, float weight, int first, int last, float *acc)                          \
    {                                                                                                                            \
        add_fast_body(y, weight, first, last, acc);                                                                              \
    }                                                                                                                            \
    target static void merge_fixed_##suffix(const int32_t *part, size_t n, int32_t *acc)                                         \
    {                                                                                                                            \
        merge_fixed_body(part, n, acc);                                                                                          \
    }                                                                                                                            \
    target static void merge_fast_##suffix(const float *part, size_t n, float *acc)                                              \
    {                                                                                                                            \
        merge_fast_body(part, n, acc);                                                                                           \
    }                                                                                                                            \
    target static void sum_fixed_##suffix(const int32_t *const *parts, int n_parts, float step, int n, float *out)               \
    {                                                                                                                            \
        sum_fixed_body(parts, n_parts, step, n, out);                                                                            \
    }                                                                                                                            \
    target static void sum_floats_##suffix(const float *const *parts, int n_parts, int n, float *out)                            \
    {                                                                                                                            \
        sum_floats_body(parts, n_parts, n, out);                                                                                 \
    }                                                                                                                            \
    static const combine_path path_##suffix = {#suffix,                                                                          \
                                               add_fixed_##suffix,                                                               \
                                               store_exact_##suffix,                                                             \
                                               add_fast_##suffix,                                                                \
                                               merge_fixed_##suffix,                                                             \
                                               merge_fast_##suffix,                                                              \
                                               sum_fixed_##suffix,                                                               \
                                               sum_floats_##suffix}

INSTANCES(base, );
static const combine_path *path = &path_base;

#if defined(__x86_64__)
INSTANCES(avx2, WITH_AVX2);

__attribute__((constructor)) static void pick_path(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        path = &path_avx2;
}
#endif

const char *combine_force_base(bool base)
{
#if defined(__x86_64__)
    pick_path();
#endif
    if (base)
        path = &path_base;
    return path->name;
}

void combine_store_exact(const float *y, float weight, int first, int last, float *acc)
{
    path->store_exact(y, weight, first, last, acc);
}

void combine_add_fast(const float *y, float weight, int first, int last, float *acc)
{
    path->add_fast(y, weight, first, last, acc);
}

status combine_add_fixed(const float *y, float weight, int exponent, int top_k, uint32_t row, uint16_t expert, int first,
                         int last, int32_t *acc, spill_list *spills)
{
    assert(exponent >= -100 && exponent <= 100);
    const fixed_args args = {.weight = weight,
                             .scale = power_of_two(exponent),
                             .limit = power_of_two(31 - ceil_log2(top_k)),
                             .spill = {.row = row, .expert = expert},
                             .spills = spills};
    return path->add_fixed(y, &args, first, last, acc);
}

void combine_sum_fixed(const int32_t *const *parts, int n_parts, int exponent, int n, float *out)
{
    path->sum_fixed(parts, n_parts, power_of_two(-exponent), n, out);
}

void combine_sum_floats(const float *const *parts, int n_parts, int n, float *out)
{
    path->sum_floats(parts, n_parts, n, out);
}

void combine_merge_fixed(const int32_t *part, size_t n, int32_t *acc)
{
    path->merge_fixed(part, n, acc);
}

void combine_merge_fast(const float *part, size_t n, float *acc)
{
    path->merge_fast(part, n, acc);
}
