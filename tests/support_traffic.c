#include "tests/support_traffic.h"

#include "tests/support.h"
#include "tests/support_routing.h"

#include <stdlib.h>
#include <string.h>

static status allocate(const routing_shape *shape, int n_sequences, int64_t n_tokens, bool owned, traffic *t)
{
    size_t n = (size_t)n_tokens;
    TRY(routing_shape_copy(shape, &t->shape));
    t->n_tokens = n_tokens;
    t->n_sequences = n_sequences;
    t->first_token = calloc((size_t)n_sequences + 1, sizeof *t->first_token);
    t->domain = calloc((size_t)n_sequences, sizeof *t->domain);
    t->row = calloc(n, sizeof *t->row);
    t->phase = calloc(n, sizeof *t->phase);
    t->owner = owned ? calloc(n, sizeof *t->owner) : NULL;
    t->step = owned ? calloc(n, sizeof *t->step) : NULL;
    t->experts = calloc(n * (size_t)shape->n_layers, (size_t)shape->top_k * sizeof *t->experts);
    if (t->first_token && t->domain && t->row && t->phase && t->experts && (!owned || (t->owner && t->step)))
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "random traffic: no memory for %zu tokens", n);
}

/* Rows in turns of random sequences, each started in order; then two rows of a sequence change places now and then. */
static void deal_rows(uint64_t *seed, const traffic *t)
{
    int started = 0, done = 0;
    int64_t *next = calloc((size_t)t->n_sequences, sizeof *next);
    if (!next)
        abort();
    for (int64_t row = 0; row < t->n_tokens;) {
        int s =
            done + support_below(seed, started + 1 - done < t->n_sequences - done ? started + 1 - done : t->n_sequences - done);
        if (next[s] < t->first_token[s + 1] - t->first_token[s])
            t->row[t->first_token[s] + next[s]++] = row++;
        if (s == started && started + 1 <= t->n_sequences)
            started++;
        while (done < t->n_sequences && next[done] == t->first_token[done + 1] - t->first_token[done])
            done++;
    }
    for (int s = 0; s < t->n_sequences; s++) {
        int n = (int)(t->first_token[s + 1] - t->first_token[s]);
        int64_t *a = &t->row[t->first_token[s] + support_below(seed, n)],
                *b = &t->row[t->first_token[s] + support_below(seed, n)];
        int64_t kept = *a;
        *a = *b;
        *b = kept;
    }
    free(next);
}

/* Most choices fall on the first third of the experts. */
static void skew_row(uint64_t *seed, const routing_shape *shape, uint16_t *experts)
{
    int few = (shape->n_experts + 2) / 3;
    for (int i = 0; i < shape->n_layers * shape->top_k; i++) {
        uint16_t *layer = experts + i / shape->top_k * shape->top_k, want = (uint16_t)support_below(seed, few);
        bool taken = experts[i] == ROUTING_NO_EXPERT || support_below(seed, 2);
        for (int j = 0; j < shape->top_k; j++)
            taken |= layer[j] == want;
        if (!taken)
            experts[i] = want;
    }
}

static void fill(uint64_t *seed, const routing_shape *shape, int drop_percent, int n_owners, traffic *t)
{
    size_t k = (size_t)shape->top_k;
    uint16_t *row = calloc((size_t)shape->n_layers * k, sizeof *row);
    if (!row)
        abort();
    for (int64_t i = 0; i < t->n_tokens; i++) {
        support_routing_row(seed, shape, drop_percent, row, NULL);
        skew_row(seed, shape, row);
        for (int l = 0; l < shape->n_layers; l++)
            memcpy((uint16_t *)traffic_experts(t, l, i), row + (size_t)l * k, k * sizeof *row);
        t->phase[i] = (uint8_t)support_below(seed, N_PHASES);
        if (n_owners > 0) {
            t->owner[i] = support_below(seed, n_owners);
            t->step[i] = support_below(seed, 1 + (int)(t->n_tokens / 10)) * 3;
        }
    }
    for (int s = 0; s < t->n_sequences; s++)
        t->domain[s] = support_below(seed, shape->n_domains);
    free(row);
}

status support_random_traffic(uint64_t *seed, const routing_shape *shape, int n_sequences, int max_tokens, int drop_percent,
                              int n_owners, traffic *out)
{
    traffic t = {0};
    int64_t n_tokens = 0;
    uint64_t lengths = *seed;
    for (int s = 0; s < n_sequences; s++)
        n_tokens += 1 + support_below(seed, max_tokens);
    status st = allocate(shape, n_sequences, n_tokens, n_owners > 0, &t);
    if (st != STATUS_OK) {
        traffic_clear(&t);
        return st;
    }
    for (int s = 0; s < n_sequences; s++)
        t.first_token[s + 1] = t.first_token[s] + 1 + support_below(&lengths, max_tokens);
    deal_rows(seed, &t);
    fill(seed, shape, drop_percent, n_owners, &t);
    *out = t;
    return STATUS_OK;
}

/* ---- as a trace ---- */

