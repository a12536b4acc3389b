/* test_lp.c - GLPK in children: right answers, limits that hold, and nothing left behind. */
#include "placement/planner/lp.h"
#include "proto/clock.h"
#include "tests/support.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static lp_model *create(void)
{
    lp_model *m = NULL;
    assert_int_equal(lp_create(&m), STATUS_OK);
    return m;
}

static lp_result solve(const lp_model *m, lp_options options)
{
    lp_result r;
    assert_int_equal(lp_solve(m, &options, &r), STATUS_OK);
    return r;
}

/* Random programmes kept densely beside the model, so that the test computes with its own copy. */
enum { MAX_COLUMNS = 9, MAX_ROWS = 5 };
typedef struct {
    int n, rows;
    double cost[MAX_COLUMNS], high[MAX_COLUMNS], a[MAX_ROWS][MAX_COLUMNS], least[MAX_ROWS];
    lp_model *model;
} dense;

/* min cost x, a x >= least, 0 <= x <= high; feasible at x = high. */
static dense random_programme(uint64_t *seed, bool integer)
{
    dense d = {.n = 2 + support_below(seed, MAX_COLUMNS - 1), .rows = 1 + support_below(seed, MAX_ROWS), .model = create()};
    for (int j = 0; j < d.n; j++) {
        d.cost[j] = support_below(seed, 21) - 5;
        d.high[j] = 1 + support_below(seed, 2);
        lp_add_column(d.model, 0, d.high[j], d.cost[j], integer);
    }
    for (int i = 0; i < d.rows; i++) {
        double at_high = 0;
        for (int j = 0; j < d.n; j++) {
            d.a[i][j] = support_below(seed, 9) - 2;
            at_high += d.a[i][j] * d.high[j];
        }
        d.least[i] = floor(at_high * (0.3 + 0.1 * support_below(seed, 7)));
        if (d.least[i] > at_high)
            d.least[i] = at_high;
        int row = lp_add_row(d.model, d.least[i], LP_INF);
        for (int j = 0; j < d.n; j++)
            lp_set(d.model, row, j, d.a[i][j]);
    }
    return d;
}

static double brute_force(const dense *d, int column, double *x)
{
    if (column == d->n) {
        double cost = 0;
        for (int j = 0; j < d->n; j++)
            cost += d->cost[j] * x[j];
        for (int i = 0; i < d->rows; i++) {
            double sum = 0;
            for (int j = 0; j < d->n; j++)
                sum += d->a[i][j] * x[j];
            if (sum < d->least[i])
                return LP_INF;
        }
        return cost;
    }
    double best = LP_INF;
    for (int v = 0; v <= (int)d->high[column]; v++) {
        x[column] = v;
        double cost = brute_force(d, column + 1, x);
        best = cost < best ? cost : best;
    }
    return best;
}

static void integer_programmes_match_brute_force(void **state)
{
    (void)state;
    uint64_t seed = 11;
    for (int round = 0; round < 60; round++) {
        dense d = random_programme(&seed, true);
        double x[MAX_COLUMNS], best = brute_force(&d, 0, x);
        lp_result r = solve(d.model, (lp_options){.cuts = round % 2});
        assert_int_equal(r.outcome, LP_OPTIMAL);
        assert_true(fabs(r.objective - best) < 1e-6);
        assert_true(fabs(r.bound - best) < 1e-6);
        lp_result_clear(&r);
        lp_destroy(d.model);
    }
}

/* Weak duality proves the optimum without a second solver. */
static void linear_programmes_are_proved_by_their_duals(void **state)
{
    (void)state;
    uint64_t seed = 12;
    for (int round = 0; round < 60; round++) {
        dense d = random_programme(&seed, false);
        lp_result r = solve(d.model, (lp_options){.relax = true, .duals = true});
        assert_int_equal(r.outcome, LP_OPTIMAL);
        double dual = 0, primal = 0;
        for (int i = 0; i < d.rows; i++) {
            double sum = 0;
            for (int j = 0; j < d.n; j++)
                sum += d.a[i][j] * r.x[j];
            assert_true(sum >= d.least[i] - 1e-6);
            assert_true(r.duals[i] >= -1e-9);
            dual += r.duals[i] * d.least[i];
        }
        for (int j = 0; j < d.n; j++) {
            double reduced = d.cost[j];
            for (int i = 0; i < d.rows; i++)
                reduced -= r.duals[i] * d.a[i][j];
            dual += fmin(reduced, 0) * d.high[j];
            primal += d.cost[j] * r.x[j];
        }
        assert_true(fabs(primal - r.objective) < 1e-6 && fabs(dual - r.objective) < 1e-6);
        assert_true(r.pivots >= 0 && !r.timed_out);
        lp_result_clear(&r);
        lp_destroy(d.model);
    }
}

