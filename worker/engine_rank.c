/* engine_rank.c - what every rank does in a step: obeys the message, runs the rows it is told to, reports what came of them.
 *
 *   message ─► places (leave, join, grow) ─► batch ─► model ─► events opened in the report ─► logits in groups of rows, on all
 *   threads: scores, log-probabilities and candidates written into the events, tokens chosen ─► sequences go on or end
 *
 * A sequence that cannot go on (its numbers are no numbers any more) ends alone: nothing of it reaches another row. */
#include "worker/engine_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- creation -------------------------------------------------------------------------------------------------------------- */

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

status rank_create(engine *e)
{
    size_t places = (size_t)e->n_places, rows = (size_t)e->max_rows, threads = (size_t)thread_pool_size(e->parts.pool);
    e->places = calloc(places, sizeof *e->places);
    e->row_tokens = calloc(rows, sizeof *e->row_tokens);
    e->spans = calloc(places, sizeof *e->spans);
    e->events = calloc(places, sizeof *e->events);
    e->jobs = calloc(rows, sizeof *e->jobs);
    e->job_rows = calloc(rows, sizeof *e->job_rows);
    e->samplers = calloc(threads, sizeof *e->samplers);
    e->row_choices = calloc(e->choices_per_row + 1, sizeof *e->row_choices);
    if (!e->places || !e->row_tokens || !e->spans || !e->events || !e->jobs || !e->job_rows || !e->samplers || !e->row_choices)
        return status_fail(STATUS_NO_MEMORY, "no memory for the step loop's tables");
    for (size_t t = 0; t < threads; t++)
        TRY(sampler_create(e->parts.config->vocab, &e->samplers[t]));
    return create_places(e);
}

