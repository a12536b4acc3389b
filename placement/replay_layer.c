/* replay_layer.c - the steps of one layer.
 *
 *   token's experts ─► a copy of each ─► distinct ranks ─► hops over links ─► out, in of every rank ─► dispatch, combine
 *                          └─► rows of every copy ─► rows and touched experts of every rank ─► compute
 *
 * Hops are counted one by one, per pair of ranks, and priced together: times do not depend on the order of tokens. */
#include "placement/replay_layer.h"

#include "placement/replica_split.h"

#include <stdlib.h>
#include <string.h>

struct layer_replay {
    const traffic *t;
    const replay_schedule *schedule;
    plan p; /* borrowed but for node_of_rank, which is the topology's, borrowed too */
    const topology *topo;
    const replay_options *options;
    int layer;
    const int *first;       /* the layer's part of p.first_copy: [n_experts + 1] */
    const int *ranks;       /* the layer's part of p.copy_ranks */
    int n_copies;           /* of the layer */
    bool replicated;        /* some expert of the layer has several copies */
    int32_t *copy_rows;     /* [copies] rows of this step */
    int32_t *rows, *served; /* [n_ranks] of this step: rows, experts with a row */
    uint32_t *turn;         /* [n_ranks] rows the rank has owned so far */
    uint64_t *seen;         /* [n_ranks] the last token that reached the rank */
    uint64_t *seen_node;    /* [n_nodes] */
    uint64_t stamp;         /* the present token */
    int *node_first;        /* [n_nodes + 1] of node_ranks */
    int *node_ranks;        /* [n_ranks] by node */
    bool carried[N_LINK_CLASSES];
    uint32_t (*out)[N_LINK_CLASSES], (*in)[N_LINK_CLASSES]; /* [n_ranks] rows */
    uint32_t *pairs;                                        /* [n_ranks][n_ranks] rows from, to */
    double *row_cost;                                       /* [n_ranks][n_ranks] microseconds, where there is a matrix */
    int64_t next_move;
    /* replicas by step */
    replica_split *split;
    int32_t *expert_rows; /* [n_experts] */
    int32_t *owner_rows;  /* [n_ranks][n_experts] */
    int32_t *quota;       /* [n_ranks][copies] */
    double *bound_rows;   /* [n_experts] */
};

void layer_replay_destroy(layer_replay *r)
{
    if (!r)
        return;
    void *owned[] = {r->copy_rows, r->rows, r->served, r->turn,  r->seen,     r->seen_node,   r->node_first, r->node_ranks,
                     r->out,       r->in,   r->pairs,  r->quota, r->row_cost, r->expert_rows, r->owner_rows, r->bound_rows};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
    replica_split_destroy(r->split);
    free(r);
}

static void list_nodes(layer_replay *r)
{
    int at = 0;
    for (int node = 0; node < r->topo->n_nodes; node++) {
        r->node_first[node] = at;
        for (int g = 0; g < r->topo->n_ranks; g++)
            if (r->topo->node_of_rank[g] == node)
                r->node_ranks[at++] = g;
    }
    r->node_first[r->topo->n_nodes] = at;
}

static int most_copies(const plan *p)
{
    int most = 0;
    for (int l = 0; l < p->n_layers; l++) {
        int n = p->first_copy[(l + 1) * p->n_experts] - p->first_copy[l * p->n_experts];
        most = n > most ? n : most;
    }
    return most;
}

static status no_memory(const layer_replay *r)
{
    return status_fail(STATUS_NO_MEMORY, "replay: no memory for a layer of %d experts on %d ranks", r->p.n_experts, r->p.n_ranks);
}

static status allocate_split(layer_replay *r, size_t n_ranks, size_t n_copies)
{
    size_t n_experts = (size_t)r->p.n_experts;
    r->expert_rows = calloc(n_experts, sizeof *r->expert_rows);
    r->owner_rows = calloc(n_ranks * n_experts, sizeof *r->owner_rows);
    r->quota = calloc(n_ranks * n_copies, sizeof *r->quota);
    r->bound_rows = calloc(n_experts, sizeof *r->bound_rows);
    if (!r->expert_rows || !r->owner_rows || !r->quota || !r->bound_rows)
        return no_memory(r);
    return replica_split_create((int)n_ranks, r->p.n_experts, (int)n_copies, &r->split);
}

