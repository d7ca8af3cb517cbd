// The only file that sees Python: validates every argument, then releases the GIL and calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "hyperspace/kv_copy.h"
#include "hyperspace/reed_solomon.h"

namespace nb = nanobind;
namespace kv = hyperspace::kv;
namespace rs = hyperspace::reed_solomon;

namespace {

constexpr int kThreadsMax = 64;
constexpr int kParityChunks = rs::kTotalChunks - rs::kDataChunks;

[[noreturn]] void refuse(PyObject* type, const std::string& message) {
    PyErr_SetString(type, message.c_str());
    throw nb::python_error();
}

enum class Access { kRead, kWrite };

// A view of any contiguous object with the buffer protocol; holds the object, so that it can't be resized.
class Buffer {
  public:
    Buffer() = default;
    Buffer(nb::handle object, const std::string& name, size_t wanted_bytes, Access access) {
        if (!PyObject_CheckBuffer(object.ptr())) {
            refuse(PyExc_TypeError,
                   name +
                       " must be a buffer (bytes, bytearray, memoryview, mmap or NumPy array), "
                       "not " +
                       Py_TYPE(object.ptr())->tp_name);
        }
        const int flags = access == Access::kWrite ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            // It was refused: request any shape, to report whether it is read-only or not contiguous.
            Py_buffer any;
            if (PyObject_GetBuffer(object.ptr(), &any, PyBUF_FULL_RO) != 0) throw nb::python_error();
            const bool read_only = any.readonly && access == Access::kWrite;
            PyBuffer_Release(&any);
            refuse(PyExc_ValueError, name + (read_only ? " is read-only" : " is not contiguous"));
        }
        if (static_cast<size_t>(view_.len) != wanted_bytes) {
            const std::string has = std::to_string(view_.len);
            PyBuffer_Release(&view_);
            refuse(PyExc_ValueError,
                   name + " has " + has + " bytes, expected " + std::to_string(wanted_bytes));
        }
    }
    Buffer(Buffer&& other) noexcept : view_(other.view_) { other.view_ = {}; }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(view_, other.view_);
        return *this;
    }
    ~Buffer() { PyBuffer_Release(&view_); }  // does nothing to an empty view

    uint8_t* bytes() const { return static_cast<uint8_t*>(view_.buf); }
    bool overlaps(const Buffer& other) const {
        return overlaps(other.bytes(), static_cast<size_t>(other.view_.len));
    }
    bool overlaps(const uint8_t* start, size_t size) const {
        return bytes() < start + size && start < bytes() + view_.len;
    }

  private:
    Py_buffer view_ = {};
};

size_t checked_chunk_bytes(Py_ssize_t chunk_bytes) {
    if (chunk_bytes < 1 || chunk_bytes > PY_SSIZE_T_MAX / rs::kTotalChunks) {
        refuse(PyExc_ValueError, "chunk_bytes is " + std::to_string(chunk_bytes) + ", expected at least 1");
    }
    return static_cast<size_t>(chunk_bytes);
}

int checked_threads(Py_ssize_t threads) {
    if (threads < 1 || threads > kThreadsMax) {
        refuse(PyExc_ValueError,
               "threads is " + std::to_string(threads) + ", expected 1 to " + std::to_string(kThreadsMax));
    }
    return static_cast<int>(threads);
}

using Isa = std::optional<std::string>;

const rs::Kernels& checked_kernels(const Isa& isa) {
    if (!isa) return rs::best_kernels();
    const rs::Kernels* kernels = rs::find_kernels(isa->c_str());
    if (!kernels) refuse(PyExc_ValueError, "isa '" + *isa + "' is not available on this machine");
    return *kernels;
}

void encode_rows(nb::handle data, nb::handle parity, Py_ssize_t chunk, const std::vector<int>& rows,
                 Py_ssize_t threads, const Isa& isa) {
    const rs::Kernels& kernels = checked_kernels(isa);
    const size_t chunk_bytes = checked_chunk_bytes(chunk);
    const int workers = checked_threads(threads);
    std::array<int, kParityChunks> place;
    place.fill(-1);
    for (size_t k = 0; k < rows.size(); ++k) {
        const std::string name = "rows[" + std::to_string(k) + "] is " + std::to_string(rows[k]);
        if (rows[k] < 0 || rows[k] >= kParityChunks) {
            refuse(PyExc_ValueError, name + ", expected 0 to " + std::to_string(kParityChunks - 1));
        }
        if (place[rows[k]] >= 0) refuse(PyExc_ValueError, name + ", as an earlier one was");
        place[rows[k]] = static_cast<int>(k);
    }
    const Buffer from(data, "data", rs::kDataChunks * chunk_bytes, Access::kRead);
    const Buffer to(parity, "parity", rows.size() * chunk_bytes, Access::kWrite);
    if (from.overlaps(to)) refuse(PyExc_ValueError, "data and parity overlap");

    const uint8_t* in[rs::kDataChunks];
    uint8_t* out[kParityChunks];
    for (int i = 0; i < rs::kDataChunks; ++i) in[i] = from.bytes() + i * chunk_bytes;
    for (int j = 0; j < kParityChunks; ++j) {
        out[j] = place[j] < 0 ? nullptr : to.bytes() + place[j] * chunk_bytes;
    }
    nb::gil_scoped_release release;
    rs::encode(kernels, in, out, chunk_bytes, workers);
}

