// Context: rows are larger than the caches, and stores that bypass them are the usual advice. Choice: memcpy,
// on the caller's thread. Rejected: SSE2 streaming stores took 1.0 times memcpy's CPU time in runs of 64 KiB
// and more, 1.1 in runs of 16 KiB and 2 in runs of 2 KiB or less (Zen 5, whose memcpy needs no reads for
// ownership); two threads gained nothing next to an engine that keeps its cores busy.
#include "hyperspace/kv_copy.h"

#include <cstring>

namespace hyperspace::kv {
namespace {

// Calls visit(run) for every run of a block, in logical order.
template <typename Visit>
void for_each_run(const Layer& layer, int dim, uint8_t* at, const Visit& visit) {
    if (dim == layer.dims) {
        visit(at);
        return;
    }
    for (size_t i = 0; i < layer.counts[dim]; ++i) {
        for_each_run(layer, dim + 1, at + static_cast<ptrdiff_t>(i) * layer.strides[dim], visit);
    }
}

uint8_t* block_of(const Layer& layer, int64_t id) { return layer.base + id * layer.block_stride; }

}  // namespace

Layer layer_of(uint8_t* base, ptrdiff_t block_stride, const ptrdiff_t* shape, const ptrdiff_t* strides,
               int dims) {
    Layer layer{base, block_stride, 1, 1, 0, {}, {}};
    int inner = dims;  // dimensions from here on are contiguous: the run
    while (inner > 0 &&
           (shape[inner - 1] == 1 || strides[inner - 1] == static_cast<ptrdiff_t>(layer.run_bytes))) {
        layer.run_bytes *= static_cast<size_t>(shape[--inner]);
    }
    layer.page_bytes = layer.run_bytes;
    for (int dim = 0; dim < inner; ++dim) {
        layer.page_bytes *= static_cast<size_t>(shape[dim]);
        if (shape[dim] == 1) continue;
        layer.counts[layer.dims] = static_cast<size_t>(shape[dim]);
        layer.strides[layer.dims++] = strides[dim];
    }
    return layer;
}

void gather(const Layer* layers, const int64_t* const* ids, size_t layer_count, size_t blocks, uint8_t* row) {
    for (size_t place = 0; place < blocks; ++place) {
        for (size_t l = 0; l < layer_count; ++l) {
            const Layer& layer = layers[l];
            if (ids[l][place] == 0) {
                std::memset(row, 0, layer.page_bytes);
                row += layer.page_bytes;
                continue;
            }
            for_each_run(layer, 0, block_of(layer, ids[l][place]), [&](const uint8_t* run) {
                std::memcpy(row, run, layer.run_bytes);
                row += layer.run_bytes;
            });
        }
    }
}

void scatter(const Layer* layers, const int64_t* const* ids, size_t layer_count, size_t blocks,
             const uint8_t* row) {
    for (size_t place = 0; place < blocks; ++place) {
        for (size_t l = 0; l < layer_count; ++l) {
            const Layer& layer = layers[l];
            if (ids[l][place] == 0) {
                row += layer.page_bytes;
                continue;
            }
            for_each_run(layer, 0, block_of(layer, ids[l][place]), [&](uint8_t* run) {
                std::memcpy(run, row, layer.run_bytes);
                row += layer.run_bytes;
            });
        }
    }
}

}  // namespace hyperspace::kv
