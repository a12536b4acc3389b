/* model.h - one forward pass of this rank's rows through the whole model, in step with all other ranks.
 *
 * Rows of a batch are grouped in spans: consecutive positions of one sequence (one row when decoding, a chunk when prefilling).
 * Attention reads the sequence's KV blocks; experts are reached through the exchange. A row's result does not depend on what
 * else is in the batch, on chunking, threads, plan, owner or number of ranks (combine exact and fixed). */
#ifndef CONVOKE_WORKER_MODEL_H
#define CONVOKE_WORKER_MODEL_H

#include "placement/plan.h"
#include "placement/topology.h"
#include "router/exchange.h"
#include "worker/checkpoint.h"
#include "worker/kv_cache.h"
#include "worker/thread_pool.h"

typedef struct {
    int first_row, n_rows;    /* rows of the batch */
    int first_position;       /* position of the first row in its sequence */
    const int32_t *block_ids; /* the sequence's KV blocks, enough for all its positions up to the last row's */
} batch_span;

typedef struct {
    int n_rows, n_spans;
    const int32_t *tokens;   /* [n_rows] */
    const batch_span *spans; /* [n_spans], rising by first_row, covering all rows */
} batch;

typedef struct {
    const model_config *config; /* all borrowed; outlive the model */
    const model_weights *weights;
    const plan *plan;
    checkpoint *file; /* the weights' own, for experts that come and go; NULL: they stay as they are */
    group *group;
    thread_pool *pool;
    const kernel_table *kernels;
    kv_cache *kv;
    replica_choice replicas;
    const topology *topology; /* REPLICA_STEP: row_us and expert_us of each rank; borrowed */
    combine_mode combine;
    row_format rows;
    int max_rows;   /* rows this rank may own in one step */
    int max_length; /* positions a sequence may have */
} model_parts;

typedef struct {
    double attention_seconds, expert_seconds, head_seconds;  /* computing */
    double exchange_seconds;                                 /* packing and adding up */
    unsigned long long expert_rows, experts_touched, layers; /* on this rank, summed over layers run */
} model_times;

typedef struct model model;

/* [all] */
status model_create(const model_parts *parts, model **out);
void model_destroy(model *m);              /* NULL is fine */
size_t model_buffer_bytes(const model *m); /* activations and exchange windows */

/* Between batches, on all ranks alike: from now on rows go where `p` (borrowed) says. */
status model_set_plan(model *m, const plan *p);
/* [all] Runs the batch (may have no rows) up to the final norm, filling the KV cache at the rows' positions. */
status model_forward(model *m, const batch *b);
/* Logits of some rows of the batch just run: out [n][vocab], inside the model until the next call. n <= model_head_rows(). Not
 * collective. */
const float *model_head(model *m, const int *rows, int n);
int model_head_rows(const model *m);
/* The choices of the batch just run: MoE layer l (counted among MoE layers), row r: experts and weights at [(l * max_rows + r) *
 * top_k]. */
const uint16_t *model_experts(const model *m);
const float *model_expert_weights(const model *m);
/* The first layer whose gate gave this row of the batch just run something that is not a number; -1: none did. From there on the
 * row went without experts; its logits mean nothing. */
int model_bad_layer(const model *m, int row);
/* [n_moe_layers] (token, expert) rows computed on this rank so far. */
const unsigned long long *model_layer_load(const model *m);
const model_times *model_get_times(const model *m);
exchange *model_exchange(model *m);

#endif
