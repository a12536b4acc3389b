#include "worker/score.h"

#include "placement/routing_trace.h"
#include "proto/bytes.h"
#include "proto/clock.h"
#include "proto/console.h"
#include "proto/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A run as rank 0 sees it; the other ranks use little of it. */
typedef struct {
    group *group; /* borrowed */
    const score_options *options;
    model_config config; /* rank 0's own look at it, before anything is loaded */
    token_lines lines;
    char *domain_text; /* names behind each other, NUL-terminated; the same on all ranks */
    const char **domains;
    int n_domains; /* the lines' own, and "none" behind them where a line names none */
    runtime_options runtime_options;
    runtime *runtime;
    score_line *results;
    /* --logits */
    safetensors_writer *writer;
    int *logits_index, *experts_index, *weights_index, *greedy_index; /* [n_lines] */
    int32_t **experts; /* [n_lines] -> [moe layers][n][k], written when the line is done */
    float **weights;
    routing_trace_writer *trace;
    routing_stats *routing; /* of all ranks */
    status failed;          /* the first failure inside the listener */
    char cause[512];        /* its sentence */
    console console;        /* progress, where a person looks */
    int n_finished;
    long long n_rows;
    bool out_of_step; /* this rank left the step loop alone: nothing can be agreed on any more */
    double start, ready, step_seconds;
} score;

/* ---- before loading ------------------------------------------------------------------------------------------------------ */

static status check_lengths(const score *s)
{
    for (int i = 0; i < s->lines.n_lines; i++) {
        const token_line *line = &s->lines.lines[i];
        if (line->n_ids + s->options->greedy > s->config.max_positions)
            return status_fail(STATUS_BAD_INPUT, "%s: line %d: %d tokens and %d new ones are more than the %d that %s takes",
                               s->options->input_path, line->line_number, line->n_ids, s->options->greedy,
                               s->config.max_positions, s->config.name);
    }
    return STATUS_OK;
}

static status read_input(score *s)
{
    TRY(model_config_read(s->options->runtime.model_dir, &s->config));
    TRY(token_lines_read(s->options->input_path, s->config.vocab, &s->lines));
    return check_lengths(s);
}

typedef struct {
    int max_length, n_domains;
    size_t domain_bytes;
} score_header;

static void describe_input(const score *s, score_header *head)
{
    bool unnamed = false;
    *head = (score_header){0};
    for (int i = 0; i < s->lines.n_lines; i++) {
        int length = s->lines.lines[i].n_ids + s->options->greedy;
        head->max_length = length > head->max_length ? length : head->max_length;
        unnamed |= s->lines.lines[i].domain < 0;
    }
    head->n_domains = s->lines.n_domains + unnamed;
    for (int d = 0; d < s->lines.n_domains; d++)
        head->domain_bytes += strlen(s->lines.domains[d]) + 1;
    head->domain_bytes += unnamed ? sizeof "none" : 0;
}

/* All ranks need the length to size buffers by and the domains to count by. */
static status share_input(score *s)
{
    score_header head;
    if (group_rank(s->group) == 0)
        describe_input(s, &head);
    TRY(group_broadcast(s->group, &head, sizeof head));
    s->domain_text = calloc(1, head.domain_bytes + 1);
    s->domains = calloc((size_t)head.n_domains + 1, sizeof *s->domains);
    TRY(group_agree(s->group, s->domain_text && s->domains ? STATUS_OK
                                                           : status_fail(STATUS_NO_MEMORY, "no memory for the domains' names")));
    char *at = s->domain_text;
    for (int d = 0; d < head.n_domains && group_rank(s->group) == 0; d++)
        at = stpcpy(at, d < s->lines.n_domains ? s->lines.domains[d] : "none") + 1;
    TRY(group_broadcast(s->group, s->domain_text, head.domain_bytes));
    at = s->domain_text;
    for (int d = 0; d < head.n_domains; d++, at += strlen(at) + 1)
        s->domains[d] = at;
    s->n_domains = head.n_domains;
    s->runtime_options = s->options->runtime;
    s->runtime_options.limits.max_length = head.max_length;
    s->runtime_options.limits.step_seconds = ENGINE_NO_BUDGET; /* nobody waits for the next token */
    s->runtime_options.limits.count_pairs = s->options->stats_path != NULL;
    s->runtime_options.limits.n_domains = head.n_domains;
    s->runtime_options.limits.domains = s->domains;
    return STATUS_OK;
}

/* ---- outputs ----------------------------------------------------------------------------------------------------------------
 */

