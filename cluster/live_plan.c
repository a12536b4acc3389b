#include "cluster/live_plan_parts.h"

#include "cluster/launcher.h"
#include "cluster/plan_store.h"
#include "placement/drift.h"
#include "proto/clock.h"
#include "proto/console.h"
#include "proto/log.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    MEASURE_STEPS = 300, /* after which it is said what a plan has brought; the workers' own means reach back 100 */
    REFERENCE_TOKENS = 4096,
    MOST_COUNTS = 1 << 30, /* bytes of one answer */
};
#define ANSWER_SECONDS 60.0 /* counts that have not come by then are asked for again */

static void known_plan_clear(known_plan *k)
{
    plan_clear(&k->plan);
    free(k->json);
    free(k->counts);
    *k = (known_plan){0};
}

/* ---- made and ended ---- */

static status find_planner(live_plan *lp)
{
    const char *wanted = lp->options.planner;
    const char *path = wanted ? launcher_find_program(wanted) : launcher_find_beside("convoke-plan");
    if (!path)
        return status_fail(STATUS_USAGE, "%s cannot be executed",
                           wanted ? wanted : "convoke-plan, beside this program or on PATH,");
    snprintf(lp->planner, sizeof lp->planner, "%s", path);
    return STATUS_OK;
}

static status find_dir(live_plan *lp)
{
    const live_plan_options *o = &lp->options;
    if (o->dir)
        snprintf(lp->dir, sizeof lp->dir, "%s", o->dir);
    else if ((o->automatic || o->mode == REPLAN_APPLY) && !plan_store_usual_dir(lp->dir) && o->automatic)
        return status_fail(STATUS_USAGE, "there is no folder to keep plans in: give one by --plan-dir, or set HOME");
    return STATUS_OK;
}

static status set_up(live_plan *lp)
{
    if (lp->options.mode != REPLAN_OFF)
        TRY(find_planner(lp));
    TRY(find_dir(lp));
    return lp->options.topology_path ? topology_read(lp->options.topology_path, &lp->given) : STATUS_OK;
}

status live_plan_create(const live_plan_options *options, const live_plan_backend *backend, void *arg, live_plan **out)
{
    live_plan *lp = calloc(1, sizeof *lp);
    if (!lp)
        return status_fail(STATUS_NO_MEMORY, "no memory for plans");
    lp->options = *options;
    lp->backend = backend;
    lp->arg = arg;
    lp->drift = lp->balance = -1;
    lp->verdict = REPLAN_NOT_READY;
    pthread_mutex_init(&lp->lock, NULL);
    status st = set_up(lp);
    if (st != STATUS_OK) {
        live_plan_destroy(lp);
        return st;
    }
    *out = lp;
    return STATUS_OK;
}

static void keep_plan(live_plan *lp)
{
    char path[4096], *json = NULL;
    size_t size = 0;
    pthread_mutex_lock(&lp->lock);
    if (lp->save_due && lp->present.json && (json = strdup(lp->present.json)))
        size = lp->present.json_size;
    int n_ranks = lp->n_ranks, n_nodes = lp->n_nodes;
    lp->save_due = false;
    pthread_mutex_unlock(&lp->lock);
    if (json && (plan_store_path(lp->dir, lp->options.model_dir, n_ranks, n_nodes, path) != STATUS_OK ||
                 plan_store_write(path, json, size) != STATUS_OK))
        log_line("the plan is not kept for the next start: %s", status_message());
    free(json);
}

void live_plan_destroy(live_plan *lp)
{
    if (!lp)
        return;
    replanner_cancel(lp->attempt);
    keep_plan(lp); /* one that went live a moment ago */
    known_plan_clear(&lp->present);
    known_plan_clear(&lp->next);
    topology_clear(&lp->topology);
    topology_clear(&lp->given);
    routing_window_destroy(lp->window);
    plan_meter_clear(&lp->meter);
    bytes_clear(&lp->incoming);
    free(lp->first_counts);
    free(lp->share_of_rank);
    pthread_mutex_destroy(&lp->lock);
    free(lp);
}

