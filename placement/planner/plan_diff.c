/* plan_diff.c - from one plan to another in an order that memory allows.
 *
 * A copy that is not wanted any more is dropped as soon as its expert has another one; a copy that is wanted is made as soon as
 * its rank has room: spare_slots above the larger of its totals before and after. Copies that free a slot elsewhere come first
 * (those that free one where most others wait before the rest), additional replicas last, since they free nothing.
 *
 * One spare slot is always enough. Were all ranks with wanted copies full (one above their total), each of them would hold at
 * least one more unwanted copy than it waits for; such copies are still there only because their expert has no other yet, so each
 * belongs to an expert of its own that some rank waits for: fewer than are waited for in all. So with spare 1 somebody can always
 * go on. */
#include "placement/planner/plan_diff.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LOOK_AT = 16 }; /* waiting copies of a rank that are compared: more would only cost time */

typedef struct {
    int list; /* layer * n_experts + expert */
    int rank, next_of_list, next_of_rank;
    bool done;
} change;

typedef struct {
    const plan *from, *to;
    const topology *t;
    int spare;
    int n_wanted, n_unwanted;
    change *wanted, *unwanted;              /* by list, then rank */
    int *wanted_of_list, *unwanted_of_list; /* first change of a list, -1: none */
    int *wanted_of_rank;                    /* first wanted of a rank, -1: none */
    int *held, *limit, *waiting;            /* [n_ranks] copies now; most; wanted ones not there yet */
    int *copies;                            /* [lists] now */
    plan_move *moves;
    int n_moves;
} mover;

static size_t n_lists(const plan *p)
{
    return (size_t)p->n_layers * (size_t)p->n_experts;
}

static int n_all_copies(const plan *p)
{
    return p->first_copy[n_lists(p)];
}

/* ---- what changes ---- */

static status same_shape(const plan *a, const plan *b, const topology *t)
{
    if (a->n_ranks != b->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "plan %s is for %d ranks, plan %s for %d", a->name, a->n_ranks, b->name, b->n_ranks);
    if (a->n_experts != b->n_experts || a->n_layers != b->n_layers)
        return status_fail(STATUS_BAD_INPUT, "plan %s has %d layers of %d experts, plan %s %d of %d", a->name, a->n_layers,
                           a->n_experts, b->name, b->n_layers, b->n_experts);
    for (int l = 0; l < a->n_layers; l++)
        if (a->layer_numbers[l] != b->layer_numbers[l])
            return status_fail(STATUS_BAD_INPUT, "plan %s has layer %d where plan %s has layer %d", a->name, a->layer_numbers[l],
                               b->name, b->layer_numbers[l]);
    if (t && t->n_ranks != a->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "the topology has %d ranks, the plans %d", t->n_ranks, a->n_ranks);
    return STATUS_OK;
}

/* Copies of `of` that `other` does not have, chained by list; returns how many. */
static int find_changes(const plan *of, const plan *other, change *changes, int *first_of_list)
{
    int n = 0;
    for (int l = 0, list = 0; l < of->n_layers; l++)
        for (int e = 0; e < of->n_experts; e++, list++) {
            first_of_list[list] = -1;
            for (int c = 0; c < plan_n_copies(of, l, e); c++) {
                int rank = plan_copies(of, l, e)[c];
                if (plan_holds(other, l, e, rank))
                    continue;
                changes[n] = (change){.list = list, .rank = rank, .next_of_list = first_of_list[list], .next_of_rank = -1};
                first_of_list[list] = n++;
            }
        }
    return n;
}

static void count_room(mover *m)
{
    for (int i = 0; i < n_all_copies(m->from); i++)
        m->held[m->from->copy_ranks[i]]++;
    memcpy(m->limit, m->held, (size_t)m->from->n_ranks * sizeof *m->limit);
    for (int r = 0; r < m->from->n_ranks; r++)
        m->wanted_of_rank[r] = -1;
    for (int i = m->n_wanted - 1; i >= 0; i--) { /* so that a rank's chain rises */
        change *w = &m->wanted[i];
        w->next_of_rank = m->wanted_of_rank[w->rank];
        m->wanted_of_rank[w->rank] = i;
        m->waiting[w->rank]++;
        m->limit[w->rank]++;
    }
    for (int i = 0; i < m->n_unwanted; i++)
        m->limit[m->unwanted[i].rank]--;
    /* limit is now the total in `to`; what it was before counts too */
    for (int r = 0; r < m->from->n_ranks; r++)
        m->limit[r] = (m->held[r] > m->limit[r] ? m->held[r] : m->limit[r]) + m->spare;
    for (size_t list = 0; list < n_lists(m->from); list++)
        m->copies[list] = m->from->first_copy[list + 1] - m->from->first_copy[list];
}

