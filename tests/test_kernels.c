/* Every instruction set against the scalar definition: equal bits. AVX-512 is compiled a second time against SIMDe where that is
 * installed, so that its text is executed and compared on CPUs that do not have it. AVX-512-BF16 is close to the definition and
 * invariant in itself. */
#include "tests/support.h"
#include "worker/kernels.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef CONVOKE_EMULATED_AVX512
extern const kernel_table kernels_avx512_emulated, kernels_avx512bf16_emulated;
#endif

#define MAX_TABLES 6

typedef struct {
    const kernel_table *table;
    bool own_products; /* avx512bf16: bf16 products are close to the definition, not equal */
} candidate;

static candidate candidates[MAX_TABLES];
static int n_candidates;
static const kernel_table *scalar;

static void add_candidate(const kernel_table *table, bool own_products)
{
    if (table)
        candidates[n_candidates++] = (candidate){table, own_products};
}

static int collect(void **state)
{
    (void)state;
    scalar = kernels_of(ISA_SCALAR);
    add_candidate(kernels_of(ISA_AVX2), false);
    add_candidate(kernels_of(ISA_AVX512), false);
    add_candidate(kernels_of(ISA_AVX512BF16), true);
#ifdef CONVOKE_EMULATED_AVX512
    add_candidate(&kernels_avx512_emulated, false);
    add_candidate(&kernels_avx512bf16_emulated, true);
#else
    printf("SIMDe is not installed (libsimde-dev): AVX-512 kernels are compared only where the CPU has them\n");
#endif
    return scalar ? 0 : -1;
}

/* ---- helpers ---- */

static uint32_t bits_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static bool same(float a, float b)
{
    return bits_of(a) == bits_of(b) || (isnan(a) && isnan(b));
}

static void assert_same(const float *got, const float *want, size_t n, const char *who, const char *what)
{
    for (size_t i = 0; i < n; i++)
        if (!same(got[i], want[i]))
            fail_msg("%s: %s: number %zu is %a, not %a", who, what, i, (double)got[i], (double)want[i]);
}

