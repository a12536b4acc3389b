/* test_probe.c - convoke-probe: what it fits is what times were made of, and under mpirun a sane topology comes out. */
#include "tests/support.h"

#include "placement/topology.h"
#include "worker/probe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- fitting ---- */

static void exact_times_give_their_constants(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 200; round++) {
        double per_row = (1 + support_below(&seed, 10000)) * 1e-2, per_touched = support_below(&seed, 10000) * 1e-1, row, touched;
        probe_sample samples[12];
        for (int i = 0; i < 12; i++) {
            double t = 1 + i % 4 * 3, r = t * (1 << i / 4);
            samples[i] = (probe_sample){.rows = r, .touched = t, .us = r * per_row + t * per_touched};
        }
        probe_fit(samples, 12, &row, &touched);
        assert_true(fabs(row - per_row) <= 1e-6 * per_row + 1e-9 * per_touched);
        assert_true(fabs(touched - per_touched) <= 1e-6 * (per_row + per_touched));
    }
}

static void noise_never_gives_a_negative_constant(void **state)
{
    (void)state;
    uint64_t seed = 4;
    for (int round = 0; round < 2000; round++) {
        probe_sample samples[6];
        double row, touched;
        for (int i = 0; i < 6; i++)
            samples[i] = (probe_sample){.rows = 1 << i, .touched = 1 + i % 2, .us = 1 + support_below(&seed, 1000)};
        probe_fit(samples, 6, &row, &touched);
        assert_true(isfinite(row) && row > 0 && isfinite(touched) && touched >= 0);
    }
}

static void no_other_constants_fit_better(void **state)
{
    (void)state;
    uint64_t seed = 6;
    for (int round = 0; round < 200; round++) {
        probe_sample samples[8];
        double row, touched, best = 0;
        for (int i = 0; i < 8; i++) {
            double t = 1 + i % 3, r = 1 << i;
            samples[i] =
                (probe_sample){.rows = r, .touched = t, .us = (5 * r + 40 * t) * (1 + 0.1 * (support_below(&seed, 7) - 3))};
        }
        probe_fit(samples, 8, &row, &touched);
        for (int nudge = -1; nudge < 4; nudge++) {
            double a = row * (nudge == 0   ? 1.01
                              : nudge == 1 ? 0.99
                                           : 1),
                   b = touched * (nudge == 2   ? 1.01
                                  : nudge == 3 ? 0.99
                                               : 1);
            double error = 0;
            for (int i = 0; i < 8; i++)
                error += pow((a * samples[i].rows + b * samples[i].touched) / samples[i].us - 1, 2);
            if (nudge < 0)
                best = error;
            assert_true(best <= error * (1 + 1e-9));
        }
    }
}

/* ---- under mpirun ---- */

static int run(int ranks, const char *program, const char *arguments, const char *folder)
{
    char command[20000], runner[4096];
    snprintf(runner, sizeof runner, "%s", support_source("tests/run_mpi.sh"));
    snprintf(command, sizeof command, "%s %d %s %s > %s/out 2> %s/err", runner, ranks, program, arguments, folder, folder);
    int rc = system(command);
    return WIFEXITED(rc) ? WEXITSTATUS(rc) : -1;
}

static bool said(const char *folder, const char *words)
{
    char path[4200], text[8192];
    snprintf(path, sizeof path, "%s/err", folder);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return strstr(text, words) != NULL;
}

static void assert_sane(const topology *t, int ranks, int per_node, int hidden)
{
    assert_int_equal(t->n_ranks, ranks);
    assert_int_equal(t->n_nodes, (ranks + per_node - 1) / per_node);
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(t->node_of_rank[r], r / per_node);
        assert_true(t->row_us[r] > 0 && t->row_us[r] < 1e5 && t->expert_us[r] >= 0 && t->expert_us[r] < 1e6);
        assert_true(t->expert_bytes[r] == -1);
    }
    for (int c = LINK_SAME_NODE; c < N_LINK_CLASSES; c++)
        assert_true(t->link[c].us >= 0 && t->link[c].us < 1e6 && t->link[c].gb_per_s > 1e-4 && t->link[c].gb_per_s < 1e4);
    assert_true(t->row_bytes == 4.0 * hidden && t->bytes_per_expert > 0);
}

static void a_sane_topology_comes_out(void **state)
{
    (void)state;
    static const int layouts[][2] = {{1, 1}, {2, 2}, {3, 2}, {4, 2}, {18, 18}}; /* the last: more ranks than experts */
    const char *folder = support_scratch();
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        char arguments[9000], path[4200];
        topology t = {0};
        snprintf(path, sizeof path, "%s/topology.json", folder);
        unlink(path);
        snprintf(arguments, sizeof arguments, "--model %s -o %s --seconds 0.05 --threads 1 --ranks-per-node %d",
                 support_data("qwen3_moe"), path, layouts[i][1]);
        if (run(layouts[i][0], support_binary("convoke-probe"), arguments, folder) != 0)
            fail_msg("convoke-probe failed on %d ranks", layouts[i][0]);
        if (topology_read(path, &t) != STATUS_OK)
            fail_msg("%s", status_message());
        assert_sane(&t, layouts[i][0], layouts[i][1], 64);
        topology_clear(&t);
    }
    support_remove(folder);
}

static void mistakes_get_a_sentence(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char arguments[9000];
    snprintf(arguments, sizeof arguments, "--model %s/nothing -o %s/t", folder, folder);
    assert_int_equal(run(2, support_binary("convoke-probe"), arguments, folder), 1);
    assert_true(said(folder, "nothing/config.json"));
    snprintf(arguments, sizeof arguments, "--model %s -o %s/no/such/folder --seconds 0.05", support_data("qwen3_moe"), folder);
    assert_int_equal(run(2, support_binary("convoke-probe"), arguments, folder), 1);
    assert_true(said(folder, "no/such/folder"));
    assert_int_equal(run(2, support_binary("convoke-probe"), "", folder), 2);
    assert_true(said(folder, "--model"));
    support_remove(folder);
}

static void the_planner_starts_it(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char arguments[9000], path[4200];
    topology t = {0};
    snprintf(path, sizeof path, "%s/topology.json", folder);
    snprintf(arguments, sizeof arguments, "probe --model %s -o %s --seconds 0.05", support_data("qwen3_moe"), path);
    assert_int_equal(run(2, support_binary("convoke-plan"), arguments, folder), 0);
    assert_int_equal(topology_read(path, &t), STATUS_OK);
    assert_int_equal(t.n_ranks, 2);
    topology_clear(&t);
    support_remove(folder);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        {"exact times give their constants", exact_times_give_their_constants, NULL, NULL, NULL},
        {"noise never gives a negative constant", noise_never_gives_a_negative_constant, NULL, NULL, NULL},
        {"no other constants fit better", no_other_constants_fit_better, NULL, NULL, NULL},
        {"under mpirun a sane topology comes out, on nodes even and uneven", a_sane_topology_comes_out, NULL, NULL, NULL},
        {"mistakes get one sentence and the right exit code", mistakes_get_a_sentence, NULL, NULL, NULL},
        {"convoke-plan probe starts it", the_planner_starts_it, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
