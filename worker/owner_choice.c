#include "worker/owner_choice.h"

#include "placement/routing_shape.h"

static int nearest_copy(const plan *p, int layer, int expert, int owner)
{
    const int *ranks = plan_copies(p, layer, expert);
    int near = -1;
    for (int c = 0, n = plan_n_copies(p, layer, expert); c < n; c++) {
        if (ranks[c] == owner)
            return owner;
        if (near < 0 && p->node_of_rank[ranks[c]] == p->node_of_rank[owner])
            near = ranks[c];
    }
    return near < 0 ? ranks[0] : near;
}

void owner_add_row(const plan *p, int layer, const uint16_t *experts, int top_k, const double *row_us, uint64_t *seen,
                   uint64_t *stamp, double *us)
{
    size_t n = (size_t)p->n_ranks;
    for (size_t r = 0; r < n; r++) {
        seen[r] = ++*stamp; /* its own rows go nowhere */
        for (int j = 0; j < top_k; j++) {
            if (experts[j] == ROUTING_NO_EXPERT)
                continue;
            size_t to = (size_t)nearest_copy(p, layer, experts[j], (int)r);
            us[r] += seen[to] != *stamp ? row_us[r * n + to] : 0;
            seen[to] = *stamp;
        }
    }
}

int owner_choose(const owner_question *q)
{
    int best = q->owner, payback = q->n_left < AFFINITY_PAYBACK ? q->n_left : AFFINITY_PAYBACK;
    for (int r = 0; r < q->n_ranks; r++)
        if (r != q->owner && q->has_room[r] && q->us[r] < q->us[best])
            best = r;
    double gain = 2 * (q->us[q->owner] - q->us[best]) * payback / (q->n_tokens > 0 ? q->n_tokens : 1);
    return gain > q->move_us[best] ? best : q->owner;
}
