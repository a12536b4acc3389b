/* door_http.h - the HTTP listener (libmicrohttpd): /health, /metrics, /plan, and room for more routes in one table. */
#ifndef CONVOKE_CLUSTER_DOOR_HTTP_H
#define CONVOKE_CLUSTER_DOOR_HTTP_H

#include "cluster/coordinator.h"
#include "cluster/metrics.h"

typedef struct door_http door_http;

/* address HOST:PORT; port 0: a free one. */
status door_http_start(coordinator *c, metrics *m, const char *address, door_http **out);
int door_http_port(const door_http *d);
void door_http_stop(door_http *d); /* NULL is fine */

#endif
