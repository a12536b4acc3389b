#include "cluster/launcher.h"

#include "cluster/chatter.h"
#include "cluster/child.h"
#include "cluster/launch_dir.h"
#include "proto/clock.h"
#include "proto/log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_WORDS = 128, MAX_EVENTS = 64 };
#define TERM_SECONDS   0.3 /* mpirun and workers end in order in this time or not at all */
#define END_SECONDS    5.0
#define BANNER_SECONDS 1.0 /* an announcement that no failure followed in this time is passed on */

typedef struct {
    int rank, fd; /* -1: dead, or never watched */
    pid_t pid;
} watched_worker;

struct launcher {
    launch_dir dir;
    child mpirun;
    int epoll_fd;
    char *address;
    chatter chatter;
    double banner_since; /* 0: none waits */
    watched_worker *workers;
    int n_workers;
};

/* epoll data: workers are their index */
enum { EVENT_ENDED = 1 << 30, EVENT_OUTPUT };

/* ---- programs ---- */

const char *launcher_find_program(const char *name)
{
    static _Thread_local char path[4096];
    if (strchr(name, '/')) {
        snprintf(path, sizeof path, "%s", name);
        return access(path, X_OK) == 0 ? path : NULL;
    }
    const char *at = getenv("PATH");
    for (at = at ? at : "/usr/local/bin:/usr/bin:/bin"; *at;) {
        size_t n = strcspn(at, ":");
        snprintf(path, sizeof path, "%.*s/%s", n ? (int)n : 1, n ? at : ".", name);
        if (access(path, X_OK) == 0)
            return path;
        at += n + (at[n] == ':');
    }
    return NULL;
}

const char *launcher_find_beside(const char *name)
{
    static _Thread_local char path[4096 + 64];
    ssize_t n = readlink("/proc/self/exe", path, 4095);
    if (n > 0) {
        path[n] = '\0';
        char *slash = strrchr(path, '/'), *end = slash ? slash + 1 : path;
        snprintf(end, sizeof path - (size_t)(end - path), "%s", name);
        if (access(path, X_OK) == 0)
            return path;
    }
    return launcher_find_program(name);
}

/* ---- the environment of mpirun ---- */

typedef struct {
    char **at;
    int n, capacity;
    bool failed;
} text_list;

static void list_add(text_list *l, char *text)
{
    if (l->n + 1 >= l->capacity) {
        int capacity = l->capacity ? 2 * l->capacity : 64;
        char **at = realloc(l->at, (size_t)capacity * sizeof *at);
        if (!at) {
            l->failed = true;
            free(text);
            return;
        }
        l->at = at;
        l->capacity = capacity;
    }
    l->failed |= !text;
    if (text)
        l->at[l->n++] = text;
    l->at[l->n] = NULL;
}

static void list_free(text_list *l)
{
    for (int i = 0; i < l->n; i++)
        free(l->at[i]);
    free(l->at);
    *l = (text_list){0};
}

static int list_find(const text_list *l, const char *name)
{
    size_t n = strlen(name);
    for (int i = 0; i < l->n; i++)
        if (strncmp(l->at[i], name, n) == 0 && l->at[i][n] == '=')
            return i;
    return -1;
}

static void env_set(text_list *env, const char *name, const char *value, bool replace)
{
    char *text = NULL;
    int known = list_find(env, name);
    if (known >= 0 && !replace)
        return;
    if (asprintf(&text, "%s=%s", name, value) < 0)
        text = NULL;
    if (known >= 0 && text) {
        free(env->at[known]);
        env->at[known] = text;
    } else {
        list_add(env, text);
    }
}

static bool topology_number(int cpu, const char *name, int *out)
{
    char path[100];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, name);
    FILE *f = fopen(path, "re");
    bool fine = f && fscanf(f, "%d", out) == 1;
    if (f)
        fclose(f);
    return fine;
}

/* Cores, not hardware threads, that this process may use: what Open MPI counts as slots. */
static int count_cores(void)
{
    static int seen[CPU_SETSIZE][2];
    cpu_set_t usable;
    int n = 0;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0)
        return 1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        int core, package, i = 0;
        if (!CPU_ISSET(cpu, &usable))
            continue;
        if (!topology_number(cpu, "core_id", &core) || !topology_number(cpu, "physical_package_id", &package))
            return CPU_COUNT(&usable);
        while (i < n && (seen[i][0] != core || seen[i][1] != package))
            i++;
        if (i == n) {
            seen[n][0] = core;
            seen[n++][1] = package;
        }
    }
    return n;
}

static int ranks_here(const launch_request *r)
{
    if (!r->hosts)
        return r->n_ranks;
    int n = 0;
    for (int i = 0; i < r->hosts->n; i++)
        if (r->hosts->entries[i].here)
            n += r->hosts->entries[i].n_ranks;
    return n;
}

