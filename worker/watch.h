/* watch.h - one small thread per rank that sees to it that a job which cannot go on ends.
 *
 *   every rank's thread ─► own pulse (group.h), five times a second
 *                       ◄─ pulses of the node's other ranks: who has fallen silent, who stands still while others wait?
 *
 * A silent rank (stopped, its machine starved) shows no beat; one that stands still beats, but its main thread neither moves on
 * nor waits for anybody. Either, for longer than the hang time while anybody works, ends the job (of a silent rank the node's
 * first other rank speaks, one that stands still speaks for itself; the others only when nobody did): waits inside the group end
 * by themselves with the sentence, and a process whose main thread does not come back within two seconds ends by its own hand.
 * While all are idle, and before watch_arm(), nobody is judged. Time that this process missed itself is not counted against
 * others. */
#ifndef CONVOKE_WORKER_WATCH_H
#define CONVOKE_WORKER_WATCH_H

#include "router/group.h"

typedef struct watch watch;

/* First thing in main(): from now on this process does not outlive who started it. For ranks started by a launcher: a shell may
 * go away. */
void watch_tie_to_parent(void);

status watch_start(group *g, watch **out);
void watch_stop(watch *w); /* NULL is fine */
/* Steps may run from now on. Also gives waits inside the group their deadline, a little longer. */
void watch_arm(watch *w, double hang_seconds);
/* Any thread. Messages of the leader since then. */
unsigned watch_step(const watch *w);
/* Any thread. What is done with a sentence before this process ends by its own hand: tell the coordinator. Set once. */
void watch_set_last_words(watch *w, void (*say)(void *arg, const char *sentence), void *arg);
/* Any thread. The job cannot go on: waits end with this sentence; without watch_stop() within two seconds the process does. */
void watch_end_job(watch *w, const char *sentence);
/* Any thread. Unless watch_stop() comes within `seconds`, this process ends with the sentence: for an end that must not hang.
 * From now on the watch looks at nobody, and the group may go. */
void watch_end_within(watch *w, double seconds, const char *sentence);
/* Any thread. ms_of_rank [size]: since each rank last did something, 0 while all are idle; of ranks on other nodes only that the
 * leader still waits is known. */
void watch_silence(watch *w, uint32_t *ms_of_rank);

#endif
