/* solver_partition.c - each layer is a set partitioning problem: cut the experts into one cluster per rank so that tokens meet as
 * few clusters as can be, within load caps and slots.
 *
 * Cost and load separate by rank, so there is a column per cluster instead of G! equal assignments, and the linear relaxation is
 * tight (0.3 % on recorded routing). Per layer: descent with kicks gives a cut, column generation the bound, reduced costs leave
 * only the clusters that a better cut could hold, and branch and bound over those finds it or proves that there is none. Layers
 * whose clusters are too many to write down (clusters_possible()) choose among those of many local optima, without a bound
 * (partition_pool.h). Then seats.h names the ranks. */
#include "placement/planner/clusters_search.h"
#include "placement/planner/partition_pool.h"
#include "placement/planner/score.h"
#include "placement/planner/seats.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    BATCH = 16,               /* layers at once: memory */
    UNITS_PER_LAYER = 600000, /* swaps looked at */
    UNITS_PER_PIVOT = 20,     /* what linear programming may spend beside them */
    UNITS_PER_NODE = 300,
    FEW_CANDIDATES = 1200, /* a first, quick choice, whose result leaves fewer for the second */
    MANY_CANDIDATES = 20000,
};

typedef struct {
    const problem *p;
    work_budget work;
    double began;
    int *home;                   /* [n_layers][n_experts] */
    int *seed;                   /* the same; NULL: none */
    clusters *layers[BATCH];     /* where all clusters are written down */
    partition_pool pools[BATCH]; /* elsewhere; n = 0: nothing to choose from */
    int first, n;                /* the layers of this batch */
    int64_t bound[BATCH];        /* meetings, of the batch's layers; 0: unknown */
    double bound_sum;            /* meetings, all layers so far */
    bool out_of_time[BATCH];
    solver_report *report;
} partition;

static int *home_of(const partition *s, int i)
{
    return s->home + problem_at(s->p, s->first + i, 0);
}

static double seconds_left(const partition *s)
{
    if (s->work.deadline == 0)
        return 0;
    double left = s->work.deadline - clock_seconds();
    return left > 0.001 ? left : 0.001;
}

/* A layer's share of the work, and of the time: this batch leaves the later ones theirs. */
static work_budget share_of(const partition *s, int layer)
{
    work_budget work = work_part(&s->work, layer, s->p->n_layers);
    if (s->work.deadline > 0)
        work.deadline = s->began + (s->work.deadline - s->began) * 0.8 * (s->first + s->n) / s->p->n_layers;
    return work;
}

static status prepare_pool(partition *s, int i)
{
    int layer = s->first + i;
    random_stream random = random_open(s->p, (uint64_t)layer);
    work_budget work = share_of(s, layer);
    if (!work_take(&work, 0)) {
        s->out_of_time[i] = true;
        return STATUS_OK;
    }
    if (s->seed)
        memcpy(home_of(s, i), s->seed + problem_at(s->p, layer, 0), (size_t)s->p->n_experts * sizeof *s->seed);
    TRY(partition_pool_fill(s->p, layer, &random, &work, home_of(s, i), &s->pools[i]));
    s->out_of_time[i] = work.out_of_time;
    return STATUS_OK;
}

static status prepare_layer(void *arg, int i)
{
    partition *s = arg;
    int layer = s->first + i;
    if (!clusters_possible(s->p, layer) || s->p->traffic->shape.top_k > 16)
        return prepare_pool(s, i);
    TRY(clusters_create(s->p, layer, true, true, &s->layers[i]));
    const clusters *c = s->layers[i];
    const int *seed = s->seed ? s->seed + problem_at(s->p, layer, 0) : NULL;
    bool keeps = clusters_kept(c, home_of(s, i));
    if (seed && clusters_kept(c, seed) && (!keeps || clusters_cost(c, seed) < clusters_cost(c, home_of(s, i)))) {
        memcpy(home_of(s, i), seed, (size_t)c->n_experts * sizeof *seed);
        keeps = true;
    }
    if (!keeps) { /* perhaps no plan without replicas does */
        clusters_destroy(s->layers[i]);
        s->layers[i] = NULL;
        return STATUS_OK;
    }
    random_stream random = random_open(s->p, (uint64_t)layer);
    work_budget work = share_of(s, layer);
    clusters_descend(s->layers[i], &random, &work, home_of(s, i));
    s->out_of_time[i] = work.out_of_time;
    return STATUS_OK;
}

/* ---- choices ---- */

