/* test_owner_choice.c - which rank should own a sequence: rows are priced as the replay counts them, and nobody moves for
 * nothing. */
#include "tests/support.h"
#include "tests/support_plan.h"

#include "worker/owner_choice.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, EXPERTS = 12, TOP_K = 4, TOKENS = 20 };

static topology make_topology(uint64_t *seed, int ranks)
{
    topology t = {0};
    assert_int_equal(topology_uniform(ranks, 1, &t), STATUS_OK);
    int n_nodes = 1 + support_below(seed, ranks), size[16] = {0};
    t.n_nodes = n_nodes;
    for (int r = 0; r < ranks; r++) {
        t.node_of_rank[r] = r < n_nodes ? r : support_below(seed, n_nodes);
        t.local_index[r] = size[t.node_of_rank[r]]++;
    }
    return t;
}

static void fill_choices(uint64_t *seed, uint16_t *experts)
{
    for (int i = 0; i < LAYERS * TOKENS; i++)
        for (int j = 0; j < TOP_K; j++) {
            uint16_t *row = experts + i * TOP_K, e;
            bool taken;
            do {
                e = support_below(seed, 9) ? (uint16_t)support_below(seed, EXPERTS) : ROUTING_NO_EXPERT;
                taken = false;
                for (int k = 0; k < j; k++)
                    taken |= row[k] == e && e != ROUTING_NO_EXPERT;
            } while (taken);
            row[j] = e;
        }
}

/* The rows of all tokens, had `owner` owned them, by the replay's own count. */
static double replayed_us(const plan *p, const topology *topo, uint16_t *experts, int owner, double row_bytes)
{
    static const int layers[LAYERS] = {0, 1, 2};
    static const char *const domain = "any";
    int64_t first[] = {0, TOKENS};
    int domains[] = {0};
    uint8_t phase[TOKENS] = {0};
    int32_t owners[TOKENS], steps[TOKENS] = {0};
    for (int i = 0; i < TOKENS; i++)
        owners[i] = owner;
    traffic t = {.shape = {.model = "",
                           .n_experts = EXPERTS,
                           .top_k = TOP_K,
                           .n_layers = LAYERS,
                           .n_domains = 1,
                           .layer_numbers = layers,
                           .domains = &domain},
                 .n_tokens = TOKENS,
                 .n_sequences = 1,
                 .first_token = first,
                 .domain = domains,
                 .phase = phase,
                 .owner = owners,
                 .step = steps,
                 .experts = experts};
    replay_options o = {.owners = OWNER_RECORDED, .node_dedupe = true, .threads = 1};
    replay_result r;
    if (replay_run(&t, p, topo, &o, &r) != STATUS_OK)
        fail_msg("%s", status_message());
    double us = 0;
    for (int from = 0; from < topo->n_ranks; from++)
        for (int to = 0; to < topo->n_ranks; to++)
            us += (double)r.link_rows[from * topo->n_ranks + to] * row_bytes * topology_us_per_byte(topo, from, to);
    replay_result_clear(&r);
    return us;
}

static void rows_are_priced_as_the_replay_counts_them(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int round = 0; round < 60; round++) {
        int ranks = 1 + support_below(&seed, 7);
        topology topo = make_topology(&seed, ranks);
        plan_shape shape = {.n_ranks = ranks, .n_experts = EXPERTS, .n_layers = LAYERS};
        plan p = {0};
        uint16_t experts[LAYERS * TOKENS * TOP_K];
        double us[8] = {0}, row_bytes = 768;
        owner_prices *prices;
        assert_int_equal(support_random_plan(&seed, &shape, topo.node_of_rank, 0, &p), STATUS_OK);
        assert_int_equal(owner_prices_create(&topo, row_bytes, &prices), STATUS_OK);
        fill_choices(&seed, experts);
        for (int l = 0; l < LAYERS; l++)
            for (int i = 0; i < TOKENS; i++)
                owner_add_row(prices, &p, l, experts + (l * TOKENS + i) * TOP_K, TOP_K, us);
        for (int r = 0; r < ranks; r++) {
            double want = replayed_us(&p, &topo, experts, r, row_bytes);
            assert_true(fabs(us[r] - want) <= 1e-9 * (want + 1));
        }
        owner_prices_destroy(prices);
        plan_clear(&p);
        topology_clear(&topo);
    }
}

static void nobody_moves_for_nothing(void **state)
{
    (void)state;
    const double us[] = {100, 60, 60, 90}, move_us[] = {0, 50, 50, 50};
    bool room[] = {true, true, true, true};
    owner_question q = {.n_ranks = 4, .owner = 0, .us = us, .has_room = room, .move_us = move_us, .n_tokens = 32, .n_left = 100};
    assert_int_equal(owner_choose(&q), 1); /* the lower of two equals: 2 * 40 * 100 / 32 = 250 > 50 */
    q.n_left = 20;                         /* 2 * 40 * 20 / 32 = 50: not more than it costs */
    assert_int_equal(owner_choose(&q), 0);
    q.n_left = 21;
    assert_int_equal(owner_choose(&q), 1);
    room[1] = false;
    assert_int_equal(owner_choose(&q), 2);
    room[2] = false;
    assert_int_equal(owner_choose(&q), 0); /* the third would save too little */
    q.n_left = 1000000;                    /* counts as AFFINITY_PAYBACK: 2 * 10 * 256 / 32 = 160 */
    assert_int_equal(owner_choose(&q), 3);
    const double dear[] = {0, 50, 50, 161};
    q.move_us = dear;
    assert_int_equal(owner_choose(&q), 0);
    q.owner = 1; /* without room where it is, it may stay */
    assert_int_equal(owner_choose(&q), 1);
    q.n_left = 0;
    q.owner = 0;
    assert_int_equal(owner_choose(&q), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        {"rows are priced as the replay counts them, from every rank", rows_are_priced_as_the_replay_counts_them, NULL, NULL,
         NULL},
        {"nobody moves for nothing, nor where there is no room", nobody_moves_for_nothing, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
