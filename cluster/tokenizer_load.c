/* tokenizer_load.c - tokenizer.json into a tokenizer: the model with its vocabulary and merges, the added tokens, the tables by
 * id. */
#include "cluster/tokenizer_parts.h"
#include "proto/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_MAX ((size_t)256 << 20)

static text_span span_of(const char *text)
{
    return (text_span){text, strlen(text)};
}

/* ---- model ---- */

static status check_model_type(const char *where, const cJSON *model)
{
    const cJSON *type = json_find(model, "type"); /* older files name none */
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "BPE") != 0))
        return status_fail(STATUS_UNSUPPORTED, "%s: \"%s\" is not supported", where,
                           cJSON_IsString(type) ? type->valuestring : "?");
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++) {
        const cJSON *affix = json_find(model, affixes[i]);
        if (affix && !(cJSON_IsString(affix) && affix->valuestring[0] == '\0'))
            return status_fail(STATUS_UNSUPPORTED, "%s: %s is set, which is not supported", where, affixes[i]);
    }
    double dropout;
    TRY(json_get_double_or(model, where, "dropout", 0, &dropout));
    if (dropout != 0)
        return status_fail(STATUS_UNSUPPORTED, "%s: dropout is %g, which is not supported", where, dropout);
    return STATUS_OK;
}

static size_t count(const cJSON *list)
{
    size_t n = 0;
    for (const cJSON *item = list->child; item; item = item->next)
        n++;
    return n;
}

static status read_vocab(const char *where, const cJSON *model, tokenizer *t)
{
    const cJSON *vocab = json_find(model, "vocab");
    if (!cJSON_IsObject(vocab))
        return status_fail(STATUS_BAD_INPUT, "%s: vocab is missing or not a JSON object", where);
    TRY(string_index_reserve(&t->model.vocab, count(vocab)));
    for (const cJSON *item = vocab->child; item; item = item->next) {
        double id = item->valuedouble;
        if (!cJSON_IsNumber(item) || !(id >= 0 && id <= TOKENIZER_ID_MAX) || id != (int32_t)id)
            return status_fail(STATUS_BAD_INPUT, "%s: vocab: the id of \"%s\" is not a whole number from 0 to %d", where,
                               item->string, TOKENIZER_ID_MAX);
        TRY(string_index_set(&t->model.vocab, span_of(item->string), (int32_t)id, NULL));
    }
    return STATUS_OK;
}

/* One merge, as "left right" or ["left", "right"]. A line "#version .." is none. */
static status split_merge(const char *where, const cJSON *item, size_t index, text_span *left, text_span *right, bool *skip)
{
    *skip = false;
    if (cJSON_IsString(item)) {
        const char *text = item->valuestring, *blank = strchr(text, ' ');
        *skip = strncmp(text, "#version", 8) == 0;
        if (!*skip && (!blank || strchr(blank + 1, ' ')))
            return status_fail(STATUS_BAD_INPUT, "%s: merges: item %zu is not two tokens with a blank between them", where,
                               index);
        if (!*skip) {
            *left = (text_span){text, (size_t)(blank - text)};
            *right = span_of(blank + 1);
        }
        return STATUS_OK;
    }
    const cJSON *a = cJSON_IsArray(item) ? item->child : NULL, *b = a ? a->next : NULL;
    if (!cJSON_IsString(a) || !cJSON_IsString(b) || b->next)
        return status_fail(STATUS_BAD_INPUT, "%s: merges: item %zu is neither a string nor a list of two", where, index);
    *left = span_of(a->valuestring);
    *right = span_of(b->valuestring);
    return STATUS_OK;
}

static status find_in_vocab(const char *where, const tokenizer *t, text_span token, int32_t *id)
{
    *id = string_index_find(&t->model.vocab, token);
    if (*id < 0)
        return status_fail(STATUS_BAD_INPUT, "%s: merges: \"%.*s\" is not in the vocabulary", where,
                           token.size > 200 ? 200 : (int)token.size, token.text);
    return STATUS_OK;
}