static void constants_and_free_columns_count(void **state)
{
    (void)state;
    lp_model *m = create();
    int x = lp_add_column(m, -LP_INF, LP_INF, 2, false);
    int row = lp_add_row(m, -3, LP_INF);
    lp_set(m, row, x, 1);
    lp_set_constant(m, 10);
    lp_result r = solve(m, (lp_options){.relax = true});
    assert_int_equal(r.outcome, LP_OPTIMAL);
    assert_true(fabs(r.objective - 4) < 1e-9 && fabs(r.x[0] + 3) < 1e-9);
    assert_null(r.duals);
    lp_result_clear(&r);
    lp_destroy(m);
}

static void impossible_models_are_named_so(void **state)
{
    (void)state;
    for (int integer = 0; integer < 2; integer++) {
        lp_model *m = create();
        int x = lp_add_column(m, 0, 1, 1, integer);
        int row = lp_add_row(m, integer ? 0.4 : 2, integer ? 0.6 : 3);
        lp_set(m, row, x, 1);
        lp_result r = solve(m, (lp_options){0});
        assert_int_equal(r.outcome, LP_INFEASIBLE);
        assert_null(r.x);
        lp_result_clear(&r);
        lp_destroy(m);
    }
}

/* A market split problem: tiny, feasible only with slack, and out of reach for branch and bound. */
static lp_model *hard_model(uint64_t seed, int n, int rows, double *start)
{
    lp_model *m = create();
    for (int j = 0; j < n; j++) {
        lp_add_column(m, 0, 1, 0, true);
        start[j] = 0;
    }
    for (int i = 0; i < rows; i++) {
        double total = 0, a[64];
        for (int j = 0; j < n; j++)
            total += a[j] = support_below(&seed, 100);
        int over = lp_add_column(m, 0, LP_INF, 1, false), under = lp_add_column(m, 0, LP_INF, 1, false);
        int row = lp_add_row(m, floor(total / 2), floor(total / 2));
        for (int j = 0; j < n; j++)
            lp_set(m, row, j, a[j]);
        lp_set(m, row, over, 1);
        lp_set(m, row, under, -1);
        start[over] = floor(total / 2);
        start[under] = 0;
    }
    return m;
}

static void a_time_limit_is_kept_and_the_incumbent_survives(void **state)
{
    (void)state;
    double start[128];
    lp_model *m = hard_model(5, 50, 6, start);
    double before = clock_seconds();
    lp_result r = solve(m, (lp_options){.seconds = 0.5});
    double took = clock_seconds() - before;
    assert_true(took > 0.3 && took < 1.5);
    assert_true(r.timed_out);
    assert_true(r.outcome == LP_FEASIBLE || r.outcome == LP_NOTHING);
    assert_true(r.bound <= r.objective && r.bound > -LP_INF);
    lp_result_clear(&r);
    lp_destroy(m);
}

/* One LP so large that GLPK does not look at the clock in between: the child is killed all the same, and what it was given as a
 * start comes back. */
static void a_long_simplex_run_does_not_overrun(void **state)
{
    (void)state;
    enum { N = 90 };
    uint64_t seed = 3;
    lp_model *m = create();
    double *start = calloc(N * N * N, sizeof *start);
    for (int i = 0; i < 3 * N * N; i++)
        lp_add_row(m, 1, 1);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            for (int k = 0; k < N; k++) {
                int x = lp_add_column(m, 0, LP_INF, support_below(&seed, 1000), true);
                lp_set(m, i * N + j, x, 1);
                lp_set(m, N * N + i * N + k, x, 1);
                lp_set(m, 2 * N * N + j * N + k, x, 1);
                start[x] = (i + j + k) % N == 0;
            }
    double before = clock_seconds();
    lp_result r = solve(m, (lp_options){.seconds = 0.7, .start = start});
    assert_true(clock_seconds() - before < 1.7);
    assert_true(r.timed_out);
    assert_int_equal(r.outcome, LP_FEASIBLE);
    for (int i = 0; i < N * N * N; i++)
        assert_true(r.x[i] == start[i]);
    lp_result_clear(&r);
    lp_destroy(m);
    free(start);
}

