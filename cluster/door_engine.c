/* door_engine.c - vllm.grpc.engine.VllmEngine, which the smg gateway speaks: tokens in, tokens out. */
#include "cluster/bundle.h"
#include "cluster/door_internal.h"
#include "proto/json.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef Vllm__Grpc__Engine__GenerateRequest engine_request;
typedef Vllm__Grpc__Engine__SamplingParams engine_sampling;

/* ---- Generate: request ---- */

static refusal_kind refuse_unserved(const engine_request *m, refusal *why)
{
    static const struct {
        Vllm__Grpc__Engine__SamplingParams__ConstraintCase kind;
        const char *name;
    } constraints[] = {
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_SCHEMA, "json_schema"},
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_REGEX, "regex"},
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_GRAMMAR, "grammar"},
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_STRUCTURAL_TAG, "structural_tag"},
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_OBJECT, "json_object"},
        {VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_CHOICE, "choice"},
    };
    const char *field = m->kv_transfer_params                                         ? "kv_transfer_params"
                        : m->kv_transfer_params_json && m->kv_transfer_params_json[0] ? "kv_transfer_params_json"
                        : m->mm_inputs                                                ? "mm_inputs"
                        : m->n_extra_mm_inputs                                        ? "extra_mm_inputs"
                        : m->media_refs                                               ? "media_refs"
                                                                                      : NULL;
    if (field)
        return refuse(why, REFUSAL_UNSUPPORTED, "%s: is not served", field);
    const engine_sampling *s = m->sampling_params;
    for (size_t i = 0; s && i < sizeof constraints / sizeof constraints[0]; i++)
        if (s->constraint_case == constraints[i].kind &&
            (s->constraint_case != VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_OBJECT || s->json_object))
            return refuse(why, REFUSAL_UNSUPPORTED, "sampling_params.%s: structured output is not served", constraints[i].name);
    return REFUSAL_NONE;
}

static refusal_kind take_input(const engine_request *m, request_wish *wish, refusal *why)
{
    switch (m->input_case) {
    case VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TEXT:
        wish->has_text = wish->add_special = true;
        wish->text = m->text.len ? (const char *)m->text.data : "";
        wish->text_size = m->text.len;
        return REFUSAL_NONE;
    case VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED:
        return door_ids("tokenized.input_ids", m->tokenized->input_ids, m->tokenized->n_input_ids, &wish->ids, &wish->n_ids, why);
    default:
        return refuse(why, REFUSAL_BAD, "input: there is neither tokenized nor text");
    }
}

/* -1: all; 0: the token's own logprob alone; else so many candidates. */
static refusal_kind take_logprobs(const char *name, int32_t n, candidates_wish *wish, refusal *why)
{
    if (n < -1)
        return refuse(why, REFUSAL_BAD, "sampling_params.%s: %d is neither a count nor -1", name, n);
    wish->all = n == -1;
    wish->top_n = n > 0 ? n : 0;
    return REFUSAL_NONE;
}

static refusal_kind take_biases(const engine_sampling *m, wish_room *room, request_wish *wish, refusal *why)
{
    if (!arena_reserve(&room->memory, ARENA_BYTES(m->n_logit_bias, sizeof(bias_wish))))
        return refuse(why, REFUSAL_INTERNAL, "out of memory");
    bias_wish *biases = arena_take(&room->memory, m->n_logit_bias, sizeof *biases);
    for (size_t i = 0; i < m->n_logit_bias; i++) {
        if (m->logit_bias[i]->key < 0)
            return refuse(why, REFUSAL_BAD, "sampling_params.logit_bias: %d is no token id", m->logit_bias[i]->key);
        biases[i] = (bias_wish){m->logit_bias[i]->key, m->logit_bias[i]->value};
    }
    wish->biases = biases;
    wish->n_biases = door_count(m->n_logit_bias);
    return REFUSAL_NONE;
}

