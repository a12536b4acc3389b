/* kernels_tiles.h - how a product is cut into register tiles and cache blocks; the tiles themselves are each instruction set's
 * own.
 *
 *     x [m][k]  --pack-->  tiles of up to TILE_ROWS rows, in the order the tile reads them, K padded with zeros
 *     w [n][k]  read as stored; W_BLOCK_BYTES of rows at a time stay in L2 while all x tiles pass over them
 *
 * An x tile (in pieces of K that fit in L1 with room to spare: two threads may share a core) stays while the block's weight rows
 * stream past it, so each weight is unpacked once per tile. While the tiles work on one block, each prefetches its part of the
 * next one, so memory and arithmetic overlap from a few rows on. Packing costs one pass over x per call; it makes the tile's
 * loads one sequence (no rows 4 KiB apart in the same L1 set), and it takes alignment, stride and the tail of K out of the inner
 * loops. m rows are spread evenly over the tiles: 8 rows are 4 + 4, not 6 + 2. None of this shows in the result: how an output's
 * sum runs is the same in every tile and block.
 *
 * An includer (after kernels_lanes.h) defines TILE_ROWS and TILE_OUTPUTS, the largest tile, STREAMED_ROWS, up
 * to which a call's only tile needs no blocks, and STEP, the weights of one row that a
 * turn of its inner loop takes; then its pack functions and tiles, and calls matmul_tiled(). */
#ifndef CONVOKE_WORKER_KERNELS_TILES_H
#define CONVOKE_WORKER_KERNELS_TILES_H

#include "worker/kernels_lanes.h"

#define W_BLOCK_BYTES        (96 * 1024)
#define W_BLOCK_ROWS         48
#define PREFETCH_BYTES       4096
#define WEIGHT_BYTES(format) ((size_t)((format) == FORMAT_F32 ? 4 : 2)) /* a constant inside a tile */

/* What to prefetch beside the weights at hand: those `ahead` bytes on, this tile its `part` of `parts`. ahead 0: whatever suits.
 */
typedef struct {
    size_t ahead;
    int part, parts;
} next_block;

/* y[i][j] for the rows of one packed tile and `n` <= W_BLOCK_ROWS rows of w; n is any for tiles that are the only one. */
typedef void (*tile_fn)(const float *packed, const char *w, int k, int n, float *y, size_t y_stride, const next_block *next);
/* Packs `rows` rows of x; writes rows * k_padded floats, K padded to a multiple of STEP. */
typedef void (*pack_fn)(const float *x, size_t x_stride, int rows, int k, float *packed);

typedef struct {
    weight_format format;
    pack_fn pack;
    tile_fn alone[TILE_ROWS + 1];  /* by rows: the only tile of a call, bound by memory */
    tile_fn beside[TILE_ROWS + 1]; /* one of several that pass over a block */
} tile_set;

/* Writes y[i][j] from the pair sums, four outputs at a time. */
ALWAYS_INLINE void write_sums(const int rows, const int outputs, const __m128 *pairs, float *y, size_t y_stride)
{
    float sums[TILE_ROWS * TILE_OUTPUTS + 3];
    const int count = rows * outputs;
    UNROLL for (int i = 0; i < count; i += 4)
    {
        __m128 a = pairs[i], b = pairs[i + 1 < count ? i + 1 : i];
        __m128 c = pairs[i + 2 < count ? i + 2 : i], d = pairs[i + 3 < count ? i + 3 : i];
        _mm_storeu_ps(sums + i, _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d)));
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < outputs; j++) y[(size_t)i * y_stride + (size_t)j] =
        sums[i * outputs + j];
}

/* The last, partial step of K of `outputs` weight rows, padded with zeros. */
typedef struct {
    char w[TILE_OUTPUTS][STEP * sizeof(float)];
} weight_tail;

ALWAYS_INLINE void copy_tail(const int outputs, weight_tail *tail, const char *w, size_t row_bytes, size_t at)
{
    memset(tail, 0, sizeof *tail);
    UNROLL for (int j = 0; j < outputs; j++) memcpy(tail->w[j], w + (size_t)j * row_bytes + at, row_bytes - at);
}

