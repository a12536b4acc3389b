/* routing_stats.c - counts in plain arrays, one set per used (domain, phase) slot.
 *
 * A row is checked as a whole before anything is counted, so a refused row leaves no half of itself behind. */
#include "placement/routing_stats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint64_t tokens;
    uint64_t *per_expert; /* NULL: nothing seen yet */
    uint64_t *next_pairs, *same_pairs;
} slot;

struct routing_stats {
    routing_shape shape; /* owned */
    bool pairs;
    slot *slots;      /* [n_domains * N_PHASES] */
    uint16_t *chosen; /* [2][n_experts]: a layer's experts without the dropped ones, and the layer's before it */
};

static size_t n_slots(const routing_stats *s)
{
    return (size_t)s->shape.n_domains * N_PHASES;
}

static size_t n_per_expert(const routing_stats *s)
{
    return (size_t)s->shape.n_layers * (size_t)s->shape.n_experts;
}

static size_t n_same(const routing_stats *s)
{
    return s->pairs ? n_per_expert(s) * (size_t)s->shape.n_experts : 0;
}

static size_t n_next(const routing_stats *s)
{
    return s->pairs ? n_same(s) / (size_t)s->shape.n_layers * (size_t)(s->shape.n_layers - 1) : 0;
}

size_t routing_stats_slot_bytes(const routing_stats *s)
{
    return (n_per_expert(s) + n_same(s) + n_next(s)) * sizeof(uint64_t);
}

size_t routing_stats_bytes(const routing_stats *s)
{
    size_t used = 0;
    for (size_t i = 0; i < n_slots(s); i++)
        used += s->slots[i].per_expert != NULL;
    return used * routing_stats_slot_bytes(s);
}

status routing_stats_create(const routing_shape *shape, bool pairs, routing_stats **out)
{
    TRY(routing_shape_check("routing statistics", shape));
    routing_stats *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "routing statistics: no memory");
    status st;
    TRY_GOTO(routing_shape_copy(shape, &s->shape), fail);
    s->pairs = pairs;
    s->slots = calloc(n_slots(s), sizeof *s->slots);
    s->chosen = calloc(2 * (size_t)shape->n_experts, sizeof *s->chosen);
    if (s->slots && s->chosen) {
        *out = s;
        return STATUS_OK;
    }
    st = status_fail(STATUS_NO_MEMORY, "routing statistics: no memory for %d domains", shape->n_domains);
fail:
    routing_stats_destroy(s);
    return st;
}

void routing_stats_destroy(routing_stats *s)
{
    if (!s)
        return;
    for (size_t i = 0; s->slots && i < n_slots(s); i++)
        free(s->slots[i].per_expert); /* the pairs lie behind it */
    free(s->slots);
    free(s->chosen);
    routing_shape_clear(&s->shape);
    free(s);
}

/* Sets a slot's counts aside, in one piece, when it is first used. */
static status use_slot(routing_stats *s, size_t index, slot **out)
{
    slot *to = &s->slots[index];
    if (!to->per_expert) {
        size_t bytes = routing_stats_slot_bytes(s);
        uint64_t *counts = calloc(1, bytes);
        if (!counts)
            return status_fail(STATUS_NO_MEMORY,
                               "routing statistics: no memory for %.1f MB of counts (%d layers of %d experts%s)",
                               (double)bytes / 1e6, s->shape.n_layers, s->shape.n_experts, s->pairs ? ", with pairs" : "");
        to->per_expert = counts;
        to->same_pairs = s->pairs ? counts + n_per_expert(s) : NULL;
        to->next_pairs = s->pairs ? to->same_pairs + n_same(s) : NULL;
    }
    *out = to;
    return STATUS_OK;
}

/* ---- counting ---- */

