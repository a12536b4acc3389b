#include "cluster/serve.h"

#include "cluster/coordinator_run.h"
#include "cluster/door_grpc.h"
#include "cluster/door_http.h"
#include "proto/clock.h"
#include "proto/control.h"
#include "proto/log.h"
#include "proto/options.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    const char *model, *plan, *served_name, *hostfile, *grpc, *http, *journal, *admin_token_file, *control, *secret_file;
    const char *tls_cert, *tls_key, *tls_client_ca, *mpirun, *mpirun_args, *worker;
    int64_t ranks, threads, max_batch, max_length, kv_bytes, queue, max_n, max_message, max_streams, reader_bytes;
    int64_t journal_commit_ms, max_failures, statistics_tokens, plan_threads, extra_slots, replan_rate;
    const char *plan_dir, *planner, *plan_solver, *topology;
    double statistics_seconds, plan_seconds, replan_balance, replan_drift, replan_pause, replan_payback;
    int replan, replicas, owners;
    double step_ms, hang_seconds, load_seconds, failure_minutes, drain_seconds, reader_seconds, remember_seconds;
    int combine, rows, weights;
    bool wait_for_workers, prefix_cache, log_requests;
} serve_options;

static const char combines[] = "exact|fixed|fast", rows_formats[] = "fp32|bf16", weights_modes[] = "map|copy",
                  replica_choices[] = "owner-first|round-robin|step", owner_rules[] = "spread|affinity";