/* With the lock held: an attempt is over, and how. Longer than a line of a log is nothing. */
static void conclude(live_plan *lp, replan_outcome outcome, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void conclude(live_plan *lp, replan_outcome outcome, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(lp->last, sizeof lp->last, format, args);
    va_end(args);
    log_line("%s", lp->last);
    lp->outcomes[outcome]++;
    replan_note(&lp->history, &lp->options.limits, outcome, clock_seconds());
}

/* ---- a launch begins ---- */

static int count_nodes(const Convoke__Control__Hello *hello)
{
    uint32_t most = 0;
    for (size_t r = 0; r < hello->n_node_of_rank; r++)
        most = hello->node_of_rank[r] > most ? hello->node_of_rank[r] : most;
    return (int)most + 1;
}

/* A text as a plan for these ranks; json is taken over. */
static status know_plan(const char *where, char *json, size_t size, int n_ranks, known_plan *out)
{
    known_plan k = {.json = json, .json_size = size};
    status st = plan_parse(where, json, size, NULL, &k.plan);
    if (st == STATUS_OK && k.plan.n_ranks != n_ranks)
        st = status_fail(STATUS_BAD_INPUT, "%s is a plan for %d ranks, not for %d", where, k.plan.n_ranks, n_ranks);
    if (st != STATUS_OK) {
        known_plan_clear(&k);
        return st;
    }
    k.counts = plan_store_counts(json, size, &k.plan);
    *out = k;
    return STATUS_OK;
}

static status read_known(const char *path, int n_ranks, known_plan *out)
{
    char *json;
    size_t size;
    TRY(plan_store_read(path, &json, &size));
    return know_plan(path, json, size, n_ranks, out);
}

/* The plan that was kept for these ranks, if there is one. */
static bool take_kept(live_plan *lp, known_plan *out)
{
    char path[4096];
    if (plan_store_path(lp->dir, lp->options.model_dir, lp->n_ranks, lp->n_nodes, path) != STATUS_OK) {
        log_line("%s", status_message());
        return false;
    }
    if (access(path, F_OK) != 0)
        return false;
    if (read_known(path, lp->n_ranks, out) == STATUS_OK)
        return true;
    log_line("%s; experts lie in equal blocks instead", status_message());
    return false;
}

bool live_plan_begin(live_plan *lp, const Convoke__Control__Hello *hello, job_plan *out)
{
    pthread_mutex_lock(&lp->lock);
    lp->n_ranks = (int)hello->n_ranks;
    lp->n_nodes = count_nodes(hello);
    if (live_plan_has_one(lp) && lp->present.plan.n_ranks != lp->n_ranks)
        known_plan_clear(&lp->present);
    bool kept = !live_plan_has_one(lp) && lp->options.automatic && take_kept(lp, &lp->present);
    if (!live_plan_has_one(lp) && lp->options.plan_path && !lp->options.automatic &&
        read_known(lp->options.plan_path, lp->n_ranks, &lp->present) != STATUS_OK)
        known_plan_clear(&lp->present); /* for another number of ranks; the job says so */
    bool planned = lp->present.json != NULL;
    if (planned)
        *out = (job_plan){.json = lp->present.json, .name = lp->present.plan.name, .epoch = (uint64_t)lp->present.plan.epoch};
    if (kept)
        log_line("plan %s, epoch %lld, was kept from earlier", lp->present.plan.name, lp->present.plan.epoch);
    pthread_mutex_unlock(&lp->lock);
    return planned;
}

/* What planning is priced with: what was given, or a small CPU rank's constants; nodes and sizes are this launch's. */
static status price_machine(live_plan *lp, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    topology t = {0};
    bool given = lp->given.n_ranks == lp->n_ranks;
    TRY(given ? topology_copy(&lp->given, &t) : topology_uniform(lp->n_ranks, 1, &t));
    topology_clear(&lp->topology);
    lp->topology = t;
    if (ready->expert_bytes > 0)
        lp->topology.bytes_per_expert = (int64_t)ready->expert_bytes;
    if (given)
        return STATUS_OK;
    if (ready->row_bytes > 0)
        lp->topology.row_bytes = ready->row_bytes;
    return topology_set_nodes(&lp->topology, hello->node_of_rank);
}

static status contiguous(live_plan *lp, const Convoke__Control__Ready *ready, known_plan *out)
{
    plan_shape shape = {.n_ranks = lp->n_ranks, .n_experts = (int)ready->n_experts, .n_layers = (int)ready->n_layers};
    int *layers = malloc((ready->n_layers + 1) * sizeof *layers);
    if (!layers)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan");
    for (size_t l = 0; l < ready->n_layers; l++)
        layers[l] = (int)ready->layers[l];
    shape.layer_numbers = layers;
    status st = plan_contiguous(&shape, lp->topology.node_of_rank, &out->plan);
    free(layers);
    return st;
}

static status open_window(live_plan *lp, const Convoke__Control__Ready *ready)
{
    static const char *const domain = "served";
    if (lp->window || lp->options.statistics_seconds <= 0)
        return STATUS_OK;
    const plan *p = &lp->present.plan;
    routing_shape shape = {.model = lp->model,
                           .n_experts = p->n_experts,
                           .top_k = (int)ready->top_k,
                           .n_layers = p->n_layers,
                           .n_domains = 1,
                           .layer_numbers = p->layer_numbers,
                           .domains = &domain};
    return routing_window_create(&shape, lp->options.mode != REPLAN_OFF, lp->options.window_tokens, &lp->window);
}

/* Workers without experts, or of an older kind, say nothing of them: then there is nothing to plan. */
static status take_launch(live_plan *lp, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    if (ready->n_experts == 0 || ready->n_layers == 0)
        return status_fail(STATUS_UNSUPPORTED, "the workers do not say how many experts there are");
    snprintf(lp->model, sizeof lp->model, "%s", ready->model_name);
    TRY(price_machine(lp, ready, hello));
    if (!live_plan_has_one(lp))
        TRY(contiguous(lp, ready, &lp->present));
    if (lp->present.plan.n_experts != (int)ready->n_experts || lp->present.plan.n_layers != (int)ready->n_layers)
        return status_fail(STATUS_BAD_INPUT, "the plan is not of the model that runs");
    for (int r = 0; r < lp->n_ranks; r++) /* a plan that was kept may say where ranks were then */
        lp->present.plan.node_of_rank[r] = (int)hello->node_of_rank[r];
    double *shares = realloc(lp->share_of_rank, (size_t)lp->n_ranks * sizeof *shares);
    if (!shares || !plan_meter_reset(&lp->meter, lp->n_ranks))
        return status_fail(STATUS_NO_MEMORY, "no memory to watch %d ranks", lp->n_ranks);
    lp->share_of_rank = shares;
    return open_window(lp, ready);
}

void live_plan_ready(live_plan *lp, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    pthread_mutex_lock(&lp->lock);
    status st = take_launch(lp, ready, hello);
    lp->ready = st == STATUS_OK;
    lp->has_numbers = false;
    lp->under_way = false;
    lp->rows_asked = 0;
    lp->asked_at = clock_seconds();
    lp->last_epoch = (long long)ready->plan_epoch > lp->last_epoch ? (long long)ready->plan_epoch : lp->last_epoch;
    if (st != STATUS_OK && lp->options.mode != REPLAN_OFF)
        log_line("no plans are made: %s", status_message());
    pthread_mutex_unlock(&lp->lock);
}

void live_plan_lost(live_plan *lp)
{
    pthread_mutex_lock(&lp->lock);
    lp->ready = lp->under_way = lp->measuring = false;
    if (lp->coming) {
        lp->coming = false;
        conclude(lp, REPLAN_FAILED, "plan %lld was not live yet when the workers were lost; they start again with plan %s",
                 lp->next.plan.epoch, lp->present.plan.name);
        known_plan_clear(&lp->next);
    }
    pthread_mutex_unlock(&lp->lock);
}

/* ---- how the plan does ---- */

static void measure_shares(live_plan *lp, const uint64_t *counts)
{
    const plan *p = &lp->present.plan;
    double sum = 0;
    memset(lp->share_of_rank, 0, (size_t)p->n_ranks * sizeof *lp->share_of_rank);
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            int n = plan_n_copies(p, l, e);
            double rows = (double)counts[(size_t)l * (size_t)p->n_experts + (size_t)e];
            sum += rows;
            for (int c = 0; c < n; c++)
                lp->share_of_rank[plan_copies(p, l, e)[c]] += rows / n;
        }
    for (int r = 0; sum > 0 && r < p->n_ranks; r++)
        lp->share_of_rank[r] /= sum;
}

