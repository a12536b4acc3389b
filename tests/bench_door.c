/* bench_door - what clients of a running server see. One figure group per run:
 *
 *     bench_door --connect HOST:PORT throughput|ttft|gap|prefix|recovery|idle [--json]
 *
 * throughput  N streams at once: tokens/s while all N decode (from the moment the last one has its first token to the moment the
 *             first one has its last), tokens/s of the whole, time to first token, time between tokens
 * ttft        requests one after another on an idle server: time from the call to its first token; with --http also how much of
 *             it is not the model's own: of each request, its time less the seconds that the workers' steps took meanwhile by the
 *             leader's clock (convoke_step_seconds_sum of /metrics, read before and after)
 * gap         N streams decode; meanwhile a long prompt comes: time between tokens before and while it is prefilled, and that
 *             prompt's own time to first token, alone and among the streams
 * prefix      two prompts with the same beginning, one after the other: the second's time to first token over the first's
 * recovery    N streams at temperature 1; a worker is killed with SIGKILL: the longest pause of any stream, and whether all
 * tokens are those of an undisturbed run idle        CPU time of the server and all its descendants, in percent of one core
 *
 * Prompts are random token ids, different in every request unless said otherwise; the end of text is ignored. */
#include "cluster/rpc_client.h"
#include "proto/clock.h"
#include "proto/control.h"
#include "proto/log.h"
#include "proto/options.h"
#include "proto/vllm.pb-c.h"

#include <dirent.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_STREAMS = 256, MOST_FIGURES = 64, MOST_PROCESSES = 4096 };
#define CALL_SECONDS 600.0

static struct {
    const char *connect, *http, *kind;
    int64_t streams, prompt, tokens, rounds, vocab, server_pid;
    double seconds;
    bool json;
} options;
static rpc_client *client;
static uint64_t random_state = 20240601;

/* ---- figures ---- */

static struct {
    char name[80];
    const char *unit;
    double value;
} figures[MOST_FIGURES];
static int n_figures;

static void figure(const char *name, double value, const char *unit)
{
    if (n_figures == MOST_FIGURES)
        return;
    snprintf(figures[n_figures].name, sizeof figures[0].name, "%s", name);
    figures[n_figures].unit = unit;
    figures[n_figures++].value = value;
}

static void print_figures(void)
{
    for (int i = 0; i < n_figures; i++)
        if (options.json)
            printf("%s\"%s\": %.9g", i == 0 ? "{" : ", ", figures[i].name, figures[i].value);
        else
            printf("%-46s %12.5g %s\n", figures[i].name, figures[i].value, figures[i].unit);
    if (options.json)
        printf("}\n");
}

typedef struct {
    double *values;
    size_t n, room;
} samples;

static void add(samples *s, double value)
{
    if (s->n == s->room) {
        size_t room = s->room ? 2 * s->room : 1024;
        double *wider = realloc(s->values, room * sizeof *wider);
        if (!wider)
            return;
        s->values = wider;
        s->room = room;
    }
    s->values[s->n++] = value;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The smallest value that at least `share` of all do not exceed. */
static double percentile(samples *s, double share)
{
    if (s->n == 0)
        return 0;
    qsort(s->values, s->n, sizeof *s->values, by_value);
    size_t at = (size_t)(share * (double)s->n);
    return s->values[at < s->n ? at : s->n - 1];
}

static double median(samples *s)
{
    return percentile(s, 0.5);
}

/* ---- one request ---- */

typedef struct {
    /* asked */
    uint32_t *prompt;
    int n_prompt, n_tokens;
    int64_t seed;
    float temperature;
    bool bypass_prefix_cache;
    /* found */
    double start, first, last;
    double *arrived; /* [n_tokens] when each token came */
    uint32_t *ids;   /* [n_tokens] */
    _Atomic int n_arrived;
    rpc_end end;
    pthread_t thread;
} asked;

static uint32_t random_id(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % (uint64_t)options.vocab);
}

