/* tokenizer_steps.c - the sections normalizer, pre_tokenizer, post_processor and decoder of tokenizer.json. Sequences, nested or
 * not, become one flat list of steps. What is not known is refused by its name. */
#include "cluster/tokenizer_parts.h"
#include "proto/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* ---- what the sections have in common ---- */

typedef status (*read_one)(const char *where, const char *type, const cJSON *json, tokenizer *t);

static status not_supported(const char *where, const char *type)
{
    return status_fail(STATUS_UNSUPPORTED, "%s: \"%s\" is not supported", where, type);
}

/* Calls `one` for the section, or for each member of a Sequence (`list` names its key). */
static status read_section(const char *where, const cJSON *json, const char *list, read_one one, tokenizer *t)
{
    if (!json || cJSON_IsNull(json))
        return STATUS_OK;
    if (!cJSON_IsObject(json))
        return status_fail(STATUS_BAD_INPUT, "%s: not a JSON object", where);
    const char *type;
    TRY(json_get_string(json, where, "type", &type));
    if (strcmp(type, "Sequence") != 0)
        return one(where, type, json, t);
    const cJSON *members;
    TRY(json_get_array(json, where, list, &members));
    for (const cJSON *m = members->child; m; m = m->next)
        TRY(read_section(where, m, list, one, t));
    return STATUS_OK;
}

static status copy_text(const char *where, const char *text, char **out, size_t *size)
{
    *size = strlen(text);
    *out = malloc(*size + 1);
    if (!*out)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    memcpy(*out, text, *size + 1);
    return STATUS_OK;
}

static status get_text(const cJSON *json, const char *where, const char *key, char **out, size_t *size)
{
    const char *text;
    TRY(json_get_string(json, where, key, &text));
    return copy_text(where, text, out, size);
}

/* A string of exactly one character. */
static status get_character(const cJSON *json, const char *where, const char *key, const char **out)
{
    TRY(json_get_string(json, where, key, out));
    if (!**out || strlen(*out) != utf8_length((unsigned char)**out))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not one character", where, key);
    return STATUS_OK;
}

static status get_bool(const cJSON *json, const char *where, const char *key, bool *out)
{
    if (!json_find(json, key))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, key);
    return json_get_bool_or(json, where, key, false, out);
}

/* "pattern": {"Regex": ".."} or {"String": ".."}. */
static status get_pattern(const cJSON *json, const char *where, tokenizer_pattern **out)
{
    const cJSON *pattern = json_find(json, "pattern");
    const char *text;
    if (pattern && json_find(pattern, "Regex")) {
        TRY(json_get_string(pattern, where, "Regex", &text));
        return pattern_create_regex(where, (text_span){text, strlen(text)}, out);
    }
    if (pattern && json_find(pattern, "String")) {
        TRY(json_get_string(pattern, where, "String", &text));
        return pattern_create_string(where, (text_span){text, strlen(text)}, out);
    }
    return status_fail(STATUS_BAD_INPUT, "%s: pattern has neither Regex nor String", where);
}

static status one_of(const cJSON *json, const char *where, const char *key, const char *const *names, int n, int *out)
{
    const char *text;
    TRY(json_get_string(json, where, key, &text));
    for (int i = 0; i < n; i++)
        if (strcmp(names[i], text) == 0) {
            *out = i;
            return STATUS_OK;
        }
    return status_fail(STATUS_UNSUPPORTED, "%s: %s \"%s\" is not supported", where, key, text);
}

static status too_many(const char *where)
{
    return status_fail(STATUS_UNSUPPORTED, "%s: more than %d steps are not supported", where, TOKENIZER_STEPS_MAX);
}

/* ---- normalizer ---- */

static status read_replace(const char *where, const cJSON *json, normalize_step *step)
{
    TRY(get_pattern(json, where, &step->pattern));
    return get_text(json, where, "content", &step->text, &step->size);
}

