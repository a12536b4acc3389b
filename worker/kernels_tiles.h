/* kernels_tiles.h - how a product is cut into register tiles and cache blocks; the tiles themselves are each instruction set's own.
 *
 *     x [m][k]  --pack-->  tiles of up to TILE_ROWS rows, in the order the tile reads them, K padded with zeros
 *     w [n][k]  read as stored; W_BLOCK_BYTES of rows at a time stay in L2 while all x tiles pass over them
 *
 * One x tile (6 rows x 1,024 = 24 KiB) stays in L1 while the block's weight rows stream past it, so each weight is unpacked once
 * per tile. Packing costs one pass over x per call; it makes the tile's loads one sequence (no rows 4 KiB apart in the same L1 set),
 * and it takes alignment, stride and the tail of K out of the inner loops. m rows are spread evenly over the tiles: 8 rows are
 * 4 + 4, not 6 + 2. None of this shows in the result: an output's sum is one tile's business from beginning to end.
 *
 * An includer (after kernels_lanes.h) defines TILE_ROWS and TILE_OUTPUTS, the largest tile, and STEP, the weights of one row that a
 * turn of its inner loop takes; then its pack functions and tiles, and calls matmul_tiled(). */
#ifndef CONVOKE_WORKER_KERNELS_TILES_H
#define CONVOKE_WORKER_KERNELS_TILES_H

#include "worker/kernels_lanes.h"

#define W_BLOCK_BYTES        (128 * 1024)
#define PREFETCH_BYTES       4096
#define WEIGHT_BYTES(format) ((size_t)((format) == FORMAT_F32 ? 4 : 2)) /* a constant inside a tile */

/* y[i][j] for the rows of one packed tile and `n` rows of w. */
typedef void (*tile_fn)(const float *packed, const char *w, int k, int n, float *y, size_t y_stride);
/* Packs `rows` rows of x; writes rows * k_padded floats, K padded to a multiple of STEP. */
typedef void (*pack_fn)(const float *x, size_t x_stride, int rows, int k, float *packed);

typedef struct {
    weight_format format;
    pack_fn pack;
    tile_fn tile[TILE_ROWS + 1]; /* by rows */
} tile_set;

/* Writes y[i][j] from the pair sums, four outputs at a time. */
ALWAYS_INLINE void write_sums(const int rows, const int outputs, const __m128 *pairs, float *y, size_t y_stride)
{
    float sums[TILE_ROWS * TILE_OUTPUTS + 3];
    const int count = rows * outputs;
    UNROLL for (int i = 0; i < count; i += 4) {
        __m128 a = pairs[i], b = pairs[i + 1 < count ? i + 1 : i];
        __m128 c = pairs[i + 2 < count ? i + 2 : i], d = pairs[i + 3 < count ? i + 3 : i];
        _mm_storeu_ps(sums + i, _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d)));
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < outputs; j++)
            y[(size_t)i * y_stride + (size_t)j] = sums[i * outputs + j];
}

/* The last, partial step of K of `outputs` weight rows, padded with zeros. */
typedef struct {
    char w[TILE_OUTPUTS][STEP * sizeof(float)];
} weight_tail;

ALWAYS_INLINE void copy_tail(const int outputs, weight_tail *tail, const char *w, size_t row_bytes, size_t at)
{
    memset(tail, 0, sizeof *tail);
    UNROLL for (int j = 0; j < outputs; j++)
        memcpy(tail->w[j], w + (size_t)j * row_bytes + at, row_bytes - at);
}

/* Past the end of a matrix a prefetch does nothing; as an integer the address may lie there. */
ALWAYS_INLINE void prefetch(const char *p, size_t ahead)
{
    _mm_prefetch((const char *)((uintptr_t)p + ahead), _MM_HINT_T0);
}

/* name(packed, w, k, n, y, y_stride): `outputs` weight rows at a time by `kind`, the rest one by one by `rest`. */
#define TILE(name, kind, rest, format, rows, outputs)                                               \
    static void name(const float *packed, const char *w, int k, int n, float *y, size_t y_stride)   \
    {                                                                                               \
        const size_t row_bytes = (size_t)k * WEIGHT_BYTES(format);                                  \
        int j = 0;                                                                                  \
        for (; j + outputs <= n; j += outputs)                                                      \
            kind(format, rows, outputs, packed, w + (size_t)j * row_bytes, k, y + j, y_stride);     \
        for (; j < n; j++)                                                                          \
            rest(format, rows, 1, packed, w + (size_t)j * row_bytes, k, y + j, y_stride);           \
    }

static void matmul_packed(const tile_set *set, int rows, size_t k_padded, const char *w, int k, int n, float *y,
                          size_t y_stride)
{
    size_t row_bytes = (size_t)k * weight_format_size(set->format);
    int n_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int block = n_tiles == 1 || row_bytes == 0 ? n : (int)(W_BLOCK_BYTES / row_bytes) / 12 * 12;
    if (block < 12)
        block = 12; /* a multiple of every tile's width */
    for (int from = 0; from < n; from += block) {
        int count = n - from < block ? n - from : block;
        for (int tile = 0; tile < n_tiles; tile++) {
            int first = rows * tile / n_tiles, last = rows * (tile + 1) / n_tiles;
            set->tile[last - first](kernels_packed + (size_t)first * k_padded, w + (size_t)from * row_bytes, k, count,
                                    y + (size_t)first * y_stride + from, y_stride);
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
            set->pack(x + (size_t)(from + first) * x_stride, x_stride, last - first, k, kernels_packed + (size_t)first * k_padded);
        }
        matmul_packed(set, rows, k_padded, w, k, n, y + (size_t)from * y_stride, y_stride);
    }
}

#define MATMUL(name, set)                                                                                          \
    static void name(const float *x, size_t x_stride, int m, const void *w, int k, int n, float *y, size_t y_stride) \
    {                                                                                                              \
        matmul_tiled(&set, x, x_stride, m, w, k, n, y, y_stride);                                                  \
    }

#endif
