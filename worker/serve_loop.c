#include "worker/serve_loop.h"

#include "proto/clock.h"
#include "proto/log.h"
#include "worker/kv_cache.h"
#include "worker/runtime.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMPT_CHUNK       512 /* prompt rows per rank and step at most; time decides below that */
#define DEFAULT_SEQUENCES  64
#define DEFAULT_HANG_MS    10000
#define PARTIAL_BYTES      ((size_t)4 << 20) /* events of one step beyond this leave in a Report of their own */
#define CANDIDATES_AT_ONCE 65536             /* in one PROMPT event; longer ones are cut by rows */
#define SHARE_SECONDS      5.0
#define ERRAND_SECONDS     0.02 /* between steps that nobody but a plan or statistics under way asks for */
#define NEWS_SECONDS       0.25 /* between Reports of such steps where nothing but a number has changed */
#define COUNTS_PART_BYTES  ((size_t)4 << 20)
enum { MOST_ENDED = 16, MOST_ASKED = 16 };

typedef Convoke__Control__TokenLogprob wire_logprob;

/* A plan that will not be live any more; told once. */
typedef struct {
    uint64_t epoch;
    Convoke__Control__ReplanStage stage;
    char reason[512];
} ended_plan;

typedef struct {
    group *group;
    control_link *link; /* NULL: not rank 0 */
    watch *watch;
    const Convoke__Control__Setup *setup;
    runtime *runtime;
    engine *engine;
    int n_ranks;
    bool stopping;

    bytes_writer events, frame; /* of the step under way; memory is kept */
    status listening;           /* what went wrong inside the listener */
    char listening_why[512];
    wire_logprob *logprobs; /* as many as the largest event had, with candidates behind */
    wire_logprob **pointers;
    uint32_t *counts;
    size_t room, room_counts;
    token_bias *biases;
    size_t room_biases;
    uint32_t *kv_free;      /* [n_ranks] */
    uint64_t *rows_of_rank; /* [n_ranks] */
    double *compute;        /* [n_ranks] */
    double load_started;

    ended_plan ended[MOST_ENDED];
    int n_ended;
    engine_replan_stage told_stage; /* of the last one asked for */
    double told_at;
    uint64_t asked[MOST_ASKED]; /* requests for statistics, oldest first; the first is under way */
    int n_asked;
} server;

/* ---- setup ---- */

static status choose(const char *key, const char *value, const char *const *names, int n, int *out)
{
    for (int i = 0; i < n; i++)
        if (strcmp(value, names[i]) == 0) {
            *out = i;
            return STATUS_OK;
        }
    return status_fail(STATUS_BAD_INPUT, "the coordinator's setup: %s: '%s' is unknown", key, value);
}

static void show_progress(void *arg, const char *stage, size_t done, size_t total)
{
    group_pulse *pulse = arg;
    (void)stage;
    atomic_store_explicit(&pulse->total, total, memory_order_relaxed);
    atomic_store_explicit(&pulse->done, done, memory_order_relaxed);
}

