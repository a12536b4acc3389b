/* packet.h - what one rank asks of another in one layer: rows, and for each row the experts to run and their weights. Pure.
 *
 * Routes say for each of a source's rows which rank computes each chosen expert. packet_build() turns them into one packet per
 * destination rank: one record per (row, distinct destination), entries sorted by expert. Rows themselves are not copied: a
 * record names the row's place in the source's block of rows. */
#ifndef CONVOKE_ROUTER_PACKET_H
#define CONVOKE_ROUTER_PACKET_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

#define ROUTE_NONE 0xffffu /* expert of a dropped route */

typedef struct {
    uint16_t expert, rank;
    float weight;
} route;

typedef struct {
    uint32_t row;         /* place in the block of rows it comes with */
    uint32_t first_entry; /* in this packet's entries */
    uint16_t n_entries;
    int16_t exponent; /* combine.h, fixed */
} packet_row;

typedef struct {
    float weight;
    uint16_t expert;
    uint16_t reserved;
} packet_entry;

typedef struct {
    const packet_row *rows;      /* rising by row */
    const packet_entry *entries; /* grouped by row, rising by expert inside */
    uint32_t n_rows, n_entries;
} packet;

/* Sizes for given limits, in records. */
size_t packet_max_rows(int max_rows, int top_k, int n_ranks);
size_t packet_max_entries(int max_rows, int top_k);

/* routes [n_rows][top_k], exponents [n_rows] (NULL: zeros). Fills rows/entries (sized by the limits above), destination after
 * destination, and packets[n_ranks] pointing into them. packet_row.row is the row's number here; a caller that sends a packed
 * block renumbers rows[] afterwards. A row whose routes are all ROUTE_NONE is in no packet. scratch: [n_ranks] uint32.
 * Linear in routes; every route's rank must be below n_ranks (asserted). */
void packet_build(const route *routes, const int16_t *exponents, int n_rows, int top_k, int n_ranks, packet_row *rows,
                  packet_entry *entries, packet *packets, uint32_t *scratch);

#endif
