/* Decisions of the job as pure functions: when workers are lost, when to give up, what hosts are given, which lines are shown. */
#include "cluster/chatter.h"
#include "cluster/hosts.h"
#include "cluster/sequence_set.h"
#include "cluster/supervision.h"
#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- supervision ---- */

static const patience limits = {.start_seconds = 30, .load_seconds = 60, .hang_seconds = 10};

static supervision_verdict judge(const supervision *s, double now)
{
    double wait;
    supervision_verdict v = supervision_judge(s, &limits, now, &wait);
    assert_true(wait >= 0);
    if (v == SUPERVISION_FINE && !isinf(wait)) { /* the wait is exact: just before fine, just after not */
        double again;
        assert_int_equal(supervision_judge(s, &limits, now + wait - 1e-6, &again), SUPERVISION_FINE);
        assert_int_not_equal(supervision_judge(s, &limits, now + wait + 1e-6, &again), SUPERVISION_FINE);
    }
    return v;
}

static void losses_are_seen(void **state)
{
    (void)state;
    supervision s = {.phase = PHASE_CONNECTING, .launched = 100};
    assert_int_equal(judge(&s, 129), SUPERVISION_FINE);
    assert_int_equal(judge(&s, 131), SUPERVISION_NO_HELLO);
    s = (supervision){.phase = PHASE_LOADING, .launched = 100, .heard = 200, .progressed = 150};
    assert_int_equal(judge(&s, 205), SUPERVISION_FINE);
    assert_int_equal(judge(&s, 211), SUPERVISION_SILENT);
    s.heard = 211;
    assert_int_equal(judge(&s, 211), SUPERVISION_NO_PROGRESS);
    s = (supervision){.phase = PHASE_READY, .heard = 300, .stepped = 200, .progressed = 0};
    assert_int_equal(judge(&s, 301), SUPERVISION_FINE);
    s.has_work = true;
    assert_int_equal(judge(&s, 301), SUPERVISION_NO_STEP);
    s.stepped = 300;
    assert_int_equal(judge(&s, 301), SUPERVISION_FINE);
    s.stopped = 280;
    assert_int_equal(judge(&s, 301), SUPERVISION_STOPPED);
}

static void others_may_take_their_time(void **state)
{
    (void)state;
    patience p = limits;
    supervision s = {.phase = PHASE_CONNECTING, .launched = 100};
    double wait;
    p.start_seconds = 0;
    assert_int_equal(supervision_judge(&s, &p, 1e6, &wait), SUPERVISION_FINE);
    assert_true(isinf(wait));
}

static void gives_up_at_the_limit(void **state)
{
    (void)state;
    failure_history *h = calloc(1, sizeof *h);
    h->max_failures = 3;
    h->window_seconds = 60;
    assert_false(failure_note(h, 0).give_up);
    assert_false(failure_note(h, 50).give_up);
    assert_false(failure_note(h, 100).give_up); /* the first is out of the window */
    failure_decision d = failure_note(h, 105);
    assert_true(d.give_up);
    assert_int_equal(d.n_in_window, 3);
    *h = (failure_history){.max_failures = 0, .window_seconds = 60};
    for (int i = 0; i < 5000; i++)
        assert_false(failure_note(h, 0.001 * i).give_up);
    *h = (failure_history){.max_failures = FAILURE_HISTORY, .window_seconds = 60};
    for (int i = 0; i < 3 * FAILURE_HISTORY; i++)
        assert_false(failure_note(h, 0.1 * i).give_up); /* 600 within a minute are fewer */
    *h = (failure_history){.max_failures = 1, .window_seconds = 60};
    assert_true(failure_note(h, 0).give_up);
    free(h);
}

static void pauses_grow(void **state)
{
    (void)state;
    failure_history *h = calloc(1, sizeof *h);
    double before = -1;
    assert_true(failure_note(h, 0).pause_seconds == 0);
    for (int i = 1; i < 20; i++) {
        double pause = failure_note(h, i).pause_seconds;
        assert_true(pause >= before && pause > 0 && pause <= 5);
        before = pause;
    }
    assert_true(before == 5);
    failure_note_ready(h);
    assert_true(failure_note(h, 21).pause_seconds == 0);
    free(h);
}

/* ---- sequences ---- */

static void set_is_a_set(void **state)
{
    (void)state;
    enum { IDS = 700 };
    sequence_set s = {0};
    static bool in[IDS], held[IDS];
    uint64_t random = 3;
    for (int round = 0; round < 200000; round++) {
        int id = support_below(&random, IDS);
        switch (support_below(&random, 5)) {
        case 0:
        case 1:
            assert_true(sequence_set_add(&s, (uint64_t)id * 3));
            held[id] &= in[id];
            in[id] = id > 0;
            break;
        case 2:
        case 3:
            sequence_set_remove(&s, (uint64_t)id * 3);
            in[id] = held[id] = false;
            break;
        default:
            held[id] = in[id] && round % 2;
            sequence_set_hold(&s, (uint64_t)id * 3, round % 2);
        }
        if (round % 997 == 0) {
            size_t n = 0, n_held = 0;
            for (int i = 0; i < IDS; i++) {
                n += in[i];
                n_held += held[i];
            }
            assert_int_equal(s.n, n);
            assert_int_equal(s.n_held, n_held);
            assert_true(sequence_set_has_work(&s) == (n > n_held));
        }
    }
    sequence_set_clear(&s);
    assert_false(sequence_set_has_work(&s));
    sequence_set_free(&s);
}

