/* rope.c - rotary position tables, by the formulas of transformers' modeling_rope_utils.
 *
 * Sources: RoPE arXiv 2104.09864; linear: kaiokendev's position interpolation, arXiv 2306.15595; yarn: arXiv 2309.00071
 * (3.2 for the ramp, 3.4 for the attention factor); llama3: the Llama 3.1 reference code. Inverse frequencies and angles are
 * rounded to fp32 where transformers rounds them: at position 100,000 an angle is only good to 1e-2 in fp32, so that agreement
 * with the model's own training code hangs on rounding in the same places. The cosine of the fp32 angle is taken in double
 * and rounded once, so that it hardly depends on the C library. */
#include "worker/model_config.h"

#include <math.h>
#include <stdlib.h>

/* theta^(2i / head_dim), the inverse of the plain frequency. */
static float base_power(const rope_config *rope, int head_dim, int i)
{
    float exponent = (float)(2 * i) / (float)head_dim;
    return (float)pow((float)rope->theta, exponent);
}

/* The dimension whose angle turns `rotations` times within the original context. */
static double correction_dim(const rope_config *rope, int head_dim, double rotations)
{
    return head_dim * log(rope->original_positions / (rotations * 2 * M_PI)) / (2 * log(rope->theta));
}

static float yarn_frequency(const rope_config *rope, int head_dim, int i)
{
    double low = correction_dim(rope, head_dim, rope->beta_fast), high = correction_dim(rope, head_dim, rope->beta_slow);
    if (rope->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, head_dim - 1);
    if (low == high)
        high += 0.001; /* transformers' way round a ramp of no width */
    float power = base_power(rope, head_dim, i);
    float as_is = 1.0f / power, stretched = 1.0f / ((float)rope->factor * power);
    float ramp = ((float)i - (float)low) / (float)(high - low);
    float keep = 1.0f - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
    return stretched * (1.0f - keep) + as_is * keep;
}

static float llama3_frequency(const rope_config *rope, int head_dim, int i)
{
    float plain = 1.0f / base_power(rope, head_dim, i);
    float wave = 1.0f / plain * (float)(2 * M_PI);
    if (wave < (float)(rope->original_positions / rope->high_freq_factor))
        return plain;
    if (wave > (float)(rope->original_positions / rope->low_freq_factor))
        return plain / (float)rope->factor;
    float smooth = (1.0f / wave * (float)rope->original_positions - (float)rope->low_freq_factor) /
                   (float)(rope->high_freq_factor - rope->low_freq_factor);
    return (1.0f - smooth) * plain / (float)rope->factor + smooth * plain;
}

static float inverse_frequency(const rope_config *rope, int head_dim, int i)
{
    switch (rope->kind) {
    case ROPE_LINEAR:
        return 1.0f / base_power(rope, head_dim, i) / (float)rope->factor;
    case ROPE_YARN:
        return yarn_frequency(rope, head_dim, i);
    case ROPE_LLAMA3:
        return llama3_frequency(rope, head_dim, i);
    case ROPE_DYNAMIC: /* up to max_position_embeddings, dynamic scaling changes nothing */
    case ROPE_DEFAULT:
        break;
    }
    return 1.0f / base_power(rope, head_dim, i);
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

static float attention_factor(const rope_config *rope)
{
    if (rope->kind != ROPE_YARN)
        return 1;
    if (rope->attention_factor > 0)
        return (float)rope->attention_factor;
    if (rope->mscale != 0 && rope->mscale_all_dim != 0)
        return (float)(yarn_mscale(rope->factor, rope->mscale) / yarn_mscale(rope->factor, rope->mscale_all_dim));
    return (float)yarn_mscale(rope->factor, 1);
}

status rope_tables(const rope_config *rope, int head_dim, int max_positions, int n_positions, float **cos_table,
                   float **sin_table)
{
    if (n_positions > max_positions)
        return status_fail(STATUS_UNSUPPORTED, "rope: %d positions, but the model has %d", n_positions, max_positions);
    int half = head_dim / 2;
    size_t n = (size_t)n_positions * (size_t)half;
    float *cosines = malloc((n + 1) * sizeof *cosines), *sines = malloc((n + 1) * sizeof *sines);
    if (!cosines || !sines) {
        free(cosines);
        free(sines);
        return status_fail(STATUS_NO_MEMORY, "rope: no memory for tables of %d positions", n_positions);
    }
    float scale = attention_factor(rope);
    for (int i = 0; i < half; i++) {
        float frequency = inverse_frequency(rope, head_dim, i);
        for (int p = 0; p < n_positions; p++) {
            double angle = (float)p * frequency;
            cosines[(size_t)p * (size_t)half + (size_t)i] = (float)cos(angle) * scale;
            sines[(size_t)p * (size_t)half + (size_t)i] = (float)sin(angle) * scale;
        }
    }
    *cos_table = cosines;
    *sin_table = sines;
    return STATUS_OK;
}
