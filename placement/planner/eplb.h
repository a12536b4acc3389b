/* eplb.h - DeepSeek's expert-parallelism load balancer, step for step, in single precision as published
 * (github.com/deepseek-ai/EPLB, eplb.py). Pure but for scratch memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_EPLB_H
#define CONVOKE_PLACEMENT_PLANNER_EPLB_H

#include "proto/status.h"

/* One layer. Where n_groups is a multiple of n_nodes: groups of experts are packed onto nodes, each node replicates its own, and
 * its ranks share them out. Otherwise the global policy: one group, one node. weight [n_experts]; replica_expert [n_replicas]:
 * which expert each physical place holds, rank by rank. Refuses numbers that do not divide as the algorithm needs. Ties: the
 * lower index. */
status eplb_layer(int n_experts, int n_replicas, int n_groups, int n_nodes, int n_ranks, const float *weight,
                  int *replica_expert);

/* Its pieces. items_per_pack [n_packs]: room, all equal in the original. */
status eplb_pack(int n_items, int n_packs, const float *weight, const int *items_per_pack, int *pack, int *place_in_pack);
/* replica_expert [n_replicas]: each expert once, then a further copy of whichever has the most load per copy. copies
 * [n_experts]; max_copies: none gets more (the original knows no such limit). */
void eplb_replicate(int n_experts, int n_replicas, const float *weight, int max_copies, int *replica_expert, int *copies);

#endif
