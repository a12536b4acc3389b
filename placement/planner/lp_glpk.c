/* What a child does: builds GLPK's problem from the model and solves it. The only file that knows GLPK.
 *
 * GLPK calls abort() on arguments it dislikes; here the error hook keeps its last words and ends the child instead. Everything
 * it would print goes to a hook that swallows it. Memory is not given back: the child ends. */
#include "placement/planner/lp_private.h"

#include <glpk.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    const lp_model *model;
    const lp_options *options;
    lp_shared *shared;
    glp_prob *problem;
    bool offered; /* the starting point has been */
} glpk_task;

static int keep_words(void *info, const char *text)
{
    lp_shared *s = info;
    size_t at = strlen(s->words), room = sizeof s->words - 1 - at;
    for (size_t i = 0; text[i] && room > 0; i++) {
        bool blank = text[i] == '\n' || text[i] == ' ';
        if (blank && (at == 0 || s->words[at - 1] == ' '))
            continue;
        s->words[at++] = blank ? ' ' : text[i];
        room--;
    }
    s->words[at] = '\0';
    return 1;
}

static void end_child(void *info)
{
    (void)info;
    _exit(1);
}

static void set_bounds(glp_prob *p, int at, double low, double high, void (*set)(glp_prob *, int, int, double, double))
{
    bool below = low > -LP_INF, above = high < LP_INF;
    int type = below && above ? (low == high ? GLP_FX : GLP_DB) : below ? GLP_LO : above ? GLP_UP : GLP_FR;
    set(p, at, type, low, high);
}

static glp_prob *build(const lp_model *m)
{
    glp_prob *p = glp_create_prob();
    if (m->n_columns > 0)
        glp_add_cols(p, m->n_columns);
    if (m->n_rows > 0)
        glp_add_rows(p, m->n_rows);
    glp_set_obj_coef(p, 0, m->constant);
    for (int j = 0; j < m->n_columns; j++) {
        const lp_column *c = &m->columns[j];
        if (c->integer)
            glp_set_col_kind(p, j + 1, GLP_IV);
        set_bounds(p, j + 1, c->low, c->high, glp_set_col_bnds);
        glp_set_obj_coef(p, j + 1, c->cost);
    }
    for (int i = 0; i < m->n_rows; i++)
        set_bounds(p, i + 1, m->rows[i].low, m->rows[i].high, glp_set_row_bnds);
    size_t n = m->n_entries;
    int *rows = malloc((n + 1) * sizeof *rows), *columns = malloc((n + 1) * sizeof *columns);
    double *values = malloc((n + 1) * sizeof *values);
    if (!rows || !columns || !values || n > INT_MAX)
        glp_error("no memory for a model of %.0f entries", (double)n);
    for (size_t i = 0; i < n; i++) {
        rows[i + 1] = m->entries[i].row + 1;
        columns[i + 1] = m->entries[i].column + 1;
        values[i + 1] = m->entries[i].value;
    }
    glp_load_matrix(p, (int)n, rows, columns, values);
    free(rows);
    free(columns);
    free(values);
    return p;
}

/* ---- results into shared memory ------------------------------------------------------------------------------------------- */

static void record_point(glpk_task *t, double objective, double (*value)(glp_prob *, int))
{
    lp_shared *s = t->shared;
    int half = s->point_at == 0 ? 1 : 0;
    int n = glp_get_num_cols(t->problem);
    for (int j = 0; j < n; j++) {
        double x = value(t->problem, j + 1);
        s->x[half][j] = value == glp_mip_col_val && glp_get_col_kind(t->problem, j + 1) != GLP_CV ? round(x) : x;
    }
    s->objective[half] = objective;
    s->point_at = half;
}

static void record_duals(glpk_task *t)
{
    lp_shared *s = t->shared;
    int half = s->duals_at == 0 ? 1 : 0;
    int n = glp_get_num_rows(t->problem);
    for (int i = 0; i < n; i++)
        s->duals[half][i] = glp_get_row_dual(t->problem, i + 1);
    s->duals_at = half;
}

/* ---- linear programmes ---------------------------------------------------------------------------------------------------- */

static int pivots_left(const glpk_task *t)
{
    if (t->options->pivots <= 0)
        return INT_MAX;
    int64_t left = t->options->pivots - glp_get_it_cnt(t->problem);
    return left <= 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}

/* From the basis there is; after numerical trouble once more from the slack basis, by the dual method. */
static int simplex(glpk_task *t, int method)
{
    glp_smcp parm;
    glp_init_smcp(&parm);
    parm.msg_lev = GLP_MSG_OFF;
    parm.meth = method;
    int code = 0;
    for (int tries = 0; tries < 2; tries++) {
        parm.it_lim = pivots_left(t);
        code = glp_simplex(t->problem, &parm);
        if (code != GLP_EBADB && code != GLP_ESING && code != GLP_ECOND && code != GLP_EFAIL)
            break;
        glp_std_basis(t->problem);
        parm.meth = GLP_DUALP;
    }
    t->shared->pivots = glp_get_it_cnt(t->problem);
    return code;
}