static float *gauss(uint64_t *seed, size_t n)
{
    float *out = malloc((n ? n : 1) * sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = support_gauss(seed);
    return out;
}

static uint16_t half_bits(weight_format format, float f)
{
    uint32_t bits = bits_of(f);
    if (format == FORMAT_BF16)
        return (uint16_t)(bits >> 16);
    uint32_t magnitude = bits & 0x7fffffffu; /* truncated, subnormals to zero: good enough to make weights */
    return (uint16_t)((bits >> 16 & 0x8000u) | (magnitude < 0x38800000u ? 0 : (magnitude - 0x38000000u) >> 13));
}

/* Random weights in a format, starting `shift` bytes behind a malloc address; *base is what to free. */
static char *weights(weight_format format, uint64_t *seed, size_t n, int shift, void **base)
{
    size_t size = weight_format_size(format);
    char *bytes = *base = malloc(n * size + (size_t)shift + 1);
    bytes += shift;
    for (size_t i = 0; i < n; i++) {
        float f = support_gauss(seed) * 0.1f;
        uint16_t half = half_bits(format, f);
        memcpy(bytes + i * size, format == FORMAT_F32 ? (void *)&f : (void *)&half, size);
    }
    return bytes;
}

/* ---- products ---- */

typedef struct {
    weight_format format;
    int m, n, k, shift;
    size_t x_stride, y_stride;
} product_shape;

#define UNTOUCHED 12345.0f

static float *blank(size_t n)
{
    float *y = malloc((n ? n : 1) * sizeof *y);
    for (size_t i = 0; i < n; i++)
        y[i] = UNTOUCHED;
    return y;
}

static void check_close(const product_shape *p, const float *x, const char *w, const float *got, const float *want)
{
    for (int i = 0; i < p->m; i++)
        for (int j = 0; j < p->n; j++) {
            double size = 0; /* what rounding is relative to: the sum of the products' magnitudes */
            float row[8192];
            weights_to_f32(p->format, w + (size_t)j * (size_t)p->k * weight_format_size(p->format), (size_t)p->k, row);
            for (int c = 0; c < p->k; c++)
                size += fabs((double)row[c] * (double)x[(size_t)i * p->x_stride + (size_t)c]);
            size_t at = (size_t)i * p->y_stride + (size_t)j;
            assert_true(fabs((double)got[at] - (double)want[at]) <= 2e-5 * size + 1e-30);
        }
}

static void check_product(const product_shape *p, uint64_t *seed)
{
    void *base;
    char *w = weights(p->format, seed, (size_t)p->n * (size_t)p->k, p->shift, &base);
    size_t x_size = (size_t)p->m * p->x_stride + 3, y_size = (size_t)p->m * p->y_stride;
    float *x_base = gauss(seed, x_size), *x = x_base + p->shift % 3;
    float *want = blank(y_size);
    scalar->matmul[p->format](x, p->x_stride, p->m, w, p->k, p->n, want, p->y_stride);
    for (int c = 0; c < n_candidates; c++) {
        float *got = blank(y_size);
        candidates[c].table->matmul[p->format](x, p->x_stride, p->m, w, p->k, p->n, got, p->y_stride);
        if (candidates[c].own_products && p->format == FORMAT_BF16) {
            check_close(p, x, w, got, want);
        } else {
            char what[128];
            snprintf(what, sizeof what, "format %d, m %d, n %d, k %d, weights shifted by %d", p->format, p->m, p->n, p->k,
                     p->shift);
            assert_same(got, want, y_size, candidates[c].table->name, what);
        }
        free(got);
    }
    free(want), free(x_base), free(base);
}

static product_shape shape(weight_format format, int m, int n, int k, int shift)
{
    return (product_shape){format, m, n, k, shift, (size_t)k + (size_t)(shift % 5), (size_t)n + (size_t)(shift % 4)};
}

static void products_equal_definition(void **state)
{
    (void)state;
    static const int ks[] = {1, 7, 15, 16, 17, 32, 33, 48, 63, 64, 100, 256, 257};
    uint64_t seed = 1;
    for (int f = 0; f < N_WEIGHT_FORMATS; f++)
        for (size_t i = 0; i < sizeof ks / sizeof ks[0]; i++)
            for (int m = 1; m <= 14; m++) {
                product_shape p = shape((weight_format)f, m, 1 + support_below(&seed, 14), ks[i], support_below(&seed, 9));
                check_product(&p, &seed);
            }
}

static void random_shapes_equal_definition(void **state)
{
    (void)state;
    uint64_t seed = 2;
    for (int round = 0; round < 60; round++) {
        product_shape p = shape((weight_format)support_below(&seed, N_WEIGHT_FORMATS), 1 + support_below(&seed, 40),
                                1 + support_below(&seed, 70), 1 + support_below(&seed, 700), support_below(&seed, 64));
        check_product(&p, &seed);
    }
}

static void large_shapes_equal_definition(void **state)
{
    (void)state;
    uint64_t seed = 3;
    /* more rows than are packed at once; more weight rows than one cache block; K beyond what is packed at all */
    static const product_shape shapes[] = {{FORMAT_BF16, 80, 20, 2048, 0, 2048, 20}, {FORMAT_BF16, 13, 100, 1024, 2, 1025, 100},
                                           {FORMAT_F32, 20, 30, 4096, 4, 4100, 31},  {FORMAT_F16, 70, 9, 3000, 1, 3000, 9},
                                           {FORMAT_F32, 3, 2, 80000, 0, 80000, 2},   {FORMAT_F16, 4, 3, 30000, 0, 30000, 3}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        check_product(&shapes[i], &seed);
}

/* One call against many: rows and outputs cut anywhere, x at another stride. */
static void cuts_change_nothing(void **state)
{
    (void)state;
    uint64_t seed = 4;
    for (int round = 0; round < 40; round++) {
        weight_format format = (weight_format)support_below(&seed, N_WEIGHT_FORMATS);
        int m = 1 + support_below(&seed, 30), n = 1 + support_below(&seed, 40), k = 1 + support_below(&seed, 300);
        size_t row_bytes = (size_t)k * weight_format_size(format), other = (size_t)k + 5;
        void *base;
        char *w = weights(format, &seed, (size_t)n * (size_t)k, support_below(&seed, 8), &base);
        float *x = gauss(&seed, (size_t)m * (size_t)k), *apart = gauss(&seed, (size_t)m * other);
        for (int i = 0; i < m; i++)
            memcpy(apart + (size_t)i * other, x + (size_t)i * (size_t)k, (size_t)k * sizeof *x);
        float *whole = blank((size_t)m * (size_t)n), *cut = blank((size_t)m * (size_t)n);
        for (int c = -1; c < n_candidates; c++) {
            const kernel_table *t = c < 0 ? scalar : candidates[c].table;
            t->matmul[format](x, (size_t)k, m, w, k, n, whole, (size_t)n);
            for (int i = 0, rows; i < m; i += rows) {
                rows = 1 + support_below(&seed, m - i);
                for (int j = 0, outs; j < n; j += outs) {
                    outs = 1 + support_below(&seed, n - j);
                    t->matmul[format](apart + (size_t)i * other, other, rows, w + (size_t)j * row_bytes, k, outs,
                                      cut + (size_t)i * (size_t)n + j, (size_t)n);
                }
            }
            assert_same(cut, whole, (size_t)m * (size_t)n, t->name, "cut into several calls");
        }
        free(cut), free(whole), free(apart), free(x), free(base);
    }
}

/* The definition itself against sums in double. */
static void definition_is_the_product(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int f = 0; f < N_WEIGHT_FORMATS; f++) {
        const int m = 3, n = 5, k = 333;
        void *base;
        char *w = weights((weight_format)f, &seed, (size_t)n * k, 1, &base);
        float *x = gauss(&seed, (size_t)m * k), row[333], y[15];
        scalar->matmul[f](x, k, m, w, k, n, y, n);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = 0;
                weights_to_f32((weight_format)f, w + (size_t)j * k * weight_format_size((weight_format)f), k, row);
                for (int c = 0; c < k; c++)
                    sum += (double)x[i * k + c] * (double)row[c];
                assert_true(fabs(sum - (double)y[i * n + j]) < 1e-4);
            }
        free(x), free(base);
    }
}

