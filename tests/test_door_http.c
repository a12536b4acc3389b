/* The HTTP listener, asked over real sockets, with a coordinator that is only a state. */
#include "tests/support.h"

#include "cluster/door_http.h"
#include "proto/clock.h"
#include "proto/json.h"

#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- all that the door sees of a coordinator ---- */

struct coordinator {
    _Atomic serving_state state;
    atomic_bool paused, replans_off;
    atomic_int asked, taken; /* plans */
};

serving_state coordinator_state(coordinator *c)
{
    return atomic_load(&c->state);
}

bool coordinator_is_paused(coordinator *c)
{
    return atomic_load(&c->paused);
}

bool coordinator_admin_ok(coordinator *c, const char *peer, const char *token)
{
    (void)c;
    return token ? strcmp(token, "the secret") == 0 : strncmp(peer, "ipv4:127.0.0.1:", 15) == 0;
}

status coordinator_replan(coordinator *c, plan_take take)
{
    if (atomic_load(&c->replans_off))
        return status_fail(STATUS_UNSUPPORTED, "replanning is off");
    atomic_fetch_add(&c->asked, 1);
    atomic_fetch_add(&c->taken, (int)take);
    return STATUS_OK;
}

void coordinator_describe_plan(coordinator *c, bytes_writer *out)
{
    (void)c;
    bytes_put(out, "{\"plan\":\"auto-3\"}\n", 18);
}

static coordinator fake;
static metrics *numbers;
static door_http *door;

static int setup(void **state)
{
    (void)state;
    atomic_store(&fake.state, SERVING_READY);
    atomic_store(&fake.paused, false);
    atomic_store(&fake.replans_off, false);
    atomic_store(&fake.asked, 0);
    atomic_store(&fake.taken, 0);
    if (metrics_create("demo", &numbers) != STATUS_OK || door_http_start(&fake, numbers, "127.0.0.1:0", &door) != STATUS_OK)
        return -1;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    door_http_stop(door);
    metrics_destroy(numbers);
    return 0;
}

/* ---- a client ---- */

typedef struct {
    int code;
    char text[65536]; /* everything that came */
    const char *body; /* inside text */
} answer;

static int connect_door(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)door_http_port(door))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const struct timeval patience = {.tv_sec = 20};
    assert_true(fd >= 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    return fd;
}

static void say(int fd, const char *text)
{
    assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), (ssize_t)strlen(text));
}

/* Until the other side closes. */
static void listen_to_end(int fd, answer *a)
{
    size_t n = 0;
    for (ssize_t m; n < sizeof a->text - 1 && (m = recv(fd, a->text + n, sizeof a->text - 1 - n, 0)) > 0;)
        n += (size_t)m;
    a->text[n] = '\0';
    a->code = strncmp(a->text, "HTTP/1.1 ", 9) == 0 ? atoi(a->text + 9) : 0;
    const char *end = strstr(a->text, "\r\n\r\n");
    a->body = end ? end + 4 : a->text + n;
    close(fd);
}

static const answer *ask(const char *method, const char *path)
{
    static answer a;
    char text[1000];
    snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", method, path);
    int fd = connect_door();
    say(fd, text);
    listen_to_end(fd, &a);
    return &a;
}

static void assert_header(const answer *a, const char *line)
{
    const char *at = strstr(a->text, line);
    if (!at || at > a->body)
        fail_msg("no '%s' in: %s", line, a->text);
}

/* {"error": {"message", "type", "param", "code"}}; returns the message's words in static memory. */
static const char *error_message(const answer *a)
{
    static char words[1000];
    cJSON *tree = NULL;
    const char *message, *type, *code;
    if (json_parse("answer", a->body, strlen(a->body), &tree) != STATUS_OK)
        fail_msg("%s: %s", status_message(), a->body);
    const cJSON *error = json_find(tree, "error");
    assert_non_null(error);
    assert_int_equal(json_get_string(error, "error", "message", &message), STATUS_OK);
    assert_int_equal(json_get_string(error, "error", "type", &type), STATUS_OK);
    assert_int_equal(json_get_string(error, "error", "code", &code), STATUS_OK);
    assert_non_null(strstr(type, "_error"));
    assert_true(cJSON_HasObjectItem(error, "param"));
    snprintf(words, sizeof words, "%s", message);
    cJSON_Delete(tree);
    return words;
}

/* ---- the tests ---- */

