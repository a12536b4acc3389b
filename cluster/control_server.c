#include "cluster/control_server.h"

#include "proto/clock.h"
#include "proto/frame.h"

#include <errno.h>
#include <math.h>
#include <netdb.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    MAX_STRANGERS = 32, /* the oldest makes room: whoever holds places open cannot keep the leader out */
    MAX_EVENTS = 64,
    READ_BYTES = 64 << 10,
    STRANGER_READ_BYTES = 4 << 10,
    MAX_ACCEPTS = 64, /* per step, so that a flood of connections leaves room for the leader */
};
#define MAX_OUTBOX       ((size_t)256 << 20) /* a leader that has not read this much is stuck */
#define STRANGER_SECONDS 5.0
#define GOODBYE_SECONDS  1.0 /* a refused peer has this long to read why */
#define NO_FILES_SECONDS 0.1 /* no descriptors left: look again after this */

typedef enum { STRANGER_FREE, STRANGER_SILENT, STRANGER_REFUSED } stranger_state;

typedef struct {
    stranger_state state;
    int fd;
    double deadline;
    frame_reader in;
} stranger;

struct control_server {
    const control_listener *listener;
    void *arg;
    int epoll_fd, listen_fd, wake_fd;
    char address[280], here[280];
    bool loopback;
    bool expecting;
    control_secret secret;
    uint64_t launch;
    double deaf_until; /* accepting nobody before; 0: accepting */
    stranger strangers[MAX_STRANGERS];
    frame_reader in; /* of the leader */
    bytes_writer scratch;

    pthread_mutex_t lock; /* over what follows: senders are on any thread */
    int leader_fd;        /* -1: none */
    bytes_writer out;     /* what the socket did not take yet, from out_sent on */
    size_t out_sent;
    bool out_watched; /* epoll tells when the socket takes more */
    bool overrun;     /* the outbox grew over its limit */
};

/* epoll data: strangers are their index */
enum { EVENT_LISTEN = MAX_STRANGERS, EVENT_LEADER, EVENT_WAKE };

static void watch(control_server *s, int operation, int fd, uint32_t events, uint32_t what)
{
    struct epoll_event e = {.events = events, .data.u32 = what};
    epoll_ctl(s->epoll_fd, operation, fd, &e);
}

/* ---- listening ---- */

