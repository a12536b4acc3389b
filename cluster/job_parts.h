/* job_parts.h - what job.c (the life of the job) and job_setup.c (what it is told, and tells) share. */
#ifndef CONVOKE_CLUSTER_JOB_PARTS_H
#define CONVOKE_CLUSTER_JOB_PARTS_H

#include "cluster/control_server.h"
#include "cluster/hosts.h"
#include "cluster/job.h"
#include "cluster/launcher.h"
#include "cluster/sequence_set.h"
#include "cluster/supervision.h"

#include <pthread.h>

/* What is known of a loss, from the least telling to the most: of all that is seen at about the same time, the last of these is
 * the reason and the others its consequences. */
typedef enum {
    CLUE_SILENCE, /* the connection ended, or somebody fell silent */
    CLUE_MPIRUN_ENDED,
    CLUE_RANK_DIED, /* or was told to stop: the one may be the other's consequence, so what is seen first counts */
    CLUE_MPIRUN_KILLED,
    CLUE_REFUSED, /* what the leader said made us end it */
    CLUE_GOODBYE, /* the workers say it themselves */
} loss_clue;

/* Everything one launch knows; born zeroed with each. */
typedef struct {
    uint64_t number;
    launcher *launcher; /* NULL: others started the workers, or nobody did */
    supervision watch;
    Convoke__Control__Hello *hello; /* a copy without the secret; NULL before */
    uint32_t *silent_ms;            /* [hello->n_ranks] of the last Beat */
    double beat;                    /* when it came; 0: none yet */
    char stage[64];                 /* of the last Progress */
    uint64_t done;                  /* bytes of all ranks */
    bool stopping;                  /* told to stop: an end is no loss */
    bool ended;                     /* mpirun is over */
    bool lost;
    double lost_at;
    loss_clue clue;
    char why[1024];
} launch_life;

struct job {
    job_options options; /* strings are copies */
    char mpirun[4096], worker[4096];
    const job_listener *listener;
    void *arg;
    pthread_t thread;
    int stop_fd; /* eventfd, written once and never read: readable from then on */
    control_server *server;
    hosts hosts; /* n 0: this machine */
    int n_ranks; /* now; options.n_ranks are wanted */
    char *plan_json;
    char plan_name[64];
    uint64_t plan_epoch;
    int plan_ranks;
    char *topology_json;
    int topology_ranks;
    char isa[32]; /* kept from the first Ready on */
    control_secret secret;
    uint64_t n_launches; /* numbers given so far */
    failure_history failures;
    bool was_ready;
    char last_goodbye[1024]; /* of a launch that never was ready */
    double longest_start;    /* seconds from launch to Hello */
    char refused_why[200];   /* whoever was turned away last, and when that was logged */
    double refused_at;
    int n_refused; /* for the same reason since then */
    launch_life life;

    pthread_mutex_t lock; /* over what follows */
    bool accepting;
    uint64_t accepting_launch;
    sequence_set sequences;
    double work_since; /* when the last sequences came while there was no work */
    bytes_writer out;
};

/* Checks the options and makes them the job's own; opens the control socket. The job is destroyed by the caller on failure. */
status job_setup(job *j, const job_options *options, const control_listener *listener);
void job_setup_clear(job *j);
/* Sends Setup to the leader that has just joined; *contiguous: a plan was given but is not for this number of ranks. */
status job_send_setup(job *j, bool *contiguous);
bool job_first_rank_is_here(const job *j);

#endif
