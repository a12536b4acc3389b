/* solver_craft.c - replicas go to the layers where they even out the load most.
 *
 * Room for replicas is worth little in a layer whose load is even and much in a skewed one. For every layer a curve says how even
 * it gets with 0, 1, 2 .. further places on every rank (replicate.h); a multiple-choice knapsack, solved exactly by dynamic
 * programming over the places a rank has in all layers together, takes one point of each curve. Ties take fewer places. */
#include "placement/planner/assign.h"
#include "placement/planner/replicate.h"
#include "placement/planner/score.h"
#include "placement/planner/start.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PLACES = 8 }; /* per rank and layer: beyond, curves are flat */

typedef struct {
    const problem *p;
    bool traded;   /* ranks are alike, so places may go from layer to layer */
    int n_options; /* 1 + most further places */
    int budget;    /* further places of a rank, all layers */
    double *curve; /* [n_layers][n_options] */
    int *chosen;   /* [n_layers] */
    bool *quick;   /* [n_layers] neither work nor time was left: no replicas */
    work_budget work;
    int *home;
    bool *holds;
} crafting;

static int fewest_per_rank(const problem *p)
{
    return (p->n_experts + p->n_ranks - 1) / p->n_ranks;
}

/* Places are only traded between layers where all ranks have the same. */
static void weigh_room(crafting *c)
{
    const problem *p = c->p;
    int fewest = fewest_per_rank(p);
    c->traded = true;
    for (int i = 0; i < p->n_layers * p->n_ranks; i++)
        c->traded &= p->slots[i] == p->slots[i / p->n_ranks * p->n_ranks] && p->slots[i] >= fewest;
    for (int g = 1; g < p->n_ranks; g++)
        c->traded &= p->total_slots[g] == p->total_slots[0];
    c->budget = c->traded ? p->total_slots[0] - p->n_layers * fewest : 0;
    c->traded &= c->budget > 0;
    int most = p->n_experts - fewest < MOST_PLACES ? p->n_experts - fewest : MOST_PLACES;
    c->n_options = c->traded ? 1 + (c->budget < most ? c->budget : most) : 1;
}

/* A layer without replicas: what replicas must beat, for they cost memory, and all that there is when no work is left. */
static status place_singly(const problem *p, int l, const int *slots, int *home, bool *holds, double *worst)
{
    *worst = assign_lpt(p->n_experts, p->n_ranks, p->load + problem_at(p, l, 0), p->share, slots, home);
    if (*worst < 0)
        return status_fail(STATUS_NO_MEMORY, "no memory to place %d experts", p->n_experts);
    memset(holds, 0, (size_t)p->n_experts * (size_t)p->n_ranks * sizeof *holds);
    return STATUS_OK;
}

static status place_layer(crafting *c, int l, int option, int *home, bool *holds, double *worst)
{
    const problem *p = c->p;
    int *slots = malloc((size_t)p->n_ranks * sizeof *slots), room = 0;
    if (!slots)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    for (int g = 0; g < p->n_ranks; g++) {
        slots[g] = c->traded ? fewest_per_rank(p) + option : p->slots[(size_t)l * (size_t)p->n_ranks + (size_t)g];
        room += slots[g] < p->n_experts ? slots[g] : p->n_experts;
    }
    double singly;
    status st = place_singly(p, l, slots, home, holds, &singly);
    *worst = singly;
    if (st == STATUS_OK && room > p->n_experts && !c->quick[l]) {
        st = replicate_layer(p, l, slots, true, home, holds, worst);
        if (st == STATUS_OK && *worst >= singly)
            st = place_singly(p, l, slots, home, holds, worst);
    }
    free(slots);
    return st;
}

/* A slack that was given comes before everything else. */
static double priced(const problem *p, double worst)
{
    double over = p->request->slack >= 0 ? worst - (1 + p->request->slack) : 0;
    return over > 1e-9 ? worst + 1000 * over : worst;
}

static status draw_curve(void *arg, int l)
{
    crafting *c = arg;
    const problem *p = c->p;
    size_t experts = (size_t)p->n_experts;
    int *home = malloc(experts * sizeof *home);
    bool *holds = malloc(experts * (size_t)p->n_ranks * sizeof *holds);
    double *curve = c->curve + (size_t)l * (size_t)c->n_options;
    work_budget work = work_part(&c->work, l, p->n_layers);
    status st = STATUS_OK;
    if (!home || !holds)
        st = status_fail(STATUS_NO_MEMORY, "no memory to replicate %d experts", p->n_experts);
    c->quick[l] = !work_take(&work, 2 * p->n_experts); /* to weigh it and, once chosen, to place it */
    for (int i = 0; st == STATUS_OK && i < c->n_options; i++) {
        curve[i] = i > 0 ? curve[i - 1] : INFINITY;
        if (i == 0 || (curve[i - 1] > 1.0005 && work_take(&work, p->n_experts))) { /* else it is even already */
            double worst;
            st = place_layer(c, l, i, home, holds, &worst);
            worst = priced(p, worst);
            curve[i] = worst < curve[i] ? worst : curve[i];
        }
    }
    free(home);
    free(holds);
    return st;
}

