#include "cluster/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

/* ---- what it knows ---- */

void tokenizer_destroy(tokenizer *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->n_normalize; i++) {
        pattern_destroy(t->normalize[i].pattern);
        free(t->normalize[i].text);
    }
    for (int i = 0; i < TOKENIZER_STEPS_MAX; i++)
        pattern_destroy(t->cut[i].pattern);
    for (int i = 0; i < t->n_decode; i++) {
        pattern_destroy(t->decode[i].pattern);
        free(t->decode[i].text);
    }
    for (size_t i = 0; i < t->n_added; i++) {
        free(t->added[i].content);
        free(t->added[i].pattern);
    }
    free(t->added);
    string_index_clear(&t->added_index);
    added_trie_clear(&t->trie);
    added_trie_clear(&t->normalized_trie);
    bpe_clear(&t->model);
    free(t->post.ids);
    free(t->tokens);
    bytes_clear(&t->texts);
    bytes_clear(&t->shown);
    free(t->name);
    free(t);
}

int tokenizer_n_ids(const tokenizer *t)
{
    return t->n_ids;
}

int32_t tokenizer_find(const tokenizer *t, const char *token)
{
    text_span text = {token, strlen(token)};
    int32_t added = string_index_find(&t->added_index, text);
    return added >= 0 ? t->added[added].id : string_index_find(&t->model.vocab, text);
}

static bool is_known(const tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_ids && t->tokens[id].known;
}

bool tokenizer_is_special(const tokenizer *t, int32_t id)
{
    return is_known(t, id) && t->tokens[id].special;
}

const char *tokenizer_bytes(const tokenizer *t, int32_t id, size_t *size)
{
    *size = 0;
    if (!is_known(t, id))
        return NULL;
    *size = t->tokens[id].shown_size;
    return *size ? (const char *)t->shown.data + t->tokens[id].shown : "";
}

/* ---- encoding ---- */

status tokenizer_scratch_create(const tokenizer *t, tokenizer_scratch **out)
{
    (void)t;
    tokenizer_scratch *s = calloc(1, sizeof *s);
    status st = s ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "no memory for a tokenizer's scratch");
    if (s) {
        TRY_GOTO(matcher_create(&s->matcher), out);
        TRY_GOTO(bpe_scratch_create(&s->bpe), out);
        *out = s;
        return STATUS_OK;
    }
out:
    tokenizer_scratch_destroy(s);
    return st;
}

void tokenizer_scratch_destroy(tokenizer_scratch *s)
{
    if (!s)
        return;
    matcher_destroy(s->matcher);
    bpe_scratch_destroy(s->bpe);
    normalize_room_clear(&s->room);
    bytes_clear(&s->work.buffers[0]);
    bytes_clear(&s->work.buffers[1]);
    text_pieces_clear(&s->work.pieces);
    text_pieces_clear(&s->work.next);
    free(s->ids.items);
    free(s);
}

static void start_text(text_work *work, const char *text, size_t size)
{
    work->text = (text_span){text, size};
    work->writing = 0;
    work->pieces.n = work->next.n = 0;
    work->pieces.failed = work->next.failed = false;
    uint32_t first = size ? (uint32_t)utf8_length((unsigned char)*text) : 0;
    text_pieces_add(&work->pieces, (text_piece){.end = (uint32_t)size, .origin = first, .id = -1});
}

static status take_next(text_work *work)
{
    text_pieces swapped = work->pieces;
    work->pieces = work->next;
    work->next = swapped;
    work->next.n = 0;
    return work->pieces.failed || work->next.failed ? status_fail(STATUS_NO_MEMORY, "no memory for the parts of a text")
                                                    : STATUS_OK;
}

/* Added tokens that stand for themselves are cut out of the text as it is. */
static status cut_out_added(const tokenizer *t, text_work *work)
{
    if (t->trie.n_first == 0)
        return STATUS_OK;
    added_cut(&t->trie, t->added, work->text.text, work->pieces.items[0], &work->next);
    return take_next(work);
}

