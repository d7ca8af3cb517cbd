// Chooses a kernel for each loss pattern and shares the columns among threads.
#include "hyperspace/reed_solomon.h"

#include <atomic>
#include <cstring>

#include "columns.h"
#include "kernels.h"
#include "lagrange.h"
#include "threads.h"

namespace hyperspace::reed_solomon {
namespace {

using Data = Inputs<kDataChunks>;
using DataOut = Outputs<kDataChunks>;
using All = Inputs<kTotalChunks>;

// Output larger than this would only evict other data from the caches, and reading its lines before
// overwriting them costs a third of the memory traffic. Smaller output is still there when it is hashed: with
// 64 KiB chunks, encoding and BLAKE3 together take 600 us instead of 655 (bench/commitment.py).
constexpr size_t kStreamFromBytes = size_t{4} << 20;

// Decoding copies, rebuilds and checks this many columns at a time: 32 rows in and 32 out stay in the L2
// cache, as do the 32 rows of a check.
constexpr size_t kStripBytes = 4096, kCheckedStripBytes = 2048;

int count_wanted(const DataOut& out) {
    int wanted = 0;
    for (uint8_t* row : out.row) wanted += row != nullptr;
    return wanted;
}

bool should_stream(const DataOut& out, size_t chunk_bytes) {
    return static_cast<size_t>(count_wanted(out)) * chunk_bytes >= kStreamFromBytes;
}

// One way to make rows from 32 others, chosen once per call and run on any range of columns.
class Rebuild {
  public:
    // Parity from data.
    static Rebuild parity(const Kernels& kernels, const Data& data, const DataOut& parity, bool stream) {
        Rebuild made(kernels, parity, stream);
        uint8_t known[kDataChunks];
        for (int i = 0; i < kDataChunks; ++i) known[i] = static_cast<uint8_t>(i);
        std::memcpy(made.in_.row, data.row, sizeof data.row);
        if (made.wanted_ <= kernels.combine_before_transform) {
            made.prepare_combine(known, kDataChunks);
        } else {
            made.way_ = Way::kDataToParity;
        }
        return made;
    }

    // Lost data from the first 32 chunks present, data before parity, or, unless the caller requires those,
    // from all the parity.
    static Rebuild data(const Kernels& kernels, const All& chunks, const DataOut& lost, bool stream,
                        bool first_32) {
        Rebuild made(kernels, lost, stream);
        uint8_t known[kDataChunks];
        bool from_parity = !first_32 || made.wanted_ == kDataChunks;
        for (int i = 0, count = 0; i < kTotalChunks && count < kDataChunks; ++i) {
            if (!chunks.row[i]) continue;
            made.in_.row[count] = made.used_.row[i] = chunks.row[i];
            known[count++] = static_cast<uint8_t>(i);
        }
        for (int j = kDataChunks; j < kTotalChunks; ++j) from_parity = from_parity && chunks.row[j];
        if (made.wanted_ <=
            (from_parity ? kernels.combine_before_transform : kernels.combine_before_recovery)) {
            made.prepare_combine(known, 0);
        } else if (from_parity) {
            std::memcpy(made.in_.row, chunks.row + kDataChunks, sizeof made.in_.row);
            made.way_ = Way::kParityToData;
        } else {
            made.prepare_recovery();
        }
        return made;
    }

    void run(size_t from, size_t to) const { run(from, from, to - from); }

    void run(size_t in_from, size_t out_from, size_t bytes) const {
        switch (way_) {
            case Way::kCombine:
                in_blocks(in_.from(in_from), out_.from(out_from), bytes,
                          [&](auto* in, auto* out, size_t block) {
                              kernels_.combine(in, constants_, out, wanted_, block);
                          });
                break;
            case Way::kDataToParity:
            case Way::kParityToData:
                in_blocks(
                    in_.from(in_from), out_.from(out_from), bytes, [&](auto* in, auto* out, size_t block) {
                        (way_ == Way::kDataToParity ? kernels_.data_to_parity : kernels_.parity_to_data)(
                            in, out, block, stream_);
                    });
                break;
            case Way::kRecover:
                in_blocks(used_.from(in_from), out_.from(out_from), bytes,
                          [&](auto* in, auto* out, size_t block) {
                              kernels_.recover(in, constants_, out, block, stream_);
                          });
        }
    }

    bool has_work() const { return wanted_ != 0; }

  private:
    enum class Way { kCombine, kDataToParity, kParityToData, kRecover };

    Rebuild(const Kernels& kernels, const DataOut& out, bool stream)
        : kernels_(kernels), out_(out), wanted_(count_wanted(out)), stream_(stream) {}

    // Gathers the wanted rows; row j of the output is point first_target + j.
    void prepare_combine(const uint8_t known[kDataChunks], int first_target) {
        way_ = Way::kCombine;
        const Lagrange lagrange(known);
        DataOut wanted;
        for (int j = 0, count = 0; j < kDataChunks; ++j) {
            if (!out_.row[j]) continue;
            lagrange.row(first_target + j, constants_ + count * kDataChunks);
            wanted.row[count++] = out_.row[j];
        }
        out_ = wanted;
    }

    void prepare_recovery() {
        way_ = Way::kRecover;
        for (int i = 0; i < kTotalChunks; ++i) {
            int log = 0;
            for (int e = 0; e < kTotalChunks; ++e) {
                if (!used_.row[e] && e != i) log += log_difference(i, e);
            }
            constants_[i] = gf256::kLogarithms.exp[log % 255];
        }
    }