static status read_setup(const server *s, runtime_options *o)
{
    static const char *const combines[] = {"exact", "fixed", "fast"}, *const weights[] = {"map", "copy"};
    static const char *const rows[] = {"fp32", "bf16"}, *domain = "served";
    static const char *const replicas[] = {"owner-first", "round-robin", "step"}, *const owners[] = {"spread", "affinity"};
    const Convoke__Control__Setup *from = s->setup;
    int combine = COMBINE_FIXED, weight = 0, row = 0, replica = 0, owner = OWNERS_SPREAD;
    if (*from->combine)
        TRY(choose("combine", from->combine, combines, 3, &combine));
    if (*from->weights)
        TRY(choose("weights", from->weights, weights, 2, &weight));
    if (*from->rows)
        TRY(choose("rows", from->rows, rows, 2, &row));
    if (*from->replicas)
        TRY(choose("replicas", from->replicas, replicas, 3, &replica));
    if (*from->owners)
        TRY(choose("owners", from->owners, owners, 2, &owner));
    if (!*from->model_dir)
        return status_fail(STATUS_BAD_INPUT, "the coordinator's setup names no model");
    if (from->max_sequences > 65536 || from->max_length > INT_MAX || from->threads > 1024)
        return status_fail(STATUS_BAD_INPUT, "the coordinator's setup: %u sequences of %u tokens by %u threads are out of range",
                           from->max_sequences, from->max_length, from->threads);
    *o = (runtime_options){.model_dir = from->model_dir,
                           .plan_text = *from->plan_json ? from->plan_json : NULL,
                           .plan_epoch = from->plan_epoch,
                           .isa = *from->isa ? from->isa : NULL,
                           .threads = (int)from->threads,
                           .weights = weight == 0 ? WEIGHTS_MAP : WEIGHTS_COPY,
                           .combine = (combine_mode)combine,
                           .rows = row == 0 ? ROWS_F32 : ROWS_BF16,
                           .replicas = (replica_choice)replica,
                           .topology_text = *from->topology_json ? from->topology_json : NULL,
                           .progress = show_progress,
                           .progress_arg = group_pulse_of(s->group, group_rank(s->group)),
                           .limits = {.max_sequences = from->max_sequences ? (int)from->max_sequences : DEFAULT_SEQUENCES,
                                      .chunk = PROMPT_CHUNK,
                                      .max_length = (int)from->max_length,
                                      .kv_bytes = from->kv_bytes,
                                      .step_seconds = from->step_budget_us * 1e-6,
                                      .prefix_cache = from->prefix_cache,
                                      .owners = (engine_owners)owner,
                                      .count_pairs = from->count_pairs,
                                      .n_domains = 1,
                                      .domains = &domain}};
    return STATUS_OK;
}

/* ---- events to the coordinator ---- */

static status grow(void *array_pointer, size_t *room, size_t want, size_t item)
{
    void **array = array_pointer;
    if (want <= *room)
        return STATUS_OK;
    size_t more = want + want / 2 + 64;
    void *grown = realloc(*array, more * item);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu log-probabilities", want);
    *array = grown;
    *room = more;
    return STATUS_OK;
}

static status reserve_logprobs(server *s, size_t n)
{
    size_t room = s->room, room_pointers = s->room;
    TRY(grow(&s->logprobs, &room, n, sizeof *s->logprobs));
    TRY(grow(&s->pointers, &room_pointers, n, sizeof *s->pointers));
    for (size_t i = 0; i < room && room > s->room; i++)
        s->pointers[i] = &s->logprobs[i];
    s->room = room;
    return STATUS_OK;
}

static void put_logprobs(server *s, size_t at, const token_logprob *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        convoke__control__token_logprob__init(&s->logprobs[at + i]);
        s->logprobs[at + i].token = (uint32_t)from[i].token;
        s->logprobs[at + i].logprob = from[i].logprob;
        s->logprobs[at + i].rank = (uint32_t)from[i].rank;
    }
}

/* Points an event at n_tokens entries and the candidates behind them. */
static void attach_logprobs(const server *s, Convoke__Control__Event *w, size_t n_tokens, size_t n_candidates, size_t n_counts)
{
    w->n_tokens = n_tokens;
    w->tokens = s->pointers;
    w->n_candidates = n_candidates;
    w->candidates = s->pointers + n_tokens;
    w->n_candidates_of_token = n_candidates ? n_counts : 0;
    w->candidates_of_token = s->counts;
}

static status add_token(server *s, Convoke__Control__Event *w, const engine_event *e)
{
    size_t n = e->n_candidates > 0 ? (size_t)e->n_candidates : 0;
    const token_logprob own = {.token = e->token, .rank = e->rank, .logprob = e->logprob};
    TRY(reserve_logprobs(s, n + 1));
    TRY(grow(&s->counts, &s->room_counts, 1, sizeof *s->counts));
    put_logprobs(s, 0, &own, 1);
    put_logprobs(s, 1, e->candidates, n);
    s->counts[0] = (uint32_t)n;
    w->kind = CONVOKE__CONTROL__EVENT_KIND__TOKEN;
    attach_logprobs(s, w, 1, n, 1);
    return control_add_event(&s->events, w);
}

static status flush_partial(server *s);

