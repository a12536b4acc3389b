/* One attempt at a new plan with a planner that does what it is told, and everything it should not. */
#include "cluster/replan_policy.h"
#include "cluster/replanner.h"
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAYERS = 2, EXPERTS = 8, K = 2, RANKS = 4, TOKENS = 400 };

static char folder[4096], program[4096];
static plan present, better;
static topology machine;
static uint64_t counts[LAYERS * EXPERTS];

/* ---- scenery ---- */

static const char *in_folder(const char *name)
{
    static char path[2][4200];
    static int next;
    char *out = path[next++ & 1];
    snprintf(out, sizeof path[0], "%.3800s/%.380s", folder, name);
    return out;
}

static void write_text(const char *name, const char *text)
{
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void read_text(const char *name, char *out, size_t size)
{
    FILE *f = fopen(in_folder(name), "r");
    size_t n = f ? fread(out, 1, size - 1, f) : 0;
    if (f)
        fclose(f);
    out[n] = '\0';
}

static int set_up(void **state)
{
    (void)state;
    static const int layers[LAYERS] = {1, 3};
    plan_shape shape = {.n_ranks = RANKS, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = layers};
    unsetenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s", support_scratch());
    setenv("TMPDIR", in_folder("tmp"), 1);
    setenv("FAKE_PLANNER_DIR", folder, 1);
    mkdir(in_folder("tmp"), 0700);
    snprintf(program, sizeof program, "%s", support_source("tests/fake_planner.sh"));
    write_text("mode", "good");
    assert_int_equal(plan_contiguous(&shape, NULL, &present), STATUS_OK);
    assert_int_equal(support_reversed_plan(&shape, NULL, &better), STATUS_OK);
    assert_int_equal(plan_write(&better, "a-model", in_folder("plan.json")), STATUS_OK);
    assert_int_equal(topology_uniform(RANKS, 1, &machine), STATUS_OK);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    assert_int_equal(rmdir(in_folder("tmp")), 0); /* nothing is left in it */
    plan_clear(&present);
    plan_clear(&better);
    topology_clear(&machine);
    unsetenv("TMPDIR");
    support_remove(folder);
    return 0;
}

static routing_stats *statistics(uint64_t seed)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 1);
    routing_stats *s;
    uint16_t row[LAYERS * K];
    assert_int_equal(routing_stats_create(&shape, true, &s), STATUS_OK);
    for (int i = 0; i < TOKENS; i++) {
        support_routing_row(&seed, &shape, 0, row, NULL);
        assert_int_equal(routing_stats_add_row(s, row, 0, PHASE_DECODE), STATUS_OK);
    }
    return s;
}

static replan_request usual(void)
{
    replan_request r = {.program = program,
                        .seconds = 20,
                        .threads = 1,
                        .topology = &machine,
                        .present = &present,
                        .model_name = "a-model",
                        .name = "auto-7",
                        .epoch = 7,
                        .stats = {statistics(1), statistics(2)}};
    uint64_t part[LAYERS * EXPERTS];
    memset(counts, 0, sizeof counts);
    for (int k = 0; k < 2; k++) {
        routing_stats_sum_tokens(r.stats[k], -1, -1, part);
        for (int i = 0; i < LAYERS * EXPERTS; i++)
            counts[i] += part[i];
    }
    return r;
}

static replan_result attempt(const replan_request *request)
{
    replanner *r;
    replan_result result;
    if (replanner_start(request, &r) != STATUS_OK)
        fail_msg("%s", status_message());
    replanner_finish(r, &result);
    return result;
}

static void assert_fails(const char *mode, const char *sentence)
{
    replan_request request = usual();
    write_text("mode", mode);
    replan_result r = attempt(&request);
    assert_int_not_equal(r.st, STATUS_OK);
    if (!strstr(r.why, sentence))
        fail_msg("\"%s\" is not in \"%s\"", sentence, r.why);
    assert_non_null(r.stats); /* they come back: the next attempt needs them */
    assert_int_equal(routing_stats_tokens(r.stats, 0, PHASE_DECODE), 2 * TOKENS);
    replan_result_clear(&r);
}

static bool is_alive(pid_t pid)
{
    char path[64], text[300] = "", state = 'X';
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (f) {
        if (fgets(text, sizeof text, f))
            sscanf(strrchr(text, ')') + 1, " %c", &state);
        fclose(f);
    }
    return f && state != 'Z' && state != 'X';
}

static void assert_children_gone(void)
{
    FILE *f = fopen(in_folder("pids"), "r");
    int pid;
    assert_non_null(f);
    while (fscanf(f, "%d", &pid) == 1)
        assert_false(is_alive(pid));
    fclose(f);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1); /* no zombie either */
}

/* ---- the good days ---- */

static void a_plan_comes_back_with_its_numbers(void **state)
{
    (void)state;
    char text[4096];
    replan_request request = usual();
    write_text("diff.json", "a progress line\n{\"bytes\": 12, \"seconds\": 0.25}\n");
    replan_result r = attempt(&request);
    if (r.st != STATUS_OK)
        fail_msg("%s", r.why);
    assert_string_equal(r.plan.name, "auto-7");
    assert_int_equal(r.plan.epoch, 7);
    assert_int_equal(r.tokens, 2 * TOKENS);
    assert_memory_equal(r.counts, counts, sizeof counts);
    assert_int_equal(r.n_copies, LAYERS * EXPERTS); /* nothing is where it was */
    assert_int_equal(r.most_copies, LAYERS * EXPERTS / RANKS);
    assert_true(r.balance_now >= 1);
    assert_true(r.balance_new == fmax(r.balance_now, replan_balance_floor(RANKS, 2 * TOKENS))); /* mirrored */
    assert_true(r.error > 0 && r.error < 0.2);
    assert_true(r.link_seconds == 0.25);
    plan read = {0};
    assert_int_equal(plan_parse("json", r.json, r.json_size, NULL, &read), STATUS_OK);
    assert_string_equal(read.name, "auto-7");
    assert_memory_equal(read.copy_ranks, better.copy_ranks, LAYERS * EXPERTS * sizeof(int));
    plan_clear(&read);
    assert_non_null(strstr(r.json, "\"tokens_per_expert\""));
    assert_non_null(strstr(r.json, "800 tokens of live traffic"));
    read_text("niceness", text, sizeof text);
    assert_int_equal(atoi(text), 15);
    read_text("calls", text, sizeof text);
    assert_non_null(strstr(text, "--solver auto"));
    assert_non_null(strstr(text, "--seconds 20.000"));
    replan_result_clear(&r);
}