static refusal_kind take_limits(const engine_sampling *m, int max_length, request_wish *wish, refusal *why)
{
    if (m->_max_tokens_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___MAX_TOKENS_MAX_TOKENS) {
        if (m->max_tokens == 0)
            return refuse(why, REFUSAL_BAD, "sampling_params.max_tokens: must be at least 1");
        wish->max_new = door_count(m->max_tokens);
    }
    if (m->_truncate_prompt_tokens_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___TRUNCATE_PROMPT_TOKENS_TRUNCATE_PROMPT_TOKENS) {
        if (m->truncate_prompt_tokens < -1 || m->truncate_prompt_tokens == 0)
            return refuse(why, REFUSAL_BAD, "sampling_params.truncate_prompt_tokens: %d is neither a count nor -1",
                          m->truncate_prompt_tokens);
        wish->truncate_prompt = m->truncate_prompt_tokens > 0 ? m->truncate_prompt_tokens : max_length > 1 ? max_length - 1 : 1;
    }
    wish->min_new = door_count(m->min_tokens);
    return REFUSAL_NONE;
}

static refusal_kind take_sampling(const engine_sampling *m, int max_length, wish_room *room, request_wish *wish,
                                  answer_wish *want, refusal *why)
{
    if (!m)
        return REFUSAL_NONE;
    want->logprobs = m->_logprobs_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___LOGPROBS_LOGPROBS;
    want->prompt_logprobs = m->_prompt_logprobs_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___PROMPT_LOGPROBS_PROMPT_LOGPROBS;
    if (take_limits(m, max_length, wish, why) || take_biases(m, room, wish, why) ||
        door_ids("sampling_params.stop_token_ids", m->stop_token_ids, m->n_stop_token_ids, &wish->stop_ids, &wish->n_stop_ids,
                 why) ||
        (want->logprobs && take_logprobs("logprobs", m->logprobs, &wish->output_candidates, why)) ||
        (want->prompt_logprobs && take_logprobs("prompt_logprobs", m->prompt_logprobs, &wish->prompt_candidates, why)))
        return why->kind;
    want->candidates = wish->output_candidates.all || wish->output_candidates.top_n;
    want->prompt_candidates = wish->prompt_candidates.all || wish->prompt_candidates.top_n;
    wish->prompt_logprobs = want->prompt_logprobs;
    wish->has_temperature = m->_temperature_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___TEMPERATURE_TEMPERATURE;
    wish->temperature = m->temperature;
    wish->has_top_p = m->top_p != 0;
    wish->top_p = m->top_p;
    wish->has_top_k = m->top_k != 0;
    wish->top_k = door_count(m->top_k);
    wish->min_p = m->min_p;
    wish->has_seed = m->_seed_case == VLLM__GRPC__ENGINE__SAMPLING_PARAMS___SEED_SEED;
    wish->seed = (uint64_t)(int64_t)m->seed;
    wish->frequency_penalty = m->frequency_penalty;
    wish->presence_penalty = m->presence_penalty;
    wish->repetition_penalty = m->repetition_penalty;
    wish->stops = (const char *const *)m->stop;
    wish->n_stops = door_count(m->n_stop);
    wish->include_stop = m->include_stop_str_in_output;
    wish->ignore_eos = m->ignore_eos;
    wish->n = door_count(m->n);
    return REFUSAL_NONE;
}

refusal_kind engine_wish(const engine_request *m, int max_length, wish_room *room, request_wish *wish, answer_wish *want,
                         refusal *why)
{
    *wish = (request_wish){.id = m->request_id, .owner = -1, .no_text = true};
    *want = (answer_wish){.token_ids = true};
    if (m->_data_parallel_rank_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST___DATA_PARALLEL_RANK_DATA_PARALLEL_RANK) {
        if (m->data_parallel_rank < 0)
            return refuse(why, REFUSAL_BAD, "data_parallel_rank: %d is no rank", m->data_parallel_rank);
        wish->owner = m->data_parallel_rank;
    }
    if (refuse_unserved(m, why) || take_input(m, wish, why))
        return why->kind;
    return take_sampling(m->sampling_params, max_length, room, wish, want, why);
}

void engine_generate(rpc_call *call, const ProtobufCMessage *message)
{
    const engine_request *m = (const engine_request *)message;
    coordinator_info info;
    wish_room room = {0};
    request_wish wish;
    answer_wish want;
    refusal why = {0};
    coordinator_get_info(door_of(call)->c, &info);
    if (engine_wish(m, info.max_length, &room, &wish, &want, &why) || generation_caller(call, NULL, &room, &wish, &why))
        door_refuse(call, &why);
    else
        generation_begin(call, &wish, &engine_form, &want, !m->stream);
    arena_clear(&room.memory);
}

