#include "proto/console.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define REDRAW_US 100000

void console_open(console *c, int fd)
{
    const char *term = getenv("TERM");
    *c = (console){.fd = fd, .live = isatty(fd) && !(term && strcmp(term, "dumb") == 0), .last_us = -REDRAW_US};
}

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void put(const console *c, const char *text, size_t n)
{
    ssize_t written = write(c->fd, text, n);
    (void)written; /* only a picture */
}

void console_show(console *c, const char *format, ...)
{
    int64_t now = c->live ? now_us() : 0;
    if (!c->live || now - c->last_us < REDRAW_US)
        return;
    struct winsize size = {0};
    size_t columns = ioctl(c->fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1u : 79;
    char text[512] = "\r";
    va_list args;
    va_start(args, format);
    vsnprintf(text + 1, sizeof text - 8, format, args);
    va_end(args);
    size_t n = strlen(text);
    if (n > columns + 1) /* a wrapped line could not be erased again */
        n = columns + 1;
    memcpy(text + n, "\x1b[K", 3); /* erase what an earlier, longer line left */
    put(c, text, n + 3);
    c->last_us = now;
    c->drawn = true;
}

void console_erase(console *c)
{
    if (c->drawn)
        put(c, "\r\x1b[K", 4);
    c->drawn = false;
    c->last_us = -REDRAW_US;
}

static human scaled(double value, double base, const char *const *units, int n_units)
{
    human h;
    int u = 0;
    while (u + 1 < n_units && value >= base * 0.9995) {
        value /= base;
        u++;
    }
    int digits = u == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(h.text, sizeof h.text, "%.*f %s", digits, value, units[u]);
    return h;
}

human human_bytes(double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    return scaled(bytes, 1024, units, 6);
}

human human_bandwidth(double bytes_per_second)
{
    static const char *const units[] = {"B/s", "kB/s", "MB/s", "GB/s", "TB/s"};
    return scaled(bytes_per_second, 1000, units, 5);
}

human human_rate(double per_second, const char *unit)
{
    human h;
    int digits = per_second >= 99.95 ? 0 : per_second >= 9.995 ? 1 : 2;
    snprintf(h.text, sizeof h.text, "%.*f %.16s", digits, per_second, unit);
    return h;
}

human human_seconds(double seconds)
{
    human h;
    if (seconds < 0.0009995)
        snprintf(h.text, sizeof h.text, "%.0f us", seconds * 1e6);
    else if (seconds < 0.9995)
        snprintf(h.text, sizeof h.text, seconds < 0.00995 ? "%.1f ms" : "%.0f ms", seconds * 1e3);
    else if (seconds < 59.95)
        snprintf(h.text, sizeof h.text, "%.1f s", seconds);
    else
        snprintf(h.text, sizeof h.text, "%.0f min %.0f s", (double)((long long)(seconds + 0.5) / 60),
                 (double)((long long)(seconds + 0.5) % 60));
    return h;
}
