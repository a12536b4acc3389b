/* frame.h - length-prefixed messages over a byte stream: 4 bytes of length (little-endian), then that many bytes.
 *
 * Pure: bytes in, frames out; sockets are the caller's. Refuses a length above the limit before any of it is kept. */
#ifndef CONVOKE_PROTO_FRAME_H
#define CONVOKE_PROTO_FRAME_H

#include "proto/bytes.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FRAME_HEADER_BYTES = 4 };

typedef struct {
    size_t max_bytes; /* of one frame's payload */
    bytes_writer held;
    size_t taken; /* bytes of `held` already handed out */
} frame_reader;

void frame_reader_init(frame_reader *r, size_t max_bytes);
void frame_reader_clear(frame_reader *r);
/* Where to read() more into: room for at least `want` bytes; then frame_reader_filled() with what came. */
void *frame_reader_room(frame_reader *r, size_t want);
void frame_reader_filled(frame_reader *r, size_t n);
/* The next whole frame, if there is one (*payload NULL: not yet); valid until frame_reader_room(). STATUS_BAD_INPUT: longer than
 * allowed; the stream is of no further use. */
status frame_reader_next(frame_reader *r, const void **payload, size_t *size);
/* Writes the header; the caller appends the payload. */
void frame_put_header(unsigned char header[FRAME_HEADER_BYTES], uint32_t size);

#endif
