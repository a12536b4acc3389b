/* The searches on R-flow, one layer at a time. */
#include "placement/planner/chain.h"
#include "placement/planner/assign.h"
#include "placement/planner/transport.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double too_little = 1e-12; /* changes below this share of the whole (about 1) are rounding */

/* ---- the whole ---- */

static void find_classes(chain *c)
{
    const problem *p = c->p;
    c->classes = true;
    c->near = c->far = -1;
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            if (g == h)
                continue;
            double d = p->distance[g * p->n_ranks + h],
                   *known = p->topology->node_of_rank[g] == p->topology->node_of_rank[h] ? &c->near : &c->far;
            if (*known < 0)
                *known = d;
            c->classes &= d == *known;
        }
    c->near = c->near < 0 ? 0 : c->near;
    c->far = c->far < 0 ? c->near : c->far;
}

status chain_open(const problem *p, int *home, chain *out)
{
    chain c = {.p = p, .home = home, .scale = calloc((size_t)p->n_layers, sizeof *c.scale)};
    if (!c.scale)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", p->n_layers);
    size_t square = (size_t)p->n_experts * (size_t)p->n_experts;
    for (int l = 0; l + 1 < p->n_layers; l++) {
        double all = 0;
        for (size_t i = 0; i < square; i++)
            all += p->next_pairs[(size_t)l * square + i];
        c.scale[l] = all > 0 ? 1 / (all * (p->n_layers - 1)) : 0;
    }
    find_classes(&c);
    *out = c;
    return STATUS_OK;
}

void chain_close(chain *c)
{
    free(c->scale);
    *c = (chain){0};
}

static double pair_flow(const chain *c, int l)
{
    const problem *p = c->p;
    size_t n = (size_t)p->n_experts;
    const double *pairs = p->next_pairs + (size_t)l * n * n;
    const int *here = c->home + problem_at(p, l, 0), *next = here + n;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        const double *distance = p->distance + (size_t)here[i] * (size_t)p->n_ranks;
        for (size_t j = 0; j < n; j++)
            sum += pairs[i * n + j] * distance[next[j]];
    }
    return sum * c->scale[l];
}

double chain_flow(const chain *c)
{
    double sum = 0;
    for (int l = 0; l + 1 < c->p->n_layers; l++)
        sum += pair_flow(c, l);
    return sum;
}

/* ---- one layer's costs ---- */

/* Adds what expert e's flow from (or to) rank h costs at every g, for all e. flow [n_experts][n_ranks] by rank h; outward:
 * distance from g to h, else from h to g. */
static void add_costs(const chain *c, const double *flow, bool outward, double *cost)
{
    const problem *p = c->p;
    size_t ranks = (size_t)p->n_ranks;
    const int *node = p->topology->node_of_rank;
    double *of_node = malloc((size_t)p->topology->n_nodes * sizeof *of_node);
    for (size_t e = 0; e < (size_t)p->n_experts; e++) {
        const double *f = flow + e * ranks;
        double *to = cost + e * ranks, all = 0;
        if (c->classes && of_node) {
            memset(of_node, 0, (size_t)p->topology->n_nodes * sizeof *of_node);
            for (size_t h = 0; h < ranks; h++) {
                of_node[node[h]] += f[h];
                all += f[h];
            }
            for (size_t g = 0; g < ranks; g++)
                to[g] += c->far * (all - of_node[node[g]]) + c->near * (of_node[node[g]] - f[g]);
            continue;
        }
        for (size_t h = 0; h < ranks; h++)
            for (size_t g = 0; g < ranks && f[h] > 0; g++)
                to[g] += f[h] * (outward ? p->distance[g * ranks + h] : p->distance[h * ranks + g]);
    }
    free(of_node);
}

