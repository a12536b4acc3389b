#include "cluster/sequence_set.h"

#include <stdlib.h>
#include <string.h>

static size_t home_of(const sequence_set *s, uint64_t id)
{
    return (size_t)((id * 0x9e3779b97f4a7c15u) >> 20) & (s->capacity - 1);
}

/* Where the id is, or where it would go. */
static size_t find(const sequence_set *s, uint64_t id)
{
    size_t i = home_of(s, id);
    while (s->ids[i] != 0 && s->ids[i] != id)
        i = (i + 1) & (s->capacity - 1);
    return i;
}

static bool grow(sequence_set *s)
{
    sequence_set larger = {.capacity = s->capacity ? 2 * s->capacity : 256, .n = s->n, .n_held = s->n_held};
    larger.ids = calloc(larger.capacity, sizeof *larger.ids);
    larger.held = calloc(larger.capacity, sizeof *larger.held);
    if (!larger.ids || !larger.held) {
        sequence_set_free(&larger);
        return false;
    }
    for (size_t i = 0; i < s->capacity; i++)
        if (s->ids[i]) {
            size_t at = find(&larger, s->ids[i]);
            larger.ids[at] = s->ids[i];
            larger.held[at] = s->held[i];
        }
    sequence_set_free(s);
    *s = larger;
    return true;
}

void sequence_set_clear(sequence_set *s)
{
    if (s->capacity) {
        memset(s->ids, 0, s->capacity * sizeof *s->ids);
        memset(s->held, 0, s->capacity * sizeof *s->held);
    }
    s->n = s->n_held = 0;
}

void sequence_set_free(sequence_set *s)
{
    free(s->ids);
    free(s->held);
    *s = (sequence_set){0};
}

bool sequence_set_add(sequence_set *s, uint64_t id)
{
    if (2 * (s->n + 1) > s->capacity && !grow(s))
        return false;
    size_t at = find(s, id);
    if (id == 0 || s->ids[at] == id)
        return true;
    s->ids[at] = id;
    s->held[at] = false;
    s->n++;
    return true;
}

void sequence_set_remove(sequence_set *s, uint64_t id)
{
    if (s->n == 0 || id == 0)
        return;
    size_t at = find(s, id), mask = s->capacity - 1;
    if (s->ids[at] == 0)
        return;
    s->n--;
    s->n_held -= s->held[at];
    /* Whoever lies behind and could not lie at home moves up, so that no search stops at the gap. */
    for (size_t i = (at + 1) & mask; s->ids[i]; i = (i + 1) & mask) {
        size_t home = home_of(s, s->ids[i]);
        if (((i - home) & mask) >= ((i - at) & mask)) {
            s->ids[at] = s->ids[i];
            s->held[at] = s->held[i];
            at = i;
        }
    }
    s->ids[at] = 0;
    s->held[at] = false;
}

void sequence_set_hold(sequence_set *s, uint64_t id, bool hold)
{
    if (s->n == 0 || id == 0)
        return;
    size_t at = find(s, id);
    if (s->ids[at] == id && s->held[at] != hold) {
        s->held[at] = hold;
        s->n_held += hold ? 1 : (size_t)-1;
    }
}
