#include "cluster/tokenize.h"
#include "cluster/tokenizer.h"
#include "proto/bytes.h"
#include "proto/json.h"
#include "tests/support.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- helpers ---- */

typedef struct {
    char *data;
    size_t size;
} text;

static text from_hex(const char *hex)
{
    text t = {malloc(strlen(hex) / 2 + 1), strlen(hex) / 2};
    for (size_t i = 0; i < t.size; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        t.data[i] = (char)byte;
    }
    return t;
}

static bool is_utf8(const char *s, size_t size)
{
    for (size_t i = 0; i < size;) {
        unsigned char c = (unsigned char)s[i];
        size_t n = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
        if (n == 0 || i + n > size)
            return false;
        for (size_t k = 1; k < n; k++)
            if (((unsigned char)s[i + k] & 0xC0) != 0x80)
                return false;
        i += n;
    }
    return true;
}

static void put_utf8(bytes_writer *out, uint32_t c)
{
    unsigned char b[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        b[i] = (unsigned char)(0x80 | (c & 0x3F));
    b[0] = (unsigned char)(n == 1 ? c : n == 2 ? 0xC0 | c : n == 3 ? 0xE0 | c : 0xF0 | c);
    bytes_put(out, b, n);
}

static tokenizer *load(const char *folder)
{
    tokenizer *t = NULL;
    if (tokenizer_load(folder, &t) != STATUS_OK)
        fail_msg("%s", status_message());
    return t;
}

static tokenizer *parse(const char *json)
{
    tokenizer *t = NULL;
    if (tokenizer_parse("t.json", json, strlen(json), &t) != STATUS_OK)
        fail_msg("%s", status_message());
    return t;
}

static tokenizer_scratch *scratch_of(const tokenizer *t)
{
    tokenizer_scratch *s = NULL;
    assert_int_equal(tokenizer_scratch_create(t, &s), STATUS_OK);
    return s;
}

/* All ids at once, joined from the pieces; each piece must be whole characters. */
static void decode(const tokenizer *t, bool skip, const int32_t *ids, size_t n, bytes_writer *out)
{
    tokenizer_stream *s = NULL;
    const char *piece;
    size_t size;
    bytes_reset(out);
    assert_int_equal(tokenizer_stream_create(t, skip, &s), STATUS_OK);
    for (size_t i = 0; i <= n; i++) {
        assert_int_equal(i < n ? tokenizer_stream_push(s, ids[i], &piece, &size) : tokenizer_stream_flush(s, &piece, &size),
                         STATUS_OK);
        assert_true(is_utf8(piece, size));
        bytes_put(out, piece, size);
    }
    tokenizer_stream_destroy(s);
}

/* ---- what the package makes of difficult texts ---- */

enum { MAX_LINES = 1024 };

static cJSON *read_lines(const char *path, size_t *n)
{
    cJSON *all = cJSON_CreateArray();
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t capacity = 0;
    assert_non_null(file);
    for (*n = 0; getline(&line, &capacity, file) > 0; ++*n)
        cJSON_AddItemToArray(all, cJSON_Parse(line));
    free(line);
    fclose(file);
    return all;
}

static size_t read_ids(const cJSON *list, int32_t **out)
{
    size_t n = 0;
    *out = malloc(sizeof **out * (size_t)(cJSON_GetArraySize(list) + 1));
    for (const cJSON *item = list->child; item; item = item->next)
        (*out)[n++] = item->valueint;
    return n;
}

static void expect_ids(const char *name, size_t line, const cJSON *list, const int32_t *ids, size_t n)
{
    int32_t *expected;
    size_t n_expected = read_ids(list, &expected);
    for (size_t i = 0; i < n && i < n_expected; i++)
        if (ids[i] != expected[i])
            fail_msg("%s: line %zu: token %zu is %d, not %d", name, line + 1, i, ids[i], expected[i]);
    if (n != n_expected)
        fail_msg("%s: line %zu: %zu tokens, not %zu", name, line + 1, n, n_expected);
    free(expected);
}

static void expect_text(const char *name, size_t line, const char *what, const bytes_writer *got, text expected)
{
    if (got->size != expected.size || (expected.size && memcmp(got->data, expected.data, expected.size) != 0))
        fail_msg("%s: line %zu, %s: \"%.*s\", not \"%.*s\"", name, line + 1, what, (int)got->size, (const char *)got->data,
                 (int)expected.size, expected.data);
}

/* kept and skipped, as make_tokenizers.py leaves out what says nothing new. */
static void expect_decoded(const char *name, size_t line, const tokenizer *t, const cJSON *json, const cJSON *list, text original)
{
    int32_t *ids;
    size_t n = read_ids(list, &ids);
    bytes_writer out = {0};
    const cJSON *kept = json_find(json, "kept"), *skipped = json_find(json, "skipped");
    text a = kept ? from_hex(kept->valuestring) : original;
    text b = skipped ? from_hex(skipped->valuestring) : a;
    decode(t, false, ids, n, &out);
    if (!json_find(json, "panics"))
        expect_text(name, line, "kept", &out, a);
    decode(t, true, ids, n, &out);
    if (!json_find(json, "panics"))
        expect_text(name, line, "skipped", &out, b);
    if (skipped)
        free(b.data);
    if (kept)
        free(a.data);
    bytes_clear(&out);
    free(ids);
}

static void expect_line(const char *name, size_t line, const tokenizer *t, tokenizer_scratch *s, const cJSON *json, text original)
{
    const int32_t *ids;
    size_t n;
    const cJSON *plain = json_find(json, "ids"), *special = json_find(json, "special");
    assert_int_equal(tokenizer_encode(t, s, original.data, original.size, false, &ids, &n), STATUS_OK);
    expect_ids(name, line, plain, ids, n);
    assert_int_equal(tokenizer_encode(t, s, original.data, original.size, true, &ids, &n), STATUS_OK);
    expect_ids(name, line, special ? special : plain, ids, n);
    expect_decoded(name, line, t, json, special ? special : plain, original);
}

/* The blocks of make_tokenizers.py's sweep(). */
static bool in_sweep(uint32_t c)
{
    if (c >= 0xD800 && c < 0xE000)
        return false;
    if ((c >= 0x3500 && c < 0x9F00) || (c >= 0xAC80 && c < 0xD700) || (c >= 0x17000 && c < 0x18A00))
        return c % 97 == 0;
    if (c >= 0x20000 && c < 0xE0000)
        return c % 251 == 0;
    return c < 0xE0200 || c % 9973 == 0;
}

static void expect_digests(const char *name, const tokenizer *t, tokenizer_scratch *s, const cJSON *digests)
{
    bytes_writer block = {0};
    const cJSON *digest = digests->child;
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (in_sweep(c)) {
            bytes_put(&block, block.size ? " a" : "a", block.size ? 2 : 1);
            put_utf8(&block, c);
            bytes_put(&block, "b ", 2);
            put_utf8(&block, c);
            put_utf8(&block, c);
            put_utf8(&block, 0x334);
            put_utf8(&block, c);
            put_utf8(&block, 0x301);
        }
        if ((c & 0xFFF) != 0xFFF || block.size == 0)
            continue;
        const int32_t *ids;
        size_t n;
        uint64_t h = 0xCBF29CE484222325u;
        char hex[32];
        assert_int_equal(tokenizer_encode(t, s, (const char *)block.data, block.size, false, &ids, &n), STATUS_OK);
        for (size_t i = 0; i < n; i++)
            h = (h ^ (uint32_t)ids[i]) * 0x100000001B3u;
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)h);
        assert_non_null(digest);
        if (strcmp(hex, digest->valuestring) != 0)
            fail_msg("%s: other ids for characters in U+%04X-U+%04X", name, c & ~0xFFFu, c);
        digest = digest->next;
        bytes_reset(&block);
    }
    assert_null(digest);
    bytes_clear(&block);
}

