/* rpc_server.c - two threads over one completion queue, and a third for large requests.
 *
 * Every operation given to gRPC core has a tag; its completion is an event on the queue. Calls come by the generic
 * grpc_server_request_call() alone: a server that only waits for registered methods leaves unknown ones hanging.
 *
 *   CALL (one has come; wait for the next) ─► RECEIVED (its message) ─► SENT, SENT, ... ─► CLOSED (always, the last of a call)
 *
 * gRPC core has no call to post an event of one's own; an empty batch does it: its tag comes back at once. That is a poke.
 * A large request takes long to unpack and to make tokens of: `begin` runs on a thread of its own then, so that running streams
 * do not wait for it. Large ones wait for each other.
 *
 * Of a call's objects one reference belongs to CLOSED, and one to each operation and poke under way. */
#include "cluster/rpc_server.h"

#include "cluster/rpc_tsan.h"
#include "cluster/wire_check.h"
#include "proto/clock.h"
#include "proto/log.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_THREADS = 2, N_WAITING = 64, MAX_TRAILERS = 2, LARGE_REQUEST = 32 * 1024 };

typedef enum { EVENT_CALL, EVENT_RECEIVED, EVENT_CLOSED, EVENT_SENT, EVENT_POKED, N_EVENTS } event_kind;

typedef struct {
    event_kind kind;
    rpc_call *call;
} event_tag;

struct rpc_call {
    rpc_server *server;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_byte_buffer *received, *sent;
    int cancelled; /* core writes it before CLOSED */
    event_tag tags[N_EVENTS];
    atomic_int refs;
    atomic_bool poked, closed;
    atomic_bool taken_in; /* waits for the third thread, or is in its hands */

    pthread_mutex_t lock; /* held while a handler runs; guards what follows */
    const rpc_method *method;
    void *state;
    char *peer;
    bool begun, headers_sent, sending, finished, ended, dropped;
    double sending_since;
    char trailer_keys[MAX_TRAILERS][64], trailer_values[MAX_TRAILERS][64];
    int n_trailers;

    rpc_call *next, *previous; /* all that have come; guarded by the server's lock */
    rpc_call *next_large;      /* likewise */
};

struct rpc_server {
    grpc_server *server;
    grpc_completion_queue *queue;
    rpc_options options;
    int port;
    pthread_t threads[N_THREADS];
    int n_threads;
    pthread_t large_thread;
    bool has_large_thread;
    event_tag shutdown_tag;

    pthread_mutex_t lock;
    pthread_cond_t changed; /* n_calls, shut_down */
    rpc_call *calls;
    int n_calls; /* objects alive, those waiting for a client included */
    bool shut_down;
    double scanned;
    rpc_call *large, **large_end; /* calls with large requests, in the order they came */
    pthread_cond_t large_came;
    bool large_stop;
    atomic_int n_live; /* calls in the list: while there are any, threads wake to look for readers that stopped */
#ifdef RPC_PLANT_RACE
    long n_events; /* counted without a lock, so that a ThreadSanitizer run can show that it would be reported */
#endif
};

static void call_wait_for_one(rpc_server *s);

/* ---- calls as objects ---- */

static void call_unlink(rpc_call *c)
{
    rpc_server *s = c->server;
    pthread_mutex_lock(&s->lock);
    if (c->previous || c->next || s->calls == c) {
        if (c->next)
            c->next->previous = c->previous;
        if (c->previous)
            c->previous->next = c->next;
        else
            s->calls = c->next;
        atomic_fetch_sub(&s->n_live, 1);
    }
    pthread_mutex_unlock(&s->lock);
}

