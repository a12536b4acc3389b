/* support_exchange.h - one checked layer of an exchange, for one process (test_exchange) and for many (mpi_exchange).
 *
 * "Experts" are a cheap function of (row, expert), computed by whoever receives the row from the row it received. What comes home
 * must be, bit for bit, what one process computes by itself (exact, fixed), or close to it (fast). */
#ifndef CONVOKE_TESTS_SUPPORT_EXCHANGE_H
#define CONVOKE_TESTS_SUPPORT_EXCHANGE_H

#include "router/exchange.h"
#include "tests/support.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    exchange_shape shape;
    int n_experts;
    float *row, *y, *out; /* [hidden], [hidden], [max_rows][hidden] */
    route *routes;        /* [max_rows][top_k] */
    int16_t *exponents;   /* [max_rows] */
    int n_rows;
    /* what the routes say, since start */
    unsigned long long *rows_to_rank, same_node, cross_node, home_same_node, home_cross_node;
} exchange_check;

static inline void exchange_check_open(exchange_check *c, const exchange_shape *shape, int n_experts, int n_ranks)
{
    size_t rows = (size_t)shape->max_rows, hidden = (size_t)shape->hidden;
    *c = (exchange_check){.shape = *shape, .n_experts = n_experts};
    c->row = calloc(hidden, sizeof(float));
    c->y = calloc(hidden, sizeof(float));
    c->out = calloc(rows * hidden, sizeof(float));
    c->routes = calloc(rows * (size_t)shape->top_k, sizeof *c->routes);
    c->exponents = calloc(rows, sizeof *c->exponents);
    c->rows_to_rank = calloc((size_t)n_ranks, sizeof *c->rows_to_rank);
}

static inline void exchange_check_close(exchange_check *c)
{
    free(c->row);
    free(c->y);
    free(c->out);
    free(c->routes);
    free(c->exponents);
    free(c->rows_to_rank);
}

/* Every ninth expert is loud enough to leave the range of fixed. */
static inline void check_expert(const float *x, int hidden, int expert, float *y)
{
    float gain = (expert % 9 == 4 ? 300.0f : 1.0f) * (1.0f + 0.125f * (float)(expert % 5));
    for (int i = 0; i < hidden; i++)
        y[i] = x[(i + expert) % hidden] * gain + 0.01f * (float)(expert % 7);
}

static inline float check_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t low = bits & 0xffffu, high = bits >> 16;
    high += low > 0x8000u || (low == 0x8000u && (high & 1));
    bits = high << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rows and routes of one layer. */
static inline void check_choose(exchange_check *c, exchange *x, int n_ranks, uint64_t *random, uint64_t *shared_random)
{
    size_t stride;
    float *rows = exchange_rows(x, &stride);
    int k = c->shape.top_k, hidden = c->shape.hidden;
    int pattern = support_below(shared_random, 7); /* the same on all ranks */
    int crowded = support_below(shared_random, n_ranks), empty = support_below(shared_random, n_ranks);
    c->n_rows = pattern == 5 ? 0 : pattern == 0 ? c->shape.max_rows : support_below(random, c->shape.max_rows + 1);
    for (int r = 0; r < c->n_rows; r++) {
        for (int i = 0; i < hidden; i++)
            rows[(size_t)r * stride + (size_t)i] = support_gauss(random);
        int e = combine_exponent(rows + (size_t)r * stride, hidden, k) + (support_below(random, 8) ? 0 : 5);
        c->exponents[r] = (int16_t)(e > 100 ? 100 : e);
        int expert = support_below(random, c->n_experts);
        for (int j = 0; j < k; j++) {
            route *to = &c->routes[(size_t)r * (size_t)k + (size_t)j];
            bool drop = pattern == 4 || (pattern == 3 && support_below(random, 3) == 0) || j >= c->n_experts;
            expert = (expert + 1) % c->n_experts; /* distinct, and rising but for the wrap */
            int rank = pattern == 1 ? crowded : pattern == 2 ? expert % n_ranks : support_below(random, n_ranks);
            if (pattern == 6 && rank == empty)
                rank = (rank + 1) % n_ranks;
            *to = (route){.expert = drop ? ROUTE_NONE : (uint16_t)expert,
                          .rank = (uint16_t)rank,
                          .weight = drop ? 0 : 0.05f + (float)support_below(random, 1000) / 1000.0f};
        }
    }
}

