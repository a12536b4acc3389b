/* journal_writer.h - the writing thread of a durable journal: a bounded queue, and one transaction for all that has gathered.
 *
 *   accept ──► wait ─────────────┐ at once           tokens, finish, forget ──► queue ──┐ commit_ms later
 *                                ▼                                                      ▼
 *              thread:  begin │ renew the lease │ everything queued │ commit │ wake the waiting
 *
 * What could not be written (disk full, queue full) is never half there: from the first lost piece on, a request's later tokens
 * and its finish are left out too, so the file keeps a prefix and the rest is computed again after a restart. Inside the journal
 * only. */
#ifndef CONVOKE_CLUSTER_JOURNAL_WRITER_H
#define CONVOKE_CLUSTER_JOURNAL_WRITER_H

#include "cluster/journal_store.h"

typedef struct journal_writer journal_writer;

typedef struct {
    const char *path;
    int commit_ms;
    size_t queue_bytes;                 /* tokens waiting for the disk; more is left out */
    double beat_seconds, lease_seconds; /* heartbeat of the lease; how long one may be silent */
    journal_holder self;
} journal_writer_options;

status journal_writer_open(const journal_writer_options *options, journal_writer **out);
void journal_writer_close(journal_writer *w); /* commits; NULL is fine */

status journal_writer_accept(journal_writer *w, const char *id, const void *spec, size_t size);
void journal_writer_tokens(journal_writer *w, const char *id, int sequence, int first, int n, const void *records, size_t size);
void journal_writer_finish(journal_writer *w, const char *id, int sequence, const void *how, size_t size);
void journal_writer_forget(journal_writer *w, const char *id);
void journal_writer_note_launch(journal_writer *w, const journal_launch *launch);
void journal_writer_last_launch(journal_writer *w, journal_launch *out);
status journal_writer_replay(journal_writer *w, const journal_visitor *visitor, void *arg);
const char *journal_writer_trouble(journal_writer *w);

#endif
