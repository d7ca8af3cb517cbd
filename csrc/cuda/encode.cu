// Encoding on a GPU: a thread holds four byte columns of all 32 rows in registers.
#include "hyperspace/butterflies.h"
#include "hyperspace/reed_solomon_cuda.h"

namespace hyperspace::reed_solomon {
namespace {

struct FourBytes {
    using Register = uint32_t;

    // C * x is the sum of C * 2^bit over the bits of x: byte-wise, and no product of 0 or 1 carries.
    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(Register x) {
        Register product = 0;
        unroll<8>([&](auto bit) {
            constexpr uint8_t power = gf256::multiply(C, static_cast<uint8_t>(1 << bit));
            product ^= (x >> bit & 0x01010101u) * power;
        });
        return product;
    }
};

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    encode_columns(const uint32_t* data, uint32_t* parity, size_t chunk_words) {
    const size_t column = size_t{blockIdx.x} * kThreads + threadIdx.x;
    if (column >= chunk_words) return;
    uint32_t rows[kDataChunks];
#pragma unroll
    for (int j = 0; j < kDataChunks; ++j) rows[j] = data[j * chunk_words + column];
    interpolate<FourBytes, 0, 0, 0>(rows);
    evaluate<FourBytes, 32, 0, 0>(rows);
#pragma unroll
    for (int j = 0; j < kDataChunks; ++j) parity[j * chunk_words + column] = rows[j];
}

}  // namespace

cudaError_t encode_on_gpu(const uint8_t* data, uint8_t* parity, size_t chunk_bytes, cudaStream_t stream) {
    const size_t words = chunk_bytes / 4;
    const unsigned blocks = static_cast<unsigned>((words + kThreads - 1) / kThreads);
    encode_columns<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const uint32_t*>(data),
                                                    reinterpret_cast<uint32_t*>(parity), words);
    return cudaGetLastError();
}

}  // namespace hyperspace::reed_solomon
