/* bench_serving_engine - the step loop under a serving load, without door and control.
 *
 *     bench_serving_engine --model DIR [--threads T] [--rounds R] [--streams N] [--prompt P] [--only gap|prefix]
 *     tests/run_mpi.sh 2 bench_serving_engine --model DIR --threads 1
 *
 * gap: N streams decode. For a while nothing else happens (undisturbed), then a prompt of P tokens comes in. Of the time between
 * a stream's tokens: the 99th percentile over all streams while that prompt is prefilled, over the undisturbed one; of the
 * prompt: its time to first token over the one it has on an idle machine. Goals: at most 2 and at most 3.
 *
 * prefix: two requests that share their first 1,000 tokens, 20 more of their own: the second's time to first token over the
 * first's. Goal: at most 0.1.
 *
 * Every round measures all forms in turn; ratios are of one round, medians over rounds. */
#include "tests/support_bench.h"

#include "proto/clock.h"
#include "proto/log.h"
#include "proto/options.h"
#include "worker/runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_STREAMS = 256,
    MOST_GAPS = 1 << 20,
    MOST_ROUNDS = 64,
    SHARED = 1000,
    OWN = 20,
    STREAM_PROMPT = 16,
    QUIET_STEPS = 60,
    LONG_ID = 1000
};

typedef struct {
    const char *model, *only;
    int64_t threads, rounds, streams, prompt, step_us;
    bool steps;
} bench_options;

static bench_options options;

typedef struct {
    engine *engine;
    int vocab;
    uint64_t random;
    double last[MOST_STREAMS]; /* when its last token came; 0: none yet */
    int n_started;
    bool keep;
    double *gaps; /* [MOST_GAPS] while keep */
    int n_gaps;
    double first_token; /* of LONG_ID */
    bool long_finished;
} load;

static void listen_event(void *arg, const engine_event *e)
{
    load *l = arg;
    double now = clock_seconds();
    if (e->id == LONG_ID) {
        l->first_token = e->kind == ENGINE_EVENT_TOKEN && l->first_token == 0 ? now : l->first_token;
        l->long_finished |= e->kind == ENGINE_EVENT_FINISHED;
    } else if (e->kind == ENGINE_EVENT_TOKEN) {
        l->n_started += l->last[e->id] == 0;
        if (l->keep && l->last[e->id] > 0 && l->n_gaps < MOST_GAPS)
            l->gaps[l->n_gaps++] = now - l->last[e->id];
        l->last[e->id] = now;
    }
}

static void fill_random(load *l, int32_t *tokens, int n)
{
    for (int i = 0; i < n; i++) {
        l->random = l->random * 6364136223846793005u + 1442695040888963407u;
        tokens[i] = (int32_t)((l->random >> 33) % (uint64_t)l->vocab);
    }
}

static status submit(load *l, uint64_t id, const int32_t *prompt, int n, int max_new)
{
    engine_request r = {.id = id,
                        .prompt = prompt,
                        .n_prompt = n,
                        .max_new = max_new,
                        .sampling = {.temperature = 1, .seed = id},
                        .want = ENGINE_IGNORE_EOS,
                        .owner = -1};
    return engine_submit(l->engine, &r);
}

/* Time to the first token of a prompt, with whatever else runs. */
static status time_first_token(load *l, const int32_t *prompt, int n, double *seconds)
{
    l->first_token = 0;
    l->long_finished = false;
    double start = clock_seconds();
    TRY(submit(l, LONG_ID, prompt, n, 2));
    while (l->first_token == 0) {
        TRY(engine_step(l->engine));
        engine_counters c;
        engine_get_counters(l->engine, &c);
        if (options.steps)
            printf("  %3d decode + %3d prompt rows: %.1f ms\n", c.last_decode_rows, c.last_prefill_rows, 1e3 * c.last_seconds);
    }
    *seconds = l->first_token - start;
    return STATUS_OK;
}

