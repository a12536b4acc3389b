/* The control connection against peers that lie, stall, flood or babble: each is refused with a reason or closed, and the leader
 * gets through and is served. */
#include "cluster/control_server.h"
#include "proto/clock.h"
#include "proto/frame.h"
#include "tests/support.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static control_server *server;
static control_secret secret;
static int n_joined, n_lost, n_messages, n_refused;
static bool accept_hello;
static char lost_why[1024];
static bool told_later; /* by the last refusal that was read */
static char refused_peer[300], refused_why[1024];

static bool joined(void *arg, const Convoke__Control__Hello *hello)
{
    (void)arg, (void)hello;
    n_joined++;
    if (!accept_hello)
        status_fail(STATUS_BAD_INPUT, "not today");
    return accept_hello;
}

static void message(void *arg, const Convoke__Control__ToCoordinator *m)
{
    (void)arg, (void)m;
    n_messages++;
}

static void lost(void *arg, bool refused, const char *why)
{
    (void)arg, (void)refused;
    n_lost++;
    snprintf(lost_why, sizeof lost_why, "%s", why);
}

static void refused(void *arg, const char *peer, const char *why)
{
    (void)arg;
    n_refused++;
    snprintf(refused_peer, sizeof refused_peer, "%s", peer);
    snprintf(refused_why, sizeof refused_why, "%s", why);
}

static const control_listener listener = {joined, message, lost, refused};

static int set_up(void **state)
{
    (void)state;
    n_joined = n_lost = n_messages = n_refused = 0;
    accept_hello = true;
    assert_int_equal(control_secret_make(&secret), STATUS_OK);
    assert_int_equal(control_server_create("127.0.0.1:0", &listener, NULL, &server), STATUS_OK);
    control_server_expect(server, &secret);
    control_server_set_launch(server, 7);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    control_server_destroy(server);
    return 0;
}

/* ---- peers ---- */

static int dial(void)
{
    char host[256], port[8];
    struct addrinfo *found;
    assert_int_equal(control_split_address("test", control_server_address(server, true), host, port), STATUS_OK);
    assert_int_equal(getaddrinfo(host, port, NULL, &found), 0);
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, found->ai_addr, found->ai_addrlen), 0);
    freeaddrinfo(found);
    return fd;
}

/* Lets the server work until nothing happens for a moment, or the condition holds. */
static void serve(const int *counter, int wanted)
{
    double end = clock_seconds() + 5;
    while (clock_seconds() < end && !(counter && *counter >= wanted)) {
        struct pollfd fd = {.fd = control_server_fd(server), .events = POLLIN};
        int n = poll(&fd, 1, counter ? 100 : 30);
        control_server_step(server);
        if (n == 0 && !counter)
            return;
    }
}

static void put(int fd, const void *bytes, size_t n)
{
    assert_int_equal(send(fd, bytes, n, MSG_NOSIGNAL), n);
}

static void say_hello(int fd, uint32_t protocol, const control_secret *with, uint32_t n_ranks, size_t n_lists)
{
    Convoke__Control__Hello hello = CONVOKE__CONTROL__HELLO__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    uint32_t numbers[8] = {0};
    char *hosts[8] = {"a", "b", "c", "d", "e", "f", "g", "h"};
    bytes_writer out = {0};
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO;
    m.hello = &hello;
    hello.protocol = protocol;
    hello.secret = (ProtobufCBinaryData){.len = (size_t)with->n, .data = (uint8_t *)with->text};
    hello.n_ranks = n_ranks;
    hello.n_node_of_rank = hello.n_host_of_rank = hello.n_pid_of_rank = n_lists;
    hello.node_of_rank = hello.pid_of_rank = numbers;
    hello.host_of_rank = hosts;
    assert_int_equal(control_put_to_coordinator(&out, &m), STATUS_OK);
    put(fd, out.data, out.size);
    bytes_clear(&out);
}

static void say_beat(int fd, uint64_t launch)
{
    Convoke__Control__Beat beat = CONVOKE__CONTROL__BEAT__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    bytes_writer out = {0};
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT;
    m.beat = &beat;
    beat.launch = launch;
    assert_int_equal(control_put_to_coordinator(&out, &m), STATUS_OK);
    put(fd, out.data, out.size);
    bytes_clear(&out);
}

static int lead(void)
{
    int fd = dial(), before = n_joined;
    say_hello(fd, CONTROL_PROTOCOL, &secret, 2, 2);
    serve(&n_joined, before + 1);
    assert_int_equal(n_joined, before + 1);
    return fd;
}

