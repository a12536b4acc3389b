#include "worker/expert_copies.h"

#include "proto/clock.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define LOADER_NICE   10
#define LONGEST_SLEEP 0.02 /* seconds: so soon the loader notices that a wish has changed */

struct expert_copies {
    checkpoint *file;         /* borrowed */
    const int *layer_numbers; /* [n_layers] borrowed */
    int n_layers, n_experts;
    size_t n; /* n_layers * n_experts */

    pthread_t thread;
    bool has_thread;
    pthread_mutex_t lock;
    pthread_cond_t news;
    /* under the lock */
    unsigned char *live, *wish; /* [n] */
    unsigned char *there;       /* [n] in memory, the loader's word */
    mlp_weights *weights;       /* [n] of what is there; data NULL: as it was bound at the start */
    size_t cursor;              /* the loader looks on from here */
    bool wishing, resting, stopping;
    uint64_t rate;
    char why[256];
    /* told without it */
    _Atomic uint64_t loaded, total;
    _Atomic uint32_t wishes; /* rises with every change of the wish */
    _Atomic bool ready, failed;

    /* the loader's own */
    uint32_t wish_at_work;
    double next_at; /* clock: no byte before this */
};

/* ---- life ---- */

status expert_copies_create(checkpoint *file, const model_config *config, const int *layer_numbers, const unsigned char *live,
                            expert_copies **out)
{
    expert_copies *c = calloc(1, sizeof *c);
    if (!c)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of this rank's experts");
    c->file = file;
    c->layer_numbers = layer_numbers;
    c->n_layers = config->n_moe_layers;
    c->n_experts = config->n_experts;
    c->n = (size_t)c->n_layers * (size_t)c->n_experts;
    c->resting = true;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->news, NULL);
    c->live = calloc(c->n + 1, 1);
    c->wish = calloc(c->n + 1, 1);
    c->there = calloc(c->n + 1, 1);
    c->weights = calloc(c->n + 1, sizeof *c->weights);
    if (!c->live || !c->wish || !c->there || !c->weights) {
        expert_copies_destroy(c);
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of this rank's experts");
    }
    memcpy(c->live, live, c->n);
    memcpy(c->there, live, c->n);
    *out = c;
    return STATUS_OK;
}

void expert_copies_destroy(expert_copies *c)
{
    if (!c)
        return;
    if (c->has_thread) {
        pthread_mutex_lock(&c->lock);
        c->stopping = true;
        atomic_fetch_add(&c->wishes, 1);
        pthread_cond_signal(&c->news);
        pthread_mutex_unlock(&c->lock);
        pthread_join(c->thread, NULL);
    }
    for (size_t i = 0; c->there && i < c->n; i++)
        if (c->there[i] && c->weights[i].gate.data) /* all but what the checkpoint was bound with */
            checkpoint_drop_expert(c->file, &c->weights[i]);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->news);
    free(c->live);
    free(c->wish);
    free(c->there);
    free(c->weights);
    free(c);
}

/* ---- the loader ---- */

/* Keeps to the rate; false when the wish has changed meanwhile. */
static bool keep_pace(void *arg, size_t bytes)
{
    expert_copies *c = arg;
    atomic_fetch_add_explicit(&c->loaded, bytes, memory_order_relaxed);
    c->next_at += (double)bytes / (double)c->rate;
    for (;;) {
        if (atomic_load(&c->wishes) != c->wish_at_work)
            return false;
        double left = c->next_at - clock_seconds();
        if (left <= 0)
            break;
        double sleep = left < LONGEST_SLEEP ? left : LONGEST_SLEEP;
        nanosleep(&(struct timespec){.tv_nsec = (long)(sleep * 1e9)}, NULL);
    }
    double now = clock_seconds();
    c->next_at = c->next_at > now - LONGEST_SLEEP ? c->next_at : now; /* time lost is not made up for by a burst */
    return true;
}

static void give_up(expert_copies *c)
{
    snprintf(c->why, sizeof c->why, "%s", status_message());
    c->wishing = false;
    atomic_store(&c->failed, true);
}

/* With the lock held, which is let go of while bytes move. */
static void load(expert_copies *c, size_t i)
{
    mlp_weights w;
    bool done = false;
    c->wish_at_work = atomic_load(&c->wishes);
    pthread_mutex_unlock(&c->lock);
    uint64_t before = atomic_load(&c->loaded);
    status st = checkpoint_load_expert(c->file, c->layer_numbers[i / (size_t)c->n_experts], (int)(i % (size_t)c->n_experts),
                                       keep_pace, c, &done, &w);
    pthread_mutex_lock(&c->lock);
    bool same = c->wish_at_work == atomic_load(&c->wishes);
    if (st == STATUS_OK && done) {
        c->there[i] = 1;
        c->weights[i] = w;
        if (same) /* in whole experts, whatever pages it took */
            atomic_store(&c->loaded, before + checkpoint_expert_bytes(c->file, c->layer_numbers[i / (size_t)c->n_experts]));
    } else if (st != STATUS_OK && same) {
        give_up(c);
    }
}

