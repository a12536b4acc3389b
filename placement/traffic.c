/* traffic.c - takes a trace apart: which sequences are wanted, their rows in order, and then the choices layer by layer. */
#include "placement/traffic.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void traffic_clear(traffic *t)
{
    routing_shape_clear(&t->shape);
    free(t->first_token);
    free(t->domain);
    free(t->row);
    free(t->phase);
    free(t->owner);
    free(t->step);
    free(t->experts);
    *t = (traffic){0};
}

/* One row of the trace, before anything is chosen. */
typedef struct {
    int64_t row;
    int32_t sequence, position;
    uint16_t domain;
    uint8_t phase;
} entry;

/* A sequence: entries [first, last), sorted by position. */
typedef struct {
    int64_t first, last, first_row;
} stretch;

static int by_place(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->sequence != y->sequence)
        return x->sequence < y->sequence ? -1 : 1;
    if (x->position != y->position)
        return x->position < y->position ? -1 : 1;
    return x->row < y->row ? -1 : x->row > y->row;
}

static int by_first_row(const void *a, const void *b)
{
    const stretch *x = a, *y = b;
    return x->first_row < y->first_row ? -1 : x->first_row > y->first_row;
}

static bool phase_wanted(const traffic_part *part, int phase)
{
    return part->phase == TRAFFIC_ALL || (part->phase == TRAFFIC_DECODE) == (phase == PHASE_DECODE);
}

/* Sorts the entries into sequences in order of their first row, and keeps those of wanted domains that have a wanted token.
 * Returns how many. */
static int64_t find_sequences(const traffic_part *part, entry *entries, int64_t n, stretch *out)
{
    int64_t count = 0;
    qsort(entries, (size_t)n, sizeof *entries, by_place);
    for (int64_t i = 0, end; i < n; i = end) {
        stretch s = {.first = i, .first_row = entries[i].row};
        bool wanted = false;
        for (end = i; end < n && entries[end].sequence == entries[i].sequence; end++) {
            wanted |= phase_wanted(part, entries[end].phase);
            if (entries[end].row < s.first_row)
                s.first_row = entries[end].row;
        }
        s.last = end;
        if (wanted && (!part->domains || part->domains[entries[i].domain]))
            out[count++] = s;
    }
    qsort(out, (size_t)count, sizeof *out, by_first_row);
    return count;
}

/* Neighbouring parts that share a boundary share no sequence and leave none out. */
static void cut_share(const traffic_part *part, stretch **sequences, int64_t *n)
{
    if (part->from == 0 && part->to == 0)
        return;
    int64_t from = llround(part->from * (double)*n), to = llround(part->to * (double)*n);
    *sequences += from;
    *n = to > from ? to - from : 0;
}

static status allocate(const char *path, int64_t n_sequences, int64_t n_tokens, bool owned, traffic *t)
{
    t->n_tokens = n_tokens;
    t->n_sequences = (int)n_sequences;
    size_t n = (size_t)n_tokens, choices = (size_t)t->shape.n_layers * (size_t)t->shape.top_k;
    t->first_token = calloc((size_t)n_sequences + 1, sizeof *t->first_token);
    t->domain = calloc((size_t)n_sequences, sizeof *t->domain);
    t->row = calloc(n, sizeof *t->row);
    t->phase = calloc(n, sizeof *t->phase);
    t->experts = calloc(n, choices * sizeof *t->experts);
    t->owner = owned ? calloc(n, sizeof *t->owner) : NULL;
    t->step = owned ? calloc(n, sizeof *t->step) : NULL;
    if (t->first_token && t->domain && t->row && t->phase && t->experts && (!owned || (t->owner && t->step)))
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "%s: no memory for the choices of %lld tokens", path, (long long)n_tokens);
}

/* NULL when the trace has no such tensor. */
static status find_column(const routing_trace *trace, const char *name, const tensor_view **out)
{
    const tensor_view *view = *out = routing_trace_find(trace, name);
    if (!view)
        return STATUS_OK;
    bool fits = view->dtype == DTYPE_I32 && view->n_dims >= 1 && view->n_dims <= 2 &&
                view->shape[0] == routing_trace_n_tokens(trace) && (view->n_dims == 1 || view->shape[1] == 1);
    return fits ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: tensor %s is not i32 [tokens]", routing_trace_path(trace), name);
}

static status copy_column(const routing_trace *trace, const tensor_view *view, const traffic *t, int32_t *out)
{
    for (int64_t i = 0; i < t->n_tokens; i++) {
        memcpy(&out[i], (const unsigned char *)view->data + (size_t)t->row[i] * sizeof *out, sizeof *out);
        if (out[i] < 0)
            return status_fail(STATUS_BAD_INPUT, "%s: token %lld: %s is %d", routing_trace_path(trace), (long long)t->row[i],
                               view->name, out[i]);
    }
    return STATUS_OK;
}

