/* test_frame.c - frames and control messages: what was put in comes out, in whatever pieces it travels, and nothing else does. */
#include "tests/support.h"

#include "proto/control.h"
#include "proto/frame.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- frames ---- */

enum { N_FRAMES = 200, LONGEST = 5000 };

/* Frame i holds i's own bytes, of a length that varies; frame 3 is empty. */
static size_t frame_size(int i)
{
    uint64_t state = (uint64_t)i;
    return i == 3 ? 0 : (size_t)support_below(&state, LONGEST);
}

static void put_frame(bytes_writer *to, int i)
{
    size_t size = frame_size(i);
    unsigned char *at = bytes_extend(to, FRAME_HEADER_BYTES + size);
    frame_put_header(at, (uint32_t)size);
    for (size_t j = 0; j < size; j++)
        at[FRAME_HEADER_BYTES + j] = (unsigned char)((size_t)i + j);
}

static void assert_frame(const unsigned char *payload, size_t size, int i)
{
    assert_int_equal(size, frame_size(i));
    for (size_t j = 0; j < size; j++)
        assert_int_equal(payload[j], (unsigned char)((size_t)i + j));
}

static void pieces_do_not_matter(void **state)
{
    (void)state;
    bytes_writer stream = {0};
    for (int i = 0; i < N_FRAMES; i++)
        put_frame(&stream, i);
    static const int longest_piece[] = {1, 3, 4, 5, 100, 3 * LONGEST, 1 << 30};
    for (size_t p = 0; p < sizeof longest_piece / sizeof *longest_piece; p++) {
        frame_reader r;
        uint64_t seed = p;
        int seen = 0;
        frame_reader_init(&r, LONGEST);
        for (size_t at = 0; at < stream.size;) {
            size_t n = 1 + (size_t)support_below(&seed, longest_piece[p]);
            n = n < stream.size - at ? n : stream.size - at;
            memcpy(frame_reader_room(&r, n), stream.data + at, n);
            frame_reader_filled(&r, n);
            at += n;
            const void *payload;
            size_t size;
            for (;;) {
                assert_int_equal(frame_reader_next(&r, &payload, &size), STATUS_OK);
                if (!payload)
                    break;
                assert_frame(payload, size, seen++);
            }
        }
        assert_int_equal(seen, N_FRAMES);
        frame_reader_clear(&r);
    }
    bytes_clear(&stream);
}

static status read_length(uint32_t length, size_t max_bytes)
{
    frame_reader r;
    const void *payload;
    size_t size;
    frame_reader_init(&r, max_bytes);
    frame_put_header(frame_reader_room(&r, FRAME_HEADER_BYTES), length);
    frame_reader_filled(&r, FRAME_HEADER_BYTES);
    status st = frame_reader_next(&r, &payload, &size);
    if (st == STATUS_OK && length > 0)
        assert_null(payload);
    frame_reader_clear(&r);
    return st;
}

static void too_long_is_refused_at_its_header(void **state)
{
    (void)state;
    assert_int_equal(read_length(0, 10), STATUS_OK);
    assert_int_equal(read_length(10, 10), STATUS_OK);
    assert_int_equal(read_length(11, 10), STATUS_BAD_INPUT);
    assert_string_equal(status_message(), "a frame of 11 bytes, more than the 10 allowed");
    assert_int_equal(read_length(0xffffffffu, CONTROL_FRAME_BYTES), STATUS_BAD_INPUT);
}

static void the_length_is_little_endian(void **state)
{
    (void)state;
    unsigned char header[FRAME_HEADER_BYTES];
    frame_put_header(header, 0x01020304u);
    assert_memory_equal(header, ((unsigned char[]){4, 3, 2, 1}), 4);
}

/* ---- messages ---- */

static const void *payload_of(const bytes_writer *frame, size_t *size)
{
    *size = frame->size - FRAME_HEADER_BYTES;
    unsigned char header[FRAME_HEADER_BYTES];
    frame_put_header(header, (uint32_t)*size);
    assert_memory_equal(frame->data, header, sizeof header);
    return frame->data + FRAME_HEADER_BYTES;
}