static asked *make_request(int n_prompt, int n_tokens)
{
    asked *a = calloc(1, sizeof *a);
    a->prompt = calloc((size_t)n_prompt, sizeof *a->prompt);
    a->arrived = calloc((size_t)n_tokens, sizeof *a->arrived);
    a->ids = calloc((size_t)n_tokens, sizeof *a->ids);
    a->n_prompt = n_prompt;
    a->n_tokens = n_tokens;
    a->bypass_prefix_cache = true;
    for (int i = 0; i < n_prompt; i++)
        a->prompt[i] = random_id();
    return a;
}

static void free_request(asked *a)
{
    free(a->prompt);
    free(a->arrived);
    free(a->ids);
    free(a);
}

static rpc_stream *start_call(const asked *a)
{
    Vllm__TokenIds ids = VLLM__TOKEN_IDS__INIT;
    Vllm__RandomSampling sampling = VLLM__RANDOM_SAMPLING__INIT;
    Vllm__StoppingCriteria stopping = VLLM__STOPPING_CRITERIA__INIT;
    Vllm__ResponseOptions response = VLLM__RESPONSE_OPTIONS__INIT;
    Vllm__KVCacheParameters kv = VLLM__KVCACHE_PARAMETERS__INIT;
    Vllm__GenerateRequest r = VLLM__GENERATE_REQUEST__INIT;
    rpc_stream *stream = NULL;
    ids.ids = a->prompt;
    ids.n_ids = (size_t)a->n_prompt;
    sampling._seed_case = VLLM__RANDOM_SAMPLING___SEED_SEED;
    sampling.seed = a->seed;
    sampling.top_p = 1;
    stopping.max_new_tokens = (uint32_t)a->n_tokens;
    stopping.ignore_eos = true;
    response.output_token_ids = true;
    response._output_text_case = VLLM__RESPONSE_OPTIONS___OUTPUT_TEXT_OUTPUT_TEXT;
    response.output_text = false; /* a random checkpoint has no tokenizer */
    kv.bypass_prefix_cache = a->bypass_prefix_cache;
    r.request_id = (char *)"";
    r.prompt_case = VLLM__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    r.token_ids = &ids;
    r._temperature_case = VLLM__GENERATE_REQUEST___TEMPERATURE_TEMPERATURE;
    r.temperature = a->temperature;
    r.sampling = &sampling;
    r.stopping = &stopping;
    r.response = &response;
    r.kv = &kv;
    return rpc_stream_start(client, "/vllm.Inference/GenerateStream", &r.base, CALL_SECONDS, &stream) == STATUS_OK ? stream
                                                                                                                   : NULL;
}

static void take_tokens(asked *a, const Vllm__SequenceOutput *o, double now)
{
    int n = atomic_load(&a->n_arrived);
    for (size_t i = 0; i < o->n_token_ids && n < a->n_tokens; i++, n++) {
        a->arrived[n] = now;
        a->ids[n] = o->token_ids[i];
    }
    if (n > 0 && a->first == 0)
        a->first = now;
    a->last = now;
    atomic_store(&a->n_arrived, n);
}

static void *run_request(void *arg)
{
    asked *a = arg;
    ProtobufCMessage *message = NULL;
    a->start = clock_seconds();
    rpc_stream *stream = start_call(a);
    if (!stream) {
        a->end.code = -1;
        return NULL;
    }
    for (;;) {
        rpc_event event = rpc_stream_next(stream, CALL_SECONDS, &vllm__generate_response__descriptor, &message);
        if (event != RPC_MESSAGE)
            break;
        const Vllm__GenerateResponse *r = (const Vllm__GenerateResponse *)message;
        if (r->outputs && r->outputs->n_token_ids > 0)
            take_tokens(a, r->outputs, clock_seconds());
        protobuf_c_message_free_unpacked(message, NULL);
    }
    a->end = *rpc_stream_end(stream);
    rpc_stream_close(stream);
    return NULL;
}

static void start_request(asked *a)
{
    if (pthread_create(&a->thread, NULL, run_request, a) != 0)
        exit(1);
}

