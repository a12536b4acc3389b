/* topology.h - what computing and sending cost on the ranks of a job: the numbers a plan is made for.
 *
 *   {"ranks": [{"node": 0, "expert_bytes": null, "row_us": 250, "expert_us": 1650}, ...],
 *    "same_node": {"us": 15, "gb_per_s": 5}, "cross_node": {"us": 60, "gb_per_s": 1}, "row_bytes": 5760,
 *    "links": [[...]] or absent, "bytes_per_expert": 0 or absent}
 *
 * `convoke-plan probe` measures one. Times are microseconds, bandwidths 10^9 bytes a second. */
#ifndef CONVOKE_PLACEMENT_TOPOLOGY_H
#define CONVOKE_PLACEMENT_TOPOLOGY_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { LINK_SAME_RANK, LINK_SAME_NODE, LINK_CROSS_NODE, N_LINK_CLASSES } link_class;

typedef struct {
    double us, gb_per_s;
} link_cost;

typedef struct {
    int n_ranks, n_nodes;
    int *node_of_rank;              /* [n_ranks] 0 .. n_nodes - 1, every node has a rank */
    int *local_index;               /* [n_ranks] place among its node's ranks, in rank order */
    double *row_us;                 /* [n_ranks] computing one (token, expert) row, > 0 */
    double *expert_us;              /* [n_ranks] for each expert with at least one row, >= 0 */
    int64_t *expert_bytes;          /* [n_ranks] room for experts' weights, all layers together; -1: no limit */
    link_cost link[N_LINK_CLASSES]; /* LINK_SAME_RANK costs nothing */
    double *links;            /* [n_ranks][n_ranks] GB/s from, to; NULL: the classes say it. Its diagonal is not looked at */
    double row_bytes;         /* one row on a link, one way */
    int64_t bytes_per_expert; /* 0: unknown */
} topology;

/* n_ranks ranks spread over n_nodes in equal blocks (rank r on node r * n_nodes / n_ranks), with the constants of a 2-core CPU
 * rank: row_us 250, expert_us 1650, same node 5 GB/s and 15 us, cross node 1 GB/s and 60 us, row_bytes 5760; no budgets. */
status topology_uniform(int n_ranks, int n_nodes, topology *out);
/* Refuses by name: no ranks, negative, zero or not finite numbers, nodes that leave one out, a matrix of the wrong size. */
status topology_read(const char *path, topology *out);
status topology_parse(const char *where, const char *text, size_t size, topology *out);
status topology_write(const topology *t, const char *path); /* whole or not at all */
/* Other nodes for the same ranks, [n_ranks]; refuses numbers that leave one out and then changes nothing. */
status topology_set_nodes(topology *t, const uint32_t *node_of_rank);
status topology_copy(const topology *t, topology *out);
void topology_clear(topology *t); /* a zeroed one is fine */

static inline link_class topology_link(const topology *t, int from, int to)
{
    return from == to ? LINK_SAME_RANK : t->node_of_rank[from] == t->node_of_rank[to] ? LINK_SAME_NODE : LINK_CROSS_NODE;
}
/* Microseconds that one byte takes from rank to rank, 0 on the same rank; start-up times (link[].us) come on top. */
static inline double topology_us_per_byte(const topology *t, int from, int to)
{
    link_class c = topology_link(t, from, to);
    if (c == LINK_SAME_RANK)
        return 0;
    return 1e-3 / (t->links ? t->links[(size_t)from * (size_t)t->n_ranks + (size_t)to] : t->link[c].gb_per_s);
}

#endif
