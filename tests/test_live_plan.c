/* The plan in force and the way to a better one, with workers that are messages made here and a planner that does what it is
 * told. */
#include "cluster/live_plan.h"
#include "cluster/plan_store.h"
#include "placement/routing_stats.h"
#include "proto/clock.h"
#include "proto/json.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LAYERS = 2, EXPERTS = 8, K = 2, RANKS = 4 };

static char folder[4096], planner[4096], plans[4200], model[4200];
static live_plan *lp;
static uint32_t nodes[64]; /* of the ranks */
static bool pairs;         /* what the workers count */

/* What the workers were told. */
static struct {
    uint64_t asked, epoch, live_epoch;
    int n_asked, n_sent, n_live;
    char json[100000], name[64], live_name[64];
    bool deaf;
} told;

static bool on_ask(void *arg, uint64_t id)
{
    (void)arg;
    told.asked = id;
    told.n_asked++;
    return !told.deaf;
}

static bool on_send(void *arg, const job_plan *p, uint64_t rate)
{
    (void)arg;
    assert_int_equal(rate, 1000000);
    told.epoch = p->epoch;
    snprintf(told.name, sizeof told.name, "%s", p->name);
    snprintf(told.json, sizeof told.json, "%s", p->json);
    told.n_sent++;
    return !told.deaf;
}

static void on_live(void *arg, const char *name, uint64_t epoch)
{
    (void)arg;
    snprintf(told.live_name, sizeof told.live_name, "%s", name);
    told.live_epoch = epoch;
    told.n_live++;
}

static const live_plan_backend backend = {.ask_statistics = on_ask, .send = on_send, .live = on_live};

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

static plan_shape shape_of(int n_ranks)
{
    static const int layers[LAYERS] = {1, 3};
    return (plan_shape){.n_ranks = n_ranks, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = layers};
}

/* The traffic chooses experts 0 and 1 only: equal blocks give all of it to rank 0. What the planner is going to say spreads them.
 */
static void write_good_plan(int n_ranks)
{
    plan_shape shape = shape_of(n_ranks);
    plan p = {0};
    assert_int_equal(plan_contiguous(&shape, NULL, &p), STATUS_OK);
    for (int l = 0; l < LAYERS; l++)
        for (int e = 0; e < EXPERTS; e++)
            p.copy_ranks[l * EXPERTS + e] = e % n_ranks;
    assert_int_equal(plan_write(&p, "a-model", in_folder("plan.json")), STATUS_OK);
    plan_clear(&p);
}

static int set_up(void **state)
{
    (void)state;
    unsetenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s", support_scratch());
    setenv("TMPDIR", folder, 1);
    setenv("FAKE_PLANNER_DIR", folder, 1);
    snprintf(planner, sizeof planner, "%s", support_source("tests/fake_planner.sh"));
    snprintf(plans, sizeof plans, "%s", in_folder("kept/plans"));
    snprintf(model, sizeof model, "%s", in_folder("a-model"));
    mkdir(model, 0700);
    write_text("a-model/config.json", "{}");
    write_text("mode", "good");
    write_text("diff.json", "{\"seconds\": 0.001}");
    write_good_plan(RANKS);
    memset(&told, 0, sizeof told);
    memset(nodes, 0, sizeof nodes);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    live_plan_destroy(lp);
    lp = NULL;
    support_remove(folder);
    unsetenv("TMPDIR");
    return 0;
}

static live_plan_options usual(replan_mode mode)
{
    return (live_plan_options){.mode = mode,
                               .automatic = true,
                               .dir = plans,
                               .planner = planner,
                               .model_dir = model,
                               .statistics_seconds = 0.001,
                               .plan_seconds = 20,
                               .plan_threads = 1,
                               .window_tokens = 100000,
                               .bytes_per_second = 1000000,
                               .limits = {.max_balance = 1.1,
                                          .max_drift = 0.1,
                                          .pause_seconds = 1000,
                                          .longest_pause = 10000,
                                          .min_gain = 0.01,
                                          .payback_seconds = 600}};
}