static status read_normalize_step(const char *where, const char *type, const cJSON *json, tokenizer *t)
{
    static const char *const names[] = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "Prepend", "Replace"};
    if (t->n_normalize == TOKENIZER_STEPS_MAX)
        return too_many(where);
    normalize_step *step = &t->normalize[t->n_normalize++]; /* counted at once: destroy then sees a half-read one */
    for (int i = 0; i < (int)(sizeof names / sizeof names[0]); i++) {
        if (strcmp(names[i], type) != 0)
            continue;
        step->kind = (normalize_kind)i;
        if (step->kind == NORMALIZE_STRIP) {
            TRY(get_bool(json, where, "strip_left", &step->left));
            return get_bool(json, where, "strip_right", &step->right);
        }
        if (step->kind == NORMALIZE_PREPEND)
            return get_text(json, where, "prepend", &step->text, &step->size);
        return step->kind == NORMALIZE_REPLACE ? read_replace(where, json, step) : STATUS_OK;
    }
    return not_supported(where, type);
}

status steps_read_normalizer(const char *name, const cJSON *json, tokenizer *t)
{
    char where[512];
    snprintf(where, sizeof where, "%s: normalizer", name);
    return read_section(where, json, "normalizers", read_normalize_step, t);
}

/* ---- pre-tokenizer ---- */

static status add_cut(const char *where, tokenizer *t, cut_step **out)
{
    if (t->n_cut == TOKENIZER_STEPS_MAX)
        return too_many(where);
    *out = &t->cut[t->n_cut++];
    return STATUS_OK;
}

static status get_behavior(const cJSON *json, const char *where, split_behavior *out)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    int place = 0;
    TRY(one_of(json, where, "behavior", names, 5, &place));
    *out = (split_behavior)place;
    return STATUS_OK;
}

static status read_byte_level(const char *where, const cJSON *json, tokenizer *t)
{
    bool prefix, regex;
    cut_step *step = NULL;
    TRY(get_bool(json, where, "add_prefix_space", &prefix));
    TRY(json_get_bool_or(json, where, "use_regex", true, &regex));
    if (prefix) {
        TRY(add_cut(where, t, &step));
        step->kind = CUT_PREFIX;
    }
    if (regex) {
        TRY(add_cut(where, t, &step));
        step->kind = CUT_PATTERN;
        step->behavior = SPLIT_ISOLATED;
        TRY(pattern_create_regex(where, (text_span){gpt2_regex, sizeof gpt2_regex - 1}, &step->pattern));
    }
    TRY(add_cut(where, t, &step));
    step->kind = CUT_BYTE_LEVEL;
    return STATUS_OK;
}

static status get_prepend(const cJSON *json, const char *where, prepend_scheme *out)
{
    static const char *const names[] = {"always", "first", "never"};
    int scheme = PREPEND_ALWAYS;
    if (json_find(json, "prepend_scheme"))
        TRY(one_of(json, where, "prepend_scheme", names, 3, &scheme));
    bool prefix;
    TRY(json_get_bool_or(json, where, "add_prefix_space", true, &prefix));
    if (!prefix && scheme != PREPEND_NEVER)
        return status_fail(STATUS_BAD_INPUT, "%s: add_prefix_space is false, which contradicts prepend_scheme", where);
    *out = (prepend_scheme)scheme;
    return STATUS_OK;
}

static status read_metaspace(const char *where, const cJSON *json, cut_step *step)
{
    const char *text;
    TRY(get_character(json, where, "replacement", &text));
    step->replacement_size = strlen(text);
    memcpy(step->replacement, text, step->replacement_size);
    TRY(get_prepend(json, where, &step->prepend));
    return json_get_bool_or(json, where, "split", true, &step->split);
}

static status read_split(const char *where, const cJSON *json, cut_step *step)
{
    TRY(get_pattern(json, where, &step->pattern));
    TRY(get_behavior(json, where, &step->behavior));
    return get_bool(json, where, "invert", &step->invert);
}