/* ---- hosts ---- */

static status parse(const char *text, hosts *out)
{
    return hosts_parse("machines", text, strlen(text), out);
}

static void assert_hosts(const char *text, int n_ranks, const char *expected)
{
    hosts h;
    char got[500] = "";
    if (parse(text, &h) != STATUS_OK)
        fail_msg("%s", status_message());
    hosts_assign(&h, n_ranks);
    int sum = 0;
    for (int i = 0; i < h.n; i++) {
        size_t n = strlen(got);
        snprintf(got + n, sizeof got - n, "%s%s=%d", i ? " " : "", h.entries[i].name, h.entries[i].n_ranks);
        sum += h.entries[i].n_ranks;
    }
    assert_string_equal(got, expected);
    assert_int_equal(sum, n_ranks);
    hosts_clear(&h);
}

static void ranks_are_given_out(void **state)
{
    (void)state;
    assert_hosts("a slots=2\nb slots=2\n", 4, "a=2 b=2");
    assert_hosts("a slots=2\nb slots=2\n", 3, "a=2 b=1");
    assert_hosts("a slots=2\nb slots=2\n", 2, "a=2 b=0");
    assert_hosts("a slots=2\nb slots=2\n", 7, "a=4 b=3");
    assert_hosts("a\nb\nc\n", 7, "a=3 b=2 c=2");
    assert_hosts("# all\n\n  a:3   # first\nuser@b slots=1 max_slots=4\na slots=1", 5, "a=4 user@b=1");
    assert_hosts("a slots=2\nb\n", 3, "a=2 b=1");
    assert_hosts("2001:db8::1 slots=2\r\nhost-2.cluster_x slots=2\r\n", 4, "2001:db8::1=2 host-2.cluster_x=2");
}

static void reduced_to_what_remains(void **state)
{
    (void)state;
    hosts h;
    const char *scratch = support_scratch();
    char path[4200], text[300];
    assert_int_equal(parse("a slots=2\nb slots=2\nspare slots=3\n", &h), STATUS_OK);
    hosts_assign(&h, 4);
    hosts_drop(&h, 0);
    assert_int_equal(hosts_room(&h, 4), 4); /* the spare one takes over */
    hosts_assign(&h, 4);
    snprintf(path, sizeof path, "%s/hosts", scratch);
    assert_int_equal(hosts_write(&h, path), STATUS_OK);
    FILE *f = fopen(path, "r");
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    assert_string_equal(text, "b slots=2\nspare slots=2\n");
    hosts_drop(&h, 1);
    assert_int_equal(hosts_room(&h, 4), 2);
    hosts_drop(&h, 0);
    assert_int_equal(hosts_room(&h, 4), 0);
    hosts_clear(&h);
    support_remove(scratch);
}

