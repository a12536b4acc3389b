/* engine_plan.c - another plan while sequences run.
 *
 *   leader   engine_replan ─► PLAN_NEW ──────────────► all ranks ready? ─► PLAN_FLIP ─► live
 *                             (step message)           (reports)           (step message)
 *   ranks                     wish: copies load while ............ ready   new copies in use, old ones go
 *                             steps go on (expert_copies.h)
 *
 * The flip is part of one step message, before that step's rows run: all ranks route and compute by the same plan in every step,
 * so the old copies' last step is the one before. A newer plan takes the place of one that is not live yet; when a rank cannot
 * load, all forget the wish and go on as before. */
#include "worker/engine_parts.h"

#include "proto/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- life ---- */

status plans_create(engine *e)
{
    const model_config *c = e->parts.config;
    const plan *p = e->parts.plan;
    e->plan_epoch = (uint64_t)p->epoch;
    if (!e->parts.file)
        return STATUS_OK;
    size_t n = (size_t)c->n_moe_layers * (size_t)c->n_experts;
    e->wanted = calloc(n + 1, 1);
    if (!e->wanted)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of this rank's experts");
    for (size_t i = 0; i < n; i++)
        e->wanted[i] = plan_holds(p, (int)(i / (size_t)c->n_experts), (int)(i % (size_t)c->n_experts), e->rank);
    return expert_copies_create(e->parts.file, c, p->layer_numbers, e->wanted, &e->copies);
}

void plans_destroy(engine *e)
{
    expert_copies_destroy(e->copies);
    plan_clear(&e->own_plan);
    plan_clear(&e->next_plan);
    plan_clear(&e->asked_plan);
    free(e->wanted);
}

/* ---- the leader ---- */

static status check_plan(const engine *e, const plan *p, uint64_t epoch)
{
    const plan *live = e->parts.plan;
    if (!e->copies)
        return status_fail(STATUS_UNSUPPORTED, "experts cannot move here");
    if (p->n_ranks != live->n_ranks || p->n_experts != live->n_experts || p->n_layers != live->n_layers)
        return status_fail(STATUS_BAD_INPUT, "a plan for %d experts in %d layers on %d ranks; here are %d, %d and %d",
                           p->n_experts, p->n_layers, p->n_ranks, live->n_experts, live->n_layers, live->n_ranks);
    for (int l = 0; l < p->n_layers; l++)
        if (p->layer_numbers[l] != live->layer_numbers[l])
            return status_fail(STATUS_BAD_INPUT,
                               "entry %d of the plan's layers is layer %d, but the model's experts there are in "
                               "layer %d",
                               l, p->layer_numbers[l], live->layer_numbers[l]);
    if (epoch <= e->plan_epoch || epoch <= e->replan.epoch)
        return status_fail(STATUS_BAD_INPUT,
                           "epoch %llu is not above that of the live plan, %llu, or of the last one asked for, %llu",
                           (unsigned long long)epoch, (unsigned long long)e->plan_epoch, (unsigned long long)e->replan.epoch);
    return STATUS_OK;
}

static status copy_plan(const plan *from, const plan *like, plan *out)
{
    bytes_writer w = {0};
    wire_put_plan(&w, from);
    bytes_reader r = {.at = w.data, .end = w.data + w.size};
    status st = w.failed ? status_fail(STATUS_NO_MEMORY, "no memory for a plan") : wire_get_plan(&r, like, out);
    bytes_clear(&w);
    return st;
}

static unsigned count_new_copies(const plan *from, const plan *to)
{
    unsigned n = 0;
    for (int l = 0; l < to->n_layers; l++)
        for (int x = 0; x < to->n_experts; x++)
            for (int c = 0; c < plan_n_copies(to, l, x); c++)
                n += !plan_holds(from, l, x, plan_copies(to, l, x)[c]);
    return n;
}

status engine_replan(engine *e, const plan *p, uint64_t epoch, uint64_t bytes_per_second)
{
    plan copy;
    TRY(check_plan(e, p, epoch));
    TRY(copy_plan(p, e->parts.plan, &copy));
    plan_clear(&e->asked_plan);
    e->asked_plan = copy;
    e->plan_rate = bytes_per_second;
    e->replan_started = clock_seconds();
    e->replan = (engine_replan_state){.epoch = epoch,
                                      .stage = ENGINE_REPLAN_LOADING,
                                      .copies = count_new_copies(e->parts.plan, &copy),
                                      .reason = e->replan_why};
    e->replan_why[0] = '\0';
    e->plan_verb = PLAN_NEW;
    return STATUS_OK;
}

bool plans_pending(const engine *e)
{
    return e->plan_verb != PLAN_STAYS || e->replan.stage == ENGINE_REPLAN_LOADING;
}

void plans_decide(engine *e, wire_step *head)
{
    head->plan_verb = e->plan_verb;
    head->plan_epoch = e->replan.epoch;
    head->plan_rate = e->plan_rate;
    e->sent_verb = e->plan_verb;
    e->sent_epoch = e->replan.epoch;
    e->plan_verb = PLAN_STAYS;
    e->n_plan_ready = 0;
}