/* ---- Generate: answer ---- */

typedef Vllm__Grpc__Engine__TopLogProbs engine_top;

static size_t tops_bytes(const int *counts, int n)
{
    size_t total = 0;
    for (int i = 0; counts && i < n; i++)
        total += (size_t)counts[i];
    return ARENA_BYTES(n, sizeof(engine_top) + sizeof(engine_top *)) + ARENA_BYTES(total, sizeof(float) + sizeof(uint32_t)) + 64;
}

static engine_top **tops_of(arena *a, const token_info *candidates, const int *counts, int n)
{
    engine_top **list = arena_take(a, (size_t)n, sizeof *list);
    engine_top *tops = arena_take(a, (size_t)n, sizeof *tops);
    int total = 0;
    for (int i = 0; i < n; i++)
        total += counts[i];
    float *values = arena_take(a, (size_t)total, sizeof *values);
    uint32_t *ids = arena_take(a, (size_t)total, sizeof *ids);
    for (int i = 0; i < total; i++) {
        values[i] = candidates[i].logprob;
        ids[i] = (uint32_t)candidates[i].token;
    }
    for (int i = 0, at = 0; i < n; at += counts[i++]) {
        vllm__grpc__engine__top_log_probs__init(&tops[i]);
        tops[i].n_values = tops[i].n_token_ids = (size_t)counts[i];
        tops[i].values = values + at;
        tops[i].token_ids = ids + at;
        list[i] = &tops[i];
    }
    return list;
}

static uint32_t *ids_of(arena *a, const token_info *tokens, int n)
{
    uint32_t *ids = arena_take(a, (size_t)n, sizeof *ids);
    for (int i = 0; i < n; i++)
        ids[i] = (uint32_t)tokens[i].token;
    return ids;
}

static void fill_output_logprobs(generation *g, const output_piece *p, Vllm__Grpc__Engine__OutputLogProbs *m)
{
    size_t n = (size_t)p->n_tokens;
    m->n_token_logprobs = m->n_token_ids = n;
    m->token_logprobs = arena_take(&g->memory, n, sizeof *m->token_logprobs);
    for (size_t i = 0; i < n; i++)
        m->token_logprobs[i] = p->tokens[i].logprob;
    m->token_ids = ids_of(&g->memory, p->tokens, p->n_tokens);
    if (g->want.candidates && p->candidates_of_token) {
        m->n_top_logprobs = n;
        m->top_logprobs = tops_of(&g->memory, p->candidates, p->candidates_of_token, p->n_tokens);
    }
}

static void fill_input_logprobs(generation *g, const output_piece *p, Vllm__Grpc__Engine__InputLogProbs *m)
{
    size_t n = (size_t)g->n_prompt;
    Vllm__Grpc__Engine__InputTokenLogProb *values = arena_take(&g->memory, n, sizeof *values);
    m->token_logprobs = arena_take(&g->memory, n, sizeof *m->token_logprobs);
    for (size_t i = 0; i < n; i++) {
        vllm__grpc__engine__input_token_log_prob__init(&values[i]);
        if (p->prompt[i].rank) { /* the first token has none */
            values[i]._value_case = VLLM__GRPC__ENGINE__INPUT_TOKEN_LOG_PROB___VALUE_VALUE;
            values[i].value = p->prompt[i].logprob;
        }
        m->token_logprobs[i] = &values[i];
    }
    m->n_token_logprobs = m->n_token_ids = n;
    m->token_ids = (uint32_t *)request_prompt(g->request); /* packing only reads */
    if (g->want.prompt_candidates && p->candidates_of_prompt) {
        m->n_top_logprobs = n;
        m->top_logprobs = tops_of(&g->memory, p->prompt_candidates, p->candidates_of_prompt, g->n_prompt);
    }
}

static const char *finish_word(finish_kind finish)
{
    return finish == FINISH_LENGTH ? "length" : finish == FINISH_ABORTED ? "abort" : "stop";
}

