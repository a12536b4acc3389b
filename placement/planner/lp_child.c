/* Children that solve: started, watched, killed at their deadline, and their results read from the memory they shared.
 *
 *   parent                                    child
 *   maps shared memory, puts `start` into it
 *   pipe, fork ------------------------------> holds the pipe's write end; solves; incumbent and bound go to shared memory
 *   poll: pipe closed (it ended, somehow)
 *         or deadline: SIGKILL
 *   waitpid, reads shared memory
 *
 * The pipe carries nothing: its end tells of the child's, whatever killed it, without signals or a turn of polling. */
#include "placement/planner/lp_private.h"
#include "proto/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

struct lp_job {
    lp_model *model;
    const lp_pricing *pricing; /* NULL: the model is whole */
    const lp_options *options;
    lp_shared *shared;
    pid_t pid;       /* 0: not running */
    int pipe_end;    /* read end, while running */
    double deadline; /* 0: none */
    bool killed, done;
};
typedef struct lp_job lp_job;

static size_t take(size_t *size, size_t bytes)
{
    size_t at = *size;
    *size += (bytes + 63) / 64 * 64;
    return at;
}

static status shared_create(const lp_job *job, lp_shared **out)
{
    size_t room = job->pricing ? (size_t)job->pricing->max_columns : 0;
    size_t entries = job->pricing ? room * (size_t)job->pricing->entries_per_column : 0;
    size_t points = ((size_t)job->model->n_columns + room) * sizeof(double), duals = (size_t)job->model->n_rows * sizeof(double);
    size_t size = 0;
    take(&size, sizeof(lp_shared));
    size_t at[] = {take(&size, points),
                   take(&size, points),
                   take(&size, duals),
                   take(&size, duals),
                   take(&size, room * sizeof(double)),
                   take(&size, room * sizeof(int)),
                   take(&size, entries * sizeof(int)),
                   take(&size, entries * sizeof(double))};
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return status_fail(STATUS_NO_MEMORY, "no shared memory for a linear programme (%zu bytes): %s", size, strerror(errno));
    lp_shared *s = (lp_shared *)memory;
    s->size = size;
    s->x[0] = (double *)(memory + at[0]);
    s->x[1] = (double *)(memory + at[1]);
    s->duals[0] = (double *)(memory + at[2]);
    s->duals[1] = (double *)(memory + at[3]);
    s->gen_costs = (double *)(memory + at[4]);
    s->gen_counts = (int *)(memory + at[5]);
    s->gen_rows = (int *)(memory + at[6]);
    s->gen_values = (double *)(memory + at[7]);
    s->outcome = s->point_at = s->duals_at = -1;
    s->bound = -LP_INF;
    *out = s;
    return STATUS_OK;
}

static status job_prepare(lp_job *job)
{
    TRY(shared_create(job, &job->shared));
    if (!job->options->start)
        return STATUS_OK;
    TRY(lp_check_point(job->model, job->options->start, &job->shared->objective[0]));
    memcpy(job->shared->x[0], job->options->start, (size_t)job->model->n_columns * sizeof(double));
    job->shared->point_at = 0;
    return STATUS_OK;
}

/* The child must not outlive its parent, answer to the parent's signal handlers, or leave a core file. */
static void child_settle(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    for (int sig = 1; sig < 32; sig++)
        signal(sig, SIG_DFL);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
}

static status job_start(lp_job *job)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return status_fail(STATUS_IO, "no pipe for a solver process: %s", strerror(errno));
    pid_t parent = getpid(), pid = fork();
    if (pid < 0) {
        int error = errno;
        close(ends[0]);
        close(ends[1]);
        return status_fail(STATUS_IO, "no process for a solver: %s", strerror(error));
    }
    if (pid == 0) {
        child_settle(parent);
        lp_glpk_run(job->model, job->pricing, job->options, job->shared);
        _exit(0);
    }
    close(ends[1]);
    job->pid = pid;
    job->pipe_end = ends[0];
    return STATUS_OK;
}

static void job_reap(lp_job *job)
{
    int how = 0;
    pid_t got;
    do
        got = waitpid(job->pid, &how, 0);
    while (got < 0 && errno == EINTR);
    close(job->pipe_end);
    job->pid = 0;
    job->done = true;
    lp_shared *s = job->shared;
    if (s->outcome >= 0 || job->killed || s->words[0])
        return;
    if (got > 0 && WIFSIGNALED(how))
        snprintf(s->words, sizeof s->words, "the solver process was ended by signal %d", WTERMSIG(how));
    else
        snprintf(s->words, sizeof s->words, "the solver process ended without an answer");
}

static void job_kill(lp_job *job)
{
    job->killed = true;
    kill(job->pid, SIGKILL);
    job_reap(job);
}

/* Milliseconds until the nearest deadline, -1: none. */
static int patience(int n, const lp_job *jobs)
{
    double nearest = 0;
    for (int i = 0; i < n; i++)
        if (jobs[i].pid && jobs[i].deadline > 0 && (nearest == 0 || jobs[i].deadline < nearest))
            nearest = jobs[i].deadline;
    if (nearest == 0)
        return -1;
    double left = ceil((nearest - clock_seconds()) * 1e3);
    return left < 0 ? 0 : left > 1e6 ? 1000000 : (int)left;
}

/* Waits until a child has ended or a deadline has come, and clears away what is over. */
static status wait_for_some(int n, lp_job *jobs, struct pollfd *fds)
{
    int n_fds = 0;
    for (int i = 0; i < n; i++)
        if (jobs[i].pid)
            fds[n_fds++] = (struct pollfd){.fd = jobs[i].pipe_end, .events = POLLIN};
    if (poll(fds, (nfds_t)n_fds, patience(n, jobs)) < 0 && errno != EINTR)
        return status_fail(STATUS_IO, "poll: %s", strerror(errno));
    double now = clock_seconds();
    for (int i = 0, at = 0; i < n; i++) {
        if (!jobs[i].pid)
            continue;
        if (fds[at++].revents)
            job_reap(&jobs[i]);
        else if (jobs[i].deadline > 0 && now >= jobs[i].deadline)
            job_kill(&jobs[i]);
    }
    return STATUS_OK;
}

