/* The journal: what was accepted is there again, whatever happened to the process; tokens are a prefix; a wrong or damaged file
 * is refused with a sentence. */
#include "tests/support.h"

#include "cluster/journal.h"
#include "cluster/journal_store.h"
#include "cluster/journal_writer.h"
#include "proto/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[4096], file[4200];

static int setup(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "%s", support_scratch());
    snprintf(file, sizeof file, "%s/journal.db", folder);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    support_remove(folder);
    return 0;
}

static journal *open_journal(int commit_ms)
{
    journal *j = NULL;
    status st = journal_open(file, commit_ms, &j);
    if (st != STATUS_OK)
        fail_msg("%s", status_message());
    return j;
}

static void assert_refused(status expected, const char *words)
{
    journal *j = NULL;
    assert_int_equal(journal_open(file, 5, &j), expected);
    if (!strstr(status_message(), words))
        fail_msg("'%s' lacks '%s'", status_message(), words);
    assert_non_null(strstr(status_message(), file));
}

/* ---- the model: what must be there. Contents follow from (id, sequence, place), so a prefix can be checked by itself ---- */

enum { MOST_REQUESTS = 4000, SEQUENCES = 2 };

typedef struct {
    bool accepted, forgotten;
    int n[SEQUENCES];
    bool finished[SEQUENCES];
} modelled;

typedef struct {
    modelled requests[MOST_REQUESTS];
    int n;
} model;

static uint32_t record_of(int request, int sequence, int place)
{
    uint64_t state = (uint64_t)request * 1000003 + (uint64_t)sequence * 101 + (uint64_t)place;
    return (uint32_t)support_random(&state);
}

static size_t fill_spec(int request, unsigned char *spec)
{
    uint64_t state = (uint64_t)request * 7919;
    size_t size = (size_t)support_below(&state, 900);
    for (size_t i = 0; i < size; i++)
        spec[i] = (unsigned char)support_random(&state);
    return size;
}

static const char *id_of(int request)
{
    static _Thread_local char id[40];
    snprintf(id, sizeof id, "request-%d", request);
    return id;
}

static status accept_modelled(journal *j, int request)
{
    unsigned char spec[1000];
    return journal_accept(j, id_of(request), spec, fill_spec(request, spec));
}

static void write_tokens(journal *j, int request, int sequence, int first, int n)
{
    uint32_t records[64];
    for (int i = 0; i < n; i++)
        records[i] = record_of(request, sequence, first + i);
    journal_tokens(j, id_of(request), sequence, first, n, records, (size_t)n * sizeof *records);
}

/* ---- what a replay found ---- */

typedef struct {
    model found;
    int last;
    bool finish_seen;
} seen;

static status see_request(void *arg, const char *id, const void *spec, size_t size)
{
    seen *s = arg;
    unsigned char expected[1000];
    int request = atoi(strchr(id, '-') + 1);
    assert_true(request > s->last); /* in order of acceptance: the tests count upwards */
    s->last = request;
    s->finish_seen = false;
    assert_int_equal(size, fill_spec(request, expected));
    assert_memory_equal(spec, expected, size);
    s->found.requests[request].accepted = true;
    s->found.n++;
    return STATUS_OK;
}

static status see_tokens(void *arg, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    seen *s = arg;
    int request = atoi(strchr(id, '-') + 1);
    assert_int_equal(request, s->last);
    assert_false(s->finish_seen);
    assert_int_equal(first, s->found.requests[request].n[sequence]); /* no gap, nothing twice */
    assert_int_equal(size, (size_t)n * 4);
    for (int i = 0; i < n; i++) {
        uint32_t record;
        memcpy(&record, (const char *)records + 4 * i, sizeof record);
        assert_int_equal(record, record_of(request, sequence, first + i));
    }
    s->found.requests[request].n[sequence] += n;
    return STATUS_OK;
}