static void fill_complete(generation *g, const output_piece *p, Vllm__Grpc__Engine__GenerateComplete *m)
{
    if (g->whole) {
        m->n_output_ids = (size_t)p->n_tokens;
        m->output_ids = ids_of(&g->memory, p->tokens, p->n_tokens);
    } else {
        int n;
        m->output_ids = (uint32_t *)generation_ids(g, p->sequence, &n); /* packing only reads */
        m->n_output_ids = (size_t)n;
    }
    m->finish_reason = (char *)finish_word(p->finish);
    m->prompt_tokens = (uint32_t)g->n_prompt;
    m->completion_tokens = (uint32_t)m->n_output_ids;
    m->cached_tokens = (uint32_t)g->n_cached;
    m->index = (uint32_t)p->sequence;
    /* Only what the request itself named: the model's own end of text is no matched stop. */
    if (p->finish == FINISH_STOP_TOKEN) {
        m->matched_stop_case = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_TOKEN_ID;
        m->matched_token_id = (uint32_t)p->stop_token;
    } else if (p->finish == FINISH_STOP_STRING) {
        m->matched_stop_case = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_STOP_STR;
        m->matched_stop_str = (char *)p->stop_string;
    }
}

static void fill_chunk(generation *g, const output_piece *p, Vllm__Grpc__Engine__GenerateStreamChunk *m)
{
    m->n_token_ids = (size_t)p->n_tokens;
    m->token_ids = ids_of(&g->memory, p->tokens, p->n_tokens);
    m->prompt_tokens = (uint32_t)g->n_prompt;
    m->completion_tokens = (uint32_t)p->n_tokens;
    m->cached_tokens = (uint32_t)g->n_cached;
    m->index = (uint32_t)p->sequence;
}

static bool say(generation *g, const output_piece *p, bool last)
{
    Vllm__Grpc__Engine__GenerateResponse m = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__INIT;
    Vllm__Grpc__Engine__GenerateStreamChunk chunk = VLLM__GRPC__ENGINE__GENERATE_STREAM_CHUNK__INIT;
    Vllm__Grpc__Engine__GenerateComplete complete = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__INIT;
    Vllm__Grpc__Engine__OutputLogProbs out = VLLM__GRPC__ENGINE__OUTPUT_LOG_PROBS__INIT;
    Vllm__Grpc__Engine__InputLogProbs in = VLLM__GRPC__ENGINE__INPUT_LOG_PROBS__INIT;
    bool has_in = g->want.prompt_logprobs && p->has_prompt && p->prompt, has_out = g->want.logprobs && p->n_tokens > 0;
    if (p->finish == FINISH_NONE && p->n_tokens == 0 && !has_in)
        return false; /* text, or the prompt's length, which every message has */
    size_t bytes = 2 * ARENA_BYTES(p->n_tokens, sizeof(uint32_t)) + ARENA_BYTES(p->n_tokens, sizeof(float)) +
                   tops_bytes(p->candidates_of_token, p->n_tokens);
    if (has_in)
        bytes += ARENA_BYTES(g->n_prompt, sizeof(Vllm__Grpc__Engine__InputTokenLogProb) + sizeof(void *)) + 16 +
                 tops_bytes(p->candidates_of_prompt, g->n_prompt);
    if (!arena_reserve(&g->memory, bytes)) {
        rpc_call_finish(g->call, RPC_RESOURCE_EXHAUSTED, "out of memory for the answer");
        return true;
    }
    if (has_out)
        fill_output_logprobs(g, p, &out);
    if (has_in)
        fill_input_logprobs(g, p, &in);
    if (p->finish != FINISH_NONE) {
        fill_complete(g, p, &complete);
        complete.output_logprobs = has_out ? &out : NULL;
        complete.input_logprobs = has_in ? &in : NULL;
        m.response_case = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__RESPONSE_COMPLETE;
        m.complete = &complete;
    } else {
        fill_chunk(g, p, &chunk);
        chunk.output_logprobs = has_out ? &out : NULL;
        chunk.input_logprobs = has_in ? &in : NULL;
        m.response_case = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__RESPONSE_CHUNK;
        m.chunk = &chunk;
    }
    generation_send(g, &m.base, last);
    return true;
}

const answer_form engine_form = {.finish_apart = true, .whole_prompt = true, .say = say};

