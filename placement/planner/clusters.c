/* Enumerates a layer's clusters and counts their tokens. */
#include "placement/planner/clusters.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* n over k, or more than any table holds. */
static int64_t choose(int n, int k)
{
    if (k < 0 || k > n)
        return 0;
    int64_t c = 1;
    for (int i = 1; i <= k; i++) {
        c = c * (n - k + i) / i;
        if (c > INT64_C(1) << 40)
            return INT64_C(1) << 40;
    }
    return c;
}

typedef struct {
    int widest, narrowest; /* sizes to enumerate */
    bool full;
} cluster_sizes;

static cluster_sizes sizes_of(const problem *p, int layer)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    cluster_sizes s = {.narrowest = p->n_experts};
    int64_t sum = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        sum += slots[g];
        s.widest = slots[g] > s.widest ? slots[g] : s.widest;
        s.narrowest = slots[g] < s.narrowest ? slots[g] : s.narrowest;
    }
    s.full = sum == p->n_experts;
    s.widest = s.widest < p->n_experts ? s.widest : p->n_experts;
    s.narrowest = s.full && s.narrowest > 1 ? s.narrowest : 1;
    return s;
}

bool clusters_possible(const problem *p, int layer)
{
    cluster_sizes s = sizes_of(p, layer);
    if (s.widest > CLUSTERS_WIDEST)
        return false;
    int64_t n = 0, sets = 0;
    for (int i = 1; i <= s.widest; i++) {
        sets += i <= p->top_k ? choose(p->n_experts, i) : 0;
        n += i >= s.narrowest ? choose(p->n_experts, i) : 0;
    }
    return n <= CLUSTERS_MOST && sets <= 16 * CLUSTERS_MOST;
}

/* ---- classes ---- */

static status make_classes(const problem *p, int layer, bool caps, clusters *c)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    const double *cap = p->cap + (size_t)layer * (size_t)p->n_ranks;
    c->classes = calloc((size_t)p->n_ranks, sizeof *c->classes);
    c->class_of_rank = calloc((size_t)p->n_ranks, sizeof *c->class_of_rank);
    if (!c->classes || !c->class_of_rank)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    double all = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        rank_class r = {1, slots[g], caps ? cap[g] * (1 + 1e-9) : INFINITY, 0};
        all += r.cap;
        int q = 0;
        while (q < c->n_classes && (c->classes[q].slots != r.slots || c->classes[q].cap != r.cap))
            q++;
        if (q == c->n_classes)
            c->classes[c->n_classes++] = r;
        else
            c->classes[q].n_ranks++;
        c->class_of_rank[g] = q;
    }
    for (int q = 0; caps && q < c->n_classes; q++)
        c->classes[q].least = (p->rows[layer] - (all - c->classes[q].cap)) * (1 - 1e-9);
    return STATUS_OK;
}

bool clusters_fits(const clusters *c, int class, int size, double rows)
{
    const rank_class *r = &c->classes[class];
    return (c->full ? size == r->slots : size <= r->slots) && rows <= r->cap && rows >= r->least;
}

bool clusters_kept(const clusters *c, const int *home)
{
    for (int g = 0; g < c->n_ranks; g++) {
        int n = 0;
        double rows = 0;
        for (int e = 0; e < c->n_experts; e++)
            if (home[e] == g) {
                n++;
                rows += c->load[e];
            }
        if (!clusters_fits(c, c->class_of_rank[g], n, rows))
            return false;
    }
    return true;
}

/* ---- sets chosen together ---- */

static status make_pascal(int n_experts, const int64_t **out)
{
    int64_t *pascal = malloc((size_t)n_experts * (CLUSTERS_WIDEST + 1) * sizeof *pascal);
    if (!pascal)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", n_experts);
    for (int e = 0; e < n_experts; e++)
        for (int i = 0; i <= CLUSTERS_WIDEST; i++)
            pascal[e * (CLUSTERS_WIDEST + 1) + i] = choose(e, i);
    *out = pascal;
    return STATUS_OK;
}

