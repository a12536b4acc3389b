/* supervision.h - when workers count as lost, and how often they are started again. Pure: times and numbers in, a decision out.
 */
#ifndef CONVOKE_CLUSTER_SUPERVISION_H
#define CONVOKE_CLUSTER_SUPERVISION_H

#include <stdbool.h>

typedef enum {
    PHASE_CONNECTING, /* launched, no Hello yet */
    PHASE_LOADING,    /* Setup is out */
    PHASE_READY,
} launch_phase;

typedef struct {
    double start_seconds; /* from launch to Hello; 0: no limit (workers that others start) */
    double load_seconds;  /* loading without progress */
    double hang_seconds;  /* no Beat, or no step while there is work, or mpirun stopped */
} patience;

/* Clock readings in seconds. */
typedef struct {
    launch_phase phase;
    double launched;
    double heard;      /* last word of the leader of any kind; Setup counts as one */
    double progressed; /* loading: when it last moved */
    double stepped;    /* ready: last report, or since when there is work, whichever is later */
    bool has_work;     /* some sequence is neither finished nor held */
    double stopped;    /* since when mpirun is stopped; 0: it runs */
} supervision;

typedef enum {
    SUPERVISION_FINE,
    SUPERVISION_NO_HELLO,
    SUPERVISION_NO_PROGRESS,
    SUPERVISION_SILENT,
    SUPERVISION_NO_STEP,
    SUPERVISION_STOPPED,
} supervision_verdict;

/* *wait_seconds: until it has to be asked again if nothing happens (infinite: never). */
supervision_verdict supervision_judge(const supervision *s, const patience *limits, double now, double *wait_seconds);

/* ---- starting again ---- */

enum { FAILURE_HISTORY = 1024 };

typedef struct {
    int max_failures; /* within window_seconds: given up; 0: never; at most FAILURE_HISTORY */
    double window_seconds;
    double times[FAILURE_HISTORY]; /* ring */
    int n;                         /* ever */
    int n_in_a_row;                /* since workers were last ready */
} failure_history;

typedef struct {
    bool give_up;
    int n_in_window;
    double pause_seconds; /* before the next launch: none for the first failure in a row, then growing up to 5 s */
} failure_decision;

failure_decision failure_note(failure_history *h, double now);
void failure_note_ready(failure_history *h);

#endif
