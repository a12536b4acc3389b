#include "cluster/tokenize.h"
#include "cluster/tokenizer.h"
#include "proto/bytes.h"
#include "proto/json.h"
#include "proto/options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *model;
    bool decode, special;
} options;

static const option_entry entries[] = {
    {"model", OPTION_STRING, &options.model, .argument = "DIR", .environment = "CONVOKE_MODEL", .required = true,
     .help = "checkpoint folder with tokenizer.json"},
    {"decode", OPTION_FLAG, &options.decode, .help = "token ids in, text out"},
    {"special", OPTION_FLAG, &options.special, .fallback = "1",
     .help = "add the special tokens around a text; with --decode: show special tokens"},
};
static const option_table table = {
    .name = "convoke tokenize",
    .summary =
        "Turns text, a line each, or JSON lines {\"text\": ..} from FILE or standard input into lines {\"token_ids\": [..]}, "
        "or the other way.",
    .version = CONVOKE_VERSION,
    .entries = entries,
    .n_entries = sizeof entries / sizeof entries[0],
    .operand_name = "FILE",
    .max_operands = 1,
};

typedef struct {
    const char *name; /* of the input, in sentences */
    tokenizer *t;
    tokenizer_scratch *scratch;
    tokenizer_stream *stream;
    bytes_writer in, text, out;
} job;

/* ---- input ---- */

static status read_all(const char *path, job *j)
{
    j->name = path ? path : "standard input";
    FILE *file = path ? fopen(path, "rb") : stdin;
    if (!file)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", j->name, strerror(errno));
    char part[1 << 16];
    size_t n;
    while ((n = fread(part, 1, sizeof part, file)) > 0 && !j->in.failed)
        bytes_put(&j->in, part, n);
    bool bad = ferror(file);
    if (path)
        fclose(file);
    if (j->in.failed)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory to read it", j->name);
    return bad ? status_fail(STATUS_IO, "%s: cannot be read", j->name) : STATUS_OK;
}

typedef struct {
    const char *text;
    size_t size;
    size_t number; /* from 1 */
} line;

/* The next line, without its line break. */
static bool next_line(const job *j, size_t *at, line *out)
{
    if (*at >= j->in.size)
        return false;
    const char *text = (const char *)j->in.data + *at;
    const char *end = memchr(text, '\n', j->in.size - *at);
    out->text = text;
    out->size = end ? (size_t)(end - text) : j->in.size - *at;
    out->number++;
    *at += out->size + 1;
    return true;
}

static bool is_blank(line l)
{
    for (size_t i = 0; i < l.size; i++)
        if (!strchr(" \t\r", l.text[i]) || !l.text[i])
            return false;
    return true;
}

/* Whether every line that is not blank is a JSON object with a text. */
static bool is_json(const job *j)
{
    line l = {0};
    size_t objects = 0;
    for (size_t at = 0; next_line(j, &at, &l);) {
        if (is_blank(l))
            continue;
        cJSON *json = l.text[strspn(l.text, " \t")] == '{' ? cJSON_ParseWithLength(l.text, l.size) : NULL;
        bool is = cJSON_IsObject(json) && cJSON_IsString(json_find(json, "text"));
        cJSON_Delete(json);
        if (!is)
            return false;
        objects++;
    }
    return objects > 0;
}

/* ---- output ---- */

static void put(job *j, const char *text)
{
    bytes_put(&j->out, text, strlen(text));
}

static void put_json_string(job *j, const char *text, size_t size)
{
    put(j, "\"");
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        char escaped[8];
        if (c == '"' || c == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", c);
        else if (c == '\n')
            snprintf(escaped, sizeof escaped, "\\n");
        else if (c < 0x20 || c == 0x7F)
            snprintf(escaped, sizeof escaped, "\\u%04x", c);
        else
            snprintf(escaped, sizeof escaped, "%c", c);
        put(j, escaped);
    }
    put(j, "\"");
}

/* id and domain go along as they are. */
static status put_kept(job *j, const cJSON *json)
{
    static const char *const keys[] = {"id", "domain"};
    for (int i = 0; json && i < 2; i++) {
        const cJSON *item = json_find(json, keys[i]);
        if (!item)
            continue;
        char *text = cJSON_PrintUnformatted(item);
        if (!text)
            return status_fail(STATUS_NO_MEMORY, "%s: no memory for its %s", j->name, keys[i]);
        put(j, ", \"");
        put(j, keys[i]);
        put(j, "\": ");
        put(j, text);
        free(text);
    }
    return STATUS_OK;
}

