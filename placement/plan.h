/* plan.h - which ranks hold which expert, layer by layer: replicas from the first day.
 *
 * Numbers only: no network, no device. A plan is made for one model shape (experts, MoE layers) and one number of ranks. The
 * first rank of an expert is its home, further ones are replicas. The JSON form is described in placement/README.md. */
#ifndef CONVOKE_PLACEMENT_PLAN_H
#define CONVOKE_PLACEMENT_PLAN_H

#include "proto/json.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLAN_MAX_RANKS   65535 /* both travel as 16 bits, the largest number meaning none */
#define PLAN_MAX_EXPERTS 65535

typedef struct {
    int n_ranks, n_experts, n_layers; /* n_layers counts MoE layers only */
    int *layer_numbers;               /* [n_layers] the model's own layer numbers, rising */
    int *node_of_rank;                /* [n_ranks] */
    int *first_copy;                  /* [n_layers * n_experts + 1] */
    int *copy_ranks; /* ranks of (layer index l, expert e): copy_ranks[first_copy[l*n_experts+e] .. first_copy[.. + 1]) */
    char name[64];   /* "contiguous", or the file's "name"/file name */
    long long epoch; /* 0 unless the file says otherwise */
} plan;

/* What a plan must fit. layer_numbers may be NULL: any. plan_read() and plan_parse() take a NULL shape: any plan is fine. */
typedef struct {
    int n_ranks, n_experts, n_layers;
    const int *layer_numbers;
    const char *model_name; /* compared with the plan's "model" where both are there */
} plan_shape;

/* A plan whose lists are to be filled: first_copy is set from n_copies [n_layers * n_experts] (NULL: one each, all >= 1),
 * copy_ranks are 0. */
status plan_create(const char *where, const plan_shape *shape, const int *node_of_rank, const int *n_copies, plan *out);
/* Expert e of every layer on rank e * n_ranks / n_experts: equal blocks, sizes differ by at most one; ranks may stay empty.
 * node_of_rank NULL: all on node 0. */
status plan_contiguous(const plan_shape *shape, const int *node_of_rank, plan *out);
/* Reads a file; refuses a missing expert, a rank out of range, an expert twice on one rank, wrong counts, an unknown version, a
 * plan for another model: the sentence names layer and expert. Keys it does not know are passed over; without node_of_rank every
 * rank is on node 0. *out changes only on success and is cleared by the caller. */
status plan_read(const char *path, const plan_shape *shape, plan *out);
status plan_parse(const char *where, const char *text, size_t size, const plan_shape *shape, plan *out);
/* model_name NULL: the file names none. The file appears whole or not at all. */
status plan_write(const plan *p, const char *model_name, const char *path);
/* The same with the members of `beside`, an object, between the plan's own keys and its layers. */
status plan_write_beside(const plan *p, const char *model_name, const cJSON *beside, const char *path);
/* Tokens per expert that a plan file says it was made from ("tokens_per_expert"), [n_layers][n_experts]: free(); NULL when it
 * says nothing. `made` is the plan of that file. */
status plan_read_counts(const char *path, const plan *made, uint64_t **out);
status plan_copy(const plan *p, plan *out);
void plan_clear(plan *p); /* a zeroed one is fine */

static inline int plan_n_copies(const plan *p, int layer, int expert)
{
    const int *at = p->first_copy + (size_t)layer * (size_t)p->n_experts + (size_t)expert;
    return at[1] - at[0];
}
static inline const int *plan_copies(const plan *p, int layer, int expert)
{
    return p->copy_ranks + p->first_copy[(size_t)layer * (size_t)p->n_experts + (size_t)expert];
}
bool plan_holds(const plan *p, int layer, int expert, int rank);
/* The copy whose way from `owner` is shortest: its own, else the first on its node, else the home. node_of_rank [n_ranks]. */
int plan_nearest(const plan *p, const int *node_of_rank, int layer, int expert, int owner);

typedef enum {
    REPLICA_OWNER_FIRST, /* the owner's own copy, else one on its node, else round-robin over all; round-robin among equals */
    REPLICA_ROUND_ROBIN, /* over all copies */
    REPLICA_STEP,        /* by the step's load: replica_split.h, not plan_choose(), which takes the owner's first */
} replica_choice;

/* The rank that computes (layer, expert) for a row owned by `owner`; `turn` advances the round (the row's running number). Pure.
 */
int plan_choose(const plan *p, replica_choice choice, int layer, int expert, int owner, uint32_t turn);

#endif
