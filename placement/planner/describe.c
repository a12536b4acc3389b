#include "placement/planner/describe.h"

#include "placement/planner/stats_view.h"
#include "proto/console.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BAR_WIDTH = 24, FEW = 10 };

text_bar describe_bar(double value, double full, int width)
{
    text_bar bar = {""};
    if (width > 40)
        width = 40;
    double eighths = full > 0 && value > 0 ? value / full * width * 8 : 0;
    int n = eighths >= width * 8 ? width * 8 : (int)(eighths + 0.5);
    if (n == 0 && eighths > 0)
        n = 1;
    char *at = bar.text;
    for (; n >= 8; n -= 8, at += 3)
        memcpy(at, "\xe2\x96\x88", 3);
    if (n > 0) { /* U+258F is one eighth, U+2589 seven */
        memcpy(at, "\xe2\x96", 2);
        at[2] = (char)(0x90 - n);
        at += 3;
    }
    *at = '\0';
    return bar;
}

/* "0-23", "1, 3, 5": layer numbers in as few words as it takes. */
static void print_numbers(const int *numbers, int n, FILE *out)
{
    int printed = 0;
    for (int i = 0; i < n; printed++) {
        int last = i;
        while (last + 1 < n && numbers[last + 1] == numbers[last] + 1)
            last++;
        if (printed == FEW) {
            fprintf(out, ", ...");
            return;
        }
        fprintf(out, printed ? ", %d" : "%d", numbers[i]);
        if (last > i)
            fprintf(out, "-%d", numbers[last]);
        i = last + 1;
    }
}

void describe_shape(const routing_shape *shape, FILE *out)
{
    fprintf(out, "model      %s: %d layers (", shape->model && *shape->model ? shape->model : "unknown", shape->n_layers);
    print_numbers(shape->layer_numbers, shape->n_layers, out);
    fprintf(out, ") of %d experts", shape->n_experts);
    if (shape->top_k > 0)
        fprintf(out, ", %d per token", shape->top_k);
    fprintf(out, "\ndomains    %d: ", shape->n_domains);
    for (int d = 0; d < shape->n_domains && d < FEW; d++)
        fprintf(out, d ? ", %s" : "%s", shape->domains[d]);
    fprintf(out, shape->n_domains > FEW ? ", ...\n" : "\n");
}

/* ---- statistics ---- */

static void print_balance(const stats_sum *s, const plan *p, const balance_view *b, FILE *out)
{
    fprintf(out, "balance    plan %s on %d ranks: busiest rank over mean %.3f +- %.3f (mean of layers), worst %.3f in layer %d\n",
            p->name, p->n_ranks, b->mean, b->error, b->worst, s->shape->layer_numbers[b->worst_layer]);
    fprintf(out, "           said otherwise: (max - mean) / mean %.3f (TensorRT-LLM), mean / max %.3f (vLLM, SGLang)\n",
            b->mean - 1, 1 / b->mean);
}

static void print_skew(const stats_sum *s, const skew_view *skew, FILE *out)
{
    int n = s->shape->n_layers, worst = 0;
    double hottest = 0, even = 0, top = 0;
    for (int l = 0; l < n; l++) {
        hottest += skew[l].hottest / n;
        even += skew[l].even / n;
        top += skew[l].top_share / n;
        worst = skew[l].hottest > skew[worst].hottest ? l : worst;
    }
    fprintf(out, "skew       hottest expert over mean %.2f (mean of layers), most %.2f: expert %d of layer %d\n", hottest,
            skew[worst].hottest, skew[worst].hottest_expert, s->shape->layer_numbers[worst]);
    fprintf(
        out,
        "           the hottest eighth of the experts gets %.0f %% of the choices; as uneven as %.1f of %d experts used evenly\n",
        100 * top, even, s->shape->n_experts);
}

static status print_similarity(const routing_stats *stats, FILE *out)
{
    const routing_shape *shape = routing_stats_shape(stats);
    int n = shape->n_domains, low[2] = {0, 1}, high[2] = {0, 1};
    if (n < 2)
        return STATUS_OK;
    double sum = 0, *cosine = calloc((size_t)n * (size_t)n, sizeof *cosine);
    status st = cosine ? stats_view_similarity(stats, cosine) : status_fail(STATUS_NO_MEMORY, "no memory for %d domains", n);
    for (int a = 0; st == STATUS_OK && a < n; a++)
        for (int b = a + 1; b < n; b++) {
            double c = cosine[a * n + b];
            sum += c;
            if (c < cosine[low[0] * n + low[1]])
                low[0] = a, low[1] = b;
            if (c > cosine[high[0] * n + high[1]])
                high[0] = a, high[1] = b;
        }
    if (st == STATUS_OK) {
        fprintf(out, "alike      cosine of two domains' counts %.3f (mean), least %.3f: %s and %s\n", sum * 2 / n / (n - 1),
                cosine[low[0] * n + low[1]], shape->domains[low[0]], shape->domains[low[1]]);
        if (n > 2)
            fprintf(out, "           most %.3f: %s and %s\n", cosine[high[0] * n + high[1]], shape->domains[high[0]],
                    shape->domains[high[1]]);
    }
    free(cosine);
    return st;
}

