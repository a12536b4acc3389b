/* `convoke generate`, run as a program against servers that are this same program: the gRPC door over a scripted model that says
 * its prompt again and again, and one whose streams break. */
#include "tests/support.h"

#include "cluster/door_grpc.h"
#include "cluster/generate.h"
#include "cluster/rpc_client.h"
#include "cluster/rpc_server.h"
#include "proto/clock.h"
#include "proto/convoke.pb-c.h"
#include "proto/vllm.pb-c.h"
#include "tests/fake_coordinator.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- as a server ---- */

static const char *option(int argc, char **argv, const char *name)
{
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return argv[i + 1];
    return "";
}

static void wait_for_end(void)
{
    sigset_t set;
    int signal;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigwait(&set, &signal);
}

static void say_ready(int port)
{
    printf("ready: grpc 127.0.0.1:%d, model fake, 1 ranks, plan contiguous, 8 sequences, 4096 KV tokens\n", port);
    fflush(stdout);
}

static int serve_scripted(void)
{
    const fake_options fake = {.model_dir = ".", .token_ms = 2, .tokens_per_step = 1, .max_requests = 8, .max_length = 1000000};
    const door_grpc_options options = {
        .address = "127.0.0.1:0", .max_message = 1 << 24, .max_streams = 100, .reader_seconds = 60, .reader_bytes = 1 << 16};
    coordinator *c = fake_create(&fake);
    door_grpc *door = NULL;
    if (door_grpc_start(c, &options, &door) != STATUS_OK)
        return 1;
    say_ready(door_grpc_port(door));
    wait_for_end();
    door_grpc_stop(door, 0);
    fake_destroy(c);
    return 0;
}

/* Token i is "<i>". The process dies after a few, is started again, and so on: what a coordinator with a journal does. */
enum { BREAKING_TOKENS = 12, TOKENS_PER_LIFE = 5 };
static int tokens_left;

static void begin_breaking(rpc_call *call, const ProtobufCMessage *message)
{
    int *next = calloc(1, sizeof *next);
    if (message->descriptor == &convoke__v1__attach_request__descriptor)
        *next = (int)((const Convoke__V1__AttachRequest *)message)->from_token;
    tokens_left = TOKENS_PER_LIFE;
    rpc_call_set_state(call, next);
}

static void pump_breaking(rpc_call *call)
{
    int *next = rpc_call_state(call);
    if (*next == BREAKING_TOKENS) {
        rpc_call_finish(call, RPC_OK, NULL);
        return;
    }
    if (tokens_left-- == 0) {
        usleep(50000); /* a reset connection takes back what nobody has read yet */
        _exit(1);
    }
    char text[16];
    Vllm__GenerateResponse r = VLLM__GENERATE_RESPONSE__INIT;
    Vllm__SequenceOutput output = VLLM__SEQUENCE_OUTPUT__INIT;
    Vllm__FinishInfo finish = VLLM__FINISH_INFO__INIT;
    output.num_tokens = 1;
    output.text.len = (size_t)snprintf(text, sizeof text, "<%d>", (*next)++);
    output.text.data = (uint8_t *)text;
    if (*next == BREAKING_TOKENS) {
        output._finish_info_case = VLLM__SEQUENCE_OUTPUT___FINISH_INFO_FINISH_INFO;
        output.finish_info = &finish;
    }
    r.outputs = &output;
    rpc_call_send(call, &r.base);
}

static void end_breaking(rpc_call *call)
{
    free(rpc_call_state(call));
}

static void live_once(const char *at)
{
    static const rpc_method methods[] = {
        {"/vllm.Inference/GenerateStream", &vllm__generate_request__descriptor, false, begin_breaking, pump_breaking,
         end_breaking},
        {"/convoke.v1.Requests/Attach", &convoke__v1__attach_request__descriptor, false, begin_breaking, pump_breaking,
         end_breaking},
    };
    const rpc_options options = {.address = at, .max_message = 1 << 20, .max_streams = 10, .methods = methods, .n_methods = 2};
    rpc_server *s = NULL;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (rpc_server_start(&options, &s) != STATUS_OK)
        _exit(1);
    pause();
}

