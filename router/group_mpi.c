/* group_mpi.c - the group's words between nodes, and MPI's start and end. One of the two files that see mpi.h.
 *
 * MPI waits by burning a core, so nothing here blocks in MPI after the start: requests are tested, with sleeps of up to four
 * milliseconds between, and the wait ends when a peer of the node dies or this rank is told to stop. */
#include "router/group_internal.h"

#include <fcntl.h>
#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define LONGEST_SLEEP_US 4000u
#define PIECE_BYTES      ((size_t)64 << 20) /* MPI counts are ints */
#define REPORT_TAG       1
#define TRANSFER_TAG     6

struct group_links {
    MPI_Comm world;         /* ours: the application's errors must not meet another library's messages */
    MPI_Comm firsts;        /* the first rank of each node, in node order; MPI_COMM_NULL elsewhere */
    int mine, low;          /* operands of a minimum: they outlive a wait that is given up */
    MPI_Request *transfers; /* [n_transfers] under way between this rank and others, with their keys */
    uint64_t *keys;
    int *done; /* [room] scratch */
    int n_transfers, room;
    char own_segment[300]; /* name that this rank's segment lost; "": it kept it */
};

/* What every rank tells all others at start. */
typedef struct {
    char host[GROUP_HOST_BYTES];
    int pid;
    int machine; /* lowest rank that shares memory with this one */
    cpu_set_t cores;
} introduction;

status group_mpi_failed(int rank, const char *call, int error)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;
    MPI_Error_string(error, text, &n);
    return status_fail(STATUS_IO, "rank %d: %s: %s", rank, call, text);
}

bool group_mpi_launched(void)
{
    static const char *const signs[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMI_FD", "PMIX_RANK", "PMIX_NAMESPACE"};
    for (size_t i = 0; i < sizeof signs / sizeof *signs; i++)
        if (getenv(signs[i]))
            return true;
    return false;
}

/* ---- start ---- */

static status start_mpi(group *g, int *argc, char ***argv)
{
    int provided;
    TRY_MPI(0, MPI_Init_thread, (argc, argv, MPI_THREAD_FUNNELED, &provided));
    TRY_MPI(0, MPI_Comm_dup, (MPI_COMM_WORLD, &g->links->world));
    TRY_MPI(0, MPI_Comm_set_errhandler, (g->links->world, MPI_ERRORS_RETURN));
    TRY_MPI(0, MPI_Comm_rank, (g->links->world, &g->rank));
    TRY_MPI(g->rank, MPI_Comm_size, (g->links->world, &g->size));
    /* A launcher that clears away what a killed job leaves in /dev/shm has chosen the number itself. */
    const char *job = getenv("CONVOKE_JOB");
    g->peers.job = job ? strtoull(job, NULL, 16) : 0;
    if (g->peers.job == 0 && getrandom(&g->peers.job, sizeof g->peers.job, 0) != sizeof g->peers.job)
        return status_fail(STATUS_IO, "rank %d: the system gives no random numbers", g->rank);
    TRY_MPI(g->rank, MPI_Bcast, (&g->peers.job, sizeof g->peers.job, MPI_BYTE, 0, g->links->world));
    return STATUS_OK;
}

/* ---- what Open MPI keeps in /dev/shm ---- */

typedef struct {
    char (*paths)[300]; /* [capacity] of the files of segments that this process has mapped */
    int n, capacity;
} segment_list;

static void note_segment(segment_list *l, char *line)
{
    char *path = strchr(line, '/');
    if (!path || (!strstr(path, "/vader_segment.") && !strstr(path, "/sm_segment.")))
        return;
    path[strcspn(path, "\n")] = '\0';
    for (int i = 0; i < l->n; i++)
        if (strcmp(l->paths[i], path) == 0)
            return;
    if (l->n < l->capacity && strlen(path) < sizeof l->paths[0])
        strcpy(l->paths[l->n], path);
    l->n++; /* also what does not fit: then the number is wrong, and nothing is done */
}

static void find_segments(segment_list *l)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[1024];
    while (maps && fgets(line, sizeof line, maps))
        note_segment(l, line);
    if (maps)
        fclose(maps);
}

/* Open MPI's segments are files that stay when a rank and its daemon are killed: many megabytes with each lost launch, on every
 * host. They lose their names as soon as all ranks of the machine have mapped them all, which MPI_Init has seen to. */
