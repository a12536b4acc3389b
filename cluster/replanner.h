/* replanner.h - one attempt at a new plan: convoke-plan as a child, on a thread of its own, within a time limit.
 *
 *   statistics ─► files in a private folder ─► convoke-plan solve ─► the plan, read and checked ─► convoke-plan diff ─► result
 *
 * Whatever the child does (hangs, crashes, prints rubbish, writes a plan for something else) ends as a sentence. It and
 * everything it started are ended when time is over, or when the attempt is given up; nothing stays behind. It runs niced. */
#ifndef CONVOKE_CLUSTER_REPLANNER_H
#define CONVOKE_CLUSTER_REPLANNER_H

#include "placement/plan.h"
#include "placement/routing_stats.h"
#include "placement/topology.h"

typedef struct replanner replanner;

#define REPLANNER_GRACE 10.0 /* for reading and writing files, beyond the solver's seconds */

/* All pointers but `stats` are borrowed for the call. */
typedef struct {
    const char *program; /* convoke-plan */
    const char *solver;  /* NULL: auto */
    double seconds;      /* for the solver; with REPLANNER_GRACE for all of it */
    int threads;         /* of the solver */
    int extra_slots;     /* per rank and layer: room for replicas */
    double grace;        /* 0: REPLANNER_GRACE */
    const topology *topology;
    const plan *present;    /* in force */
    const char *model_name; /* "" when unknown */
    const char *name;       /* of the new plan */
    long long epoch;
    routing_stats *stats[2]; /* their sum is what is planned for; the attempt's from here on (either may be NULL) */
} replan_request;

typedef struct {
    status st; /* why there is no plan: the sentence is `why` */
    char why[700];
    routing_stats *stats; /* the sum; NULL: lost */
    uint64_t *counts;     /* [n_layers][n_experts] of it */
    uint64_t tokens;
    plan plan;
    char *json; /* the plan as it is sent and kept, with its counts and what the planner says of it */
    size_t json_size;
    double balance_now, balance_new; /* busiest rank over mean, mean over layers, of both plans on these counts; the new one's
                                        not below what it can be on others (replan_balance_floor()) */
    double error;                    /* one standard error of balance_now */
    int n_copies;                    /* that ranks do not have yet; in all, and of the rank that lacks most */
    int most_copies;
    double link_seconds;             /* as the planner prices the move; negative: it does not say */
    double step_us_now, step_us_new; /* 0: it does not say */
    double took;
} replan_result;

/* Statistics are the attempt's only on success. */
status replanner_start(const replan_request *request, replanner **out);
/* Whether replanner_finish() returns at once. */
bool replanner_done(const replanner *r);
/* Waits for the end; what is in *out is the caller's (replan_result_clear()). Frees. */
void replanner_finish(replanner *r, replan_result *out);
/* Gives it up: ends the child and returns when nothing of it is left. NULL is fine. */
void replanner_cancel(replanner *r);
void replan_result_clear(replan_result *r);

/* Copies that ranks hold in `to` and not in `from`: in all, and of the rank with most. Both of one shape. Pure. */
void replan_count_copies(const plan *from, const plan *to, int *n_copies, int *most_copies);
/* Busiest rank over mean, mean over layers; *error (may be NULL): one standard error, `tokens` having been counted. */
status replan_measure(const plan *p, const uint64_t *counts, double tokens, double *balance, double *error);

#endif
