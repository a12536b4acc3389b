/* checkpoint_experts.c - experts that come and go while steps run.
 *
 * Mapped: what comes becomes a memory area of its own (checkpoint_memory.c says why) and its pages are read; what goes is advised
 * away. Copied: what comes gets anonymous memory of its own; what goes gives its memory back, from the area of the start as well.
 */
#include "worker/checkpoint_parts.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PIECE_BYTES  ((size_t)256 << 10)
#define AROUND_BYTES ((ptrdiff_t)64 << 10) /* so far around a page that is asked for the system may bring others */

/* The expert's bytes as at most three stretches: neighbours in the file are one. */
typedef struct {
    char *begin[3], *end[3];
    int n;
} stretches;

static size_t bytes_of(const weight_matrix *m)
{
    return (size_t)m->n_out * (size_t)m->n_in * weight_format_size(m->format);
}

static size_t padded(size_t n)
{
    return (n + CHECKPOINT_COPY_ALIGN - 1) / CHECKPOINT_COPY_ALIGN * CHECKPOINT_COPY_ALIGN;
}

static void add_stretch(stretches *s, char *begin, size_t n)
{
    int at = s->n++;
    for (; at > 0 && s->begin[at - 1] > begin; at--) {
        s->begin[at] = s->begin[at - 1];
        s->end[at] = s->end[at - 1];
    }
    s->begin[at] = begin;
    s->end[at] = begin + n;
}

static stretches find_stretches(const mlp_weights *w)
{
    const weight_matrix *parts[] = {&w->gate, &w->up, &w->down};
    stretches s = {.n = 0};
    for (int i = 0; i < 3; i++)
        add_stretch(&s, (char *)(uintptr_t)parts[i]->data, bytes_of(parts[i]));
    int n = 0;
    for (int i = 1; i < s.n; i++)
        if (s.begin[i] - s.end[n] < CHECKPOINT_COPY_ALIGN) {
            s.end[n] = s.end[i];
        } else {
            s.begin[++n] = s.begin[i];
            s.end[n] = s.end[i];
        }
    s.n = n + 1;
    return s;
}

static mlp_weights stored_expert(const checkpoint *ck, int layer, int expert)
{
    mlp_weights w = ck->weights.layers[layer].experts[expert];
    const void **at = ck->stored + 3 * ((size_t)layer * (size_t)ck->config->n_experts + (size_t)expert);
    w.gate.data = at[0];
    w.up.data = at[1];
    w.down.data = at[2];
    return w;
}

size_t checkpoint_expert_bytes(const checkpoint *ck, int layer)
{
    const mlp_weights *w = &ck->weights.layers[layer].experts[0];
    return bytes_of(&w->gate) + bytes_of(&w->up) + bytes_of(&w->down);
}

/* Every change of advice may cut an area in three. */
static void advise_area(checkpoint *ck, char *begin, char *end, int advice)
{
    if (end <= begin || ck->n_areas_made >= CHECKPOINT_MAX_AREAS)
        return;
    ck->n_areas_made += 2;
    madvise(begin, (size_t)(end - begin), advice);
}

static uintptr_t page_size(void)
{
    return (uintptr_t)sysconf(_SC_PAGESIZE);
}

/* Pages that a neighbour shares stay: it may be in use. */
static void let_go_of(checkpoint *ck, const stretches *s)
{
    uintptr_t page = page_size();
    for (int i = 0; i < s->n; i++) {
        char *begin = (char *)(((uintptr_t)s->begin[i] + page - 1) & ~(page - 1)),
             *end = (char *)((uintptr_t)s->end[i] & ~(page - 1));
        if (end <= begin)
            continue;
        if (!ck->copy)
            advise_area(ck, begin, end, MADV_RANDOM);
        madvise(begin, (size_t)(end - begin), MADV_DONTNEED);
    }
}

static bool map_expert(checkpoint *ck, const mlp_weights *w, checkpoint_pace pace, void *arg)
{
    uintptr_t page = page_size();
    stretches s = find_stretches(w);
    for (int i = 0; i < s.n; i++) {
        char *begin = (char *)((uintptr_t)s.begin[i] & ~(page - 1)),
             *end = (char *)(((uintptr_t)s.end[i] + page - 1) & ~(page - 1));
        advise_area(ck, begin, end, MADV_NORMAL);
        for (char *at = begin; at < end; at += PIECE_BYTES) {
            size_t n = (size_t)(end - at) < PIECE_BYTES ? (size_t)(end - at) : PIECE_BYTES;
            madvise(at, n, MADV_WILLNEED);
            checkpoint_populate(at, n);
            if (!pace(arg, n)) {
                let_go_of(ck, &s);
                return false;
            }
        }
    }
    return true;
}

