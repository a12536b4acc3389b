/* safetensors.c - the reader.
 *
 *     | n: u64 little-endian | n bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} | tensor bytes |
 *
 * The offsets count from the end of the header. As the format demands, the tensors must cover everything behind the header
 * exactly once: sorted by offset, each begins where the one before ended. One comparison per tensor then refuses overlaps,
 * holes, a cut file and bytes behind the end. */
#include "proto/safetensors.h"
#include "proto/hash.h"

#include "proto/json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_MAX ((size_t)100 << 20) /* the format's own limit */
#define OFFSET_MAX 9007199254740991    /* 2^53 - 1: above it a double is no longer exact */

struct safetensors {
    char *path;
    const unsigned char *bytes; /* the whole file; borrowed when opened from memory */
    size_t size;
    bool mapped;
    cJSON *header;         /* owns the names */
    const cJSON *metadata; /* inside header; NULL: none */
    tensor_view *tensors;  /* by offset */
    int count;
    int *slots; /* open addressing by name: index + 1, 0 is empty */
    size_t slot_mask;
};

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [DTYPE_BOOL] = {"BOOL", 1},       [DTYPE_U8] = {"U8", 1},   [DTYPE_I8] = {"I8", 1},   [DTYPE_F8_E4M3] = {"F8_E4M3", 1},
    [DTYPE_F8_E5M2] = {"F8_E5M2", 1}, [DTYPE_I16] = {"I16", 2}, [DTYPE_U16] = {"U16", 2}, [DTYPE_F16] = {"F16", 2},
    [DTYPE_BF16] = {"BF16", 2},       [DTYPE_I32] = {"I32", 4}, [DTYPE_U32] = {"U32", 4}, [DTYPE_F32] = {"F32", 4},
    [DTYPE_I64] = {"I64", 8},         [DTYPE_U64] = {"U64", 8}, [DTYPE_F64] = {"F64", 8},
};

const char *tensor_dtype_name(tensor_dtype dtype)
{
    return dtypes[dtype].name;
}

size_t tensor_dtype_size(tensor_dtype dtype)
{
    return dtypes[dtype].size;
}

/* ---- one tensor's entry ---- */

static status parse_dtype(const char *where, const cJSON *item, tensor_dtype *out)
{
    if (!cJSON_IsString(item))
        return status_fail(STATUS_BAD_INPUT, "%s: dtype is not a string", where);
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(item->valuestring, dtypes[i].name)) {
            *out = (tensor_dtype)i;
            return STATUS_OK;
        }
    return status_fail(STATUS_UNSUPPORTED, "%s: dtype %.32s is not known here", where, item->valuestring);
}

static status parse_shape(const char *where, const cJSON *item, tensor_view *tensor)
{
    if (!cJSON_IsArray(item))
        return status_fail(STATUS_BAD_INPUT, "%s: shape is not a list", where);
    size_t n_bytes = tensor_dtype_size(tensor->dtype);
    const cJSON *dim;
    cJSON_ArrayForEach(dim, item)
    {
        if (tensor->n_dims == TENSOR_MAX_DIMS)
            return status_fail(STATUS_UNSUPPORTED, "%s: more than %d dimensions", where, TENSOR_MAX_DIMS);
        int64_t n = 0;
        TRY(json_item_int(dim, where, tensor->n_dims, 0, OFFSET_MAX, &n));
        tensor->shape[tensor->n_dims++] = n;
        if (__builtin_mul_overflow(n_bytes, (size_t)n, &n_bytes) || n_bytes > (size_t)OFFSET_MAX)
            return status_fail(STATUS_BAD_INPUT, "%s: a shape of more than 2^53 bytes", where);
    }
    tensor->n_bytes = n_bytes;
    return STATUS_OK;
}

