/* test_eplb.c - DeepSeek's balancer gives what the original gives. */
#include "placement/planner/eplb.h"
#include "tests/support.h"

#include <string.h>

/* The example of the original's README: two layers of 12 experts, 16 places, 4 groups, 2 nodes, 8 ranks. */
static void published_example(void **state)
{
    (void)state;
    static const float weight[2][12] = {{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
                                        {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}};
    static const int expected[2][16] = {{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1},
                                        {7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}};
    for (int l = 0; l < 2; l++) {
        int places[16];
        assert_int_equal(eplb_layer(12, 16, 4, 2, 8, weight[l], places), STATUS_OK);
        assert_memory_equal(places, expected[l], sizeof places);
    }
}

/* As the original does where groups are no multiple of nodes: one group, one node. */
static void groups_that_do_not_divide(void **state)
{
    (void)state;
    static const float weight[6] = {5, 9, 1, 3, 7, 2};
    int global[8], fallen_back[8];
    assert_int_equal(eplb_layer(6, 8, 1, 1, 4, weight, global), STATUS_OK);
    assert_int_equal(eplb_layer(6, 8, 3, 2, 4, weight, fallen_back), STATUS_OK);
    assert_memory_equal(global, fallen_back, sizeof global);
    /* by hand: copies of 1 and 4, loads 5 | 4.5 | 4.5 | 3.5, then 3.5 | 3 | 2 | 1 onto the emptiest */
    static const int by_hand[8] = {0, 2, 1, 3, 1, 5, 4, 4};
    assert_memory_equal(global, by_hand, sizeof by_hand);
}

static void equal_loads_go_to_the_lower_index(void **state)
{
    (void)state;
    static const float weight[4] = {1, 1, 1, 1};
    static const int expected[6] = {2, 0, 0, 3, 1, 1};
    int places[6];
    assert_int_equal(eplb_layer(4, 6, 1, 1, 2, weight, places), STATUS_OK);
    assert_memory_equal(places, expected, sizeof places); /* 2 and 3 whole, 0 and 1 in halves */
}

static void numbers_that_do_not_divide(void **state)
{
    (void)state;
    static const float weight[6] = {5, 9, 1, 3, 7, 2};
    int places[16];
    assert_int_equal(eplb_layer(6, 7, 1, 1, 4, weight, places), STATUS_BAD_INPUT);
    assert_int_equal(eplb_layer(6, 4, 1, 1, 4, weight, places), STATUS_BAD_INPUT);
    assert_int_equal(eplb_layer(6, 8, 4, 2, 4, weight, places), STATUS_BAD_INPUT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"the published example, place by place", published_example, NULL, NULL, NULL},
        {"groups that are no multiple of the nodes: the global policy", groups_that_do_not_divide, NULL, NULL, NULL},
        {"equal loads go to the lower index", equal_loads_go_to_the_lower_index, NULL, NULL, NULL},
        {"numbers that do not divide are refused", numbers_that_do_not_divide, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("eplb", tests, NULL, NULL);
}
