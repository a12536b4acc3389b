#include "placement/planner/svg_chart.h"

#include <math.h>
#include <string.h>

enum { PICTURE_WIDTH = 960, LEFT = 44, TOP = 20, MOST_TITLES = 30000 };

void svg_text(FILE *out, const char *text)
{
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        const char *escape = *c == '&'    ? "&amp;"
                             : *c == '<'  ? "&lt;"
                             : *c == '>'  ? "&gt;"
                             : *c == '"'  ? "&quot;"
                             : *c == '\'' ? "&#39;"
                                          : NULL;
        if (escape)
            fputs(escape, out);
        else if (*c >= 0x20 && *c != 0x7f)
            fputc(*c, out);
    }
}

static void begin(FILE *out, double width, double height, const char *label)
{
    fprintf(out, "<svg viewBox=\"0 0 %.0f %.0f\" style=\"max-width:%.0fpx\" role=\"img\" aria-label=\"", width, height, width);
    svg_text(out, label);
    fprintf(out, "\">\n");
}

/* anchor: start, middle or end */
static void label(FILE *out, double x, double y, const char *anchor, const char *text)
{
    fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    svg_text(out, text);
    fprintf(out, "</text>\n");
}

static void number_label(FILE *out, double x, double y, const char *anchor, int number)
{
    char text[16];
    snprintf(text, sizeof text, "%d", number);
    label(out, x, y, anchor, text);
}

/* Of n labels `size` apart, every how manyth has room for `needed` units: 1, 2, 5, 10, ... */
static int label_step(double size, double needed)
{
    static const int steps[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000};
    for (int i = 0; i < 10; i++)
        if (steps[i] * size >= needed)
            return steps[i];
    return 5000;
}

/* ---- heat maps ---- */

/* Which colour, and how strong. */
static double strength(double value, double most, const char **class)
{
    *class = value >= 1 ? "over" : "under";
    double s = value >= 1 ? (most > 1 ? log(value) / log(most) : 0) : 1 - value;
    return s < 0 ? 0 : s > 1 ? 1 : s;
}

static void heat_legend(double y, double most, const char *word, FILE *out)
{
    enum { STEPS = 48, STEP = 5 };
    char text[80];
    for (int i = 0; i < STEPS; i++) { /* half below the mean, half above */
        double at = (i + 0.5) / STEPS * 2, value = at < 1 ? at : pow(most, at - 1);
        const char *class;
        double s = strength(value, most, &class);
        fprintf(out,
                "<rect class=\"%s\" x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"10\" shape-rendering=\"crispEdges\" "
                "fill-opacity=\"%.2f\"/>\n",
                class, LEFT + i * STEP, y, STEP, s);
    }
    fprintf(out, "<rect class=\"frame\" x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"10\"/>\n", LEFT, y, STEPS * STEP);
    label(out, LEFT, y + 22, "middle", "0");
    label(out, LEFT + STEPS * STEP / 2.0, y + 22, "middle", "1");
    snprintf(text, sizeof text, "%.3g", most);
    label(out, LEFT + STEPS * STEP, y + 22, "middle", text);
    label(out, LEFT + STEPS * STEP + 24, y + 9, "start", word);
}

static void heat_cell(const heat_map *map, int row, int column, double width, double height, double most, bool title, FILE *out)
{
    double value = map->values[(size_t)row * (size_t)map->n_columns + (size_t)column];
    const char *class;
    double s = strength(value, most, &class);
    if (s < 0.005 && !title)
        return;
    fprintf(out, "<rect class=\"%s\" x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill-opacity=\"%.2f\"", class,
            LEFT + column * width, TOP + row * height, width, height, s);
    if (title)
        fprintf(out, "><title>%s %d, %s %d: %.3g</title></rect>\n", map->row_word, map->row_numbers ? map->row_numbers[row] : row,
                map->column_word, column, value);
    else
        fprintf(out, "/>\n");
}

static void heat_axes(const heat_map *map, double width, double height, FILE *out)
{
    int step = label_step(width, 26);
    for (int c = 0; c < map->n_columns; c += step)
        number_label(out, LEFT + (c + 0.5) * width, TOP - 6, "middle", c);
    step = label_step(height, 12);
    for (int r = 0; r < map->n_rows; r += step)
        number_label(out, LEFT - 6, TOP + (r + 0.5) * height + 4, "end", map->row_numbers ? map->row_numbers[r] : r);
}

