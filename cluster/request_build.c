/* request_build.c - from what a client asks to what the workers are told: defaults filled in, limits checked, every refusal a
 * sentence with the field and the numbers. */
#include "cluster/requests_internal.h"

#include "proto/clock.h"
#include "proto/hash.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { MAX_ID_BYTES = 127, MAX_STOPS = 64, MAX_STOP_BYTES = 1024, MAX_CANDIDATE_BYTES = 1 << 30 };

refusal_kind refuse(refusal *r, refusal_kind kind, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    r->kind = kind;
    r->retry_ms = 0;
    vsnprintf(r->sentence, sizeof r->sentence, format, arguments);
    va_end(arguments);
    return kind;
}

#define TRY_REFUSE(call)                                                                                                         \
    do {                                                                                                                         \
        refusal_kind kind_ = (call);                                                                                             \
        if (kind_ != REFUSAL_NONE)                                                                                               \
            return kind_;                                                                                                        \
    } while (0)

static refusal_kind no_memory(refusal *why)
{
    return refuse(why, REFUSAL_INTERNAL, "no memory for the request");
}

/* ---- checks -------------------------------------------------------------------------------------------------------------- */

static refusal_kind check_model(const requests *all, const char *model, refusal *why)
{
    if (!model || !*model)
        return REFUSAL_NONE;
    for (int i = 0; i < all->options.n_model_names; i++)
        if (strcmp(model, all->options.model_names[i]) == 0)
            return REFUSAL_NONE;
    return refuse(why, REFUSAL_NOT_FOUND, "model: \"%.100s\" is not served here; \"%s\" is", model, all->options.model_names[0]);
}

static refusal_kind check_range(const char *field, float value, float low, float high, refusal *why)
{
    if (value >= low && value <= high)
        return REFUSAL_NONE;
    return refuse(why, REFUSAL_BAD, "%s: %g is not in [%g, %g]", field, (double)value, (double)low, (double)high);
}

static refusal_kind check_ids(const char *field, const int32_t *ids, int n, int vocab, refusal *why)
{
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return refuse(why, REFUSAL_BAD, "%s: token %d is %d, outside the vocabulary of %d", field, i, ids[i], vocab);
    return REFUSAL_NONE;
}

/* A list of token ids that may be long, but never needs to be longer than the vocabulary. */
static refusal_kind check_list(const char *field, const int32_t *ids, int n, int vocab, refusal *why)
{
    if (n > vocab)
        return refuse(why, REFUSAL_BAD, "%s: %d tokens of a vocabulary of %d", field, n, vocab);
    return check_ids(field, ids, n, vocab, why);
}

static refusal_kind check_candidates(const char *field, const candidates_wish *c, int vocab, refusal *why)
{
    if (c->top_n < 0 || c->top_n > vocab)
        return refuse(why, REFUSAL_BAD, "%s: the top %d of a vocabulary of %d", field, c->top_n, vocab);
    return check_list(field, c->ids, c->n_ids, vocab, why);
}

/* What is asked for each token is kept until the request is forgotten. */
static refusal_kind check_candidate_bytes(const char *field, const candidates_wish *c, int vocab, double n_tokens, refusal *why)
{
    int n = c->all ? vocab : c->top_n > c->n_ids ? c->top_n : c->n_ids;
    double bytes = n_tokens * n * (double)sizeof(token_info);
    if (bytes <= MAX_CANDIDATE_BYTES)
        return REFUSAL_NONE;
    return refuse(why, REFUSAL_TOO_LARGE, "%s: %.0f tokens with %d each need %.0f MiB; a request may have %d", field, n_tokens, n,
                  bytes / (1 << 20), (int)(MAX_CANDIDATE_BYTES >> 20));
}

