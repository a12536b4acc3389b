/* bounds_load.c - how even a layer's load can get at all.
 *
 * Without room for replicas an expert is whole on one rank, and that rank holds as many others as find no room elsewhere: at
 * least the coldest ones (assign_bound()). With r places to spare, every expert of load w has at most 1 + its replicas copies of
 * w / copies each; so at most t of a share everywhere needs ceil(w / (t * largest share * rows)) copies of it, and the sum of
 * those beyond the first must not exceed r: the smallest such t bounds the figure, or 1 if that is larger. */
#include "placement/planner/assign.h"
#include "placement/planner/bounds.h"

#include <math.h>
#include <stdlib.h>

/* Whether the spare places suffice to cut every expert into copies of at most `piece` rows. */
static bool can_cut(const double *load, int n_experts, double piece, int64_t spare, int most_copies)
{
    for (int e = 0; e < n_experts; e++) {
        double copies = ceil(load[e] / piece * (1 - 1e-12));
        if (copies > most_copies)
            return false;
        if (copies > 1)
            spare -= (int64_t)copies - 1;
    }
    return spare >= 0;
}

/* The smallest largest piece: pieces are load / copies, so bisection ends between two of them; its lower end is proved. */
static double bound_with_replicas(const problem *p, int layer, int64_t spare)
{
    const double *load = p->load + problem_at(p, layer, 0);
    double largest = 0, hottest = 0;
    int copies = 0;
    for (int g = 0; g < p->n_ranks; g++) {
        largest = fmax(largest, p->share[g]);
        copies += p->slots[(size_t)layer * (size_t)p->n_ranks + (size_t)g] > 0;
    }
    for (int e = 0; e < p->n_experts; e++)
        hottest = fmax(hottest, load[e]);
    double low = 0, high = hottest;
    for (int i = 0; i < 60 && hottest > 0; i++) {
        double middle = (low + high) / 2;
        if (can_cut(load, p->n_experts, middle, spare, copies))
            high = middle;
        else
            low = middle;
    }
    return p->rows[layer] > 0 ? fmax(1, low / (largest * p->rows[layer])) : 1;
}

status bounds_load(const problem *p, plan_bounds *out)
{
    double *of_layer = malloc((size_t)p->n_layers * sizeof *of_layer), sum = 0;
    if (!of_layer)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    for (int l = 0; l < p->n_layers; l++) {
        const int *slots = p->slots + (size_t)l * (size_t)p->n_ranks;
        int64_t spare = -p->n_experts;
        for (int g = 0; g < p->n_ranks; g++)
            spare += slots[g] < p->n_experts ? slots[g] : p->n_experts;
        assign_task t = {p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share, slots, NULL};
        of_layer[l] = spare > 0 ? bound_with_replicas(p, l, spare) : assign_bound(&t);
        sum += of_layer[l];
    }
    free(out->balance_of_layer);
    out->balance_of_layer = of_layer;
    out->balance = sum / p->n_layers;
    return STATUS_OK;
}
