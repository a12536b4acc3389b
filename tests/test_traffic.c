/* test_traffic.c - from a trace to sequences in file order and tokens in order of position: nothing lost, parts as asked for. */
#include "placement/traffic.h"
#include "tests/support.h"
#include "tests/support_routing.h"
#include "tests/support_traffic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char folder[4096], path[4200];

static int enter(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "%s", support_scratch());
    snprintf(path, sizeof path, "%s/trace.safetensors", folder);
    return 0;
}

static int leave(void **state)
{
    (void)state;
    support_remove(folder);
    return 0;
}

static status load(const traffic *written, const traffic_part *part, traffic *out)
{
    routing_trace *trace;
    assert_int_equal(support_write_traffic(written, path), STATUS_OK);
    assert_int_equal(routing_trace_open(path, &trace), STATUS_OK);
    status st = traffic_load(trace, part, out);
    routing_trace_close(trace);
    return st;
}

static void assert_same_token(const traffic *a, int64_t i, const traffic *b, int64_t j)
{
    for (int l = 0; l < a->shape.n_layers; l++)
        assert_memory_equal(traffic_experts(a, l, i), traffic_experts(b, l, j), (size_t)a->shape.top_k * sizeof(uint16_t));
    assert_int_equal(a->phase[i], b->phase[j]);
    assert_int_equal(a->row[i], b->row[j]);
    assert_int_equal(!a->owner, !b->owner);
    if (a->owner) {
        assert_int_equal(a->owner[i], b->owner[j]);
        assert_int_equal(a->step[i], b->step[j]);
    }
}

static void whole_traces_come_back(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (int round = 0; round < 20; round++) {
        routing_shape shape = support_routing_shape(1 + round % 4, 5 + 100 * (round % 4), 1 + round % 5, 3);
        traffic want, got;
        assert_int_equal(support_random_traffic(&seed, &shape, 1 + support_below(&seed, 30), 12, 20, round % 2 ? 3 : 0, &want),
                         STATUS_OK);
        assert_int_equal(load(&want, NULL, &got), STATUS_OK);
        assert_int_equal(got.n_tokens, want.n_tokens);
        assert_int_equal(got.n_sequences, want.n_sequences);
        assert_memory_equal(got.first_token, want.first_token, ((size_t)want.n_sequences + 1) * sizeof *want.first_token);
        assert_memory_equal(got.domain, want.domain, (size_t)want.n_sequences * sizeof *want.domain);
        for (int64_t i = 0; i < want.n_tokens; i++)
            assert_same_token(&want, i, &got, i);
        traffic_clear(&want);
        traffic_clear(&got);
        traffic_clear(&got);
    }
}

/* The plain definition: go through all sequences, keep what is asked for, in order. */
static void assert_part(const traffic *all, const traffic_part *part, const traffic *got)
{
    int64_t at = 0;
    int matching = 0, s = 0, wanted = 0;
    int *matches = calloc((size_t)all->n_sequences, sizeof *matches);
    assert_non_null(matches);
    for (int q = 0; q < all->n_sequences; q++) {
        bool any = false;
        for (int64_t i = all->first_token[q]; i < all->first_token[q + 1]; i++)
            any |= part->phase == TRAFFIC_ALL || (part->phase == TRAFFIC_DECODE) == (all->phase[i] == PHASE_DECODE);
        if (any && (!part->domains || part->domains[all->domain[q]]))
            matches[matching++] = q;
    }
    for (int m = 0; m < matching; m++) {
        double first = part->from * matching, last = part->to == 0 ? matching : part->to * matching;
        if (m < first - 0.5 || m + 0.5 >= last)
            continue;
        wanted++;
        assert_true(s < got->n_sequences);
        assert_int_equal(got->domain[s], all->domain[matches[m]]);
        assert_int_equal(got->first_token[s++], at);
        for (int64_t i = all->first_token[matches[m]]; i < all->first_token[matches[m] + 1]; i++)
            if (part->phase == TRAFFIC_ALL || (part->phase == TRAFFIC_DECODE) == (all->phase[i] == PHASE_DECODE))
                assert_same_token(all, i, got, at++);
    }
    assert_int_equal(got->n_sequences, wanted);
    assert_int_equal(got->n_tokens, at);
    assert_int_equal(got->first_token[got->n_sequences], at);
    free(matches);
}

