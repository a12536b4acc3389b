#include "cluster/replan_policy.h"

#include <math.h>

const replan_limits replan_usual_limits = {
    .max_balance = 1.1, .max_drift = 0.1, .pause_seconds = 60, .longest_pause = 3600, .min_gain = 0.01, .payback_seconds = 600};

#define SURE 4.0 /* an excess counts when it is so many times its error */

/* ---- when ---- */

void replan_note(replan_history *h, const replan_limits *limits, replan_outcome outcome, double now)
{
    h->n_useless = outcome == REPLAN_LIVE ? 0 : h->n_useless + 1;
    h->next = now + fmin(ldexp(limits->pause_seconds, h->n_useless < 60 ? h->n_useless : 60),
                         fmax(limits->pause_seconds, limits->longest_pause));
}

bool replan_goes(replan_verdict v)
{
    return v == REPLAN_FOR_BALANCE || v == REPLAN_FOR_DRIFT || v == REPLAN_FOR_ASKER;
}

const char *replan_words(replan_verdict v)
{
    static const char *const words[] = {
        [REPLAN_FOR_BALANCE] = "the busiest rank computes too much",
        [REPLAN_FOR_DRIFT] = "traffic is not what the plan was made for",
        [REPLAN_FOR_ASKER] = "somebody asked",
        [REPLAN_ONE_RANK] = "one rank has nothing to share",
        [REPLAN_NOT_READY] = "the workers are not ready",
        [REPLAN_BUSY] = "a plan is being made or taken",
        [REPLAN_FEW_COUNTS] = "too few tokens were counted",
        [REPLAN_PAUSED] = "the last attempt was not long ago",
        [REPLAN_FINE] = "the plan is fine",
    };
    return words[v];
}

replan_verdict replan_judge(const replan_sight *s, const replan_history *h, const replan_limits *limits)
{
    if (s->n_ranks < 2)
        return s->ready || s->n_ranks == 1 ? REPLAN_ONE_RANK : REPLAN_NOT_READY;
    if (!s->ready)
        return REPLAN_NOT_READY;
    if (s->busy)
        return REPLAN_BUSY;
    if (s->tokens < 1)
        return REPLAN_FEW_COUNTS;
    if (s->asked)
        return REPLAN_FOR_ASKER;
    bool high = s->balance > limits->max_balance, moved = s->drift > limits->max_drift;
    bool high_for_sure = high && s->balance - 1 >= SURE * s->balance_error;
    bool moved_for_sure = moved && s->drift >= SURE * s->drift_error;
    if (!high && !moved)
        return REPLAN_FINE;
    if (!high_for_sure && !moved_for_sure)
        return REPLAN_FEW_COUNTS;
    if (s->now < h->next)
        return REPLAN_PAUSED;
    return high_for_sure ? REPLAN_FOR_BALANCE : REPLAN_FOR_DRIFT;
}

/* ---- errors of counting ---- */

double replan_balance_error(int n_ranks, double share, double tokens)
{
    double p = fmin(fmax(share, 0), 1);
    return tokens > 0 ? n_ranks * sqrt(p * (1 - p) / tokens) : INFINITY;
}

/* The largest of G normal deviations is about sqrt(2 ln G) of them. */
double replan_balance_floor(int n_ranks, double tokens)
{
    return n_ranks < 2 ? 1 : 1 + sqrt(2 * log(n_ranks)) * replan_balance_error(n_ranks, 1.0 / n_ranks, tokens);
}

/* What n draws from p add across the direction of p is n (1 - sum p^3 / sum p^2) in square on average, and 1 - cosine is half of
 * that over n^2 sum p^2. */
double replan_drift_error(const uint64_t *counts, int n, double draws)
{
    double sum = 0, squares = 0, cubes = 0;
    for (int i = 0; i < n; i++)
        sum += (double)counts[i];
    if (!(sum > 0) || !(draws > 0))
        return INFINITY;
    for (int i = 0; i < n; i++) {
        double p = (double)counts[i] / sum;
        squares += p * p;
        cubes += p * p * p;
    }
    return (1 - cubes / squares) / (2 * draws * squares);
}

/* ---- whether ---- */

static double saved_share(const replan_prospect *p)
{
    if (p->step_us_now > 0 && p->step_us_new > 0)
        return 1 - p->step_us_new / p->step_us_now;
    double excess = p->balance_now - 1, less = p->balance_now - p->balance_new;
    if (!(excess > 0) || !(p->step_seconds > 0))
        return 0;
    return fmin(p->excess_seconds / p->step_seconds / excess, 1 / p->balance_now) * less;
}

replan_gain replan_weigh(const replan_prospect *p, const replan_limits *limits)
{
    replan_gain g = {.saved_share = saved_share(p), .tokens = INFINITY, .seconds = INFINITY};
    if (p->tokens_per_step > 0 && g.saved_share > 0)
        g.saved_us = g.saved_share * p->step_seconds * 1e6 / p->tokens_per_step;
    if (g.saved_us > 0)
        g.tokens = p->work_seconds * 1e6 / g.saved_us;
    if (p->tokens_per_second > 0)
        g.seconds = g.tokens / p->tokens_per_second;
    bool replayed = p->step_us_now > 0 && p->step_us_new > 0;
    bool better = replayed ? p->step_us_new < p->step_us_now : p->balance_now - p->balance_new > 2 * p->balance_error;
    if (!better)
        g.worth = REPLAN_NO_BETTER;
    else if (g.saved_share < limits->min_gain)
        g.worth = REPLAN_TOO_LITTLE;
    else if (!(g.seconds <= limits->payback_seconds))
        g.worth = REPLAN_PAYS_TOO_LATE;
    else
        g.worth = REPLAN_PAYS;
    return g;
}
