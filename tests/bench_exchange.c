/* bench_exchange.c - what moving rows costs: our exchange beside MPI_Alltoallv, and what waiting costs. Start under mpirun:
 *
 *   tests/run_mpi.sh 4 build/tests/bench_exchange [--hidden 2048] [--experts 64] [--top-k 8] [--tokens 64,256] [--rounds 31]
 *   tests/run_mpi.sh 4 build/tests/bench_exchange --idle        CPU share of ranks that wait for an idle leader, 3 s
 *   [--ranks-per-node N]                                        pretended nodes
 *
 * A layer, the same for all three ways, begins with a rank's rows in private memory and ends with its combined rows in private
 * memory. In between every received row is copied to a private block per expert (as the computation gathers it), and expert
 * outputs are taken from private memory (the gathered rows themselves: no expert is run). fp32 throughout.
 *   exchange    exchange.h with combine fixed, the default
 *   per expert  counts, pack, MPI_Alltoallv of one row per (token, expert), unpack, the same back, weighted sum at home
 *   per rank    counts, pack, MPI_Alltoallv of one row per (token, rank) with its entries, unpack, weighted sums per rank,
 *               the same back, sum at home
 * Ways alternate round by round; a round's time is its slowest rank's; medians are compared.
 *
 * Ceiling: bytes that any way must copy on a rank (rows in, T h; gathered rows, T k h; outputs read, T k h; rows out, T h; h = 4
 * hidden bytes) over what memcpy copies per second here when all ranks copy at once. */
#include "proto/clock.h"
#include "proto/log.h"
#include "router/exchange.h"
#include "tests/support.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

typedef struct {
    int hidden, experts, k, tokens, rounds, size, rank;
    size_t row; /* bytes */
    group *g;
    route *routes;
    int16_t *exponents;
    float *in, *out;   /* [tokens][hidden] */
    int *expert_first; /* [experts + 1] places of local rows, by expert; of this round */
    int *expert_at;
    float *gathered; /* rows by expert: the experts' input, and here also their output */
    /* Alltoallv */
    float *send, *receive, *back;
    int *counts[4], *places[4];
    packet_row *rows;
    packet_entry *entries;
    packet *packets;
    uint32_t *scratch;
    packet_row *their_rows;
    packet_entry *their_entries;
    exchange *x;
} bench;

static void *get(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!p)
        abort();
    memset(p, 0, bytes);
    return p;
}

static void must(status st, group *g)
{
    if (st == STATUS_OK)
        return;
    if (st != STATUS_ELSEWHERE)
        log_line("%s", status_message());
    group_abort(g, status_exit_code(st));
}

static int rank_of(const bench *b, int expert)
{
    return (int)((long)expert * b->size / b->experts);
}

/* ---- exchange.h ---- */

/* Gathers rows by expert: first how many, then where. */
static void place_by_expert(bench *b, const packet *packets)
{
    memset(b->expert_first, 0, (size_t)(b->experts + 1) * sizeof(int));
    for (int s = 0; s < b->size; s++)
        for (uint32_t e = 0; e < packets[s].n_entries; e++)
            b->expert_first[packets[s].entries[e].expert + 1]++;
    for (int e = 0; e < b->experts; e++)
        b->expert_first[e + 1] += b->expert_first[e];
    memcpy(b->expert_at, b->expert_first, (size_t)b->experts * sizeof(int));
}

