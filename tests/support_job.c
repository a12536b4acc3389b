#include "tests/support_job.h"

#include "proto/clock.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static void on_state(void *arg, job_state state, uint64_t launch, const char *sentence)
{
    job_log *log = arg;
    pthread_mutex_lock(&log->lock);
    if (log->n_states < JOB_LOG_STATES) {
        log->states[log->n_states].state = state;
        log->states[log->n_states].launch = launch;
        log->states[log->n_states].at = clock_seconds();
        snprintf(log->states[log->n_states++].sentence, sizeof log->states[0].sentence, "%s", sentence);
    }
    pthread_cond_broadcast(&log->changed);
    pthread_mutex_unlock(&log->lock);
}

static void on_ready(void *arg, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    job_log *log = arg;
    if (log->on_ready)
        log->on_ready(log);
    pthread_mutex_lock(&log->lock);
    log->n_ready++;
    log->n_ranks = (int)hello->n_ranks;
    for (unsigned r = 0; r < hello->n_ranks && r < 64; r++)
        log->pids[r] = hello->pid_of_rank[r];
    snprintf(log->isa, sizeof log->isa, "%s", ready->isa);
    snprintf(log->plan_name, sizeof log->plan_name, "%s", ready->plan_name);
    pthread_cond_broadcast(&log->changed);
    pthread_mutex_unlock(&log->lock);
}

static void on_report(void *arg, const Convoke__Control__Report *report)
{
    job_log *log = arg;
    pthread_mutex_lock(&log->lock);
    log->n_reports++;
    for (size_t i = 0; i < report->n_events; i++) {
        const Convoke__Control__Event *e = report->events[i];
        log->n_finished += e->kind == CONVOKE__CONTROL__EVENT_KIND__FINISHED;
        if (e->kind == CONVOKE__CONTROL__EVENT_KIND__TOKEN && e->n_tokens == 1 && log->n_tokens < JOB_LOG_TOKENS) {
            log->tokens[log->n_tokens].id = e->id;
            log->tokens[log->n_tokens++].token = e->tokens[0]->token;
        }
    }
    pthread_cond_broadcast(&log->changed);
    pthread_mutex_unlock(&log->lock);
}

const job_listener job_log_listener = {.state = on_state, .ready = on_ready, .report = on_report};

void job_log_init(job_log *log)
{
    memset(log, 0, sizeof *log);
    pthread_mutex_init(&log->lock, NULL);
    pthread_cond_init(&log->changed, NULL);
}

void job_log_destroy(job_log *log)
{
    pthread_mutex_destroy(&log->lock);
    pthread_cond_destroy(&log->changed);
}

static int count_states(const job_log *log, job_state state)
{
    int n = 0;
    for (int i = 0; i < log->n_states; i++)
        n += log->states[i].state == state;
    return n;
}

typedef enum { WAIT_READY, WAIT_STATE, WAIT_FINISHED } wait_kind;

static bool there(const job_log *log, wait_kind kind, job_state state, int n)
{
    return (kind == WAIT_READY ? log->n_ready : kind == WAIT_STATE ? count_states(log, state) : log->n_finished) >= n;
}

static bool wait_for(job_log *log, wait_kind kind, job_state state, int n, double seconds)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += (time_t)seconds;
    end.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (end.tv_nsec >= 1000000000) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000;
    }
    int rc = 0;
    pthread_mutex_lock(&log->lock);
    while (!there(log, kind, state, n) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&log->changed, &log->lock, &end);
    bool fine = there(log, kind, state, n);
    if (!fine)
        for (int i = 0; i < log->n_states; i++)
            fprintf(stderr, "state %d of launch %d: %s\n", (int)log->states[i].state, (int)log->states[i].launch,
                    log->states[i].sentence);
    pthread_mutex_unlock(&log->lock);
    return fine;
}

bool job_log_wait_ready(job_log *log, int n, double seconds)
{
    return wait_for(log, WAIT_READY, JOB_READY, n, seconds);
}

bool job_log_wait_state(job_log *log, job_state state, int n, double seconds)
{
    return wait_for(log, WAIT_STATE, state, n, seconds);
}

bool job_log_wait_finished(job_log *log, int n, double seconds)
{
    return wait_for(log, WAIT_FINISHED, JOB_READY, n, seconds);
}

static int find_last(const job_log *log, job_state state)
{
    int i = log->n_states - 1;
    while (i >= 0 && log->states[i].state != state)
        i--;
    return i;
}

const char *job_log_sentence(job_log *log, job_state state)
{
    static char text[600];
    pthread_mutex_lock(&log->lock);
    int i = find_last(log, state);
    snprintf(text, sizeof text, "%s", i >= 0 ? log->states[i].sentence : "");
    pthread_mutex_unlock(&log->lock);
    return text;
}

double job_log_time(job_log *log, job_state state)
{
    pthread_mutex_lock(&log->lock);
    int i = find_last(log, state);
    double at = i >= 0 ? log->states[i].at : 0;
    pthread_mutex_unlock(&log->lock);
    return at;
}

bool job_log_submit(job_log *log, uint64_t id, int n_new)
{
    Convoke__Control__Sequence s = CONVOKE__CONTROL__SEQUENCE__INIT, *list[1] = {&s};
    int32_t prompt[1] = {1};
    s.id = id;
    s.tokens = prompt;
    s.n_tokens = 1;
    s.max_new = (uint32_t)n_new;
    s.ignore_eos = true;
    s.owner = -1;
    s.top_p = 1;
    s.repetition_penalty = 1;
    s.seed = id;
    return job_submit(log->job, list, 1);
}