static void fill_sequences(const traffic_part *part, const entry *entries, const stretch *sequences, traffic *t)
{
    int64_t token = 0;
    for (int s = 0; s < t->n_sequences; s++) {
        t->first_token[s] = token;
        t->domain[s] = entries[sequences[s].first].domain;
        for (int64_t i = sequences[s].first; i < sequences[s].last; i++)
            if (phase_wanted(part, entries[i].phase)) {
                t->phase[token] = entries[i].phase;
                t->row[token++] = entries[i].row;
            }
    }
    t->first_token[t->n_sequences] = token;
}

static status fill_experts(const routing_trace *trace, traffic *t)
{
    size_t k = (size_t)t->shape.top_k;
    uint16_t *row = calloc((size_t)t->shape.n_layers * k, sizeof *row);
    if (!row)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a row", routing_trace_path(trace));
    for (int64_t i = 0; i < t->n_tokens; i++) {
        routing_trace_row(trace, t->row[i], row, NULL);
        for (int l = 0; l < t->shape.n_layers; l++)
            memcpy((uint16_t *)traffic_experts(t, l, i), row + (size_t)l * k, k * sizeof *row);
    }
    free(row);
    return STATUS_OK;
}

static void read_entries(const routing_trace *trace, int64_t n, uint16_t *scratch, entry *entries)
{
    for (int64_t i = 0; i < n; i++) {
        routing_row r = routing_trace_row(trace, i, scratch, NULL);
        entries[i] = (entry){
            .row = i, .sequence = r.sequence, .position = r.position, .domain = (uint16_t)r.domain, .phase = (uint8_t)r.phase};
    }
}

/* entries and sequences: scratch for every row of the trace. */
static status load(const routing_trace *trace, const traffic_part *part, entry *entries, stretch *sequences, traffic *t)
{
    const char *path = routing_trace_path(trace);
    const tensor_view *owner, *step;
    TRY(find_column(trace, "owner", &owner));
    TRY(find_column(trace, "step", &step));
    int64_t n = find_sequences(part, entries, routing_trace_n_tokens(trace), sequences), n_tokens = 0;
    int64_t n_all = n;
    cut_share(part, &sequences, &n);
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = sequences[s].first; i < sequences[s].last; i++)
            n_tokens += phase_wanted(part, entries[i].phase);
    if (n_tokens == 0)
        return status_fail(STATUS_BAD_INPUT,
                           "%s: none of its %lld tokens is in the part that was asked for (%lld sequences match)", path,
                           (long long)routing_trace_n_tokens(trace), (long long)n_all);
    if (n > INT32_MAX)
        return status_fail(STATUS_UNSUPPORTED, "%s: %lld sequences are too many", path, (long long)n);
    TRY(allocate(path, n, n_tokens, owner && step, t));
    fill_sequences(part, entries, sequences, t);
    TRY(fill_experts(trace, t));
    if (owner && step) {
        TRY(copy_column(trace, owner, t, t->owner));
        TRY(copy_column(trace, step, t, t->step));
    }
    return STATUS_OK;
}

static status check_part(const char *path, const traffic_part *part)
{
    if (part->phase < TRAFFIC_ALL || part->phase > TRAFFIC_PREFILL)
        return status_fail(STATUS_BAD_INPUT, "%s: there is no phase %d to choose", path, part->phase);
    if (!(part->from >= 0 && part->from <= part->to && part->to <= 1))
        return status_fail(STATUS_BAD_INPUT, "%s: the part from %g to %g of its sequences does not lie within 0 to 1", path,
                           part->from, part->to);
    return STATUS_OK;
}

status traffic_load(const routing_trace *trace, const traffic_part *part, traffic *out)
{
    static const traffic_part everything;
    const routing_shape *shape = routing_trace_shape(trace);
    traffic t = {0};
    part = part ? part : &everything;
    TRY(check_part(routing_trace_path(trace), part));
    TRY(routing_shape_copy(shape, &t.shape));
    size_t n = (size_t)routing_trace_n_tokens(trace), row = (size_t)shape->n_layers * (size_t)shape->top_k;
    entry *entries = calloc(n + 1, sizeof *entries);
    stretch *sequences = calloc(n + 1, sizeof *sequences);
    uint16_t *scratch = calloc(row, sizeof *scratch);
    status st;
    if (!entries || !sequences || !scratch) {
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory to sort its %zu tokens", routing_trace_path(trace), n);
        goto out;
    }
    read_entries(trace, (int64_t)n, scratch, entries);
    st = load(trace, part, entries, sequences, &t);
out:
    free(entries);
    free(sequences);
    free(scratch);
    if (st == STATUS_OK)
        *out = t;
    else
        traffic_clear(&t);
    return st;
}

void traffic_count(const traffic *t, uint64_t *out)
{
    size_t n_experts = (size_t)t->shape.n_experts, n = (size_t)t->n_tokens * (size_t)t->shape.top_k;
    memset(out, 0, (size_t)t->shape.n_layers * n_experts * sizeof *out);
    for (int l = 0; l < t->shape.n_layers; l++) {
        const uint16_t *chosen = t->experts + (size_t)l * n;
        uint64_t *counts = out + (size_t)l * n_experts;
        for (size_t i = 0; i < n; i++)
            if (chosen[i] != ROUTING_NO_EXPERT)
                counts[chosen[i]]++;
    }
}
