/* kernels_avx2.c - AVX2 + FMA + F16C: 16 lanes are two registers, "first" and "second".
 *
 * The order of kernels.h says which products meet in a lane, not which register a lane lives in. For bf16 that is worth a lot: a
 * 32-byte load holds 16 weights, and as eight 32-bit words the odd ones are floats already but for the even ones below them:
 *     load:    w1 w0 | w3 w2 | w5 w4 | ...          (each word: odd weight above even weight)
 *     first  = word << 16           lanes 0 2 4 ... 14
 *     second = word & 0xffff0000    lanes 1 3 5 ... 15
 * one operation per eight weights where widening in natural order takes two. x is packed to match. fp16 and fp32 keep the natural
 * order: first = lanes 0-7, second = lanes 8-15. The reduction tree is followed in both cases (pair_sums).
 *
 * Lanes of `first` and `second` never meet before the reduction, so a tile passes over K twice, once for each: 6 rows x 2 outputs
 * then take 12 accumulators and 8 loads for 12 FMA (half_tile). Doing both halves at once is a 3 x 2 tile that loads for every
 * FMA. A call of up to five rows is bound by memory: one weight row at a time, both halves in one pass (both_tile).
 *
 * What was tried: variants in turn on one thread of a Zen 3 whose two CPUs were busy with other work, CPU time, bf16, N 768.
 * The load cost the kernels more than the register-only FMA loop, so both the median of the runs and the best sample are given;
 * neither stands for bench_kernels on an idle machine.
 *                                                        this way                another way
 *   1 row, of the read loop's speed (3 runs)             99-101 %                2 weight rows at once 76-85 %, 4: 75-77 %
 *   4, 5 rows, of the read loop's speed (3 runs)         69-71, 58-68 %          half_tile 57-66, 52-61 %; at 6 rows no
 * difference 8 rows, K 1,024, of the FMA loop's (6 runs)          38 %, best 62           without prefetching the next block 31
 * %, best 42 64 rows, K 1,024                                     57 %, best 82           without IN_REGISTER 57 %, best 68 64
 * rows, K 4,096                                     54 %, best 74           K in one piece 50 %, best 59 K in pieces made no
 * difference at 2,048, nor did prefetching 1, 2, 4, 8 or 16 KiB ahead of one to five rows. */
#include "worker/kernels.h"

#if defined(__AVX2__)
#include "worker/kernels_tables.h"

#include <immintrin.h>
#include <math.h>

typedef struct {
    __m256 lo, hi;
} vec16;
#define VEC16_REGISTERS 2

#define V_INLINE static inline __attribute__((always_inline))

V_INLINE vec16 v_set(float f)
{
    return (vec16){_mm256_set1_ps(f), _mm256_set1_ps(f)};
}

