#include "worker/runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct runtime {
    group *group; /* borrowed */
    kernel_isa isa;
    int threads;
    model_config config;
    int *layer_numbers; /* [n_moe_layers] */
    plan plan;
    topology topology;
    checkpoint *checkpoint;
    const model_weights *weights;
    thread_pool *pool;
    engine *engine;
    engine_limits limits;
    const runtime_options *options; /* while loading */
};

/* A job that is continued keeps its instruction set: another would give other bits. */
static status take_isa(const char *name, kernel_isa *out)
{
    TRY(kernel_isa_find(name, out));
    if (kernels_of(*out))
        return STATUS_OK;
    char host[64] = "?";
    gethostname(host, sizeof host - 1);
    return status_fail(STATUS_UNSUPPORTED, "host %s has no %s, which this job runs", host, name);
}

status runtime_agree_on_isa(group *g, const char *name, kernel_isa *out)
{
    kernel_isa mine = ISA_SCALAR;
    int lowest;
    if (name)
        return group_agree(g, take_isa(name, out));
    TRY(group_agree(g, kernels_pick(&mine)));
    TRY(group_min(g, (int)mine, &lowest));
    *out = (kernel_isa)lowest;
    return STATUS_OK;
}

int runtime_default_threads(const group *g)
{
    int ranks_here = 0;
    for (int i = 0; i < group_size(g); i++)
        ranks_here += group_node_of_rank(g)[i] == group_node(g);
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores > ranks_here ? (int)(cores / ranks_here) : 1;
}

plan_shape runtime_plan_shape(const runtime *r)
{
    return (plan_shape){.n_ranks = group_size(r->group),
                        .n_experts = r->config.n_experts,
                        .n_layers = r->config.n_moe_layers,
                        .layer_numbers = r->layer_numbers,
                        .model_name = r->config.name};
}

static status read_plan(runtime *r, const char *path, const char *text)
{
    plan_shape shape = runtime_plan_shape(r);
    if (!path && !text)
        return plan_contiguous(&shape, group_node_of_rank(r->group), &r->plan);
    TRY(path ? plan_read(path, &shape, &r->plan) : plan_parse("the plan", text, strlen(text), &shape, &r->plan));
    /* Where ranks really are beats what the plan was made for: "nearest replica" must mean near. */
    memcpy(r->plan.node_of_rank, group_node_of_rank(r->group), (size_t)shape.n_ranks * sizeof *r->plan.node_of_rank);
    return STATUS_OK;
}

static status make_plan(runtime *r, const runtime_options *o)
{
    const model_config *c = &r->config;
    r->layer_numbers = calloc((size_t)c->n_moe_layers + 1, sizeof *r->layer_numbers);
    if (!r->layer_numbers)
        return status_fail(STATUS_NO_MEMORY, "no memory for a list of layers");
    for (int l = 0, n = 0; l < c->n_layers; l++)
        if (c->moe_layer[l])
            r->layer_numbers[n++] = l;
    TRY(read_plan(r, o->plan_path, o->plan_text));
    if (o->plan_epoch)
        r->plan.epoch = (long long)o->plan_epoch;
    return STATUS_OK;
}

static void place_ranks(const group *g, topology *t)
{
    t->n_nodes = group_n_nodes(g);
    for (int r = 0; r < t->n_ranks; r++) {
        t->node_of_rank[r] = group_node_of_rank(g)[r];
        t->local_index[r] = 0;
        for (int q = 0; q < r; q++)
            t->local_index[r] += t->node_of_rank[q] == t->node_of_rank[r];
    }
}

static status make_topology(runtime *r, const runtime_options *o)
{
    int n = group_size(r->group);
    if (!o->topology_path && !o->topology_text)
        TRY(topology_uniform(n, 1, &r->topology));
    else if (o->topology_path)
        TRY(topology_read(o->topology_path, &r->topology));
    else
        TRY(topology_parse("the topology", o->topology_text, strlen(o->topology_text), &r->topology));
    if (r->topology.n_ranks == n) /* where ranks really are beats where they were measured */
        place_ranks(r->group, &r->topology);
    else
        return status_fail(STATUS_BAD_INPUT, "%s: a topology of %d ranks; this job has %d",
                           o->topology_path ? o->topology_path : "the topology", r->topology.n_ranks, n);
    return STATUS_OK;
}

static void hear_checkpoint(void *arg, size_t done, size_t total)
{
    const runtime_options *o = arg;
    o->progress(o->progress_arg, "weights", done, total);
}

static status bind_weights(runtime *r, const runtime_options *o)
{
    const model_config *c = &r->config;
    TRY(checkpoint_open(o->model_dir, c, &r->checkpoint));
    if (o->progress)
        checkpoint_on_progress(r->checkpoint, hear_checkpoint, (void *)o);
    unsigned char *holds = calloc((size_t)c->n_layers * (size_t)c->n_experts + 1, 1);
    if (!holds)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of this rank's experts");
    for (int l = 0; l < c->n_moe_layers; l++)
        for (int e = 0; e < c->n_experts; e++)
            holds[(size_t)r->layer_numbers[l] * (size_t)c->n_experts + (size_t)e] =
                plan_holds(&r->plan, l, e, group_rank(r->group));
    status st = checkpoint_bind(r->checkpoint, holds, o->weights, &r->weights);
    free(holds);
    if (st == STATUS_OK && o->progress)
        checkpoint_warm(r->checkpoint, group_told_to_stop);
    return st;
}

