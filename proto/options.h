/* options.h - one table is the configuration of a program: parsing, the environment, --help and defaults come from it.
 *
 *   static const option_entry table[] = {
 *       {"model", OPTION_STRING, &o.model, .argument = "DIR", .environment = "CONVOKE_MODEL", .required = true, .help =
 * "checkpoint folder"},
 *       {"batch", OPTION_INT, &o.batch, .argument = "B", .fallback = "32", .min = 1, .max = 4096, .help = "sequences at once"},
 *       {"combine", OPTION_CHOICE, &o.combine, .choices = "exact|fixed|fast", .fallback = "fixed", .help = "how results are
 * added"},
 *   };
 *
 * --name VALUE, --name=VALUE, -n VALUE; a flag is --name or --no-name; `--` ends the options. A flag on the command line beats
 * the environment, which beats the default. An empty environment variable counts as unset. --help (-h) and --version are always
 * there. */
#ifndef CONVOKE_PROTO_OPTIONS_H
#define CONVOKE_PROTO_OPTIONS_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef enum {
    OPTION_FLAG,   /* bool                                                                                  */
    OPTION_INT,    /* int64_t in [min, max]; both 0: any                                                    */
    OPTION_SIZE,   /* int64_t in bytes: a whole number with K, M, G or T (powers of 1024) behind it, or none */
    OPTION_DOUBLE, /* double in [min, max]; both 0: any                                                     */
    OPTION_STRING, /* const char *, borrowed from argv, the environment or the table                        */
    OPTION_CHOICE, /* int: place in `choices`                                                               */
    OPTION_LIST,   /* option_list: every value given, in order                                              */
} option_kind;

#define OPTION_LIST_MAX 64
typedef struct {
    const char *items[OPTION_LIST_MAX]; /* borrowed as OPTION_STRING's */
    int n;
} option_list; /* zeroed by the caller */

typedef struct {
    const char *name; /* long name without dashes */
    option_kind kind;
    void *value;             /* written by options_parse(); type as the kind says */
    char letter;             /* -o; 0: none */
    const char *argument;    /* how --help calls the value; NULL: a word for the kind */
    const char *environment; /* NULL: none */
    const char *fallback;    /* the default, in the form a user would write it; NULL: *value stays as it is */
    const char *choices;     /* "exact|fixed|fast" */
    double min, max;
    bool required;
    const char *help; /* one line, lower case */
} option_entry;

typedef struct {
    const char *name;    /* "convoke-score" */
    const char *summary; /* one sentence */
    const char *version;
    const option_entry *entries;
    int n_entries;
    const char *operand_name; /* what stands behind the options, "PROMPT"; NULL: nothing may */
    int min_operands, max_operands;
} option_table;

typedef enum { OPTIONS_RUN, OPTIONS_HELP, OPTIONS_VERSION } options_wish;

/* Fills every entry's value. *wish says whether to run or to print help or the version (then nothing else was checked).
 * operands [max_operands] (NULL when the table allows none) point into argv. A mistake is STATUS_USAGE, one sentence naming the
 * option and what is allowed. */
status options_parse(const option_table *table, int argc, char **argv, options_wish *wish, const char **operands,
                     int *n_operands);

/* What --help and --version print. */
void options_print(const option_table *table, options_wish wish, FILE *file);

#endif