static void create(replan_mode mode)
{
    live_plan_options o = usual(mode);
    pairs = mode != REPLAN_OFF;
    if (live_plan_create(&o, &backend, NULL, &lp) != STATUS_OK)
        fail_msg("%s", status_message());
}

/* A launch as far as Ready; whether it was given a plan. */
static bool launch(int n_ranks)
{
    Convoke__Control__Hello hello = CONVOKE__CONTROL__HELLO__INIT;
    Convoke__Control__Ready ready = CONVOKE__CONTROL__READY__INIT;
    uint32_t layers[LAYERS] = {1, 3};
    job_plan start = {0};
    hello.n_ranks = (uint32_t)n_ranks;
    hello.n_node_of_rank = (size_t)n_ranks;
    hello.node_of_rank = nodes;
    bool planned = live_plan_begin(lp, &hello, &start);
    ready.model_name = (char *)"a-model";
    ready.n_experts = EXPERTS;
    ready.top_k = K;
    ready.expert_bytes = 1000;
    ready.row_bytes = 64;
    ready.n_layers = LAYERS;
    ready.layers = layers;
    ready.plan_epoch = planned ? start.epoch : 0;
    live_plan_ready(lp, &ready, &hello);
    return planned;
}

static void report(uint64_t plan_epoch, const Convoke__Control__ReplanState *replan)
{
    static uint64_t steps;
    static double compute[RANKS];
    Convoke__Control__Report r = CONVOKE__CONTROL__REPORT__INIT;
    Convoke__Control__ReplanState *list[1] = {(Convoke__Control__ReplanState *)replan};
    double load[LAYERS] = {plan_epoch ? 2 : 4, plan_epoch ? 2 : 4};
    r.step = ++steps;
    r.step_seconds = 0.01;
    r.decode_rows = 20;
    r.plan_epoch = plan_epoch;
    r.n_replans = replan != NULL;
    r.replans = list;
    compute[0] += 0.008; /* rank 0 does all the work */
    r.n_compute_seconds_of_rank = RANKS;
    r.compute_seconds_of_rank = compute;
    r.n_load_max_over_mean = LAYERS;
    r.load_max_over_mean = load;
    live_plan_report(lp, &r);
}

static void steps(int n, uint64_t plan_epoch)
{
    for (int i = 0; i < n; i++)
        report(plan_epoch, NULL);
}

static void replan_state(uint64_t epoch, Convoke__Control__ReplanStage stage, const char *reason, uint64_t runs_under)
{
    Convoke__Control__ReplanState s = CONVOKE__CONTROL__REPLAN_STATE__INIT;
    s.epoch = epoch;
    s.stage = stage;
    s.reason = (char *)reason;
    s.loaded_bytes = 4000;
    s.seconds = 0.5;
    report(runs_under, &s);
}

enum { WHOLE, CUT, FAILED, UNASKED };

/* Asks for counts, and the workers answer in two parts: `n` tokens of experts `first` and the next one. */
static void count_as(int how, int n, int first)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 1);
    routing_stats *s;
    bytes_writer packed = {0};
    Convoke__Control__Statistics m = CONVOKE__CONTROL__STATISTICS__INIT;
    uint16_t row[LAYERS * K];
    int before = told.n_asked;
    for (double end = clock_seconds() + 10; told.n_asked == before && clock_seconds() < end; poll(NULL, 0, 1)) {
        report(0, NULL);
        live_plan_tick(lp);
    }
    assert_int_equal(told.n_asked, before + 1);
    assert_int_equal(routing_stats_create(&shape, pairs, &s), STATUS_OK);
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < LAYERS * K; k++)
            row[k] = (uint16_t)(first + k % K);
        assert_int_equal(routing_stats_add_row(s, row, 0, PHASE_DECODE), STATUS_OK);
    }
    assert_int_equal(routing_stats_pack(s, &packed), STATUS_OK);
    m.id = told.asked + (how == UNASKED);
    m.failed = (char *)(how == FAILED ? "no memory" : "");
    m.counts = (ProtobufCBinaryData){.len = packed.size / 2, .data = packed.data};
    live_plan_statistics(lp, &m);
    m.part = how == CUT ? 2 : 1;
    m.last = true;
    m.counts = (ProtobufCBinaryData){.len = packed.size - packed.size / 2, .data = packed.data + packed.size / 2};
    live_plan_statistics(lp, &m);
    bytes_clear(&packed);
    routing_stats_destroy(s);
}

