/* launch_dir.h - what a launch leaves on this machine's disks, in folders of its own that go with it.
 *
 *   $TMPDIR/convoke-UID-PID-LAUNCH-XXXXXX/   secret, hosts, and mpirun's own scratch files (tmp/)
 *   /dev/shm/convoke-UID-PID-LAUNCH-XXXXXX/  Open MPI's shared segments; `job` names the workers' own windows beside it
 *
 * Both are locked while their coordinator lives. Whoever finds one without its lock held clears it away: so what a coordinator
 * that was killed left goes when the next one starts. */
#ifndef CONVOKE_CLUSTER_LAUNCH_DIR_H
#define CONVOKE_CLUSTER_LAUNCH_DIR_H

#include "proto/control.h"

#include <stdint.h>

typedef struct {
    char scratch[4096]; /* "": none */
    char shm[4096];     /* "": /dev/shm cannot be used */
    int scratch_lock, shm_lock;
    uint64_t job; /* part of the names of the workers' windows (router/node_window.h): /dev/shm/convoke-JOB-... */
} launch_dir;

status launch_dir_create(uint64_t launch, launch_dir *out);
/* Only the folder under $TMPDIR, without its tmp/: for other children than mpirun. */
status launch_dir_create_scratch(uint64_t number, launch_dir *out);
void launch_dir_remove(launch_dir *d); /* a zeroed one is fine */

/* Path of a file in it: static buffer. */
const char *launch_dir_file(const launch_dir *d, const char *name);
/* Only this user can read it. */
status launch_dir_write_secret(const launch_dir *d, const control_secret *secret);
void launch_dir_remove_secret(const launch_dir *d);

/* Clears away what coordinators that are gone have left. */
void launch_dir_sweep(void);

#endif
