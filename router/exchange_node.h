/* exchange_node.h - the part of exchange_mpi that happens inside a node, in shared windows. Internal to exchange_*.c; no MPI.
 *
 * What lies where, and until when, is told at the head of exchange_node.c. */
#ifndef CONVOKE_ROUTER_EXCHANGE_NODE_H
#define CONVOKE_ROUTER_EXCHANGE_NODE_H

#include "router/exchange_internal.h"
#include "router/group_internal.h"

/* A packet in shared memory or a message: places instead of pointers. */
typedef struct {
    uint32_t first_row, n_rows, first_entry, n_entries;
} packet_place;

/* Results for one source in the computing rank's window. */
typedef struct {
    uint64_t at;                    /* bytes into the results section */
    uint64_t first_spill, n_spills; /* items of the spill section */
} result_place;

/* Counts of layers; each is raised by the window's owner alone. */
typedef struct {
    node_event sent;     /* its packets and rows are there              */
    node_event relayed;  /* other nodes' messages it receives are there */
    node_event shared;   /* its numbers of exchange_share() are there (counts of shares) */
    node_event gathered; /* the node's first rank: other nodes' numbers are there       */
    node_event returned; /* its results are there, and it reads no rows any more */
} node_board;

typedef struct {
    const node_peers *peers; /* borrowed from the group */
    node_window *window;
    bool spin;
    size_t places[2], packet_rows[2], packet_entries[2]; /* offsets of sections; the same in all windows of the node */
    size_t rows, result_places, results, spills, relay, end;
    size_t share[2], gathered[2]; /* numbers: own; on the node's first rank other nodes', by node and place in it */
    size_t results_worst, results_ready, spills_worst, spills_ready; /* bytes; ready: set aside */
} exchange_node;

/* [all] relay_bytes: room for other nodes' messages, the same on all ranks of the node. */
status exchange_node_open(exchange *x, exchange_node *n, size_t relay_bytes);
void exchange_node_close(exchange *x, exchange_node *n);

node_board *exchange_node_board(const exchange_node *n, int local);
char *exchange_node_at(const exchange_node *n, int local, size_t offset);

/* Own numbers where the node's other ranks read them; theirs, whose `shared` has been reached; and those of other nodes, which
 * the first rank has gathered. */
void exchange_node_share(const exchange *x, const exchange_node *n, const int32_t *mine, int count);
const int32_t *exchange_node_shared(const exchange *x, const exchange_node *n, int local);
int32_t *exchange_node_gathered(const exchange *x, const exchange_node *n);

/* Where packets of the layer that begins go. */
void exchange_node_begin(exchange *x, exchange_node *n);
/* Own packets and rows may be read. */
void exchange_node_publish(exchange *x, exchange_node *n);
/* Fills x->from[] of the node's other ranks, whose `sent` has been reached. */
void exchange_node_read(exchange *x, exchange_node *n);
/* Gives every source but this rank its place for results; x->from[] must have all packets. */
status exchange_node_place_results(exchange *x, exchange_node *n);
/* Spills into the window; then results may be read. */
status exchange_node_give_back(exchange *x, exchange_node *n);
/* Results that rank `local` of this node computed for `source`, and its spills. */
const void *exchange_node_results(const exchange_node *n, int local, int source);
const combine_spill *exchange_node_spills(const exchange_node *n, int local, int source, size_t *n_spills);
/* Parts of own rows computed on this node. */
status exchange_node_home(exchange *x, exchange_node *n);

#endif
