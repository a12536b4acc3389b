/* engine.h - the workers' step loop: sequences join and leave between steps, all ranks in lock step.
 *
 *   leader (rank 0)                                             every rank
 *   submit, cancel, hold ─► scheduler ─► step message ─────────► sequences ─► rows ─► model ─► logits ─► tokens
 *   listener ◄── events ◄── scheduler ◄────────────── reports ◄─────────────────────────────────────────┘
 *
 * Whoever leads (convoke-score, a coordinator's worker) submits requests on rank 0 and calls engine_step() while engine_busy();
 * the other ranks call engine_follow(). Events arrive in the listener on rank 0, inside engine_step() (those of a request that
 * leaves the queue unserved inside engine_cancel()), sequence by sequence in token order; what they point to is valid inside the
 * listener. Which sequences run, where, and how many rows each, the leader decides (scheduler.h); a sequence may be pushed out of
 * the KV cache and computed again later, which its listener never notices but for a second STARTED. Tokens and everything else
 * that is reported depend on the request alone (model.h, sampler.h). */
#ifndef CONVOKE_WORKER_ENGINE_H
#define CONVOKE_WORKER_ENGINE_H

#include "placement/routing_stats.h"
#include "worker/model.h"
#include "worker/sampler.h"

enum {
    ENGINE_WANT_SCORE = 1,            /* ROWS: the log-probability of each prompt token given those before it */
    ENGINE_WANT_LOGITS = 2,           /* ROWS: logits after every prompt token */
    ENGINE_WANT_CHOICES = 4,          /* ROWS: chosen experts and weights of every row */
    ENGINE_IGNORE_EOS = 8,            /* the model's end-of-sequence tokens do not end this sequence */
    ENGINE_WANT_PROMPT_LOGPROBS = 16, /* PROMPT: log-probability and rank of each prompt token but the first */
};

/* Which other tokens' log-probabilities are wanted beside each token's own: one of the three, or (all zeros) none. */
typedef struct {
    int top_n;          /* the n most probable */
    const int32_t *ids; /* [n_ids] these; copied */
    int n_ids;
    bool all; /* the whole vocabulary */
} engine_candidates;

typedef struct {
    uint64_t id;           /* the submitter's; unique among live requests */
    const int32_t *prompt; /* [n_prompt]; copied */
    int n_prompt;
    int n_prior;              /* the last n_prior of them are this request's own earlier output (it is being continued) */
    int max_new;              /* tokens to generate at most; 0: only run the prompt */
    sampling_params sampling; /* its stop_ids end the sequence too; arrays copied; min_tokens counts earlier output too */
    unsigned want;
    int domain;               /* for the routing statistics */
    int owner;                /* rank that keeps its KV cache; -1: chosen here */
    int priority;             /* lower goes first */
    uint64_t client;          /* fair between these at equal priority */
    uint64_t arrival;         /* older (lower) first among equals; 0: in order of submission, behind those that name one */
    bool bypass_prefix_cache; /* neither look prefixes up nor leave any */
    const void *cache_salt;   /* [salt_size] bytes; prefixes are shared between equal salts only; copied */
    int salt_size;
    engine_candidates prompt_candidates; /* in PROMPT events, which they ask for */
    engine_candidates output_candidates; /* in TOKEN events */
} engine_request;

typedef enum {
    ENGINE_EVENT_ROWS,     /* rows have run, for those who want scores, logits or choices */
    ENGINE_EVENT_STARTED,  /* left the queue; again after a preemption */
    ENGINE_EVENT_PROMPT,   /* log-probabilities of prompt tokens */
    ENGINE_EVENT_TOKEN,    /* a token was generated */
    ENGINE_EVENT_FINISHED, /* the last event of a request */
} engine_event_kind;
typedef enum {
    ENGINE_FINISH_LENGTH,
    ENGINE_FINISH_STOP,
    ENGINE_FINISH_CANCELLED,
    ENGINE_FINISH_FAILED, /* this sequence alone; `reason` says why */
} engine_finish;

