/* solver_batch.c - minimises step_us itself: the mean over steps of the busiest rank's compute and the slowest rank's transfers.
 *
 * Planned rows say what a rank computes on average, but a step waits for its busiest rank, and which one that is changes from
 * step to step. So every layer is searched on many steps at once (batch_sample.h): without replicas by batch_layer.h, with extra
 * slots by batch_replicas.h. Then each layer is replayed exactly as in replay.h, and keeps what it had if that was better. */
#include "placement/planner/batch_replicas.h"
#include "placement/planner/batch_sample.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    DEFAULT_WORK = 30000000, /* thousands of operations, all layers together: about 20 s of one core */
    MAX_TOKENS = 400000,     /* of a sample, in all its steps */
    MAX_STEPS = 1536,
    MIN_STEPS = 256,
    STEPS_TIMES_EXPERTS = 1 << 17, /* fewer steps where there are many experts: a layer's numbers should stay in the cache */
    SPLIT_STEPS = 512,             /* at most, where rows are split over replicas */
    LINK_TOKENS = 12000,           /* of the smaller sample on which transfers are priced */
    SEARCH_STREAM = 0xba7c4,       /* of random numbers, plus the layer */
};
static const double LINKS_MATTER = 0.03; /* transfers below this share of a layer's time are left to chance */
static const double SEARCH_TIME = 0.85;  /* of the seconds; the rest is for comparing */

typedef struct {
    const problem *p;
    replay_schedule steps, link_steps, split_steps;
    int *home;               /* [n_layers][n_experts] */
    bool *holds;             /* [n_layers][n_experts][n_ranks] */
    double started, seconds; /* 0: no limit */
    work_budget work;
    work_budget *parts; /* [n_layers] what each has left */
    plan start, found;  /* what each layer is compared on */
    bool *keeps_start;  /* [n_layers] */
} batch_run;

/* ---- one layer ---- */

/* Layers are taken in order: each may use its part of the time, so that the last are not left with none. */
static work_budget layer_budget(const batch_run *r, int l)
{
    work_budget w = work_part(&r->work, l, r->p->n_layers);
    if (r->seconds > 0)
        w.deadline = r->started + r->seconds * (l + 1) / r->p->n_layers;
    return w;
}

static int count_slots(const problem *p, int l)
{
    int n = 0;
    for (int g = 0; g < p->n_ranks; g++)
        n += p->slots[(size_t)l * (size_t)p->n_ranks + (size_t)g];
    return n;
}

static bool *layer_holds(const batch_run *r, int l)
{
    return r->holds + problem_at(r->p, l, 0) * (size_t)r->p->n_ranks;
}

static bool has_replicas(const batch_run *r, int l)
{
    int n = 0;
    const bool *holds = layer_holds(r, l);
    for (size_t i = 0; i < (size_t)r->p->n_experts * (size_t)r->p->n_ranks; i++)
        n += holds[i];
    return n > r->p->n_experts;
}

static void hold_homes(const batch_run *r, int l)
{
    size_t ranks = (size_t)r->p->n_ranks;
    bool *holds = layer_holds(r, l);
    memset(holds, 0, (size_t)r->p->n_experts * ranks * sizeof *holds);
    for (int e = 0; e < r->p->n_experts; e++)
        holds[(size_t)e * ranks + (size_t)r->home[problem_at(r->p, l, e)]] = true;
}

static status transfers_share(const batch_run *r, int l, const int *home, double *share)
{
    batch_layer *b;
    TRY(batch_layer_create(r->p, &r->link_steps, l, &r->link_steps, &b));
    double all = batch_layer_set(b, home), links = batch_layer_links_us(b);
    *share = all > 0 ? links / all : 0;
    batch_layer_destroy(b);
    return STATUS_OK;
}

static status search_homes(batch_run *r, int l, random_stream *random)
{
    int *home = r->home + problem_at(r->p, l, 0);
    double share;
    TRY(transfers_share(r, l, home, &share));
    bool links = share > LINKS_MATTER;
    batch_layer *b;
    TRY(batch_layer_create(r->p, &r->steps, l, links ? &r->link_steps : NULL, &b));
    batch_layer_set(b, home);
    batch_layer_search(b, random, &r->parts[l], home);
    batch_layer_destroy(b);
    hold_homes(r, l);
    return STATUS_OK;
}

static status search_replicas(batch_run *r, int l, random_stream *random)
{
    batch_layer *b;
    double us;
    TRY(batch_layer_create(r->p, &r->split_steps, l, NULL, &b));
    status st = batch_replicas_search(b, random, &r->parts[l], r->home + problem_at(r->p, l, 0), layer_holds(r, l), &us);
    batch_layer_destroy(b);
    return st;
}

static status search_layer(void *arg, int l)
{
    batch_run *r = arg;
    random_stream random = random_open(r->p, SEARCH_STREAM + (uint64_t)l);
    r->parts[l] = layer_budget(r, l);
    if (!has_replicas(r, l))
        TRY(search_homes(r, l, &random));
    return count_slots(r->p, l) > r->p->n_experts ? search_replicas(r, l, &random) : STATUS_OK;
}

