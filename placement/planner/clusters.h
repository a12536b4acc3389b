/* clusters.h - every set of experts that a rank could hold in one layer, with the number of tokens that would come to it.
 *
 * A plan without replicas cuts a layer's experts into one cluster per rank, and a token's distinct ranks are the clusters it
 * touches: cost and load separate by rank, so the best plan is a set partitioning over clusters. All of them are written down
 * where there are at most CLUSTERS_MOST (4 of 32: 35,960); tokens are counted by inclusion and exclusion over the counts of
 * sets of experts chosen together, which takes one pass over the traffic. Plain data, pure but for memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CLUSTERS_H
#define CONVOKE_PLACEMENT_PLANNER_CLUSTERS_H

#include "placement/planner/lp.h"
#include "placement/planner/problem.h"

enum { CLUSTERS_MOST = 1 << 18, CLUSTERS_WIDEST = 12 };

/* Ranks that are alike: same slots, same cap. */
typedef struct {
    int n_ranks, slots;
    double cap, least; /* rows: at most, and at least because the others cannot take more; infinite, 0 where there are no caps */
} rank_class;

typedef struct {
    int n_experts, n_ranks, width; /* width: members of the largest cluster */
    bool full;                     /* every slot of the layer is taken, so a rank holds exactly its slots */
    const double *load;            /* [n_experts] the problem's */
    int n_classes;
    rank_class *classes;
    int *class_of_rank; /* [n_ranks] */
    int64_t n_tokens;   /* of the traffic */
    /* tokens that chose all of a set, by size and the set's place among all of that size (colexicographic) */
    uint32_t *together[CLUSTERS_WIDEST + 1];
    int most_together;     /* larger sets were chosen by no token */
    const int64_t *pascal; /* [n_experts][CLUSTERS_WIDEST + 1] e over i */
    /* the clusters, those that no class could hold left out */
    int n;
    uint8_t *size;     /* [n] */
    uint16_t *members; /* [n][width] rising */
    int32_t *tokens;   /* [n] tokens with at least one member among their choices */
    double *rows;      /* [n] load */
} clusters;

/* Whether a layer's clusters can be written down. */
bool clusters_possible(const problem *p, int layer);
/* caps: leave out what breaks the problem's caps (a plan with replicas may share an expert's load, so these only bind plans
 * without: they are not applied where the layer has slots to spare, unless `no_replicas`). The problem needs traffic. */
status clusters_create(const problem *p, int layer, bool caps, bool no_replicas, clusters **out);
void clusters_destroy(clusters *c); /* NULL is fine */

static inline const uint16_t *clusters_members(const clusters *c, int cluster)
{
    return c->members + (size_t)cluster * (size_t)c->width;
}
/* Tokens that any set of rising experts would touch. */
int64_t clusters_tokens(const clusters *c, const int *experts, int n);
bool clusters_fits(const clusters *c, int class, int size, double rows);
bool clusters_kept(const clusters *c, const int *home); /* whether home [n_experts] fits everywhere */

/* ---- the linear programme over all clusters ---- */

/* Tokens times ranks that every choice of clusters has at least, whatever the duals [n_experts]: in exact arithmetic over all
 * clusters. */
int64_t clusters_bound(const clusters *c, const double *duals);

typedef struct {
    int64_t bound;  /* clusters_bound() of the best duals found */
    double value;   /* the linear programme's value as GLPK has it, or of its last master */
    bool solved;    /* to its optimum */
    double *duals;  /* [n_experts] */
    int64_t pivots; /* spent */
} cluster_relaxation;

/* n layers by column generation, from homes [n_experts] that keep room and caps; `processes` at once. */
status clusters_relax(int n, clusters *const *layers, const int *const *homes, double seconds, int64_t pivots, int processes,
                      cluster_relaxation *out);
void cluster_relaxation_clear(cluster_relaxation *r);

#endif
