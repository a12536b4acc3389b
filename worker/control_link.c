#include "worker/control_link.h"

#include "proto/clock.h"
#include "proto/frame.h"
#include "proto/log.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNECT_SECONDS   5.0 /* one attempt */
#define RETRY_MS          200
#define LATER_MS          500 /* when the coordinator has said "later" */
#define PROGRESS_SECONDS  0.3
#define READ_BYTES        ((size_t)64 << 10)
#define INBOX_BYTES       ((size_t)256 << 20) /* payload bytes that wait for the step loop; more stay in the socket */
#define OUTBOX_BYTES      ((size_t)64 << 20)
#define PATIENCE_SECONDS  30.0 /* something is to be sent and the coordinator reads nothing */
#define LAST_WORD_SECONDS 0.3
#define CLOSE_SECONDS     1.0

typedef struct waiting_message {
    struct waiting_message *next;
    Convoke__Control__ToLeader *message;
    size_t bytes;
} waiting_message;

struct control_link {
    int fd;
    int thread_wakes, loop_wakes; /* eventfds: for the thread, for the step loop */
    char address[300];
    Convoke__Control__ToLeader *setup;
    uint64_t launch;
    frame_reader reader;

    group *group; /* borrowed, as is the watch */
    watch *watch;
    pthread_t thread;
    bool running;
    _Atomic bool stopping, lost, loading, more_in_inbox;
    char lost_why[1024]; /* stands before `lost` is set */

    pthread_mutex_t in_lock;
    waiting_message *first, **last;
    size_t inbox_bytes;

    pthread_mutex_t out_lock;
    bytes_writer outbox;
    size_t out_sent;  /* bytes of the outbox that have left */
    double out_moved; /* when the last byte left, or the outbox began to fill */
    pthread_cond_t out_room;
    bool goodbye_said;

    bool stranger_logged;
    double next_beat, next_progress;
    uint32_t *silence;       /* [size] */
    uint64_t *done, *total;  /* [size] */
    bytes_writer own_frames; /* the thread's beats */
};

/* ---- opening ---- */

static void wake(int event_fd)
{
    uint64_t one = 1;
    ssize_t n = write(event_fd, &one, sizeof one);
    (void)n; /* full: it is awake */
}

static void settle(int event_fd)
{
    uint64_t count;
    ssize_t n = read(event_fd, &count, sizeof count);
    (void)n;
}

/* Waits for one of `events`; false: not in time, or told to stop. */
static bool await(int fd, short events, double until)
{
    while (!group_told_to_stop()) {
        double left = until - clock_seconds();
        struct pollfd p = {.fd = fd, .events = events};
        if (left <= 0)
            return false;
        if (poll(&p, 1, left > 0.2 ? 200 : (int)(left * 1e3) + 1) > 0)
            return true;
    }
    return false;
}

/* One address; a socket or -1 with errno. */
static int connect_one(const struct addrinfo *to, double until)
{
    int fd = socket(to->ai_family, to->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, to->ai_protocol), error = 0;
    socklen_t size = sizeof error;
    if (fd < 0)
        return -1;
    if (connect(fd, to->ai_addr, to->ai_addrlen) != 0 && errno != EINPROGRESS) {
        error = errno;
    } else {
        double end = clock_seconds() + CONNECT_SECONDS;
        error = ETIMEDOUT;
        if (await(fd, POLLOUT, end < until ? end : until) && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
            error = errno;
    }
    if (!error)
        return fd;
    close(fd);
    errno = error;
    return -1;
}

static int connect_any(const char *host, const char *port, double until, const char **why)
{
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV}, *list = NULL;
    int error = getaddrinfo(*host ? host : "localhost", port, &hints, &list), fd = -1;
    if (error) {
        *why = gai_strerror(error);
        return -1;
    }
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next)
        fd = connect_one(a, until);
    if (fd < 0)
        *why = strerror(errno);
    freeaddrinfo(list);
    return fd;
}

static void pause_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