V_INLINE vec16 v_load(const float *p)
{
    return (vec16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

V_INLINE void v_store(float *p, vec16 v)
{
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}

/* All ones in lanes j < n. */
V_INLINE __m256i first_lanes(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

V_INLINE vec16 v_load_first(const float *p, int n)
{
    return (vec16){_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
}

V_INLINE void v_store_first(float *p, vec16 v, int n)
{
    _mm256_maskstore_ps(p, first_lanes(n), v.lo);
    _mm256_maskstore_ps(p + 8, first_lanes(n - 8), v.hi);
}

V_INLINE vec16 v_add(vec16 a, vec16 b)
{
    return (vec16){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}

V_INLINE vec16 v_sub(vec16 a, vec16 b)
{
    return (vec16){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}

V_INLINE vec16 v_mul(vec16 a, vec16 b)
{
    return (vec16){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}

V_INLINE vec16 v_div(vec16 a, vec16 b)
{
    return (vec16){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}

V_INLINE vec16 v_fma(vec16 a, vec16 b, vec16 c)
{
    return (vec16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

V_INLINE vec16 v_max(vec16 a, vec16 b)
{
    return (vec16){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

V_INLINE vec16 v_min(vec16 a, vec16 b)
{
    return (vec16){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}

V_INLINE __m256 keep8(__m256 v, int begin, int end)
{
    __m256i kept = _mm256_andnot_si256(first_lanes(begin), first_lanes(end));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), v, _mm256_castsi256_ps(kept));
}

V_INLINE vec16 v_keep(vec16 v, int begin, int end)
{
    return (vec16){keep8(v.lo, begin, end), keep8(v.hi, begin - 8, end - 8)};
}

V_INLINE __m256 times_power8(__m256 p, __m256 t)
{
    __m256i biased = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32((int)EXP_BIAS));
    __m256i half = _mm256_srli_epi32(biased, 1), one = _mm256_set1_epi32(1);
    __m256i low = _mm256_slli_epi32(_mm256_sub_epi32(half, one), 23);
    __m256i high = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_sub_epi32(biased, half), one), 23);
    return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}

V_INLINE vec16 v_times_power(vec16 p, vec16 t)
{
    return (vec16){times_power8(p.lo, t.lo), times_power8(p.hi, t.hi)};
}

V_INLINE __m128 low4(__m256 v)
{
    return _mm256_castps256_ps128(v);
}

V_INLINE __m128 high4(__m256 v)
{
    return _mm256_extractf128_ps(v, 1);
}

V_INLINE float v_add_lanes(vec16 v)
{
    __m256 s = _mm256_add_ps(v.lo, v.hi);
    __m128 pairs = _mm_hadd_ps(low4(s), high4(s));
    pairs = _mm_hadd_ps(pairs, pairs);
    return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

V_INLINE float v_max_lane(vec16 v)
{
    __m256 m = _mm256_max_ps(v.lo, v.hi);
    __m128 four = _mm_max_ps(low4(m), high4(m));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#include "worker/kernels_lanes.h"

/* ---- products ---- */

#define TILE_ROWS     6
#define TILE_OUTPUTS  4
#define STREAMED_ROWS 5
#define STEP          16
#include "worker/kernels_tiles.h"

/* Without it the compiler loads a value anew for each FMA that uses it, and loads become the limit. */
#define IN_REGISTER(v) __asm__("" : "+x"(v))

/* Weights of one half of a step as floats. */
ALWAYS_INLINE __m256 load_weights(const weight_format format, const int half, const char *w)
{
    if (format == FORMAT_F32)
        return _mm256_loadu_ps((const float *)(const void *)(w + 32 * half));
    if (format == FORMAT_F16)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(w + 16 * half)));
    __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)w);
    return _mm256_castsi256_ps(half ? _mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(words, 16));
}

/* One row's step in two registers, as load_weights orders it. */
ALWAYS_INLINE void split_step(weight_format format, const float *x, __m256 *first, __m256 *second)
{
    __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
    if (format != FORMAT_BF16) {
        *first = low, *second = high;
        return;
    }
    __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88)),
            odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
    *first = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    *second = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}

/* packed[half][step][row][8] */
ALWAYS_INLINE void pack(weight_format format, const float *x, size_t x_stride, int rows, int k, float *packed)
{
    int steps = (k + STEP - 1) / STEP;
    size_t plane = (size_t)steps * (size_t)rows * 8;
    for (int i = 0; i < rows; i++) {
        const float *row = x + (size_t)i * x_stride;
        for (int s = 0; s < steps; s++) {
            float last[STEP] = {0};
            const float *from = row + s * STEP;
            if (k - s * STEP < STEP)
                from = memcpy(last, from, (size_t)(k - s * STEP) * sizeof *last);
            __m256 first, second;
            split_step(format, from, &first, &second);
            float *to = packed + ((size_t)s * (size_t)rows + (size_t)i) * 8;
            _mm256_storeu_ps(to, first);
            _mm256_storeu_ps(to + plane, second);
        }
    }
}

static void pack_natural(const float *x, size_t x_stride, int rows, int k, float *packed)
{
    pack(FORMAT_F32, x, x_stride, rows, k, packed);
}

static void pack_bf16(const float *x, size_t x_stride, int rows, int k, float *packed)
{
    pack(FORMAT_BF16, x, x_stride, rows, k, packed);
}

/* (s0 + s1, s2 + s3, s4 + s5, s6 + s7) of the reduction tree. */
ALWAYS_INLINE __m128 pair_sums(weight_format format, __m256 first, __m256 second)
{
    if (format == FORMAT_BF16) /* (s0, s2, s4, s6) + (s1, s3, s5, s7) */
        return _mm_add_ps(_mm_add_ps(low4(first), high4(first)), _mm_add_ps(low4(second), high4(second)));
    __m256 s = _mm256_add_ps(first, second);
    return _mm_hadd_ps(low4(s), high4(s));
}

ALWAYS_INLINE void half_steps(const weight_format format, const int half, const int rows, const int outputs, const float *x,
                              const char *w, size_t w_stride, size_t ahead, size_t ahead_step, int steps, __m256 *acc)
{
    const size_t step_bytes = STEP * WEIGHT_BYTES(format);
    for (int s = 0; s < steps; s++, x += 8 * rows, w += step_bytes, ahead += ahead_step - step_bytes) {
        __m256 ws[2];
        UNROLL for (int j = 0; j < outputs; j++) ws[j] = load_weights(format, half, w + (size_t)j * w_stride);
        prefetch(w, ahead);
        UNROLL for (int i = 0; i < rows; i++)
        {
            __m256 xs = _mm256_load_ps(x + 8 * i);
            IN_REGISTER(xs);
            UNROLL for (int j = 0; j < outputs; j++) acc[i * outputs + j] = _mm256_fmadd_ps(ws[j], xs, acc[i * outputs + j]);
        }
    }
}

/* One half of the lanes over steps [from, to) of K for `outputs` weight rows; sums[j][i] carries them from piece to piece of K.
 */
ALWAYS_INLINE void half_piece(const weight_format format, const int half, const int rows, const int outputs, const float *x,
                              const char *w, int k, int from, int to, const next_block *next, __m256 *sums)
{
    const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format), step_bytes = STEP * WEIGHT_BYTES(format);
    /* this pass's part of the lines of the same rows in the next block, evenly over the steps */
    const size_t parts = 2 * (size_t)next->parts, part = 2 * (size_t)next->part + (size_t)half;
    const size_t ahead_step = ((size_t)outputs * step_bytes + parts - 1) / parts;
    size_t ahead =
        next->ahead + (size_t)outputs * row_bytes / parts * part + (size_t)from * ahead_step - (size_t)from * step_bytes;
    __m256 acc[TILE_ROWS * 2];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < outputs; j++) acc[i * outputs + j] =
        from ? sums[j * rows + i] : _mm256_setzero_ps();
    x += (size_t)from * 8 * (size_t)rows;
    int full = to > k / STEP ? k / STEP : to;
    half_steps(format, half, rows, outputs, x, w + (size_t)from * step_bytes, row_bytes, ahead, ahead_step, full - from, acc);
    if (full < to) {
        weight_tail tail;
        copy_tail(outputs, &tail, w, row_bytes, (size_t)full * step_bytes);
        half_steps(format, half, rows, outputs, x + (size_t)(full - from) * 8 * (size_t)rows, tail.w[0], sizeof tail.w[0], 0, 0,
                   1, acc);
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < outputs; j++) sums[j * rows + i] = acc[i * outputs + j];
}

/* y[i][j] of all rows and weight rows from both halves' sums. */
ALWAYS_INLINE void write_tile(const weight_format format, const int rows, int n, const __m256 *first, const __m256 *second,
                              float *y, size_t y_stride)
{
    for (int i = 0; i < rows; i++, y += y_stride) {
        int j = 0;
        for (; j + 4 <= n; j += 4) {
            __m128 pairs[4];
            UNROLL for (int p = 0; p < 4; p++) pairs[p] =
                pair_sums(format, first[(j + p) * rows + i], second[(j + p) * rows + i]);
            _mm_storeu_ps(y + j, _mm_hadd_ps(_mm_hadd_ps(pairs[0], pairs[1]), _mm_hadd_ps(pairs[2], pairs[3])));
        }
        for (; j < n; j++) {
            __m128 pairs = pair_sums(format, first[j * rows + i], second[j * rows + i]);
            pairs = _mm_hadd_ps(pairs, pairs);
            y[j] = _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
        }
    }
}

#define K_PIECE 64 /* steps: of 6 rows one half of 1,024 floats is 12 KiB, a third of L1 */

ALWAYS_INLINE void half_tile(const weight_format format, const int rows, const float *x, const char *w, int k, int n, float *y,
                             size_t y_stride, const next_block *next)
{
    const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format);
    const int steps = (k + STEP - 1) / STEP;
    __m256 sums[2][W_BLOCK_ROWS * TILE_ROWS];
    UNROLL for (int half = 0; half < 2; half++)
    {
        const float *plane = x + (size_t)half * (size_t)steps * (size_t)rows * 8;
        int from = 0;
        do { /* once for a K of 0, too: the sums are zeros */
            int to = steps - from < K_PIECE ? steps : from + K_PIECE, j = 0;
            for (; j + 2 <= n; j += 2)
                half_piece(format, half, rows, 2, plane, w + (size_t)j * row_bytes, k, from, to, next, &sums[half][j * rows]);
            if (j < n)
                half_piece(format, half, rows, 1, plane, w + (size_t)j * row_bytes, k, from, to, next, &sums[half][j * rows]);
            from = to;
        } while (from < steps);
    }
    write_tile(format, rows, n, sums[0], sums[1], y, y_stride);
}

ALWAYS_INLINE void both_steps(const weight_format format, const int rows, const int outputs, const float *x, size_t plane,
                              const char *w, size_t w_stride, size_t ahead, int steps, __m256 *first, __m256 *second)
{
    const size_t step_bytes = STEP * WEIGHT_BYTES(format);
    for (int s = 0; s < steps; s++, x += 8 * rows, w += step_bytes) {
        UNROLL for (int j = 0; j < outputs; j++)
        {
            prefetch(w + (size_t)j * w_stride, ahead);
            __m256 w0 = load_weights(format, 0, w + (size_t)j * w_stride), w1 = load_weights(format, 1, w + (size_t)j * w_stride);
            UNROLL for (int i = 0; i < rows; i++)
            {
                first[i * outputs + j] = _mm256_fmadd_ps(w0, _mm256_load_ps(x + 8 * i), first[i * outputs + j]);
                second[i * outputs + j] = _mm256_fmadd_ps(w1, _mm256_load_ps(x + plane + 8 * i), second[i * outputs + j]);
            }
        }
    }
}

ALWAYS_INLINE void both_tile(const weight_format format, const int rows, const int outputs, const float *x, const char *w, int k,
                             float *y, size_t y_stride)
{
    const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format), step_bytes = STEP * WEIGHT_BYTES(format);
    int full = k / STEP, rest = k % STEP != 0;
    size_t plane = (size_t)(full + rest) * (size_t)rows * 8;
    __m256 first[TILE_ROWS * 2], second[TILE_ROWS * 2];
    UNROLL for (int i = 0; i < rows * outputs; i++) first[i] = second[i] = _mm256_setzero_ps();
    both_steps(format, rows, outputs, x, plane, w, row_bytes, PREFETCH_BYTES, full, first, second);
    if (rest) {
        weight_tail tail;
        copy_tail(outputs, &tail, w, row_bytes, (size_t)full * step_bytes);
        both_steps(format, rows, outputs, x + (size_t)full * 8 * (size_t)rows, plane, tail.w[0], sizeof tail.w[0], 0, 1, first,
                   second);
    }
    __m128 pairs[TILE_ROWS * 2];
    UNROLL for (int i = 0; i < rows * outputs; i++) pairs[i] = pair_sums(format, first[i], second[i]);
    write_sums(rows, outputs, pairs, y, y_stride);
}

