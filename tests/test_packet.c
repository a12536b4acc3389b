/* test_packet.c - packets against the routes they came from: nothing lost, nothing twice, the promised order. */
#include "router/packet.h"
#include "tests/support.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int n_rows, top_k, n_ranks, n_experts, drop_percent;
    route *routes;
    int16_t *exponents;
    packet_row *rows;
    packet_entry *entries;
    packet *packets;
    uint32_t *scratch;
} fixture;

/* Experts of a row are distinct, in random (weight) order; ranks are random, so replicas and crowding both happen. */
static void fill_routes(fixture *f, uint64_t *seed)
{
    for (int row = 0; row < f->n_rows; row++)
        for (int j = 0; j < f->top_k; j++) {
            route *r = &f->routes[row * f->top_k + j];
            bool taken = true;
            while (taken) {
                r->expert = (uint16_t)support_below(seed, f->n_experts);
                taken = false;
                for (int i = 0; i < j; i++)
                    taken |= f->routes[row * f->top_k + i].expert == r->expert;
            }
            r->rank = (uint16_t)support_below(seed, f->n_ranks);
            r->weight = support_gauss(seed);
        }
    for (int i = 0; i < f->n_rows * f->top_k; i++)
        if (support_below(seed, 100) < f->drop_percent)
            f->routes[i] = (route){.expert = ROUTE_NONE, .rank = 0xffff, .weight = 0};
}

static void make(fixture *f, uint64_t *seed)
{
    size_t n_routes = (size_t)f->n_rows * (size_t)f->top_k;
    f->routes = calloc(n_routes + 1, sizeof *f->routes);
    f->exponents = calloc((size_t)f->n_rows + 1, sizeof *f->exponents);
    /* exactly the promised sizes, so that the sanitizers see a write beyond them */
    f->rows = malloc(packet_max_rows(f->n_rows, f->top_k, f->n_ranks) * sizeof *f->rows);
    f->entries = malloc(packet_max_entries(f->n_rows, f->top_k) * sizeof *f->entries);
    f->packets = malloc((size_t)f->n_ranks * sizeof *f->packets);
    f->scratch = malloc((size_t)f->n_ranks * sizeof *f->scratch);
    fill_routes(f, seed);
    for (int i = 0; i < f->n_rows; i++)
        f->exponents[i] = (int16_t)(support_below(seed, 201) - 100);
}

static void drop(fixture *f)
{
    free(f->routes);
    free(f->exponents);
    free(f->rows);
    free(f->entries);
    free(f->packets);
    free(f->scratch);
}

static void build(fixture *f)
{
    packet_build(f->routes, f->exponents, f->n_rows, f->top_k, f->n_ranks, f->rows, f->entries, f->packets, f->scratch);
}

/* The record of `row` in packet p, or NULL. */
static const packet_row *find_row(const packet *p, uint32_t row)
{
    for (uint32_t i = 0; i < p->n_rows; i++)
        if (p->rows[i].row == row)
            return &p->rows[i];
    return NULL;
}

static void check_order(const fixture *f)
{
    size_t row_at = 0, entry_at = 0;
    for (int r = 0; r < f->n_ranks; r++) {
        const packet *p = &f->packets[r];
        assert_ptr_equal(p->rows, f->rows + row_at);
        assert_ptr_equal(p->entries, f->entries + entry_at);
        row_at += p->n_rows;
        entry_at += p->n_entries;
        uint32_t next = 0;
        for (uint32_t i = 0; i < p->n_rows; i++) {
            assert_true(i == 0 || p->rows[i].row > p->rows[i - 1].row);
            assert_int_equal(p->rows[i].first_entry, next);
            assert_true(p->rows[i].n_entries > 0);
            assert_int_equal(p->rows[i].exponent, f->exponents[p->rows[i].row]);
            for (uint32_t e = next + 1; e < next + p->rows[i].n_entries; e++)
                assert_true(p->entries[e].expert > p->entries[e - 1].expert);
            next += p->rows[i].n_entries;
        }
        assert_int_equal(next, p->n_entries);
    }
}

