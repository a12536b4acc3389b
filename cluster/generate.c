/* A client of vllm.Inference/GenerateStream. Where the stream breaks off because the server is gone, it is taken up again by
 * convoke.v1.Requests/Attach from the token that came last: a server with a journal that was started again goes on. */
#include "cluster/generate.h"

#include "cluster/private_server.h"
#include "cluster/rpc_client.h"
#include "proto/bytes.h"
#include "proto/clock.h"
#include "proto/console.h"
#include "proto/convoke.pb-c.h"
#include "proto/log.h"
#include "proto/options.h"
#include "proto/vllm.pb-c.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { MOST_STOPS = 16, PROMPT_BYTES = 16 << 20, INTERRUPTED = 130 };
#define NO_SEED           INT64_MIN
#define COME_BACK_SECONDS 30.0 /* for a server that went away in the middle */

typedef struct {
    const char *connect, *model, *stop, *tls_ca;
    const char *prompt; /* NULL, "-": standard input */
    int64_t ranks, max_tokens, seed, top_k;
    double temperature, top_p, timeout; /* temperature NAN: not said */
    bool stats, ignore_eos;
} generate_options;

static volatile sig_atomic_t interrupted;

static void note_signal(int signal)
{
    (void)signal;
    interrupted = 1;
}

/* ---- the command line ---- */

static status parse(int argc, char **argv, generate_options *o, options_wish *wish)
{
    const option_entry entries[] = {
        {"connect", OPTION_STRING, &o->connect, .argument = "HOST:PORT", .environment = "CONVOKE_GRPC",
         .help = "a running server (default: 127.0.0.1:50051)"},
        {"model", OPTION_STRING, &o->model, .argument = "DIR", .help = "start a server of one's own for this checkpoint folder"},
        {"ranks", OPTION_INT, &o->ranks, .argument = "N", .fallback = "1", .min = 1, .max = 4096,
         .help = "workers of that server"},
        {"max-tokens", OPTION_INT, &o->max_tokens, .argument = "M", .fallback = "256", .min = 1, .max = 1 << 30,
         .help = "end after so many tokens"},
        {"temperature", OPTION_DOUBLE, &o->temperature, .argument = "X", .min = 0, .max = 100,
         .help = "0 takes the most probable token (default: the model's own)"},
        {"top-p", OPTION_DOUBLE, &o->top_p, .argument = "X", .fallback = "0", .min = 0, .max = 1,
         .help = "draw from the most probable tokens of this sum (0: the model's own)"},
        {"top-k", OPTION_INT, &o->top_k, .argument = "K", .fallback = "0", .min = 0, .max = 1 << 30,
         .help = "draw from so many (0: the model's own)"},
        {"seed", OPTION_INT, &o->seed, .argument = "S", .help = "the same seed gives the same text (default: a fresh one)"},
        {"stop", OPTION_STRING, &o->stop, .argument = "STR[,STR..]",
         .help = "end before one of these; \\n is a line end, \\, a comma"},
        {"ignore-eos", OPTION_FLAG, &o->ignore_eos, .help = "go on where the model would end"},
        {"timeout", OPTION_DOUBLE, &o->timeout, .argument = "S", .fallback = "120", .min = 0.1, .max = 86400,
         .help = "give up after so long without a word"},
        {"tls-ca", OPTION_STRING, &o->tls_ca, .argument = "PEM",
         .help = "speak TLS with a server whose certificate this one signed"},
        {"stats", OPTION_FLAG, &o->stats, .help = "say how fast it was, also in a pipe"},
    };
    const option_table table = {.name = "convoke generate",
                                .summary = "Continues a prompt and prints the text as it comes.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries,
                                .operand_name = "PROMPT",
                                .max_operands = 1};
    *o = (generate_options){.temperature = NAN, .seed = NO_SEED};
    int n_operands = 0;
    TRY(options_parse(&table, argc, argv, wish, &o->prompt, &n_operands));
    if (*wish != OPTIONS_RUN)
        options_print(&table, *wish, stdout);
    return STATUS_OK;
}