/* What the routes ask for, counted the slow way. */
static inline void check_count(exchange_check *c, const group *g)
{
    const int *node = group_node_of_rank(g);
    int me = group_rank(g), k = c->shape.top_k;
    unsigned long long row_bytes = (unsigned long long)c->shape.hidden * (c->shape.rows == ROWS_BF16 ? 2 : 4);
    unsigned long long result_bytes = (unsigned long long)c->shape.hidden * 4;
    for (int r = 0; r < c->n_rows; r++)
        for (int n = 0; n < group_n_nodes(g); n++) {
            int entries = 0;
            for (int to = 0; to < group_size(g); to++) {
                int here = 0;
                for (int j = 0; j < k; j++)
                    here += c->routes[r * k + j].expert != ROUTE_NONE && c->routes[r * k + j].rank == to && node[to] == n;
                c->rows_to_rank[to] += here > 0;
                entries += here;
                if (here && to != me && n == node[me]) {
                    c->same_node += row_bytes;
                    c->home_same_node += result_bytes * (c->shape.combine == COMBINE_EXACT ? (unsigned long long)here : 1);
                }
            }
            if (entries && n != node[me]) {
                c->cross_node += row_bytes;
                c->home_cross_node += result_bytes * (c->shape.combine == COMBINE_EXACT ? (unsigned long long)entries : 1);
            }
        }
}

/* One entry's contribution, its columns shared between the threads' lists as computing threads share them. */
static inline status check_contribute(exchange_check *c, exchange *x, int source, uint32_t i, uint32_t e)
{
    const exchange_incoming *in = exchange_from(x, source);
    const packet_row *row = &in->packet.rows[i];
    const packet_entry *entry = &in->packet.entries[e];
    int h = c->shape.hidden, t = c->shape.n_threads;
    size_t at = (size_t)(c->shape.combine == COMBINE_EXACT ? e : i) * (size_t)h;
    for (int k = 0; k < t; k++) {
        int first = h * k / t, last = h * (k + 1) / t;
        if (c->shape.combine == COMBINE_EXACT)
            combine_store_exact(c->y, entry->weight, first, last, (float *)in->results + at);
        else if (c->shape.combine == COMBINE_FAST)
            combine_add_fast(c->y, entry->weight, first, last, (float *)in->results + at);
        else
            TRY(combine_add_fixed(c->y, entry->weight, row->exponent, c->shape.top_k, i, entry->expert, first, last,
                                  (int32_t *)in->results + at, exchange_spills(x, k, source)));
    }
    return STATUS_OK;
}

static inline status check_compute(exchange_check *c, exchange *x, int source)
{
    const exchange_incoming *in = exchange_from(x, source);
    size_t h = (size_t)c->shape.hidden;
    if (c->shape.combine != COMBINE_EXACT && in->packet.n_rows)
        memset(in->results, 0, in->packet.n_rows * h * 4);
    for (uint32_t i = 0; i < in->packet.n_rows; i++) {
        const packet_row *row = &in->packet.rows[i];
        const char *bytes = (const char *)in->rows + row->row * in->row_bytes;
        for (size_t j = 0; j < h; j++) {
            uint32_t wide = c->shape.rows == ROWS_BF16 ? (uint32_t)((const uint16_t *)bytes)[j] << 16 : 0;
            memcpy(&c->row[j], c->shape.rows == ROWS_BF16 ? (const char *)&wide : bytes + 4 * j, 4);
        }
        for (uint32_t e = row->first_entry; e < row->first_entry + row->n_entries; e++) {
            check_expert(c->row, (int)h, in->packet.entries[e].expert, c->y);
            TRY(check_contribute(c, x, source, i, e));
        }
    }
    return STATUS_OK;
}

static inline int check_by_expert(const void *a, const void *b)
{
    return (int)((const route *)a)->expert - (int)((const route *)b)->expert;
}

/* The definition: element `i` of one row, from its routes in rising expert order; *size: sum of magnitudes. */
static inline float check_element(const exchange_check *c, const route *routes, const float (*y)[4096], int exponent, int i,
                                  float *size)
{
    float sum = 0, spills[COMBINE_MAX_K];
    double whole = 0, limit = ldexp(1, 31 - (int)ceil(log2(c->shape.top_k)));
    int n_spills = 0;
    *size = 0;
    for (int j = 0; j < c->shape.top_k; j++) {
        if (routes[j].expert == ROUTE_NONE)
            continue;
        volatile float v = routes[j].weight * y[j][i];
        *size += fabsf(v);
        if (c->shape.combine != COMBINE_FIXED)
            sum += v;
        else if (fabs(ldexp(v, exponent)) < limit)
            whole += rint(ldexp(v, exponent));
        else
            spills[n_spills++] = v;
    }
    if (c->shape.combine == COMBINE_FIXED)
        sum = ldexpf((float)whole, -exponent);
    for (int j = 0; j < n_spills; j++)
        sum += spills[j];
    return sum;
}

