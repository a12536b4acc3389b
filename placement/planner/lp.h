/* lp.h - linear and integer programmes, solved by GLPK in child processes.
 *
 * GLPK aborts on bad arguments, leaks, and overruns its time inside long simplex runs; so it runs in a child that is killed at
 * its deadline, and incumbent and bound are kept in shared memory, where they survive it. glpk.h is seen by lp_glpk.c alone, and
 * only convoke-plan links it. Results do not depend on timing unless `timed_out` is set: pivots and nodes are counted and
 * limited.
 *
 * One caller: the process's main thread, with no other threads running (children are forked). Several models at once:
 * lp_solve_all(). */
#ifndef CONVOKE_PLANNER_LP_H
#define CONVOKE_PLANNER_LP_H

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
bool lp_failed(const lp_model *m); /* an add found no memory */

typedef struct {
    double seconds;      /* the child is killed then; 0: none */
    int64_t pivots;      /* simplex iterations per LP; 0: no limit */
    int64_t nodes;       /* branch and bound nodes; 0: no limit */
    double gap;          /* relative MIP gap at which it may stop; 0: proof */
    const double *start; /* [columns] an integer-feasible point, or NULL: the incumbent to beat */
    bool relax;          /* LP relaxation only */
    bool duals;          /* wanted (LP) */
    bool cuts;           /* GLPK's MIR, Gomory, cover, clique cuts */
} lp_options;

typedef enum { LP_OPTIMAL, LP_FEASIBLE, LP_NOTHING, LP_INFEASIBLE, LP_CRASHED } lp_outcome; /* NOTHING: no point found in time */

typedef struct {
    lp_outcome outcome;
    bool timed_out;
    double objective, bound; /* bound: proved lower bound; -LP_INF: none */
    double *x;               /* [columns] best point; NULL: none */
    double *duals;           /* [rows]; NULL unless wanted and LP_OPTIMAL */
    int64_t pivots, nodes;
} lp_result;

status lp_solve(const lp_model *m, const lp_options *options, lp_result *out);
/* n models, `processes` children at once (0: cores); results in order. */
status lp_solve_all(int n, lp_model *const *models, const lp_options *options, int processes, lp_result *out);
void lp_result_clear(lp_result *r);

#endif
