/* requests.h - every request the coordinator answers for: accepted, running, finished not long ago.
 *
 *   door ── requests_open ──► prompt ids, seed, sequences ──► job (workers)          journal keeps the same, to start again
 *   door ◄── reader_take ──── text, tokens, logprobs  ◄────── reports                 from the last token
 *
 * A request's whole output is kept until it is finished and forgotten, so a reader is only a place in it: a slow one slows
 * nobody, a second one may attach at any token. Any thread may call; wake functions are called without locks held. */
#ifndef CONVOKE_CLUSTER_REQUESTS_H
#define CONVOKE_CLUSTER_REQUESTS_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct requests requests;
typedef struct request request;

/* Why a door says no; each protocol has its own word for these (gRPC: INVALID_ARGUMENT, NOT_FOUND, ...). */
typedef enum {
    REFUSAL_NONE,
    REFUSAL_BAD,         /* the request can never be right */
    REFUSAL_TOO_LARGE,   /* more tokens than fit; the sentence has both numbers. gRPC: INVALID_ARGUMENT */
    REFUSAL_NOT_FOUND,   /* no such model, no such request */
    REFUSAL_EXISTS,      /* a live request has this id */
    REFUSAL_FULL,        /* the queue is full; try again after retry_ms */
    REFUSAL_UNAVAILABLE, /* draining, or given up */
    REFUSAL_UNSUPPORTED, /* names the field */
    REFUSAL_NOT_ALLOWED, /* an admin's word without the token */
    REFUSAL_INTERNAL,
} refusal_kind;

typedef struct {
    refusal_kind kind;
    int retry_ms; /* FULL */
    char sentence[512];
} refusal;

/* Fills it (printf style); returns the kind, so that a caller can `return refuse(...)`. */
refusal_kind refuse(refusal *r, refusal_kind kind, const char *format, ...) __attribute__((format(printf, 3, 4)));

typedef struct {
    int top_n; /* all zeros: none; else one of the three */
    const int32_t *ids;
    int n_ids;
    bool all;
} candidates_wish;

typedef struct {
    int32_t token;
    float bias;
} bias_wish;

/* What a client asks for, whatever protocol it speaks. All pointers are borrowed for the call. Zero means "not said" where the
 * field's remark says so. */
typedef struct {
    const char *id;    /* NULL or "": made up here */
    const char *model; /* NULL, "" or the served name (or an alias) */
    const char
        *client; /* for fairness: who asks ("ipv4:10.0.0.7:51234": everything up to the last colon counts, or a session id) */
    const char *text; /* UTF-8; or */
    size_t text_size;
    bool has_text;
    bool add_special; /* BOS and the like, as the tokenizer's post-processor says */
    const int32_t *ids;
    int n_ids;
    int truncate_prompt; /* keep the last so many prompt tokens; 0: all */
    int n;               /* sequences; 0: 1 */
    int max_new;         /* 0: as many as fit */
    int min_new;
    bool has_temperature, has_top_k, has_top_p, has_seed; /* not said: generation_config.json's, else 1, all, 1, a fresh one */
    float temperature, top_p, min_p;
    int top_k; /* -1 and 0: all */
    uint64_t seed;
    float presence_penalty, frequency_penalty, repetition_penalty; /* 0: neutral */
    const bias_wish *biases;
    int n_biases;
    const int32_t *allowed;
    int n_allowed; /* 0: all */
    const int32_t *stop_ids;
    int n_stop_ids;
    const char *const *stops;
    int n_stops;
    bool include_stop, ignore_eos;
    bool prompt_logprobs;
    candidates_wish prompt_candidates, output_candidates;
    bool keep_special; /* special tokens stay in the text */
    bool no_text;      /* nobody wants the text: do not decode (unless there are stop strings) */
    bool bypass_prefix_cache;
    const char *cache_salt; /* NULL: none */
    int priority;           /* lower goes first */
    int owner;              /* data-parallel rank; -1: any */
    int linger_ms; /* how long it goes on without a reader when the one that owns it closes early, so that Attach finds it */
} request_wish;

/* Accepts a request: after this it runs, whatever happens to workers, until it is finished, cancelled or times out. *out is
 * referenced once for the caller; give it back with request_release(). */
refusal_kind requests_open(requests *all, const request_wish *wish, request **out, refusal *why);
/* A live or remembered request by id; referenced. */
refusal_kind requests_find(requests *all, const char *id, request **out, refusal *why);
void request_release(request *r); /* NULL is fine */
/* Ends it (finish reason: aborted). Unknown ids are ignored. */
void requests_abort(requests *all, const char *id);
void request_abort(request *r);

const char *request_id(const request *r);
int request_n_sequences(const request *r);
int request_n_prompt(const request *r);
const int32_t *request_prompt(const request *r); /* [n_prompt] */

typedef enum {
    FINISH_NONE,
    FINISH_LENGTH,
    FINISH_STOP_TOKEN,
    FINISH_EOS,
    FINISH_STOP_STRING,
    FINISH_ABORTED,
    FINISH_FAILED
} finish_kind;

typedef struct {
    int32_t token;
    float logprob;
    int rank; /* 1: the most probable; 0: not computed (the first prompt token) */
} token_info;

/* Everything one sequence has gained since the reader's last piece, in one piece. Arrays live in the reader until its next
 * reader_take(). */
typedef struct {
    bool has_prompt;          /* the first piece of a request has it: */
    const token_info *prompt; /* [n_prompt]; logprobs only where they were asked for; NULL: those asked for were lost with an
                               * earlier coordinator */
    const token_info *prompt_candidates;
    const int *candidates_of_prompt; /* [n_prompt] how many each; NULL: none asked for */
    int n_cached;                    /* prompt tokens found in the prefix cache */
    int sequence;
    int first_token; /* place of tokens[0] in the sequence's output */
    int n_tokens;
    const token_info *tokens; /* [n_tokens] */
    const token_info *candidates;
    const int *candidates_of_token; /* [n_tokens]; NULL: none asked for */
    const char *text;               /* what may be shown now, beyond the last piece; UTF-8, whole characters */
    size_t text_size;
    const size_t *text_after; /* [n_tokens] how much of it each token has brought us to, so that a client that leaves off behind
                               * any token has its text; NULL: only the whole piece can be shown */
    finish_kind finish;       /* FINISH_NONE: more will come */
    int n_output;             /* of the sequence in all, when finished */
    int32_t stop_token;       /* STOP_TOKEN, EOS */
    const char *stop_string;  /* STOP_STRING */
    refusal failed;           /* FINISH_FAILED: why, to be said as an error of the call */
} output_piece;

typedef struct reader reader;
/* wake(arg) is called once after reader_take() has said false, as soon as there is something; from any thread, also from within
 * reader_open(). from_token: output already known to the client (of every sequence); it may be more than has come here yet.
 * owns: the request is cancelled when this reader closes before the end, and dropped when it does not read for long. */
status reader_open(request *r, int from_token, bool owns, void (*wake)(void *arg), void *arg, reader **out);
/* False: nothing now; wake will be called. After every sequence has delivered its finish: *done. */
bool reader_take(reader *reader, output_piece *piece, bool *done);
/* After it returns wake is not running and will not be called. Must not be called from within wake. */
void reader_close(reader *reader);

/* For List and for gauges. */
typedef struct {
    char id[128];
    int n_prompt, n_output, n_sequences;
    bool finished;
    double age_seconds;
} request_summary;
/* Fills at most max, oldest first; returns how many there are. */
int requests_list(requests *all, request_summary *out, int max);

#endif