void rank_destroy(engine *e)
{
    for (int i = 0; e->places && i < e->n_places; i++) {
        free(e->places[i].tokens);
        free(e->places[i].blocks);
        bytes_clear(&e->places[i].lists);
        sampler_history_destroy(e->places[i].history);
    }
    for (int t = 0; e->samplers && t < thread_pool_size(e->parts.pool); t++)
        sampler_destroy(e->samplers[t]);
    bytes_clear(&e->report);
    void *all[] = {e->places, e->row_tokens, e->spans, e->events, e->jobs, e->job_rows, e->samplers, e->row_choices};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- sequences ------------------------------------------------------------------------------------------------------------- */

static void start_history(sequence *s)
{
    sampler_history_reset(s->history);
    if (!sampling_params_need_history(&s->sampling))
        return;
    sampler_history_add_prompt(s->history, (const int *)s->tokens, s->n_prompt);
    for (int i = s->n_prompt; i < s->n_tokens; i++)
        sampler_history_add_output(s->history, s->tokens[i]);
}

static const void *keep(unsigned char **at, const void *from, size_t bytes)
{
    void *to = *at;
    if (bytes > 0)
        memcpy(to, from, bytes);
    *at += bytes;
    return to;
}

/* The request's lists, with the model's own end tokens among the stop ids, kept in the place's own buffer. */
static status copy_lists(engine *e, sequence *s, const engine_request *r)
{
    const model_config *c = e->parts.config;
    const sampling_params *from = &r->sampling;
    int n_eos = r->want & ENGINE_IGNORE_EOS ? 0 : c->n_eos_ids;
    size_t stops = (size_t)from->n_stop_ids * sizeof(int), eos = (size_t)n_eos * sizeof(int);
    size_t biases = (size_t)from->n_biases * sizeof(token_bias), allowed = (size_t)from->n_allowed * sizeof(int);
    size_t ids_in = (size_t)r->prompt_candidates.n_ids * sizeof(int32_t);
    size_t ids_out = (size_t)r->output_candidates.n_ids * sizeof(int32_t);
    bytes_reset(&s->lists);
    unsigned char *at = bytes_extend(&s->lists, stops + eos + biases + allowed + ids_in + ids_out + 1);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory for a request's token lists");
    s->sampling = *from;
    s->prompt_candidates = r->prompt_candidates;
    s->output_candidates = r->output_candidates;
    s->sampling.stop_ids = keep(&at, from->stop_ids, stops);
    keep(&at, c->eos_ids, eos);
    s->sampling.n_stop_ids = from->n_stop_ids + n_eos;
    s->sampling.biases = keep(&at, from->biases, biases);
    const int *list = keep(&at, from->allowed, allowed);
    s->sampling.allowed = from->allowed ? list : NULL;
    s->prompt_candidates.ids = keep(&at, r->prompt_candidates.ids, ids_in);
    s->output_candidates.ids = keep(&at, r->output_candidates.ids, ids_out);
    return STATUS_OK;
}

static status join_sequence(engine *e, const wire_join *w)
{
    const engine_request *r = &w->request;
    sequence *s = &e->places[w->place];
    s->id = r->id;
    s->n_tokens = r->n_prompt;
    s->n_original = w->n_original;
    s->n_prompt = r->n_prompt - r->n_prior;
    s->n_output = r->n_prior;
    s->n_left = r->max_new;
    s->n_done = w->n_cached;
    s->n_reported = w->n_ran > w->n_cached ? w->n_ran : w->n_cached;
    s->n_blocks = w->n_blocks;
    s->want = r->want;
    s->domain = r->domain;
    s->judged = w->judged;
    s->n_counted = 0;
    owners_forget(e, w->place);
    s->failure[0] = '\0';
    memcpy(s->tokens, r->prompt, (size_t)r->n_prompt * sizeof *s->tokens);
    memcpy(s->blocks, w->blocks, (size_t)w->n_blocks * sizeof *s->blocks);
    TRY(copy_lists(e, s, r));
    start_history(s);
    s->active = true;
    return STATUS_OK;
}

static void finish_sequence(engine *e, sequence *s, engine_finish why)
{
    size_t n = why == ENGINE_FINISH_FAILED ? strlen(s->failure) + 1 : 0;
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_FINISHED, .finish = why}, .reason_bytes = (uint32_t)n};
    wire_event_place place = wire_put_event(&e->report, &w, e->choices_per_row, 0);
    if (n > 0 && !e->report.failed)
        memcpy(e->report.data + place.reason, s->failure, n);
    s->active = false;
}

static void add_span(engine *e, const scheduler_rows *rows)
{
    sequence *s = &e->places[rows->place];
    e->spans[e->n_spans] =
        (batch_span){.first_row = e->n_rows, .n_rows = rows->n_rows, .first_position = s->n_done, .block_ids = s->blocks};
    e->events[e->n_spans++] = (span_events){.place = rows->place};
    memcpy(e->row_tokens + e->n_rows, s->tokens + s->n_done, (size_t)rows->n_rows * sizeof *e->row_tokens);
    e->n_rows += rows->n_rows;
}

/* Leaves, joins, growths, rows: of this rank's places. */
static status read_message(engine *e, const void *bytes, size_t size, wire_step_view *step)
{
    bytes_reader r = {.at = bytes, .end = (const unsigned char *)bytes + size};
    TRY(wire_get_step(&r, step));
    for (uint32_t i = 0; i < step->head.n_leaves; i++)
        if (step->leaves[i].rank == e->rank)
            e->places[step->leaves[i].place].active = false;
    for (uint32_t i = 0; i < step->head.n_joins; i++) {
        wire_join w;
        TRY(wire_get_join(&r, &w));
        if (w.rank == e->rank)
            TRY(join_sequence(e, &w));
    }
    for (uint32_t i = 0; i < step->head.n_growths; i++)
        if (step->growths[i].rank == e->rank) {
            sequence *s = &e->places[step->growths[i].place];
            s->blocks[s->n_blocks++] = step->growths[i].block;
        }
    for (uint32_t i = 0; i < step->head.n_moves; i++) {
        wire_move m;
        const int32_t *from_blocks, *to_blocks;
        TRY(wire_get_move(&r, &m, &from_blocks, &to_blocks));
        TRY(owners_move(e, &m, from_blocks, to_blocks));
    }
    TRY(plans_obey(e, &step->head, &r));
    counts_obey(e, &step->head);
    e->n_rows = e->n_spans = 0;
    for (uint32_t i = 0; i < step->head.n_rows; i++)
        if (step->rows[i].rank == e->rank)
            add_span(e, &step->rows[i]);
    e->stopping = step->head.stop;
    return STATUS_OK;
}

