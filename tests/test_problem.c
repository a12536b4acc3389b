/* test_problem.c - what a planning problem is made of: room, shares, caps, counts; and what is refused. */
#include "placement/planner/problem.h"
#include "placement/planner/score.h"
#include "proto/json.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, EXPERTS = 12, K = 3, RANKS = 4 };

static routing_stats *count_random(uint64_t seed, int rows)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 2);
    uint16_t experts[LAYERS * K];
    routing_stats *s;
    assert_int_equal(routing_stats_create(&shape, true, &s), STATUS_OK);
    for (int r = 0; r < rows; r++) {
        support_routing_row(&seed, &shape, 10, experts, NULL);
        assert_int_equal(routing_stats_add_row(s, experts, r % 2, r % 3 == 0), STATUS_OK);
    }
    return s;
}

typedef struct {
    routing_stats *stats;
    topology topo;
    problem_request request;
} fixture;

static void open_fixture(fixture *f)
{
    *f = (fixture){.stats = count_random(7, 500)};
    assert_int_equal(topology_uniform(RANKS, 2, &f->topo), STATUS_OK);
    f->request = (problem_request){.stats = f->stats, .topology = &f->topo, .slack = -1};
}

static void close_fixture(fixture *f)
{
    routing_stats_destroy(f->stats);
    topology_clear(&f->topo);
}

static void refuse(const fixture *f, const char *word)
{
    problem *p = NULL;
    assert_int_not_equal(problem_create(&f->request, true, &p), STATUS_OK);
    assert_null(p);
    if (!strstr(status_message(), word))
        fail_msg("\"%s\" does not say \"%s\"", status_message(), word);
}

static int layer_slots(const problem *p, int l)
{
    int sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        sum += p->slots[l * p->n_ranks + g];
    return sum;
}

/* ---- counts ---- */

static void counts_are_all_slots(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    open_fixture(&f);
    assert_int_equal(problem_create(&f.request, true, &p), STATUS_OK);
    uint64_t sum[LAYERS * EXPERTS];
    routing_stats_sum_tokens(f.stats, -1, -1, sum);
    for (int l = 0; l < LAYERS; l++) {
        double rows = 0;
        for (int e = 0; e < EXPERTS; e++) {
            assert_true(p->load[problem_at(p, l, e)] == (double)sum[l * EXPERTS + e]);
            assert_true(p->same_pairs[(l * EXPERTS + e) * EXPERTS + e] == (double)sum[l * EXPERTS + e]);
            rows += (double)sum[l * EXPERTS + e];
        }
        assert_true(p->rows[l] == rows);
    }
    problem_destroy(p);
    close_fixture(&f);
}

/* ---- room ---- */

static void slots_without_budgets(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    open_fixture(&f);
    for (f.request.extra_slots = 0; f.request.extra_slots < 3; f.request.extra_slots++) {
        assert_int_equal(problem_create(&f.request, false, &p), STATUS_OK);
        for (int i = 0; i < LAYERS * RANKS; i++)
            assert_int_equal(p->slots[i], EXPERTS / RANKS + f.request.extra_slots);
        problem_destroy(p);
    }
    close_fixture(&f);
}

static void budgets_are_kept(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int trial = 0; trial < 200; trial++) {
        fixture f;
        problem *p = NULL;
        open_fixture(&f);
        f.topo.bytes_per_expert = 10;
        int64_t sum = 0;
        for (int g = 0; g < RANKS; g++) {
            int64_t holds = support_below(&seed, LAYERS * EXPERTS);
            f.topo.expert_bytes[g] = support_below(&seed, 4) ? holds * 10 + support_below(&seed, 10) : -1;
            sum += f.topo.expert_bytes[g] < 0 ? LAYERS * EXPERTS : holds;
        }
        f.request.extra_slots = support_below(&seed, 3);
        status st = problem_create(&f.request, false, &p);
        if (sum < LAYERS * EXPERTS)
            assert_int_not_equal(st, STATUS_OK);
        for (int l = 0; p && l < LAYERS; l++)
            assert_true(layer_slots(p, l) >= EXPERTS);
        for (int g = 0; p && g < RANKS; g++)
            if (f.topo.expert_bytes[g] >= 0)
                assert_true(p->total_slots[g] * 10 <= f.topo.expert_bytes[g]);
        problem_destroy(p);
        close_fixture(&f);
    }
}

static void impossible_budgets_name_what_would_do(void **state)
{
    (void)state;
    fixture f;
    open_fixture(&f);
    for (int g = 0; g < RANKS; g++)
        f.topo.expert_bytes[g] = 8 * 100;
    refuse(&f, "bytes_per_expert");
    f.topo.bytes_per_expert = 100; /* 32 of 36 experts */
    refuse(&f, "400 bytes more would do, or 900 bytes on every rank");
    close_fixture(&f);
}

/* ---- load ---- */

