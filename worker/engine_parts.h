/* engine_parts.h - the inside of the step loop, shared by engine.c (life and the step), engine_lead.c (what only the leader does:
 * requests, decisions, events), engine_rank.c (what every rank does: its sequences, its rows, its report), engine_plan.c (another
 * plan while serving), engine_owners.c (sequences that change their owner) and engine_counts.c (the statistics of all ranks).
 * Rank 0 does both parts of all of them. */
#ifndef CONVOKE_WORKER_ENGINE_PARTS_H
#define CONVOKE_WORKER_ENGINE_PARTS_H

#include "worker/engine_wire.h"
#include "worker/errand.h"
#include "worker/expert_copies.h"

enum { COUNT_SENDERS = 4 };   /* ranks that send their counts at a time */
enum { MOST_TRANSFERS = 64 }; /* moves that this rank has part in: more than the scheduler lets be under way */
typedef struct {
    uint64_t key; /* 0: none */
    int n_left;   /* blocks */
    bool sends;
} transfer;
typedef enum { COUNTS_AT_REST, COUNTS_ASKED, COUNTS_COMING, COUNTS_ADDING, COUNTS_ANSWERED } counts_stage;

/* A sequence this rank owns. Arrays are sized for the longest sequence at creation; those of a request's lists grow once. */
typedef struct {
    bool active;
    uint64_t id;
    int32_t *tokens; /* [max_length] prompt and output */
    int n_tokens;    /* known */
    int n_done;      /* run, or found in the prefix cache */
    int n_reported;  /* rows before this position give no events any more */
    int n_prompt;    /* without any output: prompt log-probabilities are of these */
    int n_original;  /* given at submission, earlier output among them */
    int n_output;    /* tokens behind n_prompt */
    int n_left;      /* tokens still to generate */
    unsigned want;
    int domain;
    bool judged;              /* its owner */
    int n_counted;            /* rows that speak for it */
    sampling_params sampling; /* its arrays, and those of the candidates, lie in `lists` */
    engine_candidates prompt_candidates, output_candidates;
    bytes_writer lists;
    sampler_history *history;
    int32_t *blocks; /* [blocks of max_length] */
    int n_blocks;
    char failure[200]; /* why it cannot go on; "" */
} sequence;

/* A row whose logits are needed, and why. */
typedef struct {
    int row, span, place, position;
    int score_token;  /* -1: none; its log-probability is wanted */
    int prompt_token; /* likewise, with rank and candidates */
    bool sample;
    status failed;
    float logprob_scored;
    token_logprob chosen;
    int n_candidates;
} logit_job;

/* Events of a span, opened before its logits are there. SIZE_MAX in .event: none. */
typedef struct {
    int place, n_silent; /* its first rows, reported before */
    wire_event_place rows, prompt, token;
    int prompt_stride, token_stride; /* room for candidates per row */
} span_events;

