/* score_print.c - the end of a run, for people and for programs; both say the same numbers. */
#include "worker/score.h"

#include "proto/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    double compute, exchange, wait;                                         /* shares of the step loop, mean over ranks */
    double same_rank, same_node, cross_node, back_node, back_cross, header; /* bytes over all ranks */
    double spills, spilled_rows, combined_rows;
    double prefill_per_s, decode_per_s;
} totals;

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static totals add_up(const score_summary *s)
{
    totals t = {0};
    for (int r = 0; r < s->n_ranks; r++) {
        const score_rank *k = &s->ranks[r];
        double all = k->step_seconds * s->n_ranks;
        t.compute += ratio(k->times.attention_seconds + k->times.expert_seconds + k->times.head_seconds, all);
        t.exchange += ratio(k->times.exchange_seconds, all);
        t.wait += ratio(k->wait_seconds, all);
        t.same_rank += (double)k->bytes_same_rank;
        t.same_node += (double)k->bytes_same_node;
        t.cross_node += (double)k->bytes_cross_node;
        t.back_node += (double)k->return_same_node;
        t.back_cross += (double)k->return_cross_node;
        t.header += (double)k->header_bytes;
        t.spills += (double)k->spills;
        t.spilled_rows += (double)k->spilled_rows;
        t.combined_rows += (double)k->combined_rows;
    }
    t.prefill_per_s = ratio((double)s->times.prefill_rows, s->times.prefill_seconds);
    t.decode_per_s = ratio((double)s->times.decode_rows, s->times.decode_seconds);
    return t;
}

/* Busiest rank's rows over the mean of one MoE layer. */
static double layer_imbalance(const score_summary *s, int layer)
{
    double most = 0, sum = 0;
    for (int r = 0; r < s->n_ranks; r++) {
        double load = (double)s->layer_load[(size_t)r * (size_t)s->config->n_moe_layers + (size_t)layer];
        most = load > most ? load : most;
        sum += load;
    }
    return sum > 0 ? most * s->n_ranks / sum : 1;
}

static const char *combine_name(combine_mode mode)
{
    return mode == COMBINE_EXACT ? "exact" : mode == COMBINE_FIXED ? "fixed" : "fast";
}

/* "drama-0", or "line 7" where the file gives no id. */
static const char *line_name(const token_line *line, char *buffer, size_t size)
{
    if (line->id)
        return line->id;
    snprintf(buffer, size, "line %d", line->line_number);
    return buffer;
}

static void print_line(const score_summary *s, int i)
{
    const token_line *line = &s->lines->lines[i];
    const score_line *result = &s->results[i];
    char name[32];
    double nll = result->n_scored ? -result->sum_logprob / result->n_scored : 0;
    printf("%-16s %5d tokens", line_name(line, name, sizeof name), line->n_ids);
    if (result->n_scored)
        printf("  nll %.4f  perplexity %.2f", nll, exp(nll));
    for (int j = 0; j < result->n_generated; j++)
        printf(j ? " %d" : "  continues %d", result->generated[j]);
    putchar('\n');
}

static void sum_domain(const score_summary *s, int domain, double *sum, long *n)
{
    *sum = 0;
    *n = 0;
    for (int i = 0; i < s->lines->n_lines; i++)
        if (domain < 0 || s->lines->lines[i].domain == domain) {
            *sum += s->results[i].sum_logprob;
            *n += s->results[i].n_scored;
        }
}

static void print_scores(const score_summary *s)
{
    double sum;
    long n;
    sum_domain(s, -1, &sum, &n);
    printf("score     %ld tokens predicted, mean nll %.4f, perplexity %.2f", n, n ? -sum / (double)n : 0,
           n ? exp(-sum / (double)n) : 0);
    for (int d = 0; d < s->lines->n_domains; d++) {
        sum_domain(s, d, &sum, &n);
        printf("%s %s %.3f", d ? "," : "; nll by domain:", s->lines->domains[d], n ? -sum / (double)n : 0);
    }
    putchar('\n');
}

/* One bar per MoE layer, so that a hot layer is seen, not read. */
static void print_balance(const score_summary *s)
{
    double mean = 0, worst = 0;
    int layers = s->config->n_moe_layers, at = 0;
    for (int l = 0; l < layers; l++) {
        double x = layer_imbalance(s, l);
        mean += x / layers;
        if (x > worst) {
            worst = x;
            at = s->plan->layer_numbers[l];
        }
    }
    if (layers == 0)
        return;
    printf("balance   busiest rank over mean: %.2f, worst %.2f in layer %d\n", mean, worst, at);
    for (int l = 0; l < layers && s->n_ranks > 1; l++) {
        printf("          layer %3d ", s->plan->layer_numbers[l]);
        for (int r = 0; r < s->n_ranks && r < 8; r++) {
            double load = (double)s->layer_load[(size_t)r * (size_t)layers + (size_t)l], all = 0;
            for (int o = 0; o < s->n_ranks; o++)
                all += (double)s->layer_load[(size_t)o * (size_t)layers + (size_t)l];
            int width = (int)lround(ratio(load * s->n_ranks, all) * (s->n_ranks > 4 ? 6 : 12));
            printf(" %d|%.*s%.*s", r, width > 24 ? 24 : width, "########################", width > 20 ? 0 : 20 - width,
                   "                    ");
        }
        printf(" %.2f\n", layer_imbalance(s, l));
    }
}

