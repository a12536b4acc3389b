/* sampler.h - from a row of logits to a token: pure, per sequence.
 *
 *   allowed ids -> logit bias -> min_tokens -> repetition, frequency, presence penalty -> temperature -> min-p -> top-k -> top-p
 * -> draw
 *
 * The order is vLLM's (vllm/v1/sample). Equal logits: the lower id is the better one, everywhere. The draw is a
 * pure function of (seed, sequence, position): nothing else in the batch, no earlier draw and no machine changes it, so a request
 * continued elsewhere yields the same tokens. Kept tokens are walked by rising id until their probabilities pass a uniform number
 * from Philox 4x32-10 (philox.h).
 *
 * Log-probabilities are those of the model itself: log-softmax of the raw logits, before any of the above (vLLM's default,
 * "raw_logprobs").
 *
 * A sampler is scratch memory for one vocabulary, used by one thread at a time; nothing is allocated after its creation. */
#ifndef CONVOKE_WORKER_SAMPLER_H
#define CONVOKE_WORKER_SAMPLER_H

#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int token;
    float bias; /* [-100, 100], added to the logit */
} token_bias;

/* What one sequence asks for; all zeros is greedy with nothing else. The pointers are borrowed and must live as long as the
 * sequence. */
typedef struct {
    float temperature;        /* 0 (or less than 1e-5): the best token, no draw */
    int top_k;                /* keep the k best; 0: all */
    float top_p;              /* [0, 1] keep the smallest set of best tokens whose probabilities reach p; 0 and 1: all */
    float min_p;              /* [0, 1] keep tokens at least this times as probable as the best; 0: all */
    float repetition_penalty; /* prompt and output tokens: positive logits divided, negative multiplied; 0 and 1: neutral */
    float frequency_penalty;  /* [-2, 2] subtracted once per occurrence in the output; 0: neutral */
    float presence_penalty;   /* [-2, 2] subtracted if the token is in the output; 0: neutral */
    int min_tokens;           /* stop_ids cannot be chosen before this many output tokens */
    const int *stop_ids;      /* [n_stop_ids] end-of-sequence and stop tokens, for min_tokens */
    int n_stop_ids;
    const token_bias *biases; /* [n_biases] */
    int n_biases;
    const int *allowed; /* [n_allowed] only these may be chosen; NULL: all */
    int n_allowed;
    uint64_t seed;     /* of the request */
    uint32_t sequence; /* index of the sequence inside its request */
} sampling_params;

/* Refuses what is out of range, naming the field (STATUS_BAD_INPUT); every token id must be below vocab. */
status sampling_params_check(const sampling_params *params, int vocab);

/* Which tokens a sequence has seen, for the penalties. Sized once for `max_tokens` distinct tokens; counting allocates nothing.
 */
typedef struct sampler_history sampler_history;

status sampler_history_create(int max_tokens, sampler_history **out);
void sampler_history_destroy(sampler_history *history); /* NULL is fine */
void sampler_history_reset(sampler_history *history);   /* for the next sequence */
void sampler_history_add_prompt(sampler_history *history, const int *tokens, int n);
void sampler_history_add_output(sampler_history *history, int token);
/* Whether these params look at a history at all; a sequence for which they do not needs none. */
bool sampling_params_need_history(const sampling_params *params);

typedef struct sampler sampler;

status sampler_create(int vocab, sampler **out);
void sampler_destroy(sampler *s); /* NULL is fine */

/* logits [vocab], untouched. position: of the token to come, counted from the start of the prompt. n_output: output tokens so
 * far. history: may be NULL when the params need none. params must have passed sampling_params_check(). Fails when a logit is NaN
 * or +infinity, or none is left, naming the token. */
status sampler_choose(sampler *s, const sampling_params *params, const sampler_history *history, const float *logits,
                      uint32_t position, int n_output, int *token);

typedef struct {
    int token;
    int rank;      /* 1: the most probable */
    float logprob; /* natural logarithm */
} token_logprob;

/* log(sum(exp(logits))), the same on every machine. */
float sampler_log_sum_exp(const float *logits, int vocab);
/* One token's log-probability and rank; log_sum from sampler_log_sum_exp(). */
token_logprob sampler_logprob(const float *logits, int vocab, float log_sum, int token);
/* The n most probable (n <= vocab), best first; returns how many (fewer where logits are -infinity, none where one
 * is NaN). */
int sampler_top_logprobs(sampler *s, const float *logits, float log_sum, int n, token_logprob *out);

#endif