static void call_free(rpc_call *c)
{
    rpc_server *s = c->server;
    call_unlink(c);
    if (c->call)
        grpc_call_unref(c->call);
    grpc_byte_buffer_destroy(c->received);
    grpc_byte_buffer_destroy(c->sent);
    grpc_call_details_destroy(&c->details);
    grpc_metadata_array_destroy(&c->metadata);
    gpr_free(c->peer);
    pthread_mutex_destroy(&c->lock);
    free(c);
    pthread_mutex_lock(&s->lock);
    s->n_calls--;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

void rpc_call_hold(rpc_call *call)
{
    atomic_fetch_add(&call->refs, 1);
}

void rpc_call_release(rpc_call *call)
{
    if (atomic_fetch_sub(&call->refs, 1) == 1)
        call_free(call);
}

/* Gives gRPC core a batch; its completion brings the tag, and takes the reference made here. */
static void call_start(rpc_call *c, const grpc_op *ops, size_t n, event_kind kind)
{
    rpc_call_hold(c);
    HANDED_OVER(&c->tags[kind]);
    grpc_call_error e = grpc_call_start_batch(c->call, ops, n, &c->tags[kind], NULL);
    if (e != GRPC_CALL_OK) /* only a mistake of ours can bring this about */
        log_line("rpc: %s: grpc_call_start_batch: %s", rpc_call_path(c), grpc_call_error_to_string(e));
    assert(e == GRPC_CALL_OK);
}

static void call_wait_for_one(rpc_server *s)
{
    rpc_call *c = calloc(1, sizeof *c);
    if (!c)
        return; /* the others that wait go on */
    c->server = s;
    atomic_init(&c->refs, 1);
    pthread_mutex_init(&c->lock, NULL);
    grpc_call_details_init(&c->details);
    grpc_metadata_array_init(&c->metadata);
    for (int i = 0; i < N_EVENTS; i++)
        c->tags[i] = (event_tag){(event_kind)i, c};
    pthread_mutex_lock(&s->lock);
    s->n_calls++;
    pthread_mutex_unlock(&s->lock);
    HANDED_OVER(&c->tags[EVENT_CALL]);
    if (grpc_server_request_call(s->server, &c->call, &c->details, &c->metadata, s->queue, s->queue, &c->tags[EVENT_CALL]) !=
        GRPC_CALL_OK)
        rpc_call_release(c); /* the server is being shut down */
}

/* ---- what handlers see ---- */

void *rpc_call_context(const rpc_call *call)
{
    return call->server->options.context;
}

void *rpc_call_state(const rpc_call *call)
{
    return call->state;
}

void rpc_call_set_state(rpc_call *call, void *state)
{
    call->state = state;
}

const char *rpc_call_path(const rpc_call *call)
{
    return call->method ? call->method->path : "?";
}

const char *rpc_call_peer(rpc_call *call)
{
    if (!call->peer)
        call->peer = grpc_call_get_peer(call->call);
    return call->peer ? call->peer : "";
}

bool rpc_call_metadata(const rpc_call *call, const char *key, char *out, size_t room)
{
    for (size_t i = 0; i < call->metadata.count; i++) {
        const grpc_metadata *m = &call->metadata.metadata[i];
        if (grpc_slice_str_cmp(m->key, key) == 0) {
            size_t n = GRPC_SLICE_LENGTH(m->value);
            n = n < room ? n : room - 1;
            memcpy(out, GRPC_SLICE_START_PTR(m->value), n);
            out[n] = 0;
            return true;
        }
    }
    return false;
}

void rpc_call_trailer(rpc_call *call, const char *key, const char *value)
{
    if (call->n_trailers == MAX_TRAILERS)
        return;
    snprintf(call->trailer_keys[call->n_trailers], sizeof call->trailer_keys[0], "%s", key);
    snprintf(call->trailer_values[call->n_trailers], sizeof call->trailer_values[0], "%s", value);
    call->n_trailers++;
}

/* One batch of what is to be said: headers (once), a message or none, the end or not. */
static void call_say(rpc_call *c, const ProtobufCMessage *message, bool last, rpc_code code, const char *sentence)
{
    grpc_op ops[3];
    size_t n = 0;
    grpc_metadata trailers[MAX_TRAILERS];
    grpc_slice details = grpc_empty_slice();
    assert(!c->sending && !c->finished);
    memset(ops, 0, sizeof ops);
    memset(trailers, 0, sizeof trailers);
    if (!c->headers_sent)
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    c->headers_sent = true;
    grpc_byte_buffer_destroy(c->sent);
    c->sent = NULL;
    if (message) {
        /* Core takes the slices out of the buffer it is given: each message needs one of its own. */
        grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
        protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
        c->sent = grpc_raw_byte_buffer_create(&slice, 1);
        grpc_slice_unref(slice);
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = c->sent;
    }
    if (last) {
        for (int i = 0; i < c->n_trailers; i++) {
            trailers[i].key = grpc_slice_from_copied_string(c->trailer_keys[i]);
            trailers[i].value = grpc_slice_from_copied_string(c->trailer_values[i]);
        }
        if (sentence)
            details = grpc_slice_from_copied_string(sentence);
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.trailing_metadata_count = (size_t)c->n_trailers;
        ops[n].data.send_status_from_server.trailing_metadata = trailers;
        ops[n].data.send_status_from_server.status = (grpc_status_code)code;
        ops[n++].data.send_status_from_server.status_details = sentence ? &details : NULL;
    }
    c->sending = true;
    c->finished = last;
    c->sending_since = clock_seconds();
    call_start(c, ops, n, EVENT_SENT);
    for (int i = 0; last && i < c->n_trailers; i++) {
        grpc_slice_unref(trailers[i].key);
        grpc_slice_unref(trailers[i].value);
    }
    grpc_slice_unref(details);
}

void rpc_call_send_headers(rpc_call *call)
{
    if (!call->headers_sent)
        call_say(call, NULL, false, RPC_OK, NULL);
}

void rpc_call_send(rpc_call *call, const ProtobufCMessage *message)
{
    call_say(call, message, false, RPC_OK, NULL);
}

void rpc_call_finish(rpc_call *call, rpc_code code, const char *sentence)
{
    call_say(call, NULL, true, code, sentence);
}

void rpc_call_reply(rpc_call *call, const ProtobufCMessage *message)
{
    call_say(call, message, true, RPC_OK, NULL);
}

void rpc_call_poke(rpc_call *call)
{
    if (atomic_exchange(&call->poked, true))
        return;
    call_start(call, NULL, 0, EVENT_POKED);
}

/* ---- events ---- */

static void call_receive(rpc_call *c)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &c->received;
    call_start(c, &op, 1, EVENT_RECEIVED);
}

