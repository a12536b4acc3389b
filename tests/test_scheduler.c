/* test_scheduler.c - the scheduler without a model. A world of ranks obeys its decisions and keeps, for each position of each KV
 * block, what a model would have computed there: a hash of all tokens up to it. A row that finds anything else before itself
 * in its blocks (a block given twice, taken back too soon, found under a wrong name) fails the test, and the next token is
 * a hash too, so a request's tokens are known beforehand and no decision may change them. */
#include "tests/support.h"

#include "worker/scheduler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 4, MAX_PLACES = 16, MAX_POOL = 512, BLOCK = 8, MAX_LENGTH = 1200, MAX_JOBS = 400 };

typedef struct {
    uint64_t id;
    bool active;
    int32_t tokens[MAX_LENGTH];
    int n_tokens, n_done, blocks[MAX_LENGTH / BLOCK], n_blocks;
} seat;

typedef struct {
    uint64_t id;
    int32_t tokens[MAX_LENGTH];
    int n_prompt, max_new, n_tokens, n_starts, n_cached, prompt_rows, priority, rank;
    bool finished, cancelled;
    long first_token_step, started_step;
    uint64_t client;
} job;

/* Blocks under way: read when they are sent, written when they are received. */
typedef struct {
    scheduler_move move;
    int32_t from[MAX_POOL], to[MAX_POOL];
    uint64_t contents[MAX_POOL][BLOCK];
    bool sent, received;
} cargo;

typedef struct {
    scheduler *s;
    scheduler_limits limits;
    cargo cargos[32];
    int n_cargos;
    bool judging; /* at random, where sequences would be better off */
    int pools[MAX_RANKS];
    seat seats[MAX_RANKS][MAX_PLACES];
    uint64_t memory[MAX_RANKS][MAX_POOL][BLOCK];
    job jobs[MAX_JOBS];
    int n_jobs;
    long steps;
    double (*seconds)(const scheduler_step *step, uint64_t *state); /* of a step; NULL: 0.1 */
    double clock;
    uint64_t random;
} world;

static uint64_t mix(uint64_t before, int32_t token)
{
    uint64_t state = before * 0x100000001B3u + (uint64_t)(uint32_t)token;
    return support_random(&state);
}

static world *make_world(int n_ranks, int n_places, int max_running, int chunk, int pool, bool cache)
{
    world *w = calloc(1, sizeof *w);
    w->random = 7;
    for (int r = 0; r < n_ranks; r++)
        w->pools[r] = pool;
    w->limits = (scheduler_limits){.n_ranks = n_ranks,
                                   .n_places = n_places,
                                   .max_running = max_running,
                                   .chunk = chunk,
                                   .kv_block = BLOCK,
                                   .kv_blocks_of_rank = w->pools,
                                   .prefix_cache = cache,
                                   .touch = 0.125,
                                   .secret = {{1, 2}}};
    assert_int_equal(scheduler_create(&w->limits, &w->s), STATUS_OK);
    return w;
}

static void end_world(world *w)
{
    scheduler_destroy(w->s, NULL);
    free(w);
}

/* A job with a prompt of random tokens; more of the request can be changed by `as`. */
static job *add_job(world *w, int n_prompt, int max_new, scheduler_request as)
{
    job *j = &w->jobs[w->n_jobs];
    *j = (job){.id = (uint64_t)w->n_jobs++ + 1, .n_prompt = n_prompt, .max_new = max_new, .n_tokens = n_prompt};
    for (int i = 0; i < n_prompt; i++)
        j->tokens[i] = as.tokens ? as.tokens[i] : support_below(&w->random, 1000);
    as.id = j->id;
    as.user = j;
    as.tokens = j->tokens;
    as.n_tokens = n_prompt;
    as.max_new = max_new;
    j->priority = as.priority;
    j->client = as.client;
    j->rank = as.rank;
    if (scheduler_submit(w->s, &as) != STATUS_OK)
        fail_msg("%s", status_message());
    return j;
}

static const scheduler_request plain = {.rank = -1, .look_up = true, .leave = true};

/* ---- the ranks obey ----------------------------------------------------------------------------------------------------------
 */