static void parts_are_what_was_asked_for(void **state)
{
    (void)state;
    uint64_t seed = 2;
    routing_shape shape = support_routing_shape(2, 9, 3, 4);
    const bool domains[] = {true, false, true, false};
    traffic all, got;
    for (int round = 0; round < 12; round++) {
        assert_int_equal(support_random_traffic(&seed, &shape, 30 + support_below(&seed, 30), 9, 0, 2, &all), STATUS_OK);
        traffic_part part = {.domains = round % 2 ? domains : NULL, .phase = round % 3};
        int64_t n_tokens = 0, n_whole;
        assert_int_equal(load(&all, &part, &got), STATUS_OK);
        assert_part(&all, &part, &got);
        n_whole = got.n_tokens;
        traffic_clear(&got);
        for (int fold = 0; fold < 5; fold++) {
            part.from = fold / 5.0;
            part.to = (fold + 1) / 5.0;
            assert_int_equal(load(&all, &part, &got), STATUS_OK);
            assert_part(&all, &part, &got);
            n_tokens += got.n_tokens;
            traffic_clear(&got);
        }
        assert_int_equal(n_tokens, n_whole); /* the folds are disjoint and complete */
        traffic_clear(&all);
    }
}

static void counts_are_the_choices(void **state)
{
    (void)state;
    uint64_t seed = 3;
    routing_shape shape = support_routing_shape(3, 7, 4, 1);
    traffic t;
    uint64_t counts[3 * 7], want[3 * 7] = {0};
    assert_int_equal(support_random_traffic(&seed, &shape, 20, 20, 30, 0, &t), STATUS_OK);
    for (int l = 0; l < 3; l++)
        for (int64_t i = 0; i < t.n_tokens; i++)
            for (int j = 0; j < 4; j++)
                if (traffic_experts(&t, l, i)[j] != ROUTING_NO_EXPERT)
                    want[l * 7 + traffic_experts(&t, l, i)[j]]++;
    memset(counts, 0xff, sizeof counts);
    traffic_count(&t, counts);
    assert_memory_equal(counts, want, sizeof want);
    traffic_clear(&t);
}

static void what_cannot_be_is_refused(void **state)
{
    (void)state;
    uint64_t seed = 4;
    routing_shape shape = support_routing_shape(2, 7, 2, 2);
    traffic t, got = {.n_tokens = -7};
    const bool none[2] = {false, false};
    assert_int_equal(support_random_traffic(&seed, &shape, 5, 3, 0, 1, &t), STATUS_OK);
    assert_int_equal(load(&t, &(traffic_part){.domains = none}, &got), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "trace.safetensors: none of its"));
    assert_int_equal(load(&t, &(traffic_part){.phase = 3}, &got), STATUS_BAD_INPUT);
    assert_int_equal(load(&t, &(traffic_part){.from = 0.5, .to = 0.2}, &got), STATUS_BAD_INPUT);
    assert_int_equal(load(&t, &(traffic_part){.from = 0, .to = 1.5}, &got), STATUS_BAD_INPUT);
    assert_int_equal(load(&t, &(traffic_part){.from = 0.01, .to = 0.02}, &got), STATUS_BAD_INPUT);
    t.step[2] = -3;
    assert_int_equal(load(&t, NULL, &got), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "step is -3"));
    assert_int_equal(got.n_tokens, -7); /* untouched */
    traffic_clear(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a whole trace comes back: sequences by first row, tokens by position, owners and steps", whole_traces_come_back, NULL,
         NULL, NULL},
        {"domains, phase and share choose what they say; folds side by side are disjoint and complete",
         parts_are_what_was_asked_for, NULL, NULL, NULL},
        {"counts are the choices that were not dropped", counts_are_the_choices, NULL, NULL, NULL},
        {"an empty part, a part that cannot be and a negative step are refused, and nothing changed", what_cannot_be_is_refused,
         NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
