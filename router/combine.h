/* combine.h - how experts' weighted outputs become one row again, in three modes. Pure arithmetic, no peers.
 *
 * A row's contributions are v = weight * expert(x), one vector [hidden] per chosen expert.
 *   exact  every contribution comes home by itself and is added in rising expert order: the definition, most bytes.
 *   fast   fp32 partial sums per rank, added in rank order: fewest bytes, but the bits depend on who computed what.
 *   fixed  32-bit fixed point: each element becomes rint(v * 2^s), integers are added in any order (associative, so any grouping
 *          over ranks, replicas, nodes gives the same bits) and converted once at home. An element that does not fit travels
 *          by itself as fp32 (a *spill*) and is added at home in rising expert order, after the integers of all experts have been
 *          converted. Whether it fits (|v * 2^s| < 2^31 / 2^ceil(log2 k), NaN does not) depends on the element and the row's
 *          exponent alone, never on grouping.
 *
 * The row's exponent: its output is added to the residual stream h, so 2^s is taken from h itself: with
 * m = max |h| rounded up to a power of two, elements up to 2^FIXED_HEADROOM * m fit and the step is
 * 2^(FIXED_HEADROOM - 31 + ceil(log2 k)) * m: for k = 8 it is 2^-22 m, two units in the last place of m in fp32, so that what
 * fixed loses is about what adding the output to h's largest element loses anyway.
 * No calibration run and no file: the owner derives it and it travels with the row. */
#ifndef CONVOKE_ROUTER_COMBINE_H
#define CONVOKE_ROUTER_COMBINE_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { COMBINE_EXACT, COMBINE_FIXED, COMBINE_FAST } combine_mode;

#define FIXED_HEADROOM 6

#define COMBINE_MAX_K 128 /* contributions per row that fixed has room for (asserted) */

/* s of a residual row h [n] for k contributions, in [-100, 100]. A row with a NaN or infinity gets 0. A row of zeros
 * gets 100: beside zero no rounding is small, so anything but zero spills and keeps all its bits. */
int combine_exponent(const float *h, int n, int top_k);

/* One element that did not fit. */
typedef struct {
    uint32_t row; /* number in the source's packet; at home, the owner's row */
    uint16_t expert;
    uint16_t reserved;
    uint32_t column;
    float value;
} combine_spill;

/* Grows on demand (rare: see router/README.md for measured rates); one list per computing thread and source. */
typedef struct {
    combine_spill *items;
    size_t n, capacity;
} spill_list;
void spill_list_clear(spill_list *list); /* frees */

/* Adds contribution weight * y over columns [first, last) into a partial row (pointers are to column 0 of row and y).
 * exact: acc = weight * y (stores). fast: acc += weight * y, fp32, product rounded first. fixed: acc int32 += rint(weight * y *
 * 2^s). */
void combine_store_exact(const float *y, float weight, int first, int last, float *acc);
void combine_add_fast(const float *y, float weight, int first, int last, float *acc);
status combine_add_fixed(const float *y, float weight, int exponent, int top_k, uint32_t row, uint16_t expert, int first,
                         int last, int32_t *acc, spill_list *spills);

/* At home, over columns [0, n): the sum of parts. */
void combine_sum_fixed(const int32_t *const *parts, int n_parts, int exponent, int n, float *out);
void combine_sum_floats(const float *const *parts, int n_parts, int n,
                        float *out); /* +0, then in the order given: exact and fast */
/* Adds one row's spills, which must be sorted by (expert, column); at most one per pair. */
void combine_add_spills(const combine_spill *spills, size_t n, float *out);
void combine_sort_spills(combine_spill *spills, size_t n); /* by row, expert, column; in place, no allocation */
/* acc[i] += part[i], for node sums. */
void combine_merge_fixed(const int32_t *part, size_t n, int32_t *acc);
void combine_merge_fast(const float *part, size_t n, float *acc);

/* For tests and benchmarks, with nothing else running: true goes back to the base instruction set, false to the best of this CPU;
 * returns the name of what runs now ("base", "avx2"). Bits are the same either way. */
const char *combine_force_base(bool base);

#endif
