#include "cluster/journal_writer.h"

#include "proto/bytes.h"
#include "proto/clock.h"
#include "proto/hash.h"
#include "proto/log.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* A request that the file holds. Freed by the thread when its FORGET has passed; nothing behind that in the queue names it. */
typedef struct entry {
    struct entry *next;
    uint64_t hash;
    int64_t number;
    atomic_bool broken; /* a piece was lost: nothing more of it is written */
    char id[];
} entry;

/* One who waits for a commit. An accept's data stay where they are: its caller waits. */
typedef struct {
    entry *accepted; /* NULL: only waits */
    const void *spec;
    size_t size;
    bool done;
    status st;
    char sentence[512];
} waiter;

typedef enum { QUEUED_WAITER, QUEUED_TOKENS, QUEUED_FINISH, QUEUED_FORGET, QUEUED_CUT } queued_kind;

typedef struct { /* followed by `size` bytes */
    queued_kind kind;
    int sequence, first, n;
    uint64_t launch;
    int64_t number; /* CUT */
    entry *of;      /* TOKENS, FINISH, FORGET */
    waiter *waiter;
    size_t size;
} queued;

struct journal_writer {
    journal_store *store; /* the thread's, once it runs */
    journal_writer_options options;
    char *path;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    bool started, closing, urgent;
    bytes_writer queue; /* guarded by lock, as everything up to `told` */
    double first_queued;
    entry **buckets;
    size_t n_buckets, n_entries;
    uint64_t seed;
    journal_launch launch;
    bool launch_unsaved;
    bool failing;
    double failing_since;
    size_t n_broken;
    char trouble[600];
    char told[600];        /* the reader's of journal_writer_trouble() */
    bytes_writer batch;    /* the thread's */
    bytes_writer unwanted; /* the thread's: numbers of requests to forget, kept until a commit has succeeded */
    int64_t next_number;   /* the thread's */
};

/* ---- which requests the file holds ---- */

static uint64_t hash_id(const journal_writer *w, const char *id)
{
    uint64_t h = hash_bytes(w->seed, id, strlen(id));
    return h ^ (h >> 29);
}

static entry **find_place(journal_writer *w, const char *id, uint64_t hash)
{
    entry **at = &w->buckets[hash & (w->n_buckets - 1)];
    while (*at && ((*at)->hash != hash || strcmp((*at)->id, id) != 0))
        at = &(*at)->next;
    return at;
}

static entry *find(journal_writer *w, const char *id)
{
    return *find_place(w, id, hash_id(w, id));
}

/* Chains only get longer where memory for more buckets is missing. */
static void grow_buckets(journal_writer *w)
{
    size_t n = w->n_buckets * 2;
    entry **wider = w->n_entries < w->n_buckets ? NULL : calloc(n, sizeof(entry *));
    if (!wider)
        return;
    for (size_t i = 0; i < w->n_buckets; i++)
        for (entry *e = w->buckets[i], *next; e; e = next) {
            next = e->next;
            e->next = wider[e->hash & (n - 1)];
            wider[e->hash & (n - 1)] = e;
        }
    free(w->buckets);
    w->buckets = wider;
    w->n_buckets = n;
}

static void insert(journal_writer *w, entry *e)
{
    grow_buckets(w);
    entry **at = &w->buckets[e->hash & (w->n_buckets - 1)];
    e->next = *at;
    *at = e;
    w->n_entries++;
}

static entry *make_entry(const journal_writer *w, const char *id)
{
    size_t size = strlen(id) + 1;
    entry *e = calloc(1, sizeof *e + size);
    if (!e)
        return NULL;
    memcpy(e->id, id, size);
    e->hash = hash_id(w, id);
    return e;
}

static void break_entry(journal_writer *w, entry *e)
{
    w->n_broken += !atomic_exchange(&e->broken, true);
}

/* ---- the queue (callers hold the lock) ---- */

static void put_queued(journal_writer *w, const queued *q, const void *data)
{
    size_t before = w->queue.size;
    unsigned char *room = bytes_extend(&w->queue, sizeof *q + q->size);
    if (!room) { /* what was gathered so far stays good; only this piece is lost */
        w->queue.failed = false;
        if (q->of)
            break_entry(w, q->of);
        return;
    }
    memcpy(room, q, sizeof *q);
    if (q->size)
        memcpy(room + sizeof *q, data, q->size);
    if (before == 0) {
        w->first_queued = clock_seconds();
        pthread_cond_signal(&w->work);
    }
}