/* Row by row into the rank of its expert, which the compiler turns into vector sums; then turned to lie expert by expert. */
static void flow_before(const chain *c, int l, double *flow, double *scratch)
{
    size_t n = (size_t)c->p->n_experts, ranks = (size_t)c->p->n_ranks;
    const double *pairs = c->p->next_pairs + (size_t)(l - 1) * n * n;
    const int *home = c->home + problem_at(c->p, l - 1, 0);
    memset(scratch, 0, n * ranks * sizeof *scratch);
    for (size_t i = 0; i < n; i++) {
        const double *row = pairs + i * n;
        double *to = scratch + (size_t)home[i] * n;
        for (size_t j = 0; j < n; j++)
            to[j] += row[j];
    }
    for (size_t e = 0; e < n; e++)
        for (size_t h = 0; h < ranks; h++)
            flow[e * ranks + h] = scratch[h * n + e] * c->scale[l - 1];
}

static void flow_after(const chain *c, int l, double *flow)
{
    size_t n = (size_t)c->p->n_experts, ranks = (size_t)c->p->n_ranks;
    const double *pairs = c->p->next_pairs + (size_t)l * n * n;
    const int *home = c->home + problem_at(c->p, l + 1, 0);
    memset(flow, 0, n * ranks * sizeof *flow);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            flow[i * ranks + (size_t)home[j]] += pairs[i * n + j];
    for (size_t i = 0; i < n * ranks; i++)
        flow[i] *= c->scale[l];
}

static void take_homes(chain_layer *y)
{
    const problem *p = y->c->p;
    memset(y->load, 0, (size_t)p->n_ranks * sizeof *y->load);
    memset(y->count, 0, (size_t)p->n_ranks * sizeof *y->count);
    for (int e = 0; e < p->n_experts; e++) {
        int g = y->home[e];
        y->load[g] += p->load[problem_at(p, y->layer, e)];
        y->place[e] = y->count[g]++;
        y->member[g * y->most + y->place[e]] = e;
    }
}

status chain_layer_open(const chain *c, int layer, bool before, bool after, chain_layer *out)
{
    const problem *p = c->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    chain_layer y = {.c = c, .layer = layer, .home = c->home + problem_at(p, layer, 0)};
    for (int g = 0; g < p->n_ranks; g++) {
        int slots = p->slots[(size_t)layer * ranks + (size_t)g];
        y.most = slots > y.most ? slots : y.most;
    }
    y.memory = malloc((3 * n * ranks + ranks) * sizeof(double) + (ranks + ranks * (size_t)y.most + n) * sizeof(int));
    if (!y.memory)
        return status_fail(STATUS_NO_MEMORY, "no memory for a layer of %d experts on %d ranks", p->n_experts, p->n_ranks);
    y.cost = y.memory;
    y.load = y.cost + 3 * n * ranks;
    y.count = (int *)(y.load + ranks);
    y.member = y.count + ranks;
    y.place = y.member + ranks * (size_t)y.most;
    memset(y.cost, 0, n * ranks * sizeof *y.cost);
    double *flow = y.cost + n * ranks;
    if (before && layer > 0) {
        flow_before(c, layer, flow, flow + n * ranks);
        add_costs(c, flow, false, y.cost);
    }
    if (after && layer + 1 < p->n_layers) {
        flow_after(c, layer, flow);
        add_costs(c, flow, true, y.cost);
    }
    take_homes(&y);
    *out = y;
    return STATUS_OK;
}

void chain_layer_close(chain_layer *y)
{
    free(y->memory);
    *y = (chain_layer){0};
}

double chain_layer_cost(const chain_layer *y)
{
    double sum = 0;
    for (int e = 0; e < y->c->p->n_experts; e++)
        sum += y->cost[(size_t)e * (size_t)y->c->p->n_ranks + (size_t)y->home[e]];
    return sum;
}

/* ---- moves ---- */

static double cost_at(const chain_layer *y, int e, int g)
{
    return y->cost[(size_t)e * (size_t)y->c->p->n_ranks + (size_t)g];
}

static double cap_of(const chain_layer *y, int g)
{
    return y->c->p->cap[(size_t)y->layer * (size_t)y->c->p->n_ranks + (size_t)g];
}

