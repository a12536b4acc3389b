#include "worker/engine_wire.h"

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

static status cut_short(void)
{
    return status_fail(STATUS_BAD_INPUT, "a message between ranks ends too soon: are all ranks the same build?");
}

void wire_put_step(bytes_writer *w, const wire_step *step)
{
    put_padded(w, step, sizeof *step);
}

void wire_put_request(bytes_writer *w, const engine_request *request, uint64_t arrival)
{
    wire_request head = {.request = *request, .arrival = arrival};
    put_padded(w, &head, sizeof head);
    put_padded(w, request->prompt, (size_t)request->n_prompt * sizeof *request->prompt);
    const sampling_params *s = &request->sampling;
    put_padded(w, s->stop_ids, (size_t)s->n_stop_ids * sizeof *s->stop_ids);
    put_padded(w, s->biases, (size_t)s->n_biases * sizeof *s->biases);
    put_padded(w, s->allowed, (size_t)s->n_allowed * sizeof *s->allowed);
}

status wire_get_request(bytes_reader *r, wire_request *out)
{
    bytes_get(r, out, sizeof *out);
    bytes_take(r, padded(sizeof *out) - sizeof *out);
    sampling_params *s = &out->request.sampling;
    out->request.prompt = bytes_take(r, padded((size_t)out->request.n_prompt * sizeof *out->request.prompt));
    s->stop_ids = bytes_take(r, padded((size_t)s->n_stop_ids * sizeof *s->stop_ids));
    s->biases = bytes_take(r, padded((size_t)s->n_biases * sizeof *s->biases));
    bool any = s->allowed != NULL; /* NULL allows every token, an empty list none */
    const int *allowed = bytes_take(r, padded((size_t)s->n_allowed * sizeof *s->allowed));
    s->allowed = any ? allowed : NULL;
    return r->short_read ? cut_short() : STATUS_OK;
}

wire_event_place wire_put_event(bytes_writer *w, const wire_event *event, size_t choices_per_row, size_t vocab)
{
    wire_event_place place = {.event = w->size};
    size_t rows = (size_t)event->event.n_rows;
    put_padded(w, event, sizeof *event);
    place.experts = w->size;
    if (event->has_choices)
        bytes_extend(w, padded(rows * choices_per_row * sizeof(uint16_t)));
    place.weights = w->size;
    if (event->has_choices)
        bytes_extend(w, padded(rows * choices_per_row * sizeof(float)));
    place.logits = w->size;
    if (event->has_logits)
        bytes_extend(w, padded(rows * vocab * sizeof(float)));
    return place;
}

status wire_get_event(bytes_reader *r, size_t choices_per_row, size_t vocab, engine_event *out)
{
    wire_event head;
    bytes_get(r, &head, sizeof head);
    bytes_take(r, padded(sizeof head) - sizeof head);
    *out = head.event;
    size_t rows = (size_t)head.event.n_rows;
    out->experts = head.has_choices ? bytes_take(r, padded(rows * choices_per_row * sizeof(uint16_t))) : NULL;
    out->weights = head.has_choices ? bytes_take(r, padded(rows * choices_per_row * sizeof(float))) : NULL;
    out->logits = head.has_logits ? bytes_take(r, padded(rows * vocab * sizeof(float))) : NULL;
    return r->short_read ? cut_short() : STATUS_OK;
}