static void measure_drift(live_plan *lp, const uint64_t *counts, double tokens)
{
    const plan *p = &lp->present.plan;
    size_t n = (size_t)p->n_layers * (size_t)p->n_experts;
    const uint64_t *made_from = lp->present.counts ? lp->present.counts : lp->first_counts;
    lp->drift = -1;
    if (!made_from && tokens >= REFERENCE_TOKENS && (lp->first_counts = malloc(n * sizeof *counts)))
        memcpy(lp->first_counts, counts, n * sizeof *counts);
    drift_of_layer *layers = made_from ? malloc((size_t)p->n_layers * sizeof *layers) : NULL;
    if (!layers)
        return;
    drift_compare(p->n_layers, p->n_experts, made_from, counts, layers);
    lp->drift = drift_level(p->n_layers, layers);
    lp->drift_error = 0;
    for (int l = 0; l < p->n_layers; l++)
        lp->drift_error =
            fmax(lp->drift_error, replan_drift_error(made_from + (size_t)l * (size_t)p->n_experts, p->n_experts, tokens));
    free(layers);
}

/* With the lock held, when counts have come or the plan is another. */
static void measure_plan(live_plan *lp)
{
    double tokens = (double)routing_window_tokens(lp->window);
    const uint64_t *counts = routing_window_counts(lp->window);
    lp->has_numbers = false;
    if (!lp->ready || tokens < 1 ||
        replan_measure(&lp->present.plan, counts, tokens, &lp->balance, &lp->balance_error) != STATUS_OK)
        return;
    measure_shares(lp, counts);
    measure_drift(lp, counts, tokens);
    lp->has_numbers = true;
}

