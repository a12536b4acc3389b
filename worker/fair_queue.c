#include "worker/fair_queue.h"

#include <stdlib.h>

/* Counters of clients with nothing here are kept for this many; beyond, the smallest is forgotten. */
enum { IDLE_CLIENTS = 256 };

typedef struct {
    uint64_t id;
    double served;
    int n_here, n_waiting;
} client;

struct fair_queue {
    fair_entry *entries; /* [capacity] in no order: the best changes with every counter */
    int n, capacity, n_held, n_here;
    client *clients; /* [client_capacity] */
    int n_clients, client_capacity;
    double last_served; /* counter of the client that left the queue last */
};

status fair_queue_create(fair_queue **out)
{
    *out = calloc(1, sizeof **out);
    return *out ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the queue");
}

void fair_queue_destroy(fair_queue *q)
{
    if (!q)
        return;
    free(q->entries);
    free(q->clients);
    free(q);
}

/* ---- clients ------------------------------------------------------------------------------------------------------------- */

static double least_waiting(const fair_queue *q)
{
    double least = -1;
    for (int c = 0; c < q->n_clients; c++)
        if (q->clients[c].n_waiting > 0 && (least < 0 || q->clients[c].served < least))
            least = q->clients[c].served;
    return least < 0 ? q->last_served : least;
}

/* A client's own slot, else one whose counter means nothing any more, else a new one; -1: no memory. */
static int find_client(fair_queue *q, uint64_t id)
{
    int spare = -1, n_idle = 0;
    for (int c = 0; c < q->n_clients; c++) {
        if (q->clients[c].id == id)
            return c;
        if (q->clients[c].n_here > 0)
            continue;
        n_idle++;
        if (spare < 0 || q->clients[c].served < q->clients[spare].served)
            spare = c;
    }
    if (spare >= 0 && (n_idle > IDLE_CLIENTS || q->clients[spare].served <= least_waiting(q))) {
        q->clients[spare] = (client){.id = id};
        return spare;
    }
    if (q->n_clients == q->client_capacity) {
        int capacity = q->client_capacity ? 2 * q->client_capacity : 64;
        client *grown = realloc(q->clients, (size_t)capacity * sizeof *grown);
        if (!grown)
            return -1;
        q->clients = grown;
        q->client_capacity = capacity;
    }
    q->clients[q->n_clients] = (client){.id = id};
    return q->n_clients++;
}

status fair_queue_join(fair_queue *q, uint64_t id, int *number)
{
    if (q->n_here == q->capacity) {
        int capacity = q->capacity ? 2 * q->capacity : 64;
        fair_entry *grown = realloc(q->entries, (size_t)capacity * sizeof *grown);
        if (!grown)
            return status_fail(STATUS_NO_MEMORY, "no memory to queue another request");
        q->entries = grown;
        q->capacity = capacity;
    }
    int c = find_client(q, id);
    if (c < 0)
        return status_fail(STATUS_NO_MEMORY, "no memory to count another client");
    q->clients[c].n_here++;
    q->n_here++;
    *number = c;
    return STATUS_OK;
}

void fair_queue_part(fair_queue *q, int c)
{
    q->clients[c].n_here--;
    if (--q->n_here == 0) { /* nobody to be unfair to: old debts are forgotten */
        q->n_clients = 0;
        q->last_served = 0;
    }
}

void fair_queue_charge(fair_queue *q, int c, double tokens)
{
    q->clients[c].served += tokens;
}

/* ---- entries ------------------------------------------------------------------------------------------------------------- */

void fair_queue_add(fair_queue *q, const fair_entry *entry)
{
    client *c = &q->clients[entry->client];
    if (!entry->again && c->n_waiting == 0) {
        double floor = least_waiting(q);
        c->served = c->served > floor ? c->served : floor;
    }
    c->n_waiting++;
    q->n_held += entry->held;
    *entry->where = q->n;
    q->entries[q->n++] = *entry;
}

void fair_queue_remove(fair_queue *q, int where)
{
    fair_entry *entry = &q->entries[where];
    client *c = &q->clients[entry->client];
    c->n_waiting--;
    q->last_served = c->served;
    q->n_held -= entry->held;
    *entry->where = -1;
    if (where != --q->n) {
        *entry = q->entries[q->n];
        *entry->where = where;
    }
}

fair_entry *fair_queue_at(fair_queue *q, int where)
{
    return &q->entries[where];
}

int fair_queue_count(const fair_queue *q)
{
    return q->n;
}

int fair_queue_count_held(const fair_queue *q)
{
    return q->n_held;
}

void fair_queue_hold(fair_queue *q, int where, bool held)
{
    q->n_held += held - q->entries[where].held;
    q->entries[where].held = held;
}

static bool goes_before(const fair_queue *q, const fair_entry *a, const fair_entry *b)
{
    if (a->priority != b->priority)
        return a->priority < b->priority;
    if (a->again != b->again)
        return a->again;
    double x = q->clients[a->client].served, y = q->clients[b->client].served;
    if (!a->again && x != y)
        return x < y;
    return a->arrival != b->arrival ? a->arrival < b->arrival : a->number < b->number;
}

fair_entry *fair_queue_best(fair_queue *q, uint64_t turn)
{
    fair_entry *best = NULL;
    for (int i = 0; i < q->n; i++) {
        fair_entry *e = &q->entries[i];
        if (!e->held && e->tried != turn && (!best || goes_before(q, e, best)))
            best = e;
    }
    return best;
}