/* ---- events, opened before their numbers are there ---------------------------------------------------------------------------
 */

static int candidates_per_row(const engine *e, const engine_candidates *c)
{
    int vocab = e->parts.config->vocab;
    return c->all ? vocab : c->n_ids > 0 ? c->n_ids : c->top_n < vocab ? c->top_n : vocab;
}

static void copy_choices(engine *e, int first_row, int n_rows, const wire_event_place *place)
{
    const model_config *c = e->parts.config;
    size_t k = (size_t)c->top_k, layers = (size_t)c->n_moe_layers;
    uint16_t *experts = (uint16_t *)(e->report.data + place->experts);
    float *weights = (float *)(e->report.data + place->weights);
    for (size_t r = 0; r < (size_t)n_rows; r++)
        for (size_t l = 0; l < layers; l++) {
            size_t from = (l * (size_t)e->max_rows + (size_t)first_row + r) * k, to = (r * layers + l) * k;
            memcpy(experts + to, model_experts(e->model) + from, k * sizeof *experts);
            memcpy(weights + to, model_expert_weights(e->model) + from, k * sizeof *weights);
        }
}

static void open_rows(engine *e, const batch_span *span, span_events *at, const sequence *s)
{
    int first = span->first_position + at->n_silent, n = span->n_rows - at->n_silent;
    bool decode = first >= s->n_original;
    bool logits = s->want & ENGINE_WANT_LOGITS && !decode, choices = s->want & ENGINE_WANT_CHOICES;
    if (!logits && !choices && !(s->want & ENGINE_WANT_SCORE && !decode))
        return;
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_ROWS, .first_position = first, .n_rows = n, .decode = decode},
                    .has_choices = choices,
                    .has_logits = logits};
    at->rows = wire_put_event(&e->report, &w, e->choices_per_row, (size_t)e->parts.config->vocab);
    if (choices && !e->report.failed)
        copy_choices(e, span->first_row + at->n_silent, n, &at->rows);
}

static bool wants_prompt(const sequence *s)
{
    const engine_candidates *c = &s->prompt_candidates;
    return s->want & ENGINE_WANT_PROMPT_LOGPROBS || c->top_n > 0 || c->n_ids > 0 || c->all;
}

/* The row at p tells of the token at p + 1, across chunks too. */
static void open_prompt(engine *e, const batch_span *span, span_events *at, const sequence *s)
{
    int first = span->first_position + at->n_silent, end = span->first_position + span->n_rows;
    end = end < s->n_prompt - 1 ? end : s->n_prompt - 1;
    if (!wants_prompt(s) || end <= first)
        return;
    at->prompt_stride = candidates_per_row(e, &s->prompt_candidates);
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_PROMPT, .first_position = first + 1, .n_rows = end - first},
                    .has_logprobs = 1,
                    .n_reserved = (uint32_t)((end - first) * at->prompt_stride)};
    at->prompt = wire_put_event(&e->report, &w, e->choices_per_row, 0);
}

static void open_token(engine *e, span_events *at, const sequence *s)
{
    at->token_stride = candidates_per_row(e, &s->output_candidates);
    wire_event w = {.event = {.id = s->id, .kind = ENGINE_EVENT_TOKEN}, .n_reserved = (uint32_t)at->token_stride};
    at->token = wire_put_event(&e->report, &w, e->choices_per_row, 0);
}

