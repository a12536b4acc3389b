/* hosts.h - the machines of a job: read from a hostfile, given their ranks, dropped when they are lost, written for mpirun.
 *
 * Lines as Open MPI reads them: `name`, `name slots=4`, `user@name slots=4 max_slots=8`, `name:4`, `#` begins a comment; a name
 * that stands twice has the slots of both. What is written for mpirun gives every host exactly the slots it is to fill, so which
 * rank runs where never depends on the launcher's own guesses. */
#ifndef CONVOKE_CLUSTER_HOSTS_H
#define CONVOKE_CLUSTER_HOSTS_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    char *name;  /* as in the file: may be "user@name" */
    int slots;   /* 0: the file says nothing */
    int n_ranks; /* set by hosts_assign() */
    bool here;   /* this machine; set by hosts_find_here() */
} host_entry;

typedef struct {
    host_entry *entries; /* [n] in the order of the file, which is the order of ranks */
    int n;
} hosts;

status hosts_read(const char *path, hosts *out);
status hosts_parse(const char *where, const char *text, size_t size, hosts *out);
void hosts_clear(hosts *h); /* a zeroed one is fine */

/* Gives n_ranks to the hosts: slots are filled in order; what is left over, and all of it when the file names no slots, is spread
 * evenly. A host without slots counts as one when others have some. Needs a host. */
void hosts_assign(hosts *h, int n_ranks);
/* Ranks that the hosts held before plus their free slots, at most n_wanted: what a job may have after a host was dropped. */
int hosts_room(const hosts *h, int n_wanted);
void hosts_drop(hosts *h, int index);
/* Hosts with ranks only. */
status hosts_write(const hosts *h, const char *path);

/* Asks the resolver for names it does not know: once, before launches depend on it. */
void hosts_find_here(hosts *h);
/* Whether the name (with or without user@) means this machine: its host name, "localhost", or one of its addresses. */
bool hosts_is_here(const char *name);

#endif
