/* tokenizer_parts.h - what the files of the tokenizer share; nobody else includes it.
 *
 *   tokenizer_load.c       tokenizer.json ─► struct tokenizer            tokenizer_bpe.c        vocabulary, merges, word ─► ids
 *   tokenizer_steps.c      its normalizer, pre-tokenizer, .. sections    tokenizer_added.c      finding added tokens in a text
 *   tokenizer_regex.c      Oniguruma's syntax ─► PCRE2's                 tokenizer_normalize.c  normalizer; utf8proc lives here
 *   tokenizer_split.c      patterns; PCRE2 lives here                    tokenizer_pretokenize.c  text ─► words
 *   tokenizer_text.c       UTF-8 and small containers                    tokenizer_decode.c     ids ─► text
 *
 * A text travels as one buffer and a list of pieces of it. Steps that only cut make a new list over the same buffer; steps that
 * change bytes write a new buffer too. */
#ifndef CONVOKE_CLUSTER_TOKENIZER_PARTS_H
#define CONVOKE_CLUSTER_TOKENIZER_PARTS_H

#include "cluster/tokenizer.h"
#include "proto/bytes.h"

#include "proto/json.h"

enum {
    TOKENIZER_ID_MAX = (1 << 22) - 1, /* bounds the tables that a file can ask for */
    TOKENIZER_STEPS_MAX = 64,         /* of each kind, nested sequences counted flat */
};
#define TOKENIZER_TEXT_MAX ((size_t)1 << 30)

/* ---- text (tokenizer_text.c) ---- */

typedef struct {
    const char *text;
    size_t size;
} text_span;

/* Where the first byte stands that is no UTF-8 (surrogates, overlong forms and code points above U+10FFFF are none); size when
 * all is well. */
size_t utf8_check(const char *text, size_t size);
/* The character at `text`, which must be valid; its length is returned. */
size_t utf8_get(const char *text, uint32_t *code_point);
size_t utf8_length(unsigned char first_byte);
/* 1 to 4 bytes into `to`. */
size_t utf8_set(char to[4], uint32_t code_point);
void utf8_put(bytes_writer *out, uint32_t code_point);

/* The character that stands for a byte in byte-level vocabularies (GPT-2's table), and back (-1: none). */
uint32_t byte_level_char(unsigned char byte);
int byte_level_byte(uint32_t code_point);
/* The bytes that a byte-level token stands for; a token with a character outside the table stands for itself. */
void byte_level_decode(text_span token, bytes_writer *out);

/* A piece of the text: a word to be, or an added token that was found (id >= 0). */
typedef struct {
    uint32_t start, end;
    uint32_t origin; /* how many of its leading bytes came from the very first character of the whole text */
    int32_t id;
} text_piece;

typedef struct {
    text_piece *items;
    size_t n, capacity;
    bool failed; /* as in bytes_writer */
} text_pieces;

void text_pieces_add(text_pieces *pieces, text_piece piece); /* empty words are dropped */
void text_pieces_clear(text_pieces *pieces);

/* Strings to ids, open addressing. Zeroed: empty. */
typedef struct {
    uint32_t hash, size;
    size_t at;
    int32_t id; /* -1: free */
} string_entry;

typedef struct {
    bytes_writer bytes;
    string_entry *entries;
    size_t n, capacity; /* capacity: a power of two, or 0 */
} string_index;

status string_index_reserve(string_index *index, size_t n);
/* Replaces the id where the string is there already. *added: whether it was new (NULL: no matter). */
status string_index_set(string_index *index, text_span string, int32_t id, bool *added);
int32_t string_index_find(const string_index *index, text_span string); /* -1: not there */
void string_index_clear(string_index *index);

/* ---- characters (tokenizer_normalize.c) ---- */

bool unicode_is_white_space(uint32_t c);
bool unicode_is_number(uint32_t c);
bool unicode_is_punctuation(uint32_t c);
bool unicode_is_word(uint32_t c);

/* ---- patterns (tokenizer_split.c) ---- */

typedef struct tokenizer_pattern tokenizer_pattern; /* read-only after creation */
typedef struct tokenizer_matcher tokenizer_matcher; /* what one thread needs to use patterns */

/* Rewrites a regular expression from Oniguruma's (Ruby's) syntax to PCRE2's, so that it matches what it matches in the
 * tokenizers package. (tokenizer_regex.c) */
status regex_translate(const char *where, text_span from, bytes_writer *out);