static status declare(score *s, const char *kind, int line, tensor_dtype dtype, int n_dims, const int64_t *shape, int *index)
{
    char name[64];
    snprintf(name, sizeof name, "%s_%d", kind, line);
    return safetensors_writer_declare(s->writer, name, dtype, n_dims, shape, index);
}

static status declare_line(score *s, int i)
{
    const model_config *c = &s->config;
    int64_t n = s->lines.lines[i].n_ids;
    int64_t choices[] = {c->n_moe_layers, n, c->top_k};
    TRY(declare(s, "logits", i, DTYPE_F32, 2, (int64_t[]){n, c->vocab}, &s->logits_index[i]));
    TRY(declare(s, "experts", i, DTYPE_I32, 3, choices, &s->experts_index[i]));
    TRY(declare(s, "weights", i, DTYPE_F32, 3, choices, &s->weights_index[i]));
    if (s->options->greedy > 0)
        TRY(declare(s, "greedy", i, DTYPE_I32, 1, (int64_t[]){s->options->greedy}, &s->greedy_index[i]));
    size_t count = (size_t)(choices[0] * choices[1] * choices[2]);
    s->experts[i] = calloc(count + 1, sizeof **s->experts);
    s->weights[i] = calloc(count + 1, sizeof **s->weights);
    return s->experts[i] && s->weights[i] ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the choices of line %d", i);
}

static status open_logits(score *s)
{
    size_t n = (size_t)s->lines.n_lines;
    TRY(safetensors_writer_create(s->options->logits_path, &s->writer));
    s->logits_index = calloc(n, sizeof(int));
    s->experts_index = calloc(n, sizeof(int));
    s->weights_index = calloc(n, sizeof(int));
    s->greedy_index = calloc(n, sizeof(int));
    s->experts = calloc(n, sizeof *s->experts);
    s->weights = calloc(n, sizeof *s->weights);
    if (!s->logits_index || !s->experts_index || !s->weights_index || !s->greedy_index || !s->experts || !s->weights)
        return status_fail(STATUS_NO_MEMORY, "no memory to list %zu lines' tensors", n);
    for (int i = 0; i < s->lines.n_lines; i++)
        TRY(declare_line(s, i));
    return safetensors_writer_begin(s->writer);
}

static status open_trace(score *s)
{
    const plan *p = runtime_plan(s->runtime);
    routing_shape shape = {.model = s->config.name,
                           .n_experts = s->config.n_experts,
                           .top_k = s->config.top_k,
                           .n_layers = s->config.n_moe_layers,
                           .layer_numbers = p->layer_numbers,
                           .n_domains = s->n_domains,
                           .domains = s->domains};
    return routing_trace_writer_create_owned(s->options->routing_path, &shape, &s->trace);
}

static status open_outputs(score *s)
{
    s->results = calloc((size_t)s->lines.n_lines, sizeof *s->results);
    if (!s->results)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d results", s->lines.n_lines);
    for (int i = 0; i < s->lines.n_lines; i++) {
        s->results[i].generated = calloc((size_t)s->options->greedy + 1, sizeof *s->results[i].generated);
        if (!s->results[i].generated)
            return status_fail(STATUS_NO_MEMORY, "no memory for the continuation of line %d", i);
    }
    if (s->options->logits_path)
        TRY(open_logits(s));
    return s->options->routing_path ? open_trace(s) : STATUS_OK;
}

static status close_outputs(score *s)
{
    if (s->failed != STATUS_OK)
        return status_fail(s->failed, "%s", s->cause);
    for (int i = 0; i < s->lines.n_lines && s->writer; i++) {
        size_t count = (size_t)s->config.n_moe_layers * (size_t)s->lines.lines[i].n_ids * (size_t)s->config.top_k;
        TRY(safetensors_writer_put(s->writer, s->experts_index[i], 0, s->experts[i], count * sizeof(int32_t)));
        TRY(safetensors_writer_put(s->writer, s->weights_index[i], 0, s->weights[i], count * sizeof(float)));
        if (s->options->greedy > 0)
            TRY(safetensors_writer_put(s->writer, s->greedy_index[i], 0, s->results[i].generated,
                                       (size_t)s->results[i].n_generated * sizeof(int32_t)));
    }
    if (s->writer)
        TRY(safetensors_writer_finish(s->writer));
    if (s->trace)
        TRY(routing_trace_writer_finish(s->trace));
    return s->options->stats_path ? routing_stats_write(s->routing, s->options->stats_path) : STATUS_OK;
}

