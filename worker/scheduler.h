/* scheduler.h - which sequences run, where, with which KV blocks, and how many rows each gets in the next step.
 *
 *   submit ─► waiting ─admit─► running on a rank: place, KV blocks ─► finished
 *               ▲                  │
 *               └── pushed out ────┘   (blocks are needed by a better one; computed again later)
 *
 * The leader's mind: numbers in, decisions out; no MPI, no clock (times of steps are passed in), no model. A step goes
 *     scheduler_plan() - the ranks run it - scheduler_ran(), then _add_token() and _finish() for what came of it.
 *
 * Who is admitted: lower priority value first; among equals those who were pushed out; then the client that was served least
 * (Virtual Token Counter: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2: a prompt token
 * counts 1, a generated one 2, a client that comes back is lifted to the least served one that waits); then the older. It needs a
 * free place on its rank and blocks for the tokens it has, less those found in the prefix cache. One that does not fit is
 * overtaken a bounded number of times; then a rank is kept for it.
 *
 * Where: the rank asked for; else where rows waiting to run plus own rows not found in the cache are fewest.
 *
 * Who is pushed out when a running sequence needs a block and none is free: of those on its rank, held ones first, then the
 * worst (highest priority value, then youngest), itself if that is the worst. So the best one always proceeds, and everybody
 * does in the end. Held ones also make room for those who wait.
 *
 * Rows: every decoding sequence gets its one. Prompts get rows as long as the step is expected to stay within the budget
 * (step_cost.h), the same limit on every rank; with nobody decoding, as many as fit. The budget chosen here is 1.55 times the
 * step of the decoding rows alone, or what it takes that a prompt needs at most 2.7 times as long as on an idle machine. On a
 * rank half of the prompt rows go to the best prompt (priority, then age), so that none starves, and half to the shortest, so
 * that a question of ten tokens does not wait for a book.
 *
 * Moves: once scheduler_judge() has said that a sequence is better off on another rank, it leaves its place and joins there in
 * one step, its blocks' contents travel beside the steps, and it gets rows again when they have arrived. Blocks are free again
 * when both ends have told. Until it is judged a sequence gets `first_rows` rows at most, so that a long prompt may move early.
 *
 * None of this changes a token: kernels do not care how rows are grouped (model.h). */
#ifndef CONVOKE_WORKER_SCHEDULER_H
#define CONVOKE_WORKER_SCHEDULER_H

#include "worker/kv_blocks.h"
#include "worker/step_cost.h"

typedef struct {
    int n_ranks, n_places; /* places per rank */
    int max_running;       /* over all ranks */
    int chunk;             /* prompt rows per rank and step, at most */
    int kv_block;          /* positions */
    const int *kv_blocks_of_rank;
    bool prefix_cache;
    double step_seconds; /* 0: chosen by measurement */
    double touch;        /* step_cost.h */
    int first_rows;      /* before scheduler_judge(); 0: nobody is judged */
    prefix_secret secret;
} scheduler_limits;

typedef struct {
    uint64_t id; /* unique among those here */
    void *user;  /* handed back in decisions */
    const int32_t *tokens;
    int n_tokens, max_new;
    int rank; /* -1: any */
    int priority;
    uint64_t client, arrival; /* lower arrival: older; 0: as submitted, behind those who name one */
    bool look_up;             /* start behind a cached prefix */
    bool leave;               /* leave its own blocks in the cache */
    const void *root;         /* [root_size] bytes its prefix keys begin with */
    size_t root_size;
} scheduler_request;

/* A decision. First all leaves happen, then joins, then growths, then rows. */
typedef struct {
    int rank, place; /* is free again; the sequence was cancelled or pushed out */
} scheduler_leave;

typedef struct {
    uint64_t id;
    void *user;
    int rank, place;
    const int32_t *tokens; /* [n_tokens] prompt and what was generated before it was pushed out */
    int n_tokens, n_generated;
    int n_cached;          /* tokens whose keys and values are there already */
    int n_ran;             /* rows that have run before, in an earlier place: what they gave has been reported */
    const int32_t *blocks; /* [n_blocks] */
    int n_blocks;
    bool judged;
    bool moved; /* it has not been in the queue: a scheduler_move goes with it */
} scheduler_join;

/* The contents of from_blocks on one rank belong into to_blocks on another. */
typedef struct {
    uint64_t key; /* for scheduler_sent() and _received() */
    int from, to, n_blocks;
    const int32_t *from_blocks, *to_blocks;
} scheduler_move;

typedef struct {
    int rank, place;
    int32_t block; /* its next one */
} scheduler_growth;

typedef struct {
    int rank, place, n_rows;
} scheduler_rows;

typedef struct {
    int n_leaves, n_joins, n_growths, n_rows, n_moves;
    const scheduler_leave *leaves;
    const scheduler_join *joins;
    const scheduler_growth *growths;
    const scheduler_rows *rows; /* by rank */
    const scheduler_move *moves;
    int prefill_rows, decode_rows;
    double budget_seconds, expected_seconds; /* 0: no budget; nothing known */
} scheduler_step;

typedef struct {
    int n_running, n_waiting;
    unsigned long long n_preempted, prefix_queries, prefix_hits;
    unsigned long long n_moved, moved_blocks;
    const int *kv_free_of_rank; /* [n_ranks] without user */
} scheduler_counters;

typedef struct scheduler scheduler;

status scheduler_create(const scheduler_limits *limits, scheduler **out);
void scheduler_destroy(scheduler *s, void (*forget)(void *user)); /* NULL is fine; forget: for each that is still here, or NULL */

/* Refuses, with the numbers, what can never fit, and an id that is here already. The only one that allocates. */
status scheduler_submit(scheduler *s, const scheduler_request *request);
/* What `id` is to the scheduler: its user, or NULL when it is not here. */
void *scheduler_find(const scheduler *s, uint64_t id);
bool scheduler_is_waiting(const scheduler *s, uint64_t id);
/* Lets go of a sequence; the user returned is the caller's again; NULL when it is not here. _finish: its rank has ended it.
 * _cancel: its rank will hear of it by a leave. */
void *scheduler_finish(scheduler *s, uint64_t id);
void *scheduler_cancel(scheduler *s, uint64_t id);
void scheduler_hold(scheduler *s, uint64_t id, bool hold);
void scheduler_forget_prefixes(scheduler *s);
/* Whether somebody not held is here. */
bool scheduler_busy(const scheduler *s);

/* Whether a rank owns fewer than ceil(1.05 / n_ranks) of those who run or could. */
bool scheduler_has_room(const scheduler *s, int rank);
/* The sequence may run as it likes from now on, and moves to `rank` with the next step if there is a place with blocks then (-1:
 * it stays). */
void scheduler_judge(scheduler *s, uint64_t id, int rank);
/* The ends of a move have told: its contents have left; they have arrived. */
void scheduler_sent(scheduler *s, uint64_t key);
void scheduler_received(scheduler *s, uint64_t key);

/* Decides the next step; valid until the next call. */
const scheduler_step *scheduler_plan(scheduler *s);
/* The planned step has run, in so many seconds. */
void scheduler_ran(scheduler *s, double seconds);
/* A running sequence has generated a token. */
void scheduler_add_token(scheduler *s, uint64_t id, int32_t token);

void scheduler_get_counters(scheduler *s, scheduler_counters *out);
/* For tests: whether blocks, users, places and lists agree with each other. */
bool scheduler_is_sound(const scheduler *s);
const kv_blocks *scheduler_blocks(const scheduler *s, int rank);

#endif
