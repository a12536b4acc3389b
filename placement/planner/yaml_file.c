/* yaml_file.c - the only file that sees libyaml: its events, one recursive step per list or mapping. */
#include "placement/planner/yaml_file.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

enum { MAX_DEPTH = 32, MAX_KEYS = 10000 };

typedef struct {
    yaml_parser_t parser;
    const char *where;
} yaml_reader;

static status next_event(yaml_reader *r, yaml_event_t *event)
{
    if (yaml_parser_parse(&r->parser, event))
        return STATUS_OK;
    return status_fail(STATUS_BAD_INPUT, "%s: line %zu: not YAML (%s)", r->where, r->parser.problem_mark.line + 1,
                       r->parser.problem ? r->parser.problem : "no memory");
}

static cJSON *make_scalar(const yaml_event_t *event)
{
    const char *text = (const char *)event->data.scalar.value;
    if (event->data.scalar.style != YAML_PLAIN_SCALAR_STYLE)
        return cJSON_CreateString(text);
    if (strcmp(text, "true") == 0 || strcmp(text, "false") == 0)
        return cJSON_CreateBool(text[0] == 't');
    if (strcmp(text, "null") == 0 || strcmp(text, "~") == 0 || *text == '\0')
        return cJSON_CreateNull();
    char *end;
    double value = strtod(text, &end);
    bool number = end != text && !*end && isfinite(value) && strspn(text, "+-.0123456789eE_") == strlen(text);
    return number ? cJSON_CreateNumber(value) : cJSON_CreateString(text);
}

static status read_node(yaml_reader *r, const yaml_event_t *first, int depth, cJSON **out);

static status no_memory(const yaml_reader *r)
{
    return status_fail(STATUS_NO_MEMORY, "%s: no memory to read it", r->where);
}

static status read_sequence(yaml_reader *r, int depth, cJSON *list)
{
    for (;;) {
        yaml_event_t event;
        cJSON *item = NULL;
        TRY(next_event(r, &event));
        bool end = event.type == YAML_SEQUENCE_END_EVENT;
        status st = end ? STATUS_OK : read_node(r, &event, depth + 1, &item);
        yaml_event_delete(&event);
        if (end || st != STATUS_OK)
            return st;
        cJSON_AddItemToArray(list, item);
    }
}

/* Keys of an engine's file are a few names, or layer numbers: so few that looking for a second one may be linear. */
static status read_pair(yaml_reader *r, const yaml_event_t *key, int depth, cJSON *mapping)
{
    size_t line = key->start_mark.line + 1;
    if (key->type != YAML_SCALAR_EVENT || strcmp((const char *)key->data.scalar.value, "<<") == 0)
        return status_fail(STATUS_UNSUPPORTED, "%s: line %zu: a key that is a list, a mapping, an alias or a merge", r->where,
                           line);
    const char *name = (const char *)key->data.scalar.value;
    if (cJSON_GetObjectItemCaseSensitive(mapping, name))
        return status_fail(STATUS_BAD_INPUT, "%s: line %zu: %.100s is given twice", r->where, line, name);
    yaml_event_t event;
    cJSON *item = NULL;
    TRY(next_event(r, &event));
    status st = read_node(r, &event, depth + 1, &item);
    yaml_event_delete(&event);
    TRY(st);
    if (cJSON_AddItemToObject(mapping, name, item))
        return STATUS_OK;
    cJSON_Delete(item);
    return no_memory(r);
}

static status read_mapping(yaml_reader *r, int depth, cJSON *mapping)
{
    for (int n = 0;; n++) {
        yaml_event_t key;
        TRY(next_event(r, &key));
        bool end = key.type == YAML_MAPPING_END_EVENT;
        status st = end             ? STATUS_OK
                    : n == MAX_KEYS ? status_fail(STATUS_UNSUPPORTED, "%s: a mapping of more than %d keys", r->where, MAX_KEYS)
                                    : read_pair(r, &key, depth, mapping);
        yaml_event_delete(&key);
        if (end || st != STATUS_OK)
            return st;
    }
}

static status read_node(yaml_reader *r, const yaml_event_t *first, int depth, cJSON **out)
{
    size_t line = first->start_mark.line + 1;
    if (depth > MAX_DEPTH)
        return status_fail(STATUS_UNSUPPORTED, "%s: line %zu: nested more than %d deep", r->where, line, MAX_DEPTH);
    bool list = first->type == YAML_SEQUENCE_START_EVENT, mapping = first->type == YAML_MAPPING_START_EVENT;
    if (!list && !mapping && first->type != YAML_SCALAR_EVENT)
        return status_fail(STATUS_UNSUPPORTED, "%s: line %zu: an alias, which is not followed here", r->where, line);
    cJSON *node = list ? cJSON_CreateArray() : mapping ? cJSON_CreateObject() : make_scalar(first);
    if (!node)
        return no_memory(r);
    status st = list ? read_sequence(r, depth, node) : mapping ? read_mapping(r, depth, node) : STATUS_OK;
    if (st == STATUS_OK)
        *out = node;
    else
        cJSON_Delete(node);
    return st;
}

/* stream start, document start, one node, document end, stream end */
static status read_document(yaml_reader *r, cJSON **out)
{
    cJSON *root = NULL;
    bool done = false;
    status st = STATUS_OK;
    while (st == STATUS_OK && !done) {
        yaml_event_t event;
        TRY_GOTO(next_event(r, &event), out);
        done = event.type == YAML_STREAM_END_EVENT;
        bool between = event.type == YAML_STREAM_START_EVENT || event.type == YAML_DOCUMENT_START_EVENT ||
                       event.type == YAML_DOCUMENT_END_EVENT;
        if (!done && !between)
            st = read_node(r, &event, 0, &root);
        else if (event.type == YAML_DOCUMENT_START_EVENT && root)
            st = status_fail(STATUS_UNSUPPORTED, "%s: line %zu: a second document", r->where, event.start_mark.line + 1);
        yaml_event_delete(&event);
    }
out:
    if (st == STATUS_OK && !root)
        st = status_fail(STATUS_BAD_INPUT, "%s: the file is empty", r->where);
    if (st == STATUS_OK)
        *out = root;
    else
        cJSON_Delete(root);
    return st;
}

status yaml_parse(const char *where, const void *text, size_t size, cJSON **out)
{
    yaml_reader r = {.where = where};
    if (!yaml_parser_initialize(&r.parser))
        return no_memory(&r);
    yaml_parser_set_input_string(&r.parser, text, size);
    status st = read_document(&r, out);
    yaml_parser_delete(&r.parser);
    return st;
}

status yaml_read_file(const char *path, cJSON **out)
{
    yaml_reader r = {.where = path};
    FILE *stream = fopen(path, "re");
    if (!stream)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    status st = yaml_parser_initialize(&r.parser) ? STATUS_OK : no_memory(&r);
    if (st == STATUS_OK) {
        yaml_parser_set_input_file(&r.parser, stream);
        st = read_document(&r, out);
        yaml_parser_delete(&r.parser);
    }
    fclose(stream);
    return st;
}