static void messages_come_back(void **state)
{
    (void)state;
    bytes_writer frame = {0};
    Convoke__Control__ToLeader m = CONVOKE__CONTROL__TO_LEADER__INIT, *back;
    Convoke__Control__Ids ids = CONVOKE__CONTROL__IDS__INIT;
    uint64_t list[] = {1, UINT64_MAX};
    ids.launch = 12;
    ids.n_ids = 2;
    ids.ids = list;
    m.kind_case = CONVOKE__CONTROL__TO_LEADER__KIND_HOLD;
    m.hold = &ids;
    assert_int_equal(control_put_to_leader(&frame, &m), STATUS_OK);
    size_t size;
    const void *payload = payload_of(&frame, &size);
    assert_int_equal(control_get_to_leader(payload, size, &back), STATUS_OK);
    assert_int_equal(back->kind_case, CONVOKE__CONTROL__TO_LEADER__KIND_HOLD);
    assert_true(back->hold->ids[1] == UINT64_MAX);
    assert_true(control_launch_of_to_leader(back) == 12);
    convoke__control__to_leader__free_unpacked(back, NULL);
    bytes_clear(&frame);
}

/* Two events packed one by one are the Report that protobuf-c would have packed whole. */
static void a_report_put_together_is_the_report_packed_whole(void **state)
{
    (void)state;
    Convoke__Control__Report report = CONVOKE__CONTROL__REPORT__INIT;
    Convoke__Control__Event events[200], *pointers[200];
    Convoke__Control__TokenLogprob token = CONVOKE__CONTROL__TOKEN_LOGPROB__INIT, *tokens = &token;
    uint32_t free_blocks[] = {3, 4};
    char reason[300];
    memset(reason, 'x', sizeof reason);
    reason[sizeof reason - 1] = '\0';
    token.token = 77;
    token.logprob = -1.5f;
    report.launch = 9;
    report.step = 1000;
    report.n_kv_free_of_rank = 2;
    report.kv_free_of_rank = free_blocks;
    bytes_writer parts = {0}, together = {0}, whole = {0};
    for (int i = 0; i < 200; i++) {
        convoke__control__event__init(&events[i]);
        pointers[i] = &events[i];
        events[i].id = (uint64_t)i << 30;
        events[i].kind = (Convoke__Control__EventKind)(i % 4);
        events[i].n_tokens = i % 4 == 2;
        events[i].tokens = &tokens;
        if (i % 4 == 3)
            events[i].reason = reason + i;
        assert_int_equal(control_add_event(&parts, &events[i]), STATUS_OK);
    }
    assert_int_equal(control_put_report(&together, &report, &parts), STATUS_OK);
    report.n_events = 200;
    report.events = pointers;
    Convoke__Control__ToCoordinator m = CONVOKE__CONTROL__TO_COORDINATOR__INIT;
    m.kind_case = CONVOKE__CONTROL__TO_COORDINATOR__KIND_REPORT;
    m.report = &report;
    assert_int_equal(control_put_to_coordinator(&whole, &m), STATUS_OK);
    assert_int_equal(together.size, whole.size);
    assert_memory_equal(together.data, whole.data, whole.size);
    bytes_clear(&parts);
    bytes_clear(&together);
    bytes_clear(&whole);
}

static void empty_and_damaged_messages_are_refused(void **state)
{
    (void)state;
    Convoke__Control__ToLeader *to_leader;
    Convoke__Control__ToCoordinator *to_coordinator;
    static const unsigned char cut[] = {0x22, 0x05, 0x08};
    assert_int_equal(control_get_to_leader("", 0, &to_leader), STATUS_BAD_INPUT);
    assert_int_equal(control_get_to_coordinator("", 0, &to_coordinator), STATUS_BAD_INPUT);
    assert_int_equal(control_get_to_leader(cut, sizeof cut, &to_leader), STATUS_BAD_INPUT);
    assert_int_equal(control_get_to_coordinator(cut, sizeof cut, &to_coordinator), STATUS_BAD_INPUT);
}

/* ---- secrets and addresses ---- */

static void write_file(const char *path, const char *text, mode_t mode)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    assert_int_equal(chmod(path, mode), 0);
}