/* ---- events ------------------------------------------------------------------------------------------------------------------
 */

static int line_domain(const score *s, int line)
{
    return s->lines.lines[line].domain >= 0 ? s->lines.lines[line].domain : s->n_domains - 1;
}

static void keep_choices(score *s, int line, const engine_event *event)
{
    const model_config *c = &s->config;
    size_t k = (size_t)c->top_k, layers = (size_t)c->n_moe_layers, n = (size_t)s->lines.lines[line].n_ids;
    for (size_t r = 0; r < (size_t)event->n_rows; r++)
        for (size_t l = 0; l < layers; l++) {
            size_t to = (l * n + (size_t)event->first_position + r) * k, from = (r * layers + l) * k;
            for (size_t j = 0; j < k; j++)
                s->experts[line][to + j] = event->experts[from + j];
            memcpy(s->weights[line] + to, event->weights + from, k * sizeof(float));
        }
}

static status take_rows(score *s, int line, const engine_event *event)
{
    const model_config *c = &s->config;
    s->results[line].sum_logprob += event->sum_logprob;
    s->results[line].n_scored += event->n_scored;
    size_t row_bytes = (size_t)c->vocab * sizeof(float), per_row = (size_t)c->n_moe_layers * (size_t)c->top_k;
    if (event->logits)
        TRY(safetensors_writer_put(s->writer, s->logits_index[line], (size_t)event->first_position * row_bytes, event->logits,
                                   (size_t)event->n_rows * row_bytes));
    if (event->experts && s->writer && !event->decode)
        keep_choices(s, line, event);
    for (size_t r = 0; event->experts && s->trace && r < (size_t)event->n_rows; r++)
        TRY(routing_trace_writer_add(s->trace, &(routing_row){.experts = event->experts + r * per_row,
                                                              .weights = event->weights + r * per_row,
                                                              .sequence = line,
                                                              .position = event->first_position + (int)r,
                                                              .phase = event->decode ? PHASE_DECODE : PHASE_PREFILL,
                                                              .domain = line_domain(s, line),
                                                              .owner = event->owner,
                                                              .step = (int)event->step}));
    return STATUS_OK;
}

static void note_failure(score *s, status failed, const char *cause)
{
    if (s->failed != STATUS_OK || failed == STATUS_OK)
        return;
    s->failed = failed;
    snprintf(s->cause, sizeof s->cause, "%s", cause);
}

static void listen_event(void *arg, const engine_event *event)
{
    score *s = arg;
    int line = (int)event->id;
    if (event->kind == ENGINE_EVENT_TOKEN)
        s->results[line].generated[s->results[line].n_generated++] = event->token;
    if (event->kind == ENGINE_EVENT_ROWS && s->failed == STATUS_OK) {
        status st = take_rows(s, line, event);
        note_failure(s, st, status_message());
    }
    if (event->kind == ENGINE_EVENT_FINISHED && event->finish == ENGINE_FINISH_FAILED) {
        char cause[512];
        snprintf(cause, sizeof cause, "%s: line %d: %s", s->options->input_path, s->lines.lines[line].line_number, event->reason);
        note_failure(s, STATUS_BAD_INPUT, cause);
    }
    s->n_rows += event->kind == ENGINE_EVENT_TOKEN ? 1 : event->kind == ENGINE_EVENT_ROWS && !event->decode ? event->n_rows : 0;
    s->n_finished += event->kind == ENGINE_EVENT_FINISHED;
    double seconds = clock_seconds() - s->ready;
    console_show(&s->console, "%d of %d lines done, %lld tokens, %s", s->n_finished, s->lines.n_lines, s->n_rows,
                 human_rate(seconds > 0 ? (double)s->n_rows / seconds : 0, "tokens/s").text);
}

/* ---- the run ------------------------------------------------------------------------------------------------------------------
 */

static status submit_all(score *s)
{
    for (int i = 0; i < s->lines.n_lines; i++) {
        const token_line *line = &s->lines.lines[i];
        engine_request r = {.id = (uint64_t)i,
                            .prompt = line->ids,
                            .n_prompt = line->n_ids,
                            .max_new = s->options->greedy,
                            .want = ENGINE_WANT_SCORE | ENGINE_IGNORE_EOS,
                            .domain = line_domain(s, i),
                            .owner = -1};
        r.want |= s->options->logits_path ? ENGINE_WANT_LOGITS | ENGINE_WANT_CHOICES : 0;
        r.want |= s->options->routing_path ? ENGINE_WANT_CHOICES : 0;
        status st = engine_submit(runtime_engine(s->runtime), &r);
        if (st != STATUS_OK) {
            char cause[900];
            snprintf(cause, sizeof cause, "%s", status_message());
            return status_fail(st, "%s: line %d: %s", s->options->input_path, line->line_number, cause);
        }
    }
    return STATUS_OK;
}

