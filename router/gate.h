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
/* OFF: never chosen. FORCED: always chosen, also from outside the kept groups, and never cut by top_p. NULL: chosen like any
 * other and uses up one of the top_k places, but is dropped before the weights are normalised (AdaMoE, arXiv 2406.13233). */
enum { GATE_NORMAL = 0, GATE_OFF = 1, GATE_FORCED = 2, GATE_NULL = 3 };
#define GATE_NO_EXPERT 0xffffu /* an entry a policy dropped; its weight is 0 */

typedef struct {
    int n_experts, top_k;
    gate_score score;
    const float *bias;         /* [n_experts] added for selection only; NULL: none */
    int n_groups, keep_groups; /* 0, 0: no group limit. A group's merit: the sum of its two best biased scores */
    const uint8_t *mask;       /* [n_experts] of the four above; NULL: all normal */
    float top_p;               /* 0: off; else keep the smallest prefix whose scores sum to more than this */
    int k_min;                 /* with top_p: at least this many */
    bool normalise;            /* kept weights divided by their sum */
    float scale;               /* 1: neutral */
    const float *multiply;     /* [n_experts] applied last; NULL: none */
} gate_policy;

/* The rest is zero: softmax, top-k, weights as scored. */
#define GATE_NEUTRAL(experts, k) ((gate_policy){.n_experts = (experts), .top_k = (k), .scale = 1})

/* The vector arithmetic a caller lends (the worker its kernels, so that all instruction sets agree bit for bit). */
typedef struct {
    void (*softmax)(const float *x, int n, float *y);
} gate_math;

/* Refuses what cannot work: k > experts left by the mask, groups that do not divide, ... */
status gate_policy_check(const gate_policy *policy);

/* One row: logits [n_experts] -> experts [top_k] by descending score (unbiased, before `multiply`; dropped ones last) and their
 * weights as applied: scores without bias, added up in that order where they are normalised. math NULL: gate_math_plain.
 * scratch: [3 * n_experts] floats. Fails on a logit that is NaN or +infinity, naming the expert, and when all are -infinity. The
 * policy must have passed gate_policy_check(). Sigmoid and softplus run in double, so that the C library's version does not
 * show in the bits. */
status gate_choose(const gate_policy *policy, const gate_math *math, const float *logits, float *scratch, uint16_t *experts,
                   float *weights);

/* Plain softmax with libm, for callers without kernels of their own. */
extern const gate_math gate_math_plain;

#endif
