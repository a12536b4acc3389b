/* lp_private.h - what the files behind lp.h share: the model's data, and the memory that a child leaves its results in. */
#ifndef CONVOKE_PLACEMENT_PLANNER_LP_PRIVATE_H
#define CONVOKE_PLACEMENT_PLANNER_LP_PRIVATE_H

#include "placement/planner/lp.h"

#include <stdatomic.h>
#include <stddef.h>

typedef struct {
    double low, high, cost;
    bool integer;
} lp_column;

typedef struct {
    double low, high;
} lp_row;

typedef struct {
    int row, column;
    double value;
} lp_entry;

struct lp_model {
    int n_columns, n_rows, column_room, row_room;
    lp_column *columns;
    lp_row *rows;
    size_t n_entries, entry_room;
    lp_entry *entries;
    double constant;
    bool failed;
};

/* Whether x keeps bounds, rows and integrality; *objective is its cost. The sentence names what it breaks. */
status lp_check_point(const lp_model *m, const double *x, double *objective);

/* One child's results, in memory that outlives it. Points and duals have two halves: the one that `_at` names is whole, whenever
 * the child dies. */
typedef struct {
    _Atomic int outcome; /* -1: the child has not said */
    _Atomic int point_at, duals_at;
    _Atomic double bound;
    _Atomic int64_t pivots, nodes;
    _Atomic int n_generated; /* columns whose entries are whole */
    double objective[2];
    char words[160];
    double *x[2];      /* [columns + room for generated ones] */
    double *duals[2];  /* [rows] */
    double *gen_costs; /* [max_columns] */
    int *gen_counts;   /* [max_columns] */
    int *gen_rows;     /* [max_columns][entries_per_column] */
    double *gen_values;
    size_t size;
} lp_shared;

/* The child's work (lp_glpk.c): leaves everything in `shared`, prints nothing, and returns or _exit()s. */
void lp_glpk_run(const lp_model *m, const lp_pricing *pricing, const lp_options *options, lp_shared *shared);

#endif
