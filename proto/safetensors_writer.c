/* safetensors_writer.c - the writer.
 *
 * Tensors are laid out widest element first, in order of declaration among equals, behind a header padded to 8 bytes: so
 * every tensor lies at a multiple of its element size, as the format's own writers do it, and readers may use it in place. */
#include "proto/file_replace.h"
#include "proto/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    char *name;
    tensor_dtype dtype;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    size_t n_bytes, offset; /* offset from the end of the header */
} declared;

typedef struct {
    char *key, *value;
} note;

struct safetensors_writer {
    char *path, *temporary; /* temporary: NULL once it has become `path` */
    int fd;
    declared *tensors;
    int count, room;
    note *notes;
    int n_notes;
    size_t data_start; /* 0 until the header is written */
};

static status no_memory(const safetensors_writer *writer)
{
    return status_fail(STATUS_NO_MEMORY, "%.300s: no memory to write it", writer->path);
}

static status system_failed(const safetensors_writer *writer)
{
    return status_fail(STATUS_IO, "%.300s: cannot be written (%s)", writer->path, strerror(errno));
}

static status open_temporary(safetensors_writer *writer)
{
    writer->fd = mkostemp(writer->temporary, O_CLOEXEC);
    if (writer->fd < 0) {
        status st = system_failed(writer);
        free(writer->temporary); /* it names no file of ours */
        writer->temporary = NULL;
        return st;
    }
    /* mkstemp makes private files; this one is to be as readable as any other the user writes */
    mode_t mask = umask(0);
    umask(mask);
    return fchmod(writer->fd, 0666 & ~mask) < 0 ? system_failed(writer) : STATUS_OK;
}

status safetensors_writer_create(const char *path, safetensors_writer **out)
{
    safetensors_writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return status_fail(STATUS_NO_MEMORY, "%.300s: no memory to write it", path);
    writer->fd = -1;
    writer->path = strdup(path);
    status st = STATUS_OK;
    if (!writer->path || asprintf(&writer->temporary, "%s.XXXXXX", path) < 0) {
        writer->temporary = NULL;
        st = status_fail(STATUS_NO_MEMORY, "%.300s: no memory to write it", path);
    } else {
        st = open_temporary(writer);
    }
    if (st != STATUS_OK) {
        safetensors_writer_destroy(writer);
        return st;
    }
    *out = writer;
    return STATUS_OK;
}

void safetensors_writer_destroy(safetensors_writer *writer)
{
    if (!writer)
        return;
    if (writer->fd >= 0)
        close(writer->fd);
    if (writer->temporary)
        unlink(writer->temporary);
    for (int i = 0; i < writer->count; i++)
        free(writer->tensors[i].name);
    for (int i = 0; i < writer->n_notes; i++) {
        free(writer->notes[i].key);
        free(writer->notes[i].value);
    }
    free(writer->tensors);
    free(writer->notes);
    free(writer->temporary);
    free(writer->path);
    free(writer);
}

status safetensors_writer_metadata(safetensors_writer *writer, const char *key, const char *value)
{
    if (writer->data_start)
        return status_fail(STATUS_BAD_INPUT, "%.300s: metadata %.100s came after the header was written", writer->path, key);
    for (int i = 0; i < writer->n_notes; i++)
        if (!strcmp(writer->notes[i].key, key))
            return status_fail(STATUS_BAD_INPUT, "%.300s: metadata %.100s is given twice", writer->path, key);
    note *grown = realloc(writer->notes, ((size_t)writer->n_notes + 1) * sizeof *grown);
    if (!grown)
        return no_memory(writer);
    writer->notes = grown;
    note *added = &grown[writer->n_notes++];
    *added = (note){strdup(key), strdup(value)};
    return added->key && added->value ? STATUS_OK : no_memory(writer);
}

static status grow(safetensors_writer *writer)
{
    if (writer->count < writer->room)
        return STATUS_OK;
    int room = writer->room ? 2 * writer->room : 16;
    declared *grown = realloc(writer->tensors, (size_t)room * sizeof *grown);
    if (!grown)
        return no_memory(writer);
    writer->tensors = grown;
    writer->room = room;
    return STATUS_OK;
}

status safetensors_writer_declare(safetensors_writer *writer, const char *name, tensor_dtype dtype, int n_dims,
                                  const int64_t *shape, int *index)
{
    if (writer->data_start)
        return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s came after the header was written", writer->path, name);
    if (n_dims < 0 || n_dims > TENSOR_MAX_DIMS)
        return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s has %d dimensions", writer->path, name, n_dims);
    declared tensor = {.dtype = dtype, .n_dims = n_dims, .n_bytes = tensor_dtype_size(dtype)};
    for (int i = 0; i < n_dims; i++) {
        tensor.shape[i] = shape[i];
        if (shape[i] < 0 || __builtin_mul_overflow(tensor.n_bytes, (size_t)shape[i], &tensor.n_bytes) ||
            tensor.n_bytes > (size_t)1 << 52)
            return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s has an impossible shape", writer->path, name);
    }
    TRY(grow(writer));
    tensor.name = strdup(name);
    if (!tensor.name)
        return no_memory(writer);
    writer->tensors[writer->count] = tensor;
    *index = writer->count++;
    return STATUS_OK;
}

