// AVX-512 with GFNI: a product with a constant is a product with a bit matrix, one instruction.
//
// GF2P8MULB's own field is that of AES (0x11B); GF2P8AFFINEQB multiplies by any 8 x 8 matrix over GF(2), and
// so in any field of 256 elements (Intel, "Galois Field New Instructions", 2018).
#include <immintrin.h>

#include "kernels_columns.h"

namespace hyperspace::reed_solomon {
namespace {

// Byte 7 - i is the row that makes bit i of the product: bit j says whether c * 2^j has bit i.
constexpr uint64_t matrix(uint8_t c) {
    uint64_t rows = 0;
    for (int j = 0; j < 8; ++j) {
        const uint8_t column = gf256::multiply(c, static_cast<uint8_t>(1 << j));
        for (int i = 0; i < 8; ++i) rows |= uint64_t(column >> i & 1) << (8 * (7 - i) + j);
    }
    return rows;
}
struct Matrices {
    uint64_t of[256];
};
constexpr Matrices make_matrices() {
    Matrices matrices{};
    for (int c = 0; c < 256; ++c) matrices.of[c] = matrix(static_cast<uint8_t>(c));
    return matrices;
}
alignas(64) constexpr Matrices kMatrices = make_matrices();

struct Avx512Gfni {
    using Register = __m512i;
    static constexpr int kBytes = 64;
    static constexpr int kSums = 8;

    static Register load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store(uint8_t* to, Register value) { _mm512_storeu_si512(to, value); }
    static void stream(uint8_t* to, Register value) { _mm512_stream_si512((__m512i*)to, value); }
    static void fence() { _mm_sfence(); }
    static void prefetch(const uint8_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

    using Factor = uint64_t;
    static Factor factor(uint8_t c) { return kMatrices.of[c]; }
    HYPERSPACE_INLINE static Register multiply(Register x, Factor c) {
        return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(static_cast<long long>(c)), 0);
    }
    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(Register x) {
        return multiply(x, kMatrices.of[C]);
    }
};

}  // namespace

const Kernels kAvx512Kernels = Columns<Avx512Gfni>::kernels("avx512", 4, 6);

}  // namespace hyperspace::reed_solomon
