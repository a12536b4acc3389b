/* batch_form.h - which rows run in the next step: continuous batching with chunked prefill, as a pure function.
 *
 * Every sequence that is decoding gets its row; what is left of the prefill budget goes to prompts, oldest sequence first. */
#ifndef CONVOKE_WORKER_BATCH_FORM_H
#define CONVOKE_WORKER_BATCH_FORM_H

#include <stdint.h>

typedef struct {
    int n_pending;    /* tokens known but not run yet; 0: nothing to do (or no sequence here) */
    int is_decoding;  /* the one pending token was sampled: costs no prefill budget */
    uint64_t arrival; /* lower is older */
} batch_candidate;

/* rows[i]: how many pending tokens of candidate i run now. order: scratch [n]. Returns the number of rows, at most n +
 * prefill_budget. */
int batch_form(const batch_candidate *candidates, int n, int prefill_budget, int *order, int *rows);

#endif
