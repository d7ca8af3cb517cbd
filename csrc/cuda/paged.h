// Where a byte of a row is in the paged cache.
//
// A row is (block, layer): for each block of the run, each layer's whole block, in its view's logical order
// whatever its strides are (vllm_adapter/kv_layout.py). Offsets in a row stay below 2^31.
#pragma once

#include "device.h"

namespace hyperspace::cuda {

inline constexpr int kDimensionsMax =
    4;  // of a block, besides the contiguous bytes: kernel block, K/V, head, token
inline constexpr int kGeometriesMax = 4;  // layers that differ in shape or strides, in one part
inline constexpr int kBlockIdsMax =
    768;  // in one call, all tables together: they fill the 4 KiB of arguments

// How one layer's blocks are laid out: runs of contiguous bytes, numbered row-major over `size`.
struct Geometry {
    uint64_t block_stride;
    uint64_t stride[kDimensionsMax];  // innermost first
    Divisor size[kDimensionsMax];
    Divisor run;
    uint32_t dimensions;  // 0: a block is one run
    uint32_t page_bytes;
};

struct alignas(16) Layer {
    uint64_t base;
    uint32_t offset;  // among the bytes of a row's block
    uint16_t table;   // of `ids`
    uint16_t geometry;
};

// A run of blocks of all layers. Passed by value: ids and geometries are kernel arguments.
struct PagedRow {
    const Layer* layers;  // in device memory, by ascending offset
    uint32_t layer_count;
    uint32_t block_count;
    uint32_t row_bytes;
    Divisor block_row_bytes;
    Divisor page_bytes;  // value 0: the layers' differ
    Geometry geometry[kGeometriesMax];
    int32_t ids[kBlockIdsMax];  // table by table, block_count each
};

struct Place {
    uint8_t* bytes;  // nullptr: of the null block
    uint32_t left;   // contiguous from here on
};

HYPERSPACE_INLINE uint32_t layer_at(const PagedRow& row, uint32_t offset) {
    HYPERSPACE_USUALLY(row.page_bytes.value != 0);
    if (row.page_bytes.value != 0) return row.page_bytes.quotient(offset);
    uint32_t low = 0, high = row.layer_count;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        (row.layers[middle].offset <= offset ? low : high) = middle;
    }
    return low;
}

HYPERSPACE_INLINE Place locate(const PagedRow& row, uint32_t offset) {
    const uint32_t block = row.block_row_bytes.quotient(offset);
    const uint32_t in_block = offset - block * row.block_row_bytes.value;
    const Layer layer = row.layers[layer_at(row, in_block)];
    const Geometry& geometry = row.geometry[layer.geometry];
    const uint32_t in_page = in_block - layer.offset;
    const int32_t id = row.ids[layer.table * row.block_count + block];
    if (id == 0) return {nullptr, geometry.page_bytes - in_page};
    uint8_t* bytes =
        reinterpret_cast<uint8_t*>(layer.base) + static_cast<uint64_t>(id) * geometry.block_stride;
    HYPERSPACE_USUALLY(geometry.dimensions == 0);
    if (geometry.dimensions == 0) return {bytes + in_page, geometry.page_bytes - in_page};
    uint32_t rest = geometry.run.quotient(in_page);
    const uint32_t in_run = in_page - rest * geometry.run.value;
    for (uint32_t d = 0; d < geometry.dimensions; ++d) {
        const uint32_t outer = geometry.size[d].quotient(rest);
        bytes += (rest - outer * geometry.size[d].value) * geometry.stride[d];
        rest = outer;
    }
    return {bytes + in_run, geometry.run.value - in_run};
}

// An address from a table could be in any memory: tell the compiler that it is the device's.
template <class Byte>
HYPERSPACE_INLINE Byte* on_device(Byte* address) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(address));
#endif
    return address;
}

HYPERSPACE_INLINE Piece load_piece(const uint8_t* from) {
    return *reinterpret_cast<const Piece*>(on_device(from));
}
HYPERSPACE_INLINE void store_piece(uint8_t* to, const Piece& piece) {
    *reinterpret_cast<Piece*>(on_device(to)) = piece;
}

