/* affinity - plans for owners that follow the experts: sequences that use the same experts are put together first, experts are
 * placed for those owners by step time, owners are chosen anew under that plan, and so on; every plan is priced by a replay in
 * which owners really go by affinity, from their sequence's first tokens. */
#include "placement/planner/owner_replicas.h"
#include "placement/planner/owners.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 3, STARTS = 2, STREAM = 0x0ff1ce };

static status measure(const problem *p, const plan *made, double *out)
{
    problem_request request = *p->request;
    problem q = *p;
    request.replay.owners = OWNER_AFFINITY;
    q.request = &request;
    return score_step_us(&q, made, out);
}

typedef struct {
    const problem *p;
    uint16_t *owners; /* [n_sequences] */
    plan best;
    double best_us;
    bool has_best;
    int rounds, best_round;
    double deadline; /* clock_seconds(); 0: none */
    solver_report *report;
} search;

/* Takes `made` over or drops it. */
static status consider(search *s, plan *made)
{
    double us;
    status st = measure(s->p, made, &us);
    if (st == STATUS_OK && (!s->has_best || us < s->best_us)) {
        plan_clear(&s->best);
        s->best = *made;
        s->best_us = us;
        s->has_best = true;
        s->best_round = s->rounds;
        *made = (plan){0};
    }
    plan_clear(made);
    return st;
}

/* Room for every expert once and no more, [n_layers][n_ranks]: free(); NULL when there is no more room than that anyway. */
static status single_slots(const problem *p, int **out)
{
    size_t cells = (size_t)p->n_layers * (size_t)p->n_ranks;
    int64_t all = 0;
    *out = NULL;
    for (size_t i = 0; i < cells; i++)
        all += p->slots[i];
    if (all == (int64_t)p->n_layers * p->n_experts)
        return STATUS_OK;
    int *slots = malloc(cells * sizeof *slots);
    status st = slots ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the slots of %d layers", p->n_layers);
    for (int l = 0; st == STATUS_OK && l < p->n_layers; l++)
        st = start_sizes(p, l, slots + (size_t)l * (size_t)p->n_ranks);
    if (st == STATUS_OK)
        *out = slots;
    else
        free(slots);
    return st;
}

/* Experts for the owners as they are now; *made is the new plan. Spare slots go to the busiest steps (by batch) or, where
 * `for_links`, to whatever saves journeys. */
static status place_experts(search *s, bool for_links, double seconds, int64_t work, plan *made)
{
    problem q = *s->p;
    int *slots = NULL;
    if (for_links)
        TRY(single_slots(s->p, &slots));
    q.slots = slots ? slots : q.slots;
    problem_request request = *s->p->request;
    replay_schedule schedule = {0};
    solver_report report = {0};
    request.replay.owners = OWNER_ROUND_ROBIN; /* that is, as the schedule says */
    request.seed = NULL;
    request.seconds = seconds;
    request.work = work;
    status st = owners_schedule(s->p, s->owners, &schedule);
    q.request = &request;
    q.schedule = &schedule;
    q.owner_of_sequence = s->owners;
    if (st == STATUS_OK)
        st = solver_batch.solve(&q, &report, made);
    if (st == STATUS_OK && slots) {
        plan filled = {0};
        st = owner_replicas_add(s->p, s->owners, made, &filled);
        plan_clear(made);
        *made = filled;
    }
    free(slots);
    s->report->work += report.work;
    s->report->out_of_time |= report.out_of_time;
    replay_schedule_clear(&schedule);
    return st;
}

static status improve(search *s, int start)
{
    const problem_request *r = s->p->request;
    int64_t part = r->work / (ROUNDS * STARTS);
    part = r->work > 0 && part < 1 ? 1 : part; /* 0 would be no limit */
    TRY(owners_by_likeness(s->p, STREAM + (uint64_t)start, s->owners));
    for (int round = 0; round < ROUNDS; round++) {
        plan made = {0};
        if (s->deadline > 0 && s->rounds > 0 && clock_seconds() >= s->deadline) {
            s->report->out_of_time = true;
            return STATUS_OK;
        }
        s->rounds++;
        TRY(place_experts(s, start % 2 == 0, r->seconds / (ROUNDS * STARTS), part, &made));
        status st = owners_by_plan(s->p, &made, s->owners);
        if (st == STATUS_OK)
            st = consider(s, &made);
        plan_clear(&made);
        TRY(st);
    }
    return STATUS_OK;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    if (!p->schedule)
        return status_fail(STATUS_USAGE, "solver affinity prices steps: give it a trace");
    search s = {.p = p,
                .report = report,
                .owners = malloc((size_t)p->traffic->n_sequences * sizeof *s.owners),
                .deadline = p->request->seconds > 0 ? clock_seconds() + p->request->seconds : 0};
    status st = s.owners ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for owners");
    for (int start = 0; st == STATUS_OK && start < STARTS; start++)
        st = improve(&s, start);
    free(s.owners);
    if (st != STATUS_OK) {
        plan_clear(&s.best);
        return st;
    }
    snprintf(report->remark, sizeof report->remark,
             "best of %d rounds of placing experts for owners and owners for experts: number %d", s.rounds, s.best_round);
    snprintf(s.best.name, sizeof s.best.name, "affinity");
    return start_keep_seed(&solver_affinity, p, &s.best, report, out);
}

const solver solver_affinity = {
    .name = "affinity",
    .summary = "experts for owners and owners for experts in turn, so that rows stay home",
    .paper = "alternating form of affinity placement (cf. MoETuner, ExFlow); ours",
    .objective = "modelled step time with owners by affinity (us)",
    .flags = SOLVER_NEEDS_TRAFFIC | SOLVER_REPLICATES | SOLVER_PRICES_LOAD,
    .solve = solve,
    .measure = measure,
};
