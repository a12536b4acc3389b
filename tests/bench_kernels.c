/* bench_kernels - how near the kernels come to what the machine can do.
 *
 *     bench_kernels [--quick] [--json] [--isa NAME] [--only TEXT]
 *
 * Each figure states the work by formula: a product of m rows reads N * K * bytes of weights and does 2 * m * N * K operations;
 * attention reads 2 * positions * head_dim * 4 bytes per KV head and does 4 * positions * head_dim operations per query head. Its
 * ceiling is the longer of two times: the bytes at the speed of a plain read loop over the same bytes on as many threads, and the
 * operations at the speed of a loop of FMA on registers. Kernel and both loops take turns, round by round, because the speed
 * of a shared machine moves; the ratio is the median of the rounds' ratios. Weights come from memory: a round walks through
 * more of them than any cache holds. */
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_bench.h"
#include "worker/kernels.h"
#include "worker/thread_pool.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ROUNDS 31

static volatile float sink;

static struct {
    bool quick, json;
    const char *only;
    const kernel_table *table;
    kernel_isa isa;
    thread_pool *pool; /* of the threads the figure at hand runs on */
    int threads, rounds, n_printed;
    char *weights; /* walked through by every figure that is to come from memory */
    size_t weight_bytes, at;
} bench;

/* ---- one figure ---- */

typedef struct {
    char name[64];
    thread_pool_fn run;
    void *arg;
    const char *data; /* what the read loop reads, as often as the kernel does */
    double bytes, flops;
    size_t data_bytes, repeat;
} figure;

static double seconds(thread_pool_fn fn, void *arg)
{
    double start = clock_seconds();
    thread_pool_run(bench.pool, fn, arg);
    return clock_seconds() - start;
}

static void print_figure(const figure *f, double took, double read, double peak, double ratio, bool by_memory)
{
    double gb = f->bytes / took * 1e-9, gflop = f->flops / took * 1e-9;
    if (bench.json) {
        printf("%s\n  {\"name\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"milliseconds\": %.4f, \"gb_per_s\": %.3f, "
               "\"gflop_per_s\": %.3f, "
               "\"read_loop_gb_per_s\": %.3f, \"fma_loop_gflop_per_s\": %.3f, \"bound\": \"%s\", \"ratio\": %.4f}",
               bench.n_printed++ ? "," : "[", f->name, bench.table->name, bench.threads, took * 1e3, gb, gflop, read, peak,
               by_memory ? "memory" : "fma", ratio);
        return;
    }
    if (bench.n_printed++ == 0)
        printf("%-34s %7s %9s %8s %9s %9s %9s  %-6s %6s\n", "", "threads", "ms", "GB/s", "GFLOP/s", "read GB/s", "FMA GF/s",
               "bound", "ratio");
    printf("%-34s %7d %9.3f %8.2f %9.1f %9.2f %9.1f  %-6s %5.1f%%\n", f->name, bench.threads, took * 1e3, gb, gflop, read, peak,
           by_memory ? "memory" : "fma", 100 * ratio);
    fflush(stdout);
}

static void measure(figure *f)
{
    if (bench.only && !strstr(f->name, bench.only))
        return;
    double took[MOST_ROUNDS], read[MOST_ROUNDS], peak[MOST_ROUNDS], ratio[MOST_ROUNDS];
    seconds(f->run, f->arg);
    for (int r = 0; r < bench.rounds; r++) {
        read[r] = bench_read_rate(bench.pool, f->data, f->data_bytes, f->repeat) * 1e-9;
        peak[r] = bench_fma_rate(bench.pool, bench.isa >= ISA_AVX512 ? 16 : 8) * 1e-9;
        took[r] = seconds(f->run, f->arg);
        ratio[r] = fmax(f->bytes / read[r], f->flops / peak[r]) * 1e-9 / took[r];
    }
    double gb = bench_median(read, bench.rounds), gflop = bench_median(peak, bench.rounds);
    print_figure(f, bench_median(took, bench.rounds), gb, gflop, bench_median(ratio, bench.rounds),
                 f->bytes / gb > f->flops / gflop);
}

/* ---- products ---- */

typedef struct {
    weight_format format;
    int m, k, n, count; /* `count` matrices of [n][k] one after the other */
    const char *w;
    float *x, *y;
} products;

static void run_products(void *arg, int thread, int n_threads)
{
    const products *p = arg;
    size_t first, last, row_bytes = (size_t)p->k * weight_format_size(p->format);
    thread_pool_share((size_t)p->n, 12, thread, n_threads, &first, &last);
    for (int i = 0; i < p->count; i++)
        bench.table->matmul[p->format](p->x, (size_t)p->k, p->m, p->w + ((size_t)i * (size_t)p->n + first) * row_bytes, p->k,
                                       (int)(last - first), p->y + first, (size_t)p->n);
}

