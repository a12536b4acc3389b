/* The safetensors reader and writer: what one writes the other reads, and no damaged file does more than fail with a sentence. */
#include "tests/support.h"

#include "proto/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A file in memory: length, `header`, `n_data` bytes that count up. */
static unsigned char *build(const char *header, size_t n_data, size_t *size)
{
    size_t n = strlen(header);
    *size = 8 + n + n_data;
    unsigned char *bytes = malloc(*size);
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(n >> 8 * i);
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < n_data; i++)
        bytes[8 + n + i] = (unsigned char)i;
    return bytes;
}

static status try_bytes(const void *bytes, size_t size)
{
    safetensors *file = NULL;
    status st = safetensors_open_memory("f.safetensors", bytes, size, &file);
    if (st == STATUS_OK) {
        /* whatever is accepted must be wholly inside */
        for (int i = 0; i < safetensors_count(file); i++) {
            const tensor_view *t = safetensors_at(file, i);
            const unsigned char *data = t->data;
            assert_true(data >= (const unsigned char *)bytes && data + t->n_bytes <= (const unsigned char *)bytes + size);
            assert_ptr_equal(safetensors_find(file, t->name), t);
        }
    } else {
        assert_null(file);
        assert_non_null(strstr(status_message(), "f.safetensors"));
        assert_null(strchr(status_message(), '\n'));
    }
    safetensors_close(file);
    return st;
}

/* A header that must be refused with a sentence holding `words`. */
static void refuse(const char *header, size_t n_data, const char *words)
{
    size_t size;
    unsigned char *bytes = build(header, n_data, &size);
    assert_int_not_equal(try_bytes(bytes, size), STATUS_OK);
    if (!strstr(status_message(), words))
        fail_msg("\"%s\" does not say \"%s\"", status_message(), words);
    free(bytes);
}

static void accept(const char *header, size_t n_data)
{
    size_t size;
    unsigned char *bytes = build(header, n_data, &size);
    if (try_bytes(bytes, size) != STATUS_OK)
        fail_msg("%s", status_message());
    free(bytes);
}

static void bad_entries(void **state)
{
    (void)state;
    refuse("{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor a: dtype is missing");
    refuse("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor a: shape is missing");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor a: data_offsets is missing");
    refuse("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype is given twice");
    refuse("{\"a\":{\"dtype\":\"Q4\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype Q4");
    refuse("{\"a\":{\"dtype\":3,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype is not a string");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "shape is not a list");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}", 1, "-1");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1.5],\"data_offsets\":[0,1]}}", 1, "whole number");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, "more than 8 dimensions");
    refuse("{\"a\":{\"dtype\":\"F64\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "2^53");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1]}}", 1, "two numbers");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,1]}}", 2, "behind their end");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,9007199254740993]}}", 1, "tensor a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 3, "cut short");
    refuse("{\"a\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "shape and dtype BF16 make 8");
    refuse("{\"a\":[]}", 0, "not an object");
    refuse("{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "control character");
}

static void bad_layouts(void **state)
{
    (void)state;
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
           "offsets\":[1,3]}}",
           3, "tensor b begins at byte 1, but the one before it ends at 2");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 2, "begins at byte 1");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 3, "2 bytes behind the last tensor");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_"
           "offsets\":[1,2]}}",
           2, "tensor a is listed twice");
}