static status allocate(layer_replay *r)
{
    size_t n = (size_t)r->p.n_ranks, n_nodes = (size_t)r->topo->n_nodes, n_copies = (size_t)most_copies(&r->p);
    r->copy_rows = calloc(n_copies, sizeof *r->copy_rows);
    r->rows = calloc(n, sizeof *r->rows);
    r->served = calloc(n, sizeof *r->served);
    r->turn = calloc(n, sizeof *r->turn);
    r->seen = calloc(n, sizeof *r->seen);
    r->seen_node = calloc(n_nodes, sizeof *r->seen_node);
    r->node_first = calloc(n_nodes + 1, sizeof *r->node_first);
    r->node_ranks = calloc(n, sizeof *r->node_ranks);
    r->out = calloc(n, sizeof *r->out);
    r->in = calloc(n, sizeof *r->in);
    r->pairs = calloc(n * n, sizeof *r->pairs);
    r->row_cost = calloc(r->topo->links ? n * n : 1, sizeof *r->row_cost);
    if (!r->copy_rows || !r->rows || !r->served || !r->turn || !r->seen || !r->seen_node || !r->node_first || !r->node_ranks ||
        !r->out || !r->in || !r->pairs || !r->row_cost)
        return no_memory(r);
    return r->options->replicas == REPLICAS_BY_STEP ? allocate_split(r, n, n_copies) : STATUS_OK;
}

status layer_replay_create(const traffic *t, const replay_schedule *schedule, const plan *p, const topology *topo,
                           const replay_options *options, layer_replay **out)
{
    layer_replay *r = calloc(1, sizeof *r);
    if (!r)
        return status_fail(STATUS_NO_MEMORY, "replay: no memory to start");
    r->t = t;
    r->schedule = schedule;
    r->p = *p;
    r->p.node_of_rank = topo->node_of_rank;
    r->topo = topo;
    r->options = options;
    status st = allocate(r);
    if (st != STATUS_OK) {
        layer_replay_destroy(r);
        return st;
    }
    list_nodes(r);
    for (int from = 0; topo->links && from < topo->n_ranks; from++)
        for (int to = 0; to < topo->n_ranks; to++)
            r->row_cost[(size_t)from * (size_t)topo->n_ranks + (size_t)to] =
                topo->row_bytes * topology_us_per_byte(topo, from, to);
    *out = r;
    return STATUS_OK;
}

/* ---- one row ---- */

static uint32_t *pair(const layer_replay *r, int from, int to)
{
    return &r->pairs[(size_t)from * (size_t)r->topo->n_ranks + (size_t)to];
}

/* A row to a rank on another node that has not had it yet, by way of the gateway there. */
static void cross_once(layer_replay *r, int owner, int to)
{
    int node = r->topo->node_of_rank[to], size = r->node_first[node + 1] - r->node_first[node];
    int gateway = r->node_ranks[r->node_first[node] + r->topo->local_index[owner] % size];
    *pair(r, owner, gateway) += r->seen_node[node] != r->stamp;
    *pair(r, gateway, to) += gateway != to;
    r->seen_node[node] = r->stamp;
}

/* The copy that computes a row of an expert with several. */
static int choose_copy(layer_replay *r, int expert, int owner)
{
    int first = r->first[expert] - r->first[0], n = r->first[expert + 1] - r->first[expert], c = first;
    if (r->options->replicas == REPLICAS_BY_STEP) {
        int32_t *quota = r->quota + (size_t)owner * (size_t)r->n_copies;
        while (c < first + n - 1 && quota[c] == 0)
            c++;
        quota[c]--;
        return c;
    }
    int rank = plan_choose(&r->p, REPLICA_OWNER_FIRST, r->layer, expert, owner, r->turn[owner]);
    while (r->ranks[c] != rank)
        c++;
    return c;
}

/* No branch depends on where a row goes, but for node_dedupe: nobody could foresee it, and a wrong guess costs more than all the
 * rest. */
