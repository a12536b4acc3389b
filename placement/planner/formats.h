/* formats.h - other engines' files, and flat arrays of recorded routing: read into traces, statistics or plans, written from
 * plans and statistics. One table; layouts are in placement/planner/FORMATS.md. */
#ifndef CONVOKE_PLACEMENT_PLANNER_FORMATS_H
#define CONVOKE_PLACEMENT_PLANNER_FORMATS_H

#include "placement/plan.h"
#include "placement/routing_stats.h"
#include "placement/topology.h"

typedef enum { FORMAT_TRACE, FORMAT_STATS, FORMAT_PLAN } format_kind;

enum { IMPORT_PHASE_OWN, IMPORT_PHASE_PREFILL, IMPORT_PHASE_DECODE }; /* own: what the format is about, see FORMATS.md */

typedef struct {
    const char *model;                                /* NULL: from the file, or unknown */
    int n_experts, n_layers, top_k, n_ranks, n_nodes; /* 0: from the file, where it says so; else asked for by name */
    const char *domain;                               /* NULL: "default" or the file's own */
    const char *index;                                /* flat arrays: CSV of sequences; NULL: beside the file */
    bool keep_repetition;                             /* flat arrays: keep what the index marks as looping */
    int phase;                 /* of counts and tokens whose file does not say: IMPORT_PHASE_OWN, _PREFILL or _DECODE */
    const char *layer_numbers; /* the model's own, "3-60" or "1,3,5-9"; NULL: from the file, or 0, 1, 2, ... Where a file has a
                                  row for every layer of the model (sglang), those rows are taken */
} import_options;

typedef struct {
    const char *name;    /* "sglang" */
    const char *summary; /* one line */
    /* Reads file(s) and writes `out_path`, as what it finds in them; *made says what that was. NULL: cannot. */
    status (*import)(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                     format_kind *made);
    status (*export_plan)(const plan *p, const char *path); /* NULL: cannot */
    status (*export_stats)(const routing_stats *stats, const char *path);
} file_format;

extern const file_format *const file_formats[]; /* ends with NULL */
const file_format *format_find(const char *name);

/* What a file of ours is, by looking into it: plan, statistics, trace, topology. */
typedef enum { FILE_PLAN, FILE_STATS, FILE_TRACE, FILE_TOPOLOGY } file_kind;
status file_recognise(const char *path, file_kind *out);

#endif
