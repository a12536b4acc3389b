#include "cluster/plan_meter.h"

#include <stdlib.h>
#include <string.h>

void plan_meter_clear(plan_meter *m)
{
    free(m->now.ranks);
    *m = (plan_meter){0};
}

bool plan_meter_reset(plan_meter *m, int n_ranks)
{
    plan_meter_clear(m);
    double *ranks = calloc(3 * (size_t)n_ranks, sizeof *ranks);
    if (!ranks)
        return false;
    m->n_ranks = n_ranks;
    m->now.ranks = ranks;
    m->newer.ranks = ranks + n_ranks;
    m->older.ranks = ranks + 2 * n_ranks;
    return true;
}

static void keep(plan_meter_sum *to, const plan_meter_sum *from, int n_ranks)
{
    double *ranks = to->ranks;
    memcpy(ranks, from->ranks, (size_t)n_ranks * sizeof *ranks);
    *to = *from;
    to->ranks = ranks;
}

static void note_sums(plan_meter *m, const Convoke__Control__Report *r)
{
    size_t n = (size_t)m->n_ranks;
    m->computes = r->n_compute_seconds_of_rank == n;
    if (m->computes)
        memcpy(m->now.ranks, r->compute_seconds_of_rank, n * sizeof *m->now.ranks);
    else if (r->n_lateness_of_rank == n)
        memcpy(m->now.ranks, r->lateness_of_rank, n * sizeof *m->now.ranks);
    m->now.link_bytes = 0;
    for (size_t k = 1; k < r->n_link_bytes && k < 3; k++)
        m->now.link_bytes += (double)r->link_bytes[k];
}

void plan_meter_note(plan_meter *m, const Convoke__Control__Report *r, double now)
{
    if (m->n_ranks == 0)
        return;
    bool first = m->now.at == 0;
    note_sums(m, r);
    m->now.at = now;
    if (first) { /* counters are of the launch's whole life: from here on differences count */
        keep(&m->newer, &m->now, m->n_ranks);
        keep(&m->older, &m->now, m->n_ranks);
        return;
    }
    if (r->prefill_rows + r->decode_rows > 0) {
        m->now.steps++;
        m->now.rows += r->prefill_rows + r->decode_rows;
        m->now.seconds += r->step_seconds;
    }
    if (m->now.steps >= m->newer.steps + PLAN_METER_STEPS) {
        keep(&m->older, &m->newer, m->n_ranks);
        keep(&m->newer, &m->now, m->n_ranks);
    }
    double sum = 0;
    for (size_t l = 0; l < r->n_load_max_over_mean; l++)
        sum += r->load_max_over_mean[l];
    m->balance = r->n_load_max_over_mean > 0 ? sum / (double)r->n_load_max_over_mean : 0;
}

/* Seconds that the busiest rank computed beyond the mean. Of lateness, where nothing else is known: the rank that others waited
 * for was waited for by the others only, so the mean of all is less by its own part. */
static double excess(const plan_meter *m)
{
    double most = 0, sum = 0, n = m->n_ranks;
    for (int r = 0; r < m->n_ranks; r++) {
        double seconds = m->now.ranks[r] - m->older.ranks[r];
        most = seconds > most ? seconds : most;
        sum += seconds;
    }
    return m->computes ? most - sum / n : sum * (n - 1) / n;
}

plan_measure plan_meter_read(const plan_meter *m)
{
    double steps = (double)(m->now.steps - m->older.steps), rows = (double)(m->now.rows - m->older.rows);
    double wall = m->now.at - m->older.at;
    if (!(steps > 0))
        return (plan_measure){0};
    return (plan_measure){.steps = (uint64_t)steps,
                          .step_seconds = (m->now.seconds - m->older.seconds) / steps,
                          .rows_per_step = rows / steps,
                          .rows_per_second = wall > 0 ? rows / wall : 0,
                          .excess_seconds = excess(m) / steps,
                          .link_bytes = (m->now.link_bytes - m->older.link_bytes) / rows,
                          .balance = m->balance};
}