static void take_leaves_and_joins(world *w, const scheduler_step *step)
{
    for (int i = 0; i < step->n_leaves; i++) {
        seat *t = &w->seats[step->leaves[i].rank][step->leaves[i].place];
        assert_true(t->active);
        t->active = false;
    }
    for (int i = 0; i < step->n_joins; i++) {
        const scheduler_join *in = &step->joins[i];
        seat *t = &w->seats[in->rank][in->place];
        job *j = in->user;
        assert_false(t->active);
        assert_true(j->rank < 0 || j->rank == in->rank);
        assert_int_equal(in->n_tokens, j->n_tokens);
        assert_int_equal(in->n_generated, j->n_tokens - j->n_prompt);
        assert_memory_equal(in->tokens, j->tokens, (size_t)j->n_tokens * sizeof *j->tokens);
        assert_int_equal(in->n_blocks, (in->n_tokens + BLOCK - 1) / BLOCK);
        assert_true(in->n_cached < in->n_tokens && (in->moved || in->n_cached % BLOCK == 0));
        assert_true(!in->moved || (in->judged && j->rank < 0));
        *t = (seat){.id = in->id, .active = true, .n_tokens = in->n_tokens, .n_done = in->n_cached, .n_blocks = in->n_blocks};
        memcpy(t->tokens, in->tokens, (size_t)in->n_tokens * sizeof *t->tokens);
        for (int b = 0; b < in->n_blocks; b++)
            t->blocks[b] = in->blocks[b];
        if (!in->moved && j->n_starts++ == 0) {
            j->n_cached = in->n_cached;
            j->started_step = w->steps;
        }
    }
    for (int i = 0; i < step->n_growths; i++) {
        seat *t = &w->seats[step->growths[i].rank][step->growths[i].place];
        assert_true(t->active);
        t->blocks[t->n_blocks++] = step->growths[i].block;
    }
}

static uint64_t hash_of(const int32_t *tokens, int n)
{
    uint64_t h = 0;
    for (int i = 0; i < n; i++)
        h = mix(h, tokens[i]);
    return h;
}

static int32_t token_after(uint64_t h)
{
    return (int32_t)(h >> 40 & 1023);
}

/* Attention reads all earlier positions; then the row's own is written. */
static void run_row(world *w, int rank, seat *t)
{
    int p = t->n_done++;
    uint64_t h = 0;
    assert_true(p / BLOCK < t->n_blocks && p < t->n_tokens);
    for (int i = 0; i < p; i++) {
        h = mix(h, t->tokens[i]);
        if (w->memory[rank][t->blocks[i / BLOCK]][i % BLOCK] != h)
            fail_msg("request %d finds something else at position %d of %d", (int)t->id, i, p);
    }
    w->memory[rank][t->blocks[p / BLOCK]][p % BLOCK] = mix(h, t->tokens[p]);
}

static void end_job(world *w, int rank, int place)
{
    seat *t = &w->seats[rank][place];
    job *j = scheduler_finish(w->s, t->id);
    assert_non_null(j);
    j->finished = true;
    t->active = false;
}

static void take_token(world *w, int rank, int place)
{
    seat *t = &w->seats[rank][place];
    job *j = scheduler_find(w->s, t->id);
    assert_ptr_equal(j, &w->jobs[t->id - 1]);
    if (j->max_new > 0) {
        int32_t token = token_after(hash_of(t->tokens, t->n_tokens));
        if (j->n_tokens == j->n_prompt)
            j->first_token_step = w->steps;
        j->tokens[j->n_tokens++] = t->tokens[t->n_tokens++] = token;
        scheduler_add_token(w->s, t->id, token);
    }
    if (j->n_tokens == j->n_prompt + j->max_new)
        end_job(w, rank, place);
}

/* ---- blocks that travel ------------------------------------------------------------------------------------------------------
 */

static void load_cargo(world *w, const scheduler_step *step)
{
    for (int i = 0; i < step->n_moves; i++) {
        const scheduler_move *m = &step->moves[i];
        cargo *c = &w->cargos[w->n_cargos++];
        assert_true(w->n_cargos <= 32 && m->from != m->to && m->n_blocks > 0);
        *c = (cargo){.move = *m};
        memcpy(c->from, m->from_blocks, (size_t)m->n_blocks * sizeof *c->from);
        memcpy(c->to, m->to_blocks, (size_t)m->n_blocks * sizeof *c->to);
    }
}

static void carry(world *w, cargo *c)
{
    if (!c->sent) {
        for (int b = 0; b < c->move.n_blocks; b++)
            memcpy(c->contents[b], w->memory[c->move.from][c->from[b]], sizeof c->contents[b]);
        c->sent = true;
        if (support_below(&w->random, 2)) { /* the two ends tell in any order, later */
            scheduler_sent(w->s, c->move.key);
            return;
        }
    }
    for (int b = 0; b < c->move.n_blocks; b++)
        memcpy(w->memory[c->move.to][c->to[b]], c->contents[b], sizeof c->contents[b]);
    scheduler_received(w->s, c->move.key);
    scheduler_sent(w->s, c->move.key);
    c->received = true;
}

static void carry_some(world *w, int patience)
{
    for (int i = 0; i < w->n_cargos;) {
        if (support_below(&w->random, patience) == 0)
            carry(w, &w->cargos[i]);
        if (w->cargos[i].received)
            w->cargos[i] = w->cargos[--w->n_cargos];
        else
            i++;
    }
}

static void judge_some(world *w)
{
    for (int r = 0; w->judging && r < w->limits.n_ranks; r++)
        for (int p = 0; p < w->limits.n_places; p++) {
            const seat *t = &w->seats[r][p];
            if (t->active && support_below(&w->random, 6) == 0)
                scheduler_judge(w->s, t->id, support_below(&w->random, w->limits.n_ranks + 1) - 1);
        }
}