/* begin ends up in tensor->data as an offset from `base`; only the end is checked here, the order once all are known. */
static status parse_offsets(const char *where, const cJSON *item, const unsigned char *base, size_t base_size,
                            tensor_view *tensor)
{
    if (!cJSON_IsArray(item) || cJSON_GetArraySize(item) != 2)
        return status_fail(STATUS_BAD_INPUT, "%s: data_offsets is not a list of two numbers", where);
    int64_t begin = 0, end = 0;
    TRY(json_item_int(item->child, where, 0, 0, OFFSET_MAX, &begin));
    TRY(json_item_int(item->child->next, where, 1, 0, OFFSET_MAX, &end));
    if (begin > end)
        return status_fail(STATUS_BAD_INPUT, "%s: its bytes begin at %lld, behind their end at %lld", where, (long long)begin,
                           (long long)end);
    if ((size_t)end > base_size)
        return status_fail(STATUS_BAD_INPUT, "%s: its bytes end at %lld, but the file holds %zu behind the header (cut short?)",
                           where, (long long)end, base_size);
    if ((size_t)(end - begin) != tensor->n_bytes)
        return status_fail(STATUS_BAD_INPUT, "%s: %lld bytes, but shape and dtype %s make %zu", where, (long long)(end - begin),
                           tensor_dtype_name(tensor->dtype), tensor->n_bytes);
    tensor->data = base + begin;
    return STATUS_OK;
}

/* The named fields of an entry, each at most once; unknown ones are passed over, as the format's own readers do. */
static status find_fields(const char *where, const cJSON *entry, const cJSON *fields[3])
{
    static const char *const names[3] = {"dtype", "shape", "data_offsets"};
    if (!cJSON_IsObject(entry))
        return status_fail(STATUS_BAD_INPUT, "%s: its header entry is not an object", where);
    const cJSON *item;
    cJSON_ArrayForEach(item, entry) for (int i = 0; i < 3; i++)
    {
        if (strcmp(item->string, names[i]))
            continue;
        if (fields[i])
            return status_fail(STATUS_BAD_INPUT, "%s: %s is given twice", where, names[i]);
        fields[i] = item;
    }
    for (int i = 0; i < 3; i++)
        if (!fields[i])
            return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, names[i]);
    return STATUS_OK;
}

static status parse_tensor(const safetensors *file, const cJSON *entry, const unsigned char *base, tensor_view *out)
{
    char where[640];
    snprintf(where, sizeof where, "%.300s: tensor %.300s", file->path, entry->string);
    /* A line break in a name would tear every later sentence and log line about it. */
    for (const unsigned char *c = (const unsigned char *)entry->string; *c; c++)
        if (*c < 0x20 || *c == 0x7f)
            return status_fail(STATUS_BAD_INPUT, "%.300s: a tensor's name has a control character in it", file->path);
    const cJSON *fields[3] = {NULL};
    TRY(find_fields(where, entry, fields));
    *out = (tensor_view){.name = entry->string};
    TRY(parse_dtype(where, fields[0], &out->dtype));
    TRY(parse_shape(where, fields[1], out));
    return parse_offsets(where, fields[2], base, file->size - (size_t)(base - file->bytes), out);
}

/* ---- the header ---- */

static bool is_utf8(const unsigned char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        unsigned char c = s[i++];
        if (c == 0)
            return false;
        if (c < 0x80)
            continue;
        int more = c >= 0xc2 && c <= 0xdf ? 1 : (c & 0xf0) == 0xe0 ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : 0;
        if (!more || n - i < (size_t)more)
            return false;
        /* no overlong forms, no surrogates, nothing above U+10FFFF */
        if ((c == 0xe0 && s[i] < 0xa0) || (c == 0xed && s[i] > 0x9f) || (c == 0xf0 && s[i] < 0x90) || (c == 0xf4 && s[i] > 0x8f))
            return false;
        for (; more; more--)
            if ((s[i++] & 0xc0) != 0x80)
                return false;
    }
    return true;
}

static size_t name_hash(const char *name)
{
    uint64_t h = hash_bytes(HASH_START, name, strlen(name));
    return (size_t)(h ^ (h >> 29));
}

