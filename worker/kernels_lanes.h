/* kernels_lanes.h - the kernels that are the same text on every vector instruction set, written over one type: vec16, 16 lanes.
 *
 * Included once by each kernels_<isa>.c after it has defined vec16 and these operations (lane by lane unless said):
 *     v_set(f)  v_load(p)  v_store(p, v)  v_add  v_sub  v_mul  v_div  v_fma(a, b, c) = a * b + c, rounded once
 *     v_max(a, b) = a > b ? a : b         v_min(a, b) = a < b ? a : b         (so a NaN in b stays, one in a goes)
 *     v_load_first(p, n)                  the first n < 16 lanes, the rest +0; touches no memory behind them
 *     v_store_first(p, v, n)              writes the first n < 16 lanes only
 *     v_keep(v, begin, end)               lanes outside [begin, end) become -infinity, whatever they were
 *     v_times_power(p, t)                 p * 2^n in two halves, n in the low bits of t (kernels_tables.h)
 *     v_add_lanes(v)                      the fixed tree of kernels.h
 *     v_max_lane(v)                       the largest lane, v free of NaN
 *     VEC16_REGISTERS                     registers one vec16 takes
 *
 * attend() lets up to ATTEND_QUERIES (row, head) pairs walk the KV blocks side by side, so that a block is fetched once for the
 * whole head group and for several rows of a prefill tile. Inside a block both halves of the work are the same little product
 *     acc[query][column] += a[query][i] * b[i][column],  i rising:
 * scores with a = q, b = the transposed keys, columns = positions; values with a = the weights, b = the values, columns = d.
 * Neither the group nor the tile shape changes the order in which one query's sums run, so neither changes a bit. */
#ifndef CONVOKE_WORKER_KERNELS_LANES_H
#define CONVOKE_WORKER_KERNELS_LANES_H

#include "worker/kernels_tables.h"

#include <math.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

ALWAYS_INLINE vec16 v_load_upto(const float *p, int n)
{
    return n >= 16 ? v_load(p) : v_load_first(p, n);
}

ALWAYS_INLINE void v_store_upto(float *p, vec16 v, int n)
{
    if (n >= 16)
        v_store(p, v);
    else
        v_store_first(p, v, n);
}

ALWAYS_INLINE vec16 v_exp(vec16 x)
{
    x = v_min(v_set(EXP_HIGHEST), v_max(v_set(EXP_LOWEST), x));
    vec16 t = v_fma(x, v_set(EXP_LOG2E), v_set(EXP_MAGIC));
    vec16 n = v_sub(t, v_set(EXP_MAGIC));
    vec16 r = v_fma(n, v_set(-EXP_LN2_HI), x);
    r = v_fma(n, v_set(-EXP_LN2_LO), r);
    vec16 p = v_fma(v_set(EXP_P0), r, v_set(EXP_P1));
    p = v_fma(p, r, v_set(EXP_P2));
    p = v_fma(p, r, v_set(EXP_P3));
    p = v_fma(p, r, v_set(EXP_P4));
    p = v_fma(p, r, v_set(EXP_P5));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return v_times_power(p, t);
}

static void rmsnorm(const float *x, const float *weight, int n, float eps, float *y)
{
    vec16 squares = v_set(0.0f);
    for (int i = 0; i < n; i += 16) {
        vec16 v = v_load_upto(x + i, n - i);
        squares = v_fma(v, v, squares);
    }
    vec16 inverse = v_set(1.0f / sqrtf(v_add_lanes(squares) / (float)n + eps));
    for (int i = 0; i < n; i += 16)
        v_store_upto(y + i, v_mul(v_mul(v_load_upto(x + i, n - i), inverse), v_load_upto(weight + i, n - i)), n - i);
}

static void swiglu(const float *gate, const float *up, int n, float *out)
{
    for (int i = 0; i < n; i += 16) {
        vec16 g = v_load_upto(gate + i, n - i);
        vec16 silu = v_div(g, v_add(v_set(1.0f), v_exp(v_sub(v_set(0.0f), g))));
        v_store_upto(out + i, v_mul(silu, v_load_upto(up + i, n - i)), n - i);
    }
}

static float maximum(const float *x, int n)
{
    vec16 max = v_set(-INFINITY);
    for (int i = 0; i < n; i += 16) {
        vec16 v = v_load_upto(x + i, n - i);
        max = v_max(n - i >= 16 ? v : v_keep(v, 0, n - i), max);
    }
    return v_max_lane(max);
}

