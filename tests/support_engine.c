#include "tests/support_engine.h"

#include "tests/support.h"
#include "tests/support_plan.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- the mix --------------------------------------------------------------------------------------------------------------- */

static void fill_sampling(int i, sampling_params *s)
{
    static const token_bias biases[] = {{7, 2.5f}, {300, -100}};
    static const int allowed[] = {3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377}, stops[] = {8, 100, 200};
    *s = (sampling_params){.temperature = i % 3 ? 0.9f : 0,
                           .top_k = i % 2 ? 40 : 0,
                           .top_p = i % 4 == 3 ? 0.8f : 0,
                           .min_p = i % 5 == 4 ? 0.02f : 0,
                           .repetition_penalty = i % 4 == 1 ? 1.2f : 0,
                           .frequency_penalty = i % 5 == 2 ? 0.5f : 0,
                           .presence_penalty = i % 6 == 5 ? -0.3f : 0,
                           .seed = 1234u + (uint64_t)i,
                           .sequence = (uint32_t)i % 2};
    if (i % 2) {
        s->biases = biases;
        s->n_biases = 2;
    }
    if (i % 7 == 6) {
        s->allowed = allowed;
        s->n_allowed = 11;
        s->stop_ids = stops;
        s->n_stop_ids = 1;
        s->min_tokens = 9;
    }
}

engine_request support_mix_request(int i, int32_t *prompt)
{
    static const int32_t ids[] = {400, 2, 17};
    uint64_t state = i >= 7 ? 5 : (uint64_t)i + 99; /* the later ones begin alike */
    int n = i < 7 ? 3 + 17 * i : 60 + 9 * (i - 7);
    for (int j = 0; j < n; j++) {
        if (i >= 7 && j == 75 + i)
            state += (uint64_t)i;
        prompt[j] = support_below(&state, 512);
    }
    engine_request r = {.id = (uint64_t)i,
                        .prompt = prompt,
                        .n_prompt = n,
                        .max_new = i == 4 ? 0 : MIX_NEW,
                        .want = ENGINE_IGNORE_EOS,
                        .owner = -1,
                        .priority = i % 3 - 1,
                        .client = (uint64_t)i % 2,
                        .bypass_prefix_cache = i == 11,
                        .cache_salt = "pepper",
                        .salt_size = i == 12 ? 6 : 0};
    fill_sampling(i, &r.sampling);
    r.want |= i % 4 == 0 ? ENGINE_WANT_PROMPT_LOGPROBS : 0;
    r.want |= i == 3 || i == 4 ? ENGINE_WANT_SCORE : 0;
    r.prompt_candidates.top_n = i == 5 || i == 8 ? 3 : 0;
    r.output_candidates.top_n = i % 3 == 1 ? MIX_CANDIDATES : 0;
    if (i % 3 == 2) {
        r.output_candidates.ids = ids;
        r.output_candidates.n_ids = 3;
    }
    return r;
}

/* ---- listening ---------------------------------------------------------------------------------------------------------------
 */

static void take_token(mix_answer *a, const engine_event *e)
{
    int i = a->n_tokens++;
    assert_true(a->n_starts > 0 && i < MIX_LENGTH && e->n_candidates <= MIX_CANDIDATES);
    a->tokens[i] = e->token;
    a->logprobs[i] = e->logprob;
    a->ranks[i] = e->rank;
    a->n_candidates[i] = e->n_candidates;
    if (e->n_candidates)
        memcpy(a->candidates[i], e->candidates, (size_t)e->n_candidates * sizeof *e->candidates);
}

/* Each position once, in order, and none after the first token. */
static void take_prompt(mix_answer *a, const engine_event *e)
{
    const token_logprob *candidates = e->candidates;
    assert_int_equal(e->first_position, a->next_prompt ? a->next_prompt : 1);
    assert_int_equal(a->n_tokens, 0);
    for (int r = 0; r < e->n_rows; r++) {
        int p = e->first_position + r, n = e->candidates_of_row[r];
        assert_true(p < MIX_LENGTH && n <= MIX_CANDIDATES);
        a->prompt[p] = e->logprobs[r];
        a->n_prompt_candidates[p] = n;
        if (n)
            memcpy(a->prompt_candidates[p], candidates, (size_t)n * sizeof *candidates);
        candidates += n;
    }
    assert_int_equal(e->n_candidates, candidates - e->candidates);
    a->next_prompt = e->first_position + e->n_rows;
}

