/* philox.h - a counter-based random generator: a pure function from (counter, key) to four 32-bit words.
 *
 * Philox 4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11), section 3.3. No
 * state: the same counter and key give the same words on every machine, in any order, so a draw can be repeated after a failure.
 */
#ifndef CONVOKE_WORKER_PHILOX_H
#define CONVOKE_WORKER_PHILOX_H

#include <stdint.h>

typedef struct {
    uint32_t word[4];
} philox_block;

static inline philox_block philox4x32(philox_block counter, uint64_t key)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    philox_block c = counter;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c.word[0];
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c.word[2];
        c = (philox_block){
            {(uint32_t)(p1 >> 32) ^ c.word[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.word[3] ^ k1, (uint32_t)p0}};
        k0 += 0x9E3779B9u; /* Weyl sequence: golden ratio */
        k1 += 0xBB67AE85u; /* sqrt(3) - 1 */
    }
    return c;
}

/* The first two words as a double in [0, 1), 53 bits. */
static inline double philox_uniform(philox_block b)
{
    return ((double)(b.word[0] >> 5) * 67108864.0 + (double)(b.word[1] >> 6)) / 9007199254740992.0;
}

#endif
