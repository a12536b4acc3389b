/* console.h - progress for a person at a terminal, and numbers in a form people read.
 *
 * On a terminal one line is redrawn in place at most ten times a second and erased at the end; in a pipe or file nothing is
 * written. One caller at a time. */
#ifndef CONVOKE_PROTO_CONSOLE_H
#define CONVOKE_PROTO_CONSOLE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int fd;
    bool live;  /* fd is a terminal */
    bool drawn; /* a line stands there now */
    int64_t last_us;
} console;

/* fd: STDERR_FILENO as a rule. TERM=dumb counts as a pipe. */
void console_open(console *c, int fd);
/* Draws the line, unless it was drawn less than 0.1 s ago. Cut to the terminal's width. */
void console_show(console *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Erases the line: at the end, and before anything else is written to the same terminal. */
void console_erase(console *c);

/* Text by value: printf("%s", human_bytes(n).text). */
typedef struct {
    char text[32];
} human;

human human_bytes(double bytes);                       /* "1.87 GiB" (powers of 1024), "512 B" */
human human_bandwidth(double bytes_per_second);        /* "19.8 GB/s" (powers of 1000)         */
human human_rate(double per_second, const char *unit); /* "1234 tok/s", "12.3 tok/s"           */
human human_seconds(double seconds);                   /* "41 ms", "2.5 s", "3 min 20 s"       */

#endif