static void route_row(layer_replay *r, int64_t token, int owner, layer_totals *out)
{
    const uint16_t *experts = traffic_experts(r->t, r->layer, token);
    bool dedupe = r->options->node_dedupe;
    uint64_t stamp = ++r->stamp, copies = 0, home = 0;
    uint32_t *sent = pair(r, owner, 0);
    r->seen[owner] = stamp; /* its own experts' rows stay */
    for (int j = 0; j < r->t->shape.top_k; j++) {
        int e = experts[j];
        if (e == ROUTING_NO_EXPERT)
            continue;
        int c = r->first[e + 1] - r->first[e] == 1 ? r->first[e] - r->first[0] : choose_copy(r, e, owner), rank = r->ranks[c];
        bool fresh = r->seen[rank] != stamp;
        r->seen[rank] = stamp;
        r->copy_rows[c]++;
        out->choices++;
        home += rank == owner;
        copies += fresh;
        if (dedupe && fresh && r->topo->node_of_rank[rank] != r->topo->node_of_rank[owner])
            cross_once(r, owner, rank);
        else
            sent[rank] += fresh;
    }
    out->copies += copies;
    out->home += home;
    r->turn[owner]++;
}

/* ---- one step ---- */

static void split_step(layer_replay *r, int64_t begin, int64_t end)
{
    size_t n_ranks = (size_t)r->p.n_ranks, n_experts = (size_t)r->p.n_experts;
    memset(r->expert_rows, 0, n_experts * sizeof *r->expert_rows);
    memset(r->owner_rows, 0, n_ranks * n_experts * sizeof *r->owner_rows);
    for (int64_t i = begin; i < end; i++) {
        const uint16_t *experts = traffic_experts(r->t, r->layer, r->schedule->token[i]);
        for (int j = 0; j < r->t->shape.top_k; j++)
            if (experts[j] != ROUTING_NO_EXPERT) {
                r->expert_rows[experts[j]]++;
                r->owner_rows[(size_t)r->schedule->owner[i] * n_experts + experts[j]]++;
            }
    }
    replica_split_rows(r->split, &r->p, r->layer, r->topo->row_us, r->topo->expert_us, r->expert_rows, r->copy_rows);
    replica_split_owners(r->split, &r->p, r->layer, r->p.n_ranks, r->owner_rows, r->copy_rows, r->quota);
}

/* Busiest rank's microseconds. */
static double compute_us(layer_replay *r, layer_totals *out)
{
    size_t n = (size_t)r->p.n_ranks;
    double worst = 0, total = 0;
    int32_t most = 0;
    memset(r->rows, 0, n * sizeof *r->rows);
    memset(r->served, 0, n * sizeof *r->served);
    for (int c = 0; c < r->n_copies; c++) {
        r->rows[r->ranks[c]] += r->copy_rows[c];
        r->served[r->ranks[c]] += r->copy_rows[c] > 0;
    }
    for (size_t g = 0; g < n; g++) {
        double us = r->rows[g] * r->topo->row_us[g] + r->served[g] * r->topo->expert_us[g];
        worst = us > worst ? us : worst;
        most = r->rows[g] > most ? r->rows[g] : most;
        total += r->rows[g];
        if (out->rank_rows)
            out->rank_rows[g] += (uint64_t)r->rows[g];
    }
    out->max_over_mean += total > 0 ? most * (double)n / total : 1;
    return worst;
}

/* Out and in of rank g: forwards as counted, backwards for the way home over the reverse links. */
static void link_times(const layer_replay *r, int g, bool home, double *out, double *in)
{
    const topology *topo = r->topo;
    size_t n = (size_t)topo->n_ranks, own = (size_t)g;
    *out = *in = 0;
    for (int c = LINK_SAME_NODE; !topo->links && c < N_LINK_CLASSES; c++) {
        double cost = topo->row_bytes * (1e-3 / topo->link[c].gb_per_s);
        *out += (home ? r->in : r->out)[g][c] * cost;
        *in += (home ? r->out : r->in)[g][c] * cost;
    }
    for (size_t q = 0; topo->links && q < n; q++) {
        uint32_t sent = home ? r->pairs[q * n + own] : r->pairs[own * n + q];
        uint32_t received = home ? r->pairs[own * n + q] : r->pairs[q * n + own];
        *out += sent * r->row_cost[own * n + q];
        *in += received * r->row_cost[q * n + own];
    }
}

static double transfer_us(const layer_replay *r, bool home)
{
    double worst = 0, start = 0;
    for (int g = 0; g < r->topo->n_ranks; g++) {
        double out, in;
        link_times(r, g, home, &out, &in);
        worst = out > worst ? out : worst;
        worst = in > worst ? in : worst;
    }
    for (int c = LINK_SAME_NODE; c < N_LINK_CLASSES; c++)
        if (r->carried[c] && r->topo->link[c].us > start)
            start = r->topo->link[c].us;
    return worst + start;
}

