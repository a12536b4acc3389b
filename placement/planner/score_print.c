#include "placement/planner/score_print.h"
#include "placement/planner/svg_chart.h"

#include <errno.h>
#include <math.h>
#include <string.h>

/* ---- JSON ---- */

static void put_list(cJSON *object, const char *key, const double *values, int n)
{
    cJSON *list = cJSON_AddArrayToObject(object, key);
    for (int i = 0; list && i < n; i++)
        cJSON_AddItemToArray(list, cJSON_CreateNumber(values[i]));
}

static void put_replay(cJSON *o, const replay_result *r)
{
    json_put_number(o, "step_us", r->step_us);
    json_put_number(o, "step_us_low", r->low_us);
    json_put_number(o, "step_us_high", r->high_us);
    json_put_number(o, "compute_us", r->compute_us);
    json_put_number(o, "dispatch_us", r->dispatch_us);
    json_put_number(o, "combine_us", r->combine_us);
    json_put_number(o, "steps", (double)r->n_steps);
    json_put_number(o, "rows", (double)r->n_rows);
    json_put_number(o, "copies", r->copies);
    json_put_number(o, "cross_copies", r->cross_copies);
    json_put_number(o, "home", r->home);
    json_put_number(o, "max_over_mean_replayed", r->max_over_mean_mean);
    json_put_number(o, "max_over_mean_replayed_worst", r->max_over_mean_worst);
    json_put_number(o, "max_over_mean_step", r->max_over_mean_step);
    json_put_number(o, "split_gap", r->split_gap);
    json_put_number(o, "owner_moves", (double)r->n_moves);
    put_list(o, "layer_us", r->layer_us, r->n_layers);
    put_list(o, "max_over_mean_of_layer", r->max_over_mean, r->n_layers);
    cJSON *rows = cJSON_AddArrayToObject(o, "link_rows");
    for (int g = 0; rows && g < r->n_ranks; g++) {
        cJSON *to = cJSON_CreateArray();
        for (int h = 0; to && h < r->n_ranks; h++)
            cJSON_AddItemToArray(to, cJSON_CreateNumber((double)r->link_rows[(size_t)g * (size_t)r->n_ranks + (size_t)h]));
        cJSON_AddItemToArray(rows, to);
    }
}

cJSON *score_to_json(const plan_score *s)
{
    cJSON *o = cJSON_CreateObject();
    if (!o)
        return NULL;
    json_put_number(o, "max_over_mean_mean", s->max_over_mean_mean);
    json_put_number(o, "max_over_mean_worst", s->max_over_mean_worst);
    json_put_number(o, "max_over_mean_error", s->max_over_mean_error);
    json_put_number(o, "imbalance", s->max_over_mean_mean - 1); /* (max - mean) / mean */
    json_put_number(o, "balancedness", s->max_over_mean_mean > 0 ? 1 / s->max_over_mean_mean : NAN);
    json_put_number(o, "flow", s->flow);
    json_put_number(o, "moetuner", s->moetuner);
    json_put_number(o, "ranks_per_token", s->ranks_per_token);
    json_put_number(o, "replicas", s->n_replicas);
    json_put_number(o, "replica_bytes", (double)s->replica_bytes);
    if (s->has_replay)
        put_replay(o, &s->replay);
    return o;
}

cJSON *bounds_to_json(const plan_bounds *b)
{
    cJSON *o = b ? cJSON_CreateObject() : cJSON_CreateNull();
    if (!b || !o)
        return o;
    json_put_number(o, "step_us", b->step_us);
    json_put_number(o, "step_compute_us", b->step_compute_us);
    json_put_number(o, "step_transfer_us", b->step_transfer_us);
    json_put_number(o, "max_over_mean_mean", b->balance);
    json_put_number(o, "ranks_per_token", b->ranks_per_token);
    json_put_number(o, "ranks_layers_proved", b->ranks_layers_proved);
    json_put_number(o, "flow_spectral", b->flow_spectral);
    json_put_number(o, "flow_matching", b->flow_matching);
    json_put_number(o, "seconds", b->seconds);
    cJSON_AddStringToObject(o, "remark", b->remark);
    return o;
}

/* ---- what does not fit ---- */