static bool samples(const sequence *s, const batch_span *span)
{
    return span->first_position + span->n_rows == s->n_tokens && s->n_left > 0;
}

static void open_events(engine *e)
{
    for (int i = 0; i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        span_events *at = &e->events[i];
        const sequence *s = &e->places[at->place];
        int silent = s->n_reported - span->first_position;
        at->n_silent = silent < 0 ? 0 : silent < span->n_rows ? silent : span->n_rows;
        at->rows.event = at->prompt.event = at->token.event = SIZE_MAX;
        if (s->failure[0])
            continue;
        if (at->n_silent < span->n_rows) {
            open_rows(e, span, at, s);
            open_prompt(e, span, at, s);
        }
        if (samples(s, span))
            open_token(e, at, s);
    }
}

/* ---- logits ---------------------------------------------------------------------------------------------------------------- */

static logit_job make_job(const engine *e, int i, int r)
{
    const batch_span *span = &e->spans[i];
    const span_events *at = &e->events[i];
    const sequence *s = &e->places[at->place];
    int position = span->first_position + r;
    bool told = r >= at->n_silent;
    return (logit_job){.row = span->first_row + r,
                       .span = i,
                       .place = at->place,
                       .position = position,
                       .score_token =
                           told && s->want & ENGINE_WANT_SCORE && position + 1 < s->n_original ? s->tokens[position + 1] : -1,
                       .prompt_token = told && wants_prompt(s) && position + 1 < s->n_prompt ? s->tokens[position + 1] : -1,
                       .sample = r + 1 == span->n_rows && samples(s, span)};
}

static void list_jobs(engine *e)
{
    e->n_jobs = 0;
    for (int i = 0; i < e->n_spans; i++) {
        const span_events *at = &e->events[i];
        const sequence *s = &e->places[at->place];
        for (int r = 0; r < e->spans[i].n_rows && !s->failure[0]; r++) {
            logit_job job = make_job(e, i, r);
            bool logits = s->want & ENGINE_WANT_LOGITS && job.position < s->n_original && r >= at->n_silent;
            if (job.score_token >= 0 || job.prompt_token >= 0 || job.sample || logits)
                e->jobs[e->n_jobs++] = job;
        }
    }
}

static int fill_candidates(const engine *e, const engine_candidates *c, const float *logits, float log_sum, sampler *scratch,
                           token_logprob *out)
{
    int vocab = e->parts.config->vocab, n = candidates_per_row(e, c);
    if (c->n_ids == 0)
        return n > 0 ? sampler_top_logprobs(scratch, logits, log_sum, n, out) : 0;
    for (int i = 0; i < n; i++)
        out[i] = sampler_logprob(logits, vocab, log_sum, c->ids[i]);
    return n;
}

static token_logprob *candidates_at(const engine *e, const wire_event_place *place, int row, int stride)
{
    return (token_logprob *)(void *)(e->report.data + place->candidates) + (size_t)row * (size_t)stride;
}

static void run_prompt_job(engine *e, const logit_job *job, const float *logits, float log_sum, sampler *scratch)
{
    const sequence *s = &e->places[job->place];
    const span_events *at = &e->events[job->span];
    int row = job->row - e->spans[job->span].first_row - at->n_silent;
    token_logprob own = sampler_logprob(logits, e->parts.config->vocab, log_sum, job->prompt_token);
    int n = fill_candidates(e, &s->prompt_candidates, logits, log_sum, scratch,
                            candidates_at(e, &at->prompt, row, at->prompt_stride));
    memcpy(e->report.data + at->prompt.logprobs + (size_t)row * sizeof own, &own, sizeof own);
    memcpy(e->report.data + at->prompt.counts + (size_t)row * sizeof n, &n, sizeof n);
}

