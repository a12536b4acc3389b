/* door_inference.c - vllm.Inference: its request as a wish, and what a sequence has gained as its answer. */
#include "cluster/door_internal.h"

#include <limits.h>
#include <string.h>

int door_count(uint64_t n)
{
    return n > INT_MAX ? INT_MAX : (int)n;
}

refusal_kind door_ids(const char *name, const uint32_t *ids, size_t n, const int32_t **out, int *n_out, refusal *why)
{
    if (n > INT_MAX)
        return refuse(why, REFUSAL_BAD, "%s: %zu are too many", name, n);
    for (size_t i = 0; i < n; i++)
        if (ids[i] > INT32_MAX)
            return refuse(why, REFUSAL_BAD, "%s: %u is no token id", name, ids[i]);
    *out = (const int32_t *)ids;
    *n_out = (int)n;
    return REFUSAL_NONE;
}

/* ---- request ---- */

/* Fields we know and do not serve. */
static refusal_kind refuse_unserved(const Vllm__GenerateRequest *m, refusal *why)
{
    static const struct {
        Vllm__DecodingParameters__StructuredOutputCase kind;
        const char *name;
    } structured[] = {
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_JSON, "json"},
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_REGEX, "regex"},
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_CHOICE, "choice"},
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_GRAMMAR, "grammar"},
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_JSON_OBJECT, "json_object"},
        {VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_STRUCTURAL_TAG, "structural_tag"},
    };
    if (m->n_media)
        return refuse(why, REFUSAL_UNSUPPORTED, "media: only text and tokens are served");
    if (m->lora_name[0])
        return refuse(why, REFUSAL_UNSUPPORTED, "lora_name: LoRA adapters are not served");
    if (m->kv && m->kv->kv_transfer_params)
        return refuse(why, REFUSAL_UNSUPPORTED, "kv.kv_transfer_params: KV transfer is not served");
    if (m->kv && m->kv->ec_transfer_params)
        return refuse(why, REFUSAL_UNSUPPORTED, "kv.ec_transfer_params: KV transfer is not served");
    const Vllm__DecodingParameters *d = m->decoding;
    for (size_t i = 0; d && i < sizeof structured / sizeof structured[0]; i++)
        if (d->structured_output_case == structured[i].kind &&
            (structured[i].kind != VLLM__DECODING_PARAMETERS__STRUCTURED_OUTPUT_JSON_OBJECT || d->json_object))
            return refuse(why, REFUSAL_UNSUPPORTED, "decoding.%s: structured output is not served", structured[i].name);
    return REFUSAL_NONE;
}

static refusal_kind take_prompt(const Vllm__GenerateRequest *m, request_wish *wish, refusal *why)
{
    wish->truncate_prompt = door_count(m->truncate_prompt_tokens);
    switch (m->prompt_case) {
    case VLLM__GENERATE_REQUEST__PROMPT_TEXT:
        wish->has_text = wish->add_special = true;
        wish->text = m->text.len ? (const char *)m->text.data : "";
        wish->text_size = m->text.len;
        return REFUSAL_NONE;
    case VLLM__GENERATE_REQUEST__PROMPT_TOKEN_IDS:
        return door_ids("token_ids", m->token_ids->ids, m->token_ids->n_ids, &wish->ids, &wish->n_ids, why);
    default:
        return refuse(why, REFUSAL_BAD, "prompt: there is neither text nor token_ids");
    }
}

static void take_sampling(const Vllm__RandomSampling *m, request_wish *wish)
{
    if (!m)
        return;
    wish->n = door_count(m->num_sequences);
    wish->has_top_k = m->top_k != 0;
    wish->top_k = door_count(m->top_k);
    wish->has_top_p = m->top_p != 0;
    wish->top_p = m->top_p;
    wish->min_p = m->min_p;
    wish->has_seed = m->_seed_case == VLLM__RANDOM_SAMPLING___SEED_SEED;
    wish->seed = (uint64_t)m->seed;
}

