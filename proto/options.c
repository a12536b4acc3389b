#include "proto/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where a value came from, for sentences: "--batch" or "CONVOKE_BATCH". */
typedef struct {
    const char *dashes, *name;
} origin;

static status bad(origin from, const char *text, const char *allowed)
{
    return status_fail(STATUS_USAGE, "%s%s: '%s' is not %s", from.dashes, from.name, text, allowed);
}

/* ---- values ---- */

static status parse_flag(const option_entry *e, origin from, const char *text)
{
    static const char *const words[] = {"0", "false", "no", "off", "1", "true", "yes", "on"};
    for (int i = 0; i < 8; i++)
        if (strcmp(text, words[i]) == 0) {
            *(bool *)e->value = i >= 4;
            return STATUS_OK;
        }
    return bad(from, text, "1 or 0");
}

static bool in_range(const option_entry *e, double v)
{
    return (e->min == 0 && e->max == 0) || (v >= e->min && v <= e->max);
}

static status parse_int(const option_entry *e, origin from, const char *text)
{
    char allowed[100], *end;
    if (e->min == 0 && e->max == 0)
        snprintf(allowed, sizeof allowed, "a whole number");
    else
        snprintf(allowed, sizeof allowed, "a whole number from %.0f to %.0f", e->min, e->max);
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno || !in_range(e, (double)v))
        return bad(from, text, allowed);
    *(int64_t *)e->value = v;
    return STATUS_OK;
}

static status parse_size(const option_entry *e, origin from, const char *text)
{
    static const char letters[] = "KMGT";
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    int shift = 0;
    bool has_digits = end != text;
    const char *letter = *end ? memchr(letters, *end & ~0x20, 4) : NULL;
    if (letter) {
        shift = 10 * (int)(letter - letters + 1);
        end++;
    }
    bool fits = v >= 0 && v <= (INT64_MAX >> shift);
    int64_t bytes = fits ? (int64_t)v << shift : 0;
    if (!has_digits || *end || errno || !fits)
        return bad(from, text, "a size in bytes (a whole number, with K, M, G or T behind it if you like)");
    if (!in_range(e, (double)bytes))
        return status_fail(STATUS_USAGE, "%s%s: '%s' is outside %.0f to %.0f bytes", from.dashes, from.name, text, e->min,
                           e->max);
    *(int64_t *)e->value = bytes;
    return STATUS_OK;
}

static status parse_double(const option_entry *e, origin from, const char *text)
{
    char allowed[100], *end;
    if (e->min == 0 && e->max == 0)
        snprintf(allowed, sizeof allowed, "a number");
    else
        snprintf(allowed, sizeof allowed, "a number from %g to %g", e->min, e->max);
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || !in_range(e, v))
        return bad(from, text, allowed);
    *(double *)e->value = v;
    return STATUS_OK;
}

static status parse_choice(const option_entry *e, origin from, const char *text)
{
    size_t length = strlen(text);
    int place = 0;
    for (const char *at = e->choices;; place++) {
        size_t n = strcspn(at, "|");
        if (n == length && strncmp(at, text, n) == 0) {
            *(int *)e->value = place;
            return STATUS_OK;
        }
        if (!at[n])
            break;
        at += n + 1;
    }
    char allowed[300];
    snprintf(allowed, sizeof allowed, "one of %s", e->choices);
    return bad(from, text, allowed);
}

static status add_to_list(const option_entry *e, origin from, const char *text)
{
    option_list *list = e->value;
    if (list->n == OPTION_LIST_MAX)
        return status_fail(STATUS_USAGE, "%s%s: more than %d values", from.dashes, from.name, OPTION_LIST_MAX);
    list->items[list->n++] = text;
    return STATUS_OK;
}

static status parse_value(const option_entry *e, origin from, const char *text)
{
    switch (e->kind) {
    case OPTION_FLAG:
        return parse_flag(e, from, text);
    case OPTION_INT:
        return parse_int(e, from, text);
    case OPTION_SIZE:
        return parse_size(e, from, text);
    case OPTION_DOUBLE:
        return parse_double(e, from, text);
    case OPTION_CHOICE:
        return parse_choice(e, from, text);
    case OPTION_STRING:
    case OPTION_LIST:
        break;
    }
    if (!*text)
        return status_fail(STATUS_USAGE, "%s%s: the value is empty", from.dashes, from.name);
    if (e->kind == OPTION_LIST)
        return add_to_list(e, from, text);
    *(const char **)e->value = text;
    return STATUS_OK;
}

