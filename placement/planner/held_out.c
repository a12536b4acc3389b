#include "placement/planner/held_out.h"
#include "placement/drift.h"
#include "placement/planner/score.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- parts of traffic ---- */

static void copy_sequence(const traffic *t, int s, traffic *into)
{
    int64_t from = t->first_token[s], n = t->first_token[s + 1] - from, to = into->n_tokens;
    memcpy(into->phase + to, t->phase + from, (size_t)n * sizeof *t->phase);
    into->domain[into->n_sequences++] = t->domain[s];
    into->n_tokens += n;
    into->first_token[into->n_sequences] = into->n_tokens;
}

static status select_sequences(const traffic *t, const bool *wanted, traffic *out)
{
    traffic part = {0};
    int n_sequences = 0;
    int64_t n_tokens = 0, at = 0;
    for (int s = 0; s < t->n_sequences; s++) {
        n_sequences += wanted[s];
        n_tokens += wanted[s] ? t->first_token[s + 1] - t->first_token[s] : 0;
    }
    size_t k = (size_t)t->shape.top_k, layers = (size_t)t->shape.n_layers;
    TRY(routing_shape_copy(&t->shape, &part.shape));
    part.first_token = calloc((size_t)n_sequences + 1, sizeof *part.first_token);
    part.domain = calloc((size_t)n_sequences + 1, sizeof *part.domain);
    part.phase = calloc((size_t)n_tokens + 1, sizeof *part.phase);
    part.experts = malloc(layers * (size_t)n_tokens * k * sizeof *part.experts + 1);
    if (!part.first_token || !part.domain || !part.phase || !part.experts) {
        traffic_clear(&part);
        return status_fail(STATUS_NO_MEMORY, "no memory for a part of the traffic");
    }
    for (int s = 0; s < t->n_sequences; s++)
        if (wanted[s])
            copy_sequence(t, s, &part);
    for (int s = 0; s < t->n_sequences; s++) {
        int64_t n = t->first_token[s + 1] - t->first_token[s];
        for (size_t l = 0; wanted[s] && l < layers; l++)
            memcpy(part.experts + (l * (size_t)n_tokens + (size_t)at) * k, traffic_experts(t, (int)l, t->first_token[s]),
                   (size_t)n * k * sizeof *part.experts);
        at += wanted[s] ? n : 0;
    }
    *out = part;
    return STATUS_OK;
}

static status order_domains(const routing_shape *shape, int **place)
{
    *place = calloc((size_t)shape->n_domains, sizeof **place);
    if (!*place)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d domains", shape->n_domains);
    for (int d = 0; d < shape->n_domains; d++)
        for (int other = 0; other < shape->n_domains; other++)
            (*place)[d] += strcmp(shape->domains[other], shape->domains[d]) < 0;
    return STATUS_OK;
}

/* ---- one fold ---- */

typedef struct {
    double step_us, contiguous_us, balance;
} measured;

static status measure(const problem *p, const plan *made, const plan *contiguous, measured *out)
{
    out->balance = score_balance(p, made, NULL, NULL);
    TRY(score_step_us(p, made, &out->step_us));
    return score_step_us(p, contiguous, &out->contiguous_us);
}

