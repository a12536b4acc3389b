/* bench_score - whole steps of a model against what the machine can do, and against llama.cpp.
 *
 *     bench_score --model DIR [--llama DIR] [--threads T] [--rounds R] [--only decode|prefill|ranks|memory|start]
 *
 * DIR of --llama is the work folder of a llama.cpp build: bin/llama-bench, bin/llama-batched-bench and <model>.gguf made from the
 * same checkpoint. Every figure is measured by a child process of its own (`--measure`), ours and llama.cpp's in turn, R
 * rounds; inside ours the ceilings (a plain read loop over memory no cache holds; fused multiply-adds on registers) take turns
 * with the steps. Ratios are medians over rounds.
 *
 * Formulas. Bytes of a decode step: attention, gates and head once, each touched expert once, and the KV cache of all
 * sequences; its bound is the longer of bytes / read rate and operations / FMA rate. Operations: 2 per weight and row, the head
 * only for rows whose logits are taken, 4 * head_dim per query head and visible position. */
#include "tests/support_bench.h"

#include "proto/clock.h"
#include "proto/json.h"
#include "proto/log.h"
#include "proto/options.h"
#include "worker/runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CEILING_BYTES = 512 << 20, MOST_ROUNDS = 64 };

typedef struct {
    const char *model, *llama, *only, *measure;
    int64_t threads, rounds, batch, prompt, tokens;
} bench_options;

static bench_options options;
static char own_path[4096];

/* ---- one measurement (child process, any number of ranks)
 * ---------------------------------------------------------------------- */

static void ignore_event(void *arg, const engine_event *event)
{
    (void)arg, (void)event;
}

/* `batch` sequences of different random tokens. */
static status submit_batch(runtime *r, uint64_t round)
{
    int32_t *prompt = malloc((size_t)options.prompt * sizeof *prompt);
    status st = STATUS_OK;
    uint64_t state = round * 1000003 + 17;
    for (int64_t b = 0; b < options.batch && st == STATUS_OK; b++) {
        for (int64_t i = 0; i < options.prompt; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            prompt[i] = (int32_t)((state >> 33) % (uint64_t)runtime_config(r)->vocab);
        }
        engine_request request = {.id = (uint64_t)b,
                                  .prompt = prompt,
                                  .n_prompt = (int)options.prompt,
                                  .max_new = (int)options.tokens,
                                  .sampling = {.temperature = 1, .seed = round * 100 + (uint64_t)b},
                                  .want = ENGINE_IGNORE_EOS,
                                  .owner = -1};
        st = engine_submit(runtime_engine(r), &request);
    }
    free(prompt);
    return st;
}

/* One round's figures as one line of JSON. */
static void print_round(runtime *r, const engine_times *before, const model_times *decode_start, double read_rate,
                        double fma_rate)
{
    const engine_times *after = engine_get_times(runtime_engine(r));
    const model_times *m = model_get_times(engine_model(runtime_engine(r)));
    printf(
        "{\"prefill_seconds\":%.6f,\"prefill_rows\":%llu,\"decode_seconds\":%.6f,\"decode_rows\":%llu,\"experts_touched\":%llu,"
        "\"layers\":%llu,\"read_rate\":%.4e,\"fma_rate\":%.4e}\n",
        after->prefill_seconds - before->prefill_seconds, after->prefill_rows - before->prefill_rows,
        after->decode_seconds - before->decode_seconds, after->decode_rows - before->decode_rows,
        m->experts_touched - decode_start->experts_touched, m->layers - decode_start->layers, read_rate, fma_rate);
    fflush(stdout);
}

static status lead_round(runtime *r, uint64_t round, double read_rate, double fma_rate)
{
    engine *e = runtime_engine(r);
    engine_times before = *engine_get_times(e);
    model_times decode_start = *model_get_times(engine_model(e));
    TRY(submit_batch(r, round));
    while (engine_busy(e)) {
        double prefill = engine_get_times(e)->prefill_seconds;
        TRY(engine_step(e));
        if (engine_get_times(e)->prefill_seconds != prefill) /* the experts of prefill steps are not counted */
            decode_start = *model_get_times(engine_model(e));
    }
    print_round(r, &before, &decode_start, read_rate, fma_rate);
    return STATUS_OK;
}