/* Prompt rows with all candidates may be far more than a frame holds: cut by rows. */
static status add_prompt(server *s, Convoke__Control__Event *w, const engine_event *e)
{
    const token_logprob *candidates = e->candidates;
    w->kind = CONVOKE__CONTROL__EVENT_KIND__PROMPT;
    for (int row = 0; row < e->n_rows;) {
        int rows = 0;
        size_t n = 0;
        while (row + rows < e->n_rows) {
            size_t more = e->candidates_of_row ? (size_t)e->candidates_of_row[row + rows] : 0;
            if (rows > 0 && n + more > CANDIDATES_AT_ONCE)
                break;
            n += more;
            rows++;
        }
        TRY(reserve_logprobs(s, n + (size_t)rows));
        TRY(grow(&s->counts, &s->room_counts, (size_t)rows, sizeof *s->counts));
        put_logprobs(s, 0, e->logprobs + row, (size_t)rows);
        put_logprobs(s, (size_t)rows, candidates, n);
        for (int i = 0; i < rows; i++)
            s->counts[i] = e->candidates_of_row ? (uint32_t)e->candidates_of_row[row + i] : 0;
        w->first_position = (uint32_t)(e->first_position + row);
        attach_logprobs(s, w, (size_t)rows, n, (size_t)rows);
        TRY(control_add_event(&s->events, w));
        TRY(flush_partial(s));
        candidates += n;
        row += rows;
    }
    return STATUS_OK;
}

static status add_finished(server *s, uint64_t id, Convoke__Control__Finish finish, const char *reason)
{
    Convoke__Control__Event w = CONVOKE__CONTROL__EVENT__INIT;
    w.id = id;
    w.kind = CONVOKE__CONTROL__EVENT_KIND__FINISHED;
    w.finish = finish;
    if (reason)
        w.reason = (char *)reason;
    return control_add_event(&s->events, &w);
}

static Convoke__Control__Finish finish_of(engine_finish finish)
{
    switch (finish) {
    case ENGINE_FINISH_LENGTH:
        return CONVOKE__CONTROL__FINISH__LENGTH;
    case ENGINE_FINISH_STOP:
        return CONVOKE__CONTROL__FINISH__STOP;
    case ENGINE_FINISH_CANCELLED:
        return CONVOKE__CONTROL__FINISH__CANCELLED;
    default:
        return CONVOKE__CONTROL__FINISH__FAILED;
    }
}

static status add_event(server *s, const engine_event *e)
{
    Convoke__Control__Event w = CONVOKE__CONTROL__EVENT__INIT;
    w.id = e->id;
    switch (e->kind) {
    case ENGINE_EVENT_STARTED:
        w.kind = CONVOKE__CONTROL__EVENT_KIND__STARTED;
        w.owner = (uint32_t)e->owner;
        w.n_cached = (uint32_t)e->n_cached;
        return control_add_event(&s->events, &w);
    case ENGINE_EVENT_PROMPT:
        return add_prompt(s, &w, e);
    case ENGINE_EVENT_TOKEN:
        return add_token(s, &w, e);
    case ENGINE_EVENT_FINISHED:
        return add_finished(s, e->id, finish_of(e->finish), e->reason);
    default:
        return STATUS_OK; /* rows: nobody here asks for them */
    }
}

static void hear_event(void *arg, const engine_event *e)
{
    server *s = arg;
    status st = s->listening == STATUS_OK ? add_event(s, e) : STATUS_OK;
    if (st == STATUS_OK && s->listening == STATUS_OK)
        st = flush_partial(s);
    if (st == STATUS_OK)
        return;
    s->listening = st;
    snprintf(s->listening_why, sizeof s->listening_why, "%s", status_message());
}

/* ---- reports ---- */

static status send_message(server *s, const Convoke__Control__ToCoordinator *m)
{
    bytes_reset(&s->frame);
    TRY(control_put_to_coordinator(&s->frame, m));
    return control_link_send(s->link, s->frame.data, s->frame.size);
}

static status send_events(server *s, const Convoke__Control__Report *head)
{
    bytes_reset(&s->frame);
    TRY(control_put_report(&s->frame, head, &s->events));
    bytes_reset(&s->events);
    return control_link_send(s->link, s->frame.data, s->frame.size);
}

static status flush_partial(server *s)
{
    if (s->events.size < PARTIAL_BYTES)
        return STATUS_OK;
    Convoke__Control__Report head = CONVOKE__CONTROL__REPORT__INIT;
    head.launch = s->setup->launch;
    head.partial = true;
    return send_events(s, &head);
}

