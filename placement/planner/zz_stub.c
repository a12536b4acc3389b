#include "placement/planner/bounds.h"
#include "placement/planner/solver.h"
__attribute__((weak)) status bounds_step(const problem *p, double seconds, plan_bounds *out) { (void)p; (void)seconds; (void)out; return STATUS_OK; }
__attribute__((weak)) status bounds_matching(const problem *p, double seconds, plan_bounds *out) { (void)p; (void)seconds; (void)out; return STATUS_OK; }