static refusal_kind check_sampling(int vocab, const request_wish *w, refusal *why)
{
    if (w->has_temperature)
        TRY_REFUSE(check_range("temperature", w->temperature, 0, 100, why));
    if (w->has_top_p)
        TRY_REFUSE(check_range("top_p", w->top_p, 0, 1, why));
    if (w->has_top_k && w->top_k < -1)
        return refuse(why, REFUSAL_BAD, "top_k: %d is below -1", w->top_k);
    TRY_REFUSE(check_range("min_p", w->min_p, 0, 1, why));
    TRY_REFUSE(check_range("presence_penalty", w->presence_penalty, -2, 2, why));
    TRY_REFUSE(check_range("frequency_penalty", w->frequency_penalty, -2, 2, why));
    TRY_REFUSE(check_range("repetition_penalty", w->repetition_penalty, 0, 1000, why));
    if (w->n_biases > vocab)
        return refuse(why, REFUSAL_BAD, "logit_bias: %d tokens of a vocabulary of %d", w->n_biases, vocab);
    for (int i = 0; i < w->n_biases; i++) {
        TRY_REFUSE(check_ids("logit_bias", &w->biases[i].token, 1, vocab, why));
        TRY_REFUSE(check_range("logit_bias", w->biases[i].bias, -100, 100, why));
    }
    TRY_REFUSE(check_list("allowed_token_ids", w->allowed, w->n_allowed, vocab, why));
    TRY_REFUSE(check_list("stop_token_ids", w->stop_ids, w->n_stop_ids, vocab, why));
    TRY_REFUSE(check_candidates("prompt candidates", &w->prompt_candidates, vocab, why));
    return check_candidates("output candidates", &w->output_candidates, vocab, why);
}

static refusal_kind check_shape(const requests *all, const request_wish *w, refusal *why)
{
    if (w->id && strlen(w->id) > MAX_ID_BYTES)
        return refuse(why, REFUSAL_BAD, "request_id: %zu bytes, at most %d are allowed", strlen(w->id), MAX_ID_BYTES);
    for (const char *c = w->id; c && *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) /* ids stand in logs */
            return refuse(why, REFUSAL_BAD, "request_id: byte %d is a control character", (int)(c - w->id));
    if (w->n < 0 || w->n > all->options.max_sequences_of_request)
        return refuse(why, REFUSAL_BAD, "n: %d sequences, at most %d are allowed", w->n, all->options.max_sequences_of_request);
    if (w->max_new < 0 || w->min_new < 0 || w->truncate_prompt < 0)
        return refuse(why, REFUSAL_BAD, "max_tokens, min_tokens and truncate_prompt_tokens must not be negative");
    if (w->n_stops > MAX_STOPS)
        return refuse(why, REFUSAL_BAD, "stop: %d strings, at most %d are allowed", w->n_stops, MAX_STOPS);
    if (w->n_stops > 0 && !all->options.tokenizer)
        return refuse(why, REFUSAL_UNSUPPORTED, "stop strings need a tokenizer.json, which this model does not have");
    for (int i = 0; i < w->n_stops; i++)
        if (!*w->stops[i] || strlen(w->stops[i]) > MAX_STOP_BYTES)
            return refuse(why, REFUSAL_BAD, "stop: string %d has %zu bytes; 1 to %d are allowed", i, strlen(w->stops[i]),
                          MAX_STOP_BYTES);
    return REFUSAL_NONE;
}

static refusal_kind check_length(const requests_limits *l, int n_prompt, int max_new, int owner, refusal *why)
{
    if (n_prompt >= l->max_length)
        return refuse(why, REFUSAL_TOO_LARGE, "the prompt has %d tokens; with at least one new one this model takes %d", n_prompt,
                      l->max_length);
    if (max_new > l->max_length - n_prompt)
        return refuse(why, REFUSAL_TOO_LARGE, "%d prompt tokens and %d new ones are more than the %d a sequence may have",
                      n_prompt, max_new, l->max_length);
    int blocks = (n_prompt + max_new - 1 + l->kv_block - 1) / l->kv_block;
    if (blocks > l->largest_kv_blocks)
        return refuse(why, REFUSAL_TOO_LARGE, "%d prompt tokens and %d new ones need %d KV tokens; a rank has %d", n_prompt,
                      max_new, blocks * l->kv_block, l->largest_kv_blocks * l->kv_block);
    if (owner >= l->n_ranks)
        return refuse(why, REFUSAL_BAD, "data-parallel rank %d, but there are only %d", owner, l->n_ranks);
    return REFUSAL_NONE;
}

/* ---- the prompt ---------------------------------------------------------------------------------------------------------- */

static tokenizer_scratch *take_scratch(requests *all)
{
    tokenizer_scratch *s = NULL;
    pthread_mutex_lock(&all->scratch_lock);
    if (all->n_scratches > 0)
        s = all->scratches[--all->n_scratches];
    pthread_mutex_unlock(&all->scratch_lock);
    if (!s && tokenizer_scratch_create(all->options.tokenizer, &s) != STATUS_OK)
        return NULL;
    return s;
}

