// The kernels for a vector type V with 32 registers on the CPU and products without tables: a column of all
// 32 rows is loaded once, coded in registers and stored once.
#pragma once

#include "kernels_body.h"

namespace hyperspace::reed_solomon {

template <class V>
struct Columns {
    using Register = typename V::Register;
    using Blocks = Body<V>;

    // Measured: the CPU's own prefetchers alone are as good on small chunks and worse on large ones.
    static constexpr size_t kAhead = 256;

    template <bool Stream>
    HYPERSPACE_INLINE static void put_wanted(uint8_t* const out[32], size_t at, const Register (&r)[32]) {
        unroll<32>([&](auto i) {
            if (out[i]) Blocks::template put<Stream>(out[i] + at, r[i]);
        });
    }

    template <int From, int To, bool Stream>
    __attribute__((flatten)) static void transform_columns(const uint8_t* const in[32],
                                                           uint8_t* const out[32], size_t bytes) {
        for (size_t at = 0; at < bytes; at += V::kBytes) {
            const size_t ahead = at + kAhead < bytes ? at + kAhead : at;
            Register r[32];
            unroll<32>([&](auto i) {
                r[i] = V::load(in[i] + at);
                V::prefetch(in[i] + ahead);
            });
            interpolate<V, From, 0, 0>(r);
            evaluate<V, To, 0, 0>(r);
            put_wanted<Stream>(out, at, r);
        }
    }

    template <int From, int To>
    static void transform(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes, bool stream) {
        (stream && Blocks::can_stream(out) ? transform_columns<From, To, true>
                                           : transform_columns<From, To, false>)(in, out, bytes);
    }

    static constexpr Kernels kernels(const char* name, int combine_before_transform,
                                     int combine_before_recovery) {
        return {name,
                combine_before_transform,
                combine_before_recovery,
                transform<0, 32>,
                transform<32, 0>,
                Blocks::combine,
                Blocks::recover,
                V::fence};
    }
};

}  // namespace hyperspace::reed_solomon
