/* engine_lead.c - the leader's part of the step loop: requests come in, the scheduler decides, events go out. */
#include "worker/engine_parts.h"

#include "worker/owner_choice.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* Of the load of a hundred steps ago about a third still counts. */
#define LOAD_MEMORY 0.99

static void forget_request(void *user)
{
    free(user);
}

/* ---- creation -------------------------------------------------------------------------------------------------------------- */

static status create_scheduler(engine *e)
{
    const model_config *c = e->parts.config;
    scheduler_limits limits = {.n_ranks = e->n_ranks,
                               .n_places = e->n_places,
                               .max_running = e->limits.max_sequences,
                               .chunk = e->limits.chunk,
                               .kv_block = KV_BLOCK,
                               .kv_blocks_of_rank = e->kv_blocks_of_rank,
                               .prefix_cache = e->limits.prefix_cache,
                               .step_seconds = e->limits.step_seconds,
                               .first_rows = e->affinity ? AFFINITY_TOKENS : 0,
                               .touch = c->n_moe_layers > 0 ? (double)c->top_k / c->n_experts : 0};
    if (getrandom(&limits.secret, sizeof limits.secret, 0) != sizeof limits.secret)
        return status_fail(STATUS_IO, "the system gives no random bytes to name prefixes by");
    return scheduler_create(&limits, &e->scheduler);
}

static status create_arrays(engine *e)
{
    size_t ranks = (size_t)e->n_ranks, layers = (size_t)e->parts.config->n_moe_layers;
    e->parts_in = calloc(ranks, sizeof *e->parts_in);
    e->sizes_in = calloc(ranks, sizeof *e->sizes_in);
    e->kv_blocks_of_rank = calloc(ranks, sizeof *e->kv_blocks_of_rank);
    e->rows_of_rank = calloc(ranks, sizeof *e->rows_of_rank);
    e->compute_of_rank = calloc(ranks, sizeof *e->compute_of_rank);
    e->waited_of_rank = calloc(ranks, sizeof *e->waited_of_rank);
    e->waited_now = calloc(ranks, sizeof *e->waited_now);
    e->lateness_of_rank = calloc(ranks, sizeof *e->lateness_of_rank);
    e->layer_rows = calloc(ranks * layers + 1, sizeof *e->layer_rows);
    e->layer_recent = calloc(ranks * layers + 1, sizeof *e->layer_recent);
    e->load_max_over_mean = calloc(layers + 1, sizeof *e->load_max_over_mean);
    if (!e->parts_in || !e->sizes_in || !e->kv_blocks_of_rank || !e->rows_of_rank || !e->compute_of_rank || !e->waited_of_rank ||
        !e->waited_now || !e->lateness_of_rank || !e->layer_rows || !e->layer_recent || !e->load_max_over_mean)
        return status_fail(STATUS_NO_MEMORY, "no memory for the leader's tables of %d ranks", e->n_ranks);
    return STATUS_OK;
}

/* [all] Every rank says how many KV blocks it has: budgets may differ. */
status lead_create(engine *e)
{
    int mine = kv_cache_n_blocks(e->kv);
    TRY(group_agree(e->parts.group, create_arrays(e)));
    TRY(group_gather(e->parts.group, &mine, sizeof mine, e->parts_in, e->sizes_in));
    for (int r = 0; r < e->n_ranks && e->rank == 0; r++)
        memcpy(&e->kv_blocks_of_rank[r], e->parts_in[r], sizeof mine);
    return group_agree(e->parts.group, e->rank == 0 ? create_scheduler(e) : STATUS_OK);
}

