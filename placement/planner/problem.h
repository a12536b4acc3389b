/* problem.h - what a solver is asked: traffic, machine, room, and how much work it may spend.
 *
 * Room. slots[l][g] says how many experts rank g may hold in layer l: ceil(E / G) + extra_slots, unless ranks have byte budgets:
 * then rank g has floor(expert_bytes / bytes_per_expert) slots in all, spread over the layers as evenly as can be, and ranks with
 * more room get more where others have too little. A plan's copies of a layer keep slots[l][g]; `moetuner` alone, as published,
 * may trade slots between layers and keeps the rank's total.
 *
 * Load. share[g] is the part of a layer's rows that rank g should compute: equal, or in inverse proportion to row_us. cap[l][g]
 * is the most rows (as counted in `load`, replicas sharing evenly) that it may get:
 *   --slack given:  (1 + slack) * share[g] * rows of the layer; what no plan can keep is refused here, with the smallest slack
 *                   that would do
 *   not given:      the same with 5 %, times the best busiest-rank-over-share found by LPT and swaps where that is above 1
 * Solvers that price load themselves (`batch`, `auto` on traffic) keep caps only when slack was given. */
#ifndef CONVOKE_PLACEMENT_PLANNER_PROBLEM_H
#define CONVOKE_PLACEMENT_PLANNER_PROBLEM_H

#include "placement/plan.h"
#include "placement/replay.h"
#include "placement/routing_stats.h"
#include "placement/topology.h"
#include "placement/traffic.h"

typedef struct {
    const routing_stats *stats; /* all of it, summed over domains and phases; NULL: counted from the traffic */
    const traffic *traffic;     /* NULL: statistics alone, so no step_us */
    const topology *topology;
    const plan *seed;      /* a plan to start from; NULL: none */
    int extra_slots;       /* per rank and layer */
    double slack;          /* negative: not given */
    replay_options replay; /* how step_us is measured */
    uint64_t random_seed;
    double seconds; /* wall clock; 0: no limit */
    int64_t work;   /* counted moves and pivots; 0: the solver's own default. Same seed and work: same plan */
    int threads;    /* 0: as many as there are cores */
} problem_request;

typedef struct {
    const problem_request *request; /* borrowed */
    const topology *topology;
    const traffic *traffic;            /* NULL: none */
    const replay_schedule *schedule;   /* of the traffic, round-robin owners; NULL without traffic */
    const uint16_t *owner_of_sequence; /* [traffic's n_sequences] whom the schedule, and steps drawn besides it, give a sequence
                                          to; NULL: the owner of its place */
    int n_layers, n_experts, n_ranks, top_k;
    const int *layer_numbers; /* [n_layers] */
    double *load;             /* [n_layers][n_experts] P */
    double *next_pairs;       /* R [n_layers - 1][n_experts][n_experts]; NULL: unknown */
    double *same_pairs;       /* [n_layers][n_experts][n_experts]; NULL: unknown */
    double *rows;             /* [n_layers] sum of load */
    double *share;            /* [n_ranks] sums to 1 */
    int *slots;               /* [n_layers][n_ranks] */
    int *total_slots;         /* [n_ranks] sum over layers, or the byte budget if that is smaller */
    double *cap;              /* [n_layers][n_ranks] */
    double *distance;         /* [n_ranks][n_ranks] relative time per byte: 0 to itself, 1 on the quickest link */
    uint64_t fingerprint;     /* of P and shape: what random streams are keyed by besides random_seed */
    /* private */
    replay_schedule own_schedule;
} problem;

/* Counts what is missing from the traffic (pairs only when `pairs`), works out room and caps, refuses in one sentence what cannot
 * be: shapes that disagree, budgets that do not hold every expert once (naming the smallest that would), slack no plan can keep.
 */
status problem_create(const problem_request *request, bool pairs, problem **out);
void problem_destroy(problem *p); /* NULL is fine */

static inline size_t problem_at(const problem *p, int layer, int expert)
{
    return (size_t)layer * (size_t)p->n_experts + (size_t)expert;
}

/* A plan under construction: copies as lists are awkward to move, a home per expert is not. home [n_layers][n_experts]. */
status problem_plan(const problem *p, const char *name, const int *home, plan *out);
/* The same with replicas: holds [n_layers][n_experts][n_ranks], home first, then rising ranks. */
status problem_plan_replicas(const problem *p, const char *name, const int *home, const bool *holds, plan *out);

/* Whether a plan keeps the room (per_layer: slots, else only totals) and, when slack was given, the caps: STATUS_BAD_INPUT with a
 * sentence that names layer and rank. */
status problem_check(const problem *p, const plan *made, bool per_layer);

/* ---- work and time ------------------------------------------------------------------------------------------------------- */

/* Counted work. A solver that runs layers in parallel gives each a share made beforehand (work_part), so that the same work gives
 * the same plan on any number of threads. The clock only ever stops it earlier. */
typedef struct {
    int64_t left;    /* units */
    double deadline; /* clock_seconds() (proto/clock.h); 0: none */
    bool out_of_time;
} work_budget;
work_budget work_start(const problem *p, int64_t fallback_units); /* request's work and seconds from now */
work_budget work_part(const work_budget *whole, int part, int n_parts);
/* Takes `units`; false when none are left or the time is over (the clock is read every call: call it per some thousands of
 * operations). */
bool work_take(work_budget *w, int64_t units);

/* Counter-based random numbers: the same for (seed, stream, counter) everywhere. */
typedef struct {
    uint64_t key, counter;
} random_stream;
random_stream random_open(const problem *p, uint64_t stream);
uint64_t random_next(random_stream *r);
int random_below(random_stream *r, int n);
double random_unit(random_stream *r); /* [0, 1) */

/* Runs body(arg, i) for i = 0 .. n - 1 on up to `threads` threads (0: cores), each i once; returns the first failing i's status
 * with its sentence. */
status parallel_for(int threads, int n, status (*body)(void *arg, int i), void *arg);

#endif
