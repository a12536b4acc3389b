/* plan_store.h - plans kept from one run to the next, so that a server starts with the plan it ended with.
 *
 *   DIR/MODEL-FINGERPRINT-RANKSxNODES.json      FINGERPRINT: of config.json, so that another model of the same name is not served
 *                                               by this one's plan
 *
 * Files appear whole or not at all; several servers may share a folder. */
#ifndef CONVOKE_CLUSTER_PLAN_STORE_H
#define CONVOKE_CLUSTER_PLAN_STORE_H

#include "placement/plan.h"

/* $XDG_STATE_HOME/convoke/plans, else ~/.local/state/convoke/plans; false: neither is set. */
bool plan_store_usual_dir(char dir[4096]);

/* Where the plan for a model folder on so many ranks and nodes is kept. */
status plan_store_path(const char *dir, const char *model_dir, int n_ranks, int n_nodes, char path[4096]);
/* Makes the folder if it is not there. */
status plan_store_write(const char *path, const char *json, size_t size);

/* A whole file of at most 48 MB, the most that workers can be handed, NUL behind it: free(). */
status plan_store_read(const char *path, char **json, size_t *size);

/* The counts a plan was made from, [n_layers][n_experts]: free(); NULL: the text holds none that fit the plan. */
uint64_t *plan_store_counts(const char *json, size_t size, const plan *p);

#endif
