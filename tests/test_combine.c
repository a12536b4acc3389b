/* test_combine.c - the three ways to add up a row, against sums in double and in plain loops, on every instruction set. */
#include "router/combine.h"
#include "tests/support.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_N 301
#define MAX_K 16

typedef struct {
    int n, k, exponent;
    float y[MAX_K][MAX_N]; /* expert i's output */
    float weight[MAX_K];
    float h[MAX_N];
} row_case;

static float power(int e)
{
    return ldexpf(1, e);
}

/* Experts about as large as a residual row of size `scale`; `wild` elements in 1000 are huge, infinite or NaN. */
static void fill(row_case *c, uint64_t *seed, float scale, int wild)
{
    static const float strange[] = {INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX};
    for (int i = 0; i < c->n; i++)
        c->h[i] = scale * support_gauss(seed);
    c->exponent = combine_exponent(c->h, c->n, c->k);
    for (int e = 0; e < c->k; e++) {
        c->weight[e] = 0.05f + (float)support_below(seed, 1000) / 1000.0f;
        for (int i = 0; i < c->n; i++) {
            c->y[e][i] = scale * support_gauss(seed);
            if (support_below(seed, 1000) < wild)
                c->y[e][i] = support_below(seed, 2) ? strange[support_below(seed, 5)] : 1000 * scale * support_gauss(seed);
        }
    }
}

/* What fixed means, written plainly: which elements fit, their integer sum, then the others in rising expert order. */
static void fixed_reference(const row_case *c, float *out)
{
    int bits = 0;
    while ((1 << bits) < c->k)
        bits++;
    for (int i = 0; i < c->n; i++) {
        int64_t sum = 0;
        float spilled[MAX_K];
        int n_spilled = 0;
        for (int e = 0; e < c->k; e++) {
            volatile float v = c->weight[e] * c->y[e][i];
            double scaled = ldexp(v, c->exponent);
            if (fabs(scaled) < ldexp(1, 31 - bits))
                sum += (int64_t)nearbyint(scaled);
            else
                spilled[n_spilled++] = v;
        }
        out[i] = (float)ldexp((float)sum, -c->exponent);
        for (int s = 0; s < n_spilled; s++)
            out[i] += spilled[s];
    }
}

/* NaN may carry any payload; everything else must agree in every bit. */
static void assert_same_bits(const float *a, const float *b, int n)
{
    for (int i = 0; i < n; i++)
        if (!(isnan(a[i]) && isnan(b[i])) && memcmp(&a[i], &b[i], sizeof(float)) != 0)
            fail_msg("column %d: %a is not %a", i, (double)a[i], (double)b[i]);
}

/* Experts fall into `groups` partial sums at random, are added in random order with random column cuts, then merged in random
 * order. */
static void fixed_grouped(const row_case *c, uint64_t *seed, int groups, float *out)
{
    static int32_t acc[MAX_K][MAX_N];
    const int32_t *parts[MAX_K];
    spill_list spills[2] = {{0}, {0}}; /* as if two threads computed */
    memset(acc, 0, sizeof acc);
    int order[MAX_K];
    for (int e = 0; e < c->k; e++) {
        int at = support_below(seed, e + 1);
        order[e] = order[at];
        order[at] = e;
    }
    for (int i = 0; i < c->k; i++) {
        int e = order[i], cut = support_below(seed, c->n + 1);
        int32_t *into = acc[support_below(seed, groups)];
        assert_int_equal(combine_add_fixed(c->y[e], c->weight[e], c->exponent, c->k, 0, (uint16_t)e, cut, c->n, into, &spills[0]),
                         0);
        assert_int_equal(combine_add_fixed(c->y[e], c->weight[e], c->exponent, c->k, 0, (uint16_t)e, 0, cut, into, &spills[1]),
                         0);
    }
    int n_parts = groups;
    if (groups > 1 && support_below(seed, 2)) /* a node sums two of its ranks first */
        combine_merge_fixed(acc[--n_parts], (size_t)c->n, acc[0]);
    for (int g = 0; g < n_parts; g++)
        parts[g] = acc[(g + 1) % n_parts];
    combine_sum_fixed(parts, n_parts, c->exponent, c->n, out);
    size_t n = spills[0].n + spills[1].n;
    combine_spill *all = calloc(n + 1, sizeof *all);
    for (size_t i = 0; i < n; i++)
        all[i] = i < spills[0].n ? spills[0].items[i] : spills[1].items[i - spills[0].n];
    combine_sort_spills(all, n);
    combine_add_spills(all, n, out);
    free(all);
    spill_list_clear(&spills[0]);
    spill_list_clear(&spills[1]);
}

