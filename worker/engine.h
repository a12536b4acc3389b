/* engine.h - the workers' step loop: sequences join and leave between steps, all ranks in lock step.
 *
 *   leader (rank 0)                                   every rank
 *   submit, cancel ─► queue ─admit─► step message ──► sequences ─► batch ─► model ─► logits ─► tokens
 *   listener ◄── events ◄──────────── reports ◄──────────────────────────────────────────────────┘
 *
 * Whoever leads (convoke-score, a coordinator's worker) submits requests on rank 0 and calls engine_step() while engine_busy();
 * the other ranks call engine_follow(). Events arrive in the listener on rank 0, inside engine_step(), sequence by sequence in
 * token order. A request is admitted when its owner has a free place and KV blocks for its whole length, so nothing that runs
 * is ever pushed out. Tokens depend on the request alone (model.h, sampler.h). */
#ifndef CONVOKE_WORKER_ENGINE_H
#define CONVOKE_WORKER_ENGINE_H

#include "placement/routing_stats.h"
#include "worker/model.h"
#include "worker/sampler.h"

enum {
    ENGINE_WANT_SCORE = 1,   /* the log-probability of each prompt token given those before it */
    ENGINE_WANT_LOGITS = 2,  /* logits after every prompt token */
    ENGINE_WANT_CHOICES = 4, /* chosen experts and weights of every row */
    ENGINE_IGNORE_EOS = 8,   /* the model's end-of-sequence tokens do not end this sequence */
};

typedef struct {
    uint64_t id;           /* the submitter's; unique among live requests */
    const int32_t *prompt; /* [n_prompt]; copied */
    int n_prompt;
    int n_prior;              /* the last n_prior of them are this request's own earlier output (it is being continued) */
    int max_new;              /* tokens to generate at most; 0: only run the prompt */
    sampling_params sampling; /* its stop_ids end the sequence too; arrays copied */
    unsigned want;
    int domain; /* for the routing statistics */
    int owner;  /* rank that keeps its KV cache; -1: the least busy */
} engine_request;

typedef enum { ENGINE_EVENT_ROWS, ENGINE_EVENT_TOKEN, ENGINE_EVENT_FINISHED } engine_event_kind;
typedef enum { ENGINE_FINISH_LENGTH, ENGINE_FINISH_STOP, ENGINE_FINISH_CANCELLED } engine_finish;

typedef struct {
    uint64_t id;
    engine_event_kind kind;
    /* TOKEN */
    int32_t token;
    float logprob;
    /* FINISHED */
    engine_finish finish;
    /* ROWS: positions first_position .. + n_rows - 1 have run */
    int first_position, n_rows;
    bool decode;             /* the row's token was generated, not given */
    int n_scored;            /* prompt tokens scored by these rows */
    double sum_logprob;      /* of them */
    const float *logits;     /* [n_rows][vocab]; NULL unless wanted; valid inside the listener */
    const uint16_t *experts; /* [n_rows][moe layers][top_k], likewise */
    const float *weights;
} engine_event;

typedef void (*engine_listener)(void *arg, const engine_event *event);

typedef struct {
    int max_sequences; /* running at once, over all ranks */
    int chunk;         /* prefill rows per rank and step */
    int max_length;    /* longest sequence, prompt and output; at most the model's own limit */
    size_t kv_bytes;   /* per rank */
    int n_domains;     /* for the routing statistics */
    const char *const *domains;
} engine_limits;

typedef struct {
    double prefill_seconds, decode_seconds; /* steps with any prompt rows; steps with generated rows only */
    unsigned long long prefill_rows, decode_rows, mixed_decode_rows, steps; /* mixed: decode rows in prefill steps */
} engine_times;                                                             /* leader's clock, all ranks' rows */

typedef struct engine engine;

/* [all] `parts` without kv and max_rows, which the limits decide. The listener is used on rank 0. */
status engine_create(const model_parts *parts, const engine_limits *limits, engine_listener listener, void *arg, engine **out);
void engine_destroy(engine *e); /* NULL is fine */

/* Rank 0. Refuses with a sentence what can never run (too long, ids outside the vocabulary, KV budget too small, bad sampling).
 */
status engine_submit(engine *e, const engine_request *request);
status engine_cancel(engine *e, uint64_t id); /* unknown ids are ignored: it may just have finished */
bool engine_busy(const engine *e);
/* [all] One step. */
status engine_step(engine *e);
/* Rank 0: lets engine_follow() return on the others. */
status engine_stop(engine *e);
/* Other ranks: steps until rank 0 stops. */
status engine_follow(engine *e);

model *engine_model(engine *e);
const engine_times *engine_get_times(const engine *e);
const routing_stats *engine_routing(const engine *e); /* this rank's rows */
size_t engine_kv_bytes(const engine *e);
int engine_max_rows(const engine *e);

#endif
