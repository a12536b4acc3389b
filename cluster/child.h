/* child.h - a program of ours that starts others, ended with everything it started.
 *
 * It gets a session of its own: what it starts stays in that session, whatever process groups are made (mpirun makes one per
 * rank), and the session's number is not given to anybody else while one of them lives. It dies with the thread that spawned it.
 */
#ifndef CONVOKE_CLUSTER_CHILD_H
#define CONVOKE_CLUSTER_CHILD_H

#include "proto/status.h"

#include <stdbool.h>
#include <sys/types.h>

typedef struct {
    pid_t pid;  /* 0: none */
    int fd;     /* pidfd: readable when it has ended */
    int output; /* its stdout and stderr, not blocking; -1: closed */
} child;

/* argv[0] is a path. env as execve() takes it. stdin_fd -1: /dev/null. Fails when the program cannot be executed. */
status child_spawn(char *const *argv, char *const *env, int stdin_fd, child *out);

/* Whether it has ended; *exit_code is negative where a signal ended it. It stays a zombie until child_end(), so that its number
 * stays taken. */
bool child_has_ended(const child *c, int *exit_code);
bool child_is_stopped(const child *c); /* SIGSTOP */

typedef void child_output(void *arg, const char *bytes, size_t n);
/* Reads what there is; false: the other side is closed. */
bool child_read(child *c, child_output *output, void *arg);

/* SIGTERM; SIGKILL for the whole session after term_seconds; returns when nothing of it lives, its output until then passed on.
 * False: something still lived after limit_seconds (a process the kernel does not let go). */
bool child_end(child *c, double term_seconds, double limit_seconds, child_output *output, void *arg);

bool child_has_argument(pid_t pid, const char *argument);
/* SIGKILL to a process that is not of the session, if its command line holds `argument` as one of its arguments. */
void child_kill_other(pid_t pid, const char *argument);

#endif