static void by_exchange(bench *b)
{
    size_t stride;
    float *rows = exchange_rows(b->x, &stride);
    for (int r = 0; r < b->tokens; r++)
        memcpy(rows + (size_t)r * stride, b->in + (size_t)r * (size_t)b->hidden, b->row);
    must(exchange_send(b->x, b->tokens, b->routes, b->exponents), b->g);
    must(exchange_wait(b->x), b->g);
    packet packets[64];
    for (int s = 0; s < b->size; s++)
        packets[s] = exchange_from(b->x, s)->packet;
    place_by_expert(b, packets);
    for (int s = 0; s < b->size; s++) {
        const exchange_incoming *in = exchange_from(b->x, s);
        for (uint32_t i = 0; i < in->packet.n_rows; i++) {
            const packet_row *row = &in->packet.rows[i];
            for (uint32_t e = row->first_entry; e < row->first_entry + row->n_entries; e++)
                memcpy(b->gathered + (size_t)b->expert_at[in->packet.entries[e].expert]++ * (size_t)b->hidden,
                       (const char *)in->rows + row->row * in->row_bytes, b->row);
        }
    }
    memcpy(b->expert_at, b->expert_first, (size_t)b->experts * sizeof(int));
    for (int s = 0; s < b->size; s++) {
        const exchange_incoming *in = exchange_from(b->x, s);
        for (uint32_t i = 0; i < in->packet.n_rows; i++) {
            const packet_row *row = &in->packet.rows[i];
            int32_t *to = (int32_t *)in->results + (size_t)i * (size_t)b->hidden;
            memset(to, 0, b->row);
            for (uint32_t e = row->first_entry; e < row->first_entry + row->n_entries; e++) {
                const packet_entry *entry = &in->packet.entries[e];
                must(combine_add_fixed(b->gathered + (size_t)b->expert_at[entry->expert]++ * (size_t)b->hidden, entry->weight,
                                       row->exponent, b->k, i, entry->expert, 0, b->hidden, to, exchange_spills(b->x, 0, s)),
                     b->g);
            }
        }
    }
    must(exchange_return(b->x), b->g);
    must(exchange_wait_results(b->x), b->g);
    exchange_combine(b->x, 0, b->tokens, b->out, (size_t)b->hidden);
}

/* ---- MPI_Alltoallv ---- */

enum { ROWS_OUT, ROWS_IN, ENTRIES_OUT, ENTRIES_IN };

static void sum_places(bench *b, int which)
{
    b->places[which][0] = 0;
    for (int r = 1; r < b->size; r++)
        b->places[which][r] = b->places[which][r - 1] + b->counts[which][r - 1];
}

static void swap_rows(bench *b, const float *from, int out, float *to, int in)
{
    static MPI_Datatype row_type = MPI_DATATYPE_NULL;
    if (row_type == MPI_DATATYPE_NULL) {
        MPI_Type_contiguous(b->hidden, MPI_FLOAT, &row_type);
        MPI_Type_commit(&row_type);
    }
    MPI_Alltoallv(from, b->counts[out], b->places[out], row_type, to, b->counts[in], b->places[in], row_type, MPI_COMM_WORLD);
}

