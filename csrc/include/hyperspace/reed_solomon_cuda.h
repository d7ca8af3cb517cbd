// The same code on a GPU. Pointers are device pointers, 4-byte aligned; chunk_bytes is a multiple of 4.
#pragma once

#include <cuda_runtime.h>

#include "hyperspace/reed_solomon.h"

namespace hyperspace::reed_solomon {

// Chunk j of `data` and `parity` lies at j * chunk_bytes. Returns the launch's error.
cudaError_t encode_on_gpu(const uint8_t* data, uint8_t* parity, size_t chunk_bytes, cudaStream_t stream);

}  // namespace hyperspace::reed_solomon
