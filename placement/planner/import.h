/* import.h - what importers share: layer numbers from the command line, counts that come one by one, plans out of slots. */
#ifndef CONVOKE_PLACEMENT_PLANNER_IMPORT_H
#define CONVOKE_PLACEMENT_PLANNER_IMPORT_H

#include "placement/planner/formats.h"
#include "placement/planner/slot_layout.h"

#include <stdio.h>

/* The importers and exporters, by file format_<engine>.c. */
extern const file_format format_flat, format_olmoe, format_cd_moe, format_sglang, format_eplb, format_tensorrt_llm,
    format_vllm_ascend, format_vllm, format_exflow;

/* "prefill" for IMPORT_PHASE_PREFILL and so on; IMPORT_PHASE_OWN gives the format's own. */
int import_phase(const import_options *options, int own);

/* Numbers of n_rows layers: options->layer_numbers, which must be as many, else first, first + 1, ... free() the list. */
status import_layer_numbers(const char *where, const import_options *options, int n_rows, int first, int **out);
/* Which of n_rows rows, one per layer of the model, to take: those that options->layer_numbers names, else those with wanted[row]
 * (NULL: all). free() the list; *n: how many. */
status import_pick_rows(const char *where, const import_options *options, int n_rows, const bool *wanted, int **out, int *n);

/* For sentences that ask: "FILE: the file does not say how many WHAT: say so with --OPTION". */
status import_ask(const char *where, const char *what, const char *option);

/* Two statements about one number that must agree: found in the file, given on the command line (0: not). */
status import_agree(const char *where, const char *what, int found, int given, int *out);

/* A rank's place in the job: options' ranks and nodes, checked. */
status import_ranks(const char *where, const import_options *options, int *n_ranks);

/* ---- counts ---- */

/* Counts of (domain, layer, expert) in any order, made into statistics at the end: experts from 0 to the largest one seen (or
 * options->n_experts), layers that were seen, rising. Those never added are 0. */
typedef struct count_table count_table;

status count_table_create(count_table **out);
void count_table_destroy(count_table *t); /* NULL is fine */
/* Refuses the same (domain, layer, expert) a second time when the table is finished; `where` is where it stands, for sentences.
 */
status count_table_add(count_table *t, const char *domain, int64_t layer, int64_t expert, uint64_t count);
/* Writes them. A token is a row of top_k choices, so a domain's tokens are its busiest layer's sum over top_k. */
status count_table_write(count_table *t, const char *where, const import_options *options, int own_phase, const char *out_path);

/* ---- plans ---- */

/* Writes the plan of a layout under the file's own name. */
status import_write_slots(const char *where, const slot_layout *layout, const int *first_slot, const import_options *options,
                          const char *out_path);

/* ---- text files out ---- */

/* Written beside its place and renamed: whole or not at all. */
typedef struct {
    FILE *stream;
    char *path, *beside; /* owned */
} text_file;
status text_file_begin(const char *path, text_file *out);
/* Closes and renames; on any failure nothing is left. */
status text_file_finish(text_file *file);

/* Says on stderr what an export could not keep: homes that will be read back as another copy. */
void export_warn(const char *engine, int homes_lost);

/* The last part of a path. */
const char *import_base_name(const char *path);

#endif