static void count(int n)
{
    count_as(WHOLE, n, 0);
}

/* {"window": {"tokens": ...}} and the like: a number or a string of GET /plan; static memory. */
static double number(const char *of, const char *key)
{
    bytes_writer text = {0};
    cJSON *tree = NULL;
    live_plan_describe(lp, &text);
    assert_int_equal(json_parse("plan", (char *)text.data, text.size, &tree), STATUS_OK);
    const cJSON *found = json_find(*of ? json_find(tree, of) : tree, key);
    double value = found ? found->valuedouble : -1;
    cJSON_Delete(tree);
    bytes_clear(&text);
    return value;
}

static const char *word(const char *key)
{
    static char value[1200];
    bytes_writer text = {0};
    cJSON *tree = NULL;
    const char *found;
    live_plan_describe(lp, &text);
    assert_int_equal(json_parse("plan", (char *)text.data, text.size, &tree), STATUS_OK);
    assert_int_equal(json_get_string(tree, "plan", key, &found), STATUS_OK);
    snprintf(value, sizeof value, "%s", found);
    cJSON_Delete(tree);
    bytes_clear(&text);
    return value;
}

static void wait_for_planner(void)
{
    live_plan_tick(lp);
    for (double end = clock_seconds() + 30; strcmp(word("state"), "planning") == 0 && clock_seconds() < end; poll(NULL, 0, 2))
        live_plan_tick(lp);
}

static void assert_last(const char *part)
{
    if (!strstr(word("last"), part))
        fail_msg("\"%s\" is not in \"%s\"", part, word("last"));
}

/* As far as a plan on its way to the workers. */
static void plan_anew(void)
{
    create(REPLAN_APPLY);
    assert_false(launch(RANKS));
    steps(20, 0);
    count(2000);
    wait_for_planner();
    assert_int_equal(told.n_sent, 1);
    assert_string_equal(word("state"), "moving experts");
}

static bool is_kept(void)
{
    char path[4096];
    assert_int_equal(plan_store_path(plans, model, RANKS, 1, path), STATUS_OK);
    return access(path, R_OK) == 0;
}

/* ---- counts ---- */

static void counts_become_balance(void **state)
{
    (void)state;
    create(REPLAN_OFF);
    launch(RANKS);
    steps(1, 0);
    count(300);
    assert_int_equal(number("window", "tokens"), 300);
    assert_true(number("window", "max_over_mean") == 4);
    count(200);
    assert_int_equal(number("window", "tokens"), 500);
    live_plan_tick(lp);
    assert_string_equal(word("state"), "serving"); /* off: no plans, however bad it is */
    assert_int_equal(live_plan_ask(lp, TAKE_IF_IT_PAYS), STATUS_UNSUPPORTED);
}

static void idle_workers_are_not_asked(void **state)
{
    (void)state;
    create(REPLAN_OFF);
    launch(RANKS);
    steps(1, 0);
    count(10);
    for (int i = 0; i < 20; i++, poll(NULL, 0, 1))
        live_plan_tick(lp);
    assert_int_equal(told.n_asked, 1);
}

