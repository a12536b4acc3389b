#include "cluster/child.h"

#include "proto/clock.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int open_pidfd(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

/* ---- spawning ---- */

/* Between fork and exec of a threaded program only calls that are safe in a signal handler. */
static _Noreturn void become(char *const *argv, char *const *env, int in, int out, int trouble, pid_t parent)
{
    struct sigaction plain = {.sa_handler = SIG_DFL};
    for (int i = 1; i < NSIG; i++)
        sigaction(i, &plain, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == parent && dup2(in, 0) >= 0 && dup2(out, 1) >= 0 && dup2(out, 2) >= 0) {
        /* Sockets and files of other threads must not live on in there; this pipe end goes with exec. */
        syscall(SYS_close_range, 3U, ~0U, 4U /* CLOSE_RANGE_CLOEXEC */);
        execve(argv[0], argv, env);
    }
    int error = errno;
    ssize_t n = write(trouble, &error, sizeof error);
    (void)n;
    _exit(127);
}

static void close_pair(int pair[2])
{
    for (int i = 0; i < 2; i++)
        if (pair[i] >= 0)
            close(pair[i]);
}

status child_spawn(char *const *argv, char *const *env, int stdin_fd, child *out)
{
    int output[2] = {-1, -1}, trouble[2] = {-1, -1}, error = 0;
    int in = stdin_fd >= 0 ? stdin_fd : open("/dev/null", O_RDONLY | O_CLOEXEC);
    pid_t parent = getpid(), pid = -1;
    if (in >= 0 && pipe2(output, O_CLOEXEC) == 0 && pipe2(trouble, O_CLOEXEC) == 0)
        pid = fork();
    if (pid == 0)
        become(argv, env, in, output[1], trouble[1], parent);
    if (pid < 0)
        error = errno;
    if (in >= 0 && in != stdin_fd)
        close(in);
    if (pid > 0) {
        close(trouble[1]);
        trouble[1] = -1;
        if (read(trouble[0], &error, sizeof error) != sizeof error) /* its end: exec went well */
            error = 0;
        if (error)
            waitpid(pid, NULL, 0);
    }
    close_pair(trouble);
    if (error) {
        close_pair(output);
        return status_fail(STATUS_IO, "cannot start %s: %s", argv[0], strerror(error));
    }
    close(output[1]);
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    *out = (child){.pid = pid, .fd = open_pidfd(pid), .output = output[0]};
    return STATUS_OK;
}

/* ---- looking ---- */

bool child_has_ended(const child *c, int *exit_code)
{
    siginfo_t info = {0};
    if (waitid(P_PID, (id_t)c->pid, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != c->pid)
        return false;
    *exit_code = info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
    return true;
}

/* State and session of a process; false: there is none. */
static bool read_stat(pid_t pid, char *state, pid_t *session)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    int parent, group, own;
    if (!at || sscanf(at + 1, " %c %d %d %d", state, &parent, &group, &own) != 4)
        return false;
    *session = own;
    return true;
}

bool child_is_stopped(const child *c)
{
    char state;
    pid_t session;
    return read_stat(c->pid, &state, &session) && state == 'T';
}

static bool is_member(pid_t pid, pid_t session)
{
    char state;
    pid_t own;
    return read_stat(pid, &state, &own) && own == session && state != 'Z' && state != 'X';
}

/* The descriptor holds on to the process that was looked at: its number may be another's by now. */
static void kill_member(pid_t pid, pid_t session)
{
    int fd = open_pidfd(pid);
    if (fd >= 0 && is_member(pid, session))
        syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0);
    if (fd >= 0)
        close(fd);
}

static int visit_members(pid_t session, void (*visit)(pid_t pid, pid_t session))
{
    DIR *proc = opendir("/proc");
    int n = 0;
    for (struct dirent *e; proc && (e = readdir(proc));) {
        pid_t pid = isdigit((unsigned char)e->d_name[0]) ? (pid_t)atoi(e->d_name) : 0;
        if (pid <= 0 || !is_member(pid, session))
            continue;
        n++;
        visit(pid, session);
    }
    if (proc)
        closedir(proc);
    return n;
}

/* ---- output ---- */

bool child_read(child *c, child_output *output, void *arg)
{
    char bytes[16 << 10];
    while (c->output >= 0) {
        ssize_t n = read(c->output, bytes, sizeof bytes);
        if (n > 0) {
            output(arg, bytes, (size_t)n);
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EAGAIN) {
            return true;
        } else {
            close(c->output);
            c->output = -1;
        }
    }
    return false;
}

/* ---- the end ---- */

/* Until it has ended or `seconds` are over; its output is read meanwhile, or it could block on it. */
static void wait_for_end(child *c, double seconds, child_output *output, void *arg)
{
    double end = clock_seconds() + seconds;
    int code;
    while (!child_has_ended(c, &code)) {
        double left = end - clock_seconds();
        if (left <= 0)
            return;
        struct pollfd fds[2] = {{.fd = c->fd, .events = POLLIN}, {.fd = c->output, .events = POLLIN}};
        poll(fds, 2, (int)(left * 1e3) + 1);
        child_read(c, output, arg);
    }
}

bool child_end(child *c, double term_seconds, double limit_seconds, child_output *output, void *arg)
{
    if (c->pid == 0)
        return true;
    double end = clock_seconds() + limit_seconds;
    kill(-c->pid, SIGTERM);
    wait_for_end(c, term_seconds, output, arg);
    bool gone;
    while (!(gone = visit_members(c->pid, kill_member) == 0) && clock_seconds() < end) {
        poll(NULL, 0, 2); /* a killed process takes a moment to leave; a new child of one is found by the next look */
        child_read(c, output, arg);
    }
    child_read(c, output, arg);
    if (gone)
        waitpid(c->pid, NULL, 0);
    else
        waitpid(c->pid, NULL, WNOHANG);
    if (c->output >= 0)
        close(c->output);
    if (c->fd >= 0)
        close(c->fd);
    *c = (child){.fd = -1, .output = -1};
    return gone;
}

bool child_has_argument(pid_t pid, const char *argument)
{
    char path[64], text[16 << 10];
    snprintf(path, sizeof path, "/proc/%d/cmdline", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = '\0';
    for (const char *at = text; at < text + n; at += strlen(at) + 1)
        if (strcmp(at, argument) == 0)
            return true;
    return false;
}

void child_kill_other(pid_t pid, const char *argument)
{
    int fd = open_pidfd(pid);
    if (fd >= 0 && child_has_argument(pid, argument))
        syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0);
    if (fd >= 0)
        close(fd);
}
