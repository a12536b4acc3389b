/* Spherical k-means with fixed sizes. */
#include "placement/planner/cluster.h"
#include "placement/planner/transport.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 8 };

typedef struct {
    int n_items, width, n_clusters;
    double *unit;   /* [n_items][width] rows of length 1 */
    double *centre; /* [n_clusters][width] */
    double *cost;   /* [n_items][n_clusters] 1 - cosine */
    int *next;      /* [n_items] */
} clustering;

static double dot(const double *a, const double *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void normalise(double *row, int n)
{
    double length = sqrt(dot(row, row, n));
    for (int i = 0; i < n && length > 0; i++)
        row[i] /= length;
}

static const double *unit_of(const clustering *c, int item)
{
    return c->unit + (size_t)item * (size_t)c->width;
}

/* Centre k is the item least like all centres before it; equal ones: the lower. */
static void seed_centres(clustering *c)
{
    double *nearest = c->cost; /* [n_items] scratch */
    int pick = 0;
    for (int i = 0; i < c->n_items; i++)
        nearest[i] = -DBL_MAX;
    for (int k = 0; k < c->n_clusters; k++) {
        memcpy(c->centre + (size_t)k * (size_t)c->width, unit_of(c, pick), (size_t)c->width * sizeof *c->centre);
        for (int i = 0; i < c->n_items; i++)
            nearest[i] = fmax(nearest[i], i == pick ? DBL_MAX : dot(unit_of(c, i), unit_of(c, pick), c->width));
        for (int i = 0; i < c->n_items; i++)
            if (nearest[i] < nearest[pick])
                pick = i;
    }
}

static void weigh(clustering *c)
{
    for (int i = 0; i < c->n_items; i++)
        for (int k = 0; k < c->n_clusters; k++)
            c->cost[(size_t)i * (size_t)c->n_clusters + (size_t)k] =
                1 - dot(unit_of(c, i), c->centre + (size_t)k * (size_t)c->width, c->width);
}

static void move_centres(clustering *c, const int *cluster)
{
    memset(c->centre, 0, (size_t)c->n_clusters * (size_t)c->width * sizeof *c->centre);
    for (int i = 0; i < c->n_items; i++)
        for (int j = 0; j < c->width; j++)
            c->centre[(size_t)cluster[i] * (size_t)c->width + (size_t)j] += unit_of(c, i)[j];
    for (int k = 0; k < c->n_clusters; k++)
        normalise(c->centre + (size_t)k * (size_t)c->width, c->width);
}

static status clustering_open(const double *rows, clustering *c)
{
    size_t items = (size_t)c->n_items, width = (size_t)c->width, clusters = (size_t)c->n_clusters;
    c->unit = malloc(items * width * sizeof *c->unit);
    c->centre = malloc(clusters * width * sizeof *c->centre);
    c->cost = malloc((items + 1) * (clusters + 1) * sizeof *c->cost);
    c->next = malloc((items + clusters) * sizeof *c->next);
    if (!c->unit || !c->centre || !c->cost || !c->next)
        return status_fail(STATUS_NO_MEMORY, "no memory to group %d experts", c->n_items);
    memcpy(c->unit, rows, items * width * sizeof *c->unit);
    for (size_t i = 0; i < items; i++)
        normalise(c->unit + i * width, c->width);
    return STATUS_OK;
}

/* New numbers along a chain of likeness, each cluster taking the most alike one that has its size: sizes stay where they are. */
static void order_clusters(clustering *c, const int *sizes, int *cluster)
{
    int *number = c->next, last = 0;
    for (int k = 0; k < c->n_clusters; k++)
        number[k] = -1;
    for (int place = 0; place < c->n_clusters; place++) {
        int best = -1;
        double most = -DBL_MAX;
        for (int k = 0; k < c->n_clusters; k++) {
            if (number[k] >= 0 || sizes[k] != sizes[place])
                continue;
            double like =
                place == 0 ? -k
                           : dot(c->centre + (size_t)k * (size_t)c->width, c->centre + (size_t)last * (size_t)c->width, c->width);
            if (like > most) {
                most = like;
                best = k;
            }
        }
        number[best] = place;
        last = best;
    }
    for (int i = 0; i < c->n_items; i++)
        cluster[i] = number[cluster[i]];
}

status cluster_rows(int n_items, int width, const double *rows, int n_clusters, const int *sizes, int *cluster)
{
    clustering c = {.n_items = n_items, .width = width, .n_clusters = n_clusters};
    status st = STATUS_OK;
    double before = DBL_MAX, total;
    TRY_GOTO(clustering_open(rows, &c), out);
    seed_centres(&c);
    for (int round = 0; round < ROUNDS; round++) {
        weigh(&c);
        TRY_GOTO(transport_solve(n_items, n_clusters, c.cost, sizes, cluster, &total), out);
        move_centres(&c, cluster);
        if (total >= before * (1 - 1e-9))
            break;
        before = total;
    }
    order_clusters(&c, sizes, cluster);
out:
    free(c.unit);
    free(c.centre);
    free(c.cost);
    free(c.next);
    return st;
}