/* ---- names ---- */

/* Edit distance, at most 3 counted; names are short. */
static int distance(const char *a, const char *b)
{
    enum { MAX = 32 };
    size_t n = strlen(a), m = strlen(b);
    int row[MAX + 1];
    if (n > MAX || m > MAX)
        return MAX;
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int corner = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = corner + (a[i - 1] != b[j - 1]);
            best = row[j] + 1 < best ? row[j] + 1 : best;
            best = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
            corner = row[j];
            row[j] = best;
        }
    }
    return row[m];
}

static status unknown(const option_table *t, const char *name)
{
    const char *nearest = NULL;
    int best = 3;
    for (int i = 0; i < t->n_entries; i++) {
        int d = distance(name, t->entries[i].name);
        if (d < best) {
            best = d;
            nearest = t->entries[i].name;
        }
    }
    if (nearest)
        return status_fail(STATUS_USAGE, "unknown option --%s (did you mean --%s? --help lists all)", name, nearest);
    return status_fail(STATUS_USAGE, "unknown option --%s (--help lists all)", name);
}

static int find_entry(const option_table *t, const char *name)
{
    for (int i = 0; i < t->n_entries; i++)
        if (strcmp(t->entries[i].name, name) == 0)
            return i;
    return -1;
}

/* ---- the command line ---- */

/* What is left to read. */
typedef struct {
    const option_table *table;
    int argc, at;
    char **argv;
    bool *given; /* [n_entries] */
    options_wish *wish;
} reader;

static status take_value(reader *r, int entry, const char *spelled, const char *inline_value)
{
    const option_entry *e = &r->table->entries[entry];
    r->given[entry] = true;
    if (e->kind == OPTION_FLAG && !inline_value) {
        *(bool *)e->value = true;
        return STATUS_OK;
    }
    if (!inline_value) {
        if (r->at == r->argc)
            return status_fail(STATUS_USAGE, "%s: a value is missing", spelled);
        inline_value = r->argv[r->at++];
    }
    return parse_value(e, (origin){"", spelled}, inline_value);
}

static status take_long(reader *r, const char *text)
{
    char name[64], spelled[72];
    size_t n = strcspn(text, "=");
    if (n >= sizeof name)
        return status_fail(STATUS_USAGE, "unknown option --%.60s... (--help lists all)", text);
    memcpy(name, text, n);
    name[n] = '\0';
    snprintf(spelled, sizeof spelled, "--%s", name);
    if (strcmp(name, "help") == 0 || strcmp(name, "version") == 0) {
        *r->wish = name[0] == 'h' ? OPTIONS_HELP : OPTIONS_VERSION;
        return STATUS_OK;
    }
    int entry = find_entry(r->table, name);
    if (entry >= 0)
        return take_value(r, entry, spelled, text[n] ? text + n + 1 : NULL);
    entry = strncmp(name, "no-", 3) == 0 ? find_entry(r->table, name + 3) : -1;
    if (entry < 0 || r->table->entries[entry].kind != OPTION_FLAG || text[n])
        return unknown(r->table, name);
    r->given[entry] = true;
    *(bool *)r->table->entries[entry].value = false;
    return STATUS_OK;
}

static status take_short(reader *r, const char *text)
{
    char spelled[3] = {'-', text[1], '\0'};
    if (text[1] == 'h' && !text[2]) {
        *r->wish = OPTIONS_HELP;
        return STATUS_OK;
    }
    for (int i = 0; i < r->table->n_entries; i++)
        if (r->table->entries[i].letter && r->table->entries[i].letter == text[1])
            return take_value(r, i, spelled, text[2] ? text + 2 : NULL);
    return status_fail(STATUS_USAGE, "unknown option %s (--help lists all)", spelled);
}

static status take_arguments(reader *r, const char **operands, int *n_operands)
{
    bool options_over = false;
    int n = 0;
    while (r->at < r->argc && *r->wish == OPTIONS_RUN) {
        const char *text = r->argv[r->at++];
        if (!options_over && strcmp(text, "--") == 0) {
            options_over = true;
        } else if (!options_over && strncmp(text, "--", 2) == 0) {
            TRY(take_long(r, text + 2));
        } else if (!options_over && text[0] == '-' && text[1]) {
            TRY(take_short(r, text));
        } else {
            if (n == r->table->max_operands)
                return status_fail(STATUS_USAGE, "'%s' is one argument too many (--help shows what is allowed)", text);
            operands[n++] = text;
        }
    }
    if (n_operands)
        *n_operands = n;
    if (*r->wish == OPTIONS_RUN && n < r->table->min_operands)
        return status_fail(STATUS_USAGE, "%s is missing", r->table->operand_name);
    return STATUS_OK;
}

