/* tokenizer.h - text to token ids and back, as a checkpoint's tokenizer.json (Hugging Face tokenizers) says.
 *
 *   text ─ added tokens cut out ─ normalizer ─ pre-tokenizer ─► words ─ BPE merges (word cache) ─► ids ─ post-processor (BOS/EOS)
 *   ids ─ decoder (byte-level, or byte fallback + Metaspace) ─► text; piece by piece: never half a character
 *
 * Models: byte-level BPE (GPT-2, Qwen, Llama 3, DeepSeek, OLMoE) and SentencePiece-style BPE with byte fallback (Mixtral).
 * Whatever the file asks for that is not here is refused by name when it is loaded. A tokenizer is read-only after creation and
 * may be used by any number of threads at once, each with its own tokenizer_scratch. */
#ifndef CONVOKE_CLUSTER_TOKENIZER_H
#define CONVOKE_CLUSTER_TOKENIZER_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tokenizer tokenizer;

/* dir: a checkpoint folder with tokenizer.json. */
status tokenizer_load(const char *dir, tokenizer **out);
/* The same from memory; `name` is what sentences call it. */
status tokenizer_parse(const char *name, const void *json, size_t size, tokenizer **out);
void tokenizer_destroy(tokenizer *t); /* NULL is fine */

int tokenizer_n_ids(const tokenizer *t); /* largest id + 1 */
/* The id of a token given as it stands in the file ("<|endoftext|>"); -1: there is none. */
int32_t tokenizer_find(const tokenizer *t, const char *token);
bool tokenizer_is_special(const tokenizer *t, int32_t id);
/* The bytes one id stands for inside a text, as far as they do not depend on its neighbours; NULL for an unknown id. */
const char *tokenizer_bytes(const tokenizer *t, int32_t id, size_t *size);

/* Working memory of one thread: match data, heap, word cache. */
typedef struct tokenizer_scratch tokenizer_scratch;
status tokenizer_scratch_create(const tokenizer *t, tokenizer_scratch **out);
void tokenizer_scratch_destroy(tokenizer_scratch *s); /* NULL is fine */

/* text: UTF-8, may hold NUL bytes; invalid UTF-8 is STATUS_BAD_INPUT naming the byte. add_special: apply the post-processor
 * (BOS/EOS). *ids belongs to the scratch and holds until its next use. */
status tokenizer_encode(const tokenizer *t, tokenizer_scratch *s, const char *text, size_t size, bool add_special,
                        const int32_t **ids, size_t *n_ids);

/* Decoding one sequence piece by piece. Bytes that may still become a character with the next token are held back. All emitted
 * pieces joined, with the final flush, are what decoding all ids at once gives; a byte that can never become part of a
 * character is U+FFFD, as in the `tokenizers` package. */
typedef struct tokenizer_stream tokenizer_stream;
status tokenizer_stream_create(const tokenizer *t, bool skip_special, tokenizer_stream **out);
void tokenizer_stream_destroy(tokenizer_stream *s); /* NULL is fine */
void tokenizer_stream_reset(tokenizer_stream *s);
/* *text [*size] is what became certain with this id; inside the stream until its next use. Unknown ids decode to nothing. */
status tokenizer_stream_push(tokenizer_stream *s, int32_t id, const char **text, size_t *size);
/* The rest at the end of the sequence. */
status tokenizer_stream_flush(tokenizer_stream *s, const char **text, size_t *size);

#endif