static void start_trouble(journal_writer *w, const char *sentence)
{
    if (w->failing)
        return;
    w->failing = true;
    w->failing_since = clock_seconds();
    snprintf(w->trouble, sizeof w->trouble, "%s; serving goes on, but what is missing would be computed again after a restart",
             sentence);
}

static void put_output(journal_writer *w, const char *id, queued q, const void *data)
{
    pthread_mutex_lock(&w->lock);
    entry *e = find(w, id);
    if (e && !atomic_load(&e->broken)) {
        q.of = e;
        q.launch = w->launch.launch;
        if (w->queue.size + q.size > w->options.queue_bytes) {
            char sentence[400];
            snprintf(sentence, sizeof sentence, "%.300s: the disk does not keep up (%zu bytes wait for it)", w->path,
                     w->queue.size);
            start_trouble(w, sentence);
            break_entry(w, e);
        } else {
            put_queued(w, &q, data);
        }
    }
    pthread_mutex_unlock(&w->lock);
}

void journal_writer_tokens(journal_writer *w, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    put_output(w, id, (queued){.kind = QUEUED_TOKENS, .sequence = sequence, .first = first, .n = n, .size = size}, records);
}

void journal_writer_finish(journal_writer *w, const char *id, int sequence, const void *how, size_t size)
{
    put_output(w, id, (queued){.kind = QUEUED_FINISH, .sequence = sequence, .size = size}, how);
}

void journal_writer_forget(journal_writer *w, const char *id)
{
    pthread_mutex_lock(&w->lock);
    entry **at = find_place(w, id, hash_id(w, id)), *e = *at;
    if (e) {
        size_t before = w->queue.size;
        put_queued(w, &(queued){.kind = QUEUED_FORGET, .of = e}, "");
        if (w->queue.size > before) { /* else it stays, broken, until a later forget finds memory */
            *at = e->next;
            w->n_entries--;
        }
    }
    pthread_mutex_unlock(&w->lock);
}

void journal_writer_note_launch(journal_writer *w, const journal_launch *launch)
{
    pthread_mutex_lock(&w->lock);
    w->launch = *launch;
    w->launch_unsaved = true;
    if (w->queue.size == 0)
        w->first_queued = clock_seconds();
    pthread_cond_signal(&w->work);
    pthread_mutex_unlock(&w->lock);
}

void journal_writer_last_launch(journal_writer *w, journal_launch *out)
{
    pthread_mutex_lock(&w->lock);
    *out = w->launch;
    pthread_mutex_unlock(&w->lock);
}