/* LP_OPTIMAL, LP_INFEASIBLE, or LP_NOTHING: stopped before either was known. */
static lp_outcome solve_relaxation(glpk_task *t)
{
    glp_term_out(GLP_OFF); /* both chat; else the hook must hear what goes wrong */
    glp_scale_prob(t->problem, GLP_SF_AUTO);
    glp_adv_basis(t->problem, 0);
    glp_term_out(GLP_ON);
    simplex(t, GLP_PRIMAL);
    int state = glp_get_status(t->problem);
    if (state == GLP_OPT)
        return LP_OPTIMAL;
    return state == GLP_NOFEAS ? LP_INFEASIBLE : LP_NOTHING;
}

static lp_outcome finish_relaxation(glpk_task *t, lp_outcome outcome)
{
    if (outcome == LP_OPTIMAL) {
        record_point(t, glp_get_obj_val(t->problem), glp_get_col_prim);
        record_duals(t);
        t->shared->bound = glp_get_obj_val(t->problem);
    } else if (outcome == LP_NOTHING && glp_get_prim_stat(t->problem) == GLP_FEAS) {
        if (t->shared->point_at < 0 || glp_get_obj_val(t->problem) < t->shared->objective[t->shared->point_at])
            record_point(t, glp_get_obj_val(t->problem), glp_get_col_prim);
    }
    return outcome == LP_NOTHING && t->shared->point_at >= 0 ? LP_FEASIBLE : outcome;
}

/* ---- integer programmes --------------------------------------------------------------------------------------------------- */

static void offer_start(glpk_task *t, glp_tree *tree)
{
    t->offered = true;
    if (!t->options->start)
        return;
    double *x = malloc(((size_t)t->model->n_columns + 1) * sizeof *x);
    if (!x)
        return;
    memcpy(x + 1, t->options->start, (size_t)t->model->n_columns * sizeof *x);
    for (int j = 0; j < t->model->n_columns; j++)
        if (t->model->columns[j].integer)
            x[j + 1] = round(x[j + 1]); /* GLPK wants them whole to the last bit */
    glp_ios_heur_sol(tree, x);
    free(x);
}

/* At every turn, not at GLP_IBINGO alone: what GLPK's own rounding finds is announced nowhere. */
static void keep_incumbent(glpk_task *t)
{
    const lp_shared *s = t->shared;
    int state = glp_mip_status(t->problem);
    if ((state == GLP_FEAS || state == GLP_OPT) && (s->point_at < 0 || glp_mip_obj_val(t->problem) < s->objective[s->point_at]))
        record_point(t, glp_mip_obj_val(t->problem), glp_mip_col_val);
}

static void watch(glp_tree *tree, void *info)
{
    glpk_task *t = info;
    lp_shared *s = t->shared;
    int total = 0;
    glp_ios_tree_size(tree, NULL, NULL, &total);
    s->nodes = total;
    s->pivots = glp_get_it_cnt(t->problem);
    int best = glp_ios_best_node(tree);
    if (best > 0 && glp_ios_node_bound(tree, best) > s->bound)
        s->bound = glp_ios_node_bound(tree, best);
    keep_incumbent(t);
    switch (glp_ios_reason(tree)) {
    case GLP_IHEUR:
        if (!t->offered)
            offer_start(t, tree);
        break;
    case GLP_ISELECT:
        if ((t->options->nodes > 0 && total > t->options->nodes) || (t->options->pivots > 0 && s->pivots >= t->options->pivots))
            glp_ios_terminate(tree);
        break;
    }
}

/* Needs the root's optimal basis: GLPK takes a starting point only without its presolver. */
static lp_outcome branch_and_bound(glpk_task *t)
{
    glp_iocp parm;
    glp_init_iocp(&parm);
    parm.msg_lev = GLP_MSG_OFF;
    parm.br_tech = t->options->pseudocosts ? GLP_BR_PCH : GLP_BR_DTH;
    parm.mip_gap = t->options->gap;
    parm.cb_func = watch;
    parm.cb_info = t;
    if (t->options->cuts)
        parm.mir_cuts = parm.gmi_cuts = parm.cov_cuts = parm.clq_cuts = GLP_ON;
    int code = glp_intopt(t->problem, &parm);
    keep_incumbent(t);
    lp_shared *s = t->shared;
    s->pivots = glp_get_it_cnt(t->problem);
    if (code == 0 && s->point_at >= 0) {
        s->bound = s->objective[s->point_at]; /* nothing is left open */
        return LP_OPTIMAL;
    }
    if (code == 0)
        return LP_INFEASIBLE;
    if (code == GLP_EMIPGAP && s->point_at >= 0)
        return LP_OPTIMAL;
    return s->point_at >= 0 ? LP_FEASIBLE : LP_NOTHING;
}

