/* exchange_internal.h - what the ways of exchanging share. exchange.c holds the parts that do not depend on where peers are:
 * building packets, counting, and bringing partial rows together at home. Nobody but exchange*.c includes it. */
#ifndef CONVOKE_ROUTER_EXCHANGE_INTERNAL_H
#define CONVOKE_ROUTER_EXCHANGE_INTERNAL_H

#include "router/exchange.h"

/* One way. All return what the public function of the same name returns. */
typedef struct {
    const char *name;
    status (*open)(exchange *x); /* [all] sets rows, rows_bf16, packet_rows, packet_entries and allocates what is its own */
    void (*close)(exchange *x);  /* a half-opened one is fine */
    status (*share)(exchange *x, const int32_t *mine, int n, int32_t *all);
    status (*begin)(exchange *x); /* before packets are built: packet_rows and packet_entries may be moved here */
    status (*send)(exchange *x);
    status (*wait)(exchange *x);
    status (*give_back)(exchange *x);    /* exchange_return */
    status (*wait_results)(exchange *x); /* exchange_home_add for every part of own rows in order, and others' spills */
} exchange_way;

extern const exchange_way exchange_way_self, exchange_way_mpi;

struct exchange {
    const exchange_way *way;
    void *mine; /* the way's own */
    group *g;   /* borrowed */
    exchange_shape shape;
    int rank, size;
    uint32_t layer;      /* exchanges since start; the number in sentences */
    uint32_t shares;     /* exchange_share() since start */
    size_t row_stride;   /* elements between two rows */
    size_t row_bytes;    /* of one row's payload on the way: hidden * 4 or * 2 */
    size_t result_bytes; /* of one result row: hidden * 4 */
    size_t max_results;  /* result rows that max_rows rows can bring: exact one per route, else one per row and rank */

    float *rows;         /* [max_rows][row_stride] */
    uint16_t *rows_bf16; /* the same, rounded; NULL: fp32 */
    int n_rows;
    int16_t *exponents; /* [max_rows] */
    packet *packets;    /* [size] of the last send */
    packet_row *packet_rows;
    packet_entry *packet_entries;
    uint32_t *scratch; /* [size] */

    exchange_incoming *from; /* [size] */
    void *own_results;       /* private: what this rank computes for itself never passes the window */
    spill_list *spills;      /* [n_threads][size] */

    /* Where the parts of own rows lie, filled by wait_results. */
    const void **parts;     /* [max_rows][top_k] in the order they are added */
    uint16_t *part_experts; /* [max_rows][top_k] exact */
    int *n_parts;           /* [max_rows] */
    combine_spill *home;    /* sorted by row, expert, column */
    size_t n_home, home_capacity;
    uint32_t *home_first; /* [max_rows + 1] */

    exchange_stats stats;
    unsigned long long *rows_to_rank, *rows_sent, *rows_relayed;
    size_t buffer_bytes;
};

/* 64-byte aligned, counted in exchange_buffer_bytes(); not zeroed, so that what is never used costs no memory. */
status exchange_allocate(exchange *x, size_t bytes, void *out_pointer);

/* Result rows that a packet asks for: entries (exact) or rows. */
static inline size_t exchange_result_rows(const exchange *x, const packet *p)
{
    return x->shape.combine == COMBINE_EXACT ? p->n_entries : p->n_rows;
}

static inline const void *exchange_own_rows(const exchange *x, size_t *row_bytes)
{
    *row_bytes = x->row_stride * (x->rows_bf16 ? sizeof(uint16_t) : sizeof(float));
    return x->rows_bf16 ? (const void *)x->rows_bf16 : x->rows;
}

/* Results of one of this rank's packets, as its computer wrote them; the packet's row numbers are own rows'. */
void exchange_home_add(exchange *x, const packet *p, const void *results);
/* One partial row (fixed, fast) of own row `row`. */
void exchange_home_add_row(exchange *x, uint32_t row, const void *result);
/* Spills whose row r means own row row_of[r].row. */
status exchange_home_spills(exchange *x, const combine_spill *spills, size_t n, const packet_row *row_of);
/* All threads' spills for one source in one list at `out` (room for exchange_count_spills()), sorted. */
size_t exchange_count_spills(const exchange *x, int source);
void exchange_merge_spills(const exchange *x, int source, combine_spill *out);

#endif