static status lead_measure(runtime *r, group *g)
{
    thread_pool *pool = NULL;
    void *memory = NULL;
    TRY(thread_pool_create((int)options.threads, 1, &pool));
    if (group_size(g) == 1)
        memory = bench_big_memory(CEILING_BYTES);
    for (int64_t i = -1; i < options.rounds; i++) { /* round -1 warms up; its line is skipped by the reader */
        double read_rate = memory ? bench_read_rate(pool, memory, CEILING_BYTES, 1) : 0;
        double fma_rate = memory ? bench_fma_rate(pool, 0) : 0;
        TRY(lead_round(r, (uint64_t)(i + 1), read_rate, fma_rate));
    }
    bench_free(memory, CEILING_BYTES);
    thread_pool_destroy(pool);
    return engine_stop(runtime_engine(r));
}

typedef struct {
    unsigned long long touched, rows, layers;
    runtime_memory memory;
} rank_totals;

/* What each rank did over all rounds, for the bounds of several ranks. */
static status print_ranks(runtime *r, group *g)
{
    const model_times *m = model_get_times(engine_model(runtime_engine(r)));
    rank_totals mine = {.touched = m->experts_touched, .rows = m->expert_rows, .layers = m->layers};
    runtime_memory_use(r, &mine.memory);
    const void *parts[64];
    size_t sizes[64];
    TRY(group_gather(g, &mine, sizeof mine, parts, sizes));
    for (int i = 0; i < group_size(g) && group_rank(g) == 0; i++) {
        rank_totals t;
        memcpy(&t, parts[i], sizeof t);
        printf("{\"rank\":%d,\"touched\":%llu,\"rows\":%llu,\"layers\":%llu,\"share\":%llu,\"resident\":%llu,\"buffers\":%llu,"
               "\"kv\":%llu,\"other\":%llu}\n",
               i, t.touched, t.rows, t.layers, t.memory.weights_share, t.memory.weights_resident, t.memory.buffers, t.memory.kv,
               t.memory.process_private);
    }
    return STATUS_OK;
}

static status measure(group *g)
{
    static const char *const domain = "none";
    runtime_options o = {.model_dir = options.model,
                         .threads = (int)options.threads,
                         .combine = COMBINE_FIXED,
                         .limits = {.max_sequences = (int)options.batch,
                                    .chunk = 512,
                                    .n_domains = 1,
                                    .domains = &domain,
                                    .max_length = (int)(options.prompt + options.tokens)}};
    runtime *r = NULL;
    TRY(runtime_create(g, &o, ignore_event, NULL, &r));
    TRY(group_rank(g) == 0 ? lead_measure(r, g) : engine_follow(runtime_engine(r)));
    TRY(print_ranks(r, g));
    runtime_destroy(r);
    return STATUS_OK;
}

static int measure_main(int argc, char **argv)
{
    group *g = NULL;
    status st = group_create(&argc, &argv, 0, &g);
    if (st == STATUS_OK)
        st = measure(g);
    if (st != STATUS_OK) {
        log_line("%s", status_message());
        if (g)
            group_abort(g, 1);
        return 1;
    }
    group_destroy(g);
    return 0;
}

/* ---- reading measurements
 * -------------------------------------------------------------------------------------------------------- */

typedef struct {
    double prefill_seconds, prefill_rows, decode_seconds, decode_rows, touched, layers, read_rate, fma_rate;
} measured_round;

typedef struct {
    double touched, rows, layers, share, resident, buffers, kv, other;
} measured_rank;

typedef struct {
    measured_round rounds[MOST_ROUNDS];
    measured_rank ranks[8];
    int n_rounds, n_ranks;
} measured;

