/* The HTTP listener: one table of routes, one thread of libmicrohttpd's that waits for sockets. The handlers here answer at once
 * from what is in memory; a route that has to wait (streamed answers) would suspend its connection, not the thread.
 *
 * poll() and not epoll: with edge-triggered epoll libmicrohttpd 0.9.75 does not see that a client has ended its half together
 * with its last bytes, and keeps it until it times out.
 *
 * A client that opens connections and says nothing costs one place of CONNECTIONS for IDLE_SECONDS, nothing else. */
#include "cluster/door_http.h"

#include "proto/control.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    CONNECTIONS = 1000,
    CONNECTION_BYTES = 32 << 10, /* request line and headers of one */
    IDLE_SECONDS = 15,
    BACKLOG = 128,
};

struct door_http {
    coordinator *coordinator; /* borrowed */
    metrics *metrics;         /* borrowed */
    struct MHD_Daemon *daemon;
    int fd, port;
};

typedef struct {
    int code;
    const char *type; /* of the body */
    char allow[64];   /* 405: the methods that would do; "" else */
    bytes_writer body;
} http_reply;

/* Who asks, and what beside the path. */
typedef struct {
    const char *peer;  /* as gRPC says it: "ipv4:127.0.0.1:4711" */
    const char *token; /* of `Authorization: Bearer`; NULL: none */
    bool from_page;    /* a browser sent it for some page */
    plan_take take;    /* ?take=yes, ?take=always */
} http_ask;

typedef void http_handler(door_http *d, const http_ask *ask, http_reply *reply);

/* ---- JSON of a few words ---- */

static void put(bytes_writer *to, const char *text)
{
    bytes_put(to, text, strlen(text));
}

/* Quoted; what is not plain ASCII becomes '?', for it came from anywhere. */
static void put_quoted(bytes_writer *to, const char *text)
{
    put(to, "\"");
    for (; *text; text++) {
        char c = *text >= 0x20 && *text < 0x7f ? *text : '?';
        if (c == '"' || c == '\\')
            put(to, "\\");
        bytes_put(to, &c, 1);
    }
    put(to, "\"");
}

