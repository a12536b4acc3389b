/* Nothing here sorts the vocabulary. The logits are cut in blocks of 128 and every block's largest is kept; a question about the
 * best few looks only into blocks that can hold one of them:
 *
 *   greedy   the best block maximum, then one block
 *   top-k    the k-th largest block maximum is a floor (k tokens reach it), so at most k blocks are opened; the k-th best
 *            among what passes the floor is found by quickselect
 *   top-p    a floor is lowered until what passes it has mass p; then quickselect by mass between the last two floors
 *
 * A token is packed with its logit in one 64-bit key (logit high, inverted id low), so that "better" is one integer comparison
 * and a tie can never depend on the order in which candidates were found. What is kept is always "keys >= cut", read in id order.
 *
 * exp() is our own and in plain fp32: libm picks a variant by CPU, and two machines could then draw different tokens. */
#include "worker/sampler.h"
#include "worker/philox.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK        128
#define LANES        16
#define GREEDY_BELOW 1e-5f

typedef struct {
    uint64_t key;
    float weight;
} candidate;

struct sampler {
    int vocab, n_blocks;
    float *edited;         /* [vocab] logits after bias and penalties */
    float *weights;        /* [vocab] exp((x - max) / temperature) */
    float *block_max;      /* [n_blocks] */
    float *block_scratch;  /* [n_blocks] */
    double *block_mass;    /* [n_blocks] */
    candidate *candidates; /* [vocab] by rising id */
    candidate *shuffled;   /* [vocab] a copy for quickselect */
};

typedef struct {
    int token, n_output;
    bool in_prompt;
} seen_token;

/* Distinct tokens in a dense list, found by an open-addressing index (0: free, else place + 1). */
struct sampler_history {
    int n, capacity;
    uint32_t mask;
    seen_token *seen; /* [capacity] */
    uint32_t *index;  /* [mask + 1] */
};

/* ---- parameters ---- */

static status check_tokens(const char *field, const int *tokens, int n, int vocab)
{
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return status_fail(STATUS_BAD_INPUT, "%s: token %d is outside the vocabulary of %d", field, tokens[i], vocab);
    return STATUS_OK;
}

static status check_range(const char *field, float value, float min, float max)
{
    if (!(value >= min && value <= max))
        return status_fail(STATUS_BAD_INPUT, "%s: %g is outside %g to %g", field, (double)value, (double)min, (double)max);
    return STATUS_OK;
}

static bool contains(const int *tokens, int n, int token)
{
    for (int i = 0; i < n; i++)
        if (tokens[i] == token)
            return true;
    return false;
}

/* A list of allowed tokens that are all stop tokens leaves nothing to choose while min_tokens holds. */
static status check_allowed(const sampling_params *p, int vocab)
{
    if (!p->allowed)
        return STATUS_OK;
    if (p->n_allowed < 1)
        return status_fail(STATUS_BAD_INPUT, "allowed_token_ids: the list is empty, so no token could be chosen");
    TRY(check_tokens("allowed_token_ids", p->allowed, p->n_allowed, vocab));
    if (p->min_tokens == 0)
        return STATUS_OK;
    for (int i = 0; i < p->n_allowed; i++)
        if (!contains(p->stop_ids, p->n_stop_ids, p->allowed[i]))
            return STATUS_OK;
    return status_fail(STATUS_BAD_INPUT, "allowed_token_ids: holds stop tokens only, which min_tokens %d forbids", p->min_tokens);
}

