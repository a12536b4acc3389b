/* format_flat.c - flat arrays of recorded routing, one folder per recording:
 *
 *   experts.u8 (or .u16)  [tokens][layers][k] chosen experts by descending weight, nothing around them; 255 (65535): none
 *   probs.f16 (or .f32)   the same shape: their weights; without the file every choice weighs 1/k
 *   index.csv             a row per generation: offset_tokens, n_tokens, category, repetition, prompt_tokens
 *
 * All tokens were generated; a generation is a sequence whose positions follow its prompt, its category is its domain (sorted by
 * name). Arrays are read row by row. */
#include "placement/planner/import.h"

#include "placement/planner/csv_file.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { OFFSET, TOKENS, CATEGORY, REPETITION, PROMPT, N_COLUMNS };
static const char *const columns[N_COLUMNS] = {"offset_tokens", "n_tokens", "category", "repetition", "prompt_tokens"};

typedef struct {
    int64_t offset, n_tokens, prompt_tokens;
    char *category; /* owned; NULL: the import names the domain */
    bool skipped;
    int domain;
} generation;

typedef struct {
    FILE *experts, *weights; /* weights NULL: none */
    int expert_bytes, weight_bytes;
    char *folder, *experts_path, *weights_path, *index_path;
    generation *list;
    size_t n, capacity;
    int64_t n_tokens; /* in the arrays */
    int64_t row;      /* choices per token: layers * k */
} flat_files;

static void clear(flat_files *f)
{
    if (f->experts)
        fclose(f->experts);
    if (f->weights)
        fclose(f->weights);
    for (size_t i = 0; i < f->n; i++)
        free(f->list[i].category);
    free(f->list);
    free(f->folder);
    free(f->experts_path);
    free(f->weights_path);
    free(f->index_path);
}

/* Opens <folder>/<name><suffix> with the first suffix that is there; *bytes: that suffix's place + 1 in bytes of the two given.
 */
static status open_array(const char *folder, const char *name, const char *const *suffixes, const int *bytes_of, char **path,
                         FILE **stream, int *bytes)
{
    for (int i = 0; i < 2 && !*stream; i++) {
        free(*path);
        if (asprintf(path, "%s/%s%s", folder, name, suffixes[i]) < 0) {
            *path = NULL;
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", folder);
        }
        *stream = fopen(*path, "re");
        *bytes = bytes_of[i];
        if (!*stream && errno != ENOENT)
            return status_fail(STATUS_IO, "%s: cannot be opened (%s)", *path, strerror(errno));
    }
    return STATUS_OK;
}

/* `path` is the folder, or the experts file in it. */
static status open_files(const char *path, const import_options *options, flat_files *f)
{
    static const char *const expert_suffixes[] = {".u8", ".u16"}, *const weight_suffixes[] = {".f16", ".f32"};
    static const int expert_bytes[] = {1, 2}, weight_bytes[] = {2, 4};
    struct stat info;
    if (stat(path, &info) != 0)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    f->folder = strdup(path);
    char *slash = f->folder ? strrchr(f->folder, '/') : NULL;
    if (f->folder && !S_ISDIR(info.st_mode)) {
        free(f->folder);
        f->folder = slash ? strndup(path, (size_t)(strrchr(path, '/') - path)) : strdup(".");
    }
    if (!f->folder)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
    TRY(open_array(f->folder, "experts", expert_suffixes, expert_bytes, &f->experts_path, &f->experts, &f->expert_bytes));
    if (!f->experts)
        return status_fail(STATUS_IO, "%s: neither experts.u8 nor experts.u16 is in it", f->folder);
    TRY(open_array(f->folder, "probs", weight_suffixes, weight_bytes, &f->weights_path, &f->weights, &f->weight_bytes));
    int n = options->index ? asprintf(&f->index_path, "%s", options->index) : asprintf(&f->index_path, "%s/index.csv", f->folder);
    return n >= 0 ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
}

