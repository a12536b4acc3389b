/* format_sglang_records.c - SGLang's per_token recordings.
 *
 * JSON: {"records": [record, ...], "last_physical_to_logical_map": [layers][physical]}; .npz: the arrays of one record, and the
 * map. Several files follow each other. A record is one forward pass of one rank:
 *
 *   topk_ids_of_layer  [layers][tokens][8]  physical experts (logical ones where the file has no map); -1: none. Columns that are
 *                                           -1 throughout are cut off, and so are layers (those without experts)
 *   positions          [tokens]             input_ids [tokens] too, of which only the number is looked at
 *   extend_seq_lens    [sequences] or null  how many of the tokens belong to each sequence of a prefill
 *   forward_mode       1 extend, 2 decode; may be missing
 *
 * The recorder keeps no request ids, so sequences are put together from positions: a run of tokens that begins at position p goes
 * on with the sequence that has waited longest at p, and p = 0 or none waiting begins a new one. Two sequences that stand at the
 * same position may so be exchanged; which experts tokens chose, and after which, stays as recorded within each run.
 *
 * Files are read twice: what there is to write is known only at the end. */
#include "placement/planner/format_sglang_records.h"

#include "placement/planner/import.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MODE_EXTEND = 1, MODE_DECODE = 2, MAX_POSITION = 1 << 24 };

/* ---- one record ---- */

typedef struct {
    char where[1024];
    number_array topk, positions, lengths; /* lengths empty: not given */
    int mode;                              /* 0: not given */
    int64_t n_tokens;
} record;

static void clear_record(record *r)
{
    number_array_clear(&r->topk);
    number_array_clear(&r->positions);
    number_array_clear(&r->lengths);
}

static status get_array(const array_file *f, const cJSON *item, const record *r, const char *name, int n_dims, number_array *out)
{
    if (!item)
        return array_file_get(f, name, n_dims, n_dims, out);
    char where[1200];
    number_array a;
    const cJSON *lists = json_find(item, name);
    if (!lists)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", r->where, name);
    snprintf(where, sizeof where, "%s: %s", r->where, name);
    TRY(number_array_from_json(where, lists, &a));
    if (a.n_dims == n_dims || a.n == 0) {
        *out = a;
        return STATUS_OK;
    }
    int found = a.n_dims;
    number_array_clear(&a);
    return status_fail(STATUS_BAD_INPUT, "%s has %d dimensions, not %d", where, found, n_dims);
}

static bool has_array(const array_file *f, const cJSON *item, const char *name)
{
    return item ? json_find(item, name) != NULL : array_file_has(f, name);
}

static status read_mode(const array_file *f, const cJSON *item, record *r)
{
    int64_t mode = 0;
    if (item)
        TRY(json_get_int_or(item, r->where, "forward_mode", 0, 1000, 0, &mode));
    else if (array_file_has(f, "forward_mode")) {
        number_array a;
        TRY(array_file_get(f, "forward_mode", 0, 1, &a));
        status st = a.n == 1 ? number_array_int(&a, r->where, 0, 0, 1000, &mode)
                             : status_fail(STATUS_BAD_INPUT, "%s: forward_mode is not one number", r->where);
        number_array_clear(&a);
        TRY(st);
    }
    r->mode = (int)mode;
    return STATUS_OK;
}

static status check_lengths(const record *r)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < r->lengths.n; i++) {
        int64_t n;
        TRY(number_array_int(&r->lengths, r->where, i, 0, r->n_tokens, &n));
        sum += n;
    }
    if (r->lengths.n > 0 && sum != r->n_tokens)
        return status_fail(STATUS_BAD_INPUT, "%s: extend_seq_lens add up to %lld, but there are %lld tokens", r->where,
                           (long long)sum, (long long)r->n_tokens);
    return STATUS_OK;
}

static status read_arrays(const array_file *f, const cJSON *item, record *r)
{
    number_array ids = {0};
    TRY(get_array(f, item, r, "topk_ids_of_layer", 3, &r->topk));
    TRY(get_array(f, item, r, "positions", 1, &r->positions));
    if (has_array(f, item, "extend_seq_lens"))
        TRY(get_array(f, item, r, "extend_seq_lens", 1, &r->lengths));
    TRY(read_mode(f, item, r));
    r->n_tokens = r->positions.n;
    if (r->n_tokens > 0 && (r->topk.n_dims != 3 || r->topk.shape[1] != r->n_tokens))
        return status_fail(STATUS_BAD_INPUT, "%s: topk_ids_of_layer is not [layers][%lld tokens][8], which positions has",
                           r->where, (long long)r->n_tokens);
    if (has_array(f, item, "input_ids")) {
        TRY(get_array(f, item, r, "input_ids", 1, &ids));
        int64_t n = ids.n;
        number_array_clear(&ids);
        if (n != r->n_tokens)
            return status_fail(STATUS_BAD_INPUT, "%s: %lld input_ids, but %lld positions", r->where, (long long)n,
                               (long long)r->n_tokens);
    }
    return check_lengths(r);
}

