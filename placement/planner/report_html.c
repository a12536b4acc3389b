#include "placement/planner/report_html.h"

#include "placement/planner/import.h"
#include "placement/planner/stats_view.h"
#include "placement/planner/svg_chart.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { N_CHAINS = 6, MOST_DOMAINS = 100, MOST_CELLS = 200000, USUAL_RANKS = 8 };

static const char style[] =
    ":root{color-scheme:light dark;--text:#1c2733;--soft:#5b6b7b;--line:#c9d3dd;--page:#fff;--over:#c2410c;--under:#1d4ed8;"
    "--alike:#0f766e;--bar:#7c8da0;--dot:#c2410c;--link:#0f766e}\n"
    "@media(prefers-color-scheme:dark){:root{--text:#e6ebf0;--soft:#9dabb9;--line:#3b4855;--page:#12181f;--over:#fb923c;"
    "--under:#60a5fa;--alike:#2dd4bf;--bar:#64748b;--dot:#fb923c;--link:#2dd4bf}}\n"
    "@media "
    "print{:root{--text:#000;--soft:#444;--line:#bbb;--page:#fff;--over:#c2410c;--under:#1d4ed8;--alike:#0f766e;--bar:#7c8da0;"
    "--dot:#c2410c;--link:#0f766e}section{break-inside:avoid}}\n"
    "body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--page);max-width:1000px;margin:2em auto;padding:0 "
    "1em;"
    "-webkit-print-color-adjust:exact;print-color-adjust:exact}\n"
    "h1{font-size:1.4em;margin:0}h2{font-size:1.1em;margin:2em 0 .2em}p{margin:.3em 0;color:var(--soft)}\n"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em 1em .15em 0;text-align:left;font-weight:normal;"
    "vertical-align:top}th{color:var(--soft)}\n"
    "svg{display:block;width:100%;height:auto;margin:.6em 0}svg text{font:11px system-ui,sans-serif;fill:var(--text)}\n"
    ".over{fill:var(--over)}.under{fill:var(--under)}.alike{fill:var(--alike)}.bar{fill:var(--bar)}.dot{fill:var(--dot)}"
    ".frame{fill:none;stroke:var(--line)}.grid{stroke:var(--line)}.link{stroke:var(--link);stroke-opacity:.7}"
    ".node{fill:var(--page);stroke:var(--link)}\n";

