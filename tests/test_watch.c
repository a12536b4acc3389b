/* test_watch.c - the watching thread in a group of one rank, each case in a process of its own: who stands still ends, who works,
 * loads or idles does not. */
#include "tests/support.h"

#include "proto/clock.h"
#include "worker/watch.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HANG_SECONDS 1.0

typedef struct {
    group *group;
    group_pulse *pulse;
    watch *watch;
} rank;

static void nap(double seconds)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)}, NULL);
}

/* Stands still for longer than any patience here. */
static int stand_still(rank *r)
{
    watch_arm(r->watch, HANG_SECONDS);
    nap(8);
    return 3;
}

static void say_on_stdout(void *arg, const char *sentence)
{
    (void)arg;
    printf("last words: %s\n", sentence);
    fflush(stdout);
}

static int stand_still_with_last_words(rank *r)
{
    watch_set_last_words(r->watch, say_on_stdout, NULL);
    return stand_still(r);
}

static int move_slowly(rank *r)
{
    uint32_t ms;
    watch_arm(r->watch, HANG_SECONDS);
    for (int i = 0; i < 7; i++) {
        nap(HANG_SECONDS / 3);
        atomic_fetch_add(&r->pulse->moves, 1);
        watch_silence(r->watch, &ms);
        if (ms > 1e3 * HANG_SECONDS)
            return 4;
    }
    return 0;
}

static int idle(rank *r)
{
    watch_arm(r->watch, HANG_SECONDS);
    atomic_store(&r->pulse->state, RANK_IDLE);
    nap(3 * HANG_SECONDS);
    atomic_store(&r->pulse->state, RANK_WORKING); /* the time before does not count */
    nap(HANG_SECONDS / 2);
    return 0;
}

static int load(rank *r)
{
    (void)r; /* not armed */
    nap(3 * HANG_SECONDS);
    return 0;
}

static int be_told_to_end(rank *r)
{
    watch_end_job(r->watch, "the coordinator is gone");
    nap(8);
    return 3;
}

static int end_too_slowly(rank *r)
{
    watch_end_within(r->watch, 0.5, "it did not end in time");
    group_destroy(r->group);
    r->group = NULL;
    nap(8);
    return 3;
}

/* What the case's process returns, and what it wrote to stdout and stderr. */
static int run_case(int (*act)(rank *r), char *said, size_t size)
{
    int ends[2], how;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        rank r = {0};
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        if (group_create(NULL, NULL, 0, &r.group) != STATUS_OK || watch_start(r.group, &r.watch) != STATUS_OK)
            _exit(99);
        r.pulse = group_pulse_of(r.group, 0);
        int rc = act(&r);
        watch_stop(r.watch);
        group_destroy(r.group);
        _exit(rc);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; n + 1 < size && (got = read(ends[0], said + n, size - 1 - n)) > 0;)
        n += (size_t)got;
    said[n] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(child, &how, 0), child);
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

static void assert_ends(int (*act)(rank *r), double within, const char *sentence)
{
    char said[4096];
    double start = clock_seconds();
    assert_int_equal(run_case(act, said, sizeof said), 1);
    assert_true(clock_seconds() - start < within);
    if (!strstr(said, sentence))
        fail_msg("it said: %s", said);
}

static void assert_lives(int (*act)(rank *r))
{
    char said[4096];
    assert_int_equal(run_case(act, said, sizeof said), 0);
    assert_string_equal(said, "");
}

static void who_stands_still_ends(void **state)
{
    (void)state;
    assert_ends(stand_still, HANG_SECONDS + 2, "rank 0 (pid ");
    assert_ends(stand_still, HANG_SECONDS + 2, "has stood still for 1.");
}

static void last_words_are_said(void **state)
{
    (void)state;
    assert_ends(stand_still_with_last_words, HANG_SECONDS + 2, "last words: rank 0 (pid ");
}

static void who_moves_lives(void **state)
{
    (void)state;
    assert_lives(move_slowly);
}

static void who_idles_or_loads_lives(void **state)
{
    (void)state;
    assert_lives(idle);
    assert_lives(load);
}

static void an_end_that_hangs_is_ended(void **state)
{
    (void)state;
    assert_ends(be_told_to_end, 4, "the coordinator is gone");
    assert_ends(end_too_slowly, 3, "it did not end in time");
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        {"who stands still for longer than the hang time ends", who_stands_still_ends, NULL, NULL, NULL},
        {"its last words are said", last_words_are_said, NULL, NULL, NULL},
        {"who moves, however slowly, lives", who_moves_lives, NULL, NULL, NULL},
        {"who idles or loads is not judged", who_idles_or_loads_lives, NULL, NULL, NULL},
        {"an end that hangs is ended", an_end_that_hangs_is_ended, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