static int free_port(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof to;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool ok = bind(fd, (struct sockaddr *)&to, size) == 0 && getsockname(fd, (struct sockaddr *)&to, &size) == 0;
    close(fd);
    return ok ? ntohs(to.sin_port) : 0;
}

static int serve_breaking(void)
{
    char at[40];
    int port = free_port();
    snprintf(at, sizeof at, "127.0.0.1:%d", port);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    for (int life = 0;; life++) {
        pid_t pid = fork();
        if (pid == 0)
            live_once(at);
        if (life == 0)
            say_ready(port);
        while (waitpid(pid, NULL, WNOHANG) == 0) {
            const struct timespec moment = {.tv_nsec = 20000000};
            if (sigtimedwait(&set, NULL, &moment) == SIGTERM) {
                kill(pid, SIGKILL);
                return 0;
            }
        }
        usleep(100000); /* nobody listens for a while */
    }
}

static int serve(int argc, char **argv)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    const char *model = option(argc, argv, "--model"), *mark = getenv("TEST_GENERATE_PID_FILE");
    if (mark) {
        FILE *f = fopen(mark, "w");
        fprintf(f, "%d\n", getpid());
        fclose(f);
    }
    if (strcmp(model, "breaks") == 0)
        return serve_breaking();
    if (strcmp(model, "never-ready") == 0) {
        wait_for_end();
        return 0;
    }
    if (strcmp(model, "missing") == 0) {
        fprintf(stderr, "convoke serve: missing: no config.json\n");
        return 1;
    }
    return serve_scripted();
}

/* ---- programs run by the tests ---- */

typedef struct {
    pid_t pid;
    int in, out, err; /* our ends; -1: closed */
} child;

/* This program as `arguments` say, NULL at the end. */
static child start(const char *const *arguments)
{
    int in[2], out[2], err[2];
    assert_int_equal(pipe2(in, O_CLOEXEC) | pipe2(out, O_CLOEXEC) | pipe2(err, O_CLOEXEC), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(in[0], 0), dup2(out[1], 1), dup2(err[1], 2);
        execv("/proc/self/exe", (char **)arguments);
        _exit(127);
    }
    close(in[0]), close(out[1]), close(err[1]);
    return (child){.pid = pid, .in = in[1], .out = out[0], .err = err[0]};
}

/* Appends what comes until the end, or until `until` stands in it. */
static void read_until(int fd, char *text, size_t room, const char *until)
{
    size_t n = strlen(text);
    for (ssize_t m; n < room - 1 && (m = read(fd, text + n, room - 1 - n)) > 0;) {
        n += (size_t)m;
        text[n] = '\0';
        if (until && strstr(text, until))
            return;
    }
}

/* Its exit code; a signal's number + 1000. */
static int finish(child *c, char *out, char *err, size_t room)
{
    int how = 0;
    if (c->in >= 0)
        close(c->in);
    read_until(c->out, out, room, NULL);
    read_until(c->err, err, room, NULL);
    close(c->out), close(c->err);
    waitpid(c->pid, &how, 0);
    return WIFEXITED(how) ? WEXITSTATUS(how) : 1000 + WTERMSIG(how);
}

static char out[200000], err[20000], address[100];

static int run(const char *input, const char *const *arguments)
{
    child c = start(arguments);
    out[0] = err[0] = '\0';
    if (input)
        assert_int_equal(write(c.in, input, strlen(input)), (ssize_t)strlen(input));
    return finish(&c, out, err, sizeof err);
}

#define ASSERT_CODE(run, expected)                                                                                               \
    do {                                                                                                                         \
        int code_ = (run);                                                                                                       \
        if (code_ != (expected))                                                                                                 \
            fail_msg("ended with %d: %s", code_, err);                                                                           \
    } while (0)
