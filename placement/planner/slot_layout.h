/* slot_layout.h - a plan as engines with expert parallelism keep it: a row of slots per layer, each holding one expert, cut into
 * equal blocks, one per rank.
 *
 * Such a layout wants as many slots on every rank and in every layer, and has no word for which copy of an expert is its home.
 * Our rules for both, the same for every format that is made of slots:
 *
 *   padding  a rank with fewer copies than the fullest one of any layer repeats experts it already holds; reading takes an
 *            expert that stands several times on one rank as one copy
 *   home     the copy that stands nearest to the beginning of its rank's block (ties: the lower rank). Writing puts the homes
 *            of replicated experts first, then single copies, padding, and replicas last, each by rising expert
 *
 * So a plan comes back with the same copies, and with the same homes unless some rank's block is nearly all replicas while
 * another begins with as many homes of replicated experts: slot_layout_of_plan() counts those. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SLOT_LAYOUT_H
#define CONVOKE_PLACEMENT_PLANNER_SLOT_LAYOUT_H

#include "placement/plan.h"

typedef struct {
    int n_layers, n_slots, n_experts, n_ranks; /* n_slots: of all ranks, a multiple of n_ranks */
    int *layer_numbers;                        /* [n_layers] */
    int *expert_of_slot;                       /* [n_layers][n_slots] */
} slot_layout;

/* Memory for a layout, numbers 0, 1, 2, ..., all slots empty (-1). */
status slot_layout_create(const char *where, int n_layers, int n_slots, int n_experts, int n_ranks, slot_layout *out);
void slot_layout_clear(slot_layout *layout); /* a zeroed one is fine */

/* `engine` begins the sentences. Refuses a rank that holds nothing in a layer: there is nothing to repeat. homes_lost (may be
 * NULL): experts whose home will be read back as another of their copies. */
status slot_layout_of_plan(const char *engine, const plan *p, slot_layout *out, int *homes_lost);
/* Refuses an expert out of range and one that is in no slot. first_slot [n_layers][n_experts] says which slot is the home where
 * the format knows it; NULL: the rule above. n_nodes: ranks on nodes in equal blocks. name: the plan's. */
status slot_layout_to_plan(const char *where, const slot_layout *layout, const int *first_slot, int n_nodes, const char *name,
                           plan *out);

#endif