static void swap_records(bench *b, const void *from, int out, void *to, int in, int bytes)
{
    MPI_Datatype type;
    MPI_Type_contiguous(bytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    MPI_Alltoallv(from, b->counts[out], b->places[out], type, to, b->counts[in], b->places[in], type, MPI_COMM_WORLD);
    MPI_Type_free(&type);
}

static void build(bench *b)
{
    packet_build(b->routes, b->exponents, b->tokens, b->k, b->size, b->rows, b->entries, b->packets, b->scratch);
    for (int r = 0; r < b->size; r++) {
        b->counts[ROWS_OUT][r] = (int)b->packets[r].n_rows;
        b->counts[ENTRIES_OUT][r] = (int)b->packets[r].n_entries;
    }
}

static void swap_counts(bench *b, int out, int in)
{
    MPI_Alltoall(b->counts[out], 1, MPI_INT, b->counts[in], 1, MPI_INT, MPI_COMM_WORLD);
    sum_places(b, out);
    sum_places(b, in);
}

/* Both ways by message: the arrived entries, grouped by source. */
static void their_packets(const bench *b, packet *packets)
{
    for (int s = 0; s < b->size; s++)
        packets[s] = (packet){.rows = b->their_rows + b->places[ROWS_IN][s],
                              .entries = b->their_entries + b->places[ENTRIES_IN][s],
                              .n_rows = (uint32_t)b->counts[ROWS_IN][s],
                              .n_entries = (uint32_t)b->counts[ENTRIES_IN][s]};
}

static void per_expert(bench *b)
{
    packet packets[64];
    size_t h = (size_t)b->hidden;
    build(b);
    swap_counts(b, ENTRIES_OUT, ENTRIES_IN);
    size_t at = 0;
    for (int r = 0; r < b->size; r++)
        for (uint32_t i = 0; i < b->packets[r].n_rows; i++)
            for (int e = 0; e < b->packets[r].rows[i].n_entries; e++)
                memcpy(b->send + at++ * h, b->in + b->packets[r].rows[i].row * h, b->row);
    swap_records(b, b->entries, ENTRIES_OUT, b->their_entries, ENTRIES_IN, sizeof(packet_entry));
    swap_rows(b, b->send, ENTRIES_OUT, b->receive, ENTRIES_IN);
    memset(b->counts[ROWS_IN], 0, (size_t)b->size * sizeof(int));
    their_packets(b, packets);
    place_by_expert(b, packets);
    int n = b->places[ENTRIES_IN][b->size - 1] + b->counts[ENTRIES_IN][b->size - 1];
    for (int e = 0; e < n; e++)
        memcpy(b->gathered + (size_t)b->expert_at[b->their_entries[e].expert]++ * h, b->receive + (size_t)e * h, b->row);
    memcpy(b->expert_at, b->expert_first, (size_t)b->experts * sizeof(int));
    for (int e = 0; e < n; e++)
        memcpy(b->receive + (size_t)e * h, b->gathered + (size_t)b->expert_at[b->their_entries[e].expert]++ * h, b->row);
    swap_rows(b, b->receive, ENTRIES_IN, b->back, ENTRIES_OUT);
    memset(b->out, 0, (size_t)b->tokens * b->row);
    at = 0;
    for (int r = 0; r < b->size; r++)
        for (uint32_t i = 0; i < b->packets[r].n_rows; i++)
            for (int e = 0; e < b->packets[r].rows[i].n_entries; e++, at++)
                combine_add_fast(b->back + at * h, b->entries[at].weight, 0, b->hidden, b->out + b->packets[r].rows[i].row * h);
}

static void per_rank(bench *b)
{
    packet packets[64];
    size_t h = (size_t)b->hidden, at = 0;
    build(b);
    swap_counts(b, ROWS_OUT, ROWS_IN);
    swap_counts(b, ENTRIES_OUT, ENTRIES_IN);
    for (int r = 0; r < b->size; r++)
        for (uint32_t i = 0; i < b->packets[r].n_rows; i++)
            memcpy(b->send + at++ * h, b->in + b->packets[r].rows[i].row * h, b->row);
    swap_records(b, b->rows, ROWS_OUT, b->their_rows, ROWS_IN, sizeof(packet_row));
    swap_records(b, b->entries, ENTRIES_OUT, b->their_entries, ENTRIES_IN, sizeof(packet_entry));
    swap_rows(b, b->send, ROWS_OUT, b->receive, ROWS_IN);
    their_packets(b, packets);
    place_by_expert(b, packets);
    for (int s = 0; s < b->size; s++)
        for (uint32_t i = 0; i < packets[s].n_rows; i++)
            for (uint32_t e = packets[s].rows[i].first_entry, n = packets[s].rows[i].n_entries; n > 0; e++, n--)
                memcpy(b->gathered + (size_t)b->expert_at[packets[s].entries[e].expert]++ * h,
                       b->receive + ((size_t)b->places[ROWS_IN][s] + i) * h, b->row);
    memcpy(b->expert_at, b->expert_first, (size_t)b->experts * sizeof(int));
    for (int s = 0; s < b->size; s++)
        for (uint32_t i = 0; i < packets[s].n_rows; i++) {
            float *sum = b->receive + ((size_t)b->places[ROWS_IN][s] + i) * h;
            memset(sum, 0, b->row);
            for (uint32_t e = packets[s].rows[i].first_entry, n = packets[s].rows[i].n_entries; n > 0; e++, n--)
                combine_add_fast(b->gathered + (size_t)b->expert_at[packets[s].entries[e].expert]++ * h,
                                 packets[s].entries[e].weight, 0, b->hidden, sum);
        }
    swap_rows(b, b->receive, ROWS_IN, b->back, ROWS_OUT);
    memset(b->out, 0, (size_t)b->tokens * b->row);
    at = 0;
    for (int r = 0; r < b->size; r++)
        for (uint32_t i = 0; i < b->packets[r].n_rows; i++)
            combine_merge_fast(b->back + at++ * h, h, b->out + b->packets[r].rows[i].row * h);
}

/* ---- measuring ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

static void choose_routes(bench *b, uint64_t *random)
{
    for (int t = 0; t < b->tokens; t++) {
        bool taken[4096] = {false};
        for (int j = 0; j < b->k; j++) {
            int e;
            do
                e = support_below(random, b->experts);
            while (taken[e]);
            taken[e] = true;
            b->routes[t * b->k + j] =
                (route){.expert = (uint16_t)e, .rank = (uint16_t)rank_of(b, e), .weight = 1.0f / (float)b->k};
        }
    }
}

static void start(bench *b)
{
    size_t tokens = (size_t)b->tokens, k = (size_t)b->k, most = tokens * k * (size_t)b->size; /* all may come to one rank */
    uint64_t random = (uint64_t)b->rank + 1;
    exchange_shape shape = {.hidden = b->hidden, .top_k = b->k, .max_rows = b->tokens, .n_threads = 1, .combine = COMBINE_FIXED};
    must(exchange_create(b->g, &shape, &b->x), b->g);
    b->routes = get(tokens * k * sizeof(route));
    b->exponents = get(tokens * sizeof(int16_t));
    b->in = get(tokens * b->row);
    b->out = get(tokens * b->row);
    b->expert_first = get((size_t)(b->experts + 1) * sizeof(int));
    b->expert_at = get((size_t)(b->experts + 1) * sizeof(int));
    b->gathered = aligned_alloc(64, most * b->row);
    b->receive = aligned_alloc(64, most * b->row);
    b->send = get(tokens * k * b->row);
    b->back = get(tokens * k * b->row);
    for (int i = 0; i < 4; i++) {
        b->counts[i] = get((size_t)b->size * sizeof(int));
        b->places[i] = get((size_t)b->size * sizeof(int));
    }
    b->rows = get(tokens * k * sizeof(packet_row));
    b->entries = get(tokens * k * sizeof(packet_entry));
    b->their_rows = get(most * sizeof(packet_row));
    b->their_entries = get(most * sizeof(packet_entry));
    b->packets = get((size_t)b->size * sizeof(packet));
    b->scratch = get((size_t)b->size * sizeof(uint32_t));
    for (size_t i = 0; i < tokens * (size_t)b->hidden; i++)
        b->in[i] = support_gauss(&random);
    for (int t = 0; t < b->tokens; t++)
        b->exponents[t] = (int16_t)combine_exponent(b->in + (size_t)t * (size_t)b->hidden, b->hidden, b->k);
    choose_routes(b, &random);
}

