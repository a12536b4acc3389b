/* engine.c - the step loop. Bookkeeping of the leader (queue, places, KV promises) is kept apart from what every rank does (its
 * own sequences, its batch, its report); rank 0 does both. Places and buffers are made at the start; a step only moves between
 * them. */
#include "worker/engine.h"

#include "proto/clock.h"
#include "worker/batch_form.h"
#include "worker/engine_wire.h"

#include <stdlib.h>
#include <string.h>

/* A sequence this rank owns. Arrays are sized for the longest sequence at creation; those of a request's sampling grow once. */
typedef struct {
    bool active;
    uint64_t id, arrival;
    int32_t *tokens; /* [max_length] prompt and output */
    int n_tokens, n_prompt, n_done, n_new, n_prior, max_new;
    unsigned want;
    int domain;
    sampling_params sampling; /* its arrays lie in `lists` */
    bytes_writer lists;
    sampler_history *history;
    int32_t *blocks; /* [blocks of max_length] */
    int n_blocks;
} sequence;

/* What the leader knows of a request that was admitted. */
typedef struct {
    uint64_t id;
    int owner, n_blocks;
} live_request;

typedef struct queued {
    struct queued *next;
    engine_request request; /* arrays lie behind the struct */
    uint64_t arrival;
    int n_blocks;
} queued;

/* A row whose logits are needed, and why. */
typedef struct {
    int row, span, place;
    int score_token; /* -1: none */
    bool sample;
    float logprob_scored, logprob;
    int32_t token;
    status failed;
} logit_job;

struct engine {
    model_parts parts;
    engine_limits limits;
    model *model;
    kv_cache *kv;
    int rank, n_ranks, n_places, max_rows;
    size_t choices_per_row;
    engine_listener listener;
    void *listener_arg;
    routing_stats *routing;
    engine_times times;
    /* this rank */
    sequence *places; /* [n_places] */
    batch_candidate *candidates;
    int *order, *rows_of; /* [n_places] */
    int32_t *row_tokens;  /* [max_rows] */
    batch_span *spans;    /* [n_places] */
    int *span_place;
    wire_event_place *span_event;
    logit_job *jobs; /* [max_rows] */
    int *job_rows;
    int n_spans, n_jobs, first_job, end_job;
    const float *logits;
    sampler **samplers;    /* [threads] */
    uint16_t *row_choices; /* [moe layers][top_k] */
    bytes_writer report;
    bool stopping;
    /* the leader */
    queued *queue, **queue_end;
    uint64_t n_arrivals;
    live_request *live; /* [max_sequences] */
    int n_live;
    int *used_places, *free_blocks; /* [n_ranks] */
    uint64_t *cancels;
    int n_cancels, cancel_capacity;
    bytes_writer message;
    const void **parts_in;
    size_t *sizes_in;
};

/* ---- creation ---------------------------------------------------------------------------------------------------------- */

static status create_places(engine *e)
{
    int n_blocks = kv_blocks_of(e->limits.max_length, KV_BLOCK);
    for (int i = 0; i < e->n_places; i++) {
        sequence *s = &e->places[i];
        s->tokens = calloc((size_t)e->limits.max_length, sizeof *s->tokens);
        s->blocks = calloc((size_t)n_blocks, sizeof *s->blocks);
        if (!s->tokens || !s->blocks)
            return status_fail(STATUS_NO_MEMORY, "no memory for %d sequences of %d tokens", e->n_places, e->limits.max_length);
        TRY(sampler_history_create(e->limits.max_length, &s->history));
    }
    return STATUS_OK;
}