static bool address_is_loopback(const struct sockaddr *a)
{
    static const struct in6_addr one = IN6ADDR_LOOPBACK_INIT;
    if (a->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    return a->sa_family == AF_INET6 && memcmp(&((const struct sockaddr_in6 *)a)->sin6_addr, &one, sizeof one) == 0;
}

static bool address_is_any(const struct sockaddr *a)
{
    static const struct in6_addr any = IN6ADDR_ANY_INIT;
    if (a->sa_family == AF_INET)
        return ((const struct sockaddr_in *)a)->sin_addr.s_addr == htonl(INADDR_ANY);
    return a->sa_family == AF_INET6 && memcmp(&((const struct sockaddr_in6 *)a)->sin6_addr, &any, sizeof any) == 0;
}

static void write_address(char out[280], const char *host, const char *port)
{
    snprintf(out, 280, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

/* What others are told: the number bound to, and a name where it is bound to all. */
static status note_address(control_server *s)
{
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    char host[256], port[8], name[256] = "";
    if (getsockname(s->listen_fd, (struct sockaddr *)&bound, &size) != 0 ||
        getnameinfo((struct sockaddr *)&bound, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return status_fail(STATUS_IO, "the control socket does not know its own address: %s", strerror(errno));
    s->loopback = address_is_loopback((struct sockaddr *)&bound);
    bool any = address_is_any((struct sockaddr *)&bound);
    gethostname(name, sizeof name - 1);
    write_address(s->address, any ? name : host, port);
    write_address(s->here, any ? (bound.ss_family == AF_INET6 ? "::1" : "127.0.0.1") : host, port);
    return STATUS_OK;
}

static int try_listen(const struct addrinfo *at)
{
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int yes = 1;
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, at->ai_addr, at->ai_addrlen) == 0 && listen(fd, 256) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static status open_listener(control_server *s, const char *address)
{
    char host[256], port[8];
    TRY(control_split_address("the control address", address, host, port));
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    int rc = getaddrinfo(*host ? host : NULL, port, &hints, &found);
    if (rc != 0)
        return status_fail(STATUS_IO, "the control address %s: %s", address, gai_strerror(rc));
    for (struct addrinfo *i = found; i && s->listen_fd < 0; i = i->ai_next)
        s->listen_fd = try_listen(i);
    int error = errno;
    freeaddrinfo(found);
    if (s->listen_fd < 0)
        return status_fail(STATUS_IO, "cannot listen for workers on %s: %s", address, strerror(error));
    watch(s, EPOLL_CTL_ADD, s->listen_fd, EPOLLIN, EVENT_LISTEN);
    return note_address(s);
}

status control_server_create(const char *address, const control_listener *listener, void *arg, control_server **out)
{
    control_server *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory for the control connection");
    s->listener = listener;
    s->arg = arg;
    s->listen_fd = s->leader_fd = -1;
    pthread_mutex_init(&s->lock, NULL);
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    status st = s->epoll_fd >= 0 && s->wake_fd >= 0
                    ? STATUS_OK
                    : status_fail(STATUS_IO, "no descriptors for the control connection: %s", strerror(errno));
    if (st == STATUS_OK) {
        watch(s, EPOLL_CTL_ADD, s->wake_fd, EPOLLIN, EVENT_WAKE);
        st = open_listener(s, address);
    }
    if (st != STATUS_OK) {
        control_server_destroy(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

const char *control_server_address(const control_server *s, bool here)
{
    return here ? s->here : s->address;
}

bool control_server_is_loopback(const control_server *s)
{
    return s->loopback;
}

int control_server_fd(const control_server *s)
{
    return s->epoll_fd;
}

/* ---- strangers ---- */

static void stranger_close(stranger *x)
{
    close(x->fd); /* leaves epoll by itself: no other descriptor refers to the socket */
    frame_reader_clear(&x->in);
    *x = (stranger){.fd = -1};
}

static void send_refusal(control_server *s, int fd, const char *reason, bool later)
{
    Convoke__Control__Refusal refusal = CONVOKE__CONTROL__REFUSAL__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    refusal.reason = (char *)reason;
    refusal.later = later;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL;
    message.refusal = &refusal;
    bytes_reset(&s->scratch);
    if (control_put_to_leader(&s->scratch, &message) == STATUS_OK) {
        ssize_t sent = send(fd, s->scratch.data, s->scratch.size, MSG_NOSIGNAL | MSG_DONTWAIT);
        (void)sent; /* a few bytes into an empty socket: if even they do not fit, the peer learns nothing but the end */
    }
}

static void tell_refused(const control_server *s, int fd, const char *why)
{
    struct sockaddr_storage from;
    socklen_t size = sizeof from;
    char host[256] = "", port[8] = "", peer[280] = "a peer that has left";
    if (!s->listener->refused)
        return;
    if (getpeername(fd, (struct sockaddr *)&from, &size) == 0 &&
        getnameinfo((struct sockaddr *)&from, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        write_address(peer, host, port);
    s->listener->refused(s->arg, peer, why);
}

/* Closing at once with bytes unread would reset the connection and take the reason away from the peer: it gets a moment. */
static void stranger_refuse(control_server *s, stranger *x, const char *reason, bool later)
{
    tell_refused(s, x->fd, reason);
    send_refusal(s, x->fd, reason, later);
    shutdown(x->fd, SHUT_WR);
    frame_reader_clear(&x->in);
    x->state = STRANGER_REFUSED;
    x->deadline = clock_seconds() + GOODBYE_SECONDS;
}

static stranger *place_for_stranger(control_server *s)
{
    stranger *oldest = NULL;
    for (int i = 0; i < MAX_STRANGERS; i++) {
        stranger *x = &s->strangers[i];
        if (x->state == STRANGER_FREE)
            return x;
        /* Those already refused go first; deadlines rise with age. */
        if (!oldest || x->state > oldest->state || (x->state == oldest->state && x->deadline < oldest->deadline))
            oldest = x;
    }
    stranger_close(oldest);
    return oldest;
}

static void accept_strangers(control_server *s)
{
    for (int i = 0; i < MAX_ACCEPTS; i++) {
        int fd = accept4(s->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                /* The connection stays in the queue and would wake us without end. */
                watch(s, EPOLL_CTL_MOD, s->listen_fd, 0, EVENT_LISTEN);
                s->deaf_until = clock_seconds() + NO_FILES_SECONDS;
            }
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            return;
        }
        stranger *x = place_for_stranger(s);
        *x = (stranger){.state = STRANGER_SILENT, .fd = fd, .deadline = clock_seconds() + STRANGER_SECONDS};
        frame_reader_init(&x->in, CONTROL_HELLO_BYTES);
        watch(s, EPOLL_CTL_ADD, fd, EPOLLIN, (uint32_t)(x - s->strangers));
    }
}

static bool has_leader(control_server *s)
{
    pthread_mutex_lock(&s->lock);
    bool has = s->leader_fd >= 0;
    pthread_mutex_unlock(&s->lock);
    return has;
}

/* NULL when this Hello makes a leader, else why not; *later: it may come again. The secret comes first: who has none learns
 * nothing else. */
static const char *judge_hello(control_server *s, const Convoke__Control__Hello *hello, bool *later)
{
    static _Thread_local char why[1100];
    bool known = control_secret_equal(&s->secret, hello->secret.data, hello->secret.len);
    *later = !s->expecting;
    if (!s->expecting || !known)
        return s->expecting ? "wrong secret" : "no workers are expected now";
    if (hello->protocol != CONTROL_PROTOCOL) {
        snprintf(why, sizeof why, "protocol version %u; this coordinator (convoke %s) speaks version %d", hello->protocol,
                 CONVOKE_VERSION, CONTROL_PROTOCOL);
        return why;
    }
    *later = has_leader(s);
    if (*later)
        return "this job has a leader already";
    if (hello->n_ranks < 1 || hello->n_node_of_rank != hello->n_ranks || hello->n_host_of_rank != hello->n_ranks ||
        hello->n_pid_of_rank != hello->n_ranks)
        return "the lists of ranks are not as long as their number";
    return NULL;
}

static void become_leader(control_server *s, stranger *x)
{
    control_tune_socket(x->fd); /* an untuned one works as well, later */
    frame_reader_clear(&s->in);
    s->in = x->in; /* it may hold the beginning of what follows */
    s->in.max_bytes = CONTROL_FRAME_BYTES;
    watch(s, EPOLL_CTL_MOD, x->fd, EPOLLIN, EVENT_LEADER);
    pthread_mutex_lock(&s->lock);
    s->leader_fd = x->fd;
    bytes_reset(&s->out);
    s->out_sent = 0;
    s->out_watched = s->overrun = false;
    pthread_mutex_unlock(&s->lock);
    *x = (stranger){.fd = -1};
}

static void leader_frames(control_server *s);

static void meet(control_server *s, stranger *x, const void *payload, size_t size)
{
    Convoke__Control__ToCoordinator *m = NULL;
    const char *why = NULL;
    bool later = false;
    if (control_get_to_coordinator(payload, size, &m) != STATUS_OK ||
        m->kind_case != CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO)
        why = "a Hello was expected";
    else
        why = judge_hello(s, m->hello, &later);
    if (why) {
        stranger_refuse(s, x, why, later);
    } else {
        become_leader(s, x);
        if (s->listener->joined(s->arg, m->hello))
            leader_frames(s);
        else {
            char reason[1024];
            snprintf(reason, sizeof reason, "%s", status_message());
            tell_refused(s, s->leader_fd, reason);
            control_server_drop_leader(s, reason);
        }
    }
    if (m)
        convoke__control__to_coordinator__free_unpacked(m, NULL);
}

static void stranger_read(control_server *s, stranger *x)
{
    if (x->state == STRANGER_REFUSED) {
        char nowhere[STRANGER_READ_BYTES];
        ssize_t n = recv(x->fd, nowhere, sizeof nowhere, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            stranger_close(x);
        return;
    }
    void *room = frame_reader_room(&x->in, STRANGER_READ_BYTES);
    ssize_t n = room ? recv(x->fd, room, STRANGER_READ_BYTES, 0) : -1;
    if (n <= 0) {
        if (!room || n == 0 || (errno != EAGAIN && errno != EINTR))
            stranger_close(x);
        return;
    }
    frame_reader_filled(&x->in, (size_t)n);
    const void *payload;
    size_t size;
    if (frame_reader_next(&x->in, &payload, &size) != STATUS_OK)
        stranger_refuse(s, x, status_message(), false);
    else if (payload)
        meet(s, x, payload, size);
}

static void end_overdue(control_server *s, double now)
{
    for (int i = 0; i < MAX_STRANGERS; i++) {
        stranger *x = &s->strangers[i];
        if (x->state == STRANGER_FREE || now < x->deadline)
            continue;
        if (x->state == STRANGER_SILENT)
            stranger_refuse(s, x, "no Hello in time", false);
        else
            stranger_close(x);
    }
    if (s->deaf_until > 0 && now >= s->deaf_until) {
        s->deaf_until = 0;
        watch(s, EPOLL_CTL_MOD, s->listen_fd, EPOLLIN, EVENT_LISTEN);
    }
}

/* ---- the leader ---- */

static void close_leader(control_server *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->leader_fd >= 0)
        close(s->leader_fd);
    s->leader_fd = -1;
    bytes_clear(&s->out); /* it may have been large */
    s->out_sent = 0;
    pthread_mutex_unlock(&s->lock);
    frame_reader_clear(&s->in);
}

static void lose_leader(control_server *s, bool refused, const char *why)
{
    char text[1024];
    snprintf(text, sizeof text, "%s", why);
    close_leader(s);
    s->listener->lost(s->arg, refused, text);
}

void control_server_drop_leader(control_server *s, const char *reason)
{
    if (!has_leader(s))
        return;
    if (reason) {
        send_refusal(s, s->leader_fd, reason, false);
        shutdown(s->leader_fd, SHUT_WR);
    }
    close_leader(s);
}

static void leader_message(control_server *s, const void *payload, size_t size)
{
    Convoke__Control__ToCoordinator *m;
    char why[200];
    if (control_get_to_coordinator(payload, size, &m) != STATUS_OK) {
        lose_leader(s, true, status_message());
        return;
    }
    uint64_t launch = control_launch_of_to_coordinator(m);
    if (m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO) {
        control_server_drop_leader(s, "a second Hello");
        s->listener->lost(s->arg, true, "the leader said Hello twice");
    } else if (launch != s->launch) {
        snprintf(why, sizeof why, "a message of launch %llu; this is launch %llu", (unsigned long long)launch,
                 (unsigned long long)s->launch);
        control_server_drop_leader(s, why);
        s->listener->lost(s->arg, true, why);
    } else {
        s->listener->message(s->arg, m);
    }
    convoke__control__to_coordinator__free_unpacked(m, NULL);
}

/* Everything that is whole; the listener may end the connection in between. */
static void leader_frames(control_server *s)
{
    const void *payload;
    size_t size;
    while (has_leader(s)) {
        if (frame_reader_next(&s->in, &payload, &size) != STATUS_OK) {
            lose_leader(s, true, status_message());
            return;
        }
        if (!payload)
            return;
        leader_message(s, payload, size);
    }
}

static void leader_read(control_server *s)
{
    void *room = frame_reader_room(&s->in, READ_BYTES);
    if (!room) {
        lose_leader(s, true, "no memory for a frame of the leader");
        return;
    }
    ssize_t n = recv(s->leader_fd, room, READ_BYTES, 0);
    if (n > 0) {
        frame_reader_filled(&s->in, (size_t)n);
        leader_frames(s);
    } else if (n == 0) {
        lose_leader(s, false, "the leader closed the control connection");
    } else if (errno != EAGAIN && errno != EINTR) {
        char why[200];
        snprintf(why, sizeof why, "the control connection broke: %s", strerror(errno));
        lose_leader(s, false, why);
    }
}

/* ---- sending: under the lock ---- */

/* Bytes the socket took; errors count as taken: the reader's side will see the end of the connection. */
static size_t push(int fd, const unsigned char *at, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t n = send(fd, at + done, size - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0)
            done += (size_t)n;
        else if (n < 0 && errno == EINTR)
            continue;
        else if (n < 0 && errno == EAGAIN)
            break;
        else
            return size;
    }
    return done;
}

static void wake(control_server *s)
{
    uint64_t one = 1;
    ssize_t n = write(s->wake_fd, &one, sizeof one);
    (void)n; /* full: it is awake */
}

static void watch_out(control_server *s, bool wanted)
{
    if (s->out_watched == wanted)
        return;
    s->out_watched = wanted;
    watch(s, EPOLL_CTL_MOD, s->leader_fd, wanted ? EPOLLIN | EPOLLOUT : EPOLLIN, EVENT_LEADER);
}

bool control_server_send(control_server *s, const void *frames, size_t size)
{
    pthread_mutex_lock(&s->lock);
    bool fine = s->leader_fd >= 0 && !s->overrun;
    if (fine) {
        bool idle = s->out.size == s->out_sent;
        size_t done = idle ? push(s->leader_fd, frames, size) : 0;
        if (s->out.size - s->out_sent + size - done > MAX_OUTBOX)
            fine = false;
        else
            bytes_put(&s->out, (const unsigned char *)frames + done, size - done);
        if (!fine || s->out.failed) { /* half a frame may be out: the connection is of no further use */
            s->overrun = true;
            fine = false;
            wake(s);
        } else if (done < size) {
            watch_out(s, true);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return fine;
}

static void leader_write(control_server *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->leader_fd >= 0) {
        s->out_sent += push(s->leader_fd, s->out.data + s->out_sent, s->out.size - s->out_sent);
        if (s->out_sent == s->out.size) {
            bytes_reset(&s->out);
            s->out_sent = 0;
            watch_out(s, false);
        } else if (s->out_sent > s->out.size / 2) {
            memmove(s->out.data, s->out.data + s->out_sent, s->out.size - s->out_sent);
            s->out.size -= s->out_sent;
            s->out_sent = 0;
        }
    }
    pthread_mutex_unlock(&s->lock);
}

static void check_overrun(control_server *s)
{
    uint64_t count;
    ssize_t n = read(s->wake_fd, &count, sizeof count);
    (void)n;
    pthread_mutex_lock(&s->lock);
    bool over = s->leader_fd >= 0 && s->overrun;
    pthread_mutex_unlock(&s->lock);
    if (over)
        lose_leader(s, true, "the leader does not read what it is sent");
}

/* ---- the thread's side ---- */

void control_server_expect(control_server *s, const control_secret *secret)
{
    s->expecting = secret != NULL;
    explicit_bzero(&s->secret, sizeof s->secret);
    if (secret)
        s->secret = *secret;
}

void control_server_set_launch(control_server *s, uint64_t launch)
{
    s->launch = launch;
}

int control_server_wait_ms(const control_server *s)
{
    double next = s->deaf_until > 0 ? s->deaf_until : INFINITY;
    for (int i = 0; i < MAX_STRANGERS; i++)
        if (s->strangers[i].state != STRANGER_FREE)
            next = fmin(next, s->strangers[i].deadline);
    if (isinf(next))
        return -1;
    double wait = (next - clock_seconds()) * 1e3;
    return wait <= 0 ? 0 : (int)wait + 1;
}

static void handle(control_server *s, const struct epoll_event *e)
{
    uint32_t what = e->data.u32;
    if (what == EVENT_LISTEN) {
        accept_strangers(s);
    } else if (what == EVENT_WAKE) {
        check_overrun(s);
    } else if (what == EVENT_LEADER) {
        if (e->events & EPOLLOUT)
            leader_write(s);
        if ((e->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && has_leader(s))
            leader_read(s);
    } else if (s->strangers[what].state != STRANGER_FREE) {
        stranger_read(s, &s->strangers[what]);
    }
}

void control_server_step(control_server *s)
{
    struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(s->epoll_fd, events, MAX_EVENTS, 0);
    /* Newcomers last: a place that one of them takes over must not see events of who had it before. */
    for (int i = 0; i < n; i++)
        if (events[i].data.u32 != EVENT_LISTEN)
            handle(s, &events[i]);
    for (int i = 0; i < n; i++)
        if (events[i].data.u32 == EVENT_LISTEN)
            handle(s, &events[i]);
    end_overdue(s, clock_seconds());
}

void control_server_destroy(control_server *s)
{
    if (!s)
        return;
    close_leader(s);
    for (int i = 0; i < MAX_STRANGERS; i++)
        if (s->strangers[i].state != STRANGER_FREE)
            stranger_close(&s->strangers[i]);
    if (s->listen_fd >= 0)
        close(s->listen_fd);
    if (s->wake_fd >= 0)
        close(s->wake_fd);
    if (s->epoll_fd >= 0)
        close(s->epoll_fd);
    bytes_clear(&s->scratch);
    explicit_bzero(&s->secret, sizeof s->secret);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
