/* format_vllm_ascend.c - the expert map of vllm-ascend, JSON:
 *
 *   {"moe_layer_count": L, "layer_list": [{"layer_id": 0, "device_count": G,
 *    "device_list": [{"device_id": 0, "device_expert": [0, 1, ...]}, ...]}, ...]}
 *
 * layer_id counts MoE layers from 0; the model's own numbers come by --layer-numbers. Every device holds as many experts, as the
 * engine makes one tensor of them. */
#include "placement/planner/import.h"

#include "proto/json.h"

#include <stdio.h>
#include <stdlib.h>

#define MAX_BYTES ((size_t)1 << 30)

/* What all layers and devices share, taken from the first; n_experts is the largest id + 1. */
typedef struct {
    int n_layers, n_devices, block, n_experts;
    int *slots; /* [n_layers][n_devices][block]; NULL while measuring */
} ascend_map;

static status read_device(const cJSON *device, const char *where, int layer, int number, ascend_map *m)
{
    char place[1100];
    int64_t id, expert;
    const cJSON *experts, *item;
    snprintf(place, sizeof place, "%.1000s: device %d", where, number);
    if (!cJSON_IsObject(device))
        return status_fail(STATUS_BAD_INPUT, "%s is not an object", place);
    TRY(json_get_int(device, place, "device_id", number, number, &id));
    TRY(json_get_array(device, place, "device_expert", &experts));
    int n = cJSON_IsArray(experts) ? cJSON_GetArraySize(experts) : 0, i = 0;
    m->block = m->block ? m->block : n;
    if (n == 0 || n != m->block)
        return status_fail(STATUS_BAD_INPUT, "%s: device_expert has %d entries where the first device has %d", place, n,
                           m->block);
    cJSON_ArrayForEach(item, experts)
    {
        TRY(json_item_int(item, place, i, 0, PLAN_MAX_EXPERTS - 1, &expert));
        if (m->slots)
            m->slots[((size_t)layer * (size_t)m->n_devices + (size_t)number) * (size_t)m->block + (size_t)i] = (int)expert;
        m->n_experts = expert >= m->n_experts ? (int)expert + 1 : m->n_experts;
        i++;
    }
    return STATUS_OK;
}

static status read_layer(const cJSON *layer, const char *path, int number, ascend_map *m)
{
    char where[1024];
    int64_t id, count;
    const cJSON *devices, *device;
    int d = 0;
    snprintf(where, sizeof where, "%.900s: layer_list entry %d", path, number);
    if (!cJSON_IsObject(layer))
        return status_fail(STATUS_BAD_INPUT, "%s is not an object", where);
    TRY(json_get_int(layer, where, "layer_id", number, number, &id));
    TRY(json_get_int(layer, where, "device_count", 1, PLAN_MAX_RANKS, &count));
    TRY(json_get_array(layer, where, "device_list", &devices));
    m->n_devices = m->n_devices ? m->n_devices : (int)count;
    if (count != m->n_devices || cJSON_GetArraySize(devices) != count)
        return status_fail(STATUS_BAD_INPUT, "%s: %d devices listed, device_count %d, and %d in the first layer", where,
                           cJSON_GetArraySize(devices), (int)count, m->n_devices);
    cJSON_ArrayForEach(device, devices) TRY(read_device(device, where, number, d++, m));
    return STATUS_OK;
}

static status read_layers(const cJSON *tree, const char *path, ascend_map *m)
{
    int64_t count;
    const cJSON *layers, *layer;
    int l = 0;
    TRY(json_get_int(tree, path, "moe_layer_count", 1, 65535, &count));
    TRY(json_get_array(tree, path, "layer_list", &layers));
    if (cJSON_GetArraySize(layers) != count)
        return status_fail(STATUS_BAD_INPUT, "%s: layer_list has %d entries, but moe_layer_count is %d", path,
                           cJSON_GetArraySize(layers), (int)count);
    cJSON_ArrayForEach(layer, layers) TRY(read_layer(layer, path, l++, m));
    m->n_layers = l;
    return STATUS_OK;
}

/* Measured first, then filled: a lying count cannot ask for memory. */
static status read_map(const cJSON *tree, const char *path, const import_options *o, slot_layout *s)
{
    ascend_map m = {0};
    int n_ranks, n_experts, *numbers;
    TRY(read_layers(tree, path, &m));
    TRY(import_agree(path, "devices", m.n_devices, o->n_ranks, &n_ranks));
    n_experts = o->n_experts > m.n_experts ? o->n_experts : m.n_experts;
    if (o->n_experts)
        TRY(import_agree(path, "experts", n_experts, o->n_experts, &n_experts));
    if (m.block > INT32_MAX / m.n_devices)
        return status_fail(STATUS_UNSUPPORTED, "%s: more than 2^31 slots", path);
    TRY(import_layer_numbers(path, o, m.n_layers, 0, &numbers));
    status st = slot_layout_create(path, m.n_layers, m.n_devices * m.block, n_experts, n_ranks, s);
    for (int l = 0; st == STATUS_OK && l < s->n_layers; l++)
        s->layer_numbers[l] = numbers[l];
    free(numbers);
    TRY(st);
    m.slots = s->expert_of_slot;
    return read_layers(tree, path, &m);
}

static status import_vllm_ascend(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                                 format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "vllm-ascend: one file at a time");
    cJSON *tree;
    slot_layout s = {0};
    TRY(json_read_file(paths[0], MAX_BYTES, &tree));
    status st = cJSON_IsObject(tree) ? read_map(tree, paths[0], options, &s)
                                     : status_fail(STATUS_BAD_INPUT, "%s: the file holds no JSON object", paths[0]);
    if (st == STATUS_OK)
        st = import_write_slots(paths[0], &s, NULL, options, out_path);
    slot_layout_clear(&s);
    cJSON_Delete(tree);
    *made = FORMAT_PLAN;
    return st;
}

static void write_layer(FILE *file, const slot_layout *s, int l)
{
    int block = s->n_slots / s->n_ranks;
    fprintf(file, "  {\"layer_id\": %d, \"device_count\": %d, \"device_list\": [\n", l, s->n_ranks);
    for (int r = 0; r < s->n_ranks; r++) {
        fprintf(file, "    {\"device_id\": %d, \"device_expert\": [", r);
        for (int i = 0; i < block; i++)
            fprintf(file, i ? ", %d" : "%d", s->expert_of_slot[(size_t)l * (size_t)s->n_slots + (size_t)(r * block + i)]);
        fprintf(file, r + 1 < s->n_ranks ? "]},\n" : "]}\n");
    }
    fprintf(file, l + 1 < s->n_layers ? "  ]},\n" : "  ]}\n");
}

static status export_vllm_ascend(const plan *p, const char *path)
{
    slot_layout s;
    int lost;
    text_file out;
    TRY(slot_layout_of_plan("vllm-ascend", p, &s, &lost));
    status st = text_file_begin(path, &out);
    if (st == STATUS_OK) {
        fprintf(out.stream, "{\"moe_layer_count\": %d, \"layer_list\": [\n", s.n_layers);
        for (int l = 0; l < s.n_layers; l++)
            write_layer(out.stream, &s, l);
        fprintf(out.stream, "]}\n");
        st = text_file_finish(&out);
    }
    slot_layout_clear(&s);
    if (st == STATUS_OK)
        export_warn("vllm-ascend", lost);
    return st;
}

const file_format format_vllm_ascend = {"vllm-ascend", "JSON of layer_list, device_list, device_expert: a plan",
                                        import_vllm_ascend, export_vllm_ascend, NULL};
