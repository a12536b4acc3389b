/* wire_check.h - what protobuf-c does not check of a message that comes from outside, checked before it is unpacked.
 *
 * Strings must be UTF-8 without NUL (in C they end there), nesting has a limit (unpacking recurses) and so has the number of
 * embedded messages (an empty one of two bytes becomes a hundred in memory). Damage that unpacking itself finds is left to it. */
#ifndef CONVOKE_CLUSTER_WIRE_CHECK_H
#define CONVOKE_CLUSTER_WIRE_CHECK_H

#include "proto/status.h"

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stdint.h>

/* STATUS_BAD_INPUT with a sentence that names the field. */
status wire_check(const ProtobufCMessageDescriptor *message, const void *bytes, size_t size);

/* One field after another of an encoded message. */
typedef struct {
    const uint8_t *at, *end;
} wire_reader;

typedef struct {
    uint32_t number;
    int type;       /* 0 varint, 1 fixed64, 2 bytes, 5 fixed32 */
    uint64_t value; /* type 0 */
    const uint8_t *bytes;
    size_t size; /* type 2 */
} wire_field;

/* False at the end and at damage; then at == end only if all was read. */
bool wire_next(wire_reader *r, wire_field *field);

/* Bytes of the UTF-8 character at text [size]; 0: none starts there. */
size_t utf8_character(const uint8_t *text, size_t size);

#endif
