/* command_diff.c - convoke-plan diff A B: what moves from one plan to the other, how long that takes, and after how many tokens
 * it has paid. */
#include "placement/planner/commands.h"

#include "placement/planner/inputs.h"
#include "placement/planner/plan_diff.h"
#include "proto/console.h"
#include "proto/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    plan_inputs in;
    bool moves, json;
} command_line;

static status parse(int argc, char **argv, command_line *c, const char **operands, bool *run)
{
    int n_operands = 0;
    const option_entry entries[] = {
        INPUT_TOPOLOGY_OPTIONS(&c->in),
        {"traffic", OPTION_STRING, &c->in.trace_path, .argument = "TRACE",
         .help = "what a token costs under both plans, by replay of this trace"},
        {"stats", OPTION_STRING, &c->in.stats_path, .argument = "STATS",
         .help = "the same from statistics: the busiest rank's compute alone"},
        {"domain", OPTION_STRING, &c->in.domain, .argument = "NAME", .help = "only the trace's sequences of this domain"},
        {"phase", OPTION_CHOICE, &c->in.phase, .choices = "all|decode|prefill", .fallback = "all",
         .help = "only generated tokens of the trace, or only prompts"},
        {"moves", OPTION_FLAG, &c->moves, .help = "list the moves in an order that memory allows"},
        {"json", OPTION_FLAG, &c->json, .help = "print one JSON object instead"},
        INPUT_REPLAY_OPTIONS(&c->in),
    };
    const option_table table = {.name = "convoke-plan diff",
                                .summary = "What it takes to go from plan A to plan B, and when it has paid.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "A B",
                                .min_operands = 2,
                                .max_operands = 2};
    TRY(inputs_parse_options(&table, argc, argv, operands, &n_operands, run));
    return STATUS_OK;
}

/* ---- what a token costs ---- */

/* Microseconds of the job's time per token: a step runs one token of each place. */
static status replay_us(const plan_inputs *in, const plan *p, double *out)
{
    const problem_request request = inputs_request(in);
    replay_result result;
    TRY(replay_run(&in->traffic, p, &in->topology, &request.replay, &result));
    *out = result.step_us * (double)result.n_steps / (double)result.n_rows;
    replay_result_clear(&result);
    return STATUS_OK;
}

/* From counts: the busiest rank's rows in each layer, copies sharing evenly. Experts touched and links are not known. */
static status compute_us(const plan_inputs *in, const plan *p, double *out)
{
    const routing_shape *shape = routing_stats_shape(in->stats);
    double tokens = 0, total = 0, *loads = calloc((size_t)p->n_ranks, sizeof *loads);
    uint64_t *sum = calloc((size_t)shape->n_layers * (size_t)shape->n_experts, sizeof *sum);
    status st = STATUS_OK;
    if (!loads || !sum)
        st = status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", p->n_ranks);
    else if (p->n_experts != shape->n_experts || p->n_layers != shape->n_layers)
        st = status_fail(STATUS_BAD_INPUT, "%s: statistics of %d layers of %d experts; the plans have %d of %d", in->stats_path,
                         shape->n_layers, shape->n_experts, p->n_layers, p->n_experts);
    for (int d = 0; st == STATUS_OK && d < shape->n_domains; d++)
        for (int phase = 0; phase < N_PHASES; phase++)
            tokens += (double)routing_stats_tokens(in->stats, d, phase);
    if (st == STATUS_OK)
        routing_stats_sum_tokens(in->stats, -1, -1, sum);
    for (int l = 0; st == STATUS_OK && l < p->n_layers; l++) {
        double busiest = 0;
        memset(loads, 0, (size_t)p->n_ranks * sizeof *loads);
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0; c < plan_n_copies(p, l, e); c++)
                loads[plan_copies(p, l, e)[c]] +=
                    (double)sum[(size_t)l * (size_t)p->n_experts + (size_t)e] / plan_n_copies(p, l, e);
        for (int r = 0; r < p->n_ranks; r++)
            busiest = fmax(busiest, loads[r] * in->topology.row_us[r]);
        total += busiest;
    }
    free(loads);
    free(sum);
    if (st == STATUS_OK && !(tokens > 0))
        st = status_fail(STATUS_BAD_INPUT, "%s: statistics of no tokens", in->stats_path);
    if (st == STATUS_OK)
        *out = total / tokens;
    return st;
}

static status token_us(const plan_inputs *in, const plan *from, const plan *to, double *before, double *after)
{
    TRY(in->has_traffic ? replay_us(in, from, before) : compute_us(in, from, before));
    return in->has_traffic ? replay_us(in, to, after) : compute_us(in, to, after);
}

static status price(const plan_inputs *in, const plan *from, const plan *to, double seconds, bool priced_move)
{
    double before = 0, after = 0;
    TRY(token_us(in, from, to, &before, &after));
    double saved = before - after, tokens = plan_diff_break_even(seconds, saved);
    printf("a token   %.3f us under %s, %.3f us under %s%s: %+.2f %%\n", before, from->name, after, to->name,
           in->has_traffic ? " (replayed)" : " (busiest rank's compute, from counts)", 100 * (after / before - 1));
    if (!(saved > 0))
        printf("pays      never: nothing is saved\n");
    else if (!priced_move)
        printf("pays      unknown: how many bytes an expert has is in no topology (--bytes-per-expert)\n");
    else
        printf("pays      after %.0f tokens, %s of such traffic\n", ceil(tokens), human_seconds(tokens * after * 1e-6).text);
    return STATUS_OK;
}