static void expect_folder(const char *name, const cJSON *texts)
{
    char path[600];
    size_t n, line = 0;
    snprintf(path, sizeof path, "tokenizers/%s", name);
    tokenizer *t = load(support_data(path));
    tokenizer_scratch *s = scratch_of(t);
    strcat(path, "/expected.jsonl");
    cJSON *lines = read_lines(support_data(path), &n);
    const cJSON *hex = texts->child;
    for (const cJSON *json = lines->child; json; json = json->next, line++) {
        const cJSON *of = json_find(json, "of"), *digests = json_find(json, "digests");
        if (digests) {
            expect_digests(name, t, s, digests);
        } else if (of) {
            expect_decoded(name, line, t, json, of, (text){0});
        } else {
            text original = from_hex(hex->valuestring);
            expect_line(name, line, t, s, json, original);
            free(original.data);
            hex = hex->next;
        }
    }
    assert_true(!hex || n == 1); /* some have digests alone */
    cJSON_Delete(lines);
    tokenizer_scratch_destroy(s);
    tokenizer_destroy(t);
}

static void equals_the_package(void **state)
{
    (void)state;
    size_t n;
    int n_folders = 0;
    cJSON *texts = read_lines(support_data("tokenizers/texts.jsonl"), &n);
    DIR *dir = opendir(support_data("tokenizers"));
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir));)
        if (!strchr(e->d_name, '.')) {
            expect_folder(e->d_name, texts);
            n_folders++;
        }
    closedir(dir);
    cJSON_Delete(texts);
    assert_true(n_folders >= 60);
}