static int by_name(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static status refuse_twins(const safetensors_writer *writer)
{
    char **names = malloc(((size_t)writer->count + 1) * sizeof *names);
    if (!names)
        return no_memory(writer);
    for (int i = 0; i < writer->count; i++)
        names[i] = writer->tensors[i].name;
    qsort(names, (size_t)writer->count, sizeof *names, by_name);
    status st = STATUS_OK;
    for (int i = 1; i < writer->count && st == STATUS_OK; i++)
        if (!strcmp(names[i - 1], names[i]))
            st = status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s is declared twice", writer->path, names[i]);
    free(names);
    return st;
}

static void print_string(FILE *to, const char *text)
{
    putc('"', to);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c < 0x20)
            fprintf(to, "\\u%04x", *c);
        else if (*c == '"' || *c == '\\')
            fprintf(to, "\\%c", *c);
        else
            putc(*c, to);
    }
    putc('"', to);
}

static void print_tensor(FILE *to, const declared *tensor)
{
    print_string(to, tensor->name);
    fprintf(to, ":{\"dtype\":\"%s\",\"shape\":[", tensor_dtype_name(tensor->dtype));
    for (int i = 0; i < tensor->n_dims; i++)
        fprintf(to, "%s%lld", i ? "," : "", (long long)tensor->shape[i]);
    fprintf(to, "],\"data_offsets\":[%zu,%zu]}", tensor->offset, tensor->offset + tensor->n_bytes);
}

/* Gives every tensor its offset; returns the bytes of all. */
static size_t print_header(safetensors_writer *writer, FILE *to)
{
    size_t offset = 0;
    const char *comma = "";
    putc('{', to);
    if (writer->n_notes) {
        fputs("\"__metadata__\":{", to);
        for (int i = 0; i < writer->n_notes; i++) {
            fputs(i ? "," : "", to);
            print_string(to, writer->notes[i].key);
            putc(':', to);
            print_string(to, writer->notes[i].value);
        }
        putc('}', to);
        comma = ",";
    }
    for (size_t width = 8; width; width /= 2)
        for (int i = 0; i < writer->count; i++) {
            if (tensor_dtype_size(writer->tensors[i].dtype) != width)
                continue;
            writer->tensors[i].offset = offset;
            offset += writer->tensors[i].n_bytes;
            fputs(comma, to);
            print_tensor(to, &writer->tensors[i]);
            comma = ",";
        }
    putc('}', to);
    return offset;
}

static status write_at(safetensors_writer *writer, const void *bytes, size_t n, size_t at)
{
    for (const char *from = bytes; n;) {
        ssize_t wrote = pwrite(writer->fd, from, n, (off_t)at);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0) {
            if (wrote == 0)
                errno = ENOSPC;
            return system_failed(writer);
        }
        from += wrote;
        at += (size_t)wrote;
        n -= (size_t)wrote;
    }
    return STATUS_OK;
}

status safetensors_writer_begin(safetensors_writer *writer)
{
    TRY(refuse_twins(writer));
    char *text = NULL;
    size_t length = 0;
    FILE *to = open_memstream(&text, &length);
    if (!to)
        return no_memory(writer);
    fwrite("\0\0\0\0\0\0\0\0", 1, 8, to); /* the length, filled in below */
    size_t total = print_header(writer, to);
    fflush(to);
    for (size_t pad = (8 - length % 8) % 8; pad; pad--)
        putc(' ', to);
    bool broken = ferror(to);
    if (fclose(to) != 0 || broken) {
        free(text);
        return no_memory(writer);
    }
    for (int i = 0; i < 8; i++)
        text[i] = (char)((uint64_t)(length - 8) >> 8 * i);
    status st = write_at(writer, text, length, 0);
    free(text);
    TRY(st);
    if (ftruncate(writer->fd, (off_t)(length + total)) < 0)
        return system_failed(writer);
    writer->data_start = length;
    return STATUS_OK;
}

status safetensors_writer_put(safetensors_writer *writer, int index, size_t offset, const void *bytes, size_t n_bytes)
{
    if (!writer->data_start || index < 0 || index >= writer->count)
        return status_fail(STATUS_BAD_INPUT, "%.300s: bytes for a tensor that the header does not list", writer->path);
    const declared *tensor = &writer->tensors[index];
    if (offset > tensor->n_bytes || n_bytes > tensor->n_bytes - offset)
        return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s: bytes %zu to %zu of %zu", writer->path, tensor->name, offset,
                           offset + n_bytes, tensor->n_bytes);
    return write_at(writer, bytes, n_bytes, writer->data_start + tensor->offset + offset);
}

status safetensors_writer_finish(safetensors_writer *writer)
{
    if (!writer->data_start)
        TRY(safetensors_writer_begin(writer));
    if (fdatasync(writer->fd) < 0 || file_replace(writer->temporary, writer->path) < 0)
        return system_failed(writer);
    free(writer->temporary);
    writer->temporary = NULL;
    return STATUS_OK;
}
