#include "proto/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[1024];

status status_fail(status code, const char *format, ...)
{
    /* Built aside first: an argument may be the previous sentence itself ("%s", status_message()). */
    char text[sizeof message];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *c = text; *c; c++) /* names come out of files: a line break in one must not make two lines of a sentence */
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    snprintf(message, sizeof message, "%s", text);
    return code;
}

const char *status_message(void)
{
    return message;
}

int status_exit_code(status code)
{
    return code == STATUS_OK ? 0 : code == STATUS_USAGE ? 2 : 1;
}
