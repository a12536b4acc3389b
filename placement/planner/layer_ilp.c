#include "placement/planner/layer_ilp.h"
#include "placement/planner/flow_cost.h"

#include <stdlib.h>
#include <string.h>

enum { JOINT_MOST_COLUMNS = 2500 };

/* Rows that place one layer's experts; its columns start at `first`. Caps are divided by themselves: coefficients near one. */
static void add_layer_rows(const problem *p, int layer, const double *cap, int first, lp_model *m)
{
    const int *slots = p->slots + (size_t)layer * (size_t)p->n_ranks;
    int sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        sum += slots[g];
    for (int e = 0; e < p->n_experts; e++) {
        int row = lp_add_row(m, 1, 1);
        for (int g = 0; g < p->n_ranks; g++)
            lp_set(m, row, first + e * p->n_ranks + g, 1);
    }
    for (int g = 0; g < p->n_ranks; g++) {
        int room = lp_add_row(m, sum == p->n_experts ? slots[g] : 0, slots[g]);
        for (int e = 0; e < p->n_experts; e++)
            lp_set(m, room, first + e * p->n_ranks + g, 1);
    }
    for (int g = 0; g < p->n_ranks; g++) {
        if (p->rows[layer] <= 0 || cap[g] >= p->rows[layer])
            continue;
        int load = lp_add_row(m, -LP_INF, 1);
        for (int e = 0; e < p->n_experts; e++)
            lp_set(m, load, first + e * p->n_ranks + g, p->load[problem_at(p, layer, e)] / cap[g]);
    }
}

static status finished(lp_model *m, lp_model **out)
{
    if (lp_failed(m)) {
        lp_destroy(m);
        return status_fail(STATUS_NO_MEMORY, "no memory for an integer programme");
    }
    *out = m;
    return STATUS_OK;
}

status layer_ilp_create(const problem *p, int layer, const double *cost, const double *cap, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    for (int i = 0; i < p->n_experts * p->n_ranks; i++)
        lp_add_column(m, 0, 1, cost[i] * LAYER_ILP_SCALE, true);
    add_layer_rows(p, layer, cap, 0, m);
    return finished(m, out);
}

void layer_ilp_start(const problem *p, const int *home, double *x)
{
    memset(x, 0, (size_t)p->n_experts * (size_t)p->n_ranks * sizeof *x);
    for (int e = 0; e < p->n_experts; e++)
        x[e * p->n_ranks + home[e]] = 1;
}

void layer_ilp_take(const problem *p, const double *x, int *home)
{
    for (int e = 0; e < p->n_experts; e++)
        for (int g = 0; g < p->n_ranks; g++)
            if (x[e * p->n_ranks + g] > 0.5)
                home[e] = g;
}

/* ---- all layers ---- */

/* What a unit of flow saves when it stays on a rank beside staying on its node, and on its node beside leaving it. */
typedef struct {
    bool known; /* links differ by nothing but class */
    double on_rank, on_node, far;
} savings;

static savings find_savings(const problem *p)
{
    savings s = {true, 0, 0, 0};
    double near = 0, far = 0;
    for (int g = 0; g < p->n_ranks; g++)
        for (int h = 0; h < p->n_ranks; h++) {
            double *class = topology_link(p->topology, g, h) == LINK_CROSS_NODE ? &far : &near;
            double distance = p->distance[g * p->n_ranks + h];
            if (g == h)
                continue;
            s.known = s.known && (*class == 0 || *class == distance);
            *class = distance;
        }
    if (far == 0)
        far = near;
    if (near == 0)
        near = far; /* a rank per node */
    s.known = s.known && near <= far;
    s.on_rank = near;
    s.on_node = far - near;
    s.far = far;
    return s;
}

/* Places that a pair of experts may share: ranks, then nodes where staying on one saves something. */
static int n_places(const problem *p, const savings *s)
{
    return p->n_ranks + (s->on_node > 0 ? p->topology->n_nodes : 0);
}

static size_t first_shared(const problem *p)
{
    return (size_t)p->n_layers * (size_t)p->n_experts * (size_t)p->n_ranks;
}

static int shared_column(const problem *p, int places, int layer, int e, int f, int place)
{
    return (int)first_shared(p) + ((layer * p->n_experts + e) * p->n_experts + f) * places + place;
}

bool joint_ilp_possible(const problem *p)
{
    savings s = find_savings(p);
    size_t pairs = (size_t)p->n_experts * (size_t)p->n_experts * (size_t)n_places(p, &s);
    return s.known && p->n_layers > 1 && first_shared(p) + (size_t)(p->n_layers - 1) * pairs <= JOINT_MOST_COLUMNS;
}

