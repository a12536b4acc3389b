#include "proto/control.h"

#include "proto/clock.h"
#include "proto/frame.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the secret ---- */

static status check_secret_file(const char *path, int fd)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode))
        return status_fail(STATUS_BAD_INPUT, "%s: a folder, not a secret", path);
    if (!S_ISREG(st.st_mode))
        return STATUS_OK; /* a pipe belongs to whoever made it */
    if (st.st_mode & 077)
        return status_fail(STATUS_BAD_INPUT, "%s: others may read or write this secret (mode %03o): chmod 600 it", path,
                           (unsigned)(st.st_mode & 0777));
    if (st.st_uid != geteuid() && geteuid() != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: this secret belongs to user %u", path, (unsigned)st.st_uid);
    return STATUS_OK;
}

/* *n bytes of what the descriptor gives until its end or the end of a line that is not empty, at most `size`. A pipe whose writer
 * neither writes nor closes is not waited for without end. */
static status read_all(const char *path, int fd, char *text, size_t size, size_t *n)
{
    double until = clock_seconds() + CONTROL_GREETING_SECONDS;
    *n = 0;
    while (*n < size && !(*n > 1 && text[*n - 1] == '\n')) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        double left = until - clock_seconds();
        if (left <= 0)
            return status_fail(STATUS_IO, "%s: the secret does not come", path);
        if (poll(&p, 1, (int)(left * 1e3) + 1) == 0)
            continue;
        ssize_t got = read(fd, text + *n, size - *n);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got < 0)
            return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
        if (got == 0)
            break;
        *n += (size_t)got;
    }
    return STATUS_OK;
}

static status take_secret(const char *path, const char *text, size_t n, control_secret *out)
{
    while (n > 0 && isspace((unsigned char)text[n - 1]))
        n--;
    while (n > 0 && isspace((unsigned char)*text))
        text++, n--;
    for (size_t i = 0; i < n; i++)
        if (!isgraph((unsigned char)text[i]))
            return status_fail(STATUS_BAD_INPUT, "%s: a secret is one word of printable characters", path);
    if (n < CONTROL_SECRET_MIN || n > CONTROL_SECRET_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: a secret has %d to %d characters, not %zu%s", path, CONTROL_SECRET_MIN,
                           CONTROL_SECRET_MAX, n, n > CONTROL_SECRET_MAX ? " or more" : "");
    *out = (control_secret){.n = (int)n};
    memcpy(out->text, text, n);
    return STATUS_OK;
}

status control_secret_read(const char *path, control_secret *out)
{
    char text[2 * CONTROL_SECRET_MAX];
    size_t n;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a named pipe without a writer must not block in open() */
    if (fd < 0)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    status st = check_secret_file(path, fd);
    if (st == STATUS_OK)
        st = read_all(path, fd, text, sizeof text, &n);
    close(fd);
    if (st == STATUS_OK)
        st = take_secret(path, text, n, out);
    explicit_bzero(text, sizeof text);
    return st;
}

status control_secret_make(control_secret *out)
{
    unsigned char random[CONTROL_SECRET_MADE / 2];
    if (getrandom(random, sizeof random, 0) != sizeof random)
        return status_fail(STATUS_IO, "the system gives no random numbers");
    *out = (control_secret){.n = CONTROL_SECRET_MADE};
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(out->text + 2 * i, 3, "%02x", random[i]);
    return STATUS_OK;
}

bool control_bytes_equal(const void *secret, size_t n_secret, const void *bytes, size_t n)
{
    const unsigned char *s = secret, *b = bytes;
    unsigned char differs = n != n_secret;
    for (size_t i = 0; i < n_secret; i++)
        differs |= (unsigned char)(s[i] ^ (i < n ? b[i] : 0));
    return !differs;
}

bool control_secret_equal(const control_secret *secret, const void *bytes, size_t n)
{
    return control_bytes_equal(secret->text, (size_t)secret->n, bytes, n);
}

/* ---- addresses and sockets ---- */

