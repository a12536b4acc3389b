/* journal_store.h - the file under a durable journal: one SQLite database. Inside the journal only; one thread at a time, except
 * journal_store_replay(), which opens the file a second time. */
#ifndef CONVOKE_CLUSTER_JOURNAL_STORE_H
#define CONVOKE_CLUSTER_JOURNAL_STORE_H

#include "cluster/journal.h"
#include "cluster/journal_lease.h"

typedef struct journal_store journal_store;

typedef enum { JOURNAL_ACCEPT, JOURNAL_TOKENS, JOURNAL_FINISH, JOURNAL_FORGET, JOURNAL_CUT } journal_op_kind;

typedef struct {
    journal_op_kind kind;
    int64_t request;        /* number, the journal's own */
    uint64_t launch;        /* ACCEPT, TOKENS: under which it was made */
    const char *id;         /* ACCEPT */
    int sequence, first, n; /* TOKENS; CUT: everything of the sequence from `first`, and its finish */
    const void *data;       /* ACCEPT, TOKENS, FINISH */
    size_t size;
} journal_op;

/* Makes the file when there is none, checks it when there is, and takes the lease for `self`, waiting up to `patience` seconds
 * for the heartbeat of a holder that cannot be looked up. */
status journal_store_open(const char *path, const journal_holder *self, double patience, journal_store **out);
void journal_store_close(journal_store *s); /* gives the lease back; NULL is fine */

/* A transaction. begin also renews the lease, and fails for ever once another holder has taken it. After a failure: rollback. */
status journal_store_begin(journal_store *s);
/* STATUS_BAD_INPUT: an ACCEPT whose id is there already; the transaction goes on without it. */
status journal_store_apply(journal_store *s, const journal_op *op);
status journal_store_launch(journal_store *s, const journal_launch *launch);
status journal_store_commit(journal_store *s);
void journal_store_rollback(journal_store *s);
/* Gives space of forgotten requests back to the system, a bounded piece per call. */
void journal_store_tidy(journal_store *s);

status journal_store_last_launch(journal_store *s, journal_launch *out);
/* Every request's id and number. */
status journal_store_ids(journal_store *s, status (*visit)(void *arg, int64_t number, const char *id), void *arg);
/* The visitor gets of each sequence the tokens up to the first gap, and its finish only if there is none; `cut` is told of the
 * rest.
 */
status journal_store_replay(const char *path, const journal_visitor *visitor, void *arg,
                            void (*cut)(void *arg, int64_t request, int sequence, int first), void *cut_arg);

#endif