status sampling_params_check(const sampling_params *p, int vocab)
{
    TRY(check_range("temperature", p->temperature, 0, 1000));
    if (p->top_k < 0)
        return status_fail(STATUS_BAD_INPUT, "top_k: %d is negative (0 keeps all tokens)", p->top_k);
    TRY(check_range("top_p", p->top_p, 0, 1));
    TRY(check_range("min_p", p->min_p, 0, 1));
    TRY(check_range("repetition_penalty", p->repetition_penalty, 0, 1000));
    TRY(check_range("frequency_penalty", p->frequency_penalty, -2, 2));
    TRY(check_range("presence_penalty", p->presence_penalty, -2, 2));
    if (p->min_tokens < 0)
        return status_fail(STATUS_BAD_INPUT, "min_tokens: %d is negative", p->min_tokens);
    TRY(check_tokens("stop_token_ids", p->stop_ids, p->n_stop_ids, vocab));
    for (int i = 0; i < p->n_biases; i++) {
        TRY(check_tokens("logit_bias", &p->biases[i].token, 1, vocab));
        TRY(check_range("logit_bias", p->biases[i].bias, -100, 100));
    }
    return check_allowed(p, vocab);
}

static float repetition(const sampling_params *p)
{
    return p->repetition_penalty > 0 ? p->repetition_penalty : 1;
}

bool sampling_params_need_history(const sampling_params *p)
{
    return repetition(p) != 1 || p->frequency_penalty != 0 || p->presence_penalty != 0;
}

/* ---- history ---- */

status sampler_history_create(int max_tokens, sampler_history **out)
{
    uint32_t size = 16;
    while (size < 2 * (uint32_t)max_tokens)
        size *= 2;
    sampler_history *h = calloc(1, sizeof *h);
    if (h) {
        h->capacity = max_tokens;
        h->mask = size - 1;
        h->seen = calloc((size_t)max_tokens + 1, sizeof *h->seen);
        h->index = calloc(size, sizeof *h->index);
    }
    if (!h || !h->seen || !h->index) {
        sampler_history_destroy(h);
        return status_fail(STATUS_NO_MEMORY, "no memory for the token counts of a sequence of %d tokens", max_tokens);
    }
    *out = h;
    return STATUS_OK;
}

void sampler_history_destroy(sampler_history *h)
{
    if (!h)
        return;
    free(h->seen);
    free(h->index);
    free(h);
}

static uint32_t *history_slot(const sampler_history *h, int token)
{
    uint32_t at = ((uint32_t)token * 0x9E3779B9u) >> 7 & h->mask;
    while (h->index[at] && h->seen[h->index[at] - 1].token != token)
        at = (at + 1) & h->mask;
    return &h->index[at];
}

static seen_token *history_entry(sampler_history *h, int token)
{
    uint32_t *slot = history_slot(h, token);
    if (!*slot) {
        assert(h->n < h->capacity);
        h->seen[h->n] = (seen_token){.token = token};
        *slot = (uint32_t)++h->n;
    }
    return &h->seen[*slot - 1];
}

void sampler_history_reset(sampler_history *h)
{
    memset(h->index, 0, ((size_t)h->mask + 1) * sizeof *h->index);
    h->n = 0;
}

void sampler_history_add_prompt(sampler_history *h, const int *tokens, int n)
{
    for (int i = 0; i < n; i++)
        history_entry(h, tokens[i])->in_prompt = true;
}

void sampler_history_add_output(sampler_history *h, int token)
{
    history_entry(h, token)->n_output++;
}

/* ---- memory ---- */

status sampler_create(int vocab, sampler **out)
{
    sampler *s = calloc(1, sizeof *s);
    if (s) {
        size_t v = (size_t)vocab, b = (v + BLOCK - 1) / BLOCK;
        s->vocab = vocab;
        s->n_blocks = (int)b;
        s->edited = malloc(v * sizeof *s->edited);
        s->weights = malloc(v * sizeof *s->weights);
        s->block_max = malloc(b * sizeof *s->block_max);
        s->block_scratch = malloc(b * sizeof *s->block_scratch);
        s->block_mass = malloc(b * sizeof *s->block_mass);
        s->candidates = malloc(v * sizeof *s->candidates);
        s->shuffled = malloc(v * sizeof *s->shuffled);
    }
    if (!s || !s->edited || !s->weights || !s->block_max || !s->block_scratch || !s->block_mass || !s->candidates ||
        !s->shuffled) {
        sampler_destroy(s);
        return status_fail(STATUS_NO_MEMORY, "no memory for sampling over %d tokens", vocab);
    }
    *out = s;
    return STATUS_OK;
}