/* The expert a domain uses most in each layer, and how much over its fair share: what a planner lives on. */
static void print_hot_experts(const score_summary *s)
{
    int layers = s->config->n_moe_layers, n = s->config->n_experts;
    uint64_t *count = calloc((size_t)layers * (size_t)n + 1, sizeof *count);
    for (int d = 0; d < s->lines->n_domains && count; d++) {
        routing_stats_sum_tokens(s->routing, d, -1, count);
        printf("experts   %-10s busiest by layer:", s->lines->domains[d]);
        for (int l = 0; l < layers && l < 12; l++) {
            int best = 0;
            uint64_t most = 0, sum = 0;
            for (int e = 0; e < n; e++) {
                uint64_t x = count[(size_t)l * (size_t)n + (size_t)e];
                sum += x;
                if (x > most) {
                    most = x;
                    best = e;
                }
            }
            printf("  %d (%.1fx)", best, ratio((double)most * n, (double)sum));
        }
        putchar('\n');
    }
    free(count);
}

static void print_memory(const score_summary *s)
{
    const double mb = 1e6;
    for (int r = 0; r < s->n_ranks; r++) {
        const runtime_memory *m = &s->ranks[r].memory;
        printf("memory    rank %d: weights %.1f MB (its share %.1f), KV budget %.1f MB, buffers %.1f MB, everything but weights "
               "%.1f MB in use\n",
               r, (double)m->weights_resident / mb, (double)m->weights_share / mb, (double)m->kv / mb, (double)m->buffers / mb,
               (double)m->process_private / mb);
    }
}

void score_print_text(const score_summary *s)
{
    for (int i = 0; i < s->lines->n_lines; i++)
        print_line(s, i);
    totals t = add_up(s);
    printf("\nmodel     %s (%s); ranks %d, nodes %d, threads per rank %d; %s, plan %s, combine %s, exchange %s\n",
           s->config->name, s->config->family->model_type, s->n_ranks, s->n_nodes, s->threads, s->isa, s->plan->name,
           combine_name(s->options->runtime.combine), s->exchange);
    print_scores(s);
    printf("speed     prefill %.0f tokens/s (%llu tokens, %.2f s), decode %.0f tokens/s (%llu tokens, %.2f s), ready in %.2f s\n",
           t.prefill_per_s, s->times.prefill_rows, s->times.prefill_seconds, t.decode_per_s, s->times.decode_rows,
           s->times.decode_seconds, s->load_seconds);
    printf("step      %.0f %% computing, %.0f %% exchanging, %.0f %% waiting, %.0f %% other\n", 100 * t.compute, 100 * t.exchange,
           100 * t.wait, 100 * fmax(0, 1 - t.compute - t.exchange - t.wait));
    printf("rows      %.2f MB stayed on their rank; out %.2f MB same node, %.2f MB cross node; back %.2f and %.2f MB; headers "
           "%.2f MB\n",
           t.same_rank / 1e6, t.same_node / 1e6, t.cross_node / 1e6, t.back_node / 1e6, t.back_cross / 1e6, t.header / 1e6);
    if (s->options->runtime.limits.owners == OWNERS_AFFINITY)
        printf("owners    %llu sequences moved, with %.2f MB of keys and values\n", s->n_moved, (double)s->moved_bytes / 1e6);
    if (s->options->runtime.combine == COMBINE_FIXED)
        printf("fixed     %.0f of %.0f rows had an element out of range (%.0f elements)\n", t.spilled_rows, t.combined_rows,
               t.spills);
    print_balance(s);
    print_hot_experts(s);
    print_memory(s);
    fflush(stdout);
}

/* ---- JSON ---------------------------------------------------------------------------------------------------------------- */

static cJSON *json_line(const score_summary *s, int i)
{
    const token_line *line = &s->lines->lines[i];
    const score_line *result = &s->results[i];
    cJSON *o = cJSON_CreateObject();
    if (line->id)
        cJSON_AddStringToObject(o, "id", line->id);
    if (line->domain >= 0)
        cJSON_AddStringToObject(o, "domain", s->lines->domains[line->domain]);
    cJSON_AddNumberToObject(o, "tokens", line->n_ids);
    if (result->n_scored) {
        double nll = -result->sum_logprob / result->n_scored;
        cJSON_AddNumberToObject(o, "mean_nll", nll);
        cJSON_AddNumberToObject(o, "perplexity", exp(nll));
    }
    if (s->options->greedy > 0)
        cJSON_AddItemToObject(o, "greedy", cJSON_CreateIntArray(result->generated, result->n_generated));
    return o;
}