static status read_merges(const char *where, const cJSON *model, tokenizer *t)
{
    const cJSON *merges;
    TRY(json_get_array(model, where, "merges", &merges));
    TRY(bpe_reserve_merges(&t->model, count(merges)));
    bytes_writer joined = {0};
    status st = STATUS_OK;
    size_t index = 0;
    uint32_t rank = 0;
    for (const cJSON *item = merges->child; item; item = item->next, index++) {
        text_span left, right;
        int32_t left_id, right_id, id;
        bool skip;
        TRY_GOTO(split_merge(where, item, index, &left, &right, &skip), out);
        if (skip)
            continue;
        bytes_reset(&joined);
        bytes_put(&joined, left.text, left.size);
        bytes_put(&joined, right.text, right.size);
        if (joined.failed) {
            st = status_fail(STATUS_NO_MEMORY, "%s: no memory for a merge", where);
            goto out;
        }
        TRY_GOTO(find_in_vocab(where, t, left, &left_id), out);
        TRY_GOTO(find_in_vocab(where, t, right, &right_id), out);
        TRY_GOTO(find_in_vocab(where, t, (text_span){(const char *)joined.data, joined.size}, &id), out);
        bpe_add_merge(&t->model, left_id, right_id, rank++, id);
    }
out:
    bytes_clear(&joined);
    return st;
}

static status read_unknown(const char *where, const cJSON *model, bpe_model *m)
{
    const char *unk;
    m->unk_id = -1;
    if (!json_find(model, "unk_token"))
        return STATUS_OK;
    TRY(json_get_string(model, where, "unk_token", &unk));
    m->unk_name = strdup(unk);
    if (!m->unk_name)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    m->unk_id = string_index_find(&m->vocab, span_of(unk));
    m->unk_missing = m->unk_id < 0;
    return STATUS_OK;
}

static void find_byte_ids(bpe_model *m)
{
    for (int b = 0; b < 256; b++) {
        char text[8];
        size_t n = utf8_set(text, byte_level_char((unsigned char)b));
        m->byte_ids[b] = string_index_find(&m->vocab, (text_span){text, n});
        snprintf(text, sizeof text, "<0x%02X>", (unsigned)b);
        m->fallback_ids[b] = string_index_find(&m->vocab, span_of(text));
    }
}

/* Whether a text may be cut before each U+2581 that follows something else: when no merge makes a token with such a place
 * inside. Then the words of a SentencePiece-style model are found, and cached, although it has no pre-tokenizer. */
static void find_boundary(bpe_model *m)
{
    static const char mark[] = "\u2581";
    size_t size = sizeof mark - 1;
    if (m->ignore_merges || string_index_find(&m->vocab, (text_span){mark, size}) < 0)
        return;
    for (size_t i = 0; i < m->vocab.capacity; i++) {
        const string_entry *e = &m->vocab.entries[i];
        const char *text = e->id >= 0 ? (const char *)m->vocab.bytes.data + e->at : "";
        for (size_t at = 1; at + size <= e->size; at++)
            if (memcmp(text + at, mark, size) == 0 && (at < size || memcmp(text + at - size, mark, size) != 0))
                return;
    }
    memcpy(m->boundary, mark, size);
    m->boundary_size = size;
}

static status read_model(const char *name, const cJSON *model, tokenizer *t)
{
    char where[512];
    snprintf(where, sizeof where, "%s: model", name);
    if (!cJSON_IsObject(model))
        return status_fail(STATUS_BAD_INPUT, "%s: missing or not a JSON object", where);
    bpe_model *m = &t->model;
    TRY(check_model_type(where, model));
    TRY(read_vocab(where, model, t));
    TRY(read_merges(where, model, t));
    TRY(read_unknown(where, model, m));
    TRY(json_get_bool_or(model, where, "byte_fallback", false, &m->byte_fallback));
    TRY(json_get_bool_or(model, where, "fuse_unk", false, &m->fuse_unk));
    TRY(json_get_bool_or(model, where, "ignore_merges", false, &m->ignore_merges));
    find_byte_ids(m);
    find_boundary(m);
    return STATUS_OK;
}

/* ---- added tokens ---- */

static void added_clear(added_token *a)
{
    free(a->content);
    free(a->pattern);
    *a = (added_token){0};
}

