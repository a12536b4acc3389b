/* hash.h - a quick number for some bytes: FNV-1a, 64 bits. For tables, not against forgers: where strangers choose the bytes and
 * long chains would hurt, start from a secret seed instead of HASH_START. */
#ifndef CONVOKE_PROTO_HASH_H
#define CONVOKE_PROTO_HASH_H

#include <stddef.h>
#include <stdint.h>

#define HASH_START UINT64_C(0xcbf29ce484222325)

static inline uint64_t hash_bytes(uint64_t start, const void *bytes, size_t n)
{
    const unsigned char *b = bytes;
    for (size_t i = 0; i < n; i++)
        start = (start ^ b[i]) * UINT64_C(0x100000001b3);
    return start;
}

/* splitmix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): a well-mixed number for
 * every number, one to one. */
static inline uint64_t hash_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

#endif