static void choose_token(engine *e, logit_job *job, const float *logits, float log_sum, sampler *scratch)
{
    const sequence *s = &e->places[job->place];
    int token;
    job->failed = sampler_choose(scratch, &s->sampling, s->history, logits, (uint32_t)s->n_tokens, s->n_output, &token);
    if (job->failed != STATUS_OK)
        return;
    const span_events *at = &e->events[job->span];
    job->chosen = sampler_logprob(logits, e->parts.config->vocab, log_sum, token);
    job->n_candidates =
        fill_candidates(e, &s->output_candidates, logits, log_sum, scratch, candidates_at(e, &at->token, 0, at->token_stride));
}

static void run_job(engine *e, logit_job *job, const float *logits, sampler *scratch)
{
    if (job->score_token < 0 && job->prompt_token < 0 && !job->sample)
        return;
    float log_sum = e->parts.kernels->log_sum_exp(logits, e->parts.config->vocab);
    if (job->score_token >= 0)
        job->logprob_scored = logits[job->score_token] - log_sum;
    if (job->prompt_token >= 0)
        run_prompt_job(e, job, logits, log_sum, scratch);
    if (job->sample)
        choose_token(e, job, logits, log_sum, scratch);
}

static void pass_jobs(void *arg, int thread, int n_threads)
{
    engine *e = arg;
    size_t first, last, vocab = (size_t)e->parts.config->vocab;
    thread_pool_share((size_t)(e->end_job - e->first_job), 1, thread, n_threads, &first, &last);
    for (size_t i = first; i < last; i++)
        run_job(e, &e->jobs[(size_t)e->first_job + i], e->logits + i * vocab, e->samplers[thread]);
}

/* The sentence of a thread stays on it: the sampler is asked once more. */
static void note_failure(engine *e, const logit_job *job, const float *logits)
{
    sequence *s = &e->places[job->place];
    int token;
    if (sampler_choose(e->samplers[0], &s->sampling, s->history, logits, (uint32_t)s->n_tokens, s->n_output, &token) != STATUS_OK)
        snprintf(s->failure, sizeof s->failure, "no token can be chosen at position %d: %s", s->n_tokens, status_message());
}

static void close_job(engine *e, const logit_job *job, const float *logits)
{
    const span_events *at = &e->events[job->span];
    if (job->failed != STATUS_OK)
        note_failure(e, job, logits);
    if (at->rows.event == SIZE_MAX)
        return;
    wire_event w;
    memcpy(&w, e->report.data + at->rows.event, sizeof w);
    if (job->score_token >= 0) {
        w.event.n_scored++;
        w.event.sum_logprob += (double)job->logprob_scored;
        memcpy(e->report.data + at->rows.event, &w, sizeof w);
    }
    size_t vocab = (size_t)e->parts.config->vocab, row = (size_t)(job->position - w.event.first_position);
    if (w.has_logits && job->position >= w.event.first_position && job->position < e->places[job->place].n_original)
        memcpy(e->report.data + at->rows.logits + row * vocab * sizeof(float), logits, vocab * sizeof(float));
}

static void run_jobs(engine *e)
{
    int group_rows = model_head_rows(e->model);
    for (e->first_job = 0; e->first_job < e->n_jobs; e->first_job = e->end_job) {
        e->end_job = e->n_jobs - e->first_job < group_rows ? e->n_jobs : e->first_job + group_rows;
        for (int i = e->first_job; i < e->end_job; i++)
            e->job_rows[i - e->first_job] = e->jobs[i].row;
        e->logits = model_head(e->model, e->job_rows, e->end_job - e->first_job);
        thread_pool_run(e->parts.pool, pass_jobs, e);
        for (int i = e->first_job; i < e->end_job; i++)
            close_job(e, &e->jobs[i], e->logits + (size_t)(i - e->first_job) * (size_t)e->parts.config->vocab);
    }
}

/* ---- what comes of it --------------------------------------------------------------------------------------------------------
 */

