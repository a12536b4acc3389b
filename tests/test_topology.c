/* test_topology.c - machines on paper: what the reader refuses and how it says so, round trips, and what a byte costs. */
#include "placement/topology.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RANK(node)    "{\"node\": " node ", \"row_us\": 2.5, \"expert_us\": 0}"
#define CLASSES       "\"same_node\": {\"us\": 15, \"gb_per_s\": 5}, \"cross_node\": {\"us\": 60, \"gb_per_s\": 1}"
#define TREE(ranks)   "{\"ranks\": [" ranks "], " CLASSES ", \"row_bytes\": 5760}"
#define LINKED(links) "{\"ranks\": [" RANK("0") ", " RANK("0") "], " CLASSES ", \"row_bytes\": 5760, \"links\": " links "}"

static status parse(const char *text, topology *out)
{
    return topology_parse("machine.json", text, strlen(text), out);
}

static void good_one_is_read(void **state)
{
    (void)state;
    topology t;
    assert_int_equal(parse("{\"ranks\": [{\"node\": 1, \"expert_bytes\": 7, \"row_us\": 2, \"expert_us\": 3}, " RANK(
                               "0") ", " RANK("1") "], " CLASSES ", \"row_bytes\": 10, \"bytes_per_expert\": 4, \"more\": 1}",
                           &t),
                     STATUS_OK);
    assert_int_equal(t.n_ranks, 3);
    assert_int_equal(t.n_nodes, 2);
    assert_int_equal(t.expert_bytes[0], 7);
    assert_int_equal(t.expert_bytes[1], -1);
    assert_int_equal(t.bytes_per_expert, 4);
    assert_int_equal(t.local_index[0], 0);
    assert_int_equal(t.local_index[1], 0);
    assert_int_equal(t.local_index[2], 1);
    assert_true(t.row_us[0] == 2 && t.expert_us[0] == 3 && t.row_us[1] == 2.5 && t.expert_us[1] == 0);
    assert_int_equal(topology_link(&t, 0, 0), LINK_SAME_RANK);
    assert_int_equal(topology_link(&t, 0, 1), LINK_CROSS_NODE);
    assert_int_equal(topology_link(&t, 0, 2), LINK_SAME_NODE);
    assert_true(topology_us_per_byte(&t, 1, 1) == 0);
    assert_true(topology_us_per_byte(&t, 0, 2) == 1e-3 / 5);
    assert_true(topology_us_per_byte(&t, 0, 1) == 1e-3);
    topology_clear(&t);
    topology_clear(&t);
}

static void matrix_overrides_the_classes(void **state)
{
    (void)state;
    topology t;
    assert_int_equal(parse(LINKED("[[null, 4], [8, \"own\"]]"), &t), STATUS_OK);
    assert_true(topology_us_per_byte(&t, 0, 1) == 1e-3 / 4);
    assert_true(topology_us_per_byte(&t, 1, 0) == 1e-3 / 8);
    assert_true(topology_us_per_byte(&t, 1, 1) == 0);
    assert_int_equal(topology_link(&t, 0, 1), LINK_SAME_NODE);
    topology_clear(&t);
}

static void bad_ones_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *sentence;
    } cases[] = {
        {"[", "machine.json: not JSON"},
        {"[]", "machine.json: not a topology"},
        {"{}", "machine.json: ranks is missing"},
        {TREE(""), "machine.json: 0 ranks are outside 1 to"},
        {TREE("3"), "machine.json: rank 0 is not an object"},
        {TREE("{\"row_us\": 1, \"expert_us\": 1}"), "rank 0: node is missing"},
        {TREE(RANK("-1")), "rank 0: node is -1"},
        {TREE(RANK("0") ", " RANK("2")), "machine.json: no rank is on node 1, though one is on node 2"},
        {TREE(RANK("1")), "no rank is on node 0"},
        {TREE("{\"node\": 0, \"expert_us\": 1}"), "rank 0: row_us is missing"},
        {TREE("{\"node\": 0, \"row_us\": 0, \"expert_us\": 1}"), "rank 0: row_us is 0, outside 1e-09 to"},
        {TREE("{\"node\": 0, \"row_us\": 1, \"expert_us\": -1}"), "rank 0: expert_us is -1"},
        {TREE("{\"node\": 0, \"row_us\": 1e999, \"expert_us\": 1}"), "rank 0: row_us is inf"},
        {TREE("{\"node\": 0, \"row_us\": \"1\", \"expert_us\": 1}"), "rank 0: row_us is not a number"},
        {TREE("{\"node\": 0, \"expert_bytes\": -5, \"row_us\": 1, \"expert_us\": 1}"), "rank 0: expert_bytes is -5"},
        {"{\"ranks\": [" RANK("0") "], \"row_bytes\": 1}", "same_node is missing"},
        {"{\"ranks\": [" RANK("0") "], \"same_node\": {\"us\": 1}, \"row_bytes\": 1}", "same_node: gb_per_s is missing"},
        {"{\"ranks\": [" RANK("0") "], " CLASSES ", \"row_bytes\": 0}", "row_bytes is 0"},
        {"{\"ranks\": [" RANK("0") "], " CLASSES "}", "row_bytes is missing"},
        {LINKED("3"), "links is not a list"},
        {LINKED("[[0, 1]]"), "links has 1 rows for 2 ranks"},
        {LINKED("[[0, 1], [1]]"), "links: a row is not a list of 2 numbers"},
        {LINKED("[[0, 1], 7]"), "links: a row is not a list of 2 numbers"},
        {LINKED("[[0, 1], [0, 1]]"), "links from 1 to 0 is 0"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        topology t = {.n_ranks = -7};
        if (parse(cases[c].text, &t) != STATUS_BAD_INPUT || !strstr(status_message(), cases[c].sentence))
            fail_msg("%s: said \"%s\", not \"%s\"", cases[c].text, status_message(), cases[c].sentence);
        assert_int_equal(t.n_ranks, -7); /* untouched */
    }
}