static status check_row(const routing_stats *s, const uint16_t *experts, int k, int domain, int phase)
{
    if (domain < 0 || domain >= s->shape.n_domains || phase < 0 || phase >= N_PHASES)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: domain %d, phase %d are outside 0 to %d and 0 to %d", domain,
                           phase, s->shape.n_domains - 1, N_PHASES - 1);
    for (int i = 0; i < s->shape.n_layers * k; i++)
        if (experts[i] >= s->shape.n_experts && experts[i] != ROUTING_NO_EXPERT)
            return status_fail(STATUS_BAD_INPUT, "routing statistics: layer %d: expert %d is outside 0 to %d",
                               s->shape.layer_numbers[i / k], experts[i], s->shape.n_experts - 1);
    return STATUS_OK;
}

static void count_pairs(const uint16_t *left, int n_left, const uint16_t *right, int n_right, size_t n_experts, uint64_t *pairs)
{
    for (int i = 0; i < n_left; i++) {
        uint64_t *row = pairs + left[i] * n_experts;
        for (int j = 0; j < n_right; j++)
            row[right[j]]++;
    }
}

static status add_row(routing_stats *s, const uint16_t *experts, int k, int domain, int phase)
{
    TRY(check_row(s, experts, k, domain, phase));
    slot *to;
    TRY(use_slot(s, (size_t)(domain * N_PHASES + phase), &to));
    size_t n_experts = (size_t)s->shape.n_experts;
    uint16_t *now = s->chosen, *before = s->chosen + n_experts;
    int n_now = 0, n_before = 0;
    for (size_t l = 0; l < (size_t)s->shape.n_layers; l++, experts += k) {
        n_now = 0;
        for (int i = 0; i < k; i++)
            if (experts[i] != ROUTING_NO_EXPERT)
                now[n_now++] = experts[i];
        for (int i = 0; i < n_now; i++)
            to->per_expert[l * n_experts + now[i]]++;
        if (!s->pairs)
            continue;
        count_pairs(now, n_now, now, n_now, n_experts, to->same_pairs + l * n_experts * n_experts);
        if (l > 0)
            count_pairs(before, n_before, now, n_now, n_experts, to->next_pairs + (l - 1) * n_experts * n_experts);
        uint16_t *swap = before;
        before = now;
        now = swap;
        n_before = n_now;
    }
    to->tokens++;
    return STATUS_OK;
}

status routing_stats_add_row(routing_stats *s, const uint16_t *experts, int domain, int phase)
{
    return add_row(s, experts, s->shape.top_k, domain, phase);
}

/* ---- adding others ---- */

static status append_domain(routing_stats *s, const char *name)
{
    size_t n = (size_t)s->shape.n_domains;
    const char **names = calloc(n + 1, sizeof *names);
    slot *slots = reallocarray(s->slots, n_slots(s) + N_PHASES, sizeof *slots);
    if (slots) {
        s->slots = slots;
        memset(slots + n_slots(s), 0, N_PHASES * sizeof *slots);
    }
    status st = names && slots ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "routing statistics: no memory for one more domain");
    routing_shape wider = s->shape, copy;
    for (size_t d = 0; st == STATUS_OK && d < n; d++)
        names[d] = s->shape.domains[d];
    if (st == STATUS_OK) {
        names[n] = name;
        wider.domains = names;
        wider.n_domains++;
        st = routing_shape_check("routing statistics", &wider);
    }
    if (st == STATUS_OK && (st = routing_shape_copy(&wider, &copy)) == STATUS_OK) {
        routing_shape_clear(&s->shape);
        s->shape = copy;
    }
    free(names);
    return st;
}

/* numbers[d]: where domain d of `from` is in s; new ones are appended. only >= 0: that domain alone. */
static status match_domains(routing_stats *s, const routing_shape *from, int only, int *numbers)
{
    for (int d = 0; d < from->n_domains; d++) {
        if (only >= 0 && d != only)
            continue;
        numbers[d] = routing_shape_find_domain(&s->shape, from->domains[d]);
        if (numbers[d] < 0) {
            TRY(append_domain(s, from->domains[d]));
            numbers[d] = s->shape.n_domains - 1;
        }
    }
    return STATUS_OK;
}