static void grouping_is_invisible(void **state)
{
    (void)state;
    uint64_t seed = 1;
    row_case *c = malloc(sizeof *c);
    for (int round = 0; round < 200; round++) {
        float want[MAX_N], got[MAX_N];
        c->n = 1 + support_below(&seed, MAX_N);
        c->k = 1 + support_below(&seed, MAX_K);
        fill(c, &seed, power(support_below(&seed, 40) - 20), round % 3 == 0 ? 30 : 0);
        fixed_reference(c, want);
        for (int base = 0; base < 2; base++) {
            combine_force_base(base);
            for (int shuffle = 0; shuffle < 4; shuffle++) {
                fixed_grouped(c, &seed, 1 + support_below(&seed, c->k), got);
                assert_same_bits(got, want, c->n);
            }
        }
    }
    combine_force_base(false);
    free(c);
}

static void fixed_error_is_bounded(void **state)
{
    (void)state;
    uint64_t seed = 2;
    row_case *c = malloc(sizeof *c);
    for (int round = 0; round < 100; round++) {
        c->n = MAX_N;
        c->k = 1 + support_below(&seed, MAX_K);
        fill(c, &seed, power(support_below(&seed, 60) - 30), 0);
        float got[MAX_N];
        fixed_grouped(c, &seed, c->k, got);
        for (int i = 0; i < c->n; i++) {
            double sum = 0, size = 0;
            for (int e = 0; e < c->k; e++) {
                sum += (double)c->weight[e] * (double)c->y[e][i];
                size += fabs((double)c->weight[e] * (double)c->y[e][i]);
            }
            /* each product rounded once to fp32 and once to a step; the sum once to fp32 */
            double bound = size * FLT_EPSILON / 2 + c->k * 0.5 * ldexp(1, -c->exponent) + fabs(sum) * FLT_EPSILON;
            assert_true(fabs((double)got[i] - sum) <= bound);
        }
    }
    free(c);
}

static void step_is_two_units_at_most(void **state)
{
    (void)state;
    uint64_t seed = 3;
    float h[64];
    for (int round = 0; round < 2000; round++) {
        int k = 1 + support_below(&seed, 128), bits = 0;
        float scale = power(support_below(&seed, 120) - 60), m = 0;
        for (int i = 0; i < 64; i++) {
            h[i] = scale * support_gauss(&seed);
            m = fmaxf(m, fabsf(h[i]));
        }
        while ((1 << bits) < k)
            bits++;
        double up = exp2(ceil(log2((double)m)));
        int s = combine_exponent(h, 64, k);
        assert_true(ldexp(1, s) * ldexp(up, FIXED_HEADROOM) == ldexp(1, 31 - bits));
        if (k <= 8)
            assert_true(ldexp(1, -s) <= 2 * (double)(nextafterf((float)up, INFINITY) - (float)up));
    }
    h[5] = power(7);
    for (int i = 0; i < 64; i++)
        h[i] = i == 5 ? -power(7) : 0;
    assert_int_equal(combine_exponent(h, 64, 1), 31 - FIXED_HEADROOM - 7); /* a power of two is its own rounding up */
}

