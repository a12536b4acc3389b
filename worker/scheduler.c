#include "worker/scheduler.h"

#include "worker/fair_queue.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    FLOOR_ROWS = 16,      /* of prompts, where the budget is chosen here: attention takes so many at a time */
    FLOOR_ROWS_ASKED = 8, /* where somebody gave the budget and meant it */
    FIRST_ROWS = 64,      /* before anything was measured */
    ROW_STEP = 8,         /* rows of prompts come in multiples of it */
    DECODER_ROWS = 32,    /* what a decoding sequence counts as, in rows, when ranks are compared */
    MOST_OVERTAKEN = 16,  /* then a rank is kept for the one overtaken */
    MOST_TRIED = 16,      /* who do not fit are looked at in one step */
    MOST_MOVES = 16,      /* under way at a time */
    MOST_MOVED = 64,      /* blocks of one */
};
/* Two wishes pull against each other: running streams want short steps, a prompt wants many rows in each. A step may take so many
 * times what its decoding rows take alone; but prompts never get so few rows that they take more than so many times as long as
 * on an idle machine. */
#define ADAPTIVE_STEP 1.55
#define MOST_SLOWDOWN 2.7
#define NO_BUDGET     1e8 /* seconds: whoever says so wants the whole chunk */
#define PROMPT_CHARGE 1.0
#define TOKEN_CHARGE  2.0

/* One sequence. Its arrays lie behind it in the same memory. */
typedef struct {
    uint64_t id, number, arrival;
    void *user;
    int32_t *tokens;  /* [capacity] */
    prefix_key *keys; /* [max_blocks] of its full blocks */
    int32_t *blocks;  /* [max_blocks] */
    prefix_key root;
    int n_tokens, n_submitted, capacity;
    int n_keys, n_named, n_blocks;
    int n_done;  /* rows run in this place */
    int n_ran;   /* rows run before, in an earlier one */
    int n_given; /* tokens known when it got its place: the rows of a prompt, or of one computed again */
    int wanted_rank, priority, client;
    int rank, place; /* place -1: waits */
    int where;       /* in the queue; -1: runs */
    int n_overtaken, kept_rank;
    int rows; /* in the step planned */
    bool look_up, leave, held, judged;
    struct move *move; /* its contents are under way; NULL: they are where it is */
} item;

/* Blocks whose contents travel. The item's first n_blocks blocks are to_blocks, which outlive it until they have arrived. */
typedef struct move {
    uint64_t key; /* 0: none */
    item *it;     /* NULL: gone meanwhile */
    int from, to, n_blocks;
    int32_t from_blocks[MOST_MOVED], to_blocks[MOST_MOVED];
    bool sent, received;
} move;

typedef struct {
    uint64_t id;
    int rank;
} wish;

struct scheduler {
    scheduler_limits limits;
    kv_blocks **blocks; /* [n_ranks] */
    fair_queue *queue;
    uint64_t n_submitted, turn;
    item **by_id; /* [id_mask + 1] open addressing */
    uint32_t id_mask, n_items;
    item **running; /* [n_ranks][n_places] the first n_on_rank of each: best first (priority, then age) */
    item **places;  /* [n_ranks][n_places] */
    int *n_on_rank; /* [n_ranks] */
    int n_running, n_running_held;
    int *n_free;  /* [n_ranks] for those who count */
    double *load; /* [n_ranks] rows waiting to run */
    bool *kept;   /* [n_ranks] for one that was overtaken too often */
    move underway[MOST_MOVES];
    uint64_t n_moves; /* ever */
    wish *wishes;     /* [n_ranks * n_places] moves for the next step */
    int n_wishes;
    int *n_coming; /* [n_ranks] by them, less those who go */
    step_cost cost;
    step_load planned;
    /* the step */
    scheduler_step step;
    scheduler_leave *leaves;
    scheduler_join *joins;
    scheduler_growth *growths;
    scheduler_rows *rows;
    scheduler_move moves[MOST_MOVES];
    int n_leaves;
    item **prompts; /* [n_places] of one rank */
    unsigned long long n_preempted, prefix_queries, prefix_hits, moved_blocks;
};

/* ---- creation ------------------------------------------------------------------------------------------------------------ */

static status create_arrays(scheduler *s)
{
    size_t ranks = (size_t)s->limits.n_ranks, all = ranks * (size_t)s->limits.n_places;
    s->blocks = calloc(ranks, sizeof *s->blocks);
    s->running = calloc(all, sizeof(item *));
    s->places = calloc(all, sizeof(item *));
    s->prompts = calloc((size_t)s->limits.n_places, sizeof(item *));
    s->n_on_rank = calloc(ranks, sizeof *s->n_on_rank);
    s->n_free = calloc(ranks, sizeof *s->n_free);
    s->load = calloc(ranks, sizeof *s->load);
    s->kept = calloc(ranks, sizeof *s->kept);
    s->leaves = calloc(all, sizeof *s->leaves);
    s->joins = calloc(all, sizeof *s->joins);
    s->growths = calloc(all, sizeof *s->growths);
    s->rows = calloc(all, sizeof *s->rows);
    s->wishes = calloc(all, sizeof *s->wishes);
    s->n_coming = calloc(ranks, sizeof *s->n_coming);
    s->id_mask = 63;
    s->by_id = calloc(s->id_mask + 1, sizeof(item *));
    if (!s->blocks || !s->running || !s->places || !s->prompts || !s->n_on_rank || !s->n_free || !s->load || !s->kept ||
        !s->leaves || !s->joins || !s->growths || !s->rows || !s->wishes || !s->n_coming || !s->by_id)
        return status_fail(STATUS_NO_MEMORY, "no memory to schedule %d sequences on %d ranks", s->limits.max_running,
                           s->limits.n_ranks);
    for (int r = 0; r < s->limits.n_ranks; r++)
        TRY(kv_blocks_create(s->limits.kv_blocks_of_rank[r], &s->blocks[r]));
    return fair_queue_create(&s->queue);
}

