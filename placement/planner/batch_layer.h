/* batch_layer.h - one layer of a plan, priced on many steps at once, and the search for cheaper homes: swaps and moves.
 *
 * What a layer costs on a step is the busiest rank's compute plus the transfers of its slowest rank (placement/replay.h), so the
 * price of a plan is a sum of maxima. Steps lie side by side: every array is [..][n_steps], and a swap of two experts is priced
 * by a few passes over rows that the compiler vectorises. Times are whole numbers of a power of two in floats, small enough that
 * sums are exact: they can be added and taken away for ever without drift, in any order.
 *
 * The busiest of all ranks but two comes from a tournament: node i of a binary tree over ranks holds the larger of its two
 * children, step by step; all but two leaves are the siblings along their two paths.
 *
 * Private to the files of `batch`. One caller. */
#ifndef CONVOKE_PLACEMENT_PLANNER_BATCH_LAYER_H
#define CONVOKE_PLACEMENT_PLANNER_BATCH_LAYER_H

#include "placement/planner/batch_links.h"
#include "placement/planner/problem.h"

enum { BATCH_LANES = 16 }; /* n_steps is a multiple: the last steps may be empty */

typedef struct {
    const problem *p;             /* borrowed */
    const replay_schedule *steps; /* borrowed */
    int layer;
    int n_steps, n_experts, n_ranks, n_classes;
    int n_real;         /* steps that are there */
    int *class_of_rank; /* ranks of one class compute equally fast */
    float tick;         /* microseconds per unit of all floats below */
    float *rows;        /* [n_experts][n_steps] */
    float *cost;        /* [n_classes][n_experts + 1][n_steps] ticks; the last expert is no expert */
    int n_leaves;       /* ranks, up to a power of two */
    float *tree;        /* [2 * n_leaves][n_steps] node 1 is the root, rank r is node n_leaves + r */
    int *home;          /* [n_experts] */
    int *held;          /* [n_ranks] experts */
    double *planned;    /* [n_ranks] rows by p->load */
    const int *slots;   /* [n_ranks] borrowed */
    const double *cap;  /* [n_ranks] borrowed; NULL: none to keep */
    batch_links *links; /* NULL: not priced */
    double link_times;  /* what its sums are multiplied by: it may look at fewer steps */
} batch_layer;

/* link_steps: price transfers too, on these steps; NULL: do not. */
status batch_layer_create(const problem *p, const replay_schedule *steps, int layer, const replay_schedule *link_steps,
                          batch_layer **out);
void batch_layer_destroy(batch_layer *b); /* NULL is fine */

/* Puts every expert on its home and returns the layer's mean microseconds: compute, and transfers where links are priced
 * (without start-up times, which hardly depend on a plan). */
double batch_layer_set(batch_layer *b, const int *home);
/* The part of transfers in the price of the homes last set or found. */
double batch_layer_links_us(batch_layer *b);

/* From the homes last set: annealing over random swaps and moves, then descent over all of them. Keeps slots and caps where they
 * were kept. Returns the price of the best homes found, which are written to home [n_experts]; never worse than the start. */
double batch_layer_search(batch_layer *b, random_stream *random, work_budget *work, int *home);

static inline float *batch_cost(const batch_layer *b, int rank, int expert)
{
    return b->cost + ((size_t)b->class_of_rank[rank] * (size_t)(b->n_experts + 1) + (size_t)expert) * (size_t)b->n_steps;
}
static inline float *batch_node(const batch_layer *b, int node)
{
    return b->tree + (size_t)node * (size_t)b->n_steps;
}
static inline float *batch_load(const batch_layer *b, int rank)
{
    return batch_node(b, b->n_leaves + rank);
}

#endif
