/* routing_shape.h - what a routing trace or statistics file is about: model, experts, layers, domains. Data, and its metadata in
 * files.
 *
 * A domain is a name that the operator gives to a kind of traffic ("math"); numbers in files index the list of names. */
#ifndef CONVOKE_PLACEMENT_ROUTING_SHAPE_H
#define CONVOKE_PLACEMENT_ROUTING_SHAPE_H

#include "proto/safetensors.h"
#include "proto/status.h"

enum { PHASE_PREFILL = 0, PHASE_DECODE = 1, N_PHASES = 2 };
#define ROUTING_NO_EXPERT 0xffffu /* a choice that a policy dropped or trimmed */

typedef struct {
    const char *model;          /* "" when unknown */
    int n_experts;              /* 1 to 65535 */
    int top_k;                  /* choices per token and layer */
    int n_layers;               /* layers with experts */
    int n_domains;              /* 1 to 4096 */
    const int *layer_numbers;   /* [n_layers] the model's own, rising */
    const char *const *domains; /* [n_domains] all different */
} routing_shape;

status routing_shape_check(const char *where, const routing_shape *shape);
/* A copy that owns its strings and lists; the original is borrowed for the call alone. */
status routing_shape_copy(const routing_shape *shape, routing_shape *out);
void routing_shape_clear(routing_shape *copy); /* only what routing_shape_copy() or _read() made; a zeroed one is fine */

/* Number of the domain of that name, -1 when there is none. */
int routing_shape_find_domain(const routing_shape *shape, const char *name);
/* Whether two files speak of one model: same model name, experts, layers. Sentences name `a` and `b`. */
status routing_shape_same_model(const char *where_a, const routing_shape *a, const char *where_b, const routing_shape *b);

/* As safetensors metadata: format = convoke-routing, model, n_experts, top_k, layers and domains (JSON lists). */
status routing_shape_write(const routing_shape *shape, safetensors_writer *writer);
/* Without "domains" there is one, "default"; without "top_k" it is 0. *out is checked but for top_k. */
status routing_shape_read(const safetensors *file, routing_shape *out);

#endif
