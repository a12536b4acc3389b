#include "proto/frame.h"

#include <string.h>

void frame_reader_init(frame_reader *r, size_t max_bytes)
{
    *r = (frame_reader){.max_bytes = max_bytes};
}

void frame_reader_clear(frame_reader *r)
{
    bytes_clear(&r->held);
    r->taken = 0;
}

/* What was handed out leaves first, so the buffer stays as small as one frame and one read. */
void *frame_reader_room(frame_reader *r, size_t want)
{
    if (r->taken > 0) {
        memmove(r->held.data, r->held.data + r->taken, r->held.size - r->taken);
        r->held.size -= r->taken;
        r->taken = 0;
    }
    size_t size = r->held.size;
    void *room = bytes_extend(&r->held, want);
    if (room)
        r->held.size = size; /* counted when it is filled */
    return room;
}

void frame_reader_filled(frame_reader *r, size_t n)
{
    r->held.size += n;
}

static uint32_t read_length(const unsigned char *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

status frame_reader_next(frame_reader *r, const void **payload, size_t *size)
{
    *payload = NULL;
    size_t left = r->held.size - r->taken;
    if (left < FRAME_HEADER_BYTES)
        return STATUS_OK;
    const unsigned char *at = r->held.data + r->taken;
    size_t length = read_length(at);
    if (length > r->max_bytes)
        return status_fail(STATUS_BAD_INPUT, "a frame of %zu bytes, more than the %zu allowed", length, r->max_bytes);
    if (left - FRAME_HEADER_BYTES < length)
        return STATUS_OK;
    *payload = at + FRAME_HEADER_BYTES;
    *size = length;
    r->taken += FRAME_HEADER_BYTES + length;
    return STATUS_OK;
}

void frame_put_header(unsigned char header[FRAME_HEADER_BYTES], uint32_t size)
{
    for (int i = 0; i < FRAME_HEADER_BYTES; i++)
        header[i] = (unsigned char)(size >> (8 * i));
}