static void a_secret_is_read_from_files_of_ones_own(void **state)
{
    (void)state;
    char folder[4096], path[4200];
    control_secret made, back;
    snprintf(folder, sizeof folder, "%s", support_scratch());
    snprintf(path, sizeof path, "%s/secret", folder);
    assert_int_equal(control_secret_make(&made), STATUS_OK);
    assert_int_equal(made.n, CONTROL_SECRET_MADE);
    char text[CONTROL_SECRET_MAX + 10];
    snprintf(text, sizeof text, "  %s\n", made.text);
    write_file(path, text, 0600);
    assert_int_equal(control_secret_read(path, &back), STATUS_OK);
    assert_true(control_secret_equal(&made, back.text, (size_t)back.n));
    static const mode_t open_modes[] = {0640, 0604, 0620, 0602, 0777};
    for (size_t i = 0; i < sizeof open_modes / sizeof *open_modes; i++) {
        assert_int_equal(chmod(path, open_modes[i]), 0);
        assert_int_equal(control_secret_read(path, &back), STATUS_BAD_INPUT);
    }
    write_file(path, "short\n", 0600);
    assert_int_equal(control_secret_read(path, &back), STATUS_BAD_INPUT);
    write_file(path, "two words, but long enough", 0600);
    assert_int_equal(control_secret_read(path, &back), STATUS_BAD_INPUT);
    assert_int_equal(control_secret_read(folder, &back), STATUS_BAD_INPUT);
    support_remove(folder);
    assert_int_equal(control_secret_read(path, &back), STATUS_IO);
}

static void a_secret_is_read_from_a_pipe(void **state)
{
    (void)state;
    int ends[2];
    char path[64];
    control_secret made, back;
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(control_secret_make(&made), STATUS_OK);
    assert_int_equal(write(ends[1], made.text, (size_t)made.n), made.n);
    close(ends[1]);
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    assert_int_equal(control_secret_read(path, &back), STATUS_OK);
    assert_true(control_secret_equal(&made, back.text, (size_t)back.n));
    close(ends[0]);
}

static void secrets_differ_wherever_they_differ(void **state)
{
    (void)state;
    control_secret a, b;
    assert_int_equal(control_secret_make(&a), STATUS_OK);
    for (int i = 0; i < a.n; i++) {
        b = a;
        b.text[i] ^= 1;
        assert_false(control_secret_equal(&a, b.text, (size_t)b.n));
    }
    assert_true(control_secret_equal(&a, a.text, (size_t)a.n));
    assert_false(control_secret_equal(&a, a.text, (size_t)a.n - 1));
    assert_false(control_secret_equal(&a, a.text, 0));
}

static void addresses_are_taken_apart(void **state)
{
    (void)state;
    char host[256], port[8];
    assert_int_equal(control_split_address("--x", "node0:99", host, port), STATUS_OK);
    assert_string_equal(host, "node0");
    assert_string_equal(port, "99");
    assert_int_equal(control_split_address("--x", "[::1]:7000", host, port), STATUS_OK);
    assert_string_equal(host, "::1");
    assert_int_equal(control_split_address("--x", ":0", host, port), STATUS_OK);
    assert_string_equal(host, "");
    static const char *const wrong[] = {"", "node0", "node0:", "node0:x", "node0:70000", "::1:80", "node0:-1", "node0:1 "};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_int_equal(control_split_address("--x", wrong[i], host, port), STATUS_USAGE);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        {"frames come out as they went in, in whatever pieces", pieces_do_not_matter, NULL, NULL, NULL},
        {"a frame too long is refused at its header", too_long_is_refused_at_its_header, NULL, NULL, NULL},
        {"the length is little-endian", the_length_is_little_endian, NULL, NULL, NULL},
        {"a message comes back from its frame", messages_come_back, NULL, NULL, NULL},
        {"a report put together is the report packed whole", a_report_put_together_is_the_report_packed_whole, NULL, NULL, NULL},
        {"empty and damaged messages are refused", empty_and_damaged_messages_are_refused, NULL, NULL, NULL},
        {"a secret is read from a file that is one's own alone", a_secret_is_read_from_files_of_ones_own, NULL, NULL, NULL},
        {"a secret is read from a pipe", a_secret_is_read_from_a_pipe, NULL, NULL, NULL},
        {"secrets differ wherever they differ", secrets_differ_wherever_they_differ, NULL, NULL, NULL},
        {"addresses are taken apart", addresses_are_taken_apart, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