static status see_finish(void *arg, const char *id, int sequence, const void *how, size_t size)
{
    seen *s = arg;
    int request = atoi(strchr(id, '-') + 1), n;
    assert_int_equal(request, s->last);
    assert_int_equal(size, sizeof n);
    memcpy(&n, how, sizeof n);
    assert_int_equal(n, s->found.requests[request].n[sequence]); /* a finish never stands behind missing tokens */
    s->found.requests[request].finished[sequence] = true;
    s->finish_seen = true;
    return STATUS_OK;
}

static const journal_visitor visitor = {.request = see_request, .tokens = see_tokens, .finish = see_finish};

static seen *replay(journal *j)
{
    seen *s = test_calloc(1, sizeof *s);
    s->last = -1;
    if (journal_replay(j, &visitor, s) != STATUS_OK)
        fail_msg("%s", status_message());
    return s;
}

static void assert_same(const model *expected, const seen *s)
{
    for (int r = 0; r < MOST_REQUESTS; r++) {
        const modelled *e = &expected->requests[r], *f = &s->found.requests[r];
        assert_int_equal(f->accepted, e->accepted && !e->forgotten);
        for (int q = 0; q < SEQUENCES && f->accepted; q++) {
            assert_int_equal(f->n[q], e->n[q]);
            assert_int_equal(f->finished[q], e->finished[q]);
        }
    }
}

/* ---- one random operation; acknowledges to `out` what must hold from now on ---- */

static void random_operation(journal *j, model *m, uint64_t *state, FILE *out)
{
    int request = m->n ? m->n - 1 - support_below(state, m->n < 12 ? m->n : 12) : 0, sequence = support_below(state, SEQUENCES);
    modelled *r = &m->requests[request];
    int what = m->n == 0 ? 0 : support_below(state, 20);
    if (what < 2 && m->n < MOST_REQUESTS) {
        if (accept_modelled(j, m->n) != STATUS_OK)
            fail_msg("%s", status_message());
        if (out)
            fprintf(out, "a%d\n", m->n), fflush(out);
        m->requests[m->n++].accepted = true;
    } else if (what < 17 && !r->forgotten && !r->finished[sequence]) {
        int n = 1 + support_below(state, 6);
        write_tokens(j, request, sequence, r->n[sequence], n);
        r->n[sequence] += n;
    } else if (what == 17 && !r->forgotten && !r->finished[sequence]) {
        journal_finish(j, id_of(request), sequence, &r->n[sequence], sizeof(int));
        r->finished[sequence] = true;
    } else if (what == 18 && !r->forgotten) {
        if (out) /* before: from here on it may be gone */
            fprintf(out, "f%d\n", request), fflush(out);
        journal_forget(j, id_of(request));
        r->forgotten = true;
    }
}

static void memory_keeps_nothing(void **state)
{
    (void)state;
    journal *j = NULL;
    journal_launch launch = {.launch = 3, .isa = "avx2"}, last;
    assert_int_equal(journal_open(NULL, 5, &j), STATUS_OK);
    assert_false(journal_is_durable(j));
    assert_int_equal(accept_modelled(j, 1), STATUS_OK);
    write_tokens(j, 1, 0, 0, 3);
    assert_int_equal(journal_last_launch(j, &last), STATUS_OK);
    assert_int_equal(last.launch, 0);
    journal_note_launch(j, &launch);
    assert_int_equal(journal_last_launch(j, &last), STATUS_OK);
    assert_int_equal(last.launch, 3);
    seen *s = replay(j);
    assert_int_equal(s->found.n, 0);
    assert_string_equal(journal_trouble(j), "");
    test_free(s);
    journal_close(j);
    journal_close(NULL);
}

