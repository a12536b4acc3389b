#include "cluster/bundle.h"

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- SHA-256 ---- */

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256_block(uint32_t h[8], const uint8_t *p)
{
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
        0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
        0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
        0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
        0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
        0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
        uint32_t t1 = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
        uint32_t a = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
        uint32_t t2 = a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += s[i];
}

void sha256_hex(const void *data, size_t size, char out[65])
{
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint8_t *p = data;
    uint8_t tail[128] = {0};
    size_t whole = size / 64 * 64, rest = size - whole, tail_size = rest < 56 ? 64 : 128;
    for (size_t at = 0; at < whole; at += 64)
        sha256_block(h, p + at);
    if (rest)
        memcpy(tail, p + whole, rest);
    tail[rest] = 0x80;
    for (int i = 0; i < 8; i++)
        tail[tail_size - 1 - (size_t)i] = (uint8_t)((uint64_t)size * 8 >> 8 * i);
    for (size_t at = 0; at < tail_size; at += 64)
        sha256_block(h, tail + at);
    for (int i = 0; i < 8; i++)
        snprintf(out + 8 * i, 9, "%08x", h[i]);
}

/* ---- zip: local entries one after another, then the directory that lists them ---- */

enum { MAX_FILES = 32 };
static const size_t MAX_FILE_BYTES = 256u << 20;

typedef struct {
    char name[256];
    uint32_t crc, size, offset;
} zip_entry;

static void put_number(bytes_writer *out, uint32_t value, int n_bytes)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    bytes_put(out, bytes, (size_t)n_bytes);
}

static uint32_t crc32_of(const uint8_t *p, size_t size)
{
    uint32_t table[256], crc = 0xffffffff;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            table[i] = table[i] & 1 ? table[i] >> 1 ^ 0xedb88320 : table[i] >> 1;
    }
    for (size_t i = 0; i < size; i++)
        crc = crc >> 8 ^ table[(crc ^ p[i]) & 0xff];
    return ~crc;
}

/* What the local header and the directory say alike: version, flags, method, time, date, checksum, sizes, length of the name. */
static void put_common(bytes_writer *out, const zip_entry *e)
{
    put_number(out, 20, 2);
    put_number(out, 0, 4);
    put_number(out, 0, 2);
    put_number(out, 0x21, 2); /* 1 January 1980: the archive depends on the files' contents alone */
    put_number(out, e->crc, 4);
    put_number(out, e->size, 4);
    put_number(out, e->size, 4);
    put_number(out, (uint32_t)strlen(e->name), 2);
    put_number(out, 0, 2);
}

static void put_directory(bytes_writer *out, const zip_entry *entries, int n)
{
    uint32_t start = (uint32_t)out->size;
    for (int i = 0; i < n; i++) {
        put_number(out, 0x02014b50, 4);
        put_number(out, 20, 2);
        put_common(out, &entries[i]);
        put_number(out, 0, 4); /* comment, disk */
        put_number(out, 0, 2);
        put_number(out, 0100644u << 16, 4);
        put_number(out, entries[i].offset, 4);
        bytes_put(out, entries[i].name, strlen(entries[i].name));
    }
    uint32_t size = (uint32_t)out->size - start;
    put_number(out, 0x06054b50, 4);
    put_number(out, 0, 4);
    put_number(out, (uint32_t)n, 2);
    put_number(out, (uint32_t)n, 2);
    put_number(out, size, 4);
    put_number(out, start, 4);
    put_number(out, 0, 2);
}

static status put_file(const char *dir, zip_entry *e, bytes_writer *out)
{
    char path[4400];
    status st = STATUS_OK;
    snprintf(path, sizeof path, "%.4000s/%.255s", dir, e->name);
    FILE *f = fopen(path, "r");
    long size = f && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    uint8_t *bytes = size >= 0 && (size_t)size <= MAX_FILE_BYTES ? malloc((size_t)size + 1) : NULL;
    if (!bytes || fseek(f, 0, SEEK_SET) || fread(bytes, 1, (size_t)size, f) != (size_t)size) {
        st = status_fail(STATUS_IO, "%s: cannot be read", path);
    } else {
        e->crc = crc32_of(bytes, (size_t)size);
        e->size = (uint32_t)size;
        e->offset = (uint32_t)out->size;
        put_number(out, 0x04034b50, 4);
        put_common(out, e);
        bytes_put(out, e->name, strlen(e->name));
        bytes_put(out, bytes, (size_t)size);
    }
    free(bytes);
    if (f)
        fclose(f);
    return st;
}

static bool is_tokenizer_file(const char *name)
{
    static const char *const names[] = {
        "tokenizer.json",          "tokenizer_config.json", "config.json", "generation_config.json",
        "special_tokens_map.json", "added_tokens.json",     "vocab.json",  "merges.txt",
        "chat_template.json"};
    static const char *const endings[] = {".model", ".tiktoken", ".jinja"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; dot && i < sizeof endings / sizeof endings[0]; i++)
        if (strcmp(dot, endings[i]) == 0)
            return true;
    return false;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const zip_entry *)a)->name, ((const zip_entry *)b)->name);
}

status bundle_tokenizer(const char *dir, bytes_writer *out)
{
    zip_entry entries[MAX_FILES];
    int n = 0;
    DIR *d = opendir(dir);
    if (!d)
        return status_fail(STATUS_IO, "%s: cannot be listed", dir);
    for (struct dirent *e = readdir(d); e && n < MAX_FILES; e = readdir(d))
        if (is_tokenizer_file(e->d_name))
            snprintf(entries[n++].name, sizeof entries[0].name, "%s", e->d_name);
    closedir(d);
    if (n == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: has no tokenizer files", dir);
    qsort(entries, (size_t)n, sizeof entries[0], by_name);
    for (int i = 0; i < n; i++)
        TRY(put_file(dir, &entries[i], out));
    put_directory(out, entries, n);
    return out->failed ? status_fail(STATUS_NO_MEMORY, "out of memory for the tokenizer's files") : STATUS_OK;
}
