#include "cluster/job_parts.h"

#include "cluster/plan_store.h"
#include "placement/plan.h"
#include "placement/topology.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- options ---- */

static status own_text(const char **text)
{
    if (!*text)
        return STATUS_OK;
    *text = strdup(*text);
    return *text ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the job's options");
}

static const char **texts_of(job_options *o, int i)
{
    const char **all[] = {&o->hostfile,    &o->mpirun,    &o->mpirun_args, &o->worker,  &o->listen,
                          &o->secret_file, &o->model_dir, &o->plan_path,   &o->weights, &o->combine,
                          &o->rows,        &o->isa,       &o->replicas,    &o->owners,  &o->topology_path};
    return i < (int)(sizeof all / sizeof all[0]) ? all[i] : NULL;
}

static status copy_options(job *j, const job_options *options)
{
    job_options copy = *options;
    status st = STATUS_OK;
    for (int i = 0; texts_of(&copy, i); i++) {
        if (st == STATUS_OK)
            st = own_text(texts_of(&copy, i));
        else
            *texts_of(&copy, i) = NULL;
    }
    j->options = copy;
    return st;
}

void job_setup_clear(job *j)
{
    for (int i = 0; texts_of(&j->options, i); i++)
        free((char *)*texts_of(&j->options, i));
    hosts_clear(&j->hosts);
    free(j->plan_json);
    free(j->topology_json);
    explicit_bzero(&j->secret, sizeof j->secret);
}

static status find_programs(job *j)
{
    const char *name = j->options.mpirun ? j->options.mpirun : "mpirun";
    const char *path = launcher_find_program(name);
    if (!path)
        return status_fail(STATUS_USAGE, "%s cannot be executed%s", name, strchr(name, '/') ? "" : ": it is not on PATH");
    snprintf(j->mpirun, sizeof j->mpirun, "%s", path);
    path = j->options.worker ? launcher_find_program(j->options.worker) : launcher_find_beside("convoke-worker");
    if (!path)
        return status_fail(STATUS_USAGE, "%s cannot be executed",
                           j->options.worker ? j->options.worker : "convoke-worker, beside this program or on PATH,");
    snprintf(j->worker, sizeof j->worker, "%s", path);
    return STATUS_OK;
}

static status read_plan(job *j)
{
    plan p = {0};
    size_t size;
    const char *path = j->options.plan_path;
    if (!path)
        return STATUS_OK;
    TRY(plan_store_read(path, &j->plan_json, &size));
    TRY(plan_parse(path, j->plan_json, size, NULL, &p));
    snprintf(j->plan_name, sizeof j->plan_name, "%s", p.name);
    j->plan_epoch = (uint64_t)p.epoch;
    j->plan_ranks = p.n_ranks;
    plan_clear(&p);
    if (!j->options.wait_for_workers && j->plan_ranks != j->options.n_ranks)
        return status_fail(STATUS_USAGE, "%s is a plan for %d ranks, but %d are to be started", path, j->plan_ranks,
                           j->options.n_ranks);
    return STATUS_OK;
}

static status read_topology(job *j)
{
    topology t = {0};
    size_t size;
    const char *path = j->options.topology_path;
    if (!path)
        return STATUS_OK;
    TRY(plan_store_read(path, &j->topology_json, &size));
    TRY(topology_parse(path, j->topology_json, size, &t));
    j->topology_ranks = t.n_ranks;
    topology_clear(&t);
    if (!j->options.wait_for_workers && j->topology_ranks != j->options.n_ranks)
        return status_fail(STATUS_USAGE, "%s is a topology of %d ranks, but %d are to be started", path, j->topology_ranks,
                           j->options.n_ranks);
    return STATUS_OK;
}

bool job_first_rank_is_here(const job *j)
{
    for (int i = 0; i < j->hosts.n; i++)
        if (j->hosts.entries[i].n_ranks > 0)
            return j->hosts.entries[i].here;
    return true;
}

static const char *first_host(const job *j)
{
    for (int i = 0; i < j->hosts.n; i++)
        if (j->hosts.entries[i].n_ranks > 0)
            return j->hosts.entries[i].name;
    return "";
}

static status listen_for_workers(job *j, const control_listener *listener)
{
    TRY(control_server_create(j->options.listen ? j->options.listen : "127.0.0.1:0", listener, j, &j->server));
    if (control_server_is_loopback(j->server) && !job_first_rank_is_here(j))
        return status_fail(STATUS_USAGE,
                           "%s: rank 0 runs on %s and cannot reach the control connection at %s: give an address of this machine",
                           j->options.hostfile, first_host(j), control_server_address(j->server, true));
    return STATUS_OK;
}

