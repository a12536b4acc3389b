/* bytes.h - a growing buffer of bytes to write records into, and a bounds-checked reader over one.
 *
 * For messages between ranks of one job (same build, same machine type): numbers are copied as they lie in memory. The writer
 * never shrinks, so a buffer that is reset and refilled every step stops allocating after its largest use. */
#ifndef CONVOKE_PROTO_BYTES_H
#define CONVOKE_PROTO_BYTES_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    unsigned char *data;
    size_t size, capacity;
    bool failed; /* a growth failed; everything since is lost. Check once, before sending */
} bytes_writer;

void bytes_reset(bytes_writer *w); /* empty, memory kept */
void bytes_clear(bytes_writer *w); /* frees; a zeroed writer is fine */
/* Room for n bytes at the end, to be filled by the caller; NULL when memory ran out. */
void *bytes_extend(bytes_writer *w, size_t n);
void bytes_put(bytes_writer *w, const void *from, size_t n);

typedef struct {
    const unsigned char *at, *end;
    bool short_read; /* something ran past the end; what was read is zeros */
} bytes_reader;

void bytes_get(bytes_reader *r, void *to, size_t n);
/* n bytes in place, or NULL (and short_read) when fewer are left. */
const void *bytes_take(bytes_reader *r, size_t n);

#endif
