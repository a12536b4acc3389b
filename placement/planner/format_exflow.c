/* format_exflow.c - ExFlow's recordings: trace.npy [tokens][layers], the one expert that each token chose in each layer (top-1).
 * Every file is one sequence, its rows in order, as the format says nothing of sequences. */
#include "placement/planner/import.h"

#include "placement/planner/number_array.h"

#include <stdio.h>
#include <stdlib.h>

static status write_rows(const char *path, const number_array *a, int sequence, int phase, int n_experts, uint16_t *experts,
                         const float *weights, routing_trace_writer *writer)
{
    for (int64_t t = 0; t < a->shape[0]; t++) {
        for (int64_t l = 0; l < a->shape[1]; l++) {
            int64_t expert;
            TRY(number_array_int(a, path, t * a->shape[1] + l, 0, n_experts - 1, &expert));
            experts[l] = (uint16_t)expert;
        }
        const routing_row row = {
            .experts = experts, .weights = weights, .sequence = sequence, .position = (int)t, .phase = phase, .domain = 0};
        TRY(routing_trace_writer_add(writer, &row));
    }
    return STATUS_OK;
}

static status write_file(const char *path, const routing_shape *shape, int sequence, int phase, routing_trace_writer *writer)
{
    number_array a;
    TRY(number_array_read_npy(path, &a));
    status st = STATUS_OK;
    uint16_t *experts = calloc((size_t)shape->n_layers, sizeof *experts);
    float *weights = calloc((size_t)shape->n_layers, sizeof *weights);
    for (int l = 0; weights && l < shape->n_layers; l++)
        weights[l] = 1;
    if (!experts || !weights)
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory for a row", path);
    else if (a.n_dims != 2 || a.shape[1] != shape->n_layers || a.shape[0] > INT32_MAX)
        st = status_fail(STATUS_BAD_INPUT, "%s: not [tokens][%d layers]", path, shape->n_layers);
    else
        st = write_rows(path, &a, sequence, phase, shape->n_experts, experts, weights, writer);
    free(experts);
    free(weights);
    number_array_clear(&a);
    return st;
}

static status count_layers(const char *path, const import_options *o, int *n_layers)
{
    number_array a;
    TRY(number_array_read_npy(path, &a));
    int64_t tokens = a.shape[0], layers = a.shape[1];
    int n_dims = a.n_dims;
    number_array_clear(&a);
    if (n_dims != 2 || layers < 1 || layers > 65535 || tokens < 1)
        return status_fail(STATUS_BAD_INPUT, "%s: not [tokens][layers]", path);
    return import_agree(path, "layers", (int)layers, o->n_layers, n_layers);
}

static status import_exflow(const char *const *paths, int n_paths, const import_options *options, const char *out_path,
                            format_kind *made)
{
    int n_layers, *layers;
    *made = FORMAT_TRACE;
    if (options->n_experts < 1)
        return import_ask(paths[0], "experts a layer has", "experts");
    TRY(count_layers(paths[0], options, &n_layers));
    TRY(import_layer_numbers(paths[0], options, n_layers, 0, &layers));
    const char *domain = options->domain ? options->domain : "default";
    const routing_shape shape = {.model = options->model ? options->model : "",
                                 .n_experts = options->n_experts,
                                 .top_k = 1,
                                 .n_layers = n_layers,
                                 .n_domains = 1,
                                 .layer_numbers = layers,
                                 .domains = &domain};
    routing_trace_writer *writer = NULL;
    int agreed;
    status st = import_agree(paths[0], "choices per token", 1, options->top_k, &agreed);
    if (st == STATUS_OK)
        st = routing_trace_writer_create(out_path, &shape, &writer);
    for (int i = 0; i < n_paths && st == STATUS_OK; i++)
        st = write_file(paths[i], &shape, i, import_phase(options, PHASE_PREFILL), writer);
    if (st == STATUS_OK)
        st = routing_trace_writer_finish(writer);
    routing_trace_writer_destroy(writer);
    free(layers);
    return st;
}

const file_format format_exflow = {"exflow", "trace.npy of [tokens][layers], top-1: a trace", import_exflow, NULL, NULL};
