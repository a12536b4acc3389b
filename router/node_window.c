#include "router/node_window.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WATCH_SECONDS       0.02
#define LONGEST_GAP_SECONDS 1.0 /* between two looks of a process that runs */
#define SPIN_TURNS          2000u
#define YIELD_TURNS         64u

/* ---- time, stop ---- */

static _Atomic int stop_requested; /* set by the signal handler, read by all threads */

static void note_stop(int number)
{
    (void)number;
    stop_requested = 1;
}

void node_stop_install(void)
{
    /* No SA_RESTART: a blocking call ends with EINTR and its caller looks at the flag. */
    struct sigaction action = {.sa_handler = note_stop, .sa_flags = SA_RESETHAND};
    sigaction(SIGTERM, &action, NULL);
}

bool node_stop_requested(void)
{
    return stop_requested;
}

void node_stop_forget(void)
{
    stop_requested = 0;
}

static char given_up_why[1024];
static _Atomic int given_up; /* 1: the sentence is being written, 2: it stands */

void node_give_up(const char *sentence)
{
    int none = 0;
    if (!atomic_compare_exchange_strong(&given_up, &none, 1))
        return;
    snprintf(given_up_why, sizeof given_up_why, "%s", sentence);
    atomic_store(&given_up, 2);
}

static bool must_end(void)
{
    return stop_requested || atomic_load_explicit(&given_up, memory_order_relaxed) == 2;
}

/* ---- peers ---- */

status node_peers_open(node_peers *peers)
{
    peers->pidfds = malloc((size_t)peers->n * sizeof *peers->pidfds);
    if (!peers->pidfds)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of %d ranks on this node", peers->n);
    for (int i = 0; i < peers->n; i++)
        peers->pidfds[i] = i == peers->mine ? -1 : (int)syscall(SYS_pidfd_open, peers->pids[i], 0);
    return STATUS_OK;
}

void node_peers_close(node_peers *peers)
{
    for (int i = 0; peers->pidfds && i < peers->n; i++)
        if (peers->pidfds[i] >= 0)
            close(peers->pidfds[i]);
    free(peers->pidfds);
    peers->pidfds = NULL;
}

static bool peer_lives(const node_peers *peers, int i)
{
    if (i == peers->mine)
        return true;
    if (peers->pidfds[i] < 0)
        return kill(peers->pids[i], 0) == 0 || errno != ESRCH;
    struct pollfd fd = {.fd = peers->pidfds[i], .events = POLLIN};
    return poll(&fd, 1, 0) <= 0; /* a pidfd turns readable when its process has ended */
}

static _Atomic bool reports_here;

static bool first_to_report(const node_peers *peers)
{
    bool first = !peers->reported || atomic_exchange(peers->reported, 1) == 0;
    if (first)
        atomic_store(&reports_here, true);
    return first;
}

bool node_reports_here(void)
{
    return reports_here;
}

static const char *reason_text(const wait_reason *why, char *text, size_t size)
{
    if (why->rank < 0)
        snprintf(text, size, "other ranks' %s %u", why->what, why->number);
    else
        snprintf(text, size, "rank %d's %s %u", why->rank, why->what, why->number);
    return text;
}

status node_peers_watch(const node_peers *peers, const wait_reason *why, double since)
{
    char text[128];
    int me = peers->ranks[peers->mine];
    for (int i = 0; i < peers->n; i++) {
        if (peer_lives(peers, i))
            continue;
        status code = first_to_report(peers) ? STATUS_PEER_LOST : STATUS_ELSEWHERE;
        return status_fail(code, "rank %d (pid %d, host %s) died while rank %d waited for %s", peers->ranks[i], peers->pids[i],
                           peers->host, me, reason_text(why, text, sizeof text));
    }
    if (atomic_load(&given_up) == 2)
        return status_fail(first_to_report(peers) ? STATUS_PEER_LOST : STATUS_ELSEWHERE, "%s", given_up_why);
    double waited = clock_seconds() - since;
    if (stop_requested) {
        status code = first_to_report(peers) ? STATUS_STOPPED : STATUS_ELSEWHERE;
        return status_fail(code, "told to stop while rank %d (host %s) waited for %s for %.1f s", me, peers->host,
                           reason_text(why, text, sizeof text), waited);
    }
    if (why->patient || peers->limit_seconds <= 0 || waited <= peers->limit_seconds)
        return STATUS_OK;
    status code = first_to_report(peers) ? STATUS_PEER_LOST : STATUS_ELSEWHERE;
    return status_fail(code, "rank %d (host %s) has waited %.1f s for %s, longer than the %.1f s allowed", me, peers->host,
                       waited, reason_text(why, text, sizeof text), peers->limit_seconds);
}