void svg_heat_map(const heat_map *map, FILE *out)
{
    double width = (double)(PICTURE_WIDTH - LEFT - 10) / map->n_columns, height = map->n_rows > 60 ? 10 : 14, most = 1;
    size_t n = (size_t)map->n_rows * (size_t)map->n_columns;
    char words[200];
    if (width > 48)
        width = 48;
    for (size_t i = 0; i < n; i++)
        most = map->values[i] > most ? map->values[i] : most;
    double bottom = TOP + map->n_rows * height;
    snprintf(words, sizeof words, "%s: one row per %s, one column per %s", map->value_word, map->row_word, map->column_word);
    begin(out, PICTURE_WIDTH, bottom + 40, words);
    for (int r = 0; r < map->n_rows; r++)
        for (int c = 0; c < map->n_columns; c++)
            heat_cell(map, r, c, width, height, most, n <= MOST_TITLES, out);
    fprintf(out, "<rect class=\"frame\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%.1f\"/>\n", LEFT, TOP, width * map->n_columns,
            map->n_rows * height);
    heat_axes(map, width, height, out);
    heat_legend(bottom + 12, most, words, out);
    fprintf(out, "</svg>\n");
}

/* ---- similarity ---- */

static double names_width(const char *const *names, int n)
{
    size_t longest = 0;
    for (int i = 0; i < n; i++)
        longest = strlen(names[i]) > longest ? strlen(names[i]) : longest;
    return 12 + 6.2 * (double)(longest < 36 ? longest : 36);
}

/* A name cut to 36 bytes, between characters. */
static void short_name(const char *name, char *text)
{
    size_t n = strlen(name);
    if (n > 36)
        for (n = 35; n > 0 && ((unsigned char)name[n] & 0xc0) == 0x80;)
            n--;
    memcpy(text, name, n);
    text[n] = '\0';
}

static void similarity_legend(double x, double y, double least, FILE *out)
{
    char text[80];
    for (int i = 0; i < 32; i++)
        fprintf(out,
                "<rect class=\"alike\" x=\"%.1f\" y=\"%.1f\" width=\"5\" height=\"10\" shape-rendering=\"crispEdges\" "
                "fill-opacity=\"%.2f\"/>\n",
                x + i * 5, y, (i + 0.5) / 32);
    fprintf(out, "<rect class=\"frame\" x=\"%.1f\" y=\"%.1f\" width=\"160\" height=\"10\"/>\n", x, y);
    snprintf(text, sizeof text, "%.2f", least);
    label(out, x, y + 22, "middle", text);
    label(out, x + 160, y + 22, "middle", "1");
    label(out, x + 184, y + 9, "start", "cosine of counts");
}

void svg_similarity(const char *const *names, const int *order, int n, const double *cosine, int stride, FILE *out)
{
    double size = n > 30 ? 13 : 20, left = names_width(names, n), top = left, least = 1;
    char name[40], other[40];
    for (int a = 0; a < n; a++)
        for (int b = 0; b < n; b++)
            least = fmin(least, cosine[order[a] * stride + order[b]]);
    double width = left + n * size < 460 ? 460 : left + n * size + 4; /* room for the legend */
    begin(out, width, top + n * size + 44, "cosine of the counts of two domains");
    for (int a = 0; a < n; a++) {
        short_name(names[order[a]], name);
        label(out, left - 6, top + (a + 0.5) * size + 4, "end", name);
        fprintf(out, "<g transform=\"translate(%.1f %.1f) rotate(-90)\">", left + (a + 0.5) * size + 4, top - 5);
        label(out, 0, 0, "start", name);
        fprintf(out, "</g>\n");
        for (int b = 0; b < n; b++) {
            double c = cosine[order[a] * stride + order[b]], s = least < 1 ? (c - least) / (1 - least) : 1;
            short_name(names[order[b]], other);
            fprintf(out,
                    "<rect class=\"alike\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill-opacity=\"%.2f\"><title>",
                    left + b * size, top + a * size, size, size, s);
            svg_text(out, name);
            fprintf(out, ", ");
            svg_text(out, other);
            fprintf(out, ": %.3f</title></rect>\n", c);
        }
    }
    fprintf(out, "<rect class=\"frame\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>\n", left, top, n * size, n * size);
    similarity_legend(left, top + n * size + 14, least, out);
    fprintf(out, "</svg>\n");
}

/* ---- bars ---- */

/* A round number of at least `most` / 5: the step between lines. */
static double grid_step(double most)
{
    double power = pow(10, floor(log10(most / 5)));
    double by[] = {1, 2, 2.5, 5, 10};
    for (int i = 0; i < 5; i++)
        if (by[i] * power >= most / 5)
            return by[i] * power;
    return most / 5;
}