/* Whether all ranks run on this machine: no hostfile, no scheduler that has given us others, no user who names them. */
static bool stays_here(const launch_request *r)
{
    static const char *const schedulers[] = {"SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE"};
    for (size_t i = 0; i < sizeof schedulers / sizeof schedulers[0]; i++)
        if (getenv(schedulers[i]))
            return false;
    const char *extra = r->mpirun_args ? r->mpirun_args : "";
    return !r->hosts && !strstr(extra, "host") && !strstr(extra, "machinefile") && !strstr(extra, "-H");
}

/* What every mpirun of ours is told; what the user's environment says already stays. */
static void add_common_settings(text_list *env, const launch_dir *dir)
{
    extern char **environ;
    for (char **e = environ; *e; e++)
        list_add(env, strdup(*e));
    if (geteuid() == 0) {
        env_set(env, "OMPI_ALLOW_RUN_AS_ROOT", "1", true);
        env_set(env, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", true);
    }
    env_set(env, "OMPI_MCA_oob_tcp_keepalive_time", "2", false); /* a lost link ends the job in seconds; it would hang for ever */
    env_set(env, "OMPI_MCA_oob_tcp_keepalive_intvl", "1", false);
    env_set(env, "OMPI_MCA_oob_tcp_keepalive_probes", "2", false);
    env_set(env, "TMPDIR", launch_dir_file(dir, "tmp"), true); /* mpirun's session folder: ours to clear away */
}

static void add_settings(text_list *env, const launch_request *r, const launch_dir *dir)
{
    add_common_settings(env, dir);
    env_set(env, "OMPI_MCA_hwloc_base_binding_policy", "none", false); /* a rank has threads; one core would hold them all */
    env_set(env, "OMPI_MCA_btl_vader_warn_missing_cma", "0", false);
    if (ranks_here(r) > count_cores() && (r->hosts || stays_here(r))) {
        env_set(env, "OMPI_MCA_rmaps_base_oversubscribe", "1", false);
        env_set(env, "OMPI_MCA_mpi_yield_when_idle", "1", false);
    }
    char job[32];
    snprintf(job, sizeof job, "%016llx", (unsigned long long)dir->job);
    if (dir->job)
        env_set(env, "CONVOKE_JOB", job, true);
    /* Open MPI does not make this folder on other hosts: there its segments lie in /dev/shm itself. */
    if (dir->shm[0] && stays_here(r))
        env_set(env, "OMPI_MCA_btl_vader_backing_directory", dir->shm, true);
}

/* ---- the command line of mpirun ---- */

static void add_split(text_list *argv, const char *text)
{
    for (const char *at = text ? text : ""; *(at += strspn(at, " \t\n"));) {
        size_t n = strcspn(at, " \t\n");
        list_add(argv, strndup(at, n));
        at += n;
    }
}

static void add_start(text_list *argv, const char *mpirun, const char *hostfile, int n_ranks, const char *extra)
{
    char count[16];
    snprintf(count, sizeof count, "%d", n_ranks);
    list_add(argv, strdup(mpirun));
    list_add(argv, strdup("-np"));
    list_add(argv, strdup(count));
    if (hostfile) {
        list_add(argv, strdup("--hostfile"));
        list_add(argv, strdup(hostfile));
    }
    add_split(argv, extra);
}

static bool first_rank_is_here(const launch_request *r)
{
    for (int i = 0; r->hosts && i < r->hosts->n; i++)
        if (r->hosts->entries[i].n_ranks > 0)
            return r->hosts->entries[i].here;
    return true;
}

/* A pipe that holds the secret and its end: mpirun hands its stdin to rank 0, wherever that is. */
static status secret_pipe(const control_secret *secret, int *out)
{
    int pair[2];
    if (pipe2(pair, O_CLOEXEC) != 0)
        return status_fail(STATUS_IO, "no pipe for the secret: %s", strerror(errno));
    ssize_t n = write(pair[1], secret->text, (size_t)secret->n);
    close(pair[1]);
    if (n != secret->n) {
        close(pair[0]);
        return status_fail(STATUS_IO, "no room in a pipe for the secret");
    }
    *out = pair[0];
    return STATUS_OK;
}

static status hand_over_secret(const launch_request *r, const launch_dir *dir, const char **file, int *in)
{
    *in = -1;
    *file = r->secret_file;
    if (r->secret_file)
        return STATUS_OK;
    if (first_rank_is_here(r)) {
        *file = launch_dir_file(dir, "secret");
        return launch_dir_write_secret(dir, r->secret);
    }
    *file = "/dev/stdin";
    return secret_pipe(r->secret, in);
}

static status spawn(launcher *l, const launch_request *r)
{
    text_list argv = {0}, env = {0};
    const char *secret_file = NULL;
    int in = -1;
    status st = STATUS_OK;
    if (r->hosts)
        TRY(hosts_write(r->hosts, launch_dir_file(&l->dir, "hosts")));
    add_start(&argv, r->mpirun, r->hosts ? launch_dir_file(&l->dir, "hosts") : NULL, r->n_ranks, r->mpirun_args);
    TRY_GOTO(hand_over_secret(r, &l->dir, &secret_file, &in), end);
    list_add(&argv, strdup(r->worker));
    list_add(&argv, strdup("--coordinator"));
    list_add(&argv, strdup(r->address));
    list_add(&argv, strdup("--secret-file"));
    list_add(&argv, strdup(secret_file));
    add_settings(&env, r, &l->dir);
    if (argv.failed || env.failed)
        st = status_fail(STATUS_NO_MEMORY, "no memory for the command line of mpirun");
    else
        st = child_spawn(argv.at, env.at, in, &l->mpirun);
end:
    if (in >= 0)
        close(in);
    list_free(&argv);
    list_free(&env);
    return st;
}

static void watch(launcher *l, int fd, uint32_t what)
{
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = what};
    epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, fd, &e);
}

