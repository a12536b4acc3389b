/* cut.h - one layer's tokens as a hypergraph: what a placement costs in distinct ranks, and what moves and swaps would change.
 *
 * An edge is a set of experts chosen together, with the number of tokens that chose it; where owners count, the token's owner is
 * one more, pinned, member. An edge costs its weight times (ranks it touches - 1): with owners these are the rows that leave
 * home, without them a token's distinct ranks less one (connectivity). Gains are exact:
 *
 *   move e to h      alone[e] - (degree[e] - present[e][h])
 *   swap e and f     both moves' gains - pair[e][f] - pair[f][e]: an edge with both keeps its ranks
 *
 * and are kept in tables that a move updates along the expert's edges only. One caller at a time. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CUT_H
#define CONVOKE_PLACEMENT_PLANNER_CUT_H

#include "placement/planner/problem.h"

typedef struct {
    const problem *p;
    int layer, top_k;
    int n_edges;
    uint16_t *pins;   /* [n_edges][top_k] experts, ROUTING_NO_EXPERT behind the last */
    int32_t *weight;  /* [n_edges] tokens */
    uint16_t *owner;  /* [n_edges] ROUTING_NO_EXPERT: none */
    int *first_edge;  /* [n_experts + 1] into edge_of */
    int *edge_of;     /* the edges of each expert */
    int *home;        /* [n_experts] own copy */
    double *load;     /* [n_ranks] planned rows */
    int *count;       /* [n_ranks] experts */
    int64_t cost;     /* sum over edges */
    int32_t *degree;  /* [n_experts] tokens that chose e */
    int32_t *alone;   /* [n_experts] tokens for which nothing else of theirs is on e's rank */
    int32_t *present; /* [n_experts][n_ranks] tokens of e that touch the rank */
    int32_t *pair;    /* [n_experts][n_experts] tokens with both for which e is alone */
    int64_t touched;  /* edges updated so far: work */
} cut;

/* Whether the problem's owners take part: its schedule is there and owners do not move. */
bool cut_counts_owners(const problem *p);
/* Groups the layer's tokens (those of the schedule where owners count, else all); cut_place() comes next. */
status cut_open(const problem *p, int layer, cut *out);
void cut_close(cut *c); /* a zeroed one is fine */
void cut_place(cut *c, const int *home);

/* Tokens times ranks saved; and whether room and cap allow it. */
static inline int64_t cut_move_gain(const cut *c, int e, int to)
{
    return (int64_t)c->alone[e] - c->degree[e] + c->present[(size_t)e * (size_t)c->p->n_ranks + (size_t)to];
}
static inline int64_t cut_swap_gain(const cut *c, int e, int f)
{
    size_t n = (size_t)c->p->n_experts;
    return cut_move_gain(c, e, c->home[f]) + cut_move_gain(c, f, c->home[e]) - c->pair[(size_t)e * n + (size_t)f] -
           c->pair[(size_t)f * n + (size_t)e];
}
bool cut_move_fits(const cut *c, int e, int to);
bool cut_swap_fits(const cut *c, int e, int f);
void cut_move(cut *c, int e, int to);
void cut_swap(cut *c, int e, int f);

/* Edges' cost of any homes, counted anew. */
int64_t cut_cost(const cut *c, const int *home);

#endif
