#include "placement/planner/owners.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 8, RESTARTS = 2 };
static const double room_factor = 1.05;

/* ---- handing out sequences with room ---- */

typedef struct {
    int sequence;
    double regret; /* what the second best place costs more */
} turn;

static int by_regret(const void *a, const void *b)
{
    const turn *x = a, *y = b;
    if (x->regret != y->regret)
        return x->regret > y->regret ? -1 : 1;
    return x->sequence - y->sequence;
}

/* cost [n][k], weight [n] tokens, room [k] tokens: place [n]. Whoever would lose most by not getting its best place chooses
 * first; when nothing has room for a sequence it goes where most is left. */
static status hand_out(int n, int k, const double *cost, const double *weight, const double *room, int *place)
{
    turn *turns = malloc((size_t)n * sizeof *turns);
    double *left = malloc((size_t)k * sizeof *left);
    if (!turns || !left) {
        free(turns);
        free(left);
        return status_fail(STATUS_NO_MEMORY, "no memory to hand out %d sequences", n);
    }
    memcpy(left, room, (size_t)k * sizeof *left);
    for (int s = 0; s < n; s++) {
        double best = DBL_MAX, second = DBL_MAX;
        for (int g = 0; g < k; g++) {
            double c = cost[(size_t)s * (size_t)k + (size_t)g];
            second = c < best ? best : c < second ? c : second;
            best = c < best ? c : best;
        }
        turns[s] = (turn){s, k > 1 ? second - best : 0};
    }
    qsort(turns, (size_t)n, sizeof *turns, by_regret);
    for (int i = 0; i < n; i++) {
        int s = turns[i].sequence, best = -1, roomiest = 0;
        for (int g = 0; g < k; g++) {
            if (left[g] > left[roomiest])
                roomiest = g;
            if (left[g] >= weight[s] &&
                (best < 0 || cost[(size_t)s * (size_t)k + (size_t)g] < cost[(size_t)s * (size_t)k + (size_t)best]))
                best = g;
        }
        place[s] = best >= 0 ? best : roomiest;
        left[place[s]] -= weight[s];
    }
    free(turns);
    free(left);
    return STATUS_OK;
}

/* ---- likeness ---- */

/* Unit vectors of what each sequence chose, over all layers. */
static double *profile_sequences(const traffic *t, size_t dims)
{
    double *v = calloc((size_t)t->n_sequences * dims + 1, sizeof *v);
    for (int s = 0; v && s < t->n_sequences; s++) {
        double *of = v + (size_t)s * dims, square = 0;
        for (int l = 0; l < t->shape.n_layers; l++)
            for (int64_t token = t->first_token[s]; token < t->first_token[s + 1]; token++)
                for (int j = 0; j < t->shape.top_k; j++) {
                    uint16_t e = traffic_experts(t, l, token)[j];
                    if (e != ROUTING_NO_EXPERT)
                        of[(size_t)l * (size_t)t->shape.n_experts + e] += 1;
                }
        for (size_t d = 0; d < dims; d++)
            square += of[d] * of[d];
        for (size_t d = 0; d < dims && square > 0; d++)
            of[d] /= sqrt(square);
    }
    return v;
}

