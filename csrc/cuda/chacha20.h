// The ChaCha20 block function (RFC 8439, section 2.3): 64 bytes of key stream for each counter value.
#pragma once

#include "device.h"

namespace hyperspace::cuda {

struct SealKey {
    uint32_t key[8];
    uint32_t nonce[3];
};

HYPERSPACE_INLINE uint32_t rotate_left(uint32_t x, int by) { return x << by | x >> (32 - by); }

HYPERSPACE_INLINE void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    a += b, d = rotate_left(d ^ a, 16);
    c += d, b = rotate_left(b ^ c, 12);
    a += b, d = rotate_left(d ^ a, 8);
    c += d, b = rotate_left(b ^ c, 7);
}

// Bytes 64 * counter to 64 * counter + 63 of the key stream, in little-endian words as they are in memory.
HYPERSPACE_INLINE void key_stream(const SealKey& seal, uint32_t counter, Piece (&out)[4]) {
    const uint32_t start[16] = {0x61707865,  0x3320646e,    0x79622d32,    0x6b206574,
                                seal.key[0], seal.key[1],   seal.key[2],   seal.key[3],
                                seal.key[4], seal.key[5],   seal.key[6],   seal.key[7],
                                counter,     seal.nonce[0], seal.nonce[1], seal.nonce[2]};
    uint32_t x[16];
    HYPERSPACE_UNROLL for (int i = 0; i < 16; ++i) x[i] = start[i];
    HYPERSPACE_ROLL for (int round = 0; round < 20; round += 2) {
        quarter_round(x[0], x[4], x[8], x[12]);
        quarter_round(x[1], x[5], x[9], x[13]);
        quarter_round(x[2], x[6], x[10], x[14]);
        quarter_round(x[3], x[7], x[11], x[15]);
        quarter_round(x[0], x[5], x[10], x[15]);
        quarter_round(x[1], x[6], x[11], x[12]);
        quarter_round(x[2], x[7], x[8], x[13]);
        quarter_round(x[3], x[4], x[9], x[14]);
    }
    HYPERSPACE_UNROLL for (int i = 0; i < 16; ++i) out[i / 4].word[i % 4] = x[i] + start[i];
}

}  // namespace hyperspace::cuda
