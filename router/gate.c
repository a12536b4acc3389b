/* gate.c - the chain of gate.h, one row at a time.
 *
 *   scratch  scores [E]   what the weights come from
 *            keys [E]     what the choice is made by: scores + bias, -infinity where the group limit or the mask says no,
 *                         +infinity where an expert is forced. Without any of these, the scores themselves.
 *            merits [n_groups]
 *
 * Choosing is an insertion list of top_k keys: an expert enters only when its key is greater than the last one's, so equal keys
 * leave the lower expert in place, and a row of 512 experts costs little more than 512 comparisons. */
#include "router/gate.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

static void softmax_plain(const float *x, int n, float *y)
{
    float max = x[0], sum = 0;
    for (int i = 1; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (int i = 0; i < n; i++)
        sum += y[i] = expf(x[i] - max);
    for (int i = 0; i < n; i++)
        y[i] /= sum;
}

const gate_math gate_math_plain = {.softmax = softmax_plain};

/* ---- checking a policy ---- */

static status check_finite(const float *values, int n, const char *what)
{
    for (int e = 0; values && e < n; e++)
        if (!isfinite(values[e]))
            return status_fail(STATUS_BAD_INPUT, "gate: %s of expert %d is not finite", what, e);
    return STATUS_OK;
}

static status check_groups(const gate_policy *p)
{
    if (p->n_groups == 0 && p->keep_groups == 0)
        return STATUS_OK;
    if (p->n_groups < 1 || p->n_experts % p->n_groups != 0)
        return status_fail(STATUS_BAD_INPUT, "gate: %d experts do not divide into %d groups", p->n_experts, p->n_groups);
    if (p->keep_groups < 1 || p->keep_groups > p->n_groups)
        return status_fail(STATUS_BAD_INPUT, "gate: %d of %d groups cannot be kept", p->keep_groups, p->n_groups);
    return STATUS_OK;
}

static int count_in_group(const gate_policy *p, int group, int group_size)
{
    int n = 0;
    for (int e = group * group_size; e < (group + 1) * group_size; e++)
        n += !p->mask || p->mask[e] == GATE_NORMAL || p->mask[e] == GATE_NULL;
    return n;
}

/* The fewest experts a row can choose from: all that are neither off nor forced, in the keep_groups groups that have fewest. */
static int count_choosable(const gate_policy *p)
{
    int n_groups = p->n_groups ? p->n_groups : 1, left = p->n_groups ? p->keep_groups : 1, total = 0;
    int group_size = p->n_experts / n_groups;
    for (int size = 0; size <= group_size && left > 0; size++)
        for (int g = 0; g < n_groups && left > 0; g++)
            if (count_in_group(p, g, group_size) == size) {
                total += size;
                left--;
            }
    return total;
}

static status check_mask(const gate_policy *p)
{
    int n_forced = 0;
    for (int e = 0; p->mask && e < p->n_experts; e++) {
        if (p->mask[e] > GATE_NULL)
            return status_fail(STATUS_BAD_INPUT, "gate: mask of expert %d is %d, which means nothing", e, p->mask[e]);
        n_forced += p->mask[e] == GATE_FORCED;
    }
    if (n_forced > p->top_k)
        return status_fail(STATUS_BAD_INPUT, "gate: %d experts are forced, but a token gets only %d", n_forced, p->top_k);
    int choosable = count_choosable(p);
    if (choosable + n_forced < p->top_k)
        return status_fail(STATUS_BAD_INPUT, "gate: a token needs %d experts, but mask and groups may leave only %d", p->top_k,
                           choosable + n_forced);
    return STATUS_OK;
}

status gate_policy_check(const gate_policy *p)
{
    if (p->n_experts < 1 || p->n_experts > (int)GATE_NO_EXPERT)
        return status_fail(STATUS_BAD_INPUT, "gate: %d experts are outside 1 to %u", p->n_experts, GATE_NO_EXPERT);
    if (p->top_k < 1 || p->top_k > p->n_experts)
        return status_fail(STATUS_BAD_INPUT, "gate: top-%d of %d experts cannot be chosen", p->top_k, p->n_experts);
    if (p->score != GATE_SOFTMAX && p->score != GATE_SIGMOID && p->score != GATE_SQRT_SOFTPLUS)
        return status_fail(STATUS_BAD_INPUT, "gate: score function %d is unknown", (int)p->score);
    if (!(p->top_p >= 0) || !isfinite(p->top_p))
        return status_fail(STATUS_BAD_INPUT, "gate: top-p is %g, not a number from 0 up", (double)p->top_p);
    if (p->k_min < 0 || p->k_min > p->top_k)
        return status_fail(STATUS_BAD_INPUT, "gate: at least %d of at most %d experts cannot be kept", p->k_min, p->top_k);
    if (!(p->scale > 0) || !isfinite(p->scale)) /* 0 would be a policy that somebody forgot to fill in */
        return status_fail(STATUS_BAD_INPUT, "gate: scale is %g, not a number above 0", (double)p->scale);
    TRY(check_finite(p->bias, p->n_experts, "bias"));
    TRY(check_finite(p->multiply, p->n_experts, "multiplier"));
    TRY(check_groups(p));
    return check_mask(p);
}

/* ---- one row ---- */

static status check_logits(const float *logits, int n)
{
    /* One branch-free pass that a compiler can vectorise; the expert is only looked for when there is something to say. */
    int bad = 0, above = 0;
    for (int e = 0; e < n; e++) {
        bad |= !(logits[e] < INFINITY);
        above |= logits[e] > -INFINITY;
    }
    if (!bad && above)
        return STATUS_OK;
    for (int e = 0; e < n; e++)
        if (!(logits[e] < INFINITY))
            return status_fail(STATUS_BAD_INPUT, "gate: the logit of expert %d is %s", e, isnan(logits[e]) ? "NaN" : "infinite");
    return status_fail(STATUS_BAD_INPUT, "gate: every logit is -infinity");
}

static void score(const gate_policy *p, const gate_math *math, const float *logits, float *scores)
{
    switch (p->score) {
    case GATE_SOFTMAX:
        math->softmax(logits, p->n_experts, scores);
        return;
    case GATE_SIGMOID:
        for (int e = 0; e < p->n_experts; e++)
            scores[e] = (float)(1 / (1 + exp(-(double)logits[e])));
        return;
    case GATE_SQRT_SOFTPLUS: /* softplus(x) = max(x, 0) + log(1 + exp(-|x|)), which neither overflows nor loses small x */
        for (int e = 0; e < p->n_experts; e++) {
            double x = (double)logits[e];
            scores[e] = (float)sqrt((x > 0 ? x : 0) + log1p(exp(-fabs(x))));
        }
        return;
    }
}

/* Puts (key, e) into the list [n], falling by key; equal keys stay before it. The last one falls out when all `n` places are
 * used. */
static void insert(float key, int e, int n, float *keys, uint16_t *experts)
{
    int at = n - 1;
    for (; at > 0 && keys[at - 1] < key; at--) {
        keys[at] = keys[at - 1];
        experts[at] = experts[at - 1];
    }
    keys[at] = key;
    experts[at] = (uint16_t)e;
}

static float group_merit(const float *keys, int n)
{
    float first = -INFINITY, second = -INFINITY;
    for (int e = 0; e < n; e++) {
        if (keys[e] > first) {
            second = first;
            first = keys[e];
        } else if (keys[e] > second) {
            second = keys[e];
        }
    }
    return n > 1 ? first + second : first;
}

/* A group stays when fewer than keep_groups are better; of two equal ones the lower counts as better. */
static void limit_groups(const gate_policy *p, float *merits, float *keys)
{
    int n = p->n_experts / p->n_groups;
    for (int g = 0; g < p->n_groups; g++)
        merits[g] = group_merit(keys + g * n, n);
    for (int g = 0; g < p->n_groups; g++) {
        int better = 0;
        for (int other = 0; other < p->n_groups; other++)
            better += merits[other] > merits[g] || (merits[other] == merits[g] && other < g);
        for (int e = g * n; better >= p->keep_groups && e < (g + 1) * n; e++)
            keys[e] = -INFINITY;
    }
}

/* What the choice is made by: the scores themselves, or a changed copy. */
static const float *make_keys(const gate_policy *p, const float *scores, float *scratch)
{
    float *keys = scratch + p->n_experts, *merits = keys + p->n_experts;
    if (!p->bias && !p->n_groups && !p->mask)
        return scores;
    for (int e = 0; e < p->n_experts; e++)
        keys[e] = p->bias ? scores[e] + p->bias[e] : scores[e];
    if (p->n_groups)
        limit_groups(p, merits, keys);
    for (int e = 0; p->mask && e < p->n_experts; e++)
        if (p->mask[e] == GATE_OFF || p->mask[e] == GATE_FORCED)
            keys[e] = p->mask[e] == GATE_OFF ? -INFINITY : INFINITY;
    return keys;
}

/* The top_k greatest keys; their experts, ties to the lower one. */
static void pick_best(const float *keys, int n, int k, float *best, uint16_t *experts)
{
    for (int i = 0; i < k; i++) {
        best[i] = -INFINITY;
        experts[i] = GATE_NO_EXPERT;
    }
    for (int e = 0; e < n; e++)
        if (keys[e] > best[k - 1])
            insert(keys[e], e, k, best, experts);
}

/* Chosen by key; from here on the score counts. Sorts by falling score (ties: lower expert), leaving null experts out; returns
 * how many are left. Works in place: what is read is never behind what is written. */
static int order_by_score(const gate_policy *p, const float *scores, int n_chosen, uint16_t *experts, float *weights)
{
    int n = 0;
    for (int i = 0; i < n_chosen; i++) {
        uint16_t e = experts[i];
        if (e == GATE_NO_EXPERT || (p->mask && p->mask[e] == GATE_NULL))
            continue;
        float s = scores[e];
        int at = n++;
        for (; at > 0 && (weights[at - 1] < s || (weights[at - 1] == s && experts[at - 1] > e)); at--) {
            weights[at] = weights[at - 1];
            experts[at] = experts[at - 1];
        }
        weights[at] = s;
        experts[at] = e;
    }
    return n;
}

/* Keeps the smallest prefix whose scores add up to more than top_p (and k_min, and whatever is forced); returns how many. */
static int cut(const gate_policy *p, int n, uint16_t *experts, float *weights)
{
    float sum = 0;
    int kept = 0;
    bool enough = false;
    for (int i = 0; i < n; i++) {
        if (enough && !(p->mask && p->mask[experts[i]] == GATE_FORCED))
            continue;
        sum += weights[i];
        weights[kept] = weights[i];
        experts[kept++] = experts[i];
        enough = sum > p->top_p && kept >= p->k_min;
    }
    return kept;
}

static void weigh(const gate_policy *p, int n, const uint16_t *experts, float *weights)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += weights[i];
    for (int i = 0; i < n; i++) {
        if (p->normalise && sum > 0) /* all zero: sigmoids of very negative logits; zero they stay */
            weights[i] /= sum;
        weights[i] *= p->scale;
        if (p->multiply)
            weights[i] *= p->multiply[experts[i]];
    }
}

status gate_choose(const gate_policy *p, const gate_math *math, const float *logits, float *scratch, uint16_t *experts,
                   float *weights)
{
    TRY(check_logits(logits, p->n_experts));
    score(p, math ? math : &gate_math_plain, logits, scratch);
    pick_best(make_keys(p, scratch, scratch), p->n_experts, p->top_k, weights, experts);
    int n = p->top_k;
    if (p->bias || p->mask || p->n_groups) /* otherwise the keys were the scores: in order already */
        n = order_by_score(p, scratch, n, experts, weights);
    if (p->top_p > 0)
        n = cut(p, n, experts, weights);
    weigh(p, n, experts, weights);
    for (int i = n; i < p->top_k; i++) {
        experts[i] = GATE_NO_EXPERT;
        weights[i] = 0;
    }
    return STATUS_OK;
}
