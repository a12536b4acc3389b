/* batch_replicas.c - annealing over slots: a spare copy becomes another expert's, or two ranks exchange experts. */
#include "placement/planner/batch_replicas.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK = 64, /* steps at a time: their loads and splits stay in the nearest cache */
    ROUNDS = 3, /* of giving and taking */
    TRIALS_PER_SLOT = 200,
    PROBES = 32,
    WORK_UNIT = 1000, /* elementary operations */
    CLOCK_EVERY = 8,  /* trials */
};
static const double WARMTH = 0.12, COOLED = 0.005; /* of what a random change makes worse on average */
static const double WORTH = 1e-6;

typedef struct {
    int rank;
    int expert; /* -1: empty */
} slot;

typedef struct {
    batch_layer *b;
    slot *slots;
    int n_slots;
    bool *holds;    /* [n_experts][n_ranks] */
    int *n_copies;  /* [n_experts] */
    int *order;     /* [n_experts] most rows first */
    int *copy_rank; /* [n_slots] of experts with several, in `order`'s order */
    int *first;     /* [n_experts + 1] by place in `order` */
    float *load;    /* [n_ranks][BLOCK] */
    float *share;   /* [n_slots][BLOCK] rows of a copy */
    float level[BLOCK];
    double *planned; /* [n_ranks] scratch for caps */
    work_budget *work;
    int64_t owed;
    int n_tried;
} replica_search;

/* ---- pricing ---- */

/* Copies of experts with several, ready to be split. */
static void list_copies(replica_search *s)
{
    int n = 0;
    for (int i = 0; i < s->b->n_experts; i++) {
        int e = s->order[i];
        s->first[i] = n;
        for (int g = 0; s->n_copies[e] > 1 && g < s->b->n_ranks; g++)
            if (s->holds[(size_t)e * (size_t)s->b->n_ranks + (size_t)g])
                s->copy_rank[n++] = g;
    }
    s->first[s->b->n_experts] = n;
}

static void add_row(float *restrict to, const float *restrict from)
{
    for (int k = 0; k < BLOCK; k++)
        to[k] += from[k];
}

static void put_single(replica_search *s, int at, int n)
{
    const batch_layer *b = s->b;
    memset(s->load, 0, (size_t)b->n_ranks * BLOCK * sizeof *s->load);
    for (int e = 0; e < b->n_experts; e++) {
        if (s->n_copies[e] != 1)
            continue;
        int g = 0;
        while (!s->holds[(size_t)e * (size_t)b->n_ranks + (size_t)g])
            g++;
        float *load = s->load + (size_t)g * BLOCK;
        const float *cost = batch_cost(b, g, e) + at;
        if (n == BLOCK)
            add_row(load, cost);
        else
            for (int k = 0; k < n; k++)
                load[k] += cost[k];
    }
}

typedef struct {
    float row[2], touch[2], per_row; /* ticks; per_row: one over both rows */
} pair_speed;

static float ticks(const batch_layer *b, double us)
{
    return (float)(us / (double)b->tick);
}

static pair_speed speed_of(const batch_layer *b, int g, int h)
{
    const topology *t = b->p->topology;
    pair_speed v = {.row = {ticks(b, t->row_us[g]), ticks(b, t->row_us[h])},
                    .touch = {ticks(b, t->expert_us[g]), ticks(b, t->expert_us[h])}};
    v.per_row = 1 / (v.row[0] + v.row[1]);
    return v;
}

static inline float larger(float a, float b)
{
    return a > b ? a : b;
}

static inline float above(float load, float level)
{
    float d = larger(load - level, 0);
    return d * d + load * 1e-3f * level; /* below the level less is still better, a little */
}

