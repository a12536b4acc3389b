/* replay_schedule.c - which token each place runs in each step, and who owns it.
 *
 *   sequences in file order   s0 s1 s2 | s3 s4 ...      place 0: s0 s0 s0 s3 s3 ...
 *                             C places |  waiting       place 1: s1 s4 ...              ends when a place stays empty
 */
#include "placement/replay.h"

#include <stdlib.h>
#include <string.h>

void replay_schedule_clear(replay_schedule *s)
{
    free(s->first);
    free(s->token);
    free(s->owner);
    free(s->move_step);
    free(s->move_from);
    free(s->move_to);
    *s = (replay_schedule){0};
}

static status allocate(int64_t max_steps, int64_t max_entries, int64_t max_moves, replay_schedule *s)
{
    *s = (replay_schedule){0};
    s->first = calloc((size_t)max_steps + 1, sizeof *s->first);
    s->token = calloc((size_t)max_entries + 1, sizeof *s->token);
    s->owner = calloc((size_t)max_entries + 1, sizeof *s->owner);
    s->move_step = calloc((size_t)max_moves + 1, sizeof *s->move_step);
    s->move_from = calloc((size_t)max_moves + 1, sizeof *s->move_from);
    s->move_to = calloc((size_t)max_moves + 1, sizeof *s->move_to);
    if (s->first && s->token && s->owner && s->move_step && s->move_from && s->move_to)
        return STATUS_OK;
    replay_schedule_clear(s);
    return status_fail(STATUS_NO_MEMORY, "replay: no memory for a schedule of %lld tokens", (long long)max_entries);
}

/* ---- steps and owners as recorded ---- */

typedef struct {
    int32_t step;
    int64_t row, token;
} recorded;

static int by_step(const void *a, const void *b)
{
    const recorded *x = a, *y = b;
    if (x->step != y->step)
        return x->step < y->step ? -1 : 1;
    return x->row < y->row ? -1 : x->row > y->row;
}

static status build_recorded(const traffic *t, const topology *topo, replay_schedule *out)
{
    if (!t->owner || !t->step)
        return status_fail(STATUS_BAD_INPUT, "replay: the trace does not say which rank owned a token in which step");
    replay_schedule s;
    TRY(allocate(t->n_tokens, t->n_tokens, 0, &s));
    recorded *order = calloc((size_t)t->n_tokens, sizeof *order);
    status st = STATUS_OK;
    if (!order)
        st = status_fail(STATUS_NO_MEMORY, "replay: no memory to sort %lld tokens", (long long)t->n_tokens);
    for (int64_t i = 0; i < t->n_tokens && st == STATUS_OK; i++) {
        order[i] = (recorded){.step = t->step[i], .row = t->row ? t->row[i] : i, .token = i};
        if (t->owner[i] < 0 || t->owner[i] >= topo->n_ranks)
            st = status_fail(STATUS_BAD_INPUT, "replay: a token was owned by rank %d; the topology has %d ranks", t->owner[i],
                             topo->n_ranks);
    }
    if (st != STATUS_OK) {
        free(order);
        replay_schedule_clear(&s);
        return st;
    }
    qsort(order, (size_t)t->n_tokens, sizeof *order, by_step);
    for (int64_t i = 0; i < t->n_tokens; i++) {
        if (i == 0 || order[i].step != order[i - 1].step)
            s.first[s.n_steps++] = i;
        s.token[i] = order[i].token;
        s.owner[i] = (uint16_t)t->owner[order[i].token];
    }
    s.first[s.n_steps] = t->n_tokens;
    free(order);
    *out = s;
    return STATUS_OK;
}

/* ---- places ---- */

typedef struct {
    const traffic *t;
    const plan *p; /* NULL: owners stay */
    const topology *topo;
    int n_places;
    int64_t *next;  /* [n_places] the token that runs next */
    int *sequence;  /* [n_places] */
    int *owner;     /* [n_places] */
    int *n_owned;   /* [n_ranks] places */
    int room;       /* places a rank may own */
    int n_started;  /* sequences */
    uint32_t *sent; /* [n_ranks][n_ranks] rows that would go from an owner r to q */
    int64_t *seen;  /* [n_ranks] the last (token, layer, r) that reached the rank */
} places;

static void places_clear(places *s)
{
    free(s->next);
    free(s->sequence);
    free(s->owner);
    free(s->n_owned);
    free(s->sent);
    free(s->seen);
}

static status places_start(const traffic *t, const plan *p, const topology *topo, int n_places, places *s)
{
    size_t n = (size_t)n_places, ranks = (size_t)topo->n_ranks;
    *s = (places){.t = t, .p = p, .topo = topo, .n_places = n_places, .n_started = n_places};
    s->next = calloc(n, sizeof *s->next);
    s->sequence = calloc(n, sizeof *s->sequence);
    s->owner = calloc(n, sizeof *s->owner);
    s->n_owned = calloc(ranks, sizeof *s->n_owned);
    s->sent = calloc(p ? ranks * ranks : 1, sizeof *s->sent);
    s->seen = calloc(ranks, sizeof *s->seen);
    if (!s->next || !s->sequence || !s->owner || !s->n_owned || !s->sent || !s->seen) {
        places_clear(s);
        return status_fail(STATUS_NO_MEMORY, "replay: no memory for %d places", n_places);
    }
    for (int i = 0; i < n_places; i++) {
        s->sequence[i] = i;
        s->next[i] = t->first_token[i];
        s->owner[i] = i % topo->n_ranks;
        s->n_owned[s->owner[i]]++;
    }
    int64_t c = n_places, g = topo->n_ranks;
    s->room = (int)((21 * c + 20 * g - 1) / (20 * g)); /* ceil(1.05 C / G) */
    return STATUS_OK;
}

