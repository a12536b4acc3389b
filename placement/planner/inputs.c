#include "placement/planner/inputs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { USUAL_CONCURRENCY = 128 };

status inputs_load_topology(plan_inputs *in, const plan *like)
{
    if (in->topology_path && in->ranks)
        return status_fail(STATUS_USAGE, "--topology and --ranks: one of the two");
    if (in->nodes && !in->ranks)
        return status_fail(STATUS_USAGE, "--nodes goes with --ranks; %s says what is on which node",
                           in->topology_path ? in->topology_path : "the plan");
    if (in->topology_path) {
        TRY(topology_read(in->topology_path, &in->topology));
    } else if (in->ranks) {
        TRY(topology_uniform((int)in->ranks, in->nodes ? (int)in->nodes : 1, &in->topology));
    } else if (like) {
        TRY(topology_uniform(like->n_ranks, 1, &in->topology));
        TRY(topology_set_nodes(&in->topology, (const uint32_t *)like->node_of_rank));
    } else {
        return status_fail(STATUS_USAGE, "--topology is missing (or --ranks, for ranks that are all alike)");
    }
    if (in->bytes_per_expert)
        in->topology.bytes_per_expert = in->bytes_per_expert;
    return STATUS_OK;
}

static status load_traffic(plan_inputs *in)
{
    routing_trace *trace;
    TRY(routing_trace_open(in->trace_path, &trace));
    status st = STATUS_OK;
    const routing_shape *shape = routing_trace_shape(trace);
    traffic_part part = {.phase = in->phase};
    bool *domains = NULL;
    if (in->domain) {
        int domain = routing_shape_find_domain(shape, in->domain);
        domains = calloc((size_t)shape->n_domains, sizeof *domains);
        if (domain < 0 || !domains)
            TRY_GOTO(status_fail(domain < 0 ? STATUS_USAGE : STATUS_NO_MEMORY, "%s: no domain is called '%s'", in->trace_path,
                                 in->domain),
                     out);
        domains[domain] = true;
        part.domains = domains;
    }
    st = traffic_load(trace, &part, &in->traffic);
    in->has_traffic = st == STATUS_OK;
out:
    free(domains);
    routing_trace_close(trace);
    return st;
}

static status load_stats(plan_inputs *in)
{
    TRY(routing_stats_read(in->stats_path, &in->stats));
    const routing_shape *shape = routing_stats_shape(in->stats);
    for (int d = 0; d < shape->n_domains; d++)
        for (int phase = 0; phase < N_PHASES; phase++)
            if (routing_stats_tokens(in->stats, d, phase))
                return STATUS_OK;
    return status_fail(STATUS_BAD_INPUT, "%s: statistics of no tokens", in->stats_path);
}

status inputs_load(plan_inputs *in, const plan *like)
{
    if (!in->trace_path && (in->domain || in->phase))
        return status_fail(STATUS_USAGE, "--%s chooses from a trace; `convoke-plan stats` makes statistics of a part",
                           in->domain ? "domain" : "phase");
    TRY(inputs_load_topology(in, like));
    if (in->stats_path)
        TRY(load_stats(in));
    if (in->trace_path)
        TRY(load_traffic(in));
    if (!in->stats && !in->has_traffic)
        return status_fail(STATUS_USAGE, "neither --stats nor --trace: there is no traffic to look at");
    return STATUS_OK;
}

void inputs_clear(plan_inputs *in)
{
    routing_stats_destroy(in->stats);
    traffic_clear(&in->traffic);
    topology_clear(&in->topology);
    in->stats = NULL;
    in->has_traffic = false;
}

static int concurrency_of(const plan_inputs *in)
{
    if (in->concurrency > 0 || !in->has_traffic)
        return (int)in->concurrency;
    int third = (in->traffic.n_sequences + 2) / 3; /* so that either of two uneven folds still fills it */
    return third < USUAL_CONCURRENCY ? third : USUAL_CONCURRENCY;
}

problem_request inputs_request(const plan_inputs *in)
{
    return (problem_request){.stats = in->stats,
                             .traffic = in->has_traffic ? &in->traffic : NULL,
                             .topology = &in->topology,
                             .slack = -1,
                             .random_seed = (uint64_t)in->random_seed,
                             .threads = (int)in->threads,
                             .replay = {.concurrency = concurrency_of(in),
                                        .owners = (owner_rule)in->owner,
                                        .replicas = (replica_rule)in->replica_choice,
                                        .node_dedupe = in->node_dedupe,
                                        .threads = (int)in->threads}};
}

status inputs_parse_slack(const char *text, double *out)
{
    if (!text) {
        *out = -1;
        return STATUS_OK;
    }
    char *end;
    double v = strtod(text, &end);
    bool percent = *end == '%';
    if (end == text || end[percent] || !isfinite(v) || v < 0)
        return status_fail(STATUS_USAGE, "--slack: '%s' is not a share of the mean like 5%% or 0.05", text);
    *out = percent ? v / 100 : v;
    return STATUS_OK;
}

status inputs_parse_options(const option_table *table, int argc, char **argv, const char **operands, int *n_operands, bool *run)
{
    options_wish wish;
    TRY(options_parse(table, argc, argv, &wish, operands, n_operands));
    *run = wish == OPTIONS_RUN;
    if (!*run)
        options_print(table, wish, stdout);
    return STATUS_OK;
}
