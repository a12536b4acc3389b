#include "placement/routing_shape.h"

#include "proto/json.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_COUNT   65535
#define MAX_DOMAINS 4096

status routing_shape_check(const char *where, const routing_shape *s)
{
    if (s->n_experts < 1 || s->n_experts > MAX_COUNT)
        return status_fail(STATUS_BAD_INPUT, "%s: %d experts are outside 1 to %d", where, s->n_experts, MAX_COUNT);
    if (s->top_k < 0 || s->top_k > s->n_experts)
        return status_fail(STATUS_BAD_INPUT, "%s: %d choices of %d experts cannot be", where, s->top_k, s->n_experts);
    if (s->n_layers < 1 || s->n_layers > MAX_COUNT)
        return status_fail(STATUS_BAD_INPUT, "%s: %d layers are outside 1 to %d", where, s->n_layers, MAX_COUNT);
    if (s->n_domains < 1 || s->n_domains > MAX_DOMAINS)
        return status_fail(STATUS_BAD_INPUT, "%s: %d domains are outside 1 to %d", where, s->n_domains, MAX_DOMAINS);
    for (int l = 0; l < s->n_layers; l++)
        if (s->layer_numbers[l] < 0 || (l > 0 && s->layer_numbers[l] <= s->layer_numbers[l - 1]))
            return status_fail(STATUS_BAD_INPUT, "%s: layer numbers do not rise at %d", where, s->layer_numbers[l]);
    for (int d = 0; d < s->n_domains; d++)
        if (routing_shape_find_domain(s, s->domains[d]) != d)
            return status_fail(STATUS_BAD_INPUT, "%s: domain \"%.100s\" is listed twice", where, s->domains[d]);
    return STATUS_OK;
}

void routing_shape_clear(routing_shape *copy)
{
    for (int d = 0; copy->domains && d < copy->n_domains; d++)
        free((void *)copy->domains[d]);
    free((void *)copy->domains);
    free((void *)copy->layer_numbers);
    free((void *)copy->model);
    *copy = (routing_shape){0};
}

status routing_shape_copy(const routing_shape *shape, routing_shape *out)
{
    routing_shape s = *shape;
    size_t n_layers = (size_t)s.n_layers, n_domains = (size_t)s.n_domains;
    int *layers = calloc(n_layers + 1, sizeof *layers);
    char **domains = calloc(n_domains + 1, sizeof *domains);
    bool complete = layers && domains;
    for (size_t l = 0; complete && l < n_layers; l++)
        layers[l] = shape->layer_numbers[l];
    for (size_t d = 0; complete && d < n_domains; d++)
        complete = (domains[d] = strdup(shape->domains[d])) != NULL;
    s.layer_numbers = layers;
    s.domains = (const char *const *)domains;
    s.model = strdup(shape->model ? shape->model : "");
    if (!complete || !s.model) {
        routing_shape_clear(&s);
        return status_fail(STATUS_NO_MEMORY, "no memory for the names of %zu layers and %zu domains", n_layers, n_domains);
    }
    *out = s;
    return STATUS_OK;
}

int routing_shape_find_domain(const routing_shape *shape, const char *name)
{
    for (int d = 0; d < shape->n_domains; d++)
        if (strcmp(shape->domains[d], name) == 0)
            return d;
    return -1;
}

status routing_shape_same_model(const char *where_a, const routing_shape *a, const char *where_b, const routing_shape *b)
{
    if (strcmp(a->model, b->model) != 0)
        return status_fail(STATUS_BAD_INPUT, "%.300s is about %s%.150s, but %.300s about %s%.150s", where_b,
                           *b->model ? "model " : "an unknown model", b->model, where_a,
                           *a->model ? "model " : "an unknown model", a->model);
    if (a->n_experts != b->n_experts || a->n_layers != b->n_layers)
        return status_fail(STATUS_BAD_INPUT, "%.300s has %d experts in %d layers, but %.300s %d in %d", where_b, b->n_experts,
                           b->n_layers, where_a, a->n_experts, a->n_layers);
    for (int l = 0; l < a->n_layers; l++)
        if (a->layer_numbers[l] != b->layer_numbers[l])
            return status_fail(STATUS_BAD_INPUT, "%.300s counts layer %d where %.300s counts layer %d", where_b,
                               b->layer_numbers[l], where_a, a->layer_numbers[l]);
    return STATUS_OK;
}

/* ---- metadata ---- */

static status write_list(const routing_shape *shape, const char *key, safetensors_writer *writer)
{
    bool layers = strcmp(key, "layers") == 0;
    cJSON *list = layers ? cJSON_CreateIntArray(shape->layer_numbers, shape->n_layers)
                         : cJSON_CreateStringArray(shape->domains, shape->n_domains);
    char *text = list ? cJSON_PrintUnformatted(list) : NULL;
    status st = text ? safetensors_writer_metadata(writer, key, text)
                     : status_fail(STATUS_NO_MEMORY, "no memory to write the list of %s", key);
    cJSON_free(text);
    cJSON_Delete(list);
    return st;
}