static status forget_segments(group *g, MPI_Comm machine)
{
    int n = 0, complete = 0, all_complete = 0;
    TRY_MPI(g->rank, MPI_Comm_size, (machine, &n));
    segment_list l = {.paths = calloc((size_t)n, sizeof *l.paths), .capacity = n};
    if (l.paths)
        find_segments(&l);
    complete = l.n == n;
    int error = MPI_Allreduce(&complete, &all_complete, 1, MPI_INT, MPI_MIN, machine);
    int local = 0;
    MPI_Comm_rank(machine, &local);
    for (int i = 0; i < n && error == MPI_SUCCESS && all_complete; i++) {
        unlink(l.paths[i]); /* another rank may have been first */
        const char *number = strrchr(l.paths[i], '.');
        if (number && atoi(number + 1) == local)
            snprintf(g->links->own_segment, sizeof g->links->own_segment, "%s", l.paths[i]);
    }
    free(l.paths);
    return error == MPI_SUCCESS ? STATUS_OK : group_mpi_failed(g->rank, "MPI_Allreduce", error);
}

/* Open MPI takes its segment's name away at the end, and complains at length when it is gone: so there is one to take. */
static void give_name_back(const group_links *links)
{
    int fd = *links->own_segment ? open(links->own_segment, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600) : -1;
    if (fd >= 0)
        close(fd);
}

static status introduce(group *g, introduction *all)
{
    introduction me = {.pid = (int)getpid()};
    MPI_Comm machine;
    gethostname(me.host, sizeof me.host - 1);
    CPU_ZERO(&me.cores);
    sched_getaffinity(0, sizeof me.cores, &me.cores);
    TRY_MPI(g->rank, MPI_Comm_split_type, (g->links->world, MPI_COMM_TYPE_SHARED, g->rank, MPI_INFO_NULL, &machine));
    me.machine = g->rank;
    TRY_MPI(g->rank, MPI_Bcast, (&me.machine, 1, MPI_INT, 0, machine));
    TRY(forget_segments(g, machine));
    TRY_MPI(g->rank, MPI_Comm_free, (&machine));
    TRY_MPI(g->rank, MPI_Allgather, (&me, sizeof me, MPI_BYTE, all, sizeof me, MPI_BYTE, g->links->world));
    return STATUS_OK;
}

/* Nodes are numbered by their lowest rank, ranks inside a node by rank. */
static void number_nodes(group *g, const introduction *all, int ranks_per_node)
{
    g->n_nodes = 0;
    for (int r = 0; r < g->size; r++) {
        int twin = 0;
        while (twin < r &&
               !(all[twin].machine == all[r].machine && (ranks_per_node == 0 || twin / ranks_per_node == r / ranks_per_node)))
            twin++;
        int node = twin < r ? g->node_of_rank[twin] : g->n_nodes++;
        g->node_of_rank[r] = node;
        g->local_of_rank[r] = g->size_of_node[node]++;
    }
    for (int n = 0; n < g->n_nodes; n++)
        g->first_of_node[n + 1] = g->first_of_node[n] + g->size_of_node[n];
    for (int r = 0; r < g->size; r++)
        g->rank_at[g->first_of_node[g->node_of_rank[r]] + g->local_of_rank[r]] = r;
    g->node = g->node_of_rank[g->rank];
    g->local = g->local_of_rank[g->rank];
    g->n_local = g->size_of_node[g->node];
}

static void count_cores(group *g, const introduction *all)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (int r = 0; r < g->size; r++) {
        if (all[r].machine != all[g->rank].machine)
            continue;
        g->n_on_host++;
        CPU_OR(&cores, &cores, &all[r].cores);
    }
    g->own_cores = CPU_COUNT(&all[g->rank].cores);
    g->host_cores = CPU_COUNT(&cores);
}

static status allocate_tables(group *g)
{
    size_t n = (size_t)g->size;
    g->node_of_rank = calloc(n, sizeof(int));
    g->local_of_rank = calloc(n, sizeof(int));
    g->size_of_node = calloc(n, sizeof(int));
    g->rank_at = calloc(n, sizeof(int));
    g->first_of_node = calloc(n + 1, sizeof(int));
    g->pid_of_node_rank = calloc(n, sizeof(int));
    g->pid_of_rank = calloc(n, sizeof(int));
    g->host = calloc(n, sizeof *g->host);
    if (!g->node_of_rank || !g->local_of_rank || !g->size_of_node || !g->rank_at || !g->first_of_node || !g->pid_of_node_rank ||
        !g->pid_of_rank || !g->host)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for the tables of %d ranks", g->rank, g->size);
    return STATUS_OK;
}

