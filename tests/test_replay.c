/* test_replay.c - what a plan costs: the same numbers as an independent program, and what must hold whatever they are. */
#include "placement/replay.h"
#include "proto/json.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"
#include "tests/support_traffic.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    traffic t;
    plan p;
    topology topo;
    replay_options options;
} instance;

static void instance_make(uint64_t *seed, int number, double replica_share, instance *out)
{
    int n_experts = 1 + support_below(seed, number % 5 == 0 ? 300 : 24);
    int n_ranks = number % 7 == 6 ? 13 + support_below(seed, 20) : 1 + support_below(seed, 8);
    int top_k = 1 + support_below(seed, n_experts < 6 ? n_experts : 6), places = 1 + support_below(seed, 12);
    bool affinity = number % 3 == 1;
    routing_shape shape = support_routing_shape(1 + support_below(seed, 3), n_experts, top_k, 2);
    assert_int_equal(support_random_traffic(seed, &shape, places + support_below(seed, 9), affinity ? 90 : 25,
                                            support_below(seed, 2) * 30, n_ranks, &out->t),
                     STATUS_OK);
    plan_shape want = {
        .n_ranks = n_ranks, .n_experts = n_experts, .n_layers = shape.n_layers, .layer_numbers = shape.layer_numbers};
    assert_int_equal(support_random_plan(seed, &want, NULL, replica_share, &out->p), STATUS_OK);
    assert_int_equal(support_random_topology(seed, n_ranks, &out->topo), STATUS_OK);
    out->options = (replay_options){.concurrency = places,
                                    .owners = affinity          ? OWNER_AFFINITY
                                              : number % 6 == 3 ? OWNER_RECORDED
                                                                : OWNER_ROUND_ROBIN,
                                    .replicas = number % 2 ? REPLICAS_BY_STEP : REPLICAS_BY_SHARE,
                                    .node_dedupe = number % 4 >= 2,
                                    .threads = 1};
}

static void instance_clear(instance *i)
{
    traffic_clear(&i->t);
    plan_clear(&i->p);
    topology_clear(&i->topo);
}

static void run(const instance *i, replay_result *out)
{
    if (replay_run(&i->t, &i->p, &i->topo, &i->options, out) != STATUS_OK)
        fail_msg("%s", status_message());
}

/* ---- against the reference ---- */

enum { CASES = 60 };

static void write_case(const instance *i, const char *folder, int number, FILE *batch)
{
    static const char *const owners[] = {"round-robin", "affinity", "recorded"};
    char plan_path[4200], trace_path[4200], topology_path[4200];
    snprintf(plan_path, sizeof plan_path, "%s/plan-%d.json", folder, number);
    snprintf(trace_path, sizeof trace_path, "%s/trace-%d.safetensors", folder, number);
    snprintf(topology_path, sizeof topology_path, "%s/topology-%d.json", folder, number);
    assert_int_equal(plan_write(&i->p, NULL, plan_path), STATUS_OK);
    assert_int_equal(support_write_traffic(&i->t, trace_path), STATUS_OK);
    assert_int_equal(topology_write(&i->topo, topology_path), STATUS_OK);
    fprintf(batch,
            "%s[\"--plan\", \"%s\", \"--trace\", \"%s\", \"--topology\", \"%s\", \"--concurrency\", \"%d\", \"--owner\", \"%s\", "
            "\"--replica-choice\", \"%s\"%s]",
            number ? ",\n" : "[", plan_path, trace_path, topology_path, i->options.concurrency, owners[i->options.owners],
            i->options.replicas == REPLICAS_BY_STEP ? "step" : "share", i->options.node_dedupe ? ", \"--node-dedupe\"" : "");
}

static cJSON *run_reference(const char *batch_path)
{
    char command[9000];
    const char *python = getenv("CONVOKE_PYTHON");
    snprintf(command, sizeof command, "'%s' '%s' --batch '%s'", python ? python : "python3",
             support_source("tests/replay_reference.py"), batch_path);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    char *text = NULL;
    size_t room = 0;
    ssize_t size = getdelim(&text, &room, '\0', pipe);
    assert_int_equal(pclose(pipe), 0);
    assert_true(size > 0);
    cJSON *tree;
    assert_int_equal(json_parse("reference", text, (size_t)size, &tree), STATUS_OK);
    free(text);
    return tree;
}

