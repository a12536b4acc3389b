/* The job with a stand-in for mpirun and the ranks: started, listened to, lost in every way, started again, given up, stopped. */
#include "cluster/launch_dir.h"
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_job.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[4096]; /* scratch of this test; also $TMPDIR and $FAKE_WORKER_DIR */
static char mpirun[4096], worker[4096];
static job_log job_events;

/* ---- scenery ---- */

static const char *in_folder(const char *name)
{
    static char path[2][4200];
    static int next;
    char *out = path[next++ & 1];
    snprintf(out, sizeof path[0], "%.3800s/%.380s", folder, name);
    return out;
}

static void write_text(const char *name, const char *text)
{
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    chmod(in_folder(name), 0600);
}

static int set_up(void **state)
{
    (void)state;
    unsetenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s", support_scratch());
    setenv("TMPDIR", folder, 1);
    setenv("FAKE_WORKER_DIR", folder, 1);
    snprintf(mpirun, sizeof mpirun, "%s", support_source("tests/fake_mpirun.sh"));
    snprintf(worker, sizeof worker, "%s", support_binary("tests/fake_worker"));
    write_text("mode", "good");
    write_text("pids", "");
    job_log_init(&job_events);
    return 0;
}

static bool is_alive(pid_t pid)
{
    char path[64], text[300] = "", state = 'X';
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (f) {
        if (fgets(text, sizeof text, f))
            sscanf(strrchr(text, ')') + 1, " %c", &state);
        fclose(f);
    }
    return f && state != 'Z' && state != 'X';
}

static int count_entries(const char *path, const char *prefix)
{
    int n = 0;
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));)
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (dir)
        closedir(dir);
    return n;
}

static int count_own_shm(pid_t pid)
{
    char prefix[60];
    snprintf(prefix, sizeof prefix, "convoke-%u-%d-", (unsigned)geteuid(), (int)pid);
    return count_entries("/dev/shm", prefix);
}

/* No process that ever said its number lives, no folder is left. */
static void assert_nothing_left(pid_t coordinator)
{
    FILE *f = fopen(in_folder("pids"), "r");
    assert_non_null(f);
    int pid;
    double end = clock_seconds() + 2; /* workers that others started go a moment after their leader */
    while (fscanf(f, "%d", &pid) == 1) {
        while (is_alive(pid) && clock_seconds() < end)
            poll(NULL, 0, 5);
        if (is_alive(pid))
            fail_msg("process %d is left", pid);
    }
    fclose(f);
    if (count_entries(folder, "convoke-") > 0) {
        char command[4200];
        snprintf(command, sizeof command, "find %.4000s -ls >&2; ps -ef >&2", folder);
        int rc = system(command);
        fail_msg("a folder is left (%d)", rc);
    }
    assert_int_equal(count_own_shm(coordinator), 0);
}

static int tear_down(void **state)
{
    (void)state;
    job_stop(job_events.job); /* of a test that failed */
    job_log_destroy(&job_events);
    support_remove(folder);
    unsetenv("TMPDIR");
    return 0;
}

static job_options usual(void)
{
    return (job_options){.n_ranks = 2,
                         .mpirun = mpirun,
                         .worker = worker,
                         .model_dir = "a-model",
                         .weights = "map",
                         .combine = "fixed",
                         .rows = "fp32",
                         .hang_seconds = 20,
                         .load_seconds = 20,
                         .max_failures = 100,
                         .failure_minutes = 10};
}

static void start(const job_options *o)
{
    status st = job_start(o, &job_log_listener, &job_events, &job_events.job);
    if (st != STATUS_OK)
        fail_msg("%s", status_message());
}

static void start_and_wait(const job_options *o)
{
    start(o);
    assert_true(job_log_wait_ready(&job_events, 1, 20));
    assert_true(job_log_wait_state(&job_events, JOB_READY, 1, 20));
}

static void stop(void)
{
    job_stop(job_events.job);
    job_events.job = NULL;
    assert_nothing_left(getpid());
}

static pid_t mpirun_pid(void)
{
    int pid = 0;
    FILE *f = fopen(in_folder("mpirun"), "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%d", &pid), 1);
    fclose(f);
    return pid;
}