/* Each part between them is normalised by itself. */
static status normalize_parts(const tokenizer *t, tokenizer_scratch *s)
{
    text_work *work = &s->work;
    if (t->n_normalize == 0)
        return STATUS_OK;
    bytes_writer *to = &work->buffers[work->writing];
    bytes_reset(to);
    for (size_t i = 0; i < work->pieces.n; i++) {
        text_piece *p = &work->pieces.items[i];
        size_t origin = p->origin, start = to->size;
        if (p->id < 0) {
            text_span part = {work->text.text + p->start, p->end - p->start};
            TRY(normalize_text(t->normalize, t->n_normalize, s->matcher, &s->room, part, &origin, &part));
            bytes_put(to, part.text, part.size);
        }
        if (to->failed)
            return status_fail(STATUS_NO_MEMORY, "no memory to normalise a text");
        if (to->size > TOKENIZER_TEXT_MAX)
            return status_fail(STATUS_BAD_INPUT, "a text grows too long in the tokenizer's normalizer");
        text_pieces_add(&work->next, (text_piece){(uint32_t)start, (uint32_t)to->size, (uint32_t)origin, p->id});
    }
    work->text = (text_span){(const char *)to->data, to->size};
    work->writing = !work->writing;
    return take_next(work);
}

/* Then those that are looked for in the normalised text. */
static status cut_out_normalized(const tokenizer *t, text_work *work)
{
    if (t->normalized_trie.n_first == 0)
        return STATUS_OK;
    for (size_t i = 0; i < work->pieces.n; i++) {
        if (work->pieces.items[i].id >= 0)
            text_pieces_add(&work->next, work->pieces.items[i]);
        else
            added_cut(&t->normalized_trie, t->added, work->text.text, work->pieces.items[i], &work->next);
    }
    return take_next(work);
}

static status encode_text(const tokenizer *t, tokenizer_scratch *s, const char *text, size_t size)
{
    text_work *work = &s->work;
    if (size == 0)
        return STATUS_OK;
    start_text(work, text, size);
    if (work->pieces.failed)
        return status_fail(STATUS_NO_MEMORY, "no memory for a text");
    TRY(cut_out_added(t, work));
    TRY(normalize_parts(t, s));
    TRY(cut_out_normalized(t, work));
    for (int i = 0; i < t->n_cut; i++)
        TRY(cut_text(&t->cut[i], s->matcher, work));
    for (size_t i = 0; i < work->pieces.n; i++) {
        const text_piece *p = &work->pieces.items[i];
        if (p->id >= 0) {
            TRY(id_list_reserve(&s->ids, 1));
            s->ids.items[s->ids.n++] = p->id;
        } else {
            TRY(bpe_encode(&t->model, s->bpe, (text_span){work->text.text + p->start, p->end - p->start}, &s->ids));
        }
    }
    return STATUS_OK;
}

/* The template says where the text comes, as a rule once, and which ids stand around it. */
static status apply_template(const tokenizer *t, tokenizer_scratch *s, const char *text, size_t size, bool add_special)
{
    size_t from = 0, n = 0;
    bool encoded = false;
    for (size_t i = 0; i < t->post.n; i++) {
        if (t->post.ids[i] >= 0) {
            if (!add_special)
                continue;
            TRY(id_list_reserve(&s->ids, 1));
            s->ids.items[s->ids.n++] = t->post.ids[i];
        } else if (!encoded) {
            from = s->ids.n;
            TRY(encode_text(t, s, text, size));
            n = s->ids.n - from;
            encoded = true;
        } else {
            TRY(id_list_reserve(&s->ids, n));
            if (n > 0)
                memcpy(s->ids.items + s->ids.n, s->ids.items + from, n * sizeof *s->ids.items);
            s->ids.n += n;
        }
    }
    return STATUS_OK;
}

status tokenizer_encode(const tokenizer *t, tokenizer_scratch *s, const char *text, size_t size, bool add_special,
                        const int32_t **ids, size_t *n_ids)
{
    if (size > TOKENIZER_TEXT_MAX)
        return status_fail(STATUS_BAD_INPUT, "a text of %zu bytes is longer than the %zu that can be tokenized", size,
                           TOKENIZER_TEXT_MAX);
    size_t bad = utf8_check(text, size);
    if (bad < size)
        return status_fail(STATUS_BAD_INPUT, "byte %zu of the text is not UTF-8", bad);
    s->ids.n = 0;
    TRY(id_list_reserve(&s->ids, 1));
    TRY(apply_template(t, s, text, size, add_special));
    *ids = s->ids.items;
    *n_ids = s->ids.n;
    return STATUS_OK;
}
