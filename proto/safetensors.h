/* safetensors.h - read and write safetensors files (8-byte length, JSON header, raw little-endian bytes).
 *
 * Format: https://huggingface.co/docs/safetensors. The reader maps the file read-only and checks the whole header before
 * anyone sees a tensor: header length sane, JSON an object, dtypes known, shapes non-negative and not overflowing, offsets
 * inside the file, in order, not overlapping, bytes equal to shape times dtype size, names unique. Sentences name file and
 * tensor. The tensor bytes themselves are not touched. */
#ifndef CONVOKE_PROTO_SAFETENSORS_H
#define CONVOKE_PROTO_SAFETENSORS_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

typedef enum {
    DTYPE_BOOL,
    DTYPE_U8,
    DTYPE_I8,
    DTYPE_F8_E4M3,
    DTYPE_F8_E5M2,
    DTYPE_I16,
    DTYPE_U16,
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_I32,
    DTYPE_U32,
    DTYPE_F32,
    DTYPE_I64,
    DTYPE_U64,
    DTYPE_F64,
} tensor_dtype;

#define TENSOR_MAX_DIMS 8

typedef struct {
    const char *name; /* borrowed from the file's header */
    tensor_dtype dtype;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    const void *data; /* inside the mapping; any alignment */
    size_t n_bytes;
} tensor_view;

const char *tensor_dtype_name(tensor_dtype dtype); /* "BF16" */
size_t tensor_dtype_size(tensor_dtype dtype);      /* bytes per element */

typedef struct safetensors safetensors; /* an open, mapped file */

status safetensors_open(const char *path, safetensors **out);
/* The same checks on bytes that are already in memory (borrowed, must outlive the object): for tests and fuzzing. */
status safetensors_open_memory(const char *name, const void *bytes, size_t size, safetensors **out);
void safetensors_close(safetensors *file); /* NULL is fine; unmaps */

int safetensors_count(const safetensors *file);
const tensor_view *safetensors_at(const safetensors *file, int index);          /* in file order */
const tensor_view *safetensors_find(const safetensors *file, const char *name); /* NULL when absent; by hash */
const char *safetensors_metadata(const safetensors *file, const char *key);     /* NULL when absent */
const char *safetensors_path(const safetensors *file);
/* Where the tensor bytes are mapped, for residency counts and madvise. */
const void *safetensors_mapping(const safetensors *file, size_t *size);

/* Writing: declare every tensor, then put bytes in any order, in pieces. The file appears under its name only when
 * safetensors_writer_finish() has succeeded (it is written beside it and renamed). */
typedef struct safetensors_writer safetensors_writer;

status safetensors_writer_create(const char *path, safetensors_writer **out);
void safetensors_writer_destroy(safetensors_writer *writer); /* NULL is fine; removes an unfinished file */
status safetensors_writer_metadata(safetensors_writer *writer, const char *key, const char *value);
status safetensors_writer_declare(safetensors_writer *writer, const char *name, tensor_dtype dtype, int n_dims,
                                  const int64_t *shape, int *index);
/* Writes the header; no more declarations after it. */
status safetensors_writer_begin(safetensors_writer *writer);
/* `offset` counts bytes from the tensor's own start. Bytes never put are zero. */
status safetensors_writer_put(safetensors_writer *writer, int index, size_t offset, const void *bytes, size_t n_bytes);
status safetensors_writer_finish(safetensors_writer *writer);

#endif
