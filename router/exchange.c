/* exchange.c - the table of ways, and what all of them share.
 *
 * A row's parts come home from several places: this rank's own private results, other ranks' windows, messages from other nodes.
 * They are not copied together: parts[row] lists where they lie, in the order in which they are added (own node's ranks by
 * number, then other nodes by number; exact: by expert), and exchange_combine() reads them there, once. */
#include "router/exchange_internal.h"

#include "router/node_window.h"

#include <stdlib.h>
#include <string.h>

static const exchange_way *pick(const group *g)
{
    return group_size(g) == 1 ? &exchange_way_self : &exchange_way_mpi;
}

/* ---- life ---- */

status exchange_allocate(exchange *x, size_t bytes, void *out_pointer)
{
    size_t rounded = (bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, rounded ? rounded : 64);
    if (!memory)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for %zu MB of exchange buffers: lower --max-rows", x->rank,
                           bytes >> 20);
    memcpy(out_pointer, &memory, sizeof memory);
    x->buffer_bytes += rounded;
    return STATUS_OK;
}

static status allocate_zeroed(exchange *x, size_t bytes, void *out_pointer)
{
    void *memory = NULL;
    TRY(exchange_allocate(x, bytes, &memory));
    memset(memory, 0, bytes);
    memcpy(out_pointer, &memory, sizeof memory);
    return STATUS_OK;
}

static status check_shape(const exchange_shape *s, int size)
{
    if (s->hidden < 1 || s->max_rows < 1 || s->n_threads < 1 || s->top_k < 1 || s->top_k > COMBINE_MAX_K)
        return status_fail(STATUS_UNSUPPORTED,
                           "exchange: hidden %d, %d rows, %d threads, top-%d: each must be at least 1, top-k at "
                           "most %d",
                           s->hidden, s->max_rows, s->n_threads, s->top_k, COMBINE_MAX_K);
    if (size > UINT16_MAX)
        return status_fail(STATUS_UNSUPPORTED, "exchange: %d ranks are more than a route can name (%d)", size, UINT16_MAX);
    return STATUS_OK;
}

static status allocate_common(exchange *x)
{
    size_t rows = (size_t)x->shape.max_rows, k = (size_t)x->shape.top_k, size = (size_t)x->size;
    TRY(allocate_zeroed(x, rows * sizeof *x->exponents, &x->exponents));
    TRY(allocate_zeroed(x, size * sizeof *x->packets, &x->packets));
    TRY(allocate_zeroed(x, size * sizeof *x->scratch, &x->scratch));
    TRY(allocate_zeroed(x, size * sizeof *x->from, &x->from));
    TRY(allocate_zeroed(x, size * (size_t)x->shape.n_threads * sizeof *x->spills, &x->spills));
    TRY(allocate_zeroed(x, rows * k * sizeof *x->parts, &x->parts));
    TRY(allocate_zeroed(x, rows * k * sizeof *x->part_experts, &x->part_experts));
    TRY(allocate_zeroed(x, rows * sizeof *x->n_parts, &x->n_parts));
    TRY(allocate_zeroed(x, (rows + 1) * sizeof *x->home_first, &x->home_first));
    TRY(allocate_zeroed(x, size * sizeof *x->rows_to_rank, &x->rows_to_rank));
    TRY(allocate_zeroed(x, size * sizeof *x->rows_sent, &x->rows_sent));
    TRY(allocate_zeroed(x, size * sizeof *x->rows_relayed, &x->rows_relayed));
    x->stats.rows_to_rank = x->rows_to_rank;
    x->stats.rows_sent = x->rows_sent;
    x->stats.rows_relayed = x->rows_relayed;
    return exchange_allocate(x, x->max_results * x->result_bytes, &x->own_results);
}

static status open_all(exchange *x)
{
    TRY(group_agree(x->g, check_shape(&x->shape, x->size)));
    TRY(group_agree(x->g, allocate_common(x)));
    return x->way->open(x); /* agrees by itself: it has several steps that all must take */
}

status exchange_create(group *g, const exchange_shape *shape, exchange **out)
{
    exchange *x = calloc(1, sizeof *x);
    if (!x)
        return group_agree(g, status_fail(STATUS_NO_MEMORY, "no memory for the exchange"));
    x->way = pick(g);
    x->g = g;
    x->shape = *shape;
    x->rank = group_rank(g);
    x->size = group_size(g);
    /* Rows a multiple of 4 KiB apart fall into the same sets of the first cache: one line between them keeps them apart. */
    x->row_stride = ((size_t)shape->hidden + 15) / 16 * 16 + 16;
    x->row_bytes = (size_t)shape->hidden * (shape->rows == ROWS_BF16 ? sizeof(uint16_t) : sizeof(float));
    x->result_bytes = (size_t)shape->hidden * sizeof(float);
    x->max_results = (size_t)shape->max_rows * (shape->combine == COMBINE_EXACT ? (size_t)shape->top_k : 1);
    status st = open_all(x);
    if (st != STATUS_OK) {
        exchange_destroy(x);
        return st;
    }
    *out = x;
    return STATUS_OK;
}

