// Runs the GPU's kernels, built for the CPU, against slow twins: bytes copied one by one, ChaCha20 as the RFC
// defines it, and the CPU's codec. Every buffer has exactly its permitted length, for AddressSanitizer.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "../cuda/launch.h"
#include "../cuda/launch_host.h"
#include "../cuda/rows.h"

namespace cuda = hyperspace::cuda;
namespace rs = hyperspace::reed_solomon;

namespace {

std::mt19937 rng(1);

void expect(bool good, const char* what, size_t which) {
    if (good) return;
    std::printf("FAILED: %s, case %zu\n", what, which);
    std::exit(1);
}

// Allocated to the byte; aligned like an allocation on the device.
struct Area {
    explicit Area(size_t bytes) : bytes(bytes), memory(static_cast<uint8_t*>(::operator new(bytes, kAlign))) {
        for (size_t i = 0; i < bytes; ++i) memory[i] = static_cast<uint8_t>(rng());
    }
    ~Area() { ::operator delete(memory, kAlign); }
    Area(const Area&) = delete;
    static constexpr std::align_val_t kAlign{16};
    size_t bytes;
    uint8_t* memory;
};

struct Case {
    std::vector<uint64_t> shape;     // of a block of the first layer
    std::vector<uint64_t> order;     // of its dimensions in memory, outermost first
    uint64_t layers, shift, blocks;  // shift: bytes before each layer's cache
    uint64_t growth = 0;             // of the first dimension, from layer to layer
};

struct Cache {
    std::vector<std::unique_ptr<Area>> areas;
    std::vector<cuda::LayerSpec> specs;
};

constexpr uint64_t kNumBlocks = 9;

Cache make_cache(const Case& c) {
    Cache cache;
    for (uint64_t l = 0; l < c.layers; ++l) {
        std::vector<uint64_t> shape = c.shape, strides(c.shape.size());
        shape[0] += l * c.growth;
        uint64_t page = 1;
        for (size_t d = c.order.size(); d-- > 0;) {
            strides[c.order[d]] = page;
            page *= shape[c.order[d]];
        }
        cache.areas.push_back(std::make_unique<Area>(c.shift + kNumBlocks * page));
        const auto base = reinterpret_cast<uint64_t>(cache.areas.back()->memory + c.shift);
        cache.specs.push_back({base, static_cast<uint32_t>(l % 2), page, shape, strides});
    }
    return cache;
}

// Calls body(address of the row's byte in the cache, or nullptr) for every byte of the row in turn.
template <class Body>
void walk(const Cache& cache, const cuda::BlockTables& ids, Body body) {
    for (size_t b = 0; b < ids[0].size(); ++b) {
        for (const auto& layer : cache.specs) {
            std::vector<uint64_t> index(layer.shape.size());
            for (bool more = true; more;) {
                uint64_t at = layer.base + ids[layer.table][b] * layer.block_stride;
                for (size_t d = 0; d < index.size(); ++d) at += index[d] * layer.strides[d];
                body(ids[layer.table][b] ? reinterpret_cast<uint8_t*>(at) : nullptr);
                more = false;
                for (size_t d = index.size(); d-- > 0 && !more;) {
                    more = ++index[d] < layer.shape[d];
                    if (!more) index[d] = 0;
                }
            }
        }
    }
}

uint32_t rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

// RFC 8439, section 2.4, literally.
void seal(const cuda::SealKey& key, uint8_t* bytes, size_t length) {
    for (size_t at = 0; at < length; at += 64) {
        uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
        std::memcpy(start + 4, key.key, 32);
        start[12] = static_cast<uint32_t>(at / 64);
        std::memcpy(start + 13, key.nonce, 12);
        uint32_t x[16];
        std::memcpy(x, start, sizeof x);
        static constexpr int kQuarters[8][4] = {{0, 4, 8, 12},  {1, 5, 9, 13},  {2, 6, 10, 14},
                                                {3, 7, 11, 15}, {0, 5, 10, 15}, {1, 6, 11, 12},
                                                {2, 7, 8, 13},  {3, 4, 9, 14}};
        for (int round = 0; round < 10; ++round) {
            for (const auto& [a, b, c, d] : kQuarters) {
                x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 16);
                x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 12);
                x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 8);
                x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 7);
            }
        }
        for (int i = 0; i < 16; ++i) x[i] += start[i];
        for (size_t i = 0; i < 64 && at + i < length; ++i) {
            bytes[at + i] ^= static_cast<uint8_t>(x[i / 4] >> 8 * (i % 4));
        }
    }
}