static void counted_work_gives_the_same_answer_every_time(void **state)
{
    (void)state;
    double start[128];
    lp_model *m = hard_model(6, 40, 4, start);
    lp_result first = solve(m, (lp_options){.nodes = 300, .start = start});
    assert_int_equal(first.outcome, LP_FEASIBLE);
    assert_false(first.timed_out);
    double cost = 0;
    for (int i = 40; i < 48; i++)
        cost += start[i];
    assert_true(first.objective <= cost);
    assert_true(first.nodes > 100 && first.nodes < 400);
    for (int i = 0; i < 3; i++) {
        lp_result again = solve(m, (lp_options){.nodes = 300, .start = start});
        assert_memory_equal(first.x, again.x, 48 * sizeof(double));
        assert_true(first.objective == again.objective && first.bound == again.bound);
        assert_int_equal(first.pivots, again.pivots);
        lp_result_clear(&again);
    }
    lp_result few = solve(m, (lp_options){.pivots = 3, .start = start});
    assert_int_equal(few.outcome, LP_FEASIBLE);
    assert_true(few.objective == cost);
    lp_result_clear(&few);
    lp_result_clear(&first);
    lp_destroy(m);
}

static void a_start_that_breaks_the_model_is_refused(void **state)
{
    (void)state;
    double start[128];
    lp_model *m = hard_model(7, 10, 2, start);
    lp_result r;
    start[0] = 0.5;
    assert_int_equal(lp_solve(m, &(lp_options){.start = start}, &r), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "starting point: column 0 cannot be 0.5");
    start[0] = 0;
    start[10] += 1;
    assert_int_equal(lp_solve(m, &(lp_options){.start = start}, &r), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "row 0"));
    lp_destroy(m);
}

/* The start is the optimum: it comes back proved, though GLPK itself finds nothing better. */
static void an_optimal_start_is_proved(void **state)
{
    (void)state;
    uint64_t seed = 13;
    for (int round = 0; round < 20; round++) {
        dense d = random_programme(&seed, true);
        lp_result r = solve(d.model, (lp_options){0});
        lp_result again = solve(d.model, (lp_options){.start = r.x});
        assert_int_equal(again.outcome, LP_OPTIMAL);
        assert_true(fabs(again.objective - r.objective) < 1e-9);
        lp_result_clear(&again);
        lp_result_clear(&r);
        lp_destroy(d.model);
    }
}

static void a_child_that_aborts_is_a_result(void **state)
{
    (void)state;
    lp_model *m = create();
    int x = lp_add_column(m, 0, 1, 1, true), row = lp_add_row(m, 1, 1);
    lp_set(m, row, x, 1);
    lp_set(m, row, x, 1); /* twice the same entry: GLPK aborts */
    lp_result r = solve(m, (lp_options){0});
    assert_int_equal(r.outcome, LP_CRASHED);
    assert_non_null(strstr(r.words, "glp_load_mat"));
    assert_non_null(strstr(r.words, "duplicate"));
    lp_result_clear(&r);
    lp_destroy(m);
}

/* ---- many at once ----------------------------------------------------------------------------------------------------- */

static void many_models_come_back_in_order(void **state)
{
    (void)state;
    enum { N = 17 };
    uint64_t seed = 14;
    dense d[N];
    lp_model *models[N];
    lp_options options[N] = {0};
    lp_result alone[N], together[N];
    for (int i = 0; i < N; i++) {
        d[i] = random_programme(&seed, true);
        models[i] = d[i].model;
        alone[i] = solve(models[i], options[i]);
    }
    for (int processes = 0; processes < 4; processes += 3) {
        assert_int_equal(lp_solve_all(N, models, options, processes, together), STATUS_OK);
        for (int i = 0; i < N; i++) {
            assert_int_equal(together[i].outcome, LP_OPTIMAL);
            assert_memory_equal(together[i].x, alone[i].x, (size_t)d[i].n * sizeof(double));
            lp_result_clear(&together[i]);
        }
    }
    for (int i = 0; i < N; i++) {
        lp_result_clear(&alone[i]);
        lp_destroy(models[i]);
    }
}

