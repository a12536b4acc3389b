/* prefix_key.h - the name of a prefix: 128 bits over everything before and in a block of tokens.
 *
 *     root = H(what the bits depend on beside tokens: combine mode, row format, the request's salt)
 *     key of block i = H(key of block i - 1, tokens of block i)
 *
 * H is SipHash-2-4 with 128 bits out (Aumasson, Bernstein, "SipHash: a fast short-input PRF", 2012; the 128-bit form of its
 * reference code). Its key is drawn at random for each engine, so that nobody can make two prefixes that share a name; equal
 * keys are taken for equal tokens without comparing these. */
#ifndef CONVOKE_WORKER_PREFIX_KEY_H
#define CONVOKE_WORKER_PREFIX_KEY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint64_t word[2]; /* both zero: no name */
} prefix_key;

typedef struct {
    uint64_t word[2];
} prefix_secret;

static inline uint64_t prefix_rotate(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

static inline void prefix_rounds(uint64_t v[4], int n)
{
    for (int i = 0; i < n; i++) {
        v[0] += v[1], v[1] = prefix_rotate(v[1], 13) ^ v[0], v[0] = prefix_rotate(v[0], 32);
        v[2] += v[3], v[3] = prefix_rotate(v[3], 16) ^ v[2];
        v[0] += v[3], v[3] = prefix_rotate(v[3], 21) ^ v[0];
        v[2] += v[1], v[1] = prefix_rotate(v[1], 17) ^ v[2], v[2] = prefix_rotate(v[2], 32);
    }
}

static inline void prefix_word(uint64_t v[4], uint64_t m)
{
    v[3] ^= m;
    prefix_rounds(v, 2);
    v[0] ^= m;
}

/* H of n bytes that follow a parent key (NULL: none). Words are taken as they lie in memory: keys stay inside one process. */
static inline prefix_key prefix_hash(prefix_secret secret, const prefix_key *parent, const void *bytes, size_t n)
{
    uint64_t v[4] = {secret.word[0] ^ 0x736f6d6570736575u, secret.word[1] ^ 0x646f72616e646f6du ^ 0xee,
                     secret.word[0] ^ 0x6c7967656e657261u, secret.word[1] ^ 0x7465646279746573u};
    size_t total = n + (parent ? sizeof *parent : 0);
    for (int i = 0; parent && i < 2; i++)
        prefix_word(v, parent->word[i]);
    const unsigned char *at = bytes;
    for (; n >= 8; n -= 8, at += 8) {
        uint64_t m;
        memcpy(&m, at, sizeof m);
        prefix_word(v, m);
    }
    uint64_t last = 0;
    if (n > 0)
        memcpy(&last, at, n);
    prefix_word(v, last | (uint64_t)total << 56);
    prefix_key key;
    v[2] ^= 0xee;
    prefix_rounds(v, 4);
    key.word[0] = v[0] ^ v[1] ^ v[2] ^ v[3];
    v[1] ^= 0xdd;
    prefix_rounds(v, 4);
    key.word[1] = v[0] ^ v[1] ^ v[2] ^ v[3];
    return key;
}

static inline bool prefix_key_equal(prefix_key a, prefix_key b)
{
    return a.word[0] == b.word[0] && a.word[1] == b.word[1];
}

#endif
