#include "worker/watch.h"

#include "proto/clock.h"
#include "proto/log.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define LOOK_SECONDS        0.2
#define OWN_GAP_SECONDS     1.0 /* between two looks: longer, and this process itself was not running */
#define SPEAKER_AHEAD       0.8 /* who should say it gets this long before others do */
#define DEADLINE_BEHIND     1.0 /* waits end this long after the watch should have said why */
#define END_BY_HAND_SECONDS 2.0

/* What this process has seen of one rank. */
typedef struct {
    const group_pulse *pulse; /* NULL: on another node */
    uint32_t beat, moves;
    double beat_at, moves_at; /* when they last changed, or were last excused from changing */
} view;

struct watch {
    group *group; /* borrowed */
    group_pulse *own;
    int n_ranks;
    view *views;                 /* [n_ranks] */
    double looked, hang_seconds; /* hang 0: not armed */
    double end_at;               /* 0: no end is near */
    char end_why[1024];
    void (*say)(void *arg, const char *sentence);
    void *say_arg;
    pthread_t thread;
    pthread_mutex_t lock; /* all of the above but group and own */
    pthread_cond_t wake;
    bool running, stopping;
    bool blind;                     /* the group may be gone */
    _Atomic unsigned first_message; /* the leader's messages before watch_arm() */
};

void watch_tie_to_parent(void)
{
    pid_t parent = getppid();
    if (parent == 0)
        return; /* it lives in another PID namespace: its end is not told anyway */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1); /* it ended in between, and the signal with it */
}

/* ---- looking ---- */

static bool anybody_busy(const watch *w)
{
    for (int r = 0; r < w->n_ranks; r++)
        if (w->views[r].pulse && atomic_load_explicit(&w->views[r].pulse->state, memory_order_relaxed) != RANK_IDLE)
            return true;
    return false;
}

/* Ranks on other nodes: while the leader gets from one message to the next, all ranks have done their part. */
static void look_far(watch *w, view *v, double now, bool busy)
{
    uint32_t messages = atomic_load_explicit(&w->own->messages, memory_order_relaxed);
    if (!busy || messages != v->moves)
        v->beat_at = v->moves_at = now;
    v->moves = messages;
}

static void look_at(view *v, double now, bool busy)
{
    uint32_t beat = atomic_load_explicit(&v->pulse->beat, memory_order_relaxed);
    uint32_t moves = atomic_load_explicit(&v->pulse->moves, memory_order_relaxed);
    uint32_t state = atomic_load_explicit(&v->pulse->state, memory_order_relaxed);
    if (!busy || beat != v->beat)
        v->beat_at = now;
    if (!busy || moves != v->moves || state != RANK_WORKING)
        v->moves_at = now;
    v->beat = beat;
    v->moves = moves;
}

static void look_around(watch *w, double now)
{
    bool excuse = now - w->looked > OWN_GAP_SECONDS, busy = anybody_busy(w);
    w->looked = now;
    for (int r = 0; r < w->n_ranks; r++) {
        view *v = &w->views[r];
        if (v->pulse)
            look_at(v, now, busy && !excuse);
        else
            look_far(w, v, now, busy && !excuse);
    }
}

/* ---- judging ---- */

static void end_job(watch *w, double now, double seconds, const char *sentence)
{
    if (w->end_at > 0)
        return;
    w->end_at = now + seconds;
    snprintf(w->end_why, sizeof w->end_why, "%s", sentence);
    group_give_up(sentence);
}

static void end_by_hand(watch *w)
{
    log_line("%s", w->end_why);
    if (w->say)
        w->say(w->say_arg, w->end_why);
    _exit(1);
}

/* The first rank of this node but `silent`: rank 0 where it can, which reaches the coordinator. */
static int speaker_beside(const watch *w, int silent)
{
    int r = 0;
    while (r < w->n_ranks && (r == silent || !w->views[r].pulse))
        r++;
    return r;
}

static void accuse(watch *w, int rank, double now, bool ago, double seconds)
{
    char sentence[512];
    snprintf(sentence, sizeof sentence, "rank %d (pid %d, host %s) %s %.1f s%s, in step %u", rank, group_pid(w->group, rank),
             group_host(w->group, rank), ago ? "was last heard" : "has stood still for", seconds, ago ? " ago" : "",
             watch_step(w));
    end_job(w, now, END_BY_HAND_SECONDS, sentence);
}