status scheduler_create(const scheduler_limits *limits, scheduler **out)
{
    scheduler *s = calloc(1, sizeof *s);
    if (!s)
        return status_fail(STATUS_NO_MEMORY, "no memory for the scheduler");
    s->limits = *limits;
    s->turn = 1;
    step_cost_init(&s->cost, limits->touch);
    status st = create_arrays(s);
    s->limits.kv_blocks_of_rank = NULL; /* only borrowed until now */
    if (st != STATUS_OK) {
        scheduler_destroy(s, NULL);
        return st;
    }
    s->step = (scheduler_step){.leaves = s->leaves, .joins = s->joins, .growths = s->growths, .rows = s->rows, .moves = s->moves};
    *out = s;
    return STATUS_OK;
}

void scheduler_destroy(scheduler *s, void (*forget)(void *user))
{
    if (!s)
        return;
    for (uint32_t i = 0; s->by_id && i <= s->id_mask; i++) {
        if (s->by_id[i] && forget)
            forget(s->by_id[i]->user);
        free(s->by_id[i]);
    }
    for (int r = 0; s->blocks && r < s->limits.n_ranks; r++)
        kv_blocks_destroy(s->blocks[r]);
    fair_queue_destroy(s->queue);
    void *all[] = {s->blocks, s->running, s->places,  s->prompts, s->n_on_rank, s->n_free, s->load,    s->kept,
                   s->leaves, s->joins,   s->growths, s->rows,    s->by_id,     s->wishes, s->n_coming};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(s);
}

/* ---- by id: open addressing, linear probing, deletion by moving back ------------------------------------------------------- */

static uint32_t home_of(const scheduler *s, uint64_t id)
{
    return (uint32_t)((id * 0x9E3779B97F4A7C15u) >> 32) & s->id_mask;
}

static item *find(const scheduler *s, uint64_t id)
{
    for (uint32_t at = home_of(s, id); s->by_id[at]; at = (at + 1) & s->id_mask)
        if (s->by_id[at]->id == id)
            return s->by_id[at];
    return NULL;
}

static void put_id(scheduler *s, item *it)
{
    uint32_t at = home_of(s, it->id);
    while (s->by_id[at])
        at = (at + 1) & s->id_mask;
    s->by_id[at] = it;
}

static status reserve_id(scheduler *s)
{
    if (2 * (s->n_items + 1) <= s->id_mask)
        return STATUS_OK;
    uint32_t old_size = s->id_mask + 1;
    item **old = s->by_id, **grown = calloc((size_t)old_size * 2, sizeof(item *));
    if (!grown)
        return status_fail(STATUS_NO_MEMORY, "no memory to find %u requests by their ids", s->n_items + 1);
    s->by_id = grown;
    s->id_mask = 2 * old_size - 1;
    for (uint32_t i = 0; i < old_size; i++)
        if (old[i])
            put_id(s, old[i]);
    free(old);
    return STATUS_OK;
}

static void drop_id(scheduler *s, uint64_t id)
{
    uint32_t hole = home_of(s, id);
    while (s->by_id[hole]->id != id)
        hole = (hole + 1) & s->id_mask;
    s->by_id[hole] = NULL;
    for (uint32_t at = (hole + 1) & s->id_mask; s->by_id[at]; at = (at + 1) & s->id_mask) {
        uint32_t home = home_of(s, s->by_id[at]->id);
        if (((at - home) & s->id_mask) >= ((at - hole) & s->id_mask)) {
            s->by_id[hole] = s->by_id[at];
            s->by_id[at] = NULL;
            hole = at;
        }
    }
}

/* ---- a sequence's blocks and their names -------------------------------------------------------------------------------------
 */

static int blocks_of(const scheduler *s, int n_positions)
{
    return (n_positions + s->limits.kv_block - 1) / s->limits.kv_block;
}

static bool has_keys(const scheduler *s, const item *it)
{
    return s->limits.prefix_cache && (it->look_up || it->leave);
}

static void extend_keys(const scheduler *s, item *it)
{
    int size = s->limits.kv_block;
    for (; has_keys(s, it) && (it->n_keys + 1) * size <= it->n_tokens; it->n_keys++)
        it->keys[it->n_keys] = prefix_hash(s->limits.secret, it->n_keys ? &it->keys[it->n_keys - 1] : &it->root,
                                           it->tokens + it->n_keys * size, (size_t)size * sizeof *it->tokens);
}

/* Blocks whose positions have all been computed may be shared from now on. */
static void name_blocks(scheduler *s, item *it)
{
    for (; it->leave && it->n_named < it->n_keys && (it->n_named + 1) * s->limits.kv_block <= it->n_done; it->n_named++)
        kv_blocks_name(s->blocks[it->rank], it->blocks[it->n_named], it->keys[it->n_named]);
}

