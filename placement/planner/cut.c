/* One layer's tokens as a hypergraph, with exact gains. */
#include "placement/planner/cut.h"
#include "proto/hash.h"

#include <stdlib.h>
#include <string.h>

enum { NONE = ROUTING_NO_EXPERT };

/* ---- edges ---- */

bool cut_counts_owners(const problem *p)
{
    return p->schedule && p->request->replay.owners != OWNER_AFFINITY;
}

static int64_t token_count(const problem *p)
{
    return cut_counts_owners(p) ? p->schedule->first[p->schedule->n_steps] : p->traffic->n_tokens;
}

/* Token i's experts, rising, and NONE behind them; then its owner. */
static void read_token(const problem *p, int layer, int64_t i, uint16_t *key)
{
    bool owners = cut_counts_owners(p);
    const uint16_t *experts = traffic_experts(p->traffic, layer, owners ? p->schedule->token[i] : i);
    int k = p->traffic->shape.top_k;
    for (int j = 0; j < k; j++) {
        int at = j; /* NONE is the largest number, so it sorts behind */
        for (; at > 0 && key[at - 1] > experts[j]; at--)
            key[at] = key[at - 1];
        key[at] = experts[j];
    }
    key[k] = owners ? p->schedule->owner[i] : NONE;
}

/* Equal sets become one edge: slots of an open-addressed table hold edges' numbers, -1: free. */
static void group_tokens(cut *c, int64_t n_tokens, int32_t *table, size_t mask, uint16_t *key)
{
    size_t k = (size_t)c->top_k;
    for (int64_t i = 0; i < n_tokens; i++) {
        read_token(c->p, c->layer, i, key);
        size_t at = (size_t)hash_bytes(HASH_START, key, (k + 1) * sizeof *key) & mask;
        while (table[at] >= 0 &&
               (memcmp(c->pins + (size_t)table[at] * k, key, k * sizeof *key) != 0 || c->owner[table[at]] != key[k]))
            at = (at + 1) & mask;
        if (table[at] < 0) {
            table[at] = c->n_edges;
            memcpy(c->pins + (size_t)c->n_edges * k, key, k * sizeof *key);
            c->owner[c->n_edges] = key[k];
            c->weight[c->n_edges++] = 0;
        }
        c->weight[table[at]]++;
    }
}

static status make_edges(cut *c)
{
    int64_t n = token_count(c->p);
    size_t k = (size_t)c->top_k, size = 16;
    if (n >= INT32_MAX / 4)
        return status_fail(STATUS_UNSUPPORTED, "cut: %lld tokens are more than it can count; plan from a part of them",
                           (long long)n);
    while (size < 2 * (size_t)n)
        size *= 2;
    int32_t *table = malloc(size * sizeof *table);
    uint16_t *key = malloc((k + 1) * sizeof *key);
    c->pins = malloc(((size_t)n * k + 1) * sizeof *c->pins);
    c->owner = malloc(((size_t)n + 1) * sizeof *c->owner);
    c->weight = malloc(((size_t)n + 1) * sizeof *c->weight);
    bool fits = table && key && c->pins && c->owner && c->weight;
    if (fits) {
        memset(table, 0xff, size * sizeof *table);
        group_tokens(c, n, table, size - 1, key);
    }
    free(table);
    free(key);
    return fits ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for %lld tokens of a layer", (long long)n);
}

static status list_edges(cut *c)
{
    int n = c->p->n_experts;
    size_t pins = (size_t)c->n_edges * (size_t)c->top_k;
    c->first_edge = calloc((size_t)n + 2, sizeof *c->first_edge);
    c->edge_of = malloc((pins + 1) * sizeof *c->edge_of);
    if (!c->first_edge || !c->edge_of)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu choices of experts", pins);
    for (size_t i = 0; i < pins; i++)
        if (c->pins[i] != NONE)
            c->first_edge[c->pins[i] + 2]++;
    for (int e = 0; e < n; e++)
        c->first_edge[e + 2] += c->first_edge[e + 1];
    for (size_t i = 0; i < pins; i++) /* first_edge[e + 1] walks to where e's list ends, which is where e + 1's begins */
        if (c->pins[i] != NONE)
            c->edge_of[c->first_edge[c->pins[i] + 1]++] = (int)(i / (size_t)c->top_k);
    return STATUS_OK;
}

