/* What /metrics prints is Prometheus' text format, and says exactly what was counted. */
#include "tests/support.h"

#include "cluster/metrics.h"

#include <ctype.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- a reader of the format, written from its description alone ---- */

typedef struct {
    char name[100], labels[400];
    double value;
} sample;

typedef struct {
    char name[100], kind[20];
    bool has_help, over; /* over: samples of another family came since */
    int n_samples;
} family;

typedef struct {
    sample samples[600];
    family families[100];
    int n_samples, n_families;
} page;

static size_t name_length(const char *s)
{
    size_t n = 0;
    while (isalnum((unsigned char)s[n]) || s[n] == '_' || s[n] == ':')
        n++;
    return isdigit((unsigned char)s[0]) ? 0 : n;
}

static family *find_family(page *p, const char *name, size_t n)
{
    for (int i = 0; i < p->n_families; i++)
        if (strlen(p->families[i].name) == n && strncmp(p->families[i].name, name, n) == 0)
            return &p->families[i];
    return NULL;
}

/* "# HELP name text" then "# TYPE name kind", before any sample, once each. */
static void read_comment(page *p, const char *line)
{
    const char *name = line + 7;
    size_t n = name_length(name);
    assert_true(n > 0 && n < 100 && name[n] == ' ');
    family *f = find_family(p, name, n);
    if (strncmp(line, "# HELP ", 7) == 0) {
        assert_null(f);
        assert_true(strlen(name + n + 1) > 0);
        f = &p->families[p->n_families++];
        snprintf(f->name, sizeof f->name, "%.*s", (int)n, name);
        f->has_help = true;
        return;
    }
    assert_int_equal(strncmp(line, "# TYPE ", 7), 0);
    assert_true(f && f->has_help && f->n_samples == 0 && !f->kind[0]);
    snprintf(f->kind, sizeof f->kind, "%s", name + n + 1);
    assert_true(strcmp(f->kind, "counter") == 0 || strcmp(f->kind, "gauge") == 0 || strcmp(f->kind, "histogram") == 0);
}

/* {name="value",...}: only \\, \" and \n are escapes. Returns what stands behind it. */
static const char *skip_labels(const char *s)
{
    if (*s != '{')
        return s;
    do {
        size_t n = name_length(++s);
        assert_true(n > 0 && strncmp(s + n, "=\"", 2) == 0);
        for (s += n + 2; *s != '"'; s++) {
            assert_true(*s != '\0');
            if (*s == '\\')
                assert_non_null(strchr("\\\"n", *++s));
        }
        s++;
    } while (*s == ',');
    assert_int_equal(*s, '}');
    return s + 1;
}

static family *family_of(page *p, const char *name, size_t n)
{
    static const char *const endings[] = {"_bucket", "_sum", "_count"};
    family *f = find_family(p, name, n);
    for (int i = 0; i < 3 && !f; i++) {
        size_t m = strlen(endings[i]);
        if (n > m && strncmp(name + n - m, endings[i], m) == 0)
            f = find_family(p, name, n - m);
        if (f && strcmp(f->kind, "histogram") != 0)
            f = NULL;
    }
    return f;
}

static void read_sample(page *p, const char *line)
{
    size_t n = name_length(line);
    assert_true(n > 0 && n < 100);
    const char *labels = line + n, *behind = skip_labels(labels);
    family *f = family_of(p, line, n);
    assert_true(f && f->kind[0]);
    assert_false(f->over); /* all samples of a family stand together */
    for (int i = 0; i < p->n_families; i++)
        if (&p->families[i] != f && p->families[i].n_samples > 0)
            p->families[i].over = true;
    f->n_samples++;
    assert_int_equal(*behind, ' ');
    sample *s = &p->samples[p->n_samples++];
    snprintf(s->name, sizeof s->name, "%.*s", (int)n, line);
    snprintf(s->labels, sizeof s->labels, "%.*s", (int)(behind - labels), labels);
    char *end;
    s->value = strtod(behind + 1, &end);
    assert_true(end > behind + 1 && *end == '\0');
    for (int i = 0; i + 1 < p->n_samples; i++)
        assert_false(strcmp(p->samples[i].name, s->name) == 0 && strcmp(p->samples[i].labels, s->labels) == 0);
}

