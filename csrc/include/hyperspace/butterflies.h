// The additive FFT of Lin, Chung and Han over a vector type V: one text for every CPU and GPU.
//
// S.-J. Lin, W.-H. Chung, Y. S. Han, "Novel Polynomial Basis and Its Application to Reed-Solomon Erasure
// Codes", FOCS 2014 (arXiv:1404.3458). In a Cantor basis the normalised subspace polynomial of layer i maps
// V[j] to V[j-i], so a twiddle is itself a point and the derivative's constants are all 1.
//
// V provides: Register (with ^), and multiply<C>(Register), the product of every byte with the constant C.
#pragma once

#include <utility>

#include "hyperspace/gf256.h"

#ifdef __CUDACC__
#define HYPERSPACE_INLINE __host__ __device__ __forceinline__
#else
#define HYPERSPACE_INLINE inline __attribute__((always_inline))
#endif

namespace hyperspace {

template <class Body, int... I>
HYPERSPACE_INLINE void unroll_over(std::integer_sequence<int, I...>, Body body) {
    (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(0) .. body(N-1) with each number a compile-time constant.
template <int N, class Body>
HYPERSPACE_INLINE void unroll(Body body) {
    unroll_over(std::make_integer_sequence<int, N>{}, body);
}

// The constant of the butterflies of `layer` that start at `row`, for points ω_coset .. ω_{coset+31}.
constexpr uint8_t twiddle(int layer, int row, int coset) {
    return gf256::point(static_cast<unsigned>((coset | row) >> (layer + 1) << 1));
}

constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// The first register of butterfly `pair` when the two registers of each are `half` apart.
constexpr int first_of(int pair, int half) { return pair / half * 2 * half + pair % half; }

// Values to coefficients, log2(N) layers from `Layer` up. r[i] holds row Row + i * 2^Layer.
template <class V, int Coset, int Layer, int Row, int N>
HYPERSPACE_INLINE void interpolate(typename V::Register (&r)[N]) {
    unroll<log2_of(N)>([&](auto step) {
        unroll<N / 2>([&](auto pair) {
            constexpr int half = 1 << step, i = first_of(pair, half);
            constexpr uint8_t c = twiddle(Layer + step, Row + (i << Layer), Coset);
            r[i + half] = r[i + half] ^ r[i];
            if constexpr (c != 0) r[i] = r[i] ^ V::template multiply<c>(r[i + half]);
        });
    });
}

// Coefficients to values, the same layers from the top down.
template <class V, int Coset, int Layer, int Row, int N>
HYPERSPACE_INLINE void evaluate(typename V::Register (&r)[N]) {
    unroll<log2_of(N)>([&](auto undone) {
        unroll<N / 2>([&](auto pair) {
            constexpr int step = log2_of(N) - 1 - undone, half = 1 << step, i = first_of(pair, half);
            constexpr uint8_t c = twiddle(Layer + step, Row + (i << Layer), Coset);
            if constexpr (c != 0) r[i] = r[i] ^ V::template multiply<c>(r[i + half]);
            r[i + half] = r[i + half] ^ r[i];
        });
    });
}

}  // namespace hyperspace