void encode(nb::handle data, nb::handle parity, Py_ssize_t chunk_bytes, Py_ssize_t threads, const Isa& isa) {
    std::vector<int> all(kParityChunks);
    for (int j = 0; j < kParityChunks; ++j) all[j] = j;
    encode_rows(data, parity, chunk_bytes, all, threads, isa);
}

// A call's buffers and the pointers into them, all checked.
struct Decoding {
    Decoding(nb::sequence chunks, size_t chunk_bytes, nb::handle out)
        : to(out, "out", rs::kDataChunks * chunk_bytes, Access::kWrite) {
        if (nb::len(chunks) != held.size()) {
            refuse(PyExc_ValueError, "chunks has " + std::to_string(nb::len(chunks)) + " entries, expected " +
                                         std::to_string(held.size()));
        }
        for (int j = 0; j < rs::kDataChunks; ++j) rows[j] = to.bytes() + j * chunk_bytes;
        int present = 0;
        for (int i = 0; i < rs::kTotalChunks; ++i) {
            const nb::object chunk = chunks[i];
            if (chunk.is_none()) continue;
            const std::string name = "chunks[" + std::to_string(i) + "]";
            held[i] = Buffer(chunk, name, chunk_bytes, Access::kRead);
            in[i] = held[i].bytes();
            const bool in_place = i < rs::kDataChunks && in[i] == rows[i];
            if (held[i].overlaps(to) && !in_place) {
                refuse(PyExc_ValueError, name + " overlaps out, not at its own place");
            }
            ++present;
        }
        if (present < rs::kDataChunks) {
            refuse(PyExc_ValueError, "chunks has " + std::to_string(present) + " present, decoding needs " +
                                         std::to_string(rs::kDataChunks));
        }
    }

    Buffer to;
    std::array<Buffer, rs::kTotalChunks> held;
    const uint8_t* in[rs::kTotalChunks] = {};
    uint8_t* rows[rs::kDataChunks] = {};
};

void decode(nb::sequence chunks, Py_ssize_t chunk, nb::handle out, Py_ssize_t threads, const Isa& isa) {
    const rs::Kernels& kernels = checked_kernels(isa);
    const size_t chunk_bytes = checked_chunk_bytes(chunk);
    const int workers = checked_threads(threads);
    const Decoding call(chunks, chunk_bytes, out);
    nb::gil_scoped_release release;
    rs::decode(kernels, call.in, call.rows, chunk_bytes, workers);
}

std::vector<int> decode_and_check(nb::sequence chunks, Py_ssize_t chunk, nb::handle out, Py_ssize_t threads,
                                  const Isa& isa) {
    const rs::Kernels& kernels = checked_kernels(isa);
    const size_t chunk_bytes = checked_chunk_bytes(chunk);
    const int workers = checked_threads(threads);
    const Decoding call(chunks, chunk_bytes, out);
    uint32_t differing;
    {
        nb::gil_scoped_release release;
        differing = rs::decode_and_check(kernels, call.in, call.rows, chunk_bytes, workers);
    }
    std::vector<int> numbers;
    for (int j = 0; j < rs::kDataChunks; ++j) {
        if (differing >> j & 1) numbers.push_back(rs::kDataChunks + j);
    }
    return numbers;
}

// The compiled-in instruction sets that this CPU runs and that pass, fastest first.
std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const char* const* name = rs::kernel_names(); *name; ++name) {
        const rs::Kernels* kernels = rs::find_kernels(*name);
        if (kernels && rs::passes_known_answers(*kernels)) names.emplace_back(*name);
    }
    return names;
}

// A paged cache of bytes `[blocks, ...]` with any strides; holds the object.
class PagedView {
  public:
    PagedView(nb::handle object, const std::string& name, Access access) {
        const int flags = access == Access::kWrite ? PyBUF_STRIDES | PyBUF_WRITABLE : PyBUF_STRIDES;
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
        const std::string wrong = complaint();
        if (wrong.empty()) {
            layer_ = kv::layer_of(static_cast<uint8_t*>(view_.buf), view_.strides[0], view_.shape + 1,
                                  view_.strides + 1, view_.ndim - 1);
            return;
        }
        PyBuffer_Release(&view_);
        refuse(PyExc_ValueError, name + wrong);
    }
    PagedView(PagedView&& other) noexcept : view_(other.view_), layer_(other.layer_) { other.view_ = {}; }
    ~PagedView() { PyBuffer_Release(&view_); }