/* Reads up to size - 1 bytes of a file, NULs as blanks. */
static size_t slurp(const char *path, char *out, size_t size)
{
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(out, 1, size - 1, f) : 0;
    if (f)
        fclose(f);
    for (size_t i = 0; i < n; i++)
        if (out[i] == '\0')
            out[i] = ' ';
    out[n] = '\0';
    return n;
}

/* ---- the good days ---- */

static void serves_and_stops(void **state)
{
    (void)state;
    job_options o = usual();
    start_and_wait(&o);
    assert_int_equal(job_events.n_ranks, 2);
    assert_string_equal(job_events.plan_name, "contiguous");
    assert_true(job_log_submit(&job_events, 7, 3));
    assert_true(job_log_submit(&job_events, 8, 2));
    assert_true(job_log_wait_finished(&job_events, 2, 10));
    assert_int_equal(job_events.n_tokens, 5);
    int next[9] = {0};
    for (int i = 0; i < 5; i++)
        assert_int_equal(job_events.tokens[i].token, job_events.tokens[i].id * 1000 + (uint64_t)next[job_events.tokens[i].id]++);
    stop();
    assert_int_equal(job_events.states[job_events.n_states - 1].state, JOB_STOPPED);
}

static void states_come_in_order(void **state)
{
    (void)state;
    job_options o = usual();
    o.first_launch = 17;
    start_and_wait(&o);
    kill((pid_t)job_events.pids[0], SIGKILL);
    assert_true(job_log_wait_state(&job_events, JOB_READY, 2, 10));
    stop();
    const job_state expected[] = {JOB_STARTING, JOB_LOADING, JOB_READY, JOB_RESTARTING,
                                  JOB_STARTING, JOB_LOADING, JOB_READY, JOB_STOPPED};
    assert_int_equal(job_events.n_states, 8);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(job_events.states[i].state, expected[i]);
        assert_int_equal(job_events.states[i].launch, i < 4 ? 17 : 18);
    }
}

static void assert_lacks(const char *path, const char *secret)
{
    static char text[1 << 18];
    assert_true(slurp(path, text, sizeof text) > 0);
    assert_null(strstr(text, secret));
}

