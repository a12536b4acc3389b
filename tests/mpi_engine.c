/* mpi_engine.c - the step loop over several ranks: a mix of requests gives the same answers under every setting, started under
 * mpirun by ctest.
 *
 *   mpi_engine RANKS_PER_NODE */
#include "tests/support.h"
#include "tests/support_engine.h"

#include "proto/log.h"

#include <stdio.h>
#include <stdlib.h>

enum { CANCELLED = 1 << 2 | 1 << 5 | 1 << 9 };

static const struct {
    const char *what;
    bool must_preempt, must_hit;
    mix_setting setting;
} variants[] = {
    {"chunks of 1", false, false, {.chunk = 1, .max_sequences = 8, .threads = 1}},
    {"chunks of 7, cache", false, false, {.chunk = 7, .max_sequences = 8, .threads = 2, .prefix_cache = true, .seed = 3}},
    {"few blocks", true, false, {.chunk = 16, .max_sequences = 12, .threads = 1, .kv_blocks = 6, .seed = 5}},
    {"few blocks, cache, holds",
     true,
     false,
     {.chunk = 64, .max_sequences = 12, .threads = 1, .kv_blocks = 6, .prefix_cache = true, .disturb = true, .seed = 9}},
    {"all from the cache",
     false,
     true,
     {.chunk = 64, .max_sequences = 8, .threads = 1, .kv_blocks = 120, .prefix_cache = true, .twice = true, .seed = 2}},
    {"plans change", false, false, {.chunk = 16, .max_sequences = 8, .threads = 1, .replan = true, .seed = 4}},
    {"plans change, copied weights, few blocks, cache, holds, counts",
     true,
     false,
     {.chunk = 64,
      .max_sequences = 12,
      .threads = 2,
      .kv_blocks = 6,
      .prefix_cache = true,
      .disturb = true,
      .replan = true,
      .count = true,
      .weights = WEIGHTS_COPY,
      .seed = 11}},
    {"plans change, replicas by the step's load",
     false,
     false,
     {.chunk = 16, .max_sequences = 8, .threads = 2, .replan = true, .replicas = REPLICA_STEP, .seed = 7}},
    {"owners move", false, false, {.chunk = 16, .max_sequences = 8, .threads = 1, .owners = OWNERS_AFFINITY, .seed = 8}},
    {"owners move, few blocks, cache, holds, plans change, replicas by the step's load",
     false,
     false,
     {.chunk = 64,
      .max_sequences = 12,
      .threads = 1,
      .kv_blocks = 16,
      .prefix_cache = true,
      .disturb = true,
      .replan = true,
      .replicas = REPLICA_STEP,
      .owners = OWNERS_AFFINITY,
      .seed = 12}},
    {"owners move, everything from the cache the second time",
     false,
     true,
     {.chunk = 40,
      .max_sequences = 8,
      .threads = 1,
      .kv_blocks = 120,
      .prefix_cache = true,
      .twice = true,
      .owners = OWNERS_AFFINITY,
      .seed = 13}},
    {"owners move, some are cancelled",
     false,
     false,
     {.chunk = 16, .max_sequences = 14, .threads = 1, .owners = OWNERS_AFFINITY, .cancel = CANCELLED, .seed = 14}},
    {"statistics are asked for", false, false, {.chunk = 16, .max_sequences = 8, .threads = 1, .count = true, .seed = 6}},
};

/* Links that make moving worth it, tiny as the model is: whoever is in the first half sends slowly to all but one of the second
 * half, who send quickly. */
static const char *uneven_links(int n)
{
    static char text[16384];
    size_t at = (size_t)snprintf(text, sizeof text, "{\"ranks\": [");
    for (int r = 0; r < n; r++)
        at += (size_t)snprintf(text + at, sizeof text - at,
                               "%s{\"node\": 0, \"expert_bytes\": null, \"row_us\": 1, \"expert_us\": 1}", r ? ", " : "");
    at += (size_t)snprintf(text + at, sizeof text - at,
                           "], \"same_node\": {\"us\": 1, \"gb_per_s\": 1}, \"cross_node\": {\"us\": 1, \"gb_per_s\": 1}, "
                           "\"row_bytes\": 256, \"links\": [");
    for (int from = 0; from < n; from++) {
        at += (size_t)snprintf(text + at, sizeof text - at, from ? ", [" : "[");
        for (int to = 0; to < n; to++)
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%s", to ? ", " : "",
                                   from < n / 2 && to != from + n / 2 ? "0.001" : "100");
        at += (size_t)snprintf(text + at, sizeof text - at, "]");
    }
    snprintf(text + at, sizeof text - at, "]}");
    return text;
}

static mix_answer want[MIX_REQUESTS], got[MIX_REQUESTS];

/* Prompts, and what was generated but for each request's last token, which never runs. */
static uint64_t n_positions(void)
{
    int32_t prompt[MIX_LENGTH];
    uint64_t n = 0;
    for (int i = 0; i < MIX_REQUESTS; i++)
        n += (uint64_t)(support_mix_request(i, prompt).n_prompt + (want[i].n_tokens ? want[i].n_tokens - 1 : 0));
    return n;
}

static void compare_variants(group *g)
{
    const char *dir = support_data("qwen3_moe");
    mix_counts counts;
    unsigned long long n_moved = 0; /* how many in each variant is a matter of time, too */
    support_mix_run(g, dir, &(mix_setting){.chunk = 64, .max_sequences = MIX_REQUESTS, .threads = 1}, want, &counts);
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        mix_setting setting = variants[v].setting;
        setting.topology = setting.owners == OWNERS_AFFINITY ? uneven_links(group_size(g)) : NULL;
        support_mix_run(g, dir, &setting, got, &counts);
        if (group_rank(g) != 0)
            continue;
        n_moved += counts.n_moved;
        for (int i = 0; i < MIX_REQUESTS; i++) {
            char what[80];
            snprintf(what, sizeof what, "%s: request %d", variants[v].what, i);
            support_mix_compare(&got[i], &want[i], setting.cancel >> i & 1, what);
        }
        assert_true(!variants[v].must_preempt || counts.n_preempted > 0);
        assert_true(!variants[v].must_hit || counts.prefix_hits > 0);
        assert_true(!variants[v].setting.replan || counts.plan_epoch > 3);
        assert_true(!variants[v].setting.count || counts.n_times_counted > 3);
        if (variants[v].setting.count && !variants[v].setting.prefix_cache) /* every position of every request once */
            assert_int_equal(counts.n_counted, n_positions());
    }
    if (group_rank(g) == 0)
        assert_true((n_moved > 0) == (group_size(g) > 2));
}

int main(int argc, char **argv)
{
    group *g = NULL;
    int ranks_per_node = argc > 1 ? atoi(argv[1]) : 0;
    if (group_create(&argc, &argv, ranks_per_node, &g) != STATUS_OK) {
        log_line("%s", status_message());
        return 1;
    }
    compare_variants(g);
    group_destroy(g);
    return 0;
}