void exchange_destroy(exchange *x)
{
    if (!x)
        return;
    x->way->close(x);
    for (int i = 0; x->spills && i < x->size * x->shape.n_threads; i++)
        spill_list_clear(&x->spills[i]);
    free(x->exponents);
    free(x->packets);
    free(x->scratch);
    free(x->from);
    free(x->own_results);
    free(x->spills);
    free(x->parts);
    free(x->part_experts);
    free(x->n_parts);
    free(x->home);
    free(x->home_first);
    free(x->rows_to_rank);
    free(x->rows_sent);
    free(x->rows_relayed);
    free(x);
}

/* ---- out ---- */

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static void round_rows(exchange *x)
{
    for (int r = 0; r < x->n_rows; r++) {
        const float *restrict in = x->rows + (size_t)r * x->row_stride;
        uint16_t *restrict out = x->rows_bf16 + (size_t)r * x->row_stride;
        for (int i = 0; i < x->shape.hidden; i++)
            out[i] = to_bf16(in[i]);
    }
}

static void count_out(exchange *x)
{
    const int *node = group_node_of_rank(x->g);
    for (int r = 0; r < x->size; r++) {
        unsigned long long n = x->packets[r].n_rows;
        x->rows_to_rank[r] += n;
        if (r == x->rank) {
            x->stats.bytes_same_rank += n * x->row_bytes;
        } else if (node[r] == node[x->rank]) {
            x->rows_sent[r] += n;
            x->stats.bytes_same_node += n * x->row_bytes;
            x->stats.header_bytes += n * sizeof(packet_row) + x->packets[r].n_entries * sizeof(packet_entry);
        } /* between nodes a row is counted once per node, where the message is made */
    }
    x->stats.combined_rows += (unsigned long long)x->n_rows;
}

static void open_own(exchange *x)
{
    exchange_incoming *own = &x->from[x->rank];
    own->packet = x->packets[x->rank];
    own->rows = exchange_own_rows(x, &own->row_bytes);
    own->results = x->own_results;
}

status exchange_share(exchange *x, const int32_t *mine, int n, int32_t *all)
{
    if (n < 0 || n > x->shape.share)
        return status_fail(STATUS_BAD_INPUT, "exchange: %d numbers to share, made for at most %d", n, x->shape.share);
    double start = clock_seconds();
    x->shares++;
    status st = x->way->share(x, mine, n, all);
    x->stats.wait_seconds += clock_seconds() - start;
    x->stats.header_bytes += (size_t)n * sizeof *mine;
    return st;
}

status exchange_send(exchange *x, int n_rows, const route *routes, const int16_t *exponents)
{
    if (n_rows < 0 || n_rows > x->shape.max_rows)
        return status_fail(STATUS_BAD_INPUT, "exchange: %d rows to send, made for at most %d", n_rows, x->shape.max_rows);
    x->layer++;
    atomic_fetch_add_explicit(&group_pulse_of(x->g, x->rank)->moves, 1,
                              memory_order_relaxed); /* a sign of life for who watches */
    x->n_rows = n_rows;
    for (int i = 0; i < x->size * x->shape.n_threads; i++)
        x->spills[i].n = 0;
    TRY(x->way->begin(x));
    if (exponents && n_rows)
        memcpy(x->exponents, exponents, (size_t)n_rows * sizeof *exponents);
    packet_build(routes, exponents, n_rows, x->shape.top_k, x->size, x->packet_rows, x->packet_entries, x->packets, x->scratch);
    if (x->rows_bf16)
        round_rows(x);
    count_out(x);
    open_own(x);
    return x->way->send(x);
}

status exchange_wait(exchange *x)
{
    double start = clock_seconds();
    status st = x->way->wait(x);
    x->stats.wait_seconds += clock_seconds() - start;
    return st;
}

const exchange_incoming *exchange_from(exchange *x, int source)
{
    return &x->from[source];
}

spill_list *exchange_spills(exchange *x, int thread, int source)
{
    return &x->spills[(size_t)thread * (size_t)x->size + (size_t)source];
}

size_t exchange_count_spills(const exchange *x, int source)
{
    size_t n = 0;
    for (int t = 0; t < x->shape.n_threads; t++)
        n += x->spills[(size_t)t * (size_t)x->size + (size_t)source].n;
    return n;
}

void exchange_merge_spills(const exchange *x, int source, combine_spill *out)
{
    size_t n = 0;
    for (int t = 0; t < x->shape.n_threads; t++) {
        const spill_list *list = &x->spills[(size_t)t * (size_t)x->size + (size_t)source];
        if (list->n)
            memcpy(out + n, list->items, list->n * sizeof *out);
        n += list->n;
    }
    combine_sort_spills(out, n);
}

