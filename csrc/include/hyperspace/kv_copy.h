// Copies whole blocks between a paged KV cache and rows: row = for each block: each layer's block, in logical
// order.
//
// vllm_adapter/kv_layout.py defines that order. Raw pointers only: callers have checked every size and
// overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperspace::kv {

inline constexpr int kDimsMax = 7;  // of one block; vLLM's views have at most 4

// One layer's cache of bytes. A block is `run_bytes` contiguous bytes at each index of the outer dimensions.
struct Layer {
    uint8_t* base;           // block 0
    ptrdiff_t block_stride;  // bytes from one block to the next
    size_t page_bytes;       // bytes of a block, all runs together
    size_t run_bytes;
    int dims;  // outer dimensions, outermost first: none when the whole block is one run
    size_t counts[kDimsMax];
    ptrdiff_t strides[kDimsMax];
};

// A block of `dims` <= kDimsMax dimensions of single bytes, none of them empty.
Layer layer_of(uint8_t* base, ptrdiff_t block_stride, const ptrdiff_t* shape, const ptrdiff_t* strides,
               int dims);

// ids[layer][i] is the block at place i of the row. Block 0 is vLLM's null block: zeros are gathered for it,
// and nothing is scattered to it.
void gather(const Layer* layers, const int64_t* const* ids, size_t layer_count, size_t blocks, uint8_t* row);
void scatter(const Layer* layers, const int64_t* const* ids, size_t layer_count, size_t blocks,
             const uint8_t* row);

}  // namespace hyperspace::kv
