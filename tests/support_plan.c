#include "tests/support_plan.h"

#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>

#define MAX_COPIES 4

/* Appends the ranks of one expert, all different. */
static int add_copies(uint64_t *seed, int n_ranks, double replica_share, int *ranks)
{
    int want = 1;
    if ((double)(support_random(seed) >> 11) * 0x1p-53 < replica_share)
        want += 1 + support_below(seed, MAX_COPIES - 1);
    if (want > n_ranks)
        want = n_ranks;
    for (int n = 0; n < want;) {
        ranks[n] = support_below(seed, n_ranks);
        bool taken = false;
        for (int i = 0; i < n; i++)
            taken |= ranks[i] == ranks[n];
        n += !taken;
    }
    return want;
}

status support_random_plan(uint64_t *seed, const plan_shape *shape, const int *node_of_rank, double replica_share, plan *out)
{
    plan p;
    TRY(plan_contiguous(shape, node_of_rank, &p));
    size_t n_lists = (size_t)p.n_layers * (size_t)p.n_experts;
    int *ranks = reallocarray(p.copy_ranks, n_lists * MAX_COPIES + 1, sizeof *ranks);
    if (!ranks) {
        plan_clear(&p);
        return status_fail(STATUS_NO_MEMORY, "random plan: no memory for %zu lists", n_lists);
    }
    p.copy_ranks = ranks;
    int at = 0;
    for (size_t i = 0; i < n_lists; i++) {
        p.first_copy[i] = at;
        at += add_copies(seed, p.n_ranks, replica_share, ranks + at);
    }
    p.first_copy[n_lists] = at;
    snprintf(p.name, sizeof p.name, "random");
    *out = p;
    return STATUS_OK;
}

status support_reversed_plan(const plan_shape *shape, const int *node_of_rank, plan *out)
{
    plan p;
    TRY(plan_contiguous(shape, node_of_rank, &p));
    for (int i = 0; i < p.first_copy[p.n_layers * p.n_experts]; i++)
        p.copy_ranks[i] = p.n_ranks - 1 - p.copy_ranks[i];
    snprintf(p.name, sizeof p.name, "reversed");
    *out = p;
    return STATUS_OK;
}
