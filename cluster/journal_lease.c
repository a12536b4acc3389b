#include "cluster/journal_lease.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/utsname.h>
#include <unistd.h>

/* The first line of a small file, without its newline; "" when it cannot be read. */
static void read_line(const char *path, char *out, int size)
{
    FILE *f = fopen(path, "re");
    out[0] = '\0';
    if (!f)
        return;
    if (fgets(out, size, f))
        out[strcspn(out, "\n")] = '\0';
    fclose(f);
}

/* When process `pid` began; -1: there is none, or only its remains. */
static int64_t process_started(int64_t pid)
{
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%" PRId64 "/stat", pid);
    read_line(path, line, sizeof line);
    const char *at = strrchr(line, ')'); /* the name before it may hold anything */
    char state = 'X';
    long long started = -1;
    if (!at ||
        sscanf(at, ") %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %lld", &state, &started) != 2)
        return -1;
    return state == 'Z' || state == 'X' ? -1 : started;
}

void journal_holder_self(journal_holder *out)
{
    struct utsname name;
    unsigned char random[16] = {0};
    *out = (journal_holder){.pid = getpid()};
    out->started = process_started(out->pid);
    if (uname(&name) == 0)
        snprintf(out->host, sizeof out->host, "%.64s", name.nodename);
    read_line("/proc/sys/kernel/random/boot_id", out->boot, sizeof out->boot);
    ssize_t n = readlink("/proc/self/ns/pid", out->space, sizeof out->space - 1);
    out->space[n > 0 ? n : 0] = '\0';
    if (getrandom(random, sizeof random, 0) < 0)
        memcpy(random, &out->pid, sizeof out->pid); /* unique among the living of one machine at least */
    for (int i = 0; i < 16; i++)
        snprintf(out->token + 2 * i, 3, "%02x", random[i]);
}

holder_state journal_holder_look(const journal_holder *theirs, const journal_holder *mine)
{
    if (!mine->boot[0] || !mine->space[0] || strcmp(theirs->host, mine->host) != 0 || strcmp(theirs->boot, mine->boot) != 0 ||
        strcmp(theirs->space, mine->space) != 0)
        return HOLDER_OUT_OF_SIGHT;
    int64_t started = process_started(theirs->pid);
    return started >= 0 && started == theirs->started ? HOLDER_ALIVE : HOLDER_DEAD;
}
