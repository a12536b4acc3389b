/* format_tensorrt_llm.c - TensorRT-LLM's expert load balancer, YAML:
 *
 *   num_slots: 8
 *   initial_global_assignments: {3: [0, 1, 2, 3, 4, 5, 0, 1], 4: [...]}     layer: the expert in each slot
 *   layer_updates_per_iter: 0                                               0: static
 *
 * Slots lie in equal blocks, one per rank of expert parallelism; layers have the model's own numbers. The same keys one level
 * down, below moe_config: load_balancer: or moe_load_balancer:, are found too. A num_slots without assignments is a wish, not a
 * plan. */
#include "placement/planner/import.h"

#include "placement/planner/yaml_file.h"

#include <stdio.h>
#include <stdlib.h>

static const cJSON *find_section(const cJSON *tree)
{
    const cJSON *config = json_find(tree, "moe_config"), *section = json_find(tree, "moe_load_balancer");
    if (cJSON_IsObject(config) && json_find(config, "load_balancer"))
        section = json_find(config, "load_balancer");
    return cJSON_IsObject(section) ? section : tree;
}

static int compare_layers(const void *a, const void *b)
{
    const cJSON *x = *(const cJSON *const *)a, *y = *(const cJSON *const *)b;
    long l = strtol(x->string, NULL, 10), m = strtol(y->string, NULL, 10);
    return (l > m) - (l < m);
}

static status check_key(const char *path, const cJSON *list)
{
    char *end;
    long number = strtol(list->string, &end, 10);
    if (end == list->string || *end || number < 0 || number >= INT32_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: initial_global_assignments: \"%.40s\" is not the number of a layer", path,
                           list->string);
    return STATUS_OK;
}

/* The lists by rising layer, and how many experts they name. */
static status collect(const char *path, const cJSON *assignments, int n_slots, const cJSON **lists, int *n_experts)
{
    int l = 0;
    for (const cJSON *list = assignments->child; list; list = list->next, l++) {
        char where[1024];
        int i = 0;
        TRY(check_key(path, list));
        snprintf(where, sizeof where, "%.900s: layer %.40s", path, list->string);
        if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != n_slots)
            return status_fail(STATUS_BAD_INPUT, "%s: not a list of num_slots = %d experts", where, n_slots);
        const cJSON *item;
        cJSON_ArrayForEach(item, list)
        {
            int64_t expert;
            TRY(json_item_int(item, where, i++, 0, PLAN_MAX_EXPERTS - 1, &expert));
            *n_experts = expert >= *n_experts ? (int)expert + 1 : *n_experts;
        }
        lists[l] = list;
    }
    qsort(lists, (size_t)l, sizeof *lists, compare_layers);
    return STATUS_OK;
}

static status fill(const char *path, const cJSON *const *lists, const import_options *o, slot_layout *s)
{
    for (int l = 0; l < s->n_layers; l++) {
        int *to = s->expert_of_slot + (size_t)l * (size_t)s->n_slots;
        s->layer_numbers[l] = (int)strtol(lists[l]->string, NULL, 10);
        const cJSON *item;
        cJSON_ArrayForEach(item, lists[l]) *to++ = (int)item->valuedouble;
    }
    if (!o->layer_numbers)
        return STATUS_OK;
    int *numbers;
    TRY(import_layer_numbers(path, o, s->n_layers, 0, &numbers));
    for (int l = 0; l < s->n_layers; l++)
        s->layer_numbers[l] = numbers[l];
    free(numbers);
    return STATUS_OK;
}

static status read_section(const char *path, const cJSON *section, const import_options *o, slot_layout *s)
{
    int64_t n_slots;
    int n_ranks, n_experts = 0;
    const cJSON *assignments = json_find(section, "initial_global_assignments");
    TRY(json_get_int(section, path, "num_slots", 1, INT32_MAX, &n_slots));
    if (!cJSON_IsObject(assignments) || !assignments->child)
        return status_fail(STATUS_BAD_INPUT, "%s: initial_global_assignments is missing or no mapping of layers", path);
    TRY(import_ranks(path, o, &n_ranks));
    int n_layers = cJSON_GetArraySize(assignments);
    const cJSON **lists = calloc((size_t)n_layers, sizeof *lists);
    if (!lists)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d layers", path, n_layers);
    status st = collect(path, assignments, (int)n_slots, lists, &n_experts);
    if (st == STATUS_OK && o->n_experts && n_experts > o->n_experts)
        st = import_agree(path, "experts", n_experts, o->n_experts, &n_experts);
    if (st == STATUS_OK)
        st = slot_layout_create(path, n_layers, (int)n_slots, o->n_experts ? o->n_experts : n_experts, n_ranks, s);
    if (st == STATUS_OK)
        st = fill(path, lists, o, s);
    free(lists);
    return st;
}

static status import_tensorrt_llm(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                                  format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "tensorrt-llm: one file at a time");
    cJSON *tree;
    slot_layout s = {0};
    TRY(yaml_read_file(paths[0], &tree));
    status st = cJSON_IsObject(tree) ? read_section(paths[0], find_section(tree), options, &s)
                                     : status_fail(STATUS_BAD_INPUT, "%s: the file holds no mapping", paths[0]);
    if (st == STATUS_OK)
        st = import_write_slots(paths[0], &s, NULL, options, out_path);
    slot_layout_clear(&s);
    cJSON_Delete(tree);
    *made = FORMAT_PLAN;
    return st;
}

static void write_yaml(FILE *file, const slot_layout *s)
{
    fprintf(file, "num_slots: %d\ninitial_global_assignments:\n", s->n_slots);
    for (int l = 0; l < s->n_layers; l++) {
        fprintf(file, "  %d: [", s->layer_numbers[l]);
        for (int i = 0; i < s->n_slots; i++)
            fprintf(file, i ? ", %d" : "%d", s->expert_of_slot[(size_t)l * (size_t)s->n_slots + (size_t)i]);
        fprintf(file, "]\n");
    }
    fprintf(file, "layer_updates_per_iter: 0\n");
}

static status export_tensorrt_llm(const plan *p, const char *path)
{
    slot_layout s;
    int lost;
    text_file out;
    TRY(slot_layout_of_plan("tensorrt-llm", p, &s, &lost));
    status st = text_file_begin(path, &out);
    if (st == STATUS_OK) {
        write_yaml(out.stream, &s);
        st = text_file_finish(&out);
    }
    slot_layout_clear(&s);
    if (st == STATUS_OK)
        export_warn("tensorrt-llm", lost);
    return st;
}

const file_format format_tensorrt_llm = {"tensorrt-llm", "YAML of num_slots and initial_global_assignments: a plan",
                                         import_tensorrt_llm, export_tensorrt_llm, NULL};