/* ---- moves ---- */

static bool holds_now(const mover *m, int list, int rank)
{
    int layer = list / m->from->n_experts, expert = list % m->from->n_experts;
    if (plan_holds(m->from, layer, expert, rank)) {
        for (int i = m->unwanted_of_list[list]; i >= 0; i = m->unwanted[i].next_of_list)
            if (m->unwanted[i].rank == rank)
                return !m->unwanted[i].done;
        return true;
    }
    for (int i = m->wanted_of_list[list]; i >= 0; i = m->wanted[i].next_of_list)
        if (m->wanted[i].rank == rank)
            return m->wanted[i].done;
    return false;
}

static double distance(const mover *m, int from, int to)
{
    if (m->t)
        return topology_us_per_byte(m->t, from, to);
    return m->from->node_of_rank[from] == m->from->node_of_rank[to] ? 0 : 1;
}

/* The nearest holder, ties to the lower rank, among the copies of both plans. */
static int find_source(const mover *m, int list, int to)
{
    const plan *plans[] = {m->from, m->to};
    int best = -1;
    for (int p = 0; p < 2; p++)
        for (int c = plans[p]->first_copy[list]; c < plans[p]->first_copy[list + 1]; c++) {
            int rank = plans[p]->copy_ranks[c];
            if (!holds_now(m, list, rank))
                continue;
            double ahead = best < 0 ? 1 : distance(m, best, to) - distance(m, rank, to);
            if (ahead > 0 || (ahead == 0 && rank < best))
                best = rank;
        }
    return best;
}

static void add_move(mover *m, int list, int from, int to)
{
    m->moves[m->n_moves++] =
        (plan_move){.layer = list / m->from->n_experts, .expert = list % m->from->n_experts, .from = from, .to = to};
}

static int free_slots(const mover *m, int rank)
{
    return m->limit[rank] - m->held[rank];
}

/* Of an expert's unwanted copies the one whose rank needs the room most, -1: none may go (it would be the last copy). */
static int find_drop(const mover *m, int list)
{
    int best = -1;
    for (int i = m->unwanted_of_list[list]; i >= 0 && m->copies[list] > 1; i = m->unwanted[i].next_of_list) {
        const change *u = &m->unwanted[i];
        if (u->done)
            continue;
        int need = m->waiting[u->rank] - free_slots(m, u->rank);
        int most = best < 0 ? 0 : m->waiting[m->unwanted[best].rank] - free_slots(m, m->unwanted[best].rank);
        if (best < 0 || need > most || (need == most && u->rank < m->unwanted[best].rank))
            best = i;
    }
    return best;
}

static void drop_unwanted(mover *m, int list)
{
    for (int i; (i = find_drop(m, list)) >= 0;) {
        m->unwanted[i].done = true;
        m->held[m->unwanted[i].rank]--;
        m->copies[list]--;
        add_move(m, list, m->unwanted[i].rank, -1);
    }
}

/* How good it is to make this copy now: the most copies that wait at a rank where it frees a slot, plus one; 0: it frees none. */
static int worth(const mover *m, int list)
{
    int most = 0;
    for (int i = m->unwanted_of_list[list]; i >= 0; i = m->unwanted[i].next_of_list) {
        const change *u = &m->unwanted[i];
        if (!u->done && m->waiting[u->rank] + 1 > most)
            most = m->waiting[u->rank] + 1;
    }
    return most;
}

/* The first copies of a rank's chain that are not made yet, at most n; made ones are taken out of it on the way. */
static int list_waiting(mover *m, int rank, int n, int *out)
{
    int found = 0, *link = &m->wanted_of_rank[rank];
    while (*link >= 0 && found < n) {
        if (m->wanted[*link].done) {
            *link = m->wanted[*link].next_of_rank;
            continue;
        }
        out[found++] = *link;
        link = &m->wanted[*link].next_of_rank;
    }
    return found;
}

/* The best copy, of the first few of each rank, that its rank has room for; -1: none has. */
static int find_copy(mover *m)
{
    int best = -1, best_worth = -1, few[LOOK_AT];
    for (int r = 0; r < m->from->n_ranks; r++) {
        int n = free_slots(m, r) > 0 && m->waiting[r] > 0 ? list_waiting(m, r, LOOK_AT, few) : 0;
        for (int i = 0; i < n; i++) {
            int here = worth(m, m->wanted[few[i]].list);
            if (here > best_worth) {
                best = few[i];
                best_worth = here;
            }
        }
    }
    return best;
}

