/* Problems made by formula. */
#include "tests/support_instances.h"
#include "placement/planner/assign.h"
#include "proto/hash.h"
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>

static double uniform(uint64_t *random)
{
    return ((double)(support_random(random) >> 11) + 0.5) * 0x1p-53;
}

/* Marsaglia and Tsang's method; shapes below 1 by Ahrens and Dieter's power. */
static double gamma_draw(double shape, uint64_t *random)
{
    if (shape < 1)
        return gamma_draw(shape + 1, random) * pow(uniform(random), 1 / shape);
    double d = shape - 1.0 / 3, c = 1 / sqrt(9 * d);
    for (;;) {
        double x = support_gauss(random), v = 1 + c * x;
        if (v <= 0)
            continue;
        v = v * v * v;
        if (log(uniform(random)) < 0.5 * x * x + d - d * v + d * log(v))
            return d * v;
    }
}

static void *must(void *memory)
{
    assert_non_null(memory);
    return memory;
}

static void set_links(topology *t)
{
    t->link[LINK_SAME_NODE].gb_per_s = 4;
    t->link[LINK_CROSS_NODE].gb_per_s = 1;
}

static void open_instance(int n_layers, int n_experts, int n_ranks, int n_nodes, instance *x)
{
    size_t layers = (size_t)n_layers, experts = (size_t)n_experts, ranks = (size_t)n_ranks;
    *x = (instance){.request = {.slack = -1}};
    assert_int_equal(topology_uniform(n_ranks, n_nodes, &x->topo), STATUS_OK);
    set_links(&x->topo);
    x->request.topology = &x->topo;
    x->layer_numbers = must(malloc(layers * sizeof(int)));
    problem *p = &x->p;
    *p = (problem){.topology = &x->topo, .n_layers = n_layers, .n_experts = n_experts, .n_ranks = n_ranks, .top_k = 1};
    p->layer_numbers = x->layer_numbers;
    p->load = must(calloc(layers * experts, sizeof(double)));
    p->next_pairs = must(calloc(layers * experts * experts, sizeof(double)));
    p->rows = must(calloc(layers, sizeof(double)));
    p->share = must(calloc(ranks, sizeof(double)));
    p->slots = must(calloc(layers * ranks, sizeof(int)));
    p->total_slots = must(calloc(ranks, sizeof(int)));
    p->cap = must(calloc(layers * ranks, sizeof(double)));
    p->distance = must(calloc(ranks * ranks, sizeof(double)));
    for (int l = 0; l < n_layers; l++)
        x->layer_numbers[l] = l;
}

/* Loads are what flows out of a layer's experts, or into the last one's. */
static void close_instance(instance *x)
{
    problem *p = &x->p;
    size_t n = (size_t)p->n_experts;
    p->request = &x->request;
    for (int l = 0; l < p->n_layers; l++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++) {
                size_t pair = l + 1 < p->n_layers ? ((size_t)l * n + i) * n + j : ((size_t)(l - 1) * n + j) * n + i;
                p->load[problem_at(p, l, (int)i)] += p->next_pairs[pair];
                p->rows[l] += p->next_pairs[pair];
            }
    int *home = must(malloc(n * sizeof *home)), most = (p->n_experts + p->n_ranks - 1) / p->n_ranks;
    for (int g = 0; g < p->n_ranks; g++) {
        p->share[g] = 1.0 / p->n_ranks;
        p->total_slots[g] = most * p->n_layers;
        for (int h = 0; h < p->n_ranks; h++)
            p->distance[g * p->n_ranks + h] = topology_us_per_byte(&x->topo, g, h) / 0.25e-3;
        for (int l = 0; l < p->n_layers; l++)
            p->slots[l * p->n_ranks + g] = most;
    }
    for (int l = 0; l < p->n_layers; l++) {
        double best = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share, p->slots, home);
        for (int g = 0; g < p->n_ranks; g++)
            p->cap[l * p->n_ranks + g] = 1.05 * fmax(best, 1) * p->rows[l] / p->n_ranks;
    }
    free(home);
    p->fingerprint = hash_bytes(HASH_START, p->load, (size_t)p->n_layers * n * sizeof *p->load);
}

void instance_planted(int n_layers, int n_experts, int n_ranks, int n_nodes, uint64_t seed, instance *x)
{
    open_instance(n_layers, n_experts, n_ranks, n_nodes, x);
    size_t n = (size_t)n_experts;
    int *block = must(malloc((size_t)n_layers * n * sizeof *block)), size = n_experts / n_ranks;
    assert_int_equal(size * n_ranks, n_experts);
    for (int l = 0; l < n_layers; l++) {
        int *at = block + (size_t)l * n;
        for (int e = 0; e < n_experts; e++)
            at[e] = e / size;
        for (int e = n_experts - 1; e > 0; e--) {
            int other = support_below(&seed, e + 1), kept = at[e];
            at[e] = at[other];
            at[other] = kept;
        }
    }
    double everywhere = 0.51 / ((double)n_experts * n_experts), inside = 0.49 / ((double)n_experts * size);
    for (int l = 0; l + 1 < n_layers; l++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++)
                x->p.next_pairs[((size_t)l * n + i) * n + j] =
                    1e6 * (everywhere + (block[(size_t)l * n + i] == block[(size_t)(l + 1) * n + j] ? inside : 0));
    free(block);
    close_instance(x);
}

double instance_planted_optimum(const instance *x)
{
    double sum = 0;
    int n = x->p.n_ranks;
    for (int i = 0; i < n * n; i++)
        sum += x->p.distance[i];
    return 0.51 * sum / (n * n);
}

static void draw_topic(double *share, int n, double sparse, uint64_t *random)
{
    double sum = 0;
    for (int e = 0; e < n; e++)
        sum += share[e] = gamma_draw(sparse, random);
    for (int e = 0; e < n; e++)
        share[e] = 0.7 * share[e] / sum + 0.3 / n;
}

void instance_topics(int n_layers, int n_experts, int n_ranks, int n_nodes, int n_topics, double sparse, uint64_t seed,
                     instance *x)
{
    open_instance(n_layers, n_experts, n_ranks, n_nodes, x);
    size_t n = (size_t)n_experts, topics = (size_t)n_topics;
    double *share = must(malloc((size_t)n_layers * topics * n * sizeof *share));
    for (size_t i = 0; i < (size_t)n_layers * topics; i++)
        draw_topic(share + i * n, n_experts, sparse, &seed);
    for (size_t l = 0; l + 1 < (size_t)n_layers; l++)
        for (size_t t = 0; t < topics; t++) {
            const double *from = share + (l * topics + t) * n, *to = share + ((l + 1) * topics + t) * n;
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j < n; j++)
                    x->p.next_pairs[(l * n + i) * n + j] += 1e6 / n_topics * from[i] * to[j];
        }
    free(share);
    close_instance(x);
}

void instance_clear(instance *x)
{
    problem *p = &x->p;
    free(p->load);
    free(p->next_pairs);
    free(p->rows);
    free(p->share);
    free(p->slots);
    free(p->total_slots);
    free(p->cap);
    free(p->distance);
    free(x->layer_numbers);
    topology_clear(&x->topo);
    *x = (instance){0};
}
