#include "cluster/hosts.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

enum { MAX_FILE = 4 << 20, MAX_SLOTS = 65535, MAX_NAME = 255 };

/* ---- reading ---- */

typedef struct {
    const char *where;
    int line;
} place;

static host_entry *find_host(hosts *h, const char *name)
{
    for (int i = 0; i < h->n; i++)
        if (strcmp(h->entries[i].name, name) == 0)
            return &h->entries[i];
    return NULL;
}

static status add_host(hosts *h, const place *at, const char *name, int slots)
{
    host_entry *known = find_host(h, name);
    if (known) { /* a line without slots adds one, as mpirun counts */
        known->slots = (known->slots ? known->slots : 1) + (slots ? slots : 1);
        return known->slots <= MAX_SLOTS ? STATUS_OK
                                         : status_fail(STATUS_BAD_INPUT, "%s: line %d: host %s has more than %d slots", at->where,
                                                       at->line, name, MAX_SLOTS);
    }
    host_entry *entries = realloc(h->entries, (size_t)(h->n + 1) * sizeof *entries);
    if (!entries)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d hosts", at->where, h->n + 1);
    h->entries = entries;
    char *copy = strdup(name);
    if (!copy)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d hosts", at->where, h->n + 1);
    h->entries[h->n++] = (host_entry){.name = copy, .slots = slots};
    return STATUS_OK;
}

static status read_count(const place *at, const char *key, const char *text, int *out)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (end == text || *end || errno || n < 1 || n > MAX_SLOTS)
        return status_fail(STATUS_BAD_INPUT, "%s: line %d: %s is \"%s\", not a number from 1 to %d", at->where, at->line, key,
                           text, MAX_SLOTS);
    *out = (int)n;
    return STATUS_OK;
}

static bool name_is_good(const char *name)
{
    size_t n = strlen(name);
    if (n == 0 || n > MAX_NAME || name[0] == '-')
        return false;
    for (const char *c = name; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr(".-_@:", *c))
            return false;
    return true;
}

/* "name:4" has slots behind one colon; an IPv6 address has more colons and none. */
static status split_name(const place *at, char *name, int *slots)
{
    char *colon = strchr(name, ':');
    if (colon && !strchr(colon + 1, ':')) {
        *colon = '\0';
        TRY(read_count(at, "the number of slots", colon + 1, slots));
    }
    if (!name_is_good(name))
        return status_fail(STATUS_BAD_INPUT, "%s: line %d: \"%s\" is no host name", at->where, at->line, name);
    return STATUS_OK;
}

static status parse_line(const place *at, char *line, hosts *h)
{
    char *comment = strchr(line, '#');
    if (comment)
        *comment = '\0';
    char *save, *name = strtok_r(line, " \t\r\f\v", &save);
    if (!name)
        return STATUS_OK;
    int slots = 0;
    TRY(split_name(at, name, &slots));
    for (char *word; (word = strtok_r(NULL, " \t\r\f\v", &save));) {
        char *value = strchr(word, '=');
        if (value)
            *value++ = '\0';
        int n = 0;
        if (!value || (strcmp(word, "slots") && strcmp(word, "max_slots") && strcmp(word, "max-slots")))
            return status_fail(STATUS_UNSUPPORTED,
                               "%s: line %d: \"%s\" is not understood; a line is NAME [slots=N] [max_slots=N]", at->where,
                               at->line, word);
        TRY(read_count(at, word, value, &n));
        if (strcmp(word, "slots") == 0)
            slots = n;
    }
    return add_host(h, at, name, slots);
}

status hosts_parse(const char *where, const char *text, size_t size, hosts *out)
{
    hosts h = {0};
    place at = {.where = where};
    status st = STATUS_OK;
    for (size_t i = 0; i < size && st == STATUS_OK;) {
        const char *end = memchr(text + i, '\n', size - i);
        size_t n = end ? (size_t)(end - (text + i)) : size - i;
        char line[1024];
        at.line++;
        if (n >= sizeof line || memchr(text + i, '\0', n))
            st = status_fail(STATUS_BAD_INPUT, "%s: line %d is no line of a hostfile", where, at.line);
        else {
            memcpy(line, text + i, n);
            line[n] = '\0';
            st = parse_line(&at, line, &h);
        }
        i += n + 1;
    }
    if (st == STATUS_OK && h.n == 0)
        st = status_fail(STATUS_BAD_INPUT, "%s names no host", where);
    if (st != STATUS_OK) {
        hosts_clear(&h);
        return st;
    }
    *out = h;
    return STATUS_OK;
}

