/* metrics.h - counters, gauges and histograms of the coordinator, and their text for Prometheus. Any thread; no locks to wait on
 * for long. Names: dashboards made for vLLM find theirs ("vllm:..."), Convoke's own stand beside them ("convoke_..."). */
#ifndef CONVOKE_CLUSTER_METRICS_H
#define CONVOKE_CLUSTER_METRICS_H

#include "proto/bytes.h"
#include "proto/status.h"

#include <stdint.h>

typedef struct metrics metrics;

status metrics_create(const char *model_name, metrics **out);
void metrics_destroy(metrics *m); /* NULL is fine */

typedef enum { METRIC_SUCCESS_STOP, METRIC_SUCCESS_LENGTH, METRIC_SUCCESS_ABORT, METRIC_SUCCESS_ERROR } metric_finish;

/* One sequence is over; times in seconds, negative: it never got there. first_token is for the caller's log: it was counted by
 * metrics_first_token(). */
typedef struct {
    metric_finish finish;
    int n_prompt, n_output;
    double queue, prefill, decode, inference, whole, first_token;
} metric_request;
void metrics_request_done(metrics *m, const metric_request *r);
void metrics_first_token(metrics *m, double seconds);
void metrics_inter_token(metrics *m, double seconds);
void metrics_prompt_tokens(metrics *m, int n);
void metrics_generated_tokens(metrics *m, int n);
void metrics_step(metrics *m, double seconds, int prefill_rows, int decode_rows);

/* Gauges and counters that the workers report, set as they come. Arrays are copied; their sizes may grow. */
typedef struct {
    int n_running, n_waiting;
    double kv_usage;
    uint64_t n_preempted, prefix_queries, prefix_hits;
    const uint64_t *rows_of_rank; /* [n_ranks] */
    const double *lateness_of_rank;
    int n_ranks;
    uint64_t link_bytes[3]; /* same rank, same node, cross node */
    const double *load_max_over_mean;
    const int *layer_numbers;
    int n_layers;
    uint64_t plan_epoch, launches;
} metric_workers;
void metrics_workers(metrics *m, const metric_workers *w);

/* How the plan in force does on the traffic of late. Before the first call nothing of it is shown. */
enum { N_METRIC_ATTEMPTS = 4 };
typedef struct {
    double balance, drift;                /* negative: unknown, not shown */
    uint64_t tokens;                      /* that they were counted over */
    uint64_t attempts[N_METRIC_ATTEMPTS]; /* at a new plan: live, suggested, useless, failed */
    const double *share_of_rank;          /* [n_ranks] of the rows, as the plan places them; copied */
    int n_ranks;
} metric_plan;
void metrics_plan(metrics *m, const metric_plan *p);

/* Text exposition format 0.0.4 appended to `out` (out->failed: no memory). */
void metrics_render(metrics *m, bytes_writer *out);

#endif