static status read_cut_step(const char *where, const char *type, const cJSON *json, tokenizer *t)
{
    static const char *const names[] = {"Split", "Digits", "Punctuation", "WhitespaceSplit", "Whitespace", "Metaspace"};
    if (strcmp(type, "ByteLevel") == 0)
        return read_byte_level(where, json, t);
    int kind = 0;
    while (kind < (int)(sizeof names / sizeof names[0]) && strcmp(names[kind], type) != 0)
        kind++;
    if (kind == (int)(sizeof names / sizeof names[0]))
        return not_supported(where, type);
    cut_step *step = NULL;
    TRY(add_cut(where, t, &step));
    step->kind = (cut_kind)kind;
    step->behavior = SPLIT_ISOLATED;
    if (step->kind == CUT_PATTERN)
        return read_split(where, json, step);
    if (step->kind == CUT_METASPACE)
        return read_metaspace(where, json, step);
    if (step->kind == CUT_PUNCTUATION && json_find(json, "behavior"))
        return get_behavior(json, where, &step->behavior);
    if (step->kind == CUT_WHITE_SPACE)
        step->behavior = SPLIT_REMOVED;
    if (step->kind == CUT_NUMBERS) {
        bool individual;
        TRY(get_bool(json, where, "individual_digits", &individual));
        step->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    }
    return STATUS_OK;
}

status steps_read_pre_tokenizer(const char *name, const cJSON *json, tokenizer *t)
{
    char where[512];
    snprintf(where, sizeof where, "%s: pre_tokenizer", name);
    return read_section(where, json, "pretokenizers", read_cut_step, t);
}

/* ---- post-processor ---- */

enum { TEMPLATE_MAX = 1024 };

typedef struct {
    int32_t items[TEMPLATE_MAX];
    size_t n;
} template_list;

static status template_put(const char *where, template_list *list, int32_t item)
{
    if (list->n == TEMPLATE_MAX)
        return status_fail(STATUS_UNSUPPORTED, "%s: a template of more than %d pieces is not supported", where, TEMPLATE_MAX);
    list->items[list->n++] = item;
    return STATUS_OK;
}

/* {"SpecialToken": {"id": "<s>", ..}}: its ids stand under special_tokens. */
static status template_special(const char *where, const cJSON *piece, const cJSON *specials, template_list *list)
{
    const char *id;
    TRY(json_get_string(piece, where, "id", &id));
    const cJSON *special = json_find(specials, id), *ids;
    if (!special)
        return status_fail(STATUS_BAD_INPUT, "%s: special_tokens lacks \"%s\"", where, id);
    TRY(json_get_array(special, where, "ids", &ids));
    int index = 0;
    for (const cJSON *item = ids->child; item; item = item->next, index++) {
        int64_t value;
        TRY(json_item_int(item, where, index, 0, TOKENIZER_ID_MAX, &value));
        TRY(template_put(where, list, (int32_t)value));
    }
    return STATUS_OK;
}

static status template_piece(const char *where, const cJSON *piece, const cJSON *specials, const post_template *inner,
                             template_list *list)
{
    const cJSON *part = json_find(piece, "SpecialToken");
    if (part)
        return template_special(where, part, specials, list);
    part = json_find(piece, "Sequence");
    if (!part)
        return status_fail(STATUS_BAD_INPUT, "%s: a piece is neither Sequence nor SpecialToken", where);
    const char *id;
    TRY(json_get_string(part, where, "id", &id));
    if (strcmp(id, "A") != 0)
        return status_fail(STATUS_UNSUPPORTED, "%s: sequence \"%s\" in the template single is not supported", where, id);
    for (size_t i = 0; i < inner->n; i++) /* what earlier templates made of the text */
        TRY(template_put(where, list, inner->ids[i]));
    return STATUS_OK;
}

static status read_post_step(const char *where, const char *type, const cJSON *json, tokenizer *t)
{
    if (strcmp(type, "ByteLevel") == 0) /* moves offsets, no ids */
        return STATUS_OK;
    if (strcmp(type, "TemplateProcessing") != 0)
        return not_supported(where, type);
    const cJSON *single, *specials = json_find(json, "special_tokens");
    TRY(json_get_array(json, where, "single", &single));
    template_list list = {.n = 0};
    for (const cJSON *piece = single->child; piece; piece = piece->next)
        TRY(template_piece(where, piece, specials, &t->post, &list));
    int32_t *ids = malloc((list.n + 1) * sizeof *ids);
    if (!ids)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    memcpy(ids, list.items, list.n * sizeof *ids);
    free(t->post.ids);
    t->post = (post_template){ids, list.n};
    return STATUS_OK;
}