static refusal_kind take_decoding(const Vllm__DecodingParameters *m, wish_room *room, request_wish *wish, refusal *why)
{
    if (!m)
        return REFUSAL_NONE;
    wish->presence_penalty = m->presence_penalty;
    wish->frequency_penalty = m->frequency_penalty;
    wish->repetition_penalty = m->repetition_penalty;
    if (!arena_reserve(&room->memory, ARENA_BYTES(m->n_logit_bias, sizeof(bias_wish))))
        return refuse(why, REFUSAL_INTERNAL, "out of memory");
    bias_wish *biases = arena_take(&room->memory, m->n_logit_bias, sizeof *biases);
    for (size_t i = 0; i < m->n_logit_bias; i++) {
        if (m->logit_bias[i]->key > INT32_MAX)
            return refuse(why, REFUSAL_BAD, "decoding.logit_bias: %u is no token id", m->logit_bias[i]->key);
        biases[i] = (bias_wish){(int32_t)m->logit_bias[i]->key, m->logit_bias[i]->value};
    }
    wish->biases = biases;
    wish->n_biases = door_count(m->n_logit_bias);
    return door_ids("decoding.allowed_token_ids", m->allowed_token_ids, m->n_allowed_token_ids, &wish->allowed, &wish->n_allowed,
                    why);
}

static refusal_kind take_stopping(const Vllm__StoppingCriteria *m, request_wish *wish, refusal *why)
{
    enum { DEFAULT_NEW_TOKENS = 20 }; /* the protocol's */
    wish->max_new = m && m->max_new_tokens ? door_count(m->max_new_tokens) : DEFAULT_NEW_TOKENS;
    if (!m)
        return REFUSAL_NONE;
    wish->min_new = door_count(m->min_new_tokens);
    wish->stops = (const char *const *)m->stop_strings;
    wish->n_stops = door_count(m->n_stop_strings);
    wish->include_stop = m->include_stop_strings;
    wish->ignore_eos = m->ignore_eos;
    return door_ids("stopping.stop_token_ids", m->stop_token_ids, m->n_stop_token_ids, &wish->stop_ids, &wish->n_stop_ids, why);
}

static refusal_kind take_candidates(const char *name, const Vllm__CandidateTokens *m, candidates_wish *wish, refusal *why)
{
    if (!m)
        return REFUSAL_NONE;
    switch (m->select_case) {
    case VLLM__CANDIDATE_TOKENS__SELECT_TOP_N:
        wish->top_n = door_count(m->top_n);
        return REFUSAL_NONE;
    case VLLM__CANDIDATE_TOKENS__SELECT_TOKEN_IDS:
        return door_ids(name, m->token_ids->ids, m->token_ids->n_ids, &wish->ids, &wish->n_ids, why);
    case VLLM__CANDIDATE_TOKENS__SELECT_ALL:
        wish->all = m->all;
        return REFUSAL_NONE;
    default:
        return REFUSAL_NONE;
    }
}

static bool wants_any(const candidates_wish *c)
{
    return c->top_n || c->n_ids || c->all;
}

void inference_options(const Vllm__ResponseOptions *m, answer_wish *want)
{
    *want = (answer_wish){.text = true};
    if (!m)
        return;
    want->prompt_ids = m->prompt_token_ids;
    want->prompt_logprobs = m->prompt_logprobs;
    want->prompt_candidates = m->prompt_candidates != NULL;
    want->text = m->_output_text_case == VLLM__RESPONSE_OPTIONS___OUTPUT_TEXT__NOT_SET || m->output_text;
    want->token_ids = m->output_token_ids;
    want->logprobs = m->output_logprobs;
    want->candidates = m->output_candidates != NULL;
}

refusal_kind inference_wish(const Vllm__GenerateRequest *m, wish_room *room, request_wish *wish, answer_wish *want, refusal *why)
{
    const Vllm__ResponseOptions *r = m->response;
    *wish = (request_wish){.id = m->request_id, .model = m->model, .priority = m->priority, .owner = -1};
    inference_options(r, want);
    if (refuse_unserved(m, why) || take_prompt(m, wish, why) || take_decoding(m->decoding, room, wish, why) ||
        take_stopping(m->stopping, wish, why) ||
        (r && take_candidates("response.prompt_candidates.token_ids", r->prompt_candidates, &wish->prompt_candidates, why)) ||
        (r && take_candidates("response.output_candidates.token_ids", r->output_candidates, &wish->output_candidates, why)))
        return why->kind;
    take_sampling(m->sampling, wish);
    wish->has_temperature = m->_temperature_case == VLLM__GENERATE_REQUEST___TEMPERATURE_TEMPERATURE;
    wish->temperature = m->temperature;
    want->prompt_candidates = wants_any(&wish->prompt_candidates);
    want->candidates = wants_any(&wish->output_candidates);
    wish->prompt_logprobs = want->prompt_logprobs || want->prompt_candidates;
    wish->no_text = !want->text;
    wish->keep_special = r && r->_skip_special_tokens_case == VLLM__RESPONSE_OPTIONS___SKIP_SPECIAL_TOKENS_SKIP_SPECIAL_TOKENS &&
                         !r->skip_special_tokens;
    if (m->kv) {
        wish->bypass_prefix_cache = m->kv->bypass_prefix_cache;
        wish->cache_salt = m->kv->cache_salt[0] ? m->kv->cache_salt : NULL;
    }
    return REFUSAL_NONE;
}

