/* fair_queue.h - who of those that wait goes next: priority, then who was pushed out, then the client served least, then age.
 *
 * Clients' counters are a Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm
 * 2): what a client was served, in tokens; one who comes with nothing waiting is lifted to the lowest counter of those who wait
 * (nobody waits: of the one who left the queue last), so that absence earns no credit. Bookkeeping only; part of the scheduler.
 */
#ifndef CONVOKE_WORKER_FAIR_QUEUE_H
#define CONVOKE_WORKER_FAIR_QUEUE_H

#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    void *item;
    int *where; /* in the item: its place in the queue, -1 once it has left */
    int priority, client;
    bool again;               /* was pushed out: goes before others of its priority */
    bool held;                /* is passed over */
    uint64_t arrival, number; /* number: unique, decides ties */
    uint64_t tried;           /* the turn in which it was passed over */
} fair_entry;

typedef struct fair_queue fair_queue;

status fair_queue_create(fair_queue **out);
void fair_queue_destroy(fair_queue *q); /* NULL is fine */

/* Room for one more request of this client, waiting or not; its client number. */
status fair_queue_join(fair_queue *q, uint64_t client, int *number);
void fair_queue_part(fair_queue *q, int client);

void fair_queue_add(fair_queue *q, const fair_entry *entry);
void fair_queue_remove(fair_queue *q, int where);
fair_entry *fair_queue_at(fair_queue *q, int where);
int fair_queue_count(const fair_queue *q);
int fair_queue_count_held(const fair_queue *q);
void fair_queue_hold(fair_queue *q, int where, bool held);
/* The best that is neither held nor marked as tried in this turn; NULL when there is none. */
fair_entry *fair_queue_best(fair_queue *q, uint64_t turn);

void fair_queue_charge(fair_queue *q, int client, double tokens);

#endif
