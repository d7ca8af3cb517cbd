// The kernels, written once over a vector type V and compiled once for each instruction set.
//
// Besides what butterflies.h requires, V provides: kBytes, load, store, stream (a store that bypasses the
// caches, to an aligned address), fence, prefetch, kSums (how many sums of products fit the registers), and a
// run-time constant: Factor, factor(c), multiply(Register, Factor). V is in an anonymous namespace, and so is
// everything made from it: the linker can't hand one instruction set's code to another.
#pragma once

#include <cstring>

#include "hyperspace/butterflies.h"
#include "kernels.h"

namespace hyperspace::reed_solomon {

// 256 bytes of 32 rows, 8 KiB, stay in the L1 cache between passes, with their inputs and the next ones.
inline constexpr int kBlock = kAlignBytes;
inline constexpr size_t kCombineStrip = 4096, kCombineAhead = 512;

template <class V>
struct Body {
    using Register = typename V::Register;
    struct alignas(64) Scratch {
        uint8_t row[32][kBlock];
    };

    template <int Stride, int N>
    HYPERSPACE_INLINE static void load_rows(Register (&r)[N], const Scratch& scratch, int row, int column) {
        unroll<N>([&](auto i) { r[i] = V::load(scratch.row[row + i * Stride] + column); });
    }

    template <int Stride, int N>
    HYPERSPACE_INLINE static void store_rows(Scratch& scratch, int row, int column, const Register (&r)[N]) {
        unroll<N>([&](auto i) { V::store(scratch.row[row + i * Stride] + column, r[i]); });
    }

    template <bool Stream>
    HYPERSPACE_INLINE static void put(uint8_t* to, Register value) {
        if constexpr (Stream) {
            V::stream(to, value);
        } else {
            V::store(to, value);
        }
    }

    static bool can_stream(const uint8_t* to) { return reinterpret_cast<uintptr_t>(to) % V::kBytes == 0; }

    static bool can_stream(uint8_t* const out[32]) {
        bool aligned = true;
        for (int row = 0; row < kDataChunks; ++row) aligned = aligned && can_stream(out[row]);
        return aligned;
    }

    // ---- One half to the other: 160 butterflies a column instead of 1,024 products. Three passes, each
    // reading and writing a row once: layers 0-1 in, 2-4 and back 4-2, 1-0 out.

    template <int From, int To, bool Stream>
    __attribute__((flatten)) static void transform_blocks(const uint8_t* const in[32], uint8_t* const out[32],
                                                          size_t bytes) {
        Scratch scratch;
        for (size_t at = 0; at < bytes; at += kBlock) {
            const size_t ahead = at + kBlock < bytes ? at + kBlock : at;
            unroll<8>([&](auto group) {
                constexpr int row = 4 * group;
                for (int column = 0; column < kBlock; column += V::kBytes) {
                    Register r[4];
                    unroll<4>([&](auto i) {
                        r[i] = V::load(in[row + i] + at + column);
                        V::prefetch(in[row + i] + ahead + column);
                    });
                    interpolate<V, From, 0, row>(r);
                    store_rows<1>(scratch, row, column, r);
                }
            });
            for (int row = 0; row < 4; ++row) {
                for (int column = 0; column < kBlock; column += V::kBytes) {
                    Register r[8];
                    load_rows<4>(r, scratch, row, column);
                    interpolate<V, From, 2, 0>(r);
                    evaluate<V, To, 2, 0>(r);
                    store_rows<4>(scratch, row, column, r);
                }
            }
            unroll<8>([&](auto group) {
                constexpr int row = 4 * group;
                for (int column = 0; column < kBlock; column += V::kBytes) {
                    Register r[4];
                    load_rows<1>(r, scratch, row, column);
                    evaluate<V, To, 0, row>(r);
                    unroll<4>([&](auto i) {
                        if (out[row + i]) put<Stream>(out[row + i] + at + column, r[i]);
                    });
                }
            });
        }
    }

    template <int From, int To>
    static void transform(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes, bool stream) {
        (stream && can_stream(out) ? transform_blocks<From, To, true>
                                   : transform_blocks<From, To, false>)(in, out, bytes);
    }

    // ---- A few rows: plain sums of products.

    // Count sums of the products of all inputs; factors are ordered by input, then by sum.
    template <int Count>
    __attribute__((flatten)) static void combine_rows(const uint8_t* const in[32],
                                                      const typename V::Factor* factors, uint8_t* const* out,
                                                      size_t from, size_t to) {
        for (size_t column = from; column < to; column += V::kBytes) {
            const size_t ahead = column + kCombineAhead < to ? column + kCombineAhead : column;
            Register sum[Count] = {};
            for (int i = 0; i < kDataChunks; ++i) {
                const Register x = V::load(in[i] + column);
                V::prefetch(in[i] + ahead);
                unroll<Count>([&](auto o) { sum[o] = sum[o] ^ V::multiply(x, factors[i * Count + o]); });
            }
            unroll<Count>([&](auto o) { V::store(out[o] + column, sum[o]); });
        }
    }

    // Count sums at a time while enough are left, then fewer.
    template <int Count>
    static void combine_most(const uint8_t* const in[32], const uint8_t* coefficients, uint8_t* const* out,
                             int outputs, size_t from, size_t to) {
        typename V::Factor factors[kDataChunks * Count];
        for (; outputs >= Count; outputs -= Count) {
            for (int i = 0; i < kDataChunks; ++i) {
                for (int o = 0; o < Count; ++o)
                    factors[i * Count + o] = V::factor(coefficients[o * kDataChunks + i]);
            }
            combine_rows<Count>(in, factors, out, from, to);
            coefficients += Count * kDataChunks, out += Count;
        }
        if constexpr (Count > 1) {
            combine_most<Count / 2>(in, coefficients, out, outputs, from, to);
        }
    }

