/* coordinator.c - ties requests, journal, workers and metrics together. Each part has its own lock; the one here guards the few
 * facts that doors ask for. Order of locks: requests, then job; nothing is called with the lock here held, but for the watcher of
 * the state, with one of its own, so that a door that has stopped watching can go. */
#include "cluster/coordinator_run.h"

#include "cluster/model_settings.h"
#include "cluster/requests_workers.h"
#include "proto/clock.h"
#include "proto/console.h"
#include "proto/control.h"
#include "proto/log.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { MAX_TOKEN_BYTES = 512, SUMMARY_RANKS = 4096 };

/* A string handed out by coordinator_info; lives as long as the coordinator. */
typedef struct interned {
    struct interned *next;
    char text[];
} interned;

typedef struct {
    void (*changed)(void *arg, serving_state state);
    void *arg;
} state_watcher;

struct coordinator {
    coordinator_options options;
    model_settings settings;
    char instance[33], admin_token[MAX_TOKEN_BYTES];
    const char *model_names[1];
    tokenizer *tokenizer;
    journal *journal;
    metrics *metrics;
    requests *requests;
    job *job;
    live_plan *plan;
    console console;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    interned *strings;
    coordinator_info info;
    serving_state state;
    bool was_ready, draining, paused, replayed;
    journal_launch launch; /* as noted last */
    char last_sentence[1024];
    state_watcher watcher; /* guarded by watch_lock, which is held while it is called */
    pthread_mutex_t watch_lock;
    /* of the workers, as last reported */
    uint64_t n_launches, kv_free, prefix_queries, prefix_hits;
    double rate_at, generated_per_second;
    unsigned long long rate_tokens;
    int *layer_numbers;
    int n_layers;
    /* what all launches have done, for the last word: of those before this one, and of this one */
    uint64_t earlier_rows[SUMMARY_RANKS], rows[SUMMARY_RANKS], earlier_bytes[3], bytes[3];
};

/* ---- small things ---------------------------------------------------------------------------------------------------------- */

/* With the lock held. */
static const char *intern(coordinator *c, const char *text)
{
    for (interned *i = c->strings; i; i = i->next)
        if (strcmp(i->text, text) == 0)
            return i->text;
    interned *new = malloc(sizeof *new + strlen(text) + 1);
    if (!new)
        return "";
    strcpy(new->text, text);
    new->next = c->strings;
    c->strings = new;
    return new->text;
}

static void set_state(coordinator *c, serving_state state)
{
    pthread_mutex_lock(&c->watch_lock);
    pthread_mutex_lock(&c->lock);
    bool same = c->state == state;
    c->state = state;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    if (!same && c->watcher.changed)
        c->watcher.changed(c->watcher.arg, state);
    pthread_mutex_unlock(&c->watch_lock);
}

static void make_instance(char instance[33])
{
    unsigned char bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
        memset(bytes, (int)time(NULL), sizeof bytes);
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(instance + 2 * i, 3, "%02x", bytes[i]);
}

static status read_admin_token(const char *path, char token[MAX_TOKEN_BYTES])
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, token, MAX_TOKEN_BYTES - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n < 0)
        return status_fail(STATUS_IO, "%s: cannot be read: %m", path);
    while (n > 0 && strchr(" \t\r\n", token[n - 1]))
        n--;
    token[n] = '\0';
    return n >= 16 ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: an admin token has at least 16 characters", path);
}

/* ---- to the workers -------------------------------------------------------------------------------------------------------- */

static void backend_submit(void *arg, Convoke__Control__Sequence *const *sequences, int n)
{
    job_submit(((coordinator *)arg)->job, sequences, n);
}

static void backend_cancel(void *arg, const uint64_t *ids, int n)
{
    job_cancel(((coordinator *)arg)->job, ids, n);
}

static void backend_hold(void *arg, const uint64_t *ids, int n, bool hold)
{
    job_hold(((coordinator *)arg)->job, ids, n, hold);
}

static bool backend_ask_statistics(void *arg, uint64_t id)
{
    return job_ask_statistics(((coordinator *)arg)->job, id);
}

