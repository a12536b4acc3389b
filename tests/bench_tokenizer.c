/* bench_tokenizer DIR TEXTS [ROUNDS] - how fast texts become token ids, on one thread. bench_tokenizer.py runs it in turn with
 * the tokenizers package. TEXTS: JSON lines {"text": ".."}, each a document. Prints a line a round: megabytes (10^6) per second.
 */
#include "cluster/tokenizer.h"
#include "proto/clock.h"
#include "proto/json.h"
#include "tests/support_bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    cJSON **lines;
    const char **texts;
    size_t *sizes, n, bytes;
} documents;

static bool read_documents(const char *path, documents *d)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t capacity = 0, room = 0;
    while (file && getline(&line, &capacity, file) > 0) {
        if (d->n == room) {
            room = room ? 2 * room : 1024;
            d->lines = realloc(d->lines, room * sizeof *d->lines);
            d->texts = realloc(d->texts, room * sizeof *d->texts);
            d->sizes = realloc(d->sizes, room * sizeof *d->sizes);
            if (!d->lines || !d->texts || !d->sizes)
                abort();
        }
        d->lines[d->n] = cJSON_Parse(line);
        if (json_get_string(d->lines[d->n], path, "text", &d->texts[d->n]) != STATUS_OK)
            return false;
        d->sizes[d->n] = strlen(d->texts[d->n]);
        d->bytes += d->sizes[d->n++];
    }
    free(line);
    if (file)
        fclose(file);
    return d->n > 0;
}

static void free_documents(documents *d)
{
    for (size_t i = 0; i < d->n; i++)
        cJSON_Delete(d->lines[i]);
    free(d->lines);
    free(d->texts);
    free(d->sizes);
}

static size_t encode_all(const tokenizer *t, tokenizer_scratch *s, const documents *d)
{
    size_t n_ids = 0;
    for (size_t i = 0; i < d->n; i++) {
        const int32_t *ids;
        size_t n = 0;
        if (tokenizer_encode(t, s, d->texts[i], d->sizes[i], false, &ids, &n) != STATUS_OK)
            fprintf(stderr, "%s\n", status_message());
        n_ids += n;
    }
    return n_ids;
}

int main(int argc, char **argv)
{
    int rounds = argc > 3 ? atoi(argv[3]) : 5;
    double rates[256];
    documents d = {0};
    tokenizer *t = NULL;
    tokenizer_scratch *s = NULL;
    if (argc < 3 || !read_documents(argv[2], &d)) {
        fprintf(stderr, "usage: bench_tokenizer DIR TEXTS.jsonl [ROUNDS]\n");
        return 2;
    }
    double start = clock_seconds();
    if (tokenizer_load(argv[1], &t) != STATUS_OK || tokenizer_scratch_create(t, &s) != STATUS_OK) {
        fprintf(stderr, "%s\n", status_message());
        return 1;
    }
    printf("loaded in %.3f s\n", clock_seconds() - start);
    for (int round = 0; round < rounds && round < 256; round++) {
        start = clock_seconds();
        size_t n_ids = encode_all(t, s, &d);
        rates[round] = (double)d.bytes / 1e6 / (clock_seconds() - start);
        printf("%zu texts, %.1f MB, %zu tokens: %.2f MB/s\n", d.n, (double)d.bytes / 1e6, n_ids, rates[round]);
        fflush(stdout);
    }
    printf("median %.2f MB/s\n", bench_median(rates, rounds < 256 ? rounds : 256));
    tokenizer_scratch_destroy(s);
    tokenizer_destroy(t);
    free_documents(&d);
    return 0;
}
