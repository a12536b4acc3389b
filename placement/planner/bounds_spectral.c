/* bounds_spectral.c - a lower bound on R-flow from singular values (after Donath and Hoffman, Lower bounds for the partitioning
 * of graphs, 1973).
 *
 * Let X and Y say which of M parts (ranks, or nodes) hold the experts of two neighbouring layers. The flow that stays in its
 * part is trace(X' R Y).
 *   All parts of one size m: with both mean vectors projected out of R, kept <= T / M + m * (sum of its M - 1 largest singular
 *   values), T the whole flow.
 *   Any sizes up to S: kept <= b * S * E + S * (sum of the M largest singular values of R - b), b = T / E^2, since the flow b
 *   between all pairs keeps at most b * (sum of products of sizes) and the parts' indicators have norms of at most sqrt(S).
 * What is not kept on ranks costs at least the shortest distance, and what is not kept on nodes the rest up to the shortest
 * distance between nodes: both levels add up.
 *
 * Singular values come from the symmetric eigenvalues of A'A (Householder tridiagonal form, then implicit QL), each raised by a
 * bound on the rounding error of the way, so that the result is proved up to the arithmetic of the last sums. */
#include "placement/planner/bounds.h"
#include "proto/clock.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- eigenvalues of a symmetric matrix ---- */

static double dot(const double *a, const double *b, int n)
{
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        s0 += a[i] * b[i];
        s1 += a[i + 1] * b[i + 1];
        s2 += a[i + 2] * b[i + 2];
        s3 += a[i + 3] * b[i + 3];
    }
    for (; i < n; i++)
        s0 += a[i] * b[i];
    return (s0 + s1) + (s2 + s3);
}

/* Reduces a [n][n], symmetric, to diagonal d and subdiagonal e (e[i] beside d[i - 1] and d[i]); a is destroyed. v, w [n]:
 * scratch.
 */
static void tridiagonalise(double *a, int n, double *d, double *e, double *v, double *w)
{
    for (int k = 0; k < n; k++) {
        double *row = a + (size_t)k * (size_t)n; /* by symmetry the column below the diagonal */
        d[k] = row[k];
        if (k + 1 == n)
            break;
        int m = n - k - 1;
        double *x = row + k + 1, length = sqrt(dot(x, x, m)), first = x[0];
        e[k + 1] = first > 0 ? -length : length;
        if (length == 0)
            continue;
        memcpy(v, x, (size_t)m * sizeof *v);
        v[0] -= e[k + 1];
        double norm2 = dot(v, v, m);
        if (norm2 == 0)
            continue;
        /* A <- H A H with H = 1 - 2 v v' / |v|^2: w = 2 A v / |v|^2, then A -= v q' + q v', q = w - (v'w / |v|^2) v */
        for (int i = 0; i < m; i++)
            w[i] = 2 * dot(a + (size_t)(k + 1 + i) * (size_t)n + k + 1, v, m) / norm2;
        double along = dot(v, w, m) / norm2;
        for (int i = 0; i < m; i++)
            w[i] -= along * v[i];
        for (int i = 0; i < m; i++) {
            double *to = a + (size_t)(k + 1 + i) * (size_t)n + k + 1, vi = v[i], wi = w[i];
            for (int j = 0; j < m; j++)
                to[j] -= vi * w[j] + wi * v[j];
        }
    }
}