static void launcher_free(launcher *l)
{
    for (int i = 0; i < l->n_workers; i++)
        if (l->workers[i].fd >= 0)
            close(l->workers[i].fd);
    if (l->epoll_fd >= 0)
        close(l->epoll_fd);
    launch_dir_remove(&l->dir);
    free(l->workers);
    free(l->address);
    free(l);
}

status launcher_start(const launch_request *request, launcher **out)
{
    launcher *l = calloc(1, sizeof *l);
    if (!l)
        return status_fail(STATUS_NO_MEMORY, "no memory for a launch");
    l->dir.scratch_lock = l->dir.shm_lock = -1;
    l->address = strdup(request->address);
    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    status st = l->address && l->epoll_fd >= 0 ? launch_dir_create(request->launch, &l->dir)
                                               : status_fail(STATUS_IO, "no descriptors for a launch: %s", strerror(errno));
    if (st == STATUS_OK)
        st = spawn(l, request);
    if (st != STATUS_OK) {
        launcher_free(l);
        return st;
    }
    watch(l, l->mpirun.fd, EVENT_ENDED);
    watch(l, l->mpirun.output, EVENT_OUTPUT);
    *out = l;
    return STATUS_OK;
}

int launcher_fd(const launcher *l)
{
    return l->epoll_fd;
}

/* ---- watching ---- */

static void print_line(void *arg, const char *line)
{
    (void)arg;
    log_line("%s", line);
}

static void take_output(void *arg, const char *bytes, size_t n)
{
    launcher *l = arg;
    chatter_feed(&l->chatter, bytes, n, print_line, NULL);
    if (l->chatter.banner_complete && l->banner_since == 0)
        l->banner_since = clock_seconds();
}

void launcher_watch(launcher *l, const Convoke__Control__Hello *hello)
{
    char own[256] = "";
    launch_dir_remove_secret(&l->dir);
    gethostname(own, sizeof own - 1);
    l->workers = calloc(hello->n_ranks, sizeof *l->workers);
    for (unsigned r = 0; l->workers && r < hello->n_ranks; r++) {
        if (strcmp(hello->host_of_rank[r], own) != 0 || hello->pid_of_rank[r] == 0)
            continue;
        pid_t pid = (pid_t)hello->pid_of_rank[r];
        int fd = (int)syscall(SYS_pidfd_open, pid, 0);
        l->workers[l->n_workers] = (watched_worker){.rank = (int)r, .pid = pid, .fd = fd};
        if (fd >= 0 && !child_has_argument(pid, l->address)) { /* another's number: a container with its own count of processes */
            close(fd);
            continue;
        }
        if (fd >= 0)
            watch(l, fd, (uint32_t)l->n_workers);
        l->n_workers++;
    }
}

static launch_event worker_died(launcher *l, uint32_t index, int *number)
{
    watched_worker *w = &l->workers[index];
    close(w->fd);
    w->fd = -1;
    *number = w->rank;
    return LAUNCH_WORKER_DIED;
}

launch_event launcher_step(launcher *l, int *number)
{
    struct epoll_event events[MAX_EVENTS];
    launch_event result = LAUNCH_RUNS;
    int n = epoll_wait(l->epoll_fd, events, MAX_EVENTS, 0);
    for (int i = 0; i < n; i++) {
        uint32_t what = events[i].data.u32;
        if (what == EVENT_OUTPUT) {
            child_read(&l->mpirun, take_output, l);
        } else if (what == EVENT_ENDED) {
            if (result == LAUNCH_RUNS && child_has_ended(&l->mpirun, number)) {
                child_read(&l->mpirun, take_output, l);
                result = LAUNCH_ENDED;
            }
        } else if (result != LAUNCH_WORKER_DIED) {
            result = worker_died(l, what, number); /* others stay readable: the next step finds them */
        }
    }
    return result;
}

