#include "worker/probe.h"

#include "proto/clock.h"
#include "proto/console.h"
#include "worker/experts.h"
#include "worker/runtime.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_ROWS = 512, MOST_SAMPLES = 64, LEAST_ROUNDS = 5, MOST_ROUNDS = 41 };
static const int rows_each[] = {1, 2, 4, 8, 16, 32};
enum { N_ROWS_EACH = sizeof rows_each / sizeof *rows_each };

typedef struct {
    group *group;
    const probe_options *options;
    model_config config;
    checkpoint *checkpoint;
    const model_weights *weights;
    thread_pool *pool;
    experts *experts;
    exchange *exchange;
    kernel_isa isa;
    int rank, n_ranks;
    int *layers; /* [n_moe_layers] the model's own numbers */
    int *mine;   /* [n_mine] experts this rank holds, in every layer */
    int n_mine;
    unsigned turn; /* layers so far */
    route *routes; /* [MOST_ROWS] */
    int16_t *exponents;
    float *sink; /* [MOST_ROWS][hidden] */
} probe;

/* What a rank found. */
typedef struct {
    double row_us, expert_us;
    double link_us[N_LINK_CLASSES], link_gb[N_LINK_CLASSES]; /* 0: no such link here */
} finding;

/* ---- fitting ---- */