/* What the leader keeps of a request; its arrays lie behind it, the prompt is with the scheduler. */
typedef struct {
    engine_request request;
} lead_request;

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
    bool stopping;

    /* every rank */
    sequence *places;    /* [n_places] */
    int32_t *row_tokens; /* [max_rows] */
    batch_span *spans;   /* [n_places] */
    span_events *events; /* [n_places] by span */
    logit_job *jobs;     /* [max_rows] */
    int *job_rows;
    int n_rows, n_spans, n_jobs, first_job, end_job;
    const float *logits;
    sampler **samplers;    /* [threads] */
    uint16_t *row_choices; /* [moe layers][top_k] */
    bytes_writer report;

    /* every rank: plans */
    expert_copies *copies;           /* NULL: experts stay as they are */
    plan own_plan, next_plan;        /* the live one (zeroed: parts.plan is the first, borrowed), the one wished for */
    uint64_t plan_epoch, next_epoch; /* next_epoch 0: nothing is wished for */
    unsigned char *wanted;           /* [moe layers][experts] scratch */
    char wish_failed[200];

    /* every rank: owners */
    bool affinity;
    struct owner_prices *prices;
    double *owner_us; /* [n_places][n_ranks] */
    transfer transfers[MOST_TRANSFERS];
    int n_transfers;
    size_t judged_at; /* in the report */
    double *move_us;  /* [n_ranks] the leader's scratch */
    bool *has_room;   /* [n_ranks] likewise */
    unsigned long long moved_cross_bytes;

    /* every rank: counts */
    routing_stats *set_aside; /* while it is packed */
    errand packing;
    bytes_writer packed;
    size_t n_sent;
    bool sends_counts;
    status counting; /* how setting aside or packing went */

    /* the leader: plans */
    plan asked_plan;
    uint64_t plan_rate;
    wire_plan_verb plan_verb, sent_verb; /* of the next step message, of the last one */
    uint64_t sent_epoch;
    engine_replan_state replan;
    double replan_started;
    uint64_t replan_loaded, replan_total;
    int n_plan_ready;
    char replan_why[256];

    /* the leader: counts */
    counts_stage counts_stage;
    int first_sender, n_complete;
    bytes_writer received[COUNT_SENDERS], answer;
    bool is_complete[COUNT_SENDERS];
    routing_stats *sum; /* the errand's, while it runs */
    errand adding;
    uint64_t counted_tokens;
    status counts_failed;
    char counts_why[256];

    /* the leader */
    scheduler *scheduler;
    uint64_t *cancels; /* of running sequences, for the next step */
    int n_cancels, cancel_capacity;
    bytes_writer message, root;
    const void **parts_in;
    size_t *sizes_in;
    int *kv_blocks_of_rank; /* [n_ranks] */
    int last_prefill_rows, last_decode_rows;
    double last_seconds;
    unsigned long long *rows_of_rank, link_bytes[3];
    double *compute_of_rank;                                /* [n_ranks] */
    double *waited_of_rank, *waited_now, *lateness_of_rank; /* [n_ranks] */
    unsigned long long *layer_rows;                         /* [n_ranks][moe layers] ever */
    double *layer_recent;                                   /* [n_ranks][moe layers] */
    double *load_max_over_mean;                             /* [moe layers] */
};

/* engine_lead.c */
status lead_create(engine *e);
void lead_destroy(engine *e);
status lead_write_message(engine *e, bool stop); /* decides the step */
status lead_read_reports(engine *e, double seconds);

/* engine_rank.c */
status rank_create(engine *e);
void rank_destroy(engine *e);
status rank_step(engine *e, const void *message, size_t size); /* obeys; fills the report */

/* engine_plan.c; leader: decide, put, hear, conclude; every rank: obey, report */
status plans_create(engine *e);
void plans_destroy(engine *e);
bool plans_pending(const engine *e);
void plans_decide(engine *e, wire_step *head);
void plans_put(engine *e, const wire_step *head);
void plans_hear(engine *e, int rank, const wire_report *report, const char *sentence);
void plans_conclude(engine *e);
status plans_obey(engine *e, const wire_step *head, bytes_reader *r);
const char *plans_report(engine *e, wire_report *report);

/* engine_owners.c; every rank: forget (a place's new sequence), count_due, judge, move, look, put_ended; leader: hear, end */
status owners_create(engine *e);
void owners_destroy(engine *e);
void owners_forget(engine *e, int place);
int owners_count_due(const engine *e);
void owners_judge(engine *e, unsigned char *at);
status owners_move(engine *e, const wire_move *m, const int32_t *from_blocks, const int32_t *to_blocks);
status owners_look(engine *e);
uint32_t owners_put_ended(engine *e, bytes_writer *w);
void owners_hear(engine *e, int rank, const wire_judgement *j, const double *us);
void owners_end(engine *e, const wire_ended *t);

/* engine_counts.c; likewise */
status counts_create(engine *e);
void counts_destroy(engine *e);
bool counts_pending(const engine *e);
void counts_decide(engine *e, wire_step *head);
void counts_hear(engine *e, int rank, const wire_report *report, const void *piece, const char *sentence);
void counts_conclude(engine *e);
void counts_obey(engine *e, const wire_step *head);
status counts_report(engine *e, wire_report *report, const void **piece);

#endif