static bool in_place(const problem *p, int rank, int place)
{
    return place < p->n_ranks ? rank == place : p->topology->node_of_rank[rank] == place - p->n_ranks;
}

static int slots_in(const problem *p, int layer, int place)
{
    int sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        sum += in_place(p, g, place) ? p->slots[layer * p->n_ranks + g] : 0;
    return sum < p->n_experts ? sum : p->n_experts;
}

static void set_choice(const problem *p, lp_model *m, int row, int layer, int expert, int place, double value)
{
    for (int g = 0; g < p->n_ranks; g++)
        if (in_place(p, g, place))
            lp_set(m, row, (layer * p->n_experts + expert) * p->n_ranks + g, value);
}

static bool layer_full(const problem *p, int layer)
{
    int sum = 0;
    for (int g = 0; g < p->n_ranks; g++)
        sum += p->slots[layer * p->n_ranks + g];
    return sum == p->n_experts;
}

/* sum over partners of what is shared at a place = its slots there * the expert's own choice (at most, with slots to spare). */
static void add_degree(const problem *p, int places, int layer, int expert, int place, bool of_first, lp_model *m)
{
    int other = of_first ? layer + 1 : layer;
    int row = lp_add_row(m, layer_full(p, other) ? 0 : -LP_INF, 0);
    for (int f = 0; f < p->n_experts; f++)
        lp_set(m, row,
               of_first ? shared_column(p, places, layer, expert, f, place) : shared_column(p, places, layer, f, expert, place),
               1);
    set_choice(p, m, row, of_first ? layer : layer + 1, expert, place, -slots_in(p, other, place));
}

static void add_layer_pair(const problem *p, const savings *s, int layer, lp_model *m)
{
    int places = n_places(p, s);
    for (int e = 0; e < p->n_experts; e++)
        for (int f = 0; f < p->n_experts; f++)
            for (int place = 0; place < places; place++) {
                int row = lp_add_row(m, -LP_INF, 0);
                lp_set(m, row, shared_column(p, places, layer, e, f, place), 1);
                set_choice(p, m, row, layer + 1, f, place, -1);
                row = lp_add_row(m, -LP_INF, 0);
                lp_set(m, row, shared_column(p, places, layer, e, f, place), 1);
                set_choice(p, m, row, layer, e, place, -1);
            }
    for (int e = 0; e < p->n_experts; e++)
        for (int place = 0; place < places; place++) {
            add_degree(p, places, layer, e, place, true, m);
            add_degree(p, places, layer, e, place, false, m);
        }
}

status joint_ilp_create(const problem *p, const double *cap, lp_model **out)
{
    lp_model *m;
    TRY(lp_create(&m));
    savings s = find_savings(p);
    int places = n_places(p, &s);
    double constant = 0;
    for (size_t i = 0; i < first_shared(p); i++)
        lp_add_column(m, 0, 1, 0, true);
    for (int l = 0; l + 1 < p->n_layers; l++) {
        double weight = flow_weight(p, l) * LAYER_ILP_SCALE;
        for (size_t i = 0; i < (size_t)p->n_experts * (size_t)p->n_experts; i++) {
            double flow = weight * p->next_pairs[(size_t)l * (size_t)p->n_experts * (size_t)p->n_experts + i];
            constant += flow * s.far;
            for (int place = 0; place < places; place++)
                lp_add_column(m, 0, 1, -flow * (place < p->n_ranks ? s.on_rank : s.on_node), false);
        }
    }
    lp_set_constant(m, constant);
    for (int l = 0; l < p->n_layers; l++)
        add_layer_rows(p, l, cap + (size_t)l * (size_t)p->n_ranks, l * p->n_experts * p->n_ranks, m);
    for (int l = 0; l + 1 < p->n_layers; l++)
        add_layer_pair(p, &s, l, m);
    return finished(m, out);
}

void joint_ilp_start(const problem *p, const int *home, double *x)
{
    savings s = find_savings(p);
    int places = n_places(p, &s);
    for (int l = 0; l < p->n_layers; l++)
        layer_ilp_start(p, home + problem_at(p, l, 0), x + problem_at(p, l, 0) * (size_t)p->n_ranks);
    for (int l = 0; l + 1 < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++)
            for (int f = 0; f < p->n_experts; f++)
                for (int place = 0; place < places; place++)
                    x[shared_column(p, places, l, e, f, place)] =
                        in_place(p, home[problem_at(p, l, e)], place) && in_place(p, home[problem_at(p, l + 1, f)], place);
}