/* Workers may be there before the coordinator, and its name before its address. */
static status connect_patiently(control_link *l, double until, double seconds)
{
    char host[256], port[8];
    const char *why = "";
    TRY(control_split_address("--coordinator", l->address, host, port));
    for (;;) {
        l->fd = connect_any(host, port, until, &why);
        if (l->fd >= 0)
            return control_tune_socket(l->fd);
        if (group_told_to_stop())
            return status_fail(STATUS_STOPPED, "told to stop while connecting to the coordinator at %s", l->address);
        if (clock_seconds() + RETRY_MS * 1e-3 >= until)
            return status_fail(STATUS_IO, "the coordinator at %s cannot be reached for %.3g s: %s", l->address, seconds, why);
        pause_ms(RETRY_MS);
    }
}

static status say_hello(control_link *l, const Convoke__Control__Hello *hello, double until)
{
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO;
    m.hello = (Convoke__Control__Hello *)hello;
    status st = control_put_to_coordinator(&l->outbox, &m);
    while (st == STATUS_OK && l->out_sent < l->outbox.size) {
        ssize_t n = send(l->fd, l->outbox.data + l->out_sent, l->outbox.size - l->out_sent, MSG_NOSIGNAL);
        if (n > 0)
            l->out_sent += (size_t)n;
        else if (errno != EAGAIN && errno != EINTR)
            st = status_fail(STATUS_IO, "the coordinator at %s: %s", l->address, strerror(errno));
        else if (!await(l->fd, POLLOUT, until))
            st = status_fail(STATUS_IO, "the coordinator at %s takes no greeting", l->address);
    }
    if (l->outbox.data)
        explicit_bzero(l->outbox.data, l->outbox.size); /* the secret */
    bytes_reset(&l->outbox);
    l->out_sent = 0;
    return st;
}

/* Takes what the socket has. STATUS_IO: the connection is over. */
static status read_some(control_link *l)
{
    void *room = frame_reader_room(&l->reader, READ_BYTES);
    if (!room)
        return status_fail(STATUS_NO_MEMORY, "no memory for a message from the coordinator");
    ssize_t n = recv(l->fd, room, READ_BYTES, 0);
    if (n > 0)
        frame_reader_filled(&l->reader, (size_t)n);
    else if (n == 0)
        return status_fail(STATUS_IO, "the coordinator at %s is gone: it closed the connection", l->address);
    else if (errno != EAGAIN && errno != EINTR)
        return status_fail(STATUS_IO, "the coordinator at %s is gone: %s", l->address, strerror(errno));
    return STATUS_OK;
}

static status take_answer(control_link *l, Convoke__Control__ToLeader *m)
{
    l->setup = m; /* freed with the link, whatever it is */
    if (m->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL)
        return status_fail(STATUS_BAD_INPUT, "the coordinator at %s refuses: %s", l->address, m->refusal->reason);
    if (m->kind_case != CONVOKE__CONTROL__TO_LEADER__KIND_SETUP)
        return status_fail(STATUS_BAD_INPUT, "the coordinator at %s answers a greeting with something else", l->address);
    l->launch = m->setup->launch;
    return STATUS_OK;
}

static status await_setup(control_link *l, double until)
{
    const void *payload;
    size_t size;
    for (;;) {
        Convoke__Control__ToLeader *m = NULL;
        TRY(frame_reader_next(&l->reader, &payload, &size));
        if (payload) {
            TRY(control_get_to_leader(payload, size, &m));
            return take_answer(l, m);
        }
        if (!await(l->fd, POLLIN, until))
            return status_fail(STATUS_IO, "the coordinator at %s does not answer the greeting", l->address);
        TRY(read_some(l));
    }
}

static status create(const char *address, control_link **out)
{
    control_link *l = calloc(1, sizeof *l);
    if (!l)
        return status_fail(STATUS_NO_MEMORY, "no memory for the control connection");
    snprintf(l->address, sizeof l->address, "%s", address);
    l->fd = -1;
    l->last = &l->first;
    l->loading = true;
    frame_reader_init(&l->reader, CONTROL_FRAME_BYTES);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&l->out_room, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&l->in_lock, NULL);
    pthread_mutex_init(&l->out_lock, NULL);
    l->thread_wakes = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    l->loop_wakes = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *out = l;
    return l->thread_wakes >= 0 && l->loop_wakes >= 0 ? STATUS_OK : status_fail(STATUS_IO, "eventfd: %s", strerror(errno));
}