static double dot(const double *a, const double *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

typedef struct {
    size_t dims;
    const double *vectors; /* [all sequences][dims] */
    const int *members;    /* [n] the sequences to be grouped */
    int n, k;
    const double *weight, *room; /* [n], [k] */
    double *centre;              /* [k][dims] */
    double *cost;                /* [n][k] */
} grouping;

static void price_groups(const grouping *g)
{
    for (int i = 0; i < g->n; i++)
        for (int c = 0; c < g->k; c++)
            g->cost[(size_t)i * (size_t)g->k + (size_t)c] =
                1 - dot(g->vectors + (size_t)g->members[i] * g->dims, g->centre + (size_t)c * g->dims, g->dims);
}

static void move_centres(const grouping *g, const int *place)
{
    memset(g->centre, 0, (size_t)g->k * g->dims * sizeof *g->centre);
    for (int i = 0; i < g->n; i++) {
        const double *v = g->vectors + (size_t)g->members[i] * g->dims;
        for (size_t d = 0; d < g->dims; d++)
            g->centre[(size_t)place[i] * g->dims + d] += g->weight[i] * v[d];
    }
    for (int c = 0; c < g->k; c++) {
        double *centre = g->centre + (size_t)c * g->dims, length = sqrt(dot(centre, centre, g->dims));
        for (size_t d = 0; d < g->dims && length > 0; d++)
            centre[d] /= length;
    }
}

/* Starts from sequences far from each other (k-means++, Arthur and Vassilvitskii 2007, taking the farthest). */
static void start_centres(const grouping *g, random_stream *random)
{
    int first = random_below(random, g->n);
    memcpy(g->centre, g->vectors + (size_t)g->members[first] * g->dims, g->dims * sizeof *g->centre);
    for (int c = 1; c < g->k; c++) {
        int farthest = 0;
        double most = -1;
        for (int i = 0; i < g->n; i++) {
            double nearest = 2;
            for (int b = 0; b < c; b++)
                nearest = fmin(nearest,
                               1 - dot(g->vectors + (size_t)g->members[i] * g->dims, g->centre + (size_t)b * g->dims, g->dims));
            if (nearest > most) {
                most = nearest;
                farthest = i;
            }
        }
        memcpy(g->centre + (size_t)c * g->dims, g->vectors + (size_t)g->members[farthest] * g->dims, g->dims * sizeof *g->centre);
    }
}

static status group_once(const grouping *g, random_stream *random, int *place, double *worth)
{
    start_centres(g, random);
    for (int round = 0; round < ROUNDS; round++) {
        price_groups(g);
        TRY(hand_out(g->n, g->k, g->cost, g->weight, g->room, place));
        move_centres(g, place);
    }
    price_groups(g);
    *worth = 0;
    for (int i = 0; i < g->n; i++)
        *worth += g->weight[i] * g->cost[(size_t)i * (size_t)g->k + (size_t)place[i]];
    return STATUS_OK;
}

static status group_members(grouping *g, random_stream *random, int *place)
{
    if (g->k == 1 || g->n == 0) {
        memset(place, 0, (size_t)g->n * sizeof *place);
        return STATUS_OK;
    }
    int *trial = malloc((size_t)g->n * sizeof *trial);
    g->centre = malloc((size_t)g->k * g->dims * sizeof *g->centre);
    g->cost = malloc((size_t)g->n * (size_t)g->k * sizeof *g->cost);
    status st =
        trial && g->centre && g->cost ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to group %d sequences", g->n);
    double best = DBL_MAX, worth;
    for (int r = 0; st == STATUS_OK && r < RESTARTS; r++) {
        st = group_once(g, random, trial, &worth);
        if (st == STATUS_OK && worth < best) {
            best = worth;
            memcpy(place, trial, (size_t)g->n * sizeof *place);
        }
    }
    free(trial);
    free(g->centre);
    free(g->cost);
    return st;
}

static double tokens_of(const traffic *t, int s)
{
    return (double)(t->first_token[s + 1] - t->first_token[s]);
}

/* What likeness works on: one pass over nodes, then one per node over its ranks. */
typedef struct {
    const problem *p;
    double *vectors, *weight, *room;
    int *members, *place, *node;
    random_stream random;
} likeness;

static status group_into(likeness *k, size_t dims, int n, int n_groups)
{
    double tokens = 0;
    for (int i = 0; i < n; i++)
        tokens += k->weight[i] = tokens_of(k->p->traffic, k->members[i]);
    for (int g = 0; g < n_groups; g++)
        k->room[g] *= room_factor * tokens;
    grouping g = {
        .dims = dims, .vectors = k->vectors, .members = k->members, .n = n, .k = n_groups, .weight = k->weight, .room = k->room};
    return group_members(&g, &k->random, k->place);
}

static status group_nodes(likeness *k, size_t dims)
{
    const topology *t = k->p->topology;
    int n = k->p->traffic->n_sequences;
    for (int i = 0; i < t->n_nodes; i++)
        k->room[i] = 0;
    for (int g = 0; g < t->n_ranks; g++)
        k->room[t->node_of_rank[g]] += 1.0 / t->n_ranks;
    for (int s = 0; s < n; s++)
        k->members[s] = s;
    TRY(group_into(k, dims, n, t->n_nodes));
    memcpy(k->node, k->place, (size_t)n * sizeof *k->node);
    return STATUS_OK;
}

static status group_ranks(likeness *k, size_t dims, int node, uint16_t *out)
{
    const topology *t = k->p->topology;
    int n = 0, n_ranks = 0;
    for (int s = 0; s < k->p->traffic->n_sequences; s++)
        if (k->node[s] == node)
            k->members[n++] = s;
    for (int g = 0; g < t->n_ranks; g++)
        n_ranks += t->node_of_rank[g] == node;
    for (int g = 0; g < n_ranks; g++)
        k->room[g] = 1.0 / n_ranks;
    TRY(group_into(k, dims, n, n_ranks));
    for (int g = 0; g < t->n_ranks; g++)
        for (int i = 0; t->node_of_rank[g] == node && i < n; i++)
            if (k->place[i] == t->local_index[g])
                out[k->members[i]] = (uint16_t)g;
    return STATUS_OK;
}

status owners_by_likeness(const problem *p, uint64_t stream, uint16_t *out)
{
    size_t n = (size_t)p->traffic->n_sequences, dims = problem_at(p, p->n_layers, 0), ranks = (size_t)p->n_ranks;
    likeness k = {.p = p, .random = random_open(p, stream), .vectors = profile_sequences(p->traffic, dims)};
    k.weight = malloc(n * sizeof *k.weight);
    k.room = malloc(ranks * sizeof *k.room);
    k.members = malloc(n * sizeof *k.members);
    k.place = malloc(n * sizeof *k.place);
    k.node = malloc(n * sizeof *k.node);
    status st = k.vectors && k.weight && k.room && k.members && k.place && k.node
                    ? STATUS_OK
                    : status_fail(STATUS_NO_MEMORY, "no memory to group %zu sequences", n);
    if (st == STATUS_OK)
        st = group_nodes(&k, dims);
    for (int node = 0; st == STATUS_OK && node < p->topology->n_nodes; node++)
        st = group_ranks(&k, dims, node, out);
    free(k.vectors);
    free(k.weight);
    free(k.room);
    free(k.members);
    free(k.place);
    free(k.node);
    return st;
}

/* ---- under a plan ---- */

typedef struct {
    const problem *p;
    const plan *made;
    double *cost; /* [n_layers][n_sequences][n_ranks]: each layer by itself, so that threads do not meet */
} pricing;

static status price_layer(void *arg, int l)
{
    pricing *k = arg;
    const problem *p = k->p;
    const traffic *t = p->traffic;
    int *nearest = malloc((size_t)p->n_experts * (size_t)p->n_ranks * sizeof *nearest);
    int64_t *seen = malloc((size_t)p->n_ranks * sizeof *seen), stamp = 0;
    if (!nearest || !seen) {
        free(nearest);
        free(seen);
        return status_fail(STATUS_NO_MEMORY, "no memory to price owners");
    }
    memset(seen, 0, (size_t)p->n_ranks * sizeof *seen);
    for (int e = 0; e < p->n_experts; e++)
        for (int r = 0; r < p->n_ranks; r++)
            nearest[e * p->n_ranks + r] = plan_nearest(k->made, p->topology->node_of_rank, l, e, r);
    for (int s = 0; s < t->n_sequences; s++)
        for (int64_t token = t->first_token[s]; token < t->first_token[s + 1]; token++)
            for (int r = 0; r < p->n_ranks; r++) {
                const uint16_t *experts = traffic_experts(t, l, token);
                double *sum = k->cost + ((size_t)l * (size_t)t->n_sequences + (size_t)s) * (size_t)p->n_ranks + (size_t)r;
                seen[r] = ++stamp;
                for (int j = 0; j < t->shape.top_k; j++) {
                    if (experts[j] == ROUTING_NO_EXPERT)
                        continue;
                    int to = nearest[experts[j] * p->n_ranks + r];
                    *sum += seen[to] == stamp ? 0 : topology_us_per_byte(p->topology, r, to);
                    seen[to] = stamp;
                }
            }
    free(nearest);
    free(seen);
    return STATUS_OK;
}

static status hand_out_by_cost(const problem *p, const double *cost, uint16_t *out)
{
    const traffic *t = p->traffic;
    size_t n = (size_t)t->n_sequences;
    double *weight = calloc(n, sizeof *weight), *room = calloc((size_t)p->n_ranks, sizeof *room);
    int *place = malloc(n * sizeof *place);
    status st = weight && room && place ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to hand out %zu sequences", n);
    for (size_t s = 0; st == STATUS_OK && s < n; s++)
        weight[s] = tokens_of(t, (int)s);
    for (int g = 0; st == STATUS_OK && g < p->n_ranks; g++)
        room[g] = room_factor * (double)t->n_tokens / p->n_ranks;
    if (st == STATUS_OK)
        st = hand_out((int)n, p->n_ranks, cost, weight, room, place);
    for (size_t s = 0; st == STATUS_OK && s < n; s++)
        out[s] = (uint16_t)place[s];
    free(weight);
    free(room);
    free(place);
    return st;
}

status owners_by_plan(const problem *p, const plan *made, uint16_t *out)
{
    size_t cells = (size_t)p->traffic->n_sequences * (size_t)p->n_ranks;
    pricing k = {p, made, calloc((size_t)p->n_layers * cells, sizeof *k.cost)};
    if (!k.cost)
        return status_fail(STATUS_NO_MEMORY, "no memory to price %d owners", p->n_ranks);
    status st = parallel_for(p->request->threads, p->n_layers, price_layer, &k);
    for (int l = 1; l < p->n_layers; l++)
        for (size_t i = 0; i < cells; i++)
            k.cost[i] += k.cost[(size_t)l * cells + i];
    if (st == STATUS_OK)
        st = hand_out_by_cost(p, k.cost, out);
    free(k.cost);
    return st;
}

/* ---- schedules ---- */

static int sequence_of(const traffic *t, int64_t token)
{
    int low = 0, high = t->n_sequences - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (t->first_token[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

status owners_schedule(const problem *p, const uint16_t *owner_of_sequence, replay_schedule *out)
{
    const replay_schedule *from = p->schedule;
    size_t n = (size_t)from->first[from->n_steps];
    replay_schedule s = {.n_steps = from->n_steps};
    s.first = malloc(((size_t)from->n_steps + 1) * sizeof *s.first);
    s.token = malloc(n * sizeof *s.token);
    s.owner = malloc(n * sizeof *s.owner);
    if (!s.first || !s.token || !s.owner) {
        replay_schedule_clear(&s);
        return status_fail(STATUS_NO_MEMORY, "no memory for a schedule of %zu tokens", n);
    }
    memcpy(s.first, from->first, ((size_t)from->n_steps + 1) * sizeof *s.first);
    memcpy(s.token, from->token, n * sizeof *s.token);
    for (size_t i = 0; i < n; i++)
        s.owner[i] = owner_of_sequence[sequence_of(p->traffic, from->token[i])];
    *out = s;
    return STATUS_OK;
}