/* Implicit QL with Wilkinson's shift; eigenvalues into d. False when one does not settle. */
static bool ql(double *d, double *e, int n)
{
    for (int i = 1; i < n; i++)
        e[i - 1] = e[i];
    e[n - 1] = 0;
    double norm = 0; /* what is below its last digit is nothing: zero eigenvalues would else never settle */
    for (int i = 0; i < n; i++)
        norm = fmax(norm, fabs(d[i]) + fabs(e[i]));
    for (int l = 0; l < n; l++)
        for (int tries = 0;; tries++) {
            int m = l;
            while (m + 1 < n && fabs(e[m]) > DBL_EPSILON * norm)
                m++;
            if (m == l)
                break;
            if (tries == 60)
                return false;
            double g = (d[l + 1] - d[l]) / (2 * e[l]), r = hypot(g, 1), s = 1, c = 1, p = 0;
            g = d[m] - d[l] + e[l] / (g + copysign(r, g));
            int i = m - 1;
            for (; i >= l; i--) {
                double f = s * e[i], b = c * e[i];
                r = hypot(f, g);
                e[i + 1] = r;
                if (r == 0) {
                    d[i + 1] -= p;
                    e[m] = 0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
            }
            if (r == 0 && i >= l)
                continue;
            d[l] -= p;
            e[l] = g;
            e[m] = 0;
        }
    return true;
}

static int compare_falling(const void *x, const void *y)
{
    double a = *(const double *)x, b = *(const double *)y;
    return (a < b) - (a > b);
}

typedef struct {
    int n;
    double *a, *gram, *d, *e, *v, *w;
} spectrum;

static status spectrum_open(int n, spectrum *s)
{
    size_t square = (size_t)n * (size_t)n;
    *s = (spectrum){.n = n, .a = malloc((2 * square + 4 * (size_t)n) * sizeof(double))};
    if (!s->a)
        return status_fail(STATUS_NO_MEMORY, "no memory for singular values of %d experts", n);
    s->gram = s->a + square;
    s->d = s->gram + square;
    s->e = s->d + n;
    s->v = s->e + n;
    s->w = s->v + n;
    return STATUS_OK;
}

/* Singular values of s->a, falling, none below the true one, into s->d. Falls back to the sum of squares, shared evenly, which
 * bounds every sum of the k largest by Cauchy and Schwarz only for k = n: so then each is the whole norm. */
static void singular_values(spectrum *s)
{
    int n = s->n;
    double norm2 = 0;
    for (int i = 0; i < n; i++)
        norm2 += dot(s->a + (size_t)i * (size_t)n, s->a + (size_t)i * (size_t)n, n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++)
            s->gram[(size_t)i * (size_t)n + (size_t)j] = s->gram[(size_t)j * (size_t)n + (size_t)i] =
                dot(s->a + (size_t)i * (size_t)n, s->a + (size_t)j * (size_t)n, n);
    tridiagonalise(s->gram, n, s->d, s->e, s->v, s->w);
    bool settled = ql(s->d, s->e, n);
    double error = 64.0 * n * DBL_EPSILON * norm2; /* Gram matrix, reflections and rotations together, with room */
    for (int i = 0; i < n; i++)
        s->d[i] = settled ? sqrt(fmax(s->d[i], 0) + error) : sqrt(norm2);
    qsort(s->d, (size_t)n, sizeof *s->d, compare_falling);
}

/* ---- one layer pair ---- */

/* How parts are filled: M of them, none with more than `most` experts; `equal`: all with exactly that many in every plan. */
typedef struct {
    int n;
    double most;
    bool equal;
} parts;

static double sum_first(const double *values, int n, int most)
{
    double sum = 0;
    for (int i = 0; i < n && i < most; i++)
        sum += values[i];
    return sum;
}

static double upper(double all, double kept)
{
    kept *= 1 + 1e-12;
    return kept < all ? kept : all;
}

static void centre(const double *pairs, int n, bool both, double mean, double *row, double *column, double *out)
{
    for (int i = 0; i < n; i++)
        row[i] = column[i] = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            row[i] += pairs[(size_t)i * (size_t)n + (size_t)j] / n;
            column[j] += pairs[(size_t)i * (size_t)n + (size_t)j] / n;
        }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            size_t at = (size_t)i * (size_t)n + (size_t)j;
            out[at] = both ? pairs[at] - row[i] - column[j] + mean : pairs[at] - mean;
        }
}

/* Upper bounds on what stays within its part, for two levels: ranks and nodes. */
static void most_kept(const double *pairs, double all, spectrum *s, const parts level[2], double kept[2])
{
    int n = s->n;
    double mean = all / ((double)n * n);
    for (int both = 0; both < 2; both++) {
        bool wanted = false;
        for (int i = 0; i < 2; i++)
            wanted |= level[i].equal == (both == 1);
        if (!wanted)
            continue;
        centre(pairs, n, both, mean, s->v, s->w, s->a);
        singular_values(s);
        for (int i = 0; i < 2; i++)
            if (level[i].equal && both)
                kept[i] = upper(all, all / level[i].n + level[i].most * sum_first(s->d, n, level[i].n - 1));
            else if (!level[i].equal && !both)
                kept[i] = upper(all, mean * level[i].most * n + level[i].most * sum_first(s->d, n, level[i].n));
    }
}

