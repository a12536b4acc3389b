/* All bounds, one after another within the time given; the parts are in files of their own. */
#include "placement/planner/bounds.h"
#include "proto/clock.h"

#include <math.h>
#include <stdlib.h>

status bounds_compute(const problem *p, unsigned which, double seconds, plan_bounds *out)
{
    plan_bounds b = {.balance = NAN,
                     .ranks_per_token = NAN,
                     .flow_spectral = NAN,
                     .flow_matching = NAN,
                     .step_us = NAN,
                     .step_compute_us = NAN,
                     .step_transfer_us = NAN};
    double start = clock_seconds();
    status st = STATUS_OK;
#define LEFT (seconds > 0 ? fmax(0.01, seconds - (clock_seconds() - start)) : 0)
    if (which & BOUND_LOAD)
        TRY_GOTO(bounds_load(p, &b), out);
    if ((which & BOUND_RANKS) && p->traffic)
        TRY_GOTO(bounds_ranks(p, LEFT, &b), out);
    if ((which & BOUND_STEP) && p->schedule)
        TRY_GOTO(bounds_step(p, LEFT, &b), out);
    if ((which & BOUND_SPECTRAL) && p->next_pairs)
        TRY_GOTO(bounds_spectral(p, LEFT, &b), out);
    if ((which & BOUND_MATCHING) && p->next_pairs)
        TRY_GOTO(bounds_matching(p, LEFT, &b), out);
#undef LEFT
    b.seconds = clock_seconds() - start;
out:
    if (st == STATUS_OK)
        *out = b;
    else
        bounds_clear(&b);
    return st;
}

void bounds_clear(plan_bounds *b)
{
    free(b->balance_of_layer);
    b->balance_of_layer = NULL;
}