static const scheduler_step *take_step(world *w)
{
    carry_some(w, 3);
    judge_some(w);
    const scheduler_step *step = scheduler_plan(w->s);
    int prefill[MAX_RANKS] = {0}, all = 0, before[MAX_RANKS][MAX_PLACES];
    take_leaves_and_joins(w, step);
    load_cargo(w, step);
    assert_true(scheduler_is_sound(w->s));
    for (int i = 0; i < step->n_rows; i++) {
        const scheduler_rows *rows = &step->rows[i];
        seat *t = &w->seats[rows->rank][rows->place];
        job *j = &w->jobs[t->id - 1];
        assert_true(t->active && rows->n_rows > 0);
        bool decoding = t->n_tokens > j->n_prompt && t->n_done == t->n_tokens - 1;
        before[rows->rank][rows->place] = t->n_done;
        prefill[rows->rank] += rows->n_rows > 1 || !decoding ? rows->n_rows : 0;
        all += rows->n_rows;
        j->prompt_rows += t->n_done < j->n_prompt ? rows->n_rows : 0;
        for (int n = 0; n < rows->n_rows; n++)
            run_row(w, rows->rank, t);
    }
    for (int r = 0; r < w->limits.n_ranks; r++)
        assert_true(prefill[r] <= w->limits.chunk);
    assert_int_equal(all, step->decode_rows + step->prefill_rows);
    double seconds = w->seconds ? w->seconds(step, &w->random) : 0.1;
    w->clock += seconds;
    w->steps++;
    scheduler_rows rows[MAX_RANKS * MAX_PLACES];
    int n_rows = step->n_rows;
    memcpy(rows, step->rows, (size_t)n_rows * sizeof *rows);
    scheduler_ran(w->s, seconds);
    for (int i = 0; i < n_rows; i++) {
        seat *t = &w->seats[rows[i].rank][rows[i].place];
        assert_true(t->n_done > before[rows[i].rank][rows[i].place]);
        if (t->n_done == t->n_tokens)
            take_token(w, rows[i].rank, rows[i].place);
    }
    assert_true(scheduler_is_sound(w->s));
    return step;
}

static void run_out(world *w)
{
    for (long n = 0; scheduler_busy(w->s); n++) {
        assert_true(n < 20000);
        take_step(w);
    }
}

static void check_tokens(const job *j)
{
    for (int i = j->n_prompt; i < j->n_tokens; i++)
        assert_int_equal(j->tokens[i], token_after(hash_of(j->tokens, i)));
}

static scheduler_counters counters(world *w)
{
    scheduler_counters c;
    scheduler_get_counters(w->s, &c);
    return c;
}

/* ---- random work -------------------------------------------------------------------------------------------------------------
 */

static double noisy_seconds(const scheduler_step *step, uint64_t *state)
{
    return (0.05 + 0.001 * step->decode_rows + 0.002 * step->prefill_rows) * (support_below(state, 20) == 0 ? 4 : 1);
}

static scheduler_request random_request(world *w, int32_t *tokens, int *n_prompt, int *max_new)
{
    uint64_t *state = &w->random;
    *max_new = support_below(state, 5) ? support_below(state, 40) : 0;
    *n_prompt = 1 + support_below(state, 60);
    int family = support_below(state, 4);
    for (int i = 0; i < *n_prompt; i++) /* many share beginnings of different lengths */
        tokens[i] = i < 30 + 8 * family ? 100 * (i / 20) + family : support_below(state, 1000);
    return (scheduler_request){.rank = support_below(state, 3) ? -1 : support_below(state, w->limits.n_ranks),
                               .priority = support_below(state, 3) - 1,
                               .client = (uint64_t)support_below(state, 4),
                               .arrival = support_below(state, 4) ? 0 : 1 + (uint64_t)support_below(state, 50),
                               .look_up = support_below(state, 4) != 0,
                               .leave = support_below(state, 5) != 0,
                               .root = "salt",
                               .root_size = (size_t)support_below(state, 3),
                               .tokens = tokens};
}

static void disturb(world *w)
{
    job *j = &w->jobs[support_below(&w->random, w->n_jobs)];
    int what = support_below(&w->random, 12);
    if (what < 6)
        scheduler_hold(w->s, j->id, what < 3);
    else if (what == 6 && scheduler_find(w->s, j->id)) {
        assert_ptr_equal(scheduler_cancel(w->s, j->id), j);
        j->cancelled = true;
    } else if (what == 7 && support_below(&w->random, 10) == 0)
        scheduler_forget_prefixes(w->s);
}