/* Those into which something still travels stay used. */
static void give_blocks(scheduler *s, item *it)
{
    int stay = it->move ? it->move->n_blocks : 0;
    while (it->n_blocks > stay)
        kv_blocks_give(s->blocks[it->rank], it->blocks[--it->n_blocks]);
    if (it->move)
        it->move->it = NULL;
    it->move = NULL;
    it->n_blocks = it->n_named = 0;
}

/* Leading blocks of `it` that the rank's cache holds. The last token always runs: its logits are wanted. Who wants to hear of
 * every row may only skip those that were reported before it was pushed out. */
static int count_cached(const scheduler *s, const item *it, int rank)
{
    int most = it->look_up ? it->n_tokens - 1 : it->n_ran < it->n_tokens ? it->n_ran : it->n_tokens - 1, n = 0;
    if (!has_keys(s, it))
        return 0;
    most /= s->limits.kv_block;
    while (n < most && n < it->n_keys && kv_blocks_find(s->blocks[rank], it->keys[n]) >= 0)
        n++;
    return n;
}

/* ---- joining and leaving --------------------------------------------------------------------------------------------------- */

static item *create_item(const scheduler *s, const scheduler_request *r)
{
    int capacity = r->n_tokens + r->max_new;
    size_t max_blocks = (size_t)blocks_of(s, capacity),
           n_keys = s->limits.prefix_cache && (r->look_up || r->leave) ? max_blocks : 0;
    item *it = malloc(sizeof *it + n_keys * sizeof(prefix_key) + (max_blocks + (size_t)capacity) * sizeof(int32_t));
    if (!it)
        return NULL;
    prefix_key *keys = (prefix_key *)(it + 1);
    int32_t *blocks = (int32_t *)(keys + n_keys);
    *it = (item){.id = r->id,
                 .number = s->n_submitted,
                 .arrival = r->arrival ? r->arrival : UINT64_MAX / 2 + s->n_submitted,
                 .user = r->user,
                 .tokens = blocks + max_blocks,
                 .keys = keys,
                 .blocks = blocks,
                 .n_tokens = r->n_tokens,
                 .n_submitted = r->n_tokens,
                 .capacity = capacity,
                 .wanted_rank = r->rank,
                 .priority = r->priority,
                 .rank = -1,
                 .place = -1,
                 .where = -1,
                 .kept_rank = -1,
                 .look_up = r->look_up,
                 .leave = r->leave};
    memcpy(it->tokens, r->tokens, (size_t)r->n_tokens * sizeof *it->tokens);
    it->root = prefix_hash(s->limits.secret, NULL, r->root, r->root_size);
    extend_keys(s, it);
    return it;
}

static status check_size(const scheduler *s, const scheduler_request *r)
{
    /* The last generated token is never run, so it needs no place in the KV cache. */
    int positions = r->n_tokens + (r->max_new > 0 ? r->max_new - 1 : 0), most = 0;
    for (int rank = 0; rank < s->limits.n_ranks; rank++)
        if ((r->rank < 0 || r->rank == rank) && kv_blocks_count(s->blocks[rank]) > most)
            most = kv_blocks_count(s->blocks[rank]);
    if (blocks_of(s, positions) <= most)
        return STATUS_OK;
    return status_fail(STATUS_NO_MEMORY, "%d prompt tokens and %d new ones need %d KV blocks of %d positions, %s has %d",
                       r->n_tokens, r->max_new, blocks_of(s, positions), s->limits.kv_block,
                       r->rank < 0 ? "the largest rank" : "the rank asked for", most);
}

static void wait_in_queue(scheduler *s, item *it, bool again)
{
    fair_queue_add(s->queue, &(fair_entry){.item = it,
                                           .where = &it->where,
                                           .priority = it->priority,
                                           .client = it->client,
                                           .again = again,
                                           .held = it->held,
                                           .arrival = it->arrival,
                                           .number = it->number});
}

status scheduler_submit(scheduler *s, const scheduler_request *r)
{
    TRY(check_size(s, r));
    if (find(s, r->id))
        return status_fail(STATUS_BAD_INPUT, "request %llu is here already", (unsigned long long)r->id);
    TRY(reserve_id(s));
    item *it = create_item(s, r);
    if (!it)
        return status_fail(STATUS_NO_MEMORY, "no memory to queue a request of %d tokens", r->n_tokens);
    status st = fair_queue_join(s->queue, r->client, &it->client);
    if (st != STATUS_OK) {
        free(it);
        return st;
    }
    s->n_submitted++;
    s->n_items++;
    put_id(s, it);
    wait_in_queue(s, it, false);
    return STATUS_OK;
}

void *scheduler_find(const scheduler *s, uint64_t id)
{
    const item *it = find(s, id);
    return it ? it->user : NULL;
}

bool scheduler_is_waiting(const scheduler *s, uint64_t id)
{
    const item *it = find(s, id);
    return it && it->place < 0;
}

static item **running_on(const scheduler *s, int rank)
{
    return s->running + (size_t)rank * (size_t)s->limits.n_places;
}

static item **place_of(const scheduler *s, const item *it)
{
    return s->places + (size_t)it->rank * (size_t)s->limits.n_places + it->place;
}

static void leave_place(scheduler *s, item *it)
{
    item **list = running_on(s, it->rank);
    int i = 0;
    while (list[i] != it)
        i++;
    memmove(&list[i], &list[i + 1], (size_t)(--s->n_on_rank[it->rank] - i) * sizeof(item *));
    give_blocks(s, it);
    *place_of(s, it) = NULL;
    s->n_running--;
    s->n_running_held -= it->held;
    it->place = -1;
}

