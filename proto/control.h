/* control.h - what both ends of the control connection agree on beside the messages themselves (control.proto).
 *
 *   secret file ─► Hello ─► who may speak        message ─► frame ─► socket ─► frame_reader ─► message or one sentence
 *
 * The secret is made per launch and handed over by a file or a pipe, never on a command line. The files are text: white space
 * around the secret does not count, so a person may make one with any editor. */
#ifndef CONVOKE_PROTO_CONTROL_H
#define CONVOKE_PROTO_CONTROL_H

#include "proto/bytes.h"
#include "proto/control.pb-c.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    CONTROL_PROTOCOL = 1,
    CONTROL_SECRET_MIN = 16, /* characters */
    CONTROL_SECRET_MAX = 256,
    CONTROL_SECRET_MADE = 64, /* of one made here: 32 random bytes in hex */
};
#define CONTROL_HELLO_BYTES      ((size_t)256 << 10) /* longest frame from somebody who has not shown the secret yet */
#define CONTROL_FRAME_BYTES      ((size_t)64 << 20)  /* longest frame after that, both ways */
#define CONTROL_BEAT_SECONDS     0.5                 /* the leader is heard at least this often from Setup on, whatever it does */
#define CONTROL_GREETING_SECONDS 10.0                /* Hello after accept, Setup or Refusal after Hello */

typedef struct {
    int n;
    char text[CONTROL_SECRET_MAX + 1];
} control_secret;

/* Reads a file, a pipe or /dev/fd/N to its end or the end of the line, within CONTROL_GREETING_SECONDS. Refuses a file that group
 * or others may read, one of another user (unless root reads), and secrets that are too short, too long or hold white space. */
status control_secret_read(const char *path, control_secret *out);
status control_secret_make(control_secret *out);
/* Takes the same time wherever they differ. */
bool control_bytes_equal(const void *secret, size_t n_secret, const void *bytes, size_t n);
bool control_secret_equal(const control_secret *secret, const void *bytes, size_t n);

/* "HOST:PORT" or "[V6]:PORT" (port 0 .. 65535; the host may be empty: *host is ""). `where` names the option in the sentence. */
status control_split_address(const char *where, const char *address, char host[256], char port[8]);
/* A connected socket: no delay, not blocking, closed on exec; the kernel notices within about ten seconds that the other host is
 * gone. */
status control_tune_socket(int fd);

/* Appends one frame. The writer keeps its memory, so a reused one stops allocating. STATUS_BAD_INPUT: longer than
 * CONTROL_FRAME_BYTES; nothing was appended. */
status control_put_to_leader(bytes_writer *to, const Convoke__Control__ToLeader *message);
status control_put_to_coordinator(bytes_writer *to, const Convoke__Control__ToCoordinator *message);
/* A step's Report whose events were packed one by one, as they came: what they pointed to need not live on. */
status control_add_event(bytes_writer *events, const Convoke__Control__Event *event);
/* `report` itself has no events. STATUS_BAD_INPUT: longer than CONTROL_FRAME_BYTES. */
status control_put_report(bytes_writer *to, const Convoke__Control__Report *report, const bytes_writer *events);
/* From a frame's payload; a message without content is refused as well. Freed by
 * convoke__control__to_leader__free_unpacked(m, NULL) and convoke__control__to_coordinator__free_unpacked(m, NULL). */
status control_get_to_leader(const void *payload, size_t size, Convoke__Control__ToLeader **out);
status control_get_to_coordinator(const void *payload, size_t size, Convoke__Control__ToCoordinator **out);
/* The launch a message speaks of; 0 for those that carry none (Hello, Refusal). Setup gives its own. */
uint64_t control_launch_of_to_leader(const Convoke__Control__ToLeader *message);
uint64_t control_launch_of_to_coordinator(const Convoke__Control__ToCoordinator *message);

#endif
