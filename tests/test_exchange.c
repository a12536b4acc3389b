/* The exchange of a job of one rank, and the group it runs in. Many ranks: mpi_exchange.c. */
#include "tests/support_exchange.h"

static group *alone;

static int start(void **state)
{
    (void)state;
    return group_create(NULL, NULL, 0, &alone) == STATUS_OK ? 0 : -1;
}

static int stop(void **state)
{
    (void)state;
    group_destroy(alone);
    return 0;
}

static void check_shape_of(exchange_shape shape, int layers)
{
    exchange *x;
    exchange_check check;
    uint64_t random = 11, shared = 12;
    assert_int_equal(exchange_create(alone, &shape, &x), STATUS_OK);
    exchange_check_open(&check, &shape, 20, 1);
    for (int i = 0; i < layers; i++)
        if (exchange_check_layer(&check, x, alone, &random, &shared, NULL) != STATUS_OK)
            fail_msg("%s", status_message());
    exchange_check_close(&check);
    exchange_destroy(x);
}

static void rows_come_home(void **state)
{
    (void)state;
    for (int mode = COMBINE_EXACT; mode <= COMBINE_FAST; mode++)
        for (int format = ROWS_F32; format <= ROWS_BF16; format++)
            for (int k = 1; k <= 8; k += 7)
                check_shape_of((exchange_shape){.hidden = 50,
                                                .top_k = k,
                                                .max_rows = 23,
                                                .n_threads = 2,
                                                .combine = (combine_mode)mode,
                                                .rows = (row_format)format,
                                                .share = k},
                               30);
}

static void more_rows_than_room(void **state)
{
    (void)state;
    exchange *x;
    route routes[3] = {0};
    exchange_shape shape = {.hidden = 8, .top_k = 1, .max_rows = 2, .n_threads = 1};
    assert_int_equal(exchange_create(alone, &shape, &x), STATUS_OK);
    assert_string_equal(exchange_name(x), "self");
    assert_int_equal(exchange_send(x, 3, routes, NULL), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "3 rows"));
    exchange_destroy(x);
}

static void impossible_shapes(void **state)
{
    (void)state;
    exchange *x = NULL;
    exchange_shape none = {.hidden = 8, .top_k = 0, .max_rows = 2, .n_threads = 1};
    exchange_shape many = {.hidden = 8, .top_k = COMBINE_MAX_K + 1, .max_rows = 2, .n_threads = 1};
    assert_int_equal(exchange_create(alone, &none, &x), STATUS_UNSUPPORTED);
    assert_int_equal(exchange_create(alone, &many, &x), STATUS_UNSUPPORTED);
    assert_null(x);
}

static void one_rank_alone(void **state)
{
    (void)state;
    const void *bytes = "message", *part;
    size_t size = 8, part_size;
    int low;
    assert_int_equal(group_rank(alone), 0);
    assert_int_equal(group_size(alone), 1);
    assert_int_equal(group_n_nodes(alone), 1);
    assert_int_equal(group_node_of_rank(alone)[0], 0);
    assert_int_equal(group_broadcast_message(alone, &bytes, &size), STATUS_OK);
    assert_string_equal(bytes, "message");
    assert_int_equal(group_gather(alone, "abc", 4, &part, &part_size), STATUS_OK);
    assert_int_equal(part_size, 4);
    assert_string_equal(part, "abc");
    assert_int_equal(group_min(alone, -7, &low), STATUS_OK);
    assert_int_equal(low, -7);
    assert_int_equal(group_barrier(alone), STATUS_OK);
    assert_int_equal(group_agree(alone, STATUS_IO), STATUS_IO);
    assert_int_equal(group_agree(alone, STATUS_OK), STATUS_OK);
    assert_true(group_shares_cores(alone, 1 << 20));
    assert_false(group_told_to_stop());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a process started without mpirun is a group of one", one_rank_alone, NULL, NULL, NULL},
        {"what comes home is the definition, in every mode, format and top-k, and the counts are the routes'", rows_come_home,
         NULL, NULL, NULL},
        {"more rows than the exchange was made for are refused", more_rows_than_room, NULL, NULL, NULL},
        {"a shape that cannot work is refused by name", impossible_shapes, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, start, stop);
}
