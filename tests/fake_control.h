/* fake_control.h - a coordinator small enough to see through: starts convoke-worker under mpirun, speaks the control protocol
 * by hand, and looks at what is left when the job has ended. Anything unexpected fails the test. */
#ifndef CONVOKE_TESTS_FAKE_CONTROL_H
#define CONVOKE_TESTS_FAKE_CONTROL_H

#include "proto/control.h"
#include "proto/frame.h"

#include <stdbool.h>
#include <sys/types.h>

enum { FAKE_LAUNCH = 7, FAKE_MAX_RANKS = 16 };

typedef struct {
    int listener, fd, port;
    frame_reader reader;
    control_secret secret;
    char folder[4096], secret_path[4200], stderr_path[4200];
    pid_t job;     /* run_mpi.sh, which becomes timeout and mpirun */
    int exit_code; /* of the job, once waited for; 128 + signal */
    int n_ranks;
    pid_t pids[FAKE_MAX_RANKS];
    Convoke__Control__Setup setup; /* sent by fake_control_serve(); change it before */
} fake_control;

void fake_control_open(fake_control *f, const char *model_dir);
void fake_control_close(fake_control *f); /* ends what is left of the job, too; checks /dev/shm */

/* convoke-worker on n ranks (0: without mpirun), with extra arguments (NULL: none). */
void fake_control_launch(fake_control *f, int n_ranks, const char *extra);
/* Takes the connection and the Hello; the caller frees it. */
Convoke__Control__ToCoordinator *fake_control_greet(fake_control *f);
/* launch, greet, Setup, up to Ready, which the caller frees. */
Convoke__Control__ToCoordinator *fake_control_serve(fake_control *f, int n_ranks, const char *extra);

void fake_control_send(fake_control *f, const Convoke__Control__ToLeader *m);
void fake_control_send_setup(fake_control *f);
void fake_control_send_ids(fake_control *f, Convoke__Control__ToLeader__KindCase kind, uint64_t launch, uint64_t id);
void fake_control_send_stop(fake_control *f);
void fake_control_send_bytes(fake_control *f, const void *bytes, size_t n);
/* The next message within `seconds`; NULL: the connection has ended. Freed by the caller. */
Convoke__Control__ToCoordinator *fake_control_receive(fake_control *f, double seconds);
/* The next one that is not Beat or Progress. */
Convoke__Control__ToCoordinator *fake_control_hear(fake_control *f, double seconds);
void fake_control_free(Convoke__Control__ToCoordinator *m);

/* The job is over and all its ranks are gone within `seconds`; returns how long it took. */
double fake_control_await_end(fake_control *f, double seconds);
/* Whether a line of the job's stderr holds the text. */
bool fake_control_said(fake_control *f, const char *text);
/* Waits for it up to ten seconds: while workers run, what they log comes by another way than their messages. */
bool fake_control_will_say(fake_control *f, const char *text);
pid_t fake_control_mpirun(fake_control *f);

#endif
