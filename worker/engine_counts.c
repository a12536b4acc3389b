/* engine_counts.c - the routing statistics of all ranks, asked for now and then while steps run.
 *
 *   step message "count"    every rank sets its counts aside and starts new ones (no copy: two objects change places)
 *   beside the steps        an errand packs them: some bytes for each count that is not zero
 *   the next steps          a few ranks at a time send a piece with each report
 *   beside the steps        the leader's errand adds them up, and packs the sum when all have sent theirs
 *
 * So a step carries at most SENDERS pieces more, and no memory grows with the number of ranks. */
#include "worker/engine_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE_BYTES = 64 << 10 };

static status create_counts(const engine *e, routing_stats **out)
{
    const model_config *c = e->parts.config;
    routing_shape shape = {.model = c->name,
                           .n_experts = c->n_experts,
                           .top_k = c->top_k,
                           .n_layers = c->n_moe_layers,
                           .layer_numbers = e->parts.plan->layer_numbers,
                           .n_domains = e->limits.n_domains,
                           .domains = e->limits.domains};
    return routing_stats_create(&shape, e->limits.count_pairs, out);
}

status counts_create(engine *e)
{
    return create_counts(e, &e->routing);
}

void counts_destroy(engine *e)
{
    errand_end(&e->packing);
    errand_end(&e->adding);
    routing_stats_destroy(e->routing);
    routing_stats_destroy(e->set_aside);
    routing_stats_destroy(e->sum);
    bytes_clear(&e->packed);
    for (int i = 0; i < COUNT_SENDERS; i++)
        bytes_clear(&e->received[i]);
    bytes_clear(&e->answer);
}

/* ---- every rank ---- */

static status pack(void *arg)
{
    engine *e = arg;
    TRY(routing_stats_pack(e->set_aside, &e->packed));
    routing_stats_destroy(e->set_aside);
    e->set_aside = NULL;
    return STATUS_OK;
}

static status set_aside(engine *e)
{
    routing_stats *fresh;
    status before = errand_end(&e->packing); /* of a request that was given up */
    (void)before;
    routing_stats_destroy(e->set_aside);
    e->set_aside = NULL;
    bytes_reset(&e->packed);
    e->n_sent = 0;
    TRY(create_counts(e, &fresh));
    e->set_aside = e->routing;
    e->routing = fresh;
    return errand_start(&e->packing, pack, e);
}

void counts_obey(engine *e, const wire_step *head)
{
    e->sends_counts = (uint32_t)e->rank >= head->first_sender && (uint32_t)e->rank < head->end_sender;
    if (head->count)
        e->counting = set_aside(e);
}

/* Fills in what this report carries; the piece itself is put behind. Returns the sentence of a failure, which stays in
 * status_message(). */
status counts_report(engine *e, wire_report *report, const void **piece)
{
    if (!e->sends_counts)
        return STATUS_OK;
    if (e->counting == STATUS_OK && e->packing.out) {
        if (!errand_is_done(&e->packing))
            return STATUS_OK;
        e->counting = errand_end(&e->packing);
    }
    if (e->counting != STATUS_OK) {
        report->counts_state = COUNTS_FAILED;
        return e->counting;
    }
    size_t left = e->packed.size - e->n_sent, n = left < PIECE_BYTES ? left : PIECE_BYTES;
    *piece = e->packed.data + e->n_sent;
    e->n_sent += n;
    report->counts_bytes = (uint32_t)n;
    report->counts_state = e->n_sent == e->packed.size ? COUNTS_LAST : COUNTS_MORE;
    return STATUS_OK;
}

/* ---- the leader ---- */

status engine_ask_counts(engine *e)
{
    if (e->counts_stage != COUNTS_AT_REST)
        return status_fail(STATUS_BAD_INPUT, "the routing statistics are being gathered already");
    e->counts_stage = COUNTS_ASKED;
    e->counts_failed = STATUS_OK;
    return STATUS_OK;
}

bool counts_pending(const engine *e)
{
    return e->counts_stage != COUNTS_AT_REST && e->counts_stage != COUNTS_ANSWERED;
}