/* One connection, from Hello to Setup. */
static status join_once(control_link *l, double until, double seconds, const Convoke__Control__Hello *hello)
{
    TRY(connect_patiently(l, until, seconds));
    double greeted = clock_seconds() + CONTROL_GREETING_SECONDS;
    TRY(say_hello(l, hello, greeted));
    return await_setup(l, greeted);
}

static bool was_told_later(const control_link *l)
{
    return l->setup && l->setup->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL && l->setup->refusal->later;
}

static void leave(control_link *l)
{
    close(l->fd);
    l->fd = -1;
    convoke__control__to_leader__free_unpacked(l->setup, NULL);
    l->setup = NULL;
    frame_reader_clear(&l->reader);
    frame_reader_init(&l->reader, CONTROL_FRAME_BYTES);
}

/* "Later": workers that this coordinator does not yet know to be lost are still its own, or it is just clearing up after them. */
static status join_patiently(control_link *l, double seconds, const Convoke__Control__Hello *hello)
{
    double until = clock_seconds() + seconds;
    for (bool said = false;; said = true) {
        status st = join_once(l, until, seconds, hello);
        if (st == STATUS_OK || !was_told_later(l) || group_told_to_stop() || clock_seconds() + LATER_MS * 1e-3 >= until)
            return st;
        if (!said)
            log_line("%s; trying again for %.3g s", status_message(), seconds);
        leave(l);
        pause_ms(LATER_MS);
    }
}

status control_link_open(const char *address, double seconds, const Convoke__Control__Hello *hello, control_link **out)
{
    control_link *l = NULL;
    status st = create(address, &l);
    if (st == STATUS_OK)
        st = join_patiently(l, seconds, hello);
    if (st != STATUS_OK) {
        control_link_close(l);
        return st;
    }
    *out = l;
    return STATUS_OK;
}

const Convoke__Control__Setup *control_link_setup(const control_link *l)
{
    return l->setup->setup;
}

/* ---- out ---- */

/* With out_lock: writes what the socket takes. */
static status push(control_link *l)
{
    while (l->out_sent < l->outbox.size) {
        ssize_t n = send(l->fd, l->outbox.data + l->out_sent, l->outbox.size - l->out_sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return STATUS_OK;
        if (n < 0)
            return status_fail(STATUS_IO, "the coordinator at %s is gone: %s", l->address, strerror(errno));
        l->out_sent += (size_t)n;
        l->out_moved = clock_seconds();
    }
    bytes_reset(&l->outbox);
    l->out_sent = 0;
    pthread_cond_broadcast(&l->out_room);
    return STATUS_OK;
}

static bool in_time(control_link *l)
{
    return l->outbox.size == 0 || clock_seconds() - l->out_moved < PATIENCE_SECONDS;
}

/* With out_lock: waits for the thread to empty the outbox. */
static status await_room(control_link *l)
{
    _Atomic uint32_t *state = l->group ? &group_pulse_of(l->group, group_rank(l->group))->state : NULL;
    bool waits = state && l->outbox.size - l->out_sent > OUTBOX_BYTES;
    if (waits)
        atomic_store(state, RANK_WAITING); /* it does not stand still */
    while (l->outbox.size - l->out_sent > OUTBOX_BYTES && !l->lost) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        t.tv_sec++;
        pthread_cond_timedwait(&l->out_room, &l->out_lock, &t);
        if (!in_time(l))
            break;
    }
    if (waits)
        atomic_store(state, RANK_WORKING);
    return l->outbox.size - l->out_sent > OUTBOX_BYTES
               ? status_fail(STATUS_PEER_LOST, "the coordinator at %s has read nothing for %.0f s", l->address, PATIENCE_SECONDS)
               : STATUS_OK;
}

