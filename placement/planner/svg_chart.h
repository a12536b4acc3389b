/* svg_chart.h - pictures for HTML pages, written as inline SVG: heat maps, bars, chains.
 *
 * Colours are classes (.over, .under, .alike, .bar, .dot, .link) that the page's style gives a colour; how strong a cell is is
 * its opacity, so one picture reads on light, dark and printed pages. Every cell has a title that a pointer shows. All text is
 * escaped. */
#ifndef CONVOKE_PLACEMENT_PLANNER_SVG_CHART_H
#define CONVOKE_PLACEMENT_PLANNER_SVG_CHART_H

#include "placement/planner/stats_view.h"

#include <stdio.h>

/* Text with &, <, >, ", ' replaced and control characters left out. */
void svg_text(FILE *out, const char *text);

/* rows x columns of value / mean: 1 is the page's own background, above it one colour up to the largest value (by logarithm),
 * below it another down to 0. row_numbers NULL: 0, 1, 2, ... */
typedef struct {
    const char *row_word, *column_word, *value_word; /* "layer", "rank", "load over mean" */
    int n_rows, n_columns;
    const int *row_numbers; /* [n_rows] */
    const double *values;   /* [n_rows][n_columns] */
} heat_map;
void svg_heat_map(const heat_map *map, FILE *out);

/* A symmetric matrix of names, 0 to 1; `order` [n]: which comes first. */
void svg_similarity(const char *const *names, const int *order, int n, const double *cosine, int stride, FILE *out);

/* A bar and a dot for each number. */
typedef struct {
    const char *bar_word, *dot_word;
    int n;
    const int *numbers;        /* [n] below the bars */
    const double *bars, *dots; /* [n] */
} bar_chart;
void svg_bars(const bar_chart *chart, FILE *out);

/* Chains of experts from layer to layer: circles with the expert's number, lines as thick as the share that goes on. */
void svg_chains(const expert_chain *chains, int n_chains, const int *layer_numbers, int n_layers, FILE *out);

#endif