void live_plan_statistics(live_plan *lp, const Convoke__Control__Statistics *s)
{
    pthread_mutex_lock(&lp->lock);
    bool expected = lp->under_way && lp->window && s->id == lp->asked;
    bool whole = expected && s->part == lp->next_part && !*s->failed && lp->incoming.size + s->counts.len <= MOST_COUNTS;
    if (whole) {
        bytes_put(&lp->incoming, s->counts.data, s->counts.len);
        lp->next_part++;
    }
    if (expected && (s->last || !whole)) {
        lp->under_way = false;
        if (*s->failed)
            log_line("no counts from the workers: %s", s->failed);
        else if (!whole || lp->incoming.failed)
            log_line("counts from the workers were not whole");
        else if (routing_window_add(lp->window, lp->incoming.data, lp->incoming.size) != STATUS_OK)
            log_line("%s", status_message());
        else
            measure_plan(lp);
        bytes_clear(&lp->incoming);
    }
    pthread_mutex_unlock(&lp->lock);
}

/* ---- a plan goes live ---- */

static void say_live(live_plan *lp, const Convoke__Control__ReplanState *state)
{
    const known_plan *k = &lp->present;
    conclude(lp, REPLAN_LIVE, "plan %lld is live%s%s, %s were loaded", k->plan.epoch, state ? " after " : "",
             state ? human_seconds(state->seconds).text : "",
             human_bytes((double)(state ? state->loaded_bytes : lp->loaded_bytes)).text);
}