void check_decoding(const Area& chunks, uint32_t chunk_bytes, const cuda::SealKey& key,
                    const std::vector<uint8_t>& row, size_t which) {
    for (int pattern = 0; pattern < 12; ++pattern) {
        std::vector<std::unique_ptr<Area>> held;
        std::array<const uint8_t*, 64> present = {};
        std::vector<int> columns(64);
        for (int i = 0; i < 64; ++i) columns[i] = i;
        std::shuffle(columns.begin(), columns.end(), rng);
        columns.resize(pattern < 2 ? 64 : 32 + rng() % 33);
        for (const int column : columns) {
            if (pattern == 1 && column < 32) continue;  // parity alone
            held.push_back(std::make_unique<Area>(chunk_bytes));
            std::memcpy(held.back()->memory, chunks.memory + size_t{chunk_bytes} * column, chunk_bytes);
            present[column] = held.back()->memory;
        }
        cuda::DecodeParams params = {};
        cuda::plan_losses(present, params);
        const Area opened(row.size());
        params.seal = key;
        params.chunk_bytes = chunk_bytes;
        params.row_bytes = static_cast<uint32_t>(row.size());
        params.row = opened.memory;
        cuda::launch_decode(params, 0, nullptr);
        expect(!std::memcmp(opened.memory, row.data(), row.size()), "decode", which);
    }
}

void check(const Case& c, size_t which) {
    const Cache cache = make_cache(c);
    const cuda::Part part = cuda::plan_part(cache.specs, kNumBlocks);
    cuda::BlockTables ids(part.tables, std::vector<int64_t>(c.blocks));
    for (auto& table : ids) {
        std::vector<int64_t> all = {0, 1, 2, 3, 4, 5, 6, 7, 8};
        std::shuffle(all.begin(), all.end(), rng);
        std::copy_n(all.begin(), c.blocks, table.begin());
    }
    std::vector<uint8_t> expected;
    walk(cache, ids, [&](const uint8_t* byte) { expected.push_back(byte ? *byte : 0); });

    const cuda::PagedRow paged = cuda::plan_row(part, part.layers.data(), ids, expected.size());
    const Area row(expected.size());
    cuda::launch_gather({paged, row.memory}, part.aligned, 0, nullptr);
    expect(!std::memcmp(row.memory, expected.data(), expected.size()), "gather", which);

    const uint32_t chunk_bytes = 256 * static_cast<uint32_t>((expected.size() + 8191) / 8192 | 1);
    std::vector<uint8_t> data(size_t{chunk_bytes} * 32), parity(data.size());
    std::copy(expected.begin(), expected.end(), data.begin());
    cuda::SealKey key;
    for (auto& word : key.key) word = rng();
    for (auto& word : key.nonce) word = rng();
    seal(key, data.data(), expected.size());
    const uint8_t* in[32];
    uint8_t* out[32];
    for (size_t j = 0; j < 32; ++j) in[j] = &data[j * chunk_bytes], out[j] = &parity[j * chunk_bytes];
    rs::encode(rs::best_kernels(), in, out, chunk_bytes);
    const Area chunks(2 * data.size());
    if (!part.aligned) cuda::launch_gather({paged, chunks.memory}, false, 0, nullptr);
    cuda::launch_encode({paged, part.aligned ? nullptr : chunks.memory, key, chunk_bytes, chunks.memory}, 0,
                        nullptr);
    expect(!std::memcmp(chunks.memory, data.data(), data.size()), "sealed data", which);
    expect(!std::memcmp(chunks.memory + data.size(), parity.data(), parity.size()), "parity", which);
    check_decoding(chunks, chunk_bytes, key, expected, which);

    for (size_t i = 0; i < row.bytes; ++i) row.memory[i] = static_cast<uint8_t>(rng());
    cuda::launch_scatter({paged, row.memory}, part.aligned, 0, nullptr);
    size_t at = 0;
    walk(cache, ids, [&](const uint8_t* byte) {
        expect(!byte || *byte == row.memory[at], "scatter", which);
        ++at;
    });
}

}  // namespace

int main() {
    const Case cases[] = {
        {{2, 16, 64}, {0, 1, 2}, 3, 0, 5},   // contiguous blocks
        {{4, 16, 64}, {1, 0, 2}, 2, 16, 4},  // tokens before heads in memory
        {{2, 3, 16, 32}, {2, 0, 1, 3}, 2, 0, 3},
        {{2, 5, 3, 2, 32}, {3, 1, 2, 0, 4}, 1, 0, 2},  // the maximum number of strided dimensions
        {{64, 1024}, {0, 1}, 2, 0, 1},                 // runs longer than a tile
        {{3, 700}, {0, 1}, 2, 0, 3},                   // pieces straddle layers and blocks
        {{16, 64}, {0, 1}, 2, 3, 4},                   // unaligned caches
        {{7}, {0}, 1, 1, 1},                           // a row of seven bytes
        {{1, 512}, {0, 1}, 4, 0, 5, 2},                // layers of different sizes
        {{5, 13}, {1, 0}, 3, 0, 9},                    // no contiguous bytes at all
    };
    for (const auto order : {cuda::Order::kForward, cuda::Order::kBackward}) {
        cuda::thread_order = order;
        for (size_t i = 0; i < std::size(cases); ++i) check(cases[i], i);
    }
    std::printf("kernels of the GPU, run on the CPU: ok\n");
}
