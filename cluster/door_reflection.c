/* door_reflection.c - grpc.reflection.v1 and v1alpha (the same messages): the descriptors of the .proto files as they were
 * written, built into the program. Read once: which files there are, what each imports, which names it defines. */
#include "cluster/door_internal.h"
#include "cluster/wire_check.h"
#include "proto/reflection.pb-c.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Made from the .proto files: a FileDescriptorSet. */
extern const unsigned char served_descriptors[];
extern const size_t served_descriptors_size;

enum { MAX_FILES = 32 };

typedef struct {
    ProtobufCBinaryData bytes;
    char name[64], package[64];
} described_file;

struct reflection {
    described_file files[MAX_FILES];
    int n_files;
};

/* Numbers of google/protobuf/descriptor.proto. */
enum {
    SET_FILE = 1,
    FILE_NAME = 1,
    FILE_PACKAGE = 2,
    FILE_DEPENDENCY = 3,
    FILE_MESSAGE = 4,
    FILE_ENUM = 5,
    FILE_SERVICE = 6,
    MESSAGE_NAME = 1,
    MESSAGE_FIELD = 2,
    MESSAGE_NESTED = 3,
    MESSAGE_ENUM = 4,
    ENUM_VALUE = 2,
    SERVICE_METHOD = 2
};

static void copy_text(char *out, size_t room, const wire_field *f)
{
    snprintf(out, room, "%.*s", (int)f->size, (const char *)f->bytes);
}

status reflection_create(reflection **out)
{
    wire_reader set = {served_descriptors, served_descriptors + served_descriptors_size};
    wire_field file, f;
    reflection *r = calloc(1, sizeof *r);
    if (!r)
        return status_fail(STATUS_NO_MEMORY, "out of memory");
    while (wire_next(&set, &file) && r->n_files < MAX_FILES) {
        described_file *d = &r->files[r->n_files++];
        wire_reader fields = {file.bytes, file.bytes + file.size};
        d->bytes = (ProtobufCBinaryData){file.size, (uint8_t *)file.bytes};
        while (wire_next(&fields, &f)) {
            if (f.number == FILE_NAME)
                copy_text(d->name, sizeof d->name, &f);
            else if (f.number == FILE_PACKAGE)
                copy_text(d->package, sizeof d->package, &f);
        }
    }
    *out = r;
    return STATUS_OK;
}

void reflection_destroy(reflection *r)
{
    free(r);
}

/* If `symbol` begins with `name` as a whole part, what follows it ("" for all of it); else NULL. */
static const char *after(const char *symbol, const uint8_t *name, size_t size)
{
    if (strncmp(symbol, (const char *)name, size) != 0 || strlen(symbol) < size)
        return NULL;
    symbol += size;
    return *symbol == '.' ? symbol + 1 : *symbol == 0 ? symbol : NULL;
}

/* Whether the descriptor (message, enum, service, field, method, value: each has its name as field 1) defines `symbol`. `inner`:
 * the numbers of what it defines in turn. */
static bool defines(const wire_field *descriptor, const char *symbol, bool is_message)
{
    wire_reader r = {descriptor->bytes, descriptor->bytes + descriptor->size};
    wire_field f;
    const char *rest = NULL;
    while (wire_next(&r, &f)) { /* the name comes first */
        if (f.number == MESSAGE_NAME && f.type == 2 && !rest) {
            rest = after(symbol, f.bytes, f.size);
            if (!rest || !*rest)
                return rest != NULL;
        } else if (f.type == 2 && rest && (f.number == MESSAGE_FIELD || (is_message && f.number <= MESSAGE_ENUM))) {
            if (defines(&f, rest, is_message && f.number == MESSAGE_NESTED))
                return true;
        }
    }
    return false;
}

static bool file_defines(const described_file *d, const char *symbol)
{
    wire_reader r = {d->bytes.data, d->bytes.data + d->bytes.len};
    wire_field f;
    const char *rest = after(symbol, (const uint8_t *)d->package, strlen(d->package));
    while (rest && *rest && wire_next(&r, &f))
        if (f.number >= FILE_MESSAGE && f.number <= FILE_SERVICE && defines(&f, rest, f.number == FILE_MESSAGE))
            return true;
    return false;
}

static int file_named(const reflection *r, const char *name, size_t size)
{
    for (int i = 0; i < r->n_files; i++)
        if (strlen(r->files[i].name) == size && strncmp(r->files[i].name, name, size) == 0)
            return i;
    return -1;
}

/* A file and, behind it, all it imports. */
static void add_file(const reflection *r, int i, bool *added, ProtobufCBinaryData *list, size_t *n)
{
    if (i < 0 || added[i])
        return;
    added[i] = true;
    list[(*n)++] = r->files[i].bytes;
    wire_reader fields = {r->files[i].bytes.data, r->files[i].bytes.data + r->files[i].bytes.len};
    wire_field f;
    while (wire_next(&fields, &f))
        if (f.number == FILE_DEPENDENCY)
            add_file(r, file_named(r, (const char *)f.bytes, f.size), added, list, n);
}

static int file_wanted(const reflection *r, const Grpc__Reflection__V1__ServerReflectionRequest *q)
{
    if (q->message_request_case == GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME)
        return file_named(r, q->file_by_filename, strlen(q->file_by_filename));
    for (int i = 0; i < r->n_files; i++)
        if (file_defines(&r->files[i], q->file_containing_symbol))
            return i;
    return -1;
}

void reflection_answer(rpc_call *call, const ProtobufCMessage *message)
{
    enum { MAX_SERVICES = 32 };
    const reflection *r = door_of(call)->reflection;
    const Grpc__Reflection__V1__ServerReflectionRequest *q = (const Grpc__Reflection__V1__ServerReflectionRequest *)message;
    Grpc__Reflection__V1__ServerReflectionResponse m = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    Grpc__Reflection__V1__FileDescriptorResponse files = GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    Grpc__Reflection__V1__ListServiceResponse services = GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    Grpc__Reflection__V1__ServiceResponse items[MAX_SERVICES], *list[MAX_SERVICES];
    ProtobufCBinaryData found[MAX_FILES];
    bool added[MAX_FILES] = {false};
    m.valid_host = q->host;
    m.original_request = (Grpc__Reflection__V1__ServerReflectionRequest *)q; /* packing only reads */
    m.message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    error.error_code = RPC_NOT_FOUND;
    error.error_message = "not found";
    switch (q->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        for (; services.n_service < MAX_SERVICES && door_service((int)services.n_service); services.n_service++) {
            grpc__reflection__v1__service_response__init(&items[services.n_service]);
            items[services.n_service].name = (char *)door_service((int)services.n_service);
            list[services.n_service] = &items[services.n_service];
        }
        services.service = list;
        m.message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
        m.list_services_response = &services;
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        add_file(r, file_wanted(r, q), added, found, &files.n_file_descriptor_proto);
        files.file_descriptor_proto = found;
        if (files.n_file_descriptor_proto) {
            m.message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
            m.file_descriptor_response = &files;
        }
        break;
    default:
        error.error_code = RPC_UNIMPLEMENTED;
        error.error_message = "these messages have no extensions";
    }
    if (m.message_response_case == GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE)
        m.error_response = &error;
    rpc_call_send(call, &m.base);
}
