#include "placement/drift.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

static uint64_t total_of(const uint64_t *counts, int n)
{
    uint64_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += counts[i];
    return sum;
}

static bool all_equal(const uint64_t *counts, int n)
{
    for (int i = 1; i < n; i++)
        if (counts[i] != counts[0])
            return false;
    return true;
}

/* As shares of their sums, so that no product leaves the range in which doubles are exact enough. */
static double cosine_of(int n, const uint64_t *a, double sum_a, const uint64_t *b, double sum_b)
{
    double ab = 0, aa = 0, bb = 0;
    for (int i = 0; i < n; i++) {
        double x = (double)a[i] / sum_a, y = (double)b[i] / sum_b;
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    double cosine = ab / (sqrt(aa) * sqrt(bb));
    return cosine < 1 ? cosine : 1;
}

/* Twice the mean rank of counts[i], less n + 1: whole numbers that add up to 0. */
static double centred_rank(const uint64_t *counts, int n, int i)
{
    int below = 0, above = 0;
    for (int j = 0; j < n; j++) {
        below += counts[j] < counts[i];
        above += counts[j] > counts[i];
    }
    return below - above;
}

static double spearman_of(int n, const uint64_t *a, const uint64_t *b)
{
    double ab = 0, aa = 0, bb = 0;
    for (int i = 0; i < n; i++) {
        double x = centred_rank(a, n, i), y = centred_rank(b, n, i);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    return ab / (sqrt(aa) * sqrt(bb));
}

void drift_compare(int n_layers, int n_experts, const uint64_t *plan_counts, const uint64_t *live_counts, drift_of_layer *out)
{
    for (int l = 0; l < n_layers; l++) {
        const uint64_t *a = plan_counts + (size_t)l * (size_t)n_experts, *b = live_counts + (size_t)l * (size_t)n_experts;
        double sum_a = (double)total_of(a, n_experts), sum_b = (double)total_of(b, n_experts);
        out[l] = (drift_of_layer){1, 1};
        if (sum_a == 0 || sum_b == 0)
            continue;
        out[l].cosine = cosine_of(n_experts, a, sum_a, b, sum_b);
        bool flat_a = all_equal(a, n_experts), flat_b = all_equal(b, n_experts);
        out[l].spearman = flat_a || flat_b ? (flat_a && flat_b) : spearman_of(n_experts, a, b);
    }
}

double drift_level(int n_layers, const drift_of_layer *layers)
{
    double least = 1;
    for (int l = 0; l < n_layers; l++)
        least = layers[l].cosine < least ? layers[l].cosine : least;
    return 1 - least;
}