static void shares_follow_speed(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    open_fixture(&f);
    f.topo.row_us[1] *= 3;
    assert_int_equal(problem_create(&f.request, false, &p), STATUS_OK);
    assert_true(fabs(p->share[0] - 3 * p->share[1]) < 1e-12);
    assert_true(fabs(p->share[0] + p->share[1] + p->share[2] + p->share[3] - 1) < 1e-12);
    problem_destroy(p);
    close_fixture(&f);
}

static void slack_that_cannot_be_kept(void **state)
{
    (void)state;
    fixture f;
    problem *p = NULL;
    open_fixture(&f);
    uint16_t hot[LAYERS * K];
    for (int l = 0; l < LAYERS; l++)
        for (int j = 0; j < K; j++)
            hot[l * K + j] = j == 0 && l == 1 ? 7 : ROUTING_NO_EXPERT;
    for (int i = 0; i < 5000; i++)
        assert_int_equal(routing_stats_add_row(f.stats, hot, 0, 0), STATUS_OK);
    f.request.slack = 0.05;
    refuse(&f, "layer 3"); /* the model's number of MoE layer 1 */
    refuse(&f, "smallest slack that would do");
    double smallest = 0;
    assert_int_equal(sscanf(strstr(status_message(), "would do is ") + 12, "%lf", &smallest), 1);
    f.request.slack = smallest / 100;
    assert_int_equal(problem_create(&f.request, false, &p), STATUS_OK);
    problem_destroy(p);
    close_fixture(&f);
}

static void shapes_must_agree(void **state)
{
    (void)state;
    fixture f;
    open_fixture(&f);
    plan seed;
    plan_shape other = {.n_ranks = RANKS + 1, .n_experts = EXPERTS, .n_layers = LAYERS};
    assert_int_equal(plan_contiguous(&other, NULL, &seed), STATUS_OK);
    f.request.seed = &seed;
    refuse(&f, "seed plan");
    f.request.seed = NULL;
    f.request.extra_slots = -1;
    refuse(&f, "extra slots");
    f.request.stats = NULL;
    refuse(&f, "nothing to plan from");
    plan_clear(&seed);
    close_fixture(&f);
}

/* ---- plans ---- */

static void plans_keep_room_or_are_refused(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    open_fixture(&f);
    f.request.extra_slots = 1;
    assert_int_equal(problem_create(&f.request, false, &p), STATUS_OK);
    int home[LAYERS * EXPERTS];
    bool *holds = calloc(LAYERS * EXPERTS * RANKS, 1);
    for (int i = 0; i < LAYERS * EXPERTS; i++)
        home[i] = i % RANKS;
    holds[0 * RANKS + 3] = true; /* expert 0 of the first layer, on rank 3 too */
    plan a, b;
    assert_int_equal(problem_plan(p, "a", home, &a), STATUS_OK);
    assert_int_equal(problem_plan_replicas(p, "b", home, holds, &b), STATUS_OK);
    assert_int_equal(plan_n_copies(&b, 0, 0), 2);
    assert_int_equal(plan_copies(&b, 0, 0)[0], 0);
    assert_int_equal(plan_copies(&b, 0, 0)[1], 3);
    assert_int_equal(problem_check(p, &a, true), STATUS_OK);
    assert_int_equal(problem_check(p, &b, true), STATUS_OK);
    plan_clear(&b);
    for (int e = 0; e < 6; e++)
        home[EXPERTS + e] = 2;
    assert_int_equal(problem_plan(p, "b", home, &b), STATUS_OK);
    assert_int_not_equal(problem_check(p, &b, true), STATUS_OK);
    assert_non_null(strstr(status_message(), "rank 2 holds"));
    assert_non_null(strstr(status_message(), "layer 3"));
    plan_clear(&a);
    plan_clear(&b);
    free(holds);
    problem_destroy(p);
    close_fixture(&f);
}

/* Flow the slow way: every pair of experts, one at a time. */
static double naive_flow(const problem *p, const plan *made)
{
    double sum = 0;
    for (int l = 0; l + 1 < LAYERS; l++) {
        double far = 0, all = 0;
        for (int i = 0; i < EXPERTS; i++)
            for (int j = 0; j < EXPERTS; j++) {
                double n = p->next_pairs[(l * EXPERTS + i) * EXPERTS + j];
                int g = plan_copies(made, l, i)[0], h = plan_copies(made, l + 1, j)[0];
                all += n;
                far += g == h ? 0 : g / 2 == h / 2 ? n : 5 * n; /* two nodes of two ranks, 5 GB/s inside and 1 between */
            }
        sum += far / all;
    }
    return sum / (LAYERS - 1);
}