/* What the i-th smallest expert (from 1) of a set adds to the set's place. */
static size_t step(const clusters *c, int expert, int i)
{
    return (size_t)c->pascal[expert * (CLUSTERS_WIDEST + 1) + i];
}

static size_t place_of(const clusters *c, const uint16_t *rising, int n)
{
    size_t place = 0;
    for (int i = 0; i < n; i++)
        place += step(c, rising[i], i + 1);
    return place;
}

/* Every subset of a token's choices, by bits. */
static void count_subsets(clusters *c, const uint16_t *chosen, int n)
{
    uint16_t set[32];
    for (unsigned bits = 1; bits < 1u << n; bits++) {
        int size = __builtin_popcount(bits);
        if (size > c->most_together)
            continue;
        for (int i = 0, at = 0; i < n; i++)
            if (bits >> i & 1)
                set[at++] = chosen[i];
        c->together[size][place_of(c, set, size)]++;
    }
}

static int compare_experts(const void *a, const void *b)
{
    return *(const uint16_t *)a - *(const uint16_t *)b;
}

static status count_together(const problem *p, int layer, clusters *c)
{
    const traffic *t = p->traffic;
    int k = t->shape.top_k;
    if (k > 16) /* 65,536 sets a token */
        return status_fail(STATUS_UNSUPPORTED, "clusters of experts are counted for at most 16 choices a token, not %d", k);
    c->most_together = k < c->width ? k : c->width;
    for (int i = 1; i <= c->most_together; i++)
        if (!(c->together[i] = calloc((size_t)choose(p->n_experts, i), sizeof *c->together[i])))
            return status_fail(STATUS_NO_MEMORY, "no memory for sets of %d experts of %d", i, p->n_experts);
    for (int64_t token = 0; token < t->n_tokens; token++) {
        const uint16_t *experts = traffic_experts(t, layer, token);
        uint16_t chosen[16];
        int n = 0;
        for (int j = 0; j < k; j++)
            if (experts[j] != ROUTING_NO_EXPERT)
                chosen[n++] = experts[j];
        qsort(chosen, (size_t)n, sizeof *chosen, compare_experts);
        count_subsets(c, chosen, n);
    }
    return STATUS_OK;
}

/* ---- clusters ---- */

/* The subsets of the experts taken so far: size and place, so that a further, larger expert extends each in one addition. */
typedef struct {
    clusters *c;
    int narrowest;
    int room;
    int n_subsets;
    struct {
        int size;
        size_t place;
    } subsets[1 << CLUSTERS_WIDEST];
    uint16_t set[CLUSTERS_WIDEST];
    bool failed;
} enumeration;

/* Tokens that chose `expert` and none of the set before it; and the new subsets appended. */
static int64_t extend(enumeration *n, int expert)
{
    clusters *c = n->c;
    int64_t fresh = 0;
    int before = n->n_subsets;
    for (int i = 0; i < before; i++) {
        int size = n->subsets[i].size + 1;
        if (size > c->most_together)
            continue;
        size_t place = n->subsets[i].place + step(c, expert, size);
        n->subsets[n->n_subsets].size = size;
        n->subsets[n->n_subsets++].place = place;
        int64_t count = c->together[size][place];
        fresh += size % 2 ? count : -count;
    }
    return fresh;
}

static bool fits_somewhere(const clusters *c, int size, double rows)
{
    for (int q = 0; q < c->n_classes; q++)
        if (clusters_fits(c, q, size, rows))
            return true;
    return false;
}

