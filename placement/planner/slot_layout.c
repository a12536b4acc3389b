#include "placement/planner/slot_layout.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void slot_layout_clear(slot_layout *layout)
{
    free(layout->layer_numbers);
    free(layout->expert_of_slot);
    *layout = (slot_layout){0};
}

status slot_layout_create(const char *where, int n_layers, int n_slots, int n_experts, int n_ranks, slot_layout *out)
{
    if (n_layers < 1 || n_experts < 1 || n_experts > PLAN_MAX_EXPERTS || n_ranks < 1 || n_ranks > PLAN_MAX_RANKS)
        return status_fail(STATUS_BAD_INPUT, "%s: %d experts in %d layers on %d ranks cannot be planned", where, n_experts,
                           n_layers, n_ranks);
    if (n_slots < n_experts || n_slots % n_ranks != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: %d slots for %d experts cannot be cut into equal blocks for %d ranks", where,
                           n_slots, n_experts, n_ranks);
    slot_layout s = {.n_layers = n_layers, .n_slots = n_slots, .n_experts = n_experts, .n_ranks = n_ranks};
    size_t n = (size_t)n_layers * (size_t)n_slots;
    s.layer_numbers = calloc((size_t)n_layers, sizeof *s.layer_numbers);
    s.expert_of_slot = n < INT_MAX ? malloc(n * sizeof *s.expert_of_slot) : NULL;
    if (!s.layer_numbers || !s.expert_of_slot) {
        slot_layout_clear(&s);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers of %d slots", where, n_layers, n_slots);
    }
    for (int l = 0; l < n_layers; l++)
        s.layer_numbers[l] = l;
    memset(s.expert_of_slot, 0xff, n * sizeof *s.expert_of_slot);
    *out = s;
    return STATUS_OK;
}

/* ---- from a plan ---- */

/* held [n_ranks] */
static void count_held(const plan *p, int layer, int *held)
{
    memset(held, 0, (size_t)p->n_ranks * sizeof *held);
    for (int e = 0; e < p->n_experts; e++)
        for (int c = 0; c < plan_n_copies(p, layer, e); c++)
            held[plan_copies(p, layer, e)[c]]++;
}

static status count_block(const char *engine, const plan *p, int *held, int *block)
{
    *block = 0;
    for (int l = 0; l < p->n_layers; l++) {
        count_held(p, l, held);
        for (int r = 0; r < p->n_ranks; r++) {
            if (held[r] == 0)
                return status_fail(STATUS_UNSUPPORTED,
                                   "%s: rank %d holds no expert of layer %d, but this format wants as many on every rank", engine,
                                   r, p->layer_numbers[l]);
            *block = held[r] > *block ? held[r] : *block;
        }
    }
    return STATUS_OK;
}

enum { HOME_OF_SEVERAL, SINGLE, REPLICA, N_TURNS };

static int turn_of(const plan *p, int layer, int expert, int copy)
{
    return copy > 0 ? REPLICA : plan_n_copies(p, layer, expert) > 1 ? HOME_OF_SEVERAL : SINGLE;
}

/* Padding repeats single copies, whose load it cannot move, before homes of several, before replicas; in turn. */
static void pad_block(int *slots, int n_homes, int n_singles, int n_replicas, int block)
{
    int n_held = n_homes + n_singles + n_replicas, n_padding = block - n_held, from = 0, n = n_held, to = n_held;
    if (n_singles > 0) {
        from = n_homes;
        n = n_singles;
    } else if (n_homes > 0) {
        n = n_homes;
    }
    if (n_homes + n_singles > 0) { /* replicas move to the end */
        to = n_homes + n_singles;
        memmove(slots + to + n_padding, slots + to, (size_t)n_replicas * sizeof *slots);
    }
    for (int i = 0; i < n_padding; i++)
        slots[to + i] = slots[from + i % n];
}

/* counts [n_ranks][N_TURNS]: scratch. */
static void fill_layer(const plan *p, int layer, int block, int *counts, int *slots)
{
    memset(counts, 0, (size_t)p->n_ranks * N_TURNS * sizeof *counts);
    for (int turn = 0; turn < N_TURNS; turn++)
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0; c < plan_n_copies(p, layer, e); c++) {
                if (turn_of(p, layer, e, c) != turn)
                    continue;
                int rank = plan_copies(p, layer, e)[c], *n = counts + rank * N_TURNS;
                slots[rank * block + n[0] + n[1] + n[2]] = e;
                n[turn]++;
            }
    for (int r = 0; r < p->n_ranks; r++)
        pad_block(slots + r * block, counts[r * N_TURNS], counts[r * N_TURNS + 1], counts[r * N_TURNS + 2], block);
}

/* By the rule: which slot of the layer is each expert's home, -1: none. */
static void find_homes(const slot_layout *s, int layer, int *home)
{
    int block = s->n_slots / s->n_ranks;
    const int *experts = s->expert_of_slot + (size_t)layer * (size_t)s->n_slots;
    for (int e = 0; e < s->n_experts; e++)
        home[e] = -1;
    for (int i = 0; i < block; i++)
        for (int r = 0; r < s->n_ranks; r++) {
            int e = experts[r * block + i];
            if (e >= 0 && home[e] < 0)
                home[e] = r * block + i;
        }
}

static int count_lost(const plan *p, const slot_layout *s, int *home)
{
    int lost = 0, block = s->n_slots / s->n_ranks;
    for (int l = 0; l < p->n_layers; l++) {
        find_homes(s, l, home);
        for (int e = 0; e < p->n_experts; e++)
            lost += home[e] / block != plan_copies(p, l, e)[0];
    }
    return lost;
}

