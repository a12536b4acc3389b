#include "tests/support.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char *join(const char *variable, const char *middle, const char *name)
{
    static char buffers[4][4096];
    static int next;
    const char *root = getenv(variable);
    char *out = buffers[next++ & 3];
    snprintf(out, sizeof buffers[0], "%s/%s%s", root ? root : ".", middle, name);
    return out;
}

const char *support_data(const char *name)
{
    return join("CONVOKE_SOURCE_DIR", "tests/data/", name);
}

const char *support_source(const char *name)
{
    return join("CONVOKE_SOURCE_DIR", "", name);
}

const char *support_binary(const char *name)
{
    return join("CONVOKE_BINARY_DIR", "", name);
}

uint64_t support_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int support_below(uint64_t *state, int n)
{
    return (int)(support_random(state) % (uint64_t)n);
}

float support_gauss(uint64_t *state)
{
    float sum = -6;
    for (int i = 0; i < 12; i++)
        sum += (float)(support_random(state) >> 40) / 16777216.0f;
    return sum;
}

const char *support_scratch(void)
{
    static char path[4096];
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/convoke-test-XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(path);
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st, (void)kind, (void)at;
    return remove(path);
}

void support_remove(const char *folder)
{
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}
