/* test_report.c - what people see of statistics and plans: the numbers against counting by hand, the pages against Python's
 * parsers, the commands from files to files. */
#include "placement/planner/commands.h"
#include "placement/planner/formats.h"
#include "placement/planner/report_html.h"
#include "placement/planner/stats_view.h"
#include "tests/support.h"
#include "tests/support_plan.h"
#include "tests/support_routing.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LAYERS = 4, EXPERTS = 6, K = 2, DOMAINS = 3 };

/* Skewed, and domains differ: domain d prefers experts near 2 d. */
static void random_row(uint64_t *seed, int domain, uint16_t *experts)
{
    for (int l = 0; l < LAYERS; l++) {
        int first = (2 * domain + support_below(seed, 3)) % EXPERTS;
        experts[l * K] = (uint16_t)first;
        experts[l * K + 1] = (uint16_t)((first + 1 + support_below(seed, 2)) % EXPERTS);
    }
}

static routing_shape shape_of(const char *const *domains)
{
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, DOMAINS);
    if (domains)
        shape.domains = domains;
    return shape;
}

static routing_stats *make_stats(uint64_t seed, int n, const char *const *domains, bool pairs)
{
    routing_shape shape = shape_of(domains);
    routing_stats *stats;
    uint16_t experts[LAYERS * K];
    assert_int_equal(routing_stats_create(&shape, pairs, &stats), STATUS_OK);
    for (int i = 0; i < n; i++) {
        random_row(&seed, i % DOMAINS, experts);
        assert_int_equal(routing_stats_add_row(stats, experts, i % DOMAINS, i % 2), STATUS_OK);
    }
    return stats;
}

/* ---- numbers ---- */

static void balance_has_the_spread_of_repeated_samples(void **state)
{
    (void)state;
    /* the same traffic drawn many times: the spread of the balance is about the error that one sample claims */
    enum { SAMPLES = 300, TOKENS = 400 };
    plan_shape shape = {.n_ranks = 3, .n_experts = EXPERTS, .n_layers = LAYERS};
    plan p;
    double sum = 0, squares = 0, claimed = 0;
    assert_int_equal(plan_contiguous(&shape, NULL, &p), STATUS_OK);
    for (uint64_t i = 0; i < SAMPLES; i++) {
        routing_stats *stats = make_stats(i, TOKENS, NULL, false);
        stats_sum s;
        balance_view b;
        double layers[LAYERS], mean = 0;
        assert_int_equal(stats_sum_create(stats, false, &s), STATUS_OK);
        assert_int_equal(s.tokens[PHASE_PREFILL] + s.tokens[PHASE_DECODE], TOKENS);
        assert_int_equal(stats_view_balance(&s, &p, layers, &b), STATUS_OK);
        for (int l = 0; l < LAYERS; l++)
            mean += layers[l] / LAYERS;
        assert_true(fabs(mean - b.mean) < 1e-12 && b.worst == layers[b.worst_layer] && b.worst >= b.mean);
        sum += b.mean;
        squares += b.mean * b.mean;
        claimed += b.error / SAMPLES;
        stats_sum_clear(&s);
        routing_stats_destroy(stats);
    }
    double spread = sqrt(squares / SAMPLES - sum / SAMPLES * (sum / SAMPLES));
    assert_true(claimed > spread && claimed < 8 * spread); /* it is meant to be careful, and layers err together */
    plan_clear(&p);
}

