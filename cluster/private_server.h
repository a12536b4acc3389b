/* private_server.h - a `convoke serve` of one's own, for a client that brings its model: started as a child, waited for, ended
 * for certain, also when this process is killed. */
#ifndef CONVOKE_CLUSTER_PRIVATE_SERVER_H
#define CONVOKE_CLUSTER_PRIVATE_SERVER_H

#include "proto/status.h"

#include <signal.h>
#include <stddef.h>

typedef struct private_server private_server;

/* Starts this very program's `serve --model model_dir --ranks n_ranks` on a free port of this machine and waits until it can
 * answer; on a terminal a line on stderr shows that it loads. What it says is kept and shown only when it fails. *stop set by a
 * signal handler: STATUS_STOPPED. */
status private_server_start(const char *model_dir, int n_ranks, const volatile sig_atomic_t *stop, private_server **out);
const char *private_server_address(const private_server *s); /* HOST:PORT */
/* SIGTERM, a while later SIGKILL. NULL is fine. */
void private_server_end(private_server *s);

#endif
