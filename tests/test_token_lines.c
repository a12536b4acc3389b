#include "tests/support.h"
#include "worker/token_lines.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static status parse(const char *text, token_lines *out)
{
    return token_lines_parse("lines.jsonl", text, strlen(text), 100, out);
}

static void reads_all_fields(void **state)
{
    (void)state;
    token_lines t = {0};
    assert_int_equal(parse("{\"token_ids\": [1, 2, 99], \"domain\": \"math\", \"id\": \"a\"}\n"
                           "{\"token_ids\": [0], \"other\": {\"x\": [1]}, \"text\": \"passed over\"}\n"
                           "{\"id\": null, \"domain\": \"novel\", \"token_ids\": [5, 5]}\r\n"
                           "{\"token_ids\":[7],\"domain\":\"math\"}",
                           &t),
                     STATUS_OK);
    assert_int_equal(t.n_lines, 4);
    const int first[3] = {1, 2, 99};
    assert_int_equal(t.lines[0].n_ids, 3);
    assert_memory_equal(t.lines[0].ids, first, sizeof first);
    assert_string_equal(t.lines[0].id, "a");
    assert_int_equal(t.lines[1].domain, -1);
    assert_null(t.lines[2].id);
    assert_int_equal(t.n_domains, 2);
    assert_string_equal(t.domains[t.lines[0].domain], "math");
    assert_string_equal(t.domains[t.lines[2].domain], "novel");
    assert_int_equal(t.lines[3].domain, t.lines[0].domain);
    token_lines_clear(&t);
}

static void empty_lines_keep_numbers(void **state)
{
    (void)state;
    token_lines t = {0};
    assert_int_equal(parse("\n  \t\r\n{\"token_ids\": [1]}\n\n\n{\"token_ids\": [2]}\n\n", &t), STATUS_OK);
    assert_int_equal(t.n_lines, 2);
    assert_int_equal(t.lines[0].line_number, 3);
    assert_int_equal(t.lines[1].line_number, 6);
    token_lines_clear(&t);
}

static void mistakes_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *text, *sentence;
    } cases[] = {
        {"{\"token_ids\": [1]}\n{\"text\": \"hello\"}\n", "lines.jsonl: line 2: has text but no token_ids (convoke tokenize"},
        {"{\"token_ids\": []}", "lines.jsonl: line 1: token_ids is empty"},
        {"{\"token_ids\": [1, 100]}", "lines.jsonl: line 1: token_ids: item 1 is 100, outside 0 to 99"},
        {"{\"token_ids\": [-1]}", "item 0 is -1, outside 0 to 99"},
        {"{\"token_ids\": [1.5]}", "item 0 is 1.5, not a whole number"},
        {"{\"token_ids\": [1, \"2\"]}", "item 1 is not a number"},
        {"{\"token_ids\": [1e300]}", "not a whole number"},
        {"{\"token_ids\": 5}", "line 1: token_ids is not a list"},
        {"{\"tokens\": [1]}", "line 1: token_ids is missing"},
        {"{\"token_ids\": [1], \"domain\": 5}", "line 1: domain is not a string"},
        {"{\"token_ids\": [1], \"id\": 5}", "line 1: id is not a string"},
        {"\n[1, 2]\n", "line 2: not a JSON object"},
        {"{\"token_ids\": [1]", "line 1: not JSON"},
        {"{\"token_ids\": [1]} x", "line 1: something stands behind"},
        {"", "lines.jsonl: holds no token lines"},
        {"\n\n", "lines.jsonl: holds no token lines"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        token_lines t = {0};
        assert_int_equal(parse(cases[i].text, &t), STATUS_BAD_INPUT);
        if (!strstr(status_message(), cases[i].sentence))
            fail_msg("\"%s\" does not say \"%s\"", status_message(), cases[i].sentence);
        assert_null(t.lines); /* outputs change only on success */
    }
}

static void zero_bytes(void **state)
{
    (void)state;
    token_lines t = {0};
    static const char text[] = "{\"token_ids\": [1]}\0 {";
    assert_int_equal(token_lines_parse("x", text, sizeof text - 1, 100, &t), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "zero byte"));
}

static void long_lines(void **state)
{
    (void)state;
    token_lines t = {0};
    size_t size = TOKEN_LINE_MAX_BYTES + 10;
    char *text = malloc(size);
    memset(text, ' ', size);
    assert_int_equal(token_lines_parse("x", text, size, 100, &t), STATUS_BAD_INPUT);
    assert_non_null(strstr(status_message(), "x: line 1: longer than 4 MiB"));
    free(text);
}

static void many_domains(void **state)
{
    (void)state;
    token_lines t = {0};
    char text[64 * 100];
    size_t n = 0;
    for (int i = 0; i < 100; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "{\"token_ids\": [%d], \"domain\": \"d%d\"}\n", i, i % 50);
    assert_int_equal(token_lines_parse("x", text, n, 100, &t), STATUS_OK);
    assert_int_equal(t.n_domains, 50);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(t.lines[i].domain, i % 50);
        assert_int_equal(t.lines[i].ids[0], i);
    }
    token_lines_clear(&t);
}

/* The file form and the memory form are the same. */
static void file_equals_memory(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200];
    snprintf(path, sizeof path, "%s/a.jsonl", folder);
    static const char *const texts[] = {"{\"token_ids\": [1]}\n{\"token_ids\": [2]}\n",
                                        "{\"token_ids\": [1]}\n{\"token_ids\": [2]}", "{\"token_ids\": [1]}\n{\"token_ids\": 2}",
                                        "", "\n"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        fputs(texts[i], file);
        fclose(file);
        token_lines a = {0}, b = {0};
        char said[1024];
        status st = token_lines_parse(path, texts[i], strlen(texts[i]), 100, &a);
        snprintf(said, sizeof said, "%s", status_message());
        assert_int_equal(token_lines_read(path, 100, &b), st);
        if (st != STATUS_OK)
            assert_string_equal(status_message(), said);
        assert_int_equal(a.n_lines, b.n_lines);
        token_lines_clear(&a);
        token_lines_clear(&b);
    }
    snprintf(path, sizeof path, "%s/absent.jsonl", folder);
    token_lines t = {0};
    assert_int_equal(token_lines_read(path, 100, &t), STATUS_IO);
    assert_non_null(strstr(status_message(), "absent.jsonl: cannot be opened"));
    support_remove(folder);
}

static void bundled_texts(void **state)
{
    (void)state;
    token_lines t = {0};
    assert_int_equal(token_lines_read(support_source("deploy/models/convoke-demo/texts.jsonl"), 4096, &t), STATUS_OK);
    assert_int_equal(t.n_domains, 6);
    for (int i = 0; i < t.n_lines; i++) {
        assert_non_null(t.lines[i].id);
        assert_in_range(t.lines[i].domain, 0, 5);
    }
    token_lines_clear(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"ids, domains and names are read, other keys passed over", reads_all_fields, NULL, NULL, NULL},
        {"empty lines are skipped and still counted", empty_lines_keep_numbers, NULL, NULL, NULL},
        {"a mistake is named with file and line, and nothing comes out", mistakes_are_named, NULL, NULL, NULL},
        {"a zero byte is refused", zero_bytes, NULL, NULL, NULL},
        {"a line over the limit is refused", long_lines, NULL, NULL, NULL},
        {"domains are numbered by first appearance", many_domains, NULL, NULL, NULL},
        {"a file reads like the same text in memory", file_equals_memory, NULL, NULL, NULL},
        {"the bundled texts are read", bundled_texts, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
