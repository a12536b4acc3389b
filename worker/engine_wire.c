#include "worker/engine_wire.h"

#include <stdlib.h>
#include <string.h>

static size_t padded(size_t n)
{
    return (n + 7) & ~(size_t)7;
}

static void put_padded(bytes_writer *w, const void *from, size_t n)
{
    static const unsigned char zeros[8];
    bytes_put(w, from, n);
    bytes_put(w, zeros, padded(n) - n);
}

static void put_array(bytes_writer *w, const void *from, int n, size_t size)
{
    if (n > 0)
        put_padded(w, from, (size_t)n * size);
}

static const void *take_array(bytes_reader *r, int64_t n, size_t size)
{
    return bytes_take(r, padded((size_t)n * size));
}

static void get_padded(bytes_reader *r, void *to, size_t n)
{
    bytes_get(r, to, n);
    bytes_take(r, padded(n) - n);
}

static status check_read(const bytes_reader *r)
{
    if (!r->short_read)
        return STATUS_OK;
    return status_fail(STATUS_BAD_INPUT, "a message between ranks ends too soon: are all ranks the same build?");
}

/* ---- the step message ------------------------------------------------------------------------------------------------------ */

void wire_put_step(bytes_writer *w, const wire_step *head, const scheduler_step *step)
{
    put_padded(w, head, sizeof *head);
    if (!step)
        return;
    put_array(w, step->leaves, step->n_leaves, sizeof *step->leaves);
    put_array(w, step->growths, step->n_growths, sizeof *step->growths);
    put_array(w, step->rows, step->n_rows, sizeof *step->rows);
}

status wire_get_step(bytes_reader *r, wire_step_view *out)
{
    get_padded(r, &out->head, sizeof out->head);
    out->leaves = take_array(r, out->head.n_leaves, sizeof *out->leaves);
    out->growths = take_array(r, out->head.n_growths, sizeof *out->growths);
    out->rows = take_array(r, out->head.n_rows, sizeof *out->rows);
    return check_read(r);
}

void wire_put_join(bytes_writer *w, const wire_join *join)
{
    const engine_request *q = &join->request;
    const sampling_params *s = &q->sampling;
    put_padded(w, join, sizeof *join);
    put_array(w, q->prompt, q->n_prompt, sizeof *q->prompt);
    put_array(w, s->stop_ids, s->n_stop_ids, sizeof *s->stop_ids);
    put_array(w, s->biases, s->n_biases, sizeof *s->biases);
    put_array(w, s->allowed, s->n_allowed, sizeof *s->allowed);
    put_array(w, q->prompt_candidates.ids, q->prompt_candidates.n_ids, sizeof *q->prompt_candidates.ids);
    put_array(w, q->output_candidates.ids, q->output_candidates.n_ids, sizeof *q->output_candidates.ids);
    put_array(w, join->blocks, join->n_blocks, sizeof *join->blocks);
}

status wire_get_join(bytes_reader *r, wire_join *out)
{
    get_padded(r, out, sizeof *out);
    engine_request *q = &out->request;
    sampling_params *s = &q->sampling;
    bool any = s->allowed != NULL; /* NULL allows every token, an empty list none */
    q->prompt = take_array(r, q->n_prompt, sizeof *q->prompt);
    s->stop_ids = take_array(r, s->n_stop_ids, sizeof *s->stop_ids);
    s->biases = take_array(r, s->n_biases, sizeof *s->biases);
    s->allowed = take_array(r, s->n_allowed, sizeof *s->allowed);
    q->prompt_candidates.ids = take_array(r, q->prompt_candidates.n_ids, sizeof *q->prompt_candidates.ids);
    q->output_candidates.ids = take_array(r, q->output_candidates.n_ids, sizeof *q->output_candidates.ids);
    out->blocks = take_array(r, out->n_blocks, sizeof *out->blocks);
    if (!any)
        s->allowed = NULL;
    return check_read(r);
}

void wire_put_move(bytes_writer *w, const scheduler_move *m)
{
    put_padded(w,
               &(wire_move){.key = m->key, .from = (uint32_t)m->from, .to = (uint32_t)m->to, .n_blocks = (uint32_t)m->n_blocks},
               sizeof(wire_move));
    put_array(w, m->from_blocks, m->n_blocks, sizeof *m->from_blocks);
    put_array(w, m->to_blocks, m->n_blocks, sizeof *m->to_blocks);
}

status wire_get_move(bytes_reader *r, wire_move *out, const int32_t **from_blocks, const int32_t **to_blocks)
{
    get_padded(r, out, sizeof *out);
    *from_blocks = take_array(r, out->n_blocks, sizeof **from_blocks);
    *to_blocks = take_array(r, out->n_blocks, sizeof **to_blocks);
    return check_read(r);
}