void sampler_destroy(sampler *s)
{
    if (!s)
        return;
    free(s->edited);
    free(s->weights);
    free(s->block_max);
    free(s->block_scratch);
    free(s->block_mass);
    free(s->candidates);
    free(s->shuffled);
    free(s);
}

/* ---- arithmetic ---- */

static int block_end(int block, int vocab)
{
    return (block + 1) * BLOCK < vocab ? (block + 1) * BLOCK : vocab;
}

/* exp(z) for z <= 0, about 1 ulp; below -87 it is 0. Cephes' expf: z = n ln 2 + r, polynomial in r, scale by 2^n. No branches
 * (what comes out below -87 is masked away), so that the compiler turns a loop of it into vector code. */
static inline float exp_nonpositive(float z)
{
    float t = z * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
    float n = t - 12582912.0f;
    float r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits, shift;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&shift, &t, sizeof shift);
    bits = (bits + (shift << 23)) & -(uint32_t)(z >= -87.0f);
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* w = exp((x - max) * scale); returns the sum. 16 sums side by side, then one tree: the order is fixed. */
static double block_weights(const float *restrict x, int n, float max, float scale, float *restrict w)
{
    float lane[LANES] = {0};
    for (int i = 0; i < n; i++)
        w[i] = exp_nonpositive((x[i] - max) * scale);
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += w[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += w[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return (double)lane[0];
}

static float block_largest(const float *x, int n)
{
    float lane[LANES];
    for (int j = 0; j < LANES; j++)
        lane[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int j = 0; i < n; i++, j++)
        lane[j] = x[i] > lane[j] ? x[i] : lane[j];
    float best = lane[0];
    for (int j = 1; j < LANES; j++)
        best = lane[j] > best ? lane[j] : best;
    return best;
}

static bool block_is_sound(const float *x, int n)
{
    int bad = 0;
    for (int i = 0; i < n; i++)
        bad |= !(x[i] < INFINITY); /* also true for NaN */
    return !bad;
}

static status refuse_logit(const float *x, int first, int end)
{
    while (first < end - 1 && x[first] < INFINITY)
        first++;
    return status_fail(STATUS_BAD_INPUT, "the logit of token %d is %s", first, isnan(x[first]) ? "not a number" : "infinite");
}

/* Fills block_max and finds the best token: the lowest id among equals; -1 when every logit is -infinity. */
static status find_best(sampler *s, const float *x, int *token)
{
    float best = -INFINITY;
    int best_block = -1;
    for (int b = 0; b < s->n_blocks; b++) {
        int first = b * BLOCK, end = block_end(b, s->vocab);
        if (!block_is_sound(x + first, end - first))
            return refuse_logit(x, first, end);
        s->block_max[b] = block_largest(x + first, end - first);
        if (s->block_max[b] > best) {
            best = s->block_max[b];
            best_block = b;
        }
    }
    *token = -1;
    for (int i = best_block * BLOCK; *token < 0 && best_block >= 0; i++)
        if (x[i] == best)
            *token = i;
    return STATUS_OK;
}

/* ---- keys ---- */

static uint64_t key_of(float logit, int token)
{
    float x = logit + 0.0f; /* -0 and 0 are equal */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~token;
}

static int key_token(uint64_t key)
{
    return (int)~(uint32_t)key;
}

static candidate median_of_three(const candidate *c, int first, int last)
{
    candidate a = c[first], b = c[first + (last - first) / 2], d = c[last];
    if (a.key < b.key) {
        candidate t = a;
        a = b, b = t;
    }
    return d.key > a.key ? a : d.key > b.key ? d : b;
}

/* Hoare's partition: afterwards [first, return] >= pivot >= the rest. Keys are distinct. */
static int partition(candidate *c, int first, int last)
{
    uint64_t pivot = median_of_three(c, first, last).key;
    int i = first - 1, j = last + 1;
    for (;;) {
        do
            i++;
        while (c[i].key > pivot);
        do
            j--;
        while (c[j].key < pivot);
        if (i >= j)
            return j;
        candidate t = c[i];
        c[i] = c[j], c[j] = t;
    }
}

/* The key of the k-th best, 1 <= k <= n. Reorders. */
static uint64_t select_rank(candidate *c, int n, int k)
{
    int first = 0, last = n - 1, want = k - 1;
    while (first < last) {
        int split = partition(c, first, last);
        if (want <= split)
            last = split;
        else
            first = split + 1;
    }
    return c[first].key;
}

/* The key at which the best ones, added up from the top, reach `mass`; the last one's when they never do. Reorders. */
static uint64_t select_mass(candidate *c, int n, double mass)
{
    int first = 0, last = n - 1;
    while (first < last) {
        int split = partition(c, first, last);
        double upper = 0;
        for (int i = first; i <= split; i++)
            upper += (double)c[i].weight;
        if (upper >= mass) {
            last = split;
        } else {
            mass -= upper;
            first = split + 1;
        }
    }
    return c[first].key;
}

/* ---- edits ---- */

static void apply_penalties(const sampling_params *p, const sampler_history *h, float *x)
{
    for (int i = 0; i < h->n; i++) {
        const seen_token *t = &h->seen[i];
        float v = x[t->token];
        v = v > 0 ? v / repetition(p) : v * repetition(p);
        if (t->n_output)
            v -= p->frequency_penalty * (float)t->n_output + p->presence_penalty;
        x[t->token] = v;
    }
}

/* The logits after everything that changes single ones: the caller's own row when nothing does. */
static const float *edit_logits(sampler *s, const sampling_params *p, const sampler_history *h, const float *logits, int n_output)
{
    bool hold_stop = n_output < p->min_tokens && p->n_stop_ids > 0;
    bool penalise = h && sampling_params_need_history(p);
    if (!p->allowed && !p->n_biases && !hold_stop && !penalise)
        return logits;
    float *x = s->edited;
    if (p->allowed) {
        for (int i = 0; i < s->vocab; i++)
            x[i] = -INFINITY;
        for (int i = 0; i < p->n_allowed; i++)
            x[p->allowed[i]] = logits[p->allowed[i]];
    } else {
        memcpy(x, logits, (size_t)s->vocab * sizeof *x);
    }
    for (int i = 0; i < p->n_biases; i++)
        x[p->biases[i].token] += p->biases[i].bias;
    for (int i = 0; hold_stop && i < p->n_stop_ids; i++)
        x[p->stop_ids[i]] = -INFINITY;
    if (penalise)
        apply_penalties(p, h, x);
    return x;
}

/* ---- what is kept ---- */

/* Tokens with a logit of at least `floor`, by rising id, without weights. */
static int collect(sampler *s, const float *x, float floor)
{
    int n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < floor)
            continue;
        for (int i = b * BLOCK, end = block_end(b, s->vocab); i < end; i++)
            if (x[i] >= floor && x[i] > -INFINITY)
                s->candidates[n++].key = key_of(x[i], i);
    }
    return n;
}