static double rows_of(const chain_layer *y, int e)
{
    return y->c->p->load[problem_at(y->c->p, y->layer, e)];
}

static bool has_room(const chain_layer *y, int g)
{
    return y->count[g] < y->c->p->slots[(size_t)y->layer * (size_t)y->c->p->n_ranks + (size_t)g];
}

/* A rank may take `rows` more when it stays within its cap, or gets no fuller than it is. */
static bool may_take(const chain_layer *y, int g, double rows)
{
    return rows <= 0 || y->load[g] + rows <= cap_of(y, g) * (1 + 1e-12);
}

static void move(chain_layer *y, int e, int to)
{
    int from = y->home[e], last = y->member[from * y->most + --y->count[from]];
    y->member[from * y->most + y->place[e]] = last;
    y->place[last] = y->place[e];
    y->place[e] = y->count[to]++;
    y->member[to * y->most + y->place[e]] = e;
    y->home[e] = to;
    y->load[from] -= rows_of(y, e);
    y->load[to] += rows_of(y, e);
}

static void swap(chain_layer *y, int e, int f)
{
    int g = y->home[e], h = y->home[f];
    double more = rows_of(y, f) - rows_of(y, e);
    y->member[g * y->most + y->place[e]] = f;
    y->member[h * y->most + y->place[f]] = e;
    int place = y->place[e];
    y->place[e] = y->place[f];
    y->place[f] = place;
    y->home[e] = h;
    y->home[f] = g;
    y->load[g] += more;
    y->load[h] -= more;
}

static double swap_gain(const chain_layer *y, int e, int f)
{
    int g = y->home[e], h = y->home[f];
    return cost_at(y, e, g) + cost_at(y, f, h) - cost_at(y, e, h) - cost_at(y, f, g);
}

static bool swap_fits(const chain_layer *y, int e, int f)
{
    double more = rows_of(y, f) - rows_of(y, e);
    return may_take(y, y->home[e], more) && may_take(y, y->home[f], -more);
}

/* The best swap or move of expert e, done when it gains. */
static bool improve_expert(chain_layer *y, int e)
{
    const problem *p = y->c->p;
    double best = too_little / p->n_experts;
    int partner = -1, to = -1;
    for (int g = 0; g < p->n_ranks; g++) {
        if (g == y->home[e])
            continue;
        double gain = cost_at(y, e, y->home[e]) - cost_at(y, e, g);
        if (gain > best && has_room(y, g) && may_take(y, g, rows_of(y, e))) {
            best = gain;
            to = g;
            partner = -1;
        }
        for (int i = 0; i < y->count[g]; i++) {
            int f = y->member[g * y->most + i];
            double both = gain + cost_at(y, f, g) - cost_at(y, f, y->home[e]);
            if (both > best && swap_fits(y, e, f)) {
                best = both;
                partner = f;
                to = g;
            }
        }
    }
    if (partner >= 0)
        swap(y, e, partner);
    else if (to >= 0)
        move(y, e, to);
    return to >= 0;
}

/* All experts of two ranks change places. */
static bool exchange_ranks(chain_layer *y, int g, int h)
{
    const problem *p = y->c->p;
    const int *slots = p->slots + (size_t)y->layer * (size_t)p->n_ranks;
    double gain = 0, more = y->load[h] - y->load[g];
    if (y->count[g] > slots[h] || y->count[h] > slots[g] || !may_take(y, g, more) || !may_take(y, h, -more))
        return false;
    for (int i = 0; i < y->count[g]; i++)
        gain += cost_at(y, y->member[g * y->most + i], g) - cost_at(y, y->member[g * y->most + i], h);
    for (int i = 0; i < y->count[h]; i++)
        gain += cost_at(y, y->member[h * y->most + i], h) - cost_at(y, y->member[h * y->most + i], g);
    if (gain <= too_little)
        return false;
    for (int e = 0; e < p->n_experts; e++)
        y->home[e] = y->home[e] == g ? h : y->home[e] == h ? g : y->home[e];
    take_homes(y);
    return true;
}

