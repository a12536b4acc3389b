/* control_server.h - the coordinator's end of the control connection: strangers knock, one of them proves to be the leader.
 *
 *   listening socket ─► strangers (few, small frames, 10 s) ─ Hello ─► the leader: one, frames in, frames out
 *                            └─ wrong secret, wrong protocol, a second leader, garbage ─► Refusal with a reason, closed
 *                               (a second leader with the right secret may ask again: the first one's end may not be known yet)
 *
 * One thread (the job's) calls everything but control_server_send(), which any thread may call at any time. Nothing blocks:
 * control_server_fd() becomes readable when control_server_step() has something to do. */
#ifndef CONVOKE_CLUSTER_CONTROL_SERVER_H
#define CONVOKE_CLUSTER_CONTROL_SERVER_H

#include "proto/control.h"

typedef struct control_server control_server;

typedef struct {
    /* A Hello with the right secret. False: not this one; it is refused with status_message(). */
    bool (*joined)(void *arg, const Convoke__Control__Hello *hello);
    void (*message)(void *arg, const Convoke__Control__ToCoordinator *message);
    /* The leader is gone: closed by itself or by the network, or (refused) by us because of what it said. Not after
     * control_server_drop_leader(). */
    void (*lost)(void *arg, bool refused, const char *why);
    /* Somebody was turned away; peer is "ADDRESS:PORT". NULL is fine. */
    void (*refused)(void *arg, const char *peer, const char *why);
} control_listener;

/* address HOST:PORT (host empty: all addresses; port 0: a free one). */
status control_server_create(const char *address, const control_listener *listener, void *arg, control_server **out);
void control_server_destroy(control_server *s); /* NULL is fine */

/* HOST:PORT that workers are to connect to; where it listens on all addresses, this machine's name, or with `here` its loopback.
 */
const char *control_server_address(const control_server *s, bool here);
bool control_server_is_loopback(const control_server *s);

int control_server_fd(const control_server *s);
/* Milliseconds until the next deadline of a connection, -1: none. */
int control_server_wait_ms(const control_server *s);
void control_server_step(control_server *s);

/* From here on a Hello needs this secret; NULL: nobody is expected and every Hello is refused. A leader stays. */
void control_server_expect(control_server *s, const control_secret *secret);
/* Messages of the leader that carry another launch number than this are refused and end its connection. */
void control_server_set_launch(control_server *s, uint64_t launch);
/* Closes the leader's connection, at once. reason NULL, or a Refusal that is tried to be sent. */
void control_server_drop_leader(control_server *s, const char *reason);

/* Any thread: whole frames, written now as far as the socket takes them, the rest soon. False: there is no leader, or it has not
 * read for so long that no more is kept for it (its connection is then ended). */
bool control_server_send(control_server *s, const void *frames, size_t size);

#endif
