#include "placement/planner/csv_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FIELDS = 256, MAX_LINE = 1 << 16 };

struct csv_file {
    FILE *stream;
    char *path, *line;
    size_t capacity;
    long long number;
    int n_header, n_columns;
    const char *names[CSV_MAX_COLUMNS]; /* borrowed: the caller's */
    int places[CSV_MAX_COLUMNS];        /* of the wanted columns among the fields */
    char *fields[MAX_FIELDS];
};

/* Names out of a table become names in our files, which are UTF-8. */
static bool is_utf8(const unsigned char *s)
{
    while (*s) {
        unsigned char c = *s++;
        int more = c < 0x80 ? 0 : c >= 0xc2 && c <= 0xdf ? 1 : (c & 0xf0) == 0xe0 ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : -1;
        if (more < 0 || (c == 0xe0 && *s < 0xa0) || (c == 0xed && *s > 0x9f) || (c == 0xf0 && *s < 0x90) ||
            (c == 0xf4 && *s > 0x8f))
            return false;
        for (; more > 0; more--)
            if ((*s++ & 0xc0) != 0x80) /* the end is no such byte either */
                return false;
    }
    return true;
}

/* One line without its end; *more false at the end of the file. */
static status read_line(csv_file *f, bool *more)
{
    errno = 0;
    ssize_t n = getline(&f->line, &f->capacity, f->stream);
    *more = n >= 0;
    if (n < 0 && ferror(f->stream))
        return status_fail(STATUS_IO, "%s: cannot be read (%s)", f->path, strerror(errno));
    if (n < 0)
        return STATUS_OK;
    f->number++;
    if (n > MAX_LINE || strlen(f->line) != (size_t)n || !is_utf8((const unsigned char *)f->line))
        return status_fail(STATUS_BAD_INPUT, "%s: line %lld is no UTF-8 text of up to %d bytes", f->path, f->number, MAX_LINE);
    f->line[strcspn(f->line, "\r\n")] = '\0';
    return STATUS_OK;
}

/* Takes one field off `at`, its quotes undone in place; returns what follows its comma, NULL at the end of the line. */
static char *take_field(char *at, char **field)
{
    *field = at;
    if (*at != '"') {
        char *comma = strchr(at, ',');
        if (comma)
            *comma++ = '\0';
        return comma;
    }
    char *to = at++;
    while (*at && (*at != '"' || at[1] == '"')) {
        at += *at == '"';
        *to++ = *at++;
    }
    char *comma = strchr(at, ',');
    *to = '\0';
    return comma ? comma + 1 : NULL;
}

static status split(csv_file *f, int *n_fields)
{
    char *at = f->line;
    for (*n_fields = 0; at; (*n_fields)++) {
        if (*n_fields == MAX_FIELDS)
            return status_fail(STATUS_UNSUPPORTED, "%s: line %lld has more than %d fields", f->path, f->number, MAX_FIELDS);
        at = take_field(at, &f->fields[*n_fields]);
    }
    return STATUS_OK;
}

static status read_header(csv_file *f)
{
    bool more;
    TRY(read_line(f, &more));
    if (!more)
        return status_fail(STATUS_BAD_INPUT, "%s: the file is empty", f->path);
    if (strncmp(f->line, "\xef\xbb\xbf", 3) == 0) /* what spreadsheets put in front of UTF-8 */
        memmove(f->line, f->line + 3, strlen(f->line + 3) + 1);
    TRY(split(f, &f->n_header));
    for (int c = 0; c < f->n_columns; c++) {
        f->places[c] = -1;
        for (int i = 0; i < f->n_header && f->places[c] < 0; i++)
            if (strcmp(f->fields[i], f->names[c]) == 0)
                f->places[c] = i;
        if (f->places[c] < 0)
            return status_fail(STATUS_BAD_INPUT, "%s: its first line names no column %s", f->path, f->names[c]);
    }
    return STATUS_OK;
}

static status open_stream(const char *path, csv_file **out)
{
    csv_file *f = calloc(1, sizeof *f);
    if (f)
        f->path = strdup(path);
    if (!f || !f->path) {
        free(f);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
    }
    f->stream = fopen(path, "re");
    if (!f->stream) {
        status st = status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
        csv_close(f);
        return st;
    }
    *out = f;
    return STATUS_OK;
}

status csv_open(const char *path, const char *const *columns, int n_columns, csv_file **out)
{
    csv_file *f;
    TRY(open_stream(path, &f));
    f->n_columns = n_columns < CSV_MAX_COLUMNS ? n_columns : CSV_MAX_COLUMNS;
    for (int c = 0; c < f->n_columns; c++)
        f->names[c] = columns[c];
    status st = read_header(f);
    if (st == STATUS_OK)
        *out = f;
    else
        csv_close(f);
    return st;
}

status csv_has_column(const char *path, const char *column, bool *out)
{
    csv_file *f;
    TRY(open_stream(path, &f));
    status st = read_header(f);
    *out = false;
    for (int i = 0; st == STATUS_OK && i < f->n_header; i++)
        *out |= strcmp(f->fields[i], column) == 0;
    csv_close(f);
    return st;
}

void csv_close(csv_file *f)
{
    if (!f)
        return;
    if (f->stream)
        fclose(f->stream);
    free(f->line);
    free(f->path);
    free(f);
}

status csv_next(csv_file *f, bool *more)
{
    do
        TRY(read_line(f, more));
    while (*more && f->line[0] == '\0');
    if (!*more)
        return STATUS_OK;
    int n;
    TRY(split(f, &n));
    if (n != f->n_header)
        return status_fail(STATUS_BAD_INPUT, "%s: line %lld has %d fields, the first line %d (cut short?)", f->path, f->number, n,
                           f->n_header);
    return STATUS_OK;
}

const char *csv_text(const csv_file *f, int column)
{
    return f->fields[f->places[column]];
}

status csv_int(const csv_file *f, int column, int64_t min, int64_t max, int64_t *out)
{
    const char *text = csv_text(f, column);
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno || value < min || value > max)
        return status_fail(STATUS_BAD_INPUT, "%s: line %lld: %s is \"%.40s\", not a whole number from %lld to %lld", f->path,
                           f->number, f->names[column], text, (long long)min, (long long)max);
    *out = value;
    return STATUS_OK;
}

long long csv_line(const csv_file *f)
{
    return f->number;
}