static void same_number(int number, const char *key, double want, double got)
{
    if (!(fabs(want - got) <= 1e-9 * fabs(want)))
        fail_msg("case %d: %s is %.17g, the reference says %.17g", number, key, got, want);
}

static void same_value(int number, const cJSON *want, const char *key, double got)
{
    const cJSON *item = json_find(want, key);
    if (!cJSON_IsNumber(item))
        fail_msg("case %d: the reference has no %s", number, key);
    same_number(number, key, item->valuedouble, got);
}

static void same_list(int number, const cJSON *want, const char *key, const double *got, int64_t n)
{
    const cJSON *list = json_find(want, key), *item;
    int i = 0;
    assert_int_equal(cJSON_GetArraySize(list), n);
    cJSON_ArrayForEach(item, list) same_number(number, key, item->valuedouble, got[i++]);
}

static void same_table(int number, const cJSON *want, const char *key, const uint64_t *got, int rows, int columns)
{
    const cJSON *row, *item;
    int i = 0;
    assert_int_equal(cJSON_GetArraySize(json_find(want, key)), rows);
    cJSON_ArrayForEach(row, json_find(want, key))
    {
        assert_int_equal(cJSON_GetArraySize(row), columns);
        cJSON_ArrayForEach(item, row) same_number(number, key, item->valuedouble, (double)got[i++]);
    }
}

static void same_result(int number, const cJSON *want, const replay_result *got)
{
    same_value(number, want, "steps", (double)got->n_steps);
    same_value(number, want, "rows", (double)got->n_rows);
    same_value(number, want, "moves", (double)got->n_moves);
    same_table(number, want, "link_rows", got->link_rows, got->n_ranks, got->n_ranks);
    same_table(number, want, "rank_rows", got->rank_rows, got->n_layers, got->n_ranks);
    same_value(number, want, "copies", got->copies);
    same_value(number, want, "cross_copies", got->cross_copies);
    same_value(number, want, "home", got->home);
    same_value(number, want, "compute_us", got->compute_us);
    same_value(number, want, "dispatch_us", got->dispatch_us);
    same_value(number, want, "combine_us", got->combine_us);
    same_value(number, want, "step_us", got->step_us);
    same_value(number, want, "low_us", got->low_us);
    same_value(number, want, "high_us", got->high_us);
    same_value(number, want, "max_over_mean_mean", got->max_over_mean_mean);
    same_value(number, want, "max_over_mean_worst", got->max_over_mean_worst);
    same_value(number, want, "max_over_mean_step", got->max_over_mean_step);
    if (got->n_ranks <= 12) /* the reference goes through all sets of ranks */
        same_value(number, want, "split_gap", got->split_gap);
    same_list(number, want, "layer_us", got->layer_us, got->n_layers);
    same_list(number, want, "max_over_mean", got->max_over_mean, got->n_layers);
    same_list(number, want, "step_times", got->step_times, got->n_steps);
}

static void reference_agrees(void **state)
{
    (void)state;
    static replay_result results[CASES];
    uint64_t seed = 11;
    char batch_path[4200], folder[4096];
    int64_t moves = 0;
    snprintf(folder, sizeof folder, "%s", support_scratch());
    snprintf(batch_path, sizeof batch_path, "%s/batch.json", folder);
    FILE *batch = fopen(batch_path, "w");
    assert_non_null(batch);
    for (int c = 0; c < CASES; c++) {
        instance i;
        instance_make(&seed, c, c % 5 * 0.25, &i);
        run(&i, &results[c]);
        write_case(&i, folder, c, batch);
        moves += results[c].n_moves;
        instance_clear(&i);
    }
    fprintf(batch, "]\n");
    fclose(batch);
    assert_true(moves > 10); /* affinity was put to the test */
    cJSON *want = run_reference(batch_path);
    assert_int_equal(cJSON_GetArraySize(want), CASES);
    for (int c = 0; c < CASES; c++) {
        same_result(c, cJSON_GetArrayItem(want, c), &results[c]);
        replay_result_clear(&results[c]);
    }
    cJSON_Delete(want);
    support_remove(folder);
}

