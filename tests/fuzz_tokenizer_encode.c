/* Any bytes as a text for several small tokenizers: refused as no UTF-8, or ids of the vocabulary, the same the second time, that
 * decode to whole characters, and with some tokenizers to the text itself.
 * The first byte chooses the tokenizer. */
#include "cluster/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Folders of tests/data/tokenizers/, seen from the source folder. */
static const struct {
    const char *name;
    int exact; /* decodes to the text itself: byte-level, and no added token takes white space with it */
} kinds[] = {{"gpt2", 1},      {"llama3", 0},          {"deepseek", 0}, {"qwen2", 0}, {"mixtral", 0},
             {"metaspace", 0}, {"metaspace_never", 0}, {"classes", 0},  {"twice", 0}, {"regex_0", 1}};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

static void demand(int holds)
{
    if (!holds)
        abort();
}

static const tokenizer *get(int kind)
{
    static tokenizer *all[N_KINDS];
    char path[4096];
    const char *source = getenv("CONVOKE_SOURCE_DIR");
    if (!all[kind]) {
        snprintf(path, sizeof path, "%s/tests/data/tokenizers/%s", source ? source : ".", kinds[kind].name);
        if (tokenizer_load(path, &all[kind]) != STATUS_OK) {
            fprintf(stderr, "%s\n", status_message());
            abort();
        }
    }
    return all[kind];
}

static void check_decoding(const tokenizer *t, const int32_t *ids, size_t n, const char *text, size_t size, int exact)
{
    tokenizer_stream *s = NULL;
    const char *piece;
    size_t piece_size, at = 0;
    demand(tokenizer_stream_create(t, false, &s) == STATUS_OK);
    for (size_t i = 0; i <= n; i++) {
        demand((i < n ? tokenizer_stream_push(s, ids[i], &piece, &piece_size) : tokenizer_stream_flush(s, &piece, &piece_size)) ==
               STATUS_OK);
        demand(piece_size == 0 || ((unsigned char)piece[0] & 0xC0) != 0x80);
        if (exact)
            demand(at + piece_size <= size && (piece_size == 0 || memcmp(piece, text + at, piece_size) == 0));
        at += piece_size;
    }
    demand(!exact || at == size);
    tokenizer_stream_destroy(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tokenizer_scratch *used[N_KINDS];
    if (size == 0)
        return 0;
    int kind = data[0] % N_KINDS;
    const tokenizer *t = get(kind);
    tokenizer_scratch *fresh = NULL;
    const int32_t *ids, *again;
    size_t n, n_again;
    char *text = malloc(size); /* an exact copy of the rest and one byte behind which nothing lies */
    memcpy(text, data + 1, size - 1);
    if (!used[kind])
        demand(tokenizer_scratch_create(t, &used[kind]) == STATUS_OK);
    if (tokenizer_encode(t, used[kind], text, size - 1, false, &ids, &n) == STATUS_OK) {
        for (size_t i = 0; i < n; i++)
            demand(ids[i] >= 0 && ids[i] < tokenizer_n_ids(t));
        if (data[0] >= 128) { /* a cache without a history gives the same */
            demand(tokenizer_scratch_create(t, &fresh) == STATUS_OK);
            demand(tokenizer_encode(t, fresh, text, size - 1, false, &again, &n_again) == STATUS_OK);
            demand(n == n_again && (n == 0 || memcmp(ids, again, n * sizeof *ids) == 0));
            tokenizer_scratch_destroy(fresh);
        }
        check_decoding(t, ids, n, text, size - 1, kinds[kind].exact);
    } else {
        demand(strstr(status_message(), "UTF-8") != NULL);
    }
    free(text);
    return 0;
}