static status run_jobs(int n, lp_job *jobs, int processes)
{
    if (n < 1)
        return STATUS_OK;
    struct pollfd *fds = calloc((size_t)n, sizeof *fds);
    if (!fds)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d linear programmes", n);
    status st = STATUS_OK;
    int next = 0, running = 0;
    while (st == STATUS_OK && (next < n || running > 0)) {
        while (next < n && running < processes && st == STATUS_OK) {
            lp_job *job = &jobs[next++];
            if (job->deadline > 0 && clock_seconds() >= job->deadline)
                job->killed = job->done = true; /* its time was over before it could begin */
            else if ((st = job_start(job)) == STATUS_OK)
                running++;
        }
        if (running > 0 && st == STATUS_OK)
            st = wait_for_some(n, jobs, fds);
        running = 0;
        for (int i = 0; i < next; i++)
            running += jobs[i].pid != 0;
    }
    for (int i = 0; i < n; i++)
        if (jobs[i].pid)
            job_kill(&jobs[i]);
    free(fds);
    return st;
}

/* Columns that the child generated become the model's own. */
static void job_adopt(const lp_job *job)
{
    const lp_shared *s = job->shared;
    size_t width = job->pricing ? (size_t)job->pricing->entries_per_column : 0;
    for (int i = 0; i < s->n_generated; i++) {
        int column = lp_add_column(job->model, 0, LP_INF, s->gen_costs[i], false);
        for (int k = 0; k < s->gen_counts[i]; k++)
            lp_set(job->model, s->gen_rows[(size_t)i * width + (size_t)k], column, s->gen_values[(size_t)i * width + (size_t)k]);
    }
}

static double *copy_doubles(const double *from, size_t n)
{
    double *to = malloc((n ? n : 1) * sizeof *to);
    if (to)
        memcpy(to, from, n * sizeof *to);
    return to;
}

static status job_collect(const lp_job *job, lp_result *out)
{
    const lp_shared *s = job->shared;
    job_adopt(job);
    *out = (lp_result){.bound = s->bound, .pivots = s->pivots, .nodes = s->nodes, .timed_out = job->killed, .objective = LP_INF};
    int point = s->point_at, duals = s->duals_at;
    if (s->outcome >= 0)
        out->outcome = (lp_outcome)s->outcome;
    else if (job->killed)
        out->outcome = point >= 0 ? LP_FEASIBLE : LP_NOTHING;
    else
        out->outcome = LP_CRASHED;
    if (out->outcome == LP_CRASHED)
        snprintf(out->words, sizeof out->words, "%s", s->words);
    bool ok = !job->model->failed;
    if (point >= 0) {
        out->objective = s->objective[point];
        ok = (out->x = copy_doubles(s->x[point], (size_t)job->model->n_columns)) && ok;
    }
    if (duals >= 0 && job->options->duals)
        ok = (out->duals = copy_doubles(s->duals[duals], (size_t)job->model->n_rows)) && ok;
    if (ok)
        return STATUS_OK;
    lp_result_clear(out);
    return status_fail(STATUS_NO_MEMORY, "no memory for the solution of a linear programme");
}

void lp_result_clear(lp_result *r)
{
    free(r->x);
    free(r->duals);
    *r = (lp_result){0};
}

static status solve_jobs(int n, lp_job *jobs, int processes, lp_result *out)
{
    double now = clock_seconds();
    int done = 0;
    status st = STATUS_OK;
    for (int i = 0; i < n && st == STATUS_OK; i++) {
        jobs[i].deadline = jobs[i].options->seconds > 0 ? now + jobs[i].options->seconds : 0;
        if (jobs[i].model->failed)
            st = status_fail(STATUS_NO_MEMORY, "no memory for a linear programme");
        else
            st = job_prepare(&jobs[i]);
    }
    if (processes <= 0)
        processes = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (st == STATUS_OK)
        st = run_jobs(n, jobs, processes < 1 ? 1 : processes);
    for (; done < n && st == STATUS_OK; done++)
        st = job_collect(&jobs[done], &out[done]);
    if (st != STATUS_OK)
        for (int i = 0; i + 1 < done; i++)
            lp_result_clear(&out[i]);
    for (int i = 0; i < n; i++)
        if (jobs[i].shared)
            munmap(jobs[i].shared, jobs[i].shared->size);
    return st;
}

status lp_solve_columns(int n, lp_model *const *models, const lp_pricing *pricing, const lp_options *options, int processes,
                        lp_result *out)
{
    if (n == 0)
        return STATUS_OK;
    lp_job *jobs = calloc((size_t)n, sizeof *jobs);
    if (!jobs)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d linear programmes", n);
    for (int i = 0; i < n; i++)
        jobs[i] = (lp_job){.model = models[i], .pricing = pricing ? &pricing[i] : NULL, .options = &options[i]};
    status st = solve_jobs(n, jobs, processes, out);
    free(jobs);
    return st;
}

status lp_solve_all(int n, lp_model *const *models, const lp_options *options, int processes, lp_result *out)
{
    return lp_solve_columns(n, models, NULL, options, processes, out);
}

status lp_solve(const lp_model *m, const lp_options *options, lp_result *out)
{
    lp_job job = {.model = (lp_model *)m, .options = options}; /* only generated columns change a model */
    return solve_jobs(1, &job, 1, out);
}
