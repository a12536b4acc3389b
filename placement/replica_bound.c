/* replica_bound.c - the least that the busiest rank could take if rows were cut at will.
 *
 * In time T a rank has room for (T - what its single copies take) / row_us rows. An expert with several copies wants its rows
 * and, as one of its copies has to open, the cheapest opening among its ranks in rows. By Hall's theorem (max-flow, min-cut) all
 * of it fits exactly if for every set of ranks A what is forced into A - experts with every copy there - fits into A's room:
 *
 *     T >= (forced(A) + sum over A of fixed / row_us) / sum over A of 1 / row_us
 *
 * Newton's method on T (Dinkelbach): a T that is too small leaves a cut whose A gives the next, larger T. Every T found is a
 * bound by itself, so rounding in the flow can only make it weaker, never wrong. */
#include "placement/replica_split.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ROUNDS = 100 };

typedef struct {
    const double *row_us;
    const int *first, *ranks; /* of the layer */
    int n_ranks, n_experts, n_copies;
    double *fixed; /* [n_ranks] microseconds */
    double *wants; /* [n_experts] rows, of experts with several copies */
    double *left;  /* [n_experts] not placed yet */
    double *room;  /* [n_ranks] rows */
    double *flow;  /* [n_copies] */
    int *expert;   /* [n_copies] */
    int *held_first, *held;
    int *queue;     /* [n_ranks] */
    int *came_from; /* [n_ranks] the copy that gives rows to make room, -1 for the first; -2: not seen */
    int *came_by;   /* [n_ranks] the copy that takes them */
} flow_net;

static void *take(unsigned char **at, size_t n, size_t size)
{
    void *p = *at;
    *at += (n * size + 15) / 16 * 16;
    return p;
}

/* One block for everything; what it starts at must be freed. */
static status net_allocate(flow_net *n, unsigned char **block)
{
    size_t g = (size_t)n->n_ranks + 1, e = (size_t)n->n_experts, c = (size_t)n->n_copies + 1;
    unsigned char *at = *block = calloc((2 * g + 2 * e + c) * 8 + (4 * g + 2 * c) * 4 + 20 * 16, 1);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory to bound a split over %d ranks", n->n_ranks);
    n->fixed = take(&at, g, sizeof *n->fixed);
    n->room = take(&at, g, sizeof *n->room);
    n->wants = take(&at, e, sizeof *n->wants);
    n->left = take(&at, e, sizeof *n->left);
    n->flow = take(&at, c, sizeof *n->flow);
    n->held_first = take(&at, g, sizeof *n->held_first);
    n->queue = take(&at, g, sizeof *n->queue);
    n->came_from = take(&at, g, sizeof *n->came_from);
    n->came_by = take(&at, g, sizeof *n->came_by);
    n->expert = take(&at, c, sizeof *n->expert);
    n->held = take(&at, c, sizeof *n->held);
    return STATUS_OK;
}

static int begin_of(const flow_net *n, int expert)
{
    return n->first[expert] - n->first[0];
}

static void net_fill(flow_net *n, const double *expert_us, const double *rows)
{
    for (int e = 0; e < n->n_experts; e++) {
        int begin = begin_of(n, e), end = begin_of(n, e + 1);
        if (rows[e] <= 0)
            continue;
        if (end - begin == 1) {
            int g = n->ranks[begin];
            n->fixed[g] += rows[e] * n->row_us[g] + expert_us[g];
            continue;
        }
        double opening = expert_us[n->ranks[begin]] / n->row_us[n->ranks[begin]];
        for (int c = begin; c < end; c++) {
            double here = expert_us[n->ranks[c]] / n->row_us[n->ranks[c]];
            opening = here < opening ? here : opening;
            n->expert[c] = e;
            n->held_first[n->ranks[c] + 1]++;
        }
        n->wants[e] = rows[e] + opening;
    }
    for (int g = 0; g < n->n_ranks; g++)
        n->held_first[g + 1] += n->held_first[g];
    memcpy(n->queue, n->held_first, (size_t)n->n_ranks * sizeof *n->queue); /* as cursors */
    for (int e = 0; e < n->n_experts; e++)
        for (int c = begin_of(n, e); n->wants[e] > 0 && c < begin_of(n, e + 1); c++)
            n->held[n->queue[n->ranks[c]]++] = c;
}

