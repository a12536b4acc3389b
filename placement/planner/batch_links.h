/* batch_links.h - what the links of one layer carry on many steps, and how that changes when experts change ranks: only tokens
 * that chose those experts are looked at. Private to the files of `batch`. One caller. */
#ifndef CONVOKE_PLACEMENT_PLANNER_BATCH_LINKS_H
#define CONVOKE_PLACEMENT_PLANNER_BATCH_LINKS_H

#include "placement/planner/problem.h"

typedef struct batch_links batch_links;

/* n_steps: rows of float arrays, at least the schedule's steps. */
status batch_links_create(const problem *p, const replay_schedule *steps, int layer, int n_steps, batch_links **out);
void batch_links_destroy(batch_links *l); /* NULL is fine */

/* Counts everything anew; the sum over steps of dispatch and combine in microseconds, without start-up times. home [n_experts] */
double batch_links_set(batch_links *l, const int *home);
/* What the sum would be if e moved from its home to `to` and f (-1: none) from there to e's home. Nothing changes until
 * batch_links_keep(), which makes the last trial the present; `home` is the present state of the caller. */
double batch_links_try(batch_links *l, const int *home, int e, int f, int to);
void batch_links_keep(batch_links *l);
/* Elementary operations of a trial of an average expert: for work budgets. */
int64_t batch_links_work(const batch_links *l);

#endif
