#include "placement/planner/array_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define JSON_MAX_BYTES ((size_t)4 << 30)

struct array_file {
    char *path;
    npz_file *npz;       /* one of these three is there */
    number_array single; /* of an .npy */
    bool is_npy;
    cJSON *tree;
};

static status refuse_pickle(const char *path)
{
    return status_fail(
        STATUS_UNSUPPORTED,
        "%s: a torch pickle, which only Python can read safely; save it from there as JSON (tensors by tolist()) or "
        "with numpy.savez",
        path);
}

static status open_npz(array_file *f)
{
    TRY(npz_open(f->path, &f->npz));
    /* what torch.save() writes is a zip too */
    if (npz_has(f->npz, "archive/data.pkl") || npz_has(f->npz, "data.pkl") ||
        (strlen(f->path) > 3 && strcmp(f->path + strlen(f->path) - 3, ".pt") == 0))
        return refuse_pickle(f->path);
    return STATUS_OK;
}

static status open_any(array_file *f)
{
    unsigned char head[6] = {0};
    struct stat info;
    FILE *stream = fopen(f->path, "re");
    if (!stream)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", f->path, strerror(errno));
    bool plain = fstat(fileno(stream), &info) == 0 && S_ISREG(info.st_mode);
    size_t n = plain ? fread(head, 1, sizeof head, stream) : 0;
    fclose(stream);
    if (!plain)
        return status_fail(STATUS_BAD_INPUT, "%s: not a plain file", f->path);
    if (n >= 4 && memcmp(head, "PK\3\4", 4) == 0)
        return open_npz(f);
    if (n >= 6 && memcmp(head, "\x93NUMPY", 6) == 0) {
        f->is_npy = true;
        return number_array_read_npy(f->path, &f->single);
    }
    if (n >= 2 && head[0] == 0x80 && head[1] >= 2 && head[1] <= 5)
        return refuse_pickle(f->path);
    TRY(json_read_file(f->path, JSON_MAX_BYTES, &f->tree));
    if (!cJSON_IsObject(f->tree))
        return status_fail(STATUS_BAD_INPUT, "%s: the file holds no JSON object", f->path);
    return STATUS_OK;
}

status array_file_open(const char *path, array_file **out)
{
    array_file *f = calloc(1, sizeof *f);
    if (f)
        f->path = strdup(path);
    if (!f || !f->path) {
        free(f);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to open it", path);
    }
    status st = open_any(f);
    if (st == STATUS_OK)
        *out = f;
    else
        array_file_close(f);
    return st;
}

void array_file_close(array_file *f)
{
    if (!f)
        return;
    npz_close(f->npz);
    number_array_clear(&f->single);
    cJSON_Delete(f->tree);
    free(f->path);
    free(f);
}

const char *array_file_path(const array_file *f)
{
    return f->path;
}

const cJSON *array_file_json(const array_file *f)
{
    return f->tree;
}

bool array_file_has(const array_file *f, const char *name)
{
    return f->is_npy || (f->npz ? npz_has(f->npz, name) : json_find(f->tree, name) != NULL);
}

static status copy_single(const array_file *f, number_array *out)
{
    size_t n_bytes = (size_t)f->single.n * (size_t)f->single.item_bytes;
    void *data = malloc(n_bytes + 1);
    if (!data)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %zu bytes", f->path, n_bytes);
    *out = f->single;
    out->data = memcpy(data, f->single.data, n_bytes);
    return STATUS_OK;
}

status array_file_get(const array_file *f, const char *name, int min_dims, int max_dims, number_array *out)
{
    char where[1024];
    snprintf(where, sizeof where, "%.700s: %.200s", f->path, name);
    number_array a;
    const cJSON *lists = f->tree ? json_find(f->tree, name) : NULL;
    if (f->is_npy)
        TRY(copy_single(f, &a));
    else if (f->npz)
        TRY(npz_get(f->npz, f->path, name, &a));
    else if (!lists)
        return status_fail(STATUS_BAD_INPUT, "%.700s: %.200s is missing", f->path, name);
    else
        TRY(number_array_from_json(where, lists, &a));
    if (a.n_dims >= min_dims && a.n_dims <= max_dims) {
        *out = a;
        return STATUS_OK;
    }
    int n_dims = a.n_dims;
    number_array_clear(&a);
    if (min_dims == max_dims)
        return status_fail(STATUS_BAD_INPUT, "%s has %d dimensions, not %d", where, n_dims, min_dims);
    return status_fail(STATUS_BAD_INPUT, "%s has %d dimensions, not %d to %d", where, n_dims, min_dims, max_dims);
}