/* --connect said on the command line and --model exclude each other; an address from the environment gives way. */
static status check(int argc, char **argv, generate_options *o)
{
    if (!o->model && !o->connect)
        o->connect = "127.0.0.1:50051";
    if (!o->model)
        return STATUS_OK;
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--connect") == 0 || strncmp(argv[i], "--connect=", 10) == 0)
            return status_fail(STATUS_USAGE, "--connect and --model exclude each other: a running server, or one of one's own");
    if (o->tls_ca)
        return status_fail(STATUS_USAGE, "--tls-ca is for --connect; a server of one's own is spoken to on this machine");
    return STATUS_OK;
}

/* "a,b\,c\n" into its parts, in place in `text`. */
static status split_stops(char *text, char **stops, size_t *n_stops)
{
    char *to = text;
    *n_stops = 0;
    if (!*text)
        return STATUS_OK;
    stops[(*n_stops)++] = to;
    for (const char *from = text; *from; from++) {
        if (*from == ',') {
            if (*n_stops == MOST_STOPS)
                return status_fail(STATUS_USAGE, "--stop: at most %d strings", MOST_STOPS);
            *to++ = '\0';
            stops[(*n_stops)++] = to;
        } else if (*from == '\\' && from[1]) {
            from++;
            *to++ = *from == 'n' ? '\n' : *from == 't' ? '\t' : *from;
        } else {
            *to++ = *from;
        }
    }
    *to = '\0';
    for (size_t i = 0; i < *n_stops; i++)
        if (!*stops[i])
            return status_fail(STATUS_USAGE, "--stop: an empty string would stop at once");
    return STATUS_OK;
}

/* The operand, or standard input to its end. */
static status read_prompt(const generate_options *o, bytes_writer *prompt)
{
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        bytes_put(prompt, o->prompt, strlen(o->prompt));
        return prompt->failed ? status_fail(STATUS_NO_MEMORY, "no memory for the prompt") : STATUS_OK;
    }
    if (!o->prompt && isatty(STDIN_FILENO))
        return status_fail(STATUS_USAGE, "PROMPT is missing (- reads it from standard input)");
    for (;;) {
        char *room = bytes_extend(prompt, 65536);
        ssize_t n = room ? read(STDIN_FILENO, room, 65536) : -1;
        if (n < 0 && errno == EINTR && !interrupted) {
            prompt->size -= 65536;
            continue;
        }
        if (interrupted)
            return status_fail(STATUS_STOPPED, "stopped");
        if (!room || prompt->size > PROMPT_BYTES)
            return status_fail(STATUS_NO_MEMORY, "standard input: a prompt has at most %d MiB", PROMPT_BYTES >> 20);
        if (n < 0)
            return status_fail(STATUS_IO, "standard input: cannot be read (%s)", strerror(errno));
        prompt->size -= 65536 - (size_t)n;
        if (n == 0)
            return STATUS_OK;
    }
}

/* ---- one stream ---- */

typedef struct {
    const generate_options *options;
    rpc_client *client;
    rpc_stream *stream;
    char id[48];
    Vllm__ResponseOptions response;
    double began, first, last; /* clock_seconds(); 0: not yet */
    unsigned n_prompt, n_tokens;
    bool terminal, accepted, finished, no_reader;
    char last_byte;
} session;

static void show_text(session *s, const ProtobufCBinaryData *text)
{
    if (text->len == 0 || s->no_reader)
        return;
    if (fwrite(text->data, 1, text->len, stdout) != text->len || fflush(stdout) != 0)
        s->no_reader = true; /* head(1) has seen enough */
    s->last_byte = (char)text->data[text->len - 1];
}

static void take_response(session *s, const Vllm__GenerateResponse *r)
{
    double now = clock_seconds();
    s->accepted = true;
    if (r->_prompt_info_case == VLLM__GENERATE_RESPONSE___PROMPT_INFO_PROMPT_INFO)
        s->n_prompt = r->prompt_info->num_prompt_tokens;
    if (!r->outputs)
        return;
    if (r->outputs->num_tokens > 0) {
        s->n_tokens += r->outputs->num_tokens;
        s->last = now;
        if (s->first == 0)
            s->first = now;
    }
    show_text(s, &r->outputs->text);
    s->finished |= r->outputs->_finish_info_case == VLLM__SEQUENCE_OUTPUT___FINISH_INFO_FINISH_INFO;
}

