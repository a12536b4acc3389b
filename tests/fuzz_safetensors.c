/* fuzz_safetensors.c - any bytes as a safetensors file: refused with a one-line sentence, or tensors that lie inside the bytes,
 * apart from each other, found by their names.
 *
 * Most inputs take the form "header text, then data": the length in front is filled in here, so that mutations reach the
 * JSON behind it instead of failing on the first eight bytes. Inputs that begin with a zero byte are taken as they are. */
#include "proto/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const safetensors *file, const uint8_t *bytes, size_t size)
{
    const uint8_t *end = NULL;
    for (int i = 0; i < safetensors_count(file); i++) {
        const tensor_view *t = safetensors_at(file, i);
        const uint8_t *from = t->data;
        size_t n = tensor_dtype_size(t->dtype);
        for (int d = 0; d < t->n_dims; d++)
            n *= (size_t)t->shape[d];
        if (n != t->n_bytes || from < bytes || from + n > bytes + size || (end && from != end))
            abort();
        if (safetensors_find(file, t->name) != t || strchr(t->name, '\n'))
            abort();
        end = from + n;
    }
    const char *format = safetensors_metadata(file, "format");
    if ((format && strlen(format) > size) || safetensors_find(file, "no such tensor, surely"))
        abort();
}

static void open_bytes(const uint8_t *bytes, size_t size)
{
    safetensors *file = NULL;
    if (safetensors_open_memory("f", bytes, size, &file) == STATUS_OK)
        check(file, bytes, size);
    else if (file || !status_message()[0] || strchr(status_message(), '\n'))
        abort();
    safetensors_close(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size && data[0] == 0) {
        uint8_t *copy = malloc(size); /* an exact copy: the sanitizer sees one byte too far */
        memcpy(copy, data + 1, size - 1);
        open_bytes(copy, size - 1);
        free(copy);
        return 0;
    }
    /* the header ends at the last '}' */
    size_t header = size;
    while (header && data[header - 1] != '}')
        header--;
    uint8_t *file = malloc(8 + size);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)header >> 8 * i);
    memcpy(file + 8, data, size);
    open_bytes(file, 8 + size);
    free(file);
    return 0;
}
