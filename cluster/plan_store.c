#include "cluster/plan_store.h"

#include "proto/bytes.h"
#include "proto/file_replace.h"
#include "proto/hash.h"
#include "proto/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_PLAN_BYTES = 48 << 20, MAX_CONFIG_BYTES = 1 << 20 };

bool plan_store_usual_dir(char dir[4096])
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    if (state && *state == '/')
        return snprintf(dir, 4096, "%s/convoke/plans", state) < 4096;
    return home && *home == '/' && snprintf(dir, 4096, "%s/.local/state/convoke/plans", home) < 4096;
}

/* ---- files ---- */

/* Also from a pipe, whose size nobody knows. */
static status read_file(const char *path, size_t most, char **out, size_t *size)
{
    bytes_writer text = {0};
    FILE *f = fopen(path, "re");
    if (!f)
        return status_fail(STATUS_IO, "%s: %s", path, strerror(errno));
    char part[16 << 10];
    for (size_t n; text.size <= most && (n = fread(part, 1, sizeof part, f)) > 0;)
        bytes_put(&text, part, n);
    bool failed = ferror(f) != 0;
    fclose(f);
    size_t n = text.size;
    bytes_put(&text, "", 1);
    status st = failed        ? status_fail(STATUS_IO, "%s: cannot be read", path)
                : n > most    ? status_fail(STATUS_UNSUPPORTED, "%s: more than %zu MB are not taken", path, most >> 20)
                : text.failed ? status_fail(STATUS_NO_MEMORY, "%s: no memory to read it", path)
                              : STATUS_OK;
    if (st != STATUS_OK) {
        bytes_clear(&text);
        return st;
    }
    *out = (char *)text.data;
    *size = n;
    return STATUS_OK;
}

status plan_store_read(const char *path, char **json, size_t *size)
{
    return read_file(path, MAX_PLAN_BYTES, json, size);
}

status plan_store_path(const char *dir, const char *model_dir, int n_ranks, int n_nodes, char path[4096])
{
    char config[4200], *text = NULL, *real = realpath(model_dir, NULL);
    size_t size;
    if (!real)
        return status_fail(STATUS_IO, "%s: %s", model_dir, strerror(errno));
    snprintf(config, sizeof config, "%s/config.json", real);
    status st = read_file(config, MAX_CONFIG_BYTES, &text, &size);
    if (st == STATUS_OK) {
        const char *slash = strrchr(real, '/');
        int n = snprintf(path, 4096, "%s/%.128s-%016llx-%dx%d.json", dir, slash ? slash + 1 : real,
                         (unsigned long long)hash_bytes(HASH_START, text, size), n_ranks, n_nodes);
        if (n >= 4096)
            st = status_fail(STATUS_BAD_INPUT, "%.100s...: the path is too long", dir);
    }
    free(text);
    free(real);
    return st;
}

/* Every folder above `path` that is not there. */
static status make_folders(const char *path)
{
    char folder[4096];
    snprintf(folder, sizeof folder, "%s", path);
    for (char *slash = strchr(folder + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdir(folder, 0755) != 0 && errno != EEXIST)
            return status_fail(STATUS_IO, "%s: %s", folder, strerror(errno));
        *slash = '/';
    }
    return STATUS_OK;
}

status plan_store_write(const char *path, const char *json, size_t size)
{
    char part[4200];
    TRY(make_folders(path));
    snprintf(part, sizeof part, "%s.part-%ld", path, (long)getpid());
    FILE *f = fopen(part, "we");
    if (!f)
        return status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    bool fine = fwrite(json, 1, size, f) == size;
    fine &= fclose(f) == 0;
    if (fine && file_replace(part, path) == 0)
        return STATUS_OK;
    status st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
    unlink(part);
    return st;
}

/* ---- counts ---- */

static bool take_counts(const cJSON *layers, const plan *p, uint64_t *out)
{
    const cJSON *layer, *count;
    if (!cJSON_IsArray(layers) || cJSON_GetArraySize(layers) != p->n_layers)
        return false;
    cJSON_ArrayForEach(layer, layers)
    {
        if (!cJSON_IsArray(layer) || cJSON_GetArraySize(layer) != p->n_experts)
            return false;
        cJSON_ArrayForEach(count, layer)
        {
            if (!cJSON_IsNumber(count) || !(count->valuedouble >= 0 && count->valuedouble < 0x1p63))
                return false;
            *out++ = (uint64_t)count->valuedouble;
        }
    }
    return true;
}

uint64_t *plan_store_counts(const char *json, size_t size, const plan *p)
{
    cJSON *file = NULL;
    uint64_t *counts = NULL;
    if (json_parse("plan", json, size, &file) == STATUS_OK)
        counts = malloc((size_t)p->n_layers * (size_t)p->n_experts * sizeof *counts);
    if (counts && !take_counts(json_find(file, "tokens_per_expert"), p, counts)) {
        free(counts);
        counts = NULL;
    }
    cJSON_Delete(file);
    return counts;
}
