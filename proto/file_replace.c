#include "proto/file_replace.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* 0, or an errno. */
static int why_not(const char *path)
{
    struct stat s;
    if (stat(path, &s) != 0 || S_ISREG(s.st_mode))
        return 0;
    return S_ISDIR(s.st_mode) ? EISDIR : ENOTSUP;
}

int file_replace(const char *beside, const char *path)
{
    int why = why_not(path);
    if (why == 0)
        return rename(beside, path);
    errno = why;
    return -1;
}

status file_replace_check(const char *path)
{
    int why = why_not(path);
    char *folder = strdup(path);
    if (!folder)
        return status_fail(STATUS_NO_MEMORY, "%.900s: no memory for its name", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = '\0'; /* "/x" lies in "/" */
    if (why == 0 && access(slash ? folder : ".", W_OK | X_OK) != 0)
        why = errno;
    free(folder);
    return why == 0 ? STATUS_OK : status_fail(STATUS_IO, "%.900s: cannot be written (%s)", path, strerror(why));
}
