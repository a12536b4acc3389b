/* solver_exflow.c - layer after layer, each expert beside those it follows.
 *
 * ExFlow keeps a token on its rank from layer to layer where it can. The first layer lies in blocks; in each next one the pair of
 * an expert and a node with the largest flow from the layer before is settled first, then the next largest, while there is
 * room; then, inside each node, the same for its ranks. */
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    double flow;
    int expert, to;
} affinity;

typedef struct {
    const problem *p;
    int *sizes;     /* [n_ranks] room of the layer */
    int *node_room; /* [n_nodes] */
    int *node;      /* [n_experts] of this layer; -1: not settled */
    double *flow;   /* [n_experts][n_ranks] into this layer's expert from each rank's experts of the layer before */
    affinity *pairs;
} follower;

static int compare_affinity(const void *x, const void *y)
{
    const affinity *a = x, *b = y;
    if (a->flow != b->flow)
        return a->flow > b->flow ? -1 : 1;
    return a->expert != b->expert ? a->expert - b->expert : a->to - b->to;
}

static void sum_flow(follower *f, int l, const int *before)
{
    const problem *p = f->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    const double *pairs = p->next_pairs + (size_t)(l - 1) * n * n;
    memset(f->flow, 0, n * ranks * sizeof *f->flow);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            f->flow[j * ranks + (size_t)before[i]] += pairs[i * n + j];
}

static void settle_nodes(follower *f)
{
    const problem *p = f->p;
    const topology *t = p->topology;
    size_t n_pairs = 0;
    memset(f->node_room, 0, (size_t)t->n_nodes * sizeof *f->node_room);
    for (int g = 0; g < p->n_ranks; g++)
        f->node_room[t->node_of_rank[g]] += f->sizes[g];
    for (int e = 0; e < p->n_experts; e++) {
        f->node[e] = -1;
        for (int d = 0; d < t->n_nodes; d++)
            f->pairs[n_pairs++] = (affinity){0, e, d};
        for (int g = 0; g < p->n_ranks; g++)
            f->pairs[n_pairs - (size_t)t->n_nodes + (size_t)t->node_of_rank[g]].flow +=
                f->flow[(size_t)e * (size_t)p->n_ranks + (size_t)g];
    }
    qsort(f->pairs, n_pairs, sizeof *f->pairs, compare_affinity);
    for (size_t i = 0; i < n_pairs; i++)
        if (f->node[f->pairs[i].expert] < 0 && f->node_room[f->pairs[i].to] > 0) {
            f->node[f->pairs[i].expert] = f->pairs[i].to;
            f->node_room[f->pairs[i].to]--;
        }
}

static void settle_ranks(follower *f, int *home)
{
    const problem *p = f->p;
    size_t n_pairs = 0;
    for (int e = 0; e < p->n_experts; e++) {
        home[e] = -1;
        for (int g = 0; g < p->n_ranks; g++)
            if (p->topology->node_of_rank[g] == f->node[e])
                f->pairs[n_pairs++] = (affinity){f->flow[(size_t)e * (size_t)p->n_ranks + (size_t)g], e, g};
    }
    qsort(f->pairs, n_pairs, sizeof *f->pairs, compare_affinity);
    for (size_t i = 0; i < n_pairs; i++)
        if (home[f->pairs[i].expert] < 0 && f->sizes[f->pairs[i].to] > 0) {
            home[f->pairs[i].expert] = f->pairs[i].to;
            f->sizes[f->pairs[i].to]--;
        }
}

static status follow(follower *f, int *home)
{
    const problem *p = f->p;
    for (int l = 0; l < p->n_layers; l++) {
        TRY(start_sizes(p, l, f->sizes));
        int *here = home + problem_at(p, l, 0);
        if (l == 0) {
            for (int g = 0, e = 0; g < p->n_ranks; g++)
                for (int i = 0; i < f->sizes[g]; i++)
                    here[e++] = g;
            continue;
        }
        sum_flow(f, l, here - p->n_experts);
        settle_nodes(f);
        settle_ranks(f, here);
    }
    return STATUS_OK;
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    size_t n_lists = problem_at(p, p->n_layers, 0), experts = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    follower f = {.p = p};
    int *home = malloc(n_lists * sizeof *home);
    f.sizes = malloc(ranks * sizeof *f.sizes);
    f.node_room = malloc(ranks * sizeof *f.node_room);
    f.node = malloc(experts * sizeof *f.node);
    f.flow = malloc(experts * ranks * sizeof *f.flow);
    f.pairs = malloc(experts * ranks * sizeof *f.pairs);
    status st = STATUS_OK;
    if (!home || !f.sizes || !f.node_room || !f.node || !f.flow || !f.pairs)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    TRY_GOTO(follow(&f, home), out);
    st = start_finish(&solver_exflow, p, home, report, out);
out:
    free(home);
    free(f.sizes);
    free(f.node_room);
    free(f.node);
    free(f.flow);
    free(f.pairs);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_flow(p, made);
    return STATUS_OK;
}

const solver solver_exflow = {
    .name = "exflow",
    .summary = "each expert beside those it follows: greedy by flow between layers, nodes first, then ranks",
    .paper = "ExFlow: exploiting inter-layer expert affinity, arXiv 2401.08383",
    .objective = "flow between layers times distance (R-flow)",
    .flags = SOLVER_NEEDS_NEXT_PAIRS | SOLVER_BASELINE,
    .solve = solve,
    .measure = measure,
};