/* ---- printing ---- */

static void print_difference(const plan *from, const plan *to, const plan_difference *d, const topology *t, FILE *out)
{
    fprintf(out, "change    %s -> %s: %d copies to make, %d to drop of %d\n", from->name, to->name, d->n_copied, d->n_dropped,
            from->first_copy[(size_t)from->n_layers * (size_t)from->n_experts]);
    fprintf(out, "memory    %s\n",
            d->n_moves == 0       ? "nothing moves"
            : d->spare_slots == 0 ? "no rank needs more than the larger of its two plans"
                                  : "one expert more than the larger of its two plans on a rank, for the time of the move");
    if (!t || t->bytes_per_expert <= 0)
        return;
    int64_t most = 0;
    for (int r = 0; r < from->n_ranks; r++)
        most = d->rank_bytes[r] > most ? d->rank_bytes[r] : most;
    fprintf(out, "bytes     %s over links, at most %s to one rank\n", human_bytes((double)d->bytes).text,
            human_bytes((double)most).text);
    fprintf(out, "time      %s, all ranks copying at once\n", human_seconds(d->seconds).text);
}

static void print_moves(const plan *p, const plan_difference *d, FILE *out)
{
    fprintf(out, "\n%6s  %-5s  %6s  %6s  %6s  %6s\n", "move", "", "layer", "expert", "from", "to");
    for (int i = 0; i < d->n_moves; i++) {
        const plan_move *m = &d->moves[i];
        fprintf(out, "%6d  %-5s  %6d  %6d  %6d", i + 1, m->to < 0 ? "drop" : "copy", p->layer_numbers[m->layer], m->expert,
                m->from);
        fprintf(out, m->to < 0 ? "\n" : "  %6d\n", m->to);
    }
}

/* Without a topology bytes and seconds are null; without traffic, what a token costs. */
static status print_json(const command_line *c, const plan *from, const plan *to, const plan_difference *d, const topology *t)
{
    bool has_load = c->in.has_traffic || c->in.stats, has_bytes = t && t->bytes_per_expert > 0;
    double before = NAN, after = NAN;
    if (has_load)
        TRY(token_us(&c->in, from, to, &before, &after));
    double tokens = has_load && has_bytes ? plan_diff_break_even(d->seconds, before - after) : NAN;
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "copied", d->n_copied);
    cJSON_AddNumberToObject(o, "dropped", d->n_dropped);
    cJSON_AddNumberToObject(o, "spare_slots", d->spare_slots);
    cJSON_AddNumberToObject(o, "bytes", has_bytes ? (double)d->bytes : NAN); /* what is not finite is printed as null */
    cJSON_AddNumberToObject(o, "seconds", has_bytes ? d->seconds : NAN);
    cJSON_AddNumberToObject(o, "us_per_token_from", before);
    cJSON_AddNumberToObject(o, "us_per_token_to", after);
    cJSON_AddNumberToObject(o, "break_even_tokens", tokens);
    char *text = o ? cJSON_PrintUnformatted(o) : NULL;
    cJSON_Delete(o);
    if (!text)
        return status_fail(STATUS_NO_MEMORY, "no memory to print a difference");
    puts(text);
    cJSON_free(text);
    return STATUS_OK;
}

/* ---- the command ---- */

/* A topology is wanted for bytes and times; without one, experts are counted only. */
static status load(command_line *c, const plan *from, bool *priced)
{
    bool has_load = c->in.trace_path || c->in.stats_path;
    if (!has_load && (c->in.domain || c->in.phase))
        return status_fail(STATUS_USAGE, "--%s chooses from a trace: --traffic is missing", c->in.domain ? "domain" : "phase");
    *priced = has_load || c->in.topology_path || c->in.ranks || c->in.bytes_per_expert;
    if (has_load)
        return inputs_load(&c->in, from);
    if (!*priced)
        return STATUS_OK;
    return inputs_load_topology(&c->in, from);
}

static status compare(command_line *c, const plan *from, const plan *to)
{
    bool priced;
    plan_difference d;
    TRY(load(c, from, &priced));
    const topology *t = priced ? &c->in.topology : NULL;
    TRY(plan_diff(from, to, t, &d));
    if (c->json) {
        status done = print_json(c, from, to, &d, t);
        plan_diff_clear(&d);
        return done;
    }
    print_difference(from, to, &d, t, stdout);
    status st = STATUS_OK;
    if (c->in.has_traffic || c->in.stats)
        st = price(&c->in, from, to, d.seconds, t->bytes_per_expert > 0 || d.n_copied == 0);
    if (st == STATUS_OK && c->moves)
        print_moves(from, &d, stdout);
    plan_diff_clear(&d);
    return st;
}

status command_diff(int argc, char **argv)
{
    command_line c = {0};
    const char *operands[2];
    bool run = false;
    plan from = {0}, to = {0};
    TRY(parse(argc, argv, &c, operands, &run));
    if (!run)
        return STATUS_OK;
    status st = plan_read(operands[0], NULL, &from);
    if (st == STATUS_OK)
        st = plan_read(operands[1], NULL, &to);
    if (st == STATUS_OK)
        st = compare(&c, &from, &to);
    plan_clear(&from);
    plan_clear(&to);
    inputs_clear(&c.in);
    return st;
}