status control_split_address(const char *where, const char *address, char host[256], char port[8])
{
    const char *colon = strrchr(address, ':');
    size_t n = colon ? (size_t)(colon - address) : 0;
    char *end = NULL;
    bool digit = colon && isdigit((unsigned char)colon[1]);
    unsigned long number = digit ? strtoul(colon + 1, &end, 10) : 0;
    if (!digit || *end || number > 65535 || n > 255)
        return status_fail(STATUS_USAGE, "%s: \"%s\" is not HOST:PORT", where, address);
    if (n >= 2 && address[0] == '[' && colon[-1] == ']') {
        address++;
        n -= 2;
    } else if (memchr(address, ':', n)) {
        return status_fail(STATUS_USAGE, "%s: \"%s\": write an IPv6 address as [ADDRESS]:PORT", where, address);
    }
    memcpy(host, address, n);
    host[n] = '\0';
    snprintf(port, 8, "%lu", number);
    return STATUS_OK;
}

static int set_number(int fd, int level, int name, int value)
{
    return setsockopt(fd, level, name, &value, sizeof value);
}

status control_tune_socket(int fd)
{
    /* Keepalive finds a host that is gone while nothing is sent, the user timeout one that is gone while something is. */
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 ||
        set_number(fd, IPPROTO_TCP, TCP_NODELAY, 1) != 0 || set_number(fd, SOL_SOCKET, SO_KEEPALIVE, 1) != 0 ||
        set_number(fd, IPPROTO_TCP, TCP_KEEPIDLE, 3) != 0 || set_number(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1) != 0 ||
        set_number(fd, IPPROTO_TCP, TCP_KEEPCNT, 5) != 0 || set_number(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 10000) != 0)
        return status_fail(STATUS_IO, "the control connection's socket: %s", strerror(errno));
    return STATUS_OK;
}

/* ---- messages ---- */

static status put_frame(bytes_writer *to, const ProtobufCMessage *message)
{
    size_t size = protobuf_c_message_get_packed_size(message);
    if (size > CONTROL_FRAME_BYTES)
        return status_fail(STATUS_BAD_INPUT, "a control message of %zu bytes, more than the %zu allowed", size,
                           CONTROL_FRAME_BYTES);
    unsigned char *at = bytes_extend(to, FRAME_HEADER_BYTES + size);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory for a control message of %zu bytes", size);
    frame_put_header(at, (uint32_t)size);
    protobuf_c_message_pack(message, at + FRAME_HEADER_BYTES);
    return STATUS_OK;
}

status control_put_to_leader(bytes_writer *to, const Convoke__Control__ToLeader *message)
{
    return put_frame(to, &message->base);
}

status control_put_to_coordinator(bytes_writer *to, const Convoke__Control__ToCoordinator *message)
{
    return put_frame(to, &message->base);
}

/* A field of message type on the wire is its tag, the length, and the message; so messages can be put together from packed
 * parts. */
#define TAG_OF(field) ((uint32_t)(field) << 3 | 2)
enum { REPORT_EVENTS_FIELD = 16, TO_COORDINATOR_REPORT_FIELD = 4 }; /* control.proto */

static size_t put_varint(unsigned char *to, uint64_t value)
{
    size_t n = 0;
    for (; value >= 0x80; value >>= 7)
        to[n++] = (unsigned char)(value | 0x80);
    to[n++] = (unsigned char)value;
    return n;
}

static size_t put_part_head(unsigned char head[20], int field, size_t size)
{
    size_t n = put_varint(head, TAG_OF(field));
    return n + put_varint(head + n, size);
}

status control_add_event(bytes_writer *events, const Convoke__Control__Event *event)
{
    unsigned char head[20];
    size_t size = protobuf_c_message_get_packed_size(&event->base), n = put_part_head(head, REPORT_EVENTS_FIELD, size);
    unsigned char *at = bytes_extend(events, n + size);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory for an event of %zu bytes", size);
    memcpy(at, head, n);
    protobuf_c_message_pack(&event->base, at + n);
    return STATUS_OK;
}