static status same_model(routing_stats *s, const char *where, const routing_shape *from, int only, int **numbers)
{
    TRY(routing_shape_same_model("routing statistics", &s->shape, where, from));
    *numbers = calloc((size_t)from->n_domains, sizeof **numbers);
    if (!*numbers)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d domains", where, from->n_domains);
    status st = match_domains(s, from, only, *numbers);
    if (st != STATUS_OK)
        free(*numbers);
    else if (s->shape.top_k == 0)
        s->shape.top_k = from->top_k;
    return st;
}

status routing_stats_add_trace(routing_stats *s, const routing_trace *trace)
{
    const routing_shape *shape = routing_trace_shape(trace);
    int *domains;
    TRY(same_model(s, routing_trace_path(trace), shape, -1, &domains));
    uint16_t *experts = calloc((size_t)shape->n_layers * (size_t)shape->top_k + 1, sizeof *experts);
    status st = experts ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for a row", routing_trace_path(trace));
    for (int64_t t = 0; st == STATUS_OK && t < routing_trace_n_tokens(trace); t++) {
        routing_row row = routing_trace_row(trace, t, experts, NULL);
        st = add_row(s, row.experts, shape->top_k, domains[row.domain], row.phase);
    }
    free(experts);
    free(domains);
    return st;
}

static status add_slot(routing_stats *into, const slot *source, size_t index)
{
    slot *to;
    TRY(use_slot(into, index, &to));
    to->tokens += source->tokens;
    for (size_t c = 0; c < n_per_expert(into); c++)
        to->per_expert[c] += source->per_expert[c];
    for (size_t c = 0; c < n_same(into); c++)
        to->same_pairs[c] += source->same_pairs[c];
    for (size_t c = 0; c < n_next(into); c++)
        to->next_pairs[c] += source->next_pairs[c];
    return STATUS_OK;
}

status routing_stats_merge_part(routing_stats *into, const routing_stats *from, int domain, int phase)
{
    if (into->pairs && !from->pairs)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: counts without pairs cannot be added to counts with pairs");
    int *domains;
    TRY(same_model(into, "what is added", &from->shape, domain, &domains));
    status st = STATUS_OK;
    for (size_t i = 0; i < n_slots(from) && st == STATUS_OK; i++) {
        bool wanted = (domain < 0 || i / N_PHASES == (size_t)domain) && (phase < 0 || i % N_PHASES == (size_t)phase);
        if (wanted && from->slots[i].per_expert)
            st = add_slot(into, &from->slots[i], (size_t)domains[i / N_PHASES] * N_PHASES + i % N_PHASES);
    }
    free(domains);
    return st;
}

status routing_stats_merge(routing_stats *into, const routing_stats *from)
{
    return routing_stats_merge_part(into, from, -1, -1);
}

status routing_stats_add_counts(routing_stats *s, const uint64_t *tokens_per_expert, uint64_t tokens, int domain, int phase)
{
    if (s->pairs)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: counts without pairs cannot be added to counts with pairs");
    if (domain < 0 || domain >= s->shape.n_domains || phase < 0 || phase >= N_PHASES)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: domain %d, phase %d are outside 0 to %d and 0 to %d", domain,
                           phase, s->shape.n_domains - 1, N_PHASES - 1);
    slot *to;
    TRY(use_slot(s, (size_t)(domain * N_PHASES + phase), &to));
    to->tokens += tokens;
    for (size_t i = 0; i < n_per_expert(s); i++)
        to->per_expert[i] += tokens_per_expert[i];
    return STATUS_OK;
}

/* ---- between ranks ----
 *
 * A slot's counts lie in one piece (use_slot), so they travel as (gap to the next count that is not zero, that count), both in
 * base 128 with the high bit for "more follows"; a gap that reaches the end of the counts ends the slot. */

typedef struct {
    int32_t n_domains, n_layers, n_experts, pairs, n_used; /* slots that follow */
} packed_header;

static size_t put_number(unsigned char *to, uint64_t value)
{
    size_t n = 0;
    for (; value >= 128; value >>= 7)
        to[n++] = (unsigned char)(value | 128);
    to[n++] = (unsigned char)value;
    return n;
}

