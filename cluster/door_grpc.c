/* door_grpc.c - the gRPC listener as a whole: its methods, its start and its stop. */
#include "cluster/door_internal.h"
#include "proto/convoke.pb-c.h"
#include "proto/health.pb-c.h"
#include "proto/reflection.pb-c.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* ---- what the handlers share ---- */

bool arena_reserve(arena *a, size_t bytes)
{
    a->used = 0;
    if (bytes <= a->size)
        return true;
    free(a->data);
    a->size = 0;
    a->data = malloc(bytes + bytes / 2);
    if (a->data)
        a->size = bytes + bytes / 2;
    return a->data != NULL;
}

void *arena_take(arena *a, size_t n, size_t size_of_one)
{
    size_t at = (a->used + 15) / 16 * 16;
    a->used = at + n * size_of_one;
    assert(a->used <= a->size || n == 0);
    return a->data + at;
}

void arena_clear(arena *a)
{
    free(a->data);
    *a = (arena){0};
}

rpc_code door_code(refusal_kind kind)
{
    switch (kind) {
    case REFUSAL_BAD:
    case REFUSAL_TOO_LARGE:
        return RPC_INVALID_ARGUMENT;
    case REFUSAL_NOT_FOUND:
        return RPC_NOT_FOUND;
    case REFUSAL_EXISTS:
        return RPC_ALREADY_EXISTS;
    case REFUSAL_FULL:
        return RPC_RESOURCE_EXHAUSTED;
    case REFUSAL_UNAVAILABLE:
        return RPC_UNAVAILABLE;
    case REFUSAL_UNSUPPORTED:
        return RPC_UNIMPLEMENTED;
    case REFUSAL_NOT_ALLOWED:
        return RPC_PERMISSION_DENIED;
    default:
        return RPC_INTERNAL;
    }
}

void door_refuse(rpc_call *call, const refusal *why)
{
    char hint[24];
    if (why->kind == REFUSAL_FULL) {
        snprintf(hint, sizeof hint, "%d", why->retry_ms);
        rpc_call_trailer(call, "retry-after-ms", hint);
    }
    rpc_call_finish(call, door_code(why->kind), why->sentence);
}

/* ---- methods ---- */

#define GENERATION .pump = generation_pump, .end = generation_end
#define INFERENCE(path_, begin_)                                                                                                 \
    {                                                                                                                            \
        .path = path_, .request = &vllm__generate_request__descriptor, .begin = begin_, GENERATION                               \
    }
#define CONTROL(name, request_, begin_)                                                                                          \
    {                                                                                                                            \
        .path = "/vllm.Control/" name, .request = &vllm__##request_##_request__descriptor, .begin = begin_                       \
    }
#define ENGINE(name, request_, begin_)                                                                                           \
    {                                                                                                                            \
        .path = "/vllm.grpc.engine.VllmEngine/" name, .request = &vllm__grpc__engine__##request_##_request__descriptor,          \
        .begin = begin_                                                                                                          \
    }
/* v1alpha's messages are v1's on the wire. */
#define REFLECTION(version)                                                                                                      \
    {                                                                                                                            \
        .path = "/grpc.reflection." version ".ServerReflection/ServerReflectionInfo",                                            \
        .request = &grpc__reflection__v1__server_reflection_request__descriptor, .client_streams = true,                         \
        .begin = reflection_answer                                                                                               \
    }

