/* support_engine.h - a mix of requests that use every part of the step loop, run under any setting, and everything that came out
 * of it, to be compared bit for bit: no decision of the scheduler may change any of it. */
#ifndef CONVOKE_TESTS_SUPPORT_ENGINE_H
#define CONVOKE_TESTS_SUPPORT_ENGINE_H

#include "worker/runtime.h"

enum { MIX_REQUESTS = 14, MIX_NEW = 20, MIX_CANDIDATES = 4, MIX_LENGTH = 160 };

typedef struct {
    int32_t tokens[MIX_LENGTH];
    float logprobs[MIX_LENGTH];
    int ranks[MIX_LENGTH];
    token_logprob candidates[MIX_LENGTH][MIX_CANDIDATES];
    int n_candidates[MIX_LENGTH];
    int n_tokens;
    token_logprob prompt[MIX_LENGTH], prompt_candidates[MIX_LENGTH][MIX_CANDIDATES]; /* by position */
    int n_prompt_candidates[MIX_LENGTH];
    int next_prompt; /* position that comes next; 0: none was told */
    double score;
    int n_scored, next_row; /* ROWS: position that comes next */
    int n_starts, n_cached, n_finished;
    engine_finish finish;
    char reason[200];
} mix_answer;

typedef struct {
    int chunk, max_sequences, threads;
    int kv_blocks; /* per rank; 0: plenty */
    bool prefix_cache;
    double step_seconds;
    bool twice;      /* the same again, when the cache knows it all: the second answers count */
    bool disturb;    /* hold and let go at random */
    unsigned cancel; /* requests (bits) that are cancelled at some random step */
    unsigned only;   /* requests (bits) to submit; 0: all */
    bool replan;     /* another random plan every few steps, some of them before the last is live; all must be live in the end */
    bool count;      /* ask for the statistics every few steps; they must add up to those of a run that asks for none */
    weights_mode weights;
    replica_choice replicas;
    engine_owners owners;
    const char *topology; /* as JSON; NULL: constants */
    uint64_t seed;        /* of the disturbances, and of the order of submission */
} mix_setting;

typedef struct {
    unsigned long long n_preempted, prefix_hits, n_moved;
    uint64_t plan_epoch, n_counted, n_times_counted;
    bool asked;
} mix_counts;

/* Request i of the mix; prompt: [MIX_LENGTH]. Its lists are static. */
engine_request support_mix_request(int i, int32_t *prompt);
/* [all] Loads the model, runs the mix, checks the events' order; answers [MIX_REQUESTS] on rank 0. */
void support_mix_run(group *g, const char *dir, const mix_setting *setting, mix_answer *answers, mix_counts *counts);
/* The listener by itself, for own loops: arg is an array of mix_answer by request id. */
void support_mix_listen(void *arg, const engine_event *e);
/* Fails the test unless both are the same in every bit. prefix: `a` may have ended earlier. */
void support_mix_compare(const mix_answer *a, const mix_answer *b, bool prefix, const char *what);

#endif
