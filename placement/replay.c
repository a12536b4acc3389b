/* replay.c - whole runs: layers spread over threads, each summed by itself in step order, then added up in layer order, so that
 * results do not depend on the number of threads. */
#include "placement/replay.h"

#include "placement/replay_layer.h"
#include "proto/hash.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RESAMPLES = 1000 };

void replay_result_clear(replay_result *r)
{
    free(r->layer_us);
    free(r->max_over_mean);
    free(r->step_times);
    free(r->link_rows);
    free(r->rank_rows);
    *r = (replay_result){0};
}

static status check_fit(const traffic *t, const plan *p, const topology *topo)
{
    if (p->n_experts != t->shape.n_experts || p->n_layers != t->shape.n_layers)
        return status_fail(STATUS_BAD_INPUT, "replay: plan %s is for %d experts in %d layers; the traffic has %d in %d", p->name,
                           p->n_experts, p->n_layers, t->shape.n_experts, t->shape.n_layers);
    if (p->n_ranks != topo->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "replay: plan %s is for %d ranks; the topology has %d", p->name, p->n_ranks,
                           topo->n_ranks);
    for (int l = 0; l < p->n_layers; l++)
        if (p->layer_numbers[l] != t->shape.layer_numbers[l])
            return status_fail(STATUS_BAD_INPUT, "replay: plan %s has layer %d where the traffic has layer %d", p->name,
                               p->layer_numbers[l], t->shape.layer_numbers[l]);
    return STATUS_OK;
}

/* ---- layers over threads ---- */

typedef struct {
    const traffic *t;
    const replay_schedule *schedule;
    const plan *p;
    const topology *topo;
    const replay_options *options;
    layer_totals *layers; /* [n_layers] */
    atomic_int next_layer;
} run;

typedef struct {
    run *run;
    layer_replay *scratch;
    uint64_t *link_rows; /* [n_ranks][n_ranks] of this thread's layers: whole numbers may be added in any order */
    pthread_t thread;
    bool started;
    status st;
    char sentence[1024]; /* status_message() is per thread */
} helper;

static void *run_layers(void *arg)
{
    helper *h = arg;
    for (int l; h->st == STATUS_OK && (l = atomic_fetch_add(&h->run->next_layer, 1)) < h->run->p->n_layers;) {
        h->run->layers[l].link_rows = h->link_rows;
        h->st = layer_replay_run(h->scratch, l, &h->run->layers[l]);
    }
    if (h->st != STATUS_OK)
        snprintf(h->sentence, sizeof h->sentence, "%s", status_message());
    return NULL;
}

static int count_threads(const replay_options *options, int n_layers)
{
    cpu_set_t set;
    int n = options->threads;
    if (n < 1)
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n > n_layers ? n_layers : n < 1 ? 1 : n;
}

static status prepare_helpers(run *r, helper *helpers, int n)
{
    size_t n_ranks = (size_t)r->topo->n_ranks;
    for (int i = 0; i < n; i++) {
        helpers[i].run = r;
        helpers[i].link_rows = calloc(n_ranks * n_ranks, sizeof *helpers[i].link_rows);
        if (!helpers[i].link_rows)
            return status_fail(STATUS_NO_MEMORY, "replay: no memory for the links of %zu ranks", n_ranks);
        TRY(layer_replay_create(r->t, r->schedule, r->p, r->topo, r->options, &helpers[i].scratch));
    }
    return STATUS_OK;
}

/* The caller is the first helper; one that does not start leaves its share to the others. */
static status run_helpers(helper *helpers, int n, uint64_t *link_rows, size_t n_pairs)
{
    status st = STATUS_OK;
    for (int i = 1; i < n; i++)
        helpers[i].started = pthread_create(&helpers[i].thread, NULL, run_layers, &helpers[i]) == 0;
    run_layers(&helpers[0]);
    for (int i = 0; i < n; i++) {
        if (helpers[i].started)
            pthread_join(helpers[i].thread, NULL);
        if (helpers[i].st != STATUS_OK && st == STATUS_OK)
            st = status_fail(helpers[i].st, "%s", helpers[i].sentence);
        for (size_t j = 0; j < n_pairs; j++)
            link_rows[j] += helpers[i].link_rows[j];
    }
    return st;
}