/* The slot that holds `name`, or the empty one where it would go. */
static size_t find_slot(const safetensors *file, const char *name)
{
    size_t at = name_hash(name) & file->slot_mask;
    while (file->slots[at] && strcmp(file->tensors[file->slots[at] - 1].name, name))
        at = (at + 1) & file->slot_mask;
    return at;
}

static status build_index(safetensors *file)
{
    size_t n_slots = 16;
    while (n_slots < 2 * (size_t)file->count)
        n_slots *= 2;
    file->slots = calloc(n_slots, sizeof *file->slots);
    if (!file->slots)
        return status_fail(STATUS_NO_MEMORY, "%.300s: no memory for the index of its tensors", file->path);
    file->slot_mask = n_slots - 1;
    for (int i = 0; i < file->count; i++) {
        size_t at = find_slot(file, file->tensors[i].name);
        if (file->slots[at])
            return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s is listed twice", file->path, file->tensors[i].name);
        file->slots[at] = i + 1;
    }
    return STATUS_OK;
}

static int by_offset(const void *left, const void *right)
{
    const tensor_view *a = left, *b = right;
    if (a->data != b->data)
        return (const char *)a->data < (const char *)b->data ? -1 : 1;
    return (a->n_bytes > b->n_bytes) - (a->n_bytes < b->n_bytes); /* an empty tensor stands before the one it touches */
}

static status check_cover(const safetensors *file, const unsigned char *base)
{
    const unsigned char *next = base;
    for (int i = 0; i < file->count; i++) {
        const tensor_view *t = &file->tensors[i];
        const unsigned char *data = t->data;
        if (data != next)
            return status_fail(STATUS_BAD_INPUT, "%.300s: tensor %.300s begins at byte %td, but the one before it ends at %td",
                               file->path, t->name, data - base, next - base);
        next = data + t->n_bytes;
    }
    size_t behind = (size_t)(file->bytes + file->size - next);
    if (behind)
        return status_fail(STATUS_BAD_INPUT, "%.300s: %zu bytes behind the last tensor belong to none", file->path, behind);
    return STATUS_OK;
}

static status check_metadata(safetensors *file, const cJSON *metadata)
{
    if (file->metadata)
        return status_fail(STATUS_BAD_INPUT, "%.300s: __metadata__ is given twice", file->path);
    if (!cJSON_IsObject(metadata))
        return status_fail(STATUS_BAD_INPUT, "%.300s: __metadata__ is not an object", file->path);
    const cJSON *item;
    cJSON_ArrayForEach(item, metadata) if (!cJSON_IsString(item)) return status_fail(
        STATUS_BAD_INPUT, "%.300s: __metadata__: %.100s is not a string", file->path, item->string);
    file->metadata = metadata;
    return STATUS_OK;
}

static status parse_entries(safetensors *file, const unsigned char *base)
{
    int n = cJSON_GetArraySize(file->header);
    file->tensors = calloc((size_t)n + 1, sizeof *file->tensors);
    if (!file->tensors)
        return status_fail(STATUS_NO_MEMORY, "%.300s: no memory for a list of %d tensors", file->path, n);
    const cJSON *entry;
    cJSON_ArrayForEach(entry, file->header)
    {
        if (!strcmp(entry->string, "__metadata__"))
            TRY(check_metadata(file, entry));
        else
            TRY(parse_tensor(file, entry, base, &file->tensors[file->count++]));
    }
    qsort(file->tensors, (size_t)file->count, sizeof *file->tensors, by_offset);
    TRY(build_index(file));
    return check_cover(file, base);
}

static status parse_file(safetensors *file)
{
    if (file->size < 8)
        return status_fail(STATUS_BAD_INPUT, "%.300s: %zu bytes are too few for a safetensors file", file->path, file->size);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | file->bytes[i];
    if (length > HEADER_MAX)
        return status_fail(STATUS_BAD_INPUT, "%.300s: a header of %llu bytes: not a safetensors file", file->path,
                           (unsigned long long)length);
    if (length > file->size - 8)
        return status_fail(STATUS_BAD_INPUT, "%.300s: a header of %llu bytes in a file of %zu (cut short?)", file->path,
                           (unsigned long long)length, file->size);
    const unsigned char *text = file->bytes + 8;
    if (length == 0 || text[0] != '{')
        return status_fail(STATUS_BAD_INPUT, "%.300s: the header does not begin with '{'", file->path);
    if (!is_utf8(text, (size_t)length))
        return status_fail(STATUS_BAD_INPUT, "%.300s: the header is not UTF-8 text", file->path);
    TRY(json_parse(file->path, (const char *)text, (size_t)length, &file->header));
    return parse_entries(file, text + length);
}