static Convoke__Control__ReplanStage stage_of(engine_replan_stage stage)
{
    switch (stage) {
    case ENGINE_REPLAN_READY:
        return CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_READY;
    case ENGINE_REPLAN_LIVE:
        return CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE;
    case ENGINE_REPLAN_FAILED:
        return CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED;
    default:
        return CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LOADING;
    }
}

/* Those that ended otherwise, and the last one asked for, until it has been told how that ended. */
static size_t fill_replans(server *s, const engine_replan_state *now, Convoke__Control__ReplanState *out)
{
    size_t n = 0;
    for (int i = 0; i < s->n_ended; i++, n++) {
        convoke__control__replan_state__init(&out[n]);
        out[n].epoch = s->ended[i].epoch;
        out[n].stage = s->ended[i].stage;
        out[n].reason = s->ended[i].reason;
    }
    bool over = now->stage == ENGINE_REPLAN_LIVE || now->stage == ENGINE_REPLAN_FAILED;
    if (now->stage != ENGINE_REPLAN_NONE && !(over && s->told_stage == now->stage)) {
        convoke__control__replan_state__init(&out[n]);
        out[n].epoch = now->epoch;
        out[n].stage = stage_of(now->stage);
        out[n].loaded_bytes = now->loaded_bytes;
        out[n].total_bytes = now->total_bytes;
        out[n].copies = now->copies;
        out[n].seconds = now->seconds;
        if (now->stage == ENGINE_REPLAN_FAILED)
            out[n].reason = (char *)now->reason;
        n++;
    }
    return n;
}

static void note_told(server *s, const engine_replan_state *now)
{
    if (s->told_stage != now->stage && now->stage == ENGINE_REPLAN_LIVE)
        log_line("plan epoch %llu live after %.2f s: %u new copies, %.1f MB loaded", (unsigned long long)now->epoch, now->seconds,
                 now->copies, (double)now->total_bytes * 1e-6);
    if (s->told_stage != now->stage && now->stage == ENGINE_REPLAN_FAILED)
        log_line("plan epoch %llu does not become live: %s", (unsigned long long)now->epoch, now->reason);
    s->told_stage = now->stage;
    s->n_ended = 0;
    s->told_at = clock_seconds();
}

static status send_report(server *s)
{
    Convoke__Control__Report head = CONVOKE__CONTROL__REPORT__INIT;
    Convoke__Control__ReplanState replans[MOST_ENDED + 1], *pointers[MOST_ENDED + 1];
    engine_counters c;
    engine_get_counters(s->engine, &c);
    for (int r = 0; r < s->n_ranks; r++) {
        s->kv_free[r] = (uint32_t)c.kv_free_of_rank[r];
        s->rows_of_rank[r] = c.rows_of_rank[r];
        s->compute[r] = c.compute_of_rank[r];
    }
    for (int i = 0; i <= MOST_ENDED; i++)
        pointers[i] = &replans[i];
    uint64_t link_bytes[3] = {c.link_bytes[0], c.link_bytes[1], c.link_bytes[2]};
    head.launch = s->setup->launch;
    head.step = c.n_steps;
    head.step_seconds = c.last_seconds;
    head.prefill_rows = (uint32_t)c.last_prefill_rows;
    head.decode_rows = (uint32_t)c.last_decode_rows;
    head.n_running = (uint32_t)c.n_running;
    head.n_waiting = (uint32_t)c.n_waiting;
    head.n_preempted = c.n_preempted;
    head.prefix_queries = c.prefix_queries;
    head.prefix_hits = c.prefix_hits;
    head.n_kv_free_of_rank = head.n_tokens_of_rank = head.n_lateness_of_rank = (size_t)s->n_ranks;
    head.kv_free_of_rank = s->kv_free;
    head.tokens_of_rank = s->rows_of_rank;
    head.lateness_of_rank = (double *)c.lateness_of_rank; /* packed, never written */
    head.n_link_bytes = 3;
    head.link_bytes = link_bytes;
    head.n_load_max_over_mean = (size_t)runtime_config(s->runtime)->n_moe_layers;
    head.load_max_over_mean = (double *)c.load_max_over_mean;
    head.plan_epoch = c.plan_epoch;
    head.n_moved = c.n_moved;
    head.moved_bytes = c.moved_bytes;
    head.n_replans = fill_replans(s, &c.replan, replans);
    head.replans = pointers;
    head.n_compute_seconds_of_rank = (size_t)s->n_ranks;
    head.compute_seconds_of_rank = s->compute;
    TRY(send_events(s, &head));
    note_told(s, &c.replan);
    return STATUS_OK;
}

