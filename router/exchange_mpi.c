/* exchange_mpi.c - the exchange of a job of many ranks: windows inside a node (exchange_node.c), messages between nodes.
 *
 *   source s, node A                   gateway g, node B                     other ranks of B
 *   one message per node:   ─MPI─►     received straight into g's window,
 *   packets of B's ranks, rows         event `relayed`            ────────►  read packet and rows there
 *                                      waits for all of B's `returned` ◄───  results in their own windows
 *   parts of s's rows       ◄─MPI─     sums them (exact: collects), one message back
 *
 * The gateway for s is the rank of B with s's place in its own node, modulo B's size: gateways share the work evenly. A message
 * is sent to every node in every layer, if only to say that it is empty; results come back only for messages that had rows.
 *
 * No rank leaves a layer's wait or wait_results before its own messages have left it, and while anything may be under way
 * between nodes it looks into MPI: so a rank that computes or sleeps never owes its peers a message. A layer's waits depend
 * on steps of the same layer alone, taken in the same order by all, so they end. */
#include "router/exchange_node.h"

#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_TAG         2
#define RESULTS_TAG      3
#define SPILLS_TAG       4
#define SHARE_TAG        5
#define LONGEST_SLEEP_US 200u

/* Heads a message of rows; then packet_place[ranks of the receiving node], their packet_row records, their packet_entry records,
 * and at rows_at the rows, packed. Row numbers in records count packed rows. Without rows there is only the head. */
typedef struct {
    uint32_t layer, n_rows;
    uint64_t rows_at;
} rows_head;

/* Heads a message of results: at RESULTS_AT the packed rows' sums (exact: entries of the node's first rank, second, ..).
 * With spills a second message follows; their row numbers count packed rows. */
typedef struct {
    uint32_t layer, reserved;
    uint64_t n_spills;
} results_head;
#define RESULTS_AT 64

/* A node other than this rank's. */
typedef struct {
    int node, gateway;    /* gateway: its rank that takes this rank's messages */
    int first;            /* its first rank */
    char *rows, *results; /* messages out and home */
    size_t results_bytes;
    packet_row *own_row; /* [max_rows] .row: own row of each packed one */
    combine_spill *spills;
    size_t n_spills, spills_capacity;
} far_node;

/* A rank of another node that this rank takes messages from. */
typedef struct {
    int rank;
    const char *rows; /* its slot in this rank's window */
    char *results;    /* message home */
    combine_spill *spills;
    size_t n_spills, spills_capacity;
} far_source;

/* Where requests of each kind lie in mpi_links.requests, and how many of them are under way. */
typedef enum { ROWS_OUT, ROWS_IN, RESULTS_IN, RESULTS_OUT, SPILLS_OUT, SPILLS_IN, SHARE_OUT, SHARE_IN, N_KINDS } kind;

typedef struct {
    exchange_node near;
    MPI_Comm comm;
    far_node *nodes;     /* [n_nodes] those of other nodes */
    far_source *sources; /* [n_sources] */
    int n_nodes, n_sources;
    size_t slot_bytes;     /* of one message in the relay section */
    int *gateway_local;    /* [size] for a rank of another node: which rank of this node takes its messages, */
    int *gateway_slot;     /* [size] and into which slot */
    int32_t *node_numbers; /* [ranks of this node][shape.share] on its first rank */
    uint32_t *packed;      /* [max_rows] scratch: 1 + packed place of an own row, 0: not in this message */
    uint32_t relay_layer;  /* the layer whose messages are awaited or have arrived */
    int first[N_KINDS + 1], pending[N_KINDS];
    MPI_Request *requests;
    int *done; /* scratch of MPI_Testsome */
} mpi_links;

/* ---- life ---- */

