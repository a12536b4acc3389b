/* plan_meter.h - how steps go under a plan, from the workers' own counters: what a new plan could save, and what it really
 * brought. Pure: reports in, means out. */
#ifndef CONVOKE_CLUSTER_PLAN_METER_H
#define CONVOKE_CLUSTER_PLAN_METER_H

#include "proto/control.pb-c.h"

#include <stdbool.h>
#include <stdint.h>

enum { PLAN_METER_STEPS = 256 }; /* a reading covers the last one to two times so many steps, or all there were */

typedef struct {
    uint64_t steps, rows;
    double seconds, at; /* of steps; by the clock */
    double link_bytes;  /* between ranks */
    double *ranks;      /* [n_ranks] seconds that each computed, or else that others waited for it */
} plan_meter_sum;

typedef struct {
    int n_ranks;
    bool computes; /* `ranks` is computing, not lateness */
    plan_meter_sum now, newer, older;
    double balance;
} plan_meter;

/* Means over the steps of a reading; all zero before the first step. */
typedef struct {
    uint64_t steps;
    double step_seconds, rows_per_step, rows_per_second; /* the latter by the clock */
    double excess_seconds; /* of a step: the busiest rank computed so much longer than the mean of all */
    double link_bytes;     /* per row */
    double balance;        /* busiest rank over mean, mean over layers, as the workers last said */
} plan_measure;

/* Forgets; false: no memory (it then measures nothing). */
bool plan_meter_reset(plan_meter *m, int n_ranks);
void plan_meter_clear(plan_meter *m); /* a zeroed one is fine */
/* Parts of reports (`partial`) are not to be passed. */
void plan_meter_note(plan_meter *m, const Convoke__Control__Report *report, double now);
plan_measure plan_meter_read(const plan_meter *m);

#endif
