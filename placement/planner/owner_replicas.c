#include "placement/planner/owner_replicas.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const problem *p;
    const uint16_t *owner; /* [n_sequences] */
    int *home;             /* [n_layers][n_experts] */
    bool *holds;           /* [n_layers][n_experts][n_ranks] */
    double same_us, cross_us;
} filling;

/* What one layer needs while it is filled. */
typedef struct {
    bool *holds;   /* [n_experts][n_ranks] of this layer */
    bool *on_node; /* [n_experts][n_nodes] */
    double *near;  /* [n_experts][n_nodes] microseconds saved by a copy anywhere on the node */
    double *own;   /* [n_experts][n_ranks] saved besides by one on this very rank */
    int *room;     /* [n_ranks] */
} layer_state;

static void mark_nodes(const filling *f, layer_state *s)
{
    const topology *t = f->p->topology;
    memset(s->on_node, 0, (size_t)f->p->n_experts * (size_t)t->n_nodes * sizeof *s->on_node);
    for (int e = 0; e < f->p->n_experts; e++)
        for (int g = 0; g < f->p->n_ranks; g++)
            if (s->holds[e * f->p->n_ranks + g])
                s->on_node[e * t->n_nodes + t->node_of_rank[g]] = true;
}

/* One token of owner o: what a copy of each of its experts nearer to it would save. */
static void count_token(const filling *f, layer_state *s, const uint16_t *experts, int o)
{
    const problem *p = f->p;
    int n_nodes = p->topology->n_nodes, node = p->topology->node_of_rank[o], far = 0, beside = 0;
    for (int j = 0; j < p->top_k; j++) {
        if (experts[j] == ROUTING_NO_EXPERT || s->holds[experts[j] * p->n_ranks + o])
            continue;
        far += !s->on_node[experts[j] * n_nodes + node];
        beside += s->on_node[experts[j] * n_nodes + node];
    }
    for (int j = 0; j < p->top_k; j++) {
        if (experts[j] == ROUTING_NO_EXPERT || s->holds[experts[j] * p->n_ranks + o])
            continue;
        if (!s->on_node[experts[j] * n_nodes + node])
            s->near[experts[j] * n_nodes + node] += f->cross_us / far;
        s->own[experts[j] * p->n_ranks + o] += f->same_us / (far + beside);
    }
}

static void count_demand(const filling *f, int l, layer_state *s)
{
    const traffic *t = f->p->traffic;
    memset(s->near, 0, (size_t)f->p->n_experts * (size_t)f->p->topology->n_nodes * sizeof *s->near);
    memset(s->own, 0, (size_t)f->p->n_experts * (size_t)f->p->n_ranks * sizeof *s->own);
    for (int q = 0; q < t->n_sequences; q++)
        for (int64_t token = t->first_token[q]; token < t->first_token[q + 1]; token++)
            count_token(f, s, traffic_experts(t, l, token), f->owner[q]);
}

/* The copy that saves most on a node; false when none saves anything. Ties: lower expert, then lower rank. */
static bool best_copy(const filling *f, const layer_state *s, int node, int *expert, int *rank)
{
    const problem *p = f->p;
    double most = 0;
    for (int e = 0; e < p->n_experts; e++)
        for (int g = 0; g < p->n_ranks; g++) {
            if (p->topology->node_of_rank[g] != node || s->room[g] <= 0 || s->holds[e * p->n_ranks + g])
                continue;
            double saves = s->near[e * p->topology->n_nodes + node] + s->own[e * p->n_ranks + g];
            if (saves > most) {
                most = saves;
                *expert = e;
                *rank = g;
            }
        }
    return most > 0;
}

static void fill_slots(const filling *f, int l, layer_state *s)
{
    for (bool added = true; added;) {
        added = false;
        mark_nodes(f, s);
        count_demand(f, l, s);
        for (int node = 0; node < f->p->topology->n_nodes; node++) {
            int e = 0, g = 0;
            if (!best_copy(f, s, node, &e, &g))
                continue;
            s->holds[e * f->p->n_ranks + g] = true;
            s->room[g]--;
            added = true;
        }
    }
}

static status fill_layer(void *arg, int l)
{
    const filling *f = arg;
    const problem *p = f->p;
    size_t experts = (size_t)p->n_experts, ranks = (size_t)p->n_ranks, nodes = (size_t)p->topology->n_nodes;
    layer_state s = {.holds = f->holds + (size_t)l * experts * ranks,
                     .on_node = malloc(experts * nodes * sizeof *s.on_node),
                     .near = malloc(experts * nodes * sizeof *s.near),
                     .own = malloc(experts * ranks * sizeof *s.own),
                     .room = malloc(ranks * sizeof *s.room)};
    status st = s.on_node && s.near && s.own && s.room ? STATUS_OK
                                                       : status_fail(STATUS_NO_MEMORY, "no memory to fill the slots of a layer");
    if (st == STATUS_OK) {
        for (size_t g = 0; g < ranks; g++) {
            s.room[g] = p->slots[(size_t)l * ranks + g];
            for (size_t e = 0; e < experts; e++)
                s.room[g] -= s.holds[e * ranks + g];
        }
        fill_slots(f, l, &s);
    }
    free(s.on_node);
    free(s.near);
    free(s.own);
    free(s.room);
    return st;
}

/* Microseconds of one row over the quickest link of each class. */
static void price_links(filling *f)
{
    const problem *p = f->p;
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            double us = p->topology->row_bytes * topology_us_per_byte(p->topology, g, h);
            double *of = topology_link(p->topology, g, h) == LINK_CROSS_NODE ? &f->cross_us : &f->same_us;
            if (g != h && (*of == 0 || us < *of))
                *of = us;
        }
}

status owner_replicas_add(const problem *p, const uint16_t *owner_of_sequence, const plan *homes, plan *out)
{
    size_t lists = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    filling f = {.p = p,
                 .owner = owner_of_sequence,
                 .home = malloc(lists * sizeof *f.home),
                 .holds = calloc(lists * ranks, sizeof *f.holds)};
    status st = f.home && f.holds ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for replicas of %zu experts", lists);
    for (size_t i = 0; st == STATUS_OK && i < lists; i++) {
        int n = homes->first_copy[i + 1] - homes->first_copy[i];
        const int *copies = homes->copy_ranks + homes->first_copy[i];
        f.home[i] = copies[0];
        for (int c = 0; c < n; c++)
            f.holds[i * ranks + (size_t)copies[c]] = true;
    }
    price_links(&f);
    if (st == STATUS_OK)
        st = parallel_for(p->request->threads, p->n_layers, fill_layer, &f);
    if (st == STATUS_OK)
        st = problem_plan_replicas(p, homes->name, f.home, f.holds, out);
    free(f.home);
    free(f.holds);
    return st;
}
