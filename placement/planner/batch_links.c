/* batch_links.c - times are whole numbers of a power of two in floats, as in batch_layer.h: rows come and go without drift. */
#include "placement/planner/batch_links.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A token that chose an expert, seen from that expert: its step, its owner, then the token's other experts. */
enum { CHOICE_STEP, CHOICE_OWNER, CHOICE_OTHERS };

enum { OUT, IN, BACK_OUT, BACK_IN, N_SIDES }; /* dispatch out of and into a rank, combine out of and into it */

struct batch_links {
    int n_steps, n_experts, n_ranks, width; /* width: entries of a choice */
    bool symmetric;                         /* rows cost the same in both directions: combine equals dispatch */
    bool dedupe;
    double tick;        /* microseconds */
    float *weight;      /* [n_ranks][n_ranks] ticks of a row from, to */
    int64_t *first;     /* [n_experts + 1] */
    uint16_t *choices;  /* [first[n_experts]][width] */
    float *now, *trial; /* [N_SIDES][n_ranks][n_steps]; symmetric: two sides */
    int *node_of_rank;  /* [n_ranks] */
    int *local_index;   /* [n_ranks] */
    int *first_of_node; /* [n_nodes + 1] into ranks_of_node */
    int *ranks_of_node; /* [n_ranks] */
    float *busiest;     /* [n_steps] scratch */
    uint16_t *lower;    /* [width] scratch */
    int *home;          /* [n_experts + 1] of a trial; a dropped choice is expert n_experts, on no rank */
};

void batch_links_destroy(batch_links *l)
{
    if (!l)
        return;
    free(l->weight);
    free(l->first);
    free(l->choices);
    free(l->now);
    free(l->trial);
    free(l->node_of_rank);
    free(l->local_index);
    free(l->first_of_node);
    free(l->ranks_of_node);
    free(l->busiest);
    free(l->lower);
    free(l->home);
    free(l);
}

static size_t sides_size(const batch_links *l)
{
    return (size_t)(l->symmetric ? 2 : N_SIDES) * (size_t)l->n_ranks * (size_t)l->n_steps;
}

static float *side(const batch_links *l, float *sides, int which, int rank)
{
    return sides + ((size_t)which * (size_t)l->n_ranks + (size_t)rank) * (size_t)l->n_steps;
}

/* ---- set up ---- */

static void list_nodes(batch_links *l, const topology *t)
{
    for (int g = 0; g < l->n_ranks; g++) {
        l->node_of_rank[g] = t->node_of_rank[g];
        l->local_index[g] = t->local_index[g];
        l->first_of_node[t->node_of_rank[g] + 1]++;
    }
    for (int n = 0; n < t->n_nodes; n++)
        l->first_of_node[n + 1] += l->first_of_node[n];
    for (int g = 0; g < l->n_ranks; g++)
        l->ranks_of_node[l->first_of_node[t->node_of_rank[g]] + t->local_index[g]] = g;
}

/* The tick is such that all rows of the fullest step over the slowest link, there and forwarded, stay whole numbers of it. */
static void weigh_links(batch_links *l, const topology *t, const replay_schedule *steps, int top_k)
{
    double slowest = 0;
    for (int g = 0; g < l->n_ranks; g++)
        for (int h = 0; h < l->n_ranks; h++) {
            double us = t->row_bytes * topology_us_per_byte(t, g, h);
            slowest = us > slowest ? us : slowest;
            l->symmetric &= topology_us_per_byte(t, g, h) == topology_us_per_byte(t, h, g);
        }
    int64_t most = 1;
    for (int64_t s = 0; s < steps->n_steps; s++)
        most = steps->first[s + 1] - steps->first[s] > most ? steps->first[s + 1] - steps->first[s] : most;
    int exponent;
    frexp(2 * slowest * (double)most * (double)(top_k < l->n_ranks ? top_k : l->n_ranks), &exponent);
    l->tick = ldexp(1, exponent - 23);
    for (int g = 0; g < l->n_ranks; g++)
        for (int h = 0; h < l->n_ranks; h++)
            l->weight[g * l->n_ranks + h] = (float)rint(t->row_bytes * topology_us_per_byte(t, g, h) / l->tick);
}

