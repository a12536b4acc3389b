/* avx512_emulated.h - AVX-512 intrinsics for CPUs without it: SIMDe's, and the few it lacks, written plainly.
 *
 * Only tests/test_kernels uses this: kernels_avx512*.c are compiled a second time with it, so that their text runs everywhere. */
#ifndef CONVOKE_TESTS_AVX512_EMULATED_H
#define CONVOKE_TESTS_AVX512_EMULATED_H

#include "worker/kernels_tables.h" /* before its names are changed below */

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <stdint.h>
#include <string.h>

/* The tables of the second copy, beside those of the library. */
#define kernels_avx512     kernels_avx512_emulated
#define kernels_avx512bf16 kernels_avx512bf16_emulated
extern const kernel_table kernels_avx512_emulated, kernels_avx512bf16_emulated;

static inline __m512 emulated_maskz_loadu_ps(unsigned mask, const void *p)
{
    float lanes[16] = {0};
    for (int j = 0; j < 16; j++)
        if (mask >> j & 1)
            memcpy(&lanes[j], (const char *)p + 4 * j, 4);
    return _mm512_loadu_ps(lanes);
}
#define _mm512_maskz_loadu_ps(mask, p) emulated_maskz_loadu_ps(mask, p)

static inline void emulated_mask_storeu_ps(void *p, unsigned mask, __m512 v)
{
    float lanes[16];
    _mm512_storeu_ps(lanes, v);
    for (int j = 0; j < 16; j++)
        if (mask >> j & 1)
            memcpy((char *)p + 4 * j, &lanes[j], 4);
}
#define _mm512_mask_storeu_ps(p, mask, v) emulated_mask_storeu_ps(p, mask, v)

static inline __m512i emulated_cvtepu16_epi32(__m256i v)
{
    uint16_t from[16];
    uint32_t to[16];
    memcpy(from, &v, sizeof from);
    for (int j = 0; j < 16; j++)
        to[j] = from[j];
    return _mm512_loadu_si512(to);
}
#define _mm512_cvtepu16_epi32(v) emulated_cvtepu16_epi32(v)

static inline __m256i emulated_cvtepi32_epi16(__m512i v)
{
    uint32_t from[16];
    uint16_t to[16];
    __m256i out;
    _mm512_storeu_si512(from, v);
    for (int j = 0; j < 16; j++)
        to[j] = (uint16_t)from[j];
    memcpy(&out, to, sizeof out);
    return out;
}
#define _mm512_cvtepi32_epi16(v) emulated_cvtepi32_epi16(v)

static inline __m512 emulated_cvtph_ps(__m256i v)
{
    __m128i halves[2];
    float to[16];
    memcpy(halves, &v, sizeof halves);
    _mm256_storeu_ps(to, _mm256_cvtph_ps(halves[0]));
    _mm256_storeu_ps(to + 8, _mm256_cvtph_ps(halves[1]));
    return _mm512_loadu_ps(to);
}
#define _mm512_cvtph_ps(v) emulated_cvtph_ps(v)

#endif