static status lead(score *s)
{
    engine *e = runtime_engine(s->runtime);
    status prepared = open_outputs(s);
    console_open(&s->console, STDERR_FILENO);
    if (prepared == STATUS_OK)
        prepared = submit_all(s);
    status st = STATUS_OK;
    while (prepared == STATUS_OK && engine_busy(e) && st == STATUS_OK)
        st = engine_step(e);
    console_erase(&s->console);
    if (st == STATUS_OK)
        st = engine_stop(e);
    s->out_of_step = st != STATUS_OK;
    return st != STATUS_OK ? st : prepared;
}

static status follow(score *s)
{
    status st = engine_follow(runtime_engine(s->runtime));
    s->out_of_step = st != STATUS_OK;
    return st;
}

static status run_steps(score *s)
{
    s->ready = clock_seconds();
    status st = group_rank(s->group) == 0 ? lead(s) : follow(s);
    s->step_seconds = clock_seconds() - s->ready;
    return st;
}

/* ---- afterwards
 * ----------------------------------------------------------------------------------------------------------------- */

/* Rows this rank sent straight to each other rank, and behind them rows it got from each other rank of its node that had received
 * them from another node. */
static void copy_links(const exchange_stats *x, size_t n, unsigned long long *out)
{
    memcpy(out, x->rows_sent, n * sizeof *out);
    memcpy(out + n, x->rows_relayed, n * sizeof *out);
}

static void describe_rank(const score *s, score_rank *out)
{
    model *m = engine_model(runtime_engine(s->runtime));
    const exchange_stats *x = exchange_get_stats(model_exchange(m));
    *out = (score_rank){.times = *model_get_times(m),
                        .wait_seconds = x->wait_seconds,
                        .bytes_same_rank = x->bytes_same_rank,
                        .bytes_same_node = x->bytes_same_node + x->bytes_relayed,
                        .bytes_cross_node = x->bytes_cross_node,
                        .return_same_node = x->return_bytes_same_node,
                        .return_cross_node = x->return_bytes_cross_node,
                        .header_bytes = x->header_bytes,
                        .spills = x->spills,
                        .spilled_rows = x->spilled_rows,
                        .combined_rows = x->combined_rows,
                        .step_seconds = s->step_seconds};
    runtime_memory_use(s->runtime, &out->memory);
}

static status gather_routing(score *s)
{
    const void **parts = calloc((size_t)group_size(s->group), sizeof *parts);
    size_t *sizes = calloc((size_t)group_size(s->group), sizeof *sizes);
    bytes_writer mine = {0};
    status st = parts && sizes ? routing_stats_pack(engine_routing(runtime_engine(s->runtime)), &mine)
                               : status_fail(STATUS_NO_MEMORY, "no memory to gather the routing statistics");
    TRY_GOTO(group_agree(s->group, st), out);
    TRY_GOTO(group_gather(s->group, mine.data, mine.size, parts, sizes), out);
    for (int r = 0; r < group_size(s->group) && group_rank(s->group) == 0; r++)
        TRY_GOTO(routing_stats_add_packed(s->routing, parts[r], sizes[r]), out);
out:
    free(parts);
    free(sizes);
    bytes_clear(&mine);
    return st;
}

static status create_total(score *s)
{
    return routing_stats_create(routing_stats_shape(engine_routing(runtime_engine(s->runtime))), s->options->stats_path != NULL,
                                &s->routing);
}

static void add_links(const char *from, size_t n, size_t rank, unsigned long long *links)
{
    unsigned long long rows;
    for (size_t r = 0; r < n; r++) {
        memcpy(&rows, from + r * sizeof rows, sizeof rows);
        links[rank * n + r] += rows;
        memcpy(&rows, from + (n + r) * sizeof rows, sizeof rows);
        links[r * n + rank] += rows;
    }
}

