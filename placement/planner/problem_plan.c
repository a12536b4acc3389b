/* Plans for a problem: from a home per expert, with replicas, and the check that a plan keeps the problem's room and slack. */
#include "placement/planner/problem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static status start_plan(const problem *p, const char *name, const int *n_copies, plan *out)
{
    plan_shape shape = {
        .n_ranks = p->n_ranks, .n_experts = p->n_experts, .n_layers = p->n_layers, .layer_numbers = p->layer_numbers};
    TRY(plan_create(name, &shape, p->topology->node_of_rank, n_copies, out));
    snprintf(out->name, sizeof out->name, "%s", name);
    return STATUS_OK;
}

status problem_plan(const problem *p, const char *name, const int *home, plan *out)
{
    TRY(start_plan(p, name, NULL, out));
    memcpy(out->copy_ranks, home, problem_at(p, p->n_layers, 0) * sizeof *home);
    return STATUS_OK;
}

static int count_copies(const bool *holds, int n_ranks, int home)
{
    int n = 1;
    for (int g = 0; g < n_ranks; g++)
        n += g != home && holds[g];
    return n;
}

status problem_plan_replicas(const problem *p, const char *name, const int *home, const bool *holds, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    int *n_copies = calloc(n_lists, sizeof *n_copies);
    if (!n_copies)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists);
    for (size_t i = 0; i < n_lists; i++)
        n_copies[i] = count_copies(holds + i * ranks, p->n_ranks, home[i]);
    status st = start_plan(p, name, n_copies, out);
    for (size_t i = 0; st == STATUS_OK && i < n_lists; i++) {
        int *at = out->copy_ranks + out->first_copy[i];
        *at++ = home[i];
        for (int g = 0; g < p->n_ranks; g++)
            if (g != home[i] && holds[i * ranks + (size_t)g])
                *at++ = g;
    }
    free(n_copies);
    return st;
}

/* Copies and planned rows of each rank in one layer. */
static void weigh_layer(const problem *p, const plan *made, int l, int *copies, double *rows)
{
    for (int g = 0; g < p->n_ranks; g++) {
        copies[g] = 0;
        rows[g] = 0;
    }
    for (int e = 0; e < p->n_experts; e++) {
        int n = plan_n_copies(made, l, e);
        const int *ranks = plan_copies(made, l, e);
        for (int c = 0; c < n; c++) {
            copies[ranks[c]]++;
            rows[ranks[c]] += p->load[problem_at(p, l, e)] / n;
        }
    }
}

static status check_layer(const problem *p, const plan *made, int l, bool per_layer, const int *copies, const double *rows)
{
    for (int g = 0; g < p->n_ranks; g++) {
        size_t at = (size_t)l * (size_t)p->n_ranks + (size_t)g;
        if (per_layer && copies[g] > p->slots[at])
            return status_fail(STATUS_BAD_INPUT, "%s: rank %d holds %d experts of layer %d, but has room for %d", made->name, g,
                               copies[g], made->layer_numbers[l], p->slots[at]);
        if (p->request->slack >= 0 && rows[g] > p->cap[at] * (1 + 1e-9))
            return status_fail(STATUS_BAD_INPUT,
                               "%s: rank %d gets %.4gx its share of layer %d's rows, more than the slack of %g%%", made->name, g,
                               rows[g] / (p->share[g] * p->rows[l]), made->layer_numbers[l], p->request->slack * 100);
    }
    return STATUS_OK;
}

status problem_check(const problem *p, const plan *made, bool per_layer)
{
    if (made->n_ranks != p->n_ranks || made->n_experts != p->n_experts || made->n_layers != p->n_layers)
        return status_fail(STATUS_BAD_INPUT, "%s: made for %d layers of %d experts on %d ranks, not %d of %d on %d", made->name,
                           made->n_layers, made->n_experts, made->n_ranks, p->n_layers, p->n_experts, p->n_ranks);
    size_t n = (size_t)p->n_ranks;
    int *copies = malloc(2 * n * sizeof *copies), *total = copies + n;
    double *rows = malloc(n * sizeof *rows);
    status st = STATUS_OK;
    if (!copies || !rows)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks), out);
    memset(total, 0, n * sizeof *total);
    for (int l = 0; l < p->n_layers; l++) {
        weigh_layer(p, made, l, copies, rows);
        TRY_GOTO(check_layer(p, made, l, per_layer, copies, rows), out);
        for (int g = 0; g < p->n_ranks; g++)
            total[g] += copies[g];
    }
    for (int g = 0; g < p->n_ranks; g++)
        if (total[g] > p->total_slots[g])
            TRY_GOTO(status_fail(STATUS_BAD_INPUT, "%s: rank %d holds %d experts in all layers, but has room for %d", made->name,
                                 g, total[g], p->total_slots[g]),
                     out);
out:
    free(copies);
    free(rows);
    return st;
}