/* The best of three: all rows on one copy, all on the other, or cut so that both ranks are done at once. */
static void split_pair(pair_speed v, const float *restrict level, float *restrict load_g, float *restrict load_h,
                       float *restrict rows_g, float *restrict rows_h)
{
    for (int k = 0; k < BLOCK; k++) {
        float x = rows_g[k], y = rows_h[k], n = x + y;
        float a = load_g[k] - x * v.row[0] - (x > 0 ? v.touch[0] : 0), c = load_h[k] - y * v.row[1] - (y > 0 ? v.touch[1] : 0);
        float all_g = a + n * v.row[0] + v.touch[0], all_h = c + n * v.row[1] + v.touch[1];
        float cut = (float)(int)((c + v.touch[1] + n * v.row[1] - a - v.touch[0]) * v.per_row + 0.5f);
        cut = larger(cut < n - 1 ? cut : n - 1, 1);
        float cut_g = a + cut * v.row[0] + v.touch[0], cut_h = c + (n - cut) * v.row[1] + v.touch[1];
        float f_g = above(all_g, level[k]) + above(c, level[k]), f_h = above(a, level[k]) + above(all_h, level[k]);
        float f_cut = n > 1 ? above(cut_g, level[k]) + above(cut_h, level[k]) : INFINITY;
        float best = f_g <= f_h ? n : 0, least = f_g <= f_h ? f_g : f_h;
        best = f_cut < least ? cut : best;
        best = n > 0 ? best : 0;
        rows_g[k] = best;
        rows_h[k] = n - best;
        load_g[k] = a + best * v.row[0] + (best > 0 ? v.touch[0] : 0);
        load_h[k] = c + (n - best) * v.row[1] + (n - best > 0 ? v.touch[1] : 0);
    }
}

/* Whole, on the copy whose rank is then done first. */
static void put_whole(replica_search *s, int i, int at, int n)
{
    const batch_layer *b = s->b;
    const float *rows = b->rows + (size_t)s->order[i] * (size_t)b->n_steps + at;
    int first = s->first[i], end = s->first[i + 1];
    int chosen[BLOCK] = {0};
    float least[BLOCK];
    for (int c = first; c < end; c++) {
        const float *cost = batch_cost(b, s->copy_rank[c], s->order[i]) + at, *load = s->load + (size_t)s->copy_rank[c] * BLOCK;
        for (int k = 0; k < n; k++) {
            float with = load[k] + cost[k];
            bool better = c == first || with < least[k];
            chosen[k] = better ? c : chosen[k];
            least[k] = better ? with : least[k];
        }
    }
    memset(s->share + (size_t)first * BLOCK, 0, (size_t)(end - first) * BLOCK * sizeof *s->share);
    for (int c = first; c < end; c++) {
        const float *cost = batch_cost(b, s->copy_rank[c], s->order[i]) + at;
        float *load = s->load + (size_t)s->copy_rank[c] * BLOCK, *share = s->share + (size_t)c * BLOCK;
        for (int k = 0; k < n; k++) {
            share[k] = chosen[k] == c ? rows[k] : 0;
            load[k] += chosen[k] == c ? cost[k] : 0;
        }
    }
}

static void find_level(replica_search *s)
{
    memset(s->level, 0, sizeof s->level);
    for (int g = 0; g < s->b->n_ranks; g++)
        add_row(s->level, s->load + (size_t)g * BLOCK);
    for (int k = 0; k < BLOCK; k++)
        s->level[k] /= (float)s->b->n_ranks;
}

static void even_out(replica_search *s)
{
    for (int i = 0; i < s->b->n_experts; i++)
        for (int c = s->first[i]; c < s->first[i + 1]; c++)
            for (int d = c + 1; d < s->first[i + 1]; d++)
                split_pair(speed_of(s->b, s->copy_rank[c], s->copy_rank[d]), s->level, s->load + (size_t)s->copy_rank[c] * BLOCK,
                           s->load + (size_t)s->copy_rank[d] * BLOCK, s->share + (size_t)c * BLOCK, s->share + (size_t)d * BLOCK);
}

static double sum_busiest(const replica_search *s, int n)
{
    float most[BLOCK] = {0};
    double sum = 0;
    for (int g = 0; g < s->b->n_ranks; g++)
        for (int k = 0; k < BLOCK; k++)
            most[k] = larger(most[k], s->load[(size_t)g * BLOCK + (size_t)k]);
    for (int k = 0; k < n; k++)
        sum += (double)most[k];
    return sum;
}

/* Ticks of the busiest rank, all steps. */
static double price(replica_search *s)
{
    double sum = 0;
    list_copies(s);
    for (int at = 0; at < s->b->n_steps; at += BLOCK) {
        int n = s->b->n_steps - at < BLOCK ? s->b->n_steps - at : BLOCK;
        put_single(s, at, n);
        for (int i = 0; i < s->b->n_experts; i++)
            if (s->first[i + 1] > s->first[i])
                put_whole(s, i, at, n);
        find_level(s);
        for (int round = 0; round < ROUNDS; round++)
            even_out(s);
        sum += sum_busiest(s, n);
    }
    return sum;
}

/* ---- the state ---- */