static status place_ranks(group *g, introduction *all, int ranks_per_node)
{
    TRY(introduce(g, all));
    number_nodes(g, all, ranks_per_node);
    count_cores(g, all);
    for (int r = 0; r < g->size; r++) {
        memcpy(g->host[r], all[r].host, sizeof all[r].host);
        g->pid_of_rank[r] = all[r].pid;
    }
    for (int i = 0; i < g->n_local; i++)
        g->pid_of_node_rank[i] = all[g->rank_at[g->first_of_node[g->node] + i]].pid;
    TRY_MPI(g->rank, MPI_Comm_split, (g->links->world, g->local == 0 ? 0 : MPI_UNDEFINED, g->rank, &g->links->firsts));
    if (g->local == 0)
        TRY_MPI(g->rank, MPI_Comm_set_errhandler, (g->links->firsts, MPI_ERRORS_RETURN));
    return STATUS_OK;
}

status group_mpi_start(group *g, int *argc, char ***argv, int ranks_per_node)
{
    g->links = malloc(sizeof *g->links);
    if (!g->links)
        return status_fail(STATUS_NO_MEMORY, "no memory for the links between ranks");
    *g->links = (group_links){.world = MPI_COMM_NULL, .firsts = MPI_COMM_NULL};
    TRY(start_mpi(g, argc, argv));
    TRY(allocate_tables(g));
    introduction *all = calloc((size_t)g->size, sizeof *all);
    if (!all)
        return status_fail(STATUS_NO_MEMORY, "rank %d: no memory for the tables of %d ranks", g->rank, g->size);
    status st = place_ranks(g, all, ranks_per_node);
    free(all);
    return st;
}

void group_mpi_finish(group *g)
{
    int started = 0;
    MPI_Initialized(&started);
    if (started) {
        for (int i = 0; i < g->links->n_transfers; i++) {
            MPI_Cancel(&g->links->transfers[i]);
            MPI_Request_free(&g->links->transfers[i]);
        }
        if (g->links->firsts != MPI_COMM_NULL)
            MPI_Comm_free(&g->links->firsts);
        if (g->links->world != MPI_COMM_NULL)
            MPI_Comm_free(&g->links->world);
        give_name_back(g->links);
        MPI_Finalize();
    }
    free(g->links->transfers);
    free(g->links->keys);
    free(g->links->done);
    free(g->links);
    g->links = NULL;
}

static int abort_code;

static void end_at_once(int number)
{
    (void)number;
    _exit(abort_code);
}

void group_mpi_abort(group *g, int exit_code)
{
    /* MPI_Abort talks to a launcher that may be gone itself: one second, then this process ends by its own hand. */
    abort_code = exit_code;
    struct sigaction action = {.sa_handler = end_at_once};
    sigaction(SIGALRM, &action, NULL);
    alarm(1);
    MPI_Abort(g->links->world, exit_code);
}

/* ---- words ---- */

static status finish(group *g, MPI_Request *request, const char *call, bool patient)
{
    static uint32_t number;
    const wait_reason why = {.rank = -1, .what = "word between nodes", .number = ++number, .patient = patient};
    node_backoff backoff = {0};
    atomic_fetch_add_explicit(&g->pulse->moves, 1, memory_order_relaxed);
    for (;;) {
        int done = 0;
        int error = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (error != MPI_SUCCESS)
            return group_mpi_failed(g->rank, call, error);
        if (done)
            return STATUS_OK;
        TRY(node_backoff_pause(&backoff, false, LONGEST_SLEEP_US, &g->peers, &why));
    }
}

status group_mpi_min_all(group *g, int value, int *out)
{
    TRY_MPI(g->rank, MPI_Allreduce, (&value, out, 1, MPI_INT, MPI_MIN, g->links->world));
    return STATUS_OK;
}

status group_mpi_min(group *g, int value, int *out)
{
    MPI_Request request;
    group_links *l = g->links;
    l->mine = value;
    TRY_MPI(g->rank, MPI_Iallreduce, (&l->mine, &l->low, 1, MPI_INT, MPI_MIN, l->firsts, &request));
    TRY(finish(g, &request, "MPI_Iallreduce", false));
    *out = l->low;
    return STATUS_OK;
}