static void list_choices(batch_links *l, const traffic *t, const replay_schedule *steps, int layer)
{
    int k = t->shape.top_k;
    int64_t *at = l->first + 1; /* while filling at[e] is where expert e's next choice goes: in the end, where the next begins */
    for (int64_t i = 0; i < steps->first[steps->n_steps]; i++)
        for (int j = 0; j < k; j++) {
            int e = traffic_experts(t, layer, steps->token[i])[j];
            if (e != ROUTING_NO_EXPERT)
                at[e + 1]++;
        }
    for (int e = 1; e <= l->n_experts; e++)
        at[e] += at[e - 1];
    for (int64_t s = 0; s < steps->n_steps; s++)
        for (int64_t i = steps->first[s]; i < steps->first[s + 1]; i++) {
            const uint16_t *experts = traffic_experts(t, layer, steps->token[i]);
            for (int j = 0; j < k; j++) {
                if (experts[j] == ROUTING_NO_EXPERT)
                    continue;
                uint16_t *c = l->choices + (size_t)at[experts[j]]++ * (size_t)l->width;
                c[CHOICE_STEP] = (uint16_t)s;
                c[CHOICE_OWNER] = steps->owner[i];
                for (int n = 0, o = CHOICE_OTHERS; n < k; n++)
                    if (n != j)
                        c[o++] = experts[n] == ROUTING_NO_EXPERT ? (uint16_t)l->n_experts : experts[n];
            }
        }
}

status batch_links_create(const problem *p, const replay_schedule *steps, int layer, int n_steps, batch_links **out)
{
    batch_links *l = calloc(1, sizeof *l);
    if (!l)
        return status_fail(STATUS_NO_MEMORY, "no memory for the links of layer %d", layer);
    *l = (batch_links){.n_steps = n_steps,
                       .n_experts = p->n_experts,
                       .n_ranks = p->n_ranks,
                       .width = CHOICE_OTHERS + p->top_k - 1,
                       .symmetric = true,
                       .dedupe = p->request->replay.node_dedupe};
    size_t ranks = (size_t)l->n_ranks, n_choices = (size_t)steps->first[steps->n_steps] * (size_t)p->top_k;
    l->weight = calloc(ranks * ranks, sizeof *l->weight);
    l->first = calloc((size_t)l->n_experts + 2, sizeof *l->first);
    l->choices = malloc(n_choices * (size_t)l->width * sizeof *l->choices);
    l->node_of_rank = calloc(ranks, sizeof *l->node_of_rank);
    l->local_index = calloc(ranks, sizeof *l->local_index);
    l->first_of_node = calloc((size_t)p->topology->n_nodes + 1, sizeof *l->first_of_node);
    l->ranks_of_node = calloc(ranks, sizeof *l->ranks_of_node);
    l->busiest = calloc((size_t)n_steps, sizeof *l->busiest);
    l->lower = calloc((size_t)l->width, sizeof *l->lower);
    l->home = calloc((size_t)l->n_experts + 1, sizeof *l->home);
    bool have = l->home && l->lower && l->weight && l->first && l->choices && l->node_of_rank && l->local_index &&
                l->first_of_node && l->ranks_of_node && l->busiest;
    if (have) {
        weigh_links(l, p->topology, steps, p->top_k);
        l->now = calloc(sides_size(l), sizeof *l->now);
        l->trial = calloc(sides_size(l), sizeof *l->trial);
    }
    if (!have || !l->now || !l->trial) {
        batch_links_destroy(l);
        return status_fail(STATUS_NO_MEMORY, "no memory for the links of layer %d on %d steps", layer, n_steps);
    }
    l->home[l->n_experts] = -1;
    list_nodes(l, p->topology);
    list_choices(l, p->traffic, steps, layer);
    *out = l;
    return STATUS_OK;
}

/* ---- rows come and go ---- */

static void add_row(const batch_links *l, float *sides, float sign, int step, int from, int to)
{
    float there = sign * l->weight[from * l->n_ranks + to];
    side(l, sides, OUT, from)[step] += there;
    side(l, sides, IN, to)[step] += there;
    if (l->symmetric)
        return;
    float back = sign * l->weight[to * l->n_ranks + from];
    side(l, sides, BACK_OUT, to)[step] += back;
    side(l, sides, BACK_IN, from)[step] += back;
}

/* What of a token's other experts is where expert e comes from and goes to, or came from and went to. */
typedef struct {
    bool on_rank[2], on_node[2]; /* from, to */
    bool other;                  /* the expert that moves the other way is among them */
} company;

