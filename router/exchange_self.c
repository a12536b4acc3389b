/* exchange_self.c - the exchange of a job of one rank: nothing moves, rows and results stay where they are written. */
#include "router/exchange_internal.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    packet_row *rows;
    packet_entry *entries;
} self_memory;

static status self_open(exchange *x)
{
    size_t rows = (size_t)x->shape.max_rows, elements = rows * x->row_stride;
    self_memory *m = calloc(1, sizeof *m);
    if (!m)
        return status_fail(STATUS_NO_MEMORY, "no memory for the exchange");
    x->mine = m;
    TRY(exchange_allocate(x, elements * sizeof(float), &x->rows));
    if (x->shape.rows == ROWS_BF16)
        TRY(exchange_allocate(x, elements * sizeof(uint16_t), &x->rows_bf16));
    TRY(exchange_allocate(x, packet_max_rows(x->shape.max_rows, x->shape.top_k, 1) * sizeof *m->rows, &m->rows));
    TRY(exchange_allocate(x, packet_max_entries(x->shape.max_rows, x->shape.top_k) * sizeof *m->entries, &m->entries));
    x->packet_rows = m->rows;
    x->packet_entries = m->entries;
    return STATUS_OK;
}

static void self_close(exchange *x)
{
    self_memory *m = x->mine;
    if (!m)
        return;
    free(x->rows);
    free(x->rows_bf16);
    free(m->rows);
    free(m->entries);
    free(m);
}

static status self_nothing(exchange *x)
{
    (void)x;
    return STATUS_OK;
}

static status self_share(exchange *x, const int32_t *mine, int n, int32_t *all)
{
    (void)x;
    memcpy(all, mine, (size_t)n * sizeof *all);
    return STATUS_OK;
}

static status self_wait_results(exchange *x)
{
    exchange_home_add(x, &x->packets[0], x->own_results);
    return STATUS_OK;
}

const exchange_way exchange_way_self = {
    .name = "self",
    .open = self_open,
    .close = self_close,
    .share = self_share,
    .begin = self_nothing,
    .send = self_nothing,
    .wait = self_nothing,
    .give_back = self_nothing,
    .wait_results = self_wait_results,
};
