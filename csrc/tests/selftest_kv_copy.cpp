// Gathers from and scatters to random layouts, against loops over single bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "hyperspace/kv_copy.h"

namespace kv = hyperspace::kv;

namespace {

std::mt19937 rng(3);

// A cache of `blocks` blocks of [2, 3, run] bytes, its four dimensions in a random order in memory.
struct Cache {
    explicit Cache(ptrdiff_t blocks, ptrdiff_t run) : shape{blocks, 2, 3, run} {
        int order[4] = {0, 1, 2, 3};
        for (int i = 3; i > 0; --i) std::swap(order[i], order[rng() % (i + 1)]);
        ptrdiff_t size = 1;
        for (const int dim : order) {
            strides[dim] = size;
            size *= shape[dim];
        }
        bytes.reset(new uint8_t[size]);  // exact size: AddressSanitizer sees one byte too many
        for (ptrdiff_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(rng());
    }

    kv::Layer layer() const { return kv::layer_of(bytes.get(), strides[0], shape + 1, strides + 1, 3); }

    // Byte `at` of a block in logical order.
    uint8_t& byte(int64_t block, ptrdiff_t at) const {
        const ptrdiff_t c = at % shape[3], b = at / shape[3] % shape[2], a = at / shape[3] / shape[2];
        return bytes[block * strides[0] + a * strides[1] + b * strides[2] + c * strides[3]];
    }

    ptrdiff_t shape[4], strides[4];
    std::unique_ptr<uint8_t[]> bytes;
};

void expect(bool good, const char* what) {
    if (good) return;
    std::printf("FAILED: %s\n", what);
    std::exit(1);
}

void check(ptrdiff_t run) {
    const int64_t places[2][3] = {{4, 0, 2}, {1, 3, 0}};
    const int64_t* ids[2] = {places[0], places[1]};
    const Cache caches[2] = {Cache(5, run), Cache(6, run + 1)};
    const kv::Layer layers[2] = {caches[0].layer(), caches[1].layer()};
    const size_t row_bytes = 3 * (layers[0].page_bytes + layers[1].page_bytes);
    const std::unique_ptr<uint8_t[]> row(new uint8_t[row_bytes]);

    kv::gather(layers, ids, 2, 3, row.get());
    const uint8_t* next = row.get();
    for (int place = 0; place < 3; ++place) {
        for (int l = 0; l < 2; ++l) {
            expect(layers[l].page_bytes == static_cast<size_t>(6 * caches[l].shape[3]), "page_bytes");
            for (size_t at = 0; at < layers[l].page_bytes; ++at, ++next) {
                const int64_t id = places[l][place];
                expect(*next == (id ? caches[l].byte(id, at) : 0), "gather");
            }
        }
    }

    for (size_t i = 0; i < row_bytes; ++i) row[i] = static_cast<uint8_t>(rng());
    const uint8_t null_byte = caches[0].byte(0, 0);
    kv::scatter(layers, ids, 2, 3, row.get());
    next = row.get();
    for (int place = 0; place < 3; ++place) {
        for (int l = 0; l < 2; ++l) {
            for (size_t at = 0; at < layers[l].page_bytes; ++at, ++next) {
                const int64_t id = places[l][place];
                expect(!id || *next == caches[l].byte(id, at), "scatter");
            }
        }
    }
    expect(caches[0].byte(0, 0) == null_byte, "scatter wrote the null block");
}

}  // namespace

void check_kv_copy() {
    for (int round = 0; round < 200; ++round) check(1 + round % 67);
    std::printf("kv_copy: ok\n");
}
