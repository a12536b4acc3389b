/* test_replica_split.c - rows over copies: nothing lost, the same everywhere, and how near to the best. */
#include "placement/replica_split.h"
#include "tests/support.h"
#include "tests/support_plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 12, MAX_EXPERTS = 40, MAX_COPIES = 4 * MAX_EXPERTS };

typedef struct {
    plan p;
    int n_copies;
    double row_us[MAX_RANKS], expert_us[MAX_RANKS];
    int32_t rows[MAX_EXPERTS], of_copy[MAX_COPIES];
    replica_split *split;
} instance;

/* kind 0: rows alone cost; 1: equal ranks; 2: uneven ranks. */
static void instance_make(uint64_t *seed, int n_ranks, int n_experts, int max_rows, int kind, instance *i)
{
    int nodes[MAX_RANKS];
    for (int g = 0; g < n_ranks; g++) {
        nodes[g] = support_below(seed, 3);
        i->row_us[g] = kind == 2 ? 50 + support_below(seed, 400) : 250;
        i->expert_us[g] = kind == 0 ? 0 : kind == 1 ? 1650 : support_below(seed, 3000);
    }
    for (int e = 0; e < n_experts; e++)
        i->rows[e] = support_below(seed, 4) == 0 ? 0 : support_below(seed, max_rows + 1);
    plan_shape shape = {.n_ranks = n_ranks, .n_experts = n_experts, .n_layers = 1};
    assert_int_equal(support_random_plan(seed, &shape, nodes, 0.5, &i->p), STATUS_OK);
    i->n_copies = i->p.first_copy[n_experts];
    assert_int_equal(replica_split_create(n_ranks, n_experts, i->n_copies, &i->split), STATUS_OK);
    replica_split_rows(i->split, &i->p, 0, i->row_us, i->expert_us, i->rows, i->of_copy);
}

static void instance_clear(instance *i)
{
    plan_clear(&i->p);
    replica_split_destroy(i->split);
}

static double busiest(const instance *i)
{
    return replica_split_busiest(&i->p, 0, i->row_us, i->expert_us, i->of_copy);
}

static double bound(const instance *i)
{
    double rows[MAX_EXPERTS], out;
    for (int e = 0; e < i->p.n_experts; e++)
        rows[e] = i->rows[e];
    assert_int_equal(replica_split_bound(&i->p, 0, i->row_us, i->expert_us, rows, &out), STATUS_OK);
    return out;
}

static void every_row_has_a_copy(void **state)
{
    (void)state;
    uint64_t seed = 21;
    for (int c = 0; c < 2000; c++) {
        instance i;
        int32_t again[MAX_COPIES];
        instance_make(&seed, 1 + support_below(&seed, MAX_RANKS), 1 + support_below(&seed, MAX_EXPERTS), 60, c % 3, &i);
        for (int e = 0; e < i.p.n_experts; e++) {
            int32_t sum = 0;
            for (int k = i.p.first_copy[e]; k < i.p.first_copy[e + 1]; k++) {
                assert_true(i.of_copy[k] >= 0);
                sum += i.of_copy[k];
            }
            assert_int_equal(sum, i.rows[e]);
        }
        assert_true(busiest(&i) >= bound(&i) * (1 - 1e-12));
        replica_split_rows(i.split, &i.p, 0, i.row_us, i.expert_us, i.rows, again);
        assert_memory_equal(again, i.of_copy, (size_t)i.n_copies * sizeof *again); /* scratch leaves no trace */
        instance_clear(&i);
    }
}

/* Where opening costs nothing and ranks are equal, the flow's answer rounded up to whole rows can be had. */
static void rows_alone_are_split_to_the_row(void **state)
{
    (void)state;
    uint64_t seed = 22;
    for (int c = 0; c < 2000; c++) {
        instance i;
        instance_make(&seed, 1 + support_below(&seed, MAX_RANKS), 1 + support_below(&seed, MAX_EXPERTS), 60, 0, &i);
        assert_true(busiest(&i) == ceil(bound(&i) / 250 - 1e-9) * 250);
        instance_clear(&i);
    }
}

/* Every way to cut every expert's rows. */
static void search(const instance *i, int copy, int expert, int32_t left, int32_t *of_copy, double *best)
{
    while (expert < i->p.n_experts && copy == i->p.first_copy[expert + 1]) {
        if (left > 0)
            return;
        left = ++expert < i->p.n_experts ? i->rows[expert] : 0;
    }
    if (expert == i->p.n_experts) {
        double us = replica_split_busiest(&i->p, 0, i->row_us, i->expert_us, of_copy);
        *best = us < *best ? us : *best;
        return;
    }
    bool last = copy + 1 == i->p.first_copy[expert + 1];
    for (int32_t rows = last ? left : 0; rows <= left; rows++) {
        of_copy[copy] = rows;
        search(i, copy + 1, expert, left - rows, of_copy, best);
    }
}