static inline status check_row(exchange_check *c, const float *row, int r)
{
    static float y[COMBINE_MAX_K][4096];
    int h = c->shape.hidden, k = c->shape.top_k;
    route *routes = c->routes + (size_t)r * (size_t)k;
    qsort(routes, (size_t)k, sizeof *routes, check_by_expert);
    for (int i = 0; i < h; i++)
        c->row[i] = c->shape.rows == ROWS_BF16 ? check_bf16(row[i]) : row[i];
    for (int j = 0; j < k; j++)
        if (routes[j].expert != ROUTE_NONE)
            check_expert(c->row, h, routes[j].expert, y[j]);
    for (int i = 0; i < h; i++) {
        float size, want = check_element(c, routes, (const float(*)[4096])y, c->exponents[r], i, &size);
        float got = c->out[(size_t)r * (size_t)h + (size_t)i];
        bool good = c->shape.combine == COMBINE_FAST ? fabsf(got - want) <= 1e-5f * size : memcmp(&got, &want, 4) == 0;
        if (!good)
            return status_fail(STATUS_BAD_INPUT, "row %d of %d, column %d came home as %.9g instead of %.9g", r, c->n_rows, i,
                               got, want);
    }
    return STATUS_OK;
}

static inline status check_stats(const exchange_check *c, const exchange *x, const group *g)
{
    const exchange_stats *s = exchange_get_stats(x);
    for (int r = 0; r < group_size(g); r++)
        if (s->rows_to_rank[r] != c->rows_to_rank[r])
            return status_fail(STATUS_BAD_INPUT, "%llu rows counted to rank %d, routes say %llu", s->rows_to_rank[r], r,
                               c->rows_to_rank[r]);
    if (s->bytes_same_node != c->same_node || s->bytes_cross_node != c->cross_node)
        return status_fail(STATUS_BAD_INPUT, "%llu and %llu bytes counted inside and between nodes, routes say %llu and %llu",
                           s->bytes_same_node, s->bytes_cross_node, c->same_node, c->cross_node);
    return STATUS_OK;
}

static inline int32_t check_number(int rank, int i, uint64_t key)
{
    return (int32_t)((uint64_t)rank * 7919 + (uint64_t)i * 104729 + key);
}

/* [all] All ranks' numbers, as many as `shared_random` says. */
static inline status check_share(exchange_check *c, exchange *x, const group *g, uint64_t *shared_random)
{
    int n = support_below(shared_random, c->shape.share + 1), size = group_size(g);
    uint64_t key = (uint64_t)support_below(shared_random, 1000);
    int32_t *mine = calloc((size_t)n + 1, sizeof *mine), *all = calloc((size_t)n * (size_t)size + 1, sizeof *all);
    bool good = true;
    for (int i = 0; i < n; i++)
        mine[i] = check_number(group_rank(g), i, key);
    status st = exchange_share(x, mine, n, all);
    for (int r = 0; r < size; r++)
        for (int i = 0; i < n; i++)
            good &= all[r * n + i] == check_number(r, i, key);
    free(mine);
    free(all);
    TRY(st);
    return good ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "rank %d got other numbers than were shared", group_rank(g));
}

/* [all] One layer. `random` differs between ranks, `shared_random` does not; `pause` may sleep (NULL: not). */
static inline status exchange_check_layer(exchange_check *c, exchange *x, group *g, uint64_t *random, uint64_t *shared_random,
                                          void (*pause)(uint64_t *random))
{
    size_t stride;
    int me = group_rank(g), size = group_size(g);
    const float *rows = exchange_rows(x, &stride);
    check_choose(c, x, size, random, shared_random);
    check_count(c, g);
    if (pause)
        pause(random);
    for (int i = support_below(shared_random, 3); i > 0 && c->shape.share > 0; i--)
        TRY(check_share(c, x, g, shared_random));
    TRY(exchange_send(x, c->n_rows, c->routes, c->shape.combine == COMBINE_FIXED ? c->exponents : NULL));
    bool own_first = support_below(random, 2);
    if (own_first)
        TRY(check_compute(c, x, me));
    TRY(exchange_wait(x));
    if (pause)
        pause(random);
    for (int i = 0; i < size; i++)
        if (i != me || !own_first)
            TRY(check_compute(c, x, i));
    if (pause)
        pause(random);
    TRY(exchange_return(x));
    TRY(exchange_wait_results(x));
    memset(c->out, 0xff, (size_t)c->shape.max_rows * (size_t)c->shape.hidden * sizeof(float));
    int half = support_below(random, c->n_rows + 1);
    exchange_combine(x, half, c->n_rows, c->out, (size_t)c->shape.hidden);
    exchange_combine(x, 0, half, c->out, (size_t)c->shape.hidden);
    for (int r = 0; r < c->n_rows; r++)
        TRY(check_row(c, rows + (size_t)r * stride, r));
    return check_stats(c, x, g);
}

#endif
