/* model.c - the forward pass, described once for all families; what differs between them is data (model_config, weights that are
 * there or not). One layer, on every rank:
 *
 *     h ─norm─► q, k, v ─bias, clip, norm, rope─► KV cache ─attention─► o ─► h +=
 *     h ─norm─► gate ─► routes ─► exchange ─► experts ─► exchange ─► h +=        (the shared expert runs while rows travel)
 */
#include "worker/model.h"

#include "placement/replica_split.h"
#include "proto/clock.h"
#include "router/gate.h"
#include "worker/buffers.h"
#include "worker/experts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROW_PAD = 16, ATTEND_ROWS = 16, MAX_HEAD_FLOATS = 1 << 22 };

/* One unit of attention: some rows of a span, one KV head. */
typedef struct {
    int span, row, n_rows;
    long cost_before; /* cost of all earlier tasks of one KV head */
} attend_task;

struct model {
    model_parts parts;
    exchange *exchange;
    experts *experts;
    gate_policy policy;
    gate_math math;
    float *cos_table, *sin_table; /* [max_positions][head_dim / 2] */
    float *h;                     /* [max_rows][hidden] residual stream */
    float *x;                     /* [max_rows][x_stride] normed rows */
    float *q, *k, *v, *attended;  /* [max_rows][n_heads or n_kv_heads * head_dim] */
    float *y;                     /* [max_rows][hidden] what a block adds to h */
    float *shared;                /* [max_rows][hidden] */
    float *gate_logits;           /* [max_rows][n_experts] */
    float *gate_scratch;          /* [threads][3 * n_experts] */
    float *head_x, *logits;       /* [head_rows][..] */
    uint16_t *chosen;             /* [moe layers][max_rows][top_k] */
    float *chosen_weights;
    route *routes;      /* [max_rows][top_k] */
    int16_t *exponents; /* [max_rows] */
    attend_task *tasks; /* [max_rows + spans] */
    int *positions;     /* [max_rows] */
    int *bad_layer;     /* [max_rows] -1: none */
    unsigned long long *layer_load;
    int n_tasks, head_rows;
    long task_cost;
    size_t x_stride, q_width, kv_width, buffer_bytes;
    uint32_t turn; /* rows routed so far: the round of replica choice */
    /* REPLICA_STEP */
    replica_split *split;
    int split_copies;     /* copies of a layer that there is room for */
    int32_t *own_counts;  /* [n_experts] rows of this rank, this layer */
    int32_t *all_counts;  /* [n_ranks][n_experts] */
    int32_t *expert_rows; /* [n_experts] of all ranks */
    int32_t *copy_rows;   /* [split_copies] */
    int32_t *quota;       /* [n_ranks][split_copies] rows of each owner that go to each copy */
    model_times times;
    /* the layer that is running */
    const batch *batch;
    int layer, moe_layer;
    float *rows; /* where normed rows go: x, or the exchange's own window */
    size_t rows_stride;
};

/* ---- creation ---------------------------------------------------------------------------------------------------------- */