/* After a handler has run. */
static void call_settle(rpc_call *c)
{
    if (c->begun && !c->ended && (c->finished || atomic_load(&c->closed))) {
        c->ended = true;
        if (c->method->end)
            c->method->end(c);
    }
}

static void call_pump(rpc_call *c)
{
    if (c->begun && !c->sending && !c->finished && !atomic_load(&c->closed) && c->method->pump)
        c->method->pump(c);
    call_settle(c);
}

static const rpc_method *server_method(const rpc_server *s, grpc_slice path)
{
    for (int i = 0; i < s->options.n_methods; i++)
        if (grpc_slice_str_cmp(path, s->options.methods[i].path) == 0)
            return &s->options.methods[i];
    return NULL;
}

static void call_refuse_unknown(rpc_call *c)
{
    char sentence[300];
    snprintf(sentence, sizeof sentence, "method %.*s is not served", (int)GRPC_SLICE_LENGTH(c->details.method),
             (const char *)GRPC_SLICE_START_PTR(c->details.method));
    rpc_call_finish(c, RPC_UNIMPLEMENTED, sentence);
}

static void on_call(rpc_server *s, rpc_call *c, bool success)
{
    if (!success) { /* shut down: nobody came */
        rpc_call_release(c);
        return;
    }
    call_wait_for_one(s);
    pthread_mutex_lock(&s->lock);
    c->next = s->calls;
    if (c->next)
        c->next->previous = c;
    s->calls = c;
    atomic_fetch_add(&s->n_live, 1);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_lock(&c->lock);
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_CLOSE_ON_SERVER;
    op.data.recv_close_on_server.cancelled = &c->cancelled;
    call_start(c, &op, 1, EVENT_CLOSED);
    c->method = server_method(s, c->details.method);
    if (c->method)
        call_receive(c);
    else
        call_refuse_unknown(c);
    pthread_mutex_unlock(&c->lock);
    rpc_call_release(c); /* the reference made for waiting; CLOSED has its own */
}