static status add_generation(flat_files *f, const csv_file *csv, bool keep_repetition)
{
    generation g = {0};
    int64_t repetition;
    TRY(csv_int(csv, OFFSET, 0, INT64_C(1) << 48, &g.offset));
    TRY(csv_int(csv, TOKENS, 0, INT32_MAX, &g.n_tokens));
    TRY(csv_int(csv, REPETITION, 0, 1, &repetition));
    TRY(csv_int(csv, PROMPT, 0, INT32_MAX - 1, &g.prompt_tokens));
    g.skipped = (repetition && !keep_repetition) || g.n_tokens == 0;
    if (g.prompt_tokens + g.n_tokens > INT32_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: line %lld: positions beyond 2^31", f->index_path, csv_line(csv));
    if (f->n == f->capacity) {
        f->capacity = f->capacity ? 2 * f->capacity : 256;
        generation *list = reallocarray(f->list, f->capacity, sizeof *list);
        if (!list)
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for %zu generations", f->index_path, f->capacity);
        f->list = list;
    }
    g.category = strdup(csv_text(csv, CATEGORY));
    if (!g.category)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a name", f->index_path);
    if (g.offset + g.n_tokens > f->n_tokens)
        f->n_tokens = g.offset + g.n_tokens;
    f->list[f->n++] = g;
    return STATUS_OK;
}

static status read_index(flat_files *f, bool keep_repetition)
{
    csv_file *csv;
    TRY(csv_open(f->index_path, columns, N_COLUMNS, &csv));
    bool more = true;
    status st = STATUS_OK;
    while (st == STATUS_OK && (st = csv_next(csv, &more)) == STATUS_OK && more)
        st = add_generation(f, csv, keep_repetition);
    csv_close(csv);
    if (st == STATUS_OK && f->n_tokens == 0)
        st = status_fail(STATUS_BAD_INPUT, "%s: lists no tokens", f->index_path);
    return st;
}

/* The arrays' sizes say how many choices a token has; layers or k must be told. */
static status find_shape(flat_files *f, const import_options *o, routing_shape *shape)
{
    struct stat experts, weights;
    if (fstat(fileno(f->experts), &experts) != 0 || (f->weights && fstat(fileno(f->weights), &weights) != 0))
        return status_fail(STATUS_IO, "%s: cannot be read (%s)", f->folder, strerror(errno));
    int64_t choices = experts.st_size / f->expert_bytes;
    if (choices % f->n_tokens != 0 || choices == 0 || experts.st_size % f->expert_bytes != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: %lld choices cannot be shared among the %lld tokens of %s (cut short?)",
                           f->experts_path, (long long)choices, (long long)f->n_tokens, f->index_path);
    if (f->weights && weights.st_size != choices * f->weight_bytes)
        return status_fail(STATUS_BAD_INPUT, "%s: %lld bytes, but the choices need %lld (cut short?)", f->weights_path,
                           (long long)weights.st_size, (long long)choices * f->weight_bytes);
    f->row = choices / f->n_tokens;
    if (o->n_experts < 1)
        return import_ask(f->experts_path, "experts a layer has", "experts");
    if (o->n_layers < 1 && o->top_k < 1)
        return import_ask(f->experts_path, "layers it has", "layers");
    int64_t layers = o->n_layers > 0 ? o->n_layers : f->row / o->top_k;
    if (layers < 1 || f->row % layers != 0 || (o->top_k > 0 && f->row / layers != o->top_k))
        return status_fail(STATUS_BAD_INPUT, "%s: a token has %lld choices, which are not %lld layers of %lld", f->experts_path,
                           (long long)f->row, (long long)layers, (long long)(o->top_k > 0 ? o->top_k : f->row / layers));
    if (layers > 65535 || f->row / layers > o->n_experts)
        return status_fail(STATUS_BAD_INPUT, "%s: %lld layers of %lld choices of %d experts cannot be", f->experts_path,
                           (long long)layers, (long long)(f->row / layers), o->n_experts);
    shape->n_experts = o->n_experts;
    shape->n_layers = (int)layers;
    shape->top_k = (int)(f->row / layers);
    return STATUS_OK;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Names the domains, sorted, and numbers the generations' ones. names [n generations + 1]: borrowed from the list. */
static void find_domains(flat_files *f, const char *only, const char **names, int *n_domains)
{
    int n = 0, kept = 0;
    for (size_t i = 0; i < f->n; i++)
        if (!f->list[i].skipped)
            names[n++] = only ? only : f->list[i].category;
    qsort(names, (size_t)n, sizeof *names, compare_names);
    for (int i = 0; i < n; i++)
        if (i == 0 || strcmp(names[i], names[kept - 1]) != 0)
            names[kept++] = names[i];
    for (size_t i = 0; i < f->n; i++) {
        const char *name = only ? only : f->list[i].category;
        const char **found = bsearch(&name, names, (size_t)kept, sizeof *names, compare_names);
        f->list[i].domain = found ? (int)(found - names) : 0;
    }
    *n_domains = kept;
}

/* ---- rows ---- */

typedef struct {
    unsigned char *bytes;
    uint16_t *experts;
    float *weights;
} row_buffers;

static float half_to_float(uint16_t half)
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent == 0 ? ldexpf((float)fraction, -24)
                                  : ldexpf((float)(1024 + fraction), exponent - 25);
    return half & 0x8000 ? -value : value;
}

static status read_bytes(FILE *stream, const char *path, int64_t token, size_t n, unsigned char *to)
{
    if (fread(to, 1, n, stream) == n)
        return STATUS_OK;
    return status_fail(STATUS_IO, "%s: token %lld cannot be read%s", path, (long long)token, feof(stream) ? " (cut short?)" : "");
}

static status read_row(flat_files *f, const routing_shape *shape, int64_t token, row_buffers *b)
{
    size_t n = (size_t)f->row;
    TRY(read_bytes(f->experts, f->experts_path, token, n * (size_t)f->expert_bytes, b->bytes));
    for (size_t i = 0; i < n; i++) {
        uint16_t wide;
        memcpy(&wide, b->bytes + 2 * i * (f->expert_bytes == 2), sizeof wide);
        unsigned expert = f->expert_bytes == 2 ? wide : b->bytes[i] == 255 ? ROUTING_NO_EXPERT : b->bytes[i];
        if (expert >= (unsigned)shape->n_experts && expert != ROUTING_NO_EXPERT)
            return status_fail(STATUS_BAD_INPUT, "%s: token %lld: layer %zu: expert %u is outside 0 to %d", f->experts_path,
                               (long long)token, i / (size_t)shape->top_k, expert, shape->n_experts - 1);
        b->experts[i] = (uint16_t)expert;
        b->weights[i] = expert == ROUTING_NO_EXPERT ? 0 : 1 / (float)shape->top_k;
    }
    if (!f->weights)
        return STATUS_OK;
    TRY(read_bytes(f->weights, f->weights_path, token, n * (size_t)f->weight_bytes, b->bytes));
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, b->bytes + (size_t)f->weight_bytes * i, sizeof half);
        memcpy(&b->weights[i], b->bytes + (f->weight_bytes == 4 ? 4 * i : 0), sizeof(float));
        if (f->weight_bytes == 2)
            b->weights[i] = half_to_float(half);
        if (!(b->weights[i] >= 0) || isinf(b->weights[i]))
            return status_fail(STATUS_BAD_INPUT, "%s: token %lld: layer %zu: weight %g is not a number from 0 up",
                               f->weights_path, (long long)token, i / (size_t)shape->top_k, (double)b->weights[i]);
    }
    return STATUS_OK;
}

