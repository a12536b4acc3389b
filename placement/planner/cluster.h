/* cluster.h - experts that send their tokens the same ways, gathered in groups of given sizes. Pure but for scratch memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CLUSTER_H
#define CONVOKE_PLACEMENT_PLANNER_CLUSTER_H

#include "proto/status.h"

/* rows [n_items][width]: what is compared, by cosine. sizes [n_clusters]: items per cluster, summing to n_items. Starts from
 * items that are least alike, then alternates exact transport to the nearest centre and new centres (spherical k-means with
 * sizes). cluster [n_items]. Clusters are numbered so that like ones come together: those of one node are neighbours. */
status cluster_rows(int n_items, int width, const double *rows, int n_clusters, const int *sizes, int *cluster);

#endif
