/* lp.h - linear and integer programmes, solved by GLPK in child processes.
 *
 * GLPK aborts on bad arguments, leaks, and overruns its time inside long simplex runs; so it runs in a child that is killed at
 * its deadline, and incumbent and bound are kept in shared memory, where they survive it. glpk.h is seen by lp_glpk.c alone, and
 * only convoke-plan links it. Results do not depend on timing unless `timed_out` is set: pivots and nodes are counted and
 * limited.
 *
 * One caller: the process's main thread, with no other threads running (children are forked). Several models at once:
 * lp_solve_all(). */
#ifndef CONVOKE_PLACEMENT_PLANNER_LP_H
#define CONVOKE_PLACEMENT_PLANNER_LP_H

#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct lp_model lp_model; /* minimise; rows and columns are numbered from 0 */

status lp_create(lp_model **out);
void lp_destroy(lp_model *m);
#define LP_INF 1e300
int lp_add_column(lp_model *m, double low, double high, double cost, bool integer); /* returns its number, -1: no memory */
int lp_add_row(lp_model *m, double low, double high);
void lp_set(lp_model *m, int row, int column, double value); /* each entry once */
void lp_set_constant(lp_model *m, double constant);
void lp_set_integer(lp_model *m, int column, bool integer);
int lp_n_columns(const lp_model *m);
int lp_n_rows(const lp_model *m);
bool lp_failed(const lp_model *m); /* an add found no memory */

typedef struct {
    double seconds;      /* counted from the call; the child is killed then; 0: none */
    int64_t pivots;      /* simplex iterations; 0: no limit. Branch and bound looks at their sum between two nodes */
    int64_t nodes;       /* branch and bound nodes; 0: no limit */
    double gap;          /* relative MIP gap at which it may stop; 0: proof */
    const double *start; /* [columns] a feasible point, or NULL: the incumbent to beat, there even when the child dies at once */
    bool relax;          /* LP relaxation only */
    bool duals;          /* wanted (LP) */
    bool pseudocosts;    /* branch by them: fewer nodes, each dearer. Else by Driebeck and Tomlin's penalties */
    bool cuts;           /* GLPK's MIR, Gomory, cover, clique cuts */
} lp_options;

/* OPTIMAL: proved, to within the gap allowed. NOTHING: no point found within the limits. CRASHED: `words` says how; x may be
 * there. */
typedef enum { LP_OPTIMAL, LP_FEASIBLE, LP_NOTHING, LP_INFEASIBLE, LP_CRASHED } lp_outcome;

typedef struct {
    lp_outcome outcome;
    bool timed_out;
    double objective, bound; /* bound: proved lower bound; -LP_INF: none */
    double *x;               /* [columns] best point; NULL: none */
    double *duals;           /* [rows] cost minus duals * column is a column's reduced cost; NULL unless wanted and there */
    int64_t pivots, nodes;
    char words[160]; /* LP_CRASHED: the child's last words */
} lp_result;

/* Fails only where the system does (no memory, no process), or when `start` breaks the model, named by row or column. */
status lp_solve(const lp_model *m, const lp_options *options, lp_result *out);
/* n models with their options [n], `processes` children at once (0: cores); results in order. */
status lp_solve_all(int n, lp_model *const *models, const lp_options *options, int processes, lp_result *out);
void lp_result_clear(lp_result *r);

/* ---- column generation ----------------------------------------------------------------------------------------------------
 *
 * The model is a master with too many columns to write down. It starts with some that make it feasible; each round the child
 * solves it from its last basis and asks `price`, which runs in the child too and must be pure, for columns of negative reduced
 * cost. Limits of the options hold for all rounds together. */
typedef struct lp_columns lp_columns;
/* A column [0, infinity) with n entries; false: no room is left in this round. */
bool lp_columns_add(lp_columns *found, double cost, int n, const int *rows, const double *values);

typedef struct {
    /* Adds columns whose reduced cost for duals [rows] is negative: none, and the master is solved. Returns a lower bound of the
     * whole master that these duals prove, -LP_INF if none. */
    double (*price)(const void *arg, const double *duals, lp_columns *found);
    const void *arg;
    int columns_per_round, entries_per_column, max_columns; /* room: the last is for all rounds */
} lp_pricing;

/* As lp_solve_all() with `relax`; what was generated is appended to the models (continuous). x counts those columns too; bound is
 * the best that `price` returned, duals (when wanted) those that proved it. */
status lp_solve_columns(int n, lp_model *const *models, const lp_pricing *pricing, const lp_options *options, int processes,
                        lp_result *out);

#endif