/* ---- statistics ---- */

static status send_counts_part(server *s, uint64_t id, const engine_counts *c, size_t at, uint32_t part)
{
    Convoke__Control__Statistics w = CONVOKE__CONTROL__STATISTICS__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    w.launch = s->setup->launch;
    w.id = id;
    w.part = part;
    if (c->failed) {
        w.failed = (char *)c->failed;
        w.last = true;
    } else {
        w.tokens = c->tokens;
        w.counts.data = (uint8_t *)(uintptr_t)c->bytes + at; /* packed, never written */
        w.counts.len = c->size - at < COUNTS_PART_BYTES ? c->size - at : COUNTS_PART_BYTES;
        w.last = at + w.counts.len == c->size;
    }
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_STATISTICS;
    m.statistics = &w;
    return send_message(s, &m);
}

static status ask_next_counts(server *s)
{
    return s->n_asked > 0 ? engine_ask_counts(s->engine) : STATUS_OK;
}

static status send_counts(server *s)
{
    engine_counts c;
    if (!engine_take_counts(s->engine, &c))
        return STATUS_OK;
    size_t at = 0;
    uint32_t part = 0;
    do {
        TRY(send_counts_part(s, s->asked[0], &c, at, part++));
        at += COUNTS_PART_BYTES;
    } while (!c.failed && at < c.size);
    memmove(s->asked, s->asked + 1, (size_t)--s->n_asked * sizeof *s->asked);
    return ask_next_counts(s);
}

static status ask_counts(server *s, uint64_t id)
{
    if (s->n_asked == MOST_ASKED)
        return send_counts_part(s, id, &(engine_counts){.failed = "statistics are asked for faster than they can be gathered"}, 0,
                                0);
    s->asked[s->n_asked++] = id;
    return s->n_asked == 1 ? ask_next_counts(s) : STATUS_OK;
}

/* ---- another plan ---- */

static void end_plan(server *s, uint64_t epoch, Convoke__Control__ReplanStage stage, const char *reason)
{
    if (s->n_ended == MOST_ENDED)
        return;
    ended_plan *p = &s->ended[s->n_ended++];
    *p = (ended_plan){.epoch = epoch, .stage = stage};
    snprintf(p->reason, sizeof p->reason, "%s", reason);
}

/* What is refused leaves everything as it was. */
static status replan(server *s, const Convoke__Control__Replan *m)
{
    plan p = {0};
    engine_counters before;
    plan_shape shape = runtime_plan_shape(s->runtime);
    engine_get_counters(s->engine, &before);
    status st = plan_parse("the plan", m->plan_json, strlen(m->plan_json), &shape, &p);
    if (st == STATUS_OK && *m->name)
        snprintf(p.name, sizeof p.name, "%s", m->name);
    if (st == STATUS_OK)
        st = engine_replan(s->engine, &p, m->epoch, m->bytes_per_second);
    plan_clear(&p);
    if (st != STATUS_OK) {
        end_plan(s, m->epoch, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED, status_message());
        return STATUS_OK;
    }
    if (before.replan.stage == ENGINE_REPLAN_LOADING || before.replan.stage == ENGINE_REPLAN_READY)
        end_plan(s, before.replan.epoch, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REPLACED, "");
    s->told_stage = ENGINE_REPLAN_NONE;
    return STATUS_OK;
}

