/* csv_file.h - comma-separated values with a header line, read row by row, columns found by name.
 *
 * Fields may stand in double quotes, a quote in them doubled; a row is one line. Sentences name file, line and column. */
#ifndef CONVOKE_PLACEMENT_PLANNER_CSV_FILE_H
#define CONVOKE_PLACEMENT_PLANNER_CSV_FILE_H

#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

enum { CSV_MAX_COLUMNS = 16 };

typedef struct csv_file csv_file;

/* columns [n_columns]: the wanted ones, at most CSV_MAX_COLUMNS; each must be in the header, others are passed over. */
status csv_open(const char *path, const char *const *columns, int n_columns, csv_file **out);
void csv_close(csv_file *file); /* NULL is fine */
/* Whether the header of the file at `path` names this column: what a file is, before it is opened for good. */
status csv_has_column(const char *path, const char *column, bool *out);

/* The next row; *more false at the end. Empty lines are passed over. A row with another number of fields than the header is
 * refused. */
status csv_next(csv_file *file, bool *more);
/* Fields of the row, by place in `columns`; text is valid until the next csv_next(). */
const char *csv_text(const csv_file *file, int column);
status csv_int(const csv_file *file, int column, int64_t min, int64_t max, int64_t *out);
long long csv_line(const csv_file *file); /* number of the row's line, from 1 */

#endif
