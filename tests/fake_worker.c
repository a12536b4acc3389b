/* fake_worker.c - stands in for mpirun's ranks in tests of the job: no MPI, no model, every misbehaviour on demand.
 *
 * fake_worker RANKS --coordinator HOST:PORT --secret-file F; $FAKE_WORKER_DIR/mode says what it does (read anew at each start):
 *   good          answers: one token per sequence and step, a step every 5 ms
 *   exit          prints a sentence and ends with code 3 before Hello
 *   goodbye       says Goodbye while loading
 *   stuck-load    never gets on with loading, but beats
 *   no-beat       ready, then silent
 *   no-step       ready and beating, but never a step
 *   old-launch    ready, then speaks for an older launch
 * Every process notes its pid in $FAKE_WORKER_DIR/pids. */
#include "proto/clock.h"
#include "proto/control.h"
#include "proto/frame.h"
#include "proto/log.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_RANKS = 64, MAX_SEQUENCES = 4096 };

typedef struct {
    uint64_t id;
    int left, made;
    bool held;
} fake_sequence;

static int n_ranks, sock = -1;
static pid_t pids[MAX_RANKS];
static char mode[64];
static control_secret secret;
static uint64_t launch, steps;
static frame_reader in;
static fake_sequence sequences[MAX_SEQUENCES];
static int n_sequences;

static void die(const char *why)
{
    log_line("%s", why);
    exit(3);
}

static void note_pid(void)
{
    char path[4096], text[32];
    snprintf(path, sizeof path, "%s/pids", getenv("FAKE_WORKER_DIR"));
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    int n = snprintf(text, sizeof text, "%d\n", (int)getpid());
    if (fd < 0 || write(fd, text, (size_t)n) != n)
        die("cannot note a pid");
    close(fd);
}

static void read_mode(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/mode", getenv("FAKE_WORKER_DIR"));
    FILE *f = fopen(path, "re");
    if (!f || fscanf(f, "%63s", mode) != 1)
        die("no mode");
    fclose(f);
}

static bool is(const char *name)
{
    return strcmp(mode, name) == 0;
}

/* As under mpirun: a process group of its own each, dying with the parent. */
static void fork_ranks(void)
{
    pids[0] = getpid();
    for (int r = 1; r < n_ranks; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            setpgid(0, 0);
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            note_pid();
            for (;;)
                pause();
        }
    }
    note_pid();
}

static void send_message(Convoke__Control__ToCoordinator *m)
{
    static bytes_writer out;
    bytes_reset(&out);
    if (control_put_to_coordinator(&out, m) != STATUS_OK)
        die(status_message());
    for (size_t done = 0; done < out.size;) {
        ssize_t n = send(sock, out.data + done, out.size - done, MSG_NOSIGNAL);
        if (n <= 0)
            exit(4);
        done += (size_t)n;
    }
}

static void connect_to(const char *address)
{
    char host[256], port[8];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    if (control_split_address("--coordinator", address, host, port) != STATUS_OK || getaddrinfo(host, port, &hints, &found) != 0)
        die("no address");
    sock = socket(found->ai_family, SOCK_STREAM, 0);
    if (connect(sock, found->ai_addr, found->ai_addrlen) != 0)
        die("cannot connect");
    freeaddrinfo(found);
}

static void say_hello(void)
{
    Convoke__Control__Hello hello = CONVOKE__CONTROL__HELLO__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    static char own[256];
    static char *hosts[MAX_RANKS];
    static uint32_t nodes[MAX_RANKS], numbers[MAX_RANKS];
    gethostname(own, sizeof own - 1);
    for (int r = 0; r < n_ranks; r++) {
        hosts[r] = own;
        numbers[r] = (uint32_t)pids[r];
    }
    size_t n = (size_t)n_ranks;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_HELLO;
    m.hello = &hello;
    hello.protocol = CONTROL_PROTOCOL;
    hello.secret = (ProtobufCBinaryData){.len = (size_t)secret.n, .data = (uint8_t *)secret.text};
    hello.version = (char *)CONVOKE_VERSION;
    hello.n_ranks = (uint32_t)n;
    hello.node_of_rank = nodes;
    hello.host_of_rank = hosts;
    hello.pid_of_rank = numbers;
    hello.n_node_of_rank = hello.n_host_of_rank = hello.n_pid_of_rank = n;
    send_message(&m);
}

static void say_progress(uint64_t done)
{
    Convoke__Control__Progress progress = CONVOKE__CONTROL__PROGRESS__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    uint64_t all[1] = {done}, total[1] = {100};
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS;
    m.progress = &progress;
    progress.launch = launch;
    progress.stage = (char *)"weights";
    progress.n_done_of_rank = progress.n_total_of_rank = 1;
    progress.done_of_rank = all;
    progress.total_of_rank = total;
    send_message(&m);
}

static void say_ready(const Convoke__Control__Setup *setup)
{
    Convoke__Control__Ready ready = CONVOKE__CONTROL__READY__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY;
    m.ready = &ready;
    ready.launch = launch;
    ready.model_name = setup->model_dir;
    ready.isa = *setup->isa ? setup->isa : (char *)"fake";
    ready.plan_name = setup->plan_name;
    ready.combine = setup->combine;
    ready.vocab = 100;
    send_message(&m);
}

static void say_goodbye(const char *reason)
{
    Convoke__Control__Goodbye goodbye = CONVOKE__CONTROL__GOODBYE__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE;
    m.goodbye = &goodbye;
    goodbye.launch = launch;
    goodbye.rank = n_ranks - 1;
    goodbye.reason = (char *)reason;
    send_message(&m);
}