status hosts_read(const char *path, hosts *out)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    char *text = malloc(MAX_FILE + 1);
    status st = STATUS_OK;
    size_t size = text ? fread(text, 1, MAX_FILE + 1, f) : 0;
    if (!text)
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory to read it", path);
    else if (ferror(f))
        st = status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    else if (size > MAX_FILE)
        st = status_fail(STATUS_BAD_INPUT, "%s is longer than %d bytes: no hostfile", path, MAX_FILE);
    else
        st = hosts_parse(path, text, size, out);
    free(text);
    fclose(f);
    return st;
}

void hosts_clear(hosts *h)
{
    for (int i = 0; i < h->n; i++)
        free(h->entries[i].name);
    free(h->entries);
    *h = (hosts){0};
}

/* ---- ranks ---- */

static bool any_slots(const hosts *h)
{
    for (int i = 0; i < h->n; i++)
        if (h->entries[i].slots > 0)
            return true;
    return false;
}

void hosts_assign(hosts *h, int n_ranks)
{
    bool counted = any_slots(h);
    int left = n_ranks;
    for (int i = 0; i < h->n; i++) {
        int slots = !counted ? 0 : h->entries[i].slots > 0 ? h->entries[i].slots : 1;
        h->entries[i].n_ranks = slots < left ? slots : left;
        left -= h->entries[i].n_ranks;
    }
    for (int i = 0; i < h->n; i++) /* the first hosts take one more where it does not come out even */
        h->entries[i].n_ranks += left / h->n + (i < left % h->n);
}

int hosts_room(const hosts *h, int n_wanted)
{
    long long room = 0;
    for (int i = 0; i < h->n; i++)
        room += h->entries[i].n_ranks > h->entries[i].slots ? h->entries[i].n_ranks : h->entries[i].slots;
    return room < n_wanted ? (int)room : n_wanted;
}

void hosts_drop(hosts *h, int index)
{
    free(h->entries[index].name);
    memmove(h->entries + index, h->entries + index + 1, (size_t)(h->n - index - 1) * sizeof *h->entries);
    h->n--;
}

status hosts_write(const hosts *h, const char *path)
{
    FILE *f = fopen(path, "we");
    if (!f)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    for (int i = 0; i < h->n; i++)
        if (h->entries[i].n_ranks > 0)
            fprintf(f, "%s slots=%d\n", h->entries[i].name, h->entries[i].n_ranks);
    bool failed = ferror(f) != 0;
    if (fclose(f) != 0 || failed)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    return STATUS_OK;
}

/* ---- this machine ---- */

static bool is_own_address(const struct sockaddr *address)
{
    struct ifaddrs *all;
    if (getifaddrs(&all) != 0)
        return false;
    bool own = false;
    for (struct ifaddrs *i = all; i && !own; i = i->ifa_next) {
        if (!i->ifa_addr || i->ifa_addr->sa_family != address->sa_family)
            continue;
        if (address->sa_family == AF_INET)
            own = ((const struct sockaddr_in *)address)->sin_addr.s_addr ==
                  ((const struct sockaddr_in *)i->ifa_addr)->sin_addr.s_addr;
        else if (address->sa_family == AF_INET6)
            own = memcmp(&((const struct sockaddr_in6 *)address)->sin6_addr,
                         &((const struct sockaddr_in6 *)i->ifa_addr)->sin6_addr, sizeof(struct in6_addr)) == 0;
    }
    freeifaddrs(all);
    return own;
}

/* "node0" and "node0.cluster" are one machine, as mpirun sees it. */
static bool is_own_name(const char *name)
{
    char own[256] = "";
    gethostname(own, sizeof own - 1);
    size_t a = strcspn(name, "."), b = strcspn(own, ".");
    if (strcasecmp(name, own) == 0)
        return true;
    bool one_is_short = name[a] == '\0' || own[b] == '\0';
    return one_is_short && a == b && strncasecmp(name, own, a) == 0;
}

bool hosts_is_here(const char *name)
{
    const char *at = strchr(name, '@');
    if (at)
        name = at + 1;
    unsigned char octets[sizeof(struct in6_addr)];
    bool numeric = inet_pton(AF_INET, name, octets) == 1 || inet_pton(AF_INET6, name, octets) == 1;
    if (strcasecmp(name, "localhost") == 0 || (!numeric && is_own_name(name)))
        return true;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    if (getaddrinfo(name, NULL, &hints, &found) != 0)
        return false;
    bool here = false;
    for (struct addrinfo *i = found; i && !here; i = i->ai_next)
        here = (i->ai_family == AF_INET && (ntohl(((struct sockaddr_in *)i->ai_addr)->sin_addr.s_addr) >> 24) == 127) ||
               is_own_address(i->ai_addr);
    freeaddrinfo(found);
    return here;
}

void hosts_find_here(hosts *h)
{
    for (int i = 0; i < h->n; i++)
        h->entries[i].here = hosts_is_here(h->entries[i].name);
}