/* ---- all records of all files ---- */

typedef status visit_record(const record *r, void *context);

static status visit_one(const array_file *f, const cJSON *item, int number, visit_record *visit, void *context)
{
    record r = {0};
    if (item)
        snprintf(r.where, sizeof r.where, "%.900s: record %d", array_file_path(f), number);
    else
        snprintf(r.where, sizeof r.where, "%.900s", array_file_path(f));
    status st = read_arrays(f, item, &r);
    if (st == STATUS_OK && r.n_tokens > 0)
        st = visit(&r, context);
    clear_record(&r);
    return st;
}

static status visit_file(const array_file *f, visit_record *visit, void *context)
{
    const cJSON *tree = array_file_json(f), *records;
    if (!tree || !json_find(tree, "records"))
        return visit_one(f, tree, 0, visit, context);
    TRY(json_get_array(tree, array_file_path(f), "records", &records));
    int number = 0;
    status st = STATUS_OK;
    for (const cJSON *item = records->child; item && st == STATUS_OK; item = item->next, number++)
        st = cJSON_IsObject(item) ? visit_one(f, item, number, visit, context)
                                  : status_fail(STATUS_BAD_INPUT, "%s: record %d is not an object", array_file_path(f), number);
    return st;
}

typedef struct {
    const import_options *options;
    int n_rows, width; /* layers and columns of topk_ids_of_layer */
    int n_layers, top_k, n_experts;
    bool *row_used;
    int *rows;        /* [n_layers] */
    int64_t largest;  /* id seen */
    int end;          /* one behind the last position seen */
    number_array map; /* [n_rows][physical]; empty: ids are logical */
    routing_trace_writer *writer;
    /* sequences put together */
    int *next_in_line; /* [n_sequences] who waits behind, -1: nobody */
    int n_sequences, room;
    int *first_waiting, *last_waiting; /* [end + 1] by position */
    int (*arrivals)[2];                /* sequence, position: who waits where after this record */
    size_t n_arrivals, arrivals_room;
    uint16_t *experts;
    float *weights;
} importer;

static status visit_files(const char *const *paths, int n_paths, visit_record *visit, importer *im)
{
    status st = STATUS_OK;
    for (int i = 0; i < n_paths && st == STATUS_OK; i++) {
        array_file *f;
        TRY(array_file_open(paths[i], &f));
        number_array_clear(&im->map);
        if (array_file_has(f, "last_physical_to_logical_map"))
            st = array_file_get(f, "last_physical_to_logical_map", 2, 2, &im->map);
        if (st == STATUS_OK)
            st = visit_file(f, visit, im);
        array_file_close(f);
    }
    return st;
}

/* The logical expert of an id as recorded; -1: none. */
static status logical_expert(const importer *im, const record *r, int64_t at, int row, int64_t *out)
{
    int64_t last = im->map.n ? im->map.shape[1] - 1 : 65534;
    TRY(number_array_int(&r->topk, r->where, at, -1, last, out));
    if (*out < 0 || !im->map.n)
        return STATUS_OK;
    char where[1200];
    snprintf(where, sizeof where, "%.900s: last_physical_to_logical_map", r->where);
    return number_array_int(&im->map, where, row * im->map.shape[1] + *out, 0, 65534, out);
}

static status position_at(const record *r, int64_t token, int *out)
{
    char where[1200];
    int64_t position;
    snprintf(where, sizeof where, "%s: positions", r->where);
    TRY(number_array_int(&r->positions, where, token, 0, MAX_POSITION - 1, &position));
    *out = (int)position;
    return STATUS_OK;
}

