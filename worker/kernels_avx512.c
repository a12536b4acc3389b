/* kernels_avx512.c - AVX-512 (F, BW, VL, DQ): 16 lanes are one register, in natural order.
 *
 * Tiles are 4 rows x 6 outputs: 24 accumulators, 10 loads for 24 FMA; one row of few is bound by memory and takes one weight row
 * at a time. With CONVOKE_EMULATE_AVX512 the same text is compiled against SIMDe for tests (tests/avx512_emulated.h). */
#include "worker/kernels.h"

#if defined(__AVX512F__) || defined(CONVOKE_EMULATE_AVX512)
#include "worker/kernels_avx512.h"

#define TILE_ROWS     4
#define TILE_OUTPUTS  6
#define STREAMED_ROWS 4
#define STEP          16
#include "worker/kernels_tiles.h"

ALWAYS_INLINE __m512 load_weights(const weight_format format, const char *w)
{
    if (format == FORMAT_F32)
        return _mm512_loadu_ps(w);
    __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)w);
    if (format == FORMAT_F16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* packed[step][row][16] */
static void pack(const float *x, size_t x_stride, int rows, int k, float *packed)
{
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < k; c += STEP)
            v_store(packed + (size_t)c * (size_t)rows + 16 * i, v_load_upto(x + (size_t)i * x_stride + c, k - c));
}

ALWAYS_INLINE void steps(const weight_format format, const int rows, const int outputs, const float *x, const char *w,
                         size_t w_stride, size_t ahead, int n_steps, __m512 *acc)
{
    const size_t step_bytes = STEP * WEIGHT_BYTES(format);
    for (int s = 0; s < n_steps; s++, x += 16 * rows, w += step_bytes) {
        __m512 xs[TILE_ROWS];
        UNROLL for (int i = 0; i < rows; i++) xs[i] = _mm512_loadu_ps(x + 16 * i);
        UNROLL for (int j = 0; j < outputs; j++)
        {
            __m512 ws = load_weights(format, w + (size_t)j * w_stride);
            if (j < 3) /* of six weight rows' lines a step needs three: 32 bytes each */
                prefetch(w + (size_t)j * w_stride, ahead);
            UNROLL for (int i = 0; i < rows; i++) acc[i * outputs + j] = _mm512_fmadd_ps(ws, xs[i], acc[i * outputs + j]);
        }
    }
}

ALWAYS_INLINE void run_tile(const weight_format format, const int rows, const int outputs, const float *x, const char *w, int k,
                            float *y, size_t y_stride)
{
    const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format), step_bytes = STEP * WEIGHT_BYTES(format);
    const int full = k / STEP, count = rows * outputs;
    __m512 acc[TILE_ROWS * TILE_OUTPUTS];
    UNROLL for (int i = 0; i < count; i++) acc[i] = _mm512_setzero_ps();
    steps(format, rows, outputs, x, w, row_bytes, PREFETCH_BYTES, full, acc);
    if (k % STEP) {
        weight_tail tail;
        copy_tail(outputs, &tail, w, row_bytes, (size_t)full * step_bytes);
        steps(format, rows, outputs, x + (size_t)full * 16 * (size_t)rows, tail.w[0], sizeof tail.w[0], 0, 1, acc);
    }
    __m128 pairs[TILE_ROWS * TILE_OUTPUTS];
    UNROLL for (int i = 0; i < count; i++) pairs[i] = pair_sums16(acc[i]);
    write_sums(rows, outputs, pairs, y, y_stride);
}

#define TILES(format, suffix)                                                                                                    \
    TILE(tile_##suffix##_1, run_tile, run_tile, format, 1, 1)                                                                    \
    TILE(tile_##suffix##_2, run_tile, run_tile, format, 2, 4)                                                                    \
    TILE(tile_##suffix##_3, run_tile, run_tile, format, 3, 4)                                                                    \
    TILE(tile_##suffix##_4, run_tile, run_tile, format, 4, 6)                                                                    \
    static const tile_set tiles_##suffix = {format,                                                                              \
                                            pack,                                                                                \
                                            {NULL, tile_##suffix##_1, tile_##suffix##_2, tile_##suffix##_3, tile_##suffix##_4},  \
                                            {NULL, NULL, tile_##suffix##_2, tile_##suffix##_3, tile_##suffix##_4}};

TILES(FORMAT_F32, f32)
TILES(FORMAT_F16, f16)
TILES(FORMAT_BF16, bf16)
MATMUL(matmul_f32, tiles_f32)
MATMUL(matmul_f16, tiles_f16)
MATMUL(matmul_bf16, tiles_bf16)

const kernel_table kernels_avx512 = {
    .name = "avx512",
    .matmul = {matmul_f32, matmul_f16, matmul_bf16},
    .rmsnorm = rmsnorm,
    .swiglu = swiglu,
    .softmax = softmax,
    .log_sum_exp = log_sum_exp,
    .attend = attend,
};
#endif
