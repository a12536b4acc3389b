/* format_vllm.c - vLLM's custom expert placement, JSON: {"expert_to_ep_rank": [rank of each expert]}.
 *
 * One list for all layers, one rank per expert, as many experts on every rank (the first E mod G may hold one more, as its
 * built-in placements have it). So a plan whose layers differ, or that has replicas, cannot be written, and is refused. */
#include "placement/planner/import.h"

#include "proto/json.h"

#include <stdio.h>
#include <stdlib.h>

#define MAX_BYTES ((size_t)1 << 28)

static status write_plan(const char *path, const cJSON *ranks, const import_options *o, int n_experts, const char *out_path)
{
    int64_t rank, largest = 0;
    int i = 0, n_ranks, *numbers;
    const cJSON *item;
    cJSON_ArrayForEach(item, ranks)
    {
        TRY(json_item_int(item, path, i++, 0, PLAN_MAX_RANKS - 1, &rank));
        largest = rank > largest ? rank : largest;
    }
    n_ranks = o->n_ranks ? o->n_ranks : (int)largest + 1;
    if (largest >= n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: expert_to_ep_rank: rank %d is outside 0 to %d", path, (int)largest,
                           n_ranks - 1);
    if (o->n_nodes > n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: %d ranks cannot be on %d nodes", path, n_ranks, o->n_nodes);
    TRY(import_layer_numbers(path, o, o->n_layers, 0, &numbers));
    const plan_shape shape = {.n_ranks = n_ranks, .n_experts = n_experts, .n_layers = o->n_layers, .layer_numbers = numbers};
    plan p;
    status st = plan_contiguous(&shape, NULL, &p);
    free(numbers);
    TRY(st);
    for (int r = 0; o->n_nodes > 0 && r < n_ranks; r++)
        p.node_of_rank[r] = (int)((long long)r * o->n_nodes / n_ranks);
    int *to = p.copy_ranks;
    for (int l = 0; l < p.n_layers; l++)
        cJSON_ArrayForEach(item, ranks) *to++ = (int)item->valuedouble;
    snprintf(p.name, sizeof p.name, "%s", import_base_name(path));
    st = plan_write(&p, o->model, out_path);
    plan_clear(&p);
    return st;
}

static status read_tree(const char *path, const cJSON *tree, const import_options *options, const char *out_path)
{
    const cJSON *ranks;
    import_options o = *options;
    int n_experts, listed = 0;
    if (!cJSON_IsObject(tree))
        return status_fail(STATUS_BAD_INPUT, "%s: the file holds no JSON object", path);
    TRY(json_get_array(tree, path, "expert_to_ep_rank", &ranks));
    if (!cJSON_IsArray(ranks) || !ranks->child)
        return status_fail(STATUS_BAD_INPUT, "%s: expert_to_ep_rank is not a list of ranks", path);
    TRY(import_agree(path, "experts", cJSON_GetArraySize(ranks), o.n_experts, &n_experts));
    if (o.layer_numbers) {
        int *rows;
        TRY(import_pick_rows(path, &o, INT32_MAX, NULL, &rows, &listed));
        free(rows);
    }
    TRY(import_agree(path, "layers", listed, o.n_layers, &o.n_layers));
    if (o.n_layers == 0)
        return import_ask(path, "layers have experts", "layers");
    if ((int64_t)o.n_layers * n_experts > 1 << 24)
        return status_fail(STATUS_UNSUPPORTED, "%s: %d layers of %d experts are more than are taken in", path, o.n_layers,
                           n_experts);
    return write_plan(path, ranks, &o, n_experts, out_path);
}

static status import_vllm(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                          format_kind *made)
{
    if (n_paths != 1)
        return status_fail(STATUS_USAGE, "vllm: one file at a time");
    cJSON *tree;
    TRY(json_read_file(paths[0], MAX_BYTES, &tree));
    status st = read_tree(paths[0], tree, options, out_path);
    cJSON_Delete(tree);
    *made = FORMAT_PLAN;
    return st;
}

static status check_plan(const plan *p)
{
    for (int l = 0; l < p->n_layers; l++)
        for (int e = 0; e < p->n_experts; e++) {
            if (plan_n_copies(p, l, e) > 1)
                return status_fail(STATUS_UNSUPPORTED,
                                   "vllm: layer %d: expert %d has replicas, which expert_to_ep_rank cannot say",
                                   p->layer_numbers[l], e);
            if (plan_copies(p, l, e)[0] != plan_copies(p, 0, e)[0])
                return status_fail(
                    STATUS_UNSUPPORTED,
                    "vllm: expert %d is on rank %d in layer %d and on rank %d in layer %d; expert_to_ep_rank holds for "
                    "all layers",
                    e, plan_copies(p, 0, e)[0], p->layer_numbers[0], plan_copies(p, l, e)[0], p->layer_numbers[l]);
        }
    for (int r = 0; r < p->n_ranks; r++) {
        int n = 0, want = p->n_experts / p->n_ranks + (r < p->n_experts % p->n_ranks);
        for (int e = 0; e < p->n_experts; e++)
            n += plan_copies(p, 0, e)[0] == r;
        if (n != want)
            return status_fail(STATUS_UNSUPPORTED, "vllm: rank %d holds %d experts, but vLLM sets room aside for %d", r, n, want);
    }
    return STATUS_OK;
}

static status export_vllm(const plan *p, const char *path)
{
    text_file out;
    TRY(check_plan(p));
    TRY(text_file_begin(path, &out));
    fprintf(out.stream, "{\"expert_to_ep_rank\": [");
    for (int e = 0; e < p->n_experts; e++)
        fprintf(out.stream, e ? ", %d" : "%d", plan_copies(p, 0, e)[0]);
    fprintf(out.stream, "]}\n");
    return text_file_finish(&out);
}

const file_format format_vllm = {"vllm", "JSON of expert_to_ep_rank, one for all layers: a plan", import_vllm, export_vllm, NULL};
