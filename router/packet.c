/* packet.c - counting sort of routes by destination: one pass counts, one pass places.
 *
 * scratch[r] holds 1 + the last row that named rank r, so a row's second expert on the same rank is recognised at once and
 * joins the record instead of sending the row again: the work grows with the routes alone, not with ranks x rows. */
#include "router/packet.h"

#include <assert.h>
#include <string.h>

size_t packet_max_rows(int max_rows, int top_k, int n_ranks)
{
    return (size_t)max_rows * (size_t)(top_k < n_ranks ? top_k : n_ranks);
}

size_t packet_max_entries(int max_rows, int top_k)
{
    return (size_t)max_rows * (size_t)top_k;
}

static void count(const route *routes, int n_rows, int top_k, int n_ranks, packet *packets, uint32_t *last_row)
{
    for (int r = 0; r < n_ranks; r++)
        packets[r].n_rows = packets[r].n_entries = 0;
    memset(last_row, 0, (size_t)n_ranks * sizeof *last_row);
    for (int row = 0; row < n_rows; row++, routes += top_k)
        for (int j = 0; j < top_k; j++) {
            if (routes[j].expert == ROUTE_NONE)
                continue;
            int rank = routes[j].rank;
            assert(rank < n_ranks);
            packets[rank].n_entries++;
            if (last_row[rank] != (uint32_t)row + 1) {
                last_row[rank] = (uint32_t)row + 1;
                packets[rank].n_rows++;
            }
        }
}

/* Puts the entry where the row's experts stay rising. Routes come by weight, so any place may be the right one; a row has at
 * most top_k of them. Equal experts (a policy may not produce them) would keep their order. */
static void insert(packet_entry *entries, int n, const route *from)
{
    for (; n > 0 && entries[n - 1].expert > from->expert; n--)
        entries[n] = entries[n - 1];
    entries[n] = (packet_entry){.weight = from->weight, .expert = from->expert};
}

void packet_build(const route *routes, const int16_t *exponents, int n_rows, int top_k, int n_ranks, packet_row *rows,
                  packet_entry *entries, packet *packets, uint32_t *scratch)
{
    count(routes, n_rows, top_k, n_ranks, packets, scratch);
    size_t row_at = 0, entry_at = 0;
    for (int r = 0; r < n_ranks; r++) {
        packets[r].rows = rows + row_at;
        packets[r].entries = entries + entry_at;
        row_at += packets[r].n_rows;
        entry_at += packets[r].n_entries;
        packets[r].n_rows = packets[r].n_entries = 0; /* from here on: how many are placed */
    }
    memset(scratch, 0, (size_t)n_ranks * sizeof *scratch);
    for (int row = 0; row < n_rows; row++, routes += top_k)
        for (int j = 0; j < top_k; j++) {
            if (routes[j].expert == ROUTE_NONE)
                continue;
            packet *to = &packets[routes[j].rank];
            packet_row *records = rows + (to->rows - rows); /* the caller's own arrays, writable */
            if (scratch[routes[j].rank] != (uint32_t)row + 1) {
                scratch[routes[j].rank] = (uint32_t)row + 1;
                records[to->n_rows++] = (packet_row){
                    .row = (uint32_t)row, .first_entry = to->n_entries, .exponent = exponents ? exponents[row] : (int16_t)0};
            }
            packet_row *record = &records[to->n_rows - 1];
            insert(entries + (to->entries - entries) + record->first_entry, record->n_entries, &routes[j]);
            record->n_entries++;
            to->n_entries++;
        }
}
