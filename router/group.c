/* group.c - words between the ranks of a job, in two levels.
 *
 *   node 0: rank 0 ── board ── ranks of the node        Inside a node every rank has a board in shared memory: one chunk of bytes
 *             │ MPI                                     and four counts. The node's first rank writes chunks that all read (down)
 *   node 1: first rank ── board ── ranks of the node    and reads those that the others write (up); each chunk is acknowledged
 *                                                       before its place is used again.
 * Between nodes only first ranks speak, through group_mpi.c. */
#include "router/group_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BOARD_BYTES ((size_t)256 << 10)

typedef struct {
    node_event down;     /* first rank: chunks written for all     */
    node_event down_ack; /* others: chunks read                    */
    node_event up;       /* others: chunks written for the first   */
    node_event up_ack;   /* others: chunks the first rank has read */
    _Alignas(64) _Atomic uint32_t reported;
    _Alignas(64) group_pulse pulse;
    _Alignas(64) uint64_t size; /* of the whole message that the chunk belongs to */
    _Alignas(64) char bytes[BOARD_BYTES];
} board;

static board *board_of(const group *g, int local)
{
    return node_window_at(g->window, local);
}

/* The chunks of a message; an empty one has one, so that it is seen. */
static size_t chunk_bytes(size_t size, size_t at)
{
    return size - at < BOARD_BYTES ? size - at : BOARD_BYTES;
}

status group_buffer_reserve(group_buffer *buffer, size_t size)
{
    if (size <= buffer->capacity)
        return STATUS_OK;
    size_t capacity = size + size / 2 + 4096;
    char *bytes = realloc(buffer->bytes, capacity);
    if (!bytes)
        return status_fail(STATUS_NO_MEMORY, "no memory for a message of %zu bytes between ranks", size);
    buffer->bytes = bytes;
    buffer->capacity = capacity;
    return STATUS_OK;
}

/* ---- inside a node ---- */

/* Every word is a sign of life of the main thread. */
static void move(group *g)
{
    atomic_fetch_add_explicit(&g->pulse->moves, 1, memory_order_relaxed);
}

static status wait_board(group *g, node_event *event, uint32_t count, int local, const char *what, bool patient)
{
    const wait_reason why = {.rank = g->peers.ranks[local], .what = what, .number = count, .patient = patient};
    move(g);
    return node_event_wait(event, count, false, &g->peers, &why);
}

/* The node's first rank to all others. */
static status down_send(group *g, const void *bytes, size_t size)
{
    board *mine = g->window ? board_of(g, 0) : NULL;
    for (size_t at = 0, n; mine; at += n) {
        n = chunk_bytes(size, at);
        for (int i = 1; i < g->n_local; i++)
            TRY(wait_board(g, &board_of(g, i)->down_ack, g->down, i, "receipt of message", false));
        mine->size = size;
        if (n)
            memcpy(mine->bytes, (const char *)bytes + at, n);
        node_event_raise(&mine->down, ++g->down);
        if (at + n == size)
            break;
    }
    return STATUS_OK;
}

/* All others from the node's first rank, into `buffer`. */
static status down_receive(group *g, group_buffer *buffer, bool patient)
{
    board *first = board_of(g, 0), *mine = board_of(g, g->local);
    for (size_t at = 0, n;; at += n) {
        TRY(wait_board(g, &first->down, g->down + 1, 0, "message", patient && at == 0));
        if (at == 0) {
            TRY(group_buffer_reserve(buffer, first->size));
            buffer->size = first->size;
        }
        n = chunk_bytes(buffer->size, at);
        if (n)
            memcpy(buffer->bytes + at, first->bytes, n);
        node_event_raise(&mine->down_ack, ++g->down);
        if (at + n == buffer->size)
            return STATUS_OK;
    }
}

/* A rank to its node's first. */
static status up_send(group *g, const void *bytes, size_t size)
{
    board *mine = board_of(g, g->local);
    for (size_t at = 0, n;; at += n) {
        n = chunk_bytes(size, at);
        TRY(wait_board(g, &mine->up_ack, g->up, 0, "receipt of report", false));
        mine->size = size;
        if (n)
            memcpy(mine->bytes, (const char *)bytes + at, n);
        node_event_raise(&mine->up, ++g->up);
        if (at + n == size)
            return STATUS_OK;
    }
}

/* The node's first rank from one of the others, appended to `buffer`; *size is what was added. */
static status up_receive(group *g, int local, group_buffer *buffer, size_t *size)
{
    board *theirs = board_of(g, local);
    for (size_t at = 0, n;; at += n) {
        TRY(wait_board(g, &theirs->up, g->up_seen[local] + 1, local, "report", false));
        *size = theirs->size;
        n = chunk_bytes(*size, at);
        TRY(group_buffer_reserve(buffer, buffer->size + n));
        if (n)
            memcpy(buffer->bytes + buffer->size, theirs->bytes, n);
        buffer->size += n;
        node_event_raise(&theirs->up_ack, ++g->up_seen[local]);
        if (at + n == *size)
            return STATUS_OK;
    }
}