#define GENERATE(input, ...) run(input, (const char *const[]){"convoke", "generate", __VA_ARGS__, NULL})
#define START_GENERATE(...)  start((const char *const[]){"convoke", "generate", __VA_ARGS__, NULL})

static child start_server(const char *model)
{
    char line[300] = "";
    child c = start((const char *const[]){"convoke", "serve", "--model", model, NULL});
    read_until(c.out, line, sizeof line, "\n");
    assert_int_equal(sscanf(line, "ready: grpc %99[^,],", address), 1);
    return c;
}

static void stop_server(child *c)
{
    char said[2][8000] = {"", ""};
    kill(c->pid, SIGTERM);
    int code = finish(c, said[0], said[1], sizeof said[0]);
    if (code != 0)
        fail_msg("the server ended with %d: %s", code, said[1]);
}

static child server;

static int setup(void **state)
{
    (void)state;
    server = start_server("scripted");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_server(&server);
    return 0;
}

/* ---- the tests ---- */

static void text_is_printed_and_nothing_else(void **state)
{
    (void)state;
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--max-tokens", "12", "hello "), 0);
    assert_string_equal(out, "hello hello ");
    assert_string_equal(err, "");
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--max-tokens", "8", "grüße"), 0);
    assert_string_equal(out, "grüße\x67"); /* 7 bytes, then the next round's first */
}

static void prompt_comes_from_stdin(void **state)
{
    (void)state;
    ASSERT_CODE(GENERATE("from a pipe", "--connect", address, "--max-tokens", "6"), 0);
    assert_string_equal(out, "from a");
    ASSERT_CODE(GENERATE("from a pipe", "--connect", address, "--max-tokens", "4", "-"), 0);
    assert_string_equal(out, "from");
}

static void options_reach_the_server(void **state)
{
    (void)state;
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--max-tokens", "50", "--stop", "xyz,\\,\\n", "ab,\ncd"), 0);
    assert_string_equal(out, "ab");
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--max-tokens", "5", "--stats", "abc"), 0);
    assert_string_equal(out, "abcab\n"); /* the line is ended before the figures */
    assert_non_null(strstr(err, "3 prompt tokens, 5 new tokens, "));
    assert_non_null(strstr(err, "tok/s, the first after "));
    assert_null(strchr(strchr(err, '\n') + 1, '\n')); /* one line */
}

static void mistakes_are_one_sentence(void **state)
{
    (void)state;
    static const char *const wrong_use[][5] = {{"--max-tokens", "0", "x"},
                                               {"--connect", "127.0.0.1:1", "--model", "m", "x"},
                                               {"--model", "m", "--tls-ca", "f", "x"},
                                               {"--stop", "a,,b", "x"},
                                               {"one", "two"}};
    for (size_t i = 0; i < sizeof wrong_use / sizeof *wrong_use; i++) {
        const char *const *w = wrong_use[i];
        ASSERT_CODE(GENERATE(NULL, w[0], w[1], w[2], w[3], w[4]), 2);
        assert_string_equal(out, "");
        assert_ptr_equal(strchr(err, '\n'), err + strlen(err) - 1);
        assert_int_equal(strncmp(err, "convoke generate: ", 18), 0);
    }
    ASSERT_CODE(GENERATE(NULL, "--connect", "127.0.0.1:1", "x"), 1); /* nobody listens there */
    assert_non_null(strstr(err, "127.0.0.1:1: "));
    assert_ptr_equal(strchr(err, '\n'), err + strlen(err) - 1);
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--max-tokens", "20", "fail now"), 1);
    assert_memory_equal(out, "fail", strlen(out)); /* what came before the failure was shown */
    assert_non_null(strstr(err, "the workers were lost 3 times"));
    assert_ptr_equal(strchr(err, '\n'), err + strlen(err) - 1);
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--tls-ca", "/nowhere.pem", "x"), 1);
    assert_non_null(strstr(err, "/nowhere.pem: cannot be opened"));
}

