#include "cluster/supervision.h"

#include <math.h>

/* The workers' own watch looks at the same limit and knows more: it speaks first. */
#define GRACE_SECONDS 0.5

/* Keeps the earliest deadline; true: it has passed. */
static bool is_over(double since, double limit, double now, double *wait)
{
    double left = since + limit - now;
    *wait = fmin(*wait, fmax(left, 0));
    return left <= 0;
}

supervision_verdict supervision_judge(const supervision *s, const patience *limits, double now, double *wait_seconds)
{
    double hang = limits->hang_seconds + GRACE_SECONDS;
    *wait_seconds = INFINITY;
    if (s->stopped > 0 && is_over(s->stopped, hang, now, wait_seconds))
        return SUPERVISION_STOPPED;
    if (s->phase == PHASE_CONNECTING)
        return limits->start_seconds > 0 && is_over(s->launched, limits->start_seconds, now, wait_seconds) ? SUPERVISION_NO_HELLO
                                                                                                           : SUPERVISION_FINE;
    if (is_over(s->heard, hang, now, wait_seconds))
        return SUPERVISION_SILENT;
    if (s->phase == PHASE_LOADING)
        return is_over(s->progressed, limits->load_seconds, now, wait_seconds) ? SUPERVISION_NO_PROGRESS : SUPERVISION_FINE;
    return s->has_work && is_over(s->stepped, hang, now, wait_seconds) ? SUPERVISION_NO_STEP : SUPERVISION_FINE;
}

static int count_within(const failure_history *h, double now)
{
    int n = 0, kept = h->n < FAILURE_HISTORY ? h->n : FAILURE_HISTORY;
    for (int i = 1; i <= kept; i++)
        n += now - h->times[(h->n - i) % FAILURE_HISTORY] <= h->window_seconds;
    return n;
}

failure_decision failure_note(failure_history *h, double now)
{
    h->times[h->n++ % FAILURE_HISTORY] = now;
    h->n_in_a_row++;
    int n = count_within(h, now);
    double pause = h->n_in_a_row <= 1 ? 0 : fmin(5, 0.25 * exp2(h->n_in_a_row - 2));
    return (failure_decision){.give_up = h->max_failures > 0 && n >= h->max_failures, .n_in_window = n, .pause_seconds = pause};
}

void failure_note_ready(failure_history *h)
{
    h->n_in_a_row = 0;
}
