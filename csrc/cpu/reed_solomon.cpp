// Chooses a kernel for each loss pattern, feeds ragged tails through padded copies, and tests kernels.
#include "hyperspace/reed_solomon.h"

#include <array>
#include <cstring>

#include "hyperspace/gf256.h"
#include "kernels.h"

namespace hyperspace::reed_solomon {
namespace {

using gf256::kLogarithms;

// Up to this many rows, plain sums of products beat the 160 butterflies from half to half, and the 240 and 64
// products of recovery (measured with AVX2).
constexpr int kCombineBeforeTransform = 5;
constexpr int kCombineBeforeRecovery = 10;

struct Points {
    uint8_t of[kTotalChunks] = {};
};
constexpr Points make_points() {
    Points points;
    for (int i = 0; i < kTotalChunks; ++i) points.of[i] = gf256::point(i);
    return points;
}
constexpr Points kPoints = make_points();

int log_difference(int i, int j) { return kLogarithms.log[kPoints.of[i] ^ kPoints.of[j]]; }

// Fills coefficients[i] such that f(ω_target) = sum of coefficients[i] * f(ω_known[i]): Lagrange's formula.
void lagrange(const uint8_t known[kDataChunks], int target, uint8_t coefficients[kDataChunks]) {
    for (int i = 0; i < kDataChunks; ++i) {
        int log = 0;
        for (int m = 0; m < kDataChunks; ++m) {
            if (m != i) log += log_difference(target, known[m]) + 255 - log_difference(known[i], known[m]);
        }
        coefficients[i] = kLogarithms.exp[log % 255];
    }
}

// Runs `kernel(in, out, bytes)` on the whole blocks where they lie and on the tail through padded copies.
template <size_t In, size_t Out, class Kernel>
void in_blocks(const std::array<const uint8_t*, In>& in, const std::array<uint8_t*, Out>& out,
               size_t chunk_bytes, Kernel kernel) {
    const size_t tail = chunk_bytes % kAlignBytes, whole = chunk_bytes - tail;
    if (whole != 0) kernel(in.data(), out.data(), whole);
    if (tail == 0) return;
    alignas(64) uint8_t padded_in[In][kAlignBytes] = {}, padded_out[Out][kAlignBytes];
    std::array<const uint8_t*, In> tail_in{};
    std::array<uint8_t*, Out> tail_out{};
    for (size_t i = 0; i < In; ++i) {
        if (in[i]) tail_in[i] = static_cast<uint8_t*>(std::memcpy(padded_in[i], in[i] + whole, tail));
    }
    for (size_t i = 0; i < Out; ++i) tail_out[i] = out[i] ? padded_out[i] : nullptr;
    kernel(tail_in.data(), tail_out.data(), kAlignBytes);
    for (size_t i = 0; i < Out; ++i) {
        if (out[i]) std::memcpy(out[i] + whole, padded_out[i], tail);
    }
}

using Inputs = std::array<const uint8_t*, kDataChunks>;
using Outputs = std::array<uint8_t*, kDataChunks>;

int count_wanted(const Outputs& out) {
    int wanted = 0;
    for (uint8_t* row : out) wanted += row != nullptr;
    return wanted;
}

// The wanted rows of `out`, whose row j is point first_target + j, from the points `known`.
void combine_rows(const Kernels& kernels, const uint8_t known[kDataChunks], const Inputs& in,
                  int first_target, const Outputs& out, size_t chunk_bytes) {
    uint8_t coefficients[kDataChunks * kDataChunks];
    Outputs rows{};
    int count = 0;
    for (int j = 0; j < kDataChunks; ++j) {
        if (!out[j]) continue;
        lagrange(known, first_target + j, coefficients + count * kDataChunks);
        rows[count++] = out[j];
    }
    in_blocks(in, rows, chunk_bytes, [&](auto* from, auto* to, size_t bytes) {
        kernels.combine(from, coefficients, to, count, bytes);
    });
}

void recover_rows(const Kernels& kernels, const std::array<const uint8_t*, kTotalChunks>& chunks,
                  const Outputs& out, size_t chunk_bytes) {
    uint8_t locator[kTotalChunks];
    for (int i = 0; i < kTotalChunks; ++i) {
        int log = 0;
        for (int e = 0; e < kTotalChunks; ++e) {
            if (!chunks[e] && e != i) log += log_difference(i, e);
        }
        locator[i] = kLogarithms.exp[log % 255];
    }
    in_blocks(chunks, out, chunk_bytes,
              [&](auto* from, auto* to, size_t bytes) { kernels.recover(from, locator, to, bytes); });
}

// ---- The known-answer test that a kernel must pass before it is chosen.

struct TestChunks {
    static constexpr size_t kBytes = kAlignBytes + 37;  // a whole block and a tail
    uint8_t chunk[kTotalChunks][kBytes];
};

bool decodes(const Kernels& kernels, const TestChunks& all, uint64_t lost) {
    TestChunks out;
    const uint8_t* present[kTotalChunks];
    uint8_t* rows[kDataChunks];
    for (int i = 0; i < kTotalChunks; ++i) present[i] = lost >> i & 1 ? nullptr : all.chunk[i];
    for (int i = 0; i < kDataChunks; ++i) rows[i] = out.chunk[i];
    decode(kernels, present, rows, TestChunks::kBytes);
    return std::memcmp(out.chunk, all.chunk, kDataChunks * TestChunks::kBytes) == 0;
}

bool passes_known_answers(const Kernels& kernels) {
    TestChunks all;
    const uint8_t* data[kDataChunks];
    uint8_t* parity[kDataChunks];
    for (int i = 0; i < kDataChunks; ++i) {
        for (size_t b = 0; b < TestChunks::kBytes; ++b) {
            all.chunk[i][b] = static_cast<uint8_t>((i * 0x9E3779B1u + b * 0x85EBCA77u) >> 15);
        }
        data[i] = all.chunk[i];
        parity[i] = all.chunk[kDataChunks + i];
    }
    encode(kernels, data, parity, TestChunks::kBytes);
    uint8_t known[kDataChunks], coefficients[kDataChunks];
    for (int i = 0; i < kDataChunks; ++i) known[i] = static_cast<uint8_t>(i);
    for (int j = 0; j < kDataChunks; ++j) {
        lagrange(known, kDataChunks + j, coefficients);
        for (size_t b = 0; b < TestChunks::kBytes; b += 7) {
            uint8_t sum = 0;
            for (int i = 0; i < kDataChunks; ++i) sum ^= gf256::multiply(coefficients[i], data[i][b]);
            if (sum != parity[j][b]) return false;
        }
    }
    // One pattern for each way to decode: sums of products, any 32 of 64, parity alone.
    return decodes(kernels, all, 0x8000'0421) && decodes(kernels, all, 0x0F0F'0248'5555'7777) &&
           decodes(kernels, all, 0xFFFF'FFFF);
}

const Kernels& choose_kernels() {
#ifdef HYPERSPACE_AVX2
    if (find_kernels("avx2") && passes_known_answers(kAvx2Kernels)) return kAvx2Kernels;
#endif
    return kPortableKernels;
}

}  // namespace

void encode(const Kernels& kernels, const uint8_t* const data[kDataChunks],
            uint8_t* const parity[kDataChunks], size_t chunk_bytes) {
    Inputs in;
    Outputs out;
    uint8_t known[kDataChunks];
    for (int i = 0; i < kDataChunks; ++i) {
        in[i] = data[i], out[i] = parity[i], known[i] = static_cast<uint8_t>(i);
    }
    if (count_wanted(out) <= kCombineBeforeTransform) {
        combine_rows(kernels, known, in, kDataChunks, out, chunk_bytes);
    } else {
        in_blocks(in, out, chunk_bytes, kernels.data_to_parity);
    }
}

void decode(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
            uint8_t* const out[kDataChunks], size_t chunk_bytes) {
    Outputs lost{};
    bool parity_complete = true;
    for (int j = 0; j < kDataChunks; ++j) {
        if (!chunks[j]) lost[j] = out[j];
        parity_complete = parity_complete && chunks[kDataChunks + j];
        if (chunks[j] && chunks[j] != out[j]) std::memcpy(out[j], chunks[j], chunk_bytes);
    }
    const int missing = count_wanted(lost);
    if (missing == 0) return;

    // The first 32 present: data before parity.
    uint8_t known[kDataChunks];
    Inputs in;
    std::array<const uint8_t*, kTotalChunks> used{};
    for (int i = 0, count = 0; i < kTotalChunks && count < kDataChunks; ++i) {
        if (!chunks[i]) continue;
        used[i] = in[count] = chunks[i];
        known[count++] = static_cast<uint8_t>(i);
    }
    if (missing <= (parity_complete ? kCombineBeforeTransform : kCombineBeforeRecovery)) {
        combine_rows(kernels, known, in, 0, lost, chunk_bytes);
    } else if (parity_complete) {
        std::memcpy(in.data(), chunks + kDataChunks, sizeof in);
        in_blocks(in, lost, chunk_bytes, kernels.parity_to_data);
    } else {
        recover_rows(kernels, used, lost, chunk_bytes);
    }
}

const Kernels* find_kernels(const char* name) {
#ifdef HYPERSPACE_AVX2
    if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") ? &kAvx2Kernels : nullptr;
#endif
    return std::strcmp(name, "portable") == 0 ? &kPortableKernels : nullptr;
}

const Kernels& best_kernels() {
    static const Kernels& best = choose_kernels();
    return best;
}

const char* name_of(const Kernels& kernels) { return kernels.name; }

}  // namespace hyperspace::reed_solomon
