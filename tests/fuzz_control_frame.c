/* fuzz_control_frame.c - any bytes on the control connection, in pieces: frames within the limit come out, each is refused or is
 * a message of either side that packs and unpacks to itself again. The first byte says how long the pieces are. */
#include "proto/control.h"
#include "proto/frame.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_BYTES = 4096 };

static void check_to_leader(const void *payload, size_t size)
{
    Convoke__Control__ToLeader *m = NULL, *again = NULL;
    if (control_get_to_leader(payload, size, &m) != STATUS_OK) {
        if (m || !*status_message())
            abort();
        return;
    }
    bytes_writer frame = {0};
    uint64_t launch = control_launch_of_to_leader(m);
    if (control_put_to_leader(&frame, m) != STATUS_OK)
        abort();
    if (control_get_to_leader(frame.data + FRAME_HEADER_BYTES, frame.size - FRAME_HEADER_BYTES, &again) == STATUS_OK &&
        (again->kind_case != m->kind_case || control_launch_of_to_leader(again) != launch))
        abort();
    convoke__control__to_leader__free_unpacked(m, NULL);
    convoke__control__to_leader__free_unpacked(again, NULL);
    bytes_clear(&frame);
}

static void check_to_coordinator(const void *payload, size_t size)
{
    Convoke__Control__ToCoordinator *m = NULL, *again = NULL;
    if (control_get_to_coordinator(payload, size, &m) != STATUS_OK) {
        if (m || !*status_message())
            abort();
        return;
    }
    bytes_writer frame = {0};
    uint64_t launch = control_launch_of_to_coordinator(m);
    if (control_put_to_coordinator(&frame, m) != STATUS_OK)
        abort();
    if (control_get_to_coordinator(frame.data + FRAME_HEADER_BYTES, frame.size - FRAME_HEADER_BYTES, &again) == STATUS_OK &&
        (again->kind_case != m->kind_case || control_launch_of_to_coordinator(again) != launch))
        abort();
    convoke__control__to_coordinator__free_unpacked(m, NULL);
    convoke__control__to_coordinator__free_unpacked(again, NULL);
    bytes_clear(&frame);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    size_t piece = 1 + data[0];
    frame_reader r;
    frame_reader_init(&r, MAX_BYTES);
    status st = STATUS_OK;
    for (size_t at = 1; at < size && st == STATUS_OK; at += piece) {
        size_t n = size - at < piece ? size - at : piece;
        memcpy(frame_reader_room(&r, n), data + at, n);
        frame_reader_filled(&r, n);
        const void *payload = NULL;
        size_t length = 0;
        while ((st = frame_reader_next(&r, &payload, &length)) == STATUS_OK && payload) {
            if (length > MAX_BYTES)
                abort();
            check_to_leader(payload, length);
            check_to_coordinator(payload, length);
        }
    }
    frame_reader_clear(&r);
    return 0;
}