/* Looks for a rank with room, from the copies of `expert` on; ranks that could be reached stay marked. Returns it or -1. */
static int find_room(flow_net *n, int expert, double least)
{
    int count = 0;
    for (int g = 0; g < n->n_ranks; g++)
        n->came_from[g] = -2;
    for (int c = begin_of(n, expert); c < begin_of(n, expert + 1); c++) {
        n->came_from[n->ranks[c]] = -1;
        n->came_by[n->ranks[c]] = c;
        n->queue[count++] = n->ranks[c];
    }
    for (int q = 0; q < count; q++) {
        int u = n->queue[q];
        if (n->room[u] > least)
            return u;
        for (int h = n->held_first[u]; h < n->held_first[u + 1]; h++) {
            int give = n->held[h], e = n->expert[give];
            for (int c = begin_of(n, e); n->flow[give] > least && c < begin_of(n, e + 1); c++) {
                int v = n->ranks[c];
                if (n->came_from[v] != -2)
                    continue;
                n->came_from[v] = give;
                n->came_by[v] = c;
                n->queue[count++] = v;
            }
        }
    }
    return -1;
}

static void push_rows(flow_net *n, int expert, int z)
{
    double amount = n->room[z] < n->left[expert] ? n->room[z] : n->left[expert];
    for (int g = z; n->came_from[g] >= 0; g = n->ranks[n->came_from[g]])
        if (n->flow[n->came_from[g]] < amount)
            amount = n->flow[n->came_from[g]];
    n->room[z] -= amount;
    n->left[expert] -= amount;
    for (int g = z;; g = n->ranks[n->came_from[g]]) {
        n->flow[n->came_by[g]] += amount;
        if (n->came_from[g] < 0)
            return;
        n->flow[n->came_from[g]] -= amount;
    }
}

/* Whether everything fits in time T; if not, came_from marks a set of ranks it does not fit into. */
static bool fits(flow_net *n, double T, double total)
{
    double least = 1e-12 * total;
    for (int g = 0; g < n->n_ranks; g++)
        n->room[g] = T > n->fixed[g] ? (T - n->fixed[g]) / n->row_us[g] : 0;
    memcpy(n->left, n->wants, (size_t)n->n_experts * sizeof *n->left);
    memset(n->flow, 0, (size_t)n->n_copies * sizeof *n->flow);
    for (int e = 0; e < n->n_experts; e++)
        while (n->left[e] > least) {
            int z = find_room(n, e, least);
            if (z < 0)
                return false;
            push_rows(n, e, z);
        }
    return true;
}

/* The time that the marked ranks need for what is forced into them. */
static double time_of_marked(const flow_net *n)
{
    double rows = 0, speed = 0;
    for (int g = 0; g < n->n_ranks; g++)
        if (n->came_from[g] != -2) {
            rows += n->fixed[g] / n->row_us[g];
            speed += 1 / n->row_us[g];
        }
    for (int e = 0; e < n->n_experts; e++) {
        bool inside = n->wants[e] > 0;
        for (int c = begin_of(n, e); inside && c < begin_of(n, e + 1); c++)
            inside = n->came_from[n->ranks[c]] != -2;
        rows += inside ? n->wants[e] : 0;
    }
    return rows / speed;
}

static double solve(flow_net *n)
{
    double T, total = 0;
    for (int e = 0; e < n->n_experts; e++)
        total += n->wants[e];
    for (int g = 0; g < n->n_ranks; g++)
        n->came_from[g] = -1;
    T = time_of_marked(n); /* all ranks */
    for (int g = 0; g < n->n_ranks; g++)
        T = n->fixed[g] > T ? n->fixed[g] : T;
    for (int round = 0; round < MAX_ROUNDS && !fits(n, T, total); round++) {
        double next = time_of_marked(n);
        if (next <= T * (1 + 1e-13))
            break;
        T = next;
    }
    return T;
}

status replica_split_bound(const plan *p, int layer, const double *row_us, const double *expert_us, const double *rows,
                           double *out)
{
    flow_net n = {.row_us = row_us,
                  .first = p->first_copy + (size_t)layer * (size_t)p->n_experts,
                  .n_ranks = p->n_ranks,
                  .n_experts = p->n_experts};
    unsigned char *block;
    n.ranks = p->copy_ranks + n.first[0];
    n.n_copies = n.first[p->n_experts] - n.first[0];
    TRY(net_allocate(&n, &block));
    net_fill(&n, expert_us, rows);
    *out = solve(&n);
    free(block);
    return STATUS_OK;
}
