/* command_probe.c - `convoke-plan probe`: measuring needs the model and MPI, which are convoke-probe's; it stands beside this
 * program and takes this one's place, so that mpirun sees one process per rank. */
#include "placement/planner/commands.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PROGRAM "convoke-probe"

status command_probe(int argc, char **argv)
{
    char path[PATH_MAX + sizeof PROGRAM];
    (void)argc;
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX);
    if (n < 0)
        return status_fail(STATUS_IO, "the folder of this program cannot be found (%s)", strerror(errno));
    path[n] = '\0';
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, PROGRAM);
    argv[0] = path;
    execv(path, argv);
    return status_fail(STATUS_IO, "%s cannot be started (%s)", path, strerror(errno));
}