static int n_copies_on(const plan *made, int g)
{
    int held = 0;
    for (int l = 0; l < made->n_layers; l++)
        for (int e = 0; e < made->n_experts; e++)
            held += plan_holds(made, l, e, g);
    return held;
}

void score_print_misfit(FILE *f, const problem *p, const plan *made)
{
    const topology *t = p->topology;
    for (int g = 0; t->bytes_per_expert > 0 && g < p->n_ranks; g++) {
        int held = n_copies_on(made, g);
        int64_t holds = t->expert_bytes[g] / t->bytes_per_expert;
        if (t->expert_bytes[g] >= 0 && held > holds) {
            fprintf(f, "%s does not fit: rank %d would hold %d experts and has room for %lld; no bound here holds for it\n",
                    made->name, g, held, (long long)holds);
            return;
        }
    }
}

/* ---- the table ---- */

typedef struct {
    char text[24];
} cell;

static cell number(double value, int digits)
{
    cell c;
    if (isfinite(value))
        snprintf(c.text, sizeof c.text, "%.*f", digits, value);
    else
        snprintf(c.text, sizeof c.text, "-");
    return c;
}

static void print_line(FILE *f, const scored_plan *p, const plan_score *first)
{
    const plan_score *s = p->score;
    const replay_result *r = &s->replay;
    bool has = s->has_replay;
    fprintf(f, "%-22.22s %11s %6s %15s %7s %7s %7s %7s %7s %7s %8d\n", p->name, number(has ? r->step_us : NAN, 1).text,
            number(has && first->has_replay ? r->step_us / first->replay.step_us : NAN, 3).text,
            has ? number((r->high_us - r->low_us) / 2, 1).text : "-", number(s->max_over_mean_mean, 3).text,
            number(s->max_over_mean_worst, 3).text, number(has ? r->max_over_mean_step : NAN, 3).text,
            number(has ? r->copies : NAN, 3).text, number(has ? r->cross_copies : NAN, 3).text, number(s->flow, 3).text,
            s->n_replicas);
}

static void print_bound(FILE *f, const plan_bounds *b, const plan_score *first)
{
    fprintf(f, "%-22s %11s %6s %15s %7s %7s %7s %7s %7s %7s\n", "lower bound", number(b->step_us, 1).text,
            number(first->has_replay ? b->step_us / first->replay.step_us : NAN, 3).text, "", number(b->balance, 3).text, "", "",
            "", "",
            number(fmax(isnan(b->flow_spectral) ? -1 : b->flow_spectral, isnan(b->flow_matching) ? -1 : b->flow_matching) < 0
                       ? NAN
                       : fmax(isnan(b->flow_spectral) ? 0 : b->flow_spectral, isnan(b->flow_matching) ? 0 : b->flow_matching),
                   3)
                .text);
}

void score_print_table(FILE *f, const scored_plan *plans, int n, const plan_bounds *bounds)
{
    if (n < 1)
        return;
    fprintf(f, "%-22s %11s %6s %15s %7s %7s %7s %7s %7s %7s %8s\n", "plan", "step us", "ratio", "+- (95 %)", "max/mn", "worst",
            "step's", "copies", "cross", "R-flow", "replicas");
    for (int i = 0; i < n; i++)
        print_line(f, &plans[i], plans[0].score);
    if (bounds)
        print_bound(f, bounds, plans[0].score);
    const plan_score *last = plans[n - 1].score;
    fprintf(f,
            "max/mn: planned rows of the busiest rank over the mean, mean over layers (standard error %.3f; TensorRT-LLM's "
            "imbalance of the "
            "last plan %.3f, vLLM's balancedness %.3f)\n",
            last->max_over_mean_error, last->max_over_mean_mean - 1, 1 / last->max_over_mean_mean);
    if (!last->has_replay)
        fprintf(f, "step us needs a trace: statistics do not know how much steps differ\n");
}

/* ---- bars ---- */

static double longest(const scored_plan *plans, int n)
{
    double most = 0;
    for (int i = 0; i < n; i++)
        most = plans[i].score->has_replay ? fmax(most, plans[i].score->replay.step_us) : most;
    return most;
}