/* ---- all ranks ---- */

status group_broadcast(group *g, void *bytes, size_t size)
{
    if (g->local == 0) {
        if (g->n_nodes > 1)
            TRY(group_mpi_broadcast(g, bytes, size, false));
        return down_send(g, bytes, size);
    }
    TRY(down_receive(g, &g->scratch, false));
    if (g->scratch.size != size)
        return status_fail(STATUS_BAD_INPUT, "rank %d expected %zu bytes from rank 0, got %zu", g->rank, size, g->scratch.size);
    if (size)
        memcpy(bytes, g->scratch.bytes, size);
    return STATUS_OK;
}

static status message_to_node(group *g, const void **bytes, size_t *size)
{
    uint64_t n = g->rank == 0 ? *size : 0;
    TRY(group_mpi_broadcast(g, &n, sizeof n, g->rank != 0));
    if (g->rank != 0) {
        TRY(group_buffer_reserve(&g->message, n + 1));
        *bytes = g->message.bytes;
        *size = n;
    }
    return n ? group_mpi_broadcast(g, (void *)*bytes, n, false) : STATUS_OK;
}

status group_broadcast_message(group *g, const void **bytes, size_t *size)
{
    if (g->local == 0) {
        if (g->n_nodes > 1)
            TRY(message_to_node(g, bytes, size));
        atomic_fetch_add_explicit(&g->pulse->messages, 1, memory_order_relaxed);
        return down_send(g, *bytes, *size);
    }
    TRY(group_buffer_reserve(&g->message, 1));
    TRY(down_receive(g, &g->message, true));
    atomic_fetch_add_explicit(&g->pulse->messages, 1, memory_order_relaxed);
    *bytes = g->message.bytes;
    *size = g->message.size;
    return STATUS_OK;
}

/* The bytes of this node's ranks, one after the other in g->gathered from its current end, sizes into sizes [n_local]. */
static status gather_node(group *g, const void *bytes, size_t size, uint64_t *sizes)
{
    TRY(group_buffer_reserve(&g->gathered, g->gathered.size + size + 1));
    if (size)
        memcpy(g->gathered.bytes + g->gathered.size, bytes, size);
    g->gathered.size += size;
    sizes[0] = size;
    for (int i = 1; i < g->n_local; i++) {
        size_t n;
        TRY(up_receive(g, i, &g->gathered, &n));
        sizes[i] = n;
    }
    return STATUS_OK;
}

/* Rank 0: another node's part, behind what is there. */
static status take_node(group *g, int node)
{
    int n = g->size_of_node[node];
    uint64_t *sizes = (uint64_t *)g->scratch.bytes;
    TRY(group_mpi_take(g, node, sizes, (size_t)n * sizeof *sizes));
    size_t total = 0;
    for (int i = 0; i < n; i++) {
        int rank = g->rank_at[g->first_of_node[node] + i];
        g->gathered_at[rank] = g->gathered.size + total;
        g->gathered_size[rank] = sizes[i];
        total += sizes[i];
    }
    TRY(group_buffer_reserve(&g->gathered, g->gathered.size + total + 1));
    TRY(group_mpi_take(g, node, g->gathered.bytes + g->gathered.size, total));
    g->gathered.size += total;
    return STATUS_OK;
}

static status gather_all(group *g, const uint64_t *sizes)
{
    size_t at = 0;
    for (int i = 0; i < g->n_local; i++) {
        int rank = g->peers.ranks[i];
        g->gathered_at[rank] = at;
        g->gathered_size[rank] = sizes[i];
        at += sizes[i];
    }
    for (int node = 1; node < g->n_nodes; node++)
        TRY(take_node(g, node));
    return STATUS_OK;
}

status group_gather(group *g, const void *bytes, size_t size, const void **parts, size_t *sizes)
{
    if (g->local != 0)
        return up_send(g, bytes, size);
    g->gathered.size = 0;
    TRY(group_buffer_reserve(&g->scratch, (size_t)g->size * sizeof(uint64_t)));
    uint64_t *node_sizes = (uint64_t *)g->scratch.bytes;
    TRY(gather_node(g, bytes, size, node_sizes));
    if (g->rank != 0) {
        TRY(group_mpi_give(g, node_sizes, (size_t)g->n_local * sizeof *node_sizes));
        return group_mpi_give(g, g->gathered.bytes, g->gathered.size);
    }
    TRY(gather_all(g, node_sizes));
    for (int r = 0; r < g->size; r++) {
        parts[r] = g->gathered.bytes + g->gathered_at[r];
        sizes[r] = g->gathered_size[r];
    }
    return STATUS_OK;
}