static status load(runtime *r, const runtime_options *o)
{
    TRY(model_config_read(o->model_dir, &r->config));
    TRY(make_plan(r, o));
    TRY(make_topology(r, o));
    TRY(bind_weights(r, o));
    r->threads = o->threads > 0 ? o->threads : runtime_default_threads(r->group);
    return thread_pool_create(r->threads, !group_shares_cores(r->group, r->threads), &r->pool);
}

static status complete_limits(const runtime *r, engine_limits *limits)
{
    const model_config *c = &r->config;
    if (limits->max_length == 0)
        limits->max_length = c->max_positions;
    if (limits->max_length > c->max_positions)
        return status_fail(STATUS_BAD_INPUT, "a sequence of %d tokens is asked for, but %s takes at most %d", limits->max_length,
                           c->name, c->max_positions);
    if (limits->kv_bytes == 0) {
        size_t places = (size_t)engine_places(limits, group_size(r->group));
        size_t blocks = places * (size_t)kv_blocks_of(limits->max_length, KV_BLOCK);
        size_t block_bytes = kv_head_floats(c->head_dim) * (size_t)c->n_kv_heads * (size_t)c->n_layers * sizeof(float);
        size_t one = (size_t)kv_blocks_of(limits->max_length, KV_BLOCK) * block_bytes, cap = (size_t)1 << 30;
        limits->kv_bytes = blocks * block_bytes < cap ? blocks * block_bytes : one > cap ? one : cap;
    }
    return STATUS_OK;
}

static status create_engine(runtime *r, const runtime_options *o, engine_listener listener, void *arg)
{
    r->limits = o->limits;
    TRY(group_agree(r->group, complete_limits(r, &r->limits)));
    model_parts parts = {.config = &r->config,
                         .weights = r->weights,
                         .plan = &r->plan,
                         .file = r->checkpoint,
                         .group = r->group,
                         .pool = r->pool,
                         .kernels = kernels_of(r->isa),
                         .replicas = o->replicas,
                         .topology = &r->topology,
                         .combine = o->combine,
                         .rows = o->rows};
    return engine_create(&parts, &r->limits, listener, arg, &r->engine);
}

status runtime_create(group *g, const runtime_options *options, engine_listener listener, void *arg, runtime **out)
{
    runtime *r = calloc(1, sizeof *r);
    if (!r)
        return group_agree(g, status_fail(STATUS_NO_MEMORY, "no memory to start"));
    r->group = g;
    r->options = options;
    status st;
    TRY_GOTO(runtime_agree_on_isa(g, options->isa, &r->isa), fail);
    TRY_GOTO(group_agree(g, load(r, options)), fail);
    TRY_GOTO(create_engine(r, options, listener, arg), fail);
    r->options = NULL;
    checkpoint_on_progress(r->checkpoint, NULL, NULL);
    *out = r;
    return STATUS_OK;
fail:
    runtime_destroy(r);
    return st;
}

void runtime_destroy(runtime *r)
{
    if (!r)
        return;
    engine_destroy(r->engine);
    thread_pool_destroy(r->pool);
    checkpoint_close(r->checkpoint);
    plan_clear(&r->plan);
    topology_clear(&r->topology);
    model_config_clear(&r->config);
    free(r->layer_numbers);
    free(r);
}

engine *runtime_engine(runtime *r)
{
    return r->engine;
}

const model_config *runtime_config(const runtime *r)
{
    return &r->config;
}

const plan *runtime_plan(const runtime *r)
{
    return &r->plan;
}

kernel_isa runtime_isa(const runtime *r)
{
    return r->isa;
}

int runtime_threads(const runtime *r)
{
    return r->threads;
}

const engine_limits *runtime_limits(const runtime *r)
{
    return &r->limits;
}

const int *runtime_moe_layers(const runtime *r)
{
    return r->layer_numbers;
}

static unsigned long long resident_now(void)
{
    unsigned long long size = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file)
        return 0;
    if (fscanf(file, "%llu %llu", &size, &resident) != 2)
        resident = 0;
    fclose(file);
    return resident * (unsigned long long)sysconf(_SC_PAGESIZE);
}

unsigned long long runtime_expert_bytes(const runtime *r)
{
    unsigned long long held = 0;
    for (int l = 0; l < r->plan.n_layers; l++)
        for (int e = 0; e < r->plan.n_experts; e++)
            held += plan_holds(&r->plan, l, e, group_rank(r->group));
    return held > 0 ? r->weights->expert_bytes / held : 0;
}

void runtime_memory_use(const runtime *r, runtime_memory *out)
{
    unsigned long long weights = checkpoint_resident_bytes(r->checkpoint), all = resident_now();
    *out = (runtime_memory){.weights_share = r->weights->shared_bytes + r->weights->expert_bytes,
                            .weights_resident = weights,
                            .kv = engine_kv_bytes(r->engine),
                            .buffers = model_buffer_bytes(engine_model(r->engine)),
                            .process_private = all > weights ? all - weights : 0};
}
