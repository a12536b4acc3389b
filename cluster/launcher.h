/* launcher.h - one launch of the workers: mpirun started, watched, ended for certain, and what it leaves cleared away.
 *
 * mpirun runs in a session of its own and dies with the coordinator. Nothing secret is on a command line or in an environment:
 * the secret goes by a file that only this user can read, or, to a first host that is not this one, through mpirun's stdin, which
 * it hands to rank 0. One thread. */
#ifndef CONVOKE_CLUSTER_LAUNCHER_H
#define CONVOKE_CLUSTER_LAUNCHER_H

#include "cluster/hosts.h"
#include "proto/control.h"

typedef struct launcher launcher;

typedef struct {
    const char *mpirun, *worker; /* paths that can be executed */
    const char *mpirun_args;     /* split at blanks; NULL: none */
    const char *address;         /* HOST:PORT for the workers */
    const control_secret *secret;
    const char *secret_file; /* one that exists already on all hosts; NULL: made here */
    const hosts *hosts;      /* with their ranks; NULL: this machine */
    int n_ranks;
    uint64_t launch;
} launch_request;

/* Finds a program as a shell does; a name with a slash is checked only. Static buffer, NULL: there is none. */
const char *launcher_find_program(const char *name);
/* "convoke-worker", "convoke-plan": beside this program, or on PATH. Static buffer, NULL: there is none. */
const char *launcher_find_beside(const char *name);

status launcher_start(const launch_request *request, launcher **out);
/* Readable when launcher_step() has something to do. */
int launcher_fd(const launcher *l);

typedef enum { LAUNCH_RUNS, LAUNCH_WORKER_DIED, LAUNCH_ENDED } launch_event;
/* Forwards what was printed. LAUNCH_WORKER_DIED: *number is the rank; LAUNCH_ENDED: mpirun's exit code,
 * negative: the signal that ended it. */
launch_event launcher_step(launcher *l, int *number);
/* A look at what nobody tells: mpirun stopped by SIGSTOP; announcements of mpirun that were no reason for anything. */
bool launcher_is_stopped(launcher *l);

/* The leader has said Hello: the secret's file goes, and the ranks on this machine are watched one by one. */
void launcher_watch(launcher *l, const Convoke__Control__Hello *hello);

/* What mpirun or the last worker to speak said of the end, NULL: nothing. Static buffer. */
const char *launcher_last_words(launcher *l);

/* The host whose daemon mpirun says it has lost ("": it did not say which): then that is why it ended ranks that were well. NULL:
 * none. */
const char *launcher_lost_host(const launcher *l);

/* SIGTERM, shortly after SIGKILL for everything of the launch on this machine; returns when it is gone, frees. A process that
 * does not go is named in the sentence of the status. NULL is fine. */
status launcher_end(launcher *l);

/* Which hosts still start a process, all asked at once: reached[i] for each. Answers that take longer than `seconds` are a no,
 * and so is everything when *cancelled becomes readable (cancel_fd -1: never). */
typedef struct {
    const char *mpirun, *mpirun_args;
    const hosts *hosts;
    double seconds;
    int cancel_fd;
} probe_request;
status launcher_probe(const probe_request *request, bool *reached);

#endif
