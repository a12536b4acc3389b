/* worker_main.c - convoke-worker: one rank of a serving job. Rank 0 joins the coordinator; what it is told there, all ranks do.
 */
#include "worker/serve_loop.h"

#include "proto/log.h"
#include "proto/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define END_SECONDS 10.0 /* for leaving in order; then each process ends by itself */

typedef struct {
    const char *coordinator, *secret_file;
    double connect_seconds;
    int64_t ranks_per_node;
} command_line;

static status parse(int argc, char **argv, command_line *c, options_wish *wish)
{
    const option_entry entries[] = {
        {"coordinator", OPTION_STRING, &c->coordinator, .argument = "HOST:PORT", .environment = "CONVOKE_COORDINATOR",
         .help = "where convoke serve waits for workers (read by rank 0)"},
        {"secret-file", OPTION_STRING, &c->secret_file, .argument = "FILE", .environment = "CONVOKE_SECRET_FILE",
         .help = "the job's secret, readable by its owner alone, or a pipe (read by rank 0)"},
        {"connect-seconds", OPTION_DOUBLE, &c->connect_seconds, .argument = "S", .fallback = "30", .min = 0.1, .max = 86400,
         .help = "how long to try to reach the coordinator"},
        {"ranks-per-node", OPTION_INT, &c->ranks_per_node, .argument = "N", .fallback = "0", .max = 65536,
         .help = "pretend that every N ranks are a node of their own (0: as it is)"},
    };
    const option_table table = {.name = "convoke-worker",
                                .summary = "Runs a model's ranks under mpirun for a coordinator (convoke serve).",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    TRY(options_parse(&table, argc, argv, wish, NULL, NULL));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

/* ---- joining ---- */

static status fill_hello(const group *g, const control_secret *secret, Convoke__Control__Hello *hello)
{
    size_t n = (size_t)group_size(g);
    hello->protocol = CONTROL_PROTOCOL;
    hello->secret = (ProtobufCBinaryData){.len = (size_t)secret->n, .data = (uint8_t *)secret->text};
    hello->version = (char *)CONVOKE_VERSION;
    hello->n_ranks = (uint32_t)n;
    hello->node_of_rank = calloc(n, sizeof *hello->node_of_rank);
    hello->host_of_rank = calloc(n, sizeof *hello->host_of_rank);
    hello->pid_of_rank = calloc(n, sizeof *hello->pid_of_rank);
    if (!hello->node_of_rank || !hello->host_of_rank || !hello->pid_of_rank)
        return status_fail(STATUS_NO_MEMORY, "no memory for the list of ranks");
    hello->n_node_of_rank = hello->n_host_of_rank = hello->n_pid_of_rank = n;
    for (int r = 0; r < group_size(g); r++) {
        hello->node_of_rank[r] = (uint32_t)group_node_of_rank(g)[r];
        hello->host_of_rank[r] = (char *)group_host(g, r);
        hello->pid_of_rank[r] = (uint32_t)group_pid(g, r);
    }
    return STATUS_OK;
}

static status greet(const group *g, const command_line *c, const control_secret *secret, control_link **link)
{
    Convoke__Control__Hello hello = CONVOKE__CONTROL__HELLO__INIT;
    status st = fill_hello(g, secret, &hello);
    if (st == STATUS_OK)
        st = control_link_open(c->coordinator, c->connect_seconds, &hello, link);
    free(hello.node_of_rank);
    free(hello.host_of_rank);
    free(hello.pid_of_rank);
    return st;
}

/* Rank 0. */
static status join(group *g, const command_line *c, watch *w, control_link **link)
{
    control_secret secret;
    if (!c->coordinator)
        return status_fail(STATUS_USAGE, "--coordinator (or CONVOKE_COORDINATOR) is missing: where do the workers report?");
    if (!c->secret_file)
        return status_fail(STATUS_USAGE, "--secret-file (or CONVOKE_SECRET_FILE) is missing");
    TRY(control_secret_read(c->secret_file, &secret));
    status st = greet(g, c, &secret, link);
    explicit_bzero(&secret, sizeof secret);
    return st == STATUS_OK ? control_link_start(*link, g, w) : st;
}

/* [all] Setup as rank 0 got it; freed by the caller. */
static status hand_out(group *g, const control_link *link, Convoke__Control__Setup **setup)
{
    bytes_writer packed = {0};
    const void *bytes = NULL;
    size_t size = 0;
    if (link) {
        const ProtobufCMessage *m = &control_link_setup(link)->base;
        size = protobuf_c_message_get_packed_size(m);
        void *at = bytes_extend(&packed, size + 1);
        if (at)
            protobuf_c_message_pack(m, at);
    }
    status st = group_agree(g, packed.failed ? status_fail(STATUS_NO_MEMORY, "no memory for the job's setup") : STATUS_OK);
    bytes = packed.data;
    if (st == STATUS_OK)
        st = group_broadcast_message(g, &bytes, &size);
    if (st == STATUS_OK) {
        *setup = convoke__control__setup__unpack(NULL, size, bytes);
        st = group_agree(g, *setup ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "the job's setup cannot be read"));
    }
    bytes_clear(&packed);
    return st;
}

/* ---- running ---- */

/* The sentence of the one rank that has it. */
static void complain(status st)
{
    if (st != STATUS_OK && st != STATUS_ELSEWHERE)
        log_line("%s", status_message());
}

static void say_goodbye(control_link *link, status st, const serve_end *end)
{
    if (st == STATUS_OK || !link)
        return;
    if (*end->reason)
        control_link_goodbye(link, end->rank, end->reason);
    else
        control_link_goodbye(link, 0, status_message());
}

static status run(group *g, const command_line *c, watch *w)
{
    control_link *link = NULL;
    Convoke__Control__Setup *setup = NULL;
    serve_end end = {0};
    status st = group_agree(g, group_rank(g) == 0 ? join(g, c, w, &link) : STATUS_OK);
    if (st == STATUS_OK)
        st = hand_out(g, link, &setup);
    else
        end.out_of_step = st == STATUS_PEER_LOST || st == STATUS_STOPPED;
    if (st == STATUS_OK)
        st = serve_run(g, link, w, setup, &end);
    complain(st);
    say_goodbye(link, st, &end);
    if (end.out_of_step) {
        watch_end_within(w, END_SECONDS, "this rank could not be ended in order");
        group_abort(g, status_exit_code(st));
    }
    convoke__control__setup__free_unpacked(setup, NULL);
    control_link_close(link);
    return st;
}

/* --help and mistakes are settled before ranks meet, so that nobody waits; only one of them speaks. */
static bool speaks(void)
{
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    return !rank || atoi(rank) == 0;
}

static int fail_early(status st)
{
    complain(st);
    return status_exit_code(st);
}

int main(int argc, char **argv)
{
    command_line c = {0};
    options_wish wish = OPTIONS_RUN;
    if (group_launched())
        watch_tie_to_parent();
    log_set_speaker("convoke-worker");
    if (!speaks() && !freopen("/dev/null", "w", stdout))
        return 1;
    status st = parse(argc, argv, &c, &wish);
    if (st != STATUS_OK || wish != OPTIONS_RUN)
        return speaks() ? fail_early(st) : status_exit_code(st);
    group *g = NULL;
    watch *w = NULL;
    st = group_create(&argc, &argv, (int)c.ranks_per_node, &g);
    if (st != STATUS_OK)
        return fail_early(st);
    group_heed_stop();
    char speaker[64];
    snprintf(speaker, sizeof speaker, "convoke-worker: rank %d", group_rank(g));
    log_set_speaker(speaker);
    st = group_agree(g, watch_start(g, &w));
    if (st == STATUS_OK)
        st = run(g, &c, w);
    else
        complain(st);
    if (w)
        watch_end_within(w, END_SECONDS, "the other ranks did not end within ten seconds");
    group_set_deadline(g, 0);
    group_destroy(g);
    watch_stop(w);
    return status_exit_code(st);
}