static void broken_counts_are_left_out(void **state)
{
    (void)state;
    create(REPLAN_OFF);
    launch(RANKS);
    steps(1, 0);
    count_as(CUT, 100, 0);
    count_as(FAILED, 100, 0);
    assert_int_equal(number("window", "tokens"), 0);
    count_as(WHOLE, 100, 0);
    assert_int_equal(number("window", "tokens"), 100);
    count_as(UNASKED, 100, 0);
    assert_int_equal(number("window", "tokens"), 100);
}

static void drift_is_against_the_start(void **state)
{
    (void)state;
    create(REPLAN_OFF);
    launch(RANKS);
    steps(1, 0);
    count(5000);
    assert_true(number("window", "drift") == -1); /* nothing to compare with yet */
    count(10);
    assert_true(number("window", "drift") < 1e-9);
    count_as(WHOLE, 90000, 4); /* other experts */
    assert_true(number("window", "drift") > 0.9);
}

/* ---- plans ---- */

static void a_plan_goes_live(void **state)
{
    (void)state;
    plan_anew();
    assert_string_equal(told.name, "auto-1");
    assert_int_equal(told.epoch, 1);
    assert_last("plan 1 would cut the busiest rank from 4.00x to 2.00x of the mean and move 11.7 KiB in about ");
    assert_last(" of a step and pays after ");
    assert_false(is_kept());
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LOADING, "", 0);
    assert_int_equal(number("next", "loaded_bytes"), 4000);
    assert_int_equal(told.n_live, 0);
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE, "", 1);
    assert_int_equal(told.n_live, 1);
    assert_int_equal(told.live_epoch, 1);
    assert_string_equal(told.live_name, "auto-1");
    assert_string_equal(word("plan"), "auto-1");
    assert_true(number("window", "max_over_mean") == 2);
    assert_true(number("window", "drift") < 1e-9); /* it was made from just these */
    assert_string_equal(word("state"), "measuring");
    steps(301, 1);
    assert_last("the busiest rank 2.00x of the mean (4.00x before)");
    assert_string_equal(word("state"), "serving");
    live_plan_tick(lp);
    assert_true(is_kept());
    assert_int_equal(told.n_live, 1);
}

/* The end of loading may be told by the step alone. */
static void a_step_under_the_plan_is_proof_enough(void **state)
{
    (void)state;
    plan_anew();
    steps(1, 1);
    assert_int_equal(told.live_epoch, 1);
    assert_string_equal(word("plan"), "auto-1");
}

static void what_went_live_is_what_launches_begin_with(void **state)
{
    (void)state;
    plan_anew();
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE, "", 1);
    live_plan_lost(lp);
    assert_true(launch(RANKS)); /* a recovery */
    assert_true(number("", "epoch") == 1);
    live_plan_destroy(lp);
    create(REPLAN_APPLY);
    assert_true(launch(RANKS)); /* another run */
    assert_string_equal(word("plan"), "auto-1");
    steps(20, 1);
    count(3000);
    wait_for_planner();
    assert_last("found nothing better than plan auto-1");
    live_plan_lost(lp);
    assert_false(launch(RANKS - 1)); /* a node was lost: the plan does not fit */
    assert_string_equal(word("plan"), "contiguous");
    live_plan_lost(lp);
    assert_true(launch(RANKS)); /* it is back */
    assert_string_equal(word("plan"), "auto-1");
}

static void plans_are_for_the_nodes_there_are(void **state)
{
    (void)state;
    plan p = {0};
    nodes[1] = nodes[2] = 1; /* not in blocks */
    plan_anew();
    assert_int_equal(plan_parse("sent", told.json, strlen(told.json), NULL, &p), STATUS_OK);
    for (int r = 0; r < RANKS; r++)
        assert_int_equal(p.node_of_rank[r], nodes[r]);
    plan_clear(&p);
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE, "", 1);
    live_plan_tick(lp);
    assert_false(is_kept()); /* not for one node */
    live_plan_destroy(lp);
    create(REPLAN_OFF);
    assert_true(launch(RANKS));
    assert_int_equal(number("", "nodes"), 2);
}