void plans_put(engine *e, const wire_step *head)
{
    if (head->plan_verb == PLAN_NEW)
        wire_put_plan(&e->message, &e->asked_plan);
}

/* One rank's word on the wish; that of an older wish says nothing. */
void plans_hear(engine *e, int rank, const wire_report *report, const char *sentence)
{
    if (rank == 0)
        e->replan_loaded = e->replan_total = 0;
    if (report->plan_epoch != e->replan.epoch || e->replan.stage != ENGINE_REPLAN_LOADING)
        return;
    e->replan_loaded += report->loaded;
    e->replan_total += report->total;
    e->n_plan_ready += report->plan_ready != 0;
    if (report->plan_failed && !e->replan_why[0])
        snprintf(e->replan_why, sizeof e->replan_why, "rank %d: %.*s", rank, (int)report->sentence_bytes,
                 sentence ? sentence : "");
}

/* The step has run, and all ranks' reports are read. Whoever listened to them may have asked for another plan meanwhile. */
void plans_conclude(engine *e)
{
    bool flipped = e->sent_verb == PLAN_FLIP && e->replan.epoch == e->sent_epoch;
    if (!flipped && (e->replan.stage != ENGINE_REPLAN_LOADING || e->plan_verb != PLAN_STAYS))
        return;
    e->replan.seconds = clock_seconds() - e->replan_started;
    if (flipped) {
        e->replan.stage = ENGINE_REPLAN_LIVE;
        plan_clear(&e->asked_plan);
        return;
    }
    e->replan.loaded_bytes = e->replan_loaded;
    e->replan.total_bytes = e->replan_total;
    if (e->replan_why[0]) {
        e->replan.stage = ENGINE_REPLAN_FAILED;
        e->plan_verb = PLAN_FORGET;
    } else if (e->n_plan_ready == e->n_ranks) {
        e->replan.stage = ENGINE_REPLAN_READY;
        e->plan_verb = PLAN_FLIP;
    }
}

/* ---- every rank ---- */

static status wish(engine *e, const wire_step *head)
{
    const plan *p = &e->next_plan;
    size_t n = (size_t)p->n_layers * (size_t)p->n_experts;
    for (size_t i = 0; i < n; i++)
        e->wanted[i] = plan_holds(p, (int)(i / (size_t)p->n_experts), (int)(i % (size_t)p->n_experts), e->rank);
    return expert_copies_wish(e->copies, e->wanted, head->plan_rate);
}

static void take_new(engine *e, const wire_step *head, bytes_reader *r)
{
    plan_clear(&e->next_plan);
    e->next_epoch = head->plan_epoch;
    e->wish_failed[0] = '\0';
    status st = wire_get_plan(r, e->parts.plan, &e->next_plan);
    if (st == STATUS_OK)
        st = wish(e, head);
    if (st != STATUS_OK)
        snprintf(e->wish_failed, sizeof e->wish_failed, "%s", status_message());
}

static void forget(engine *e)
{
    expert_copies_forget(e->copies);
    plan_clear(&e->next_plan);
    e->next_epoch = 0;
    e->wish_failed[0] = '\0';
}

static status flip(engine *e)
{
    expert_copies_flip(e->copies);
    plan_clear(&e->own_plan);
    e->own_plan = e->next_plan;
    e->next_plan = (plan){0};
    e->own_plan.epoch = (long long)e->next_epoch;
    e->plan_epoch = e->next_epoch;
    e->next_epoch = 0;
    e->parts.plan = &e->own_plan;
    return model_set_plan(e->model, &e->own_plan);
}

status plans_obey(engine *e, const wire_step *head, bytes_reader *r)
{
    switch ((wire_plan_verb)head->plan_verb) {
    case PLAN_NEW:
        take_new(e, head, r);
        break;
    case PLAN_FORGET:
        forget(e);
        break;
    case PLAN_FLIP:
        return flip(e);
    case PLAN_STAYS:
        break;
    }
    return STATUS_OK;
}

/* Returns the sentence where the wish has failed. */
const char *plans_report(engine *e, wire_report *report)
{
    if (!e->next_epoch)
        return "";
    expert_copies_state s = expert_copies_progress(e->copies);
    report->plan_epoch = e->next_epoch;
    report->loaded = s.loaded;
    report->total = s.total;
    report->plan_failed = s.failed || e->wish_failed[0];
    report->plan_ready = s.ready && !report->plan_failed;
    return s.failed ? expert_copies_why(e->copies) : e->wish_failed;
}

const plan *engine_plan(const engine *e)
{
    return e->parts.plan;
}

uint64_t engine_plan_epoch(const engine *e)
{
    return e->plan_epoch;
}

bool engine_is_settled(engine *e)
{
    return !e->copies || expert_copies_at_rest(e->copies);
}
