/* mpi_exchange.c - layers of random rows and routes over many ranks, checked: started under mpirun by ctest.
 *
 *   mpi_exchange LAYERS RANKS_PER_NODE [SEED]     all modes, formats and some top-k; LAYERS of each
 *   mpi_exchange roomy RANKS_PER_NODE             one layer of a shape that wants some 10 MB of /dev/shm
 *   mpi_exchange forever RANKS_PER_NODE           one shape until something ends it; says "running" on stdout when it is under
 * way */
#include "proto/log.h"
#include "tests/support_exchange.h"

#include <stdio.h>
#include <unistd.h>

static void maybe_sleep(uint64_t *random)
{
    if (support_below(random, 12) == 0)
        usleep((useconds_t)support_below(random, 3000));
}

/* [all] What all ranks returned is what all ranks asked for. */
static status check_returned(group *g, const exchange_check *c, const exchange *x)
{
    const exchange_stats *s = exchange_get_stats(x);
    unsigned long long mine[4] = {s->return_bytes_same_node, s->return_bytes_cross_node, c->home_same_node, c->home_cross_node};
    unsigned long long sum[4] = {0};
    const void *parts[256];
    size_t sizes[256];
    status st = STATUS_OK;
    TRY(group_gather(g, mine, sizeof mine, parts, sizes));
    for (int r = 0; group_rank(g) == 0 && r < group_size(g); r++)
        for (int i = 0; i < 4; i++)
            sum[i] += ((const unsigned long long *)parts[r])[i];
    if (sum[0] != sum[2] || sum[1] != sum[3])
        st =
            status_fail(STATUS_BAD_INPUT, "%llu and %llu result bytes counted inside and between nodes, routes say %llu and %llu",
                        sum[0], sum[1], sum[2], sum[3]);
    return group_agree(g, st);
}

static status check_shape_of(group *g, const exchange_shape *shape, int layers, uint64_t seed)
{
    exchange *x;
    exchange_check check;
    uint64_t shared = seed, random = seed * 977 + (uint64_t)group_rank(g) + 1;
    TRY(exchange_create(g, shape, &x));
    exchange_check_open(&check, shape, 10, group_size(g));
    for (int i = 0; i < layers; i++)
        TRY(exchange_check_layer(&check, x, g, &random, &shared, maybe_sleep));
    TRY(check_returned(g, &check, x));
    if (exchange_get_stats(x)->combined_rows && shape->combine == COMBINE_FIXED && exchange_get_stats(x)->spills == 0 &&
        layers > 50)
        return status_fail(STATUS_BAD_INPUT, "no element ever left the range: the test has lost its teeth");
    exchange_check_close(&check);
    exchange_destroy(x);
    return STATUS_OK;
}

static status all_shapes(group *g, int layers, uint64_t seed)
{
    static const int ks[] = {2, 8, 1}, hiddens[] = {48, 33, 512}, rows[] = {17, 9, 40};
    int n = 0;
    for (int mode = COMBINE_EXACT; mode <= COMBINE_FAST; mode++)
        for (int format = ROWS_F32; format <= ROWS_BF16; format++)
            for (int i = 0; i < 3; i++) {
                exchange_shape shape = {.hidden = hiddens[(i + mode) % 3],
                                        .top_k = ks[i],
                                        .max_rows = rows[(i + format) % 3],
                                        .n_threads = 1 + i,
                                        .combine = (combine_mode)mode,
                                        .rows = (row_format)format,
                                        .share = 5 * i};
                TRY(check_shape_of(g, &shape, layers, seed + (uint64_t)n++));
            }
    return STATUS_OK;
}

static status forever(group *g)
{
    exchange_shape shape = {.hidden = 64, .top_k = 4, .max_rows = 16, .n_threads = 1, .combine = COMBINE_FIXED, .share = 300};
    exchange *x;
    exchange_check check;
    uint64_t shared = 1, random = (uint64_t)group_rank(g);
    TRY(exchange_create(g, &shape, &x));
    exchange_check_open(&check, &shape, 10, group_size(g));
    for (int layer = 0;; layer++) {
        TRY(exchange_check_layer(&check, x, g, &random, &shared, maybe_sleep));
        if (layer == 5)
            dprintf(STDOUT_FILENO, "running %d %d\n", group_rank(g), (int)getpid());
    }
}

static status run(group *g, int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "forever") == 0)
        return forever(g);
    if (argc > 1 && strcmp(argv[1], "roomy") == 0) {
        exchange_shape shape = {.hidden = 1024, .top_k = 2, .max_rows = 512, .n_threads = 1, .combine = COMBINE_FIXED};
        return check_shape_of(g, &shape, 1, 1);
    }
    return all_shapes(g, argc > 1 ? atoi(argv[1]) : 20, argc > 3 ? strtoull(argv[3], NULL, 10) : 1);
}

int main(int argc, char **argv)
{
    group *g = NULL;
    status st = group_create(&argc, &argv, argc > 2 ? atoi(argv[2]) : 0, &g);
    char speaker[32];
    snprintf(speaker, sizeof speaker, "rank %d", g ? group_rank(g) : -1);
    log_set_speaker(speaker);
    if (st == STATUS_OK)
        st = run(g, argc, argv);
    if (st != STATUS_OK) {
        if (st != STATUS_ELSEWHERE)
            log_line("%s", status_message());
        group_abort(g, status_exit_code(st));
    }
    if (group_rank(g) == 0)
        printf("%d ranks on %d nodes: ok\n", group_size(g), group_n_nodes(g));
    group_destroy(g);
    return 0;
}
