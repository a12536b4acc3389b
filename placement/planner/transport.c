/* The transportation problem by successive shortest paths.
 *
 * Items come one by one. Dijkstra runs over ranks: a full rank is left by moving one of its items on to another rank; the first
 * rank with a free slot that is reached ends the path, and every item on it moves. Potentials keep reduced costs from falling
 * below zero (Tomizawa 1971; Jonker and Volgenant 1987 for the assignment case). */
#include "placement/planner/transport.h"

#include <float.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int n_items, n_ranks;
    const double *cost;
    const int *slots;
    int *rank;
    double *item_price, *rank_price; /* cost - both >= 0, 0 where an item is */
    int *count;                      /* [n_ranks] items held */
    int *first, *next;               /* [n_ranks], [n_items]: the items of each rank as lists; -1 ends one */
    double *distance;                /* [n_ranks] */
    int *via;                        /* [n_ranks] the item that would move there */
    bool *done;
} transport;

static void rank_remove(transport *t, int g, int item)
{
    int *at = &t->first[g];
    while (*at != item)
        at = &t->next[*at];
    *at = t->next[item];
    t->count[g]--;
}

static void rank_add(transport *t, int g, int item)
{
    t->next[item] = t->first[g];
    t->first[g] = item;
    t->rank[item] = g;
    t->count[g]++;
}

static void reach(transport *t, int item, double so_far)
{
    const double *cost = t->cost + (size_t)item * (size_t)t->n_ranks;
    double base = so_far - t->item_price[item];
    for (int h = 0; h < t->n_ranks; h++) {
        double d = base + cost[h] - t->rank_price[h];
        if (d < t->distance[h] && !t->done[h]) {
            t->distance[h] = d;
            t->via[h] = item;
        }
    }
}

/* The nearest rank with a free slot, -1 when there is none. */
static int find_path(transport *t, int item)
{
    for (int h = 0; h < t->n_ranks; h++) {
        t->distance[h] = t->slots[h] > 0 ? DBL_MAX : -DBL_MAX; /* one without any slots is never reached */
        t->done[h] = t->slots[h] <= 0;
    }
    reach(t, item, 0);
    for (;;) {
        int g = -1;
        for (int h = 0; h < t->n_ranks; h++)
            if (!t->done[h] && (g < 0 || t->distance[h] < t->distance[g]))
                g = h;
        if (g < 0 || t->distance[g] == DBL_MAX)
            return -1;
        if (t->count[g] < t->slots[g])
            return g;
        t->done[g] = true;
        for (int i = t->first[g]; i >= 0; i = t->next[i])
            reach(t, i, t->distance[g]);
    }
}

static bool insert(transport *t, int item)
{
    int end = find_path(t, item);
    if (end < 0)
        return false;
    double length = t->distance[end];
    for (int g = 0; g < t->n_ranks; g++) {
        if (!t->done[g] || t->slots[g] <= 0)
            continue;
        for (int i = t->first[g]; i >= 0; i = t->next[i])
            t->item_price[i] += length - t->distance[g];
        t->rank_price[g] -= length - t->distance[g];
    }
    t->item_price[item] += length;
    for (int g = end;;) {
        int moved = t->via[g], from = moved == item ? -1 : t->rank[moved];
        if (from >= 0)
            rank_remove(t, from, moved);
        rank_add(t, g, moved);
        if (from < 0)
            return true;
        g = from;
    }
}

static void transport_close(transport *t)
{
    free(t->item_price);
    free(t->count);
    free(t->done);
}

static status transport_open(transport *t)
{
    size_t n = (size_t)t->n_items, ranks = (size_t)t->n_ranks;
    t->item_price = calloc(n + 2 * ranks, sizeof *t->item_price);
    t->count = calloc(3 * ranks + n, sizeof *t->count);
    t->done = calloc(ranks, sizeof *t->done);
    if (!t->item_price || !t->count || !t->done) {
        transport_close(t);
        return status_fail(STATUS_NO_MEMORY, "no memory to place %d items on %d ranks", t->n_items, t->n_ranks);
    }
    t->rank_price = t->item_price + n;
    t->distance = t->rank_price + ranks;
    t->via = t->count + ranks;
    t->first = t->via + ranks;
    t->next = t->first + ranks;
    for (size_t g = 0; g < ranks; g++)
        t->first[g] = -1;
    return STATUS_OK;
}

status transport_solve(int n_items, int n_ranks, const double *cost, const int *slots, int *rank, double *total)
{
    transport t = {.n_items = n_items, .n_ranks = n_ranks, .cost = cost, .slots = slots, .rank = rank};
    TRY(transport_open(&t));
    bool placed = true;
    for (int i = 0; i < n_items && placed; i++)
        placed = insert(&t, i);
    transport_close(&t);
    if (!placed)
        return status_fail(STATUS_BAD_INPUT, "the slots of %d ranks do not hold %d items", n_ranks, n_items);
    double sum = 0;
    for (int i = 0; i < n_items; i++)
        sum += cost[(size_t)i * (size_t)n_ranks + (size_t)rank[i]];
    if (total)
        *total = sum;
    return STATUS_OK;
}
