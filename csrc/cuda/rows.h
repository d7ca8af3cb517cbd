// Turns a caller's description of its cache, blocks and chunks into the kernels' parameters; CPU code, no
// CUDA.
//
// Everything here throws std::invalid_argument, with a text for the caller of the Python function.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "code.h"
#include "paged.h"

namespace hyperspace::cuda {

// One layer: `base + id * block_stride` starts the block `id` of these dimensions, outermost first, in bytes.
struct LayerSpec {
    uint64_t base;
    uint32_t table;
    uint64_t block_stride;
    std::vector<uint64_t> shape, strides;
};

// The layers of one part, in the row's order.
struct Part {
    std::vector<Layer> layers;
    std::vector<uint64_t> last_byte;  // of each layer's last block
    std::array<Geometry, kGeometriesMax> geometry = {};
    uint32_t geometries = 0;
    uint32_t tables = 0;
    uint32_t num_blocks = 0;
    uint32_t block_row_bytes = 0;
    uint32_t page_bytes = 0;  // 0: the layers' differ
    bool aligned = true;      // pieces of 16 bytes never straddle, and are at suitable addresses
};

Part plan_part(const std::vector<LayerSpec>& layers, uint64_t num_blocks);

using BlockTables = std::vector<std::vector<int64_t>>;

// `layers` is the address of the part's table in device memory.
PagedRow plan_row(const Part& part, const Layer* layers, const BlockTables& tables, uint64_t row_bytes);

SealKey plan_seal(const std::string& key, const std::string& nonce);

uint32_t checked_chunk_bytes(int64_t chunk_bytes, uint64_t row_bytes);

// Fills the parameters that depend on the loss pattern: of more than 32 chunks the first 32 are used, data
// before parity.
void plan_losses(const std::array<const uint8_t*, kTotalChunks>& chunks, DecodeParams& params);

}  // namespace hyperspace::cuda