/* best [n_layers + 1][budget + 1]: the least sum of the layers from l on with b places left. */
static status choose(crafting *c)
{
    int n = c->p->n_layers, width = c->budget + 1;
    double *best = calloc((size_t)(n + 1) * (size_t)width, sizeof *best);
    if (!best)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d layers", n);
    for (int l = n - 1; l >= 0; l--)
        for (int b = 0; b <= c->budget; b++) {
            double *at = best + (size_t)l * (size_t)width + (size_t)b;
            *at = INFINITY;
            for (int i = 0; i < c->n_options && i <= b; i++)
                *at = fmin(*at, c->curve[l * c->n_options + i] + best[(size_t)(l + 1) * (size_t)width + (size_t)(b - i)]);
        }
    for (int l = 0, b = c->budget; l < n; l++) {
        double goal = best[(size_t)l * (size_t)width + (size_t)b];
        int i = 0;
        while (c->curve[l * c->n_options + i] + best[(size_t)(l + 1) * (size_t)width + (size_t)(b - i)] > goal)
            i++;
        c->chosen[l] = i;
        b -= i;
    }
    free(best);
    return STATUS_OK;
}

/* The first option whose curve is as low: a worse packing with more places is not drawn twice. */
static status place_chosen(void *arg, int l)
{
    crafting *c = arg;
    double worst;
    size_t first = problem_at(c->p, l, 0);
    const double *curve = c->curve + (size_t)l * (size_t)c->n_options;
    while (c->chosen[l] > 0 && curve[c->chosen[l] - 1] <= curve[c->chosen[l]])
        c->chosen[l]--;
    return place_layer(c, l, c->chosen[l], c->home + first, c->holds + first * (size_t)c->p->n_ranks, &worst);
}

static void remark(const crafting *c, solver_report *report)
{
    int layers = 0, places = 0;
    for (int l = 0; l < c->p->n_layers; l++) {
        layers += c->chosen[l] > 0;
        places += c->chosen[l];
    }
    if (c->traded)
        snprintf(report->remark, sizeof report->remark, "%d of %d further places per rank used, in %d of %d layers", places,
                 c->budget, layers, c->p->n_layers);
}

static status solve(const problem *p, solver_report *report, plan *out)
{
    crafting c = {.p = p, .work = work_start(p, INT64_MAX / 2)};
    weigh_room(&c);
    size_t n_lists = problem_at(p, p->n_layers, 0);
    plan made = {0};
    status st = STATUS_OK;
    c.curve = malloc((size_t)p->n_layers * (size_t)c.n_options * sizeof *c.curve);
    c.chosen = calloc((size_t)p->n_layers, sizeof *c.chosen);
    c.quick = calloc((size_t)p->n_layers, sizeof *c.quick);
    c.home = malloc(n_lists * sizeof *c.home);
    c.holds = malloc(n_lists * (size_t)p->n_ranks * sizeof *c.holds);
    if (!c.curve || !c.chosen || !c.quick || !c.home || !c.holds)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "no memory for a plan of %zu experts", n_lists), out);
    TRY_GOTO(parallel_for(p->request->threads, p->n_layers, draw_curve, &c), out);
    TRY_GOTO(choose(&c), out);
    TRY_GOTO(parallel_for(p->request->threads, p->n_layers, place_chosen, &c), out);
    TRY_GOTO(problem_plan_replicas(p, solver_craft.name, c.home, c.holds, &made), out);
    remark(&c, report);
    st = start_keep_seed(&solver_craft, p, &made, report, out);
out:
    free(c.curve);
    free(c.chosen);
    free(c.quick);
    free(c.home);
    free(c.holds);
    return st;
}

static status measure(const problem *p, const plan *made, double *out)
{
    *out = score_balance(p, made, NULL, NULL);
    return STATUS_OK;
}

const solver solver_craft = {
    .name = "craft",
    .summary = "gives replicas to the layers where they even out most (exact knapsack)",
    .paper = "CRAFT: cost-aware expert replica allocation with fine-grained layerwise estimations",
    .objective = "busiest rank's planned rows over its share, mean over layers",
    .flags = SOLVER_REPLICATES | SOLVER_TOTALS,
    .solve = solve,
    .measure = measure,
};