/* ---- round trip ---- */

static void random_utf8(uint64_t *seed, bytes_writer *out)
{
    static const uint32_t limits[] = {0x80, 0x80, 0x250, 0x3000, 0x10000, 0x110000};
    bytes_reset(out);
    for (int n = support_below(seed, 60); n > 0; n--) {
        uint32_t c = (uint32_t)support_below(seed, (int)limits[support_below(seed, 6)]);
        if (c < 0xD800 || c >= 0xE000)
            put_utf8(out, c);
    }
}

static void byte_level_round_trip(void **state)
{
    (void)state;
    static const char *const names[] = {"gpt2", "llama3", "deepseek", "o200k"};
    bytes_writer in = {0}, out = {0};
    uint64_t seed = 5;
    for (int k = 0; k < 4; k++) {
        char path[64];
        snprintf(path, sizeof path, "tokenizers/%s", names[k]);
        tokenizer *t = load(support_data(path));
        tokenizer_scratch *s = scratch_of(t);
        for (int i = 0; i < 3000; i++) {
            const int32_t *ids;
            size_t n;
            random_utf8(&seed, &in);
            assert_int_equal(tokenizer_encode(t, s, (const char *)in.data, in.size, false, &ids, &n), STATUS_OK);
            decode(t, false, ids, n, &out);
            expect_text(names[k], (size_t)i, "text", &out, (text){(char *)in.data, in.size});
        }
        tokenizer_scratch_destroy(s);
        tokenizer_destroy(t);
    }
    bytes_clear(&in);
    bytes_clear(&out);
}

/* ---- merging against its definition ---- */

typedef struct {
    int left, right, id;
} merge;

/* As it is defined: of all pairs the one of the lowest rank, of these the leftmost, until there is none. */
static size_t merge_naively(const merge *merges, int n_merges, int *ids, size_t n)
{
    for (;;) {
        int best = n_merges;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (int m = 0; m < best; m++)
                if (merges[m].left == ids[i] && merges[m].right == ids[i + 1]) {
                    best = m;
                    at = i;
                }
        if (best == n_merges)
            return n;
        ids[at] = merges[best].id;
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof *ids);
        n--;
    }
}

/* A vocabulary over {a, b} grown by random merges, in random rank order. */
static tokenizer *random_model(uint64_t *seed, merge *merges, int *n_merges)
{
    char tokens[40][64] = {"a", "b"};
    char json[40000] = "", *at = json;
    int n = 2, wanted = 2 + support_below(seed, 30);
    *n_merges = 0;
    for (int tries = 0; n < wanted && tries < 200; tries++) {
        int l = support_below(seed, n), r = support_below(seed, n);
        bool known = strlen(tokens[l]) + strlen(tokens[r]) > 40;
        char joined[128];
        strcat(strcpy(joined, tokens[l]), tokens[r]);
        int id = n;
        for (int i = 0; i < n; i++)
            if (strcmp(tokens[i], joined) == 0)
                id = i; /* a second way to the same token */
        for (int m = 0; m < *n_merges; m++)
            known |= merges[m].left == l && merges[m].right == r;
        if (known)
            continue;
        if (id == n)
            strcpy(tokens[n++], joined);
        merges[(*n_merges)++] = (merge){l, r, id};
    }
    for (int i = *n_merges - 1; i > 0; i--) {
        int k = support_below(seed, i + 1);
        merge m = merges[i];
        merges[i] = merges[k];
        merges[k] = m;
    }
    at += sprintf(at, "{\"model\":{\"vocab\":{");
    for (int i = 0; i < n; i++)
        at += sprintf(at, "%s\"%s\":%d", i ? "," : "", tokens[i], i);
    at += sprintf(at, "},\"merges\":[");
    for (int m = 0; m < *n_merges; m++)
        at += sprintf(at, "%s[\"%s\",\"%s\"]", m ? "," : "", tokens[merges[m].left], tokens[merges[m].right]);
    sprintf(at, "]}}");
    return parse(json);
}