static status check_numbers(const job_options *o)
{
    if (!o->wait_for_workers && o->n_ranks < 1)
        return status_fail(STATUS_USAGE, "%d ranks cannot be started", o->n_ranks);
    if (o->wait_for_workers && !o->secret_file)
        return status_fail(STATUS_USAGE, "workers that others start need a secret that is known to both: give a file with one");
    if (o->wait_for_workers && o->hostfile)
        return status_fail(STATUS_USAGE, "a hostfile is for workers started here, not for those that others start");
    if (!(o->hang_seconds > 0) || !(o->load_seconds > 0) || !(o->failure_minutes > 0) || o->max_failures > FAILURE_HISTORY)
        return status_fail(STATUS_USAGE,
                           "the time limits of the job are not all above zero, or more than %d failures are allowed",
                           FAILURE_HISTORY);
    return STATUS_OK;
}

status job_setup(job *j, const job_options *options, const control_listener *listener)
{
    TRY(copy_options(j, options));
    const job_options *o = &j->options;
    TRY(check_numbers(o));
    if (!o->wait_for_workers)
        TRY(find_programs(j));
    j->n_ranks = o->n_ranks;
    if (o->hostfile) {
        TRY(hosts_read(o->hostfile, &j->hosts));
        hosts_find_here(&j->hosts);
        hosts_assign(&j->hosts, j->n_ranks);
    }
    TRY(read_plan(j));
    TRY(read_topology(j));
    if (o->secret_file)
        TRY(control_secret_read(o->secret_file, &j->secret));
    snprintf(j->isa, sizeof j->isa, "%s", o->isa ? o->isa : "");
    j->n_launches = o->first_launch > 0 ? o->first_launch - 1 : 0;
    j->failures.max_failures = o->max_failures;
    j->failures.window_seconds = 60 * o->failure_minutes;
    return listen_for_workers(j, listener);
}

/* ---- what workers are told ---- */

static char *text_or_empty(const char *text)
{
    return (char *)(text ? text : "");
}

status job_send_setup(job *j, bool *contiguous)
{
    const job_options *o = &j->options;
    Convoke__Control__Setup setup = CONVOKE__CONTROL__SETUP__INIT;
    Convoke__Control__ToLeader message = CONVOKE__CONTROL__TO_LEADER__INIT;
    job_plan start = {.json = j->plan_json, .name = j->plan_name, .epoch = j->plan_epoch};
    bool chosen = j->listener->plan && j->listener->plan(j->arg, j->life.hello, &start);
    bool planned = chosen || (j->plan_json && j->plan_ranks == (int)j->life.hello->n_ranks);
    *contiguous = j->plan_json && !planned;
    message.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_SETUP;
    message.setup = &setup;
    setup.launch = j->life.number;
    setup.model_dir = text_or_empty(o->model_dir);
    setup.plan_json = text_or_empty(planned ? start.json : NULL);
    setup.plan_name = text_or_empty(planned ? start.name : "contiguous");
    setup.plan_epoch = planned ? start.epoch : 0;
    setup.threads = (uint32_t)o->threads;
    setup.weights = text_or_empty(o->weights);
    setup.combine = text_or_empty(o->combine);
    setup.rows = text_or_empty(o->rows);
    setup.max_sequences = (uint32_t)o->max_sequences;
    setup.kv_bytes = o->kv_bytes;
    setup.max_length = (uint32_t)o->max_length;
    setup.step_budget_us = (uint32_t)lround(o->step_seconds * 1e6);
    setup.hang_ms = (uint32_t)lround(o->hang_seconds * 1e3);
    setup.prefix_cache = o->prefix_cache;
    setup.isa = j->isa;
    setup.count_pairs = o->count_pairs;
    setup.replicas = text_or_empty(o->replicas);
    setup.owners = text_or_empty(o->owners);
    setup.topology_json = text_or_empty(j->topology_ranks == (int)j->life.hello->n_ranks ? j->topology_json : NULL);
    bytes_writer frame = {0};
    status st = control_put_to_leader(&frame, &message);
    if (st == STATUS_OK && !control_server_send(j->server, frame.data, frame.size))
        st = status_fail(STATUS_PEER_LOST, "the leader left before it was told what to do");
    bytes_clear(&frame);
    return st;
}