/* ---- what must hold ---- */

static uint64_t sum_of(const uint64_t *numbers, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += numbers[i];
    return sum;
}

static void rows_are_conserved(void **state)
{
    (void)state;
    uint64_t seed = 12;
    for (int c = 0; c < 60; c++) {
        instance i;
        replay_result r;
        instance_make(&seed, c, 0.4, &i);
        run(&i, &r);
        size_t n = (size_t)r.n_ranks;
        double per_row = (double)r.n_rows * r.n_layers;
        uint64_t crossed = 0, sent = sum_of(r.link_rows, n * n);
        for (int a = 0; a < r.n_ranks; a++) {
            assert_int_equal(r.link_rows[(size_t)a * n + (size_t)a], 0);
            for (int b = 0; b < r.n_ranks; b++)
                crossed += topology_link(&i.topo, a, b) == LINK_CROSS_NODE ? r.link_rows[(size_t)a * n + (size_t)b] : 0;
        }
        assert_true(fabs((double)crossed - r.cross_copies * per_row) < 0.5);
        if (!i.options.node_dedupe)
            assert_true(fabs((double)sent - r.copies * per_row) < 0.5);
        assert_true(sum_of(r.rank_rows, n * (size_t)r.n_layers) <= (uint64_t)(per_row * i.t.shape.top_k));
        assert_true(r.low_us <= r.step_us * (1 + 1e-12) && r.step_us <= r.high_us * (1 + 1e-12));
        assert_true(fabs(r.compute_us + r.dispatch_us + r.combine_us - r.step_us) <= 1e-9 * r.step_us);
        assert_true(i.options.replicas == REPLICAS_BY_STEP ? r.split_gap >= 1 - 1e-12 : r.split_gap == 0);
        replay_result_clear(&r);
        instance_clear(&i);
    }
}

static void assert_identical(const replay_result *a, const replay_result *b)
{
    size_t n = (size_t)a->n_ranks, l = (size_t)a->n_layers;
    assert_int_equal(a->n_steps, b->n_steps);
    assert_memory_equal(a->step_times, b->step_times, (size_t)a->n_steps * sizeof *a->step_times);
    assert_memory_equal(a->layer_us, b->layer_us, l * sizeof *a->layer_us);
    assert_memory_equal(a->max_over_mean, b->max_over_mean, l * sizeof *a->max_over_mean);
    assert_memory_equal(a->link_rows, b->link_rows, n * n * sizeof *a->link_rows);
    assert_memory_equal(a->rank_rows, b->rank_rows, l * n * sizeof *a->rank_rows);
    assert_true(a->step_us == b->step_us && a->low_us == b->low_us && a->high_us == b->high_us);
    assert_true(a->compute_us == b->compute_us && a->dispatch_us == b->dispatch_us && a->combine_us == b->combine_us);
    assert_true(a->copies == b->copies && a->cross_copies == b->cross_copies && a->home == b->home);
    assert_true(a->max_over_mean_mean == b->max_over_mean_mean && a->max_over_mean_step == b->max_over_mean_step);
}

static void threads_do_not_matter(void **state)
{
    (void)state;
    uint64_t seed = 13;
    for (int c = 0; c < 30; c++) {
        instance i;
        replay_result one, many;
        instance_make(&seed, c, 0.4, &i);
        run(&i, &one);
        for (i.options.threads = 0; i.options.threads < 6; i.options.threads += 3) {
            run(&i, &many);
            assert_identical(&one, &many);
            assert_true(one.split_gap == many.split_gap);
            replay_result_clear(&many);
        }
        replay_result_clear(&one);
        instance_clear(&i);
    }
}