// The first `bytes` of a piece (16 or more: all) at `to`, which is 16-byte aligned.
HYPERSPACE_INLINE void store_first(uint8_t* to, const Piece& piece, uint32_t bytes) {
    HYPERSPACE_USUALLY(bytes >= 16);
    if (bytes >= 16) return store_piece(to, piece);
    HYPERSPACE_UNROLL for (uint32_t i = 0; i < 16; ++i) {
        if (i < bytes) to[i] = static_cast<uint8_t>(piece.word[i / 4] >> 8 * (i % 4));
    }
}

// ---- Gather and scatter: a thread moves four pieces, 128 threads apart, all loads before the stores. Where
// a run, a stride or an address is not a multiple of 16, it moves single bytes.

inline constexpr uint32_t kCopyThreads = 128;
inline constexpr uint32_t kCopyPieces = 4;
inline constexpr uint32_t kCopyTileBytes = kCopyThreads * kCopyPieces * sizeof(Piece);

struct CopyParams {
    PagedRow paged;
    uint8_t* row;  // contiguous, 16-byte aligned
};

struct NoShared {};

struct Copy {
    using Params = CopyParams;
    using Shared = NoShared;
    static constexpr int kThreads = kCopyThreads, kPhases = 1, kBlocksPerSm = 8;

    static uint32_t blocks(const Params& p) {
        return (p.paged.row_bytes + kCopyTileBytes - 1) / kCopyTileBytes;
    }

    HYPERSPACE_INLINE static uint32_t offset_of(uint32_t block, uint32_t thread, uint32_t i) {
        return block * kCopyTileBytes + (i * kCopyThreads + thread) * static_cast<uint32_t>(sizeof(Piece));
    }

    template <class Body>
    HYPERSPACE_INLINE static void for_bytes(const Params& p, uint32_t block, uint32_t thread, Body body) {
        const uint32_t end = (block + 1) * kCopyTileBytes;
        const uint32_t stop = end < p.paged.row_bytes ? end : p.paged.row_bytes;
        HYPERSPACE_ROLL for (uint32_t at = block * kCopyTileBytes + thread; at < stop; at += kCopyThreads) {
            body(locate(p.paged, at).bytes, on_device(p.row + at));
        }
    }
};

template <bool Aligned>
struct Gather : Copy {
    template <int Phase>
    HYPERSPACE_INLINE static void run(const Params& p, Shared&, uint32_t block, uint32_t thread) {
        if constexpr (!Aligned) {
            for_bytes(p, block, thread,
                      [](uint8_t* paged, uint8_t* row) { *row = paged ? *on_device(paged) : 0; });
        } else {
            Piece piece[kCopyPieces] = {};
            HYPERSPACE_UNROLL for (uint32_t i = 0; i < kCopyPieces; ++i) {
                const uint32_t offset = offset_of(block, thread, i);
                if (offset >= p.paged.row_bytes) continue;
                const uint8_t* paged = locate(p.paged, offset).bytes;
                if (paged) piece[i] = load_piece(paged);
            }
            HYPERSPACE_UNROLL for (uint32_t i = 0; i < kCopyPieces; ++i) {
                const uint32_t offset = offset_of(block, thread, i);
                if (offset < p.paged.row_bytes) store_piece(p.row + offset, piece[i]);
            }
        }
    }
};

template <bool Aligned>
struct Scatter : Copy {
    template <int Phase>
    HYPERSPACE_INLINE static void run(const Params& p, Shared&, uint32_t block, uint32_t thread) {
        if constexpr (!Aligned) {
            for_bytes(p, block, thread, [](uint8_t* paged, uint8_t* row) {
                if (paged) *on_device(paged) = *row;
            });
        } else {
            Piece piece[kCopyPieces] = {};
            HYPERSPACE_UNROLL for (uint32_t i = 0; i < kCopyPieces; ++i) {
                const uint32_t offset = offset_of(block, thread, i);
                if (offset < p.paged.row_bytes) piece[i] = load_piece(p.row + offset);
            }
            HYPERSPACE_UNROLL for (uint32_t i = 0; i < kCopyPieces; ++i) {
                const uint32_t offset = offset_of(block, thread, i);
                if (offset >= p.paged.row_bytes) continue;
                uint8_t* paged = locate(p.paged, offset).bytes;
                if (paged) store_piece(paged, piece[i]);
            }
        }
    }
};

}  // namespace hyperspace::cuda