static status create_arrays(engine *e)
{
    size_t places = (size_t)e->n_places, rows = (size_t)e->max_rows, ranks = (size_t)e->n_ranks;
    size_t threads = (size_t)thread_pool_size(e->parts.pool);
    e->places = calloc(places, sizeof *e->places);
    e->candidates = calloc(places, sizeof *e->candidates);
    e->order = calloc(places, sizeof *e->order);
    e->rows_of = calloc(places, sizeof *e->rows_of);
    e->row_tokens = calloc(rows, sizeof *e->row_tokens);
    e->spans = calloc(places, sizeof *e->spans);
    e->span_place = calloc(places, sizeof *e->span_place);
    e->span_event = calloc(places, sizeof *e->span_event);
    e->jobs = calloc(rows, sizeof *e->jobs);
    e->job_rows = calloc(rows, sizeof *e->job_rows);
    e->samplers = calloc(threads, sizeof *e->samplers);
    e->row_choices = calloc(e->choices_per_row + 1, sizeof *e->row_choices);
    e->live = calloc((size_t)e->limits.max_sequences, sizeof *e->live);
    e->used_places = calloc(ranks, sizeof *e->used_places);
    e->free_blocks = calloc(ranks, sizeof *e->free_blocks);
    e->parts_in = calloc(ranks, sizeof *e->parts_in);
    e->sizes_in = calloc(ranks, sizeof *e->sizes_in);
    if (!e->places || !e->candidates || !e->order || !e->rows_of || !e->row_tokens || !e->spans || !e->span_place ||
        !e->span_event || !e->jobs || !e->job_rows || !e->samplers || !e->row_choices || !e->live || !e->used_places ||
        !e->free_blocks || !e->parts_in || !e->sizes_in)
        return status_fail(STATUS_NO_MEMORY, "no memory for the step loop's tables");
    for (size_t t = 0; t < threads; t++)
        TRY(sampler_create(e->parts.config->vocab, &e->samplers[t]));
    return create_places(e);
}

static status create_routing(engine *e)
{
    const model_config *c = e->parts.config;
    routing_shape shape = {.model = c->name,
                           .n_experts = c->n_experts,
                           .top_k = c->top_k,
                           .n_layers = c->n_moe_layers,
                           .layer_numbers = e->parts.plan->layer_numbers,
                           .n_domains = e->limits.n_domains,
                           .domains = e->limits.domains};
    return routing_stats_create(&shape, e->limits.count_pairs, &e->routing);
}

static status create_all(engine *e)
{
    const model_config *c = e->parts.config;
    TRY(kv_cache_create(c->n_layers, c->n_kv_heads, c->head_dim, e->limits.kv_bytes, &e->kv));
    TRY(create_arrays(e));
    TRY(create_routing(e));
    for (int r = 0; r < e->n_ranks; r++)
        e->free_blocks[r] = kv_cache_n_blocks(e->kv);
    return STATUS_OK;
}

status engine_create(const model_parts *parts, const engine_limits *limits, engine_listener listener, void *arg, engine **out)
{
    engine *e = calloc(1, sizeof *e);
    if (!e)
        return group_agree(parts->group, status_fail(STATUS_NO_MEMORY, "no memory for the step loop"));
    e->parts = *parts;
    e->limits = *limits;
    e->listener = listener;
    e->listener_arg = arg;
    e->queue_end = &e->queue;
    e->rank = group_rank(parts->group);
    e->n_ranks = group_size(parts->group);
    e->n_places = (limits->max_sequences + e->n_ranks - 1) / e->n_ranks;
    e->max_rows = e->n_places + limits->chunk;
    e->choices_per_row = (size_t)parts->config->n_moe_layers * (size_t)parts->config->top_k;
    status st;
    TRY_GOTO(group_agree(parts->group, create_all(e)), fail);
    e->parts.kv = e->kv;
    e->parts.max_rows = e->max_rows;
    e->parts.max_length = limits->max_length;
    TRY_GOTO(model_create(&e->parts, &e->model), fail);
    *out = e;
    return STATUS_OK;
fail:
    engine_destroy(e);
    return st;
}

static void destroy_places(engine *e)
{
    for (int i = 0; e->places && i < e->n_places; i++) {
        free(e->places[i].tokens);
        free(e->places[i].blocks);
        bytes_clear(&e->places[i].lists);
        sampler_history_destroy(e->places[i].history);
    }
    for (int t = 0; e->samplers && t < thread_pool_size(e->parts.pool); t++)
        sampler_destroy(e->samplers[t]);
}

void engine_destroy(engine *e)
{
    if (!e)
        return;
    model_destroy(e->model);
    kv_cache_destroy(e->kv);
    routing_stats_destroy(e->routing);
    destroy_places(e);
    for (queued *q = e->queue, *next; q; q = next) {
        next = q->next;
        free(q);
    }
    bytes_clear(&e->report);
    bytes_clear(&e->message);
    void *all[] = {e->places,     e->candidates,  e->order,       e->rows_of,  e->row_tokens, e->spans,
                   e->span_place, e->span_event,  e->jobs,        e->job_rows, e->samplers,   e->row_choices,
                   e->live,       e->used_places, e->free_blocks, e->parts_in, e->sizes_in,   e->cancels};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(e);
}

