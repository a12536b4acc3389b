#include "cluster/journal.h"

#include "cluster/journal_writer.h"

#include <pthread.h>
#include <stdlib.h>

enum { QUEUE_BYTES = 64 << 20 };
#define BEAT_SECONDS  2.0
#define LEASE_SECONDS 10.0

/* The two kinds stand behind one table, so that callers need not know whether anything is kept. */
typedef struct {
    status (*accept)(journal *j, const char *id, const void *spec, size_t size);
    void (*tokens)(journal *j, const char *id, int sequence, int first, int n, const void *records, size_t size);
    void (*finish)(journal *j, const char *id, int sequence, const void *how, size_t size);
    void (*forget)(journal *j, const char *id);
    void (*note_launch)(journal *j, const journal_launch *launch);
    void (*last_launch)(journal *j, journal_launch *out);
    status (*replay)(journal *j, const journal_visitor *visitor, void *arg);
    const char *(*trouble)(journal *j);
} journal_kind;

struct journal {
    const journal_kind *kind;
    journal_writer *writer; /* a file's */
    pthread_mutex_t lock;   /* memory's */
    journal_launch launch;
};

/* ---- in memory: requests.c remembers, nobody else ---- */

static status memory_accept(journal *j, const char *id, const void *spec, size_t size)
{
    (void)j, (void)id, (void)spec, (void)size;
    return STATUS_OK;
}

static void memory_tokens(journal *j, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    (void)j, (void)id, (void)sequence, (void)first, (void)n, (void)records, (void)size;
}

static void memory_finish(journal *j, const char *id, int sequence, const void *how, size_t size)
{
    (void)j, (void)id, (void)sequence, (void)how, (void)size;
}

static void memory_forget(journal *j, const char *id)
{
    (void)j, (void)id;
}

static void memory_note_launch(journal *j, const journal_launch *launch)
{
    pthread_mutex_lock(&j->lock);
    j->launch = *launch;
    pthread_mutex_unlock(&j->lock);
}

static void memory_last_launch(journal *j, journal_launch *out)
{
    pthread_mutex_lock(&j->lock);
    *out = j->launch;
    pthread_mutex_unlock(&j->lock);
}

static status memory_replay(journal *j, const journal_visitor *visitor, void *arg)
{
    (void)j, (void)visitor, (void)arg;
    return STATUS_OK;
}

static const char *memory_trouble(journal *j)
{
    (void)j;
    return "";
}

static const journal_kind memory_kind = {
    .accept = memory_accept,
    .tokens = memory_tokens,
    .finish = memory_finish,
    .forget = memory_forget,
    .note_launch = memory_note_launch,
    .last_launch = memory_last_launch,
    .replay = memory_replay,
    .trouble = memory_trouble,
};

/* ---- in a file ---- */

static status file_accept(journal *j, const char *id, const void *spec, size_t size)
{
    return journal_writer_accept(j->writer, id, spec, size);
}

static void file_tokens(journal *j, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    journal_writer_tokens(j->writer, id, sequence, first, n, records, size);
}

static void file_finish(journal *j, const char *id, int sequence, const void *how, size_t size)
{
    journal_writer_finish(j->writer, id, sequence, how, size);
}

static void file_forget(journal *j, const char *id)
{
    journal_writer_forget(j->writer, id);
}

static void file_note_launch(journal *j, const journal_launch *launch)
{
    journal_writer_note_launch(j->writer, launch);
}

static void file_last_launch(journal *j, journal_launch *out)
{
    journal_writer_last_launch(j->writer, out);
}

static status file_replay(journal *j, const journal_visitor *visitor, void *arg)
{
    return journal_writer_replay(j->writer, visitor, arg);
}

static const char *file_trouble(journal *j)
{
    return journal_writer_trouble(j->writer);
}

static const journal_kind file_kind = {
    .accept = file_accept,
    .tokens = file_tokens,
    .finish = file_finish,
    .forget = file_forget,
    .note_launch = file_note_launch,
    .last_launch = file_last_launch,
    .replay = file_replay,
    .trouble = file_trouble,
};

/* ---- either ---- */

status journal_open(const char *path, int commit_ms, journal **out)
{
    journal *j = calloc(1, sizeof *j);
    if (!j)
        return status_fail(STATUS_NO_MEMORY, "no memory for the journal");
    j->kind = path ? &file_kind : &memory_kind;
    pthread_mutex_init(&j->lock, NULL);
    status st = STATUS_OK;
    if (path) {
        journal_writer_options options = {.path = path,
                                          .commit_ms = commit_ms,
                                          .queue_bytes = QUEUE_BYTES,
                                          .beat_seconds = BEAT_SECONDS,
                                          .lease_seconds = LEASE_SECONDS};
        journal_holder_self(&options.self);
        st = journal_writer_open(&options, &j->writer);
    }
    if (st == STATUS_OK)
        *out = j;
    else
        journal_close(j);
    return st;
}

void journal_close(journal *j)
{
    if (!j)
        return;
    journal_writer_close(j->writer);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

bool journal_is_durable(const journal *j)
{
    return j->writer != NULL;
}

status journal_accept(journal *j, const char *id, const void *spec, size_t size)
{
    return j->kind->accept(j, id, spec, size);
}

void journal_tokens(journal *j, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    j->kind->tokens(j, id, sequence, first, n, records, size);
}

void journal_finish(journal *j, const char *id, int sequence, const void *how, size_t size)
{
    j->kind->finish(j, id, sequence, how, size);
}

void journal_forget(journal *j, const char *id)
{
    j->kind->forget(j, id);
}

void journal_note_launch(journal *j, const journal_launch *launch)
{
    j->kind->note_launch(j, launch);
}

status journal_last_launch(journal *j, journal_launch *out)
{
    j->kind->last_launch(j, out);
    return STATUS_OK;
}

status journal_replay(journal *j, const journal_visitor *visitor, void *arg)
{
    return j->kind->replay(j, visitor, arg);
}

const char *journal_trouble(journal *j)
{
    return j->kind->trouble(j);
}
