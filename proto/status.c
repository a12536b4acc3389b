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
