/* exchange.h - moves token rows to the ranks that hold their experts, and the results home: one table, several ways.
 *
 *   owner                                   ranks that compute
 *   rows written in place, exchange_send ─► exchange_wait; packets and rows are read where they lie
 *                                           results are written in place, exchange_return ─┐
 *   exchange_wait_results, _combine    ◄───────────────────────────────────────────────────┘
 *
 * Inside a node nothing is copied on the way: rows lie in the owner's shared window and the computing rank reads them there;
 * results lie in the computing rank's window and the owner reads them there. Between nodes a row crosses once per node, to the
 * rank there with the owner's local index (modulo that node's size), which receives it into its own window where the others of
 * that node read it; results are summed on the node (exact: collected) and cross back once.
 *
 * Every rank takes part in every layer, rows or no rows: skipping one would leave its peers waiting. Functions marked [all] must
 * be entered by every rank in the same order. One thread calls, except where said. */
#ifndef CONVOKE_ROUTER_EXCHANGE_H
#define CONVOKE_ROUTER_EXCHANGE_H

#include "router/combine.h"
#include "router/group.h"
#include "router/packet.h"

typedef enum { ROWS_F32, ROWS_BF16 } row_format;

typedef struct {
    int hidden;    /* floats per row */
    int top_k;     /* routes per row */
    int max_rows;  /* rows one rank may own in one step */
    int n_threads; /* computing threads of this rank (one spill list each) */
    combine_mode combine;
    row_format rows;
    int share; /* numbers per rank in exchange_share(), at most; 0: it is not used */
} exchange_shape;

/* Rows that one source wants computed here. */
typedef struct {
    packet packet;
    const void *rows; /* row r of the source: rows + r * row_bytes; fp32 or bf16 as the shape says */
    size_t row_bytes; /* distance between rows */
    /* Where the results go: exact: float [n_entries][hidden] in entry order, all of it must be stored;
     * fixed: int32 [n_rows][hidden]; fast: float [n_rows][hidden], in packet row order; zeroed by the one who computes. */
    void *results;
} exchange_incoming;

typedef struct {
    const unsigned long long *rows_to_rank; /* [group size] rows asked of each rank since start, own rank included */
    /* Rows on links, dispatch: sent straight from this rank to each other one (of another node: the one that takes them for it);
     * and those of other nodes that this rank read where another rank of its node had received them, by that rank. [group size]
     */
    const unsigned long long *rows_sent, *rows_relayed;
    /* Their bytes: what this rank sent, between nodes once per node; what was relayed to it. */
    unsigned long long bytes_same_rank, bytes_same_node, bytes_cross_node, bytes_relayed;
    /* Result bytes sent home, combine, counted by the sender (between nodes by the one rank that sums); without spills. */
    unsigned long long return_bytes_same_node, return_bytes_cross_node;
    unsigned long long header_bytes;                        /* packets and counts */
    unsigned long long spills, spilled_rows, combined_rows; /* fixed: elements out of range, rows having any, rows in all */
    double wait_seconds;                                    /* in exchange_wait and _wait_results */
} exchange_stats;

typedef struct exchange exchange;

/* [all] Picks exchange_self for one rank, exchange_mpi otherwise; sizes all buffers. Fails with a sentence when /dev/shm is too
 * small. */
status exchange_create(group *g, const exchange_shape *shape, exchange **out);
void exchange_destroy(exchange *x);              /* [all] NULL is fine. After a lost peer: group_abort() instead */
const char *exchange_name(const exchange *x);    /* "self", "mpi" */
size_t exchange_buffer_bytes(const exchange *x); /* memory this rank set aside */

/* Where the owner writes its rows for the next send: fp32 [max_rows] rows, *row_stride floats apart. May be written by any
 * thread, from exchange_wait_results() (others read the last send's rows until then) to exchange_send(). The pointer never
 * changes. */
float *exchange_rows(exchange *x, size_t *row_stride);

/* [all] Before a layer's exchange_send(): every rank's n numbers (as many on all) to all, [group size][n] in the order of ranks.
 * Inside a node they lie in the windows; between nodes the first rank of each sends its node's to the others'. */
status exchange_share(exchange *x, const int32_t *mine, int n, int32_t *all);

/* [all] Starts a layer: this rank's n_rows rows with routes [n_rows][top_k] and exponents [n_rows] (fixed; else NULL). Returns at
 * once. */
status exchange_send(exchange *x, int n_rows, const route *routes, const int16_t *exponents);
/* [all] Everything for this rank has arrived. Own rows (source == own rank) may be read right after exchange_send(). */
status exchange_wait(exchange *x);
/* Valid from exchange_wait() (own rank: exchange_send()) to exchange_return(). */
const exchange_incoming *exchange_from(exchange *x, int source);
/* The list that `thread` adds spills for `source` to; rows are packet row numbers. Any computing thread, its own list. */
spill_list *exchange_spills(exchange *x, int thread, int source);
/* [all] All results are written. Returns at once. */
status exchange_return(exchange *x);
/* [all] All results for own rows are home. */
status exchange_wait_results(exchange *x);
/* After exchange_wait_results(), before the next exchange_send(). Rows [first, last) of the last send, combined into out (row r
 * at out + r * out_stride, overwritten; a row without routes becomes zeros). Any thread, disjoint rows. */
void exchange_combine(exchange *x, int first, int last, float *out, size_t out_stride);

const exchange_stats *exchange_get_stats(const exchange *x);

#endif
