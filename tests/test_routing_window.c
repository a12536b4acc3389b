/* The window over live routing counts: bounded, whole counts, nothing counted twice or lost while statistics are out. */
#include "cluster/routing_window.h"
#include "tests/support.h"
#include "tests/support_routing.h"

#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, EXPERTS = 7, K = 2, MOST = 20000 };

static uint16_t rows[MOST][LAYERS][K]; /* every row that was ever counted */
static int n_rows;
static uint64_t seed;
static routing_window *window;

static int set_up(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 1);
    n_rows = 0;
    seed = 5;
    return routing_window_create(&shape, true, 1000, &window) == STATUS_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    routing_window_destroy(window);
    return 0;
}

/* `n` further random tokens, as a worker would send them. */
static void count(int n)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 1);
    routing_stats *s;
    bytes_writer packed = {0};
    assert_int_equal(routing_stats_create(&shape, true, &s), STATUS_OK);
    for (int i = 0; i < n; i++, n_rows++) {
        support_routing_row(&seed, &shape, 10, rows[n_rows][0], NULL);
        assert_int_equal(routing_stats_add_row(s, rows[n_rows][0], 0, i % 2), STATUS_OK);
    }
    assert_int_equal(routing_stats_pack(s, &packed), STATUS_OK);
    assert_int_equal(routing_window_add(window, packed.data, packed.size), STATUS_OK);
    bytes_clear(&packed);
    routing_stats_destroy(s);
}

/* P of the last so many rows, naively. */
static void assert_last(const uint64_t *counts, uint64_t tokens)
{
    uint64_t expected[LAYERS][EXPERTS] = {0};
    for (int r = n_rows - (int)tokens; r < n_rows; r++)
        for (int l = 0; l < LAYERS; l++)
            for (int j = 0; j < K; j++)
                if (rows[r][l][j] != ROUTING_NO_EXPERT)
                    expected[l][rows[r][l][j]]++;
    assert_memory_equal(counts, expected, sizeof expected);
}

static void assert_window(void)
{
    assert_last(routing_window_counts(window), routing_window_tokens(window));
}

static routing_stats *take(void)
{
    routing_stats *a, *b;
    assert_true(routing_window_take(window, &a, &b));
    if (a && b) {
        assert_int_equal(routing_stats_merge(a, b), STATUS_OK);
        routing_stats_destroy(b);
    }
    return a ? a : b;
}

static void holds_the_last_tokens(void **state)
{
    (void)state;
    for (int i = 0; i < 60; i++) {
        count(support_below(&seed, 90) + 1);
        assert_window();
        uint64_t n = routing_window_tokens(window);
        assert_true(n <= 1000 + 90);
        assert_true(n >= 500 || n == (uint64_t)n_rows);
        assert_int_equal(routing_window_tokens_ever(window), n_rows);
    }
}

static void what_is_taken_is_the_window(void **state)
{
    (void)state;
    count(300);
    count(350);
    uint64_t sums[LAYERS * EXPERTS];
    routing_stats *s = take(), *a, *b;
    assert_int_equal(routing_stats_tokens(s, 0, 0) + routing_stats_tokens(s, 0, 1), 650);
    routing_stats_sum_tokens(s, -1, -1, sums);
    assert_last(sums, 650);
    assert_window(); /* counts stay */
    assert_false(routing_window_take(window, &a, &b));
    count(100);
    assert_window();
    routing_window_give_back(window, s);
    s = take();
    assert_int_equal(routing_stats_tokens(s, 0, 0) + routing_stats_tokens(s, 0, 1), 750);
    assert_true(routing_stats_has_pairs(s));
    routing_window_give_back(window, s);
}

static void what_is_old_when_it_comes_back_is_forgotten(void **state)
{
    (void)state;
    count(300);
    routing_stats *s = take();
    count(600); /* the window moves on */
    count(10);
    routing_window_give_back(window, s);
    assert_int_equal(routing_window_tokens(window), 610);
    assert_window();
    s = take();
    assert_int_equal(routing_stats_tokens(s, 0, 0) + routing_stats_tokens(s, 0, 1), 610);
    routing_window_give_back(window, s);
}

static void what_does_not_come_back_is_forgotten(void **state)
{
    (void)state;
    routing_stats *a, *b;
    assert_false(routing_window_take(window, &a, &b)); /* nothing was counted */
    count(300);
    routing_stats_destroy(take());
    count(20);
    routing_window_give_back(window, NULL);
    assert_int_equal(routing_window_tokens(window), 20);
    assert_window();
}

static void damaged_counts_are_refused(void **state)
{
    (void)state;
    count(600);
    count(50);
    assert_int_equal(routing_window_add(window, "no counts", 9), STATUS_BAD_INPUT);
    assert_int_equal(routing_window_tokens(window), 600); /* the half that they may have been added to is gone */
    count(30);
    assert_int_equal(routing_window_tokens(window), 630);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(holds_the_last_tokens, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_is_taken_is_the_window, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_is_old_when_it_comes_back_is_forgotten, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_does_not_come_back_is_forgotten, set_up, tear_down),
        cmocka_unit_test_setup_teardown(damaged_counts_are_refused, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
