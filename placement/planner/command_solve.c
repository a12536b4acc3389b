/* convoke-plan solve: from traffic and topology to a plan, with its score, its bound and what it is worth on other traffic. */
#include "placement/planner/commands.h"
#include "placement/planner/held_out.h"
#include "placement/planner/inputs.h"
#include "placement/planner/plan_file.h"
#include "placement/planner/score_print.h"
#include "proto/clock.h"
#include "proto/console.h"
#include "proto/file_replace.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    plan_inputs in;
    const char *solver_name, *seed_path, *output, *model, *name, *picture, *held_path;
    int64_t extra_slots, work, folds, epoch;
    double seconds, bound_seconds;
    int fold_by, bounds;
    bool json;
} solve_options;

typedef struct {
    const solver *solver;
    problem *problem;
    plan seed, made, contiguous;
    bool has_seed;
    solver_report report;
    plan_score score, contiguous_score;
    plan_bounds bounds;
    bool has_bounds;
    held_out_result held;
    char held_why[400];
    double solve_seconds, fold_seconds;
    console console;
} solve_state;

static status parse(int argc, char **argv, solve_options *o, bool *run)
{
    const option_entry entries[] = {
        {"stats", OPTION_STRING, &o->in.stats_path, .letter = 's', .argument = "STATS", .help = "routing statistics"},
        INPUT_TRAFFIC_OPTIONS(&o->in),
        INPUT_TOPOLOGY_OPTIONS(&o->in),
        {"solver", OPTION_STRING, &o->solver_name, .fallback = "auto", .argument = "NAME",
         .help = "how to plan; `--solver list` lists them"},
        {"slack", OPTION_STRING, &o->in.slack_text, .argument = "5%",
         .help = "a rank's planned rows per layer over the layer's mean, at most (default: 5% over the best found, or priced by "
                 "step time)"},
        {"extra-slots", OPTION_INT, &o->extra_slots, .argument = "N", .fallback = "0", .max = 4096,
         .help = "replicas per rank and layer, on top of ceil(E/G)"},
        {"seconds", OPTION_DOUBLE, &o->seconds, .argument = "X", .fallback = "20", .max = 1e6,
         .help = "the solver's time (0: until its work is done)"},
        {"work", OPTION_INT, &o->work, .argument = "UNITS", .fallback = "0", .max = 9e15,
         .help = "counted moves and pivots: the same work gives the same plan (0: the solver's own)"},
        {"seed", OPTION_INT, &o->in.random_seed, .argument = "S", .fallback = "0", .max = 9e15, .help = "of the random numbers"},
        {"seed-plan", OPTION_STRING, &o->seed_path, .argument = "PLAN", .help = "start from this plan"},
        INPUT_REPLAY_OPTIONS(&o->in),
        {"folds", OPTION_INT, &o->folds, .argument = "K", .fallback = "2", .max = 1000,
         .help = "score on held-out traffic by K folds (0: do not; needs a trace)"},
        {"fold-by", OPTION_CHOICE, &o->fold_by, .choices = "domain|time", .fallback = "domain", .help = "what is held out"},
        {"held-out", OPTION_STRING, &o->held_path, .argument = "TRACE", .help = "score the plan on this trace as well"},
        {"bounds", OPTION_CHOICE, &o->bounds, .choices = "quick|all|none", .fallback = "quick",
         .help = "lower bounds: of load, distinct ranks and step time; also of R-flow; none"},
        {"bound-seconds", OPTION_DOUBLE, &o->bound_seconds, .argument = "X", .fallback = "20", .max = 1e6,
         .help = "time for bounds"},
        {"model", OPTION_STRING, &o->model, .argument = "NAME", .help = "model the plan is for (default: as the traffic says)"},
        {"name", OPTION_STRING, &o->name, .argument = "NAME", .help = "the plan's name (default: the solver's)"},
        {"epoch", OPTION_INT, &o->epoch, .argument = "N", .fallback = "0", .max = 9e15, .help = "the plan's number"},
        {"output", OPTION_STRING, &o->output, .letter = 'o', .argument = "PLAN", .help = "where the plan goes"},
        {"picture", OPTION_STRING, &o->picture, .argument = "FILE.svg", .help = "draw the step times"},
        {"json", OPTION_FLAG, &o->json, .help = "print one JSON object instead of a table"},
    };
    const option_table table = {.name = "convoke-plan solve",
                                .summary = "Makes a plan: which ranks hold which expert.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    return inputs_parse_options(&table, argc, argv, NULL, NULL, run);
}

static void list_solvers(void)
{
    for (const solver *const *s = solvers; *s; s++)
        printf("%-12s %s\n%-12s minimises %s; %s\n", (*s)->name, (*s)->summary, "", (*s)->objective, (*s)->paper);
}

static status find_solver(const char *name, const solver **out)
{
    *out = solver_find(name);
    if (*out)
        return STATUS_OK;
    char names[512] = "";
    for (const solver *const *s = solvers; *s; s++) {
        strncat(names, (*s)->name, sizeof names - strlen(names) - 1);
        if (s[1])
            strncat(names, ", ", sizeof names - strlen(names) - 1);
    }
    return status_fail(STATUS_USAGE, "--solver: '%s' is none of %s", name, names);
}

/* A new stage is worth a line even when the last was just drawn. */
static void show_stage(solve_state *s, const char *what)
{
    s->console.last_us = 0;
    console_show(&s->console, "%s: %s", s->solver->name, what);
}

static status make_plan(const solve_options *o, const problem_request *request, solve_state *s)
{
    TRY(problem_create(request, true, &s->problem));
    double start = clock_seconds();
    console_show(&s->console, "%s: planning %d layers of %d experts on %d ranks, up to %.0f s", s->solver->name,
                 s->problem->n_layers, s->problem->n_experts, s->problem->n_ranks, o->seconds);
    TRY(solver_run(s->solver, s->problem, &s->report, &s->made));
    s->solve_seconds = clock_seconds() - start;
    if (o->name)
        snprintf(s->made.name, sizeof s->made.name, "%s", o->name);
    s->made.epoch = o->epoch;
    return STATUS_OK;
}

static status judge_plan(const solve_options *o, const problem_request *request, solve_state *s)
{
    const problem *p = s->problem;
    plan_shape shape = {
        .n_ranks = p->n_ranks, .n_experts = p->n_experts, .n_layers = p->n_layers, .layer_numbers = p->layer_numbers};
    TRY(plan_contiguous(&shape, p->topology->node_of_rank, &s->contiguous));
    TRY(score_plan(p, &s->made, &s->score));
    TRY(score_plan(p, &s->contiguous, &s->contiguous_score));
    if (o->bounds != 2) {
        show_stage(s, "lower bounds");
        unsigned which = BOUND_LOAD | BOUND_RANKS | BOUND_STEP | (o->bounds == 1 ? BOUND_SPECTRAL | BOUND_MATCHING : 0);
        TRY(bounds_compute(p, which, o->bound_seconds, &s->bounds));
        s->has_bounds = true;
    }
    if (o->folds == 0 || !p->traffic || !p->schedule)
        return STATUS_OK;
    double start = clock_seconds();
    show_stage(s, "planning again for held-out traffic");
    TRY(held_out_run(s->solver, request, (int)o->folds, (fold_kind)o->fold_by, &s->held, s->held_why, sizeof s->held_why));
    s->fold_seconds = clock_seconds() - start;
    return STATUS_OK;
}

/* ---- what is said ---- */

static void print_gap(const solve_state *s)
{
    if (!s->has_bounds)
        return;
    double gap = s->score.has_replay && s->bounds.step_us > 0 ? s->score.replay.step_us / s->bounds.step_us - 1
                                                              : s->score.max_over_mean_mean / s->bounds.balance - 1;
    printf("gap: %s is at most %.1f %% above the best there could be%s%s%s\n",
           s->score.has_replay && s->bounds.step_us > 0 ? "the step time" : "the balance", gap * 100,
           gap > 0.05 ? ": a large gap" : "", *s->bounds.remark ? "; " : "", s->bounds.remark);
}

static void print_held(const solve_options *o, const solve_state *s)
{
    if (s->held.n_folds)
        printf("held out (%d folds by %s, each scored under a plan made from the others): step %.3fx contiguous (fitted %.3fx, "
               "worst "
               "fold %.3fx), max/mean %.3f (fitted %.3f), drift between the parts %.3f\n",
               s->held.n_folds, o->fold_by == FOLD_BY_DOMAIN ? "domain" : "time", s->held.held, s->held.fitted,
               s->held.held_worst, s->held.balance_held, s->held.balance_fitted, s->held.drift);
    else if (*s->held_why)
        printf("held out: nothing, because %s\n", s->held_why);
}

static void print_result(const solve_options *o, const solve_state *s)
{
    const problem *p = s->problem;
    printf("%d layers of %d experts on %d ranks (%d nodes), %s, solver %s: %.2f s%s\n", p->n_layers, p->n_experts, p->n_ranks,
           p->topology->n_nodes, p->schedule ? "priced by replay" : "priced by balance and flow", s->solver->name,
           s->solve_seconds, s->report.out_of_time ? " (stopped by the clock: more seconds may give more)" : "");
    if (*s->report.remark)
        printf("%s: %s\n", s->solver->name, s->report.remark);
    if (s->report.glpk_runs)
        printf("glpk: %d models, %d proved optimal, %d better than their seed\n", s->report.glpk_runs, s->report.glpk_proved,
               s->report.glpk_improved);
    scored_plan lines[] = {{"contiguous", &s->contiguous_score}, {s->made.name, &s->score}};
    const plan_bounds *bounds = s->has_bounds ? &s->bounds : NULL;
    score_print_table(stdout, lines, 2, bounds);
    score_print_bars(stdout, lines, 2, bounds);
    score_print_misfit(stdout, p, &s->contiguous);
    print_gap(s);
    print_held(o, s);
    if (o->output)
        printf("%s: written\n", o->output);
}

static status print_json(const solve_state *s)
{
    cJSON *root = cJSON_CreateObject(), *held = cJSON_AddObjectToObject(root, "held_out");
    cJSON_AddStringToObject(root, "solver", s->solver->name);
    cJSON_AddStringToObject(root, "remark", s->report.remark);
    cJSON_AddBoolToObject(root, "out_of_time", s->report.out_of_time);
    json_put_number(root, "seconds", s->solve_seconds);
    cJSON_AddItemToObject(root, "score", score_to_json(&s->score));
    cJSON_AddItemToObject(root, "contiguous", score_to_json(&s->contiguous_score));
    cJSON_AddItemToObject(root, "bound", bounds_to_json(s->has_bounds ? &s->bounds : NULL));
    json_put_number(held, "folds", s->held.n_folds);
    json_put_number(held, "step_over_contiguous", s->held.n_folds ? s->held.held : NAN);
    json_put_number(held, "fitted_step_over_contiguous", s->held.n_folds ? s->held.fitted : NAN);
    json_put_number(held, "max_over_mean_mean", s->held.n_folds ? s->held.balance_held : NAN);
    json_put_number(held, "drift", s->held.n_folds ? s->held.drift : NAN);
    char *text = cJSON_PrintUnformatted(root);
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
    return text ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory to print the result");
}

static status score_other_trace(const solve_options *o, const solve_state *s)
{
    solve_options other = *o;
    other.in.stats = NULL;
    other.in.has_traffic = false;
    other.in.traffic = (traffic){0};
    other.in.topology = (topology){0};
    other.in.stats_path = NULL;
    other.in.trace_path = o->held_path;
    plan_score score = {0}, contiguous = {0};
    problem *p = NULL;
    status st;
    TRY_GOTO(inputs_load(&other.in, NULL), out);
    problem_request request = inputs_request(&other.in);
    request.extra_slots = (int)o->extra_slots;
    TRY_GOTO(problem_create(&request, true, &p), out);
    TRY_GOTO(problem_check(p, &s->made, false), out);
    TRY_GOTO(score_plan(p, &s->made, &score), out);
    TRY_GOTO(score_plan(p, &s->contiguous, &contiguous), out);
    printf("\non %s, which the plan was not made from:\n", o->held_path);
    score_print_table(stdout, (scored_plan[]){{"contiguous", &contiguous}, {s->made.name, &score}}, 2, NULL);
out:
    score_clear(&score);
    score_clear(&contiguous);
    problem_destroy(p);
    inputs_clear(&other.in);
    return st;
}

static status write_outputs(const solve_options *o, const solve_state *s)
{
    const plan_inputs *in = &o->in;
    const routing_shape *shape = in->has_traffic ? &in->traffic.shape : routing_stats_shape(in->stats);
    char source[1024];
    snprintf(source, sizeof source, "%s%s%s on %s", in->stats_path ? in->stats_path : "",
             in->stats_path && in->trace_path ? " and " : "", in->trace_path ? in->trace_path : "",
             in->topology_path ? in->topology_path : "uniform ranks");
    plan_provenance provenance = {.model = o->model        ? o->model
                                           : *shape->model ? shape->model
                                                           : NULL,
                                  .solver = s->solver,
                                  .report = &s->report,
                                  .score = &s->score,
                                  .bounds = s->has_bounds ? &s->bounds : NULL,
                                  .source = source};
    if (o->output)
        TRY(plan_file_write(s->problem, &s->made, &provenance, o->output));
    if (o->picture)
        TRY(score_write_picture(o->picture, (scored_plan[]){{"contiguous", &s->contiguous_score}, {s->made.name, &s->score}}, 2,
                                s->has_bounds ? &s->bounds : NULL));
    return STATUS_OK;
}

/* What would fail once the plan is made fails before. */
static status check_outputs(const solve_options *o)
{
    if (o->output)
        TRY(file_replace_check(o->output));
    if (o->picture && !o->in.trace_path)
        return status_fail(STATUS_USAGE, "%s: a picture needs a trace to replay", o->picture);
    if (o->folds == 1)
        return status_fail(STATUS_USAGE, "--folds: one part alone leaves nothing to plan from; 0 for none, or 2 and more");
    if (o->held_path && o->json)
        return status_fail(STATUS_USAGE, "--held-out prints a second table: without --json, or score the plan on it by itself");
    return o->held_path && access(o->held_path, R_OK) != 0
               ? status_fail(STATUS_IO, "%s: cannot be opened (%s)", o->held_path, strerror(errno))
               : STATUS_OK;
}

static status solve(solve_options *o, solve_state *s)
{
    problem_request request;
    double slack;
    TRY(check_outputs(o));
    TRY(find_solver(o->solver_name, &s->solver));
    TRY(inputs_parse_slack(o->in.slack_text, &slack));
    TRY(inputs_load(&o->in, NULL));
    request = inputs_request(&o->in);
    request.slack = slack;
    request.extra_slots = (int)o->extra_slots;
    request.seconds = o->seconds;
    request.work = o->work;
    if (o->seed_path) {
        TRY(plan_read(o->seed_path, NULL, &s->seed));
        request.seed = &s->seed;
    }
    TRY(make_plan(o, &request, s));
    request.seed = NULL; /* it may have seen what a fold holds out */
    TRY(judge_plan(o, &request, s));
    console_erase(&s->console);
    TRY(write_outputs(o, s));
    if (o->json)
        return print_json(s);
    print_result(o, s);
    return o->held_path ? score_other_trace(o, s) : STATUS_OK;
}

status command_solve(int argc, char **argv)
{
    solve_options o = {0};
    solve_state s = {0};
    bool run;
    TRY(parse(argc, argv, &o, &run));
    if (!run)
        return STATUS_OK;
    if (strcmp(o.solver_name, "list") == 0) {
        list_solvers();
        return STATUS_OK;
    }
    console_open(&s.console, STDERR_FILENO);
    status st = solve(&o, &s);
    console_erase(&s.console);
    problem_destroy(s.problem);
    plan_clear(&s.seed);
    plan_clear(&s.made);
    plan_clear(&s.contiguous);
    score_clear(&s.score);
    score_clear(&s.contiguous_score);
    bounds_clear(&s.bounds);
    inputs_clear(&o.in);
    return st;
}
