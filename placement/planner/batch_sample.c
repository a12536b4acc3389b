/* batch_sample.c - a third of the steps at most are the replay's own (every n-th when there are many), most of the
 * others come from replays of sequences drawn with replacement, the rest are random places in random sequences. */
#include "placement/planner/batch_sample.h"

#include <stdlib.h>
#include <string.h>

enum {
    MIN_STEPS = 48,
    MAX_RERUNS = 12,
    SAMPLE_STREAM = 0x5a3b1e, /* of random numbers */
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static status allocate(int64_t n_steps, int64_t n_entries, replay_schedule *s)
{
    *s = (replay_schedule){0};
    s->first = calloc((size_t)n_steps + 1, sizeof *s->first);
    s->token = calloc((size_t)n_entries + 1, sizeof *s->token);
    s->owner = calloc((size_t)n_entries + 1, sizeof *s->owner);
    if (s->first && s->token && s->owner)
        return STATUS_OK;
    replay_schedule_clear(s);
    return status_fail(STATUS_NO_MEMORY, "no memory for a sample of %lld tokens", (long long)n_entries);
}

static void add_step(replay_schedule *s, const int64_t *token, const uint16_t *owner, int64_t n)
{
    int64_t at = s->first[s->n_steps];
    memcpy(s->token + at, token, (size_t)n * sizeof *token);
    memcpy(s->owner + at, owner, (size_t)n * sizeof *owner);
    s->first[++s->n_steps] = at + n;
}

/* n_wanted of the schedule's steps, evenly spread. */
static void add_replayed(const replay_schedule *from, int64_t n_wanted, replay_schedule *out)
{
    for (int64_t i = 0; i < n_wanted; i++) {
        int64_t s = i * from->n_steps / n_wanted;
        add_step(out, from->token + from->first[s], from->owner + from->first[s], from->first[s + 1] - from->first[s]);
    }
}

/* ---- drawn steps ---- */

typedef struct {
    const traffic *t;
    const uint16_t *owner_of_sequence; /* NULL: places have owners */
    random_stream random;
    int n_places, n_ranks;
    int64_t *token; /* [n_places] */
    int64_t *end;   /* [n_places] of the token's sequence */
    uint16_t *owner;
} drawing;

static status drawing_start(const problem *p, drawing *d)
{
    int n = p->request->replay.concurrency;
    *d = (drawing){.t = p->traffic,
                   .owner_of_sequence = p->owner_of_sequence,
                   .random = random_open(p, SAMPLE_STREAM),
                   .n_places = n,
                   .n_ranks = p->n_ranks};
    d->token = calloc((size_t)n, sizeof *d->token);
    d->end = calloc((size_t)n, sizeof *d->end);
    d->owner = calloc((size_t)n, sizeof *d->owner);
    if (!d->token || !d->end || !d->owner)
        return status_fail(STATUS_NO_MEMORY, "no memory for %d places", n);
    for (int i = 0; i < n; i++)
        d->owner[i] = (uint16_t)(i % p->n_ranks);
    return STATUS_OK;
}

static void drawing_end(drawing *d)
{
    free(d->token);
    free(d->end);
    free(d->owner);
}

static void draw_sequence(drawing *d, int place)
{
    int s = random_below(&d->random, d->t->n_sequences);
    d->token[place] = d->t->first_token[s];
    d->end[place] = d->t->first_token[s + 1];
    if (d->owner_of_sequence)
        d->owner[place] = d->owner_of_sequence[s];
}

/* One replay of as many drawn sequences as there are; every stride-th step is kept, n_wanted at most. */
static void add_rerun(drawing *d, int64_t stride, int64_t n_wanted, replay_schedule *out)
{
    int left = d->t->n_sequences - d->n_places;
    for (int i = 0; i < d->n_places; i++)
        draw_sequence(d, i);
    for (int64_t step = 0; n_wanted > 0; step++) {
        if (step % stride == 0) {
            add_step(out, d->token, d->owner, d->n_places);
            n_wanted--;
        }
        for (int i = 0; i < d->n_places; i++) {
            if (++d->token[i] < d->end[i])
                continue;
            if (left-- <= 0)
                return;
            draw_sequence(d, i);
        }
    }
}

static void add_random(drawing *d, int64_t n_wanted, replay_schedule *out)
{
    for (; n_wanted > 0; n_wanted--) {
        for (int i = 0; i < d->n_places; i++) {
            draw_sequence(d, i);
            d->token[i] += (int64_t)(random_unit(&d->random) * (double)(d->end[i] - d->token[i]));
        }
        add_step(out, d->token, d->owner, d->n_places);
    }
}

static status add_drawn(const problem *p, int64_t n_steps, replay_schedule *out)
{
    drawing d;
    status st = drawing_start(p, &d);
    int64_t from_reruns = n_steps * 4 / 5, replayed = p->schedule->n_steps;
    int64_t n = from_reruns / replayed;
    n = n < 1 ? 1 : n > MAX_RERUNS ? MAX_RERUNS : n;
    int64_t each = from_reruns / n, stride = (replayed + each - 1) / each;
    if (st == STATUS_OK) {
        int64_t before = out->n_steps;
        for (int64_t i = 0; i < n; i++)
            add_rerun(&d, stride, each, out);
        int64_t rest = n_steps - (out->n_steps - before);
        add_random(&d, smaller(rest, n_steps / 2), out);
    }
    drawing_end(&d);
    return st;
}

static int64_t replayed_of(const problem *p, int64_t n_steps)
{
    return smaller(p->schedule->n_steps, p->request->replay.owners == OWNER_RECORDED ? n_steps : n_steps / 3);
}

status batch_sample(const problem *p, int64_t max_steps, int64_t max_tokens, replay_schedule *out)
{
    const replay_schedule *from = p->schedule;
    bool drawn = p->request->replay.owners != OWNER_RECORDED;
    int64_t a_step = (from->first[from->n_steps] + from->n_steps - 1) / from->n_steps;
    int64_t n_steps = max_tokens / a_step;
    n_steps = n_steps < MIN_STEPS ? MIN_STEPS : n_steps > max_steps ? max_steps : n_steps;
    int64_t replayed = replayed_of(p, n_steps), longest = 0;
    for (int64_t s = 0; s < from->n_steps; s++)
        longest = from->first[s + 1] - from->first[s] > longest ? from->first[s + 1] - from->first[s] : longest;
    replay_schedule s;
    TRY(allocate(n_steps, n_steps * longest, &s));
    add_replayed(from, replayed, &s);
    status st = drawn ? add_drawn(p, n_steps - replayed, &s) : STATUS_OK;
    if (st == STATUS_OK)
        *out = s;
    else
        replay_schedule_clear(&s);
    return st;
}