status group_min(group *g, int value, int *out)
{
    int low = value;
    if (g->local != 0) {
        TRY(up_send(g, &value, sizeof value));
    } else {
        for (int i = 1; i < g->n_local; i++) {
            size_t size;
            int theirs;
            g->scratch.size = 0;
            TRY(up_receive(g, i, &g->scratch, &size));
            memcpy(&theirs, g->scratch.bytes, sizeof theirs);
            low = theirs < low ? theirs : low;
        }
        if (g->n_nodes > 1)
            TRY(group_mpi_min(g, low, &low));
    }
    if (g->local == 0) {
        TRY(down_send(g, &low, sizeof low));
    } else {
        TRY(down_receive(g, &g->scratch, false));
        memcpy(&low, g->scratch.bytes, sizeof low);
    }
    *out = low;
    return STATUS_OK;
}

status group_barrier(group *g)
{
    int ignored;
    return group_min(g, 0, &ignored);
}

status group_send(group *g, int to, const void *bytes, size_t size, uint64_t key)
{
    return group_mpi_transfer(g, to, (void *)(uintptr_t)bytes, size, true, key);
}

status group_receive(group *g, int from, void *bytes, size_t size, uint64_t key)
{
    return group_mpi_transfer(g, from, bytes, size, false, key);
}

status group_look(group *g, uint64_t *keys, int room, int *n)
{
    *n = 0;
    return g->links ? group_mpi_transferred(g, keys, room, n) : STATUS_OK;
}

/* Turns "the lowest rank that failed" into everybody's status. */
static status agreed(const group *g, status mine, int lowest)
{
    if (lowest == g->size)
        return STATUS_OK;
    return lowest == g->rank ? mine : status_fail(STATUS_ELSEWHERE, "rank %d failed", lowest);
}

/* No agreement can be reached with ranks that are gone. */
static bool beyond_agreement(status st)
{
    return st == STATUS_PEER_LOST || st == STATUS_STOPPED || st == STATUS_ELSEWHERE;
}

status group_agree(group *g, status mine)
{
    int lowest;
    if (beyond_agreement(mine))
        return mine;
    TRY(group_min(g, mine == STATUS_OK ? g->size : g->rank, &lowest));
    return agreed(g, mine, lowest);
}

/* ---- life ---- */