model *engine_model(engine *e)
{
    return e->model;
}

const engine_times *engine_get_times(const engine *e)
{
    return &e->times;
}

const routing_stats *engine_routing(const engine *e)
{
    return e->routing;
}

size_t engine_kv_bytes(const engine *e)
{
    return kv_cache_bytes(e->kv);
}

int engine_max_rows(const engine *e)
{
    return e->max_rows;
}

/* ---- the leader: queue and admission ------------------------------------------------------------------------------------- */

static int request_length(const engine_request *r)
{
    /* The last generated token is never run, so it needs no place in the KV cache. */
    return r->n_prompt + (r->max_new > 0 ? r->max_new - 1 : 0);
}

static status check_request(const engine *e, const engine_request *r)
{
    const model_config *c = e->parts.config;
    if (r->n_prompt < 1)
        return status_fail(STATUS_BAD_INPUT, "the prompt is empty");
    if (r->max_new < 0 || r->n_prior < 0 || r->n_prior > r->n_prompt)
        return status_fail(STATUS_BAD_INPUT, "%d new tokens and %d earlier ones of %d make no request", r->max_new, r->n_prior,
                           r->n_prompt);
    if (r->n_prompt > e->limits.max_length || r->max_new > e->limits.max_length - r->n_prompt)
        return status_fail(STATUS_BAD_INPUT, "%d prompt tokens and %d new ones are more than the %d a sequence may have here",
                           r->n_prompt, r->max_new, e->limits.max_length);
    for (int i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= c->vocab)
            return status_fail(STATUS_BAD_INPUT, "token %d of the prompt is %d, outside the vocabulary of %d", i, r->prompt[i],
                               c->vocab);
    if (r->owner >= e->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "owner %d, but there are only %d ranks", r->owner, e->n_ranks);
    int blocks = kv_blocks_of(request_length(r), KV_BLOCK);
    if (blocks > kv_cache_n_blocks(e->kv))
        return status_fail(STATUS_NO_MEMORY, "%d tokens need %d KV blocks, the budget of %zu bytes holds %d", request_length(r),
                           blocks, e->limits.kv_bytes, kv_cache_n_blocks(e->kv));
    if (r->domain < 0 || r->domain >= e->limits.n_domains)
        return status_fail(STATUS_BAD_INPUT, "domain %d, but there are only %d", r->domain, e->limits.n_domains);
    return sampling_params_check(&r->sampling, c->vocab);
}

/* One block of memory: the struct, then its arrays. */
static queued *copy_request(const engine_request *r)
{
    const sampling_params *s = &r->sampling;
    size_t prompt = (size_t)r->n_prompt * sizeof *r->prompt, stops = (size_t)s->n_stop_ids * sizeof *s->stop_ids;
    size_t biases = (size_t)s->n_biases * sizeof *s->biases, allowed = (size_t)s->n_allowed * sizeof *s->allowed;
    queued *q = malloc(sizeof *q + prompt + stops + biases + allowed);
    if (!q)
        return NULL;
    char *at = (char *)(q + 1);
    *q = (queued){.request = *r};
    q->request.prompt = memcpy(at, r->prompt, prompt);
    q->request.sampling.stop_ids = stops ? memcpy(at + prompt, s->stop_ids, stops) : NULL;
    q->request.sampling.biases = biases ? memcpy(at + prompt + stops, s->biases, biases) : NULL;
    if (s->allowed)
        q->request.sampling.allowed = memcpy(at + prompt + stops + biases, s->allowed, allowed);
    return q;
}

status engine_submit(engine *e, const engine_request *request)
{
    TRY(check_request(e, request));
    queued *q = copy_request(request);
    if (!q)
        return status_fail(STATUS_NO_MEMORY, "no memory to queue a request of %d tokens", request->n_prompt);
    q->arrival = e->n_arrivals++;
    q->n_blocks = kv_blocks_of(request_length(request), KV_BLOCK);
    *e->queue_end = q;
    e->queue_end = &q->next;
    return STATUS_OK;
}

