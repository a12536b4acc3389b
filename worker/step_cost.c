#include "worker/step_cost.h"

#include <math.h>
#include <string.h>

/* An observation may pull its kind's mean by this share at least, and exceed what was expected by this factor at most. */
#define PULL        0.12
#define MOST_EXCESS 1.5
#define RIDGE       1e-4 /* of a factor's own weight: decides where steps alone cannot, towards zero */

void step_cost_init(step_cost *c, double touch)
{
    memset(c, 0, sizeof *c);
    c->touch = touch;
}

double step_cost_share(double busiest_rank, double all_ranks, int n_ranks)
{
    return (busiest_rank + all_ranks / n_ranks) / 2;
}

static void features(const step_cost *c, const step_load *load, double *x)
{
    x[0] = 1;
    x[1] = c->touch > 0 ? 1 - pow(1 - c->touch, load->total_rows) : 0;
    x[2] = load->decode_rows;
    x[3] = load->prefill_rows;
    x[4] = load->positions;
}

static int kind_of(double rows)
{
    int kind = rows > 0 ? 1 + (int)ceil(log2(rows > 1 ? rows : 1)) : 0;
    return kind < STEP_KINDS ? kind : STEP_KINDS - 1;
}

/* ---- the fit ------------------------------------------------------------------------------------------------------------- */

typedef struct {
    double a[STEP_FACTORS][STEP_FACTORS], b[STEP_FACTORS];
} normal_equations;

static void add_kind(normal_equations *e, const step_cost *c, const step_kind *k)
{
    double weight = k->n < 8 ? k->n : 8, far = c->focus > 0 ? 2 * c->focus / k->seconds : 1;
    weight /= k->seconds * k->seconds;
    weight *= far < 1 ? far * far : 1;
    for (int i = 0; i < STEP_FACTORS; i++) {
        e->b[i] += weight * k->x[i] * k->seconds;
        for (int j = 0; j < STEP_FACTORS; j++)
            e->a[i][j] += weight * k->x[i] * k->x[j];
    }
}

/* Gaussian elimination over the factors in use; the ridge makes the matrix positive definite, so no pivoting is needed. */
static void solve(const normal_equations *e, const bool *use, double *out)
{
    double m[STEP_FACTORS][STEP_FACTORS + 1];
    int at[STEP_FACTORS], n = 0;
    for (int i = 0; i < STEP_FACTORS; i++) {
        out[i] = 0;
        if (use[i])
            at[n++] = i;
    }
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++)
            m[i][j] = e->a[at[i]][at[j]] * (i == j ? 1 + RIDGE : 1);
        m[i][n] = e->b[at[i]];
    }
    for (int i = 0; i < n; i++)
        for (int r = i + 1; r < n; r++) {
            double f = m[r][i] / m[i][i];
            for (int j = i; j <= n; j++)
                m[r][j] -= f * m[i][j];
        }
    for (int i = n - 1; i >= 0; i--) {
        double sum = m[i][n];
        for (int j = i + 1; j < n; j++)
            sum -= m[i][j] * out[at[j]];
        out[at[i]] = sum / m[i][i];
    }
}

/* Leaves out the most negative factor until none is: a step never gets shorter by more rows. */
static void fit(step_cost *c)
{
    normal_equations e = {0};
    bool use[STEP_FACTORS];
    for (int d = 0; d < STEP_KINDS; d++)
        for (int p = 0; p < STEP_KINDS; p++)
            if (c->kinds[d][p].n > 0)
                add_kind(&e, c, &c->kinds[d][p]);
    for (int i = 0; i < STEP_FACTORS; i++)
        use[i] = e.a[i][i] > 0;
    for (int round = 0; round < STEP_FACTORS; round++) {
        solve(&e, use, c->factors);
        int worst = -1;
        for (int i = 0; i < STEP_FACTORS; i++)
            if (c->factors[i] < 0 && (worst < 0 || c->factors[i] * e.b[i] < c->factors[worst] * e.b[worst]))
                worst = i;
        if (worst < 0)
            break;
        use[worst] = false;
        c->factors[worst] = 0;
    }
}

/* ---- steps ----------------------------------------------------------------------------------------------------------------- */

void step_cost_add(step_cost *c, const step_load *load, double seconds)
{
    double x[STEP_FACTORS], expected = step_cost_predict(c, load);
    if (!(seconds > 0))
        return;
    features(c, load, x);
    step_kind *k = &c->kinds[kind_of(load->decode_rows)][kind_of(load->prefill_rows)];
    if (k->n >= 3 && seconds > MOST_EXCESS * expected && expected > 0)
        seconds = MOST_EXCESS * expected;
    /* A first step may have waited for pages from disk: a much shorter one takes its place. */
    if (k->n > 0 && k->n < 3 && seconds < k->seconds / MOST_EXCESS)
        k->n = 0;
    k->n = k->n < 1000 ? k->n + 1 : k->n;
    double pull = 1.0 / k->n > PULL ? 1.0 / k->n : PULL;
    for (int i = 0; i < STEP_FACTORS; i++)
        k->x[i] += pull * (x[i] - k->x[i]);
    k->seconds += pull * (seconds - k->seconds);
    c->known = true;
    fit(c);
}

double step_cost_predict(const step_cost *c, const step_load *load)
{
    double x[STEP_FACTORS], sum = 0;
    features(c, load, x);
    for (int i = 0; i < STEP_FACTORS; i++)
        sum += c->factors[i] * x[i];
    return sum;
}
