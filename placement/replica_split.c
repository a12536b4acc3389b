/* replica_split.c - "water-fill-1": whole experts first, then the busiest rank hands rows on until nobody can take any.
 *
 * Loads are worked out anew from whole numbers of rows and experts each time they change: no sum drifts, and every rank of a job
 * compares the same bits. */
#include "placement/replica_split.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Part of the rules, as replica_split.h says them. */
enum { ROUNDS_PER_COPY = 2, CHAIN_DEPTH = 4, TRIES_PER_COPY = 2 };
#define CHAIN_GOAL (1 - 1.0 / 1024)

struct replica_split {
    int n_ranks, n_experts, max_copies;
    /* of the call that runs */
    const double *row_us, *expert_us;
    const int *first, *ranks; /* of the layer: copies of e are first[e] - first[0] .., their ranks */
    int32_t *of_copy;         /* rows_of_copy */
    /* scratch */
    int32_t *rows, *served; /* [n_ranks] rows, experts with a row */
    double *load;           /* [n_ranks] microseconds */
    uint64_t *order;        /* [n_experts] experts with several copies and some rows, most rows first */
    int n_order;
    int *expert;      /* [max_copies] of a copy */
    int *by_rank;     /* [max_copies] the copies of an expert by rising rank */
    int tries;        /* of chains that are left */
    int *held_first;  /* [n_ranks + 1] of held */
    int *held;        /* [max_copies] copies by rank, of the experts in `order`, by rising expert */
    int *queue;       /* [n_ranks] of the path search */
    int *give, *take; /* [n_ranks] the copies by which the search came: rows leave `give`, arrive at `take` */
    int *depth;       /* [n_ranks] -1: not seen */
};

void replica_split_destroy(replica_split *s)
{
    if (!s)
        return;
    void *owned[] = {s->rows,       s->served, s->load,  s->order, s->expert, s->by_rank,
                     s->held_first, s->held,   s->queue, s->give,  s->take,   s->depth};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
    free(s);
}

status replica_split_create(int n_ranks, int n_experts, int max_copies, replica_split **out)
{
    replica_split *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory to split rows over replicas");
    size_t g = (size_t)n_ranks, e = (size_t)n_experts, c = (size_t)max_copies;
    s->n_ranks = n_ranks;
    s->n_experts = n_experts;
    s->max_copies = max_copies;
    s->rows = calloc(g, sizeof *s->rows);
    s->served = calloc(g, sizeof *s->served);
    s->load = calloc(g, sizeof *s->load);
    s->order = calloc(e, sizeof *s->order);
    s->expert = calloc(c, sizeof *s->expert);
    s->by_rank = calloc(c, sizeof *s->by_rank);
    s->held_first = calloc(g + 1, sizeof *s->held_first);
    s->held = calloc(c, sizeof *s->held);
    s->queue = calloc(g, sizeof *s->queue);
    s->give = calloc(g, sizeof *s->give);
    s->take = calloc(g, sizeof *s->take);
    s->depth = calloc(g, sizeof *s->depth);
    if (!s->rows || !s->served || !s->load || !s->order || !s->expert || !s->by_rank || !s->held_first || !s->held || !s->queue ||
        !s->give || !s->take || !s->depth) {
        replica_split_destroy(s);
        return status_fail(STATUS_NO_MEMORY, "no memory to split rows of %d experts over %d ranks", n_experts, n_ranks);
    }
    *out = s;
    return STATUS_OK;
}

static int copies_begin(const replica_split *s, int expert)
{
    return s->first[expert] - s->first[0];
}

/* What rank g would take with so many more rows and experts. */
static double load_with(const replica_split *s, int g, int32_t rows, int served)
{
    return (s->rows[g] + rows) * s->row_us[g] + (s->served[g] + served) * s->expert_us[g];
}

static void put_rows(replica_split *s, int copy, int32_t rows)
{
    int g = s->ranks[copy];
    s->served[g] += (s->of_copy[copy] + rows > 0) - (s->of_copy[copy] > 0);
    s->of_copy[copy] += rows;
    s->rows[g] += rows;
    s->load[g] = load_with(s, g, 0, 0);
}

static void hand_over(replica_split *s, int from, int to, int32_t rows)
{
    put_rows(s, from, -rows);
    put_rows(s, to, rows);
}

/* ---- start: single copies where they are, then whole experts, most rows first ---- */