static uint64_t get_number(bytes_reader *r)
{
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        unsigned char byte;
        bytes_get(r, &byte, 1);
        value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128)
            return value;
    }
    r->short_read = true;
    return 0;
}

static packed_header header_of(const routing_stats *s)
{
    packed_header h = {s->shape.n_domains, s->shape.n_layers, s->shape.n_experts, s->pairs, 0};
    for (size_t i = 0; i < n_slots(s); i++)
        h.n_used += s->slots[i].per_expert != NULL;
    return h;
}

static void pack_slot(const slot *from, size_t index, size_t n_counts, bytes_writer *out)
{
    unsigned char buffer[4096];
    size_t n = put_number(buffer, index), next = 0;
    n += put_number(buffer + n, from->tokens);
    for (size_t i = 0; i < n_counts; i++) {
        if (from->per_expert[i] == 0)
            continue;
        n += put_number(buffer + n, i - next);
        n += put_number(buffer + n, from->per_expert[i]);
        next = i + 1;
        if (n > sizeof buffer - 64) {
            bytes_put(out, buffer, n);
            n = 0;
        }
    }
    n += put_number(buffer + n, n_counts - next);
    bytes_put(out, buffer, n);
}

status routing_stats_pack(const routing_stats *s, bytes_writer *out)
{
    packed_header header = header_of(s);
    bytes_put(out, &header, sizeof header);
    for (size_t i = 0; i < n_slots(s); i++)
        if (s->slots[i].per_expert)
            pack_slot(&s->slots[i], i, routing_stats_slot_bytes(s) / sizeof(uint64_t), out);
    return out->failed ? status_fail(STATUS_NO_MEMORY, "routing statistics: no memory to send them") : STATUS_OK;
}

/* False when the bytes make no sense. */
static bool add_packed_slot(slot *to, size_t n_counts, bytes_reader *r)
{
    to->tokens += get_number(r);
    for (uint64_t at = 0;; at++) {
        uint64_t gap = get_number(r);
        if (r->short_read || gap > n_counts - at)
            return false;
        at += gap;
        if (at == n_counts)
            return true;
        to->per_expert[at] += get_number(r);
    }
}

status routing_stats_add_packed(routing_stats *into, const void *bytes, size_t size)
{
    bytes_reader r = {.at = bytes, .end = (const unsigned char *)bytes + size};
    packed_header header, mine = header_of(into);
    bytes_get(&r, &header, sizeof header);
    mine.n_used = header.n_used;
    if (r.short_read || memcmp(&header, &mine, sizeof mine) != 0)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: what was sent is of another shape");
    bool whole = true;
    for (int32_t i = 0; i < header.n_used && whole; i++) {
        uint64_t index = get_number(&r);
        slot *to;
        whole = !r.short_read && index < n_slots(into);
        if (!whole)
            break;
        TRY(use_slot(into, (size_t)index, &to));
        whole = add_packed_slot(to, routing_stats_slot_bytes(into) / sizeof(uint64_t), &r);
    }
    if (!whole || r.at != r.end)
        return status_fail(STATUS_BAD_INPUT, "routing statistics: what was sent is damaged");
    return STATUS_OK;
}

/* ---- files ---- */

enum { SEEN, PER_EXPERT, NEXT, SAME, N_TENSORS };
static const char *const tensor_names[N_TENSORS] = {"tokens_seen", "tokens_per_expert", "next_layer_pairs", "same_layer_pairs"};

/* Dimensions of one tensor; returns how many. */
static int dimensions(const routing_stats *s, int tensor, int64_t *shape)
{
    shape[0] = (int64_t)n_slots(s);
    shape[1] = s->shape.n_layers - (tensor == NEXT);
    shape[2] = shape[3] = s->shape.n_experts;
    return tensor == SEEN ? 1 : tensor == PER_EXPERT ? 3 : 4;
}

static uint64_t *counts_of(const slot *from, int tensor)
{
    return tensor == PER_EXPERT ? from->per_expert : tensor == NEXT ? from->next_pairs : from->same_pairs;
}