static int count_open(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void nothing_is_left_open_and_no_child_unburied(void **state)
{
    (void)state;
    int before = count_open();
    enum { N = 6 };
    double start[N][128];
    lp_model *models[N];
    lp_options options[N];
    lp_result r[N];
    for (int i = 0; i < N; i++) {
        models[i] = i == 2 ? create() : hard_model((uint64_t)i + 1, 50, 6, start[i]);
        options[i] = (lp_options){.seconds = 0.2, .nodes = i == 1 ? 5 : 0};
    }
    int x = lp_add_column(models[2], 0, 1, 1, false), row = lp_add_row(models[2], 0, 1);
    lp_set(models[2], row, x, 1);
    lp_set(models[2], row, x, 1);
    double began = clock_seconds();
    assert_int_equal(lp_solve_all(N, models, options, 3, r), STATUS_OK);
    assert_true(clock_seconds() - began < 1.2); /* seconds count from the call, for all of them */
    assert_int_equal(r[2].outcome, LP_CRASHED);
    assert_true(r[5].timed_out);
    for (int i = 0; i < N; i++) {
        lp_result_clear(&r[i]);
        lp_destroy(models[i]);
    }
    assert_int_equal(count_open(), before);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
}

static void nothing_is_printed(void **state)
{
    (void)state;
    FILE *file = tmpfile();
    assert_non_null(file);
    fflush(stdout);
    fflush(stderr);
    int out = dup(1), err = dup(2);
    dup2(fileno(file), 1);
    dup2(fileno(file), 2);
    a_child_that_aborts_is_a_result(NULL);
    an_optimal_start_is_proved(NULL);
    dup2(out, 1);
    dup2(err, 2);
    close(out);
    close(err);
    fseek(file, 0, SEEK_END);
    assert_int_equal(ftell(file), 0);
    fclose(file);
}

/* ---- column generation: cutting stock, whose columns are all patterns -------------------------------------------------------
 */

enum { WIDTHS = 5, ROLL = 40 };
typedef struct {
    int width[WIDTHS], wanted[WIDTHS];
} stock;

typedef void pattern_fn(void *arg, const int *pattern);
static void each_pattern(const stock *s, int at, int left, int *pattern, pattern_fn *body, void *arg)
{
    if (at == WIDTHS) {
        body(arg, pattern);
        return;
    }
    for (pattern[at] = 0; pattern[at] * s->width[at] <= left; pattern[at]++)
        each_pattern(s, at + 1, left - pattern[at] * s->width[at], pattern, body, arg);
}

typedef struct {
    const double *duals;
    double best;
    int pattern[WIDTHS];
} pricing_search;

static void price_pattern(void *arg, const int *pattern)
{
    pricing_search *p = arg;
    double value = 0;
    for (int i = 0; i < WIDTHS; i++)
        value += p->duals[i] * pattern[i];
    if (value > p->best) {
        p->best = value;
        memcpy(p->pattern, pattern, sizeof p->pattern);
    }
}

static double price_stock(const void *arg, const double *duals, lp_columns *found)
{
    const stock *s = arg;
    pricing_search p = {.duals = duals};
    int scratch[WIDTHS];
    each_pattern(s, 0, ROLL, scratch, price_pattern, &p);
    if (p.best > 1 + 1e-9) {
        int rows[WIDTHS], n = 0;
        double values[WIDTHS];
        for (int i = 0; i < WIDTHS; i++)
            if (p.pattern[i]) {
                rows[n] = i;
                values[n++] = p.pattern[i];
            }
        lp_columns_add(found, 1, n, rows, values);
    }
    double bound = 0; /* Farley: duals over the best value are feasible */
    for (int i = 0; i < WIDTHS; i++)
        bound += duals[i] * s->wanted[i] / fmax(p.best, 1);
    return bound;
}

static void add_pattern(void *arg, const int *pattern)
{
    int column = lp_add_column(arg, 0, LP_INF, 1, false);
    for (int i = 0; i < WIDTHS; i++)
        lp_set(arg, i, column, pattern[i]);
}

static void generated_columns_reach_the_optimum_over_all(void **state)
{
    (void)state;
    uint64_t seed = 21;
    enum { N = 8 };
    stock s[N];
    lp_model *masters[N];
    lp_pricing pricing[N];
    lp_options options[N];
    lp_result r[N];
    for (int k = 0; k < N; k++) {
        masters[k] = create();
        for (int i = 0; i < WIDTHS; i++) {
            s[k].width[i] = 5 + support_below(&seed, 12);
            s[k].wanted[i] = 10 + support_below(&seed, 50);
            lp_add_row(masters[k], s[k].wanted[i], LP_INF);
            lp_set(masters[k], i, lp_add_column(masters[k], 0, LP_INF, 1, false), 1);
        }
        pricing[k] = (lp_pricing){price_stock, &s[k], 1, WIDTHS, 200};
        options[k] = (lp_options){.duals = true};
    }
    assert_int_equal(lp_solve_columns(N, masters, pricing, options, 2, r), STATUS_OK);
    for (int k = 0; k < N; k++) {
        lp_model *whole = create();
        for (int i = 0; i < WIDTHS; i++)
            lp_add_row(whole, s[k].wanted[i], LP_INF);
        int scratch[WIDTHS];
        each_pattern(&s[k], 0, ROLL, scratch, add_pattern, whole);
        lp_result all = solve(whole, (lp_options){.relax = true});
        assert_int_equal(r[k].outcome, LP_OPTIMAL);
        assert_true(fabs(r[k].objective - all.objective) < 1e-6);
        assert_true(r[k].bound <= all.objective + 1e-6 && r[k].bound > all.objective - 1e-6);
        double proved = 0;
        for (int i = 0; i < WIDTHS; i++)
            proved += r[k].duals[i] * s[k].wanted[i];
        assert_true(fabs(proved - all.objective) < 1e-6);
        /* The columns are now the model's own, and it solves to the same. */
        assert_true(lp_n_columns(masters[k]) > WIDTHS);
        lp_result again = solve(masters[k], (lp_options){.relax = true});
        assert_true(fabs(again.objective - all.objective) < 1e-6);
        double cost = 0;
        for (int j = 0; j < lp_n_columns(masters[k]); j++)
            cost += r[k].x[j];
        assert_true(fabs(cost - all.objective) < 1e-6);
        for (int j = 0; j < lp_n_columns(masters[k]); j++)
            lp_set_integer(masters[k], j, true);
        lp_result whole_rolls = solve(masters[k], (lp_options){.nodes = 200});
        assert_true(whole_rolls.objective >= ceil(all.objective - 1e-6) - 1e-6);
        lp_result_clear(&whole_rolls);
        lp_result_clear(&again);
        lp_result_clear(&all);
        lp_result_clear(&r[k]);
        lp_destroy(whole);
        lp_destroy(masters[k]);
    }
}

static double price_never(const void *arg, const double *duals, lp_columns *found)
{
    (void)arg;
    (void)found;
    for (;;)
        if (duals[0] < -1e300)
            return 0;
}

static double price_and_die(const void *arg, const double *duals, lp_columns *found)
{
    (void)arg;
    (void)duals;
    (void)found;
    abort();
}

static void pricing_that_hangs_or_dies_leaves_the_last_point(void **state)
{
    (void)state;
    lp_model *m[2];
    lp_pricing pricing[2] = {{price_never, NULL, 1, 1, 4}, {price_and_die, NULL, 1, 1, 4}};
    lp_options options[2] = {{.seconds = 0.3}, {.seconds = 0.3}};
    lp_result r[2];
    for (int k = 0; k < 2; k++) {
        m[k] = create();
        int row = lp_add_row(m[k], 2, LP_INF);
        lp_set(m[k], row, lp_add_column(m[k], 0, LP_INF, 3, false), 1);
    }
    assert_int_equal(lp_solve_columns(2, m, pricing, options, 2, r), STATUS_OK);
    assert_int_equal(r[0].outcome, LP_FEASIBLE);
    assert_true(r[0].timed_out && r[0].objective == 6 && r[0].x[0] == 2);
    assert_int_equal(r[1].outcome, LP_CRASHED);
    assert_non_null(strstr(r[1].words, "signal 6"));
    for (int k = 0; k < 2; k++) {
        lp_result_clear(&r[k]);
        lp_destroy(m[k]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"integer programmes match brute force", integer_programmes_match_brute_force, NULL, NULL, NULL},
        {"linear programmes are proved by their duals", linear_programmes_are_proved_by_their_duals, NULL, NULL, NULL},
        {"constants and free columns count", constants_and_free_columns_count, NULL, NULL, NULL},
        {"impossible models are named so", impossible_models_are_named_so, NULL, NULL, NULL},
        {"a time limit is kept and the incumbent survives", a_time_limit_is_kept_and_the_incumbent_survives, NULL, NULL, NULL},
        {"a long simplex run does not overrun", a_long_simplex_run_does_not_overrun, NULL, NULL, NULL},
        {"counted work gives the same answer every time", counted_work_gives_the_same_answer_every_time, NULL, NULL, NULL},
        {"a start that breaks the model is refused", a_start_that_breaks_the_model_is_refused, NULL, NULL, NULL},
        {"an optimal start is proved", an_optimal_start_is_proved, NULL, NULL, NULL},
        {"a child that aborts is a result", a_child_that_aborts_is_a_result, NULL, NULL, NULL},
        {"many models come back in order", many_models_come_back_in_order, NULL, NULL, NULL},
        {"nothing is left open and no child unburied", nothing_is_left_open_and_no_child_unburied, NULL, NULL, NULL},
        {"nothing is printed", nothing_is_printed, NULL, NULL, NULL},
        {"generated columns reach the optimum over all", generated_columns_reach_the_optimum_over_all, NULL, NULL, NULL},
        {"pricing that hangs or dies leaves the last point", pricing_that_hangs_or_dies_leaves_the_last_point, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