static void flow_is_mean_distance(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    uint64_t seed = 9;
    open_fixture(&f);
    assert_int_equal(problem_create(&f.request, true, &p), STATUS_OK);
    plan_shape shape = {.n_ranks = RANKS, .n_experts = EXPERTS, .n_layers = LAYERS};
    for (int trial = 0; trial < 20; trial++) {
        plan made;
        assert_int_equal(support_random_plan(&seed, &shape, f.topo.node_of_rank, 0, &made), STATUS_OK);
        assert_true(fabs(score_flow(p, &made) - naive_flow(p, &made)) < 1e-9);
        plan_clear(&made);
    }
    problem_destroy(p);
    close_fixture(&f);
}

/* ---- work ---- */

static void work_is_shared_out_whole(void **state)
{
    (void)state;
    fixture f;
    problem *p;
    open_fixture(&f);
    f.request.work = 1003;
    assert_int_equal(problem_create(&f.request, false, &p), STATUS_OK);
    work_budget whole = work_start(p, 5);
    int64_t sum = 0;
    for (int i = 0; i < 10; i++)
        sum += work_part(&whole, i, 10).left;
    assert_int_equal(sum, 1003);
    assert_true(work_take(&whole, 1000));
    assert_false(work_take(&whole, 4));
    assert_true(work_take(&whole, 3));
    problem_destroy(p);
    close_fixture(&f);
}

static status visit(void *arg, int i)
{
    atomic_int *seen = arg;
    atomic_fetch_add(&seen[i], 1);
    return i == 30 || i == 70 ? status_fail(STATUS_BAD_INPUT, "number %d", i) : STATUS_OK;
}

static void loops_visit_each_once(void **state)
{
    (void)state;
    for (int threads = 1; threads < 5; threads++) {
        atomic_int seen[100] = {0};
        assert_int_equal(parallel_for(threads, 100, visit, seen), STATUS_BAD_INPUT);
        assert_string_equal(status_message(), "number 30");
        for (int i = 0; i < 100; i++)
            assert_int_equal(seen[i], 1);
    }
}

/* ---- plan files ---- */

static void counts_come_back_from_a_plan_file(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[600];
    snprintf(path, sizeof path, "%s/plan.json", folder);
    plan made, again;
    plan_shape shape = {.n_ranks = 2, .n_experts = 3, .n_layers = 2};
    assert_int_equal(plan_contiguous(&shape, NULL, &made), STATUS_OK);
    cJSON *beside = NULL;
    const char *text = "{\"tokens_per_expert\": [[1, 2, 3], [4, 5, 6]], \"score\": {\"copies\": 1.5}, \"note\": \"a \\\"b\\\"\"}";
    assert_int_equal(json_parse("beside", text, strlen(text), &beside), STATUS_OK);
    assert_int_equal(plan_write_beside(&made, "m", beside, path), STATUS_OK);
    assert_int_equal(plan_read(path, NULL, &again), STATUS_OK);
    uint64_t *counts = NULL;
    assert_int_equal(plan_read_counts(path, &again, &counts), STATUS_OK);
    for (int i = 0; i < 6; i++)
        assert_int_equal(counts[i], i + 1);
    free(counts);
    counts = NULL;
    assert_int_equal(plan_write(&made, "m", path), STATUS_OK);
    assert_int_equal(plan_read_counts(path, &again, &counts), STATUS_OK);
    assert_null(counts);
    again.n_layers = 1; /* as if the file were another plan's */
    assert_int_equal(plan_write_beside(&made, "m", beside, path), STATUS_OK);
    assert_int_not_equal(plan_read_counts(path, &again, &counts), STATUS_OK);
    cJSON_Delete(beside);
    plan_clear(&made);
    plan_clear(&again);
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"counts are the sum over all domains and phases", counts_are_all_slots, NULL, NULL, NULL},
        {"without budgets every rank has ceil(E/G) slots and the extra ones", slots_without_budgets, NULL, NULL, NULL},
        {"byte budgets are kept, and every layer has room for all experts", budgets_are_kept, NULL, NULL, NULL},
        {"an impossible budget is refused with the smallest that would do", impossible_budgets_name_what_would_do, NULL, NULL,
         NULL},
        {"a slower rank's share is smaller", shares_follow_speed, NULL, NULL, NULL},
        {"slack that cannot be kept is refused, the smallest that can is named and taken", slack_that_cannot_be_kept, NULL, NULL,
         NULL},
        {"what does not fit together is refused", shapes_must_agree, NULL, NULL, NULL},
        {"a plan that does not keep the room is refused by layer and rank", plans_keep_room_or_are_refused, NULL, NULL, NULL},
        {"flow is the mean distance of a transition", flow_is_mean_distance, NULL, NULL, NULL},
        {"parts of a work budget add up to it", work_is_shared_out_whole, NULL, NULL, NULL},
        {"a parallel loop visits each once and tells the first failure", loops_visit_each_once, NULL, NULL, NULL},
        {"the counts a plan was made from come back from its file", counts_come_back_from_a_plan_file, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