static status finish_all(load *l)
{
    for (uint64_t id = 0; id <= LONG_ID; id++)
        TRY(engine_cancel(l->engine, id));
    while (engine_busy(l->engine))
        TRY(engine_step(l->engine));
    return engine_clear_prefix_cache(l->engine);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(load *l, double share)
{
    if (l->n_gaps == 0)
        return 0;
    qsort(l->gaps, (size_t)l->n_gaps, sizeof *l->gaps, by_value);
    int at = (int)(share * l->n_gaps);
    return l->gaps[at < l->n_gaps ? at : l->n_gaps - 1];
}

static status start_streams(load *l)
{
    int32_t prompt[STREAM_PROMPT];
    memset(l->last, 0, sizeof l->last);
    l->n_started = 0;
    for (int64_t i = 0; i < options.streams; i++) {
        fill_random(l, prompt, STREAM_PROMPT);
        TRY(submit(l, (uint64_t)i, prompt, STREAM_PROMPT, 1000));
    }
    while (l->n_started < options.streams)
        TRY(engine_step(l->engine));
    for (int i = 0; i < 3; i++)
        TRY(engine_step(l->engine));
    return STATUS_OK;
}

typedef struct {
    double quiet_p50, quiet_p99, busy_p50, busy_p99, idle_first, busy_first;
} gap_round;

static status measure_gaps(load *l, gap_round *out)
{
    int n = (int)options.prompt;
    int32_t *prompt = malloc((size_t)n * sizeof *prompt);
    status st = prompt ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for a prompt");
    TRY_GOTO(st, out);
    fill_random(l, prompt, n);
    TRY_GOTO(time_first_token(l, prompt, n, &out->idle_first), out);
    TRY_GOTO(finish_all(l), out);
    TRY_GOTO(start_streams(l), out);
    l->keep = true;
    l->n_gaps = 0;
    for (int i = 0; i < QUIET_STEPS; i++)
        TRY_GOTO(engine_step(l->engine), out);
    out->quiet_p99 = percentile(l, 0.99);
    out->quiet_p50 = percentile(l, 0.5);
    l->n_gaps = 0;
    fill_random(l, prompt, n);
    TRY_GOTO(time_first_token(l, prompt, n, &out->busy_first), out);
    l->keep = false;
    out->busy_p99 = percentile(l, 0.99);
    out->busy_p50 = percentile(l, 0.5);
    st = finish_all(l);
out:
    free(prompt);
    return st;
}

static status bench_gaps(load *l)
{
    double gap[MOST_ROUNDS], first[MOST_ROUNDS];
    for (int64_t i = 0; i < options.rounds; i++) {
        gap_round r = {0};
        TRY(measure_gaps(l, &r));
        gap[i] = r.busy_p99 / r.quiet_p99;
        first[i] = r.busy_first / r.idle_first;
        printf(
            "gap, %d streams: undisturbed p50 %.1f p99 %.1f ms, beside a prompt of %d p50 %.1f p99 %.1f ms: %.2fx; first token "
            "idle %.2f s, then %.2f s: %.2fx\n",
            (int)options.streams, 1e3 * r.quiet_p50, 1e3 * r.quiet_p99, (int)options.prompt, 1e3 * r.busy_p50, 1e3 * r.busy_p99,
            gap[i], r.idle_first, r.busy_first, first[i]);
        fflush(stdout);
    }
    printf("gap, medians: p99 %.2fx (goal 2), first token %.2fx (goal 3)\n", bench_median(gap, (int)options.rounds),
           bench_median(first, (int)options.rounds));
    return STATUS_OK;
}

static status bench_prefix(load *l)
{
    int32_t prompt[SHARED + OWN];
    double ratio[MOST_ROUNDS];
    for (int64_t i = 0; i < options.rounds; i++) {
        double first, second;
        fill_random(l, prompt, SHARED + OWN);
        TRY(time_first_token(l, prompt, SHARED + OWN, &first));
        fill_random(l, prompt + SHARED, OWN);
        while (!l->long_finished)
            TRY(engine_step(l->engine));
        TRY(time_first_token(l, prompt, SHARED + OWN, &second));
        TRY(finish_all(l));
        ratio[i] = second / first;
        printf("prefix of %d: first token %.0f ms, then %.0f ms: %.3fx\n", SHARED, 1e3 * first, 1e3 * second, ratio[i]);
        fflush(stdout);
    }
    printf("prefix, median: %.3fx (goal 0.1)\n", bench_median(ratio, (int)options.rounds));
    return STATUS_OK;
}

static bool wants(const char *what)
{
    return !options.only || strcmp(options.only, what) == 0;
}

/* Pages come in, buffers grow. */
static status warm_up(load *l)
{
    int32_t prompt[512];
    double seconds;
    fill_random(l, prompt, 512);
    TRY(time_first_token(l, prompt, 512, &seconds));
    TRY(start_streams(l));
    return finish_all(l);
}

static status lead(load *l)
{
    TRY(warm_up(l));
    if (wants("gap"))
        TRY(bench_gaps(l));
    if (wants("prefix"))
        TRY(bench_prefix(l));
    return engine_stop(l->engine);
}

static status measure(group *g)
{
    static const char *const domain = "none";
    static load l = {.random = 42};
    runtime_options o = {.model_dir = options.model,
                         .threads = (int)options.threads,
                         .combine = COMBINE_FIXED,
                         .limits = {.max_sequences = (int)options.streams + 2 * group_size(g),
                                    .chunk = 512,
                                    .step_seconds = (double)options.step_us * 1e-6,
                                    .prefix_cache = true,
                                    .n_domains = 1,
                                    .domains = &domain,
                                    .max_length = (int)options.prompt + 1100}};
    runtime *r = NULL;
    l.gaps = calloc(MOST_GAPS, sizeof *l.gaps);
    if (!l.gaps)
        return status_fail(STATUS_NO_MEMORY, "no memory for times");
    TRY(runtime_create(g, &o, listen_event, &l, &r));
    l.engine = runtime_engine(r);
    l.vocab = runtime_config(r)->vocab;
    TRY(group_rank(g) == 0 ? lead(&l) : engine_follow(l.engine));
    runtime_destroy(r);
    free(l.gaps);
    return STATUS_OK;
}

int main(int argc, char **argv)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &options.model, .argument = "DIR", .required = true, .help = "checkpoint folder"},
        {"threads", OPTION_INT, &options.threads, .fallback = "2", .min = 1, .max = 1024, .help = "threads per rank"},
        {"rounds", OPTION_INT, &options.rounds, .fallback = "5", .min = 1, .max = MOST_ROUNDS, .help = "rounds"},
        {"streams", OPTION_INT, &options.streams, .fallback = "16", .min = 1, .max = MOST_STREAMS, .help = "decoding streams"},
        {"prompt", OPTION_INT, &options.prompt, .fallback = "2000", .min = 1, .max = 1 << 20,
         .help = "tokens of the long prompt"},
        {"step-us", OPTION_INT, &options.step_us, .fallback = "0", .max = 1 << 30,
         .help = "time budget of a step in microseconds (0: by measurement)"},
        {"only", OPTION_STRING, &options.only, .argument = "gap|prefix", .help = "one figure"},
        {"steps", OPTION_FLAG, &options.steps, .help = "print every step beside the long prompt"},
    };
    const option_table table = {.name = "bench_serving_engine",
                                .summary = "Measures gaps between tokens beside a long prompt, and the prefix cache.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    options_wish wish;
    group *g = NULL;
    status st = options_parse(&table, argc, argv, &wish, NULL, NULL);
    if (st == STATUS_OK && wish != OPTIONS_RUN) {
        options_print(&table, wish, stdout);
        return 0;
    }
    if (st == STATUS_OK)
        st = group_create(&argc, &argv, 0, &g);
    if (st == STATUS_OK)
        st = measure(g);
    if (st != STATUS_OK) {
        log_line("%s", status_message());
        if (g)
            group_abort(g, 1);
        return status_exit_code(st);
    }
    group_destroy(g);
    return 0;
}