static void random_operations_survive(void **state)
{
    (void)state;
    model *m = test_calloc(1, sizeof *m);
    uint64_t random = 42;
    for (int round = 0; round < 6; round++) {
        journal *j = open_journal(round % 3 * 4);
        assert_true(journal_is_durable(j));
        seen *s = replay(j);
        assert_same(m, s);
        test_free(s);
        for (int i = 0; i < 400; i++)
            random_operation(j, m, &random, NULL);
        s = replay(j); /* also while it runs: everything queued so far */
        assert_same(m, s);
        test_free(s);
        assert_string_equal(journal_trouble(j), "");
        journal_close(j);
    }
    test_free(m);
}

static void launches_survive(void **state)
{
    (void)state;
    journal_launch last;
    for (uint64_t launch = 1; launch < 4; launch++) {
        journal *j = open_journal(1000);
        assert_int_equal(journal_last_launch(j, &last), STATUS_OK);
        assert_int_equal(last.launch, launch - 1);
        journal_launch now = {.launch = launch, .plan_epoch = launch * 10, .isa = "avx512bf16", .combine = "fixed"};
        journal_note_launch(j, &now);
        journal_close(j);
    }
    journal *j = open_journal(5);
    assert_int_equal(journal_last_launch(j, &last), STATUS_OK);
    assert_int_equal(last.plan_epoch, 30);
    assert_string_equal(last.isa, "avx512bf16");
    assert_string_equal(last.combine, "fixed");
    journal_close(j);
}

/* The child writes until it is killed, and says through a pipe what it may count on. */
static void write_until_killed(int pipe_end, int first_request, uint64_t random)
{
    FILE *out = fdopen(pipe_end, "w");
    model *m = calloc(1, sizeof *m);
    journal *j = NULL;
    if (!out || !m || journal_open(file, 3, &j) != STATUS_OK)
        _exit(1);
    m->n = first_request;
    for (int r = 0; r < first_request; r++)
        m->requests[r] = (modelled){.forgotten = true};
    fprintf(out, "ready\n"), fflush(out);
    while (m->n < MOST_REQUESTS)
        random_operation(j, m, &random, out);
    pause();
}

/* Kills it `after_us` after it is ready; what it said goes into `m` (accepted, perhaps forgotten). */
static void kill_one_writer(model *m, uint64_t random, int after_us)
{
    int ends[2];
    char line[64];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[0]);
        write_until_killed(ends[1], m->n, random);
        _exit(1);
    }
    close(ends[1]);
    FILE *in = fdopen(ends[0], "r");
    if (!fgets(line, sizeof line, in))
        fail_msg("the child could not open the journal");
    usleep((useconds_t)after_us);
    kill(child, SIGKILL);
    while (fgets(line, sizeof line, in) && strchr(line, '\n')) {
        int request = atoi(line + 1);
        if (line[0] == 'a')
            m->requests[request].accepted = true;
        else
            m->requests[request].forgotten = true;
        if (request >= m->n)
            m->n = request + 1;
    }
    fclose(in);
    waitpid(child, NULL, 0);
}

static void killed_writer_loses_nothing_accepted(void **state)
{
    (void)state;
    model *m = test_calloc(1, sizeof *m);
    uint64_t random = 7;
    int tokens = 0;
    for (int round = 0; round < 12; round++) {
        kill_one_writer(m, random + (uint64_t)round, 2000 + support_below(&random, 60000));
        journal *j = open_journal(5);
        seen *s = replay(j); /* checks that tokens are a prefix and a finish is behind all of them */
        for (int r = 0; r < MOST_REQUESTS; r++) {
            const modelled *e = &m->requests[r], *f = &s->found.requests[r];
            if (e->accepted && !e->forgotten)
                assert_true(f->accepted);
            /* One that was accepted right when the kill came may be there without anybody having been told. */
            if (f->accepted)
                m->requests[r].accepted = true, m->n = r >= m->n ? r + 1 : m->n;
            for (int q = 0; q < SEQUENCES; q++)
                tokens += f->n[q];
        }
        test_free(s);
        journal_close(j);
    }
    assert_true(m->n > 12 && tokens > 12);
    test_free(m);
}

