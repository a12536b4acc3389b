#include "worker/experts.h"

#include "worker/buffers.h"

#include <stdlib.h>
#include <string.h>

/* Tiles: TILE_ROWS rows by as many columns as keep a tile at TILE_FLOATS: wide enough that packing the rows costs a product
 * little, small enough to stay in the L2 cache beside rows and weights. Columns are cut in multiples of COLUMNS, which every
 * instruction set's register tile divides. */
enum { TILE_ROWS = 64, TILE_FLOATS = 64 * 192, COLUMNS = 48, WAVE_ROWS = 2048, HOME_ROWS = 32, ROW_PAD = 16 };

/* Reading a column of weights takes about as long as computing this many rows of it (measured from 1 to 64 rows). */
enum { READ_COST_ROWS = 5 };

/* One (row, expert) product of this layer. */
typedef struct {
    int source;
    uint32_t row, entry; /* in the source's packet */
    uint16_t expert;
    float weight;
    int exponent;
} product;

/* Rows first .. first + n_rows - 1 of the wave all go through `weights`. */
typedef struct {
    const mlp_weights *weights;
    int first, n_rows;
    long cost, cost_before; /* of one column; of one column of all segments before it */
} segment;

struct experts {
    experts_shape shape;
    const kernel_table *kernels; /* borrowed */
    thread_pool *pool;           /* borrowed */
    int capacity;                /* rows of a wave */
    product *products;           /* [max products], sorted by expert */
    int n_products;
    int *expert_start; /* [n_experts + 1] into products */
    int *home_count;   /* [n_experts] own rows per expert, this layer */
    segment *segments; /* [n_experts] */
    int n_segments;
    float *x; /* [capacity][hidden + ROW_PAD] */
    size_t x_stride;
    float *act;   /* [wave rows][inter + ROW_PAD] */
    float *tiles; /* per thread: gate and up tiles, then a down tile of TILE_ROWS full rows */
    size_t tile_floats;
    int load_rows, load_touched;
    size_t buffer_bytes;
    /* the pass that is running */
    exchange *exchange;
    const product *wave;
    const float *pass_x;
    size_t pass_x_stride, pass_act_stride;
    int pass_inter;
    float *block_out;
    size_t block_out_stride;
    status failed;
};

static size_t max_products(const experts_shape *s)
{
    return (size_t)s->n_ranks * (size_t)s->max_rows * (size_t)s->top_k;
}

status experts_create(const experts_shape *shape, const kernel_table *kernels, thread_pool *pool, experts **out)
{
    experts *e = calloc(1, sizeof *e);
    if (!e)
        return status_fail(STATUS_NO_MEMORY, "no memory for the experts' bookkeeping");
    e->shape = *shape;
    e->kernels = kernels;
    e->pool = pool;
    size_t n = (size_t)shape->n_experts;
    e->capacity = max_products(shape) < WAVE_ROWS ? (int)max_products(shape) : WAVE_ROWS;
    size_t expert_act = (size_t)e->capacity * (size_t)(shape->expert_inter + ROW_PAD);
    size_t dense_act = (size_t)shape->max_rows * (size_t)(shape->dense_inter + ROW_PAD);
    e->x_stride = (size_t)shape->hidden + ROW_PAD;
    e->tile_floats = 2 * TILE_FLOATS + (size_t)TILE_ROWS * (size_t)shape->hidden;
    e->products = buffer_take(1, max_products(shape) * sizeof *e->products, &e->buffer_bytes);
    e->expert_start = buffer_take(1, (n + 1) * sizeof *e->expert_start, &e->buffer_bytes);
    e->home_count = buffer_take(1, n * sizeof *e->home_count, &e->buffer_bytes);
    e->segments = buffer_take(1, n * sizeof *e->segments, &e->buffer_bytes);
    e->x = buffer_take(1, (size_t)e->capacity * e->x_stride * sizeof(float), &e->buffer_bytes);
    e->act = buffer_take(1, (expert_act > dense_act ? expert_act : dense_act) * sizeof(float), &e->buffer_bytes);
    e->tiles = buffer_take(1, (size_t)thread_pool_size(pool) * e->tile_floats * sizeof(float), &e->buffer_bytes);
    if (!e->products || !e->expert_start || !e->home_count || !e->segments || !e->x || !e->act || !e->tiles) {
        experts_destroy(e);
        return status_fail(STATUS_NO_MEMORY, "no memory for the experts' buffers");
    }
    *out = e;
    return STATUS_OK;
}

