/* kernels_tables.h - what the kernel files share among themselves; others include kernels.h.
 *
 * The constants here are part of the definition: every instruction set computes exp() from the same numbers by the same sequence
 * of operations, so that all of them give the same bits. */
#ifndef CONVOKE_WORKER_KERNELS_TABLES_H
#define CONVOKE_WORKER_KERNELS_TABLES_H

#include "worker/kernels.h"

#include <string.h>

extern const kernel_table kernels_scalar;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2, kernels_avx512, kernels_avx512bf16;
#endif

/* exp(x): x clamped to where the result is 0 or infinity anyway; n = round(x / ln 2), left in the low bits of `t` by adding
 * 1.5 * 2^23; r = x - n ln 2 in two steps; e^r = 1 + (r + r^2 p(r)); times 2^n in two halves, so that results below the normal
 * range are rounded once. Within 1 ulp of libm over the whole range. */
#define EXP_LOWEST  (-105.0f)
#define EXP_HIGHEST 89.0f
#define EXP_LOG2E   0x1.715476p+0f
#define EXP_MAGIC   0x1.8p+23f
#define EXP_LN2_HI  0x1.62e4p-1f
#define EXP_LN2_LO  0x1.7f7d1cp-20f
#define EXP_P0      1.9875691500e-4f
#define EXP_P1      1.3981999507e-3f
#define EXP_P2      8.3334519073e-3f
#define EXP_P3      4.1665795894e-2f
#define EXP_P4      1.6666665459e-1f
#define EXP_P5      5.0000001201e-1f
/* bits(t) - EXP_BIAS = n + 256, positive for every n that can come */
#define EXP_BIAS (0x4b400000u - 256u)

/* Activations of one matmul call in the order its tiles read them: about half of a common L2 cache. A K beyond it (73,728) takes
 * the scalar way. */
#define PACK_FLOATS (72 * 1024)
extern _Thread_local float kernels_packed[PACK_FLOATS] __attribute__((aligned(64)));

static inline float f32_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_to_f32(uint16_t half)
{
    return f32_of_bits((uint32_t)half << 16);
}

static inline float f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) /* infinity; a NaN comes out quiet, as the hardware does it */
        return f32_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0));
    if (magnitude >= 0x400u)
        return f32_of_bits(sign | ((magnitude << 13) + 0x38000000u));
    return f32_of_bits(sign | bits_of_f32((float)magnitude * 0x1p-24f)); /* subnormal halves are normal floats */
}

#endif
