#include "proto/console.h"
#include "tests/support.h"

#include <poll.h>
#include <pty.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Everything that can be read from fd now. */
static size_t drain(int fd, char *text, size_t size)
{
    size_t n = 0;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    while (n < size - 1 && poll(&p, 1, 20) == 1) {
        ssize_t got = read(fd, text + n, size - 1 - n);
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    text[n] = '\0';
    return n;
}

static void silent_in_a_pipe(void **state)
{
    (void)state;
    int ends[2];
    char text[64];
    assert_int_equal(pipe(ends), 0);
    console c;
    console_open(&c, ends[1]);
    console_show(&c, "%d of %d", 1, 2);
    console_erase(&c);
    assert_int_equal(drain(ends[0], text, sizeof text), 0);
    close(ends[0]);
    close(ends[1]);
}

static void drawn_on_a_terminal(void **state)
{
    (void)state;
    int outer, inner;
    struct winsize size = {.ws_row = 20, .ws_col = 21};
    char text[512];
    if (openpty(&outer, &inner, NULL, NULL, &size) != 0)
        skip();
    setenv("TERM", "xterm", 1);
    console c;
    console_open(&c, inner);
    console_show(&c, "%d of %d", 1, 2);
    for (int i = 0; i < 1000; i++)
        console_show(&c, "too soon"); /* takes far less than 0.1 s a piece; some may be drawn on a slow machine */
    drain(outer, text, sizeof text);
    assert_int_equal(strncmp(text, "\r1 of 2\x1b[K", 10), 0);
    assert_true(strlen(text) < 100); /* not a thousand lines */
    console_erase(&c);
    console_erase(&c);
    drain(outer, text, sizeof text);
    assert_string_equal(text, "\r\x1b[K"); /* once */
    console_show(&c, "%s", "0123456789012345678901234567890123456789");
    drain(outer, text, sizeof text);
    assert_string_equal(text, "\r01234567890123456789\x1b[K"); /* 20 of 21 columns */
    close(outer);
    close(inner);
}

static void numbers_for_people(void **state)
{
    (void)state;
    assert_string_equal(human_bytes(512).text, "512 B");
    assert_string_equal(human_bytes(1024).text, "1.00 KiB");
    assert_string_equal(human_bytes(1.87 * (1 << 30)).text, "1.87 GiB");
    assert_string_equal(human_bytes(123.0 * (1 << 20)).text, "123 MiB");
    assert_string_equal(human_bandwidth(19.8e9).text, "19.8 GB/s");
    assert_string_equal(human_bandwidth(999.9e6).text, "1.00 GB/s");
    assert_string_equal(human_rate(1234.4, "tok/s").text, "1234 tok/s");
    assert_string_equal(human_rate(12.34, "tok/s").text, "12.3 tok/s");
    assert_string_equal(human_seconds(0.0000123).text, "12 us");
    assert_string_equal(human_seconds(0.00123).text, "1.2 ms");
    assert_string_equal(human_seconds(0.041).text, "41 ms");
    assert_string_equal(human_seconds(2.5).text, "2.5 s");
    assert_string_equal(human_seconds(59.99).text, "1 min 0 s");
    assert_string_equal(human_seconds(200).text, "3 min 20 s");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"nothing is written into a pipe", silent_in_a_pipe, NULL, NULL, NULL},
        {"one line on a terminal: redrawn seldom, cut to the width, erased once", drawn_on_a_terminal, NULL, NULL, NULL},
        {"numbers are written for people", numbers_for_people, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
