#include "worker/owner_choice.h"

#include "placement/routing_shape.h"

#include <stdlib.h>

struct owner_prices {
    const topology *t;
    double *row_us;                    /* [n_ranks][n_ranks] from, to */
    int *gateway;                      /* [n_ranks][n_nodes] who takes a rank's rows on another node */
    uint64_t *seen, *seen_node, stamp; /* [n_ranks], [n_nodes] the last row that went there */
};

void owner_prices_destroy(owner_prices *o)
{
    if (!o)
        return;
    free(o->row_us);
    free(o->gateway);
    free(o->seen);
    free(o->seen_node);
    free(o);
}

/* Its rank with the owner's local index, modulo its size. */
static int find_gateway(const topology *t, int owner, int node)
{
    int size = 0;
    for (int r = 0; r < t->n_ranks; r++)
        size += t->node_of_rank[r] == node;
    for (int r = 0; r < t->n_ranks; r++)
        if (t->node_of_rank[r] == node && t->local_index[r] == t->local_index[owner] % size)
            return r;
    return owner;
}

static void fill_prices(owner_prices *o, double row_bytes)
{
    size_t n = (size_t)o->t->n_ranks, nodes = (size_t)o->t->n_nodes;
    for (size_t r = 0; r < n; r++) {
        for (size_t to = 0; to < n; to++)
            o->row_us[r * n + to] = row_bytes * topology_us_per_byte(o->t, (int)r, (int)to);
        for (size_t node = 0; node < nodes; node++)
            o->gateway[r * nodes + node] = find_gateway(o->t, (int)r, (int)node);
    }
}

status owner_prices_create(const topology *t, double row_bytes, owner_prices **out)
{
    size_t n = (size_t)t->n_ranks, nodes = (size_t)t->n_nodes;
    owner_prices *o = calloc(1, sizeof *o);
    if (!o)
        return status_fail(STATUS_NO_MEMORY, "no memory to judge owners among %d ranks", t->n_ranks);
    o->t = t;
    o->row_us = calloc(n * n, sizeof *o->row_us);
    o->gateway = calloc(n * nodes, sizeof *o->gateway);
    o->seen = calloc(n, sizeof *o->seen);
    o->seen_node = calloc(nodes, sizeof *o->seen_node);
    if (!o->row_us || !o->gateway || !o->seen || !o->seen_node) {
        owner_prices_destroy(o);
        return status_fail(STATUS_NO_MEMORY, "no memory to judge owners among %d ranks", t->n_ranks);
    }
    fill_prices(o, row_bytes);
    *out = o;
    return STATUS_OK;
}

/* One more rank that a row of `owner` goes to. */
static double hop_us(owner_prices *o, size_t owner, size_t to)
{
    size_t n = (size_t)o->t->n_ranks, nodes = (size_t)o->t->n_nodes, node = (size_t)o->t->node_of_rank[to];
    if (o->t->node_of_rank[owner] == o->t->node_of_rank[to])
        return o->row_us[owner * n + to];
    size_t gateway = (size_t)o->gateway[owner * nodes + node];
    double us = gateway != to ? o->row_us[gateway * n + to] : 0;
    us += o->seen_node[node] != o->stamp ? o->row_us[owner * n + gateway] : 0;
    o->seen_node[node] = o->stamp;
    return us;
}

void owner_add_row(owner_prices *o, const plan *p, int layer, const uint16_t *experts, int top_k, double *us)
{
    for (size_t r = 0; r < (size_t)p->n_ranks; r++) {
        o->seen[r] = ++o->stamp; /* its own rows go nowhere */
        for (int j = 0; j < top_k; j++) {
            if (experts[j] == ROUTING_NO_EXPERT)
                continue;
            size_t to = (size_t)plan_nearest(p, p->node_of_rank, layer, experts[j], (int)r);
            if (o->seen[to] == o->stamp)
                continue;
            o->seen[to] = o->stamp;
            us[r] += hop_us(o, r, to);
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