static unsigned long long random_work(int n_ranks, int n_places, int pool, int chunk, bool cache, bool judging, uint64_t seed)
{
    world *w = make_world(n_ranks, n_places, n_ranks * n_places - (n_ranks > 1), chunk, pool, cache);
    int32_t tokens[MAX_LENGTH];
    w->random = seed;
    w->judging = judging;
    w->seconds = noisy_seconds;
    while (w->n_jobs < 120) {
        int n_prompt, max_new, n = support_below(&w->random, 4);
        for (int i = 0; i < n; i++) {
            scheduler_request r = random_request(w, tokens, &n_prompt, &max_new);
            add_job(w, n_prompt, max_new, r);
        }
        for (int i = 0; i < 4 && w->n_jobs > 0; i++)
            disturb(w);
        take_step(w);
    }
    for (int i = 0; i < w->n_jobs; i++)
        scheduler_hold(w->s, w->jobs[i].id, false);
    run_out(w);
    for (int i = 0; i < w->n_jobs; i++) {
        assert_true(w->jobs[i].finished != w->jobs[i].cancelled);
        check_tokens(&w->jobs[i]);
    }
    while (w->n_cargos > 0)
        carry_some(w, 1);
    take_step(w); /* the last leaves */
    for (int r = 0; r < n_ranks; r++)
        assert_int_equal(kv_blocks_free(scheduler_blocks(w->s, r)), pool);
    assert_int_equal(counters(w).n_waiting + counters(w).n_running, 0);
    assert_true(cache == (counters(w).prefix_hits > 0));
    assert_true(pool > 20 || counters(w).n_preempted > 0);
    unsigned long long n_moved = counters(w).n_moved;
    assert_true(judging || n_moved == 0);
    end_world(w);
    return n_moved;
}

static void random_work_comes_out_right(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        random_work(1, 6, 14, 16, true, false, seed); /* 14 blocks: one request of 99 positions fits, two do not */
        random_work(1, 16, 90, 64, true, false, seed + 100);
        random_work(3, 4, 20, 8, true, false, seed + 200);
        random_work(2, 8, 30, 1, true, false, seed + 300);
        random_work(4, 3, 16, 40, false, false, seed + 400);
    }
}

static void moves_change_no_token(void **state)
{
    (void)state;
    unsigned long long n = 0;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        n += random_work(2, 5, 14, 16, true, true, seed);
        n += random_work(3, 4, 20, 8, true, true, seed + 200);
        n += random_work(4, 6, 60, 64, true, true, seed + 300);
        n += random_work(4, 3, 16, 40, false, true, seed + 400);
    }
    assert_true(n > 100);
}

/* ---- who goes first
 * ------------------------------------------------------------------------------------------------------------ */

static void better_priorities_go_first(void **state)
{
    (void)state;
    world *w = make_world(1, 2, 2, 64, 90, false);
    for (int i = 0; i < 30; i++) {
        scheduler_request r = plain;
        r.priority = (i * 7) % 5 - 2;
        add_job(w, 10, 6, r);
    }
    run_out(w);
    for (int i = 0; i < 30; i++)
        for (int j = 0; j < 30; j++)
            if (w->jobs[i].priority < w->jobs[j].priority)
                assert_true(w->jobs[i].started_step <= w->jobs[j].started_step);
            else if (w->jobs[i].priority == w->jobs[j].priority && i < j)
                assert_true(w->jobs[i].started_step <= w->jobs[j].started_step);
    end_world(w);
}

static void named_arrivals_go_before_others(void **state)
{
    (void)state;
    world *w = make_world(1, 1, 1, 64, 90, false);
    add_job(w, 10, 3, plain);
    scheduler_request r = plain;
    r.arrival = 9;
    add_job(w, 10, 3, r);
    r.arrival = 4;
    add_job(w, 10, 3, r);
    run_out(w);
    assert_true(w->jobs[2].started_step < w->jobs[1].started_step && w->jobs[1].started_step < w->jobs[0].started_step);
    end_world(w);
}

/* One client floods; the other comes later with as much work. While both have work waiting neither is served much more. */
static void clients_are_served_alike(void **state)
{
    (void)state;
    world *w = make_world(1, 4, 4, 64, 90, false);
    scheduler_request a = plain, b = plain;
    a.client = 1;
    b.client = 2;
    for (int i = 0; i < 150; i++)
        add_job(w, 10, 10, a);
    for (int i = 0; i < 60; i++)
        take_step(w);
    int before = 0;
    for (int i = 0; i < w->n_jobs; i++)
        before += w->jobs[i].started_step > 0 || w->jobs[i].finished;
    for (int i = 0; i < 30; i++)
        add_job(w, 12, 60, b); /* 132 against 30 in the counter's tokens */
    double served[3] = {0};
    int from = w->n_jobs - 30;
    for (bool both = true; both;) {
        take_step(w);
        both = false;
        for (int i = from; i < w->n_jobs; i++)
            both |= w->jobs[i].n_starts == 0;
    }
    for (int i = before; i < w->n_jobs; i++)
        if (w->jobs[i].n_starts)
            served[w->jobs[i].client] += w->jobs[i].n_prompt + 2 * (w->jobs[i].n_tokens - w->jobs[i].n_prompt);
    /* The bound of the paper: two times the most that can be running at once. */
    assert_true(fabs(served[1] - served[2]) <= 2 * 4 * 132);
    assert_true(served[1] > 1000 && served[2] > 1000);
    run_out(w);
    end_world(w);
}

