#include "cluster/stop_text.h"
#include "tests/support.h"

#include <stdbool.h>
#include <string.h>

enum { MAX_STRINGS = 4, MAX_TEXT = 40 };

typedef struct {
    char texts[MAX_STRINGS][8];
    stop_string strings[MAX_STRINGS];
    int n;
} stop_set;

static void random_letters(uint64_t *seed, char *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = (char)('a' + support_below(seed, 2));
}

static stop_set random_set(uint64_t *seed)
{
    stop_set s = {.n = support_below(seed, MAX_STRINGS + 1)};
    for (int i = 0; i < s.n; i++) {
        size_t size = 1 + (size_t)support_below(seed, 6);
        random_letters(seed, s.texts[i], size);
        s.strings[i] = (stop_string){s.texts[i], size};
    }
    return s;
}

static bool stands_at(const stop_string *s, const char *text, size_t size, size_t at)
{
    return size - at >= s->size && memcmp(text + at, s->text, s->size) == 0;
}

/* The definition: the first place in the text where a stop string stands, of those there the first listed. */
static stop_verdict by_definition(const char *text, size_t size, const stop_set *s, int include)
{
    stop_verdict v = {.shown = size, .stop = -1};
    for (size_t at = 0; at < size && v.stop < 0; at++)
        for (int i = 0; i < s->n && v.stop < 0; i++)
            if (stands_at(&s->strings[i], text, size, at)) {
                v.stop = i;
                v.stop_at = at;
                v.shown = include ? at + s->strings[i].size : at;
            }
    /* Nothing may be shown from the first place on where a stop string may stand once more text has come. */
    for (size_t at = 0; at < size && v.stop < 0 && v.shown == size; at++)
        for (int i = 0; i < s->n; i++)
            if (size - at < s->strings[i].size && memcmp(text + at, s->strings[i].text, size - at) == 0)
                v.shown = at;
    return v;
}

/* A text comes in random pieces; the answers are those of the definition over all of it so far. */
static void equals_its_definition(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 40000; round++) {
        stop_set s = random_set(&seed);
        char text[MAX_TEXT];
        random_letters(&seed, text, MAX_TEXT);
        int include = support_below(&seed, 2);
        size_t size = 0, searched = 0;
        while (size < MAX_TEXT) {
            size += 1 + (size_t)support_below(&seed, 6);
            size = size > MAX_TEXT ? MAX_TEXT : size;
            stop_verdict v = stop_text_check(text, size, searched, s.strings, s.n, include);
            stop_verdict expected = by_definition(text, size, &s, include);
            assert_int_equal(v.stop, expected.stop);
            assert_int_equal(v.shown, expected.shown);
            if (v.stop >= 0) {
                assert_int_equal(v.stop_at, expected.stop_at);
                break;
            }
            searched = size;
        }
    }
}

/* What was shown is never taken back, whatever the pieces, and in the end it is the text up to the stop. */
static void shown_text_stays_shown(void **state)
{
    (void)state;
    uint64_t seed = 4;
    for (int round = 0; round < 20000; round++) {
        stop_set s = random_set(&seed);
        char text[MAX_TEXT];
        random_letters(&seed, text, MAX_TEXT);
        size_t shown = 0, searched = 0;
        for (size_t size = 1; size <= MAX_TEXT; size++) {
            stop_verdict v = stop_text_check(text, size, searched, s.strings, s.n, 0);
            assert_true(v.shown >= shown && v.shown <= size);
            shown = v.shown;
            searched = size;
            if (v.stop >= 0) {
                assert_int_equal(v.shown, v.stop_at);
                break;
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"stops and held back bytes are those of the definition", equals_its_definition, NULL, NULL, NULL},
        {"what was shown stays shown", shown_text_stays_shown, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
