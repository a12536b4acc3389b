/* gate.h - from gate logits to chosen experts: one pure hook, per row, no model, no peers.
 *
 *   score -> bias -> group limit -> mask / force -> select (top-k, cut rule) -> normalise -> scale -> multiply
 *
 * With everything neutral (GATE_NEUTRAL below) the result is bit-identical to plain top-k of the scores. Ties go to the lower
 * expert number. Sources: group limit and selection bias: DeepSeek-V3 (arXiv 2412.19437, 2.1.2); cut by cumulative
 * probability: "Harder Tasks Need More Experts" (arXiv 2403.07652); masks and forces: Mixture of Tunable Experts (2502.11096). */
#ifndef CONVOKE_ROUTER_GATE_H
#define CONVOKE_ROUTER_GATE_H

#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum { GATE_SOFTMAX, GATE_SIGMOID, GATE_SQRT_SOFTPLUS } gate_score;
enum { GATE_NORMAL = 0, GATE_OFF = 1, GATE_FORCED = 2 };
#define GATE_NO_EXPERT 0xffffu /* an entry a policy dropped; its weight is 0 */

typedef struct {
    int n_experts, top_k;
    gate_score score;
    const float *bias;           /* [n_experts] added for selection only; NULL: none */
    int n_groups, keep_groups;   /* 0, 0: no group limit. A group's merit: the sum of its two best biased scores */
    const uint8_t *mask;         /* [n_experts] GATE_NORMAL / OFF / FORCED; NULL: all normal */
    float top_p;                 /* 0: off; else keep the smallest prefix whose scores sum to more than this */
    int k_min;                   /* with top_p: at least this many */
    bool normalise;              /* kept weights divided by their sum */
    float scale;                 /* 1: neutral */
    const float *multiply;       /* [n_experts] applied last; NULL: none */
} gate_policy;

/* The vector arithmetic a caller lends (the worker its kernels, so that all instruction sets agree bit for bit). */
typedef struct {
    void (*softmax)(const float *x, int n, float *y);
} gate_math;

/* Refuses what cannot work: k > experts left by the mask, groups that do not divide, ... */
status gate_policy_check(const gate_policy *policy);

/* One row: logits [n_experts] -> experts [top_k] by descending weight (before `multiply`; dropped ones last) and their weights as
 * applied. scratch: [3 * n_experts] floats. Fails on a NaN logit, naming the expert. */
status gate_choose(const gate_policy *policy, const gate_math *math, const float *logits, float *scratch, uint16_t *experts,
                   float *weights);

/* Plain softmax with libm, for callers without kernels of their own. */
extern const gate_math gate_math_plain;

#endif