static void print_layers(const stats_sum *s, const skew_view *skew, const double *balance, FILE *out)
{
    double most = 1;
    for (int l = 0; l < s->shape->n_layers; l++)
        most = balance[l] > most ? balance[l] : most;
    fprintf(out, "\n%6s  %8s  %-*s  %8s  %6s  %6s\n", "layer", "busiest", BAR_WIDTH, "", "hottest", "expert", "even");
    for (int l = 0; l < s->shape->n_layers; l++) {
        text_bar bar = describe_bar(balance[l] - 1, most - 1, BAR_WIDTH);
        int pad = BAR_WIDTH - (int)(strlen(bar.text) / 3);
        fprintf(out, "%6d  %8.3f  %s%*s  %8.2f  %6d  %6.1f\n", s->shape->layer_numbers[l], balance[l], bar.text, pad, "",
                skew[l].hottest, skew[l].hottest_expert, skew[l].even);
    }
    fprintf(
        out,
        "busiest: busiest rank over mean; hottest: hottest expert over mean; even: experts that, used evenly, are as uneven\n");
}

static status describe_sum(const routing_stats *stats, const stats_sum *s, const plan *p, bool layers, FILE *out)
{
    size_t n = (size_t)s->shape->n_layers;
    skew_view *skew = calloc(n, sizeof *skew);
    double *balance = calloc(n, sizeof *balance);
    balance_view b = {0};
    status st =
        skew && balance ? stats_view_balance(s, p, balance, &b) : status_fail(STATUS_NO_MEMORY, "no memory for %zu layers", n);
    if (st == STATUS_OK) {
        stats_view_skew(s, skew);
        describe_shape(s->shape, out);
        fprintf(out, "tokens     %llu generated, %llu of prompts; pairs of experts %s\n",
                (unsigned long long)s->tokens[PHASE_DECODE], (unsigned long long)s->tokens[PHASE_PREFILL],
                routing_stats_has_pairs(stats) ? "counted" : "not counted");
        print_balance(s, p, &b, out);
        print_skew(s, skew, out);
        st = print_similarity(stats, out);
    }
    if (st == STATUS_OK && layers)
        print_layers(s, skew, balance, out);
    free(skew);
    free(balance);
    return st;
}

status describe_stats(const routing_stats *stats, const plan *p, bool layers, FILE *out)
{
    stats_sum s;
    TRY(stats_sum_create(stats, false, &s));
    status st = describe_sum(stats, &s, p, layers, out);
    stats_sum_clear(&s);
    return st;
}

/* ---- plans ---- */

/* homes, copies [n_ranks] over all layers; fewest and most copies in one layer [n_ranks]. */
static void count_copies(const plan *p, int *homes, int *copies, int *fewest, int *most, int *layer)
{
    for (int l = 0; l < p->n_layers; l++) {
        memset(layer, 0, (size_t)p->n_ranks * sizeof *layer);
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0; c < plan_n_copies(p, l, e); c++) {
                int rank = plan_copies(p, l, e)[c];
                homes[rank] += c == 0;
                copies[rank]++;
                layer[rank]++;
            }
        for (int r = 0; r < p->n_ranks; r++) {
            fewest[r] = l == 0 || layer[r] < fewest[r] ? layer[r] : fewest[r];
            most[r] = layer[r] > most[r] ? layer[r] : most[r];
        }
    }
}

static int n_nodes(const plan *p)
{
    int n = 0;
    for (int r = 0; r < p->n_ranks; r++)
        n = p->node_of_rank[r] >= n ? p->node_of_rank[r] + 1 : n;
    return n;
}

status describe_plan(const plan *p, FILE *out)
{
    size_t n = (size_t)p->n_ranks;
    int *counts = calloc(5 * n, sizeof *counts), n_lists = p->n_layers * p->n_experts, full = 0, replicated = 0;
    if (!counts)
        return status_fail(STATUS_NO_MEMORY, "no memory for %zu ranks", n);
    int *homes = counts, *copies = counts + n, *fewest = counts + 2 * n, *most = counts + 3 * n;
    count_copies(p, homes, copies, fewest, most, counts + 4 * n);
    for (int i = 0; i < n_lists; i++)
        replicated += p->first_copy[i + 1] - p->first_copy[i] > 1;
    for (size_t r = 0; r < n; r++)
        full = copies[r] > full ? copies[r] : full;
    fprintf(out, "plan       %s, epoch %lld: %d layers (", p->name, p->epoch, p->n_layers);
    print_numbers(p->layer_numbers, p->n_layers, out);
    fprintf(out, ") of %d experts on %d ranks, %d node%s\n", p->n_experts, p->n_ranks, n_nodes(p), n_nodes(p) == 1 ? "" : "s");
    fprintf(out, "copies     %d: %d homes and %d replicas of %d experts\n\n", p->first_copy[n_lists], n_lists,
            p->first_copy[n_lists] - n_lists, replicated);
    fprintf(out, "%6s  %4s  %8s  %8s  %-9s\n", "rank", "node", "homes", "replicas", "per layer");
    for (size_t r = 0; r < n; r++) {
        char range[32];
        snprintf(range, sizeof range, fewest[r] == most[r] ? "%d" : "%d-%d", fewest[r], most[r]);
        fprintf(out, "%6zu  %4d  %8d  %8d  %-9s  %s\n", r, p->node_of_rank[r], homes[r], copies[r] - homes[r], range,
                describe_bar(copies[r], full, BAR_WIDTH).text);
    }
    free(counts);
    return STATUS_OK;
}

