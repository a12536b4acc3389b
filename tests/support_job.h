/* support_job.h - a job and what it said, for tests: states and tokens are collected, and waited for. */
#ifndef CONVOKE_TESTS_SUPPORT_JOB_H
#define CONVOKE_TESTS_SUPPORT_JOB_H

#include "cluster/job.h"

#include <pthread.h>
#include <stdbool.h>

enum { JOB_LOG_STATES = 256, JOB_LOG_TOKENS = 1 << 16 };

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    job *job;
    /* states in order */
    int n_states;
    struct {
        job_state state;
        uint64_t launch;
        double at;
        char sentence[600];
    } states[JOB_LOG_STATES];
    int n_ready, n_reports, n_finished;
    uint32_t pids[64]; /* of the last Hello */
    int n_ranks;
    char isa[32], plan_name[64];
    int n_tokens;
    struct {
        uint64_t id;
        uint32_t token;
    } tokens[JOB_LOG_TOKENS];
    /* called in ready(), without the lock; NULL: nothing */
    void (*on_ready)(void *log);
} job_log;

extern const job_listener job_log_listener;

void job_log_init(job_log *log);
void job_log_destroy(job_log *log);
/* Waits until at least n launches were ready / n states of a kind were seen / n sequences were finished; false after `seconds`.
 */
bool job_log_wait_ready(job_log *log, int n, double seconds);
bool job_log_wait_state(job_log *log, job_state state, int n, double seconds);
bool job_log_wait_finished(job_log *log, int n, double seconds);
/* The sentence of the last state of a kind, "" for none: static buffer. */
const char *job_log_sentence(job_log *log, job_state state);
double job_log_time(job_log *log, job_state state); /* of the last of a kind */
/* A greedy sequence with n_new tokens to come after one prompt token. */
bool job_log_submit(job_log *log, uint64_t id, int n_new);

#endif