static void search_end(replica_search *s)
{
    free(s->slots);
    free(s->holds);
    free(s->n_copies);
    free(s->order);
    free(s->copy_rank);
    free(s->first);
    free(s->load);
    free(s->share);
    free(s->planned);
}

static bool *held(const replica_search *s, int expert, int rank)
{
    return &s->holds[(size_t)expert * (size_t)s->b->n_ranks + (size_t)rank];
}

static void sort_experts(replica_search *s)
{
    const double *load = s->b->p->load + problem_at(s->b->p, s->b->layer, 0);
    for (int e = 0; e < s->b->n_experts; e++) {
        int at = e;
        for (; at > 0 && load[s->order[at - 1]] < load[e]; at--)
            s->order[at] = s->order[at - 1];
        s->order[at] = e;
    }
}

static status search_start(batch_layer *b, const bool *holds, replica_search *s)
{
    size_t experts = (size_t)b->n_experts, ranks = (size_t)b->n_ranks;
    *s = (replica_search){.b = b};
    for (int g = 0; g < b->n_ranks; g++)
        s->n_slots += b->slots[g];
    s->slots = calloc((size_t)s->n_slots, sizeof *s->slots);
    s->holds = calloc(experts * ranks, sizeof *s->holds);
    s->n_copies = calloc(experts, sizeof *s->n_copies);
    s->order = calloc(experts, sizeof *s->order);
    s->copy_rank = calloc((size_t)s->n_slots, sizeof *s->copy_rank);
    s->first = calloc(experts + 1, sizeof *s->first);
    s->load = calloc(ranks * BLOCK, sizeof *s->load);
    s->share = calloc((size_t)s->n_slots * BLOCK, sizeof *s->share);
    s->planned = calloc(ranks, sizeof *s->planned);
    if (!s->slots || !s->holds || !s->n_copies || !s->order || !s->copy_rank || !s->first || !s->load || !s->share || !s->planned)
        return status_fail(STATUS_NO_MEMORY, "no memory for replicas of %d experts", b->n_experts);
    memcpy(s->holds, holds, experts * ranks * sizeof *holds);
    int n = 0;
    for (int g = 0; g < b->n_ranks; g++) {
        int end = n + b->slots[g];
        for (int e = 0; e < b->n_experts; e++)
            if (*held(s, e, g)) {
                s->slots[n++] = (slot){g, e};
                s->n_copies[e]++;
            }
        while (n < end)
            s->slots[n++] = (slot){g, -1};
    }
    sort_experts(s);
    return STATUS_OK;
}

static void set_slot(replica_search *s, int i, int expert)
{
    slot *at = &s->slots[i];
    if (at->expert >= 0) {
        *held(s, at->expert, at->rank) = false;
        s->n_copies[at->expert]--;
    }
    at->expert = expert;
    if (expert >= 0) {
        *held(s, expert, at->rank) = true;
        s->n_copies[expert]++;
    }
}

static bool keeps_caps(replica_search *s)
{
    const batch_layer *b = s->b;
    const double *load = b->p->load + problem_at(b->p, b->layer, 0);
    if (!b->cap)
        return true;
    memset(s->planned, 0, (size_t)b->n_ranks * sizeof *s->planned);
    for (int i = 0; i < s->n_slots; i++)
        if (s->slots[i].expert >= 0)
            s->planned[s->slots[i].rank] += load[s->slots[i].expert] / s->n_copies[s->slots[i].expert];
    for (int g = 0; g < b->n_ranks; g++)
        if (s->planned[g] > b->cap[g])
            return false;
    return true;
}

/* Each empty slot in turn takes the expert that has the most rows per copy and is not on its rank. */
static void fill_empty(replica_search *s)
{
    const double *load = s->b->p->load + problem_at(s->b->p, s->b->layer, 0);
    for (int i = 0; i < s->n_slots; i++) {
        int best = -1;
        if (s->slots[i].expert >= 0)
            continue;
        for (int e = 0; e < s->b->n_experts; e++)
            if (!*held(s, e, s->slots[i].rank) && (best < 0 || load[e] * s->n_copies[best] > load[best] * s->n_copies[e]))
                best = e;
        if (best < 0)
            continue;
        set_slot(s, i, best);
        if (!keeps_caps(s))
            set_slot(s, i, -1);
    }
}

/* ---- search ---- */

/* Slot i gets new_i, slot j (-1: none) new_j. */
typedef struct {
    int i, j, old_i, old_j, new_i, new_j;
} change;