static void drop(expert_copies *c, size_t i)
{
    mlp_weights w = c->weights[i];
    c->there[i] = 0;
    pthread_mutex_unlock(&c->lock);
    checkpoint_drop_expert(c->file, &w);
    pthread_mutex_lock(&c->lock);
}

/* Something to do from the cursor on? Loads go first: somebody waits for them. */
static bool find_load(expert_copies *c, size_t *at)
{
    for (; c->wishing && c->cursor < c->n; c->cursor++)
        if (c->wish[c->cursor] && !c->there[c->cursor]) {
            *at = c->cursor;
            return true;
        }
    return false;
}

static bool find_drop(const expert_copies *c, size_t *at)
{
    for (size_t i = 0; i < c->n; i++)
        if (c->there[i] && !c->live[i] && !(c->wishing && c->wish[i])) {
            *at = i;
            return true;
        }
    return false;
}

static void *run_loader(void *arg)
{
    expert_copies *c = arg;
    size_t i;
    setpriority(PRIO_PROCESS, (id_t)gettid(), LOADER_NICE); /* of this thread alone */
    pthread_mutex_lock(&c->lock);
    while (!c->stopping) {
        if (find_load(c, &i)) {
            load(c, i);
            continue;
        }
        if (c->wishing)
            atomic_store(&c->ready, true);
        if (find_drop(c, &i)) {
            drop(c, i);
            continue;
        }
        c->resting = true;
        pthread_cond_wait(&c->news, &c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* ---- the step loop's side ---- */

/* With the lock held. */
static void wake(expert_copies *c)
{
    c->resting = false;
    c->cursor = 0;
    pthread_cond_signal(&c->news);
}

/* Signals are the main thread's business. */
static status start_thread(expert_copies *c)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    c->next_at = clock_seconds();
    c->has_thread = pthread_create(&c->thread, NULL, run_loader, c) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return c->has_thread ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no thread to load experts with");
}

status expert_copies_wish(expert_copies *c, const unsigned char *wanted, uint64_t bytes_per_second)
{
    if (!c->has_thread)
        TRY(start_thread(c));
    pthread_mutex_lock(&c->lock);
    atomic_fetch_add(&c->wishes, 1);
    memcpy(c->wish, wanted, c->n);
    c->wishing = true;
    c->rate = bytes_per_second ? bytes_per_second : EXPERT_COPIES_RATE;
    uint64_t total = 0;
    for (size_t i = 0; i < c->n; i++)
        if (c->wish[i] && !c->there[i])
            total += checkpoint_expert_bytes(c->file, c->layer_numbers[i / (size_t)c->n_experts]);
    atomic_store(&c->loaded, 0);
    atomic_store(&c->total, total);
    atomic_store(&c->ready, total == 0);
    atomic_store(&c->failed, false);
    c->why[0] = '\0';
    wake(c);
    pthread_mutex_unlock(&c->lock);
    return STATUS_OK;
}

void expert_copies_forget(expert_copies *c)
{
    if (!c->has_thread)
        return;
    pthread_mutex_lock(&c->lock);
    atomic_fetch_add(&c->wishes, 1);
    c->wishing = false;
    atomic_store(&c->ready, false);
    wake(c);
    pthread_mutex_unlock(&c->lock);
}

expert_copies_state expert_copies_progress(const expert_copies *c)
{
    uint64_t total = atomic_load(&c->total), loaded = atomic_load_explicit(&c->loaded, memory_order_relaxed);
    return (expert_copies_state){.loaded = loaded < total ? loaded : total,
                                 .total = total,
                                 .ready = atomic_load(&c->ready),
                                 .failed = atomic_load(&c->failed)};
}

const char *expert_copies_why(const expert_copies *c)
{
    return atomic_load(&c->failed) ? c->why : "";
}

void expert_copies_flip(expert_copies *c)
{
    pthread_mutex_lock(&c->lock);
    assert(c->wishing && atomic_load(&c->ready));
    for (size_t i = 0; i < c->n; i++) {
        int layer = c->layer_numbers[i / (size_t)c->n_experts], expert = (int)(i % (size_t)c->n_experts);
        if (c->wish[i] && !c->live[i])
            checkpoint_place_expert(c->file, layer, expert, &c->weights[i]);
        if (c->live[i] && !c->wish[i])
            c->weights[i] = checkpoint_place_expert(c->file, layer, expert, NULL);
    }
    memcpy(c->live, c->wish, c->n);
    atomic_fetch_add(&c->wishes, 1);
    c->wishing = false;
    atomic_store(&c->ready, false);
    wake(c);
    pthread_mutex_unlock(&c->lock);
}

bool expert_copies_at_rest(expert_copies *c)
{
    pthread_mutex_lock(&c->lock);
    bool rests = c->resting;
    pthread_mutex_unlock(&c->lock);
    return rests;
}