typedef struct {
    int layer[BATCH], n;
    cluster_choice choice[BATCH];
    lp_model *models[BATCH];
    lp_options options[BATCH];
    lp_result results[BATCH];
} round_of_choices;

static void take_choice(partition *s, round_of_choices *r, int i)
{
    int layer = r->layer[i];
    const lp_result *result = &r->results[i];
    int64_t before = clusters_cost(s->layers[layer], home_of(s, layer));
    s->report->glpk_runs++;
    if (result->x && result->objective < (double)before - 0.5) {
        clusters_choice_take(s->layers[layer], &r->choice[i], result->x, home_of(s, layer));
        s->report->glpk_improved++;
    }
    s->out_of_time[layer] |= result->timed_out;
    int64_t now = clusters_cost(s->layers[layer], home_of(s, layer));
    if (!r->choice[i].complete)
        return;
    /* Either the optimum lies in the candidates, or nothing is below the cost that chose them. */
    double proved = fmin(floor(result->bound - 1e-6 * fabs(result->bound)) + 1, (double)before);
    if (result->outcome == LP_OPTIMAL) {
        s->report->glpk_proved++;
        proved = (double)now;
    }
    if (proved > (double)s->bound[layer])
        s->bound[layer] = (int64_t)proved;
}

static status choose(partition *s, const cluster_relaxation *relaxations, int most)
{
    round_of_choices *r = calloc(1, sizeof *r);
    if (!r)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d integer programmes", BATCH);
    status st = STATUS_OK;
    for (int i = 0; i < s->n; i++) {
        if (!s->layers[i] || s->bound[i] >= clusters_cost(s->layers[i], home_of(s, i)))
            continue;
        cluster_choice *choice = &r->choice[r->n];
        TRY_GOTO(clusters_choice_create(s->layers[i], &relaxations[i], home_of(s, i), most, choice), out);
        r->layer[r->n] = i;
        r->models[r->n] = choice->model;
        int64_t units = work_part(&s->work, s->first + i, s->p->n_layers).left;
        r->options[r->n++] =
            (lp_options){.nodes = units / UNITS_PER_NODE + 1, .pivots = units / UNITS_PER_PIVOT + 1, .start = choice->start};
    }
    for (int i = 0; i < r->n; i++)
        r->options[i].seconds = seconds_left(s); /* models took time to make */
    TRY_GOTO(lp_solve_all(r->n, r->models, r->options, s->p->request->threads, r->results), out);
    for (int i = 0; i < r->n; i++)
        take_choice(s, r, i);
out:
    for (int i = 0; i < BATCH; i++) {
        clusters_choice_clear(&r->choice[i]);
        lp_result_clear(&r->results[i]);
    }
    free(r);
    return st;
}

/* The best that the clusters of local optima can be put together to. */
static status choose_from_pools(partition *s)
{
    lp_model *models[BATCH] = {NULL};
    double *starts[BATCH] = {NULL};
    lp_options options[BATCH];
    lp_result results[BATCH] = {0};
    int at[BATCH], n = 0;
    status st = STATUS_OK;
    for (int i = 0; i < s->n && st == STATUS_OK; i++) {
        if (s->pools[i].n == 0)
            continue;
        at[n] = i;
        starts[n] = malloc((size_t)s->pools[i].n * sizeof *starts[n]);
        st = starts[n] ? partition_pool_model(s->p, &s->pools[i], home_of(s, i), &models[n], starts[n])
                       : status_fail(STATUS_NO_MEMORY, "no memory for a choice of %d clusters", s->pools[i].n);
        int64_t units = work_part(&s->work, s->first + i, s->p->n_layers).left;
        options[n] =
            (lp_options){.nodes = units / UNITS_PER_NODE / 4 + 1, .pivots = units / UNITS_PER_PIVOT + 1, .start = starts[n]};
        n++;
    }
    for (int k = 0; k < n; k++)
        options[k].seconds = seconds_left(s);
    if (st == STATUS_OK)
        st = lp_solve_all(n, models, options, s->p->request->threads, results);
    for (int k = 0; k < n; k++) {
        const double *x = results[k].x;
        double change = 0;
        for (int c = 0; st == STATUS_OK && x && c < s->pools[at[k]].n; c++)
            change += (double)s->pools[at[k]].tokens[c] * (x[c] - starts[k][c]);
        if (change < -0.5) {
            partition_pool_take(s->p, &s->pools[at[k]], x, home_of(s, at[k]));
            s->report->glpk_improved++;
        }
        s->report->glpk_runs++;
        s->out_of_time[at[k]] |= results[k].timed_out;
        lp_result_clear(&results[k]);
        lp_destroy(models[k]);
        free(starts[k]);
    }
    return st;
}

