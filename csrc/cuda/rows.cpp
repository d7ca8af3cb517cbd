#include "rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "hyperspace/gf256.h"

namespace hyperspace::cuda {
namespace {

constexpr uint64_t kRowBytesMax = uint64_t{1} << 31;  // exclusive: Divisor's bound

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

bool in_pieces(uint64_t bytes) { return bytes % sizeof(Piece) == 0; }

// Merges neighbouring dimensions that together are equivalent to one; contiguous ones become the run.
Geometry plan_geometry(const LayerSpec& layer, const std::string& name) {
    if (layer.shape.size() != layer.strides.size() || layer.shape.empty()) {
        refuse(name + " has " + std::to_string(layer.shape.size()) + " dimensions and " +
               std::to_string(layer.strides.size()) + " strides");
    }
    uint64_t run = 1, page = 1;
    std::vector<std::pair<uint64_t, uint64_t>> outer;  // size, stride; innermost first
    for (size_t d = layer.shape.size(); d-- > 0;) {
        const uint64_t size = layer.shape[d], stride = layer.strides[d];
        if (size == 0 || size >= kRowBytesMax) refuse(name + " has a dimension of " + std::to_string(size));
        page *= size;
        if (page >= kRowBytesMax) refuse(name + " has blocks of 2 GiB or more");
        if (size == 1) continue;
        if (outer.empty() && stride == run) {
            run *= size;
        } else if (!outer.empty() && stride == outer.back().first * outer.back().second) {
            outer.back().first *= size;
        } else {
            outer.emplace_back(size, stride);
        }
    }
    if (outer.size() > kDimensionsMax) {
        refuse(name + " is strided in " + std::to_string(outer.size()) + " dimensions, expected at most " +
               std::to_string(kDimensionsMax));
    }
    Geometry geometry = {};
    geometry.block_stride = layer.block_stride;
    geometry.run = Divisor::of(static_cast<uint32_t>(run));
    geometry.page_bytes = static_cast<uint32_t>(page);
    geometry.dimensions = static_cast<uint32_t>(outer.size());
    for (size_t d = 0; d < outer.size(); ++d) {
        geometry.size[d] = Divisor::of(static_cast<uint32_t>(outer[d].first));
        geometry.stride[d] = outer[d].second;
    }
    return geometry;
}

uint64_t last_byte_of(const Geometry& geometry, uint64_t base, uint64_t num_blocks) {
    uint64_t last = base + (num_blocks - 1) * geometry.block_stride + geometry.run.value - 1;
    for (uint32_t d = 0; d < geometry.dimensions; ++d) {
        last += (geometry.size[d].value - 1) * geometry.stride[d];
    }
    return last;
}

bool is_aligned(const Geometry& geometry, uint64_t base) {
    bool aligned = in_pieces(base) && in_pieces(geometry.block_stride) && in_pieces(geometry.run.value);
    for (uint32_t d = 0; d < geometry.dimensions; ++d) aligned = aligned && in_pieces(geometry.stride[d]);
    return aligned;
}

uint16_t number_of(const Geometry& geometry, Part& part) {
    for (uint32_t g = 0; g < part.geometries; ++g) {
        if (std::memcmp(&part.geometry[g], &geometry, sizeof geometry) == 0) return static_cast<uint16_t>(g);
    }
    if (part.geometries == kGeometriesMax) {
        refuse("layers have more than " + std::to_string(kGeometriesMax) + " different shapes or strides");
    }
    part.geometry[part.geometries] = geometry;
    return static_cast<uint16_t>(part.geometries++);
}

int log_difference(int i, int j) { return gf256::kLogarithms.log[gf256::point(i) ^ gf256::point(j)]; }

}  // namespace

Part plan_part(const std::vector<LayerSpec>& layers, uint64_t num_blocks) {
    if (layers.empty()) refuse("layers is empty");
    if (num_blocks == 0 || num_blocks >= kRowBytesMax) refuse("num_blocks is " + std::to_string(num_blocks));
    Part part;
    part.num_blocks = static_cast<uint32_t>(num_blocks);
    uint64_t offset = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        const std::string name = "layers[" + std::to_string(i) + "]";
        const LayerSpec& layer = layers[i];
        if (layer.base == 0) refuse(name + " has no pointer");
        if (layer.table >= kBlockIdsMax) refuse(name + " is of table " + std::to_string(layer.table));
        const Geometry geometry = plan_geometry(layer, name);
        part.layers.push_back({layer.base, static_cast<uint32_t>(offset), static_cast<uint16_t>(layer.table),
                               number_of(geometry, part)});
        part.last_byte.push_back(last_byte_of(geometry, layer.base, num_blocks));
        part.tables = std::max(part.tables, layer.table + 1);
        part.aligned = part.aligned && is_aligned(geometry, layer.base);
        offset += geometry.page_bytes;
        if (offset >= kRowBytesMax) refuse("a block of all layers has 2 GiB or more");
    }
    part.block_row_bytes = static_cast<uint32_t>(offset);
    part.page_bytes = part.geometry[0].page_bytes;
    for (uint32_t g = 1; g < part.geometries; ++g) {
        if (part.geometry[g].page_bytes != part.page_bytes) part.page_bytes = 0;
    }
    return part;
}