void experts_destroy(experts *e)
{
    if (!e)
        return;
    free(e->products);
    free(e->expert_start);
    free(e->home_count);
    free(e->segments);
    free(e->x);
    free(e->act);
    free(e->tiles);
    free(e);
}

size_t experts_buffer_bytes(const experts *e)
{
    return e->buffer_bytes;
}

void experts_last_load(const experts *e, int *rows, int *touched)
{
    *rows = e->load_rows;
    *touched = e->load_touched;
}

/* ---- splitting a pass by cost ---------------------------------------------------------------------------------------- */

static long column_cost(int n_rows)
{
    return n_rows + READ_COST_ROWS;
}

/* Where `bound` cuts n columns of `cost` each that start at `start`: a multiple of COLUMNS (16 where there are few), or the end.
 */
static int cut_columns(long start, long cost, int n, long bound)
{
    long column = (bound - start) / cost;
    if (bound <= start)
        return 0;
    long grain = n >= 16 * COLUMNS ? COLUMNS : 16;
    return column >= n ? n : (int)(column - column % grain);
}

static void add_segment(experts *e, const mlp_weights *weights, int first, int n_rows)
{
    const segment *last = e->n_segments ? &e->segments[e->n_segments - 1] : NULL;
    e->segments[e->n_segments++] = (segment){.weights = weights,
                                             .first = first,
                                             .n_rows = n_rows,
                                             .cost = column_cost(n_rows),
                                             .cost_before = last ? last->cost_before + last->cost : 0};
}

/* The columns of a segment that fall to thread t when all segments' columns are laid end to end. */
static void segment_share(const experts *e, const segment *s, int n_columns, int thread, int n_threads, int *first, int *last)
{
    const segment *end = &e->segments[e->n_segments - 1];
    long total = (end->cost_before + end->cost) * n_columns, start = s->cost_before * n_columns;
    *first = cut_columns(start, s->cost, n_columns, total * thread / n_threads);
    *last = cut_columns(start, s->cost, n_columns, total * (thread + 1) / n_threads);
}

static int tile_columns(int n_rows)
{
    int rows = n_rows < TILE_ROWS ? n_rows : TILE_ROWS;
    int columns = TILE_FLOATS / rows;
    return columns < 16 * COLUMNS ? columns - columns % COLUMNS : 16 * COLUMNS;
}

static const void *matrix_row(const weight_matrix *w, int row)
{
    return (const char *)w->data + (size_t)row * (size_t)w->n_in * weight_format_size(w->format);
}

/* ---- the passes -------------------------------------------------------------------------------------------------------- */

static void gate_up_tile(experts *e, const segment *s, float *tile, int row, int n_rows, int column, int n_columns)
{
    const mlp_weights *w = s->weights;
    const float *x = e->pass_x + (size_t)(s->first + row) * e->pass_x_stride;
    float *gate = tile, *up = tile + TILE_FLOATS;
    size_t stride = (size_t)n_columns;
    e->kernels->matmul[w->gate.format](x, e->pass_x_stride, n_rows, matrix_row(&w->gate, column), w->gate.n_in, n_columns, gate,
                                       stride);
    e->kernels->matmul[w->up.format](x, e->pass_x_stride, n_rows, matrix_row(&w->up, column), w->up.n_in, n_columns, up, stride);
    for (int i = 0; i < n_rows; i++)
        e->kernels->swiglu(gate + (size_t)i * stride, up + (size_t)i * stride, n_columns,
                           e->act + (size_t)(s->first + row + i) * e->pass_act_stride + column);
}

static void pass_gate_up(void *arg, int thread, int n_threads)
{
    experts *e = arg;
    float *tile = e->tiles + (size_t)thread * e->tile_floats;
    for (int i = 0; i < e->n_segments; i++) {
        const segment *s = &e->segments[i];
        int first, last, step = tile_columns(s->n_rows);
        segment_share(e, s, e->pass_inter, thread, n_threads, &first, &last);
        for (int c = first; c < last; c += step)
            for (int r = 0; r < s->n_rows; r += TILE_ROWS)
                gate_up_tile(e, s, tile, r, s->n_rows - r < TILE_ROWS ? s->n_rows - r : TILE_ROWS, c,
                             last - c < step ? last - c : step);
    }
}

