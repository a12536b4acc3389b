/* convoke-plan score, compare, simulate: what plans cost on given traffic. */
#include "placement/planner/commands.h"
#include "placement/planner/inputs.h"
#include "placement/planner/score_print.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    plan_inputs in;
    option_list plans;
    const char *picture;
    int bounds;
    int64_t extra_slots;
    double bound_seconds;
    bool json, contiguous, per_layer;
} score_options;

/* What is compared: the contiguous plan first, if wanted, then those that were named. */
typedef struct {
    problem_request request;
    problem *problem;
    int n;
    plan *plans;
    plan_score *scores;
    scored_plan *lines;
    plan_bounds bounds;
    bool has_bounds;
} comparison;

static void clear(comparison *c)
{
    for (int i = 0; i < c->n; i++) {
        plan_clear(&c->plans[i]);
        score_clear(&c->scores[i]);
    }
    free(c->plans);
    free(c->scores);
    free(c->lines);
    bounds_clear(&c->bounds);
    problem_destroy(c->problem);
}

static status read_plans(const score_options *o, comparison *c)
{
    int room = o->plans.n + 1;
    c->plans = calloc((size_t)room, sizeof *c->plans);
    c->scores = calloc((size_t)room, sizeof *c->scores);
    c->lines = calloc((size_t)room, sizeof *c->lines);
    if (!c->plans || !c->scores || !c->lines)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d plans", room);
    c->n = o->contiguous;
    for (int i = 0; i < o->plans.n; i++, c->n++)
        TRY(plan_read(o->plans.items[i], NULL, &c->plans[c->n]));
    return STATUS_OK;
}

static status pose(score_options *o, comparison *c)
{
    TRY(inputs_load(&o->in, &c->plans[o->contiguous]));
    c->request = inputs_request(&o->in);
    c->request.extra_slots = (int)o->extra_slots;
    TRY(problem_create(&c->request, true, &c->problem));
    const problem *p = c->problem;
    plan_shape shape = {
        .n_ranks = p->n_ranks, .n_experts = p->n_experts, .n_layers = p->n_layers, .layer_numbers = p->layer_numbers};
    return o->contiguous ? plan_contiguous(&shape, p->topology->node_of_rank, &c->plans[0]) : STATUS_OK;
}

static status check_shape(const problem *p, const plan *made, const char *path)
{
    if (made->n_ranks != p->n_ranks || made->n_experts != p->n_experts || made->n_layers != p->n_layers)
        return status_fail(STATUS_BAD_INPUT,
                           "%s: a plan for %d layers of %d experts on %d ranks; traffic and topology have %d of %d on %d", path,
                           made->n_layers, made->n_experts, made->n_ranks, p->n_layers, p->n_experts, p->n_ranks);
    for (int l = 0; l < p->n_layers; l++)
        if (made->layer_numbers[l] != p->layer_numbers[l])
            return status_fail(STATUS_BAD_INPUT, "%s: its MoE layer %d is the model's layer %d, the traffic's is %d", path, l,
                               made->layer_numbers[l], p->layer_numbers[l]);
    return STATUS_OK;
}

/* Slots of a bound are those of the fullest plan, unless said otherwise. */
static int slots_used(const comparison *c)
{
    int most = 0, even = (c->problem->n_experts + c->problem->n_ranks - 1) / c->problem->n_ranks;
    for (int i = 0; i < c->n; i++)
        for (int l = 0; l < c->problem->n_layers; l++)
            for (int g = 0; g < c->problem->n_ranks; g++) {
                int held = 0;
                for (int e = 0; e < c->problem->n_experts; e++)
                    held += plan_holds(&c->plans[i], l, e, g);
                most = held > most ? held : most;
            }
    return most > even ? most - even : 0;
}

static status find_bounds(const score_options *o, comparison *c)
{
    problem_request request = c->request;
    problem *roomy;
    if (request.extra_slots == 0)
        request.extra_slots = slots_used(c);
    TRY(problem_create(&request, true, &roomy));
    status st =
        bounds_compute(roomy, BOUND_LOAD | BOUND_RANKS | BOUND_STEP | (o->bounds == 1 ? BOUND_SPECTRAL | BOUND_MATCHING : 0),
                       o->bound_seconds, &c->bounds);
    c->has_bounds = st == STATUS_OK;
    problem_destroy(roomy);
    return st;
}

static status judge(const score_options *o, comparison *c)
{
    for (int i = 0; i < c->n; i++) {
        if (i >= o->contiguous)
            TRY(check_shape(c->problem, &c->plans[i], o->plans.items[i - o->contiguous]));
        TRY(score_plan(c->problem, &c->plans[i], &c->scores[i]));
        c->lines[i] = (scored_plan){c->plans[i].name, &c->scores[i]};
    }
    return o->bounds == 2 ? STATUS_OK : find_bounds(o, c);
}

static status print_json(const comparison *c)
{
    cJSON *root = cJSON_CreateObject(), *plans = cJSON_AddArrayToObject(root, "plans");
    for (int i = 0; i < c->n; i++) {
        cJSON *o = score_to_json(&c->scores[i]);
        cJSON_AddStringToObject(o, "name", c->plans[i].name);
        cJSON_AddItemToArray(plans, o);
    }
    cJSON_AddItemToObject(root, "bound", bounds_to_json(c->has_bounds ? &c->bounds : NULL));
    char *text = cJSON_PrintUnformatted(root);
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
    return text ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to print the result");
}

