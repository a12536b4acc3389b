/* owner_choice.h - which rank should own a sequence, by how far its first rows had to go (replay.h, owners by affinity). Pure. */
#ifndef CONVOKE_WORKER_OWNER_CHOICE_H
#define CONVOKE_WORKER_OWNER_CHOICE_H

#include "placement/replay.h"

#include <stdbool.h>

/* One token's experts in one layer [top_k]: adds to us [n_ranks] what its row would have cost on links, had each rank owned it:
 * the distinct other ranks it goes to, by row_us [n_ranks][n_ranks] (a row from, to). The copy it would go to is the rank's own,
 * else the first on its node, else the home. seen: [n_ranks] scratch and *stamp, zero at first. */
void owner_add_row(const plan *p, int layer, const uint16_t *experts, int top_k, const double *row_us, uint64_t *seen,
                   uint64_t *stamp, double *us);

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
