/* owners.h - which rank should hold which sequence, so that its rows find their experts at home.
 *
 * A planner's guess at what owners by affinity (placement/replay.h) will do once a plan makes it worth while: sequences that use
 * the same experts go together, and every rank gets its share of the tokens. Pure but for scratch memory. */
#ifndef CONVOKE_PLACEMENT_PLANNER_OWNERS_H
#define CONVOKE_PLACEMENT_PLANNER_OWNERS_H

#include "placement/planner/problem.h"

/* Without a plan: sequences in groups by cosine of their expert counts, nodes first, then the ranks of each node (k-means with
 * room for 1.05 of a rank's share of the tokens). out [n_sequences]. */
status owners_by_likeness(const problem *p, uint64_t stream, uint16_t *out);
/* Under a plan: each sequence where its rows' transfers take least, those first that lose most elsewhere, with the same room. */
status owners_by_plan(const problem *p, const plan *made, uint16_t *out);
/* The problem's schedule with every entry owned by its sequence's owner. replay_schedule_clear() frees it. */
status owners_schedule(const problem *p, const uint16_t *owner_of_sequence, replay_schedule *out);

#endif