static void print_layers(const comparison *c)
{
    const plan_score *s = &c->scores[c->n - 1];
    if (!s->has_replay)
        return;
    printf("%-8s %12s %10s  (%s)\n", "layer", "us per step", "max/mean", c->plans[c->n - 1].name);
    for (int l = 0; l < s->replay.n_layers; l++)
        printf("%-8d %12.1f %10.3f\n", c->problem->layer_numbers[l], s->replay.layer_us[l], s->replay.max_over_mean[l]);
}

static void print_details(const comparison *c)
{
    const plan_score *s = &c->scores[c->n - 1];
    const replay_result *r = &s->replay;
    if (!s->has_replay)
        return;
    printf("%s: %lld steps, %lld tokens; per step %.1f us computing, %.1f dispatching, %.1f combining; %.1f %% of rows stay on "
           "their "
           "owner\n",
           c->plans[c->n - 1].name, (long long)r->n_steps, (long long)r->n_rows, r->compute_us, r->dispatch_us, r->combine_us,
           r->home * 100);
    if (r->n_moves)
        printf("%lld sequences went to another owner\n", (long long)r->n_moves);
    if (r->split_gap > 0 && s->n_replicas)
        printf("rows among replicas: %.4fx the exact optimum of a step, on average\n", r->split_gap);
}

static status run_comparison(score_options *o, bool details)
{
    comparison c = {0};
    status st;
    TRY_GOTO(read_plans(o, &c), out);
    TRY_GOTO(pose(o, &c), out);
    TRY_GOTO(judge(o, &c), out);
    if (o->picture)
        TRY_GOTO(score_write_picture(o->picture, c.lines, c.n, c.has_bounds ? &c.bounds : NULL), out);
    if (o->json) {
        st = print_json(&c);
        goto out;
    }
    score_print_table(stdout, c.lines, c.n, c.has_bounds ? &c.bounds : NULL);
    score_print_bars(stdout, c.lines, c.n, c.has_bounds ? &c.bounds : NULL);
    for (int i = 0; i < c.n; i++)
        score_print_misfit(stdout, c.problem, &c.plans[i]);
    if (details)
        print_details(&c);
    if (o->per_layer)
        print_layers(&c);
out:
    clear(&c);
    inputs_clear(&o->in);
    return st;
}

static status parse_and_run(int argc, char **argv, const char *name, const char *summary, bool details, bool contiguous,
                            int most_plans)
{
    score_options o = {0};
    const option_entry entries[] = {
        {"plan", OPTION_LIST, &o.plans, .letter = 'p', .argument = "PLAN", .required = true,
         .help = most_plans > 1 ? "a plan to compare; several times" : "the plan"},
        {"stats", OPTION_STRING, &o.in.stats_path, .letter = 's', .argument = "STATS",
         .help = "routing statistics (balance and flow only)"},
        INPUT_TRAFFIC_OPTIONS(&o.in),
        INPUT_TOPOLOGY_OPTIONS(&o.in),
        INPUT_REPLAY_OPTIONS(&o.in),
        {"contiguous", OPTION_FLAG, &o.contiguous, .fallback = contiguous ? "1" : "0",
         .help = "the contiguous plan as first line"},
        {"bounds", OPTION_CHOICE, &o.bounds, .choices = "quick|all|none", .fallback = contiguous ? "quick" : "none",
         .help = "lower bounds: of load, distinct ranks and step time; also of R-flow; none"},
        {"bound-seconds", OPTION_DOUBLE, &o.bound_seconds, .argument = "X", .fallback = "20", .max = 1e6,
         .help = "time for bounds"},
        {"extra-slots", OPTION_INT, &o.extra_slots, .argument = "N", .fallback = "0", .max = 4096,
         .help = "room that the bounds allow for (0: what the plans use)"},
        {"picture", OPTION_STRING, &o.picture, .argument = "FILE.svg", .help = "draw the step times"},
        {"layers", OPTION_FLAG, &o.per_layer, .help = "print every layer of the last plan"},
        {"json", OPTION_FLAG, &o.json, .help = "print one JSON object instead of a table"},
    };
    const option_table table = {.name = name,
                                .summary = summary,
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    bool run;
    TRY(inputs_parse_options(&table, argc, argv, NULL, NULL, &run));
    if (!run)
        return STATUS_OK;
    if (o.plans.n > most_plans)
        return status_fail(STATUS_USAGE, "--plan: one is enough here; `convoke-plan compare` takes several");
    return run_comparison(&o, details);
}

status command_score(int argc, char **argv)
{
    return parse_and_run(argc, argv, "convoke-plan score",
                         "What a plan costs: balance, copies, step time, beside the contiguous plan.", true, true, 1);
}

status command_compare(int argc, char **argv)
{
    return parse_and_run(argc, argv, "convoke-plan compare", "Several plans on the same traffic: one table, one picture.", false,
                         true, OPTION_LIST_MAX);
}

status command_simulate(int argc, char **argv)
{
    return parse_and_run(argc, argv, "convoke-plan simulate", "Replays a trace under a plan and prices every step.", true, false,
                         1);
}
