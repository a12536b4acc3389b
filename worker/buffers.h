/* buffers.h - memory that is set aside once, at the start, on cache lines of its own, and counted. */
#ifndef CONVOKE_WORKER_BUFFERS_H
#define CONVOKE_WORKER_BUFFERS_H

#include <stddef.h>
#include <stdlib.h>

/* n items of `size` bytes, 64-byte aligned, not zeroed; adds the bytes to *total. NULL when there is no memory. free() it. */
static inline void *buffer_take(size_t n, size_t size, size_t *total)
{
    void *p = NULL;
    size_t bytes = (n * size + 63) & ~(size_t)63;
    if (posix_memalign(&p, 64, bytes ? bytes : 64) != 0)
        return NULL;
    *total += bytes;
    return p;
}

#endif
