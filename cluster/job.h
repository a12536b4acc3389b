/* job.h - the workers as the coordinator sees them: launched, listened to, ended for certain, launched again.
 *
 *   starting ─► loading ─► ready ─► (a rank dies, hangs, a node is lost) ─► ended for certain ─► starting ...   K failures in M
 *                                                                                               minutes: given up
 *
 * One thread of its own owns the mpirun child, the listening socket and the control connection; every callback comes from it.
 * Each launch has a number; what an older one still says is refused. Lost means: the control connection ended, a rank on this
 * machine died, mpirun ended or stays stopped, no Hello in 30 s, no word or no step for hang_seconds, no progress for
 * load_seconds. Hosts of the hostfile that do not answer after a loss leave the job, which goes on with the ranks of the others.
 */
#ifndef CONVOKE_CLUSTER_JOB_H
#define CONVOKE_CLUSTER_JOB_H

#include "proto/control.pb-c.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    /* how to start: mpirun with n_ranks here or over a hostfile, or wait for workers that are started by others */
    int n_ranks;
    const char *hostfile;    /* NULL: this machine; form and order of ranks: hosts.h */
    bool wait_for_workers;   /* do not launch */
    const char *mpirun;      /* program; NULL: "mpirun" on PATH */
    const char *mpirun_args; /* extra arguments, split at spaces; NULL: none */
    const char *worker;      /* path of convoke-worker; NULL: beside this program, else on PATH */
    const char *listen;      /* HOST:PORT for the control connection; NULL: 127.0.0.1:0 */
    const char *secret_file; /* for workers started by others; NULL: one secret per launch, handed over by a file */
    /* what workers are told */
    const char *model_dir, *plan_path;          /* plan NULL: contiguous */
    const char *weights, *combine, *rows, *isa; /* isa NULL: chosen by the workers; then kept */
    int threads, max_sequences, max_length;
    uint64_t kv_bytes;
    double step_seconds; /* 0: by measurement */
    bool prefix_cache;
    bool count_pairs;              /* the routing statistics hold pairs of experts */
    const char *replicas, *owners; /* which copy computes a row, where sequences live; NULL: the workers' default */
    const char *topology_path;     /* what those are priced with; NULL: constants of a small CPU rank */
    /* patience */
    double hang_seconds; /* a step that takes longer, or a rank silent for longer */
    double load_seconds; /* no progress while loading for longer */
    int max_failures;    /* within failure_minutes: given up; 0: never */
    double failure_minutes;
    uint64_t first_launch; /* from the journal: launches are numbered on from here */
} job_options;

typedef enum { JOB_STARTING, JOB_LOADING, JOB_READY, JOB_RESTARTING, JOB_GIVEN_UP, JOB_STOPPED } job_state;

/* A plan that a launch starts with, as it is sent. */
typedef struct {
    const char *json; /* kept by whoever gave it until the next call of the listener */
    const char *name;
    uint64_t epoch;
} job_plan;

typedef struct {
    /* Each launch goes through STARTING, LOADING and READY, each loss through RESTARTING (also said again, with a further
     * sentence); STOPPED comes last. sentence: why, for a person; "" when nothing is to be said. The job itself logs only what
     * workers and mpirun print, and who was turned away. */
    void (*state)(void *arg, job_state state, uint64_t launch, const char *sentence);
    void (*progress)(void *arg, const Convoke__Control__Progress *progress); /* NULL is fine */
    /* Workers can take sequences: submit from within this call what is to be continued. state(JOB_READY) follows. */
    void (*ready)(void *arg, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello);
    void (*report)(void *arg, const Convoke__Control__Report *report);
    /* The ranks of a launch are known: which plan they are to start with. False (and NULL): the options', or contiguous. */
    bool (*plan)(void *arg, const Convoke__Control__Hello *hello, job_plan *out);
    void (*statistics)(void *arg, const Convoke__Control__Statistics *statistics); /* NULL is fine */
} job_listener;

typedef struct job job;

/* Options are copied; the listener is borrowed; *out is set before the first callback. Refuses what cannot work: programs or
 * files that are not there, a plan for another number of ranks, a first host that cannot reach the control connection. */
status job_start(const job_options *options, const job_listener *listener, void *arg, job **out);
/* Not from a callback. Tells workers to stop, waits for them up to a limit, ends them for certain; joins the thread. NULL is
 * fine. */
void job_stop(job *j);

/* Any thread. Sent to the launch that is ready now; when there is none they are dropped (false): `ready` is the time to send
 * everything again. Messages are packed before return; nothing is kept of them. */
bool job_submit(job *j, Convoke__Control__Sequence *const *sequences, int n);
bool job_cancel(job *j, const uint64_t *ids, int n);
bool job_hold(job *j, const uint64_t *ids, int n, bool hold);
bool job_clear_prefix_cache(job *j);
/* The routing counts since they were last asked for come by listener->statistics, with this id. */
bool job_ask_statistics(job *j, uint64_t id);
/* While serving; how it goes stands in reports. bytes_per_second of a rank's loading; 0: the workers choose. */
bool job_replan(job *j, const job_plan *plan, uint64_t bytes_per_second);

/* HOST:PORT where workers may join (for logs, and for workers started by others). */
const char *job_address(const job *j);

#endif