static void a_kept_plan_that_is_broken_is_passed_over(void **state)
{
    (void)state;
    char path[4096];
    assert_int_equal(plan_store_path(plans, model, RANKS, 1, path), STATUS_OK);
    assert_int_equal(plan_store_write(path, "{\"format\":", 10), STATUS_OK);
    create(REPLAN_OFF);
    assert_false(launch(RANKS));
    assert_string_equal(word("plan"), "contiguous");
    write_text("a-model/config.json", "{\"another\": \"model of that name\"}");
    assert_false(is_kept());
}

static void suggesting_is_not_doing(void **state)
{
    (void)state;
    create(REPLAN_SUGGEST);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    wait_for_planner();
    assert_last("plan 1 would cut the busiest rank");
    assert_int_equal(told.n_sent, 0);
    count(100);
    live_plan_tick(lp);
    assert_string_equal(word("state"), "serving"); /* a pause */
    assert_int_equal(live_plan_ask(lp, TAKE_IF_IT_PAYS), STATUS_OK);
    wait_for_planner();
    assert_int_equal(told.n_sent, 1); /* an operator said to take it */
    assert_int_equal(told.epoch, 2);
}

static void what_does_not_pay_is_not_sent(void **state)
{
    (void)state;
    live_plan_options o = usual(REPLAN_APPLY);
    pairs = true;
    write_text("diff.json", "{\"seconds\": 1e12}");
    assert_int_equal(live_plan_create(&o, &backend, NULL, &lp), STATUS_OK);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    wait_for_planner();
    assert_last("it would pay after ");
    assert_int_equal(told.n_sent, 0);
    assert_string_equal(word("state"), "serving");
    assert_int_equal(live_plan_ask(lp, TAKE_IF_IT_PAYS), STATUS_OK);
    wait_for_planner();
    assert_int_equal(told.n_sent, 0);
    assert_int_equal(live_plan_ask(lp, TAKE_ALWAYS), STATUS_OK);
    wait_for_planner();
    assert_int_equal(told.n_sent, 1);
}

static void refused_plans_leave_the_old_one(void **state)
{
    (void)state;
    plan_anew();
    replan_state(7, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED, "of another time", 0);
    assert_string_equal(word("state"), "moving experts");
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_REFUSED, "rank 2 has no room", 0);
    assert_last("the workers did not take plan 1: rank 2 has no room; plan contiguous stays in force");
    assert_string_equal(word("state"), "serving");
    assert_int_equal(told.n_live, 0);
    count(100);
    live_plan_tick(lp);
    assert_string_equal(word("state"), "serving"); /* it is not tried again at once */
}

static void a_loss_while_experts_move(void **state)
{
    (void)state;
    plan_anew();
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LOADING, "", 0);
    live_plan_lost(lp);
    assert_last("plan 1 was not live yet when the workers were lost; they start again with plan contiguous");
    assert_false(launch(RANKS));
    live_plan_tick(lp);
    assert_false(is_kept());
    replan_state(1, CONVOKE__CONTROL__REPLAN_STAGE__REPLAN_LIVE, "", 0); /* an echo */
    assert_int_equal(told.n_live, 0);
}

static void a_loss_while_planning(void **state)
{
    (void)state;
    create(REPLAN_APPLY);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    live_plan_tick(lp);
    live_plan_lost(lp);
    for (double end = clock_seconds() + 30; !*word("last") && clock_seconds() < end; poll(NULL, 0, 2))
        live_plan_tick(lp);
    assert_last("the workers were lost while it was made");
    assert_int_equal(told.n_sent, 0);
}

static void workers_that_cannot_be_told(void **state)
{
    (void)state;
    create(REPLAN_APPLY);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    told.deaf = true;
    wait_for_planner();
    assert_last("could not be sent");
    assert_string_equal(word("state"), "serving");
}

