// The GPU's Python module; with HYPERSPACE_ON_HOST the same over the host build of the kernels, for tests.
//
// Pointers come as integers. They are checked as far as possible: their alignment, and that their first and
// last byte are the device's memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/rows.h"

#ifdef HYPERSPACE_ON_HOST
#include "cuda/launch_host.h"
#define MODULE _native_cuda_host
#else
#define MODULE _native_cuda
#endif

namespace nb = nanobind;
namespace cuda = hyperspace::cuda;

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

void check_memory(uint64_t first, uint64_t last, int device, const std::string& name) {
    for (const uint64_t byte : {first, last}) {
        if (last < first || !cuda::is_device_memory(reinterpret_cast<const void*>(byte), device)) {
            refuse(name + " is not memory of device " + std::to_string(device));
        }
    }
}

// A contiguous area of device memory.
uint8_t* checked_area(uint64_t pointer, uint64_t bytes, int device, const std::string& name) {
    if (pointer % sizeof(cuda::Piece) != 0) refuse(name + " is not 16-byte aligned");
    check_memory(pointer, pointer + bytes - 1, device, name);
    return reinterpret_cast<uint8_t*>(pointer);
}

using LayerTuple = std::tuple<uint64_t, uint32_t, uint64_t, std::vector<uint64_t>, std::vector<uint64_t>>;

class KVPages {
  public:
    KVPages(const std::vector<LayerTuple>& layers, uint64_t num_blocks, int device) : device_(device) {
        std::vector<cuda::LayerSpec> specs;
        for (const auto& [base, table, block_stride, shape, strides] : layers) {
            specs.push_back({base, table, block_stride, shape, strides});
        }
        part_ = cuda::plan_part(specs, num_blocks);
        for (size_t i = 0; i < part_.layers.size(); ++i) {
            check_memory(part_.layers[i].base, part_.last_byte[i], device,
                         "layers[" + std::to_string(i) + "]");
        }
        nb::gil_scoped_release release;
        check(cuda::copy_to_device(part_.layers.data(), part_.layers.size() * sizeof(cuda::Layer), device,
                                   &table_));
    }
    ~KVPages() { cuda::free_on_device(table_, device_); }
    KVPages(const KVPages&) = delete;

    int device() const { return device_; }
    bool aligned() const { return part_.aligned; }
    uint32_t block_row_bytes() const { return part_.block_row_bytes; }
    cuda::PagedRow row(const cuda::BlockTables& ids, uint64_t row_bytes) const {
        return cuda::plan_row(part_, static_cast<const cuda::Layer*>(table_), ids, row_bytes);
    }
    uint64_t bytes_of(const cuda::BlockTables& ids) const {
        return ids.empty() ? 0 : uint64_t{part_.block_row_bytes} * ids[0].size();
    }

  private:
    cuda::Part part_;
    int device_;
    void* table_ = nullptr;
};