static void absence_earns_no_credit(void **state)
{
    (void)state;
    world *w = make_world(1, 1, 1, 64, 90, false);
    scheduler_request a = plain, b = plain;
    a.client = 1;
    b.client = 2;
    for (int i = 0; i < 40; i++)
        add_job(w, 10, 10, a);
    for (int i = 0; i < 200; i++)
        take_step(w);
    int first = w->n_jobs;
    for (int i = 0; i < 20; i++)
        add_job(w, 10, 10, b);
    for (int i = 0; i < 100; i++)
        take_step(w);
    int started_b = 0;
    for (int i = first; i < w->n_jobs; i++)
        started_b += w->jobs[i].n_starts;
    assert_in_range(started_b, 4, 6); /* ten of these ran in 100 steps: half of them, although b was never served before */
    end_world(w);
}

/* A request that needs nearly all blocks, under a stream of small ones that would always fit beside each other. */
static void a_large_request_is_not_overtaken_for_ever(void **state)
{
    (void)state;
    world *w = make_world(2, 4, 8, 64, 20, false);
    for (int i = 0; i < 8; i++) /* places come free one by one */
        add_job(w, 10, 8 + 4 * i, plain);
    take_step(w);
    job *large = add_job(w, 140, 15, plain);
    for (int i = 0; i < 300 && large->n_starts == 0; i++) {
        while (counters(w).n_waiting < 4 && w->n_jobs < MAX_JOBS)
            add_job(w, 10, 10 + support_below(&w->random, 20), plain);
        take_step(w);
    }
    assert_int_equal(large->n_starts, 1);
    int overtook = 0;
    for (int i = (int)large->id; i < w->n_jobs; i++)
        overtook += w->jobs[i].n_starts;
    assert_in_range(overtook, 16, 60); /* sixteen; then only on the other rank, while this one runs empty */
    run_out(w);
    assert_true(large->finished);
    end_world(w);
}

static void what_never_fits_is_refused_with_the_numbers(void **state)
{
    (void)state;
    world *w = make_world(2, 2, 4, 64, 10, false);
    w->pools[1] = 10;
    int32_t tokens[MAX_LENGTH] = {0};
    scheduler_request r = plain;
    r.id = 1;
    r.tokens = tokens;
    r.n_tokens = 50;
    r.max_new = 31; /* 80 positions: ten blocks */
    assert_int_equal(scheduler_submit(w->s, &r), STATUS_OK);
    assert_int_not_equal(scheduler_submit(w->s, &r), STATUS_OK);
    assert_non_null(strstr(status_message(), "already"));
    r.id = 2;
    r.max_new = 32;
    assert_int_not_equal(scheduler_submit(w->s, &r), STATUS_OK);
    assert_non_null(strstr(status_message(), "50 prompt tokens and 32 new ones need 11 KV blocks of 8 positions"));
    assert_non_null(strstr(status_message(), "has 10"));
    end_world(w);
}

/* ---- pushing out
 * ----------------------------------------------------------------------------------------------------------------- */

static void the_worst_is_pushed_out_and_comes_back(void **state)
{
    (void)state;
    world *w = make_world(1, 4, 4, 64, 16, true);
    for (int i = 0; i < 4; i++) {
        scheduler_request r = plain;
        r.priority = i == 1 ? 5 : 0;
        add_job(w, 24, 60, r);
    }
    run_out(w);
    assert_true(counters(w).n_preempted > 0);
    assert_int_equal(w->jobs[0].n_starts, 1); /* the best is never pushed out */
    assert_true(w->jobs[1].n_starts > 1);
    for (int i = 0; i < 4; i++) {
        assert_true(w->jobs[i].finished);
        check_tokens(&w->jobs[i]);
    }
    end_world(w);
}

static void held_sequences_get_no_rows_and_make_room(void **state)
{
    (void)state;
    world *w = make_world(1, 2, 2, 64, 16, true);
    job *a = add_job(w, 24, 60, plain), *b = add_job(w, 24, 30, plain);
    for (int i = 0; i < 10; i++)
        take_step(w);
    scheduler_hold(w->s, a->id, true);
    int tokens = a->n_tokens;
    for (int i = 0; i < 5; i++)
        take_step(w);
    assert_int_equal(a->n_tokens, tokens);
    assert_true(b->n_tokens > 24 + 10);
    job *c = add_job(w, 20, 10, plain); /* both places are taken: the held one, though the oldest, makes room */
    run_out(w);
    assert_true(b->finished && c->finished && !a->finished);
    assert_int_equal(counters(w).n_preempted, 1);
    assert_int_equal(counters(w).n_waiting, 1);
    assert_false(scheduler_busy(w->s));
    scheduler_hold(w->s, a->id, false);
    assert_true(scheduler_busy(w->s));
    run_out(w);
    assert_true(a->finished && a->n_starts == 2);
    check_tokens(a);
    end_world(w);
}

