#include "cluster/live_plan_parts.h"

#include "proto/console.h"
#include "proto/json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- sentences ---- */

/* "plan 3 would cut the busiest rank from 1.41x to 1.06x of the mean and move 212 MB in about 4 s; " */
static int say_move(const replan_result *r, const replan_case *c, char *to, size_t size)
{
    int n =
        snprintf(to, size, "plan %lld would %s the busiest rank from %.2fx to %.2fx of the mean and move %s", r->plan.epoch,
                 r->balance_new < r->balance_now ? "cut" : "take", r->balance_now, r->balance_new, human_bytes(c->bytes).text);
    if (c->move_seconds > 0)
        n += snprintf(to + n, size - (size_t)n, " in about %s", human_seconds(c->move_seconds).text);
    return n;
}

static const char *say_tokens(double tokens, char text[32])
{
    if (tokens >= 1e6)
        snprintf(text, 32, "%.1f M tokens", tokens * 1e-6);
    else if (tokens >= 1e4)
        snprintf(text, 32, "%.0f k tokens", tokens * 1e-3);
    else
        snprintf(text, 32, "%.0f tokens", ceil(tokens));
    return text;
}

static void say_worth(const replan_case *c, const replan_limits *limits, char *to, size_t size)
{
    char tokens[32];
    const replan_gain *g = &c->gain;
    switch (g->worth) {
    case REPLAN_PAYS:
        snprintf(to, size, "that saves %.1f %% of a step and pays after %s (%s at the present rate)", 100 * g->saved_share,
                 say_tokens(g->tokens, tokens), human_seconds(g->seconds).text);
        return;
    case REPLAN_NO_BETTER:
        snprintf(to, size, "that is no better, as far as counting can tell (error %.3f)", c->prospect.balance_error);
        return;
    case REPLAN_TOO_LITTLE:
        snprintf(to, size, "that saves %.2f %% of a step, less than the %.2f %% that are worth a move", 100 * g->saved_share,
                 100 * limits->min_gain);
        return;
    case REPLAN_PAYS_TOO_LATE:
        if (isinf(g->seconds))
            snprintf(to, size, "there is no traffic that would pay for it");
        else
            snprintf(to, size, "it would pay after %s only (%s at the present rate; %s are allowed)",
                     say_tokens(g->tokens, tokens), human_seconds(g->seconds).text, human_seconds(limits->payback_seconds).text);
        return;
    }
}

void live_plan_say_case(const replan_result *r, const replan_case *c, const replan_limits *limits, char *to, size_t size)
{
    int n = say_move(r, c, to, size);
    n += snprintf(to + n, size - (size_t)n, "; ");
    say_worth(c, limits, to + n, size - (size_t)n);
}

void live_plan_say_brought(const live_plan *lp, const plan_measure *after, char *to, size_t size)
{
    const plan_measure *b = &lp->before;
    double us_before = b->rows_per_step > 0 ? b->step_seconds * 1e6 / b->rows_per_step : 0;
    snprintf(
        to, size,
        "plan %lld after %llu steps: the busiest rank %.2fx of the mean (%.2fx before), %.0f us per token (%.0f), %s per token "
        "between ranks (%s)",
        lp->present.plan.epoch, (unsigned long long)after->steps, after->balance, b->balance,
        after->step_seconds * 1e6 / after->rows_per_step, us_before, human_bytes(after->link_bytes).text,
        human_bytes(b->link_bytes).text);
}

/* ---- for programs ---- */

static void describe_measure(cJSON *to, const plan_measure *m)
{
    cJSON_AddNumberToObject(to, "steps", (double)m->steps);
    cJSON_AddNumberToObject(to, "step_seconds", m->step_seconds);
    cJSON_AddNumberToObject(to, "tokens_per_step", m->rows_per_step);
    cJSON_AddNumberToObject(to, "tokens_per_second", m->rows_per_second);
    cJSON_AddNumberToObject(to, "excess_seconds", m->excess_seconds);
    cJSON_AddNumberToObject(to, "link_bytes_per_token", m->link_bytes);
    cJSON_AddNumberToObject(to, "max_over_mean", m->balance);
}

static void describe_window(const live_plan *lp, cJSON *to)
{
    cJSON_AddNumberToObject(to, "tokens", (double)routing_window_tokens(lp->window));
    if (!lp->has_numbers)
        return;
    cJSON_AddNumberToObject(to, "max_over_mean", lp->balance);
    cJSON_AddNumberToObject(to, "error", lp->balance_error);
    if (lp->drift >= 0)
        cJSON_AddNumberToObject(to, "drift", lp->drift);
    cJSON_AddItemToObject(to, "share_of_rank", cJSON_CreateDoubleArray(lp->share_of_rank, lp->n_ranks));
}

static cJSON *describe(const live_plan *lp)
{
    static const char *const modes[] = {"off", "suggest", "apply"};
    cJSON *o = cJSON_CreateObject();
    if (!o)
        return NULL;
    bool known = live_plan_has_one(lp);
    cJSON_AddStringToObject(o, "plan", known ? (lp->present.json ? lp->present.plan.name : "contiguous") : "");
    cJSON_AddNumberToObject(o, "epoch", known ? (double)lp->present.plan.epoch : 0);
    cJSON_AddNumberToObject(o, "ranks", lp->n_ranks);
    cJSON_AddNumberToObject(o, "nodes", lp->n_nodes);
    cJSON_AddStringToObject(o, "replan", modes[lp->options.mode]);
    cJSON_AddStringToObject(o, "state",
                            !lp->ready      ? "waiting for workers"
                            : lp->attempt   ? "planning"
                            : lp->coming    ? "moving experts"
                            : lp->measuring ? "measuring"
                                            : "serving");
    if (lp->window)
        describe_window(lp, cJSON_AddObjectToObject(o, "window"));
    plan_measure m = plan_meter_read(&lp->meter);
    describe_measure(cJSON_AddObjectToObject(o, "measured"), &m);
    if (lp->coming) {
        cJSON *next = cJSON_AddObjectToObject(o, "next");
        cJSON_AddNumberToObject(next, "epoch", (double)lp->next.plan.epoch);
        cJSON_AddNumberToObject(next, "loaded_bytes", (double)lp->loaded_bytes);
        cJSON_AddNumberToObject(next, "total_bytes", (double)lp->total_bytes);
    }
    cJSON_AddStringToObject(o, "verdict", lp->options.mode == REPLAN_OFF ? "replanning is off" : replan_words(lp->verdict));
    cJSON_AddStringToObject(o, "last", lp->last);
    return o;
}

void live_plan_describe(live_plan *lp, bytes_writer *out)
{
    pthread_mutex_lock(&lp->lock);
    cJSON *o = describe(lp);
    pthread_mutex_unlock(&lp->lock);
    char *text = o ? cJSON_PrintUnformatted(o) : NULL;
    cJSON_Delete(o);
    if (text)
        bytes_put(out, text, strlen(text));
    else
        out->failed = true;
    bytes_put(out, "\n", 1);
    cJSON_free(text);
}