static void strange_rows_have_an_exponent(void **state)
{
    (void)state;
    float zeros[9] = {0}, broken[9] = {1, 2, NAN}, endless[9] = {1, -INFINITY}, tiny[9] = {FLT_TRUE_MIN}, huge[9] = {-FLT_MAX};
    assert_int_equal(combine_exponent(zeros, 9, 4), 100);
    assert_int_equal(combine_exponent(broken, 9, 4), 0);
    assert_int_equal(combine_exponent(endless, 9, 4), 0);
    assert_int_equal(combine_exponent(tiny, 9, 4), 100);
    assert_int_equal(combine_exponent(huge, 9, 4), -100);
}

static void full_house_does_not_overflow(void **state)
{
    (void)state;
    for (int k = 1; k <= 128; k++) {
        int bits = 0;
        while ((1 << bits) < k)
            bits++;
        float edge = nextafterf(ldexpf(1, 31 - bits), 0), out[16];
        for (int sign = -1; sign <= 1; sign += 2) {
            float y[16];
            int32_t acc[16] = {0};
            const int32_t *part = acc;
            spill_list spills = {0};
            for (int i = 0; i < 16; i++)
                y[i] = (float)sign * edge;
            for (int e = 0; e < k; e++)
                assert_int_equal(combine_add_fixed(y, 1, 0, k, 0, (uint16_t)e, 0, 16, acc, &spills), STATUS_OK);
            assert_int_equal(spills.n, 0);
            combine_sum_fixed(&part, 1, 0, 16, out);
            assert_true((double)out[3] == (double)(float)(sign * (double)edge * k));
        }
    }
}

static void limit_is_exclusive(void **state)
{
    (void)state;
    for (int base = 0; base < 2; base++) {
        combine_force_base(base);
        int32_t acc[20] = {0};
        float y[20];
        spill_list spills = {0};
        for (int i = 0; i < 20; i++)
            y[i] = i % 2 ? -power(29) : nextafterf(power(29), 0);
        assert_int_equal(combine_add_fixed(y, 1, 0, 4, 7, 3, 0, 20, acc, &spills), STATUS_OK);
        assert_int_equal(spills.n, 10);
        for (size_t i = 0; i < 10; i++) {
            assert_int_equal(spills.items[i].row, 7);
            assert_int_equal(spills.items[i].expert, 3);
            assert_int_equal(spills.items[i].column, 2 * i + 1);
            assert_true(spills.items[i].value == -power(29));
            assert_int_equal(acc[2 * i + 1], 0);
        }
        spill_list_clear(&spills);
    }
    combine_force_base(false);
}

static void only_the_named_columns(void **state)
{
    (void)state;
    float y[64], facc[64];
    int32_t iacc[64];
    spill_list spills = {0};
    for (int i = 0; i < 64; i++)
        y[i] = 1;
    for (int first = 0; first < 64; first += 3)
        for (int last = first; last <= 64; last += 5) {
            memset(iacc, 0, sizeof iacc);
            memset(facc, 0, sizeof facc);
            combine_add_fixed(y, 2, 0, 1, 0, 0, first, last, iacc, &spills);
            combine_add_fast(y, 2, first, last, facc);
            for (int i = 0; i < 64; i++) {
                assert_int_equal(iacc[i], i >= first && i < last ? 2 : 0);
                assert_true(facc[i] == (i >= first && i < last ? 2.0f : 0.0f));
            }
        }
    spill_list_clear(&spills);
}