static void secret_is_seen_nowhere(void **state)
{
    (void)state;
    char secret[300], path[4200];
    struct stat st;
    job_options o = usual();
    start_and_wait(&o);
    assert_int_equal(slurp(in_folder("seen-secret"), secret, sizeof secret), 64); /* the stand-in for mpirun keeps a copy */
    assert_int_equal(stat(in_folder("seen-secret"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    for (int i = 0; i < 3; i++) {
        int pid = i < 2 ? (int)job_events.pids[i] : (int)mpirun_pid();
        snprintf(path, sizeof path, "/proc/%d/environ", pid);
        assert_lacks(path, secret);
        snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
        assert_lacks(path, secret);
    }
    assert_lacks(in_folder("args"), secret);
    DIR *dir = opendir(folder);
    for (struct dirent *e; (e = readdir(dir));)
        if (strncmp(e->d_name, "convoke-", 8) == 0) {
            snprintf(path, sizeof path, "%.200s/secret", e->d_name);
            assert_int_equal(stat(in_folder(e->d_name), &st), 0);
            assert_int_equal(st.st_mode & 0777, 0700);
            assert_int_not_equal(access(in_folder(path), F_OK), 0); /* gone with Hello */
        }
    closedir(dir);
    stop();
}

static job_log *submitting;
static int n_resubmitted;

static void submit_again(void *log)
{
    submitting = log;
    for (uint64_t id = 1; id <= 50; id++)
        n_resubmitted += job_log_submit(submitting, id, 2);
}

static void submits_from_callbacks(void **state)
{
    (void)state;
    job_options o = usual();
    n_resubmitted = 0;
    job_events.on_ready = submit_again;
    start_and_wait(&o);
    assert_true(job_log_wait_finished(&job_events, 50, 10));
    kill((pid_t)job_events.pids[1], SIGKILL);
    assert_true(job_log_wait_finished(&job_events, 100, 10));
    assert_int_equal(n_resubmitted, 100);
    stop();
}

static void *submit_many(void *arg)
{
    uint64_t first = *(uint64_t *)arg;
    for (uint64_t i = 0; i < 200; i++) {
        uint64_t id = first + i;
        assert_true(job_log_submit(&job_events, id, 2));
        if (i % 3 == 0)
            job_cancel(job_events.job, &id, 1); /* the stand-in pays no heed */
    }
    return NULL;
}

static void submits_from_many_threads(void **state)
{
    (void)state;
    job_options o = usual();
    start_and_wait(&o);
    pthread_t threads[4];
    uint64_t first[4] = {1000, 2000, 3000, 4000};
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, submit_many, &first[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    assert_true(job_log_wait_finished(&job_events, 800, 20));
    assert_int_equal(job_events.n_tokens, 1600);
    stop();
}

static void dropped_when_not_ready(void **state)
{
    (void)state;
    job_options o = usual();
    uint64_t id = 1;
    write_text("mode", "stuck-load");
    start(&o);
    assert_true(job_log_wait_state(&job_events, JOB_LOADING, 1, 20));
    assert_false(job_log_submit(&job_events, 1, 1));
    assert_false(job_cancel(job_events.job, &id, 1));
    assert_false(job_hold(job_events.job, &id, 1, true));
    assert_false(job_clear_prefix_cache(job_events.job));
    stop();
}

/* ---- losses ---- */

/* One victim after the other; each time a new launch serves within five seconds. */
static void killed_in_all_ways(void **state)
{
    (void)state;
    job_options o = usual();
    start_and_wait(&o);
    for (int round = 0; round < 6; round++) {
        int victim = round % 3;
        pid_t pid = victim < 2 ? (pid_t)job_events.pids[victim] : mpirun_pid();
        double before = clock_seconds();
        kill(pid, SIGKILL);
        assert_true(job_log_wait_state(&job_events, JOB_READY, round + 2, 10));
        assert_true(job_log_time(&job_events, JOB_READY) - before < 5);
        const char *why = job_log_sentence(&job_events, JOB_RESTARTING);
        char expected[60];
        snprintf(expected, sizeof expected, victim < 2 ? "rank %d (pid %d, host " : "mpirun was killed by signal 9", victim,
                 (int)pid);
        if (!strstr(why, expected))
            fail_msg("\"%s\" does not say \"%s\"", why, expected);
        assert_true(job_log_submit(&job_events, 100 + (uint64_t)round, 1));
        assert_true(job_log_wait_finished(&job_events, round + 1, 10));
    }
    stop();
}

static void stopped_leader_is_a_hang(void **state)
{
    (void)state;
    job_options o = usual();
    o.hang_seconds = 0.4;
    start_and_wait(&o);
    kill((pid_t)job_events.pids[0], SIGSTOP);
    assert_true(job_log_wait_state(&job_events, JOB_READY, 2, 10));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_RESTARTING), "no word from the leader, rank 0 (pid "));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_RESTARTING), "; rank 1 (pid ")); /* its Beat says who was silent */
    stop();
}

static void stopped_mpirun_is_a_hang(void **state)
{
    (void)state;
    job_options o = usual();
    o.hang_seconds = 0.4;
    start_and_wait(&o);
    kill(mpirun_pid(), SIGSTOP);
    assert_true(job_log_wait_state(&job_events, JOB_READY, 2, 10));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_RESTARTING), "mpirun was stopped"));
    stop();
}

/* The first launch misbehaves, the second is good. */
static void misbehaves_once(const char *mode, const char *expected, bool submits)
{
    job_options o = usual();
    o.hang_seconds = 0.4;
    o.load_seconds = 0.5;
    write_text("mode", mode);
    start(&o);
    if (submits) {
        assert_true(job_log_wait_state(&job_events, JOB_READY, 1, 10));
        assert_true(job_log_submit(&job_events, 1, 1));
    } else {
        assert_true(job_log_wait_state(&job_events, JOB_LOADING, 1, 10));
    }
    write_text("mode", "good");
    assert_true(job_log_wait_state(&job_events, JOB_RESTARTING, 1, 10));
    if (!strstr(job_log_sentence(&job_events, JOB_RESTARTING), expected))
        fail_msg("\"%s\" does not say \"%s\"", job_log_sentence(&job_events, JOB_RESTARTING), expected);
    assert_true(job_log_wait_state(&job_events, JOB_READY, submits ? 2 : 1, 10));
    stop();
}

