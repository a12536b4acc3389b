/* live_plan.h - the plan in force, how it does on live traffic, and the way to a better one.
 *
 *   workers ─ counts ─► routing_window ─► balance, drift ─► replan_policy: plan now? ─► replanner (convoke-plan, a child)
 *           ─ steps ──► plan_meter ──────────────────────────────┐                          │ a plan
 *           ◄─ Replan ─ (mode apply) ◄─ replan_policy: does it pay? ◄────────────────────────┘
 *           ─ live ───► in force; kept for the next start; measured again after MEASURE_STEPS steps
 *
 * Nothing here waits: reports and counts come on the job's thread, time passes on the main one, doors only look and ask. */
#ifndef CONVOKE_CLUSTER_LIVE_PLAN_H
#define CONVOKE_CLUSTER_LIVE_PLAN_H

#include "cluster/job.h"
#include "cluster/replan_policy.h"
#include "proto/bytes.h"

typedef enum { REPLAN_OFF, REPLAN_SUGGEST, REPLAN_APPLY } replan_mode;

typedef struct {
    replan_mode mode;
    bool automatic;            /* begin with the plan that was kept, and keep what goes live */
    const char *plan_path;     /* given by hand; NULL: none */
    const char *dir;           /* of kept plans; NULL: plan_store_usual_dir() */
    const char *planner;       /* NULL: convoke-plan beside this program or on PATH */
    const char *topology_path; /* NULL: constants of a small CPU rank */
    const char *model_dir;
    const char *solver;        /* convoke-plan's; NULL: auto */
    double statistics_seconds; /* how often counts are asked for; 0: never */
    double plan_seconds;       /* of the solver */
    int plan_threads, extra_slots;
    uint64_t window_tokens;
    uint64_t bytes_per_second; /* of a rank's loading; 0: the workers choose */
    replan_limits limits;
} live_plan_options;

/* Called without locks of this object held. */
typedef struct {
    bool (*ask_statistics)(void *arg, uint64_t id);
    bool (*send)(void *arg, const job_plan *plan, uint64_t bytes_per_second);
    void (*live)(void *arg, const char *name, uint64_t epoch); /* another plan is in force; on the job's thread */
} live_plan_backend;

typedef struct live_plan live_plan;

/* Strings of the options are borrowed. Refuses what cannot work: no planner, no folder, a topology for other ranks. */
status live_plan_create(const live_plan_options *options, const live_plan_backend *backend, void *arg, live_plan **out);
/* Ends a planner that still runs. NULL is fine. */
void live_plan_destroy(live_plan *lp);

/* ---- on the job's thread, as job_listener says ---- */
bool live_plan_begin(live_plan *lp, const Convoke__Control__Hello *hello, job_plan *out);
void live_plan_ready(live_plan *lp, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello);
void live_plan_lost(live_plan *lp);
void live_plan_report(live_plan *lp, const Convoke__Control__Report *report);
void live_plan_statistics(live_plan *lp, const Convoke__Control__Statistics *statistics);

/* ---- on the main thread, some times a second ---- */
void live_plan_tick(live_plan *lp);

/* ---- any thread ---- */
/* Somebody wants a plan now (coordinator_replan()). STATUS_UNSUPPORTED: replanning is off; STATUS_STOPPED: why it cannot be now.
 */
status live_plan_ask(live_plan *lp, plan_take take);
/* The plan in force, what is known of it, and how the last attempt went, as JSON. */
void live_plan_describe(live_plan *lp, bytes_writer *out);

enum { N_REPLAN_OUTCOMES = REPLAN_FAILED + 1 };
typedef struct {
    double balance, drift; /* negative: unknown */
    uint64_t tokens;       /* in the window */
    uint64_t outcomes[N_REPLAN_OUTCOMES];
    int n_ranks;
    const double *share_of_rank; /* [n_ranks] of the window's rows, as the plan places them */
} live_plan_numbers;
/* Calls `show` with the numbers of now, which are its own for the call. */
void live_plan_look(live_plan *lp, void (*show)(void *arg, const live_plan_numbers *numbers), void *arg);

#endif