bool launcher_is_stopped(launcher *l)
{
    if (l->banner_since > 0 && clock_seconds() - l->banner_since > BANNER_SECONDS) {
        const char *banner = chatter_take_banner(&l->chatter);
        l->banner_since = 0;
        if (banner)
            log_line("mpirun: %s", banner);
    }
    return child_is_stopped(&l->mpirun);
}

const char *launcher_last_words(launcher *l)
{
    static _Thread_local char text[600];
    const char *banner = chatter_take_banner(&l->chatter);
    const char *said = l->chatter.last_words[0] ? l->chatter.last_words : banner;
    l->chatter.ending = true;
    if (!said)
        return NULL;
    snprintf(text, sizeof text, "%s", said);
    return text;
}

const char *launcher_lost_host(const launcher *l)
{
    return l->chatter.lost_host ? l->chatter.lost_name : NULL;
}

status launcher_end(launcher *l)
{
    if (!l)
        return STATUS_OK;
    status st = STATUS_OK;
    pid_t pid = l->mpirun.pid;
    l->chatter.ending = true;
    if (!child_end(&l->mpirun, TERM_SECONDS, END_SECONDS, take_output, l))
        st = status_fail(STATUS_IO, "a process of mpirun (pid %d) did not end in %.0f s although it was killed", (int)pid,
                         END_SECONDS);
    chatter_flush(&l->chatter, print_line, NULL);
    for (int i = 0; i < l->n_workers; i++)
        if (l->workers[i].fd >= 0)
            child_kill_other(l->workers[i].pid, l->address);
    launcher_free(l);
    return st;
}

/* ---- which hosts are there ---- */

typedef struct {
    child child;
    bool running;
} probe;

static void ignore_output(void *arg, const char *bytes, size_t n)
{
    (void)arg, (void)bytes, (void)n;
}

static status probe_start(const probe_request *r, int index, const launch_dir *dir, char *const *env, probe *p)
{
    text_list argv = {0};
    char name[32], path[4200];
    host_entry one = r->hosts->entries[index];
    one.n_ranks = 1;
    snprintf(name, sizeof name, "host-%d", index);
    snprintf(path, sizeof path, "%s", launch_dir_file(dir, name));
    TRY(hosts_write(&(hosts){.entries = &one, .n = 1}, path));
    add_start(&argv, r->mpirun, path, 1, r->mpirun_args);
    list_add(&argv, strdup("/bin/true"));
    status st =
        argv.failed ? status_fail(STATUS_NO_MEMORY, "no memory to probe hosts") : child_spawn(argv.at, env, -1, &p->child);
    p->running = st == STATUS_OK;
    list_free(&argv);
    return st;
}

/* Waits until all have ended, the time is over, or somebody cancels (false). */
static bool probe_wait(const probe_request *r, probe *probes, bool *reached)
{
    double end = clock_seconds() + r->seconds;
    for (;;) {
        int left = 0, code;
        for (int i = 0; i < r->hosts->n; i++) {
            probe *p = &probes[i];
            if (!p->running)
                continue;
            child_read(&p->child, ignore_output, NULL);
            if (child_has_ended(&p->child, &code)) {
                p->running = false;
                reached[i] = code == 0;
            } else {
                left++;
            }
        }
        if (left == 0 || clock_seconds() > end)
            return true;
        struct pollfd cancel = {.fd = r->cancel_fd, .events = POLLIN};
        if (poll(&cancel, 1, 10) > 0)
            return false;
    }
}

status launcher_probe(const probe_request *r, bool *reached)
{
    launch_dir dir;
    text_list env = {0};
    TRY(launch_dir_create(0, &dir));
    add_common_settings(&env, &dir);
    probe *probes = calloc((size_t)r->hosts->n, sizeof *probes);
    status st = probes && !env.failed ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to probe %d hosts", r->hosts->n);
    for (int i = 0; st == STATUS_OK && i < r->hosts->n; i++) {
        reached[i] = r->hosts->entries[i].here;
        if (!reached[i])
            st = probe_start(r, i, &dir, env.at, &probes[i]);
    }
    if (st == STATUS_OK && !probe_wait(r, probes, reached))
        st = status_fail(STATUS_STOPPED, "told to stop while hosts were looked for");
    for (int i = 0; probes && i < r->hosts->n; i++)
        child_end(&probes[i].child, 0, END_SECONDS, ignore_output, NULL);
    free(probes);
    list_free(&env);
    launch_dir_remove(&dir);
    return st;
}