static void loading_without_progress(void **state)
{
    (void)state;
    misbehaves_once("stuck-load", "loading has not moved", false);
}

static void ready_and_silent(void **state)
{
    (void)state;
    misbehaves_once("no-beat", "no word from the leader", true);
}

static void ready_and_no_step(void **state)
{
    (void)state;
    misbehaves_once("no-step", "although there is work", true);
}

static void held_sequences_need_no_step(void **state)
{
    (void)state;
    job_options o = usual();
    uint64_t id = 1;
    o.hang_seconds = 0.3;
    start_and_wait(&o);
    assert_true(job_log_submit(&job_events, id, 500));
    assert_true(job_hold(job_events.job, &id, 1, true));
    poll(NULL, 0, 1500);
    assert_int_equal(job_events.n_ready, 1);
    assert_true(job_hold(job_events.job, &id, 1, false));
    assert_true(job_log_wait_finished(&job_events, 1, 10));
    assert_int_equal(job_events.n_ready, 1);
    stop();
}

static void older_launch_is_refused(void **state)
{
    (void)state;
    job_options o = usual();
    o.first_launch = 5;
    write_text("mode", "old-launch");
    start(&o);
    assert_true(job_log_wait_state(&job_events, JOB_RESTARTING, 1, 10));
    write_text("mode", "good");
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_RESTARTING), "a message of launch "));
    stop();
}

/* ---- giving up ---- */

static void gives_up_after_too_many(void **state)
{
    (void)state;
    job_options o = usual();
    o.max_failures = 3;
    write_text("mode", "exit");
    start(&o);
    assert_true(job_log_wait_state(&job_events, JOB_GIVEN_UP, 1, 20));
    const char *why = job_log_sentence(&job_events, JOB_GIVEN_UP);
    assert_non_null(strstr(why, "3 failures within 10 minutes"));
    assert_non_null(strstr(why, "cannot go on, for a reason"));
    assert_false(job_log_submit(&job_events, 1, 1));
    stop();
}

static void same_goodbye_twice_is_enough(void **state)
{
    (void)state;
    job_options o = usual();
    write_text("mode", "goodbye");
    start(&o);
    assert_true(job_log_wait_state(&job_events, JOB_GIVEN_UP, 1, 20));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_GIVEN_UP), "the model is not to its liking"));
    stop();
    assert_int_equal(job_events.states[job_events.n_states - 1].launch, 2);
}

static void stops_in_any_state(void **state)
{
    (void)state;
    job_options o = usual();
    const char *modes[] = {"good", "stuck-load", "exit", "no-beat"};
    for (int i = 0; i < 12; i++) {
        write_text("mode", modes[i % 4]);
        start(&o);
        poll(NULL, 0, 13 * i);
        double before = clock_seconds();
        stop();
        assert_true(clock_seconds() - before < 8);
    }
}

/* ---- refused at start ---- */

static void assert_refused(const job_options *o, const char *expected)
{
    assert_int_not_equal(job_start(o, &job_log_listener, &job_events, &job_events.job), STATUS_OK);
    if (!strstr(status_message(), expected))
        fail_msg("\"%s\" does not say \"%s\"", status_message(), expected);
    assert_nothing_left(getpid());
}

static void refuses_what_cannot_work(void **state)
{
    (void)state;
    job_options o = usual();
    o.mpirun = "/nowhere/mpirun";
    assert_refused(&o, "/nowhere/mpirun cannot be executed");
    o = usual();
    o.worker = "/nowhere/worker";
    assert_refused(&o, "/nowhere/worker cannot be executed");
    o = usual();
    o.n_ranks = 0;
    assert_refused(&o, "0 ranks");
    o = usual();
    o.hostfile = in_folder("none");
    assert_refused(&o, "none: No such file");
    o = usual();
    o.listen = "nonsense";
    assert_refused(&o, "is not HOST:PORT");
    o = usual();
    o.wait_for_workers = true;
    assert_refused(&o, "secret");
    o = usual();
    write_text("open-secret", "0123456789abcdef0123\n");
    chmod(in_folder("open-secret"), 0644);
    o.secret_file = in_folder("open-secret");
    assert_refused(&o, "chmod 600");
    write_text("away", "192.0.2.1 slots=2\n");
    o = usual();
    o.hostfile = in_folder("away");
    assert_refused(&o, "rank 0 runs on 192.0.2.1 and cannot reach");
}

