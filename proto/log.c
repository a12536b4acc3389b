#include "proto/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char speaker_name[64] = "convoke";

void log_set_speaker(const char *speaker)
{
    snprintf(speaker_name, sizeof speaker_name, "%s", speaker);
}

void log_line(const char *format, ...)
{
    char text[1400];
    int n = snprintf(text, sizeof text, "%s: ", speaker_name);
    va_list args;
    va_start(args, format);
    int m = vsnprintf(text + n, sizeof text - (size_t)n - 1, format, args);
    va_end(args);
    size_t end = (size_t)n + (m > 0 ? (size_t)m : 0);
    if (end > sizeof text - 2)
        end = sizeof text - 2;
    text[end++] = '\n';
    ssize_t written = write(STDERR_FILENO, text, end);
    (void)written; /* nowhere left to complain */
}