/* ---- the rest ---- */

void engine_health(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    static const char *const words[] = {"starting", "serving", "restarting the workers", "draining", "given up", "stopped"};
    Vllm__Grpc__Engine__HealthCheckResponse m = VLLM__GRPC__ENGINE__HEALTH_CHECK_RESPONSE__INIT;
    serving_state state = coordinator_state(door_of(call)->c);
    m.healthy = state == SERVING_READY;
    m.message = (char *)words[state];
    rpc_call_reply(call, &m.base);
}

void engine_abort(rpc_call *call, const ProtobufCMessage *message)
{
    const Vllm__Grpc__Engine__AbortRequest *asked = (const Vllm__Grpc__Engine__AbortRequest *)message;
    Vllm__Grpc__Engine__AbortResponse m = VLLM__GRPC__ENGINE__ABORT_RESPONSE__INIT;
    for (size_t i = 0; i < asked->n_request_ids; i++)
        requests_abort(door_of(call)->all, asked->request_ids[i]);
    rpc_call_reply(call, &m.base);
}

/* A checkpoint's JSON file; NULL when there is none that can be read: what it would say is then left out. */
static cJSON *read_config(const char *dir, const char *name)
{
    char path[4200];
    cJSON *json = NULL;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return json_read_file(path, 1 << 20, &json) == STATUS_OK ? json : NULL;
}

static int32_t config_int(const cJSON *config, const char *key)
{
    int64_t value = 0;
    if (config && json_get_int_or(config, "config.json", key, 0, INT32_MAX, 0, &value) != STATUS_OK)
        value = 0;
    return (int32_t)value;
}

/* generation_config.json's sampling defaults, as the protocol has them: one JSON object in a string; "": none. */
static char *sampling_defaults(const char *dir)
{
    static const char *const keys[] = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"};
    cJSON *config = read_config(dir, "generation_config.json"), *kept = cJSON_CreateObject();
    char *text = NULL;
    for (size_t i = 0; config && kept && i < sizeof keys / sizeof keys[0]; i++) {
        const cJSON *value = json_find(config, keys[i]);
        if (cJSON_IsNumber(value))
            cJSON_AddItemToObject(kept, keys[i], cJSON_Duplicate(value, false));
    }
    if (kept && kept->child)
        text = cJSON_PrintUnformatted(kept);
    cJSON_Delete(config);
    cJSON_Delete(kept);
    return text;
}

void engine_model(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    enum { MAX_ARCHITECTURES = 8 };
    coordinator_info info;
    Vllm__Grpc__Engine__GetModelInfoResponse m = VLLM__GRPC__ENGINE__GET_MODEL_INFO_RESPONSE__INIT;
    char *architectures[MAX_ARCHITECTURES];
    coordinator_get_info(door_of(call)->c, &info);
    cJSON *config = read_config(info.model_dir, "config.json");
    char *defaults = sampling_defaults(info.model_dir);
    m.model_path = m.tokenizer_path = (char *)info.model_dir;
    if (!coordinator_tokenizer(door_of(call)->c))
        m.tokenizer_path = "";
    m.served_model_name = (char *)info.model_name;
    m.is_generation = true;
    m.max_context_length = (uint32_t)info.max_length;
    m.max_req_input_len = info.max_length > 0 ? info.max_length - 1 : 0;
    m.vocab_size = (uint32_t)info.vocab;
    m.n_eos_token_ids = (size_t)info.n_eos;
    m.eos_token_ids = (int32_t *)info.eos_ids; /* packing only reads */
    m.pad_token_id = config_int(config, "pad_token_id");
    m.bos_token_id = config_int(config, "bos_token_id");
    const cJSON *type = config ? json_find(config, "model_type") : NULL,
                *list = config ? json_find(config, "architectures") : NULL, *item;
    if (cJSON_IsString(type))
        m.model_type = type->valuestring;
    m.architectures = architectures;
    cJSON_ArrayForEach(item, list) if (cJSON_IsString(item) && m.n_architectures < MAX_ARCHITECTURES)
        architectures[m.n_architectures++] = item->valuestring;
    if (defaults)
        m.default_sampling_params_json = defaults;
    rpc_call_reply(call, &m.base);
    cJSON_free(defaults);
    cJSON_Delete(config);
}

