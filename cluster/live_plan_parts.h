/* live_plan_parts.h - what live_plan.c (what is done) and live_plan_words.c (what is said of it) share. */
#ifndef CONVOKE_CLUSTER_LIVE_PLAN_PARTS_H
#define CONVOKE_CLUSTER_LIVE_PLAN_PARTS_H

#include "cluster/live_plan.h"
#include "cluster/plan_meter.h"
#include "cluster/replanner.h"
#include "cluster/routing_window.h"

#include <pthread.h>

/* What is in force, or is to be. */
typedef struct {
    plan plan;
    char *json; /* NULL: contiguous */
    size_t json_size;
    uint64_t *counts; /* [n_layers][n_experts] it was made from; NULL: unknown */
} known_plan;

struct live_plan {
    live_plan_options options;
    const live_plan_backend *backend;
    void *arg;
    char dir[4096], planner[4200];
    topology given; /* n_ranks 0: none */

    pthread_mutex_t lock; /* over what follows; held for moments only */
    /* the launch */
    bool ready;
    int n_ranks, n_nodes;
    topology topology;
    char model[128];
    known_plan present; /* plan.n_ranks 0: none yet */
    long long last_epoch;
    /* how it does */
    routing_window *window; /* NULL: no counts are asked for */
    uint64_t *first_counts; /* of this server, where the plan does not say what it was made from */
    uint64_t asked, rows_asked;
    bool under_way;
    double asked_at;
    bytes_writer incoming;
    uint32_t next_part;
    plan_meter meter;
    double balance, balance_error, drift, drift_error, *share_of_rank; /* share: [n_ranks] */
    bool has_numbers;
    /* the way to a better one */
    replan_history history;
    replan_verdict verdict;
    bool wanted;
    plan_take wanted_take;
    replanner *attempt;
    plan_take takes; /* of the attempt: never BY_MODE in mode apply */
    bool coming;
    known_plan next; /* on its way to the workers */
    uint64_t loaded_bytes, total_bytes;
    /* what it brought */
    bool measuring, save_due;
    plan_measure before;
    uint64_t outcomes[N_REPLAN_OUTCOMES];
    char last[1024]; /* how the last attempt went */
};

/* An attempt's plan, and whether it is worth taking. */
typedef struct {
    double bytes, move_seconds; /* at the bounded rate, of the rank that lacks most */
    replan_prospect prospect;
    replan_gain gain;
} replan_case;

static inline bool live_plan_has_one(const live_plan *lp)
{
    return lp->present.plan.n_ranks > 0;
}

/* One sentence each. */
void live_plan_say_case(const replan_result *r, const replan_case *c, const replan_limits *limits, char *to, size_t size);
void live_plan_say_brought(const live_plan *lp, const plan_measure *after, char *to, size_t size);

#endif
