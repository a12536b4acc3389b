#include "placement/planner/stats_view.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t n_per_expert(const routing_shape *shape)
{
    return (size_t)shape->n_layers * (size_t)shape->n_experts;
}

void stats_sum_clear(stats_sum *s)
{
    free(s->per_expert);
    free(s->next_pairs);
    *s = (stats_sum){0};
}

static void add_pairs(const routing_stats *stats, stats_sum *s)
{
    size_t n = (size_t)(s->shape->n_layers - 1) * (size_t)s->shape->n_experts * (size_t)s->shape->n_experts;
    for (int d = 0; d < s->shape->n_domains; d++)
        for (int p = 0; p < N_PHASES; p++) {
            const uint64_t *pairs = routing_stats_next_layer_pairs(stats, d, p);
            for (size_t i = 0; pairs && i < n; i++)
                s->next_pairs[i] += (double)pairs[i];
        }
}

status stats_sum_create(const routing_stats *stats, bool pairs, stats_sum *out)
{
    stats_sum s = {.shape = routing_stats_shape(stats)};
    size_t n = n_per_expert(s.shape), n_experts = (size_t)s.shape->n_experts;
    pairs = pairs && routing_stats_has_pairs(stats) && s.shape->n_layers > 1;
    s.per_expert = calloc(n, sizeof *s.per_expert);
    if (pairs)
        s.next_pairs = calloc((size_t)(s.shape->n_layers - 1) * n_experts * n_experts, sizeof *s.next_pairs);
    if (!s.per_expert || (pairs && !s.next_pairs)) {
        stats_sum_clear(&s);
        return status_fail(STATUS_NO_MEMORY, "no memory to add up the counts of %zu experts", n);
    }
    routing_stats_sum_tokens(stats, -1, -1, s.per_expert);
    for (int d = 0; d < s.shape->n_domains; d++)
        for (int p = 0; p < N_PHASES; p++)
            s.tokens[p] += routing_stats_tokens(stats, d, p);
    if (pairs)
        add_pairs(stats, &s);
    *out = s;
    return STATUS_OK;
}

/* ---- balance ---- */

status stats_view_balance(const stats_sum *s, const plan *p, double *per_layer, balance_view *out)
{
    int n_layers = s->shape->n_layers;
    double *loads = calloc((size_t)p->n_ranks, sizeof *loads), *own = calloc((size_t)n_layers, sizeof *own);
    double *layers = per_layer ? per_layer : own, tokens = (double)(s->tokens[PHASE_PREFILL] + s->tokens[PHASE_DECODE]);
    status st = loads && own ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    if (st == STATUS_OK && (p->n_experts != s->shape->n_experts || p->n_layers != n_layers))
        st = status_fail(STATUS_BAD_INPUT, "%s: a plan for %d layers of %d experts; the statistics have %d of %d", p->name,
                         p->n_layers, p->n_experts, n_layers, s->shape->n_experts);
    if (st == STATUS_OK) {
        balance_view b = {0};
        routing_balance(p, s->per_expert, loads, layers);
        for (int l = 0; l < n_layers; l++) {
            double share = layers[l] / p->n_ranks; /* of the layer's rows, on its busiest rank */
            b.mean += layers[l] / n_layers;
            b.error += tokens > 0 ? p->n_ranks * sqrt(share * (1 - share) / tokens) / n_layers : 0;
            if (layers[l] > b.worst) {
                b.worst = layers[l];
                b.worst_layer = l;
            }
        }
        *out = b;
    }
    free(loads);
    free(own);
    return st;
}

/* ---- skew ---- */