/* First reading: which layers and columns are used, the largest id. */
static status measure(const record *r, void *context)
{
    importer *im = context;
    int64_t rows = r->topk.shape[0], width = r->topk.shape[2];
    if (rows < 1 || rows > 65535 || width < 1 || width > 65535)
        return status_fail(STATUS_BAD_INPUT, "%s: topk_ids_of_layer of %lld layers and %lld choices cannot be", r->where,
                           (long long)rows, (long long)width);
    if (im->n_rows == 0) {
        im->n_rows = (int)rows;
        im->width = (int)width;
        im->row_used = calloc((size_t)rows, sizeof *im->row_used);
        if (!im->row_used)
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for %lld layers", r->where, (long long)rows);
    }
    if (rows != im->n_rows || width != im->width || (im->map.n && im->map.shape[0] != rows))
        return status_fail(STATUS_BAD_INPUT, "%s: %lld layers of %lld choices, but before there were %d of %d%s", r->where,
                           (long long)rows, (long long)width, im->n_rows, im->width,
                           im->map.n ? " (or the map has another number of layers)" : "");
    for (int64_t at = 0; at < r->topk.n; at++) {
        int row = (int)(at / (r->n_tokens * width)), column = (int)(at % width);
        int64_t expert;
        TRY(logical_expert(im, r, at, row, &expert));
        if (expert < 0)
            continue;
        im->row_used[row] = true;
        im->top_k = column + 1 > im->top_k ? column + 1 : im->top_k;
        im->largest = expert > im->largest ? expert : im->largest;
    }
    for (int64_t t = 0; t < r->n_tokens; t++) {
        int position;
        TRY(position_at(r, t, &position));
        im->end = position + 1 > im->end ? position + 1 : im->end;
    }
    return STATUS_OK;
}

/* ---- sequences ---- */

static status new_sequence(importer *im, int *out)
{
    if (im->n_sequences == im->room) {
        int room = im->room ? 2 * im->room : 1024;
        int *line = reallocarray(im->next_in_line, (size_t)room, sizeof *line);
        if (!line)
            return status_fail(STATUS_NO_MEMORY, "no memory for %d sequences", room);
        im->next_in_line = line;
        im->room = room;
    }
    *out = im->n_sequences++;
    return STATUS_OK;
}

/* Who goes on at this position. */
static status take_sequence(importer *im, int position, int *out)
{
    int waiting = position > 0 ? im->first_waiting[position] : -1;
    if (waiting < 0)
        return new_sequence(im, out);
    im->first_waiting[position] = im->next_in_line[waiting];
    *out = waiting;
    return STATUS_OK;
}

/* It waits from the next record on: within one, nobody comes twice. */
static status arrive(importer *im, int sequence, int position)
{
    if (im->n_arrivals == im->arrivals_room) {
        size_t room = im->arrivals_room ? 2 * im->arrivals_room : 1024;
        int(*arrivals)[2] = reallocarray(im->arrivals, room, sizeof *arrivals);
        if (!arrivals)
            return status_fail(STATUS_NO_MEMORY, "no memory for %zu sequences", room);
        im->arrivals = arrivals;
        im->arrivals_room = room;
    }
    im->arrivals[im->n_arrivals][0] = sequence;
    im->arrivals[im->n_arrivals++][1] = position;
    return STATUS_OK;
}

static void queue_arrivals(importer *im)
{
    for (size_t i = 0; i < im->n_arrivals; i++) {
        int sequence = im->arrivals[i][0], position = im->arrivals[i][1];
        im->next_in_line[sequence] = -1;
        if (im->first_waiting[position] < 0)
            im->first_waiting[position] = sequence;
        else
            im->next_in_line[im->last_waiting[position]] = sequence;
        im->last_waiting[position] = sequence;
    }
    im->n_arrivals = 0;
}

/* Tokens from `first` that are one sequence's: as extend_seq_lens says, one by one in decode, else while positions rise by one.
 * Within a length given, positions must rise. */
static status measure_run(const record *r, int64_t first, int64_t *which_length, int64_t *n)
{
    int begin, position;
    int64_t given = 0;
    while (given == 0 && *which_length < r->lengths.n)
        TRY(number_array_int(&r->lengths, r->where, (*which_length)++, 0, r->n_tokens, &given));
    TRY(position_at(r, first, &begin));
    int64_t most = given ? given : r->mode == MODE_DECODE ? 1 : r->n_tokens - first;
    for (*n = 1; *n < most; (*n)++) {
        TRY(position_at(r, first + *n, &position));
        if (position == begin + *n)
            continue;
        if (given)
            return status_fail(STATUS_BAD_INPUT, "%s: position %d does not follow in a sequence that began at %d", r->where,
                               position, begin);
        break;
    }
    return STATUS_OK;
}