static status send_ready(server *s)
{
    Convoke__Control__Ready ready = CONVOKE__CONTROL__READY__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    const model_config *c = runtime_config(s->runtime);
    const engine_limits *limits = runtime_limits(s->runtime);
    engine_counters counters;
    int32_t eos[8];
    uint32_t *layers = calloc((size_t)c->n_moe_layers + 1, sizeof *layers);
    if (!layers)
        return status_fail(STATUS_NO_MEMORY, "no memory for a list of layers");
    engine_get_counters(s->engine, &counters);
    for (int r = 0; r < s->n_ranks; r++)
        s->kv_free[r] = (uint32_t)counters.kv_blocks_of_rank[r];
    for (int i = 0; i < c->n_eos_ids; i++)
        eos[i] = c->eos_ids[i];
    for (int l = 0; l < c->n_moe_layers; l++)
        layers[l] = (uint32_t)runtime_moe_layers(s->runtime)[l];
    ready.launch = s->setup->launch;
    ready.model_name = (char *)c->name;
    ready.isa = (char *)kernel_isa_name(runtime_isa(s->runtime));
    ready.combine = *s->setup->combine ? s->setup->combine : (char *)"fixed";
    ready.plan_name = *s->setup->plan_name ? s->setup->plan_name : (char *)runtime_plan(s->runtime)->name;
    ready.plan_epoch = s->setup->plan_epoch;
    ready.vocab = (uint32_t)c->vocab;
    ready.max_length = (uint32_t)limits->max_length;
    ready.max_sequences = (uint32_t)limits->max_sequences;
    ready.kv_block = KV_BLOCK;
    ready.n_kv_blocks_of_rank = (size_t)s->n_ranks;
    ready.kv_blocks_of_rank = s->kv_free;
    ready.threads = (uint32_t)runtime_threads(s->runtime);
    ready.n_eos_ids = (size_t)c->n_eos_ids;
    ready.eos_ids = eos;
    ready.max_batched_tokens = (uint32_t)(engine_max_rows(s->engine) * s->n_ranks);
    ready.load_seconds = clock_seconds() - s->load_started;
    ready.n_layers = (size_t)c->n_moe_layers;
    ready.layers = layers;
    ready.n_experts = (uint32_t)c->n_experts;
    ready.top_k = (uint32_t)c->top_k;
    ready.expert_bytes = runtime_expert_bytes(s->runtime);
    ready.row_bytes = (uint32_t)c->hidden * (strcmp(s->setup->rows, "bf16") == 0 ? 2 : 4);
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY;
    m.ready = &ready;
    control_link_ready(s->link);
    status st = send_message(s, &m);
    free(layers);
    return st;
}

/* ---- messages from the coordinator ---- */

static int as_int(uint32_t value)
{
    return value > INT_MAX ? INT_MAX : (int)value; /* the engine says what is too large */
}

static engine_candidates read_candidates(const Convoke__Control__Candidates *from)
{
    if (!from)
        return (engine_candidates){0};
    return (engine_candidates){.top_n = as_int(from->top_n),
                               .ids = (const int32_t *)from->ids, /* those beyond int32 turn negative and are refused */
                               .n_ids = (int)from->n_ids,
                               .all = from->all};
}

static status read_sampling(server *s, const Convoke__Control__Sequence *q, sampling_params *out)
{
    static const int none = 0;
    TRY(grow(&s->biases, &s->room_biases, q->n_biases, sizeof *s->biases));
    for (size_t i = 0; i < q->n_biases; i++)
        s->biases[i] = (token_bias){.token = as_int(q->biases[i]->token), .bias = q->biases[i]->bias};
    *out = (sampling_params){.temperature = q->temperature,
                             .top_k = as_int(q->top_k),
                             .top_p = q->top_p,
                             .min_p = q->min_p,
                             .repetition_penalty = q->repetition_penalty,
                             .frequency_penalty = q->frequency_penalty,
                             .presence_penalty = q->presence_penalty,
                             .min_tokens = as_int(q->min_tokens),
                             .stop_ids = q->stop_ids,
                             .n_stop_ids = (int)q->n_stop_ids,
                             .biases = s->biases,
                             .n_biases = (int)q->n_biases,
                             .allowed = !q->only_allowed ? NULL
                                        : q->n_allowed   ? q->allowed
                                                         : &none,
                             .n_allowed = q->only_allowed ? (int)q->n_allowed : 0,
                             .seed = q->seed,
                             .sequence = q->sequence_index};
    return STATUS_OK;
}