cuda::Stream as_stream(uint64_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

cuda::CopyParams copy_params(const KVPages& pages, const cuda::BlockTables& ids, uint64_t row,
                             uint64_t row_bytes) {
    const cuda::PagedRow paged = pages.row(ids, row_bytes);
    return {paged, checked_area(row, row_bytes, pages.device(), "row")};
}

void gather(const KVPages& pages, const cuda::BlockTables& ids, uint64_t row, uint64_t row_bytes,
            uint64_t stream) {
    const cuda::CopyParams params = copy_params(pages, ids, row, row_bytes);
    nb::gil_scoped_release release;
    check(cuda::launch_gather(params, pages.aligned(), pages.device(), as_stream(stream)));
}

void scatter(const KVPages& pages, const cuda::BlockTables& ids, uint64_t row, uint64_t row_bytes,
             uint64_t stream) {
    const cuda::CopyParams params = copy_params(pages, ids, row, row_bytes);
    nb::gil_scoped_release release;
    check(cuda::launch_scatter(params, pages.aligned(), pages.device(), as_stream(stream)));
}

std::string as_string(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

void encode(const KVPages& pages, const cuda::BlockTables& ids, const nb::bytes& key, const nb::bytes& nonce,
            int64_t chunk_bytes, uint64_t chunks, uint64_t chunks_bytes, uint64_t stream) {
    cuda::EncodeParams params = {};
    params.paged = pages.row(ids, pages.bytes_of(ids));
    params.seal = cuda::plan_seal(as_string(key), as_string(nonce));
    params.chunk_bytes = cuda::checked_chunk_bytes(chunk_bytes, params.paged.row_bytes);
    if (chunks_bytes != uint64_t{params.chunk_bytes} * cuda::kTotalChunks) {
        refuse("chunks has " + std::to_string(chunks_bytes) + " bytes, expected " +
               std::to_string(uint64_t{params.chunk_bytes} * cuda::kTotalChunks));
    }
    params.chunks = checked_area(chunks, chunks_bytes, pages.device(), "chunks");
    nb::gil_scoped_release release;
    if (!pages.aligned()) {
        // The encoder writes whole 16-byte pieces, each after reading it: it can work in place.
        params.row = params.chunks;
        check(cuda::launch_gather({params.paged, params.chunks}, false, pages.device(), as_stream(stream)));
    }
    check(cuda::launch_encode(params, pages.device(), as_stream(stream)));
}

void decode(const std::vector<std::optional<uint64_t>>& chunks, int64_t chunk_bytes, const nb::bytes& key,
            const nb::bytes& nonce, uint64_t row, uint64_t row_bytes, int device, uint64_t stream) {
    if (chunks.size() != cuda::kTotalChunks) {
        refuse("chunks has " + std::to_string(chunks.size()) + " entries, expected 64");
    }
    if (row_bytes == 0) refuse("row has 0 bytes, expected at least 1");
    cuda::DecodeParams params = {};
    params.chunk_bytes = cuda::checked_chunk_bytes(chunk_bytes, row_bytes);
    params.row_bytes = static_cast<uint32_t>(row_bytes);
    params.seal = cuda::plan_seal(as_string(key), as_string(nonce));
    params.row = checked_area(row, row_bytes, device, "row");
    std::array<const uint8_t*, cuda::kTotalChunks> held = {};
    for (size_t i = 0; i < chunks.size(); ++i) {
        if (!chunks[i]) continue;
        const std::string name = "chunks[" + std::to_string(i) + "]";
        held[i] = checked_area(*chunks[i], params.chunk_bytes, device, name);
        if (*chunks[i] < row + row_bytes && row < *chunks[i] + params.chunk_bytes)
            refuse(name + " overlaps row");
    }
    cuda::plan_losses(held, params);
    nb::gil_scoped_release release;
    check(cuda::launch_decode(params, device, as_stream(stream)));
}

}  // namespace

NB_MODULE(MODULE, module) {
    using namespace nb::literals;
    nb::class_<KVPages>(module, "KVPages")
        .def(nb::init<const std::vector<LayerTuple>&, uint64_t, int>(), "layers"_a, "num_blocks"_a,
             "device"_a)
        .def_prop_ro("block_row_bytes", &KVPages::block_row_bytes)
        .def_prop_ro("aligned", &KVPages::aligned);
    module.def("why_unavailable", []() -> std::optional<std::string> {
        const char* reason = cuda::why_unavailable();
        return reason ? std::optional<std::string>(reason) : std::nullopt;
    });
    module.def("gather", gather, "pages"_a, "block_ids"_a, "row"_a, "row_bytes"_a, "stream"_a);
    module.def("scatter", scatter, "pages"_a, "block_ids"_a, "row"_a, "row_bytes"_a, "stream"_a);
    module.def("encode", encode, "pages"_a, "block_ids"_a, "key"_a, "nonce"_a, "chunk_bytes"_a, "chunks"_a,
               "chunks_bytes"_a, "stream"_a);
    module.def("decode", decode, "chunks"_a, "chunk_bytes"_a, "key"_a, "nonce"_a, "row"_a, "row_bytes"_a,
               "device"_a, "stream"_a);
    module.attr("BLOCK_IDS_MAX") = cuda::kBlockIdsMax;
#ifdef HYPERSPACE_ON_HOST
    module.def("run_threads_backward", [](bool backward) {
        cuda::thread_order = backward ? cuda::Order::kBackward : cuda::Order::kForward;
    });
#endif
}
