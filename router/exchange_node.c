/* exchange_node.c - rows and results between the ranks of a node, without a copy.
 *
 *   window of rank A                                        window of rank B
 *   ┌ board     sent, relayed, returned: layers so far      ┌ board
 *   ├ packets   two sets, by the layer's parity  ──read──►  │ B reads its packet, then A's rows, where they lie
 *   ├ rows      written by A before send         ──read──►  │
 *   ├ results   of A's experts, source by source            ├ results ◄── B writes; A reads them while it combines
 *   ├ spills    of A's experts, source by source            ├ spills
 *   └ relay     messages of other nodes' ranks ──read──►    └ relay
 *
 * Who may still read a place when it is written again? For layer L, with A's own steps in the order send, wait, return,
 * wait_results, combine:
 *   rows      A waits in wait_results(L) for `returned` of every rank that it sent rows to; nobody else reads them. So after
 *             wait_results(L) rows are free.
 *   packets   every rank reads its packet, be it empty, and A does not wait for those with an empty one. In send(L + 2) the set
 *             of layer L is written: A's wait(L + 1) has seen `sent` L + 1 of all ranks, and a rank sends L + 1 after its own
 *             return(L), the last use of the packet. One set would not do; two need no wait of their own.
 *   results,  B writes those of L + 1 after its wait(L + 1), which has seen `sent` L + 1 of every rank; a rank sends L + 1
 *   spills    after it has combined L. The same holds for a gateway that reads them for another node.
 *   numbers   two sets, by the parity of shares: a rank writes those of share S + 2 after it has seen `shared` S + 1 of all, and
 *             a rank shares S + 1 after it has read all of S. The same holds for what the first rank gathers.
 *   relay     the gateway lets the next message in when all ranks of the node have returned L.
 *
 * Sections are address space for the worst case (every row of the job comes here); memory is set aside for what routing
 * usually brings, and more when a layer asks for it. */
#include "router/exchange_node.h"

#include <stdlib.h>
#include <string.h>

#define PAGE   ((size_t)4096)
#define ADVICE "lower --max-rows"

