/* solver_auto.c - the portfolio: every solver whose needs are met makes a plan, and `batch` polishes the best.
 *
 *   lpt, eplb, craft, ... ──► valid plans ──► the quickest on the given traffic ──► batch from there ──► the quicker of both
 *                                   batch from lpt or the seed ──┘
 *
 * Time and work are shared out beforehand, so the same work gives the same plan. From statistics alone nobody knows how rows vary
 * from step to step: then balance decides, in steps of one per cent, and among equals R-flow. */
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* share: of seconds and work. What the seconds leave goes to batch. */
typedef struct {
    const solver *solver;
    double share, share_of_stats; /* 0: does not take part */
    bool affinity;                /* only where owners go by affinity */
} member;

static const member members[] = {
    {&solver_contiguous, 0.01, 0.01, false}, {&solver_lpt, 0.02, 0.05, false},   {&solver_eplb_apart, 0.02, 0.05, false},
    {&solver_eplb, 0.02, 0.05, false},       {&solver_craft, 0.02, 0.05, false}, {&solver_exflow, 0.03, 0.1, false},
    {&solver_chain, 0.05, 0.4, false},       {&solver_cut, 0.1, 0, false},       {&solver_partition, 0.1, 0, false},
    {&solver_moetuner, 0.05, 0.1, false},    {&solver_affinity, 0.3, 0, true},
};
enum { N_MEMBERS = sizeof members / sizeof members[0] };

static const double BATCH_SHARE = 0.35, POLISH_SHARE = 0.2; /* of work */
static const double BATCH_TIME = 0.6;                       /* of the seconds left; polishing gets the rest */

typedef struct {
    const problem *p;
    solver_report *report;
    double started;
    plan best;
    double best_us; /* measure() of it */
    const char *winner, *from;
    int n_valid;
} portfolio;

static status measure(const problem *p, const plan *made, double *out)
{
    if (p->schedule)
        return score_step_us(p, made, out);
    double flow = score_flow(p, made), balance = score_balance(p, made, NULL, NULL);
    if (isnan(balance))
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    *out = ceil(balance * 100 - 1e-6) / 100 + (isnan(flow) ? 0 : 1e-3 * flow / (1 + flow));
    return STATUS_OK;
}

static double replays_us(const problem *p, const plan *made, double *compute)
{
    replay_result r;
    *compute = 0;
    if (!p->schedule || replay_run(p->traffic, made, p->topology, &p->request->replay, &r) != STATUS_OK)
        return 0;
    *compute = r.compute_us;
    double us = r.step_us;
    replay_result_clear(&r);
    return us;
}

static bool needs_are_met(const problem *p, const solver *s)
{
    return !((s->flags & SOLVER_NEEDS_TRAFFIC) && !p->schedule) && !((s->flags & SOLVER_NEEDS_NEXT_PAIRS) && !p->next_pairs) &&
           !((s->flags & SOLVER_NEEDS_SAME_PAIRS) && !p->same_pairs);
}

/* The problem as one member gets it. */
static void share_out(const portfolio *f, const solver *s, double share, const plan *seed, problem *q, problem_request *request)
{
    *request = *f->p->request;
    *q = *f->p;
    q->request = request;
    request->seed = seed;
    if (request->work > 0)
        request->work = (int64_t)((double)request->work * share) + 1;
    if (request->seconds > 0) {
        double left = request->seconds * 0.95 - (clock_seconds() - f->started), wanted = request->seconds * share;
        if (s == &solver_batch)
            wanted = share == BATCH_SHARE ? left * BATCH_TIME : left;
        request->seconds = fmax(0.001, fmin(wanted, left));
    }
}

/* Takes `made` over. */
static status consider(portfolio *f, const char *name, const char *from, plan *made)
{
    double us;
    status st = measure(f->p, made, &us);
    if (st == STATUS_OK && (f->n_valid == 0 || us < f->best_us)) {
        plan_clear(&f->best);
        f->best = *made;
        f->best_us = us;
        f->winner = name;
        f->from = from;
        *made = (plan){0};
    }
    f->n_valid += st == STATUS_OK;
    plan_clear(made);
    return st;
}

