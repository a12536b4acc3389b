/* group.h - the ranks of a job: who is here, on which node, and the few words all of them exchange outside the layers.
 *
 * One process is one rank. Between ranks of one node words go through shared memory and futexes; between nodes through
 * MPI with an adaptive sleep, so waiting costs no core. A waiting rank watches its node peers' lives: when one dies the wait ends
 * with STATUS_PEER_LOST and a sentence that names it. Functions marked [all] must be entered by every rank, in the same order. */
#ifndef CONVOKE_ROUTER_GROUP_H
#define CONVOKE_ROUTER_GROUP_H

#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct group group;

typedef enum {
    RANK_LOADING, /* not under way yet: may stand still for long */
    RANK_WORKING,
    RANK_WAITING, /* for another rank */
    RANK_IDLE,    /* for the leader's next message; the leader: for something to do */
} rank_state;

/* What a rank shows of itself to the other ranks of its node at any moment: they only look. */
typedef struct {
    _Atomic uint32_t beat;        /* rises while the process runs at all; by its watching thread */
    _Atomic uint32_t moves;       /* rises with every layer and word; by its main thread */
    _Atomic uint32_t state;       /* rank_state */
    _Atomic uint32_t messages;    /* of the leader, so far */
    _Atomic uint64_t done, total; /* bytes, while loading; total 0: not known yet */
} group_pulse;

/* [all] Starts MPI when this process was started by mpirun (or a PMI launcher), else a group of one without touching MPI.
 * ranks_per_node 0: nodes as the system says; N: pretend that every N consecutive ranks are a node of their own (tests). */
status group_create(int *argc, char ***argv, int ranks_per_node, group **out);
/* [all] unless this rank failed: then group_abort(). */
void group_destroy(group *g);
/* Ends the whole job now: for a rank that cannot go on. Does not return. */
void group_abort(group *g, int exit_code) __attribute__((noreturn));

int group_rank(const group *g);
int group_size(const group *g);
int group_node(const group *g);
int group_n_nodes(const group *g);
const int *group_node_of_rank(const group *g); /* [size] */
const char *group_host(const group *g, int rank);
int group_pid(const group *g, int rank);
group_pulse *group_pulse_of(const group *g, int rank);         /* NULL: on another node */
bool group_shares_cores(const group *g, int threads_per_rank); /* more threads than cores on this node: do not spin */
/* By mpirun or its like, which ends the job when a rank ends badly; may be asked before group_create(). */
bool group_launched(void);
/* A group of one leaves SIGTERM alone; now it is a wish there as well. */
void group_heed_stop(void);
/* SIGTERM has come. Waits inside the group and the exchange end by themselves (STATUS_STOPPED); other loops ask here. Always
 * false in a group of one without group_heed_stop(). */
bool group_told_to_stop(void);
/* This rank follows that wish by words of its own: waits no longer end by it. */
void group_stop_heard(void);
/* From now on a wait inside the group or the exchange that takes longer ends with STATUS_PEER_LOST and names who is missing; the
 * leader's next message (group_broadcast_message) may take any time. 0: no wait ends so (as at start: loading takes its time). */
void group_set_deadline(group *g, double seconds);
/* Any thread, this process only: its waits inside the group and the exchange end by themselves, STATUS_PEER_LOST with this
 * sentence. The first one counts. */
void group_give_up(const char *sentence);

/* [all] Rank 0's bytes to everybody; every rank passes the same size. */
status group_broadcast(group *g, void *bytes, size_t size);
/* [all] Like it, for a size only rank 0 knows: *bytes points into a buffer of the group, valid until the next call. On rank 0
 * *bytes and *size are what is sent. The leader may take its time: the others sleep. */
status group_broadcast_message(group *g, const void **bytes, size_t *size);
/* [all] Every rank's bytes to rank 0: there parts[r], sizes[r] [size] point into buffers of the group, valid until the next call;
 * elsewhere untouched. */
status group_gather(group *g, const void *bytes, size_t size, const void **parts, size_t *sizes);
/* [all] The smallest of all ranks' values. */
status group_min(group *g, int value, int *out);
/* [all] `mine` of every rank: all return STATUS_OK when all are; otherwise the lowest failing rank gets its own status back, the
 * others STATUS_ELSEWHERE, so that one rank prints one sentence. */
status group_agree(group *g, status mine);
status group_barrier(group *g); /* [all] */

/* Bytes from one rank to another beside everything else: each end says so, a pair's transfers in the same order on both, and
 * nobody waits. They move whenever somebody looks (and between nodes whenever the exchange waits); the memory is in use until the
 * key was told. For jobs of many ranks. */
status group_send(group *g, int to, const void *bytes, size_t size, uint64_t key);
status group_receive(group *g, int from, void *bytes, size_t size, uint64_t key);
/* Keys of transfers that are done, told once per transfer: at most `room` of them. */
status group_look(group *g, uint64_t *keys, int room, int *n);

#endif