void score_print_bars(FILE *f, const scored_plan *plans, int n, const plan_bounds *bounds)
{
    enum { WIDTH = 60 };
    double most = longest(plans, n);
    if (most <= 0)
        return;
    for (int i = 0; i < n; i++) {
        const replay_result *r = &plans[i].score->replay;
        int bars[3], done = 0;
        double parts[3] = {r->compute_us, r->dispatch_us, r->combine_us}, sum = 0;
        for (int k = 0; k < 3; k++) {
            sum += parts[k];
            bars[k] = (int)lround(sum / most * WIDTH) - done;
            done += bars[k];
        }
        fprintf(f, "%-22.22s ", plans[i].name);
        for (int k = 0; k < 3; k++)
            for (int c = 0; c < bars[k]; c++)
                fputs(k == 0 ? "#" : k == 1 ? ">" : "<", f);
        fprintf(f, " %.1f\n", r->step_us);
    }
    if (bounds && isfinite(bounds->step_us))
        fprintf(f, "%-22s %*s %.1f\n", "lower bound", (int)lround(bounds->step_us / most * WIDTH), "|", bounds->step_us);
    fprintf(f, "%-22s # compute, > dispatch, < combine: microseconds per step\n", "");
}

/* ---- the picture ---- */

enum { PICTURE_WIDTH = 900, BAR_LEFT = 220, BAR_WIDTH = 560, BAR_HEIGHT = 22, BAR_STEP = 34, PICTURE_TOP = 56 };

static void draw_text(FILE *f, double x, double y, const char *anchor, const char *text)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    svg_text(f, text);
    fputs("</text>\n", f);
}

static void draw_bar(FILE *f, const scored_plan *p, double y, double most, double first)
{
    static const char *const colours[3] = {"#3b6ea5", "#e08e2b", "#c65146"};
    const replay_result *r = &p->score->replay;
    double parts[3] = {r->compute_us, r->dispatch_us, r->combine_us}, x = BAR_LEFT;
    draw_text(f, BAR_LEFT - 10, y + 16, "end", p->name);
    for (int k = 0; k < 3; k++) {
        double w = parts[k] / most * BAR_WIDTH;
        fprintf(f, "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%d\" fill=\"%s\"/>\n", x, y, w, BAR_HEIGHT, colours[k]);
        x += w;
    }
    char text[64];
    snprintf(text, sizeof text, "%.1f (%.3fx)", r->step_us, r->step_us / first);
    draw_text(f, x + 8, y + 16, "start", text);
}

static void draw_legend(FILE *f)
{
    static const char *const names[3] = {"compute", "dispatch", "combine"}, *const colours[3] = {"#3b6ea5", "#e08e2b", "#c65146"};
    draw_text(f, 20, 24, "start", "Microseconds per step, busiest rank and slowest link of each layer");
    for (int k = 0; k < 3; k++) {
        fprintf(f, "<rect x=\"%d\" y=\"34\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", BAR_LEFT + 110 * k, colours[k]);
        draw_text(f, BAR_LEFT + 110 * k + 18, 45, "start", names[k]);
    }
}

status score_write_picture(const char *path, const scored_plan *plans, int n, const plan_bounds *bounds)
{
    double most = longest(plans, n);
    if (most <= 0)
        return status_fail(STATUS_USAGE, "%s: a picture needs a trace to replay", path);
    FILE *f = fopen(path, "w");
    if (!f)
        return status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    int height = PICTURE_TOP + n * BAR_STEP + 30;
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
            PICTURE_WIDTH, height, PICTURE_WIDTH, height);
    draw_legend(f);
    for (int i = 0; i < n; i++)
        draw_bar(f, &plans[i], PICTURE_TOP + 6 + i * BAR_STEP, most, plans[0].score->replay.step_us);
    if (bounds && isfinite(bounds->step_us)) {
        double x = BAR_LEFT + bounds->step_us / most * BAR_WIDTH;
        fprintf(f, "<line x1=\"%.2f\" y1=\"%d\" x2=\"%.2f\" y2=\"%d\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>\n", x,
                PICTURE_TOP, x, height - 24);
        draw_text(f, x, height - 8, "middle", "lower bound");
    }
    fputs("</svg>\n", f);
    bool failed = ferror(f) != 0;
    if (fclose(f) != 0 || failed)
        return status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    return STATUS_OK;
}
