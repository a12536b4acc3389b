/* test_plan_diff.c - the moves from one plan to another, replayed one by one on random plans. */
#include "placement/planner/plan_diff.h"
#include "tests/support.h"
#include "tests/support_plan.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* A small world that moves are played in: who holds what. */
typedef struct {
    int n_ranks, n_lists;
    bool *holds; /* [n_lists][n_ranks] */
    int *total, *limit;
} world;

static int total_of(const plan *p, int rank)
{
    int n = 0;
    for (int i = 0; i < p->first_copy[p->n_layers * p->n_experts]; i++)
        n += p->copy_ranks[i] == rank;
    return n;
}

static world make_world(const plan *from, const plan *to, int spare)
{
    world w = {.n_ranks = from->n_ranks, .n_lists = from->n_layers * from->n_experts};
    w.holds = calloc((size_t)w.n_lists * (size_t)w.n_ranks, sizeof *w.holds);
    w.total = calloc((size_t)w.n_ranks, sizeof *w.total);
    w.limit = calloc((size_t)w.n_ranks, sizeof *w.limit);
    for (int list = 0; list < w.n_lists; list++)
        for (int c = from->first_copy[list]; c < from->first_copy[list + 1]; c++)
            w.holds[list * w.n_ranks + from->copy_ranks[c]] = true;
    for (int r = 0; r < w.n_ranks; r++) {
        w.total[r] = total_of(from, r);
        w.limit[r] = (total_of(to, r) > w.total[r] ? total_of(to, r) : w.total[r]) + spare;
    }
    return w;
}

static void free_world(world *w)
{
    free(w->holds);
    free(w->total);
    free(w->limit);
}

static void play(world *w, const plan_move *m, int n_experts)
{
    bool *holds = w->holds + (m->layer * n_experts + m->expert) * w->n_ranks;
    int n_copies = 0;
    assert_true(holds[m->from]);
    if (m->to < 0) {
        holds[m->from] = false;
        w->total[m->from]--;
    } else {
        assert_false(holds[m->to]);
        holds[m->to] = true;
        w->total[m->to]++;
        assert_true(w->total[m->to] <= w->limit[m->to]);
    }
    for (int r = 0; r < w->n_ranks; r++)
        n_copies += holds[r];
    assert_true(n_copies >= 1);
}

static void check_end(const world *w, const plan *to)
{
    for (int l = 0; l < to->n_layers; l++)
        for (int e = 0; e < to->n_experts; e++)
            for (int r = 0; r < w->n_ranks; r++)
                assert_int_equal(w->holds[(l * to->n_experts + e) * w->n_ranks + r], plan_holds(to, l, e, r));
}

static void check_diff(const plan *from, const plan *to, const topology *t, plan_difference *d)
{
    assert_int_equal(plan_diff(from, to, t, d), STATUS_OK);
    world w = make_world(from, to, d->spare_slots);
    int copied = 0;
    for (int i = 0; i < d->n_moves; i++) {
        play(&w, &d->moves[i], from->n_experts);
        copied += d->moves[i].to >= 0;
    }
    check_end(&w, to);
    assert_int_equal(copied, d->n_copied);
    assert_int_equal(d->n_moves, d->n_copied + d->n_dropped);
    assert_true(d->spare_slots <= 1);
    free_world(&w);
}

static int random_nodes(uint64_t *seed, int n_ranks, int *nodes)
{
    int n = 1 + support_below(seed, n_ranks);
    for (int r = 0; r < n_ranks; r++)
        nodes[r] = r * n / n_ranks;
    return n;
}

static void random_plans_arrive(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int round = 0; round < 400; round++) {
        int nodes[12];
        plan_shape shape = {.n_ranks = 1 + support_below(&seed, 12),
                            .n_experts = 1 + support_below(&seed, 16),
                            .n_layers = 1 + support_below(&seed, 5)};
        random_nodes(&seed, shape.n_ranks, nodes);
        plan from, to;
        plan_difference d;
        double shares[] = {0, 0.2, 0.9};
        assert_int_equal(support_random_plan(&seed, &shape, nodes, shares[support_below(&seed, 3)], &from), STATUS_OK);
        assert_int_equal(support_random_plan(&seed, &shape, nodes, shares[support_below(&seed, 3)], &to), STATUS_OK);
        check_diff(&from, &to, NULL, &d);
        plan_diff_clear(&d);
        plan_clear(&from);
        plan_clear(&to);
    }
}

