/* routing_trace.c - writer and reader of routing traces.
 *
 * A safetensors file wants whole columns and its header wants their length, but rows come one by one and nobody knows how many.
 * So rows are spooled as records into an unnamed file and taken apart into columns at the end, a block at a time. */
#include "placement/routing_trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_BYTES  ((size_t)1 << 20)
#define NO_EXPERT_U8 0xffu

/* A trace has the first N_COLUMNS; one with owners has all. */
enum { EXPERTS, WEIGHTS, SEQUENCE, POSITION, PHASE, DOMAIN, N_COLUMNS, OWNER = N_COLUMNS, STEP, ALL_COLUMNS };
static const char *const column_names[ALL_COLUMNS] = {"experts", "weights", "sequence", "position",
                                                      "phase",   "domain",  "owner",    "step"};

/* ---- writing ---- */

struct routing_trace_writer {
    routing_shape shape; /* owned */
    char *path;
    FILE *spool; /* unnamed */
    long long n_rows;
    int n_columns;
    tensor_dtype dtypes[ALL_COLUMNS];
    size_t bytes[ALL_COLUMNS], at[ALL_COLUMNS]; /* of a column in a record */
    size_t record_bytes, block_rows;
    unsigned char *record, *block, *column; /* one record; a block of them; one column of a block */
};

static size_t n_choices(const routing_shape *shape)
{
    return (size_t)shape->n_layers * (size_t)shape->top_k;
}

static void lay_out(routing_trace_writer *w)
{
    const tensor_dtype dtypes[ALL_COLUMNS] = {w->shape.n_experts <= 255 ? DTYPE_U8 : DTYPE_U16,
                                              DTYPE_F32,
                                              DTYPE_I32,
                                              DTYPE_I32,
                                              DTYPE_U8,
                                              DTYPE_U16,
                                              DTYPE_I32,
                                              DTYPE_I32};
    for (int c = 0; c < w->n_columns; c++) {
        w->dtypes[c] = dtypes[c];
        w->bytes[c] = tensor_dtype_size(dtypes[c]) * (c <= WEIGHTS ? n_choices(&w->shape) : 1);
        w->at[c] = w->record_bytes;
        w->record_bytes += w->bytes[c];
    }
    w->block_rows = BLOCK_BYTES / w->record_bytes + 1;
}

/* A file beside the trace (so it may be as large as the trace may), whose name is gone before anything is in it. */
static status open_spool(routing_trace_writer *w)
{
    char *name;
    if (asprintf(&name, "%s.rows-XXXXXX", w->path) < 0)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", w->path);
    int fd = mkostemp(name, O_CLOEXEC);
    if (fd >= 0)
        unlink(name);
    free(name);
    w->spool = fd >= 0 ? fdopen(fd, "w+b") : NULL;
    if (w->spool)
        return STATUS_OK;
    if (fd >= 0)
        close(fd);
    return status_fail(STATUS_IO, "%s: cannot be written (%s)", w->path, strerror(errno));
}

static status create_writer(const char *path, const routing_shape *shape, int n_columns, routing_trace_writer **out)
{
    TRY(routing_shape_check(path, shape));
    if (shape->top_k < 1)
        return status_fail(STATUS_BAD_INPUT, "%s: a trace of 0 choices per token", path);
    routing_trace_writer *w = calloc(1, sizeof *w);
    if (!w)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to write it", path);
    status st;
    TRY_GOTO(routing_shape_copy(shape, &w->shape), fail);
    w->n_columns = n_columns;
    lay_out(w);
    w->path = strdup(path);
    w->record = malloc(w->record_bytes);
    w->block = malloc(w->block_rows * w->record_bytes);
    w->column = malloc(w->block_rows * w->record_bytes);
    if (!w->path || !w->record || !w->block || !w->column) {
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory for rows of %zu bytes", path, w->record_bytes);
        goto fail;
    }
    TRY_GOTO(open_spool(w), fail);
    *out = w;
    return STATUS_OK;
fail:
    routing_trace_writer_destroy(w);
    return st;
}

status routing_trace_writer_create(const char *path, const routing_shape *shape, routing_trace_writer **out)
{
    return create_writer(path, shape, N_COLUMNS, out);
}

status routing_trace_writer_create_owned(const char *path, const routing_shape *shape, routing_trace_writer **out)
{
    return create_writer(path, shape, ALL_COLUMNS, out);
}