static void say_beat(uint64_t of_launch)
{
    Convoke__Control__Beat beat = CONVOKE__CONTROL__BEAT__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    uint32_t silent[MAX_RANKS] = {0};
    silent[n_ranks - 1] = 1234;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT;
    m.beat = &beat;
    beat.launch = of_launch;
    beat.step = steps;
    beat.n_silent_ms_of_rank = (size_t)n_ranks;
    beat.silent_ms_of_rank = silent;
    send_message(&m);
}

/* One token for each sequence that is not held; token number k of a sequence is its id * 1000 + k. */
static void do_step(void)
{
    static Convoke__Control__Event events[2 * MAX_SEQUENCES], *list[2 * MAX_SEQUENCES];
    static Convoke__Control__TokenLogprob tokens[MAX_SEQUENCES], *places[MAX_SEQUENCES];
    Convoke__Control__Report report = CONVOKE__CONTROL__REPORT__INIT;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    size_t n = 0;
    for (int i = 0; i < n_sequences; i++) {
        fake_sequence *s = &sequences[i];
        if (s->held)
            continue;
        convoke__control__token_logprob__init(&tokens[i]);
        tokens[i].token = (uint32_t)(s->id * 1000 + (uint64_t)s->made++);
        places[i] = &tokens[i];
        convoke__control__event__init(&events[n]);
        events[n].id = s->id;
        events[n].kind = CONVOKE__CONTROL__EVENT_KIND__TOKEN;
        events[n].n_tokens = 1;
        events[n].tokens = &places[i];
        list[n] = &events[n];
        n++;
        if (--s->left > 0)
            continue;
        convoke__control__event__init(&events[n]);
        events[n].id = s->id;
        events[n].kind = CONVOKE__CONTROL__EVENT_KIND__FINISHED;
        list[n] = &events[n];
        n++;
    }
    int kept = 0;
    for (int i = 0; i < n_sequences; i++)
        if (sequences[i].left > 0)
            sequences[kept++] = sequences[i];
    n_sequences = kept;
    if (n == 0)
        return;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT;
    m.report = &report;
    report.launch = launch;
    report.step = ++steps;
    report.n_events = n;
    report.events = list;
    send_message(&m);
}

static void find_and_hold(uint64_t id, bool hold)
{
    for (int i = 0; i < n_sequences; i++)
        if (sequences[i].id == id)
            sequences[i].held = hold;
}

static void take_setup(const Convoke__Control__Setup *setup)
{
    launch = setup->launch;
    if (is("goodbye")) {
        say_goodbye("the model is not to its liking");
        exit(3);
    }
    say_progress(1);
    if (is("stuck-load"))
        return;
    say_progress(100);
    say_ready(setup);
    if (is("old-launch"))
        say_beat(launch - 1);
}

static void take(const Convoke__Control__ToLeader *m)
{
    switch (m->kind_case) {
    case CONVOKE__CONTROL__TO_LEADER__KIND_SETUP:
        take_setup(m->setup);
        return;
    case CONVOKE__CONTROL__TO_LEADER__KIND_REFUSAL:
        die(m->refusal->reason);
        return;
    case CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT:
        for (size_t i = 0; i < m->submit->n_sequences && n_sequences < MAX_SEQUENCES; i++) {
            const Convoke__Control__Sequence *s = m->submit->sequences[i];
            sequences[n_sequences++] = (fake_sequence){.id = s->id, .left = (int)s->max_new, .made = (int)s->n_prior};
        }
        return;
    case CONVOKE__CONTROL__TO_LEADER__KIND_HOLD:
    case CONVOKE__CONTROL__TO_LEADER__KIND_RELEASE:
        for (size_t i = 0; i < m->hold->n_ids; i++)
            find_and_hold(m->hold->ids[i], m->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND_HOLD);
        return;
    case CONVOKE__CONTROL__TO_LEADER__KIND_STOP:
        exit(0);
    default:
        return;
    }
}

static void read_more(void)
{
    ssize_t n = recv(sock, frame_reader_room(&in, 1 << 16), 1 << 16, 0);
    const void *payload;
    size_t size;
    if (n <= 0)
        exit(5);
    frame_reader_filled(&in, (size_t)n);
    while (frame_reader_next(&in, &payload, &size) == STATUS_OK && payload) {
        Convoke__Control__ToLeader *m;
        if (control_get_to_leader(payload, size, &m) != STATUS_OK)
            die(status_message());
        take(m);
        convoke__control__to_leader__free_unpacked(m, NULL);
    }
}

int main(int argc, char **argv)
{
    const char *address = NULL, *file = NULL;
    n_ranks = argc > 1 ? atoi(argv[1]) : 0;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--coordinator") == 0)
            address = argv[i + 1];
        if (strcmp(argv[i], "--secret-file") == 0)
            file = argv[i + 1];
    }
    log_set_speaker("rank 0");
    if (!address || !file || n_ranks < 1 || n_ranks > MAX_RANKS || !getenv("FAKE_WORKER_DIR"))
        die("usage: fake_worker RANKS --coordinator HOST:PORT --secret-file F");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    read_mode();
    fork_ranks();
    if (is("exit"))
        die("cannot go on, for a reason");
    if (control_secret_read(file, &secret) != STATUS_OK)
        die(status_message());
    connect_to(address);
    say_hello();
    frame_reader_init(&in, CONTROL_FRAME_BYTES);
    for (double beat = 0;;) {
        struct pollfd fd = {.fd = sock, .events = POLLIN};
        if (poll(&fd, 1, 5) > 0)
            read_more();
        if (launch && !is("no-beat") && clock_seconds() > beat + 0.1) {
            say_beat(launch);
            beat = clock_seconds();
        }
        if (launch && !is("no-step") && !is("no-beat"))
            do_step();
    }
}