static double number(const cJSON *o, const char *key)
{
    const cJSON *item = json_find(o, key);
    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

static void read_line(const char *line, size_t n, measured *out)
{
    cJSON *o = NULL;
    if (json_parse("measurement", line, n, &o) != STATUS_OK)
        return;
    if (json_find(o, "rank") && out->n_ranks < 8)
        out->ranks[out->n_ranks++] =
            (measured_rank){number(o, "touched"),  number(o, "rows"),    number(o, "layers"), number(o, "share"),
                            number(o, "resident"), number(o, "buffers"), number(o, "kv"),     number(o, "other")};
    else if (out->n_rounds < MOST_ROUNDS)
        out->rounds[out->n_rounds++] = (measured_round){
            number(o, "prefill_seconds"), number(o, "prefill_rows"), number(o, "decode_seconds"), number(o, "decode_rows"),
            number(o, "experts_touched"), number(o, "layers"),       number(o, "read_rate"),      number(o, "fma_rate")};
    cJSON_Delete(o);
}

/* `rounds` inner rounds in one child; the warm-up line is dropped. */
static bool run_measure(int ranks, int threads, int sequences, int prompt, int tokens, int rounds, measured *out)
{
    char command[10000], launcher[4200] = "";
    *out = (measured){0};
    if (ranks > 1)
        snprintf(launcher, sizeof launcher, "%s/tests/run_mpi.sh %d ",
                 getenv("CONVOKE_SOURCE_DIR") ? getenv("CONVOKE_SOURCE_DIR") : ".", ranks);
    snprintf(command, sizeof command, "%s%s --measure yes --model %s --threads %d --batch %d --prompt %d --tokens %d --rounds %d",
             launcher, own_path, options.model, threads, sequences, prompt, tokens, rounds);
    const char *text = bench_output(command);
    if (!text)
        return false;
    for (const char *end; (end = strchr(text, '\n')); text = end + 1)
        read_line(text, (size_t)(end - text), out);
    if (out->n_rounds < 2)
        return false;
    memmove(out->rounds, out->rounds + 1, (size_t)--out->n_rounds * sizeof out->rounds[0]);
    return true;
}

/* llama.cpp's tokens per second; 0 when there is no build. kind: 'p' prompt of n, 'd' decode of n from nothing, 'b' batched
 * decode of n. */
static double run_llama(char kind, int n)
{
    char command[9000], gguf[4300];
    if (!options.llama)
        return 0;
    const char *slash = strrchr(options.model, '/');
    snprintf(gguf, sizeof gguf, "%s/%s.gguf", options.llama, slash ? slash + 1 : options.model);
    if (kind == 'b')
        snprintf(command, sizeof command,
                 "%s/bin/llama-batched-bench -m %s -c 8192 -npp 16 -ntg 32 -npl %d -t %d -tb %d --output-format jsonl "
                 "2>/dev/null | grep speed_tg",
                 options.llama, gguf, n, (int)options.threads, (int)options.threads);
    else
        snprintf(command, sizeof command, "%s/bin/llama-bench -m %s -p %d -n %d -t %d -r 1 -o jsonl 2>/dev/null", options.llama,
                 gguf, kind == 'p' ? n : 0, kind == 'p' ? 0 : n, (int)options.threads);
    const char *text = bench_output(command);
    const char *at = text ? strstr(text, kind == 'b' ? "\"speed_tg\":" : "\"avg_ts\":") : NULL;
    return at ? atof(strchr(at, ':') + 1) : 0;
}

/* ---- formulas
 * ------------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    double shared, expert, head; /* weights read: once per step; per touched expert; the head (in shared) */
    double kv_per_position;      /* bytes per sequence and visible position */
    double weight_bytes;
    const model_config *c;
} formulas;

static formulas make_formulas(const model_config *c)
{
    double h = c->hidden, q = (double)c->n_heads * c->head_dim, kv = (double)c->n_kv_heads * c->head_dim,
           dense = c->n_layers - c->n_moe_layers;
    formulas f = {.c = c, .weight_bytes = 2};
    f.head = h * c->vocab;
    f.shared = f.head + c->n_layers * (2 * h * q + 2 * h * kv) + c->n_moe_layers * (h * c->n_experts + 3 * h * c->shared_inter) +
               dense * 3 * h * c->dense_inter;
    f.expert = 3 * h * c->expert_inter;
    f.kv_per_position = 2 * kv * 4 * c->n_layers;
    return f;
}

/* Operations of `rows` rows whose positions see `visible` positions on average, logits for `head_rows`. */
static double operations(const formulas *f, double rows, double visible, double head_rows)
{
    const model_config *c = f->c;
    double per_row = f->shared - f->head + c->n_moe_layers * (double)c->top_k * f->expert;
    return 2 * (per_row * rows + f->head * head_rows) + 4.0 * c->n_layers * c->n_heads * c->head_dim * visible * rows;
}