void support_mix_listen(void *arg, const engine_event *e)
{
    mix_answer *a = (mix_answer *)arg + e->id;
    assert_int_equal(a->n_finished, 0);
    switch (e->kind) {
    case ENGINE_EVENT_STARTED:
        if (a->n_starts++ == 0)
            a->n_cached = e->n_cached;
        break;
    case ENGINE_EVENT_TOKEN:
        take_token(a, e);
        break;
    case ENGINE_EVENT_PROMPT:
        take_prompt(a, e);
        break;
    case ENGINE_EVENT_ROWS:
        assert_int_equal(e->first_position, a->next_row);
        a->next_row += e->n_rows;
        a->score += e->sum_logprob;
        a->n_scored += e->n_scored;
        break;
    case ENGINE_EVENT_FINISHED:
        a->n_finished++;
        a->finish = e->finish;
        snprintf(a->reason, sizeof a->reason, "%s", e->reason ? e->reason : "");
        break;
    }
}

/* ---- running -----------------------------------------------------------------------------------------------------------------
 */

static bool is_on(unsigned bits, int i)
{
    return bits >> i & 1;
}

static void check(status st)
{
    if (st != STATUS_OK)
        fail_msg("%s", status_message());
}

static void submit_mix(engine *e, const mix_setting *s)
{
    int32_t prompt[MIX_LENGTH];
    int first = (int)(s->seed % MIX_REQUESTS);
    for (int n = 0; n < MIX_REQUESTS; n++) {
        int i = (first + n) % MIX_REQUESTS;
        if (s->only && !is_on(s->only, i))
            continue;
        engine_request r = support_mix_request(i, prompt);
        check(engine_submit(e, &r));
    }
}

static void disturb(engine *e, const mix_setting *s, uint64_t *random)
{
    for (int n = 0; n < 2 && s->disturb; n++)
        check(engine_hold(e, (uint64_t)support_below(random, MIX_REQUESTS), support_below(random, 2)));
    int i = support_below(random, MIX_REQUESTS * 6);
    if (i < MIX_REQUESTS && is_on(s->cancel, i))
        check(engine_cancel(e, (uint64_t)i));
}

/* A random plan, at a rate that lets it be live before the next one comes, or not. */
static void ask_replan(engine *e, uint64_t *random, uint64_t epoch)
{
    const plan *live = engine_plan(e);
    plan_shape shape = {
        .n_ranks = live->n_ranks, .n_experts = live->n_experts, .n_layers = live->n_layers, .layer_numbers = live->layer_numbers};
    plan p = {0};
    check(support_random_plan(random, &shape, live->node_of_rank, 0.3, &p));
    check(engine_replan(e, &p, epoch, support_below(random, 2) ? (uint64_t)1 << 30 : (uint64_t)1 << 20));
    plan_clear(&p);
}

static void hear_counts(engine *e, mix_counts *counts)
{
    engine_counts c;
    if (!engine_take_counts(e, &c))
        return;
    assert_true(counts->asked && !c.failed);
    counts->asked = false;
    counts->n_counted += c.tokens;
    counts->n_times_counted++;
}

static void rearrange(engine *e, const mix_setting *s, uint64_t *random, mix_counts *counts)
{
    if (s->replan && support_below(random, 3) == 0)
        ask_replan(e, random, ++counts->plan_epoch);
    hear_counts(e, counts);
    if (s->count && support_below(random, 5) == 0 && !counts->asked) {
        counts->asked = true;
        check(engine_ask_counts(e));
    }
}

/* What is under way comes to its end without sequences, too. */
static void settle(engine *e, const mix_setting *s, mix_counts *counts)
{
    engine_counters c;
    for (int steps = 0; engine_pending(e); steps++) {
        assert_true(steps < 100000);
        check(engine_step(e));
    }
    hear_counts(e, counts);
    engine_get_counters(e, &c);
    assert_int_equal(c.plan_epoch, counts->plan_epoch);
    assert_true(!s->replan || c.replan.stage == ENGINE_REPLAN_LIVE);
    assert_true(c.replan.loaded_bytes <= c.replan.total_bytes);
}

static void run_mix(engine *e, const mix_setting *s, mix_counts *counts)
{
    uint64_t random = s->seed;
    submit_mix(e, s);
    for (int steps = 0; steps < 4000; steps++) {
        disturb(e, s, &random);
        rearrange(e, s, &random, counts);
        if (!engine_busy(e)) {
            for (int i = 0; i < MIX_REQUESTS; i++)
                check(engine_hold(e, (uint64_t)i, false));
            if (!engine_busy(e))
                return;
        }
        check(engine_step(e));
    }
    fail_msg("4000 steps, and still not done");
}