bool chain_layer_descend(chain_layer *y)
{
    const problem *p = y->c->p;
    bool changed = false;
    for (bool again = true; again;) {
        again = false;
        for (int e = 0; e < p->n_experts; e++)
            again |= improve_expert(y, e);
        for (int g = 0; g < p->n_ranks; g++)
            for (int h = g + 1; h < p->n_ranks; h++)
                again |= exchange_ranks(y, g, h);
        changed |= again;
    }
    return changed;
}

void chain_layer_anneal(chain_layer *y, double temperature, int64_t proposals, random_stream *random)
{
    const problem *p = y->c->p;
    for (int64_t i = 0; i < proposals && p->n_ranks > 1; i++) {
        int e = random_below(random, p->n_experts), g = random_below(random, p->n_ranks);
        if (g == y->home[e])
            continue;
        int n = y->count[g] + has_room(y, g), pick = n > 0 ? random_below(random, n) : -1;
        if (pick < 0)
            continue;
        if (pick == y->count[g]) {
            double gain = cost_at(y, e, y->home[e]) - cost_at(y, e, g);
            if ((gain >= 0 || random_unit(random) < exp(gain / temperature)) && may_take(y, g, rows_of(y, e)))
                move(y, e, g);
            continue;
        }
        int f = y->member[g * y->most + pick];
        double gain = swap_gain(y, e, f);
        if ((gain >= 0 || (gain > -30 * temperature && random_unit(random) < exp(gain / temperature))) && swap_fits(y, e, f))
            swap(y, e, f);
    }
}

/* ---- transport ---- */

static double excess(const chain_layer *y, int g, double rows)
{
    double over = y->load[g] + rows - cap_of(y, g) * (1 + 1e-12);
    return over > 0 ? over : 0;
}

/* The swap or move that takes most rows above caps away per cost. */
static bool relieve(chain_layer *y, int from)
{
    const problem *p = y->c->p;
    double best = 0;
    int mover = -1, partner = -1, to = -1;
    for (int i = 0; i < y->count[from]; i++) {
        int e = y->member[from * y->most + i];
        for (int g = 0; g < p->n_ranks; g++) {
            if (g == from)
                continue;
            double now = excess(y, from, 0) + excess(y, g, 0);
            for (int k = has_room(y, g) ? -1 : 0; k < y->count[g]; k++) {
                int f = k < 0 ? -1 : y->member[g * y->most + k];
                double rows = rows_of(y, e) - (f < 0 ? 0 : rows_of(y, f));
                double less = now - excess(y, from, -rows) - excess(y, g, rows);
                if (less <= now * 1e-9)
                    continue;
                double gain = f < 0 ? cost_at(y, e, from) - cost_at(y, e, g) : swap_gain(y, e, f);
                double worth = gain >= 0 ? 1e30 * (1 + gain) : less / -gain;
                if (worth > best) {
                    best = worth;
                    mover = e;
                    partner = f;
                    to = g;
                }
            }
        }
    }
    if (mover < 0)
        return false;
    if (partner >= 0)
        swap(y, mover, partner);
    else
        move(y, mover, to);
    return true;
}

static int fullest(const chain_layer *y)
{
    int at = 0;
    for (int g = 1; g < y->c->p->n_ranks; g++)
        if (excess(y, g, 0) > excess(y, at, 0))
            at = g;
    return at;
}

/* Back under the caps; what single swaps cannot do is left to assign.h, which knows nothing of costs. */
static bool repair(chain_layer *y)
{
    const problem *p = y->c->p;
    for (int i = 0; i < 4 * p->n_experts && excess(y, fullest(y), 0) > 0; i++)
        if (!relieve(y, fullest(y)))
            break;
    if (excess(y, fullest(y), 0) > 0) {
        assign_task t = {p->n_experts,
                         p->n_ranks,
                         p->load + problem_at(p, y->layer, 0),
                         p->share,
                         p->slots + (size_t)y->layer * (size_t)p->n_ranks,
                         NULL};
        assign_improve(&t, y->home);
        take_homes(y);
    }
    return excess(y, fullest(y), 0) <= 0;
}