static void leave_scratch(requests *all, tokenizer_scratch *s)
{
    pthread_mutex_lock(&all->scratch_lock);
    if (all->n_scratches < (int)(sizeof all->scratches / sizeof *all->scratches)) {
        all->scratches[all->n_scratches++] = s;
        s = NULL;
    }
    pthread_mutex_unlock(&all->scratch_lock);
    tokenizer_scratch_destroy(s);
}

static refusal_kind copy_prompt(const int32_t *ids, size_t n, int keep, Convoke__Control__Sequence *s, refusal *why)
{
    size_t skip = keep > 0 && n > (size_t)keep ? n - (size_t)keep : 0;
    if (n - skip > INT32_MAX / 8)
        return refuse(why, REFUSAL_TOO_LARGE, "the prompt has %zu tokens", n);
    s->n_tokens = n - skip;
    s->tokens = malloc((n - skip + 1) * sizeof *s->tokens);
    if (!s->tokens)
        return no_memory(why);
    memcpy(s->tokens, ids + skip, (n - skip) * sizeof *ids);
    return n - skip == 0 ? refuse(why, REFUSAL_BAD, "the prompt is empty") : REFUSAL_NONE;
}

static refusal_kind build_prompt(requests *all, int vocab, const request_wish *w, Convoke__Control__Sequence *s, refusal *why)
{
    if (!w->has_text) {
        if (w->n_ids == 0)
            return refuse(why, REFUSAL_BAD, "the prompt is empty");
        TRY_REFUSE(copy_prompt(w->ids, (size_t)w->n_ids, w->truncate_prompt, s, why));
        return check_ids("prompt", s->tokens, (int)s->n_tokens, vocab, why);
    }
    if (!all->options.tokenizer)
        return refuse(why, REFUSAL_UNSUPPORTED, "a text prompt needs a tokenizer.json, which this model does not have");
    tokenizer_scratch *scratch = take_scratch(all);
    if (!scratch)
        return no_memory(why);
    const int32_t *ids;
    size_t n;
    refusal_kind kind = REFUSAL_NONE;
    if (tokenizer_encode(all->options.tokenizer, scratch, w->text, w->text_size, w->add_special, &ids, &n) != STATUS_OK)
        kind = refuse(why, REFUSAL_BAD, "prompt: %s", status_message());
    else
        kind = copy_prompt(ids, n, w->truncate_prompt, s, why);
    leave_scratch(all, scratch);
    TRY_REFUSE(kind);
    return check_ids("prompt (tokenizer.json has more tokens than the model)", s->tokens, (int)s->n_tokens, vocab, why);
}

/* ---- the rest ------------------------------------------------------------------------------------------------------------ */

static bool copy_ids(const int32_t *ids, int n, size_t *n_out, int32_t **out)
{
    if (n == 0)
        return true;
    *out = malloc((size_t)n * sizeof **out);
    if (!*out)
        return false;
    memcpy(*out, ids, (size_t)n * sizeof *ids);
    *n_out = (size_t)n;
    return true;
}

static bool copy_candidates(const candidates_wish *from, Convoke__Control__Candidates **out)
{
    if (from->top_n == 0 && from->n_ids == 0 && !from->all)
        return true;
    Convoke__Control__Candidates *c = malloc(sizeof *c);
    if (!c)
        return false;
    *c = (Convoke__Control__Candidates)CONVOKE__CONTROL__CANDIDATES__INIT;
    *out = c;
    c->top_n = (uint32_t)from->top_n;
    c->all = from->all;
    return copy_ids(from->ids, from->n_ids, &c->n_ids, (int32_t **)&c->ids);
}

static bool copy_biases(const request_wish *w, Convoke__Control__Sequence *s)
{
    if (w->n_biases == 0)
        return true;
    s->biases = calloc((size_t)w->n_biases, sizeof *s->biases);
    if (!s->biases)
        return false;
    for (int i = 0; i < w->n_biases; i++) {
        Convoke__Control__Bias *b = malloc(sizeof *b);
        if (!b)
            return false;
        *b = (Convoke__Control__Bias)CONVOKE__CONTROL__BIAS__INIT;
        b->token = (uint32_t)w->biases[i].token;
        b->bias = w->biases[i].bias;
        s->biases[i] = b;
        s->n_biases = (size_t)i + 1;
    }
    return true;
}

