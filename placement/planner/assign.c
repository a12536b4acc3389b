/* assign.c - LPT, then exchanges between the busiest rank and every other, then chains over three ranks, then kicks.
 *
 * An exchange gives a set A of at most two items of the busiest rank for a set B of at most two of another. Sets of one size are
 * kept sorted by their load, so the B that brings both ranks nearest to each other is found by walking two lists at once: one
 * round costs as many steps as there are sets, not as there are pairs of sets. */
#include "placement/planner/assign.h"
#include "proto/hash.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PAIRED = 48 }; /* ranks with more items than this exchange single items: there are differences enough among those */
enum { KICKS = 24, KICK_EVALUATIONS = 400000 };

typedef struct {
    double load;
    int a, b; /* items; -1: none */
} item_set;

typedef struct {
    int n, n_sets[3]; /* n_sets[c]: sets of c items */
    int *items;       /* [slots, at most n_items] */
    item_set *sets[3];
    double load;
    bool fresh; /* sets match items */
} bin;

typedef struct {
    const assign_task *t;
    bin *bins;
    int *rank;    /* [n_items] */
    double total; /* 1 where nothing has load, so that ratios stay finite */
    double bound;
    int64_t evaluations;
    void *memory;
} spread;

typedef struct {
    double worst; /* of the two ranks afterwards */
    int to;
    item_set give, take;
} exchange;

static double ratio(const spread *s, int g, double load)
{
    return load / (s->t->share[g] * s->total);
}

static int group_of(const spread *s, int item)
{
    return s->t->group ? s->t->group[item] : item;
}

static int busiest(const spread *s)
{
    int b = 0;
    for (int g = 1; g < s->t->n_ranks; g++)
        if (ratio(s, g, s->bins[g].load) > ratio(s, b, s->bins[b].load))
            b = g;
    return b;
}

static double worst_ratio(const spread *s)
{
    int b = busiest(s);
    return ratio(s, b, s->bins[b].load);
}

/* Summed anew, in order of items, so that a load does not depend on the way that led to it. */
static void bin_changed(spread *s, int g)
{
    bin *b = &s->bins[g];
    b->load = 0;
    for (int i = 0; i < b->n; i++)
        b->load += s->t->load[b->items[i]];
    b->fresh = false;
}

static int compare_sets(const void *x, const void *y)
{
    const item_set *a = x, *b = y;
    if (a->load != b->load)
        return a->load < b->load ? -1 : 1;
    if (a->a != b->a)
        return a->a - b->a;
    return a->b - b->b;
}

static void bin_sets(spread *s, int g)
{
    bin *b = &s->bins[g];
    if (b->fresh)
        return;
    b->n_sets[0] = 1;
    b->sets[0][0] = (item_set){0, -1, -1};
    b->n_sets[1] = b->n;
    b->n_sets[2] = 0;
    for (int i = 0; i < b->n; i++) {
        b->sets[1][i] = (item_set){s->t->load[b->items[i]], b->items[i], -1};
        for (int j = i + 1; j < b->n && b->n <= MAX_PAIRED; j++)
            b->sets[2][b->n_sets[2]++] = (item_set){s->t->load[b->items[i]] + s->t->load[b->items[j]], b->items[i], b->items[j]};
    }
    for (int c = 1; c <= 2; c++)
        qsort(b->sets[c], (size_t)b->n_sets[c], sizeof(item_set), compare_sets);
    b->fresh = true;
}

static void bin_remove(spread *s, int g, int item)
{
    bin *b = &s->bins[g];
    int i = 0;
    while (b->items[i] != item)
        i++;
    memmove(b->items + i, b->items + i + 1, (size_t)(b->n - i - 1) * sizeof *b->items);
    b->n--;
}

/* Items stay in rising order: loads are summed in it. */
static void bin_add(spread *s, int g, int item)
{
    bin *b = &s->bins[g];
    int i = b->n++;
    for (; i > 0 && b->items[i - 1] > item; i--)
        b->items[i] = b->items[i - 1];
    b->items[i] = item;
    s->rank[item] = g;
}

static void hand_over(spread *s, int from, int to, const item_set *set)
{
    int items[2] = {set->a, set->b};
    for (int i = 0; i < 2 && items[i] >= 0; i++)
        bin_remove(s, from, items[i]);
    for (int i = 0; i < 2 && items[i] >= 0; i++)
        bin_add(s, to, items[i]);
}

static bool in_set(const item_set *set, int item)
{
    return set && (set->a == item || set->b == item);
}

