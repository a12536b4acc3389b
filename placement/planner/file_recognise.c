/* file_recognise.c - what a file of ours is: a safetensors header begins with a length and '{', JSON with '{'. */
#include "placement/planner/formats.h"

#include "proto/json.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MAX_JSON ((size_t)1 << 30)

static status recognise_json(const char *path, const cJSON *tree, file_kind *out)
{
    const cJSON *format = json_find(tree, "format");
    if (cJSON_IsString(format) && strcmp(format->valuestring, "convoke-plan") == 0)
        *out = FILE_PLAN;
    else if (cJSON_IsArray(json_find(tree, "ranks")) && json_find(tree, "row_bytes"))
        *out = FILE_TOPOLOGY;
    else
        return status_fail(STATUS_BAD_INPUT,
                           "%s: neither a plan (\"format\": \"convoke-plan\") nor a topology (\"ranks\", "
                           "\"row_bytes\"); files of other engines are read by import",
                           path);
    return STATUS_OK;
}

static status recognise_tensors(const char *path, const safetensors *file, file_kind *out)
{
    const char *format = safetensors_metadata(file, "format");
    bool routing = format && strcmp(format, "convoke-routing") == 0;
    if (routing && safetensors_find(file, "tokens_per_expert"))
        *out = FILE_STATS;
    else if (routing && safetensors_find(file, "experts"))
        *out = FILE_TRACE;
    else
        return status_fail(STATUS_BAD_INPUT, "%s: neither a routing trace nor statistics: metadata format is \"%.40s\"", path,
                           format ? format : "");
    return STATUS_OK;
}

/* The length in front of a safetensors header is below 100 MB, so its high bytes are zero; JSON has none. */
static status looks_like_tensors(const char *path, bool *out)
{
    unsigned char head[9] = {0};
    FILE *stream = fopen(path, "re");
    if (!stream)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    size_t n = fread(head, 1, sizeof head, stream);
    fclose(stream);
    *out = n > 4 && head[4] == 0;
    return STATUS_OK;
}

status file_recognise(const char *path, file_kind *out)
{
    bool tensors = false;
    TRY(looks_like_tensors(path, &tensors));
    safetensors *file;
    cJSON *tree;
    if (tensors) {
        TRY(safetensors_open(path, &file));
        status st = recognise_tensors(path, file, out);
        safetensors_close(file);
        return st;
    }
    TRY(json_read_file(path, MAX_JSON, &tree));
    status st = recognise_json(path, tree, out);
    cJSON_Delete(tree);
    return st;
}
