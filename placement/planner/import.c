#include "placement/planner/import.h"

#include "proto/file_replace.h"
#include "proto/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_LAYERS = 65535, MAX_DOMAINS = 4096, MAX_EXPERTS_IN_ALL = 1 << 24 };

const char *import_base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int import_phase(const import_options *options, int own)
{
    return options->phase == IMPORT_PHASE_PREFILL ? PHASE_PREFILL : options->phase == IMPORT_PHASE_DECODE ? PHASE_DECODE : own;
}

status import_ask(const char *where, const char *what, const char *option)
{
    return status_fail(STATUS_BAD_INPUT, "%s: the file does not say how many %s: say so with --%s", where, what, option);
}

status import_agree(const char *where, const char *what, int found, int given, int *out)
{
    if (given && found && given != found)
        return status_fail(STATUS_BAD_INPUT, "%s: %d %s, but %d were asked for", where, found, what, given);
    *out = found ? found : given;
    return STATUS_OK;
}

status import_ranks(const char *where, const import_options *options, int *n_ranks)
{
    if (options->n_ranks == 0)
        return import_ask(where, "ranks the slots are for", "ranks");
    if (options->n_ranks < 0 || options->n_ranks > PLAN_MAX_RANKS)
        return status_fail(STATUS_BAD_INPUT, "%s: %d ranks are outside 1 to %d", where, options->n_ranks, PLAN_MAX_RANKS);
    *n_ranks = options->n_ranks;
    return STATUS_OK;
}

/* ---- layer numbers ---- */

static status bad_list(const char *text)
{
    return status_fail(STATUS_USAGE, "layer numbers '%.200s' are not a rising list such as 3-60 or 1,3,5-9", text);
}

/* "3-60" or "1,3,5-9" */
static status parse_numbers(const char *text, int *numbers, int *n)
{
    const char *at = text;
    for (*n = 0;; at++) {
        char *end;
        long first = strtol(at, &end, 10), last = first;
        if (end == at || *at == '+' || *at == '-')
            return bad_list(text);
        if (*end == '-') {
            at = end + 1;
            last = strtol(at, &end, 10);
            if (end == at || *at == '+' || *at == '-')
                return bad_list(text);
        }
        if (first < 0 || last < first || last > INT32_MAX - 1 || last - first >= MAX_LAYERS - *n ||
            (*n > 0 && first <= numbers[*n - 1]))
            return bad_list(text);
        for (long l = first; l <= last; l++)
            numbers[(*n)++] = (int)l;
        if (*end == '\0')
            return STATUS_OK;
        if (*end != ',')
            return bad_list(text);
        at = end;
    }
}

static status list_numbers(const import_options *options, int **out, int *n)
{
    int *numbers = calloc(MAX_LAYERS, sizeof *numbers);
    if (!numbers)
        return status_fail(STATUS_NO_MEMORY, "no memory for a list of layers");
    status st = parse_numbers(options->layer_numbers, numbers, n);
    if (st == STATUS_OK)
        *out = numbers;
    else
        free(numbers);
    return st;
}

status import_layer_numbers(const char *where, const import_options *options, int n_rows, int first, int **out)
{
    int n = 0, *numbers = NULL;
    if (n_rows < 1 || n_rows > MAX_LAYERS)
        return status_fail(STATUS_BAD_INPUT, "%s: %d layers are outside 1 to %d", where, n_rows, MAX_LAYERS);
    if (options->layer_numbers) {
        TRY(list_numbers(options, &numbers, &n));
        if (n == n_rows) {
            *out = numbers;
            return STATUS_OK;
        }
        free(numbers);
        return status_fail(STATUS_BAD_INPUT, "%s: %d layers, but %d layer numbers were given", where, n_rows, n);
    }
    numbers = calloc((size_t)n_rows, sizeof *numbers);
    if (!numbers)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers", where, n_rows);
    for (int l = 0; l < n_rows; l++)
        numbers[l] = first + l;
    *out = numbers;
    return STATUS_OK;
}

status import_pick_rows(const char *where, const import_options *options, int n_rows, const bool *wanted, int **out, int *n)
{
    int *rows = NULL;
    if (options->layer_numbers) {
        TRY(list_numbers(options, &rows, n));
        if (rows[*n - 1] < n_rows) {
            *out = rows;
            return STATUS_OK;
        }
        int missing = rows[*n - 1];
        free(rows);
        return status_fail(STATUS_BAD_INPUT, "%s: %d layers, so there is no layer %d", where, n_rows, missing);
    }
    rows = calloc((size_t)n_rows + 1, sizeof *rows);
    if (!rows)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers", where, n_rows);
    *n = 0;
    for (int l = 0; l < n_rows; l++)
        if (!wanted || wanted[l])
            rows[(*n)++] = l;
    if (*n > 0 && *n <= MAX_LAYERS) {
        *out = rows;
        return STATUS_OK;
    }
    free(rows);
    return status_fail(STATUS_BAD_INPUT, "%s: none of its %d layers has experts", where, n_rows);
}