static void tell(engine *e, const engine_event *event)
{
    if (e->listener)
        e->listener(e->listener_arg, event);
}

/* A request still waiting leaves at once; true when it was there. */
static bool cancel_queued(engine *e, uint64_t id)
{
    for (queued **at = &e->queue; *at; at = &(*at)->next) {
        queued *q = *at;
        if (q->request.id != id)
            continue;
        *at = q->next;
        if (!q->next)
            e->queue_end = at;
        free(q);
        tell(e, &(engine_event){.id = id, .kind = ENGINE_EVENT_FINISHED, .finish = ENGINE_FINISH_CANCELLED});
        return true;
    }
    return false;
}

status engine_cancel(engine *e, uint64_t id)
{
    if (cancel_queued(e, id))
        return STATUS_OK;
    if (e->n_cancels == e->cancel_capacity) {
        int capacity = e->cancel_capacity ? 2 * e->cancel_capacity : 16;
        uint64_t *grown = realloc(e->cancels, (size_t)capacity * sizeof *grown);
        if (!grown)
            return status_fail(STATUS_NO_MEMORY, "no memory to cancel a request");
        e->cancels = grown;
        e->cancel_capacity = capacity;
    }
    e->cancels[e->n_cancels++] = id;
    return STATUS_OK;
}

status engine_hold(engine *e, uint64_t id, bool hold)
{
    (void)e, (void)id, (void)hold;
    return status_fail(STATUS_UNSUPPORTED, "holding a sequence back");
}

status engine_clear_prefix_cache(engine *e)
{
    (void)e;
    return STATUS_OK;
}

void engine_get_counters(const engine *e, engine_counters *out)
{
    *out = (engine_counters){.n_running = e->n_live, .max_running = e->limits.max_sequences, .kv_free_of_rank = e->free_blocks};
    for (const queued *q = e->queue; q; q = q->next)
        out->n_waiting++;
    out->n_steps = e->times.steps;
}

bool engine_busy(const engine *e)
{
    return e->queue || e->n_live > 0;
}

/* The rank that takes a request now, or -1: the one asked for, else the least busy with room; lowest first among equals. */
static int choose_owner(const engine *e, const queued *q)
{
    int best = -1;
    for (int r = 0; r < e->n_ranks; r++) {
        if (q->request.owner >= 0 && q->request.owner != r)
            continue;
        if (e->used_places[r] < e->n_places && e->free_blocks[r] >= q->n_blocks &&
            (best < 0 || e->used_places[r] < e->used_places[best]))
            best = r;
    }
    return best;
}

/* Oldest first, and nobody overtakes: a large request is not starved by small ones. */
static uint32_t admit(engine *e)
{
    uint32_t n = 0;
    while (e->queue && e->n_live < e->limits.max_sequences) {
        queued *q = e->queue;
        int owner = choose_owner(e, q);
        if (owner < 0)
            break;
        q->request.owner = owner;
        e->used_places[owner]++;
        e->free_blocks[owner] -= q->n_blocks;
        e->live[e->n_live++] = (live_request){.id = q->request.id, .owner = owner, .n_blocks = q->n_blocks};
        wire_put_request(&e->message, &q->request, q->arrival);
        e->queue = q->next;
        if (!e->queue)
            e->queue_end = &e->queue;
        free(q);
        n++;
    }
    return n;
}