void lead_destroy(engine *e)
{
    scheduler_destroy(e->scheduler, forget_request);
    bytes_clear(&e->message);
    bytes_clear(&e->root);
    void *all[] = {e->parts_in,       e->sizes_in,   e->kv_blocks_of_rank,  e->rows_of_rank,
                   e->waited_of_rank, e->waited_now, e->layer_rows,         e->lateness_of_rank,
                   e->layer_recent,   e->cancels,    e->load_max_over_mean, e->compute_of_rank};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- requests -------------------------------------------------------------------------------------------------------------- */

static status check_candidates(const engine_candidates *c, const char *what, int vocab)
{
    if (c->top_n < 0 || c->n_ids < 0 || (c->top_n > 0) + (c->n_ids > 0) + c->all > 1)
        return status_fail(STATUS_BAD_INPUT, "%s candidates: ask for the best few, for a list, or for all", what);
    for (int i = 0; i < c->n_ids; i++)
        if (c->ids[i] < 0 || c->ids[i] >= vocab)
            return status_fail(STATUS_BAD_INPUT, "%s candidates: token %d is outside the vocabulary of %d", what, c->ids[i],
                               vocab);
    return STATUS_OK;
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
    if (r->domain < 0 || r->domain >= e->limits.n_domains)
        return status_fail(STATUS_BAD_INPUT, "domain %d, but there are only %d", r->domain, e->limits.n_domains);
    TRY(check_candidates(&r->prompt_candidates, "prompt", c->vocab));
    TRY(check_candidates(&r->output_candidates, "output", c->vocab));
    return sampling_params_check(&r->sampling, c->vocab);
}

static const void *copy_behind(char **at, const void *from, size_t bytes)
{
    char *to = *at;
    if (bytes > 0)
        memcpy(to, from, bytes);
    *at += bytes;
    return bytes > 0 ? to : NULL;
}

/* One block of memory: the struct, then its arrays. All of them are of 4-byte numbers. */
static lead_request *copy_request(const engine_request *r)
{
    const sampling_params *s = &r->sampling;
    size_t stops = (size_t)s->n_stop_ids * sizeof *s->stop_ids, biases = (size_t)s->n_biases * sizeof *s->biases;
    size_t allowed = (size_t)s->n_allowed * sizeof *s->allowed;
    size_t ids_in = (size_t)r->prompt_candidates.n_ids * sizeof(int32_t);
    size_t ids_out = (size_t)r->output_candidates.n_ids * sizeof(int32_t);
    lead_request *q = malloc(sizeof *q + stops + biases + allowed + ids_in + ids_out + 1);
    if (!q)
        return NULL;
    char *at = (char *)(q + 1);
    *q = (lead_request){.request = *r};
    q->request.prompt = NULL;
    q->request.cache_salt = NULL;
    q->request.sampling.stop_ids = copy_behind(&at, s->stop_ids, stops);
    q->request.sampling.biases = copy_behind(&at, s->biases, biases);
    const void *list = copy_behind(&at, s->allowed, allowed);
    q->request.sampling.allowed = s->allowed && !list ? (const int *)(const void *)at : list;
    q->request.prompt_candidates.ids = copy_behind(&at, r->prompt_candidates.ids, ids_in);
    q->request.output_candidates.ids = copy_behind(&at, r->output_candidates.ids, ids_out);
    return q;
}

static bool any_candidates(const engine_candidates *c)
{
    return c->top_n > 0 || c->n_ids > 0 || c->all;
}

/* Who wants to hear of rows of the prompt needs them run. */
static bool wants_rows(const engine_request *r)
{
    const unsigned all = ENGINE_WANT_SCORE | ENGINE_WANT_LOGITS | ENGINE_WANT_CHOICES | ENGINE_WANT_PROMPT_LOGPROBS;
    return r->want & all || any_candidates(&r->prompt_candidates);
}

status engine_submit(engine *e, const engine_request *r)
{
    TRY(check_request(e, r));
    /* What keys and values depend on beside the tokens. A place for a policy's id is kept. */
    const uint32_t setting[4] = {(uint32_t)e->parts.combine, (uint32_t)e->parts.rows, 0, 0};
    bytes_reset(&e->root);
    bytes_put(&e->root, setting, sizeof setting);
    bytes_put(&e->root, r->cache_salt, (size_t)r->salt_size);
    lead_request *q = copy_request(r);
    if (!q || e->root.failed) {
        free(q);
        return status_fail(STATUS_NO_MEMORY, "no memory to queue a request of %d tokens", r->n_prompt);
    }
    scheduler_request ask = {.id = r->id,
                             .user = q,
                             .tokens = r->prompt,
                             .n_tokens = r->n_prompt,
                             .max_new = r->max_new,
                             .rank = r->owner,
                             .priority = r->priority,
                             .client = r->client,
                             .arrival = r->arrival,
                             .look_up = !r->bypass_prefix_cache && !wants_rows(r),
                             .leave = !r->bypass_prefix_cache,
                             .root = e->root.data,
                             .root_size = e->root.size};
    status st = scheduler_submit(e->scheduler, &ask);
    if (st != STATUS_OK)
        free(q);
    return st;
}

static void tell(engine *e, const engine_event *event)
{
    if (e->listener)
        e->listener(e->listener_arg, event);
}

static void cancel_now(engine *e, uint64_t id)
{
    lead_request *q = scheduler_cancel(e->scheduler, id);
    if (!q)
        return;
    free(q);
    tell(e, &(engine_event){.id = id, .kind = ENGINE_EVENT_FINISHED, .finish = ENGINE_FINISH_CANCELLED});
}

/* A running sequence may be in the middle of a step, when the listener cancels: it goes with the next one. */
status engine_cancel(engine *e, uint64_t id)
{
    if (!scheduler_find(e->scheduler, id))
        return STATUS_OK;
    if (scheduler_is_waiting(e->scheduler, id)) {
        cancel_now(e, id);
        return STATUS_OK;
    }
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
    scheduler_hold(e->scheduler, id, hold);
    return STATUS_OK;
}

status engine_clear_prefix_cache(engine *e)
{
    scheduler_forget_prefixes(e->scheduler);
    return STATUS_OK;
}

bool engine_busy(const engine *e)
{
    return e->n_cancels > 0 || scheduler_busy(e->scheduler);
}

/* ---- the step message ------------------------------------------------------------------------------------------------------ */

static void put_join(engine *e, const scheduler_join *join)
{
    const lead_request *q = join->user;
    wire_join w = {.request = q->request,
                   .rank = join->rank,
                   .place = join->place,
                   .n_original = q->request.n_prompt,
                   .n_cached = join->n_cached,
                   .n_ran = join->n_ran,
                   .judged = join->judged,
                   .blocks = join->blocks,
                   .n_blocks = join->n_blocks};
    w.request.prompt = join->tokens;
    w.request.n_prompt = join->n_tokens;
    w.request.n_prior += join->n_generated;
    w.request.max_new -= join->n_generated;
    wire_put_join(&e->message, &w);
}

static void put_move(engine *e, const scheduler_move *m)
{
    const int *node = group_node_of_rank(e->parts.group);
    wire_put_move(&e->message, m);
    e->moved_cross_bytes += node[m->from] != node[m->to] ? (size_t)m->n_blocks * kv_cache_block_bytes(e->kv) : 0;
}

bool engine_pending(const engine *e)
{
    return plans_pending(e) || counts_pending(e);
}

status lead_write_message(engine *e, bool stop)
{
    for (int i = 0; i < e->n_cancels; i++) /* the listener may add to them */
        cancel_now(e, e->cancels[i]);
    e->n_cancels = 0;
    bytes_reset(&e->message);
    if (stop) {
        wire_put_step(&e->message, &(wire_step){.stop = 1}, NULL);
        return e->message.failed ? status_fail(STATUS_NO_MEMORY, "no memory for the step message") : STATUS_OK;
    }
    const scheduler_step *step = scheduler_plan(e->scheduler);
    wire_step head = {.n_leaves = (uint32_t)step->n_leaves,
                      .n_joins = (uint32_t)step->n_joins,
                      .n_growths = (uint32_t)step->n_growths,
                      .n_rows = (uint32_t)step->n_rows,
                      .n_moves = (uint32_t)step->n_moves};
    plans_decide(e, &head);
    counts_decide(e, &head);
    wire_put_step(&e->message, &head, step);
    for (int i = 0; i < step->n_joins; i++)
        put_join(e, &step->joins[i]);
    for (int i = 0; i < step->n_moves; i++)
        put_move(e, &step->moves[i]);
    plans_put(e, &head);
    e->last_prefill_rows = step->prefill_rows;
    e->last_decode_rows = step->decode_rows;
    for (int i = 0; i < step->n_joins; i++)
        if (!step->joins[i].moved)
            tell(e, &(engine_event){.id = step->joins[i].id,
                                    .kind = ENGINE_EVENT_STARTED,
                                    .owner = step->joins[i].rank,
                                    .n_cached = step->joins[i].n_cached});
    return e->message.failed ? status_fail(STATUS_NO_MEMORY, "no memory for the step message") : STATUS_OK;
}

/* ---- reports --------------------------------------------------------------------------------------------------------------- */

static void count_layers(engine *e, int rank, const unsigned long long *rows)
{
    size_t layers = (size_t)e->parts.config->n_moe_layers;
    for (size_t l = 0; l < layers; l++) {
        size_t at = (size_t)rank * layers + l;
        e->layer_recent[at] = LOAD_MEMORY * e->layer_recent[at] + (double)(rows[l] - e->layer_rows[at]);
        e->layer_rows[at] = rows[l];
    }
}

static void take_event(engine *e, const engine_event *event)
{
    if (event->kind == ENGINE_EVENT_TOKEN)
        scheduler_add_token(e->scheduler, event->id, event->token);
    if (event->kind == ENGINE_EVENT_FINISHED)
        free(scheduler_finish(e->scheduler, event->id));
    tell(e, event);
}

static void read_owners(engine *e, int rank, const wire_report *head, bytes_reader *r)
{
    for (uint32_t i = 0; i < head->n_ended && !r->short_read; i++) {
        const wire_ended *ended = bytes_take(r, sizeof *ended);
        if (ended)
            owners_end(e, ended);
    }
    for (uint32_t i = 0; i < head->n_judged && !r->short_read; i++) {
        const wire_judgement *j = bytes_take(r, sizeof *j);
        const double *us = bytes_take(r, (size_t)e->n_ranks * sizeof *us);
        if (j && us)
            owners_hear(e, rank, j, us);
    }
}

static status read_report(engine *e, int rank)
{
    bytes_reader r = {.at = e->parts_in[rank], .end = (const unsigned char *)e->parts_in[rank] + e->sizes_in[rank]};
    size_t layers = (size_t)e->parts.config->n_moe_layers;
    wire_report head;
    bytes_get(&r, &head, sizeof head);
    const unsigned long long *rows = bytes_take(&r, layers * sizeof *rows);
    if (rows)
        count_layers(e, rank, rows);
    const void *piece = wire_take_padded(&r, head.counts_bytes);
    const char *sentence = wire_take_padded(&r, head.sentence_bytes);
    plans_hear(e, rank, &head, sentence);
    counts_hear(e, rank, &head, piece, sentence);
    read_owners(e, rank, &head, &r);
    e->rows_of_rank[rank] = head.expert_rows;
    e->compute_of_rank[rank] = head.compute_seconds;
    e->waited_now[rank] = head.wait_seconds - e->waited_of_rank[rank];
    e->waited_of_rank[rank] = head.wait_seconds;
    for (int i = 0; i < 3; i++)
        e->link_bytes[i] += head.link_bytes[i];
    while (r.at < r.end && !r.short_read) {
        engine_event event;
        bool is_void;
        TRY(wire_get_event(&r, e->choices_per_row, (size_t)e->parts.config->vocab, &event, &is_void));
        event.owner = event.kind == ENGINE_EVENT_ROWS ? rank : event.owner;
        event.step = (long long)e->times.steps - 1;
        if (!is_void)
            take_event(e, &event);
    }
    return STATUS_OK;
}

/* The rank that waited least kept the others waiting. Who was late at one layer and early at another is not seen. */
static void count_lateness(engine *e)
{
    int late = 0;
    double sum = 0;
    for (int r = 0; r < e->n_ranks; r++) {
        late = e->waited_now[r] < e->waited_now[late] ? r : late;
        sum += e->waited_now[r];
    }
    if (e->n_ranks > 1)
        e->lateness_of_rank[late] += (sum - e->n_ranks * e->waited_now[late]) / (e->n_ranks - 1);
}

static void count_step(engine *e, double seconds)
{
    e->times.steps++;
    e->last_seconds = seconds;
    if (e->last_prefill_rows > 0) {
        e->times.prefill_seconds += seconds;
        e->times.prefill_rows += (unsigned)e->last_prefill_rows;
        e->times.mixed_decode_rows += (unsigned)e->last_decode_rows;
    } else {
        e->times.decode_seconds += seconds;
        e->times.decode_rows += (unsigned)e->last_decode_rows;
    }
}

status lead_read_reports(engine *e, double seconds)
{
    scheduler_ran(e->scheduler, seconds);
    count_step(e, seconds);
    memset(e->link_bytes, 0, sizeof e->link_bytes);
    for (int r = 0; r < e->n_ranks; r++)
        TRY(read_report(e, r));
    count_lateness(e);
    plans_conclude(e);
    counts_conclude(e);
    return STATUS_OK;
}

/* ---- counters -------------------------------------------------------------------------------------------------------------- */

static void balance_layers(engine *e)
{
    size_t layers = (size_t)e->parts.config->n_moe_layers;
    for (size_t l = 0; l < layers; l++) {
        double most = 0, sum = 0;
        for (size_t r = 0; r < (size_t)e->n_ranks; r++) {
            double rows = e->layer_recent[r * layers + l];
            most = rows > most ? rows : most;
            sum += rows;
        }
        e->load_max_over_mean[l] = sum > 0 ? most * e->n_ranks / sum : 1;
    }
}

void engine_get_counters(engine *e, engine_counters *out)
{
    scheduler_counters s;
    scheduler_get_counters(e->scheduler, &s);
    balance_layers(e);
    *out = (engine_counters){.n_running = s.n_running,
                             .n_waiting = s.n_waiting,
                             .max_running = e->limits.max_sequences,
                             .n_preempted = s.n_preempted,
                             .n_steps = e->times.steps,
                             .prefix_queries = s.prefix_queries,
                             .prefix_hits = s.prefix_hits,
                             .kv_free_of_rank = s.kv_free_of_rank,
                             .kv_blocks_of_rank = e->kv_blocks_of_rank,
                             .last_prefill_rows = e->last_prefill_rows,
                             .last_decode_rows = e->last_decode_rows,
                             .last_seconds = e->last_seconds,
                             .rows_of_rank = e->rows_of_rank,
                             .compute_of_rank = e->compute_of_rank,
                             .plan_epoch = e->plan_epoch,
                             .n_moved = s.n_moved,
                             .moved_cross_bytes = e->moved_cross_bytes,
                             .moved_bytes = s.moved_blocks * kv_cache_block_bytes(e->kv),
                             .replan = e->replan,
                             .lateness_of_rank = e->lateness_of_rank,
                             .link_bytes = {e->link_bytes[0], e->link_bytes[1], e->link_bytes[2]},
                             .load_max_over_mean = e->load_max_over_mean};
}