/* exp(x - max) of up to 16 numbers; what pads them becomes 0. */
ALWAYS_INLINE vec16 exp_below(const float *x, vec16 max, int n)
{
    vec16 v = v_sub(v_load_upto(x, n), max);
    return v_exp(n >= 16 ? v : v_keep(v, 0, n));
}

static void softmax(const float *x, int n, float *y)
{
    vec16 max = v_set(maximum(x, n)), sum = v_set(0.0f);
    for (int i = 0; i < n; i += 16) {
        vec16 e = exp_below(x + i, max, n - i);
        sum = v_add(sum, e);
        v_store_upto(y + i, e, n - i);
    }
    sum = v_set(v_add_lanes(sum));
    for (int i = 0; i < n; i += 16)
        v_store_upto(y + i, v_div(v_load_upto(y + i, n - i), sum), n - i);
}

static float log_sum_exp(const float *x, int n)
{
    float max = maximum(x, n);
    vec16 sum = v_set(0.0f);
    if (isinf(max))
        return max;
    for (int i = 0; i < n; i += 16)
        sum = v_add(sum, exp_below(x + i, v_set(max), n - i));
    return (float)((double)max + log((double)v_add_lanes(sum)));
}

/* ---- attention ---- */

#define ATTEND_QUERIES 32
#define ATTEND_TILE    6 /* most queries in one register tile */
/* Vectors of columns in a tile: enough independent sums to hide the latency of FMA, few enough to stay in registers. */
#define ATTEND_COLUMNS(rows) (VEC16_REGISTERS == 1 ? ((rows) > 3 ? 2 : 4) : (rows) > 2 ? 1 : (rows) > 1 ? 2 : 4)
#define SCORE_COLUMNS(rows)  (ATTEND_COLUMNS(rows) > KV_BLOCK / 16 ? KV_BLOCK / 16 : ATTEND_COLUMNS(rows))

typedef struct {
    const float *q;
    float *out;
    int first, position; /* the positions it sees: [first, position] */
    float max, sum;      /* of the blocks so far */
} attend_query;

/* One tile: up to ATTEND_TILE queries that all see something of one block. */
typedef struct {
    attend_query *query[ATTEND_TILE];
    int begin[ATTEND_TILE], end[ATTEND_TILE]; /* the part of the block each sees */
    size_t ahead;                             /* bytes from this block to the next one, which is prefetched meanwhile */
    float rescale[16];                        /* what the sums so far are multiplied by */
    float weight[ATTEND_TILE][KV_BLOCK] __attribute__((aligned(64))); /* first the scores, then exp(score - max) */
} attend_tile;

ALWAYS_INLINE void multiply_tile(const int rows, const int columns, const float *const *a, const float *b, size_t b_stride,
                                 int begin, int end, size_t ahead, vec16 *acc)
{
    for (int i = begin; i < end; i++) {
        vec16 bs[4];
        UNROLL for (int c = 0; c < columns; c++)
        {
            const float *row = b + (size_t)i * b_stride + 16 * c;
            bs[c] = v_load(row);
            __builtin_prefetch((const char *)((uintptr_t)row + ahead), 0, 2); /* to L2: L1 is full with this block */
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            vec16 factor = v_set(a[r][i]);
            UNROLL for (int c = 0; c < columns; c++) acc[r * columns + c] = v_fma(factor, bs[c], acc[r * columns + c]);
        }
    }
}

ALWAYS_INLINE void score_tile(const int rows, attend_tile *t, const float *keys, int head_dim, float scale)
{
    const int columns = SCORE_COLUMNS(rows);
    const float *q[ATTEND_TILE];
    UNROLL for (int r = 0; r < rows; r++) q[r] = t->query[r]->q;
    for (int j = 0; j < KV_BLOCK; j += 16 * columns) {
        vec16 acc[ATTEND_TILE * 4];
        UNROLL for (int i = 0; i < rows * columns; i++) acc[i] = v_set(0.0f);
        multiply_tile(rows, columns, q, keys + j, KV_BLOCK, 0, head_dim, t->ahead, acc);
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++)
        {
            int at = j + 16 * c;
            vec16 score = v_mul(acc[r * columns + c], v_set(scale));
            v_store(t->weight[r] + at, v_keep(score, t->begin[r] - at, t->end[r] - at));
        }
    }
}