/* ---- counts ---- */

typedef struct {
    int domain, layer, expert;
    uint64_t count;
} counted;

struct count_table {
    counted *entries;
    size_t n, capacity;
    char **domains; /* in the order of their first entry */
    int n_domains, last_domain;
};

status count_table_create(count_table **out)
{
    *out = calloc(1, sizeof **out);
    return *out ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for counts");
}

void count_table_destroy(count_table *t)
{
    if (!t)
        return;
    for (int d = 0; d < t->n_domains; d++)
        free(t->domains[d]);
    free(t->domains);
    free(t->entries);
    free(t);
}

/* Files list domain after domain, so the last one is looked at first. */
static status find_domain(count_table *t, const char *name, int *out)
{
    for (int i = 0; i < t->n_domains; i++) {
        int d = (t->last_domain + i) % t->n_domains;
        if (strcmp(t->domains[d], name) == 0) {
            *out = t->last_domain = d;
            return STATUS_OK;
        }
    }
    if (t->n_domains == MAX_DOMAINS)
        return status_fail(STATUS_UNSUPPORTED, "more than %d domains", MAX_DOMAINS);
    char **domains = reallocarray(t->domains, (size_t)t->n_domains + 1, sizeof *domains);
    char *copy = strdup(name);
    t->domains = domains ? domains : t->domains;
    if (!domains || !copy) {
        free(copy);
        return status_fail(STATUS_NO_MEMORY, "no memory for %d domains", t->n_domains);
    }
    domains[t->n_domains] = copy;
    *out = t->last_domain = t->n_domains++;
    return STATUS_OK;
}

status count_table_add(count_table *t, const char *domain, int64_t layer, int64_t expert, uint64_t count)
{
    counted entry = {.layer = (int)layer, .expert = (int)expert, .count = count};
    TRY(find_domain(t, domain, &entry.domain));
    if (t->n == t->capacity) {
        size_t capacity = t->capacity ? 2 * t->capacity : 1024;
        counted *entries = reallocarray(t->entries, capacity, sizeof *entries);
        if (!entries)
            return status_fail(STATUS_NO_MEMORY, "no memory for %zu counts", capacity);
        t->entries = entries;
        t->capacity = capacity;
    }
    t->entries[t->n++] = entry;
    return STATUS_OK;
}

/* By domain, layer, expert. */
static int compare_entries(const void *a, const void *b)
{
    const counted *x = a, *y = b;
    int order = (x->domain > y->domain) - (x->domain < y->domain);
    if (order == 0)
        order = (x->layer > y->layer) - (x->layer < y->layer);
    return order ? order : (x->expert > y->expert) - (x->expert < y->expert);
}

static int compare_ints(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

/* Sorted, all different; returns how many. */
static int collect_layers(const count_table *t, int *layers)
{
    int n = 0;
    for (size_t i = 0; i < t->n; i++) /* entries are sorted: a run of one layer is one */
        if (i == 0 || t->entries[i].layer != t->entries[i - 1].layer || t->entries[i].domain != t->entries[i - 1].domain)
            layers[n++] = t->entries[i].layer;
    qsort(layers, (size_t)n, sizeof *layers, compare_ints);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (i == 0 || layers[i] != layers[i - 1])
            layers[kept++] = layers[i];
    return kept;
}

static status check_entries(const count_table *t, const char *where, int n_experts)
{
    for (size_t i = 0; i < t->n; i++) {
        const counted *e = &t->entries[i];
        if (i > 0 && compare_entries(e - 1, e) == 0)
            return status_fail(STATUS_BAD_INPUT, "%s: domain %.60s, layer %d, expert %d is counted twice", where,
                               t->domains[e->domain], e->layer, e->expert);
        if (e->expert >= n_experts)
            return status_fail(STATUS_BAD_INPUT, "%s: domain %.60s, layer %d: expert %d is outside 0 to %d", where,
                               t->domains[e->domain], e->layer, e->expert, n_experts - 1);
    }
    return STATUS_OK;
}

/* Adds one domain's counts, which are entries first to last - 1; counts [n_layers][n_experts] is scratch. */
static status add_domain(const count_table *t, const char *where, const routing_shape *shape, size_t first, size_t last,
                         int phase, uint64_t *counts, routing_stats *stats)
{
    uint64_t busiest = 0, sum = 0;
    int layer = 0;
    memset(counts, 0, (size_t)shape->n_layers * (size_t)shape->n_experts * sizeof *counts);
    for (size_t i = first; i < last; i++) {
        const counted *e = &t->entries[i];
        if (i == first || e->layer != t->entries[i - 1].layer)
            sum = 0;
        while (shape->layer_numbers[layer] != e->layer)
            layer++;
        counts[(size_t)layer * (size_t)shape->n_experts + (size_t)e->expert] = e->count;
        if (__builtin_add_overflow(sum, e->count, &sum))
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d counts more than 2^64 choices", where, e->layer);
        busiest = sum > busiest ? sum : busiest;
    }
    uint64_t k = (uint64_t)shape->top_k;
    return routing_stats_add_counts(stats, counts, busiest / k + (busiest % k > 0), t->entries[first].domain, phase);
}

static status add_all(const count_table *t, const char *where, const routing_shape *shape, int phase, routing_stats *stats)
{
    uint64_t *counts = calloc((size_t)shape->n_layers * (size_t)shape->n_experts, sizeof *counts);
    if (!counts)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers of %d experts", where, shape->n_layers,
                           shape->n_experts);
    status st = STATUS_OK;
    for (size_t first = 0, last; first < t->n && st == STATUS_OK; first = last) {
        for (last = first + 1; last < t->n && t->entries[last].domain == t->entries[first].domain;)
            last++;
        st = add_domain(t, where, shape, first, last, phase, counts, stats);
    }
    free(counts);
    return st;
}