typedef struct {
    uint64_t id;
    engine_event_kind kind;
    int owner; /* STARTED, ROWS */
    /* STARTED */
    int n_cached; /* tokens of the prompt found in the prefix cache (after a preemption: of all tokens so far) */
    /* TOKEN */
    int32_t token;
    int rank; /* 1: the most probable */
    float logprob;
    /* TOKEN: n_candidates of them; PROMPT: those of all rows behind each other, candidates_of_row [n_rows] says how many each */
    const token_logprob *candidates; /* best first (ids: in the order asked, all: by id) */
    int n_candidates;
    const int *candidates_of_row;
    /* FINISHED */
    engine_finish finish;
    const char *reason; /* NULL unless FAILED */
    /* PROMPT: of the prompt tokens at first_position .. + n_rows - 1; position 0 has none, earlier output (n_prior) is left out.
     * ROWS: these positions have run */
    int first_position, n_rows;
    const token_logprob *logprobs; /* PROMPT [n_rows] */
    /* ROWS */
    bool decode;             /* the row's token was generated, not given */
    long long step;          /* in which they ran, from 0; rows of a step and owner come in the order in which they ran */
    int n_scored;            /* prompt tokens scored by these rows */
    double sum_logprob;      /* of them */
    const float *logits;     /* [n_rows][vocab]; NULL unless wanted */
    const uint16_t *experts; /* [n_rows][moe layers][top_k], likewise */
    const float *weights;
} engine_event;

typedef void (*engine_listener)(void *arg, const engine_event *event);

typedef enum {
    OWNERS_SPREAD,   /* a sequence stays with the rank that had least to do when it came */
    OWNERS_AFFINITY, /* after its first rows it may move to where they have the shortest way: owner_choice.h */
} engine_owners;

typedef struct {
    int max_sequences;   /* running at once, over all ranks */
    int chunk;           /* prefill rows per rank and step, at most */
    int max_length;      /* longest sequence, prompt and output; at most the model's own limit */
    size_t kv_bytes;     /* per rank */
    double step_seconds; /* while sequences decode, prompts get rows as long as a step takes no longer than this; 0: chosen by
                            measurement; ENGINE_NO_BUDGET: `chunk` alone decides */
    bool prefix_cache;
    engine_owners owners;
    bool count_pairs; /* the routing statistics hold pairs of experts, not only P */
    int n_domains;    /* for the routing statistics */
    const char *const *domains;
} engine_limits;
#define ENGINE_NO_BUDGET 1e9

typedef struct {
    double prefill_seconds, decode_seconds; /* steps with any prompt rows; steps with generated rows only */
    unsigned long long prefill_rows, decode_rows, mixed_decode_rows, steps; /* mixed: decode rows in prefill steps */
} engine_times;                                                             /* leader's clock, all ranks' rows */

/* A plan that was asked for while serving. */
typedef enum {
    ENGINE_REPLAN_NONE,
    ENGINE_REPLAN_LOADING,
    ENGINE_REPLAN_READY, /* the next step uses it */
    ENGINE_REPLAN_LIVE,
    ENGINE_REPLAN_FAILED, /* `reason` says why; the plan before goes on */
} engine_replan_stage;
typedef struct {
    uint64_t epoch;
    engine_replan_stage stage;
    uint64_t loaded_bytes, total_bytes; /* of all ranks */
    unsigned copies;                    /* (expert, rank) that are new in it */
    double seconds;                     /* since it was asked for; LIVE: until it was */
    const char *reason;                 /* valid like the counters */
} engine_replan_state;

/* All ranks' routing statistics since they were last asked for, as routing_stats_add_packed() takes them. */
typedef struct {
    const void *bytes; /* [size], the engine's, until they are asked for again */
    size_t size;
    uint64_t tokens;
    const char *failed; /* NULL, or why there are none this time */
} engine_counts;

/* What a monitor wants to see. Arrays belong to the engine and change with the next step; counts are of the engine's whole life
 * unless said otherwise. */
