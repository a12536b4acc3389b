/* npz_file.c - numpy's .npz: a zip archive of .npy files. The only file that sees libzip.
 *
 * An entry is unpacked in pieces and grows as bytes really come: a lying size in the archive's directory costs nothing. */
#include "placement/planner/array_file.h"

#include "proto/bytes.h"
#include "proto/file_replace.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zip.h>

enum { PIECE = 1 << 18 };
#define MAX_ENTRY ((size_t)16 << 30)

struct npz_file {
    zip_t *zip;
};

status npz_open(const char *path, npz_file **out)
{
    int code = 0;
    zip_t *zip = zip_open(path, ZIP_RDONLY, &code);
    if (!zip) {
        zip_error_t error;
        zip_error_init_with_code(&error, code);
        status st =
            status_fail(STATUS_BAD_INPUT, "%s: not a zip archive that can be read (%s)", path, zip_error_strerror(&error));
        zip_error_fini(&error);
        return st;
    }
    npz_file *f = malloc(sizeof *f);
    if (!f) {
        zip_discard(zip);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
    }
    f->zip = zip;
    *out = f;
    return STATUS_OK;
}

void npz_close(npz_file *f)
{
    if (!f)
        return;
    zip_discard(f->zip);
    free(f);
}

/* The entry of that name, with .npy behind it or without; -1: none. */
static zip_int64_t find_entry(const npz_file *f, const char *name)
{
    char full[300];
    snprintf(full, sizeof full, "%.280s.npy", name);
    zip_int64_t index = zip_name_locate(f->zip, full, 0);
    return index >= 0 ? index : zip_name_locate(f->zip, name, 0);
}

bool npz_has(const npz_file *f, const char *name)
{
    return find_entry(f, name) >= 0;
}

static status unpack(zip_file_t *entry, const char *where, bytes_writer *to)
{
    for (;;) {
        void *room = bytes_extend(to, PIECE);
        if (!room || to->size > MAX_ENTRY)
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for %zu bytes", where, to->size);
        zip_int64_t n = zip_fread(entry, room, PIECE);
        if (n < 0)
            return status_fail(STATUS_BAD_INPUT, "%s: cannot be unpacked (%s)", where, zip_file_strerror(entry));
        to->size -= PIECE - (size_t)n;
        if (n == 0)
            return STATUS_OK;
    }
}

status npz_get(const npz_file *f, const char *path, const char *name, number_array *out)
{
    char where[1024];
    snprintf(where, sizeof where, "%.700s: %.200s", path, name);
    zip_int64_t index = find_entry(f, name);
    if (index < 0)
        return status_fail(STATUS_BAD_INPUT, "%.700s: the archive has no array %.200s", path, name);
    zip_file_t *entry = zip_fopen_index(f->zip, (zip_uint64_t)index, 0);
    if (!entry)
        return status_fail(STATUS_BAD_INPUT, "%s: cannot be unpacked (%s)", where, zip_strerror(f->zip));
    bytes_writer bytes = {0};
    status st = unpack(entry, where, &bytes);
    if (st == STATUS_OK)
        st = number_array_parse_npy(where, bytes.data, bytes.size, out);
    zip_fclose(entry);
    bytes_clear(&bytes);
    return st;
}

/* ---- writing ---- */

/* An .npy in memory, header padded so that the numbers begin at a multiple of 64 bytes, as numpy does it. */
static void put_npy(const npz_array *a, bytes_writer *to)
{
    char shape[160] = "", header[512];
    size_t used = 0, n = 1;
    for (int d = 0; d < a->n_dims; d++) {
        used += (size_t)snprintf(shape + used, sizeof shape - used, "%lld, ", (long long)a->shape[d]);
        n *= (size_t)a->shape[d];
    }
    size_t length = (size_t)snprintf(header, sizeof header, "{'descr': '<i8', 'fortran_order': False, 'shape': (%s), }", shape);
    size_t padded = (length + 1 + 10 + 63) / 64 * 64 - 10;
    memset(header + length, ' ', padded - length);
    header[padded - 1] = '\n';
    const unsigned char head[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)padded, (unsigned char)(padded >> 8)};
    bytes_put(to, head, sizeof head);
    bytes_put(to, header, padded);
    bytes_put(to, a->numbers, n * sizeof *a->numbers);
}

static status add_arrays(zip_t *zip, const char *path, const npz_array *arrays, int n_arrays)
{
    for (int i = 0; i < n_arrays; i++) {
        char name[300];
        bytes_writer bytes = {0};
        snprintf(name, sizeof name, "%.280s.npy", arrays[i].name);
        put_npy(&arrays[i], &bytes);
        if (bytes.failed) {
            bytes_clear(&bytes);
            return status_fail(STATUS_NO_MEMORY, "%s: no memory to write array %s", path, arrays[i].name);
        }
        zip_source_t *source = zip_source_buffer(zip, bytes.data, bytes.size, 1); /* frees the bytes, if it was made */
        if (!source)
            bytes_clear(&bytes);
        if (!source || zip_file_add(zip, name, source, ZIP_FL_ENC_UTF_8) < 0) {
            zip_source_free(source);
            return status_fail(STATUS_IO, "%s: cannot be written (%s)", path, zip_strerror(zip));
        }
    }
    return STATUS_OK;
}

status npz_write(const char *path, const npz_array *arrays, int n_arrays)
{
    char *beside;
    if (asprintf(&beside, "%s.part-%ld", path, (long)getpid()) < 0)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
    int code = 0;
    status st = STATUS_OK;
    zip_t *zip = zip_open(beside, ZIP_CREATE | ZIP_TRUNCATE, &code);
    if (!zip)
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    if (st == STATUS_OK && (st = add_arrays(zip, path, arrays, n_arrays)) != STATUS_OK)
        zip_discard(zip);
    else if (st == STATUS_OK && zip_close(zip) != 0) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, zip_strerror(zip));
        zip_discard(zip);
    }
    if (st == STATUS_OK && file_replace(beside, path) != 0)
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    if (st != STATUS_OK)
        unlink(beside);
    free(beside);
    return st;
}