static void sort_order(uint64_t *keys, int n)
{
    for (int gap = n / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
        for (int i = gap; i < n; i++) {
            uint64_t key = keys[i];
            int j = i;
            for (; j >= gap && keys[j - gap] > key; j -= gap)
                keys[j] = keys[j - gap];
            keys[j] = key;
        }
}

/* Fills rows and served by single copies, expert by copy, order by experts with several; counts what held_first will hold. */
static void take_stock(replica_split *s, const int32_t *rows)
{
    size_t n = (size_t)s->n_ranks;
    memset(s->rows, 0, n * sizeof *s->rows);
    memset(s->served, 0, n * sizeof *s->served);
    memset(s->held_first, 0, (n + 1) * sizeof *s->held_first);
    s->n_order = 0;
    for (int e = 0; e < s->n_experts; e++) {
        int begin = copies_begin(s, e), end = copies_begin(s, e + 1);
        for (int c = begin; c < end; c++)
            s->of_copy[c] = 0;
        if (rows[e] == 0)
            continue;
        if (end - begin == 1) {
            s->of_copy[begin] = rows[e];
            s->rows[s->ranks[begin]] += rows[e];
            s->served[s->ranks[begin]]++;
            continue;
        }
        s->order[s->n_order++] = (uint64_t)(INT32_MAX - rows[e]) << 32 | (unsigned)e;
        for (int c = begin; c < end; c++) {
            int at = c;
            for (; at > begin && s->ranks[s->by_rank[at - 1]] > s->ranks[c]; at--)
                s->by_rank[at] = s->by_rank[at - 1];
            s->by_rank[at] = c;
            s->expert[c] = e;
            s->held_first[s->ranks[c] + 1]++;
        }
    }
    for (int g = 0; g < s->n_ranks; g++)
        s->load[g] = load_with(s, g, 0, 0);
}

static void list_held(replica_split *s)
{
    for (int g = 0; g < s->n_ranks; g++)
        s->held_first[g + 1] += s->held_first[g];
    for (int i = 0; i < s->n_order; i++) { /* order is by expert still */
        int e = (int)(uint32_t)s->order[i];
        for (int c = copies_begin(s, e); c < copies_begin(s, e + 1); c++)
            s->held[s->held_first[s->ranks[c]]++] = c;
    }
    for (int g = s->n_ranks; g > 0; g--)
        s->held_first[g] = s->held_first[g - 1];
    s->held_first[0] = 0;
}

static void place_whole(replica_split *s, const int32_t *rows)
{
    for (int i = 0; i < s->n_order; i++) {
        int e = (int)(uint32_t)s->order[i], best = -1;
        double least = 0;
        for (int i2 = copies_begin(s, e); i2 < copies_begin(s, e + 1); i2++) {
            double load = load_with(s, s->ranks[s->by_rank[i2]], rows[e], 1);
            if (best < 0 || load < least) {
                best = s->by_rank[i2];
                least = load;
            }
        }
        put_rows(s, best, rows[e]);
    }
}

/* ---- improvement ---- */

/* Rows from a copy to another, and the load of the busier of their ranks after it. */
typedef struct {
    int from, to;
    int32_t rows;
    double busiest;
} shift;

/* Rows of `from` to `to` so that both ranks end nearest to equal: the answer rounded down. */
static int32_t even_rows(const replica_split *s, double load_from, double load_to, int from, int to)
{
    double rows = floor((load_from - load_to) / (s->row_us[from] + s->row_us[to]));
    return rows < 0 ? 0 : rows > INT32_MAX / 2 ? INT32_MAX / 2 : (int32_t)rows;
}

/* The best single shift from the busiest rank. */
static void try_shifts(const replica_split *s, int b, shift *best)
{
    for (int h = s->held_first[b]; h < s->held_first[b + 1]; h++) {
        int from = s->held[h], e = s->expert[from];
        int32_t have = s->of_copy[from];
        for (int i = copies_begin(s, e); have > 0 && i < copies_begin(s, e + 1); i++) {
            int to = s->by_rank[i], g = s->ranks[to], opens = s->of_copy[to] == 0;
            if (to == from || load_with(s, g, 1, opens) >= best->busiest)
                continue;
            int32_t even = even_rows(s, s->load[b], load_with(s, g, 0, opens), b, g), options[3] = {even, even + 1, have};
            for (int o = 0; o < 3; o++) {
                int32_t rows = options[o];
                if (rows < 1 || rows > have)
                    continue;
                double left = load_with(s, b, -rows, -(rows == have)), right = load_with(s, g, rows, opens);
                double busiest = left > right ? left : right;
                if (busiest < best->busiest)
                    *best = (shift){.from = from, .to = to, .rows = rows, .busiest = busiest};
            }
        }
    }
}

/* ---- chains ---- */

/* Rank u is at or above the goal; hand enough on to bring it below, and go on from whoever that brings there. True when all are
 * below; else nothing has changed. */
static bool find_chain(replica_split *s, int u, double goal, int depth)
{
    for (int h = s->held_first[u]; h < s->held_first[u + 1]; h++) {
        int from = s->held[h], e = s->expert[from];
        int32_t have = s->of_copy[from];
        double least = floor((s->load[u] - goal) / s->row_us[u]) + 1;
        int32_t options[2] = {least < have ? (int32_t)least : 0, load_with(s, u, -have, -1) < goal ? have : 0};
        for (int i = copies_begin(s, e); have > 0 && i < copies_begin(s, e + 1); i++) {
            int to = s->by_rank[i], w = s->ranks[to];
            if (to == from)
                continue;
            for (int o = 0; o < 2; o++) {
                if (options[o] == 0 || (depth == 1 && load_with(s, w, options[o], s->of_copy[to] == 0) >= goal))
                    continue;
                if (s->tries-- <= 0)
                    return false;
                hand_over(s, from, to, options[o]);
                if (s->load[w] < goal || (depth > 1 && find_chain(s, w, goal, depth - 1)))
                    return true;
                hand_over(s, to, from, options[o]);
            }
        }
    }
    return false;
}

/* ---- paths ---- */

/* The most rows that can go from the busiest rank along the path that ends in z; 0 when none does any good. */
static int32_t path_rows(const replica_split *s, int b, int z)
{
    int32_t most = INT32_MAX;
    for (int g = z; g != b; g = s->ranks[s->give[g]])
        if (s->of_copy[s->give[g]] < most)
            most = s->of_copy[s->give[g]];
    int opens = s->of_copy[s->take[z]] == 0;
    int32_t even = even_rows(s, s->load[b], load_with(s, z, 0, opens), b, z);
    even = even < 1 ? 1 : even;
    return even < most ? even : most;
}

/* Whether every rank of the path ends below what b has now, with so many rows handed on. */
static bool path_helps(const replica_split *s, int b, int z, int32_t rows)
{
    int g = z, closes = 0;
    double left;
    for (bool last = true; g != b; last = false) {
        int take = s->take[g], opens = s->of_copy[take] == 0;
        double load = load_with(s, g, last ? rows : 0, opens - closes);
        if (load > s->load[b] || (last && load == s->load[b]))
            return false;
        closes = s->of_copy[s->give[g]] == rows;
        g = s->ranks[s->give[g]];
    }
    left = load_with(s, b, -rows, -closes);
    return left < s->load[b];
}

static void walk_path(replica_split *s, int b, int z, int32_t rows)
{
    for (int g = z; g != b;) {
        int give = s->give[g], take = s->take[g];
        g = s->ranks[give];
        hand_over(s, give, take, rows);
    }
}

/* Breadth first from the busiest rank b, over copies that have rows to ranks that stay below it. True when a path was walked. */
static bool find_path(replica_split *s, int b)
{
    int n = 1;
    for (int g = 0; g < s->n_ranks; g++)
        s->depth[g] = -1;
    s->depth[b] = 0;
    s->queue[0] = b;
    for (int q = 0; q < n; q++) {
        int u = s->queue[q];
        for (int h = s->held_first[u]; h < s->held_first[u + 1]; h++) {
            int give = s->held[h], e = s->expert[give];
            for (int i = copies_begin(s, e); s->of_copy[give] > 0 && i < copies_begin(s, e + 1); i++) {
                int take = s->by_rank[i], v = s->ranks[take], opens = s->of_copy[take] == 0;
                if (s->depth[v] >= 0 || load_with(s, v, 0, opens) > s->load[b])
                    continue;
                s->depth[v] = s->depth[u] + 1;
                s->give[v] = give;
                s->take[v] = take;
                s->queue[n++] = v;
                if (s->depth[v] < 2)
                    continue; /* single shifts have been tried */
                int32_t rows = path_rows(s, b, v);
                if (path_helps(s, b, v, rows)) {
                    walk_path(s, b, v, rows);
                    return true;
                }
            }
        }
    }
    return false;
}

static int busiest_rank(const replica_split *s)
{
    int b = 0;
    for (int g = 1; g < s->n_ranks; g++)
        if (s->load[g] > s->load[b])
            b = g;
    return b;
}

/* One round: false when nothing relieves the busiest rank. */
static bool improve(replica_split *s)
{
    int b = busiest_rank(s);
    shift best = {.busiest = s->load[b], .from = -1};
    try_shifts(s, b, &best);
    if (best.from >= 0)
        hand_over(s, best.from, best.to, best.rows);
    return best.from >= 0 || find_path(s, b) || find_chain(s, b, s->load[b] * CHAIN_GOAL, CHAIN_DEPTH);
}

void replica_split_rows(replica_split *s, const plan *p, int layer, const double *row_us, const double *expert_us,
                        const int32_t *rows, int32_t *rows_of_copy)
{
    s->row_us = row_us;
    s->expert_us = expert_us;
    s->first = p->first_copy + (size_t)layer * (size_t)p->n_experts;
    s->ranks = p->copy_ranks + s->first[0];
    s->of_copy = rows_of_copy;
    take_stock(s, rows);
    list_held(s);
    sort_order(s->order, s->n_order);
    place_whole(s, rows);
    s->tries = TRIES_PER_COPY * copies_begin(s, s->n_experts);
    for (int i = ROUNDS_PER_COPY * (copies_begin(s, s->n_experts)); i > 0 && improve(s); i--)
        ;
}

/* ---- which copy serves which owner ---- */

typedef enum { OWN_COPY, SAME_NODE, ANYWHERE, N_CIRCLES } circle;

static bool within(const plan *p, circle c, int owner, int rank)
{
    return c == ANYWHERE || (c == OWN_COPY ? rank == owner : p->node_of_rank[rank] == p->node_of_rank[owner]);
}

/* Gives an owner's rows of one expert that no copy has yet to the copies within the circle. */
static void fill_quota(const plan *p, circle near, int owner, const int *ranks, int n, int32_t rows, int32_t *left,
                       int32_t *quota)
{
    for (int c = 0; c < n && near > OWN_COPY; c++)
        rows -= quota[c];
    for (int c = 0; c < n && rows > 0; c++) {
        int32_t gets = !within(p, near, owner, ranks[c]) ? 0 : rows < left[c] ? rows : left[c];
        quota[c] += gets;
        left[c] -= gets;
        rows -= gets;
    }
}

/* Experts do not touch each other's copies, so they may stand in the innermost loop, where memory is read in order. */
void replica_split_owners(replica_split *s, const plan *p, int layer, int n_owners, const int32_t *rows_of_owner,
                          const int32_t *rows_of_copy, int32_t *quota)
{
    const int *first = p->first_copy + (size_t)layer * (size_t)p->n_experts, *ranks = p->copy_ranks + first[0];
    size_t n_copies = (size_t)(first[p->n_experts] - first[0]), n_experts = (size_t)p->n_experts;
    int *left = s->held, *several = s->expert, n_several = 0; /* rows a copy has not been given yet; experts with several */
    memcpy(left, rows_of_copy, n_copies * sizeof *left);
    memset(quota, 0, (size_t)n_owners * n_copies * sizeof *quota);
    for (int e = 0; e < p->n_experts; e++)
        if (first[e + 1] - first[e] > 1)
            several[n_several++] = e;
    for (size_t o = 0; o < (size_t)n_owners; o++)
        for (int e = 0; e < p->n_experts; e++)
            if (first[e + 1] - first[e] == 1)
                quota[o * n_copies + (size_t)(first[e] - first[0])] = rows_of_owner[o * n_experts + (size_t)e];
    for (int near = OWN_COPY; near < N_CIRCLES; near++)
        for (int o = 0; o < n_owners; o++)
            for (int i = 0; i < n_several; i++) {
                int e = several[i], begin = first[e] - first[0], n = first[e + 1] - first[e];
                int32_t rows = rows_of_owner[(size_t)o * n_experts + (size_t)e];
                if (rows > 0)
                    fill_quota(p, (circle)near, o, ranks + begin, n, rows, left + begin, quota + (size_t)o * n_copies + begin);
            }
}

double replica_split_busiest(const plan *p, int layer, const double *row_us, const double *expert_us, const int32_t *rows_of_copy)
{
    const int *first = p->first_copy + (size_t)layer * (size_t)p->n_experts, *ranks = p->copy_ranks + first[0];
    int n_copies = first[p->n_experts] - first[0];
    double worst = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        int32_t rows = 0, served = 0;
        for (int c = 0; c < n_copies; c++)
            if (ranks[c] == g) {
                rows += rows_of_copy[c];
                served += rows_of_copy[c] > 0;
            }
        double us = rows * row_us[g] + served * expert_us[g];
        worst = us > worst ? us : worst;
    }
    return worst;
}