typedef struct {
    int n_running, n_waiting, max_running;
    unsigned long long n_preempted, n_steps;
    unsigned long long prefix_queries, prefix_hits; /* prompt tokens looked up; found */
    const int *kv_free_of_rank;                     /* [n_ranks] blocks no running sequence uses, cached ones among them */
    const int *kv_blocks_of_rank;                   /* [n_ranks] all */
    int last_prefill_rows, last_decode_rows;        /* of the last step, all ranks */
    double last_seconds;
    const unsigned long long *rows_of_rank; /* [n_ranks] (token, expert) rows computed */
    const double *compute_of_rank;          /* [n_ranks] seconds in attention, experts and head */
    uint64_t plan_epoch;                    /* of the plan the last step ran under */
    engine_replan_state replan;             /* the last one asked for */
    /* Sequences given to another owner, their keys and values, and what of these crossed to another node. */
    unsigned long long n_moved, moved_bytes, moved_cross_bytes;
    const double *lateness_of_rank;   /* [n_ranks] seconds: in each step the rank that waited least in the exchange is taken
                                         for the one the others waited for, by as much as they waited longer on average */
    unsigned long long link_bytes[3]; /* rows and results: same rank, same node, cross node, all ranks */
    const double *load_max_over_mean; /* [moe layers] busiest rank over mean, over about the last 100 steps; 1: nothing yet */
} engine_counters;

typedef struct engine engine;

/* Sequences that a rank may own at once; where owners change they may crowd a little. */
int engine_places(const engine_limits *limits, int n_ranks);
/* [all] `parts` without kv and max_rows, which the limits decide. The listener is used on rank 0. */
status engine_create(const model_parts *parts, const engine_limits *limits, engine_listener listener, void *arg, engine **out);
void engine_destroy(engine *e); /* NULL is fine */

/* Rank 0. Refuses with a sentence what can never run (too long, ids outside the vocabulary, KV budget too small, bad sampling).
 */
status engine_submit(engine *e, const engine_request *request);
/* Rank 0. A running sequence ends at the next step and gives its KV blocks back; unknown ids are ignored: it may just have
 * finished. */
status engine_cancel(engine *e, uint64_t id);
/* Rank 0. A held sequence gets no rows until it is let go, and is the first to lose its KV blocks when others need them. */
status engine_hold(engine *e, uint64_t id, bool hold);
/* Rank 0. Forgets all prefixes; running sequences go on. */
status engine_clear_prefix_cache(engine *e);
/* Rank 0. From now on `p` (copied) is loaded beside the steps, on every rank at most so many bytes a second (0: 256 MB), and used
 * from the first step on when all ranks have their copies; then the old ones go. Tokens do not change by it. One that is not
 * live yet gives way to a newer one. Refuses a plan of another shape, or an epoch not above all before. */
status engine_replan(engine *e, const plan *p, uint64_t epoch, uint64_t bytes_per_second);
/* Rank 0. Asks for all ranks' statistics; refused while they are under way. engine_take_counts() is true once when they are
 * there.
 */
status engine_ask_counts(engine *e);
bool engine_take_counts(engine *e, engine_counts *out);
/* Rank 0. Whether a step would do anything for sequences; false when all that is left is held. */
bool engine_busy(const engine *e);
/* Rank 0. Whether something else (a plan, statistics) goes on that wants a step now and then: fifty a second will do. */
bool engine_pending(const engine *e);
/* [all] One step. */
status engine_step(engine *e);
/* Rank 0: lets engine_follow() return on the others. */
status engine_stop(engine *e);
/* Other ranks: steps until rank 0 stops. */
status engine_follow(engine *e);

model *engine_model(engine *e);
const plan *engine_plan(const engine *e); /* the live one */
uint64_t engine_plan_epoch(const engine *e);
bool engine_is_settled(engine *e); /* this rank neither loads experts nor gives any back */
const engine_times *engine_get_times(const engine *e);
void engine_get_counters(engine *e, engine_counters *out); /* rank 0 */
const routing_stats *engine_routing(const engine *e);      /* this rank's rows, each position of a request once */
size_t engine_kv_bytes(const engine *e);
int engine_max_rows(const engine *e);

#endif