static void tiny_splits_are_near_the_best(void **state)
{
    (void)state;
    uint64_t seed = 23;
    double sum = 0, worst = 1, sum_bound = 0;
    int n = 600, exact = 0;
    for (int c = 0; c < n; c++) {
        instance i;
        int32_t of_copy[MAX_COPIES] = {0};
        double best = INFINITY;
        instance_make(&seed, 2 + support_below(&seed, 2), 3 + support_below(&seed, 2), 9, 1 + c % 2, &i);
        search(&i, 0, 0, i.rows[0], of_copy, &best);
        double got = busiest(&i), least = bound(&i), ratio = best > 0 ? got / best : 1;
        assert_true(got >= best * (1 - 1e-12) && least <= best * (1 + 1e-12));
        sum += ratio;
        sum_bound += best > 0 ? least / best : 1;
        worst = ratio > worst ? ratio : worst;
        exact += ratio < 1 + 1e-12;
        instance_clear(&i);
    }
    print_message("  %d of %d are the best; on average %.4f of it, at worst %.3f; the bound lies at %.3f of it\n", exact, n,
                  sum / n, worst, sum_bound / n);
    assert_true(sum / n < 1.01 && worst < 1.35 && exact * 10 > n * 9);
}

static bool near(const plan *p, int circle, int owner, int rank)
{
    return circle == 2 || (circle == 1 ? p->node_of_rank[owner] == p->node_of_rank[rank] : owner == rank);
}

/* The rule read literally: circle by circle, owner by owner, copy by copy, a row at a time. */
static void deal_by_rows(const instance *i, const int32_t *rows_of_owner, int32_t *quota)
{
    int32_t left[MAX_COPIES], wants[MAX_RANKS * MAX_EXPERTS];
    int n_ranks = i->p.n_ranks, n_experts = i->p.n_experts;
    memcpy(left, i->of_copy, sizeof left);
    memcpy(wants, rows_of_owner, (size_t)(n_ranks * n_experts) * sizeof *wants);
    memset(quota, 0, (size_t)(n_ranks * i->n_copies) * sizeof *quota);
    for (int e = 0; e < n_experts; e++)
        for (int circle = 0; circle < 3; circle++)
            for (int o = 0; o < n_ranks; o++)
                for (int c = i->p.first_copy[e]; c < i->p.first_copy[e + 1]; c++)
                    while (wants[o * n_experts + e] > 0 && left[c] > 0 && near(&i->p, circle, o, i->p.copy_ranks[c])) {
                        wants[o * n_experts + e]--;
                        left[c]--;
                        quota[o * i->n_copies + c]++;
                    }
}

static void owners_are_served_from_near(void **state)
{
    (void)state;
    uint64_t seed = 24;
    for (int c = 0; c < 500; c++) {
        static int32_t rows_of_owner[MAX_RANKS * MAX_EXPERTS], quota[MAX_RANKS * MAX_COPIES], want[MAX_RANKS * MAX_COPIES];
        instance i;
        instance_make(&seed, 1 + support_below(&seed, MAX_RANKS), 1 + support_below(&seed, MAX_EXPERTS), 60, c % 3, &i);
        memset(rows_of_owner, 0, sizeof rows_of_owner);
        for (int e = 0; e < i.p.n_experts; e++)
            for (int r = 0; r < i.rows[e]; r++)
                rows_of_owner[support_below(&seed, i.p.n_ranks) * i.p.n_experts + e]++;
        memset(quota, 0xff, sizeof quota);
        replica_split_owners(i.split, &i.p, 0, i.p.n_ranks, rows_of_owner, i.of_copy, quota);
        deal_by_rows(&i, rows_of_owner, want);
        assert_memory_equal(quota, want, (size_t)(i.p.n_ranks * i.n_copies) * sizeof *quota);
        for (int k = 0; k < i.n_copies; k++) {
            int32_t sum = 0;
            for (int o = 0; o < i.p.n_ranks; o++)
                sum += quota[o * i.n_copies + k];
            assert_int_equal(sum, i.of_copy[k]);
        }
        instance_clear(&i);
    }
}

/* The largest forced(A) / speed(A) over all sets of ranks, one by one. */
static void bound_is_the_worst_set(void **state)
{
    (void)state;
    uint64_t seed = 25;
    for (int c = 0; c < 400; c++) {
        instance i;
        double worst = 0;
        instance_make(&seed, 1 + support_below(&seed, 8), 1 + support_below(&seed, 20), 60, c % 3, &i);
        for (unsigned set = 1; set < 1u << i.p.n_ranks; set++) {
            double forced = 0, speed = 0;
            for (int g = 0; g < i.p.n_ranks; g++)
                speed += set >> g & 1 ? 1 / i.row_us[g] : 0;
            for (int e = 0; e < i.p.n_experts; e++) {
                double opening = INFINITY;
                bool inside = i.rows[e] > 0;
                for (int k = i.p.first_copy[e]; k < i.p.first_copy[e + 1]; k++) {
                    int g = i.p.copy_ranks[k];
                    inside &= set >> g & 1;
                    opening = fmin(opening, i.expert_us[g] / i.row_us[g]);
                }
                forced += inside ? i.rows[e] + opening : 0;
            }
            worst = fmax(worst, forced / speed);
        }
        assert_true(fabs(bound(&i) - worst) <= 1e-9 * worst);
        instance_clear(&i);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"every row has a copy, again the same; never quicker than the bound", every_row_has_a_copy, NULL, NULL, NULL},
        {"where only rows cost, the flow's answer is had to the row", rows_alone_are_split_to_the_row, NULL, NULL, NULL},
        {"tiny cases: near the best of all splits", tiny_splits_are_near_the_best, NULL, NULL, NULL},
        {"owners are served by their own copy, their node, the rest", owners_are_served_from_near, NULL, NULL, NULL},
        {"the bound is that of the worst set of ranks", bound_is_the_worst_set, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