/* ---- a batch of layers ---- */

/* Bounds by column generation for the layers whose clusters are written down. */
static status relax_batch(partition *s, cluster_relaxation *relaxations)
{
    clusters *layers[BATCH];
    const int *homes[BATCH];
    cluster_relaxation found[BATCH];
    int at[BATCH], n = 0;
    for (int i = 0; i < s->n; i++)
        if (s->layers[i]) {
            layers[n] = s->layers[i];
            homes[n] = home_of(s, i);
            at[n++] = i;
        }
    int64_t pivots = s->work.left / s->p->n_layers / UNITS_PER_PIVOT + 1;
    TRY(clusters_relax(n, layers, homes, seconds_left(s), pivots, s->p->request->threads, found));
    for (int k = 0; k < n; k++) {
        relaxations[at[k]] = found[k];
        s->bound[at[k]] = found[k].bound;
        s->report->work += found[k].pivots * UNITS_PER_PIVOT;
    }
    return STATUS_OK;
}

static status solve_batch(partition *s)
{
    cluster_relaxation relaxations[BATCH] = {0};
    memset(s->layers, 0, sizeof s->layers);
    memset(s->pools, 0, sizeof s->pools);
    memset(s->bound, 0, sizeof s->bound);
    memset(s->out_of_time, 0, sizeof s->out_of_time);
    status st = parallel_for(s->p->request->threads, s->n, prepare_layer, s);
    if (st == STATUS_OK)
        st = relax_batch(s, relaxations);
    if (st == STATUS_OK)
        st = choose(s, relaxations, FEW_CANDIDATES);
    if (st == STATUS_OK)
        st = choose(s, relaxations, MANY_CANDIDATES);
    if (st == STATUS_OK)
        st = choose_from_pools(s);
    for (int i = 0; i < s->n; i++) {
        s->bound_sum += s->layers[i] ? (double)s->bound[i] : NAN;
        partition_pool_clear(&s->pools[i]);
        s->report->out_of_time |= s->out_of_time[i];
        clusters_destroy(s->layers[i]);
        cluster_relaxation_clear(&relaxations[i]);
    }
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_ranks(p, made);
    return isnan(*out) ? status_fail(STATUS_NO_MEMORY, "no memory to count ranks") : STATUS_OK;
}

static void describe(const partition *s, solver_report *report)
{
    double cells = (double)s->p->traffic->n_tokens * s->p->n_layers;
    report->bound = s->bound_sum > 0 ? s->bound_sum / cells * (1 - 1e-12) : NAN;
    if (isnan(report->bound))
        snprintf(report->remark, sizeof report->remark,
                 "too many clusters to write down: chosen among those of local optima, without a bound");
    else
        snprintf(report->remark, sizeof report->remark,
                 "no choice of clusters within the load caps goes below the bound; integer programmes proved: %d of %d",
                 report->glpk_proved, report->glpk_runs);
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    partition s = {
        .p = p, .work = work_start(p, (int64_t)UNITS_PER_LAYER * p->n_layers), .began = clock_seconds(), .report = report};
    s.home = malloc(problem_at(p, p->n_layers, 0) * sizeof *s.home);
    s.seed = malloc(problem_at(p, p->n_layers, 0) * sizeof *s.seed);
    status st =
        s.home && s.seed ? start_lpt(p, s.home) : status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    if (st == STATUS_OK && !start_seed(p, s.seed)) {
        free(s.seed);
        s.seed = NULL;
    }
    for (s.first = 0; s.first < p->n_layers && st == STATUS_OK; s.first += BATCH) {
        s.n = p->n_layers - s.first < BATCH ? p->n_layers - s.first : BATCH;
        st = solve_batch(&s);
    }
    report->work += s.work.left;
    describe(&s, report);
    if (st == STATUS_OK)
        st = seats_assign(p, s.home);
    if (st == STATUS_OK)
        st = start_finish(&solver_partition, p, s.home, report, out);
    free(s.home);
    free(s.seed);
    return st;
}

const solver solver_partition = {
    .name = "partition",
    .summary = "fewest distinct ranks per token: set partitioning over clusters of experts, columns priced by GLPK",
    .paper = "Balas and Padberg, Set partitioning: a survey (1976); clusters as columns: ours",
    .objective = "distinct ranks per token and layer, within load caps",
    .flags = SOLVER_NEEDS_TRAFFIC,
    .solve = solve,
    .measure = measure,
};
