/* array_file.h - named arrays in one file, whatever keeps them: .npz (numpy), .npy (one array without a name) or a JSON object.
 *
 * What a file is is seen in its first bytes, not its name. A torch pickle (.pt) is refused with what to do about it. */
#ifndef CONVOKE_PLACEMENT_PLANNER_ARRAY_FILE_H
#define CONVOKE_PLACEMENT_PLANNER_ARRAY_FILE_H

#include "placement/planner/number_array.h"

typedef struct array_file array_file;

status array_file_open(const char *path, array_file **out);
void array_file_close(array_file *file); /* NULL is fine */
const char *array_file_path(const array_file *file);
const cJSON *array_file_json(const array_file *file); /* the whole tree; NULL when it is no JSON */

bool array_file_has(const array_file *file, const char *name);
/* The array of that name; the only one of an .npy answers to every name. Fails when it is not there or has another number of
 * dimensions than min_dims to max_dims. */
status array_file_get(const array_file *file, const char *name, int min_dims, int max_dims, number_array *out);

/* ---- behind it: npz_file.c, the one file that sees libzip ---- */
typedef struct npz_file npz_file;
status npz_open(const char *path, npz_file **out);
void npz_close(npz_file *file); /* NULL is fine */
bool npz_has(const npz_file *file, const char *name);
status npz_get(const npz_file *file, const char *path, const char *name, number_array *out);

/* Writing: an .npz of arrays of whole numbers, whole or not at all. */
typedef struct {
    const char *name;
    int n_dims;
    int64_t shape[NUMBER_ARRAY_MAX_DIMS];
    const int64_t *numbers;
} npz_array;
status npz_write(const char *path, const npz_array *arrays, int n_arrays);

#endif
