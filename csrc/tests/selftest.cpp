// Runs every kernel against the slow twin. Each buffer has exactly its permitted length, so that
// AddressSanitizer sees one byte too many (cmake -DHYPERSPACE_SANITIZE=ON).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "hyperspace/gf256.h"
#include "hyperspace/reed_solomon.h"

namespace rs = hyperspace::reed_solomon;
using hyperspace::gf256::multiply;
using hyperspace::gf256::point;

void check_kv_copy();  // selftest_kv_copy.cpp

namespace {

using Chunk = std::unique_ptr<uint8_t[]>;
std::mt19937 rng(1);

uint8_t inverse(uint8_t a) {
    uint8_t result = 1;
    for (int i = 0; i < 254; ++i) result = multiply(result, a);
    return result;
}

// The slow twin: Lagrange's formula, a row of coefficients for each parity chunk.
std::vector<std::vector<uint8_t>> parity_matrix() {
    std::vector<std::vector<uint8_t>> rows(32, std::vector<uint8_t>(32));
    for (int j = 0; j < 32; ++j) {
        for (int i = 0; i < 32; ++i) {
            uint8_t above = 1, below = 1;
            for (int m = 0; m < 32; ++m) {
                if (m == i) continue;
                above = multiply(above, point(32 + j) ^ point(m));
                below = multiply(below, point(i) ^ point(m));
            }
            rows[j][i] = multiply(above, inverse(below));
        }
    }
    return rows;
}

void expect(bool good, const char* what, const char* isa, size_t bytes) {
    if (good) return;
    std::printf("FAILED: %s, %s, chunk_bytes=%zu\n", what, isa, bytes);
    std::exit(1);
}

void check(const rs::Kernels& kernels, size_t bytes, size_t shift, int patterns) {
    static const auto matrix = parity_matrix();
    std::vector<Chunk> chunks;  // each starts `shift` bytes into an allocation that ends where it ends
    const uint8_t* data[32];
    uint8_t* parity[32];
    for (int i = 0; i < 64; ++i) {
        chunks.emplace_back(new uint8_t[bytes + shift]);
        for (size_t b = 0; b < bytes + shift; ++b) chunks[i][b] = static_cast<uint8_t>(rng());
        i < 32 ? void(data[i] = chunks[i].get() + shift) : void(parity[i - 32] = chunks[i].get() + shift);
    }
    rs::encode(kernels, data, parity, bytes);
    for (int j = 0; j < 32; ++j) {
        for (size_t b = 0; b<bytes; b += bytes> 2048 ? 97 : 1) {
            uint8_t sum = 0;
            for (int i = 0; i < 32; ++i) sum ^= multiply(matrix[j][i], data[i][b]);
            expect(sum == parity[j][b], "parity", rs::name_of(kernels), bytes);
        }
    }
    for (int wanted = 1; wanted <= 6; ++wanted) {  // both ways to make a few rows
        std::vector<Chunk> rows;
        uint8_t* some[32] = {};
        for (int k = 0; k < wanted; ++k) some[k * 5] = rows.emplace_back(new uint8_t[bytes]).get();
        rs::encode(kernels, data, some, bytes);
        for (int k = 0; k < wanted; ++k) {
            expect(!std::memcmp(some[k * 5], parity[k * 5], bytes), "rows", rs::name_of(kernels), bytes);
        }
    }
    for (int pattern = 0; pattern < patterns; ++pattern) {
        const uint8_t* present[64];
        for (int i = 0; i < 64; ++i) present[i] = i < 32 ? data[i] : parity[i - 32];
        if (pattern == 0) std::memset(present, 0, 32 * sizeof *present);  // parity alone
        for (int n = pattern % 33; pattern != 0 && n > 0;) {
            const uint8_t*& victim = present[rng() % 64];
            n -= victim != nullptr;
            victim = nullptr;
        }
        std::vector<Chunk> rebuilt;
        uint8_t* out[32];
        for (auto*& row : out) row = rebuilt.emplace_back(new uint8_t[bytes]).get();
        rs::decode(kernels, present, out, bytes, 1 + pattern % 3);
        for (int i = 0; i < 32; ++i) {
            expect(!std::memcmp(out[i], data[i], bytes), "decode", rs::name_of(kernels), bytes);
        }
        expect(rs::decode_and_check(kernels, present, out, bytes, 1 + pattern % 2) == 0,
               "check of a codeword", rs::name_of(kernels), bytes);
        if (!present[63]) continue;
        parity[31][bytes - 1] ^= 1;  // the last: used only if 32 are lost
        const bool surplus = std::count(present, present + 64, nullptr) < 32;
        const uint32_t differing = rs::decode_and_check(kernels, present, out, bytes);
        expect(differing == (surplus ? 0x8000'0000u : 0), "check of a wrong chunk", rs::name_of(kernels),
               bytes);
        parity[31][bytes - 1] ^= 1;
    }
}

}  // namespace

int main() {
    check_kv_copy();
    for (const char* const* each = rs::kernel_names(); *each; ++each) {
        const char* name = *each;
        const rs::Kernels* kernels = rs::find_kernels(name);
        if (!kernels) {
            std::printf("%s: not on this CPU\n", name);
            continue;
        }
        for (size_t bytes = 1; bytes <= 65; ++bytes) check(*kernels, bytes, bytes % 5, 8);
        for (size_t bytes : {255, 256, 257, 511, 768, 1000}) check(*kernels, bytes, bytes % 3, 99);
        check(*kernels, 65537, 1, 5);
        check(*kernels, 33 * 1024, 0, 34);  // large enough to be streamed past the caches
        std::printf("%s: ok\n", name);
    }
    std::printf("chosen: %s\n", rs::name_of(rs::best_kernels()));
}