static double find_value(const page *p, const char *name, const char *label)
{
    for (int i = 0; i < p->n_samples; i++)
        if (strcmp(p->samples[i].name, name) == 0 && strstr(p->samples[i].labels, label))
            return p->samples[i].value;
    fail_msg("%s{...%s...} is not there", name, label);
    return 0;
}

/* Buckets rise, the last is +Inf and equals the count; a counter's name ends in _total. */
static void check_families(const page *p)
{
    for (int i = 0; i < p->n_families; i++) {
        const family *f = &p->families[i];
        assert_true(f->n_samples > 0);
        size_t n = strlen(f->name);
        if (strcmp(f->kind, "counter") == 0)
            assert_true(n > 6 && strcmp(f->name + n - 6, "_total") == 0);
        if (strcmp(f->kind, "histogram") != 0)
            continue;
        char name[120];
        double bound = -INFINITY, last = 0;
        snprintf(name, sizeof name, "%s_bucket", f->name);
        for (int j = 0; j < p->n_samples; j++)
            if (strcmp(p->samples[j].name, name) == 0) {
                double le = strtod(strstr(p->samples[j].labels, "le=\"") + 4, NULL);
                assert_true(le > bound && p->samples[j].value >= last);
                bound = le;
                last = p->samples[j].value;
            }
        assert_true(isinf(bound));
        snprintf(name, sizeof name, "%s_count", f->name);
        assert_true(find_value(p, name, "") == last);
        snprintf(name, sizeof name, "%s_sum", f->name);
        assert_true(find_value(p, name, "") >= 0);
    }
}

static page *read_page(metrics *m)
{
    page *p = test_calloc(1, sizeof *p);
    bytes_writer out = {0};
    metrics_render(m, &out);
    assert_false(out.failed);
    assert_true(out.size > 0 && out.data[out.size - 1] == '\n');
    bytes_put(&out, "", 1);
    for (char *line = (char *)out.data, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        if (line[0] == '#')
            read_comment(p, line);
        else
            read_sample(p, line);
    }
    bytes_clear(&out);
    check_families(p);
    return p;
}

static metrics *make(const char *name)
{
    metrics *m = NULL;
    assert_int_equal(metrics_create(name, &m), STATUS_OK);
    return m;
}

/* ---- the tests ---- */

static void fresh_page_is_whole(void **state)
{
    (void)state;
    static const char *const names[] = {"vllm:num_requests_running",
                                        "vllm:num_requests_waiting",
                                        "vllm:kv_cache_usage_perc",
                                        "vllm:prefix_cache_queries_total",
                                        "vllm:prefix_cache_hits_total",
                                        "vllm:prompt_tokens_total",
                                        "vllm:generation_tokens_total",
                                        "vllm:num_preemptions_total",
                                        "vllm:request_success_total",
                                        "vllm:time_to_first_token_seconds_count",
                                        "vllm:inter_token_latency_seconds_count",
                                        "vllm:e2e_request_latency_seconds_count",
                                        "vllm:request_queue_time_seconds_count",
                                        "vllm:request_prefill_time_seconds_count",
                                        "vllm:request_decode_time_seconds_count",
                                        "vllm:request_inference_time_seconds_count",
                                        "vllm:iteration_tokens_total_count"};
    metrics *m = make("demo");
    page *p = read_page(m);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert_true(find_value(p, names[i], "model_name=\"demo\"") == 0);
    test_free(p);
    metrics_destroy(m);
    metrics_destroy(NULL);
}

