/* token_lines.h - a .jsonl file of token ids: {"token_ids": [1, 2, 3], "domain": "math", "id": "q-17"} on each line.
 *
 * domain and id may be missing; other keys are passed over; empty lines are skipped. A line with text but no token ids is
 * refused, as the tokenizer is not here. Sentences name file and line. */
#ifndef CONVOKE_WORKER_TOKEN_LINES_H
#define CONVOKE_WORKER_TOKEN_LINES_H

#include "proto/status.h"

#include <stddef.h>

#define TOKEN_LINE_MAX_BYTES    ((size_t)4 << 20)
#define TOKEN_LINES_MAX         10000000
#define TOKEN_LINES_MAX_DOMAINS 65535 /* a trace numbers them in 16 bits */

typedef struct {
    int *ids; /* [n_ids], at least one, each in [0, vocab) */
    int n_ids;
    int domain;      /* index into domains; -1: none */
    char *id;        /* NULL: none */
    int line_number; /* in the file, from 1 */
} token_line;

typedef struct {
    token_line *lines;
    int n_lines, capacity;
    char **domains; /* names in order of first appearance */
    int n_domains, domain_capacity;
} token_lines;

/* The whole file; at least one line. */
status token_lines_read(const char *path, int vocab, token_lines *out);
/* The same from text in memory; `where` stands for the file's name. */
status token_lines_parse(const char *where, const char *text, size_t size, int vocab, token_lines *out);
void token_lines_clear(token_lines *lines); /* a zeroed one is fine */

#endif
