#include "placement/planner/flow_cost.h"

#include <stdlib.h>
#include <string.h>

static const double *pairs_of(const problem *p, int layer)
{
    return p->next_pairs + (size_t)layer * (size_t)p->n_experts * (size_t)p->n_experts;
}

double flow_weight(const problem *p, int layer)
{
    const double *pairs = pairs_of(p, layer);
    double all = 0;
    for (size_t i = 0; i < (size_t)p->n_experts * (size_t)p->n_experts; i++)
        all += pairs[i];
    return all > 0 ? 1 / all / (p->n_layers - 1) : 0;
}

static void add_before(const problem *p, int layer, const int *home, double *cost)
{
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    const double *pairs = pairs_of(p, layer - 1);
    const int *before = home + problem_at(p, layer - 1, 0);
    double weight = flow_weight(p, layer - 1);
    for (size_t i = 0; i < n; i++)
        for (size_t e = 0; e < n; e++) {
            double flow = weight * pairs[i * n + e];
            const double *distance = p->distance + (size_t)before[i] * ranks;
            for (size_t g = 0; flow > 0 && g < ranks; g++)
                cost[e * ranks + g] += flow * distance[g];
        }
}

static void add_after(const problem *p, int layer, const int *home, double *cost)
{
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    const double *pairs = pairs_of(p, layer);
    const int *next = home + problem_at(p, layer + 1, 0);
    double weight = flow_weight(p, layer);
    for (size_t e = 0; e < n; e++)
        for (size_t j = 0; j < n; j++) {
            double flow = weight * pairs[e * n + j];
            for (size_t g = 0; flow > 0 && g < ranks; g++)
                cost[e * ranks + g] += flow * p->distance[g * ranks + (size_t)next[j]];
        }
}

void flow_costs(const problem *p, int layer, const int *home, bool after, double *cost)
{
    memset(cost, 0, (size_t)p->n_experts * (size_t)p->n_ranks * sizeof *cost);
    if (layer > 0)
        add_before(p, layer, home, cost);
    if (after && layer + 1 < p->n_layers)
        add_after(p, layer, home, cost);
}

double flow_of(const problem *p, const int *home)
{
    double sum = 0;
    size_t n = (size_t)p->n_experts;
    for (int l = 0; l + 1 < p->n_layers; l++) {
        const double *pairs = pairs_of(p, l);
        double far = 0;
        for (size_t i = 0; i < n; i++) {
            const double *distance = p->distance + (size_t)home[problem_at(p, l, (int)i)] * (size_t)p->n_ranks;
            for (size_t j = 0; j < n; j++)
                far += pairs[i * n + j] * distance[home[problem_at(p, l + 1, (int)j)]];
        }
        sum += far * flow_weight(p, l);
    }
    return sum;
}
