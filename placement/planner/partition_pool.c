#include "placement/planner/partition_pool.h"
#include "placement/planner/cut.h"
#include "proto/hash.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_CLUSTERS = 2500 };

/* ---- the pool ---- */

static status make_classes(const problem *p, int layer, partition_pool *pool)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    const double *cap = p->cap + (size_t)layer * (size_t)p->n_ranks;
    pool->n_experts = p->n_experts;
    pool->words = (p->n_experts + 63) / 64;
    pool->class_of_rank = calloc((size_t)p->n_ranks, sizeof *pool->class_of_rank);
    pool->room = MOST_CLUSTERS;
    pool->members = calloc((size_t)pool->room * (size_t)pool->words, sizeof *pool->members);
    pool->hash = calloc((size_t)pool->room, sizeof *pool->hash);
    pool->class = calloc((size_t)pool->room, sizeof *pool->class);
    pool->tokens = calloc((size_t)pool->room, sizeof *pool->tokens);
    if (!pool->class_of_rank || !pool->members || !pool->hash || !pool->class || !pool->tokens)
        return status_fail(STATUS_NO_MEMORY, "no memory for a pool of clusters");
    for (int g = 0; g < p->n_ranks; g++) {
        int like = 0;
        while (slots[like] != slots[g] || cap[like] != cap[g])
            like++;
        pool->class_of_rank[g] = like == g ? pool->n_classes++ : pool->class_of_rank[like];
    }
    return STATUS_OK;
}

static void members_of(const partition_pool *pool, const int *home, int rank, uint64_t *bits)
{
    memset(bits, 0, (size_t)pool->words * sizeof *bits);
    for (int e = 0; e < pool->n_experts; e++)
        if (home[e] == rank)
            bits[e / 64] |= UINT64_C(1) << (e % 64);
}

static int find(const partition_pool *pool, const uint64_t *bits, int class)
{
    size_t size = (size_t)pool->words * sizeof *bits;
    uint64_t hash = hash_bytes(HASH_START, bits, size);
    for (int i = 0; i < pool->n; i++)
        if (pool->hash[i] == hash && pool->class[i] == class &&
            memcmp(pool->members + (size_t)i * (size_t)pool->words, bits, size) == 0)
            return i;
    return -1;
}

/* Tokens that meet each rank. */
static void count_meetings(const cut *c, int64_t *tokens)
{
    memset(tokens, 0, (size_t)c->p->n_ranks * sizeof *tokens);
    for (int i = 0; i < c->n_edges; i++) {
        const uint16_t *pins = c->pins + (size_t)i * (size_t)c->top_k;
        for (int a = 0; a < c->top_k && pins[a] != ROUTING_NO_EXPERT; a++) {
            bool first = true;
            for (int b = 0; b < a; b++)
                first = first && c->home[pins[b]] != c->home[pins[a]];
            tokens[c->home[pins[a]]] += first ? c->weight[i] : 0;
        }
    }
}

/* The clusters of the placement that `c` holds now; tokens: [n_ranks] scratch. */
static void add_clusters(const cut *c, partition_pool *pool, int64_t *tokens, bool must)
{
    count_meetings(c, tokens);
    int most = must ? pool->room : pool->room - c->p->n_ranks; /* the best placement always finds room */
    for (int g = 0; g < c->p->n_ranks && pool->n < most; g++) {
        uint64_t *bits = pool->members + (size_t)pool->n * (size_t)pool->words;
        if (c->count[g] == 0)
            continue;
        members_of(pool, c->home, g, bits);
        if (find(pool, bits, pool->class_of_rank[g]) >= 0)
            continue;
        pool->hash[pool->n] = hash_bytes(HASH_START, bits, (size_t)pool->words * sizeof *bits);
        pool->class[pool->n] = pool->class_of_rank[g];
        pool->tokens[pool->n++] = tokens[g];
    }
}

void partition_pool_clear(partition_pool *pool)
{
    free(pool->class_of_rank);
    free(pool->members);
    free(pool->hash);
    free(pool->class);
    free(pool->tokens);
    *pool = (partition_pool){0};
}

/* ---- descent ---- */

static bool improve_expert(cut *c, int e)
{
    bool better = false;
    for (int f = 0; f < c->p->n_experts; f++)
        if (c->home[f] != c->home[e] && cut_swap_gain(c, e, f) > 0 && cut_swap_fits(c, e, f)) {
            cut_swap(c, e, f);
            better = true;
        }
    for (int g = 0; g < c->p->n_ranks; g++)
        if (c->home[e] != g && cut_move_gain(c, e, g) > 0 && cut_move_fits(c, e, g)) {
            cut_move(c, e, g);
            better = true;
        }
    return better;
}