static void merges_by_definition(void **state)
{
    (void)state;
    uint64_t seed = 11;
    for (int round = 0; round < 300; round++) {
        merge merges[256];
        int n_merges, expected[400];
        tokenizer *t = random_model(&seed, merges, &n_merges);
        tokenizer_scratch *s = scratch_of(t);
        for (int i = 0; i < 12; i++) {
            char word[400];
            const int32_t *ids;
            size_t n, size = 1 + (size_t)support_below(&seed, i < 8 ? 40 : 400);
            for (size_t k = 0; k < size; k++) {
                word[k] = (char)('a' + (support_below(&seed, 4) == 0));
                expected[k] = word[k] - 'a';
            }
            size_t n_expected = merge_naively(merges, n_merges, expected, size);
            assert_int_equal(tokenizer_encode(t, s, word, size, false, &ids, &n), STATUS_OK);
            assert_int_equal(n, n_expected);
            assert_memory_equal(ids, expected, n * sizeof *ids);
        }
        tokenizer_scratch_destroy(s);
        tokenizer_destroy(t);
    }
}

/* A megabyte without a place to cut: quadratic work would take minutes here and run into the time limit. */
static void long_runs_take_linear_time(void **state)
{
    (void)state;
    static const char *const names[] = {"gpt2", "qwen2", "deepseek", "mixtral", "metaspace_never", "classes_isolated"};
    static const char *const runs[] = {"a", " ", "\n", "\u0316\u0301", "9", "\u4e2d", "[L]", " [R] ", "'", "<|im"};
    bytes_writer in = {0};
    for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
        char path[64];
        snprintf(path, sizeof path, "tokenizers/%s", names[k]);
        tokenizer *t = load(support_data(path));
        tokenizer_scratch *s = scratch_of(t);
        for (size_t r = 0; r < sizeof runs / sizeof runs[0]; r++) {
            const int32_t *ids;
            size_t n;
            bytes_reset(&in);
            while (in.size < 1 << 20)
                bytes_put(&in, runs[r], strlen(runs[r]));
            assert_int_equal(tokenizer_encode(t, s, (const char *)in.data, in.size, false, &ids, &n), STATUS_OK);
        }
        tokenizer_scratch_destroy(s);
        tokenizer_destroy(t);
    }
    bytes_clear(&in);
}

/* ---- the rest of the interface ---- */

static void tokens_by_name_and_id(void **state)
{
    (void)state;
    tokenizer *t = load(support_data("tokenizers/llama3"));
    int32_t begin = tokenizer_find(t, "<|begin_of_text|>"), call = tokenizer_find(t, "<tool_call>"),
            space = tokenizer_find(t, "\u0120the");
    size_t size;
    assert_true(begin >= 0 && call >= 0 && space >= 0 && begin < tokenizer_n_ids(t));
    assert_int_equal(tokenizer_find(t, "no such token"), -1);
    assert_true(tokenizer_is_special(t, begin));
    assert_false(tokenizer_is_special(t, call));
    assert_false(tokenizer_is_special(t, -1));
    assert_false(tokenizer_is_special(t, tokenizer_n_ids(t)));
    assert_memory_equal(tokenizer_bytes(t, space, &size), " the", 4);
    assert_int_equal(size, 4);
    assert_null(tokenizer_bytes(t, tokenizer_n_ids(t), &size));
    tokenizer_destroy(t);
    t = load(support_data("tokenizers/mixtral"));
    assert_memory_equal(tokenizer_bytes(t, tokenizer_find(t, "\u2581the"), &size), " the", 4);
    assert_memory_equal(tokenizer_bytes(t, tokenizer_find(t, "<0xE2>"), &size), "\xE2", 1);
    assert_int_equal(size, 1);
    tokenizer_destroy(t);
}