enum { EXPERTS, WEIGHTS, SEQUENCE, POSITION, PHASE, DOMAIN, OWNER, STEP, N_COLUMNS };

static status declare(const traffic *t, safetensors_writer *w, int *index)
{
    static const char *const names[] = {"experts", "weights", "sequence", "position", "phase", "domain", "owner", "step"};
    static const tensor_dtype dtypes[] = {DTYPE_U16, DTYPE_F32, DTYPE_I32, DTYPE_I32, DTYPE_U8, DTYPE_U16, DTYPE_I32, DTYPE_I32};
    const int64_t shape[3] = {t->n_tokens, t->shape.n_layers, t->shape.top_k};
    for (int c = 0; c < (t->owner ? N_COLUMNS : OWNER); c++)
        TRY(safetensors_writer_declare(w, names[c], dtypes[c], c <= WEIGHTS ? 3 : 1, shape, &index[c]));
    return STATUS_OK;
}

static status put_token(const traffic *t, safetensors_writer *w, const int *index, int sequence, int64_t token)
{
    size_t row = (size_t)(t->row ? t->row[token] : token), k = (size_t)t->shape.top_k, choices = (size_t)t->shape.n_layers * k;
    for (int l = 0; l < t->shape.n_layers; l++)
        for (size_t j = 0; j < k; j++) {
            const uint16_t *e = &traffic_experts(t, l, token)[j];
            float weight = *e == ROUTING_NO_EXPERT ? 0 : 1 / (float)(j + 2);
            size_t at = row * choices + (size_t)l * k + j;
            TRY(safetensors_writer_put(w, index[EXPERTS], at * sizeof *e, e, sizeof *e));
            TRY(safetensors_writer_put(w, index[WEIGHTS], at * sizeof weight, &weight, sizeof weight));
        }
    int32_t position = (int32_t)(token - t->first_token[sequence]) * 2 + 5;
    uint16_t domain = (uint16_t)t->domain[sequence];
    int32_t id = 1000 - 7 * sequence; /* falling: order in the file is what counts */
    TRY(safetensors_writer_put(w, index[SEQUENCE], row * sizeof id, &id, sizeof id));
    TRY(safetensors_writer_put(w, index[POSITION], row * sizeof position, &position, sizeof position));
    TRY(safetensors_writer_put(w, index[PHASE], row, &t->phase[token], 1));
    TRY(safetensors_writer_put(w, index[DOMAIN], row * sizeof domain, &domain, sizeof domain));
    if (!t->owner)
        return STATUS_OK;
    TRY(safetensors_writer_put(w, index[OWNER], row * sizeof(int32_t), &t->owner[token], sizeof(int32_t)));
    return safetensors_writer_put(w, index[STEP], row * sizeof(int32_t), &t->step[token], sizeof(int32_t));
}

status support_write_traffic(const traffic *t, const char *path)
{
    safetensors_writer *w;
    status st;
    int index[N_COLUMNS];
    TRY(safetensors_writer_create(path, &w));
    TRY_GOTO(routing_shape_write(&t->shape, w), out);
    TRY_GOTO(declare(t, w, index), out);
    TRY_GOTO(safetensors_writer_begin(w), out);
    for (int s = 0; s < t->n_sequences; s++)
        for (int64_t i = t->first_token[s]; i < t->first_token[s + 1]; i++)
            TRY_GOTO(put_token(t, w, index, s, i), out);
    st = safetensors_writer_finish(w);
out:
    safetensors_writer_destroy(w);
    return st;
}

/* ---- machines ---- */

status support_random_topology(uint64_t *seed, int n_ranks, topology *out)
{
    topology t;
    size_t n = (size_t)n_ranks;
    TRY(topology_uniform(n_ranks, 1 + support_below(seed, n_ranks < 4 ? n_ranks : 4), &t));
    int *size = calloc(n, sizeof *size);
    t.links = support_below(seed, 2) ? calloc(n * n, sizeof *t.links) : NULL;
    if (!size)
        abort();
    for (int r = 0; r < n_ranks; r++) { /* the first ranks see to it that no node is empty */
        t.node_of_rank[r] = r < t.n_nodes ? r : support_below(seed, t.n_nodes);
        t.local_index[r] = size[t.node_of_rank[r]]++;
        t.row_us[r] = 1 + support_below(seed, 1000) / 7.0;
        t.expert_us[r] = support_below(seed, 1000) / 3.0;
    }
    for (size_t i = 0; t.links && i < n * n; i++)
        t.links[i] = i % (n + 1) == 0 ? 0 : 0.1 + support_below(seed, 1000) / 300.0;
    t.link[LINK_SAME_NODE] = (link_cost){.us = support_below(seed, 20), .gb_per_s = 1 + support_below(seed, 9)};
    t.link[LINK_CROSS_NODE] = (link_cost){.us = support_below(seed, 90), .gb_per_s = 0.1 + support_below(seed, 9) / 3.0};
    t.row_bytes = 1 + support_below(seed, 20000) / 3.0;
    free(size);
    *out = t;
    return STATUS_OK;
}
