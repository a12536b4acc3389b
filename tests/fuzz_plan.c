/* fuzz_plan.c - any bytes as a plan: refused with a sentence, or a plan whose every promise holds and whose choices stay inside.
 */
#include "placement/plan.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const plan *p)
{
    int at = 0;
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            int n = plan_n_copies(p, l, e);
            if (n < 1 || p->first_copy[l * p->n_experts + e] != at)
                abort();
            at += n;
            for (int c = 0; c < n; c++)
                if (plan_copies(p, l, e)[c] < 0 || plan_copies(p, l, e)[c] >= p->n_ranks)
                    abort();
            int owner = (l * 7 + e) % p->n_ranks;
            if (!plan_holds(p, l, e, plan_choose(p, REPLICA_OWNER_FIRST, l, e, owner, (uint32_t)e)) ||
                !plan_holds(p, l, e, plan_choose(p, REPLICA_ROUND_ROBIN, l, e, owner, (uint32_t)e)))
                abort();
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const plan_shape shape = {.n_ranks = 2, .n_experts = 2, .n_layers = 2, .model_name = "m"};
    const plan_shape *shapes[] = {NULL, &shape};
    for (int i = 0; i < 2; i++) {
        plan p;
        if (plan_parse("plan", (const char *)data, size, shapes[i], &p) != STATUS_OK) {
            if (status_message()[0] == '\0')
                abort();
            continue;
        }
        check(&p);
        plan_clear(&p);
    }
    return 0;
}