void probe_fit(const probe_sample *samples, int n, double *per_row, double *per_touched)
{
    double rr = 0, rt = 0, tt = 0, r1 = 0, t1 = 0;
    for (int i = 0; i < n; i++) {
        double r = samples[i].rows / samples[i].us, t = samples[i].touched / samples[i].us;
        rr += r * r;
        rt += r * t;
        tt += t * t;
        r1 += r;
        t1 += t;
    }
    double det = rr * tt - rt * rt;
    *per_row = det > 0 ? (r1 * tt - t1 * rt) / det : r1 / rr;
    *per_touched = det > 0 ? (t1 * rr - r1 * rt) / det : 0;
    if (*per_touched < 0) { /* the best with none of it */
        *per_touched = 0;
        *per_row = r1 / rr;
    }
    if (*per_row <= 0) { /* nothing but a start: what a row takes is too little to see */
        *per_row = 1e-6;
        *per_touched = t1 / tt;
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* ---- life ---- */

/* This rank's share in contiguous blocks; at least one expert, where there are more ranks than experts. */
static status choose_experts(probe *p, unsigned char *holds)
{
    const model_config *c = &p->config;
    p->layers = calloc((size_t)c->n_moe_layers + 1, sizeof *p->layers);
    p->mine = calloc((size_t)c->n_experts, sizeof *p->mine);
    if (!p->layers || !p->mine)
        return status_fail(STATUS_NO_MEMORY, "no memory for a list of experts");
    for (int e = 0; e < c->n_experts; e++)
        if ((int)((long long)e * p->n_ranks / c->n_experts) == p->rank)
            p->mine[p->n_mine++] = e;
    if (p->n_mine == 0)
        p->mine[p->n_mine++] = p->rank % c->n_experts;
    for (int l = 0, n = 0; l < c->n_layers; l++) {
        if (!c->moe_layer[l])
            continue;
        p->layers[n++] = l;
        for (int i = 0; i < p->n_mine; i++)
            holds[(size_t)l * (size_t)c->n_experts + (size_t)p->mine[i]] = 1;
    }
    return STATUS_OK;
}

static status load(probe *p)
{
    TRY(model_config_read(p->options->model_dir, &p->config));
    const model_config *c = &p->config;
    unsigned char *holds = calloc((size_t)c->n_layers * (size_t)c->n_experts + 1, 1);
    if (!holds)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of this rank's experts");
    status st = choose_experts(p, holds);
    if (st == STATUS_OK)
        st = checkpoint_open(p->options->model_dir, c, &p->checkpoint);
    if (st == STATUS_OK)
        st = checkpoint_bind(p->checkpoint, holds, WEIGHTS_MAP, &p->weights);
    free(holds);
    TRY(st);
    checkpoint_warm(p->checkpoint, group_told_to_stop);
    int threads = p->options->threads > 0 ? p->options->threads : runtime_default_threads(p->group);
    return thread_pool_create(threads, !group_shares_cores(p->group, threads), &p->pool);
}

static status create_local(probe *p)
{
    const model_config *c = &p->config;
    experts_shape shape = {.hidden = c->hidden,
                           .n_experts = c->n_experts,
                           .top_k = 1,
                           .expert_inter = c->expert_inter,
                           .max_rows = MOST_ROWS,
                           .n_ranks = p->n_ranks,
                           .combine = COMBINE_FIXED,
                           .rows = p->options->rows};
    p->routes = calloc(MOST_ROWS, sizeof *p->routes);
    p->exponents = calloc(MOST_ROWS, sizeof *p->exponents);
    p->sink = calloc((size_t)MOST_ROWS * (size_t)c->hidden, sizeof *p->sink);
    if (!p->routes || !p->exponents || !p->sink)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d rows", MOST_ROWS);
    return experts_create(&shape, kernels_of(p->isa), p->pool, &p->experts);
}

/* Rows like those behind a norm: about N(0, 1), by a small generator of its own. */
static void fill_rows(probe *p)
{
    size_t stride;
    float *rows = exchange_rows(p->exchange, &stride);
    uint64_t state = 12345u + (uint64_t)p->rank;
    for (size_t r = 0; r < MOST_ROWS; r++) {
        for (size_t i = 0; i < (size_t)p->config.hidden; i++) {
            float sum = 0;
            for (int k = 0; k < 4; k++) {
                state = state * 6364136223846793005u + 1442695040888963407u;
                sum += (float)(state >> 40) * 0x1p-24f - 0.5f;
            }
            rows[r * stride + i] = sum * 1.732f;
        }
        p->exponents[r] = (int16_t)combine_exponent(rows + r * stride, p->config.hidden, 1);
    }
}

static status create(probe *p)
{
    TRY(runtime_agree_on_isa(p->group, NULL, &p->isa));
    TRY(group_agree(p->group, load(p)));
    TRY(group_agree(p->group, create_local(p)));
    exchange_shape shape = {.hidden = p->config.hidden,
                            .top_k = 1,
                            .max_rows = MOST_ROWS,
                            .n_threads = thread_pool_size(p->pool),
                            .combine = COMBINE_FIXED,
                            .rows = p->options->rows};
    TRY(exchange_create(p->group, &shape, &p->exchange));
    fill_rows(p);
    return STATUS_OK;
}

static void clear(probe *p)
{
    exchange_destroy(p->exchange);
    experts_destroy(p->experts);
    thread_pool_destroy(p->pool);
    checkpoint_close(p->checkpoint);
    model_config_clear(&p->config);
    free(p->layers);
    free(p->mine);
    free(p->routes);
    free(p->exponents);
    free(p->sink);
}

/* ---- computing ---- */

/* One layer of `touched` experts with `each` rows, all this rank's own; microseconds in the experts. */
static status run_experts(probe *p, int touched, int each, double *us)
{
    int layer = p->layers[p->turn % (unsigned)p->config.n_moe_layers], n = touched * each;
    for (int i = 0; i < n; i++) {
        int e = p->mine[(p->turn * (unsigned)touched + (unsigned)(i / each)) % (unsigned)p->n_mine];
        p->routes[i] = (route){.expert = (uint16_t)e, .rank = (uint16_t)p->rank, .weight = 1};
    }
    p->turn++;
    const mlp_weights *weights = p->weights->layers[layer].experts;
    TRY(exchange_send(p->exchange, n, p->routes, p->exponents));
    double start = clock_seconds();
    TRY(experts_run_home(p->experts, weights, p->exchange, p->rank));
    double spent = clock_seconds() - start;
    TRY(exchange_wait(p->exchange));
    start = clock_seconds();
    TRY(experts_run_rest(p->experts, weights, p->exchange, p->rank));
    *us = (spent + clock_seconds() - start) * 1e6;
    TRY(exchange_return(p->exchange));
    return exchange_wait_results(p->exchange);
}

/* Rounds that keep to the time given; all ranks do as many. */
static status choose_rounds(probe *p, double seconds_of_one, int n_cells, int *rounds)
{
    double most = p->options->seconds / n_cells / (seconds_of_one > 0 ? seconds_of_one : 1e-9);
    int mine = most < LEAST_ROUNDS ? LEAST_ROUNDS : most > MOST_ROUNDS ? MOST_ROUNDS : (int)most;
    return group_min(p->group, mine, rounds);
}

static status measure_cell(probe *p, int touched, int each, int n_cells, probe_sample *out)
{
    double us[MOST_ROUNDS], first;
    int rounds;
    TRY(run_experts(p, touched, each, &first));
    double start = clock_seconds();
    TRY(run_experts(p, touched, each, &first));
    TRY(choose_rounds(p, clock_seconds() - start, n_cells, &rounds));
    for (int i = 0; i < rounds; i++)
        TRY(run_experts(p, touched, each, &us[i]));
    *out = (probe_sample){.rows = touched * each, .touched = touched, .us = median(us, rounds)};
    return STATUS_OK;
}

/* The same cells on all ranks, whatever each of them holds: they wait for each other in every layer. */
static status measure_experts(probe *p, finding *out)
{
    probe_sample samples[MOST_SAMPLES];
    int fewest, n = 0, counts[3], n_counts = 0;
    TRY(group_min(p->group, p->n_mine, &fewest));
    int most = fewest < MOST_ROWS / rows_each[N_ROWS_EACH - 1] ? fewest : MOST_ROWS / rows_each[N_ROWS_EACH - 1];
    for (int t = 1; t <= most && n_counts < 3; t = t * 4 <= most || t == most ? t * 4 : most)
        counts[n_counts++] = t;
    for (int i = 0; i < n_counts; i++)
        for (int k = 0; k < N_ROWS_EACH; k++)
            TRY(measure_cell(p, counts[i], rows_each[k], n_counts * N_ROWS_EACH, &samples[n++]));
    probe_fit(samples, n, &out->row_us, &out->expert_us);
    return STATUS_OK;
}

/* ---- links ---- */

/* The rank that this one sends to: the next of its node, or the same place of the next node; itself where there is none. */
static int partner(const probe *p, link_class class)
{
    const int *node = group_node_of_rank(p->group);
    int n_nodes = group_n_nodes(p->group), local = 0, size = 0, mine = node[p->rank];
    if (class == LINK_SAME_NODE) {
        for (int i = 1; i < p->n_ranks; i++)
            if (node[(p->rank + i) % p->n_ranks] == mine)
                return (p->rank + i) % p->n_ranks;
        return p->rank;
    }
    for (int r = 0; r < p->rank; r++)
        local += node[r] == mine;
    int other = (mine + 1) % n_nodes;
    for (int r = 0; r < p->n_ranks; r++)
        size += node[r] == other;
    for (int r = 0, at = 0; r < p->n_ranks && other != mine; r++)
        if (node[r] == other && at++ == local % size)
            return r;
    return p->rank;
}

/* One layer without experts: rows out, read by who got them, results back and added up. */
static status run_link(probe *p, int to, int n, double *us)
{
    size_t hidden = (size_t)p->config.hidden, row_bytes = hidden * (p->options->rows == ROWS_BF16 ? 2 : 4);
    for (int i = 0; i < n; i++)
        p->routes[i] = (route){.expert = 0, .rank = (uint16_t)to, .weight = 1};
    double start = clock_seconds();
    TRY(exchange_send(p->exchange, n, p->routes, p->exponents));
    TRY(exchange_wait(p->exchange));
    for (int s = 0; s < p->n_ranks; s++) {
        const exchange_incoming *in = exchange_from(p->exchange, s);
        for (uint32_t r = 0; r < in->packet.n_rows; r++)
            memcpy(p->sink + (size_t)(r % MOST_ROWS) * hidden, (const char *)in->rows + in->packet.rows[r].row * in->row_bytes,
                   row_bytes);
        if (in->packet.n_rows)
            memset(in->results, 0, in->packet.n_rows * hidden * sizeof(int32_t));
    }
    TRY(exchange_return(p->exchange));
    TRY(exchange_wait_results(p->exchange));
    exchange_combine(p->exchange, 0, n, p->sink, hidden);
    *us = (clock_seconds() - start) * 1e6;
    return STATUS_OK;
}

static status measure_link(probe *p, link_class class, finding *out)
{
    static const int counts[] = {1, 8, 32, 128, MOST_ROWS};
    enum { N_COUNTS = sizeof counts / sizeof *counts };
    int to = partner(p, class), any, rounds;
    probe_sample samples[N_COUNTS];
    double us[MOST_ROUNDS], both = (double)p->config.hidden * (p->options->rows == ROWS_BF16 ? 2 + 4 : 4 + 4);
    TRY(group_min(p->group, to == p->rank, &any));
    if (any)
        return STATUS_OK; /* no rank has such a link */
    for (int i = 0; i < N_COUNTS; i++) {
        double start = clock_seconds();
        TRY(run_link(p, to, counts[i], us));
        TRY(choose_rounds(p, clock_seconds() - start, 2 * N_COUNTS, &rounds));
        for (int k = 0; k < rounds; k++)
            TRY(run_link(p, to, counts[i], &us[k]));
        samples[i] = (probe_sample){.rows = counts[i] * both, .touched = 2, .us = median(us, rounds)};
    }
    if (to == p->rank)
        return STATUS_OK;
    double us_per_byte;
    probe_fit(samples, N_COUNTS, &us_per_byte, &out->link_us[class]);
    out->link_gb[class] = 1e-3 / us_per_byte;
    return STATUS_OK;
}

/* ---- the result ---- */

static void take_links(const finding *all, int n, link_class class, topology *t)
{
    double *us = calloc((size_t)n, sizeof *us), *gb = calloc((size_t)n, sizeof *gb);
    int found = 0;
    for (int r = 0; us && gb && r < n; r++)
        if (all[r].link_gb[class] > 0) {
            us[found] = all[r].link_us[class];
            gb[found++] = all[r].link_gb[class];
        }
    if (found > 0)
        t->link[class] = (link_cost){.us = median(us, found), .gb_per_s = median(gb, found)};
    free(us);
    free(gb);
}

static status fill_topology(const probe *p, const finding *all, topology *t)
{
    TRY(topology_uniform(p->n_ranks, 1, t));
    t->n_nodes = group_n_nodes(p->group);
    for (int r = 0; r < p->n_ranks; r++) {
        t->node_of_rank[r] = group_node_of_rank(p->group)[r];
        t->local_index[r] = 0;
        for (int q = 0; q < r; q++)
            t->local_index[r] += t->node_of_rank[q] == t->node_of_rank[r];
        t->row_us[r] = all[r].row_us;
        t->expert_us[r] = all[r].expert_us;
    }
    take_links(all, p->n_ranks, LINK_SAME_NODE, t);
    take_links(all, p->n_ranks, LINK_CROSS_NODE, t);
    t->row_bytes = p->config.hidden * (p->options->rows == ROWS_BF16 ? 2.0 : 4.0);
    t->bytes_per_expert = (int64_t)checkpoint_expert_bytes(p->checkpoint, p->layers[0]);
    return STATUS_OK;
}

static void print_link(const topology *t, link_class class, const char *name, bool measured)
{
    printf("%-10s %s: %.1f us, %.2f GB/s%s\n", "link", name, t->link[class].us, t->link[class].gb_per_s,
           measured ? "" : " (no such link here: a constant)");
}

static void print_topology(const probe *p, const finding *all, const topology *t)
{
    bool has[N_LINK_CLASSES] = {false};
    for (int r = 0; r < p->n_ranks; r++)
        for (int c = 0; c < N_LINK_CLASSES; c++)
            has[c] |= all[r].link_gb[c] > 0;
    printf("%s (%s), %d threads per rank, %s; %s an expert, %.0f bytes a row\n", p->config.name, p->config.family->model_type,
           thread_pool_size(p->pool), kernel_isa_name(p->isa), human_bytes((double)t->bytes_per_expert).text, t->row_bytes);
    for (int r = 0; r < p->n_ranks; r++)
        printf("rank %-5d node %d: %.2f us a row, %.1f us an expert\n", r, t->node_of_rank[r], t->row_us[r], t->expert_us[r]);
    print_link(t, LINK_SAME_NODE, "same node", has[LINK_SAME_NODE]);
    print_link(t, LINK_CROSS_NODE, "cross node", has[LINK_CROSS_NODE]);
    fflush(stdout);
}

static status write_result(const probe *p, const finding *all)
{
    topology t = {0};
    status st = fill_topology(p, all, &t);
    if (st == STATUS_OK)
        st = topology_write(&t, p->options->out_path);
    if (st == STATUS_OK)
        print_topology(p, all, &t);
    topology_clear(&t);
    return st;
}

static status gather_findings(const probe *p, const finding *mine, finding **out)
{
    const void **parts = calloc((size_t)p->n_ranks, sizeof *parts);
    size_t *sizes = calloc((size_t)p->n_ranks, sizeof *sizes);
    finding *all = *out = calloc((size_t)p->n_ranks, sizeof *all);
    status st =
        group_agree(p->group, parts && sizes && all ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the result"));
    if (st == STATUS_OK)
        st = group_gather(p->group, mine, sizeof *mine, parts, sizes);
    for (int r = 0; st == STATUS_OK && p->rank == 0 && r < p->n_ranks; r++)
        memcpy(&all[r], parts[r], sizeof *all);
    free(parts);
    free(sizes);
    return st;
}

static status run(probe *p)
{
    finding mine = {0}, *all = NULL;
    TRY(create(p));
    TRY(measure_experts(p, &mine));
    TRY(measure_link(p, LINK_SAME_NODE, &mine));
    TRY(measure_link(p, LINK_CROSS_NODE, &mine));
    status st = gather_findings(p, &mine, &all);
    if (st == STATUS_OK)
        st = group_agree(p->group, p->rank == 0 ? write_result(p, all) : STATUS_OK);
    free(all);
    return st;
}

status probe_run(group *g, const probe_options *options)
{
    probe p = {.group = g, .options = options, .rank = group_rank(g), .n_ranks = group_size(g)};
    status st = run(&p);
    if (st != STATUS_PEER_LOST && st != STATUS_STOPPED)
        clear(&p);
    return st;
}
