/* test_drift.c - how far traffic has moved: 0 for the same, and the figures as textbooks define them. */
#include "placement/drift.h"
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { E = 40, L = 5 };

/* Mean of the ranks that equal counts share, counting from 1. */
static double mean_rank(const uint64_t *counts, int n, int i)
{
    double below = 0, equal = 0;
    for (int j = 0; j < n; j++) {
        below += counts[j] < counts[i];
        equal += counts[j] == counts[i];
    }
    return below + (equal + 1) / 2;
}

static double pearson(int n, const double *x, const double *y)
{
    double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
    for (int i = 0; i < n; i++) {
        mx += x[i] / n;
        my += y[i] / n;
    }
    for (int i = 0; i < n; i++) {
        xy += (x[i] - mx) * (y[i] - my);
        xx += (x[i] - mx) * (x[i] - mx);
        yy += (y[i] - my) * (y[i] - my);
    }
    return xy / sqrt(xx * yy);
}

static void figures_are_the_textbooks(void **state)
{
    (void)state;
    uint64_t seed = 31;
    for (int round = 0; round < 100; round++) {
        uint64_t a[L * E], b[L * E];
        drift_of_layer out[L];
        double least = 1;
        int range = 1 + support_below(&seed, 50); /* few values: many ties */
        for (int i = 0; i < L * E; i++) {
            a[i] = (uint64_t)support_below(&seed, range + 1) + (i % E == 0);
            b[i] = (uint64_t)support_below(&seed, range + 1) * 1000003 + (i % E == 1);
        }
        drift_compare(L, E, a, b, out);
        for (int l = 0; l < L; l++) {
            double ab = 0, aa = 0, bb = 0, x[E], y[E];
            for (int e = 0; e < E; e++) {
                double p = (double)a[l * E + e], q = (double)b[l * E + e];
                ab += p * q;
                aa += p * p;
                bb += q * q;
                x[e] = mean_rank(a + l * E, E, e);
                y[e] = mean_rank(b + l * E, E, e);
            }
            assert_true(fabs(out[l].cosine - ab / sqrt(aa * bb)) < 1e-12);
            assert_true(fabs(out[l].spearman - pearson(E, x, y)) < 1e-12);
            least = out[l].cosine < least ? out[l].cosine : least;
        }
        assert_true(drift_level(L, out) == 1 - least);
    }
}

static void same_traffic_has_not_drifted(void **state)
{
    (void)state;
    uint64_t seed = 32, a[L * E], b[L * E];
    drift_of_layer out[L];
    for (int i = 0; i < L * E; i++) {
        a[i] = (uint64_t)support_below(&seed, 1000);
        b[i] = a[i] * 17; /* more of the same */
    }
    drift_compare(L, E, a, b, out);
    assert_true(fabs(drift_level(L, out)) < 1e-12);
    for (int l = 0; l < L; l++)
        assert_true(fabs(out[l].spearman - 1) < 1e-12);
    uint64_t left[4] = {5, 5, 0, 0}, right[4] = {0, 0, 7, 7};
    drift_compare(1, 4, left, right, out);
    assert_true(out[0].cosine == 0 && fabs(out[0].spearman + 1) < 1e-12 && drift_level(1, out) == 1);
}

static void edges_are_as_said(void **state)
{
    (void)state;
    const uint64_t none[3] = {0, 0, 0}, flat[3] = {4, 4, 4}, steep[3] = {1, 2, 3}, huge[3] = {UINT64_MAX / 3, 1, 2};
    drift_of_layer out;
    drift_compare(1, 3, none, steep, &out);
    assert_true(out.cosine == 1 && out.spearman == 1);
    drift_compare(1, 3, steep, none, &out);
    assert_true(out.cosine == 1 && out.spearman == 1);
    drift_compare(1, 3, flat, flat, &out);
    assert_true(fabs(out.cosine - 1) < 1e-12 && out.spearman == 1);
    drift_compare(1, 3, flat, steep, &out);
    assert_true(out.cosine < 1 && out.spearman == 0);
    drift_compare(1, 3, huge, huge, &out);
    assert_true(fabs(out.cosine - 1) < 1e-12 && isfinite(out.spearman));
    assert_true(drift_level(0, &out) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"cosine and Spearman are the textbooks', ties averaged; the level is the worst layer's", figures_are_the_textbooks, NULL,
         NULL, NULL},
        {"more of the same has not drifted; disjoint traffic has entirely", same_traffic_has_not_drifted, NULL, NULL, NULL},
        {"layers without counts, flat counts, huge counts", edges_are_as_said, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