/* Running requests, as the server counts them. */
static unsigned n_running(void)
{
    rpc_client *c = NULL;
    rpc_end end;
    ProtobufCMessage *answer = NULL;
    Convoke__V1__ListRequest ask = CONVOKE__V1__LIST_REQUEST__INIT;
    assert_int_equal(rpc_client_open(&(rpc_client_options){.address = address}, &c), STATUS_OK);
    assert_int_equal(
        rpc_client_call(c, "/convoke.v1.Requests/List", &ask.base, 20, &convoke__v1__list_response__descriptor, &answer, &end),
        STATUS_OK);
    assert_int_equal(end.code, RPC_ENDED_OK);
    const Convoke__V1__ListResponse *list = (const Convoke__V1__ListResponse *)answer;
    unsigned n = 0;
    for (size_t i = 0; i < list->n_requests; i++)
        n += !list->requests[i]->finished;
    protobuf_c_message_free_unpacked(answer, NULL);
    rpc_client_close(c);
    return n;
}

static void ctrl_c_cancels(void **state)
{
    (void)state;
    child c = START_GENERATE("--connect", address, "--max-tokens", "900000", "--ignore-eos", "again ");
    out[0] = err[0] = '\0';
    read_until(c.out, out, sizeof out, "again again ");
    kill(c.pid, SIGINT);
    double start_time = clock_seconds();
    ASSERT_CODE(finish(&c, out, err, sizeof err), 130);
    assert_true(clock_seconds() - start_time < 10);
    assert_string_equal(err, "");
    assert_int_equal(strncmp(out, "again again ", 12), 0);
    for (int i = 0; i < 200 && n_running() > 0; i++)
        usleep(20000);
    assert_int_equal(n_running(), 0); /* and its room is free again */
}

static void closed_output_ends_the_request(void **state)
{
    (void)state;
    child c = START_GENERATE("--connect", address, "--max-tokens", "900000", "--ignore-eos", "again ");
    out[0] = err[0] = '\0';
    read_until(c.out, out, sizeof out, "again");
    close(c.out);
    c.out = open("/dev/null", O_RDONLY);
    ASSERT_CODE(finish(&c, out, err, sizeof err), 1);
    assert_string_equal(err, "");
}

static void silence_has_an_end(void **state)
{
    (void)state;
    kill(server.pid, SIGSTOP);
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "--timeout", "0.3", "x"), 1);
    kill(server.pid, SIGCONT);
    assert_non_null(strstr(err, "said nothing for"));
}

static void broken_streams_are_taken_up_again(void **state)
{
    (void)state;
    child breaks = start_server("breaks");
    char expected[200] = "";
    for (int i = 0; i < BREAKING_TOKENS; i++)
        sprintf(expected + strlen(expected), "<%d>", i);
    usleep(300000); /* it says that it is ready a moment before it is */
    ASSERT_CODE(GENERATE(NULL, "--connect", address, "x"), 0);
    assert_string_equal(out, expected);
    assert_string_equal(err, "");
    stop_server(&breaks);
}

static void terminal_gets_a_last_line(void **state)
{
    (void)state;
    child s = start_server("scripted");
    int terminal;
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    pid_t pid = forkpty(&terminal, NULL, NULL, &size);
    if (pid == 0) {
        const char *const arguments[] = {"convoke", "generate", "--connect", address, "--max-tokens", "6", "abc", NULL};
        execv("/proc/self/exe", (char **)arguments);
        _exit(127);
    }
    char text[2000] = "";
    int how;
    read_until(terminal, text, sizeof text, NULL); /* a terminal's end is an error, which ends the reading too */
    waitpid(pid, &how, 0);
    assert_int_equal(how, 0);
    assert_int_equal(strncmp(text, "abcabc\r\n3 prompt tokens, 6 new tokens, ", 39), 0);
    close(terminal);
    stop_server(&s);
}