static void health_follows_the_state(void **state)
{
    (void)state;
    static const struct {
        serving_state state;
        int code;
        const char *word;
    } cases[] = {{SERVING_STARTING, 503, "\"starting\""},     {SERVING_READY, 200, "\"ready\""},
                 {SERVING_RESTARTING, 503, "\"restarting\""}, {SERVING_DRAINING, 503, "\"draining\""},
                 {SERVING_GIVEN_UP, 503, "\"given_up\""},     {SERVING_STOPPED, 503, "\"stopped\""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        atomic_store(&fake.state, cases[i].state);
        const answer *a = ask("GET", "/health");
        assert_int_equal(a->code, cases[i].code);
        assert_non_null(strstr(a->body, cases[i].word));
        assert_header(a, "Content-Type: application/json");
    }
    atomic_store(&fake.state, SERVING_READY);
    atomic_store(&fake.paused, true);
    const answer *a = ask("GET", "/health");
    assert_int_equal(a->code, 200);
    assert_non_null(strstr(a->body, "\"paused\""));
}

static void metrics_are_shown_in_every_state(void **state)
{
    (void)state;
    metrics_generated_tokens(numbers, 7);
    atomic_store(&fake.state, SERVING_RESTARTING);
    const answer *a = ask("GET", "/metrics");
    assert_int_equal(a->code, 200);
    assert_header(a, "Content-Type: text/plain; version=0.0.4; charset=utf-8");
    assert_non_null(strstr(a->body, "vllm:generation_tokens_total{model_name=\"demo\"} 7\n"));
    assert_int_equal(a->body[strlen(a->body) - 1], '\n');
    assert_int_equal(ask("GET", "/metrics?x=1")->code, 200);
}

static void the_plan_is_shown_to_all(void **state)
{
    (void)state;
    const answer *a = ask("GET", "/plan");
    assert_int_equal(a->code, 200);
    assert_header(a, "Content-Type: application/json");
    assert_string_equal(a->body, "{\"plan\":\"auto-3\"}\n");
    a = ask("DELETE", "/plan");
    assert_int_equal(a->code, 405);
    assert_header(a, "Allow: GET, HEAD, POST");
}

static const answer *post_plan(const char *header)
{
    static answer a;
    char text[400];
    snprintf(text, sizeof text, "POST /plan HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n%s\r\n", header);
    int fd = connect_door();
    say(fd, text);
    listen_to_end(fd, &a);
    return &a;
}

static void a_plan_is_made_for_admins(void **state)
{
    (void)state;
    assert_int_equal(post_plan("")->code, 202); /* from this machine */
    assert_int_equal(post_plan("Authorization: Bearer the secret\r\n")->code, 202);
    assert_int_equal(atomic_load(&fake.asked), 2);
    assert_int_equal(atomic_load(&fake.taken), 0);
    assert_int_equal(ask("POST", "/plan?take=yes")->code, 202);
    assert_int_equal(atomic_load(&fake.taken), TAKE_IF_IT_PAYS);
    assert_int_equal(ask("POST", "/plan?take=always")->code, 202);
    assert_int_equal(atomic_load(&fake.taken), TAKE_IF_IT_PAYS + TAKE_ALWAYS);
    const answer *a = post_plan("Authorization: Bearer a guess\r\n");
    assert_int_equal(a->code, 403);
    assert_non_null(strstr(error_message(a), "admin"));
    assert_int_equal(post_plan("Origin: http://evil.example\r\n")->code, 403); /* a page in a browser here */
    assert_int_equal(atomic_load(&fake.asked), 4);
    atomic_store(&fake.replans_off, true);
    a = post_plan("");
    assert_int_equal(a->code, 409);
    assert_string_equal(error_message(a), "replanning is off");
}

static void head_has_no_body(void **state)
{
    (void)state;
    const answer *a = ask("HEAD", "/health");
    assert_int_equal(a->code, 200);
    assert_string_equal(a->body, "");
    char length[60];
    snprintf(length, sizeof length, "Content-Length: %zu", strlen("{\"status\":\"ready\"}\n"));
    assert_header(a, length);
    a = ask("HEAD", "/nowhere");
    assert_int_equal(a->code, 404);
    assert_string_equal(a->body, "");
}

static void unknown_paths_and_methods(void **state)
{
    (void)state;
    const answer *a = ask("GET", "/v1/nothing");
    assert_int_equal(a->code, 404);
    assert_non_null(strstr(error_message(a), "/v1/nothing"));
    a = ask("GET", "/%22%5C%0a%ff%7f");
    assert_int_equal(a->code, 404);
    assert_non_null(strstr(error_message(a), "/\"\\???"));
    a = ask("DELETE", "/health");
    assert_int_equal(a->code, 405);
    assert_header(a, "Allow: GET, HEAD");
    assert_non_null(strstr(error_message(a), "DELETE"));
    assert_int_equal(ask("GET", "/healthy")->code, 404);
    assert_int_equal(ask("GET", "/")->code, 404);
}

static void bodies_are_refused_early(void **state)
{
    (void)state;
    static answer a;
    int fd = connect_door();
    say(fd, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nhello");
    listen_to_end(fd, &a); /* answered, and closed, before the body has come */
    assert_int_equal(a.code, 405);
    error_message(&a);
}

static void connections_are_used_again(void **state)
{
    (void)state;
    static answer a;
    int fd = connect_door();
    say(fd, "GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    listen_to_end(fd, &a);
    assert_non_null(strstr(a.body, "HTTP/1.1 200")); /* a second answer behind the first */
}

static void nonsense_is_survived(void **state)
{
    (void)state;
    static answer a;
    uint64_t random = 3;
    for (int round = 0; round < 40; round++) {
        char bytes[600];
        int n = 1 + support_below(&random, sizeof bytes - 1);
        for (int i = 0; i < n; i++)
            bytes[i] = (char)support_random(&random);
        int fd = connect_door();
        send(fd, bytes, (size_t)n, MSG_NOSIGNAL);
        shutdown(fd, SHUT_WR);
        listen_to_end(fd, &a);
    }
    char *line = test_calloc(1, 200000); /* a request line longer than any connection may have */
    memcpy(line, "GET /", 5);
    memset(line + 5, 'a', 190000);
    int fd = connect_door();
    send(fd, line, strlen(line), MSG_NOSIGNAL);
    listen_to_end(fd, &a);
    assert_true(a.code == 0 || a.code >= 400);
    test_free(line);
    assert_int_equal(ask("GET", "/health")->code, 200);
}

static void silent_clients_disturb_nobody(void **state)
{
    (void)state;
    enum { SILENT = 300 };
    int fds[SILENT];
    for (int i = 0; i < SILENT; i++) {
        fds[i] = connect_door();
        if (i & 1)
            say(fds[i], "GET /health HTTP/1.1\r\nHos");
    }
    double start = clock_seconds();
    assert_int_equal(ask("GET", "/health")->code, 200);
    assert_true(clock_seconds() - start < 5);
    for (int i = 0; i < SILENT; i++)
        close(fds[i]);
}

static void *ask_often(void *arg)
{
    for (int i = 0; i < 30; i++) {
        answer *a = malloc(sizeof *a);
        int fd = connect_door();
        say(fd, i & 1 ? "GET /metrics HTTP/1.0\r\n\r\n" : "GET /health HTTP/1.0\r\n\r\n");
        listen_to_end(fd, a);
        bool good = a->code == 200;
        free(a);
        if (!good)
            return arg;
    }
    return NULL;
}

static void many_clients_at_once(void **state)
{
    (void)state;
    enum { CLIENTS = 8 };
    pthread_t threads[CLIENTS];
    int mark;
    for (int i = 0; i < CLIENTS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, ask_often, &mark), 0);
    for (int i = 0; i < 200; i++)
        metrics_inter_token(numbers, 0.01 * i);
    for (int i = 0; i < CLIENTS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
}

static void impossible_addresses(void **state)
{
    (void)state;
    char taken[40];
    door_http *other = NULL;
    snprintf(taken, sizeof taken, "127.0.0.1:%d", door_http_port(door));
    assert_int_equal(door_http_start(&fake, numbers, taken, &other), STATUS_IO);
    assert_non_null(strstr(status_message(), taken));
    assert_non_null(strstr(status_message(), "in use"));
    static const char *const wrong[] = {"127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "no such host:80", "192.0.2.1:0"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_not_equal(door_http_start(&fake, numbers, wrong[i], &other), STATUS_OK);
        assert_non_null(strstr(status_message(), "--http"));
    }
    assert_int_equal(door_http_start(&fake, numbers, "127.0.0.1:0", &other), STATUS_OK);
    door_http_stop(other);
    door_http_stop(NULL);
}

/* The port is free again at once, also when clients were connected. */
static void stop_frees_the_port(void **state)
{
    (void)state;
    char address[40];
    int fd = connect_door();
    snprintf(address, sizeof address, "127.0.0.1:%d", door_http_port(door));
    double start = clock_seconds();
    door_http_stop(door);
    assert_true(clock_seconds() - start < 5);
    assert_int_equal(door_http_start(&fake, numbers, address, &door), STATUS_OK);
    assert_int_equal(ask("GET", "/health")->code, 200);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"health is 200 only when ready or paused, and says the state", health_follows_the_state, setup, teardown, NULL},
        {"metrics are shown in every state", metrics_are_shown_in_every_state, setup, teardown, NULL},
        {"the plan in force is shown to all", the_plan_is_shown_to_all, setup, teardown, NULL},
        {"a new plan is made for admins, not for guesses, nor for pages in a browser", a_plan_is_made_for_admins, setup, teardown,
         NULL},
        {"HEAD answers like GET, without the body", head_has_no_body, setup, teardown, NULL},
        {"unknown paths and methods are errors in OpenAI's shape, whatever bytes they hold", unknown_paths_and_methods, setup,
         teardown, NULL},
        {"a body that nobody wants is not waited for", bodies_are_refused_early, setup, teardown, NULL},
        {"a connection can be used again", connections_are_used_again, setup, teardown, NULL},
        {"nonsense and overlong lines: the next one is answered", nonsense_is_survived, setup, teardown, NULL},
        {"clients that say nothing disturb nobody", silent_clients_disturb_nobody, setup, teardown, NULL},
        {"many clients at once", many_clients_at_once, setup, teardown, NULL},
        {"an address that is taken or wrong is one sentence", impossible_addresses, setup, teardown, NULL},
        {"after a stop the port is free", stop_frees_the_port, setup, teardown, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