static status write_message(engine *e, bool stop)
{
    bytes_reset(&e->message);
    wire_step step = {.n_cancel = (uint32_t)e->n_cancels, .stop = stop};
    wire_put_step(&e->message, &step);
    bytes_put(&e->message, e->cancels, (size_t)e->n_cancels * sizeof *e->cancels);
    e->n_cancels = 0;
    step.n_new = stop ? 0 : admit(e);
    if (e->message.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for the step message");
    memcpy(e->message.data, &step, sizeof step); /* the count is known only now */
    return STATUS_OK;
}

static void release(engine *e, uint64_t id)
{
    for (int i = 0; i < e->n_live; i++)
        if (e->live[i].id == id) {
            e->used_places[e->live[i].owner]--;
            e->free_blocks[e->live[i].owner] += e->live[i].n_blocks;
            e->live[i] = e->live[--e->n_live];
            return;
        }
}

static status read_report(engine *e, const void *bytes, size_t size, wire_report *sum)
{
    bytes_reader r = {.at = bytes, .end = (const unsigned char *)bytes + size};
    wire_report head;
    bytes_get(&r, &head, sizeof head);
    sum->n_prefill_rows += head.n_prefill_rows;
    sum->n_decode_rows += head.n_decode_rows;
    while (r.at < r.end && !r.short_read) {
        engine_event event;
        TRY(wire_get_event(&r, e->choices_per_row, (size_t)e->parts.config->vocab, &event));
        if (event.kind == ENGINE_EVENT_FINISHED)
            release(e, event.id);
        tell(e, &event);
    }
    return STATUS_OK;
}

static void count_step(engine *e, const wire_report *sum, double seconds)
{
    e->times.steps++;
    if (sum->n_prefill_rows > 0) {
        e->times.prefill_seconds += seconds;
        e->times.prefill_rows += sum->n_prefill_rows;
        e->times.mixed_decode_rows += sum->n_decode_rows;
    } else {
        e->times.decode_seconds += seconds;
        e->times.decode_rows += sum->n_decode_rows;
    }
}

/* ---- every rank: sequences ----------------------------------------------------------------------------------------------- */

static void start_history(sequence *s)
{
    sampler_history_reset(s->history);
    if (!sampling_params_need_history(&s->sampling))
        return;
    sampler_history_add_prompt(s->history, (const int *)s->tokens, s->n_prompt - s->n_prior);
    for (int i = s->n_prompt - s->n_prior; i < s->n_prompt; i++)
        sampler_history_add_output(s->history, s->tokens[i]);
}

/* The request's lists, with the model's own end tokens among the stop ids, kept in the place's own buffer. */
static status copy_lists(engine *e, sequence *s, const engine_request *r)
{
    const model_config *c = e->parts.config;
    const sampling_params *from = &r->sampling;
    int n_eos = r->want & ENGINE_IGNORE_EOS ? 0 : c->n_eos_ids;
    size_t stops = (size_t)from->n_stop_ids * sizeof(int), eos = (size_t)n_eos * sizeof(int);
    size_t biases = (size_t)from->n_biases * sizeof(token_bias), allowed = (size_t)from->n_allowed * sizeof(int);
    bytes_reset(&s->lists);
    unsigned char *at = bytes_extend(&s->lists, stops + eos + biases + allowed + 1);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory for a request's token lists");
    s->sampling = *from;
    s->sampling.stop_ids = (const int *)at;
    s->sampling.n_stop_ids = from->n_stop_ids + n_eos;
    s->sampling.biases = (const token_bias *)(at + stops + eos);
    s->sampling.allowed = from->allowed ? (const int *)(at + stops + eos + biases) : NULL;
    if (stops)
        memcpy(at, from->stop_ids, stops);
    if (eos)
        memcpy(at + stops, c->eos_ids, eos);
    if (biases)
        memcpy(at + stops + eos, from->biases, biases);
    if (allowed)
        memcpy(at + stops + eos + biases, from->allowed, allowed);
    return STATUS_OK;
}

static status join_sequence(engine *e, const wire_request *w)
{
    const engine_request *r = &w->request;
    int i = 0;
    while (i < e->n_places && e->places[i].active)
        i++;
    if (i == e->n_places)
        return status_fail(STATUS_NO_MEMORY, "rank %d has no place for another sequence", e->rank);
    sequence *s = &e->places[i];
    int n_blocks = kv_blocks_of(request_length(r), KV_BLOCK);
    TRY(kv_cache_take(e->kv, n_blocks, s->blocks));
    s->n_blocks = n_blocks;
    s->id = r->id;
    s->arrival = w->arrival;
    s->n_tokens = s->n_prompt = r->n_prompt;
    s->n_prior = r->n_prior;
    s->n_done = s->n_new = 0;
    s->max_new = r->max_new;
    s->want = r->want;
    s->domain = r->domain;
    memcpy(s->tokens, r->prompt, (size_t)r->n_prompt * sizeof *s->tokens);
    TRY(copy_lists(e, s, r));
    start_history(s);
    s->active = true;
    return STATUS_OK;
}

static void finish_sequence(engine *e, sequence *s, engine_finish why)
{
    kv_cache_give(e->kv, s->n_blocks, s->blocks);
    s->active = false;
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_FINISHED, .finish = why}};
    wire_put_event(&e->report, &w, e->choices_per_row, 0);
}