/* Whether rank g, having given `without`, holds another of item's group. */
static bool clashes(const spread *s, int g, const item_set *without, int item)
{
    if (!s->t->group || item < 0)
        return false;
    for (int i = 0; i < s->bins[g].n; i++)
        if (group_of(s, s->bins[g].items[i]) == group_of(s, item) && !in_set(without, s->bins[g].items[i]))
            return true;
    return false;
}

static bool sets_clash(const spread *s, int from, const item_set *give, int to, const item_set *take)
{
    return s->t->group && (clashes(s, to, take, give->a) || clashes(s, to, take, give->b) || clashes(s, from, give, take->a) ||
                           clashes(s, from, give, take->b));
}

static void consider(spread *s, int from, const item_set *give, int to, const item_set *take, exchange *best)
{
    double down = ratio(s, from, s->bins[from].load - give->load + take->load);
    double up = ratio(s, to, s->bins[to].load + give->load - take->load);
    double worst = down > up ? down : up;
    if (worst < best->worst && !sets_clash(s, from, give, to, take))
        *best = (exchange){worst, to, *give, *take};
}

/* Sets of `gives` items of `from` against sets of `takes` items of `to`: as the given load rises, so does the best taken one. */
static void consider_sizes(spread *s, int from, int gives, int to, int takes, exchange *best)
{
    const bin *f = &s->bins[from], *t = &s->bins[to];
    double sf = s->t->share[from], st = s->t->share[to];
    double shift = (f->load * st - t->load * sf) / (sf + st); /* load that evens the two out */
    int at = 0, n = t->n_sets[takes], reach = s->t->group ? 3 : 1;
    for (int i = 0; i < f->n_sets[gives]; i++) {
        const item_set *give = &f->sets[gives][i];
        while (at < n && t->sets[takes][at].load < give->load - shift)
            at++;
        for (int j = at - reach; j < at + reach; j++)
            if (j >= 0 && j < n)
                consider(s, from, give, to, &t->sets[takes][j], best);
    }
    s->evaluations += f->n_sets[gives] + n;
}

static bool exchange_once(spread *s)
{
    int from = busiest(s);
    exchange best = {.worst = ratio(s, from, s->bins[from].load) * (1 - 1e-12)};
    double before = best.worst;
    bin_sets(s, from);
    for (int to = 0; to < s->t->n_ranks; to++) {
        if (to == from || ratio(s, to, s->bins[to].load) >= before)
            continue;
        bin_sets(s, to);
        for (int gives = 1; gives <= 2; gives++)
            for (int takes = 0; takes <= 2; takes++)
                if (s->bins[to].n + gives - takes <= s->t->slots[to] && s->bins[from].n - gives + takes <= s->t->slots[from])
                    consider_sizes(s, from, gives, to, takes, &best);
    }
    if (best.worst >= before)
        return false;
    hand_over(s, from, best.to, &best.give);
    hand_over(s, best.to, from, &best.take);
    bin_changed(s, from);
    bin_changed(s, best.to);
    return true;
}

/* An item goes from the busiest rank to g, one of g's to h, one of h's back, when all three end below the busiest. */
static bool chain_through(spread *s, int from, int g, int h, double limit)
{
    const bin *f = &s->bins[from], *bg = &s->bins[g], *bh = &s->bins[h];
    const double *load = s->t->load;
    for (int i = 0; i < f->n; i++)
        for (int k = 0; k < bh->n; k++) {
            item_set a = {0, f->items[i], -1}, c = {0, bh->items[k], -1};
            if (ratio(s, from, f->load - load[a.a] + load[c.a]) >= limit || clashes(s, from, &a, c.a))
                continue;
            for (int j = 0; j < bg->n; j++) {
                item_set b = {0, bg->items[j], -1};
                s->evaluations++;
                if (ratio(s, g, bg->load + load[a.a] - load[b.a]) >= limit ||
                    ratio(s, h, bh->load + load[b.a] - load[c.a]) >= limit || clashes(s, g, &b, a.a) || clashes(s, h, &c, b.a))
                    continue;
                hand_over(s, from, g, &a);
                hand_over(s, g, h, &b);
                hand_over(s, h, from, &c);
                bin_changed(s, from);
                bin_changed(s, g);
                bin_changed(s, h);
                return true;
            }
        }
    return false;
}

static bool chain_once(spread *s)
{
    int from = busiest(s), n = s->t->n_ranks;
    double limit = ratio(s, from, s->bins[from].load) * (1 - 1e-12);
    for (int g = 0; g < n; g++)
        for (int h = 0; h < n; h++)
            if (g != from && h != from && g != h && s->evaluations < KICK_EVALUATIONS && chain_through(s, from, g, h, limit))
                return true;
    return false;
}

static bool good_enough(const spread *s)
{
    return worst_ratio(s) <= s->bound * (1 + 1e-4);
}

