/* Any bytes as tokenizer.json: refused with a sentence, or a tokenizer that encodes and decodes without touching what is not its.
 */
#include "cluster/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void demand(int holds)
{
    if (!holds)
        abort();
}

static void decode(const tokenizer *t, const int32_t *ids, size_t n)
{
    tokenizer_stream *s = NULL;
    const char *text;
    size_t size;
    demand(tokenizer_stream_create(t, false, &s) == STATUS_OK);
    for (size_t i = 0; i < n; i++)
        (void)tokenizer_stream_push(s, ids[i], &text, &size);
    for (int id = -1; id <= tokenizer_n_ids(t) && id < 300; id++) {
        (void)tokenizer_stream_push(s, id, &text, &size);
        (void)tokenizer_bytes(t, id, &size);
    }
    (void)tokenizer_stream_flush(s, &text, &size);
    tokenizer_stream_destroy(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "It's  \u00c9t\u00e9 12345,\n\n ab aab<s>\u4e2d\u6587 e\u0301\u0323 \xf0\x9f\x91\x8d\0 "
                               "x<unk>aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ";
    tokenizer *t = NULL;
    uint8_t *copy = malloc(size + !size); /* an exact copy: the sanitizer sees one byte too far */
    memcpy(copy, data, size);
    status st = tokenizer_parse("tokenizer.json", copy, size, &t);
    free(copy);
    if (st != STATUS_OK) {
        demand(!t && status_message()[0] != '\0');
        return 0;
    }
    tokenizer_scratch *s = NULL;
    const int32_t *ids;
    size_t n;
    demand(tokenizer_scratch_create(t, &s) == STATUS_OK);
    if (tokenizer_encode(t, s, text, sizeof text - 1, true, &ids, &n) == STATUS_OK)
        decode(t, ids, n);
    tokenizer_scratch_destroy(s);
    tokenizer_destroy(t);
    return 0;
}