static int compare_falling(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* Share of the hottest eighth, without a sorted copy where there is no memory for one: the hottest alone. */
static double top_share(const uint64_t *counts, int n, double sum)
{
    uint64_t *sorted = malloc((size_t)n * sizeof *sorted);
    if (!sorted)
        return 0;
    memcpy(sorted, counts, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_falling);
    double top = 0;
    for (int i = 0; i < (n + 7) / 8; i++)
        top += (double)sorted[i];
    free(sorted);
    return top / sum;
}

void stats_view_skew(const stats_sum *s, skew_view *out)
{
    int n = s->shape->n_experts;
    for (int l = 0; l < s->shape->n_layers; l++) {
        const uint64_t *counts = s->per_expert + (size_t)l * (size_t)n;
        double sum = 0, entropy = 0;
        int hottest = 0;
        for (int e = 0; e < n; e++) {
            sum += (double)counts[e];
            hottest = counts[e] > counts[hottest] ? e : hottest;
        }
        for (int e = 0; e < n; e++)
            if (counts[e] > 0)
                entropy -= (double)counts[e] / sum * log((double)counts[e] / sum);
        out[l] = (skew_view){.hottest = sum > 0 ? (double)counts[hottest] * n / sum : 1,
                             .even = sum > 0 ? exp(entropy) : n,
                             .top_share = sum > 0 ? top_share(counts, n, sum) : (n + 7) / 8 / (double)n,
                             .hottest_expert = hottest};
    }
}

/* ---- domains ---- */

static double dot(const uint64_t *a, const uint64_t *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

status stats_view_similarity(const routing_stats *stats, double *out)
{
    const routing_shape *shape = routing_stats_shape(stats);
    size_t n = n_per_expert(shape), n_domains = (size_t)shape->n_domains;
    uint64_t *sums = calloc(n * n_domains, sizeof *sums);
    if (!sums)
        return status_fail(STATUS_NO_MEMORY, "no memory to compare %zu domains", n_domains);
    for (size_t d = 0; d < n_domains; d++)
        routing_stats_sum_tokens(stats, (int)d, -1, sums + d * n);
    for (size_t a = 0; a < n_domains; a++)
        out[a * n_domains + a] = dot(sums + a * n, sums + a * n, n);
    for (size_t a = 0; a < n_domains; a++)
        for (size_t b = 0; b < a; b++) {
            double norms = sqrt(out[a * n_domains + a]) * sqrt(out[b * n_domains + b]);
            double cosine = norms > 0 ? dot(sums + a * n, sums + b * n, n) / norms : 0;
            out[a * n_domains + b] = out[b * n_domains + a] = cosine;
        }
    for (size_t a = 0; a < n_domains; a++)
        out[a * n_domains + a] = 1;
    free(sums);
    return STATUS_OK;
}

/* ---- chains ---- */

void expert_chain_clear(expert_chain *c)
{
    free(c->experts);
    free(c->share);
    free(c->lift);
    *c = (expert_chain){0};
}

typedef struct {
    const stats_sum *s;
    double tokens;
    bool *taken;  /* [n_layers][n_experts] */
    double *best; /* [n_layers][n_experts] excess of the best path that ends there */
    int *before;  /* [n_layers][n_experts] where it came from */
} chain_search;

static double pair_excess(const chain_search *c, int layer, int i, int j)
{
    size_t n = (size_t)c->s->shape->n_experts, at = (size_t)layer * n;
    double both = c->s->next_pairs[(at + (size_t)i) * n + (size_t)j];
    double one = (double)c->s->per_expert[at + (size_t)i], other = (double)c->s->per_expert[at + n + (size_t)j];
    return both / c->tokens - one / c->tokens * (other / c->tokens);
}

/* Longest path by layers: exact, n_layers * n_experts^2 steps. Returns the last expert, -1: none is left. */
static int find_path(chain_search *c)
{
    int n = c->s->shape->n_experts, last = c->s->shape->n_layers - 1, found = -1;
    for (int l = 0; l <= last; l++)
        for (int j = 0; j < n; j++) {
            size_t to = (size_t)l * (size_t)n + (size_t)j;
            c->best[to] = l == 0 && !c->taken[to] ? 0 : -INFINITY;
            c->before[to] = -1;
            for (int i = 0; l > 0 && !c->taken[to] && i < n; i++) {
                size_t from = to - (size_t)j - (size_t)n + (size_t)i;
                double excess = c->taken[from] ? -INFINITY : c->best[from] + pair_excess(c, l - 1, i, j);
                if (excess > c->best[to]) {
                    c->best[to] = excess;
                    c->before[to] = i;
                }
            }
        }
    for (int j = 0; j < n; j++) {
        double excess = c->best[(size_t)last * (size_t)n + (size_t)j];
        if (excess > -INFINITY && (found < 0 || excess > c->best[(size_t)last * (size_t)n + (size_t)found]))
            found = j;
    }
    return found;
}

static status take_path(chain_search *c, int expert, expert_chain *out)
{
    const routing_shape *shape = c->s->shape;
    size_t n = (size_t)shape->n_experts;
    int last = shape->n_layers - 1;
    expert_chain chain = {.excess = c->best[(size_t)last * n + (size_t)expert]};
    chain.experts = calloc((size_t)shape->n_layers, sizeof *chain.experts);
    chain.share = calloc((size_t)shape->n_layers, sizeof *chain.share);
    chain.lift = calloc((size_t)shape->n_layers, sizeof *chain.lift);
    if (!chain.experts || !chain.share || !chain.lift) {
        expert_chain_clear(&chain);
        return status_fail(STATUS_NO_MEMORY, "no memory for a chain of %d experts", shape->n_layers);
    }
    for (int l = last; l >= 0; l--) {
        size_t at = (size_t)l * n + (size_t)expert;
        c->taken[at] = true;
        chain.experts[l] = expert;
        int before = c->before[at];
        if (l > 0) {
            size_t from = at - (size_t)expert - n + (size_t)before;
            double one = (double)c->s->per_expert[from], other = (double)c->s->per_expert[at];
            double both = c->s->next_pairs[from * n + (size_t)expert];
            chain.share[l - 1] = one > 0 ? both / one : 0;
            chain.lift[l - 1] = one > 0 && other > 0 ? both / one * (c->tokens / other) : 0;
        }
        expert = before;
    }
    *out = chain;
    return STATUS_OK;
}

status stats_view_chains(const stats_sum *s, int n_chains, expert_chain *out, int *n_found)
{
    size_t n = n_per_expert(s->shape);
    chain_search c = {.s = s, .tokens = (double)(s->tokens[PHASE_PREFILL] + s->tokens[PHASE_DECODE])};
    *n_found = 0;
    if (!s->next_pairs || !(c.tokens > 0))
        return STATUS_OK;
    c.taken = calloc(n, sizeof *c.taken);
    c.best = calloc(n, sizeof *c.best);
    c.before = calloc(n, sizeof *c.before);
    status st = c.taken && c.best && c.before ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to follow %zu experts", n);
    while (st == STATUS_OK && *n_found < n_chains) {
        int expert = find_path(&c);
        if (expert < 0)
            break;
        st = take_path(&c, expert, &out[*n_found]);
        *n_found += st == STATUS_OK;
    }
    free(c.taken);
    free(c.best);
    free(c.before);
    return st;
}