static void a_planner_that_fails_is_said_once(void **state)
{
    (void)state;
    write_text("mode", "fail");
    create(REPLAN_APPLY);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    wait_for_planner();
    assert_last("no new plan: the planner ended with exit code 1: convoke-plan: no plan keeps this slack");
    count(100);
    live_plan_tick(lp);
    assert_string_equal(word("state"), "serving");
    assert_int_equal(number("window", "tokens"), 2100); /* the counts are there for the next attempt */
}

static void a_server_that_ends_does_not_wait_for_the_planner(void **state)
{
    (void)state;
    write_text("mode", "hang");
    create(REPLAN_APPLY);
    launch(RANKS);
    steps(20, 0);
    count(2000);
    live_plan_tick(lp);
    for (double end = clock_seconds() + 20; access(in_folder("pids"), R_OK) != 0 && clock_seconds() < end;)
        poll(NULL, 0, 5);
    double begin = clock_seconds();
    live_plan_destroy(lp);
    lp = NULL;
    assert_true(clock_seconds() - begin < 5);
}

static void one_rank_has_nothing_to_plan(void **state)
{
    (void)state;
    create(REPLAN_APPLY);
    launch(1);
    steps(20, 0);
    count(2000);
    live_plan_tick(lp);
    assert_string_equal(word("state"), "serving");
    assert_int_equal(live_plan_ask(lp, TAKE_IF_IT_PAYS), STATUS_STOPPED);
    assert_non_null(strstr(status_message(), "one rank"));
}

static void what_cannot_work_refuses_to_start(void **state)
{
    (void)state;
    live_plan_options o = usual(REPLAN_SUGGEST);
    o.planner = "/nowhere/planner";
    assert_int_equal(live_plan_create(&o, &backend, NULL, &lp), STATUS_USAGE);
    o.mode = REPLAN_OFF; /* nobody will call it */
    assert_int_equal(live_plan_create(&o, &backend, NULL, &lp), STATUS_OK);
}

int main(void)
{
#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }
    const struct CMUnitTest tests[] = {
        TEST("counts of the workers become balance; with replanning off nothing more", counts_become_balance),
        TEST("workers that did nothing are not asked", idle_workers_are_not_asked),
        TEST("counts that are cut, failed or not asked for are left out", broken_counts_are_left_out),
        TEST("drift is measured against the start where the plan says nothing", drift_is_against_the_start),
        TEST("a plan that pays is sent, goes live, is measured and kept", a_plan_goes_live),
        TEST("a step under the new plan is proof that it is live", a_step_under_the_plan_is_proof_enough),
        TEST("what went live is what recoveries and later runs begin with, on as many ranks",
             what_went_live_is_what_launches_begin_with),
        TEST("a plan is for the nodes there are, and kept for as many", plans_are_for_the_nodes_there_are),
        TEST("a kept plan that is broken, or of another model, is passed over", a_kept_plan_that_is_broken_is_passed_over),
        TEST("mode suggest says so and does nothing, until somebody says take it", suggesting_is_not_doing),
        TEST("a plan whose move does not pay is not sent, unless somebody says so", what_does_not_pay_is_not_sent),
        TEST("refused by the workers: the old plan stays, and there is a pause", refused_plans_leave_the_old_one),
        TEST("workers lost while experts move: the old plan, and no trace of the new one", a_loss_while_experts_move),
        TEST("workers lost while a plan is made: it is not used", a_loss_while_planning),
        TEST("workers that cannot be told of it: as if refused", workers_that_cannot_be_told),
        TEST("a planner that fails is a sentence and a pause", a_planner_that_fails_is_said_once),
        TEST("a server that ends does not wait for its planner", a_server_that_ends_does_not_wait_for_the_planner),
        TEST("one rank: nothing to plan", one_rank_has_nothing_to_plan),
        TEST("a planner that is not there refuses to start, unless replanning is off", what_cannot_work_refuses_to_start),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
