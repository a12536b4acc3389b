/* Counting is one relaxed atomic addition or three, so that a token costs nothing to count; only what the workers report, arrays
 * that come once per step, is guarded by a lock. Sums of seconds are kept in whole nanoseconds, which add exactly in any order.
 *
 * Everything that can be shown stands in the tables below: name, kind, help, and where the number is. */
#include "cluster/metrics.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_BUCKETS = 24 };

/* The usual buckets of these names: panels that show quantiles of two servers compare like with like. */
static const double first_token_buckets[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                                             1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
static const double token_buckets[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,  0.3,  0.4, 0.5,
                                       0.75, 1.0,   2.5,  5.0,   7.5, 10.0, 20.0, 40.0, 80.0};
static const double request_buckets[] = {0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                                         30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
static const double rows_buckets[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
static const double length_buckets[] = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                                        1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
static const double step_buckets[] = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0};

typedef enum {
    FIRST_TOKEN,
    INTER_TOKEN,
    WHOLE,
    QUEUE,
    PREFILL,
    DECODE,
    INFERENCE,
    STEP_ROWS,
    PROMPT_LENGTH,
    OUTPUT_LENGTH,
    STEP,
    N_HISTOGRAMS
} which_histogram;

#define BUCKETS(list) list, sizeof list / sizeof *list

static const struct {
    const char *name, *help;
    const double *bounds;
    size_t n_bounds;
    double unit; /* the sum is kept in this */
} histogram_table[N_HISTOGRAMS] = {
    [FIRST_TOKEN] = {"vllm:time_to_first_token_seconds", "Seconds from a request's arrival to its first token.",
                     BUCKETS(first_token_buckets), 1e-9},
    [INTER_TOKEN] = {"vllm:inter_token_latency_seconds", "Seconds between two tokens of one sequence.", BUCKETS(token_buckets),
                     1e-9},
    [WHOLE] = {"vllm:e2e_request_latency_seconds", "Seconds from a request's arrival to its end.", BUCKETS(request_buckets),
               1e-9},
    [QUEUE] = {"vllm:request_queue_time_seconds", "Seconds a request waited before its first step.", BUCKETS(request_buckets),
               1e-9},
    [PREFILL] = {"vllm:request_prefill_time_seconds", "Seconds from a request's first step to its first token.",
                 BUCKETS(request_buckets), 1e-9},
    [DECODE] = {"vllm:request_decode_time_seconds", "Seconds from a request's first token to its last.", BUCKETS(request_buckets),
                1e-9},
    [INFERENCE] = {"vllm:request_inference_time_seconds", "Seconds from a request's first step to its last token.",
                   BUCKETS(request_buckets), 1e-9},
    [STEP_ROWS] = {"vllm:iteration_tokens_total", "Tokens computed in one step, prompt and output together.",
                   BUCKETS(rows_buckets), 1},
    [PROMPT_LENGTH] = {"vllm:request_prompt_tokens", "Prompt tokens of a request.", BUCKETS(length_buckets), 1},
    [OUTPUT_LENGTH] = {"vllm:request_generation_tokens", "Output tokens of a request.", BUCKETS(length_buckets), 1},
    [STEP] = {"convoke_step_seconds", "Seconds of one step of the workers.", BUCKETS(step_buckets), 1e-9},
};

typedef struct {
    _Atomic uint64_t counts[MOST_BUCKETS]; /* not cumulative; the last is what exceeds all bounds */
    _Atomic uint64_t sum;                  /* in the table's unit */
} histogram;

enum { N_FINISHES = METRIC_SUCCESS_ERROR + 1 };
static const char *const finish_names[N_FINISHES] = {"stop", "length", "abort", "error"};

struct metrics {
    char *label; /* model_name="..." */
    histogram histograms[N_HISTOGRAMS];
    _Atomic uint64_t prompt_tokens, generated_tokens, finished[N_FINISHES];
    pthread_mutex_t lock; /* guards what follows */
    metric_workers workers;
    uint64_t *rows_of_rank;
    double *lateness_of_rank, *load;
    int *layers;
    int room_ranks, room_layers;
    bool has_plan;
    metric_plan plan;
    double *share_of_rank;
    int room_shares;
};

/* ---- made ---- */

/* How many bytes a whole UTF-8 character at `s` has; 0: it is none. */
static int character_bytes(const unsigned char *s)
{
    int n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

/* `model_name="..."` with quotes, backslashes and line ends escaped; what is no UTF-8 would cost the whole page, so it is
 * replaced. */
static char *make_label(const char *model_name)
{
    static const char name[] = "model_name=\"";
    char *label = malloc(sizeof name + 2 * strlen(model_name) + 2), *to = label;
    if (!label)
        return NULL;
    to += sprintf(to, "%s", name);
    for (const unsigned char *s = (const unsigned char *)model_name; *s;) {
        int n = character_bytes(s);
        if (*s == '"' || *s == '\\' || *s == '\n') {
            *to++ = '\\';
            *to++ = *s == '\n' ? 'n' : (char)*s;
        } else if (n == 0) {
            *to++ = '?';
        } else {
            memcpy(to, s, (size_t)n);
            to += n;
        }
        s += n ? n : 1;
    }
    memcpy(to, "\"", 2);
    return label;
}

status metrics_create(const char *model_name, metrics **out)
{
    metrics *m = calloc(1, sizeof *m);
    if (m)
        m->label = make_label(model_name);
    if (!m || !m->label) {
        free(m);
        return status_fail(STATUS_NO_MEMORY, "no memory for metrics");
    }
    pthread_mutex_init(&m->lock, NULL);
    *out = m;
    return STATUS_OK;
}

void metrics_destroy(metrics *m)
{
    if (!m)
        return;
    pthread_mutex_destroy(&m->lock);
    free(m->rows_of_rank);
    free(m->lateness_of_rank);
    free(m->load);
    free(m->layers);
    free(m->share_of_rank);
    free(m->label);
    free(m);
}

/* ---- counted ---- */

static void add(_Atomic uint64_t *to, uint64_t n)
{
    atomic_fetch_add_explicit(to, n, memory_order_relaxed);
}

static uint64_t now(_Atomic uint64_t *of)
{
    return atomic_load_explicit(of, memory_order_relaxed);
}

/* Negative and not-a-number: it never happened. */
static void observe(metrics *m, which_histogram which, double value)
{
    if (!(value >= 0))
        return;
    const double *bounds = histogram_table[which].bounds;
    size_t n = histogram_table[which].n_bounds, i = 0;
    while (i < n && value > bounds[i])
        i++;
    add(&m->histograms[which].counts[i], 1);
    add(&m->histograms[which].sum, (uint64_t)(fmin(value, 1e9) / histogram_table[which].unit + 0.5));
}

void metrics_request_done(metrics *m, const metric_request *r)
{
    add(&m->finished[r->finish], 1);
    observe(m, WHOLE, r->whole);
    observe(m, QUEUE, r->queue);
    observe(m, PREFILL, r->prefill);
    observe(m, DECODE, r->decode);
    observe(m, INFERENCE, r->inference);
    observe(m, PROMPT_LENGTH, r->n_prompt);
    observe(m, OUTPUT_LENGTH, r->n_output);
}

void metrics_first_token(metrics *m, double seconds)
{
    observe(m, FIRST_TOKEN, seconds);
}

void metrics_inter_token(metrics *m, double seconds)
{
    observe(m, INTER_TOKEN, seconds);
}

void metrics_prompt_tokens(metrics *m, int n)
{
    if (n > 0)
        add(&m->prompt_tokens, (uint64_t)n);
}

void metrics_generated_tokens(metrics *m, int n)
{
    if (n > 0)
        add(&m->generated_tokens, (uint64_t)n);
}

void metrics_step(metrics *m, double seconds, int prefill_rows, int decode_rows)
{
    observe(m, STEP, seconds);
    if (prefill_rows + decode_rows > 0)
        observe(m, STEP_ROWS, prefill_rows + decode_rows);
}

static bool make_room(void *array, size_t element, int n)
{
    void **at = array, *wider = realloc(*at, (size_t)n * element);
    if (wider)
        *at = wider;
    return wider != NULL;
}

/* A list that finds no memory is not shown: numbers of people's dashboards are never a reason to stop serving. */
static void copy_ranks(metrics *m, const metric_workers *w)
{
    if (w->n_ranks > m->room_ranks) {
        m->workers.n_ranks = m->room_ranks = 0;
        if (!make_room(&m->rows_of_rank, sizeof *m->rows_of_rank, w->n_ranks) ||
            !make_room(&m->lateness_of_rank, sizeof *m->lateness_of_rank, w->n_ranks))
            return;
        m->room_ranks = w->n_ranks;
    }
    m->workers.n_ranks = w->n_ranks;
    for (int i = 0; i < w->n_ranks; i++) {
        m->rows_of_rank[i] = w->rows_of_rank ? w->rows_of_rank[i] : 0;
        m->lateness_of_rank[i] = w->lateness_of_rank ? w->lateness_of_rank[i] : 0;
    }
}

static void copy_layers(metrics *m, const metric_workers *w)
{
    if (w->n_layers > m->room_layers) {
        m->workers.n_layers = m->room_layers = 0;
        if (!make_room(&m->load, sizeof *m->load, w->n_layers) || !make_room(&m->layers, sizeof *m->layers, w->n_layers))
            return;
        m->room_layers = w->n_layers;
    }
    m->workers.n_layers = w->load_max_over_mean ? w->n_layers : 0;
    for (int i = 0; i < m->workers.n_layers; i++) {
        m->load[i] = w->load_max_over_mean[i];
        m->layers[i] = w->layer_numbers ? w->layer_numbers[i] : i;
    }
}

void metrics_workers(metrics *m, const metric_workers *w)
{
    pthread_mutex_lock(&m->lock);
    int ranks = m->workers.n_ranks, layers = m->workers.n_layers;
    m->workers = *w;
    m->workers.n_ranks = ranks;
    m->workers.n_layers = layers;
    copy_ranks(m, w);
    copy_layers(m, w);
    pthread_mutex_unlock(&m->lock);
}

void metrics_plan(metrics *m, const metric_plan *p)
{
    pthread_mutex_lock(&m->lock);
    m->plan = *p;
    m->plan.n_ranks = 0;
    m->has_plan = true;
    if (p->n_ranks > m->room_shares && make_room(&m->share_of_rank, sizeof *m->share_of_rank, p->n_ranks))
        m->room_shares = p->n_ranks;
    if (p->n_ranks <= m->room_shares) {
        m->plan.n_ranks = p->n_ranks;
        for (int i = 0; i < p->n_ranks; i++)
            m->share_of_rank[i] = p->share_of_rank[i];
    }
    pthread_mutex_unlock(&m->lock);
}

/* ---- shown ---- */

static void put(bytes_writer *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void put(bytes_writer *out, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    char *room = n < 0 ? NULL : bytes_extend(out, (size_t)n + 1);
    if (room) {
        vsnprintf(room, (size_t)n + 1, format, again);
        out->size--; /* the NUL */
    }
    va_end(again);
    va_end(args);
}

static void put_head(bytes_writer *out, const char *name, const char *kind, const char *help)
{
    put(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind);
}

typedef struct {
    char text[32];
} number_text;

/* The shortest form that reads back the same; whole numbers of buckets as "1.0", as the names' first users print them. */
static number_text shortest(double value, const char *behind_whole)
{
    number_text t;
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(t.text, sizeof t.text - 3, "%.*g", digits, value);
        if (strtod(t.text, NULL) == value)
            break;
    }
    if (!strpbrk(t.text, ".ein"))
        strcat(t.text, behind_whole);
    return t;
}

static number_text number(double value)
{
    if (isnan(value))
        return (number_text){.text = "NaN"};
    if (isinf(value))
        return value > 0 ? (number_text){.text = "+Inf"} : (number_text){.text = "-Inf"};
    return shortest(value, "");
}

static void put_value(bytes_writer *out, const metrics *m, const char *name, const char *kind, const char *help, double value)
{
    put_head(out, name, kind, help);
    put(out, "%s{%s} %s\n", name, m->label, number(value).text);
}

static void put_count(bytes_writer *out, const metrics *m, const char *name, const char *help, uint64_t value)
{
    put_head(out, name, "counter", help);
    put(out, "%s{%s} %llu\n", name, m->label, (unsigned long long)value);
}

static void put_histogram(bytes_writer *out, metrics *m, which_histogram which)
{
    histogram *h = &m->histograms[which];
    const char *name = histogram_table[which].name;
    uint64_t total = 0, sum = now(&h->sum);
    put_head(out, name, "histogram", histogram_table[which].help);
    for (size_t i = 0; i <= histogram_table[which].n_bounds; i++) {
        bool last = i == histogram_table[which].n_bounds;
        total += now(&h->counts[i]);
        put(out, "%s_bucket{%s,le=\"%s\"} %llu\n", name, m->label,
            last ? "+Inf" : shortest(histogram_table[which].bounds[i], ".0").text, (unsigned long long)total);
    }
    put(out, "%s_sum{%s} %s\n%s_count{%s} %llu\n", name, m->label, number((double)sum * histogram_table[which].unit).text, name,
        m->label, (unsigned long long)total); /* the count is the last bucket's, so that the two agree while others count on */
}

static void put_requests(bytes_writer *out, metrics *m)
{
    const metric_workers *w = &m->workers;
    put_value(out, m, "vllm:num_requests_running", "gauge", "Requests being computed.", w->n_running);
    put_value(out, m, "vllm:num_requests_waiting", "gauge", "Requests waiting to be computed.", w->n_waiting);
    put_value(out, m, "vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache in use; 1 is all of it.", w->kv_usage);
    put_count(out, m, "vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", w->prefix_queries);
    put_count(out, m, "vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", w->prefix_hits);
    put_count(out, m, "vllm:num_preemptions_total", "Sequences put back into the queue to make room.", w->n_preempted);
    put_count(out, m, "vllm:prompt_tokens_total", "Prompt tokens of accepted requests.", now(&m->prompt_tokens));
    put_count(out, m, "vllm:generation_tokens_total", "Tokens generated.", now(&m->generated_tokens));
    put_head(out, "vllm:request_success_total", "counter", "Sequences that ended, by why.");
    for (int i = 0; i < N_FINISHES; i++)
        put(out, "vllm:request_success_total{%s,finished_reason=\"%s\"} %llu\n", m->label, finish_names[i],
            (unsigned long long)now(&m->finished[i]));
}

static void put_ranks(bytes_writer *out, const metrics *m)
{
    if (m->workers.n_ranks == 0)
        return;
    put_head(out, "convoke_rank_tokens_total", "counter", "Rows (a token for an expert) that a rank has computed.");
    for (int i = 0; i < m->workers.n_ranks; i++)
        put(out, "convoke_rank_tokens_total{rank=\"%d\"} %llu\n", i, (unsigned long long)m->rows_of_rank[i]);
    put_head(out, "convoke_rank_lateness_seconds", "gauge", "Seconds that others waited for a rank.");
    for (int i = 0; i < m->workers.n_ranks; i++)
        put(out, "convoke_rank_lateness_seconds{rank=\"%d\"} %s\n", i, number(m->lateness_of_rank[i]).text);
}

static void put_plan(bytes_writer *out, const metrics *m)
{
    static const char *const ends[N_METRIC_ATTEMPTS] = {"live", "suggested", "useless", "failed"};
    const metric_plan *p = &m->plan;
    if (p->drift >= 0) {
        put_head(out, "convoke_plan_drift", "gauge",
                 "How far the traffic has moved from what the plan was made for; 0: not at all.");
        put(out, "convoke_plan_drift %s\n", number(p->drift).text);
    }
    if (p->balance >= 0) {
        put_head(out, "convoke_plan_balance", "gauge",
                 "Busiest rank over the mean of all under the plan in force, mean over layers.");
        put(out, "convoke_plan_balance %s\n", number(p->balance).text);
    }
    put_head(out, "convoke_plan_counted_tokens", "gauge", "Tokens of late that drift and balance are counted over.");
    put(out, "convoke_plan_counted_tokens %llu\n", (unsigned long long)p->tokens);
    if (p->n_ranks > 0)
        put_head(out, "convoke_plan_rank_share", "gauge", "Share of these tokens' rows that the plan gives to a rank.");
    for (int i = 0; i < p->n_ranks; i++)
        put(out, "convoke_plan_rank_share{rank=\"%d\"} %s\n", i, number(m->share_of_rank[i]).text);
    put_head(out, "convoke_replan_attempts_total", "counter", "Attempts at a better plan, by how they ended.");
    for (int i = 0; i < N_METRIC_ATTEMPTS; i++)
        put(out, "convoke_replan_attempts_total{end=\"%s\"} %llu\n", ends[i], (unsigned long long)p->attempts[i]);
}

static void put_workers(bytes_writer *out, const metrics *m)
{
    static const char *const classes[] = {"same_rank", "same_node", "cross_node"};
    const metric_workers *w = &m->workers;
    put_ranks(out, m);
    put_head(out, "convoke_link_bytes_total", "counter", "Bytes of token rows sent and brought home, by the kind of link.");
    for (int i = 0; i < 3; i++)
        put(out, "convoke_link_bytes_total{class=\"%s\"} %llu\n", classes[i], (unsigned long long)w->link_bytes[i]);
    if (w->n_layers > 0)
        put_head(out, "convoke_expert_load_max_over_mean", "gauge", "Rows of a layer's busiest rank over the mean of all ranks.");
    for (int i = 0; i < w->n_layers; i++)
        put(out, "convoke_expert_load_max_over_mean{layer=\"%d\"} %s\n", m->layers[i], number(m->load[i]).text);
    put_head(out, "convoke_plan_epoch", "gauge", "Number of the plan in force.");
    put(out, "convoke_plan_epoch %llu\n", (unsigned long long)w->plan_epoch);
    put_head(out, "convoke_launches_total", "counter", "Times the workers were started.");
    put(out, "convoke_launches_total %llu\n", (unsigned long long)w->launches);
    if (m->has_plan)
        put_plan(out, m);
}

void metrics_render(metrics *m, bytes_writer *out)
{
    pthread_mutex_lock(&m->lock);
    put_requests(out, m);
    put_workers(out, m);
    pthread_mutex_unlock(&m->lock);
    for (int i = 0; i < N_HISTOGRAMS; i++)
        put_histogram(out, m, (which_histogram)i);
}