static status run_all_layers(run *r, uint64_t *link_rows)
{
    int n = count_threads(r->options, r->p->n_layers);
    helper *helpers = calloc((size_t)n, sizeof *helpers);
    if (!helpers)
        return status_fail(STATUS_NO_MEMORY, "replay: no memory for %d threads", n);
    status st = prepare_helpers(r, helpers, n);
    if (st == STATUS_OK)
        st = run_helpers(helpers, n, link_rows, (size_t)r->topo->n_ranks * (size_t)r->topo->n_ranks);
    for (int i = 0; i < n; i++) {
        layer_replay_destroy(helpers[i].scratch);
        free(helpers[i].link_rows);
    }
    free(helpers);
    return st;
}

/* ---- adding up ---- */

/* splitmix64's output function: a well-mixed number for every counter. */
static uint64_t mix(uint64_t counter)
{
    return hash_mix((counter + 1) * UINT64_C(0x9e3779b97f4a7c15));
}

static int rising(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Draw i of resample b is step mix(b * n + i) % n; the interval leaves 25 of 1,000 means out on either side. */
static void bootstrap(const double *times, int64_t n, double *low, double *high)
{
    double means[RESAMPLES];
    for (uint64_t b = 0; b < RESAMPLES; b++) {
        double sum = 0;
        for (uint64_t i = 0; i < (uint64_t)n; i++)
            sum += times[mix(b * (uint64_t)n + i) % (uint64_t)n];
        means[b] = sum / (double)n;
    }
    qsort(means, RESAMPLES, sizeof *means, rising);
    *low = means[RESAMPLES / 40];
    *high = means[RESAMPLES - 1 - RESAMPLES / 40];
}

static double busiest_over_mean(const uint64_t *rows, int n)
{
    uint64_t most = 0, total = 0;
    for (int g = 0; g < n; g++) {
        most = rows[g] > most ? rows[g] : most;
        total += rows[g];
    }
    return total ? (double)most * n / (double)total : 1;
}

static double share(uint64_t part, uint64_t whole)
{
    return whole ? (double)part / (double)whole : 0;
}

static void add_up(const run *r, const double *times, replay_result *out)
{
    const layer_totals *layers = r->layers;
    double steps = (double)out->n_steps, n_layers = out->n_layers;
    uint64_t copies = 0, cross = 0, home = 0, choices = 0;
    for (int l = 0; l < out->n_layers; l++) {
        const layer_totals *a = &layers[l];
        out->layer_us[l] = (a->compute_us + a->dispatch_us + a->combine_us) / steps;
        out->compute_us += a->compute_us / steps;
        out->dispatch_us += a->dispatch_us / steps;
        out->combine_us += a->combine_us / steps;
        out->max_over_mean[l] = busiest_over_mean(a->rank_rows, out->n_ranks);
        out->max_over_mean_mean += out->max_over_mean[l] / n_layers;
        if (out->max_over_mean[l] > out->max_over_mean_worst)
            out->max_over_mean_worst = out->max_over_mean[l];
        out->max_over_mean_step += a->max_over_mean / (steps * n_layers);
        out->split_gap += a->split_gap / (steps * n_layers);
        copies += a->copies;
        cross += a->cross_copies;
        home += a->home;
        choices += a->choices;
        for (int64_t s = 0; s < out->n_steps; s++)
            out->step_times[s] += times[(int64_t)l * out->n_steps + s];
    }
    out->step_us = out->compute_us + out->dispatch_us + out->combine_us;
    out->copies = (double)copies / ((double)out->n_rows * n_layers);
    out->cross_copies = (double)cross / ((double)out->n_rows * n_layers);
    out->home = share(home, choices);
    bootstrap(out->step_times, out->n_steps, &out->low_us, &out->high_us);
}

static status result_allocate(const replay_schedule *schedule, const plan *p, replay_result *out)
{
    size_t n_layers = (size_t)p->n_layers, n_ranks = (size_t)p->n_ranks;
    *out = (replay_result){.n_steps = schedule->n_steps,
                           .n_rows = schedule->first[schedule->n_steps],
                           .n_moves = schedule->n_moves,
                           .n_layers = p->n_layers,
                           .n_ranks = p->n_ranks};
    out->layer_us = calloc(n_layers, sizeof *out->layer_us);
    out->max_over_mean = calloc(n_layers, sizeof *out->max_over_mean);
    out->step_times = calloc((size_t)schedule->n_steps, sizeof *out->step_times);
    out->link_rows = calloc(n_ranks * n_ranks, sizeof *out->link_rows);
    out->rank_rows = calloc(n_layers * n_ranks, sizeof *out->rank_rows);
    if (out->layer_us && out->max_over_mean && out->step_times && out->link_rows && out->rank_rows)
        return STATUS_OK;
    replay_result_clear(out);
    return status_fail(STATUS_NO_MEMORY, "replay: no memory for the result of %lld steps", (long long)schedule->n_steps);
}

status replay_run_schedule(const traffic *t, const replay_schedule *schedule, const plan *p, const topology *topo,
                           const replay_options *options, replay_result *out)
{
    TRY(check_fit(t, p, topo));
    replay_result result;
    TRY(result_allocate(schedule, p, &result));
    size_t n_layers = (size_t)p->n_layers, n_steps = (size_t)schedule->n_steps;
    run r = {.t = t, .schedule = schedule, .p = p, .topo = topo, .options = options};
    r.layers = calloc(n_layers, sizeof *r.layers);
    double *times = calloc(n_layers * n_steps, sizeof *times);
    status st;
    if (!r.layers || !times) {
        st = status_fail(STATUS_NO_MEMORY, "replay: no memory for the times of %zu steps", n_steps);
        goto out;
    }
    for (size_t l = 0; l < n_layers; l++)
        r.layers[l] = (layer_totals){.step_us = times + l * n_steps,
                                     .rank_rows = result.rank_rows + l * (size_t)p->n_ranks,
                                     .measure_split = options->replicas == REPLICAS_BY_STEP};
    TRY_GOTO(run_all_layers(&r, result.link_rows), out);
    add_up(&r, times, &result);
    *out = result;
out:
    if (st != STATUS_OK)
        replay_result_clear(&result);
    free(r.layers);
    free(times);
    return st;
}

status replay_run(const traffic *t, const plan *p, const topology *topo, const replay_options *options, replay_result *out)
{
    replay_schedule schedule;
    TRY(check_fit(t, p, topo));
    TRY(replay_schedule_build(t, p, topo, options, &schedule));
    status st = replay_run_schedule(t, &schedule, p, topo, options, out);
    replay_schedule_clear(&schedule);
    return st;
}

status replay_layer_us(const traffic *t, const replay_schedule *schedule, const plan *p, int layer, const topology *topo,
                       const replay_options *options, double *out)
{
    TRY(check_fit(t, p, topo));
    if (layer < 0 || layer >= p->n_layers)
        return status_fail(STATUS_BAD_INPUT, "replay: there is no layer %d among %d", layer, p->n_layers);
    layer_replay *r;
    layer_totals totals = {0};
    TRY(layer_replay_create(t, schedule, p, topo, options, &r));
    status st = layer_replay_run(r, layer, &totals);
    layer_replay_destroy(r);
    if (st == STATUS_OK)
        *out = (totals.compute_us + totals.dispatch_us + totals.combine_us) / (double)schedule->n_steps;
    return st;
}