static size_t count_of(const routing_stats *s, int tensor)
{
    return tensor == PER_EXPERT ? n_per_expert(s) : tensor == NEXT ? n_next(s) : n_same(s);
}

static status write_counts(const routing_stats *s, safetensors_writer *writer)
{
    int index[N_TENSORS], n_tensors = s->pairs ? N_TENSORS : NEXT;
    uint64_t total = 0;
    for (size_t i = 0; i < n_slots(s); i++)
        total += s->slots[i].tokens;
    char number[24];
    snprintf(number, sizeof number, "%llu", (unsigned long long)total);
    TRY(routing_shape_write(&s->shape, writer));
    TRY(safetensors_writer_metadata(writer, "tokens", number));
    for (int t = 0; t < n_tensors; t++) {
        int64_t shape[4];
        int n_dims = dimensions(s, t, shape);
        TRY(safetensors_writer_declare(writer, tensor_names[t], DTYPE_U64, n_dims, shape, &index[t]));
    }
    TRY(safetensors_writer_begin(writer));
    for (size_t i = 0; i < n_slots(s); i++) {
        const slot *from = &s->slots[i];
        TRY(safetensors_writer_put(writer, index[SEEN], i * sizeof(uint64_t), &from->tokens, sizeof(uint64_t)));
        for (int t = PER_EXPERT; from->per_expert && t < n_tensors; t++) {
            size_t bytes = count_of(s, t) * sizeof(uint64_t);
            TRY(safetensors_writer_put(writer, index[t], i * bytes, counts_of(from, t), bytes));
        }
    }
    return safetensors_writer_finish(writer);
}

status routing_stats_write(const routing_stats *s, const char *path)
{
    safetensors_writer *writer;
    TRY(safetensors_writer_create(path, &writer));
    status st = write_counts(s, writer);
    safetensors_writer_destroy(writer);
    return st;
}

/* The tensor if it is there; a wrong one is refused. */
static status find_tensor(const routing_stats *s, const safetensors *file, int tensor, const tensor_view **out)
{
    const tensor_view *view = safetensors_find(file, tensor_names[tensor]);
    int64_t want[4];
    int n_dims = dimensions(s, tensor, want);
    *out = view;
    if (!view)
        return STATUS_OK;
    bool fits = view->dtype == DTYPE_U64 && view->n_dims == n_dims;
    for (int d = 0; fits && d < n_dims; d++)
        fits = view->shape[d] == want[d];
    if (!fits)
        return status_fail(STATUS_BAD_INPUT, "%s: tensor %s is not U64 [domains * 2 = %lld]%s as its metadata says",
                           safetensors_path(file), tensor_names[tensor], (long long)want[0],
                           tensor == SEEN         ? ""
                           : tensor == PER_EXPERT ? " [layers] [experts]"
                           : tensor == NEXT       ? " [layers - 1] [experts] [experts]"
                                                  : " [layers] [experts] [experts]");
    return STATUS_OK;
}

static bool any_nonzero(const unsigned char *bytes, size_t n)
{
    /* equal to itself one byte further, and the first is zero: all are */
    return n > 0 && (bytes[0] != 0 || memcmp(bytes, bytes + 1, n - 1) != 0);
}

static status read_slot(routing_stats *s, size_t i, const tensor_view *const *views)
{
    bool used = false;
    const unsigned char *parts[N_TENSORS];
    size_t bytes[N_TENSORS];
    for (int t = 0; t < N_TENSORS; t++) {
        bytes[t] = (t == SEEN ? 1 : count_of(s, t)) * sizeof(uint64_t);
        parts[t] = views[t] ? (const unsigned char *)views[t]->data + i * bytes[t] : NULL;
        used |= parts[t] && any_nonzero(parts[t], bytes[t]);
    }
    if (!used)
        return STATUS_OK;
    slot *to;
    TRY(use_slot(s, i, &to));
    if (parts[SEEN])
        memcpy(&to->tokens, parts[SEEN], sizeof to->tokens);
    for (int t = PER_EXPERT; t < N_TENSORS; t++)
        if (parts[t])
            memcpy(counts_of(to, t), parts[t], bytes[t]);
    return STATUS_OK;
}