static status read_message(engine *e, const void *bytes, size_t size)
{
    bytes_reader r = {.at = bytes, .end = (const unsigned char *)bytes + size};
    wire_step step;
    bytes_get(&r, &step, sizeof step);
    for (uint32_t i = 0; i < step.n_cancel; i++) {
        uint64_t id;
        bytes_get(&r, &id, sizeof id);
        for (int p = 0; p < e->n_places; p++)
            if (e->places[p].active && e->places[p].id == id)
                finish_sequence(e, &e->places[p], ENGINE_FINISH_CANCELLED);
    }
    for (uint32_t i = 0; i < step.n_new; i++) {
        wire_request w;
        TRY(wire_get_request(&r, &w));
        if (w.request.owner == e->rank)
            TRY(join_sequence(e, &w));
    }
    e->stopping = step.stop;
    return r.short_read ? status_fail(STATUS_BAD_INPUT, "the step message ends too soon") : STATUS_OK;
}

/* ---- every rank: a batch and what comes of it ------------------------------------------------------------------------------ */

static void form_batch(engine *e, batch *b, wire_report *counts)
{
    for (int i = 0; i < e->n_places; i++) {
        const sequence *s = &e->places[i];
        e->candidates[i] = (batch_candidate){
            .n_pending = s->active ? s->n_tokens - s->n_done : 0, .is_decoding = s->n_done >= s->n_prompt, .arrival = s->arrival};
    }
    batch_form(e->candidates, e->n_places, e->limits.chunk, e->order, e->rows_of);
    int n = 0;
    e->n_spans = 0;
    for (int i = 0; i < e->n_places; i++) {
        const sequence *s = &e->places[i];
        if (e->rows_of[i] == 0)
            continue;
        e->span_place[e->n_spans] = i;
        e->spans[e->n_spans++] =
            (batch_span){.first_row = n, .n_rows = e->rows_of[i], .first_position = s->n_done, .block_ids = s->blocks};
        memcpy(e->row_tokens + n, s->tokens + s->n_done, (size_t)e->rows_of[i] * sizeof *s->tokens);
        n += e->rows_of[i];
        *(e->candidates[i].is_decoding ? &counts->n_decode_rows : &counts->n_prefill_rows) += (uint32_t)e->rows_of[i];
    }
    *b = (batch){.n_rows = n, .n_spans = e->n_spans, .tokens = e->row_tokens, .spans = e->spans};
}

static void list_jobs(engine *e)
{
    e->n_jobs = 0;
    for (int i = 0; i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        const sequence *s = &e->places[e->span_place[i]];
        for (int r = 0; r < span->n_rows; r++) {
            int position = span->first_position + r;
            bool given_next = position + 1 < s->n_prompt;
            logit_job job = {.row = span->first_row + r,
                             .span = i,
                             .place = e->span_place[i],
                             .score_token = s->want & ENGINE_WANT_SCORE && given_next ? s->tokens[position + 1] : -1,
                             .sample = position + 1 == s->n_tokens && s->n_new < s->max_new};
            if (job.score_token >= 0 || job.sample || (s->want & ENGINE_WANT_LOGITS && position < s->n_prompt))
                e->jobs[e->n_jobs++] = job;
        }
    }
}

static void run_job(engine *e, logit_job *job, const float *logits, sampler *scratch)
{
    int vocab = e->parts.config->vocab;
    const sequence *s = &e->places[job->place];
    if (job->score_token < 0 && !job->sample)
        return;
    float log_sum = e->parts.kernels->log_sum_exp(logits, vocab);
    if (job->score_token >= 0)
        job->logprob_scored = logits[job->score_token] - log_sum;
    if (!job->sample)
        return;
    int token;
    job->failed = sampler_choose(scratch, &s->sampling, s->history, logits, (uint32_t)s->n_tokens, s->n_prior + s->n_new, &token);
    if (job->failed == STATUS_OK) {
        job->token = token;
        job->logprob = logits[token] - log_sum;
    }
}

