/* batch_sample.h - the steps that `batch` searches on: those of the replay, and others like them drawn from the same sequences.
 *
 * A plan fitted to the few steps of one replay fits their accidents too. So the replay is run again on sequences drawn with
 * replacement (which keeps what real steps have: sequences that start together are at the same position, a sequence stays for
 * many steps), and steps are drawn of random sequences at random positions. Shares and numbers were chosen by cross-validation
 * over categories of the gpt-oss trace (placement/README.md). */
#ifndef CONVOKE_PLACEMENT_PLANNER_BATCH_SAMPLE_H
#define CONVOKE_PLACEMENT_PLANNER_BATCH_SAMPLE_H

#include "placement/planner/problem.h"

/* Steps with token and owner per place, as the replay has them; at most max_steps, with about max_tokens tokens in all. The
 * problem has traffic and a schedule. replay_schedule_clear() frees it. */
status batch_sample(const problem *p, int64_t max_steps, int64_t max_tokens, replay_schedule *out);

#endif
