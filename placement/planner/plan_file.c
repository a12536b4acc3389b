#include "placement/planner/plan_file.h"
#include "placement/planner/score_print.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void put_solver(cJSON *root, const plan_provenance *v)
{
    cJSON *o = cJSON_AddObjectToObject(root, "solver");
    cJSON_AddStringToObject(o, "name", v->solver->name);
    cJSON_AddStringToObject(o, "objective", v->solver->objective);
    cJSON_AddStringToObject(o, "paper", v->solver->paper);
    const solver_report *r = v->report;
    if (!r)
        return;
    json_put_number(o, "value", r->objective);
    json_put_number(o, "value_bound", r->bound);
    json_put_number(o, "seed_value", r->seed_objective);
    json_put_number(o, "work", (double)r->work);
    cJSON_AddBoolToObject(o, "out_of_time", r->out_of_time);
    json_put_number(o, "glpk_runs", r->glpk_runs);
    json_put_number(o, "glpk_proved", r->glpk_proved);
    json_put_number(o, "glpk_improved", r->glpk_improved);
    cJSON_AddStringToObject(o, "remark", r->remark);
}

static double gap_of(const plan_provenance *v)
{
    const plan_bounds *b = v->bounds;
    if (!b)
        return NAN;
    if (v->score->has_replay && b->step_us > 0)
        return v->score->replay.step_us / b->step_us - 1;
    return b->balance > 0 ? v->score->max_over_mean_mean / b->balance - 1 : NAN;
}

static void put_counts(cJSON *root, const problem *p)
{
    cJSON *layers = cJSON_AddArrayToObject(root, "tokens_per_expert");
    for (int l = 0; l < p->n_layers; l++) {
        cJSON *list = cJSON_CreateArray();
        for (int e = 0; list && e < p->n_experts; e++)
            cJSON_AddItemToArray(list, cJSON_CreateNumber(p->load[problem_at(p, l, e)]));
        cJSON_AddItemToArray(layers, list);
    }
}

status plan_file_write(const problem *p, const plan *made, const plan_provenance *provenance, const char *path)
{
    cJSON *root = cJSON_CreateObject();
    if (!root)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to write it", path);
    if (provenance->solver)
        put_solver(root, provenance);
    cJSON_AddItemToObject(root, "score", score_to_json(provenance->score));
    cJSON_AddItemToObject(root, "bound", bounds_to_json(provenance->bounds));
    json_put_number(root, "gap", gap_of(provenance));
    cJSON_AddStringToObject(root, "made_from", provenance->source ? provenance->source : "");
    put_counts(root, p);
    status st = plan_write_beside(made, provenance->model, root, path);
    cJSON_Delete(root);
    return st;
}