/* Plans whose ranks hold as many experts each, as solvers make them: the hard case for memory. */
static void shuffle_homes(uint64_t *seed, plan *p)
{
    for (int l = 0; l < p->n_layers; l++)
        for (int e = p->n_experts - 1; e > 0; e--) {
            int *ranks = p->copy_ranks + p->first_copy[l * p->n_experts], other = support_below(seed, e + 1), rank = ranks[e];
            ranks[e] = ranks[other];
            ranks[other] = rank;
        }
}

static void full_ranks_swap_through_one_spare_slot(void **state)
{
    (void)state;
    uint64_t seed = 6;
    int with_spare = 0;
    for (int round = 0; round < 60; round++) {
        plan_shape shape = {.n_ranks = 2 + support_below(&seed, 7), .n_layers = 1 + support_below(&seed, 12)};
        shape.n_experts = shape.n_ranks * (1 + support_below(&seed, 6));
        plan from, to;
        plan_difference d;
        assert_int_equal(plan_contiguous(&shape, NULL, &from), STATUS_OK);
        assert_int_equal(plan_contiguous(&shape, NULL, &to), STATUS_OK);
        shuffle_homes(&seed, &to);
        check_diff(&from, &to, NULL, &d);
        assert_int_equal(d.n_copied > 0, d.spare_slots == 1); /* nobody has room, and nothing can go first */
        with_spare += d.spare_slots;
        plan_diff_clear(&d);
        plan_clear(&from);
        plan_clear(&to);
    }
    assert_true(with_spare > 30);
}

static void replicas_make_room_by_leaving(void **state)
{
    (void)state;
    /* two ranks swap experts 0 and 1; rank 0 also holds a replica that goes: no spare slot is needed */
    static const char from_text[] = "{\"format\": \"convoke-plan\", \"version\": 1, \"experts\": 3, \"ranks\": 2, \"layers\": "
                                    "[{\"layer\": 0, \"ranks_of_expert\": [[0], [1], [1, 0]]}]}";
    static const char to_text[] = "{\"format\": \"convoke-plan\", \"version\": 1, \"experts\": 3, \"ranks\": 2, \"layers\": "
                                  "[{\"layer\": 0, \"ranks_of_expert\": [[1], [0], [1]]}]}";
    plan from, to;
    plan_difference d;
    assert_int_equal(plan_parse("from", from_text, strlen(from_text), NULL, &from), STATUS_OK);
    assert_int_equal(plan_parse("to", to_text, strlen(to_text), NULL, &to), STATUS_OK);
    check_diff(&from, &to, NULL, &d);
    assert_int_equal(d.spare_slots, 0);
    assert_int_equal(d.n_copied, 2);
    assert_int_equal(d.n_dropped, 3);
    plan_diff_clear(&d);
    plan_clear(&from);
    plan_clear(&to);
}

static void same_plan_needs_no_move(void **state)
{
    (void)state;
    uint64_t seed = 7;
    plan_shape shape = {.n_ranks = 5, .n_experts = 9, .n_layers = 3};
    plan p;
    plan_difference d;
    assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.5, &p), STATUS_OK);
    assert_int_equal(plan_diff(&p, &p, NULL, &d), STATUS_OK);
    assert_int_equal(d.n_moves, 0);
    assert_int_equal(d.spare_slots, 0);
    plan_diff_clear(&d);
    plan_clear(&p);
}

static topology make_topology(int n_ranks, int *nodes, int *local, double *row_us, double *expert_us, int64_t *expert_bytes)
{
    topology t = {.n_ranks = n_ranks, .row_bytes = 100, .bytes_per_expert = 1000000};
    t.link[LINK_SAME_NODE] = (link_cost){1, 10};
    t.link[LINK_CROSS_NODE] = (link_cost){2, 1};
    for (int r = 0; r < n_ranks; r++) {
        row_us[r] = expert_us[r] = 1;
        expert_bytes[r] = -1;
        local[r] = r;
    }
    t.node_of_rank = nodes;
    t.local_index = local;
    t.row_us = row_us;
    t.expert_us = expert_us;
    t.expert_bytes = expert_bytes;
    return t;
}