static bool backend_replan(void *arg, const job_plan *plan, uint64_t bytes_per_second)
{
    return job_replan(((coordinator *)arg)->job, plan, bytes_per_second);
}

/* ---- from the workers; on the job's thread -----------------------------------------------------------------------------------
 */

static requests_limits limits_of(const Convoke__Control__Ready *ready)
{
    requests_limits l = {.vocab = (int)ready->vocab,
                         .max_length = (int)ready->max_length,
                         .kv_block = (int)ready->kv_block,
                         .n_ranks = (int)ready->n_kv_blocks_of_rank};
    for (size_t r = 0; r < ready->n_kv_blocks_of_rank; r++)
        if ((int)ready->kv_blocks_of_rank[r] > l.largest_kv_blocks)
            l.largest_kv_blocks = (int)ready->kv_blocks_of_rank[r];
    for (size_t i = 0; i < ready->n_eos_ids && l.n_eos < (int)(sizeof l.eos_ids / sizeof *l.eos_ids); i++)
        l.eos_ids[l.n_eos++] = ready->eos_ids[i];
    return l;
}

static int count_nodes(const Convoke__Control__Hello *hello)
{
    uint32_t most = 0;
    for (size_t r = 0; r < hello->n_node_of_rank; r++)
        if (hello->node_of_rank[r] > most)
            most = hello->node_of_rank[r];
    return (int)most + 1;
}

/* With the lock held. */
static void note_eos(coordinator *c, const Convoke__Control__Ready *ready)
{
    if (c->info.eos_ids || ready->n_eos_ids == 0)
        return; /* a model's own: they do not change from launch to launch */
    int32_t *ids = malloc(ready->n_eos_ids * sizeof *ids);
    if (!ids)
        return;
    memcpy(ids, ready->eos_ids, ready->n_eos_ids * sizeof *ids);
    c->info.eos_ids = ids;
    c->info.n_eos = (int)ready->n_eos_ids;
}

/* With the lock held. */
static void note_layers(coordinator *c, const Convoke__Control__Ready *ready)
{
    if (c->layer_numbers || ready->n_layers == 0)
        return;
    c->layer_numbers = malloc(ready->n_layers * sizeof *c->layer_numbers);
    for (size_t i = 0; c->layer_numbers && i < ready->n_layers; i++)
        c->layer_numbers[i] = (int)ready->layers[i];
    c->n_layers = c->layer_numbers ? (int)ready->n_layers : 0;
}

static void note_ready(coordinator *c, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    pthread_mutex_lock(&c->lock);
    coordinator_info *i = &c->info;
    i->isa = intern(c, ready->isa);
    i->combine = intern(c, ready->combine);
    i->plan_name = intern(c, ready->plan_name);
    i->plan_epoch = ready->plan_epoch;
    i->launch = ready->launch;
    i->n_ranks = (int)hello->n_ranks;
    i->n_nodes = count_nodes(hello);
    i->vocab = (int)ready->vocab;
    i->max_length = (int)ready->max_length;
    i->kv_block = (int)ready->kv_block;
    i->max_running = (int)ready->max_sequences;
    i->max_batched_tokens = (int)ready->max_batched_tokens;
    i->kv_blocks = 0;
    for (size_t r = 0; r < ready->n_kv_blocks_of_rank; r++)
        i->kv_blocks += ready->kv_blocks_of_rank[r];
    note_eos(c, ready);
    note_layers(c, ready);
    for (int r = 0; r < SUMMARY_RANKS; r++) {
        c->earlier_rows[r] += c->rows[r];
        c->rows[r] = 0;
    }
    for (int k = 0; k < 3; k++) {
        c->earlier_bytes[k] += c->bytes[k];
        c->bytes[k] = 0;
    }
    c->kv_free = i->kv_blocks;
    c->n_launches++;
    c->was_ready = true;
    c->launch = (journal_launch){.launch = ready->launch, .plan_epoch = ready->plan_epoch};
    snprintf(c->launch.isa, sizeof c->launch.isa, "%s", ready->isa);
    snprintf(c->launch.combine, sizeof c->launch.combine, "%s", ready->combine);
    journal_launch launch = c->launch;
    pthread_mutex_unlock(&c->lock);
    journal_note_launch(c->journal, &launch);
}

