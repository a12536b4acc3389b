#include "proto/bytes.h"

#include <stdlib.h>
#include <string.h>

void bytes_reset(bytes_writer *w)
{
    w->size = 0;
    w->failed = false;
}

void bytes_clear(bytes_writer *w)
{
    free(w->data);
    *w = (bytes_writer){0};
}

static bool grow(bytes_writer *w, size_t need)
{
    size_t capacity = w->capacity ? w->capacity : 256;
    while (capacity < need)
        capacity *= 2;
    unsigned char *data = realloc(w->data, capacity);
    if (!data)
        return false;
    w->data = data;
    w->capacity = capacity;
    return true;
}

void *bytes_extend(bytes_writer *w, size_t n)
{
    if (w->failed || ((w->capacity - w->size < n || !w->data) && !grow(w, w->size + n))) {
        w->failed = true;
        return NULL;
    }
    void *at = w->data + w->size;
    w->size += n;
    return at;
}

void bytes_put(bytes_writer *w, const void *from, size_t n)
{
    void *to = bytes_extend(w, n);
    if (to && n)
        memcpy(to, from, n);
}

const void *bytes_take(bytes_reader *r, size_t n)
{
    if (r->short_read || (size_t)(r->end - r->at) < n) {
        r->short_read = true;
        return NULL;
    }
    const void *at = r->at;
    r->at += n;
    return at;
}

void bytes_get(bytes_reader *r, void *to, size_t n)
{
    const void *from = bytes_take(r, n);
    if (from)
        memcpy(to, from, n);
    else
        memset(to, 0, n);
}
