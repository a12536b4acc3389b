/* The job with real ranks under the real mpirun: whoever is killed or stopped, workers serve again soon, with the same tokens,
 * and nothing is left: no process, no scratch folder, no shared memory. */
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_job.h"

#include <ctype.h>
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HANG_SECONDS  1.5
#define AGAIN_SECONDS 5.0 /* from the moment the loss is known, or from the kill, to the next launch that serves */

static char folder[4096], worker[4096], model[4096];
static job_log job_events;

static int set_up(void **state)
{
    (void)state;
    unsetenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s", support_scratch());
    setenv("TMPDIR", folder, 1);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1); /* Open MPI leaks */
    snprintf(worker, sizeof worker, "%s", support_binary("convoke-worker"));
    snprintf(model, sizeof model, "%s", support_data("qwen3_moe"));
    job_log_init(&job_events);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    job_stop(job_events.job);
    job_log_destroy(&job_events);
    support_remove(folder);
    return 0;
}

/* Processes whose command line or environment names this test's folder. */
static int count_processes(void)
{
    static char text[1 << 17];
    int n = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *e; (e = readdir(proc));) {
        char path[300];
        pid_t pid = (pid_t)atoi(e->d_name);
        if (!isdigit((unsigned char)e->d_name[0]) || pid == getpid())
            continue;
        snprintf(path, sizeof path, "/proc/%d/environ", (int)pid);
        FILE *f = fopen(path, "r");
        size_t size = f ? fread(text, 1, sizeof text - 1, f) : 0;
        if (f)
            fclose(f);
        if (size > 0 && memmem(text, size, folder, strlen(folder))) {
            fprintf(stderr, "process %d is left\n", (int)pid);
            n++;
        }
    }
    closedir(proc);
    return n;
}

static int count_entries(const char *path, const char *prefix)
{
    int n = 0;
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (e->d_name[0] != '.' && strncmp(e->d_name, prefix, strlen(prefix)) == 0) {
            fprintf(stderr, "%s/%s is left\n", path, e->d_name);
            n++;
        }
    if (dir)
        closedir(dir);
    return n;
}

/* Segments of Open MPI and windows of ranks lie in a folder, or have a name, that tells this process. */
static void stop_and_look(void)
{
    char prefix[60];
    job_stop(job_events.job);
    job_events.job = NULL;
    snprintf(prefix, sizeof prefix, "convoke-%u-%d-", (unsigned)geteuid(), (int)getpid());
    assert_int_equal(count_processes(), 0);
    assert_int_equal(count_entries(folder, ""), 0);
    assert_int_equal(count_entries("/dev/shm", prefix), 0);
}

static job_options usual(int n_ranks)
{
    return (job_options){.n_ranks = n_ranks,
                         .worker = worker,
                         .model_dir = model,
                         .weights = "map",
                         .combine = "fixed",
                         .rows = "fp32",
                         .threads = 1,
                         .max_sequences = 8,
                         .hang_seconds = HANG_SECONDS,
                         .load_seconds = 20,
                         .max_failures = 100,
                         .failure_minutes = 10};
}

static void start(int n_ranks)
{
    job_options o = usual(n_ranks);
    if (job_start(&o, &job_log_listener, &job_events, &job_events.job) != STATUS_OK)
        fail_msg("%s", status_message());
    if (!job_log_wait_state(&job_events, JOB_READY, 1, 30))
        fail_msg("the workers did not come up: %s", job_log_sentence(&job_events, JOB_RESTARTING));
}

static pid_t mpirun_pid(void)
{
    char path[64], text[300] = "", state;
    int parent = 0;
    snprintf(path, sizeof path, "/proc/%u/stat", job_events.pids[0]);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    assert_non_null(fgets(text, sizeof text, f));
    fclose(f);
    assert_int_equal(sscanf(strrchr(text, ')') + 1, " %c %d", &state, &parent), 2);
    return parent;
}

