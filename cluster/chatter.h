/* chatter.h - what mpirun and the workers print, sorted: sentences of workers are passed on, mpirun's framed announcements are
 * condensed to one line that may serve as the reason of a failure. Pure: bytes in, lines out. */
#ifndef CONVOKE_CLUSTER_CHATTER_H
#define CONVOKE_CLUSTER_CHATTER_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    char line[1024]; /* being read; what is longer is cut */
    size_t n;
    bool in_banner;
    char banner[512];     /* the first announcement since it was last taken, in one line */
    bool banner_complete; /* its closing frame was seen */
    char last_words[512]; /* the last line of a worker */
    bool lost_host;       /* mpirun said that the daemon of a host is gone */
    char lost_name[256];  /* which, as mpirun calls it; "": it did not say */
    bool ending;          /* the job's end is known: mpirun's own words about it are dropped */
} chatter;

typedef void chatter_line(void *arg, const char *line);

/* Lines outside of mpirun's frames go to `line`, without their line feed. */
void chatter_feed(chatter *c, const char *bytes, size_t n, chatter_line *line, void *arg);
/* What was not ended by a line feed. */
void chatter_flush(chatter *c, chatter_line *line, void *arg);
/* The announcement, and from then on the next one: static buffer, NULL when there is none that is whole. */
const char *chatter_take_banner(chatter *c);

#endif