static void skew_is_that_of_the_counts(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(2, 8, 1, 1);
    const uint64_t counts[16] = {8, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    routing_stats *stats;
    stats_sum s;
    skew_view skew[2];
    assert_int_equal(routing_stats_create(&shape, false, &stats), STATUS_OK);
    assert_int_equal(routing_stats_add_counts(stats, counts, 8, 0, PHASE_DECODE), STATUS_OK);
    assert_int_equal(stats_sum_create(stats, true, &s), STATUS_OK);
    assert_null(s.next_pairs);
    stats_view_skew(&s, skew);
    assert_true(skew[0].hottest == 8 && fabs(skew[0].even - 1) < 1e-12 && skew[0].top_share == 1 && skew[0].hottest_expert == 0);
    assert_true(skew[1].hottest == 1 && fabs(skew[1].even - 8) < 1e-12 && skew[1].top_share == 0.125);
    stats_sum_clear(&s);
    routing_stats_destroy(stats);
}

static void alike_domains_have_cosine_one(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(1, 4, 1, 3);
    const uint64_t counts[3][4] = {{1, 2, 0, 0}, {10, 20, 0, 0}, {0, 0, 5, 1}};
    routing_stats *stats;
    double cosine[9];
    assert_int_equal(routing_stats_create(&shape, false, &stats), STATUS_OK);
    for (int d = 0; d < 3; d++)
        assert_int_equal(routing_stats_add_counts(stats, counts[d], 1, d, PHASE_DECODE), STATUS_OK);
    assert_int_equal(stats_view_similarity(stats, cosine), STATUS_OK);
    assert_true(fabs(cosine[1] - 1) < 1e-12 && cosine[1] == cosine[3] && cosine[2] == 0 && cosine[0] == 1 && cosine[8] == 1);
    routing_stats_destroy(stats);
}

/* The best path among all EXPERTS^LAYERS, by trying them. */
static double best_path(const stats_sum *s, double tokens)
{
    double best = -1;
    for (int code = 0; code < EXPERTS * EXPERTS * EXPERTS * EXPERTS; code++) {
        int path[LAYERS], rest = code;
        double excess = 0;
        for (int l = 0; l < LAYERS; l++, rest /= EXPERTS)
            path[l] = rest % EXPERTS;
        for (int l = 0; l + 1 < LAYERS; l++) {
            double one = (double)s->per_expert[l * EXPERTS + path[l]],
                   other = (double)s->per_expert[(l + 1) * EXPERTS + path[l + 1]];
            excess += s->next_pairs[(l * EXPERTS + path[l]) * EXPERTS + path[l + 1]] / tokens - one / tokens * (other / tokens);
        }
        best = excess > best ? excess : best;
    }
    return best;
}

static void first_chain_is_the_best_of_all_paths(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed < 6; seed++) {
        routing_stats *stats = make_stats(seed, 90, NULL, true);
        stats_sum s;
        expert_chain chains[3];
        int n, used[LAYERS][EXPERTS] = {{0}};
        assert_int_equal(stats_sum_create(stats, true, &s), STATUS_OK);
        assert_int_equal(stats_view_chains(&s, 3, chains, &n), STATUS_OK);
        assert_int_equal(n, 3);
        assert_true(fabs(chains[0].excess - best_path(&s, 90)) < 1e-12);
        for (int i = 0; i < n; i++) {
            assert_true(i == 0 || chains[i].excess <= chains[i - 1].excess + 1e-12);
            for (int l = 0; l < LAYERS; l++) {
                assert_int_equal(used[l][chains[i].experts[l]]++, 0);
                assert_true(l + 1 == LAYERS || (chains[i].share[l] >= 0 && chains[i].share[l] <= 1 + 1e-12));
            }
        }
        for (int i = 0; i < n; i++)
            expert_chain_clear(&chains[i]);
        stats_sum_clear(&s);
        routing_stats_destroy(stats);
    }
}

/* ---- pages ---- */

static void check_page(const char *path, int columns, int domains, int chains, const char *texts)
{
    char command[9000];
    const char *named = getenv("CONVOKE_PYTHON");
    snprintf(command, sizeof command, "%s %s %s %d %d %d %d %s", named ? named : "/usr/bin/python3",
             support_source("tests/check_report.py"), path, LAYERS, columns, domains, chains, texts);
    assert_int_equal(system(command), 0);
}