/* Adds columns [column, column + n) of one product's y into its source's result row. */
static status add_product(experts *e, int thread, const product *p, const float *y, int column, int n)
{
    const exchange_incoming *in = exchange_from(e->exchange, p->source);
    size_t hidden = (size_t)e->shape.hidden;
    switch (e->shape.combine) {
    case COMBINE_EXACT:
        combine_store_exact(y, p->weight, column, column + n, (float *)in->results + p->entry * hidden);
        return STATUS_OK;
    case COMBINE_FAST:
        combine_add_fast(y, p->weight, column, column + n, (float *)in->results + p->row * hidden);
        return STATUS_OK;
    case COMBINE_FIXED:
        break;
    }
    return combine_add_fixed(y, p->weight, p->exponent, e->shape.top_k, p->row, p->expert, column, column + n,
                             (int32_t *)in->results + p->row * hidden, exchange_spills(e->exchange, thread, p->source));
}

static void down_tile(experts *e, const segment *s, int thread, int row, int n_rows, int column, int n_columns)
{
    const weight_matrix *w = &s->weights->down;
    size_t hidden = (size_t)e->shape.hidden;
    const float *a = e->act + (size_t)(s->first + row) * e->pass_act_stride;
    if (e->block_out) {
        e->kernels->matmul[w->format](a, e->pass_act_stride, n_rows, matrix_row(w, column), w->n_in, n_columns,
                                      e->block_out + (size_t)row * e->block_out_stride + column, e->block_out_stride);
        return;
    }
    float *y = e->tiles + (size_t)thread * e->tile_floats + 2 * TILE_FLOATS;
    e->kernels->matmul[w->format](a, e->pass_act_stride, n_rows, matrix_row(w, column), w->n_in, n_columns, y + column, hidden);
    for (int i = 0; i < n_rows; i++) {
        status st = add_product(e, thread, &e->wave[s->first + row + i], y + (size_t)i * hidden, column, n_columns);
        if (st != STATUS_OK)
            __atomic_store_n(&e->failed, st, __ATOMIC_RELAXED);
    }
}

/* Down is split by output columns, the same for all experts of the wave: whatever adds into one element of a result runs on one
 * thread, in rising expert order. */
static void pass_down(void *arg, int thread, int n_threads)
{
    experts *e = arg;
    size_t first, last;
    thread_pool_share((size_t)e->shape.hidden, e->shape.hidden >= 16 * COLUMNS ? COLUMNS : 16, thread, n_threads, &first, &last);
    for (int i = 0; i < e->n_segments; i++) {
        const segment *s = &e->segments[i];
        int step = tile_columns(s->n_rows);
        for (int c = (int)first; c < (int)last; c += step)
            for (int r = 0; r < s->n_rows; r += TILE_ROWS)
                down_tile(e, s, thread, r, s->n_rows - r < TILE_ROWS ? s->n_rows - r : TILE_ROWS, c,
                          (int)last - c < step ? (int)last - c : step);
    }
}

/* Sums start at zero; exact results are stored, not added. */
static void zero_results(experts *e, exchange *x, int source)
{
    const exchange_incoming *in = exchange_from(x, source);
    if (e->shape.combine != COMBINE_EXACT && in->packet.n_rows)
        memset(in->results, 0, (size_t)in->packet.n_rows * (size_t)e->shape.hidden * sizeof(float));
}

static void gather_row(experts *e, const product *p, float *x)
{
    const exchange_incoming *in = exchange_from(e->exchange, p->source);
    const char *row = (const char *)in->rows + (size_t)in->packet.rows[p->row].row * in->row_bytes;
    if (e->shape.rows == ROWS_F32)
        memcpy(x, row, (size_t)e->shape.hidden * sizeof *x);
    else
        weights_to_f32(FORMAT_BF16, row, (size_t)e->shape.hidden, x);
}

static void pass_gather(void *arg, int thread, int n_threads)
{
    experts *e = arg;
    const segment *end = &e->segments[e->n_segments - 1];
    size_t first, last, n = e->n_segments ? (size_t)(end->first + end->n_rows) : 0;
    thread_pool_share(n, 1, thread, n_threads, &first, &last);
    for (size_t i = first; i < last; i++)
        gather_row(e, &e->wave[i], e->x + i * e->x_stride);
}