    // In strips, so that the inputs of the first sums are still in the L2 cache for the next.
    static void combine(const uint8_t* const in[32], const uint8_t* coefficients, uint8_t* const* out,
                        int outputs, size_t bytes) {
        for (size_t from = 0; from < bytes; from += kCombineStrip) {
            const size_t to = from + kCombineStrip < bytes ? from + kCombineStrip : bytes;
            combine_most<V::kSums>(in, coefficients, out, outputs, from, to);
        }
    }

    // ---- Any 32 of 64 (Lin, Chung, Han 2014, section V). Let f be the data's polynomial and Λ the one that
    // vanishes at the erased points: fΛ is known at all 64 points (0 where erased), has degree < 64, and its
    // derivative at an erased point e is f(e)Λ'(e).

    template <int Coset, int RowInHalf>
    HYPERSPACE_INLINE static void interpolate_scaled(const uint8_t* const in[64], const uint8_t locator[64],
                                                     Scratch& scratch, size_t at, size_t ahead) {
        typename V::Factor scale[4];
        unroll<4>([&](auto i) { scale[i] = V::factor(locator[Coset + RowInHalf + i]); });
        for (int column = 0; column < kBlock; column += V::kBytes) {
            Register r[4];
            unroll<4>([&](auto i) {
                const uint8_t* chunk = in[Coset + RowInHalf + i];
                r[i] = chunk ? V::multiply(V::load(chunk + at + column), scale[i]) : Register{};
                if (chunk) V::prefetch(chunk + ahead + column);
            });
            interpolate<V, Coset, 0, RowInHalf>(r);
            store_rows<1>(scratch, RowInHalf, column, r);
        }
    }

    // The derivative's coefficient j is the sum over the clear bits i of j of coefficient j + 2^i. Only the
    // lower 32 matter: the 64-point transform's last layer adds nothing to values at the data's points.
    template <int Row>
    HYPERSPACE_INLINE static void derive_and_evaluate(const Scratch& low, Scratch& high, int column) {
        Register r[8];
        load_rows<4>(r, high, Row, column);
        interpolate<V, 32, 2, 0>(r);
        unroll<8>([&](auto q) {
            constexpr int j = Row + 4 * q;
            // Layer 5 of the interpolation: coefficient 32 + j = low + high.
            r[q] = r[q] ^ V::load(low.row[j] + column);
            unroll<5>([&](auto bit) {
                if constexpr (!(j >> bit & 1)) r[q] = r[q] ^ V::load(low.row[j | 1 << bit] + column);
            });
        });
        evaluate<V, 0, 2, 0>(r);
        store_rows<4>(high, Row, column, r);
    }

    template <int Row, bool Stream>
    HYPERSPACE_INLINE static void evaluate_unscaled(const Scratch& scratch,
                                                    const typename V::Factor unscale[32],
                                                    uint8_t* const out[32], size_t at) {
        for (int column = 0; column < kBlock; column += V::kBytes) {
            Register r[4];
            load_rows<1>(r, scratch, Row, column);
            evaluate<V, 0, 0, Row>(r);
            unroll<4>([&](auto i) {
                if (out[Row + i])
                    put<Stream>(out[Row + i] + at + column, V::multiply(r[i], unscale[Row + i]));
            });
        }
    }

    template <bool Stream>
    __attribute__((flatten)) static void recover_blocks(const uint8_t* const in[64],
                                                        const uint8_t locator[64], uint8_t* const out[32],
                                                        size_t bytes) {
        typename V::Factor unscale[32];
        for (int row = 0; row < kDataChunks; ++row) {
            const int log = gf256::kLogarithms.log[locator[row]];
            unscale[row] = V::factor(gf256::kLogarithms.exp[(255 - log) % 255]);
        }
        Scratch low, high;
        for (size_t at = 0; at < bytes; at += kBlock) {
            const size_t ahead = at + kBlock < bytes ? at + kBlock : at;
            unroll<8>([&](auto group) {
                interpolate_scaled<0, 4 * group>(in, locator, low, at, ahead);
                interpolate_scaled<32, 4 * group>(in, locator, high, at, ahead);
            });
            for (int row = 0; row < 4; ++row) {
                for (int column = 0; column < kBlock; column += V::kBytes) {
                    Register r[8];
                    load_rows<4>(r, low, row, column);
                    interpolate<V, 0, 2, 0>(r);
                    store_rows<4>(low, row, column, r);
                }
            }
            unroll<4>([&](auto row) {
                for (int column = 0; column < kBlock; column += V::kBytes) {
                    derive_and_evaluate<row>(low, high, column);
                }
            });
            unroll<8>([&](auto group) { evaluate_unscaled<4 * group, Stream>(high, unscale, out, at); });
        }
    }

    static void recover(const uint8_t* const in[64], const uint8_t locator[64], uint8_t* const out[32],
                        size_t bytes, bool stream) {
        (stream && can_stream(out) ? recover_blocks<true> : recover_blocks<false>)(in, locator, out, bytes);
    }

    static constexpr Kernels kernels(const char* name, int combine_before_transform,
                                     int combine_before_recovery) {
        return {name,
                combine_before_transform,
                combine_before_recovery,
                transform<0, 32>,
                transform<32, 0>,
                combine,
                recover,
                V::fence};
    }
};

}  // namespace hyperspace::reed_solomon
