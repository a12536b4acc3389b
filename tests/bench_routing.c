/* What a token costs beside its experts: gate, packets, combine, counting. Usage: bench_routing
 *
 * Per row, median of 101 rounds. For scale: an expert's products over one row of 4096 x 1536 are 38 MFLOP, about 0.3 ms at 128
 * GFLOP/s, and a row has eight of them. */
#include "placement/routing_stats.h"
#include "proto/clock.h"
#include "router/combine.h"
#include "router/gate.h"
#include "router/packet.h"
#include "tests/support.h"
#include "tests/support_bench.h"
#include "tests/support_routing.h"
#include "worker/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 101, REPEATS = 64, HIDDEN = 4096, K = 8, MAX_E = 512 };

typedef void work(void *arg);

static void measure(const char *name, work *run, void *arg, int rows)
{
    double us[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        double start = clock_seconds();
        for (int j = 0; j < REPEATS; j++)
            run(arg);
        us[i] = (clock_seconds() - start) * 1e6 / REPEATS / rows;
    }
    printf("%-58s %9.3f us a row\n", name, bench_median(us, ROUNDS));
}

/* ---- gate ---- */

typedef struct {
    gate_policy policy;
    gate_math math;
    float logits[MAX_E], scratch[3 * MAX_E], weights[K];
    uint16_t experts[K];
} gate_work;

static void choose(void *arg)
{
    gate_work *w = arg;
    if (gate_choose(&w->policy, &w->math, w->logits, w->scratch, w->experts, w->weights) != STATUS_OK)
        exit(1);
}

static void softmax_alone(void *arg)
{
    gate_work *w = arg;
    w->math.softmax(w->logits, w->policy.n_experts, w->scratch);
}

static void bench_gate(uint64_t *seed)
{
    static gate_work w;
    static float bias[MAX_E];
    kernel_isa isa;
    if (kernels_pick(&isa) != STATUS_OK)
        exit(1);
    w.math.softmax = kernels_of(isa)->softmax;
    for (int e = 0; e < MAX_E; e++) {
        w.logits[e] = support_gauss(seed);
        bias[e] = support_gauss(seed) / 100;
    }
    for (int n = 64; n <= MAX_E; n *= 8) {
        char name[80];
        w.policy = GATE_NEUTRAL(n, K);
        w.policy.normalise = true;
        snprintf(name, sizeof name, "softmax of %d, %s", n, kernel_isa_name(isa));
        measure(name, softmax_alone, &w, 1);
        snprintf(name, sizeof name, "gate, neutral top-%d of %d (softmax included)", K, n);
        measure(name, choose, &w, 1);
    }
    w.policy = (gate_policy){.n_experts = 256,
                             .top_k = K,
                             .score = GATE_SIGMOID,
                             .bias = bias,
                             .n_groups = 8,
                             .keep_groups = 4,
                             .normalise = true,
                             .scale = 2.5f};
    measure("gate, DeepSeek-V3 (sigmoid, 4 of 8 groups, 8 of 256)", choose, &w, 1);
}

/* ---- packets ---- */

typedef struct {
    int n_rows, n_ranks;
    route *routes;
    packet_row *rows;
    packet_entry *entries;
    packet packets[64];
    uint32_t scratch[64];
} packet_work;

static void build(void *arg)
{
    packet_work *w = arg;
    packet_build(w->routes, NULL, w->n_rows, K, w->n_ranks, w->rows, w->entries, w->packets, w->scratch);
}

static void bench_packet(uint64_t *seed)
{
    packet_work w = {.n_rows = 256};
    w.routes = calloc(256 * K, sizeof *w.routes);
    w.rows = calloc(packet_max_rows(256, K, 64), sizeof *w.rows);
    w.entries = calloc(packet_max_entries(256, K), sizeof *w.entries);
    for (w.n_ranks = 1; w.n_ranks <= 64; w.n_ranks *= 8) {
        char name[80];
        for (int i = 0; i < 256 * K; i++)
            w.routes[i] = (route){
                .expert = (uint16_t)support_below(seed, 256), .rank = (uint16_t)support_below(seed, w.n_ranks), .weight = 1};
        snprintf(name, sizeof name, "packets of 256 rows, top-%d, to %d ranks", K, w.n_ranks);
        measure(name, build, &w, 256);
    }
    free(w.routes);
    free(w.rows);
    free(w.entries);
}