static void pass_jobs(void *arg, int thread, int n_threads)
{
    engine *e = arg;
    size_t first, last, vocab = (size_t)e->parts.config->vocab;
    thread_pool_share((size_t)(e->end_job - e->first_job), 1, thread, n_threads, &first, &last);
    for (size_t i = first; i < last; i++)
        run_job(e, &e->jobs[(size_t)e->first_job + i], e->logits + i * vocab, e->samplers[thread]);
}

static void copy_choices(engine *e, const batch_span *span, const wire_event_place *place)
{
    const model_config *c = e->parts.config;
    size_t k = (size_t)c->top_k, layers = (size_t)c->n_moe_layers;
    uint16_t *experts = (uint16_t *)(e->report.data + place->experts);
    float *weights = (float *)(e->report.data + place->weights);
    for (size_t r = 0; r < (size_t)span->n_rows; r++)
        for (size_t l = 0; l < layers; l++) {
            size_t from = (l * (size_t)e->max_rows + (size_t)span->first_row + r) * k, to = (r * layers + l) * k;
            memcpy(experts + to, model_experts(e->model) + from, k * sizeof *experts);
            memcpy(weights + to, model_expert_weights(e->model) + from, k * sizeof *weights);
        }
}

/* Rows the submitter wants to hear of get their event now; logits and scores are filled in as they are computed. */
static void open_row_events(engine *e)
{
    for (int i = 0; i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        const sequence *s = &e->places[e->span_place[i]];
        bool decode = span->first_position >= s->n_prompt;
        bool logits = s->want & ENGINE_WANT_LOGITS && !decode, choices = s->want & ENGINE_WANT_CHOICES;
        e->span_event[i] = (wire_event_place){.event = SIZE_MAX};
        if (!logits && !choices && !(s->want & ENGINE_WANT_SCORE && !decode))
            continue;
        wire_event w = {.event = {.id = s->id,
                                  .kind = ENGINE_EVENT_ROWS,
                                  .first_position = span->first_position,
                                  .n_rows = span->n_rows,
                                  .decode = decode},
                        .has_choices = choices,
                        .has_logits = logits};
        e->span_event[i] = wire_put_event(&e->report, &w, e->choices_per_row, (size_t)e->parts.config->vocab);
        if (choices && !e->report.failed)
            copy_choices(e, span, &e->span_event[i]);
    }
}

static void close_job(engine *e, const logit_job *job, const float *logits)
{
    const wire_event_place *place = &e->span_event[job->span];
    if (place->event == SIZE_MAX)
        return;
    wire_event w;
    memcpy(&w, e->report.data + place->event, sizeof w);
    if (job->score_token >= 0) {
        w.event.n_scored++;
        w.event.sum_logprob += (double)job->logprob_scored;
        memcpy(e->report.data + place->event, &w, sizeof w);
    }
    size_t vocab = (size_t)e->parts.config->vocab, at = (size_t)(job->row - e->spans[job->span].first_row);
    if (w.has_logits)
        memcpy(e->report.data + place->logits + at * vocab * sizeof(float), logits, vocab * sizeof(float));
}

static status run_jobs(engine *e)
{
    int group_rows = model_head_rows(e->model);
    for (e->first_job = 0; e->first_job < e->n_jobs; e->first_job = e->end_job) {
        e->end_job = e->n_jobs - e->first_job < group_rows ? e->n_jobs : e->first_job + group_rows;
        for (int i = e->first_job; i < e->end_job; i++)
            e->job_rows[i - e->first_job] = e->jobs[i].row;
        e->logits = model_head(e->model, e->job_rows, e->end_job - e->first_job);
        thread_pool_run(e->parts.pool, pass_jobs, e);
        for (int i = e->first_job; i < e->end_job; i++) {
            const float *logits = e->logits + (size_t)(i - e->first_job) * (size_t)e->parts.config->vocab;
            if (e->jobs[i].failed != STATUS_OK)
                return status_fail(e->jobs[i].failed,
                                   "request %llu: no token can be chosen at position %d: the logits hold no number that may win",
                                   (unsigned long long)e->places[e->jobs[i].place].id, e->places[e->jobs[i].place].n_tokens);
            close_job(e, &e->jobs[i], logits);
        }
    }
    return STATUS_OK;
}