status pattern_create_regex(const char *where, text_span regex, tokenizer_pattern **out);
status pattern_create_string(const char *where, text_span string, tokenizer_pattern **out); /* not empty */
void pattern_destroy(tokenizer_pattern *p);
/* The string it looks for; {NULL, 0} for a regular expression. */
text_span pattern_string(const tokenizer_pattern *p);

status matcher_create(tokenizer_matcher **out);
void matcher_destroy(tokenizer_matcher *m);

/* One pass over a text: zeroed but for the first line. */
typedef struct {
    const char *text;
    size_t size;
    size_t at;       /* the next search begins here */
    size_t last_end; /* of the last match, plus one; 0: none yet */
} pattern_pass;

/* The next match; *found false: no more. */
status pattern_next(const tokenizer_pattern *p, tokenizer_matcher *m, pattern_pass *pass, bool *found, size_t *start,
                    size_t *end);

/* ---- normalizer (tokenizer_normalize.c) ---- */

typedef enum {
    NORMALIZE_NFC,
    NORMALIZE_NFD,
    NORMALIZE_NFKC,
    NORMALIZE_NFKD,
    NORMALIZE_LOWERCASE,
    NORMALIZE_STRIP,
    NORMALIZE_PREPEND,
    NORMALIZE_REPLACE,
} normalize_kind;

typedef struct {
    normalize_kind kind;
    bool left, right;           /* STRIP */
    tokenizer_pattern *pattern; /* REPLACE */
    char *text;                 /* REPLACE: by what; PREPEND: what */
    size_t size;
} normalize_step;

typedef struct {
    bytes_writer text[2];
    int32_t *points; /* code points of a stretch that is being normalised, and room to sort */
    unsigned char *classes;
    size_t capacity;
} normalize_room;

/* *out is `text` itself where nothing changes, else inside `room`. *origin as in text_piece, for the text and then for *out. */
status normalize_text(const normalize_step *steps, int n_steps, tokenizer_matcher *m, normalize_room *room, text_span text,
                      size_t *origin, text_span *out);
void normalize_room_clear(normalize_room *room);

/* ---- pre-tokenizer (tokenizer_pretokenize.c) ---- */

typedef enum {
    SPLIT_REMOVED,
    SPLIT_ISOLATED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS,
} split_behavior;

typedef enum {
    CUT_PATTERN,
    CUT_NUMBERS,
    CUT_PUNCTUATION,
    CUT_WHITE_SPACE,
    CUT_WORDS,      /* Whitespace: runs of word characters and runs of others */
    CUT_METASPACE,  /* changes bytes */
    CUT_PREFIX,     /* ByteLevel's add_prefix_space; changes bytes */
    CUT_BYTE_LEVEL, /* bytes to their characters, where the model does not see to it; changes bytes */
} cut_kind;

typedef enum { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER } prepend_scheme;

typedef struct {
    cut_kind kind;
    split_behavior behavior;
    bool invert;                /* PATTERN */
    tokenizer_pattern *pattern; /* PATTERN */
    prepend_scheme prepend;     /* METASPACE */
    bool split;                 /* METASPACE */
    char replacement[4];        /* METASPACE: one character */
    size_t replacement_size;
} cut_step;

/* The text and its pieces, twice each: a step reads one and writes the other. */
typedef struct {
    text_span text;
    bytes_writer buffers[2];
    int writing; /* the buffer that does not hold `text` */
    text_pieces pieces, next;
} text_work;

status cut_text(const cut_step *step, tokenizer_matcher *m, text_work *work);

/* ---- added tokens (tokenizer_added.c) ---- */

typedef struct {
    char *content;
    size_t size;
    char *pattern; /* what is looked for: the content, normalised where `normalized` says so */
    size_t pattern_size;
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
} added_token;

typedef struct {
    uint32_t child, sibling; /* 0: none */
    int32_t token;           /* index of the added token that ends here; -1: none */
    unsigned char byte;
} trie_node;

typedef struct {
    trie_node *nodes;
    size_t n, capacity;
    uint32_t root[256]; /* first byte to node; 0: none */
    int n_first;        /* different first bytes */
    unsigned char first;
} added_trie;

status added_trie_insert(added_trie *trie, const char *where, text_span pattern, int32_t token);
void added_trie_clear(added_trie *trie);
/* Cuts one piece of `text` at the added tokens of the trie, onto the end of `out`. */
void added_cut(const added_trie *trie, const added_token *tokens, const char *text, text_piece piece, text_pieces *out);