/* The peer is told why, and then the connection ends. "" when it was closed without a word. */
static const char *read_refusal(int fd)
{
    static char reason[1024];
    char bytes[4096];
    size_t n = 0;
    double end = clock_seconds() + 8;
    reason[0] = '\0';
    for (;;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        serve(NULL, 0);
        if (clock_seconds() > end)
            return "still open";
        if (poll(&p, 1, 10) <= 0)
            continue;
        ssize_t got = recv(fd, bytes + n, sizeof bytes - n, 0);
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    close(fd);
    if (n > FRAME_HEADER_BYTES) {
        Convoke__Control__ToLeader *m;
        assert_int_equal(control_get_to_leader(bytes + FRAME_HEADER_BYTES, n - FRAME_HEADER_BYTES, &m), STATUS_OK);
        assert_int_equal(m->kind_case, CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL);
        snprintf(reason, sizeof reason, "%s", m->refusal->reason);
        told_later = m->refusal->later;
        convoke__control__to_leader__free_unpacked(m, NULL);
    }
    return reason;
}

static void assert_refused(int fd, const char *expected)
{
    const char *reason = read_refusal(fd);
    if (!strstr(reason, expected))
        fail_msg("\"%s\" does not say \"%s\"", reason, expected);
}

/* Before the secret was shown, or after it, but as no leader: our side is told, too, and who may come again is told so. */
static void assert_turned_away(int fd, const char *expected, bool later)
{
    int before = n_refused;
    assert_refused(fd, expected);
    assert_int_equal(n_refused, before + 1);
    assert_non_null(strstr(refused_why, expected));
    assert_int_equal(strncmp(refused_peer, "127.0.0.1:", 10), 0);
    assert_int_equal(told_later, later);
}

/* After whatever happened: a leader joins and is heard. */
static void assert_still_serves(void)
{
    int fd = lead();
    say_beat(fd, 7);
    int before = n_messages;
    serve(&n_messages, before + 1);
    assert_int_equal(n_messages, before + 1);
    close(fd);
}

/* ---- tests ---- */

static void wrong_hellos(void **state)
{
    (void)state;
    control_secret wrong = secret;
    int fd = dial();
    wrong.text[wrong.n - 1] ^= 1;
    say_hello(fd, CONTROL_PROTOCOL, &wrong, 2, 2);
    assert_turned_away(fd, "wrong secret", false);
    wrong.n = 0;
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL, &wrong, 2, 2);
    assert_turned_away(fd, "wrong secret", false);
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL + 1, &secret, 2, 2);
    assert_turned_away(fd, "protocol version", false);
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL, &secret, 3, 2);
    assert_turned_away(fd, "lists of ranks", false);
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL, &secret, 0, 0);
    assert_turned_away(fd, "lists of ranks", false);
    fd = dial();
    say_beat(fd, 7);
    assert_turned_away(fd, "a Hello was expected", false);
    assert_int_equal(n_joined, 0);
    accept_hello = false;
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL, &secret, 2, 2);
    assert_turned_away(fd, "not today", false);
    accept_hello = true;
    control_server_expect(server, NULL);
    fd = dial();
    say_hello(fd, CONTROL_PROTOCOL, &secret, 2, 2);
    assert_turned_away(fd, "no workers are expected", true);
    control_server_expect(server, &secret);
    assert_still_serves();
}

static void wrong_bytes(void **state)
{
    (void)state;
    unsigned char huge[4] = {0xff, 0xff, 0xff, 0x7f};
    char garbage[300];
    uint64_t random = 5;
    int fd = dial();
    put(fd, huge, sizeof huge);
    assert_refused(fd, "a frame of 2147483647 bytes, more than the");
    fd = dial();
    put(fd, "GET / HTTP/1.1\r\nHost: convoke\r\n\r\n", 33);
    assert_refused(fd, "a frame of");
    for (int i = 0; i < 20; i++) {
        for (size_t k = 0; k < sizeof garbage; k++)
            garbage[k] = (char)support_random(&random);
        frame_put_header((unsigned char *)garbage, sizeof garbage - FRAME_HEADER_BYTES);
        fd = dial();
        put(fd, garbage, sizeof garbage);
        assert_string_not_equal(read_refusal(fd), "still open");
    }
    assert_int_equal(n_joined, 0);
    assert_still_serves();
}

static void half_open(void **state)
{
    (void)state;
    int silent = dial(), half = dial();
    unsigned char header[4];
    frame_put_header(header, 1000);
    put(half, header, 3);
    serve(NULL, 0);
    assert_still_serves();
    assert_refused(silent, "no Hello in time");
    assert_refused(half, "no Hello in time");
}

static void second_leader(void **state)
{
    (void)state;
    int first = lead(), second = dial();
    say_hello(second, CONTROL_PROTOCOL, &secret, 2, 2);
    assert_turned_away(second, "has a leader already", true);
    second = dial();
    control_secret wrong = secret;
    wrong.text[3] ^= 1;
    say_hello(second, CONTROL_PROTOCOL, &wrong, 2, 2);
    assert_turned_away(second, "wrong secret", false);
    say_beat(first, 7);
    serve(&n_messages, 1);
    assert_int_equal(n_messages, 1);
    assert_int_equal(n_lost, 0);
    close(first);
    serve(&n_lost, 1);
    assert_string_equal(lost_why, "the leader closed the control connection");
    assert_still_serves();
}