/* ---- with a server of one's own ---- */

/* The server wrote its pid; it must be gone (within `seconds`). */
static void assert_server_gone(const char *file, double seconds)
{
    int pid = 0;
    FILE *f = fopen(file, "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%d", &pid), 1);
    fclose(f);
    for (double until = clock_seconds() + seconds; kill(pid, 0) == 0;) {
        char path[40], line[300] = "";
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        FILE *stat = fopen(path, "r");
        if (stat && fgets(line, sizeof line, stat) && strstr(line, ") Z")) { /* ended; nobody here waits for it */
            fclose(stat);
            return;
        }
        if (stat)
            fclose(stat);
        if (clock_seconds() > until)
            fail_msg("process %d still lives", pid);
        usleep(10000);
    }
}

static void own_server_is_started_and_ended(void **state)
{
    (void)state;
    char folder[4096], file[4200];
    snprintf(folder, sizeof folder, "%s", support_scratch());
    snprintf(file, sizeof file, "%s/pid", folder);
    setenv("TEST_GENERATE_PID_FILE", file, 1);
    ASSERT_CODE(GENERATE(NULL, "--model", "scripted", "--ranks", "2", "--max-tokens", "6", "abc"), 0);
    assert_string_equal(out, "abcabc");
    assert_string_equal(err, "");
    assert_server_gone(file, 0);

    ASSERT_CODE(GENERATE(NULL, "--model", "missing", "x"), 1);
    assert_string_equal(err,
                        "convoke serve: missing: no config.json\nconvoke generate: missing: its server ended before it could "
                        "answer\n");

    unlink(file);
    child c = START_GENERATE("--model", "never-ready", "x"); /* Ctrl-C while it loads */
    while (access(file, F_OK) != 0)
        usleep(10000);
    usleep(50000);
    kill(c.pid, SIGINT);
    out[0] = err[0] = '\0';
    ASSERT_CODE(finish(&c, out, err, sizeof err), 130);
    assert_server_gone(file, 0);

    c = START_GENERATE("--model", "scripted", "--max-tokens", "900000", "--ignore-eos", "again ");
    out[0] = err[0] = '\0';
    read_until(c.out, out, sizeof out, "again");
    kill(c.pid, SIGKILL); /* even then */
    ASSERT_CODE(finish(&c, out, err, sizeof err), 1000 + SIGKILL);
    assert_server_gone(file, 10);
    unsetenv("TEST_GENERATE_PID_FILE");
    support_remove(folder);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "serve") == 0)
        return serve(argc, argv);
    if (argc > 1 && strcmp(argv[1], "generate") == 0)
        return generate_command(argc - 1, argv + 1);
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        {"in a pipe: the text, and nothing else", text_is_printed_and_nothing_else, setup, teardown, NULL},
        {"without an operand, or with -, the prompt is standard input", prompt_comes_from_stdin, setup, teardown, NULL},
        {"options reach the server; --stats is one line", options_reach_the_server, setup, teardown, NULL},
        {"a mistake or a refusal is one sentence and an exit code", mistakes_are_one_sentence, setup, teardown, NULL},
        {"Ctrl-C ends with 130, and the server frees the request", ctrl_c_cancels, setup, teardown, NULL},
        {"a closed output ends the request quietly", closed_output_ends_the_request, setup, teardown, NULL},
        {"a server that says nothing is left after the timeout", silence_has_an_end, setup, teardown, NULL},
        {"a stream that breaks is taken up again at its token", broken_streams_are_taken_up_again, NULL, NULL, NULL},
        {"a terminal gets a last line and how fast it was", terminal_gets_a_last_line, NULL, NULL, NULL},
        {"a server of one's own is started, and ends however this ends", own_server_is_started_and_ended, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
