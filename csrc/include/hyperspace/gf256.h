// The field GF(2^8) and the 64 points of the code. Every constant here is pinned by docs/protocol.md.
#pragma once

#include <cstdint>

namespace hyperspace::gf256 {

// x^8 + x^4 + x^3 + x^2 + 1, the polynomial of ISA-L, Jerasure and RAID-6: 2 generates the field.
inline constexpr unsigned kPolynomial = 0x11D;

// Shift and add: slow and simple. Kernels only call it at compile time.
constexpr uint8_t multiply(uint8_t a, uint8_t b) {
    unsigned product = 0;
    for (unsigned shifted = a, bits = b; bits != 0; bits >>= 1) {
        if (bits & 1) product ^= shifted;
        shifted = (shifted << 1) ^ ((shifted & 0x80) ? kPolynomial : 0);
    }
    return static_cast<uint8_t>(product);
}

// Cantor's basis: V[0] = 1 and V[i]^2 + V[i] = V[i-1]. Of the two roots, which differ by 1, the smaller.
inline constexpr uint8_t kBasis[8] = {0x01, 0xD6, 0x98, 0x92, 0x56, 0xC8, 0x58, 0xE6};

constexpr bool is_cantor_basis() {
    bool good = kBasis[0] == 1;
    for (int i = 1; i < 8; ++i) {
        good = good && (multiply(kBasis[i], kBasis[i]) ^ kBasis[i]) == kBasis[i - 1] && kBasis[i] % 2 == 0;
    }
    return good;
}
static_assert(is_cantor_basis());

// Point ω_index: the sum of the basis elements that the bits of `index` select.
constexpr uint8_t point(unsigned index) {
    uint8_t sum = 0;
    for (int bit = 0; bit < 8; ++bit) {
        if (index >> bit & 1) sum = static_cast<uint8_t>(sum ^ kBasis[bit]);
    }
    return sum;
}

// Discrete logarithms to base 2, for the products that a loss pattern needs at run time.
struct Logarithms {
    uint8_t log[256] = {};  // log[0] is unused: callers never multiply by zero
    uint8_t exp[255] = {};
};
constexpr Logarithms make_logarithms() {
    Logarithms tables;
    uint8_t power = 1;
    for (int i = 0; i < 255; ++i) {
        tables.exp[i] = power;
        tables.log[power] = static_cast<uint8_t>(i);
        power = multiply(power, 2);
    }
    return tables;
}
inline constexpr Logarithms kLogarithms = make_logarithms();

}  // namespace hyperspace::gf256
