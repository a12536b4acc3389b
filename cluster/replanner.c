#include "cluster/replanner.h"

#include "cluster/child.h"
#include "cluster/launch_dir.h"
#include "cluster/plan_store.h"
#include "cluster/replan_policy.h"
#include "proto/clock.h"
#include "proto/json.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

enum { MAX_PLAN_BYTES = 48 << 20, SAID_BYTES = 64 << 10, NICENESS = 15, WORDS = 24 };
#define TERM_SECONDS  0.3
#define END_SECONDS   5.0
#define BOUND_SECONDS "2"

struct replanner {
    pthread_t thread;
    int cancel_fd; /* eventfd, written once and never read */
    atomic_bool done;
    /* the thread's own until done */
    char *program, *solver, *model_name, *name;
    double seconds, deadline;
    int threads, extra_slots;
    long long epoch;
    topology topology;
    plan present;
    routing_stats *more; /* to be added to result.stats */
    launch_dir dir;
    char said[SAID_BYTES]; /* the end of what the child printed */
    size_t n_said;
    replan_result result;
};

/* ---- numbers ---- */

void replan_count_copies(const plan *from, const plan *to, int *n_copies, int *most_copies)
{
    *n_copies = *most_copies = 0;
    for (int r = 0; r < to->n_ranks; r++) {
        int n = 0;
        for (int l = 0; l < to->n_layers; l++)
            for (int e = 0; e < to->n_experts; e++)
                n += plan_holds(to, l, e, r) && !plan_holds(from, l, e, r);
        *n_copies += n;
        *most_copies = n > *most_copies ? n : *most_copies;
    }
}

status replan_measure(const plan *p, const uint64_t *counts, double tokens, double *balance, double *error)
{
    double *loads = malloc((size_t)(p->n_ranks + p->n_layers) * sizeof *loads), *layers = loads + p->n_ranks;
    if (!loads)
        return status_fail(STATUS_NO_MEMORY, "no memory to measure a plan");
    double sum = 0, errors = 0;
    routing_balance(p, counts, loads, layers);
    for (int l = 0; l < p->n_layers; l++) {
        sum += layers[l];
        errors += replan_balance_error(p->n_ranks, layers[l] / p->n_ranks, tokens);
    }
    free(loads);
    *balance = sum / p->n_layers;
    if (error)
        *error = errors / p->n_layers; /* layers see the same tokens: their errors do not average out */
    return STATUS_OK;
}

/* ---- the child ---- */

/* Of what it prints the end is kept. */
static void keep_said(void *arg, const char *bytes, size_t n)
{
    replanner *r = arg;
    size_t room = sizeof r->said - 1;
    if (n > room) {
        bytes += n - room;
        n = room;
    }
    if (r->n_said + n > room) {
        size_t drop = r->n_said + n - room;
        memmove(r->said, r->said + drop, r->n_said - drop);
        r->n_said -= drop;
    }
    memcpy(r->said + r->n_said, bytes, n);
    r->n_said += n;
    r->said[r->n_said] = '\0';
}

/* Its last line that says something, "" if none. */
static const char *last_line(replanner *r)
{
    while (r->n_said > 0 && strchr("\r\n \t", r->said[r->n_said - 1]))
        r->said[--r->n_said] = '\0';
    const char *newline = strrchr(r->said, '\n');
    return newline ? newline + 1 : r->said;
}

static bool is_cancelled(const replanner *r)
{
    struct pollfd fd = {.fd = r->cancel_fd, .events = POLLIN};
    return poll(&fd, 1, 0) > 0;
}

/* Until it has ended, or time is over, or the attempt was given up. */
static bool wait_for_child(replanner *r, child *c, int *exit_code)
{
    while (!child_has_ended(c, exit_code)) {
        double left = r->deadline - clock_seconds();
        if (left <= 0 || is_cancelled(r))
            return false;
        struct pollfd fds[3] = {
            {.fd = c->fd, .events = POLLIN}, {.fd = c->output, .events = POLLIN}, {.fd = r->cancel_fd, .events = POLLIN}};
        poll(fds, 3, (int)(fmin(left, 60) * 1e3) + 1);
        child_read(c, keep_said, r);
    }
    return true;
}