status steps_read_post_processor(const char *name, const cJSON *json, tokenizer *t)
{
    char where[512];
    snprintf(where, sizeof where, "%s: post_processor", name);
    t->post.ids = malloc(sizeof *t->post.ids);
    if (!t->post.ids)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for it", where);
    t->post.ids[0] = -1;
    t->post.n = 1;
    return read_section(where, json, "processors", read_post_step, t);
}

/* ---- decoder ---- */

static status read_strip(const char *where, const cJSON *json, decode_step *step)
{
    const char *text;
    int64_t start, stop;
    TRY(get_character(json, where, "content", &text));
    TRY(copy_text(where, text, &step->text, &step->size));
    TRY(json_get_int(json, where, "start", 0, 1024, &start));
    TRY(json_get_int(json, where, "stop", 0, 1024, &stop));
    step->start = (size_t)start;
    step->stop = (size_t)stop;
    return STATUS_OK;
}

/* Behind Fuse there is one text, and it comes in parts: some steps would have to wait for its end. */
static status check_fused(const char *where, const char *type, const tokenizer *t, const decode_step *step)
{
    bool whole_only = step->kind == DECODE_BYTES || step->kind == DECODE_BYTE_FALLBACK ||
                      (step->kind == DECODE_REPLACE && !pattern_string(step->pattern).text);
    if (step->fused && whole_only)
        return status_fail(STATUS_UNSUPPORTED, "%s: \"%s\" behind a step that makes one text of all tokens is not supported",
                           where, type);
    for (int i = 0; i + 1 < t->n_decode; i++)
        if (step->kind == DECODE_BYTES && (t->decode[i].kind == DECODE_METASPACE || t->decode[i].kind == DECODE_BYTE_FALLBACK))
            return status_fail(STATUS_UNSUPPORTED, "%s: \"%s\" behind Metaspace or ByteFallback is not supported", where, type);
    return STATUS_OK;
}

static status read_decode_step(const char *where, const char *type, const cJSON *json, tokenizer *t)
{
    static const char *const names[] = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"};
    int kind = 0;
    while (kind < (int)(sizeof names / sizeof names[0]) && strcmp(names[kind], type) != 0)
        kind++;
    if (kind == (int)(sizeof names / sizeof names[0]))
        return not_supported(where, type);
    if (t->n_decode == TOKENIZER_STEPS_MAX)
        return too_many(where);
    decode_step *step = &t->decode[t->n_decode++];
    step->kind = (decode_kind)kind;
    if (t->n_decode > 1)
        step->fused = step[-1].fused || step[-1].kind == DECODE_BYTES || step[-1].kind == DECODE_FUSE;
    if (step->kind == DECODE_STRIP)
        TRY(read_strip(where, json, step));
    if (step->kind == DECODE_REPLACE) {
        TRY(get_pattern(json, where, &step->pattern));
        TRY(get_text(json, where, "content", &step->text, &step->size));
    }
    if (step->kind == DECODE_METASPACE) {
        const char *text;
        TRY(get_character(json, where, "replacement", &text));
        TRY(copy_text(where, text, &step->text, &step->size));
        TRY(get_prepend(json, where, &step->prepend));
    }
    return check_fused(where, type, t, step);
}

status steps_read_decoder(const char *name, const cJSON *json, tokenizer *t)
{
    char where[512];
    snprintf(where, sizeof where, "%s: decoder", name);
    if (!json || cJSON_IsNull(json)) {
        t->decode[t->n_decode++].kind = DECODE_SPACES;
        return STATUS_OK;
    }
    return read_section(where, json, "decoders", read_decode_step, t);
}
