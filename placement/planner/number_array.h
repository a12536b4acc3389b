/* number_array.h - an array of numbers as Python tools keep them: one .npy, one of an .npz, or lists in JSON. */
#ifndef CONVOKE_PLACEMENT_PLANNER_NUMBER_ARRAY_H
#define CONVOKE_PLACEMENT_PLANNER_NUMBER_ARRAY_H

#include "proto/json.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { NUMBER_ARRAY_MAX_DIMS = 5 };

typedef struct {
    char kind; /* 'i' signed, 'u' unsigned or bool, 'f' floating point */
    int item_bytes;
    int n_dims;
    int64_t shape[NUMBER_ARRAY_MAX_DIMS];
    int64_t n;  /* their product */
    void *data; /* owned: free() by number_array_clear() */
} number_array;

void number_array_clear(number_array *a); /* a zeroed one is fine */

/* The bytes of an .npy file (numpy's own description of the format): little-endian numbers in C order; versions 1 to 3. Refuses
 * objects (a pickle), other byte orders, Fortran order, and bytes that are fewer or more than the shape says. */
status number_array_parse_npy(const char *where, const void *bytes, size_t size, number_array *out);
status number_array_read_npy(const char *path, number_array *out);
/* Nested lists of numbers, all of one length at each depth; null and NaN are refused. */
status number_array_from_json(const char *where, const cJSON *lists, number_array *out);

/* Element `index` in C order. */
double number_array_double(const number_array *a, int64_t index);
/* As a whole number in [min, max]; `where` names the array, the sentence adds the place. */
status number_array_int(const number_array *a, const char *where, int64_t index, int64_t min, int64_t max, int64_t *out);

#endif