static void pages_are_whole_and_stand_alone(void **state)
{
    (void)state;
    static const char *const odd_names[] = {"a <b> & \"c\" 'd'", "\xe6\x95\xb0\xe5\xad\xa6", "x]]>y"};
    const char *folder = support_scratch();
    char path[4200];
    plan_shape shape = {.n_ranks = 5, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = shape_of(NULL).layer_numbers};
    uint64_t seed = 3;
    plan p;
    snprintf(path, sizeof path, "%s/report.html", folder);
    for (int pairs = 0; pairs < 2; pairs++) {
        routing_stats *stats = make_stats(4, 120, odd_names, pairs);
        assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.5, &p), STATUS_OK);
        const report_input in = {.title = "<stats> & more", .stats = stats, .plan = &p};
        assert_int_equal(report_write(&in, path), STATUS_OK);
        check_page(path, 5, DOMAINS, pairs ? 6 : 0,
                   "'<stats> & more' 'a <b> & \"c\" '\\''d'\\''' '\xe6\x95\xb0\xe5\xad\xa6' 'x]]>y'");
        plan_clear(&p);
        routing_stats_destroy(stats);
    }
    assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.5, &p), STATUS_OK);
    const report_input alone = {.title = "plan", .plan = &p};
    assert_int_equal(report_write(&alone, path), STATUS_OK);
    check_page(path, 5, 0, 0, "'Copies by layer and rank'");
    plan_clear(&p);
    support_remove(folder);
}

static void empty_layers_draw_too(void **state)
{
    (void)state;
    routing_shape shape = support_routing_shape(LAYERS, EXPERTS, K, 1);
    uint64_t counts[LAYERS * EXPERTS] = {0};
    const char *folder = support_scratch();
    char path[4200];
    routing_stats *stats;
    plan p;
    counts[0] = 7; /* one expert of one layer has everything */
    snprintf(path, sizeof path, "%s/report.html", folder);
    assert_int_equal(routing_stats_create(&shape, false, &stats), STATUS_OK);
    assert_int_equal(routing_stats_add_counts(stats, counts, 7, 0, PHASE_DECODE), STATUS_OK);
    assert_int_equal(report_plan(stats, NULL, 2, &p), STATUS_OK);
    const report_input in = {.title = "few", .stats = stats, .plan = &p};
    assert_int_equal(report_write(&in, path), STATUS_OK);
    check_page(path, 2, 0, 0, "Skew");
    plan_clear(&p);
    routing_stats_destroy(stats);
    support_remove(folder);
}

/* ---- commands ---- */

typedef status command(int argc, char **argv);

/* Runs a command with its output in `text`; arguments are blank-separated. */
static status run(command *c, const char *line, char *text, size_t size)
{
    static char words[40000];
    char *argv[32], *rest = NULL;
    int argc = 0;
    FILE *out = tmpfile();
    snprintf(words, sizeof words, "%s", line);
    for (char *word = strtok_r(words, " ", &rest); word && argc < 31; word = strtok_r(NULL, " ", &rest))
        argv[argc++] = word;
    argv[argc] = NULL;
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    dup2(fileno(out), STDOUT_FILENO);
    status st = c(argc, argv);
    fflush(stdout);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    rewind(out);
    size_t n = fread(text, 1, size - 1, out);
    text[n] = '\0';
    fclose(out);
    return st;
}

/* The same, every @ in the line standing for the folder. */
static status run_in(command *c, const char *folder, const char *with_at, char *text, size_t size)
{
    static char line[40000];
    size_t used = 0, n = strlen(folder);
    for (const char *at = with_at; *at; at++) {
        assert_true(used + n + 2 < sizeof line);
        if (*at == '@') {
            memcpy(line + used, folder, n);
            used += n;
        }
        line[used++] = *at == '@' ? '/' : *at;
    }
    line[used] = '\0';
    return run(c, line, text, size);
}

