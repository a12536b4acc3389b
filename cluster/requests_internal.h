/* requests_internal.h - inside of requests: requests.c (the table), request_build.c (from a wish to a request), request_output.c
 * (what a sequence has said), request_reader.c (who listens). Nobody else includes it.
 *
 * One lock guards everything that changes; a request's spec does not. */
#ifndef CONVOKE_CLUSTER_REQUESTS_INTERNAL_H
#define CONVOKE_CLUSTER_REQUESTS_INTERNAL_H

#include "cluster/requests_workers.h"
#include "cluster/stop_text.h"
#include "proto/journal.pb-c.h"

#include <pthread.h>

/* The output of one sequence; grows, never shrinks. */
typedef struct {
    token_info *tokens;
    size_t *shown_after;      /* [n_tokens] bytes of text that could be shown after each token */
    size_t *candidates_after; /* [n_tokens] candidates up to and with each token */
    int n_tokens, capacity;
    token_info *candidates;
    size_t n_candidates, candidate_capacity;
    bytes_writer text;
    size_t shown;             /* bytes of it */
    tokenizer_stream *stream; /* NULL: no text is made */
    finish_kind finish;
    int32_t stop_token;
    int stop_string;
    refusal failed;
} sequence_output;

typedef struct {
    request *request;
    uint64_t wire_id;
    int index;
    sequence_output out;
    bool submitted;     /* to the launch that is ready now */
    bool started;       /* has left the workers' queue at least once in this launch */
    bool slow;          /* its reader does not keep up */
    bool frozen;        /* a pause keeps it */
    bool held;          /* what the workers were told of these two */
    bool brings_prompt; /* the workers were asked for the prompt's log-probabilities with it */
    int owner, n_cached;
    double first_started, first_token, last_token; /* clock_seconds(); 0: not yet */
} request_sequence;

struct request {
    requests *all;
    request *next, *previous; /* in order of acceptance */
    request *next_same_hash;
    int references;
    Convoke__Journal__Request *spec;
    uint64_t arrival;
    int n_sequences, n_finished;
    request_sequence *sequences; /* [n_sequences] */
    /* what came of the prompt */
    token_info *prompt; /* [n_prompt]; NULL: logprobs were not asked for */
    int n_prompt_done;  /* tokens whose logprobs are here */
    token_info *prompt_candidates;
    size_t n_prompt_candidates, prompt_candidate_capacity;
    int *candidates_of_prompt;
    stop_string *stops;                            /* [spec->n_stops] */
    double accepted, finished_at, ownerless_since; /* clock_seconds(); 0: not */
    reader *readers, *owner;
    bool in_table;
    bool journal_asked;    /* whether the journal has it is known; before that it is not forgotten */
    bool accepted_durably; /* the journal has it; before that it is not sent to workers */
};

struct reader {
    request *request;
    reader *next;
    reader *next_to_wake;
    bool owns, prompt_sent;
    bool armed;  /* it has seen that there was nothing, and wants to hear of news */
    bool queued; /* stands in to_wake */
    int calling; /* threads inside its wake */
    void (*wake)(void *arg);
    void *arg;
    int *token_place;   /* beyond n_tokens: the client knows tokens that are still to be computed again */
    size_t *text_place; /* TEXT_NOT_YET until then */
    bool *finish_sent;
    int next_sequence, n_done;
    bool holding; /* the sequences are held for it */
    bytes_writer tokens, candidates, counts, text, text_after, prompt, prompt_candidates, prompt_counts;
};

struct requests {
    requests_options options;
    requests_backend backend;
    void *backend_arg;
    requests_limits limits;
    pthread_mutex_t lock;
    pthread_cond_t woken; /* a wake has returned */
    request *first, *last;
    request **by_id; /* [n_buckets] */
    size_t n_buckets;
    request_sequence **by_slot; /* [n_slots] a wire id is (uses of the slot so far) << 32 | slot */
    uint32_t *uses_of_slot, *free_slots;
    uint32_t n_slots, n_free_slots;
    int n_live, n_remembered, n_started;
    int n_unstarted;                   /* live sequences that wait for the workers */
    double start_interval, last_start; /* seconds between starts of late: what a full queue's hint is made of */
    uint64_t next_arrival;
    bool ready, paused, frozen, replayed;
    refusal refused; /* of new requests; kind NONE: none */
    unsigned long long prompt_tokens, generated_tokens;
    reader *to_wake;
    pthread_mutex_t scratch_lock;
    tokenizer_scratch *scratches[16]; /* free ones */
    int n_scratches;
};

/* request_build.c: checks a wish and makes the spec; takes no lock. limits: a copy. */
refusal_kind request_build(requests *all, const requests_limits *limits, const request_wish *wish,
                           Convoke__Journal__Request **out, refusal *why);
/* The request around a spec, which it owns from then on, also on failure. */
request *request_create(requests *all, Convoke__Journal__Request *spec);
void request_destroy(request *r);

/* request_output.c. append: one token as the workers gave it; sets finish when it ends the sequence by a stop string. */
status output_start(sequence_output *o, const requests_options *options, const Convoke__Journal__Request *spec);
void output_clear(sequence_output *o);
status output_append(request *r, sequence_output *o, const Convoke__Control__TokenLogprob *said,
                     Convoke__Control__TokenLogprob *const *candidates, size_t n_candidates);
/* Appends what a message says to a growing list. */
status candidates_add(token_info **items, size_t *n_items, size_t *capacity, Convoke__Control__TokenLogprob *const *from,
                      size_t n);
static inline token_info token_info_of(const Convoke__Control__TokenLogprob *t)
{
    return (token_info){.token = (int32_t)t->token, .logprob = t->logprob, .rank = (int)t->rank};
}
/* The workers, or we, say that it is over. */
finish_kind output_should_end(const request *r, const sequence_output *o);
void output_finish(request *r, sequence_output *o, finish_kind kind);

/* request_reader.c; with the lock held. */
void readers_note(request *r); /* there is news: marks whom to wake */
void readers_hold_slow(request *r);
/* Wakes those marked; takes and leaves the lock, which must not be held. */
void readers_wake(requests *all);
bool request_prompt_done(const request *r);  /* all of what was asked for the prompt is here */
bool request_prompt_ready(const request *r); /* or nobody will bring it any more */

/* requests.c; with the lock held. */
void request_cancel_locked(request *r);
void request_hold_locked(request *r, bool hold);

#endif
