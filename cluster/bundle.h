/* bundle.h - the files that make up a checkpoint's tokenizer, as one zip archive in memory (stored, not compressed). */
#ifndef CONVOKE_CLUSTER_BUNDLE_H
#define CONVOKE_CLUSTER_BUNDLE_H

#include "proto/bytes.h"

/* Appends the archive of the folder's tokenizer files to `out`. STATUS_BAD_INPUT when it has none. */
status bundle_tokenizer(const char *dir, bytes_writer *out);

/* SHA-256 (FIPS 180-4) as 64 hexadecimal digits. */
void sha256_hex(const void *data, size_t size, char out[65]);

#endif
