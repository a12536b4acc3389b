/* Each call has a completion queue of its own, so that its thread waits for nothing else. Three operations are under way:
 *
 *   STARTED (metadata and request are out)     MESSAGE (the next answer; asked for again when it has been taken)     STATUS (the
 * end)
 *
 * STATUS is always the last to matter; until it and the two others have come back, the call's memory must stay. */
#include "cluster/rpc_client.h"

#include "cluster/rpc_tsan.h"

#include <errno.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_MESSAGE = 64 << 20, MOST_PEM = 1 << 20 };

struct rpc_client {
    grpc_channel *channel;
};

enum { STARTED, MESSAGE, STATUS, N_TAGS };

struct rpc_stream {
    grpc_completion_queue *queue;
    grpc_call *call;
    rpc_client *client; /* borrowed */
    grpc_metadata_array headers, trailers;
    grpc_slice details;
    grpc_status_code code;
    const char *error;          /* core's own words; ours to free */
    grpc_byte_buffer *received; /* core writes it at any time before MESSAGE comes back */
    bool has_message;           /* it has, and nobody has taken it */
    bool pending[N_TAGS];
    char tags[N_TAGS]; /* their addresses are the tags */
    bool no_more;      /* the server has said all it will */
    bool ended;
    rpc_end end;
};

const char *rpc_code_word(int code)
{
    static const char *const words[] = {
        "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
        "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
        "DATA_LOSS", "UNAUTHENTICATED"};
    return code >= 0 && code < (int)(sizeof words / sizeof *words) ? words[code] : "an unknown code";
}

/* ---- the channel ---- */

static void keep_quiet(gpr_log_func_args *args)
{
    (void)args; /* what went wrong is in the status of the call */
}

/* A whole PEM file as text; free() it. */
static status read_pem(const char *path, char **out)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    char *text = calloc(1, MOST_PEM + 1);
    size_t n = text ? fread(text, 1, MOST_PEM, f) : 0;
    fclose(f);
    if (!text)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", path);
    if (n == 0 || n == MOST_PEM || !strstr(text, "-----BEGIN")) {
        free(text);
        return status_fail(STATUS_BAD_INPUT, "%s: not a PEM file", path);
    }
    *out = text;
    return STATUS_OK;
}

static status make_credentials(const rpc_client_options *o, grpc_channel_credentials **out)
{
    char *ca = NULL, *cert = NULL, *key = NULL;
    status st = STATUS_OK;
    if (!o->tls_ca) {
        *out = grpc_insecure_credentials_create();
        return STATUS_OK;
    }
    TRY_GOTO(read_pem(o->tls_ca, &ca), done);
    if (o->tls_cert && o->tls_key) {
        TRY_GOTO(read_pem(o->tls_cert, &cert), done);
        TRY_GOTO(read_pem(o->tls_key, &key), done);
    }
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    *out = grpc_ssl_credentials_create(ca, cert ? &pair : NULL, NULL, NULL);
    if (!*out)
        st = status_fail(STATUS_BAD_INPUT, "%s: no certificates that can be used", o->tls_ca);
done:
    free(ca);
    free(cert);
    free(key);
    return st;
}

status rpc_client_open(const rpc_client_options *options, rpc_client **out)
{
    grpc_channel_credentials *credentials = NULL;
    if (!getenv("GRPC_VERBOSITY"))
        gpr_set_log_function(keep_quiet);
    grpc_init();
    rpc_client *c = calloc(1, sizeof *c);
    status st = c ? make_credentials(options, &credentials) : status_fail(STATUS_NO_MEMORY, "no memory for a client");
    if (st != STATUS_OK) {
        rpc_client_close(c);
        if (!c)
            grpc_shutdown();
        return st;
    }
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER,
         .key = (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
         .value.integer = options->max_message ? (int)options->max_message : MOST_MESSAGE},
        /* the servers meant here are near; a proxy set for the web would only be in the way */
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_ENABLE_HTTP_PROXY, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, .value.integer = 200},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, .value.integer = 2000},
    };
    const grpc_channel_args all = {.num_args = sizeof args / sizeof *args, .args = args};
    c->channel = grpc_channel_create(options->address, credentials, &all);
    grpc_channel_credentials_release(credentials);
    *out = c;
    return STATUS_OK;
}