static void bad_hostfiles(void **state)
{
    (void)state;
    static const char *bad[][2] = {
        {"", "names no host"},
        {"# nothing\n\n", "names no host"},
        {"a slots=0\n", "line 1: slots is \"0\""},
        {"a\nb slots=x\n", "line 2: slots is \"x\""},
        {"a slots=99999\n", "not a number from 1 to"},
        {"a slots=60000\na slots=60000\n", "line 2: host a has more than"},
        {"a cpus=4\n", "\"cpus\" is not understood"},
        {"a b\n", "\"b\" is not understood"},
        {"^a\n", "\"^a\" is no host name"},
        {"--mca\n", "is no host name"},
        {"a;reboot\n", "is no host name"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        hosts h = {0};
        assert_int_not_equal(parse(bad[i][0], &h), STATUS_OK);
        assert_non_null(strstr(status_message(), "machines"));
        if (!strstr(status_message(), bad[i][1]))
            fail_msg("\"%s\" does not say \"%s\"", status_message(), bad[i][1]);
        assert_null(h.entries);
    }
    hosts h = {0};
    assert_int_not_equal(hosts_parse("machines", "a\0b\n", 4, &h), STATUS_OK);
    char *line = calloc(1, 5000);
    memset(line, 'a', 4999);
    assert_int_not_equal(parse(line, &h), STATUS_OK);
    free(line);
}

static void here_is_here(void **state)
{
    (void)state;
    char own[256] = "", user[300];
    gethostname(own, sizeof own - 1);
    snprintf(user, sizeof user, "me@%s", own);
    assert_true(hosts_is_here(own));
    assert_true(hosts_is_here(user));
    assert_true(hosts_is_here("localhost"));
    assert_true(hosts_is_here("127.0.0.1"));
    assert_true(hosts_is_here("::1"));
    assert_false(hosts_is_here("192.0.2.1"));
    assert_false(hosts_is_here("2001:db8::1"));
}

/* ---- chatter ---- */

static char shown[4000];

static void show(void *arg, const char *line)
{
    (void)arg;
    size_t n = strlen(shown);
    snprintf(shown + n, sizeof shown - n, "%s|", line);
}

static const char *frame = "--------------------------------------------------------------------------\n";

static void feed(chatter *c, const char *text, size_t piece)
{
    for (size_t i = 0, n = strlen(text); i < n; i += piece)
        chatter_feed(c, text + i, piece < n - i ? piece : n - i, show, NULL);
}

static void lines_are_sorted(void **state)
{
    (void)state;
    for (size_t piece = 1; piece < 300; piece += 13) {
        chatter c = {0};
        char text[2000];
        shown[0] = '\0';
        snprintf(text, sizeof text,
                 "convoke-worker: rank 1: out of memory\n%sPrimary job  terminated normally, but 1 process returned\n"
                 "a non-zero exit code.\n%s%smpirun detected that one or more\n%s[vm:01234] a warning\nrank 0: bye",
                 frame, frame, frame, frame);
        feed(&c, text, piece);
        chatter_flush(&c, show, NULL);
        assert_string_equal(shown, "convoke-worker: rank 1: out of memory|[vm:01234] a warning|rank 0: bye|");
        assert_string_equal(c.last_words, "rank 0: bye");
        assert_string_equal(chatter_take_banner(&c),
                            "Primary job terminated normally, but 1 process returned a non-zero exit code.");
        assert_null(chatter_take_banner(&c));
    }
}

static void at_the_end_mpirun_is_not_heard(void **state)
{
    (void)state;
    chatter c = {.ending = true};
    shown[0] = '\0';
    feed(&c, "mpirun: killing job...\n[vm:01234] 1 more process has sent help message\nrank 1: told to stop\n[not mpirun] x\n",
         7);
    assert_string_equal(shown, "rank 1: told to stop|[not mpirun] x|");
}

static void lost_host_is_named(void **state)
{
    (void)state;
    for (size_t piece = 1; piece < 300; piece += 13) {
        chatter c = {0};
        char text[2000];
        shown[0] = '\0';
        snprintf(text, sizeof text,
                 "%sORTE has lost communication with a remote daemon.\n\n  HNP daemon   : [[3735,0],0] on node node0\n"
                 "  Remote daemon: [[3735,0],1] on node node1.cluster\n\nThis is usually due to\n%s"
                 "[node0:00041] 1 more process has sent help message help-mpi-btl-tcp.txt / peer hung up\n"
                 "[node0:00041] Set MCA parameter \"orte_base_help_aggregate\" to 0 to see all help / error messages\n",
                 frame, frame);
        feed(&c, text, piece);
        assert_true(c.lost_host);
        assert_string_equal(c.lost_name, "node1.cluster");
        assert_string_equal(shown, "");
    }
    chatter c = {0};
    feed(&c, "Remote daemon: [[3735,0],1] on node node1\n", 50); /* outside of an announcement */
    assert_false(c.lost_host);
}

static void long_lines_are_cut(void **state)
{
    (void)state;
    chatter c = {0};
    shown[0] = '\0';
    for (int i = 0; i < 100; i++)
        feed(&c, "0123456789012345678901234567890123456789", 40);
    feed(&c, "\nnext\x1b[31m\n", 3);
    assert_true(strlen(shown) > 1000 && strlen(shown) < 1100);
    assert_non_null(strstr(shown, "|next [31m|"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"each kind of loss is seen when its time is over, not before", losses_are_seen, NULL, NULL, NULL},
        {"workers that others start may take their time", others_may_take_their_time, NULL, NULL, NULL},
        {"given up at K failures within M minutes, never with K = 0", gives_up_at_the_limit, NULL, NULL, NULL},
        {"the first try again is at once, further ones after growing pauses", pauses_grow, NULL, NULL, NULL},
        {"the set of sequences counts what is in it and what is held", set_is_a_set, NULL, NULL, NULL},
        {"hosts are given ranks: slots in order, the rest evenly", ranks_are_given_out, NULL, NULL, NULL},
        {"a dropped host leaves its ranks to spare slots or to nobody", reduced_to_what_remains, NULL, NULL, NULL},
        {"a hostfile that is not understood is refused, naming the line", bad_hostfiles, NULL, NULL, NULL},
        {"this machine is known by its names and addresses", here_is_here, NULL, NULL, NULL},
        {"sentences of workers are shown, announcements of mpirun condensed", lines_are_sorted, NULL, NULL, NULL},
        {"a host whose daemon mpirun has lost is named", lost_host_is_named, NULL, NULL, NULL},
        {"at the end mpirun's own words are dropped", at_the_end_mpirun_is_not_heard, NULL, NULL, NULL},
        {"long lines are cut, control characters blanked", long_lines_are_cut, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("supervision", tests, NULL, NULL);
}