/* ---- the prefix cache
 * -------------------------------------------------------------------------------------------------------------- */

static job *ask(world *w, const int32_t *tokens, int n, scheduler_request as)
{
    as.tokens = tokens;
    job *j = add_job(w, n, 9, as);
    run_out(w);
    check_tokens(j);
    return j;
}

static void prefixes_are_found_to_the_block(void **state)
{
    (void)state;
    world *w = make_world(1, 2, 2, 64, 90, true);
    int32_t tokens[MAX_LENGTH];
    for (int i = 0; i < MAX_LENGTH; i++)
        tokens[i] = i * 37 % 991;
    assert_int_equal(ask(w, tokens, 40, plain)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 40, plain)->n_cached, 32); /* never all of it: the last row has to run */
    assert_int_equal(ask(w, tokens, 41, plain)->n_cached, 40);
    assert_int_equal(ask(w, tokens, 7, plain)->n_cached, 0);
    tokens[20]++;
    assert_int_equal(ask(w, tokens, 60, plain)->n_cached, 16);
    tokens[20]--;
    /* What was generated is kept too: 40 + 9 tokens, of which 48 ran. */
    const job *first = &w->jobs[0];
    int32_t longer[MAX_LENGTH];
    memcpy(longer, first->tokens, 49 * sizeof *longer);
    memcpy(longer + 49, tokens + 49, 20 * sizeof *longer);
    assert_int_equal(ask(w, longer, 69, plain)->n_cached, 48);
    scheduler_counters c = counters(w);
    assert_int_equal(c.prefix_queries, 40 + 40 + 41 + 7 + 60 + 69);
    assert_int_equal(c.prefix_hits, 32 + 40 + 16 + 48);
    scheduler_forget_prefixes(w->s);
    assert_int_equal(ask(w, tokens, 40, plain)->n_cached, 0);
    end_world(w);
}

static void salts_and_bypass_keep_prefixes_apart(void **state)
{
    (void)state;
    world *w = make_world(1, 2, 2, 64, 90, true);
    int32_t tokens[64];
    for (int i = 0; i < 64; i++)
        tokens[i] = i;
    scheduler_request a = plain, b = plain, bypass = plain, scores = plain;
    a.root = "one";
    b.root = "two";
    a.root_size = b.root_size = 3;
    bypass.look_up = bypass.leave = false;
    scores.look_up = false;
    assert_int_equal(ask(w, tokens, 50, bypass)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 50, plain)->n_cached, 0); /* it left nothing */
    assert_int_equal(ask(w, tokens, 50, a)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 50, b)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 50, a)->n_cached, 48);
    assert_int_equal(ask(w, tokens, 50, bypass)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 50, scores)->n_cached, 0);
    for (int i = 0; i < 64; i++)
        tokens[i] += 100;
    assert_int_equal(ask(w, tokens, 50, scores)->n_cached, 0);
    assert_int_equal(ask(w, tokens, 50, plain)->n_cached, 48); /* it left its blocks */
    end_world(w);
}

static void the_longest_prefix_draws_unless_its_rank_is_busy(void **state)
{
    (void)state;
    world *w = make_world(2, 6, 12, 64, 90, true);
    int32_t tokens[MAX_LENGTH];
    for (int i = 0; i < MAX_LENGTH; i++)
        tokens[i] = i;
    scheduler_request there = plain, here = plain;
    there.rank = 1;
    there.tokens = here.tokens = tokens;
    add_job(w, 90, 1, there);
    run_out(w);
    job *a = add_job(w, 90, 20, here); /* rank 0 is idle too, but has nothing of it */
    take_step(w);
    assert_int_equal(a->n_cached, 88);
    job *b = add_job(w, 90, 20, here); /* one more on rank 1 still saves more than it waits */
    take_step(w);
    assert_int_equal(b->n_cached, 88);
    there.tokens = NULL;
    for (int i = 0; i < 3; i++)
        add_job(w, 60, 30, there);
    take_step(w);
    job *c = add_job(w, 90, 20, here);
    take_step(w);
    assert_int_equal(c->n_cached, 0);
    run_out(w);
    end_world(w);
}

/* Four sequences of one request: the prompt is computed once. */
static void a_prompt_asked_for_together_is_computed_once(void **state)
{
    (void)state;
    world *w = make_world(1, 8, 8, 16, 90, true);
    int32_t tokens[100];
    for (int i = 0; i < 100; i++)
        tokens[i] = i;
    scheduler_request r = plain;
    r.tokens = tokens;
    for (int i = 0; i < 4; i++)
        add_job(w, 100, 10, r);
    run_out(w);
    int rows = 0;
    for (int i = 0; i < 4; i++)
        rows += w->jobs[i].prompt_rows;
    assert_int_equal(rows, 100 + 3 * 4);
    end_world(w);
}