void routing_trace_writer_destroy(routing_trace_writer *w)
{
    if (!w)
        return;
    if (w->spool)
        fclose(w->spool);
    routing_shape_clear(&w->shape);
    free(w->path);
    free(w->record);
    free(w->block);
    free(w->column);
    free(w);
}

static status check_row(const routing_trace_writer *w, const routing_row *row)
{
    if (row->phase < 0 || row->phase >= N_PHASES || row->domain < 0 || row->domain >= w->shape.n_domains)
        return status_fail(STATUS_BAD_INPUT, "%s: row %lld: phase %d, domain %d are outside 0 to 1 and 0 to %d", w->path,
                           w->n_rows, row->phase, row->domain, w->shape.n_domains - 1);
    for (size_t i = 0; i < n_choices(&w->shape); i++)
        if (row->experts[i] >= w->shape.n_experts && row->experts[i] != ROUTING_NO_EXPERT)
            return status_fail(STATUS_BAD_INPUT, "%s: row %lld: layer %d: expert %d is outside 0 to %d", w->path, w->n_rows,
                               w->shape.layer_numbers[i / (size_t)w->shape.top_k], row->experts[i], w->shape.n_experts - 1);
    return STATUS_OK;
}

status routing_trace_writer_add(routing_trace_writer *w, const routing_row *row)
{
    TRY(check_row(w, row));
    if (w->dtypes[EXPERTS] == DTYPE_U8)
        for (size_t i = 0; i < w->bytes[EXPERTS]; i++) /* 65535 becomes 255 by itself */
            w->record[w->at[EXPERTS] + i] = (unsigned char)row->experts[i];
    else
        memcpy(w->record + w->at[EXPERTS], row->experts, w->bytes[EXPERTS]);
    const int32_t sequence = row->sequence, position = row->position, owner = row->owner, step = row->step;
    const uint16_t domain = (uint16_t)row->domain;
    memcpy(w->record + w->at[WEIGHTS], row->weights, w->bytes[WEIGHTS]);
    memcpy(w->record + w->at[SEQUENCE], &sequence, sizeof sequence);
    memcpy(w->record + w->at[POSITION], &position, sizeof position);
    w->record[w->at[PHASE]] = (unsigned char)row->phase;
    memcpy(w->record + w->at[DOMAIN], &domain, sizeof domain);
    if (w->n_columns == ALL_COLUMNS) {
        memcpy(w->record + w->at[OWNER], &owner, sizeof owner);
        memcpy(w->record + w->at[STEP], &step, sizeof step);
    }
    if (fwrite(w->record, w->record_bytes, 1, w->spool) != 1)
        return status_fail(STATUS_IO, "%s: row %lld cannot be written (%s)", w->path, w->n_rows, strerror(errno));
    w->n_rows++;
    return STATUS_OK;
}

long long routing_trace_writer_rows(const routing_trace_writer *w)
{
    return w->n_rows;
}

static status declare_columns(const routing_trace_writer *w, safetensors_writer *to, int *index)
{
    TRY(routing_shape_write(&w->shape, to));
    for (int c = 0; c < w->n_columns; c++) {
        const int64_t shape[3] = {w->n_rows, w->shape.n_layers, w->shape.top_k};
        TRY(safetensors_writer_declare(to, column_names[c], w->dtypes[c], c <= WEIGHTS ? 3 : 1, shape, &index[c]));
    }
    return safetensors_writer_begin(to);
}

/* Rows [first, first + n), which lie in w->block, into their columns. */
static status put_block(const routing_trace_writer *w, safetensors_writer *to, const int *index, size_t first, size_t n)
{
    for (int c = 0; c < w->n_columns; c++) {
        for (size_t r = 0; r < n; r++)
            memcpy(w->column + r * w->bytes[c], w->block + r * w->record_bytes + w->at[c], w->bytes[c]);
        TRY(safetensors_writer_put(to, index[c], first * w->bytes[c], w->column, n * w->bytes[c]));
    }
    return STATUS_OK;
}