static status parse(int argc, char **argv, serve_options *o, options_wish *wish)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &o->model, .argument = "DIR", .environment = "CONVOKE_MODEL", .required = true,
         .help = "checkpoint folder in Hugging Face form"},
        {"served-model-name", OPTION_STRING, &o->served_name, .argument = "NAME",
         .help = "what clients call it (default: the folder)"},
        {"ranks", OPTION_INT, &o->ranks, .argument = "N", .environment = "CONVOKE_RANKS", .fallback = "1", .min = 1, .max = 4096,
         .help = "workers, started by mpirun"},
        {"hostfile", OPTION_STRING, &o->hostfile, .argument = "FILE", .help = "machines to start them on (Open MPI's form)"},
        {"plan", OPTION_STRING, &o->plan, .argument = "PLAN.json|auto",
         .help = "which ranks hold which expert; auto: as kept from the last run (default: contiguous)"},
        {"plan-dir", OPTION_STRING, &o->plan_dir, .argument = "DIR", .environment = "CONVOKE_PLAN_DIR",
         .help = "where plans are kept (default: convoke/plans in $XDG_STATE_HOME or ~/.local/state)"},
        {"replan", OPTION_CHOICE, &o->replan, .choices = "off|suggest|apply", .fallback = "off",
         .help = "plan anew when balance or drift say so, and say what it would bring, or do it while serving"},
        {"replicas", OPTION_CHOICE, &o->replicas, .choices = replica_choices, .fallback = "owner-first",
         .help = "which copy of an expert computes a row; step: by the step's load"},
        {"owners", OPTION_CHOICE, &o->owners, .choices = owner_rules, .fallback = "spread",
         .help = "where sequences live; affinity: near their experts, after their first prompt tokens"},
        {"topology", OPTION_STRING, &o->topology, .argument = "TOPOLOGY.json",
         .help = "what computing and sending cost (convoke-plan probe), for plans, replicas and owners"},
        {"statistics-seconds", OPTION_DOUBLE, &o->statistics_seconds, .argument = "S", .fallback = "10", .max = 86400,
         .help = "how often workers are asked what experts were chosen (0: never)"},
        {"statistics-tokens", OPTION_INT, &o->statistics_tokens, .argument = "N", .fallback = "262144", .min = 64, .max = 1e15,
         .help = "what is remembered of it: at most so many tokens, the latest"},
        {"planner", OPTION_STRING, &o->planner, .argument = "PROGRAM", .help = "default: convoke-plan beside this program"},
        {"plan-solver", OPTION_STRING, &o->plan_solver, .argument = "NAME", .fallback = "auto",
         .help = "how it plans (convoke-plan solve --solver list)"},
        {"plan-seconds", OPTION_DOUBLE, &o->plan_seconds, .argument = "S", .fallback = "20", .min = 0.1, .max = 86400,
         .help = "time for a new plan; a planner that is late is killed"},
        {"plan-threads", OPTION_INT, &o->plan_threads, .argument = "T", .fallback = "1", .min = 1, .max = 1024,
         .help = "threads of the planner, which runs niced"},
        {"extra-slots", OPTION_INT, &o->extra_slots, .argument = "N", .fallback = "0", .max = 4096,
         .help = "replicas per worker and layer that a new plan may use"},
        {"replan-balance", OPTION_DOUBLE, &o->replan_balance, .argument = "X", .fallback = "1.1", .min = 1, .max = 1e6,
         .help = "plan when the busiest worker computes more than so many times the mean ..."},
        {"replan-drift", OPTION_DOUBLE, &o->replan_drift, .argument = "X", .fallback = "0.1", .max = 1,
         .help = "... or traffic has moved by more than this (1 - cosine) from the plan's"},
        {"replan-pause", OPTION_DOUBLE, &o->replan_pause, .argument = "S", .fallback = "60", .max = 86400,
         .help = "between two plans; doubled, up to an hour, after each that came to nothing"},
        {"replan-payback", OPTION_DOUBLE, &o->replan_payback, .argument = "S", .fallback = "600", .max = 1e9,
         .help = "a plan whose move takes longer to pay at the present traffic is not used"},
        {"replan-rate", OPTION_SIZE, &o->replan_rate, .argument = "SIZE", .fallback = "256M",
         .help = "a worker loads experts for a new plan no faster than this, per second (0: it chooses)"},
        {"grpc", OPTION_STRING, &o->grpc, .argument = "HOST:PORT", .environment = "CONVOKE_GRPC", .fallback = "127.0.0.1:50051",
         .help = "where gRPC clients are answered (port 0: a free one)"},
        {"http", OPTION_STRING, &o->http, .argument = "HOST:PORT", .environment = "CONVOKE_HTTP",
         .help = "where /health and /metrics are answered (default: nowhere)"},
        {"threads", OPTION_INT, &o->threads, .argument = "T", .environment = "CONVOKE_THREADS", .fallback = "0", .max = 1024,
         .help = "threads per worker (0: the node's cores over its workers)"},
        {"max-batch", OPTION_INT, &o->max_batch, .argument = "B", .fallback = "64", .min = 1, .max = 65536,
         .help = "sequences running at once, over all workers"},
        {"max-length", OPTION_INT, &o->max_length, .argument = "L", .fallback = "0", .max = 1 << 24,
         .help = "longest sequence, prompt and output (0: the model's own limit)"},
        {"kv-bytes", OPTION_SIZE, &o->kv_bytes, .argument = "SIZE", .fallback = "0", .help = "KV cache per worker (0: chosen)"},
        {"combine", OPTION_CHOICE, &o->combine, .choices = combines, .fallback = "fixed",
         .help = "how experts' outputs are added up"},
        {"rows", OPTION_CHOICE, &o->rows, .choices = rows_formats, .fallback = "fp32", .help = "how token rows travel"},
        {"weights", OPTION_CHOICE, &o->weights, .choices = weights_modes, .fallback = "map",
         .help = "use weights where the file is mapped, or copy each worker's share"},
        {"step-ms", OPTION_DOUBLE, &o->step_ms, .argument = "MS", .fallback = "0", .max = 60000,
         .help = "what a step may take while prompts and running streams share it (0: measured)"},
        {"prefix-cache", OPTION_FLAG, &o->prefix_cache, .fallback = "true", .help = "keep the KV of prompts for later ones"},
        {"queue", OPTION_INT, &o->queue, .argument = "N", .fallback = "1024", .min = 1, .max = 1 << 20,
         .help = "sequences that may wait; more are refused"},
        {"max-n", OPTION_INT, &o->max_n, .argument = "N", .fallback = "64", .min = 1, .max = 4096,
         .help = "sequences of one request"},
        {"journal", OPTION_STRING, &o->journal, .argument = "FILE",
         .help = "keep requests on disk over a restart of this program"},
        {"journal-commit-ms", OPTION_INT, &o->journal_commit_ms, .argument = "MS", .fallback = "20", .max = 10000,
         .help = "tokens are written this much later at most"},
        {"remember-seconds", OPTION_DOUBLE, &o->remember_seconds, .argument = "S", .fallback = "60", .max = 86400,
         .help = "a finished request can be read again for so long"},
        {"admin-token-file", OPTION_STRING, &o->admin_token_file, .argument = "FILE",
         .help = "who shows its content may pause and shut down from elsewhere (default: from this machine only)"},
        {"control", OPTION_STRING, &o->control, .argument = "HOST:PORT", .fallback = "127.0.0.1:0", .help = "where workers join"},
        {"wait-for-workers", OPTION_FLAG, &o->wait_for_workers,
         .help = "do not start them: they come by Slurm, Kubernetes or hand"},
        {"secret-file", OPTION_STRING, &o->secret_file, .argument = "FILE",
         .help = "what workers that come by themselves must show"},
        {"hang-seconds", OPTION_DOUBLE, &o->hang_seconds, .argument = "S", .fallback = "20", .min = 0.5, .max = 3600,
         .help = "a step that takes longer is a hang: the workers are started again"},
        {"load-seconds", OPTION_DOUBLE, &o->load_seconds, .argument = "S", .fallback = "120", .min = 1, .max = 86400,
         .help = "loading without progress for longer has failed"},
        {"max-failures", OPTION_INT, &o->max_failures, .argument = "K", .fallback = "5", .min = 1, .max = 1000,
         .help = "give up after so many lost launches ..."},
        {"failure-minutes", OPTION_DOUBLE, &o->failure_minutes, .argument = "M", .fallback = "10", .max = 10000,
         .help = "... within so many minutes"},
        {"drain-seconds", OPTION_DOUBLE, &o->drain_seconds, .argument = "S", .fallback = "30", .max = 86400,
         .help = "how long running streams may take to finish after SIGTERM"},
        {"reader-seconds", OPTION_DOUBLE, &o->reader_seconds, .argument = "S", .fallback = "60", .min = 0.1, .max = 86400,
         .help = "a client that reads nothing for longer is dropped"},
        {"reader-bytes", OPTION_SIZE, &o->reader_bytes, .argument = "SIZE", .fallback = "4M", .min = 4096, .max = 1 << 30,
         .help = "output a client may leave unread before its sequences are held"},
        {"max-message", OPTION_SIZE, &o->max_message, .argument = "SIZE", .fallback = "16M", .min = 1024, .max = 1 << 30,
         .help = "largest request"},
        {"max-streams", OPTION_INT, &o->max_streams, .argument = "N", .fallback = "1024", .min = 1, .max = 1 << 20,
         .help = "calls at once on one connection"},
        {"tls-cert", OPTION_STRING, &o->tls_cert, .argument = "PEM", .help = "serve gRPC over TLS with this certificate"},
        {"tls-key", OPTION_STRING, &o->tls_key, .argument = "PEM", .help = "its key"},
        {"tls-client-ca", OPTION_STRING, &o->tls_client_ca, .argument = "PEM",
         .help = "ask clients for a certificate of this authority"},
        {"log-requests", OPTION_FLAG, &o->log_requests, .fallback = "true", .help = "one line per request"},
        {"mpirun", OPTION_STRING, &o->mpirun, .argument = "PROGRAM", .environment = "CONVOKE_MPIRUN",
         .help = "default: mpirun on PATH"},
        {"mpirun-args", OPTION_STRING, &o->mpirun_args, .argument = "ARGS", .environment = "CONVOKE_MPIRUN_ARGS",
         .help = "further arguments for it"},
        {"worker", OPTION_STRING, &o->worker, .argument = "PROGRAM", .environment = "CONVOKE_WORKER",
         .help = "default: convoke-worker beside this program"},
    };
    const option_table table = {.name = "convoke serve",
                                .summary = "Serves a Mixture-of-Experts model: starts workers, answers gRPC and HTTP clients.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    TRY(options_parse(&table, argc, argv, wish, NULL, NULL));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

static status check(const serve_options *o)
{
    char host[256], port[8];
    TRY(control_split_address("--grpc", o->grpc, host, port));
    if (o->http)
        TRY(control_split_address("--http", o->http, host, port));
    if ((o->tls_cert != NULL) != (o->tls_key != NULL))
        return status_fail(STATUS_USAGE, "--tls-cert and --tls-key belong together");
    if (o->tls_client_ca && !o->tls_cert)
        return status_fail(STATUS_USAGE, "--tls-client-ca needs --tls-cert and --tls-key");
    if (o->replan && o->statistics_seconds <= 0)
        return status_fail(STATUS_USAGE, "--replan needs --statistics-seconds above 0: plans are made from what is counted");
    if (o->wait_for_workers && !o->secret_file)
        return status_fail(STATUS_USAGE, "--wait-for-workers needs --secret-file: what the workers must show");
    return STATUS_OK;
}

/* The word at a place of "a|b|c", in static memory. */
static const char *choice_word(const char *choices, int place)
{
    static char words[5][16];
    static int next;
    char *word = words[next++ % 5];
    for (; place > 0; place--)
        choices = strchr(choices, '|') + 1;
    snprintf(word, sizeof words[0], "%.*s", (int)strcspn(choices, "|"), choices);
    return word;
}

static live_plan_options make_plan_options(const serve_options *o)
{
    live_plan_options p = {.mode = (replan_mode)o->replan,
                           .automatic = o->plan && strcmp(o->plan, "auto") == 0,
                           .dir = o->plan_dir,
                           .planner = o->planner,
                           .solver = o->plan_solver,
                           .statistics_seconds = o->statistics_seconds,
                           .plan_seconds = o->plan_seconds,
                           .plan_threads = (int)o->plan_threads,
                           .extra_slots = (int)o->extra_slots,
                           .window_tokens = (uint64_t)o->statistics_tokens,
                           .bytes_per_second = (uint64_t)o->replan_rate,
                           .limits = replan_usual_limits};
    p.limits.max_balance = o->replan_balance;
    p.limits.max_drift = o->replan_drift;
    p.limits.pause_seconds = o->replan_pause;
    p.limits.payback_seconds = o->replan_payback;
    return p;
}

static coordinator_options make_options(const serve_options *o)
{
    bool automatic = o->plan && strcmp(o->plan, "auto") == 0;
    return (coordinator_options){.job = {.n_ranks = (int)o->ranks,
                                         .hostfile = o->hostfile,
                                         .wait_for_workers = o->wait_for_workers,
                                         .mpirun = o->mpirun,
                                         .mpirun_args = o->mpirun_args,
                                         .worker = o->worker,
                                         .listen = o->control,
                                         .secret_file = o->secret_file,
                                         .model_dir = o->model,
                                         .plan_path = automatic ? NULL : o->plan,
                                         .replicas = choice_word(replica_choices, o->replicas),
                                         .owners = choice_word(owner_rules, o->owners),
                                         .topology_path = o->topology,
                                         .weights = choice_word(weights_modes, o->weights),
                                         .combine = choice_word(combines, o->combine),
                                         .rows = choice_word(rows_formats, o->rows),
                                         .threads = (int)o->threads,
                                         .max_sequences = (int)o->max_batch,
                                         .max_length = (int)o->max_length,
                                         .kv_bytes = (uint64_t)o->kv_bytes,
                                         .step_seconds = o->step_ms * 1e-3,
                                         .prefix_cache = o->prefix_cache,
                                         .hang_seconds = o->hang_seconds,
                                         .load_seconds = o->load_seconds,
                                         .max_failures = (int)o->max_failures,
                                         .failure_minutes = o->failure_minutes},
                                 .plan = make_plan_options(o),
                                 .served_name = o->served_name,
                                 .journal_path = o->journal,
                                 .journal_commit_ms = (int)o->journal_commit_ms,
                                 .admin_token_file = o->admin_token_file,
                                 .max_waiting = (int)o->queue,
                                 .max_sequences_of_request = (int)o->max_n,
                                 .max_unread_bytes = (size_t)o->reader_bytes,
                                 .remember_seconds = o->remember_seconds,
                                 .log_requests = o->log_requests,
                                 .show_progress = true};
}

typedef struct {
    coordinator *coordinator;
    door_grpc *grpc;
    door_http *http;
} server;

static status open_doors(server *s, const serve_options *o)
{
    door_grpc_options grpc = {.address = o->grpc,
                              .max_message = (size_t)o->max_message,
                              .max_streams = (int)o->max_streams,
                              .reader_seconds = o->reader_seconds,
                              .reader_bytes = (size_t)o->reader_bytes,
                              .tls_cert = o->tls_cert,
                              .tls_key = o->tls_key,
                              .tls_client_ca = o->tls_client_ca};
    TRY(door_grpc_start(s->coordinator, &grpc, &s->grpc));
    if (o->http)
        TRY(door_http_start(s->coordinator, coordinator_metrics(s->coordinator), o->http, &s->http));
    return STATUS_OK;
}

/* HOST of HOST:PORT. */
static int host_length(const char *address)
{
    const char *colon = strrchr(address, ':');
    return colon ? (int)(colon - address) : (int)strlen(address);
}

static void say_ready(const server *s, const serve_options *o)
{
    coordinator_info i;
    coordinator_get_info(s->coordinator, &i);
    printf("ready: grpc %.*s:%d, model %s, %d ranks, plan %s, %d sequences, %llu KV tokens", host_length(o->grpc), o->grpc,
           door_grpc_port(s->grpc), i.model_name, i.n_ranks, *i.plan_name ? i.plan_name : "contiguous", i.max_running,
           i.kv_blocks * (unsigned long long)i.kv_block);
    if (s->http)
        printf(", http %.*s:%d", host_length(o->http), o->http, door_http_port(s->http));
    printf("\n");
    fflush(stdout);
}

/* A signal, or 0 after a quarter of a second. */
static int next_signal(const sigset_t *set)
{
    const struct timespec quarter = {.tv_nsec = 250 * 1000 * 1000};
    int signal = sigtimedwait(set, NULL, &quarter);
    return signal > 0 ? signal : 0;
}

/* Workers that fail before they ever served would fail again: a wrong model or option is said at once. */
static status check_start(server *s, const serve_options *o, bool *ready)
{
    serving_state state = coordinator_state(s->coordinator);
    if (*ready || o->wait_for_workers || coordinator_was_ready(s->coordinator))
        return STATUS_OK;
    if (state == SERVING_RESTARTING || state == SERVING_GIVEN_UP) {
        char why[1024];
        coordinator_last_sentence(s->coordinator, why, sizeof why);
        return status_fail(STATUS_IO, "the workers ended before they could serve%s", *why ? "" : ", without a word");
    }
    return STATUS_OK;
}

static status run_until_told(server *s, const serve_options *o, const sigset_t *set)
{
    bool ready = false;
    while (!coordinator_is_draining(s->coordinator)) {
        if (next_signal(set))
            coordinator_shutdown(s->coordinator);
        TRY(check_start(s, o, &ready));
        if (!ready && coordinator_was_ready(s->coordinator)) {
            ready = true;
            say_ready(s, o);
        }
        coordinator_tick(s->coordinator);
    }
    return STATUS_OK;
}

/* Running streams finish, until time or a second signal ends them. */
static void drain(server *s, const serve_options *o, const sigset_t *set)
{
    double until = clock_seconds() + o->drain_seconds;
    while (!coordinator_is_idle(s->coordinator) && clock_seconds() < until && !next_signal(set))
        coordinator_tick(s->coordinator);
    coordinator_end_requests(s->coordinator);
}

static void close_doors(server *s)
{
    door_http_stop(s->http);
    door_grpc_stop(s->grpc, 2);
}

static status serve(const serve_options *o)
{
    /* Signals are taken by this thread alone; all others are born with them blocked. */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    server s = {0};
    coordinator_options options = make_options(o);
    TRY(coordinator_create(&options, &s.coordinator));
    status st;
    TRY_GOTO(open_doors(&s, o), out);
    TRY_GOTO(coordinator_start(s.coordinator), out);
    TRY_GOTO(run_until_told(&s, o, &set), out);
    drain(&s, o, &set);
    coordinator_say_summary(s.coordinator);
out:
    close_doors(&s);
    coordinator_destroy(s.coordinator);
    return st;
}

int serve_command(int argc, char **argv)
{
    serve_options o = {0};
    options_wish wish = OPTIONS_RUN;
    status st = parse(argc, argv, &o, &wish);
    if (st == STATUS_OK && wish == OPTIONS_RUN)
        st = check(&o);
    if (st == STATUS_OK && wish == OPTIONS_RUN)
        st = serve(&o);
    if (st != STATUS_OK)
        log_line("%s", status_message());
    return status_exit_code(st);
}