static void lead(engine *e, int n_ranks, const mix_setting *s, mix_answer *answers, mix_counts *counts)
{
    engine_counters c;
    *counts = (mix_counts){0};
    for (int round = 0; round <= s->twice; round++) {
        memset(answers, 0, MIX_REQUESTS * sizeof *answers);
        run_mix(e, s, counts);
    }
    settle(e, s, counts);
    if (s->count) {
        counts->asked = true;
        check(engine_ask_counts(e));
        settle(e, s, counts);
    }
    engine_get_counters(e, &c);
    counts->n_preempted = c.n_preempted;
    counts->prefix_hits = c.prefix_hits;
    counts->n_moved = c.n_moved;
    assert_true((c.n_moved > 0) == (c.moved_bytes > 0));
    assert_int_equal(c.n_running + c.n_waiting, 0);
    check(engine_step(e)); /* the last leaves; a step with nothing to do is fine */
    engine_get_counters(e, &c);
    for (int r = 0; r < n_ranks; r++)
        assert_int_equal(c.kv_free_of_rank[r], c.kv_blocks_of_rank[r]);
    check(engine_stop(e));
}

static size_t block_bytes(const char *dir)
{
    model_config c = {0};
    check(model_config_read(dir, &c));
    size_t bytes = kv_head_floats(c.head_dim) * (size_t)c.n_kv_heads * (size_t)c.n_layers * sizeof(float);
    model_config_clear(&c);
    return bytes;
}

void support_mix_run(group *g, const char *dir, const mix_setting *s, mix_answer *answers, mix_counts *counts)
{
    static const char *const domain = "none";
    runtime_options o = {.model_dir = dir,
                         .threads = s->threads,
                         .combine = COMBINE_FIXED,
                         .weights = s->weights,
                         .replicas = s->replicas,
                         .topology_text = s->topology,
                         .limits = {.max_sequences = s->max_sequences,
                                    .chunk = s->chunk,
                                    .max_length = MIX_LENGTH,
                                    .kv_bytes = (size_t)s->kv_blocks * block_bytes(dir),
                                    .step_seconds = s->step_seconds,
                                    .prefix_cache = s->prefix_cache,
                                    .count_pairs = s->count,
                                    .owners = s->owners,
                                    .n_domains = 1,
                                    .domains = &domain}};
    runtime *r = NULL;
    check(runtime_create(g, &o, support_mix_listen, answers, &r));
    if (group_rank(g) == 0)
        lead(runtime_engine(r), group_size(g), s, answers, counts);
    else
        check(engine_follow(runtime_engine(r)));
    runtime_destroy(r);
}

/* ---- comparing ---------------------------------------------------------------------------------------------------------------
 */

static void same_bytes(const void *a, const void *b, size_t n, const char *what, const char *of)
{
    if (memcmp(a, b, n) != 0)
        fail_msg("%s: the %s differ", what, of);
}

void support_mix_compare(const mix_answer *a, const mix_answer *b, bool prefix, const char *what)
{
    size_t n = (size_t)a->n_tokens;
    if (prefix ? a->n_tokens > b->n_tokens : a->n_tokens != b->n_tokens)
        fail_msg("%s: %d tokens, and %d", what, a->n_tokens, b->n_tokens);
    same_bytes(a->tokens, b->tokens, n * sizeof *a->tokens, what, "tokens");
    same_bytes(a->logprobs, b->logprobs, n * sizeof *a->logprobs, what, "log-probabilities");
    same_bytes(a->ranks, b->ranks, n * sizeof *a->ranks, what, "ranks");
    same_bytes(a->n_candidates, b->n_candidates, n * sizeof *a->n_candidates, what, "numbers of candidates");
    same_bytes(a->candidates, b->candidates, n * sizeof *a->candidates, what, "candidates");
    if (prefix)
        return;
    assert_int_equal(a->finish, b->finish);
    assert_int_equal(a->next_prompt, b->next_prompt);
    assert_int_equal(a->next_row, b->next_row);
    assert_int_equal(a->n_scored, b->n_scored);
    assert_true(fabs(a->score - b->score) <= 1e-9 * fabs(b->score)); /* chunks are added up apart */
    n = (size_t)a->next_prompt;
    same_bytes(a->prompt, b->prompt, n * sizeof *a->prompt, what, "prompt's log-probabilities");
    same_bytes(a->n_prompt_candidates, b->n_prompt_candidates, n * sizeof *a->n_prompt_candidates, what,
               "numbers of the prompt's candidates");
    same_bytes(a->prompt_candidates, b->prompt_candidates, n * sizeof *a->prompt_candidates, what, "prompt's candidates");
}