static const char *plan_text =
    "{\"format\": \"convoke-plan\", \"version\": 1, \"name\": \"by-hand\", \"experts\": 2, \"ranks\": 2, "
    "\"layers\": [{\"layer\": 0, \"ranks_of_expert\": [[1], [0]]}]}";

static void plan_is_handed_out(void **state)
{
    (void)state;
    job_options o = usual();
    write_text("plan.json", plan_text);
    char plan[4200];
    snprintf(plan, sizeof plan, "%s", in_folder("plan.json"));
    o.plan_path = plan;
    o.n_ranks = 3;
    assert_refused(&o, "is a plan for 2 ranks, but 3 are to be started");
    o.n_ranks = 2;
    start_and_wait(&o);
    assert_string_equal(job_events.plan_name, "by-hand");
    stop();
}

/* ---- hosts ---- */

static void lost_host_leaves(void **state)
{
    (void)state;
    job_options o = usual();
    char plan[4200], file[4200], hosts[300];
    write_text("plan.json", plan_text);
    write_text("machines", "localhost slots=1\n192.0.2.7 slots=1 # the second one\n");
    snprintf(plan, sizeof plan, "%s", in_folder("plan.json"));
    snprintf(file, sizeof file, "%s", in_folder("machines"));
    o.plan_path = plan;
    o.hostfile = file;
    start_and_wait(&o);
    slurp(in_folder("hostfile"), hosts, sizeof hosts);
    assert_string_equal(hosts, "localhost slots=1\n192.0.2.7 slots=1\n");
    kill((pid_t)job_events.pids[1], SIGKILL); /* a rank only: every host answers */
    assert_true(job_log_wait_state(&job_events, JOB_READY, 2, 10));
    assert_int_equal(job_events.n_ranks, 2);
    assert_string_equal(job_events.plan_name, "by-hand");
    write_text("lost", "192.0.2.7\n");
    kill((pid_t)job_events.pids[1], SIGKILL);
    assert_true(job_log_wait_state(&job_events, JOB_READY, 3, 10));
    assert_int_equal(job_events.n_ranks, 1);
    assert_string_equal(job_events.plan_name, "contiguous");
    slurp(in_folder("hostfile"), hosts, sizeof hosts);
    assert_string_equal(hosts, "localhost slots=1\n");
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_LOADING), "equal blocks"));
    bool said = false;
    pthread_mutex_lock(&job_events.lock);
    for (int i = 0; i < job_events.n_states; i++)
        said |= strcmp(job_events.states[i].sentence, "host 192.0.2.7 does not answer and leaves the job with its 1 rank") == 0;
    pthread_mutex_unlock(&job_events.lock);
    assert_true(said);
    stop();
}

/* ---- workers that others start ---- */

static pid_t start_worker_by_hand(const char *address)
{
    pid_t pid = fork();
    if (pid == 0) {
        execl(worker, worker, "2", "--coordinator", address, "--secret-file", in_folder("secret"), (char *)NULL);
        _exit(127);
    }
    return pid;
}

static void waits_for_workers(void **state)
{
    (void)state;
    job_options o = usual();
    char file[4200];
    write_text("secret", "a-secret-of-a-person\n");
    snprintf(file, sizeof file, "%s", in_folder("secret"));
    o.wait_for_workers = true;
    o.secret_file = file;
    start(&o);
    assert_true(job_log_wait_state(&job_events, JOB_STARTING, 1, 5));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_STARTING), job_address(job_events.job)));
    for (int round = 0; round < 3; round++) {
        pid_t pid = start_worker_by_hand(job_address(job_events.job));
        assert_true(job_log_wait_state(&job_events, JOB_READY, round + 1, 10));
        assert_true(job_log_submit(&job_events, 1 + (uint64_t)round, 1));
        assert_true(job_log_wait_finished(&job_events, round + 1, 10));
        if (round == 2) {
            job_stop(job_events.job); /* this one is told to end */
            job_events.job = NULL;
        } else {
            kill(pid, SIGKILL);
        }
        int how;
        assert_int_equal(waitpid(pid, &how, 0), pid);
        assert_true(round < 2 || (WIFEXITED(how) && WEXITSTATUS(how) == 0));
        if (round < 2)
            assert_true(job_log_wait_state(&job_events, JOB_STARTING, round + 2, 10));
    }
    assert_nothing_left(getpid());
}

