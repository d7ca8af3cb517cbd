// Runs kernels, which process whole blocks only, on columns of any length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hyperspace/reed_solomon.h"

namespace hyperspace::reed_solomon {

// Null rows are absent or not wanted, and stay null.
template <int N, class Byte>
struct Rows {
    Byte* row[N] = {};

    Rows from(size_t column) const {
        Rows shifted;
        for (int i = 0; i < N; ++i) shifted.row[i] = row[i] ? row[i] + column : nullptr;
        return shifted;
    }
};
template <int N>
using Inputs = Rows<N, const uint8_t>;
template <int N>
using Outputs = Rows<N, uint8_t>;

// Calls kernel(in, out, bytes) for the whole blocks in place and for the tail through padded copies.
template <int In, int Out, class Kernel>
void in_blocks(const Inputs<In>& in, const Outputs<Out>& out, size_t bytes, Kernel kernel) {
    const size_t tail = bytes % kAlignBytes, whole = bytes - tail;
    if (whole != 0) kernel(in.row, out.row, whole);
    if (tail == 0) return;
    alignas(64) uint8_t padded_in[In][kAlignBytes], padded_out[Out][kAlignBytes];
    Inputs<In> tail_in;
    Outputs<Out> tail_out;
    for (int i = 0; i < In; ++i) {
        if (!in.row[i]) continue;
        std::memcpy(padded_in[i], in.row[i] + whole, tail);
        std::memset(padded_in[i] + tail, 0, kAlignBytes - tail);
        tail_in.row[i] = padded_in[i];
    }
    for (int i = 0; i < Out; ++i) tail_out.row[i] = out.row[i] ? padded_out[i] : nullptr;
    kernel(tail_in.row, tail_out.row, kAlignBytes);
    for (int i = 0; i < Out; ++i) {
        if (out.row[i]) std::memcpy(out.row[i] + whole, padded_out[i], tail);
    }
}

}  // namespace hyperspace::reed_solomon