static size_t align_line(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static size_t most_message_bytes(const exchange *x, int node_size)
{
    const exchange_shape *s = &x->shape;
    size_t records = sizeof(rows_head) + (size_t)node_size * sizeof(packet_place) +
                     packet_max_rows(s->max_rows, s->top_k, node_size) * sizeof(packet_row) +
                     packet_max_entries(s->max_rows, s->top_k) * sizeof(packet_entry);
    return align_line(align_line(records) + (size_t)s->max_rows * x->row_bytes);
}

static size_t most_result_bytes(const exchange *x)
{
    return RESULTS_AT + x->max_results * x->result_bytes;
}

/* Who takes whose messages; returns the most slots that any rank of this node needs. */
static int assign_gateways(exchange *x, mpi_links *m)
{
    const group *g = x->g;
    int most = 0;
    for (int i = 0; i < g->n_local; i++) {
        int slots = 0;
        for (int s = 0; s < g->size; s++)
            if (g->node_of_rank[s] != g->node && g->local_of_rank[s] % g->n_local == i) {
                m->gateway_local[s] = i;
                m->gateway_slot[s] = slots++;
            }
        most = slots > most ? slots : most;
        if (i == g->local)
            m->n_sources = slots;
    }
    m->n_nodes = g->n_nodes - 1;
    return most;
}

static status allocate_nodes(exchange *x, mpi_links *m)
{
    const group *g = x->g;
    for (int i = 0; i < m->n_nodes; i++) {
        far_node *f = &m->nodes[i];
        f->node = i < g->node ? i : i + 1;
        f->first = g->rank_at[g->first_of_node[f->node]];
        f->gateway = g->rank_at[g->first_of_node[f->node] + g->local % g->size_of_node[f->node]];
        TRY(exchange_allocate(x, most_message_bytes(x, g->size_of_node[f->node]), &f->rows));
        TRY(exchange_allocate(x, most_result_bytes(x), &f->results));
        TRY(exchange_allocate(x, (size_t)x->shape.max_rows * sizeof *f->own_row, &f->own_row));
    }
    for (int s = 0, i = 0; s < g->size; s++) {
        if (g->node_of_rank[s] == g->node || m->gateway_local[s] != g->local)
            continue;
        m->sources[i].rank = s;
        TRY(exchange_allocate(x, most_result_bytes(x), &m->sources[i].results));
        i++;
    }
    return STATUS_OK;
}

static void number_requests(mpi_links *m)
{
    const int counts[N_KINDS] = {m->n_nodes,   m->n_sources, m->n_nodes, m->n_sources,
                                 m->n_sources, m->n_nodes,   m->n_nodes, m->n_nodes};
    for (int k = 0; k < N_KINDS; k++)
        m->first[k + 1] = m->first[k] + counts[k];
}

static status allocate_links(exchange *x, mpi_links *m, size_t *relay_bytes)
{
    size_t size = (size_t)x->size;
    m->gateway_local = calloc(size, sizeof(int));
    m->gateway_slot = calloc(size, sizeof(int));
    m->packed = calloc((size_t)x->shape.max_rows, sizeof *m->packed);
    m->node_numbers = calloc((size_t)x->g->n_local * (size_t)x->shape.share + 1, sizeof *m->node_numbers);
    if (!m->gateway_local || !m->gateway_slot || !m->packed || !m->node_numbers)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for the links to %d ranks", x->rank, x->size);
    int slots = assign_gateways(x, m);
    number_requests(m);
    m->slot_bytes = most_message_bytes(x, x->g->n_local);
    *relay_bytes = (size_t)slots * m->slot_bytes;
    m->nodes = calloc((size_t)m->n_nodes + 1, sizeof *m->nodes);
    m->sources = calloc((size_t)m->n_sources + 1, sizeof *m->sources);
    m->requests = calloc((size_t)m->first[N_KINDS] + 1, sizeof *m->requests);
    m->done = calloc((size_t)m->first[N_KINDS] + 1, sizeof *m->done);
    if (!m->nodes || !m->sources || !m->requests || !m->done)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for the links to %d ranks", x->rank, x->size);
    for (int i = 0; i < m->first[N_KINDS]; i++)
        m->requests[i] = MPI_REQUEST_NULL;
    if (m->n_nodes && (m->slot_bytes > INT_MAX || most_result_bytes(x) > INT_MAX))
        return status_fail(STATUS_UNSUPPORTED,
                           "rank %d: %d rows of %d floats are more than one message between nodes holds (2 GiB): "
                           "lower --max-rows",
                           x->rank, x->shape.max_rows, x->shape.hidden);
    return allocate_nodes(x, m);
}

static status take_next_rows(exchange *x);

static status start_links(exchange *x, mpi_links *m)
{
    TRY_MPI(x->rank, MPI_Comm_dup, (MPI_COMM_WORLD, &m->comm));
    TRY_MPI(x->rank, MPI_Comm_set_errhandler, (m->comm, MPI_ERRORS_RETURN));
    for (int i = 0; i < m->n_sources; i++)
        m->sources[i].rows = exchange_node_at(&m->near, m->near.peers->mine, m->near.relay + (size_t)i * m->slot_bytes);
    return take_next_rows(x);
}

static status mpi_open(exchange *x)
{
    size_t relay_bytes = 0;
    mpi_links *m = calloc(1, sizeof *m);
    x->mine = m;
    if (m)
        m->comm = MPI_COMM_NULL;
    TRY(group_agree(x->g, m ? allocate_links(x, m, &relay_bytes) : status_fail(STATUS_NO_MEMORY, "no memory for the exchange")));
    TRY(exchange_node_open(x, &m->near, relay_bytes));
    return group_agree(x->g, start_links(x, m));
}

/* Receives for a layer that will not come are taken back. */
static void cancel_all(mpi_links *m)
{
    for (int i = 0; m->requests && i < m->first[N_KINDS]; i++)
        if (m->requests[i] != MPI_REQUEST_NULL) {
            MPI_Cancel(&m->requests[i]);
            MPI_Wait(&m->requests[i], MPI_STATUS_IGNORE);
        }
}

static void mpi_close(exchange *x)
{
    mpi_links *m = x->mine;
    if (!m)
        return;
    cancel_all(m);
    if (m->comm != MPI_COMM_NULL)
        MPI_Comm_free(&m->comm);
    exchange_node_close(x, &m->near);
    for (int i = 0; m->nodes && i < m->n_nodes; i++) {
        free(m->nodes[i].rows);
        free(m->nodes[i].results);
        free(m->nodes[i].own_row);
        free(m->nodes[i].spills);
    }
    for (int i = 0; m->sources && i < m->n_sources; i++) {
        free(m->sources[i].results);
        free(m->sources[i].spills);
    }
    free(m->nodes);
    free(m->sources);
    free(m->gateway_local);
    free(m->gateway_slot);
    free(m->packed);
    free(m->node_numbers);
    free(m->requests);
    free(m->done);
    free(m);
}

/* ---- requests ---- */

static status start_send(exchange *x, kind k, int i, const void *bytes, size_t size, int to, int tag)
{
    mpi_links *m = x->mine;
    TRY_MPI(x->rank, MPI_Isend, (bytes, (int)size, MPI_BYTE, to, tag, m->comm, &m->requests[m->first[k] + i]));
    m->pending[k]++;
    return STATUS_OK;
}

static status start_receive(exchange *x, kind k, int i, void *bytes, size_t size, int from, int tag)
{
    mpi_links *m = x->mine;
    TRY_MPI(x->rank, MPI_Irecv, (bytes, (int)size, MPI_BYTE, from, tag, m->comm, &m->requests[m->first[k] + i]));
    m->pending[k]++;
    return STATUS_OK;
}

/* Lets in the messages of the next layer; the slots are free. */
static status take_next_rows(exchange *x)
{
    mpi_links *m = x->mine;
    m->relay_layer = x->layer + 1;
    for (int i = 0; i < m->n_sources; i++)
        TRY(start_receive(x, ROWS_IN, i, (char *)m->sources[i].rows, m->slot_bytes, m->sources[i].rank, ROWS_TAG));
    return STATUS_OK;
}

static status reserve_spills(const exchange *x, combine_spill **spills, size_t *capacity, size_t n)
{
    if (n > INT_MAX / sizeof **spills)
        return status_fail(STATUS_NO_MEMORY, "rank %d: %zu elements out of range are more than one message holds", x->rank, n);
    if (n <= *capacity)
        return STATUS_OK;
    combine_spill *grown = reallocarray(*spills, n + n / 2, sizeof *grown);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for %zu elements out of range", x->rank, n);
    *spills = grown;
    *capacity = n + n / 2;
    return STATUS_OK;
}

static status results_arrived(exchange *x, int i)
{
    mpi_links *m = x->mine;
    far_node *f = &m->nodes[i];
    const results_head *head = (const results_head *)(void *)f->results;
    if (head->layer != x->layer)
        return status_fail(STATUS_BAD_INPUT, "rank %d got results of layer exchange %u from rank %d during %u", x->rank,
                           head->layer, f->gateway, x->layer);
    f->n_spills = head->n_spills;
    if (f->n_spills == 0)
        return STATUS_OK;
    TRY(reserve_spills(x, &f->spills, &f->spills_capacity, f->n_spills));
    return start_receive(x, SPILLS_IN, i, f->spills, f->n_spills * sizeof *f->spills, f->gateway, SPILLS_TAG);
}

static status request_done(exchange *x, int index)
{
    mpi_links *m = x->mine;
    kind k = ROWS_OUT;
    while (index >= m->first[k + 1])
        k++;
    m->pending[k]--;
    if (k == RESULTS_IN)
        return results_arrived(x, index - m->first[k]);
    if (k == ROWS_IN && m->pending[ROWS_IN] == 0)
        node_event_raise(&exchange_node_board(&m->near, m->near.peers->mine)->relayed, m->relay_layer);
    return STATUS_OK;
}

/* Looks into MPI and does what arrivals ask for. */
static status progress(exchange *x)
{
    mpi_links *m = x->mine;
    int n = 0;
    TRY_MPI(x->rank, MPI_Testsome, (m->first[N_KINDS], m->requests, &n, m->done, MPI_STATUSES_IGNORE));
    for (int i = 0; n != MPI_UNDEFINED && i < n; i++)
        TRY(request_done(x, m->done[i]));
    return STATUS_OK;
}

static int peer_of(const mpi_links *m, kind k, int i)
{
    if (k == SHARE_OUT || k == SHARE_IN)
        return m->nodes[i].first;
    bool to_node = k == ROWS_OUT || k == RESULTS_IN || k == SPILLS_IN;
    return to_node ? m->nodes[i].gateway : m->sources[i].rank;
}

static int first_pending(const mpi_links *m, kind k)
{
    for (int i = 0; i < m->first[k + 1] - m->first[k]; i++)
        if (m->requests[m->first[k] + i] != MPI_REQUEST_NULL)
            return peer_of(m, k, i);
    return -1;
}

/* Waits until no request of the kind is under way. */
static status wait_kind(exchange *x, kind k, const char *what)
{
    mpi_links *m = x->mine;
    node_backoff backoff = {0};
    for (;;) {
        if (m->pending[k] == 0)
            return STATUS_OK;
        TRY(progress(x));
        wait_reason why = {.rank = first_pending(m, k), .what = what, .number = x->layer};
        TRY(node_backoff_pause(&backoff, m->near.spin, LONGEST_SLEEP_US, m->near.peers, &why));
    }
}

/* Waits for another rank of this node; keeps messages between nodes going where there are any. */
static status wait_near(exchange *x, node_event *event, uint32_t layer, int local, const char *what)
{
    mpi_links *m = x->mine;
    const wait_reason why = {.rank = m->near.peers->ranks[local], .what = what, .number = layer};
    if (m->n_nodes == 0)
        return node_event_wait(event, layer, m->near.spin, m->near.peers, &why);
    node_backoff backoff = {0};
    while (!node_event_reached(event, layer)) {
        TRY(progress(x));
        status st = node_backoff_pause(&backoff, m->near.spin, LONGEST_SLEEP_US, m->near.peers, &why);
        if (st != STATUS_OK && !node_event_reached(event, layer))
            return st;
    }
    return STATUS_OK;
}

/* ---- numbers for all ---- */

/* The node's first rank: this node's numbers to the other nodes' first ranks, theirs into its window. */
static status gather_numbers(exchange *x, int n)
{
    mpi_links *m = x->mine;
    const group *g = x->g;
    size_t count = (size_t)n;
    int32_t *gathered = exchange_node_gathered(x, &m->near);
    for (int i = 0; i < g->n_local; i++)
        memcpy(m->node_numbers + (size_t)i * count, exchange_node_shared(x, &m->near, i), count * sizeof *gathered);
    for (int i = 0; i < m->n_nodes; i++) {
        const far_node *f = &m->nodes[i];
        size_t at = (size_t)g->first_of_node[f->node] * count,
               bytes = (size_t)g->size_of_node[f->node] * count * sizeof *gathered;
        TRY(start_receive(x, SHARE_IN, i, gathered + at, bytes, f->first, SHARE_TAG));
        TRY(start_send(x, SHARE_OUT, i, m->node_numbers, (size_t)g->n_local * count * sizeof *gathered, f->first, SHARE_TAG));
    }
    TRY(wait_kind(x, SHARE_IN, "counts before layer exchange"));
    TRY(wait_kind(x, SHARE_OUT, "receipt of counts before layer exchange"));
    node_event_raise(&exchange_node_board(&m->near, g->local)->gathered, x->shares);
    return STATUS_OK;
}

static status mpi_share(exchange *x, const int32_t *mine, int n, int32_t *all)
{
    mpi_links *m = x->mine;
    const group *g = x->g;
    size_t count = (size_t)n;
    exchange_node_share(x, &m->near, mine, n);
    for (int i = 0; i < g->n_local; i++) {
        if (i != g->local)
            TRY(wait_near(x, &exchange_node_board(&m->near, i)->shared, x->shares, i, "counts number"));
        memcpy(all + (size_t)m->near.peers->ranks[i] * count, exchange_node_shared(x, &m->near, i), count * sizeof *all);
    }
    if (m->n_nodes == 0)
        return STATUS_OK;
    if (g->local == 0)
        TRY(gather_numbers(x, n));
    else
        TRY(wait_near(x, &exchange_node_board(&m->near, 0)->gathered, x->shares, 0, "counts of other nodes, number"));
    const int32_t *gathered = exchange_node_gathered(x, &m->near);
    for (int k = 0; k < g->size; k++)
        if (g->node_of_rank[g->rank_at[k]] != g->node)
            memcpy(all + (size_t)g->rank_at[k] * count, gathered + (size_t)k * count, count * sizeof *all);
    return STATUS_OK;
}

/* ---- out ---- */

static status mpi_begin(exchange *x)
{
    mpi_links *m = x->mine;
    exchange_node_begin(x, &m->near);
    return STATUS_OK;
}

/* Packs the distinct rows that a node's ranks ask for, rising; returns how many. */
static uint32_t pack_rows(exchange *x, far_node *f, char *rows)
{
    mpi_links *m = x->mine;
    const group *g = x->g;
    size_t stride;
    const char *own = exchange_own_rows(x, &stride);
    memset(m->packed, 0, (size_t)x->n_rows * sizeof *m->packed);
    for (int i = 0; i < g->size_of_node[f->node]; i++) {
        const packet *p = &x->packets[g->rank_at[g->first_of_node[f->node] + i]];
        for (uint32_t r = 0; r < p->n_rows; r++)
            m->packed[p->rows[r].row] = 1;
    }
    uint32_t n = 0;
    for (uint32_t r = 0; r < (uint32_t)x->n_rows; r++) {
        if (!m->packed[r])
            continue;
        memcpy(rows + n * x->row_bytes, own + r * stride, x->row_bytes);
        f->own_row[n].row = r;
        m->packed[r] = ++n;
    }
    return n;
}

/* Head, places and records for a node's ranks; row numbers are filled in by renumber(). Returns where rows begin. */
static size_t write_records(exchange *x, far_node *f)
{
    const group *g = x->g;
    int n = g->size_of_node[f->node];
    packet_place *places = (packet_place *)(void *)(f->rows + sizeof(rows_head));
    packet_row *rows = (packet_row *)(void *)(places + n);
    uint32_t n_rows = 0, n_entries = 0;
    for (int i = 0; i < n; i++) {
        const packet *p = &x->packets[g->rank_at[g->first_of_node[f->node] + i]];
        places[i] = (packet_place){.first_row = n_rows, .n_rows = p->n_rows, .first_entry = n_entries, .n_entries = p->n_entries};
        if (p->n_rows)
            memcpy(rows + n_rows, p->rows, p->n_rows * sizeof *rows);
        n_rows += p->n_rows;
        n_entries += p->n_entries;
    }
    packet_entry *entries = (packet_entry *)(void *)(rows + n_rows);
    for (int i = 0; i < n; i++) {
        const packet *p = &x->packets[g->rank_at[g->first_of_node[f->node] + i]];
        if (p->n_entries)
            memcpy(entries + places[i].first_entry, p->entries, p->n_entries * sizeof *entries);
    }
    return align_line((size_t)((char *)(entries + n_entries) - f->rows));
}

static void renumber(const exchange *x, far_node *f)
{
    const mpi_links *m = x->mine;
    int n = x->g->size_of_node[f->node];
    const packet_place *places = (const packet_place *)(void *)(f->rows + sizeof(rows_head));
    packet_row *rows = (packet_row *)(void *)(f->rows + sizeof(rows_head) + (size_t)n * sizeof *places);
    uint32_t end = places[n - 1].first_row + places[n - 1].n_rows;
    for (uint32_t r = 0; r < end; r++)
        rows[r].row = m->packed[rows[r].row] - 1;
}

/* Results that a node will send home: entries (exact) or packed rows. */
static size_t expected_results(const exchange *x, const far_node *f, uint32_t n_rows)
{
    if (x->shape.combine != COMBINE_EXACT)
        return n_rows;
    size_t n = 0;
    for (int i = 0; i < x->g->size_of_node[f->node]; i++)
        n += x->packets[x->g->rank_at[x->g->first_of_node[f->node] + i]].n_entries;
    return n;
}

static status send_to_node(exchange *x, int i)
{
    mpi_links *m = x->mine;
    far_node *f = &m->nodes[i];
    rows_head *head = (rows_head *)(void *)f->rows;
    size_t rows_at = write_records(x, f);
    uint32_t n = pack_rows(x, f, f->rows + rows_at);
    renumber(x, f);
    *head = (rows_head){.layer = x->layer, .n_rows = n, .rows_at = rows_at};
    size_t bytes = n ? rows_at + n * x->row_bytes : sizeof *head;
    x->stats.header_bytes += n ? rows_at : sizeof *head;
    x->stats.bytes_cross_node += n * x->row_bytes;
    x->rows_sent[f->gateway] += n;
    f->n_spills = 0;
    f->results_bytes = n ? RESULTS_AT + expected_results(x, f, n) * x->result_bytes : 0;
    if (n)
        TRY(start_receive(x, RESULTS_IN, i, f->results, f->results_bytes, f->gateway, RESULTS_TAG));
    return start_send(x, ROWS_OUT, i, f->rows, bytes, f->gateway, ROWS_TAG);
}

static status mpi_send(exchange *x)
{
    mpi_links *m = x->mine;
    exchange_node_publish(x, &m->near);
    for (int i = 0; i < m->n_nodes; i++)
        TRY(send_to_node(x, i));
    return STATUS_OK;
}

/* ---- in ---- */

/* This rank's packet in the message of a rank of another node, where its gateway received it. */
static status read_relayed(exchange *x, int source)
{
    mpi_links *m = x->mine;
    const char *message =
        exchange_node_at(&m->near, m->gateway_local[source], m->near.relay + (size_t)m->gateway_slot[source] * m->slot_bytes);
    const rows_head *head = (const rows_head *)(const void *)message;
    exchange_incoming *from = &x->from[source];
    if (head->layer != x->layer)
        return status_fail(STATUS_BAD_INPUT, "rank %d got rows of layer exchange %u from rank %d during %u", x->rank, head->layer,
                           source, x->layer);
    if (head->n_rows == 0) {
        from->packet = (packet){0};
        return STATUS_OK;
    }
    int n = x->g->n_local;
    const packet_place *places = (const packet_place *)(const void *)(head + 1), *mine = &places[x->g->local];
    const packet_row *rows = (const packet_row *)(const void *)(places + n);
    const packet_entry *entries = (const packet_entry *)(const void *)(rows + places[n - 1].first_row + places[n - 1].n_rows);
    from->packet = (packet){.rows = rows + mine->first_row,
                            .entries = entries + mine->first_entry,
                            .n_rows = mine->n_rows,
                            .n_entries = mine->n_entries};
    if (m->gateway_local[source] != x->g->local) {
        x->rows_relayed[m->near.peers->ranks[m->gateway_local[source]]] += mine->n_rows;
        x->stats.bytes_relayed += mine->n_rows * x->row_bytes;
    }
    from->rows = message + head->rows_at;
    from->row_bytes = x->row_bytes;
    return STATUS_OK;
}

static status wait_far_rows(exchange *x)
{
    mpi_links *m = x->mine;
    TRY(wait_kind(x, ROWS_IN, "rows of layer exchange"));
    TRY(wait_kind(x, ROWS_OUT, "receipt of rows of layer exchange"));
    for (int i = 0; i < x->g->n_local; i++)
        if (i != x->g->local)
            TRY(wait_near(x, &exchange_node_board(&m->near, i)->relayed, x->layer, i, "relayed rows of layer exchange"));
    for (int s = 0; s < x->size; s++)
        if (x->g->node_of_rank[s] != x->g->node)
            TRY(read_relayed(x, s));
    return STATUS_OK;
}

/* Who takes no messages raises `relayed` all the same: its peers need not know. */
static void relay_nothing(exchange *x)
{
    mpi_links *m = x->mine;
    if (m->n_sources == 0)
        node_event_raise(&exchange_node_board(&m->near, x->g->local)->relayed, x->layer);
}

static status mpi_wait(exchange *x)
{
    mpi_links *m = x->mine;
    if (m->n_nodes) {
        relay_nothing(x);
        TRY(wait_far_rows(x));
    }
    for (int i = 0; i < x->g->n_local; i++)
        if (i != x->g->local)
            TRY(wait_near(x, &exchange_node_board(&m->near, i)->sent, x->layer, i, "rows of layer exchange"));
    exchange_node_read(x, &m->near);
    return exchange_node_place_results(x, &m->near);
}

/* ---- home ---- */

static status mpi_give_back(exchange *x)
{
    mpi_links *m = x->mine;
    return exchange_node_give_back(x, &m->near);
}

/* Ranks whose results this rank reads, for itself or for another node. */
static status wait_near_results(exchange *x)
{
    mpi_links *m = x->mine;
    for (int i = 0; i < x->g->n_local; i++) {
        bool needed = m->n_sources > 0 || x->packets[m->near.peers->ranks[i]].n_rows > 0;
        if (i != x->g->local && needed)
            TRY(wait_near(x, &exchange_node_board(&m->near, i)->returned, x->layer, i, "results of layer exchange"));
    }
    return STATUS_OK;
}

/* Adds what one rank of this node computed for a far source into the message home; returns the message's end so far. */
static size_t add_part(exchange *x, const packet *p, const char *part, char *message, size_t at)
{
    if (x->shape.combine == COMBINE_EXACT) {
        size_t bytes = p->n_entries * x->result_bytes;
        memcpy(message + at, part, bytes);
        return at + bytes;
    }
    for (uint32_t r = 0; r < p->n_rows; r++) {
        char *row = message + RESULTS_AT + p->rows[r].row * x->result_bytes;
        const char *more = part + r * x->result_bytes;
        if (x->shape.combine == COMBINE_FIXED)
            combine_merge_fixed((const int32_t *)(const void *)more, (size_t)x->shape.hidden, (int32_t *)(void *)row);
        else
            combine_merge_fast((const float *)(const void *)more, (size_t)x->shape.hidden, (float *)(void *)row);
    }
    return at;
}

static status add_part_spills(exchange *x, far_source *f, int local, const packet *p)
{
    mpi_links *m = x->mine;
    size_t n;
    const combine_spill *spills = exchange_node_spills(&m->near, local, f->rank, &n);
    TRY(reserve_spills(x, &f->spills, &f->spills_capacity, f->n_spills + n));
    for (size_t i = 0; i < n; i++) {
        combine_spill *spill = &f->spills[f->n_spills++];
        *spill = spills[i];
        spill->row = p->rows[spill->row].row;
    }
    return STATUS_OK;
}

/* The packet of one of this node's ranks in a far source's message, which this rank received. */
static packet relayed_packet(const exchange *x, const far_source *f, int local)
{
    const packet_place *places = (const packet_place *)(const void *)(f->rows + sizeof(rows_head));
    int n = x->g->n_local;
    const packet_row *rows = (const packet_row *)(const void *)(places + n);
    const packet_entry *entries = (const packet_entry *)(const void *)(rows + places[n - 1].first_row + places[n - 1].n_rows);
    return (packet){.rows = rows + places[local].first_row,
                    .entries = entries + places[local].first_entry,
                    .n_rows = places[local].n_rows,
                    .n_entries = places[local].n_entries};
}

/* This node's results for a far source, in one message. */
static status send_home(exchange *x, int i)
{
    mpi_links *m = x->mine;
    far_source *f = &m->sources[i];
    uint32_t n_rows = ((const rows_head *)(const void *)f->rows)->n_rows;
    if (n_rows == 0)
        return STATUS_OK;
    size_t at = RESULTS_AT;
    if (x->shape.combine != COMBINE_EXACT) {
        memset(f->results + at, 0, n_rows * x->result_bytes);
        at += n_rows * x->result_bytes;
    }
    f->n_spills = 0;
    for (int local = 0; local < x->g->n_local; local++) {
        packet p = relayed_packet(x, f, local);
        if (p.n_rows == 0)
            continue;
        at = add_part(x, &p, exchange_node_results(&m->near, local, f->rank), f->results, at);
        TRY(add_part_spills(x, f, local, &p));
    }
    *(results_head *)(void *)f->results = (results_head){.layer = x->layer, .n_spills = f->n_spills};
    x->stats.return_bytes_cross_node += at - RESULTS_AT;
    TRY(start_send(x, RESULTS_OUT, i, f->results, at, f->rank, RESULTS_TAG));
    if (f->n_spills)
        TRY(start_send(x, SPILLS_OUT, i, f->spills, f->n_spills * sizeof *f->spills, f->rank, SPILLS_TAG));
    return STATUS_OK;
}

/* Parts of own rows that another node computed. */
static status add_far_home(exchange *x, const far_node *f)
{
    if (f->results_bytes == 0)
        return STATUS_OK;
    const char *at = f->results + RESULTS_AT;
    size_t n = (f->results_bytes - RESULTS_AT) / x->result_bytes;
    if (x->shape.combine != COMBINE_EXACT) {
        for (uint32_t r = 0; r < n; r++)
            exchange_home_add_row(x, f->own_row[r].row, at + r * x->result_bytes);
        return exchange_home_spills(x, f->spills, f->n_spills, f->own_row);
    }
    for (int i = 0; i < x->g->size_of_node[f->node]; i++) {
        const packet *p = &x->packets[x->g->rank_at[x->g->first_of_node[f->node] + i]];
        exchange_home_add(x, p, at);
        at += p->n_entries * x->result_bytes;
    }
    return STATUS_OK;
}

static status wait_far_results(exchange *x)
{
    mpi_links *m = x->mine;
    for (int i = 0; i < m->n_sources; i++)
        TRY(send_home(x, i));
    TRY(wait_kind(x, RESULTS_IN, "results of layer exchange"));
    TRY(wait_kind(x, SPILLS_IN, "results of layer exchange"));
    TRY(wait_kind(x, RESULTS_OUT, "receipt of results of layer exchange"));
    TRY(wait_kind(x, SPILLS_OUT, "receipt of results of layer exchange"));
    return take_next_rows(x);
}

static status mpi_wait_results(exchange *x)
{
    mpi_links *m = x->mine;
    TRY(wait_near_results(x));
    if (m->n_nodes)
        TRY(wait_far_results(x));
    TRY(exchange_node_home(x, &m->near));
    for (int i = 0; i < m->n_nodes; i++)
        TRY(add_far_home(x, &m->nodes[i]));
    return STATUS_OK;
}

const exchange_way exchange_way_mpi = {
    .name = "mpi",
    .open = mpi_open,
    .close = mpi_close,
    .share = mpi_share,
    .begin = mpi_begin,
    .send = mpi_send,
    .wait = mpi_wait,
    .give_back = mpi_give_back,
    .wait_results = mpi_wait_results,
};