    const Kernels& kernels_;
    Way way_ = Way::kCombine;
    Data in_;
    All used_;  // for recovery, by point
    DataOut out_;
    int wanted_;
    bool stream_;
    uint8_t constants_[kDataChunks * kDataChunks];  // a row of coefficients per wanted row, or 64 locators
};

// Copies the data chunks that are present and rebuilds the others, without re-encoding.
class Decode {
  public:
    Decode(const Kernels& kernels, const All& chunks, const DataOut& out, bool stream, bool first_32)
        : copied_(copied(chunks, out)),
          target_(out),
          rebuild_(Rebuild::data(kernels, chunks, lost(chunks, out), stream, first_32)) {}

    // Nothing is read twice, so strips would gain nothing.
    bool is_one_step() const { return !rebuild_.has_work() || copies_nothing(); }

    void run(size_t from, size_t to) const {
        for (int j = 0; j < kDataChunks; ++j) {
            if (copied_.row[j]) std::memcpy(target_.row[j] + from, copied_.row[j] + from, to - from);
        }
        if (rebuild_.has_work()) rebuild_.run(from, to);
    }

  private:
    static DataOut lost(const All& chunks, const DataOut& out) {
        DataOut lost;
        for (int j = 0; j < kDataChunks; ++j) lost.row[j] = chunks.row[j] ? nullptr : out.row[j];
        return lost;
    }
    static Data copied(const All& chunks, const DataOut& out) {
        Data copied;
        for (int j = 0; j < kDataChunks; ++j) {
            copied.row[j] = chunks.row[j] == out.row[j] ? nullptr : chunks.row[j];
        }
        return copied;
    }
    bool copies_nothing() const {
        for (const uint8_t* row : copied_.row) {
            if (row) return false;
        }
        return true;
    }

    Data copied_;
    DataOut target_;
    Rebuild rebuild_;
};

template <int N, class Byte>
Rows<N, Byte> rows_at(Byte* const* rows) {
    Rows<N, Byte> copy;
    std::memcpy(copy.row, rows, sizeof copy.row);
    return copy;
}

// Encodes again, into memory that stays in cache, and compares with the chunks that decoding didn't use.
class Check {
  public:
    Check(const Kernels& kernels, const Data& data, const Data& surplus)
        : surplus_(surplus), encode_(Rebuild::parity(kernels, data, again(), false)) {}
    Check(const Check&) = delete;  // encode_ points into this

    // Bit j: parity chunk j is present and differs in columns from..to, at most kCheckedStripBytes.
    uint32_t differing(size_t from, size_t to) {
        if (!encode_.has_work()) return 0;
        encode_.run(from, 0, to - from);
        uint32_t found = 0;
        for (int j = 0; j < kDataChunks; ++j) {
            const uint8_t* row = surplus_.row[j];
            if (row && std::memcmp(again_[j], row + from, to - from) != 0) found |= uint32_t{1} << j;
        }
        return found;
    }

  private:
    DataOut again() {
        DataOut rows;
        for (int j = 0; j < kDataChunks; ++j) rows.row[j] = surplus_.row[j] ? again_[j] : nullptr;
        return rows;
    }

    alignas(64) uint8_t again_[kDataChunks][kCheckedStripBytes];
    Data surplus_;
    Rebuild encode_;
};

}  // namespace

void encode(const Kernels& kernels, const uint8_t* const data[kDataChunks],
            uint8_t* const parity[kDataChunks], size_t chunk_bytes, int threads) {
    const DataOut wanted = rows_at<kDataChunks>(parity);
    const Rebuild rebuild =
        Rebuild::parity(kernels, rows_at<kDataChunks>(data), wanted, should_stream(wanted, chunk_bytes));
    if (!rebuild.has_work()) return;
    share_columns(threads, chunk_bytes, kAlignBytes, [&](size_t from, size_t to) {
        rebuild.run(from, to);
        kernels.fence();
    });
}

void decode(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
            uint8_t* const out[kDataChunks], size_t chunk_bytes, int threads) {
    const DataOut target = rows_at<kDataChunks>(out);
    const Decode decode(kernels, rows_at<kTotalChunks>(chunks), target, should_stream(target, chunk_bytes),
                        false);
    share_columns(threads, chunk_bytes, kAlignBytes, [&](size_t from, size_t to) {
        const size_t step = decode.is_one_step() ? to - from : kStripBytes;
        for (size_t at = from; at < to; at += step) decode.run(at, at + step < to ? at + step : to);
        kernels.fence();
    });
}

uint32_t decode_and_check(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
                          uint8_t* const out[kDataChunks], size_t chunk_bytes, int threads) {
    const DataOut target = rows_at<kDataChunks>(out);
    // Not streamed: the output is read again at once.
    const Decode decode(kernels, rows_at<kTotalChunks>(chunks), target, false, true);
    Data data, surplus;
    for (int j = 0; j < kDataChunks; ++j) data.row[j] = out[j];
    for (int i = 0, used = 0; i < kTotalChunks; ++i) {
        if (chunks[i] && used++ >= kDataChunks) surplus.row[i - kDataChunks] = chunks[i];
    }
    std::atomic<uint32_t> differing{0};
    share_columns(threads, chunk_bytes, kAlignBytes, [&](size_t from, size_t to) {
        Check check(kernels, data, surplus);
        uint32_t found = 0;
        for (size_t at = from; at < to; at += kCheckedStripBytes) {
            const size_t end = at + kCheckedStripBytes < to ? at + kCheckedStripBytes : to;
            decode.run(at, end);
            found |= check.differing(at, end);
        }
        differing.fetch_or(found, std::memory_order_relaxed);
    });
    return differing.load();
}

}  // namespace hyperspace::reed_solomon
