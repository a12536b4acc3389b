/* test_assign.c - experts onto ranks by load: always valid, never worse than where it started, best possible where that can be
 * enumerated, close to the bound elsewhere. */
#include "placement/planner/assign.h"
#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ITEMS = 256, MAX_RANKS = 64 };

typedef struct {
    assign_task t;
    double load[MAX_ITEMS], share[MAX_RANKS];
    int slots[MAX_RANKS], group[MAX_ITEMS], rank[MAX_ITEMS];
} instance;

static double uniform(uint64_t *random)
{
    return (double)(support_random(random) >> 11) / (double)(1ull << 53);
}

/* Loads as routers make them: most near the mean, a few far above. */
static void fill(instance *x, int n_items, int n_ranks, bool uneven, uint64_t *random)
{
    double sum = 0;
    int room = 0;
    *x = (instance){.t = {n_items, n_ranks, x->load, x->share, x->slots, NULL}};
    for (int i = 0; i < n_items; i++)
        x->load[i] = floor(1000 * exp(0.8 * support_gauss(random)));
    for (int g = 0; g < n_ranks; g++) {
        x->share[g] = uneven ? 0.5 + uniform(random) : 1;
        x->slots[g] = (n_items + n_ranks - 1) / n_ranks + (uneven ? support_below(random, 3) - 1 : 0);
        sum += x->share[g];
        room += x->slots[g];
    }
    for (int g = 0; room < n_items; g = (g + 1) % n_ranks, room++)
        x->slots[g]++;
    for (int g = 0; g < n_ranks; g++)
        x->share[g] /= sum;
}

static void assert_valid(const instance *x)
{
    int held[MAX_RANKS] = {0};
    for (int i = 0; i < x->t.n_items; i++) {
        assert_in_range(x->rank[i], 0, x->t.n_ranks - 1);
        held[x->rank[i]]++;
        for (int j = 0; j < i && x->t.group; j++)
            assert_false(x->group[i] == x->group[j] && x->rank[i] == x->rank[j]);
    }
    for (int g = 0; g < x->t.n_ranks; g++)
        assert_true(held[g] <= x->slots[g]);
}

static double best_by_enumeration(instance *x, int item, int *held, double *load, double total)
{
    if (item == x->t.n_items) {
        double worst = 0;
        for (int g = 0; g < x->t.n_ranks; g++)
            worst = fmax(worst, load[g] / (x->share[g] * total));
        return worst;
    }
    double best = INFINITY;
    for (int g = 0; g < x->t.n_ranks; g++) {
        if (held[g] == x->slots[g])
            continue;
        held[g]++;
        load[g] += x->load[item];
        best = fmin(best, best_by_enumeration(x, item + 1, held, load, total));
        held[g]--;
        load[g] -= x->load[item];
    }
    return best;
}

static void small_cases_are_optimal(void **state)
{
    (void)state;
    uint64_t random = 3;
    int optimal = 0, n = 300;
    for (int i = 0; i < n; i++) {
        instance x;
        int held[MAX_RANKS] = {0};
        double load[MAX_RANKS] = {0}, total = 0;
        fill(&x, 2 + support_below(&random, 7), 2 + support_below(&random, 3), i % 2, &random);
        for (int e = 0; e < x.t.n_items; e++)
            total += x.load[e];
        double worst = assign_spread(&x.t, x.rank), best = best_by_enumeration(&x, 0, held, load, total);
        assert_valid(&x);
        assert_true(worst >= best * (1 - 1e-9) && assign_bound(&x.t) <= best * (1 + 1e-9));
        assert_true(worst <= best * 1.05);
        optimal += worst <= best * (1 + 1e-9);
    }
    assert_true(optimal >= n * 95 / 100);
}