/* Rows that found fewer candidates than there was room for (logits of -infinity) leave gaps: closed here. */
static void close_prompt(engine *e, const span_events *at)
{
    wire_event w;
    memcpy(&w, e->report.data + at->prompt.event, sizeof w);
    const int *counts = (const int *)(void *)(e->report.data + at->prompt.counts);
    token_logprob *to = candidates_at(e, &at->prompt, 0, 0);
    for (int r = 0; r < w.event.n_rows; r++) {
        memmove(to, candidates_at(e, &at->prompt, r, at->prompt_stride), (size_t)counts[r] * sizeof *to);
        to += counts[r];
        w.event.n_candidates += counts[r];
    }
    memcpy(e->report.data + at->prompt.event, &w, sizeof w);
}

static void void_event(engine *e, const wire_event_place *place)
{
    const uint32_t yes = 1;
    if (place->event != SIZE_MAX)
        memcpy(e->report.data + place->event + offsetof(wire_event, is_void), &yes, sizeof yes);
}

static bool is_stop(const sequence *s, int32_t token)
{
    for (int i = 0; i < s->sampling.n_stop_ids; i++)
        if (s->sampling.stop_ids[i] == token)
            return true;
    return false;
}

static void append_token(engine *e, const logit_job *job)
{
    sequence *s = &e->places[job->place];
    const span_events *at = &e->events[job->span];
    wire_event w;
    memcpy(&w, e->report.data + at->token.event, sizeof w);
    w.event.token = job->chosen.token;
    w.event.logprob = job->chosen.logprob;
    w.event.rank = job->chosen.rank;
    w.event.n_candidates = job->n_candidates;
    memcpy(e->report.data + at->token.event, &w, sizeof w);
    s->n_output++;
    s->n_left--;
    if (s->n_tokens < e->limits.max_length)
        s->tokens[s->n_tokens] = job->chosen.token;
    s->n_tokens++;
    if (sampling_params_need_history(&s->sampling))
        sampler_history_add_output(s->history, job->chosen.token);
    if (is_stop(s, job->chosen.token))
        finish_sequence(e, s, ENGINE_FINISH_STOP);
    else if (s->n_left == 0)
        finish_sequence(e, s, ENGINE_FINISH_LENGTH);
}

/* Each position of a request is counted once, computed again or not. */
static status count_routing(engine *e)
{
    const model_config *c = e->parts.config;
    size_t k = (size_t)c->top_k;
    for (int i = 0; i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        const sequence *s = &e->places[e->events[i].place];
        int phase = span->first_position + e->events[i].n_silent >= s->n_original ? PHASE_DECODE : PHASE_PREFILL;
        for (int r = span->first_row + e->events[i].n_silent; r < span->first_row + span->n_rows; r++) {
            for (size_t l = 0; l < (size_t)c->n_moe_layers; l++)
                memcpy(e->row_choices + l * k, model_experts(e->model) + (l * (size_t)e->max_rows + (size_t)r) * k,
                       k * sizeof *e->row_choices);
            TRY(routing_stats_add_row(e->routing, e->row_choices, s->domain, phase));
        }
    }
    return STATUS_OK;
}

/* Rows whose gate gave no numbers have gone through the rest without experts, to be caught here. */
static void find_bad_rows(engine *e)
{
    for (int i = 0; i < e->n_spans; i++) {
        sequence *s = &e->places[e->events[i].place];
        for (int r = 0; r < e->spans[i].n_rows && !s->failure[0]; r++) {
            int layer = model_bad_layer(e->model, e->spans[i].first_row + r);
            if (layer >= 0)
                snprintf(s->failure, sizeof s->failure, "position %d, layer %d: a gate gave a value that is not a number",
                         e->spans[i].first_position + r, layer);
        }
    }
}