/* Reads until the call ends; cancels it on a signal, without a reader, and after too long a silence. */
static void read_stream(session *s, rpc_end *end)
{
    double heard = clock_seconds();
    bool cancelled = false, silent = false;
    for (;;) {
        ProtobufCMessage *message = NULL;
        rpc_event event = rpc_stream_next(s->stream, 0.05, &vllm__generate_response__descriptor, &message);
        if (event == RPC_ENDED)
            break;
        if (event == RPC_MESSAGE) {
            heard = clock_seconds();
            if (!cancelled)
                take_response(s, (const Vllm__GenerateResponse *)message);
            protobuf_c_message_free_unpacked(message, NULL);
        }
        silent = silent || clock_seconds() - heard > s->options->timeout;
        if ((interrupted || s->no_reader || silent) && !cancelled) {
            rpc_stream_cancel(s->stream);
            cancelled = true;
        }
    }
    *end = *rpc_stream_end(s->stream);
    if (silent)
        snprintf(end->sentence, sizeof end->sentence, "the server said nothing for %s", human_seconds(s->options->timeout).text);
}

static status start_generate(session *s, const bytes_writer *prompt)
{
    const generate_options *o = s->options;
    char *stop_text = strdup(o->stop ? o->stop : ""), *stops[MOST_STOPS];
    if (!stop_text)
        return status_fail(STATUS_NO_MEMORY, "no memory for a request");
    Vllm__RandomSampling sampling = VLLM__RANDOM_SAMPLING__INIT;
    Vllm__StoppingCriteria stopping = VLLM__STOPPING_CRITERIA__INIT;
    Vllm__GenerateRequest r = VLLM__GENERATE_REQUEST__INIT;
    sampling.top_k = (uint32_t)o->top_k;
    sampling.top_p = (float)o->top_p;
    if (o->seed != NO_SEED) {
        sampling._seed_case = VLLM__RANDOM_SAMPLING___SEED_SEED;
        sampling.seed = o->seed;
    }
    stopping.max_new_tokens = (uint32_t)o->max_tokens;
    stopping.ignore_eos = o->ignore_eos;
    stopping.stop_strings = stops;
    status st = split_stops(stop_text, stops, &stopping.n_stop_strings);
    r.request_id = s->id;
    r.prompt_case = VLLM__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = (ProtobufCBinaryData){.len = prompt->size, .data = prompt->data};
    if (!isnan(o->temperature)) {
        r._temperature_case = VLLM__GENERATE_REQUEST___TEMPERATURE_TEMPERATURE;
        r.temperature = (float)o->temperature;
    }
    r.sampling = &sampling;
    r.stopping = &stopping;
    r.response = &s->response;
    if (st == STATUS_OK)
        st = rpc_stream_start(s->client, "/vllm.Inference/GenerateStream", &r.base, 0, &s->stream);
    free(stop_text);
    return st;
}

static status start_attach(session *s)
{
    Convoke__V1__AttachRequest r = CONVOKE__V1__ATTACH_REQUEST__INIT;
    r.request_id = s->id;
    r.from_token = s->n_tokens;
    r.response = &s->response;
    return rpc_stream_start(s->client, "/convoke.v1.Requests/Attach", &r.base, 0, &s->stream);
}

/* The connection broke: the server may be starting again. Asks for the rest until it is there, or has forgotten, or time is over.
 */