/* A handful of rows is copied faster than the threads are called. */
static void run_gather(experts *e, int n_rows)
{
    if ((size_t)n_rows * (size_t)e->shape.hidden <= 16384)
        pass_gather(e, 0, 1);
    else
        thread_pool_run(e->pool, pass_gather, e);
}

/* ---- from packets to waves ------------------------------------------------------------------------------------------- */

typedef enum { TAKE_HOME, TAKE_REST } take_rule;

/* Own rows of an expert that has many run early; all others later. Both passes must agree on this. */
static bool runs_early(const experts *e, int expert)
{
    return e->home_count[expert] >= HOME_ROWS;
}

static bool takes(const experts *e, take_rule rule, int source, int own_rank, int expert)
{
    if (source == own_rank && e->shape.n_ranks > 1)
        return (rule == TAKE_HOME) == runs_early(e, expert);
    return rule == TAKE_REST;
}

static void count_products(experts *e, exchange *x, int source, int own_rank, take_rule rule)
{
    const packet *p = &exchange_from(x, source)->packet;
    for (uint32_t i = 0; i < p->n_entries; i++)
        if (takes(e, rule, source, own_rank, p->entries[i].expert))
            e->expert_start[p->entries[i].expert + 1]++;
}

static void place_products(experts *e, exchange *x, int source, int own_rank, take_rule rule)
{
    const packet *p = &exchange_from(x, source)->packet;
    for (uint32_t r = 0; r < p->n_rows; r++) {
        const packet_row *row = &p->rows[r];
        for (uint32_t i = row->first_entry; i < row->first_entry + row->n_entries; i++) {
            const packet_entry *entry = &p->entries[i];
            if (!takes(e, rule, source, own_rank, entry->expert))
                continue;
            e->products[e->expert_start[entry->expert]++] = (product){.source = source,
                                                                      .row = r,
                                                                      .entry = i,
                                                                      .expert = entry->expert,
                                                                      .weight = entry->weight,
                                                                      .exponent = row->exponent};
        }
    }
}

/* Counting sort by expert; inside an expert by source, then row. */
static void collect_products(experts *e, exchange *x, int first_source, int last_source, int own_rank, take_rule rule)
{
    int n = e->shape.n_experts;
    memset(e->expert_start, 0, (size_t)(n + 1) * sizeof *e->expert_start);
    for (int s = first_source; s < last_source; s++)
        count_products(e, x, s, own_rank, rule);
    for (int i = 0; i < n; i++) {
        e->load_touched += e->expert_start[i + 1] > 0 && !(rule == TAKE_REST && e->shape.n_ranks > 1 && runs_early(e, i));
        e->expert_start[i + 1] += e->expert_start[i];
    }
    e->n_products = e->expert_start[n];
    e->load_rows += e->n_products;
    for (int s = first_source; s < last_source; s++)
        place_products(e, x, s, own_rank, rule);
}

/* The next wave: products [first, return value), cut into one segment per expert. */
static int form_wave(experts *e, const mlp_weights *weights, int first)
{
    int end = first + e->capacity < e->n_products ? first + e->capacity : e->n_products;
    e->n_segments = 0;
    for (int i = first; i < end;) {
        int expert = e->products[i].expert, j = i;
        while (j < end && e->products[j].expert == expert)
            j++;
        add_segment(e, &weights[expert], i - first, j - i);
        i = j;
    }
    return end;
}

static status run_waves(experts *e, const mlp_weights *weights, exchange *x)
{
    e->exchange = x;
    e->failed = STATUS_OK;
    e->pass_x = e->x;
    e->pass_x_stride = e->x_stride;
    e->pass_inter = e->shape.expert_inter;
    e->pass_act_stride = (size_t)e->shape.expert_inter + ROW_PAD;
    e->block_out = NULL;
    for (int first = 0, end; first < e->n_products; first = end) {
        end = form_wave(e, weights, first);
        e->wave = e->products + first;
        run_gather(e, end - first);
        thread_pool_run(e->pool, pass_gate_up, e);
        thread_pool_run(e->pool, pass_down, e);
    }
    if (e->failed != STATUS_OK)
        return status_fail(e->failed, "no memory for the results that are out of the fixed-point range");
    return STATUS_OK;
}

