/* bench_plan_solvers.c - solvers and bounds on problems made by formula (support_instances.h): seconds, score, bound.
 *
 *   bench_plan_solvers [SOLVER ...] [--only INSTANCE] [--seconds X] [--topics N] [--sparse X]
 *                                                     without names: all solvers that need no trace */
#include "placement/planner/bounds.h"
#include "placement/planner/score.h"
#include "placement/planner/solver.h"
#include "proto/clock.h"
#include "tests/support_instances.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *name;
    bool planted;
    int n_layers, n_experts, n_ranks, n_nodes;
} bench;

static const bench benches[] = {
    {"topic-16x64-8", false, 16, 64, 8, 2},     {"planted-16x64-8", true, 16, 64, 8, 2},
    {"topic-94x128-8", false, 94, 128, 8, 2},   {"planted-94x128-8", true, 94, 128, 8, 2},
    {"topic-58x256-64", false, 58, 256, 64, 8}, {"planted-58x256-64", true, 58, 256, 64, 8},
};

/* As many topics as a quarter of the experts, each mostly about a tenth of them. */
static int n_topics = 0;
static double sparse = 0.2;

static void make(const bench *b, instance *x)
{
    if (b->planted)
        instance_planted(b->n_layers, b->n_experts, b->n_ranks, b->n_nodes, 1, x);
    else
        instance_topics(b->n_layers, b->n_experts, b->n_ranks, b->n_nodes, n_topics > 0 ? n_topics : b->n_experts / 4, sparse, 1,
                        x);
}

static void run(const char *name, instance *x, const solver *s)
{
    solver_report report;
    plan made = {0};
    double start = clock_seconds();
    status st = solver_run(s, &x->p, &report, &made);
    double seconds = clock_seconds() - start, worst;
    if (st != STATUS_OK) {
        printf("%-18s %-12s %s\n", name, s->name, status_message());
        return;
    }
    double balance = score_balance(&x->p, &made, NULL, &worst);
    printf("%-18s %-12s %7.2f s   flow %.5f   max/mean %.4f, worst %.4f   work %lld\n", name, s->name, seconds,
           score_flow(&x->p, &made), balance, worst, (long long)report.work);
    fflush(stdout);
    plan_clear(&made);
}

static void run_bounds(const char *name, instance *x)
{
    plan_bounds b = {.flow_spectral = NAN, .balance = NAN};
    double start = clock_seconds();
    if (bounds_load(&x->p, &b) != STATUS_OK || bounds_spectral(&x->p, 0, &b) != STATUS_OK) {
        printf("%-18s bounds: %s\n", name, status_message());
        return;
    }
    printf("%-18s %-12s %7.2f s   flow %.5f   max/mean %.4f", name, "bound", clock_seconds() - start, b.flow_spectral, b.balance);
    if (strncmp(name, "planted", 7) == 0)
        printf("   planted optimum %.5f", instance_planted_optimum(x));
    printf("\n");
    free(b.balance_of_layer);
}

int main(int argc, char **argv)
{
    const char *only = NULL;
    const solver *chosen[64];
    int n_chosen = 0;
    double seconds = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc)
            seconds = atof(argv[++i]);
        else if (strcmp(argv[i], "--topics") == 0 && i + 1 < argc)
            n_topics = atoi(argv[++i]);
        else if (strcmp(argv[i], "--sparse") == 0 && i + 1 < argc)
            sparse = atof(argv[++i]);
        else if (solver_find(argv[i]) && n_chosen < 64)
            chosen[n_chosen++] = solver_find(argv[i]);
        else {
            fprintf(stderr, "bench_plan_solvers: there is no solver %s\n", argv[i]);
            return 2;
        }
    }
    if (n_chosen == 0)
        for (const solver *const *s = solvers; *s; s++)
            if (!((*s)->flags & (SOLVER_NEEDS_TRAFFIC | SOLVER_NEEDS_SAME_PAIRS | SOLVER_EXACT_SMALL)))
                chosen[n_chosen++] = *s;
    for (size_t b = 0; b < sizeof benches / sizeof *benches; b++) {
        instance x;
        if (only && strcmp(only, benches[b].name) != 0)
            continue;
        make(&benches[b], &x);
        x.request.seconds = seconds;
        for (int i = 0; i < n_chosen; i++)
            run(benches[b].name, &x, chosen[i]);
        run_bounds(benches[b].name, &x);
        instance_clear(&x);
    }
    return 0;
}