status slot_layout_of_plan(const char *engine, const plan *p, slot_layout *out, int *homes_lost)
{
    slot_layout s = {0};
    int block = 0, *scratch = calloc((size_t)p->n_ranks * N_TURNS + (size_t)p->n_experts, sizeof *scratch);
    if (!scratch)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d ranks", engine, p->n_ranks);
    status st;
    TRY_GOTO(count_block(engine, p, scratch, &block), out);
    if (block > INT_MAX / p->n_ranks) {
        st = status_fail(STATUS_UNSUPPORTED, "%s: %d slots on each of %d ranks are too many", engine, block, p->n_ranks);
        goto out;
    }
    TRY_GOTO(slot_layout_create(engine, p->n_layers, block * p->n_ranks, p->n_experts, p->n_ranks, &s), out);
    for (int l = 0; l < p->n_layers; l++) {
        s.layer_numbers[l] = p->layer_numbers[l];
        fill_layer(p, l, block, scratch, s.expert_of_slot + (size_t)l * (size_t)s.n_slots);
    }
    if (homes_lost)
        *homes_lost = count_lost(p, &s, scratch);
    *out = s;
out:
    free(scratch);
    return st;
}

/* ---- to a plan ---- */

static status allocate_plan(const char *where, const slot_layout *s, plan *p)
{
    size_t n_lists = (size_t)s->n_layers * (size_t)s->n_experts, n_copies = (size_t)s->n_layers * (size_t)s->n_slots;
    *p = (plan){.n_ranks = s->n_ranks, .n_experts = s->n_experts, .n_layers = s->n_layers};
    p->layer_numbers = calloc((size_t)s->n_layers, sizeof *p->layer_numbers);
    p->node_of_rank = calloc((size_t)s->n_ranks, sizeof *p->node_of_rank);
    p->first_copy = n_lists < INT_MAX ? calloc(n_lists + 1, sizeof *p->first_copy) : NULL;
    p->copy_ranks = calloc(n_copies + 1, sizeof *p->copy_ranks);
    if (p->layer_numbers && p->node_of_rank && p->first_copy && p->copy_ranks)
        return STATUS_OK;
    plan_clear(p);
    return status_fail(STATUS_NO_MEMORY, "%s: no memory for a plan of %zu copies", where, n_copies);
}

/* Slots of a layer sorted by expert: next_slot[slot] is the next one of the same expert, first[expert] the first; both -1: none.
 */
static status chain_slots(const char *where, const slot_layout *s, int layer, int *first, int *next_slot)
{
    const int *experts = s->expert_of_slot + (size_t)layer * (size_t)s->n_slots;
    for (int e = 0; e < s->n_experts; e++)
        first[e] = -1;
    for (int i = s->n_slots - 1; i >= 0; i--) {
        int e = experts[i];
        if (e < 0 || e >= s->n_experts)
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d: slot %d: expert %d is outside 0 to %d", where,
                               s->layer_numbers[layer], i, e, s->n_experts - 1);
        next_slot[i] = first[e];
        first[e] = i;
    }
    for (int e = 0; e < s->n_experts; e++)
        if (first[e] < 0)
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d is in no slot", where, s->layer_numbers[layer], e);
    return STATUS_OK;
}

/* home: slot of the expert's home. */
static void add_copies(const slot_layout *s, int home, int slot, const int *next_slot, plan *p, int *at)
{
    int block = s->n_slots / s->n_ranks, home_rank = home / block, last = -1;
    p->copy_ranks[(*at)++] = home_rank;
    for (; slot >= 0; slot = next_slot[slot]) { /* slots rise, so do ranks */
        int rank = slot / block;
        if (rank != last && rank != home_rank)
            p->copy_ranks[(*at)++] = rank;
        last = rank;
    }
}

static status read_layers(const char *where, const slot_layout *s, const int *first_slot, int *scratch, plan *p)
{
    int *first = scratch, *home = first + s->n_experts, *next_slot = home + s->n_experts, at = 0;
    for (int l = 0; l < s->n_layers; l++) {
        if (s->layer_numbers[l] < 0 || (l > 0 && s->layer_numbers[l] <= s->layer_numbers[l - 1]))
            return status_fail(STATUS_BAD_INPUT, "%s: layer numbers do not rise at %d", where, s->layer_numbers[l]);
        p->layer_numbers[l] = s->layer_numbers[l];
        TRY(chain_slots(where, s, l, first, next_slot));
        find_homes(s, l, home);
        for (int e = 0; e < s->n_experts; e++) {
            size_t list = (size_t)l * (size_t)s->n_experts + (size_t)e;
            p->first_copy[list] = at;
            add_copies(s, first_slot ? first_slot[list] : home[e], first[e], next_slot, p, &at);
        }
    }
    p->first_copy[(size_t)s->n_layers * (size_t)s->n_experts] = at;
    return STATUS_OK;
}

status slot_layout_to_plan(const char *where, const slot_layout *s, const int *first_slot, int n_nodes, const char *name,
                           plan *out)
{
    if (n_nodes > s->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: %d ranks cannot be on %d nodes", where, s->n_ranks, n_nodes);
    plan p;
    TRY(allocate_plan(where, s, &p));
    int *scratch = calloc(2 * (size_t)s->n_experts + (size_t)s->n_slots, sizeof *scratch);
    status st = scratch ? read_layers(where, s, first_slot, scratch, &p)
                        : status_fail(STATUS_NO_MEMORY, "%s: no memory for %d slots", where, s->n_slots);
    free(scratch);
    if (st != STATUS_OK) {
        plan_clear(&p);
        return st;
    }
    for (int r = 0; n_nodes > 0 && r < p.n_ranks; r++)
        p.node_of_rank[r] = (int)((long long)r * n_nodes / p.n_ranks);
    snprintf(p.name, sizeof p.name, "%s", name);
    *out = p;
    return STATUS_OK;
}