/* ---- figures
 * --------------------------------------------------------------------------------------------------------------------------- */

static void print_head(void)
{
    printf("%-34s %10s %12s %10s %10s %9s %9s\n", "figure", "tokens/s", "bound", "of bound", "llama.cpp", "ratio", "goal");
}

static void bench_decode(const formulas *f, int sequences)
{
    double speed[MOST_ROUNDS], share[MOST_ROUNDS], ratio[MOST_ROUNDS], bounds[MOST_ROUNDS], llama[MOST_ROUNDS],
        touched = 0, rate = 0, peak = 0;
    int n = 0, prompt = sequences == 1 ? 1 : 16, tokens = sequences == 1 ? 64 : 32;
    for (int64_t i = 0; i < options.rounds; i++) {
        measured m;
        if (!run_measure(1, (int)options.threads, sequences, prompt, tokens + 1, sequences == 1 ? 3 : 2, &m))
            return;
        double theirs = sequences == 1 ? run_llama('d', tokens) : run_llama('b', sequences);
        double each[MOST_ROUNDS], part[MOST_ROUNDS];
        for (int j = 0; j < m.n_rounds; j++) {
            const measured_round *r = &m.rounds[j];
            double steps = r->decode_rows / sequences, per_step = r->touched / steps, visible = prompt + tokens / 2.0;
            double bytes = f->weight_bytes * (f->shared + per_step * f->expert) + sequences * visible * f->kv_per_position;
            double by_memory = bytes / r->read_rate, by_fma = operations(f, sequences, visible, sequences) / r->fma_rate;
            double bound = sequences / (by_memory > by_fma ? by_memory : by_fma);
            each[j] = r->decode_rows / r->decode_seconds;
            part[j] = each[j] / bound;
            bounds[n] = bound;
            touched = per_step / f->c->n_moe_layers;
            rate = r->read_rate;
            peak = r->fma_rate;
        }
        speed[n] = bench_median(each, m.n_rounds);
        share[n] = bench_median(part, m.n_rounds);
        llama[n] = theirs;
        ratio[n] = theirs > 0 ? speed[n] / theirs : 0;
        n++;
    }
    char name[64];
    snprintf(name, sizeof name, "decode, batch %d", sequences);
    printf("%-34s %10.1f %12.1f %9.0f%% %10.1f %8.2fx %9s\n", name, bench_median(speed, n), bench_median(bounds, n),
           100 * bench_median(share, n), bench_median(llama, n), bench_median(ratio, n), sequences == 1 ? "90%, 1.1x" : "1.6x");
    printf("    %.1f experts per layer and step of %d; read loop %.1f GB/s, FMA %.0f GFLOP/s (last round)\n", touched,
           f->c->n_experts, rate / 1e9, peak / 1e9);
    fflush(stdout);
}

static void bench_prefill(const formulas *f, int length)
{
    double speed[MOST_ROUNDS], share[MOST_ROUNDS], ratio[MOST_ROUNDS], llama[MOST_ROUNDS], peak = 0;
    double work = operations(f, length, length / 2.0, 1);
    int n = 0;
    for (int64_t i = 0; i < options.rounds; i++) {
        measured m;
        if (!run_measure(1, (int)options.threads, 1, length, 1, 3, &m))
            return;
        double each[MOST_ROUNDS], part[MOST_ROUNDS];
        for (int j = 0; j < m.n_rounds; j++) {
            each[j] = m.rounds[j].prefill_rows / m.rounds[j].prefill_seconds;
            part[j] = work / m.rounds[j].prefill_seconds / m.rounds[j].fma_rate;
            peak = m.rounds[j].fma_rate;
        }
        speed[n] = bench_median(each, m.n_rounds);
        share[n] = bench_median(part, m.n_rounds);
        llama[n] = run_llama('p', length);
        ratio[n] = llama[n] > 0 ? speed[n] / llama[n] : 0;
        n++;
    }
    char name[64];
    snprintf(name, sizeof name, "prefill, %d tokens, last logits", length);
    double mid = bench_median(speed, n);
    printf("%-34s %10.1f %12.1f %9.0f%% %10.1f %8.2fx %9s\n", name, mid, mid / bench_median(share, n),
           100 * bench_median(share, n), bench_median(llama, n), bench_median(ratio, n), "55%, 1.8x");
    printf("    %.1f GFLOP per prompt, %.0f GFLOP/s; FMA %.0f GFLOP/s (last round)\n", work / 1e9, work / length * mid / 1e9,
           peak / 1e9);
    fflush(stdout);
}