static int drop_below(candidate *c, int n, uint64_t cut)
{
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (c[i].key >= cut)
            c[kept++] = c[i];
    return kept;
}

static int rising_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* A value that at least k logits reach: the k-th largest block maximum, as every block counts for one. */
static float rank_floor(sampler *s, int k)
{
    if (k > s->n_blocks)
        return -INFINITY;
    memcpy(s->block_scratch, s->block_max, (size_t)s->n_blocks * sizeof *s->block_scratch);
    qsort(s->block_scratch, (size_t)s->n_blocks, sizeof *s->block_scratch, rising_floats);
    return s->block_scratch[s->n_blocks - k];
}

/* The k best (fewer where fewer are left) that also reach `floor`, by rising id. */
static int collect_best(sampler *s, const float *x, int k, float floor)
{
    float by_rank = rank_floor(s, k);
    int n = collect(s, x, by_rank > floor ? by_rank : floor);
    if (n <= k)
        return n;
    memcpy(s->shuffled, s->candidates, (size_t)n * sizeof *s->shuffled);
    return drop_below(s->candidates, n, select_rank(s->shuffled, n, k));
}

static double weigh(sampler *s, const float *x, int n, float max, float scale)
{
    double mass = 0;
    for (int i = 0; i < n; i++) {
        candidate *c = &s->candidates[i];
        c->weight = exp_nonpositive((x[key_token(c->key)] - max) * scale);
        mass += (double)c->weight;
    }
    return mass;
}

