/* yaml_file.h - a YAML file as the same kind of tree that JSON becomes, so that both are read by proto/json.h.
 *
 * Mappings, lists and plain or quoted scalars; keys become text; plain scalars that are numbers, true, false or null become that.
 * Refused: aliases and merges (which can blow a small file up), several documents, a key given twice, nesting over 32 levels. */
#ifndef CONVOKE_PLACEMENT_PLANNER_YAML_FILE_H
#define CONVOKE_PLACEMENT_PLANNER_YAML_FILE_H

#include "proto/json.h"

status yaml_read_file(const char *path, cJSON **out); /* cJSON_Delete() */
status yaml_parse(const char *where, const void *text, size_t size, cJSON **out);

#endif