static void show_asleep(const node_peers *peers, const wait_reason *why)
{
    if (peers->state)
        atomic_store_explicit(peers->state, why->patient ? peers->asleep_patient : peers->asleep, memory_order_relaxed);
}

static void show_awake(const node_peers *peers)
{
    if (peers->state)
        atomic_store_explicit(peers->state, peers->awake, memory_order_relaxed);
}

/* A process that was itself stopped for a while must not blame the others for the time it missed. */
static void forgive_gap(double now, double looked, double *since)
{
    if (now - looked > LONGEST_GAP_SECONDS)
        *since += now - looked;
}

/* ---- events ---- */

static long futex(const _Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0); /* not _PRIVATE: the word is in shared memory */
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void node_event_raise(node_event *event, uint32_t value)
{
    /* Both sides are sequentially consistent: either the waiter sees the new count before it sleeps, or we see the waiter. */
    atomic_store(&event->value, value);
    if (atomic_load(&event->waiters) > 0)
        futex(&event->value, FUTEX_WAKE, INT_MAX, NULL);
}

bool node_event_reached(const node_event *event, uint32_t value)
{
    return (int32_t)(atomic_load_explicit(&event->value, memory_order_acquire) - value) >= 0;
}

static status sleep_on(node_event *event, uint32_t value, const node_peers *peers, const wait_reason *why)
{
    const struct timespec timeout = {.tv_nsec = (long)(WATCH_SECONDS * 1e9)};
    double since = clock_seconds(), looked = since;
    for (;;) {
        uint32_t seen = atomic_load(&event->value);
        if ((int32_t)(seen - value) >= 0)
            return STATUS_OK;
        /* Ranks that keep each other busy never sleep to the timeout: the flag is looked at before every sleep. */
        if (!must_end() && (futex(&event->value, FUTEX_WAIT, seen, &timeout) == 0 || errno == EAGAIN))
            continue;
        if (peers->tick)
            peers->tick();
        double now = clock_seconds();
        forgive_gap(now, looked, &since);
        looked = now;
        status st = node_peers_watch(peers, why, since);
        if (st != STATUS_OK) /* a peer may end after it has raised what we wait for */
            return node_event_reached(event, value) ? STATUS_OK : st;
    }
}

status node_event_wait(node_event *event, uint32_t value, bool spin, const node_peers *peers, const wait_reason *why)
{
    for (unsigned i = 0; i < (spin ? SPIN_TURNS : 1u); i++) {
        if (node_event_reached(event, value))
            return STATUS_OK;
        if (spin)
            cpu_relax();
    }
    atomic_fetch_add(&event->waiters, 1);
    show_asleep(peers, why);
    status st = sleep_on(event, value, peers, why);
    show_awake(peers);
    atomic_fetch_sub(&event->waiters, 1);
    return st;
}

status node_backoff_pause(node_backoff *backoff, bool spin, unsigned max_us, const node_peers *peers, const wait_reason *why)
{
    unsigned turn = backoff->turns++;
    unsigned spins = spin ? SPIN_TURNS / 8 : 0; /* each turn of a polling wait also looks into MPI */
    bool ending = must_end();
    if (!ending && turn < spins) {
        cpu_relax();
        return STATUS_OK;
    }
    if (!ending && turn < spins + YIELD_TURNS) {
        sched_yield();
        return STATUS_OK;
    }
    double now = clock_seconds();
    if (backoff->since == 0)
        backoff->since = backoff->watched = now;
    if (now - backoff->watched > WATCH_SECONDS || ending) {
        forgive_gap(now, backoff->watched, &backoff->since);
        backoff->watched = now;
        TRY(node_peers_watch(peers, why, backoff->since));
    }
    /* A sixteenth of the time waited so far: what the sleep adds to the wait stays small, and a long wait costs little. */
    double us = 1e6 * (now - backoff->since) / 16;
    us = us < 10 ? 10 : us > max_us ? max_us : us;
    show_asleep(peers, why);
    nanosleep(&(struct timespec){.tv_nsec = (long)(1e3 * us)}, NULL);
    show_awake(peers);
    return STATUS_OK;
}

