#include "proto/json.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static status read_whole(const char *path, size_t max_bytes, char **text, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    status st = STATUS_OK;
    long long end = -1;
    if (fseek(file, 0, SEEK_END) == 0)
        end = ftell(file);
    rewind(file);
    if (end < 0 || (unsigned long long)end > max_bytes) {
        st = end < 0 ? status_fail(STATUS_IO, "%s: cannot be read (%s)", path, strerror(errno))
                     : status_fail(STATUS_BAD_INPUT, "%s: %lld bytes are more than the %zu a file of this kind may have", path,
                                   end, max_bytes);
        goto out;
    }
    char *buffer = malloc((size_t)end + 1);
    if (!buffer) {
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory for its %lld bytes", path, end);
        goto out;
    }
    size_t n = fread(buffer, 1, (size_t)end, file);
    if (n != (size_t)end) {
        free(buffer);
        st = status_fail(STATUS_IO, "%s: ended after %zu of %lld bytes", path, n, end);
        goto out;
    }
    buffer[n] = '\0';
    *text = buffer;
    *size = n;
out:
    fclose(file);
    return st;
}

status json_parse(const char *where, const char *text, size_t size, cJSON **out)
{
    const char *end = NULL;
    cJSON *tree = cJSON_ParseWithLengthOpts(text, size, &end, 0);
    if (!tree)
        return status_fail(STATUS_BAD_INPUT, "%s: not JSON, near byte %td", where, end ? end - text : (ptrdiff_t)0);
    for (; end < text + size && *end; end++)
        if (!strchr(" \t\r\n", *end)) {
            cJSON_Delete(tree);
            return status_fail(STATUS_BAD_INPUT, "%s: something stands behind the JSON value, at byte %td", where, end - text);
        }
    *out = tree;
    return STATUS_OK;
}

status json_read_file(const char *path, size_t max_bytes, cJSON **out)
{
    char *text = NULL;
    size_t size = 0;
    TRY(read_whole(path, max_bytes, &text, &size));
    status st = json_parse(path, text, size, out);
    free(text);
    return st;
}

const cJSON *json_find(const cJSON *object, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static status whole_number(const cJSON *item, const char *where, const char *name, int64_t min, int64_t max, int64_t *out)
{
    if (!cJSON_IsNumber(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not a number", where, name);
    double v = item->valuedouble;
    if (!(fabs(v) <= 9007199254740992.0) || v != floor(v))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is %g, not a whole number", where, name, v);
    if (v < (double)min || v > (double)max)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is %.0f, outside %lld to %lld", where, name, v, (long long)min,
                           (long long)max);
    *out = (int64_t)v;
    return STATUS_OK;
}

status json_get_int(const cJSON *object, const char *where, const char *key, int64_t min, int64_t max, int64_t *out)
{
    const cJSON *item = json_find(object, key);
    if (!item)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, key);
    return whole_number(item, where, key, min, max, out);
}

status json_get_int_or(const cJSON *object, const char *where, const char *key, int64_t min, int64_t max, int64_t fallback,
                       int64_t *out)
{
    const cJSON *item = json_find(object, key);
    if (!item) {
        *out = fallback;
        return STATUS_OK;
    }
    return whole_number(item, where, key, min, max, out);
}

status json_get_double_or(const cJSON *object, const char *where, const char *key, double fallback, double *out)
{
    const cJSON *item = json_find(object, key);
    if (item && !cJSON_IsNumber(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not a number", where, key);
    *out = item ? item->valuedouble : fallback;
    return STATUS_OK;
}

status json_get_bool_or(const cJSON *object, const char *where, const char *key, bool fallback, bool *out)
{
    const cJSON *item = json_find(object, key);
    if (item && !cJSON_IsBool(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is neither true nor false", where, key);
    *out = item ? cJSON_IsTrue(item) : fallback;
    return STATUS_OK;
}

status json_get_string(const cJSON *object, const char *where, const char *key, const char **out)
{
    const cJSON *item = json_find(object, key);
    if (!item)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, key);
    if (!cJSON_IsString(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not a string", where, key);
    *out = item->valuestring;
    return STATUS_OK;
}

status json_get_array(const cJSON *object, const char *where, const char *key, const cJSON **out)
{
    const cJSON *item = json_find(object, key);
    if (!item)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, key);
    if (!cJSON_IsArray(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not a list", where, key);
    *out = item;
    return STATUS_OK;
}

status json_item_int(const cJSON *item, const char *where, int index, int64_t min, int64_t max, int64_t *out)
{
    char name[32];
    snprintf(name, sizeof name, "item %d", index);
    return whole_number(item, where, name, min, max, out);
}

void json_put_number(cJSON *object, const char *key, double value)
{
    cJSON_AddItemToObject(object, key, isfinite(value) ? cJSON_CreateNumber(value) : cJSON_CreateNull());
}