status cut_open(const problem *p, int layer, cut *out)
{
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    cut c = {.p = p, .layer = layer, .top_k = p->traffic->shape.top_k};
    status st = make_edges(&c);
    if (st == STATUS_OK)
        st = list_edges(&c);
    c.home = malloc(n * sizeof *c.home);
    c.load = malloc(ranks * sizeof *c.load);
    c.count = malloc(ranks * sizeof *c.count);
    c.degree = malloc(n * sizeof *c.degree);
    c.alone = malloc(n * sizeof *c.alone);
    c.present = malloc(n * ranks * sizeof *c.present);
    c.pair = malloc(n * n * sizeof *c.pair);
    if (st == STATUS_OK && (!c.home || !c.load || !c.count || !c.degree || !c.alone || !c.present || !c.pair))
        st = status_fail(STATUS_NO_MEMORY, "no memory for a layer of %d experts", p->n_experts);
    if (st == STATUS_OK)
        *out = c;
    else
        cut_close(&c);
    return st;
}

void cut_close(cut *c)
{
    free(c->pins);
    free(c->weight);
    free(c->owner);
    free(c->first_edge);
    free(c->edge_of);
    free(c->home);
    free(c->load);
    free(c->count);
    free(c->degree);
    free(c->alone);
    free(c->present);
    free(c->pair);
    *c = (cut){0};
}

/* ---- tables ---- */

static const uint16_t *pins_of(const cut *c, int edge)
{
    return c->pins + (size_t)edge * (size_t)c->top_k;
}

/* Ranks of an edge's members, those on the same rank counted, the owner among them. */
static int edge_ranks(const cut *c, int edge, const int *home)
{
    const uint16_t *pins = pins_of(c, edge);
    int distinct = c->owner[edge] != NONE;
    for (int i = 0; i < c->top_k && pins[i] != NONE; i++) {
        bool seen = home[pins[i]] == c->owner[edge];
        for (int j = 0; j < i && !seen; j++)
            seen = home[pins[j]] == home[pins[i]];
        distinct += !seen;
    }
    return distinct;
}

int64_t cut_cost(const cut *c, const int *home)
{
    int64_t sum = 0;
    for (int i = 0; i < c->n_edges; i++) {
        int ranks = edge_ranks(c, i, home);
        sum += ranks > 0 ? (int64_t)c->weight[i] * (ranks - 1) : 0;
    }
    return sum;
}

/* Members of the edge on rank g, the owner too; *one: the last of the experts among them, NONE if it is the owner alone. */
static int members_on(const cut *c, int edge, int g, int *one)
{
    const uint16_t *pins = pins_of(c, edge);
    int n = c->owner[edge] == g;
    *one = NONE;
    for (int i = 0; i < c->top_k && pins[i] != NONE; i++)
        if (c->home[pins[i]] == g) {
            n++;
            *one = pins[i];
        }
    return n;
}

static void add_alone(cut *c, const uint16_t *pins, int e, int32_t weight)
{
    int32_t *pair = c->pair + (size_t)e * (size_t)c->p->n_experts;
    c->alone[e] += weight;
    for (int i = 0; i < c->top_k && pins[i] != NONE; i++)
        if (pins[i] != e)
            pair[pins[i]] += weight;
}

static void add_present(cut *c, const uint16_t *pins, int g, int32_t weight)
{
    for (int i = 0; i < c->top_k && pins[i] != NONE; i++)
        c->present[(size_t)pins[i] * (size_t)c->p->n_ranks + (size_t)g] += weight;
}