static int cut_mass(sampler *s, int n, double target)
{
    memcpy(s->shuffled, s->candidates, (size_t)n * sizeof *s->shuffled);
    return drop_below(s->candidates, n, select_mass(s->shuffled, n, target));
}

/* ---- the draw ---- */

static double draw_uniform(const sampling_params *p, uint32_t position)
{
    return philox_uniform(philox4x32((philox_block){{position, p->sequence, 0, 0}}, p->seed));
}

static int draw_candidate(const sampler *s, int n, double u)
{
    double mass = 0, passed = 0;
    for (int i = 0; i < n; i++)
        mass += (double)s->candidates[i].weight;
    int last = 0;
    for (int i = 0; i < n; i++) {
        if (!(s->candidates[i].weight > 0))
            continue;
        passed += (double)s->candidates[i].weight;
        last = i;
        if (passed > u * mass)
            break;
    }
    return key_token(s->candidates[last].key);
}

static double weigh_all(sampler *s, const float *x, float max, float scale)
{
    double mass = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        int first = b * BLOCK;
        s->block_mass[b] = block_weights(x + first, block_end(b, s->vocab) - first, max, scale, s->weights + first);
        mass += s->block_mass[b];
    }
    return mass;
}

/* Over the whole vocabulary: whole blocks first, then inside one. */
static int draw_any(const sampler *s, double mass, double u)
{
    double left = u * mass;
    int block = 0, last_block = 0;
    for (; block < s->n_blocks; block++) {
        if (s->block_mass[block] > 0)
            last_block = block;
        if (s->block_mass[block] > left)
            break;
        left -= s->block_mass[block];
    }
    if (block == s->n_blocks) /* rounding ate the end */
        block = last_block;
    int chosen = block * BLOCK;
    for (int i = block * BLOCK, end = block_end(block, s->vocab); i < end; i++) {
        if (!(s->weights[i] > 0))
            continue;
        chosen = i;
        if ((double)s->weights[i] > left)
            break;
        left -= (double)s->weights[i];
    }
    return chosen;
}

/* The mass of all tokens of at least this weight; block_scratch holds every block's largest. */
static double mass_reaching(const sampler *s, float weight)
{
    double mass = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_scratch[b] < weight)
            continue;
        float lane[LANES] = {0};
        const float *w = s->weights + b * BLOCK;
        int n = block_end(b, s->vocab) - b * BLOCK, i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++)
                lane[j] += w[i + j] >= weight ? w[i + j] : 0;
        for (; i < n; i++)
            lane[0] += w[i] >= weight ? w[i] : 0;
        for (int j = 1; j < LANES; j++)
            lane[0] += lane[j];
        mass += (double)lane[0];
    }
    return mass;
}

static int collect_reaching(sampler *s, const float *x, float weight)
{
    int n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_scratch[b] < weight)
            continue;
        for (int i = b * BLOCK, end = block_end(b, s->vocab); i < end; i++)
            if (s->weights[i] >= weight)
                s->candidates[n++] = (candidate){.key = key_of(x[i], i), .weight = s->weights[i]};
    }
    return n;
}

/* Top-p over everything: a floor is lowered by e until the target mass reaches it; the last token kept is then among those
 * between the last two floors, so only these are searched. */