static void count_link(layer_replay *r, int from, int to, uint32_t rows)
{
    link_class class = topology_link(r->topo, from, to);
    r->carried[class] = true;
    r->out[from][class] += rows;
    r->in[to][class] += rows;
}

/* From pairs of ranks to the links of each. */
static void count_links(layer_replay *r, layer_totals *out)
{
    size_t n = (size_t)r->topo->n_ranks;
    for (int from = 0; from < r->topo->n_ranks; from++)
        for (int to = 0; to < r->topo->n_ranks; to++) {
            uint32_t rows = *pair(r, from, to);
            if (rows == 0)
                continue;
            count_link(r, from, to, rows);
            out->cross_copies += topology_link(r->topo, from, to) == LINK_CROSS_NODE ? rows : 0;
            if (out->link_rows)
                out->link_rows[(size_t)from * n + (size_t)to] += rows;
        }
}

/* Adds the KV caches that move with this step's dispatch; false when there are none. */
static bool count_moves(layer_replay *r, int64_t step)
{
    const replay_schedule *s = r->schedule;
    bool any = false;
    for (; r->next_move < s->n_moves && s->move_step[r->next_move] == step; r->next_move++) {
        int from = s->move_from[r->next_move], to = s->move_to[r->next_move];
        *pair(r, from, to) += AFFINITY_TOKENS;
        count_link(r, from, to, AFFINITY_TOKENS);
        any = true;
    }
    return any;
}

static void clear_step(layer_replay *r)
{
    size_t n = (size_t)r->p.n_ranks;
    memset(r->copy_rows, 0, (size_t)r->n_copies * sizeof *r->copy_rows);
    memset(r->carried, 0, sizeof r->carried);
    memset(r->out, 0, n * sizeof *r->out);
    memset(r->in, 0, n * sizeof *r->in);
    memset(r->pairs, 0, n * n * sizeof *r->pairs);
}

static status measure_split(layer_replay *r, double busiest, layer_totals *out)
{
    double bound = 0;
    for (int e = 0; r->replicated && e < r->p.n_experts; e++)
        r->bound_rows[e] = r->expert_rows[e];
    if (r->replicated)
        TRY(replica_split_bound(&r->p, r->layer, r->topo->row_us, r->topo->expert_us, r->bound_rows, &bound));
    out->split_gap += bound > 0 ? busiest / bound : 1;
    return STATUS_OK;
}

static status run_step(layer_replay *r, int64_t step, layer_totals *out)
{
    const replay_schedule *s = r->schedule;
    bool by_step = r->options->replicas == REPLICAS_BY_STEP;
    clear_step(r);
    if (by_step && r->replicated) {
        split_step(r, s->first[step], s->first[step + 1]);
        memset(r->copy_rows, 0, (size_t)r->n_copies * sizeof *r->copy_rows); /* counted again, row by row */
    }
    for (int64_t i = s->first[step]; i < s->first[step + 1]; i++)
        route_row(r, s->token[i], s->owner[i], out);
    count_links(r, out);
    double compute = compute_us(r, out), combine = transfer_us(r, true);
    double dispatch = count_moves(r, step) || r->topo->links ? transfer_us(r, false) : combine;
    out->compute_us += compute;
    out->dispatch_us += dispatch;
    out->combine_us += combine;
    if (out->step_us)
        out->step_us[step] = compute + dispatch + combine;
    return by_step && out->measure_split ? measure_split(r, compute, out) : STATUS_OK;
}

status layer_replay_run(layer_replay *r, int layer, layer_totals *out)
{
    r->layer = layer;
    r->first = r->p.first_copy + (size_t)layer * (size_t)r->p.n_experts;
    r->ranks = r->p.copy_ranks + r->first[0];
    r->n_copies = r->first[r->p.n_experts] - r->first[0];
    r->replicated = r->n_copies > r->p.n_experts;
    r->next_move = 0;
    memset(r->turn, 0, (size_t)r->p.n_ranks * sizeof *r->turn);
    for (int64_t step = 0; step < r->schedule->n_steps; step++)
        TRY(run_step(r, step, out));
    return STATUS_OK;
}