static void a_planner_that_prices_nothing_is_fine(void **state)
{
    (void)state;
    static const char *const prices[] = {NULL, "", "no json {", "{\"seconds\": \"many\"}", "[]"};
    for (size_t i = 0; i < sizeof prices / sizeof prices[0]; i++) {
        replan_request request = usual();
        unlink(in_folder("diff.json"));
        if (prices[i])
            write_text("diff.json", prices[i]);
        replan_result r = attempt(&request);
        assert_int_equal(r.st, STATUS_OK);
        assert_true(r.link_seconds < 0);
        replan_result_clear(&r);
    }
}

/* ---- the others ---- */

static void failures_are_sentences(void **state)
{
    (void)state;
    assert_fails("fail", "the planner ended with exit code 1: convoke-plan: no plan keeps this slack");
    assert_fails("crash", "the planner was killed by signal 11");
    assert_fails("rubbish", "plan.json");
    assert_fails("nothing", "plan.json");
}

static void a_plan_for_something_else_is_refused(void **state)
{
    (void)state;
    plan_shape shape = {.n_ranks = RANKS + 1, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = present.layer_numbers};
    plan other = {0};
    assert_int_equal(plan_contiguous(&shape, NULL, &other), STATUS_OK);
    assert_int_equal(plan_write(&other, NULL, in_folder("plan.json")), STATUS_OK);
    plan_clear(&other);
    assert_fails("good", "ranks");
    assert_int_equal(plan_write(&better, "another-model", in_folder("plan.json")), STATUS_OK);
    assert_fails("good", "another-model");
}

static void a_program_that_is_not_there(void **state)
{
    (void)state;
    replan_request request = usual();
    request.program = "/nowhere/convoke-plan";
    replan_result r = attempt(&request);
    assert_int_not_equal(r.st, STATUS_OK);
    assert_non_null(strstr(r.why, "/nowhere/convoke-plan"));
    replan_result_clear(&r);
}

static void late_ones_are_killed(void **state)
{
    (void)state;
    static const char *const modes[] = {"hang", "flood"};
    for (int i = 0; i < 2; i++) {
        replan_request request = usual();
        request.seconds = 0.2;
        request.grace = 0.8;
        write_text("mode", modes[i]);
        double begin = clock_seconds();
        replan_result r = attempt(&request);
        assert_true(clock_seconds() - begin < 8);
        assert_int_not_equal(r.st, STATUS_OK);
        assert_non_null(strstr(r.why, "did not end in time and was killed; its last words: "));
        assert_non_null(strstr(r.why, i == 0 ? "thinking hard" : "no play"));
        assert_true(strlen(r.why) < 600);
        assert_non_null(r.stats);
        replan_result_clear(&r);
    }
    assert_children_gone();
}

static void given_up_leaves_nothing(void **state)
{
    (void)state;
    replan_request request = usual();
    replanner *r;
    write_text("mode", "hang");
    assert_int_equal(replanner_start(&request, &r), STATUS_OK);
    for (double end = clock_seconds() + 20; access(in_folder("pids"), R_OK) != 0 && clock_seconds() < end;)
        poll(NULL, 0, 5);
    poll(NULL, 0, 50);
    assert_false(replanner_done(r));
    double begin = clock_seconds();
    replanner_cancel(r);
    assert_true(clock_seconds() - begin < 5);
    assert_children_gone();
    replanner_cancel(NULL);
    request = usual(); /* at once */
    assert_int_equal(replanner_start(&request, &r), STATUS_OK);
    replanner_cancel(r);
}

static void without_statistics_there_is_no_plan(void **state)
{
    (void)state;
    replan_request request = usual();
    routing_stats_destroy(request.stats[0]);
    routing_stats_destroy(request.stats[1]);
    request.stats[0] = request.stats[1] = NULL;
    replan_result r = attempt(&request);
    assert_int_equal(r.st, STATUS_BAD_INPUT);
    assert_null(r.stats);
    replan_result_clear(&r);
}

int main(void)
{
#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }
    const struct CMUnitTest tests[] = {
        TEST("a plan comes back with its numbers, and the statistics with it", a_plan_comes_back_with_its_numbers),
        TEST("a planner that does not price the move is fine", a_planner_that_prices_nothing_is_fine),
        TEST("failing, crashing, rubbish and nothing at all are sentences", failures_are_sentences),
        TEST("a plan for other ranks or another model is refused", a_plan_for_something_else_is_refused),
        TEST("a planner that is not there is a sentence", a_program_that_is_not_there),
        TEST("a planner that is late is killed with everything it started", late_ones_are_killed),
        TEST("an attempt that is given up leaves no process, no zombie, no file", given_up_leaves_nothing),
        TEST("without statistics there is no plan", without_statistics_there_is_no_plan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