/* Copied weights are used nowhere but where they were copied to: pages that came in beside them go as well. They stay in the page
 * cache for other ranks, but count for this one no more. */
static void let_go_of_source(const checkpoint *ck, const stretches *s)
{
    for (int i = 0; i < s->n; i++)
        for (int k = 0; k < ck->n_shards; k++) {
            size_t size;
            char *map = (char *)(uintptr_t)safetensors_mapping(ck->shards[k].file, &size);
            if (s->begin[i] < map || s->begin[i] >= map + size)
                continue;
            char *begin = s->begin[i] - map < AROUND_BYTES ? map : s->begin[i] - AROUND_BYTES;
            char *end = map + size - s->end[i] < AROUND_BYTES ? map + size : s->end[i] + AROUND_BYTES;
            checkpoint_advise(begin, (size_t)(end - begin), MADV_DONTNEED);
        }
}

static status copy_expert(checkpoint *ck, const mlp_weights *from, checkpoint_pace pace, void *arg, bool *done, mlp_weights *to)
{
    weight_matrix *parts[] = {&to->gate, &to->up, &to->down};
    const weight_matrix *sources[] = {&from->gate, &from->up, &from->down};
    size_t size = padded(bytes_of(&from->gate)) + padded(bytes_of(&from->up)) + padded(bytes_of(&from->down));
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *at = memory;
    if (memory == MAP_FAILED)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to copy an expert of %zu bytes (%s)", ck->dir, size, strerror(errno));
    madvise(memory, size, MADV_HUGEPAGE);
    for (int i = 0; i < 3; i++) {
        size_t n = bytes_of(sources[i]), piece;
        parts[i]->data = at;
        for (size_t p = 0; p < n && *done; p += piece) {
            piece = n - p < PIECE_BYTES ? n - p : PIECE_BYTES;
            checkpoint_advise((const char *)sources[i]->data + p, piece, MADV_WILLNEED);
            memcpy(at + p, (const char *)sources[i]->data + p, piece);
            *done = pace(arg, piece);
        }
        at += padded(n);
    }
    stretches source = find_stretches(from);
    let_go_of_source(ck, &source);
    if (*done)
        ck->come_and_gone += size;
    else
        munmap(memory, size);
    return STATUS_OK;
}

status checkpoint_load_expert(checkpoint *ck, int layer, int expert, checkpoint_pace pace, void *arg, bool *done,
                              mlp_weights *out)
{
    mlp_weights stored = stored_expert(ck, layer, expert);
    *out = stored;
    *done = true;
    if (ck->copy)
        return copy_expert(ck, &stored, pace, arg, done, out);
    *done = map_expert(ck, &stored, pace, arg);
    return STATUS_OK;
}

static bool is_in_first_area(const checkpoint *ck, const mlp_weights *w)
{
    const unsigned char *at = w->gate.data;
    return at >= ck->copy && at < ck->copy + ck->copy_size;
}

void checkpoint_drop_expert(checkpoint *ck, const mlp_weights *w)
{
    size_t size = padded(bytes_of(&w->gate)) + padded(bytes_of(&w->up)) + padded(bytes_of(&w->down));
    if (ck->copy)
        ck->come_and_gone -= size;
    if (ck->copy && !is_in_first_area(ck, w)) {
        munmap((void *)(uintptr_t)w->gate.data, size);
        return;
    }
    stretches s = find_stretches(w);
    let_go_of(ck, &s);
}

mlp_weights checkpoint_place_expert(checkpoint *ck, int layer, int expert, const mlp_weights *weights)
{
    mlp_weights *at = &ck->weights.layers[layer].experts[expert], before = *at;
    size_t bytes = checkpoint_expert_bytes(ck, layer);
    ck->weights.expert_bytes += (weights ? bytes : 0) - (before.gate.data ? bytes : 0);
    if (weights)
        *at = *weights;
    else
        at->gate.data = at->up.data = at->down.data = NULL;
    return before;
}