static status run_child(replanner *r, const char *const *words)
{
    child c;
    int exit_code = 0;
    r->n_said = 0;
    r->said[0] = '\0';
    TRY(child_spawn((char *const *)words, environ, -1, &c));
    bool ended = wait_for_child(r, &c, &exit_code);
    bool gone = child_end(&c, ended ? 0 : TERM_SECONDS, END_SECONDS, keep_said, r);
    const char *said = last_line(r);
    if (!gone)
        return status_fail(STATUS_IO, "the planner (pid %d) cannot be ended", (int)c.pid);
    if (is_cancelled(r))
        return status_fail(STATUS_STOPPED, "the attempt was given up");
    if (!ended)
        return status_fail(STATUS_IO, "the planner did not end in time and was killed%s%.300s", *said ? "; its last words: " : "",
                           said);
    if (exit_code < 0)
        return status_fail(STATUS_IO, "the planner was killed by signal %d", -exit_code);
    if (exit_code > 0)
        return status_fail(STATUS_IO, "the planner ended with exit code %d%s%.300s", exit_code, *said ? ": " : "", said);
    return STATUS_OK;
}

/* ---- its files ---- */

static status write_inputs(replanner *r)
{
    replan_result *to = &r->result;
    if (!to->stats) {
        to->stats = r->more;
        r->more = NULL;
    }
    if (!to->stats)
        return status_fail(STATUS_BAD_INPUT, "there are no statistics to plan from");
    if (r->more)
        TRY(routing_stats_merge(to->stats, r->more));
    routing_stats_destroy(r->more);
    r->more = NULL;
    const routing_shape *shape = routing_stats_shape(to->stats);
    if (shape->n_layers != r->present.n_layers || shape->n_experts != r->present.n_experts)
        return status_fail(STATUS_BAD_INPUT, "the statistics are not of the plan's model");
    to->counts = malloc((size_t)shape->n_layers * (size_t)shape->n_experts * sizeof *to->counts);
    if (!to->counts)
        return status_fail(STATUS_NO_MEMORY, "no memory for the counts of a plan");
    routing_stats_sum_tokens(to->stats, -1, -1, to->counts);
    to->tokens = routing_stats_tokens(to->stats, 0, PHASE_PREFILL) + routing_stats_tokens(to->stats, 0, PHASE_DECODE);
    TRY(routing_stats_write(to->stats, launch_dir_file(&r->dir, "statistics.safetensors")));
    TRY(topology_write(&r->topology, launch_dir_file(&r->dir, "topology.json")));
    return plan_write(&r->present, r->model_name, launch_dir_file(&r->dir, "present.json"));
}

static status solve(replanner *r)
{
    char files[4][4200], seconds[32], threads[16], slots[16];
    const char *const names[4] = {"statistics.safetensors", "topology.json", "present.json", "plan.json"};
    for (int i = 0; i < 4; i++)
        snprintf(files[i], sizeof files[i], "%s", launch_dir_file(&r->dir, names[i]));
    snprintf(seconds, sizeof seconds, "%.3f", r->seconds);
    snprintf(threads, sizeof threads, "%d", r->threads > 0 ? r->threads : 1);
    snprintf(slots, sizeof slots, "%d", r->extra_slots);
    const char *words[WORDS] = {r->program,  "solve",           "--stats",     files[0],   "--topology",
                                files[1],    "--seed-plan",     files[2],      "--solver", r->solver,
                                "--seconds", seconds,           "--threads",   threads,    "--extra-slots",
                                slots,       "--bound-seconds", BOUND_SECONDS, "-o",       files[3]};
    return run_child(r, words);
}

/* Everything of the planner's file that is not the plan itself: who made it, from what, with which score. */
static cJSON *take_provenance(cJSON *file)
{
    static const char *const own[] = {"format",  "version", "model",        "name",  "epoch",
                                      "experts", "ranks",   "node_of_rank", "layers"};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        cJSON_DeleteItemFromObjectCaseSensitive(file, own[i]);
    return file;
}