status experts_run_home(experts *e, const mlp_weights *weights, exchange *x, int own_rank)
{
    const packet *p = &exchange_from(x, own_rank)->packet;
    memset(e->home_count, 0, (size_t)e->shape.n_experts * sizeof *e->home_count);
    e->load_rows = e->load_touched = 0;
    for (uint32_t i = 0; i < p->n_entries; i++)
        e->home_count[p->entries[i].expert]++;
    if (e->shape.n_ranks == 1)
        return STATUS_OK; /* nobody to wait for */
    collect_products(e, x, own_rank, own_rank + 1, own_rank, TAKE_HOME);
    if (e->n_products == 0)
        return STATUS_OK;
    zero_results(e, x, own_rank);
    return run_waves(e, weights, x);
}

/* Result rows that no early pass has zeroed yet. */
static void zero_rest(experts *e, exchange *x, int own_rank)
{
    bool early = false;
    for (int i = 0; i < e->shape.n_experts && e->shape.n_ranks > 1; i++)
        early |= runs_early(e, i);
    for (int s = 0; s < e->shape.n_ranks; s++)
        if (!(early && s == own_rank))
            zero_results(e, x, s);
}

status experts_run_rest(experts *e, const mlp_weights *weights, exchange *x, int own_rank)
{
    zero_rest(e, x, own_rank);
    collect_products(e, x, 0, e->shape.n_ranks, own_rank, TAKE_REST);
    return run_waves(e, weights, x);
}

void experts_run_block(experts *e, const mlp_weights *block, const float *x, size_t x_stride, int n_rows, float *out,
                       size_t out_stride)
{
    if (n_rows == 0)
        return;
    e->n_segments = 0;
    add_segment(e, block, 0, n_rows);
    e->pass_x = x;
    e->pass_x_stride = x_stride;
    e->pass_inter = block->gate.n_out;
    e->pass_act_stride = (size_t)block->gate.n_out + ROW_PAD;
    e->block_out = out;
    e->block_out_stride = out_stride;
    thread_pool_run(e->pool, pass_gate_up, e);
    thread_pool_run(e->pool, pass_down, e);
}

/* ---- other projections ------------------------------------------------------------------------------------------------- */

typedef struct {
    const kernel_table *kernels;
    const projection *list;
    int n, n_rows;
    const float *x;
    size_t x_stride;
} projection_pass;

static void project_columns(const projection_pass *pass, const projection *p, int first, int last)
{
    const weight_matrix *w = p->w;
    int step = tile_columns(pass->n_rows);
    for (int c = first; c < last; c += step) {
        int n = last - c < step ? last - c : step;
        for (int r = 0; r < pass->n_rows; r += TILE_ROWS) {
            int m = pass->n_rows - r < TILE_ROWS ? pass->n_rows - r : TILE_ROWS;
            float *y = p->y + (size_t)r * p->y_stride + c;
            pass->kernels->matmul[w->format](pass->x + (size_t)r * pass->x_stride, pass->x_stride, m, matrix_row(w, c), w->n_in,
                                             n, y, p->y_stride);
            for (int i = 0; i < m && p->bias; i++)
                for (int j = 0; j < n; j++)
                    y[(size_t)i * p->y_stride + (size_t)j] += p->bias[c + j];
        }
    }
}

static void pass_project(void *arg, int thread, int n_threads)
{
    const projection_pass *pass = arg;
    long total = 0, start = 0;
    for (int i = 0; i < pass->n; i++)
        total += pass->list[i].w->n_out;
    for (int i = 0; i < pass->n; i++) {
        int n = pass->list[i].w->n_out;
        int first = cut_columns(start, 1, n, total * thread / n_threads);
        int last = cut_columns(start, 1, n, total * (thread + 1) / n_threads);
        project_columns(pass, &pass->list[i], first, last);
        start += n;
    }
}

void project(thread_pool *pool, const kernel_table *kernels, const projection *list, int n, const float *x, size_t x_stride,
             int n_rows)
{
    if (n_rows == 0)
        return;
    projection_pass pass = {.kernels = kernels, .list = list, .n = n, .n_rows = n_rows, .x = x, .x_stride = x_stride};
    thread_pool_run(pool, pass_project, &pass);
}