static status take_buffers(model *m)
{
    const model_config *c = m->parts.config;
    size_t rows = (size_t)m->parts.max_rows, hidden = (size_t)c->hidden, k = (size_t)c->top_k;
    size_t moe = (size_t)c->n_moe_layers, threads = (size_t)thread_pool_size(m->parts.pool);
    size_t widest = m->q_width > hidden ? m->q_width : hidden;
    m->h = buffer_take(rows * hidden, sizeof(float), &m->buffer_bytes);
    m->x = buffer_take(rows * m->x_stride, sizeof(float), &m->buffer_bytes);
    m->q = buffer_take(rows * m->q_width, sizeof(float), &m->buffer_bytes);
    m->k = buffer_take(rows * m->kv_width, sizeof(float), &m->buffer_bytes);
    m->v = buffer_take(rows * m->kv_width, sizeof(float), &m->buffer_bytes);
    m->attended = buffer_take(rows * (widest + ROW_PAD), sizeof(float), &m->buffer_bytes);
    m->y = buffer_take(rows * hidden, sizeof(float), &m->buffer_bytes);
    m->shared = buffer_take(rows * hidden, sizeof(float), &m->buffer_bytes);
    m->gate_logits = buffer_take(rows * (size_t)c->n_experts, sizeof(float), &m->buffer_bytes);
    m->gate_scratch = buffer_take(threads * 3 * (size_t)c->n_experts, sizeof(float), &m->buffer_bytes);
    m->head_x = buffer_take((size_t)m->head_rows * m->x_stride, sizeof(float), &m->buffer_bytes);
    m->logits = buffer_take((size_t)m->head_rows * (size_t)c->vocab, sizeof(float), &m->buffer_bytes);
    m->chosen = buffer_take(moe * rows * k, sizeof *m->chosen, &m->buffer_bytes);
    m->chosen_weights = buffer_take(moe * rows * k, sizeof(float), &m->buffer_bytes);
    m->routes = buffer_take(rows * k, sizeof *m->routes, &m->buffer_bytes);
    m->exponents = buffer_take(rows, sizeof *m->exponents, &m->buffer_bytes);
    m->tasks = buffer_take(2 * rows + 1, sizeof *m->tasks, &m->buffer_bytes);
    m->positions = buffer_take(rows, sizeof *m->positions, &m->buffer_bytes);
    m->bad_layer = buffer_take(rows, sizeof *m->bad_layer, &m->buffer_bytes);
    m->layer_load = calloc(moe + 1, sizeof *m->layer_load);
    if (!m->h || !m->x || !m->q || !m->k || !m->v || !m->attended || !m->y || !m->shared || !m->gate_logits || !m->gate_scratch ||
        !m->head_x || !m->logits || !m->chosen || !m->chosen_weights || !m->routes || !m->exponents || !m->tasks ||
        !m->positions || !m->bad_layer || !m->layer_load)
        return status_fail(STATUS_NO_MEMORY, "no memory for the activations of %d rows", m->parts.max_rows);
    return STATUS_OK;
}

static status create_experts(model *m)
{
    const model_config *c = m->parts.config;
    experts_shape shape = {.hidden = c->hidden,
                           .n_experts = c->n_experts,
                           .top_k = c->top_k,
                           .expert_inter = c->expert_inter,
                           .dense_inter = c->shared_inter,
                           .max_rows = m->parts.max_rows,
                           .n_ranks = group_size(m->parts.group),
                           .combine = m->parts.combine,
                           .rows = m->parts.rows};
    if (c->n_moe_layers < c->n_layers && c->dense_inter > shape.dense_inter)
        shape.dense_inter = c->dense_inter;
    TRY(experts_create(&shape, m->parts.kernels, m->parts.pool, &m->experts));
    m->buffer_bytes += experts_buffer_bytes(m->experts);
    return STATUS_OK;
}

static status create_exchange(model *m)
{
    const model_config *c = m->parts.config;
    exchange_shape x = {.hidden = c->hidden,
                        .top_k = c->top_k,
                        .max_rows = m->parts.max_rows,
                        .n_threads = thread_pool_size(m->parts.pool),
                        .combine = m->parts.combine,
                        .rows = m->parts.rows,
                        .share = m->parts.replicas == REPLICA_STEP ? c->n_experts : 0};
    TRY(exchange_create(m->parts.group, &x, &m->exchange));
    m->buffer_bytes += exchange_buffer_bytes(m->exchange);
    return STATUS_OK;
}

static int layer_copies(const plan *p, int layer)
{
    const int *first = p->first_copy + (size_t)layer * (size_t)p->n_experts;
    return first[p->n_experts] - first[0];
}

