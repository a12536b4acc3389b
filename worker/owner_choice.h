/* owner_choice.h - which rank should own a sequence, by how far its first rows had to go (replay.h, owners by affinity). Pure. */
#ifndef CONVOKE_WORKER_OWNER_CHOICE_H
#define CONVOKE_WORKER_OWNER_CHOICE_H

#include "placement/replay.h"

#include <stdbool.h>

/* What a row costs on links, and scratch. */
typedef struct owner_prices owner_prices;
/* row_bytes: one row, one way. The topology is borrowed. */
status owner_prices_create(const topology *t, double row_bytes, owner_prices **out);
void owner_prices_destroy(owner_prices *o); /* NULL is fine */
/* One token's experts in one layer [top_k]: adds to us [n_ranks] what its row would have cost, had each rank owned it: once for
 * each other rank of its node that it goes to, once for each other node, and there from the rank that takes it to the others, as
 * the exchange does (replay.h, node_dedupe). The copy it would go to is the rank's own, else the first on its node, else the
 * home. The plan has the topology's ranks. */
void owner_add_row(owner_prices *o, const plan *p, int layer, const uint16_t *experts, int top_k, double *us);

typedef struct {
    int n_ranks, owner;
    const double *us;      /* [n_ranks] of n_tokens tokens, had each rank owned them */
    const bool *has_room;  /* [n_ranks] for one more; the owner's own is not looked at */
    const double *move_us; /* [n_ranks] what moving its KV cache there costs */
    int n_tokens, n_left;  /* tokens seen; that it will still run, as far as is known */
} owner_question;
/* The rank with the least `us` of those with room, if what that saves there and back over min(n_left, AFFINITY_PAYBACK) tokens is
 * more than moving costs; else the owner. Ties: the owner, then the lower rank. */
int owner_choose(const owner_question *q);

#endif