static void write_trace(const char *path, uint64_t seed, int n, routing_stats *all)
{
    routing_shape shape = shape_of(NULL);
    routing_trace_writer *writer;
    uint16_t experts[LAYERS * K];
    const float weights[LAYERS * K] = {0};
    assert_int_equal(routing_trace_writer_create(path, &shape, &writer), STATUS_OK);
    for (int i = 0; i < n; i++) {
        random_row(&seed, i % DOMAINS, experts);
        const routing_row row = {.experts = experts,
                                 .weights = weights,
                                 .sequence = i / 10,
                                 .position = i % 10,
                                 .phase = i % 2,
                                 .domain = i % DOMAINS};
        assert_int_equal(routing_trace_writer_add(writer, &row), STATUS_OK);
        assert_int_equal(routing_stats_add_row(all, experts, i % DOMAINS, i % 2), STATUS_OK);
    }
    assert_int_equal(routing_trace_writer_finish(writer), STATUS_OK);
    routing_trace_writer_destroy(writer);
}

/* The counts of `part` are those of `all` in this domain (by name; NULL: all) and phase (-1: both), and no others. */
static void same_part(const routing_stats *all, const char *path, const char *domain, int phase, bool pairs)
{
    routing_stats *part;
    uint64_t want[LAYERS * EXPERTS], got[LAYERS * EXPERTS];
    const routing_shape *shape = routing_stats_shape(all);
    assert_int_equal(routing_stats_read(path, &part), STATUS_OK);
    assert_int_equal(routing_stats_has_pairs(part), pairs);
    routing_stats_sum_tokens(all, domain ? routing_shape_find_domain(shape, domain) : -1, phase, want);
    routing_stats_sum_tokens(part, -1, -1, got);
    assert_memory_equal(want, got, sizeof want);
    if (pairs && !domain && phase < 0)
        for (int d = 0; d < DOMAINS; d++)
            assert_memory_equal(routing_stats_next_layer_pairs(all, d, 0), routing_stats_next_layer_pairs(part, d, 0),
                                (LAYERS - 1) * EXPERTS * EXPERTS * sizeof(uint64_t));
    routing_stats_destroy(part);
}

static void stats_put_files_together(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200], text[20000];
    routing_shape shape = shape_of(NULL);
    routing_stats *all;
    assert_int_equal(routing_stats_create(&shape, true, &all), STATUS_OK);
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/trace%d", folder, i);
        write_trace(path, (uint64_t)i + 50, 120 + 30 * i, all);
    }
    snprintf(path, sizeof path, "%s/out", folder);
    assert_int_equal(run_in(command_stats, folder, "stats @trace0 @trace1 --pairs -o @out", text, sizeof text), STATUS_OK);
    assert_non_null(strstr(text, "plan contiguous on 8 ranks: busiest rank over mean"));
    same_part(all, path, NULL, -1, true);
    assert_int_equal(run_in(command_stats, folder, "stats @trace0 -o @part --pairs", text, sizeof text), STATUS_OK);
    assert_int_equal(run_in(command_stats, folder, "stats @part @trace1 --pairs -o @out", text, sizeof text), STATUS_OK);
    same_part(all, path, NULL, -1, true);
    assert_int_equal(
        run_in(command_stats, folder, "stats @trace0 @trace1 --domain code --phase decode -o @out", text, sizeof text),
        STATUS_OK);
    same_part(all, path, "code", PHASE_DECODE, false);
    assert_int_equal(
        run_in(command_stats, folder, "stats @trace1 @part --phase prefill -o @out --report @r.html", text, sizeof text),
        STATUS_OK);
    same_part(all, path, NULL, PHASE_PREFILL, false);
    snprintf(path, sizeof path, "%s/r.html", folder);
    check_page(path, 8, DOMAINS, 0, "");
    assert_int_equal(run_in(command_stats, folder, "stats @trace0 --domain nobody -o @out2", text, sizeof text),
                     STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "nothing was counted: no tokens of domain 'nobody'");
    assert_int_equal(run_in(command_stats, folder, "stats @r.html -o @out2", text, sizeof text), STATUS_BAD_INPUT);
    routing_stats_destroy(all);
    support_remove(folder);
}

