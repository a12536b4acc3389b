/* log.h - one sentence on stderr: lower case, with numbers, said once. */
#ifndef CONVOKE_PROTO_LOG_H
#define CONVOKE_PROTO_LOG_H

/* Who speaks ("rank 3", "coordinator"); set once at start, before threads. */
void log_set_speaker(const char *speaker);

/* "speaker: sentence\n", written in one write() so that lines of several ranks never mix. */
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