static status submit_one(server *s, const Convoke__Control__Sequence *q)
{
    engine_request r = {.id = q->id,
                        .prompt = q->tokens,
                        .n_prompt = (int)q->n_tokens,
                        .n_prior = as_int(q->n_prior),
                        .max_new = as_int(q->max_new),
                        .want =
                            (q->ignore_eos ? ENGINE_IGNORE_EOS : 0u) | (q->prompt_logprobs ? ENGINE_WANT_PROMPT_LOGPROBS : 0u),
                        .owner = q->owner,
                        .priority = q->priority,
                        .client = q->client,
                        .arrival = q->arrival,
                        .bypass_prefix_cache = q->bypass_prefix_cache,
                        .cache_salt = q->cache_salt.data,
                        .salt_size = (int)q->cache_salt.len,
                        .prompt_candidates = read_candidates(q->prompt_candidates),
                        .output_candidates = read_candidates(q->output_candidates)};
    status st = read_sampling(s, q, &r.sampling);
    if (st == STATUS_OK)
        st = engine_submit(s->engine, &r);
    return st == STATUS_OK ? STATUS_OK : add_finished(s, q->id, CONVOKE__CONTROL__FINISH__FAILED, status_message());
}

typedef status (*id_verb)(engine *e, uint64_t id);

static status hold_one(engine *e, uint64_t id)
{
    return engine_hold(e, id, true);
}

static status release_one(engine *e, uint64_t id)
{
    return engine_hold(e, id, false);
}

static status each_id(server *s, const Convoke__Control__Ids *ids, id_verb verb)
{
    for (size_t i = 0; i < ids->n_ids; i++)
        TRY(verb(s->engine, ids->ids[i]));
    return STATUS_OK;
}

static status obey(server *s, const Convoke__Control__ToLeader *m)
{
    switch (m->kind_case) {
    case CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT:
        for (size_t i = 0; i < m->submit->n_sequences; i++)
            TRY(submit_one(s, m->submit->sequences[i]));
        return STATUS_OK;
    case CONVOKE__CONTROL__TO_LEADER__KIND_CANCEL:
        return each_id(s, m->cancel, engine_cancel);
    case CONVOKE__CONTROL__TO_LEADER__KIND_HOLD:
        return each_id(s, m->hold, hold_one);
    case CONVOKE__CONTROL__TO_LEADER__KIND_RELEASE:
        return each_id(s, m->release, release_one);
    case CONVOKE__CONTROL__TO_LEADER__KIND_CLEAR_PREFIX_CACHE:
        return engine_clear_prefix_cache(s->engine);
    case CONVOKE__CONTROL__TO_LEADER__KIND_STATISTICS:
        return ask_counts(s, m->statistics->id);
    case CONVOKE__CONTROL__TO_LEADER__KIND_REPLAN:
        return replan(s, m->replan);
    case CONVOKE__CONTROL__TO_LEADER__KIND_STOP:
        s->stopping = true;
        return STATUS_OK;
    default:
        return STATUS_OK; /* the link takes Setup and Refusal itself */
    }
}

static status read_inbox(server *s)
{
    for (Convoke__Control__ToLeader *m; !s->stopping && (m = control_link_next(s->link));) {
        status st = obey(s, m);
        convoke__control__to_leader__free_unpacked(m, NULL);
        TRY(st);
    }
    return STATUS_OK;
}

/* ---- the loop ---- */

static status heard(const server *s)
{
    return s->listening == STATUS_OK ? STATUS_OK : status_fail(s->listening, "%s", s->listening_why);
}

static void rest(server *s, double seconds)
{
    group_pulse *pulse = group_pulse_of(s->group, 0);
    atomic_store(&pulse->state, RANK_IDLE);
    control_link_wait(s->link, seconds);
    atomic_fetch_add(&pulse->moves, 1); /* before it counts as working: it has not stood still */
    atomic_store(&pulse->state, RANK_WORKING);
}

/* Whether a plan has come further than the coordinator knows. */
static bool has_news(const server *s)
{
    engine_counters c;
    engine_get_counters(s->engine, &c);
    return s->n_ended > 0 || c.replan.stage != s->told_stage ||
           (c.replan.stage == ENGINE_REPLAN_LOADING && clock_seconds() > s->told_at + NEWS_SECONDS);
}