/* Another plan went live while serving. */
static void on_live_plan(void *arg, const char *name, uint64_t epoch)
{
    coordinator *c = arg;
    pthread_mutex_lock(&c->lock);
    c->info.plan_name = intern(c, name);
    c->info.plan_epoch = epoch;
    c->launch.plan_epoch = epoch;
    journal_launch launch = c->launch;
    pthread_mutex_unlock(&c->lock);
    journal_note_launch(c->journal, &launch);
}

static void take_up_journal(coordinator *c)
{
    if (c->replayed)
        return;
    c->replayed = true;
    if (requests_replay(c->requests) != STATUS_OK)
        log_line("%s; what came before it in the journal was taken up", status_message());
    requests_counts n;
    requests_count(c->requests, &n);
    if (n.n_live > 0)
        log_line("journal: %d requests go on from their last tokens", n.n_live);
}

static void begin_drain(coordinator *c)
{
    requests_refuse_new(c->requests, REFUSAL_UNAVAILABLE, "the server is shutting down");
    set_state(c, SERVING_DRAINING);
}

static void on_ready(void *arg, const Convoke__Control__Ready *ready, const Convoke__Control__Hello *hello)
{
    coordinator *c = arg;
    console_erase(&c->console);
    note_ready(c, ready, hello);
    live_plan_ready(c->plan, ready, hello);
    requests_limits limits = limits_of(ready);
    requests_set_limits(c->requests, &limits);
    take_up_journal(c);
    requests_workers_ready(c->requests);
    if (coordinator_is_draining(c))
        return;
    requests_refuse_new(c->requests, REFUSAL_NONE, "");
    set_state(c, SERVING_READY);
    if (coordinator_is_draining(c)) /* told so between these lines */
        begin_drain(c);
}

static void on_state(void *arg, job_state state, uint64_t launch, const char *sentence)
{
    coordinator *c = arg;
    (void)launch;
    console_erase(&c->console);
    if (sentence && *sentence) {
        log_line("%s", sentence);
        pthread_mutex_lock(&c->lock);
        snprintf(c->last_sentence, sizeof c->last_sentence, "%s", sentence);
        pthread_mutex_unlock(&c->lock);
    }
    if (state == JOB_RESTARTING || state == JOB_GIVEN_UP || state == JOB_STOPPED) {
        requests_workers_lost(c->requests);
        live_plan_lost(c->plan);
    }
    if (state == JOB_GIVEN_UP) {
        char why[512];
        snprintf(why, sizeof why, "the workers failed too often: %.400s", sentence ? sentence : "");
        requests_refuse_new(c->requests, REFUSAL_UNAVAILABLE, why);
        requests_end_all(c->requests, REFUSAL_UNAVAILABLE, why);
        set_state(c, SERVING_GIVEN_UP);
    } else if (state == JOB_RESTARTING && !coordinator_is_draining(c)) {
        set_state(c, SERVING_RESTARTING);
    }
}

static void on_progress(void *arg, const Convoke__Control__Progress *p)
{
    coordinator *c = arg;
    char line[512];
    size_t at = 0;
    for (size_t r = 0; r < p->n_done_of_rank && r < p->n_total_of_rank && at + 40 < sizeof line; r++) {
        double total = p->total_of_rank[r] > 0 ? (double)p->total_of_rank[r] : 1;
        at += (size_t)snprintf(line + at, sizeof line - at, "  rank %zu %3.0f %%", r, 100 * (double)p->done_of_rank[r] / total);
    }
    if (c->options.show_progress)
        console_show(&c->console, "%s:%.*s", p->stage, (int)at, line);
}

static uint64_t sum_u32(const uint32_t *numbers, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += numbers[i];
    return sum;
}

