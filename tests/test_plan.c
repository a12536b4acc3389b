/* test_plan.c - plans: what the reader refuses and how it says so, round trips, and which copy computes a row. */
#include "placement/plan.h"
#include "tests/support.h"
#include "tests/support_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int layer_numbers[] = {1, 3, 4};
static const plan_shape shape = {
    .n_ranks = 3, .n_experts = 4, .n_layers = 3, .layer_numbers = layer_numbers, .model_name = "demo"};

/* A good plan for `shape`; tests replace one piece of it. */
#define HEAD                 "{\"format\": \"convoke-plan\", \"version\": 1, \"experts\": 4, \"ranks\": 3, \"node_of_rank\": [0, 0, 1], "
#define LAYER(number, lists) "{\"layer\": " number ", \"ranks_of_expert\": [" lists "]}"
#define GOOD_LISTS           "[0], [1, 2], [2], [2, 0, 1]"
#define LAYERS(middle)       "\"layers\": [" LAYER("1", GOOD_LISTS) ", " middle ", " LAYER("4", GOOD_LISTS) "]"
#define GOOD                 HEAD LAYERS(LAYER("3", GOOD_LISTS)) "}"

static status parse(const char *text, plan *out)
{
    return plan_parse("plan.json", text, strlen(text), &shape, out);
}

static void assert_same_plan(const plan *a, const plan *b)
{
    assert_int_equal(a->n_ranks, b->n_ranks);
    assert_int_equal(a->n_experts, b->n_experts);
    assert_int_equal(a->n_layers, b->n_layers);
    int n_lists = a->n_layers * a->n_experts;
    assert_memory_equal(a->layer_numbers, b->layer_numbers, (size_t)a->n_layers * sizeof(int));
    assert_memory_equal(a->node_of_rank, b->node_of_rank, (size_t)a->n_ranks * sizeof(int));
    assert_memory_equal(a->first_copy, b->first_copy, ((size_t)n_lists + 1) * sizeof(int));
    assert_memory_equal(a->copy_ranks, b->copy_ranks, (size_t)a->first_copy[n_lists] * sizeof(int));
    assert_string_equal(a->name, b->name);
    assert_int_equal(a->epoch, b->epoch);
}

static void good_plan_is_read(void **state)
{
    (void)state;
    plan p;
    assert_int_equal(parse(GOOD, &p), STATUS_OK);
    assert_string_equal(p.name, "plan.json");
    assert_int_equal(p.epoch, 0);
    assert_int_equal(p.layer_numbers[2], 4);
    assert_int_equal(p.node_of_rank[2], 1);
    for (int l = 0; l < 3; l++) {
        assert_int_equal(plan_n_copies(&p, l, 1), 2);
        assert_int_equal(plan_copies(&p, l, 1)[0], 1);
        assert_int_equal(plan_copies(&p, l, 3)[0], 2); /* the home is the first in the file, not the lowest */
        assert_true(plan_holds(&p, l, 1, 2));
        assert_false(plan_holds(&p, l, 1, 0));
    }
    plan_clear(&p);
    plan_clear(&p);
    assert_int_equal(plan_parse("dir/other.json", GOOD, strlen(GOOD), NULL, &p), STATUS_OK);
    assert_string_equal(p.name, "other.json");
    plan_clear(&p);
}

static void further_keys_are_passed_over(void **state)
{
    (void)state;
    plan p;
    assert_int_equal(
        parse(HEAD "\"model\": \"demo\", \"name\": \"night\\n shift\", \"epoch\": 12, \"solver\": {\"gap\": 0.1}, "
                   "\"score\": [1, 2], " LAYERS("{\"layer\": 3, \"bound\": 1.0, \"ranks_of_expert\": [" GOOD_LISTS "]}") "}",
              &p),
        STATUS_OK);
    assert_string_equal(p.name, "night? shift"); /* a log line stays one line */
    assert_int_equal(p.epoch, 12);
    plan_clear(&p);
}