static status one_turn(server *s)
{
    TRY(control_link_check(s->link));
    TRY(read_inbox(s));
    bool busy = !s->stopping && engine_busy(s->engine), pending = !s->stopping && engine_pending(s->engine);
    if (busy || pending)
        TRY(engine_step(s->engine));
    TRY(heard(s));
    TRY(send_counts(s));
    if (busy || s->events.size > 0 || has_news(s))
        return send_report(s);
    if (!s->stopping)
        rest(s, pending ? ERRAND_SECONDS : -1);
    return STATUS_OK;
}

static status lead(server *s, serve_end *end)
{
    TRY(send_ready(s));
    while (!s->stopping) {
        TRY(one_turn(s));
        if (group_told_to_stop()) {
            snprintf(end->reason, sizeof end->reason, "told to stop by SIGTERM");
            control_link_goodbye(s->link, 0, end->reason);
            group_stop_heard();
            s->stopping = true;
        }
    }
    return engine_stop(s->engine);
}

/* ---- start and end ---- */

static status allocate(server *s)
{
    s->kv_free = calloc((size_t)s->n_ranks, sizeof *s->kv_free);
    s->rows_of_rank = calloc((size_t)s->n_ranks, sizeof *s->rows_of_rank);
    s->compute = calloc((size_t)s->n_ranks, sizeof *s->compute);
    return s->kv_free && s->rows_of_rank && s->compute
               ? STATUS_OK
               : status_fail(STATUS_NO_MEMORY, "no memory for the tables of %d ranks", s->n_ranks);
}

static status start(server *s)
{
    runtime_options o;
    s->load_started = clock_seconds();
    TRY(group_agree(s->group, allocate(s)));
    TRY(group_agree(s->group, read_setup(s, &o)));
    TRY(runtime_create(s->group, &o, hear_event, s, &s->runtime));
    s->engine = runtime_engine(s->runtime);
    return STATUS_OK;
}

/* [all] Loading failed on one rank and all know: the sentence goes to rank 0, for the coordinator. */
static void share_reason(server *s, status mine, serve_end *end)
{
    const void **parts = calloc((size_t)s->n_ranks, sizeof *parts);
    size_t *sizes = calloc((size_t)s->n_ranks, sizeof *sizes);
    char sentence[1024] = "";
    if (mine != STATUS_ELSEWHERE)
        snprintf(sentence, sizeof sentence, "%s", status_message());
    group_set_deadline(s->group, SHARE_SECONDS);
    if (parts && sizes && group_gather(s->group, sentence, strlen(sentence), parts, sizes) == STATUS_OK && s->link)
        for (int r = 0; r < s->n_ranks && !*end->reason; r++)
            if (sizes[r] > 0) {
                snprintf(end->reason, sizeof end->reason, "%.*s", (int)sizes[r], (const char *)parts[r]);
                end->rank = r;
            }
    group_set_deadline(s->group, 0);
    free(parts);
    free(sizes);
    if (mine != STATUS_ELSEWHERE)
        status_fail(mine, "%s", sentence); /* what stood there before */
}

/* Those who fail together: the others' loads end too, and nobody waits. */
static bool all_know(status st)
{
    return st != STATUS_OK && st != STATUS_PEER_LOST && st != STATUS_STOPPED;
}

static void clear(server *s)
{
    runtime_destroy(s->runtime);
    bytes_clear(&s->events);
    bytes_clear(&s->frame);
    free(s->logprobs);
    free(s->pointers);
    free(s->counts);
    free(s->biases);
    free(s->kv_free);
    free(s->rows_of_rank);
    free(s->compute);
}

status serve_run(group *g, control_link *link, watch *w, const Convoke__Control__Setup *setup, serve_end *end)
{
    server s = {.group = g, .link = link, .watch = w, .setup = setup, .n_ranks = group_size(g)};
    *end = (serve_end){.rank = group_rank(g)};
    status st = start(&s);
    if (st == STATUS_OK) {
        end->out_of_step = true; /* until the loop has ended in order */
        watch_arm(w, (setup->hang_ms ? setup->hang_ms : DEFAULT_HANG_MS) * 1e-3);
        st = link ? lead(&s, end) : engine_follow(s.engine);
        end->out_of_step = st != STATUS_OK;
    } else if (all_know(st)) {
        share_reason(&s, st, end);
    } else {
        end->out_of_step = true;
    }
    if (!end->out_of_step)
        clear(&s);
    return st;
}