/* ---- model (tokenizer_bpe.c) ---- */

typedef struct {
    uint64_t pair; /* left id in the upper half */
    uint32_t rank; /* UINT32_MAX: free */
    int32_t id;
} merge_entry;

typedef struct {
    string_index vocab;
    merge_entry *merges;
    size_t merge_mask;
    int32_t byte_ids[256];     /* of the characters that stand for bytes; -1: not in the vocabulary */
    int32_t fallback_ids[256]; /* "<0x41>" */
    string_index raw;          /* ignore_merges over raw bytes: the vocabulary decoded */
    bool raw_bytes;            /* words come as raw bytes: ByteLevel was the last pre-tokenizer and all bytes have an id */
    bool byte_fallback, fuse_unk, ignore_merges;
    int32_t unk_id;       /* -1: none */
    char *unk_name;       /* NULL: none */
    bool unk_missing;     /* it is named but not in the vocabulary: an error once it is needed */
    char boundary[4];     /* no merge reaches over the place before this character, */
    size_t boundary_size; /* 0: there is none such */
} bpe_model;

status bpe_reserve_merges(bpe_model *model, size_t n);
void bpe_add_merge(bpe_model *model, int32_t left, int32_t right, uint32_t rank, int32_t id);
void bpe_clear(bpe_model *model);

typedef struct bpe_scratch bpe_scratch;
status bpe_scratch_create(bpe_scratch **out);
void bpe_scratch_destroy(bpe_scratch *s);

typedef struct {
    int32_t *items;
    size_t n, capacity;
} id_list;

status id_list_reserve(id_list *list, size_t more);
status bpe_encode(const bpe_model *model, bpe_scratch *s, text_span word, id_list *ids);

/* ---- decoder (tokenizer_decode.c) ---- */

typedef enum {
    DECODE_BYTES,         /* byte-level characters to bytes, all tokens into one text */
    DECODE_BYTE_FALLBACK, /* "<0x41>" to bytes */
    DECODE_FUSE,          /* all tokens into one */
    DECODE_STRIP,
    DECODE_REPLACE,
    DECODE_METASPACE,
    DECODE_SPACES, /* no decoder: tokens with blanks between them */
} decode_kind;

typedef struct {
    decode_kind kind;
    bool fused; /* what comes in is one text in parts, not tokens */
    tokenizer_pattern *pattern;
    char *text; /* REPLACE: by what; STRIP, METASPACE: the character */
    size_t size;
    size_t start, stop; /* STRIP */
    prepend_scheme prepend;
} decode_step;

/* What decoding makes of one token inside a text. */
status decode_alone(const decode_step *steps, int n_steps, tokenizer_matcher *m, text_span token, bytes_writer *out);

/* ---- all of it ---- */

typedef struct {
    size_t text, shown; /* where these begin in their buffers */
    uint32_t text_size, shown_size;
    bool known, special;
    bool skipped; /* by skip_special: as the package does it, by the token's text */
} token_entry;

typedef struct {
    int32_t *ids; /* -1: here comes the text */
    size_t n;
} post_template;

struct tokenizer {
    char *name;
    bpe_model model;
    normalize_step normalize[TOKENIZER_STEPS_MAX];
    cut_step cut[TOKENIZER_STEPS_MAX];
    decode_step decode[TOKENIZER_STEPS_MAX];
    int n_normalize, n_cut, n_decode;
    added_token *added;
    size_t n_added;
    string_index added_index;
    added_trie trie, normalized_trie;
    post_template post;
    token_entry *tokens; /* [n_ids] */
    bytes_writer texts;  /* of added tokens and the vocabulary, as the decoder takes them */
    bytes_writer shown;  /* what each is inside a text */
    int n_ids;
};

struct tokenizer_scratch {
    tokenizer_matcher *matcher;
    normalize_room room;
    text_work work;
    bpe_scratch *bpe;
    id_list ids;
};

/* The sections of the file (tokenizer_steps.c); `json` may be NULL or null. */
status steps_read_normalizer(const char *name, const cJSON *json, tokenizer *t);
status steps_read_pre_tokenizer(const char *name, const cJSON *json, tokenizer *t);
status steps_read_post_processor(const char *name, const cJSON *json, tokenizer *t);
status steps_read_decoder(const char *name, const cJSON *json, tokenizer *t);

#endif
