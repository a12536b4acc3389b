#include "cluster/routing_window.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    routing_stats *stats; /* NULL: nothing yet, or taken out */
    uint64_t *counts;     /* [n_layers][n_experts] */
    uint64_t tokens;
} generation;

struct routing_window {
    routing_shape shape; /* owned */
    bool pairs;
    bool out;      /* the statistics of `earlier` are with the caller */
    bool stale;    /* ... and the window has moved on since */
    uint64_t half; /* tokens that fill a generation */
    uint64_t ever; /* tokens seen */
    size_t n;      /* counts of a generation */
    generation earlier, present;
    uint64_t *sum; /* [n] */
};

status routing_window_create(const routing_shape *shape, bool pairs, uint64_t tokens, routing_window **out)
{
    routing_window *w = calloc(1, sizeof *w);
    if (!w)
        return status_fail(STATUS_NO_MEMORY, "no memory for routing statistics");
    status st = routing_shape_copy(shape, &w->shape);
    if (st != STATUS_OK) {
        free(w);
        return st;
    }
    w->pairs = pairs;
    w->half = tokens / 2 + 1;
    w->n = (size_t)shape->n_layers * (size_t)shape->n_experts;
    w->earlier.counts = calloc(w->n, sizeof *w->earlier.counts);
    w->present.counts = calloc(w->n, sizeof *w->present.counts);
    w->sum = calloc(w->n, sizeof *w->sum);
    if (!w->earlier.counts || !w->present.counts || !w->sum) {
        routing_window_destroy(w);
        return status_fail(STATUS_NO_MEMORY, "no memory for routing statistics");
    }
    *out = w;
    return STATUS_OK;
}

static void generation_clear(generation *g, size_t n)
{
    routing_stats_destroy(g->stats);
    g->stats = NULL;
    g->tokens = 0;
    memset(g->counts, 0, n * sizeof *g->counts);
}

void routing_window_destroy(routing_window *w)
{
    if (!w)
        return;
    routing_stats_destroy(w->earlier.stats);
    routing_stats_destroy(w->present.stats);
    free(w->earlier.counts);
    free(w->present.counts);
    free(w->sum);
    routing_shape_clear(&w->shape);
    free(w);
}

static void move_on(routing_window *w)
{
    generation oldest = w->earlier;
    w->earlier = w->present;
    w->present = oldest;
    generation_clear(&w->present, w->n);
    w->stale = w->out;
}

static uint64_t tokens_of(const routing_stats *s)
{
    return routing_stats_tokens(s, 0, PHASE_PREFILL) + routing_stats_tokens(s, 0, PHASE_DECODE);
}

status routing_window_add(routing_window *w, const void *packed, size_t size)
{
    generation *g = &w->present;
    if (!g->stats)
        TRY(routing_stats_create(&w->shape, w->pairs, &g->stats));
    status st = routing_stats_add_packed(g->stats, packed, size);
    if (st != STATUS_OK) {
        generation_clear(g, w->n);
        return st;
    }
    uint64_t tokens = tokens_of(g->stats);
    w->ever += tokens - g->tokens;
    g->tokens = tokens;
    routing_stats_sum_tokens(g->stats, -1, -1, g->counts);
    if (g->tokens >= w->half)
        move_on(w);
    return STATUS_OK;
}

const routing_shape *routing_window_shape(const routing_window *w)
{
    return &w->shape;
}

uint64_t routing_window_tokens(const routing_window *w)
{
    return w->earlier.tokens + w->present.tokens;
}

uint64_t routing_window_tokens_ever(const routing_window *w)
{
    return w->ever;
}

const uint64_t *routing_window_counts(routing_window *w)
{
    for (size_t i = 0; i < w->n; i++)
        w->sum[i] = w->earlier.counts[i] + w->present.counts[i];
    return w->sum;
}

bool routing_window_take(routing_window *w, routing_stats **a, routing_stats **b)
{
    if (w->out || routing_window_tokens(w) == 0)
        return false;
    *a = w->earlier.stats;
    *b = w->present.stats;
    w->earlier.stats = w->present.stats = NULL;
    memcpy(w->earlier.counts, routing_window_counts(w), w->n * sizeof *w->sum);
    w->earlier.tokens += w->present.tokens;
    generation_clear(&w->present, w->n);
    w->out = true;
    w->stale = false;
    return true;
}

void routing_window_give_back(routing_window *w, routing_stats *sum)
{
    if (w->stale)
        routing_stats_destroy(sum);
    else if (sum)
        w->earlier.stats = sum;
    else
        generation_clear(&w->earlier, w->n);
    w->out = w->stale = false;
}