/* Unpacks what has come and begins; a message that is none is refused. */
static void call_begin(rpc_call *c)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, c->received)) {
        rpc_call_finish(c, RPC_INVALID_ARGUMENT, "the request cannot be decompressed");
        return;
    }
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    const ProtobufCMessageDescriptor *type = c->method->request;
    ProtobufCMessage *request = NULL;
    char sentence[300];
    if (GRPC_SLICE_LENGTH(bytes) > c->server->options.max_message) {
        snprintf(sentence, sizeof sentence, "the request has %zu bytes; %zu are allowed", GRPC_SLICE_LENGTH(bytes),
                 c->server->options.max_message);
        rpc_call_finish(c, RPC_RESOURCE_EXHAUSTED, sentence);
    } else if (wire_check(type, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes)) != STATUS_OK) {
        rpc_call_finish(c, RPC_INVALID_ARGUMENT, status_message());
    } else if (!(request = protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes)))) {
        snprintf(sentence, sizeof sentence, "the request is no %s", type->name);
        rpc_call_finish(c, RPC_INVALID_ARGUMENT, sentence);
    } else {
        c->begun = true;
        c->method->begin(c, request);
        protobuf_c_message_free_unpacked(request, NULL);
    }
    grpc_slice_unref(bytes);
}

static void call_take_in(rpc_call *c)
{
    if (!c->finished && !atomic_load(&c->closed))
        call_begin(c);
    grpc_byte_buffer_destroy(c->received);
    c->received = NULL;
    call_pump(c);
}

static void call_give_to_large(rpc_call *c)
{
    rpc_server *s = c->server;
    rpc_call_hold(c);
    atomic_store(&c->taken_in, true);
    pthread_mutex_lock(&s->lock);
    *s->large_end = c;
    s->large_end = &c->next_large;
    pthread_cond_signal(&s->large_came);
    pthread_mutex_unlock(&s->lock);
}

