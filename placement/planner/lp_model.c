/* A linear programme as plain data: three growing lists. */
#include "placement/planner/lp_private.h"

#include <math.h>
#include <stdlib.h>

status lp_create(lp_model **out)
{
    lp_model *m = calloc(1, sizeof *m);
    if (!m)
        return status_fail(STATUS_NO_MEMORY, "no memory for a linear programme");
    *out = m;
    return STATUS_OK;
}

void lp_destroy(lp_model *m)
{
    if (!m)
        return;
    free(m->columns);
    free(m->rows);
    free(m->entries);
    free(m);
}

int lp_add_column(lp_model *m, double low, double high, double cost, bool integer)
{
    if (m->n_columns == m->column_room) {
        int room = m->column_room ? 2 * m->column_room : 64;
        lp_column *grown = realloc(m->columns, (size_t)room * sizeof *grown);
        if (!grown) {
            m->failed = true;
            return -1;
        }
        m->columns = grown;
        m->column_room = room;
    }
    m->columns[m->n_columns] = (lp_column){low, high, cost, integer};
    return m->n_columns++;
}

int lp_add_row(lp_model *m, double low, double high)
{
    if (m->n_rows == m->row_room) {
        int room = m->row_room ? 2 * m->row_room : 64;
        lp_row *grown = realloc(m->rows, (size_t)room * sizeof *grown);
        if (!grown) {
            m->failed = true;
            return -1;
        }
        m->rows = grown;
        m->row_room = room;
    }
    m->rows[m->n_rows] = (lp_row){low, high};
    return m->n_rows++;
}

void lp_set(lp_model *m, int row, int column, double value)
{
    if (m->failed || value == 0)
        return; /* an add that failed gave -1: lp_failed() says so later */
    if (m->n_entries == m->entry_room) {
        size_t room = m->entry_room ? 2 * m->entry_room : 256;
        lp_entry *grown = realloc(m->entries, room * sizeof *grown);
        if (!grown) {
            m->failed = true;
            return;
        }
        m->entries = grown;
        m->entry_room = room;
    }
    m->entries[m->n_entries++] = (lp_entry){row, column, value};
}

void lp_set_constant(lp_model *m, double constant)
{
    m->constant = constant;
}

void lp_set_integer(lp_model *m, int column, bool integer)
{
    m->columns[column].integer = integer;
}

int lp_n_columns(const lp_model *m)
{
    return m->n_columns;
}

int lp_n_rows(const lp_model *m)
{
    return m->n_rows;
}

bool lp_failed(const lp_model *m)
{
    return m->failed;
}

static bool within(double x, double low, double high)
{
    double room = 1e-6 * (1 + fabs(x));
    return x >= low - room && x <= high + room;
}

status lp_check_point(const lp_model *m, const double *x, double *objective)
{
    double *sums = calloc((size_t)m->n_rows + 1, sizeof *sums);
    if (!sums)
        return status_fail(STATUS_NO_MEMORY, "no memory to check a starting point");
    status st = STATUS_OK;
    double cost = m->constant;
    for (int j = 0; j < m->n_columns && st == STATUS_OK; j++) {
        const lp_column *c = &m->columns[j];
        cost += c->cost * x[j];
        if (!within(x[j], c->low, c->high) || (c->integer && fabs(x[j] - round(x[j])) > 1e-6))
            st = status_fail(STATUS_BAD_INPUT, "starting point: column %d cannot be %g", j, x[j]);
    }
    for (size_t i = 0; i < m->n_entries; i++)
        sums[m->entries[i].row] += m->entries[i].value * x[m->entries[i].column];
    for (int i = 0; i < m->n_rows && st == STATUS_OK; i++)
        if (!within(sums[i], m->rows[i].low, m->rows[i].high))
            st = status_fail(STATUS_BAD_INPUT, "starting point: row %d cannot be %g", i, sums[i]);
    free(sums);
    if (st == STATUS_OK)
        *objective = cost;
    return st;
}
