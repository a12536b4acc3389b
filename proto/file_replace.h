/* file_replace.h - files that are written beside their place and then put there whole. */
#ifndef CONVOKE_PROTO_FILE_REPLACE_H
#define CONVOKE_PROTO_FILE_REPLACE_H

#include "proto/status.h"

/* rename() for the finished file `beside`: 0, or -1 and errno. Only a regular file is replaced; for root rename() would put one
 * in the place of /dev/null as well. */
int file_replace(const char *beside, const char *path);
/* Whether file_replace() can do it as things stand, asked before hours of work: refuses a folder that is not there or closed to
 * us, and a path that is something else than a file. */
status file_replace_check(const char *path);

#endif