/* Two ranks of one thread against one rank of two: what is read twice (shared parts) and the busier rank set the bound. */
static void bench_ranks(const formulas *f, bool prefill)
{
    double ratio[MOST_ROUNDS], bound[MOST_ROUNDS], one_speed[MOST_ROUNDS], two_speed[MOST_ROUNDS];
    int n = 0, sequences = prefill ? 2 : 8, prompt = prefill ? 512 : 1, tokens = prefill ? 1 : 49;
    for (int64_t i = 0; i < options.rounds; i++) {
        measured one, two;
        if (!run_measure(1, 2, sequences, prompt, tokens, 3, &one) || !run_measure(2, 1, sequences, prompt, tokens, 3, &two) ||
            two.n_ranks != 2)
            return;
        double a[MOST_ROUNDS], b[MOST_ROUNDS];
        for (int j = 0; j < one.n_rounds; j++)
            a[j] = prefill ? one.rounds[j].prefill_rows / one.rounds[j].prefill_seconds
                           : one.rounds[j].decode_rows / one.rounds[j].decode_seconds;
        for (int j = 0; j < two.n_rounds; j++)
            b[j] = prefill ? two.rounds[j].prefill_rows / two.rounds[j].prefill_seconds
                           : two.rounds[j].decode_rows / two.rounds[j].decode_seconds;
        one_speed[n] = bench_median(a, one.n_rounds);
        two_speed[n] = bench_median(b, two.n_rounds);
        ratio[n] = two_speed[n] / one_speed[n];
        double x = two.ranks[0].touched / two.ranks[0].layers * f->c->n_moe_layers * f->expert,
               y = two.ranks[1].touched / two.ranks[1].layers * f->c->n_moe_layers * f->expert;
        double rows = two.ranks[0].rows > two.ranks[1].rows ? two.ranks[0].rows : two.ranks[1].rows,
               all = two.ranks[0].rows + two.ranks[1].rows;
        double dense = operations(f, 512, 256, 1) - 2.0 * 512 * f->c->n_moe_layers * f->c->top_k * f->expert,
               moe = 2.0 * 1024 * f->c->n_moe_layers * f->c->top_k * f->expert;
        bound[n] = prefill ? (2 * dense + moe) / (2 * (dense + moe * rows / all))
                           : (f->shared + x + y) / (2 * (f->shared + (x > y ? x : y)));
        n++;
    }
    char name[64];
    snprintf(name, sizeof name, prefill ? "2 ranks x 1, prefill 2 x 512" : "2 ranks x 1, decode batch 8");
    printf("%-34s %10.1f %12.1f %9.0f%% %10s %8.2fx %9s\n", name, bench_median(two_speed, n),
           bench_median(one_speed, n) * bench_median(bound, n), 100 * bench_median(ratio, n) / bench_median(bound, n), "",
           bench_median(ratio, n), "90%");
    printf("    1 rank x 2 threads: %.1f tokens/s; the bound is %.2f of that (%s)\n", bench_median(one_speed, n),
           bench_median(bound, n),
           prefill ? "the busier rank's operations" : "shared weights read twice, the busier rank's experts");
    fflush(stdout);
}

static void bench_memory(void)
{
    measured m;
    if (!run_measure(2, 1, 8, 128, 32, 1, &m))
        return;
    for (int r = 0; r < m.n_ranks; r++) {
        const measured_rank *k = &m.ranks[r];
        printf("memory, rank %d: weights %.1f MB resident of a share of %.1f MB (%.2fx, goal 1); everything else %.1f MB of KV "
               "%.1f + buffers %.1f + 64 MB allowed\n",
               r, k->resident / 1e6, k->share / 1e6, k->resident / k->share, k->other / 1e6, k->kv / 1e6, k->buffers / 1e6);
    }
}

static double command_seconds(const char *command)
{
    double start = clock_seconds();
    return bench_output(command) ? clock_seconds() - start : 0;
}