static status write_columns(routing_trace_writer *w, safetensors_writer *to)
{
    int index[ALL_COLUMNS];
    TRY(declare_columns(w, to, index));
    if (fflush(w->spool) != 0 || fseeko(w->spool, 0, SEEK_SET) != 0)
        return status_fail(STATUS_IO, "%s: its rows cannot be read back (%s)", w->path, strerror(errno));
    for (size_t first = 0, n; first < (size_t)w->n_rows; first += n) {
        n = (size_t)w->n_rows - first < w->block_rows ? (size_t)w->n_rows - first : w->block_rows;
        if (fread(w->block, w->record_bytes, n, w->spool) != n)
            return status_fail(STATUS_IO, "%s: its rows cannot be read back (%s)", w->path, strerror(errno));
        TRY(put_block(w, to, index, first, n));
    }
    return safetensors_writer_finish(to);
}

status routing_trace_writer_finish(routing_trace_writer *w)
{
    safetensors_writer *to;
    TRY(safetensors_writer_create(w->path, &to));
    status st = write_columns(w, to);
    safetensors_writer_destroy(to);
    return st;
}

/* ---- reading ---- */

struct routing_trace {
    safetensors *file;   /* owned */
    routing_shape shape; /* owned */
    const tensor_view *columns[N_COLUMNS];
    int64_t n_tokens;
};

static uint16_t load_u16(const void *data, size_t i)
{
    uint16_t value;
    memcpy(&value, (const unsigned char *)data + i * sizeof value, sizeof value);
    return value;
}

static int32_t load_i32(const void *data, size_t i)
{
    int32_t value;
    memcpy(&value, (const unsigned char *)data + i * sizeof value, sizeof value);
    return value;
}

/* Exact; the exponent is rebased by a multiplication, which normalises subnormals on the way. */
static float half_to_float(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fffu) << 13;
    float value;
    if ((half & 0x7c00u) == 0x7c00u)
        bits |= 0x7f800000u;
    memcpy(&value, &bits, sizeof value);
    if ((half & 0x7c00u) != 0x7c00u)
        value *= 0x1p112f;
    return half & 0x8000u ? -value : value;
}

static uint16_t expert_at(const routing_trace *t, size_t i)
{
    const tensor_view *view = t->columns[EXPERTS];
    if (view->dtype == DTYPE_U16)
        return load_u16(view->data, i);
    unsigned expert = ((const unsigned char *)view->data)[i];
    return (uint16_t)(expert == NO_EXPERT_U8 ? ROUTING_NO_EXPERT : expert);
}

static bool dtype_fits(const routing_trace *t, int column, tensor_dtype dtype)
{
    switch (column) {
    case EXPERTS:
        return dtype == DTYPE_U16 || (dtype == DTYPE_U8 && t->shape.n_experts <= 255);
    case WEIGHTS:
        return dtype == DTYPE_F32 || dtype == DTYPE_F16;
    case PHASE:
        return dtype == DTYPE_U8;
    case DOMAIN:
        return dtype == DTYPE_U16;
    default:
        return dtype == DTYPE_I32;
    }
}

static status find_columns(routing_trace *t)
{
    const char *path = safetensors_path(t->file);
    for (int c = 0; c < N_COLUMNS; c++) {
        const tensor_view *view = t->columns[c] = safetensors_find(t->file, column_names[c]);
        if (!view)
            return status_fail(STATUS_BAD_INPUT, "%s: not a routing trace: tensor %s is missing", path, column_names[c]);
        if (c == EXPERTS && view->n_dims == 3 && view->shape[2] >= 1 && view->shape[2] <= t->shape.n_experts) {
            if (t->shape.top_k > 0 && t->shape.top_k != view->shape[2])
                return status_fail(STATUS_BAD_INPUT, "%s: metadata top_k is %d, but tensor experts has %lld choices per layer",
                                   path, t->shape.top_k, (long long)view->shape[2]);
            t->n_tokens = view->shape[0];
            t->shape.top_k = (int)view->shape[2];
        }
        const int64_t want[3] = {t->n_tokens, t->shape.n_layers, t->shape.top_k};
        bool fits = view->n_dims == (c <= WEIGHTS ? 3 : 1) && t->shape.top_k > 0;
        for (int d = 0; fits && d < view->n_dims; d++)
            fits = view->shape[d] == want[d];
        if (!fits)
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %s is not [tokens]%s as the metadata and the other tensors say",
                               path, column_names[c], c <= WEIGHTS ? " [layers] [k]" : "");
        if (!dtype_fits(t, c, view->dtype))
            return status_fail(STATUS_UNSUPPORTED, "%s: tensor %s is of type %s, which a trace of %d experts cannot have there",
                               path, column_names[c], tensor_dtype_name(view->dtype), t->shape.n_experts);
    }
    return STATUS_OK;
}