static void bad_plans_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *sentence;
    } cases[] = {
        {"", "plan.json: not JSON"},
        {"[1]", "plan.json: not a plan"},
        {"{}", "plan.json: format is missing"},
        {"{\"format\": \"gguf\"}", "plan.json: not a plan: its format is \"gguf\""},
        {"{\"format\": \"convoke-plan\"}", "plan.json: version is missing"},
        {"{\"format\": \"convoke-plan\", \"version\": 2}", "plan.json: version 2 of the plan format is unknown"},
        {"{\"format\": \"convoke-plan\", \"version\": 1, \"ranks\": 4, \"experts\": 4}",
         "plan.json: a plan for 4 ranks; this job has 3"},
        {"{\"format\": \"convoke-plan\", \"version\": 1, \"ranks\": 3, \"experts\": 5}", "plan.json: a plan for 5 experts"},
        {"{\"format\": \"convoke-plan\", \"version\": 1, \"ranks\": 0, \"experts\": 4}", "plan.json: ranks is 0, outside 1 to"},
        {"{\"format\": \"convoke-plan\", \"version\": 1, \"ranks\": 1e300, \"experts\": 4}", "plan.json: ranks is 1e+300"},
        {"{\"format\": \"convoke-plan\", \"version\": 1, \"ranks\": 2.5, \"experts\": 4}", "plan.json: ranks is 2.5"},
        {HEAD "\"layers\": []}", "plan.json: layers is empty"},
        {HEAD "\"layers\": 7}", "plan.json: layers is not a list"},
        {HEAD "\"layers\": [7, 7, 7]}", "plan.json: entry 0 of layers is not an object"},
        {HEAD "\"layers\": [" LAYER("1", GOOD_LISTS) "]}", "plan.json: a plan for 1 layers of experts; the model has 3"},
        {HEAD "\"model\": \"other\", " LAYERS(LAYER("3", GOOD_LISTS)) "}", "plan.json: a plan for model other, not for demo"},
        {HEAD "\"model\": 5, " LAYERS(LAYER("3", GOOD_LISTS)) "}", "plan.json: model is not a string"},
        {HEAD "\"epoch\": -1, " LAYERS(LAYER("3", GOOD_LISTS)) "}", "plan.json: epoch is -1"},
        {HEAD LAYERS(LAYER("2", GOOD_LISTS)) "}",
         "plan.json: entry 1 of layers is layer 2, but the model's experts there are in layer 3"},
        {HEAD LAYERS(LAYER("\"3\"", GOOD_LISTS)) "}", "plan.json: entry 1 of layers: layer is not a number"},
        {HEAD LAYERS(LAYER("3", "[0], [1], [2]")) "}",
         "plan.json: entry 1 of layers: ranks_of_expert has 3 entries for 4 experts"},
        {HEAD LAYERS(LAYER("3", "[0], [1], [2], [0], [0]")) "}", "plan.json: entry 1 of layers: ranks_of_expert has 5 entries"},
        {HEAD LAYERS(LAYER("3", "[0], [1], [], [0]")) "}", "plan.json: layer 3: expert 2 is on no rank"},
        {HEAD LAYERS(LAYER("3", "[0], [1], null, [0]")) "}", "plan.json: layer 3: expert 2 has no list of ranks"},
        {HEAD LAYERS(LAYER("3", "[0], 1, [0], [0]")) "}", "plan.json: layer 3: expert 1 has no list of ranks"},
        {HEAD LAYERS(LAYER("3", "[0], [1], [2], [3]")) "}", "plan.json: layer 3: expert 3: rank 3 is outside 0 to 2"},
        {HEAD LAYERS(LAYER("3", "[-1], [1], [2], [0]")) "}", "plan.json: layer 3: expert 0: rank -1 is outside 0 to 2"},
        {HEAD LAYERS(LAYER("3", "[1e99], [1], [2], [0]")) "}", "plan.json: layer 3: expert 0: a rank is not a whole number"},
        {HEAD LAYERS(LAYER("3", "[0], [\"1\"], [2], [0]")) "}", "plan.json: layer 3: expert 1: a rank is not a whole number"},
        {HEAD LAYERS(LAYER("3", "[0], [1, 2, 1], [2], [0]")) "}", "plan.json: layer 3: expert 1 is on rank 1 twice"},
        {GOOD " {}", "plan.json: something stands behind the JSON value"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        plan p = {.n_ranks = 77};
        assert_int_not_equal(parse(cases[i].text, &p), STATUS_OK);
        if (strncmp(status_message(), cases[i].sentence, strlen(cases[i].sentence)) != 0)
            fail_msg("case %zu: \"%s\" does not begin with \"%s\"", i, status_message(), cases[i].sentence);
        assert_int_equal(p.n_ranks, 77); /* untouched */
    }
}

static void node_lists_are_checked(void **state)
{
    (void)state;
    static const char *const nodes[] = {"[0, 0]", "[0, 0, 0, 0]", "[0, -1, 0]", "[0, 0.5, 0]", "3"};
    plan p;
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        char text[1024];
        snprintf(text, sizeof text,
                 "{\"format\": \"convoke-plan\", \"version\": 1, \"experts\": 4, \"ranks\": 3, \"node_of_rank\": %s, %s}",
                 nodes[i], LAYERS(LAYER("3", GOOD_LISTS)));
        assert_int_equal(parse(text, &p), STATUS_BAD_INPUT);
        assert_non_null(strstr(status_message(), "plan.json: node_of_rank"));
    }
    const char *without =
        "{\"format\": \"convoke-plan\", \"version\": 1, \"experts\": 4, \"ranks\": 3, " LAYERS(LAYER("3", GOOD_LISTS)) "}";
    assert_int_equal(parse(without, &p), STATUS_OK);
    for (int r = 0; r < 3; r++)
        assert_int_equal(p.node_of_rank[r], 0);
    plan_clear(&p);
}

