/* support_model.h - runs a checkpoint's reference prompts through the engine in this process, and compares with transformers. */
#ifndef CONVOKE_TESTS_SUPPORT_MODEL_H
#define CONVOKE_TESTS_SUPPORT_MODEL_H

#include "proto/safetensors.h"
#include "worker/runtime.h"

enum { REFERENCE_PROMPTS = 3 };

/* What one run of the three prompts gave; arrays as in reference.safetensors. */
typedef struct {
    int n_tokens[REFERENCE_PROMPTS], n_greedy[REFERENCE_PROMPTS];
    float *logits[REFERENCE_PROMPTS];     /* [n][vocab] */
    uint16_t *experts[REFERENCE_PROMPTS]; /* [n][moe layers][k] */
    float *weights[REFERENCE_PROMPTS];
    int32_t *greedy[REFERENCE_PROMPTS];
    int vocab, n_moe_layers, top_k;
} model_answer;

/* Loads DIR with these options (model_dir, limits.max_length are set here) and runs `which` prompts (bit i: prompt i) together.
 */
void support_run_reference(const char *dir, const runtime_options *options, unsigned which, model_answer *out);
void support_answer_clear(model_answer *answer);

/* Largest difference of the logits from the reference; fails the test when choices or greedy tokens differ. */
double support_compare_reference(const char *dir, const model_answer *answer);
/* Fails unless every bit of prompts in both agrees. */
void support_assert_same(const model_answer *a, const model_answer *b);

#endif