void rpc_client_close(rpc_client *c)
{
    if (!c)
        return;
    if (c->channel)
        grpc_channel_destroy(c->channel);
    free(c);
    grpc_shutdown();
}

/* ---- a call ---- */

static gpr_timespec after(double seconds)
{
    if (seconds <= 0)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros((int64_t)(seconds * 1e6), GPR_TIMESPAN));
}

/* An operation that gRPC refuses would be a mistake here, not of the world: it is then treated as done. */
static void begin(rpc_stream *s, int tag, const grpc_op *ops, size_t n)
{
    s->pending[tag] = true;
    HANDED_OVER(&s->tags[tag]);
    if (grpc_call_start_batch(s->call, ops, n, &s->tags[tag], NULL) != GRPC_CALL_OK)
        s->pending[tag] = false;
}

static void ask_message(rpc_stream *s)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &s->received};
    begin(s, MESSAGE, &op, 1);
}

static grpc_byte_buffer *pack(const ProtobufCMessage *message)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

status rpc_stream_start(rpc_client *c, const char *method, const ProtobufCMessage *request, double deadline_seconds,
                        rpc_stream **out)
{
    rpc_stream *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory for a call");
    s->client = c;
    s->queue = grpc_completion_queue_create_for_next(NULL);
    s->details = grpc_empty_slice();
    grpc_metadata_array_init(&s->headers);
    grpc_metadata_array_init(&s->trailers);
    grpc_slice path = grpc_slice_from_copied_string(method);
    s->call =
        grpc_channel_create_call(c->channel, NULL, GRPC_PROPAGATE_DEFAULTS, s->queue, path, NULL, after(deadline_seconds), NULL);
    grpc_slice_unref(path);
    grpc_byte_buffer *packed = pack(request);
    grpc_op end = {
        .op = GRPC_OP_RECV_STATUS_ON_CLIENT,
        .data.recv_status_on_client = {.trailing_metadata = &s->trailers, .status = &s->code, .status_details = &s->details}};
    grpc_op start[] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = packed},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &s->headers},
    };
    begin(s, STATUS, &end, 1);
    begin(s, STARTED, start, sizeof start / sizeof *start);
    grpc_byte_buffer_destroy(packed);
    ask_message(s);
    *out = s;
    return STATUS_OK;
}

/* Core words an UNAVAILABLE of the server and a connection that broke alike. The latter also costs the channel its connection,
 * which shows a moment later. */
static bool connection_is_gone(const rpc_stream *s)
{
    for (int i = 0; i < 20; i++) {
        if (grpc_channel_check_connectivity_state(s->client->channel, 0) != GRPC_CHANNEL_READY)
            return true;
        gpr_sleep_until(after(0.005));
    }
    return false;
}

static void note_end(rpc_stream *s)
{
    size_t n = GRPC_SLICE_LENGTH(s->details);
    s->ended = true;
    if (s->end.code != RPC_ENDED_OK) /* settled here already */
        return;
    s->end.code = (int)s->code;
    s->end.lost = s->code == GRPC_STATUS_UNAVAILABLE && connection_is_gone(s);
    n = n < sizeof s->end.sentence - 1 ? n : sizeof s->end.sentence - 1;
    memcpy(s->end.sentence, GRPC_SLICE_START_PTR(s->details), n);
    s->end.sentence[n] = '\0';
    for (char *at = s->end.sentence; *at; at++)
        if ((unsigned char)*at < 0x20)
            *at = ' ';
    if (n == 0 && s->code != GRPC_STATUS_OK)
        snprintf(s->end.sentence, sizeof s->end.sentence, "the call ended with %s", rpc_code_word(s->end.code));
}