/* ---- combine ---- */

static float y[K][HIDDEN], sum[HIDDEN];
static int32_t fixed[HIDDEN];
static int exponent;
static spill_list spills;

static void add_fixed(void *arg)
{
    (void)arg;
    memset(fixed, 0, sizeof fixed);
    for (int e = 0; e < K; e++)
        if (combine_add_fixed(y[e], 0.125f, exponent, K, 0, (uint16_t)e, 0, HIDDEN, fixed, &spills) != STATUS_OK)
            exit(1);
}

static void add_fast(void *arg)
{
    (void)arg;
    memset(sum, 0, sizeof sum);
    for (int e = 0; e < K; e++)
        combine_add_fast(y[e], 0.125f, 0, HIDDEN, sum);
}

static void sum_fixed(void *arg)
{
    const int32_t *parts[4] = {fixed, fixed, fixed, fixed};
    (void)arg;
    combine_sum_fixed(parts, 4, exponent, HIDDEN, sum);
}

static void sum_exact(void *arg)
{
    const float *parts[K];
    (void)arg;
    for (int e = 0; e < K; e++)
        parts[e] = y[e];
    combine_sum_floats(parts, K, HIDDEN, sum);
}

static void find_exponent(void *arg)
{
    (void)arg;
    exponent = combine_exponent(y[0], HIDDEN, K);
}

static void bench_combine(uint64_t *seed)
{
    static const struct {
        const char *name;
        work *run;
    } all[] = {{"exponent of a row", find_exponent},
               {"fixed: 8 contributions added", add_fixed},
               {"fast: 8 contributions added", add_fast},
               {"fixed: 4 parts summed at home", sum_fixed},
               {"exact: 8 contributions summed at home", sum_exact}};
    for (int i = 0; i < K * HIDDEN; i++)
        y[i / HIDDEN][i % HIDDEN] = support_gauss(seed);
    for (int base = 1; base >= 0; base--)
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            char name[80];
            snprintf(name, sizeof name, "%s, hidden %d, %s", all[i].name, HIDDEN, combine_force_base(base));
            measure(name, all[i].run, NULL, 1);
        }
    printf("spills: %zu\n", spills.n);
    spill_list_clear(&spills);
}

/* ---- counting ---- */

typedef struct {
    routing_stats *stats;
    uint16_t *experts; /* [REPEATS][layers][K] */
    size_t per_row;
    int next;
} count_work;

static void count(void *arg)
{
    count_work *w = arg;
    if (routing_stats_add_row(w->stats, w->experts + (size_t)(w->next++ % REPEATS) * w->per_row, 0, PHASE_DECODE) != STATUS_OK)
        exit(1);
}

static void bench_stats(uint64_t *seed)
{
    routing_shape shape = support_routing_shape(16, 256, K, 1);
    count_work w = {.per_row = (size_t)16 * K};
    w.experts = calloc(REPEATS * w.per_row, sizeof *w.experts);
    for (int r = 0; r < REPEATS; r++)
        support_routing_row(seed, &shape, 0, w.experts + (size_t)r * w.per_row, NULL);
    for (int pairs = 0; pairs < 2; pairs++) {
        if (routing_stats_create(&shape, pairs, &w.stats) != STATUS_OK)
            exit(1);
        measure(pairs ? "counting, 16 layers of 256, top-8, with pairs" : "counting, 16 layers of 256, top-8, P alone", count, &w,
                1);
        routing_stats_destroy(w.stats);
    }
    free(w.experts);
}

int main(void)
{
    uint64_t seed = 1;
    bench_gate(&seed);
    bench_packet(&seed);
    bench_combine(&seed);
    bench_stats(&seed);
    return 0;
}
