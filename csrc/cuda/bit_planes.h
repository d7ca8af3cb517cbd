// 32 bytes as eight words, word i holding bit i of every byte: a product with a constant then needs only
// XORs.
//
// A butterfly costs 20 three-input XORs for 32 bytes, not 8 shifts, masks and multiplications for every 4,
// and converting a row to planes and back costs 48 operations each way.
#pragma once

#include "device.h"

namespace hyperspace::cuda {

struct Planes {
    uint32_t bit[8];

    HYPERSPACE_INLINE Planes operator^(const Planes& other) const {
        Planes sum;
        HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) sum.bit[i] = bit[i] ^ other.bit[i];
        return sum;
    }
};

// Exchanges the bits of `low` under mask << Shift with those of `high` under mask.
template <int Shift>
HYPERSPACE_INLINE void exchange(uint32_t& low, uint32_t& high, uint32_t mask) {
    const uint32_t differing = (low >> Shift ^ high) & mask;
    high ^= differing;
    low ^= differing << Shift;
}

// Word i's bit 8b + j and word j's bit 8b + i change places; its own inverse.
HYPERSPACE_INLINE void transpose(uint32_t (&word)[8]) {
    HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) exchange<4>(word[i], word[i + 4], 0x0F0F0F0Fu);
    HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i)
        exchange<2>(word[i / 2 * 4 + i % 2], word[i / 2 * 4 + i % 2 + 2], 0x33333333u);
    HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) exchange<1>(word[2 * i], word[2 * i + 1], 0x55555555u);
}

HYPERSPACE_INLINE Planes to_planes(const Piece& first, const Piece& second) {
    Planes planes;
    HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) planes.bit[i] = first.word[i],
                                                  planes.bit[i + 4] = second.word[i];
    transpose(planes.bit);
    return planes;
}

HYPERSPACE_INLINE void from_planes(Planes planes, Piece& first, Piece& second) {
    transpose(planes.bit);
    HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) first.word[i] = planes.bit[i],
                                                  second.word[i] = planes.bit[i + 4];
}

// Bit 8j + i: whether bit i of c * x depends on bit j of x.
constexpr uint64_t matrix_of(uint8_t c) {
    uint64_t matrix = 0;
    for (int j = 0; j < 8; ++j) {
        matrix |= uint64_t{gf256::multiply(c, static_cast<uint8_t>(1 << j))} << (8 * j);
    }
    return matrix;
}

// The vector type that butterflies.h requires.
struct BitPlanes {
    using Register = Planes;

    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(const Register& x) {
        constexpr uint64_t matrix = matrix_of(C);
        Register product;
        HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) {
            uint32_t sum = 0;
            HYPERSPACE_UNROLL for (int j = 0; j < 8; ++j) {
                if (matrix >> (8 * j + i) & 1) sum ^= x.bit[j];
            }
            product.bit[i] = sum;
        }
        return product;
    }

    // The same for a factor known at run time, by its bits: 2x, 4x ... each take a renaming and three XORs.
    HYPERSPACE_INLINE static Register multiply(Register x, uint8_t c) {
        Register product = {};
        HYPERSPACE_UNROLL for (int j = 0; j < 8; ++j) {
            const uint32_t wanted = 0u - (c >> j & 1u);
            HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) product.bit[i] ^= x.bit[i] & wanted;
            const uint32_t carry = x.bit[7];
            HYPERSPACE_UNROLL for (int i = 7; i > 0; --i) {
                x.bit[i] = x.bit[i - 1] ^ ((gf256::kPolynomial >> i & 1) ? carry : 0);
            }
            x.bit[0] = carry;
        }
        return product;
    }
};

}  // namespace hyperspace::cuda