static bool copy_stops(const request_wish *w, Convoke__Journal__Request *spec)
{
    if (w->n_stops == 0)
        return true;
    spec->stops = calloc((size_t)w->n_stops, sizeof *spec->stops);
    if (!spec->stops)
        return false;
    for (int i = 0; i < w->n_stops; i++) {
        spec->stops[i] = strdup(w->stops[i]);
        if (!spec->stops[i])
            return false;
        spec->n_stops = (size_t)i + 1;
    }
    return true;
}

/* Who asks, as one number: an address counts without its port, so that a client's connections share one turn. */
static uint64_t client_key(const char *client)
{
    const char *end = client ? strrchr(client, ':') : NULL;
    size_t n = end ? (size_t)(end - client) : client ? strlen(client) : 0;
    return hash_bytes(HASH_START, client, n);
}

static uint64_t fresh_number(void)
{
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        number = (uint64_t)(clock_seconds() * 1e9);
    return number;
}

static void build_sampling(const requests *all, const request_wish *w, Convoke__Control__Sequence *s)
{
    const sampling_defaults *d = &all->options.defaults;
    s->temperature = w->has_temperature ? w->temperature : d->temperature;
    int top_k = w->has_top_k ? w->top_k : d->top_k;
    s->top_k = top_k > 0 ? (uint32_t)top_k : 0;
    s->top_p = w->has_top_p ? w->top_p : d->top_p;
    s->min_p = w->min_p > 0 ? w->min_p : d->min_p;
    s->repetition_penalty = w->repetition_penalty > 0 ? w->repetition_penalty : d->repetition_penalty;
    s->frequency_penalty = w->frequency_penalty;
    s->presence_penalty = w->presence_penalty;
    s->min_tokens = (uint32_t)w->min_new;
    s->seed = w->has_seed ? w->seed : fresh_number();
}

static bool build_lists(const request_wish *w, Convoke__Journal__Request *spec)
{
    Convoke__Control__Sequence *s = spec->sequence;
    s->only_allowed = w->n_allowed > 0;
    if (w->cache_salt && *w->cache_salt) {
        s->cache_salt.data = (uint8_t *)strdup(w->cache_salt);
        if (!s->cache_salt.data)
            return false;
        s->cache_salt.len = strlen(w->cache_salt);
    }
    return copy_ids(w->stop_ids, w->n_stop_ids, &s->n_stop_ids, &s->stop_ids) &&
           copy_ids(w->allowed, w->n_allowed, &s->n_allowed, &s->allowed) && copy_biases(w, s) &&
           copy_candidates(&w->prompt_candidates, &s->prompt_candidates) &&
           copy_candidates(&w->output_candidates, &s->output_candidates) && copy_stops(w, spec);
}

static bool build_names(const requests *all, const request_wish *w, Convoke__Journal__Request *spec)
{
    char made_up[40];
    snprintf(made_up, sizeof made_up, "convoke-%016llx", (unsigned long long)fresh_number());
    spec->id = strdup(w->id && *w->id ? w->id : made_up);
    spec->client = strdup(w->client ? w->client : "");
    spec->model = strdup(all->options.model_names[0]);
    return spec->id && spec->client && spec->model;
}

static Convoke__Journal__Request *create_spec(void)
{
    Convoke__Journal__Request *spec = malloc(sizeof *spec);
    if (!spec)
        return NULL;
    *spec = (Convoke__Journal__Request)CONVOKE__JOURNAL__REQUEST__INIT;
    spec->sequence = malloc(sizeof *spec->sequence);
    if (!spec->sequence) {
        free(spec);
        return NULL;
    }
    *spec->sequence = (Convoke__Control__Sequence)CONVOKE__CONTROL__SEQUENCE__INIT;
    return spec;
}