static size_t pages(size_t bytes)
{
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

static size_t lines(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* ---- life ---- */

static size_t row_element(const exchange *x)
{
    return x->shape.rows == ROWS_BF16 ? sizeof(uint16_t) : sizeof(float);
}

/* Every section starts on a page, so that each can be set aside by itself. */
static size_t section(size_t *end, size_t bytes)
{
    size_t at = *end;
    *end += pages(bytes);
    return at;
}

static void lay_out(exchange *x, exchange_node *n, size_t relay_bytes)
{
    const exchange_shape *s = &x->shape;
    size_t others = (size_t)x->size - 1, end = 0, entries = packet_max_entries(s->max_rows, s->top_k);
    section(&end, sizeof(node_board));
    for (int i = 0; i < 2; i++) {
        n->places[i] = section(&end, (size_t)x->size * sizeof(packet_place));
        n->packet_rows[i] = section(&end, packet_max_rows(s->max_rows, s->top_k, x->size) * sizeof(packet_row));
        n->packet_entries[i] = section(&end, entries * sizeof(packet_entry));
    }
    size_t numbers = (size_t)s->share * sizeof(int32_t), others_too = x->g->n_nodes > 1 ? (size_t)x->size : 0;
    for (int i = 0; i < 2; i++) {
        n->share[i] = section(&end, numbers);
        n->gathered[i] = section(&end, numbers * others_too);
    }
    n->result_places = section(&end, (size_t)x->size * sizeof(result_place));
    n->rows = section(&end, (size_t)s->max_rows * x->row_stride * row_element(x));
    n->relay = section(&end, relay_bytes);
    n->results_worst = pages(others * lines(x->max_results * x->result_bytes));
    n->results = section(&end, n->results_worst);
    n->spills_worst = s->combine == COMBINE_FIXED ? pages(others * entries * (size_t)s->hidden * sizeof(combine_spill)) : 0;
    n->spills = section(&end, n->spills_worst);
    n->end = end;
}

/* Result bytes to set aside at start: twice what evenly spread routes bring. */
static size_t usual_results(const exchange *x, const exchange_node *n)
{
    size_t others = (size_t)x->size - 1, size = (size_t)x->size, k = (size_t)x->shape.top_k;
    size_t per_source = (size_t)x->shape.max_rows * (x->shape.combine == COMBINE_EXACT || k < size ? k : size) / size + 1;
    size_t usual = pages(2 * others * lines(per_source * x->result_bytes));
    return usual < n->results_worst ? usual : n->results_worst;
}

static status create_window(exchange *x, exchange_node *n)
{
    TRY(node_window_create(n->peers, x->g->n_windows++, n->end, &n->window));
    TRY(node_window_commit(n->window, 0, n->results, ADVICE));
    n->results_ready = usual_results(x, n);
    return node_window_commit(n->window, n->results, n->results_ready, ADVICE);
}

static status place_rows(exchange *x, exchange_node *n)
{
    char *rows = exchange_node_at(n, n->peers->mine, n->rows);
    if (x->shape.rows == ROWS_BF16) {
        x->rows_bf16 = (uint16_t *)(void *)rows;
        return exchange_allocate(x, (size_t)x->shape.max_rows * x->row_stride * sizeof(float), &x->rows);
    }
    x->rows = (float *)(void *)rows;
    return STATUS_OK;
}

status exchange_node_open(exchange *x, exchange_node *n, size_t relay_bytes)
{
    n->peers = &x->g->peers;
    n->spin = !group_shares_cores(x->g, x->shape.n_threads);
    lay_out(x, n, relay_bytes);
    TRY(group_agree(x->g, create_window(x, n)));
    TRY(group_agree(x->g, node_window_attach(n->window)));
    node_window_unlink(n->window);
    x->buffer_bytes += node_window_committed(n->window);
    return group_agree(x->g, place_rows(x, n));
}

void exchange_node_close(exchange *x, exchange_node *n)
{
    if (x->rows_bf16)
        free(x->rows); /* fp32 rows lie in the window else */
    node_window_destroy(n->window);
    n->window = NULL;
}

char *exchange_node_at(const exchange_node *n, int local, size_t offset)
{
    return (char *)node_window_at(n->window, local) + offset;
}

node_board *exchange_node_board(const exchange_node *n, int local)
{
    return (node_board *)(void *)exchange_node_at(n, local, 0);
}

/* ---- numbers for all ---- */

void exchange_node_share(const exchange *x, const exchange_node *n, const int32_t *mine, int count)
{
    memcpy(exchange_node_at(n, n->peers->mine, n->share[x->shares & 1]), mine, (size_t)count * sizeof *mine);
    node_event_raise(&exchange_node_board(n, n->peers->mine)->shared, x->shares);
}

const int32_t *exchange_node_shared(const exchange *x, const exchange_node *n, int local)
{
    return (const int32_t *)(void *)exchange_node_at(n, local, n->share[x->shares & 1]);
}

int32_t *exchange_node_gathered(const exchange *x, const exchange_node *n)
{
    return (int32_t *)(void *)exchange_node_at(n, 0, n->gathered[x->shares & 1]);
}

/* ---- out ---- */

static int parity(const exchange *x)
{
    return (int)(x->layer & 1);
}

void exchange_node_begin(exchange *x, exchange_node *n)
{
    x->packet_rows = (packet_row *)(void *)exchange_node_at(n, n->peers->mine, n->packet_rows[parity(x)]);
    x->packet_entries = (packet_entry *)(void *)exchange_node_at(n, n->peers->mine, n->packet_entries[parity(x)]);
}

void exchange_node_publish(exchange *x, exchange_node *n)
{
    packet_place *places = (packet_place *)(void *)exchange_node_at(n, n->peers->mine, n->places[parity(x)]);
    for (int i = 0; i < n->peers->n; i++) {
        const packet *p = &x->packets[n->peers->ranks[i]];
        places[n->peers->ranks[i]] = (packet_place){.first_row = (uint32_t)(p->rows - x->packet_rows),
                                                    .n_rows = p->n_rows,
                                                    .first_entry = (uint32_t)(p->entries - x->packet_entries),
                                                    .n_entries = p->n_entries};
    }
    node_event_raise(&exchange_node_board(n, n->peers->mine)->sent, x->layer);
}

/* ---- in ---- */

void exchange_node_read(exchange *x, exchange_node *n)
{
    int side = parity(x);
    for (int i = 0; i < n->peers->n; i++) {
        if (i == n->peers->mine)
            continue;
        const packet_place *places = (const packet_place *)(void *)exchange_node_at(n, i, n->places[side]);
        const packet_place place = places[x->rank];
        const packet_row *rows = (const packet_row *)(void *)exchange_node_at(n, i, n->packet_rows[side]);
        const packet_entry *entries = (const packet_entry *)(void *)exchange_node_at(n, i, n->packet_entries[side]);
        exchange_incoming *from = &x->from[n->peers->ranks[i]];
        from->packet = (packet){.rows = rows + place.first_row,
                                .entries = entries + place.first_entry,
                                .n_rows = place.n_rows,
                                .n_entries = place.n_entries};
        from->rows = exchange_node_at(n, i, n->rows);
        from->row_bytes = x->row_stride * row_element(x);
    }
}

static status set_aside(exchange *x, exchange_node *n, size_t at, size_t *ready, size_t worst, size_t needed)
{
    if (needed <= *ready)
        return STATUS_OK;
    size_t wanted = pages(needed + needed / 4);
    wanted = wanted < worst ? wanted : worst;
    TRY(node_window_commit(n->window, at + *ready, wanted - *ready, ADVICE));
    x->buffer_bytes += wanted - *ready;
    *ready = wanted;
    return STATUS_OK;
}

static result_place *own_result_places(const exchange_node *n)
{
    return (result_place *)(void *)exchange_node_at(n, n->peers->mine, n->result_places);
}

status exchange_node_place_results(exchange *x, exchange_node *n)
{
    char *results = exchange_node_at(n, n->peers->mine, n->results);
    result_place *places = own_result_places(n);
    size_t at = 0;
    for (int s = 0; s < x->size; s++) {
        if (s == x->rank)
            continue;
        places[s].at = at;
        x->from[s].results = results + at;
        at += lines(exchange_result_rows(x, &x->from[s].packet) * x->result_bytes);
    }
    return set_aside(x, n, n->results, &n->results_ready, n->results_worst, at);
}

static status give_spills(exchange *x, exchange_node *n)
{
    result_place *places = own_result_places(n);
    combine_spill *spills = (combine_spill *)(void *)exchange_node_at(n, n->peers->mine, n->spills);
    size_t at = 0;
    for (int s = 0; s < x->size; s++) {
        if (s == x->rank)
            continue;
        size_t count = exchange_count_spills(x, s);
        places[s].first_spill = at;
        places[s].n_spills = count;
        if (count == 0)
            continue;
        TRY(set_aside(x, n, n->spills, &n->spills_ready, n->spills_worst, (at + count) * sizeof *spills));
        exchange_merge_spills(x, s, spills + at);
        at += count;
    }
    return STATUS_OK;
}

status exchange_node_give_back(exchange *x, exchange_node *n)
{
    TRY(give_spills(x, n));
    for (int i = 0; i < n->peers->n; i++)
        if (i != n->peers->mine)
            x->stats.return_bytes_same_node += exchange_result_rows(x, &x->from[n->peers->ranks[i]].packet) * x->result_bytes;
    node_event_raise(&exchange_node_board(n, n->peers->mine)->returned, x->layer);
    return STATUS_OK;
}

/* ---- home ---- */

static const result_place *place_of(const exchange_node *n, int local, int source)
{
    return (const result_place *)(void *)exchange_node_at(n, local, n->result_places) + source;
}

const void *exchange_node_results(const exchange_node *n, int local, int source)
{
    return exchange_node_at(n, local, n->results) + place_of(n, local, source)->at;
}

const combine_spill *exchange_node_spills(const exchange_node *n, int local, int source, size_t *n_spills)
{
    const result_place *place = place_of(n, local, source);
    *n_spills = place->n_spills;
    return (const combine_spill *)(void *)exchange_node_at(n, local, n->spills) + place->first_spill;
}

status exchange_node_home(exchange *x, exchange_node *n)
{
    for (int i = 0; i < n->peers->n; i++) {
        const packet *p = &x->packets[n->peers->ranks[i]];
        if (i == n->peers->mine) {
            exchange_home_add(x, p, x->own_results);
            continue;
        }
        if (p->n_rows == 0)
            continue; /* not waited for: its places may be of another layer */
        size_t n_spills;
        const combine_spill *spills = exchange_node_spills(n, i, x->rank, &n_spills);
        exchange_home_add(x, p, exchange_node_results(n, i, x->rank));
        TRY(exchange_home_spills(x, spills, n_spills, p->rows));
    }
    return STATUS_OK;
}
