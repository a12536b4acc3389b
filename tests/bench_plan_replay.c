/* What replaying a plan and splitting rows over replicas cost. Usage: bench_plan_replay [TRACE.safetensors]
 *
 * Replay: a run looks at tokens * layers * k choices of two bytes; their ceiling is the rate at which memory is read (choices * 2
 * bytes / bytes per second). Without a trace: random traffic of 24 layers, 32 experts, top-4, 128 sequences at once, 8 ranks.
 * Split: 256 experts on 64 ranks, top-8, 8 rows a rank and step; its floor is looking at every expert and copy once, measured as
 * the time of a layer without replicas. Medians of 51 steps. */
#include "placement/replay.h"
#include "placement/replica_split.h"
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_bench.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"
#include "tests/support_traffic.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 51 };

static void check(status st)
{
    if (st == STATUS_OK)
        return;
    fprintf(stderr, "%s\n", status_message());
    exit(1);
}

/* ---- replay ---- */

static void read_traffic(const char *path, traffic *out)
{
    routing_trace *trace;
    check(routing_trace_open(path, &trace));
    check(traffic_load(trace, NULL, out));
    routing_trace_close(trace);
}

static void make_traffic(traffic *out)
{
    static int layers[24];
    uint64_t seed = 1;
    routing_shape shape = support_routing_shape(1, 32, 4, 1);
    for (int l = 0; l < 24; l++)
        layers[l] = l;
    shape.n_layers = 24;
    shape.layer_numbers = layers;
    check(support_random_traffic(&seed, &shape, 146, 600, 0, 0, out));
}

static void bench_replay(const traffic *t, double replicas, replica_rule rule, int threads)
{
    const int ranks = 8;
    uint64_t seed = 2;
    plan p;
    topology topo;
    replay_result r = {0};
    double seconds[7], read_seconds;
    plan_shape shape = {.n_ranks = ranks,
                        .n_experts = t->shape.n_experts,
                        .n_layers = t->shape.n_layers,
                        .layer_numbers = t->shape.layer_numbers};
    replay_options options = {.concurrency = 128, .replicas = rule, .threads = threads};
    check(support_random_plan(&seed, &shape, NULL, replicas, &p));
    check(topology_uniform(ranks, 2, &topo));
    for (int i = 0; i < 7; i++) {
        double start = clock_seconds();
        replay_result_clear(&r);
        check(replay_run(t, &p, &topo, &options, &r));
        seconds[i] = clock_seconds() - start;
    }
    thread_pool *pool;
    check(thread_pool_create(1, 1, &pool));
    double choices = (double)r.n_rows * r.n_layers * t->shape.top_k, median = bench_median(seconds, 7);
    size_t bytes = (size_t)t->n_tokens * (size_t)r.n_layers * (size_t)t->shape.top_k * sizeof *t->experts;
    read_seconds = choices * sizeof *t->experts / bench_read_rate(pool, t->experts, bytes, 4);
    thread_pool_destroy(pool);
    printf(
        "replay, %lld steps, %.0f %% of experts with replicas by %s, %d threads: %6.1f ms, %5.1f ns a choice (reading them: %.2f "
        "ms)\n",
        (long long)r.n_steps, replicas * 100, rule == REPLICAS_BY_STEP ? "step " : "share", threads, median * 1e3,
        median / choices * 1e9, read_seconds * 1e3);
    replay_result_clear(&r);
    topology_clear(&topo);
    plan_clear(&p);
}

/* ---- split ---- */

enum { E = 256, G = 64, K = 8, ROWS_PER_RANK = 8 };

/* Hottest expert by load per copy first, each copy onto the least loaded rank with room: as planners place them. */
static void place(const double *load, int extra, plan *p)
{
    int n_copies[E], n_placed = 0;
    double rank_load[G] = {0};
    int used[G] = {0};
    for (int e = 0; e < E; e++)
        n_copies[e] = 1;
    for (int x = 0; x < extra * G; x++) {
        int hottest = 0;
        for (int e = 1; e < E; e++)
            if (load[e] / n_copies[e] > load[hottest] / n_copies[hottest])
                hottest = e;
        n_copies[hottest]++;
    }
    for (int e = 0; e < E; e++) {
        bool on[G] = {false};
        p->first_copy[e] = n_placed;
        for (int c = 0; c < n_copies[e]; c++) {
            int best = -1;
            for (int g = 0; g < G; g++)
                if (!on[g] && used[g] < E / G + extra && (best < 0 || rank_load[g] < rank_load[best]))
                    best = g;
            if (best < 0)
                break;
            on[best] = true;
            used[best]++;
            rank_load[best] += load[e] / n_copies[e];
            p->copy_ranks[n_placed++] = best;
        }
    }
    p->first_copy[E] = n_placed;
}