/* K <= 16 and one row leave nothing to associate: the tree, spelled out. */
static void reduction_follows_the_tree(void **state)
{
    (void)state;
    uint64_t seed = 6;
    float *a = gauss(&seed, 16), ones[16], s[8], y;
    for (int j = 0; j < 16; j++)
        ones[j] = 1.0f;
    for (int j = 0; j < 8; j++)
        s[j] = a[j] + a[j + 8];
    float want = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    scalar->matmul[FORMAT_F32](a, 16, 1, ones, 16, 1, &y, 1);
    assert_true(same(y, want));
    free(a);
}

static void special_values_equal_definition(void **state)
{
    (void)state;
    static const float odd[] = {INFINITY, -INFINITY, NAN, -0.0f, 1e-42f, -1e-42f, 3e38f, -3e38f, 1e-30f, -1e-30f};
    uint64_t seed = 7;
    for (int round = 0; round < 40; round++) {
        int k = 1 + support_below(&seed, 70), n = 6;
        float *x = gauss(&seed, 7 * (size_t)k), *w = gauss(&seed, (size_t)n * (size_t)k), want[42], got[42];
        for (int i = 0; i < 5; i++) {
            x[support_below(&seed, 7 * k)] = odd[support_below(&seed, 10)];
            w[support_below(&seed, n * k)] = odd[support_below(&seed, 10)];
        }
        scalar->matmul[FORMAT_F32](x, (size_t)k, 7, w, k, n, want, (size_t)n);
        for (int c = 0; c < n_candidates; c++) {
            candidates[c].table->matmul[FORMAT_F32](x, (size_t)k, 7, w, k, n, got, (size_t)n);
            assert_same(got, want, 42, candidates[c].table->name, "infinities, NaN, zeros, subnormals");
        }
        free(w), free(x);
    }
}