/* Charges swaps weighed and edges updated. */
static bool pay(cut *c, work_budget *work)
{
    int64_t units = c->p->n_experts + c->touched / 4;
    c->touched = 0;
    return work_take(work, units < work->left || work->left == 0 ? units : work->left);
}

static void descend(cut *c, work_budget *work)
{
    for (bool better = true; better;) {
        better = false;
        for (int e = 0; e < c->p->n_experts; e++) {
            if (!pay(c, work))
                return;
            better |= improve_expert(c, e);
        }
    }
}

static void kick(cut *c, random_stream *random)
{
    int n = c->p->n_experts, swaps = 3 + random_below(random, 2 + n / 16);
    for (int i = 0, tries = 0; i < swaps && tries < 20 * swaps; tries++) {
        int e = random_below(random, n), f = random_below(random, n);
        if (c->home[e] == c->home[f] || !cut_swap_fits(c, e, f))
            continue;
        cut_swap(c, e, f);
        i++;
    }
}

status partition_pool_fill(const problem *p, int layer, random_stream *random, work_budget *work, int *home, partition_pool *out)
{
    cut c = {0};
    problem plain = *p; /* owners aside: every token of the traffic counts */
    plain.schedule = NULL;
    int64_t *tokens = malloc((size_t)p->n_ranks * sizeof *tokens), best;
    status st = make_classes(p, layer, out);
    if (!tokens)
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    if (st == STATUS_OK)
        st = cut_open(&plain, layer, &c);
    if (st == STATUS_OK) {
        cut_place(&c, home);
        best = c.cost;
        do {
            descend(&c, work);
            add_clusters(&c, out, tokens, false);
            if (c.cost <= best) {
                best = c.cost;
                memcpy(home, c.home, (size_t)p->n_experts * sizeof *home);
            } else {
                cut_place(&c, home);
            }
            kick(&c, random);
        } while (work->left > 0 && !work->out_of_time);
        cut_place(&c, home);
        add_clusters(&c, out, tokens, true);
    }
    cut_close(&c);
    free(tokens);
    if (st != STATUS_OK)
        partition_pool_clear(out);
    return st;
}

/* ---- the programme ---- */

status partition_pool_model(const problem *p, const partition_pool *pool, const int *home, lp_model **out, double *start)
{
    lp_model *m;
    TRY(lp_create(&m));
    for (int e = 0; e < p->n_experts; e++)
        lp_add_row(m, 1, 1);
    for (int q = 0; q < pool->n_classes; q++) {
        int ranks = 0;
        for (int g = 0; g < p->n_ranks; g++)
            ranks += pool->class_of_rank[g] == q;
        lp_add_row(m, 0, ranks);
    }
    for (int i = 0; i < pool->n; i++) {
        const uint64_t *bits = pool->members + (size_t)i * (size_t)pool->words;
        lp_add_column(m, 0, 1, (double)pool->tokens[i], true);
        for (int e = 0; e < p->n_experts; e++)
            if (bits[e / 64] >> (e % 64) & 1)
                lp_set(m, e, i, 1);
        lp_set(m, p->n_experts + pool->class[i], i, 1);
        start[i] = 0;
    }
    uint64_t *bits = malloc((size_t)pool->words * sizeof *bits);
    for (int g = 0; bits && g < p->n_ranks; g++) {
        members_of(pool, home, g, bits);
        int at = find(pool, bits, pool->class_of_rank[g]);
        if (at >= 0)
            start[at] = 1;
    }
    bool failed = !bits || lp_failed(m);
    free(bits);
    if (failed) {
        lp_destroy(m);
        return status_fail(STATUS_NO_MEMORY, "no memory for a choice of %d clusters", pool->n);
    }
    *out = m;
    return STATUS_OK;
}

void partition_pool_take(const problem *p, const partition_pool *pool, const double *x, int *home)
{
    bool *used = calloc((size_t)p->n_ranks, sizeof *used);
    for (int i = 0; used && i < pool->n; i++) {
        int rank = 0;
        if (x[i] < 0.5)
            continue;
        while (used[rank] || pool->class_of_rank[rank] != pool->class[i])
            rank++;
        used[rank] = true;
        for (int e = 0; e < p->n_experts; e++)
            if (pool->members[(size_t)i * (size_t)pool->words + (size_t)e / 64] >> (e % 64) & 1)
                home[e] = rank;
    }
    free(used);
}
