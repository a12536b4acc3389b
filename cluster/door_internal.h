/* door_internal.h - what the files of the gRPC door share.
 *
 *   door_grpc.c        start, stop, table of methods, small things they all use
 *   door_generate.c    from an accepted request to answers: reader, pieces, cutting, gathering, the end
 *   door_inference.c   vllm.Inference <-> request_wish and output_piece
 *   door_engine.c      vllm.grpc.engine.VllmEngine, the same
 *   door_control.c     vllm.Control        door_requests.c    convoke.v1.Requests
 *   door_health.c      grpc.health.v1      door_reflection.c  grpc.reflection.v1 and v1alpha */
#ifndef CONVOKE_CLUSTER_DOOR_INTERNAL_H
#define CONVOKE_CLUSTER_DOOR_INTERNAL_H

#include "cluster/door_grpc.h"
#include "cluster/rpc_server.h"
#include "proto/vllm.pb-c.h"
#include "proto/vllm_engine.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct health_watch health_watch;
typedef struct reflection reflection;

struct door_grpc {
    coordinator *c;
    requests *all;
    rpc_server *rpc;
    size_t message_bytes; /* an answer is cut into messages of about so much */
    reflection *reflection;
    atomic_bool stopping;
    pthread_mutex_t watch_lock;
    health_watch *watches; /* guarded by watch_lock */
};

static inline door_grpc *door_of(const rpc_call *call)
{
    return (door_grpc *)rpc_call_context(call);
}

/* Memory for one message at a time: set aside in one go, taken in parts, kept for the next. */
typedef struct {
    char *data;
    size_t size, used;
} arena;

bool arena_reserve(arena *a, size_t bytes); /* forgets what was taken; false: out of memory */
void *arena_take(arena *a, size_t n, size_t size_of_one);
void arena_clear(arena *a);
/* What arena_take(n, size) may use of it, alignment included. */
#define ARENA_BYTES(n, size) ((size_t)(n) * (size) + 16)

rpc_code door_code(refusal_kind kind);
/* Ends the call with the refusal as its status; a full queue also says when to come again (retry-after-ms). */
void door_refuse(rpc_call *call, const refusal *why);

/* What of an answer this client wants. */
typedef struct {
    bool prompt_ids, prompt_logprobs, prompt_candidates;
    bool text, token_ids, logprobs, candidates;
} answer_wish;

/* Working memory of a request_wish whose pointers lead into the message and into here. */
typedef struct {
    arena memory;
    char client[160];
} wish_room;

/* Message -> wish: pure functions of the message. wish is zeroed here; owner -1 unless the message names one. */
refusal_kind inference_wish(const Vllm__GenerateRequest *m, wish_room *room, request_wish *wish, answer_wish *want, refusal *why);
refusal_kind engine_wish(const Vllm__Grpc__Engine__GenerateRequest *m, int max_length, wish_room *room, request_wish *wish,
                         answer_wish *want, refusal *why);
void inference_options(const Vllm__ResponseOptions *m, answer_wish *want);
/* ids that are token ids at all (below 2^31), as int32; name: of the field. */
refusal_kind door_ids(const char *name, const uint32_t *ids, size_t n, const int32_t **out, int *n_out, refusal *why);
int door_count(uint64_t n); /* cut to INT_MAX */

typedef struct generation generation;

/* How a protocol words an answer. */
typedef struct {
    bool finish_apart; /* a sequence's end is a message of its own */
    bool whole_prompt; /* of whole answers every sequence's has the prompt, not only the first */
    /* Sends one message; false: this protocol has nothing to say about it. `last`: end the call with it. */
    bool (*say)(generation *g, const output_piece *part, bool last);
} answer_form;

extern const answer_form inference_form, engine_form;

struct generation {
    rpc_call *call;
    const answer_form *form;
    answer_wish want;
    bool whole; /* one answer per sequence, when all have finished */
    arena memory;
    request *request;
    reader *reader;
    int n_sequences, n_finished, n_prompt, n_cached;
    /* the piece being said, and how far */
    output_piece piece;
    bool has_piece;
    int n_said_tokens, n_said_candidates;
    size_t said_text;
    struct gathered *gathered; /* [n_sequences], see door_generate.c */
    int n_whole_said;
};

/* For `begin`: takes the request (or refuses), opens a reader and leaves the rest to generation_pump. */
void generation_begin(rpc_call *call, const request_wish *wish, const answer_form *form, const answer_wish *want, bool whole);
void generation_attach(rpc_call *call, const char *id, int from_token, const answer_wish *want);
void generation_pump(rpc_call *call);
void generation_end(rpc_call *call);
/* All output ids of a sequence of which nothing has been said but its finish (engine's `complete`). */
const int32_t *generation_ids(const generation *g, int sequence, int *n);
/* The largest message: protobuf stops at 2 GiB. Ends the call when this one is larger, else sends it. */
void generation_send(generation *g, const ProtobufCMessage *message, bool last);
/* What the call's metadata say: who asks, the rank (x-data-parallel-rank), how long to wait for an Attach (x-linger-ms). */
refusal_kind generation_caller(rpc_call *call, const char *session, wish_room *room, request_wish *wish, refusal *why);

/* Handlers. */
void inference_generate(rpc_call *call, const ProtobufCMessage *message);
void inference_stream(rpc_call *call, const ProtobufCMessage *message);
void requests_attach(rpc_call *call, const ProtobufCMessage *message);
void requests_answer_list(rpc_call *call, const ProtobufCMessage *message);
void engine_generate(rpc_call *call, const ProtobufCMessage *message);
void engine_health(rpc_call *call, const ProtobufCMessage *message);
void engine_abort(rpc_call *call, const ProtobufCMessage *message);
void engine_model(rpc_call *call, const ProtobufCMessage *message);
void engine_server(rpc_call *call, const ProtobufCMessage *message);
void engine_loads(rpc_call *call, const ProtobufCMessage *message);
void engine_tokenizer(rpc_call *call, const ProtobufCMessage *message);
void engine_tokenizer_pump(rpc_call *call);
void engine_tokenizer_end(rpc_call *call);
void control_server(rpc_call *call, const ProtobufCMessage *message);
void control_model(rpc_call *call, const ProtobufCMessage *message);
void control_shutdown(rpc_call *call, const ProtobufCMessage *message);
void control_abort(rpc_call *call, const ProtobufCMessage *message);
void control_pause(rpc_call *call, const ProtobufCMessage *message);
void control_pause_pump(rpc_call *call);
void control_pause_end(rpc_call *call);
void control_resume(rpc_call *call, const ProtobufCMessage *message);
void control_is_paused(rpc_call *call, const ProtobufCMessage *message);
void health_check(rpc_call *call, const ProtobufCMessage *message);
void health_watch_begin(rpc_call *call, const ProtobufCMessage *message);
void health_watch_pump(rpc_call *call);
void health_watch_end(rpc_call *call);
void health_changed(void *door, serving_state state);
void reflection_answer(rpc_call *call, const ProtobufCMessage *message);

/* The services the table serves, for health and reflection: "vllm.Inference"; NULL behind the last. */
const char *door_service(int i);
bool door_serves(const char *service);

/* Reads the embedded descriptors once. */
status reflection_create(reflection **out);
void reflection_destroy(reflection *r);

#endif