typedef struct {
    journal *j;
    int first;
} crowd;

static void *accept_some(void *arg)
{
    const crowd *c = arg;
    for (int i = 0; i < 40; i++) {
        if (accept_modelled(c->j, c->first + i) != STATUS_OK)
            return arg;
        for (int t = 0; t < 5; t++)
            write_tokens(c->j, c->first + i, 0, t, 1);
        if (i & 1)
            journal_forget(c->j, id_of(c->first + i));
        journal_trouble(c->j);
    }
    return NULL;
}

static status count_request(void *arg, const char *id, const void *spec, size_t size)
{
    (void)id, (void)spec, (void)size;
    ++*(int *)arg;
    return STATUS_OK;
}

static status skip_tokens(void *arg, const char *id, int sequence, int first, int n, const void *records, size_t size)
{
    (void)arg, (void)id, (void)sequence, (void)first, (void)n, (void)records, (void)size;
    return STATUS_OK;
}

static status skip_finish(void *arg, const char *id, int sequence, const void *how, size_t size)
{
    (void)arg, (void)id, (void)sequence, (void)how, (void)size;
    return STATUS_OK;
}

static int count_requests(journal *j)
{
    const journal_visitor counter = {.request = count_request, .tokens = skip_tokens, .finish = skip_finish};
    int n = 0;
    assert_int_equal(journal_replay(j, &counter, &n), STATUS_OK);
    return n;
}

