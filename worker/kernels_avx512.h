/* kernels_avx512.h - vec16 as one AVX-512 register: the operations kernels_lanes.h asks for, and those functions over them. */
#ifndef CONVOKE_WORKER_KERNELS_AVX512_H
#define CONVOKE_WORKER_KERNELS_AVX512_H

#include "worker/kernels_tables.h"

#include <math.h>
#if !defined(CONVOKE_EMULATE_AVX512) /* tests put an emulation in front of this file */
#include <immintrin.h>
#endif

typedef struct {
    __m512 all;
} vec16;
#define VEC16_REGISTERS 1

#define V_INLINE static inline __attribute__((always_inline))

V_INLINE vec16 v_set(float f)
{
    return (vec16){_mm512_set1_ps(f)};
}

V_INLINE vec16 v_load(const float *p)
{
    return (vec16){_mm512_loadu_ps(p)};
}

V_INLINE void v_store(float *p, vec16 v)
{
    _mm512_storeu_ps(p, v.all);
}

/* Bits j < n. */
V_INLINE __mmask16 first_lanes(int n)
{
    return (__mmask16)(n >= 16 ? 0xffffu : n <= 0 ? 0 : (1u << n) - 1);
}

V_INLINE vec16 v_load_first(const float *p, int n)
{
    return (vec16){_mm512_maskz_loadu_ps(first_lanes(n), p)};
}

V_INLINE void v_store_first(float *p, vec16 v, int n)
{
    _mm512_mask_storeu_ps(p, first_lanes(n), v.all);
}

V_INLINE vec16 v_add(vec16 a, vec16 b)
{
    return (vec16){_mm512_add_ps(a.all, b.all)};
}

V_INLINE vec16 v_sub(vec16 a, vec16 b)
{
    return (vec16){_mm512_sub_ps(a.all, b.all)};
}

V_INLINE vec16 v_mul(vec16 a, vec16 b)
{
    return (vec16){_mm512_mul_ps(a.all, b.all)};
}

V_INLINE vec16 v_div(vec16 a, vec16 b)
{
    return (vec16){_mm512_div_ps(a.all, b.all)};
}

V_INLINE vec16 v_fma(vec16 a, vec16 b, vec16 c)
{
    return (vec16){_mm512_fmadd_ps(a.all, b.all, c.all)};
}

V_INLINE vec16 v_max(vec16 a, vec16 b)
{
    return (vec16){_mm512_max_ps(a.all, b.all)};
}

V_INLINE vec16 v_min(vec16 a, vec16 b)
{
    return (vec16){_mm512_min_ps(a.all, b.all)};
}

V_INLINE vec16 v_keep(vec16 v, int begin, int end)
{
    __mmask16 kept = (__mmask16)(first_lanes(end) & ~first_lanes(begin));
    return (vec16){_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), kept, v.all)};
}

V_INLINE vec16 v_times_power(vec16 p, vec16 t)
{
    __m512i biased = _mm512_sub_epi32(_mm512_castps_si512(t.all), _mm512_set1_epi32((int)EXP_BIAS));
    __m512i half = _mm512_srli_epi32(biased, 1), one = _mm512_set1_epi32(1);
    __m512i low = _mm512_slli_epi32(_mm512_sub_epi32(half, one), 23);
    __m512i high = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_sub_epi32(biased, half), one), 23);
    return (vec16){_mm512_mul_ps(_mm512_mul_ps(p.all, _mm512_castsi512_ps(low)), _mm512_castsi512_ps(high))};
}

V_INLINE __m256 low8(__m512 v)
{
    return _mm512_castps512_ps256(v);
}

V_INLINE __m256 high8(__m512 v)
{
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

/* (s0 + s1, s2 + s3, s4 + s5, s6 + s7) of the reduction tree. */
V_INLINE __m128 pair_sums16(__m512 v)
{
    __m256 s = _mm256_add_ps(low8(v), high8(v));
    return _mm_hadd_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

V_INLINE float v_add_lanes(vec16 v)
{
    __m128 pairs = pair_sums16(v.all);
    pairs = _mm_hadd_ps(pairs, pairs);
    return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

V_INLINE float v_max_lane(vec16 v)
{
    __m256 eight = _mm256_max_ps(low8(v.all), high8(v.all));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#include "worker/kernels_lanes.h"

#endif