static void everything_can_be_shown(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200], text[20000];
    routing_stats *stats = make_stats(9, 100, NULL, true);
    plan_shape shape = {.n_ranks = 3, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = shape_of(NULL).layer_numbers};
    uint64_t seed = 9;
    plan p;
    topology t;
    snprintf(path, sizeof path, "%s/trace", folder);
    write_trace(path, 9, 90, stats);
    snprintf(path, sizeof path, "%s/stats", folder);
    assert_int_equal(routing_stats_write(stats, path), STATUS_OK);
    assert_int_equal(support_random_plan(&seed, &shape, NULL, 0.5, &p), STATUS_OK);
    snprintf(path, sizeof path, "%s/plan", folder);
    assert_int_equal(plan_write(&p, NULL, path), STATUS_OK);
    assert_int_equal(topology_uniform(4, 2, &t), STATUS_OK);
    snprintf(path, sizeof path, "%s/topology", folder);
    assert_int_equal(topology_write(&t, path), STATUS_OK);
    static const struct {
        const char *line, *says;
    } cases[] = {{"show @stats", "tokens     95 generated, 95 of prompts"},
                 {"show @stats --plan @plan", "plan random on 3 ranks"},
                 {"show @stats --ranks 2 --report @a.html", "on 2 ranks"},
                 {"show @plan", "4 layers (1, 3, 5, 7) of 6 experts on 3 ranks, 1 node"},
                 {"show @plan --stats @stats --report @b.html", "busiest rank over mean"},
                 {"show @plan --report @c.html", "homes"},
                 {"show @trace --report @d.html", "45 generated, 45 of prompts, in 9 sequences"},
                 {"show @topology", "4 ranks on 2 nodes"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (run_in(command_show, folder, cases[i].line, text, sizeof text) != STATUS_OK)
            fail_msg("%s: %s", cases[i].line, status_message());
        if (!strstr(text, cases[i].says))
            fail_msg("%s: %s", cases[i].line, text);
    }
    snprintf(path, sizeof path, "%s/d.html", folder);
    check_page(path, 8, DOMAINS, 6, "chain");
    assert_int_equal(run_in(command_show, folder, "show @nothing", text, sizeof text), STATUS_IO);
    assert_int_equal(run_in(command_show, folder, "show @a.html", text, sizeof text), STATUS_BAD_INPUT);
    topology_clear(&t);
    plan_clear(&p);
    routing_stats_destroy(stats);
    support_remove(folder);
}

