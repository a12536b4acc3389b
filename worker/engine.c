/* engine.c - the step loop's life, and the step: the leader decides, every rank obeys, the leader hears what came of it. Buffers
 * are made at the start; a step only moves between them. */
#include "worker/engine.h"

#include "proto/clock.h"
#include "worker/engine_parts.h"

#include <stdlib.h>

static status create_local(engine *e)
{
    const model_config *c = e->parts.config;
    TRY(kv_cache_create(c->n_layers, c->n_kv_heads, c->head_dim, e->limits.kv_bytes, &e->kv));
    TRY(rank_create(e));
    TRY(plans_create(e));
    TRY(owners_create(e));
    return counts_create(e);
}

int engine_places(const engine_limits *limits, int n_ranks)
{
    if (limits->owners == OWNERS_AFFINITY)
        return (int)((21L * limits->max_sequences + 20L * n_ranks - 1) / (20L * n_ranks));
    return (limits->max_sequences + n_ranks - 1) / n_ranks;
}

status engine_create(const model_parts *parts, const engine_limits *limits, engine_listener listener, void *arg, engine **out)
{
    engine *e = calloc(1, sizeof *e);
    if (!e)
        return group_agree(parts->group, status_fail(STATUS_NO_MEMORY, "no memory for the step loop"));
    e->parts = *parts;
    e->limits = *limits;
    e->listener = listener;
    e->listener_arg = arg;
    e->rank = group_rank(parts->group);
    e->n_ranks = group_size(parts->group);
    e->n_places = engine_places(limits, e->n_ranks);
    e->max_rows = e->n_places + limits->chunk;
    e->choices_per_row = (size_t)parts->config->n_moe_layers * (size_t)parts->config->top_k;
    status st;
    TRY_GOTO(group_agree(parts->group, create_local(e)), fail);
    TRY_GOTO(lead_create(e), fail);
    e->parts.kv = e->kv;
    e->parts.max_rows = e->max_rows;
    e->parts.max_length = limits->max_length;
    TRY_GOTO(model_create(&e->parts, &e->model), fail);
    *out = e;
    return STATUS_OK;
fail:
    engine_destroy(e);
    return st;
}

void engine_destroy(engine *e)
{
    if (!e)
        return;
    lead_destroy(e);
    owners_destroy(e);
    counts_destroy(e);
    plans_destroy(e);
    model_destroy(e->model);
    rank_destroy(e);
    kv_cache_destroy(e->kv);
    free(e);
}

model *engine_model(engine *e)
{
    return e->model;
}

const engine_times *engine_get_times(const engine *e)
{
    return &e->times;
}

const routing_stats *engine_routing(const engine *e)
{
    return e->routing;
}

size_t engine_kv_bytes(const engine *e)
{
    return kv_cache_bytes(e->kv);
}

int engine_max_rows(const engine *e)
{
    return e->max_rows;
}

/* ---- the step -------------------------------------------------------------------------------------------------------------- */

static status step(engine *e, bool stop)
{
    double start = clock_seconds();
    const void *message = NULL;
    size_t size = 0;
    if (e->rank == 0) {
        TRY(lead_write_message(e, stop));
        message = e->message.data;
        size = e->message.size;
    }
    TRY(group_broadcast_message(e->parts.group, &message, &size));
    TRY(rank_step(e, message, size));
    if (e->stopping)
        return STATUS_OK;
    TRY(group_gather(e->parts.group, e->report.data, e->report.size, e->parts_in, e->sizes_in));
    return e->rank == 0 ? lead_read_reports(e, clock_seconds() - start) : STATUS_OK;
}

status engine_step(engine *e)
{
    return step(e, false);
}

status engine_stop(engine *e)
{
    return step(e, true);
}

status engine_follow(engine *e)
{
    while (!e->stopping)
        TRY(step(e, false));
    return STATUS_OK;
}
