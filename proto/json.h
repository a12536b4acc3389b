/* json.h - reading JSON files and lines with one clear sentence per mistake (over cJSON); and what writing needs besides.
 *
 * `where` names the place in sentences ("config.json", "plan.json: layer 3"). A getter fails when the key is missing (unless
 * it is the _or form, which then gives the default; null counts as missing), has the wrong type, is no whole number, or is
 * out of [min, max]. Numbers travel as doubles: whole numbers are exact up to 2^53. */
#ifndef CONVOKE_PROTO_JSON_H
#define CONVOKE_PROTO_JSON_H

#include "proto/status.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The whole file, parsed. Refuses files over max_bytes. Free with cJSON_Delete(). */
status json_read_file(const char *path, size_t max_bytes, cJSON **out);

/* `size` bytes of text (need not end in NUL), parsed; anything but white space behind the value is a mistake. */
status json_parse(const char *where, const char *text, size_t size, cJSON **out);

status json_get_int(const cJSON *object, const char *where, const char *key, int64_t min, int64_t max, int64_t *out);
status json_get_int_or(const cJSON *object, const char *where, const char *key, int64_t min, int64_t max, int64_t fallback,
                       int64_t *out);
status json_get_double_or(const cJSON *object, const char *where, const char *key, double fallback, double *out);
status json_get_bool_or(const cJSON *object, const char *where, const char *key, bool fallback, bool *out);
/* *out points into the tree. */
status json_get_string(const cJSON *object, const char *where, const char *key, const char **out);
/* *out is an array or object inside the tree. */
status json_get_array(const cJSON *object, const char *where, const char *key, const cJSON **out);
/* One element as a whole number in [min, max]; `where` names the array. */
status json_item_int(const cJSON *item, const char *where, int index, int64_t min, int64_t max, int64_t *out);
/* NULL when the key is missing or null. Case-sensitive. */
const cJSON *json_find(const cJSON *object, const char *key);

/* Adds a number to an object; what is not finite has no word in JSON and becomes null. */
void json_put_number(cJSON *object, const char *key, double value);

#endif