/* False when everybody waits for room. */
static bool order_moves(mover *m)
{
    for (int i = 0; i < m->n_unwanted; i++)
        drop_unwanted(m, m->unwanted[i].list);
    for (int left = m->n_wanted; left > 0; left--) {
        int i = find_copy(m);
        if (i < 0)
            return false;
        change *w = &m->wanted[i];
        add_move(m, w->list, find_source(m, w->list, w->rank), w->rank);
        w->done = true;
        m->held[w->rank]++;
        m->waiting[w->rank]--;
        m->copies[w->list]++;
        drop_unwanted(m, w->list);
    }
    return true;
}

/* ---- the whole ---- */

static void mover_clear(mover *m)
{
    free(m->wanted);
    free(m->unwanted);
    free(m->wanted_of_list);
    free(m->unwanted_of_list);
    free(m->wanted_of_rank);
    free(m->held);
    free(m->limit);
    free(m->waiting);
    free(m->copies);
    free(m->moves);
}

static status mover_begin(const plan *from, const plan *to, const topology *t, int spare, mover *m)
{
    size_t lists = n_lists(from), ranks = (size_t)from->n_ranks;
    *m = (mover){.from = from, .to = to, .t = t, .spare = spare};
    m->wanted = calloc((size_t)n_all_copies(to) + 1, sizeof *m->wanted);
    m->unwanted = calloc((size_t)n_all_copies(from) + 1, sizeof *m->unwanted);
    m->wanted_of_list = calloc(lists, sizeof *m->wanted_of_list);
    m->unwanted_of_list = calloc(lists, sizeof *m->unwanted_of_list);
    m->copies = calloc(lists, sizeof *m->copies);
    m->wanted_of_rank = calloc(ranks, sizeof *m->wanted_of_rank);
    m->held = calloc(ranks, sizeof *m->held);
    m->limit = calloc(ranks, sizeof *m->limit);
    m->waiting = calloc(ranks, sizeof *m->waiting);
    m->moves = calloc((size_t)n_all_copies(to) + (size_t)n_all_copies(from) + 1, sizeof *m->moves);
    if (!m->wanted || !m->unwanted || !m->wanted_of_list || !m->unwanted_of_list || !m->copies || !m->wanted_of_rank ||
        !m->held || !m->limit || !m->waiting || !m->moves) {
        mover_clear(m);
        return status_fail(STATUS_NO_MEMORY, "no memory to order the moves of %zu experts", lists);
    }
    m->n_wanted = find_changes(to, from, m->wanted, m->wanted_of_list);
    m->n_unwanted = find_changes(from, to, m->unwanted, m->unwanted_of_list);
    count_room(m);
    return STATUS_OK;
}

/* Bytes received, and the time of the busiest NIC when all ranks copy at once. */
static status price(const mover *m, plan_difference *d)
{
    int n = m->from->n_ranks;
    double bytes = m->t ? (double)m->t->bytes_per_expert : 0, *us = calloc(2 * (size_t)n, sizeof *us);
    d->rank_bytes = calloc((size_t)n, sizeof *d->rank_bytes);
    if (!us || !d->rank_bytes) {
        free(us);
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", n);
    }
    for (int i = 0; m->t && i < d->n_moves; i++) {
        const plan_move *move = &d->moves[i];
        if (move->to < 0)
            continue;
        double time = bytes * topology_us_per_byte(m->t, move->from, move->to);
        us[move->from] += time;
        us[n + move->to] += time;
        d->rank_bytes[move->to] += m->t->bytes_per_expert;
        d->bytes += m->t->bytes_per_expert;
    }
    for (int i = 0; i < 2 * n; i++)
        d->seconds = us[i] * 1e-6 > d->seconds ? us[i] * 1e-6 : d->seconds;
    free(us);
    return STATUS_OK;
}

status plan_diff(const plan *from, const plan *to, const topology *t, plan_difference *out)
{
    TRY(same_shape(from, to, t));
    for (int spare = 0;; spare++) {
        mover m;
        TRY(mover_begin(from, to, t, spare, &m));
        if (!order_moves(&m)) {
            mover_clear(&m);
            continue;
        }
        plan_difference d = {.n_moves = m.n_moves, .n_copied = m.n_wanted, .n_dropped = m.n_unwanted, .spare_slots = spare};
        d.moves = m.moves;
        m.moves = NULL;
        status st = price(&m, &d);
        mover_clear(&m);
        if (st == STATUS_OK)
            *out = d;
        else
            plan_diff_clear(&d);
        return st;
    }
}

void plan_diff_clear(plan_difference *d)
{
    free(d->moves);
    free(d->rank_bytes);
    *d = (plan_difference){0};
}

double plan_diff_break_even(double move_seconds, double saved_us_per_token)
{
    return saved_us_per_token > 0 ? move_seconds * 1e6 / saved_us_per_token : HUGE_VAL;
}
