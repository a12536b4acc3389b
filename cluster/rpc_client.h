/* rpc_client.h - a small client over gRPC core's C API: unary and server-streaming calls, deadlines, cancellation. With
 * rpc_server the only files that know gRPC.
 *
 * A client may be used by any number of threads; each stream belongs to one, except that anybody may cancel it. */
#ifndef CONVOKE_CLUSTER_RPC_CLIENT_H
#define CONVOKE_CLUSTER_RPC_CLIENT_H

#include "proto/status.h"

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct rpc_client rpc_client;

typedef struct {
    const char *address;            /* HOST:PORT */
    const char *tls_ca;             /* PEM file with who may vouch for the server; NULL: plain text */
    const char *tls_cert, *tls_key; /* PEM files, for servers that ask for one; NULL: none */
    size_t max_message;             /* bytes of one answer; 0: 64 MiB */
} rpc_client_options;

/* Makes the channel; the connection itself comes with the first call. */
status rpc_client_open(const rpc_client_options *options, rpc_client **out);
void rpc_client_close(rpc_client *c); /* all streams must be closed; NULL is fine */

/* How a call ended: gRPC's own numbers, and a sentence, the server's where it gave one. */
enum {
    RPC_ENDED_OK = 0,
    RPC_ENDED_CANCELLED = 1,
    RPC_ENDED_DEADLINE = 4,
    RPC_ENDED_NOT_FOUND = 5,
    RPC_ENDED_UNAVAILABLE = 14,
};
typedef struct {
    int code;
    bool lost; /* the connection did not come, or broke; else the server said so itself */
    char sentence[600];
} rpc_end;
const char *rpc_code_word(int code); /* "UNAVAILABLE" */

typedef struct rpc_stream rpc_stream;

/* One request, any number of answers. method: "/package.Service/Method". deadline_seconds: of the whole call; 0: none. */
status rpc_stream_start(rpc_client *c, const char *method, const ProtobufCMessage *request, double deadline_seconds,
                        rpc_stream **out);

typedef enum { RPC_MESSAGE, RPC_NOTHING_YET, RPC_ENDED } rpc_event;
/* The next answer as `type` (free with protobuf_c_message_free_unpacked()); waits for it up to wait_seconds. An answer that is
 * not of this type ends the call. */
rpc_event rpc_stream_next(rpc_stream *s, double wait_seconds, const ProtobufCMessageDescriptor *type, ProtobufCMessage **out);
const rpc_end *rpc_stream_end(const rpc_stream *s); /* after RPC_ENDED */
/* Any thread, also from another than the one that waits. The stream then ends with RPC_ENDED_CANCELLED. */
void rpc_stream_cancel(rpc_stream *s);
void rpc_stream_close(rpc_stream *s); /* cancels what still runs; NULL is fine */

/* One request, one answer (*out; NULL unless end->code is RPC_ENDED_OK). */
status rpc_client_call(rpc_client *c, const char *method, const ProtobufCMessage *request, double deadline_seconds,
                       const ProtobufCMessageDescriptor *type, ProtobufCMessage **out, rpc_end *end);

#endif
