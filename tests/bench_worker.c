/* bench_worker.c - what the control path costs: CPU of an idle job, and the way from Submit to the first token's Report.
 *
 *   bench_worker [--model DIR] [--ranks N] [--seconds S] [--requests R] [--nodes K]
 *
 * Idle CPU is the run time of all threads of all ranks (schedstat) over S seconds. For the way, one sequence at a time is sent to
 * an idle job: its time from send() to the Report with its first token, less the seconds that the step itself took by the
 * leader's clock (Report.step_seconds), is what coordinator socket, inbox, wake-up and report add. */
#include "tests/fake_control.h"
#include "tests/support.h"
#include "tests/support_bench.h"

#include "proto/clock.h"
#include "proto/options.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    const char *model;
    int64_t ranks, requests, ranks_per_node, prompt;
    double seconds;
} command_line;

static status parse(int argc, char **argv, command_line *c, options_wish *wish)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &c->model, .argument = "DIR", .help = "checkpoint folder (default: the bundled model)"},
        {"ranks", OPTION_INT, &c->ranks, .fallback = "2", .min = 1, .max = FAKE_MAX_RANKS, .help = "ranks"},
        {"ranks-per-node", OPTION_INT, &c->ranks_per_node, .fallback = "0", .help = "pretended nodes"},
        {"seconds", OPTION_DOUBLE, &c->seconds, .fallback = "10", .help = "how long to look at the idle job"},
        {"requests", OPTION_INT, &c->requests, .fallback = "300", .min = 1, .max = 100000, .help = "sequences, one at a time"},
        {"prompt", OPTION_INT, &c->prompt, .fallback = "16", .min = 1, .max = 512, .help = "tokens of each prompt"},
    };
    const option_table table = {.name = "bench_worker",
                                .summary = "What the control path costs.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    TRY(options_parse(&table, argc, argv, wish, NULL, NULL));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

static double cpu_seconds(const fake_control *f)
{
    unsigned long long total = 0;
    for (int r = 0; r < f->n_ranks; r++) {
        char path[600];
        snprintf(path, sizeof path, "/proc/%d/task", (int)f->pids[r]);
        DIR *tasks = opendir(path);
        for (struct dirent *t; tasks && (t = readdir(tasks));) {
            unsigned long long ran = 0;
            snprintf(path, sizeof path, "/proc/%d/task/%.20s/schedstat", (int)f->pids[r], t->d_name);
            FILE *file = t->d_name[0] == '.' ? NULL : fopen(path, "r");
            if (file && fscanf(file, "%llu", &ran) == 1)
                total += ran;
            if (file)
                fclose(file);
        }
        if (tasks)
            closedir(tasks);
    }
    return (double)total * 1e-9;
}

static void measure_idle(fake_control *f, double seconds)
{
    double before = cpu_seconds(f), start = clock_seconds(), until = start + seconds;
    while (clock_seconds() < until) { /* read the beats away, so that they cost what they cost */
        Convoke__Control__ToCoordinator *m = fake_control_receive(f, 5);
        fake_control_free(m);
    }
    double took = clock_seconds() - start;
    printf("idle: %.2f %% of one core by %d ranks over %.1f s\n", 100 * (cpu_seconds(f) - before) / took, f->n_ranks, took);
}

static void submit(fake_control *f, uint64_t id, int n_prompt)
{
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT;
    Convoke__Control__Submit submit_message = CONVOKE__CONTROL__SUBMIT__INIT;
    Convoke__Control__Sequence q = CONVOKE__CONTROL__SEQUENCE__INIT, *list = &q;
    int32_t tokens[512];
    for (int i = 0; i < n_prompt; i++)
        tokens[i] = (int32_t)((id * 31 + (uint64_t)i * 7) % 200) + 1;
    q.id = id;
    q.tokens = tokens;
    q.n_tokens = (size_t)n_prompt;
    q.max_new = 1;
    q.owner = -1;
    q.ignore_eos = q.bypass_prefix_cache = true;
    submit_message.launch = FAKE_LAUNCH;
    submit_message.n_sequences = 1;
    submit_message.sequences = &list;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT;
    m.submit = &submit_message;
    fake_control_send(f, &m);
}

/* Seconds until the Report that ends the sequence; *step is what its steps took. */
static double one_request(fake_control *f, uint64_t id, int n_prompt, double *step)
{
    double start = clock_seconds();
    bool finished = false;
    *step = 0;
    submit(f, id, n_prompt);
    while (!finished) {
        Convoke__Control__ToCoordinator *m = fake_control_hear(f, 60);
        *step += m->report->step_seconds;
        for (size_t i = 0; i < m->report->n_events; i++)
            finished |= m->report->events[i]->kind == CONVOKE__CONTROL__EVENT_KIND__FINISHED;
        fake_control_free(m);
    }
    return clock_seconds() - start;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void measure_way(fake_control *f, int n, int n_prompt)
{
    double *whole = calloc((size_t)n, sizeof *whole), *added = calloc((size_t)n, sizeof *added), step;
    for (int i = -20; i < n; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL); /* long enough for all to fall asleep */
        double took = one_request(f, (uint64_t)(i + 21), n_prompt, &step);
        if (i >= 0) {
            whole[i] = took;
            added[i] = took - step;
        }
    }
    qsort(whole, (size_t)n, sizeof *whole, by_value);
    qsort(added, (size_t)n, sizeof *added, by_value);
    printf("first token of %d prompt tokens: %.0f us p50; control path adds %.0f us p50, %.0f us p90, %.0f us p99\n", n_prompt,
           1e6 * whole[n / 2], 1e6 * added[n / 2], 1e6 * added[n * 9 / 10], 1e6 * added[n * 99 / 100]);
    free(whole);
    free(added);
}

int main(int argc, char **argv)
{
    command_line c = {0};
    options_wish wish = OPTIONS_RUN;
    status st = parse(argc, argv, &c, &wish);
    if (st != STATUS_OK || wish != OPTIONS_RUN) {
        if (st != STATUS_OK)
            fprintf(stderr, "bench_worker: %s\n", status_message());
        return status_exit_code(st);
    }
    char bundled[4096], extra[64];
    fake_control f;
    snprintf(bundled, sizeof bundled, "%s", support_source("deploy/models/convoke-demo"));
    snprintf(extra, sizeof extra, "--ranks-per-node %d", (int)c.ranks_per_node);
    fake_control_open(&f, c.model ? c.model : bundled);
    fake_control_free(fake_control_serve(&f, (int)c.ranks, extra));
    measure_idle(&f, c.seconds);
    measure_way(&f, (int)c.requests, (int)c.prompt);
    fake_control_send_stop(&f);
    fake_control_await_end(&f, 10);
    fake_control_close(&f);
    return 0;
}
