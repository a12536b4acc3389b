/* group_internal.h - inside of the group: what group.c (words inside a node), group_mpi.c (words between nodes) and
 * exchange_mpi.c share. Nobody else includes it. */
#ifndef CONVOKE_ROUTER_GROUP_INTERNAL_H
#define CONVOKE_ROUTER_GROUP_INTERNAL_H

#include "router/group.h"
#include "router/node_window.h"

#define GROUP_HOST_BYTES 64

typedef struct {
    char *bytes;
    size_t size, capacity;
} group_buffer;

typedef struct group_links group_links; /* MPI's communicators; group_mpi.c */

struct group {
    int rank, size;
    int node, n_nodes;
    int local, n_local;    /* own place among the ranks of the node; 0 is the node's first rank, which speaks to other nodes */
    int *node_of_rank;     /* [size] */
    int *local_of_rank;    /* [size] */
    int *size_of_node;     /* [n_nodes] */
    int *rank_at;          /* [size] ranks sorted by (node, local) */
    int *first_of_node;    /* [n_nodes + 1] into rank_at */
    int *pid_of_node_rank; /* [n_local] */
    int *pid_of_rank;      /* [size] */
    int n_on_host;         /* ranks on this machine, whatever nodes are pretended */
    int own_cores, host_cores;      /* cores this rank may run on; cores any rank of this machine may */
    char (*host)[GROUP_HOST_BYTES]; /* [size] */
    group_links *links;             /* NULL: MPI was not started */
    unsigned n_windows;             /* windows made so far, for their names */

    node_peers peers;
    node_window *window; /* one board per rank of the node; NULL where n_local == 1 */
    group_pulse alone;   /* own pulse where there is no board */
    group_pulse *pulse;  /* own */
    uint32_t down, up;   /* chunks so far: from the node's first rank, from this rank */
    uint32_t *up_seen;   /* [n_local] on the node's first rank: chunks taken from each */
    group_buffer message, gathered, scratch;
    size_t *gathered_at;   /* [size] offsets */
    size_t *gathered_size; /* [size] */
};

status group_buffer_reserve(group_buffer *buffer, size_t size);

/* group_mpi.c. Functions marked [firsts] are entered by the first rank of every node, in the same order. */
bool group_mpi_launched(void);
status group_mpi_start(group *g, int *argc, char ***argv, int ranks_per_node); /* [all] fills in who is where */
void group_mpi_finish(group *g);                                               /* [all] */
void group_mpi_abort(group *g, int exit_code);
void group_mpi_look(void);                                                    /* lets MPI do what it has to */
status group_mpi_min_all(group *g, int value, int *out);                      /* [all] before windows exist */
status group_mpi_min(group *g, int value, int *out);                          /* [firsts] */
status group_mpi_broadcast(group *g, void *bytes, size_t size, bool patient); /* [firsts] patient: however long it takes */
/* [firsts] Node 0 takes the others' tables and bytes, node after node; the others give theirs. */
status group_mpi_give(group *g, const void *bytes, size_t size);
status group_mpi_take(group *g, int node, void *bytes, size_t size);

/* Any two ranks. */
status group_mpi_transfer(group *g, int peer, void *bytes, size_t size, bool send, uint64_t key);
status group_mpi_transferred(group *g, uint64_t *keys, int room, int *n);

/* "rank 3: MPI_Isend: MPI_ERR_TRUNCATE: message truncated" */
status group_mpi_failed(int rank, const char *call, int error);
#define TRY_MPI(rank, call, arguments)                                                                                           \
    do {                                                                                                                         \
        int mpi_error_ = call arguments;                                                                                         \
        if (mpi_error_ != MPI_SUCCESS)                                                                                           \
            return group_mpi_failed(rank, #call, mpi_error_);                                                                    \
    } while (0)

#endif
