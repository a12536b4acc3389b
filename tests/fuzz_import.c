/* fuzz_import.c - any bytes as another engine's file: refused with a one-line sentence, or made into a file of ours that opens.
 *
 * The first byte says which format reads the rest. Files go through a folder of this process in memory. */
#include "placement/planner/formats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char folder[64], input[96], csv[96], output[96], flat[96];

static void write_file(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "w");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
        abort();
}

static void tidy(void)
{
    char experts[112];
    snprintf(experts, sizeof experts, "%s/experts.u8", folder);
    unlink(experts);
    unlink(input);
    unlink(csv);
    unlink(output);
    rmdir(folder);
}

/* For `flat` the bytes are the list of generations, over an array of 8 tokens. */
static void begin(void)
{
    unsigned char experts[8 * 2 * 2];
    if (folder[0])
        return;
    snprintf(folder, sizeof folder, "%s", access("/dev/shm", W_OK) == 0 ? "/dev/shm/fuzz-XXXXXX" : "/tmp/fuzz-XXXXXX");
    if (!mkdtemp(folder))
        abort();
    snprintf(input, sizeof input, "%s/input", folder);
    snprintf(csv, sizeof csv, "%s/input.csv", folder);
    snprintf(output, sizeof output, "%s/output", folder);
    snprintf(flat, sizeof flat, "%s/experts.u8", folder);
    for (size_t i = 0; i < sizeof experts; i++)
        experts[i] = (unsigned char)(i % 5);
    write_file(flat, experts, sizeof experts);
    atexit(tidy);
}

static void open_made(format_kind made)
{
    plan p;
    routing_stats *stats;
    routing_trace *trace;
    if (made == FORMAT_PLAN && plan_read(output, NULL, &p) == STATUS_OK)
        plan_clear(&p);
    else if (made == FORMAT_STATS && routing_stats_read(output, &stats) == STATUS_OK)
        routing_stats_destroy(stats);
    else if (made == FORMAT_TRACE && routing_trace_open(output, &trace) == STATUS_OK)
        routing_trace_close(trace);
    else
        abort();
    unlink(output);
}

static void import(const file_format *format, const char *path, const import_options *options)
{
    const char *paths[] = {path};
    format_kind made;
    if (format->import(paths, 1, options, output, &made) == STATUS_OK)
        open_made(made);
    else if (!status_message()[0] || strchr(status_message(), '\n') || access(output, F_OK) == 0)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    begin();
    size_t n_formats = 0;
    while (file_formats[n_formats])
        n_formats++;
    if (size == 0)
        return 0;
    const file_format *format = file_formats[data[0] % n_formats];
    bool as_csv = data[0] / n_formats % 2, is_flat = strcmp(format->name, "flat") == 0;
    const char *path = as_csv ? csv : input;
    write_file(path, data + 1, size - 1);
    bool is_exflow = strcmp(format->name, "exflow") == 0, is_vllm = strcmp(format->name, "vllm") == 0;
    const import_options options = {.n_experts = is_flat                       ? 5
                                                 : is_exflow || data[0] & 0x40 ? 8
                                                                               : 0,
                                    .n_layers = is_flat || is_vllm ? 2 : 0,
                                    .top_k = is_flat || is_exflow ? 0 : 2,
                                    .n_ranks = data[0] & 0x80 ? 4 : 2,
                                    .index = path};
    import(format, is_flat ? flat : path, &options);
    return 0;
}
