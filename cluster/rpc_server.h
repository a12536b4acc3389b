/* rpc_server.h - a small server over gRPC core's C API: the only pair of files that knows gRPC.
 *
 *   client ── connection ──► completion queue ──► a server thread ──► handlers of rpc_method, one at a time per call
 *                                  ▲
 *   any thread: rpc_call_poke() ───┘   "there may be something to say on this call"
 *
 * A call's life: begin (its request has come) ─► pump (again and again, whenever it may speak) ─► end (always, once).
 * Handlers of one call never run at the same time, of different calls they do; they must not block for long: two threads serve
 * everybody (only `begin` of a large request has a thread of its own). At most one answer is under way per call: the next pump
 * comes when the transport has taken it, and that is all the back-pressure there is. A client that goes away, or whose deadline
 * passes, ends the call. */
#ifndef CONVOKE_CLUSTER_RPC_SERVER_H
#define CONVOKE_CLUSTER_RPC_SERVER_H

#include "proto/status.h"

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>

typedef enum { /* gRPC's own numbers */
               RPC_OK = 0,
               RPC_INVALID_ARGUMENT = 3,
               RPC_NOT_FOUND = 5,
               RPC_ALREADY_EXISTS = 6,
               RPC_PERMISSION_DENIED = 7,
               RPC_RESOURCE_EXHAUSTED = 8,
               RPC_UNIMPLEMENTED = 12,
               RPC_INTERNAL = 13,
               RPC_UNAVAILABLE = 14,
} rpc_code;

typedef struct rpc_server rpc_server;
typedef struct rpc_call rpc_call;

typedef struct {
    const char *path; /* "/package.Service/Method" */
    const ProtobufCMessageDescriptor *request;
    bool client_streams; /* begin comes for every message; it answers each with one rpc_call_send() or ends the call */
    /* The request, checked (wire_check) and unpacked; borrowed for the call. */
    void (*begin)(rpc_call *call, const ProtobufCMessage *request);
    /* Nothing is under way: say something (send, finish) or return and wait for a poke. NULL: begin says all there is. */
    void (*pump)(rpc_call *call);
    /* The call is over, finished or abandoned: release its state. NULL: there is none. */
    void (*end)(rpc_call *call);
} rpc_method;

typedef struct {
    const char *address; /* HOST:PORT; port 0: a free one */
    size_t max_message;
    int max_streams;
    double reader_seconds;                          /* an answer the client does not take for longer ends the call; 0: never */
    const char *tls_cert, *tls_key, *tls_client_ca; /* PEM files or NULL */
    const rpc_method *methods;                      /* borrowed */
    int n_methods;
    void *context; /* rpc_call_context() */
} rpc_options;

status rpc_server_start(const rpc_options *options, rpc_server **out);
int rpc_server_port(const rpc_server *s);
/* Closes the door, waits up to drain_seconds for running calls, cancels the rest, waits for their ends. NULL is fine. */
void rpc_server_stop(rpc_server *s, double drain_seconds);

/* The rest but rpc_call_poke(), _hold() and _release() is for handlers, on their own call. */
void *rpc_call_context(const rpc_call *call);
void *rpc_call_state(const rpc_call *call);
void rpc_call_set_state(rpc_call *call, void *state);
const char *rpc_call_path(const rpc_call *call);
const char *rpc_call_peer(rpc_call *call); /* "ipv4:10.0.0.7:51234"; lives as long as the call */
/* A value of the request's metadata, cut to the room; false: there is none. */
bool rpc_call_metadata(const rpc_call *call, const char *key, char *out, size_t room);

/* What is sent is packed before these return. Each may be called once per pump (or begin), and only one of them. */
void rpc_call_send_headers(rpc_call *call); /* tells a streaming client that its request was accepted */
void rpc_call_send(rpc_call *call, const ProtobufCMessage *message);
void rpc_call_finish(rpc_call *call, rpc_code code, const char *sentence); /* sentence NULL: none */
void rpc_call_reply(rpc_call *call, const ProtobufCMessage *message);      /* the last answer, and OK */
/* Trailing metadata of the finish to come; at most two, of up to 63 characters. */
void rpc_call_trailer(rpc_call *call, const char *key, const char *value);

/* Any thread: pump soon. The caller must know that the call has not ended, or hold it. */
void rpc_call_poke(rpc_call *call);
/* Keeps the object beyond its end, for work on another thread. */
void rpc_call_hold(rpc_call *call);
void rpc_call_release(rpc_call *call);

#endif