status control_put_report(bytes_writer *to, const Convoke__Control__Report *report, const bytes_writer *events)
{
    unsigned char head[20];
    size_t own = protobuf_c_message_get_packed_size(&report->base), inner = own + events->size;
    size_t n = put_part_head(head, TO_COORDINATOR_REPORT_FIELD, inner), size = n + inner;
    if (events->failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for the events of a step");
    if (size > CONTROL_FRAME_BYTES)
        return status_fail(STATUS_BAD_INPUT, "a report of %zu bytes, more than the %zu allowed", size, CONTROL_FRAME_BYTES);
    unsigned char *at = bytes_extend(to, FRAME_HEADER_BYTES + size);
    if (!at)
        return status_fail(STATUS_NO_MEMORY, "no memory for a report of %zu bytes", size);
    frame_put_header(at, (uint32_t)size);
    memcpy(at + FRAME_HEADER_BYTES, head, n);
    protobuf_c_message_pack(&report->base, at + FRAME_HEADER_BYTES + n);
    if (events->size)
        memcpy(at + FRAME_HEADER_BYTES + n + own, events->data, events->size);
    return STATUS_OK;
}

status control_get_to_leader(const void *payload, size_t size, Convoke__Control__ToLeader **out)
{
    Convoke__Control__ToLeader *m = convoke__control__to_leader__unpack(NULL, size, payload);
    if (!m || m->kind_case == CONVOKE__CONTROL__TO_LEADER__KIND__NOT_SET) {
        convoke__control__to_leader__free_unpacked(m, NULL);
        return status_fail(STATUS_BAD_INPUT, "a frame of %zu bytes from the coordinator holds no message", size);
    }
    *out = m;
    return STATUS_OK;
}

status control_get_to_coordinator(const void *payload, size_t size, Convoke__Control__ToCoordinator **out)
{
    Convoke__Control__ToCoordinator *m = convoke__control__to_coordinator__unpack(NULL, size, payload);
    if (!m || m->kind_case == CONVOKE__CONTROL__TO_COORDINATOR__KIND__NOT_SET) {
        convoke__control__to_coordinator__free_unpacked(m, NULL);
        return status_fail(STATUS_BAD_INPUT, "a frame of %zu bytes from the workers holds no message", size);
    }
    *out = m;
    return STATUS_OK;
}

uint64_t control_launch_of_to_leader(const Convoke__Control__ToLeader *m)
{
    switch (m->kind_case) {
    case CONVOKE__CONTROL__TO_LEADER__KIND_SETUP:
        return m->setup->launch;
    case CONVOKE__CONTROL__TO_LEADER__KIND_SUBMIT:
        return m->submit->launch;
    case CONVOKE__CONTROL__TO_LEADER__KIND_CANCEL:
    case CONVOKE__CONTROL__TO_LEADER__KIND_HOLD:
    case CONVOKE__CONTROL__TO_LEADER__KIND_RELEASE:
    case CONVOKE__CONTROL__TO_LEADER__KIND_CLEAR_PREFIX_CACHE:
        return m->cancel->launch; /* all are Ids in one union */
    case CONVOKE__CONTROL__TO_LEADER__KIND_STOP:
        return m->stop->launch;
    case CONVOKE__CONTROL__TO_LEADER__KIND_STATISTICS:
        return m->statistics->launch;
    case CONVOKE__CONTROL__TO_LEADER__KIND_REPLAN:
        return m->replan->launch;
    default:
        return 0;
    }
}

uint64_t control_launch_of_to_coordinator(const Convoke__Control__ToCoordinator *m)
{
    switch (m->kind_case) {
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_PROGRESS:
        return m->progress->launch;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_READY:
        return m->ready->launch;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT:
        return m->report->launch;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_BEAT:
        return m->beat->launch;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_GOODBYE:
        return m->goodbye->launch;
    case CONVOKE__CONTROL__TO_COORDINATOR__KIND_STATISTICS:
        return m->statistics->launch;
    default:
        return 0;
    }
}
