#include "cluster/private_server.h"

#include "proto/clock.h"
#include "proto/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define END_SECONDS 10.0

struct private_server {
    pid_t pid;    /* also its process group; 0: ended */
    int out, log; /* what it prints; what it says (a nameless file) */
    char address[300];
};

/* Everything until exec is safe after fork. Signals of the terminal do not reach a group of its own: it is ended in order by its
 * parent, or by the kernel when that dies. */
static void become_server(const private_server *s, int out, pid_t parent, char **arguments)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    int nothing = open("/dev/null", O_RDONLY);
    if (getppid() != parent || nothing < 0 || dup2(nothing, STDIN_FILENO) < 0 || dup2(out, STDOUT_FILENO) < 0 ||
        dup2(s->log, STDERR_FILENO) < 0)
        _exit(1);
    execv("/proc/self/exe", arguments);
    _exit(127);
}

static status spawn(private_server *s, const char *model_dir, int n_ranks)
{
    char ranks[16];
    int ends[2];
    snprintf(ranks, sizeof ranks, "%d", n_ranks);
    char *arguments[] = {"convoke", "serve",       "--model",           (char *)model_dir, "--ranks", ranks,
                         "--grpc",  "127.0.0.1:0", "--no-log-requests", "--drain-seconds", "1",       NULL};
    s->log = memfd_create("log", MFD_CLOEXEC);
    if (s->log < 0 || pipe2(ends, O_CLOEXEC) != 0)
        return status_fail(STATUS_IO, "no pipe to a server of one's own (%s)", strerror(errno));
    s->out = ends[0];
    pid_t parent = getpid();
    s->pid = fork();
    if (s->pid == 0)
        become_server(s, ends[1], parent, arguments);
    close(ends[1]);
    if (s->pid < 0) {
        s->pid = 0;
        return status_fail(STATUS_IO, "a server of one's own cannot be started (%s)", strerror(errno));
    }
    setpgid(s->pid, s->pid); /* whoever of the two comes first */
    return STATUS_OK;
}

/* The end of what it said, to stderr; the caller's sentence comes below. */
static void show_log(const private_server *s)
{
    char text[4001];
    off_t size = lseek(s->log, 0, SEEK_END), from = size > 4000 ? size - 4000 : 0;
    ssize_t n = pread(s->log, text, 4000, from);
    if (n > 0)
        fwrite(text, 1, (size_t)n, stderr);
    if (n > 0 && text[n - 1] != '\n')
        fputc('\n', stderr);
}

/* "ready: grpc HOST:PORT, ..." */
static bool read_ready(private_server *s, const char *line)
{
    static const char begin[] = "ready: grpc ";
    size_t n = strcspn(line, "\n");
    if (strncmp(line, begin, sizeof begin - 1) != 0 || line[n] != '\n')
        return false;
    n = strcspn(line + sizeof begin - 1, ",\n");
    if (n >= sizeof s->address)
        return false;
    snprintf(s->address, sizeof s->address, "%.*s", (int)n, line + sizeof begin - 1);
    return true;
}

/* The server itself gives up when loading makes no progress, so this waits as long as it lives. */
static status wait_ready(private_server *s, const char *model_dir, const volatile sig_atomic_t *stop, console *c)
{
    char line[1000];
    size_t n = 0;
    double start = clock_seconds();
    while (!*stop) {
        struct pollfd wait = {.fd = s->out, .events = POLLIN};
        console_show(c, "loading %s, %s", model_dir, human_seconds(clock_seconds() - start).text);
        if (poll(&wait, 1, 100) <= 0)
            continue;
        ssize_t m = read(s->out, line + n, sizeof line - 1 - n);
        if (m < 0 && errno == EINTR)
            continue;
        if (m <= 0) {
            console_erase(c);
            show_log(s);
            return status_fail(STATUS_IO, "%s: its server ended before it could answer", model_dir);
        }
        n += (size_t)m;
        line[n] = '\0';
        if (read_ready(s, line))
            return STATUS_OK;
        if (strchr(line, '\n') || n == sizeof line - 1)
            return status_fail(STATUS_BAD_INPUT, "%s: its server says '%.100s' instead of ready", model_dir, line);
    }
    return status_fail(STATUS_STOPPED, "stopped while %s was loading", model_dir);
}

status private_server_start(const char *model_dir, int n_ranks, const volatile sig_atomic_t *stop, private_server **out)
{
    console progress;
    private_server *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory for a server of one's own");
    s->out = s->log = -1;
    console_open(&progress, STDERR_FILENO);
    status st = spawn(s, model_dir, n_ranks);
    if (st == STATUS_OK)
        st = wait_ready(s, model_dir, stop, &progress);
    console_erase(&progress);
    if (st == STATUS_OK)
        *out = s;
    else
        private_server_end(s);
    return st;
}

const char *private_server_address(const private_server *s)
{
    return s->address;
}

static bool has_ended(const private_server *s)
{
    return waitpid(s->pid, NULL, WNOHANG) != 0;
}

void private_server_end(private_server *s)
{
    if (!s)
        return;
    if (s->pid > 0 && !has_ended(s)) {
        const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};
        bool ended = false;
        kill(s->pid, SIGTERM);
        for (double until = clock_seconds() + END_SECONDS; !ended && clock_seconds() < until; ended = has_ended(s))
            nanosleep(&pause, NULL);
        if (!ended) {
            kill(-s->pid, SIGKILL);
            waitpid(s->pid, NULL, 0);
        }
    }
    if (s->out >= 0)
        close(s->out);
    if (s->log >= 0)
        close(s->log);
    free(s);
}
