/* runtime.h - one rank, ready to step: from a model folder and a plan to an engine. Shared by every program that runs a model.
 *
 *     instruction set (lowest of all ranks) ─ config ─ plan ─ checkpoint (own experts) ─ threads ─ engine
 *
 * All functions are [all]: every rank enters them; when one rank fails, all return, and only that one has the sentence. */
#ifndef CONVOKE_WORKER_RUNTIME_H
#define CONVOKE_WORKER_RUNTIME_H

#include "worker/engine.h"

typedef struct {
    const char *model_dir;
    const char *plan_path; /* NULL: plan_text, or the contiguous plan */
    const char *plan_text; /* NULL, or a plan as JSON */
    uint64_t plan_epoch;   /* of that plan; 0: its own */
    const char *isa;       /* NULL: the best that all ranks have; else all of them must have this one */
    int threads;           /* per rank; 0: the node's cores over its ranks */
    weights_mode weights;
    combine_mode combine;
    row_format rows;
    replica_choice replicas;
    const char *topology_path; /* NULL: topology_text, or the constants of topology_uniform(); for replicas by the step's load */
    const char *topology_text; /* NULL, or a topology as JSON */
    /* Called on this rank while it loads, with bytes of its share of the weights (NULL: nobody asks, and mapped weights are not
     * read before the first step wants them). */
    void (*progress)(void *arg, const char *stage, size_t done_bytes, size_t total_bytes);
    void *progress_arg;
    engine_limits limits; /* max_length 0: the model's own; kv_bytes 0: what max_sequences of max_length need, at most 1 GiB */
} runtime_options;

/* What each rank holds in memory, in bytes. */
typedef struct {
    unsigned long long weights_share;    /* stored bytes of the shared parts and own experts */
    unsigned long long weights_resident; /* of the weights, in this process now */
    unsigned long long kv, buffers;      /* set aside */
    unsigned long long process_private;  /* everything else the process has touched (VmRSS less weights) */
} runtime_memory;

typedef struct runtime runtime;

status runtime_create(group *g, const runtime_options *options, engine_listener listener, void *arg, runtime **out);
void runtime_destroy(runtime *r); /* NULL is fine */

/* [all] A job runs one instruction set: `name`, which all ranks must have, or (NULL) the best that all have. */
status runtime_agree_on_isa(group *g, const char *name, kernel_isa *out);
int runtime_default_threads(const group *g); /* the node's cores over its ranks */

engine *runtime_engine(runtime *r);
const model_config *runtime_config(const runtime *r);
const plan *runtime_plan(const runtime *r);      /* of the start; engine_plan() is the live one */
plan_shape runtime_plan_shape(const runtime *r); /* what a plan for this job must fit */
kernel_isa runtime_isa(const runtime *r);
int runtime_threads(const runtime *r);
const engine_limits *runtime_limits(const runtime *r); /* with what was left open filled in */
const int *runtime_moe_layers(const runtime *r);       /* [n_moe_layers] the model's own layer numbers */
/* Of one expert of one layer as stored, 0 when this rank holds none. */
unsigned long long runtime_expert_bytes(const runtime *r);
void runtime_memory_use(const runtime *r, runtime_memory *out);

#endif