/* Whether the layer was cheaper before, replayed as everyone replays it. */
static status compare_layer(void *arg, int l)
{
    batch_run *r = arg;
    const problem *p = r->p;
    double before, after;
    TRY(replay_layer_us(p->traffic, p->schedule, &r->start, l, p->topology, &p->request->replay, &before));
    TRY(replay_layer_us(p->traffic, p->schedule, &r->found, l, p->topology, &p->request->replay, &after));
    r->keeps_start[l] = before < after;
    return STATUS_OK;
}

/* ---- the whole ---- */

static void take_plan(batch_run *r, const plan *from, int l)
{
    memset(layer_holds(r, l), 0, (size_t)r->p->n_experts * (size_t)r->p->n_ranks * sizeof *r->holds);
    for (int e = 0; e < r->p->n_experts; e++) {
        const int *ranks = plan_copies(from, l, e);
        r->home[problem_at(r->p, l, e)] = ranks[0];
        for (int c = 0; c < plan_n_copies(from, l, e); c++)
            layer_holds(r, l)[(size_t)e * (size_t)r->p->n_ranks + (size_t)ranks[c]] = true;
    }
}

/* The seed where it is valid, else LPT. */
static status choose_start(batch_run *r)
{
    const problem *p = r->p;
    if (p->request->seed && problem_check(p, p->request->seed, true) == STATUS_OK) {
        for (int l = 0; l < p->n_layers; l++)
            take_plan(r, p->request->seed, l);
    } else {
        TRY(start_lpt(p, r->home));
        for (int l = 0; l < p->n_layers; l++)
            hold_homes(r, l);
    }
    return problem_plan_replicas(p, "batch", r->home, r->holds, &r->start);
}

static status batch_begin(const problem *p, batch_run *r)
{
    *r = (batch_run){.p = p, .started = clock_seconds(), .seconds = p->request->seconds * SEARCH_TIME};
    size_t lists = problem_at(p, p->n_layers, 0);
    r->work = work_start(p, DEFAULT_WORK);
    r->home = malloc(lists * sizeof *r->home);
    r->holds = calloc(lists * (size_t)p->n_ranks, sizeof *r->holds);
    r->parts = calloc((size_t)p->n_layers, sizeof *r->parts);
    r->keeps_start = calloc((size_t)p->n_layers, sizeof *r->keeps_start);
    if (!r->home || !r->holds || !r->parts || !r->keeps_start)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    int64_t steps = STEPS_TIMES_EXPERTS / p->n_experts;
    steps = steps > MAX_STEPS ? MAX_STEPS : steps < MIN_STEPS ? MIN_STEPS : steps;
    TRY(batch_sample(p, steps, MAX_TOKENS, &r->steps));
    TRY(batch_sample(p, steps, LINK_TOKENS, &r->link_steps));
    return batch_sample(p, steps < SPLIT_STEPS ? steps : SPLIT_STEPS, MAX_TOKENS, &r->split_steps);
}

static void batch_end(batch_run *r)
{
    replay_schedule_clear(&r->steps);
    replay_schedule_clear(&r->link_steps);
    replay_schedule_clear(&r->split_steps);
    plan_clear(&r->start);
    plan_clear(&r->found);
    free(r->home);
    free(r->holds);
    free(r->parts);
    free(r->keeps_start);
}

static status search_all(batch_run *r)
{
    const problem *p = r->p;
    TRY(parallel_for(p->request->threads, p->n_layers, search_layer, r));
    TRY(problem_plan_replicas(p, "batch", r->home, r->holds, &r->found));
    return parallel_for(p->request->threads, p->n_layers, compare_layer, r);
}

static void tell(const batch_run *r, solver_report *report)
{
    int kept = 0;
    for (int l = 0; l < r->p->n_layers; l++) {
        report->work += work_part(&r->work, l, r->p->n_layers).left - r->parts[l].left;
        report->out_of_time |= r->parts[l].out_of_time;
        kept += r->keeps_start[l];
    }
    snprintf(report->remark, sizeof report->remark, "searched on %lld steps drawn from %lld; %d of %d layers stayed as they were",
             (long long)r->steps.n_steps, (long long)r->p->schedule->n_steps, kept, r->p->n_layers);
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    if (!p->schedule)
        return status_fail(STATUS_USAGE, "solver batch prices steps: say how many sequences run at once (--concurrency)");
    batch_run r;
    plan made = {0};
    status st;
    TRY_GOTO(batch_begin(p, &r), out);
    TRY_GOTO(choose_start(&r), out);
    TRY_GOTO(search_all(&r), out);
    for (int l = 0; l < p->n_layers; l++)
        if (r.keeps_start[l])
            take_plan(&r, &r.start, l);
    tell(&r, report);
    TRY_GOTO(problem_plan_replicas(p, "batch", r.home, r.holds, &made), out);
    st = start_keep_seed(&solver_batch, p, &made, report, out);
out:
    batch_end(&r);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    return score_step_us(p, made, out);
}

const solver solver_batch = {
    .name = "batch",
    .summary = "minimises the mean of per-step maxima over the replayed steps and others drawn from the same sequences",
    .paper = "",
    .objective = "step_us on the given traffic",
    .flags = SOLVER_NEEDS_TRAFFIC | SOLVER_REPLICATES | SOLVER_PRICES_LOAD,
    .solve = solve,
    .measure = measure,
};