static void report_metrics(coordinator *c, const Convoke__Control__Report *r, double kv_usage)
{
    metric_workers w = {.n_running = (int)r->n_running,
                        .n_waiting = (int)r->n_waiting,
                        .kv_usage = kv_usage,
                        .n_preempted = r->n_preempted,
                        .prefix_queries = r->prefix_queries,
                        .prefix_hits = r->prefix_hits,
                        .rows_of_rank = r->tokens_of_rank,
                        .lateness_of_rank = r->lateness_of_rank,
                        .n_ranks = (int)r->n_tokens_of_rank,
                        .load_max_over_mean = r->load_max_over_mean,
                        .layer_numbers = c->layer_numbers,
                        .n_layers = (int)r->n_load_max_over_mean <= c->n_layers ? (int)r->n_load_max_over_mean : c->n_layers,
                        .plan_epoch = c->info.plan_epoch,
                        .launches = c->n_launches};
    for (size_t i = 0; i < r->n_link_bytes && i < 3; i++)
        w.link_bytes[i] = r->link_bytes[i];
    metrics_workers(c->metrics, &w);
    metrics_step(c->metrics, r->step_seconds, (int)r->prefill_rows, (int)r->decode_rows);
}

static void on_report(void *arg, const Convoke__Control__Report *r)
{
    coordinator *c = arg;
    requests_workers_report(c->requests, r);
    if (r->partial)
        return; /* more of this step follows; the numbers come with its last part */
    pthread_mutex_lock(&c->lock);
    c->kv_free = sum_u32(r->kv_free_of_rank, r->n_kv_free_of_rank);
    c->prefix_queries = r->prefix_queries;
    c->prefix_hits = r->prefix_hits;
    for (size_t k = 0; k < r->n_tokens_of_rank && k < SUMMARY_RANKS; k++)
        c->rows[k] = r->tokens_of_rank[k];
    for (size_t k = 0; k < r->n_link_bytes && k < 3; k++)
        c->bytes[k] = r->link_bytes[k];
    double usage = c->info.kv_blocks > 0 ? 1 - (double)c->kv_free / (double)c->info.kv_blocks : 0;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    live_plan_report(c->plan, r);
    report_metrics(c, r, usage);
}

static bool on_plan_wanted(void *arg, const Convoke__Control__Hello *hello, job_plan *out)
{
    return live_plan_begin(((coordinator *)arg)->plan, hello, out);
}

static void on_statistics(void *arg, const Convoke__Control__Statistics *statistics)
{
    live_plan_statistics(((coordinator *)arg)->plan, statistics);
}

/* ---- life --------------------------------------------------------------------------------------------------------------------
 */

static status create_requests(coordinator *c)
{
    static const requests_backend backend = {.submit = backend_submit, .cancel = backend_cancel, .hold = backend_hold};
    const coordinator_options *o = &c->options;
    requests_options r = {.model_names = c->model_names,
                          .n_model_names = 1,
                          .tokenizer = c->tokenizer,
                          .defaults = c->settings.defaults,
                          .max_waiting = o->max_waiting,
                          .max_sequences_of_request = o->max_sequences_of_request,
                          .max_unread_bytes = o->max_unread_bytes,
                          .remember_seconds = o->remember_seconds,
                          .max_remembered = 4096,
                          .journal = c->journal,
                          .metrics = c->metrics,
                          .pin_owner = o->job.combine && strcmp(o->job.combine, "fast") == 0,
                          .log_requests = o->log_requests};
    return requests_create(&r, &backend, c, &c->requests);
}

/* What the journal's requests were computed under; with another combine mode or instruction set tokens may differ, so it is said.
 */
static status open_journal(coordinator *c)
{
    TRY(journal_open(c->options.journal_path, c->options.journal_commit_ms, &c->journal));
    journal_launch last = {0};
    TRY(journal_last_launch(c->journal, &last));
    c->options.job.first_launch = last.launch + 1;
    if (last.launch > 0 && c->options.job.combine && strcmp(last.combine, c->options.job.combine) != 0)
        log_line("journal: its requests ran with combine %s, now it is %s: continued ones may differ", last.combine,
                 c->options.job.combine);
    if (last.launch > 0 && !c->options.job.isa && *last.isa) {
        pthread_mutex_lock(&c->lock);
        c->options.job.isa = intern(c, last.isa);
        pthread_mutex_unlock(&c->lock);
    }
    return STATUS_OK;
}