static status check_values(const routing_trace *t)
{
    const char *path = safetensors_path(t->file);
    size_t n = n_choices(&t->shape);
    for (size_t i = 0; i < (size_t)t->n_tokens * n; i++) {
        unsigned expert = expert_at(t, i);
        if (expert >= (unsigned)t->shape.n_experts && expert != ROUTING_NO_EXPERT)
            return status_fail(STATUS_BAD_INPUT, "%s: token %zu: layer %d: expert %u is outside 0 to %d", path, i / n,
                               t->shape.layer_numbers[i % n / (size_t)t->shape.top_k], expert, t->shape.n_experts - 1);
    }
    for (size_t i = 0; i < (size_t)t->n_tokens; i++) {
        unsigned phase = ((const unsigned char *)t->columns[PHASE]->data)[i], domain = load_u16(t->columns[DOMAIN]->data, i);
        if (phase >= N_PHASES || domain >= (unsigned)t->shape.n_domains)
            return status_fail(STATUS_BAD_INPUT, "%s: token %zu: phase %u, domain %u are outside 0 to 1 and 0 to %d", path, i,
                               phase, domain, t->shape.n_domains - 1);
    }
    return STATUS_OK;
}

status routing_trace_from(safetensors *file, routing_trace **out)
{
    routing_trace *t = calloc(1, sizeof *t);
    if (!t)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", safetensors_path(file));
    t->file = file;
    status st;
    TRY_GOTO(routing_shape_read(file, &t->shape), fail);
    TRY_GOTO(find_columns(t), fail);
    TRY_GOTO(check_values(t), fail);
    *out = t;
    return STATUS_OK;
fail:
    routing_shape_clear(&t->shape);
    free(t);
    return st;
}

status routing_trace_open(const char *path, routing_trace **out)
{
    safetensors *file;
    TRY(safetensors_open(path, &file));
    status st = routing_trace_from(file, out);
    if (st != STATUS_OK)
        safetensors_close(file);
    return st;
}

void routing_trace_close(routing_trace *t)
{
    if (!t)
        return;
    safetensors_close(t->file);
    routing_shape_clear(&t->shape);
    free(t);
}

const routing_shape *routing_trace_shape(const routing_trace *t)
{
    return &t->shape;
}

const char *routing_trace_path(const routing_trace *t)
{
    return safetensors_path(t->file);
}

int64_t routing_trace_n_tokens(const routing_trace *t)
{
    return t->n_tokens;
}

routing_row routing_trace_row(const routing_trace *t, int64_t token, uint16_t *experts, float *weights)
{
    size_t at = (size_t)token, n = n_choices(&t->shape);
    const tensor_view *w = t->columns[WEIGHTS];
    for (size_t i = 0; i < n; i++)
        experts[i] = expert_at(t, at * n + i);
    if (weights && w->dtype == DTYPE_F32)
        memcpy(weights, (const unsigned char *)w->data + at * n * sizeof *weights, n * sizeof *weights);
    for (size_t i = 0; weights && w->dtype == DTYPE_F16 && i < n; i++)
        weights[i] = half_to_float(load_u16(w->data, at * n + i));
    return (routing_row){.experts = experts,
                         .weights = weights,
                         .sequence = load_i32(t->columns[SEQUENCE]->data, at),
                         .position = load_i32(t->columns[POSITION]->data, at),
                         .phase = ((const unsigned char *)t->columns[PHASE]->data)[at],
                         .domain = load_u16(t->columns[DOMAIN]->data, at)};
}

status routing_trace_tensor(const routing_trace *t, const char *name, const tensor_view **out)
{
    const tensor_view *view = safetensors_find(t->file, name);
    if (!view)
        return status_fail(STATUS_BAD_INPUT, "%s: the trace has no tensor %s", safetensors_path(t->file), name);
    if (view->n_dims < 2 || view->shape[0] != t->n_tokens || view->shape[1] != t->shape.n_layers)
        return status_fail(STATUS_BAD_INPUT, "%s: tensor %s is not [tokens] [layers] ..", safetensors_path(t->file), name);
    *out = view;
    return STATUS_OK;
}

const tensor_view *routing_trace_find(const routing_trace *t, const char *name)
{
    return safetensors_find(t->file, name);
}