status routing_shape_write(const routing_shape *shape, safetensors_writer *writer)
{
    char number[16];
    TRY(safetensors_writer_metadata(writer, "format", "convoke-routing"));
    TRY(safetensors_writer_metadata(writer, "model", shape->model));
    snprintf(number, sizeof number, "%d", shape->n_experts);
    TRY(safetensors_writer_metadata(writer, "n_experts", number));
    snprintf(number, sizeof number, "%d", shape->top_k);
    TRY(safetensors_writer_metadata(writer, "top_k", number));
    TRY(write_list(shape, "layers", writer));
    return write_list(shape, "domains", writer);
}

static status read_number(const safetensors *file, const char *key, int fallback, int *out)
{
    const char *text = safetensors_metadata(file, key);
    if (!text && fallback >= 0) {
        *out = fallback;
        return STATUS_OK;
    }
    if (!text)
        return status_fail(STATUS_BAD_INPUT, "%s: metadata %s is missing", safetensors_path(file), key);
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < 0 || value > MAX_COUNT)
        return status_fail(STATUS_BAD_INPUT, "%s: metadata %s is \"%.40s\", not a number from 0 to %d", safetensors_path(file),
                           key, text, MAX_COUNT);
    *out = (int)value;
    return STATUS_OK;
}

/* The list behind `key`, in a tree of its own. */
static status read_list(const safetensors *file, const char *key, const char *text, cJSON **out)
{
    char where[1024];
    cJSON *list;
    snprintf(where, sizeof where, "%.900s: metadata %s", safetensors_path(file), key);
    TRY(json_parse(where, text, strlen(text), &list));
    int n = cJSON_IsArray(list) ? cJSON_GetArraySize(list) : 0;
    if (n < 1 || n > MAX_COUNT) {
        cJSON_Delete(list);
        return status_fail(STATUS_BAD_INPUT, "%s is not a list of 1 to %d entries", where, MAX_COUNT);
    }
    *out = list;
    return STATUS_OK;
}

static status read_layers(const safetensors *file, int **layers, int *n_layers)
{
    const char *text = safetensors_metadata(file, "layers");
    if (!text)
        return status_fail(STATUS_BAD_INPUT, "%s: metadata layers is missing", safetensors_path(file));
    cJSON *list;
    TRY(read_list(file, "layers", text, &list));
    char where[1024];
    snprintf(where, sizeof where, "%.900s: metadata layers", safetensors_path(file));
    int n = cJSON_GetArraySize(list), l = 0;
    int *numbers = calloc((size_t)n, sizeof *numbers);
    status st = numbers ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for %d numbers", where, n);
    for (const cJSON *item = list->child; item && st == STATUS_OK; item = item->next, l++) {
        int64_t number = 0;
        st = json_item_int(item, where, l, 0, INT32_MAX, &number);
        numbers[l] = (int)number;
    }
    cJSON_Delete(list);
    if (st != STATUS_OK) {
        free(numbers);
        return st;
    }
    *layers = numbers;
    *n_layers = n;
    return STATUS_OK;
}

/* Fills names from the tree, which keeps owning them. */
static status read_domains(const safetensors *file, const cJSON *list, const char **names)
{
    int d = 0;
    for (const cJSON *item = list->child; item; item = item->next) {
        if (!cJSON_IsString(item))
            return status_fail(STATUS_BAD_INPUT, "%s: metadata domains: entry %d is not a name", safetensors_path(file), d);
        names[d++] = item->valuestring;
    }
    return STATUS_OK;
}

status routing_shape_read(const safetensors *file, routing_shape *out)
{
    const char *path = safetensors_path(file), *format = safetensors_metadata(file, "format");
    if (!format || strcmp(format, "convoke-routing") != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: neither a routing trace nor statistics: metadata format is \"%.40s\"", path,
                           format ? format : "");
    const char *model = safetensors_metadata(file, "model"), *domains = safetensors_metadata(file, "domains");
    routing_shape s = {.model = model ? model : ""}, copy = {0};
    TRY(read_number(file, "n_experts", -1, &s.n_experts));
    TRY(read_number(file, "top_k", 0, &s.top_k));
    int *layers = NULL;
    const char **names = NULL;
    cJSON *list = NULL;
    TRY(read_layers(file, &layers, &s.n_layers));
    s.layer_numbers = layers;
    status st;
    TRY_GOTO(read_list(file, "domains", domains ? domains : "[\"default\"]", &list), out);
    s.n_domains = cJSON_GetArraySize(list);
    names = calloc((size_t)s.n_domains, sizeof *names);
    if (!names) {
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory for %d names", path, s.n_domains);
        goto out;
    }
    TRY_GOTO(read_domains(file, list, names), out);
    s.domains = names;
    TRY_GOTO(routing_shape_check(path, &s), out);
    TRY_GOTO(routing_shape_copy(&s, &copy), out);
    *out = copy;
out:
    free(layers);
    free(names);
    cJSON_Delete(list);
    return st;
}