static status read_flags(const char *where, const cJSON *item, added_token *a)
{
    TRY(json_get_bool_or(item, where, "single_word", false, &a->single_word));
    TRY(json_get_bool_or(item, where, "lstrip", false, &a->lstrip));
    TRY(json_get_bool_or(item, where, "rstrip", false, &a->rstrip));
    TRY(json_get_bool_or(item, where, "normalized", true, &a->normalized));
    return json_get_bool_or(item, where, "special", false, &a->special);
}

/* What is looked for in a text: the content, normalised if the text is. */
static status make_pattern(tokenizer *t, tokenizer_matcher *m, normalize_room *room, added_token *a)
{
    text_span pattern = {a->content, a->size};
    size_t origin = 0;
    if (a->normalized)
        TRY(normalize_text(t->normalize, t->n_normalize, m, room, pattern, &origin, &pattern));
    a->pattern = malloc(pattern.size + 1);
    if (!a->pattern)
        return status_fail(STATUS_NO_MEMORY, "no memory for an added token");
    memcpy(a->pattern, pattern.text, pattern.size);
    a->pattern_size = pattern.size;
    return STATUS_OK;
}

/* The id in the vocabulary, else the next free one: the file's own number for it does not count in the package either. */
static status add_token(tokenizer *t, added_token *a, int32_t *next_id)
{
    text_span content = {a->content, a->size};
    int32_t index = string_index_find(&t->added_index, content);
    if (index >= 0) { /* said again: the last word counts, but once special is special for good */
        a->id = t->added[index].id;
        a->special |= t->added[index].special;
        added_clear(&t->added[index]);
        t->added[index] = *a;
        return STATUS_OK;
    }
    a->id = string_index_find(&t->model.vocab, content);
    if (a->id < 0)
        a->id = (*next_id)++;
    if (a->id > TOKENIZER_ID_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: more than %d tokens", t->name, TOKENIZER_ID_MAX);
    TRY(string_index_set(&t->added_index, content, (int32_t)t->n_added, NULL));
    t->added[t->n_added++] = *a;
    return STATUS_OK;
}

static status read_added_token(const char *where, const cJSON *item, tokenizer *t, tokenizer_matcher *m, normalize_room *room,
                               int32_t *next_id)
{
    const char *content;
    TRY(json_get_string(item, where, "content", &content));
    if (!*content)
        return STATUS_OK;
    added_token a = {.size = strlen(content), .content = strdup(content)};
    status st;
    if (!a.content)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    TRY_GOTO(read_flags(where, item, &a), out);
    TRY_GOTO(make_pattern(t, m, room, &a), out);
    TRY_GOTO(add_token(t, &a, next_id), out);
    return STATUS_OK;
out:
    added_clear(&a);
    return st;
}

static status read_added(const char *name, const cJSON *list, tokenizer *t)
{
    if (!list)
        return STATUS_OK;
    char where[512];
    snprintf(where, sizeof where, "%s: added_tokens", name);
    if (!cJSON_IsArray(list))
        return status_fail(STATUS_BAD_INPUT, "%s: not a list", where);
    t->added = calloc(count(list) + 1, sizeof *t->added);
    if (!t->added)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for them", where);
    tokenizer_matcher *m = NULL;
    normalize_room room = {0};
    int32_t next_id = (int32_t)t->model.vocab.n;
    status st;
    TRY_GOTO(matcher_create(&m), out);
    for (const cJSON *item = list->child; item; item = item->next)
        TRY_GOTO(read_added_token(where, item, t, m, &room, &next_id), out);
    for (size_t i = 0; i < t->n_added; i++) {
        const added_token *a = &t->added[i];
        text_span pattern = {a->pattern, a->pattern_size};
        TRY_GOTO(added_trie_insert(a->normalized ? &t->normalized_trie : &t->trie, where, pattern, (int32_t)i), out);
    }
out:
    matcher_destroy(m);
    normalize_room_clear(&room);
    return st;
}

/* ---- tables by id ---- */

static status set_text(tokenizer *t, int32_t id, text_span text)
{
    token_entry *e = &t->tokens[id];
    e->known = true;
    e->text = t->texts.size;
    e->text_size = (uint32_t)text.size;
    bytes_put(&t->texts, text.text, text.size);
    return t->texts.failed ? status_fail(STATUS_NO_MEMORY, "%s: no memory for its tokens", t->name) : STATUS_OK;
}

static status fill_texts(tokenizer *t)
{
    const string_index *vocab = &t->model.vocab;
    int32_t last = -1;
    for (size_t i = 0; i < vocab->capacity; i++)
        last = vocab->entries[i].id > last ? vocab->entries[i].id : last;
    for (size_t i = 0; i < t->n_added; i++)
        last = t->added[i].id > last ? t->added[i].id : last;
    t->n_ids = last + 1;
    t->tokens = calloc((size_t)t->n_ids + 1, sizeof *t->tokens);
    if (!t->tokens)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d tokens", t->name, t->n_ids);
    for (size_t i = 0; i < vocab->capacity; i++) {
        const string_entry *e = &vocab->entries[i];
        /* Two tokens of one id: the later one in the file shows. */
        if (e->id >= 0 && (!t->tokens[e->id].known || t->tokens[e->id].shown < e->at)) {
            TRY(set_text(t, e->id, (text_span){(const char *)vocab->bytes.data + e->at, e->size}));
            t->tokens[e->id].shown = e->at;
        }
    }
    for (size_t i = 0; i < t->n_added; i++) {
        const added_token *a = &t->added[i];
        TRY(set_text(t, a->id, (text_span){a->pattern, a->pattern_size}));
        int32_t like = string_index_find(&t->added_index, (text_span){a->pattern, a->pattern_size});
        t->tokens[a->id].special = a->special;
        t->tokens[a->id].skipped = like >= 0 && t->added[like].special;
    }
    return STATUS_OK;
}

static status fill_shown(tokenizer *t)
{
    tokenizer_matcher *m = NULL;
    status st;
    TRY_GOTO(matcher_create(&m), out);
    for (int id = 0; id < t->n_ids; id++) {
        token_entry *e = &t->tokens[id];
        if (!e->known)
            continue;
        e->shown = t->shown.size;
        text_span text = {(const char *)t->texts.data + e->text, e->text_size};
        TRY_GOTO(decode_alone(t->decode, t->n_decode, m, text, &t->shown), out);
        e->shown_size = (uint32_t)(t->shown.size - e->shown);
        if (t->shown.failed || t->shown.size > TOKENIZER_TEXT_MAX) {
            st = status_fail(STATUS_NO_MEMORY, "%s: no memory for its tokens", t->name);
            goto out;
        }
    }
out:
    matcher_destroy(m);
    return st;
}

/* Where bytes become their characters at the very end, the model works on the bytes themselves and spares the detour. */
static status use_raw_bytes(tokenizer *t)
{
    bpe_model *m = &t->model;
    if (t->n_cut == 0 || t->cut[t->n_cut - 1].kind != CUT_BYTE_LEVEL)
        return STATUS_OK;
    for (int b = 0; b < 256; b++)
        if (m->byte_ids[b] < 0)
            return STATUS_OK;
    t->n_cut--;
    m->raw_bytes = true;
    m->boundary_size = 0;
    if (!m->ignore_merges)
        return STATUS_OK;
    TRY(string_index_reserve(&m->raw, m->vocab.n));
    bytes_writer raw = {0};
    status st = STATUS_OK;
    for (size_t i = 0; i < m->vocab.capacity && st == STATUS_OK; i++) {
        const string_entry *e = &m->vocab.entries[i];
        text_span text = {(const char *)m->vocab.bytes.data + e->at, e->size};
        bytes_reset(&raw);
        bool mapped = e->id >= 0 && e->size > 0;
        for (size_t at = 0; mapped && at < text.size;) {
            uint32_t c;
            at += utf8_get(text.text + at, &c);
            mapped = byte_level_byte(c) >= 0;
        }
        if (!mapped)
            continue;
        byte_level_decode(text, &raw);
        st = raw.failed ? status_fail(STATUS_NO_MEMORY, "%s: no memory for its tokens", t->name)
                        : string_index_set(&m->raw, (text_span){(const char *)raw.data, raw.size}, e->id, NULL);
    }
    bytes_clear(&raw);
    return st;
}

/* ---- the file ---- */

/* cJSON ends strings at a NUL character, which would make two tokens one: such a file is refused. */
static status check_bytes(const char *name, const char *text, size_t size)
{
    size_t bad = utf8_check(text, size);
    if (bad < size)
        return status_fail(STATUS_BAD_INPUT, "%s: byte %zu is not UTF-8", name, bad);
    const char *nul = memchr(text, 0, size);
    if (nul)
        return status_fail(STATUS_BAD_INPUT, "%s: byte %td is NUL", name, nul - text);
    for (const char *at = text; (at = memmem(at, (size_t)(text + size - at), "\\u0000", 6)); at += 6) {
        size_t slashes = 0;
        while (at - slashes > text && at[-1 - (ptrdiff_t)slashes] == '\\')
            slashes++;
        if (slashes % 2 == 0)
            return status_fail(STATUS_UNSUPPORTED, "%s: a string with a NUL character (byte %td) is not supported", name,
                               at - text);
    }
    return STATUS_OK;
}

static status check_absent(const char *name, const cJSON *json, const char *key)
{
    if (json_find(json, key))
        return status_fail(STATUS_UNSUPPORTED, "%s: %s is set, which is not supported", name, key);
    return STATUS_OK;
}

static status read_tree(const char *name, const cJSON *json, tokenizer *t)
{
    if (!cJSON_IsObject(json))
        return status_fail(STATUS_BAD_INPUT, "%s: not a JSON object", name);
    const cJSON *version = json_find(json, "version");
    if (version && (!cJSON_IsString(version) || strcmp(version->valuestring, "1.0") != 0))
        return status_fail(STATUS_UNSUPPORTED, "%s: its version is not 1.0", name);
    TRY(check_absent(name, json, "truncation"));
    TRY(check_absent(name, json, "padding"));
    TRY(read_model(name, json_find(json, "model"), t));
    TRY(steps_read_normalizer(name, json_find(json, "normalizer"), t));
    TRY(steps_read_pre_tokenizer(name, json_find(json, "pre_tokenizer"), t));
    TRY(steps_read_post_processor(name, json_find(json, "post_processor"), t));
    TRY(steps_read_decoder(name, json_find(json, "decoder"), t));
    TRY(read_added(name, json_find(json, "added_tokens"), t));
    TRY(use_raw_bytes(t));
    TRY(fill_texts(t));
    return fill_shown(t);
}

status tokenizer_parse(const char *name, const void *text, size_t size, tokenizer **out)
{
    if (size > FILE_MAX)
        return status_fail(STATUS_BAD_INPUT, "%s: %zu bytes are more than the %zu it may have", name, size, FILE_MAX);
    TRY(check_bytes(name, text, size));
    cJSON *json = NULL;
    TRY(json_parse(name, text, size, &json));
    tokenizer *t = calloc(1, sizeof *t);
    status st = t && (t->name = strdup(name)) ? STATUS_OK : status_fail(STATUS_NO_MEMORY, "%s: no memory for it", name);
    if (st == STATUS_OK)
        st = read_tree(name, json, t);
    cJSON_Delete(json);
    if (st == STATUS_OK)
        *out = t;
    else
        tokenizer_destroy(t);
    return st;
}

status tokenizer_load(const char *dir, tokenizer **out)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/tokenizer.json", dir) >= (int)sizeof path)
        return status_fail(STATUS_BAD_INPUT, "%.200s..: a path too long", dir);
    FILE *file = fopen(path, "rb");
    if (!file)
        return status_fail(STATUS_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    status st = STATUS_OK;
    char *text = NULL;
    off_t size = fseeko(file, 0, SEEK_END) == 0 ? ftello(file) : -1;
    rewind(file);
    if (size < 0 || (size_t)size > FILE_MAX)
        st = status_fail(STATUS_IO, "%s: cannot be read, or is larger than %zu bytes", path, FILE_MAX);
    else if (!(text = malloc((size_t)size + 1)))
        st = status_fail(STATUS_NO_MEMORY, "%s: no memory for its %lld bytes", path, (long long)size);
    else if (fread(text, 1, (size_t)size, file) != (size_t)size)
        st = status_fail(STATUS_IO, "%s: cannot be read to its end", path);
    fclose(file);
    if (st == STATUS_OK)
        st = tokenizer_parse(path, text, (size_t)size, out);
    free(text);
    return st;
}