/* From the shell's return key to the last line printed, with the bundled model on two ranks: first token, and the end of mpirun
 * too. */
static void bench_start(void)
{
    const char *source = getenv("CONVOKE_SOURCE_DIR") ? getenv("CONVOKE_SOURCE_DIR") : ".";
    double ours[MOST_ROUNDS], empty[MOST_ROUNDS];
    char command[14000], folder[4096];
    snprintf(folder, sizeof folder, "%s", own_path);
    for (int up = 0; up < 2; up++)
        *strrchr(folder, '/') = '\0';
    for (int64_t i = 0; i < options.rounds; i++) {
        snprintf(command, sizeof command, "%s/tests/run_mpi.sh 2 true", source);
        empty[i] = command_seconds(command);
        snprintf(command, sizeof command,
                 "%s/tests/run_mpi.sh 2 %s/convoke-score --model %s/deploy/models/convoke-demo --input "
                 "%s/tests/data/demo_lines.jsonl --greedy 1 --batch 6",
                 source, folder, source, source);
        ours[i] = command_seconds(command);
    }
    printf("start to end of a one-token run, bundled model, 2 ranks: %.2f s, of which mpirun of an empty program takes %.2f s "
           "(goal 1 s)\n",
           bench_median(ours, (int)options.rounds), bench_median(empty, (int)options.rounds));
}

static bool wants(const char *what)
{
    return !options.only || strcmp(options.only, what) == 0;
}

static status bench_all(void)
{
    model_config c = {0};
    TRY(model_config_read(options.model, &c));
    formulas f = make_formulas(&c);
    print_head();
    if (wants("decode")) {
        bench_decode(&f, 1);
        bench_decode(&f, 16);
        bench_decode(&f, 32);
    }
    if (wants("prefill"))
        bench_prefill(&f, 512);
    if (wants("ranks")) {
        bench_ranks(&f, false);
        bench_ranks(&f, true);
    }
    if (wants("memory"))
        bench_memory();
    if (wants("start"))
        bench_start();
    model_config_clear(&c);
    return STATUS_OK;
}

int main(int argc, char **argv)
{
    const option_entry entries[] = {
        {"model", OPTION_STRING, &options.model, .argument = "DIR", .required = true, .help = "checkpoint folder"},
        {"llama", OPTION_STRING, &options.llama, .argument = "DIR",
         .help = "work folder of a llama.cpp build, to compare in turn"},
        {"threads", OPTION_INT, &options.threads, .fallback = "2", .min = 1, .max = 1024, .help = "threads"},
        {"rounds", OPTION_INT, &options.rounds, .fallback = "5", .min = 1, .max = MOST_ROUNDS - 2, .help = "alternating rounds"},
        {"only", OPTION_STRING, &options.only, .argument = "decode|prefill|ranks|memory|start", .help = "one group of figures"},
        {"measure", OPTION_STRING, &options.measure, .help = "one measurement, as JSON lines (used by itself)"},
        {"batch", OPTION_INT, &options.batch, .fallback = "1", .min = 1, .max = 4096, .help = "with --measure: sequences"},
        {"prompt", OPTION_INT, &options.prompt, .fallback = "1", .min = 1, .max = 1 << 20,
         .help = "with --measure: prompt tokens each"},
        {"tokens", OPTION_INT, &options.tokens, .fallback = "1", .min = 1, .max = 1 << 20,
         .help = "with --measure: new tokens each"},
    };
    const option_table table = {.name = "bench_score",
                                .summary = "Measures whole steps against the machine's ceilings and llama.cpp.",
                                .version = CONVOKE_VERSION,
                                .entries = entries,
                                .n_entries = sizeof entries / sizeof *entries};
    options_wish wish;
    status st = options_parse(&table, argc, argv, &wish, NULL, NULL);
    if (st == STATUS_OK && wish != OPTIONS_RUN) {
        options_print(&table, wish, stdout);
        return 0;
    }
    ssize_t n = readlink("/proc/self/exe", own_path, sizeof own_path - 1);
    own_path[n > 0 ? n : 0] = '\0';
    if (st == STATUS_OK && options.measure)
        return measure_main(argc, argv);
    if (st == STATUS_OK)
        st = bench_all();
    if (st != STATUS_OK)
        log_line("%s", status_message());
    return status_exit_code(st);
}