/* Every rank's account to rank 0, which prints. */
static status summarise(score *s)
{
    int n = group_size(s->group), layers = runtime_config(s->runtime)->n_moe_layers;
    size_t load_bytes = (size_t)layers * sizeof(unsigned long long), link_bytes = 2 * (size_t)n * sizeof(unsigned long long);
    unsigned char *mine = calloc(1, sizeof(score_rank) + load_bytes + link_bytes);
    unsigned long long *links = calloc((size_t)n * (size_t)n, sizeof *links);
    score_rank *ranks = calloc((size_t)n, sizeof *ranks);
    unsigned long long *load = calloc((size_t)n * (size_t)layers + 1, sizeof *load);
    const void **parts = calloc((size_t)n, sizeof *parts);
    size_t *sizes = calloc((size_t)n, sizeof *sizes);
    status st =
        mine && links && ranks && load && parts && sizes ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for the summary");
    TRY_GOTO(group_agree(s->group, st), out);
    describe_rank(s, (score_rank *)(void *)mine);
    memcpy(mine + sizeof(score_rank), model_layer_load(engine_model(runtime_engine(s->runtime))), load_bytes);
    copy_links(exchange_get_stats(model_exchange(engine_model(runtime_engine(s->runtime)))), (size_t)n,
               (unsigned long long *)(void *)(mine + sizeof(score_rank) + load_bytes));
    TRY_GOTO(group_gather(s->group, mine, sizeof(score_rank) + load_bytes + link_bytes, parts, sizes), out);
    if (group_rank(s->group) != 0)
        goto out;
    for (int r = 0; r < n; r++) {
        memcpy(&ranks[r], parts[r], sizeof *ranks);
        memcpy(load + (size_t)r * (size_t)layers, (const char *)parts[r] + sizeof *ranks, load_bytes);
        add_links((const char *)parts[r] + sizeof *ranks + load_bytes, (size_t)n, (size_t)r, links);
    }
    engine_counters counters;
    engine_get_counters(runtime_engine(s->runtime), &counters);
    score_summary summary = {.options = s->options,
                             .config = runtime_config(s->runtime),
                             .plan = runtime_plan(s->runtime),
                             .lines = &s->lines,
                             .results = s->results,
                             .ranks = ranks,
                             .n_ranks = n,
                             .n_nodes = group_n_nodes(s->group),
                             .threads = runtime_threads(s->runtime),
                             .isa = kernel_isa_name(runtime_isa(s->runtime)),
                             .exchange = exchange_name(model_exchange(engine_model(runtime_engine(s->runtime)))),
                             .times = *engine_get_times(runtime_engine(s->runtime)),
                             .layer_load = load,
                             .link_rows = links,
                             .n_moved = counters.n_moved,
                             .moved_bytes = counters.moved_bytes,
                             .moved_cross_bytes = counters.moved_cross_bytes,
                             .routing = s->routing,
                             .load_seconds = s->ready - s->start};
    if (s->options->json)
        st = score_print_json(&summary);
    else
        score_print_text(&summary);
out:
    free(mine);
    free(links);
    free(ranks);
    free(load);
    free(parts);
    free(sizes);
    return st;
}

static status run(score *s)
{
    s->start = clock_seconds();
    TRY(group_agree(s->group, group_rank(s->group) == 0 ? read_input(s) : STATUS_OK));
    TRY(share_input(s));
    TRY(runtime_create(s->group, &s->runtime_options, listen_event, s, &s->runtime));
    status st = run_steps(s);
    if (s->out_of_step)
        return st;
    TRY(group_agree(s->group, st));
    TRY(group_agree(s->group, create_total(s)));
    TRY(gather_routing(s));
    TRY(group_agree(s->group, group_rank(s->group) == 0 ? close_outputs(s) : STATUS_OK));
    return group_agree(s->group, summarise(s));
}

static void clear(score *s)
{
    for (int i = 0; i < s->lines.n_lines; i++) {
        if (s->results)
            free(s->results[i].generated);
        if (s->experts)
            free(s->experts[i]);
        if (s->weights)
            free(s->weights[i]);
    }
    void *all[] = {s->results,       s->experts,      s->weights,     s->logits_index, s->experts_index,
                   s->weights_index, s->greedy_index, s->domain_text, s->domains};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    safetensors_writer_destroy(s->writer);
    routing_trace_writer_destroy(s->trace);
    routing_stats_destroy(s->routing);
    runtime_destroy(s->runtime);
    token_lines_clear(&s->lines);
    model_config_clear(&s->config);
}

status score_run(group *g, const score_options *options, bool *out_of_step)
{
    score s = {.group = g, .options = options};
    status st = run(&s);
    *out_of_step = s.out_of_step || st == STATUS_PEER_LOST || st == STATUS_STOPPED;
    if (!*out_of_step)
        clear(&s);
    return st;
}