static void judge(watch *w, double now)
{
    int own = group_rank(w->group);
    for (int r = 0; r < w->n_ranks && w->end_at == 0; r++) {
        const view *v = &w->views[r];
        if (!v->pulse)
            continue;
        double silent = now - v->beat_at, still = now - v->moves_at;
        if (silent > w->hang_seconds + (speaker_beside(w, r) == own ? 0 : SPEAKER_AHEAD))
            accuse(w, r, now, true, silent);
        else if (still > w->hang_seconds + (r == own ? 0 : SPEAKER_AHEAD))
            accuse(w, r, now, false, still);
        if (w->end_at > 0 && r == own)
            end_by_hand(w); /* the main thread is what stands still: it will not come */
    }
}

/* ---- the thread ---- */

static void sleep_a_while(watch *w)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += (long)(LOOK_SECONDS * 1e9);
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    pthread_cond_timedwait(&w->wake, &w->lock, &t);
}

static void *run(void *arg)
{
    watch *w = arg;
    pthread_mutex_lock(&w->lock);
    while (!w->stopping) {
        double now = clock_seconds();
        if (!w->blind) {
            atomic_fetch_add_explicit(&w->own->beat, 1, memory_order_relaxed);
            look_around(w, now);
            if (w->hang_seconds > 0)
                judge(w, now);
        }
        if (w->end_at > 0 && now > w->end_at)
            end_by_hand(w);
        sleep_a_while(w);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

static status start_thread(watch *w)
{
    /* Signals are for the main thread. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&w->thread, NULL, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return status_fail(STATUS_IO, "cannot start the watching thread: %s", strerror(error));
    w->running = true;
    return STATUS_OK;
}

status watch_start(group *g, watch **out)
{
    watch *w = calloc(1, sizeof *w);
    if (!w)
        return status_fail(STATUS_NO_MEMORY, "no memory for the watch");
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    w->group = g;
    w->own = group_pulse_of(g, group_rank(g));
    w->n_ranks = group_size(g);
    w->looked = clock_seconds();
    w->views = calloc((size_t)w->n_ranks, sizeof *w->views);
    status st = w->views ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the watch");
    for (int r = 0; st == STATUS_OK && r < w->n_ranks; r++)
        w->views[r] = (view){.pulse = group_pulse_of(g, r), .beat_at = w->looked, .moves_at = w->looked};
    if (st == STATUS_OK)
        st = start_thread(w);
    if (st != STATUS_OK) {
        watch_stop(w);
        return st;
    }
    *out = w;
    return STATUS_OK;
}

void watch_stop(watch *w)
{
    if (!w)
        return;
    if (w->running) {
        pthread_mutex_lock(&w->lock);
        w->stopping = true;
        pthread_cond_signal(&w->wake);
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->thread, NULL);
    }
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
    free(w->views);
    free(w);
}

unsigned watch_step(const watch *w)
{
    return atomic_load_explicit(&w->own->messages, memory_order_relaxed) - w->first_message;
}

void watch_arm(watch *w, double hang_seconds)
{
    w->first_message = atomic_load_explicit(&w->own->messages, memory_order_relaxed);
    group_set_deadline(w->group, hang_seconds + DEADLINE_BEHIND);
    pthread_mutex_lock(&w->lock);
    w->hang_seconds = hang_seconds;
    for (int r = 0; r < w->n_ranks; r++)
        w->views[r].beat_at = w->views[r].moves_at = clock_seconds();
    pthread_mutex_unlock(&w->lock);
}

void watch_set_last_words(watch *w, void (*say)(void *arg, const char *sentence), void *arg)
{
    pthread_mutex_lock(&w->lock);
    w->say = say;
    w->say_arg = arg;
    pthread_mutex_unlock(&w->lock);
}

void watch_end_job(watch *w, const char *sentence)
{
    pthread_mutex_lock(&w->lock);
    end_job(w, clock_seconds(), END_BY_HAND_SECONDS, sentence);
    pthread_mutex_unlock(&w->lock);
}

void watch_end_within(watch *w, double seconds, const char *sentence)
{
    pthread_mutex_lock(&w->lock);
    w->blind = true;
    w->end_at = clock_seconds() + seconds;
    snprintf(w->end_why, sizeof w->end_why, "%s", sentence);
    pthread_mutex_unlock(&w->lock);
}

void watch_silence(watch *w, uint32_t *ms_of_rank)
{
    pthread_mutex_lock(&w->lock);
    double now = clock_seconds();
    for (int r = 0; r < w->n_ranks; r++) {
        const view *v = &w->views[r];
        double last = v->beat_at < v->moves_at ? v->beat_at : v->moves_at, ms = 1e3 * (now - last);
        /* A look is a fifth of a second old at most; less than two of them is no silence. */
        ms_of_rank[r] = ms < 2e3 * LOOK_SECONDS ? 0 : (uint32_t)ms;
    }
    pthread_mutex_unlock(&w->lock);
}
