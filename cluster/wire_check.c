#include "cluster/wire_check.h"

#include <string.h>

enum { MAX_DEPTH = 64, MAX_MESSAGES = 400000 };

static bool read_varint(wire_reader *r, uint64_t *out)
{
    *out = 0;
    for (int shift = 0; shift < 64 && r->at < r->end; shift += 7) {
        uint8_t byte = *r->at++;
        *out |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return true;
    }
    return false;
}

static bool read_field(wire_reader *r, wire_field *field)
{
    uint64_t tag, size = 0;
    if (!read_varint(r, &tag) || tag >> 32)
        return false;
    *field = (wire_field){.number = (uint32_t)(tag >> 3), .type = (int)(tag & 7)};
    switch (field->type) {
    case 0:
        return read_varint(r, &field->value);
    case 1:
        size = 8;
        break;
    case 2:
        if (!read_varint(r, &size))
            return false;
        break;
    case 5:
        size = 4;
        break;
    default:
        return false;
    }
    if (size > (size_t)(r->end - r->at))
        return false;
    field->bytes = r->at;
    field->size = size;
    r->at += size;
    return true;
}

bool wire_next(wire_reader *r, wire_field *field)
{
    wire_reader next = *r;
    if (r->at == r->end || !read_field(&next, field))
        return false; /* damage stays in front of the reader */
    *r = next;
    return true;
}

size_t utf8_character(const uint8_t *text, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t first = text[0];
    if (first < 0x80)
        return 1;
    size_t n = first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
    if (n == 0 || n > size)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((text[i] & 0xc0) != 0x80)
            return 0;
    /* Longer than needed, a surrogate, or beyond U+10FFFF. */
    if ((first == 0xe0 && text[1] < 0xa0) || (first == 0xed && text[1] >= 0xa0) || (first == 0xf0 && text[1] < 0x90) ||
        (first == 0xf4 && text[1] >= 0x90))
        return 0;
    return n;
}

static status check_string(const char *name, const uint8_t *text, size_t size)
{
    for (size_t at = 0; at < size;) {
        size_t n = utf8_character(text + at, size - at);
        if (n == 0)
            return status_fail(STATUS_BAD_INPUT, "%s: byte %zu is not UTF-8", name, at);
        if (text[at] == 0)
            return status_fail(STATUS_BAD_INPUT, "%s: byte %zu is NUL", name, at);
        at += n;
    }
    return STATUS_OK;
}

static status check_message(const ProtobufCMessageDescriptor *message, const void *bytes, size_t size, int depth, int *n_messages)
{
    wire_reader r = {bytes, (const uint8_t *)bytes + size};
    wire_field f;
    if (depth > MAX_DEPTH)
        return status_fail(STATUS_BAD_INPUT, "the message is nested more than %d deep", MAX_DEPTH);
    if (++*n_messages > MAX_MESSAGES)
        return status_fail(STATUS_BAD_INPUT, "the message has more than %d parts", MAX_MESSAGES);
    while (wire_next(&r, &f)) {
        const ProtobufCFieldDescriptor *field = f.type == 2 ? protobuf_c_message_descriptor_get_field(message, f.number) : NULL;
        if (!field)
            continue;
        if (field->type == PROTOBUF_C_TYPE_STRING)
            TRY(check_string(field->name, f.bytes, f.size));
        else if (field->type == PROTOBUF_C_TYPE_MESSAGE)
            TRY(check_message(field->descriptor, f.bytes, f.size, depth + 1, n_messages));
    }
    return r.at == r.end ? STATUS_OK : status_fail(STATUS_BAD_INPUT, "the request is no %s", message->name);
}

status wire_check(const ProtobufCMessageDescriptor *message, const void *bytes, size_t size)
{
    int n_messages = 0;
    return check_message(message, bytes, size, 0, &n_messages);
}
