/* coordinator.h - the one in charge: requests, journal, workers. Doors (gRPC, HTTP) see only this header and requests.h.
 *
 *        doors ──► requests ──► journal
 *                     │ sequences            ▲ tokens
 *                     ▼                      │
 *                    job: launches workers, watches them, starts them again
 */
#ifndef CONVOKE_CLUSTER_COORDINATOR_H
#define CONVOKE_CLUSTER_COORDINATOR_H

#include "cluster/replan_policy.h"
#include "cluster/requests.h"
#include "cluster/tokenizer.h"
#include "proto/bytes.h"

typedef struct coordinator coordinator;

typedef enum {
    SERVING_STARTING, /* first launch: loading */
    SERVING_READY,
    SERVING_RESTARTING, /* workers were lost; requests wait and will continue */
    SERVING_DRAINING,   /* no new requests; running ones finish */
    SERVING_GIVEN_UP,   /* too many failures; everything is refused */
    SERVING_STOPPED,
} serving_state;

typedef struct {
    const char *model_name; /* served name */
    const char *model_dir;
    const char *const *aliases;
    int n_aliases;
    const char *instance; /* made up at start */
    const char *isa, *combine, *plan_name;
    uint64_t plan_epoch, launch;
    int n_ranks, n_nodes;
    int vocab, max_length, kv_block, max_running, max_batched_tokens;
    unsigned long long kv_blocks; /* all ranks */
    int n_eos;
    const int32_t *eos_ids;
    double started; /* seconds since the epoch */
} coordinator_info; /* strings live as long as the coordinator; numbers of the workers are 0 before the first ready */

typedef struct {
    serving_state state;
    int n_running, n_waiting;
    double kv_usage; /* [0, 1] */
    unsigned long long kv_tokens_used, kv_tokens;
    unsigned long long prompt_tokens, generated_tokens, prefix_queries, prefix_hits;
    double generated_per_second; /* over the last seconds */
    int n_ranks;
} coordinator_load;

void coordinator_get_info(coordinator *c, coordinator_info *out);
void coordinator_get_load(coordinator *c, coordinator_load *out);
/* Both are NULL when the model has no tokenizer.json: then text is refused by requests_open(). */
const tokenizer *coordinator_tokenizer(coordinator *c);
const char *coordinator_model_dir(coordinator *c);
requests *coordinator_requests(coordinator *c);
serving_state coordinator_state(coordinator *c);
/* Called on every change of state, from whatever thread changes it; for health. One door, one function; NULL: none any more, and
 * when this returns the last one does not run. Must not be called from within it. */
void coordinator_watch_state(coordinator *c, void (*changed)(void *arg, serving_state state), void *arg);

/* An admin's words. A door decides by coordinator_admin_ok() whether the speaker may: from loopback, or with the token. */
typedef enum { PAUSE_ABORT, PAUSE_WAIT, PAUSE_KEEP } pause_mode;
bool coordinator_admin_ok(coordinator *c, const char *peer, const char *token); /* peer as gRPC says it; token may be NULL */
/* ABORT ends all requests; WAIT refuses nothing, lets running ones finish, holds new ones back and returns when none runs; KEEP
 * freezes running ones where they are. New requests wait in the queue until resume. clear_cache: also the prefix cache. */
status coordinator_pause(coordinator *c, pause_mode mode, bool clear_cache);
status coordinator_resume(coordinator *c);
bool coordinator_is_paused(coordinator *c);
/* A new plan now, whatever balance and drift say. It is put in force (replan_policy.h) BY_MODE (--replan apply, if it pays),
 * IF_IT_PAYS also where it would only be suggested, or ALWAYS. STATUS_UNSUPPORTED, STATUS_STOPPED: no, and why. */
status coordinator_replan(coordinator *c, plan_take take);
/* The plan in force, how it does, how the last attempt at a better one went: JSON, one line. */
void coordinator_describe_plan(coordinator *c, bytes_writer *out);
/* Begins to drain, as SIGTERM does; returns at once. */
void coordinator_shutdown(coordinator *c);

#endif