static void draw_rows(uint64_t *seed, const double *load, double total, int32_t *rows, int32_t *rows_of_owner)
{
    memset(rows, 0, E * sizeof *rows);
    memset(rows_of_owner, 0, sizeof(int32_t) * G * E);
    for (int i = 0; i < G * ROWS_PER_RANK * K; i++) {
        double at = (double)(support_random(seed) >> 11) * 0x1p-53 * total;
        int e = 0;
        while (e < E - 1 && at > load[e])
            at -= load[e++];
        rows[e]++;
        rows_of_owner[i % G * E + e]++;
    }
}

static void bench_split(int extra, double row, double expert)
{
    static int first_copy[E + 1], copy_ranks[E + 3 * G], node_of_rank[G];
    static int32_t rows[E], of_copy[E + 3 * G], rows_of_owner[G * E], quota[G * (E + 3 * G)];
    uint64_t seed = 3;
    double load[E], total = 0, split_us[ROUNDS], owners_us[ROUNDS], gap = 0, row_us[G], expert_us[G], bound_rows[E], bound;
    plan p = {.n_ranks = G,
              .n_experts = E,
              .n_layers = 1,
              .first_copy = first_copy,
              .copy_ranks = copy_ranks,
              .node_of_rank = node_of_rank};
    for (int e = 0; e < E; e++)
        total += load[e] = exp(0.8 * support_gauss(&seed));
    for (int g = 0; g < G; g++) {
        row_us[g] = row;
        expert_us[g] = expert;
        node_of_rank[g] = g / 8;
    }
    place(load, extra, &p);
    replica_split *split;
    check(replica_split_create(G, E, first_copy[E], &split));
    for (int i = 0; i < ROUNDS; i++) {
        draw_rows(&seed, load, total, rows, rows_of_owner);
        replica_split_rows(split, &p, 0, row_us, expert_us, rows, of_copy); /* warm, as the last of many layers */
        double start = clock_seconds();
        replica_split_rows(split, &p, 0, row_us, expert_us, rows, of_copy);
        split_us[i] = (clock_seconds() - start) * 1e6;
        start = clock_seconds();
        replica_split_owners(split, &p, 0, G, rows_of_owner, of_copy, quota);
        owners_us[i] = (clock_seconds() - start) * 1e6;
        for (int e = 0; e < E; e++)
            bound_rows[e] = rows[e];
        check(replica_split_bound(&p, 0, row_us, expert_us, bound_rows, &bound));
        gap += replica_split_busiest(&p, 0, row_us, expert_us, of_copy) / bound / ROUNDS;
    }
    printf("split of %d experts in %d copies on %d ranks, row %g us, expert %g us: %5.1f us, over the bound %.4f; for all owners "
           "%5.1f us\n",
           E, first_copy[E], G, row, expert, bench_median(split_us, ROUNDS), gap, bench_median(owners_us, ROUNDS));
    replica_split_destroy(split);
}

int main(int argc, char **argv)
{
    traffic t;
    if (argc > 1)
        read_traffic(argv[1], &t);
    else
        make_traffic(&t);
    bench_replay(&t, 0, REPLICAS_BY_SHARE, 1);
    bench_replay(&t, 0, REPLICAS_BY_SHARE, 2);
    bench_replay(&t, 0.25, REPLICAS_BY_SHARE, 1);
    bench_replay(&t, 0.25, REPLICAS_BY_STEP, 1);
    traffic_clear(&t);
    for (int extra = 0; extra < 3; extra++) {
        bench_split(extra, 250, 1650);
        bench_split(extra, 0.15, 11.6);
    }
    return 0;
}
