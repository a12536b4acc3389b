#include "cluster/stop_text.h"

#include <stdint.h>
#include <string.h>

static size_t longest(const stop_string *strings, int n)
{
    size_t most = 0;
    for (int i = 0; i < n; i++)
        if (strings[i].size > most)
            most = strings[i].size;
    return most;
}

/* Where the shortest held tail begins: the earliest byte from which the text is a proper beginning of some stop string. */
static size_t held_from(const char *text, size_t size, const stop_string *strings, int n)
{
    size_t most = longest(strings, n);
    for (size_t at = most > size ? 0 : size - most; at < size; at++)
        for (int i = 0; i < n; i++)
            if (size - at < strings[i].size && memcmp(text + at, strings[i].text, size - at) == 0)
                return at;
    return size;
}

stop_verdict stop_text_check(const char *text, size_t size, size_t searched, const stop_string *strings, int n_strings,
                             int include)
{
    stop_verdict v = {.shown = size, .stop = -1, .stop_at = SIZE_MAX};
    for (int i = 0; i < n_strings; i++) {
        /* It may begin before the new bytes, but must end in them. */
        size_t from = searched < strings[i].size ? 0 : searched - strings[i].size + 1;
        const char *at = size > from ? memmem(text + from, size - from, strings[i].text, strings[i].size) : NULL;
        if (at && (size_t)(at - text) < v.stop_at) {
            v.stop = i;
            v.stop_at = (size_t)(at - text);
        }
    }
    if (v.stop >= 0)
        v.shown = include ? v.stop_at + strings[v.stop].size : v.stop_at;
    else
        v.shown = held_from(text, size, strings, n_strings);
    return v;
}