/* ---- column generation ---------------------------------------------------------------------------------------------------- */

struct lp_columns {
    const lp_pricing *pricing;
    lp_shared *shared;
    int n; /* in this round */
};

bool lp_columns_add(lp_columns *found, double cost, int n, const int *rows, const double *values)
{
    lp_shared *s = found->shared;
    int at = s->n_generated;
    if (found->n >= found->pricing->columns_per_round || at >= found->pricing->max_columns ||
        n > found->pricing->entries_per_column)
        return false;
    size_t first = (size_t)at * (size_t)found->pricing->entries_per_column;
    memcpy(s->gen_rows + first, rows, (size_t)n * sizeof *rows);
    memcpy(s->gen_values + first, values, (size_t)n * sizeof *values);
    s->gen_counts[at] = n;
    s->gen_costs[at] = cost;
    s->n_generated = at + 1;
    found->n++;
    return true;
}

static void add_generated(glpk_task *t, const lp_pricing *pricing, int first, int *rows, double *values)
{
    const lp_shared *s = t->shared;
    int n = s->n_generated - first, at = glp_add_cols(t->problem, n);
    for (int i = first; i < first + n; i++, at++) {
        size_t from = (size_t)i * (size_t)pricing->entries_per_column;
        for (int k = 0; k < s->gen_counts[i]; k++) {
            rows[k + 1] = s->gen_rows[from + (size_t)k] + 1;
            values[k + 1] = s->gen_values[from + (size_t)k];
        }
        glp_set_col_bnds(t->problem, at, GLP_LO, 0, 0);
        glp_set_obj_coef(t->problem, at, s->gen_costs[i]);
        glp_set_mat_col(t->problem, at, s->gen_counts[i], rows, values);
    }
}

static lp_outcome generate_columns(glpk_task *t, const lp_pricing *pricing)
{
    lp_shared *s = t->shared;
    size_t width = (size_t)pricing->entries_per_column + 1, n_rows = (size_t)t->model->n_rows + 1;
    int *rows = malloc(width * sizeof *rows);
    double *values = malloc(width * sizeof *values), *duals = malloc(n_rows * sizeof *duals);
    if (!rows || !values || !duals)
        glp_error("no memory to generate columns");
    lp_outcome outcome = solve_relaxation(t);
    while (outcome == LP_OPTIMAL) {
        double objective = glp_get_obj_val(t->problem);
        record_point(t, objective, glp_get_col_prim);
        for (int i = 0; i < t->model->n_rows; i++)
            duals[i] = glp_get_row_dual(t->problem, i + 1);
        int first = s->n_generated;
        lp_columns found = {.pricing = pricing, .shared = s};
        double bound = pricing->price(pricing->arg, duals, &found);
        if (s->duals_at < 0 || bound > s->bound) {
            record_duals(t);
            s->bound = bound;
        }
        s->nodes = s->nodes + 1;
        if (found.n == 0 || s->bound >= objective - 1e-9 * fabs(objective))
            break;
        add_generated(t, pricing, first, rows, values);
        if (s->n_generated >= pricing->max_columns || pivots_left(t) == 0)
            outcome = LP_FEASIBLE;
        else if (simplex(t, GLP_PRIMAL) != 0 || glp_get_status(t->problem) != GLP_OPT)
            outcome = LP_NOTHING;
    }
    return outcome == LP_NOTHING && s->point_at >= 0 ? LP_FEASIBLE : outcome;
}

void lp_glpk_run(const lp_model *m, const lp_pricing *pricing, const lp_options *options, lp_shared *shared)
{
    glp_term_hook(keep_words, shared);
    glp_error_hook(end_child, shared);
    glpk_task t = {.model = m, .options = options, .shared = shared, .problem = build(m)};
    if (pricing) {
        shared->outcome = generate_columns(&t, pricing);
        return;
    }
    lp_outcome outcome = solve_relaxation(&t);
    if (options->relax || glp_get_num_int(t.problem) == 0) {
        shared->outcome = finish_relaxation(&t, outcome);
    } else if (outcome == LP_OPTIMAL) {
        shared->bound = glp_get_obj_val(t.problem);
        shared->outcome = branch_and_bound(&t);
    } else {
        shared->outcome = outcome == LP_NOTHING && shared->point_at >= 0 ? LP_FEASIBLE : outcome;
    }
}