static void bar_legend(const bar_chart *chart, double y, FILE *out)
{
    fprintf(out, "<rect class=\"bar\" x=\"%d\" y=\"%.1f\" width=\"10\" height=\"10\"/>\n", LEFT, y);
    label(out, LEFT + 16, y + 9, "start", chart->bar_word);
    double x = LEFT + 40 + 6.2 * (double)strlen(chart->bar_word);
    fprintf(out, "<circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>\n", x, y + 5);
    label(out, x + 10, y + 9, "start", chart->dot_word);
}

void svg_bars(const bar_chart *chart, FILE *out)
{
    double height = 160, width = (double)(PICTURE_WIDTH - LEFT - 10) / chart->n, most = 1;
    char text[40];
    if (width > 40)
        width = 40;
    for (int i = 0; i < chart->n; i++)
        most = fmax(most, fmax(chart->bars[i], chart->dots[i]));
    double step = grid_step(most), right = LEFT + width * chart->n;
    begin(out, PICTURE_WIDTH, TOP + height + 50, chart->bar_word);
    for (double v = 0; v <= most * 1.0001; v += step) {
        double y = TOP + height * (1 - v / most);
        fprintf(out, "<line class=\"grid\" x1=\"%d\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n", LEFT, y, right, y);
        snprintf(text, sizeof text, "%.4g", v);
        label(out, LEFT - 6, y + 4, "end", text);
    }
    int labels = label_step(width, 26);
    for (int i = 0; i < chart->n; i++) {
        double x = LEFT + i * width, y = TOP + height * (1 - chart->bars[i] / most);
        fprintf(
            out,
            "<rect class=\"bar\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"><title>layer %d: %s %.3f</title></rect>\n",
            x + width * 0.15, y, width * 0.7, TOP + height - y, chart->numbers[i], chart->bar_word, chart->bars[i]);
        fprintf(out, "<circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\"><title>layer %d: %s %.3f</title></circle>\n",
                x + width / 2, TOP + height * (1 - chart->dots[i] / most), width < 12 ? width / 3 : 4, chart->numbers[i],
                chart->dot_word, chart->dots[i]);
        if (i % labels == 0)
            number_label(out, x + width / 2, TOP + height + 14, "middle", chart->numbers[i]);
    }
    bar_legend(chart, TOP + height + 28, out);
    fprintf(out, "</svg>\n");
}

/* ---- chains ---- */

enum { CHAIN_LAYERS = 24, CHAIN_X = 38, CHAIN_Y = 34 };

/* One chain's part from layer `first` to before `last`; the link into `first` is drawn coming from the left. */
static void draw_chain(const expert_chain *c, const int *layer_numbers, int first, int last, double y, FILE *out)
{
    for (int l = first > 0 ? first - 1 : 0; l + 1 < last; l++) {
        double x = LEFT + (l - first) * CHAIN_X + CHAIN_X / 2.0;
        fprintf(out,
                "<line class=\"link\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke-width=\"%.1f\"><title>layer %d "
                "expert %d to "
                "layer %d expert %d: %.0f %% go on, %.1f times chance</title></line>\n",
                l < first ? x + CHAIN_X / 2.0 : x, y, x + CHAIN_X, y, 1 + 11 * c->share[l], layer_numbers[l], c->experts[l],
                layer_numbers[l + 1], c->experts[l + 1], 100 * c->share[l], c->lift[l]);
    }
    for (int l = first; l < last; l++) {
        double x = LEFT + (l - first) * CHAIN_X + CHAIN_X / 2.0;
        fprintf(out, "<circle class=\"node\" cx=\"%.1f\" cy=\"%.1f\" r=\"12\"/>\n", x, y);
        number_label(out, x, y + 4, "middle", c->experts[l]);
    }
}

void svg_chains(const expert_chain *chains, int n_chains, const int *layer_numbers, int n_layers, FILE *out)
{
    for (int first = 0; first < n_layers; first += CHAIN_LAYERS) {
        int last = first + CHAIN_LAYERS < n_layers ? first + CHAIN_LAYERS : n_layers;
        begin(out, PICTURE_WIDTH, TOP + n_chains * CHAIN_Y + 6, "chains of experts that follow each other");
        label(out, LEFT - 10, TOP - 6, "end", "layer");
        for (int l = first; l < last; l++)
            number_label(out, LEFT + (l - first + 0.5) * CHAIN_X, TOP - 6, "middle", layer_numbers[l]);
        for (int i = 0; i < n_chains; i++)
            draw_chain(&chains[i], layer_numbers, first, last, TOP + (i + 0.5) * CHAIN_Y, out);
        fprintf(out, "</svg>\n");
    }
}
