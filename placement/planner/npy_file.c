/* npy_file.c - numpy's .npy, read by hand:
 *
 *     | \x93NUMPY | major, minor | length of the header: u16 (version 1) or u32 | header | numbers |
 *
 * The header is a Python dictionary in text, "{'descr': '<i8', 'fortran_order': False, 'shape': (3, 4), }". Only what numpy
 * itself writes is taken: the three keys are looked for by name, and anything else that could change their meaning is refused. */
#include "placement/planner/number_array.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAGIC_BYTES = 6, MAX_HEADER = 1 << 16 };

/* What follows 'key': in the header, NULL when it is not there. */
static const char *find_key(const char *header, const char *key)
{
    char quoted[40];
    snprintf(quoted, sizeof quoted, "'%s'", key);
    const char *at = strstr(header, quoted);
    if (!at)
        return NULL;
    at += strlen(quoted);
    at += strspn(at, " ");
    return *at == ':' ? at + 1 + strspn(at + 1, " ") : NULL;
}

static status parse_descr(const char *where, const char *at, number_array *a)
{
    char text[24] = "";
    if (!at || *at != '\'' || sscanf(at, "'%20[^']'", text) != 1)
        return status_fail(STATUS_UNSUPPORTED, "%s: not an array of plain numbers (records?)", where);
    char order = text[0], kind = text[1];
    int bytes = isdigit((unsigned char)text[2]) ? atoi(text + 2) : 0;
    if (kind == 'O')
        return status_fail(STATUS_UNSUPPORTED, "%s: an array of Python objects (a pickle); save plain numbers", where);
    bool known = kind == 'f'   ? bytes == 2 || bytes == 4 || bytes == 8
                 : kind == 'b' ? bytes == 1
                               : (kind == 'i' || kind == 'u') && (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8);
    if (!known)
        return status_fail(STATUS_UNSUPPORTED, "%s: numbers of type %s are not known here", where, text);
    if (order != '<' && order != '|' && (order != '=' && bytes != 1))
        return status_fail(STATUS_UNSUPPORTED, "%s: numbers of type %s are big-endian; save them with astype('<%c%d')", where,
                           text, kind, bytes);
    a->kind = kind == 'b' ? 'u' : kind;
    a->item_bytes = bytes;
    return STATUS_OK;
}

static status parse_shape(const char *where, const char *at, number_array *a)
{
    if (!at || *at != '(')
        return status_fail(STATUS_BAD_INPUT, "%s: its header names no shape", where);
    a->n = 1;
    for (at += 1 + strspn(at + 1, " "); *at && *at != ')'; at += strspn(at, ", ")) {
        char *end;
        errno = 0;
        long long n = strtoll(at, &end, 10);
        if (end == at || errno || n < 0)
            return status_fail(STATUS_BAD_INPUT, "%s: its shape is not a list of numbers", where);
        if (a->n_dims == NUMBER_ARRAY_MAX_DIMS)
            return status_fail(STATUS_UNSUPPORTED, "%s: more than %d dimensions", where, NUMBER_ARRAY_MAX_DIMS);
        a->shape[a->n_dims++] = n;
        if (__builtin_mul_overflow(a->n, (int64_t)n, &a->n))
            return status_fail(STATUS_BAD_INPUT, "%s: its shape has more than 2^63 numbers", where);
        at = end;
    }
    return *at == ')' ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: its shape is cut short", where);
}

static status parse_header(const char *where, const char *header, number_array *a)
{
    const char *fortran = find_key(header, "fortran_order");
    TRY(parse_descr(where, find_key(header, "descr"), a));
    TRY(parse_shape(where, find_key(header, "shape"), a));
    if (!fortran || (strncmp(fortran, "False", 5) != 0 && a->n_dims > 1))
        return status_fail(STATUS_UNSUPPORTED, "%s: in Fortran order; save it with numpy.ascontiguousarray()", where);
    return STATUS_OK;
}

/* *at: where the numbers begin. */
static status find_header(const char *where, const unsigned char *bytes, size_t size, char *header, size_t *at)
{
    if (size < MAGIC_BYTES + 4 || memcmp(bytes, "\x93NUMPY", MAGIC_BYTES) != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: not an .npy array", where);
    int version = bytes[6];
    if (version < 1 || version > 3)
        return status_fail(STATUS_UNSUPPORTED, "%s: version %d of the .npy format is unknown", where, version);
    size_t n = bytes[8] | (size_t)bytes[9] << 8, head = 10;
    if (version > 1) {
        if (size < 12)
            return status_fail(STATUS_BAD_INPUT, "%s: cut short in the header", where);
        n |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
        head = 12;
    }
    if (n >= MAX_HEADER || n > size - head)
        return status_fail(STATUS_BAD_INPUT, "%s: a header of %zu bytes in an array of %zu (cut short?)", where, n, size);
    memcpy(header, bytes + head, n);
    header[n] = '\0';
    *at = head + n;
    return STATUS_OK;
}

status number_array_parse_npy(const char *where, const void *bytes, size_t size, number_array *out)
{
    char *header = malloc(MAX_HEADER);
    if (!header)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to read it", where);
    number_array a = {0};
    size_t at = 0, n_bytes;
    status st = find_header(where, bytes, size, header, &at);
    if (st == STATUS_OK)
        st = parse_header(where, header, &a);
    free(header);
    TRY(st);
    if (__builtin_mul_overflow((size_t)a.n, (size_t)a.item_bytes, &n_bytes) || n_bytes != size - at)
        return status_fail(STATUS_BAD_INPUT, "%s: %zu bytes of numbers, but its shape and type make %lld times %d (cut short?)",
                           where, size - at, (long long)a.n, a.item_bytes);
    a.data = malloc(n_bytes + 1);
    if (!a.data)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %zu bytes", where, n_bytes);
    memcpy(a.data, (const char *)bytes + at, n_bytes);
    *out = a;
    return STATUS_OK;
}

static status read_stream(const char *path, FILE *stream, size_t size, number_array *out)
{
    void *bytes = malloc(size + 1);
    if (!bytes)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %zu bytes", path, size);
    status st = fread(bytes, 1, size, stream) == size ? number_array_parse_npy(path, bytes, size, out)
                                                      : status_fail(STATUS_IO, "%s: cannot be read", path);
    free(bytes);
    return st;
}

status number_array_read_npy(const char *path, number_array *out)
{
    FILE *stream = fopen(path, "re");
    struct stat info;
    if (!stream)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    status st = fstat(fileno(stream), &info) == 0 && S_ISREG(info.st_mode)
                    ? read_stream(path, stream, (size_t)info.st_size, out)
                    : status_fail(STATUS_BAD_INPUT, "%s: not a plain file", path);
    fclose(stream);
    return st;
}