/* Scores to exponentials, and the running maximum and sum with them. */
static void weigh_tile(int rows, attend_tile *t)
{
    float new_max[ATTEND_TILE];
    for (int r = 0; r < rows; r++) {
        vec16 below = v_set(-INFINITY);
        float block_max = v_max_lane(v_max(v_load(t->weight[r] + 16), v_max(v_load(t->weight[r]), below)));
        float old_max = t->query[r]->max;
        new_max[r] = block_max > old_max ? block_max : old_max;
        t->rescale[r] = old_max - new_max[r];
    }
    v_store(t->rescale, v_exp(v_load_first(t->rescale, rows)));
    for (int r = 0; r < rows; r++) {
        vec16 max = v_set(new_max[r]);
        vec16 low = v_load(t->weight[r]), high = v_load(t->weight[r] + 16);
        low = v_exp(v_keep(v_sub(low, max), t->begin[r], t->end[r]));
        high = v_exp(v_keep(v_sub(high, max), t->begin[r] - 16, t->end[r] - 16));
        v_store(t->weight[r], low);
        v_store(t->weight[r] + 16, high);
        t->query[r]->sum = fmaf(t->query[r]->sum, t->rescale[r], v_add_lanes(v_add(low, high)));
        t->query[r]->max = new_max[r];
    }
}

ALWAYS_INLINE void value_columns(const int rows, const int columns, float *const *out, const float *const *weight,
                                 const float *rescale, const float *values, int head_dim, int begin, int end, size_t ahead)
{
    vec16 acc[ATTEND_TILE * 4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++) acc[r * columns + c] =
        v_mul(v_load(out[r] + 16 * c), v_set(rescale[r]));
    multiply_tile(rows, columns, weight, values, (size_t)head_dim, begin, end, ahead, acc);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++) v_store(out[r] + 16 * c, acc[r * columns + c]);
}

/* The last columns of a head_dim that is no multiple of 16. */
static void value_rest(int rows, float *const *out, const float *const *weight, const float *rescale, const float *values,
                       int head_dim, int count, int begin, int end)
{
    for (int r = 0; r < rows; r++) {
        vec16 acc = v_mul(v_load_first(out[r], count), v_set(rescale[r]));
        for (int j = begin; j < end; j++)
            acc = v_fma(v_set(weight[r][j]), v_load_first(values + (size_t)j * (size_t)head_dim, count), acc);
        v_store_first(out[r], acc, count);
    }
}

/* out[d] = out[d] * rescale + sum over positions [begin, end) of weight * value, for `rows` queries from `from` on. */
ALWAYS_INLINE void value_tile(const int rows, attend_tile *t, int from, const float *values, int head_dim, int begin, int end)
{
    const int columns = ATTEND_COLUMNS(rows);
    float *out[ATTEND_TILE];
    const float *weight[ATTEND_TILE];
    int d = 0;
    UNROLL for (int r = 0; r < rows; r++) out[r] = t->query[from + r]->out, weight[r] = t->weight[from + r];
    for (; d + 16 * columns <= head_dim; d += 16 * columns) {
        value_columns(rows, columns, out, weight, t->rescale + from, values + d, head_dim, begin, end, t->ahead);
        UNROLL for (int r = 0; r < rows; r++) out[r] += 16 * columns;
    }
    for (; d + 16 <= head_dim; d += 16) {
        value_columns(rows, 1, out, weight, t->rescale + from, values + d, head_dim, begin, end, t->ahead);
        UNROLL for (int r = 0; r < rows; r++) out[r] += 16;
    }
    if (d < head_dim)
        value_rest(rows, out, weight, t->rescale + from, values + d, head_dim, head_dim - d, begin, end);
}

static void value_one(attend_tile *t, int r, const float *values, int head_dim, int begin, int end)
{
    value_tile(1, t, r, values, head_dim, begin, end);
    t->rescale[r] = 1.0f;
}

/* Queries of one tile may see different parts of the block (the diagonal of a prefill, the start of a window): what all of them
 * see is added together, what comes before and behind it by each alone, so positions still rise for everyone. */
ALWAYS_INLINE void attend_tile_block(const int rows, attend_tile *t, const float *keys, int head_dim, float scale)
{
    const float *values = keys + (size_t)head_dim * KV_BLOCK;
    score_tile(rows, t, keys, head_dim, scale);
    weigh_tile(rows, t);

    int begin = t->begin[0], end = t->end[0];
    for (int r = 1; r < rows; r++) {
        begin = t->begin[r] > begin ? t->begin[r] : begin;
        end = t->end[r] < end ? t->end[r] : end;
    }
    if (begin >= end) {
        for (int r = 0; r < rows; r++)
            value_one(t, r, values, head_dim, t->begin[r], t->end[r]);
        return;
    }
    for (int r = 0; r < rows; r++)
        if (t->begin[r] < begin)
            value_one(t, r, values, head_dim, t->begin[r], begin);
    value_tile(rows, t, 0, values, head_dim, begin, end);
    for (int r = 0; r < rows; r++) {
        t->rescale[r] = 1.0f;
        if (t->end[r] > end)
            value_one(t, r, values, head_dim, end, t->end[r]);
    }
}