static status reserve_split(model *m, const plan *p)
{
    int most = 0;
    for (int l = 0; l < p->n_layers; l++)
        most = layer_copies(p, l) > most ? layer_copies(p, l) : most;
    if (most <= m->split_copies)
        return STATUS_OK;
    replica_split *split;
    size_t n_ranks = (size_t)p->n_ranks, copies = (size_t)most;
    TRY(replica_split_create(p->n_ranks, p->n_experts, most, &split));
    int32_t *copy_rows = calloc(copies, sizeof *copy_rows), *quota = calloc(n_ranks * copies, sizeof *quota);
    if (!copy_rows || !quota) {
        replica_split_destroy(split);
        free(copy_rows);
        free(quota);
        return status_fail(STATUS_NO_MEMORY, "no memory to split rows over %d copies", most);
    }
    replica_split_destroy(m->split);
    free(m->copy_rows);
    free(m->quota);
    m->split = split;
    m->copy_rows = copy_rows;
    m->quota = quota;
    m->split_copies = most;
    return STATUS_OK;
}

static status create_split(model *m)
{
    size_t n_experts = (size_t)m->parts.config->n_experts, n_ranks = (size_t)group_size(m->parts.group);
    if (m->parts.replicas != REPLICA_STEP)
        return STATUS_OK;
    m->own_counts = calloc(n_experts, sizeof *m->own_counts);
    m->all_counts = calloc(n_ranks * n_experts, sizeof *m->all_counts);
    m->expert_rows = calloc(n_experts, sizeof *m->expert_rows);
    if (!m->own_counts || !m->all_counts || !m->expert_rows)
        return status_fail(STATUS_NO_MEMORY, "no memory to count the rows of %zu experts on %zu ranks", n_experts, n_ranks);
    return reserve_split(m, m->parts.plan);
}

/* What a rank does by itself; other ranks may fail at it alone. */
static status create_local(model *m)
{
    const model_config *c = m->parts.config;
    TRY(gate_policy_check(&m->policy));
    TRY(create_split(m));
    TRY(take_buffers(m));
    TRY(rope_tables(&c->rope, c->head_dim, c->max_positions, m->parts.max_length, &m->cos_table, &m->sin_table));
    return create_experts(m);
}

status model_create(const model_parts *parts, model **out)
{
    const model_config *c = parts->config;
    model *m = calloc(1, sizeof *m);
    if (!m)
        return status_fail(STATUS_NO_MEMORY, "no memory for the model's bookkeeping");
    m->parts = *parts;
    m->x_stride = (size_t)c->hidden + ROW_PAD;
    m->q_width = (size_t)c->n_heads * (size_t)c->head_dim;
    m->kv_width = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    m->head_rows = MAX_HEAD_FLOATS / c->vocab < 1 ? 1 : MAX_HEAD_FLOATS / c->vocab > 64 ? 64 : MAX_HEAD_FLOATS / c->vocab;
    m->math = (gate_math){.softmax = parts->kernels->softmax};
    m->policy =
        (gate_policy){.n_experts = c->n_experts, .top_k = c->top_k, .score = GATE_SOFTMAX, .normalise = c->norm_topk, .scale = 1};
    status st;
    TRY_GOTO(group_agree(parts->group, create_local(m)), fail);
    TRY_GOTO(create_exchange(m), fail);
    *out = m;
    return STATUS_OK;
fail:
    model_destroy(m);
    return st;
}

void model_destroy(model *m)
{
    if (!m)
        return;
    exchange_destroy(m->exchange);
    experts_destroy(m->experts);
    void *all[] = {m->cos_table,   m->sin_table,  m->h,           m->x,
                   m->q,           m->k,          m->v,           m->attended,
                   m->y,           m->shared,     m->gate_logits, m->gate_scratch,
                   m->head_x,      m->logits,     m->chosen,      m->chosen_weights,
                   m->routes,      m->exponents,  m->tasks,       m->positions,
                   m->bad_layer,   m->layer_load, m->own_counts,  m->all_counts,
                   m->expert_rows, m->copy_rows,  m->quota};
    replica_split_destroy(m->split);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(m);
}