#define HALF_TILE(name, format, rows)                                                                                            \
    static void name(const float *packed, const char *w, int k, int n, float *y, size_t y_stride, const next_block *next)        \
    {                                                                                                                            \
        half_tile(format, rows, packed, w, k, n, y, y_stride, next);                                                             \
    }
#define TILES(format, suffix)                                                                                                    \
    TILE(both_##suffix##_1, both_tile, both_tile, format, 1, 1)                                                                  \
    TILE(both_##suffix##_2, both_tile, both_tile, format, 2, 1)                                                                  \
    TILE(both_##suffix##_3, both_tile, both_tile, format, 3, 1)                                                                  \
    TILE(both_##suffix##_4, both_tile, both_tile, format, 4, 1)                                                                  \
    TILE(both_##suffix##_5, both_tile, both_tile, format, 5, 1)                                                                  \
    HALF_TILE(half_##suffix##_3, format, 3)                                                                                      \
    HALF_TILE(half_##suffix##_4, format, 4)                                                                                      \
    HALF_TILE(half_##suffix##_5, format, 5)                                                                                      \
    HALF_TILE(half_##suffix##_6, format, 6)                                                                                      \
    static const tile_set tiles_##suffix = {                                                                                     \
        format,                                                                                                                  \
        format == FORMAT_BF16 ? pack_bf16 : pack_natural,                                                                        \
        {NULL, both_##suffix##_1, both_##suffix##_2, both_##suffix##_3, both_##suffix##_4, both_##suffix##_5,                    \
         half_##suffix##_6},                                                                                                     \
        {NULL, NULL, NULL, half_##suffix##_3, half_##suffix##_4, half_##suffix##_5, half_##suffix##_6}};

TILES(FORMAT_F32, f32)
TILES(FORMAT_F16, f16)
TILES(FORMAT_BF16, bf16)
MATMUL(matmul_f32, tiles_f32)
MATMUL(matmul_f16, tiles_f16)
MATMUL(matmul_bf16, tiles_bf16)

const kernel_table kernels_avx2 = {
    .name = "avx2",
    .matmul = {matmul_f32, matmul_f16, matmul_bf16},
    .rmsnorm = rmsnorm,
    .swiglu = swiglu,
    .softmax = softmax,
    .log_sum_exp = log_sum_exp,
    .attend = attend,
};
#endif