static status create_plan(coordinator *c)
{
    static const live_plan_backend backend = {
        .ask_statistics = backend_ask_statistics, .send = backend_replan, .live = on_live_plan};
    live_plan_options o = c->options.plan;
    o.model_dir = c->options.job.model_dir;
    o.plan_path = c->options.job.plan_path;
    o.topology_path = c->options.job.topology_path;
    c->options.job.count_pairs = o.mode != REPLAN_OFF;
    if (o.mode == REPLAN_APPLY && c->options.job.combine && strcmp(c->options.job.combine, "fast") == 0)
        log_line("with combine fast the tokens of running streams may change when a plan goes live");
    return live_plan_create(&o, &backend, c, &c->plan);
}

static status create_parts(coordinator *c)
{
    const coordinator_options *o = &c->options;
    TRY(model_settings_read(o->job.model_dir, &c->settings));
    c->model_names[0] = o->served_name ? o->served_name : c->settings.name;
    c->info = (coordinator_info){.model_name = c->model_names[0],
                                 .model_dir = o->job.model_dir,
                                 .instance = c->instance,
                                 .isa = "",
                                 .combine = "",
                                 .plan_name = "",
                                 .started = (double)time(NULL)};
    if (c->settings.has_tokenizer)
        TRY(tokenizer_load(o->job.model_dir, &c->tokenizer));
    if (o->admin_token_file)
        TRY(read_admin_token(o->admin_token_file, c->admin_token));
    TRY(metrics_create(c->model_names[0], &c->metrics));
    TRY(create_plan(c));
    TRY(open_journal(c));
    return create_requests(c);
}

status coordinator_create(const coordinator_options *options, coordinator **out)
{
    coordinator *c = calloc(1, sizeof *c);
    if (!c)
        return status_fail(STATUS_NO_MEMORY, "no memory for the coordinator");
    c->options = *options;
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->watch_lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    make_instance(c->instance);
    console_open(&c->console, STDERR_FILENO);
    status st = create_parts(c);
    if (st != STATUS_OK) {
        coordinator_destroy(c);
        return st;
    }
    *out = c;
    return STATUS_OK;
}

status coordinator_start(coordinator *c)
{
    static const job_listener listener = {.state = on_state,
                                          .progress = on_progress,
                                          .ready = on_ready,
                                          .report = on_report,
                                          .plan = on_plan_wanted,
                                          .statistics = on_statistics};
    return job_start(&c->options.job, &listener, c, &c->job);
}

void coordinator_destroy(coordinator *c)
{
    if (!c)
        return;
    job_stop(c->job);
    live_plan_destroy(c->plan);
    requests_destroy(c->requests);
    journal_close(c->journal);
    metrics_destroy(c->metrics);
    tokenizer_destroy(c->tokenizer);
    for (interned *i = c->strings, *next; i; i = next) {
        next = i->next;
        free(i);
    }
    free((void *)c->info.eos_ids);
    free(c->layer_numbers);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->watch_lock);
    pthread_cond_destroy(&c->changed);
    free(c);
}

static void measure_rate(coordinator *c)
{
    requests_counts n;
    requests_count(c->requests, &n);
    double now = clock_seconds();
    pthread_mutex_lock(&c->lock);
    double seconds = now - c->rate_at;
    if (seconds >= 1) {
        double rate = c->rate_at > 0 ? (double)(n.generated_tokens - c->rate_tokens) / seconds : 0;
        c->generated_per_second += 0.3 * (rate - c->generated_per_second);
        c->rate_tokens = n.generated_tokens;
        c->rate_at = now;
    }
    pthread_mutex_unlock(&c->lock);
}

static void show_plan(void *arg, const live_plan_numbers *n)
{
    metric_plan p = {
        .balance = n->balance, .drift = n->drift, .tokens = n->tokens, .n_ranks = n->n_ranks, .share_of_rank = n->share_of_rank};
    for (int i = 0; i < N_REPLAN_OUTCOMES; i++)
        p.attempts[i] = n->outcomes[i];
    metrics_plan(arg, &p);
}

void coordinator_tick(coordinator *c)
{
    requests_tick(c->requests);
    measure_rate(c);
    live_plan_tick(c->plan);
    live_plan_look(c->plan, show_plan, c->metrics);
    const char *trouble = journal_trouble(c->journal);
    if (*trouble)
        log_line("%s", trouble);
}