static int own_cores(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static status create_alone(group *g)
{
    g->size = g->n_nodes = g->n_local = 1;
    g->node_of_rank = calloc(1, sizeof(int));
    g->local_of_rank = calloc(1, sizeof(int));
    g->size_of_node = calloc(1, sizeof(int));
    g->rank_at = calloc(1, sizeof(int));
    g->first_of_node = calloc(2, sizeof(int));
    g->pid_of_node_rank = calloc(1, sizeof(int));
    g->pid_of_rank = calloc(1, sizeof(int));
    g->host = calloc(1, sizeof *g->host);
    if (!g->node_of_rank || !g->local_of_rank || !g->size_of_node || !g->rank_at || !g->first_of_node || !g->pid_of_node_rank ||
        !g->pid_of_rank || !g->host)
        return status_fail(STATUS_NO_MEMORY, "no memory for a group of one rank");
    g->size_of_node[0] = g->first_of_node[1] = 1;
    g->pid_of_node_rank[0] = g->pid_of_rank[0] = (int)getpid();
    g->n_on_host = 1;
    g->own_cores = g->host_cores = own_cores();
    gethostname(g->host[0], GROUP_HOST_BYTES - 1);
    return STATUS_OK;
}

/* [all] Everybody's status at start, when words still go through MPI alone. */
static status agree_at_start(group *g, status mine)
{
    int lowest;
    if (g->size == 1)
        return mine;
    TRY(group_mpi_min_all(g, mine == STATUS_OK ? g->size : g->rank, &lowest));
    return agreed(g, mine, lowest);
}

static status create_board(group *g)
{
    if (g->n_local == 1)
        return STATUS_OK;
    TRY(node_window_create(&g->peers, g->n_windows++, sizeof(board), &g->window));
    return node_window_commit(g->window, 0, sizeof(board), "start fewer ranks");
}

static status connect_node(group *g)
{
    g->peers = (node_peers){.n = g->n_local,
                            .mine = g->local,
                            .ranks = g->rank_at + g->first_of_node[g->node],
                            .pids = g->pid_of_node_rank,
                            .host = g->host[g->rank],
                            .job = g->peers.job,
                            .tick = g->n_nodes > 1 ? group_mpi_look : NULL,
                            .awake = RANK_WORKING,
                            .asleep = RANK_WAITING,
                            .asleep_patient = RANK_IDLE};
    g->pulse = &g->alone;
    TRY(agree_at_start(g, node_peers_open(&g->peers)));
    TRY(agree_at_start(g, create_board(g)));
    TRY(agree_at_start(g, g->window ? node_window_attach(g->window) : STATUS_OK));
    if (g->window) {
        node_window_unlink(g->window);
        g->peers.reported = &board_of(g, 0)->reported;
        g->pulse = &board_of(g, g->local)->pulse;
    }
    return STATUS_OK;
}

static status allocate_words(group *g)
{
    g->up_seen = calloc((size_t)g->n_local, sizeof *g->up_seen);
    g->gathered_at = calloc((size_t)g->size, sizeof *g->gathered_at);
    g->gathered_size = calloc((size_t)g->size, sizeof *g->gathered_size);
    return g->up_seen && g->gathered_at && g->gathered_size ? STATUS_OK
                                                            : status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", g->size);
}

status group_create(int *argc, char ***argv, int ranks_per_node, group **out)
{
    status st;
    group *g = calloc(1, sizeof *g);
    if (!g)
        return status_fail(STATUS_NO_MEMORY, "no memory for the group of ranks");
    if (group_mpi_launched())
        TRY_GOTO(group_mpi_start(g, argc, argv, ranks_per_node), failed);
    else
        TRY_GOTO(create_alone(g), failed);
    TRY_GOTO(agree_at_start(g, allocate_words(g)), failed);
    TRY_GOTO(connect_node(g), failed);
    if (g->size > 1)
        node_stop_install();
    *out = g;
    return STATUS_OK;
failed:
    group_destroy(g);
    return st;
}

void group_destroy(group *g)
{
    if (!g)
        return;
    if (g->links)
        group_mpi_finish(g);
    node_window_destroy(g->window);
    node_peers_close(&g->peers);
    int *lists[] = {g->node_of_rank,  g->local_of_rank,    g->size_of_node, g->rank_at,
                    g->first_of_node, g->pid_of_node_rank, g->pid_of_rank};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        free(lists[i]);
    free(g->host);
    free(g->up_seen);
    free(g->gathered_at);
    free(g->gathered_size);
    free(g->message.bytes);
    free(g->gathered.bytes);
    free(g->scratch.bytes);
    free(g);
}

void group_abort(group *g, int exit_code)
{
    /* Who sees this rank end need not say so again. MPI_Abort ends all ranks at once and what their pipes still hold is lost: the
     * sentence gets the time to reach mpirun, and the rank that is still about to say it gets more. */
    bool others_speak = g && g->peers.reported && atomic_exchange(g->peers.reported, 1) == 1 && !node_reports_here();
    nanosleep(&(struct timespec){.tv_nsec = others_speak ? 500000000 : 150000000}, NULL);
    if (g && g->links)
        group_mpi_abort(g, exit_code);
    _exit(exit_code);
}

/* ---- questions ---- */

int group_rank(const group *g)
{
    return g->rank;
}

int group_size(const group *g)
{
    return g->size;
}

int group_node(const group *g)
{
    return g->node;
}

int group_n_nodes(const group *g)
{
    return g->n_nodes;
}

const int *group_node_of_rank(const group *g)
{
    return g->node_of_rank;
}

const char *group_host(const group *g, int rank)
{
    return g->host[rank];
}

int group_pid(const group *g, int rank)
{
    return g->pid_of_rank[rank];
}

group_pulse *group_pulse_of(const group *g, int rank)
{
    if (rank == g->rank)
        return g->pulse;
    return g->node_of_rank[rank] == g->node ? &board_of(g, g->local_of_rank[rank])->pulse : NULL;
}

bool group_launched(void)
{
    return group_mpi_launched();
}

void group_heed_stop(void)
{
    node_stop_install();
}

bool group_shares_cores(const group *g, int threads_per_rank)
{
    return threads_per_rank > g->own_cores || (long)g->n_on_host * threads_per_rank > g->host_cores;
}

void group_stop_heard(void)
{
    node_stop_forget();
}

bool group_told_to_stop(void)
{
    return node_stop_requested();
}

void group_set_deadline(group *g, double seconds)
{
    /* Until then ranks are loading: nobody looks at their state, and no wait of theirs may pass for work. */
    g->peers.limit_seconds = seconds;
    g->peers.state = seconds > 0 ? &g->pulse->state : NULL;
    atomic_store(&g->pulse->state, seconds > 0 ? RANK_WORKING : RANK_LOADING);
}

void group_give_up(const char *sentence)
{
    node_give_up(sentence);
}