/* ---- a coordinator that is killed ---- */

static void killed_coordinator_leaves_no_process(void **state)
{
    (void)state;
    job_options o = usual();
    int pair[2];
    char byte;
    assert_int_equal(pipe(pair), 0);
    pid_t coordinator = fork();
    if (coordinator == 0) {
        bool fine = job_start(&o, &job_log_listener, &job_events, &job_events.job) == STATUS_OK &&
                    job_log_wait_ready(&job_events, 1, 20) && write(pair[1], "x", 1) == 1;
        while (fine)
            pause();
        _exit(1);
    }
    close(pair[1]);
    ssize_t n = read(pair[0], &byte, 1);
    close(pair[0]);
    assert_int_equal(n, 1);
    kill(coordinator, SIGKILL);
    waitpid(coordinator, NULL, 0);
    poll(NULL, 0, 500);
    assert_int_equal(count_entries(folder, "convoke-"), 1);
    launch_dir_sweep();
    assert_nothing_left(coordinator);
}

static void sweep_spares_the_living(void **state)
{
    (void)state;
    launch_dir d;
    assert_int_equal(launch_dir_create(1, &d), STATUS_OK);
    char name[80], window[120];
    snprintf(name, sizeof name, "/dev/shm/convoke-%016llx-0-1", (unsigned long long)d.job);
    snprintf(window, sizeof window, "%s", name);
    if (d.job)
        close(open(window, O_CREAT | O_RDWR, 0600));
    launch_dir_sweep();
    assert_int_equal(access(d.scratch, F_OK), 0);
    assert_int_equal(access(launch_dir_file(&d, "tmp"), F_OK), 0);
    if (d.job)
        assert_int_equal(access(window, F_OK), 0);
    char scratch[4096];
    snprintf(scratch, sizeof scratch, "%s", d.scratch);
    launch_dir_remove(&d);
    assert_int_not_equal(access(scratch, F_OK), 0);
    assert_int_not_equal(access(window, F_OK), 0);
}

#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST("workers are started, serve and stop; nothing is left", serves_and_stops),
        TEST("states come in order, launches are numbered on", states_come_in_order),
        TEST("the secret is in a file of its own for a moment and on no command line", secret_is_seen_nowhere),
        TEST("a callback may submit", submits_from_callbacks),
        TEST("many threads submit at once", submits_from_many_threads),
        TEST("what is sent while nobody is ready is dropped", dropped_when_not_ready),
        TEST("kill -9 of rank 0, rank 1 or mpirun: named, and serving again in five seconds", killed_in_all_ways),
        TEST("a stopped leader is a hang, and the sentence says who was heard last", stopped_leader_is_a_hang),
        TEST("a stopped mpirun is a hang", stopped_mpirun_is_a_hang),
        TEST("loading without progress is a loss", loading_without_progress),
        TEST("a leader that falls silent is a loss", ready_and_silent),
        TEST("work without steps is a loss", ready_and_no_step),
        TEST("held sequences need no steps", held_sequences_need_no_step),
        TEST("a message of an older launch is refused", older_launch_is_refused),
        TEST("too many failures: given up with the last words of the workers", gives_up_after_too_many),
        TEST("the same goodbye twice before ever being ready is enough", same_goodbye_twice_is_enough),
        TEST("a job can be stopped at any time", stops_in_any_state),
        TEST("options that cannot work are refused with a sentence", refuses_what_cannot_work),
        TEST("the plan is read once and handed out", plan_is_handed_out),
        TEST("a host that does not answer leaves, the plan with it; a rank's death drops nobody", lost_host_leaves),
        TEST("workers that others start come, vanish and come again", waits_for_workers),
        TEST("a killed coordinator leaves no process, and its folders go with the next sweep",
             killed_coordinator_leaves_no_process),
        TEST("a sweep spares folders whose coordinator lives", sweep_spares_the_living),
    };
    return cmocka_run_group_tests_name("job", tests, NULL, NULL);
}
