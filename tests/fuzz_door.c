/* What clients send: checked, unpacked, and made into a wish. The first byte chooses the message. */
#include "cluster/door_internal.h"
#include "cluster/wire_check.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Every pointer of a wish leads somewhere. */
static void look_at(const request_wish *w)
{
    uint32_t sum = 0;
    for (int i = 0; i < w->n_ids; i++)
        if (w->ids[i] < 0)
            abort();
    for (int i = 0; i < w->n_biases; i++)
        sum += (uint32_t)w->biases[i].token;
    for (int i = 0; i < w->n_stops; i++)
        sum += (uint32_t)strlen(w->stops[i]);
    for (int i = 0; i < w->n_stop_ids; i++)
        sum += (uint32_t)w->stop_ids[i];
    for (int i = 0; i < w->n_allowed; i++)
        sum += (uint32_t)w->allowed[i];
    for (size_t i = 0; i < w->text_size; i++)
        sum += (uint8_t)w->text[i];
    (void)*(volatile uint32_t *)&sum; /* nothing of it is left out */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    bool engine = data[0] & 1;
    const ProtobufCMessageDescriptor *type =
        engine ? &vllm__grpc__engine__generate_request__descriptor : &vllm__generate_request__descriptor;
    data++;
    size--;
    if (wire_check(type, data, size) != STATUS_OK)
        return 0;
    ProtobufCMessage *m = protobuf_c_message_unpack(type, NULL, size, data);
    if (!m)
        return 0;
    wish_room room = {0};
    request_wish wish;
    answer_wish want;
    refusal why = {0};
    refusal_kind kind = engine ? engine_wish((const Vllm__Grpc__Engine__GenerateRequest *)m, 4096, &room, &wish, &want, &why)
                               : inference_wish((const Vllm__GenerateRequest *)m, &room, &wish, &want, &why);
    if (kind != why.kind || (kind != REFUSAL_NONE && !why.sentence[0]))
        abort();
    if (kind == REFUSAL_NONE)
        look_at(&wish);
    arena_clear(&room.memory);
    protobuf_c_message_free_unpacked(m, NULL);
    return 0;
}