static void generate(rpc_call *call, const ProtobufCMessage *message, bool whole)
{
    const Vllm__GenerateRequest *m = (const Vllm__GenerateRequest *)message;
    wish_room room = {0};
    request_wish wish;
    answer_wish want;
    refusal why = {0};
    if (inference_wish(m, &room, &wish, &want, &why) || generation_caller(call, m->session_id, &room, &wish, &why))
        door_refuse(call, &why);
    else if (whole && wish.n > 1)
        /* GenerateResponse has room for one sequence. */
        door_refuse(call,
                    (refuse(&why, REFUSAL_BAD,
                            "sampling.num_sequences: Generate answers with one sequence; %d come by GenerateStream", wish.n),
                     &why));
    else
        generation_begin(call, &wish, &inference_form, &want, whole);
    arena_clear(&room.memory);
}

void inference_generate(rpc_call *call, const ProtobufCMessage *message)
{
    generate(call, message, true);
}

void inference_stream(rpc_call *call, const ProtobufCMessage *message)
{
    generate(call, message, false);
}

/* ---- answer ---- */

/* What the arrays below need for n tokens with so many candidates in all. */
static size_t arrays_bytes(int n, int n_candidates)
{
    return ARENA_BYTES(n, sizeof(uint32_t)) * 3 +
           ARENA_BYTES(n, sizeof(Vllm__CandidateTokenInfo) + sizeof(Vllm__CandidateTokenInfo *)) +
           ARENA_BYTES(n_candidates,
                       sizeof(Vllm__CandidateTokenInfo__TokenInfo) + sizeof(Vllm__CandidateTokenInfo__TokenInfo *)) +
           64;
}

static uint32_t *ids_of(arena *a, const token_info *tokens, int n)
{
    uint32_t *ids = arena_take(a, (size_t)n, sizeof *ids);
    for (int i = 0; i < n; i++)
        ids[i] = (uint32_t)tokens[i].token;
    return ids;
}

static float *logprobs_of(arena *a, const token_info *tokens, int n)
{
    float *logprobs = arena_take(a, (size_t)n, sizeof *logprobs);
    for (int i = 0; i < n; i++)
        logprobs[i] = tokens[i].rank ? tokens[i].logprob : 0;
    return logprobs;
}

static uint32_t *ranks_of(arena *a, const token_info *tokens, int n)
{
    uint32_t *ranks = arena_take(a, (size_t)n, sizeof *ranks);
    for (int i = 0; i < n; i++)
        ranks[i] = (uint32_t)tokens[i].rank;
    return ranks;
}

static Vllm__CandidateTokenInfo **candidates_of(arena *a, const token_info *candidates, const int *counts, int n)
{
    Vllm__CandidateTokenInfo **list = arena_take(a, (size_t)n, sizeof *list);
    Vllm__CandidateTokenInfo *infos = arena_take(a, (size_t)n, sizeof *infos);
    int n_all = 0;
    for (int i = 0; i < n; i++)
        n_all += counts[i];
    Vllm__CandidateTokenInfo__TokenInfo **token_list = arena_take(a, (size_t)n_all, sizeof *token_list);
    Vllm__CandidateTokenInfo__TokenInfo *tokens = arena_take(a, (size_t)n_all, sizeof *tokens);
    for (int i = 0; i < n_all; i++) {
        vllm__candidate_token_info__token_info__init(&tokens[i]);
        tokens[i].id = (uint32_t)candidates[i].token;
        tokens[i].logprob = candidates[i].logprob;
        tokens[i].rank = (uint32_t)candidates[i].rank;
        token_list[i] = &tokens[i];
    }
    for (int i = 0, at = 0; i < n; at += counts[i++]) {
        vllm__candidate_token_info__init(&infos[i]);
        infos[i].n_tokens = (size_t)counts[i];
        infos[i].tokens = token_list + at;
        list[i] = &infos[i];
    }
    return list;
}

static void fill_prompt(generation *g, const output_piece *p, Vllm__PromptInfo *m)
{
    int n = g->n_prompt;
    m->num_prompt_tokens = (uint32_t)n;
    if (g->want.prompt_ids) {
        m->n_token_ids = (size_t)n;
        m->token_ids = (uint32_t *)request_prompt(g->request); /* packing only reads */
    }
    if (g->want.prompt_logprobs && p->prompt) {
        m->n_logprobs = m->n_ranks = (size_t)n;
        m->logprobs = logprobs_of(&g->memory, p->prompt, n);
        m->ranks = ranks_of(&g->memory, p->prompt, n);
    }
    if (g->want.prompt_candidates && p->candidates_of_prompt) {
        m->n_candidate_tokens = (size_t)n;
        m->candidate_tokens = candidates_of(&g->memory, p->prompt_candidates, p->candidates_of_prompt, n);
    }
}