/* Only copies travel: what else a plan holds is the same on all ranks. */
void wire_put_plan(bytes_writer *w, const plan *p)
{
    int n_lists = p->n_layers * p->n_experts;
    put_array(w, p->first_copy, n_lists + 1, sizeof *p->first_copy);
    put_array(w, p->copy_ranks, p->first_copy[n_lists], sizeof *p->copy_ranks);
    put_padded(w, p->name, sizeof p->name);
}

static void *copy_of(const void *from, size_t n)
{
    void *to = malloc(n + 1);
    return to ? memcpy(to, from, n) : NULL;
}

status wire_get_plan(bytes_reader *r, const plan *like, plan *out)
{
    size_t n_lists = (size_t)like->n_layers * (size_t)like->n_experts;
    const int *first = take_array(r, (int64_t)n_lists + 1, sizeof *first);
    const int *ranks = first ? take_array(r, first[n_lists], sizeof *ranks) : NULL;
    plan p = {.n_ranks = like->n_ranks, .n_experts = like->n_experts, .n_layers = like->n_layers};
    get_padded(r, p.name, sizeof p.name);
    TRY(check_read(r));
    p.layer_numbers = copy_of(like->layer_numbers, (size_t)like->n_layers * sizeof *like->layer_numbers);
    p.node_of_rank = copy_of(like->node_of_rank, (size_t)like->n_ranks * sizeof *like->node_of_rank);
    p.first_copy = copy_of(first, (n_lists + 1) * sizeof *first);
    p.copy_ranks = copy_of(ranks, (size_t)first[n_lists] * sizeof *ranks);
    if (!p.layer_numbers || !p.node_of_rank || !p.first_copy || !p.copy_ranks) {
        plan_clear(&p);
        return status_fail(STATUS_NO_MEMORY, "no memory for a plan of %d copies", first[n_lists]);
    }
    *out = p;
    return STATUS_OK;
}

void wire_put_padded(bytes_writer *w, const void *from, size_t n)
{
    if (n > 0)
        put_padded(w, from, n);
}

const void *wire_take_padded(bytes_reader *r, size_t n)
{
    return n > 0 ? bytes_take(r, padded(n)) : NULL;
}

/* ---- events ---------------------------------------------------------------------------------------------------------------- */

typedef struct {
    size_t experts, weights, logits, logprobs, counts, candidates, reason;
} payload_sizes;

static payload_sizes sizes_of(const wire_event *w, size_t choices_per_row, size_t vocab)
{
    size_t rows = (size_t)w->event.n_rows;
    return (payload_sizes){.experts = w->has_choices ? padded(rows * choices_per_row * sizeof(uint16_t)) : 0,
                           .weights = w->has_choices ? padded(rows * choices_per_row * sizeof(float)) : 0,
                           .logits = w->has_logits ? padded(rows * vocab * sizeof(float)) : 0,
                           .logprobs = w->has_logprobs ? padded(rows * sizeof(token_logprob)) : 0,
                           .counts = w->has_logprobs ? padded(rows * sizeof(int)) : 0,
                           .candidates = padded(w->n_reserved * sizeof(token_logprob)),
                           .reason = padded(w->reason_bytes)};
}

static size_t extend(bytes_writer *w, size_t n)
{
    size_t at = w->size;
    if (n > 0)
        bytes_extend(w, n);
    return at;
}

wire_event_place wire_put_event(bytes_writer *w, const wire_event *event, size_t choices_per_row, size_t vocab)
{
    payload_sizes n = sizes_of(event, choices_per_row, vocab);
    wire_event_place place = {.event = w->size};
    put_padded(w, event, sizeof *event);
    place.experts = extend(w, n.experts);
    place.weights = extend(w, n.weights);
    place.logits = extend(w, n.logits);
    place.logprobs = extend(w, n.logprobs);
    place.counts = extend(w, n.counts);
    place.candidates = extend(w, n.candidates);
    place.reason = extend(w, n.reason);
    return place;
}

static const void *take_some(bytes_reader *r, size_t n)
{
    return n > 0 ? bytes_take(r, n) : NULL;
}

status wire_get_event(bytes_reader *r, size_t choices_per_row, size_t vocab, engine_event *out, bool *is_void)
{
    wire_event head;
    get_padded(r, &head, sizeof head);
    payload_sizes n = sizes_of(&head, choices_per_row, vocab);
    *out = head.event;
    *is_void = head.is_void;
    out->experts = take_some(r, n.experts);
    out->weights = take_some(r, n.weights);
    out->logits = take_some(r, n.logits);
    out->logprobs = take_some(r, n.logprobs);
    out->candidates_of_row = take_some(r, n.counts);
    out->candidates = take_some(r, n.candidates);
    out->reason = take_some(r, n.reason);
    return check_read(r);
}
