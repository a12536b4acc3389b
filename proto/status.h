/* status.h - how every part of Convoke says that something went wrong.
 *
 * A function that can fail returns a status. The sentence that a person reads is written once, where the cause is known, by
 * status_fail(); callers only pass the code on (TRY) and whoever talks to the person prints status_message().
 * Sentences name the file, the field and the cause ("plan.json: layer 3: expert 17 is on no rank"), lower case, no full stop.
 *
 * The sentence is kept per thread; a status made on one thread must be read on it. */
#ifndef CONVOKE_PROTO_STATUS_H
#define CONVOKE_PROTO_STATUS_H

typedef enum {
    STATUS_OK = 0,
    STATUS_USAGE,       /* the command line is wrong: exit code 2                                  */
    STATUS_BAD_INPUT,   /* a file or message is damaged, lying or contradicts another              */
    STATUS_UNSUPPORTED, /* well-formed, but asks for something this program does not do            */
    STATUS_NO_MEMORY,   /* memory, /dev/shm or the KV budget does not hold what was asked for      */
    STATUS_IO,          /* the system refused: open, read, map, write                              */
    STATUS_PEER_LOST,   /* another rank died or fell silent                                        */
    STATUS_STOPPED,     /* told to stop from outside (SIGTERM)                                     */
    STATUS_ELSEWHERE,   /* another rank failed and says so itself: end quietly                     */
} status;

/* Writes the sentence (printf style; cut at 1 KiB; control characters become '?') and returns `code`. */
status status_fail(status code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The last sentence written on this thread; "" before the first. Valid until the next status_fail() on this thread. */
const char *status_message(void);

/* 0, 1 or 2: what main() returns for this status. */
int status_exit_code(status code);

/* Leaves the enclosing function with the status of a call that failed. */
#define TRY(call)                                                                                                                \
    do {                                                                                                                         \
        status try_status_ = (call);                                                                                             \
        if (try_status_ != STATUS_OK)                                                                                            \
            return try_status_;                                                                                                  \
    } while (0)

/* The same, for functions that clean up behind one label; needs `status st` in scope. */
#define TRY_GOTO(call, label)                                                                                                    \
    do {                                                                                                                         \
        st = (call);                                                                                                             \
        if (st != STATUS_OK)                                                                                                     \
            goto label;                                                                                                          \
    } while (0)

#endif