static void *serve_large(void *arg)
{
    rpc_server *s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        rpc_call *c = s->large;
        if (!c && s->large_stop)
            break;
        if (!c) {
            pthread_cond_wait(&s->large_came, &s->lock);
            continue;
        }
        s->large = c->next_large;
        if (!s->large)
            s->large_end = &s->large;
        pthread_mutex_unlock(&s->lock);
        pthread_mutex_lock(&c->lock);
        call_take_in(c);
        pthread_mutex_unlock(&c->lock);
        atomic_store(&c->taken_in, false);
        if (atomic_load(&c->closed)) { /* on_closed() may have left the end to us */
            pthread_mutex_lock(&c->lock);
            call_settle(c);
            pthread_mutex_unlock(&c->lock);
        }
        rpc_call_release(c);
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static void on_received(rpc_call *c)
{
    if (atomic_load(&c->closed) || c->finished)
        return;
    if (c->received && grpc_byte_buffer_length(c->received) > LARGE_REQUEST)
        call_give_to_large(c);
    else if (c->received)
        call_take_in(c);
    else if (grpc_call_failed_before_recv_message(c->call))
        return; /* core refused it (too large) or the client is gone: CLOSED follows */
    else if (c->method->client_streams)
        rpc_call_finish(c, RPC_OK, NULL);
    else
        rpc_call_finish(c, RPC_INVALID_ARGUMENT, "there is no request message");
}

/* The third thread may hold the call for long: what it finds closed afterwards it ends itself. */
static void on_closed(rpc_call *c)
{
    atomic_store(&c->closed, true);
    if (!atomic_load(&c->taken_in))
        pthread_mutex_lock(&c->lock);
    else if (pthread_mutex_trylock(&c->lock))
        return;
    call_settle(c);
    pthread_mutex_unlock(&c->lock);
}

static void on_sent(rpc_call *c)
{
    c->sending = false;
    if (c->method && c->method->client_streams && !c->finished && !atomic_load(&c->closed))
        call_receive(c);
    call_pump(c);
}

static void handle(rpc_server *s, event_tag *tag, bool success)
{
    rpc_call *c = tag->call;
    if (tag->kind == EVENT_CALL) {
        on_call(s, c, success);
        return;
    }
    if (tag->kind == EVENT_POKED)
        atomic_store(&c->poked, false); /* before the pump: what comes after it began pokes again */
    if (tag->kind == EVENT_CLOSED) {
        on_closed(c);
        rpc_call_release(c);
        return;
    }
    pthread_mutex_lock(&c->lock);
    if (tag->kind == EVENT_RECEIVED)
        on_received(c);
    else if (tag->kind == EVENT_SENT)
        on_sent(c);
    else
        call_pump(c);
    pthread_mutex_unlock(&c->lock);
    rpc_call_release(c);
}

/* Readers that stopped: their answer has been under way for too long. */
static void server_scan(rpc_server *s)
{
    double now = clock_seconds(), limit = s->options.reader_seconds;
    pthread_mutex_lock(&s->lock);
    if (now - s->scanned > limit / 8) {
        s->scanned = now;
        for (rpc_call *c = s->calls; c; c = c->next) {
            if (pthread_mutex_trylock(&c->lock))
                continue; /* it is doing something */
            if (c->sending && !atomic_load(&c->closed) && !c->dropped && now - c->sending_since > limit) {
                c->dropped = true;
                log_line("%s: client %s has taken nothing for %.0f s and is dropped", rpc_call_path(c), rpc_call_peer(c), limit);
                grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED, "the client stopped reading", NULL);
            }
            pthread_mutex_unlock(&c->lock);
        }
    }
    pthread_mutex_unlock(&s->lock);
}

static void *serve(void *arg)
{
    rpc_server *s = arg;
    for (;;) {
        bool watch = s->options.reader_seconds > 0 && atomic_load(&s->n_live) > 0;
        gpr_timespec until = gpr_inf_future(GPR_CLOCK_MONOTONIC);
        if (watch)
            until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                 gpr_time_from_millis((int64_t)(s->options.reader_seconds * 250) + 1, GPR_TIMESPAN));
        grpc_event event = grpc_completion_queue_next(s->queue, until, NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (watch)
            server_scan(s);
        if (event.type == GRPC_QUEUE_TIMEOUT)
            continue;
        TAKEN_OVER(event.tag);
#ifdef RPC_PLANT_RACE
        s->n_events++;
#endif
        if (event.tag == &s->shutdown_tag) {
            pthread_mutex_lock(&s->lock);
            s->shut_down = true;
            pthread_cond_broadcast(&s->changed);
            pthread_mutex_unlock(&s->lock);
        } else {
            handle(s, event.tag, event.success);
        }
    }
}

/* ---- start and stop ---- */

/* What gRPC core has to say at level error, in our form. */
/* While this thread opens the port: why it cannot. */
static _Thread_local struct {
    bool wanted;
    char text[200];
} port_trouble;

/* Core has no error for a port but a nested log message: the system's words stand innermost, behind os_error. */
static void note_port_trouble(const char *message)
{
    const char *at = strstr(message, "os_error:\""), *kind = strchr(message, ':');
    const char *words = at ? at + strlen("os_error:\"") : kind ? kind + 1 : message;
    size_t n = strcspn(words, at ? "\"" : "{");
    while (n > 0 && words[n - 1] == ' ')
        n--;
    snprintf(port_trouble.text, sizeof port_trouble.text, "%.*s", (int)(n < 150 ? n : 150), words);
}