static void layers_must_rise(void **state)
{
    (void)state;
    plan p;
    const char *text = HEAD "\"layers\": [" LAYER("5", GOOD_LISTS) ", " LAYER("5", GOOD_LISTS) "]}";
    assert_int_equal(plan_parse("plan.json", text, strlen(text), NULL, &p), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "plan.json: entry 1 of layers: layer 5 does not rise above layer 5 before it");
}

static void every_cut_is_refused(void **state)
{
    (void)state;
    plan p;
    for (size_t n = 0; n < strlen(GOOD); n++) {
        char *cut = malloc(n + 1); /* its own block, so that reading on would be seen */
        memcpy(cut, GOOD, n);
        cut[n] = '\0';
        assert_int_equal(plan_parse("plan.json", cut, n, &shape, &p), STATUS_BAD_INPUT);
        free(cut);
    }
}

static void written_plans_are_read_back(void **state)
{
    (void)state;
    uint64_t seed = 1;
    const char *folder = support_scratch();
    for (int round = 0; round < 40; round++) {
        plan_shape s = {.n_ranks = 1 + support_below(&seed, 9),
                        .n_experts = 1 + support_below(&seed, 70),
                        .n_layers = 1 + support_below(&seed, 5)};
        int nodes[9];
        for (int r = 0; r < 9; r++)
            nodes[r] = r / 3;
        plan a, b;
        assert_int_equal(support_random_plan(&seed, &s, nodes, 0.3, &a), STATUS_OK);
        a.epoch = round;
        snprintf(a.name, sizeof a.name, "plan \"%d\" \xc3\xa9", round);
        char path[4200];
        snprintf(path, sizeof path, "%s/p.json", folder);
        assert_int_equal(plan_write(&a, round % 2 ? "a \"quoted\" model" : NULL, path), STATUS_OK);
        s.model_name = "a \"quoted\" model";
        assert_int_equal(plan_read(path, &s, &b), STATUS_OK);
        assert_same_plan(&a, &b);
        plan_clear(&a);
        plan_clear(&b);
    }
    support_remove(folder);
}

static void files_that_cannot_be(void **state)
{
    (void)state;
    plan p;
    assert_int_equal(plan_read("/nowhere/plan.json", NULL, &p), STATUS_IO);
    assert_int_equal(plan_contiguous(&shape, NULL, &p), STATUS_OK);
    assert_int_equal(plan_write(&p, NULL, "/nowhere/plan.json"), STATUS_IO);
    assert_non_null(strstr(status_message(), "/nowhere/plan.json: cannot be written"));
    plan_clear(&p);
}

static void contiguous_blocks_are_equal(void **state)
{
    (void)state;
    for (int n_ranks = 1; n_ranks <= 12; n_ranks++)
        for (int n_experts = 1; n_experts <= 40; n_experts++) {
            plan_shape s = {.n_ranks = n_ranks, .n_experts = n_experts, .n_layers = 2};
            plan p;
            int count[12] = {0}, last = 0;
            assert_int_equal(plan_contiguous(&s, NULL, &p), STATUS_OK);
            for (int e = 0; e < n_experts; e++) {
                assert_int_equal(plan_n_copies(&p, 1, e), 1);
                int rank = *plan_copies(&p, 1, e);
                assert_int_equal(rank, *plan_copies(&p, 0, e));
                assert_true(rank >= last && rank < n_ranks);
                last = rank;
                count[rank]++;
            }
            for (int r = 0; r < n_ranks; r++)
                assert_true(count[r] == n_experts / n_ranks || count[r] == (n_experts + n_ranks - 1) / n_ranks);
            plan_clear(&p);
        }
}

static void support_plans_are_valid(void **state)
{
    (void)state;
    uint64_t seed = 3;
    int with_replicas = 0;
    for (int round = 0; round < 100; round++) {
        plan_shape s = {.n_ranks = 1 + support_below(&seed, 8),
                        .n_experts = 1 + support_below(&seed, 40),
                        .n_layers = 1 + support_below(&seed, 4)};
        plan p;
        assert_int_equal(round % 5 ? support_random_plan(&seed, &s, NULL, 0.5, &p) : support_reversed_plan(&s, NULL, &p),
                         STATUS_OK);
        for (int l = 0; l < s.n_layers; l++)
            for (int e = 0; e < s.n_experts; e++) {
                int n = plan_n_copies(&p, l, e);
                assert_in_range(n, 1, s.n_ranks);
                with_replicas += n > 1;
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < i; j++)
                        assert_int_not_equal(plan_copies(&p, l, e)[i], plan_copies(&p, l, e)[j]);
            }
        plan_clear(&p);
    }
    assert_true(with_replicas > 100);
}

