/* mpi_group.c - the words of a group under mpirun: mpi_group [RANKS_PER_NODE]. */
#include "proto/log.h"
#include "router/group.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPECT(condition)                                                                                                        \
    do {                                                                                                                         \
        if (!(condition))                                                                                                        \
            return status_fail(STATUS_BAD_INPUT, "mpi_group.c:%d: %s does not hold", __LINE__, #condition);                      \
    } while (0)

static void fill(char *bytes, size_t size, uint64_t seed)
{
    for (size_t i = 0; i < size; i++)
        bytes[i] = (char)(seed * 31 + i * 7 + (i >> 8));
}

static status broadcasts(group *g, const size_t *sizes, int n)
{
    static char bytes[3 << 20], want[3 << 20];
    for (int i = 0; i < n; i++) {
        fill(want, sizes[i], (uint64_t)i);
        memset(bytes, 0, sizes[i]);
        if (group_rank(g) == 0)
            memcpy(bytes, want, sizes[i]);
        TRY(group_broadcast(g, bytes, sizes[i]));
        EXPECT(memcmp(bytes, want, sizes[i]) == 0);
        const void *message = want;
        size_t size = sizes[i];
        if (group_rank(g) != 0)
            message = NULL, size = 77;
        TRY(group_broadcast_message(g, &message, &size));
        EXPECT(size == sizes[i] && message && memcmp(message, want, size) == 0);
    }
    return STATUS_OK;
}

static status gathers(group *g, const size_t *sizes, int n)
{
    static char mine[3 << 20];
    const void *parts[64];
    size_t got[64];
    for (int i = 0; i < n; i++) {
        size_t size = sizes[(i + group_rank(g)) % n];
        fill(mine, size, (uint64_t)group_rank(g));
        TRY(group_gather(g, mine, size, parts, got));
        for (int r = 0; group_rank(g) == 0 && r < group_size(g); r++) {
            size = sizes[(i + r) % n];
            fill(mine, size, (uint64_t)r);
            EXPECT(got[r] == size && memcmp(parts[r], mine, size) == 0);
        }
    }
    return STATUS_OK;
}

static status agreements(group *g, uint64_t random)
{
    for (int i = 0; i < 50; i++) {
        int low, me = group_rank(g), failing = support_below(&random, group_size(g) + 1), also = support_below(&random, 8);
        if (support_below(&random, group_size(g)) == me)
            usleep(2000);
        TRY(group_min(g, (me * 5 + i) % 7, &low));
        int want = 7;
        for (int r = 0; r < group_size(g); r++)
            want = (r * 5 + i) % 7 < want ? (r * 5 + i) % 7 : want;
        EXPECT(low == want);
        bool fails = me == failing || (me == failing + also);
        status mine = fails ? status_fail(STATUS_IO, "rank %d cannot read", me) : STATUS_OK;
        status st = group_agree(g, mine);
        EXPECT(st == (failing == group_size(g) ? STATUS_OK : me == failing ? STATUS_IO : STATUS_ELSEWHERE));
        if (me == failing)
            EXPECT(strstr(status_message(), "cannot read"));
    }
    return STATUS_OK;
}

static status places(group *g, int ranks_per_node)
{
    const int *node = group_node_of_rank(g);
    EXPECT(node[group_rank(g)] == group_node(g) && node[0] == 0);
    for (int r = 0; r < group_size(g); r++) {
        EXPECT(node[r] >= 0 && node[r] < group_n_nodes(g) && group_host(g, r)[0]);
        if (ranks_per_node && r + 1 < group_size(g))
            EXPECT((node[r] != node[r + 1]) || r / ranks_per_node == (r + 1) / ranks_per_node);
    }
    EXPECT(!ranks_per_node || group_n_nodes(g) >= (group_size(g) + ranks_per_node - 1) / ranks_per_node);
    return STATUS_OK;
}

/* Everybody to everybody, some messages each, sizes all over the place. */
static status transfers(group *g, uint64_t round)
{
    enum { EACH = 3 };
    static const size_t sizes[] = {1, 5000, (1 << 20) + 3};
    int n = group_size(g), me = group_rank(g), left = 2 * EACH * (n - 1);
    char **memory = calloc((size_t)(2 * EACH * n), sizeof *memory);
    uint64_t keys[5];
    EXPECT(memory);
    for (int r = 0; r < n; r++)
        for (int i = 0; i < EACH && r != me; i++) {
            char **in = &memory[2 * (r * EACH + i)], **out = in + 1;
            *in = calloc(sizes[i], 1);
            *out = calloc(sizes[i], 1);
            EXPECT(*in && *out);
            fill(*out, sizes[i], (uint64_t)(me * 100 + i) + round);
            TRY(group_receive(g, r, *in, sizes[i], (uint64_t)(r * EACH + i) + 1));
            TRY(group_send(g, r, *out, sizes[i], (uint64_t)(r * EACH + i) + 1));
        }
    for (int n_done; left > 0; left -= n_done) {
        TRY(group_look(g, keys, 5, &n_done));
        for (int i = 0; i < n_done; i++)
            EXPECT(keys[i] >= 1 && keys[i] <= (uint64_t)(n * EACH));
        if (n_done == 0)
            usleep(100);
    }
    for (int r = 0; r < n; r++)
        for (int i = 0; i < EACH && r != me; i++) {
            char **in = &memory[2 * (r * EACH + i)];
            fill(in[1], sizes[i], (uint64_t)(r * 100 + i) + round);
            EXPECT(memcmp(in[0], in[1], sizes[i]) == 0);
            free(in[0]);
            free(in[1]);
        }
    free(memory);
    return STATUS_OK;
}

static status run(group *g, int ranks_per_node)
{
    static const size_t sizes[] = {1, 0, 4096, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 3, (2 << 20) + 5, 0, 17};
    int n = (int)(sizeof sizes / sizeof *sizes);
    TRY(places(g, ranks_per_node));
    for (int round = 0; round < 3; round++) {
        TRY(broadcasts(g, sizes, n));
        TRY(gathers(g, sizes, n));
        TRY(agreements(g, (uint64_t)round));
        TRY(transfers(g, (uint64_t)round));
        TRY(group_barrier(g));
    }
    return STATUS_OK;
}

int main(int argc, char **argv)
{
    group *g = NULL;
    int ranks_per_node = argc > 1 ? atoi(argv[1]) : 0;
    status st = group_create(&argc, &argv, ranks_per_node, &g);
    if (st == STATUS_OK)
        st = run(g, ranks_per_node);
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
