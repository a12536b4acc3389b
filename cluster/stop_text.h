/* stop_text.h - stop strings in a text that grows token by token: what may be shown now, and whether it has ended.
 *
 * A tail that may be the beginning of a stop string is held back until the next tokens decide, so a client never sees a part of
 * a stop string that is then taken away. */
#ifndef CONVOKE_CLUSTER_STOP_TEXT_H
#define CONVOKE_CLUSTER_STOP_TEXT_H

#include <stddef.h>

typedef struct {
    const char *text; /* not empty */
    size_t size;
} stop_string;

typedef struct {
    size_t shown;   /* bytes of the text that may be shown */
    int stop;       /* which stop string ended the text (the one that begins first; of these the first listed); -1: none yet */
    size_t stop_at; /* where it begins */
} stop_verdict;

/* text [size]: all of the output so far; bytes before `searched` (the size at the last call) brought no stop. include: the stop
 * string itself is part of the output. O(new bytes x strings x their length). */
stop_verdict stop_text_check(const char *text, size_t size, size_t searched, const stop_string *strings, int n_strings,
                             int include);

#endif
