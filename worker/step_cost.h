/* step_cost.h - how long a step will take on this machine, learned from the steps before it.
 *
 *     seconds = fixed + experts * touched(rows) + decode * decode rows + prefill * prefill rows + context * positions seen
 *
 * with touched(rows) = 1 - (1 - k/E)^rows, the share of the experts that so many rows are expected to choose: with few rows a
 * step is as long as the weights it reads, with many as long as its arithmetic. The five factors (never negative) fit the steps
 * seen in the least squares of their relative errors. Steps are remembered by kind, one mean per power of two of decode and of
 * prefill rows, so that a thousand decode steps do not make the last prompt forgotten, nor the other way round; inside a kind
 * newer steps count more, and one that took far longer than expected (somebody else had the cores) counts only a little longer.
 *
 * Pure numbers: no clock, nothing allocated. */
#ifndef CONVOKE_WORKER_STEP_COST_H
#define CONVOKE_WORKER_STEP_COST_H

#include <stdbool.h>

enum { STEP_FACTORS = 5, STEP_KINDS = 18 };

/* Rows are those of an even split (step_cost_share()) except total_rows. */
typedef struct {
    double decode_rows, prefill_rows;
    double total_rows; /* all ranks */
    double positions;  /* summed over the busiest rank's rows: positions each sees */
} step_load;

typedef struct {
    double x[STEP_FACTORS], seconds; /* means */
    int n;                           /* steps seen; 0: this kind never was */
} step_kind;

typedef struct {
    double touch; /* k / E */
    double factors[STEP_FACTORS];
    double focus;                            /* seconds: steps much longer than twice this count less in the fit */
    bool known;                              /* some step has been seen */
    step_kind kinds[STEP_KINDS][STEP_KINDS]; /* by decode rows, by prefill rows */
} step_cost;

/* touch: chosen experts over experts per row; 0 for a dense model. */
void step_cost_init(step_cost *c, double touch);
/* What a rank's share of rows costs: half of a row's work is its owner's (attention), half is where its experts are. */
double step_cost_share(double busiest_rank, double all_ranks, int n_ranks);
void step_cost_add(step_cost *c, const step_load *load, double seconds);
/* Seconds; 0 while nothing is known. Never falls when a load grows. */
double step_cost_predict(const step_cost *c, const step_load *load);

#endif