status model_set_plan(model *m, const plan *p)
{
    if (m->parts.replicas == REPLICA_STEP)
        TRY(reserve_split(m, p));
    m->parts.plan = p;
    return STATUS_OK;
}

size_t model_buffer_bytes(const model *m)
{
    return m->buffer_bytes;
}

int model_head_rows(const model *m)
{
    return m->head_rows;
}

const uint16_t *model_experts(const model *m)
{
    return m->chosen;
}

const float *model_expert_weights(const model *m)
{
    return m->chosen_weights;
}

int model_bad_layer(const model *m, int row)
{
    return m->bad_layer[row];
}

const unsigned long long *model_layer_load(const model *m)
{
    return m->layer_load;
}

const model_times *model_get_times(const model *m)
{
    return &m->times;
}

exchange *model_exchange(model *m)
{
    return m->exchange;
}

/* ---- row-wise work, split by rows -------------------------------------------------------------------------------------- */

/* Few rows are quicker done by one thread than handed out. */
static void run_rows(model *m, thread_pool_fn pass, size_t floats_per_row)
{
    if ((size_t)m->batch->n_rows * floats_per_row <= 8192)
        pass(m, 0, 1);
    else
        thread_pool_run(m->parts.pool, pass, m);
}

static void my_rows(const model *m, int thread, int n_threads, int *first, int *last)
{
    size_t a, b;
    thread_pool_share((size_t)m->batch->n_rows, 1, thread, n_threads, &a, &b);
    *first = (int)a;
    *last = (int)b;
}

static void pass_embed(void *arg, int thread, int n_threads)
{
    model *m = arg;
    const weight_matrix *w = &m->parts.weights->embedding;
    size_t hidden = (size_t)m->parts.config->hidden;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (int r = first; r < last; r++)
        weights_to_f32(w->format, (const char *)w->data + (size_t)m->batch->tokens[r] * hidden * weight_format_size(w->format),
                       hidden, m->h + (size_t)r * hidden);
}

static void pass_attn_norm(void *arg, int thread, int n_threads)
{
    model *m = arg;
    const model_config *c = m->parts.config;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (int r = first; r < last; r++)
        m->parts.kernels->rmsnorm(m->h + (size_t)r * (size_t)c->hidden, m->parts.weights->layers[m->layer].attn_norm, c->hidden,
                                  c->rms_eps, m->x + (size_t)r * m->x_stride);
}

/* Second half of the layer: norm straight to where the exchange wants the row, and the row's fixed-point exponent. */
static void pass_mlp_norm(void *arg, int thread, int n_threads)
{
    model *m = arg;
    const model_config *c = m->parts.config;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (int r = first; r < last; r++) {
        const float *h = m->h + (size_t)r * (size_t)c->hidden;
        m->parts.kernels->rmsnorm(h, m->parts.weights->layers[m->layer].mlp_norm, c->hidden, c->rms_eps,
                                  m->rows + (size_t)r * m->rows_stride);
        m->exponents[r] = (int16_t)combine_exponent(h, c->hidden, c->top_k);
    }
}

static void clip(float *x, size_t n, float limit)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

