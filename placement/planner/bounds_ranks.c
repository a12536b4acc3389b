/* bounds_ranks.c - how few distinct ranks a token's experts can have: per layer the dual of the set-partitioning programme over
 * all clusters where they can be written down, else a bound from pairs.
 *
 * What is bounded are the ranks of a token's homes, as score_ranks() counts them. Homes cut a layer's experts into one cluster
 * per rank, each within the rank's slots, whether or not further slots hold replicas. Load caps (only when slack was given) bind
 * a cluster where the layer has no slot to spare; elsewhere replicas may share its load, and the bound leaves caps out. */
#include "placement/planner/bounds.h"
#include "placement/planner/clusters.h"
#include "placement/planner/start.h"
#include "proto/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 16 };

typedef struct {
    const problem *p;
    clusters *layers[BATCH];
    int first;
} batch;

static status create_layer(void *arg, int i)
{
    batch *b = arg;
    if (!clusters_possible(b->p, b->first + i) || b->p->traffic->shape.top_k > 16)
        return STATUS_OK;
    return clusters_create(b->p, b->first + i, b->p->request->slack >= 0, false, &b->layers[i]);
}

static int widest_room(const problem *p, int layer)
{
    int most = 0;
    for (int g = 0; g < p->n_ranks; g++)
        if (p->slots[layer * p->n_ranks + g] > most)
            most = p->slots[layer * p->n_ranks + g];
    return most;
}

static int compare_falling(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* A token with m experts in a cluster saves m - 1 <= m (m - 1) / 2 meetings there: no more than pairs of experts share a cluster,
 * and an expert shares its own with slots - 1 others. Counted from the traffic itself, whatever the statistics say. */
static status saved_by_pairs(const problem *p, int layer, int slots, double *out)
{
    const traffic *t = p->traffic;
    size_t n = (size_t)p->n_experts;
    double *pairs = calloc(n * n, sizeof *pairs), sum = 0;
    if (!pairs)
        return status_fail(STATUS_NO_MEMORY, "no memory for pairs of %d experts", p->n_experts);
    for (int64_t token = 0; token < t->n_tokens; token++) {
        const uint16_t *experts = traffic_experts(t, layer, token);
        for (int i = 0; i < t->shape.top_k; i++)
            for (int j = 0; j < t->shape.top_k; j++)
                if (i != j && experts[i] != ROUTING_NO_EXPERT && experts[j] != ROUTING_NO_EXPERT)
                    pairs[(size_t)experts[i] * n + experts[j]] += 1;
    }
    for (size_t e = 0; e < n; e++) {
        qsort(pairs + e * n, n, sizeof *pairs, compare_falling);
        for (int i = 0; i < slots - 1 && i < p->n_experts; i++)
            sum += pairs[e * n + (size_t)i];
    }
    free(pairs);
    *out = sum / 2;
    return STATUS_OK;
}

/* The bound without clusters: from pairs, or what the slots alone say. */
static status trivial_meetings(const problem *p, int layer, double *out)
{
    const traffic *t = p->traffic;
    int slots = widest_room(p, layer);
    double by_slots = 0, chosen = 0, saved = 0;
    for (int64_t token = 0; token < t->n_tokens; token++) {
        int n = 0;
        for (int j = 0; j < t->shape.top_k; j++)
            n += traffic_experts(t, layer, token)[j] != ROUTING_NO_EXPERT;
        chosen += n;
        by_slots += (n + slots - 1) / slots;
    }
    TRY(saved_by_pairs(p, layer, slots, &saved));
    *out = fmax(by_slots, chosen - saved);
    return STATUS_OK;
}

static status bound_batch(batch *b, int n, const int *home, double seconds, double *meetings, bool *proved)
{
    const problem *p = b->p;
    clusters *layers[BATCH];
    const int *homes[BATCH];
    cluster_relaxation found[BATCH];
    int at[BATCH], count = 0;
    memset(b->layers, 0, sizeof b->layers);
    status st = parallel_for(p->request->threads, n, create_layer, b);
    for (int i = 0; i < n && st == STATUS_OK; i++) {
        st = trivial_meetings(p, b->first + i, &meetings[i]);
        if (!b->layers[i] || !clusters_kept(b->layers[i], home + problem_at(p, b->first + i, 0)))
            continue;
        layers[count] = b->layers[i];
        homes[count] = home + problem_at(p, b->first + i, 0);
        at[count++] = i;
    }
    if (st == STATUS_OK)
        st = clusters_relax(count, layers, homes, seconds, 0, p->request->threads, found);
    for (int k = 0; k < count && st == STATUS_OK; k++) {
        meetings[at[k]] = fmax(meetings[at[k]], (double)found[k].bound);
        proved[at[k]] = found[k].solved;
        cluster_relaxation_clear(&found[k]);
    }
    for (int i = 0; i < n; i++)
        clusters_destroy(b->layers[i]);
    return st;
}

status bounds_ranks_of_layers(const problem *p, double seconds, double *meetings, bool *proved)
{
    int *home = malloc(problem_at(p, p->n_layers, 0) * sizeof *home);
    if (!home)
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d layers", p->n_layers);
    double deadline = seconds > 0 ? clock_seconds() + seconds : 0;
    batch b = {.p = p};
    status st = start_lpt(p, home);
    for (int l = 0; l < p->n_layers; l++)
        proved[l] = false;
    for (; b.first < p->n_layers && st == STATUS_OK; b.first += BATCH) {
        int n = p->n_layers - b.first < BATCH ? p->n_layers - b.first : BATCH;
        double left = deadline > 0 ? fmax(deadline - clock_seconds(), 0.001) : 0;
        st = bound_batch(&b, n, home, left, meetings + b.first, proved + b.first);
    }
    free(home);
    return st;
}

status bounds_ranks(const problem *p, double seconds, plan_bounds *out)
{
    double *meetings = malloc((size_t)p->n_layers * sizeof *meetings), sum = 0;
    bool *proved = malloc((size_t)p->n_layers * sizeof *proved);
    status st = meetings && proved ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    if (st == STATUS_OK)
        st = bounds_ranks_of_layers(p, seconds, meetings, proved);
    if (st == STATUS_OK) {
        out->ranks_layers_proved = 0;
        for (int l = 0; l < p->n_layers; l++) {
            sum += meetings[l]; /* whole numbers (halves, by pairs): exact */
            out->ranks_layers_proved += proved[l];
        }
        out->ranks_per_token = sum / ((double)p->traffic->n_tokens * p->n_layers) * (1 - 1e-14);
    }
    free(meetings);
    free(proved);
    return st;
}