/* Rows that the tokens [first, last) would have sent from each possible owner, into s->sent. */
static void count_sent(places *s, int64_t first, int64_t last)
{
    size_t n_ranks = (size_t)s->topo->n_ranks;
    int64_t stamp = 0;
    memset(s->sent, 0, n_ranks * n_ranks * sizeof *s->sent);
    memset(s->seen, 0, n_ranks * sizeof *s->seen);
    for (int l = 0; l < s->t->shape.n_layers; l++)
        for (int64_t token = first; token < last; token++) {
            const uint16_t *experts = traffic_experts(s->t, l, token);
            for (int r = 0; r < s->topo->n_ranks; r++) {
                s->seen[r] = ++stamp; /* its own rows go nowhere */
                for (int j = 0; j < s->t->shape.top_k; j++) {
                    int to = experts[j] == ROUTING_NO_EXPERT ? r : plan_nearest(s->p, s->topo->node_of_rank, l, experts[j], r);
                    s->sent[(size_t)r * n_ranks + (size_t)to] += s->seen[to] != stamp;
                    s->seen[to] = stamp;
                }
            }
        }
}

static double time_sent(const places *s, int r)
{
    double us = 0;
    for (int q = 0; q < s->topo->n_ranks; q++)
        us += s->sent[(size_t)r * (size_t)s->topo->n_ranks + (size_t)q] *
              (s->topo->row_bytes * topology_us_per_byte(s->topo, r, q));
    return us;
}

/* Where the sequence of a place would best live, by its tokens so far; its owner if nowhere better. */
static int best_owner(places *s, int place)
{
    int owner = s->owner[place], best = owner;
    int64_t last = s->next[place];
    count_sent(s, last - AFFINITY_TOKENS, last);
    double stays = time_sent(s, owner), least = stays;
    for (int r = 0; r < s->topo->n_ranks; r++) {
        double us = s->n_owned[r] < s->room ? time_sent(s, r) : stays;
        if (us < least) {
            least = us;
            best = r;
        }
    }
    double gain = 2 * (stays - least) * AFFINITY_PAYBACK / AFFINITY_TOKENS;
    double price =
        AFFINITY_TOKENS * (double)s->t->shape.n_layers * s->topo->row_bytes * topology_us_per_byte(s->topo, owner, best);
    return gain > price ? best : owner;
}

static void move_places(places *s, replay_schedule *out)
{
    for (int i = 0; i < s->n_places; i++) {
        if (s->next[i] - s->t->first_token[s->sequence[i]] != AFFINITY_TOKENS)
            continue;
        int from = s->owner[i], to = best_owner(s, i);
        if (to == from)
            continue;
        s->n_owned[from]--;
        s->n_owned[to]++;
        s->owner[i] = to;
        out->move_step[out->n_moves] = out->n_steps;
        out->move_from[out->n_moves] = (uint16_t)from;
        out->move_to[out->n_moves++] = (uint16_t)to;
    }
}

/* False when a place stays empty. */
static bool refill(places *s)
{
    for (int i = 0; i < s->n_places; i++) {
        if (s->next[i] < s->t->first_token[s->sequence[i] + 1])
            continue;
        if (s->n_started == s->t->n_sequences)
            return false;
        s->sequence[i] = s->n_started++;
        s->next[i] = s->t->first_token[s->sequence[i]];
    }
    return true;
}

static void run_places(places *s, replay_schedule *out)
{
    int64_t at = 0;
    do {
        if (s->p)
            move_places(s, out);
        out->first[out->n_steps++] = at;
        for (int i = 0; i < s->n_places; i++) {
            out->token[at] = s->next[i]++;
            out->owner[at++] = (uint16_t)s->owner[i];
        }
    } while (refill(s));
    out->first[out->n_steps] = at;
}

static status check_affinity(const traffic *t, const plan *p, const topology *topo)
{
    if (!p)
        return status_fail(STATUS_BAD_INPUT, "replay: owners by affinity need a plan");
    if (p->n_experts != t->shape.n_experts || p->n_layers != t->shape.n_layers || p->n_ranks != topo->n_ranks)
        return status_fail(
            STATUS_BAD_INPUT,
            "replay: plan %s is for %d experts in %d layers on %d ranks; the traffic has %d in %d, the topology %d "
            "ranks",
            p->name, p->n_experts, p->n_layers, p->n_ranks, t->shape.n_experts, t->shape.n_layers, topo->n_ranks);
    return STATUS_OK;
}

status replay_schedule_build(const traffic *t, const plan *p, const topology *topo, const replay_options *options,
                             replay_schedule *out)
{
    if (options->owners == OWNER_RECORDED)
        return build_recorded(t, topo, out);
    bool moves = options->owners == OWNER_AFFINITY;
    int n_places = options->concurrency;
    if (moves)
        TRY(check_affinity(t, p, topo));
    if (n_places < 1)
        return status_fail(STATUS_BAD_INPUT, "replay: %d sequences at once cannot be replayed", n_places);
    if (t->n_sequences < n_places)
        return status_fail(STATUS_BAD_INPUT, "replay: %d sequences do not fill %d places", t->n_sequences, n_places);
    places run;
    replay_schedule s;
    TRY(places_start(t, moves ? p : NULL, topo, n_places, &run));
    status st = allocate(t->n_tokens / n_places, t->n_tokens, moves ? t->n_sequences : 0, &s);
    if (st == STATUS_OK) {
        run_places(&run, &s);
        *out = s;
    }
    places_clear(&run);
    return st;
}