/* Rotates the pairs (x[i], x[i + half]), as the Hugging Face checkpoints are laid out (RoFormer, arXiv 2104.09864). */
static void rotate(float *x, int half, const float *cosine, const float *sine)
{
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

static void norm_heads(const model *m, float *x, const float *weight, int n_heads)
{
    const model_config *c = m->parts.config;
    if (c->family->qk_norm == QK_NORM_WHOLE)
        m->parts.kernels->rmsnorm(x, weight, n_heads * c->head_dim, c->rms_eps, x);
    else if (c->family->qk_norm == QK_NORM_HEAD)
        for (int h = 0; h < n_heads; h++)
            m->parts.kernels->rmsnorm(x + h * c->head_dim, weight, c->head_dim, c->rms_eps, x + h * c->head_dim);
}

static void prepare_row(model *m, const batch_span *span, int r)
{
    const model_config *c = m->parts.config;
    const layer_weights *w = &m->parts.weights->layers[m->layer];
    float *q = m->q + (size_t)r * m->q_width, *k = m->k + (size_t)r * m->kv_width, *v = m->v + (size_t)r * m->kv_width;
    int half = c->head_dim / 2, position = m->positions[r];
    norm_heads(m, q, w->q_norm, c->n_heads);
    norm_heads(m, k, w->k_norm, c->n_kv_heads);
    if (c->clip_qkv > 0) {
        clip(q, m->q_width, c->clip_qkv);
        clip(k, m->kv_width, c->clip_qkv);
        clip(v, m->kv_width, c->clip_qkv);
    }
    const float *cosine = m->cos_table + (size_t)position * (size_t)half, *sine = m->sin_table + (size_t)position * (size_t)half;
    for (int i = 0; i < c->n_heads; i++)
        rotate(q + i * c->head_dim, half, cosine, sine);
    for (int i = 0; i < c->n_kv_heads; i++) {
        rotate(k + i * c->head_dim, half, cosine, sine);
        kv_cache_store(m->parts.kv, m->layer, i, span->block_ids, position, k + i * c->head_dim, v + i * c->head_dim);
    }
}

static void pass_prepare(void *arg, int thread, int n_threads)
{
    model *m = arg;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (int s = 0; s < m->batch->n_spans; s++) {
        const batch_span *span = &m->batch->spans[s];
        int a = span->first_row > first ? span->first_row : first;
        int b = span->first_row + span->n_rows < last ? span->first_row + span->n_rows : last;
        for (int r = a; r < b; r++)
            prepare_row(m, span, r);
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------------- */

/* Cuts the batch into tasks once per step; the cost of a row is the positions it may see. */
static void plan_attention(model *m, const batch *b)
{
    m->n_tasks = 0;
    m->task_cost = 0;
    for (int s = 0; s < b->n_spans; s++) {
        const batch_span *span = &b->spans[s];
        for (int r = 0; r < span->n_rows; r++)
            m->positions[span->first_row + r] = span->first_position + r;
        for (int r = 0; r < span->n_rows; r += ATTEND_ROWS) {
            int n = span->n_rows - r < ATTEND_ROWS ? span->n_rows - r : ATTEND_ROWS;
            m->tasks[m->n_tasks++] = (attend_task){.span = s, .row = r, .n_rows = n, .cost_before = m->task_cost};
            m->task_cost += (long)n * (span->first_position + r + n + KV_BLOCK);
        }
    }
}

static void attend_one(model *m, const attend_task *task, int kv_head)
{
    const model_config *c = m->parts.config;
    const batch_span *span = &m->batch->spans[task->span];
    int group_heads = c->n_heads / c->n_kv_heads;
    size_t row = (size_t)(span->first_row + task->row), at = (size_t)kv_head * (size_t)group_heads * (size_t)c->head_dim;
    attend_args args = {.q = m->q + row * m->q_width + at,
                        .q_row_stride = m->q_width,
                        .out = m->attended + row * (m->q_width + ROW_PAD) + at,
                        .out_row_stride = m->q_width + ROW_PAD,
                        .n_rows = task->n_rows,
                        .n_heads = group_heads,
                        .head_dim = c->head_dim,
                        .first_position = span->first_position + task->row,
                        .window = c->window[m->layer],
                        .scale = 1.0f / sqrtf((float)c->head_dim),
                        .pool = kv_cache_head(m->parts.kv, m->layer, kv_head),
                        .block_floats = kv_cache_block_floats(m->parts.kv),
                        .block_ids = span->block_ids};
    m->parts.kernels->attend(&args);
}

static void pass_attend(void *arg, int thread, int n_threads)
{
    model *m = arg;
    int n_kv = m->parts.config->n_kv_heads;
    long total = m->task_cost * n_kv, first = total * thread / n_threads, last = total * (thread + 1) / n_threads;
    for (int head = 0; head < n_kv; head++)
        for (int i = 0; i < m->n_tasks; i++) {
            long start = (long)head * m->task_cost + m->tasks[i].cost_before;
            if (start >= first && start < last)
                attend_one(m, &m->tasks[i], head);
        }
}

static void pass_residual(void *arg, int thread, int n_threads)
{
    model *m = arg;
    size_t hidden = (size_t)m->parts.config->hidden;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (size_t i = (size_t)first * hidden; i < (size_t)last * hidden; i++)
        m->h[i] += m->y[i];
}

static void attention(model *m)
{
    const model_config *c = m->parts.config;
    const layer_weights *w = &m->parts.weights->layers[m->layer];
    int n = m->batch->n_rows;
    run_rows(m, pass_attn_norm, (size_t)c->hidden);
    projection qkv[] = {
        {&w->q, m->q, m->q_width, w->q_bias}, {&w->k, m->k, m->kv_width, w->k_bias}, {&w->v, m->v, m->kv_width, w->v_bias}};
    project(m->parts.pool, m->parts.kernels, qkv, 3, m->x, m->x_stride, n);
    run_rows(m, pass_prepare, m->q_width + 2 * m->kv_width);
    if (n > 0)
        thread_pool_run(m->parts.pool, pass_attend, m);
    projection o = {&w->o, m->y, (size_t)c->hidden, w->o_bias};
    project(m->parts.pool, m->parts.kernels, &o, 1, m->attended, m->q_width + ROW_PAD, n);
    run_rows(m, pass_residual, (size_t)c->hidden);
}

/* ---- feed-forward ---------------------------------------------------------------------------------------------------------- */

/* A row that has no numbers any more chooses nothing and harms no other; its sequence is ended by the step loop. */
static void drop_row(model *m, int r, size_t at)
{
    if (m->bad_layer[r] < 0)
        m->bad_layer[r] = m->layer;
    for (size_t j = 0; j < (size_t)m->parts.config->top_k; j++) {
        m->chosen[at + j] = GATE_NO_EXPERT;
        m->chosen_weights[at + j] = 0;
    }
}

static void choose_row(model *m, int r, float *scratch)
{
    const model_config *c = m->parts.config;
    size_t at = ((size_t)m->moe_layer * (size_t)m->parts.max_rows + (size_t)r) * (size_t)c->top_k;
    if (gate_choose(&m->policy, &m->math, m->gate_logits + (size_t)r * (size_t)c->n_experts, scratch, m->chosen + at,
                    m->chosen_weights + at) != STATUS_OK)
        drop_row(m, r, at);
    int owner = group_rank(m->parts.group);
    for (int j = 0; j < c->top_k; j++) {
        uint16_t e = m->chosen[at + (size_t)j];
        int rank = e == GATE_NO_EXPERT
                       ? 0
                       : plan_choose(m->parts.plan, m->parts.replicas, m->moe_layer, e, owner, m->turn + (uint32_t)r);
        m->routes[(size_t)r * (size_t)c->top_k + (size_t)j] =
            (route){.expert = e, .rank = (uint16_t)rank, .weight = m->chosen_weights[at + (size_t)j]};
    }
}

/* Every rank knows all ranks' counts of rows per expert, and works out alike which copy computes how many rows of each owner;
 * this rank's rows take the copies in the order of rows and of the plan. */
static status split_rows(model *m)
{
    const model_config *c = m->parts.config;
    const plan *p = m->parts.plan;
    size_t k = (size_t)c->top_k, n = (size_t)m->batch->n_rows * k, n_experts = (size_t)c->n_experts;
    memset(m->own_counts, 0, n_experts * sizeof *m->own_counts);
    for (size_t i = 0; i < n; i++)
        if (m->routes[i].expert != GATE_NO_EXPERT)
            m->own_counts[m->routes[i].expert]++;
    TRY(exchange_share(m->exchange, m->own_counts, c->n_experts, m->all_counts));
    memset(m->expert_rows, 0, n_experts * sizeof *m->expert_rows);
    for (size_t r = 0; r < (size_t)p->n_ranks; r++)
        for (size_t e = 0; e < n_experts; e++)
            m->expert_rows[e] += m->all_counts[r * n_experts + e];
    const topology *t = m->parts.topology;
    replica_split_rows(m->split, p, m->moe_layer, t->row_us, t->expert_us, m->expert_rows, m->copy_rows);
    replica_split_owners(m->split, p, m->moe_layer, p->n_ranks, m->all_counts, m->copy_rows, m->quota);
    const int *first = p->first_copy + (size_t)m->moe_layer * n_experts;
    int32_t *quota = m->quota + (size_t)group_rank(m->parts.group) * (size_t)(first[n_experts] - first[0]);
    for (size_t i = 0; i < n; i++) {
        route *to = &m->routes[i];
        if (to->expert == GATE_NO_EXPERT)
            continue;
        int copy = first[to->expert];
        while (copy < first[to->expert + 1] - 1 && quota[copy - first[0]] == 0)
            copy++;
        quota[copy - first[0]]--;
        to->rank = (uint16_t)p->copy_ranks[copy];
    }
    return STATUS_OK;
}

static void pass_choose(void *arg, int thread, int n_threads)
{
    model *m = arg;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    for (int r = first; r < last; r++)
        choose_row(m, r, m->gate_scratch + (size_t)thread * 3 * (size_t)m->parts.config->n_experts);
}

/* The shared expert on own rows: y = sigmoid(gate x) * block(x), or block(x) where the family has no such gate. */
static void run_shared(model *m, const layer_weights *w)
{
    const model_config *c = m->parts.config;
    int n = m->batch->n_rows;
    experts_run_block(m->experts, &w->shared, m->rows, m->rows_stride, n, m->shared, (size_t)c->hidden);
    if (!w->shared_scale.data)
        return;
    projection gate = {&w->shared_scale, m->gate_logits, 1, NULL};
    project(m->parts.pool, m->parts.kernels, &gate, 1, m->rows, m->rows_stride, n);
    const float one = 1;
    for (int r = 0; r < n; r++) {
        float g = m->gate_logits[r], scale = 0;
        if (g != 0) { /* sigmoid(g) = silu(g) / g, by the kernels' own exponential so that all instruction sets agree */
            m->parts.kernels->swiglu(&g, &one, 1, &scale);
            scale /= g;
        } else {
            scale = 0.5f;
        }
        for (int i = 0; i < c->hidden; i++)
            m->shared[(size_t)r * (size_t)c->hidden + (size_t)i] *= scale;
    }
}

static void pass_combine(void *arg, int thread, int n_threads)
{
    model *m = arg;
    size_t hidden = (size_t)m->parts.config->hidden;
    int first, last;
    my_rows(m, thread, n_threads, &first, &last);
    exchange_combine(m->exchange, first, last, m->y, hidden);
    bool shared = m->parts.config->shared_inter > 0;
    for (size_t i = (size_t)first * hidden; i < (size_t)last * hidden; i++)
        m->h[i] += shared ? m->y[i] + m->shared[i] : m->y[i];
}

static void route_rows(model *m, const layer_weights *w)
{
    const model_config *c = m->parts.config;
    run_rows(m, pass_mlp_norm, (size_t)c->hidden);
    projection gate = {&w->router, m->gate_logits, (size_t)c->n_experts, NULL};
    project(m->parts.pool, m->parts.kernels, &gate, 1, m->rows, m->rows_stride, m->batch->n_rows);
    run_rows(m, pass_choose, (size_t)c->n_experts * 4);
}

static status moe(model *m)
{
    const layer_weights *w = &m->parts.weights->layers[m->layer];
    int own = group_rank(m->parts.group);
    double t0 = clock_seconds();
    m->rows = exchange_rows(m->exchange, &m->rows_stride);
    route_rows(m, w);
    if (m->parts.replicas == REPLICA_STEP && layer_copies(m->parts.plan, m->moe_layer) > m->parts.config->n_experts)
        TRY(split_rows(m)); /* all ranks, rows or no rows */
    double t1 = clock_seconds();
    TRY(exchange_send(m->exchange, m->batch->n_rows, m->routes, m->parts.combine == COMBINE_FIXED ? m->exponents : NULL));
    double t2 = clock_seconds();
    if (m->parts.config->shared_inter > 0)
        run_shared(m, w);
    TRY(experts_run_home(m->experts, w->experts, m->exchange, own));
    double t3 = clock_seconds();
    TRY(exchange_wait(m->exchange));
    double t4 = clock_seconds();
    TRY(experts_run_rest(m->experts, w->experts, m->exchange, own));
    double t5 = clock_seconds();
    TRY(exchange_return(m->exchange));
    double t6 = clock_seconds();
    TRY(exchange_wait_results(m->exchange));
    double t7 = clock_seconds();
    run_rows(m, pass_combine, (size_t)m->parts.config->hidden);
    m->times.attention_seconds += t1 - t0;
    m->times.expert_seconds += (t3 - t2) + (t5 - t4);
    m->times.exchange_seconds += (t2 - t1) + (t6 - t5) + (clock_seconds() - t7);
    int rows, touched;
    experts_last_load(m->experts, &rows, &touched);
    m->layer_load[m->moe_layer] += (unsigned long long)rows;
    m->times.expert_rows += (unsigned long long)rows;
    m->times.experts_touched += (unsigned long long)touched;
    m->times.layers++;
    return STATUS_OK;
}

static void dense(model *m)
{
    const model_config *c = m->parts.config;
    m->rows = m->x;
    m->rows_stride = m->x_stride;
    run_rows(m, pass_mlp_norm, (size_t)c->hidden);
    experts_run_block(m->experts, &m->parts.weights->layers[m->layer].dense, m->x, m->x_stride, m->batch->n_rows, m->y,
                      (size_t)c->hidden);
    run_rows(m, pass_residual, (size_t)c->hidden);
}

status model_forward(model *m, const batch *b)
{
    const model_config *c = m->parts.config;
    m->batch = b;
    for (int r = 0; r < b->n_rows; r++)
        m->bad_layer[r] = -1;
    plan_attention(m, b);
    run_rows(m, pass_embed, (size_t)c->hidden);
    m->moe_layer = 0;
    for (m->layer = 0; m->layer < c->n_layers; m->layer++) {
        double start = clock_seconds();
        attention(m);
        m->times.attention_seconds += clock_seconds() - start;
        if (c->moe_layer[m->layer]) {
            TRY(moe(m));
            m->moe_layer++;
        } else {
            start = clock_seconds();
            dense(m);
            m->times.expert_seconds += clock_seconds() - start;
        }
    }
    m->turn += (uint32_t)b->n_rows;
    return STATUS_OK;
}

const float *model_head(model *m, const int *rows, int n)
{
    const model_config *c = m->parts.config;
    double start = clock_seconds();
    for (int i = 0; i < n; i++)
        m->parts.kernels->rmsnorm(m->h + (size_t)rows[i] * (size_t)c->hidden, m->parts.weights->final_norm, c->hidden, c->rms_eps,
                                  m->head_x + (size_t)i * m->x_stride);
    projection head = {&m->parts.weights->head, m->logits, (size_t)c->vocab, NULL};
    project(m->parts.pool, m->parts.kernels, &head, 1, m->head_x, m->x_stride, n);
    m->times.head_seconds += clock_seconds() - start;
    return m->logits;
}