static void bad_utf8_is_named(void **state)
{
    (void)state;
    static const char *const bad[] = {"ab\x80",     "ab\xC0\x80", "ab\xED\xA0\x80", "ab\xF4\x90\x80\x80",
                                      "ab\xE2\x82", "ab\xF5zzz",  "ab\xE0\x9Fz"};
    tokenizer *t = load(support_data("tokenizers/gpt2"));
    tokenizer_scratch *s = scratch_of(t);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const int32_t *ids;
        size_t n;
        assert_int_equal(tokenizer_encode(t, s, bad[i], strlen(bad[i]), false, &ids, &n), STATUS_BAD_INPUT);
        assert_non_null(strstr(status_message(), "byte 2 of the text is not UTF-8"));
    }
    tokenizer_scratch_destroy(s);
    tokenizer_destroy(t);
}

typedef struct {
    const tokenizer *t;
    text in;
    uint64_t digest;
} thread_job;

static void *encode_often(void *arg)
{
    thread_job *job = arg;
    tokenizer_scratch *s = NULL;
    const int32_t *ids;
    size_t n;
    if (tokenizer_scratch_create(job->t, &s) != STATUS_OK)
        return NULL;
    for (int round = 0; round < 200; round++) {
        job->digest = 7;
        if (tokenizer_encode(job->t, s, job->in.data, job->in.size, true, &ids, &n) != STATUS_OK)
            job->digest = 0;
        for (size_t i = 0; job->digest && i < n; i++)
            job->digest = (job->digest ^ (uint32_t)ids[i]) * 0x100000001B3u;
    }
    tokenizer_scratch_destroy(s);
    return NULL;
}

static void threads_share_a_tokenizer(void **state)
{
    (void)state;
    static char sample[] = "It's the 3rd \u00c9t\u00e9 of 12345 \u4e2d\u6587 [L] words";
    tokenizer *t = load(support_data("tokenizers/qwen2"));
    thread_job jobs[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        jobs[i] = (thread_job){t, {sample, sizeof sample - 1}, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, encode_often, &jobs[i]), 0);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++)
        assert_true(jobs[i].digest != 0 && jobs[i].digest == jobs[0].digest);
    tokenizer_destroy(t);
}

static void streams_start_again(void **state)
{
    (void)state;
    tokenizer *t = load(support_data("tokenizers/mixtral"));
    tokenizer_stream *s = NULL;
    const char *piece;
    size_t size;
    int32_t open = tokenizer_find(t, "<0xE2>"), word = tokenizer_find(t, "\u2581the");
    assert_int_equal(tokenizer_stream_create(t, true, &s), STATUS_OK);
    assert_int_equal(tokenizer_stream_push(s, word, &piece, &size), STATUS_OK);
    assert_int_equal(size, 3); /* the first blank of a sequence goes */
    assert_int_equal(tokenizer_stream_push(s, open, &piece, &size), STATUS_OK);
    assert_int_equal(size, 0);
    tokenizer_stream_reset(s);
    assert_int_equal(tokenizer_stream_push(s, word, &piece, &size), STATUS_OK);
    assert_int_equal(size, 3);
    assert_int_equal(tokenizer_stream_push(s, open, &piece, &size), STATUS_OK);
    assert_int_equal(tokenizer_stream_push(s, 1 << 20, &piece, &size), STATUS_OK); /* unknown: nothing */
    assert_int_equal(size, 0);
    assert_int_equal(tokenizer_stream_flush(s, &piece, &size), STATUS_OK);
    assert_int_equal(size, 3);
    assert_memory_equal(piece, "\uFFFD", 3);
    assert_int_equal(tokenizer_stream_push(s, word, &piece, &size), STATUS_OK); /* a flush ends one sequence */
    assert_int_equal(size, 3);
    tokenizer_stream_destroy(s);
    tokenizer_destroy(t);
}

/* ---- refusals ---- */

#define MODEL "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}"
#define SPLIT(regex)                                                                                                             \
    "{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex                                           \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}}"

