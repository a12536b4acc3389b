/* kernels_scalar.c - the definition: every kernel written the plain way, 16 lanes as an array, one fused multiply-add at a time.
 *
 * The other instruction sets are right when they give these bits. Two details count as definition too:
 *  - a maximum starts at -infinity and takes x where x > maximum, so it passes over NaN; the NaN comes back through exp();
 *  - what pads the last 16 of a row takes part as 0 * 0, which turns a lane that underflowed to -0 into +0 everywhere alike.
 * Bits of a NaN are not part of it. */
#include "worker/kernels.h"
#include "worker/kernels_tables.h"

#include <math.h>

static float add_lanes(const float a[16])
{
    float s[8];
    for (int j = 0; j < 8; j++)
        s[j] = a[j] + a[j + 8];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static float exp_f32(float x)
{
    x = EXP_LOWEST > x ? EXP_LOWEST : x; /* NaN passes through both */
    x = EXP_HIGHEST < x ? EXP_HIGHEST : x;
    float t = fmaf(x, EXP_LOG2E, EXP_MAGIC);
    float n = t - EXP_MAGIC;
    float r = fmaf(n, -EXP_LN2_HI, x);
    r = fmaf(n, -EXP_LN2_LO, r);
    float p = fmaf(EXP_P0, r, EXP_P1);
    p = fmaf(p, r, EXP_P2);
    p = fmaf(p, r, EXP_P3);
    p = fmaf(p, r, EXP_P4);
    p = fmaf(p, r, EXP_P5);
    p = fmaf(p, r * r, r) + 1.0f;
    uint32_t biased = bits_of_f32(t) - EXP_BIAS, half = biased >> 1;
    return p * f32_of_bits((half - 1) << 23) * f32_of_bits((biased - half - 1) << 23);
}

static void matmul(weight_format format, const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y,
                   size_t y_stride)
{
    size_t row_bytes = (size_t)k * weight_format_size(format);
    for (int j = 0; j < n; j++) {
        const char *row = (const char *)w + (size_t)j * row_bytes;
        for (int i = 0; i < m; i++) {
            float lanes[16] = {0};
            for (int c = 0; c < k; c += 16) {
                int count = k - c < 16 ? k - c : 16;
                float xs[16] = {0}, ws[16] = {0};
                memcpy(xs, x + (size_t)i * x_stride + c, (size_t)count * sizeof *xs);
                weights_to_f32(format, row + (size_t)c * weight_format_size(format), (size_t)count, ws);
                for (int lane = 0; lane < 16; lane++)
                    lanes[lane] = fmaf(ws[lane], xs[lane], lanes[lane]);
            }
            y[(size_t)i * y_stride + (size_t)j] = add_lanes(lanes);
        }
    }
}

static void matmul_f32(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)
{
    matmul(FORMAT_F32, x, x_stride, m, w, k, n, y, y_stride);
}

static void matmul_f16(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)
{
    matmul(FORMAT_F16, x, x_stride, m, w, k, n, y, y_stride);
}

static void matmul_bf16(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)
{
    matmul(FORMAT_BF16, x, x_stride, m, w, k, n, y, y_stride);
}

static void rmsnorm(const float *x, const float *weight, int n, float eps, float *y)
{
    float lanes[16] = {0};
    for (int i = 0; i < (n + 15) / 16 * 16; i++) {
        float v = i < n ? x[i] : 0.0f;
        lanes[i % 16] = fmaf(v, v, lanes[i % 16]);
    }
    float inverse = 1.0f / sqrtf(add_lanes(lanes) / (float)n + eps);
    for (int i = 0; i < n; i++)
        y[i] = x[i] * inverse * weight[i];
}

static void swiglu(const float *gate, const float *up, int n, float *out)
{
    for (int i = 0; i < n; i++)
        out[i] = gate[i] / (1.0f + exp_f32(0.0f - gate[i])) * up[i];
}

static float maximum(const float *x, int n)
{
    float max = -INFINITY;
    for (int i = 0; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

static void softmax(const float *x, int n, float *y)
{
    float max = maximum(x, n), lanes[16] = {0};
    for (int i = 0; i < n; i++) {
        y[i] = exp_f32(x[i] - max);
        lanes[i % 16] += y[i];
    }
    float sum = add_lanes(lanes);
    for (int i = 0; i < n; i++)
        y[i] /= sum;
}

static float log_sum_exp(const float *x, int n)
{
    float max = maximum(x, n), lanes[16] = {0};
    if (isinf(max)) /* all -infinity, or one +infinity */
        return max;
    for (int i = 0; i < n; i++)
        lanes[i % 16] += exp_f32(x[i] - max);
    return (float)((double)max + log((double)add_lanes(lanes)));
}

/* One head of one row: q, out [head_dim]; `base` is the head's part of block 0's pool. */
static void attend_one(const attend_args *a, const float *q, int position, float *out)
{
    int first = a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
    float max = -INFINITY, sum = 0.0f;
    for (int d = 0; d < a->head_dim; d++)
        out[d] = 0.0f;
    for (int b = first / KV_BLOCK; b <= position / KV_BLOCK; b++) {
        const float *keys = a->pool + (size_t)a->block_ids[b] * a->block_floats;
        const float *values = keys + (size_t)a->head_dim * KV_BLOCK;
        int begin = first > b * KV_BLOCK ? first - b * KV_BLOCK : 0;
        int end = position - b * KV_BLOCK < KV_BLOCK ? position - b * KV_BLOCK + 1 : KV_BLOCK;

        float weight[KV_BLOCK], block_max = -INFINITY, lanes[16] = {0};
        for (int j = begin; j < end; j++) {
            float score = 0.0f;
            for (int d = 0; d < a->head_dim; d++)
                score = fmaf(q[d], keys[d * KV_BLOCK + j], score);
            weight[j] = score * a->scale;
            block_max = weight[j] > block_max ? weight[j] : block_max;
        }
        float new_max = block_max > max ? block_max : max;
        float rescale = exp_f32(max - new_max);
        for (int j = 0; j < KV_BLOCK; j++)
            weight[j] = j < begin || j >= end ? 0.0f : exp_f32(weight[j] - new_max);
        for (int j = 0; j < 16; j++)
            lanes[j] = weight[j] + weight[j + 16];
        sum = fmaf(sum, rescale, add_lanes(lanes));
        max = new_max;
        for (int d = 0; d < a->head_dim; d++) {
            float value = out[d] * rescale;
            for (int j = begin; j < end; j++)
                value = fmaf(weight[j], values[j * a->head_dim + d], value);
            out[d] = value;
        }
    }
    for (int d = 0; d < a->head_dim; d++)
        out[d] /= sum;
}

static void attend(const attend_args *a)
{
    for (int i = 0; i < a->n_rows; i++)
        for (int h = 0; h < a->n_heads; h++)
            attend_one(a, a->q + (size_t)i * a->q_row_stride + (size_t)h * (size_t)a->head_dim, a->first_position + i,
                       a->out + (size_t)i * a->out_row_stride + (size_t)h * (size_t)a->head_dim);
}

const kernel_table kernels_scalar = {
    .name = "scalar",
    .matmul = {matmul_f32, matmul_f16, matmul_bf16},
    .rmsnorm = rmsnorm,
    .swiglu = swiglu,
    .softmax = softmax,
    .log_sum_exp = log_sum_exp,
    .attend = attend,
};