/* An error in the shape OpenAI's clients read. */
static void fail_reply(http_reply *reply, int code, const char *type, const char *code_word, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

static void fail_reply(http_reply *reply, int code, const char *type, const char *code_word, const char *format, ...)
{
    char message[400];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    bytes_reset(&reply->body);
    put(&reply->body, "{\"error\":{\"message\":");
    put_quoted(&reply->body, message);
    put(&reply->body, ",\"type\":");
    put_quoted(&reply->body, type);
    put(&reply->body, ",\"param\":null,\"code\":");
    put_quoted(&reply->body, code_word);
    put(&reply->body, "}}\n");
    reply->code = code;
    reply->type = "application/json";
}

/* ---- the routes ---- */

static void answer_health(door_http *d, const http_ask *ask, http_reply *reply)
{
    (void)ask;
    static const char *const words[] = {
        [SERVING_STARTING] = "starting", [SERVING_READY] = "ready",       [SERVING_RESTARTING] = "restarting",
        [SERVING_DRAINING] = "draining", [SERVING_GIVEN_UP] = "given_up", [SERVING_STOPPED] = "stopped",
    };
    serving_state state = coordinator_state(d->coordinator);
    bool paused = state == SERVING_READY && coordinator_is_paused(d->coordinator);
    reply->code = state == SERVING_READY ? MHD_HTTP_OK : MHD_HTTP_SERVICE_UNAVAILABLE;
    reply->type = "application/json";
    put(&reply->body, "{\"status\":");
    put_quoted(&reply->body, paused ? "paused" : words[state]);
    put(&reply->body, "}\n");
}

static void answer_metrics(door_http *d, const http_ask *ask, http_reply *reply)
{
    (void)ask;
    reply->code = MHD_HTTP_OK;
    reply->type = "text/plain; version=0.0.4; charset=utf-8";
    metrics_render(d->metrics, &reply->body);
}

static void answer_plan(door_http *d, const http_ask *ask, http_reply *reply)
{
    (void)ask;
    reply->code = MHD_HTTP_OK;
    reply->type = "application/json";
    coordinator_describe_plan(d->coordinator, &reply->body);
}

/* An admin's word, as Pause and Shutdown are over gRPC. A page in somebody's browser on this machine comes from loopback too, but
 * says where it is from. */
static void answer_replan(door_http *d, const http_ask *ask, http_reply *reply)
{
    if (ask->from_page || !coordinator_admin_ok(d->coordinator, ask->peer, ask->token)) {
        fail_reply(reply, MHD_HTTP_FORBIDDEN, "permission_error", "not_allowed",
                   "only an admin may: from loopback, or with Authorization: Bearer TOKEN");
        return;
    }
    status st = coordinator_replan(d->coordinator, ask->take);
    if (st == STATUS_OK) {
        reply->code = MHD_HTTP_ACCEPTED;
        reply->type = "application/json";
        put(&reply->body, "{\"status\":\"planning\"}\n");
    } else {
        fail_reply(reply, MHD_HTTP_CONFLICT, "conflict_error", st == STATUS_UNSUPPORTED ? "off" : "not_now", "%s",
                   status_message());
    }
}

static const struct {
    const char *method, *path;
    http_handler *answer;
} routes[] = {
    /* a GET answers HEAD as well */
    {"GET", "/health", answer_health},
    {"GET", "/metrics", answer_metrics},
    {"GET", "/plan", answer_plan},
    {"POST", "/plan", answer_replan},
};
enum { N_ROUTES = sizeof routes / sizeof routes[0] };

static void find_answer(door_http *d, const char *method, const char *path, const http_ask *ask, http_reply *reply)
{
    const char *asked = strcmp(method, "HEAD") == 0 ? "GET" : method;
    char allowed[64] = "";
    for (int i = 0; i < N_ROUTES; i++) {
        if (strcmp(routes[i].path, path) != 0)
            continue;
        if (strcmp(routes[i].method, asked) == 0) {
            routes[i].answer(d, ask, reply);
            return;
        }
        size_t n = strlen(allowed);
        snprintf(allowed + n, sizeof allowed - n, "%s%s", n ? ", " : "",
                 strcmp(routes[i].method, "GET") == 0 ? "GET, HEAD" : routes[i].method);
    }
    if (*allowed)
        fail_reply(reply, MHD_HTTP_METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed",
                   "%.20s is not allowed for %.200s, only %s", method, path, allowed);
    else
        fail_reply(reply, MHD_HTTP_NOT_FOUND, "invalid_request_error", "not_found", "there is no %.200s here", path);
    snprintf(reply->allow, sizeof reply->allow, "%s", allowed);
}

/* ---- libmicrohttpd's side ---- */

static enum MHD_Result queue_reply(struct MHD_Connection *connection, http_reply *reply)
{
    /* It takes the body over, and frees it. */
    struct MHD_Response *response = MHD_create_response_from_buffer(reply->body.size, reply->body.data, MHD_RESPMEM_MUST_FREE);
    if (!response) {
        bytes_clear(&reply->body);
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, reply->type);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    if (*reply->allow)
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, reply->allow);
    enum MHD_Result queued = MHD_queue_response(connection, (unsigned)reply->code, response);
    MHD_destroy_response(response);
    return queued;
}

static bool has_body(struct MHD_Connection *connection)
{
    const char *length = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
    return (length && strcmp(length, "0") != 0) ||
           MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_TRANSFER_ENCODING);
}

static http_ask read_ask(struct MHD_Connection *connection, char *peer, size_t size)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    const struct sockaddr *address = info ? info->client_addr : NULL;
    char host[64] = "";
    *peer = '\0';
    if (address && getnameinfo(address, address->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in),
                               host, sizeof host, NULL, 0, NI_NUMERICHOST) == 0)
        snprintf(peer, size, address->sa_family == AF_INET6 ? "ipv6:[%s]:0" : "ipv4:%s:0", host);
    const char *said = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_AUTHORIZATION);
    const char *take = MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, "take");
    return (http_ask){.peer = peer,
                      .token = said && strncasecmp(said, "Bearer ", 7) == 0 ? said + 7 : NULL,
                      .from_page = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Origin") != NULL,
                      .take = !take                         ? TAKE_BY_MODE
                              : strcmp(take, "always") == 0 ? TAKE_ALWAYS
                              : strcmp(take, "yes") == 0    ? TAKE_IF_IT_PAYS
                                                            : TAKE_BY_MODE};
}