static bool draw_change(replica_search *s, random_stream *random, change *c)
{
    *c = (change){.i = random_below(random, s->n_slots), .j = -1};
    slot a = s->slots[c->i];
    c->old_i = a.expert;
    if (random_below(random, 2) == 0) {
        c->new_i = random_below(random, s->b->n_experts);
        return (a.expert < 0 || s->n_copies[a.expert] > 1) && !*held(s, c->new_i, a.rank);
    }
    c->j = random_below(random, s->n_slots);
    slot z = s->slots[c->j];
    c->old_j = z.expert;
    c->new_i = z.expert;
    c->new_j = a.expert;
    return a.rank != z.rank && a.expert != z.expert && (z.expert < 0 || !*held(s, z.expert, a.rank)) &&
           (a.expert < 0 || !*held(s, a.expert, z.rank));
}

static void make_change(replica_search *s, const change *c)
{
    set_slot(s, c->i, c->new_i);
    if (c->j >= 0)
        set_slot(s, c->j, c->new_j);
}

static void take_back(replica_search *s, const change *c)
{
    set_slot(s, c->i, c->old_i);
    if (c->j >= 0)
        set_slot(s, c->j, c->old_j);
}

static int64_t price_work(const replica_search *s)
{
    int64_t several = s->first[s->b->n_experts];
    return (int64_t)s->b->n_steps * (s->b->n_experts + several * (2 + 8 * ROUNDS)) / 4;
}

static bool go_on(replica_search *s)
{
    s->owed += price_work(s);
    if (++s->n_tried % CLOCK_EVERY)
        return true;
    int64_t units = s->owed / WORK_UNIT;
    s->owed -= units * WORK_UNIT;
    return work_take(s->work, units);
}

static double probe(replica_search *s, random_stream *random, double now)
{
    double sum = 0;
    int n = 0;
    change c;
    for (int i = 0; i < PROBES; i++) {
        if (!draw_change(s, random, &c))
            continue;
        make_change(s, &c);
        double d = price(s) - now;
        take_back(s, &c);
        go_on(s);
        sum += d > 0 ? d : 0;
        n += d > 0;
    }
    return n ? sum / n : 0;
}

static double anneal(replica_search *s, random_stream *random, bool *best_holds)
{
    size_t size = (size_t)s->b->n_experts * (size_t)s->b->n_ranks * sizeof *s->holds;
    double now = price(s), best = now, scale = probe(s, random, now);
    int64_t n = (int64_t)TRIALS_PER_SLOT * s->n_slots, affords = s->work->left * WORK_UNIT / price_work(s);
    n = n < affords ? n : affords;
    memcpy(best_holds, s->holds, size);
    for (int64_t i = 0; i < n && scale > 0; i++) {
        double temperature = i > n * 9 / 10 ? 0 : scale * WARMTH * pow(COOLED / WARMTH, (double)i / (double)n);
        change c;
        if (!draw_change(s, random, &c))
            continue;
        make_change(s, &c);
        double limit = now - temperature * log(1 - random_unit(random));
        double then = keeps_caps(s) ? price(s) : INFINITY;
        if (then <= limit)
            now = then;
        else
            take_back(s, &c);
        if (now < best * (1 - WORTH)) {
            best = now;
            memcpy(best_holds, s->holds, size);
        }
        if (!go_on(s))
            break;
    }
    return best;
}

static void choose_homes(const batch_layer *b, const bool *holds, int *home)
{
    for (int e = 0; e < b->n_experts; e++) {
        const bool *on = holds + (size_t)e * (size_t)b->n_ranks;
        for (int g = 0; !on[home[e]]; g++)
            if (on[g])
                home[e] = g;
    }
}

status batch_replicas_search(batch_layer *b, random_stream *random, work_budget *work, int *home, bool *holds, double *us)
{
    replica_search s;
    status st = search_start(b, holds, &s);
    if (st == STATUS_OK) {
        s.work = work;
        fill_empty(&s);
        *us = anneal(&s, random, holds) * (double)b->tick / b->n_real;
        choose_homes(b, holds, home);
    }
    search_end(&s);
    return st;
}

status batch_replicas_us(batch_layer *b, const bool *holds, double *us)
{
    replica_search s;
    status st = search_start(b, holds, &s);
    if (st == STATUS_OK)
        *us = price(&s) * (double)b->tick / b->n_real;
    search_end(&s);
    return st;
}