static void single_copies_leave_no_choice(void **state)
{
    (void)state;
    uint64_t seed = 14;
    for (int c = 0; c < 30; c++) {
        instance i;
        replay_result share, step;
        instance_make(&seed, c, 0, &i);
        i.options.replicas = REPLICAS_BY_SHARE;
        run(&i, &share);
        i.options.replicas = REPLICAS_BY_STEP;
        run(&i, &step);
        assert_identical(&share, &step);
        assert_true(fabs(step.split_gap - 1) < 1e-12);
        replay_result_clear(&share);
        replay_result_clear(&step);
        instance_clear(&i);
    }
}

static void layers_add_up(void **state)
{
    (void)state;
    uint64_t seed = 15;
    for (int c = 0; c < 30; c++) {
        instance i;
        replay_result whole, again;
        replay_schedule s;
        double sum = 0;
        instance_make(&seed, c, 0.4, &i);
        assert_int_equal(replay_schedule_build(&i.t, &i.p, &i.topo, &i.options, &s), STATUS_OK);
        run(&i, &whole);
        assert_int_equal(replay_run_schedule(&i.t, &s, &i.p, &i.topo, &i.options, &again), STATUS_OK);
        assert_identical(&whole, &again);
        for (int l = 0; l < whole.n_layers; l++) {
            double us;
            assert_int_equal(replay_layer_us(&i.t, &s, &i.p, l, &i.topo, &i.options, &us), STATUS_OK);
            assert_true(us == whole.layer_us[l]);
            sum += us;
        }
        assert_true(fabs(sum - whole.step_us) <= 1e-9 * whole.step_us);
        replay_schedule_clear(&s);
        replay_result_clear(&whole);
        replay_result_clear(&again);
        instance_clear(&i);
    }
}

/* Every token at most once, in order within its sequence, every place filled in every step, owners in turn. */
static void schedules_take_one_token_a_place(void **state)
{
    (void)state;
    uint64_t seed = 16;
    for (int c = 0; c < 40; c++) {
        instance i;
        replay_schedule s;
        instance_make(&seed, c * 3 + 2, 0.2, &i); /* no affinity, nothing recorded */
        i.options.owners = OWNER_ROUND_ROBIN;
        int places = i.options.concurrency;
        int64_t *next = calloc((size_t)i.t.n_sequences, sizeof *next);
        assert_non_null(next);
        assert_int_equal(replay_schedule_build(&i.t, NULL, &i.topo, &i.options, &s), STATUS_OK);
        for (int64_t e = 0; e < s.first[s.n_steps]; e++) {
            int q = 0;
            while (i.t.first_token[q + 1] <= s.token[e])
                q++;
            assert_int_equal(s.token[e], i.t.first_token[q] + next[q]++);
            assert_int_equal(s.owner[e], e % places % i.topo.n_ranks);
        }
        for (int64_t step = 0; step <= s.n_steps; step++)
            assert_int_equal(s.first[step], step * places);
        int unfinished = 0; /* it ended because no sequence was left for a place */
        for (int q = 0; q < i.t.n_sequences; q++) {
            unfinished += next[q] < i.t.first_token[q + 1] - i.t.first_token[q];
            assert_true(next[q] > 0 || s.n_steps > 0);
        }
        assert_true(unfinished < places);
        free(next);
        replay_schedule_clear(&s);
        instance_clear(&i);
    }
}

