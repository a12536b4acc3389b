/* solver.h - every way to make a plan behind one table.
 *
 * Each solver returns a valid plan that keeps the room, is never worse than its seed by its own objective, stops at the request's
 * seconds (to within one second), and gives the same plan for the same seed and work on any number of threads. A solver that
 * cannot keep a slack that was given (the baselines) still returns its plan; problem_check() then refuses it by name. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SOLVER_H
#define CONVOKE_PLACEMENT_PLANNER_SOLVER_H

#include "placement/planner/problem.h"

enum {
    SOLVER_NEEDS_NEXT_PAIRS = 1, /* R */
    SOLVER_NEEDS_SAME_PAIRS = 2,
    SOLVER_NEEDS_TRAFFIC = 4,
    SOLVER_REPLICATES = 8,    /* uses extra slots */
    SOLVER_PRICES_LOAD = 16,  /* keeps caps only when slack was given */
    SOLVER_BASELINE = 32,     /* knows nothing of caps */
    SOLVER_TOTALS = 64,       /* trades slots between layers, keeps each rank's total */
    SOLVER_EXACT_SMALL = 128, /* refuses what is too large for it, in a sentence */
};

/* What a solver says about what it did; all of it lands in the plan file. */
typedef struct {
    double objective;      /* by its own measure, lower is better */
    double bound;          /* proved lower bound of that objective; NAN: none */
    double seed_objective; /* of what it started from; NAN: nothing */
    bool out_of_time;
    int64_t work;                              /* units spent */
    int glpk_proved, glpk_improved, glpk_runs; /* models GLPK proved optimal, found better than their seed, was given */
    char remark[256];                          /* one sentence, "" for none */
} solver_report;

typedef struct {
    const char *name;
    const char *summary; /* one line for --help and README */
    const char *paper;
    const char *objective; /* what it minimises, in words */
    unsigned flags;
    status (*solve)(const problem *p, solver_report *report, plan *out);
    status (*measure)(const problem *p, const plan *made, double *out); /* its objective */
} solver;

extern const solver solver_contiguous, solver_random, solver_lpt, solver_eplb, solver_eplb_apart, solver_craft, solver_exflow;
extern const solver solver_chain, solver_cut;                      /* local search */
extern const solver solver_moetuner, solver_ilp, solver_partition; /* with GLPK (lp.h) */
extern const solver solver_batch, solver_affinity, solver_auto;

extern const solver *const solvers[]; /* ends with NULL */
const solver *solver_find(const char *name);
/* Runs it and checks what comes back (problem_check, needs of `flags`): the only way solvers are run. */
status solver_run(const solver *s, const problem *p, solver_report *report, plan *out);

#endif
