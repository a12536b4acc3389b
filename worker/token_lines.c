#include "worker/token_lines.h"
#include "proto/json.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static status no_memory(const char *where)
{
    return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
}

/* Room for one more item. */
static status make_room(void **items, int n, int *capacity, size_t item_size)
{
    if (n < *capacity)
        return STATUS_OK;
    int wanted = *capacity ? 2 * *capacity : 16;
    void *grown = realloc(*items, (size_t)wanted * item_size);
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d token lines", wanted);
    *items = grown;
    *capacity = wanted;
    return STATUS_OK;
}

static status domain_index(token_lines *all, const char *where, const char *name, int *out)
{
    for (int i = 0; i < all->n_domains; i++)
        if (strcmp(all->domains[i], name) == 0) {
            *out = i;
            return STATUS_OK;
        }
    if (all->n_domains == TOKEN_LINES_MAX_DOMAINS)
        return status_fail(STATUS_BAD_INPUT, "%s: more than %d different domains", where, TOKEN_LINES_MAX_DOMAINS);
    TRY(make_room((void **)&all->domains, all->n_domains, &all->domain_capacity, sizeof *all->domains));
    char *copy = strdup(name);
    if (!copy)
        return no_memory(where);
    *out = all->n_domains;
    all->domains[all->n_domains++] = copy;
    return STATUS_OK;
}

static status read_ids(const char *where, const cJSON *object, int vocab, token_line *line)
{
    const cJSON *list;
    if (!json_find(object, "token_ids") && json_find(object, "text"))
        return status_fail(STATUS_BAD_INPUT, "%s: has text but no token_ids (convoke tokenize turns text into token ids)", where);
    TRY(json_get_array(object, where, "token_ids", &list));
    int n = cJSON_GetArraySize(list);
    if (n < 1)
        return status_fail(STATUS_BAD_INPUT, "%s: token_ids is empty", where);
    line->ids = malloc((size_t)n * sizeof *line->ids);
    if (!line->ids)
        return no_memory(where);
    char place[512];
    snprintf(place, sizeof place, "%s: token_ids", where);
    for (const cJSON *item = list->child; item; item = item->next) {
        int64_t id;
        TRY(json_item_int(item, place, line->n_ids, 0, vocab - 1, &id));
        line->ids[line->n_ids++] = (int)id;
    }
    return STATUS_OK;
}

static status read_object(token_lines *all, const char *where, const cJSON *object, int vocab, token_line *line)
{
    if (!cJSON_IsObject(object))
        return status_fail(STATUS_BAD_INPUT, "%s: not a JSON object", where);
    TRY(read_ids(where, object, vocab, line));
    const char *text;
    if (json_find(object, "domain")) {
        TRY(json_get_string(object, where, "domain", &text));
        TRY(domain_index(all, where, text, &line->domain));
    }
    if (json_find(object, "id")) {
        TRY(json_get_string(object, where, "id", &text));
        line->id = strdup(text);
        if (!line->id)
            return no_memory(where);
    }
    return STATUS_OK;
}

static bool is_blank(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (!memchr(" \t\r\n", text[i], 4))
            return false;
    return true;
}

static status add_line(token_lines *all, const char *file, int number, const char *text, size_t size, int vocab)
{
    char where[400];
    snprintf(where, sizeof where, "%.360s: line %d", file, number);
    if (is_blank(text, size))
        return STATUS_OK;
    if (memchr(text, '\0', size))
        return status_fail(STATUS_BAD_INPUT, "%s: holds a zero byte", where);
    if (all->n_lines == TOKEN_LINES_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: more than %d token lines", where, TOKEN_LINES_MAX);
    TRY(make_room((void **)&all->lines, all->n_lines, &all->capacity, sizeof *all->lines));
    cJSON *object = NULL;
    TRY(json_parse(where, text, size, &object));
    token_line line = {.domain = -1, .line_number = number};
    status st = read_object(all, where, object, vocab, &line);
    cJSON_Delete(object);
    if (st != STATUS_OK) {
        free(line.ids);
        free(line.id);
        return st;
    }
    all->lines[all->n_lines++] = line;
    return STATUS_OK;
}

static status too_long(const char *file, int number)
{
    return status_fail(STATUS_BAD_INPUT, "%s: line %d: longer than %zu MiB", file, number, TOKEN_LINE_MAX_BYTES >> 20);
}

/* Hands *out over when it holds something; empties it otherwise. */
static status finish(const char *where, status st, token_lines *all, token_lines *out)
{
    if (st == STATUS_OK && all->n_lines == 0)
        st = status_fail(STATUS_BAD_INPUT, "%s: holds no token lines", where);
    if (st == STATUS_OK)
        *out = *all;
    else
        token_lines_clear(all);
    return st;
}

status token_lines_parse(const char *where, const char *text, size_t size, int vocab, token_lines *out)
{
    token_lines all = {0};
    status st = STATUS_OK;
    size_t at = 0;
    for (int number = 1; st == STATUS_OK && at < size; number++) {
        const char *newline = memchr(text + at, '\n', size - at);
        size_t length = newline ? (size_t)(newline - (text + at)) : size - at;
        st = length > TOKEN_LINE_MAX_BYTES ? too_long(where, number) : add_line(&all, where, number, text + at, length, vocab);
        at += length + 1;
    }
    return finish(where, st, &all, out);
}

status token_lines_read(const char *path, int vocab, token_lines *out)
{
    token_lines all = {0};
    status st = STATUS_OK;
    FILE *file = fopen(path, "rb");
    if (!file)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    /* A buffer of fixed size: a file without line ends (or a device) must not take all memory. */
    char *buffer = malloc(TOKEN_LINE_MAX_BYTES + 2);
    if (!buffer)
        TRY_GOTO(no_memory(path), out);
    for (int number = 1; st == STATUS_OK; number++) {
        size_t length = 0;
        int c;
        while (length <= TOKEN_LINE_MAX_BYTES && (c = getc_unlocked(file)) != EOF && c != '\n')
            buffer[length++] = (char)c;
        if (length > TOKEN_LINE_MAX_BYTES)
            st = too_long(path, number);
        else if (ferror(file))
            st = status_fail(STATUS_IO, "%s: cannot be read (%s)", path, strerror(errno));
        else
            st = add_line(&all, path, number, buffer, length, vocab);
        if (feof(file))
            break;
    }
out:
    free(buffer);
    fclose(file);
    return finish(path, st, &all, out);
}

void token_lines_clear(token_lines *all)
{
    for (int i = 0; i < all->n_lines; i++) {
        free(all->lines[i].ids);
        free(all->lines[i].id);
    }
    for (int i = 0; i < all->n_domains; i++)
        free(all->domains[i]);
    free(all->lines);
    free(all->domains);
    *all = (token_lines){0};
}