void engine_server(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    struct timespec now;
    coordinator_info info;
    coordinator_load load;
    Vllm__Grpc__Engine__GetServerInfoResponse m = VLLM__GRPC__ENGINE__GET_SERVER_INFO_RESPONSE__INIT;
    coordinator_get_info(door_of(call)->c, &info);
    coordinator_get_load(door_of(call)->c, &load);
    clock_gettime(CLOCK_REALTIME, &now);
    double seconds = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    m.active_requests = (uint32_t)(load.n_running + load.n_waiting);
    m.is_paused = coordinator_is_paused(door_of(call)->c);
    m.last_receive_timestamp = seconds; /* this call */
    m.uptime_seconds = seconds - info.started;
    m.server_type = "convoke";
    m.data_parallel_size = info.n_ranks;
    m.block_size = info.kv_block;
    m.max_num_seqs = info.max_running;
    rpc_call_reply(call, &m.base);
}

void engine_loads(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    struct timespec now;
    struct tm utc;
    char date[24], timestamp[64];
    coordinator_info info;
    coordinator_load load;
    Vllm__Grpc__Engine__GetLoadsResponse m = VLLM__GRPC__ENGINE__GET_LOADS_RESPONSE__INIT;
    Vllm__Grpc__Engine__SchedulerLoad all = VLLM__GRPC__ENGINE__SCHEDULER_LOAD__INIT, *list = &all;
    coordinator_get_info(door_of(call)->c, &info);
    coordinator_get_load(door_of(call)->c, &load);
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(timestamp, sizeof timestamp, "%s.%06ld+00:00", date, now.tv_nsec / 1000);
    m.timestamp = timestamp;
    m.version = (char *)CONVOKE_VERSION;
    /* One scheduler fills the ranks: one load, which is that of all of them. */
    m.dp_rank_count = 1;
    m.n_loads = 1;
    m.loads = &list;
    all.num_running_reqs = load.n_running;
    all.num_waiting_reqs = load.n_waiting;
    all.num_total_reqs = load.n_running + load.n_waiting;
    all.num_used_tokens = door_count(load.kv_tokens_used);
    all.max_total_num_tokens = door_count(load.kv_tokens);
    all.token_usage = load.kv_usage;
    all.gen_throughput = load.generated_per_second;
    all.cache_hit_rate = load.prefix_queries ? (double)load.prefix_hits / (double)load.prefix_queries : 0;
    all.utilization = info.max_running ? (double)load.n_running / info.max_running : 0;
    all.max_running_requests = info.max_running;
    rpc_call_reply(call, &m.base);
}

/* ---- GetTokenizer ---- */

typedef struct {
    bytes_writer zip;
    size_t sent;
    char sha256[65];
} tokenizer_files;

void engine_tokenizer(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    tokenizer_files *t = calloc(1, sizeof *t);
    rpc_call_set_state(call, t);
    if (!t) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    status st = bundle_tokenizer(coordinator_model_dir(door_of(call)->c), &t->zip);
    if (st != STATUS_OK)
        rpc_call_finish(call, st == STATUS_BAD_INPUT ? RPC_NOT_FOUND : RPC_INTERNAL, status_message());
    else
        sha256_hex(t->zip.data, t->zip.size, t->sha256);
}

void engine_tokenizer_pump(rpc_call *call)
{
    enum { CHUNK = 64 * 1024 };
    tokenizer_files *t = rpc_call_state(call);
    Smg__Grpc__Common__GetTokenizerChunk m = SMG__GRPC__COMMON__GET_TOKENIZER_CHUNK__INIT;
    size_t left = t->zip.size - t->sent;
    m.data.data = t->zip.data + t->sent;
    m.data.len = left < CHUNK ? left : CHUNK;
    t->sent += m.data.len;
    if (t->sent < t->zip.size) {
        rpc_call_send(call, &m.base);
    } else {
        m.sha256 = t->sha256;
        rpc_call_reply(call, &m.base);
    }
}

void engine_tokenizer_end(rpc_call *call)
{
    tokenizer_files *t = rpc_call_state(call);
    if (t)
        bytes_clear(&t->zip);
    free(t);
}
