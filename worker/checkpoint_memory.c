/* checkpoint_memory.c - sees to it that a rank's memory holds its own share only.
 *
 * Mapped weights: Linux answers a page fault with the 16 pages around it (when the page cache has them), and reads up to
 * megabytes ahead from disk. Left alone, a rank would so take in the edges of its neighbours' experts, which for small experts is
 * most of them. A fault never maps beyond its memory area, though, and advice splits areas; so all is RANDOM (nothing is read
 * ahead) but the stretches that this rank needs, each of which becomes an area of its own:
 *
 *     file   | header | shared tensors | expert 0 | expert 1 | expert 2 | ...        this rank holds expert 1
 *     advice | RANDOM | WILLNEED       | RANDOM   | WILLNEED | RANDOM   |
 *
 * Copied weights: one anonymous area for everything bound; the source pages are given back as the copy proceeds. */
#include "worker/checkpoint_parts.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_AREAS  CHECKPOINT_MAX_AREAS
#define COPY_ALIGN CHECKPOINT_COPY_ALIGN
#define WARM_BYTES ((size_t)16 << 20)

void checkpoint_advise(const void *from, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)from & ~(page - 1), end = (uintptr_t)from + n;
    madvise((void *)begin, (end - begin + page - 1) & ~(page - 1), advice);
}

void checkpoint_advise_all(const checkpoint *ck, int advice)
{
    for (int s = 0; s < ck->n_shards; s++) {
        size_t size;
        const void *map = safetensors_mapping(ck->shards[s].file, &size);
        checkpoint_advise(map, size, advice);
    }
}

/* ---- mapped: advice ---- */

typedef void (*stretch_fn)(char *begin, char *end, bool ours, void *context);

/* Calls `fn` for each maximal stretch of whole pages that is ours or not, in file order. A gap below min_gap counts as ours. */
static void walk_stretches(const shard *s, size_t page, size_t min_gap, stretch_fn fn, void *context)
{
    size_t size;
    uintptr_t start = (uintptr_t)safetensors_mapping(s->file, &size), end = start + size, done = start;
    uintptr_t gap = start; /* where the bytes that are not ours began */
    for (int i = 0; i <= safetensors_count(s->file); i++) {
        const tensor_view *view = i < safetensors_count(s->file) ? safetensors_at(s->file, i) : NULL;
        if (view && s->use[i] != TENSOR_OURS)
            continue;
        uintptr_t next = view ? (uintptr_t)view->data : end;
        uintptr_t from = (gap + page - 1) & ~(page - 1), to = view ? next & ~(page - 1) : (end + page - 1) & ~(page - 1);
        if (to > from && to - from >= min_gap) {
            if (from > done)
                fn((char *)done, (char *)from, true, context);
            fn((char *)from, (char *)to, false, context);
            done = to;
        }
        gap = view ? next + view->n_bytes : end;
    }
    if (end > done)
        fn((char *)done, (char *)((end + page - 1) & ~(page - 1)), true, context);
}

static void count_stretch(char *begin, char *end, bool ours, void *context)
{
    (void)begin, (void)end, (void)ours;
    ++*(int *)context;
}

static void advise_stretch(char *begin, char *end, bool ours, void *context)
{
    const bool *will_need = context;
    size_t n = (size_t)(end - begin);
    if (!ours) {
        madvise(begin, n, MADV_DONTNEED); /* what faults while binding brought in beside their target */
        return;
    }
    madvise(begin, n, MADV_NORMAL);
    if (*will_need)
        madvise(begin, n, MADV_WILLNEED);
}

static size_t memory_available(void)
{
    FILE *from = fopen("/proc/meminfo", "r");
    char line[256];
    unsigned long long kib = 0;
    while (from && fgets(line, sizeof line, from))
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            break;
    if (from)
        fclose(from);
    return (size_t)kib * 1024;
}

void checkpoint_keep_own(const checkpoint *ck)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), min_gap = page;
    for (int n = INT_MAX; n > MAX_AREAS; min_gap *= 2) {
        n = 0;
        for (int s = 0; s < ck->n_shards; s++)
            walk_stretches(&ck->shards[s], page, min_gap, count_stretch, &n);
        if (n <= MAX_AREAS)
            break;
    }
    /* Reading ahead what does not fit would only push out what is there. */
    bool will_need = ck->weights.shared_bytes + ck->weights.expert_bytes <= memory_available() / 2;
    for (int s = 0; s < ck->n_shards; s++)
        walk_stretches(&ck->shards[s], page, min_gap, advise_stretch, &will_need);
}

/* ---- copied ---- */

typedef status (*matrix_fn)(checkpoint *ck, weight_matrix *matrix);

static void tell(const checkpoint *ck, size_t done, size_t total)
{
    if (ck->listener)
        ck->listener(ck->listener_arg, done, total);
}

static size_t matrix_bytes(const weight_matrix *m)
{
    return (size_t)m->n_out * (size_t)m->n_in * weight_format_size(m->format);
}

static status each_of(checkpoint *ck, weight_matrix *const *list, size_t n, matrix_fn fn)
{
    for (size_t i = 0; i < n; i++)
        if (list[i]->data)
            TRY(fn(ck, list[i]));
    return STATUS_OK;
}

