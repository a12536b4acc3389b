/* fake_coordinator.h - requests.h and coordinator.h over a scripted model, to try doors with.
 *
 * A token is a byte. The model says its prompt again and again; sequence k begins k bytes later. Token i of an output has logprob
 * -(i % 8) / 4 and rank 1 + i % 3; its candidates are the next ids, half a unit apart. Id 0 is the end of text. A prompt that
 * begins with "fail" fails after three tokens, one with "slow" takes 0.7 s to be accepted; text is shown when a character is
 * whole. */
#ifndef CONVOKE_TESTS_FAKE_COORDINATOR_H
#define CONVOKE_TESTS_FAKE_COORDINATOR_H

#include "cluster/coordinator.h"

typedef struct {
    const char *model_dir;
    double token_ms; /* per step, in which every sequence gains `tokens_per_step`; 0: at once */
    int tokens_per_step;
    int max_requests; /* running at once; more are refused */
    int max_length;
    const char *admin_token; /* NULL: loopback may */
} fake_options;

coordinator *fake_create(const fake_options *options);
void fake_destroy(coordinator *c);
void fake_set_state(coordinator *c, serving_state state);
bool fake_shutdown_asked(coordinator *c);
/* What the last accepted wish said, as JSON. Static memory. */
const char *fake_last_wish(coordinator *c);

#endif