static refusal_kind fill_spec(requests *all, const requests_limits *limits, const request_wish *w,
                              Convoke__Journal__Request *spec, refusal *why)
{
    Convoke__Control__Sequence *s = spec->sequence;
    TRY_REFUSE(build_prompt(all, limits->vocab, w, s, why));
    int n_prompt = (int)s->n_tokens;
    int max_new = w->max_new;
    if (max_new == 0) { /* as many as fit */
        int fit = limits->largest_kv_blocks * limits->kv_block;
        fit = (fit < limits->max_length ? fit : limits->max_length) - n_prompt;
        max_new = fit > 1 ? fit : 1;
    }
    TRY_REFUSE(check_length(limits, n_prompt, max_new, w->owner, why));
    TRY_REFUSE(check_candidate_bytes("prompt candidates", &w->prompt_candidates, limits->vocab, n_prompt, why));
    TRY_REFUSE(check_candidate_bytes("output candidates", &w->output_candidates, limits->vocab,
                                     (double)max_new * (w->n > 0 ? w->n : 1), why));
    if (w->min_new > max_new)
        return refuse(why, REFUSAL_BAD, "min_tokens: %d, but max_tokens is %d", w->min_new, max_new);
    s->max_new = (uint32_t)max_new;
    s->ignore_eos = w->ignore_eos;
    s->priority = w->priority;
    s->client = client_key(w->client);
    s->owner = w->owner;
    s->bypass_prefix_cache = w->bypass_prefix_cache;
    bool prompt_candidates = w->prompt_candidates.top_n > 0 || w->prompt_candidates.n_ids > 0 || w->prompt_candidates.all;
    s->prompt_logprobs = w->prompt_logprobs || prompt_candidates;
    build_sampling(all, w, s);
    spec->n = w->n > 0 ? (uint32_t)w->n : 1;
    spec->include_stop = w->include_stop;
    spec->keep_special = w->keep_special;
    spec->no_text = w->no_text && w->n_stops == 0;
    spec->linger_ms = w->linger_ms > 0 ? (uint32_t)w->linger_ms : 0;
    spec->accepted = (double)time(NULL);
    return build_names(all, w, spec) && build_lists(w, spec) ? REFUSAL_NONE : no_memory(why);
}

refusal_kind request_build(requests *all, const requests_limits *limits, const request_wish *w, Convoke__Journal__Request **out,
                           refusal *why)
{
    TRY_REFUSE(check_model(all, w->model, why));
    TRY_REFUSE(check_shape(all, w, why));
    TRY_REFUSE(check_sampling(limits->vocab, w, why));
    Convoke__Journal__Request *spec = create_spec();
    if (!spec)
        return no_memory(why);
    refusal_kind kind = fill_spec(all, limits, w, spec, why);
    if (kind != REFUSAL_NONE) {
        convoke__journal__request__free_unpacked(spec, NULL);
        return kind;
    }
    *out = spec;
    return REFUSAL_NONE;
}

/* ---- the request around it ------------------------------------------------------------------------------------------------- */

static bool create_prompt(request *r)
{
    const Convoke__Control__Sequence *s = r->spec->sequence;
    r->prompt = calloc(s->n_tokens, sizeof *r->prompt);
    if (!r->prompt)
        return false;
    for (size_t i = 0; i < s->n_tokens; i++)
        r->prompt[i].token = s->tokens[i];
    if (!s->prompt_logprobs)
        return true;
    r->n_prompt_done = 1; /* the first token has no one before it */
    r->candidates_of_prompt = calloc(s->n_tokens, sizeof *r->candidates_of_prompt);
    return r->candidates_of_prompt != NULL;
}

static bool create_stops(request *r)
{
    r->stops = calloc(r->spec->n_stops + 1, sizeof *r->stops);
    for (size_t i = 0; r->stops && i < r->spec->n_stops; i++)
        r->stops[i] = (stop_string){.text = r->spec->stops[i], .size = strlen(r->spec->stops[i])};
    return r->stops != NULL;
}

request *request_create(requests *all, Convoke__Journal__Request *spec)
{
    request *r = calloc(1, sizeof *r);
    if (!r) {
        convoke__journal__request__free_unpacked(spec, NULL);
        return NULL;
    }
    r->all = all;
    r->spec = spec;
    r->references = 1;
    r->accepted = clock_seconds();
    r->n_sequences = (int)spec->n;
    r->sequences = calloc(spec->n, sizeof *r->sequences);
    bool ok = r->sequences && create_prompt(r) && create_stops(r);
    for (int i = 0; ok && i < r->n_sequences; i++) {
        r->sequences[i] = (request_sequence){.request = r, .index = i, .owner = spec->sequence->owner};
        ok = output_start(&r->sequences[i].out, &all->options, spec) == STATUS_OK;
    }
    if (ok)
        return r;
    request_destroy(r);
    return NULL;
}

void request_destroy(request *r)
{
    if (!r)
        return;
    for (int i = 0; r->sequences && i < r->n_sequences; i++)
        output_clear(&r->sequences[i].out);
    free(r->sequences);
    free(r->prompt);
    free(r->prompt_candidates);
    free(r->candidates_of_prompt);
    free(r->stops);
    convoke__journal__request__free_unpacked(r->spec, NULL);
    free(r);
}