/* A member that cannot keep room or slack, or refuses the problem as too large, is no failure: another one can. */
static status run_member(portfolio *f, const solver *s, double share, const char *from, const plan *seed)
{
    problem q;
    problem_request request;
    solver_report report;
    plan made = {0};
    share_out(f, s, share, seed, &q, &request);
    status st = solver_run(s, &q, &report, &made);
    if (st == STATUS_NO_MEMORY || st == STATUS_STOPPED)
        return st;
    if (st != STATUS_OK)
        return STATUS_OK;
    f->report->work += report.work;
    f->report->out_of_time |= report.out_of_time;
    f->report->glpk_runs += report.glpk_runs;
    f->report->glpk_proved += report.glpk_proved;
    f->report->glpk_improved += report.glpk_improved;
    if (problem_check(f->p, &made, true) != STATUS_OK) { /* slots traded between layers */
        plan_clear(&made);
        return STATUS_OK;
    }
    return consider(f, s->name, from, &made);
}

static status run_members(portfolio *f)
{
    const problem *p = f->p;
    for (int i = 0; i < N_MEMBERS; i++) {
        const member *m = &members[i];
        double share = p->schedule ? m->share : m->share_of_stats;
        if (share > 0 && needs_are_met(p, m->solver) && (!m->affinity || p->request->replay.owners == OWNER_AFFINITY))
            TRY(run_member(f, m->solver, share, NULL, p->request->seed));
    }
    return STATUS_OK;
}

/* Twice: from LPT or the seed, then from the best of all. */
static status run_batch(portfolio *f)
{
    if (!f->p->schedule)
        return STATUS_OK;
    TRY(run_member(f, &solver_batch, BATCH_SHARE, f->p->request->seed ? "the seed" : "lpt", f->p->request->seed));
    if (f->n_valid == 0)
        return STATUS_OK;
    plan start = f->best; /* not to be cleared while it is the seed */
    const char *from = strcmp(f->winner, solver_batch.name) ? f->winner : f->from;
    f->best = (plan){0};
    status st = run_member(f, &solver_batch, POLISH_SHARE, from, &start);
    if (f->best.copy_ranks)
        plan_clear(&start);
    else
        f->best = start;
    return st;
}

static void explain(const portfolio *f)
{
    solver_report *r = f->report;
    double compute, us = replays_us(f->p, &f->best, &compute);
    int n = snprintf(r->remark, sizeof r->remark, "%s%s%s, the best of %d plans", f->winner, f->from ? " from " : "",
                     f->from ? f->from : "", f->n_valid);
    if (us > 0)
        snprintf(r->remark + n, sizeof r->remark - (size_t)n, "; compute is %.0f %% of the step", 100 * compute / us);
    else
        snprintf(r->remark + n, sizeof r->remark - (size_t)n,
                 "; chosen by balance, then R-flow: without a trace step_us is unknown");
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    portfolio f = {.p = p, .report = report, .started = clock_seconds()};
    status st;
    TRY_GOTO(run_members(&f), out);
    TRY_GOTO(run_batch(&f), out);
    if (f.n_valid == 0)
        TRY_GOTO(status_fail(STATUS_BAD_INPUT, "auto: none of its solvers found a plan that keeps the room%s",
                             p->request->slack >= 0 ? " and the slack" : ""),
                 out);
    explain(&f);
    snprintf(f.best.name, sizeof f.best.name, "auto");
    st = start_keep_seed(&solver_auto, p, &f.best, report, out);
    f.best = (plan){0};
out:
    plan_clear(&f.best);
    return st;
}

const solver solver_auto = {
    .name = "auto",
    .summary = "runs the solvers that fit the problem, takes the quickest plan on the given traffic and polishes it by batch",
    .paper = "",
    .objective = "step_us on the given traffic; from statistics alone balance, then R-flow",
    .flags = SOLVER_REPLICATES | SOLVER_PRICES_LOAD,
    .solve = solve,
    .measure = measure,
};
