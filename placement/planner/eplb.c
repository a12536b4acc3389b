/* DeepSeek's expert-parallelism load balancer, step for step. */
#include "placement/planner/eplb.h"

#include <stdbool.h>
#include <stdlib.h>

typedef struct {
    float weight;
    int item;
} weighed;

static int compare_falling(const void *x, const void *y)
{
    const weighed *a = x, *b = y;
    return a->weight != b->weight ? (a->weight > b->weight ? -1 : 1) : a->item - b->item;
}

static bool one_each(int n_packs, const int *items_per_pack)
{
    for (int g = 0; g < n_packs; g++)
        if (items_per_pack[g] != 1)
            return false;
    return true;
}

status eplb_pack(int n_items, int n_packs, const float *weight, const int *items_per_pack, int *pack, int *place_in_pack)
{
    if (n_items == n_packs && one_each(n_packs, items_per_pack)) {
        for (int i = 0; i < n_items; i++) {
            pack[i] = i;
            place_in_pack[i] = 0;
        }
        return STATUS_OK;
    }
    weighed *order = malloc(((size_t)n_items + 1) * sizeof *order);
    float *weights = calloc((size_t)n_packs, sizeof *weights);
    int *items = calloc((size_t)n_packs, sizeof *items);
    status st = STATUS_OK;
    if (!order || !weights || !items)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory to pack %d items", n_items), out);
    for (int i = 0; i < n_items; i++)
        order[i] = (weighed){weight[i], i};
    qsort(order, (size_t)n_items, sizeof *order, compare_falling);
    for (int i = 0; i < n_items; i++) {
        int to = -1;
        for (int g = 0; g < n_packs; g++)
            if (items[g] < items_per_pack[g] && (to < 0 || weights[g] < weights[to]))
                to = g;
        if (to < 0)
            TRY_GOTO(status_fail(STATUS_BAD_INPUT, "eplb: there is no room for %d of %d items", n_items - i, n_items), out);
        pack[order[i].item] = to;
        place_in_pack[order[i].item] = items[to]++;
        weights[to] += order[i].weight;
    }
out:
    free(order);
    free(weights);
    free(items);
    return st;
}

void eplb_replicate(int n_experts, int n_replicas, const float *weight, int max_copies, int *replica_expert, int *copies)
{
    for (int e = 0; e < n_experts; e++) {
        replica_expert[e] = e;
        copies[e] = 1;
    }
    for (int i = n_experts; i < n_replicas; i++) {
        int hottest = -1;
        for (int e = 0; e < n_experts; e++)
            if (copies[e] < max_copies &&
                (hottest < 0 || weight[e] / (float)copies[e] > weight[hottest] / (float)copies[hottest]))
                hottest = e;
        replica_expert[i] = hottest;
        if (hottest >= 0)
            copies[hottest]++;
    }
}

typedef struct {
    int n_experts, n_replicas, n_groups, n_nodes, n_ranks;
    int *on_node;    /* [n_experts] experts in the order of nodes, groups, places: the original's mlog2log */
    int *sizes;      /* [larger of n_nodes, n_ranks] */
    int *pack;       /* [n_replicas or n_groups] */
    int *place;      /* the same */
    int *replica;    /* [n_replicas per node] numbers within the node */
    int *copies;     /* [n_experts per node] */
    float *weights;  /* [n_experts] of a node's experts, or of groups */
    float *replicas; /* [n_replicas per node] */
} balancer;

static void balancer_close(balancer *b)
{
    free(b->on_node);
    free(b->sizes);
    free(b->pack);
    free(b->place);
    free(b->replica);
    free(b->copies);
    free(b->weights);
    free(b->replicas);
}

static status balancer_open(balancer *b)
{
    size_t most = (size_t)(b->n_replicas + b->n_groups + b->n_ranks) * sizeof(int);
    b->on_node = malloc(most);
    b->sizes = malloc(most);
    b->pack = malloc(most);
    b->place = malloc(most);
    b->replica = malloc(most);
    b->copies = malloc(most);
    b->weights = malloc(most);
    b->replicas = malloc(most);
    if (b->on_node && b->sizes && b->pack && b->place && b->replica && b->copies && b->weights && b->replicas)
        return STATUS_OK;
    balancer_close(b);
    return status_fail(STATUS_NO_MEMORY, "no memory to balance %d experts", b->n_experts);
}

static void set_sizes(balancer *b, int n_packs, int each)
{
    for (int i = 0; i < n_packs; i++)
        b->sizes[i] = each;
}

/* Groups of experts onto nodes, by their load. */
static status pack_groups(balancer *b, const float *weight)
{
    int size = b->n_experts / b->n_groups, per_node = b->n_groups / b->n_nodes;
    for (int i = 0; i < b->n_groups; i++) {
        b->weights[i] = 0;
        for (int e = 0; e < size; e++)
            b->weights[i] += weight[i * size + e];
    }
    set_sizes(b, b->n_nodes, per_node);
    TRY(eplb_pack(b->n_groups, b->n_nodes, b->weights, b->sizes, b->pack, b->place));
    for (int i = 0; i < b->n_groups; i++)
        for (int e = 0; e < size; e++)
            b->on_node[(b->pack[i] * per_node + b->place[i]) * size + e] = i * size + e;
    return STATUS_OK;
}

/* One node's experts, replicated and shared out over its ranks. */
static status balance_node(balancer *b, int node, const float *weight, int *replica_expert)
{
    int experts = b->n_experts / b->n_nodes, replicas = b->n_replicas / b->n_nodes, ranks = b->n_ranks / b->n_nodes;
    int per_rank = b->n_replicas / b->n_ranks;
    for (int e = 0; e < experts; e++)
        b->weights[e] = weight[b->on_node[node * experts + e]];
    eplb_replicate(experts, replicas, b->weights, replicas, b->replica, b->copies);
    for (int i = 0; i < replicas; i++)
        b->replicas[i] = b->weights[b->replica[i]] / (float)b->copies[b->replica[i]];
    set_sizes(b, ranks, per_rank);
    TRY(eplb_pack(replicas, ranks, b->replicas, b->sizes, b->pack, b->place));
    for (int i = 0; i < replicas; i++)
        replica_expert[node * replicas + b->pack[i] * per_rank + b->place[i]] = b->on_node[node * experts + b->replica[i]];
    return STATUS_OK;
}

status eplb_layer(int n_experts, int n_replicas, int n_groups, int n_nodes, int n_ranks, const float *weight, int *replica_expert)
{
    if (n_groups % n_nodes != 0)
        n_groups = n_nodes = 1;
    if (n_experts % n_groups != 0 || n_ranks % n_nodes != 0 || n_replicas % n_ranks != 0 || n_replicas < n_experts)
        return status_fail(
            STATUS_BAD_INPUT,
            "eplb: %d experts in %d groups with %d replicas cannot be dealt to %d ranks on %d nodes in equal numbers", n_experts,
            n_groups, n_replicas, n_ranks, n_nodes);
    balancer b = {.n_experts = n_experts, .n_replicas = n_replicas, .n_groups = n_groups, .n_nodes = n_nodes, .n_ranks = n_ranks};
    TRY(balancer_open(&b));
    status st = pack_groups(&b, weight);
    for (int node = 0; node < n_nodes && st == STATUS_OK; node++)
        st = balance_node(&b, node, weight, replica_expert);
    balancer_close(&b);
    return st;
}