static void go_on(engine *e)
{
    for (int i = 0; i < e->n_spans; i++) {
        const span_events *at = &e->events[i];
        sequence *s = &e->places[at->place];
        s->n_done += e->spans[i].n_rows;
        s->n_reported = s->n_done > s->n_reported ? s->n_done : s->n_reported;
        if (at->prompt.event != SIZE_MAX)
            close_prompt(e, at);
        if (s->failure[0])
            void_event(e, &at->token);
        else if (s->n_done == s->n_tokens && s->n_left == 0)
            finish_sequence(e, s, ENGINE_FINISH_LENGTH);
    }
    for (int i = 0; i < e->n_jobs; i++)
        if (e->jobs[i].sample && e->jobs[i].failed == STATUS_OK)
            append_token(e, &e->jobs[i]);
    for (int i = 0; i < e->n_spans; i++) {
        sequence *s = &e->places[e->events[i].place];
        if (s->failure[0])
            finish_sequence(e, s, ENGINE_FINISH_FAILED);
    }
}

static status run_batch(engine *e)
{
    batch b = {.n_rows = e->n_rows, .n_spans = e->n_spans, .tokens = e->row_tokens, .spans = e->spans};
    TRY(model_forward(e->model, &b));
    find_bad_rows(e);
    open_events(e);
    if (e->report.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for a step's report");
    list_jobs(e);
    run_jobs(e);
    TRY(count_routing(e));
    owners_judge(e, e->report.data + e->judged_at);
    go_on(e);
    return e->report.failed ? status_fail(STATUS_NO_MEMORY, "no memory for a step's report") : STATUS_OK;
}

/* Room for what a report begins with; what is told of plans and counts is known before the rows run. */
static status open_report(engine *e)
{
    wire_report head = {.counts_state = COUNTS_NONE};
    const void *piece = NULL;
    const char *sentence = plans_report(e, &head);
    if (counts_report(e, &head, &piece) != STATUS_OK && !*sentence)
        sentence = status_message();
    head.sentence_bytes = *sentence ? (uint32_t)strlen(sentence) + 1 : 0;
    bytes_reset(&e->report);
    bytes_put(&e->report, &head, sizeof head);
    bytes_extend(&e->report, (size_t)e->parts.config->n_moe_layers * sizeof(unsigned long long));
    wire_put_padded(&e->report, piece, head.counts_bytes);
    wire_put_padded(&e->report, sentence, head.sentence_bytes);
    head.n_ended = owners_put_ended(e, &e->report);
    head.n_judged = (uint32_t)owners_count_due(e);
    e->judged_at = e->report.size;
    bytes_extend(&e->report, head.n_judged * (sizeof(wire_judgement) + (size_t)e->n_ranks * sizeof(double)));
    if (!e->report.failed)
        memcpy(e->report.data, &head, sizeof head);
    return e->report.failed ? status_fail(STATUS_NO_MEMORY, "no memory for a step's report") : STATUS_OK;
}

static void fill_head(engine *e)
{
    const exchange_stats *x = exchange_get_stats(model_exchange(e->model));
    const model_times *t = model_get_times(e->model);
    wire_report head;
    memcpy(&head, e->report.data, sizeof head);
    head.expert_rows = t->expert_rows;
    head.link_bytes[0] = x->bytes_same_rank;
    head.link_bytes[1] = x->bytes_same_node + x->bytes_relayed + x->return_bytes_same_node;
    head.link_bytes[2] = x->bytes_cross_node + x->return_bytes_cross_node;
    head.wait_seconds = x->wait_seconds;
    head.compute_seconds = t->attention_seconds + t->expert_seconds + t->head_seconds;
    memcpy(e->report.data, &head, sizeof head);
    memcpy(e->report.data + sizeof head, model_layer_load(e->model),
           (size_t)e->parts.config->n_moe_layers * sizeof(unsigned long long));
}

status rank_step(engine *e, const void *message, size_t size)
{
    wire_step_view step;
    TRY(read_message(e, message, size, &step));
    if (e->stopping)
        return STATUS_OK;
    TRY(owners_look(e));
    TRY(open_report(e));
    if (step.head.n_rows > 0) /* on any rank: all take part, or none */
        TRY(run_batch(e));
    fill_head(e);
    return STATUS_OK;
}