static void fill_finish(const output_piece *p, Vllm__FinishInfo *m)
{
    m->num_output_tokens = (uint32_t)p->n_output;
    m->finish_reason = VLLM__FINISH_INFO__FINISH_REASON__STOP;
    switch (p->finish) {
    case FINISH_LENGTH:
        m->finish_reason = VLLM__FINISH_INFO__FINISH_REASON__LENGTH;
        break;
    case FINISH_STOP_TOKEN:
        m->stop_reason_case = VLLM__FINISH_INFO__STOP_REASON_STOP_TOKEN_ID;
        m->stop_token_id = (uint32_t)p->stop_token;
        break;
    case FINISH_EOS:
        m->stop_reason_case = VLLM__FINISH_INFO__STOP_REASON_EOS_TOKEN_ID;
        m->eos_token_id = (uint32_t)p->stop_token;
        break;
    case FINISH_STOP_STRING:
        m->stop_reason_case = VLLM__FINISH_INFO__STOP_REASON_STOP_STRING;
        m->stop_string = (char *)p->stop_string;
        break;
    default:
        m->finish_reason = VLLM__FINISH_INFO__FINISH_REASON__ABORTED;
    }
}

static void fill_output(generation *g, const output_piece *p, Vllm__SequenceOutput *m)
{
    int n = p->n_tokens;
    m->index = (uint32_t)p->sequence;
    m->num_tokens = (uint32_t)n;
    if (g->want.text)
        m->text = (ProtobufCBinaryData){p->text_size, (uint8_t *)p->text};
    if (g->want.token_ids) {
        m->n_token_ids = (size_t)n;
        m->token_ids = ids_of(&g->memory, p->tokens, n);
    }
    if (g->want.logprobs) {
        m->n_logprobs = m->n_ranks = (size_t)n;
        m->logprobs = logprobs_of(&g->memory, p->tokens, n);
        m->ranks = ranks_of(&g->memory, p->tokens, n);
    }
    if (g->want.candidates && p->candidates_of_token) {
        m->n_candidate_tokens = (size_t)n;
        m->candidate_tokens = candidates_of(&g->memory, p->candidates, p->candidates_of_token, n);
    }
}

static size_t count_candidates(const int *counts, int n)
{
    size_t total = 0;
    for (int i = 0; counts && i < n; i++)
        total += (size_t)counts[i];
    return total;
}

static bool say(generation *g, const output_piece *p, bool last)
{
    Vllm__GenerateResponse m = VLLM__GENERATE_RESPONSE__INIT;
    Vllm__PromptInfo prompt = VLLM__PROMPT_INFO__INIT;
    Vllm__SequenceOutput output = VLLM__SEQUENCE_OUTPUT__INIT;
    Vllm__FinishInfo finish = VLLM__FINISH_INFO__INIT;
    size_t bytes = arrays_bytes(p->n_tokens, (int)count_candidates(p->candidates_of_token, p->n_tokens));
    if (p->has_prompt)
        bytes += arrays_bytes(g->n_prompt, (int)count_candidates(p->candidates_of_prompt, g->n_prompt));
    if (!arena_reserve(&g->memory, bytes)) {
        rpc_call_finish(g->call, RPC_RESOURCE_EXHAUSTED, "out of memory for the answer");
        return true;
    }
    if (p->has_prompt) {
        fill_prompt(g, p, &prompt);
        m._prompt_info_case = VLLM__GENERATE_RESPONSE___PROMPT_INFO_PROMPT_INFO;
        m.prompt_info = &prompt;
    }
    if (p->finish != FINISH_NONE) {
        fill_finish(p, &finish);
        output._finish_info_case = VLLM__SEQUENCE_OUTPUT___FINISH_INFO_FINISH_INFO;
        output.finish_info = &finish;
    }
    if (p->n_tokens || (p->text_size && g->want.text) || p->finish != FINISH_NONE) {
        fill_output(g, p, &output);
        m.outputs = &output;
    } else if (!p->has_prompt) {
        return false;
    }
    generation_send(g, &m.base, last);
    return true;
}

const answer_form inference_form = {.finish_apart = false, .whole_prompt = false, .say = say};