/* Files that are gone say nothing. */
static void put_source(cJSON *file, uint64_t tokens)
{
    char text[64];
    snprintf(text, sizeof text, "%llu tokens of live traffic", (unsigned long long)tokens);
    cJSON_DeleteItemFromObjectCaseSensitive(file, "made_from");
    cJSON_AddStringToObject(file, "made_from", text);
}

/* The counts that drift is measured against are those it was made from, whatever the planner's file says. */
static bool put_counts(cJSON *file, const plan *p, const uint64_t *counts)
{
    cJSON *layers = cJSON_CreateArray();
    double *row = malloc((size_t)p->n_experts * sizeof *row);
    bool fine = layers && row;
    for (int l = 0; fine && l < p->n_layers; l++) {
        for (int e = 0; e < p->n_experts; e++)
            row[e] = (double)counts[(size_t)l * (size_t)p->n_experts + (size_t)e];
        fine = cJSON_AddItemToArray(layers, cJSON_CreateDoubleArray(row, p->n_experts));
    }
    free(row);
    cJSON_DeleteItemFromObjectCaseSensitive(file, "tokens_per_expert");
    if (fine && cJSON_AddItemToObject(file, "tokens_per_expert", layers))
        return true;
    cJSON_Delete(layers);
    return false;
}

/* Reads what the planner wrote, and writes it again as the coordinator's own: its number, name and counts, this job's nodes. */
static status take_plan(replanner *r)
{
    const char *path = launch_dir_file(&r->dir, "plan.json");
    plan_shape shape = {.n_ranks = r->present.n_ranks,
                        .n_experts = r->present.n_experts,
                        .n_layers = r->present.n_layers,
                        .layer_numbers = r->present.layer_numbers,
                        .model_name = *r->model_name ? r->model_name : NULL};
    replan_result *to = &r->result;
    cJSON *file = NULL;
    TRY(plan_read(path, &shape, &to->plan));
    snprintf(to->plan.name, sizeof to->plan.name, "%s", r->name);
    to->plan.epoch = r->epoch;
    memcpy(to->plan.node_of_rank, r->present.node_of_rank, (size_t)shape.n_ranks * sizeof *shape.layer_numbers);
    TRY(json_read_file(path, MAX_PLAN_BYTES, &file));
    put_source(file, to->tokens);
    bool fine = put_counts(take_provenance(file), &to->plan, to->counts);
    status st =
        fine ? plan_write_beside(&to->plan, r->model_name, file, path) : status_fail(STATUS_NO_MEMORY, "no memory for a plan");
    cJSON_Delete(file);
    TRY(st);
    return plan_store_read(path, &to->json, &to->json_size);
}

/* What the planner says of the move; an older one that does not know the command costs nothing but these numbers. */
static void price(replanner *r)
{
    char files[3][4200];
    const char *const names[3] = {"present.json", "plan.json", "topology.json"};
    for (int i = 0; i < 3; i++)
        snprintf(files[i], sizeof files[i], "%s", launch_dir_file(&r->dir, names[i]));
    const char *words[WORDS] = {r->program, "diff", files[0], files[1], "--topology", files[2], "--json"};
    cJSON *json = NULL;
    double seconds;
    if (run_child(r, words) != STATUS_OK)
        return;
    const char *object = strchr(r->said, '{');
    if (!object || json_parse("convoke-plan diff", object, strlen(object), &json) != STATUS_OK)
        return;
    if (json_get_double_or(json, "convoke-plan diff", "seconds", -1, &seconds) == STATUS_OK && seconds >= 0)
        r->result.link_seconds = seconds;
    cJSON_Delete(json);
}

/* ---- the thread ---- */