/* "rank 0 52 %, rank 1 48 %", or the busiest over the mean where there are too many to list. */
static void say_shares(char *to, size_t size, const uint64_t *rows, int n, uint64_t sum)
{
    int busiest = 0;
    size_t at = 0;
    *to = '\0';
    for (int r = 0; r < n; r++) {
        busiest = rows[r] > rows[busiest] ? r : busiest;
        if (n <= 8 && at < size)
            at += (size_t)snprintf(to + at, size - at, "%srank %d %.0f %%", r ? ", " : "", r,
                                   100.0 * (double)rows[r] / (double)sum);
    }
    if (n > 8)
        snprintf(to, size, "%d ranks, the busiest (%d) %.2fx the mean", n, busiest, (double)rows[busiest] * n / (double)sum);
}

void coordinator_say_summary(coordinator *c)
{
    requests_counts n;
    requests_count(c->requests, &n);
    uint64_t rows[SUMMARY_RANKS], sum = 0, bytes[3], all_bytes = 0;
    pthread_mutex_lock(&c->lock);
    int n_ranks = c->info.n_ranks < SUMMARY_RANKS ? c->info.n_ranks : SUMMARY_RANKS;
    for (int r = 0; r < n_ranks; r++)
        sum += rows[r] = c->earlier_rows[r] + c->rows[r];
    for (int k = 0; k < 3; k++)
        all_bytes += bytes[k] = c->earlier_bytes[k] + c->bytes[k];
    pthread_mutex_unlock(&c->lock);
    if (sum == 0)
        return;
    char shares[256];
    say_shares(shares, sizeof shares, rows, n_ranks, sum);
    log_line("served %llu prompt tokens and %llu new ones; the experts' work: %s", n.prompt_tokens, n.generated_tokens, shares);
    if (n_ranks > 1 && all_bytes > 0)
        log_line("rows between ranks: %s kept to themselves, %s inside a node, %s between nodes",
                 human_bytes((double)bytes[0]).text, human_bytes((double)bytes[1]).text, human_bytes((double)bytes[2]).text);
}

/* ---- what doors ask
 * ------------------------------------------------------------------------------------------------------------ */

void coordinator_get_info(coordinator *c, coordinator_info *out)
{
    pthread_mutex_lock(&c->lock);
    *out = c->info;
    pthread_mutex_unlock(&c->lock);
}

void coordinator_get_load(coordinator *c, coordinator_load *out)
{
    requests_counts n;
    requests_count(c->requests, &n);
    pthread_mutex_lock(&c->lock);
    const coordinator_info *i = &c->info;
    unsigned long long block = (unsigned long long)i->kv_block;
    *out = (coordinator_load){.state = c->state,
                              .n_running = n.n_started,
                              .n_waiting = n.n_waiting,
                              .kv_usage = i->kv_blocks > 0 ? 1 - (double)c->kv_free / (double)i->kv_blocks : 0,
                              .kv_tokens_used = (i->kv_blocks - c->kv_free) * block,
                              .kv_tokens = i->kv_blocks * block,
                              .prompt_tokens = n.prompt_tokens,
                              .generated_tokens = n.generated_tokens,
                              .prefix_queries = c->prefix_queries,
                              .prefix_hits = c->prefix_hits,
                              .generated_per_second = c->generated_per_second,
                              .n_ranks = i->n_ranks};
    pthread_mutex_unlock(&c->lock);
}

const tokenizer *coordinator_tokenizer(coordinator *c)
{
    return c->tokenizer;
}

const char *coordinator_model_dir(coordinator *c)
{
    return c->options.job.model_dir;
}

requests *coordinator_requests(coordinator *c)
{
    return c->requests;
}

metrics *coordinator_metrics(coordinator *c)
{
    return c->metrics;
}

serving_state coordinator_state(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    serving_state state = c->state;
    pthread_mutex_unlock(&c->lock);
    return state;
}

void coordinator_watch_state(coordinator *c, void (*changed)(void *arg, serving_state state), void *arg)
{
    pthread_mutex_lock(&c->watch_lock);
    c->watcher = (state_watcher){changed, arg};
    pthread_mutex_unlock(&c->watch_lock);
}

