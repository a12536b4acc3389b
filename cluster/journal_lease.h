/* journal_lease.h - who holds a journal, so that two coordinators never write the same one. Inside the journal only.
 *
 * A holder that can be looked up (same machine, same boot, same process namespace) is alive or dead, and that is known at once.
 * Of any other only its heartbeat can be watched: it is given up after `patience` seconds without one. No clocks are compared. */
#ifndef CONVOKE_CLUSTER_JOURNAL_LEASE_H
#define CONVOKE_CLUSTER_JOURNAL_LEASE_H

#include <stdint.h>

typedef struct {
    char host[65], boot[40], space[32]; /* node name, boot id, process namespace */
    int64_t pid, started;               /* the process, and when it began (clock ticks since boot): pids come again */
    char token[33];                     /* of this holding: random */
} journal_holder;

void journal_holder_self(journal_holder *out);

typedef enum { HOLDER_ALIVE, HOLDER_DEAD, HOLDER_OUT_OF_SIGHT } holder_state;
/* `theirs` as seen by a process whose holder is `mine`. */
holder_state journal_holder_look(const journal_holder *theirs, const journal_holder *mine);

#endif
