/* engine_owners.c - sequences given to the rank where their rows have the shortest way.
 *
 *   owner    runs the first rows ─► what they would have cost from every rank (owner_choice.h) ─► report
 *   leader   room, price of the KV cache ─► scheduler_judge ─► next step: leave here, join there, blocks from, to
 *   both     the blocks' contents travel beside the steps (group_send, group_receive) ─► each end tells in a report ─► rows again
 */
#include "worker/engine_parts.h"

#include "worker/owner_choice.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { COUNTED_ROWS = 128 }; /* of a sequence, at most: a long chunk costs no more to judge than a short one */
#define DRAIN_SECONDS 5

/* ---- life ---- */

status owners_create(engine *e)
{
    size_t n = (size_t)e->n_ranks;
    double row_bytes = (double)e->parts.config->hidden * (e->parts.rows == ROWS_BF16 ? 2 : 4);
    e->affinity = e->limits.owners == OWNERS_AFFINITY && e->n_ranks > 1 && e->parts.topology;
    if (!e->affinity)
        return STATUS_OK;
    e->owner_us = calloc((size_t)e->n_places * n, sizeof *e->owner_us);
    e->move_us = calloc(n, sizeof *e->move_us);
    e->has_room = calloc(n, sizeof *e->has_room);
    if (!e->owner_us || !e->move_us || !e->has_room)
        return status_fail(STATUS_NO_MEMORY, "no memory to judge owners among %d ranks", e->n_ranks);
    return owner_prices_create(e->parts.topology, row_bytes, &e->prices);
}

static bool is_travelling(const engine *e)
{
    for (int i = 0; i < MOST_TRANSFERS; i++)
        if (e->transfers[i].key && e->transfers[i].n_left > 0)
            return true;
    return false;
}