static void odd_model_names(void **state)
{
    (void)state;
    static const struct {
        const char *name, *label;
    } cases[] = {{"a\"b\\c\nd", "{model_name=\"a\\\"b\\\\c\\nd\"}"},
                 {"grüße/模型", "{model_name=\"grüße/模型\"}"},
                 {"cut \xe6\xa8", "{model_name=\"cut ??\"}"},
                 {"", "{model_name=\"\"}"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        metrics *m = make(cases[i].name);
        page *p = read_page(m);
        find_value(p, "vllm:num_requests_running", cases[i].label);
        test_free(p);
        metrics_destroy(m);
    }
}

/* Against a plain list of the same observations. */
static void histogram_counts_what_was_seen(void **state)
{
    (void)state;
    enum { N = 2000 };
    double *seen = test_calloc(N, sizeof *seen), sum = 0;
    uint64_t random = 5;
    metrics *m = make("demo");
    for (int i = 0; i < N; i++) {
        seen[i] = i % 50 == 0 ? 0.25 : exp((double)support_gauss(&random) * 3 - 2); /* bounds belong to their bucket */
        sum += seen[i];
        metrics_first_token(m, seen[i]);
    }
    metrics_first_token(m, -1);
    metrics_first_token(m, NAN);
    page *p = read_page(m);
    for (int j = 0; j < p->n_samples; j++) {
        if (strcmp(p->samples[j].name, "vllm:time_to_first_token_seconds_bucket") != 0)
            continue;
        double le = strtod(strstr(p->samples[j].labels, "le=\"") + 4, NULL);
        int expected = 0;
        for (int i = 0; i < N; i++)
            expected += seen[i] <= le;
        assert_int_equal((int)p->samples[j].value, expected);
    }
    assert_true(fabs(find_value(p, "vllm:time_to_first_token_seconds_sum", "") - sum) < 1e-3);
    find_value(p, "vllm:time_to_first_token_seconds_bucket", "le=\"1.0\"");
    find_value(p, "vllm:time_to_first_token_seconds_bucket", "le=\"0.001\"");
    test_free(p);
    test_free(seen);
    metrics_destroy(m);
}

static void requests_and_steps_are_counted(void **state)
{
    (void)state;
    metrics *m = make("demo");
    metric_request r = {.finish = METRIC_SUCCESS_STOP,
                        .n_prompt = 10,
                        .n_output = 7,
                        .queue = 0.1,
                        .prefill = 0.2,
                        .decode = 0.4,
                        .inference = 0.6,
                        .whole = 0.7,
                        .first_token = 0.3};
    metrics_request_done(m, &r);
    r.finish = METRIC_SUCCESS_ABORT;
    r.prefill = r.decode = r.inference = -1; /* left the queue for nowhere */
    metrics_request_done(m, &r);
    metrics_prompt_tokens(m, 20);
    metrics_generated_tokens(m, 14);
    metrics_step(m, 0.002, 100, 3);
    metrics_step(m, 0.002, 0, 0); /* nothing computed: a step, but no iteration */
    metrics_inter_token(m, 0.05);
    page *p = read_page(m);
    assert_true(find_value(p, "vllm:request_success_total", "finished_reason=\"stop\"") == 1);
    assert_true(find_value(p, "vllm:request_success_total", "finished_reason=\"abort\"") == 1);
    assert_true(find_value(p, "vllm:request_success_total", "finished_reason=\"length\"") == 0);
    assert_true(find_value(p, "vllm:e2e_request_latency_seconds_count", "") == 2);
    assert_true(find_value(p, "vllm:request_prefill_time_seconds_count", "") == 1);
    assert_true(find_value(p, "vllm:request_generation_tokens_sum", "") == 14);
    assert_true(find_value(p, "vllm:prompt_tokens_total", "") == 20);
    assert_true(find_value(p, "vllm:generation_tokens_total", "") == 14);
    assert_true(find_value(p, "vllm:iteration_tokens_total_sum", "") == 103);
    assert_true(find_value(p, "vllm:iteration_tokens_total_count", "") == 1);
    assert_true(find_value(p, "convoke_step_seconds_count", "") == 2);
    assert_true(find_value(p, "vllm:inter_token_latency_seconds_bucket", "le=\"0.05\"") == 1);
    assert_true(find_value(p, "vllm:inter_token_latency_seconds_bucket", "le=\"0.025\"") == 0);
    test_free(p);
    metrics_destroy(m);
}

static void worker_reports_are_copied(void **state)
{
    (void)state;
    metrics *m = make("demo");
    uint64_t rows[5] = {10, 20, 30, 40, 50};
    double lateness[5] = {0.5, 0, 1.25, 0, 0}, load[3] = {1.07, 1.5, 2};
    int layers[3] = {1, 2, 7};
    metric_workers w = {.n_running = 3,
                        .n_waiting = 2,
                        .kv_usage = 0.25,
                        .n_preempted = 4,
                        .prefix_queries = 100,
                        .prefix_hits = 60,
                        .rows_of_rank = rows,
                        .lateness_of_rank = lateness,
                        .n_ranks = 2,
                        .link_bytes = {1, 2, 3000000000000},
                        .load_max_over_mean = load,
                        .layer_numbers = layers,
                        .n_layers = 3,
                        .plan_epoch = 12,
                        .launches = 2};
    metrics_workers(m, &w);
    w.n_ranks = 5; /* after a restart on more ranks */
    w.n_layers = 2;
    metrics_workers(m, &w);
    memset(rows, 0, sizeof rows);
    memset(load, 0, sizeof load);
    page *p = read_page(m);
    assert_true(find_value(p, "convoke_rank_tokens_total", "rank=\"4\"") == 50);
    assert_true(find_value(p, "convoke_rank_lateness_seconds", "rank=\"2\"") == 1.25);
    assert_true(find_value(p, "convoke_expert_load_max_over_mean", "layer=\"2\"") == 1.5);
    assert_true(find_value(p, "convoke_link_bytes_total", "class=\"cross_node\"") == 3000000000000);
    assert_true(find_value(p, "vllm:kv_cache_usage_perc", "") == 0.25);
    assert_true(find_value(p, "vllm:prefix_cache_hits_total", "") == 60);
    assert_true(find_value(p, "convoke_plan_epoch", "") == 12);
    for (int i = 0; i < p->n_samples; i++) {
        assert_string_not_equal(p->samples[i].name, "convoke_plan_drift"); /* unknown: not shown */
        assert_null(strstr(p->samples[i].labels, "layer=\"7\""));
    }
    test_free(p);
    metrics_destroy(m);
}

enum { THREADS = 6, TURNS = 5000 };

static void *count_on(void *arg)
{
    metrics *m = arg;
    double load[4] = {1, 1, 1, 1};
    for (int i = 0; i < TURNS; i++) {
        metrics_inter_token(m, 0.001 * (i % 100));
        metrics_generated_tokens(m, 1);
        if (i % 100 == 0)
            metrics_workers(m, &(metric_workers){.load_max_over_mean = load, .n_layers = 1 + i % 4, .n_ranks = i % 7});
    }
    return NULL;
}

static void many_threads_lose_no_count(void **state)
{
    (void)state;
    metrics *m = make("demo");
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, count_on, m), 0);
    for (int i = 0; i < 20; i++)
        test_free(read_page(m)); /* whole at every moment */
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    page *p = read_page(m);
    assert_true(find_value(p, "vllm:generation_tokens_total", "") == THREADS * TURNS);
    assert_true(find_value(p, "vllm:inter_token_latency_seconds_count", "") == THREADS * TURNS);
    assert_true(fabs(find_value(p, "vllm:inter_token_latency_seconds_sum", "") - 0.0495 * THREADS * TURNS) < 1e-6);
    test_free(p);
    metrics_destroy(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a fresh page has every name dashboards expect, at zero", fresh_page_is_whole, NULL, NULL, NULL},
        {"any model name is a label", odd_model_names, NULL, NULL, NULL},
        {"a histogram counts what was seen; a bound belongs to its bucket", histogram_counts_what_was_seen, NULL, NULL, NULL},
        {"requests, tokens and steps are counted, what never happened is not", requests_and_steps_are_counted, NULL, NULL, NULL},
        {"what workers report is copied and may change its size", worker_reports_are_copied, NULL, NULL, NULL},
        {"many threads lose no count, and a page is whole at every moment", many_threads_lose_no_count, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