/* Past the end of a matrix a prefetch does nothing; as an integer the address may lie there. */
ALWAYS_INLINE void prefetch(const char *p, size_t ahead)
{
    _mm_prefetch((const char *)((uintptr_t)p + ahead), _MM_HINT_T0);
}

/* name(packed, w, k, n, y, y_stride): `outputs` weight rows at a time by `kind`, the rest one by one by `rest`. */
#define TILE(name, kind, rest, format, rows, outputs)                                                                            \
    static void name(const float *packed, const char *w, int k, int n, float *y, size_t y_stride, const next_block *next)        \
    {                                                                                                                            \
        (void)next;                                                                                                              \
        const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format);                                                               \
        int j = 0;                                                                                                               \
        for (; j + outputs <= n; j += outputs)                                                                                   \
            kind(format, rows, outputs, packed, w + (size_t)j * row_bytes, k, y + j, y_stride);                                  \
        for (; j < n; j++)                                                                                                       \
            rest(format, rows, 1, packed, w + (size_t)j * row_bytes, k, y + j, y_stride);                                        \
    }

/* Weight rows per block: all where one small tile reads each weight once anyway. */
static int block_rows(int rows, int n, size_t row_bytes)
{
    if (rows <= STREAMED_ROWS)
        return n;
    size_t fit = row_bytes ? W_BLOCK_BYTES / row_bytes / 12 * 12 : W_BLOCK_ROWS; /* 12: a multiple of every tile's width */
    return fit < 12 ? 12 : fit > W_BLOCK_ROWS ? W_BLOCK_ROWS : (int)fit;
}

static void matmul_packed(const tile_set *set, int rows, size_t k_padded, const char *w, int k, int n, float *y, size_t y_stride)
{
    size_t row_bytes = (size_t)k * weight_format_size(set->format);
    int n_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, block = block_rows(rows, n, row_bytes);
    for (int from = 0; from < n; from += block) {
        int count = n - from < block ? n - from : block;
        for (int tile = 0; tile < n_tiles; tile++) {
            int first = rows * tile / n_tiles, last = rows * (tile + 1) / n_tiles;
            next_block next = {(size_t)block * row_bytes, tile, n_tiles};
            tile_fn run = (n_tiles == 1 ? set->alone : set->beside)[last - first];
            run(kernels_packed + (size_t)first * k_padded, w + (size_t)from * row_bytes, k, count,
                y + (size_t)first * y_stride + from, y_stride, &next);
        }
    }
}

static void matmul_tiled(const tile_set *set, const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y,
                         size_t y_stride)
{
    size_t k_padded = ((size_t)k + STEP - 1) / STEP * STEP;
    if (k_padded > PACK_FLOATS) {
        kernels_scalar.matmul[set->format](x, x_stride, m, w, k, n, y, y_stride);
        return;
    }
    int fit = k_padded ? (int)(PACK_FLOATS / k_padded) : m;
    int n_blocks = m ? (m - 1) / fit + 1 : 0;
    for (int b = 0; b < n_blocks; b++) {
        int from = (int)((int64_t)m * b / n_blocks), rows = (int)((int64_t)m * (b + 1) / n_blocks) - from;
        int n_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        for (int tile = 0; tile < n_tiles; tile++) {
            int first = rows * tile / n_tiles, last = rows * (tile + 1) / n_tiles;
            set->pack(x + (size_t)(from + first) * x_stride, x_stride, last - first, k,
                      kernels_packed + (size_t)first * k_padded);
        }
        matmul_packed(set, rows, k_padded, w, k, n, y + (size_t)from * y_stride, y_stride);
    }
}

#define MATMUL(name, set)                                                                                                        \
    static void name(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride)             \
    {                                                                                                                            \
        matmul_tiled(&set, x, x_stride, m, w, k, n, y, y_stride);                                                                \
    }

#endif
