#include "tests/fake_control.h"

#include "tests/support.h"

#include "proto/clock.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void listen_anywhere(fake_control *f)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    f->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(f->listener >= 0);
    assert_int_equal(bind(f->listener, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(f->listener, 4), 0);
    assert_int_equal(getsockname(f->listener, (struct sockaddr *)&at, &size), 0);
    f->port = ntohs(at.sin_port);
}

static void write_secret(const fake_control *f)
{
    int fd = open(f->secret_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, f->secret.text, (size_t)f->secret.n), f->secret.n);
    close(fd);
}

void fake_control_open(fake_control *f, const char *model_dir)
{
    *f = (fake_control){.fd = -1};
    snprintf(f->folder, sizeof f->folder, "%s", support_scratch());
    snprintf(f->secret_path, sizeof f->secret_path, "%s/secret", f->folder);
    snprintf(f->stderr_path, sizeof f->stderr_path, "%s/stderr", f->folder);
    assert_int_equal(control_secret_make(&f->secret), STATUS_OK);
    write_secret(f);
    listen_anywhere(f);
    frame_reader_init(&f->reader, CONTROL_FRAME_BYTES);
    convoke__control__setup__init(&f->setup);
    f->setup.launch = FAKE_LAUNCH;
    f->setup.model_dir = strdup(model_dir);
    f->setup.threads = 1;
    f->setup.max_sequences = 8;
    f->setup.hang_ms = 10000;
}

static void run_job(const fake_control *f, int n_ranks, const char *extra)
{
    char command[20000], runner[4200], address[64];
    snprintf(runner, sizeof runner, "%s", support_source("tests/run_mpi.sh"));
    snprintf(address, sizeof address, "127.0.0.1:%d", f->port);
    setenv("CONVOKE_MPI_SECONDS", "120", 1);
    /* What Open MPI leaves behind when it is killed goes with the scratch folder. */
    setenv("TMPDIR", f->folder, 1);
    setenv("OMPI_MCA_orte_tmpdir_base", f->folder, 1);
    setenv("OMPI_MCA_btl_vader_backing_directory", f->folder, 1);
    setenv("CONVOKE_COORDINATOR", address, 1);
    setenv("CONVOKE_SECRET_FILE", f->secret_path, 1);
    int n =
        n_ranks ? snprintf(command, sizeof command, "exec %s %d ", runner, n_ranks) : snprintf(command, sizeof command, "exec ");
    snprintf(command + n, sizeof command - (size_t)n, "%s %s </dev/null >>%s 2>&1", support_binary("convoke-worker"),
             extra ? extra : "", f->stderr_path);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

void fake_control_launch(fake_control *f, int n_ranks, const char *extra)
{
    f->n_ranks = n_ranks ? n_ranks : 1;
    f->job = fork();
    assert_true(f->job >= 0);
    if (f->job == 0)
        run_job(f, n_ranks, extra);
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

static void show_stderr(const fake_control *f)
{
    char line[2000];
    FILE *file = fopen(f->stderr_path, "r");
    while (file && fgets(line, sizeof line, file))
        print_error("  | %s", line);
    if (file)
        fclose(file);
}

Convoke__Control__ToCoordinator *fake_control_greet(fake_control *f)
{
    struct pollfd p = {.fd = f->listener, .events = POLLIN};
    if (poll(&p, 1, 30000) != 1) {
        show_stderr(f);
        fail_msg("no worker came");
    }
    f->fd = accept4(f->listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(f->fd >= 0);
    assert_int_equal(control_tune_socket(f->fd), STATUS_OK);
    Convoke__Control__ToCoordinator *m = fake_control_receive(f, 10);
    assert_non_null(m);
    assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO);
    assert_int_equal((int)m->hello->n_ranks, f->n_ranks);
    assert_int_equal((int)m->hello->n_pid_of_rank, f->n_ranks);
    for (int r = 0; r < f->n_ranks; r++)
        f->pids[r] = (pid_t)m->hello->pid_of_rank[r];
    return m;
}

void fake_control_send_bytes(fake_control *f, const void *bytes, size_t n)
{
    const char *at = bytes;
    while (n > 0) {
        ssize_t sent = send(f->fd, at, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            nap();
            continue;
        }
        assert_true(sent > 0);
        at += sent;
        n -= (size_t)sent;
    }
}

void fake_control_send(fake_control *f, const Convoke__Control__ToLeader *m)
{
    bytes_writer frame = {0};
    assert_int_equal(control_put_to_leader(&frame, m), STATUS_OK);
    fake_control_send_bytes(f, frame.data, frame.size);
    bytes_clear(&frame);
}

void fake_control_send_setup(fake_control *f)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_SETUP;
    m.setup = &f->setup;
    fake_control_send(f, &m);
}

void fake_control_send_ids(fake_control *f, Convoke__Control__ToLeader__KindCase kind, uint64_t launch, uint64_t id)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Ids ids = CONVOKE__CONTROL__IDS__INIT;
    ids.launch = launch;
    ids.n_ids = 1;
    ids.ids = &id;
    m.kind_case = kind;
    m.cancel = &ids;
    fake_control_send(f, &m);
}