static void descend(spread *s)
{
    do
        while (!good_enough(s) && exchange_once(s))
            ;
    while (!good_enough(s) && chain_once(s));
}

static uint64_t mix(uint64_t x)
{
    return hash_mix(x + UINT64_C(0x9e3779b97f4a7c15));
}

static void load_ranks(spread *s, const int *rank)
{
    for (int g = 0; g < s->t->n_ranks; g++)
        s->bins[g].n = 0;
    for (int i = 0; i < s->t->n_items; i++)
        bin_add(s, rank[i], i);
    for (int g = 0; g < s->t->n_ranks; g++)
        bin_changed(s, g);
}

/* A few single items change places between the busiest rank and others, and between those. */
static void kick(spread *s, uint64_t *random)
{
    for (int i = 0; i < 3; i++) {
        int g = i == 0 ? busiest(s) : (int)(mix((*random)++) % (uint64_t)s->t->n_ranks);
        int h = (int)(mix((*random)++) % (uint64_t)s->t->n_ranks);
        if (g == h || s->bins[g].n == 0 || s->bins[h].n == 0)
            continue;
        item_set a = {0, s->bins[g].items[mix((*random)++) % (uint64_t)s->bins[g].n], -1};
        item_set b = {0, s->bins[h].items[mix((*random)++) % (uint64_t)s->bins[h].n], -1};
        if (sets_clash(s, g, &a, h, &b))
            continue;
        hand_over(s, g, h, &a);
        hand_over(s, h, g, &b);
        bin_changed(s, g);
        bin_changed(s, h);
    }
}

/* best [n_items]: scratch. Ends with the best assignment seen. */
static void improve(spread *s, int *best)
{
    size_t size = (size_t)s->t->n_items * sizeof *best;
    uint64_t random = 1;
    descend(s);
    double lowest = worst_ratio(s);
    memcpy(best, s->rank, size);
    for (int i = 0; i < KICKS && lowest > s->bound * (1 + 2e-3) && s->evaluations < KICK_EVALUATIONS; i++) {
        kick(s, &random);
        descend(s);
        if (worst_ratio(s) < lowest) {
            lowest = worst_ratio(s);
            memcpy(best, s->rank, size);
        } else {
            memcpy(s->rank, best, size);
            load_ranks(s, best);
        }
    }
    memcpy(s->rank, best, size);
}

/* A rank with room but one of the item's group takes an item from a full rank without the group, which then takes this one. */
static bool place_by_swap(spread *s, int item)
{
    int n = s->t->n_ranks;
    for (int g = 0; g < n; g++) {
        if (s->bins[g].n >= s->t->slots[g])
            continue;
        for (int h = 0; h < n; h++) {
            if (h == g || clashes(s, h, NULL, item))
                continue;
            for (int i = 0; i < s->bins[h].n; i++) {
                item_set moved = {0, s->bins[h].items[i], -1};
                if (clashes(s, g, NULL, moved.a))
                    continue;
                hand_over(s, h, g, &moved);
                bin_add(s, h, item);
                bin_changed(s, g);
                bin_changed(s, h);
                return true;
            }
        }
    }
    return false;
}

static bool place(spread *s, int item)
{
    int best = -1;
    double lowest = 0;
    for (int g = 0; g < s->t->n_ranks; g++) {
        double after = ratio(s, g, s->bins[g].load + s->t->load[item]);
        if (s->bins[g].n < s->t->slots[g] && (best < 0 || after < lowest) && !clashes(s, g, NULL, item)) {
            best = g;
            lowest = after;
        }
    }
    if (best < 0)
        return place_by_swap(s, item);
    bin_add(s, best, item);
    bin_changed(s, best);
    return true;
}

static int compare_falling(const void *x, const void *y)
{
    const item_set *a = x, *b = y;
    return a->load != b->load ? (a->load > b->load ? -1 : 1) : a->a - b->a;
}

static bool place_all(spread *s, item_set *order)
{
    for (int i = 0; i < s->t->n_items; i++)
        order[i] = (item_set){s->t->load[i], i, -1};
    qsort(order, (size_t)s->t->n_items, sizeof *order, compare_falling);
    for (int i = 0; i < s->t->n_items; i++)
        if (!place(s, order[i].a))
            return false;
    return true;
}

static size_t bin_room(const assign_task *t, int g)
{
    return (size_t)(t->slots[g] < t->n_items ? (t->slots[g] > 0 ? t->slots[g] : 0) : t->n_items);
}

static size_t pairs_of(size_t n)
{
    return n > MAX_PAIRED ? (size_t)MAX_PAIRED * (MAX_PAIRED - 1) / 2 : n * (n - 1) / 2;
}