static void tell_leave(scheduler *s, const item *it)
{
    s->leaves[s->n_leaves++] = (scheduler_leave){.rank = it->rank, .place = it->place};
}

static void *remove_item(scheduler *s, item *it)
{
    void *user = it->user;
    if (it->place >= 0)
        leave_place(s, it);
    else
        fair_queue_remove(s->queue, it->where);
    fair_queue_part(s->queue, it->client);
    drop_id(s, it->id);
    s->n_items--;
    free(it);
    return user;
}

void *scheduler_finish(scheduler *s, uint64_t id)
{
    item *it = find(s, id);
    return it ? remove_item(s, it) : NULL;
}

void *scheduler_cancel(scheduler *s, uint64_t id)
{
    item *it = find(s, id);
    if (it && it->place >= 0)
        tell_leave(s, it);
    return it ? remove_item(s, it) : NULL;
}

void scheduler_hold(scheduler *s, uint64_t id, bool hold)
{
    item *it = find(s, id);
    if (!it || it->held == hold)
        return;
    it->held = hold;
    if (it->place >= 0)
        s->n_running_held += hold ? 1 : -1;
    else
        fair_queue_hold(s->queue, it->where, hold);
}

void scheduler_forget_prefixes(scheduler *s)
{
    for (int r = 0; r < s->limits.n_ranks; r++)
        kv_blocks_forget(s->blocks[r]);
}

bool scheduler_busy(const scheduler *s)
{
    return s->n_running > s->n_running_held || fair_queue_count(s->queue) > fair_queue_count_held(s->queue);
}

/* ---- pushing out ----------------------------------------------------------------------------------------------------------- */

static bool is_better(const item *a, const item *b)
{
    if (a->priority != b->priority)
        return a->priority < b->priority;
    return a->arrival != b->arrival ? a->arrival < b->arrival : a->number < b->number;
}

/* Its full blocks stay in the cache as long as nobody needs them. */
static void push_out(scheduler *s, item *it)
{
    tell_leave(s, it);
    leave_place(s, it);
    it->n_ran = it->n_done > it->n_ran ? it->n_done : it->n_ran;
    it->n_done = 0;
    it->rows = 0;
    s->n_preempted++;
    wait_in_queue(s, it, true);
}

/* Held before others, then the worst; `only_held`: NULL when none is held. */
static item *worst_on(const scheduler *s, int rank, bool only_held)
{
    item *worst = NULL, **list = running_on(s, rank);
    for (int i = 0; i < s->n_on_rank[rank]; i++)
        if (!list[i]->move && (list[i]->held || !only_held) && (!worst || list[i]->held >= worst->held))
            worst = list[i];
    return worst;
}

/* Takes the next block of a decoding sequence; it may have to go itself. */
static void grow(scheduler *s, item *it)
{
    int32_t block;
    while ((block = kv_blocks_take(s->blocks[it->rank])) < 0) {
        item *victim = worst_on(s, it->rank, false);
        push_out(s, victim);
        if (victim == it)
            return;
    }
    it->blocks[it->n_blocks++] = block;
    s->growths[s->step.n_growths++] = (scheduler_growth){.rank = it->rank, .place = it->place, .block = block};
}

static bool needs_block(const scheduler *s, const item *it)
{
    return !it->held && !it->move && it->n_done >= it->n_given && it->n_tokens > it->n_blocks * s->limits.kv_block;
}

/* Best first: who is pushed out for one is held or has not had its turn. */
static void grow_running(scheduler *s, int rank)
{
    item **list = running_on(s, rank);
    for (int i = 0; i < s->n_on_rank[rank];) {
        item *it = list[i];
        int before = s->n_on_rank[rank];
        if (needs_block(s, it))
            grow(s, it);
        if (s->n_on_rank[rank] == before) {
            i++;
            continue;
        }
        for (i = 0; i < s->n_on_rank[rank] && !is_better(it, list[i]);) /* some have gone: on with the first after it */
            i++;
    }
}

/* ---- admission ------------------------------------------------------------------------------------------------------------- */

static int pending_rows(const item *it)
{
    return it->n_tokens - it->n_done;
}

static void measure_loads(scheduler *s)
{
    for (int r = 0; r < s->limits.n_ranks; r++) {
        s->load[r] = 0;
        s->kept[r] = false;
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            const item *it = running_on(s, r)[i];
            s->load[r] += it->held ? 0 : pending_rows(it) + DECODER_ROWS;
        }
    }
}

/* Whether `it` can start on this rank now, with `n_cached` blocks found. A block is left for each who runs there: they will want
 * it before long, and whoever is admitted into the last ones would soon be pushed out again. */
static bool fits(const scheduler *s, const item *it, int rank, int n_cached)
{
    const kv_blocks *b = s->blocks[rank];
    if (s->n_on_rank[rank] == s->limits.n_places)
        return false;
    int n_free = kv_blocks_free(b), spare = s->n_on_rank[rank];
    for (int i = 0; i < n_cached; i++)
        n_free -= !kv_blocks_is_used(b, kv_blocks_find(b, it->keys[i]));
    return n_free - (blocks_of(s, it->n_tokens) - n_cached) >= spare;
}