/* Small normal numbers of either sign in every format. */
static void fill_weights(weight_format format)
{
    static weight_format filled = N_WEIGHT_FORMATS;
    if (filled == format)
        return;
    filled = format;
    uint64_t seed = 1;
    for (size_t i = 0; i < bench.weight_bytes; i += 8) {
        if (i >= 1 << 20) {
            size_t n = bench.weight_bytes - i < i ? bench.weight_bytes - i : i;
            memcpy(bench.weights + i, bench.weights, n);
            i += n - 8;
            continue;
        }
        uint64_t r = support_random(&seed);
        r = format == FORMAT_F32   ? (r & 0x80ffffff80ffffffu) | 0x3c0000003c000000u
            : format == FORMAT_F16 ? (r & 0x83ff83ff83ff83ffu) | 0x2000200020002000u
                                   : (r & 0x80ff80ff80ff80ffu) | 0x3c003c003c003c00u;
        memcpy(bench.weights + i, &r, 8);
    }
}

static void bench_product(weight_format format, int m, int k, int n)
{
    static const char *const names[] = {"f32", "f16", "bf16"};
    size_t matrix = (size_t)k * (size_t)n * weight_format_size(format);
    double flops = 2.0 * m * k * n;
    int most = (int)(bench.weight_bytes / matrix), enough = (int)(bench.threads * (bench.quick ? 5e8 : 3e9) / flops) + 1;
    products p = {.format = format, .m = m, .k = k, .n = n, .count = most < enough ? most : enough, .w = bench.weights};
    p.x = aligned_alloc(64, (size_t)m * (size_t)k * sizeof(float));
    p.y = aligned_alloc(64, (size_t)m * (size_t)n * sizeof(float));
    uint64_t seed = 1;
    for (int i = 0; i < m * k; i++)
        p.x[i] = support_gauss(&seed);
    figure f = {.run = run_products,
                .arg = &p,
                .data = p.w,
                .data_bytes = matrix * (size_t)p.count,
                .repeat = 1,
                .bytes = (double)matrix * p.count,
                .flops = flops * p.count};
    snprintf(f.name, sizeof f.name, "matmul %s m=%d K=%d N=%d", names[format], m, k, n);
    if (!bench.only || strstr(f.name, bench.only)) {
        fill_weights(format);
        measure(&f);
    }
    free(p.x), free(p.y);
}

static void bench_products(void)
{
    static const int rows[] = {1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 256};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        bench_product(FORMAT_BF16, rows[i], 1024, 768);
    bench_product(FORMAT_BF16, 64, 768, 1024);
    bench_product(FORMAT_BF16, 256, 768, 1024);
    bench_product(FORMAT_BF16, 1, 1024, 16384);
    bench_product(FORMAT_BF16, 64, 2048, 1024);
    bench_product(FORMAT_BF16, 64, 4096, 1024);
    for (int f = FORMAT_F32; f <= FORMAT_F16; f++) {
        bench_product((weight_format)f, 1, 1024, 768);
        bench_product((weight_format)f, 4, 1024, 768);
        bench_product((weight_format)f, 64, 1024, 768);
    }
}

/* ---- attention ---- */

enum { HEAD_DIM = 128, KV_HEADS = 4, GROUP = 8, WIDTH = KV_HEADS * GROUP * HEAD_DIM };

typedef struct {
    attend_args args; /* of KV head 0 of sequence 0 */
    int n_sequences;
    size_t blocks; /* of one sequence */
} attentions;

/* (sequence, KV head) pairs are what threads share; a prefill has one sequence. */
static void run_attention(void *arg, int thread, int n_threads)
{
    const attentions *a = arg;
    size_t first, last;
    thread_pool_share((size_t)a->n_sequences * KV_HEADS, 1, thread, n_threads, &first, &last);
    for (size_t i = first; i < last; i++) {
        attend_args args = a->args;
        size_t sequence = i / KV_HEADS, head = i % KV_HEADS;
        args.q += sequence * (size_t)args.n_rows * WIDTH + head * GROUP * HEAD_DIM;
        args.out += sequence * (size_t)args.n_rows * WIDTH + head * GROUP * HEAD_DIM;
        args.pool += (sequence * a->blocks * KV_HEADS + head) * kv_head_floats(HEAD_DIM);
        bench.table->attend(&args);
    }
}