static status finish_request(asked *a)
{
    pthread_join(a->thread, NULL);
    if (a->end.code != RPC_ENDED_OK)
        return status_fail(STATUS_IO, "a request ended with %s: %s", rpc_code_word(a->end.code), a->end.sentence);
    if (a->n_arrived != a->n_tokens)
        return status_fail(STATUS_BAD_INPUT, "a request got %d of %d tokens", a->n_arrived, a->n_tokens);
    return STATUS_OK;
}

static status run_alone(asked *a)
{
    run_request(a);
    a->thread = 0;
    if (a->end.code != RPC_ENDED_OK)
        return status_fail(STATUS_IO, "a request ended with %s: %s", rpc_code_word(a->end.code), a->end.sentence);
    return STATUS_OK;
}

/* Times between messages with tokens that end within [from, to]. */
static void add_gaps(const asked *a, double from, double to, samples *out)
{
    int n = atomic_load(&a->n_arrived);
    for (int i = 1; i < n; i++)
        if (a->arrived[i] > a->arrived[i - 1] && a->arrived[i] >= from && a->arrived[i] <= to)
            add(out, a->arrived[i] - a->arrived[i - 1]);
}

static void rest(double seconds)
{
    const struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

/* ---- throughput ---- */

static status one_throughput(samples *decode, samples *whole, samples *first, samples *gaps)
{
    asked *all[MOST_STREAMS];
    int n = (int)options.streams;
    double from = 0, to = 1e300, begin = 1e300, end = 0;
    status st = STATUS_OK;
    for (int i = 0; i < n; i++)
        all[i] = make_request((int)options.prompt, (int)options.tokens);
    for (int i = 0; i < n; i++)
        start_request(all[i]);
    for (int i = 0; i < n; i++) {
        status one = finish_request(all[i]);
        st = st == STATUS_OK ? one : st;
        from = all[i]->first > from ? all[i]->first : from;
        to = all[i]->last < to ? all[i]->last : to;
        begin = all[i]->start < begin ? all[i]->start : begin;
        end = all[i]->last > end ? all[i]->last : end;
    }
    int inside = 0;
    for (int i = 0; i < n; i++) {
        for (int t = 0; t < all[i]->n_arrived; t++)
            inside += all[i]->arrived[t] > from && all[i]->arrived[t] <= to;
        add(first, all[i]->first - all[i]->start);
        add_gaps(all[i], from, to, gaps);
        free_request(all[i]);
    }
    if (st == STATUS_OK && to <= from)
        return status_fail(STATUS_USAGE, "the first stream ended before the last began: more --tokens are needed");
    add(decode, inside / (to - from));
    add(whole, (double)n * (double)options.tokens / (end - begin));
    return st;
}

static status bench_throughput(void)
{
    samples decode = {0}, whole = {0}, first = {0}, gaps = {0}, dummy[4] = {{0}};
    TRY(one_throughput(&dummy[0], &dummy[1], &dummy[2], &dummy[3])); /* warms up */
    for (int64_t i = 0; i < options.rounds; i++)
        TRY(one_throughput(&decode, &whole, &first, &gaps));
    figure("decode_tokens_per_s", median(&decode), "tok/s, median of rounds");
    figure("decode_tokens_per_s_least", percentile(&decode, 0), "tok/s");
    figure("decode_tokens_per_s_most", percentile(&decode, 1), "tok/s");
    figure("whole_tokens_per_s", median(&whole), "tok/s");
    figure("ttft_p50_ms", 1e3 * median(&first), "ms");
    figure("ttft_p99_ms", 1e3 * percentile(&first, 0.99), "ms");
    figure("inter_token_p50_ms", 1e3 * median(&gaps), "ms");
    figure("inter_token_p99_ms", 1e3 * percentile(&gaps, 0.99), "ms");
    return STATUS_OK;
}

/* ---- time to first token ---- */

typedef struct {
    double seconds, count;
} step_times;

/* One GET /metrics over a connection of its own. */
static status read_page(char *page, size_t room)
{
    char host[256] = "", port[8] = "", ask[400];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    TRY(control_split_address("--http", options.http, host, port));
    if (getaddrinfo(host, port, &hints, &found) != 0)
        return status_fail(STATUS_IO, "--http %s: no such place", options.http);
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int n = snprintf(ask, sizeof ask, "GET /metrics HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host);
    bool ok = fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0 && send(fd, ask, (size_t)n, MSG_NOSIGNAL) == n;
    freeaddrinfo(found);
    size_t size = 0;
    for (ssize_t m; ok && size < room - 1 && (m = recv(fd, page + size, room - 1 - size, 0)) > 0;)
        size += (size_t)m;
    page[size] = '\0';
    if (fd >= 0)
        close(fd);
    return size > 0 ? STATUS_OK : status_fail(STATUS_IO, "--http %s: no answer", options.http);
}

static double read_number(const char *page, const char *name)
{
    const char *at = strstr(page, name), *behind = at ? strchr(at, ' ') : NULL;
    return behind ? strtod(behind, NULL) : 0;
}

static status read_steps(step_times *out)
{
    static char page[1 << 17];
    TRY(read_page(page, sizeof page));
    out->seconds = read_number(page, "\nconvoke_step_seconds_sum{");
    out->count = read_number(page, "\nconvoke_step_seconds_count{");
    return STATUS_OK;
}

/* The steps' own seconds since `before`; their report may be a moment behind the token. */
static status steps_since(const step_times *before, double *seconds)
{
    step_times now;
    for (int i = 0; i < 50; i++) {
        TRY(read_steps(&now));
        *seconds = now.seconds - before->seconds;
        if (now.count > before->count)
            return STATUS_OK;
        rest(0.002);
    }
    return status_fail(STATUS_BAD_INPUT, "a request was answered, and /metrics counts no step for it");
}

static status bench_ttft_own(void)
{
    samples own = {0}, added = {0};
    for (int64_t i = -2; i < options.rounds; i++) {
        asked *a = make_request((int)options.prompt, 1);
        step_times before;
        double steps;
        TRY(read_steps(&before));
        rest(0.03);
        TRY(run_alone(a));
        TRY(steps_since(&before, &steps));
        if (i >= 0) {
            add(&own, steps);
            add(&added, a->first - a->start - steps);
        }
        free_request(a);
    }
    figure("ttft_own_p50_ms", 1e3 * median(&own), "ms of the workers' steps");
    figure("ttft_added_p50_ms", 1e3 * median(&added), "ms by door and control path");
    figure("ttft_added_p99_ms", 1e3 * percentile(&added, 0.99), "ms");
    return STATUS_OK;
}

static status measure_first(int n_prompt, int rounds, samples *out)
{
    for (int i = -2; i < rounds; i++) { /* two warm up */
        asked *a = make_request(n_prompt, 1);
        status st = run_alone(a);
        if (i >= 0)
            add(out, a->first - a->start);
        free_request(a);
        TRY(st);
        rest(0.03); /* the server falls idle again */
    }
    return STATUS_OK;
}

static status bench_ttft(void)
{
    samples first = {0};
    TRY(measure_first((int)options.prompt, (int)options.rounds, &first));
    figure("ttft_p50_ms", 1e3 * median(&first), "ms");
    figure("ttft_p99_ms", 1e3 * percentile(&first, 0.99), "ms");
    figure("ttft_least_ms", 1e3 * percentile(&first, 0), "ms");
    return options.http ? bench_ttft_own() : STATUS_OK;
}

/* ---- gaps of running streams while a long prompt is prefilled ---- */

enum { LONG_RUN = 3000 }; /* outlasts the measurement, and fits into a KV cache */

static bool all_have(asked **all, int n, int tokens)
{
    for (int i = 0; i < n; i++)
        if (atomic_load(&all[i]->n_arrived) < tokens && all[i]->end.code == RPC_ENDED_OK)
            return false;
    return true;
}

static status wait_for_tokens(asked **all, int n, int tokens)
{
    for (double until = clock_seconds() + CALL_SECONDS; !all_have(all, n, tokens);) {
        if (clock_seconds() > until)
            return status_fail(STATUS_IO, "streams do not get on");
        rest(0.005);
    }
    return STATUS_OK;
}

static status bench_gap(void)
{
    samples alone = {0}, among = {0}, before = {0}, during = {0}, ratios = {0};
    asked *all[MOST_STREAMS];
    int n = (int)options.streams;
    TRY(measure_first((int)options.prompt, 3, &alone));
    for (int i = 0; i < n; i++) {
        /* as long as the measurement needs; the end of this process cancels what is left */
        all[i] = make_request(16, (int)options.tokens);
        start_request(all[i]);
    }
    TRY(wait_for_tokens(all, n, 8));
    for (int64_t round = 0; round < options.rounds; round++) {
        samples calm = {0}, busy = {0};
        double from = clock_seconds();
        rest(options.seconds);
        double submitted = clock_seconds();
        asked *big = make_request((int)options.prompt, 1);
        TRY(run_alone(big));
        add(&among, big->first - big->start);
        for (int i = 0; i < n; i++) {
            if (atomic_load(&all[i]->n_arrived) == all[i]->n_tokens)
                return status_fail(STATUS_USAGE, "a stream ended during the measurement: more --tokens are needed");
            add_gaps(all[i], from, submitted, &calm);
            add_gaps(all[i], from, submitted, &before);
            add_gaps(all[i], submitted, big->first, &busy);
            add_gaps(all[i], submitted, big->first, &during);
        }
        add(&ratios, percentile(&busy, 0.99) / percentile(&calm, 0.99));
        free(calm.values);
        free(busy.values);
        free_request(big);
    }
    figure("inter_token_before_p50_ms", 1e3 * median(&before), "ms");
    figure("inter_token_before_p99_ms", 1e3 * percentile(&before, 0.99), "ms");
    figure("inter_token_during_p50_ms", 1e3 * median(&during), "ms");
    figure("inter_token_during_p99_ms", 1e3 * percentile(&during, 0.99), "ms");
    figure("inter_token_during_most_ms", 1e3 * percentile(&during, 1), "ms");
    figure("inter_token_p99_ratio", median(&ratios), "during over before, median of rounds");
    figure("long_prompt_ttft_alone_ms", 1e3 * median(&alone), "ms");
    figure("long_prompt_ttft_among_ms", 1e3 * median(&among), "ms");
    figure("long_prompt_ttft_ratio", median(&among) / median(&alone), "among streams over alone");
    return STATUS_OK;
}

/* ---- prefix cache ---- */

static status bench_prefix(void)
{
    samples first = {0}, second = {0}, ratios = {0};
    for (int64_t i = -1; i < options.rounds; i++) {
        asked *a = make_request((int)options.prompt + 16, 1), *b = make_request((int)options.prompt + 16, 1);
        memcpy(b->prompt, a->prompt, (size_t)options.prompt * sizeof *a->prompt);
        a->bypass_prefix_cache = b->bypass_prefix_cache = false;
        TRY(run_alone(a));
        rest(0.03);
        TRY(run_alone(b));
        rest(0.03);
        if (i >= 0) {
            add(&first, a->first - a->start);
            add(&second, b->first - b->start);
            add(&ratios, (b->first - b->start) / (a->first - a->start));
        }
        free_request(a);
        free_request(b);
    }
    figure("prefix_first_ttft_ms", 1e3 * median(&first), "ms");
    figure("prefix_second_ttft_ms", 1e3 * median(&second), "ms");
    figure("prefix_ttft_ratio", median(&ratios), "second over first, median of rounds");
    return STATUS_OK;
}

/* ---- processes of the server ---- */

typedef struct {
    int pid, parent;
    unsigned long long ticks; /* of CPU, user and system */
    char name[32];
} process;

static bool read_process(int pid, process *out)
{
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    bool ok = f && fgets(line, sizeof line, f);
    if (f)
        fclose(f);
    char *open = ok ? strchr(line, '(') : NULL, *close_at = ok ? strrchr(line, ')') : NULL;
    unsigned long long user, system;
    if (!open || !close_at ||
        sscanf(close_at, ") %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &out->parent, &user, &system) != 3)
        return false;
    *close_at = '\0';
    out->pid = pid;
    out->ticks = user + system;
    snprintf(out->name, sizeof out->name, "%.31s", open + 1);
    return true;
}

/* The server and its descendants. */
static int read_family(int root, process *out, int most)
{
    static process all[MOST_PROCESSES];
    int n_all = 0, n = 0;
    DIR *dir = opendir("/proc");
    for (struct dirent *e; dir && n_all < MOST_PROCESSES && (e = readdir(dir));)
        if (atoi(e->d_name) > 0 && read_process(atoi(e->d_name), &all[n_all]))
            n_all++;
    if (dir)
        closedir(dir);
    for (int i = 0; i < n_all; i++)
        if (all[i].pid == root && n < most)
            out[n++] = all[i];
    for (int done = 0; done < n; done++)
        for (int i = 0; i < n_all; i++)
            if (all[i].parent == out[done].pid && n < most)
                out[n++] = all[i];
    return n;
}

static status bench_idle(void)
{
    process before[64], after[64];
    char name[80];
    double total = 0, per_second = (double)sysconf(_SC_CLK_TCK), start = clock_seconds();
    int n = read_family((int)options.server_pid, before, 64);
    if (n == 0)
        return status_fail(STATUS_USAGE, "--server-pid names no process");
    rest(options.seconds);
    int m = read_family((int)options.server_pid, after, 64);
    double seconds = clock_seconds() - start;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            if (after[i].pid == before[j].pid) {
                double share = 100 * (double)(after[i].ticks - before[j].ticks) / per_second / seconds;
                snprintf(name, sizeof name, "idle_%s_%d_percent", after[i].name, i);
                figure(name, share, "% of one core");
                total += share;
            }
    figure("idle_total_percent", total, "% of one core");
    return STATUS_OK;
}

/* ---- recovery ---- */

static status run_streams(asked **all, int n, const uint32_t *prompts, double *killed_at)
{
    for (int i = 0; i < n; i++) {
        all[i] = make_request(16, (int)options.tokens);
        memcpy(all[i]->prompt, prompts + 16 * i, 16 * sizeof *prompts);
        all[i]->temperature = 1;
        all[i]->seed = i + 1;
        start_request(all[i]);
    }
    if (killed_at) {
        process family[64];
        int victim = 0;
        TRY(wait_for_tokens(all, n, (int)options.tokens / 4));
        int n_family = read_family((int)options.server_pid, family, 64);
        for (int i = 0; i < n_family; i++)
            if (strncmp(family[i].name, "convoke-worker", 14) == 0)
                victim = family[i].pid; /* the last one: not the leader, where there are several */
        *killed_at = clock_seconds();
        if (victim == 0 || kill(victim, SIGKILL) != 0)
            return status_fail(STATUS_USAGE, "no convoke-worker among the descendants of --server-pid");
    }
    for (int i = 0; i < n; i++)
        TRY(finish_request(all[i]));
    return STATUS_OK;
}

static status bench_recovery(void)
{
    asked *calm[MOST_STREAMS], *hit[MOST_STREAMS];
    samples pauses = {0};
    int n = (int)options.streams;
    double same = 0, middle = 0;
    uint32_t *prompts = calloc((size_t)n * 16, sizeof *prompts);
    for (int i = 0; i < 16 * n; i++)
        prompts[i] = random_id();
    TRY(run_streams(calm, n, prompts, NULL));
    for (int64_t round = 0; round < options.rounds; round++) {
        double killed_at = 0, longest = 0;
        TRY(run_streams(hit, n, prompts, &killed_at));
        for (int i = 0; i < n; i++) {
            middle += hit[i]->last > killed_at;
            same += memcmp(hit[i]->ids, calm[i]->ids, (size_t)options.tokens * sizeof *calm[i]->ids) == 0;
            for (int t = 1; t < hit[i]->n_tokens; t++)
                if (hit[i]->arrived[t] > killed_at && hit[i]->arrived[t] - hit[i]->arrived[t - 1] > longest)
                    longest = hit[i]->arrived[t] - hit[i]->arrived[t - 1];
            free_request(hit[i]);
        }
        add(&pauses, longest);
        rest(1);
    }
    double all = (double)n * (double)options.rounds;
    figure("recovery_pause_s", median(&pauses), "s, longest of all streams, median of kills");
    figure("recovery_pause_most_s", percentile(&pauses, 1), "s");
    figure("recovery_streams_hit", middle / all, "share of streams that were running");
    figure("recovery_same_tokens", same / all, "share of streams with the undisturbed run's tokens");
    for (int i = 0; i < n; i++)
        free_request(calm[i]);
    free(prompts);
    return STATUS_OK;
}

/* ---- the command line ---- */

static const struct {
    const char *kind;
    status (*run)(void);
    int64_t streams, prompt, tokens, rounds;
    double seconds;
} kinds[] = {
    {"throughput", bench_throughput, 16, 16, 96, 3, 0}, {"ttft", bench_ttft, 1, 16, 1, 100, 0},
    {"gap", bench_gap, 8, 2000, LONG_RUN, 3, 5},        {"prefix", bench_prefix, 1, 1000, 1, 5, 0},
    {"recovery", bench_recovery, 16, 16, 200, 3, 0},    {"idle", bench_idle, 1, 1, 1, 1, 20},
};

static void fill_defaults(int kind)
{
    options.streams = options.streams ? options.streams : kinds[kind].streams;
    options.prompt = options.prompt ? options.prompt : kinds[kind].prompt;
    options.tokens = options.tokens ? options.tokens : kinds[kind].tokens;
    options.rounds = options.rounds ? options.rounds : kinds[kind].rounds;
    options.seconds = options.seconds > 0 ? options.seconds : kinds[kind].seconds;
}

static status run_kind(void)
{
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i].kind, options.kind) == 0) {
            fill_defaults((int)i);
            TRY(rpc_client_open(&(rpc_client_options){.address = options.connect}, &client));
            return kinds[i].run();
        }
    return status_fail(STATUS_USAGE, "'%s' is none of throughput, ttft, gap, prefix, recovery, idle", options.kind);
}

int main(int argc, char **argv)
{
    const option_entry entries[] = {
        {"connect", OPTION_STRING, &options.connect, .argument = "HOST:PORT", .required = true, .help = "a running server"},
        {"http", OPTION_STRING, &options.http, .argument = "HOST:PORT", .help = "ttft: its /metrics, for the model's own time"},
        {"streams", OPTION_INT, &options.streams, .fallback = "0", .max = MOST_STREAMS,
         .help = "at once (0: as the figure wants)"},
        {"prompt", OPTION_INT, &options.prompt, .fallback = "0", .max = 1 << 20, .help = "tokens of a prompt"},
        {"tokens", OPTION_INT, &options.tokens, .fallback = "0", .max = 1 << 20, .help = "new tokens of a request"},
        {"rounds", OPTION_INT, &options.rounds, .fallback = "0", .max = 100000, .help = "repetitions"},
        {"seconds", OPTION_DOUBLE, &options.seconds, .fallback = "0", .max = 3600, .help = "gap, idle: how long to watch"},
        {"vocab", OPTION_INT, &options.vocab, .fallback = "1000", .min = 2, .max = 1 << 24, .help = "token ids below this"},
        {"server-pid", OPTION_INT, &options.server_pid, .fallback = "0", .max = 1 << 30, .help = "recovery, idle: its process"},
        {"json", OPTION_FLAG, &options.json, .help = "one JSON object instead of a table"},
    };
    const option_table table = {.name = "bench_door",
                                .summary = "Measures what clients of a running server see.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "KIND",
                                .min_operands = 1,
                                .max_operands = 1};
    options_wish wish;
    int n_operands = 0;
    log_set_speaker("bench_door");
    status st = options_parse(&table, argc, argv, &wish, &options.kind, &n_operands);
    if (st == STATUS_OK && wish != OPTIONS_RUN) {
        options_print(&table, wish, stdout);
        return 0;
    }
    if (st == STATUS_OK)
        st = run_kind();
    if (st == STATUS_OK)
        print_figures();
    else
        log_line("%s", status_message());
    fflush(NULL);
    _exit(status_exit_code(st)); /* streams that still run end with the process */
}
