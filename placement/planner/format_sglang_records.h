/* format_sglang_records.h - tokens that SGLang's recorder kept (mode per_token), as a trace. See format_sglang_records.c. */
#ifndef CONVOKE_PLACEMENT_PLANNER_FORMAT_SGLANG_RECORDS_H
#define CONVOKE_PLACEMENT_PLANNER_FORMAT_SGLANG_RECORDS_H

#include "placement/planner/array_file.h"
#include "placement/planner/formats.h"

bool sglang_records_in(const array_file *file);
status sglang_records_import(const char *const *paths, int n_paths, const import_options *options, const char *out_path);

#endif
