/* expert_copies.h - which experts' weights this rank has in memory, and how that changes while steps run.
 *
 *   step loop    wish ──────────────► (progress) ──────────────► flip                        at step boundaries
 *                  │                                              │
 *   loader         └─► loads what is wished for and not there     └─► gives back what neither the live set
 *   thread             a bounded number of bytes a second             nor a wish names
 *
 * The thread runs at low priority and never holds anything a step waits for longer than a look at a few kilobytes. A newer wish
 * takes the place of an older one at any time before the flip; what was loaded for nothing goes back. */
#ifndef CONVOKE_WORKER_EXPERT_COPIES_H
#define CONVOKE_WORKER_EXPERT_COPIES_H

#include "worker/checkpoint.h"

typedef struct expert_copies expert_copies;

/* layer_numbers: the model's own numbers of its MoE layers. `live` [moe layers][experts]: what the checkpoint was bound with. All
 * are borrowed, `live` for the call alone. No thread runs before the first wish. */
status expert_copies_create(checkpoint *file, const model_config *config, const int *layer_numbers, const unsigned char *live,
                            expert_copies **out);
void expert_copies_destroy(expert_copies *c); /* NULL is fine */

/* From now on `wanted` [moe layers][experts] is wished for; 0 bytes per second: EXPERT_COPIES_RATE. */
#define EXPERT_COPIES_RATE ((uint64_t)256 << 20)
status expert_copies_wish(expert_copies *c, const unsigned char *wanted, uint64_t bytes_per_second);
/* Nothing is wished for any more. */
void expert_copies_forget(expert_copies *c);

typedef struct {
    uint64_t loaded, total; /* bytes of the present wish, without what was there before */
    bool ready;             /* all of it is there */
    bool failed;            /* the loader gave up on it; expert_copies_why() says why */
} expert_copies_state;
expert_copies_state expert_copies_progress(const expert_copies *c);
const char *expert_copies_why(const expert_copies *c);

/* The wish, which must be ready, becomes the live set: the model's weights are those now. */
void expert_copies_flip(expert_copies *c);

/* For tests and reports: whether the loader has nothing to do. */
bool expert_copies_at_rest(expert_copies *c);

#endif