typedef void choice_check(const plan *p, int layer, int expert, int owner);

static void for_random_plans(choice_check *check)
{
    uint64_t seed = 4;
    for (int round = 0; round < 60; round++) {
        int nodes[8];
        plan_shape s = {.n_ranks = 1 + support_below(&seed, 8), .n_experts = 6, .n_layers = 2};
        for (int r = 0; r < 8; r++)
            nodes[r] = support_below(&seed, 3);
        plan p;
        assert_int_equal(support_random_plan(&seed, &s, nodes, 0.8, &p), STATUS_OK);
        for (int l = 0; l < s.n_layers; l++)
            for (int e = 0; e < s.n_experts; e++)
                for (int owner = 0; owner < s.n_ranks; owner++)
                    check(&p, l, e, owner);
        plan_clear(&p);
    }
}

/* How often each rank is chosen over `turns` consecutive turns from a start near the counter's wrap-around as well. */
static void count_choices(const plan *p, replica_choice choice, int l, int e, int owner, int turns, int *count)
{
    for (int r = 0; r < p->n_ranks; r++)
        count[r] = 0;
    for (int t = 0; t < turns; t++) {
        int rank = plan_choose(p, choice, l, e, owner, (uint32_t)t);
        assert_true(plan_holds(p, l, e, rank));
        assert_int_equal(rank, plan_choose(p, choice, l, e, owner, (uint32_t)t));
        count[rank]++;
    }
    assert_true(plan_holds(p, l, e, plan_choose(p, choice, l, e, owner, UINT32_MAX)));
}

static void check_owner_first(const plan *p, int l, int e, int owner)
{
    enum { TURNS = 24 }; /* divisible by 1, 2, 3, 4 */
    int count[8], n_near = 0, n = plan_n_copies(p, l, e);
    count_choices(p, REPLICA_OWNER_FIRST, l, e, owner, TURNS, count);
    for (int c = 0; c < n; c++)
        n_near += p->node_of_rank[plan_copies(p, l, e)[c]] == p->node_of_rank[owner];
    for (int r = 0; r < p->n_ranks; r++) {
        int want = 0;
        if (plan_holds(p, l, e, owner))
            want = r == owner ? TURNS : 0;
        else if (n_near)
            want = plan_holds(p, l, e, r) && p->node_of_rank[r] == p->node_of_rank[owner] ? TURNS / n_near : 0;
        else
            want = plan_holds(p, l, e, r) ? TURNS / n : 0;
        assert_int_equal(count[r], want);
    }
}

static void check_round_robin(const plan *p, int l, int e, int owner)
{
    enum { TURNS = 24 };
    int count[8];
    count_choices(p, REPLICA_ROUND_ROBIN, l, e, owner, TURNS, count);
    for (int r = 0; r < p->n_ranks; r++)
        assert_int_equal(count[r], plan_holds(p, l, e, r) ? TURNS / plan_n_copies(p, l, e) : 0);
}

static void owner_first(void **state)
{
    (void)state;
    for_random_plans(check_owner_first);
}

static void round_robin(void **state)
{
    (void)state;
    for_random_plans(check_round_robin);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a good plan is read; the first rank of an expert is its home", good_plan_is_read, NULL, NULL, NULL},
        {"keys the reader does not know are passed over", further_keys_are_passed_over, NULL, NULL, NULL},
        {"bad plans are refused with the right sentence, and nothing changed", bad_plans_are_refused, NULL, NULL, NULL},
        {"node_of_rank is checked; without it all ranks are on node 0", node_lists_are_checked, NULL, NULL, NULL},
        {"layer numbers rise", layers_must_rise, NULL, NULL, NULL},
        {"a plan cut off anywhere is refused", every_cut_is_refused, NULL, NULL, NULL},
        {"what is written is read back the same", written_plans_are_read_back, NULL, NULL, NULL},
        {"a file that cannot be opened or written is named", files_that_cannot_be, NULL, NULL, NULL},
        {"contiguous: rising blocks whose sizes differ by at most one", contiguous_blocks_are_equal, NULL, NULL, NULL},
        {"random and reversed test plans are valid", support_plans_are_valid, NULL, NULL, NULL},
        {"owner first: the owner's copy, else its node's in turn, else all in turn", owner_first, NULL, NULL, NULL},
        {"round robin: every copy equally often", round_robin, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
