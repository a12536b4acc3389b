/* door_requests.c - convoke.v1.Requests: a running or remembered request's stream taken up again, and a list of them. */
#include "cluster/door_internal.h"
#include "proto/convoke.pb-c.h"

#include <stdlib.h>

void requests_attach(rpc_call *call, const ProtobufCMessage *message)
{
    const Convoke__V1__AttachRequest *m = (const Convoke__V1__AttachRequest *)message;
    answer_wish want;
    inference_options(m->response, &want);
    generation_attach(call, m->request_id, door_count(m->from_token), &want);
}

void requests_answer_list(rpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    enum { MOST = 10000 };
    Convoke__V1__ListResponse m = CONVOKE__V1__LIST_RESPONSE__INIT;
    request_summary *found = malloc(MOST * sizeof *found);
    Convoke__V1__RequestSummary *items = malloc(MOST * sizeof *items), **list = malloc(MOST * sizeof *list);
    if (!found || !items || !list) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
    } else {
        int n = requests_list(door_of(call)->all, found, MOST);
        m.num_requests = (uint32_t)n;
        m.n_requests = (size_t)(n < MOST ? n : MOST);
        m.requests = list;
        for (size_t i = 0; i < m.n_requests; i++) {
            convoke__v1__request_summary__init(&items[i]);
            items[i].request_id = found[i].id;
            items[i].num_prompt_tokens = (uint32_t)found[i].n_prompt;
            items[i].num_output_tokens = (uint32_t)found[i].n_output;
            items[i].num_sequences = (uint32_t)found[i].n_sequences;
            items[i].finished = found[i].finished;
            items[i].age_seconds = found[i].age_seconds;
            list[i] = &items[i];
        }
        rpc_call_reply(call, &m.base);
    }
    free(list);
    free(items);
    free(found);
}