/* Called with the headers, and again at the end of the request. No route reads a body yet: whoever sends one is answered at the
 * headers, which ends the connection; all others at the end, which keeps it. */
static enum MHD_Result take_request(void *arg, struct MHD_Connection *connection, const char *path, const char *method,
                                    const char *version, const char *upload, size_t *upload_size, void **state)
{
    static int seen;
    (void)version, (void)upload, (void)upload_size;
    if (!*state && !has_body(connection)) {
        *state = &seen;
        return MHD_YES;
    }
    http_reply reply = {.code = MHD_HTTP_INTERNAL_SERVER_ERROR, .type = "application/json"};
    char peer[80];
    http_ask ask = read_ask(connection, peer, sizeof peer);
    find_answer(arg, method, path, &ask, &reply);
    if (reply.body.failed) {
        bytes_clear(&reply.body);
        return MHD_NO; /* no memory: the connection is closed */
    }
    return queue_reply(connection, &reply);
}

static void keep_quiet(void *arg, const char *format, va_list args)
{
    (void)arg, (void)format, (void)args; /* clients that break off are not worth a line */
}

static status fail_listen(door_http *d, const char *address, int error)
{
    if (d->fd >= 0)
        close(d->fd);
    d->fd = -1;
    return status_fail(STATUS_IO, "--http %s: cannot listen there (%s)", address, strerror(error));
}

static status listen_at(door_http *d, const char *address)
{
    char host[256], port[8];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *found = NULL;
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    const int on = 1;
    TRY(control_split_address("--http", address, host, port));
    int rc = getaddrinfo(*host ? host : NULL, port, &hints, &found);
    if (rc != 0)
        return status_fail(STATUS_IO, "--http %s: %s", address, gai_strerror(rc));
    d->fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool ok = d->fd >= 0 && setsockopt(d->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
              bind(d->fd, found->ai_addr, found->ai_addrlen) == 0 && listen(d->fd, BACKLOG) == 0 &&
              getsockname(d->fd, (struct sockaddr *)&bound, &size) == 0;
    int error = errno;
    freeaddrinfo(found);
    if (!ok)
        return fail_listen(d, address, error);
    d->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    return STATUS_OK;
}

static status start_daemon(door_http *d, const char *address)
{
    d->daemon = MHD_start_daemon(
        MHD_USE_POLL_INTERNAL_THREAD | MHD_USE_ERROR_LOG, 0, NULL, NULL, take_request, d, MHD_OPTION_EXTERNAL_LOGGER, keep_quiet,
        NULL, MHD_OPTION_LISTEN_SOCKET, d->fd, MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)IDLE_SECONDS, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_BYTES, MHD_OPTION_END);
    if (!d->daemon)
        return fail_listen(d, address, errno);
    d->fd = -1; /* the daemon closes it */
    return STATUS_OK;
}

status door_http_start(coordinator *c, metrics *m, const char *address, door_http **out)
{
    door_http *d = calloc(1, sizeof *d);
    if (!d)
        return status_fail(STATUS_NO_MEMORY, "no memory for the HTTP listener");
    *d = (door_http){.coordinator = c, .metrics = m, .fd = -1};
    status st = listen_at(d, address);
    if (st == STATUS_OK)
        st = start_daemon(d, address);
    if (st == STATUS_OK)
        *out = d;
    else
        free(d);
    return st;
}

int door_http_port(const door_http *d)
{
    return d->port;
}

void door_http_stop(door_http *d)
{
    if (!d)
        return;
    MHD_stop_daemon(d->daemon);
    free(d);
}