/* Seconds and bytes added up again from the moves, and every source is the nearest rank that holds the expert then. */
static void prices_are_those_of_the_links(void **state)
{
    (void)state;
    uint64_t seed = 8;
    for (int round = 0; round < 50; round++) {
        int nodes[8], local[8];
        double row_us[8], expert_us[8], out[8] = {0}, in[8] = {0}, worst = 0;
        int64_t expert_bytes[8], bytes = 0;
        plan_shape shape = {.n_ranks = 2 + support_below(&seed, 7), .n_experts = 8, .n_layers = 3};
        int n_nodes = random_nodes(&seed, shape.n_ranks, nodes);
        topology t = make_topology(shape.n_ranks, nodes, local, row_us, expert_us, expert_bytes);
        t.n_nodes = n_nodes;
        plan from, to;
        plan_difference d;
        assert_int_equal(support_random_plan(&seed, &shape, nodes, 0.5, &from), STATUS_OK);
        assert_int_equal(support_random_plan(&seed, &shape, nodes, 0.5, &to), STATUS_OK);
        check_diff(&from, &to, &t, &d);
        world w = make_world(&from, &to, d.spare_slots);
        for (int i = 0; i < d.n_moves; i++) {
            const plan_move *m = &d.moves[i];
            for (int r = 0; m->to >= 0 && r < w.n_ranks; r++)
                if (w.holds[(m->layer * 8 + m->expert) * w.n_ranks + r]) {
                    double ahead = topology_us_per_byte(&t, m->from, m->to) - topology_us_per_byte(&t, r, m->to);
                    assert_true(ahead < 0 || (ahead == 0 && m->from <= r));
                }
            if (m->to >= 0) {
                double us = 1e6 * topology_us_per_byte(&t, m->from, m->to);
                out[m->from] += us;
                in[m->to] += us;
                bytes += 1000000;
            }
            play(&w, m, 8);
        }
        for (int r = 0; r < w.n_ranks; r++) {
            worst = fmax(worst, fmax(out[r], in[r]));
            bytes -= d.rank_bytes[r];
        }
        assert_int_equal(bytes, 0);
        assert_true(fabs(d.seconds - worst * 1e-6) < 1e-9);
        free_world(&w);
        plan_diff_clear(&d);
        plan_clear(&from);
        plan_clear(&to);
    }
}

static void other_shapes_are_refused(void **state)
{
    (void)state;
    plan_shape shapes[4] = {{.n_ranks = 4, .n_experts = 8, .n_layers = 2}};
    const int layers[] = {1, 2};
    for (int i = 1; i < 4; i++)
        shapes[i] = shapes[0];
    shapes[1].n_ranks = 3;
    shapes[2].n_experts = 7;
    shapes[3].layer_numbers = layers;
    plan a, b;
    plan_difference d;
    assert_int_equal(plan_contiguous(&shapes[0], NULL, &a), STATUS_OK);
    for (int i = 1; i < 4; i++) {
        assert_int_equal(plan_contiguous(&shapes[i], NULL, &b), STATUS_OK);
        assert_int_equal(plan_diff(&a, &b, NULL, &d), STATUS_BAD_INPUT);
        plan_clear(&b);
    }
    plan_clear(&a);
}

static void break_even_is_time_over_gain(void **state)
{
    (void)state;
    assert_true(plan_diff_break_even(2, 4) == 500000);
    assert_true(plan_diff_break_even(2, 0) == HUGE_VAL);
    assert_true(plan_diff_break_even(2, -1) == HUGE_VAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"moves lead from any plan to any other, within memory, no expert ever lost", random_plans_arrive, NULL, NULL, NULL},
        {"ranks that are full swap through one spare slot", full_ranks_swap_through_one_spare_slot, NULL, NULL, NULL},
        {"copies that leave make the room", replicas_make_room_by_leaving, NULL, NULL, NULL},
        {"the same plan needs no move", same_plan_needs_no_move, NULL, NULL, NULL},
        {"bytes and seconds are those of the links, sources the nearest", prices_are_those_of_the_links, NULL, NULL, NULL},
        {"plans of different shapes are refused", other_shapes_are_refused, NULL, NULL, NULL},
        {"a move has paid after its time over the gain", break_even_is_time_over_gain, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
