/* One layer with replicas. */
#include "placement/planner/replicate.h"
#include "placement/planner/assign.h"
#include "placement/planner/eplb.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    int n, n_ranks_with_room; /* n: places */
    int *slots;               /* [n_ranks] at most n_experts each */
    int *expert, *rank;       /* [n] */
    int *copies;              /* [n_experts] */
    float *weight;            /* [n_experts] */
    double *load;             /* [n] */
} places;

static void places_close(places *y)
{
    free(y->slots);
    free(y->expert);
    free(y->copies);
    free(y->weight);
    free(y->load);
}

static status places_open(const problem *p, int layer, const int *slots, places *y)
{
    *y = (places){.slots = malloc((size_t)p->n_ranks * sizeof(int))};
    for (int g = 0; y->slots && g < p->n_ranks; g++) {
        y->slots[g] = slots[g] < p->n_experts ? slots[g] : p->n_experts;
        y->n += y->slots[g];
        y->n_ranks_with_room += y->slots[g] > 0;
    }
    size_t n = (size_t)y->n + (size_t)p->n_experts;
    y->expert = malloc(2 * n * sizeof *y->expert);
    y->rank = y->expert + n;
    y->copies = malloc(n * sizeof *y->copies);
    y->weight = malloc(n * sizeof *y->weight);
    y->load = malloc(n * sizeof *y->load);
    if (!y->slots || !y->expert || !y->copies || !y->weight || !y->load) {
        places_close(y);
        return status_fail(STATUS_NO_MEMORY, "no memory to replicate %d experts", p->n_experts);
    }
    for (int e = 0; e < p->n_experts; e++)
        y->weight[e] = (float)p->load[problem_at(p, layer, e)];
    return STATUS_OK;
}

/* False when n copies cannot be kept apart. */
static status pack(const problem *p, int layer, bool exchanges, places *y, bool *packed, double *worst)
{
    eplb_replicate(p->n_experts, y->n, y->weight, y->n_ranks_with_room, y->expert, y->copies);
    *packed = y->expert[y->n - 1] >= 0;
    if (!*packed)
        return STATUS_OK;
    for (int i = 0; i < y->n; i++)
        y->load[i] = p->load[problem_at(p, layer, y->expert[i])] / y->copies[y->expert[i]];
    assign_task t = {y->n, p->n_ranks, y->load, p->share, y->slots, y->expert};
    *worst = exchanges ? assign_spread(&t, y->rank) : assign_first(&t, y->rank);
    *packed = *worst != ASSIGN_NO_ROOM;
    return *worst == ASSIGN_NO_MEMORY ? status_fail(STATUS_NO_MEMORY, "no memory to place %d copies", y->n) : STATUS_OK;
}

status replicate_layer(const problem *p, int layer, const int *slots, bool exchanges, int *home, bool *holds, double *worst)
{
    places y;
    bool packed = false;
    TRY(places_open(p, layer, slots, &y));
    status st = STATUS_OK;
    for (y.n++; !packed && st == STATUS_OK && --y.n >= p->n_experts;)
        st = pack(p, layer, exchanges, &y, &packed, worst);
    if (st == STATUS_OK && !packed)
        st =
            status_fail(STATUS_BAD_INPUT, "layer %d: there is no room for its %d experts", p->layer_numbers[layer], p->n_experts);
    memset(holds, 0, (size_t)p->n_experts * (size_t)p->n_ranks * sizeof *holds);
    for (int i = 0; st == STATUS_OK && i < y.n; i++) {
        holds[(size_t)y.expert[i] * (size_t)p->n_ranks + (size_t)y.rank[i]] = true;
        if (i < p->n_experts)
            home[y.expert[i]] = y.rank[i]; /* the first n_experts places are one of each */
    }
    places_close(&y);
    return st;
}