static status write_out(job *j)
{
    if (j->out.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for the output");
    size_t n = j->out.size ? fwrite(j->out.data, 1, j->out.size, stdout) : 0;
    if (n != j->out.size)
        return status_fail(STATUS_IO, "standard output: cannot be written (%s)", strerror(errno));
    bytes_reset(&j->out);
    return STATUS_OK;
}

/* ---- lines ---- */

static status encode(job *j, const cJSON *json, const char *text, size_t size)
{
    const int32_t *ids;
    size_t n;
    TRY(tokenizer_encode(j->t, j->scratch, text, size, options.special, &ids, &n));
    put(j, "{\"token_ids\": [");
    for (size_t i = 0; i < n; i++) {
        char number[16];
        snprintf(number, sizeof number, i ? ", %d" : "%d", (int)ids[i]);
        put(j, number);
    }
    put(j, "]");
    TRY(put_kept(j, json));
    put(j, "}\n");
    return write_out(j);
}

static status add_text(job *j, status st, const char *text, size_t size)
{
    TRY(st);
    bytes_put(&j->text, text, size);
    return STATUS_OK;
}

static status decode(job *j, const char *where, const cJSON *json)
{
    const cJSON *list;
    const char *text = NULL;
    size_t size = 0;
    int index = 0;
    TRY(json_get_array(json, where, "token_ids", &list));
    bytes_reset(&j->text);
    tokenizer_stream_reset(j->stream);
    for (const cJSON *item = list->child; item; item = item->next, index++) {
        int64_t id;
        TRY(json_item_int(item, where, index, 0, INT32_MAX, &id));
        status st = tokenizer_stream_push(j->stream, (int32_t)id, &text, &size);
        TRY(add_text(j, st, text, size));
    }
    status st = tokenizer_stream_flush(j->stream, &text, &size);
    TRY(add_text(j, st, text, size));
    put(j, "{\"text\": ");
    put_json_string(j, (const char *)j->text.data, j->text.size);
    TRY(put_kept(j, json));
    put(j, "}\n");
    return write_out(j);
}

/* The parser ends strings at a NUL character; a text with one would silently lose its end. */
static status refuse_nul(const char *where, line l)
{
    if (memmem(l.text, l.size, "\\u0000", 6) || memchr(l.text, 0, l.size))
        return status_fail(STATUS_UNSUPPORTED, "%s: NUL characters in JSON lines are not supported (a plain text may hold them)",
                           where);
    return STATUS_OK;
}

static status one_line(job *j, line l, bool json)
{
    char where[512];
    snprintf(where, sizeof where, "%.400s: line %zu", j->name, l.number);
    if (!json) {
        status st = encode(j, NULL, l.text, l.size);
        return st == STATUS_BAD_INPUT ? status_fail(st, "%s: %s", where, status_message()) : st;
    }
    if (is_blank(l))
        return STATUS_OK;
    cJSON *tree = NULL;
    TRY(refuse_nul(where, l));
    TRY(json_parse(where, l.text, l.size, &tree));
    status st;
    if (options.decode) {
        st = decode(j, where, tree);
    } else {
        const char *text = json_find(tree, "text")->valuestring;
        st = encode(j, tree, text, strlen(text));
        if (st == STATUS_BAD_INPUT)
            st = status_fail(st, "%s: %s", where, status_message());
    }
    cJSON_Delete(tree);
    return st;
}

static status run(const char *path, job *j)
{
    TRY(tokenizer_load(options.model, &j->t));
    TRY(tokenizer_scratch_create(j->t, &j->scratch));
    TRY(tokenizer_stream_create(j->t, !options.special, &j->stream));
    TRY(read_all(path, j));
    bool json = options.decode || is_json(j);
    line l = {0};
    for (size_t at = 0; next_line(j, &at, &l);)
        TRY(one_line(j, l, json));
    return fflush(stdout) == 0 ? STATUS_OK : status_fail(STATUS_IO, "standard output: cannot be written (%s)", strerror(errno));
}

int tokenize_command(int argc, char **argv)
{
    const char *path = NULL;
    int n = 0;
    options_wish wish;
    options.decode = false;
    status st = options_parse(&table, argc, argv, &wish, &path, &n);
    if (st == STATUS_OK && wish != OPTIONS_RUN) {
        options_print(&table, wish, stdout);
        return 0;
    }
    job j = {0};
    if (st == STATUS_OK)
        st = run(n ? path : NULL, &j);
    if (st != STATUS_OK)
        fprintf(stderr, "convoke tokenize: %s\n", status_message());
    tokenizer_stream_destroy(j.stream);
    tokenizer_scratch_destroy(j.scratch);
    tokenizer_destroy(j.t);
    bytes_clear(&j.in);
    bytes_clear(&j.text);
    bytes_clear(&j.out);
    return status_exit_code(st);
}
