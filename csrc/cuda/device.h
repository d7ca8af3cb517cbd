// What the kernel bodies need of CUDA, for both nvcc and g++.
//
// A kernel is a struct: kThreads, Shared, Params, kPhases and a static run<phase>(params, shared, block,
// thread). A barrier separates two phases, and only `shared` and the memory behind params outlive a phase. So
// launch.cu runs the same source with __syncthreads() between the phases, and launch_host.h runs one phase of
// all threads after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hyperspace/butterflies.h"

#ifdef __CUDACC__
#define HYPERSPACE_UNROLL _Pragma("unroll")
#define HYPERSPACE_ROLL _Pragma("unroll 1")  // unrolled it would only fill the instruction cache
#else
#define HYPERSPACE_UNROLL _Pragma("GCC unroll 32")
#define HYPERSPACE_ROLL
#endif
#define HYPERSPACE_USUALLY(condition)

// bench/cuda_static.py counts the instructions of the usual path: no loops, no other path.
#ifdef HYPERSPACE_STRAIGHT_LINE
#undef HYPERSPACE_ROLL
#undef HYPERSPACE_USUALLY
#define HYPERSPACE_ROLL HYPERSPACE_UNROLL
#define HYPERSPACE_USUALLY(condition) __builtin_assume(condition)
#endif

namespace hyperspace::cuda {

// 16 bytes: the widest load and store of a thread.
struct alignas(16) Piece {
    uint32_t word[4];
};

// Quotients by a divisor that only the host knows: a multiplication and a shift (T. Granlund,
// P. L. Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994), for n < 2^31.
struct Divisor {
    uint32_t value, magic, shift;

    static Divisor of(uint32_t value) {
        uint32_t log = 0;
        while ((uint64_t{1} << log) < value) ++log;
        const uint32_t shift = 31 + log;
        return {value, static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value), shift};
    }
    HYPERSPACE_INLINE uint32_t quotient(uint32_t n) const {
        return static_cast<uint32_t>(uint64_t{n} * magic >> shift);
    }
};

}  // namespace hyperspace::cuda