status exchange_return(exchange *x)
{
    return x->way->give_back(x);
}

/* ---- home ---- */

void exchange_home_add_row(exchange *x, uint32_t row, const void *result)
{
    x->parts[(size_t)row * (size_t)x->shape.top_k + (size_t)x->n_parts[row]++] = result;
}

/* exact: one part per entry, kept in rising expert order, which is the order of adding. */
static void add_entry(exchange *x, uint32_t row, uint16_t expert, const void *result)
{
    size_t first = (size_t)row * (size_t)x->shape.top_k;
    int n = x->n_parts[row]++;
    for (; n > 0 && x->part_experts[first + (size_t)n - 1] > expert; n--) {
        x->parts[first + (size_t)n] = x->parts[first + (size_t)n - 1];
        x->part_experts[first + (size_t)n] = x->part_experts[first + (size_t)n - 1];
    }
    x->parts[first + (size_t)n] = result;
    x->part_experts[first + (size_t)n] = expert;
}

void exchange_home_add(exchange *x, const packet *p, const void *results)
{
    const char *at = results;
    for (uint32_t i = 0; i < p->n_rows; i++) {
        const packet_row *row = &p->rows[i];
        if (x->shape.combine != COMBINE_EXACT) {
            exchange_home_add_row(x, row->row, at + i * x->result_bytes);
            continue;
        }
        for (uint32_t e = row->first_entry; e < row->first_entry + row->n_entries; e++)
            add_entry(x, row->row, p->entries[e].expert, at + e * x->result_bytes);
    }
}

static status reserve_home(exchange *x, size_t n)
{
    if (n <= x->home_capacity)
        return STATUS_OK;
    size_t capacity = n + n / 2 + 64;
    combine_spill *home = reallocarray(x->home, capacity, sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for %zu elements out of range", x->rank, n);
    x->home = home;
    x->home_capacity = capacity;
    return STATUS_OK;
}

status exchange_home_spills(exchange *x, const combine_spill *spills, size_t n, const packet_row *row_of)
{
    TRY(reserve_home(x, x->n_home + n));
    for (size_t i = 0; i < n; i++) {
        combine_spill *spill = &x->home[x->n_home++];
        *spill = spills[i];
        spill->row = row_of[spill->row].row;
    }
    return STATUS_OK;
}

static status add_own_spills(exchange *x)
{
    size_t n = exchange_count_spills(x, x->rank);
    if (n == 0)
        return STATUS_OK;
    TRY(reserve_home(x, n));
    exchange_merge_spills(x, x->rank, x->home);
    for (size_t i = 0; i < n; i++)
        x->home[i].row = x->packets[x->rank].rows[x->home[i].row].row;
    x->n_home = n;
    return STATUS_OK;
}

static void index_home_spills(exchange *x)
{
    combine_sort_spills(x->home, x->n_home);
    size_t at = 0;
    for (int r = 0; r < x->n_rows; r++) {
        x->home_first[r] = (uint32_t)at;
        while (at < x->n_home && x->home[at].row == (uint32_t)r)
            at++;
        x->stats.spilled_rows += at > x->home_first[r];
    }
    x->home_first[x->n_rows] = (uint32_t)at;
    x->stats.spills += x->n_home;
}

status exchange_wait_results(exchange *x)
{
    double start = clock_seconds();
    if (x->n_rows)
        memset(x->n_parts, 0, (size_t)x->n_rows * sizeof *x->n_parts);
    x->n_home = 0;
    TRY(add_own_spills(x));
    TRY(x->way->wait_results(x));
    index_home_spills(x);
    x->stats.wait_seconds += clock_seconds() - start;
    return STATUS_OK;
}

static void combine_row(const exchange *x, int row, float *out)
{
    const void *const *parts = x->parts + (size_t)row * (size_t)x->shape.top_k;
    int n = x->n_parts[row];
    uint32_t first = x->home_first[row], spills = x->home_first[row + 1] - first;
    if (n == 0)
        memset(out, 0, x->result_bytes);
    else if (x->shape.combine == COMBINE_FIXED)
        combine_sum_fixed((const int32_t *const *)parts, n, x->exponents[row], x->shape.hidden, out);
    else
        combine_sum_floats((const float *const *)parts, n, x->shape.hidden, out);
    if (spills)
        combine_add_spills(x->home + first, spills, out);
}

void exchange_combine(exchange *x, int first, int last, float *out, size_t out_stride)
{
    for (int row = first; row < last; row++)
        combine_row(x, row, out + (size_t)row * out_stride);
}

/* ---- questions ---- */

float *exchange_rows(exchange *x, size_t *row_stride)
{
    *row_stride = x->row_stride;
    return x->rows;
}

const char *exchange_name(const exchange *x)
{
    return x->way->name;
}

size_t exchange_buffer_bytes(const exchange *x)
{
    return x->buffer_bytes;
}

const exchange_stats *exchange_get_stats(const exchange *x)
{
    return &x->stats;
}