/* With the lock held: the workers step under the plan that was on its way. */
static void go_live(live_plan *lp, const Convoke__Control__ReplanState *state)
{
    lp->before = plan_meter_read(&lp->meter);
    known_plan_clear(&lp->present);
    lp->present = lp->next;
    lp->next = (known_plan){0};
    lp->coming = false;
    lp->measuring = plan_meter_reset(&lp->meter, lp->n_ranks);
    lp->save_due = *lp->dir != '\0';
    say_live(lp, state);
    if (lp->window)
        measure_plan(lp);
}

static void note_replan(live_plan *lp, const Convoke__Control__ReplanState *state)
{
    if (!lp->coming || state->epoch != (uint64_t)lp->next.plan.epoch)
        return;
    lp->loaded_bytes = state->loaded_bytes;
    lp->total_bytes = state->total_bytes;
    switch (state->stage) {
    case CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE:
        go_live(lp, state);
        return;
    case CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED:
    case CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REPLACED:
        lp->coming = false;
        conclude(lp, REPLAN_FAILED, "the workers did not take plan %lld%s%.400s; plan %s stays in force", lp->next.plan.epoch,
                 *state->reason ? ": " : "", state->reason, lp->present.plan.name);
        known_plan_clear(&lp->next);
        return;
    default:
        return;
    }
}

void live_plan_report(live_plan *lp, const Convoke__Control__Report *report)
{
    char name[64] = "";
    uint64_t epoch = 0;
    if (report->partial)
        return;
    pthread_mutex_lock(&lp->lock);
    long long before = lp->present.plan.epoch;
    for (size_t i = 0; i < report->n_replans; i++)
        note_replan(lp, report->replans[i]);
    if (lp->coming && report->plan_epoch == (uint64_t)lp->next.plan.epoch)
        go_live(lp, NULL);
    if (lp->present.plan.epoch != before) { /* epochs only rise */
        snprintf(name, sizeof name, "%s", lp->present.plan.name);
        epoch = (uint64_t)lp->present.plan.epoch;
    }
    plan_meter_note(&lp->meter, report, clock_seconds());
    if (lp->measuring && lp->meter.now.steps >= MEASURE_STEPS) {
        plan_measure after = plan_meter_read(&lp->meter);
        live_plan_say_brought(lp, &after, lp->last, sizeof lp->last);
        log_line("%s", lp->last);
        lp->measuring = false;
    }
    pthread_mutex_unlock(&lp->lock);
    if (*name)
        lp->backend->live(lp->arg, name, epoch);
}

/* ---- an attempt ---- */

/* With the lock held. */
static void start_attempt(live_plan *lp)
{
    char name[64];
    routing_stats *a = NULL, *b = NULL;
    if (!routing_window_take(lp->window, &a, &b))
        return;
    snprintf(name, sizeof name, "auto-%lld", lp->last_epoch + 1);
    replan_request request = {.program = lp->planner,
                              .solver = lp->options.solver,
                              .seconds = lp->options.plan_seconds,
                              .threads = lp->options.plan_threads,
                              .extra_slots = lp->options.extra_slots,
                              .topology = &lp->topology,
                              .present = &lp->present.plan,
                              .model_name = lp->model,
                              .name = name,
                              .epoch = ++lp->last_epoch,
                              .stats = {a, b}};
    lp->takes = lp->wanted ? lp->wanted_take : TAKE_BY_MODE;
    if (lp->takes == TAKE_BY_MODE && lp->options.mode == REPLAN_APPLY)
        lp->takes = TAKE_IF_IT_PAYS;
    lp->wanted = false;
    if (replanner_start(&request, &lp->attempt) == STATUS_OK) {
        log_line("planning, because %s (busiest rank %.2fx of the mean, drift %.3f, over %llu tokens)", replan_words(lp->verdict),
                 lp->balance, fmax(lp->drift, 0), (unsigned long long)routing_window_tokens(lp->window));
        return;
    }
    conclude(lp, REPLAN_FAILED, "no new plan: %s", status_message());
    routing_stats_destroy(a);
    routing_stats_destroy(b);
    routing_window_give_back(lp->window, NULL);
}