void fake_control_send_stop(fake_control *f)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Stop stop = CONVOKE__CONTROL__STOP__INIT;
    stop.launch = FAKE_LAUNCH;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_STOP;
    m.stop = &stop;
    fake_control_send(f, &m);
}

/* false: the connection has ended. */
static bool read_more(fake_control *f, double until)
{
    double left = until - clock_seconds();
    struct pollfd p = {.fd = f->fd, .events = POLLIN};
    if (left <= 0 || poll(&p, 1, (int)(left * 1e3) + 1) == 0) {
        show_stderr(f);
        fail_msg("the workers say nothing");
    }
    void *room = frame_reader_room(&f->reader, 1 << 16);
    ssize_t n = recv(f->fd, room, 1 << 16, 0);
    if (n > 0)
        frame_reader_filled(&f->reader, (size_t)n);
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

Convoke__Control__ToCoordinator *fake_control_receive(fake_control *f, double seconds)
{
    double until = clock_seconds() + seconds;
    for (;;) {
        const void *payload;
        size_t size;
        Convoke__Control__ToCoordinator *m = NULL;
        assert_int_equal(frame_reader_next(&f->reader, &payload, &size), STATUS_OK);
        if (payload) {
            assert_int_equal(control_get_to_coordinator(payload, size, &m), STATUS_OK);
            assert_true(m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO ||
                        control_launch_of_to_coordinator(m) == FAKE_LAUNCH);
            return m;
        }
        if (!read_more(f, until))
            return NULL;
    }
}

Convoke__Control__ToCoordinator *fake_control_hear(fake_control *f, double seconds)
{
    double until = clock_seconds() + seconds;
    for (;;) {
        Convoke__Control__ToCoordinator *m = fake_control_receive(f, until - clock_seconds());
        if (!m || (m->kind_case != CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT &&
                   m->kind_case != CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS))
            return m;
        fake_control_free(m);
    }
}

void fake_control_free(Convoke__Control__ToCoordinator *m)
{
    convoke__control__to_coordinator__free_unpacked(m, NULL);
}

Convoke__Control__ToCoordinator *fake_control_serve(fake_control *f, int n_ranks, const char *extra)
{
    fake_control_launch(f, n_ranks, extra);
    fake_control_free(fake_control_greet(f));
    fake_control_send_setup(f);
    Convoke__Control__ToCoordinator *m = fake_control_hear(f, 60);
    if (!m || m->kind_case != CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY) {
        show_stderr(f);
        fail_msg("the workers did not get ready");
    }
    return m;
}

/* ---- the end ---- */

static bool lives(pid_t pid)
{
    char path[64], state = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    int n = fscanf(file, "%*d (%*[^)]) %c", &state);
    fclose(file);
    return n == 1 && state != 'Z' && state != 'X';
}

static bool reap(fake_control *f)
{
    int how = 0;
    if (f->job > 0 && waitpid(f->job, &how, WNOHANG) == f->job) {
        f->exit_code = WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
        f->job = 0;
    }
    return f->job == 0;
}

static bool all_gone(fake_control *f)
{
    bool gone = reap(f);
    for (int r = 0; r < f->n_ranks; r++)
        gone = gone && (f->pids[r] == 0 || !lives(f->pids[r]));
    return gone;
}

double fake_control_await_end(fake_control *f, double seconds)
{
    double start = clock_seconds();
    while (!all_gone(f)) {
        if (clock_seconds() - start > seconds) {
            show_stderr(f);
            fail_msg("the job lives on after %.1f s", seconds);
        }
        nap();
    }
    return clock_seconds() - start;
}

bool fake_control_said(fake_control *f, const char *text)
{
    char line[4000];
    bool found = false;
    FILE *file = fopen(f->stderr_path, "r");
    while (file && !found && fgets(line, sizeof line, file))
        found = strstr(line, text) != NULL;
    if (file)
        fclose(file);
    return found;
}

bool fake_control_will_say(fake_control *f, const char *text)
{
    for (int i = 0; i < 100 && !fake_control_said(f, text); i++)
        usleep(100000);
    return fake_control_said(f, text);
}

pid_t fake_control_mpirun(fake_control *f)
{
    char path[64];
    int parent = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)f->pids[0]);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*d (%*[^)]) %*c %d", &parent), 1);
    fclose(file);
    return parent;
}

void fake_control_close(fake_control *f)
{
    if (f->fd >= 0)
        close(f->fd);
    close(f->listener);
    if (f->job > 0) {
        for (int r = 0; r < f->n_ranks; r++)
            if (f->pids[r] > 0 && lives(f->pids[r]))
                kill(f->pids[r], SIGKILL);
        kill(f->job, SIGTERM);
        waitpid(f->job, NULL, 0);
    }
    frame_reader_clear(&f->reader);
    free(f->setup.model_dir);
    support_remove(f->folder);
}