static void attend_tile_1(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(1, t, keys, head_dim, scale);
}
static void attend_tile_2(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(2, t, keys, head_dim, scale);
}
static void attend_tile_3(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(3, t, keys, head_dim, scale);
}
static void attend_tile_4(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(4, t, keys, head_dim, scale);
}
static void attend_tile_5(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(5, t, keys, head_dim, scale);
}
static void attend_tile_6(attend_tile *t, const float *keys, int head_dim, float scale)
{
    attend_tile_block(6, t, keys, head_dim, scale);
}

/* The queries that see something of block `b`, in tiles of nearly equal size. */
static void attend_block(const attend_args *a, attend_query *queries, int n_queries, int b, int last)
{
    static void (*const run[ATTEND_TILE + 1])(attend_tile *, const float *, int, float) = {
        NULL, attend_tile_1, attend_tile_2, attend_tile_3, attend_tile_4, attend_tile_5, attend_tile_6};
    const float *keys = a->pool + (size_t)a->block_ids[b] * a->block_floats;
    int start = b * KV_BLOCK, n_active = 0;
    attend_query *active[ATTEND_QUERIES];
    for (int i = 0; i < n_queries; i++)
        if (queries[i].first < start + KV_BLOCK && queries[i].position >= start)
            active[n_active++] = &queries[i];

    attend_tile t;
    int32_t next = a->block_ids[b < last ? b + 1 : b];
    t.ahead = ((size_t)next - (size_t)a->block_ids[b]) * a->block_floats * sizeof(float); /* wraps when it lies before */
    int n_tiles = (n_active + ATTEND_TILE - 1) / ATTEND_TILE;
    for (int tile = 0, at = 0; tile < n_tiles; tile++) {
        int rows = n_active * (tile + 1) / n_tiles - at;
        for (int r = 0; r < rows; r++) {
            attend_query *query = active[at + r];
            t.query[r] = query;
            t.begin[r] = query->first > start ? query->first - start : 0;
            t.end[r] = query->position - start < KV_BLOCK ? query->position - start + 1 : KV_BLOCK;
        }
        run[rows](&t, keys, a->head_dim, a->scale);
        at += rows;
    }
}

/* Of (row, head) pair number `pair`, counted row by row. */
static int first_position_seen(const attend_args *a, int pair)
{
    int position = a->first_position + pair / a->n_heads;
    return a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
}

/* `from`, `to`: (row, head) pairs. */
static void attend_group(const attend_args *a, int from, int to)
{
    attend_query queries[ATTEND_QUERIES];
    size_t head_dim = (size_t)a->head_dim;
    int begin = first_position_seen(a, from), last = (a->first_position + (to - 1) / a->n_heads) / KV_BLOCK;
    for (int pair = from; pair < to; pair++) {
        size_t row = (size_t)(pair / a->n_heads), head = (size_t)(pair % a->n_heads);
        int position = a->first_position + (int)row;
        float *out = a->out + row * a->out_row_stride + head * head_dim;
        queries[pair - from] = (attend_query){
            a->q + row * a->q_row_stride + head * head_dim, out, first_position_seen(a, pair), position, -INFINITY, 0.0f};
        memset(out, 0, head_dim * sizeof *out);
    }
    /* Rows rise, so the first query reaches back the furthest and the last one sees the last block. */
    for (int b = begin / KV_BLOCK; b <= last; b++)
        attend_block(a, queries, to - from, b, last);
    for (int i = 0; i < to - from; i++) {
        vec16 sum = v_set(queries[i].sum);
        for (int d = 0; d < a->head_dim; d += 16) {
            float *out = queries[i].out + d;
            v_store_upto(out, v_div(v_load_upto(out, a->head_dim - d), sum), a->head_dim - d);
        }
    }
}

static void attend(const attend_args *a)
{
    int n = a->n_rows * a->n_heads;
    for (int from = 0; from < n; from += ATTEND_QUERIES)
        attend_group(a, from, n - from < ATTEND_QUERIES ? n : from + ATTEND_QUERIES);
}

#endif