static replan_case weigh(const live_plan *lp, const replan_result *r)
{
    plan_measure m = plan_meter_read(&lp->meter);
    double expert = (double)lp->topology.bytes_per_expert, rate = (double)lp->options.bytes_per_second;
    replan_case c = {.bytes = r->n_copies * expert, .move_seconds = rate > 0 ? r->most_copies * expert / rate : 0};
    c.prospect = (replan_prospect){.balance_now = r->balance_now,
                                   .balance_new = r->balance_new,
                                   .balance_error = r->error,
                                   .step_us_now = r->step_us_now,
                                   .step_us_new = r->step_us_new,
                                   .step_seconds = m.step_seconds,
                                   .excess_seconds = m.excess_seconds,
                                   .tokens_per_step = m.rows_per_step,
                                   .tokens_per_second = m.rows_per_second,
                                   .work_seconds = r->link_seconds >= 0 ? r->link_seconds : c.move_seconds};
    c.gain = replan_weigh(&c.prospect, &lp->options.limits);
    return c;
}

static void expect(live_plan *lp, replan_result *r)
{
    known_plan_clear(&lp->next);
    lp->next = (known_plan){.plan = r->plan, .json = r->json, .json_size = r->json_size, .counts = r->counts};
    r->plan = (plan){0};
    r->json = NULL;
    r->counts = NULL;
    lp->coming = true;
    lp->loaded_bytes = lp->total_bytes = 0;
}

/* With the lock held; true: the plan is to be sent. */
static bool judge_result(live_plan *lp, replan_result *r)
{
    char sentence[900];
    if (r->st != STATUS_OK) {
        conclude(lp, REPLAN_FAILED, "no new plan: %s", r->why);
        return false;
    }
    if (!lp->ready || r->plan.n_ranks != lp->present.plan.n_ranks) {
        conclude(lp, REPLAN_FAILED, "a new plan is not used: the workers were lost while it was made");
        return false;
    }
    if (r->n_copies == 0) {
        conclude(lp, REPLAN_USELESS, "the planner found nothing better than plan %s in %s", lp->present.plan.name,
                 human_seconds(r->took).text);
        return false;
    }
    replan_case c = weigh(lp, r);
    live_plan_say_case(r, &c, &lp->options.limits, sentence, sizeof sentence);
    if (c.gain.worth != REPLAN_PAYS && lp->takes != TAKE_ALWAYS) {
        conclude(lp, REPLAN_USELESS, "%s", sentence);
        return false;
    }
    if (lp->takes == TAKE_BY_MODE) {
        conclude(lp, REPLAN_SUGGESTED, "%s", sentence);
        return false;
    }
    snprintf(lp->last, sizeof lp->last, "%s%s", sentence,
             c.gain.worth == REPLAN_PAYS ? "" : "; it is taken all the same, as somebody asked");
    log_line("%s", lp->last);
    expect(lp, r);
    return true;
}

/* On the main thread, without the lock. The plan's text is copied: `next` may be gone at any moment, by the job's thread. */
static void send_next(live_plan *lp)
{
    char name[64], *json;
    pthread_mutex_lock(&lp->lock);
    uint64_t epoch = (uint64_t)lp->next.plan.epoch;
    snprintf(name, sizeof name, "%s", lp->next.plan.name);
    json = lp->coming ? strdup(lp->next.json) : NULL;
    pthread_mutex_unlock(&lp->lock);
    job_plan message = {.json = json, .name = name, .epoch = epoch};
    bool sent = json && lp->backend->send(lp->arg, &message, lp->options.bytes_per_second);
    free(json);
    if (sent)
        return;
    pthread_mutex_lock(&lp->lock);
    if (lp->coming) {
        lp->coming = false;
        conclude(lp, REPLAN_FAILED, "plan %llu could not be sent: the workers are lost", (unsigned long long)epoch);
        known_plan_clear(&lp->next);
    }
    pthread_mutex_unlock(&lp->lock);
}

static void finish_attempt(live_plan *lp, replanner *attempt)
{
    replan_result r;
    replanner_finish(attempt, &r);
    pthread_mutex_lock(&lp->lock);
    lp->attempt = NULL;
    routing_window_give_back(lp->window, r.stats);
    r.stats = NULL;
    bool send = judge_result(lp, &r);
    pthread_mutex_unlock(&lp->lock);
    replan_result_clear(&r);
    if (send)
        send_next(lp);
}