static void assert_same(const topology *a, const topology *b)
{
    size_t n = (size_t)a->n_ranks;
    assert_int_equal(a->n_ranks, b->n_ranks);
    assert_int_equal(a->n_nodes, b->n_nodes);
    assert_memory_equal(a->node_of_rank, b->node_of_rank, n * sizeof *a->node_of_rank);
    assert_memory_equal(a->local_index, b->local_index, n * sizeof *a->local_index);
    assert_memory_equal(a->row_us, b->row_us, n * sizeof *a->row_us);
    assert_memory_equal(a->expert_us, b->expert_us, n * sizeof *a->expert_us);
    assert_memory_equal(a->expert_bytes, b->expert_bytes, n * sizeof *a->expert_bytes);
    assert_memory_equal(a->link, b->link, sizeof a->link);
    assert_true(a->row_bytes == b->row_bytes && a->bytes_per_expert == b->bytes_per_expert);
    assert_int_equal(!a->links, !b->links);
    if (a->links)
        assert_memory_equal(a->links, b->links, n * n * sizeof *a->links);
}

static void random_ones_come_back(void **state)
{
    (void)state;
    uint64_t seed = 5;
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/machine.json", folder);
    for (int round = 0; round < 40; round++) {
        topology t, back, copy;
        int n = 1 + support_below(&seed, 12);
        assert_int_equal(topology_uniform(n, 1 + support_below(&seed, n), &t), STATUS_OK);
        for (int r = 0; r < n; r++) {
            t.row_us[r] = (1 + support_below(&seed, 1000)) / 7.0;
            t.expert_us[r] = support_below(&seed, 1000) / 3.0;
            t.expert_bytes[r] = support_below(&seed, 2) ? -1 : support_below(&seed, 1 << 30);
        }
        t.row_bytes = 1 + support_below(&seed, 9999) / 3.0;
        t.bytes_per_expert = support_below(&seed, 1 << 30);
        if (round % 2) {
            t.links = calloc((size_t)n * (size_t)n, sizeof *t.links);
            assert_non_null(t.links);
            for (int i = 0; i < n * n; i++)
                t.links[i] = i % (n + 1) == 0 ? 0 : (1 + support_below(&seed, 1000)) / 9.0;
        }
        assert_int_equal(topology_write(&t, path), STATUS_OK);
        assert_int_equal(topology_read(path, &back), STATUS_OK);
        assert_same(&t, &back);
        assert_int_equal(topology_copy(&t, &copy), STATUS_OK);
        assert_same(&t, &copy);
        topology_clear(&t);
        topology_clear(&back);
        topology_clear(&copy);
    }
    support_remove(folder);
    topology t;
    assert_int_equal(topology_uniform(2, 1, &t), STATUS_OK);
    assert_int_equal(topology_write(&t, "/nowhere/machine.json"), STATUS_IO);
    assert_int_equal(topology_read("/nowhere/machine.json", &t), STATUS_IO);
    topology_clear(&t);
}

static void uniform_ranks_lie_in_equal_blocks(void **state)
{
    (void)state;
    topology t;
    for (int n = 1; n <= 9; n++)
        for (int nodes = 1; nodes <= n; nodes++) {
            int size[9] = {0};
            assert_int_equal(topology_uniform(n, nodes, &t), STATUS_OK);
            assert_int_equal(t.n_nodes, nodes);
            for (int r = 0; r < n; r++)
                assert_int_equal(t.local_index[r], size[t.node_of_rank[r]]++);
            for (int i = 0; i < nodes; i++)
                assert_in_range(size[i], n / nodes, (n + nodes - 1) / nodes);
            topology_clear(&t);
        }
    assert_int_equal(topology_uniform(0, 1, &t), STATUS_BAD_INPUT);
    assert_int_equal(topology_uniform(2, 3, &t), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "2 ranks cannot be spread over 3 nodes"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a good topology is read: nodes, budgets, what a byte costs", good_one_is_read, NULL, NULL, NULL},
        {"a matrix of links overrides the two classes; its diagonal is not looked at", matrix_overrides_the_classes, NULL, NULL,
         NULL},
        {"what is missing, negative, zero, not finite or of the wrong size is refused by name", bad_ones_are_refused, NULL, NULL,
         NULL},
        {"what is written is read back, bit for bit; a copy is the same", random_ones_come_back, NULL, NULL, NULL},
        {"uniform ranks lie on their nodes in equal blocks", uniform_ranks_lie_in_equal_blocks, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