/* ---- second reading ---- */

static status write_token(importer *im, const record *r, int64_t token, int sequence, int position, int phase)
{
    for (int l = 0; l < im->n_layers; l++)
        for (int k = 0; k < im->top_k; k++) {
            int64_t at = (im->rows[l] * r->n_tokens + token) * im->width + k, expert;
            TRY(logical_expert(im, r, at, im->rows[l], &expert));
            if (expert >= im->n_experts)
                return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %lld is outside 0 to %d", r->where, im->rows[l],
                                   (long long)expert, im->n_experts - 1);
            im->experts[l * im->top_k + k] = expert < 0 ? ROUTING_NO_EXPERT : (uint16_t)expert;
            im->weights[l * im->top_k + k] = expert < 0 ? 0 : 1 / (float)im->top_k;
        }
    const routing_row row = {
        .experts = im->experts, .weights = im->weights, .sequence = sequence, .position = position, .phase = phase, .domain = 0};
    return routing_trace_writer_add(im->writer, &row);
}

static status write_record(const record *r, void *context)
{
    importer *im = context;
    int64_t which_length = 0, n;
    for (int64_t first = 0; first < r->n_tokens; first += n) {
        int begin = 0, sequence = 0;
        TRY(measure_run(r, first, &which_length, &n));
        TRY(position_at(r, first, &begin));
        TRY(take_sequence(im, begin, &sequence));
        bool decode = r->mode == MODE_DECODE || (r->mode != MODE_EXTEND && n == 1 && begin > 0);
        int phase = import_phase(im->options, decode ? PHASE_DECODE : PHASE_PREFILL);
        for (int64_t i = 0; i < n; i++)
            TRY(write_token(im, r, first + i, sequence, begin + (int)i, phase));
        TRY(arrive(im, sequence, begin + (int)n));
    }
    queue_arrivals(im);
    return STATUS_OK;
}

static status set_aside(const char *where, importer *im)
{
    size_t n = (size_t)im->n_layers * (size_t)im->top_k, positions = (size_t)im->end + 1;
    im->experts = calloc(n, sizeof *im->experts);
    im->weights = calloc(n, sizeof *im->weights);
    im->first_waiting = malloc(positions * sizeof *im->first_waiting);
    im->last_waiting = malloc(positions * sizeof *im->last_waiting);
    if (!im->experts || !im->weights || !im->first_waiting || !im->last_waiting)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its sequences", where);
    memset(im->first_waiting, 0xff, positions * sizeof *im->first_waiting);
    return STATUS_OK;
}

static status write_trace(const char *const *paths, int n_paths, importer *im, const char *out_path)
{
    const import_options *o = im->options;
    const char *domain = o->domain ? o->domain : "default";
    TRY(visit_files(paths, n_paths, measure, im));
    if (im->n_rows == 0 || im->top_k == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: its records hold no tokens", paths[0]);
    if (!o->n_experts && !im->map.n)
        return import_ask(paths[0], "experts a layer has", "experts");
    im->n_experts = o->n_experts ? o->n_experts : (int)im->largest + 1;
    TRY(import_pick_rows(paths[0], o, im->n_rows, im->row_used, &im->rows, &im->n_layers));
    TRY(import_agree(paths[0], "choices per token", im->top_k, o->top_k, &im->top_k));
    const routing_shape shape = {.model = o->model ? o->model : "",
                                 .n_experts = im->n_experts,
                                 .top_k = im->top_k,
                                 .n_layers = im->n_layers,
                                 .n_domains = 1,
                                 .layer_numbers = im->rows,
                                 .domains = &domain};
    TRY(set_aside(paths[0], im));
    TRY(routing_trace_writer_create(out_path, &shape, &im->writer));
    TRY(visit_files(paths, n_paths, write_record, im));
    return routing_trace_writer_finish(im->writer);
}

bool sglang_records_in(const array_file *f)
{
    return array_file_has(f, "records") || array_file_has(f, "topk_ids_of_layer");
}

status sglang_records_import(const char *const *paths, int n_paths, const import_options *options, const char *out_path)
{
    importer im = {.options = options};
    status st = write_trace(paths, n_paths, &im, out_path);
    routing_trace_writer_destroy(im.writer);
    number_array_clear(&im.map);
    free(im.row_used);
    free(im.rows);
    free(im.next_in_line);
    free(im.first_waiting);
    free(im.last_waiting);
    free(im.arrivals);
    free(im.experts);
    free(im.weights);
    return st;
}
