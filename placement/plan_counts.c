/* The traffic a plan was made for, as kept in its file. */
#include "placement/plan.h"

#include <stdlib.h>

enum { MAX_BYTES = 256 << 20 };

static status read_layer_counts(const cJSON *list, const char *path, int layer, int n_experts, uint64_t *counts)
{
    int e = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        if (e == n_experts || !cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 0x1p63))
            return status_fail(STATUS_BAD_INPUT, "%s: tokens_per_expert: layer %d is not %d counts", path, layer, n_experts);
        counts[e++] = (uint64_t)item->valuedouble;
    }
    return e == n_experts ? STATUS_OK
                          : status_fail(STATUS_BAD_INPUT, "%s: tokens_per_expert: layer %d has %d counts for %d experts", path,
                                        layer, e, n_experts);
}

status plan_read_counts(const char *path, const plan *made, uint64_t **out)
{
    cJSON *root;
    TRY(json_read_file(path, MAX_BYTES, &root));
    const cJSON *layers = json_find(root, "tokens_per_expert"), *list;
    uint64_t *counts = NULL;
    status st = STATUS_OK;
    if (!layers)
        goto out;
    counts = calloc((size_t)made->n_layers * (size_t)made->n_experts, sizeof *counts);
    if (!counts)
        TRY_GOTO(status_fail(STATUS_NO_MEMORY, "%s: no memory for its counts", path), out);
    int l = 0;
    cJSON_ArrayForEach(list, layers)
    {
        if (l == made->n_layers || !cJSON_IsArray(list))
            TRY_GOTO(status_fail(STATUS_BAD_INPUT, "%s: tokens_per_expert is not a list for each of the %d layers", path,
                                 made->n_layers),
                     out);
        TRY_GOTO(read_layer_counts(list, path, l, made->n_experts, counts + (size_t)l * (size_t)made->n_experts), out);
        l++;
    }
    if (l != made->n_layers)
        TRY_GOTO(status_fail(STATUS_BAD_INPUT, "%s: tokens_per_expert has %d layers, the plan %d", path, l, made->n_layers), out);
out:
    cJSON_Delete(root);
    if (st == STATUS_OK)
        *out = counts;
    else
        free(counts);
    return st;
}