static status write_stats(const count_table *t, const char *where, const routing_shape *shape, int phase, const char *out_path)
{
    routing_stats *stats;
    TRY(routing_shape_check(where, shape));
    if ((size_t)shape->n_layers * (size_t)shape->n_experts > MAX_EXPERTS_IN_ALL) /* a lying file, before memory is set aside */
        return status_fail(STATUS_UNSUPPORTED, "%s: %d layers of %d experts are more than are taken in", where, shape->n_layers,
                           shape->n_experts);
    TRY(routing_stats_create(shape, false, &stats));
    status st = add_all(t, where, shape, phase, stats);
    if (st == STATUS_OK)
        st = routing_stats_write(stats, out_path);
    routing_stats_destroy(stats);
    return st;
}

status count_table_write(count_table *t, const char *where, const import_options *options, int own_phase, const char *out_path)
{
    int largest = -1, n_experts = options->n_experts;
    if (t->n == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: no counts in it", where);
    if (options->top_k < 1)
        return import_ask(where, "experts a token chooses", "top-k");
    qsort(t->entries, t->n, sizeof *t->entries, compare_entries);
    for (size_t i = 0; i < t->n; i++)
        largest = t->entries[i].expert > largest ? t->entries[i].expert : largest;
    n_experts = n_experts ? n_experts : largest + 1;
    TRY(check_entries(t, where, n_experts));
    int *layers = calloc(t->n, sizeof *layers);
    if (!layers)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its layers", where);
    const routing_shape shape = {.model = options->model ? options->model : "",
                                 .n_experts = n_experts,
                                 .top_k = options->top_k,
                                 .n_layers = collect_layers(t, layers),
                                 .n_domains = t->n_domains,
                                 .layer_numbers = layers,
                                 .domains = (const char *const *)t->domains};
    int agreed;
    status st = import_agree(where, "layers", shape.n_layers, options->n_layers, &agreed);
    if (st == STATUS_OK)
        st = write_stats(t, where, &shape, import_phase(options, own_phase), out_path);
    free(layers);
    return st;
}

/* ---- plans ---- */

status import_write_slots(const char *where, const slot_layout *layout, const int *first_slot, const import_options *options,
                          const char *out_path)
{
    plan p;
    char name[sizeof p.name];
    snprintf(name, sizeof name, "%s", import_base_name(where));
    TRY(slot_layout_to_plan(where, layout, first_slot, options->n_nodes, name, &p));
    status st = plan_write(&p, options->model, out_path);
    plan_clear(&p);
    return st;
}

/* ---- text files out ---- */

static void forget(text_file *f)
{
    free(f->path);
    free(f->beside);
    *f = (text_file){0};
}

status text_file_begin(const char *path, text_file *out)
{
    text_file f = {.path = strdup(path)};
    if (!f.path || asprintf(&f.beside, "%s.part-%ld", path, (long)getpid()) < 0) {
        free(f.path);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
    }
    f.stream = fopen(f.beside, "we");
    if (!f.stream) {
        status st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
        forget(&f);
        return st;
    }
    *out = f;
    return STATUS_OK;
}

status text_file_finish(text_file *f)
{
    status st = STATUS_OK;
    bool failed = ferror(f->stream) != 0;
    failed |= fclose(f->stream) != 0;
    if (failed || file_replace(f->beside, f->path) != 0) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", f->path, strerror(errno));
        unlink(f->beside);
    }
    forget(f);
    return st;
}

void export_warn(const char *engine, int homes_lost)
{
    if (homes_lost > 0)
        log_line("%s: the format cannot say which copy is the home, and for %d experts reading it back takes another copy",
                 engine, homes_lost);
}