static int end_sender(const engine *e)
{
    return e->first_sender + COUNT_SENDERS < e->n_ranks ? e->first_sender + COUNT_SENDERS : e->n_ranks;
}

/* The next ranks, from `first` on. */
static void take_from(engine *e, int first)
{
    e->counts_stage = COUNTS_COMING;
    e->first_sender = first;
    e->n_complete = 0;
    for (int i = 0; i < COUNT_SENDERS; i++) {
        bytes_reset(&e->received[i]);
        e->is_complete[i] = false;
    }
}

void counts_decide(engine *e, wire_step *head)
{
    if (e->counts_stage == COUNTS_ASKED) {
        head->count = 1;
        take_from(e, 0);
    }
    if (e->counts_stage != COUNTS_COMING)
        return;
    head->first_sender = (uint32_t)e->first_sender;
    head->end_sender = (uint32_t)end_sender(e);
}

static void fail(engine *e, status st, int rank, const char *sentence, size_t n)
{
    e->counts_failed = st;
    snprintf(e->counts_why, sizeof e->counts_why, "rank %d: %.*s", rank, (int)n, sentence);
    e->counts_stage = COUNTS_ANSWERED;
}

void counts_hear(engine *e, int rank, const wire_report *report, const void *piece, const char *sentence)
{
    int i = rank - e->first_sender;
    if (e->counts_stage != COUNTS_COMING || i < 0 || i >= COUNT_SENDERS || e->is_complete[i])
        return;
    if (report->counts_state == COUNTS_FAILED) {
        fail(e, STATUS_NO_MEMORY, rank, sentence, report->sentence_bytes);
        return;
    }
    if (report->counts_bytes)
        bytes_put(&e->received[i], piece, report->counts_bytes);
    if (report->counts_state == COUNTS_LAST) {
        e->is_complete[i] = true;
        e->n_complete++;
    }
}

static status add_up(void *arg)
{
    engine *e = arg;
    if (!e->sum)
        TRY(create_counts(e, &e->sum));
    for (int i = 0; i < end_sender(e) - e->first_sender; i++)
        TRY(e->received[i].failed ? status_fail(STATUS_NO_MEMORY, "no memory for the counts of rank %d", e->first_sender + i)
                                  : routing_stats_add_packed(e->sum, e->received[i].data, e->received[i].size));
    if (end_sender(e) < e->n_ranks)
        return STATUS_OK;
    e->counted_tokens = 0;
    for (int d = 0; d < e->limits.n_domains; d++)
        for (int phase = 0; phase < N_PHASES; phase++)
            e->counted_tokens += routing_stats_tokens(e->sum, d, phase);
    bytes_reset(&e->answer);
    TRY(routing_stats_pack(e->sum, &e->answer));
    routing_stats_destroy(e->sum);
    e->sum = NULL;
    return STATUS_OK;
}

/* Once per step, after all reports. */
void counts_conclude(engine *e)
{
    status st = STATUS_OK;
    if (e->counts_stage == COUNTS_COMING && e->n_complete == end_sender(e) - e->first_sender) {
        e->counts_stage = COUNTS_ADDING;
        st = errand_start(&e->adding, add_up, e);
    } else if (e->counts_stage == COUNTS_ADDING && errand_is_done(&e->adding)) {
        st = errand_end(&e->adding);
        if (st == STATUS_OK && end_sender(e) < e->n_ranks)
            take_from(e, end_sender(e));
        else
            e->counts_stage = COUNTS_ANSWERED;
    }
    if (st != STATUS_OK)
        fail(e, st, 0, status_message(), strlen(status_message()));
    if (e->counts_stage == COUNTS_ANSWERED && e->counts_failed != STATUS_OK) {
        routing_stats_destroy(e->sum);
        e->sum = NULL;
    }
}

bool engine_take_counts(engine *e, engine_counts *out)
{
    if (e->counts_stage != COUNTS_ANSWERED)
        return false;
    e->counts_stage = COUNTS_AT_REST;
    *out = (engine_counts){.bytes = e->answer.data,
                           .size = e->answer.size,
                           .tokens = e->counted_tokens,
                           .failed = e->counts_failed == STATUS_OK ? NULL : e->counts_why};
    return true;
}