static status read_counts(routing_stats *s, const safetensors *file)
{
    const tensor_view *views[N_TENSORS];
    for (int t = 0; t < N_TENSORS; t++)
        TRY(find_tensor(s, file, t, &views[t]));
    if (!views[PER_EXPERT])
        return status_fail(STATUS_BAD_INPUT, "%s: tensor tokens_per_expert is missing%s", safetensors_path(file),
                           safetensors_find(file, "experts") ? "; this is a routing trace, not statistics" : "");
    for (size_t i = 0; i < n_slots(s); i++)
        TRY(read_slot(s, i, views));
    return STATUS_OK;
}

static status read_file(const safetensors *file, routing_stats **out)
{
    routing_shape shape;
    TRY(routing_shape_read(file, &shape));
    bool pairs = safetensors_find(file, tensor_names[NEXT]) && safetensors_find(file, tensor_names[SAME]);
    routing_stats *s = NULL;
    status st = routing_stats_create(&shape, pairs, &s);
    routing_shape_clear(&shape);
    TRY(st);
    st = read_counts(s, file);
    if (st == STATUS_OK)
        *out = s;
    else
        routing_stats_destroy(s);
    return st;
}

status routing_stats_read(const char *path, routing_stats **out)
{
    safetensors *file;
    TRY(safetensors_open(path, &file));
    status st = read_file(file, out);
    safetensors_close(file);
    return st;
}

/* ---- looking ---- */

static const slot *slot_at(const routing_stats *s, int domain, int phase)
{
    return &s->slots[domain * N_PHASES + phase];
}

const routing_shape *routing_stats_shape(const routing_stats *s)
{
    return &s->shape;
}

bool routing_stats_has_pairs(const routing_stats *s)
{
    return s->pairs;
}

uint64_t routing_stats_tokens(const routing_stats *s, int domain, int phase)
{
    return slot_at(s, domain, phase)->tokens;
}

const uint64_t *routing_stats_tokens_per_expert(const routing_stats *s, int domain, int phase)
{
    return slot_at(s, domain, phase)->per_expert;
}

const uint64_t *routing_stats_next_layer_pairs(const routing_stats *s, int domain, int phase)
{
    return slot_at(s, domain, phase)->next_pairs;
}

const uint64_t *routing_stats_same_layer_pairs(const routing_stats *s, int domain, int phase)
{
    return slot_at(s, domain, phase)->same_pairs;
}

void routing_stats_sum_tokens(const routing_stats *s, int domain, int phase, uint64_t *out)
{
    memset(out, 0, n_per_expert(s) * sizeof *out);
    for (int d = 0; d < s->shape.n_domains; d++)
        for (int p = 0; p < N_PHASES; p++) {
            const uint64_t *counts = routing_stats_tokens_per_expert(s, d, p);
            if (!counts || (domain >= 0 && domain != d) || (phase >= 0 && phase != p))
                continue;
            for (size_t i = 0; i < n_per_expert(s); i++)
                out[i] += counts[i];
        }
}

void routing_balance(const plan *p, const uint64_t *tokens_per_expert, double *loads, double *out)
{
    for (int l = 0; l < p->n_layers; l++) {
        double total = 0, busiest = 0;
        for (int r = 0; r < p->n_ranks; r++)
            loads[r] = 0;
        for (int e = 0; e < p->n_experts; e++, tokens_per_expert++) {
            int n = plan_n_copies(p, l, e);
            for (int c = 0; c < n; c++)
                loads[plan_copies(p, l, e)[c]] += (double)*tokens_per_expert / n;
            total += (double)*tokens_per_expert;
        }
        for (int r = 0; r < p->n_ranks; r++)
            busiest = loads[r] > busiest ? loads[r] : busiest;
        out[l] = total > 0 ? busiest * p->n_ranks / total : 1;
    }
}