static void leader_that_misbehaves(void **state)
{
    (void)state;
    int fd = lead();
    say_beat(fd, 6);
    assert_refused(fd, "a message of launch 6; this is launch 7");
    assert_int_equal(n_lost, 1);
    assert_int_equal(n_messages, 0);
    fd = lead();
    say_hello(fd, CONTROL_PROTOCOL, &secret, 2, 2);
    assert_refused(fd, "a second Hello");
    fd = lead();
    unsigned char header[4];
    frame_put_header(header, (uint32_t)CONTROL_FRAME_BYTES + 1);
    put(fd, header, 4);
    serve(&n_lost, 3);
    assert_non_null(strstr(lost_why, "more than the"));
    close(fd);
    assert_still_serves();
}

static void flood(void **state)
{
    (void)state;
    enum { N = 200 };
    static int fds[N];
    for (int i = 0; i < N; i++) {
        fds[i] = dial();
        if (i % 3 == 0)
            put(fds[i], "\x10\x00", 2);
        if (i % 50 == 0)
            serve(NULL, 0);
    }
    double before = clock_seconds();
    assert_still_serves(); /* behind two hundred others, and at once */
    assert_true(clock_seconds() - before < 2);
    for (int i = 0; i < N; i++)
        close(fds[i]);
    serve(NULL, 0);
}

static void no_descriptors(void **state)
{
    (void)state;
    struct rlimit before, low;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    int fds[3] = {dial(), dial(), dial()};
    low = before;
    low.rlim_cur = (rlim_t)fds[2] + 1; /* accept() finds none left */
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    int n_steps = 0;
    for (double end = clock_seconds() + 0.3; clock_seconds() < end; n_steps++) {
        struct pollfd fd = {.fd = control_server_fd(server), .events = POLLIN};
        poll(&fd, 1, control_server_wait_ms(server));
        control_server_step(server);
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_true(n_steps < 50); /* it waits, and does not spin */
    assert_still_serves();
    for (int i = 0; i < 3; i++)
        close(fds[i]);
}

static void reader_that_stalls(void **state)
{
    (void)state;
    enum { FRAME = 1 << 20 };
    unsigned char *frame = calloc(1, FRAME);
    int fd = lead();
    frame_put_header(frame, FRAME - FRAME_HEADER_BYTES);
    for (int i = 0; i < 40; i++)
        assert_true(control_server_send(server, frame, FRAME)); /* never blocks */
    size_t got = 0, wanted = (size_t)40 * FRAME;
    static char bytes[1 << 18];
    double end = clock_seconds() + 20;
    while (got < wanted && clock_seconds() < end) {
        control_server_step(server);
        ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n > 0)
            got += (size_t)n;
    }
    assert_true(got == wanted);
    int n_sent = 0; /* until it is more than anybody keeps */
    while (control_server_send(server, frame, FRAME) && n_sent < 2000)
        n_sent++;
    assert_true(n_sent > 240 && n_sent < 300);
    serve(&n_lost, 1);
    assert_string_equal(lost_why, "the leader does not read what it is sent");
    assert_false(control_server_send(server, frame, FRAME));
    close(fd);
    free(frame);
    assert_still_serves();
}

static void addresses(void **state)
{
    (void)state;
    control_server *other;
    char taken[300];
    assert_true(control_server_is_loopback(server));
    snprintf(taken, sizeof taken, "%s", control_server_address(server, true));
    assert_int_not_equal(control_server_create(taken, &listener, NULL, &other), STATUS_OK);
    assert_non_null(strstr(status_message(), "cannot listen for workers on 127.0.0.1:"));
    assert_int_equal(control_server_create("0.0.0.0:0", &listener, NULL, &other), STATUS_OK);
    assert_false(control_server_is_loopback(other));
    assert_memory_equal(control_server_address(other, true), "127.0.0.1:", 10);
    char own[256] = "";
    gethostname(own, sizeof own - 1);
    assert_memory_equal(control_server_address(other, false), own, strlen(own));
    control_server_destroy(other);
    assert_int_not_equal(control_server_create("127.0.0.1", &listener, NULL, &other), STATUS_OK);
}

#define TEST(sentence, function)                                                                                                 \
    {                                                                                                                            \
        sentence, function, set_up, tear_down, NULL                                                                              \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST("a Hello that is wrong in any way is refused with the reason", wrong_hellos),
        TEST("oversized frames and garbage are refused", wrong_bytes),
        TEST("who does not speak is refused after a while and keeps nobody out", half_open),
        TEST("there is one leader; a second one is refused, its end is told", second_leader),
        TEST("an older launch, a second Hello, a frame too long: the leader is refused", leader_that_misbehaves),
        TEST("two hundred connections do not keep the leader out", flood),
        TEST("without descriptors it waits and does not spin", no_descriptors),
        TEST("a reader that stalls blocks nobody and is ended when too much waits for it", reader_that_stalls),
        TEST("addresses: what is told to workers, what cannot be listened on", addresses),
    };
    return cmocka_run_group_tests_name("control server", tests, NULL, NULL);
}