/* Some MPIs finish sending only when they are called again; a rank asleep on its node's memory calls here now and then. */
void group_mpi_look(void)
{
    int there;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &there, MPI_STATUS_IGNORE);
}

static int piece(size_t size, size_t at)
{
    return (int)(size - at < PIECE_BYTES ? size - at : PIECE_BYTES);
}

status group_mpi_broadcast(group *g, void *bytes, size_t size, bool patient)
{
    for (size_t at = 0; at < size; at += PIECE_BYTES) {
        MPI_Request request;
        TRY_MPI(g->rank, MPI_Ibcast, ((char *)bytes + at, piece(size, at), MPI_BYTE, 0, g->links->firsts, &request));
        TRY(finish(g, &request, "MPI_Ibcast", patient));
    }
    return STATUS_OK;
}

status group_mpi_give(group *g, const void *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += PIECE_BYTES) {
        MPI_Request request;
        TRY_MPI(g->rank, MPI_Isend,
                ((const char *)bytes + at, piece(size, at), MPI_BYTE, 0, REPORT_TAG, g->links->firsts, &request));
        TRY(finish(g, &request, "MPI_Isend", false));
    }
    return STATUS_OK;
}

status group_mpi_take(group *g, int node, void *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += PIECE_BYTES) {
        MPI_Request request;
        TRY_MPI(g->rank, MPI_Irecv,
                ((char *)bytes + at, piece(size, at), MPI_BYTE, node, REPORT_TAG, g->links->firsts, &request));
        TRY(finish(g, &request, "MPI_Irecv", false));
    }
    return STATUS_OK;
}

/* ---- transfers ---- */

static status reserve_transfer(group_links *l)
{
    if (l->n_transfers < l->room)
        return STATUS_OK;
    int room = l->room ? 2 * l->room : 64;
    MPI_Request *transfers = reallocarray(l->transfers, (size_t)room, sizeof *transfers);
    l->transfers = transfers ? transfers : l->transfers;
    uint64_t *keys = reallocarray(l->keys, (size_t)room, sizeof *keys);
    l->keys = keys ? keys : l->keys;
    int *done = reallocarray(l->done, (size_t)room, sizeof *done);
    l->done = done ? done : l->done;
    if (!transfers || !keys || !done)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d transfers between ranks", room);
    l->room = room;
    return STATUS_OK;
}

status group_mpi_transfer(group *g, int peer, void *bytes, size_t size, bool send, uint64_t key)
{
    group_links *l = g->links;
    if (size > INT_MAX)
        return status_fail(STATUS_UNSUPPORTED, "rank %d: %zu bytes are more than one transfer holds (2 GiB)", g->rank, size);
    TRY(reserve_transfer(l));
    MPI_Request *request = &l->transfers[l->n_transfers];
    if (send)
        TRY_MPI(g->rank, MPI_Isend, (bytes, (int)size, MPI_BYTE, peer, TRANSFER_TAG, l->world, request));
    else
        TRY_MPI(g->rank, MPI_Irecv, (bytes, (int)size, MPI_BYTE, peer, TRANSFER_TAG, l->world, request));
    l->keys[l->n_transfers++] = key;
    return STATUS_OK;
}

status group_mpi_transferred(group *g, uint64_t *keys, int room, int *n)
{
    group_links *l = g->links;
    int n_done = 0;
    *n = 0;
    if (l->n_transfers == 0)
        return STATUS_OK;
    TRY_MPI(g->rank, MPI_Testsome,
            (l->n_transfers < room ? l->n_transfers : room, l->transfers, &n_done, l->done, MPI_STATUSES_IGNORE));
    for (int i = 0; n_done != MPI_UNDEFINED && i < n_done; i++)
        keys[(*n)++] = l->keys[l->done[i]];
    int left = 0;
    for (int i = 0; i < l->n_transfers; i++) /* in order: who is told first was asked for first, where both are done */
        if (l->transfers[i] != MPI_REQUEST_NULL) {
            l->transfers[left] = l->transfers[i];
            l->keys[left++] = l->keys[i];
        }
    l->n_transfers = left;
    return STATUS_OK;
}