/* ---- traces, topologies ---- */

static int compare_ints(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

typedef struct {
    int64_t phases[N_PHASES], dropped;
    int *sequences; /* [tokens] */
    int64_t *of_domain;
} trace_counts;

static void count_rows(const routing_trace *trace, uint16_t *experts, trace_counts *c)
{
    const routing_shape *shape = routing_trace_shape(trace);
    for (int64_t t = 0; t < routing_trace_n_tokens(trace); t++) {
        routing_row row = routing_trace_row(trace, t, experts, NULL);
        c->phases[row.phase]++;
        c->of_domain[row.domain]++;
        c->sequences[t] = row.sequence;
        for (int i = 0; i < shape->n_layers * shape->top_k; i++)
            c->dropped += experts[i] == ROUTING_NO_EXPERT;
    }
}

static void print_trace(const routing_trace *trace, const trace_counts *c, FILE *out)
{
    const routing_shape *shape = routing_trace_shape(trace);
    int64_t n = routing_trace_n_tokens(trace), most = 1, n_sequences = 0;
    for (int64_t t = 0; t < n; t++)
        n_sequences += t == 0 || c->sequences[t] != c->sequences[t - 1];
    describe_shape(shape, out);
    fprintf(out, "tokens     %lld generated, %lld of prompts, in %lld sequences\n", (long long)c->phases[PHASE_DECODE],
            (long long)c->phases[PHASE_PREFILL], (long long)n_sequences);
    if (c->dropped > 0)
        fprintf(out, "dropped    %lld choices, %.2f %%\n", (long long)c->dropped,
                100.0 * (double)c->dropped / ((double)n * shape->n_layers * shape->top_k));
    for (int d = 0; d < shape->n_domains; d++)
        most = c->of_domain[d] > most ? c->of_domain[d] : most;
    fprintf(out, "\n%10s  %-*s  domain\n", "tokens", BAR_WIDTH, "");
    for (int d = 0; d < shape->n_domains; d++) {
        text_bar bar = describe_bar((double)c->of_domain[d], (double)most, BAR_WIDTH);
        fprintf(out, "%10lld  %s%*s  %s\n", (long long)c->of_domain[d], bar.text, BAR_WIDTH - (int)(strlen(bar.text) / 3), "",
                shape->domains[d]);
    }
}

status describe_trace(const routing_trace *trace, FILE *out)
{
    const routing_shape *shape = routing_trace_shape(trace);
    size_t n = (size_t)routing_trace_n_tokens(trace);
    trace_counts c = {.sequences = malloc(n * sizeof *c.sequences + 1),
                      .of_domain = calloc((size_t)shape->n_domains, sizeof(int64_t))};
    uint16_t *experts = calloc((size_t)shape->n_layers * (size_t)shape->top_k, sizeof *experts);
    status st = c.sequences && c.of_domain && experts
                    ? STATUS_OK
                    : status_fail(STATUS_NO_MEMORY, "%s: no memory to look through %zu tokens", routing_trace_path(trace), n);
    if (st == STATUS_OK) {
        count_rows(trace, experts, &c);
        qsort(c.sequences, n, sizeof *c.sequences, compare_ints);
        print_trace(trace, &c, out);
    }
    free(c.sequences);
    free(c.of_domain);
    free(experts);
    return st;
}

void describe_topology(const topology *t, FILE *out)
{
    fprintf(out, "topology   %d ranks on %d node%s\n", t->n_ranks, t->n_nodes, t->n_nodes == 1 ? "" : "s");
    fprintf(out, "links      same node %s and %g us, cross node %s and %g us%s\n",
            human_bandwidth(t->link[LINK_SAME_NODE].gb_per_s * 1e9).text, t->link[LINK_SAME_NODE].us,
            human_bandwidth(t->link[LINK_CROSS_NODE].gb_per_s * 1e9).text, t->link[LINK_CROSS_NODE].us,
            t->links ? "; bandwidths by a matrix" : "");
    fprintf(out, "a row      %s on a link\n", human_bytes(t->row_bytes).text);
    if (t->bytes_per_expert > 0)
        fprintf(out, "an expert  %s\n", human_bytes((double)t->bytes_per_expert).text);
    fprintf(out, "\n%6s  %4s  %10s  %10s  %s\n", "rank", "node", "row us", "expert us", "room for experts");
    for (int r = 0; r < t->n_ranks; r++)
        fprintf(out, "%6d  %4d  %10g  %10g  %s\n", r, t->node_of_rank[r], t->row_us[r], t->expert_us[r],
                t->expert_bytes[r] < 0 ? "no limit" : human_bytes((double)t->expert_bytes[r]).text);
}
