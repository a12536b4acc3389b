/* door_grpc.h - the gRPC listener: vllm.Inference (and the older vllm.Generate paths), vllm.Control, convoke.v1.Requests,
 * vllm.grpc.engine.VllmEngine, health and reflection. */
#ifndef CONVOKE_CLUSTER_DOOR_GRPC_H
#define CONVOKE_CLUSTER_DOOR_GRPC_H

#include "cluster/coordinator.h"

typedef struct {
    const char *address;                            /* HOST:PORT; port 0: a free one */
    size_t max_message;                             /* bytes of one request message */
    int max_streams;                                /* concurrent calls per connection */
    double reader_seconds;                          /* a client that does not read for longer is dropped */
    size_t reader_bytes;                            /* serialized and not yet taken by the transport, per call */
    const char *tls_cert, *tls_key, *tls_client_ca; /* PEM files; NULL: plain text */
} door_grpc_options;

typedef struct door_grpc door_grpc;

status door_grpc_start(coordinator *c, const door_grpc_options *options, door_grpc **out);
int door_grpc_port(const door_grpc *d);
/* Refuses new calls (UNAVAILABLE), waits for running ones up to drain_seconds, cancels the rest, ends its threads. */
void door_grpc_stop(door_grpc *d, double drain_seconds); /* NULL is fine */

#endif
