/* node_window.h - memory that the ranks of one node share, and how one of them waits for another.
 *
 * Every rank owns one segment (POSIX shared memory) that all ranks of its node map. A segment is as large as the worst case asks
 * for, but only an address range: memory is set aside part by part with node_window_commit(), so that a /dev/shm that is too
 * small is a sentence and never a SIGBUS. The name is gone as soon as all peers have mapped it: nothing stays behind, however
 * the job ends.
 *
 * An event is a 32-bit count on its own cache line. Who waits sleeps on a futex and looks every 20 ms whether its peers still
 * live (pidfd) and whether it was told to stop (SIGTERM). No MPI here. */
#ifndef CONVOKE_ROUTER_NODE_WINDOW_H
#define CONVOKE_ROUTER_NODE_WINDOW_H

#include "proto/clock.h"
#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The ranks of this node, in rank order. */
typedef struct {
    int n, mine;      /* how many, and which of them this process is */
    const int *ranks; /* [n] their numbers in the job; borrowed */
    const int *pids;  /* [n] borrowed */
    int *pidfds;      /* [n] -1: own, or a kernel without pidfd */
    const char *host; /* borrowed */
    uint64_t job;     /* the same on all ranks of this job, random between jobs: part of segment names */
    /* One word of the node, NULL until mapped: the first rank that reports a lost peer or a stop takes it; the others then end
     * quietly (STATUS_ELSEWHERE), so that a person reads one sentence. */
    _Atomic uint32_t *reported;
    void (*tick)(void);   /* NULL, or called now and then by who waits on an event */
    double limit_seconds; /* a wait that takes longer ends; 0: none does */
    /* NULL, or where it stands whether this process sleeps in a wait: written with asleep (or, in a patient wait,
     * asleep_patient), then awake. */
    _Atomic uint32_t *state;
    uint32_t awake, asleep, asleep_patient;
} node_peers;

status node_peers_open(node_peers *peers); /* opens pidfds; the other fields are filled in by the caller */
void node_peers_close(node_peers *peers);

/* What somebody waits for, for the sentence if it never comes: "rank 3's results of layer exchange 37". */
typedef struct {
    int rank;         /* -1: several */
    const char *what; /* "results of layer exchange" */
    uint32_t number;
    bool patient; /* no limit for this one */
} wait_reason;

/* Whether this process is the one of its node that says why the job ends. */
bool node_reports_here(void);
/* STATUS_PEER_LOST when a peer of this node is gone, the wait took longer than the limit, or this process gave up;
 * STATUS_STOPPED after SIGTERM (either only on the rank that says so first, else STATUS_ELSEWHERE); `since` is clock_seconds() at
 * the start of the wait. */
status node_peers_watch(const node_peers *peers, const wait_reason *why, double since);

/* SIGTERM sets a flag that ends waits; a second one kills as usual. */
void node_stop_install(void);
bool node_stop_requested(void);
void node_stop_forget(void); /* until the next, which kills */
/* Any thread: all waits of this process end with this sentence; the first one counts. */
void node_give_up(const char *sentence);

typedef struct {
    _Alignas(64) _Atomic uint32_t value;
    _Atomic uint32_t waiters;
} node_event;

/* Sets the count (release) and wakes whoever sleeps on it. */
void node_event_raise(node_event *event, uint32_t value);
/* Has the count reached `value`? (acquire; counts wrap around) */
bool node_event_reached(const node_event *event, uint32_t value);
/* Waits until it has. `spin`: look for some microseconds before sleeping; only where no other thread wants the core. */
status node_event_wait(node_event *event, uint32_t value, bool spin, const node_peers *peers, const wait_reason *why);

/* For waits that must poll (MPI): pauses, longer and longer: spins if allowed, gives the core away, then sleeps a sixteenth of
 * the time waited, 10 us to max_us, and keeps watch. Start with a zeroed one. */
typedef struct {
    unsigned turns;
    double since, watched;
} node_backoff;
status node_backoff_pause(node_backoff *backoff, bool spin, unsigned max_us, const node_peers *peers, const wait_reason *why);

typedef struct node_window node_window;

/* Own segment of `bytes` address space, zeroed. `number` tells apart the windows of one job. */
status node_window_create(const node_peers *peers, unsigned number, size_t bytes, node_window **out);
/* Sets memory aside for [offset, offset + bytes) of the own segment. `advice` ends the sentence: "lower --max-rows". */
status node_window_commit(node_window *w, size_t offset, size_t bytes, const char *advice);
/* Maps the peers' segments, all of which must have been created; they may differ in size. */
status node_window_attach(node_window *w);
/* Takes the own name away; after all peers have attached, or given up. */
void node_window_unlink(node_window *w);
void node_window_destroy(node_window *w);              /* NULL is fine */
void *node_window_at(const node_window *w, int local); /* segment of the node's rank `local` */
size_t node_window_committed(const node_window *w);    /* bytes set aside in the own segment */

#endif