/* The default, then the environment over it. */
static status start_value(const option_entry *e, bool *given)
{
    if (e->fallback)
        TRY(parse_value(e, (origin){"default of --", e->name}, e->fallback));
    const char *text = e->environment ? getenv(e->environment) : NULL;
    if (!text || !*text)
        return STATUS_OK;
    *given = true;
    return parse_value(e, (origin){"", e->environment}, text);
}

/* The environment is looked at only where the command line is silent, so that a bad variable can be overridden. */
static status fill_silent(const option_table *t, bool *given, const bool *on_line)
{
    for (int i = 0; i < t->n_entries; i++) {
        const option_entry *e = &t->entries[i];
        if (!on_line[i])
            TRY(start_value(e, &given[i]));
        if (e->required && !given[i]) {
            if (e->environment)
                return status_fail(STATUS_USAGE, "--%s is missing (or set %s)", e->name, e->environment);
            return status_fail(STATUS_USAGE, "--%s is missing", e->name);
        }
    }
    return STATUS_OK;
}

status options_parse(const option_table *table, int argc, char **argv, options_wish *wish, const char **operands, int *n_operands)
{
    bool *given = calloc((size_t)table->n_entries * 2 + 1, sizeof *given);
    if (!given)
        return status_fail(STATUS_NO_MEMORY, "no memory for the options");
    bool *on_line = given + table->n_entries;
    *wish = OPTIONS_RUN;
    reader r = {.table = table, .argc = argc, .at = 1, .argv = argv, .given = given, .wish = wish};
    status st = take_arguments(&r, operands, n_operands);
    if (st == STATUS_OK && *wish == OPTIONS_RUN) {
        memcpy(on_line, given, (size_t)table->n_entries * sizeof *given);
        st = fill_silent(table, given, on_line);
    }
    free(given);
    return st;
}

/* ---- help ---- */

static const char *argument_of(const option_entry *e)
{
    if (e->argument)
        return e->argument;
    switch (e->kind) {
    case OPTION_SIZE:
        return "SIZE";
    case OPTION_STRING:
    case OPTION_LIST:
        return "TEXT";
    case OPTION_CHOICE:
        return e->choices;
    case OPTION_FLAG:
        return "";
    default:
        return "N";
    }
}

static void print_entry(const option_entry *e, FILE *file)
{
    char left[128];
    int n = snprintf(left, sizeof left, "  ");
    if (e->letter)
        n += snprintf(left + n, sizeof left - (size_t)n, "-%c, ", e->letter);
    snprintf(left + n, sizeof left - (size_t)n, "--%s %s", e->name, argument_of(e));
    if (strlen(left) > 33)
        fprintf(file, "%s\n%35s", left, "");
    else
        fprintf(file, "%-35s", left);
    fputs(e->help, file);
    const char *separator = " (";
    if (e->required) {
        fprintf(file, "%srequired", separator);
        separator = "; ";
    }
    if (e->fallback) {
        fprintf(file, "%sdefault %s", separator, e->fallback);
        separator = "; ";
    }
    if (e->environment) {
        fprintf(file, "%s%s", separator, e->environment);
        separator = "; ";
    }
    fputs(separator[0] == ';' ? ")\n" : "\n", file);
}

void options_print(const option_table *t, options_wish wish, FILE *file)
{
    if (wish == OPTIONS_VERSION) {
        fprintf(file, "%s %s\n", t->name, t->version);
        return;
    }
    fprintf(file, "%s [OPTIONS]", t->name);
    if (t->operand_name && t->min_operands > 0)
        fprintf(file, " %s", t->operand_name);
    else if (t->operand_name)
        fprintf(file, " [%s]", t->operand_name);
    fprintf(file, "\n%s\n\n", t->summary);
    for (int i = 0; i < t->n_entries; i++)
        print_entry(&t->entries[i], file);
    fprintf(file, "  %-33s%s\n  %-33s%s\n", "-h, --help", "print this", "--version", "print the version");
}