static void say(gpr_log_func_args *args)
{
    if (args->severity != GPR_LOG_SEVERITY_ERROR)
        return;
    if (port_trouble.wanted)
        note_port_trouble(args->message);
    else
        log_line("grpc: %s", args->message);
}

static status open_port(rpc_server *s, grpc_server_credentials *credentials)
{
    const char *address = s->options.address;
    port_trouble.wanted = true;
    port_trouble.text[0] = '\0';
    s->port = grpc_server_add_http2_port(s->server, address, credentials);
    port_trouble.wanted = false;
    if (s->port > 0)
        return STATUS_OK;
    return status_fail(STATUS_IO, "cannot listen for gRPC clients on %s%s%s", address, *port_trouble.text ? ": " : "",
                       port_trouble.text);
}

static status read_pem(const char *path, char **out)
{
    status st = STATUS_OK;
    enum { LIMIT = 1 << 20 };
    FILE *f = fopen(path, "r");
    char *text = calloc(1, LIMIT);
    size_t n = f && text ? fread(text, 1, LIMIT, f) : 0;
    if (!f || !text || ferror(f) || n == 0 || n == LIMIT || strlen(text) != n)
        st = status_fail(STATUS_IO, "%s: cannot be read as a PEM file", path);
    if (f)
        fclose(f);
    if (st != STATUS_OK)
        free(text);
    else
        *out = text;
    return st;
}

static status make_credentials(const rpc_options *o, grpc_server_credentials **out)
{
    char *cert = NULL, *key = NULL, *ca = NULL;
    status st = STATUS_OK;
    if (!o->tls_cert && !o->tls_key && !o->tls_client_ca) {
        *out = grpc_insecure_server_credentials_create();
        return STATUS_OK;
    }
    if (!o->tls_cert || !o->tls_key)
        return status_fail(STATUS_USAGE, "TLS needs both a certificate and its key");
    TRY_GOTO(read_pem(o->tls_cert, &cert), out);
    TRY_GOTO(read_pem(o->tls_key, &key), out);
    if (o->tls_client_ca)
        TRY_GOTO(read_pem(o->tls_client_ca, &ca), out);
    grpc_ssl_pem_key_cert_pair pair = {key, cert};
    *out = grpc_ssl_server_credentials_create_ex(
        ca, &pair, 1, ca ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
        NULL);
    if (!*out)
        st = status_fail(STATUS_BAD_INPUT, "%s, %s: no certificate and key", o->tls_cert, o->tls_key);
out:
    free(cert);
    free(key);
    free(ca);
    return st;
}

static grpc_server *make_server(const rpc_options *o)
{
    grpc_resource_quota *quota = grpc_resource_quota_create("door");
    size_t memory = 16 * o->max_message;
    grpc_resource_quota_resize(quota, memory > (1u << 30) ? memory : 1u << 30);
    int max_message = o->max_message < INT32_MAX ? (int)o->max_message : INT32_MAX;
    const struct {
        const char *key;
        int value;
    } numbers[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, max_message},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1},
        {GRPC_ARG_MAX_CONCURRENT_STREAMS, o->max_streams},
        {GRPC_ARG_MAX_METADATA_SIZE, 16384},
        {GRPC_ARG_ALLOW_REUSEPORT, 0}, /* a second server on the port must fail, not share it */
        /* A connection that never says hello, or whose other end has gone without a word, is given up. */
        {GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 20000},
        {GRPC_ARG_KEEPALIVE_TIME_MS, 60000},
        {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000},
        {GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1},
        {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0},
        {GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000}, /* clients may do the same */
    };
    enum { N = sizeof numbers / sizeof numbers[0] };
    grpc_arg args[N + 1];
    memset(args, 0, sizeof args);
    for (int i = 0; i < N; i++) {
        args[i].type = GRPC_ARG_INTEGER;
        args[i].key = (char *)numbers[i].key;
        args[i].value.integer = numbers[i].value;
    }
    args[N].type = GRPC_ARG_POINTER;
    args[N].key = (char *)GRPC_ARG_RESOURCE_QUOTA;
    args[N].value.pointer.p = quota;
    args[N].value.pointer.vtable = grpc_resource_quota_arg_vtable();
    grpc_channel_args all = {N + 1, args};
    grpc_server *server = grpc_server_create(&all, NULL);
    grpc_resource_quota_unref(quota);
    return server;
}

