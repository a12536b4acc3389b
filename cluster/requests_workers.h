/* requests_workers.h - the side of requests.h that the coordinator turns: what workers report comes in, what they shall do goes
 * out.
 *
 * The coordinator's thread calls these; doors never do. */
#ifndef CONVOKE_CLUSTER_REQUESTS_WORKERS_H
#define CONVOKE_CLUSTER_REQUESTS_WORKERS_H

#include "cluster/journal.h"
#include "cluster/metrics.h"
#include "cluster/requests.h"
#include "cluster/tokenizer.h"
#include "proto/control.pb-c.h"

/* Where sequences go. Called with the requests' lock held, so each must return at once and call nothing of requests.h. */
typedef struct {
    void (*submit)(void *arg, Convoke__Control__Sequence *const *sequences, int n);
    void (*cancel)(void *arg, const uint64_t *ids, int n);
    void (*hold)(void *arg, const uint64_t *ids, int n, bool hold);
} requests_backend;

/* generation_config.json's wishes for requests that do not say. */
typedef struct {
    float temperature, top_p, min_p, repetition_penalty;
    int top_k;
} sampling_defaults;

typedef struct {
    const char *const *model_names; /* [n_model_names] the served name, then aliases */
    int n_model_names;
    const tokenizer *tokenizer; /* NULL: none */
    sampling_defaults defaults;
    int max_waiting; /* sequences not started; more are refused */
    int max_sequences_of_request;
    size_t max_unread_bytes; /* of one owning reader; beyond it its sequences are held */
    double remember_seconds; /* a finished request stays for Attach */
    int max_remembered;
    journal *journal;
    metrics *metrics;
    bool pin_owner; /* combine fast: a continued sequence must run on the rank it ran on */
    bool log_requests;
} requests_options;

status requests_create(const requests_options *options, const requests_backend *backend, void *arg, requests **out);
/* All readers must have been closed. */
void requests_destroy(requests *all); /* NULL is fine */

/* What fits, as the workers said. */
typedef struct {
    int vocab, max_length, kv_block;
    int n_ranks;
    int largest_kv_blocks; /* of any rank */
    int n_eos;
    int32_t eos_ids[16];
} requests_limits;

void requests_set_limits(requests *all, const requests_limits *limits);
/* Takes up what the journal holds: once, when the limits are known and before the first ready. */
status requests_replay(requests *all);
/* A launch can take sequences: everything unfinished is submitted, oldest first, from its last token. */
void requests_workers_ready(requests *all);
void requests_workers_lost(requests *all);
void requests_workers_report(requests *all, const Convoke__Control__Report *report);

/* NONE: new requests are taken; otherwise refused so. sentence is copied. */
void requests_refuse_new(requests *all, refusal_kind kind, const char *sentence);
/* Ends every live request: aborted (NONE), or failed with what clients are told. */
void requests_end_all(requests *all, refusal_kind kind, const char *sentence);
/* Paused: new sequences are kept back; freeze: running ones are held too. */
void requests_pause(requests *all, bool paused, bool freeze);
/* Times: who lingered too long, what is to be forgotten. Call about once a second. */
void requests_tick(requests *all);

typedef struct {
    int n_live;               /* requests not finished */
    int n_started, n_waiting; /* sequences */
    int n_begun;              /* while paused: sequences that still go on until they are finished */
    unsigned long long prompt_tokens, generated_tokens;
} requests_counts;
void requests_count(requests *all, requests_counts *out);

#endif