/* Returns when everything queued before is on disk, or could not be. */
static status wait_commit(journal_writer *w, waiter *me)
{
    pthread_mutex_lock(&w->lock);
    size_t before = w->queue.size;
    put_queued(w, &(queued){.kind = QUEUED_WAITER, .waiter = me, .launch = w->launch.launch}, "");
    bool queued_up = w->queue.size > before;
    if (queued_up) {
        w->urgent = true;
        pthread_cond_signal(&w->work);
        while (!me->done)
            pthread_cond_wait(&w->done, &w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    if (!queued_up)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to queue a request", w->path);
    return me->st == STATUS_OK ? STATUS_OK : status_fail(me->st, "%s", me->sentence);
}

status journal_writer_accept(journal_writer *w, const char *id, const void *spec, size_t size)
{
    waiter me = {.accepted = make_entry(w, id), .spec = spec, .size = size};
    if (!me.accepted)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a request", w->path);
    status st = wait_commit(w, &me);
    if (st != STATUS_OK) /* else it has become the journal's */
        free(me.accepted);
    return st;
}

/* ---- the thread ---- */

static void fail_waiter(waiter *to, status st)
{
    to->st = st;
    snprintf(to->sentence, sizeof to->sentence, "%s", status_message());
}

static status apply_waiter(journal_writer *w, const queued *q)
{
    waiter *to = q->waiter;
    if (!to->accepted)
        return STATUS_OK;
    to->accepted->number = w->next_number++;
    status st = journal_store_apply(w->store, &(journal_op){.kind = JOURNAL_ACCEPT,
                                                            .request = to->accepted->number,
                                                            .launch = q->launch,
                                                            .id = to->accepted->id,
                                                            .data = to->spec,
                                                            .size = to->size});
    if (st != STATUS_BAD_INPUT)
        return st;
    fail_waiter(to, st); /* its own fault: the others' go on */
    return STATUS_OK;
}

static status apply_queued(journal_writer *w, const queued *q, const void *data)
{
    journal_op op = {.sequence = q->sequence, .first = q->first, .n = q->n, .launch = q->launch, .data = data, .size = q->size};
    switch (q->kind) {
    case QUEUED_WAITER:
        return apply_waiter(w, q);
    case QUEUED_TOKENS:
    case QUEUED_FINISH:
        if (atomic_load(&q->of->broken))
            return STATUS_OK;
        op.kind = q->kind == QUEUED_TOKENS ? JOURNAL_TOKENS : JOURNAL_FINISH;
        op.request = q->of->number;
        break;
    case QUEUED_FORGET:
        op.kind = JOURNAL_FORGET;
        op.request = q->of->number;
        break;
    case QUEUED_CUT:
        op.kind = JOURNAL_CUT;
        op.request = q->number;
        break;
    }
    return journal_store_apply(w->store, &op);
}

static bool next_queued(bytes_reader *r, queued *q, const void **data)
{
    if (r->at == r->end)
        return false;
    bytes_get(r, q, sizeof *q);
    *data = bytes_take(r, q->size);
    return true;
}

static bytes_reader read_batch(const journal_writer *w)
{
    return (bytes_reader){.at = w->batch.data, .end = w->batch.data + w->batch.size};
}

/* Requests whose forgetting an earlier, failed transaction has left behind. */
static status apply_unwanted(journal_writer *w)
{
    bytes_reader r = {.at = w->unwanted.data, .end = w->unwanted.data + w->unwanted.size};
    while (r.at != r.end) {
        int64_t number;
        bytes_get(&r, &number, sizeof number);
        TRY(journal_store_apply(w->store, &(journal_op){.kind = JOURNAL_FORGET, .request = number}));
    }
    return STATUS_OK;
}

static status write_all(journal_writer *w, const journal_launch *launch)
{
    bytes_reader r = read_batch(w);
    queued q;
    const void *data;
    TRY(journal_store_begin(w->store));
    if (launch)
        TRY(journal_store_launch(w->store, launch));
    TRY(apply_unwanted(w));
    while (next_queued(&r, &q, &data))
        TRY(apply_queued(w, &q, data));
    return journal_store_commit(w->store);
}

static void settle_waiter(journal_writer *w, waiter *to, status st)
{
    if (st != STATUS_OK)
        fail_waiter(to, st);
    if (to->accepted && to->st == STATUS_OK)
        insert(w, to->accepted);
    to->done = true;
}

/* What a transaction's end means to each piece; holds the lock. */
static void settle(journal_writer *w, status st)
{
    bytes_reader r = read_batch(w);
    queued q;
    const void *data;
    if (st == STATUS_OK)
        bytes_reset(&w->unwanted);
    while (next_queued(&r, &q, &data)) {
        if (q.kind == QUEUED_WAITER)
            settle_waiter(w, q.waiter, st);
        else if (st != STATUS_OK && (q.kind == QUEUED_TOKENS || q.kind == QUEUED_FINISH))
            break_entry(w, q.of);
        else if (q.kind == QUEUED_FORGET) {
            if (st != STATUS_OK)
                bytes_put(&w->unwanted, &q.of->number, sizeof q.of->number);
            free(q.of);
        }
    }
    bytes_reset(&w->batch);
    pthread_cond_broadcast(&w->done);
    if (st != STATUS_OK) {
        start_trouble(w, status_message());
    } else if (w->failing) {
        log_line("%s: writing again after %.1f s; %zu running requests are kept only in part", w->path,
                 clock_seconds() - w->failing_since, w->n_broken);
        w->failing = false;
        w->n_broken = 0;
    }
}

static void commit_batch(journal_writer *w)
{
    journal_launch launch = w->launch;
    bool with_launch = w->launch_unsaved;
    bytes_writer swapped = w->queue;
    w->queue = w->batch;
    w->batch = swapped;
    w->urgent = false;
    w->launch_unsaved = false;
    pthread_mutex_unlock(&w->lock);
    status st = write_all(w, with_launch ? &launch : NULL);
    if (st != STATUS_OK)
        journal_store_rollback(w->store);
    pthread_mutex_lock(&w->lock);
    w->launch_unsaved |= with_launch && st != STATUS_OK;
    settle(w, st);
    if (st == STATUS_OK && !w->urgent) { /* nobody waits: time to clear up */
        pthread_mutex_unlock(&w->lock);
        journal_store_tidy(w->store);
        pthread_mutex_lock(&w->lock);
    }
}

/* Holds the lock. Returns when there is something to write: at once for who waits, `commit_ms` after the first piece, or when the
 * lease wants its heartbeat. */
static void wait_work(journal_writer *w, double beat_at)
{
    for (;;) {
        bool anything = w->queue.size > 0 || w->launch_unsaved;
        double at = beat_at, collected = w->first_queued + w->options.commit_ms * 1e-3;
        if (anything && !w->failing && collected < at)
            at = collected;
        if (w->urgent || w->closing || clock_seconds() >= at)
            return;
        struct timespec until = {.tv_sec = (time_t)at, .tv_nsec = (long)((at - (double)(time_t)at) * 1e9)};
        pthread_cond_timedwait(&w->work, &w->lock, &until);
    }
}

static void *run_writer(void *arg)
{
    journal_writer *w = arg;
    pthread_mutex_lock(&w->lock);
    for (bool last = false; !last;) {
        wait_work(w, clock_seconds() + w->options.beat_seconds);
        last = w->closing;
        commit_batch(w);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ---- opened and closed ---- */

static status remember(void *arg, int64_t number, const char *id)
{
    journal_writer *w = arg;
    entry *e = make_entry(w, id);
    if (!e)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its requests", w->path);
    e->number = number;
    insert(w, e);
    if (number >= w->next_number)
        w->next_number = number + 1;
    return STATUS_OK;
}

static status start_writer(journal_writer *w)
{
    TRY(journal_store_open(w->path, &w->options.self, w->options.lease_seconds, &w->store));
    TRY(journal_store_last_launch(w->store, &w->launch));
    TRY(journal_store_ids(w->store, remember, w));
    w->started = true; /* before the thread is: it reads what lies beside */
    if (pthread_create(&w->thread, NULL, run_writer, w) == 0)
        return STATUS_OK;
    w->started = false;
    return status_fail(STATUS_NO_MEMORY, "%s: no thread for the journal", w->path);
}

status journal_writer_open(const journal_writer_options *options, journal_writer **out)
{
    enum { BUCKETS = 256 };
    journal_writer *w = calloc(1, sizeof *w);
    if (w) {
        w->path = strdup(options->path);
        w->buckets = calloc(BUCKETS, sizeof(entry *));
    }
    if (!w || !w->path || !w->buckets) {
        if (w)
            free(w->path), free(w->buckets);
        free(w);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for the journal", options->path);
    }
    w->options = *options;
    w->n_buckets = BUCKETS;
    w->next_number = 1;
    if (getrandom(&w->seed, sizeof w->seed, GRND_NONBLOCK) < 0)
        w->seed = 0xcbf29ce484222325u; /* only makes chosen collisions harder */
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, &monotonic);
    pthread_cond_init(&w->done, &monotonic);
    pthread_condattr_destroy(&monotonic);
    status st = start_writer(w);
    if (st == STATUS_OK)
        *out = w;
    else
        journal_writer_close(w);
    return st;
}

void journal_writer_close(journal_writer *w)
{
    if (!w)
        return;
    if (w->started) {
        pthread_mutex_lock(&w->lock);
        w->closing = true;
        pthread_cond_signal(&w->work);
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->thread, NULL);
    }
    journal_store_close(w->store);
    for (size_t i = 0; i < w->n_buckets; i++)
        for (entry *e = w->buckets[i], *next; e; e = next) {
            next = e->next;
            free(e);
        }
    bytes_clear(&w->queue);
    bytes_clear(&w->batch);
    bytes_clear(&w->unwanted);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->work);
    pthread_cond_destroy(&w->done);
    free(w->buckets);
    free(w->path);
    free(w);
}

/* ---- read again ---- */

static void cut_tail(void *arg, int64_t request, int sequence, int first)
{
    journal_writer *w = arg;
    log_line("%s: tokens from %d on are missing in sequence %d of a request; they will be computed again", w->path, first,
             sequence);
    pthread_mutex_lock(&w->lock);
    put_queued(w, &(queued){.kind = QUEUED_CUT, .number = request, .sequence = sequence, .first = first}, "");
    pthread_mutex_unlock(&w->lock);
}

status journal_writer_replay(journal_writer *w, const journal_visitor *visitor, void *arg)
{
    waiter me = {0};
    TRY(wait_commit(w, &me));
    TRY(journal_store_replay(w->path, visitor, arg, cut_tail, w));
    me = (waiter){0};
    return wait_commit(w, &me);
}

const char *journal_writer_trouble(journal_writer *w)
{
    pthread_mutex_lock(&w->lock);
    memcpy(w->told, w->trouble, sizeof w->told);
    w->trouble[0] = '\0';
    pthread_mutex_unlock(&w->lock);
    return w->told;
}
