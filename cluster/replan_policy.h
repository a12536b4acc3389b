/* replan_policy.h - when to ask for a new plan, and whether to take it. Pure: numbers in, a decision out.
 *
 *   counts of the window ─► judge: plan now, or why not yet ─► (convoke-plan) ─► weigh: does the gain pay for the move?
 *
 * A new plan is asked for when the busiest rank computes too much, or traffic is no longer what the plan was made for, and both
 * by more than the error of counting. What came to nothing is not tried again soon: each useless attempt doubles the pause. */
#ifndef CONVOKE_CLUSTER_REPLAN_POLICY_H
#define CONVOKE_CLUSTER_REPLAN_POLICY_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    double max_balance;     /* busiest rank over mean that is still fine */
    double max_drift;       /* drift_level() (placement/drift.h) that is still fine */
    double pause_seconds;   /* from the end of an attempt to the next */
    double longest_pause;   /* ... at most, after useless ones */
    double min_gain;        /* share of a step's time below which no plan is worth a move */
    double payback_seconds; /* a move that takes longer to pay is refused: traffic will have changed */
} replan_limits;

extern const replan_limits replan_usual_limits;

/* Whether a plan that somebody asks for is put in force. */
typedef enum { TAKE_BY_MODE, TAKE_IF_IT_PAYS, TAKE_ALWAYS } plan_take;

/* ---- when to plan -------------------------------------------------------------------------------------------------------- */

typedef struct {
    double next;   /* not before this, unless somebody asks */
    int n_useless; /* in a row */
} replan_history;

typedef enum {
    REPLAN_LIVE,      /* the plan is in force */
    REPLAN_SUGGESTED, /* it would pay, and people were told */
    REPLAN_USELESS,   /* nothing better, or nothing that pays */
    REPLAN_FAILED,    /* the planner or the workers did not do it */
} replan_outcome;

void replan_note(replan_history *h, const replan_limits *limits, replan_outcome outcome, double now);

/* What can be seen now. */
typedef struct {
    double now;
    int n_ranks;
    bool ready;                    /* workers serve */
    bool busy;                     /* a planner runs, or a plan is on its way */
    bool asked;                    /* somebody wants a plan, whatever the limits say */
    double tokens;                 /* counted */
    double balance, balance_error; /* busiest rank over mean, mean over layers; one standard error */
    double drift, drift_error;     /* error: what counting alone would show if nothing had moved; drift < 0: unknown */
} replan_sight;

typedef enum {
    REPLAN_FOR_BALANCE, /* plan now, because */
    REPLAN_FOR_DRIFT,
    REPLAN_FOR_ASKER,
    REPLAN_ONE_RANK, /* not now, because */
    REPLAN_NOT_READY,
    REPLAN_BUSY,
    REPLAN_FEW_COUNTS,
    REPLAN_PAUSED,
    REPLAN_FINE,
} replan_verdict;

replan_verdict replan_judge(const replan_sight *s, const replan_history *h, const replan_limits *limits);
bool replan_goes(replan_verdict v);
const char *replan_words(replan_verdict v); /* "the busiest rank computes too much" */

/* ---- errors of counting ---------------------------------------------------------------------------------------------------- */

/* One standard error of a rank's load over the mean, tokens taken as draws: `share` of a layer's rows lands on the rank. */
double replan_balance_error(int n_ranks, double share, double tokens);
/* Busiest rank over mean to be expected, on other tokens, of a plan that balances so many counted ones perfectly: what is fitted
 * to draws fits their chance as well. */
double replan_balance_floor(int n_ranks, double tokens);
/* The drift that `draws` would show on average against the very distribution they come from (n probabilities). */
double replan_drift_error(const uint64_t *counts, int n, double draws);

/* ---- whether to take it ------------------------------------------------------------------------------------------------------
 */

typedef struct {
    double balance_now, balance_new, balance_error; /* on the same counts */
    double step_us_now, step_us_new;                /* replayed by the planner; 0: it could not */
    /* as the workers measured it lately */
    double step_seconds;      /* of a step with work */
    double excess_seconds;    /* of it: the busiest rank computes so much longer than the mean of all */
    double tokens_per_step;   /* rows */
    double tokens_per_second; /* 0: no traffic */
    /* what the move takes */
    double work_seconds; /* of the links, or of whatever copies the experts */
} replan_prospect;

typedef enum {
    REPLAN_PAYS,
    REPLAN_NO_BETTER,     /* no better, or not by more than the error of counting */
    REPLAN_TOO_LITTLE,    /* of a step */
    REPLAN_PAYS_TOO_LATE, /* at the present traffic */
} replan_worth;

typedef struct {
    replan_worth worth;
    double saved_share; /* of a step's time */
    double saved_us;    /* per token */
    double tokens;      /* after which the move has paid; infinite: never */
    double seconds;     /* that is at the present traffic; infinite without any */
} replan_gain;

/* The share of a step that a plan saves: from replayed step times where the planner has them; else what the busiest rank is
 * measured to compute longer than the others, as far as the plan takes it away, and never more than if a step were nothing but
 * experts' work. */
replan_gain replan_weigh(const replan_prospect *p, const replan_limits *limits);

#endif