/* What still travels ends first: MPI may write into the cache until then. */
static void drain(engine *e)
{
    for (int i = 0; is_travelling(e) && i < DRAIN_SECONDS * 1000; i++) {
        if (owners_look(e) != STATUS_OK)
            return;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

void owners_destroy(engine *e)
{
    drain(e);
    owner_prices_destroy(e->prices);
    void *all[] = {e->owner_us, e->move_us, e->has_room};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- every rank: judging ---- */

void owners_forget(engine *e, int place)
{
    if (e->affinity)
        memset(e->owner_us + (size_t)place * (size_t)e->n_ranks, 0, (size_t)e->n_ranks * sizeof *e->owner_us);
}

/* Whether a span's sequence is judged after this step: its whole prompt has run then, or enough of it. */
static bool is_due(const engine *e, const batch_span *span, const sequence *s)
{
    return e->affinity && !s->judged &&
           (s->n_done + span->n_rows >= s->n_tokens || s->n_counted + span->n_rows >= AFFINITY_TOKENS);
}

int owners_count_due(const engine *e)
{
    int n = 0;
    for (int i = 0; i < e->n_spans; i++)
        n += is_due(e, &e->spans[i], &e->places[e->events[i].place]);
    return n;
}

static void count_span(engine *e, const batch_span *span, sequence *s, double *us)
{
    const model_config *c = e->parts.config;
    size_t k = (size_t)c->top_k, rows = (size_t)e->max_rows;
    for (int r = 0; r < span->n_rows && s->n_counted < COUNTED_ROWS; r++, s->n_counted++)
        for (size_t l = 0; l < (size_t)c->n_moe_layers; l++)
            owner_add_row(e->prices, e->parts.plan, (int)l,
                          model_experts(e->model) + (l * rows + (size_t)(span->first_row + r)) * k, c->top_k, us);
}

/* After the rows have run, before sequences go on; `at`: where the report has room for those that are due. */
void owners_judge(engine *e, unsigned char *at)
{
    size_t us_bytes = (size_t)e->n_ranks * sizeof(double);
    for (int i = 0; e->affinity && i < e->n_spans; i++) {
        const batch_span *span = &e->spans[i];
        sequence *s = &e->places[e->events[i].place];
        double *us = e->owner_us + (size_t)e->events[i].place * (size_t)e->n_ranks;
        bool due = is_due(e, span, s);
        if (s->judged)
            continue;
        count_span(e, span, s, us);
        if (!due)
            continue;
        s->judged = true;
        wire_judgement j = {.id = s->id,
                            .n_tokens = s->n_counted,
                            .n_done = s->n_done + span->n_rows,
                            .n_left = s->n_tokens - s->n_done - span->n_rows + s->n_left};
        memcpy(at, &j, sizeof j);
        memcpy(at + sizeof j, us, us_bytes);
        at += sizeof j + us_bytes;
    }
}

/* ---- every rank: transfers ---- */

static transfer *find_transfer(engine *e, uint64_t key)
{
    for (int i = 0; i < MOST_TRANSFERS; i++)
        if (e->transfers[i].key == key && (key == 0 || e->transfers[i].n_left > 0))
            return &e->transfers[i];
    return NULL;
}

status owners_move(engine *e, const wire_move *m, const int32_t *from_blocks, const int32_t *to_blocks)
{
    bool send = m->from == (uint32_t)e->rank, receive = m->to == (uint32_t)e->rank;
    if (!send && !receive)
        return STATUS_OK;
    transfer *t = find_transfer(e, 0);
    if (!t)
        return status_fail(STATUS_BAD_INPUT, "rank %d: more sequences move than it can keep track of", e->rank);
    *t = (transfer){.key = m->key, .n_left = (int)m->n_blocks, .sends = send};
    e->n_transfers++;
    size_t bytes = kv_cache_block_bytes(e->kv), floats = kv_cache_block_floats(e->kv);
    float *pool = kv_cache_head(e->kv, 0, 0);
    for (uint32_t i = 0; i < m->n_blocks; i++)
        TRY(send ? group_send(e->parts.group, (int)m->to, pool + (size_t)from_blocks[i] * floats, bytes, m->key)
                 : group_receive(e->parts.group, (int)m->from, pool + (size_t)to_blocks[i] * floats, bytes, m->key));
    return STATUS_OK;
}

status owners_look(engine *e)
{
    uint64_t keys[64];
    int n = 0;
    do {
        if (e->n_transfers == 0)
            return STATUS_OK;
        TRY(group_look(e->parts.group, keys, 64, &n));
        for (int i = 0; i < n; i++) {
            transfer *t = find_transfer(e, keys[i]);
            if (t)
                t->n_left--;
        }
    } while (n > 0);
    return STATUS_OK;
}

/* Those that have come to their end since the last report. */
uint32_t owners_put_ended(engine *e, bytes_writer *w)
{
    uint32_t n = 0;
    for (int i = 0; i < MOST_TRANSFERS; i++) {
        transfer *t = &e->transfers[i];
        if (t->key == 0 || t->n_left > 0)
            continue;
        wire_put_padded(w, &(wire_ended){.key = t->key, .sent = t->sends}, sizeof(wire_ended));
        t->key = 0;
        e->n_transfers--;
        n++;
    }
    return n;
}

/* ---- the leader ---- */

void owners_hear(engine *e, int rank, const wire_judgement *j, const double *us)
{
    double kv_bytes = (double)kv_blocks_of(j->n_done, KV_BLOCK) * (double)kv_cache_block_bytes(e->kv);
    for (int r = 0; r < e->n_ranks; r++) {
        e->has_room[r] = scheduler_has_room(e->scheduler, r);
        e->move_us[r] = kv_bytes * topology_us_per_byte(e->parts.topology, rank, r);
    }
    int best = owner_choose(&(owner_question){.n_ranks = e->n_ranks,
                                              .owner = rank,
                                              .us = us,
                                              .has_room = e->has_room,
                                              .move_us = e->move_us,
                                              .n_tokens = j->n_tokens,
                                              .n_left = j->n_left});
    scheduler_judge(e->scheduler, j->id, best == rank ? -1 : best);
}

void owners_end(engine *e, const wire_ended *t)
{
    if (t->sent)
        scheduler_sent(e->scheduler, t->key);
    else
        scheduler_received(e->scheduler, t->key);
}