static status write_generation(flat_files *f, const routing_shape *shape, const generation *g, int sequence, int phase,
                               row_buffers *b, routing_trace_writer *writer)
{
    off_t row = (off_t)f->row;
    if (fseeko(f->experts, (off_t)g->offset * row * f->expert_bytes, SEEK_SET) != 0 ||
        (f->weights && fseeko(f->weights, (off_t)g->offset * row * f->weight_bytes, SEEK_SET) != 0))
        return status_fail(STATUS_IO, "%s: token %lld cannot be read (%s)", f->folder, (long long)g->offset, strerror(errno));
    for (int64_t t = 0; t < g->n_tokens; t++) {
        TRY(read_row(f, shape, g->offset + t, b));
        const routing_row out = {.experts = b->experts,
                                 .weights = b->weights,
                                 .sequence = sequence,
                                 .position = (int)(g->prompt_tokens + t),
                                 .phase = phase,
                                 .domain = g->domain};
        TRY(routing_trace_writer_add(writer, &out));
    }
    return STATUS_OK;
}

static status write_all(flat_files *f, const routing_shape *shape, int phase, routing_trace_writer *writer)
{
    size_t n = (size_t)f->row;
    row_buffers b = {malloc(4 * n + 2), malloc(n * sizeof *b.experts + 1), malloc(n * sizeof *b.weights + 1)};
    status st =
        b.bytes && b.experts && b.weights ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for a row", f->folder);
    int sequence = 0;
    for (size_t i = 0; i < f->n && st == STATUS_OK; i++)
        if (!f->list[i].skipped)
            st = write_generation(f, shape, &f->list[i], sequence++, phase, &b, writer);
    free(b.bytes);
    free(b.experts);
    free(b.weights);
    return st == STATUS_OK ? routing_trace_writer_finish(writer) : st;
}

static status write_trace(flat_files *f, const import_options *o, const char *out_path)
{
    routing_shape shape = {.model = o->model ? o->model : ""};
    TRY(find_shape(f, o, &shape));
    int *layers = NULL;
    const char **names = calloc(f->n + 1, sizeof *names);
    routing_trace_writer *writer = NULL;
    status st = names ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for its domains", f->folder);
    if (st == STATUS_OK)
        st = import_layer_numbers(f->experts_path, o, shape.n_layers, 0, &layers);
    if (st != STATUS_OK)
        goto out;
    find_domains(f, o->domain, names, &shape.n_domains);
    shape.layer_numbers = layers;
    shape.domains = names;
    if (shape.n_domains == 0) {
        st = status_fail(STATUS_BAD_INPUT, "%s: every generation is marked as repetition", f->index_path);
        goto out;
    }
    TRY_GOTO(routing_trace_writer_create(out_path, &shape, &writer), out);
    st = write_all(f, &shape, import_phase(o, PHASE_DECODE), writer);
out:
    routing_trace_writer_destroy(writer);
    free(layers);
    free(names);
    return st;
}

static status import_flat(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                          format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "flat: one folder at a time");
    flat_files f = {0};
    status st = open_files(paths[0], options, &f);
    if (st == STATUS_OK)
        st = read_index(&f, options->keep_repetition);
    if (st == STATUS_OK)
        st = write_trace(&f, options, out_path);
    clear(&f);
    *made = FORMAT_TRACE;
    return st;
}

const file_format format_flat = {"flat", "folder of experts.u8, probs.f16 and index.csv, a row of choices per token: a trace",
                                 import_flat, NULL, NULL};