/* With out_lock. */
static status put_out(control_link *l, const void *frames, size_t size)
{
    if (l->outbox.size == 0)
        l->out_moved = clock_seconds();
    bytes_put(&l->outbox, frames, size);
    if (l->outbox.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu bytes to the coordinator", size);
    TRY(push(l));
    if (l->outbox.size > 0)
        wake(l->thread_wakes); /* it waits for the socket from now on */
    return STATUS_OK;
}

status control_link_send(control_link *l, const void *frames, size_t size)
{
    pthread_mutex_lock(&l->out_lock);
    status st = await_room(l);
    if (st == STATUS_OK)
        st = put_out(l, frames, size);
    pthread_mutex_unlock(&l->out_lock);
    return st;
}

/* Gives what is unsent some time to leave, with or without the thread. */
static void drain(control_link *l, double seconds)
{
    double until = clock_seconds() + seconds;
    for (;;) {
        pthread_mutex_lock(&l->out_lock);
        bool done = l->fd < 0 || l->lost || push(l) != STATUS_OK || l->outbox.size == 0;
        pthread_mutex_unlock(&l->out_lock);
        double left = until - clock_seconds();
        if (done || left <= 0)
            return;
        struct pollfd p = {.fd = l->fd, .events = POLLOUT};
        poll(&p, 1, (int)(left * 1e3) + 1);
    }
}

void control_link_goodbye(control_link *l, int rank, const char *reason)
{
    Convoke__Control__Goodbye bye = CONVOKE__CONTROL__GOODBYE__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    bytes_writer frame = {0};
    bye.launch = l->launch;
    bye.rank = rank;
    bye.reason = (char *)reason;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE;
    m.goodbye = &bye;
    pthread_mutex_lock(&l->out_lock);
    bool say = !l->goodbye_said && !l->lost && control_put_to_coordinator(&frame, &m) == STATUS_OK;
    l->goodbye_said = true;
    if (say)
        say = put_out(l, frame.data, frame.size) == STATUS_OK;
    pthread_mutex_unlock(&l->out_lock);
    bytes_clear(&frame);
    if (say)
        drain(l, LAST_WORD_SECONDS);
}

/* ---- in ---- */

static bool is_ours(control_link *l, const Convoke__Control__ToLeader *m)
{
    uint64_t launch = control_launch_of_to_leader(m);
    if (launch == l->launch)
        return true;
    if (!l->stranger_logged)
        log_line("the coordinator speaks of launch %llu, this is launch %llu: passed over, here and from now on",
                 (unsigned long long)launch, (unsigned long long)l->launch);
    l->stranger_logged = true;
    return false;
}

static status put_in(control_link *l, Convoke__Control__ToLeader *m, size_t bytes)
{
    waiting_message *w = malloc(sizeof *w);
    if (!w) {
        convoke__control__to_leader__free_unpacked(m, NULL);
        return status_fail(STATUS_NO_MEMORY, "no memory for a message from the coordinator");
    }
    *w = (waiting_message){.message = m, .bytes = bytes};
    pthread_mutex_lock(&l->in_lock);
    *l->last = w;
    l->last = &w->next;
    l->inbox_bytes += bytes;
    pthread_mutex_unlock(&l->in_lock);
    l->more_in_inbox = true;
    wake(l->loop_wakes);
    return STATUS_OK;
}

static status take_message(control_link *l, const void *payload, size_t size)
{
    Convoke__Control__ToLeader *m;
    TRY(control_get_to_leader(payload, size, &m));
    status st = STATUS_OK;
    if (m->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL)
        st = status_fail(STATUS_BAD_INPUT, "the coordinator at %s ends the job: %s", l->address, m->refusal->reason);
    else if (m->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND_SETUP)
        st = status_fail(STATUS_BAD_INPUT, "the coordinator at %s sets the job up a second time", l->address);
    else if (is_ours(l, m))
        return put_in(l, m, size);
    convoke__control__to_leader__free_unpacked(m, NULL);
    return st;
}

static status take_frames(control_link *l)
{
    const void *payload;
    size_t size;
    for (;;) {
        TRY(frame_reader_next(&l->reader, &payload, &size));
        if (!payload)
            return STATUS_OK;
        TRY(take_message(l, payload, size));
    }
}

Convoke__Control__ToLeader *control_link_next(control_link *l)
{
    if (!l->more_in_inbox)
        return NULL;
    pthread_mutex_lock(&l->in_lock);
    waiting_message *w = l->first;
    bool was_full = l->inbox_bytes > INBOX_BYTES;
    if (w) {
        l->first = w->next;
        l->inbox_bytes -= w->bytes;
        if (!l->first)
            l->last = &l->first;
    }
    l->more_in_inbox = l->first != NULL;
    bool room_again = was_full && l->inbox_bytes <= INBOX_BYTES;
    pthread_mutex_unlock(&l->in_lock);
    if (room_again)
        wake(l->thread_wakes);
    Convoke__Control__ToLeader *m = w ? w->message : NULL;
    free(w);
    return m;
}

void control_link_wait(control_link *l, double seconds)
{
    double until = clock_seconds() + seconds;
    /* The thread wakes this within half a second of a SIGTERM that reached another thread. */
    while (!l->more_in_inbox && !l->lost && !group_told_to_stop()) {
        struct pollfd p = {.fd = l->loop_wakes, .events = POLLIN};
        double left = until - clock_seconds();
        if (seconds >= 0 && left <= 0)
            return;
        if (poll(&p, 1, seconds < 0 ? -1 : (int)(left * 1e3) + 1) > 0)
            settle(l->loop_wakes);
    }
}

status control_link_check(const control_link *l)
{
    return l->lost ? status_fail(STATUS_PEER_LOST, "%s", l->lost_why) : STATUS_OK;
}

/* ---- the thread ---- */

static status send_own(control_link *l, const Convoke__Control__ToCoordinator *m)
{
    bool progress = m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS;
    bytes_reset(&l->own_frames);
    TRY(control_put_to_coordinator(&l->own_frames, m));
    pthread_mutex_lock(&l->out_lock);
    /* Where the coordinator does not read, beats do not pile up behind what it has not read. */
    bool fits = l->outbox.size == 0 && !l->goodbye_said && (l->loading || !progress);
    status st = fits ? put_out(l, l->own_frames.data, l->own_frames.size) : STATUS_OK;
    pthread_mutex_unlock(&l->out_lock);
    return st;
}

static status send_beat(control_link *l)
{
    Convoke__Control__Beat beat = CONVOKE__CONTROL__BEAT__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    watch_silence(l->watch, l->silence);
    beat.launch = l->launch;
    beat.step = watch_step(l->watch);
    beat.n_silent_ms_of_rank = (size_t)group_size(l->group);
    beat.silent_ms_of_rank = l->silence;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT;
    m.beat = &beat;
    return send_own(l, &m);
}

static status send_progress(control_link *l)
{
    Convoke__Control__Progress progress = CONVOKE__CONTROL__PROGRESS__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    for (int r = 0; r < group_size(l->group); r++) {
        const group_pulse *p = group_pulse_of(l->group, r);
        l->done[r] = p ? atomic_load(&p->done) : 0;
        l->total[r] = p ? atomic_load(&p->total) : 0;
    }
    progress.stage = (char *)"weights";
    progress.launch = l->launch;
    progress.n_done_of_rank = progress.n_total_of_rank = (size_t)group_size(l->group);
    progress.done_of_rank = l->done;
    progress.total_of_rank = l->total;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS;
    m.progress = &progress;
    return send_own(l, &m);
}

static status keep_time(control_link *l, double now)
{
    if (l->loading && now >= l->next_progress) {
        l->next_progress = now + PROGRESS_SECONDS;
        TRY(send_progress(l));
    }
    if (now >= l->next_beat) {
        l->next_beat = now + CONTROL_BEAT_SECONDS;
        TRY(send_beat(l));
        if (group_told_to_stop())
            wake(l->loop_wakes);
    }
    return STATUS_OK;
}

static int milliseconds_to(const control_link *l, double now)
{
    double next = l->loading && l->next_progress < l->next_beat ? l->next_progress : l->next_beat;
    return next <= now ? 0 : (int)((next - now) * 1e3) + 1;
}

/* One turn: sleeps until something is to be read, written or said. */
static status turn(control_link *l)
{
    pthread_mutex_lock(&l->in_lock);
    bool full = l->inbox_bytes > INBOX_BYTES;
    pthread_mutex_unlock(&l->in_lock);
    pthread_mutex_lock(&l->out_lock);
    bool unsent = l->outbox.size > 0, fine = in_time(l);
    pthread_mutex_unlock(&l->out_lock);
    if (!fine)
        return status_fail(STATUS_PEER_LOST, "the coordinator at %s has read nothing for %.0f s", l->address, PATIENCE_SECONDS);
    struct pollfd p[2] = {{.fd = l->fd, .events = (short)((full ? 0 : POLLIN) | (unsent ? POLLOUT : 0))},
                          {.fd = l->thread_wakes, .events = POLLIN}};
    if (poll(p, 2, milliseconds_to(l, clock_seconds())) > 0) {
        if (p[1].revents)
            settle(l->thread_wakes);
        if (p[0].revents & (POLLIN | POLLHUP | POLLERR)) {
            TRY(read_some(l));
            TRY(take_frames(l));
        }
        if (unsent && p[0].revents & POLLOUT) {
            pthread_mutex_lock(&l->out_lock);
            status st = push(l);
            pthread_mutex_unlock(&l->out_lock);
            TRY(st);
        }
    }
    return keep_time(l, clock_seconds());
}

static void *run(void *arg)
{
    control_link *l = arg;
    status st = take_frames(l); /* what came behind Setup */
    while (st == STATUS_OK && !l->stopping)
        st = turn(l);
    if (st == STATUS_OK || l->stopping)
        return NULL;
    /* Damaged frames are said to the coordinator too; of a lost connection nothing can be. */
    if (st == STATUS_BAD_INPUT)
        control_link_goodbye(l, 0, status_message());
    snprintf(l->lost_why, sizeof l->lost_why, "%s", status_message());
    watch_end_job(l->watch, l->lost_why);
    l->lost = true;
    wake(l->loop_wakes);
    pthread_mutex_lock(&l->out_lock);
    pthread_cond_broadcast(&l->out_room);
    pthread_mutex_unlock(&l->out_lock);
    return NULL;
}

static void say_last_words(void *arg, const char *sentence)
{
    control_link *l = arg;
    control_link_goodbye(l, group_rank(l->group), sentence);
}

status control_link_start(control_link *l, group *g, watch *w)
{
    size_t n = (size_t)group_size(g);
    l->group = g;
    l->watch = w;
    l->silence = calloc(n, sizeof *l->silence);
    l->done = calloc(n, sizeof *l->done);
    l->total = calloc(n, sizeof *l->total);
    if (!l->silence || !l->done || !l->total)
        return status_fail(STATUS_NO_MEMORY, "no memory for the control connection");
    sigset_t all, before; /* signals are for the main thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&l->thread, NULL, run, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return status_fail(STATUS_IO, "cannot start the control connection's thread: %s", strerror(error));
    l->running = true;
    watch_set_last_words(w, say_last_words, l);
    return STATUS_OK;
}

void control_link_ready(control_link *l)
{
    pthread_mutex_lock(&l->out_lock); /* no Progress behind what is sent next */
    l->loading = false;
    pthread_mutex_unlock(&l->out_lock);
}

void control_link_close(control_link *l)
{
    if (!l)
        return;
    if (l->running) {
        watch_set_last_words(l->watch, NULL, NULL);
        l->stopping = true;
        wake(l->thread_wakes);
        pthread_join(l->thread, NULL);
    }
    drain(l, CLOSE_SECONDS);
    if (l->fd >= 0)
        shutdown(l->fd, SHUT_WR);
    for (Convoke__Control__ToLeader *m; (m = control_link_next(l));)
        convoke__control__to_leader__free_unpacked(m, NULL);
    int fds[] = {l->fd, l->thread_wakes, l->loop_wakes};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    convoke__control__to_leader__free_unpacked(l->setup, NULL);
    frame_reader_clear(&l->reader);
    bytes_clear(&l->outbox);
    bytes_clear(&l->own_frames);
    pthread_cond_destroy(&l->out_room);
    pthread_mutex_destroy(&l->in_lock);
    pthread_mutex_destroy(&l->out_lock);
    free(l->silence);
    free(l->done);
    free(l->total);
    free(l);
}
