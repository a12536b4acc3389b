/* checkpoint_files.c - one file, or shards with their index, which must tell the same. */
#include "worker/checkpoint_parts.h"

#include "proto/json.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define INDEX_BYTES_MAX ((size_t)256 << 20)

static status add_shard(checkpoint *ck, const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", ck->dir, name);
    shard *grown = realloc(ck->shards, ((size_t)ck->n_shards + 1) * sizeof *grown);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
    ck->shards = grown;
    shard *s = &grown[ck->n_shards];
    *s = (shard){0};
    TRY(safetensors_open(path, &s->file));
    ck->n_shards++;
    s->use = calloc((size_t)safetensors_count(s->file) + 1, 1);
    return s->use ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
}

typedef struct {
    const char *tensor, *file;
    int shard;
} index_entry;

static int by_file(const void *left, const void *right)
{
    return strcmp(((const index_entry *)left)->file, ((const index_entry *)right)->file);
}

static int by_tensor(const void *left, const void *right)
{
    return strcmp(((const index_entry *)left)->tensor, ((const index_entry *)right)->tensor);
}

static status read_index_entries(const cJSON *map, const char *path, index_entry **out, int *count)
{
    int n = cJSON_GetArraySize(map);
    index_entry *entries = calloc((size_t)n + 1, sizeof *entries);
    if (!entries)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for its %d entries", path, n);
    *out = entries;
    *count = n;
    const cJSON *item;
    int i = 0;
    cJSON_ArrayForEach(item, map)
    {
        const char *file = cJSON_IsString(item) ? item->valuestring : "";
        /* A shard lies beside its index: anything that could lead elsewhere is no shard's name. */
        if (!*file || strchr(file, '/') || !strcmp(file, ".") || !strcmp(file, ".."))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s: \"%.100s\" is not the name of a file in this folder", path,
                               item->string, file);
        entries[i++] = (index_entry){item->string, file, -1};
    }
    return STATUS_OK;
}

static status open_listed_shards(checkpoint *ck, const char *path, index_entry *entries, int n)
{
    qsort(entries, (size_t)n, sizeof *entries, by_file);
    for (int i = 0; i < n; i++) {
        if (i == 0 || strcmp(entries[i].file, entries[i - 1].file)) {
            char shard_path[PATH_MAX];
            snprintf(shard_path, sizeof shard_path, "%s/%s", ck->dir, entries[i].file);
            if (access(shard_path, F_OK) != 0)
                return status_fail(STATUS_IO, "%s: shard %.200s, which it names, is missing", path, entries[i].file);
            TRY(add_shard(ck, entries[i].file));
        }
        entries[i].shard = ck->n_shards - 1;
    }
    return STATUS_OK;
}

static status report_unlisted(const checkpoint *ck, const char *path, const index_entry *entries, int n)
{
    for (int s = 0; s < ck->n_shards; s++)
        for (int i = 0; i < safetensors_count(ck->shards[s].file); i++) {
            index_entry key = {.tensor = safetensors_at(ck->shards[s].file, i)->name};
            const index_entry *found = bsearch(&key, entries, (size_t)n, sizeof *entries, by_tensor);
            if (!found || found->shard != s)
                return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s in %.200s is not listed", path, key.tensor,
                                   safetensors_path(ck->shards[s].file));
        }
    return STATUS_OK;
}

/* The index and the shards must tell the same: each listed tensor in its shard, and none besides. */
static status check_index(const checkpoint *ck, const char *path, index_entry *entries, int n)
{
    qsort(entries, (size_t)n, sizeof *entries, by_tensor);
    long long stored = 0;
    for (int s = 0; s < ck->n_shards; s++)
        stored += safetensors_count(ck->shards[s].file);
    for (int i = 0; i < n; i++) {
        if (i && !strcmp(entries[i].tensor, entries[i - 1].tensor))
            return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is listed twice", path, entries[i].tensor);
        if (safetensors_find(ck->shards[entries[i].shard].file, entries[i].tensor))
            continue;
        for (int s = 0; s < ck->n_shards; s++)
            if (safetensors_find(ck->shards[s].file, entries[i].tensor))
                return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is said to be in %.100s, but it is in %.300s", path,
                                   entries[i].tensor, entries[i].file, safetensors_path(ck->shards[s].file));
        return status_fail(STATUS_BAD_INPUT, "%s: tensor %.200s is not in %.100s, which is said to hold it", path,
                           entries[i].tensor, entries[i].file);
    }
    return stored == n ? STATUS_OK : report_unlisted(ck, path, entries, n);
}

static status open_sharded(checkpoint *ck, const char *path)
{
    cJSON *json = NULL;
    TRY(json_read_file(path, INDEX_BYTES_MAX, &json));
    index_entry *entries = NULL;
    int n = 0;
    const cJSON *map = cJSON_IsObject(json) ? json_find(json, "weight_map") : NULL;
    status st =
        cJSON_IsObject(map) ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: weight_map is missing or not an object", path);
    if (st == STATUS_OK)
        st = read_index_entries(map, path, &entries, &n);
    if (st == STATUS_OK)
        st = open_listed_shards(ck, path, entries, n);
    if (st == STATUS_OK)
        st = check_index(ck, path, entries, n);
    free(entries);
    cJSON_Delete(json);
    return st;
}

status checkpoint_open_files(checkpoint *ck)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/model.safetensors", ck->dir);
    if (access(path, F_OK) == 0)
        return add_shard(ck, "model.safetensors");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", ck->dir);
    if (access(path, F_OK) == 0)
        return open_sharded(ck, path);
    return status_fail(STATUS_IO, "%s: holds neither model.safetensors nor model.safetensors.index.json", ck->dir);
}

int checkpoint_find(checkpoint *ck, const char *name, const tensor_view **view)
{
    for (int i = 0; i < ck->n_shards; i++) {
        int s = (ck->last_shard + i) % ck->n_shards;
        *view = safetensors_find(ck->shards[s].file, name);
        if (*view) {
            ck->last_shard = s;
            return s;
        }
    }
    return -1;
}
