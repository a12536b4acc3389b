#include "cluster/chatter.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

/* Open MPI frames what it announces in lines of 58 to 78 dashes. */
static bool is_frame(const char *line)
{
    size_t n = strspn(line, "-");
    return n >= 40 && line[n] == '\0';
}

/* "[host:01234] ..." and "mpirun..." */
static bool is_of_mpirun(const char *line)
{
    if (strncmp(line, "mpirun", 6) == 0 || strncmp(line, "orterun", 7) == 0)
        return true;
    const char *end = line[0] == '[' ? strchr(line, ']') : NULL;
    const char *colon = end ? strchr(line, ':') : NULL;
    return colon && colon < end && strspn(colon + 1, "0123456789") == (size_t)(end - colon - 1) && end > colon + 1;
}

/* What mpirun only says of its own announcements. */
static bool is_noise(const char *line)
{
    return is_of_mpirun(line) && (strstr(line, " sent help message ") || strstr(line, "orte_base_help_aggregate"));
}

/* "ORTE has lost communication with a remote daemon", a few lines further "Remote daemon: [[3735,0],1] on node node1" */
static void note_lost_host(chatter *c)
{
    const char *on = strstr(c->line, " on node ");
    if (strstr(c->line, "lost communication with a remote daemon"))
        c->lost_host = true;
    else if (c->lost_host && !c->lost_name[0] && on && strstr(c->line, "Remote daemon:"))
        snprintf(c->lost_name, sizeof c->lost_name, "%.*s", (int)sizeof c->lost_name - 1, on + strlen(" on node "));
}

/* Words of a line joined by single blanks, behind what is there. */
static void append_words(char *to, size_t size, const char *line)
{
    size_t n = strlen(to);
    bool blank = n > 0;
    for (; *line && n + 2 < size; line++) {
        if (isspace((unsigned char)*line)) {
            blank = n > 0;
        } else {
            if (blank)
                to[n++] = ' ';
            blank = false;
            to[n++] = *line;
        }
    }
    to[n] = '\0';
}

static void end_line(chatter *c, chatter_line *line, void *arg)
{
    while (c->n > 0 && (c->line[c->n - 1] == '\r' || c->line[c->n - 1] == ' '))
        c->n--;
    c->line[c->n] = '\0';
    c->n = 0;
    if (is_frame(c->line)) {
        if (c->in_banner && c->banner[0])
            c->banner_complete = true;
        c->in_banner = !c->in_banner;
    } else if (c->in_banner) {
        note_lost_host(c);
        if (!c->banner_complete)
            append_words(c->banner, sizeof c->banner, c->line);
    } else if (c->line[0] && !is_noise(c->line) && !(c->ending && is_of_mpirun(c->line))) {
        if (!is_of_mpirun(c->line))
            snprintf(c->last_words, sizeof c->last_words, "%.*s", (int)sizeof c->last_words - 1, c->line);
        line(arg, c->line);
    }
}

void chatter_feed(chatter *c, const char *bytes, size_t n, chatter_line *line, void *arg)
{
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] == '\n')
            end_line(c, line, arg);
        else if (c->n < sizeof c->line - 1)
            c->line[c->n++] = (unsigned char)bytes[i] < ' ' && bytes[i] != '\r' ? ' ' : bytes[i];
    }
}

void chatter_flush(chatter *c, chatter_line *line, void *arg)
{
    if (c->n > 0)
        end_line(c, line, arg);
}

const char *chatter_take_banner(chatter *c)
{
    static _Thread_local char text[sizeof c->banner];
    if (!c->banner_complete)
        return NULL;
    memcpy(text, c->banner, sizeof text);
    c->banner[0] = '\0';
    c->banner_complete = false;
    return text;
}