static void exact_is_the_sequential_sum(void **state)
{
    (void)state;
    uint64_t seed = 5;
    row_case *c = malloc(sizeof *c);
    for (int round = 0; round < 100; round++) {
        c->n = 1 + support_below(&seed, MAX_N);
        c->k = 1 + support_below(&seed, MAX_K);
        fill(c, &seed, 1, round % 5 ? 0 : 5);
        for (int base = 0; base < 2; base++) {
            static float stored[MAX_K][MAX_N], fast[MAX_N], got[MAX_N], want[MAX_N];
            const float *parts[MAX_K];
            combine_force_base(base);
            memset(fast, 0, sizeof fast);
            memset(want, 0, sizeof want);
            for (int e = 0; e < c->k; e++) {
                parts[e] = stored[e];
                combine_store_exact(c->y[e], c->weight[e], 0, c->n, stored[e]);
                combine_add_fast(c->y[e], c->weight[e], 0, c->n, fast);
                for (int i = 0; i < c->n; i++) {
                    volatile float v = c->weight[e] * c->y[e][i];
                    want[i] += v;
                }
            }
            combine_sum_floats(parts, c->k, c->n, got);
            assert_same_bits(got, want, c->n);
            assert_same_bits(fast, want, c->n); /* one rank alone: fast is exact */
            memset(fast, 0, sizeof fast);
            for (int e = 0; e < c->k; e++)
                combine_merge_fast(stored[e], (size_t)c->n, fast);
            assert_same_bits(fast, want, c->n);
        }
    }
    combine_force_base(false);
    free(c);
}

static void no_parts_make_zeros(void **state)
{
    (void)state;
    float out[33];
    memset(out, 0xff, sizeof out);
    combine_sum_fixed(NULL, 0, 5, 33, out);
    for (int i = 0; i < 33; i++)
        assert_true(out[i] == 0 && !signbit(out[i]));
    memset(out, 0xff, sizeof out);
    combine_sum_floats(NULL, 0, 33, out);
    for (int i = 0; i < 33; i++)
        assert_true(out[i] == 0 && !signbit(out[i]));
}

static int by_key(const void *left, const void *right)
{
    const combine_spill *a = left, *b = right;
    if (a->row != b->row)
        return a->row < b->row ? -1 : 1;
    if (a->expert != b->expert)
        return a->expert < b->expert ? -1 : 1;
    return a->column < b->column ? -1 : a->column > b->column;
}

static void spills_are_sorted(void **state)
{
    (void)state;
    uint64_t seed = 6;
    for (int n = 0; n < 400; n = n < 8 ? n + 1 : n * 2 - 1) {
        combine_spill *a = calloc((size_t)n + 1, sizeof *a), *b = calloc((size_t)n + 1, sizeof *b);
        for (int i = 0; i < n; i++) {
            int key = i * 7919 % 1009; /* distinct keys */
            a[i] = (combine_spill){
                .row = (uint32_t)(key / 100), .expert = (uint16_t)(key / 10 % 10), .column = (uint32_t)(key % 10)};
            a[i].value = support_gauss(&seed);
        }
        memcpy(b, a, (size_t)n * sizeof *a);
        combine_sort_spills(a, (size_t)n);
        qsort(b, (size_t)n, sizeof *b, by_key);
        assert_memory_equal(a, b, (size_t)n * sizeof *a + 1);
        free(a);
        free(b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"fixed: any grouping, order, column cut and instruction set gives the reference's bits, spills included",
         grouping_is_invisible, NULL, NULL, NULL},
        {"fixed: within half a step per contribution of the sum in double", fixed_error_is_bounded, NULL, NULL, NULL},
        {"fixed: the exponent leaves the headroom; for k <= 8 its step is at most two units of the row's largest element",
         step_is_two_units_at_most, NULL, NULL, NULL},
        {"rows of zeros, NaN, infinity, tiny and huge values have an exponent in range", strange_rows_have_an_exponent, NULL,
         NULL, NULL},
        {"fixed: k contributions at the limit do not overflow, k up to 128", full_house_does_not_overflow, NULL, NULL, NULL},
        {"fixed: the limit itself spills, with its row, expert and column", limit_is_exclusive, NULL, NULL, NULL},
        {"only the named columns change", only_the_named_columns, NULL, NULL, NULL},
        {"exact is the sum in expert order; fast on one rank is the same", exact_is_the_sequential_sum, NULL, NULL, NULL},
        {"no parts make a row of +0", no_parts_make_zeros, NULL, NULL, NULL},
        {"spills are sorted by row, expert, column", spills_are_sorted, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