static void diff_prices_a_change(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200], text[20000];
    routing_stats *stats = make_stats(9, 0, NULL, false);
    plan_shape shape = {.n_ranks = 2, .n_experts = EXPERTS, .n_layers = LAYERS, .layer_numbers = shape_of(NULL).layer_numbers};
    plan p;
    snprintf(path, sizeof path, "%s/trace", folder);
    write_trace(path, 9, 90, stats);
    snprintf(path, sizeof path, "%s/a", folder);
    assert_int_equal(plan_contiguous(&shape, NULL, &p), STATUS_OK);
    assert_int_equal(plan_write(&p, NULL, path), STATUS_OK);
    for (int i = 0; i < LAYERS * EXPERTS; i++) /* everything on one rank: surely dearer */
        p.copy_ranks[i] = 0;
    snprintf(p.name, sizeof p.name, "crowded");
    snprintf(path, sizeof path, "%s/b", folder);
    assert_int_equal(plan_write(&p, NULL, path), STATUS_OK);
    assert_int_equal(run_in(command_diff, folder, "diff @a @b --moves", text, sizeof text), STATUS_OK);
    assert_non_null(strstr(text, "12 copies to make, 12 to drop of 24"));
    assert_non_null(strstr(text, "no rank needs more"));
    assert_null(strstr(text, "bytes "));
    assert_int_equal(run_in(command_diff, folder, "diff @b @a --ranks 2 --nodes 2 --bytes-per-expert 1000000 --traffic @trace",
                            text, sizeof text),
                     STATUS_OK);
    assert_non_null(strstr(text, "11.4 MiB over links"));
    assert_non_null(strstr(text, "time      12 ms")); /* 12 MB at 1 GB/s */
    assert_non_null(strstr(text, "pays      after "));
    assert_int_equal(run_in(command_diff, folder, "diff @a @b --traffic @trace", text, sizeof text), STATUS_OK);
    assert_non_null(strstr(text, "pays      never: nothing is saved"));
    snprintf(path, sizeof path, "%s/stats", folder);
    assert_int_equal(routing_stats_write(stats, path), STATUS_OK);
    assert_int_equal(run_in(command_diff, folder, "diff @b @a --stats @stats", text, sizeof text), STATUS_OK);
    assert_non_null(strstr(text, "from counts"));
    assert_non_null(strstr(text, "pays      unknown"));
    plan_clear(&p);
    routing_stats_destroy(stats);
    support_remove(folder);
}

static void import_and_export_say_what_they_made(void **state)
{
    (void)state;
    const char *folder = support_scratch();
    char path[4200], text[20000];
    FILE *f;
    snprintf(path, sizeof path, "%s/counts.csv", folder);
    f = fopen(path, "w");
    fprintf(f, "domain,layer,expert,count\nx,0,0,5\nx,0,1,5\ny,0,0,10\n");
    fclose(f);
    assert_int_equal(run_in(command_import, folder, "import olmoe @counts.csv --top-k 1 --model m -o @stats", text, sizeof text),
                     STATUS_OK);
    assert_non_null(strstr(text, "statistics of 20 tokens"));
    assert_int_equal(run_in(command_export, folder, "export sglang @stats -o @counts.json", text, sizeof text), STATUS_OK);
    assert_int_equal(run_in(command_import, folder, "import sglang @counts.json --top-k 1 -o @again", text, sizeof text),
                     STATUS_OK);
    assert_non_null(strstr(text, "statistics of 20 tokens"));
    assert_int_equal(run_in(command_import, folder, "import nothing @counts.csv -o @x", text, sizeof text), STATUS_USAGE);
    assert_non_null(strstr(status_message(), "there are flat, olmoe, cd-moe, sglang"));
    assert_int_equal(run_in(command_export, folder, "export flat @stats -o @x", text, sizeof text), STATUS_USAGE);
    assert_int_equal(run_in(command_export, folder, "export vllm @stats -o @x", text, sizeof text), STATUS_UNSUPPORTED);
    support_remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"balance's error covers the spread of repeated samples", balance_has_the_spread_of_repeated_samples, NULL, NULL, NULL},
        {"skew is that of the counts", skew_is_that_of_the_counts, NULL, NULL, NULL},
        {"domains that use experts alike have cosine 1", alike_domains_have_cosine_one, NULL, NULL, NULL},
        {"the first chain is the best of all paths, chains share no expert", first_chain_is_the_best_of_all_paths, NULL, NULL,
         NULL},
        {"pages are well-formed, whole and stand alone", pages_are_whole_and_stand_alone, NULL, NULL, NULL},
        {"layers without tokens are drawn too", empty_layers_draw_too, NULL, NULL, NULL},
        {"stats puts traces and statistics together, by domain and phase", stats_put_files_together, NULL, NULL, NULL},
        {"plans, statistics, traces and topologies are shown", everything_can_be_shown, NULL, NULL, NULL},
        {"diff prices a change", diff_prices_a_change, NULL, NULL, NULL},
        {"import and export say what they made", import_and_export_say_what_they_made, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