/* All bins' lists in one block. */
static bool spread_open(spread *s, const assign_task *t, int *rank)
{
    *s = (spread){.t = t, .rank = rank, .bound = assign_bound(t)};
    if (t->n_ranks < 1)
        return false;
    for (int i = 0; i < t->n_items; i++)
        s->total += t->load[i];
    if (!(s->total > 0))
        s->total = 1;
    size_t n_sets = 0, n_items = 0;
    for (int g = 0; g < t->n_ranks; g++) {
        size_t n = bin_room(t, g) + 1; /* one more: an exchange adds before it takes */
        n_items += n + 2;
        n_sets += 1 + (n + 2) + pairs_of(n + 2);
    }
    s->bins = calloc((size_t)t->n_ranks, sizeof *s->bins);
    s->memory = malloc(n_sets * sizeof(item_set) + n_items * sizeof(int));
    if (!s->bins || !s->memory)
        return false;
    item_set *sets = s->memory;
    int *items = (int *)(sets + n_sets);
    for (int g = 0; g < t->n_ranks; g++) {
        size_t n = bin_room(t, g) + 3;
        bin *b = &s->bins[g];
        b->items = items;
        items += n;
        b->sets[0] = sets;
        b->sets[1] = sets + 1;
        b->sets[2] = sets + 1 + n;
        sets += 1 + n + pairs_of(n);
    }
    return true;
}

static void spread_close(spread *s)
{
    free(s->bins);
    free(s->memory);
}

static double solve(const assign_task *t, bool from_scratch, bool exchanges, int *rank)
{
    spread s;
    double worst = ASSIGN_NO_MEMORY;
    int *best = malloc(((size_t)t->n_items + 1) * sizeof *best);
    item_set *order = malloc(((size_t)t->n_items + 1) * sizeof *order);
    if (!spread_open(&s, t, rank) || !best || !order)
        goto out;
    if (!from_scratch) {
        memcpy(best, rank, (size_t)t->n_items * sizeof *best);
        load_ranks(&s, best);
    } else if (!place_all(&s, order)) {
        worst = ASSIGN_NO_ROOM;
        goto out;
    }
    if (exchanges)
        improve(&s, best);
    worst = assign_worst(t, rank);
out:
    spread_close(&s);
    free(order);
    free(best);
    return worst;
}

static bool has_room(const assign_task *t)
{
    int64_t room = 0;
    for (int g = 0; g < t->n_ranks; g++)
        room += (int64_t)bin_room(t, g);
    return room >= t->n_items;
}

double assign_spread(const assign_task *t, int *rank)
{
    return has_room(t) ? solve(t, true, true, rank) : ASSIGN_NO_ROOM;
}

double assign_first(const assign_task *t, int *rank)
{
    return has_room(t) ? solve(t, true, false, rank) : ASSIGN_NO_ROOM;
}

double assign_improve(const assign_task *t, int *rank)
{
    return solve(t, false, true, rank);
}

double assign_worst(const assign_task *t, const int *rank)
{
    double total = 0, worst = 0;
    for (int i = 0; i < t->n_items; i++)
        total += t->load[i];
    if (!(total > 0))
        return 1;
    for (int g = 0; g < t->n_ranks; g++) {
        double load = 0;
        for (int i = 0; i < t->n_items; i++)
            if (rank[i] == g)
                load += t->load[i];
        if (load / (t->share[g] * total) > worst)
            worst = load / (t->share[g] * total);
    }
    return worst;
}

static int compare_doubles(const void *x, const void *y)
{
    double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

double assign_bound(const assign_task *t)
{
    double total = 0, best = INFINITY;
    int64_t room = 0;
    double *load = malloc(((size_t)t->n_items + 1) * sizeof *load);
    if (!load || t->n_items == 0) {
        free(load);
        return 1;
    }
    memcpy(load, t->load, (size_t)t->n_items * sizeof *load);
    qsort(load, (size_t)t->n_items, sizeof *load, compare_doubles);
    for (int i = 0; i < t->n_items; i++)
        total += load[i];
    for (int g = 0; g < t->n_ranks; g++)
        room += (int64_t)bin_room(t, g);
    for (int g = 0; g < t->n_ranks; g++) {
        int64_t forced = t->n_items - (room - (int64_t)bin_room(t, g)); /* items that find no room on the other ranks */
        double here = load[t->n_items - 1];
        for (int64_t i = 0; i < forced - 1; i++)
            here += load[i];
        if (bin_room(t, g) > 0 && here / (t->share[g] * total) < best)
            best = here / (t->share[g] * total);
    }
    free(load);
    return total > 0 && best > 1 && best < INFINITY ? best : 1;
}