static void every_half_is_read_exactly(void **state)
{
    (void)state;
    uint16_t *halves = malloc(65536 * sizeof *halves);
    float *out = malloc(65536 * sizeof *out), one = 1.0f;
    for (int i = 0; i < 65536; i++)
        halves[i] = (uint16_t)i;
    for (int f = FORMAT_F16; f <= FORMAT_BF16; f++) {
        weights_to_f32((weight_format)f, halves, 65536, out);
        for (int i = 0; i < 65536; i++) {
            bool f16 = f == FORMAT_F16;
            int exponent = f16 ? i >> 10 & 31 : i >> 7 & 255, mantissa = f16 ? i & 1023 : i & 127;
            double unit = f16 ? ldexp(1, -10) : ldexp(1, -7), bias = f16 ? 15 : 127;
            double want = exponent ? ldexp(1 + mantissa * unit, exponent - (int)bias) : ldexp(mantissa * unit, 1 - (int)bias);
            if (exponent == (f16 ? 31 : 255))
                want = mantissa ? NAN : INFINITY;
            assert_true(same(out[i], (float)(i & 0x8000 ? -want : want)));
        }
        for (int c = 0; c < n_candidates; c++) {
            if (candidates[c].own_products && f == FORMAT_BF16)
                continue; /* its products flush subnormals */
            float *y = blank(65536), *want = blank(65536);
            candidates[c].table->matmul[f](&one, 1, 1, halves, 1, 65536, y, 65536);
            scalar->matmul[f](&one, 1, 1, halves, 1, 65536, want, 65536);
            assert_same(y, want, 65536, candidates[c].table->name, "each half times 1");
            free(y), free(want);
        }
    }
    free(out), free(halves);
}

/* ---- functions of rows ---- */

/* exp() as seen through swiglu: silu(g) * up. */
static void exp_is_within_two_ulp(void **state)
{
    (void)state;
    enum { N = 40000 };
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y), two[2];
    double worst = 0;
    for (int i = 0; i < N; i++)
        x[i] = -104.0f + 104.0f * (float)i / N;
    /* softmax of (x, 0) divides exp(x) by 1 + exp(x); below -20 that is exp(x) itself */
    for (int i = 0; i < N; i++) {
        two[0] = x[i], two[1] = 0;
        if (x[i] > -20)
            break;
        scalar->softmax(two, 2, two);
        double want = exp((double)x[i]), unit = fmax(ldexp(1, ilogb(want) - 23), 0x1p-149);
        worst = fmax(worst, fabs((double)two[0] - want) / unit);
    }
    assert_true(worst <= 2);
    /* ... and above through one more division */
    scalar->swiglu(x, x, N, y);
    for (int i = 0; i < N; i++) {
        double want = (double)x[i] / (1 + exp(-(double)x[i])) * (double)x[i];
        if (x[i] > -80)
            assert_true(fabs((double)y[i] - want) <= 1e-6 * fabs(want));
    }
    free(y), free(x);
}

typedef enum { ROW_RMSNORM, ROW_SWIGLU, ROW_SOFTMAX, ROW_LOG_SUM_EXP, N_ROW_KERNELS } row_kernel;

static void run_row(const kernel_table *t, row_kernel kernel, const float *a, const float *b, int n, float *y)
{
    if (kernel == ROW_RMSNORM)
        t->rmsnorm(a, b, n, 1e-6f, y);
    else if (kernel == ROW_SWIGLU)
        t->swiglu(a, b, n, y);
    else if (kernel == ROW_SOFTMAX)
        t->softmax(a, n, y);
    else
        y[0] = t->log_sum_exp(a, n);
}