    const kv::Layer& layer() const { return layer_; }
    int64_t blocks() const { return view_.shape[0]; }
    bool overlaps(const Buffer& row) const {
        ptrdiff_t last = 0;
        for (int dim = 0; dim < view_.ndim; ++dim) last += (view_.shape[dim] - 1) * view_.strides[dim];
        return row.overlaps(layer_.base, static_cast<size_t>(last) + 1);
    }

  private:
    std::string complaint() const {
        if (view_.itemsize != 1) return " is not of single bytes";
        if (view_.ndim < 2 || view_.ndim > kv::kDimsMax + 1) {
            return " has " + std::to_string(view_.ndim) + " dimensions, expected 2 to " +
                   std::to_string(kv::kDimsMax + 1);
        }
        for (int dim = 0; dim < view_.ndim; ++dim) {
            if (view_.shape[dim] < 1) return " is empty";
            if (view_.strides[dim] < 0) return " is strided backwards";
        }
        return {};
    }

    Py_buffer view_ = {};
    kv::Layer layer_ = {};
};

using BlockIds = std::vector<std::vector<int64_t>>;

// Checks every argument, then calls copy(layers, ids, layer count, blocks, row) without the GIL.
template <typename Copy>
void copy_blocks(nb::sequence views, const BlockIds& ids, nb::handle row, Access of_views, Access of_row,
                 const Copy& copy) {
    const size_t count = nb::len(views);
    if (count == 0) refuse(PyExc_ValueError, "views is empty");
    if (ids.size() != count) {
        refuse(PyExc_ValueError,
               "ids has " + std::to_string(ids.size()) + " lists for " + std::to_string(count) + " views");
    }
    std::vector<PagedView> held;
    held.reserve(count);
    std::vector<kv::Layer> layers;
    std::vector<const int64_t*> tables;
    size_t block_bytes = 0;
    for (size_t i = 0; i < count; ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        held.emplace_back(views[i], "views" + at, of_views);
        if (ids[i].size() != ids[0].size()) {
            refuse(PyExc_ValueError, "ids" + at + " has " + std::to_string(ids[i].size()) +
                                         " blocks, ids[0] has " + std::to_string(ids[0].size()));
        }
        for (const int64_t id : ids[i]) {
            if (id >= 0 && id < held[i].blocks()) continue;
            refuse(PyExc_ValueError, "ids" + at + " names block " + std::to_string(id) + " of " +
                                         std::to_string(held[i].blocks()));
        }
        layers.push_back(held[i].layer());
        tables.push_back(ids[i].data());
        block_bytes += layers[i].page_bytes;
    }
    const Buffer bytes(row, "row", ids[0].size() * block_bytes, of_row);
    for (size_t i = 0; i < count; ++i) {
        if (held[i].overlaps(bytes)) {
            refuse(PyExc_ValueError, "row overlaps views[" + std::to_string(i) + "]");
        }
    }
    nb::gil_scoped_release release;
    copy(layers.data(), tables.data(), count, ids[0].size(), bytes.bytes());
}

void gather_blocks(nb::sequence views, const BlockIds& ids, nb::handle row) {
    copy_blocks(views, ids, row, Access::kRead, Access::kWrite, kv::gather);
}

void scatter_blocks(nb::sequence views, const BlockIds& ids, nb::handle row) {
    copy_blocks(views, ids, row, Access::kWrite, Access::kRead, kv::scatter);
}

}  // namespace

NB_MODULE(_native, module) {
    rs::best_kernels();  // test the kernels now, not inside the first request
    using namespace nb::literals;
    module.def("encode", encode, "data"_a.none(), "parity"_a.none(), "chunk_bytes"_a, "threads"_a,
               "isa"_a.none());
    module.def("encode_rows", encode_rows, "data"_a.none(), "parity"_a.none(), "chunk_bytes"_a, "rows"_a,
               "threads"_a, "isa"_a.none());
    module.def("decode", decode, "chunks"_a, "chunk_bytes"_a, "out"_a.none(), "threads"_a, "isa"_a.none());
    module.def("decode_and_check", decode_and_check, "chunks"_a, "chunk_bytes"_a, "out"_a.none(), "threads"_a,
               "isa"_a.none());
    module.def("isas", isas);
    module.def("gather_blocks", gather_blocks, "views"_a, "ids"_a, "row"_a.none());
    module.def("scatter_blocks", scatter_blocks, "views"_a, "ids"_a, "row"_a.none());
    module.def("isa", [] { return rs::name_of(rs::best_kernels()); });
    module.attr("CHUNK_ALIGN_BYTES") = rs::kAlignBytes;
}
