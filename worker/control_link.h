/* control_link.h - the leader's connection to the coordinator: one thread owns the socket, the step loop never waits for it.
 *
 *   coordinator ──frames──► thread ──► inbox ──► step loop      (between steps)
 *               ◄──────────  outbox ◄────────── step loop       (written at once where the socket takes it)
 *               ◄── Beat, Progress ── thread                    (also while a step runs)
 *
 * When the connection ends, a frame is damaged or the coordinator stops reading, the thread ends the job (watch_end_job).
 * Messages of another launch are passed over, which the log says once. Functions are the main thread's unless said otherwise. */
#ifndef CONVOKE_WORKER_CONTROL_LINK_H
#define CONVOKE_WORKER_CONTROL_LINK_H

#include "proto/control.h"
#include "worker/watch.h"

typedef struct control_link control_link;

/* Connects to "HOST:PORT", says Hello and waits for Setup; tries again for `seconds` while nobody is there, or the coordinator
 * says "later" (it still has other workers). A refusal is STATUS_BAD_INPUT with the coordinator's reason. */
status control_link_open(const char *address, double seconds, const Convoke__Control__Hello *hello, control_link **out);
/* Says nothing more; what is still unsent gets a second to leave. NULL is fine. */
void control_link_close(control_link *l);

const Convoke__Control__Setup *control_link_setup(const control_link *l);
/* Starts the thread. Both are borrowed; until control_link_ready() it sends Progress from the pulses of this node's ranks. */
status control_link_start(control_link *l, group *g, watch *w);
/* Loading is over. */
void control_link_ready(control_link *l);

/* The next message in order, NULL when there is none; freed by the caller (convoke__control__to_leader__free_unpacked). */
Convoke__Control__ToLeader *control_link_next(control_link *l);
/* Sleeps until there is a message, SIGTERM came or the connection is lost, or so many seconds have passed (negative: however
 * long). */
void control_link_wait(control_link *l, double seconds);
/* STATUS_PEER_LOST with the sentence when the connection is lost. */
status control_link_check(const control_link *l);

/* Sends whole frames (control_put_to_coordinator): at once as far as the socket takes them, else from the outbox.
 * When that is full it waits; STATUS_PEER_LOST when the coordinator does not read for too long. */
status control_link_send(control_link *l, const void *frames, size_t size);
/* Any thread. Goodbye, once; gets a moment to leave. */
void control_link_goodbye(control_link *l, int rank, const char *reason);

#endif
