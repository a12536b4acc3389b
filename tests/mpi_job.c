/* mpi_job.c - a job over the two hosts of two_hosts.sh, started and watched from the first: the second one's daemon is killed,
 * then its link is cut. The job goes on, with the same tokens, and at the end no process is left on either. */
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_job.h"

#include <ctype.h>
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TOKENS = 12 };

static job_log job_events;

/* Processes whose first argument ends in `name` and whose command line holds `with`; the last one's number. */
static int find_processes(const char *name, const char *with, pid_t *last)
{
    int n = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *e; (e = readdir(proc));) {
        char path[300], text[8192];
        if (!isdigit((unsigned char)e->d_name[0]))
            continue;
        snprintf(path, sizeof path, "/proc/%s/cmdline", e->d_name);
        FILE *f = fopen(path, "r");
        size_t size = f ? fread(text, 1, sizeof text - 1, f) : 0;
        if (f)
            fclose(f);
        text[size] = '\0';
        size_t first = strlen(text), want = strlen(name);
        if (first < want || strcmp(text + first - want, name) != 0 || !memmem(text, size, with, strlen(with)))
            continue;
        n++;
        if (last)
            *last = (pid_t)atoi(e->d_name);
    }
    closedir(proc);
    return n;
}

static void ask(uint64_t id, uint32_t *tokens)
{
    pthread_mutex_lock(&job_events.lock);
    job_events.n_tokens = 0;
    int finished = job_events.n_finished;
    pthread_mutex_unlock(&job_events.lock);
    assert_true(job_log_submit(&job_events, id, N_TOKENS));
    assert_true(job_log_wait_finished(&job_events, finished + 1, 30));
    assert_int_equal(job_events.n_tokens, N_TOKENS);
    for (int i = 0; i < N_TOKENS; i++)
        tokens[i] = job_events.tokens[i].token;
}

static void wait_for_launch(int n, double since, const char *what)
{
    assert_true(job_log_wait_state(&job_events, JOB_READY, n, 60));
    printf("%s: serving again after %.1f s on %d ranks (%s)\n", what, clock_seconds() - since, job_events.n_ranks,
           job_log_sentence(&job_events, JOB_RESTARTING));
}

static void goes_on_over_lost_hosts(void **state)
{
    (void)state;
    uint32_t expected[N_TOKENS], again[N_TOKENS];
    pid_t daemon = 0;
    job_options o = {.n_ranks = 2,
                     .hostfile = getenv("TWO_HOSTS_HOSTFILE"),
                     .mpirun_args = getenv("TWO_HOSTS_MPIRUN_ARGS"),
                     .worker = support_binary("convoke-worker"),
                     .model_dir = support_data("qwen3_moe"),
                     .weights = "map",
                     .combine = "fixed",
                     .rows = "fp32",
                     .threads = 1,
                     .max_sequences = 8,
                     .hang_seconds = 4,
                     .load_seconds = 30,
                     .max_failures = 20,
                     .failure_minutes = 10};
    job_log_init(&job_events);
    if (job_start(&o, &job_log_listener, &job_events, &job_events.job) != STATUS_OK)
        fail_msg("%s", status_message());
    assert_true(job_log_wait_state(&job_events, JOB_READY, 1, 60));
    assert_int_equal(job_events.n_ranks, 2);
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_LOADING), "2 ranks on 2 hosts"));
    ask(1, expected);

    assert_int_equal(find_processes("orted", "", &daemon), 1);
    double before = clock_seconds();
    assert_int_equal(kill(daemon, SIGKILL), 0);
    wait_for_launch(2, before, "daemon killed");
    assert_non_null(strstr(job_log_sentence(&job_events, JOB_RESTARTING), "mpirun has lost its daemon on host node1; rank 1 (pid "));
    assert_int_equal(job_events.n_ranks, 2); /* the host answers: it stays */
    ask(2, again);
    assert_memory_equal(again, expected, sizeof expected);

    before = clock_seconds();
    assert_int_equal(system("ip -n node1 link set inner1 down"), 0);
    wait_for_launch(3, before, "link cut");
    assert_int_equal(job_events.n_ranks, 1);
    bool said = false;
    for (int i = 0; i < job_events.n_states; i++)
        said |= strcmp(job_events.states[i].sentence, "host node1 does not answer and leaves the job with its 1 rank") == 0;
    assert_true(said);
    ask(3, again);
    assert_memory_equal(again, expected, sizeof expected);

    job_stop(job_events.job);
    double end = clock_seconds() + 20; /* on the lost host nobody but the processes themselves can end them */
    while (find_processes("convoke-worker", "", NULL) + find_processes("orted", "", NULL) > 0 && clock_seconds() < end)
        poll(NULL, 0, 50);
    assert_int_equal(find_processes("convoke-worker", "", NULL), 0);
    assert_int_equal(find_processes("orted", "", NULL), 0);
    job_log_destroy(&job_events);
    if (system("! find $TMPDIR /dev/shm -mindepth 1 -ls | grep .") != 0)
        fail_msg("files are left");
}

int main(void)
{
    if (!getenv("TWO_HOSTS_HOSTFILE")) {
        fprintf(stderr, "usage: TWO_HOSTS_ALONE=1 two_hosts.sh 1 mpi_job\n");
        return 2;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(goes_on_over_lost_hosts),
    };
    return cmocka_run_group_tests_name("a job over two hosts", tests, NULL, NULL);
}