static void many_threads(void **state)
{
    (void)state;
    enum { THREADS = 8 };
    pthread_t threads[THREADS];
    crowd crowds[THREADS];
    journal *j = open_journal(2);
    for (int i = 0; i < THREADS; i++) {
        crowds[i] = (crowd){.j = j, .first = i * 100};
        assert_int_equal(pthread_create(&threads[i], NULL, accept_some, &crowds[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    assert_int_equal(count_requests(j), THREADS * 20);
    journal_close(j);
}

static void same_id_twice(void **state)
{
    (void)state;
    journal *j = open_journal(5);
    assert_int_equal(accept_modelled(j, 1), STATUS_OK);
    assert_int_equal(accept_modelled(j, 1), STATUS_BAD_INPUT);
    assert_int_equal(accept_modelled(j, 2), STATUS_OK); /* the others' are not disturbed */
    journal_forget(j, id_of(1));
    assert_int_equal(accept_modelled(j, 1), STATUS_OK); /* the id is free again, in this order */
    assert_int_equal(count_requests(j), 2);
    assert_string_equal(journal_trouble(j), "");
    journal_close(j);
}

static void gap_ends_the_prefix(void **state)
{
    (void)state;
    int n = 9;
    journal *j = open_journal(5);
    assert_int_equal(accept_modelled(j, 1), STATUS_OK);
    write_tokens(j, 1, 0, 0, 3);
    write_tokens(j, 1, 0, 5, 4);
    journal_finish(j, id_of(1), 0, &n, sizeof n);
    seen *s = replay(j);
    assert_int_equal(s->found.requests[1].n[0], 3);
    assert_false(s->found.requests[1].finished[0]);
    test_free(s);
    write_tokens(j, 1, 0, 3, 3); /* computed again: what lay behind the gap is not in the way */
    write_tokens(j, 1, 0, 6, 3);
    journal_finish(j, id_of(1), 0, &n, sizeof n);
    s = replay(j);
    assert_int_equal(s->found.requests[1].n[0], 9);
    assert_true(s->found.requests[1].finished[0]);
    test_free(s);
    journal_close(j);
}

/* ---- whose file is it ---- */

static void one_holder_at_a_time(void **state)
{
    (void)state;
    char words[60];
    journal *j = open_journal(5);
    snprintf(words, sizeof words, "process %d ", getpid());
    assert_refused(STATUS_IO, words);
    assert_int_equal(accept_modelled(j, 1), STATUS_OK); /* the first one is not disturbed */
    journal_close(j);
    journal_close(open_journal(5));
}

static void dead_holder_is_taken_over(void **state)
{
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        journal *j = NULL;
        _exit(journal_open(file, 5, &j) == STATUS_OK && accept_modelled(j, 1) == STATUS_OK ? 0 : 1);
    }
    int how = 0;
    waitpid(child, &how, 0);
    assert_int_equal(how, 0);
    double start = clock_seconds();
    journal *j = open_journal(5);
    assert_true(clock_seconds() - start < 5); /* it can be looked up, so nobody waits for it */
    assert_int_equal(count_requests(j), 1);
    journal_close(j);
}

/* A holder on another machine: only its heartbeat can be seen. */
static void distant_holder(void **state)
{
    (void)state;
    journal_writer *theirs = NULL;
    journal_store *mine = NULL, *later = NULL;
    journal_holder self;
    journal_writer_options options = {
        .path = file, .commit_ms = 5, .queue_bytes = 1 << 20, .beat_seconds = 0.05, .lease_seconds = 1};
    journal_holder_self(&options.self);
    snprintf(options.self.host, sizeof options.self.host, "elsewhere");
    assert_int_equal(journal_writer_open(&options, &theirs), STATUS_OK);
    journal_holder_self(&self);
    assert_int_equal(journal_store_open(file, &self, 5, &mine), STATUS_IO); /* it beats */
    assert_non_null(strstr(status_message(), "elsewhere"));
    journal_writer_close(theirs);

    options.beat_seconds = 1000; /* alive, and not seen to be */
    assert_int_equal(journal_writer_open(&options, &theirs), STATUS_OK);
    assert_int_equal(journal_store_open(file, &self, 0.3, &mine), STATUS_OK);
    assert_int_equal(journal_writer_accept(theirs, "late", "x", 1), STATUS_IO); /* it has lost, and writes no more */
    assert_non_null(strstr(status_message(), "taken it over"));
    assert_true(strlen(journal_writer_trouble(theirs)) > 0);
    journal_writer_close(theirs);
    journal_store_close(mine);
    assert_int_equal(journal_store_open(file, &self, 0, &later), STATUS_OK); /* given back: nobody waits */
    journal_store_close(later);
}

static void write_file(const void *bytes, size_t size)
{
    FILE *f = fopen(file, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

static void patch(long at, const void *bytes, size_t size)
{
    FILE *f = fopen(file, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

static void wrong_files_are_refused(void **state)
{
    (void)state;
    char text[5000];
    memset(text, 'x', sizeof text);
    write_file(text, sizeof text);
    assert_refused(STATUS_BAD_INPUT, "not a journal");
    struct stat found;
    assert_int_equal(stat(file, &found), 0);
    assert_int_equal(found.st_size, sizeof text); /* and left as it was */
    unlink(file);
    journal_close(open_journal(5));
    patch(68, "ABCD", 4); /* application id, in SQLite's file header */
    assert_refused(STATUS_BAD_INPUT, "another program");
    patch(68, "CNVJ", 4);
    patch(60, "\0\0\0\7", 4); /* version */
    assert_refused(STATUS_UNSUPPORTED, "version 7");
    unlink(file);
    assert_int_equal(mkdir(file, 0700), 0);
    journal *j = NULL;
    assert_int_equal(journal_open(file, 5, &j), STATUS_IO);
    rmdir(file);
    snprintf(file, sizeof file, "%.4000s/missing/journal.db", folder);
    assert_refused(STATUS_IO, "cannot be opened");
}

static void journal_is_private(void **state)
{
    (void)state;
    struct stat found;
    journal *j = open_journal(5);
    assert_int_equal(stat(file, &found), 0);
    assert_int_equal(found.st_mode & 0777, 0600);
    journal_close(j);
}

static void fill_journal(int requests)
{
    journal *j = open_journal(5);
    for (int i = 0; i < requests; i++) {
        assert_int_equal(accept_modelled(j, i), STATUS_OK);
        write_tokens(j, i, 0, 0, 60);
    }
    journal_close(j);
}

static void damaged_pages_are_refused(void **state)
{
    (void)state;
    char garbage[2048];
    memset(garbage, 0xa5, sizeof garbage);
    fill_journal(60);
    patch(4096 * 3, garbage, sizeof garbage);
    assert_refused(STATUS_BAD_INPUT, "damaged");
}

/* Wherever bytes are wrong: a sentence or an answer, never a crash and never a gap. */
static void random_damage_is_survived(void **state)
{
    (void)state;
    uint64_t random = 99;
    int refused = 0;
    for (int round = 0; round < 40; round++) {
        fill_journal(12);
        struct stat found;
        assert_int_equal(stat(file, &found), 0);
        if (round % 4 == 0) {
            assert_int_equal(truncate(file, support_below(&random, (int)found.st_size)), 0);
        } else {
            for (int i = 0; i < 12; i++) {
                unsigned char byte = (unsigned char)support_random(&random);
                patch(support_below(&random, (int)found.st_size), &byte, 1);
            }
        }
        journal *j = NULL;
        const journal_visitor counter = {.request = count_request, .tokens = skip_tokens, .finish = skip_finish};
        int n = 0;
        status st = journal_open(file, 5, &j);
        if (st == STATUS_OK)
            st = journal_replay(j, &counter, &n);
        if (st != STATUS_OK)
            assert_true(strlen(status_message()) > 10);
        refused += st != STATUS_OK;
        journal_close(j);
        char side[4300];
        unlink(file);
        snprintf(side, sizeof side, "%s-wal", file);
        unlink(side);
        snprintf(side, sizeof side, "%s-shm", file);
        unlink(side);
    }
    assert_true(refused > 0);
}

/* ---- the disk ---- */

static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes == 0 ? limit.rlim_max : bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

/* A limit on file size stands in for a full disk: writes fail, and succeed again later. */
static void full_disk_is_said_once_and_survived(void **state)
{
    (void)state;
    signal(SIGXFSZ, SIG_IGN);
    journal *j = open_journal(1);
    assert_int_equal(accept_modelled(j, 1), STATUS_OK);
    write_tokens(j, 1, 0, 0, 5);
    assert_int_equal(accept_modelled(j, 2), STATUS_OK);
    write_tokens(j, 2, 0, 0, 1);
    assert_int_equal(count_requests(j), 2); /* on disk */
    limit_files(4096);
    write_tokens(j, 1, 0, 5, 5);
    assert_int_equal(accept_modelled(j, 3), STATUS_IO); /* nobody is promised anything */
    assert_true(strlen(journal_trouble(j)) > 0);
    assert_int_equal(accept_modelled(j, 3), STATUS_IO);
    assert_string_equal(journal_trouble(j), ""); /* said once */
    journal_forget(j, id_of(2));
    assert_int_equal(accept_modelled(j, 3), STATUS_IO);
    limit_files(0);
    assert_int_equal(accept_modelled(j, 4), STATUS_OK);
    write_tokens(j, 1, 0, 10, 5); /* behind a lost piece: left out */
    write_tokens(j, 4, 0, 0, 5);
    int n = 15;
    journal_finish(j, id_of(1), 0, &n, sizeof n);
    seen *s = replay(j);
    assert_int_equal(s->found.requests[1].n[0], 5);
    assert_false(s->found.requests[1].finished[0]);
    assert_false(s->found.requests[2].accepted); /* forgotten meanwhile, and that was not lost */
    assert_false(s->found.requests[3].accepted);
    assert_int_equal(s->found.requests[4].n[0], 5);
    test_free(s);
    journal_close(j);
}

static void slow_disk_loses_only_a_tail(void **state)
{
    (void)state;
    journal_writer *w = NULL;
    journal_writer_options options = {
        .path = file, .commit_ms = 100000, .queue_bytes = 600, .beat_seconds = 1000, .lease_seconds = 1};
    journal_holder_self(&options.self);
    assert_int_equal(journal_writer_open(&options, &w), STATUS_OK);
    unsigned char spec[1000];
    assert_int_equal(journal_writer_accept(w, id_of(1), spec, fill_spec(1, spec)), STATUS_OK);
    for (int i = 0; i < 30; i++) {
        uint32_t record = record_of(1, 0, i);
        journal_writer_tokens(w, id_of(1), 0, i, 1, &record, sizeof record);
    }
    assert_non_null(strstr(journal_writer_trouble(w), "does not keep up"));
    seen *s = test_calloc(1, sizeof *s);
    s->last = -1;
    assert_int_equal(journal_writer_replay(w, &visitor, s), STATUS_OK);
    assert_true(s->found.requests[1].accepted && s->found.requests[1].n[0] < 30);
    test_free(s);
    journal_writer_close(w);
}

static void forgotten_space_is_given_back(void **state)
{
    (void)state;
    enum { REQUESTS = 40, SPEC = 400000 };
    char *spec = test_calloc(1, SPEC);
    struct stat full, after;
    journal *j = open_journal(1);
    for (int i = 0; i < REQUESTS; i++)
        assert_int_equal(journal_accept(j, id_of(i), spec, SPEC), STATUS_OK);
    journal_close(j);
    assert_int_equal(stat(file, &full), 0);
    assert_true(full.st_size > (off_t)REQUESTS * SPEC);
    j = open_journal(1);
    for (int i = 0; i < REQUESTS; i++) {
        journal_forget(j, id_of(i));
        usleep(3000);
    }
    assert_int_equal(count_requests(j), 0);
    journal_close(j);
    assert_int_equal(stat(file, &after), 0);
    assert_true(after.st_size < full.st_size / 2);
    test_free(spec);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"in memory: every call succeeds and nothing is kept", memory_keeps_nothing, setup, teardown, NULL},
        {"random operations: a replay gives back everything, in order, also after reopening", random_operations_survive, setup,
         teardown, NULL},
        {"the last launch noted is known after reopening", launches_survive, setup, teardown, NULL},
        {"a writer killed at any moment: everything accepted is there, tokens are a prefix, finishes are whole",
         killed_writer_loses_nothing_accepted, setup, teardown, NULL},
        {"many threads accept, write and forget at once", many_threads, setup, teardown, NULL},
        {"an id that is there already is refused alone; forgotten, it is free again", same_id_twice, setup, teardown, NULL},
        {"a gap ends a sequence's prefix, and what lay behind it does not come back", gap_ends_the_prefix, setup, teardown, NULL},
        {"a second coordinator is refused while the first lives", one_holder_at_a_time, setup, teardown, NULL},
        {"a dead coordinator's journal is taken over at once", dead_holder_is_taken_over, setup, teardown, NULL},
        {"a holder out of sight is believed while it beats, taken over when silent, and then writes no more", distant_holder,
         setup, teardown, NULL},
        {"another program's file, a newer version, a folder: refused by a sentence and left alone", wrong_files_are_refused,
         setup, teardown, NULL},
        {"only its owner can read a journal", journal_is_private, setup, teardown, NULL},
        {"a damaged page is found when the journal is opened", damaged_pages_are_refused, setup, teardown, NULL},
        {"random damage: a sentence or an answer, never a crash", random_damage_is_survived, setup, teardown, NULL},
        {"a full disk: said once, serving goes on, and nothing is half kept", full_disk_is_said_once_and_survived, setup,
         teardown, NULL},
        {"a disk that does not keep up costs a request its tail, nothing else", slow_disk_loses_only_a_tail, setup, teardown,
         NULL},
        {"space of forgotten requests goes back to the system", forgotten_space_is_given_back, setup, teardown, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