/* ---- time passes ---- */

static bool is_time_to_ask(live_plan *lp, double now)
{
    if (!lp->ready || !lp->window)
        return false;
    if (lp->under_way && now < lp->asked_at + ANSWER_SECONDS)
        return false;
    return now >= lp->asked_at + lp->options.statistics_seconds && (lp->under_way || lp->meter.now.rows != lp->rows_asked);
}

static void ask_for_counts(live_plan *lp)
{
    pthread_mutex_lock(&lp->lock);
    double now = clock_seconds();
    bool due = is_time_to_ask(lp, now);
    uint64_t id = 0;
    if (due) {
        id = ++lp->asked;
        lp->under_way = true;
        lp->asked_at = now;
        lp->rows_asked = lp->meter.now.rows;
        lp->next_part = 0;
        bytes_reset(&lp->incoming);
    }
    pthread_mutex_unlock(&lp->lock);
    if (due && !lp->backend->ask_statistics(lp->arg, id)) {
        pthread_mutex_lock(&lp->lock);
        lp->under_way = false;
        pthread_mutex_unlock(&lp->lock);
    }
}

/* With the lock held. */
static replan_sight look(const live_plan *lp)
{
    return (replan_sight){.now = clock_seconds(),
                          .n_ranks = lp->n_ranks,
                          .ready = lp->ready && lp->window,
                          .busy = lp->attempt || lp->coming,
                          .asked = lp->wanted,
                          .tokens = lp->has_numbers ? (double)routing_window_tokens(lp->window) : 0,
                          .balance = lp->has_numbers ? lp->balance : 1,
                          .balance_error = lp->balance_error,
                          .drift = lp->has_numbers ? lp->drift : -1,
                          .drift_error = lp->drift_error};
}

void live_plan_tick(live_plan *lp)
{
    ask_for_counts(lp);
    keep_plan(lp);
    pthread_mutex_lock(&lp->lock);
    replanner *done = lp->attempt && replanner_done(lp->attempt) ? lp->attempt : NULL;
    replan_sight sight = look(lp);
    lp->verdict = replan_judge(&sight, &lp->history, &lp->options.limits);
    if (!done && lp->options.mode != REPLAN_OFF && replan_goes(lp->verdict))
        start_attempt(lp);
    pthread_mutex_unlock(&lp->lock);
    if (done)
        finish_attempt(lp, done);
}

/* ---- doors ---- */

status live_plan_ask(live_plan *lp, plan_take take)
{
    if (lp->options.mode == REPLAN_OFF)
        return status_fail(STATUS_UNSUPPORTED, "replanning is off: start with --replan suggest or apply");
    pthread_mutex_lock(&lp->lock);
    replan_sight sight = look(lp);
    sight.asked = true;
    replan_verdict verdict = replan_judge(&sight, &lp->history, &lp->options.limits);
    if (replan_goes(verdict)) {
        lp->wanted = true;
        lp->wanted_take = take;
    }
    pthread_mutex_unlock(&lp->lock);
    return replan_goes(verdict) ? STATUS_OK : status_fail(STATUS_STOPPED, "no plan now: %s", replan_words(verdict));
}

void live_plan_look(live_plan *lp, void (*show)(void *arg, const live_plan_numbers *numbers), void *arg)
{
    pthread_mutex_lock(&lp->lock);
    live_plan_numbers n = {.balance = lp->has_numbers ? lp->balance : -1,
                           .drift = lp->has_numbers ? lp->drift : -1,
                           .tokens = lp->window ? routing_window_tokens(lp->window) : 0,
                           .n_ranks = lp->has_numbers ? lp->n_ranks : 0,
                           .share_of_rank = lp->share_of_rank};
    memcpy(n.outcomes, lp->outcomes, sizeof n.outcomes);
    show(arg, &n);
    pthread_mutex_unlock(&lp->lock);
}