static int collect_mass(sampler *s, const float *x, float max, float scale, double target)
{
    for (int b = 0; b < s->n_blocks; b++)
        s->block_scratch[b] = exp_nonpositive((s->block_max[b] - max) * scale);
    float floor = 1, upper = INFINITY;
    double above = 0, mass = mass_reaching(s, floor);
    while (mass < target && floor > 0) {
        upper = floor;
        above = mass;
        floor = floor > 1e-37f ? floor * 0.36787944f : 0;
        mass = mass_reaching(s, floor);
    }
    int n = collect_reaching(s, x, floor), between = 0;
    for (int i = 0; i < n; i++)
        if (s->candidates[i].weight < upper)
            s->shuffled[between++] = s->candidates[i];
    return between ? drop_below(s->candidates, n, select_mass(s->shuffled, between, target - above)) : n;
}

status sampler_choose(sampler *s, const sampling_params *p, const sampler_history *history, const float *logits,
                      uint32_t position, int n_output, int *token)
{
    const float *x = edit_logits(s, p, history, logits, n_output);
    int best;
    TRY(find_best(s, x, &best));
    if (best < 0)
        return status_fail(STATUS_BAD_INPUT, "no token is left to choose at position %u", position);
    if (p->temperature < GREEDY_BELOW) {
        *token = best;
        return STATUS_OK;
    }
    float max = x[best], scale = 1.0f / p->temperature;
    float floor = p->min_p > 0 ? max + p->temperature * (float)log((double)p->min_p) : -INFINITY;
    bool cut_k = p->top_k > 0 && p->top_k<s->vocab, cut_p = p->top_p> 0 && p->top_p < 1;
    double u = draw_uniform(p, position);
    if (!cut_k && !cut_p && !(p->min_p > 0)) {
        *token = draw_any(s, weigh_all(s, x, max, scale), u);
        return STATUS_OK;
    }
    int n;
    if (cut_k || p->min_p > 0) {
        n = cut_k ? collect_best(s, x, p->top_k, floor) : collect(s, x, floor);
        double mass = weigh(s, x, n, max, scale);
        if (cut_p)
            n = cut_mass(s, n, (double)p->top_p * mass);
    } else {
        double target = (double)p->top_p * weigh_all(s, x, max, scale);
        n = collect_mass(s, x, max, scale, target);
    }
    *token = draw_candidate(s, n, u);
    return STATUS_OK;
}

/* ---- log-probabilities ---- */

float sampler_log_sum_exp(const float *logits, int vocab)
{
    float max = -INFINITY, w[BLOCK];
    for (int i = 0; i < vocab; i += BLOCK) {
        float m = block_largest(logits + i, vocab - i < BLOCK ? vocab - i : BLOCK);
        max = m > max ? m : max;
    }
    double mass = 0;
    for (int i = 0; i < vocab; i += BLOCK)
        mass += block_weights(logits + i, vocab - i < BLOCK ? vocab - i : BLOCK, max, 1, w);
    return (float)((double)max + log(mass));
}

token_logprob sampler_logprob(const float *logits, int vocab, float log_sum, int token)
{
    float own = logits[token];
    int better = 0;
    for (int i = 0; i < token; i++)
        better += logits[i] >= own;
    for (int i = token + 1; i < vocab; i++)
        better += logits[i] > own;
    return (token_logprob){.token = token, .rank = 1 + better, .logprob = own - log_sum};
}

static int falling_keys(const void *a, const void *b)
{
    uint64_t x = ((const candidate *)a)->key, y = ((const candidate *)b)->key;
    return (x < y) - (x > y);
}

int sampler_top_logprobs(sampler *s, const float *logits, float log_sum, int n, token_logprob *out)
{
    int best;
    if (n < 1 || find_best(s, logits, &best) != STATUS_OK)
        return 0;
    int found = collect_best(s, logits, n, -INFINITY);
    qsort(s->candidates, (size_t)found, sizeof *s->candidates, falling_keys);
    for (int i = 0; i < found; i++) {
        int token = key_token(s->candidates[i].key);
        out[i] = (token_logprob){.token = token, .rank = i + 1, .logprob = logits[token] - log_sum};
    }
    return found;
}