static status take_up_again(session *s, rpc_end *end)
{
    const struct timespec pause = {.tv_nsec = 250 * 1000 * 1000};
    const double patience = fmin(s->options->timeout, COME_BACK_SECONDS);
    const rpc_end broken = *end;
    double until = clock_seconds() + patience;
    while (end->lost && !s->finished && !interrupted && clock_seconds() < until) {
        unsigned before = s->n_tokens;
        nanosleep(&pause, NULL);
        rpc_stream_close(s->stream);
        s->stream = NULL;
        TRY(start_attach(s));
        read_stream(s, end);
        if (s->n_tokens > before)
            until = clock_seconds() + patience;
    }
    if (end->code == RPC_ENDED_NOT_FOUND) /* it does not keep requests: the first break is what there is to say */
        *end = broken;
    return STATUS_OK;
}

/* ---- the whole ---- */

static void print_stats(const session *s)
{
    double decode = s->n_tokens > 1 && s->last > s->first ? (s->n_tokens - 1) / (s->last - s->first) : 0;
    fprintf(stderr, "%u prompt tokens, %u new tokens", s->n_prompt, s->n_tokens);
    if (decode > 0)
        fprintf(stderr, ", %s", human_rate(decode, "tok/s").text);
    if (s->first > 0)
        fprintf(stderr, ", the first after %s", human_seconds(s->first - s->began).text);
    fprintf(stderr, "\n");
}

static status judge(const session *s, const rpc_end *end, const char *address)
{
    if (interrupted)
        return status_fail(STATUS_STOPPED, "stopped");
    if (s->no_reader)
        return status_fail(STATUS_ELSEWHERE, "nobody reads the output");
    if (end->code == RPC_ENDED_OK)
        return STATUS_OK;
    return status_fail(STATUS_IO, "%s: %s", address, end->sentence);
}

static status converse(session *s, const char *address, const bytes_writer *prompt)
{
    rpc_end end = {0};
    uint64_t random = 0;
    ssize_t n = getrandom(&random, sizeof random, 0);
    snprintf(s->id, sizeof s->id, "generate-%016" PRIx64, n == sizeof random ? random : (uint64_t)getpid());
    s->began = clock_seconds();
    TRY(start_generate(s, prompt));
    read_stream(s, &end);
    if (s->accepted)
        TRY(take_up_again(s, &end));
    if ((s->terminal || s->options->stats) && s->last_byte && s->last_byte != '\n' && !s->no_reader)
        fputs("\n", stdout), fflush(stdout);
    status st = judge(s, &end, address);
    if (s->n_tokens > 0 && !s->no_reader && (s->options->stats || (s->terminal && isatty(STDERR_FILENO))))
        print_stats(s);
    return st;
}

static status generate(const generate_options *o)
{
    bytes_writer prompt = {0};
    private_server *own = NULL;
    session s = {.options = o, .terminal = isatty(STDOUT_FILENO)};
    vllm__response_options__init(&s.response);
    status st;
    TRY_GOTO(read_prompt(o, &prompt), out);
    if (o->model)
        TRY_GOTO(private_server_start(o->model, (int)o->ranks, &interrupted, &own), out);
    const char *address = own ? private_server_address(own) : o->connect;
    TRY_GOTO(rpc_client_open(&(rpc_client_options){.address = address, .tls_ca = o->tls_ca}, &s.client), out);
    st = converse(&s, address, &prompt);
out:
    rpc_stream_close(s.stream);
    rpc_client_close(s.client);
    private_server_end(own);
    bytes_clear(&prompt);
    return st;
}

/* A second Ctrl-C ends at once. */
static void catch_signals(void)
{
    struct sigaction action = {.sa_handler = note_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

int generate_command(int argc, char **argv)
{
    generate_options o;
    options_wish wish = OPTIONS_RUN;
    log_set_speaker("convoke generate");
    catch_signals();
    status st = parse(argc, argv, &o, &wish);
    if (st == STATUS_OK && wish == OPTIONS_RUN)
        st = check(argc, argv, &o);
    if (st == STATUS_OK && wish == OPTIONS_RUN)
        st = generate(&o);
    if (st == STATUS_STOPPED && interrupted)
        return INTERRUPTED;
    if (st != STATUS_OK && st != STATUS_ELSEWHERE)
        log_line("%s", status_message());
    return status_exit_code(st);
}
