/* kernels.h - the arithmetic of the model on one thread, in one table per instruction set.
 *
 * Batch-invariant: what a kernel writes for a row depends on that row's inputs alone, never on the other rows, on how rows or
 * columns were cut between calls, or on alignment. Every product sum over K runs the same way: 16 lanes, lane j adds
 * k = j, j + 16, j + 32, ... in that order with fused multiply-add, starting from +0; a K that is no multiple of 16 is
 * continued with zeros; the lanes are then added in one fixed tree:
 *     s[j] = a[j] + a[j + 8] (j < 8);  ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)).
 * Scalar, AVX2 and AVX-512 follow it exactly and agree bit for bit; AVX-512-BF16 (vdpbf16ps on activations split into a high
 * and a low bf16 half, exact to about 2^-17) is invariant in itself and close to the others.
 *
 * Weights are row-major [n][k] as the checkpoint stores them, any alignment, never repacked. Activations are fp32, rows may be
 * any number of floats apart. Nothing is allocated. */
#ifndef CONVOKE_WORKER_KERNELS_H
#define CONVOKE_WORKER_KERNELS_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

typedef enum { FORMAT_F32, FORMAT_F16, FORMAT_BF16, N_WEIGHT_FORMATS } weight_format;

/* In rising order: a job runs the lowest that all its ranks have. */
typedef enum { ISA_SCALAR, ISA_AVX2, ISA_AVX512, ISA_AVX512BF16, N_ISAS } kernel_isa;

/* Positions per KV block, and per step of the online softmax; blocks start at multiples of it. */
#define KV_BLOCK 32

/* One KV head's part of one KV block: keys transposed, K[d][j] at [d * KV_BLOCK + j], then values, V[j][d] at
 * [head_dim * KV_BLOCK + j * head_dim + d]; j is the position modulo KV_BLOCK. 64-byte aligned. */
static inline size_t kv_head_floats(int head_dim)
{
    return (size_t)2 * (size_t)head_dim * KV_BLOCK;
}

/* Attention of `n_rows` consecutive positions of one sequence, for the query heads that share one KV head. Row i sits at
 * absolute position first_position + i and sees positions max(0, p - window + 1) .. p (window 0: from 0). Block b of the
 * sequence (positions b * KV_BLOCK ...) is at pool + block_ids[b] * block_floats; all of them are filled up to the last row's
 * position; what lies behind a row's own position is never read into its result (it may be NaN).
 * Per row: blocks in rising order; inside a block scores first (lane = position, products over d in rising order with FMA),
 * then the block's maximum, then exponentials, then values with FMA in rising position order. */
typedef struct {
    const float *q; /* row i, head h: q + i * q_row_stride + h * head_dim */
    size_t q_row_stride;
    float *out; /* the same layout, its own stride */
    size_t out_row_stride;
    int n_rows, n_heads, head_dim;
    int first_position, window;
    float scale;
    const float *pool;
    size_t block_floats;
    const int32_t *block_ids;
} attend_args;

typedef struct {
    const char *name; /* "avx2" */

    /* y[i][j] = sum over c of x[i][c] * w[j][c]; x [m][k] (rows x_stride apart), w [n][k], y [m][n] (rows y_stride apart). */
    void (*matmul[N_WEIGHT_FORMATS])(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y,
                                     size_t y_stride);
    /* y = x / sqrt(mean(x^2) + eps) * weight; the sum of squares runs in the 16-lane order. y may be x. */
    void (*rmsnorm)(const float *x, const float *weight, int n, float eps, float *y);
    /* out = silu(gate) * up, silu(g) = g / (1 + exp(-g)). out may be gate. */
    void (*swiglu)(const float *gate, const float *up, int n, float *out);
    /* y = exp(x - max) / sum; the sum in the 16-lane order. y may be x. */
    void (*softmax)(const float *x, int n, float *y);
    /* log(sum(exp(x))), safe for large x: the denominator of a log-probability. */
    float (*log_sum_exp)(const float *x, int n);
    void (*attend)(const attend_args *args);
} kernel_table;

/* The table of one instruction set; NULL when this CPU (or this build) does not have it. */
const kernel_table *kernels_of(kernel_isa isa);
const char *kernel_isa_name(kernel_isa isa); /* "scalar", "avx2", "avx512", "avx512bf16" */

/* The best this CPU has among those with one set of bits (up to avx512), or what CONVOKE_ISA names. Fails on an unknown name and
 * on one this CPU lacks, naming both. */
status kernels_pick(kernel_isa *out);
/* By name; STATUS_USAGE for an unknown one. Whether this CPU has it is not asked. */
status kernel_isa_find(const char *name, kernel_isa *out);

size_t weight_format_size(weight_format format); /* bytes per weight */
/* One stored row [n] as fp32 (exact): embedding rows, norm weights, biases. */
void weights_to_f32(weight_format format, const void *row, size_t n, float *out);

#endif