static void refuses_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *json, *says;
    } cases[] = {
        {"", "not JSON"},
        {"[]", "not a JSON object"},
        {"{}", "model: missing"},
        {"{\"version\":\"2.0\"," MODEL "}", "version"},
        {"{" MODEL ",\"truncation\":{\"max_length\":5}}", "truncation is set"},
        {"{" MODEL ",\"padding\":{}}", "padding is set"},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "model: \"Unigram\" is not supported"},
        {"{\"model\":{\"type\":\"WordPiece\"}}", "model: \"WordPiece\""},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", "dropout"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"continuing_subword_prefix\":\"##\"}}", "continuing_subword_prefix"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", "end_of_word_suffix"},
        {"{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", "the id of \"a\""},
        {"{\"model\":{\"vocab\":{\"a\":4000000000},\"merges\":[]}}", "the id of \"a\""},
        {"{\"model\":{\"vocab\":{\"a\":0.5},\"merges\":[]}}", "the id of \"a\""},
        {"{\"model\":{\"vocab\":{\"a\":0}}}", "merges is missing"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"aa\"]}}", "item 0 is not two tokens"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a a a\"]}}", "item 0 is not two tokens"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}", "item 0 is neither"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a a\"]}}", "\"aa\" is not in the vocabulary"},
        {"{\"model\":{\"vocab\":{\"a\\u0000\":0},\"merges\":[]}}", "NUL"},
        {"{" MODEL ",\"normalizer\":{\"type\":\"BertNormalizer\"}}", "normalizer: \"BertNormalizer\" is not supported"},
        {"{" MODEL ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Nmt\"}]}}", "normalizer: \"Nmt\""},
        {"{" MODEL ",\"normalizer\":{\"type\":\"Prepend\"}}", "prepend is missing"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}}", "pre_tokenizer: \"BertPreTokenizer\" is not supported"},
        {"{" MODEL ",\"pre_tokenizer\":{}}", "type is missing"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"__\"}}", "replacement is not one character"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"add_prefix_space\":false}}",
         "contradicts"},
        {"{" MODEL
         ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"\"},\"behavior\":\"Isolated\",\"invert\":false}}",
         "empty pattern"},
        {"{" MODEL
         ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Foo\",\"invert\":false}}",
         "behavior \"Foo\""},
        {"{" MODEL ",\"post_processor\":{\"type\":\"BertProcessing\"}}", "post_processor: \"BertProcessing\""},
        {"{" MODEL ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],"
         "\"special_tokens\":{}}}",
         "lacks \"x\""},
        {"{" MODEL ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"B\"}}]}}",
         "sequence \"B\""},
        {"{" MODEL ",\"decoder\":{\"type\":\"WordPiece\"}}", "decoder: \"WordPiece\""},
        {"{" MODEL ",\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}}",
         "decoder: \"ByteFallback\" behind"},
        {"{" MODEL ",\"added_tokens\":[{\"content\":5}]}", "content is not a string"},
        {SPLIT("(a"), "group that is never closed"},
        {SPLIT("a)"), "a ) too many"},
        {SPLIT("[a"), "[ that is never closed"},
        {SPLIT("[a[b]]"), "[ inside a class"},
        {SPLIT("[a&&b]"), "&& inside a class"},
        {SPLIT("*a"), "a quantifier behind nothing"},
        {SPLIT("(?<=a+)b"), "cannot be used"},
        {SPLIT("\\\\p{Nonsense}"), "cannot be used"},
        {SPLIT("a(?i)b|c"), "flags in its middle"},
        {SPLIT("(?x)a"), "flags other than i and m"},
        {SPLIT("\\\\Kx"), "\\K"},
        {SPLIT("[\\\\W]"), "\\W inside a class"},
        {SPLIT("\\\\xff"), "\\x of a single byte"},
        {SPLIT("(*FAIL)"), "(*"},
        {SPLIT("(?~a)"), "a group of a kind"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tokenizer *t = NULL;
        status st = tokenizer_parse("t.json", cases[i].json, strlen(cases[i].json), &t);
        if (st == STATUS_OK || t)
            fail_msg("accepted: %s", cases[i].json);
        if (strncmp(status_message(), "t.json: ", 8) != 0 || !strstr(status_message(), cases[i].says))
            fail_msg("%s: says \"%s\", not \"%s\"", cases[i].json, status_message(), cases[i].says);
    }
}

static void deep_nesting_is_refused(void **state)
{
    (void)state;
    bytes_writer json = {0};
    tokenizer *t = NULL;
    bytes_put(&json, "{\"normalizer\":", 14);
    for (int i = 0; i < 100000; i++)
        bytes_put(&json, "{\"type\":\"Sequence\",\"normalizers\":[", 35);
    assert_int_not_equal(tokenizer_parse("t.json", json.data, json.size, &t), STATUS_OK);
    bytes_clear(&json);
}