static cJSON *json_rank(const score_summary *s, int r)
{
    const score_rank *k = &s->ranks[r];
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "attention_seconds", k->times.attention_seconds);
    cJSON_AddNumberToObject(o, "expert_seconds", k->times.expert_seconds);
    cJSON_AddNumberToObject(o, "head_seconds", k->times.head_seconds);
    cJSON_AddNumberToObject(o, "exchange_seconds", k->times.exchange_seconds);
    cJSON_AddNumberToObject(o, "wait_seconds", k->wait_seconds);
    cJSON_AddNumberToObject(o, "step_seconds", k->step_seconds);
    cJSON_AddNumberToObject(o, "expert_rows", (double)k->times.expert_rows);
    cJSON_AddNumberToObject(o, "experts_touched", (double)k->times.experts_touched);
    cJSON_AddNumberToObject(o, "weights_share_bytes", (double)k->memory.weights_share);
    cJSON_AddNumberToObject(o, "weights_resident_bytes", (double)k->memory.weights_resident);
    cJSON_AddNumberToObject(o, "kv_bytes", (double)k->memory.kv);
    cJSON_AddNumberToObject(o, "buffer_bytes", (double)k->memory.buffers);
    cJSON_AddNumberToObject(o, "other_resident_bytes", (double)k->memory.process_private);
    return o;
}

static void json_run(cJSON *o, const score_summary *s, const totals *t)
{
    cJSON_AddStringToObject(o, "model", s->config->name);
    cJSON_AddNumberToObject(o, "ranks", s->n_ranks);
    cJSON_AddNumberToObject(o, "nodes", s->n_nodes);
    cJSON_AddNumberToObject(o, "threads", s->threads);
    cJSON_AddStringToObject(o, "isa", s->isa);
    cJSON_AddStringToObject(o, "plan", s->plan->name);
    cJSON_AddStringToObject(o, "combine", combine_name(s->options->runtime.combine));
    cJSON_AddNumberToObject(o, "prefill_tokens_per_s", t->prefill_per_s);
    cJSON_AddNumberToObject(o, "decode_tokens_per_s", t->decode_per_s);
    cJSON_AddNumberToObject(o, "ready_seconds", s->load_seconds);
    cJSON_AddNumberToObject(o, "compute_share", t->compute);
    cJSON_AddNumberToObject(o, "exchange_share", t->exchange);
    cJSON_AddNumberToObject(o, "wait_share", t->wait);
    cJSON_AddNumberToObject(o, "row_bytes",
                            s->config->hidden * (s->options->runtime.rows == ROWS_BF16 ? sizeof(uint16_t) : sizeof(float)));
    cJSON_AddNumberToObject(o, "row_bytes_same_rank", t->same_rank);
    cJSON_AddNumberToObject(o, "row_bytes_same_node", t->same_node);
    cJSON_AddNumberToObject(o, "row_bytes_cross_node", t->cross_node);
    cJSON_AddNumberToObject(o, "return_bytes_same_node", t->back_node);
    cJSON_AddNumberToObject(o, "return_bytes_cross_node", t->back_cross);
    cJSON_AddNumberToObject(o, "header_bytes", t->header);
    cJSON_AddNumberToObject(o, "moved_sequences", (double)s->n_moved);
    cJSON_AddNumberToObject(o, "moved_bytes", (double)s->moved_bytes);
    cJSON_AddNumberToObject(o, "moved_bytes_cross_node", (double)s->moved_cross_bytes);
    cJSON_AddNumberToObject(o, "spilled_elements", t->spills);
    cJSON_AddNumberToObject(o, "spilled_rows", t->spilled_rows);
    cJSON_AddNumberToObject(o, "combined_rows", t->combined_rows);
}

status score_print_json(const score_summary *s)
{
    totals t = add_up(s);
    cJSON *o = cJSON_CreateObject();
    json_run(o, s, &t);
    cJSON *balance = cJSON_AddArrayToObject(o, "max_over_mean");
    for (int l = 0; l < s->config->n_moe_layers; l++)
        cJSON_AddItemToArray(balance, cJSON_CreateNumber(layer_imbalance(s, l)));
    cJSON *links = cJSON_AddArrayToObject(o, "link_rows");
    for (int r = 0; r < s->n_ranks; r++) {
        cJSON *row = cJSON_CreateArray();
        for (int q = 0; q < s->n_ranks; q++)
            cJSON_AddItemToArray(row, cJSON_CreateNumber((double)s->link_rows[(size_t)r * (size_t)s->n_ranks + (size_t)q]));
        cJSON_AddItemToArray(links, row);
    }
    cJSON *ranks = cJSON_AddArrayToObject(o, "per_rank");
    for (int r = 0; r < s->n_ranks; r++)
        cJSON_AddItemToArray(ranks, json_rank(s, r));
    cJSON *lines = cJSON_AddArrayToObject(o, "lines");
    for (int i = 0; i < s->lines->n_lines; i++)
        cJSON_AddItemToArray(lines, json_line(s, i));
    char *text = cJSON_PrintUnformatted(o);
    cJSON_Delete(o);
    if (!text)
        return status_fail(STATUS_NO_MEMORY, "no memory to print the result");
    puts(text);
    fflush(stdout);
    free(text);
    return STATUS_OK;
}