/* ---- segments ---- */

struct node_window {
    const node_peers *peers; /* borrowed */
    unsigned number;
    int fd;     /* own segment */
    bool named; /* its name still exists */
    size_t committed;
    void **at;     /* [n] */
    size_t *bytes; /* [n] */
};

static void segment_name(const node_window *w, int local, char *name, size_t size)
{
    snprintf(name, size, "/convoke-%016llx-%d-%u", (unsigned long long)w->peers->job, w->peers->ranks[local], w->number);
}

static status map_segment(node_window *w, int local, int fd, const char *name)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return status_fail(STATUS_IO, "shared memory %s: %s", name, strerror(errno));
    void *at = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED)
        return status_fail(STATUS_NO_MEMORY, "shared memory %s: cannot map %zu MB: %s", name, (size_t)st.st_size >> 20,
                           strerror(errno));
    w->at[local] = at;
    w->bytes[local] = (size_t)st.st_size;
    return STATUS_OK;
}

static status create_own(node_window *w, size_t bytes)
{
    char name[64];
    segment_name(w, w->peers->mine, name, sizeof name);
    w->fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (w->fd < 0)
        return status_fail(STATUS_IO, "shared memory %s: %s", name, strerror(errno));
    w->named = true;
    if (ftruncate(w->fd, (off_t)bytes) != 0)
        return status_fail(STATUS_NO_MEMORY, "shared memory %s: cannot make it %zu MB long: %s", name, bytes >> 20,
                           strerror(errno));
    return map_segment(w, w->peers->mine, w->fd, name);
}

status node_window_create(const node_peers *peers, unsigned number, size_t bytes, node_window **out)
{
    node_window *w = calloc(1, sizeof *w);
    if (!w)
        return status_fail(STATUS_NO_MEMORY, "no memory for a shared window");
    *w = (node_window){.peers = peers, .number = number, .fd = -1};
    w->at = calloc((size_t)peers->n, sizeof *w->at);
    w->bytes = calloc((size_t)peers->n, sizeof *w->bytes);
    status st = w->at && w->bytes ? create_own(w, bytes) : status_fail(STATUS_NO_MEMORY, "no memory for a shared window");
    if (st != STATUS_OK) {
        node_window_destroy(w);
        return st;
    }
    *out = w;
    return STATUS_OK;
}

status node_window_commit(node_window *w, size_t offset, size_t bytes, const char *advice)
{
    if (bytes == 0)
        return STATUS_OK;
    int error;
    do
        error = posix_fallocate(w->fd, (off_t)offset, (off_t)bytes);
    while (error == EINTR && !stop_requested);
    if (error) {
        struct statvfs fs = {0};
        fstatvfs(w->fd, &fs);
        return status_fail(STATUS_NO_MEMORY, "/dev/shm has %llu MB free, rank %d needs %zu MB more (%s): enlarge it or %s",
                           ((unsigned long long)fs.f_bavail * fs.f_frsize) >> 20, w->peers->ranks[w->peers->mine],
                           (bytes + (1 << 20) - 1) >> 20, strerror(error), advice);
    }
    w->committed += bytes;
    return STATUS_OK;
}

status node_window_attach(node_window *w)
{
    for (int i = 0; i < w->peers->n; i++) {
        if (i == w->peers->mine)
            continue;
        char name[64];
        segment_name(w, i, name, sizeof name);
        int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);
        if (fd < 0)
            return status_fail(STATUS_IO, "shared memory %s of rank %d: %s", name, w->peers->ranks[i], strerror(errno));
        status st = map_segment(w, i, fd, name);
        close(fd);
        TRY(st);
    }
    return STATUS_OK;
}

void node_window_unlink(node_window *w)
{
    if (!w->named)
        return;
    char name[64];
    segment_name(w, w->peers->mine, name, sizeof name);
    shm_unlink(name);
    w->named = false;
}

void node_window_destroy(node_window *w)
{
    if (!w)
        return;
    node_window_unlink(w);
    for (int i = 0; w->at && w->bytes && i < w->peers->n; i++)
        if (w->at[i])
            munmap(w->at[i], w->bytes[i]);
    if (w->fd >= 0)
        close(w->fd);
    free(w->at);
    free(w->bytes);
    free(w);
}

void *node_window_at(const node_window *w, int local)
{
    return w->at[local];
}

size_t node_window_committed(const node_window *w)
{
    return w->committed;
}