static void check_rows(const float *a, const float *b, int n)
{
    static const char *const names[] = {"rmsnorm", "swiglu", "softmax", "log_sum_exp"};
    float *want = blank((size_t)n + 16), *got = blank((size_t)n + 16);
    for (int kernel = 0; kernel < N_ROW_KERNELS; kernel++) {
        run_row(scalar, (row_kernel)kernel, a, b, n, want);
        for (int c = 0; c < n_candidates; c++) {
            for (int i = 0; i < n + 16; i++)
                got[i] = UNTOUCHED;
            run_row(candidates[c].table, (row_kernel)kernel, a, b, n, got);
            assert_same(got, want, kernel == ROW_LOG_SUM_EXP ? 1 : (size_t)n, candidates[c].table->name, names[kernel]);
            for (int i = n; i < n + 16; i++)
                assert_true(got[i] == UNTOUCHED);
            /* in place */
            memcpy(got, a, (size_t)n * sizeof *got);
            run_row(candidates[c].table, (row_kernel)kernel, got, b, n, got);
            assert_same(got, want, kernel == ROW_LOG_SUM_EXP ? 1 : (size_t)n, candidates[c].table->name, "in place");
        }
    }
    free(got), free(want);
}

static void rows_equal_definition(void **state)
{
    (void)state;
    static const float odd[] = {INFINITY, -INFINITY, NAN, -0.0f, 0.0f, 1e-42f, 1000.0f, -1000.0f, 88.7f, -87.5f, -103.9f, 3e38f};
    uint64_t seed = 8;
    for (int n = 1; n <= 70; n++)
        for (int round = 0; round < 4; round++) {
            float *a = gauss(&seed, (size_t)n), *b = gauss(&seed, (size_t)n);
            for (int i = 0; i < n; i++)
                a[i] *= round == 1 ? 30.0f : 3.0f;
            for (int i = 0; i < round; i++)
                a[support_below(&seed, n)] = round == 3 ? odd[support_below(&seed, 12)] : odd[3 + support_below(&seed, 8)];
            check_rows(a, b, n);
            free(b), free(a);
        }
}

static void rows_equal_double(void **state)
{
    (void)state;
    enum { N = 1000 };
    uint64_t seed = 9;
    float *a = gauss(&seed, N), *b = gauss(&seed, N), y[N];
    double squares = 0, sum = 0;
    for (int i = 0; i < N; i++)
        squares += (double)a[i] * (double)a[i], sum += exp((double)a[i]);
    scalar->rmsnorm(a, b, N, 1e-5f, y);
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)y[i] - (double)a[i] / sqrt(squares / N + 1e-5) * (double)b[i]) < 2e-6);
    scalar->softmax(a, N, y);
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)y[i] - exp((double)a[i]) / sum) < 1e-8);
    assert_true(fabs((double)scalar->log_sum_exp(a, N) - log(sum)) < 1e-6);
    for (int i = 0; i < N; i++)
        a[i] += 500.0f;
    assert_true(fabs((double)scalar->log_sum_exp(a, N) - 500 - log(sum)) < 1e-4);
    free(b), free(a);
}

static void empty_probability_is_minus_infinity(void **state)
{
    (void)state;
    float x[20];
    for (int i = 0; i < 20; i++)
        x[i] = -INFINITY;
    for (int c = -1; c < n_candidates; c++)
        assert_true(same((c < 0 ? scalar : candidates[c].table)->log_sum_exp(x, 20), -INFINITY));
}

/* ---- attention ---- */

typedef struct {
    attend_args args;
    float *q, *pool, *out;
    int32_t *ids;
    size_t n_out;
} attention;

