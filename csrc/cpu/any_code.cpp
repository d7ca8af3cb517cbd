// Any k + m <= 256: a row of Lagrange coefficients for each wanted chunk, no transforms.
#include <cstring>

#include "columns.h"
#include "kernels.h"
#include "lagrange.h"
#include "threads.h"

namespace hyperspace::reed_solomon {
namespace {

using Some = Inputs<kPointsMax>;
using SomeOut = Outputs<kPointsMax>;

bool is_specialised(int data_chunks, int parity_chunks) {
    return data_chunks == kDataChunks && parity_chunks == kTotalChunks - kDataChunks;
}

// As many coefficient rows as fit the stack are computed at a time: 16 x 255.
constexpr int kRowsAtOnce = 16;

// Writes out[j], the value at point targets[j], from in[i], the value at point known[i].
void combine_points(const Kernels& kernels, const uint8_t* known, const Some& in, int inputs,
                    const uint8_t* targets, const SomeOut& out, int outputs, size_t bytes) {
    const Lagrange lagrange(known, inputs);
    for (int first = 0; first < outputs; first += kRowsAtOnce) {
        const int count = outputs - first < kRowsAtOnce ? outputs - first : kRowsAtOnce;
        uint8_t coefficients[kRowsAtOnce * kPointsMax];
        Outputs<kRowsAtOnce> rows;
        for (int o = 0; o < count; ++o) {
            lagrange.row(targets[first + o], coefficients + o * inputs);
            rows.row[o] = out.row[first + o];
        }
        in_blocks(in, rows, bytes, [&](auto* from, auto* to, size_t block) {
            kernels.combine(from, inputs, coefficients, to, count, block);
        });
    }
}

}  // namespace

void encode_any(const Kernels& kernels, int data_chunks, int parity_chunks, const uint8_t* const* data,
                uint8_t* const* parity, size_t chunk_bytes, int threads) {
    if (is_specialised(data_chunks, parity_chunks)) {
        encode(kernels, data, parity, chunk_bytes, threads);
        return;
    }
    uint8_t known[kPointsMax], targets[kPointsMax];
    Some in;
    SomeOut out;
    int wanted = 0;
    for (int i = 0; i < data_chunks; ++i) known[i] = static_cast<uint8_t>(i), in.row[i] = data[i];
    for (int j = 0; j < parity_chunks; ++j) {
        if (!parity[j]) continue;
        targets[wanted] = static_cast<uint8_t>(data_chunks + j);
        out.row[wanted++] = parity[j];
    }
    share_columns(threads, chunk_bytes, kAlignBytes, [&](size_t from, size_t to) {
        combine_points(kernels, known, in.from(from), data_chunks, targets, out.from(from), wanted,
                       to - from);
    });
}

void decode_any(const Kernels& kernels, int data_chunks, int parity_chunks, const uint8_t* const* chunks,
                uint8_t* const* out, size_t chunk_bytes, int threads) {
    if (is_specialised(data_chunks, parity_chunks)) {
        decode(kernels, chunks, out, chunk_bytes, threads);
        return;
    }
    uint8_t known[kPointsMax], targets[kPointsMax];
    Some in;
    SomeOut rebuilt;
    int lost = 0;
    for (int i = 0, count = 0; i < data_chunks + parity_chunks && count < data_chunks; ++i) {
        if (!chunks[i]) continue;
        known[count] = static_cast<uint8_t>(i);
        in.row[count++] = chunks[i];
    }
    for (int j = 0; j < data_chunks; ++j) {
        if (chunks[j]) continue;
        targets[lost] = static_cast<uint8_t>(j);
        rebuilt.row[lost++] = out[j];
    }
    share_columns(threads, chunk_bytes, kAlignBytes, [&](size_t from, size_t to) {
        for (int j = 0; j < data_chunks; ++j) {
            if (chunks[j] && chunks[j] != out[j]) std::memcpy(out[j] + from, chunks[j] + from, to - from);
        }
        combine_points(kernels, known, in.from(from), data_chunks, targets, rebuilt.from(from), lost,
                       to - from);
    });
}

}  // namespace hyperspace::reed_solomon