static void bench_attention(const char *what, int context, int n_rows)
{
    size_t blocks = (size_t)(context + KV_BLOCK - 1) / KV_BLOCK, block_floats = KV_HEADS * kv_head_floats(HEAD_DIM);
    size_t per_sequence = blocks * block_floats * sizeof(float);
    int n_sequences = n_rows > 1 ? bench.threads : (int)(bench.weight_bytes / per_sequence);
    size_t rows = (size_t)n_sequences * (size_t)n_rows;
    int32_t *ids = malloc(blocks * sizeof *ids);
    float *q = malloc(rows * WIDTH * sizeof *q), *out = malloc(rows * WIDTH * sizeof *out);
    uint64_t seed = 2;
    for (size_t i = 0; i < rows * WIDTH; i++)
        q[i] = support_gauss(&seed);
    for (size_t b = 0; b < blocks; b++)
        ids[b] = (int32_t)b;
    attentions a = {.args = {.q = q,
                             .q_row_stride = WIDTH,
                             .out = out,
                             .out_row_stride = WIDTH,
                             .n_rows = n_rows,
                             .n_heads = GROUP,
                             .head_dim = HEAD_DIM,
                             .first_position = context - n_rows,
                             .scale = 0.09f,
                             .pool = (const float *)(const void *)bench.weights,
                             .block_floats = block_floats,
                             .block_ids = ids},
                    .n_sequences = n_sequences,
                    .blocks = blocks};
    double seen = 0; /* positions, over rows */
    for (int i = 0; i < n_rows; i++)
        seen += context - n_rows + i + 1;
    figure f = {.run = run_attention,
                .arg = &a,
                .data = bench.weights,
                .data_bytes = per_sequence * (size_t)n_sequences,
                .repeat = 1,
                .bytes = (double)per_sequence * n_sequences,
                .flops = 4.0 * seen * WIDTH * n_sequences};
    snprintf(f.name, sizeof f.name, "attention %s, context %d", what, context);
    if (!bench.only || strstr(f.name, bench.only)) {
        fill_weights(FORMAT_F32);
        measure(&f);
    }
    free(ids), free(q), free(out);
}

/* ---- functions of rows ---- */

typedef struct {
    int kind, n, rows, repeat;
    float *x, *weight, *y;
} row_work;

static void run_rows(void *arg, int thread, int n_threads)
{
    const row_work *w = arg;
    size_t first, last;
    thread_pool_share((size_t)w->rows, 1, thread, n_threads, &first, &last);
    for (int r = 0; r < w->repeat; r++)
        for (size_t i = first; i < last; i++) {
            float *x = w->x + i * (size_t)w->n, *y = w->y + i * (size_t)w->n;
            if (w->kind == 0)
                bench.table->rmsnorm(x, w->weight, w->n, 1e-6f, y);
            else if (w->kind == 1)
                bench.table->swiglu(x, w->weight, w->n, y);
            else if (w->kind == 2)
                bench.table->softmax(x, w->n, y);
            else
                sink = bench.table->log_sum_exp(x, w->n);
        }
}

static void bench_rows(const char *name, int kind, int n, int rows)
{
    size_t total = (size_t)n * (size_t)rows;
    row_work w = {.kind = kind, .n = n, .rows = rows, .repeat = bench.quick ? 20 : 100};
    w.x = malloc(total * sizeof(float)), w.y = malloc(total * sizeof(float)), w.weight = malloc((size_t)n * sizeof(float));
    uint64_t seed = 3;
    for (size_t i = 0; i < total; i++)
        w.x[i] = support_gauss(&seed), w.y[i] = 0;
    for (int i = 0; i < n; i++)
        w.weight[i] = 1;
    figure f = {.run = run_rows,
                .arg = &w,
                .data = (const char *)w.x,
                .data_bytes = total * sizeof(float),
                .repeat = (size_t)w.repeat,
                .bytes = (double)total * w.repeat * sizeof(float)};
    snprintf(f.name, sizeof f.name, "%s n=%d", name, n);
    measure(&f);
    free(w.x), free(w.y), free(w.weight);
}

static void bench_all(void)
{
    bench_products();
    bench_attention("decode", 512, 1);
    bench_attention("decode", 4096, 1);
    bench_attention("prefill", 512, 512);
    bench_rows("rmsnorm", 0, 1024, 64);
    bench_rows("swiglu", 1, 768, 64);
    bench_rows("softmax", 2, 128, 256);
    bench_rows("log_sum_exp", 3, 151936, 2);
}

static int usage(const char *name)
{
    fprintf(stderr, "usage: %s [--quick] [--json] [--isa scalar|avx2|avx512|avx512bf16] [--only TEXT]\n", name);
    return 2;
}

static int choose(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            bench.quick = true;
        else if (!strcmp(argv[i], "--json"))
            bench.json = true;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            bench.only = argv[++i];
        else if (!strcmp(argv[i], "--isa") && i + 1 < argc)
            setenv("CONVOKE_ISA", argv[++i], 1);
        else
            return usage(argv[0]);
    }
    status st = kernels_pick(&bench.isa);
    if (st != STATUS_OK) {
        fprintf(stderr, "%s\n", status_message());
        return status_exit_code(st);
    }
    bench.table = kernels_of(bench.isa);
    bench.rounds = bench.quick ? 3 : 11;
    bench.weight_bytes = (size_t)(bench.quick ? 96 : 384) << 20;
    bench.weights = aligned_alloc(4096, bench.weight_bytes);
    return bench.weights ? 0 : 1;
}

int main(int argc, char **argv)
{
    int code = choose(argc, argv);
    if (code)
        return code;
    for (bench.threads = 1; bench.threads <= 2; bench.threads++) {
        if (thread_pool_create(bench.threads, 1, &bench.pool) != STATUS_OK) {
            fprintf(stderr, "%s\n", status_message());
            return 1;
        }
        bench_all();
        thread_pool_destroy(bench.pool);
    }
    if (bench.json)
        printf("%s\n", bench.n_printed ? "\n]" : "[]");
    free(bench.weights);
    return 0;
}