static void keep(enumeration *n, int size, int64_t tokens, double rows)
{
    clusters *c = n->c;
    if (size < n->narrowest || !fits_somewhere(c, size, rows))
        return;
    if (c->n == n->room) {
        int room = n->room ? 2 * n->room : 1024;
        void *sizes = realloc(c->size, (size_t)room);
        c->size = sizes ? sizes : c->size;
        void *members = realloc(c->members, (size_t)room * (size_t)c->width * sizeof *c->members);
        c->members = members ? members : c->members;
        void *counts = realloc(c->tokens, (size_t)room * sizeof *c->tokens);
        c->tokens = counts ? counts : c->tokens;
        void *loads = realloc(c->rows, (size_t)room * sizeof *c->rows);
        c->rows = loads ? loads : c->rows;
        n->failed = !sizes || !members || !counts || !loads;
        if (n->failed)
            return;
        n->room = room;
    }
    memcpy(c->members + (size_t)c->n * (size_t)c->width, n->set, (size_t)size * sizeof *n->set);
    c->size[c->n] = (uint8_t)size;
    c->tokens[c->n] = (int32_t)tokens;
    c->rows[c->n++] = rows;
}

static void enumerate(enumeration *n, int size, int64_t tokens, double rows)
{
    int first = size ? n->set[size - 1] + 1 : 0, subsets = n->n_subsets;
    for (int e = first; e < n->c->n_experts && !n->failed; e++) {
        n->set[size] = (uint16_t)e;
        n->n_subsets = subsets;
        int64_t with = tokens + extend(n, e);
        keep(n, size + 1, with, rows + n->c->load[e]);
        if (size + 1 < n->c->width)
            enumerate(n, size + 1, with, rows + n->c->load[e]);
    }
    n->n_subsets = subsets;
}

status clusters_create(const problem *p, int layer, bool caps, bool no_replicas, clusters **out)
{
    cluster_sizes sizes = sizes_of(p, layer);
    if (!clusters_possible(p, layer))
        return status_fail(STATUS_UNSUPPORTED, "too many clusters of up to %d of %d experts to write down", sizes.widest,
                           p->n_experts);
    clusters *c = calloc(1, sizeof *c);
    enumeration *n = calloc(1, sizeof *n);
    status st = STATUS_OK;
    if (!c || !n)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for the clusters of a layer"), out);
    c->n_experts = p->n_experts;
    c->n_ranks = p->n_ranks;
    c->width = sizes.widest;
    c->full = sizes.full;
    c->load = p->load + problem_at(p, layer, 0);
    c->n_tokens = p->traffic->n_tokens;
    TRY_GOTO(make_classes(p, layer, caps && (sizes.full || no_replicas), c), out);
    TRY_GOTO(make_pascal(c->n_experts, &c->pascal), out);
    TRY_GOTO(count_together(p, layer, c), out);
    n->c = c;
    n->narrowest = sizes.narrowest;
    n->n_subsets = 1; /* the empty set */
    enumerate(n, 0, 0, 0);
    if (n->failed)
        st = status_fail(STATUS_NO_MEMORY, "no memory for the clusters of a layer");
out:
    free(n);
    if (st == STATUS_OK)
        *out = c;
    else
        clusters_destroy(c);
    return st;
}

void clusters_destroy(clusters *c)
{
    if (!c)
        return;
    for (int i = 0; i <= CLUSTERS_WIDEST; i++)
        free(c->together[i]);
    free((void *)c->pascal);
    free(c->classes);
    free(c->class_of_rank);
    free(c->size);
    free(c->members);
    free(c->tokens);
    free(c->rows);
    free(c);
}

int64_t clusters_tokens(const clusters *c, const int *experts, int n)
{
    int64_t tokens = 0;
    for (unsigned bits = 1; bits < 1u << n; bits++) {
        int size = __builtin_popcount(bits), at = 0;
        if (size > c->most_together)
            continue;
        size_t place = 0;
        for (int i = 0; i < n; i++)
            if (bits >> i & 1)
                place += step(c, experts[i], ++at);
        tokens += size % 2 ? c->together[size][place] : -(int64_t)c->together[size][place];
    }
    return tokens;
}