static void affinity_saves_what_it_promises(void **state)
{
    (void)state;
    /* every sequence's experts live on one rank that is not its owner at first; moving is cheap beside 200 tokens */
    routing_shape shape = support_routing_shape(2, 8, 2, 1);
    topology topo;
    plan p;
    uint64_t seed = 17;
    traffic t;
    assert_int_equal(topology_uniform(4, 2, &topo), STATUS_OK);
    assert_int_equal(
        plan_contiguous(&(plan_shape){.n_ranks = 4, .n_experts = 8, .n_layers = 2, .layer_numbers = shape.layer_numbers}, NULL,
                        &p),
        STATUS_OK);
    assert_int_equal(support_random_traffic(&seed, &shape, 24, 400, 0, 0, &t), STATUS_OK);
    for (int q = 0; q < t.n_sequences; q++)
        for (int64_t i = t.first_token[q]; i < t.first_token[q + 1]; i++)
            for (int l = 0; l < 2; l++)
                for (int j = 0; j < 2; j++)
                    ((uint16_t *)traffic_experts(&t, l, i))[j] = (uint16_t)((q + 1) % 4 * 2 + j);
    replay_options options = {.concurrency = 8, .threads = 1};
    replay_result fixed, moved;
    assert_int_equal(replay_run(&t, &p, &topo, &options, &fixed), STATUS_OK);
    options.owners = OWNER_AFFINITY;
    assert_int_equal(replay_run(&t, &p, &topo, &options, &moved), STATUS_OK);
    assert_true(fixed.n_moves == 0 && moved.n_moves > 0);
    assert_true(moved.copies < fixed.copies);
    assert_true(moved.home > fixed.home);
    assert_int_equal(moved.n_steps, fixed.n_steps);
    replay_result_clear(&fixed);
    replay_result_clear(&moved);
    traffic_clear(&t);
    plan_clear(&p);
    topology_clear(&topo);
}

static void assert_refused(const instance *i, const char *sentence)
{
    replay_result r = {.n_steps = -7};
    if (replay_run(&i->t, &i->p, &i->topo, &i->options, &r) != STATUS_BAD_INPUT || !strstr(status_message(), sentence))
        fail_msg("said \"%s\", not \"%s\"", status_message(), sentence);
    assert_int_equal(r.n_steps, -7);
}

static void what_does_not_fit_is_refused(void **state)
{
    (void)state;
    uint64_t seed = 18;
    instance i;
    char sentence[100];
    instance_make(&seed, 2, 0.3, &i);
    i.options.owners = OWNER_ROUND_ROBIN;
    i.options.concurrency = i.t.n_sequences + 1;
    snprintf(sentence, sizeof sentence, "%d sequences do not fill %d places", i.t.n_sequences, i.t.n_sequences + 1);
    assert_refused(&i, sentence);
    i.options.concurrency = 0;
    assert_refused(&i, "0 sequences at once");
    i.options.concurrency = 1;
    i.p.layer_numbers[0]--;
    assert_refused(&i, "where the traffic has layer");
    i.p.layer_numbers[0]++;
    i.topo.n_ranks++;
    assert_refused(&i, "the topology has");
    i.topo.n_ranks--;
    i.p.n_experts++;
    assert_refused(&i, "experts in");
    i.p.n_experts--;
    i.options.owners = OWNER_RECORDED;
    i.t.owner[0] = i.topo.n_ranks;
    assert_refused(&i, "a token was owned by rank");
    free(i.t.owner);
    i.t.owner = NULL;
    assert_refused(&i, "the trace does not say which rank owned a token");
    replay_schedule s;
    i.options.owners = OWNER_AFFINITY;
    assert_int_equal(replay_schedule_build(&i.t, NULL, &i.topo, &i.options, &s), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "owners by affinity need a plan"));
    instance_clear(&i);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"an independent program computes the same from the files, to 1e-9", reference_agrees, NULL, NULL, NULL},
        {"rows sent, crossed and computed add up; the interval holds the mean", rows_are_conserved, NULL, NULL, NULL},
        {"the number of threads does not matter, to the last bit", threads_do_not_matter, NULL, NULL, NULL},
        {"without replicas both replica rules are the same", single_copies_leave_no_choice, NULL, NULL, NULL},
        {"layers add up to the step; a schedule made before gives the same", layers_add_up, NULL, NULL, NULL},
        {"a step takes the next token of every place; owners stay", schedules_take_one_token_a_place, NULL, NULL, NULL},
        {"sequences move to the ranks of their experts where that pays", affinity_saves_what_it_promises, NULL, NULL, NULL},
        {"shapes that disagree, too few sequences, missing owners are refused", what_does_not_fit_is_refused, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
