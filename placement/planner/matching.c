/* The Hungarian method by shortest augmenting paths (Jonker and Volgenant, 1987): rows come in one by one; potentials keep every
 * reduced cost at or above zero. */
#include "placement/planner/matching.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    double *row_price, *column_price, *slack; /* column 0 is the root of each path */
    int *row_of, *from;
    bool *done;
} scratch;

/* Columns are numbered from 1 here, rows too; row_of[0] is the row that comes in. */
static void insert_row(int n, const double *cost, scratch *s)
{
    for (int j = 0; j <= n; j++) {
        s->slack[j] = INFINITY;
        s->done[j] = false;
    }
    int at = 0;
    while (s->row_of[at]) {
        int row = s->row_of[at], next = 0;
        double step = INFINITY;
        s->done[at] = true;
        for (int j = 1; j <= n; j++) {
            if (s->done[j])
                continue;
            double reduced = cost[(size_t)(row - 1) * (size_t)n + (size_t)j - 1] - s->row_price[row] - s->column_price[j];
            if (reduced < s->slack[j]) {
                s->slack[j] = reduced;
                s->from[j] = at;
            }
            if (s->slack[j] < step) {
                step = s->slack[j];
                next = j;
            }
        }
        for (int j = 0; j <= n; j++) {
            if (s->done[j]) {
                s->row_price[s->row_of[j]] += step;
                s->column_price[j] -= step;
            } else {
                s->slack[j] -= step;
            }
        }
        at = next;
    }
    for (; at; at = s->from[at])
        s->row_of[at] = s->row_of[s->from[at]];
}

bool matching_solve(int n, const double *cost, int *column)
{
    size_t room = (size_t)n + 1;
    scratch s = {calloc(room, sizeof(double)), calloc(room, sizeof(double)), calloc(room, sizeof(double)),
                 calloc(room, sizeof(int)),    calloc(room, sizeof(int)),    calloc(room, sizeof(bool))};
    bool ok = s.row_price && s.column_price && s.slack && s.row_of && s.from && s.done;
    for (int i = 1; ok && i <= n; i++) {
        s.row_of[0] = i;
        insert_row(n, cost, &s);
    }
    for (int j = 1; ok && j <= n; j++)
        column[s.row_of[j] - 1] = j - 1;
    free(s.row_price);
    free(s.column_price);
    free(s.slack);
    free(s.row_of);
    free(s.from);
    free(s.done);
    return ok;
}
