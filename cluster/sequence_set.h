/* sequence_set.h - which sequences the workers have, and which of them are held: to know whether there is work to wait for. */
#ifndef CONVOKE_CLUSTER_SEQUENCE_SET_H
#define CONVOKE_CLUSTER_SEQUENCE_SET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t *ids; /* [capacity], open addressing; 0: free */
    bool *held;
    size_t capacity, n, n_held;
} sequence_set;

void sequence_set_clear(sequence_set *s); /* empty, memory kept */
void sequence_set_free(sequence_set *s);
bool sequence_set_add(sequence_set *s, uint64_t id); /* id 0 and known ones are passed over; false: no memory */
void sequence_set_remove(sequence_set *s, uint64_t id);
void sequence_set_hold(sequence_set *s, uint64_t id, bool hold);
static inline bool sequence_set_has_work(const sequence_set *s)
{
    return s->n > s->n_held;
}

#endif
