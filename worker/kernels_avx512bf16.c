/* kernels_avx512bf16.c - products with bf16 weights by vdpbf16ps: 32 products an instruction, no unpacking of weights.
 *
 * The instruction wants bf16 on both sides, so an activation is split into two: x = high + low, each a bf16, exact to about
 * 2^-17, and every weight meets both. That is as many FMA as fp32 needs, without the two operations that widen a weight.
 *
 *     packed[step][row]: 32 high halves, 32 low halves;  a step is 32 weights of one row, as stored
 *     lane j adds k = 2j, 2j + 1 (mod 32), first with the high, then with the low halves; then the tree of kernels.h
 *
 * The order is the same for every m and n, so results are invariant, but they are not those of the other instruction sets: the
 * order differs, products are rounded as the instruction does it, and subnormals count as zero. Everything but bf16 products is
 * AVX-512's. An infinite activation gives NaN. */
#include "worker/kernels.h"

#if defined(__AVX512BF16__) || defined(CONVOKE_EMULATE_AVX512)
#include "worker/kernels_avx512.h"

#define TILE_ROWS     4
#define TILE_OUTPUTS  6
#define STREAMED_ROWS 4
#define STEP          32
#include "worker/kernels_tiles.h"

/* The nearest bf16 of 16 floats, in the upper halves of 32-bit words; every NaN becomes the plain one. */
ALWAYS_INLINE __m512i round_bf16(__m512 v)
{
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

ALWAYS_INLINE void store_halves(char *to, __m512i words)
{
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
}

static void pack(const float *x, size_t x_stride, int rows, int k, float *packed)
{
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < k; c += STEP) {
            char *to = (char *)(packed + (size_t)c * (size_t)rows + 32 * i);
            for (int part = 0; part < 32; part += 16) {
                const float *from = x + (size_t)i * x_stride + c + part;
                vec16 v = k - c - part > 0 ? v_load_upto(from, k - c - part) : v_set(0.0f);
                __m512i high = round_bf16(v.all);
                store_halves(to + 2 * part, high);
                store_halves(to + 64 + 2 * part, round_bf16(_mm512_sub_ps(v.all, _mm512_castsi512_ps(high))));
            }
        }
}

ALWAYS_INLINE __m512bh load_halves(const void *p)
{
    return (__m512bh)_mm512_loadu_si512(p);
}

ALWAYS_INLINE void steps(const int rows, const int outputs, const float *x, const char *w, size_t w_stride, size_t ahead,
                         int n_steps, __m512 *acc)
{
    for (int s = 0; s < n_steps; s++, x += 32 * rows, w += 2 * STEP) {
        UNROLL for (int j = 0; j < outputs; j++)
        {
            __m512bh ws = load_halves(w + (size_t)j * w_stride);
            prefetch(w + (size_t)j * w_stride, ahead);
            UNROLL for (int i = 0; i < rows; i++) acc[i * outputs + j] =
                _mm512_dpbf16_ps(acc[i * outputs + j], load_halves(x + 32 * i), ws);
            UNROLL for (int i = 0; i < rows; i++) acc[i * outputs + j] =
                _mm512_dpbf16_ps(acc[i * outputs + j], load_halves(x + 32 * i + 16), ws);
        }
    }
}

ALWAYS_INLINE void run_tile(const weight_format format, const int rows, const int outputs, const float *x, const char *w, int k,
                            float *y, size_t y_stride)
{
    const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format);
    const int full = k / STEP, count = rows * outputs;
    __m512 acc[TILE_ROWS * TILE_OUTPUTS];
    UNROLL for (int i = 0; i < count; i++) acc[i] = _mm512_setzero_ps();
    steps(rows, outputs, x, w, row_bytes, PREFETCH_BYTES, full, acc);
    if (k % STEP) {
        weight_tail tail;
        copy_tail(outputs, &tail, w, row_bytes, (size_t)full * 2 * STEP);
        steps(rows, outputs, x + (size_t)full * 32 * (size_t)rows, tail.w[0], sizeof tail.w[0], 0, 1, acc);
    }
    __m128 pairs[TILE_ROWS * TILE_OUTPUTS];
    UNROLL for (int i = 0; i < count; i++) pairs[i] = pair_sums16(acc[i]);
    write_sums(rows, outputs, pairs, y, y_stride);
}

/* One row takes four weight rows at a time: two dependent instructions a step would not keep up with memory. */
TILE(tile_1, run_tile, run_tile, FORMAT_BF16, 1, 4)
TILE(tile_2, run_tile, run_tile, FORMAT_BF16, 2, 4)
TILE(tile_3, run_tile, run_tile, FORMAT_BF16, 3, 4)
TILE(tile_4, run_tile, run_tile, FORMAT_BF16, 4, 6)
static const tile_set tiles_bf16 = {
    FORMAT_BF16, pack, {NULL, tile_1, tile_2, tile_3, tile_4}, {NULL, NULL, tile_2, tile_3, tile_4}};

MATMUL(matmul_bf16, tiles_bf16)

static void matmul_f32(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)
{
    kernels_avx512.matmul[FORMAT_F32](x, x_stride, m, w, k, n, y, y_stride);
}

static void matmul_f16(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)
{
    kernels_avx512.matmul[FORMAT_F16](x, x_stride, m, w, k, n, y, y_stride);
}

const kernel_table kernels_avx512bf16 = {
    .name = "avx512bf16",
    .matmul = {matmul_f32, matmul_f16, matmul_bf16},
    .rmsnorm = rmsnorm,
    .swiglu = swiglu,
    .softmax = softmax,
    .log_sum_exp = log_sum_exp,
    .attend = attend,
};
#endif