bool coordinator_was_ready(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool was = c->was_ready;
    pthread_mutex_unlock(&c->lock);
    return was;
}

bool coordinator_is_draining(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool draining = c->draining;
    pthread_mutex_unlock(&c->lock);
    return draining;
}

bool coordinator_is_idle(coordinator *c)
{
    requests_counts n;
    requests_count(c->requests, &n);
    return n.n_live == 0;
}

void coordinator_last_sentence(coordinator *c, char *sentence, size_t size)
{
    pthread_mutex_lock(&c->lock);
    snprintf(sentence, size, "%s", c->last_sentence);
    pthread_mutex_unlock(&c->lock);
}

/* ---- admins
 * -------------------------------------------------------------------------------------------------------------------- */

static bool is_loopback(const char *peer)
{
    static const char *const starts[] = {"ipv4:127.",         "ipv6:[::1]",          "ipv6:%5B::1%5D",
                                         "ipv6:[::ffff:127.", "ipv6:%5B::ffff:127.", "unix:"};
    for (size_t i = 0; peer && i < sizeof starts / sizeof *starts; i++)
        if (strncmp(peer, starts[i], strlen(starts[i])) == 0)
            return true;
    return false;
}

bool coordinator_admin_ok(coordinator *c, const char *peer, const char *token)
{
    if (*c->admin_token && token && control_bytes_equal(c->admin_token, strlen(c->admin_token), token, strlen(token)))
        return true;
    return is_loopback(peer);
}

/* Waits, at most ten minutes, until nothing runs. */
static status wait_until_still(coordinator *c)
{
    double until = clock_seconds() + 600;
    for (;;) {
        requests_counts n;
        requests_count(c->requests, &n);
        if (n.n_begun == 0)
            return STATUS_OK;
        if (clock_seconds() > until)
            return status_fail(STATUS_STOPPED, "%d sequences still run after 10 minutes; new ones are held back", n.n_begun);
        pthread_mutex_lock(&c->lock);
        bool over = !c->paused || c->state == SERVING_GIVEN_UP || c->state == SERVING_STOPPED;
        struct timespec at;
        clock_gettime(CLOCK_REALTIME, &at);
        at.tv_nsec += 50 * 1000 * 1000;
        at.tv_sec += at.tv_nsec / 1000000000;
        at.tv_nsec %= 1000000000;
        if (!over)
            pthread_cond_timedwait(&c->changed, &c->lock, &at);
        pthread_mutex_unlock(&c->lock);
        if (over)
            return STATUS_OK;
    }
}

status coordinator_pause(coordinator *c, pause_mode mode, bool clear_cache)
{
    pthread_mutex_lock(&c->lock);
    c->paused = true;
    pthread_mutex_unlock(&c->lock);
    requests_pause(c->requests, true, mode == PAUSE_KEEP);
    if (mode == PAUSE_ABORT)
        requests_end_all(c->requests, REFUSAL_NONE, "");
    if (mode == PAUSE_WAIT)
        TRY(wait_until_still(c));
    if (clear_cache && coordinator_was_ready(c)) /* before, there is no cache, nor perhaps a job */
        job_clear_prefix_cache(c->job);
    return STATUS_OK;
}

status coordinator_resume(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    c->paused = false;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    requests_pause(c->requests, false, false);
    return STATUS_OK;
}

bool coordinator_is_paused(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool paused = c->paused;
    pthread_mutex_unlock(&c->lock);
    return paused;
}

status coordinator_replan(coordinator *c, plan_take take)
{
    return live_plan_ask(c->plan, take);
}

void coordinator_describe_plan(coordinator *c, bytes_writer *out)
{
    live_plan_describe(c->plan, out);
}

void coordinator_shutdown(coordinator *c)
{
    pthread_mutex_lock(&c->lock);
    bool first = !c->draining;
    c->draining = true;
    c->paused = false;
    pthread_mutex_unlock(&c->lock);
    if (!first)
        return;
    requests_pause(c->requests, false, false); /* what was frozen may finish */
    begin_drain(c);
}

void coordinator_end_requests(coordinator *c)
{
    requests_end_all(c->requests, REFUSAL_UNAVAILABLE, "the server shut down before the request was finished");
}
