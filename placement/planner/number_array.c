/* number_array.c - the array itself, and how it comes out of JSON. */
#include "placement/planner/number_array.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void number_array_clear(number_array *a)
{
    free(a->data);
    *a = (number_array){0};
}

static uint64_t load_bits(const number_array *a, int64_t index)
{
    uint64_t bits = 0; /* little-endian: the low bytes come first */
    memcpy(&bits, (const char *)a->data + (size_t)index * (size_t)a->item_bytes, (size_t)a->item_bytes);
    return bits;
}

static double half_to_double(unsigned half)
{
    unsigned exponent = half >> 10 & 31, fraction = half & 1023;
    double value = exponent == 31  ? (fraction ? NAN : INFINITY)
                   : exponent == 0 ? ldexp(fraction, -24)
                                   : ldexp(1024 + fraction, (int)exponent - 25);
    return half & 0x8000 ? -value : value;
}

double number_array_double(const number_array *a, int64_t index)
{
    uint64_t bits = load_bits(a, index);
    if (a->kind == 'u')
        return (double)bits;
    if (a->kind == 'i') {
        int shift = 64 - 8 * a->item_bytes;
        return (double)((int64_t)(bits << shift) >> shift);
    }
    if (a->item_bytes == 2)
        return half_to_double((unsigned)bits);
    if (a->item_bytes == 4) {
        float value;
        memcpy(&value, &bits, sizeof value);
        return (double)value;
    }
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* "[3][17]" */
static void name_place(const number_array *a, int64_t index, char *text, size_t size)
{
    int64_t rest[NUMBER_ARRAY_MAX_DIMS], left = index;
    size_t used = 0;
    for (int d = a->n_dims - 1; d >= 0; d--) {
        rest[d] = left % a->shape[d];
        left /= a->shape[d];
    }
    text[0] = '\0';
    for (int d = 0; d < a->n_dims && used + 24 < size; d++)
        used += (size_t)snprintf(text + used, size - used, "[%lld]", (long long)rest[d]);
}

status number_array_int(const number_array *a, const char *where, int64_t index, int64_t min, int64_t max, int64_t *out)
{
    double value = number_array_double(a, index);
    if (value >= (double)min && value <= (double)max && value == floor(value)) {
        *out = (int64_t)value;
        return STATUS_OK;
    }
    char place[160];
    name_place(a, index, place, sizeof place);
    return status_fail(STATUS_BAD_INPUT, "%s%s is %.12g, not a whole number from %lld to %lld", where, place, value,
                       (long long)min, (long long)max);
}

/* ---- JSON ---- */

static status find_shape(const char *where, const cJSON *lists, number_array *a)
{
    const cJSON *item = lists;
    a->n = 1;
    for (; cJSON_IsArray(item); item = item->child) {
        if (a->n_dims == NUMBER_ARRAY_MAX_DIMS)
            return status_fail(STATUS_BAD_INPUT, "%s: lists lie more than %d deep", where, NUMBER_ARRAY_MAX_DIMS);
        int n = cJSON_GetArraySize(item);
        a->shape[a->n_dims++] = n;
        if (__builtin_mul_overflow(a->n, (int64_t)n, &a->n) || a->n > INT32_MAX)
            return status_fail(STATUS_BAD_INPUT, "%s: more than 2^31 numbers", where);
        if (n == 0)
            break;
    }
    return a->n_dims ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "%s: not a list", where);
}

/* Counts what is really there, so that memory is set aside only for that. */
static status count_items(const char *where, const cJSON *list, const number_array *a, int depth, int64_t *n)
{
    int length = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        bool last = depth + 1 == a->n_dims;
        if (last ? !cJSON_IsNumber(item) || !isfinite(item->valuedouble) : !cJSON_IsArray(item))
            return status_fail(STATUS_BAD_INPUT, "%s: entry %d of a list at depth %d is not a %s", where, length, depth + 1,
                               last ? "number" : "list");
        if (!last)
            TRY(count_items(where, item, a, depth + 1, n));
        *n += last;
        length++;
    }
    if (length != a->shape[depth])
        return status_fail(STATUS_BAD_INPUT, "%s: a list at depth %d has %d entries where the first has %lld", where, depth + 1,
                           length, (long long)a->shape[depth]);
    return STATUS_OK;
}

static double *copy_items(const cJSON *list, int depth_left, double *to)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        if (depth_left > 1)
            to = copy_items(item, depth_left - 1, to);
        else
            *to++ = item->valuedouble;
    }
    return to;
}

status number_array_from_json(const char *where, const cJSON *lists, number_array *out)
{
    number_array a = {.kind = 'f', .item_bytes = sizeof(double)};
    TRY(find_shape(where, lists, &a));
    int64_t n = 0;
    TRY(count_items(where, lists, &a, 0, &n));
    a.data = malloc((size_t)n * sizeof(double) + 1);
    if (!a.data)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %lld numbers", where, (long long)n);
    copy_items(lists, a.n_dims, a.data);
    *out = a;
    return STATUS_OK;
}