/* Whether it may go there at all: the rank asked for, with blocks for its whole length, not kept for another. */
static bool may_run_on(const scheduler *s, const item *it, int rank)
{
    int longest = it->capacity > it->n_submitted ? it->capacity - 1 : it->capacity;
    return (it->wanted_rank < 0 || it->wanted_rank == rank) && (!s->kept[rank] || it->kept_rank == rank) &&
           blocks_of(s, longest) <= kv_blocks_count(s->blocks[rank]);
}

/* The cheapest rank it fits on: rows waiting there and its own; -1: none now. */
static int choose_rank(const scheduler *s, const item *it, int *n_cached)
{
    int best = -1;
    double least = 0;
    for (int r = 0; r < s->limits.n_ranks; r++) {
        if (s->n_on_rank[r] == s->limits.n_places || !may_run_on(s, it, r))
            continue;
        int cached = count_cached(s, it, r);
        double cost = s->load[r] - (double)cached * s->limits.kv_block;
        if ((best < 0 || cost < least) && fits(s, it, r, cached)) {
            best = r;
            least = cost;
            *n_cached = cached;
        }
    }
    return best;
}

/* Pushes held sequences out until `it` fits somewhere; -1 when that does not help. */
static int choose_rank_of_held(scheduler *s, const item *it, int *n_cached)
{
    for (int r = 0; r < s->limits.n_ranks && s->n_running_held > 0; r++) {
        if (!may_run_on(s, it, r))
            continue;
        int reach = kv_blocks_free(s->blocks[r]);
        for (int i = 0; i < s->n_on_rank[r]; i++)
            reach += running_on(s, r)[i]->held ? running_on(s, r)[i]->n_blocks : 0;
        if (reach < blocks_of(s, it->n_tokens))
            continue;
        for (item *victim; (victim = worst_on(s, r, true));) {
            push_out(s, victim);
            *n_cached = count_cached(s, it, r);
            if (fits(s, it, r, *n_cached))
                return r;
        }
    }
    return -1;
}

static void take_blocks(scheduler *s, item *it, int n_cached)
{
    kv_blocks *b = s->blocks[it->rank];
    int n = blocks_of(s, it->n_tokens);
    for (; it->n_blocks < n_cached; it->n_blocks++) {
        it->blocks[it->n_blocks] = kv_blocks_find(b, it->keys[it->n_blocks]);
        kv_blocks_share(b, it->blocks[it->n_blocks]);
    }
    for (; it->n_blocks < n; it->n_blocks++)
        it->blocks[it->n_blocks] = kv_blocks_take(b);
    it->n_named = n_cached;
}

static void take_place(scheduler *s, item *it)
{
    item **list = running_on(s, it->rank);
    for (it->place = 0; *place_of(s, it);)
        it->place++;
    *place_of(s, it) = it;
    int i = s->n_on_rank[it->rank]++;
    for (; i > 0 && is_better(it, list[i - 1]); i--)
        list[i] = list[i - 1];
    list[i] = it;
    s->n_running++;
}

static void tell_join(scheduler *s, const item *it, bool moved)
{
    s->joins[s->step.n_joins++] = (scheduler_join){.id = it->id,
                                                   .user = it->user,
                                                   .rank = it->rank,
                                                   .place = it->place,
                                                   .tokens = it->tokens,
                                                   .n_tokens = it->n_tokens,
                                                   .n_generated = it->n_tokens - it->n_submitted,
                                                   .n_cached = it->n_done,
                                                   .n_ran = it->n_ran,
                                                   .blocks = it->blocks,
                                                   .n_blocks = it->n_blocks,
                                                   .judged = it->judged,
                                                   .moved = moved};
}

static void admit(scheduler *s, item *it, int rank, int n_cached)
{
    bool again = fair_queue_at(s->queue, it->where)->again;
    int cached = n_cached * s->limits.kv_block;
    it->rank = rank;
    it->kept_rank = -1;
    it->n_overtaken = 0;
    fair_queue_remove(s->queue, it->where);
    if (!again) {
        fair_queue_charge(s->queue, it->client, PROMPT_CHARGE * (it->n_tokens - cached));
        s->prefix_queries += it->look_up && s->limits.prefix_cache ? (unsigned)it->n_tokens : 0;
        s->prefix_hits += (unsigned)cached;
    }
    take_blocks(s, it, n_cached);
    take_place(s, it);
    it->n_done = cached;
    it->n_given = it->n_tokens;
    s->load[rank] += pending_rows(it) + DECODER_ROWS;
    tell_join(s, it, false);
}

/* Keeps a rank for one that was overtaken too often: the one it asked for, else where most is free. */
static void keep_rank(scheduler *s, item *it)
{
    if (it->n_overtaken < MOST_OVERTAKEN)
        return;
    int best = it->kept_rank;
    for (int r = 0; it->kept_rank < 0 && r < s->limits.n_ranks; r++)
        if (may_run_on(s, it, r) && (best < 0 || kv_blocks_free(s->blocks[r]) > kv_blocks_free(s->blocks[best])))
            best = r;
    it->kept_rank = best;
    if (best >= 0)
        s->kept[best] = true;
}

/* Whether somebody is computing the very block that `it` would have to compute next: then it is better off waiting for it. So the
 * sequences of one request compute their prompt once. */