static void collect(int first_token, int n, uint32_t *out)
{
    for (int i = 0; i < n; i++)
        out[i] = job_events.tokens[first_token + i].token;
}

/* signal to rank 0, rank 1 or (2) mpirun, twice around; after each the same request gives the same tokens. */
static void lose_and_continue(int sign, double noticed_after)
{
    enum { N = 12 };
    uint32_t expected[N], again[N];
    start(2);
    assert_true(job_log_submit(&job_events, 1, N));
    assert_true(job_log_wait_finished(&job_events, 1, 20));
    collect(0, N, expected);
    for (int round = 0; round < 3; round++) {
        pid_t pid = round < 2 ? (pid_t)job_events.pids[round] : mpirun_pid();
        assert_true(job_log_submit(&job_events, 100, 100)); /* in the middle of something */
        double before = clock_seconds();
        assert_int_equal(kill(pid, sign), 0);
        assert_true(job_log_wait_state(&job_events, JOB_READY, round + 2, 20));
        double took = clock_seconds() - before;
        printf("           %s of %s %d: known after %.2f s, serving again after %.2f s (%s)\n", strsignal(sign),
               round < 2 ? "rank" : "mpirun", round < 2 ? round : (int)pid, job_log_time(&job_events, JOB_RESTARTING) - before,
               took, job_log_sentence(&job_events, JOB_RESTARTING));
        assert_true(took < noticed_after + AGAIN_SECONDS);
        pthread_mutex_lock(&job_events.lock);
        int first = job_events.n_tokens = 0;
        int finished = job_events.n_finished;
        pthread_mutex_unlock(&job_events.lock);
        assert_true(job_log_submit(&job_events, 2, N));
        assert_true(job_log_wait_finished(&job_events, finished + 1, 20));
        collect(first, N, again);
        assert_memory_equal(again, expected, sizeof expected);
    }
    stop_and_look();
}

static void killed(void **state)
{
    (void)state;
    lose_and_continue(SIGKILL, 0);
}

static void stopped(void **state)
{
    (void)state;
    lose_and_continue(SIGSTOP, HANG_SECONDS + 1);
}

static void one_rank(void **state)
{
    (void)state;
    start(1);
    assert_int_equal(job_events.n_ranks, 1);
    assert_true(job_log_submit(&job_events, 1, 3));
    assert_true(job_log_wait_finished(&job_events, 1, 20));
    stop_and_look();
}

static void stopped_while_loading(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        job_options o = usual(2);
        o.weights = "copy";
        o.hang_seconds = 20;
        o.max_failures = 0;
        assert_int_equal(job_start(&o, &job_log_listener, &job_events, &job_events.job), STATUS_OK);
        if (i > 0)
            poll(NULL, 0, 150 * i);
        stop_and_look();
    }
}

static void bad_model(void **state)
{
    (void)state;
    snprintf(model, sizeof model, "%.4000s/no-such-model", folder);
    job_options o = usual(2);
    o.max_sequences = 0;
    o.hang_seconds = 20;
    o.max_failures = 5;
    assert_int_equal(job_start(&o, &job_log_listener, &job_events, &job_events.job), STATUS_OK);
    assert_true(job_log_wait_state(&job_events, JOB_GIVEN_UP, 1, 30));
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_GIVEN_UP), "no-such-model"));
    printf("           %s\n", job_log_sentence(&job_events, JOB_GIVEN_UP));
    stop_and_look();
}

#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST("one rank serves and leaves nothing", one_rank),
        TEST("kill -9 of either rank or mpirun: serving again in five seconds with the same tokens", killed),
        TEST("a stopped rank or mpirun is noticed and replaced", stopped),
        TEST("told to stop while it starts: it ends and leaves nothing", stopped_while_loading),
        TEST("a model that is not there: given up with the workers' sentence", bad_model),
    };
    return cmocka_run_group_tests_name("job under mpirun", tests, NULL, NULL);
}