typedef struct {
    const problem *p;
    double near, far; /* shortest distances between ranks, and between ranks of different nodes */
    double *of_pair;  /* [n_layers - 1] */
    double deadline;
} spectral;

/* The parts of two neighbouring layers: equal only if every rank's (or node's) room is filled to the last place in both. */
static void find_parts(const problem *p, int l, parts level[2])
{
    const topology *t = p->topology;
    level[0] = (parts){p->n_ranks, 0, true};
    level[1] = (parts){t->n_nodes, 0, true};
    for (int k = l; k <= l + 1; k++) {
        const int *slots = p->slots + (size_t)k * (size_t)p->n_ranks;
        int64_t room = 0;
        for (int g = 0; g < p->n_ranks; g++)
            room += slots[g];
        for (int d = 0; d < t->n_nodes; d++) {
            double of_node = 0;
            for (int g = 0; g < p->n_ranks; g++)
                of_node += t->node_of_rank[g] == d ? slots[g] : 0;
            level[1].equal &= of_node * t->n_nodes == p->n_experts && room == p->n_experts;
            level[1].most = fmax(level[1].most, of_node);
        }
        for (int g = 0; g < p->n_ranks; g++) {
            level[0].equal &= (int64_t)slots[g] * p->n_ranks == p->n_experts && room == p->n_experts;
            level[0].most = fmax(level[0].most, slots[g]);
        }
    }
    for (int i = 0; i < 2; i++)
        level[i].most = fmin(level[i].most, p->n_experts);
}

static status bound_pair(void *arg, int l)
{
    spectral *b = arg;
    const problem *p = b->p;
    size_t square = (size_t)p->n_experts * (size_t)p->n_experts;
    const double *pairs = p->next_pairs + (size_t)l * square;
    double all = 0, kept[2];
    parts level[2];
    spectrum s;
    b->of_pair[l] = 0; /* what no time is left for counts with what is always true */
    for (size_t i = 0; i < square; i++)
        all += pairs[i];
    if (all <= 0 || (b->deadline > 0 && clock_seconds() > b->deadline))
        return STATUS_OK;
    TRY(spectrum_open(p->n_experts, &s));
    find_parts(p, l, level);
    kept[0] = kept[1] = all;
    most_kept(pairs, all, &s, level, kept);
    b->of_pair[l] = (b->near * (all - kept[0]) + (b->far - b->near) * (all - kept[1])) / all;
    free(s.a);
    return STATUS_OK;
}

status bounds_spectral(const problem *p, double seconds, plan_bounds *out)
{
    if (!p->next_pairs || p->n_layers < 2) {
        out->flow_spectral = p->next_pairs ? 0 : NAN;
        return STATUS_OK;
    }
    spectral b = {.p = p, .near = INFINITY, .far = INFINITY, .deadline = seconds > 0 ? clock_seconds() + seconds : 0};
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            double d = p->distance[g * p->n_ranks + h];
            if (g != h)
                b.near = fmin(b.near, d);
            if (p->topology->node_of_rank[g] != p->topology->node_of_rank[h])
                b.far = fmin(b.far, d);
        }
    b.near = isfinite(b.near) ? b.near : 0; /* a single rank; a single node */
    b.far = isfinite(b.far) ? b.far : b.near;
    b.of_pair = calloc((size_t)p->n_layers, sizeof *b.of_pair);
    if (!b.of_pair)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    status st = parallel_for(p->request->threads, p->n_layers - 1, bound_pair, &b);
    double sum = 0;
    for (int l = 0; l + 1 < p->n_layers; l++)
        sum += b.of_pair[l];
    if (st == STATUS_OK)
        out->flow_spectral = sum / (p->n_layers - 1) * (1 - 1e-9);
    free(b.of_pair);
    return st;
}