PagedRow plan_row(const Part& part, const Layer* layers, const BlockTables& tables, uint64_t row_bytes) {
    if (tables.size() != part.tables) {
        refuse("block_ids has " + std::to_string(tables.size()) + " lists, expected " +
               std::to_string(part.tables));
    }
    const size_t blocks = tables[0].size();
    if (blocks == 0) refuse("block_ids[0] is empty");
    if (blocks * tables.size() > kBlockIdsMax) {
        refuse("block_ids has " + std::to_string(blocks * tables.size()) + " ids, expected at most " +
               std::to_string(kBlockIdsMax));
    }
    if (row_bytes != uint64_t{part.block_row_bytes} * blocks || row_bytes >= kRowBytesMax) {
        refuse("row has " + std::to_string(row_bytes) + " bytes, expected " +
               std::to_string(uint64_t{part.block_row_bytes} * blocks));
    }
    PagedRow row = {};
    row.layers = layers;
    row.layer_count = static_cast<uint32_t>(part.layers.size());
    row.block_count = static_cast<uint32_t>(blocks);
    row.row_bytes = static_cast<uint32_t>(row_bytes);
    row.block_row_bytes = Divisor::of(part.block_row_bytes);
    if (part.page_bytes != 0) row.page_bytes = Divisor::of(part.page_bytes);
    std::copy(part.geometry.begin(), part.geometry.end(), row.geometry);
    for (size_t t = 0; t < tables.size(); ++t) {
        const std::string name = "block_ids[" + std::to_string(t) + "]";
        if (tables[t].size() != blocks) {
            refuse(name + " has " + std::to_string(tables[t].size()) + " ids, expected " +
                   std::to_string(blocks));
        }
        for (size_t b = 0; b < blocks; ++b) {
            const int64_t id = tables[t][b];
            if (id < 0 || id >= part.num_blocks) {
                refuse(name + "[" + std::to_string(b) + "] is " + std::to_string(id) + ", expected 0 to " +
                       std::to_string(part.num_blocks - 1));
            }
            row.ids[t * blocks + b] = static_cast<int32_t>(id);
        }
    }
    return row;
}

SealKey plan_seal(const std::string& key, const std::string& nonce) {
    SealKey seal;
    if (key.size() != sizeof seal.key)
        refuse("key has " + std::to_string(key.size()) + " bytes, expected 32");
    if (nonce.size() != sizeof seal.nonce) {
        refuse("nonce has " + std::to_string(nonce.size()) + " bytes, expected 12");
    }
    std::memcpy(seal.key, key.data(), key.size());  // little-endian, as CPU and GPU are
    std::memcpy(seal.nonce, nonce.data(), nonce.size());
    return seal;
}

uint32_t checked_chunk_bytes(int64_t chunk_bytes, uint64_t row_bytes) {
    const std::string is = "chunk_bytes is " + std::to_string(chunk_bytes);
    if (chunk_bytes < 1 || chunk_bytes % reed_solomon::kAlignBytes != 0)
        refuse(is + ", expected a multiple of 256");
    if (uint64_t(chunk_bytes) >= kRowBytesMax / kDataChunks) refuse(is + ", expected less than 64 MiB");
    if (row_bytes > uint64_t(chunk_bytes) * kDataChunks) {
        refuse(is + ", and 32 of them don't hold a row of " + std::to_string(row_bytes) + " bytes");
    }
    return static_cast<uint32_t>(chunk_bytes);
}

void plan_losses(const std::array<const uint8_t*, kTotalChunks>& chunks, DecodeParams& params) {
    const auto present =
        std::count_if(chunks.begin(), chunks.end(), [](auto* chunk) { return chunk != nullptr; });
    if (present < kDataChunks) {
        refuse("chunks has " + std::to_string(present) + " present, decoding needs 32");
    }
    params.data_lost = 0;
    for (int i = 0, used = 0; i < kTotalChunks; ++i) {
        params.chunks[i] = used < kDataChunks ? chunks[i] : nullptr;
        used += params.chunks[i] != nullptr;
        params.data_lost += i < kDataChunks && !chunks[i];
    }
    for (int i = 0; i < kTotalChunks; ++i) {
        int log = 0;
        for (int e = 0; e < kTotalChunks; ++e) {
            if (!params.chunks[e] && e != i) log += log_difference(i, e);
        }
        params.locator[i] = gf256::kLogarithms.exp[log % 255];
        if (i < kDataChunks) params.unscale[i] = gf256::kLogarithms.exp[(255 - log % 255) % 255];
    }
}

}  // namespace hyperspace::cuda