static void check_complete(const fixture *f)
{
    size_t expected = 0, present = 0;
    for (int r = 0; r < f->n_ranks; r++)
        present += f->packets[r].n_entries;
    for (int row = 0; row < f->n_rows; row++)
        for (int j = 0; j < f->top_k; j++) {
            const route *want = &f->routes[row * f->top_k + j];
            if (want->expert == ROUTE_NONE)
                continue;
            expected++;
            const packet *p = &f->packets[want->rank];
            const packet_row *record = find_row(p, (uint32_t)row);
            assert_non_null(record);
            int found = 0;
            for (int e = 0; e < record->n_entries; e++) {
                const packet_entry *entry = &p->entries[record->first_entry + (uint32_t)e];
                found += entry->expert == want->expert && memcmp(&entry->weight, &want->weight, sizeof(float)) == 0;
            }
            assert_int_equal(found, 1);
        }
    assert_int_equal(present, expected);
}

static void random_routes_arrive(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (int round = 0; round < 300; round++) {
        fixture f = {.n_rows = support_below(&seed, 40),
                     .top_k = 1 + support_below(&seed, 10),
                     .n_ranks = 1 + support_below(&seed, round % 3 == 0 ? 100 : 6),
                     .drop_percent = round % 4 == 0 ? 0 : support_below(&seed, 101)};
        f.n_experts = f.top_k + support_below(&seed, 300);
        make(&f, &seed);
        build(&f);
        check_order(&f);
        check_complete(&f);
        drop(&f);
    }
}

static void one_copy_per_destination(void **state)
{
    (void)state;
    uint64_t seed = 2;
    fixture f = {.n_rows = 17, .top_k = 8, .n_ranks = 1, .n_experts = 64};
    make(&f, &seed);
    build(&f);
    assert_int_equal(f.packets[0].n_rows, 17);
    assert_int_equal(f.packets[0].n_entries, 17 * 8);
    drop(&f);
}

static void no_rows_no_packets(void **state)
{
    (void)state;
    uint64_t seed = 3;
    fixture none = {.n_rows = 0, .top_k = 2, .n_ranks = 5, .n_experts = 8};
    fixture dropped = {.n_rows = 9, .top_k = 2, .n_ranks = 5, .n_experts = 8, .drop_percent = 100};
    fixture *cases[] = {&none, &dropped};
    for (int c = 0; c < 2; c++) {
        make(cases[c], &seed);
        build(cases[c]);
        for (int r = 0; r < 5; r++)
            assert_int_equal(cases[c]->packets[r].n_rows + cases[c]->packets[r].n_entries, 0);
        drop(cases[c]);
    }
}

static void missing_exponents_are_zero(void **state)
{
    (void)state;
    uint64_t seed = 4;
    fixture f = {.n_rows = 5, .top_k = 3, .n_ranks = 4, .n_experts = 16};
    make(&f, &seed);
    packet_build(f.routes, NULL, f.n_rows, f.top_k, f.n_ranks, f.rows, f.entries, f.packets, f.scratch);
    memset(f.exponents, 0, (size_t)f.n_rows * sizeof *f.exponents);
    check_order(&f);
    check_complete(&f);
    drop(&f);
}

static void building_twice_is_the_same(void **state)
{
    (void)state;
    uint64_t seed = 5;
    fixture f = {.n_rows = 30, .top_k = 6, .n_ranks = 7, .n_experts = 60, .drop_percent = 10};
    make(&f, &seed);
    build(&f);
    packet first[7];
    memcpy(first, f.packets, sizeof first);
    memset(f.scratch, 0xff, 7 * sizeof *f.scratch); /* whatever stood there does not matter */
    build(&f);
    for (int r = 0; r < 7; r++) {
        assert_int_equal(first[r].n_rows, f.packets[r].n_rows);
        assert_int_equal(first[r].n_entries, f.packets[r].n_entries);
    }
    check_order(&f);
    check_complete(&f);
    drop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"every route is in its destination's packet once, rows and experts rising", random_routes_arrive, NULL, NULL, NULL},
        {"a row goes to a destination once, however many experts it wants there", one_copy_per_destination, NULL, NULL, NULL},
        {"no rows, or only dropped routes: every packet is empty", no_rows_no_packets, NULL, NULL, NULL},
        {"without exponents the records say 0", missing_exponents_are_zero, NULL, NULL, NULL},
        {"building again gives the same, whatever scratch held", building_twice_is_the_same, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