static bool is_stop(const sequence *s, int32_t token)
{
    for (int i = 0; i < s->sampling.n_stop_ids; i++)
        if (s->sampling.stop_ids[i] == token)
            return true;
    return false;
}

static void append_token(engine *e, sequence *s, const logit_job *job)
{
    s->n_new++;
    if (s->n_tokens < e->limits.max_length)
        s->tokens[s->n_tokens] = job->token;
    s->n_tokens++;
    if (sampling_params_need_history(&s->sampling))
        sampler_history_add_output(s->history, job->token);
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_TOKEN, .token = job->token, .logprob = job->logprob}};
    wire_put_event(&e->report, &w, e->choices_per_row, 0);
    if (is_stop(s, job->token))
        finish_sequence(e, s, ENGINE_FINISH_STOP);
    else if (s->n_new == s->max_new)
        finish_sequence(e, s, ENGINE_FINISH_LENGTH);
}

static status count_routing(engine *e)
{
    const model_config *c = e->parts.config;
    size_t k = (size_t)c->top_k;
    for (int i = 0; i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        const sequence *s = &e->places[e->span_place[i]];
        int phase = span->first_position >= s->n_prompt ? PHASE_DECODE : PHASE_PREFILL;
        for (int r = span->first_row; r < span->first_row + span->n_rows; r++) {
            for (size_t l = 0; l < (size_t)c->n_moe_layers; l++)
                memcpy(e->row_choices + l * k, model_experts(e->model) + (l * (size_t)e->max_rows + (size_t)r) * k,
                       k * sizeof *e->row_choices);
            TRY(routing_stats_add_row(e->routing, e->row_choices, s->domain, phase));
        }
    }
    return STATUS_OK;
}

static status run_batch(engine *e)
{
    batch b;
    wire_report counts = {0};
    form_batch(e, &b, &counts);
    if (e->report.data)
        memcpy(e->report.data, &counts, sizeof counts);
    TRY(model_forward(e->model, &b));
    list_jobs(e);
    open_row_events(e);
    if (e->report.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for a step's report");
    TRY(run_jobs(e));
    TRY(count_routing(e));
    for (int i = 0; i < e->n_spans; i++) {
        sequence *s = &e->places[e->span_place[i]];
        s->n_done += e->spans[i].n_rows;
        if (s->n_done == s->n_prompt && s->max_new == 0)
            finish_sequence(e, s, ENGINE_FINISH_LENGTH);
    }
    for (int i = 0; i < e->n_jobs; i++)
        if (e->jobs[i].sample)
            append_token(e, &e->places[e->jobs[i].place], &e->jobs[i]);
    return e->report.failed ? status_fail(STATUS_NO_MEMORY, "no memory for a step's report") : STATUS_OK;
}

/* ---- the step ----------------------------------------------------------------------------------------------------------------
 */

static status send_report(engine *e, double start)
{
    TRY(group_gather(e->parts.group, e->report.data, e->report.size, e->parts_in, e->sizes_in));
    if (e->rank != 0)
        return STATUS_OK;
    wire_report sum = {0};
    for (int r = 0; r < e->n_ranks; r++)
        TRY(read_report(e, e->parts_in[r], e->sizes_in[r], &sum));
    count_step(e, &sum, clock_seconds() - start);
    return STATUS_OK;
}

static status step(engine *e, bool stop)
{
    double start = clock_seconds();
    const void *message = NULL;
    size_t size = 0;
    if (e->rank == 0) {
        TRY(write_message(e, stop));
        message = e->message.data;
        size = e->message.size;
    }
    TRY(group_broadcast_message(e->parts.group, &message, &size));
    bytes_reset(&e->report);
    bytes_put(&e->report, &(wire_report){0}, sizeof(wire_report));
    TRY(read_message(e, message, size));
    if (e->stopping)
        return STATUS_OK;
    TRY(run_batch(e));
    return send_report(e, start);
}

status engine_step(engine *e)
{
    return step(e, false);
}

status engine_stop(engine *e)
{
    return step(e, true);
}

status engine_follow(engine *e)
{
    while (!e->stopping)
        TRY(step(e, false));
    return STATUS_OK;
}