/* A sequence filled up to `filled` positions, everything else in its blocks NaN, blocks in scattered order. */
static attention attention_make(uint64_t *seed, int n_heads, int head_dim, int first, int n_rows, int window)
{
    attention a = {0};
    int filled = first + n_rows, n_blocks = (filled + KV_BLOCK - 1) / KV_BLOCK;
    size_t block_floats = kv_head_floats(head_dim) + 48;
    a.ids = malloc((size_t)n_blocks * sizeof *a.ids);
    a.pool = aligned_alloc(64, (size_t)n_blocks * block_floats * sizeof *a.pool);
    for (size_t i = 0; i < (size_t)n_blocks * block_floats; i++)
        a.pool[i] = NAN;
    for (int b = 0; b < n_blocks; b++)
        a.ids[b] = (b * 7 + 3) % n_blocks;
    if (n_blocks % 7 == 0)
        for (int b = 0; b < n_blocks; b++)
            a.ids[b] = n_blocks - 1 - b;
    for (int p = 0; p < filled; p++) {
        float *keys = a.pool + (size_t)a.ids[p / KV_BLOCK] * block_floats, *values = keys + head_dim * KV_BLOCK;
        for (int d = 0; d < head_dim; d++) {
            keys[d * KV_BLOCK + p % KV_BLOCK] = support_gauss(seed);
            values[p % KV_BLOCK * head_dim + d] = support_gauss(seed);
        }
    }
    size_t stride = (size_t)n_heads * (size_t)head_dim + 3;
    a.n_out = (size_t)n_rows * (stride + 2);
    a.q = gauss(seed, (size_t)n_rows * stride);
    a.out = blank(a.n_out);
    a.args = (attend_args){.q = a.q,
                           .q_row_stride = stride,
                           .out = a.out,
                           .out_row_stride = stride + 2,
                           .n_rows = n_rows,
                           .n_heads = n_heads,
                           .head_dim = head_dim,
                           .first_position = first,
                           .window = window,
                           .scale = 1.0f / sqrtf((float)head_dim),
                           .pool = a.pool,
                           .block_floats = block_floats,
                           .block_ids = a.ids};
    return a;
}

static void attention_free(attention *a)
{
    free(a->q), free(a->pool), free(a->out), free(a->ids);
}

static void check_attention(attention *a)
{
    scalar->attend(&a->args);
    for (int c = 0; c < n_candidates; c++) {
        attention other = *a;
        other.args.out = blank(a->n_out);
        candidates[c].table->attend(&other.args);
        assert_same(other.args.out, a->out, a->n_out, candidates[c].table->name, "attention");
        free(other.args.out);
    }
}

static void attention_equals_definition(void **state)
{
    (void)state;
    static const int dims[] = {1, 7, 16, 20, 32, 48, 64, 80, 128};
    uint64_t seed = 10;
    for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++)
        for (int round = 0; round < 24; round++) {
            int window = round % 3 == 2 ? 1 + support_below(&seed, 80) : 0;
            attention a = attention_make(&seed, 1 + round % 9, dims[d], support_below(&seed, 130),
                                         1 + support_below(&seed, round % 2 ? 40 : 4), window);
            check_attention(&a);
            attention_free(&a);
        }
}

/* Row by row, as decode does it, against the whole prefill. */
static void prefill_equals_decode(void **state)
{
    (void)state;
    uint64_t seed = 11;
    for (int window = 0; window <= 50; window += 25) {
        attention a = attention_make(&seed, 3, 24, 5, 120, window);
        for (int c = -1; c < n_candidates; c++) {
            const kernel_table *t = c < 0 ? scalar : candidates[c].table;
            float *alone = blank(a.n_out);
            t->attend(&a.args);
            for (int i = 0; i < a.args.n_rows; i++) {
                attend_args one = a.args;
                one.q += (size_t)i * one.q_row_stride;
                one.out = alone + (size_t)i * one.out_row_stride;
                one.n_rows = 1, one.first_position += i;
                t->attend(&one);
            }
            assert_same(alone, a.out, a.n_out, t->name, "row by row");
            free(alone);
        }
        attention_free(&a);
    }
}

/* The definition against softmax(q K^T) V in double. */
static void attention_is_softmax_of_scores(void **state)
{
    (void)state;
    uint64_t seed = 12;
    enum { DIM = 20, HEADS = 2, ROWS = 70, FIRST = 9 };
    for (int window = 0; window <= 40; window += 20) {
        attention a = attention_make(&seed, HEADS, DIM, FIRST, ROWS, window);
        scalar->attend(&a.args);
        for (int i = 0; i < ROWS; i++)
            for (int h = 0; h < HEADS; h++) {
                const float *q = a.args.q + (size_t)i * a.args.q_row_stride + h * DIM;
                const float *out = a.args.out + (size_t)i * a.args.out_row_stride + h * DIM;
                int position = FIRST + i, first = window && position >= window ? position - window + 1 : 0;
                double sum = 0, value[DIM] = {0};
                for (int p = first; p <= position; p++) {
                    const float *keys = a.args.pool + (size_t)a.ids[p / KV_BLOCK] * a.args.block_floats;
                    double score = 0;
                    for (int d = 0; d < DIM; d++)
                        score += (double)q[d] * (double)keys[d * KV_BLOCK + p % KV_BLOCK];
                    double weight = exp(score * (double)a.args.scale);
                    sum += weight;
                    for (int d = 0; d < DIM; d++)
                        value[d] += weight * (double)keys[DIM * KV_BLOCK + p % KV_BLOCK * DIM + d];
                }
                for (int d = 0; d < DIM; d++)
                    assert_true(fabs((double)out[d] - value[d] / sum) < 1e-5);
            }
        attention_free(&a);
    }
}

