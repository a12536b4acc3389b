/* fuzz_topology.c - any bytes as a topology: refused with a sentence, or one whose every number can be reckoned with. */
#include "placement/topology.h"

#include <math.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const topology *t)
{
    for (int r = 0; r < t->n_ranks; r++) {
        if (t->node_of_rank[r] < 0 || t->node_of_rank[r] >= t->n_nodes || t->local_index[r] < 0)
            abort();
        if (!(t->row_us[r] > 0) || !(t->expert_us[r] >= 0) || t->expert_bytes[r] < -1)
            abort();
        int to = (r * 7 + 1) % t->n_ranks;
        double us = t->row_bytes * topology_us_per_byte(t, r, to);
        if (!isfinite(us) || (to != r && !(us > 0)))
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    topology t;
    if (topology_parse("topology", (const char *)data, size, &t) != STATUS_OK) {
        if (status_message()[0] == '\0')
            abort();
        return 0;
    }
    check(&t);
    topology_clear(&t);
    return 0;
}
