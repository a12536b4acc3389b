/* support_routing.h - random routing: shapes, and rows of distinct experts with some dropped. */
#ifndef CONVOKE_TESTS_SUPPORT_ROUTING_H
#define CONVOKE_TESTS_SUPPORT_ROUTING_H

#include "placement/routing_shape.h"

#include <stdint.h>

/* `n_domains` of "math", "code", "prose", "law"; layer numbers 1, 3, 5, ...; the lists are static. At most 16 layers, 4 domains.
 */
routing_shape support_routing_shape(int n_layers, int n_experts, int top_k, int n_domains);

/* experts [n_layers][top_k], distinct in a layer; about drop_percent of them ROUTING_NO_EXPERT at the end of their layer. Weights
 * fall (NULL: not wanted); 0 where dropped. */
void support_routing_row(uint64_t *seed, const routing_shape *shape, int drop_percent, uint16_t *experts, float *weights);

#endif