/* ---- the choice ---- */

static void pick_obeys_the_environment(void **state)
{
    (void)state;
    char *before = getenv("CONVOKE_ISA") ? strdup(getenv("CONVOKE_ISA")) : NULL;
    kernel_isa isa = N_ISAS;
    setenv("CONVOKE_ISA", "scalar", 1);
    assert_int_equal(kernels_pick(&isa), STATUS_OK);
    assert_int_equal(isa, ISA_SCALAR);
    setenv("CONVOKE_ISA", "mmx", 1);
    assert_int_equal(kernels_pick(&isa), STATUS_USAGE);
    assert_non_null(strstr(status_message(), "mmx"));
    assert_int_equal(isa, ISA_SCALAR);
    for (int i = 0; i < N_ISAS; i++) {
        setenv("CONVOKE_ISA", kernel_isa_name((kernel_isa)i), 1);
        assert_int_equal(kernels_pick(&isa), kernels_of((kernel_isa)i) ? STATUS_OK : STATUS_UNSUPPORTED);
    }
    unsetenv("CONVOKE_ISA");
    assert_int_equal(kernels_pick(&isa), STATUS_OK);
    for (int i = isa + 1; i < ISA_AVX512BF16; i++) /* which is never chosen unasked */
        assert_null(kernels_of((kernel_isa)i));
    assert_true(isa < ISA_AVX512BF16);
    assert_string_equal(kernels_of(isa)->name, kernel_isa_name(isa));
    if (before)
        setenv("CONVOKE_ISA", before, 1);
    free(before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"the definition is the product", definition_is_the_product, NULL, NULL, NULL},
        {"the reduction follows the tree", reduction_follows_the_tree, NULL, NULL, NULL},
        {"products equal the definition bit for bit: every small m, n, k", products_equal_definition, NULL, NULL, NULL},
        {"products equal the definition: random shapes, strides, alignments", random_shapes_equal_definition, NULL, NULL, NULL},
        {"products equal the definition: shapes larger than the blocks", large_shapes_equal_definition, NULL, NULL, NULL},
        {"products equal the definition: infinities, NaN, zeros, subnormals", special_values_equal_definition, NULL, NULL, NULL},
        {"how rows and outputs are cut between calls changes nothing", cuts_change_nothing, NULL, NULL, NULL},
        {"every fp16 and bf16 number is read exactly", every_half_is_read_exactly, NULL, NULL, NULL},
        {"exp is within 2 ulp", exp_is_within_two_ulp, NULL, NULL, NULL},
        {"norm, swiglu, softmax, log-sum-exp equal double arithmetic closely", rows_equal_double, NULL, NULL, NULL},
        {"norm, swiglu, softmax, log-sum-exp equal the definition bit for bit", rows_equal_definition, NULL, NULL, NULL},
        {"the sum of no probability has logarithm -infinity", empty_probability_is_minus_infinity, NULL, NULL, NULL},
        {"attention is softmax of scores", attention_is_softmax_of_scores, NULL, NULL, NULL},
        {"attention equals the definition bit for bit, and what is hidden may be NaN", attention_equals_definition, NULL, NULL,
         NULL},
        {"prefill equals decode bit for bit", prefill_equals_decode, NULL, NULL, NULL},
        {"the choice obeys CONVOKE_ISA and refuses by name", pick_obeys_the_environment, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, collect, NULL);
}
