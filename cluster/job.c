#include "cluster/job_parts.h"

#include "cluster/launch_dir.h"
#include "proto/clock.h"
#include "proto/frame.h"
#include "proto/log.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define START_SECONDS 30.0 /* from mpirun to Hello */
#define LOOK_SECONDS  0.5  /* how often is looked for what nobody tells */
#define LAST_WORD     0.1  /* after the first sign of a loss: somebody may know better and be about to say so */
#define STOP_SECONDS  5.0  /* workers end in order in this time, or for certain */
#define PROBE_SECONDS 10.0 /* a host that does not start a process in this time is lost; less where whole launches take less */
#define PROBE_MIN     3.0
#define SAY_AGAIN     60.0              /* those who are turned away for the same reason are logged this often */
#define SUBMIT_BYTES  ((size_t)1 << 20) /* about the size of one Submit, so that no frame grows out of bounds */

static void say(job *j, job_state state, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void say(job *j, job_state state, const char *format, ...)
{
    char text[1400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    j->listener->state(j->arg, state, j->life.number, text);
}

static bool is_stopping(const job *j)
{
    struct pollfd fd = {.fd = j->stop_fd, .events = POLLIN};
    return poll(&fd, 1, 0) > 0;
}

/* ---- losing a launch ---- */

static void set_accepting(job *j, bool accepting)
{
    pthread_mutex_lock(&j->lock);
    j->accepting = accepting;
    j->accepting_launch = j->life.number;
    sequence_set_clear(&j->sequences);
    pthread_mutex_unlock(&j->lock);
}

static void note_loss(job *j, loss_clue clue, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void note_loss(job *j, loss_clue clue, const char *format, ...)
{
    launch_life *life = &j->life;
    if (life->lost && clue <= life->clue)
        return;
    if (!life->lost) {
        life->lost_at = clock_seconds();
        set_accepting(j, false);
    }
    life->lost = true;
    life->clue = clue;
    va_list args;
    va_start(args, format);
    vsnprintf(life->why, sizeof life->why, format, args);
    va_end(args);
}

typedef struct {
    char text[512];
} rank_name;

/* "rank 1 (pid 77, host node0)" */
static rank_name name_rank(const launch_life *life, int rank)
{
    rank_name name;
    const Convoke__Control__Hello *h = life->hello;
    if (h && rank >= 0 && (unsigned)rank < h->n_ranks)
        snprintf(name.text, 400, "rank %d (pid %u, host %.255s)", rank, h->pid_of_rank[rank], h->host_of_rank[rank]);
    else
        snprintf(name.text, sizeof name.text, "rank %d", rank);
    return name;
}

/* "node0" and "node0.cluster" are one machine. */
static bool same_host(const char *a, const char *b)
{
    size_t n = strcspn(a, "."), m = strcspn(b, ".");
    return strcasecmp(a, b) == 0 || ((!a[n] || !b[m]) && n == m && strncasecmp(a, b, n) == 0);
}

/* Who has been silent for longest by the last Beat, of a host's ranks (NULL: of all):
 * "; rank 1 (...) was last heard 12.3 s ago", or nothing. */
static rank_name name_most_silent(const launch_life *life, const char *host, double now)
{
    rank_name out = {""};
    int worst = -1;
    if (!life->hello || life->beat == 0)
        return out;
    for (int r = 0; r < (int)life->hello->n_ranks; r++)
        if ((!host || same_host(life->hello->host_of_rank[r], host)) &&
            (worst < 0 || life->silent_ms[r] > life->silent_ms[worst]))
            worst = r;
    if (worst < 0)
        return out;
    snprintf(out.text, sizeof out.text, "; %.400s was last heard %.1f s ago", name_rank(life, worst).text,
             life->silent_ms[worst] * 1e-3 + (now - life->beat));
    return out;
}

static void lose_by_verdict(job *j, supervision_verdict verdict, double now)
{
    const launch_life *life = &j->life;
    const supervision *w = &life->watch;
    rank_name silent = name_most_silent(life, NULL, now);
    switch (verdict) {
    case SUPERVISION_FINE:
        return;
    case SUPERVISION_NO_HELLO:
        note_loss(j, CLUE_SILENCE, "no worker connected in %.0f s", now - w->launched);
        return;
    case SUPERVISION_NO_PROGRESS:
        note_loss(j, CLUE_SILENCE, "loading has not moved for %.1f s (%s)%s", now - w->progressed,
                  life->stage[0] ? life->stage : "no word of it", silent.text);
        return;
    case SUPERVISION_SILENT:
        note_loss(j, CLUE_SILENCE, "no word from the leader, %s, for %.1f s%s", name_rank(life, 0).text, now - w->heard,
                  silent.text);
        return;
    case SUPERVISION_NO_STEP:
        note_loss(j, CLUE_SILENCE, "no step in %.1f s although there is work%s", now - w->stepped, silent.text);
        return;
    case SUPERVISION_STOPPED:
        note_loss(j, CLUE_SILENCE, "mpirun was stopped %.1f s ago and does not go on", now - w->stopped);
        return;
    }
}

static void lose_by_exit(job *j, int exit_code)
{
    const char *meaning = exit_code == 137 ? " (a rank was killed)" : exit_code == 205 ? " (a host was lost)" : "";
    j->life.ended = true;
    if (exit_code < 0)
        note_loss(j, CLUE_MPIRUN_KILLED, "mpirun was killed by signal %d", -exit_code);
    else
        note_loss(j, CLUE_MPIRUN_ENDED, "mpirun ended with exit code %d%s", exit_code, meaning);
}

/* ---- what the leader says ---- */

static Convoke__Control__Hello *copy_hello(const Convoke__Control__Hello *hello)
{
    Convoke__Control__Hello plain = *hello;
    plain.secret = (ProtobufCBinaryData){0};
    size_t size = convoke__control__hello__get_packed_size(&plain);
    uint8_t *packed = malloc(size + 1);
    if (!packed)
        return NULL;
    convoke__control__hello__pack(&plain, packed);
    Convoke__Control__Hello *copy = convoke__control__hello__unpack(NULL, size, packed);
    free(packed);
    return copy;
}

static int count_hosts(const Convoke__Control__Hello *h)
{
    int n = 0;
    for (size_t i = 0; i < h->n_host_of_rank; i++) {
        size_t twin = 0;
        while (strcmp(h->host_of_rank[twin], h->host_of_rank[i]) != 0)
            twin++;
        n += twin == i;
    }
    return n;
}

static bool on_joined(void *arg, const Convoke__Control__Hello *hello)
{
    job *j = arg;
    launch_life *life = &j->life;
    bool contiguous;
    if (life->lost || life->stopping || life->hello) {
        status_fail(STATUS_BAD_INPUT, "launch %llu is over", (unsigned long long)life->number);
        return false;
    }
    if (life->launcher && (int)hello->n_ranks != j->n_ranks) {
        status_fail(STATUS_BAD_INPUT, "%u ranks have come, %d were started", hello->n_ranks, j->n_ranks);
        return false;
    }
    life->hello = copy_hello(hello);
    life->silent_ms = calloc(hello->n_ranks, sizeof *life->silent_ms);
    if (!life->hello || !life->silent_ms || job_send_setup(j, &contiguous) != STATUS_OK) {
        if (!life->hello || !life->silent_ms)
            status_fail(STATUS_NO_MEMORY, "no memory for %u ranks", hello->n_ranks);
        note_loss(j, CLUE_SILENCE, "%s", status_message());
        return false;
    }
    life->watch.phase = PHASE_LOADING;
    life->watch.heard = life->watch.progressed = clock_seconds();
    if (life->launcher) {
        launcher_watch(life->launcher, hello);
        j->longest_start = fmax(j->longest_start, life->watch.heard - life->watch.launched);
    }
    j->n_ranks = (int)hello->n_ranks;
    int n_hosts = count_hosts(hello);
    say(j, JOB_LOADING, "%d rank%s on %d host%s joined%s%s", j->n_ranks, j->n_ranks == 1 ? "" : "s", n_hosts,
        n_hosts == 1 ? "" : "s",
        contiguous ? "; the plan is for another number of ranks, so experts lie in equal blocks instead of " : "",
        contiguous ? j->options.plan_path : "");
    return true;
}

static void on_progress(job *j, const Convoke__Control__Progress *p)
{
    launch_life *life = &j->life;
    uint64_t done = 0;
    for (size_t r = 0; r < p->n_done_of_rank; r++)
        done += p->done_of_rank[r];
    if (done != life->done || strncmp(p->stage, life->stage, sizeof life->stage - 1) != 0)
        life->watch.progressed = clock_seconds();
    life->done = done;
    snprintf(life->stage, sizeof life->stage, "%s", p->stage);
    if (j->listener->progress)
        j->listener->progress(j->arg, p);
}

static void on_ready(job *j, const Convoke__Control__Ready *ready)
{
    launch_life *life = &j->life;
    if (life->watch.phase != PHASE_LOADING || life->lost || life->stopping)
        return;
    life->watch.phase = PHASE_READY;
    life->watch.stepped = clock_seconds();
    snprintf(j->isa, sizeof j->isa, "%s", ready->isa); /* a continued answer needs the same bits */
    j->was_ready = true;
    failure_note_ready(&j->failures);
    set_accepting(j, true);
    j->listener->ready(j->arg, ready, life->hello);
    say(j, JOB_READY, "%s", "");
}

static void on_report(job *j, const Convoke__Control__Report *report)
{
    j->life.watch.stepped = clock_seconds();
    pthread_mutex_lock(&j->lock);
    for (size_t i = 0; i < report->n_events; i++)
        if (report->events[i]->kind == CONVOKE__CONTROL__EVENT_KIND__FINISHED)
            sequence_set_remove(&j->sequences, report->events[i]->id);
    pthread_mutex_unlock(&j->lock);
    j->listener->report(j->arg, report);
}

static void on_beat(job *j, const Convoke__Control__Beat *beat)
{
    launch_life *life = &j->life;
    life->beat = clock_seconds();
    for (size_t r = 0; r < beat->n_silent_ms_of_rank && r < life->hello->n_ranks; r++)
        life->silent_ms[r] = beat->silent_ms_of_rank[r];
}

static void on_goodbye(job *j, const Convoke__Control__Goodbye *bye)
{
    if (j->life.stopping)
        return;
    /* A SIGTERM to the ranks is mostly mpirun's, for a reason that it, or somebody else, is about to tell. */
    bool told = strncmp(bye->reason, "told to stop", strlen("told to stop")) == 0;
    note_loss(j, told ? CLUE_RANK_DIED : CLUE_GOODBYE, "%s ended the job: %s", name_rank(&j->life, bye->rank).text, bye->reason);
}

static void on_message(void *arg, const Convoke__Control__ToCoordinator *m)
{
    job *j = arg;
    j->life.watch.heard = clock_seconds();
    switch (m->kind_case) {
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS:
        on_progress(j, m->progress);
        return;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY:
        on_ready(j, m->ready);
        return;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT:
        on_report(j, m->report);
        return;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT:
        on_beat(j, m->beat);
        return;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE:
        on_goodbye(j, m->goodbye);
        return;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_STATISTICS:
        if (j->listener->statistics)
            j->listener->statistics(j->arg, m->statistics);
        return;
    default: /* Hello never comes here */
        return;
    }
}

static void on_lost(void *arg, bool refused, const char *why)
{
    job *j = arg;
    if (j->life.stopping)
        j->life.ended |= j->life.launcher == NULL;
    note_loss(j, refused ? CLUE_REFUSED : CLUE_SILENCE, "%s", why);
}

/* Logged, but not as often as somebody who tries without end wants it. */
static void on_refused(void *arg, const char *peer, const char *why)
{
    job *j = arg;
    double now = clock_seconds();
    j->n_refused++;
    if (strncmp(why, j->refused_why, sizeof j->refused_why - 1) == 0 && now < j->refused_at + SAY_AGAIN)
        return;
    if (j->n_refused > 1)
        log_line("turned away %s on the control connection: %s (%d others since the last such line)", peer, why,
                 j->n_refused - 1);
    else
        log_line("turned away %s on the control connection: %s", peer, why);
    snprintf(j->refused_why, sizeof j->refused_why, "%s", why);
    j->refused_at = now;
    j->n_refused = 0;
}

static const control_listener control_events = {
    .joined = on_joined, .message = on_message, .lost = on_lost, .refused = on_refused};

/* ---- one launch ---- */

static status begin_launch(job *j)
{
    const job_options *o = &j->options;
    control_secret made;
    j->life = (launch_life){.number = ++j->n_launches, .watch.launched = clock_seconds()};
    if (!o->secret_file)
        TRY(control_secret_make(&made));
    const control_secret *secret = o->secret_file ? &j->secret : &made;
    control_server_expect(j->server, secret);
    control_server_set_launch(j->server, j->life.number);
    if (o->wait_for_workers) {
        say(j, JOB_STARTING, "waiting for workers at %s", job_address(j));
        return STATUS_OK;
    }
    say(j, JOB_STARTING, "starting %d rank%s", j->n_ranks, j->n_ranks == 1 ? "" : "s");
    launch_request request = {.mpirun = j->mpirun,
                              .worker = j->worker,
                              .mpirun_args = o->mpirun_args,
                              .address = control_server_address(j->server, job_first_rank_is_here(j)),
                              .secret = secret,
                              .secret_file = o->secret_file,
                              .hosts = j->hosts.n > 0 ? &j->hosts : NULL,
                              .n_ranks = j->n_ranks,
                              .launch = j->life.number};
    status st = launcher_start(&request, &j->life.launcher);
    explicit_bzero(&made, sizeof made);
    return st;
}

/* What the system tells of processes. */
static void step_launcher(job *j)
{
    launch_life *life = &j->life;
    int number;
    if (!life->launcher || life->ended)
        return;
    switch (launcher_step(life->launcher, &number)) {
    case LAUNCH_RUNS:
        return;
    case LAUNCH_WORKER_DIED:
        if (!life->stopping)
            note_loss(j, CLUE_RANK_DIED, "%s died", name_rank(life, number).text);
        return;
    case LAUNCH_ENDED:
        lose_by_exit(j, number);
        return;
    }
}

/* What nobody tells; returns the seconds until it must be asked again. */
static double judge(job *j)
{
    launch_life *life = &j->life;
    double now = clock_seconds(), wait = INFINITY;
    patience limits = {.start_seconds = life->launcher ? START_SECONDS : 0,
                       .load_seconds = j->options.load_seconds,
                       .hang_seconds = j->options.hang_seconds};
    supervision watch = life->watch;
    pthread_mutex_lock(&j->lock);
    watch.has_work = sequence_set_has_work(&j->sequences);
    watch.stepped = fmax(watch.stepped, j->work_since);
    pthread_mutex_unlock(&j->lock);
    if (life->launcher && !life->ended) {
        bool stopped = launcher_is_stopped(life->launcher);
        life->watch.stopped = !stopped ? 0 : life->watch.stopped > 0 ? life->watch.stopped : now;
        watch.stopped = life->watch.stopped;
    }
    if (!life->lost && !life->stopping)
        lose_by_verdict(j, supervision_judge(&watch, &limits, now, &wait), now);
    return life->launcher || life->hello ? fmin(LOOK_SECONDS, wait) : INFINITY;
}

/* Sleeps until something happens or `seconds` are over, and lets everybody look. */
static void step(job *j, double seconds, bool heed_stop)
{
    struct pollfd fds[3] = {
        {.fd = control_server_fd(j->server), .events = POLLIN},
        {.fd = j->life.launcher && !j->life.ended ? launcher_fd(j->life.launcher) : -1, .events = POLLIN},
        {.fd = heed_stop ? j->stop_fd : -1, .events = POLLIN},
    };
    int wait = isinf(seconds) ? -1 : (int)(fmax(seconds, 0) * 1e3) + 1;
    int server_wait = control_server_wait_ms(j->server);
    if (server_wait >= 0 && (wait < 0 || server_wait < wait))
        wait = server_wait;
    poll(fds, 3, wait);
    control_server_step(j->server);
    step_launcher(j);
}

/* Of workers that others started nobody else knows more. */
static bool loss_is_settled(const launch_life *life)
{
    return life->lost && (life->clue == CLUE_GOODBYE || !life->launcher || clock_seconds() >= life->lost_at + LAST_WORD);
}

/* Until it is lost, or the job is told to stop. */
static void run_launch(job *j)
{
    double looked = 0, look_wait = 0;
    if (begin_launch(j) != STATUS_OK)
        note_loss(j, CLUE_SILENCE, "%s", status_message());
    while (!loss_is_settled(&j->life) && !is_stopping(j)) {
        double now = clock_seconds();
        if (now >= looked + look_wait) {
            look_wait = judge(j);
            looked = now;
        }
        step(j, j->life.lost ? LAST_WORD / 4 : looked + look_wait - now, true);
        if (j->life.hello && isinf(look_wait)) /* workers that others started have come: from now on they are looked after */
            look_wait = 0;
    }
}

/* Told to stop: the workers end in order, if they can in time. */
static void stop_launch(job *j)
{
    launch_life *life = &j->life;
    Convoke__Control__Stop stop = CONVOKE__CONTROL__STOP__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    bytes_writer frame = {0};
    life->stopping = true;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_STOP;
    message.stop = &stop;
    stop.launch = life->number;
    double end = clock_seconds() + STOP_SECONDS;
    if (life->hello && !life->lost && control_put_to_leader(&frame, &message) == STATUS_OK &&
        control_server_send(j->server, frame.data, frame.size))
        while (!life->ended && clock_seconds() < end)
            step(j, end - clock_seconds(), false);
    bytes_clear(&frame);
}

/* A host that is gone explains ranks that died, or were told to stop: mpirun did that. */
static void blame_lost_host(launch_life *life, const char *host)
{
    size_t n = strlen(life->why);
    char name[300] = "a host";
    if (*host)
        snprintf(name, sizeof name, "host %s", host);
    if (life->clue > CLUE_RANK_DIED)
        snprintf(life->why + n, sizeof life->why - n, "; mpirun has lost its daemon on %s", name);
    else
        snprintf(life->why, sizeof life->why, "mpirun has lost its daemon on %s%s", name,
                 name_most_silent(life, *host ? host : NULL, life->lost_at).text);
}

/* What mpirun and the ranks printed last: a launch that never came up has no other way to say why. */
static void complete_reason(job *j)
{
    launch_life *life = &j->life;
    if (!life->launcher)
        return;
    const char *lost_host = launcher_lost_host(life->launcher);
    if (lost_host)
        blame_lost_host(life, lost_host);
    size_t n = strlen(life->why);
    const char *words =
        life->clue != CLUE_GOODBYE && life->watch.phase != PHASE_READY ? launcher_last_words(life->launcher) : NULL;
    if (words)
        snprintf(life->why + n, sizeof life->why - n, "; last words: %s", words);
}

/* Nothing of it lives on this machine when this returns. */
static void end_launch(job *j)
{
    launch_life *life = &j->life;
    set_accepting(j, false);
    control_server_expect(j->server, NULL);
    if (launcher_end(life->launcher) != STATUS_OK)
        say(j, JOB_RESTARTING, "%s", status_message());
    life->launcher = NULL;
    control_server_drop_leader(j->server, life->stopping ? NULL : life->why);
    if (life->hello)
        convoke__control__hello__free_unpacked(life->hello, NULL);
    life->hello = NULL;
    free(life->silent_ms);
    life->silent_ms = NULL;
}

/* ---- between two launches ---- */

static void pause_job(job *j, double seconds)
{
    double end = clock_seconds() + seconds;
    while (clock_seconds() < end && !is_stopping(j))
        step(j, end - clock_seconds(), true);
}

/* Hosts that do not answer any more leave the hostfile; the job goes on with the ranks of the others. */
static status drop_lost_hosts(job *j)
{
    bool *reached = calloc((size_t)j->hosts.n, sizeof *reached);
    if (!reached)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d hosts", j->hosts.n);
    probe_request request = {.mpirun = j->mpirun,
                             .mpirun_args = j->options.mpirun_args,
                             .hosts = &j->hosts,
                             .seconds = fmin(PROBE_SECONDS, fmax(PROBE_MIN, 5 * j->longest_start)),
                             .cancel_fd = j->stop_fd};
    status st = launcher_probe(&request, reached);
    bool dropped = false;
    for (int i = j->hosts.n - 1; st == STATUS_OK && i >= 0; i--) {
        if (reached[i])
            continue;
        say(j, JOB_RESTARTING, "host %s does not answer and leaves the job with its %d rank%s", j->hosts.entries[i].name,
            j->hosts.entries[i].n_ranks, j->hosts.entries[i].n_ranks == 1 ? "" : "s");
        hosts_drop(&j->hosts, i);
        dropped = true;
    }
    free(reached);
    TRY(st);
    if (!dropped)
        return STATUS_OK;
    if (j->hosts.n == 0)
        return status_fail(STATUS_PEER_LOST, "no host of %s answers any more", j->options.hostfile);
    j->n_ranks = hosts_room(&j->hosts, j->options.n_ranks);
    hosts_assign(&j->hosts, j->n_ranks);
    say(j, JOB_RESTARTING, "%d rank%s on %d host%s remain", j->n_ranks, j->n_ranks == 1 ? "" : "s", j->hosts.n,
        j->hosts.n == 1 ? "" : "s");
    return STATUS_OK;
}

/* Before it ever was ready, a launch that ends with the same sentence twice will not do better the next time. */
static bool is_hopeless(job *j)
{
    const launch_life *life = &j->life;
    if (j->was_ready || life->clue != CLUE_GOODBYE)
        return false;
    const char *reason = strchr(life->why, ':'); /* behind rank and pid, which differ */
    reason = reason ? reason : life->why;
    bool same = strcmp(reason, j->last_goodbye) == 0;
    snprintf(j->last_goodbye, sizeof j->last_goodbye, "%s", reason);
    return same;
}

/* A launch is lost and ended. False: no further one. */
static bool prepare_next(job *j)
{
    failure_decision d = failure_note(&j->failures, clock_seconds());
    if (is_hopeless(j)) {
        say(j, JOB_GIVEN_UP, "the workers cannot start: %s", j->life.why);
        return false;
    }
    if (d.give_up) {
        say(j, JOB_GIVEN_UP, "%d failure%s within %g minutes, the last: %s", d.n_in_window, d.n_in_window == 1 ? "" : "s",
            j->options.failure_minutes, j->life.why);
        return false;
    }
    if (j->hosts.n > 0 && !is_stopping(j)) {
        status st = drop_lost_hosts(j);
        if (st == STATUS_PEER_LOST) {
            say(j, JOB_GIVEN_UP, "%s", status_message());
            return false;
        }
        if (st != STATUS_OK && st != STATUS_STOPPED)
            say(j, JOB_RESTARTING, "%s", status_message());
    }
    if (!j->options.wait_for_workers) /* others decide themselves when they start theirs again */
        pause_job(j, d.pause_seconds);
    return true;
}

static void *run_job(void *arg)
{
    job *j = arg;
    bool goes_on = true;
    while (goes_on && !is_stopping(j)) {
        run_launch(j);
        if (is_stopping(j)) {
            stop_launch(j);
            end_launch(j);
            break;
        }
        complete_reason(j);
        say(j, JOB_RESTARTING, "launch %llu is lost: %s", (unsigned long long)j->life.number, j->life.why);
        end_launch(j);
        goes_on = prepare_next(j);
    }
    while (!is_stopping(j)) /* given up: whoever still connects is told so */
        step(j, INFINITY, true);
    say(j, JOB_STOPPED, "%s", "");
    return NULL;
}

/* ---- the outside ---- */

static void job_free(job *j)
{
    control_server_destroy(j->server);
    job_setup_clear(j);
    sequence_set_free(&j->sequences);
    bytes_clear(&j->out);
    if (j->stop_fd >= 0)
        close(j->stop_fd);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

/* Signals are the main thread's. */
static status start_thread(job *j)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&j->thread, NULL, run_job, j);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? status_fail(STATUS_NO_MEMORY, "no thread for the job: %s", strerror(error)) : STATUS_OK;
}

status job_start(const job_options *options, const job_listener *listener, void *arg, job **out)
{
    job *j = calloc(1, sizeof *j);
    if (!j)
        return status_fail(STATUS_NO_MEMORY, "no memory for the job");
    pthread_mutex_init(&j->lock, NULL);
    j->listener = listener;
    j->arg = arg;
    j->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    status st = j->stop_fd >= 0 ? job_setup(j, options, &control_events)
                                : status_fail(STATUS_IO, "no descriptor for the job: %s", strerror(errno));
    if (st == STATUS_OK) {
        launch_dir_sweep();
        *out = j; /* callbacks may come before this function returns, and use it */
        st = start_thread(j);
    }
    if (st != STATUS_OK) {
        *out = NULL;
        job_free(j);
    }
    return st;
}

void job_stop(job *j)
{
    if (!j)
        return;
    uint64_t one = 1;
    ssize_t n = write(j->stop_fd, &one, sizeof one);
    (void)n; /* room for one there is */
    pthread_join(j->thread, NULL);
    job_free(j);
}

const char *job_address(const job *j)
{
    return control_server_address(j->server, false);
}

/* ---- sending; under the lock ---- */

static bool put_submit(job *j, Convoke__Control__Sequence *const *sequences, int n)
{
    Convoke__Control__Submit submit = CONVOKE__CONTROL__SUBMIT__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT;
    message.submit = &submit;
    submit.launch = j->accepting_launch;
    submit.n_sequences = (size_t)n;
    submit.sequences = (Convoke__Control__Sequence **)sequences;
    return control_put_to_leader(&j->out, &message) == STATUS_OK;
}

/* As many frames as it takes. */
static bool put_submits(job *j, Convoke__Control__Sequence *const *sequences, int n)
{
    for (int first = 0; first < n;) {
        size_t bytes = 0;
        int last = first;
        while (last < n && (last == first || bytes < SUBMIT_BYTES))
            bytes += convoke__control__sequence__get_packed_size(sequences[last++]);
        if (!put_submit(j, sequences + first, last - first))
            return false;
        first = last;
    }
    return true;
}

static bool note_work(job *j, Convoke__Control__Sequence *const *sequences, int n)
{
    if (!sequence_set_has_work(&j->sequences))
        j->work_since = clock_seconds();
    for (int i = 0; i < n; i++)
        if (!sequence_set_add(&j->sequences, sequences[i]->id))
            return false;
    return true;
}

bool job_submit(job *j, Convoke__Control__Sequence *const *sequences, int n)
{
    pthread_mutex_lock(&j->lock);
    bytes_reset(&j->out);
    bool sent = j->accepting && put_submits(j, sequences, n) && note_work(j, sequences, n) &&
                control_server_send(j->server, j->out.data, j->out.size);
    pthread_mutex_unlock(&j->lock);
    return sent;
}

/* Under the lock; the message says the accepting launch already. */
static bool send_to_leader(job *j, const Convoke__Control__ToLeader *message)
{
    bytes_reset(&j->out);
    return j->accepting && control_put_to_leader(&j->out, message) == STATUS_OK &&
           control_server_send(j->server, j->out.data, j->out.size);
}

static bool send_ids(job *j, Convoke__Control__ToLeader__KindCase kind, const uint64_t *ids, int n)
{
    Convoke__Control__Ids message_ids = CONVOKE__CONTROL__IDS__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    message.kind_case = kind;
    message.cancel = &message_ids; /* all Ids lie in one union */
    message_ids.launch = j->accepting_launch;
    message_ids.n_ids = (size_t)n;
    message_ids.ids = (uint64_t *)ids;
    return send_to_leader(j, &message);
}

bool job_cancel(job *j, const uint64_t *ids, int n)
{
    pthread_mutex_lock(&j->lock);
    bool sent = send_ids(j, CONVOKE__CONTROL__TO_LEADER__KIND_CANCEL, ids, n);
    pthread_mutex_unlock(&j->lock);
    return sent;
}

bool job_hold(job *j, const uint64_t *ids, int n, bool hold)
{
    pthread_mutex_lock(&j->lock);
    bool had_work = sequence_set_has_work(&j->sequences);
    bool sent = send_ids(j, hold ? CONVOKE__CONTROL__TO_LEADER__KIND_HOLD : CONVOKE__CONTROL__TO_LEADER__KIND_RELEASE, ids, n);
    for (int i = 0; sent && i < n; i++)
        sequence_set_hold(&j->sequences, ids[i], hold);
    if (!had_work)
        j->work_since = clock_seconds();
    pthread_mutex_unlock(&j->lock);
    return sent;
}

bool job_clear_prefix_cache(job *j)
{
    pthread_mutex_lock(&j->lock);
    bool sent = send_ids(j, CONVOKE__CONTROL__TO_LEADER__KIND_CLEAR_PREFIX_CACHE, NULL, 0);
    pthread_mutex_unlock(&j->lock);
    return sent;
}

bool job_ask_statistics(job *j, uint64_t id)
{
    Convoke__Control__StatisticsRequest request = CONVOKE__CONTROL__STATISTICS_REQUEST__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_STATISTICS;
    message.statistics = &request;
    request.id = id;
    pthread_mutex_lock(&j->lock);
    request.launch = j->accepting_launch;
    bool sent = send_to_leader(j, &message);
    pthread_mutex_unlock(&j->lock);
    return sent;
}

bool job_replan(job *j, const job_plan *plan, uint64_t bytes_per_second)
{
    Convoke__Control__Replan replan = CONVOKE__CONTROL__REPLAN__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_REPLAN;
    message.replan = &replan;
    replan.epoch = plan->epoch;
    replan.plan_json = (char *)plan->json;
    replan.name = (char *)plan->name;
    replan.bytes_per_second = bytes_per_second;
    pthread_mutex_lock(&j->lock);
    replan.launch = j->accepting_launch;
    bool sent = send_to_leader(j, &message);
    pthread_mutex_unlock(&j->lock);
    return sent;
}