/* ---- time
 * ---------------------------------------------------------------------------------------------------------------------------- */

static double true_seconds(double decode, double prefill)
{
    return 0.010 + 0.060 * (1 - pow(1 - 0.125, decode + prefill)) + 0.0004 * decode + 0.0008 * prefill;
}

static double steady_seconds(const scheduler_step *step, uint64_t *state)
{
    double noise = 0.97 + 0.06 * support_below(state, 1000) / 1000;
    return true_seconds(step->decode_rows, step->prefill_rows) * noise;
}

/* Sixteen streams; then a long prompt. Steps with prompt rows stay near the budget, and are filled. */
static void prompts_keep_to_the_time_budget(void **state)
{
    (void)state;
    const double budgets[] = {0, 0.085, 0.2};
    for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++) {
        world *w = make_world(1, 16, 16, 512, 400, false);
        scheduler_destroy(w->s, NULL);
        w->limits.step_seconds = budgets[b];
        assert_int_equal(scheduler_create(&w->limits, &w->s), STATUS_OK);
        w->seconds = steady_seconds;
        for (int i = 0; i < 15; i++)
            add_job(w, 4, 120, plain);
        for (int i = 0; i < 10; i++)
            take_step(w);
        double alone = true_seconds(15, 0), budget = budgets[b] > 0 ? budgets[b] : 1.7 * alone, sum = 0;
        job *longer = add_job(w, 1000, 1, plain);
        int steps = 0;
        while (!longer->finished) {
            double before = w->clock;
            const scheduler_step *step = take_step(w);
            if (step->decode_rows < 15 || longer->finished)
                continue;
            assert_true(w->clock - before <= 1.15 * budget);
            sum += w->clock - before;
            steps++;
        }
        assert_true(sum / steps > 0.85 * budget); /* the first steps feel their way */
        end_world(w);
    }
}

static void short_prompts_pass_long_ones_and_none_starves(void **state)
{
    (void)state;
    world *w = make_world(1, 8, 8, 16, 90, false);
    job *longest = add_job(w, 150, 1, plain);
    take_step(w);
    for (int i = 0; i < 5; i++)
        add_job(w, 40, 1, plain);
    job *question = add_job(w, 6, 1, plain);
    take_step(w);
    assert_true(question->finished); /* in one step, past six longer ones */
    run_out(w);
    assert_true(longest->first_token_step <= 2 + 2 * 150 / 16); /* half the speed at worst */
    end_world(w);
}

static void the_cost_of_steps_is_learned(void **state)
{
    (void)state;
    static step_cost c;
    uint64_t random = 3;
    for (int round = 0; round < 20; round++) {
        double fixed = 0.001 + support_below(&random, 100) / 1e3, experts = support_below(&random, 100) / 1e3,
               row = 1e-4 + support_below(&random, 100) / 1e5;
        step_cost_init(&c, 0.125);
        assert_true(step_cost_predict(&c, &(step_load){.decode_rows = 4, .total_rows = 4}) == 0);
        for (int i = 0; i < 300; i++) {
            double d = 1 + support_below(&random, 32), p = support_below(&random, 2) ? support_below(&random, 256) : 0;
            double seconds = fixed + experts * (1 - pow(0.875, d + p)) + row * (d + p);
            seconds *= support_below(&random, 25) == 0 ? 10 : 0.95 + support_below(&random, 100) / 1e3;
            step_cost_add(&c, &(step_load){d, p, d + p, 100 * (d + p)}, seconds);
        }
        for (int i = 0; i < 50; i++) {
            double d = 1 + support_below(&random, 32), p = support_below(&random, 256);
            double seconds = fixed + experts * (1 - pow(0.875, d + p)) + row * (d + p);
            double got = step_cost_predict(&c, &(step_load){d, p, d + p, 100 * (d + p)});
            if (fabs(got - seconds) > 0.2 * seconds)
                fail_msg("%g decode and %g prompt rows take %g s, %g expected", d, p, seconds, got);
            assert_true(step_cost_predict(&c, &(step_load){d, p + 9, d + p + 9, 100 * (d + p)}) >= got);
        }
    }
}

/* ---- parts
 * -----------------------------------------------------------------------------------------------------------------------------
 */