status rpc_server_start(const rpc_options *options, rpc_server **out)
{
    grpc_server_credentials *credentials = NULL;
    rpc_server *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "out of memory");
    s->options = *options;
    s->large_end = &s->large;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->large_came, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    gpr_set_log_function(say);
    grpc_init();
    status st = make_credentials(options, &credentials);
    if (st != STATUS_OK)
        goto fail;
    s->queue = grpc_completion_queue_create_for_next(NULL);
    s->server = make_server(options);
    grpc_server_register_completion_queue(s->server, s->queue, NULL);
    st = open_port(s, credentials);
    grpc_server_credentials_release(credentials);
    if (st != STATUS_OK)
        goto fail;
    if (pthread_create(&s->large_thread, NULL, serve_large, s)) {
        st = status_fail(STATUS_NO_MEMORY, "gRPC: cannot start a thread");
        goto fail;
    }
    s->has_large_thread = true;
    grpc_server_start(s->server);
    for (int i = 0; i < N_WAITING; i++)
        call_wait_for_one(s);
    for (; s->n_threads < N_THREADS; s->n_threads++)
        if (pthread_create(&s->threads[s->n_threads], NULL, serve, s)) {
            st = status_fail(STATUS_NO_MEMORY, "gRPC: cannot start a thread");
            goto fail;
        }
    *out = s;
    return STATUS_OK;
fail:
    rpc_server_stop(s, 0);
    return st;
}

int rpc_server_port(const rpc_server *s)
{
    return s->port;
}

/* Until core has shut down and no call is left, at most so long; true: so it is. */
static bool server_wait(rpc_server *s, double seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)seconds;
    until.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    bool timed_out = false;
    pthread_mutex_lock(&s->lock);
    while (!timed_out && !(s->shut_down && s->n_calls == 0))
        timed_out = pthread_cond_timedwait(&s->changed, &s->lock, &until) != 0;
    bool done = s->shut_down && s->n_calls == 0;
    pthread_mutex_unlock(&s->lock);
    return done;
}

/* Without threads (a start that failed) the queue is emptied here. */
static void server_shut_down(rpc_server *s, double drain_seconds)
{
    HANDED_OVER(&s->shutdown_tag);
    grpc_server_shutdown_and_notify(s->server, s->queue, &s->shutdown_tag);
    if (s->n_threads == 0) {
        grpc_completion_queue_shutdown(s->queue);
        serve(s);
        return;
    }
    if (!server_wait(s, drain_seconds)) {
        grpc_server_cancel_all_calls(s->server);
        while (!server_wait(s, 10))
            log_line("grpc: waiting for calls to end");
    }
    grpc_completion_queue_shutdown(s->queue);
    for (int i = 0; i < s->n_threads; i++)
        pthread_join(s->threads[i], NULL);
}

void rpc_server_stop(rpc_server *s, double drain_seconds)
{
    if (!s)
        return;
    if (s->server) {
        server_shut_down(s, drain_seconds);
        grpc_server_destroy(s->server);
    }
    if (s->has_large_thread) {
        pthread_mutex_lock(&s->lock);
        s->large_stop = true;
        pthread_cond_signal(&s->large_came);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->large_thread, NULL);
    }
    if (s->queue)
        grpc_completion_queue_destroy(s->queue);
    grpc_shutdown();
    pthread_cond_destroy(&s->large_came);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