static status run_fold(const solver *s, const problem_request *request, const traffic *fit, const traffic *held,
                       held_out_result *sum)
{
    problem_request fit_request = *request, held_request = *request;
    fit_request.traffic = fit;
    held_request.traffic = held;
    fit_request.stats = held_request.stats = NULL;
    held_request.slack = -1; /* the plan was made to keep it on the other part */
    problem *a = NULL, *b = NULL;
    plan made = {0}, contiguous = {0};
    measured on_fit, on_held;
    solver_report report;
    uint64_t *counts = calloc(2 * (size_t)fit->shape.n_layers * (size_t)fit->shape.n_experts, sizeof *counts);
    drift_of_layer *layers = calloc((size_t)fit->shape.n_layers, sizeof *layers);
    status st = counts && layers ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for a fold");
    TRY_GOTO(st, out);
    TRY_GOTO(problem_create(&fit_request, true, &a), out);
    TRY_GOTO(problem_create(&held_request, false, &b), out);
    TRY_GOTO(solver_run(s, a, &report, &made), out);
    plan_shape shape = {
        .n_ranks = a->n_ranks, .n_experts = a->n_experts, .n_layers = a->n_layers, .layer_numbers = a->layer_numbers};
    TRY_GOTO(plan_contiguous(&shape, a->topology->node_of_rank, &contiguous), out);
    TRY_GOTO(measure(a, &made, &contiguous, &on_fit), out);
    TRY_GOTO(measure(b, &made, &contiguous, &on_held), out);
    uint64_t *live = counts + (size_t)a->n_layers * (size_t)a->n_experts;
    traffic_count(fit, counts);
    traffic_count(held, live);
    drift_compare(a->n_layers, a->n_experts, counts, live, layers);
    if (!(on_fit.contiguous_us > 0) || !(on_held.contiguous_us > 0))
        TRY_GOTO(status_fail(STATUS_BAD_INPUT, "its tokens chose no expert"), out);
    double ratio = on_held.step_us / on_held.contiguous_us;
    sum->n_folds++;
    sum->fitted += on_fit.step_us / on_fit.contiguous_us;
    sum->held += ratio;
    sum->held_worst = ratio > sum->held_worst ? ratio : sum->held_worst;
    sum->balance_fitted += on_fit.balance;
    sum->balance_held += on_held.balance;
    sum->drift += drift_level(a->n_layers, layers);
out:
    free(counts);
    free(layers);
    plan_clear(&made);
    plan_clear(&contiguous);
    problem_destroy(a);
    problem_destroy(b);
    return st;
}

/* ---- all folds ---- */

static int part_of(const traffic *t, const int *place, int n_folds, fold_kind kind, int sequence)
{
    if (kind == FOLD_BY_DOMAIN)
        return place[t->domain[sequence]] % n_folds;
    return (int)((long long)sequence * n_folds / t->n_sequences);
}

static bool too_few(const problem_request *r, const traffic *fit, const traffic *held, char *why, size_t why_size)
{
    int least = fit->n_sequences < held->n_sequences ? fit->n_sequences : held->n_sequences;
    if (least >= r->replay.concurrency)
        return false;
    snprintf(why, why_size, "a part has only %d sequences, fewer than the %d of the replay", least, r->replay.concurrency);
    return true;
}

static void take_means(held_out_result *r)
{
    double n = r->n_folds;
    r->fitted /= n;
    r->held /= n;
    r->balance_fitted /= n;
    r->balance_held /= n;
    r->drift /= n;
}

status held_out_run(const solver *s, const problem_request *request, int n_folds, fold_kind kind, held_out_result *out, char *why,
                    size_t why_size)
{
    const traffic *t = request->traffic;
    int most = kind == FOLD_BY_DOMAIN ? t->shape.n_domains : t->n_sequences, *place;
    n_folds = n_folds < most ? n_folds : most;
    *out = (held_out_result){0};
    if (n_folds < 2) {
        snprintf(why, why_size, "there is only one %s", kind == FOLD_BY_DOMAIN ? "domain" : "sequence");
        return STATUS_OK;
    }
    TRY(order_domains(&t->shape, &place));
    held_out_result sum = {0};
    bool *wanted = calloc((size_t)t->n_sequences, sizeof *wanted), few = false; /* few: nothing more to hold out */
    status st = wanted ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for folds");
    for (int fold = 0; st == STATUS_OK && !few && fold < n_folds; fold++) {
        traffic fit = {0}, held = {0};
        for (int i = 0; i < t->n_sequences; i++)
            wanted[i] = part_of(t, place, n_folds, kind, i) == fold;
        st = select_sequences(t, wanted, &held);
        for (int i = 0; i < t->n_sequences; i++)
            wanted[i] = !wanted[i];
        if (st == STATUS_OK)
            st = select_sequences(t, wanted, &fit);
        few = st == STATUS_OK && too_few(request, &fit, &held, why, why_size);
        if (st == STATUS_OK && !few)
            st = run_fold(s, request, &fit, &held, &sum);
        if (st == STATUS_BAD_INPUT) { /* what all of the traffic allows, a part of it may not: slack, above all */
            snprintf(why, why_size, "a part of the traffic cannot be planned for: %s", status_message());
            st = STATUS_OK;
            few = true;
        }
        traffic_clear(&fit);
        traffic_clear(&held);
    }
    free(wanted);
    free(place);
    if (st == STATUS_OK && !few && sum.n_folds) {
        take_means(&sum);
        *out = sum;
    }
    return st;
}
