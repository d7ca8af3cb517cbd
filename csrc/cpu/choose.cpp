// Which kernels this machine has, and the known-answer test that they must pass before one is chosen.
#include <cstring>

#include "kernels.h"
#include "lagrange.h"

namespace hyperspace::reed_solomon {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*runs_here)();
};
constexpr Candidate kCandidates[] = {
#ifdef HYPERSPACE_X86
    {&kAvx512Kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("gfni");
     }},
    {&kAvx2Kernels, [] { return __builtin_cpu_supports("avx2") != 0; }},
#endif
#ifdef HYPERSPACE_NEON
    {&kNeonKernels, [] { return true; }},
#endif
    {&kPortableKernels, [] { return true; }},
};
constexpr int kCandidateCount = sizeof kCandidates / sizeof *kCandidates;

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
    return decode_and_check(kernels, present, rows, TestChunks::kBytes) == 0 &&
           std::memcmp(out.chunk, all.chunk, kDataChunks * TestChunks::kBytes) == 0;
}

}  // namespace

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
    const Lagrange lagrange(known);
    for (int j = 0; j < kDataChunks; ++j) {
        lagrange.row(kDataChunks + j, coefficients);
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

const Kernels& best_kernels() {
    static const Kernels* const best = []() -> const Kernels* {
        for (const Candidate& candidate : kCandidates) {
            if (candidate.runs_here() && passes_known_answers(*candidate.kernels)) return candidate.kernels;
        }
        return &kPortableKernels;
    }();
    return *best;
}

const char* const* kernel_names() {
    static const struct Names {
        const char* name[kCandidateCount + 1] = {};
        Names() {
            for (int i = 0; i < kCandidateCount; ++i) name[i] = kCandidates[i].kernels->name;
        }
    } names;
    return names.name;
}

const Kernels* find_kernels(const char* name) {
    for (const Candidate& candidate : kCandidates) {
        if (std::strcmp(name, candidate.kernels->name) == 0) {
            return candidate.runs_here() ? candidate.kernels : nullptr;
        }
    }
    return nullptr;
}

const char* name_of(const Kernels& kernels) { return kernels.name; }

}  // namespace hyperspace::reed_solomon