static company look_around(const batch_links *l, const uint16_t *choice, int from, int to, int other)
{
    company c = {0};
    int from_node = l->node_of_rank[from], to_node = l->node_of_rank[to];
    for (int j = CHOICE_OTHERS; j < l->width; j++) {
        int rank = l->home[choice[j]];
        c.other |= choice[j] == other;
        c.on_rank[0] |= rank == from;
        c.on_rank[1] |= rank == to;
        if (l->dedupe) {
            int node = rank < 0 ? -1 : l->node_of_rank[rank];
            c.on_node[0] |= node == from_node;
            c.on_node[1] |= node == to_node;
        }
    }
    return c;
}

/* A token's row begins to reach `rank` (sign 1), which none of its other experts is on, or no longer does (sign -1). */
static void add_reach(const batch_links *l, float *sides, float sign, const uint16_t *choice, int rank, bool node_reached)
{
    int owner = choice[CHOICE_OWNER], step = choice[CHOICE_STEP], node = l->node_of_rank[rank];
    if (rank == owner)
        return;
    if (!l->dedupe || node == l->node_of_rank[owner]) {
        add_row(l, sides, sign, step, owner, rank);
        return;
    }
    int here = l->first_of_node[node], n = l->first_of_node[node + 1] - here;
    int forwarder = l->ranks_of_node[here + l->local_index[owner] % n];
    if (!node_reached)
        add_row(l, sides, sign, step, owner, forwarder);
    if (rank != forwarder)
        add_row(l, sides, sign, step, forwarder, rank);
}

static double sum_sides(batch_links *l, float *sides)
{
    double sum = 0;
    for (int way = 0; way < (l->symmetric ? 1 : 2); way++) {
        const float *all = side(l, sides, 2 * way, 0);
        float *restrict busiest = l->busiest;
        memset(busiest, 0, (size_t)l->n_steps * sizeof *busiest);
        for (int i = 0; i < 2 * l->n_ranks; i++) {
            const float *restrict one = all + (size_t)i * (size_t)l->n_steps;
            for (int s = 0; s < l->n_steps; s++)
                busiest[s] = one[s] > busiest[s] ? one[s] : busiest[s];
        }
        for (int s = 0; s < l->n_steps; s++)
            sum += (double)busiest[s];
    }
    return sum * l->tick * (l->symmetric ? 2 : 1);
}

static void take_homes(batch_links *l, const int *home)
{
    memcpy(l->home, home, (size_t)l->n_experts * sizeof *home);
}

/* A token's rows are counted with its experts one after the other: each adds its rank unless a lower one did. */
double batch_links_set(batch_links *l, const int *home)
{
    const uint16_t *choice = l->choices;
    take_homes(l, home);
    memset(l->now, 0, sides_size(l) * sizeof *l->now);
    for (int e = 0; e < l->n_experts; e++)
        for (int64_t i = l->first[e]; i < l->first[e + 1]; i++, choice += l->width) {
            memcpy(l->lower, choice, (size_t)l->width * sizeof *choice);
            for (int j = CHOICE_OTHERS; j < l->width; j++)
                if (l->lower[j] > e)
                    l->lower[j] = (uint16_t)l->n_experts;
            company c = look_around(l, l->lower, home[e], home[e], -1);
            if (!c.on_rank[0])
                add_reach(l, l->now, 1, l->lower, home[e], c.on_node[0]);
        }
    return sum_sides(l, l->now);
}

/* Tokens that chose both reach the same ranks as before. */
static void move_expert(batch_links *l, int e, int other, int to)
{
    int from = l->home[e];
    for (int64_t i = l->first[e]; i < l->first[e + 1]; i++) {
        const uint16_t *choice = l->choices + (size_t)i * (size_t)l->width;
        company c = look_around(l, choice, from, to, other);
        if (c.other)
            continue;
        if (!c.on_rank[0])
            add_reach(l, l->trial, -1, choice, from, c.on_node[0]);
        if (!c.on_rank[1])
            add_reach(l, l->trial, 1, choice, to, c.on_node[1]);
    }
}

double batch_links_try(batch_links *l, const int *home, int e, int f, int to)
{
    take_homes(l, home);
    memcpy(l->trial, l->now, sides_size(l) * sizeof *l->trial);
    move_expert(l, e, f, to);
    if (f >= 0)
        move_expert(l, f, e, home[e]);
    return sum_sides(l, l->trial);
}

void batch_links_keep(batch_links *l)
{
    float *old = l->now;
    l->now = l->trial;
    l->trial = old;
}

int64_t batch_links_work(const batch_links *l)
{
    return 8 * l->first[l->n_experts] / l->n_experts * l->width + 3 * (int64_t)sides_size(l) / 4;
}
