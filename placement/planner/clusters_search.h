/* clusters_search.h - one layer cut into clusters: descent with kicks, then the integer programme over the clusters that could
 * still be part of something better. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CLUSTERS_SEARCH_H
#define CONVOKE_PLACEMENT_PLANNER_CLUSTERS_SEARCH_H

#include "placement/planner/clusters.h"

/* Tokens times ranks of a layer cut by home [n_experts]. */
int64_t clusters_cost(const clusters *c, const int *home);

/* Swaps and moves while they help, then kicks of a few random swaps, keeping what is no worse. home keeps room and caps before
 * and after; returns its cost. A unit of work is a swap or move looked at. Pure. */
int64_t clusters_descend(const clusters *c, random_stream *random, work_budget *work, int *home);

typedef struct {
    lp_model *model; /* over `n` candidates, with home's own clusters among them; NULL: nothing can be better than home */
    bool complete;   /* every cluster that could be part of something better is a candidate */
    int n, *cluster, *class;
    double *start;
} cluster_choice;

/* Clusters that fit under what is known: a choice cheaper than `cost` holds only clusters whose reduced cost is below
 * cost - bound. At most `most` of them, the cheapest. */
status clusters_choice_create(const clusters *c, const cluster_relaxation *relaxation, const int *home, int most,
                              cluster_choice *out);
/* From the programme's point to homes. */
void clusters_choice_take(const clusters *c, const cluster_choice *choice, const double *x, int *home);
void clusters_choice_clear(cluster_choice *choice);

#endif