static void place_edge(cut *c, int edge)
{
    const uint16_t *pins = pins_of(c, edge);
    int one, owner = c->owner[edge];
    if (owner != NONE)
        add_present(c, pins, owner, c->weight[edge]);
    for (int i = 0; i < c->top_k && pins[i] != NONE; i++) {
        int g = c->home[pins[i]];
        c->degree[pins[i]] += c->weight[edge];
        if (members_on(c, edge, g, &one) == 1)
            add_alone(c, pins, pins[i], c->weight[edge]);
        bool first = g != owner;
        for (int j = 0; j < i && first; j++)
            first = c->home[pins[j]] != g;
        if (first)
            add_present(c, pins, g, c->weight[edge]);
    }
}

void cut_place(cut *c, const int *home)
{
    const problem *p = c->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    memcpy(c->home, home, n * sizeof *home);
    memset(c->degree, 0, n * sizeof *c->degree);
    memset(c->alone, 0, n * sizeof *c->alone);
    memset(c->present, 0, n * ranks * sizeof *c->present);
    memset(c->pair, 0, n * n * sizeof *c->pair);
    memset(c->load, 0, ranks * sizeof *c->load);
    memset(c->count, 0, ranks * sizeof *c->count);
    for (int e = 0; e < p->n_experts; e++) {
        c->load[home[e]] += p->load[problem_at(p, c->layer, e)];
        c->count[home[e]]++;
    }
    for (int i = 0; i < c->n_edges; i++)
        place_edge(c, i);
    c->cost = cut_cost(c, home);
    c->touched += c->n_edges;
}

/* ---- moves ---- */

static bool may_take(const cut *c, int g, double rows)
{
    return rows <= 0 || c->load[g] + rows <= c->p->cap[(size_t)c->layer * (size_t)c->p->n_ranks + (size_t)g] * (1 + 1e-12);
}

bool cut_move_fits(const cut *c, int e, int to)
{
    return c->count[to] < c->p->slots[(size_t)c->layer * (size_t)c->p->n_ranks + (size_t)to] &&
           may_take(c, to, c->p->load[problem_at(c->p, c->layer, e)]);
}

bool cut_swap_fits(const cut *c, int e, int f)
{
    double more = c->p->load[problem_at(c->p, c->layer, f)] - c->p->load[problem_at(c->p, c->layer, e)];
    return may_take(c, c->home[e], more) && may_take(c, c->home[f], -more);
}

/* Only what changes: whoever stays behind on the old rank, or was there first on the new one. */
static void move_on_edge(cut *c, int edge, int e, int from, int to)
{
    const uint16_t *pins = pins_of(c, edge);
    int32_t weight = c->weight[edge];
    int one, n = members_on(c, edge, from, &one);
    if (n == 1) {
        add_alone(c, pins, e, -weight);
        add_present(c, pins, from, -weight);
    }
    c->home[e] = to;
    if (n == 2) {
        members_on(c, edge, from, &one);
        if (one != NONE)
            add_alone(c, pins, one, weight);
    }
    c->home[e] = -1;
    n = members_on(c, edge, to, &one);
    if (n == 0) {
        add_alone(c, pins, e, weight);
        add_present(c, pins, to, weight);
    } else if (n == 1 && one != NONE)
        add_alone(c, pins, one, -weight);
    c->home[e] = from;
}

void cut_move(cut *c, int e, int to)
{
    int from = c->home[e];
    c->cost -= cut_move_gain(c, e, to);
    for (int i = c->first_edge[e]; i < c->first_edge[e + 1]; i++)
        move_on_edge(c, c->edge_of[i], e, from, to);
    c->touched += c->first_edge[e + 1] - c->first_edge[e];
    c->home[e] = to;
    double rows = c->p->load[problem_at(c->p, c->layer, e)];
    c->load[from] -= rows;
    c->load[to] += rows;
    c->count[from]--;
    c->count[to]++;
}

void cut_swap(cut *c, int e, int f)
{
    int g = c->home[e], h = c->home[f];
    cut_move(c, e, h);
    cut_move(c, f, g);
}