/* ---- the command ---- */

/* Runs `convoke tokenize` in a child, its output into a file; returns the exit code and fills `out`. */
static int run_command(const char *folder, const char *input, const char *option, char *out, size_t size)
{
    char in_path[600], out_path[600];
    snprintf(in_path, sizeof in_path, "%s/in", folder);
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    FILE *file = fopen(in_path, "w");
    fputs(input, file);
    fclose(file);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        char model[600];
        snprintf(model, sizeof model, "%s", support_data("tokenizers/llama3"));
        char *argv[] = {"convoke tokenize", "--model", model, in_path, (char *)option, NULL};
        if (!freopen(out_path, "w", stdout) || !freopen("/dev/null", "w", stderr))
            _exit(99);
        int code = tokenize_command(option ? 5 : 4, argv);
        fflush(stdout);
        _exit(code);
    }
    int wait_status;
    waitpid(child, &wait_status, 0);
    file = fopen(out_path, "r");
    out[fread(out, 1, size - 1, file)] = '\0';
    fclose(file);
    return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : -1;
}

static void command_keeps_id_and_domain(void **state)
{
    (void)state;
    static const char *const in =
        "{\"text\": \"It's\\tmine\", \"id\": \"x\\\"1\", \"domain\": \"math\"}\n\n{\"id\": 7, \"text\": \"\"}\n";
    const char *folder = support_scratch();
    char ids[4096], back[4096];
    assert_int_equal(run_command(folder, in, NULL, ids, sizeof ids), 0);
    assert_non_null(strstr(ids, "\"id\": \"x\\\"1\", \"domain\": \"math\"}\n{\"token_ids\": ["));
    assert_int_equal(run_command(folder, ids, "--decode", back, sizeof back), 0);
    assert_string_equal(back, "{\"text\": \"<|begin_of_text|>It's\\u0009mine\", \"id\": \"x\\\"1\", \"domain\": \"math\"}\n"
                              "{\"text\": \"<|begin_of_text|>\", \"id\": 7}\n");
    assert_int_equal(run_command(folder, "[1]\n", "--decode", back, sizeof back), 1);
    assert_int_equal(run_command(folder, in, "--nonsense", back, sizeof back), 2);
    support_remove(folder);
}

static void command_takes_plain_lines(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char ids[4096], back[4096];
    assert_int_equal(run_command(folder, "{\"text\": \"a\"}\n\nnot json\n", "--no-special", ids, sizeof ids), 0);
    assert_non_null(strstr(ids, "]}\n{\"token_ids\": []}\n{"));
    assert_int_equal(run_command(folder, ids, "--decode", back, sizeof back), 0);
    assert_string_equal(back, "{\"text\": \"{\\\"text\\\": \\\"a\\\"}\"}\n{\"text\": \"\"}\n{\"text\": \"not json\"}\n");
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"ids and texts equal the tokenizers package's, over all kinds of tokenizers and characters", equals_the_package, NULL,
         NULL, NULL},
        {"byte-level: what is encoded decodes to itself", byte_level_round_trip, NULL, NULL, NULL},
        {"words merge as defined: lowest rank first, leftmost of equal rank", merges_by_definition, NULL, NULL, NULL},
        {"a megabyte of one thing takes linear time", long_runs_take_linear_time, NULL, NULL, NULL},
        {"tokens are found by name and shown by id", tokens_by_name_and_id, NULL, NULL, NULL},
        {"invalid UTF-8 is refused with its place", bad_utf8_is_named, NULL, NULL, NULL},
        {"threads share a tokenizer, each with its scratch", threads_share_a_tokenizer, NULL, NULL, NULL},
        {"a stream that was reset or flushed starts a new sequence", streams_start_again, NULL, NULL, NULL},
        {"what is not supported is refused by name", refuses_by_name, NULL, NULL, NULL},
        {"JSON nested without end is refused", deep_nesting_is_refused, NULL, NULL, NULL},
        {"the command keeps id and domain, both ways", command_keeps_id_and_domain, NULL, NULL, NULL},
        {"the command takes plain lines when not all are JSON", command_takes_plain_lines, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