static void bad_headers(void **state)
{
    (void)state;
    refuse("", 0, "'{'");
    refuse("[]", 0, "'{'");
    refuse("{\"a\":", 0, "not JSON");
    refuse("{} x", 0, "behind the JSON value");
    refuse("{\"\xff\":1}", 0, "UTF-8");
    refuse("{\"\xed\xa0\x80\":1}", 0, "UTF-8");
    refuse("{\"\xc0\x80\":1}", 0, "UTF-8");
    refuse("{\"__metadata__\":{\"a\":1}}", 0, "__metadata__: a is not a string");
    refuse("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
    refuse("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice");

    unsigned char huge[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, '{', '}'};
    assert_int_not_equal(try_bytes(huge, sizeof huge), STATUS_OK);
    memset(huge, 0, 8);
    huge[0] = 9;
    assert_int_not_equal(try_bytes(huge, sizeof huge), STATUS_OK);
    assert_non_null(strstr(status_message(), "cut short"));
}

static void odd_but_right(void **state)
{
    (void)state;
    accept("{}", 0);
    accept("{}     ", 0);
    accept("{\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4);
    accept("{\"e\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0);
    /* listed out of order, an empty tensor between two others, an unknown field */
    accept("{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]},\"e\":{\"dtype\":\"U8\",\"shape\":[0],\"data_"
           "offsets\":[1,1]},"
           "\"a\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":{}}}",
           3);
}

static void file_order(void **state)
{
    (void)state;
    size_t size;
    unsigned char *bytes = build("{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]},\"__metadata__\":{\"k\":\"v\"},"
                                 "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                                 3, &size);
    safetensors *file = NULL;
    assert_int_equal(safetensors_open_memory("m", bytes, size, &file), STATUS_OK);
    assert_int_equal(safetensors_count(file), 2);
    assert_string_equal(safetensors_at(file, 0)->name, "a");
    assert_string_equal(safetensors_at(file, 1)->name, "b");
    assert_int_equal(*(const unsigned char *)safetensors_find(file, "b")->data, 1);
    assert_null(safetensors_find(file, "c"));
    assert_null(safetensors_find(file, "__metadata__"));
    assert_string_equal(safetensors_metadata(file, "k"), "v");
    assert_null(safetensors_metadata(file, "a"));
    safetensors_close(file);
    free(bytes);
}

/* ---- damage ---- */

static char *slurp(const char *path, size_t *size)
{
    FILE *from = fopen(path, "rb");
    assert_non_null(from);
    char *bytes = malloc(1 << 20);
    *size = fread(bytes, 1, 1 << 20, from);
    fclose(from);
    return bytes;
}

static void write_sample(const char *path)
{
    safetensors_writer *writer = NULL;
    int a, b, c;
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_OK);
    assert_int_equal(safetensors_writer_metadata(writer, "format", "a \"quoted\" \\ \n value"), STATUS_OK);
    assert_int_equal(safetensors_writer_declare(writer, "small", DTYPE_U8, 1, (int64_t[]){3}, &a), STATUS_OK);
    assert_int_equal(safetensors_writer_declare(writer, "wide", DTYPE_I64, 2, (int64_t[]){2, 3}, &b), STATUS_OK);
    assert_int_equal(safetensors_writer_declare(writer, "half", DTYPE_F16, 0, NULL, &c), STATUS_OK);
    assert_int_equal(safetensors_writer_begin(writer), STATUS_OK);
    assert_int_equal(safetensors_writer_put(writer, a, 1, "xy", 2), STATUS_OK);
    int64_t numbers[6] = {1, -2, 3, -4, 5, -6};
    assert_int_equal(safetensors_writer_put(writer, b, 24, numbers + 3, 24), STATUS_OK);
    assert_int_equal(safetensors_writer_put(writer, b, 0, numbers, 24), STATUS_OK);
    assert_int_not_equal(access(path, F_OK), 0); /* not there before it is whole */
    assert_int_equal(safetensors_writer_finish(writer), STATUS_OK);
    safetensors_writer_destroy(writer);
}

static void written_is_read(void **state)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/x.safetensors", (const char *)*state);
    write_sample(path);
    safetensors *file = NULL;
    assert_int_equal(safetensors_open(path, &file), STATUS_OK);
    assert_string_equal(safetensors_path(file), path);
    assert_string_equal(safetensors_metadata(file, "format"), "a \"quoted\" \\ \n value");
    const tensor_view *t = safetensors_find(file, "wide");
    assert_int_equal(t->dtype, DTYPE_I64);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->shape[1], 3);
    assert_int_equal((uintptr_t)t->data % 8, 0);
    assert_memory_equal(t->data, ((int64_t[]){1, -2, 3, -4, 5, -6}), 48);
    t = safetensors_find(file, "small");
    assert_memory_equal(t->data, "\0xy", 3); /* bytes never put are zero */
    t = safetensors_find(file, "half");
    assert_int_equal(t->n_dims, 0);
    assert_int_equal(t->n_bytes, 2);
    size_t size;
    const char *map = safetensors_mapping(file, &size);
    assert_true((const char *)t->data > map && (const char *)t->data < map + size);
    safetensors_close(file);
}

static void unfinished_leaves_nothing(void **state)
{
    char path[4200], command[4400];
    snprintf(path, sizeof path, "%s/never.safetensors", (const char *)*state);
    safetensors_writer *writer = NULL;
    int index;
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_OK);
    assert_int_equal(safetensors_writer_declare(writer, "a", DTYPE_U8, 1, (int64_t[]){3}, &index), STATUS_OK);
    assert_int_equal(safetensors_writer_begin(writer), STATUS_OK);
    assert_int_not_equal(safetensors_writer_put(writer, index, 2, "xy", 2), STATUS_OK);
    assert_int_not_equal(safetensors_writer_put(writer, index + 1, 0, "x", 1), STATUS_OK);
    assert_int_not_equal(safetensors_writer_declare(writer, "b", DTYPE_U8, 1, (int64_t[]){3}, &index), STATUS_OK);
    safetensors_writer_destroy(writer);
    snprintf(command, sizeof command, "ls %s | grep -q never", (const char *)*state);
    assert_int_not_equal(system(command), 0);
}