static void large_cases_are_near_the_bound(void **state)
{
    (void)state;
    static const int sizes[][2] = {{32, 8}, {64, 8}, {128, 8}, {256, 8}, {256, 64}, {250, 12}};
    uint64_t random = 5;
    for (int i = 0; i < 60; i++) {
        instance x;
        fill(&x, sizes[i % 6][0], sizes[i % 6][1], i >= 30, &random);
        double worst = assign_spread(&x.t, x.rank);
        assert_valid(&x);
        assert_true(fabs(worst - assign_worst(&x.t, x.rank)) < 1e-12);
        assert_true(worst <= (i < 30 ? 1.02 : 1.05) * assign_bound(&x.t)); /* two hot items may compete for one fast rank */
    }
}

static void improving_never_harms_and_keeps_groups_apart(void **state)
{
    (void)state;
    uint64_t random = 7;
    for (int i = 0; i < 200; i++) {
        instance x;
        int n_ranks = 2 + support_below(&random, 7), n_items = n_ranks * (1 + support_below(&random, 8));
        fill(&x, n_items, n_ranks, i % 2, &random);
        if (i % 3 == 0) {
            x.t.group = x.group;
            for (int e = 0; e < n_items; e++)
                x.group[e] = e / 2;
        }
        double worst = assign_spread(&x.t, x.rank);
        if (x.t.group && worst == ASSIGN_NO_ROOM)
            continue; /* a rank with most of the room cannot hold two of a pair */
        assert_valid(&x);
        for (int k = 0; k < 20; k++) { /* exchanged at random, where the groups allow it */
            int a = support_below(&random, n_items), b = support_below(&random, n_items), keep = x.rank[a];
            x.rank[a] = x.rank[b];
            x.rank[b] = keep;
            for (int e = 0; e < n_items && x.t.group; e++)
                if ((e != a && e / 2 == a / 2 && x.rank[e] == x.rank[a]) ||
                    (e != b && e / 2 == b / 2 && x.rank[e] == x.rank[b])) {
                    keep = x.rank[a];
                    x.rank[a] = x.rank[b];
                    x.rank[b] = keep;
                    break;
                }
        }
        double before = assign_worst(&x.t, x.rank), after = assign_improve(&x.t, x.rank);
        assert_valid(&x);
        assert_true(after <= before * (1 + 1e-12));
    }
}

static void same_input_same_assignment(void **state)
{
    (void)state;
    uint64_t random = 11;
    instance x;
    int again[MAX_ITEMS];
    fill(&x, 256, 64, false, &random);
    assign_spread(&x.t, x.rank);
    memcpy(again, x.rank, sizeof again);
    assign_spread(&x.t, x.rank);
    assert_memory_equal(again, x.rank, sizeof again);
}

static void edges(void **state)
{
    (void)state;
    double load[] = {0, 0, 0}, share[] = {0.5, 0.5};
    int slots[] = {1, 1}, many[] = {100, 0}, home[3] = {-1, -1, -1};
    assert_true(assign_lpt(3, 2, load, share, slots, home) == ASSIGN_NO_ROOM);
    assert_true(assign_lpt(2, 2, load, share, slots, home) == 1); /* no load at all is even */
    assert_true(home[0] != home[1]);
    load[0] = 6;
    assert_true(assign_lpt(2, 2, load, share, slots, home) == 2);
    assert_true(assign_lpt(3, 2, load, share, many, home) == 2); /* everything where the room is */
    assert_true(home[0] == 0 && home[1] == 0 && home[2] == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"small cases: within 5 % of the best by enumeration, nearly all equal to it", small_cases_are_optimal, NULL, NULL, NULL},
        {"large cases: valid, and within 2 % of what the hottest item forces", large_cases_are_near_the_bound, NULL, NULL, NULL},
        {"improving a given assignment never harms it and keeps groups apart", improving_never_harms_and_keeps_groups_apart, NULL,
         NULL, NULL},
        {"the same input gives the same assignment", same_input_same_assignment, NULL, NULL, NULL},
        {"no room, no load, all room on one rank", edges, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("assign", tests, NULL, NULL);
}