/* Takes one event from the queue; false: none came in time. */
static bool take_event(rpc_stream *s, gpr_timespec until)
{
    grpc_event event = grpc_completion_queue_next(s->queue, until, NULL);
    if (event.type != GRPC_OP_COMPLETE)
        return false;
    TAKEN_OVER(event.tag);
    for (int tag = 0; tag < N_TAGS; tag++)
        if (event.tag == &s->tags[tag])
            s->pending[tag] = false;
    if (event.tag == &s->tags[MESSAGE]) {
        s->has_message = s->received != NULL;
        s->no_more = !s->has_message;
    }
    if (event.tag == &s->tags[STATUS])
        note_end(s);
    return true;
}

/* The received bytes as a message; NULL: they are none. */
static ProtobufCMessage *unpack(rpc_stream *s, const ProtobufCMessageDescriptor *type)
{
    grpc_byte_buffer_reader reader;
    ProtobufCMessage *message = NULL;
    if (grpc_byte_buffer_reader_init(&reader, s->received)) {
        grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
        message = protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(whole), GRPC_SLICE_START_PTR(whole));
        grpc_slice_unref(whole);
        grpc_byte_buffer_reader_destroy(&reader);
    }
    grpc_byte_buffer_destroy(s->received);
    s->received = NULL;
    return message;
}

rpc_event rpc_stream_next(rpc_stream *s, double wait_seconds, const ProtobufCMessageDescriptor *type, ProtobufCMessage **out)
{
    gpr_timespec until = wait_seconds > 0 ? after(wait_seconds) : gpr_now(GPR_CLOCK_MONOTONIC);
    for (;;) {
        if (s->has_message) {
            s->has_message = false;
            *out = unpack(s, type);
            if (*out) {
                ask_message(s);
                return RPC_MESSAGE;
            }
            s->no_more = true;
            s->end = (rpc_end){.code = 13, .sentence = "an answer is not what this program understands"};
            rpc_stream_cancel(s);
        }
        if (s->ended && (s->no_more || !s->pending[MESSAGE]))
            return RPC_ENDED;
        if (!take_event(s, until))
            return RPC_NOTHING_YET;
    }
}

const rpc_end *rpc_stream_end(const rpc_stream *s)
{
    return &s->end;
}

void rpc_stream_cancel(rpc_stream *s)
{
    grpc_call_cancel(s->call, NULL);
}

void rpc_stream_close(rpc_stream *s)
{
    if (!s)
        return;
    if (!s->ended)
        rpc_stream_cancel(s);
    while (s->pending[STARTED] || s->pending[MESSAGE] || s->pending[STATUS])
        if (!take_event(s, gpr_inf_future(GPR_CLOCK_MONOTONIC)))
            break;
    grpc_completion_queue_shutdown(s->queue);
    while (grpc_completion_queue_next(s->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_call_unref(s->call);
    grpc_byte_buffer_destroy(s->received);
    grpc_slice_unref(s->details);
    grpc_metadata_array_destroy(&s->headers);
    grpc_metadata_array_destroy(&s->trailers);
    grpc_completion_queue_destroy(s->queue);
    free(s);
}

status rpc_client_call(rpc_client *c, const char *method, const ProtobufCMessage *request, double deadline_seconds,
                       const ProtobufCMessageDescriptor *type, ProtobufCMessage **out, rpc_end *end)
{
    rpc_stream *s = NULL;
    ProtobufCMessage *answer = NULL;
    TRY(rpc_stream_start(c, method, request, deadline_seconds, &s));
    for (bool ended = false; !ended;) {
        ProtobufCMessage *message = NULL;
        rpc_event event = rpc_stream_next(s, 3600, type, &message);
        if (event == RPC_MESSAGE) {
            if (answer)
                protobuf_c_message_free_unpacked(answer, NULL);
            answer = message;
        }
        ended = event == RPC_ENDED;
    }
    *end = *rpc_stream_end(s);
    rpc_stream_close(s);
    if (end->code == RPC_ENDED_OK && !answer)
        *end = (rpc_end){.code = 13, .sentence = "the server said nothing"};
    if (end->code != RPC_ENDED_OK && answer) {
        protobuf_c_message_free_unpacked(answer, NULL);
        answer = NULL;
    }
    *out = answer;
    return STATUS_OK;
}
