#include "cluster/model_settings.h"

#include "proto/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_JSON_BYTES = 1 << 20, PATH_BYTES = 4096 };

static status path_of(const char *dir, const char *file, char path[PATH_BYTES])
{
    int n = snprintf(path, PATH_BYTES, "%s/%s", dir, file);
    return n < PATH_BYTES ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%.100s...: the path is too long", dir);
}

static status read_wish(const cJSON *json, const char *key, double low, double high, float *value)
{
    double wish;
    TRY(json_get_double_or(json, "generation_config.json", key, (double)*value, &wish));
    if (wish < low || wish > high)
        return status_fail(STATUS_BAD_INPUT, "generation_config.json: %s: %g is not in [%g, %g]", key, wish, low, high);
    *value = (float)wish;
    return STATUS_OK;
}

static status read_defaults(const cJSON *json, sampling_defaults *d)
{
    TRY(read_wish(json, "temperature", 0, 100, &d->temperature));
    TRY(read_wish(json, "top_p", 0, 1, &d->top_p));
    TRY(read_wish(json, "min_p", 0, 1, &d->min_p));
    TRY(read_wish(json, "repetition_penalty", 0, 1000, &d->repetition_penalty));
    int64_t top_k;
    TRY(json_get_int_or(json, "generation_config.json", "top_k", -1, INT32_MAX, 0, &top_k));
    d->top_k = top_k > 0 ? (int)top_k : 0;
    return STATUS_OK;
}

/* The folder's own name, also for "." and for paths that end in a slash. */
static status read_name(const char *dir, char name[256])
{
    struct stat facts;
    char *real = realpath(dir, NULL);
    if (!real || stat(real, &facts) != 0 || !S_ISDIR(facts.st_mode)) {
        free(real);
        return status_fail(STATUS_IO, "%s: there is no such model folder", dir);
    }
    const char *slash = strrchr(real, '/');
    snprintf(name, 256, "%.255s", slash && slash[1] ? slash + 1 : real);
    free(real);
    return STATUS_OK;
}

/* A file that a model may lack; one that is there and cannot be reached is not lacking. */
static status has_file(const char *path, bool *has)
{
    *has = access(path, F_OK) == 0;
    if (*has || errno == ENOENT)
        return STATUS_OK;
    return status_fail(STATUS_IO, "%s: cannot be read (%s)", path, strerror(errno));
}

status model_settings_read(const char *dir, model_settings *out)
{
    char path[PATH_BYTES];
    *out = (model_settings){.defaults = {.temperature = 1}};
    TRY(read_name(dir, out->name));
    TRY(path_of(dir, "tokenizer.json", path));
    TRY(has_file(path, &out->has_tokenizer));
    TRY(path_of(dir, "generation_config.json", path));
    bool has_defaults;
    TRY(has_file(path, &has_defaults));
    if (!has_defaults)
        return STATUS_OK;
    cJSON *json;
    TRY(json_read_file(path, MAX_JSON_BYTES, &json));
    status st = read_defaults(json, &out->defaults);
    cJSON_Delete(json);
    return st;
}
