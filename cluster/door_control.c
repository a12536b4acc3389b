/* door_control.c - vllm.Control: what this server is, and an admin's words to it. */
#include "cluster/door_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void control_server(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    coordinator_info info;
    Vllm__ServerInfo m = VLLM__SERVER_INFO__INIT;
    Vllm__ParallelismInfo p = VLLM__PARALLELISM_INFO__INIT;
    Vllm__RlCapabilities none = VLLM__RL_CAPABILITIES__INIT;
    coordinator_get_info(door_of(call)->c, &info);
    m.engine_version = (char *)"convoke " CONVOKE_VERSION;
    m.api_version = "vllm";
    m.instance_id = (char *)info.instance;
    m.parallelism = &p;
    m.rl_capabilities = &none;
    m.max_model_len = (uint32_t)info.max_length;
    m.kv_block_size = (uint32_t)info.kv_block;
    m.total_kv_blocks = info.kv_blocks;
    m.max_running_requests = (uint64_t)info.max_running;
    m.max_batched_tokens = (uint64_t)info.max_batched_tokens;
    if (info.kv_block > 0) {
        m._effective_attention_block_size_case =
            VLLM__SERVER_INFO___EFFECTIVE_ATTENTION_BLOCK_SIZE_EFFECTIVE_ATTENTION_BLOCK_SIZE;
        m.effective_attention_block_size = (uint64_t)info.kv_block;
    }
    /* Experts are spread over the ranks; attention is done by the rank that owns the sequence. */
    p.tensor_parallel_size = p.pipeline_parallel_size = p.decode_context_parallel_size = 1;
    p.data_parallel_size = (uint32_t)info.n_ranks;
    p.world_size = (uint64_t)info.n_ranks;
    p.data_parallel_size_local = (uint32_t)(info.n_nodes > 1 ? info.n_ranks / info.n_nodes : info.n_ranks);
    rpc_call_reply(call, &m.base);
}

void control_model(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    coordinator_info info;
    Vllm__ModelInfo m = VLLM__MODEL_INFO__INIT;
    coordinator_get_info(door_of(call)->c, &info);
    m.model_id = (char *)info.model_dir;
    m.served_model_name = (char *)info.model_name;
    m.n_served_model_aliases = (size_t)info.n_aliases;
    m.served_model_aliases = (char **)info.aliases; /* packing only reads */
    m.supports_text_input = coordinator_tokenizer(door_of(call)->c) != NULL;
    m.supports_token_ids_input = true;
    rpc_call_reply(call, &m.base);
}

/* Whether the caller may; else the call has ended. `authorization: Bearer TOKEN` is how a token travels. */
static bool admin_ok(rpc_call *call)
{
    char value[600];
    const char *token = NULL;
    if (rpc_call_metadata(call, "authorization", value, sizeof value) && strncasecmp(value, "Bearer ", 7) == 0)
        token = value + 7;
    bool ok = coordinator_admin_ok(door_of(call)->c, rpc_call_peer(call), token);
    if (!ok)
        rpc_call_finish(call, RPC_PERMISSION_DENIED, "only an admin may: from loopback, or with authorization: Bearer TOKEN");
    return ok;
}

void control_shutdown(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    Vllm__ShutdownResponse m = VLLM__SHUTDOWN_RESPONSE__INIT;
    if (!admin_ok(call))
        return;
    coordinator_shutdown(door_of(call)->c);
    rpc_call_reply(call, &m.base);
}

void control_abort(rpc_call *call, const ProtobufCMessage *message)
{
    const Vllm__AbortRequest *asked = (const Vllm__AbortRequest *)message;
    Vllm__AbortResponse m = VLLM__ABORT_RESPONSE__INIT;
    for (size_t i = 0; i < asked->n_request_ids; i++)
        requests_abort(door_of(call)->all, asked->request_ids[i]);
    rpc_call_reply(call, &m.base);
}

/* ---- pause: may wait for running requests, so it gets a thread of its own ---- */

typedef struct {
    rpc_call *call;
    coordinator *c;
    pause_mode mode;
    bool clear_cache;
    status st;
    char sentence[512];
    atomic_bool done;
    atomic_int refs; /* the call and the thread */
} pause_job;

static void pause_job_release(pause_job *job)
{
    if (atomic_fetch_sub(&job->refs, 1) == 1)
        free(job);
}

static void *pause_run(void *arg)
{
    pause_job *job = arg;
    job->st = coordinator_pause(job->c, job->mode, job->clear_cache);
    if (job->st != STATUS_OK)
        snprintf(job->sentence, sizeof job->sentence, "%s", status_message());
    atomic_store(&job->done, true);
    rpc_call_poke(job->call);
    rpc_call_release(job->call);
    pause_job_release(job);
    return NULL;
}

static rpc_code code_of_status(status st)
{
    return st == STATUS_STOPPED || st == STATUS_PEER_LOST ? RPC_UNAVAILABLE : RPC_INTERNAL;
}

void control_pause(rpc_call *call, const ProtobufCMessage *message)
{
    static const pause_mode modes[] = {PAUSE_ABORT, PAUSE_ABORT, PAUSE_WAIT, PAUSE_KEEP};
    const Vllm__PauseGenerationRequest *m = (const Vllm__PauseGenerationRequest *)message;
    pthread_t thread;
    pthread_attr_t detached;
    if (!admin_ok(call))
        return;
    if (m->mode < 0 || (size_t)m->mode >= sizeof modes / sizeof modes[0]) {
        rpc_call_finish(call, RPC_INVALID_ARGUMENT, "mode: there is no such pause mode");
        return;
    }
    pause_job *job = calloc(1, sizeof *job);
    if (!job) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    job->call = call;
    job->c = door_of(call)->c;
    job->mode = modes[m->mode];
    job->clear_cache = m->_clear_cache_case == VLLM__PAUSE_GENERATION_REQUEST___CLEAR_CACHE__NOT_SET || m->clear_cache;
    atomic_init(&job->refs, 2);
    rpc_call_set_state(call, job);
    rpc_call_hold(call);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &detached, pause_run, job)) {
        rpc_call_release(call);
        pause_job_release(job);
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "no thread to wait on");
    }
    pthread_attr_destroy(&detached);
}

void control_pause_pump(rpc_call *call)
{
    pause_job *job = rpc_call_state(call);
    Vllm__PauseGenerationResponse m = VLLM__PAUSE_GENERATION_RESPONSE__INIT;
    if (!atomic_load(&job->done))
        return;
    if (job->st != STATUS_OK)
        rpc_call_finish(call, code_of_status(job->st), job->sentence);
    else
        rpc_call_reply(call, &m.base);
}

void control_pause_end(rpc_call *call)
{
    pause_job *job = rpc_call_state(call);
    if (job)
        pause_job_release(job);
}

void control_resume(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    Vllm__ResumeGenerationResponse m = VLLM__RESUME_GENERATION_RESPONSE__INIT;
    if (!admin_ok(call))
        return;
    status st = coordinator_resume(door_of(call)->c);
    if (st != STATUS_OK)
        rpc_call_finish(call, code_of_status(st), status_message());
    else
        rpc_call_reply(call, &m.base);
}

void control_is_paused(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    Vllm__IsPausedResponse m = VLLM__IS_PAUSED_RESPONSE__INIT;
    m.paused = coordinator_is_paused(door_of(call)->c);
    rpc_call_reply(call, &m.base);
}