static void keys_are_siphash(void **state)
{
    (void)state;
    unsigned char text[19], key_bytes[16], got[16];
    for (int i = 0; i < 19; i++)
        text[i] = (unsigned char)i;
    prefix_secret secret;
    for (int i = 0; i < 16; i++)
        key_bytes[i] = (unsigned char)i;
    memcpy(&secret, key_bytes, sizeof secret);
    /* From OpenSSL: openssl mac -macopt hexkey:000102..0f -macopt size:16 SIPHASH */
    const unsigned char empty[16] = {0xA3, 0x81, 0x7F, 0x04, 0xBA, 0x25, 0xA8, 0xE6,
                                     0x6D, 0xF6, 0x72, 0x14, 0xC7, 0x55, 0x02, 0x93};
    const unsigned char nineteen[16] = {0x78, 0x01, 0x77, 0x31, 0xCF, 0x65, 0xFA, 0xB0,
                                        0x74, 0xD5, 0x20, 0x89, 0x52, 0x51, 0x2E, 0xB1};
    prefix_key key = prefix_hash(secret, NULL, NULL, 0);
    memcpy(got, &key, 16);
    assert_memory_equal(got, empty, 16);
    key = prefix_hash(secret, NULL, text, 19);
    memcpy(got, &key, 16);
    assert_memory_equal(got, nineteen, 16);
    prefix_key parent;
    memcpy(&parent, text, sizeof parent);
    key = prefix_hash(secret, &parent, text + 16, 3); /* a parent is its 16 bytes before the others */
    memcpy(got, &key, 16);
    assert_memory_equal(got, nineteen, 16);
}

static void the_oldest_cached_block_goes_first(void **state)
{
    (void)state;
    kv_blocks *b = NULL;
    assert_int_equal(kv_blocks_create(4, &b), STATUS_OK);
    int32_t id[4];
    for (int i = 0; i < 4; i++) {
        id[i] = kv_blocks_take(b);
        if (i < 3)
            kv_blocks_name(b, id[i], (prefix_key){{(uint64_t)i + 1, 9}});
    }
    assert_int_equal(kv_blocks_take(b), -1);
    kv_blocks_give(b, id[1]);
    kv_blocks_give(b, id[0]);
    kv_blocks_give(b, id[3]);
    kv_blocks_give(b, id[2]);
    assert_int_equal(kv_blocks_free(b), 4);
    kv_blocks_share(b, kv_blocks_find(b, (prefix_key){{2, 9}})); /* used again: the youngest now */
    kv_blocks_give(b, id[1]);
    const int32_t order[] = {id[3], id[0], id[2], id[1]}; /* the plain one first */
    for (int i = 0; i < 4; i++) {
        assert_true(kv_blocks_is_sound(b));
        assert_int_equal(kv_blocks_take(b), order[i]);
    }
    assert_int_equal(kv_blocks_find(b, (prefix_key){{2, 9}}), -1);
    kv_blocks_destroy(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"random work: blocks are conserved, prefixes right, budgets kept, tokens the same, everyone done",
         random_work_comes_out_right, NULL, NULL, NULL},
        {"sequences move between ranks while work goes on: every row finds its keys, all blocks come back", moves_change_no_token,
         NULL, NULL, NULL},
        {"better priorities go first, then the older", better_priorities_go_first, NULL, NULL, NULL},
        {"who names an arrival goes before who does not", named_arrivals_go_before_others, NULL, NULL, NULL},
        {"two clients are served alike, whatever their requests' size", clients_are_served_alike, NULL, NULL, NULL},
        {"absence earns no credit", absence_earns_no_credit, NULL, NULL, NULL},
        {"a large request is not overtaken for ever", a_large_request_is_not_overtaken_for_ever, NULL, NULL, NULL},
        {"what never fits is refused with the numbers, an id twice too", what_never_fits_is_refused_with_the_numbers, NULL, NULL,
         NULL},
        {"the worst is pushed out, comes back and goes on the same", the_worst_is_pushed_out_and_comes_back, NULL, NULL, NULL},
        {"held sequences get no rows and make room", held_sequences_get_no_rows_and_make_room, NULL, NULL, NULL},
        {"prefixes are found to the block, generated tokens too", prefixes_are_found_to_the_block, NULL, NULL, NULL},
        {"salts and bypass keep prefixes apart", salts_and_bypass_keep_prefixes_apart, NULL, NULL, NULL},
        {"the longest prefix draws a request unless its rank is busy", the_longest_prefix_draws_unless_its_rank_is_busy, NULL,
         NULL, NULL},
        {"a prompt asked for several times together is computed once", a_prompt_asked_for_together_is_computed_once, NULL, NULL,
         NULL},
        {"prompts keep steps within the time budget, and fill it", prompts_keep_to_the_time_budget, NULL, NULL, NULL},
        {"short prompts pass long ones, and none starves", short_prompts_pass_long_ones_and_none_starves, NULL, NULL, NULL},
        {"the cost of steps is learned in spite of disturbances", the_cost_of_steps_is_learned, NULL, NULL, NULL},
        {"prefix keys are SipHash-2-4 of 128 bits", keys_are_siphash, NULL, NULL, NULL},
        {"the oldest cached block is taken first, after plain ones", the_oldest_cached_block_goes_first, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("scheduler", tests, NULL, NULL);
}