/* ---- opening and closing ---- */

static status map_file(safetensors *file)
{
    int fd = open(file->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return status_fail(STATUS_IO, "%.300s: cannot be opened (%s)", file->path, strerror(errno));
    status st = STATUS_OK;
    struct stat info;
    if (fstat(fd, &info) < 0) {
        st = status_fail(STATUS_IO, "%.300s: cannot be read (%s)", file->path, strerror(errno));
    } else if (!S_ISREG(info.st_mode)) {
        st = status_fail(STATUS_BAD_INPUT, "%.300s: not a plain file", file->path);
    } else if (info.st_size > 0) { /* an empty file cannot be mapped; parse_file() has a sentence for it */
        void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            st = status_fail(STATUS_IO, "%.300s: cannot be mapped (%s)", file->path, strerror(errno));
        } else {
            file->bytes = map;
            file->size = (size_t)info.st_size;
            file->mapped = true;
        }
    }
    close(fd);
    return st;
}

static status new_file(const char *path, safetensors **out)
{
    safetensors *file = calloc(1, sizeof *file);
    if (file)
        file->path = strdup(path);
    if (!file || !file->path) {
        free(file);
        return status_fail(STATUS_NO_MEMORY, "%.300s: no memory to open it", path);
    }
    *out = file;
    return STATUS_OK;
}

status safetensors_open(const char *path, safetensors **out)
{
    safetensors *file = NULL;
    TRY(new_file(path, &file));
    status st = map_file(file);
    if (st == STATUS_OK)
        st = parse_file(file);
    if (st != STATUS_OK) {
        safetensors_close(file);
        return st;
    }
    /* The header has been read for good: give its pages back, so that residency counts tensor bytes. */
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
    size_t head = file->count ? (size_t)((const unsigned char *)file->tensors[0].data - file->bytes) : file->size;
    madvise((void *)(uintptr_t)file->bytes, (head + page) & ~page, MADV_DONTNEED);
    *out = file;
    return STATUS_OK;
}

status safetensors_open_memory(const char *name, const void *bytes, size_t size, safetensors **out)
{
    safetensors *file = NULL;
    TRY(new_file(name, &file));
    file->bytes = bytes;
    file->size = size;
    status st = parse_file(file);
    if (st != STATUS_OK) {
        safetensors_close(file);
        return st;
    }
    *out = file;
    return STATUS_OK;
}

void safetensors_close(safetensors *file)
{
    if (!file)
        return;
    if (file->mapped)
        munmap((void *)(uintptr_t)file->bytes, file->size);
    cJSON_Delete(file->header);
    free(file->tensors);
    free(file->slots);
    free(file->path);
    free(file);
}

/* ---- looking ---- */

int safetensors_count(const safetensors *file)
{
    return file->count;
}

const tensor_view *safetensors_at(const safetensors *file, int index)
{
    return &file->tensors[index];
}

const tensor_view *safetensors_find(const safetensors *file, const char *name)
{
    int found = file->slots[find_slot(file, name)];
    return found ? &file->tensors[found - 1] : NULL;
}

const char *safetensors_metadata(const safetensors *file, const char *key)
{
    const cJSON *item = file->metadata ? json_find(file->metadata, key) : NULL;
    return item ? item->valuestring : NULL;
}

const char *safetensors_path(const safetensors *file)
{
    return file->path;
}

const void *safetensors_mapping(const safetensors *file, size_t *size)
{
    *size = file->size;
    return file->bytes;
}
