/* Every published measure of a plan, and ours. */
#include "placement/planner/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

double score_balance(const problem *p, const plan *made, int *worst_layer, double *worst)
{
    double *rows = calloc((size_t)p->n_ranks, sizeof *rows), sum = 0, most = 0;
    for (int l = 0; rows && l < p->n_layers; l++) {
        double busiest = 0;
        memset(rows, 0, (size_t)p->n_ranks * sizeof *rows);
        for (int e = 0; e < p->n_experts; e++)
            for (int c = 0, n = plan_n_copies(made, l, e); c < n; c++)
                rows[plan_copies(made, l, e)[c]] += p->load[problem_at(p, l, e)] / n;
        for (int g = 0; g < p->n_ranks; g++)
            busiest = fmax(busiest, rows[g] / p->share[g]);
        double ratio = p->rows[l] > 0 ? busiest / p->rows[l] : 1;
        sum += ratio;
        if (ratio > most) {
            most = ratio;
            if (worst_layer)
                *worst_layer = l;
        }
    }
    if (worst)
        *worst = most;
    free(rows);
    return rows ? sum / p->n_layers : NAN;
}

/* The busiest rank's rows are taken for independent draws with its share as their probability; layers see the same tokens, so
 * their errors are not averaged away. */
static double balance_error(const problem *p, double mean_ratio)
{
    double rows = 0;
    for (int l = 0; l < p->n_layers; l++)
        rows += p->rows[l] / p->n_layers;
    double share = mean_ratio / p->n_ranks;
    share = share < 1 ? share : 1;
    return rows > 0 ? p->n_ranks * sqrt(share * (1 - share) / rows) : 0;
}

double score_flow(const problem *p, const plan *made)
{
    if (!p->next_pairs || p->n_layers < 2)
        return p->next_pairs ? 0 : NAN;
    size_t n = (size_t)p->n_experts;
    double sum = 0;
    for (int l = 0; l + 1 < p->n_layers; l++) {
        const double *pairs = p->next_pairs + (size_t)l * n * n;
        double all = 0, far = 0;
        for (size_t i = 0; i < n; i++) {
            const double *distance = p->distance + (size_t)plan_copies(made, l, (int)i)[0] * (size_t)p->n_ranks;
            for (size_t j = 0; j < n; j++) {
                all += pairs[i * n + j];
                far += pairs[i * n + j] * distance[plan_copies(made, l + 1, (int)j)[0]];
            }
        }
        sum += all > 0 ? far / all : 0;
    }
    return sum / (p->n_layers - 1);
}

double score_moetuner(const problem *p, const plan *made)
{
    if (!p->next_pairs || p->n_layers < 2)
        return p->next_pairs ? 0 : NAN;
    size_t n = (size_t)p->n_experts, ranks = (size_t)p->n_ranks;
    double *flow = malloc(ranks * ranks * sizeof *flow), sum = 0;
    for (int l = 0; flow && l + 1 < p->n_layers; l++) {
        const double *pairs = p->next_pairs + (size_t)l * n * n;
        double all = 0, slowest = 0;
        memset(flow, 0, ranks * ranks * sizeof *flow);
        for (size_t i = 0; i < n; i++) {
            double *from = flow + (size_t)plan_copies(made, l, (int)i)[0] * ranks;
            for (size_t j = 0; j < n; j++) {
                all += pairs[i * n + j];
                from[plan_copies(made, l + 1, (int)j)[0]] += pairs[i * n + j];
            }
        }
        for (int g = 0; g < p->n_ranks; g++)
            for (int h = 0; h < p->n_ranks; h++)
                slowest = fmax(slowest, flow[(size_t)g * ranks + (size_t)h] * topology_us_per_byte(p->topology, g, h));
        sum += all > 0 ? slowest * p->topology->row_bytes / all : 0;
    }
    free(flow);
    return flow ? sum : NAN;
}

typedef struct {
    const problem *p;
    const plan *made;
    double *sum; /* [n_layers] */
} rank_count;

static status count_ranks(void *arg, int l)
{
    rank_count *c = arg;
    const traffic *t = c->p->traffic;
    int64_t *seen = malloc((size_t)c->p->n_ranks * sizeof *seen), n = 0;
    if (!seen)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d ranks", c->p->n_ranks);
    for (int g = 0; g < c->p->n_ranks; g++)
        seen[g] = -1;
    for (int64_t token = 0; token < t->n_tokens; token++) {
        const uint16_t *experts = traffic_experts(t, l, token);
        for (int j = 0; j < t->shape.top_k; j++) {
            if (experts[j] == ROUTING_NO_EXPERT)
                continue;
            int home = plan_copies(c->made, l, experts[j])[0];
            n += seen[home] != token;
            seen[home] = token;
        }
    }
    c->sum[l] = (double)n / (double)t->n_tokens;
    free(seen);
    return STATUS_OK;
}

double score_ranks(const problem *p, const plan *made)
{
    double *sum = p->traffic ? calloc((size_t)p->n_layers, sizeof *sum) : NULL, all = 0;
    if (!sum || parallel_for(p->request->threads, p->n_layers, count_ranks, &(rank_count){p, made, sum}) != STATUS_OK) {
        free(sum);
        return NAN;
    }
    for (int l = 0; l < p->n_layers; l++)
        all += sum[l];
    free(sum);
    return all / p->n_layers;
}

static status replay(const problem *p, const plan *made, replay_result *out)
{
    replay_options o = p->request->replay;
    o.threads = p->request->threads;
    if (o.owners != OWNER_AFFINITY && p->schedule)
        return replay_run_schedule(p->traffic, p->schedule, made, p->topology, &o, out);
    return replay_run(p->traffic, made, p->topology, &o, out);
}

status score_step_us(const problem *p, const plan *made, double *out)
{
    replay_result r = {0};
    TRY(replay(p, made, &r));
    *out = r.step_us;
    replay_result_clear(&r);
    return STATUS_OK;
}

static int count_replicas(const plan *made)
{
    int n_lists = made->n_layers * made->n_experts;
    return made->first_copy[n_lists] - n_lists;
}

status score_plan(const problem *p, const plan *made, plan_score *out)
{
    plan_score s = {0};
    s.max_over_mean_mean = score_balance(p, made, &s.worst_layer, &s.max_over_mean_worst);
    s.max_over_mean_error = balance_error(p, s.max_over_mean_mean);
    s.flow = score_flow(p, made);
    s.moetuner = score_moetuner(p, made);
    s.ranks_per_token = score_ranks(p, made);
    s.n_replicas = count_replicas(made);
    s.replica_bytes = s.n_replicas * p->topology->bytes_per_expert;
    if (p->traffic && p->request->replay.concurrency > 0) {
        TRY(replay(p, made, &s.replay));
        s.has_replay = true;
    }
    *out = s;
    return STATUS_OK;
}

void score_clear(plan_score *s)
{
    replay_result_clear(&s->replay);
    *s = (plan_score){0};
}
