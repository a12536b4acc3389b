/* journal.h - what must not be forgotten: each request as it was accepted, its tokens so far, how it ended.
 *
 * Two kinds behind one table: in memory nothing is written (requests.h itself is the memory); in a file, SQLite in WAL mode, so
 * that a coordinator that was killed takes its requests up again. Writes are collected and committed together by a thread of the
 * journal (at most `commit_ms` later): a token that was shown but not yet committed is computed again, the same, because the seed
 * was committed with the request before its first token was shown. */
#ifndef CONVOKE_CLUSTER_JOURNAL_H
#define CONVOKE_CLUSTER_JOURNAL_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct journal journal;

/* Every entry that matters for exactness carries the circumstances it was made under. */
typedef struct {
    uint64_t launch, plan_epoch;
    char isa[16], combine[8];
} journal_launch;

/* path NULL: in memory, every call succeeds and does nothing. Refuses a file of another program or version, and one that another
 * coordinator has open (a lease: host, pid and time, renewed; a stale one is taken over), by a sentence. */
status journal_open(const char *path, int commit_ms, journal **out);
void journal_close(journal *j); /* commits; NULL is fine */
bool journal_is_durable(const journal *j);

/* Accepted: `spec` is the request in requests.c's own packed form. Returns after it is on disk (a group commit). */
status journal_accept(journal *j, const char *id, const void *spec, size_t size);
/* Output of a sequence from token `first`: `records` in requests.c's own packed form, n tokens. Queued, not waited for. */
void journal_tokens(journal *j, const char *id, int sequence, int first, int n, const void *records, size_t size);
void journal_finish(journal *j, const char *id, int sequence, const void *how, size_t size);
/* The request is forgotten. */
void journal_forget(journal *j, const char *id);
void journal_note_launch(journal *j, const journal_launch *launch);
/* The last launch noted; launch 0: none. */
status journal_last_launch(journal *j, journal_launch *out);

/* Everything kept, at start: requests in order of acceptance, each followed by its token records in order and its finishes. */
typedef struct {
    status (*request)(void *arg, const char *id, const void *spec, size_t size);
    status (*tokens)(void *arg, const char *id, int sequence, int first, int n, const void *records, size_t size);
    status (*finish)(void *arg, const char *id, int sequence, const void *how, size_t size);
} journal_visitor;
status journal_replay(journal *j, const journal_visitor *visitor, void *arg);
/* Sentence of the first write that failed since the last call ("" none): a full disk must be said, once. */
const char *journal_trouble(journal *j);

#endif