static bool awaits_prefix(const scheduler *s, const item *it, int rank)
{
    int next = count_cached(s, it, rank);
    if (!it->look_up || !has_keys(s, it) || next >= (it->n_tokens - 1) / s->limits.kv_block)
        return false;
    for (int i = 0; i < s->n_on_rank[rank]; i++) {
        const item *other = running_on(s, rank)[i];
        if (other->leave && !other->held && other->priority <= it->priority && other->n_done < other->n_given &&
            next < other->n_keys && (next + 1) * s->limits.kv_block <= other->n_given &&
            prefix_key_equal(other->keys[next], it->keys[next]))
            return true;
    }
    return false;
}

static bool awaits_any_prefix(const scheduler *s, const item *it)
{
    for (int r = 0; r < s->limits.n_ranks; r++)
        if (may_run_on(s, it, r) && awaits_prefix(s, it, r))
            return true;
    return false;
}

static void admit_waiting(scheduler *s)
{
    item *passed[MOST_TRIED];
    int n_passed = 0, n_waiting = 0, max_running = s->limits.max_running;
    s->turn++;
    measure_loads(s);
    while (n_passed + n_waiting < MOST_TRIED && (s->n_running < max_running || s->n_running_held > 0)) {
        fair_entry *entry = fair_queue_best(s->queue, s->turn);
        if (!entry)
            return;
        entry->tried = s->turn;
        item *it = entry->item;
        if (awaits_any_prefix(s, it)) {
            n_waiting++;
            continue;
        }
        int n_cached = 0, rank = s->n_running < max_running ? choose_rank(s, it, &n_cached) : -1;
        if (rank < 0)
            rank = choose_rank_of_held(s, it, &n_cached);
        if (rank >= 0) {
            for (int i = 0; i < n_passed; i++)
                passed[i]->n_overtaken += may_run_on(s, passed[i], rank);
            admit(s, it, rank, n_cached);
            continue;
        }
        keep_rank(s, it);
        passed[n_passed++] = it;
    }
}

/* ---- moving ---------------------------------------------------------------------------------------------------------------- */

bool scheduler_has_room(const scheduler *s, int rank)
{
    int all = s->n_running + fair_queue_count(s->queue), n = s->limits.n_ranks;
    all = all < s->limits.max_running ? all : s->limits.max_running;
    return s->n_on_rank[rank] + s->n_coming[rank] < (21 * all + 20 * n - 1) / (20 * n);
}

void scheduler_judge(scheduler *s, uint64_t id, int rank)
{
    item *it = find(s, id);
    if (!it || it->judged)
        return;
    it->judged = true;
    if (rank < 0 || it->place < 0 || s->n_wishes == s->limits.n_ranks * s->limits.n_places)
        return;
    s->wishes[s->n_wishes++] = (wish){.id = id, .rank = rank};
    s->n_coming[rank]++;
    s->n_coming[it->rank]--;
}

static move *find_move(scheduler *s, uint64_t key)
{
    for (int i = 0; i < MOST_MOVES; i++)
        if (s->underway[i].key == key)
            return &s->underway[i];
    return NULL;
}

static void give_moved(scheduler *s, int rank, const int32_t *blocks, int n)
{
    while (n > 0)
        kv_blocks_give(s->blocks[rank], blocks[--n]);
}

void scheduler_sent(scheduler *s, uint64_t key)
{
    move *m = key ? find_move(s, key) : NULL;
    if (!m || m->sent)
        return;
    give_moved(s, m->from, m->from_blocks, m->n_blocks);
    m->sent = true;
    if (m->received)
        m->key = 0;
}

void scheduler_received(scheduler *s, uint64_t key)
{
    move *m = key ? find_move(s, key) : NULL;
    if (!m || m->received)
        return;
    if (m->it)
        m->it->move = NULL;
    else
        give_moved(s, m->to, m->to_blocks, m->n_blocks);
    m->it = NULL;
    m->received = true;
    if (m->sent)
        m->key = 0;
}

/* Out of its place with blocks and all, into one of the other rank. */
static void change_place(scheduler *s, item *it, move *m)
{
    int n = m->n_blocks = blocks_of(s, it->n_done);
    tell_leave(s, it);
    memcpy(m->from_blocks, it->blocks, (size_t)n * sizeof *it->blocks);
    while (it->n_blocks > n)
        kv_blocks_give(s->blocks[it->rank], it->blocks[--it->n_blocks]);
    it->n_blocks = 0;
    leave_place(s, it);
    it->rank = m->to;
    take_blocks(s, it, 0);
    take_place(s, it);
    memcpy(m->to_blocks, it->blocks, (size_t)n * sizeof *it->blocks);
    it->n_ran = it->n_done > it->n_ran ? it->n_done : it->n_ran;
}

static void move_one(scheduler *s, const wish *w)
{
    item *it = find(s, w->id);
    move *m = find_move(s, 0);
    if (!it || it->place < 0 || it->held || it->move || it->rank == w->rank || it->wanted_rank >= 0 || it->n_done == 0 || !m ||
        blocks_of(s, it->n_done) > MOST_MOVED || !fits(s, it, w->rank, 0))
        return;
    *m = (move){.key = ++s->n_moves, .it = it, .from = it->rank, .to = w->rank};
    change_place(s, it, m);
    it->move = m;
    s->moved_blocks += (unsigned)m->n_blocks;
    s->moves[s->step.n_moves++] = (scheduler_move){.key = m->key,
                                                   .from = m->from,
                                                   .to = m->to,
                                                   .n_blocks = m->n_blocks,
                                                   .from_blocks = m->from_blocks,
                                                   .to_blocks = m->to_blocks};
    tell_join(s, it, true);
}

