/* door_health.c - grpc.health.v1: NOT_SERVING while starting, restarting and draining, for every service alike. */
#include "cluster/door_internal.h"
#include "proto/health.pb-c.h"

#include <stdlib.h>

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus health;
#define HEALTH(word) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##word

struct health_watch {
    rpc_call *call;
    bool known;
    int said; /* -1: nothing yet */
    health_watch *next, *previous;
};

static health health_now(door_grpc *d)
{
    return coordinator_state(d->c) == SERVING_READY && !atomic_load(&d->stopping) ? HEALTH(SERVING) : HEALTH(NOT_SERVING);
}

void health_check(rpc_call *call, const ProtobufCMessage *message)
{
    Grpc__Health__V1__HealthCheckResponse m = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    if (!door_serves(((const Grpc__Health__V1__HealthCheckRequest *)message)->service)) {
        rpc_call_finish(call, RPC_NOT_FOUND, "service: there is no such service");
        return;
    }
    m.status = health_now(door_of(call));
    rpc_call_reply(call, &m.base);
}

void health_watch_begin(rpc_call *call, const ProtobufCMessage *message)
{
    door_grpc *d = door_of(call);
    health_watch *w = calloc(1, sizeof *w);
    if (!w) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    *w = (health_watch){
        .call = call, .said = -1, .known = door_serves(((const Grpc__Health__V1__HealthCheckRequest *)message)->service)};
    rpc_call_set_state(call, w);
    pthread_mutex_lock(&d->watch_lock);
    w->next = d->watches;
    if (w->next)
        w->next->previous = w;
    d->watches = w;
    pthread_mutex_unlock(&d->watch_lock);
}

void health_watch_pump(rpc_call *call)
{
    health_watch *w = rpc_call_state(call);
    Grpc__Health__V1__HealthCheckResponse m = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    m.status = w->known ? health_now(door_of(call)) : HEALTH(SERVICE_UNKNOWN);
    if (w->said != (int)m.status) {
        w->said = (int)m.status;
        rpc_call_send(call, &m.base);
    } else if (atomic_load(&door_of(call)->stopping)) {
        rpc_call_finish(call, RPC_UNAVAILABLE, "the server is stopping");
    }
}

void health_watch_end(rpc_call *call)
{
    health_watch *w = rpc_call_state(call);
    door_grpc *d = door_of(call);
    if (!w)
        return;
    pthread_mutex_lock(&d->watch_lock);
    if (w->next)
        w->next->previous = w->previous;
    if (w->previous)
        w->previous->next = w->next;
    else
        d->watches = w->next;
    pthread_mutex_unlock(&d->watch_lock);
    free(w);
}

/* From the coordinator's thread. A watch in the list has not ended, so its call may be poked. */
void health_changed(void *door, serving_state state)
{
    (void)state;
    door_grpc *d = door;
    pthread_mutex_lock(&d->watch_lock);
    for (health_watch *w = d->watches; w; w = w->next)
        rpc_call_poke(w->call);
    pthread_mutex_unlock(&d->watch_lock);
}