static void twins_refused(void **state)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/twins.safetensors", (const char *)*state);
    safetensors_writer *writer = NULL;
    int index;
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_OK);
    for (int i = 0; i < 2; i++)
        assert_int_equal(safetensors_writer_declare(writer, "a", DTYPE_U8, 1, (int64_t[]){3}, &index), STATUS_OK);
    assert_int_not_equal(safetensors_writer_begin(writer), STATUS_OK);
    assert_non_null(strstr(status_message(), "tensor a is declared twice"));
    safetensors_writer_destroy(writer);
}

static void unwritable_place(void **state)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/no/such/folder/x", (const char *)*state);
    safetensors_writer *writer = NULL;
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_IO);
    assert_null(writer);
    assert_non_null(strstr(status_message(), path));
    safetensors *file = NULL;
    assert_int_equal(safetensors_open(path, &file), STATUS_IO);
    assert_int_not_equal(safetensors_open(*state, &file), STATUS_OK); /* a folder */
    assert_null(file);
}

static void every_cut_fails(void **state)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/cut.safetensors", (const char *)*state);
    write_sample(path);
    size_t size;
    char *bytes = slurp(path, &size);
    for (size_t n = 0; n < size; n++) {
        /* an exact copy, so that a sanitizer sees one byte too far */
        char *cut = malloc(n ? n : 1);
        memcpy(cut, bytes, n);
        assert_int_not_equal(try_bytes(cut, n), STATUS_OK);
        free(cut);
    }
    assert_int_equal(truncate(path, (off_t)size - 1), 0);
    safetensors *file = NULL;
    assert_int_not_equal(safetensors_open(path, &file), STATUS_OK);
    assert_int_equal(truncate(path, 0), 0);
    assert_int_not_equal(safetensors_open(path, &file), STATUS_OK);
    free(bytes);
}

static void flipped_bits_are_harmless(void **state)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/flip.safetensors", (const char *)*state);
    write_sample(path);
    size_t size;
    char *bytes = slurp(path, &size);
    uint64_t seed = 7;
    for (int round = 0; round < 5000; round++) {
        char *bad = malloc(size);
        memcpy(bad, bytes, size);
        for (int flips = 1 + support_below(&seed, 4); flips; flips--)
            bad[support_below(&seed, (int)size)] ^= (char)(1 << support_below(&seed, 8));
        try_bytes(bad, size);
        free(bad);
    }
    free(bytes);
}

static void many_names(void **state)
{
    char path[4200], name[64];
    snprintf(path, sizeof path, "%s/many.safetensors", (const char *)*state);
    safetensors_writer *writer = NULL;
    int index;
    assert_int_equal(safetensors_writer_create(path, &writer), STATUS_OK);
    for (int i = 0; i < 3000; i++) {
        snprintf(name, sizeof name, "model.layers.%d.experts.%d", i / 60, i % 60);
        assert_int_equal(safetensors_writer_declare(writer, name, i % 3 ? DTYPE_BF16 : DTYPE_F32, 1, (int64_t[]){i % 5}, &index),
                         STATUS_OK);
    }
    assert_int_equal(safetensors_writer_finish(writer), STATUS_OK);
    safetensors_writer_destroy(writer);
    safetensors *file = NULL;
    assert_int_equal(safetensors_open(path, &file), STATUS_OK);
    for (int i = 0; i < 3000; i++) {
        snprintf(name, sizeof name, "model.layers.%d.experts.%d", i / 60, i % 60);
        const tensor_view *t = safetensors_find(file, name);
        assert_non_null(t);
        assert_int_equal(t->shape[0], i % 5);
        assert_int_equal((uintptr_t)t->data % tensor_dtype_size(t->dtype), 0);
    }
    safetensors_close(file);
}

static int scratch(void **state)
{
    *state = strdup(support_scratch());
    return 0;
}

static int unscratch(void **state)
{
    support_remove(*state);
    free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"a damaged entry is refused, the sentence names tensor and field", bad_entries, NULL, NULL, NULL},
        {"overlap, hole, bytes left over, twin names: refused", bad_layouts, NULL, NULL, NULL},
        {"a damaged header is refused", bad_headers, NULL, NULL, NULL},
        {"unusual but well-formed files are read", odd_but_right, NULL, NULL, NULL},
        {"tensors come in file order and are found by name", file_order, NULL, NULL, NULL},
        {"what the writer wrote the reader reads, aligned", written_is_read, scratch, unscratch, NULL},
        {"an unfinished file leaves nothing behind", unfinished_leaves_nothing, scratch, unscratch, NULL},
        {"a name declared twice is refused", twins_refused, scratch, unscratch, NULL},
        {"a place that cannot be written or read: one sentence", unwritable_place, scratch, unscratch, NULL},
        {"a file cut at any byte is refused", every_cut_fails, scratch, unscratch, NULL},
        {"flipped bits never reach outside the file", flipped_bits_are_harmless, scratch, unscratch, NULL},
        {"3000 tensors are all found, each aligned to its element", many_names, scratch, unscratch, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