status chain_layer_transport(chain_layer *y, bool always)
{
    const problem *p = y->c->p;
    int *before = malloc((size_t)p->n_experts * sizeof *before);
    if (!before)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d experts", p->n_experts);
    memcpy(before, y->home, (size_t)p->n_experts * sizeof *before);
    double cost = chain_layer_cost(y), kept = excess(y, fullest(y), 0);
    status st =
        transport_solve(p->n_experts, p->n_ranks, y->cost, p->slots + (size_t)y->layer * (size_t)p->n_ranks, y->home, NULL);
    if (st == STATUS_OK) {
        take_homes(y);
        bool within = repair(y);
        chain_layer_descend(y);
        if ((!within && kept <= 0) || (!always && chain_layer_cost(y) > cost - too_little))
            st = STATUS_ELSEWHERE;
    }
    if (st != STATUS_OK) {
        memcpy(y->home, before, (size_t)p->n_experts * sizeof *before);
        take_homes(y);
    }
    free(before);
    return st == STATUS_ELSEWHERE ? STATUS_OK : st;
}

/* ---- whole ranks in all layers ---- */

static bool ranks_alike(const problem *p, int g, int h)
{
    for (int l = 0; l < p->n_layers; l++) {
        size_t at = (size_t)l * (size_t)p->n_ranks;
        if (p->slots[at + (size_t)g] != p->slots[at + (size_t)h] || p->cap[at + (size_t)g] != p->cap[at + (size_t)h])
            return false;
    }
    return true;
}

static double relabel_gain(const problem *p, const double *flow, int g, int h)
{
    int n = p->n_ranks;
    const double *d = p->distance;
    double gain = 0;
    for (int k = 0; k < n; k++) {
        if (k == g || k == h)
            continue;
        gain += (flow[g * n + k] - flow[h * n + k]) * (d[g * n + k] - d[h * n + k]);
        gain += (flow[k * n + g] - flow[k * n + h]) * (d[k * n + g] - d[k * n + h]);
    }
    return gain + (flow[g * n + h] - flow[h * n + g]) * (d[g * n + h] - d[h * n + g]);
}

static void swap_labels(chain *c, double *flow, int g, int h)
{
    int n = c->p->n_ranks;
    size_t cells = problem_at(c->p, c->p->n_layers, 0);
    for (size_t i = 0; i < cells; i++)
        c->home[i] = c->home[i] == g ? h : c->home[i] == h ? g : c->home[i];
    for (int k = 0; k < n; k++) {
        double kept = flow[g * n + k];
        flow[g * n + k] = flow[h * n + k];
        flow[h * n + k] = kept;
    }
    for (int k = 0; k < n; k++) {
        double kept = flow[k * n + g];
        flow[k * n + g] = flow[k * n + h];
        flow[k * n + h] = kept;
    }
}

status chain_relabel(chain *c)
{
    const problem *p = c->p;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    double *flow = calloc(ranks * ranks, sizeof *flow);
    if (!flow)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    for (int l = 0; l + 1 < p->n_layers; l++) {
        const double *pairs = p->next_pairs + (size_t)l * n * n;
        const int *here = c->home + problem_at(p, l, 0), *next = here + n;
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++)
                flow[(size_t)here[i] * ranks + (size_t)next[j]] += pairs[i * n + j] * c->scale[l];
    }
    for (bool again = true; again;) {
        again = false;
        for (int g = 0; g < p->n_ranks; g++)
            for (int h = g + 1; h < p->n_ranks; h++)
                if (relabel_gain(p, flow, g, h) > too_little && ranks_alike(p, g, h)) {
                    swap_labels(c, flow, g, h);
                    again = true;
                }
    }
    free(flow);
    return STATUS_OK;
}