static const rpc_method methods[] = {
    INFERENCE("/vllm.Inference/Generate", inference_generate),
    INFERENCE("/vllm.Inference/GenerateStream", inference_stream),
    INFERENCE("/vllm.Generate/Generate", inference_generate),
    INFERENCE("/vllm.Generate/GenerateStream", inference_stream),
    CONTROL("GetServerInfo", get_server_info, control_server),
    CONTROL("GetModelInfo", get_model_info, control_model),
    CONTROL("Shutdown", shutdown, control_shutdown),
    CONTROL("Abort", abort, control_abort),
    {.path = "/vllm.Control/PauseGeneration",
     .request = &vllm__pause_generation_request__descriptor,
     .begin = control_pause,
     .pump = control_pause_pump,
     .end = control_pause_end},
    CONTROL("ResumeGeneration", resume_generation, control_resume),
    CONTROL("IsPaused", is_paused, control_is_paused),
    {.path = "/convoke.v1.Requests/Attach",
     .request = &convoke__v1__attach_request__descriptor,
     .begin = requests_attach,
     GENERATION},
    {.path = "/convoke.v1.Requests/List", .request = &convoke__v1__list_request__descriptor, .begin = requests_answer_list},
    {.path = "/vllm.grpc.engine.VllmEngine/Generate",
     .request = &vllm__grpc__engine__generate_request__descriptor,
     .begin = engine_generate,
     GENERATION},
    ENGINE("HealthCheck", health_check, engine_health),
    ENGINE("Abort", abort, engine_abort),
    ENGINE("GetModelInfo", get_model_info, engine_model),
    ENGINE("GetServerInfo", get_server_info, engine_server),
    ENGINE("GetLoads", get_loads, engine_loads),
    {.path = "/vllm.grpc.engine.VllmEngine/GetTokenizer",
     .request = &smg__grpc__common__get_tokenizer_request__descriptor,
     .begin = engine_tokenizer,
     .pump = engine_tokenizer_pump,
     .end = engine_tokenizer_end},
    {.path = "/grpc.health.v1.Health/Check",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .begin = health_check},
    {.path = "/grpc.health.v1.Health/Watch",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .begin = health_watch_begin,
     .pump = health_watch_pump,
     .end = health_watch_end},
    REFLECTION("v1"),
    REFLECTION("v1alpha"),
};

static const char *const services[] = {
    "vllm.Inference",
    "vllm.Generate",
    "vllm.Control",
    "convoke.v1.Requests",
    "vllm.grpc.engine.VllmEngine",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
};

const char *door_service(int i)
{
    return (size_t)i < sizeof services / sizeof services[0] ? services[i] : NULL;
}

bool door_serves(const char *service)
{
    for (int i = 0; door_service(i); i++)
        if (strcmp(service, door_service(i)) == 0)
            return true;
    return service[0] == 0; /* the server as a whole */
}

/* ---- start and stop ---- */

/* Every connection is a file: as many as the system lets us have. */
static void raise_file_limit(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

enum { LARGEST_ANSWER = 1 << 20 };

status door_grpc_start(coordinator *c, const door_grpc_options *options, door_grpc **out)
{
    door_grpc *d = calloc(1, sizeof *d);
    if (!d)
        return status_fail(STATUS_NO_MEMORY, "out of memory");
    d->c = c;
    d->all = coordinator_requests(c);
    /* One message is under way per call, and clients take 4 MiB at most unless told otherwise. */
    d->message_bytes = options->reader_bytes && options->reader_bytes < LARGEST_ANSWER ? options->reader_bytes : LARGEST_ANSWER;
    pthread_mutex_init(&d->watch_lock, NULL);
    raise_file_limit();
    const rpc_options rpc = {
        .address = options->address,
        .max_message = options->max_message ? options->max_message : 16u << 20,
        .max_streams = options->max_streams > 0 ? options->max_streams : 1024,
        .reader_seconds = options->reader_seconds,
        .tls_cert = options->tls_cert,
        .tls_key = options->tls_key,
        .tls_client_ca = options->tls_client_ca,
        .methods = methods,
        .n_methods = sizeof methods / sizeof methods[0],
        .context = d,
    };
    status st = reflection_create(&d->reflection);
    if (st == STATUS_OK)
        st = rpc_server_start(&rpc, &d->rpc);
    if (st != STATUS_OK) {
        door_grpc_stop(d, 0);
        return st;
    }
    coordinator_watch_state(c, health_changed, d);
    *out = d;
    return STATUS_OK;
}

int door_grpc_port(const door_grpc *d)
{
    return rpc_server_port(d->rpc);
}

void door_grpc_stop(door_grpc *d, double drain_seconds)
{
    if (!d)
        return;
    if (d->rpc) {
        coordinator_watch_state(d->c, NULL, NULL);
        atomic_store(&d->stopping, true);
        health_changed(d, SERVING_STOPPED); /* watches would keep the door open */
        rpc_server_stop(d->rpc, drain_seconds);
    }
    reflection_destroy(d->reflection);
    pthread_mutex_destroy(&d->watch_lock);
    free(d);
}