/* All matrices bound, in the order a step reads them; a tied head once, as the embedding. */
static status for_each_matrix(checkpoint *ck, matrix_fn fn)
{
    model_weights *w = &ck->weights;
    bool tied = w->head.data == w->embedding.data;
    TRY(fn(ck, &w->embedding));
    for (int l = 0; l < ck->config->n_layers; l++) {
        layer_weights *y = &w->layers[l];
        weight_matrix *const list[] = {&y->q,           &y->k,          &y->v,           &y->o,
                                       &y->router,      &y->dense.gate, &y->dense.up,    &y->dense.down,
                                       &y->shared.gate, &y->shared.up,  &y->shared.down, &y->shared_scale};
        TRY(each_of(ck, list, sizeof list / sizeof *list, fn));
        for (int e = 0; y->experts && e < ck->config->n_experts; e++) {
            weight_matrix *const parts[] = {&y->experts[e].gate, &y->experts[e].up, &y->experts[e].down};
            TRY(each_of(ck, parts, 3, fn));
        }
    }
    if (!tied)
        return fn(ck, &w->head);
    w->head = w->embedding;
    return STATUS_OK;
}

static status count_matrix(checkpoint *ck, weight_matrix *m)
{
    ck->copy_size += (matrix_bytes(m) + COPY_ALIGN - 1) / COPY_ALIGN * COPY_ALIGN;
    return STATUS_OK;
}

static status copy_matrix(checkpoint *ck, weight_matrix *m)
{
    size_t n = matrix_bytes(m);
    const void *from = m->data;
    unsigned char *to = ck->copy + ck->copy_used;
    checkpoint_advise(from, n, MADV_WILLNEED);
    memcpy(to, from, n);
    checkpoint_advise(from, n, MADV_DONTNEED); /* stays in the page cache for other ranks, but counts for this one no more */
    m->data = to;
    tell(ck, ck->copy_used + n, ck->copy_size);
    ck->copy_used += (n + COPY_ALIGN - 1) / COPY_ALIGN * COPY_ALIGN;
    return STATUS_OK;
}

status checkpoint_copy(checkpoint *ck)
{
    TRY(for_each_matrix(ck, count_matrix));
    void *area = mmap(NULL, ck->copy_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) {
        size_t wanted = ck->copy_size;
        ck->copy_size = 0;
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to copy %zu bytes of weights (%s)", ck->dir, wanted, strerror(errno));
    }
    ck->copy = area;
    madvise(area, ck->copy_size, MADV_HUGEPAGE);
    TRY(for_each_matrix(ck, copy_matrix));
    assert(ck->copy_used == ck->copy_size);
    checkpoint_advise_all(ck, MADV_DONTNEED); /* and what was mapped beside the copied bytes */
    return STATUS_OK;
}

/* ---- mapped: read ahead of the first step ---- */

typedef struct {
    const checkpoint *ck;
    bool (*stop)(void);
    size_t done, total;
} warming;

static void add_stretch(char *begin, char *end, bool ours, void *context)
{
    if (ours)
        ((warming *)context)->total += (size_t)(end - begin);
}

void checkpoint_populate(char *from, size_t n)
{
    if (madvise(from, n, MADV_POPULATE_READ) != 0) /* a kernel before 5.14 */
        for (size_t i = 0; i < n; i += 4096)
            (void)*(volatile char *)(from + i);
}

static void read_stretch(char *begin, char *end, bool ours, void *context)
{
    warming *w = context;
    for (char *at = begin; ours && at < end && !(w->stop && w->stop()); at += WARM_BYTES) {
        size_t n = (size_t)(end - at) < WARM_BYTES ? (size_t)(end - at) : WARM_BYTES;
        checkpoint_populate(at, n);
        w->done += n;
        tell(w->ck, w->done, w->total);
    }
}

void checkpoint_warm(checkpoint *ck, bool (*stop)(void))
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    warming w = {.ck = ck, .stop = stop};
    if (ck->copy || ck->weights.shared_bytes + ck->weights.expert_bytes > memory_available() / 2)
        return;
    for (int s = 0; s < ck->n_shards; s++)
        walk_stretches(&ck->shards[s], page, page, add_stretch, &w);
    tell(ck, 0, w.total);
    for (int s = 0; s < ck->n_shards; s++)
        walk_stretches(&ck->shards[s], page, page, read_stretch, &w);
}

/* ---- how much is in memory ---- */

static bool is_mapped_here(const checkpoint *ck, uintptr_t address)
{
    for (int s = 0; s < ck->n_shards; s++) {
        size_t size;
        uintptr_t start = (uintptr_t)safetensors_mapping(ck->shards[s].file, &size);
        if (address >= start && address < start + size)
            return true;
    }
    return false;
}

size_t checkpoint_resident_bytes(const checkpoint *ck)
{
    FILE *from = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long long begin, end, kib, total = ck->copy_used + ck->come_and_gone; /* copies are touched whole */
    bool ours = false;
    while (from && fgets(line, sizeof line, from)) {
        if (sscanf(line, "%llx-%llx ", &begin, &end) == 2)
            ours = is_mapped_here(ck, (uintptr_t)begin);
        else if (ours && sscanf(line, "Rss: %llu kB", &kib) == 1)
            total += kib * 1024;
    }
    if (from)
        fclose(from);
    return (size_t)total;
}