static void move_wished(scheduler *s)
{
    for (int i = 0; i < s->n_wishes; i++)
        move_one(s, &s->wishes[i]);
    s->n_wishes = 0;
    memset(s->n_coming, 0, (size_t)s->limits.n_ranks * sizeof *s->n_coming);
}

/* ---- rows ------------------------------------------------------------------------------------------------------------------ */

/* Rows that may run now. */
static int ready_rows(const scheduler *s, const item *it)
{
    int pending = pending_rows(it), first = s->limits.first_rows - it->n_done;
    return it->move ? 0 : s->limits.first_rows && !it->judged && first > 0 && first < pending ? first : pending;
}

static bool is_prompt(const item *it)
{
    return !it->held && !it->move && it->n_done < it->n_given;
}

static int give_rows(const scheduler *s, item *it, int most)
{
    int ready = ready_rows(s, it) - it->rows, n = ready < most ? ready : most;
    it->rows += n;
    return n;
}

/* `budget` rows to the prompts [n], best first, of one priority: half to the first, then shortest first. */
static int spread_class(const scheduler *s, item **prompts, int n, int budget)
{
    int left = budget - give_rows(s, prompts[0], (budget + 1) / 2);
    while (left > 0) {
        item *shortest = NULL;
        for (int i = 0; i < n; i++)
            if (ready_rows(s, prompts[i]) > prompts[i]->rows && (!shortest || pending_rows(prompts[i]) < pending_rows(shortest)))
                shortest = prompts[i];
        if (!shortest)
            break;
        left -= give_rows(s, shortest, left);
    }
    return budget - left;
}

/* Sets the rows of a rank's prompts; returns how many. */
static int spread_rank(scheduler *s, int rank, int budget)
{
    int n = 0, given = 0;
    for (int i = 0; i < s->n_on_rank[rank]; i++) {
        item *it = running_on(s, rank)[i];
        if (is_prompt(it)) {
            it->rows = 0;
            s->prompts[n++] = it;
        }
    }
    for (int first = 0, end; first < n && given < budget; first = end) {
        for (end = first; end < n && s->prompts[end]->priority == s->prompts[first]->priority;)
            end++;
        given += spread_class(s, s->prompts + first, end - first, budget - given);
    }
    return given;
}

static double positions_seen(const item *it)
{
    return (double)it->rows * (it->n_done + (it->rows + 1) / 2.0);
}

/* What the step is with prompts given up to `budget` rows on every rank. */
static step_load weigh(scheduler *s, int budget)
{
    double most_decode = 0, most_prefill = 0, most_positions = 0, decode = 0, prefill = 0;
    for (int r = 0; r < s->limits.n_ranks; r++) {
        double d = 0, p = spread_rank(s, r, budget), positions = 0;
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            const item *it = running_on(s, r)[i];
            d += is_prompt(it) ? 0 : it->rows;
            positions += positions_seen(it);
        }
        most_decode = d > most_decode ? d : most_decode;
        most_prefill = p > most_prefill ? p : most_prefill;
        most_positions = positions > most_positions ? positions : most_positions;
        decode += d;
        prefill += p;
    }
    return (step_load){.decode_rows = step_cost_share(most_decode, decode, s->limits.n_ranks),
                       .prefill_rows = step_cost_share(most_prefill, prefill, s->limits.n_ranks),
                       .total_rows = decode + prefill,
                       .positions = most_positions};
}

/* Rows of prompts per second; `decoding`: the decoding sequences as they are, or none there. */
static double prompt_rate(scheduler *s, int rows, const step_load *alone, bool decoding)
{
    step_load load = weigh(s, rows);
    double prompt_rows = load.total_rows - alone->total_rows;
    if (!decoding)
        load = (step_load){.prefill_rows = load.prefill_rows,
                           .total_rows = prompt_rows,
                           .positions = load.positions > alone->positions ? load.positions - alone->positions : 0};
    return prompt_rows / step_cost_predict(&s->cost, &load);
}

/* The fewest rows per rank that do not slow a prompt down too much. */
static int find_floor(scheduler *s, const step_load *alone)
{
    double idle = prompt_rate(s, s->limits.chunk, alone, false);
    int rows = FLOOR_ROWS;
    while (rows < s->limits.chunk && prompt_rate(s, rows, alone, true) * MOST_SLOWDOWN < idle)
        rows += ROW_STEP;
    return rows;
}

/* The most rows per rank whose step keeps within the budget. */
static int find_budget_rows(scheduler *s)
{
    int chunk = s->limits.chunk, floor = FLOOR_ROWS_ASKED;
    double budget = s->limits.step_seconds;
    if (!s->cost.known)
        return chunk < FIRST_ROWS ? chunk : FIRST_ROWS;
    if (budget == 0) {
        step_load alone = weigh(s, 0);
        budget = ADAPTIVE_STEP * step_cost_predict(&s->cost, &alone);
        floor = find_floor(s, &alone);
    }
    s->cost.focus = s->step.budget_seconds = budget;
    int low = floor / ROW_STEP, high = chunk / ROW_STEP; /* what is at or below the floor is not asked */
    while (low < high) {
        int middle = (low + high + 1) / 2;
        step_load load = weigh(s, middle * ROW_STEP);
        if (step_cost_predict(&s->cost, &load) <= budget)
            low = middle;
        else
            high = middle - 1;
    }
    int rows = low * ROW_STEP > floor ? low * ROW_STEP : floor;
    return rows < chunk ? rows : chunk;
}

