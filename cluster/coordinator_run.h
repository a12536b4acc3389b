/* coordinator_run.h - how `convoke serve` makes, turns and ends a coordinator. Doors see coordinator.h only. */
#ifndef CONVOKE_CLUSTER_COORDINATOR_RUN_H
#define CONVOKE_CLUSTER_COORDINATOR_RUN_H

#include "cluster/coordinator.h"
#include "cluster/job.h"
#include "cluster/live_plan.h"
#include "cluster/metrics.h"

typedef struct {
    job_options job;
    live_plan_options plan;   /* its model and given plan are the job's */
    const char *served_name;  /* NULL: the model folder's name */
    const char *journal_path; /* NULL: in memory */
    int journal_commit_ms;
    const char *admin_token_file; /* NULL: admins speak from loopback only */
    int max_waiting, max_sequences_of_request;
    size_t max_unread_bytes;
    double remember_seconds;
    bool log_requests;
    bool show_progress; /* a line while loading, on a terminal */
} coordinator_options;

status coordinator_create(const coordinator_options *options, coordinator **out);
/* Launches the workers. */
status coordinator_start(coordinator *c);
/* Ends workers and journal. Doors must have been stopped. */
void coordinator_destroy(coordinator *c); /* NULL is fine */

metrics *coordinator_metrics(coordinator *c);
/* Time passes: forgets, measures, says what the journal could not write. About four times a second. */
void coordinator_tick(coordinator *c);
bool coordinator_was_ready(coordinator *c);
/* Someone asked for the end (coordinator_shutdown). */
bool coordinator_is_draining(coordinator *c);
bool coordinator_is_idle(coordinator *c); /* no live request */
/* Ends what still runs; for the end of a drain. */
void coordinator_end_requests(coordinator *c);
/* The last word: what was served, and where the experts' work went. */
void coordinator_say_summary(coordinator *c);
/* Why the last launch ended, for the last word of a server that never was ready. */
void coordinator_last_sentence(coordinator *c, char *sentence, size_t size);

#endif