static status attempt(replanner *r)
{
    replan_result *to = &r->result;
    TRY(launch_dir_create_scratch(0, &r->dir));
    TRY(write_inputs(r));
    TRY(replan_measure(&r->present, to->counts, (double)to->tokens, &to->balance_now, &to->error));
    TRY(solve(r));
    TRY(take_plan(r));
    TRY(replan_measure(&to->plan, to->counts, (double)to->tokens, &to->balance_new, NULL));
    to->balance_new = fmax(to->balance_new, replan_balance_floor(to->plan.n_ranks, (double)to->tokens));
    replan_count_copies(&r->present, &to->plan, &to->n_copies, &to->most_copies);
    price(r);
    return is_cancelled(r) ? status_fail(STATUS_STOPPED, "the attempt was given up") : STATUS_OK;
}

static void *run(void *arg)
{
    replanner *r = arg;
    double begin = clock_seconds();
    setpriority(PRIO_PROCESS, 0, NICENESS); /* of this thread, and so of the child's it starts */
    r->result.st = attempt(r);
    if (r->result.st != STATUS_OK)
        snprintf(r->result.why, sizeof r->result.why, "%s", status_message());
    launch_dir_remove(&r->dir);
    r->result.took = clock_seconds() - begin;
    atomic_store(&r->done, true);
    return NULL;
}

/* ---- the outside ---- */

static void replanner_free(replanner *r)
{
    replan_result_clear(&r->result);
    routing_stats_destroy(r->more);
    topology_clear(&r->topology);
    plan_clear(&r->present);
    free(r->program);
    free(r->solver);
    free(r->model_name);
    free(r->name);
    if (r->cancel_fd >= 0)
        close(r->cancel_fd);
    free(r);
}

static status copy_request(const replan_request *request, replanner *r)
{
    r->program = strdup(request->program);
    r->solver = strdup(request->solver ? request->solver : "auto");
    r->model_name = strdup(request->model_name);
    r->name = strdup(request->name);
    if (!r->program || !r->solver || !r->model_name || !r->name)
        return status_fail(STATUS_NO_MEMORY, "no memory to plan");
    TRY(topology_copy(request->topology, &r->topology));
    return plan_copy(request->present, &r->present);
}

/* Signals are the main thread's. */
static status start_thread(replanner *r)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&r->thread, NULL, run, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? status_fail(STATUS_NO_MEMORY, "no thread to plan on: %s", strerror(error)) : STATUS_OK;
}

status replanner_start(const replan_request *request, replanner **out)
{
    replanner *r = calloc(1, sizeof *r);
    if (!r)
        return status_fail(STATUS_NO_MEMORY, "no memory to plan");
    r->seconds = request->seconds;
    r->deadline = clock_seconds() + request->seconds + (request->grace > 0 ? request->grace : REPLANNER_GRACE);
    r->threads = request->threads;
    r->extra_slots = request->extra_slots;
    r->epoch = request->epoch;
    r->dir = (launch_dir){.scratch_lock = -1, .shm_lock = -1};
    r->result.link_seconds = -1;
    r->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    status st =
        r->cancel_fd >= 0 ? copy_request(request, r) : status_fail(STATUS_IO, "no descriptor to plan: %s", strerror(errno));
    if (st == STATUS_OK) {
        r->result.stats = request->stats[0];
        r->more = request->stats[1];
        st = start_thread(r);
    }
    if (st != STATUS_OK) {
        r->result.stats = r->more = NULL; /* the caller's still */
        replanner_free(r);
        return st;
    }
    *out = r;
    return STATUS_OK;
}

bool replanner_done(const replanner *r)
{
    return atomic_load(&r->done);
}

void replanner_finish(replanner *r, replan_result *out)
{
    pthread_join(r->thread, NULL);
    *out = r->result;
    r->result = (replan_result){0};
    replanner_free(r);
}

void replanner_cancel(replanner *r)
{
    if (!r)
        return;
    uint64_t one = 1;
    ssize_t n = write(r->cancel_fd, &one, sizeof one);
    (void)n; /* room for one there is */
    pthread_join(r->thread, NULL);
    replanner_free(r);
}

void replan_result_clear(replan_result *r)
{
    routing_stats_destroy(r->stats);
    plan_clear(&r->plan);
    free(r->counts);
    free(r->json);
    *r = (replan_result){0};
}