/* Decoding sequences get their row; returns how many there are. */
static int give_decode_rows(scheduler *s, bool *any_prompt)
{
    int n = 0;
    *any_prompt = false;
    for (int r = 0; r < s->limits.n_ranks; r++)
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            item *it = running_on(s, r)[i];
            bool prompt = is_prompt(it);
            it->rows = !it->held && !it->move && !prompt;
            n += it->rows;
            *any_prompt |= prompt;
        }
    return n;
}

static void choose_rows(scheduler *s)
{
    bool any_prompt, unlimited = s->limits.step_seconds >= NO_BUDGET;
    int n_decode = give_decode_rows(s, &any_prompt);
    int budget = !any_prompt ? 0 : n_decode == 0 || unlimited ? s->limits.chunk : find_budget_rows(s);
    s->planned = weigh(s, budget);
    s->step.expected_seconds = step_cost_predict(&s->cost, &s->planned);
    s->step.decode_rows = n_decode;
    s->step.prefill_rows = (int)s->planned.total_rows - n_decode;
    for (int r = 0; r < s->limits.n_ranks; r++)
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            const item *it = running_on(s, r)[i];
            if (it->rows > 0)
                s->rows[s->step.n_rows++] = (scheduler_rows){.rank = r, .place = it->place, .n_rows = it->rows};
        }
}

/* ---- the step -------------------------------------------------------------------------------------------------------------- */

const scheduler_step *scheduler_plan(scheduler *s)
{
    s->step = (scheduler_step){.leaves = s->leaves, .joins = s->joins, .growths = s->growths, .rows = s->rows, .moves = s->moves};
    move_wished(s);
    for (int r = 0; r < s->limits.n_ranks; r++)
        grow_running(s, r);
    admit_waiting(s);
    choose_rows(s);
    s->step.n_leaves = s->n_leaves;
    s->n_leaves = 0;
    return &s->step;
}

void scheduler_ran(scheduler *s, double seconds)
{
    for (int r = 0; r < s->limits.n_ranks; r++)
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            item *it = running_on(s, r)[i];
            it->n_done += it->rows;
            it->rows = 0;
            if (!it->move)
                name_blocks(s, it);
        }
    if (s->planned.total_rows > 0)
        step_cost_add(&s->cost, &s->planned, seconds);
    s->planned = (step_load){0};
}

void scheduler_add_token(scheduler *s, uint64_t id, int32_t token)
{
    item *it = find(s, id);
    assert(it && it->n_tokens < it->capacity);
    it->tokens[it->n_tokens++] = token;
    extend_keys(s, it);
    fair_queue_charge(s->queue, it->client, TOKEN_CHARGE);
}

void scheduler_get_counters(scheduler *s, scheduler_counters *out)
{
    for (int r = 0; r < s->limits.n_ranks; r++)
        s->n_free[r] = kv_blocks_free(s->blocks[r]);
    *out = (scheduler_counters){.n_running = s->n_running,
                                .n_waiting = fair_queue_count(s->queue),
                                .n_preempted = s->n_preempted,
                                .prefix_queries = s->prefix_queries,
                                .prefix_hits = s->prefix_hits,
                                .n_moved = s->n_moves,
                                .moved_blocks = s->moved_blocks,
                                .kv_free_of_rank = s->n_free};
}

/* ---- for tests ---------------------------------------------------------------------------------------------------------------
 */

const kv_blocks *scheduler_blocks(const scheduler *s, int rank)
{
    return s->blocks[rank];
}

/* Uses of a block by a move alone. */
static int count_moving(const move *m, int rank, int32_t block)
{
    int n = 0;
    for (int i = 0; m->key && i < m->n_blocks; i++) {
        n += !m->sent && m->from == rank && m->from_blocks[i] == block;
        n += !m->received && !m->it && m->to == rank && m->to_blocks[i] == block;
    }
    return n;
}

static bool users_are_right(const scheduler *s, int rank)
{
    for (int32_t b = 0; b < kv_blocks_count(s->blocks[rank]); b++) {
        int users = 0;
        for (int i = 0; i < s->n_on_rank[rank]; i++)
            for (int j = 0; j < running_on(s, rank)[i]->n_blocks; j++)
                users += running_on(s, rank)[i]->blocks[j] == b;
        for (int i = 0; i < MOST_MOVES; i++)
            users += count_moving(&s->underway[i], rank, b);
        if (users != kv_blocks_users(s->blocks[rank], b))
            return false;
    }
    return kv_blocks_is_sound(s->blocks[rank]);
}

bool scheduler_is_sound(const scheduler *s)
{
    int held = 0, running = 0;
    for (int r = 0; r < s->limits.n_ranks; r++) {
        for (int i = 0; i < s->n_on_rank[r]; i++) {
            const item *it = running_on(s, r)[i];
            held += it->held;
            running++;
            if (it->rank != r || it->where >= 0 || *place_of(s, it) != it || find(s, it->id) != it ||
                it->n_blocks < blocks_of(s, it->n_done) || (i > 0 && !is_better(running_on(s, r)[i - 1], it)))
                return false;
        }
        if (!users_are_right(s, r))
            return false;
    }
    return held == s->n_running_held && running == s->n_running &&
           s->n_items == (uint32_t)(s->n_running + fair_queue_count(s->queue));
}