static void head(const char *title, FILE *out)
{
    fprintf(out, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
                 "<meta name=\"viewport\" content=\"width=device-width\"/>\n<title>");
    svg_text(out, title);
    fprintf(out, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<h1>", style);
    svg_text(out, title);
    fprintf(out, "</h1>\n");
}

static void section(FILE *out, const char *heading, const char *explanation)
{
    fprintf(out, "<section>\n<h2>%s</h2>\n<p>%s</p>\n", heading, explanation);
}

static void row_text(FILE *out, const char *name, const char *text)
{
    fprintf(out, "<tr><th>%s</th><td>", name);
    svg_text(out, text);
    fprintf(out, "</td></tr>\n");
}

static void row_format(FILE *out, const char *name, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void row_format(FILE *out, const char *name, const char *format, ...)
{
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    row_text(out, name, text);
}

/* ---- a plan alone ---- */

/* Copies of each rank over the layer's mean: values [n_layers][n_ranks]. */
static void count_copies(const plan *p, double *values)
{
    memset(values, 0, (size_t)p->n_layers * (size_t)p->n_ranks * sizeof *values);
    for (int l = 0; l < p->n_layers; l++) {
        double *row = values + (size_t)l * (size_t)p->n_ranks, n = 0;
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0; c < plan_n_copies(p, l, e); c++, n++)
                row[plan_copies(p, l, e)[c]]++;
        for (int r = 0; r < p->n_ranks; r++)
            row[r] *= p->n_ranks / n;
    }
}

static void plan_summary(const plan *p, FILE *out)
{
    int n_lists = p->n_layers * p->n_experts, n_nodes = 0;
    for (int r = 0; r < p->n_ranks; r++)
        n_nodes = p->node_of_rank[r] >= n_nodes ? p->node_of_rank[r] + 1 : n_nodes;
    row_format(out, "plan", "%s: %d layers of %d experts on %d ranks, %d nodes", p->name, p->n_layers, p->n_experts, p->n_ranks,
               n_nodes);
    row_format(out, "copies", "%d homes, %d replicas", n_lists, p->first_copy[n_lists] - n_lists);
}

/* ---- statistics ---- */

typedef struct {
    const report_input *in;
    stats_sum sum;
    balance_view balance;
    double *balance_of_layer; /* [n_layers] */
    skew_view *skew;          /* [n_layers] */
    double *by_rank;          /* [n_layers][n_ranks] load over mean */
    double *by_expert;        /* [n_layers][n_experts] */
    expert_chain chains[N_CHAINS];
    int n_chains;
} report;

static void report_clear(report *r)
{
    for (int i = 0; i < r->n_chains; i++)
        expert_chain_clear(&r->chains[i]);
    stats_sum_clear(&r->sum);
    free(r->balance_of_layer);
    free(r->skew);
    free(r->by_rank);
    free(r->by_expert);
}

static void fill_maps(report *r)
{
    const plan *p = r->in->plan;
    int n = p->n_experts;
    for (int l = 0; l < p->n_layers; l++) {
        const uint64_t *counts = r->sum.per_expert + (size_t)l * (size_t)n;
        double sum = 0, *ranks = r->by_rank + (size_t)l * (size_t)p->n_ranks, *experts = r->by_expert + (size_t)l * (size_t)n;
        for (int e = 0; e < n; e++)
            sum += (double)counts[e];
        for (int e = 0; e < n; e++) {
            experts[e] = sum > 0 ? (double)counts[e] * n / sum : 1;
            for (int c = 0; c < plan_n_copies(p, l, e); c++)
                ranks[plan_copies(p, l, e)[c]] += experts[e] / plan_n_copies(p, l, e) * p->n_ranks / n;
        }
    }
}

static status prepare(report *r)
{
    const plan *p = r->in->plan;
    size_t n_layers = (size_t)p->n_layers;
    r->by_rank = calloc(n_layers * (size_t)p->n_ranks, sizeof *r->by_rank);
    r->by_expert = calloc(n_layers * (size_t)p->n_experts, sizeof *r->by_expert);
    r->balance_of_layer = calloc(n_layers, sizeof *r->balance_of_layer);
    r->skew = calloc(n_layers, sizeof *r->skew);
    if (!r->by_rank || !r->by_expert || !r->balance_of_layer || !r->skew)
        return status_fail(STATUS_NO_MEMORY, "no memory for a report");
    if (!r->in->stats) {
        count_copies(p, r->by_rank);
        return STATUS_OK;
    }
    TRY(stats_sum_create(r->in->stats, true, &r->sum));
    TRY(stats_view_balance(&r->sum, p, r->balance_of_layer, &r->balance)); /* refuses a plan of another shape */
    stats_view_skew(&r->sum, r->skew);
    fill_maps(r);
    return stats_view_chains(&r->sum, N_CHAINS, r->chains, &r->n_chains);
}

static void stats_summary(const report *r, FILE *out)
{
    const routing_shape *s = r->sum.shape;
    row_format(out, "model", "%s: %d layers of %d experts", s->model && *s->model ? s->model : "unknown", s->n_layers,
               s->n_experts);
    row_format(out, "tokens", "%llu generated, %llu of prompts, in %d domains", (unsigned long long)r->sum.tokens[PHASE_DECODE],
               (unsigned long long)r->sum.tokens[PHASE_PREFILL], s->n_domains);
    row_format(out, "balance", "busiest rank over mean %.3f +- %.3f (mean of layers), worst %.3f in layer %d", r->balance.mean,
               r->balance.error, r->balance.worst, s->layer_numbers[r->balance.worst_layer]);
    row_format(out, "said otherwise", "(max - mean) / mean %.3f, mean / max %.3f", r->balance.mean - 1, 1 / r->balance.mean);
}

static void summary(const report *r, FILE *out)
{
    fprintf(out, "<table>\n");
    if (r->in->stats)
        stats_summary(r, out);
    plan_summary(r->in->plan, out);
    fprintf(out, "</table>\n");
}

static void heat_section(const char *heading, const char *explanation, const heat_map *map, FILE *out)
{
    section(out, heading, explanation);
    if ((size_t)map->n_rows * (size_t)map->n_columns > MOST_CELLS)
        fprintf(out, "<p>Left out: %d by %d cells are too many for a page.</p>\n", map->n_rows, map->n_columns);
    else
        svg_heat_map(map, out);
    fprintf(out, "</section>\n");
}

static void maps(const report *r, FILE *out)
{
    const plan *p = r->in->plan;
    heat_map map = {.row_word = "layer",
                    .column_word = "rank",
                    .n_rows = p->n_layers,
                    .n_columns = p->n_ranks,
                    .row_numbers = p->layer_numbers,
                    .values = r->by_rank};
    if (!r->in->stats) {
        map.value_word = "copies over mean";
        heat_section("Copies by layer and rank", "How many experts each rank holds in each layer, over the layer's mean.", &map,
                     out);
        return;
    }
    map.value_word = "load over mean";
    heat_section("Load by layer and rank",
                 "Rows each rank would compute under the plan, over the layer's mean; copies share evenly.", &map, out);
    map.column_word = "expert";
    map.n_columns = p->n_experts;
    map.values = r->by_expert;
    heat_section("Load by layer and expert", "How often each expert was chosen, over the layer's mean.", &map, out);
}

static status skew_section(const report *r, FILE *out)
{
    int n = r->in->plan->n_layers;
    double *hottest = calloc((size_t)n, sizeof *hottest);
    if (!hottest)
        return status_fail(STATUS_NO_MEMORY, "no memory for a report");
    for (int l = 0; l < n; l++)
        hottest[l] = r->skew[l].hottest;
    const bar_chart chart = {.bar_word = "hottest expert over mean expert",
                             .dot_word = "busiest rank over mean rank",
                             .n = n,
                             .numbers = r->in->plan->layer_numbers,
                             .bars = hottest,
                             .dots = r->balance_of_layer};
    section(out, "Skew by layer", "The hottest expert limits how even any plan without replicas can be.");
    svg_bars(&chart, out);
    fprintf(out, "</section>\n");
    free(hottest);
    return STATUS_OK;
}

static void chain_table(const report *r, FILE *out)
{
    const int *layers = r->in->plan->layer_numbers;
    fprintf(out, "<table>\n<tr><th>chain</th><th>beyond chance</th><th>strongest link</th></tr>\n");
    for (int i = 0; i < r->n_chains; i++) {
        const expert_chain *c = &r->chains[i];
        int best = 0;
        for (int l = 1; l + 1 < r->in->plan->n_layers; l++)
            best = c->share[l] > c->share[best] ? l : best;
        fprintf(out,
                "<tr><td>%d</td><td>%.1f %% of the tokens a layer</td><td>layer %d expert %d to layer %d expert %d: %.0f %% go "
                "on, %.1f times "
                "chance</td></tr>\n",
                i + 1, 100 * c->excess / (r->in->plan->n_layers - 1), layers[best], c->experts[best], layers[best + 1],
                c->experts[best + 1], 100 * c->share[best], c->lift[best]);
    }
    fprintf(out, "</table>\n");
}

static void chains_section(const report *r, FILE *out)
{
    section(
        out, "Experts that follow each other",
        "Paths through the layers whose links carry the most tokens beyond chance; a line is as thick as the share of the one "
        "expert's tokens that choose the next. No expert is on two of them.");
    if (r->n_chains == 0) {
        fprintf(out, "<p>Not known: these statistics hold no pairs.</p>\n</section>\n");
        return;
    }
    svg_chains(r->chains, r->n_chains, r->in->plan->layer_numbers, r->in->plan->n_layers, out);
    chain_table(r, out);
    fprintf(out, "</section>\n");
}

/* Each next to the one it is most like among those left: alike domains stand together. */
static void order_domains(const double *cosine, int stride, int n, int *order)
{
    for (int i = 0; i < n; i++)
        order[i] = i;
    for (int i = 1; i < n; i++) {
        int best = i;
        for (int j = i + 1; j < n; j++)
            if (cosine[order[i - 1] * stride + order[j]] > cosine[order[i - 1] * stride + order[best]])
                best = j;
        int swap = order[i];
        order[i] = order[best];
        order[best] = swap;
    }
}

static status domains_section(const report *r, FILE *out)
{
    const routing_shape *shape = r->sum.shape;
    int n = shape->n_domains < MOST_DOMAINS ? shape->n_domains : MOST_DOMAINS;
    if (n < 2)
        return STATUS_OK;
    double *cosine = calloc((size_t)shape->n_domains * (size_t)shape->n_domains, sizeof *cosine);
    int *order = calloc((size_t)n, sizeof *order);
    status st =
        cosine && order ? stats_view_similarity(r->in->stats, cosine) : status_fail(STATUS_NO_MEMORY, "no memory for a report");
    if (st == STATUS_OK) {
        order_domains(cosine, shape->n_domains, n, order);
        section(out, "Domains",
                "How alike two domains use the experts: a plan made for the one serves the other as well as they are alike.");
        if (n < shape->n_domains)
            fprintf(out, "<p>The first %d of %d.</p>\n", n, shape->n_domains);
        svg_similarity(shape->domains, order, n, cosine, shape->n_domains, out);
        fprintf(out, "</section>\n");
    }
    free(cosine);
    free(order);
    return st;
}

static status write_page(const report *r, FILE *out)
{
    status st = STATUS_OK;
    head(r->in->title, out);
    summary(r, out);
    maps(r, out);
    if (r->in->stats) {
        st = skew_section(r, out);
        if (r->in->plan->n_layers > 1)
            chains_section(r, out);
        if (st == STATUS_OK)
            st = domains_section(r, out);
    }
    fprintf(out, "</body>\n</html>\n");
    return st;
}

status report_write(const report_input *in, const char *path)
{
    report r = {.in = in};
    text_file file;
    status st = prepare(&r);
    if (st == STATUS_OK && (st = text_file_begin(path, &file)) == STATUS_OK) {
        status written = write_page(&r, file.stream);
        st = text_file_finish(&file);
        st = written == STATUS_OK ? st : written;
    }
    report_clear(&r);
    return st;
}

status report_plan(const routing_stats *stats, const char *path, int n_ranks, plan *out)
{
    const routing_shape *s = routing_stats_shape(stats);
    plan_shape shape = {.n_ranks = n_ranks > 0 ? n_ranks : USUAL_RANKS,
                        .n_experts = s->n_experts,
                        .n_layers = s->n_layers,
                        .layer_numbers = s->layer_numbers};
    if (!path)
        return plan_contiguous(&shape, NULL, out);
    TRY(plan_read(path, NULL, out));
    if (out->n_experts == s->n_experts && out->n_layers == s->n_layers)
        return STATUS_OK;
    status st = status_fail(STATUS_BAD_INPUT, "%s: a plan for %d layers of %d experts; the statistics have %d of %d", path,
                            out->n_layers, out->n_experts, s->n_layers, s->n_experts);
    plan_clear(out);
    return st;
}
