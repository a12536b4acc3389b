/* support_traffic.h - random traffic and machines for it, in memory and as the files that programs read. */
#ifndef CONVOKE_TESTS_SUPPORT_TRAFFIC_H
#define CONVOKE_TESTS_SUPPORT_TRAFFIC_H

#include "placement/topology.h"
#include "placement/traffic.h"

/* Sequences of 1 to max_tokens tokens; rows of the trace go back and forth between them, and within one they need not rise. A
 * third of the experts takes most tokens; about drop_percent of the choices are ROUTING_NO_EXPERT. n_owners > 0: owners and steps
 * as well. */
status support_random_traffic(uint64_t *seed, const routing_shape *shape, int n_sequences, int max_tokens, int drop_percent,
                              int n_owners, traffic *out);
/* As a trace: rows where `row` has them, weights falling. */
status support_write_traffic(const traffic *t, const char *path);

/* Uneven nodes, ranks and links: half of them with a matrix. */
status support_random_topology(uint64_t *seed, int n_ranks, topology *out);

#endif