static void stop(bench *b)
{
    exchange_destroy(b->x);
    void *all[] = {b->routes, b->exponents, b->in,   b->out,     b->expert_first, b->expert_at,     b->gathered, b->receive,
                   b->send,   b->back,      b->rows, b->entries, b->their_rows,   b->their_entries, b->packets,  b->scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    for (int i = 0; i < 4; i++) {
        free(b->counts[i]);
        free(b->places[i]);
    }
}

/* Bytes a second that memcpy copies on one rank while all copy. */
static void copy_rows(bench *b)
{
    memcpy(b->send, b->back, (size_t)b->tokens * (size_t)b->k * b->row);
}

static void measure(bench *b)
{
    void (*const ways[])(bench *) = {by_exchange, per_expert, per_rank, copy_rows};
    double *times[4];
    for (int w = 0; w < 4; w++)
        times[w] = calloc((size_t)b->rounds, sizeof(double));
    for (int round = -2; round < b->rounds; round++)
        for (int w = 0; w < 4; w++) {
            must(group_barrier(b->g), b->g);
            double begin = clock_seconds(), took, slowest;
            ways[w](b);
            took = clock_seconds() - begin;
            MPI_Allreduce(&took, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
            if (round >= 0)
                times[w][round] = slowest;
        }
    double us[4], waited = exchange_get_stats(b->x)->wait_seconds / (b->rounds + 2);
    for (int w = 0; w < 4; w++) {
        us[w] = 1e6 * median(times[w], b->rounds);
        free(times[w]);
    }
    double copied = (double)b->tokens * (2.0 + 2.0 * b->k) * (double)b->row;
    double speed = (double)b->tokens * b->k * (double)b->row / us[3];
    if (b->rank == 0)
        printf("%d ranks on %d nodes, %d tokens a rank: exchange %.0f us (%.0f of them waiting on rank 0), per expert %.0f us, "
               "per rank "
               "%.0f us: ratio %.2f and %.2f (goals 0.35, 0.70); ceiling %.1f MB at memcpy's %.1f GB/s: %.0f us, %.0f %% of it "
               "reached\n",
               b->size, group_n_nodes(b->g), b->tokens, us[0], 1e6 * waited, us[1], us[2], us[0] / us[1], us[0] / us[2],
               copied / 1e6, speed / 1e3, copied / speed, 100 * copied / speed / us[0]);
}

/* ---- waiting ---- */

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void measure_idle(group *g)
{
    const void *bytes = "go", *parts[64];
    size_t size = 3, sizes[64];
    must(group_barrier(g), g);
    double cpu = cpu_seconds(), begin = clock_seconds(), share;
    if (group_rank(g) == 0)
        sleep(3);
    must(group_broadcast_message(g, &bytes, &size), g);
    share = 100 * (cpu_seconds() - cpu) / (clock_seconds() - begin);
    must(group_gather(g, &share, sizeof share, parts, sizes), g);
    for (int r = 1; group_rank(g) == 0 && r < group_size(g); r++)
        printf("rank %d waited 3 s for an idle leader with %.2f %% of a core (goal 2 %%)\n", r, *(const double *)parts[r]);
}

static const char *option(int argc, char **argv, const char *name, const char *otherwise)
{
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return argv[i + 1];
    return otherwise;
}

int main(int argc, char **argv)
{
    group *g = NULL;
    must(group_create(&argc, &argv, atoi(option(argc, argv, "--ranks-per-node", "0")), &g), g);
    bool idle = argc > 1 && strcmp(argv[argc - 1], "--idle") == 0;
    if (idle) {
        measure_idle(g);
    } else if (group_size(g) == 1 || group_size(g) > 64) {
        fprintf(stderr, "bench_exchange: start 2 to 64 ranks with tests/run_mpi.sh\n");
    } else {
        char tokens[256];
        snprintf(tokens, sizeof tokens, "%s", option(argc, argv, "--tokens", "64,256"));
        for (char *save, *t = strtok_r(tokens, ",", &save); t; t = strtok_r(NULL, ",", &save)) {
            bench b = {.g = g, .size = group_size(g), .rank = group_rank(g), .tokens = atoi(t)};
            b.hidden = atoi(option(argc, argv, "--hidden", "2048"));
            b.experts = atoi(option(argc, argv, "--experts", "64"));
            b.k = atoi(option(argc, argv, "--top-k", "8"));
            b.rounds = atoi(option(argc, argv, "--rounds", "31"));
            b.row = (size_t)b.hidden * sizeof(float);
            start(&b);
            measure(&b);
            stop(&b);
        }
    }
    group_destroy(g);
    return 0;
}
